"""common/geometry.py: hand-computed numbers, invariants, slow exact oracles, the reference vectors."""

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from scipy.spatial import cKDTree
from torch.autograd import gradcheck
from vectors import load

from common import geometry
from common.geometry import (OCC3D, SEMANTICKITTI, VoxelGrid, cast_rays, farthest_point_sample, hilbert_code,
                             hilbert_order, invert, knn, linear, pixel_centers, project, rope, rope_3d,
                             scale_intrinsics, transform, traversed, unproject, z_code)
from common.nuscenes import pose_matrix
from data.driving.sensors import quaternion

CAMERAS = ("CAM_FRONT", "CAM_FRONT_RIGHT", "CAM_BACK_RIGHT", "CAM_BACK", "CAM_BACK_LEFT", "CAM_FRONT_LEFT")
T = torch.from_numpy


pytestmark = pytest.mark.usefixtures("one_thread")


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def cells(*shape: int) -> torch.Tensor:
    return torch.stack(torch.meshgrid(*(torch.arange(n) for n in shape), indexing="ij"), -1).flatten(0, -2)


def random_pose(seed: int, *batch: int) -> torch.Tensor:
    return T(pose_matrix(torch.randn(*batch, 7, generator=generator(seed), dtype=torch.float64).numpy()))


# --- voxel grids ------------------------------------------------------------------------------------------------------

def test_the_two_grids_have_the_datasets_boxes_and_voxels():
    assert OCC3D.shape == (200, 200, 16) and OCC3D.voxel_size == pytest.approx((0.4, 0.4, 0.4), abs=1e-15)
    assert SEMANTICKITTI.shape == (256, 256, 32) and SEMANTICKITTI.voxel_size == pytest.approx((0.2, 0.2, 0.2))
    centers = OCC3D.centers(dtype=torch.float64)
    assert centers.shape == (200, 200, 16, 3)
    torch.testing.assert_close(centers[0, 0, 0], torch.tensor([-39.8, -39.8, -0.8], dtype=torch.float64))
    torch.testing.assert_close(centers[199, 0, 15], torch.tensor([39.8, -39.8, 5.2], dtype=torch.float64))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_every_voxel_centre_indexes_its_own_voxel(dtype):
    grid = SEMANTICKITTI.coarsen((4, 4, 4))
    index, inside = grid.index(grid.centers(dtype=dtype))
    axes = torch.meshgrid(*(torch.arange(n) for n in grid.shape), indexing="ij")
    assert grid.shape == (64, 64, 8) and inside.all() and torch.equal(index, torch.stack(axes, -1))


def test_voxels_are_half_open_and_outside_points_keep_their_floor():
    grid = VoxelGrid((0.0, 0.0, 0.0), (4.0, 4.0, 4.0), (4, 4, 4))
    points = torch.tensor([[1.0, 0.0, 3.9], [-0.1, 2.0, 2.0], [4.0, 1.0, 1.0], [3.0, 3.0, 0.0]])
    index, inside = grid.index(points)
    assert index.tolist() == [[1, 0, 3], [-1, 2, 2], [4, 1, 1], [3, 3, 0]]
    assert inside.tolist() == [True, False, False, True]


def test_a_grid_that_does_not_divide_says_so():
    with pytest.raises(ValueError, match="cannot be coarsened"):
        OCC3D.coarsen((3, 2, 2))


# --- frames and cameras -----------------------------------------------------------------------------------------------

def test_projection_by_hand():
    K = torch.tensor([[500.0, 0.0, 320.0], [0.0, 400.0, 240.0], [0.0, 0.0, 1.0]], dtype=torch.float64)
    T_cam_ref = torch.tensor([[0, -1, 0, 0], [0, 0, -1, 1.5], [1, 0, 0, -2], [0, 0, 0, 1]], dtype=torch.float64)
    # 12 m ahead of the reference, 1 m to the left, 0.5 m up: 10 m ahead of a camera 2 m forward and 1.5 m up
    uv, depth = project(torch.tensor([12.0, 1.0, 0.5], dtype=torch.float64), K, T_cam_ref)
    assert depth.item() == 10.0
    assert uv.tolist() == [320 + 500 * -1 / 10, 240 + 400 * 1 / 10]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_transposed_product_of_points_is_the_product(dtype):
    A, points = (torch.randn(n, 3, generator=generator(), dtype=dtype) for n in (3, 10_000))
    assert torch.equal(linear(A, points), points @ A.mT)
    assert torch.equal(linear(A.expand(2, 3, 3), points), points @ A.mT.expand(2, 3, 3))


def test_unproject_undoes_project():
    g = generator()
    K = torch.tensor([[520.0, 3.0, 400.0], [0.0, 510.0, 220.0], [0.0, 0.0, 1.0]], dtype=torch.float64)
    T_cam_ref = random_pose(1)
    camera = torch.rand(50, 3, generator=g, dtype=torch.float64) * 20 + torch.tensor([-10.0, -10.0, 0.5])
    points = transform(invert(T_cam_ref), camera)
    uv, depth = project(points, K, T_cam_ref)
    torch.testing.assert_close(depth, camera[:, 2], atol=1e-12, rtol=0)
    torch.testing.assert_close(unproject(uv, depth, K, invert(T_cam_ref)), points, atol=1e-11, rtol=0)
    again, _ = project(unproject(uv, depth, K, invert(T_cam_ref)), K, T_cam_ref)
    torch.testing.assert_close(again, uv, atol=1e-9, rtol=0)


