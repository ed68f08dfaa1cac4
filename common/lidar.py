"""Dense labels from LiDAR sweeps by SurroundOcc's recipe: fuse a scene, moving objects apart; fill voids.

    sweeps = read_sweeps(dataset, indices, labeler)     # one scene: its scans with classes, poses, boxes
    scene = fuse(sweeps)                                # once a scene: static points, objects, rays
    now = at_keyframe(scene, i)                         # both where they are at keyframe i, in its ego frame
    surface = fill_voids(now.surface, now.normals, scene.grid)
    label, share = majority(nearest_points(scene, now, centers, 5))
    seen = seen_space(scene, i)

SurroundOcc (weiyithu/SurroundOcc, tools/generate_occupancy_nuscenes) decides by boxes what moves. Without
boxes (`suspects`, ours) a point moves if rays of other sweeps went through its voxel. LOcc's rule names
points by 2D maps. SemanticKITTI's scans carry both. Frames: a scene's frame is the ego pose of its first
keyframe. All numpy.

SCREENED POISSON RECONSTRUCTION on the labels' own voxel grid, with scipy. Open3D's, which SurroundOcc takes,
refines an octree near the samples; here the grid is uniform: what it resolves is a voxel.

    Symbol   Name      Shape    Meaning
    p, n     points    (M, 3)   samples of the surface [m] and their unit normals, towards the free side
    a_p      area      (M,)     surface that a sample stands for [cells^2]: 1 / (samples a cell of surface)
    chi      chi       (X,Y,Z)  at voxel centres: +1/2 inside matter, -1/2 outside; the surface is chi = 0
    g_e      flux      edges    sum_p a_p phi_e(p) (-n_p): the samples' jump of chi along edge e
    alpha    screen    ()       how much each sample pulls the surface onto itself

    chi = argmin  sum_edges (chi_j - chi_i - g_e)^2  +  alpha sum_p a_p chi(p)^2  (Kazhdan & Hoppe 2013, 3)
    that is       (L + alpha Phi^T A Phi) chi = div g

L is the grid's 7-point Laplacian (Neumann border), Phi (M, nodes) trilinear interpolation at the samples,
phi_e the trilinear hat around an edge's midpoint. The system of a grid's shape is assembled once and kept;
Phi^T A Phi is never formed. Solver: conjugate gradients, Jacobi-preconditioned, from the coarsest of three
grids to the finest (cascadic multigrid). The coarse grids close the wide gaps, so few iterations are left for
the finest.

chi = 0 is a closed surface, so it also runs where nobody looked. `density` counts the samples around a
vertex; `trim` keeps the vertices that are at least half as dense as nearly all of the samples. Errors are
measured in tests/test_lidar.py on a sphere, a plane, a box, with noise and with holes. No gradients.
"""

import sys
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from scipy import ndimage, sparse
from scipy.spatial import cKDTree
from scipy.spatial.transform import Rotation

from common.files import InputError
from common.geometry import OCC3D, VoxelGrid, traversed
from common.nuscenes import FREE, NuScenesOccupancy, open_split, rigid_inverse
from common.semantickitti import SemanticKITTI

UNLABELLED = 255  # class of a point that nothing names
MOVABLE = (2, 3, 4, 5, 6, 7, 9, 10)  # Occ3D's vehicles and people; assumption
REACH = 57.0  # [m] rays are followed this far from the sensor: the corner of Occ3D's box
GROUND_BAND = 0.3  # [m] above its column's lowest point a point may be ground, which grazing rays cross
GROUND_COLUMN = 0.8  # [m] width of that column
PAD = 2  # voxels around the grid, so that its border is not the solver's
LEVELS, COARSE_ITERATIONS = 3, (60, 20)  # grids; iterations on all but the finest, coarsest first
PLANE = 0.44  # blurred count at a plane of one sample a cell: 3/8 to 1/2, by where it cuts the cells


# --- sweeps, boxes and the classes of points ----------------------------------------------------------------


def open_scans(root: Path, version: str | None, split: str | None, image_size: tuple[int, int] | None = None,
               cache: Path | None = None, train: bool = True) -> NuScenesOccupancy | SemanticKITTI:
    """What labels are made of: nuScenes, or every scan of SemanticKITTI (a root with sequences/)."""
    if any((Path(root) / name).is_dir() for name in ("sequences", "dataset/sequences")):
        return SemanticKITTI(root, split, cache=cache, parts=(), keyframes="scans")
    return open_split(root, version, split, image_size, cache, train)


def check_supervision(dataset: NuScenesOccupancy | SemanticKITTI, labeler: str) -> str:
    """-> a protocol line's words on fused labels. InputError if the tree lacks what `labeler` needs."""
    if isinstance(dataset, SemanticKITTI):
        if labeler != "lidar":
            raise InputError(f"--labeler {labeler}: SemanticKITTI has no 2D maps; its scans are labelled, "
                             "use --labeler lidar")
        return "fused LiDAR scans with their own labels, moving ones apart; no boxes"
    if labeler != "lidar":
        return "fused LiDAR; no boxes, no lidarseg: classes from 2D maps, movers by rays"
    some = {round(k) for k in np.linspace(0, len(dataset) - 1, 50)}
    if not any(len(dataset.boxes(i).labels) for i in some):
        raise InputError(f"{dataset.root}: no boxes in {dataset.version}, which --labeler lidar (supervised "
                         "labels) needs to tell movers apart; use --labeler world, foundation or files")
    return "fused LiDAR; boxes re-pose each instance"


