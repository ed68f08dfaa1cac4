"""LOC's host network: lifting by a depth distribution, by hand; the network protocol."""

import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from test_lidar import camera

from common.geometry import divide, invert, project
from common.networks import lss

SMALL = lss.Sizes(8, (1.0, 45.0, 1.0), (8, 16), (4, 4, 2), (2, 2, 2), "group")
SHARE = partial(lss.share_of, bins=(0.0, 20.0, 1.0))


def looking_ahead() -> tuple[torch.Tensor, torch.Tensor]:
    K, T = camera()
    return torch.from_numpy(K).float(), torch.from_numpy(T).float()


def test_lifting_with_an_even_depth_is_the_mean_of_what_cameras_show():
    K, T = looking_ahead()
    context, depth = torch.rand(1, 3, 60, 100), torch.zeros(1, 20, 60, 100)
    centers = torch.tensor([[8.0, 1.0, 0.3], [12.0, -2.0, -0.5], [-5.0, 0, 0]])
    volume = lss.lift(context, lss.depth_curves(depth.softmax(1)), centers, K[None], T[None], SHARE)
    uv, _ = project(centers, K, invert(T))
    at = (2 * uv / torch.tensor([100.0, 60.0]) - 1)[None, None]
    want = F.grid_sample(context, at, align_corners=False)[0, :, 0].t()
    assert torch.allclose(volume[:2, :3], want[:2], atol=1e-5) and volume[2].abs().sum() == 0
    assert torch.allclose(volume[:2, 3], torch.ones(2), atol=1e-5)  # an even depth gates nothing
    assert torch.allclose(volume[:2, 4], torch.tensor([8.0, 12.0]) / 20, atol=0.03)  # half before half way


def test_lifting_with_a_sharp_depth_keeps_the_voxel_at_that_depth():
    K, T = looking_ahead()
    depth = torch.full((1, 20, 60, 100), -30.0)
    depth[:, 8] = 0.0  # a surface between 8 and 9 m
    centers = torch.tensor([[4.5, 0, 0], [8.5, 0, 0], [14.5, 0, 0]])
    curves = lss.depth_curves(depth.softmax(1))
    volume = lss.lift(torch.ones(1, 1, 60, 100), curves, centers, K[None], T[None], SHARE)
    assert torch.allclose(volume[:, 0], torch.tensor([0.0, 1.0, 0.0]), atol=1e-4)
    assert torch.allclose(volume[:, 2], torch.tensor([0.0, 0.5, 1.0]), atol=1e-4)  # free, hidden


def test_split_cells_lie_where_their_lifted_cell_does():
    x = torch.arange(4 * 3 * 5 * 2.0).view(1, 4, 3, 5, 2)  # (B, sx sy sz C, X', Y', Z')
    out = divide(x, (2, 2, 1))
    assert out.shape == (1, 1, 6, 10, 2)
    assert out[0, 0, 3, 6, 1] == x[0, 2, 1, 3, 1] and out[0, 0, 2, 7, 0] == x[0, 1, 1, 3, 0]


@pytest.mark.parametrize("sizes", [SMALL, SMALL._replace(lift_stride=(1, 1, 1))])
def test_it_keeps_the_network_protocol(sizes):
    net = lss.LiftNet(sizes, "conv")
    batch = {"images": torch.rand(1, 6, 3, 56, 100), "K": torch.eye(3).expand(1, 6, 3, 3) * 50,
             "T_ego_cam": torch.eye(4).expand(1, 6, 4, 4)}
    features = net.voxels(batch)
    assert features.shape == (1, net.channels, *net.grid.shape)
    assert net.head(features).shape == (1, 18, *net.grid.shape)


def test_depth_loss_by_hand():
    logits, depth = torch.zeros(1, 1, 4, 1, 3), torch.tensor([[[[1.5, 0.0, 9.0]]]])  # bin 1; none; beyond
    assert lss.depth_loss(logits, depth, (0.0, 4.0, 1.0)).item() == pytest.approx(math.log(4))
