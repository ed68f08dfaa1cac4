"""common/metrics.py: the reference vectors, numbers worked out by hand, slow loops, and what must change no score."""

import io
import json
import math
from collections import Counter

import numpy as np
import pytest
import torch
from vectors import SHARED, load

from common import metrics as M

MASKED = {"none": "none", "lidar": "lidar", "camera": "camera", "camANDlidar": "both"}  # the vectors' names -> ours


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def random_frame(seed: int, shape=(8, 8, 4), classes=18) -> tuple[np.ndarray, ...]:
    """pred, gt, mask_camera, mask_lidar; pred right about half of the time."""
    g = rng(seed)
    gt = g.integers(0, classes, shape).astype(np.uint8)
    pred = np.where(g.random(shape) < 0.5, gt, g.integers(0, classes, shape)).astype(np.uint8)
    return pred, gt, g.random(shape) < 0.6, g.random(shape) < 0.4


def slow_confusion(pred, gt, mask, classes=18) -> np.ndarray:
    counts = np.zeros((classes, classes), np.int64)
    for x in range(gt.shape[0]):
        for y in range(gt.shape[1]):
            for z in range(gt.shape[2]):
                if (mask is None or mask[x, y, z]) and gt[x, y, z] < classes:
                    counts[gt[x, y, z], pred[x, y, z]] += 1
    return counts


# --- Occ3D -----------------------------------------------------------------------------------------------------------


def meter_of_case(v, case: str) -> M.OccupancyMeter:
    meter = M.OccupancyMeter()
    for k in range(len(v[f"{case}_gt"])):
        pred, gt, camera, lidar = (v[f"{case}_{name}"][k] for name in ("pred", "gt", "mask_camera", "mask_lidar"))
        meter.add(pred, gt, camera, lidar, group=f"scene-{k}")
    return meter


@pytest.mark.parametrize("case", "ABCD")
def test_vectors_occ3d_confusions(case):
    v = load("occ3d_miou")
    meter = meter_of_case(v, case)
    for name, mask in MASKED.items():
        camera, lidar = v[f"{case}_mask_camera"], v[f"{case}_mask_lidar"]
        masks = {"none": None, "camera": camera, "lidar": lidar, "both": camera & lidar}[mask]
        total = sum(M.occupancy_confusion(pred, gt, None if masks is None else masks[k]) for k,
                    (pred, gt) in enumerate(zip(v[f"{case}_pred"], v[f"{case}_gt"])))
        v.exact(f"{case}_hist_{name}", total)
        assert torch.equal(total, meter.confusion(mask)) and total.dtype == torch.int64


@pytest.mark.parametrize("case", "ABCD")
def test_vectors_occ3d_scores(case):
    v = load("occ3d_miou")
    meter = meter_of_case(v, case)
    for name, mask in MASKED.items():
        confusion = meter.confusion(mask)
        for peer, protocol in (("flashocc", "flashocc"), ("occnerf", "occnerf"), ("sparseocc_old", "sparseocc")):
            if f"{case}_{peer}_{name}_miou" in v:
                scores = M.occupancy_scores(confusion, protocol)
                v.close(f"{case}_{peer}_{name}_iou", scores["per_class"], 1e-12)
                v.close(f"{case}_{peer}_{name}_miou", scores["miou"], 1e-12)
        if f"{case}_selfsup15_miou_{name}" in v:  # an unverified convention: this only ties the name to the rule
            v.close(f"{case}_selfsup15_miou_{name}", M.occupancy_scores(confusion, "selfsup15")["miou"], 1e-12)
    scores = M.occupancy_scores(meter.confusion("camera"), "gausstr")
    v.close(f"{case}_gausstr_camera_miou", scores["miou"], 1e-12)
    v.close(f"{case}_gausstr_camera_iou", scores["iou"], 1e-12)


@pytest.mark.parametrize("case", "ABCD")
def test_vectors_selfocc(case):
    v = load("occ3d_miou")
    pred, gt, mask = (v[f"{case}_{name}"] for name in ("pred", "gt", "mask_camera"))
    confusion = meter_of_case(v, case).confusion("camera")
    scores = M.occupancy_scores(confusion, "selfocc")
    assert np.isnan([scores["per_class"][0], scores["per_class"][17]]).all()
    if (gt < 18).all():
        v.close(f"{case}_selfocc_camera_miou_pct", 100 * scores["miou"], 1e-4)
        v.close(f"{case}_selfocc_camera_occiou_pct", 100 * scores["iou"], 1e-4)
        v.close(f"{case}_selfocc_binary_iou_pct", 100 * scores["iou"], 1e-4)
        return
    # SelfOcc does not drop the unlabelled voxels (255) that Occ3D's labels never hold: each is an occupied voxel of no
    # class. With them counted back in, its numbers come out; ours drops them, as the contract of the confusion says.
    unlabelled = pred[mask & (gt >= 18)]
    extra = np.bincount(unlabelled, minlength=18)
    hit, seen, named = confusion.diagonal().numpy(), confusion.sum(1).numpy(), confusion.sum(0).numpy() + extra
    iou = [hit[c] / (seen[c] + named[c] - hit[c]) for c in range(1, 17)]
    v.close(f"{case}_selfocc_camera_miou_pct", 100 * np.mean(iou), 1e-4)
    full = extra[1:17].sum()
    both = confusion[1:17, 1:17].sum().item() + full
    union = confusion.sum().item() - confusion[[0, 17]][:, [0, 17]].sum().item() + len(unlabelled)
    v.close(f"{case}_selfocc_camera_occiou_pct", 100 * both / union, 1e-4)
    assert scores["miou"] > np.mean(iou)