class Scan(NamedTuple):
    """One LiDAR sweep in the scene's frame."""

    points: np.ndarray  # (M, 3) float64 [m]
    labels: np.ndarray  # (M,) uint8 class, 255 unlabelled
    moving: np.ndarray  # (M,) bool: labelled as moving (SemanticKITTI); else False
    origin: np.ndarray  # (3,) float64 [m] the sensor
    time: int  # [us]
    keyframe: int  # dataset index, -1 between keyframes


class Track(NamedTuple):
    """The boxes of one keyframe in the scene's frame."""

    time: int  # [us]
    T_scene_box: np.ndarray  # (B, 4, 4)
    size: np.ndarray  # (B, 3) width, length, height [m]
    instance: np.ndarray  # (B,)
    labels: np.ndarray  # (B,) uint8 class of the box


class Sweeps(NamedTuple):
    """What is known of one scene."""

    scans: list[Scan]
    poses: dict[int, np.ndarray]  # keyframe -> T_scene_ego (4, 4)
    tracks: dict[int, Track] | None  # keyframe -> boxes; None: not read
    grid: VoxelGrid  # of the labels, in a keyframe's ego frame
    free: int  # id of an empty voxel
    by_rays: bool  # whether `suspects` decides what moves

    def only(self, i: int) -> "Sweeps":
        """Keyframe i's own sweep alone."""
        tracks = {i: self.tracks[i]} if self.tracks else self.tracks
        scans = [scan for scan in self.scans if scan.keyframe == i]
        return self._replace(scans=scans, poses={i: self.poses[i]}, tracks=tracks, by_rays=False)


def read_sweeps(dataset, indices: list[int], labeler=None, most: int = 0, self_range: float = 3.0) -> Sweeps:
    """One scene's sweeps; its keyframes `indices`, in order of time, carry classes.

    A labeler that measures points (`lidar`) is supervision: boxes are read too. With 2D maps rays decide what
    moves. most: sweeps that are kept, keyframes first; 0: all. self_range [m]: nearer points are the car
    itself (SurroundOcc's code). SemanticKITTI (keyframes "scans") needs no labeler: raw ids from 252 on are
    moving.
    """
    if isinstance(dataset, SemanticKITTI):
        return _read_kitti(dataset, indices)
    sweeps = dataset.sweeps(indices[0])
    first, last = (next(s.time for s in order if s.keyframe >= 0) for order in (sweeps, reversed(sweeps)))
    sweeps = [s for s in sweeps if first <= s.time <= last]  # outside, no box says what moves
    if 0 < most < len(sweeps):
        between = [s for s in sweeps if s.keyframe < 0]
        kept = max(0, most - (len(sweeps) - len(between)))  # evenly spaced
        chosen = {between[round(k)].time for k in np.linspace(0, len(between) - 1, kept)}
        sweeps = [s for s in sweeps if s.keyframe >= 0 or s.time in chosen]
    T_scene_global = rigid_inverse(dataset.calibration(indices[0])[2])
    scans, poses, measured = [], {}, False
    for sweep in sweeps:
        T_scene_ego = T_scene_global @ sweep.T_global_ego
        T_scene_lidar = T_scene_ego @ sweep.T_ego_lidar
        if sweep.keyframe >= 0:
            points, labels, measured = labelled_points(dataset, sweep.keyframe, labeler(sweep.keyframe))
            points, poses[sweep.keyframe] = move(T_scene_ego, points), T_scene_ego
        else:
            points = move(T_scene_lidar, dataset.sweep_points(sweep)[:, :3].astype(np.float64))
            labels = np.full(len(points), UNLABELLED, np.uint8)
        local = np.abs((points - T_scene_lidar[:3, 3]) @ T_scene_lidar[:3, :3])
        keep = (local > self_range).any(1)  # SurroundOcc: the car itself, and the ground beside it
        if not keep.any():
            raise InputError(f"{dataset.root / sweep.file}: no LiDAR point beyond {self_range} m; an empty "
                             "sweep cannot be fused")
        scans.append(Scan(points[keep], labels[keep], np.zeros(keep.sum(), bool), T_scene_lidar[:3, 3],
                          sweep.time, sweep.keyframe))
    if len(scans) == 1 and most != 1:
        name = dataset.scene_names[indices[0]]
        print(f"note: {name}: one LiDAR sweep only, nothing to fuse", file=sys.stderr)
    times = {s.keyframe: s.time for s in scans if s.keyframe >= 0}
    tracks = read_tracks(dataset, indices, poses, times) if measured else None
    return Sweeps(scans, poses, tracks, OCC3D, FREE, not measured)


def _read_kitti(dataset, indices: list[int]) -> Sweeps:
    """The same of common.semantickitti: every scan is labelled."""
    T_scene_global = rigid_inverse(dataset.calibration(indices[0])[2])
    scans, poses = [], {}
    for i in indices:
        poses[i] = T_scene_global @ dataset.calibration(i)[2]
        points, raw = dataset.points(i)[:, :3].astype(np.float64), dataset.lidarseg(i, raw=True)
        if raw is None:
            raise InputError(f"{dataset.root}: sequence {dataset.scene_names[i]} has no labels/ of its "
                             "scans; SemanticKITTI's are needed")
        scans.append(Scan(move(poses[i], points), dataset.lidarseg(i), raw >= 252, poses[i][:3, 3],
                          dataset.timestamp(i), i))
    return Sweeps(scans, poses, None, dataset.grid, 0, False)


