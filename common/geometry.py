"""Frames, cameras, voxel grids, ray traversal, point sets, space-filling curves, rotary embeddings.

Conventions (the only place that states them; tests/test_geometry.py holds them)

    frames      `T_ego_cam` maps camera to ego: p_ego = T_ego_cam @ p_cam; adjacent names cancel. Ego x forward, y left,
                z up; camera (OpenCV) x right, y down, z forward. Lengths in [m].
    pixels      continuous image coordinates, (0, 0) at the outer corner of the first pixel. Element [v, u] has its
                centre at (u + 0.5, v + 0.5); `project` returns K p / z unshifted; nearest lookup is floor. That real
                nuScenes intrinsics follow this too is an assumption.
    voxels      index order (x, y, z); a voxel is half open, [lower, upper) on each axis, so a point on a face belongs
                to the voxel above it.
    rays        a ray (or segment) visits a voxel if it spends a positive length inside; where it runs exactly within a
                face it belongs to the voxel above. So an edge or a corner that is only touched adds no voxel, whatever
                the order of the axes. Decided in float64, whatever the dtype of the arguments, and positions within
                1e-9 of an edge length of a face count as on it, so that rounding decides nothing.
    quaternions w, x, y, z (nuScenes); scipy and robosuite use x, y, z, w.

    Letters     N cameras, M points, R rays, P visited voxels, X Y Z voxels, L tokens, D channels, B batch
"""

import functools
import math
import time
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components
from scipy.spatial import cKDTree
from torch import Tensor


# --- voxel grids ------------------------------------------------------------------------------------------------------