@pytest.mark.parametrize("masked", [False, True])
def test_confusion_equals_a_triple_loop(masked):
    pred, gt, camera, _ = random_frame(1)
    gt[2, 3, 1] = gt[0, 0, 0] = 255
    mask = camera if masked else None
    assert np.array_equal(M.occupancy_confusion(pred, gt, mask), slow_confusion(pred, gt, mask))
    as_tensors = [torch.from_numpy(x).long() for x in (pred, gt)]
    assert np.array_equal(M.occupancy_confusion(*as_tensors, mask), slow_confusion(pred, gt, mask))


def test_confusion_of_other_class_counts_and_of_nothing():
    pred, gt, _, _ = random_frame(2, classes=5)
    assert np.array_equal(M.occupancy_confusion(pred, gt, classes=5), slow_confusion(pred, gt, None, 5))
    many_pred, many_gt, camera, _ = random_frame(2, classes=250)
    many = M.occupancy_confusion(many_pred, many_gt, camera, classes=250)
    assert np.array_equal(many, slow_confusion(many_pred, many_gt, camera, 250))
    nothing = M.occupancy_confusion(pred, gt, np.zeros(gt.shape, bool))
    assert nothing.shape == (18, 18) and nothing.sum() == 0
    assert math.isnan(M.occupancy_scores(nothing, "flashocc")["miou"])


def test_confusion_refuses_what_it_cannot_count():
    pred, gt, camera, _ = random_frame(4)
    with pytest.raises(ValueError, match="shape"):
        M.occupancy_confusion(pred[:4], gt)
    with pytest.raises(ValueError, match="shape"):
        M.occupancy_confusion(pred, gt, camera[:, :4])
    pred[0, 0, 0] = 18
    with pytest.raises(ValueError, match="18"):
        M.occupancy_confusion(pred, gt)
    with pytest.raises(ValueError, match="protocol"):
        M.occupancy_scores(np.zeros((18, 18)), "nobody")
    with pytest.raises(ValueError, match="shape"):
        M.occupancy_scores(np.zeros((17, 17)), "flashocc")


def test_protocols_differ_on_a_case_worked_out_by_hand():
    """10 voxels of car (8 found, 2 called free), 10 of others (5 found, 5 called car), 80 free (2 called bus)."""
    counts = np.zeros((18, 18), np.int64)
    counts[4, 4], counts[4, 17], counts[0, 0], counts[0, 4], counts[17, 17], counts[17, 3] = 8, 2, 5, 5, 78, 2
    car, others, free = 8 / 15, 5 / 10, 78 / 82
    scores = {name: M.occupancy_scores(counts, name) for name in M.PROTOCOLS}
    # bus is absent but predicted: 0 here, skipped by SparseOcc
    assert scores["flashocc"]["miou"] == pytest.approx((car + others + 0) / 3, abs=1e-15)
    assert scores["sparseocc"]["miou"] == pytest.approx((car + others) / 2, abs=1e-15)
    # others is empty, every class absent from the truth is worth 1, bus too
    assert scores["selfocc"]["miou"] == pytest.approx((car + 15 * 1) / 16, abs=1e-15)
    assert scores["selfsup15"]["miou"] == pytest.approx((car + 0) / 2, abs=1e-15)
    assert scores["occnerf"]["miou"] == scores["gausstr"]["miou"] == scores["flashocc"]["miou"]  # they differ in masks
    # occupied: 8 car + 10 others found as something, 2 missed, 2 invented
    assert scores["gausstr"]["iou"] == pytest.approx(18 / 22, abs=1e-15)
    # others empty: 8 found, 2 missed, 5 + 2 invented
    assert scores["selfocc"]["iou"] == pytest.approx(8 / 17, abs=1e-15)
    assert len({round(s["miou"], 6) for s in scores.values()}) == 4
    per_class = scores["flashocc"]["per_class"]
    assert len(per_class) == 18 and per_class[4] == pytest.approx(car) and per_class[17] == pytest.approx(free)
    assert per_class[3] == 0 and math.isnan(per_class[9]) and math.isnan(scores["sparseocc"]["per_class"][3])


def test_miou_of_many_resamples_is_one_call():
    counts = torch.from_numpy(rng(5).integers(0, 50, (7, 18, 18)))
    for protocol in M.PROTOCOLS:
        one_by_one = [M.occupancy_scores(c, protocol)["miou"] for c in counts]
        assert np.allclose(M.miou(counts, protocol), one_by_one, rtol=0, atol=1e-15)


