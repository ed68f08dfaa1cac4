"""Majority vote of labelled points in voxels.

    Symbol   Name      Shape   Meaning
    i        index     (M,)    flat index of the voxel that point m falls into; outside [0, V): no vote
    l        label     (M,)    class of point m; outside [0, K): no vote (255, sky, uncertain)
    a        weight    (M,)    weight of its vote, >= 0; None: 1
             current   (M,)    point belongs to the reference frame itself (bool); None: nobody does
    n        (inside)  (V, K)  votes        n[v, k] = sum_{m: i_m = v, l_m = k} a_m
    c        (inside)  (V, K)  of current   c[v, k] = the same sum over the current points
             winner    (V,)    argmax_k (n[v, k], c[v, k], -k): most votes, then most current votes, then lowest id
             share     (V,)    n[v, winner] / sum_k n[v, k], in [0, 1]; 0 without votes
             count     (V,)    number of points that voted

Votes are counted in whole units of 2^-16 (a weight is rounded to the nearest), so sums do not depend on their order,
ties are exact, and both backends give the same answer bit for bit on every run, though the kernel uses atomics
(integer adds commute). Weights up to 2^15 per point and 2^32 points fit.

Why a kernel: nobody needs the (V, K) histogram of the whole grid (92 MB for 640k voxels x 18). Both backends number the
occupied voxels first (one pass over V counters), so the histogram has only those rows, class-major: the argmax is
then K vector compares instead of a strided reduction. The kernels fuse the votes with their mask, units and counts,
and the argmax with the share. Floor: each point read once (9 M bytes with byte labels), 9 V bytes written; the integer
atomics, two or three a point, come on top and bound it on points that crowd in few voxels.
Not supported: gradients (the answer is piecewise constant in every input, so there is no backward), more than 255
classes. The number of occupied voxels goes to the host: one synchronisation a call on a GPU.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from common.kernels.dispatch import HAS_TRITON, pick

UNIT = 2 ** 16  # votes per unit of weight


class Votes(NamedTuple):
    """The vote of every voxel."""

    winner: Tensor  # (V,) uint8, `empty` where nobody voted
    share: Tensor   # (V,) float32, winner's share of the votes
    count: Tensor   # (V,) int32, points that voted


def _occupied(index: Tensor, label: Tensor, n_voxels: int, classes: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """-> slot (M,) long, the voxel of each point that votes and V for the others; voxel (U,) long, the distinct voxels
    ascending; row (V + 1,) long, a voxel's place in `voxel` (U where nobody is); count (U,) int32, points that vote."""
    valid = (index >= 0) & (index < n_voxels) & (label >= 0) & (label < classes)      # (M,)
    slot = torch.where(valid, index.long(), n_voxels)            # (M,)
    here = torch.bincount(slot, minlength=n_voxels + 1)          # (V + 1,)
    voxel = here[:n_voxels].nonzero().squeeze(1)                # (U,)
    row = torch.full_like(here, len(voxel))                     # (V + 1,)
    row[voxel] = torch.arange(len(voxel), device=index.device)
    return slot, voxel, row, here[voxel].int()


def _no_votes(n_voxels: int, empty: int, device: torch.device) -> Votes:
    return Votes(torch.full((n_voxels,), empty, dtype=torch.uint8, device=device),
                 torch.zeros(n_voxels, device=device), torch.zeros(n_voxels, dtype=torch.int32, device=device))


def _check(index: Tensor, label: Tensor, n_voxels: int, classes: int, current: Tensor | None, weight: Tensor | None,
           empty: int) -> None:
    for name, value in (("label", label), ("current", current), ("weight", weight)):
        if value is not None and value.shape != index.shape:
            raise ValueError(f"voxel_vote: {name} {tuple(value.shape)} and index {tuple(index.shape)} differ in shape")
    if index.dim() != 1 or not (1 <= classes <= 255 and 0 <= empty <= 255 and n_voxels >= 0):
        raise ValueError(f"voxel_vote: index {tuple(index.shape)} must be flat, classes {classes} in 1..255, "
                         f"empty {empty} in 0..255, n_voxels {n_voxels} >= 0")


def voxel_vote_ref(index: Tensor, label: Tensor, n_voxels: int, classes: int, current: Tensor | None = None,
                   weight: Tensor | None = None, empty: int = 17) -> Votes:
    """The definition. Shapes and meaning as in the module docstring; index, label of any integer type."""
    _check(index, label, n_voxels, classes, current, weight, empty)
    out = _no_votes(n_voxels, empty, index.device)
    slot, voxel, row, count = _occupied(index, label, n_voxels, classes)
    U = len(voxel)
    # Class-major cell of each vote; those without a vote go to column U, which is cut off.
    cell = row.index_select(0, slot).add_(label.clamp(0, classes - 1), alpha=U + 1)   # (M,)

    def histogram(value: Tensor | None) -> Tensor:              # value (M,) or None = 1 -> (K, U) long
        # Sums of whole numbers below 2^53 are exact in float64, in any order.
        return torch.bincount(cell, value, minlength=classes * (U + 1)).long().view(classes, U + 1)[:, :U]

    unit = None if weight is None else (weight.double() * UNIT).round()               # (M,)
    votes = histogram(unit)                                     # (K, U)  n
    if current is not None:
        now = histogram(current.double() if unit is None else current * unit)         # (K, U)  c
    best, winner = votes.max(0)                                 # (U,) each; max returns the first of equals
    if current is not None:
        winner = torch.where(votes == best, now, -1).argmax(0)  # so does argmax
    total = votes.sum(0)                                        # (U,)
    voted = total > 0                                           # points of weight 0 are counted but decide nothing
    out.winner[voxel] = torch.where(voted, winner, empty).to(torch.uint8)
    out.share[voxel] = torch.where(voted, best.double() / total.double(), 0.0).float()
    out.count[voxel] = count
    return out