def test_a_batch_of_cameras_equals_one_at_a_time():
    g = generator(2)
    points = torch.randn(7, 3, generator=g, dtype=torch.float64)
    K = torch.stack([torch.diag(torch.tensor([f, f + 10, 1.0], dtype=torch.float64)) for f in (300, 310, 320, 330)])
    poses = random_pose(3, 4)
    uv, depth = project(points, K, poses)
    assert uv.shape == (4, 7, 2) and depth.shape == (4, 7)
    for n in range(4):
        one = project(points, K[n], poses[n])
        torch.testing.assert_close((uv[n], depth[n]), one, atol=1e-9, rtol=1e-12)
    back = unproject(uv, depth, K, invert(poses))
    torch.testing.assert_close(back, points.expand(4, 7, 3), atol=1e-10, rtol=0)


def test_projection_has_exact_gradients_and_none_explodes_on_the_camera_plane():
    K = torch.tensor([[50.0, 0.0, 32.0], [0.0, 50.0, 24.0], [0.0, 0.0, 1.0]], dtype=torch.float64)
    points = torch.tensor([[0.3, 0.2, 2.0], [-1.0, 0.4, 5.0]], dtype=torch.float64, requires_grad=True)
    assert gradcheck(lambda p: project(p, K, random_pose(4)), points)
    assert gradcheck(lambda z: unproject(pixel_centers(1, 2, torch.float64)[0], z, K, random_pose(4)),
                     torch.tensor([2.0, 3.0], dtype=torch.float64, requires_grad=True))
    plane = torch.tensor([[0.5, 0.5, 0.0], [0.0, 0.0, 3.0]], dtype=torch.float64, requires_grad=True)
    uv, depth = project(plane, K, torch.eye(4, dtype=torch.float64))
    torch.where(depth[:, None] > 0.1, uv, 0.0).sum().backward()
    assert torch.isfinite(uv).all() and torch.isfinite(plane.grad).all() and plane.grad[0].abs().max() == 0


def test_pixel_centres_and_resizing_agree():
    centers = pixel_centers(3, 5)
    assert centers.shape == (3, 5, 2) and centers[2, 4].tolist() == [4.5, 2.5]
    K = torch.tensor([[100.0, 0.0, 40.0], [0.0, 90.0, 30.0], [0.0, 0.0, 1.0]], dtype=torch.float64)
    point, eye = torch.tensor([0.3, -0.2, 2.0], dtype=torch.float64), torch.eye(4, dtype=torch.float64)
    uv, _ = project(point, K, eye)
    half, _ = project(point, scale_intrinsics(K, 0.5, 0.25), eye)      # corners at (0, 0): coordinates simply scale
    torch.testing.assert_close(half, uv * torch.tensor([0.5, 0.25], dtype=torch.float64))


def test_rigid_inverse_and_mixed_dtypes():
    poses = random_pose(5, 3)
    identity = torch.eye(4, dtype=torch.float64).expand(3, 4, 4)
    torch.testing.assert_close(invert(poses) @ poses, identity, atol=1e-14, rtol=0)
    assert transform(poses[0], torch.zeros(2, 3)).dtype == torch.float64
    assert transform(poses[0], torch.zeros(0, 3)).shape == (0, 3)


def test_quaternions_by_hand_and_back():
    """The reader's pose_matrix and the world's quaternion, which is its inverse with w >= 0."""
    half = math.sqrt(0.5)
    quarter = pose_matrix(np.array([1.0, 2.0, 3.0, half, 0.0, 0.0, half]))       # a quarter turn about z: x becomes y
    np.testing.assert_allclose(quarter @ [1, 0, 0, 1], [1, 3, 3, 1], atol=1e-15)
    q = np.random.default_rng(6).normal(size=(500, 4))
    q = np.concatenate([q, np.eye(4), [[1e-9, 0.6, 0.0, 0.8]]])
    poses = pose_matrix(np.concatenate([np.zeros((len(q), 3)), q], 1))
    back = np.array([quaternion(R[:3, :3]) for R in poses])
    assert (back[:, 0] >= 0).all()
    assert np.abs(np.abs((back * q).sum(1)) / np.linalg.norm(q, axis=1) - 1).max() < 1e-14
    np.testing.assert_allclose(pose_matrix(np.concatenate([np.zeros((len(q), 3)), 3 * q], 1)), poses, atol=1e-15)


def test_vectors_quaternions_and_poses():
    v = load("nuscenes_geometry")
    rotation = pose_matrix(np.concatenate([np.zeros((len(v["quat_wxyz"]), 3)), v["quat_wxyz"]], 1))[:, :3, :3]
    v.close("quat_rotmat", rotation, atol=1e-6)
    v.close("quat_yaw", np.arctan2(rotation[:, 1, 0], rotation[:, 0, 0]), atol=1e-6)
    v.close("quat_back_wxyz_posw", np.array([quaternion(R) for R in rotation]), atol=1e-6)
    forward = v["tm_fwd"]
    turns = [quaternion(R) for R in forward[:, :3, :3]]
    v.close("tm_fwd", pose_matrix(np.concatenate([forward[:, :3, 3], turns], 1)), atol=1e-6)
    v.close("tm_inv", invert(T(forward)), atol=1e-6)