# --- RayIoU ----------------------------------------------------------------------------------------------------------


def test_vectors_rayiou():
    v = load("rayiou")
    v.close("lidar_rays", M.lidar_ray_directions(), 1e-7)
    frames = [[v[f"s{k}_{name}"] for k in (0, 1)] for name in ("pred", "gt", "origins")]
    scores = M.ray_iou(*frames)
    v.close("rayiou", scores["rayiou"], 1e-3)
    v.close("rayiou_at_1_2_4", [scores[f"rayiou@{t}"] for t in (1, 2, 4)], 1e-3)
    v.close("rayiou_per_class", scores["per_class"], 1e-3)
    meter = M.OccupancyMeter()
    for pred, gt, origins in zip(*frames):
        meter.add(pred, gt, None, None, origins=origins)
    assert meter.metrics()["rayiou@2"] == scores["rayiou@2"]


@pytest.mark.parametrize("frame", [0, 1])
@pytest.mark.parametrize("what", ["gt", "pred"])
def test_vectors_single_rays(frame, what):
    v = load("rayiou")
    label, depth, met = M.cast_lidar(v[f"s{frame}_{what}"], v[f"s{frame}_origins"])
    index = v[f"s{frame}_ray_idx"]
    assert met.all()
    v.close(f"s{frame}_{what}_ray_depth", depth[index], 1e-3)
    assert (label[index].numpy() == v[f"s{frame}_{what}_ray_label"]).mean() >= 0.999
    v.passed()


def test_vectors_rays_that_never_enter_are_dropped():
    v = load("rayiou")
    gt, pred, origin = v["s1_gt"], v["s1_pred"], v["outside_origin"]
    label, depth, met = M.cast_lidar(gt, origin)
    assert (~met).sum() == v["outside_n_miss"]
    index, entering = v["outside_ray_idx"], met[v["outside_ray_idx"]].numpy()
    assert np.array_equal(entering, v["outside_gt_depth"] > 0)
    assert (label[index].numpy() == v["outside_gt_label"])[entering].mean() >= 0.999
    assert (np.abs(depth[index].numpy() - v["outside_gt_depth"])[entering] < 1e-3).mean() >= 0.998  # a tie at an edge
    score = M.ray_iou([pred], [gt], [origin])["rayiou"]
    v.close("outside_rayiou_without_misses", score, 1e-3)
    assert abs(score - v["outside_rayiou_peer"]) > 1e-2  # the peer also counts 8183 rays that meet nothing


def test_ray_iou_depth_thresholds_by_hand():
    """A wall across the road 20 m ahead, predicted 1.6 m farther. Rays leave its voxels through the back or, up to one
    voxel earlier, through a side: every error is at least 1.2 m, straight ahead it is 1.6 m, obliquely it is larger."""
    gt = np.full((200, 200, 16), 17, np.uint8)
    pred = gt.copy()
    gt[150], pred[154] = 15, 15
    origin = [np.array([[0.2, 0.2, 1.8]])]
    scores = M.ray_iou([pred], [gt], origin)
    assert scores["rayiou@1"] == 0 and 0 < scores["rayiou@2"] < scores["rayiou@4"] < 1
    assert all(math.isnan(row[4]) for row in scores["per_class"])
    assert M.ray_iou([gt], [gt], origin)["rayiou"] == 1
    free = M.ray_iou([np.full_like(gt, 17)], [gt], origin)
    assert free["rayiou"] == 0


def test_rays_without_truth_are_not_counted():
    """What a prediction invents where the truth is free (or unlabelled) costs nothing in RayIoU: its rule, not ours."""
    gt = np.full((200, 200, 16), 17, np.uint8)
    gt[150, :, :] = 15
    wrong = gt.copy()
    wrong[40, :, :] = 4  # behind the origin, where no gt ray hits
    origin = [np.array([[0.2, 0.2, 1.8]])]
    assert M.ray_iou([wrong], [gt], origin)["rayiou"] == 1
    gt[40, :, :] = 255
    assert M.ray_iou([wrong], [gt], origin)["rayiou"] == 1
    with pytest.raises(ValueError, match="RayIoU"):
        M.ray_iou([wrong[:100]], [gt[:100]], origin)


def test_rays_cached_or_not_count_the_same():
    g = rng(7)
    gt = np.where(g.random((200, 200, 16)) < 0.05, g.integers(0, 17, (200, 200, 16)), 17).astype(np.uint8)
    pred = np.roll(gt, 1, 1)
    origins = np.array([[0.9, 0.1, 1.8], [5.2, -3.1, 1.8]], np.float32)
    cached = M.ray_counts(pred, gt, origins, M.cast_lidar(gt, origins))
    assert torch.equal(cached, M.ray_counts(pred, gt, origins)) and cached.shape == (5, 17)
    assert (cached[2:] <= cached[0]).all() and (cached[2] <= cached[3]).all() and (cached[3] <= cached[4]).all()


# --- meter, constant predictor, lines --------------------------------------------------------------------------------


