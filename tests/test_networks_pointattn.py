"""PointAttN and what surrounds it: clusters, completion without a network, points far from what was seen."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from common.geometry import farthest_from, largest_cluster
from common.networks.pointattn import PointAttN, chamfer, mirror_completion


def half_sphere(n: int = 300) -> tuple[np.ndarray, np.ndarray]:
    d = np.random.default_rng(0).normal(size=(n, 3))
    d /= np.linalg.norm(d, axis=1, keepdims=True)
    return 0.05 * d[d[:, 0] > 0.1] + [0.0, 0.0, 1.0], np.array([1.0, 0.0, 1.0])  # seen from +x


def test_clustering_drops_strays():
    cloud, _ = half_sphere()
    strays = np.array([[0.4, 0, 1.0], [0, 0.5, 1.2], [-0.4, 0.4, 0.9]])
    kept = largest_cluster(np.concatenate([cloud, strays]))
    assert len(kept) >= 0.95 * len(cloud) and np.linalg.norm(kept - [0, 0, 1], axis=1).max() < 0.06


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_clustering_is_scikit_learns(seed):
    from sklearn.cluster import DBSCAN

    rng = np.random.default_rng(seed)
    points = np.concatenate([rng.normal(0, 0.01, (60, 3)), rng.normal(1, 0.02, (40, 3)),
                             rng.uniform(-1, 2, (10, 3))])
    points = rng.permutation(points)
    apart = np.linalg.norm(points[:, None] - points, axis=-1)
    label = DBSCAN(eps=3 * np.median(np.sort(apart, axis=1)[:, 1]), min_samples=4).fit_predict(points)
    assert np.array_equal(largest_cluster(points), points[label == np.bincount(label[label >= 0]).argmax()])
    far = 10.0 * rng.permutation(np.eye(3).repeat(2, 0)) * np.arange(1, 7)[:, None] ** 2
    assert len(largest_cluster(far, factor=0.5)) == 6  # nothing is dense: all of it


def test_mirroring_fills_the_back_of_a_ball():
    cloud, eye = half_sphere()
    dense = mirror_completion(cloud, eye)
    back = dense[len(cloud) :]
    assert len(dense) == 2 * len(cloud) and back[:, 0].mean() < -0.01
    assert np.abs(np.linalg.norm(back - [0, 0, 1], axis=1) - 0.05).mean() < 0.02


def test_completion_points_lie_away_from_what_was_seen():
    cloud, eye = half_sphere()
    points = farthest_from(mirror_completion(cloud, eye), cloud, 0.4, 5)
    nearest = np.linalg.norm(points[:, None] - cloud, axis=-1).min(1)
    spacing = np.median(np.sort(np.linalg.norm(cloud[:, None] - cloud, axis=-1), 1)[:, 1])
    assert points.shape == (5, 3) and nearest.min() > 2 * spacing
    apart = np.linalg.norm(points[:, None] - points, axis=-1)[np.triu_indices(5, 1)]
    assert apart.min() > spacing  # spread out


def test_completion_network_learns_a_ball():
    torch.manual_seed(0)
    net, (cloud, eye) = PointAttN(64, width=32), half_sphere(200)
    partial = torch.from_numpy((cloud[:64] - cloud.mean(0)) / 0.07).float()[None]
    d = F.normalize(torch.randn(1, 256, 3), dim=-1)
    full = (0.05 * d + torch.tensor([0, 0, 1.0]) - torch.from_numpy(cloud.mean(0)).float()) / 0.07
    optimizer, losses = torch.optim.Adam(net.parameters(), 3e-3), []
    for _ in range(40):
        coarse, dense = net(partial)
        assert coarse.shape == (1, 16, 3) and dense.shape == (1, 64, 3)
        loss = chamfer(coarse, full) + chamfer(dense, full)
        optimizer.zero_grad(), loss.backward(), optimizer.step()
        losses.append(float(loss))
    assert losses[-1] < 0.5 * losses[0]
    done = net.complete(cloud, eye)
    assert len(done) == len(cloud) + 64 and done[len(cloud) :, 0].min() < -0.02  # it reaches behind


def test_the_completion_network_sees_all_of_a_cloud():
    net, inputs = PointAttN(32), []
    net.forward = lambda x: (inputs.append(x), (None, torch.zeros(1, 32, 3)))[1]
    net.complete(np.stack([np.linspace(0, 1, 63), np.zeros(63), np.zeros(63)], 1), np.zeros(3))
    x = inputs[0][0, :, 0]
    assert x.min() == pytest.approx(-1) and x.max() == pytest.approx(1)
