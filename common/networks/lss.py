"""LSS (Philion and Fidler, ECCV 2020) as LOcc-BEVDet uses it: image features and depth -> voxels.

It is LOC's host network unless another one is wrapped. Lifting gathers: a voxel reads each camera's feature
times that pixel's probability of the voxel's depth, which is LSS' outer product from the voxel's side. Ours:
two depth channels and the cells' coordinates beside the features. Letters: B batch, N cameras, C channels, D
depth bins, h w feature map, X Y Z cells, V of them.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.backbones import ImageEncoder, UNet3D
from common.geometry import OCC3D, coordinates, divide, invert, project, scale_to, where_true

Bins = tuple[float, float, float]  # [m] first, last, step


class Sizes(NamedTuple):
    """The network's sizes."""

    channels: int = 64  # of the lifted features; LOcc-BEVDet
    depth_bins: Bins = (1.0, 45.0, 0.5)  # LOcc-BEVDet
    cnn_channels: tuple[int, ...] = (64, 128, 256)  # LOcc-BEVDet's CustomResNet3D
    grid_stride: tuple[int, int, int] = (1, 1, 1)  # Occ3D voxels per cell along x, y, z; assumption
    lift_stride: tuple[int, int, int] = (1, 1, 1)  # cells per lifted cell; ours, saves 3D convolutions
    norm: str = "batch"  # assumption; group: the same loss under any split of a batch


PRESETS = {
    "tiny": Sizes(32, (1.0, 45.0, 1.0), (24, 48, 96), (2, 2, 1), (2, 2, 2), "group"),  # two CPU cores
    "base": Sizes(cnn_channels=(32, 64, 128), grid_stride=(2, 2, 1)),  # one 24 GB GPU
    "paper": Sizes(),
}


def share_of(depth: Tensor, bins: Bins) -> Tensor:
    """z-depth [m] -> its place between the first and the last edge of the bins, 0 to 1."""
    return (depth - bins[0]) / (bins[1] - bins[0])


def depth_curves(p: Tensor) -> Tensor:
    """Depth probabilities (N, D, h, w) -> (N, 2, D, h, w): p / max p, and how probably the surface is nearer."""
    return torch.stack([p / p.amax(1, keepdim=True), p.cumsum(1) - 0.5 * p], 1)


def lift(context: Tensor, curves: Tensor, centers: Tensor, K: Tensor, T_ref_cam: Tensor,
         share: Callable[[Tensor], Tensor]) -> Tensor:
    """V(x) = mean over the cameras that see x of context(uv) g(d | uv), g the first of the `curves`.

    uv, d is the pixel and the z-depth of x in the camera: K T_cam_ref x.
    context (N, C, h, w), curves (N, Q, D, h, w) over depth (`depth_curves`), centers (V, 3) [m], K (N, 3, 3)
    at the features' resolution, T_ref_cam (N, 4, 4), share(d): its place on the bins' axis, 0 to 1 -> (V, C +
    Q). The last Q are the same means of the curves. Only the pairs of camera and voxel that meet are computed.
    """
    (N, C, h, w), Q = context.shape, curves.shape[1]
    volume, seen_by = context.new_zeros(len(centers), C + Q).float(), context.new_zeros(len(centers), 1)
    for n in range(N):
        uv, z = project(centers, K[n], invert(T_ref_cam[n]))  # (V, 2), (V,)
        u, v = uv.unbind(-1)
        seen = where_true((z > 0.5) & (u >= 0) & (v >= 0) & (u < w) & (v < h))  # (V_n,)
        at = 2 * uv[seen] / uv.new_tensor([w, h]) - 1  # (V_n, 2)
        grid = torch.cat([at, 2 * share(z[seen])[:, None] - 1], -1)[None, None, None]
        read = F.grid_sample(curves[n : n + 1], grid, padding_mode="border", align_corners=False)
        read = read[0, :, 0, 0].t()  # (V_n, Q)
        sampled = F.grid_sample(context[n : n + 1].float(), at[None, None], align_corners=False)[0, :, 0].t()
        volume.index_add_(0, seen, torch.cat([read[:, :1] * sampled, read], 1))  # sampled (V_n, C)
        seen_by.index_add_(0, seen, torch.ones_like(seen, dtype=seen_by.dtype)[:, None])
    return volume / seen_by.clamp_min(1)


