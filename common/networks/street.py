"""The miniature foundation encoder of the synthetic street: weights in common/weights, made by data/foundation.py.

    street         classes, objects and words of single pictures: what ImageNet, CLIP and PaliGemma stand for
    street-depth   the same and metric depth, as a distribution over 32 bins: what a metric depth model stands for
"""

import math
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from common.backbones import ConvBackbone
from common.files import InputError, atomic

WEIGHTS = Path(__file__).parents[1] / "weights"
STRIDE, CHANNELS, BINS = 4, 48, 32  # pixels a cell, channels of the features, depth bins
NEAR, FAR = 1.0, 80.0  # [m] first and last edge of the depth bins, evenly spaced in log depth


def depth_bin(depth: Tensor) -> Tensor:
    """z-depth [m] -> bin 0..31, nearer and farther depths in the outermost ones."""
    share = (depth.clamp(NEAR, FAR) / NEAR).log() / math.log(FAR / NEAR)
    return (share * BINS).long().clamp_max(BINS - 1)


class StreetEncoder(nn.Module):
    """(B, 3, H, W) in [0, 1] -> features (B, 48, H/4, W/4); `heads` reads them."""

    def __init__(self, depth: bool):
        super().__init__()
        self.backbone = ConvBackbone(CHANNELS, "group")
        sizes = {"class": 18, "centre": 10, "extent": 2} | ({"depth": BINS} if depth else {})
        self.read = nn.ModuleDict({name: nn.Conv2d(CHANNELS, n, 1) for name, n in sizes.items()})
        nn.init.constant_(self.read["centre"].bias, -4.6)

    def forward(self, images: Tensor) -> Tensor:
        return self.backbone((images - 0.45) / 0.25)

    def heads(self, features: Tensor) -> dict[str, Tensor]:
        """features -> class (B, 18, h, w), centre (B, 10, h, w), extent (B, 2, h, w), maybe depth (B, 32, h, w)."""
        return {name: head(features) for name, head in self.read.items()}


def save_street(path: Path, net: StreetEncoder) -> None:
    """Write the weights in half precision, whole or not at all."""
    with atomic(path) as temporary:
        save_file({name: value.half().contiguous() for name, value in net.state_dict().items()}, temporary)


def load_street(name: str, pretrained: bool = True) -> StreetEncoder:
    """street or street-depth -> the network, with its weights if `pretrained`. InputError if they are not there."""
    if not pretrained:
        return StreetEncoder(name.endswith("depth"))
    path = WEIGHTS / f"{name}.safetensors"
    if not path.is_file():
        raise InputError(f"{path}: not found; make it: python -m data.foundation --out F --ship {WEIGHTS}")
    net = StreetEncoder(name.endswith("depth"))
    net.load_state_dict({key: value.float() for key, value in load_file(path).items()})
    return net.eval()
