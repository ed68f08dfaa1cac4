"""Base policies pi0 and pi0.5: a PaliGemma prefix, a Gemma action expert, flow matching.

Sources  pi0 (arXiv 2410.24164), pi0.5 (2504.16054), sizes of openpi; the network is transformers'
         PI0ForConditionalGeneration, with its own prefix and sampler.
Ours     a convolutional stem for miniature policies; adaRMS (pi0.5) around transformers' pi0; words hashed
         to ids where there is no tokenizer; tokens that read the prefix, which does not read them.

A policy of this folder has width (of its tokens), map_width, grid, chunk, state_dim, action_dim and

    encode(images, texts, state) -> Prefix           images (B, V, 3, H, W) in [0, 1]; state (B, S) normalised
    read(prefix) -> Prefix                           what the frozen language model makes of it
    loss(prefix, state, actions, noise, time)        -> error (B, A, D), D padded: absolute (l1) or squared
    act(prefix, state, noise)                        -> actions (B, A, D) from noise (B, A, D)
    vlm() -> the part that stays frozen behind a trained base policy;  word_size() -> a word embedding's RMS

l1 (after OpenVLA-OFT): with noise 0 and time 1 a flow's velocity is the actions, negated, in one step. `l1`
is the gripper's channel then (`one_step_error`).

Letters: B batch, V views, h w patches, L tokens, C channels, A action steps, D action channels, S of a state.
"""

import math
import zlib
from collections.abc import Callable
from functools import partial
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.backbones import conv_norm_relu
from common.files import InputError, reason
from common.geometry import fourier, pixel_centers
from common.pretrained import load_pretrained


class Sizes(NamedTuple):
    """Sizes of a base policy. The defaults are pi0's (PaliGemma 3B and a Gemma 300M expert), as in openpi."""

    image_size: int = 224  # [px]
    patch: int = 14  # [px] SigLIP's
    stem: Literal["patch", "conv"] = "patch"  # SigLIP's patch embedding, or ours of four strided convolutions
    vision_width: int = 1152  # SigLIP So400m
    vision_layers: int = 27  # SigLIP So400m
    vision_heads: int = 16  # SigLIP So400m
    vision_mlp: int = 4304  # SigLIP So400m
    lm_width: int = 2048  # Gemma 2B
    lm_layers: int = 18  # Gemma 2B; the expert has as many
    lm_mlp: int = 16384  # Gemma 2B
    expert_width: int = 1024  # Gemma 300M
    expert_mlp: int = 4096  # Gemma 300M
    heads: int = 8  # Gemma
    head_dim: int = 256  # Gemma
    vocabulary: int = 257152  # PaliGemma
    text_tokens: int = 48  # pi0
    state_dim: int = 32  # padded
    action_dim: int = 32  # padded
    chunk: int = 50  # action steps of one plan; LIBERO: 10
    flow_steps: int = 10  # of the sampler
    min_period: float = 4e-3  # of the flow time's embedding
    soft_prompts: int = 32  # X-VLA's, for common.networks.xvla

    @property
    def grid(self) -> int:
        """Patches per side of a picture."""
        return self.image_size // self.patch


SIZES = {
    "tiny": Sizes(  # two CPU cores; at 1226 no two words of the tabletop world share an id
        image_size=128, patch=16, stem="conv", vision_width=128, vision_layers=2, vision_heads=4,
        vision_mlp=256, lm_width=128, lm_layers=3, lm_mlp=256, expert_width=128, expert_mlp=256, heads=4,
        head_dim=32, vocabulary=1226, text_tokens=20, state_dim=8, action_dim=7, chunk=10, min_period=0.25,
        soft_prompts=8,
    ),
    "libero": Sizes(chunk=10),  # openpi's LIBERO
    "paper": Sizes(),
}  # fmt: skip


