"""Multi-scale deformable attention: every query reads a few bilinear samples of a feature pyramid.

    Symbol   Name      Shape               Meaning
    v        value     (N, S, H, D)        pyramid, levels flattened and concatenated: S = sum_l h_l w_l
             shapes    (L, 2)              (h_l, w_l) of each level; a tensor or a list of pairs
    r        loc       (N, Q, H, L, P, 2)  sampling points (x, y) in [0, 1] of the image, the same for every level
    a        weights   (N, Q, H, L, P)     attention weights, normally softmaxed over L * P
    o        (result)  (N, Q, H * D)

    o_{qh} = sum_{l,p} a_{qhlp} sum_{c in 4 corners} k_c(r_{qhlp}) v_{l, corner c, h}
    pixel coordinates x_l = x w_l - 1/2 (pixel centres at integers: align_corners=False), k_c the bilinear weights,
    and corners outside the level are zero.

Letters are Deformable-DETR's (N batch, S pixels, H heads, L levels, P points, D channels of a head).

`ms_deform_attn_ref` is the definition. Instead of sampling level by level with grid_sample, which writes every sample
(N H D Q P values a level), it sees the operation as a sparse matrix: an output row is a weighted sum of 4 L P rows of
`value`. That is torch's embedding_bag, which gathers and sums in one pass (3 to 4 times faster than grid_sample on
a core); its backward is the transposed matrix for `value` and one dot product per corner for the rest.

Why a kernel: it keeps a query's sum in registers: the least it must move is value, loc, weights and the result once,
and what it reads is 4 L P D values a query and head, mostly from the second-level cache. Not tuned on a GPU yet.
Determinism: the forward is bit-stable. The gradient of value is summed with fp32 atomics by the kernel, so its last
bits vary; those of loc and weights are bit-stable, and so is everything in the reference.
At a location exactly on a pixel centre the derivative along loc is one-sided (from above). Not supported: second
derivatives, more than 128 channels a head in the kernel.
"""

from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from common.kernels.dispatch import HAS_TRITON, pick

CORNERS = ((0, 0), (0, 1), (1, 0), (1, 1))  # (dy, dx)
BLOCK = 2 ** 14                             # samples taken at once by the reference: temporaries of 64 KB stay in cache
MAX_CHANNELS = 128                          # a row of a head in registers


def _levels(shapes) -> list[tuple[int, int, int]]:
    """(L, 2) tensor or pairs -> [(h, w, first row)]."""
    levels, start = [], 0
    for h, w in (shapes.tolist() if isinstance(shapes, Tensor) else shapes):
        levels.append((int(h), int(w), start))
        start += int(h) * int(w)
    return levels


class _Samples(NamedTuple):
    """The bilinear samples of r rows (n, q, h), J = L P each; [0] is the left or upper neighbour, [1] the other."""

    column: list[Tensor]    # (r, J) int32, x clamped into the level, times H
    row: list[Tensor]       # (r, J) int32, place of (n, l, y clamped, x = 0, h) in value seen as (N S H, D)
    kx: list[Tensor]        # (r, J) 1 - f and f, f the fraction of x; 0 outside the level
    ky: list[Tensor]        # (r, J)
    inside_x: list[Tensor]  # (r, J) bool
    inside_y: list[Tensor]  # (r, J)


class _Plan(NamedTuple):
    """What every sample of a row needs to know of its level, and which rows to take at once."""

    width: Tensor           # (J,) int32
    height: Tensor          # (J,)
    start: Tensor           # (J,) first pixel of the level
    blocks: list[slice]     # of the R = N Q H rows


