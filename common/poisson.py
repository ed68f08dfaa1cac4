"""Screened Poisson surface reconstruction on a voxel grid, with scipy: points with normals -> a surface that closes gaps.

    surface = reconstruct(points, estimate_normals(points, sensor), OCC3D)
    voxels, inside = OCC3D.index(torch.from_numpy(surface.points[trim(surface, 0.05)]))

    Symbol   Name      Shape    Meaning
    p, n     points    (M, 3)   samples of the surface [m] and their unit normals, which point to the free side
    a_p      area      (M,)     surface that a sample stands for [cells^2]: 1 / (samples a cell of surface)
    chi      chi       (X,Y,Z)  at the voxels' centres: +1/2 inside matter, -1/2 outside; the surface is chi = 0
    g_e      flux      edges    sum_p a_p phi_e(p) (-n_p): the jump of chi that the samples ask for along edge e
    alpha    screen    ()       how much each sample pulls the surface onto itself

    chi = argmin  sum_edges (chi_j - chi_i - g_e)^2  +  alpha sum_p a_p chi(p)^2        (Kazhdan & Hoppe 2013, eq. 3)
    that is       (L + alpha Phi^T A Phi) chi = div g

L is the grid's 7-point Laplacian (Neumann border), Phi (M, nodes) trilinear interpolation at the samples, phi_e the
trilinear hat around an edge's midpoint. Where Kazhdan refines an octree near the samples, the grid here is uniform: what
it resolves is a voxel. The system of a grid's shape is assembled once and kept; the right side and Phi are all that a
new cloud needs, and Phi^T A Phi is never formed.

Solver: conjugate gradients, Jacobi-preconditioned, from the coarsest of three grids to the finest, each starting from the
one before (cascadic multigrid). The coarse grids close the wide gaps, so few iterations are left for the finest.

Hallucination: chi = 0 is closed, so it also runs where nobody looked. `density` counts the samples around a vertex;
`trim` keeps those at least half as dense as nearly all of the samples themselves are.

Errors are measured in tests/test_poisson.py on a sphere, a plane, a box, with noise and with holes. No gradients.
"""

from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from scipy import ndimage, sparse
from scipy.spatial import cKDTree

from common.files import InputError
from common.geometry import VoxelGrid

PAD = 2  # voxels around the grid, so that its border is not the solver's
LEVELS, COARSE_ITERATIONS = 3, (60, 20)  # grids of the cascade; iterations on all but the finest, coarsest first
PLANE = 0.44  # interpolated blurred count of a plane of one sample a cell: 3/8 to 1/2, by where it cuts the cells


class Surface(NamedTuple):
    """A reconstructed surface."""

    points: np.ndarray  # (V, 3) float64 [m] where chi = 0 crosses the lattice of voxel centres
    density: np.ndarray  # (V,) samples near it (a blurred count of half-voxel cells)
    support: np.ndarray  # (S,) the same at the samples themselves


# --- normals ---------------------------------------------------------------------------------------------------------


def estimate_normals(points: np.ndarray, sensor: np.ndarray, neighbours: int = 20, chunk: int = 65536) -> np.ndarray:
    """points (M, 3), sensor (M, 3) where each was seen from [m] -> (M, 3) unit normals, towards the sensor's side.

    The direction of least spread of the nearest `neighbours` points, the point itself among them (Open3D's rule). On a
    lone LiDAR ring, where they lie on a line, that is any direction across it; leaving such points out was measured to
    cost more surface than it saves. Fewer than 3 points: facing the sensor.
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
    """(M, 3) twice -> (m, 3) twice: one sample per occupied cell of `cell` [m], its points' mean and mean direction."""
    index = np.floor(points / cell).astype(np.int64)
    index -= index.min(0)
    span = index.max(0) + 1
    flat = (index[:, 0] * span[1] + index[:, 1]) * span[2] + index[:, 2]
    place, count = np.unique(flat, return_inverse=True, return_counts=True)[1:]
    mean = np.stack([np.bincount(place, points[:, i]) / count for i in range(3)], 1)
    direction = np.stack([np.bincount(place, normals[:, i]) for i in range(3)], 1)
    length = np.linalg.norm(direction, axis=1)
    known = length > 0.3 * count  # opposite normals in one cell (both sides of a sheet) say nothing
    return mean[known], direction[known] / length[known, None]


