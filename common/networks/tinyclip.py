"""CLIP behind one small interface (Radford et al., ICML 2021), and the tiny one of common/networks/street.py.

    clip = load("street")                         # a file of its kind, or a hub id or folder of any CLIPModel
    encode_text(clip, ["a tall yellow vehicle"])  # (1, D) unit vectors
    encode_images(clip, images)                   # (n, D) of whole crops
    patch_features(clip, images)                  # (n, rows, columns, D) of patches, in the same space

A patch of a CLIPModel is read as MaskCLIP reads it: in the last layer a token attends to itself alone, then
the usual norm and projection. The tiny CLIP was taught pixel by pixel; a patch is a cell of its features.
"""

import re
import sys
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from common.backbones import STREET
from common.files import InputError, read_text
from common.networks import minilm
from common.networks.street import DIM, SIZE, STRIDE, load_street, split_words
from common.nuscenes import OCC3D_CLASSES
from common.pretrained import load_pretrained

# CLIP's own, of RGB in [0, 1]
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
TEMPLATES = (  # ViLD's, as POP-3D and MaskCLIP's users take them
    "a photo of a {}.",
    "This is a photo of a {}",
    "There is a {} in the scene",
    "There is the {} in the scene",
    "a photo of a {} in the scene",
    *(f"a photo of a {size} {{}}." for size in ("small", "medium", "large")),
    *(f"This is a photo of a {size} {{}}." for size in ("small", "medium", "large")),
    *(f"There is a {size} {{}} in the scene." for size in ("small", "medium", "large")),
)
SEED_OFFSET = 700_000_001  # seeds of the worlds that the tiny encoders learn from: none that anybody types


class Clip(NamedTuple):
    """A CLIPModel and its tokenizer, frozen; or a StreetEncoder, which needs none."""

    model: torch.nn.Module
    tokenizer: object | None
    name: str
    size: int  # [px] of the images it was trained on
    patch: int  # [px]
    dim: int  # D


def load(name: Path | str, device: torch.device | str = "cpu") -> Clip:
    """street, a file like it, a folder, or a hub id (downloaded if not cached). InputError in one line."""
    from transformers import AutoTokenizer, CLIPModel

    name = str(name)
    if name in STREET or name.endswith(".safetensors"):
        net = load_street(name).to(device).requires_grad_(False)
        return Clip(net, None, name, SIZE[0], STRIDE, DIM)
    model, tokenizer = load_pretrained("--clip", name, CLIPModel, AutoTokenizer, model_type="clip")
    config = model.config
    vision = config.vision_config
    model = model.to(device).eval().requires_grad_(False)
    return Clip(model, tokenizer, name, vision.image_size, vision.patch_size, config.projection_dim)


def unknown_words(clip: Clip, text: str) -> list[str]:
    """Words of a text that the tokenizer has no meaning for; a byte-pair tokenizer has one for every word."""
    if clip.tokenizer is None:
        return clip.model.text.unknown(text)
    unknown = getattr(clip.tokenizer, "unk_token_id", None)
    if getattr(clip.tokenizer, "eos_token_id", None) == unknown:  # OpenAI's: its <unk> is the end of the text
        return []
    read = partial(clip.tokenizer, add_special_tokens=False)
    return [word for word in split_words(text) if unknown in read(word)["input_ids"]]


def understood(clip: Clip, text: str, phrases: list[str]) -> str:
    """A text in words that the model knows: others are read as the nearest of the phrases, if minilm is installed.

    What is read otherwise than it was written is said on stderr. InputError: no word of the text is known.
    """
    strange = unknown_words(clip, text)
    found = minilm.nearest(strange, phrases) if strange else {}
    for word, (phrase, cosine) in found.items():
        print(f"note: {clip.name} does not know {word}; read as {phrase} (cosine {cosine:.2f})", file=sys.stderr)
        text = re.sub(rf"\b{re.escape(word)}\b", phrase, text, flags=re.IGNORECASE)
    left = [word for word in strange if word not in found]
    if left and len(left) == len(text.split()):
        raise InputError(f"--text '{text}': {clip.name} knows none of these words; describe it by kind, colour, size "
                         f"or shape, or {minilm.GET}")
    if left:
        print(f"note: {clip.name} does not know {', '.join(left)}", file=sys.stderr)
    return text


@torch.inference_mode()
def encode_text(clip: Clip, texts: list[str]) -> Tensor:
    """-> (n, D) unit vectors."""
    if clip.tokenizer is None:
        return clip.model.text(texts)
    longest = clip.model.config.text_config.max_position_embeddings
    tokens = clip.tokenizer(texts, padding=True, truncation=True, max_length=longest, return_tensors="pt")
    read = {name: tokens[name].to(clip.model.device) for name in ("input_ids", "attention_mask")}
    out = clip.model.get_text_features(**read)
    out = getattr(out, "pooler_output", out)  # transformers 5 returns an object
    return F.normalize(out.float(), dim=-1).clone()


def ensemble(clip: Clip, words: list[str]) -> Tensor:
    """One class's words -> (D,): the prompts' unit vectors, averaged over words and templates (ViLD), of
    length 1. Words without a meaning to this model are left out, unless there is no other."""
    words = [word for word in words if not unknown_words(clip, word)] or words
    prompts = [template.format(word) for word in words for template in TEMPLATES]
    return F.normalize(encode_text(clip, prompts).mean(0), dim=-1)