class LiftNet(nn.Module):
    """Six images -> features and depth -> voxels -> 3D U-Net. It keeps the network protocol."""

    def __init__(self, sizes: Sizes, backbone: str, classes: int = 18, pretrained: bool = True):
        super().__init__()
        self.grid, self.bins = OCC3D.coarsen(sizes.grid_stride), sizes.depth_bins
        self.split, C = sizes.lift_stride, sizes.channels
        self.lifted = self.grid.coarsen(self.split)
        self.encoder = ImageEncoder(backbone, C, "group" if backbone == "conv" else sizes.norm, pretrained)
        self.depth = nn.Conv2d(C, round((self.bins[1] - self.bins[0]) / self.bins[2]), 1)
        self.cnn = UNet3D(C + 2 + 5, sizes.cnn_channels, sizes.norm)
        self.channels, cells = sizes.cnn_channels[0], math.prod(self.split)
        self.spread = nn.Conv3d(self.channels, self.channels * cells, 1) if cells > 1 else nn.Identity()
        self.classify = nn.Conv3d(self.channels, classes, 1)

    def voxels_and_depth(self, batch: dict) -> tuple[Tensor, Tensor]:
        """images (B, N, 3, H, W), K, T_ego_cam -> features (B, C, X, Y, Z), depth logits (B, N, D, h, w)."""
        images, K, T = batch["images"], batch["K"], batch["T_ego_cam"]
        features = self.encoder(images.flatten(0, 1))  # (B N, C, h, w)
        K = scale_to(K, images.shape[-2:], features.shape[-2:])
        depth = self.depth(features).unflatten(0, images.shape[:2])  # (B, N, D, h, w)
        features = features.unflatten(0, images.shape[:2])
        centers = self.lifted.centers(device=K.device).view(-1, 3)
        frames = zip(features, depth.float().softmax(2), K, T, strict=True)
        share = partial(share_of, bins=self.bins)
        volume = [lift(f, depth_curves(p), centers, k, t, share) for f, p, k, t in frames]
        lower, upper = centers.new_tensor(self.grid.lower), centers.new_tensor(self.grid.upper)
        place = coordinates(2 * (centers - lower) / (upper - lower) - 1).expand(len(volume), -1, -1)
        x = torch.cat([torch.stack(volume), place], -1).unflatten(1, self.lifted.shape).movedim(-1, 1)
        return divide(self.spread(self.cnn(x)), self.split), depth  # x (B, C + 7, X', Y', Z')

    def voxels(self, batch: dict) -> Tensor:
        """The network protocol's features."""
        return self.voxels_and_depth(batch)[0]

    def head(self, features: Tensor) -> Tensor:
        """The network protocol's own logits (B, K, X, Y, Z); LOC's heads replace them."""
        return self.classify(features)


def depth_loss(logits: Tensor, depth: Tensor, bins: Bins) -> Tensor:
    """Cross-entropy of the depth bins where LiDAR measured a depth: the mean over keyframes of their means.

    logits (B, N, D, h, w), depth (B, N, h, w) [m], 0: none.
    """
    index = ((depth - bins[0]) / bins[2]).floor().long()
    known = ((depth > 0) & (index >= 0) & (index < logits.shape[2])).flatten(1).float()
    index = index.clamp(0, logits.shape[2] - 1).flatten(0, 1)
    value = F.cross_entropy(logits.flatten(0, 1), index, reduction="none")
    value = value.unflatten(0, depth.shape[:2]).flatten(1)
    return ((value * known).sum(1) / known.sum(1).clamp_min(1e-6)).mean()