def labelled_points(dataset: NuScenesOccupancy, i: int, maps) -> tuple[np.ndarray, np.ndarray, bool]:
    """Keyframe i's points (M, 3) float64 [m] in its ego frame, their classes (M,) uint8, 255 unknown.

    Last: whether the labeler measured the points. 2D maps name points by `project_labels`.
    """
    if maps.points is not None:
        return maps.points.astype(np.float64), maps.labels, True
    points = dataset.points(i)[:, :3].astype(np.float64)
    K, T_ego_cam, _ = dataset.calibration(i)
    return points, project_labels(points, maps.semantic, K, T_ego_cam, dataset.image_size), False


def project_labels(points: np.ndarray, semantic: np.ndarray, K: np.ndarray, T_ego_cam: np.ndarray,
                   image_size: tuple[int, int], occlusion: float = 0.25) -> np.ndarray:
    """points (M, 3) -> (M,) uint8 class of the 2D map (N, h, w) where each projects, 255 unknown."""
    camera, row, column = best_pixels(points, K, T_ego_cam, image_size, semantic.shape[1:], occlusion)
    labels = np.full(len(points), UNLABELLED, np.uint8)
    seen = camera >= 0
    labels[seen] = semantic[camera[seen], row[seen], column[seen]]
    labels[labels == FREE] = UNLABELLED  # sky, or no label
    return labels


def best_pixels(points: np.ndarray, K: np.ndarray, T_ego_cam: np.ndarray, image_size: tuple[int, int],
                shape: tuple[int, int], occlusion: float = 0.25) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """points (M, 3) ego -> camera (M,) or -1, row and column (M,) in its map of `shape`.

    K (N, 3, 3) is that of images of image_size. Of two cameras the one that shows the point nearer its
    image's centre is taken (LOcc's rule). A LiDAR on the roof sees over what hides a point from a camera: a
    point is hidden if another one in the same fiftieth of the image's width is nearer by more than the share
    `occlusion` of its depth (ours; 0: off).
    """
    h, w = shape
    camera, at, best = np.full(len(points), -1), np.zeros((len(points), 2)), np.full(len(points), np.inf)
    for n in range(len(K)):
        T = T_ego_cam[n].astype(np.float64)
        local = (points - T[:3, 3]) @ T[:3, :3]
        front = np.flatnonzero(local[:, 2] > 1.0)
        z = local[front, 2]
        unit = (local[front] @ K[n].T)[:, :2] / z[:, None] / (image_size[1], image_size[0])  # inside: [0, 1)
        inside = (unit >= 0).all(1) & (unit < 1).all(1)
        front, unit, z = front[inside], unit[inside], z[inside]
        if occlusion:
            tile = (unit[:, 1] * 50).astype(int) * 50 + (unit[:, 0] * 50).astype(int)
            nearest = np.full(2500, np.inf)
            np.minimum.at(nearest, tile, z)
            seen = z - nearest[tile] <= occlusion * z
            front, unit = front[seen], unit[seen]
        distance = np.hypot(*(unit - 0.5).T)
        better = distance < best[front]
        rows = front[better]
        camera[rows], at[rows], best[rows] = n, unit[better], distance[better]
    return camera, (at[:, 1] * h).astype(int), (at[:, 0] * w).astype(int)


def move(T: np.ndarray, points: np.ndarray) -> np.ndarray:
    """T (4, 4) applied to points (M, 3)."""
    return points @ T[:3, :3].T + T[:3, 3]


def read_tracks(dataset: NuScenesOccupancy, indices: list[int], poses: dict[int, np.ndarray],
                times: dict[int, int]) -> dict[int, Track]:
    """The boxes of a scene's keyframes, in the scene's frame."""
    tracks = {}
    for i in indices:
        boxes = dataset.boxes(i)
        tracks[i] = Track(times[i], poses[i] @ boxes.T_ego_box, boxes.size, boxes.instance, boxes.labels)
    return tracks


def boxes_at(tracks: list[Track], time: int) -> Track:
    """The boxes at a time between keyframes.

    They are those of the keyframe after it, moved between the two keyframes where the one before has the
    instance too (the devkit's rule for sweeps).
    """
    before = max((t for t in tracks if t.time <= time), key=lambda t: t.time, default=tracks[0])
    after = min((t for t in tracks if t.time >= time), key=lambda t: t.time, default=tracks[-1])
    if after.time == before.time:
        return after
    share = (time - before.time) / (after.time - before.time)
    row_before = {instance: row for row, instance in enumerate(before.instance.tolist())}
    pairs = [(row, row_before[x]) for row, x in enumerate(after.instance.tolist()) if x in row_before]
    T = after.T_scene_box.copy()
    if pairs:
        b, a = np.array(pairs).T
        start, end = before.T_scene_box[a], after.T_scene_box[b]
        turn = Rotation.from_matrix(start[:, :3, :3].swapaxes(1, 2) @ end[:, :3, :3]).as_rotvec()
        T[b, :3, :3] = start[:, :3, :3] @ Rotation.from_rotvec(share * turn).as_matrix()
        T[b, :3, 3] = (1 - share) * start[:, :3, 3] + share * end[:, :3, 3]
    return after._replace(time=time, T_scene_box=T)


def in_boxes(points: np.ndarray, track: Track, scale: float = 1.1, drop: float = 0.1) -> np.ndarray:
    """points (M, 3) -> (M,) row of the box that holds each, -1 outside all; of two boxes the later row.

    Boxes are `scale` times larger and reach `drop` [m] lower; both from SurroundOcc's code.
    """
    row = np.full(len(points), -1)
    order = np.argsort(points[:, 0])
    x = points[order, 0]
    for b, (T, (width, length, height)) in enumerate(zip(track.T_scene_box, track.size, strict=True)):
        half = 0.5 * scale * np.array([length, width])
        reach = np.linalg.norm([*half, scale * height])
        near = order[slice(*np.searchsorted(x, [T[0, 3] - reach, T[0, 3] + reach]))]
        local = (points[near] - T[:3, 3]) @ T[:3, :3]
        bottom = -height / 2 - drop
        level = (local[:, 2] >= bottom) & (local[:, 2] <= bottom + scale * height)
        row[near[level & (np.abs(local[:, :2]) <= half).all(1)]] = b
    return row


