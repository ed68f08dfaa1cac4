"""The report of a driving VLM: baselines, scores, reference vectors, what skipping costs, questions about any
images."""

from pathlib import Path

import numpy as np
import pytest
import torch

from common.audit import planning_truth
from common.files import InputError, write_json
from common.metrics import PlanningMeter
from common.networks.paligemma import PaliGemma, SIZES, random_host
from common.nuscenes import CAMERAS, Future, NuScenesOccupancy
from common.questions import sentences
from common.report import planning as P
from vectors import load

DRIVELM = Path(__file__).resolve().parents[2] / "shared/real/drivelm"


def straight(speeds: list[float]) -> np.ndarray:
    return np.stack([np.zeros(6), np.cumsum(speeds) * 0.5], 1)


def circle(radius: float, speed: float, steps) -> np.ndarray:
    """Positions at half-second steps on a left circle through the origin, heading forward there."""
    angle = speed * 0.5 * np.asarray(steps) / radius
    return np.stack([-radius * (1 - np.cos(angle)), radius * np.sin(angle)], 1)


def future_of(trajectory, history=None, known=4, command=2, mask=6) -> Future:
    history = np.zeros((4, 2)) if history is None else history
    speed = float(np.linalg.norm(history[-1])) * 2
    return P.unknown_future()._replace(
        trajectory=np.asarray(trajectory, np.float32), mask=np.arange(6) < mask, command=command, speed=speed,
        history=np.asarray(history, np.float32), history_mask=np.arange(4) >= 4 - known)


def test_motion_baselines_are_exact_on_their_own_motion():
    line = future_of(circle(1e9, 6.0, range(1, 7)), circle(1e9, 6.0, range(-4, 0)))
    bend = future_of(circle(20.0, 6.0, range(1, 7)), circle(20.0, 6.0, range(-4, 0)), command=1)
    baselines = P.Baselines([line, bend])
    on_line, on_bend = baselines(line), baselines(bend)
    assert list(on_line) == list(P.Baselines.NAMES)
    np.testing.assert_allclose(on_line["cv"], line.trajectory, atol=1e-3)
    np.testing.assert_allclose(on_line["ctr"], line.trajectory, atol=1e-3)
    np.testing.assert_allclose(on_bend["ctr"], bend.trajectory, atol=2e-2)
    assert np.abs(on_bend["cv"] - bend.trajectory).max() > 3
    np.testing.assert_allclose(on_bend["mean"], (line.trajectory + bend.trajectory) / 2, atol=1e-5)
    np.testing.assert_allclose(on_bend["mean_command"], bend.trajectory, atol=1e-5)
    np.testing.assert_allclose(on_line["ego_mlp"], line.trajectory, atol=0.5)  # fitted to these two
    np.testing.assert_allclose(on_bend["ego_mlp"], bend.trajectory, atol=0.5)
    assert np.allclose(on_line["cv_tables"], on_line["cv"])
    first = baselines(line._replace(history_mask=np.zeros(4, bool)))  # no past: its history copies the future
    np.testing.assert_allclose(first["cv_tables"], line.trajectory, atol=1e-3)
    assert np.allclose(first["cv"], first["mean"]) and np.allclose(first["ctr"], first["mean"])


def test_trees_read_the_speed_alone():
    """Eight slow drives that go on and eight fast ones that stop."""
    slow, fast = (future_of(straight([v] * 6 if v < 5 else [0] * 6), straight([v] * 6)[:4] - [0, 2.5 * v])
                  for v in (2.0, 9.0))
    trees = P.Baselines([slow, fast] * 50)
    assert np.allclose(trees(slow)["speed_trees"], slow.trajectory, atol=0.3)
    assert np.allclose(trees(fast)["speed_trees_command"], fast.trajectory, atol=0.3)
    other = slow._replace(history=slow.history * np.float32([[5, 5]] * 3 + [[1, 1]]), command=0)
    assert np.array_equal(trees(other)["speed_trees"], trees(slow)["speed_trees"])


def test_words_alone_answer_what_words_give_away():
    rows = [{"question": f"Is the {x} {y}?", "answer": "yes" if x == "bus" else "no"}
            for x in ("bus", "car") for y in ("red", "big", "far")]
    blind = P.WordBaseline(rows)
    assert blind(["Is the bus near?", "Is the car near?"]) == ["yes", "no"]
    assert P.WordBaseline(rows[:3])(["?"]) == ["yes"]


def test_gates_compare_the_right_numbers():
    metrics = {"qa_balanced": 0.7, "qa_balanced_shuffled": 0.45, "l2_avg": 1.0, "l2_avg_shuffled": 1.5,
               "l2_avg_ego_mlp": 0.9, "history_l2_avg_vad": 0.95, "l2_avg_speed_trees": 1.2}
    found = P.gates(metrics)
    assert found == pytest.approx({"images": 0.25, "history": -0.05, "plans": 0.5, "speed": 0.2})
    assert [found[name] >= least for name, (_, least) in P.GATES.items()] == [True, False, True, True]
    assert all(np.isnan(value) for value in P.gates({}).values())