def test_vectors_real_projection():
    v = load("nuscenes_geometry")
    points = T(v["points_lidar"])
    T_ego_lidar, T_global_ego = T(v["lidar2ego"]), T(v["ego2global"])
    v.close("points_ego", transform(T_ego_lidar, points), atol=1e-6)
    v.close("points_global", transform(T_global_ego @ T_ego_lidar, points), atol=1e-6)
    width, height = v["image_wh"]
    for camera in CAMERAS:
        K = T(v[f"{camera}_cam2img"])
        uv, depth = project(points, K, T(v[f"{camera}_lidar2cam"]))
        v.close(f"{camera}_uv", uv, atol=1e-3)                                   # [px], also behind the camera
        v.close(f"{camera}_depth", depth, atol=1e-6)
        x, y = uv.unbind(-1)
        v.exact(f"{camera}_mask_strict", (depth > 0) & (0 <= x) & (x < width) & (0 <= y) & (y < height))
        v.exact(f"{camera}_mask_devkit", (depth > 1) & (1 < x) & (x < width - 1) & (1 < y) & (y < height - 1))
        T_ego_cam = T(v[f"{camera}_cam2ego"])
        v.close(f"{camera}_static_lidar2cam", invert(T_ego_cam) @ T_ego_lidar, atol=1e-6)
        seen = T(v[f"{camera}_mask_strict"])
        back = unproject(uv[seen], depth[seen], K, invert(T(v[f"{camera}_lidar2cam"])))
        assert (back - points[seen]).abs().max() < 1e-4                          # its float32 rotation is rigid to 1e-7


def test_vectors_occnerf_rays_start_at_pixel_centres():
    v = load("render_curves_rope")
    K, T_world_cam = T(v["on_K"]).double(), T(v["on_c2w"]).double()
    origin = T_world_cam[:3, 3]
    one = torch.ones(6, 8, dtype=torch.float64)
    centres = pixel_centers(6, 8, dtype=torch.float64)
    v.close("on_rays_d_center", unproject(centres, one, K, T_world_cam) - origin, atol=1e-6)
    v.close("on_rays_d_lefttop", unproject(centres - 0.5, one, K, T_world_cam) - origin, atol=1e-6)
    v.close("on_rays_o", unproject(centres, 0 * one, K, T_world_cam), atol=1e-6)


def test_lifting_is_the_mean_over_the_cameras_that_see_a_point():
    K = torch.tensor([[10.0, 0, 8], [0, 10, 4], [0, 0, 1]]).expand(2, 3, 3)  # 16 x 8 px, looking along x
    T_ref_cam = torch.tensor([[0.0, 0, 1, 0], [-1, 0, 0, 0], [0, -1, 0, 0], [0, 0, 0, 1]]).repeat(2, 1, 1)
    T_ref_cam[1, :3, 0] *= -1  # the second camera is mirrored: u grows to the left
    ramp = torch.arange(16.0).expand(8, 16)
    features = torch.stack([ramp[None], 100 + 2 * ramp[None]])  # (2, 1, 8, 16)
    points = torch.tensor([[5.0, 0.5, 0], [5.0, -3.9, 0], [-5.0, 0, 0], [5.0, 0, 0]])
    lifted, seen = geometry.lift(features, points, K, T_ref_cam, (8, 16))
    # y = 0.5 at x = 5: u = 8 - 1 = 7 in the first camera, 9 in the second; element u has its centre at u + 0.5.
    # y = -3.9: u = 15.8 and 0.2, beyond the last centres: their value
    wanted = [(6.5 + 117) / 2, (15 + 100) / 2, 0, (7.5 + 115) / 2]
    assert lifted[:, 0].tolist() == pytest.approx(wanted, abs=1e-3) and seen.tolist() == [True, True, False, True]
    half = torch.nn.functional.avg_pool2d(features, 2)
    lifted, _ = geometry.lift(half, points, K, T_ref_cam, (8, 16))
    torch.testing.assert_close(lifted[3, 0], torch.tensor((7.5 + 115) / 2))


def test_ids_are_taken_at_the_new_pixels_centres():
    maps = torch.arange(24).view(1, 4, 6)
    assert geometry.nearest_ids(maps, (2, 3)).tolist() == [[[7, 9, 11], [19, 21, 23]]]
    assert torch.equal(geometry.nearest_ids(maps, (4, 6)), maps)


# --- rays through voxels ----------------------------------------------------------------------------------------------

CUBE = VoxelGrid((0.0, 0.0, 0.0), (6.0, 5.0, 4.0), (6, 5, 4))


def exact_path(origin, direction, shape, limit=None):
    """The oracle: [(voxel, t in, t out)] of positive length, in rational arithmetic, by the intervals' midpoints."""
    o, d = [Fraction(x) for x in origin], [Fraction(x) for x in direction]
    crossings = {(k - o[a]) / d[a] for a in range(3) if d[a] for k in range(shape[a] + 1)} | {Fraction(0)}
    if limit is not None:
        crossings |= {Fraction(limit)}
    t = sorted(x for x in crossings if x >= 0 and (limit is None or x <= limit))
    path = []
    for t0, t1 in zip(t, t[1:]):
        voxel = tuple(math.floor(o[a] + (t0 + t1) / 2 * d[a]) for a in range(3))
        if all(0 <= voxel[a] < shape[a] for a in range(3)) and (not path or path[-1][0] != voxel):
            path.append((voxel, t0, t1))
    return path


def oracle_rays(kind: str, count: int, seed: int = 0):
    """lattice: quarter steps and small whole directions, so that edges, corners and faces are met all the time."""
    rng = np.random.default_rng(seed)
    if kind == "lattice":
        return rng.integers(-4, 28, (count, 3)) / 4, rng.integers(-3, 4, (count, 3)).astype(float)
    origin, direction = rng.uniform(-2, 8, (count, 3)), rng.normal(size=(count, 3))
    return origin.astype(np.float32).astype(float), direction.astype(np.float32).astype(float)