def normalise(images: Tensor) -> Tensor:
    """(n, 3, h, w) RGB in [0, 1] -> CLIP's input."""
    mean, std = (images.new_tensor(x).view(3, 1, 1) for x in (MEAN, STD))
    return (images - mean) / std


def read_both(model: torch.nn.Module, pixels: Tensor) -> tuple[Tensor, Tensor]:
    """Normalised pixels (n, 3, h, w) -> class token (n, D) and patches (n, P, D), of unit length."""
    vision = model.vision_model
    x = vision.pre_layrnorm(vision.embeddings(pixels, interpolate_pos_encoding=True))
    for layer in vision.encoder.layers[:-1]:
        out = layer(x, attention_mask=None)
        x = out[0] if isinstance(out, tuple) else out
    last = vision.encoder.layers[-1]
    out = last(x, attention_mask=None)
    whole = (out[0] if isinstance(out, tuple) else out)[:, 0]
    own = x[:, 1:] + last.self_attn.out_proj(last.self_attn.v_proj(last.layer_norm1(x[:, 1:])))  # MaskCLIP
    own = own + last.mlp(last.layer_norm2(own))
    return tuple(F.normalize(model.visual_projection(vision.post_layernorm(y)), dim=-1) for y in (whole, own))


@torch.inference_mode()
def encode_images(clip: Clip, images: Tensor) -> Tensor:
    """(n, 3, h, w) RGB in [0, 1], resized to the model's size -> (n, D) unit vectors."""
    if clip.tokenizer is None:
        h, w = (max(32, s) for s in images.shape[-2:])
        cells = clip.model.named(F.interpolate(images, (h, w), mode="bilinear", align_corners=False))
        return F.normalize(cells.mean((2, 3)), dim=-1).clone()
    size = clip.size, clip.size
    images = F.interpolate(images, size, mode="bilinear", align_corners=False, antialias=True)
    return read_both(clip.model, normalise(images))[0].clone()


@torch.inference_mode()
def patch_features(clip: Clip, images: Tensor, size: tuple[int, int] | None = None) -> Tensor:
    """(n, 3, h, w) RGB in [0, 1], resized to whole tiles -> (n, rows, columns, D) unit vectors, one a patch.

    size: (h, w) at which they are read; default: their own.

    An image is read in tiles of the model's own size, as if each were a crop: its position embedding fits,
    and the cost is linear in the pixels. Real CLIPs are read the same way.
    """
    if clip.tokenizer is None:
        images = F.interpolate(images, SIZE, mode="bilinear", align_corners=False, antialias=True)
        return clip.model.named(images).permute(0, 2, 3, 1).clone()  # at the size that it has seen
    h, w = (max(1, round(s / clip.size)) * clip.size for s in size or images.shape[-2:])
    images = F.interpolate(images, (h, w), mode="bilinear", align_corners=False, antialias=True)
    tiles = images.unflatten(-1, (-1, clip.size)).unflatten(-3, (-1, clip.size))  # (n, 3, a, s, b, s)
    n, _, a, _, b, _ = tiles.shape
    tiles = tiles.permute(0, 2, 4, 1, 3, 5).flatten(0, 2)  # (n a b, 3, s, s)
    side = clip.size // clip.patch
    features = torch.cat([read_both(clip.model, normalise(part))[1] for part in tiles.split(256)])
    features = features.view(n, a, b, side, side, -1).permute(0, 1, 3, 2, 4, 5)
    return features.reshape(n, a * side, b * side, -1).clone()


# --- files of words -----------------------------------------------------------------------------------------


def read_words(path: Path | str) -> dict[str, list[str]]:
    """Lines "class: word, word" -> {Occ3D class: words}.

    InputError: an unknown class, a class twice, empty or double words.
    """
    path, words = Path(path), {}
    if not path.is_file():
        raise InputError(f"{path}: file not found; such a file has lines like 'trailer: a long vehicle "
                         "without windows'")
    for number, line in enumerate(read_text(path).splitlines(), 1):
        line = line.split("#")[0].strip()
        if not line:
            continue
        name, colon, rest = line.partition(":")
        name, where = name.strip(), f"{path}:{number}"
        if name not in OCC3D_CLASSES[:-1]:
            raise InputError(f"{where}: '{name}' is not an Occ3D class; one of "
                             f"{', '.join(OCC3D_CLASSES[:-1])}")
        if name in words:
            raise InputError(f"{where}: '{name}' a second time; give each class one line")
        parts = [part.strip() for part in rest.split(",")]
        if not colon or not all(parts):
            raise InputError(f"{where}: '{name}' has an empty prompt; write '{name}: word, word'")
        known = {part.lower(): other for other, given in words.items() for part in given}
        for k, part in enumerate(parts):
            if part.lower() in known or part.lower() in [p.lower() for p in parts[:k]]:
                other = known.get(part.lower(), name)
                raise InputError(f"{where}: the prompt '{part}' is already there for '{other}'; prompts must "
                                 "differ")
        words[name] = parts
    if not words:
        raise InputError(f"{path}: no line 'class: word' in it")
    return words
