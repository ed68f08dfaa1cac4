"""Claims: sign and gates before the run, nothing run twice, verdicts that known data must give, results from files."""

import json
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import torch

from common import cli
from common.files import InputError, read_json, write_json, write_npz
from common.metrics import OccupancyMeter, ray_scores
from common.train import write_result
from experiments import runner as A
from experiments import table

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


def test_differences_on_known_data():
    rng = np.random.default_rng(1)
    good, bad = (np.stack([confusions(12, hit, rng, 0.05) for _ in range(3)]) for hit in (0.7, 0.5))
    d = A.paired_difference(good, bad, "miou_camera")
    truth = np.mean([A.score(good[k].sum(0), "miou_camera") - A.score(bad[k].sum(0), "miou_camera") for k in range(3)])
    assert d.value == pytest.approx(truth) and d.low < d.value < d.high and d.low > 0
    assert A.paired_difference(bad, good, "miou_camera").high < 0
    assert A.paired_difference(good, bad, "miou_camera") == d  # seeded
    assert A.paired_difference(good, good, "miou_camera") == (0, 0, 0)


@pytest.mark.parametrize("low, high, seeds, gate, words", [
    (0.1, 0.2, 3, "", "holds"), (-0.2, -0.1, 4, "", "does not hold"), (-0.1, 0.1, 3, "", "not resolved"),
    (0.1, 0.2, 1, "", "one seed"), (-0.2, -0.1, 2, "", "two seeds"), (0.1, 0.2, 0, "", "not run"),
    (float("nan"), float("nan"), 3, "", "not resolved"), (0.1, 0.2, 3, "too low", "gate not met: too low"),
])  # fmt: skip
def test_the_verdict_needs_three_seeds_and_its_gates(low, high, seeds, gate, words):
    assert A.verdict({"seeds": list(range(seeds)), "interval": [low, high], "gate": gate}) == words


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
    assert d.value == pytest.approx(0.02) and d.high - d.low < 1e-9 and d.low > 0


# --- running a claim --------------------------------------------------------------------------------------------------

CLAIM = A.Claim("time", "more time is better", {"short": {"past": 0}, "long": {"past": 13}}, (("long", "short"),))
HITS = {"short": 0.5, "long": 0.7}


def make_arm(folder: Path, arm: str, seed: int, hit: float, dataset="synthetic world", method="easyocc", more=None,
             **rules):
    """What an arm leaves behind: result.json and by_scene.npz of six scenes with a share `hit` of right voxels."""
    rng, meter = np.random.default_rng([seed, len(arm)]), OccupancyMeter()
    for s in range(6):
        counts = torch.zeros(4, 18, 18, dtype=torch.int64)
        counts[1] = torch.from_numpy(confusions(1, hit, rng, 0.05)[0])
        meter.counts[f"scene-{s}"], meter.frames[f"scene-{s}"] = counts, 1
    data = {"name": dataset, "version": "v1.0-mini", "split": "mini_val", "frames": 6}
    cost = {"params": 1000, "steps": 10, "train_s": 4.0 if arm == "long" else 2.0, "peak_gb": 1.0}
    rules = {"mask_eval": "camera"} | rules
    write_result(folder, method=method, preset="tiny", seed=seed, dataset=data, protocol=rules,
                 metrics=meter.metrics() | (more or {}), per_class=meter.per_class(), cost=cost)
    meter.save(folder / "by_scene.npz")


