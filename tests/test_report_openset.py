"""The open-set report: diversity, unions and retrieval by hand, and a method that answers perfectly or
blindly.
"""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from common.geometry import OCC3D
from common.metrics import class_iou, openset_scores
from common.nuscenes import NuScenesOccupancy
from common.report import openset as O
from experiments import runner

KNOWN, NOVEL = [4, 11, 15], [5, 9]


def test_homogenisation_separates_spread_classes_from_one_cone():
    torch.manual_seed(0)
    label = torch.arange(4).repeat_interleave(50)
    apart = F.normalize(torch.eye(8)[label] + 0.05 * torch.randn(200, 8), dim=-1)
    cone = F.normalize(torch.ones(200, 8) + 0.05 * torch.randn(200, 8), dim=-1)
    a, b = O.homogenisation(apart, label), O.homogenisation(cone, label)
    assert a["centroid_distance"] > 0.9 > 0.1 > b["centroid_distance"]
    assert a["inter_intra"] > 5 > b["inter_intra"] and a["effective_rank"] > b["effective_rank"]
    exact = O.homogenisation(torch.eye(4)[label], label)  # four orthogonal points: rank 4, no spread
    assert exact["effective_rank"] == pytest.approx(4) and exact["centroid_distance"] == pytest.approx(1)
    assert exact["class_spread"] == pytest.approx(0)
    assert O.homogenisation(apart[:60], label[:60], least=20) == {}  # the second class has ten voxels
    more = torch.cat([apart, apart[:50].repeat(4, 1)]), torch.cat([label, torch.zeros(200).long()])
    few = O.homogenisation(*more)  # balanced: more of one class changes little
    assert few["effective_rank"] == pytest.approx(a["effective_rank"], rel=0.1)


def test_unions_and_their_mean_equal_the_metric():
    torch.manual_seed(0)
    confusion = torch.randint(0, 50, (18, 18))
    sums = O.union_sums(confusion, [2, 5, 9])
    iou = class_iou(confusion, "flashocc")[[2, 5, 9]].numpy()
    assert np.allclose(sums[:, 0] / sums[:, 1], iou) and O.mean_ratio(sums) == pytest.approx(iou.mean())
    confusion[5] = 0
    confusion[:, 5] = 0
    sums = O.union_sums(confusion, [2, 5, 9])  # absent: skipped
    assert O.mean_ratio(sums) == pytest.approx(class_iou(confusion, "flashocc")[[2, 9]].mean().item())
    assert runner.score(sums, "unknown_miou") == pytest.approx(O.mean_ratio(sums))


def test_levels_by_hand():
    values = np.full(OCC3D.shape, np.nan, np.float32)
    values[0, 0, :4] = 0.04, 0.06, 0.6, 0.95
    assert O.levels(values)[0, 0, :5].tolist() == [0, 1, 5, 7, 255]


@pytest.fixture(scope="module")
def dataset(tiny_world, tmp_path_factory) -> NuScenesOccupancy:
    return NuScenesOccupancy(tiny_world, split="all", cache=tmp_path_factory.mktemp("c"), parts=("images",))


def test_held_out_classes_are_hidden_from_known_scores(dataset):
    before = dataset.labels(0)
    hidden = O.hide_classes(NuScenesOccupancy(dataset.root, split="all", cache=dataset.cache, parts=()), [4])
    after = hidden.labels(0)
    assert (after[0][before[0] == 4] == 255).all() and (before[0] == 4).any()
    assert all(np.array_equal(a[before[0] != 4], b[before[0] != 4]) for a, b in zip(after, before))


