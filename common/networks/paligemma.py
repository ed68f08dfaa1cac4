"""PaliGemma 2 as a host: several images, and several exchanges about them, in one packed pass.

    vlm = PaliGemma(load_host("google/paligemma2-3b-pt-224"), images=6, prefix="image+prompt")
    encoded = vlm.encode(pixels)                          # (B, 6, 3, s, s) in [0, 1] -> image tokens
    packs = vlm.stack([vlm.exchange("Are there any buses?", "yes")], device)
    states = vlm.run(encoded, packs, rows)                # hidden states; rows: the keyframe of each pack
    words = vlm.generate(encoded, ["Are there any buses?"], rows, limit=6)

Steiner et al., "PaliGemma 2", arXiv 2412.03555; architecture, weights and processor are transformers' own.
Added are packed exchanges and a prefix that is read once.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from common import worlds
from common.files import InputError, atomic, read_image, read_json, short_hash
from common.networks.tinyvlm import Sizes, load_weights, set_tower, tiny_processor, tiny_vlm
from common.pretrained import load_pretrained, loading
from common.train import Run, barrier

# --- sizes --------------------------------------------------------------------------------------------------

PALIGEMMA2_3B = {  # 224 px; written here so that `describe` needs no network
    "vision_config": {"model_type": "siglip_vision_model", "hidden_size": 1152, "intermediate_size": 4304,
                      "num_hidden_layers": 27, "num_attention_heads": 16, "patch_size": 14, "image_size": 224,
                      "vision_use_head": False},
    "text_config": {"model_type": "gemma2", "hidden_size": 2304, "intermediate_size": 9216,
                    "num_hidden_layers": 26, "num_attention_heads": 8, "num_key_value_heads": 4,
                    "head_dim": 256, "query_pre_attn_scalar": 256, "vocab_size": 257216,
                    "sliding_window": 4096},
    "projection_dim": 2304, "hidden_size": 2304, "image_token_index": 257152, "vocab_size": 257216,
}


LONGEST = 4000  # letters of a prompt; attention costs their square
SIZES = {  # small hosts: their sizes, and steps of lessons on pictures of other worlds (0: random weights)
    "tiny": (Sizes(), 1000),
    "tiny-depth": (Sizes(start="street-depth"), 1000),  # a ceiling: its lessons have metric depth, too
    "tiny-conv": (Sizes(start="conv"), 1000),  # the tower's encoder starts random
    "tiny-random": (Sizes(), 0),
    "toy": (Sizes(image=32, patch=16, width=16, vision_layers=2), 0),  # tests
}


# --- loading ------------------------------------------------------------------------------------------------


class Host(NamedTuple):
    """A loaded VLM and its processor."""

    net: nn.Module  # PaliGemmaForConditionalGeneration with a Gemma 2 language model
    processor: Any  # PaliGemmaProcessor


def random_host(sizes: Sizes, sentences: Sequence[str]) -> Host:
    """A small PaliGemma 2 with random weights; its words are learned from `sentences`."""
    processor = tiny_processor(list(sentences), sizes)
    return Host(tiny_vlm(processor, sizes), processor)


def pretrained_host(vlm: str, sentences: Sequence[str]) -> Path:
    """The folder of a small host after lessons on pictures of other worlds; made once."""
    sizes, steps = SIZES[vlm]
    with torch.random.fork_rng(devices=[]):  # finding it made or making it leaves the same random state
        torch.manual_seed(0)
        host = PaliGemma(random_host(sizes, sentences), images=1, prefix="image")
        return worlds.make("tinyvlm", vlm=host.net, processor=host.text.processor, steps=steps,
                           start=sizes.start, answer_loss=partial(answer_loss, host))


def paper_host() -> Host:
    """PaliGemma 2 3B with random weights, from the sizes written above."""
    from transformers import PaliGemmaConfig, PaliGemmaForConditionalGeneration

    vision = PALIGEMMA2_3B["vision_config"]
    processor = tiny_processor([], Sizes(image=vision["image_size"], patch=vision["patch_size"]))
    return Host(PaliGemmaForConditionalGeneration(PaliGemmaConfig(**PALIGEMMA2_3B)), processor)


def load_host(vlm: str, sentences: Sequence[str] = (), folder: Path | None = None) -> Host:
    """A row of SIZES, a folder or a hub id -> the host with its weights. Raises InputError in one line.

    folder: architecture and processor that `save_host` wrote; the weights then come with a checkpoint.
    """
    from transformers import AutoProcessor, PaliGemmaConfig, PaliGemmaForConditionalGeneration

    if folder is None and vlm in SIZES and not SIZES[vlm][1]:
        return random_host(SIZES[vlm][0], sentences)
    name = str(folder or (pretrained_host(vlm, sentences) if vlm in SIZES else vlm))
    if Path(name).is_dir():
        with loading("--vlm", name):
            if "text_config" not in read_json(Path(name) / "config.json", dict):
                raise ValueError("config.json names no text_config")  # transformers would build its own 3B
    small = Path(name).is_dir() and "tower" in read_json(Path(name) / "config.json", dict)
    if folder is not None or small:
        config, processor = load_pretrained("--vlm", name, PaliGemmaConfig, AutoProcessor)
        net = set_tower(PaliGemmaForConditionalGeneration(config))
        return Host(net if folder is not None else load_weights(net, Path(name)), processor)
    kinds = PaliGemmaForConditionalGeneration, AutoProcessor
    return Host(*load_pretrained("--vlm", name, *kinds, remedy=", or tiny", dtype=torch.float32))


def check_host(host: Host, vlm: str, image_size: int, images: int) -> None:
    """InputError that names the first fact about a host which does not hold."""
    config, text = host.net.config, host.processor.tokenizer
    vocabulary, image = config.text_config.vocab_size, config.image_token_id
    if config.text_config.model_type != "gemma2":
        raise InputError(f"--vlm {vlm}: its language model is {config.text_config.model_type}, not gemma2; "
                         "use a PaliGemma 2")
    found = text.convert_ids_to_tokens(image)
    if host.processor.image_token_id != image or found != host.processor.image_token:
        raise InputError(f"--vlm {vlm}: the tokenizer lacks the image token {image} of config.json (it has "
                         f"'{found}' there); use the processor that was saved with the model")
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        if getattr(text, name) is None or not 0 <= getattr(text, name) < vocabulary:
            raise InputError(f"--vlm {vlm}: the tokenizer's {name} is {getattr(text, name)}, the vocabulary "
                             f"has {vocabulary}")
    vision = config.vision_config
    if vision.image_size != image_size:
        raise InputError(f"--image-size {image_size}: --vlm {vlm} takes {vision.image_size} px")
    tokens = images * (vision.image_size // vision.patch_size) ** 2
    if tokens + 256 > (config.text_config.sliding_window or math.inf):
        window = config.text_config.sliding_window
        raise InputError(f"--image-size {image_size}, {images} images: {tokens} image tokens and the text "
                         f"pass the window of {window}; use a 224 px model and one frame")


# --- packs: exchanges in token ids, and what attends to what ------------------------------------------------

QA, THOUGHT, CANDIDATE = 1, 2, 10  # kinds of target tokens; candidate answer c has kind CANDIDATE + c
IDS, SEGMENT, PARENT, POSITION, PREVIOUS, KIND = range(6)  # rows of a pack


class Exchange(NamedTuple):
    """A prompt and its answer in token ids."""

    prompt: list[int]
    answer: list[int] = []  # with its <eos>; empty: nothing to learn
    kind: int = QA
    candidates: Sequence[list[int]] = ()  # answers to score, each with its <eos>


class Text:
    """The host's tokenizer in the form PaliGemma was trained with: <image> ... <bos> prompt newline answer
    <eos>."""

    def __init__(self, processor: Any):
        self.processor, self.tokenizer = processor, processor.tokenizer
        tokens = self.tokenizer
        self.bos, self.eos, self.pad = tokens.bos_token_id, tokens.eos_token_id, tokens.pad_token_id

    def prompt(self, text: str) -> list[int]:
        """Text -> ids of a prompt. Raises InputError for a text of a length that no question has."""
        if len(text) > LONGEST:
            raise InputError(f"a question of {len(text)} letters ('{text[:40]} ...'): ask in at most {LONGEST}")
        return self.tokenizer.encode(f"{text}\n", add_special_tokens=False)

    def answer(self, text: str) -> list[int]:
        """Text -> ids of an answer with its <eos>."""
        return [*self.tokenizer.encode(text, add_special_tokens=False), self.eos]

    def pixels(self, files: Sequence[Path]) -> Tensor:
        """Image files -> (N, 3, s, s) in [0, 1], resized by the host's own processor (`encode`
        normalises)."""
        images = [read_image(path, upright=True) for path in files]
        return self.processor.image_processor(images, do_normalize=False, return_tensors="pt")["pixel_values"]

    def decode(self, ids: Sequence[int]) -> str:
        """Generated ids up to <eos> -> text."""
        ids = list(ids)
        ids = ids[: ids.index(self.eos)] if self.eos in ids else ids
        return self.tokenizer.decode(ids, skip_special_tokens=True).strip()


def pack(exchanges: Sequence[Exchange], bos: int, n: int, prefix: str) -> list[Tensor]:
    """Exchanges about the same n image tokens -> packs (6, L) int64.

    prefix "image": one pack for all. "image+prompt": one each. SEGMENT 0 attends both ways and every token
    attends to it: the images, <bos>, and with "image+prompt" the prompt. Every other segment is causal and
    attends to segment 0, itself and its PARENT, so exchanges never see each other, nor do candidates.
    POSITION is PaliGemma's, from 1. PREVIOUS is the place, from 0, whose hidden state predicts this token.
    KIND is the kind of target, 0: none.
    """
    if prefix == "image+prompt" and len(exchanges) > 1:
        return [p for exchange in exchanges for p in pack([exchange], bos, n, prefix)]
    rows, segments = [(bos, 0, -1, n + 1, 0, 0)], len(exchanges)
    for b, exchange in enumerate(exchanges, 1):
        own, asked = (b, b) if prefix == "image" else (1, 0)  # segments of the answer and of the prompt
        place = n + 2
        for token in exchange.prompt:
            rows.append((token, asked, -1, place, 0, 0))
            place += 1
        last = n + len(rows) - 1
        for k, token in enumerate(exchange.answer):
            rows.append((token, own, -1, place + k, n + len(rows) - 1 if k else last, exchange.kind))
        for c, candidate in enumerate(exchange.candidates):
            segments += 1
            for k, token in enumerate(candidate):
                previous = n + len(rows) - 1 if k else last
                rows.append((token, segments + 1, asked, place + k, previous, CANDIDATE + c))
    return [torch.tensor(rows, dtype=torch.int64).t().contiguous()]


def stack_packs(packs: Sequence[Tensor], pad: int) -> Tensor:
    """Packs of several lengths -> (R, 6, L). Padding has segment -1, to which nothing attends."""
    empty = torch.tensor([pad, -1, -2, 1, 0, 0])[:, None]
    longest = max(p.shape[1] for p in packs)
    return torch.stack([torch.cat([p, empty.expand(6, longest - p.shape[1])], 1) for p in packs])


def attends(packs: Tensor, n: int, first: int = 0) -> Tensor:
    """(R, 6, L) behind n image tokens -> (R, S - first, S) bool, S = n + L: whether place i (from `first` on)
    attends to place j."""
    place = torch.arange(n + packs.shape[2], device=packs.device)
    segment = F.pad(packs[:, SEGMENT], (n, 0))  # (R, S): images are segment 0
    parent = F.pad(packs[:, PARENT], (n, 0), value=-1)
    mine, theirs = segment[:, first:, None], segment[:, None]
    known = mine == theirs  # (R, S - first, S); in place from here: the only large tensor beside the layers
    known &= place[None, None] <= place[None, first:, None]
    known |= theirs == 0
    known |= parent[:, first:, None] == theirs
    known &= theirs >= 0
    return known


# --- the model ----------------------------------------------------------------------------------------------


class States(NamedTuple):
    """What a pass through the language model leaves."""

    last: Tensor  # (R, S - offset, C) after the last norm
    offset: int  # place of its first row: 0, or behind a shared prefix
    hidden: tuple[Tensor, ...] | None  # (R, S, C) entering each layer
    mask: Tensor | None  # (R, S) bool: image tokens
    cache: Any  # transformers' DynamicCache, or None


class Encoded(NamedTuple):
    """The images of B keyframes as the language model reads them."""

    tokens: Tensor  # (B, n, C)
    prefix: States | None = None  # the pass over images and <bos>, where all prompts share it


class PaliGemma(nn.Module):
    """The host on the images of a keyframe. images: how many of them. prefix: see `pack`."""

    def __init__(self, host: Host, images: int, prefix: str):
        super().__init__()
        self.net, self.text, self.prefix = host.net, Text(host.processor), prefix
        vision = host.net.config.vision_config
        self.image_size, self.width = vision.image_size, host.net.config.text_config.hidden_size
        self.layers = host.net.config.text_config.num_hidden_layers
        self.patches = vision.image_size // vision.patch_size  # a side of an image
        self.tokens = images * self.patches**2  # n
        processor = host.processor.image_processor
        for name, value in (("pixel_mean", processor.image_mean), ("pixel_std", processor.image_std)):
            self.register_buffer(name, torch.tensor(value)[:, None, None], persistent=False)

    def save_host(self, folder: Path) -> None:
        """Write architecture and processor, without weights, so that a run needs nothing else later."""
        if not (folder / "config.json").is_file():
            temporary = folder.with_name(f".{folder.name}.tmp")
            self.net.config.save_pretrained(temporary)
            self.text.processor.save_pretrained(temporary)
            temporary.rename(folder)

    def see(self, images: Tensor) -> Tensor:
        """(B, N, 3, H, W) in [0, 1] -> (B, N, p p, V), what the vision tower makes of them."""
        size = (self.image_size, self.image_size)
        pixels = images.flatten(0, 1)
        if pixels.shape[-2:] != size:
            pixels = F.interpolate(pixels, size, mode="bilinear", antialias=True)
        seen = self.net.model.vision_tower((pixels - self.pixel_mean) / self.pixel_std).last_hidden_state
        return seen.unflatten(0, images.shape[:2])

    @torch.no_grad()
    def cached_sight(self, images_of: Callable[[int], Tensor], count: int, folder: Path, key: list, run: Run,
                     limit: float = 4e9) -> np.ndarray | None:
        """`see` of images_of(i) (B, N, 3, H, W) for i < count -> (count, B, N, p p, V) float16 in a file of
        `folder`, which the main process makes if it is not there; None above `limit` bytes. key: what decides
        the images."""
        tower = self.net.model.vision_tower.eval()
        sums = [float(p.double().abs().sum()) for p in tower.parameters()]
        path = folder / f"sight-{short_hash([sums, self.image_size, count, *key])}.npy"
        if run.is_main and not path.is_file():
            shape = self.see(images_of(0).to(run.device)).shape
            if 2 * count * math.prod(shape) <= limit:
                with atomic(path) as temporary:
                    found = np.lib.format.open_memmap(temporary, "w+", np.float16, (count, *shape))
                    for i in tqdm(range(count), "vision tower", leave=False):
                        found[i] = self.see(images_of(i).to(run.device)).cpu().numpy()
                    found.flush()
        barrier(run)
        return np.load(path, mmap_mode="r", allow_pickle=False) if path.is_file() else None

    def encode(self, images: Tensor) -> Encoded:
        """Images, or what `see` made of them -> image tokens."""
        project = self.net.model.multi_modal_projector
        seen = self.see(images) if images.dim() == 5 else images.to(next(project.parameters()).dtype)
        return Encoded(project(seen).flatten(1, 2))

    def embed(self, ids: Tensor) -> Tensor:
        """Token ids -> embeddings."""
        return self.net.model.language_model.embed_tokens(ids)

    def logits(self, hidden: Tensor) -> Tensor:
        """(..., C) -> logits (..., V), soft-capped as Gemma 2's."""
        logits, cap = self.net.lm_head(hidden), self.net.config.text_config.final_logit_softcapping
        return logits if cap is None else cap * torch.tanh(logits / cap)

    def forward(self, embeds: Tensor, allowed: Tensor, position: Tensor, cache: Any = None,
                hidden: bool = False) -> Any:
        """One pass of the language model: embeds (R, S, C), allowed (R, S, S_all) bool, position (R, S)."""
        bias = embeds.new_full(allowed.shape, torch.finfo(embeds.dtype).min)
        bias = bias.masked_fill_(allowed, 0.0)[:, None]
        # prompts are shorter than Gemma 2's sliding window, so one mask serves all layers
        return self.net.model.language_model(
            inputs_embeds=embeds, attention_mask={"full_attention": bias, "sliding_attention": bias},
            position_ids=position, past_key_values=cache, use_cache=cache is not None,
            output_hidden_states=hidden)

    def run(self, encoded: Encoded, packs: Tensor, rows: Tensor, hidden: bool = False,
            keep: bool = False) -> States:
        """Images and text in one pass. packs (R, 6, L), rows (R,): the keyframe of each. hidden: with the
        states that enter each layer. keep: with the cache."""
        from transformers import DynamicCache

        R, n, words = len(packs), encoded.tokens.shape[1], self.embed(packs[:, IDS])
        embeds = torch.cat([encoded.tokens[rows].to(words.dtype), words], 1)  # (R, S, C)
        images = torch.arange(1, n + 1, device=packs.device).expand(R, -1)
        position = torch.cat([images, packs[:, POSITION]], 1)
        mask = torch.arange(embeds.shape[1], device=packs.device).expand(R, -1) < n
        cache = DynamicCache() if keep else None
        out = self(embeds, attends(packs, n), position, cache, hidden)
        return States(out.last_hidden_state, 0, out.hidden_states, mask, cache)

    def read_prefix(self, encoded: Encoded, hidden: bool = False) -> Encoded:
        """prefix "image": read the images once, for every prompt that follows. Otherwise: nothing to do."""
        if self.prefix != "image" or encoded.prefix is not None:
            return encoded
        device, B = encoded.tokens.device, len(encoded.tokens)
        start = pack([], self.text.bos, self.tokens, "image")[0].to(device).expand(B, -1, -1)
        rows = torch.arange(B, device=device)
        return encoded._replace(prefix=self.run(encoded, start, rows, hidden=hidden, keep=True))

    def follow(self, encoded: Encoded, packs: Tensor, rows: Tensor, keep: bool = False) -> States:
        """As `run`, but behind the prefix where there is one: only the text's own rows come back."""
        from transformers import DynamicCache

        if encoded.prefix is None:
            return self.run(encoded, packs, rows, keep=keep)
        n, tail, cache = encoded.tokens.shape[1], packs[:, :, 1:], DynamicCache()
        for layer, entry in enumerate(encoded.prefix.cache.layers):
            cache.update(entry.keys[rows], entry.values[rows], layer)
        out = self(self.embed(tail[:, IDS]), attends(packs, n, n + 1), tail[:, POSITION], cache)
        return States(out.last_hidden_state, n + 1, None, None, cache)

    def exchange(self, prompt: str, answer: str | None = None, kind: int = QA) -> Exchange:
        """Words -> ids."""
        return Exchange(self.text.prompt(prompt), [] if answer is None else self.text.answer(answer), kind)

    def pack(self, exchanges: Sequence[Exchange]) -> list[Tensor]:
        """See `pack`."""
        return pack(exchanges, self.text.bos, self.tokens, self.prefix)

    def stack(self, exchanges: Sequence[Exchange], device: torch.device) -> Tensor:
        """A pack for each exchange -> (R, 6, L)."""
        return stack_packs([self.pack([e])[0] for e in exchanges], self.text.pad).to(device)

    def token_losses(self, states: States, packs: Tensor, kind: int) -> tuple[Tensor, Tensor]:
        """Cross-entropy of each target token of a kind, and the row of its pack: (M,), (M,)."""
        r, l = (packs[:, KIND] == kind).nonzero(as_tuple=True)
        logits = self.logits(states.last[r, packs[r, PREVIOUS, l] - states.offset]).float()
        return F.cross_entropy(logits, packs[r, IDS, l], reduction="none"), r

    @torch.no_grad()
    def generate(self, encoded: Encoded, prompts: Sequence[str], rows: Tensor, limit: int) -> list[list[int]]:
        """Greedy answers: token ids, <eos> at the end unless the limit came first. rows (R,): each prompt's
        keyframe."""
        packs = self.stack([self.exchange(p) for p in prompts], rows.device)
        states, n = self.follow(encoded, packs, rows, keep=True), encoded.tokens.shape[1]
        each, length = torch.arange(len(packs), device=rows.device), (packs[:, SEGMENT] >= 0).sum(1)
        hidden, place = states.last[each, n + length - 1 - states.offset], packs[each, POSITION, length - 1]
        valid = F.pad(packs[:, SEGMENT] >= 0, (n, 0), value=True)  # (R, S)
        done, tokens = torch.zeros_like(valid[:, 0]), []
        for _ in range(limit):
            token = self.logits(hidden).argmax(-1).masked_fill(done, self.text.eos)
            tokens.append(token)
            done = done | (token == self.text.eos)
            if done.all() and not (dist.is_available() and dist.is_initialized()):
                break  # sharded weights: all processes step alike, to the limit
            valid, place = F.pad(valid, (0, 1), value=True), place + 1
            out = self(self.embed(token[:, None]), valid[:, None], place[:, None], states.cache)
            hidden = out.last_hidden_state[:, -1]
        written = torch.stack(tokens, 1).tolist()
        return [ids[: ids.index(self.text.eos) + 1] if self.text.eos in ids else ids for ids in written]

    @torch.no_grad()
    def score(self, encoded: Encoded, prompts: Sequence[str], rows: Tensor, answers: Sequence[str]) -> Tensor:
        """log p(answer <eos> | images, prompt) of every candidate: (R, len(answers)), all in one pass."""
        candidates = [self.text.answer(a) for a in answers]
        asked = [Exchange(self.text.prompt(p), candidates=candidates) for p in prompts]
        packs = self.stack(asked, rows.device)
        states = self.follow(encoded, packs, rows)
        r, l = (packs[:, KIND] >= CANDIDATE).nonzero(as_tuple=True)
        logits = self.logits(states.last[r, packs[r, PREVIOUS, l] - states.offset]).float()
        value = logits.log_softmax(-1).gather(1, packs[r, IDS, l][:, None])[:, 0]
        table, place = value.new_zeros(len(packs) * len(answers)), packs[r, KIND, l] - CANDIDATE
        return table.index_add(0, r * len(answers) + place, value).view(len(packs), -1)

    def plain_pass(self, images: Tensor, prompt: str) -> tuple[Tensor, Callable[[], Any]]:
        """transformers' own pass over images (1, N, 3, s, s) and a prompt; -> logits of the next token (1,
        V), and a call that decodes one more token."""
        from transformers import DynamicCache

        packs = self.stack([self.exchange(prompt)], images.device)
        image = torch.full((1, self.tokens), self.net.config.image_token_id, device=images.device)
        ids = torch.cat([image, packs[:, IDS]], 1)
        out = self.net(input_ids=ids, pixel_values=(images[0] - self.pixel_mean) / self.pixel_std,
                       token_type_ids=F.pad((packs[:, SEGMENT] > 0).long(), (self.tokens, 0)),
                       attention_mask=torch.ones_like(ids), use_cache=True, past_key_values=DynamicCache(),
                       logits_to_keep=1)
        logits = out.logits[:, -1]
        position = torch.full((1, 1), ids.shape[1] + 1, device=ids.device)
        return logits, lambda: self.net(input_ids=logits.argmax(-1, keepdim=True), position_ids=position,
                                        past_key_values=out.past_key_values, use_cache=True)

    def own_pass(self, encoded: Encoded, prompt: str) -> tuple[Tensor, Callable[[], Any]]:
        """As `plain_pass`, by `follow`."""
        packs = self.stack([self.exchange(prompt)], encoded.tokens.device)
        rows = torch.zeros(1, dtype=torch.int64, device=packs.device)
        states = self.follow(encoded, packs, rows, keep=True)
        logits, S = self.logits(states.last[:, -1]), self.tokens + packs.shape[2]
        allowed = torch.ones(1, 1, S + 1, dtype=torch.bool, device=packs.device)
        position = torch.full((1, 1), S + 1, device=packs.device)
        token = self.embed(logits.argmax(-1, keepdim=True))
        return logits, lambda: self.logits(self(token, allowed, position, states.cache).last_hidden_state)