def run(out: Path, seeds: int = 3, claim: A.Claim = CLAIM, settings=None, only=None, calls=None, fail_at=None,
        more=None) -> dict:
    """run_claim with made-up arms. calls: list that collects (arm, seed); fail_at: the one that is killed."""

    def one_arm(arm, overrides, seed, folder):
        assert (out / "claim.json").is_file()  # the sign is on disk before anything runs
        assert overrides == claim.arms[arm]
        if calls is not None:
            calls.append((arm, seed))
        make_arm(folder, arm, seed, HITS.get(arm, 0.6), free=arm, more=more)
        if (arm, seed) == fail_at:  # killed between the two files
            (folder / "by_scene.npz").unlink()
            raise KeyboardInterrupt

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
    assert (row["verdict"], row["better"], row["worse"]) == ("holds", "long", "short")
    assert row["seeds"] == [0, 1, 2] and row["scenes"] == 6
    assert verdict["protocol"] == {"mask_eval": "camera"}  # what differs between arms is not everybody's protocol
    assert verdict["runs"]["free"] == ["short"] * 3 + ["long"] * 3 and verdict["runs"]["steps"] == 10
    calls.clear()
    assert run(tmp_path, calls=calls) == verdict == read_json(tmp_path / "verdict.json") and not calls
    assert len(A.scores_of(run(tmp_path, seeds=4, calls=calls), "short", "miou_camera")) == 4  # seeds may be added
    assert calls == [("short", 3), ("long", 3)]


def test_the_opposite_sign_does_not_hold(tmp_path):
    wrong = A.Claim("time", "less time is better", CLAIM.arms, (("short", "long"),))
    assert run(tmp_path, claim=wrong)["comparisons"][0]["verdict"] == "does not hold"


def test_arms_are_named_by_several_words():
    claim = A.Claim("x", "x", {"OccLE 1 %": {}, "OccLE 10 %": {}, "all": {}, "all of it": {}}, ())
    assert A.arms_of(("OccLE", "10", "%", "all of it", "all"), claim) == ("OccLE 10 %", "all of it", "all")
    with pytest.raises(A.InputError, match="--arms OccLE 20 %: x has OccLE 1 %"):
        A.arms_of(("all", "OccLE 20 %"), claim)


def test_arms_that_were_not_run_say_so(tmp_path, capsys):
    verdict = run(tmp_path, seeds=1, only=("short",))
    assert verdict["comparisons"][0]["verdict"] == "not run" and "long                     not run" in capsys.readouterr().out
    assert run(tmp_path, seeds=1)["comparisons"][0]["verdict"] == "one seed"


def test_gates(tmp_path, capsys):
    """Both arms below the constant predictor; a claim's own gates, written first; one arm above is enough otherwise."""
    high, low = {"constant_miou_camera": 0.99, "constant_iou_camera": 0.4}, {"constant_miou_camera": 0.3}
    (row,) = run(tmp_path / "a", more=high)["comparisons"]
    assert row["interval"][0] > 0 and row["verdict"] == "gate not met: both arms below the constant predictor 99.00"
    assert run(tmp_path / "b", more=low)["comparisons"][0]["verdict"] == "holds"
    gates = (A.Gate("short learns", "short:miou_camera", ">", "constant_miou_camera"),
             A.Gate("low IoU", "iou_camera", "<", 0.5), A.Gate("order", "long:miou_camera", ">", "short:iou_camera"))
    verdict = run(tmp_path / "c", claim=replace(CLAIM, gates=gates), more=low)
    assert read_json(tmp_path / "c" / "claim.json")["gates"] == [list(gate) for gate in gates] == verdict["gates"]
    said = verdict["comparisons"][0]["verdict"]
    assert said.startswith("gate not met: low IoU: long ") and "needs < 50.00" in said and "short learns" not in said
    assert "order: long" in said and said in capsys.readouterr().out
    with pytest.raises(InputError, match="another gates"):
        run(tmp_path / "c", claim=replace(CLAIM, gates=gates[:1]), more=low)


@pytest.mark.parametrize("a, b, words", [(0, 0, "both arms at 0.00"), (10, 10, "both arms at 100.00"), (0, 5, "")])
def test_two_arms_at_an_end_of_the_metric_compare_nothing(a, b, words, tmp_path):
    (row,) = episodes(tmp_path, {"a": a, "b": b})["comparisons"]
    assert row["gate"] == words


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
        dict(claim=replace(CLAIM, gates=(A.Gate("late", "miou_camera", ">", 0.1),))),
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
    with pytest.raises(InputError, match="has miou_camera 0.9"):
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


