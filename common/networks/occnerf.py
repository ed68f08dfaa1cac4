"""OccNeRF (arXiv 2312.09243): the contracted volume, its renderer and losses, its 3D CNN and augmentation.

EasyOcc takes its 3D CNN (PSMNet's three hourglasses) and its augmentation from here. As the rendering host
that EasyOcc's labels improve, it is put together in experiments/easyocc.py. Letters as in easyocc.py; R rays,
S samples a ray. Source: the paper, and its released code (configs/nusc-sem.txt).

    symbol   name       shape           meaning
    c        unit       (..., 3)        contracted coordinate in [-1, 1]                               (6)
    q, w     q, weight  (R, S)          probability that a ray stops at a sample; its share            (7)
    f_17     logits     (18, X, Y, Z)   channel 17, the free logit, is the only density                (7)
"""

import math
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.backbones import conv_norm_relu, norm_layer
from common.geometry import VoxelGrid, invert, pixel_centers, project, unproject
from common.kernels.composite import composite_probability

SIZES = {  # rays a camera (h, w), samples a ray, samples that share a semantic lookup; paper: released code
    "paper": {"render_size": (180, 320), "samples": 424, "group": 4},
    "tiny": {"render_size": (28, 50), "samples": 80, "group": 4},  # two CPU cores
}
RATIO = {"paper": 2 / 3, "tiny": 0.8}  # the real box's share of the contracted axis; paper: released code

# --- 3D CNN -------------------------------------------------------------------------------------------------

def conv3d(c_in: int, c_out: int, norm: str, stride: int = 1, relu: bool = True) -> nn.Sequential:
    """Convolution, norm and (if relu) ReLU."""
    layers = conv_norm_relu(c_in, c_out, norm, dims=3, stride=stride)
    return layers if relu else layers[:2]


def fit(x: Tensor, like: Tensor) -> Tensor:
    """Crops what a transposed convolution adds to an odd size."""
    return x[..., : like.shape[-3], : like.shape[-2], : like.shape[-1]]