class Prefix(NamedTuple):
    """What the action expert attends to: the policy's own tokens, and whatever a plug-in adds."""

    tokens: Tensor | None  # (B, L, C); None: the keys are enough
    mask: Tensor  # (B, L) long, 0 = padding
    maps: Tensor  # (B, V, C', h, w) the VLM's image tokens
    keys: Tensor | None = None  # (B, layers, 2, L, D) keys and values, if they are computed already; pi0
    last: Tensor | None = None  # (B, V h w, C) the image tokens behind the language model
    heat: Tensor | None = None  # (B, V, 2, H / 4, W / 4) logits: the object to move, its destination
    front: tuple[Tensor, Tensor] | None = None  # tokens (B, T, C), mask (B, T) that read all this, unread


# --- flow matching ------------------------------------------------------------------------------------------

# As in pi0's code: t = 1 is NOISE and t = 0 the actions, the opposite of the pi0 paper; the velocity points
# from actions to noise, and the sampler walks it backwards.


def pi0_flow(actions: Tensor, noise: Tensor, time: Tensor) -> tuple[Tensor, Tensor]:
    """actions, noise (B, A, D), time (B,) in [0, 1], 1 = noise -> x_t, u_t (B, A, D).

    The network reads x_t = t noise + (1 - t) actions and predicts u_t = noise - actions = dx_t/dt.
    """
    t = time.reshape(-1, *[1] * (actions.dim() - 1))  # (B, 1, 1)
    return t * noise + (1 - t) * actions, noise - actions


def pi0_time_quantile(q: Tensor) -> Tensor:
    """Probabilities (...) -> flow times (...): the quantiles of 0.999 Beta(1.5, 1) + 0.001."""
    return 0.999 * q ** (2 / 3) + 0.001