# --- the system ------------------------------------------------------------------------------------------------------


@lru_cache(maxsize=8)
def laplacian(shape: tuple[int, int, int]) -> sparse.csr_matrix:
    """(n, n) float32: degree on the diagonal, -1 between the six neighbours. Kept: every cloud on this shape needs it."""
    node = np.arange(np.prod(shape), dtype=np.int32).reshape(shape)
    low = np.concatenate([node.take(range(shape[a] - 1), a).ravel() for a in range(3)])
    high = np.concatenate([node.take(range(1, shape[a]), a).ravel() for a in range(3)])
    upper = sparse.coo_matrix((np.ones(len(low), np.float32), (low, high)), (node.size, node.size))
    neighbours = (upper + upper.T).tocsr()
    return (sparse.diags(np.asarray(neighbours.sum(1)).ravel()) - neighbours).tocsr().astype(np.float32)


def trilinear(position: np.ndarray, shape: tuple[int, int, int]) -> tuple[np.ndarray, np.ndarray]:
    """position (M, 3) in nodes -> flat node index (M, 8) int32, weight (M, 8) float32; 0 where a corner is outside."""
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


def solve(points: np.ndarray, normals: np.ndarray, lower: np.ndarray, cell: float, shape: tuple[int, int, int],
          screen: float, iterations: int, level: int = 0) -> tuple[np.ndarray, np.ndarray]:  # fmt: skip
    """-> chi (X, Y, Z) float32 at the centres of the cells, and the samples' count there (blurred). level 0: finest."""
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
    phi = sparse.csr_matrix((weight.ravel(), index.ravel(), np.arange(0, 8 * len(points) + 1, 8)), (len(points), n))
    phi_t, pull, L = phi.T.tocsr(), (screen * area).astype(np.float32), laplacian(tuple(shape))
    diagonal = L.diagonal() + np.bincount(index.ravel(), (weight**2 * pull[:, None]).ravel(), n).astype(np.float32)
    steps = iterations if level == 0 else COARSE_ITERATIONS[LEVELS - 1 - level]
    chi = _conjugate_gradients(lambda x: L @ x + phi_t @ (pull * (phi @ x)), right.ravel().astype(np.float32), start.ravel(),
                               diagonal, steps)  # fmt: skip
    return chi.reshape(shape), count


def _conjugate_gradients(system, right: np.ndarray, x: np.ndarray, diagonal: np.ndarray, steps: int) -> np.ndarray:
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


# --- the surface -----------------------------------------------------------------------------------------------------


def reconstruct(points: np.ndarray, normals: np.ndarray, grid: VoxelGrid, screen: float = 4.0, iterations: int = 8) -> Surface:
    """points (M, 3) [m], normals (M, 3) unit, to the free side -> the surface in the grid (and 2 voxels around it).

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
    """(V,) bool: vertices at least `part` as dense as all but `share` of the samples are; share 0: as the sparsest."""
    if len(surface.points) == 0:
        return np.zeros(0, bool)
    return surface.density >= max(part * np.quantile(surface.support, share), 1e-6)


def open3d_surface(points: np.ndarray, normals: np.ndarray, depth: int = 10) -> Surface:
    """Open3D's Poisson mesh of points (M, 3) [m] with unit normals (M, 3), on an octree of `depth`, for comparison; support
    = the vertices' own density, so that `trim(surface, 0.1, 1.0)` drops the 0.1 quantile of the vertices, as SurroundOcc
    does. InputError without Open3D."""
    try:
        import open3d as o3d
    except (ImportError, OSError) as error:
        raise InputError(f"Open3D cannot be imported ({str(error).splitlines()[0]}): pip install open3d-cpu, and its "
                         "system library libusb-1.0; or use the grid's own Poisson step") from error  # fmt: skip
    cloud = o3d.geometry.PointCloud(o3d.utility.Vector3dVector(points))
    cloud.normals = o3d.utility.Vector3dVector(normals)
    mesh, density = o3d.geometry.TriangleMesh.create_from_point_cloud_poisson(cloud, depth=depth)
    density = np.asarray(density)
    return Surface(np.asarray(mesh.vertices), density, density)
