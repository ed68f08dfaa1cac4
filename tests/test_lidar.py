"""SurroundOcc's recipe by hand and on a toy street; the Poisson step on spheres, planes, boxes, and its
parts.
"""

import math

import numpy as np
import pytest
import torch
from scipy.spatial import cKDTree
from scipy.spatial.transform import Rotation

import common.lidar as P
from common.geometry import OCC3D, VoxelGrid, traversed
from loc import Config, densify

VOXEL = 0.4
GRID = VoxelGrid((-9.6, -9.6, -9.6), (9.6, 9.6, 9.6), (48, 48, 48))


def sphere(radius: float, count: int = 12000, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    normals = np.random.default_rng(seed).normal(size=(count, 3))
    normals /= np.linalg.norm(normals, axis=1, keepdims=True)
    return radius * normals, normals


def box(half: tuple[float, float, float], spacing: float = 0.15) -> tuple[np.ndarray, np.ndarray]:
    points, normals = [], []
    for a in range(3):
        b, c = (k for k in range(3) if k != a)
        u, v = (np.arange(-half[k] + spacing / 2, half[k], spacing) for k in (b, c))
        for sign in (-1, 1):
            face = np.zeros((len(u) * len(v), 3))
            face[:, a] = sign * half[a]
            face[:, b], face[:, c] = (m.ravel() for m in np.meshgrid(u, v, indexing="ij"))
            normal = np.zeros_like(face)
            normal[:, a] = sign
            points.append(face)
            normals.append(normal)
    return np.concatenate(points), np.concatenate(normals)


def to_box(points: np.ndarray, half) -> np.ndarray:
    """Signed distance of points to the surface of a box."""
    q = np.abs(points) - half
    return np.linalg.norm(q.clip(0), axis=1) + q.max(1).clip(max=0)


# --- as a surface -------------------------------------------------------------------------------------------


def test_sphere_within_a_tenth_of_a_voxel_and_closed():
    points, normals = sphere(7.0)
    surface = P.reconstruct(points, normals, GRID)
    error = (np.linalg.norm(surface.points, axis=1) - 7.0) / VOXEL
    assert abs(error.mean()) < 0.02 and error.std() < 0.06 and np.abs(error).max() < 0.25
    far = cKDTree(surface.points).query(sphere(7.0, 4000, seed=1)[0])[0]
    assert far.max() < VOXEL  # no hole: crossings are at most a voxel's edge apart


@pytest.mark.parametrize("normal", [(0, 0, 1), (0.3, -0.2, 0.93), (1, 1, 1)])
def test_plane_within_a_tenth_of_a_voxel(normal):
    n = np.array(normal) / np.linalg.norm(normal)
    rng = np.random.default_rng(0)
    points = rng.uniform(-9, 9, (20000, 3))
    points -= np.outer(points @ n - 0.13, n)  # at distance 0.13 m from the origin: on no node
    surface = P.reconstruct(points, np.broadcast_to(n, points.shape), GRID)
    kept = surface.points[P.trim(surface, 0.05)]
    inner = kept[np.abs(kept).max(1) < 8]
    error = (inner @ n - 0.13) / VOXEL
    assert len(inner) > 1000 and abs(error.mean()) < 0.05 and error.std() < 0.1


def test_box_faces_are_right_and_edges_round_off_by_less_than_half_a_voxel():
    half = np.array([6.1, 4.3, 2.5])
    surface = P.reconstruct(*box(half), GRID)
    error = to_box(surface.points, half) / VOXEL
    flat = np.sort(np.abs(np.abs(surface.points) - half), axis=1)[:, 1] > 2 * VOXEL  # away from edges
    assert np.abs(error[flat]).max() < 0.15 and np.abs(error).max() < 0.5


def test_noise_is_averaged_out():
    points, normals = sphere(7.0)
    rng = np.random.default_rng(2)
    noisy = points + rng.normal(size=points.shape) * 0.3 * VOXEL
    surface = P.reconstruct(noisy, normals, GRID)
    error = (np.linalg.norm(surface.points, axis=1) - 7.0) / VOXEL
    assert abs(error.mean()) < 0.06 and error.std() < 0.25  # a third of a voxel of noise went in
    rough = P.estimate_normals(noisy, np.zeros_like(noisy) + 100 * normals)
    error = (np.linalg.norm(P.reconstruct(noisy, rough, GRID).points, axis=1) - 7.0) / VOXEL
    assert abs(error.mean()) < 0.08 and error.std() < 0.3


def test_small_holes_close_and_large_ones_are_trimmed():
    points, normals = sphere(7.0)
    up = np.array([0, 0, 1.0])
    for radius, closed in ((1.5 * VOXEL, True), (9 * VOXEL, False)):
        hole = np.linalg.norm(points - 7.0 * up, axis=1) < radius
        surface = P.reconstruct(points[~hole], normals[~hole], GRID)
        near = np.linalg.norm(surface.points[:, :2], axis=1) < 0.5 * radius
        over = near & (surface.points[:, 2] > 0)
        assert over.any()  # chi = 0 is closed in any case
        if closed:
            error = (np.linalg.norm(surface.points[over], axis=1) - 7.0) / VOXEL
            assert np.abs(error).max() < 0.3
        assert P.trim(surface, 0.05)[over].all() == closed
        middle = np.linalg.norm(surface.points - 7.0 * up, axis=1) < 5 * VOXEL
        assert closed or not P.trim(surface, 0.05)[middle].any()


def test_trimming_drops_what_runs_on_where_nobody_looked():
    """Samples of half a plane."""
    rng = np.random.default_rng(0)
    points = np.column_stack([rng.uniform(-9, 0, 8000), rng.uniform(-9, 9, 8000), np.zeros(8000)])
    surface = P.reconstruct(points, np.broadcast_to([0, 0, 1.0], points.shape), GRID)
    kept = surface.points[P.trim(surface, 0.05)]
    assert surface.points[:, 0].max() > 5 and kept[:, 0].max() < 2.5 * VOXEL
    assert len(kept) < len(surface.points) and P.trim(surface, 0.3, 1.0).sum() < P.trim(surface, 0.05).sum()


# --- its parts ----------------------------------------------------------------------------------------------


def test_normals_are_unit_and_face_the_sensor():
    rng = np.random.default_rng(0)
    points = np.column_stack([rng.uniform(-3, 3, (500, 2)), rng.normal(size=500) * 0.001])
    for height in (2.0, -2.0):
        normals = P.estimate_normals(points, np.broadcast_to([0, 0, height], points.shape), chunk=64)
        assert np.allclose(np.linalg.norm(normals, axis=1), 1)
        assert (normals[:, 2] * height > 0).all() and np.abs(normals[:, 2]).min() > 0.99
    assert np.allclose(P.estimate_normals(np.zeros((2, 3)), np.array([[0, 0, 3.0]] * 2)), [[0, 0, 1]] * 2)


def test_merge_by_hand():
    points = np.array([[0.1, 0.1, 0.1], [0.3, 0.1, 0.1], [0.9, 0.1, 0.1], [0.9, 0.2, 0.1]])
    normals = np.array([[0, 0, 1.0], [0, 1.0, 0], [0, 0, 1.0], [0, 0, -1.0]])
    mean, direction = P.merge(points, normals, 0.5)
    assert np.allclose(mean, [[0.2, 0.1, 0.1]])  # the second cell holds two opposite normals: it says nothing
    assert np.allclose(direction, [[0, 0.5**0.5, 0.5**0.5]])


def test_solve_equals_the_dense_normal_equations():
    rng = np.random.default_rng(0)
    shape, n = (6, 6, 6), 216
    normals = rng.normal(size=(40, 3))
    normals /= np.linalg.norm(normals, axis=1, keepdims=True)
    points = 0.5 * normals * 2.0 + 1.5
    chi, _ = P.solve(points, normals, np.zeros(3), 0.5, shape, 4.0, iterations=400)
    index, weight = P.trilinear(points / 0.5 - 0.5, shape)
    phi = np.zeros((40, n))
    np.add.at(phi, (np.arange(40)[:, None], index), weight)
    count = P._blur(phi.sum(0).reshape(shape))
    area = P.PLANE / np.maximum((count.ravel()[index] * weight).sum(1), 1e-3)
    A = P.laplacian(shape).toarray() + phi.T @ (4.0 * area[:, None] * phi)
    right, nodes = np.zeros(n), np.arange(n).reshape(shape)
    for a in range(3):
        for k in range(5):
            low, high = nodes.take(k, a).ravel(), nodes.take(k + 1, a).ravel()
            at = [np.array(np.unravel_index(low, shape)).T[:, i] + (0.5 if i == a else 0) for i in range(3)]
            place = np.stack(at, 1) - (points / 0.5 - 0.5)[:, None]  # (40, edges, 3)
            hat = (1 - np.abs(place)).clip(0).prod(2)
            jump = -(normals[:, a] * area) @ hat
            right[high] += jump
            right[low] -= jump
    assert np.allclose(chi.ravel(), np.linalg.solve(A, right), atol=2e-3)


def test_crossings_are_exact_on_a_linear_field():
    x, y, z = np.meshgrid(*[np.arange(4.0)] * 3, indexing="ij")
    zero = P.crossings((x + 0.5 * y - 1.3).astype(np.float64))
    assert np.allclose(zero[:, 0] + 0.5 * zero[:, 1], 1.3)
    assert len(zero) == 4 * (3 + 2)  # a layer: 3 edges along x (y = 0, 1, 2), 2 along y (x = 0, x = 1)


def test_order_of_points_changes_nothing_and_a_shift_shifts():
    points, normals = sphere(5.0, 3000)
    surface = P.reconstruct(points, normals, GRID)
    order = np.random.default_rng(1).permutation(len(points))
    again = P.reconstruct(points[order], normals[order], GRID)
    assert np.allclose(surface.points, again.points, atol=1e-3)
    moved = P.reconstruct(points + [2 * VOXEL, 0, 0], normals, GRID)
    assert len(moved.points) == len(surface.points)
    apart = cKDTree(moved.points).query(surface.points + [2 * VOXEL, 0, 0])[0]
    assert apart.max() < 0.15 * VOXEL  # the coarse grids differ


def test_too_few_points_make_an_empty_surface():
    empty = P.reconstruct(np.zeros((2, 3)), np.array([[0, 0, 1.0]] * 2), GRID)
    assert empty.points.shape == (0, 3) and P.trim(empty, 0.1).shape == (0,)


# --- the recipe ---------------------------------------------------------------------------------------------


def boxes(time: int, x: float, yaw: float, instance: int = 7, label: int = 4) -> P.Track:
    T = np.eye(4)[None].copy()
    T[0, :3, :3], T[0, 0, 3] = Rotation.from_euler("z", yaw).as_matrix(), x
    return P.Track(time, T, np.array([[2.0, 4.0, 1.5]]), np.array([instance]), np.array([label], np.uint8))


def test_boxes_between_keyframes_move_halfway():
    tracks = [boxes(0, 1.0, 0.2), boxes(100, 3.0, 0.6)]
    middle = P.boxes_at(tracks, 50)
    assert np.allclose(middle.T_scene_box[0, :3, 3], [2, 0, 0])
    assert np.allclose(Rotation.from_matrix(middle.T_scene_box[0, :3, :3]).as_euler("zyx")[0], 0.4)
    assert np.allclose(P.boxes_at(tracks, 100).T_scene_box, tracks[1].T_scene_box)
    new = [boxes(0, 1.0, 0.2), boxes(100, 3.0, 0.6, instance=8)]
    assert np.allclose(P.boxes_at(new, 50).T_scene_box, new[1].T_scene_box)  # not there before: as afterwards


def test_in_boxes_scales_and_drops_as_surroundocc():
    """Length 4, width 2, height 1.5: 1.1 times larger is 2.2 along x, 1.1 along y, and z from -.85 to .8."""
    points = np.array([[2.15, 0, 0], [2.25, 0, 0], [0, 1.05, 0], [0, 1.15, 0], [0, 0, -0.84], [0, 0, -0.86],
                       [0, 0, 0.79], [0, 0, 0.81]])
    assert (P.in_boxes(points, boxes(0, 0.0, 0.0)) >= 0).tolist() == [True, False] * 4
    turned = P.in_boxes(points[:, [1, 0, 2]], boxes(0, 0.0, math.pi / 2))
    assert (turned >= 0).tolist() == [True, False] * 4


def test_majority_and_its_ties():
    labels = np.array([[4, 5, 5, 3], [3, 2, 2, 3], [4, 255, 255, 255], [255, 255, 255, 255]], np.uint8)
    winner, share = P.majority(labels)
    assert winner.tolist() == [5, 3, 4, 0] and share.tolist() == [0.5, 0.5, 1.0, 0.0]


def test_thin_keeps_one_point_a_cell():
    points = np.array([[0.05, 0, 0], [0.09, 0, 0], [0.15, 0, 0], [-0.05, 0, 0]])
    assert sorted(P.thin(points, 0.1).tolist()) == [0, 2, 3] and len(P.thin(points, 0)) == 4


def camera(yaw: float = 0.0) -> tuple[np.ndarray, np.ndarray]:
    """K of a 100 x 60 image, and a camera in the ego's origin that looks along x, turned by yaw about z."""
    K, T = np.array([[50.0, 0, 50], [0, 50, 30], [0, 0, 1]]), np.eye(4)
    T[:3, :3] = Rotation.from_euler("z", yaw).as_matrix() @ np.array([[0.0, 0, 1], [-1, 0, 0], [0, -1, 0]])
    return K, T


def test_points_take_the_label_of_the_pixel_that_shows_them():
    K, T = camera()
    semantic = np.full((1, 60, 100), 17, np.uint8)
    semantic[0, 30, 60] = 4
    points = np.array([[10, -2.1, -0.1], [10, 2.1, -0.1], [-10, 0, 0]])  # u = 60.5, v = 30.5; sky; behind
    for maps in (semantic, semantic[:, ::2, ::2]):  # of the image's size, of half of it
        assert P.project_labels(points, maps, K[None], T[None], (60, 100), 0.0).tolist() == [4, 255, 255]


def test_of_two_cameras_the_one_nearer_its_centre_counts_and_hidden_points_have_none():
    K, T = (np.stack(x) for x in zip(camera(0.0), camera(0.6)))
    point = np.array([[10 * math.cos(0.5), 10 * math.sin(0.5), 0.0]])
    assert P.best_pixels(point, K, T, (60, 100), (60, 100), 0.0)[0].tolist() == [1]
    two = np.array([[10.0, 0.01, 0.0], [20.0, 0.02, 0.0]])  # one behind the other
    assert P.best_pixels(two, K[:1], T[:1], (60, 100), (60, 100), 0.25)[0].tolist() == [0, -1]
    assert P.best_pixels(two, K[:1], T[:1], (60, 100), (60, 100), 0.0)[0].tolist() == [0, 0]


def street(x_car: float, label: int = 4) -> tuple[np.ndarray, np.ndarray]:
    """Points on level ground at z = 0, a wall at y = 11.7 and the side of a car-sized block at x_car, y =
    5.2."""
    gx, gy = np.meshgrid(np.arange(-20, 20, 0.3), np.arange(-12, 12, 0.3), indexing="ij")
    ground = np.stack([gx.ravel(), gy.ravel(), np.zeros(gx.size)], 1)
    bx, bz = np.meshgrid(np.arange(-2, 2, 0.2), np.arange(0.25, 1.8, 0.2), indexing="ij")
    side = np.stack([x_car + bx.ravel(), np.full(bx.size, 5.2), bz.ravel()], 1)
    wx, wz = np.meshgrid(np.arange(-25, 25, 0.25), np.arange(0.3, 3, 0.15), indexing="ij")
    wall = np.stack([wx.ravel(), np.full(wx.size, 11.7), wz.ravel()], 1)
    labels = np.repeat([11, 15, label], [len(ground), len(wall), len(side)]).astype(np.uint8)
    return np.concatenate([ground, wall, side]), labels


def drive(positions: list[float], tracked: bool = False, by_rays: bool = False) -> P.Sweeps:
    """Sweeps of a still sensor while a block moves along x; every sweep is a keyframe."""
    scans, poses, tracks = [], {}, {}
    for k, x in enumerate(positions):
        points, labels = street(x)
        scans.append(P.Scan(points, labels, np.zeros(len(points), bool), np.array([0, 0, 1.84]), 100 * k, k))
        poses[k], track = np.eye(4), boxes(100 * k, x, 0.0)
        track.T_scene_box[0, 1:3, 3] = 5.9, 0.95
        tracks[k] = track._replace(size=np.array([[1.8, 4.2, 1.6]]))
    return P.Sweeps(scans, poses, tracks if tracked else None, OCC3D, 17, by_rays)


def cars(label: dict[str, np.ndarray]) -> np.ndarray:
    """x [m] of the voxels that are called car."""
    return OCC3D.centers()[..., 0].numpy()[label["semantics"] == 4]


def test_with_boxes_a_mover_is_where_it_is_now_and_nowhere_else():
    sweeps = drive([-9.0, -3.0, 3.0, 9.0], tracked=True)
    scene = P.fuse(sweeps)
    assert len(scene.objects[7].points) == sum((s.labels == 4).sum() for s in sweeps.scans)
    for k, x in enumerate([-9.0, -3.0, 3.0, 9.0]):
        found = cars(densify(scene, k, Config()))
        assert len(found) > 30 and np.abs(found - x).max() < 2.7


def test_without_boxes_rays_decide_what_moves_and_what_is_parked():
    naive = P.fuse(drive([-9.0, -3.0, 3.0, 9.0]))
    assert np.ptp(cars(densify(naive, 1, Config()))) > 15  # a trail of ghosts
    moving = P.fuse(drive([-9.0, -3.0, 3.0, 9.0], by_rays=True))
    found = cars(densify(moving, 1, Config()))
    assert len(found) > 20 and np.abs(found + 3.0).max() < 2.7
    sweeps = drive([3.0] * 4, by_rays=True)
    parked = P.fuse(sweeps)
    assert len(parked.loose[1].points) == 0 and len(cars(densify(parked, 1, Config()))) > 30
    flags = P.suspects(sweeps.scans, P.cast_scans(sweeps.scans, sweeps.poses, OCC3D))
    assert not any(flag[scan.labels == 11].any() for flag, scan in zip(flags, sweeps.scans))  # the ground


def test_free_space_is_what_rays_crossed():
    sweeps = drive([3.0])
    scene = P.fuse(sweeps)
    origin, end = torch.tensor([0, 0, 1.84], dtype=torch.float64), torch.from_numpy(sweeps.scans[0].points)
    seen, exact = P.seen_space(scene, 0), traversed(origin, end, OCC3D).numpy()
    assert (seen != exact).mean() < 5e-4 and exact.mean() > 0.01  # but for ties: the grids coincide here
    assert (scene.rays.hits <= 1).all() and not (scene.rays.hits & scene.rays.passes).any()


def test_poisson_fills_a_gap_in_the_ground_and_the_nearest_points_name_it():
    sweeps = drive([3.0])
    scan, points = sweeps.scans[0], sweeps.scans[0].points
    gap = (np.abs(points[:, 0] + 8) < 0.5) & (np.abs(points[:, 1]) < 8)
    holed = scan._replace(points=points[~gap], labels=scan.labels[~gap], moving=scan.moving[~gap])
    bare, filled = (densify(P.fuse(sweeps._replace(scans=[holed]), surfaces=on), 0, Config(poisson=on))
                    for on in (False, True))
    x, y = OCC3D.centers()[..., 0].numpy(), OCC3D.centers()[..., 1].numpy()
    where = (np.abs(x + 8) < 0.25) & (np.abs(y) < 7)
    assert (bare["semantics"][where] != 17).sum() == 0 and (filled["semantics"][where] == 11).sum() > 20
    occupied = filled["semantics"] != 17
    assert (filled["mask_lidar"] <= occupied).all() and (filled["mask_camera"] >= occupied).all()


def test_movers_are_asked_only_from_where_they_can_be_among_the_k_nearest():
    """The names equal those of one tree that holds all points."""
    scene = P.fuse(drive([-9.0, -3.0, 3.0, 9.0], tracked=True))
    now = P.at_keyframe(scene, 1)
    rng = np.random.default_rng(0)
    index = np.unique(rng.integers(0, OCC3D.shape, (20000, 3)), axis=0)
    near = np.argwhere(P.occupy(now.points, OCC3D))
    centers = np.asarray(OCC3D.lower) + (np.concatenate([index, near]) + 0.5) * 0.4
    points = np.concatenate([P.move(now.T_ego_scene, scene.tree.data), now.movers.points])
    labels = np.concatenate([scene.tree_labels, now.movers.labels])
    ours = P.nearest_points(scene, now, centers, 5)
    rows = cKDTree(points).query(centers, k=6)
    clear = np.diff(rows[0], axis=1).min(1) > 1e-9  # no ties
    assert clear.sum() > 5000 and (ours == 4).any()
    assert np.array_equal(ours[clear], labels[rows[1][clear, :5]])
