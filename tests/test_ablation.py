"""Claims: the sign before the run, nothing run twice, verdicts that known data must give, results from files alone."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from common import ablation as A
from common.files import InputError, read_json, write_json, write_npz
from common.metrics import OccupancyMeter, ray_scores
from common.train import write_result

RNG = np.random.default_rng(0)


def confusions(scenes: int, hit: float, rng: np.random.Generator, spread: float = 0.0, classes: int = 18) -> np.ndarray:
    """(S, K, K) counts [gt, pred] in which a share `hit` of each class's voxels is right, the rest goes anywhere."""
    out = np.zeros((scenes, classes, classes), np.int64)
    for s in range(scenes):
        for c in range(classes):
            total = int(rng.integers(200, 400))
            right = int(total * np.clip(hit + spread * rng.normal(), 0, 1))
            out[s, c] += np.bincount(rng.integers(0, classes, total - right), minlength=classes)
            out[s, c, c] += right
    return out


# --- scores and the bootstrap -----------------------------------------------------------------------------------------


def test_score_by_hand():
    counts = np.zeros((18, 18), np.int64)
    counts[4, 4], counts[4, 17], counts[11, 11], counts[17, 11], counts[17, 17] = 6, 2, 3, 1, 88
    # car: 6 of 6 + 2; driveable surface: 3 of 3 + 1; occupied: 9 of 100 - 88
    assert A.score(counts, "miou_camera") == pytest.approx((6 / 8 + 3 / 4) / 2)
    assert A.score(counts, "iou_none") == pytest.approx(9 / 12)
    assert A.score(np.array([[3, 4], [1, 4]]), "success").tolist() == [0.75, 0.25]
    with pytest.raises(InputError, match="metric miou_moon"):
        A.score(counts, "miou_moon")


def test_scores_of_a_batch_are_the_meter_s(tmp_path):
    """Every metric that OccupancyMeter prints can be remade from by_scene.npz."""
    meter = OccupancyMeter()
    for scene in ("b", "a", "a", "c"):
        pred, gt = (torch.from_numpy(RNG.integers(0, 18, (20, 20, 4))) for _ in range(2))
        camera, lidar = (torch.from_numpy(RNG.random((20, 20, 4)) < share) for share in (0.5, 0.2))
        meter.add(pred, gt, camera, lidar, scene)
    for scene in "abc":
        meter.rays[scene] = torch.from_numpy(np.sort(RNG.integers(1, 50, (5, 17)), axis=0)[::-1].copy())
    meter.save(tmp_path / "by_scene.npz")
    told = meter.metrics()
    assert len(told) >= 20
    for metric, value in told.items():
        scenes, counts = A.read_counts(tmp_path, metric)
        assert scenes == ["a", "b", "c"]
        assert A.score(counts.sum(0), metric) == pytest.approx(value, rel=1e-12), metric
        stacked = np.stack([counts.sum(0), counts[0] + 2 * counts[1]])  # batched as the bootstrap does
        assert A.score(stacked, metric)[0] == pytest.approx(value, rel=1e-12), metric
    assert A.score(meter.rays["a"].numpy(), "rayiou@2") == pytest.approx(ray_scores(meter.rays["a"])["rayiou@2"])


def test_verdicts_on_known_data():
    rng = np.random.default_rng(1)
    good, bad = (np.stack([confusions(12, hit, rng, 0.05) for _ in range(3)]) for hit in (0.7, 0.5))
    d = A.paired_difference(good, bad, "miou_camera")
    truth = np.mean([A.score(good[k].sum(0), "miou_camera") - A.score(bad[k].sum(0), "miou_camera") for k in range(3)])
    assert d.value == pytest.approx(truth) and d.low < d.value < d.high and d.low > 0 and d.verdict == "holds"
    assert A.paired_difference(bad, good, "miou_camera").verdict == "does not hold"
    again = A.paired_difference(good, bad, "miou_camera")
    assert again == d  # seeded
    none = A.paired_difference(good, good, "miou_camera")
    assert (none.value, none.low, none.high, none.verdict) == (0, 0, 0, "not resolved")