def test_rasters_are_kept_small(tiny_world, tmp_path):
    """1.4 MB of rasters a keyframe are some kB in memory, and come back bit for bit."""
    dataset = NuScenesOccupancy(tiny_world, None, "all", cache=tmp_path / "cache", parts=())
    i = next(i for i in range(len(dataset)) if dataset.future(i).mask.any())
    plans, (path, mask, rasters) = P.Plans(dataset, [i]), planning_truth(dataset, i)
    assert list(plans) == [i] and len(plans.kept[i][-1]) < 50_000
    assert np.array_equal(plans[i][0], path) and np.array_equal(plans[i][1], mask)
    for name, pair in rasters.items():
        assert all(np.array_equal(a, b) for a, b in zip(plans[i][2][name], pair, strict=True))


def test_full_horizons_leave_masked_steps_out():
    """UniAD counts a masked step as 0: its averages over full horizons are reported, the others named."""
    nothing = (np.zeros((6, 200, 200), bool),) * 2
    meter, empty = PlanningMeter(), {name: nothing for name in ("uniad", "stp3", "vad")}
    for mask in (6, 2):
        meter.add(np.zeros((6, 2)), straight([2.0] * 6), np.arange(6) < mask, empty)
    found = P.plan_metrics({"none": meter}, "none")
    assert found["l2_3s_uniad"] == pytest.approx(6) and found["l2_3s_uniad_masked"] == pytest.approx(3)


def test_ask_says_that_no_head_plans_from_images_alone(capsys):
    found = P.Prediction(np.zeros(0), ["yes"], ["yes"], "thought", None, {"speed+command": np.zeros((6, 2))})
    P.ask(lambda files, questions: found, [P.Asked("", [], [("Any cars?", "")])])
    text = capsys.readouterr().out
    assert "no head plans from images alone" in text and "speed+command" in text


def test_baselines_leave_out_unknown_waypoints():
    full, part = future_of(straight([4.0] * 6)), future_of(straight([8.0] * 2 + [0] * 4), mask=2)
    np.testing.assert_allclose(P.Baselines([full, part])(full)["mean"][:, 1], [3, 6, 6, 8, 10, 12], atol=1e-5)
    with pytest.raises(InputError, match="none of the 1 training keyframes"):
        P.Baselines([future_of(np.zeros((6, 2)), mask=0)])


def test_standing_on_is_neither_turning_nor_braking():
    stand, brake = np.zeros((6, 2)), np.array([[0, 2], [0, 3], [0, 3.5], [0, 3.6], [0, 3.7], [0, 3.7]])
    empty = {"vad": (np.zeros((6, 200, 200), bool),) * 2}
    for path, action, counted in ((stand, ("stop", "straight"), 0), (brake, ("stop", "straight"), 1),
                                  (brake, ("keep", "straight"), 0), (brake, ("decelerate", "straight"), 1),
                                  (brake, ("keep", "left"), 1)):
        scores = P.Scores(["none"])
        scores.add_plans({"none": path}, (path, np.ones(6, bool), empty), action, "s")
        assert scores.plans["none"].samples == 1 and scores.hard["none"].samples == counted


def test_best_constant_of_each_type():
    pairs = (("exist", "no"), ("exist", "yes"), ("exist", "yes"), ("count", 3), ("count", "0"))
    rows = [{"template_type": kind, "answer": answer} for kind, answer in pairs]
    assert P.best_constants(rows) == {"exist": "yes", "count": "0"}


def test_vectors_question_scores():
    """The report of NuScenes-QA's own script, through the table that `eval` prints."""
    v = load("language_metrics")
    part, scores = v["nuscenes_qa"], P.Scores()
    scores.questions = [{**q, "pred": p} for q, p in zip(part["questions"], part["pred"], strict=True)]
    ours = scores.qa()
    for name, (correct, total, _) in part["report_correct_total_pct"].items():
        kind, _, hop = name.rpartition("_")
        key = "accuracy" if name == "Overall" else f"{kind}_h{hop}" if hop in ("0", "1") else name
        assert ours[f"qa_{key}"] == pytest.approx(correct / total), name
    v.passed(len(part["report_correct_total_pct"]))