def filled_meter(frames=6, rays=False) -> tuple[M.OccupancyMeter, list]:
    meter, used = M.OccupancyMeter(), []
    for k in range(frames):
        used.append(random_frame(100 + k))
        meter.add(*used[-1], group=f"scene-{k % 3}")
    if rays:
        for k, group in enumerate(("scene-0", "scene-1", "scene-2")):
            meter.rays[group] = torch.from_numpy(rng(k).integers(20, 40, (5, 17)))
            meter.rays[group][2:] //= 2
    return meter, used


def test_meter_sums_of_scenes_equal_the_pooled_computation():
    meter, used = filled_meter()
    pick = {"camera": lambda c, l: c, "lidar": lambda c, l: l, "both": lambda c, l: c & l, "none": lambda c, l: None}
    for mask, choose in pick.items():
        pooled = sum(slow_confusion(p, g, choose(c, l)) for p, g, c, l in used)
        assert np.array_equal(meter.confusion(mask), pooled)
        scenes = meter.by_group()
        assert np.array_equal(sum(scenes[g][mask] for g in scenes), pooled)
        assert meter.metrics()[f"miou_{mask}"] == M.occupancy_scores(pooled, "flashocc")["miou"]
        assert meter.metrics()[f"iou_{mask}"] == M.occupancy_scores(pooled, "gausstr")["iou"]
        assert meter.metrics()[f"miou15_{mask}"] == M.occupancy_scores(pooled, "selfsup15")["miou"]
    for name, rule in M.PROTOCOLS.items():
        assert meter.metrics()[f"miou_{name}"] == M.occupancy_scores(meter.confusion(rule.mask), name)["miou"]


def test_meter_scores_any_resample_of_scenes():
    meter, used = filled_meter()
    drawn = ["scene-2", "scene-0", "scene-2"]
    pooled = sum(slow_confusion(*used[k][:3]) for group in drawn for k in range(6) if f"scene-{k % 3}" == group)
    assert meter.metrics(drawn)["miou_camera"] == M.occupancy_scores(pooled, "flashocc")["miou"]
    assert meter.metrics(drawn)["miou_camera"] != meter.metrics()["miou_camera"]


def test_meter_saves_loads_and_merges(tmp_path):
    meter, used = filled_meter(rays=True)
    meter.save(tmp_path / "by_scene.npz")
    loaded = M.OccupancyMeter.load(tmp_path / "by_scene.npz")
    assert loaded.metrics() == meter.metrics() and loaded.frames == meter.frames and "rayiou@4" in loaded.metrics()
    one, two = M.OccupancyMeter(), M.OccupancyMeter()
    for k, frame in enumerate(used):
        (one, two)[k % 2].add(*frame, group=f"scene-{k % 3}")
    one.merge(two)
    assert all(torch.equal(one.counts[g], meter.counts[g]) for g in meter.counts) and one.frames == meter.frames


def test_meter_without_a_mask_leaves_its_scores_out():
    pred, gt, camera, _ = random_frame(8)
    meter = M.OccupancyMeter()
    meter.add(pred, gt, camera, None)
    scores = meter.metrics()
    assert {"miou_camera", "miou_none", "miou_flashocc"} <= set(scores)
    assert not {"miou_lidar", "miou_both", "miou_occnerf", "rayiou"} & set(scores)
    assert set(meter.per_class()) == {"camera", "none"}
    meter.add(pred, gt, np.zeros_like(camera), np.zeros_like(camera))
    assert np.array_equal(meter.confusion("camera"), slow_confusion(pred, gt, camera))


def test_metrics_are_flat_finite_numbers_and_json():
    meter, _ = filled_meter(rays=True)
    names = {f"{k}_{mask}" for k in ("miou", "iou", "miou15") for mask in M.MASKS}
    names |= {f"miou_{p}" for p in M.PROTOCOLS} | {"iou_selfocc", "rayiou", "rayiou@1", "rayiou@2", "rayiou@4"}
    assert set(meter.metrics()) == names
    assert all(isinstance(v, float) and 0 <= v <= 1 for v in meter.metrics().values())
    json.dumps([meter.metrics(), meter.per_class()], allow_nan=False)
    empty = M.OccupancyMeter()
    empty.add(np.full((2, 2, 2), 17), np.full((2, 2, 2), 17), np.ones((2, 2, 2)), np.zeros((2, 2, 2)))
    assert empty.metrics().keys() == {"miou_selfocc"}  # SelfOcc's rule scores absent classes, the others score nothing
    assert empty.per_class()["camera"]["car"] is None and empty.per_class()["camera"]["free"] == 1


def test_printed_lines_are_the_fields_own():
    counts = np.zeros((2, 2, 2), np.uint8)
    gt, pred = counts + 4, counts + 4
    gt[0, 0, 0], pred[0, 0, 0] = 17, 4  # IoU of car 7/8
    meter = M.OccupancyMeter()
    meter.add(pred, gt, np.ones(gt.shape), np.zeros(gt.shape))
    text = io.StringIO()
    meter.print_table("a title", file=text)
    lines = text.getvalue().splitlines()
    assert lines[:3] == ["a title", "===> per class IoU of 1 samples:", "===> others - IoU = nan"]
    assert "===> car - IoU = 87.5" in lines and "===> mIoU of 1 samples: 87.5" in lines
    assert sum(line.startswith("===> ") and " - IoU = " in line for line in lines) == 17
    camera = next(line.split() for line in lines if line.startswith("camera"))
    assert camera == ["camera", "87.50", "87.50", "87.50"]
    assert any(line.split()[:2] == ["lidar", "nan"] for line in lines)


