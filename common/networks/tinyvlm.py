"""A PaliGemma 2 (Steiner et al., 2024) of the true architecture with tiny sizes, for a CPU and without a
download.

    processor = tiny_processor(sentences, SIZES)     # its tokenizer learns from these sentences
    vlm = tiny_vlm(processor, SIZES)                 # random weights; data/tinyvlm.py teaches it to see

Its vision tower is the miniature foundation's encoder (common/networks/street.py) with a neck that makes a
token of each patch. A neighbourhood of cells with what stands in it is a token, and so is where it is: the
camera's column and the row, in one-hot, which a frozen tower does not learn.
"""

from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from common.files import InputError
from common.networks.street import CHANNELS, StreetEncoder

SEEN, CAMERAS, TOKEN = (128, 192), 6, 144  # rows, columns the encoder is given; of a rig; channels of a neck


class Sizes(NamedTuple):
    """tiny: CPU, all of them. vision_layers 0: the street encoder is the vision tower."""

    image: int = 224  # [px]
    patch: int = 28  # [px]
    width: int = 128  # of the vision tower and of the language model
    vision_layers: int = 0
    layers: int = 3  # of the language model
    vocabulary: int = 900  # tokens
    start: str = "street"  # of the vision tower; conv: random. street-depth: its lessons have depth, too


SIZES = Sizes()


class StreetTower(nn.Module):
    """(B, 3, s, s) in [-1, 1], cameras in a rig's order -> tokens (B, side^2, TOKEN + 6 side + side).

    The last channels are where a token is: camera and column, row. They are 1 or 0.
    """

    def __init__(self, side: int):
        super().__init__()
        self.side, self.encoder = side, StreetEncoder(False).backbone
        rows, columns = (n // 8 // side for n in SEEN)
        self.neck = nn.Sequential(
            nn.Conv2d(CHANNELS, 64, 3, 2, 1), nn.GroupNorm(8, 64), nn.ReLU(), nn.Conv2d(64, 96, 3, 1, 1),
            nn.GroupNorm(8, 96), nn.ReLU(), nn.Conv2d(96, TOKEN, (rows, columns), (rows, columns)))

    @staticmethod
    def width(side: int) -> int:
        """Channels of a token."""
        return TOKEN + (CAMERAS + 1) * side

    def cells(self, images: Tensor) -> Tensor:
        """-> the encoder's features, (B, CHANNELS, 32, 48)."""
        x = F.interpolate(images / 2 + 0.5, SEEN, mode="bilinear", antialias=True)
        return self.encoder((x - 0.45) / 0.25)

    def tokens(self, cells: Tensor) -> Tensor:
        """-> what stands where, (B, side, side, TOKEN)."""
        return F.layer_norm(self.neck(cells).movedim(1, -1), (TOKEN,))

    def forward(self, images: Tensor, **_: Any) -> SimpleNamespace:
        found, n, side = self.tokens(self.cells(images)), len(images), self.side
        column = torch.eye(CAMERAS * side, device=found.device).view(CAMERAS, 1, side, -1)
        column = column.expand(-1, side, -1, -1)[torch.arange(n, device=found.device) % CAMERAS]
        row = torch.eye(side, device=found.device)[None, :, None].expand(n, -1, side, -1)
        places = torch.cat([column, row], -1).to(found.dtype)
        return SimpleNamespace(last_hidden_state=torch.cat([found, places], -1).flatten(1, 2))


def set_tower(net: nn.Module) -> nn.Module:
    """Puts the street encoder in the place of a small host's vision tower, where its config names it."""
    vision = net.config.vision_config
    if getattr(net.config, "tower", "") == "street":
        net.model.vision_tower = StreetTower(vision.image_size // vision.patch_size)
    return net


WEIGHTS = "tinyvlm.safetensors"


def save_weights(net: nn.Module, folder: Path) -> None:
    """The weights of a small host; its output layer is its word embedding."""
    kept = {name: value.contiguous() for name, value in net.state_dict().items() if name != "lm_head.weight"}
    save_file(kept, folder / WEIGHTS)


def load_weights(net: nn.Module, folder: Path) -> nn.Module:
    """-> the network with the weights in `folder`. Raises InputError where they do not fit."""
    try:
        missing, other = net.load_state_dict(load_file(folder / WEIGHTS), strict=False)
    except (OSError, RuntimeError, SafetensorError) as error:
        raise InputError(f"{folder / WEIGHTS}: {str(error).splitlines()[0]}") from error
    if other or set(missing) - {"lm_head.weight"}:
        raise InputError(f"{folder / WEIGHTS}: lacks {[*missing, *other][0]}")
    return net


def tiny_processor(sentences: list[str], sizes: Sizes = SIZES) -> Any:
    """Builds PaliGemma's processor around a byte-level BPE that is learned from `sentences`.

    Frequent words become one token. Anything else falls to bytes, so every text can be read.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PaliGemmaProcessor, PreTrainedTokenizerFast, SiglipImageProcessorPil

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    names = {f"{name}_token": f"<{name}>" for name in ("pad", "eos", "bos", "unk")}
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=sizes.vocabulary, special_tokens=[*names.values(), "<image>"],
                                  initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(sentences, trainer)
    image_token = {"image_token": "<image>"}
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, extra_special_tokens=image_token, **names)
    images = SiglipImageProcessorPil(size={"height": sizes.image, "width": sizes.image})
    images.image_seq_length = (sizes.image // sizes.patch) ** 2
    return PaliGemmaProcessor(images, fast)


def tiny_vlm(processor: Any, sizes: Sizes = SIZES) -> nn.Module:
    """Builds a PaliGemmaForConditionalGeneration of these sizes with random weights."""
    from transformers import PaliGemmaConfig, PaliGemmaForConditionalGeneration

    text, w = processor.tokenizer, sizes.width
    # Gemma 2 normalises what each layer adds: from the usual 0.02 a narrow model's image tokens would drown
    shared = {"hidden_size": w, "initializer_range": w**-0.5}
    ids = {name: getattr(text, name) for name in ("pad_token_id", "bos_token_id", "eos_token_id")}
    street = {} if sizes.vision_layers else {"tower": "street"}
    seen = StreetTower.width(sizes.image // sizes.patch) if street else w
    vision = {"model_type": "siglip_vision_model", "hidden_size": seen, "intermediate_size": 3 * w,
              "num_hidden_layers": sizes.vision_layers, "num_attention_heads": 4, "patch_size": sizes.patch,
              "image_size": sizes.image, "vision_use_head": False}
    language = {"model_type": "gemma2", "intermediate_size": 3 * w, "num_hidden_layers": sizes.layers,
                "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": w // 4,
                "query_pre_attn_scalar": w // 4, "vocab_size": len(text)}
    config = PaliGemmaConfig(vision_config=vision, text_config=language | shared | ids, projection_dim=w,
                             vocab_size=len(text), image_token_index=text.image_token_id, **shared, **ids,
                             **street)
    return set_tower(PaliGemmaForConditionalGeneration(config))