def episodes(out: Path, wins: dict[str, int]) -> dict:
    """A claim `b > a` on 20 episodes of ten trials each, of which each arm wins so many."""

    def one_arm(arm, overrides, seed, folder):
        success, names = np.full(20, wins[arm]), np.array([f"e{k:02d}".encode() for k in range(20)])
        write_npz(folder / "by_scene.npz", groups=names, success=success, trials=np.full(20, 10))
        data = {"name": "synthetic tabletop", "version": "1", "split": "test", "frames": 200}
        cost = {"params": 1, "steps": 1, "train_s": 1, "peak_gb": 1}
        write_result(folder, method="threedvla", preset="tiny", seed=seed, dataset=data, protocol={"truth": "success"},
                     metrics={"success": success.sum() / 200}, per_class={}, cost=cost)

    claim = A.Claim("policy", "b is better", {"a": {}, "b": {}}, (("b", "a"),), metric="success")
    return A.run_claim(claim, 3, out, "tiny", {}, one_arm)


def test_episodes(tmp_path):
    (row,) = episodes(tmp_path, {"a": 3, "b": 6})["comparisons"]
    assert row["difference"] == pytest.approx(0.3) and row["verdict"] == "holds"


# --- a method's command line ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Config:
    past: int = 13
    steps: int = 450


CLAIMS = {"time": A.Claim("time", "(c) more time", {"short": {"past": 0}, "long": {}}, (("long", "short"),)),
          "maps": A.Claim("maps", "(f) better maps", {"bad": {"level": "bad"}, "good": {"past": 13}},
                          (("good", "bad"),), seeds=1)}  # fmt: skip


def command(monkeypatch, out: Path, *words: str) -> tuple[dict, list]:
    """main() with these words -> its verdict and the arms it ran, as (past, level, steps, seed)."""
    ran = []

    def run_arm(cfg, args):
        ran.append((cfg.past, args.level, cfg.steps, args.seed))
        assert args.data_root == Path("world") and args.pool == out.parent / "arms"
        make_arm(args.out / "2-last", "long", args.seed, 0.6 + 0.01 * cfg.past)
        return args.out / "2-last"

    monkeypatch.setattr(sys, "argv", ["experiments/x.py", "--out", str(out), *words])
    flags = {"level": cli.Flag("of the maps", Literal["good", "bad"], "good")}
    return A.main("Doc.", Config, {"tiny": Config()}, CLAIMS, run_arm, shared={"steps": 150}, flags=flags,
                  other={"quality": lambda cfg, args: "asked"}, world=lambda args: Path("world")), ran


def test_arms_that_claims_share_run_once(tmp_path, monkeypatch):
    verdict, ran = command(monkeypatch, tmp_path / "time", "--claim", "time", "--seeds", "2")
    assert ran == [(0, "good", 150, 0), (13, "good", 150, 0), (0, "good", 150, 1), (13, "good", 150, 1)]
    assert verdict["preset"] == "tiny (150 steps)" and verdict["settings"]["config"] == {"past": 13, "steps": 150}
    _, ran = command(monkeypatch, tmp_path / "maps", "--claim", "f")  # by its letter; the claim has one seed
    assert ran == [(13, "bad", 150, 0)]  # `good` is claim time's `long`
    _, ran = command(monkeypatch, tmp_path / "own", "--claim", "c", "--seeds", "1", "--steps", "7", "--arms", "long")
    assert ran == [(13, "good", 7, 0)]
    assert command(monkeypatch, tmp_path / "q", "--claim", "quality") == ("asked", [])


@pytest.mark.parametrize("words, said", [("--claim magic", "one of time, maps, quality"), ("--seeds 1", "needs --claim"),
                                         ("--claim time --arms x", "time has short, long")])  # fmt: skip