def test_constant_prediction_by_hand():
    counts = np.zeros((5, 1, 1, 18), np.uint16)
    for frame in ([4, 17, 17, 11], [4, 17, 4, 17], [17, 17, 4]):
        counts[np.arange(len(frame)), 0, 0, frame] += 1
    # 2x car; free; 2x car; 1x driveable, 1x free: the lower id; never labelled: free
    assert M.constant_prediction(counts).ravel().tolist() == [4, 17, 4, 11, 17]
    assert M.constant_prediction(torch.from_numpy(counts.astype(np.int64))).dtype == np.uint8


def test_protocol_line_names_everything():
    line = M.protocol_line("nuScenes", "v1.0-mini", "mini_val", 81, train_mask="none", eval_mask="camera", note="by L")
    parts = "nuScenes", "v1.0-mini", "mini_val", "81 frames", "200x200x16", "train none", "eval camera", "17", "by L"
    assert all(part in line for part in parts)
    assert "\n" not in line


# --- SemanticKITTI ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", "ABC")
def test_vectors_semantickitti(case):
    v = load("semantickitti_ssc")
    frame = v[f"{case}_pred_train"], v[f"{case}_gt_train"], v[f"{case}_invalid_unpacked"]
    v.exact(f"{case}_conf_pred_by_gt", M.ssc_confusion(*frame))
    keys = {"iou": "iou_completion", "miou": "iou_mean", "precision": "precision", "recall": "recall"}
    scores = M.ssc_scores(*frame)
    for name, key in keys.items():
        v.close(f"{case}_{key}", scores[name], 1e-9)
    v.close(f"{case}_class_iou", scores["per_class"], 1e-9)
    keys = {"iou": "iou", "miou": "iou_ssc_mean", "precision": "precision", "recall": "recall", "per_class": "iou_ssc"}
    scores = M.ssc_scores(*frame, protocol="monoscene")
    for name, key in keys.items():
        v.close(f"{case}_monoscene_{key}", scores[name], 1e-9)


def test_ssc_by_hand_and_by_loops():
    g = rng(9)
    pred, gt = g.integers(0, 20, (1, 8, 8, 4)), g.integers(0, 20, (1, 8, 8, 4))
    gt[0, :2] = 255
    invalid = (g.random(gt.shape) < 0.2).astype(np.uint8)
    slow = np.zeros((20, 20), np.int64)
    for index in np.ndindex(gt.shape):
        if gt[index] != 255 and invalid[index] != 1:
            slow[pred[index], gt[index]] += 1
    assert np.array_equal(M.ssc_confusion(pred, gt, invalid), slow)
    first, second = ([x[:, half] for x in (pred, gt, invalid)] for half in (slice(0, 4), slice(4, 8)))
    assert M.ssc_scores_of(M.ssc_confusion(*first) + M.ssc_confusion(*second)) == M.ssc_scores(pred, gt, invalid)
    # one car voxel found, one called road, one empty called car: completion 2 / 3, car 1 / 3, road 0 / 1, others absent
    pred, gt = np.array([[[[1, 9, 1, 0]]]]), np.array([[[[1, 1, 0, 0]]]])
    scores = M.ssc_scores(pred, gt, np.zeros_like(gt))
    assert scores["iou"] == pytest.approx(2 / 3) and scores["miou"] == pytest.approx((1 / 3) / 19)
    assert scores["precision"] == pytest.approx(2 / 3, abs=1e-6) and scores["recall"] == pytest.approx(1, abs=1e-6)
    assert scores["per_class"][0] == pytest.approx(1 / 2)


def test_ssc_prediction_without_a_class_raises_only_where_it_counts():
    gt = np.array([[[[0, 1, 255, 3]]]])
    pred = np.array([[[[0, 1, 255, 255]]]])
    assert M.ssc_scores(pred, gt, np.array([[[[0, 0, 0, 1]]]]))["iou"] == 1
    with pytest.raises(ValueError, match="255"):
        M.ssc_scores(pred, gt, np.zeros_like(gt))


# --- planning --------------------------------------------------------------------------------------------------------


def planning_case(v, case: str):
    shape = tuple(v[f"{case}_seg_shape"])
    seg = np.unpackbits(v[f"{case}_seg_packed"])[: np.prod(shape)].reshape(shape).astype(bool)
    return v[f"{case}_pred"], v[f"{case}_gt"], v[f"{case}_mask"], seg, np.zeros_like(seg)