@pytest.mark.parametrize("kind", ["lattice", "random"])
def test_cast_rays_equals_exact_arithmetic(kind):
    origin, direction = oracle_rays(kind, 500)
    occupied = torch.rand(CUBE.shape, generator=generator()) < 0.1
    index, depth, hit = cast_rays(occupied, T(origin), T(direction), CUBE)
    kinds = set()
    for r in range(len(origin)):
        path = exact_path(origin[r], direction[r], CUBE.shape) if direction[r].any() else []
        if not path:
            assert index[r].tolist() == [-1, -1, -1] and depth[r] == math.inf and not hit[r]
            kinds.add("never")
            continue
        met = [step for step in path if occupied[step[0]]]
        voxel, _, out = met[0] if met else path[-1]
        assert tuple(index[r].tolist()) == voxel and bool(hit[r]) == bool(met), (origin[r], direction[r])
        assert depth[r].item() == pytest.approx(float(out) * np.linalg.norm(direction[r]), abs=1e-9)
        kinds.add("hit" if met else "left")
    assert kinds == {"never", "hit", "left"}


@pytest.mark.parametrize("kind", ["lattice", "random"])
def test_traversed_equals_exact_arithmetic(kind):
    origin, direction = oracle_rays(kind, 400, seed=1)
    end = origin + 1.5 * direction
    expected = torch.zeros(CUBE.shape, dtype=torch.bool)
    for r in range(len(origin)):
        along = [Fraction(e) - Fraction(o) for o, e in zip(origin[r], end[r])]
        path = [step[0] for step in exact_path(origin[r], along, CUBE.shape, limit=1)]
        last = tuple(math.floor(x) for x in end[r])
        if all(0 <= last[a] < CUBE.shape[a] for a in range(3)) and (not path or path[-1] != last):
            path.append(last)
        assert visited(T(origin[r]), T(end[r : r + 1]), CUBE) == sorted(map(list, path)), (origin[r], end[r])
        for voxel in path:
            expected[voxel] = True
    assert torch.equal(traversed(T(origin), T(end), CUBE), expected) and 0 < expected.sum()


def test_the_first_hit_by_hand():
    grid = VoxelGrid((-1.0, 0.0, 0.0), (1.0, 1.0, 1.0), (4, 2, 2))          # voxels of 0.5 m
    occupied = torch.zeros(grid.shape, dtype=torch.bool)
    occupied[2, 0, 0] = True
    origin = torch.tensor([[-0.9, 0.2, 0.2], [-0.9, 0.7, 0.2], [-0.9, 0.2, 0.2], [-3.0, 0.2, 0.2], [0.2, 0.3, 0.3]])
    direction = torch.tensor([[1.0, 0, 0], [2.0, 0, 0], [-5.0, 0, 0], [0.0, 1, 0], [0.0, 0, 1]])
    index, depth, hit = cast_rays(occupied, origin, direction, grid)
    assert index.tolist() == [[2, 0, 0], [3, 1, 0], [0, 0, 0], [-1, -1, -1], [2, 0, 0]]
    assert hit.tolist() == [True, False, False, False, True]
    # to the exit face of [0, 0.5]; through to x = 1; back to x = -1; never in; up and out of its own voxel
    assert depth.tolist() == pytest.approx([1.4, 1.9, 0.1, math.inf, 0.2], abs=1e-6)
    assert depth.dtype == torch.float32


def visited(origin: torch.Tensor, end: torch.Tensor, grid: VoxelGrid) -> list[list[int]]:
    """The voxels of one segment, in C order."""
    return traversed(origin, end, grid).nonzero().tolist()


def test_edges_and_corners_that_are_only_touched_add_no_voxel():
    def visit(start, end):
        return visited(*(torch.tensor([p], dtype=torch.float64) for p in (start, end)), CUBE)

    assert visit([0.5, 0.5, 0.5], [2.5, 2.5, 2.5]) == [[0, 0, 0], [1, 1, 1], [2, 2, 2]]
    assert visit([2.5, 2.5, 2.5], [0.5, 0.5, 0.5]) == [[0, 0, 0], [1, 1, 1], [2, 2, 2]]
    assert visit([0.5, 1.5, 0.5], [1.5, 0.5, 0.5]) == [[0, 1, 0], [1, 0, 0]]
    # within the face y = 2: the voxel above it
    assert visit([0.5, 2.0, 0.5], [1.5, 2.0, 0.5]) == [[0, 2, 0], [1, 2, 0]]
    # an end on a face belongs to the voxel above it; a segment of no length has its end
    assert visit([0.5, 0.5, 0.5], [2.0, 0.5, 0.5]) == [[0, 0, 0], [1, 0, 0], [2, 0, 0]]
    assert visit([2.0, 0.5, 0.5], [2.0, 0.5, 0.5]) == [[2, 0, 0]]
    # a start on a face belongs to the side that the segment goes to
    assert visit([2.0, 0.5, 0.5], [0.5, 0.5, 0.5]) == [[0, 0, 0], [1, 0, 0]]


def test_a_ray_nearly_through_an_edge_does_not_depend_on_rounding():
    """0.1, 0.2, 0.3 are not exact in binary: diagonals through voxel edges must still step both axes at once."""
    grid = VoxelGrid((0.0, 0.0, 0.0), (2.0, 2.0, 0.4), (20, 20, 4))
    start = torch.tensor([[0.05, 0.05, 0.05]], dtype=torch.float64)
    end = torch.tensor([[1.95, 1.95, 0.05]], dtype=torch.float64)
    assert visited(start, end, grid) == visited(end, start, grid) == [[k, k, 0] for k in range(20)]
    index, _, hit = cast_rays(torch.zeros(grid.shape, dtype=torch.bool), start, end - start, grid)
    assert index.tolist() == [[19, 19, 0]] and not hit.any()