@pytest.mark.parametrize("told", [True, False])
def test_a_method_that_knows_scores_perfectly_and_a_blind_one_at_chance(dataset, told):
    novel = sorted(set(np.unique(dataset.labels(0)[0])) - {17})[-1:]
    generator = torch.Generator().manual_seed(0)

    def read(frame, voxels) -> O.Answer:
        truth = dataset.labels(dataset.index(frame.token))[0]
        label = torch.from_numpy(truth[voxels].astype(np.int64))
        unknown = torch.isin(label, torch.tensor(novel)).float()
        if not told:
            unknown, truth = torch.rand(len(label), generator=generator), np.full_like(truth, 17)
        features = F.one_hot(label, 18).float() if told else torch.ones(len(label), 18) / 18**0.5
        scores = {"both": unknown, "language": unknown}
        alike = features[:, [*known, *novel]] if told else torch.rand(len(label), 17, generator=generator)
        return O.Answer(scores, {"": alike, "_g": alike}, unknown[:, None], features, {"": truth, "_g": truth})

    known = [c for c in range(17) if c not in novel]
    metrics, sums = O.score(read, dataset, list(range(len(dataset))), known, novel)
    assert metrics["auroc"] == metrics["auroc_language"] and "auroc_occupancy" not in metrics
    if told:
        assert metrics["auroc"] == 1 and metrics["unknown_miou"] == 1 and metrics["harmonic"] == 1
        assert metrics["retrieval_map_name"] == pytest.approx(1)
        assert all(metrics[name + kind] == 1 for kind in ("", "_g") for name in
                   ("naming_unknown", "naming_recall", "choice_unknown", "known_miou", "unknown_miou"))
        assert metrics["auroc_things"] == metrics["auroc_stuff"] == metrics["auroc_margin"] == 1
        assert metrics["centroid_distance"] == pytest.approx(1)
    else:
        assert metrics["auroc"] == pytest.approx(0.5, abs=0.03) and metrics["unknown_miou"] == 0
        assert metrics["retrieval_map_name"] == pytest.approx(metrics["retrieval_map_chance"], abs=0.05)
        assert metrics["naming_recall"] == pytest.approx(1 / 17, abs=0.03) and metrics["choice_unknown"] == 1
        assert metrics["centroid_distance"] == pytest.approx(0, abs=1e-6)
    assert set(sums["scene_auroc"]) == set(dataset.scene_names)


def test_scores_without_a_voxel_are_undefined(capsys):
    O.print_table({}, [1, 2], [4], "no camera saw a thing")
    lines = {line.strip().split("  ")[0]: line.split() for line in capsys.readouterr().out.splitlines()}
    assert lines["chance"][1:] == ["50.00", "50.00", "50.00", "undefined", "95.00"]
    assert lines["retrieval mAP by name"][-1] == lines["mIoU, unknown classes"][-1] == "undefined"


def test_counts_of_half_precision_scores_equal_the_scores_themselves():
    generator = torch.Generator().manual_seed(0)
    score, unknown = torch.randn(5000, generator=generator).half(), torch.rand(5000, generator=generator) < 0.1
    whole, counts = O.Counts(), [O.Counts(), O.Counts()]
    for part, rows in zip(counts, (slice(0, 2000), slice(2000, None))):
        part.add(score[rows], unknown=unknown[rows], known=~unknown[rows])
        whole.merge(part)
    assert whole.scores("unknown", "known") == pytest.approx(openset_scores(score, unknown))
    with pytest.raises(ValueError, match="NaN"):
        whole.add(torch.tensor([math.nan]), unknown=torch.tensor([True]))


def test_a_pool_keeps_some_of_each_class_and_never_more():
    pool, label = O.Pool(np.random.default_rng(0)), torch.tensor([1, 2]).repeat_interleave(3000)
    for k in range(3):
        pool.add(torch.full((6000, 2), float(k)), label, 2000)
    features, classes = pool.all()
    assert classes.bincount().tolist() == [0, 2000, 2000]
    assert (features[:, 0].long().bincount() > 1000).all()  # each of three scenes has about a third


def test_a_query_ranks_what_a_camera_sees():
    """A wall of voxels hides the second one behind it, and itself beyond the picture's edge."""
    occupied = np.zeros(OCC3D.shape, bool)
    occupied[150, :, :] = occupied[160, :, :] = True
    T = torch.eye(4)
    T[:3, :3] = torch.tensor([[0.0, 0.0, 1.0], [-1.0, 0.0, 0.0], [0.0, -1.0, 0.0]])  # looks along x
    T[2, 3] = 1.0
    K = torch.tensor([[40.0, 0.0, 20.0], [0.0, 40.0, 15.0], [0.0, 0.0, 1.0]])
    frame = SimpleNamespace(images=torch.zeros(1, 3, 30, 40), K=K[None], T_ego_cam=T[None])
    seen = O.in_sight(occupied, frame)
    assert seen[150, 100].any() and not seen[160].any() and not seen[150, :50].any() and not (seen & ~occupied).any()