@pytest.mark.parametrize("case", "AB")
def test_vectors_planning(case):
    v = load("planning_openloop")
    data = planning_case(v, case)
    steps = M.planning_errors(*data, "uniad")
    scores = M.planning_scores(*data, "uniad")
    for name, tolerance in (("l2", 1e-5), ("obj_col", 1e-7), ("obj_box_col", 1e-7)):
        # collisions are float32 shares of 40 or 6 samples: 1e-7 is exact
        v.close(f"{case}_uniad_{name.replace('l2', 'L2')}", steps[name].mean(0), tolerance)
        assert [scores[f"{name}_{s}s"] for s in (1, 2, 3)] == steps[name].mean(0)[[1, 3, 5]].tolist()
    for protocol in ("stp3", "vad"):
        scores = M.planning_scores(*data, protocol)
        report = np.array([[scores[f"{n}_{s}s"] for s in (1, 2, 3)] for n in ("l2", "obj_col", "obj_box_col")])
        expected = v[f"{case}_{protocol}_report"]
        assert np.abs(report[0] - expected[0]).max() <= 1e-5
        assert np.abs(report[2] - expected[2]).max() <= 1e-7
        if protocol == "stp3":  # row 1 of VAD's report is its misplaced point and is never matched
            assert np.abs(report[1] - expected[1]).max() <= 1e-7
        v.passed(3 if protocol == "stp3" else 2)


def test_vectors_ego_footprint():
    load("planning_openloop").exact("ego_footprint_rc", M.ego_footprint())


def test_vectors_rasterisation():
    v = load("planning_openloop")
    boxes, feats = v["R_boxes"], v["R_feats"][0]  # VAD's columns: 12 displacements, 6 masks, goal, 9 state, 6 turns
    place = feats[:, :12].reshape(-1, 6, 2).cumsum(1) + boxes[:, None, :2]
    yaw = -(boxes[:, 6] + np.float32(np.pi / 2))[:, None] + feats[:, 28:34].cumsum(1)
    alive, category = feats[:, 12:18] == 1, feats[:, 27].astype(int)
    for name, ids in (("veh", range(14, 24)), ("ped", range(2, 9))):
        rasters = []
        for t in range(6):
            there = [i for i in range(len(boxes)) if alive[i, t] and category[i] in ids]
            corners = [M.box_corners(*place[i, t], yaw[i, t], boxes[i, 4], boxes[i, 3]) for i in there]
            rasters.append(M.rasterize(corners, "vad"))
        assert np.array_equal(np.packbits(np.stack(rasters)), v[f"R_{name}_packed"])
        v.passed()


def still(batch: int = 1, forward: float = 0.0, right: float = 0.0) -> np.ndarray:
    return np.tile(np.array([right, forward], np.float32), (batch, 6, 1))


def occupied(*cells: tuple[int, int]) -> np.ndarray:
    grid = np.zeros((1, 6, 200, 200), bool)
    for row, column in cells:
        grid[:, :, row, column] = True
    return grid


NOTHING, ONES = occupied(), np.ones((1, 6, 2))
FAR = still(forward=30.0)  # a ground truth that collides with nothing


def test_planning_l2_by_hand():
    """Errors of 1, 2, .., 6 m at the six steps, one sample; a second one without error; the last step masked."""
    gt = np.zeros((2, 6, 2))
    pred = gt.copy()
    pred[0, :, 0] = np.arange(1, 7) * 0.6
    pred[0, :, 1] = np.arange(1, 7) * 0.8
    mask = np.ones((2, 6, 2))
    mask[0, 5] = 0
    none = np.zeros((2, 6, 200, 200), bool)
    at = M.planning_scores(pred, gt, mask, none, none, "uniad")
    assert [at[f"l2_{s}s"] for s in (1, 2, 3)] == pytest.approx([2 / 2, 4 / 2, 0], abs=1e-12)  # masked: zero error
    for protocol in ("stp3", "vad"):
        upto = M.planning_scores(pred, gt, mask, none, none, protocol)
        assert [upto[f"l2_{s}s"] for s in (1, 2, 3)] == pytest.approx([1.5 / 2, 2.5 / 2, 3.5 / 2], abs=1e-12)
    whole = M.planning_scores(pred, gt, mask, none, none, "vad", full_horizon=True)
    assert whole["l2_3s"] == 0
    assert M.planning_scores(pred, gt, mask[..., 0], none, none, "uniad") == at
    assert set(at) == {f"{n}_{s}s" for n in ("l2", "obj_col", "obj_box_col") for s in (1, 2, 3)}


@pytest.mark.parametrize("protocol, cell", [("uniad", (119, 105)), ("stp3", (119, 93)), ("vad", (80, 105))])
def test_point_cell_of_each_protocol(protocol, cell):
    """10 m ahead, 3 m to the right: (10 + 49.75) / 0.5 = 119.5 rows, (3 + 49.75) / 0.5 = 105.5 columns, truncated."""
    at = still(forward=10.0, right=3.0)
    hit = M.planning_scores(at, FAR, ONES, occupied(cell), NOTHING, protocol)
    assert hit["obj_col_3s"] == 1 and hit["obj_box_col_3s"] == 1
    row, column = cell
    others = [(r, c) for r in range(row - 1, row + 2) for c in range(column - 1, column + 2) if (r, c) != cell]
    miss = M.planning_scores(at, FAR, ONES, occupied(*others), NOTHING, protocol)
    assert miss["obj_col_3s"] == 0 and miss["obj_box_col_3s"] == 1