class VoxelGrid(NamedTuple):
    """An axis-aligned box cut into equal voxels. lower, upper (3) [m]; shape (3) = (X, Y, Z)."""

    lower: tuple[float, float, float]
    upper: tuple[float, float, float]
    shape: tuple[int, int, int]

    @property
    def voxel_size(self) -> tuple[float, float, float]:
        """Edge lengths of one voxel [m]."""
        return tuple((u - l) / n for l, u, n in zip(self.lower, self.upper, self.shape))

    def centers(self, dtype: torch.dtype = torch.float32, device=None) -> Tensor:
        """-> (X, Y, Z, 3) voxel centres [m]."""
        axes = [(torch.arange(n, dtype=torch.float64) + 0.5) * s + l
                for n, s, l in zip(self.shape, self.voxel_size, self.lower)]
        return torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1).to(device=device, dtype=dtype)

    def index(self, points: Tensor) -> tuple[Tensor, Tensor]:
        """points (..., 3) [m] -> index (..., 3) long by floor (also outside the box), inside (...) bool."""
        index = _in_voxels(points, self).floor().long()                                       # (..., 3)
        size = torch.tensor(self.shape, device=points.device)
        return index, ((index >= 0) & (index < size)).all(-1)

    def coarsen(self, factor: tuple[int, int, int]) -> "VoxelGrid":
        """The same box with `factor` (3) times fewer voxels per axis; the shape must be divisible."""
        if any(n % f for n, f in zip(self.shape, factor)):
            raise ValueError(f"a grid of {tuple(self.shape)} voxels cannot be coarsened by {tuple(factor)}")
        return VoxelGrid(self.lower, self.upper, tuple(n // f for n, f in zip(self.shape, factor)))


OCC3D = VoxelGrid((-40.0, -40.0, -1.0), (40.0, 40.0, 5.4), (200, 200, 16))               # ego frame, 0.4 m
SEMANTICKITTI = VoxelGrid((0.0, -25.6, -2.0), (51.2, 25.6, 4.4), (256, 256, 32))         # LiDAR frame, 0.2 m


def _in_voxels(points: Tensor, grid: VoxelGrid) -> Tensor:
    """points (..., 3) [m] -> (..., 3) float64 in voxels from the grid's lower corner."""
    points = points.double()
    return (points - points.new_tensor(grid.lower)) / points.new_tensor(grid.voxel_size)


# --- frames and cameras -----------------------------------------------------------------------------------------------

def _promote(*tensors: Tensor) -> list[Tensor]:
    """All tensors in the widest of their floating dtypes."""
    dtype = tensors[0].dtype
    for tensor in tensors[1:]:
        dtype = torch.promote_types(dtype, tensor.dtype)
    return [tensor.to(dtype) for tensor in tensors]


def linear(A: Tensor, points: Tensor) -> Tensor:
    """A (3, 3) or (N, 3, 3), points (..., 3) -> A p of each, shapes as in `transform`.

    The product of a long thin matrix is several times slower on a CPU than that of its transpose, bit for bit the same.
    """
    return (A @ points.mT).mT if A.dim() == points.dim() == 2 else points @ A.mT


def transform(T: Tensor, points: Tensor) -> Tensor:
    """T (4, 4), points (..., 3) -> (..., 3). T (N, 4, 4) takes points (M, 3) or (N, M, 3) to (N, M, 3)."""
    T, points = _promote(T, points)
    shift = T[..., :3, 3] if T.dim() == 2 else T[..., None, :3, 3]
    return linear(T[..., :3, :3], points) + shift


def invert(T: Tensor) -> Tensor:
    """Inverse of rigid transforms (..., 4, 4), by the transpose of the rotation."""
    rotation = T[..., :3, :3].mT
    inverse = T.clone()
    inverse[..., :3, :3] = rotation
    inverse[..., :3, 3] = -(rotation @ T[..., :3, 3, None])[..., 0]
    return inverse


def project(points: Tensor, K: Tensor, T_cam_ref: Tensor) -> tuple[Tensor, Tensor]:
    """points (..., 3) [m] in ref, K (3, 3), T_cam_ref (4, 4) -> uv (..., 2) [px] = K p / z, depth (...) [m] = z.

    Points behind the camera get a (mirrored) uv and a negative depth: mask by the depth. |z| below 1 um divides as
    1 um, so that a masked point never brings an inf into a gradient. K (N, 3, 3) and T (N, 4, 4) as in `transform`.
    """
    p = transform(T_cam_ref, points)                                                          # (..., 3) in the camera
    p, K = _promote(p, K)
    depth = p[..., 2]
    image = linear(K, p)                                                                      # (..., 3)
    divisor = torch.where(depth.abs() < 1e-6, torch.full_like(depth, 1e-6).copysign(depth), depth)
    return image[..., :2] / divisor[..., None], depth


def unproject(uv: Tensor, depth: Tensor, K: Tensor, T_ref_cam: Tensor) -> Tensor:
    """uv (..., 2) [px], depth (...) [m] = z, K (3, 3), T_ref_cam (4, 4) -> points (..., 3) [m] in ref."""
    uv, depth, K = _promote(uv, depth, K)
    ray = torch.cat([uv, torch.ones_like(uv[..., :1])], -1) @ torch.linalg.inv(K).mT          # (..., 3) at z = 1
    return transform(T_ref_cam, ray * depth[..., None])


def exact(function: Callable) -> Callable:
    """Keep a function's geometry in float32 under bf16 autocast: 8 bits of a metre are 4 mm."""

    @functools.wraps(function)
    def wide(*args):
        device = next(a.device for a in args if isinstance(a, Tensor)).type
        with torch.autocast(device if device != "meta" else "cpu", enabled=False):
            return function(*(a.float() if getattr(a, "dtype", None) == torch.bfloat16 else a for a in args))

    return wide


@exact
def unproject_cells(z: Tensor, K: Tensor, T_ref_cam: Tensor, size: tuple[int, int]) -> Tensor:
    """z-depth (B, V, h, w) [m] of the cells of pictures of `size` (H, W) -> their centres (B, V, h, w, 3) in ref.

    K (B, V, 3, 3) [px] without skew, T_ref_cam (B, V, 4, 4); works on the meta device.
    """
    h, w = z.shape[-2:]
    uv = pixel_centers(h, w, z.dtype, z.device) * z.new_tensor([size[1] / w, size[0] / h])
    x = (uv[..., 0] - K[..., 0, 2, None, None]) / K[..., 0, 0, None, None]
    y = (uv[..., 1] - K[..., 1, 2, None, None]) / K[..., 1, 1, None, None]
    camera = torch.stack([x, y, torch.ones_like(x)], -1) * z[..., None]
    return torch.einsum("bvij,bvhwj->bvhwi", T_ref_cam[..., :3, :3], camera) + T_ref_cam[..., None, None, :3, 3]


def image_rays(depth: Tensor, K: Tensor, T_ref_cam: Tensor, stride: int, known: Tensor,
               short: float = 0.7) -> tuple[Tensor, Tensor]:
    """Rays of every `stride`-th pixel that has a depth: origins (R, 3), ends (R, 3) [m] in ref.

    depth (N, h, w) [m], 0 = none; K (N, 3, 3) at the maps' resolution, T_ref_cam (N, 4, 4). known (N, h, w) bool: a
    pixel without a class met something, nobody knows what, so its ray ends `short` [m] before it.
    """
    every = slice(stride // 2, None, stride)
    uv = pixel_centers(*depth.shape[-2:]).to(K)[every, every]
    origins, ends = [], []
    for d, sure, k, T in zip(depth[:, every, every], known[:, every, every], K, T_ref_cam, strict=True):
        end = unproject(uv[d > 0], d[d > 0].to(K), k, T)
        along = end - (origin := T[:3, 3].expand_as(end))
        share = (1 - short / along.norm(dim=-1, keepdim=True)).clamp_min(0)
        origins.append(origin)
        ends.append(torch.where(sure[d > 0][:, None], end, origin + share * along))
    return torch.cat(origins), torch.cat(ends)


def pixel_centers(h: int, w: int, dtype: torch.dtype = torch.float32, device=None) -> Tensor:
    """-> (h, w, 2): element [v, u] holds its pixel's centre (u + 0.5, v + 0.5) [px]."""
    v, u = torch.meshgrid(torch.arange(h, dtype=dtype, device=device), torch.arange(w, dtype=dtype, device=device),
                          indexing="ij")
    return torch.stack([u, v], -1) + 0.5


def scale_intrinsics(K: Tensor, sx: float, sy: float) -> Tensor:
    """K (..., 3, 3) of an image -> K of that image resized by sx (width) and sy (height): the first two rows scale."""
    return K * K.new_tensor([sx, sy, 1.0])[:, None]


def scale_to(K: Tensor, size: tuple[int, int], new: tuple[int, int]) -> Tensor:
    """K (..., 3, 3) of (H, W) images -> of the same field of view at another (H, W)."""
    return scale_intrinsics(K, new[1] / size[1], new[0] / size[0])


def where_true(mask: Tensor) -> Tensor:
    """(M,) bool -> indices that are True. The meta device holds no values: there, all (an upper bound)."""
    return torch.arange(len(mask), device="meta") if mask.is_meta else mask.nonzero()[:, 0]


def lift(features: Tensor, points: Tensor, K: Tensor, T_ref_cam: Tensor,
         size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Image features at 3D points: the mean over the cameras that see a point of their bilinear samples.

    features (N, C, h, w) of images of `size` (H, W) [px], points (V, 3) [m], K (N, 3, 3) of the images,
    T_ref_cam (N, 4, 4) -> (V, C), zeros where no camera sees the point; (V,) bool: whether one does.
    """
    volume, cameras = features.new_zeros(len(points), features.shape[1]), features.new_zeros(len(points))
    for one, k, T in zip(features, K, T_ref_cam, strict=True):
        uv, depth = project(points, k, invert(T))  # (V, 2), (V,)
        at = 2 * uv / uv.new_tensor([size[1], size[0]]) - 1
        seen = where_true((depth > 1e-3) & (at >= -1).all(-1) & (at < 1).all(-1))  # (V_n,)
        place = {"padding_mode": "border", "align_corners": False}
        sampled = F.grid_sample(one[None].float(), at[None, None, seen], **place)[0, :, 0]  # (C, V_n)
        volume = volume.index_add(0, seen, sampled.t().to(volume.dtype))
        cameras = cameras.index_add(0, seen, cameras.new_ones(len(seen)))
    return volume / cameras[:, None].clamp_min(1), cameras > 0


def nearest_ids(maps: Tensor, size: tuple[int, int]) -> Tensor:
    """Ids (..., H, W) -> (..., h, w) at the centres of the new pixels, size (h, w)."""
    (H, W), (h, w) = maps.shape[-2:], size
    rows, columns = ((torch.arange(n) + 0.5) * m / n for n, m in ((h, H), (w, W)))
    return maps[..., rows.long(), :][..., columns.long()]


# --- rays through voxels ----------------------------------------------------------------------------------------------

_NEVER = 1e30       # stands for 1/0: (face - start) * _NEVER is beyond any t, and 0 * _NEVER is 0 where 0 * inf is NaN
_ON_FACE = 1e-9     # [voxel edges] a position this close to a face is on it


class _Rays(NamedTuple):
    """Rays clipped to the grid, in voxel units, each axis mirrored where the ray runs down it: every step is upwards.

    start, along (3, R): the position at t is start + t along; along >= 0.  inverse (3, R): 1 / along, or _NEVER.
    slack (3, R): _ON_FACE, or 0 on axes along which the ray does not move.  flip (3, R) bool: mirrored axes.
    enter, leave (R,): the t at which it enters and leaves.  inside (R,) bool: it spends a positive length in the grid.
    first, last (3, R): the mirrored voxel after entering and the one before leaving.
    """

    start: Tensor
    along: Tensor
    inverse: Tensor
    slack: Tensor
    flip: Tensor
    enter: Tensor
    leave: Tensor
    inside: Tensor
    first: Tensor
    last: Tensor

    def of(self, keep: Tensor) -> "_Rays":
        """The rays `keep`, an index over R."""
        return _Rays(*(field.index_select(-1, keep) for field in self))


def _clip(origin: Tensor, direction: Tensor | None, end: Tensor | None, grid: VoxelGrid) -> _Rays:
    """Rays from origin (3,) or (R, 3) [m], t >= 0, along direction (R, 3); or segments to end (R, 3), t <= 1."""
    size = torch.tensor(grid.shape, dtype=torch.float64, device=origin.device)[:, None]       # (3, 1)
    target = direction if end is None else end
    start = _in_voxels(origin.expand_as(target), grid).T.contiguous()                         # (3, R)
    if end is None:
        along = (direction.double() / size.new_tensor(grid.voxel_size)).T.contiguous()
        stop = along.new_full((), math.nan)
    else:
        stop = _in_voxels(end, grid).T.contiguous()
        along = stop - start
    flip = along < 0
    start, stop = torch.where(flip, size - start, start), torch.where(flip, size - stop, stop)
    along = along.abs()
    moving = along > 0
    inverse = torch.where(moving, 1 / along, _NEVER)
    slack = _ON_FACE * moving
    # an axis along which the ray does not move is inside for all t or for none
    enter = torch.where(moving, -start * inverse, torch.where(start >= 0, -math.inf, math.inf))
    leave = torch.where(moving, (size - start) * inverse, torch.where(start < size, math.inf, -math.inf))
    t0, t1 = enter.amax(0).clamp_min(0), leave.amin(0)                                        # (R,), (R,)
    ends = t1 > 1 if end is not None else torch.zeros_like(t1, dtype=torch.bool)              # within the grid
    t1 = torch.where(ends, 1.0, t1)
    inside = (t0 < t1) & moving.any(0) & (start + along).isfinite().all(0)                    # NaN is never inside
    at0, at1 = torch.where(inside, t0, 0.0), torch.where(inside, t1, 0.0)
    first = torch.where(enter == t0, 0.0, (start + at0 * along + slack).floor())
    first = torch.minimum(first.clamp_min(0), size - 1)
    final = torch.where(ends, stop, start + at1 * along)
    last = torch.where((leave == t1) & ~ends, size - 1, (final - slack).ceil() - 1)
    last = torch.where(moving, torch.minimum(torch.maximum(last, first), size - 1), first)
    return _Rays(start, along, inverse, slack, flip, t0, t1, inside, first, last)


def _unmirror(index: Tensor, flip: Tensor, shape: tuple[int, int, int]) -> Tensor:
    """Mirrored voxels (3, R) float -> (R, 3) long in the grid's own axes."""
    size = index.new_tensor(shape)[:, None]
    return torch.where(flip, size - 1 - index, index).long().T.contiguous()


@torch.no_grad()
def cast_rays(occupied: Tensor, origin: Tensor, direction: Tensor, grid: VoxelGrid,
              chunk: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """The first occupied voxel along each ray, as RayIoU's renderer defines it (SparseOcc, lib/dvr).

    occupied (X, Y, Z) bool, origin (3,) or (R, 3) [m], direction (R, 3) of any length
    -> index (R, 3) long, depth (R,) [m], hit (R,) bool.
    hit: the first occupied voxel and the distance from the origin to its EXIT face. No hit: the last voxel in the grid
    and the distance to where the ray leaves it. Never in the grid (or a direction of zero): index -1, depth inf.
    Depth has the arguments' dtype and is computed in float64. Only a ray exactly through an edge can differ from the
    renderer, which steps one axis at a time and so may stop in a voxel that is only touched.

    Vectorised traversal that skips empty space: each round takes every ray to the border of the empty square of voxels
    around it (`_reach`) or to the next layer, whichever is nearer. `chunk` rays at a time keep the state in the cache.
    """
    if tuple(occupied.shape) != tuple(grid.shape):
        raise ValueError(f"occupied has shape {tuple(occupied.shape)}, the grid {tuple(grid.shape)}")
    if direction.dim() != 2 or direction.shape[1] != 3:
        raise ValueError(f"direction must be (R, 3), got {tuple(direction.shape)}")
    device, count = occupied.device, len(direction)
    dtype = torch.promote_types(origin.dtype, direction.dtype)
    origin, direction = origin.to(device).expand(count, 3), direction.to(device)
    index = torch.full((count, 3), -1, device=device)
    depth = torch.full((count,), math.inf, dtype=torch.float64, device=device)
    hit = torch.zeros(count, dtype=torch.bool, device=device)
    reach = _reach(occupied, most=16)
    chunk = chunk or (16384 if device.type == "cpu" else max(count, 1))
    for begin in range(0, count, chunk):
        part = slice(begin, begin + chunk)
        rays = _clip(origin[part], direction[part], None, grid)
        entering = rays.inside.nonzero()[:, 0]
        rays, where = rays.of(entering), entering + begin
        voxel = _march(rays, reach)                                                           # (3, n)
        found = (voxel < voxel.new_tensor(grid.shape)[:, None]).all(0)
        leave = ((voxel + 1 - rays.start) * rays.inverse).amin(0)                             # exit face of that voxel
        index[where] = _unmirror(torch.where(found, voxel, rays.last), rays.flip, grid.shape)
        depth[where] = torch.where(found, leave, rays.leave) * direction[where].double().norm(dim=-1)
        hit[where] = found
    return index, depth.to(dtype), hit


def _reach(occupied: Tensor, most: int) -> Tensor:
    """occupied (X, Y, Z) -> (X+2, Y+2, Z+2) uint8: how far a ray may go within its layer before it must look again.

    0 in occupied voxels and in a border of one voxel around the grid (the ray has left); else the chessboard distance
    in (x, y) to the nearest 0 of the same layer z, at most `most`: all voxels nearer than that are empty.
    Layers and not cubes, because driving rays are nearly level and run close above the ground.
    """
    X, Y, Z = occupied.shape
    free = torch.zeros(X + 2, Y + 2, Z + 2, dtype=torch.bool, device=occupied.device)
    free[1:-1, 1:-1, 1:-1] = ~occupied.bool()
    reach = free.to(torch.uint8)
    for _ in range(most - 1):                                   # erode by one voxel, first x, then y
        rows = free.clone()
        rows[1:-1] &= free[:-2] & free[2:]
        free = rows.clone()
        free[:, 1:-1] &= rows[:, :-2] & rows[:, 2:]
        reach += free
    return reach


def _march(rays: _Rays, reach: Tensor) -> Tensor:
    """Mirrored voxel (3, n) in which each ray meets reach == 0: an occupied one, or the first one outside the grid."""
    X, Y, Z = (n - 2 for n in reach.shape)
    stride = torch.tensor([(Y + 2) * (Z + 2), Z + 2, 1], dtype=torch.float64, device=reach.device)[:, None]
    size = stride.new_tensor([X, Y, Z])[:, None]
    base = torch.where(rays.flip, stride * size, stride).sum(0)                              # voxel 0 is padded voxel 1
    stride = torch.where(rays.flip, -stride, stride)                                          # (3, n)
    reach, found = reach.flatten(), rays.first.clone()
    voxel, start, along, inverse, slacked = rays.first, rays.start, rays.along, rays.inverse, rays.start + rays.slack
    active = torch.arange(voxel.shape[1], device=reach.device)
    turn = 0
    while len(active):
        free = reach[((voxel * stride).sum(0) + base).long()].double()                      # (n,) 0: the ray stops here
        if turn % 3 == 0 and not free.all():                                                 # put the stopped ones away
            stopped, going = (free == 0).nonzero()[:, 0], free.nonzero()[:, 0]
            found[:, active[stopped]] = voxel[:, stopped]
            active, free, base = active[going], free[going], base[going]
            voxel, start, slacked, along, inverse, stride = (
                v.index_select(1, going) for v in (voxel, start, slacked, along, inverse, stride))
        face = voxel + 1                                                                      # (3, n) z: the next layer
        face[:2] += free - 1                                                                 # x, y: the square's border
        t = (face - start).mul_(inverse)
        near = torch.minimum(torch.minimum(t[0], t[1]), t[2])
        near = torch.where(free > 0, near, -1.0)                                              # stopped: stay
        moved = torch.addcmul(slacked, along, near).floor_()
        moved = torch.maximum(torch.minimum(moved, face), voxel)
        voxel = torch.where(t <= near, face, moved)                                           # always at least one step
        turn += 1
    return found


def _crossings(rays: _Rays, axis: int, shape: tuple[int, int, int]):
    """Yields, block by block of `axis`' faces: the rays (m,) that cross the block's first face, the t (J, m) of each
    crossing, and the C-order flat index (J, m) of the voxel that it enters.

    The face-crossing method: every visited voxel but a ray's first is entered through a face, so the crossings of each
    axis' faces, taken by themselves, find them all and no ray has to be followed. Rays are sorted by the number of
    faces they cross: those that cross a j-th one are a prefix, so nothing is gathered. In a block the rays that stop
    short of its last face repeat their last voxel.
    """
    size = rays.start.new_tensor(shape)[:, None]
    stride = rays.start.new_tensor([shape[1] * shape[2], shape[2], 1])[:, None]
    base = torch.where(rays.flip, stride * (size - 1), 0.0).sum(0)                            # flat index of voxel 0
    stride = torch.where(rays.flip, -stride, stride)                                          # (3, R)
    count, order = (rays.last[axis] - rays.first[axis]).long().sort(descending=True)
    start, along, first, last, stride = (
        v[:, order] for v in (rays.start + rays.slack, rays.along, rays.first, rays.last, stride))
    exact, inverse, base = rays.start[axis, order], rays.inverse[axis, order], base[order]
    crossing = (len(count) - torch.bincount(count, minlength=1).cumsum(0)).tolist()           # rays with count > j
    j, most = 0, len(crossing) - 1
    while j < most:
        m = crossing[j]
        step = torch.arange(j + 1, min(j + max(1, 32768 // m), most) + 1, dtype=start.dtype, device=start.device)
        entered = first[axis, :m] + step[:, None]                                             # (J, m)
        t = (entered - exact[:m]) * inverse[:m]
        flat = torch.addcmul(base[:m], torch.minimum(entered, last[axis, :m]), stride[axis, :m])
        for a in (a for a in range(3) if a != axis):
            voxel = torch.addcmul(start[a, :m], along[a, :m], t).floor_()
            flat.addcmul_(voxel.clamp_(first[a, :m], last[a, :m]), stride[a, :m])
        yield order[:m], t, flat.long()
        j += len(step)


@torch.no_grad()
def traversed(origin: Tensor, end: Tensor, grid: VoxelGrid) -> Tensor:
    """Which voxels the segments origin (3,) or (R, 3) -> end (R, 3) [m] visit -> (X, Y, Z) bool.

    The voxel that holds `end` (by floor, if it is in the grid) is always visited, even by a segment that only touches
    it or has no length. Float64; the rule for faces is the module's.
    """
    visited = torch.zeros(grid.shape, dtype=torch.bool, device=end.device)
    rays = _clip(origin, None, end, grid)
    rays = rays.of(rays.inside.nonzero()[:, 0])
    index, inside = grid.index(end)
    for voxel in (index[inside], _unmirror(rays.first, rays.flip, grid.shape)):
        visited[voxel[:, 0], voxel[:, 1], voxel[:, 2]] = True
    flat = visited.view(-1)
    for axis in range(3):
        for _, _, voxel in _crossings(rays, axis, grid.shape):
            flat[voxel] = True
    return visited


# --- point sets -------------------------------------------------------------------------------------------------------

def inliers(points: Tensor, neighbours: int, std_ratio: float = 2.0, chunk: int = 1 << 18) -> Tensor:
    """Open3D's statistical outlier filter: (M, 3) -> (M,) bool.

    False where the mean distance to the `neighbours` nearest points exceeds mean + std_ratio * std over all points.
    The point itself counts as a neighbour, as there. neighbours 0: no filter. Points are asked `chunk` at a time, on
    torch's number of threads; more than a chunk of them prints what the rest costs, measured on the first.
    """
    if neighbours < 1 or len(points) <= neighbours:
        return torch.ones(len(points), dtype=torch.bool)
    points = points.numpy()
    tree, distance = cKDTree(points, balanced_tree=False), np.empty(len(points))
    for first in range(0, len(points), chunk):
        part, began = slice(first, first + chunk), time.perf_counter()
        distance[part] = tree.query(points[part], k=neighbours, workers=torch.get_num_threads())[0].mean(axis=1)
        if first == 0 and len(points) > chunk:
            seconds = (time.perf_counter() - began) * len(points) / chunk
            print(f"outlier filter: {len(points) / 1e6:.1f} M points, about {seconds:.0f} s")
    return torch.from_numpy(distance < distance.mean() + std_ratio * distance.std(ddof=1))


def largest_cluster(points: np.ndarray, factor: float = 3.0, least: int = 4) -> np.ndarray:
    """DBSCAN of (n, 3) -> the cluster with most core points (m, 3); all points if none is dense.

    The radius is `factor` times the median distance to the nearest neighbour, `least` points within it make a core.
    """
    if len(points) <= least:
        return points
    tree = cKDTree(points)
    spacing = float(np.median(tree.query(points, k=2)[0][:, 1]))
    pairs = tree.query_pairs(max(factor * spacing, 1e-4), output_type="ndarray")  # (m, 2) neighbours
    core = np.bincount(pairs.ravel(), minlength=len(points)) + 1 >= least  # a point is its own neighbour
    if not core.any():
        return points
    joined = pairs[core[pairs].all(1)]
    graph = coo_matrix((np.ones(len(joined)), joined.T), (len(points), len(points)))
    label = connected_components(graph, directed=False)[1]
    chosen = core & (label == np.bincount(label[core]).argmax())
    chosen[pairs[chosen[pairs].any(1)]] = True  # neighbours of a core point belong to it
    return points[chosen]


def between_rows(surface: Tensor, depth: Tensor, label: Tensor, keep: Tensor,
                 gap: float) -> tuple[Tensor, Tensor]:
    """Points between pixels of neighbouring rows of a back-projected map, `gap` metres apart. Ours.

    Two pixels are joined if both are kept, carry one label, and their depths differ by less than a fifth. A road 30 m
    away has a row every 2 m in a 224-row map, every 0.5 m in a 900-row map: without these points the far road of a
    small map is a comb of free and occupied voxels. surface (h, w, 3) [m], depth, label, keep (h, w) -> (P, 3), (P,).
    """
    above, below = slice(None, -1), slice(1, None)
    joined = keep[above] & keep[below] & (label[above] == label[below])
    joined &= torch.maximum(depth[above], depth[below]) < 1.2 * torch.minimum(depth[above], depth[below])
    start, step = surface[below][joined], (surface[above] - surface[below])[joined]  # (J, 3)
    name, pieces = label[below][joined], (step.norm(dim=-1) / gap).ceil().clamp(max=16)
    points, labels = [surface[:0, 0]], [label[:0, 0]]
    for k in range(1, int(pieces.max().item()) if len(pieces) else 0):
        wide = pieces > k
        points.append(start[wide] + step[wide] * (k / pieces[wide])[:, None])
        labels.append(name[wide])
    return torch.cat(points), torch.cat(labels)


def hide_blocks(view: Tensor, count: int, generator: torch.Generator) -> None:
    """Set exactly `count` cells of (h, w): random rectangles, the last one cut."""
    h, w = view.shape
    while (lack := count - int(view.sum())) > 0:
        size = torch.rand(4, generator=generator)
        high, wide = (max(1, round(n * (0.25 + 0.35 * float(s)))) for n, s in zip((h, w), size[:2]))
        i, j = int(size[2] * (h - high + 1)), int(size[3] * (w - wide + 1))
        block = torch.zeros_like(view)
        block[i : i + high, j : j + wide] = True
        view.view(-1)[(block & ~view).flatten().nonzero()[:lack, 0]] = True


def farthest_from(points: np.ndarray, others: np.ndarray, share: float, count: int) -> np.ndarray:
    """The `share` of points (n, 3) farthest from others (m, 3), then `count` of those by farthest-point sampling."""
    apart = cKDTree(others).query(points)[0]
    far = points[np.argsort(-apart, kind="stable")[: max(count, round(share * len(points)))]]
    return far[farthest_point_sample(torch.from_numpy(far), count).numpy()]


@torch.no_grad()
def farthest_point_sample(points: Tensor, k: int) -> Tensor:
    """points (M, 3) or (B, M, 3) -> index (k,) or (B, k) long: from point 0, always the point farthest from the chosen.

    Ties go to the lowest index. Any number of coordinates works; k is at most M.
    """
    if points.dim() == 2:
        return farthest_point_sample(points[None], k)[0]
    batch, count, _ = points.shape
    if not 0 <= k <= count:
        raise ValueError(f"cannot choose {k} of {count} points")
    axes = points.movedim(-1, 0).contiguous()                                                 # (3, B, M)
    nearest = points.new_full((batch, count), math.inf)                                       # squared, to the chosen
    index = torch.zeros(batch, k, dtype=torch.long, device=points.device)
    rows, offset, squared = torch.arange(batch, device=points.device), torch.empty_like(axes), torch.empty_like(nearest)
    for i in range(1, k):
        torch.sub(axes, axes[:, rows, index[:, i - 1]][..., None], out=offset)
        torch.mul(offset[0], offset[0], out=squared)
        for axis in offset[1:]:
            squared.addcmul_(axis, axis)
        torch.minimum(nearest, squared, out=nearest)
        # numpy's argmax is about ten times faster than torch's on a CPU; both take the first of equals
        farthest = torch.from_numpy(nearest.numpy().argmax(1)) if nearest.device.type == "cpu" else nearest.argmax(1)
        index[:, i] = farthest
    return index


def knn(query: Tensor, points: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """query (Q, D), points (M, D), k <= M -> index (Q, k) long, squared distance (Q, k), ascending.

    Both may have a batch in front: (B, Q, D), (B, M, D). Neighbours are searched without gradient (a k-d tree on a CPU,
    all pairs on a GPU); the distances are differentiable. Equal distances come in any order.
    """
    if query.dim() == 3:
        pairs = [knn(q, p, k) for q, p in zip(query, points)]
        return torch.stack([index for index, _ in pairs]), torch.stack([distance for _, distance in pairs])
    if not 1 <= k <= len(points):
        raise ValueError(f"cannot find {k} neighbours among {len(points)} points")
    if len(query) == 0:
        index = torch.zeros(0, k, dtype=torch.long, device=query.device)
    elif query.device.type == "cpu":
        tree = cKDTree(points.detach().numpy())
        index = torch.from_numpy(np.asarray(tree.query(query.detach().numpy(), k=[*range(1, k + 1)], workers=-1)[1]))
    else:
        rows = max(1, 2**27 // len(points))                                                   # 512 MB of distances
        index = torch.cat([torch.cdist(q, points, compute_mode="donot_use_mm_for_euclid_dist")
                           .topk(k, largest=False).indices for q in query.detach().split(rows)])
    distance = (query[:, None] - points[index]).square().sum(-1)                              # (Q, k)
    order = distance.detach().argsort(dim=-1, stable=True)                                  # float32 may swap near ties
    return index.gather(1, order), distance.gather(1, order)


# --- space-filling curves ---------------------------------------------------------------------------------------------

def _interleave(bits_of: list[Tensor], depth: int) -> Tensor:
    """Integers (...,) below 2**depth, one per axis -> (...,) long: bits interleaved, first axis most significant."""
    code = torch.zeros_like(bits_of[0])
    for bit in range(depth - 1, -1, -1):
        for value in bits_of:
            code = (code << 1) | ((value >> bit) & 1)
    return code


def _cells(xyz: Tensor, depth: int, swap_xy: bool) -> list[Tensor]:
    """xyz (..., n) -> its n axes, x and y swapped for the "trans" variants; checks that they fit depth and 63 bits."""
    n = xyz.shape[-1]
    if depth * n > 63:
        raise ValueError(f"{n} axes of {depth} bits do not fit a 64-bit code")
    if xyz.numel() and (int(xyz.min()) < 0 or int(xyz.max()) >= 1 << depth):
        raise ValueError(f"cells must be in [0, {1 << depth}), got {int(xyz.min())} to {int(xyz.max())}")
    axes = list(xyz.long().unbind(-1))
    return [axes[1], axes[0], *axes[2:]] if swap_xy else axes


def z_code(xyz: Tensor, depth: int, swap_xy: bool = False) -> Tensor:
    """Cells xyz (..., n) in [0, 2**depth) -> (...,) long Morton code, x most significant (Point Transformer V3)."""
    return _interleave(_cells(xyz, depth, swap_xy), depth)


def hilbert_code(xyz: Tensor, depth: int, swap_xy: bool = False) -> Tensor:
    """Cells xyz (..., n), n = 2 or 3, in [0, 2**depth) -> (...,) long position along the Hilbert curve.

    J. Skilling, Programming the Hilbert curve (2004): undo the rotations of the sub-cubes from the coarsest bit down,
    then Gray-decode across the axes. Consecutive codes are neighbouring cells. `swap_xy` is PTv3's "trans" variant.
    """
    axes = _cells(xyz, depth, swap_xy)
    n = len(axes)
    for bit in range(depth - 1, 0, -1):
        low = (1 << bit) - 1
        for i in range(n):
            set_ = ((axes[i] >> bit) & 1).bool()
            swap = torch.where(set_, 0, (axes[0] ^ axes[i]) & low)      # clear: exchange the low bits with axis 0
            axes[0] = axes[0] ^ torch.where(set_, low, swap)            # set: invert axis 0's low bits
            if i:
                axes[i] = axes[i] ^ swap
    for i in range(1, n):                                               # Gray code, across the axes
        axes[i] = axes[i] ^ axes[i - 1]
    flips = torch.zeros_like(axes[0])
    for bit in range(depth - 1, 0, -1):
        flips = flips ^ torch.where(((axes[-1] >> bit) & 1).bool(), (1 << bit) - 1, 0)
    return _interleave([axis ^ flips for axis in axes], depth)


def hilbert_order(shape: tuple[int, int, int], mode: str = "xyz") -> Tensor:
    """(X, Y, Z) -> (X*Y*Z,) long C-order flat indices in the order of a Hilbert curve.

    mode "xyz": the 3D curve of the smallest cube of 2**depth that holds the grid. mode "height": the 2D curve over
    (x, y), and for each column its voxels from z = 0 upwards (OccMamba's height-prioritised order).
    """
    X, Y, Z = shape
    if mode not in ("xyz", "height"):
        raise ValueError(f"mode must be xyz or height, got {mode}")
    axes = [torch.arange(n) for n in (shape if mode == "xyz" else (X, Y))]
    cells = torch.stack(torch.meshgrid(*axes, indexing="ij"), -1).flatten(0, -2)              # (cells, n)
    order = hilbert_code(cells, max(max(len(a) for a in axes) - 1, 1).bit_length()).argsort()
    return order if mode == "xyz" else (order[:, None] * Z + torch.arange(Z)).flatten()


# --- positions as features --------------------------------------------------------------------------------------------

def fourier(x: Tensor, frequencies: int) -> Tensor:
    """[x, sin(2^k pi x), cos(2^k pi x)], 0 <= k < F (NeRF's encoding): x (..., C) -> (..., C + 2 C F)."""
    angle = x[..., None] * (2.0 ** torch.arange(frequencies, dtype=x.dtype, device=x.device) * math.pi)  # (..., C, F)
    return torch.cat([x, angle.sin().flatten(-2), angle.cos().flatten(-2)], -1)


# --- rotary embeddings ------------------------------------------------------------------------------------------------

def rope(x: Tensor, position: Tensor, base: float = 1e4, layout: str = "interleaved", sign: int = 1) -> Tensor:
    """Rotary embedding: x (..., L, D), position (..., L) -> (..., L, D); pair d turns by sign position base**(-2d/D).

    layout "interleaved": channels (2d, 2d + 1) are a pair; "half": (d, d + D/2). sign +1 turns (a, b) to
    (a cos - b sin, a sin + b cos); -1 the other way (nanochat). The dot product of two rotated vectors depends on the
    difference of their positions only. Angles are in float32 at least; leading axes broadcast from the right.
    """
    D = x.shape[-1]
    if D % 2 or layout not in ("interleaved", "half") or sign not in (1, -1):
        raise ValueError(f"rope needs an even D, layout interleaved or half, sign 1 or -1; got {D}, {layout}, {sign}")
    dtype = torch.promote_types(torch.promote_types(x.dtype, position.dtype), torch.float32)
    frequency = base ** (-torch.arange(0, D, 2, dtype=torch.float64, device=x.device) / D)    # (D/2,)
    theta = sign * position.to(dtype)[..., None] * frequency.to(dtype)                        # (..., L, D/2)
    cos, sin = theta.cos(), theta.sin()
    pairs = x.to(dtype).unflatten(-1, (D // 2, 2) if layout == "interleaved" else (2, D // 2))
    axis = -1 if layout == "interleaved" else -2
    a, b = pairs.unbind(axis)
    return torch.stack([a * cos - b * sin, a * sin + b * cos], axis).flatten(-2).to(x.dtype)


def rope_3d(x: Tensor, position: Tensor, base: float = 1e4, scale: float = 1.0) -> Tensor:
    """Rotary embedding of 3D points: x (..., L, D), position (..., L, 3) [m] -> (..., L, D).

    Three equal even slices of 2 (D // 6) channels turn by x, y and z (times `scale` per metre), interleaved pairs,
    +theta; left-over channels pass. 3DVLA's continuous 3D RoPE. Leading axes broadcast: give heads (B, 1, L, 3).
    """
    width = 2 * (x.shape[-1] // 6)
    slices = x.split([width, width, width, x.shape[-1] - 3 * width], -1)
    turned = [rope(s, scale * position[..., a], base) for a, s in enumerate(slices[:3])]
    return torch.cat([*turned, slices[3]], -1)


# --- coarse cells and the fine voxels in them -------------------------------------------------------------------------

def fold(fine: Tensor, stride: tuple[int, int, int]) -> Tensor:
    """(B, X fx, Y fy, Z fz) -> (B, F, X, Y, Z): the F = fx fy fz fine cells inside each cell become channels."""
    for axis, f in zip((1, 3, 5), stride, strict=True):
        fine = fine.unflatten(axis, (-1, f))                                                 # (B, X, fx, Y, fy, Z, fz)
    return fine.permute(0, 2, 4, 6, 1, 3, 5).flatten(1, 3)


def divide(x: Tensor, split: tuple[int, int, int]) -> Tensor:
    """(B, sx sy sz C, X, Y, Z) -> (B, C, X sx, Y sy, Z sz): a cell's channels become the cells in it, channels last."""
    x = x.unflatten(1, (*split, -1)).permute(0, 5, 1, 6, 2, 7, 3, 4)  # (B, X, sx, Y, sy, Z, sz, C)
    return x.flatten(5, 6).flatten(3, 4).flatten(1, 2).movedim(-1, 1)


def refine(coarse: Tensor, shape: tuple[int, int, int]) -> Tensor:
    """(X, Y, Z) -> `shape`, a multiple of it: every fine voxel takes its cell's value."""
    for axis, n in enumerate(shape):
        coarse = coarse.repeat_interleave(n // coarse.shape[axis], axis)
    return coarse


def coarsen(fine: Tensor, stride: tuple[int, int, int], free: int, ignore: int = 255) -> Tensor:
    """Labels of coarser cells: (X, Y, Z) uint8 -> (X / sx, Y / sy, Z / sz) uint8.

    A cell is free unless at least half of its known voxels are occupied; then it takes the lowest class there. A
    cell without a known voxel is ignored.
    """
    blocks = fold(fine[None], stride)[0]  # (sx sy sz, X', Y', Z')
    known = blocks != ignore
    occupied = known & (blocks != free)
    count, of = occupied.sum(0), known.sum(0)
    lowest = torch.where(occupied, blocks, ignore).amin(0)
    cell = torch.where((2 * count >= of) & (count > 0), lowest, free)
    return torch.where(of > 0, cell, ignore).to(torch.uint8)


def range_gates(centers: Tensor, channels: int) -> Tensor:
    """centers (V, 3) [m] -> (V, C) first values of a factor on lifted image features, ours: a third of the channels pass
    everywhere; each of the others passes at one distance from the ego (hat functions in log range, 2 to 56 m), so that
    such a channel of the image can come to mean "a surface at this range", and the product finds the cell it lies in."""
    gates = channels - channels // 3
    knots = torch.linspace(math.log(2), math.log(56), gates, device=centers.device)
    log_range = centers[:, :2].norm(dim=-1, keepdim=True).clamp(2, 56).log()  # (V, 1)
    hats = (1 - (log_range - knots).abs() / (knots[1] - knots[0])).clamp_min(0)  # (V, gates)
    return torch.cat([torch.ones(len(hats), channels // 3, device=centers.device), hats], 1)


def coordinates(unit: Tensor) -> Tensor:
    """(V, 3) in the box's unit cube [-1, 1]^3 -> (V, 5): x, y, z, distance in the plane, height over distance. Ours."""
    far = unit[:, :2].norm(dim=-1, keepdim=True)
    return torch.cat([unit, far, unit[:, 2:] / (far + 0.1)], -1)


def bev_waves(side: int, channels: int) -> Tensor:
    """(side^2, channels) first values of learned BEV queries: waves of x, y and of distance and direction
    from the ego."""
    axis = (torch.arange(side) + 0.5) / side * 2 - 1
    x, y = (t.flatten() for t in torch.meshgrid(axis, axis, indexing="ij"))
    place = torch.stack([x, y, torch.hypot(x, y), torch.atan2(y, x) / math.pi], -1)  # (side^2, 4)
    bands = channels // 8
    phase = place[:, :, None] * math.pi * 2.0 ** torch.linspace(0, 4, bands)  # (side^2, 4, bands)
    waves = torch.cat([phase.sin(), phase.cos()], -1).flatten(1)
    return torch.nn.functional.pad(waves, (0, channels - 8 * bands)) * 0.5


def rig_offsets(K: Tensor, T_ego_cam: Tensor, size: int, patches: int, queries: int, grid: VoxelGrid,
                heads: int) -> Tensor:
    """Where a rig's cameras see each BEV cell, as attention offsets (heads, q q, N p p). Ours.

    K (N, 3, 3) of size x size px images, T_ego_cam (N, 4, 4). A patch scores minus half its squared distance
    [patches] to the cell's ground point, not below -6. Odd heads count the sideways distance only.
    """
    lower, upper = torch.tensor(grid.lower), torch.tensor(grid.upper)
    steps = (torch.arange(queries) + 0.5) / queries
    axes = [lower[a] + steps * (upper[a] - lower[a]) for a in (0, 1)]
    x, y = (t.flatten() for t in torch.meshgrid(*axes, indexing="ij"))
    ground = torch.stack([x, y, torch.zeros_like(x)], -1)  # (q q, 3)
    centre = torch.arange(patches) + 0.5
    row, column = (t.flatten() for t in torch.meshgrid(centre, centre, indexing="ij"))  # (p p,)
    table = []
    for k, T in zip(K.float(), T_ego_cam.float(), strict=True):
        uv, depth = project(ground, k, invert(T))
        uv = uv / (size / patches)
        beside = (uv[:, :1] - column) ** 2  # (q q, p p)
        above = (uv[:, 1:].clamp(0, patches) - row) ** 2
        behind = torch.where(depth > 0.5, 0.0, 1e4)[:, None]
        table.append(torch.stack([-(beside + above + behind) / 2, -(beside + behind) / 2]))  # (2, q q, p p)
    return torch.cat(table, -1).clamp_min(-6)[torch.arange(heads) % 2]