# --- fusion: what stands still, what moves, what rays crossed -----------------------------------------------


class Cloud(NamedTuple):
    """Points of one instance, or points that move by themselves."""

    points: np.ndarray  # (M, 3) [m] in the box's frame, or in the scene's
    labels: np.ndarray  # (M,) uint8
    sensor: np.ndarray  # (M, 3) the sensor's place when each was seen, same frame


class Rays(NamedTuple):
    """How often voxels of the scene's frame were hit and passed, in sweeps."""

    grid: VoxelGrid
    hits: np.ndarray  # (X, Y, Z) uint16 sweeps with a return in the voxel
    passes: np.ndarray  # (X, Y, Z) uint16 sweeps whose rays cross it without a return in it


class Scene(NamedTuple):
    """A scene, fused."""

    grid: VoxelGrid  # of the labels, in a keyframe's ego frame
    free: int  # id of an empty voxel
    poses: dict[int, np.ndarray]  # keyframe -> T_scene_ego (4, 4)
    static: np.ndarray  # (M, 3) [m] points that stand still, thinned
    surface: np.ndarray  # (m, 3) [m] the same at half a voxel
    normals: np.ndarray  # (m, 3)
    surfaces: bool  # whether normals were estimated
    tree: cKDTree | None  # of the labelled static points
    tree_labels: np.ndarray  # (L,) uint8
    objects: dict[int, Cloud]  # instance -> its points in its box
    object_normals: dict[int, tuple[np.ndarray, np.ndarray]]  # instance -> (m, 3) thinned points, normals
    tracks: dict[int, Track]  # keyframe -> boxes
    loose: dict[int, Cloud]  # keyframe -> moving points without a box, in the scene's frame
    rays: Rays


def fuse(sweeps: Sweeps, cell: float = 0.1, surfaces: bool = True) -> Scene:
    """All sweeps -> static points in the scene's frame, each instance's points in its box, crossed space.

    Boxes decide what moves; else the scans' own `moving` or `suspects`. cell [m]: one point a cell is kept of
    the static map (ours; 0: all). surfaces: estimate normals, for `fill_voids`.
    """
    scans, poses, tracks, grid, free, by_rays = sweeps
    voxel = grid.voxel_size[0]
    rays = cast_scans(scans, poses, grid)
    points, labels, owner = [], [], []
    pieces: dict[int, list[Cloud]] = {}
    loose: dict[int, list[Cloud]] = {i: [] for i in poses}
    flags = suspects(scans, rays) if by_rays and len(scans) > 1 else [scan.moving for scan in scans]
    for s, (scan, moving) in enumerate(zip(scans, flags, strict=True)):
        still = ~moving
        if tracks:
            at = boxes_at(list(tracks.values()), scan.time)
            row = in_boxes(scan.points, at)
            for b in np.unique(row[row >= 0]):
                T, rows = at.T_scene_box[b], np.flatnonzero(row == b)
                local = (scan.points[rows] - T[:3, 3]) @ T[:3, :3]
                sensor = np.broadcast_to((scan.origin - T[:3, 3]) @ T[:3, :3], local.shape)
                pieces.setdefault(int(at.instance[b]), []).append(Cloud(local, scan.labels[rows], sensor))
            still = (row < 0) & still
        elif scan.keyframe >= 0:
            sensor = np.broadcast_to(scan.origin, (moving.sum(), 3))
            loose[scan.keyframe].append(Cloud(scan.points[moving], scan.labels[moving], sensor))
        points.append(scan.points[still].astype(np.float32))
        labels.append(scan.labels[still])
        owner.append(np.full(still.sum(), s, np.int32))
    points, labels, owner = (np.concatenate(x) for x in (points, labels, owner))
    origins = np.stack([scan.origin for scan in scans])
    known = np.flatnonzero(labels != UNLABELLED)
    known = known[thin(points[known], cell)]
    coarse = thin(points, voxel / 2)
    surface = points[coarse].astype(np.float64)
    normals = estimate_normals(surface, origins[owner[coarse]]) if surfaces else np.zeros_like(surface)
    objects = {key: _join(parts) for key, parts in pieces.items()}
    return Scene(
        grid, free, poses, points[thin(points, cell)], surface, normals, surfaces,
        tree=cKDTree(points[known]) if len(known) else None,
        tree_labels=labels[known],
        objects=objects,
        object_normals={key: _normals_of(x, voxel / 2) for key, x in objects.items()} if surfaces else {},
        tracks=tracks or {},
        loose={i: _join(parts) for i, parts in loose.items()},
        rays=rays,
    )


def _join(parts: list[Cloud]) -> Cloud:
    """Several clouds as one."""
    empty = Cloud(np.zeros((0, 3)), np.zeros(0, np.uint8), np.zeros((0, 3)))
    return Cloud(*(np.concatenate(x) for x in zip(*parts, strict=True))) if parts else empty


def thin(points: np.ndarray, cell: float) -> np.ndarray:
    """(M, 3) -> rows of the first point in each occupied cell of `cell` [m]; 0: all rows."""
    if cell <= 0 or len(points) == 0:
        return np.arange(len(points))
    return np.unique(_flat_cells(points, cell), return_index=True)[1]