def test_vads_point_is_not_where_vad_looks():
    """At the origin VAD's own formula reads (49, 49), 25 m away; ours reads a cell of the car's own box."""
    here = still()
    assert M.planning_scores(here, FAR, ONES, occupied((49, 49)), NOTHING, "vad")["obj_col_3s"] == 0
    assert M.planning_scores(here, FAR, ONES, occupied((100, 99)), NOTHING, "vad")["obj_col_3s"] == 1
    rows, columns = (set(x.tolist()) for x in M.ego_footprint().unbind(1))
    assert 200 - 100 in rows and 99 in columns


def test_pedestrians_count_where_the_protocol_says():
    cells = {"uniad": (100, 99), "stp3": (100, 99), "vad": (100, 99)}
    for protocol, cell in cells.items():
        people = M.planning_scores(still(), FAR, ONES, NOTHING, occupied(cell), protocol)["obj_box_col_1s"]
        assert people == (0 if protocol == "uniad" else 1)


def test_a_step_where_the_recorded_drive_collides_is_left_out():
    cell = occupied((99, 99))
    cell[:, 2:] = False  # only the first two steps
    free = M.planning_scores(still(), FAR, ONES, cell, NOTHING, "stp3")
    assert free["obj_box_col_1s"] == 1 and free["obj_box_col_2s"] == 0.5
    own = M.planning_scores(still(), still(), ONES, cell, NOTHING, "stp3")
    assert own["obj_box_col_1s"] == own["obj_col_1s"] == 0


def test_off_the_grid_the_box_is_clipped_and_the_point_meets_nothing():
    away = still(forward=80.0)
    wall = occupied(*((199, c) for c in range(200)))
    scores = M.planning_scores(away, FAR, ONES, wall, NOTHING, "uniad")
    assert scores["obj_col_3s"] == 0 and scores["obj_box_col_3s"] == 1


def test_planning_equals_loops():
    g = rng(10)
    pred, gt = g.normal(0, 12, (5, 6, 2)).astype(np.float32), g.normal(0, 12, (5, 6, 2)).astype(np.float32)
    vehicles, people = g.random((2, 5, 6, 200, 200)) < 0.004
    mask = np.ones((5, 6, 2))
    for protocol in M.PLANNING_PROTOCOLS:
        steps = M.planning_errors(pred, gt, mask, vehicles, people, protocol)
        scene = vehicles if protocol == "uniad" else vehicles | people
        for b, t in np.ndindex(5, 6):
            def box_hits(x, y):
                hits = False
                for r in range(97, 105):
                    for c in range(98, 102):
                        row, column = y / 0.5 + r, (-x if protocol == "stp3" else x) / 0.5 + c
                        row = int(200 - row) if protocol == "vad" else int(row)
                        hits |= scene[b, t, min(max(row, 0), 199), min(max(int(column), 0), 199)]
                return bool(hits)

            ours, theirs = (box_hits(*(float(v) for v in path[b, t])) for path in (pred, gt))
            assert steps["obj_box_col"][b, t] == (ours and not theirs)
        assert 0 < steps["obj_box_col"].sum() < 30


def test_planning_refuses_wrong_shapes():
    with pytest.raises(ValueError, match="expected"):
        M.planning_scores(still()[:, :5], still()[:, :5], ONES[:, :5], NOTHING, NOTHING, "vad")
    with pytest.raises(ValueError, match="protocol"):
        M.planning_scores(still(), still(), ONES, NOTHING, NOTHING, "mean")


def test_planning_meter_equals_the_pooled_scores():
    g = rng(11)
    pred, gt = g.normal(0, 10, (6, 6, 2)), g.normal(0, 10, (6, 6, 2))
    mask = np.ones((6, 6), bool)
    mask[2, 4:] = False
    rasters = {p: (g.random((2, 6, 6, 200, 200)) < 0.003) for p in M.PLANNING_PROTOCOLS}
    meter = M.PlanningMeter()
    for k in range(6):
        meter.add(pred[k], gt[k], mask[k], {p: (r[0, k], r[1, k]) for p, r in rasters.items()}, group=f"scene-{k % 2}")
    scores = meter.metrics()
    for protocol, (vehicles, people) in rasters.items():
        expected = M.planning_scores(pred, gt, mask, vehicles, people, protocol, full_horizon=protocol != "uniad")
        assert meter.counted(protocol) == (6 if protocol == "uniad" else 5)
        for name, value in expected.items():
            assert scores[f"{name}_{protocol}"] == pytest.approx(value, abs=1e-12)
        assert scores[f"l2_avg_{protocol}"] == pytest.approx(np.mean([expected[f"l2_{s}s"] for s in (1, 2, 3)]))
    twice = meter.metrics(["scene-1", "scene-1"])
    assert twice["l2_3s_vad"] == pytest.approx(meter.metrics(["scene-1"])["l2_3s_vad"]) != scores["l2_3s_vad"]