def test_bad_words_cost_one_line(words, said, tmp_path, monkeypatch, capsys):
    with pytest.raises(SystemExit):
        command(monkeypatch, tmp_path, *words.split())
    assert said in capsys.readouterr().err


# --- RESULTS.md -------------------------------------------------------------------------------------------------------


def test_results_page_keeps_synthetic_and_real_apart(tmp_path):
    results, out = tmp_path / "results", tmp_path / "RESULTS.md"
    constants = {"constant_miou_camera": 0.31, "constant_iou_camera": 0.455}
    for name, data, hit in (("easyocc-demo", "synthetic world", 0.5), ("loc-real", "nuScenes", 0.4)):
        make_arm(tmp_path / name, "short", 0, hit, data, name.partition("-")[0], constants)
        write_json(tmp_path / name / "config.json", {"config": {"lr": 1}, "commit": "trained"})
        A.publish(tmp_path / name, name, results)
    for seeds, name in ((1, "easyocc-one"), (3, "easyocc-three")):
        run(tmp_path / name, seeds=seeds, more=constants)
        A.publish(tmp_path / name, name, results)
    row = {"command": "make faults", "date": "2026-11-30", "commit": "0" * 40, "counts": {"kill": 1200}, "findings": 0}
    write_json(results / "reliability.json", {"kind": "reliability", "method": "all", "sentence": "Broken.",
                                              "runs": [row], "also": ["two are one"], "mended": ["a leftover"]})  # fmt: skip
    table.write(results, out)
    assert "| `make faults` | 2026-11-30 | 00000000 | 1,200 | kill 1,200 | 0 |" in out.read_text()
    synthetic, real = out.read_text().split("## Real data")
    demo = read_json(results / "easyocc-demo.json")
    cells = [f"{100 * demo['metrics'][m]:.2f}" for m in ("miou_camera", "iou_camera")]
    assert f"| {cells[0]} | 31.00 | {cells[1]} | 45.50 |" in synthetic  # the constant's IoU beside ours
    assert "[real]" in real and "nuScenes" not in synthetic.split("## Protocols")[0]
    assert "not run: loc" not in real and "not run: easyocc, occle, occvla, threedvla" in real
    one, three = (next(x for x in synthetic.splitlines() if f"easyocc-{n}" in x) for n in ("one", "three"))
    assert "long > short" in one and one.endswith("| 1 | P1 | one seed |") and three.endswith("| 3 | P1 | **holds** |")
    assert real.count("mask_eval: camera") == 1  # a rule is printed once
    page = (results / "easyocc.md").read_text()
    assert "| long | iou_camera |" in page and "45.50" in page and (results / "forest.png").stat().st_size > 1000
    before = out.read_text()
    table.write(results, out)
    assert out.read_text() == before
    make_arm(tmp_path / "odd", "short", 0, 0.5, dataset="my data")
    write_json(tmp_path / "odd" / "config.json", {})
    A.publish(tmp_path / "odd", "odd", results)
    with pytest.raises(InputError, match="'my data' is neither"):
        table.write(results, out)


def test_label_ratios_are_drawn_as_a_curve(tmp_path):
    arms = {f"{who} {x} %": {} for who in ("ours", "supervised") for x in (1, 10, 100)}
    metrics = {"miou_camera": [0.1, 0.2, None]}
    record = {"kind": "claim", "method": "occle", "claim": "curve", "preset": "tiny", "arms": arms, "metrics": metrics,
              "constants": {"miou_camera": 0.05}, "runs": {"arm": ["ours 10 %", "ours 10 %", "ours 1 %"], "seed": [0, 1, 0]},
              "comparisons": [{"metric": "miou_camera"}]}  # fmt: skip
    ratios = table.ratios_of(record)
    assert ratios == {"ours": {10: [0.1, 0.2]}, "supervised": {}}
    table.draw_ratios(tmp_path / "curve.png", record, ratios)
    assert (tmp_path / "curve.png").read_bytes()[:4] == b"\x89PNG"
    assert table.ratios_of(record | {"arms": arms | {"all": {}}}) == {}, "every arm has a ratio"