@pytest.mark.parametrize("case", "AB")
def test_vectors_planning_scores(case):
    """Reference trajectories scored as `eval` scores a planner: sample by sample, scene by scene."""
    v = load("planning_openloop")
    pred, gt, mask = (v[f"{case}_{name}"] for name in ("pred", "gt", "mask"))
    shape = v[f"{case}_seg_shape"]
    seg = np.unpackbits(v[f"{case}_seg_packed"])[: np.prod(shape)].reshape(shape).astype(bool)
    known = (mask[..., 0] if mask.ndim == 3 else mask) > 0
    scores = P.Scores(["none"])
    for k in range(len(pred)):
        obstacles = {protocol: (seg[k], np.zeros_like(seg[k])) for protocol in ("uniad", "stp3", "vad")}
        scores.add_plans({"none": pred[k].astype(np.float64)}, (gt[k], known[k], obstacles), None,
                         f"scene-{k % 3}")
    metrics, expected = P.plan_metrics(scores.plans, "none"), v[f"{case}_uniad_L2"]
    collision = v[f"{case}_uniad_obj_box_col"]
    for s in (1, 2, 3):
        assert metrics[f"l2_{s}s_uniad_masked"] == pytest.approx(float(expected[2 * s - 1]), abs=1e-5)
        assert metrics[f"obj_box_col_{s}s_uniad_masked"] == pytest.approx(float(collision[2 * s - 1]), abs=1e-6)
    v.passed(6)
    if known.all():  # ST-P3 and VAD count full horizons alone
        for protocol in ("stp3", "vad"):
            report = v[f"{case}_{protocol}_report"]
            ours = [[metrics[f"{m}_{s}s_{protocol}"] for s in (1, 2, 3)] for m in ("l2", "obj_box_col")]
            assert ours[0] == pytest.approx(report[0].tolist(), abs=1e-5)
            assert ours[1] == pytest.approx(report[2].tolist(), abs=1e-6)
            v.passed(2)
    for scene in scores.plans["none"].by_group():
        scores.scenes[scene] = None
    if known.all(1).any():
        sums = P.sum_metrics(P.scene_sums(scores, scores, "none"))
        assert -sums["minus_l2"] == pytest.approx(metrics["l2_avg_vad"], rel=1e-6)


def test_sums_by_scene_give_the_metrics():
    sums = {"a": np.array([[[1.0, 2.0], [0, 0]], [[2.0, 4.0], [1.0, 1.0]]]), "b": np.zeros((2, 1, 2))}
    assert P.sum_metrics(sums) == {"a": pytest.approx((3 / 6 + 1) / 2)}  # undefined ones are left out


def test_skipping_cost_finds_a_difference_and_the_memory():
    torch.manual_seed(0)
    vlm = PaliGemma(random_host(SIZES["toy"][0], sentences()), len(CAMERAS), "image+prompt").eval()
    images = torch.rand(1, 6, 3, 32, 32)

    def own(stream: bool, wrong: float = 0.0):
        logits, decode = vlm.own_pass(vlm.read_prefix(vlm.encode(images)), "go")
        if stream:
            torch.ones(4_000_000).sum()
        return logits + wrong * stream, decode

    found = P.skipping_cost(own, lambda: vlm.plain_pass(images, "go"), torch.device("cpu"), rounds=1)
    assert found["skip_difference_text"] == 0 and found["plain_difference_text"] < 1e-5
    kinds = ("prefill", "decode", "memory")
    assert {f"{k}_{m}_over_plain" for k in kinds for m in ("off", "on")} <= set(found)
    assert found["memory_off_over_plain"] < 1.1 < found["memory_on_over_plain"]
    found = P.skipping_cost(lambda s: own(s, 0.5), lambda: vlm.plain_pass(images, "go"), torch.device("cpu"),
                            1)
    assert found["skip_difference_text"] == pytest.approx(0.5, abs=1e-6)


@pytest.mark.skipif(not DRIVELM.is_dir(), reason="shared/real/drivelm absent")
def test_drivelms_keyframes_and_questions():
    asked = P.read_drivelm(DRIVELM / "qa/test_eval.json")
    assert asked and all(path.is_file() for frame in asked for path in frame.images)
    assert all(frame.questions for frame in asked)


def test_wrong_questions_are_one_line(tmp_path):
    with pytest.raises(InputError, match=r"5 files, expected 6 \(CAM_FRONT"):
        P.read_asked(["x"] * 5, "What?")
    with pytest.raises(InputError, match="needs --images"):
        P.read_asked(None, "What?")
    frames = {"frame-7": {"image_paths": {"CAM_FRONT": "x.jpg"}, "QA": {}}}
    write_json(tmp_path / "d.json", {"s": {"key_frames": frames}})
    far = future_of(np.full((6, 2), np.inf))
    with pytest.raises(InputError, match="the ego-history MLP is not finite"):
        P.Baselines([far, far])
    with pytest.raises(InputError, match="frame-7 has no CAM_FRONT_RIGHT"):
        P.read_drivelm(tmp_path / "d.json")
