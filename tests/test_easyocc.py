"""EasyOcc's equations by hand, by slow loops and by invariants."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import easyocc as E
from common.geometry import OCC3D, invert, project
from common.networks import street
from common.nuscenes import FREE

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
    assert cloud.label.tolist() == [4]


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
    extra, labels = filled.points[48:], filled.label[48:]
    # 2 m in 3 pieces, twice; 3 m in 5 pieces, once; 8 columns; none across the step nor between the classes
    assert len(extra) == 8 * (2 * 2 + 4) and (labels == 11).all()
    uv, z = project(extra, K, invert(T))
    near, far = uv[z < 10][:, 1], uv[z > 10][:, 1]  # on the wall, between the rows' centres
    assert z[z < 10].tolist() == pytest.approx([8.0] * 32) and z[z > 10].tolist() == pytest.approx([12.0] * 32)
    assert sorted({round(v, 2) for v in near.tolist()}) == [0.83, 1.17, 1.83, 2.17]
    assert far.min() > 3.5 and far.max() < 4.5


def test_a_filtered_pixel_carries_no_filled_gap():
    K, T = torch.tensor([[8.0, 0, 4], [0, 8.0, 4], [0, 0, 1]]).double(), torch.eye(4).double()
    depth, semantic = torch.full((1, 8, 8), 8.0), torch.ones(1, 8, 8, dtype=torch.uint8)
    depth[0, 4, 4] = 9.5  # near enough to its neighbours to be one surface with them, far enough to be an outlier
    noisy, clean = (E.backproject(depth, semantic, K[None], T[None], outlier_nb=o, fill=0.3).points
                    for o in (0, 5))
    assert (noisy[:, 2] > 8).sum() > 1 and (clean[:, 2] == 8).all()


def test_aggregate_keeps_only_the_current_frames_movers():
    cloud = E.Cloud(torch.zeros(3, 3), torch.tensor([4, 11, 7], dtype=torch.uint8))
    merged, current = E.aggregate(cloud, [cloud, cloud], (4, 7))
    assert merged.label.tolist() == [4, 11, 7, 11, 11]
    assert current.tolist() == [True, True, True, False, False]


def test_vote_majority_tie_clamp_and_share():
    points = torch.tensor([[0.1, 0.1, 0.1]] * 3 + [[1.1, 0.1, 0.1]] * 2 + [[99.0, 0.1, 0.1]])
    labels = torch.tensor([4, 4, 11, 16, 15, 13], dtype=torch.uint8)
    current = torch.tensor([True, True, True, True, False, False])
    semantics, share, hit = E.vote(points, labels, current, OCC3D, clamp_oob=True)
    first, second, border = (100, 100, 2), (102, 100, 2), (199, 100, 2)
    assert semantics[first] == 4 and share[first] == pytest.approx(2 / 3)
    assert semantics[second] == 16  # a tie: the current frame's vote wins, though 15 < 16
    assert semantics[border] == 13
    assert hit.sum() == 3 and (semantics != 17).sum() == 3
    dropped, _, kept = E.vote(points, labels, current, OCC3D, clamp_oob=False)
    assert dropped[border] == 17 and kept.sum() == 2


# --- 2.2, 2.4  model --------------------------------------------------------------------------------------------------


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


# --- 3  loss ------------------------------------------------------------------------------------------------


def test_pseudo_loss_by_hand():
    """(9) is the weighted mean of -log p plus Lovasz; (8)'s affinity terms come in by their weight alone."""
    logits, target = torch.randn(2, 18, 3, 4, 2), torch.randint(0, 18, (2, 3, 4, 2), dtype=torch.uint8)
    target[0, 0, 0] = 255
    weight, tiny = torch.rand(18) + 0.1, replace(E.PRESETS["tiny"], l_lov=1.0, l_free=0.0, l_scal=0.0)
    terms = E.pseudo_loss(logits, {"target": target}, weight, tiny)
    assert terms.keys() == {"ce", "lov"}
    one = [F.cross_entropy(x[None], y[None].long(), weight, ignore_index=255) for x, y in zip(logits, target)]
    assert torch.allclose(terms["ce"], torch.stack(one).mean(), atol=1e-6)
    eighth = E.pseudo_loss(logits, {"target": target}, weight, replace(tiny, l_ce=100, l_lov=0.0, l_scal=1))
    assert torch.allclose(eighth["ce"], 100 * terms["ce"]) and eighth["lov"] == 0 and eighth["scal"] > 0
    p, free = logits.softmax(1), target == FREE
    apart = []  # free against occupied, free counted three times; the classes of what is occupied
    for x, y, f in zip(p, target, free):
        x, taken = x.flatten(1), ~f.flatten() & (y.flatten() != 255)
        first = -3 * x[17, f.flatten()].log().sum() - (1 - x[17, taken]).log().sum()
        second = -(x[y.flatten()[taken].long(), taken] / (1 - x[17, taken])).log()
        heavy = weight[y.flatten()[taken].long()]
        apart.append(first / (3 * f.sum() + taken.sum()) + (heavy * second).sum() / heavy.sum())
    factored = E.pseudo_loss(logits, {"target": target}, weight, replace(tiny, l_free=3.0))
    assert torch.allclose(factored["ce"], torch.stack(apart).mean(), atol=1e-5) and factored["lov"] == terms["lov"]