def _flat_cells(points: np.ndarray, cell: float) -> np.ndarray:
    """(M, 3) -> (M,) a number for the cell of `cell` [m] that holds each point."""
    index = np.floor(points / cell).astype(np.int64)
    index -= index.min(0)
    span = index.max(0) + 1
    return (index[:, 0] * span[1] + index[:, 1]) * span[2] + index[:, 2]


def _normals_of(cloud: Cloud, cell: float) -> tuple[np.ndarray, np.ndarray]:
    """A cloud's points, one a cell of `cell` [m], and their normals."""
    rows = thin(cloud.points, cell)
    return cloud.points[rows], estimate_normals(cloud.points[rows], cloud.sensor[rows])


def cast_scans(scans: list[Scan], poses: dict[int, np.ndarray], grid: VoxelGrid) -> Rays:
    """Follow every ray of every sweep through a grid of the scene's frame that holds all keyframes' boxes.

    Its voxels continue those of the first keyframe's `grid`.
    """
    voxel, base = grid.voxel_size[0], np.asarray(grid.lower)
    at = np.stack([T[:3, 3] for T in poses.values()] + [scan.origin for scan in scans])
    low = np.floor((at.min(0) - (REACH, REACH, 2.5) - base) / voxel).astype(int)  # in voxels from `base`
    high = np.ceil((at.max(0) + (REACH, REACH, 7.0) - base) / voxel).astype(int)
    shape = high - low
    hits, passes = np.zeros(shape, np.uint16), np.zeros(shape, np.uint16)
    for scan in scans:  # each in a window around its sensor
        a = np.maximum(np.floor((scan.origin - REACH - base) / voxel).astype(int) - low, 0)
        b = np.minimum(np.ceil((scan.origin + REACH - base) / voxel).astype(int) - low, shape)
        lower, upper = (tuple(base + (low + corner) * voxel) for corner in (a, b))
        window = VoxelGrid(lower, upper, tuple((b - a).tolist()))
        crossed = traversed(torch.from_numpy(scan.origin), torch.from_numpy(scan.points), window).numpy()
        hit = occupy(scan.points, window)
        part = tuple(slice(*x) for x in zip(a, b, strict=True))
        hits[part] += hit
        passes[part] += crossed & ~hit
    whole = VoxelGrid(tuple(base + low * voxel), tuple(base + high * voxel), tuple(shape.tolist()))
    return Rays(whole, hits, passes)


def suspects(scans: list[Scan], rays: Rays, ratio: float = 0.35) -> list[np.ndarray]:
    """Points (M,) bool of each sweep that may move, without boxes. Ours.

    A voxel is inconsistent if rays of at least two sweeps crossed it and fewer than `ratio` of the sweeps
    that met it ended there; points in such voxels move. Grazing rays cross the ground, so points within
    GROUND_BAND of their column's lowest one stay, unless most labelled points of their voxel are of a class
    that can move.
    """
    grid, shape = rays.grid, rays.grid.shape
    inconsistent = (rays.passes >= 2) & (rays.hits < ratio * (rays.hits.astype(np.float32) + rays.passes))
    index = [grid.index(torch.from_numpy(scan.points))[0].numpy() for scan in scans]
    inside = [((i >= 0) & (i < shape)).all(1) for i in index]
    balance = np.zeros(shape, np.int32)
    for scan, i, ok in zip(scans, index, inside, strict=True):
        known = ok & (scan.labels != UNLABELLED)
        np.add.at(balance, tuple(i[known].T), np.where(np.isin(scan.labels[known], MOVABLE), 1, -1))
    columns = [np.floor((scan.points[:, :2] - grid.lower[:2]) / GROUND_COLUMN).astype(int) for scan in scans]
    span = np.ceil((np.array(grid.upper[:2]) - grid.lower[:2]) / GROUND_COLUMN).astype(int)
    lowest = np.full(span, np.inf)
    for scan, ok, column in zip(scans, inside, columns, strict=True):
        np.minimum.at(lowest, tuple(column[ok].T), scan.points[ok, 2])
    lowest = ndimage.minimum_filter(lowest, 3, mode="nearest")
    result = []
    for scan, i, ok, column in zip(scans, index, inside, columns, strict=True):
        suspect, at = scan.moving.copy(), tuple(i[ok].T)
        raised = scan.points[ok, 2] > lowest[tuple(column[ok].T)] + GROUND_BAND
        suspect[ok] |= inconsistent[at] & (raised | (balance[at] > 0))
        result.append(suspect)
    return result


# --- one keyframe -------------------------------------------------------------------------------------------


class Now(NamedTuple):
    """A fused scene at one keyframe, in its ego frame: the static map, and moving objects where they are."""

    points: np.ndarray  # (M, 3) [m] all
    surface: np.ndarray  # (m, 3) [m] all, at half a voxel
    normals: np.ndarray  # (m, 3)
    movers: Cloud
    T_ego_scene: np.ndarray  # (4, 4)


def at_keyframe(scene: Scene, i: int, least: int = 5) -> Now:
    """The scene at keyframe i. An instance of fewer than `least` points is left out (SurroundOcc's code)."""
    T_scene_ego, grid = scene.poses[i], scene.grid
    T_ego_scene = rigid_inverse(T_scene_ego)
    middle = move(T_scene_ego, np.mean([grid.lower, grid.upper], 0))
    reach = 0.5 * np.linalg.norm(np.subtract(grid.upper, grid.lower)) + 2
    static, rows = (np.flatnonzero((np.abs(points[:, :2] - middle[:2]) < reach).all(1))
                    for points in (scene.static, scene.surface))
    movers, surface, normals = _movers(scene, i, T_ego_scene, least)
    return Now(
        np.concatenate([move(T_ego_scene, scene.static[static].astype(np.float64)), movers.points]),
        np.concatenate([move(T_ego_scene, scene.surface[rows]), surface]),
        np.concatenate([scene.normals[rows] @ T_ego_scene[:3, :3].T, normals]), movers, T_ego_scene)