def test_the_committed_page_is_made_of_the_committed_files():
    results = Path("experiments/results")
    made = table.page(table.load(results), results, {True: results / "forest.png"}, table.Protocols())
    assert made == Path("RESULTS.md").read_text() and made.count("\n") <= 300, "run make table"
    assert sum(path.stat().st_size for path in results.glob("*.json")) <= 700_000


def test_a_published_file_has_every_number_and_no_machine_s_paths(tmp_path):
    run_folder, path = tmp_path / "runs" / "x", tmp_path / "results" / "easyocc-x.json"
    make_arm(run_folder, "short", 0, 0.5)
    with pytest.raises(InputError, match="config.json: file not found"):
        A.publish(run_folder, "easyocc-x", path.parent)
    root = "/home/me/data/"
    words = "python easyocc.py train --data-root {}nuscenes --out runs/x"
    write_json(run_folder / "config.json", {"data": {"root": f"{root}nuscenes"}, "command": words.format(root)})
    (run_folder / "log.jsonl").write_text("".join(json.dumps({"step": s, "gb": 1}) + "\n" for s in range(50)))
    A.publish(run_folder, "easyocc-x", path.parent)
    first, result = read_json(path), read_json(run_folder / "result.json")
    assert first["log"] == {"step": list(range(30, 50)), "gb": 1}
    assert first["trained"] == {"data": {"root": "nuscenes"}, "command": words.format("")}
    assert first["metrics"] == pytest.approx(result["metrics"], rel=1e-4)
    make_arm(run_folder, "short", 0, 0.9)  # measured again, by another commit
    write_json(run_folder / "result.json", read_json(run_folder / "result.json") | {"commit": "later"})
    A.publish(run_folder, "easyocc-x", path.parent)
    (old,) = read_json(path)["replaced"]
    assert old["commit"] == first["commit"] and old["metrics"]["miou_camera"] == first["metrics"]["miou_camera"]

    run(tmp_path / "claim", seeds=2)
    stored = read_json(A.publish(tmp_path / "claim", "easyocc-time", path.parent))
    for arm in HITS:
        for k in range(2):
            told = read_json(A.arm_folder(tmp_path / "claim", arm, k) / "result.json")
            for metric, value in told["metrics"].items():
                assert A.scores_of(stored, arm, metric)[k] == pytest.approx(value, rel=1e-4)


def test_label_quality_and_benches_are_on_the_method_s_page(tmp_path, capsys):
    dataset = {"name": "synthetic driving world", "version": "v1.0-trainval", "split": "train", "frames": 3}
    rows = {"fused": {"precision": 0.5, "s/keyframe": 1.25}, "single": {"precision": 0.25}}
    A.write_quality(tmp_path / "q", "loc", dataset, {"knn_k": 5}, rows)
    assert "50.0" in (printed := capsys.readouterr().out) and "1.25" in printed
    write_json(tmp_path / "bench.json", {"ratio": 10.04, "keyframes": [{"ms": 3}]})
    A.publish(tmp_path / "q", "loc-label-quality", tmp_path / "results")
    A.publish(tmp_path / "bench.json", "loc-factory", tmp_path / "results")
    table.write(tmp_path / "results", tmp_path / "RESULTS.md")
    synthetic, real = (tmp_path / "results" / "loc.md").read_text().split("## Real data")
    assert "| fused | 50.0 | 1.25 |" in synthetic and "| single | 25.0 |  |" in synthetic and "ratio 10.04" in real


@pytest.mark.parametrize("words", ["", "tabel", "table a b", "publish x", "publish x y", "table /nowhere"])
def test_command_line_mistakes(words, capsys):
    with pytest.raises(SystemExit) as stop:
        A.command_line(words.split())
    err = capsys.readouterr().err
    assert stop.value.code == 2 and err.startswith("error: ") and err.count("\n") == 1