@pytest.mark.parametrize("truth", [0.0, 0.1])
def test_the_interval_covers_the_truth_about_as_often_as_it_says(truth):
    """Ten scenes, three seeds; noise by scene, by seed and by both. 95 % of 100 intervals: 95, give or take 2.2."""
    rng, covered = np.random.default_rng(2), 0
    for k in range(100):
        shared = rng.normal(0, 0.1, 10)
        arms = []
        for gain in (truth, 0):
            noise = sum(rng.normal(0, sd, shape) for sd, shape in ((0.04, (1, 10)), (0.01, (3, 1)), (0.02, (3, 10))))
            rate = 0.5 + gain + shared + noise
            arms.append(np.stack([(rate * 1e6).astype(int), np.full((3, 10), 10**6)], -1))
        d = A.paired_difference(*arms, "success", draws=400, seed=k)
        covered += d.low <= truth <= d.high
    assert 89 <= covered <= 99


def test_pairing_removes_what_scenes_share():
    """Scenes differ far more than arms do; unpaired intervals could not resolve this difference."""
    rng = np.random.default_rng(3)
    easy = rng.integers(5, 95, 30)
    worse = np.stack([easy, np.full(30, 100)], -1)[None]
    better = worse + np.array([2, 0])
    d = A.paired_difference(better, worse, "success")
    assert d.value == pytest.approx(0.02) and d.high - d.low < 1e-9 and d.verdict == "holds"


# --- running a claim --------------------------------------------------------------------------------------------------

CLAIM = A.Claim("time", "more time is better", {"short": {"past": 0}, "long": {"past": 13}}, (("long", "short"),))
HITS = {"short": 0.5, "long": 0.7}


def make_arm(folder: Path, arm: str, seed: int, hit: float, dataset="synthetic world", method="easyocc", **rules):
    """What an arm leaves behind: result.json and by_scene.npz of six scenes with a share `hit` of right voxels."""
    rng, meter = np.random.default_rng([seed, len(arm)]), OccupancyMeter()
    for s in range(6):
        counts = torch.zeros(4, 18, 18, dtype=torch.int64)
        counts[1] = torch.from_numpy(confusions(1, hit, rng, 0.05)[0])
        meter.counts[f"scene-{s}"], meter.frames[f"scene-{s}"] = counts, 1
    data = {"name": dataset, "version": "v1.0-mini", "split": "mini_val", "frames": 6}
    cost = {"params": 1000, "steps": 10, "train_s": 4.0 if arm == "long" else 2.0, "peak_gb": 1.0}
    rules = {"mask_eval": "camera"} | rules
    write_result(folder, method=method, preset="tiny", seed=seed, dataset=data, protocol=rules, metrics=meter.metrics(),
                 per_class={}, cost=cost)  # fmt: skip
    meter.save(folder / "by_scene.npz")


def run(out: Path, seeds: int = 3, claim: A.Claim = CLAIM, settings=None, only=None, calls=None, fail_at=None) -> dict:
    """run_claim with made-up arms. calls: list that collects (arm, seed); fail_at: the one that is killed."""
    def one_arm(arm, overrides, seed, folder):
        assert (out / "claim.json").is_file()  # the sign is on disk before anything runs
        assert overrides == claim.arms[arm]
        if calls is not None:
            calls.append((arm, seed))
        if (arm, seed) == fail_at:
            raise KeyboardInterrupt
        make_arm(folder, arm, seed, HITS.get(arm, 0.6), free=arm)

    return A.run_claim(claim, seeds, out, "tiny", settings or {"steps": 10}, one_arm, only)


def test_a_claim_runs_once_and_goes_on_after_a_kill(tmp_path, capsys):
    calls = []
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, calls=calls, fail_at=("long", 1))
    assert calls == [("short", 0), ("long", 0), ("short", 1), ("long", 1)]  # seed by seed: always paired
    assert not (tmp_path / "verdict.json").exists()
    calls.clear()
    verdict = run(tmp_path, calls=calls)
    assert calls == [("long", 1), ("short", 2), ("long", 2)]
    assert "3 of 6 runs are done" in capsys.readouterr().out
    (row,) = verdict["comparisons"]
    assert row["verdict"] == "holds" and row["expected"] == "long > short"
    assert row["seeds"] == [0, 1, 2] and row["scenes"] == 6
    assert row["step_ms_ratio"] == 2.0 and row["peak_gb_ratio"] == 1.0
    assert verdict["protocol"] == {"mask_eval": "camera"}  # what differs between arms is not everybody's protocol
    calls.clear()
    assert run(tmp_path, calls=calls) == verdict and not calls
    assert len(run(tmp_path, seeds=4, calls=calls)["arms"][0]["scores"]["miou_camera"]) == 4  # seeds may be added
    assert calls == [("short", 3), ("long", 3)]
    text = (tmp_path / "verdict.md").read_text()
    assert "**holds**" in text and "long > short" in text and "not run" not in text