def _movers(scene: Scene, i: int, T_ego_scene: np.ndarray,
            least: int) -> tuple[Cloud, np.ndarray, np.ndarray]:
    """Moving objects at keyframe i, in its ego frame: their points, and thinned (m, 3) points with normals.

    Each annotated instance is re-posed by its box. An instance without a labelled point takes its box's
    class.
    """
    parts, surface, normals = [], [np.zeros((0, 3))], [np.zeros((0, 3))]
    if i in scene.tracks:
        track = scene.tracks[i]
        boxes = zip(T_ego_scene @ track.T_scene_box, track.instance.tolist(), track.labels, strict=True)
        for T, instance, label in boxes:
            cloud = scene.objects.get(instance)
            if cloud is None or len(cloud.points) < least:
                continue
            labels = cloud.labels
            if not (labels != UNLABELLED).any():
                labels = np.full(len(labels), label)
            parts.append(Cloud(move(T, cloud.points), labels, move(T, cloud.sensor)))
            if instance in scene.object_normals:
                surface.append(move(T, scene.object_normals[instance][0]))
                normals.append(scene.object_normals[instance][1] @ T[:3, :3].T)
    loose = scene.loose[i]
    parts.append(Cloud(move(T_ego_scene, loose.points), loose.labels, move(T_ego_scene, loose.sensor)))
    if len(loose.points) >= least and scene.surfaces:
        points, n = _normals_of(parts[-1], scene.grid.voxel_size[0] / 2)
        surface, normals = [*surface, points], [*normals, n]
    return _join(parts), np.concatenate(surface), np.concatenate(normals)


def occupy(points: np.ndarray, grid: VoxelGrid) -> np.ndarray:
    """points (M, 3) [m] -> (X, Y, Z) bool: voxels that hold one."""
    occupied = np.zeros(grid.shape, bool)
    index, inside = grid.index(torch.from_numpy(points))
    occupied[tuple(index[inside].numpy().T)] = True
    return occupied


def fill_voids(points: np.ndarray, normals: np.ndarray, grid: VoxelGrid,
               min_density: float = 0.05) -> np.ndarray:
    """Voxels (X, Y, Z) bool on the Poisson surface through points (M, 3) with normals.

    Vertices not half as dense as all but the share `min_density` of the samples are trimmed (ours). Six
    iterations on the finest grid: more were measured to change nothing.
    """
    surface = reconstruct(points, normals, grid, iterations=6)
    return occupy(surface.points[trim(surface, min_density)], grid)


def nearest_points(scene: Scene, now: Now, centers: np.ndarray, k: int) -> np.ndarray:
    """centers (V, 3) [m] ego, of voxels -> classes (V, k) uint8 of the k nearest labelled points, in order.

    Static and moving points are asked together, the moving ones only from where one can be among the k: their
    points are not thinned, and a search from afar among points at one distance is long. 255: fewer than k.
    """
    known = now.movers.labels != UNLABELLED
    distance = np.full((len(centers), 2 * k), np.inf)
    label = np.full((len(centers), 2 * k), UNLABELLED, np.uint8)
    if scene.tree is not None:
        distance[:, :k], rows = _query(scene.tree, move(rigid_inverse(now.T_ego_scene), centers), k)
        label[:, :k] = np.append(scene.tree_labels, UNLABELLED)[rows]
    if known.any():
        points, size = now.movers.points[known], np.array(scene.grid.voxel_size)
        cells = np.unique(np.floor(points / size).astype(np.int64), axis=0)
        least = _query(cKDTree((cells + 0.5) * size), centers, 1)[0][:, 0] - np.linalg.norm(size) / 2
        near = np.flatnonzero(least <= distance[:, k - 1])
        tree = cKDTree(points, leafsize=32, compact_nodes=False, balanced_tree=False)
        distance[near, k:], rows = _query(tree, centers[near], k)
        label[near, k:] = np.append(now.movers.labels[known], UNLABELLED)[rows]
    nearest = np.argsort(distance, axis=1, kind="stable")[:, :k]
    return np.take_along_axis(label, nearest, 1)


