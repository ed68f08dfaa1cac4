"""The miniature foundation encoder of the synthetic street: weights in common/weights, by data/foundation.py.

    street         classes, objects and words of single pictures: what ImageNet, CLIP and PaliGemma stand for
    street-depth   the same and metric depth, as 32 bins: what a metric depth model stands for

    net = load_street("street")
    net(images)                                   # (B, 3, H, W) in [0, 1] -> features (B, 64, H/4, W/4)
    net.heads(features)                           # class, centre, extent, depth, words
    net.named(images)                             # (B, 64, H/4, W/4) unit vectors in the space of the texts
    net.text(["a tall yellow vehicle"])           # (n, 64) unit vectors
"""

import json
import math
import re
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from common.backbones import ConvBackbone
from common.files import InputError, atomic, reading
from common.geometry import VoxelGrid
from common.networks.lss import depth_curves, lift

WEIGHTS = Path(__file__).parents[1] / "weights"
SIZE = (112, 200)  # [px] of the images that it has seen
STRIDE, CHANNELS, BINS = 4, 64, 32  # pixels a cell, channels of the features, depth bins
WIDTHS = (16, 32, 80, 160)  # of the encoder's stages
DIM = 64  # of the space of texts
NEAR, FAR = 1.0, 80.0  # [m] first and last edge of the depth bins, evenly spaced in log depth


def depth_share(depth: Tensor) -> Tensor:
    """z-depth [m] -> its place on the axis of the bins, 0 to 1."""
    return (depth.clamp(NEAR, FAR) / NEAR).log() / math.log(FAR / NEAR)


def depth_bin(depth: Tensor) -> Tensor:
    """z-depth [m] -> bin 0..31, nearer and farther depths in the outermost ones."""
    return (depth_share(depth) * BINS).long().clamp_max(BINS - 1)


def split_words(text: str) -> list[str]:
    """The words of a text, lower case, in any script; punctuation is dropped."""
    return re.findall(r"\w+", text.lower())


class WordTower(nn.Module):
    """Texts -> (n, D) unit vectors: a mean of the words' vectors by learned weights, then a residual layer.

    Order is not read: "a tall yellow vehicle" is its words. A word outside the vocabulary counts as <unk>.
    """

    def __init__(self, vocabulary: list[str], dim: int = DIM):
        super().__init__()
        self.vocabulary = vocabulary
        self.row = {word: k for k, word in enumerate(vocabulary, 2)}  # 0: padding, 1: <unk>
        self.embed = nn.Embedding(len(vocabulary) + 2, dim, padding_idx=0)
        self.weight = nn.Embedding(len(vocabulary) + 2, 1)
        nn.init.zeros_(self.weight.weight)
        self.mix = nn.Sequential(nn.Linear(dim, 2 * dim), nn.GELU(), nn.Linear(2 * dim, dim))

    def unknown(self, text: str) -> list[str]:
        """The words of a text that are not in the vocabulary."""
        return [word for word in split_words(text) if word not in self.row]

    def forward(self, texts: list[str]) -> Tensor:
        """Texts -> (n, D)."""
        rows = [[self.row.get(word, 1) for word in split_words(text)] or [1] for text in texts]
        longest = max(map(len, rows))
        padded = [row + [0] * (longest - len(row)) for row in rows]
        index = torch.tensor(padded, device=self.embed.weight.device)
        share = self.weight(index)[..., 0].masked_fill(index == 0, -math.inf).softmax(-1)  # (n, words)
        x = (share[..., None] * self.embed(index)).sum(1)  # (n, D)
        return F.normalize(x + self.mix(x), dim=-1)


class PlacedBackbone(ConvBackbone):
    """The pyramid over five channels: each pixel's place beside its colours; the ground's depth is its row."""

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) normalised -> (B, C, H/4, W/4)."""
        v, u = (torch.linspace(-1, 1, n, device=images.device, dtype=images.dtype) for n in images.shape[-2:])
        place = torch.stack(torch.meshgrid(v, u, indexing="ij")).expand(len(images), -1, -1, -1)
        return super().forward(torch.cat([images, place], 1))


class StreetEncoder(nn.Module):
    """(B, 3, H, W) in [0, 1] -> features (B, 64, H/4, W/4); `heads` reads them, `text` reads words."""

    def __init__(self, depth: bool, vocabulary: list[str] = ()):
        super().__init__()
        self.backbone = PlacedBackbone(CHANNELS, "group", WIDTHS, c_in=5)
        sizes = {"class": 18, "centre": 10, "extent": 2, "words": DIM} | ({"depth": BINS} if depth else {})
        self.read = nn.ModuleDict({name: nn.Conv2d(CHANNELS, n, 1) for name, n in sizes.items()})
        nn.init.constant_(self.read["centre"].bias, -4.6)
        self.text = WordTower(list(vocabulary))

    def forward(self, images: Tensor) -> Tensor:
        return self.backbone((images - 0.45) / 0.25)

    def heads(self, features: Tensor) -> dict[str, Tensor]:
        """-> class (B, 18, h, w), centre (10), extent (2), words (64) and, of street-depth, depth (32)."""
        return {name: head(features) for name, head in self.read.items()}

    def named(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) -> (B, 64, H/4, W/4): each cell's unit vector in the space of the texts."""
        return F.normalize(self.read["words"](self(images)), dim=1)