def test_skipping_empty_space_changes_nothing(monkeypatch):
    """Steps to the border of the empty square against steps of one voxel, and any chunk size."""
    g = generator(3)
    grid = VoxelGrid((-8.0, -8.0, -1.0), (8.0, 8.0, 2.2), (40, 40, 8))
    occupied = torch.rand(grid.shape, generator=g) < 0.004
    occupied[:, :, 1] |= torch.rand(40, 40, generator=g) < 0.5
    origin = (torch.rand(6000, 3, generator=g, dtype=torch.float64) - 0.5) * torch.tensor([20.0, 20.0, 6.0])
    direction = torch.randn(6000, 3, generator=g, dtype=torch.float64) * torch.tensor([1.0, 1.0, 0.2])
    fast = cast_rays(occupied, origin, direction, grid)
    reach_of = geometry._reach
    with monkeypatch.context() as patch:
        patch.setattr(geometry, "_reach", lambda occupied, most: reach_of(occupied, 1))
        slow = cast_rays(occupied, origin, direction, grid)
    assert all(torch.equal(a, b) for a, b in zip(fast, slow))
    for chunk in (1, 37, 6000):
        few = cast_rays(occupied, origin[:100], direction[:100], grid, chunk=chunk)
        assert all(torch.equal(a[:100], b) for a, b in zip(fast, few))
    assert 0.1 < fast[2].double().mean() < 0.9

    # the map of distances itself, against the definition
    reach = geometry._reach(occupied, 5)[:, :, 1:-1]
    blocked = torch.ones(42, 42, 8, dtype=torch.bool)
    blocked[1:-1, 1:-1] = occupied
    for z in range(8):
        near = blocked[:, :, z].nonzero().double()
        distance = torch.cdist(cells(42, 42).double(), near, p=math.inf).amin(1).clamp_max(5).view(42, 42)
        assert torch.equal(reach[:, :, z].double(), distance)


def test_rays_take_one_origin_or_many_and_float32_agrees():
    g = generator(4)
    occupied = torch.rand(CUBE.shape, generator=g) < 0.1
    origin, direction = torch.tensor([2.2, 2.3, 1.9], dtype=torch.float64), torch.randn(50, 3, generator=g).double()
    one = cast_rays(occupied, origin, direction, CUBE)
    many = cast_rays(occupied, origin.expand(50, 3), 3 * direction, CUBE)           # nor does the length matter
    single = cast_rays(occupied, origin.float(), direction.float(), CUBE)
    assert torch.equal(one[0], many[0]) and torch.equal(one[2], many[2])
    torch.testing.assert_close(one[1], many[1])
    assert torch.equal(one[0], single[0]) and single[1].dtype == torch.float32
    torch.testing.assert_close(one[1].float(), single[1])
    end = origin + direction
    assert torch.equal(traversed(origin, end, CUBE), traversed(origin.expand(50, 3), end, CUBE))


def test_rays_empty_and_wrong_input():
    occupied = torch.zeros(CUBE.shape, dtype=torch.bool)
    index, depth, hit = cast_rays(occupied, torch.zeros(3), torch.zeros(0, 3), CUBE)
    assert index.shape == (0, 3) and depth.shape == (0,) and hit.shape == (0,)
    index, depth, hit = cast_rays(occupied, torch.ones(3), torch.zeros(1, 3), CUBE)          # a ray that goes nowhere
    assert index.tolist() == [[-1, -1, -1]] and depth.item() == math.inf and not hit
    bad = torch.tensor([[math.nan, 0.0, 1.0], [math.inf, 1.0, 1.0]])
    assert (cast_rays(occupied, torch.ones(3), bad, CUBE)[0] == -1).all()
    assert traversed(torch.ones(3), bad, CUBE).sum() == 0
    assert traversed(torch.zeros(0, 3), torch.zeros(0, 3), CUBE).sum() == 0
    assert traversed(torch.zeros(2, 3) - 5, torch.zeros(2, 3) - 4, CUBE).sum() == 0         # past the grid
    with pytest.raises(ValueError, match=r"occupied has shape \(2, 2, 2\)"):
        cast_rays(torch.zeros(2, 2, 2, dtype=torch.bool), torch.zeros(3), torch.ones(1, 3), CUBE)
    with pytest.raises(ValueError, match="direction must be"):
        cast_rays(occupied, torch.zeros(3), torch.ones(3), CUBE)


def test_vectors_voxel_traversal():
    v = load("voxel_traversal")
    shape = tuple(v["dims"].tolist())
    grid = VoxelGrid((0.0, 0.0, 0.0), tuple(map(float, shape)), shape)
    unpack = lambda key: np.unpackbits(v[key])[: math.prod(shape)].reshape(shape).astype(bool)  # noqa: E731
    occupied, origin, direction = T(unpack("occ_packed")), T(v["origin"]), T(v["ray_dir"])
    index, depth, hit = cast_rays(occupied, origin, direction, grid)
    v.exact("first_hit_voxel", index)
    v.exact("dvr_voxel", index)
    v.exact("has_hit", hit)
    v.close("first_hit_exit_depth", depth, atol=1e-6)
    v.close("dvr_depth_f32", depth, atol=2e-3)
    voxels, pointer = T(v["path_voxels"]).long(), T(v["path_ptr"])
    for ray, start, along in zip(voxels.tensor_split(pointer[1:-1]), origin.expand_as(direction), direction):
        assert visited(start, (start + 100 * along)[None], grid) == sorted(ray.tolist())
    v.passed(2)

    # what the rays see: free before the first hit, and the hit
    free, into = (torch.zeros(shape, dtype=torch.bool) for _ in range(2))
    into[tuple(index[hit].T)] = True
    for ray in voxels.tensor_split(pointer[1:-1]):
        blocked = occupied[tuple(ray.T)].cumsum(0) > 0
        free[tuple(ray[~blocked].T)] = True
    assert np.array_equal(free.numpy(), unpack("visible_free_packed"))
    assert np.array_equal(into.numpy(), unpack("visible_occ_packed"))
    v.passed(2)
    end = origin + torch.where(hit, depth, 100.0)[:, None] * direction * (1 - 1e-8)     # up to the exit face
    assert torch.equal(traversed(origin, end, grid), free | into)