def _query(tree: cKDTree, points: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """The k nearest of a tree: distances (V, k), rows (V, k)."""
    return tree.query(points, k=list(range(1, k + 1)), workers=torch.get_num_threads())


def majority(labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """labels (V, k) uint8, nearest first, 255 = none -> most frequent (V,) and its share; ties: the nearest.

    A row without any label is class 0, Occ3D's "others".
    """
    present = labels != UNLABELLED
    votes = ((labels[:, :, None] == labels[:, None, :]) & present[:, None, :]).sum(2) * present  # (V, k)
    winner = np.take_along_axis(labels, votes.argmax(1)[:, None], 1)[:, 0]
    share = votes.max(1) / present.sum(1).clip(1)
    return np.where(winner == UNLABELLED, 0, winner).astype(np.uint8), share.astype(np.float32)


def seen_space(scene: Scene, i: int) -> np.ndarray:
    """(X, Y, Z) bool: voxels of keyframe i that some ray of the scene met, looked up at their centres."""
    grid, T = scene.rays.grid, scene.poses[i]
    own = zip(scene.grid.lower, scene.grid.shape, scene.grid.voxel_size, strict=True)
    axes = [low + (np.arange(n) + 0.5) * size for low, n, size in own]
    met = (scene.rays.hits > 0) | (scene.rays.passes > 0)
    at = []
    for a in range(3):  # each scene coordinate of a centre is a sum over the three axes
        parts = [axes[b] * T[a, b] for b in range(3)]
        value = parts[0][:, None, None] + parts[1][:, None] + (parts[2] + T[a, 3])
        at.append(((value - grid.lower[a]) / grid.voxel_size[a]).astype(np.int32).clip(0, grid.shape[a] - 1))
    return met[tuple(at)]  # values are >= 0, so that astype floors


# --- Poisson ------------------------------------------------------------------------------------------------


class Surface(NamedTuple):
    """A reconstructed surface."""

    points: np.ndarray  # (V, 3) float64 [m] where chi = 0 crosses the lattice of voxel centres
    density: np.ndarray  # (V,) samples near it (a blurred count of half-voxel cells)
    support: np.ndarray  # (S,) the same at the samples themselves


# --- normals ------------------------------------------------------------------------------------------------


def estimate_normals(points: np.ndarray, sensor: np.ndarray, neighbours: int = 20,
                     chunk: int = 65536) -> np.ndarray:
    """points (M, 3), sensor (M, 3) when each was seen [m] -> (M, 3) unit normals on the sensor's side.

    The direction of least spread of the nearest `neighbours` points, the point itself among them (Open3D's
    rule). On a lone LiDAR ring, where they lie on a line, that is any direction across it; leaving such
    points out was measured to cost more surface than it saves. Fewer than 3 points: facing the sensor.
    """
    if len(points) < 3:
        towards = sensor - points
        return towards / np.linalg.norm(towards, axis=1, keepdims=True).clip(1e-9)
    normals = np.empty((len(points), 3))
    tree, k = cKDTree(points), min(neighbours, len(points))
    for start in range(0, len(points), chunk):
        part = slice(start, start + chunk)
        near = points[tree.query(points[part], k=k, workers=torch.get_num_threads())[1]]  # (m, k, 3)
        near = near - near.mean(1, keepdims=True)
        normals[part] = np.linalg.eigh(near.transpose(0, 2, 1) @ near)[1][:, :, 0]  # ascending variances
    away = np.einsum("mi,mi->m", sensor - points, normals) < 0
    normals[away] *= -1
    return normals


def merge(points: np.ndarray, normals: np.ndarray, cell: float) -> tuple[np.ndarray, np.ndarray]:
    """(M, 3) twice -> (m, 3) twice: the mean point and mean direction of each occupied cell of `cell` [m]."""
    place, count = np.unique(_flat_cells(points, cell), return_inverse=True, return_counts=True)[1:]
    mean = np.stack([np.bincount(place, points[:, i]) / count for i in range(3)], 1)
    direction = np.stack([np.bincount(place, normals[:, i]) for i in range(3)], 1)
    length = np.linalg.norm(direction, axis=1)
    known = length > 0.3 * count  # opposite normals in one cell (both sides of a sheet) say nothing
    return mean[known], direction[known] / length[known, None]


# --- the system ---------------------------------------------------------------------------------------------


@lru_cache(maxsize=8)
def laplacian(shape: tuple[int, int, int]) -> sparse.csr_matrix:
    """(n, n) float32: degree on the diagonal, -1 between the six neighbours. Kept for the next cloud."""
    node = np.arange(np.prod(shape), dtype=np.int32).reshape(shape)
    low = np.concatenate([node.take(range(shape[a] - 1), a).ravel() for a in range(3)])
    high = np.concatenate([node.take(range(1, shape[a]), a).ravel() for a in range(3)])
    upper = sparse.coo_matrix((np.ones(len(low), np.float32), (low, high)), (node.size, node.size))
    neighbours = (upper + upper.T).tocsr()
    return (sparse.diags(np.asarray(neighbours.sum(1)).ravel()) - neighbours).tocsr().astype(np.float32)


def trilinear(position: np.ndarray, shape: tuple[int, int, int]) -> tuple[np.ndarray, np.ndarray]:
    """position (M, 3) in nodes -> flat node index (M, 8) int32, weight (M, 8) float32, 0 outside."""
    low = np.floor(position).astype(np.int32)
    after = (position - low).astype(np.float32)
    index, weight = np.empty((len(position), 8), np.int32), np.empty((len(position), 8), np.float32)
    for corner in range(8):
        flat, w = 0, 1
        for a in range(3):
            up = corner >> (2 - a) & 1
            i = low[:, a] + up
            w = w * np.where((i >= 0) & (i < shape[a]), after[:, a] if up else 1 - after[:, a], 0)
            flat = flat * shape[a] + i.clip(0, shape[a] - 1)
        index[:, corner], weight[:, corner] = flat, w
    return index, weight


def _splat(position: np.ndarray, value: np.ndarray, shape: tuple[int, int, int]) -> np.ndarray:
    """value (M,) spread over the eight nodes around position (M, 3) -> shape, float64."""
    index, weight = trilinear(position, shape)
    return np.bincount(index.ravel(), (weight * value[:, None]).ravel(), int(np.prod(shape))).reshape(shape)


def _blur(volume: np.ndarray) -> np.ndarray:
    """(1, 2, 1) / 4 along each axis, float32; the border repeats."""
    volume = volume.astype(np.float32)
    for a in range(3):
        volume = ndimage.correlate1d(volume, (0.25, 0.5, 0.25), a, mode="nearest")
    return volume


def _refine(volume: np.ndarray, shape: tuple[int, int, int]) -> np.ndarray:
    """Trilinear, onto a grid of half the spacing over the same box."""
    for a in range(3):
        n, m = shape[a], volume.shape[a]
        place = ((np.arange(n) + 0.5) / 2 - 0.5).clip(0, m - 1)
        low = np.floor(place).astype(int).clip(0, max(m - 2, 0))
        w = (place - low).reshape([-1 if i == a else 1 for i in range(3)])
        volume = volume.take(low, a) * (1 - w) + volume.take((low + 1).clip(0, m - 1), a) * w
    return volume


def solve(points: np.ndarray, normals: np.ndarray, lower: np.ndarray, cell: float,
          shape: tuple[int, int, int], screen: float, iterations: int,
          level: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """-> chi (X, Y, Z) float32 at the cells' centres, the blurred count of samples there. level 0: finest."""
    start = np.zeros(shape, np.float32)
    if level + 1 < LEVELS and min(shape) >= 8:
        half = tuple((n + 1) // 2 for n in shape)
        coarse = solve(*merge(points, normals, cell), lower, 2 * cell, half, screen, iterations, level + 1)[0]
        start = _refine(coarse, shape).astype(np.float32)
    place = (points - lower) / cell - 0.5  # (M, 3) in nodes
    index, weight = trilinear(place, shape)
    n = int(np.prod(shape))
    count = _blur(np.bincount(index.ravel(), weight.ravel(), n).reshape(shape))
    area = PLANE / np.maximum((count.ravel()[index] * weight).sum(1), 1e-3)  # (M,)
    right = np.zeros(shape)
    for a in range(3):
        edges = tuple(m - (i == a) for i, m in enumerate(shape))
        flux = _splat(place - 0.5 * (np.arange(3) == a), -normals[:, a] * area, edges)
        cut = [slice(None)] * 3
        cut[a] = slice(1, None)
        right[tuple(cut)] += flux
        cut[a] = slice(0, -1)
        right[tuple(cut)] -= flux
    start_of_row = np.arange(0, 8 * len(points) + 1, 8)
    phi = sparse.csr_matrix((weight.ravel(), index.ravel(), start_of_row), (len(points), n))
    phi_t, pull, L = phi.T.tocsr(), (screen * area).astype(np.float32), laplacian(tuple(shape))
    pulled = np.bincount(index.ravel(), (weight**2 * pull[:, None]).ravel(), n)
    diagonal = L.diagonal() + pulled.astype(np.float32)
    steps = iterations if level == 0 else COARSE_ITERATIONS[LEVELS - 1 - level]
    chi = _conjugate_gradients(lambda x: L @ x + phi_t @ (pull * (phi @ x)), right.ravel().astype(np.float32),
                               start.ravel(), diagonal, steps)
    return chi.reshape(shape), count


def _conjugate_gradients(system, right: np.ndarray, x: np.ndarray, diagonal: np.ndarray,
                         steps: int) -> np.ndarray:
    """`steps` steps on system(x) = right from x, preconditioned by the diagonal."""
    residual = right - system(x)
    scaled = residual / diagonal
    direction, energy = scaled.copy(), float(residual @ scaled)
    for _ in range(steps):
        if energy < 1e-12:
            break
        image = system(direction)
        step = energy / float(direction @ image)
        x = x + step * direction
        residual = residual - step * image
        scaled = residual / diagonal
        before, energy = energy, float(residual @ scaled)
        direction = scaled + (energy / before) * direction
    return x


# --- the surface --------------------------------------------------------------------------------------------


def reconstruct(points: np.ndarray, normals: np.ndarray, grid: VoxelGrid, screen: float = 4.0,
                iterations: int = 8) -> Surface:
    """points (M, 3) [m], normals (M, 3) unit, to the free side -> the surface in the grid and PAD around it.

    Voxels must be cubes. Fewer than 3 points: an empty surface.
    """
    cell = grid.voxel_size[0]
    assert np.allclose(grid.voxel_size, cell), f"voxels of {grid.voxel_size} m are no cubes"
    lower, shape = np.array(grid.lower) - PAD * cell, tuple(n + 2 * PAD for n in grid.shape)
    inside = ((points > lower) & (points < lower + cell * np.array(shape))).all(1)
    if inside.sum() < 3:
        return Surface(np.zeros((0, 3)), np.zeros(0), np.zeros(0))
    points, normals = merge(points[inside], normals[inside], cell / 2)
    chi, count = solve(points, normals, lower, cell, shape, screen, iterations)
    count = _blur(_blur(count))

    def near(place: np.ndarray) -> np.ndarray:
        index, weight = trilinear(place, shape)
        return (count.ravel()[index] * weight).sum(1)

    zero = crossings(chi)
    return Surface(lower + (zero + 0.5) * cell, near(zero), near((points - lower) / cell - 0.5))


def crossings(chi: np.ndarray) -> np.ndarray:
    """(X, Y, Z) -> (V, 3) in nodes: where chi, linear along each edge of the lattice, is zero."""
    found, flat = [], chi.ravel()
    for a in range(3):
        stride = int(np.prod(chi.shape[a + 1 :]))
        positive = chi > 0
        differ = positive.take(range(chi.shape[a] - 1), a) != positive.take(range(1, chi.shape[a]), a)
        index = np.argwhere(differ)
        first = np.ravel_multi_index(tuple(index.T), chi.shape)
        low, high = flat[first], flat[first + stride]
        place = index.astype(np.float64)
        place[:, a] += low / (low - high)
        found.append(place)
    return np.concatenate(found)


def trim(surface: Surface, share: float, part: float = 0.5) -> np.ndarray:
    """(V,) bool: vertices at least `part` as dense as all but `share` of the samples; 0: as the sparsest."""
    if len(surface.points) == 0:
        return np.zeros(0, bool)
    return surface.density >= max(part * np.quantile(surface.support, share), 1e-6)