class Hourglass(nn.Module):
    """PSMNet's hourglass: two strided stages down, two transposed ones up, with skips from the previous
    hourglass."""

    def __init__(self, channels: tuple[int, ...], norm: str):
        super().__init__()
        c, d, e = channels
        self.down1 = conv3d(c, d, norm, stride=2)
        self.mid1 = conv3d(d, d, norm, relu=False)
        self.down2 = conv3d(d, e, norm, stride=2)
        self.mid2 = conv3d(e, e, norm)
        self.up1 = nn.ConvTranspose3d(e, d, 3, 2, 1, output_padding=1, bias=False)
        self.up1_norm = norm_layer(norm, d, 3)
        self.up2 = nn.ConvTranspose3d(d, c, 3, 2, 1, output_padding=1, bias=False)
        self.up2_norm = norm_layer(norm, c, 3)

    def forward(self, x: Tensor, pre: Tensor | None, post: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        half = self.mid1(self.down1(x))  # 1/2
        half = F.relu(half if post is None else half + post)
        quarter = self.mid2(self.down2(half))  # 1/4
        up = fit(self.up1_norm(self.up1(quarter)), half)
        up = F.relu(up + (half if pre is None else pre))  # 1/2
        return fit(self.up2_norm(self.up2(up)), x), half, up


class StackedHourglass(nn.Module):
    """OccNeRF's 3D CNN (2.4): two convolutions, a residual block, three hourglasses, four convolutions before
    the logits."""

    def __init__(self, c_in: int, channels: tuple[int, ...], norm: str):
        super().__init__()
        c = channels[0]
        self.stem = nn.Sequential(conv3d(c_in, c, norm), conv3d(c, c, norm))
        self.block = nn.Sequential(conv3d(c, c, norm), conv3d(c, c, norm, relu=False))
        self.hourglasses = nn.ModuleList(Hourglass(channels, norm) for _ in range(3))
        self.tail = nn.Sequential(*(conv3d(c, c, norm) for _ in range(4)))
        self.channels = c

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        first = x + self.block(x)
        out, pre, post = first, None, None
        for hourglass in self.hourglasses:
            out, half, post = hourglass(out, pre, post)
            pre = half if pre is None else pre  # PSMNet: the first half-size map feeds the later ones
            out = out + first
        return self.tail(out)


# --- (6) contracted space, (7) probability rendering --------------------------------------------------------


def contract(points: Tensor, grid: VoxelGrid, ratio: float) -> Tensor:
    """(6) metres -> contracted coordinates in [-1, 1]; the real box fills the inner `ratio`. ratio 1: linear,
    the box is all.

    s = (2 (x - min) / (max - min) - 1) t,  t = r / (1 - r)
    c = s if |s| <= t else sign(s) (1 + t - 1 / (|s| + 1 - t))
    """
    lower, upper = points.new_tensor(grid.lower), points.new_tensor(grid.upper)
    s = 2 * (points - lower) / (upper - lower) - 1
    if ratio >= 1:
        return s
    t = ratio / (1 - ratio)
    s = s * t
    outside = 1 + t - 1 / (s.abs().clamp_min(t) + 1 - t)
    return torch.where(s.abs() <= t, s, s.sign() * outside) / (t + 1)


def uncontract(unit: Tensor, grid: VoxelGrid, ratio: float) -> Tensor:
    """Inverse of `contract`; |unit| must stay below 1 where the space is contracted."""
    lower, upper = unit.new_tensor(grid.lower), unit.new_tensor(grid.upper)
    if ratio < 1:
        t = ratio / (1 - ratio)
        c = unit * (t + 1)
        outside = 1 / (1 + t - c.abs().clamp(t, t + 1 - 1e-6)) - 1 + t
        unit = torch.where(c.abs() <= t, c, c.sign() * outside) / t
    return lower + (unit + 1) / 2 * (upper - lower)


class Rays(NamedTuple):
    """Rays of several cameras."""

    origin: Tensor  # (R, 3) [m] reference ego
    direction: Tensor  # (R, 3) reference ego, scaled so that depth along it is the camera's z [m]


class Rendered(NamedTuple):
    """What (7) gives for each ray."""

    depth: Tensor  # (R,) [m] z-depth
    semantic: Tensor  # (R, K) logits
    weight: Tensor  # (R, S)
    position: Tensor  # (R, S) of the samples, normalised to [0, 1] for the distortion term
    light: Tensor  # (R,) probability left before the last sample is forced
    far: Tensor  # (R,) [m] depth of the last sample


def camera_rays(K: Tensor, T_ref_cam: Tensor, size: tuple[int, int], image_size: tuple[int, int]) -> Rays:
    """One ray per element centre of a (h, w) map over each camera's field of view; K (N, 3, 3) at
    image_size."""
    h, w = size
    uv = pixel_centers(h, w).to(K) * K.new_tensor([image_size[1] / w, image_size[0] / h])
    ones = torch.ones(h, w, device=K.device, dtype=K.dtype)
    ends = torch.stack([unproject(uv, ones, K[n], T_ref_cam[n]) for n in range(len(K))])  # (N, h, w, 3)
    origin = T_ref_cam[:, None, None, :3, 3].expand_as(ends)
    return Rays(origin.reshape(-1, 3), (ends - origin).reshape(-1, 3))


def sample_volume(volume: Tensor, unit: Tensor) -> Tensor:
    """Trilinear: volume (C, X, Y, Z), unit (..., 3) in [-1, 1] -> (C, ...)."""
    flat = unit.reshape(1, -1, 1, 1, 3).flip(-1)
    return F.grid_sample(volume[None], flat, align_corners=False)[0, :, :, 0, 0].unflatten(1, unit.shape[:-1])


def ray_depths(rays: Rays, grid: VoxelGrid, ratio: float, cells: tuple[int, int, int], samples: int,
               jitter: float = 0.0, generator: torch.Generator | None = None) -> Tensor:
    """Depths of the samples along each ray, (R, S) [m], ascending. jitter: of a sample's place, in steps.

    ratio < 1: evenly spaced in the contracted coordinate of a line through the box's diagonal (OccNeRF),
    reaching far past the box of `cells`. ratio 1: evenly spaced up to the ray's exit from the box.
    """
    scale = rays.direction.norm(dim=-1, keepdim=True)
    R, device = len(rays.origin), rays.origin.device
    step = torch.linspace(0, 1, samples + 1, device=device)[:-1].expand(R, samples)
    if jitter > 0:
        noise = torch.rand(R, samples, generator=generator, device="cpu").to(device)
        step = step + (noise - 0.5) * 2 * jitter / samples * (step > 0)
    if ratio < 1:
        half = (torch.tensor(grid.upper) - torch.tensor(grid.lower)).norm().item() / 2
        t = ratio / (1 - ratio)
        c = step * (1 - 0.5 / max(cells)) * (t + 1)
        distance = torch.where(c <= t, c, 1 / (1 + t - c.clamp(t, t + 1 - 1e-6)) - 1 + t) / t * half
        return distance / scale + 0.1
    lower, upper = rays.origin.new_tensor(grid.lower), rays.origin.new_tensor(grid.upper)
    direction = torch.where(rays.direction.abs() < 1e-9, 1e-9, rays.direction)
    to_lower, to_upper = (lower - rays.origin) / direction, (upper - rays.origin) / direction
    leave = torch.maximum(to_lower, to_upper).amin(-1)  # (R,)
    return 0.1 + step * (leave.clamp_min(0.2) - 0.1)[:, None]


def apart(unit: Tensor, cells: tuple[int, int, int]) -> Tensor:
    """OccNeRF's mask of samples that are too near to the one before: unit (R, S, 3) -> (R, S) bool.

    Masked: samples within .4 / cells of it on every contracted axis (a fifth of a cell). The first sample is
    compared with the box's centre, as in the released code.
    """
    step = unit.diff(dim=1, prepend=torch.zeros_like(unit[:, :1])).abs()
    return (step > 0.4 / unit.new_tensor(cells)).any(-1)


def render(logits: Tensor, rays: Rays, z: Tensor, grid: VoxelGrid, ratio: float, group: int = 4) -> Rendered:
    """(7) q = 1 - sigmoid(f_17); w = diff(clamp(cumsum q, max 1)), the last sample takes what is left;
    depth = sum w z; semantics = sum w logits.

    logits (K, X, Y, Z) with K - 1 = free, on the contracted cells; z (R, S) from `ray_depths`. Density is
    sampled everywhere, the classes once per `group` samples (OccNeRF's ratio .25).
    """
    points = rays.origin[:, None] + rays.direction[:, None] * z[..., None]  # (R, S, 3)
    unit = contract(points, grid, ratio)
    counted = (unit.abs() <= 1).all(-1)
    if ratio < 1:
        counted &= apart(unit, tuple(logits.shape[1:]))
    q = torch.where(counted, 1 - torch.sigmoid(sample_volume(logits[-1:], unit)[0]), 0.0)  # (R, S)
    weight = composite_probability(q)  # (R, S)
    depth = (weight * z).sum(-1).clamp(0.1, 200)
    middle = unit.unflatten(1, (-1, group)).mean(2)  # (R, S / g, 3)
    grouped = weight.unflatten(1, (-1, group)).sum(-1)  # (R, S / g)
    semantic = torch.einsum("krs,rs->rk", sample_volume(logits, middle), grouped)  # (R, K)
    light = 1 - q[:, :-1].sum(-1).clamp(max=1)
    even = torch.linspace(0, 1, z.shape[1], device=z.device).expand_as(z)
    position = z / z[:, -1:].clamp_min(1e-3) if ratio >= 1 else even
    return Rendered(depth, semantic, weight, position, light, z[:, -1])


# --- losses -------------------------------------------------------------------------------------------------


def ssim(x: Tensor, y: Tensor) -> Tensor:
    """Structural dissimilarity (1 - SSIM) / 2 on 3x3 windows, (B, C, H, W)."""
    x, y = F.pad(x, (1, 1, 1, 1), mode="reflect"), F.pad(y, (1, 1, 1, 1), mode="reflect")
    mu_x, mu_y = F.avg_pool2d(x, 3, 1), F.avg_pool2d(y, 3, 1)
    var_x = F.avg_pool2d(x * x, 3, 1) - mu_x**2
    var_y = F.avg_pool2d(y * y, 3, 1) - mu_y**2
    cov = F.avg_pool2d(x * y, 3, 1) - mu_x * mu_y
    c1, c2 = 0.01**2, 0.03**2
    value = (2 * mu_x * mu_y + c1) * (2 * cov + c2) / ((mu_x**2 + mu_y**2 + c1) * (var_x + var_y + c2))
    return ((1 - value) / 2).clamp(0, 1)


def photometric_loss(images: Tensor, depth: Tensor, K: Tensor, T_ref_cam: Tensor,
                     others: list[tuple]) -> Tensor:
    """(10) mean over pixels of min over {prev, next} x {warped, identity} of 0.85 SSIM + 0.15 L1.

    images (N, 3, H, W), depth (N, H, W) [m]; others: (images (N, 3, H, W), T_ref_cam (N, 4, 4), valid (N,))
    per neighbour.
    """
    N, _, H, W = images.shape
    uv = pixel_centers(H, W).to(K)
    errors = []
    for neighbour, T_other, valid in others:
        warped, seen = [], []
        for n in range(N):
            points = unproject(uv, depth[n], K[n], T_ref_cam[n])  # (H, W, 3)
            uv_n, z = project(points, K[n], invert(T_other[n]))
            grid = 2 * uv_n / uv_n.new_tensor([W, H]) - 1
            image = neighbour[n : n + 1]
            warped.append(F.grid_sample(image, grid[None], padding_mode="border", align_corners=False)[0])
            seen.append((z > 1e-3) & (grid.abs() <= 1).all(-1) & valid[n])
        warped, seen = torch.stack(warped), torch.stack(seen)  # (N, 3, H, W), (N, H, W)
        for candidate, mask in ((warped, seen), (neighbour, valid[:, None, None].expand_as(seen))):
            error = 0.85 * ssim(candidate, images).mean(1) + 0.15 * (candidate - images).abs().mean(1)
            errors.append(torch.where(mask, error, torch.full_like(error, torch.inf)))
    best = torch.stack(errors).amin(0)  # (N, H, W); inf where no neighbour sees the pixel
    known = best.isfinite()
    return torch.where(known, best, torch.zeros_like(best)).sum() / known.sum().clamp_min(1)


def smoothness_loss(depth: Tensor, images: Tensor) -> Tensor:
    """(11) edge-aware first differences of the normalised inverse depth. depth (N, H, W), images (N, 3, H,
    W)."""
    inverse = 1 / depth
    inverse = inverse / inverse.mean((1, 2), keepdim=True)
    dx, dy = inverse.diff(dim=2).abs(), inverse.diff(dim=1).abs()
    gx, gy = images.diff(dim=3).abs().mean(1), images.diff(dim=2).abs().mean(1)
    return (dx * torch.exp(-gx)).mean() + (dy * torch.exp(-gy)).mean()


def semantic_loss(semantic: Tensor, target: Tensor, class_weight: Tensor) -> Tensor:
    """(12) weighted CE of rendered logits (R, K) against map labels (R,); 255 ignored, sky = 17 counts, as in
    OccNeRF."""
    if not (target != 255).any():
        return semantic.sum() * 0
    return F.cross_entropy(semantic, target.long(), class_weight, ignore_index=255)


def entropy_loss(light: Tensor) -> Tensor:
    """(13) binary entropy of the light left at the last sample: a ray either hits or leaves. (R,)"""
    p = light.clamp(1e-6, 1 - 1e-6)
    return -(p * p.log() + (1 - p) * (1 - p).log()).mean()


def distortion_loss(weight: Tensor, position: Tensor) -> Tensor:
    """(13) mip-NeRF 360: sum_ij w_i w_j |m_i - m_j| + 1/3 sum_i w_i^2 d_i, in O(S) by prefix sums. (R, S)
    each, m ascending."""
    before_w = F.pad(weight[:, :-1].cumsum(-1), (1, 0))  # sum_{j<i} w_j
    before_wm = F.pad((weight * position)[:, :-1].cumsum(-1), (1, 0))
    between = 2 * (weight * (position * before_w - before_wm)).sum(-1)
    width = F.pad(position.diff(dim=-1), (0, 1), value=0.0)
    return (between + (weight**2 * width).sum(-1) / 3).mean()


# --- augmentation -------------------------------------------------------------------------------------------


def colour_jitter(images: Tensor, rng: np.random.Generator) -> Tensor:
    """Brightness, contrast, saturation +-.2 and hue +-.1 turn, one draw per keyframe, as OccNeRF. (N, 3, H,
    W) in [0, 1]."""
    brightness, contrast, saturation = rng.uniform(0.8, 1.2, 3).tolist()
    turn = float(rng.uniform(-0.1, 0.1)) * 2 * math.pi
    images = images * brightness
    images = (images - images.mean()) * contrast + images.mean()
    # hue and saturation: turn and scale the chroma plane of YIQ
    to_yiq = torch.tensor([[0.299, 0.587, 0.114], [0.596, -0.274, -0.322], [0.211, -0.523, 0.312]])
    c, s = math.cos(turn) * saturation, math.sin(turn) * saturation
    mix = torch.linalg.inv(to_yiq) @ torch.tensor([[1.0, 0, 0], [0, c, -s], [0, s, c]]) @ to_yiq
    return torch.einsum("ij,njhw->nihw", mix, images).clamp(0, 1)