def mean_over_keyframes(values: Tensor, keyframe: Tensor, B: int) -> Tensor:
    """The mean of each keyframe's values (M,), then over all B keyframes; one without any counts 0."""
    total, count = (values.new_zeros(B).index_add(0, keyframe, x) for x in (values, torch.ones_like(values)))
    return (total / count.clamp_min(1)).mean()


def answer_loss(vlm: PaliGemma, images: Tensor, asked: list[list[tuple[str, str]]]) -> tuple[Tensor, float]:
    """Questions about single pictures (B, 3, s, s) in [0, 1], or float16 (B, 1, p p, V) of `see` ->
    cross-entropy of the answers' tokens, and the share of answers whose every token is the likeliest one."""
    packs = vlm.stack([vlm.exchange(q, a) for given in asked for q, a in given], images.device)
    rows = torch.tensor([b for b, given in enumerate(asked) for _ in given])
    encoded = vlm.read_prefix(vlm.encode(images if images.dtype == torch.float16 else images[:, None]))
    states = vlm.follow(encoded, packs, rows)
    r, l = (packs[:, KIND] == QA).nonzero(as_tuple=True)
    right = vlm.logits(states.last[r, packs[r, PREVIOUS, l] - states.offset]).argmax(-1) == packs[r, IDS, l]
    values, row = vlm.token_losses(states, packs, QA)
    return mean_over_keyframes(values, rows[row], len(images)), 1 - len(r[~right].unique()) / len(packs)