# --- point sets -------------------------------------------------------------------------------------------------------

def test_farthest_points_by_hand():
    line = torch.tensor([[0.0, 0, 0], [1.0, 0, 0], [10.0, 0, 0], [4.0, 0, 0], [7.0, 0, 0]])
    assert farthest_point_sample(line, 4).tolist() == [0, 2, 3, 4]         # x = 0, 10, then 4 (4 away), then 7 (3 away)
    assert farthest_point_sample(line, 0).tolist() == []
    tie = torch.tensor([[0.0, 0, 0], [1.0, 0, 0], [-1.0, 0, 0]])
    assert farthest_point_sample(tie, 2).tolist() == [0, 1]                # the lower index
    with pytest.raises(ValueError, match="cannot choose 6 of 5"):
        farthest_point_sample(line, 6)


def test_farthest_points_equal_a_slow_loop_and_batches_are_independent():
    points = torch.randn(3, 60, 3, generator=generator(7), dtype=torch.float64)
    chosen = farthest_point_sample(points, 12)
    assert chosen.shape == (3, 12)
    for cloud, index in zip(points, chosen.tolist()):
        slow = [0]
        while len(slow) < 12:
            slow.append(max(range(60), key=lambda i: min(float((cloud[i] - cloud[j]).square().sum()) for j in slow)))
        assert index == slow == farthest_point_sample(cloud, 12).tolist()
    assert farthest_point_sample(points[0], 60).unique().numel() == 60


def test_neighbours_equal_all_pairs():
    g = generator(8)
    query, points = torch.randn(40, 3, generator=g), torch.randn(70, 3, generator=g)
    index, distance = knn(query, points, 5)
    pairs = (query[:, None] - points[None]).square().sum(-1).sort(-1)
    assert torch.equal(index, pairs.indices[:, :5])
    torch.testing.assert_close(distance, pairs.values[:, :5])
    assert (distance.diff(dim=-1) >= 0).all() and index.dtype == torch.long
    batch = knn(torch.stack([query, query + 1]), torch.stack([points, points + 1]), 5)
    assert torch.equal(batch[0][0], index) and batch[1].shape == (2, 40, 5)
    assert torch.equal(index[:, 0], torch.from_numpy(cKDTree(points.numpy()).query(query.numpy())[1]))


def test_neighbours_of_nothing_and_too_many():
    index, distance = knn(torch.zeros(0, 3), torch.zeros(4, 3), 2)
    assert index.shape == (0, 2) and distance.shape == (0, 2)
    with pytest.raises(ValueError, match="cannot find 5 neighbours among 4"):
        knn(torch.zeros(1, 3), torch.zeros(4, 3), 5)


def test_neighbour_distances_have_gradients():
    g = generator(9)
    query, points = (torch.randn(n, 3, generator=g, dtype=torch.float64, requires_grad=True) for n in (4, 6))
    assert gradcheck(lambda q, p: knn(q, p, 3)[1], (query, points))


@pytest.mark.gpu
def test_neighbours_and_rays_on_a_gpu():
    g = generator(8)
    query, points = torch.randn(400, 3, generator=g), torch.randn(700, 3, generator=g)
    near, far = knn(query.cuda(), points.cuda(), 5), knn(query, points, 5)
    assert torch.equal(near[0].cpu(), far[0])
    torch.testing.assert_close(near[1].cpu(), far[1])
    assert torch.equal(farthest_point_sample(points.cuda(), 50).cpu(), farthest_point_sample(points, 50))
    origin, direction = (T(x) for x in oracle_rays("random", 9000))
    occupied = torch.rand(CUBE.shape, generator=g) < 0.1
    for a, b in zip(cast_rays(occupied.cuda(), origin, direction, CUBE), cast_rays(occupied, origin, direction, CUBE)):
        torch.testing.assert_close(a.cpu(), b)
    end = origin + direction
    assert torch.equal(traversed(origin.cuda(), end.cuda(), CUBE).cpu(), traversed(origin, end, CUBE))


def test_vectors_farthest_points():
    v = load("points_match_loss")
    v.exact("fps_idx_m40", farthest_point_sample(T(v["fps_xyz"]), 40))
    for name, k in (("ties", 20), ("dup", 5)):      # equal distances: indices are not demanded, the distances are
        points, theirs = T(v[f"fps_{name}_xyz"])[0], T(v[f"fps_{name}_idx"])[0].long()
        ours = farthest_point_sample(points, k)
        spread = [torch.stack([torch.cdist(points[i[n : n + 1]], points[i[:n]]).min() for n in range(1, k)])
                  for i in (ours, theirs)]
        torch.testing.assert_close(spread[0], spread[1], atol=1e-6, rtol=0)
        v.passed()


