"""Voxels accumulated on image planes: what a camera would see of a soft occupancy grid.

    Symbol   Name      Shape         Meaning
    p        value     (V, C)        what a voxel shows, e.g. class probabilities without `empty`
    o        opacity   (V,)          how much of the light it stops, in [0, 1]
             uv        (N, V, 2)     projected voxel centres [px] (`geometry.project`), camera n
    d        depth     (N, V)        their depth [m]; visible: d > 0 and a pixel of the voxel inside the image
             extent    (N, V, 2)     half width and height of a voxel on the image [px]; None: a point
    u_v      (inside)                pixels of voxel v: floor(uv), and those whose centre lies within uv +- extent;
                                     pixel [y, x] covers [x, x + 1) x [y, y + 1)
    w        (inside)                weight of voxel v in its pixel, by `mode`:
                                       "plain"   w_v = o_v
                                       "depth"   w_v = o_v prod_{v' in the same pixel, nearer} (1 - o_v')
    A        image     (N, C, H, W)  A[u, c] = sum_{v: u in u_v} w_v p_v[c]
    W        weight    (N, H, W)     W[u]    = sum_{v: u in u_v} w_v

"plain" is the literal scatter-accumulate (hidden voxels count as well); "depth" is volume rendering with the voxels of
a pixel as its samples. Equal depths are ordered by voxel index. The caller normalises: A / (W + eps). To train what a
voxel shows but not whether it is there, pass `opacity.detach()`. Pixels and order are constants: no gradient for uv,
depth and extent. Without extents a voxel larger than a pixel leaves holes, through which hidden voxels are seen.

`scatter_project_ref` is the definition: sort the visible (voxel, pixel) pairs by pixel and depth, take the product
over the nearer ones in log2(longest pixel) doubling steps (products only: a cumulative sum of log(1 - o) over all pairs
would lose the small ones, and o = 1 is allowed), and sum rows of `value` with embedding_bag, which never writes
(pairs, C).

Why a kernel: the sort stays torch's; after it one program walks one pixel front to back with T and the C sums in
registers, reading 4 (C + 2) bytes a pair once, instead of some thirty passes over the pairs. Not tuned on a GPU yet.
Determinism: the forward and the gradient of opacity are bit-stable (a pair writes its own, then each voxel's are summed
in order); that of value is summed with fp32 atomics by the
kernel, which commute for a voxel seen by up to two pixels and vary in the last bits beyond.
Not supported: second derivatives and more than 256 channels in the kernel.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from common.kernels.dispatch import HAS_TRITON, pick

MAX_CHANNELS = 256  # the sums of a pixel in the registers of one warp


class Projection(NamedTuple):
    """What has accumulated on each image plane."""

    image: Tensor   # (N, C, H, W)
    weight: Tensor  # (N, H, W)


class _Pairs(NamedTuple):
    """The M visible (voxel, pixel) pairs, sorted by pixel, then depth, then voxel."""

    voxel: Tensor   # (M,) long
    pair: Tensor    # (M,) long, place of the pair in the order of voxels
    pixel: Tensor   # (M,) long, (n H + y) W + x
    start: Tensor   # (N H W + 1,) long: pixel i has the pairs start[i] .. start[i + 1] - 1
    count: Tensor   # (V,) long: pairs of each voxel


def _sorted_pairs(uv: Tensor, depth: Tensor, height: int, width: int, extent: Tensor | None = None) -> _Pairs:
    N, V = depth.shape
    low = high = uv.floor()                                                           # (N, V, 2)  pixel of the centre
    if extent is not None:
        low, high = torch.minimum(low, (uv - extent - 0.5).ceil()), torch.maximum(high, (uv + extent - 0.5).floor())
    last = uv.new_tensor([width - 1, height - 1])
    visible = (depth > 0) & (low <= last).all(-1) & (high >= 0).all(-1)
    voxel, camera = visible.t().nonzero().unbind(1)                                   # (P,)  voxel by voxel
    low, high = (t[camera, voxel].clamp(min=0).minimum(last).long() for t in (low, high))   # (P, 2)
    across, down = (high - low + 1).unbind(1)
    of = torch.arange(len(voxel), device=uv.device).repeat_interleave(across * down)  # (M,)  rows of the above
    place = torch.arange(len(of), device=uv.device) - F.pad((across * down).cumsum(0), (1, 0))[of]
    x, y = low[of, 0] + place % across[of], low[of, 1] + place // across[of]
    pixel, voxel, camera = (camera[of] * height + y) * width + x, voxel[of], camera[of]
    # One key: the bits of a positive fp32 depth sort as integers do. Stable, so ties keep the voxel order.
    key = pixel << 32 | depth[camera, voxel].to(torch.float32).view(torch.int32).long()
    order = key.argsort(stable=True)
    start = F.pad(torch.bincount(pixel, minlength=N * height * width).cumsum(0), (1, 0))
    return _Pairs(voxel[order], order, pixel[order], start, torch.bincount(voxel, minlength=V))


def _light_left(opacity: Tensor, pixel: Tensor, longest: int) -> Tensor:
    """opacity (M,) sorted -> T (M,) = product of 1 - o over the earlier pairs of the same pixel."""
    same = F.pad(pixel[1:] == pixel[:-1], (1, 0))                                     # (M,)  has a nearer neighbour
    left = torch.where(same, F.pad(1 - opacity[:-1], (1, 0)), 1)                      # (M,)  span 1
    span = 1
    while span < longest:                                                             # left covers `span` nearer pairs
        same = pixel[span:] == pixel[:-span]
        left = torch.cat([left[:span], left[span:] * torch.where(same, left[:-span], 1)])
        span *= 2
    return left


def _check(value: Tensor, opacity: Tensor, uv: Tensor, depth: Tensor, height: int, width: int, mode: str,
           extent: Tensor | None) -> None:
    if value.dim() != 2 or opacity.shape != value.shape[:1] or depth.dim() != 2 or depth.shape[1] != len(value) \
            or uv.shape != (*depth.shape, 2) or extent is not None and extent.shape != uv.shape:
        raise ValueError(f"scatter_project: value {tuple(value.shape)} (V, C), opacity {tuple(opacity.shape)} (V,), uv "
                         f"{tuple(uv.shape)} (N, V, 2), depth {tuple(depth.shape)} (N, V) do not fit together"
                         + ("" if extent is None else f", or extent {tuple(extent.shape)} (N, V, 2) to them"))
    if mode not in ("plain", "depth") or height < 1 or width < 1:
        raise ValueError(f"scatter_project: mode={mode!r} is not plain or depth, or {height} x {width} pixels is empty")


def scatter_project_ref(value: Tensor, opacity: Tensor, uv: Tensor, depth: Tensor, height: int, width: int,
                        mode: str = "depth", extent: Tensor | None = None) -> Projection:
    """The definition; shapes and meaning as in the module docstring. Differentiable in value and opacity."""
    _check(value, opacity, uv, depth, height, width, mode, extent)
    N, C, dtype = depth.shape[0], value.shape[1], value.dtype
    wide = torch.promote_types(dtype, torch.float32)            # bf16 is computed in fp32
    value, opacity = value.to(wide), opacity.to(wide)
    pairs = _sorted_pairs(uv, depth, height, width, extent)
    weight = opacity[pairs.voxel]                                                     # (M,)
    if mode == "depth" and len(weight):
        weight = weight * _light_left(weight, pairs.pixel, int(pairs.start.diff().max()))
    total = weight.new_zeros(N * height * width).index_add(0, pairs.pixel, weight)    # (N H W,)
    if len(weight) == 0 or C == 0:
        image = value.new_zeros(N * height * width, C) + 0 * value.sum()              # keeps the graph: zero gradients
    else:
        image = F.embedding_bag(pairs.voxel, value, pairs.start[:-1], per_sample_weights=weight, mode="sum")
    image = image.view(N, height, width, C).permute(0, 3, 1, 2)                       # (N, C, H, W)
    return Projection(image.to(dtype), total.view(N, height, width).to(dtype))


if HAS_TRITON:
    import triton
    import triton.language as tl

    @triton.jit
    def _forward(value_ptr, opacity_ptr, voxel_ptr, start_ptr, image_ptr, weight_ptr, left_ptr, C,
                 ORDERED: tl.constexpr, BLOCK_C: tl.constexpr):
        """One program walks one pixel, nearest voxel first."""
        i_u, o_c = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK_C)
        m_c = o_c < C
        image, left, total = tl.zeros((BLOCK_C,), tl.float32), 1.0, 0.0
        for i in range(tl.load(start_ptr + i_u), tl.load(start_ptr + i_u + 1)):
            voxel = tl.load(voxel_ptr + i)
            opacity = tl.load(opacity_ptr + voxel).to(tl.float32)
            tl.store(left_ptr + i, left)                                              # T_i, for the backward
            image += left * opacity * tl.load(value_ptr + voxel * C + o_c, m_c, 0.0).to(tl.float32)   # (BLOCK_C,)
            total += left * opacity
            if ORDERED:
                left *= 1 - opacity
        tl.store(image_ptr + i_u * C + o_c, image, m_c)
        tl.store(weight_ptr + i_u, total)

    # Backward, per pixel with pairs i = 0, 1, ... from the nearest. g (C,) and h arrive at A and W of the pixel; pair i
    # sends them w_i (p_i, 1), so let G_i = <g, p_i> + h be what a unit of its weight is worth.
    #   L = sum_i w_i G_i,   w_i = T_i o_i,   T_{i+1} = T_i (1 - o_i)
    #   dL/dp_i = w_i g
    #   dL/do_i = T_i (G_i - R_i),   R_i = sum_{j>i} o_j prod_{i<k<j} (1 - o_k) G_j: the worth of the light let through
    #   R_{i-1} = o_i G_i + (1 - o_i) R_i,   R_last = 0
    # so one walk from the back does it, without dividing by 1 - o. In "plain" mode T = 1 and R = 0.
    @triton.jit
    def _backward(value_ptr, opacity_ptr, voxel_ptr, pair_ptr, start_ptr, left_ptr, grad_image_ptr, grad_weight_ptr,
                  grad_value_ptr, grad_pair_ptr, C, ORDERED: tl.constexpr, BLOCK_C: tl.constexpr):
        i_u, o_c = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK_C)
        m_c = o_c < C
        g = tl.load(grad_image_ptr + i_u * C + o_c, m_c, 0.0).to(tl.float32)          # (BLOCK_C,)
        h, behind = tl.load(grad_weight_ptr + i_u).to(tl.float32), 0.0
        first, end = tl.load(start_ptr + i_u), tl.load(start_ptr + i_u + 1)
        for step in range(0, end - first):
            i = end - 1 - step
            voxel, left = tl.load(voxel_ptr + i), tl.load(left_ptr + i)
            opacity = tl.load(opacity_ptr + voxel).to(tl.float32)
            p = tl.load(value_ptr + voxel * C + o_c, m_c, 0.0).to(tl.float32)         # (BLOCK_C,)
            worth = tl.sum(g * p, 0) + h
            tl.store(grad_pair_ptr + tl.load(pair_ptr + i), left * (worth - behind))
            tl.atomic_add(grad_value_ptr + voxel * C + o_c, left * opacity * g, m_c, sem="relaxed")
            if ORDERED:
                behind = opacity * worth + (1 - opacity) * behind


class _Scatter(torch.autograd.Function):
    """Saves the inputs, the sorted pairs and the light left at each (4 bytes a pair)."""

    @staticmethod
    def forward(ctx, value: Tensor, opacity: Tensor, uv: Tensor, depth: Tensor, height: int, width: int,
                extent: Tensor | None, ordered: bool) -> tuple[Tensor, Tensor]:
        N, C = len(depth), value.shape[1]
        pairs = _sorted_pairs(uv, depth, height, width, extent)
        image, weight = value.new_empty(N, height, width, C), value.new_empty(N, height, width)
        left = opacity.new_empty(len(pairs.voxel), dtype=torch.float32)               # (M,)
        ctx.options = {"ORDERED": ordered, "BLOCK_C": triton.next_power_of_2(C), "num_warps": 1}
        _forward[(N * height * width,)](value, opacity, pairs.voxel, pairs.start, image, weight, left, C, **ctx.options)
        ctx.save_for_backward(value, opacity, pairs.voxel, pairs.pair, pairs.start, left, pairs.count)
        return image.permute(0, 3, 1, 2), weight                                      # (N, C, H, W), (N, H, W)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_image: Tensor, grad_weight: Tensor) -> tuple[Tensor | None, ...]:
        value, opacity, voxel, pair, start, left, count = ctx.saved_tensors
        grad_value = torch.zeros_like(value, dtype=torch.float32)                     # (V, C)  atomics: fp32
        grad_pair = torch.empty_like(left)                                            # (M,)  voxel by voxel
        grad_image = grad_image.permute(0, 2, 3, 1).contiguous()                      # (N, H, W, C)
        _backward[(len(start) - 1,)](value, opacity, voxel, pair, start, left, grad_image, grad_weight.contiguous(),
                                     grad_value, grad_pair, value.shape[1], **ctx.options)
        grad_opacity = torch.segment_reduce(grad_pair, "sum", lengths=count, initial=0)   # (V,)
        return grad_value.to(value.dtype), grad_opacity.to(opacity.dtype), *[None] * 6


def scatter_project(value: Tensor, opacity: Tensor, uv: Tensor, depth: Tensor, height: int, width: int,
                    mode: str = "depth", backend: str = "auto", extent: Tensor | None = None) -> Projection:
    """value (V, C), opacity (V,) in [0, 1], uv (N, V, 2) [px], depth (N, V) [m], perhaps extent (N, V, 2) [px] ->
    image (N, C, H, W) and weight (N, H, W).

    mode: "depth" (transmittance order) or "plain" (accumulate). backend: auto | torch | triton (`dispatch.pick`).
    Raises ValueError on shapes, a mode or a backend that cannot be had.
    """
    if pick("scatter_project", backend, value) == "torch" or value.numel() == 0 or depth.numel() == 0:
        return scatter_project_ref(value, opacity, uv, depth, height, width, mode, extent)
    _check(value, opacity, uv, depth, height, width, mode, extent)
    if value.shape[1] > MAX_CHANNELS:
        raise ValueError(f"scatter_project: {value.shape[1]} channels, the kernel takes {MAX_CHANNELS}; use "
                         "backend='torch'")
    with torch.cuda.device_of(value):
        return Projection(*_Scatter.apply(value.contiguous(), opacity.contiguous(), uv, depth, height, width, extent,
                                          mode == "depth"))