def test_the_opposite_sign_does_not_hold(tmp_path):
    wrong = A.Claim("time", "less time is better", CLAIM.arms, (("short", "long"),))
    assert run(tmp_path, claim=wrong)["comparisons"][0]["verdict"] == "does not hold"


def test_arms_that_were_not_run_say_so(tmp_path):
    verdict = run(tmp_path, seeds=1, only=("short",))
    assert verdict["comparisons"][0]["verdict"] == "not run"
    text = A.markdown(verdict)
    assert "| long | not run | not run | not run | not run |" in text
    assert "(1 seed)" in A.markdown(run(tmp_path, seeds=1))


def test_nothing_declared_can_change_afterwards(tmp_path):
    run(tmp_path, seeds=1)
    written = read_json(tmp_path / "claim.json")
    assert written["expected"] == [{"better": "long", "worse": "short", "metric": "miou_camera"}] and written["written"]
    for changed in (
        dict(claim=A.Claim("time", "more time is better", CLAIM.arms, (("short", "long"),))),
        dict(claim=A.Claim("time", "more time is better", CLAIM.arms, CLAIM.pairs, metric="miou_none")),
        dict(claim=A.Claim("time", "more time is better", CLAIM.arms | {"long": {"past": 5}}, CLAIM.pairs)),
        dict(claim=A.Claim("time", "another sentence", CLAIM.arms, CLAIM.pairs)),
        dict(settings={"steps": 11}),
    ):
        with pytest.raises(InputError, match="written before the runs"):
            run(tmp_path, seeds=1, **changed)
    assert read_json(tmp_path / "claim.json") == written
    (tmp_path / "claim.json").unlink()
    with pytest.raises(InputError, match="no claim.json"):
        run(tmp_path, seeds=1)
    more = A.Claim("time", "more time is better", CLAIM.arms | {"mid": {"past": 3}}, (*CLAIM.pairs, ("mid", "short")))
    run(tmp_path / "b", seeds=1)
    assert len(run(tmp_path / "b", seeds=1, claim=more)["comparisons"]) == 2  # an arm may be added


def test_unpaired_or_doctored_arms_are_refused(tmp_path):
    run(tmp_path, seeds=1)
    folder = tmp_path / "long" / "seed0"
    whole = read_json(folder / "result.json")
    write_json(folder / "result.json", whole | {"metrics": {"miou_camera": 0.9}})
    with pytest.raises(InputError, match="says miou_camera 0.9"):
        run(tmp_path, seeds=1)
    write_json(folder / "result.json", whole | {"protocol": {"mask_eval": "none"}})
    with pytest.raises(InputError, match="different data or under different rules"):
        run(tmp_path, seeds=1)
    write_json(folder / "result.json", whole)
    meter = OccupancyMeter.load(folder / "by_scene.npz")
    for table in (meter.counts, meter.frames):
        table["another"] = table.pop("scene-0")
    meter.save(folder / "by_scene.npz")
    with pytest.raises(InputError, match="arms must be paired"):
        run(tmp_path, seeds=1)


def test_episodes(tmp_path):
    claim = A.Claim("policy", "b is better", {"a": {}, "b": {}}, (("b", "a"),), metric="success")

    def one_arm(arm, overrides, seed, folder):
        success, names = np.full(20, 3 if arm == "a" else 6), np.array([f"e{k:02d}".encode() for k in range(20)])
        write_npz(folder / "by_scene.npz", groups=names, success=success, trials=np.full(20, 10))
        data = {"name": "synthetic tabletop", "version": "1", "split": "test", "frames": 200}
        cost = {"params": 1, "steps": 1, "train_s": 1, "peak_gb": 1}
        write_result(folder, method="threedvla", preset="tiny", seed=seed, dataset=data, protocol={"truth": "success"},
                     metrics={"success": success.sum() / 200}, per_class={}, cost=cost)  # fmt: skip

    verdict = A.run_claim(claim, 2, tmp_path, "tiny", {}, one_arm)
    (row,) = verdict["comparisons"]
    assert row["difference"] == pytest.approx(0.3) and row["verdict"] == "holds"