def test_vectors_neighbours():
    v = load("points_match_loss")
    for k in (1, 4, 60):
        index, distance = knn(T(v["bq_center"]), T(v["bq_xyz"]), k)
        v.exact(f"knn{k}_idx", index)
        v.close(f"knn{k}_dist2", distance, atol=1e-6)


# --- space-filling curves ---------------------------------------------------------------------------------------------

def test_z_code_by_hand():
    # x = 0b10, y = 0b01, z = 0b11 -> bits x1 y1 z1 x0 y0 z0 = 1 0 1 0 1 1
    assert z_code(torch.tensor([2, 1, 3]), 2).item() == 0b101011
    assert z_code(torch.tensor([2, 1, 3]), 2, swap_xy=True).item() == 0b011101


@pytest.mark.parametrize("n, depth", [(2, 1), (2, 4), (3, 1), (3, 3)])
def test_the_hilbert_curve_visits_every_cell_in_steps_of_one(n, depth):
    xyz = cells(*[1 << depth] * n)
    for swap in (False, True):
        code = hilbert_code(xyz, depth, swap_xy=swap)
        assert torch.equal(code.sort().values, torch.arange(len(xyz)))
        assert (xyz[code.argsort()].diff(dim=0).abs().sum(-1) == 1).all()
        assert xyz[code.argmin()].tolist() == [0] * n
    assert torch.equal(z_code(xyz, depth).sort().values, torch.arange(len(xyz)))


def test_hilbert_order_of_a_grid():
    order = hilbert_order((8, 8, 8))
    assert torch.equal(order.sort().values, torch.arange(512))
    assert (cells(8, 8, 8)[order].diff(dim=0).abs().sum(-1) == 1).all()
    order = hilbert_order((5, 3, 2))                                          # cut out of the cube of 8
    assert torch.equal(order.sort().values, torch.arange(30))
    assert torch.equal(order, hilbert_code(cells(5, 3, 2), 3).argsort())
    assert hilbert_order((1, 1, 1)).tolist() == [0]


def test_hilbert_order_by_height_keeps_columns_together():
    order = hilbert_order((4, 4, 3), mode="height")
    assert torch.equal(order.sort().values, torch.arange(48))
    columns = cells(4, 4, 3)[order].unflatten(0, (16, 3))
    assert (columns[:, :, 2] == torch.arange(3)).all() and (columns[:, :1, :2] == columns[:, :, :2]).all()
    assert (columns[:, 0, :2].diff(dim=0).abs().sum(-1) == 1).all()
    with pytest.raises(ValueError, match="mode must be"):
        hilbert_order((2, 2, 2), mode="zyx")


def test_codes_refuse_cells_that_do_not_fit():
    with pytest.raises(ValueError, match=r"must be in \[0, 8\), got 0 to 8"):
        hilbert_code(torch.tensor([[0, 8, 1]]), 3)
    with pytest.raises(ValueError, match="do not fit"):
        z_code(torch.zeros(1, 3, dtype=torch.long), 22)
    assert hilbert_code(torch.zeros(0, 3, dtype=torch.long), 4).shape == (0,)


@pytest.mark.parametrize("depth", [3, 5, 16])
def test_vectors_curves(depth):
    v = load("render_curves_rope")
    xyz = T(v[f"sfc{depth}_xyz"])
    v.exact(f"sfc{depth}_z", z_code(xyz, depth))
    v.exact(f"sfc{depth}_z-trans", z_code(xyz, depth, swap_xy=True))
    v.exact(f"sfc{depth}_hilbert", hilbert_code(xyz, depth))
    v.exact(f"sfc{depth}_hilbert-trans", hilbert_code(xyz, depth, swap_xy=True))
    if depth < 16:      # the third one is a dummy
        v.exact(f"sfc{depth}_hilbert_batched", (T(v[f"sfc{depth}_batch"]) << 3 * depth) | hilbert_code(xyz, depth))


# --- rotary embeddings ------------------------------------------------------------------------------------------------

def test_rope_by_hand():
    x, position = torch.tensor([[1.0, 0.0, 0.0, 2.0]], dtype=torch.float64), torch.tensor([3.0], dtype=torch.float64)
    c, s = [math.cos(3), math.cos(3 / 100)], [math.sin(3), math.sin(3 / 100)]        # base 1e4, D = 4: 1 and 1/100
    # pairs (1, 0) and (0, 2)
    assert rope(x, position)[0].tolist() == pytest.approx([c[0], s[0], -2 * s[1], 2 * c[1]])
    # half layout pairs channels (0, 2) = (1, 0) and (1, 3) = (0, 2)
    assert rope(x, position, layout="half")[0].tolist() == pytest.approx([c[0], -2 * s[1], s[0], 2 * c[1]])
    assert rope(x, position, sign=-1)[0].tolist() == pytest.approx([c[0], -s[0], 2 * s[1], 2 * c[1]])
    with pytest.raises(ValueError, match="even D"):
        rope(torch.zeros(1, 3), torch.zeros(1))


@pytest.mark.parametrize("layout", ["half", "interleaved"])
def test_rope_products_depend_on_the_difference_of_positions_only(layout):
    g = generator(10)
    q, k = torch.randn(2, 6, 8, generator=g, dtype=torch.float64)
    position = 20 * torch.rand(6, generator=g, dtype=torch.float64)
    near = rope(q, position, layout=layout) @ rope(k, position, layout=layout).T
    far = rope(q, position + 123.4, layout=layout) @ rope(k, position + 123.4, layout=layout).T
    torch.testing.assert_close(near, far, atol=1e-12, rtol=0)
    assert (near - q @ k.T).abs().max() > 0.1
    torch.testing.assert_close(rope(q, position, layout=layout).norm(dim=-1), q.norm(dim=-1))
    torch.testing.assert_close(rope(rope(q, position, layout=layout), position, layout=layout, sign=-1), q)