if HAS_TRITON:
    import triton
    import triton.language as tl

    @triton.jit
    def _count(index_ptr, label_ptr, weight_ptr, current_ptr, row_ptr, votes_ptr, now_ptr, M, U, n_voxels, classes,
               UNIT: tl.constexpr, WEIGHTED: tl.constexpr, CURRENT: tl.constexpr, BLOCK_M: tl.constexpr):
        """Every point adds its units to votes[label, row], those of the reference frame to now as well."""
        o_m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
        m_m = o_m < M
        index = tl.load(index_ptr + o_m, m_m, -1).to(tl.int64)                        # (BLOCK_M,)
        label = tl.load(label_ptr + o_m, m_m, 0).to(tl.int64)                         # (BLOCK_M,)
        m_m &= (index >= 0) & (index < n_voxels) & (label >= 0) & (label < classes)
        row = tl.load(row_ptr + index, m_m, 0)                                        # (BLOCK_M,)
        unit = tl.full((BLOCK_M,), 1, tl.int64)
        if WEIGHTED:
            scaled = tl.load(weight_ptr + o_m, m_m, 0.0).to(tl.float64) * UNIT        # (BLOCK_M,)
            low = tl.floor(scaled)                                                    # round half to even, as torch
            odd = (low.to(tl.int64) & 1) == 1
            up = (scaled - low > 0.5) | ((scaled - low == 0.5) & odd)
            unit = low.to(tl.int64) + up.to(tl.int64)
        tl.atomic_add(votes_ptr + label * U + row, unit, m_m, sem="relaxed")
        if CURRENT:
            m_now = m_m & (tl.load(current_ptr + o_m, m_m, 0) != 0)
            tl.atomic_add(now_ptr + label * U + row, unit, m_now, sem="relaxed")

    @triton.jit
    def _winner(votes_ptr, now_ptr, count_ptr, voxel_ptr, winner_ptr, share_ptr, total_ptr, U, classes, empty,
                CURRENT: tl.constexpr, BLOCK_U: tl.constexpr):
        """One pass over the classes of BLOCK_U occupied voxels, then a scatter to their places in the grid."""
        o_u = tl.program_id(0).to(tl.int64) * BLOCK_U + tl.arange(0, BLOCK_U)
        m_u = o_u < U
        best = tl.load(votes_ptr + o_u, m_u, 0)                                       # (BLOCK_U,)
        best_now = tl.zeros_like(best)
        if CURRENT:
            best_now = tl.load(now_ptr + o_u, m_u, 0)
        total, winner = best, tl.zeros_like(best)
        for k in range(1, classes):
            votes = tl.load(votes_ptr + k * U + o_u, m_u, 0)                          # (BLOCK_U,)
            better = votes > best
            if CURRENT:
                now = tl.load(now_ptr + k * U + o_u, m_u, 0)
                better |= (votes == best) & (now > best_now)
                best_now = tl.where(better, now, best_now)
            best = tl.maximum(best, votes)
            winner = tl.where(better, k, winner)
            total += votes
        voxel = tl.load(voxel_ptr + o_u, m_u, 0)                                      # (BLOCK_U,)
        voted = total > 0
        share = best.to(tl.float64) / tl.where(voted, total, 1).to(tl.float64)
        tl.store(winner_ptr + voxel, tl.where(voted, winner, empty).to(tl.uint8), m_u)
        tl.store(share_ptr + voxel, tl.where(voted, share, 0.0).to(tl.float32), m_u)
        tl.store(total_ptr + voxel, tl.load(count_ptr + o_u, m_u, 0), m_u)


def _vote_triton(index: Tensor, label: Tensor, n_voxels: int, classes: int, current: Tensor | None,
                 weight: Tensor | None, empty: int) -> Votes:
    out, device = _no_votes(n_voxels, empty, index.device), index.device
    index, label = index.contiguous(), label.contiguous()
    _, voxel, row, count = _occupied(index, label, n_voxels, classes)
    M, U = len(index), len(voxel)
    if U == 0:
        return out
    votes = torch.zeros(classes, U, dtype=torch.long, device=device)
    now = torch.zeros_like(votes) if current is not None else votes                   # unused without `current`
    _count[(triton.cdiv(M, 1024),)](
        index, label, index if weight is None else weight.contiguous(),
        index if current is None else current.to(torch.uint8).contiguous(), row, votes, now, M, U, n_voxels, classes,
        UNIT=UNIT, WEIGHTED=weight is not None, CURRENT=current is not None, BLOCK_M=1024)
    _winner[(triton.cdiv(U, 256),)](votes, now, count, voxel, out.winner, out.share, out.count, U, classes, empty,
                                    CURRENT=current is not None, BLOCK_U=256)
    return out


def voxel_vote(index: Tensor, label: Tensor, n_voxels: int, classes: int, current: Tensor | None = None,
               weight: Tensor | None = None, empty: int = 17, backend: str = "auto") -> Votes:
    """index (M,), label (M,) integers, current (M,) bool or None, weight (M,) >= 0 or None -> Votes of n_voxels.

    Points with index outside [0, n_voxels) or label outside [0, classes) do not vote. Ties go to the label with more
    votes among `current` points, then to the lowest id. backend: auto | torch | triton (`dispatch.pick`).
    """
    if pick("voxel_vote", backend, index) == "torch":
        return voxel_vote_ref(index, label, n_voxels, classes, current, weight, empty)
    _check(index, label, n_voxels, classes, current, weight, empty)
    with torch.cuda.device_of(index):
        return _vote_triton(index, label, n_voxels, classes, current, weight, empty)