def pi0_time_embedding(time: Tensor, dim: int, min_period: float = 4e-3, max_period: float = 4.0) -> Tensor:
    """time (...) -> (..., dim): sines, then cosines, of 2 pi t / period, dim / 2 geometric periods.

    Computed in float64: the fastest one turns 250 times from 0 to 1.
    """
    if dim < 2 or dim % 2:
        raise ValueError(f"the embedding needs an even number of channels, not {dim}")
    fraction = torch.linspace(0, 1, dim // 2, dtype=torch.float64, device=time.device)
    period = min_period * (max_period / min_period) ** fraction  # (dim / 2)
    angle = 2 * math.pi * time.double()[..., None] / period  # (..., dim / 2) [rad]
    return torch.cat([angle.sin(), angle.cos()], -1).to(time.dtype)


def one_step_error(out: Tensor, true: Tensor, gripper: int) -> Tensor:
    """|e| + e^2 (..., D), and 2 e^2 for the gripper's channel; e = out - true.

    A hand opens in one frame of thirty, and does not move sideways in six of ten: |e| alone holds an answer
    at the median until it is nearly right. Told where everything is, a regression by |e| alone placed nothing
    (0 of 18), with the gripper's square 15 of 18; the other squares raised clean success from 50 to 55 of 60.
    """
    error = (out - true).abs()
    linear = error.clone()
    linear[..., gripper] = error[..., gripper] ** 2
    return linear + error**2


def ground_loss(prefix: Prefix, ground: Tensor, named: nn.Module, placed: nn.Module) -> dict[str, Tensor]:
    """Heat maps against ground (B, V, 2, H / 4, W / 4), the object to move and its destination; and `names`.

    names is of what an expert reads of the image tokens, from the second layer on: a key learns whether its
    patch shows either object, a value where the patch is in its picture. Else the expert, whose layer l reads
    what goes into layer l of the language model, meets no names, and values forget the column.
    """
    (B, V), (h, w) = ground.shape[:2], prefix.maps.shape[-2:]
    # few cells are objects
    ce = partial(F.binary_cross_entropy_with_logits, pos_weight=ground.new_tensor(10.0))
    out = {"ground": ce(prefix.heat, ground)}
    if prefix.keys is not None:
        keys, values = prefix.keys[:, 1:, :, : V * h * w].unbind(2)  # (B, layers - 1, V h w, D)
        share = F.adaptive_avg_pool2d(ground.flatten(0, 1), (h, w)).unflatten(0, (B, V)).movedim(2, -1)
        share = share.flatten(1, 3)[:, None].expand(-1, keys.shape[1], -1, -1)
        at = pixel_centers(h, w, device=keys.device).flatten(0, 1) / keys.new_tensor([w / 2, h / 2]) - 1
        out["names"] = ce(named(keys), share) + (placed(values) - at.repeat(V, 1)).square().mean()
    return out


# --- words --------------------------------------------------------------------------------------------------


def tokenize(texts: list[str], sizes: Sizes, vlm: str | None = None, state: Tensor
             | None = None) -> tuple[Tensor, Tensor]:
    """Sentences -> ids (B, L) and mask (B, L). Without `vlm`'s tokenizer: each word's hash; 0 is padding.

    state (B, S) normalised (pi0.5): each number in one of 256 bins over [-2, 2], as one of the vocabulary's
    last 256 words, behind at most text_tokens of the sentence (L is S more then).
    """
    rows, room = [], sizes.text_tokens + (state.shape[1] if state is not None and not vlm else 0)
    for b, text in enumerate(texts):
        if vlm:
            words = _tokenizer(vlm)(_prompt(text, None if state is None else state[b]))["input_ids"]
        else:
            words = [2 + zlib.crc32(w.encode()) % (sizes.vocabulary - 258) for w in text.lower().split()]
            if state is not None:
                words = words[: sizes.text_tokens] + (sizes.vocabulary - 256 + _bins(state[b])).tolist()
        rows.append(words[:room])
    ids, mask = torch.zeros(2, len(rows), room, dtype=torch.long)
    for b, words in enumerate(rows):
        ids[b, : len(words)], mask[b, : len(words)] = torch.tensor(words), 1
    return ids, mask


def _bins(state: Tensor) -> Tensor:
    if state.is_meta:  # describe: shapes alone
        return torch.zeros(state.shape, dtype=torch.long, device="cpu")
    return ((state.clamp(-2, 1.999) + 2) * 64).long()  # (S,) in 0..255


def _prompt(text: str, state: Tensor | None) -> str:
    if state is None:
        return f"{text}\n"
    return f"Task: {text}, State: {' '.join(map(str, _bins(state).tolist()))};\nAction: "


_TOKENIZERS: dict[str, Callable] = {}


def _tokenizer(name: str) -> Callable:
    if name not in _TOKENIZERS:
        from transformers import AutoTokenizer

        try:
            _TOKENIZERS[name] = AutoTokenizer.from_pretrained(name)
        except Exception as error:  # of a damaged file: whatever its reader raises
            problem = f"no tokenizer there ({reason(error)}); save PaliGemma's into the same folder"
            raise InputError(f"--vlm {name}: {problem}") from error
    return _TOKENIZERS[name]


# --- parts of our miniature policies ------------------------------------------------------------------------


class ConvStem(nn.Module):
    """Images (B, 3, H, W) -> (B, C, H / 16, W / 16): three strided convolutions instead of one. Ours.

    Each cell is normalised and a code of its place is added: trained whole, the features grew to thirty times
    SigLIP's positions, and no column could be read from the tokens any more.
    """

    def __init__(self, width: int, octaves: int = 3):
        super().__init__()
        first = nn.Sequential(nn.Conv2d(3, width // 4, 4, 4), nn.ReLU(inplace=True))
        self.layers = nn.Sequential(first, conv_norm_relu(width // 4, width // 2, "group", stride=2),
                                    nn.Conv2d(width // 2, width, 3, 2, 1))
        self.octaves, self.place = octaves, nn.Linear(2 + 4 * octaves, width)
        self.weight = self.layers[-1].weight  # SigLIP asks its patch embedding for a dtype

    def forward(self, images: Tensor) -> Tensor:
        x = self.layers(images).permute(0, 2, 3, 1)  # (B, h, w, C)
        h, w = x.shape[1:3]
        at = pixel_centers(h, w, x.dtype, x.device) / x.new_tensor([w / 2, h / 2]) - 1
        return (F.layer_norm(x, x.shape[-1:]) + self.place(fourier(at, self.octaves))).permute(0, 3, 1, 2)


def pad(x: Tensor, width: int) -> Tensor:
    """(..., D) -> (..., width), zeros behind."""
    return F.pad(x, (0, width - x.shape[-1]))


# --- pi0 ----------------------------------------------------------------------------------------------------


class Pi0(nn.Module):
    """pi0; with adarms pi0.5: the state is in the text, the time in the expert's norms.

    vlm: hub id or folder of weights in transformers' form; random weights without it.
    """

    def __init__(self, sizes: Sizes, adarms: bool = False, vlm: str | None = None, l1: int | None = None):
        super().__init__()
        try:
            from transformers import PI0Config, PI0ForConditionalGeneration
        except (ImportError, RuntimeError) as error:
            reason = str(error).splitlines()[0][:100]
            raise InputError(f"transformers cannot import PI0 here ({reason}); a torchvision that does not "
                             "fit this torch is the usual reason: pip uninstall torchvision") from error

        self.sizes, self.pi05, self.weights = sizes, adarms, vlm
        self.l1, self.steps = l1, sizes.flow_steps if l1 is None else 1
        if vlm and not torch.empty(0).is_meta:
            (self.net,) = load_pretrained("--vlm", vlm, PI0ForConditionalGeneration, model_type="pi0")
            c, vision = self.net.config, self.net.config.vlm_config.vision_config
            theirs = {"chunk": c.chunk_size, "image_size": vision.image_size, "patch": vision.patch_size}
            if differ := {k: v for k, v in theirs.items() if getattr(sizes, k) != v}:
                named = ", ".join(f"{k} {v}" for k, v in differ.items())
                raise InputError(f"--vlm {vlm}: weights of other sizes ({named}); use other --sizes")
        else:
            self.net = PI0ForConditionalGeneration(PI0Config(**pi0_settings(sizes)))
        c = self.net.config
        self.width, self.map_width = c.vlm_config.text_config.hidden_size, c.vlm_config.projection_dim
        self.grid, self.image_token = sizes.grid, c.vlm_config.image_token_id
        self.chunk, self.state_dim, self.action_dim = c.chunk_size, c.max_state_dim, c.max_action_dim
        if not vlm:
            if sizes.stem == "conv":
                embeddings = next(m for m in self.net.modules() if hasattr(m, "patch_embedding"))
                embeddings.patch_embedding = ConvStem(sizes.vision_width)
            # transformers starts these at 0.02 whatever their width, which a small expert takes long to
            # outgrow
            for module in self.net.embed_action_time.modules():
                if isinstance(module, nn.Linear):
                    module.reset_parameters()
        if adarms:
            use_adarms(self.net, c.dit_config.hidden_size)

    def vlm(self) -> nn.Module:
        """The part that stays frozen behind a trained base policy."""
        return self.net.model.vlm

    def word_size(self) -> float:
        """Root mean square of the word embeddings, as the language model takes them."""
        embedding = self.net.model.get_input_embeddings()
        words = embedding.weight * getattr(embedding, "scalar_embed_scale", 1.0)
        return float(words.detach().float().square().mean().sqrt())

    def encode(self, images: Tensor, texts: list[str], state: Tensor) -> Prefix:
        """Images and words, by transformers' embed_prefix: V h w image tokens, then text."""
        B, V = images.shape[:2]
        words, known = tokenize(texts, self.sizes, self.weights, state if self.pi05 else None)
        words, known, slots = words.to(images.device), known.to(images.device), V * self.grid**2
        ids = torch.cat([words.new_full((B, slots), self.image_token), words], 1)
        mask = torch.cat([known.new_ones(B, slots), known], 1)
        tokens = self.net.model.embed_prefix(ids, images * 2 - 1, mask.new_ones(B, V, dtype=torch.bool))
        maps = tokens[:, :slots].unflatten(1, (V, self.grid, self.grid)).permute(0, 1, 4, 2, 3)
        return Prefix(tokens, mask, maps)

    def read(self, prefix: Prefix) -> Prefix:
        """The prefix with its keys and values in each layer, and with the image tokens behind the last."""
        mask, zeros = prefix.mask, torch.zeros_like(prefix.tokens)[..., 0]
        out = self.net.model.vlm(inputs_embeds=prefix.tokens, attention_mask=mask, use_cache=True,
                                 position_ids=mask.cumsum(-1) - 1, token_type_ids=zeros)
        keys = [torch.stack([x.keys[:, 0], x.values[:, 0]], 1) for x in out.past_key_values.layers]
        images = out.last_hidden_state[:, : prefix.maps[:, :, 0].flatten(1).shape[1]]
        return prefix._replace(keys=torch.stack(keys, 1), last=images)

    def read_all(self, prefix: Prefix) -> tuple[Tensor, Tensor, Tensor]:
        """-> keys of all that the expert reads, its mask (B, L) bool, the expert's first place (B, 1).

        Tokens in front stand at -T .. -1: the places of all others stay.
        """
        keys = prefix.keys if prefix.keys is not None else self.read(prefix).keys
        mask, first = prefix.mask.bool(), prefix.mask.sum(-1, keepdim=True)
        if prefix.front is not None and prefix.front[0].shape[1]:
            (tokens, there), cache = prefix.front, to_cache(keys)
            mask, T = torch.cat([mask, there.bool()], 1), tokens.shape[1]
            place = torch.arange(-T, 0, device=tokens.device).expand(len(tokens), T)
            self.net.model.vlm.language_model(
                inputs_embeds=tokens.to(keys), attention_mask=mask[:, None, None].expand(-1, -1, T, -1),
                position_ids=place, past_key_values=cache)
            keys = torch.stack([torch.stack([x.keys[:, 0], x.values[:, 0]], 1) for x in cache.layers], 1)
        return keys, mask, first

    def velocity(self, read: tuple[Tensor, Tensor, Tensor], state: Tensor, x_t: Tensor,
                 time: Tensor) -> Tensor:
        """The expert's answer (B, A, D), as transformers' forward has it. read: `read_all`'s."""
        keys, mask, first = read
        x = self.net.embed_action_time(pad(state, self.state_dim), x_t, time)  # a state token, then actions
        own = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool, device=x.device)
        own[0, 1:] = False  # the state does not read the actions
        keep = torch.cat([mask[:, None].expand(-1, len(own), -1), own.expand(len(x), -1, -1)], -1)[:, None]
        out = self.net.model.dit(inputs_embeds=x, attention_mask=keep, past_key_values=to_cache(keys),
                                 position_ids=first + torch.arange(len(own), device=x.device))
        return self.net.action_out_proj(out.last_hidden_state[:, -self.chunk :])

    def loss(self, prefix: Prefix, state: Tensor, actions: Tensor, noise: Tensor, time: Tensor) -> Tensor:
        """Flow matching: error (B, A, D) of the velocity at x_t.

        Padded action channels are zeros to be learned, as in openpi.
        """
        x_t, u_t = pi0_flow(pad(actions, self.action_dim), noise, time)
        out = self.velocity(self.read_all(prefix), state, x_t, time)
        return one_step_error(out, u_t, self.l1) if self.l1 is not None else (out - u_t).square()

    def act(self, prefix: Prefix, state: Tensor, noise: Tensor) -> Tensor:
        """-> (B, A, D): the velocity is walked backwards from the noise."""
        read, dt = self.read_all(prefix), -1.0 / self.steps
        for step in range(self.steps):
            time = torch.full((len(noise),), 1.0 + step * dt, device=noise.device)
            noise = noise + dt * self.velocity(read, state, noise, time)
        return noise


def to_cache(keys: Tensor):
    """(B, layers, 2, L, D) -> transformers' cache of one key head."""
    from transformers import DynamicCache

    cache = DynamicCache()
    for layer, pair in enumerate(keys.unbind(1)):
        cache.update(*pair[:, :, None].unbind(1), layer)  # (B, 1, L, D) each
    return cache


def pi0_settings(sizes: Sizes) -> dict:
    """Sizes -> PI0Config's arguments (PaliGemma + Gemma expert of these sizes)."""
    # Gemma's first deviation of 0.02 is made for a width of 2048
    gemma = dict(model_type="gemma", num_hidden_layers=sizes.lm_layers, num_attention_heads=sizes.heads,
                 num_key_value_heads=1, head_dim=sizes.head_dim, initializer_range=sizes.lm_width**-0.5)
    text = gemma | dict(hidden_size=sizes.lm_width, intermediate_size=sizes.lm_mlp)
    text |= dict(vocab_size=sizes.vocabulary)
    vision = dict(model_type="siglip_vision_model", hidden_size=sizes.vision_width, patch_size=sizes.patch,
                  intermediate_size=sizes.vision_mlp, num_hidden_layers=sizes.vision_layers,
                  num_attention_heads=sizes.vision_heads, image_size=sizes.image_size, vision_use_head=False)
    vlm = dict(model_type="paligemma", text_config=text, vision_config=vision, projection_dim=sizes.lm_width,
               image_token_id=sizes.vocabulary)
    dit = gemma | dict(hidden_size=sizes.expert_width, intermediate_size=sizes.expert_mlp)
    return dict(vlm_config=vlm, dit_config=dit, chunk_size=sizes.chunk, max_state_dim=sizes.state_dim,
                max_action_dim=sizes.action_dim, num_inference_steps=sizes.flow_steps,
                min_period=sizes.min_period)


# --- pi0.5 --------------------------------------------------------------------------------------------------


class TimeNorm(nn.Module):
    """adaRMS (pi0.5): an RMS norm, scaled and shifted by the flow time's embedding; `gate` gates its
    branch."""

    def __init__(self, norm: nn.Module, width: int, time: dict[str, Tensor]):
        super().__init__()
        self.eps, self.time, self.modulate = norm.eps, time, nn.Linear(width, 3 * width)
        nn.init.zeros_(self.modulate.weight), nn.init.zeros_(self.modulate.bias)
        with torch.no_grad():  # Gemma's norms scale by 1 + weight
            self.modulate.bias[:width].copy_(norm.weight)
        self.gate: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        scale, shift, gate = self.modulate(self.time["embedding"])[:, None].chunk(3, -1)  # (B, 1, C) each
        self.gate = 1 + gate  # zero weights: a plain residual block, as the pre-trained one was
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps) * (1 + scale) + shift


class Gated(nn.Module):
    """A branch times the gate of the norm before it."""

    def __init__(self, branch: nn.Module, norm: TimeNorm):
        super().__init__()
        self.branch, self.norm = branch, [norm]  # a list: the norm is registered where it belongs

    def forward(self, *args, **kwargs) -> Tensor:
        return self.branch(*args, **kwargs) * self.norm[0].gate


class Pi05Suffix(nn.Module):
    """pi0.5's action tokens: state and time are not among them."""

    def __init__(self, old: nn.Module, width: int, time: dict[str, Tensor], min_period: float):
        super().__init__()
        self.action_in_proj, self.time, self.min_period = old.action_in_proj, time, min_period
        self.mlp = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU())
        self.first = nn.Parameter(torch.zeros(1, 1, width))  # transformers keeps a slot before the actions

    def forward(self, state: Tensor, noise: Tensor, timestep: Tensor) -> Tensor:
        width = self.first.shape[-1]
        self.time["embedding"] = self.mlp(pi0_time_embedding(timestep, width, self.min_period))
        return torch.cat([self.first.expand(len(noise), 1, width), self.action_in_proj(noise)], 1)


def use_adarms(net: nn.Module, width: int) -> None:
    """Turn a transformers pi0 into pi0.5's expert, in place: suffix, norms, gated branches."""
    time: dict[str, Tensor] = {}
    net.embed_action_time = Pi05Suffix(net.embed_action_time, width, time, net.config.min_period)
    for layer in net.model.dit.layers:
        layer.input_layernorm = TimeNorm(layer.input_layernorm, width, time)
        layer.post_attention_layernorm = TimeNorm(layer.post_attention_layernorm, width, time)
        layer.self_attn.o_proj = Gated(layer.self_attn.o_proj, layer.input_layernorm)
        layer.mlp = Gated(layer.mlp, layer.post_attention_layernorm)
    net.model.dit.norm = TimeNorm(net.model.dit.norm, width, time)