def test_rope_3d_turns_three_slices_and_lets_the_rest_pass():
    g = generator(11)
    x = torch.randn(2, 5, 20, generator=g, dtype=torch.float64)
    position = torch.randn(2, 5, 3, generator=g, dtype=torch.float64)
    out = rope_3d(x, position, scale=10.0)
    for axis in range(3):
        part = slice(6 * axis, 6 * axis + 6)
        torch.testing.assert_close(out[..., part], rope(x[..., part], 10 * position[..., axis]))
    assert torch.equal(out[..., 18:], x[..., 18:])
    assert torch.equal(rope_3d(x, torch.zeros_like(position)), x)
    small = torch.randn(4, 4, generator=g)
    assert torch.equal(rope_3d(small, torch.ones(4, 3)), small)               # fewer than 6 channels: nothing to turn


def test_rope_3d_products_are_invariant_under_a_common_translation():
    g = generator(12)
    q, k = torch.randn(2, 7, 24, generator=g, dtype=torch.float64)
    position = torch.randn(7, 3, generator=g, dtype=torch.float64)
    shift = torch.tensor([0.5, -2.0, 11.0], dtype=torch.float64)
    near = rope_3d(q, position) @ rope_3d(k, position).T
    torch.testing.assert_close(rope_3d(q, position + shift) @ rope_3d(k, position + shift).T, near, atol=1e-12, rtol=0)
    heads = rope_3d(q.expand(2, 3, 7, 24), position.expand(2, 1, 7, 3))
    torch.testing.assert_close(heads[1, 2], rope_3d(q, position))


def test_rope_gradients_and_half_precision():
    g = generator(13)
    x = torch.randn(2, 3, 8, generator=g, dtype=torch.float64, requires_grad=True)
    position = torch.randn(2, 3, 3, generator=g, dtype=torch.float64, requires_grad=True)
    assert gradcheck(lambda x, p: rope_3d(x, p, scale=3.0), (x, position))
    assert gradcheck(lambda x, p: rope(x, p, layout="half", sign=-1), (x, position[..., 0]))
    low = rope(x.detach().bfloat16(), position[..., 0].detach().float() * 300)    # angles must not be rounded to bf16
    full = rope(x.detach().bfloat16().double(), position[..., 0].detach().float().double() * 300)
    assert low.dtype == torch.bfloat16 and (low.double() - full).abs().max() < 0.02


def test_vectors_rope():
    v = load("render_curves_rope")
    x, position = T(v["rope_x"]).transpose(1, 2), T(v["rope_pos"])            # (B, L, H, D) -> (B, H, L, D)
    for key, layout, sign in (("rope_half_neg_theta_nanochat", "half", -1), ("rope_half_pos_theta", "half", 1),
                              ("rope_interleaved_gptfast", "interleaved", 1)):
        v.close(key, rope(x, position, layout=layout, sign=sign).transpose(1, 2), atol=1e-6)


# --- outliers, coarse cells ----------------------------------------------------------------------------------


def test_inliers_drop_the_far_point_only():
    grid = torch.stack(torch.meshgrid(*[torch.arange(5.0)] * 3, indexing="ij"), -1).reshape(-1, 3)
    points = torch.cat([grid, torch.tensor([[60.0, 0, 0]])]).double()
    keep = geometry.inliers(points, 20, 2.0)
    assert keep[:125].all() and not keep[125]
    assert geometry.inliers(points, 0, 2.0).all()


def test_inliers_in_chunks_are_the_same_and_say_their_cost_first(capsys):
    points = torch.randn(1000, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    whole = geometry.inliers(points, 20)
    assert not capsys.readouterr().out and 0.9 < whole.float().mean() < 1
    assert torch.equal(geometry.inliers(points, 20, chunk=300), whole)
    assert capsys.readouterr().out.startswith("outlier filter: 0.0 M points, about ")


def test_the_ray_of_a_pixel_without_a_class_ends_before_what_it_met():
    K, T = torch.tensor([[[1.0, 0, 1], [0, 1, 0.5], [0, 0, 1]]]).double(), torch.eye(4)[None].double()
    depth, known = torch.tensor([[[4.0, 4.0, 0.0]]]), torch.tensor([[[True, False, True]]])
    origin, end = geometry.image_rays(depth, K, T, 1, known, 1.0)
    assert origin.tolist() == [[0, 0, 0]] * 2 and end[0].tolist() == [-2, 0, 4]
    assert end[1].norm().item() == pytest.approx(math.hypot(2, 4) - 1) and (end[1] / end[1][2]).tolist() == [0.5, 0, 1]
    assert geometry.image_rays(depth, K, T, 1, known, 9.0)[1][1].tolist() == [0, 0, 0]  # not behind the camera


def test_coarsen_needs_half_of_the_known_voxels():
    fine = torch.full((2, 2, 4), 17, dtype=torch.uint8)  # four cells of 2 x 2 x 1 voxels along z
    fine[0, :, 0] = 4  # two of four
    fine[0, 0, 1] = 4  # one of four
    fine[:, :, 2] = 255  # unknown
    fine[:, :, 3] = torch.tensor([[255, 255], [17, 9]])  # one of two known
    assert geometry.coarsen(fine, (2, 2, 1), 17)[0, 0].tolist() == [4, 17, 255, 9]