KNOWN = {"street": CHANNELS + 18, "street-depth": CHANNELS + 18 + BINS}  # channels of `StreetFeatures`


class StreetFeatures(nn.Module):
    """Images (B, 3, H, W) -> what a method starts from: features, class and perhaps depth probabilities."""

    def __init__(self, name: str, pretrained: bool):
        super().__init__()
        net = load_street(name, pretrained)
        self.net, net.text = net, None  # words are the business of a CLIP
        for head in ("centre", "extent", "words"):
            del net.read[head]

    def forward(self, images: Tensor) -> Tensor:
        features = self.net(images)
        return torch.cat([features, *(x.softmax(1) for x in self.net.heads(features).values())], 1)


def lift_at_depth(context: Tensor, p: Tensor, centers: Tensor, K: Tensor, T_ref_cam: Tensor) -> Tensor:
    """LSS' lifting by the depth that street-depth knows: context (B, N, C, h, w), p (B, N, 32, h, w) -> (B, V, C + 2)."""
    frames = zip(context, p, K, T_ref_cam, strict=True)
    return torch.stack([lift(f, depth_curves(d), centers, k, T, depth_share) for f, d, k, T in frames])


class Evidence(nn.Module):
    """Ours: what the pixels before each fine cell show of its class and depth joins the cell's features.

    A 3D network of coarse cells places a surface to a coarse cell; depth and class are known more finely. They
    enter as logarithms, since evidence adds up in logits, and each height has biases of its own: of the
    probabilities and coordinates themselves a few hundred steps learn next to nothing.
    """

    def __init__(self, grid: VoxelGrid, channels: int):
        super().__init__()
        self.register_buffer("centers", grid.centers().view(-1, 3), persistent=False)  # (V, 3) [m]
        self.weigh = nn.Linear(18 + 4, channels)
        self.height = nn.Parameter(torch.zeros(grid.shape[2], channels))

    def forward(self, x: Tensor, classes: Tensor, p: Tensor, K: Tensor, T_ref_cam: Tensor) -> Tensor:
        """x (B, C, X, Y, Z), probabilities of classes (B, N, 18, h, w) and depth (B, N, 32, h, w) -> as x."""
        shown = lift_at_depth(classes, p, self.centers, K, T_ref_cam)  # (B, V, 18 + 2)
        here, before = shown[..., 18:19], shown[..., 19:]  # a surface here, one that hides it
        shown = torch.cat([(torch.cat([shown, 1 - before], -1) + 1e-3).log(), here], -1)  # (B, V, 18 + 4)
        shown = self.weigh(shown).unflatten(1, x.shape[2:])  # (B, X, Y, Z, C)
        return (x.movedim(1, -1) + shown + self.height).relu().movedim(-1, 1)


def save_street(path: Path, net: StreetEncoder) -> None:
    """Write the weights in half precision, and the vocabulary, whole or not at all."""
    weights = {name: value.half().contiguous() for name, value in net.state_dict().items()}
    with atomic(path) as temporary:
        save_file(weights, temporary, {"vocabulary": json.dumps(net.text.vocabulary)})


def load_street(name: str | Path, pretrained: bool = True) -> StreetEncoder:
    """street, street-depth or a file -> the network, with its weights if pretrained. InputError: no file."""
    path = Path(name) if str(name).endswith(".safetensors") else WEIGHTS / f"{name}.safetensors"
    if not pretrained:
        return StreetEncoder(path.stem.endswith("depth"))
    if not path.is_file():
        raise InputError(f"{path}: not found; make it: python -m data.foundation --out F --ship {WEIGHTS}")
    with reading(path, "not an encoder of data.foundation", "copy or make it again"):
        with safe_open(path, "pt") as file:
            weights = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
            words = json.loads((file.metadata() or {}).get("vocabulary", "no list of words"))
        net = StreetEncoder("read.depth.weight" in weights, words)
        mine = net.state_dict()
        for key in mine | weights:
            fits = key in mine and key in weights and weights[key].shape == mine[key].shape
            fits = fits and weights[key].is_floating_point() == mine[key].is_floating_point()
            if not (fits and weights[key].isfinite().all()):
                raise ValueError(f"{key} is missing, of another shape or not finite")
        net.load_state_dict(weights)
    return net.eval()