def test_rasterize_by_hand():
    """A 4 m x 2 m car 10 m ahead, 5 m to the right, along the road: rows 56..64 m, columns 54..56 m from the corner."""
    box = [M.box_corners(5.0, 10.0, np.pi / 2, 4.0, 2.0)]
    expected = {"uniad": (slice(116, 125), slice(108, 113)), "stp3": (slice(116, 125), slice(88, 93)),
                "vad": (slice(76, 85), slice(108, 113))}  # fmt: skip
    for protocol, cells in expected.items():
        grid = np.zeros((200, 200), bool)
        grid[cells] = True
        assert np.array_equal(M.rasterize(box, protocol), grid)
        cells = np.tile(grid, (1, 6, 1, 1))
        at = M.planning_scores(still(forward=10.0, right=5.0), FAR, ONES, cells, NOTHING, protocol)
        assert at["obj_col_3s"] == at["obj_box_col_3s"] == 1  # the rasters lie where the protocol looks


# --- questions, open set, LIBERO-Plus --------------------------------------------------------------------------------


def test_vectors_nuscenes_qa():
    v = load("language_metrics")
    data = v["nuscenes_qa"]
    rows = [{**question, "pred": pred} for question, pred in zip(data["questions"], data["pred"], strict=True)]
    scores = M.qa_scores(rows)
    assert {group: list(value) for group, value in scores.items()} == data["report_correct_total_pct"]
    v.passed(len(scores))


def test_qa_by_hand():
    rows = [
        {"pred": "yes", "answer": "yes", "template_type": "exist", "num_hop": 0},
        {"pred": "Yes", "answer": "yes", "template_type": "exist", "num_hop": 1},  # nothing is normalised
        {"pred": "4", "answer": 4, "template_type": "count", "num_hop": 0},
    ]
    assert M.qa_scores(rows) == {
        "Overall": (2, 3, 66.67), "count": (1, 1, 100.0), "count_0": (1, 1, 100.0), "exist": (1, 2, 50.0),
        "exist_0": (1, 1, 100.0), "exist_1": (0, 1, 0.0),
    }  # fmt: skip
    assert M.qa_scores([]) == {"Overall": (0, 0, 0.0)}


def test_openset_by_hand():
    """unknown 0.9 and 0.4, known 0.4 and 0.1: 3 of 4 pairs in order, one tied: AUROC (3 + 1/2) / 4."""
    scores = M.openset_scores([0.9, 0.4, 0.4, 0.1], [True, True, False, False])
    assert scores == pytest.approx({"auroc": 3.5 / 4, "aupr": 0.5 * 1 + 0.5 * 2 / 3, "fpr95": 0.5})
    assert all(math.isnan(v) for v in M.openset_scores([1.0, 2.0], [True, True]).values())
    with pytest.raises(ValueError, match="NaN"):
        M.openset_scores([0.1, float("nan")], [True, False])


ROW = (71.2, 77.1, 89.9, 94.7, 94.0, 84.2, 84.3)  # pi0.5 in the paper's table: Camera .. Layout
COLUMNS = ("Camera", "Robot", "Lang", "Light", "Bg", "Noise", "Layout")


def test_libero_plus_average_of_a_published_row():
    assert M.libero_plus_average(dict(zip(COLUMNS, ROW))) == pytest.approx(84.17, abs=0.005)
    assert np.mean(ROW) == pytest.approx(85.06, abs=0.005)  # the plain mean is another number
    theirs = (75.6, 77.4, 88.6, 97.4, 97.7, 85.3, 86.6)  # pi0.5 + 3DVLA, reported as 86.0
    assert M.libero_plus_average(dict(zip(COLUMNS, theirs))) == pytest.approx(86.0, abs=0.1)
    names = ("Camera Viewpoints", "Robot Initial States", "Language Instructions", "Light Conditions",
             "Background Textures", "Sensor Noise", "Objects Layout")  # fmt: skip
    for others in (names, ("camera", "robot", "language", "light", "background", "noise", "layout")):
        assert M.libero_plus_average(dict(zip(others, ROW))) == M.libero_plus_average(dict(zip(COLUMNS, ROW)))
    with pytest.raises(ValueError, match="layout"):
        M.libero_plus_average(dict(zip(COLUMNS[:6], ROW)))
    with pytest.raises(ValueError, match="unknown"):
        M.libero_plus_average({**dict(zip(COLUMNS, ROW)), "Avg": 84.2})


def test_libero_plus_counts_are_the_files():
    path = SHARED / "real" / "libero_plus" / "task_classification.json"
    if not path.is_file():
        pytest.skip("shared/real/libero_plus is absent")
    counts = Counter(task["category"] for suite in json.loads(path.read_text()).values() for task in suite)
    assert sum(counts.values()) == sum(M.LIBERO_PLUS_TASKS.values()) == 10030
    for name, count in counts.items():
        only = {other: float(other == name) for other in counts}
        assert M.libero_plus_average(only) == pytest.approx(count / 10030, abs=1e-15)
