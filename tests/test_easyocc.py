"""EasyOcc's equations by hand, by slow loops and by invariants; then its verbs on a tiny world."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import easyocc as E
from common.geometry import OCC3D, VoxelGrid, invert, project

torch.manual_seed(0)


def camera(yaw: float = 0.0) -> tuple[torch.Tensor, torch.Tensor]:
    """K of an 8 x 6 image with focal length 4, and a camera 1.5 m up that looks along ego x, turned by yaw about z."""
    K = torch.tensor([[4.0, 0, 4], [0, 4, 3], [0, 0, 1]], dtype=torch.float64)
    axes = torch.tensor([[0.0, 0, 1], [-1, 0, 0], [0, -1, 0]], dtype=torch.float64)  # columns: camera x, y, z in ego
    c, s = math.cos(yaw), math.sin(yaw)
    T = torch.eye(4, dtype=torch.float64)
    T[:3, :3] = torch.tensor([[c, -s, 0], [s, c, 0], [0, 0, 1]], dtype=torch.float64) @ axes
    T[2, 3] = 1.5
    return K, T


# --- 2.1  labels ------------------------------------------------------------------------------------------------------


def test_backproject_by_hand_drops_sky_and_holes():
    K, T = camera()
    depth, semantic = torch.zeros(1, 6, 8), torch.full((1, 6, 8), 4, dtype=torch.uint8)
    depth[0, 2, 5] = 8.0  # centre (5.5, 2.5): x = (5.5 - 4) / 4 * 8 = 3 right, y = (2.5 - 3) / 4 * 8 = -1 down
    depth[0, 0, 0], semantic[0, 0, 0] = 5.0, 17
    cloud = E.backproject(depth, semantic, K[None], T[None])
    assert torch.allclose(cloud.points, torch.tensor([[8.0, -3.0, 2.5]], dtype=torch.float64))
    assert cloud.labels.tolist() == [4]


def test_backproject_inverts_project():
    K, T = camera(0.7)
    depth = torch.rand(1, 6, 8, dtype=torch.float64) * 20 + 1
    cloud = E.backproject(depth, torch.ones(1, 6, 8, dtype=torch.uint8), K[None], T[None])
    uv, z = project(cloud.points, K, invert(T))
    assert torch.allclose(uv.view(6, 8, 2), E.pixel_centers(6, 8).double(), atol=1e-9)
    assert torch.allclose(z.view(6, 8), depth[0], atol=1e-9)


def test_rows_of_one_surface_are_filled_and_steps_between_surfaces_are_not():
    K, T = camera()  # focal length 4 px
    depth, semantic = torch.full((1, 6, 8), 8.0), torch.full((1, 6, 8), 11, dtype=torch.uint8)  # a wall: rows 2 m apart
    depth[0, 3:], semantic[0, 5] = 12.0, 4  # a step in depth after row 2, another class after row 4
    plain, filled = (E.backproject(depth, semantic, K[None], T[None], fill=f) for f in (0.0, 0.7))
    assert len(plain.points) == 48 and torch.equal(filled.points[:48], plain.points)
    extra, labels = filled.points[48:], filled.labels[48:]
    # 2 m in 3 pieces, twice; 3 m in 5 pieces, once; 8 columns; none across the step nor between the classes
    assert len(extra) == 8 * (2 * 2 + 4) and (labels == 11).all()
    uv, z = project(extra, K, invert(T))
    near, far = uv[z < 10][:, 1], uv[z > 10][:, 1]  # on the wall, between the rows' centres
    assert z[z < 10].tolist() == pytest.approx([8.0] * 32) and z[z > 10].tolist() == pytest.approx([12.0] * 32)
    assert sorted({round(v, 2) for v in near.tolist()}) == [0.83, 1.17, 1.83, 2.17]
    assert far.min() > 3.5 and far.max() < 4.5


def test_inliers_drop_the_far_point_only():
    grid = torch.stack(torch.meshgrid(*[torch.arange(5.0)] * 3, indexing="ij"), -1).reshape(-1, 3)
    points = torch.cat([grid, torch.tensor([[60.0, 0, 0]])]).double()
    keep = E.inliers(points, 20, 2.0)
    assert keep[:125].all() and not keep[125]
    assert E.inliers(points, 0, 2.0).all()


def test_a_filtered_pixel_carries_no_filled_gap():
    K, T = torch.tensor([[8.0, 0, 4], [0, 8.0, 4], [0, 0, 1]]).double(), torch.eye(4).double()
    depth, semantic = torch.full((1, 8, 8), 8.0), torch.ones(1, 8, 8, dtype=torch.uint8)
    depth[0, 4, 4] = 9.5  # near enough to its neighbours to be one surface with them, far enough to be an outlier
    noisy, clean = (E.backproject(depth, semantic, K[None], T[None], outliers=o, fill=0.3).points for o in ((0, 0.0), (5, 2.0)))
    assert (noisy[:, 2] > 8).sum() > 1 and (clean[:, 2] == 8).all()


def test_aggregate_keeps_only_the_current_frames_movers():
    cloud = E.Cloud(torch.zeros(3, 3), torch.tensor([4, 11, 7], dtype=torch.uint8))
    merged, current = E.aggregate(cloud, [cloud, cloud], (4, 7))
    assert merged.labels.tolist() == [4, 11, 7, 11, 11]
    assert current.tolist() == [True, True, True, False, False]


def test_vote_majority_tie_clamp_and_share():
    points = torch.tensor([[0.1, 0.1, 0.1]] * 3 + [[1.1, 0.1, 0.1]] * 2 + [[99.0, 0.1, 0.1]])
    labels = torch.tensor([4, 4, 11, 16, 15, 13], dtype=torch.uint8)
    current = torch.tensor([True, True, True, True, False, False])
    label = E.vote_labels(points, labels, current, OCC3D, clamp_oob=True)
    first, second, border = (100, 100, 2), (102, 100, 2), (199, 100, 2)
    assert label.semantics[first] == 4 and label.share[first] == pytest.approx(2 / 3)
    assert label.semantics[second] == 16  # a tie: the current frame's vote wins, though 15 < 16
    assert label.semantics[border] == 13
    assert label.hit.sum() == 3 and (label.semantics != 17).sum() == 3
    dropped = E.vote_labels(points, labels, current, OCC3D, clamp_oob=False)
    assert dropped.semantics[border] == 17 and dropped.hit.sum() == 2


# --- 2.2, 2.4  model --------------------------------------------------------------------------------------------------


def test_contract_by_hand_and_inverse():
    grid = VoxelGrid((-40, -40, -1), (40, 40, 5.4), (200, 200, 16))
    points = torch.tensor([[40.0, 0.0, 2.2], [80.0, -80.0, 2.2]], dtype=torch.float64)
    unit = E.contract(points, grid, 2 / 3)  # t = 2: s(40) = 2 -> c = 2 -> 2/3; s(80) = 4 -> c = 3 - 1/3 -> 8/9
    assert torch.allclose(unit, torch.tensor([[2 / 3, 0, 0], [8 / 9, -8 / 9, 0]], dtype=torch.float64), atol=1e-12)
    many = (torch.rand(500, 3, dtype=torch.float64) - 0.5) * 300
    assert torch.allclose(E.uncontract(E.contract(many, grid, 2 / 3), grid, 2 / 3), many, atol=1e-6)
    assert torch.allclose(E.uncontract(E.contract(many, grid, 1.0), grid, 1.0), many, atol=1e-9)


def test_lift_is_the_mean_over_the_cameras_that_see():
    K, T0 = camera()
    T = torch.stack([T0, camera(0.4)[1]]).float()
    K = torch.stack([K, K]).float()
    features = torch.randn(2, 3, 6, 8)
    centers = torch.tensor([[6.0, 0.5, 1.2], [6.0, -3.0, 1.0], [-5.0, 0, 1.0], [6.0, 2.0, 1.5]])
    out = E.lift(features, centers, K, T)
    for v, point in enumerate(centers):
        seen = []
        for n in range(2):
            uv, z = project(point[None], K[n], invert(T[n]))
            u, w = uv[0].tolist()
            if z[0] > 0 and 0 <= u < 8 and 0 <= w < 6:
                x, y = u - 0.5, w - 0.5
                total = torch.zeros(3)
                for i in (math.floor(x), math.floor(x) + 1):
                    for j in (math.floor(y), math.floor(y) + 1):
                        if 0 <= i < 8 and 0 <= j < 6:
                            total += features[n, :, j, i] * (1 - abs(x - i)) * (1 - abs(y - j))
                seen.append(total)
        expected = torch.stack(seen).mean(0) if seen else torch.zeros(3)
        assert torch.allclose(out[v], expected, atol=1e-5), v
    assert (out[2] == 0).all()  # behind both cameras


class _Space:
    """What render needs to know of a network."""

    def __init__(self, ratio: float):
        self.grid, self.ratio, self.stride = OCC3D, ratio, (1, 1, 1)
        self.cells = tuple(round(n / ratio) for n in OCC3D.shape)


@pytest.mark.parametrize("ratio", [1.0, 0.8])
def test_render_sees_a_wall_at_its_depth(ratio):
    net = _Space(ratio)
    cfg = E.replace(E.TINY, samples=400, semantic_group=4)
    logits = torch.zeros(18, 50, 50, 8)
    logits[17] = 12.0  # free everywhere
    unit = (2 * torch.arange(50) + 1) / 50 - 1
    metres = E.uncontract(torch.stack([unit, unit * 0, unit * 0], -1), OCC3D, ratio)[:, 0]
    wall = metres > 20
    logits[17, wall], logits[15, wall] = -12.0, 9.0
    rays = E.Rays(torch.tensor([[0.0, 0, 1.5]]), torch.tensor([[1.0, 0.1, 0.0]]))
    out = E.render(logits, net, rays, cfg, None)
    edge = metres[wall][0] - (metres[wall][0] - metres[~wall][-1]) / 2  # trilinear: half-way between the two cells
    assert abs(out.depth.item() - edge) < 1.0
    assert out.semantic.argmax(-1).item() == 15
    assert out.weight.sum().item() == pytest.approx(1, abs=1e-5)


def test_distortion_equals_the_double_sum():
    w = torch.rand(3, 7, dtype=torch.float64)
    m = torch.rand(3, 7, dtype=torch.float64).sort(-1).values
    slow = sum(w[r, i] * w[r, j] * abs(m[r, i] - m[r, j]) for r in range(3) for i in range(7) for j in range(7))
    slow += sum(w[r, i] ** 2 * (m[r, i + 1] - m[r, i]) / 3 for r in range(3) for i in range(6))
    assert torch.allclose(E.distortion_loss(w, m), slow / 3)


def test_entropy_by_hand():
    assert E.entropy_loss(torch.tensor([0.5])).item() == pytest.approx(math.log(2))
    assert E.entropy_loss(torch.tensor([0.0, 1.0])).item() < 1e-4


# --- 3  losses --------------------------------------------------------------------------------------------------------


def test_pseudo_ce_equals_full_resolution_ce():
    scores = torch.randn(1, 17 + 4, 3, 4, 2)
    target = torch.randint(0, 18, (1, 6, 8, 2), dtype=torch.uint8)
    target[0, 0, 0] = 255
    weight = torch.rand(18) + 0.1
    cfg = E.replace(E.TINY, l_ce=1.0, l_lov=0.0)
    ours = E.pseudo_loss(scores, E.fold(target, (2, 2, 1)), None, weight, cfg)["ce"]
    coarse = scores[:, :17].repeat_interleave(2, 2).repeat_interleave(2, 3)
    full = torch.cat([coarse, E.unfold(scores[:, 17:], (2, 2, 1))], 1)  # every fine cell's own 18 logits
    assert torch.allclose(ours, F.cross_entropy(full, target.long(), weight, ignore_index=255), atol=1e-6)


def test_fold_puts_the_fine_cells_of_a_cell_into_channels():
    fine = torch.arange(2 * 4 * 6 * 3).view(2, 4, 6, 3)
    folded = E.fold(fine, (2, 3, 1))
    assert folded.shape == (2, 6, 2, 2, 3)
    for x in range(4):
        for y in range(6):
            assert (folded[:, (x % 2) * 3 + y % 3, x // 2, y // 3] == fine[:, x, y]).all()
    assert (E.unfold(folded, (2, 3, 1))[:, 0] == fine).all()


def test_cell_labels_need_half_of_the_known_cells():
    target = torch.full((1, 4, 1, 1, 4), 17, dtype=torch.uint8)
    target[0, :2, 0, 0, 0] = 4  # two of four
    target[0, :1, 0, 0, 1] = 4  # one of four
    target[0, :, 0, 0, 2] = 255  # unknown
    target[0, :, 0, 0, 3] = torch.tensor([255, 255, 17, 9])  # one of two known
    assert E.cell_labels(target)[0, 0, 0].tolist() == [4, 17, 255, 9]


def test_confidence_scales_the_cross_entropy():
    logits, target = torch.randn(1, 18, 2, 2, 2), torch.randint(0, 17, (1, 1, 2, 2, 2), dtype=torch.uint8)
    share = torch.zeros(1, 1, 2, 2, 2)
    share[0, 0, 0, 0, 0] = 1
    cfg = E.replace(E.TINY, l_ce=1.0, l_lov=0.0)
    one = E.pseudo_loss(logits, target, share, torch.ones(18), cfg)["ce"]
    expected = -logits.log_softmax(1)[0, target[0, 0, 0, 0, 0].long(), 0, 0, 0]
    assert torch.allclose(one, expected)


def test_photometric_prefers_the_true_depth():
    """A textured wall 10 m ahead, seen again 0.5 m to the side: the right depth explains the neighbour, others do not."""
    torch.manual_seed(3)
    K = torch.tensor([[[60.0, 0, 40], [0, 60.0, 20], [0, 0, 1]]])
    T = torch.eye(4)[None]
    T_other = T.clone()
    T_other[0, 0, 3] = 0.5  # camera x: right; disparity 60 * 0.5 / 10 = 3 px exactly
    texture = F.interpolate(torch.rand(1, 3, 10, 26), (40, 104), mode="bilinear")
    image, other = texture[..., 10:90], texture[..., 13:93]
    valid = torch.ones(1, dtype=torch.bool)
    cost = [E.photometric_loss(image, torch.full((1, 40, 80), d), K, T, [(other, T_other, valid)]).item() for d in (5.0, 10.0, 30.0)]
    assert cost[1] < 0.2 * cost[0] and cost[1] < 0.5 * cost[2]
    nothing = E.photometric_loss(image, torch.full((1, 40, 80), 10.0), K, T, [(other, T_other, ~valid)])
    assert nothing.item() == 0  # no neighbour: no cost, and no NaN


def test_smoothness_is_zero_on_a_plane_of_depth_and_counts_edges():
    images = torch.zeros(1, 3, 6, 8)
    depth = torch.full((1, 6, 8), 7.0)
    assert E.smoothness_loss(depth, images).item() == 0
    depth[..., 4:] = 14.0
    plain = E.smoothness_loss(depth, images)
    images[..., 4:] = 1.0
    assert 0 < E.smoothness_loss(depth, images) < plain


def test_depth_loss_ignores_holes():
    d, t = torch.tensor([2.0, 5.0]), torch.tensor([4.0, 0.0])
    assert E.depth_loss(d, t).item() == pytest.approx(math.log(2))


def test_semantic_loss_ignores_255_and_survives_nothing():
    logits = torch.randn(3, 18, requires_grad=True)
    target = torch.tensor([4, 255, 17], dtype=torch.uint8)
    expected = F.cross_entropy(logits[[0, 2]], torch.tensor([4, 17]))
    assert torch.allclose(E.semantic_loss(logits, target, torch.ones(18)), expected)
    E.semantic_loss(logits, torch.full((3,), 255), torch.ones(18)).backward()
    assert (logits.grad == 0).all()
