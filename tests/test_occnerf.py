"""OccNeRF's contraction, renderer and losses by hand and by slow sums."""

import math

import pytest
import torch
import torch.nn.functional as F

from common.geometry import OCC3D, VoxelGrid
from common.networks import occnerf as E

torch.manual_seed(0)


def test_contract_by_hand_and_inverse():
    grid = VoxelGrid((-40, -40, -1), (40, 40, 5.4), (200, 200, 16))
    points = torch.tensor([[40.0, 0.0, 2.2], [80.0, -80.0, 2.2]], dtype=torch.float64)
    unit = E.contract(points, grid, 2 / 3)  # t = 2: s(40) = 2 -> c = 2 -> 2/3; s(80) = 4 -> c = 3 - 1/3 -> 8/9
    assert torch.allclose(unit, torch.tensor([[2 / 3, 0, 0], [8 / 9, -8 / 9, 0]], dtype=torch.float64), atol=1e-12)
    many = (torch.rand(500, 3, dtype=torch.float64) - 0.5) * 300
    assert torch.allclose(E.uncontract(E.contract(many, grid, 2 / 3), grid, 2 / 3), many, atol=1e-6)
    assert torch.allclose(E.uncontract(E.contract(many, grid, 1.0), grid, 1.0), many, atol=1e-9)


@pytest.mark.parametrize("ratio", [1.0, 0.8])
def test_render_sees_a_wall_at_its_depth(ratio):
    logits = torch.zeros(18, 50, 50, 8)
    logits[17] = 12.0  # free everywhere
    unit = (2 * torch.arange(50) + 1) / 50 - 1
    metres = E.uncontract(torch.stack([unit, unit * 0, unit * 0], -1), OCC3D, ratio)[:, 0]
    wall = metres > 20
    logits[17, wall], logits[15, wall] = -12.0, 9.0
    rays = E.Rays(torch.tensor([[0.0, 0, 1.5]]), torch.tensor([[1.0, 0.1, 0.0]]))
    cells = tuple(round(n / ratio) for n in OCC3D.shape)
    out = E.render(logits, rays, E.ray_depths(rays, OCC3D, ratio, cells, 100), OCC3D, ratio)
    edge = (metres[wall][0] + metres[~wall][-1]) / 2  # trilinear: half-way between the two cells
    assert abs(out.depth.item() - edge) < 1.0
    assert out.semantic.argmax(-1).item() == 15
    assert out.weight.sum().item() == pytest.approx(1, abs=1e-5)


def test_samples_within_a_fifth_of_a_cell_of_the_last_do_not_count():
    unit = torch.tensor([[[0.0, 0, 0], [0.003, 0, 0], [0.0081, 0, 0], [0.0081, 0, 0.04], [0.0081, 0.5, 0.04]]])
    # cells 100, 100, 8: thresholds .004, .004, .05
    assert E.apart(unit, (100, 100, 8)).tolist() == [[False, False, True, False, True]]
    logits = torch.full((18, 50, 50, 8), -9.0)  # occupied everywhere
    rays = E.Rays(torch.tensor([[0.0, 0, 2.2]]), torch.tensor([[1.0, 0.0, 0.0]]))
    z = torch.tensor([[0.01, 0.02, 0.03, 3.0, 9.0, 12.0, 15.0, 18.0]])
    assert E.render(logits, rays, z, OCC3D, 0.8).depth.item() == pytest.approx(3.0, abs=1e-2)
    assert E.render(logits, rays, z, OCC3D, 1.0).depth.item() == pytest.approx(0.1)  # not contracted: all count


def test_distortion_equals_the_double_sum():
    w = torch.rand(3, 7, dtype=torch.float64)
    m = torch.rand(3, 7, dtype=torch.float64).sort(-1).values
    slow = sum(w[r, i] * w[r, j] * abs(m[r, i] - m[r, j]) for r in range(3) for i in range(7) for j in range(7))
    slow += sum(w[r, i] ** 2 * (m[r, i + 1] - m[r, i]) / 3 for r in range(3) for i in range(6))
    assert torch.allclose(E.distortion_loss(w, m), slow / 3)


def test_entropy_by_hand():
    assert E.entropy_loss(torch.tensor([0.5])).item() == pytest.approx(math.log(2))
    assert E.entropy_loss(torch.tensor([0.0, 1.0])).item() < 1e-4


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


def test_semantic_loss_ignores_255_and_survives_nothing():
    logits = torch.randn(3, 18, requires_grad=True)
    target = torch.tensor([4, 255, 17], dtype=torch.uint8)
    expected = F.cross_entropy(logits[[0, 2]], torch.tensor([4, 17]))
    assert torch.allclose(E.semantic_loss(logits, target, torch.ones(18)), expected)
    E.semantic_loss(logits, torch.full((3,), 255), torch.ones(18)).backward()
    assert (logits.grad == 0).all()