# --- what tiny adds -----------------------------------------------------------------------------------------


def test_known_depth_marks_the_cell_that_it_hits():
    """A wall of cars at 8.5 m in every pixel: ahead, cells there show it, nearer ones none, farther ones hide."""
    K, T = torch.tensor([[50.0, 0, 50], [0, 50, 30], [0, 0, 1]]), torch.eye(4)
    T[:3, :3] = torch.tensor([[0.0, 0, 1], [-1, 0, 0], [0, -1, 0]])
    p, classes = torch.zeros(1, 1, 32, 60, 100), torch.zeros(1, 1, 18, 60, 100)
    p[:, :, street.depth_bin(torch.tensor(8.5))], classes[:, :, 4] = 1.0, 1.0
    centers = torch.tensor([[4.5, 0, 0], [8.5, 0, 0], [14.5, 0, 0], [-5.0, 0, 0]])
    out = street.lift_at_depth(classes, p, centers, K[None, None], T[None, None])[0]  # (4, 18 + 2)
    assert out[:, 4].tolist() == pytest.approx([0, 1, 0, 0], abs=0.15)
    assert out[:, 18].tolist() == out[:, 4].tolist() and out[:, 5].abs().sum() == 0
    assert out[:, 19].tolist() == pytest.approx([0, 0.5, 1, 0], abs=0.1)


def test_unseen_voxels_are_free_ignored_or_drawn(monkeypatch):
    label, seen = np.full((200, 200, 16), FREE, np.uint8), np.zeros((200, 200, 16), np.uint8)
    label[:100], label[150:, :, 5], seen[100:150] = 4, 11, 1
    monkeypatch.setattr(E, "read_label", lambda *args: (label, seen))
    unhit, carved, drawn = (E.Keyframes(None, None, replace(E.Config(), free_unseen=u)).target(7)
                            for u in ((1.0, 1.0), (0.0, 0.0), (0.3, 0.1)))
    for target in (unhit, carved, drawn):
        assert (target[:100] == 4).all() and (target[105:150] == FREE).all() and (target[150:, :, 5] == 11).all()
    assert (unhit[150:, :, 6:] == FREE).all() and (carved[150:, :, 6:] == 255).all()
    free = (drawn[150:] == FREE).float()
    assert free[..., :5].mean().item() == pytest.approx(0.3, abs=0.01)  # under the ground
    assert free[..., 6:].mean().item() == pytest.approx(0.1, abs=0.01)
    assert torch.equal(drawn, E.Keyframes(None, None, replace(E.Config(), free_unseen=(0.3, 0.1))).target(7))


@pytest.mark.parametrize("apart", [True, False])
def test_voxels_interpolate_logits_and_classes_may_stand_together(monkeypatch, apart):
    logits = torch.zeros(1, 18, 2, 1, 1)
    logits[0, FREE, 0], logits[0, FREE, 1] = 2.0, 4.0  # 17 classes at 0: together log 17 = 2.8
    monkeypatch.setattr(E, "stack", lambda items, device: None)
    monkeypatch.setattr(E.verbs, "inputs", lambda frame: None)
    net = type("Net", (), {"position": torch.zeros(1), "apart": apart, "margin": 0.0, "__call__": lambda self, batch: logits})()
    ids = E.predict(net, None)
    taken = torch.from_numpy(ids)[:, 0, 0] != FREE
    assert ids.shape == (200, 200, 16) and taken.sum() == (92 if apart else 0)
    assert not apart or taken[:92].all()  # 2 at x = 49.5, 4 at 149.5: log 17 at 91.2