# --- RESULTS.md -------------------------------------------------------------------------------------------------------


def test_results_page_keeps_synthetic_and_real_apart(tmp_path, capsys):
    results = tmp_path / "results"
    make_arm(results / "demo", "short", 0, 0.5)
    make_arm(results / "demo2", "short", 1, 0.6)
    make_arm(results / "real", "short", 0, 0.4, dataset="nuScenes", method="loc")
    run(tmp_path / "runs" / "time", seeds=1)
    A.main(["publish", str(tmp_path / "runs" / "time"), str(results / "time")])
    assert (results / "time" / "long" / "seed0" / "result.json").is_file()
    assert not list((results / "time").rglob("*.npz"))
    A.main(["table", "--results", str(results), "--out", str(tmp_path / "RESULTS.md")])
    page = (tmp_path / "RESULTS.md").read_text()
    synthetic, real = page.split("## Real data")
    value = read_json(results / "demo" / "result.json")["metrics"]["miou_camera"]
    assert f"| easyocc | tiny | 0 | {100 * value:.2f} |" in synthetic and "| easyocc | tiny | 1 |" in synthetic
    assert "| loc | tiny | 0 |" in real and "nuScenes v1.0-mini" in real and "nuScenes" not in synthetic
    assert "| easyocc | not run |" in real and "| loc | not run |" in synthetic and "| threedvla | not run |" in real
    assert "long > short" in synthetic and "long > short" not in real
    assert synthetic.count("| easyocc | tiny |") == 2  # a claim's arms are in the claim's table only
    assert page == A.results_page(results)
    make_arm(results / "odd", "short", 0, 0.5, dataset="my data")
    with pytest.raises(InputError, match="'my data' is neither"):
        A.results_page(results)


def test_label_quality_is_printed_published_and_on_the_page(tmp_path, capsys):
    dataset = {"name": "synthetic driving world", "version": "v1.0-trainval", "split": "train", "frames": 3}
    rows = {"fused": {"precision": 0.5, "s/keyframe": 1.25}, "single": {"precision": 0.25}}
    A.write_quality(tmp_path / "runs" / "q", "loc", dataset, {"knn_k": 5}, rows)
    printed = capsys.readouterr().out
    assert "v1.0-trainval train, 3 frames, percent" in printed and "50.0" in printed and "1.25" in printed
    A.publish(tmp_path / "runs" / "q", tmp_path / "results" / "q")
    synthetic, real = A.results_page(tmp_path / "results").split("## Real data")
    assert "| fused | 50.0 | 1.25 |" in synthetic and "| single | 25.0 |  |" in synthetic and "Label quality, loc" not in real


def test_publish_takes_the_small_files_and_no_machine_s_paths(tmp_path):
    run_folder = tmp_path / "runs" / "x"
    make_arm(run_folder, "short", 0, 0.5)
    with pytest.raises(InputError, match="config.json: file not found"):
        A.publish(run_folder, tmp_path / "to")
    command = "python easyocc.py train --data-root {}nuscenes --out runs/x"
    root = "/home/me/data/"
    write_json(run_folder / "config.json", {"data": {"root": f"{root}nuscenes"}, "command": command.format(root)})
    (run_folder / "log.jsonl").write_text("".join(json.dumps({"step": s}) + "\n" for s in range(50)))
    A.publish(run_folder, tmp_path / "to")
    assert sorted(p.name for p in (tmp_path / "to").iterdir()) == ["config.json", "log_tail.jsonl", "result.json"]
    tail = (tmp_path / "to" / "log_tail.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in tail] == list(range(30, 50))
    config = read_json(tmp_path / "to" / "config.json")
    assert config["data"]["root"] == "nuscenes" and config["command"] == command.format("")


@pytest.mark.parametrize(
    "words", ["", "tabel", "table --result x", "table --results", "publish x", "table --results /nowhere"])
def test_command_line_mistakes(words, capsys):
    with pytest.raises(SystemExit) as stop:
        A.main(words.split())
    err = capsys.readouterr().err
    assert stop.value.code == 2 and err.startswith("error: ") and err.count("\n") == 1