def _plan(levels: list[tuple[int, int, int]], loc: Tensor) -> _Plan:
    N, Q, H, L, P, _ = loc.shape
    height, width, start = torch.tensor(levels, device=loc.device, dtype=torch.int32).T.repeat_interleave(P, 1)
    step = max(1, BLOCK // (L * P))
    return _Plan(width, height, start, [slice(r, min(r + step, N * Q * H)) for r in range(0, N * Q * H, step)])


def _samples(plan: _Plan, rows: slice, loc: Tensor, S: int) -> _Samples:
    _, Q, H, L, P, _ = loc.shape
    neighbours, point = [], loc.view(-1, L * P, 2)[rows]                              # (r, J, 2)
    for axis, size in ((0, plan.width), (1, plan.height)):
        at = point[..., axis] * size - 0.5                                            # (r, J)
        low = at.floor()
        fraction, low = at.sub_(low), low.int()                                       # (r, J)
        for place, share in ((low, 1 - fraction), (low + 1, fraction)):
            index = torch.minimum(place.clamp(min=0), size - 1)                       # (r, J)
            inside = index == place
            neighbours.append((index, share.mul_(inside), inside))
    x, kx, inside_x = ([n[i] for n in neighbours[:2]] for i in range(3))
    y, ky, inside_y = ([n[i] for n in neighbours[2:]] for i in range(3))
    r = torch.arange(rows.start, rows.stop, device=loc.device)                        # (r,) = (n Q + q) H + h
    first = (r // (Q * H) * (S * H) + r % H).int().unsqueeze(1) + plan.start * H      # (r, J)
    row = [torch.addcmul(first, i, plan.width * H) for i in y]
    return _Samples([i.mul_(H) for i in x], row, kx, ky, inside_x, inside_y)


def _corners(plan: _Plan, value: Tensor, loc: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """The sparse matrix: place (R, 4, J) int32, row of value as (N S H, D), and share (R, 4, J) = a k_c, by CORNERS."""
    a = weights.view(plan.blocks[-1].stop, -1)                                        # (R, J)
    place = torch.empty(len(a), 4, a.shape[1], dtype=torch.int32, device=a.device)
    share = torch.empty_like(place, dtype=a.dtype)
    for rows in plan.blocks:
        s = _samples(plan, rows, loc, value.shape[1])
        for c, (j, i) in enumerate(CORNERS):
            torch.add(s.row[j], s.column[i], out=place[rows, c])
            torch.mul(a[rows] * s.ky[j], s.kx[i], out=share[rows, c])
    return place, share


class _Bag(torch.autograd.Function):
    """value, loc, weights contiguous. Saves them; places and shares are computed again in the backward."""

    @staticmethod
    def forward(ctx, value: Tensor, loc: Tensor, weights: Tensor, levels: list[tuple[int, int, int]]) -> Tensor:
        place, share = _corners(_plan(levels, loc), value, loc, weights)
        ctx.save_for_backward(value, loc, weights)
        ctx.levels = levels
        out = F.embedding_bag(place.flatten(1), value.view(-1, value.shape[-1]), per_sample_weights=share.flatten(1),
                              mode="sum")                                             # (R, D)
        return out.view(loc.shape[0], loc.shape[1], -1)                               # (N, Q, H D)

    # Backward. Let e_c = <v_c, dL/do>, the gradient of corner c's share s_c = a k_c (0 outside the level). Then
    #   dL/dv_row = sum over the shares that read this row of s_c dL/do            (the transposed sparse matrix)
    #   dL/da     = sum_c k_c e_c
    #   dL/dx     = a w_l sum_c (+1 right, -1 left) ky_c e_c                       (d k_c/d fx; fx moves w_l times x)
    #   dL/dy     = a h_l sum_c (+1 lower, -1 upper) kx_c e_c
    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        value, loc, weights = ctx.saved_tensors
        table, g = value.view(-1, value.shape[-1]), grad.reshape(-1, value.shape[-1]).contiguous()    # (R, D)
        plan, a = _plan(ctx.levels, loc), weights.view(len(g), -1)                    # (R, J)
        place, share = _corners(plan, value, loc, weights)                            # (R, 4, J)
        with torch.enable_grad():                                                     # dot products, nothing gathered
            leaf = share.flatten(1).requires_grad_()
            sums = F.embedding_bag(place.flatten(1), table.detach(), per_sample_weights=leaf, mode="sum")
        e = torch.autograd.grad(sums, leaf, g)[0].view(share.shape)                   # (R, 4, J)
        grad_a, grad_loc = torch.zeros_like(a), loc.new_zeros(*a.shape, 2)            # (R, J), (R, J, 2)
        for rows in plan.blocks:
            s = _samples(plan, rows, loc, value.shape[1])
            dx, dy = torch.zeros_like(a[rows]), torch.zeros_like(a[rows])             # (r, J)
            for c, (j, i) in enumerate(CORNERS):
                grad_a[rows].addcmul_(s.ky[j] * s.kx[i], e[rows, c])
                dx.addcmul_(s.ky[j] * s.inside_x[i], e[rows, c], value=2 * i - 1)
                dy.addcmul_(s.kx[i] * s.inside_y[j], e[rows, c], value=2 * j - 1)
            torch.mul(dx.mul_(a[rows]), plan.width, out=grad_loc[rows, :, 0])
            torch.mul(dy.mul_(a[rows]), plan.height, out=grad_loc[rows, :, 1])
        grad_value = _transposed(place, share.detach(), g, len(table))                # (N S H, D)
        return grad_value.view(value.shape), grad_loc.view(loc.shape), grad_a.view(weights.shape), None


def _transposed(place: Tensor, share: Tensor, g: Tensor, rows: int) -> Tensor:
    """Sums share[r, c, j] g[r] (R, D) into row place[r, c, j] of (rows, D), in one fixed order."""
    if g.device.type == "cpu":  # scipy walks the transposed matrix as it lies: no sort
        from scipy.sparse import csr_matrix

        entries = share.flatten().numpy(), place.flatten().numpy(), np.arange(0, share.numel() + 1, share[0].numel())
        return torch.from_numpy(csr_matrix(entries, (len(g), rows)).T @ g.numpy())
    place, order = place.flatten().sort(stable=True)                                  # (4 R J,)
    ends = torch.bincount(place, minlength=rows).cumsum(0)                            # (rows,)
    reader = order.div(share[0].numel(), rounding_mode="floor")                       # (4 R J,)  row of g
    return F.embedding_bag(reader, g, F.pad(ends[:-1], (1, 0)), mode="sum", per_sample_weights=share.flatten()[order])


def _check(value: Tensor, shapes, loc: Tensor, weights: Tensor) -> list[tuple[int, int, int]]:
    levels = _levels(shapes)
    pixels = sum(h * w for h, w, _ in levels)
    if value.dim() != 4 or loc.dim() != 6 or loc.shape[-1] != 2 or weights.shape != loc.shape[:-1] \
            or (loc.shape[0], loc.shape[2]) != (value.shape[0], value.shape[2]):
        raise ValueError(f"ms_deform_attn: value {tuple(value.shape)} (N, S, H, D), loc {tuple(loc.shape)} (N, Q, H, "
                         f"L, P, 2) and weights {tuple(weights.shape)} (N, Q, H, L, P) do not fit together")
    if value.shape[1] != pixels or loc.shape[3] != len(levels):
        raise ValueError(f"ms_deform_attn: {len(levels)} shapes of {pixels} pixels, but loc has {loc.shape[3]} levels "
                         f"and value {value.shape[1]} pixels")
    return levels


def ms_deform_attn_ref(value: Tensor, shapes, loc: Tensor, weights: Tensor) -> Tensor:
    """The definition, with `ms_deform_attn`'s arguments and result."""
    levels = _check(value, shapes, loc, weights)
    if loc.numel() == 0 or value.numel() == 0:
        zero = value.sum() + loc.sum() + weights.sum()          # keeps the graph: gradients of nothing are zeros
        return zero * value.new_zeros(value.shape[0], loc.shape[1], value.shape[2] * value.shape[3])
    wide = torch.promote_types(value.dtype, torch.float32)      # bf16 is computed in fp32
    return _Bag.apply(*(x.to(wide).contiguous() for x in (value, loc, weights)), levels).to(value.dtype)


if HAS_TRITON:
    import triton
    import triton.language as tl

    @triton.jit
    def _forward(value_ptr, level_ptr, loc_ptr, weight_ptr, out_ptr, S, H, D, Q, L, P, BLOCK_Q: tl.constexpr,
                 BLOCK_D: tl.constexpr):
        """One program: BLOCK_Q queries of one head of one image, all their samples."""
        o_q, o_d = tl.program_id(0) * BLOCK_Q + tl.arange(0, BLOCK_Q), tl.arange(0, BLOCK_D)
        i_n, i_h = (tl.program_id(1) // H).to(tl.int64), tl.program_id(1) % H
        m_q, m_d = o_q < Q, o_d < D
        o_r = (i_n * Q + o_q) * H + i_h                                               # (BLOCK_Q,)
        out = tl.zeros((BLOCK_Q, BLOCK_D), tl.float32)
        for l in range(L):
            h, w = tl.load(level_ptr + 3 * l), tl.load(level_ptr + 3 * l + 1)
            image = i_n * S + tl.load(level_ptr + 3 * l + 2)
            for p in range(P):
                at = (o_r * L + l) * P + p                                            # (BLOCK_Q,)
                x = tl.load(loc_ptr + 2 * at, m_q, 0.0).to(tl.float32) * w - 0.5      # (BLOCK_Q,)
                y = tl.load(loc_ptr + 2 * at + 1, m_q, 0.0).to(tl.float32) * h - 0.5  # (BLOCK_Q,)
                a = tl.load(weight_ptr + at, m_q, 0.0).to(tl.float32)                 # (BLOCK_Q,)
                x0, y0 = tl.floor(x), tl.floor(y)
                for c in tl.static_range(4):
                    xc, yc = x0 + c % 2, y0 + c // 2
                    k = (1 - tl.abs(x - xc)) * (1 - tl.abs(y - yc))                   # (BLOCK_Q,)
                    inside = m_q & (xc >= 0) & (xc < w) & (yc >= 0) & (yc < h)
                    row = (image + tl.where(inside, yc * w + xc, 0).to(tl.int64)) * H + i_h
                    v = tl.load(value_ptr + row[:, None] * D + o_d[None, :], inside[:, None] & m_d[None, :],
                                0.0).to(tl.float32)                                   # (BLOCK_Q, BLOCK_D)
                    out += (a * k)[:, None] * v
        tl.store(out_ptr + o_r[:, None] * D + o_d[None, :], out, m_q[:, None] & m_d[None, :])

    # Backward: the formulas above _Bag.backward, sample by sample. The gradient row of a query and head stays in
    # registers; a corner's dot product e_c needs its row of value again, and its share of the row goes to grad_value by
    # an atomic add. With k_c = (1 - |x - x_c|)(1 - |y - y_c|), d k_c/dx = +-(1 - |y - y_c|): minus on the left corners.
    @triton.jit
    def _backward(value_ptr, level_ptr, loc_ptr, weight_ptr, grad_ptr, grad_value_ptr, grad_loc_ptr, grad_weight_ptr,
                  S, H, D, Q, L, P, BLOCK_Q: tl.constexpr, BLOCK_D: tl.constexpr):
        o_q, o_d = tl.program_id(0) * BLOCK_Q + tl.arange(0, BLOCK_Q), tl.arange(0, BLOCK_D)
        i_n, i_h = (tl.program_id(1) // H).to(tl.int64), tl.program_id(1) % H
        m_q, m_d = o_q < Q, o_d < D
        o_r = (i_n * Q + o_q) * H + i_h                                               # (BLOCK_Q,)
        g = tl.load(grad_ptr + o_r[:, None] * D + o_d[None, :], m_q[:, None] & m_d[None, :], 0.0).to(tl.float32)
        for l in range(L):
            h, w = tl.load(level_ptr + 3 * l), tl.load(level_ptr + 3 * l + 1)
            image = i_n * S + tl.load(level_ptr + 3 * l + 2)
            for p in range(P):
                at = (o_r * L + l) * P + p                                            # (BLOCK_Q,)
                x = tl.load(loc_ptr + 2 * at, m_q, 0.0).to(tl.float32) * w - 0.5      # (BLOCK_Q,)
                y = tl.load(loc_ptr + 2 * at + 1, m_q, 0.0).to(tl.float32) * h - 0.5  # (BLOCK_Q,)
                a = tl.load(weight_ptr + at, m_q, 0.0).to(tl.float32)                 # (BLOCK_Q,)
                x0, y0 = tl.floor(x), tl.floor(y)
                da, dx, dy = tl.zeros_like(x), tl.zeros_like(x), tl.zeros_like(x)
                for c in tl.static_range(4):
                    xc, yc = x0 + c % 2, y0 + c // 2
                    kx, ky = 1 - tl.abs(x - xc), 1 - tl.abs(y - yc)                   # (BLOCK_Q,)
                    inside = m_q & (xc >= 0) & (xc < w) & (yc >= 0) & (yc < h)
                    row = (image + tl.where(inside, yc * w + xc, 0).to(tl.int64)) * H + i_h
                    o_v, m_v = row[:, None] * D + o_d[None, :], inside[:, None] & m_d[None, :]
                    e = tl.sum(tl.load(value_ptr + o_v, m_v, 0.0).to(tl.float32) * g, 1)    # (BLOCK_Q,)
                    tl.atomic_add(grad_value_ptr + o_v, (a * kx * ky)[:, None] * g, m_v, sem="relaxed")
                    da += kx * ky * e
                    dx += (2 * (c % 2) - 1) * ky * e
                    dy += (2 * (c // 2) - 1) * kx * e
                tl.store(grad_weight_ptr + at, da, m_q)
                tl.store(grad_loc_ptr + 2 * at, a * w * dx, m_q)
                tl.store(grad_loc_ptr + 2 * at + 1, a * h * dy, m_q)


class _Attention(torch.autograd.Function):
    """Saves the inputs; the backward gathers again."""

    @staticmethod
    def forward(ctx, value: Tensor, level: Tensor, loc: Tensor, weights: Tensor) -> Tensor:
        (N, S, H, D), (_, Q, _, L, P, _) = value.shape, loc.shape
        out = value.new_empty(N, Q, H * D)
        block_d = triton.next_power_of_2(D)
        ctx.options = {"BLOCK_Q": max(1, 1024 // block_d), "BLOCK_D": block_d, "num_warps": 4}  # 8 values a thread
        ctx.grid, ctx.sizes = (triton.cdiv(Q, ctx.options["BLOCK_Q"]), N * H), (S, H, D, Q, L, P)
        _forward[ctx.grid](value, level, loc, weights, out, *ctx.sizes, **ctx.options)
        ctx.save_for_backward(value, level, loc, weights)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, Tensor, Tensor]:
        value, level, loc, weights = ctx.saved_tensors
        grad_value = torch.zeros_like(value, dtype=torch.float32)                     # atomics: fp32 even for bf16
        grad_loc, grad_weights = torch.empty_like(loc), torch.empty_like(weights)
        _backward[ctx.grid](value, level, loc, weights, grad.contiguous(), grad_value, grad_loc, grad_weights,
                            *ctx.sizes, **ctx.options)
        return grad_value.to(value.dtype), None, grad_loc, grad_weights


def ms_deform_attn(value: Tensor, shapes, loc: Tensor, weights: Tensor, backend: str = "auto") -> Tensor:
    """value (N, S, H, D), shapes (L, 2) of (h, w), loc (N, Q, H, L, P, 2) of (x, y) in [0, 1], weights (N, Q, H, L, P)
    -> (N, Q, H * D), differentiable in value, loc and weights. Level starts follow from shapes.

    backend: auto | torch | triton (`dispatch.pick`). Raises ValueError on shapes or a backend that cannot be had.
    """
    if pick("ms_deform_attn", backend, value) == "torch" or loc.numel() == 0 or value.numel() == 0:
        return ms_deform_attn_ref(value, shapes, loc, weights)
    levels = _check(value, shapes, loc, weights)
    if value.shape[-1] > MAX_CHANNELS:
        raise ValueError(f"ms_deform_attn: {value.shape[-1]} channels a head, the kernel takes {MAX_CHANNELS}; use "
                         "backend='torch'")
    level = torch.tensor(levels, dtype=torch.int32, device=value.device)
    with torch.cuda.device_of(value):
        return _Attention.apply(value.contiguous(), level, loc.contiguous(), weights.contiguous())
