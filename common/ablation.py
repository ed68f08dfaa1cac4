"""Claims re-tested honestly: the sign first, then paired arms, then a bootstrap, then one of three verdicts.

    claim = Claim("time", "13 past keyframes beat the current frame alone",
                  arms={"past0": {"past_frames": 0}, "past13": {"past_frames": 13}},
                  pairs=(("past13", "past0"),))                     # (expected better, expected worse)
    run_claim(claim, seeds=3, out="runs/ablate/easyocc/time", preset="tiny", settings={...}, train_and_eval=one_arm)

`claim.json` with the expected signs is written before any arm starts. Each arm and seed has its folder
<out>/<arm>/seed<k>/ with result.json and by_scene.npz; one that has a result.json is not run again.

by_scene.npz holds counts that add up over frames, one row a scene: what `metrics.OccupancyMeter.save` writes, or for
episodes `groups` (S,) bytes, `success` and `trials` (S,) int64. For a metric M of a method's own it may hold `ratio_M`
(S, K, 2) float64: the metric is the mean over K of sum first / sum second, where there is a second (IoUs of some
classes: intersection and union; a measure taken per scene: the value and 1, or 0 and 0 where it is undefined).

Verdict: scenes, and seeds, are drawn with replacement, the same draw for both arms; each arm's score is recomputed from
the drawn scenes' summed counts and averaged over the drawn seeds. `holds`: the 95 % interval of the difference excludes
0 in the expected direction; `does not hold`: in the other; else `not resolved`. In simulations with ten scenes and
three seeds, arms that do not differ are told apart in 4 to 8 % of cases (nominal: 5 %), but in 23 % if the seed is the
only source of noise: three seeds are few, and a small difference should be re-tested with more.

    python -m common.ablation table [--results results] [--out RESULTS.md]     # RESULTS.md, generated, never typed
    python -m common.ablation publish runs/demo results/easyocc-demo           # the small files of a run or a claim
"""

import json
import math
import re
import sys
import time
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from scipy.special import ndtr, stdtrit

from common.files import InputError, exit_on_input_error, read_json, read_npz, write_bytes, write_json
from common.train import commit, duration

METHODS = ("easyocc", "occle", "loc", "occvla", "threedvla")
NOT_RUN = "not run"


@dataclass(frozen=True)
class Claim:
    """One relative claim. pairs: (expected better, expected worse) or (better, worse, metric)."""

    name: str
    sentence: str
    arms: dict[str, dict[str, Any]]  # arm -> config fields it changes
    pairs: tuple[tuple[str, ...], ...]
    metric: str = "miou_camera"
    note: str = ""  # printed under the table: what the arms share, what the comparison cannot show

    def __post_init__(self):
        for better, worse, *_ in self.pairs:
            assert better in self.arms and worse in self.arms, f"claim {self.name}: {better} or {worse} is not an arm"

    def expected(self) -> list[dict[str, str]]:
        return [{"better": p[0], "worse": p[1], "metric": p[2] if len(p) > 2 else self.metric} for p in self.pairs]


def run_claim(
    claim: Claim,
    seeds: int,
    out: Path | str,
    preset: str,
    settings: dict[str, Any],
    train_and_eval: Callable[[str, dict[str, Any], int, Path], None],
    only: tuple[str, ...] | None = None,
) -> dict[str, Any]:
    """Runs what is missing, prints the table, writes verdict.json and verdict.md; -> the verdict.

    train_and_eval(arm, overrides, seed, folder) must leave result.json and by_scene.npz in folder; what arms share
    (labels, tokenizer) is its business. settings: JSON values common to all arms (config, dataset); they are stored in
    claim.json, and other ones later are an InputError. only: run these arms; the others read `not run`.
    """
    out = Path(out)
    declare(claim, seeds, out, preset, settings)
    jobs = [(arm, seed) for seed in range(seeds) for arm in claim.arms if only is None or arm in only]
    todo = [job for job in jobs if not (arm_folder(out, *job) / "result.json").is_file()]
    print(f"claim {claim.name}: {claim.sentence}; {len(jobs) - len(todo)} of {len(jobs)} runs are done")
    begun = time.perf_counter()
    for i, (arm, seed) in enumerate(todo):
        folder = arm_folder(out, arm, seed)
        left = (time.perf_counter() - begun) / i * (len(todo) - i) if i else None
        eta = "" if left is None else f" | eta {duration(left)}"
        print(f"--- {i + 1}/{len(todo)} {arm} seed {seed}{eta}", flush=True)
        train_and_eval(arm, claim.arms[arm], seed, folder)
        for name in ("result.json", "by_scene.npz"):
            if not (folder / name).is_file():
                raise RuntimeError(f"{folder}: arm {arm} left no {name}")
    verdict = judge(claim, seeds, out, preset)
    write_json(out / "verdict.json", verdict)
    text = markdown(verdict)
    write_bytes(out / "verdict.md", text.encode())
    print(text)
    return verdict


def arm_folder(out: Path | str, arm: str, seed: int) -> Path:
    """Where the result of one arm and seed lies."""
    return Path(out) / arm / f"seed{seed}"


def declare(claim: Claim, seeds: int, out: Path, preset: str, settings: dict[str, Any]) -> None:
    """Writes claim.json before any run. Later calls may add seeds and arms, not change a sign, an arm or a setting."""
    value = {
        "claim": claim.name, "sentence": claim.sentence, "expected": claim.expected(), "arms": claim.arms,
        "preset": preset, "settings": settings, "seeds": seeds,
    }  # fmt: skip
    value = json.loads(json.dumps(value))
    path = out / "claim.json"
    if path.is_file():
        old = read_json(path)
        same = {k: v for k, v in value["arms"].items() if k in old["arms"]}
        kept = all(old[k] == value[k] for k in ("claim", "sentence", "preset", "settings")) and same == old["arms"]
        if not kept or value["expected"][: len(old["expected"])] != old["expected"]:
            name = next((k for k in ("claim", "sentence", "preset", "settings") if old[k] != value[k]), "arms or signs")
            raise InputError(f"{path}: written before the runs with another {name}; use another --out")
        value["seeds"] = max(seeds, old["seeds"])
        value["written"], value["commit"] = old["written"], old["commit"]
        if value == old:
            return
    else:
        if any(out.glob("*/seed*/result.json")):
            raise InputError(f"{out}: results but no claim.json; the sign is written first, so use another --out")
        value["written"], value["commit"] = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime()), commit()
    write_json(path, value)


# --- scores from counts ----------------------------------------------------------------------------------------------


def read_counts(folder: Path, metric: str) -> tuple[list[str], np.ndarray]:
    """<folder>/by_scene.npz -> scene names in order, (S, ...) int64: the counts that `score` turns into the metric."""
    path = folder / "by_scene.npz"
    if metric == "success":
        arrays = read_npz(path, {"groups": (None, None), "success": (None, "int64"), "trials": (None, "int64")})
        return [g.decode() for g in arrays["groups"].tolist()], np.stack([arrays["success"], arrays["trials"]], axis=-1)
    if _has_ratio(path, metric):
        arrays = read_npz(path, {"groups": (None, None), f"ratio_{metric}": (None, "float64")})
        names = [g.decode() for g in arrays["groups"].tolist()]
        order = np.argsort(names)
        return [names[k] for k in order], arrays[f"ratio_{metric}"][order]
    from common.metrics import OccupancyMeter

    scenes = OccupancyMeter.load(path).by_group()
    key, names = _rule(metric)[0], sorted(scenes)
    if any(key not in scenes[name] for name in names):
        raise InputError(f"{path}: no {key} counts for {metric}; evaluate with them, or name another metric")
    return names, np.stack([scenes[name][key].numpy() for name in names])


def _has_ratio(path: Path, metric: str) -> bool:
    """Whether by_scene.npz has the sums of a method's own metric."""
    if not path.is_file():
        return False
    with zipfile.ZipFile(path) as archive:
        return f"ratio_{metric}.npy" in archive.namelist()


def _rule(metric: str) -> tuple[str, str]:
    """OccupancyMeter's metric name -> (the counts it is made of, the protocol): miou_lidar -> (lidar, flashocc)."""
    from common.metrics import MASKS, PROTOCOLS

    kind, _, what = metric.partition("_")
    if metric.partition("@")[0] == "rayiou":
        return "rays", ""
    if kind in ("miou", "iou", "miou15") and what in MASKS:
        return what, "selfsup15" if kind == "miou15" else "flashocc"
    if kind in ("miou", "iou") and what in PROTOCOLS:
        return PROTOCOLS[what].mask, what
    raise InputError(f"metric {metric}: not miou_<mask or protocol>, iou_<mask>, rayiou[@1|2|4] or success")


def score(counts: np.ndarray, metric: str) -> np.ndarray:
    """Summed counts (..., 18, 18), (..., 5, 17), (..., 2) or (..., K, 2) -> (...) fractions, by common.metrics' rules."""
    if metric == "success":
        return counts[..., 0] / counts[..., 1]
    if counts.shape[-1] == 2:  # a method's own, as ratios: NaN only where no class has anything in it
        there = counts[..., 1] > 0
        ratio = np.divide(counts[..., 0], counts[..., 1], out=np.zeros(there.shape), where=there)
        number = there.sum(-1)
        return np.divide(ratio.sum(-1), number, out=np.full(number.shape, np.nan), where=number > 0)
    from common.metrics import RAY_THRESHOLDS, geometric_iou, miou

    protocol = _rule(metric)[1]
    counts = torch.from_numpy(np.asarray(counts, np.float64))
    if metric.startswith("rayiou"):
        gt, pred, hit = counts[..., :1, :], counts[..., 1:2, :], counts[..., 2:, :]  # (..., 3, 17) hits
        iou = hit / (gt + pred - hit)
        at = metric.partition("@")[2]
        iou = iou[..., RAY_THRESHOLDS.index(int(at)), :] if at else iou.flatten(-2)
        return iou.nanmean(-1).numpy()
    return (geometric_iou if metric.startswith("iou") else miou)(counts, protocol).numpy()


class Difference(NamedTuple):
    """A paired difference with its interval and what that says."""

    value: float  # better - worse, mean over seeds, a fraction
    low: float  # 95 % interval
    high: float
    verdict: str


def paired_difference(
    better: np.ndarray, worse: np.ndarray, metric: str, draws: int = 2000, seed: int = 0
) -> Difference:
    """better, worse (seeds, S, ...) counts of the same seeds and scenes -> the bootstrapped paired difference.

    A draw takes S scenes and as many seeds as there are, with replacement, the same for both arms. NaN draws (no class
    left) do not occur with real masks; if they do, the interval is NaN and the verdict `not resolved`.
    """
    assert better.shape == worse.shape and better.ndim > 2, f"unpaired counts {better.shape} and {worse.shape}"
    n_seeds, n_scenes = better.shape[:2]
    rng = np.random.default_rng(seed)
    weight = rng.multinomial(n_scenes, np.full(n_scenes, 1 / n_scenes), size=draws).astype(np.float64)  # (draws, S)
    picked = rng.multinomial(n_seeds, np.full(n_seeds, 1 / n_seeds), size=draws) / n_seeds  # (draws, seeds) shares

    def resampled(counts: np.ndarray) -> np.ndarray:  # (S, ...) of one arm and seed -> (draws,) scores
        sums = weight @ counts.reshape(n_scenes, -1).astype(np.float64)
        return score(sums.reshape(draws, *counts.shape[1:]), metric)

    seeds = list(zip(better, worse, strict=True))
    point = float(np.mean([score(b.sum(0), metric) - score(w.sum(0), metric) for b, w in seeds]))
    drawn = sum(picked[:, k] * (resampled(b) - resampled(w)) for k, (b, w) in enumerate(seeds))
    # The plain percentiles are too narrow for few scenes; expanded percentiles (Hesterberg 2015) make up for that.
    spread = stdtrit(n_scenes - 1, 0.975) * math.sqrt(n_scenes / (n_scenes - 1)) if n_scenes > 1 else math.inf
    tail = ndtr(-spread)  # 0.025 for many scenes, 0.009 for ten
    low, high = np.quantile(drawn, [tail, 1 - tail]).tolist()
    verdict = "holds" if low > 0 else "does not hold" if high < 0 else "not resolved"
    return Difference(point, low, high, verdict)


# --- verdict ---------------------------------------------------------------------------------------------------------


def judge(claim: Claim, seeds: int, out: Path, preset: str) -> dict[str, Any]:
    """Reads the arms' results; -> {claim, sentence, preset, dataset, protocol, arms: [...], comparisons: [...]}."""
    metrics = list(dict.fromkeys(e["metric"] for e in claim.expected()))
    results = {arm: _results(out, arm, seeds) for arm in claim.arms}
    found = [r for rs in results.values() for r in rs.values()]
    for r in found[1:]:
        if _scored(r) != _scored(found[0]):
            raise InputError(f"{out}: arms were scored on different data or under different rules; use another --out")
    shared = None  # the part of the protocol that all arms have in common
    if found:
        shared = {k: v for k, v in found[0]["protocol"].items() if all(r["protocol"].get(k) == v for r in found)}
    arms = []
    for arm, overrides in claim.arms.items():
        rs = results[arm]
        scores = {m: {str(k): r["metrics"].get(m) for k, r in rs.items()} for m in metrics}
        arms.append({"arm": arm, "overrides": overrides, "scores": scores, "cost": _mean_cost(rs.values())})
    comparisons = [_compare(out, results, **e) for e in claim.expected()]
    return {
        "claim": claim.name, "sentence": claim.sentence, "note": claim.note, "preset": preset, "seeds": seeds,
        "dataset": found[0]["dataset"] if found else None, "protocol": shared,
        "commits": sorted({r["commit"] for r in found}), "arms": json.loads(json.dumps(arms)),
        "comparisons": comparisons,
    }  # fmt: skip


def _scored(result: dict[str, Any]) -> tuple[Any, ...]:
    """What must not differ between arms: the frames and the rules of scoring. How an arm is trained may."""
    rules = ("mask_eval", "classes", "absent", "grid", "truth")
    return result["dataset"], [result["protocol"].get(k) for k in rules]


def _results(out: Path, arm: str, seeds: int) -> dict[int, dict[str, Any]]:
    paths = {k: arm_folder(out, arm, k) / "result.json" for k in range(seeds)}
    return {k: read_json(path) for k, path in paths.items() if path.is_file()}


def _mean_cost(results) -> dict[str, float] | None:
    """Mean over seeds: params, step_ms, train_s, peak_gb."""
    rows = [
        {
            "params": r["cost"]["params"],
            "step_ms": 1000 * r["cost"]["train_s"] / max(1, r["cost"]["steps"]),
            "train_s": r["cost"]["train_s"],
            "peak_gb": r["cost"]["peak_gb"],
        }
        for r in results
    ]
    return {name: float(np.mean([row[name] for row in rows])) for name in rows[0]} if rows else None


def _compare(out: Path, results: dict[str, dict[int, Any]], better: str, worse: str, metric: str) -> dict[str, Any]:
    row = {"better": better, "worse": worse, "metric": metric, "expected": f"{better} > {worse}"}
    seeds = sorted(results[better].keys() & results[worse].keys())
    if not seeds:
        return row | {"seeds": [], "verdict": NOT_RUN}
    counts: dict[str, list[np.ndarray]] = {better: [], worse: []}
    scenes = None
    for arm in (better, worse):
        for k in seeds:
            folder = arm_folder(out, arm, k)
            names, value = read_counts(folder, metric)
            if scenes is not None and names != scenes:
                raise InputError(f"{folder}/by_scene.npz: other scenes than the first arm's; arms must be paired")
            scenes = names
            told, made = results[arm][k]["metrics"].get(metric), float(score(value.sum(0), metric))
            if told is None or not math.isclose(told, made, rel_tol=1e-6, abs_tol=1e-9):
                raise InputError(f"{folder}: result.json says {metric} {told}, by_scene.npz {made:.6f}; remove both")
            counts[arm].append(value)
    d = paired_difference(np.stack(counts[better]), np.stack(counts[worse]), metric)
    cost_b, cost_w = (_mean_cost([results[arm][k] for k in seeds]) for arm in (better, worse))
    ratios = {f"{n}_ratio": cost_b[n] / cost_w[n] if cost_w[n] else None for n in ("step_ms", "peak_gb")}
    return row | {
        "seeds": seeds, "scenes": len(scenes), "difference": d.value, "interval": [d.low, d.high], "verdict": d.verdict,
        **ratios,
    }  # fmt: skip


def markdown(v: dict[str, Any]) -> str:
    """The verdict as text: claim, arms with every seed's score, comparisons with interval and verdict."""
    data = describe_data(v) if v["dataset"] else NOT_RUN
    lines = [f"### {v['claim']}: {v['sentence']}", "", f"Preset {v['preset']}; {data}.", ""]
    metrics = list(dict.fromkeys(c["metric"] for c in v["comparisons"]))
    seeds = [str(k) for k in range(v["seeds"])]
    for metric in metrics:
        rows = []
        for a in v["arms"]:
            scores, cost = a["scores"][metric], a["cost"]
            mean = float(np.mean(list(scores.values()))) if scores else None
            spent = (f"{cost['step_ms']:.0f}", f"{cost['peak_gb']:.2f}") if cost else (NOT_RUN, NOT_RUN)
            rows.append([a["arm"], *(_percent(scores.get(k)) for k in seeds), _percent(mean), *spent])
        lines += [*_table(["arm", *(f"{metric} seed {k}" for k in seeds), "mean", "step [ms]", "peak [GB]"], rows), ""]
    rows = []
    for c in v["comparisons"]:
        if c["verdict"] == NOT_RUN:
            rows.append([c["expected"], c["metric"], *[NOT_RUN] * 5])
            continue
        few = f" ({len(c['seeds'])} seed{'s' if len(c['seeds']) > 1 else ''})" if len(c["seeds"]) < 3 else ""
        low, high = (f"{100 * x:+.2f}" for x in c["interval"])
        ratio = [f"{c[n]:.2f}" if c[n] else "-" for n in ("step_ms_ratio", "peak_gb_ratio")]
        numbers = [f"{100 * c['difference']:+.2f}", f"[{low}, {high}]", *ratio]
        rows.append([c["expected"], c["metric"], *numbers, f"**{c['verdict']}**{few}"])
    head = ["expected", "metric", "difference", "95 % interval", "step time ratio", "memory ratio", "verdict"]
    lines += _table(head, rows)
    return "\n".join(lines + (["", v["note"]] if v.get("note") else [])) + "\n"


def describe_data(v: dict[str, Any]) -> str:
    """dataset and protocol in one phrase."""
    d = v["dataset"]
    protocol = ", ".join(f"{name} {value}" for name, value in v["protocol"].items())
    return f"{d['name']} {d['version']} {d['split']}, {d['frames']} frames" + (f"; {protocol}" if protocol else "")


def _table(head: list[str], rows: list[list[str]]) -> list[str]:
    return [f"| {' | '.join(r)} |" for r in (head, ["---"] * len(head), *rows)]


def _percent(value: float | None) -> str:
    return NOT_RUN if value is None else f"{100 * value:.2f}"


# --- label quality ---------------------------------------------------------------------------------------------------


def write_quality(out: Path | str, method: str, dataset: dict[str, Any], config: dict[str, Any], rows: dict[str, dict[str, float]]) -> None:
    """label_quality.json of a comparison of labels, and its table on the terminal. dataset: name, version, split, frames;
    rows: what was made -> column -> share (a column that names a unit, as s/keyframe, is a number)."""
    write_json(Path(out) / "label_quality.json", {"method": method, "dataset": dataset, "config": config, "rows": rows})
    columns, body = quality_cells(rows)
    widths = [max(len(x) for x in column) for column in zip(["", *columns], *body)]
    print(f"label quality, {describe_data({'dataset': dataset, 'protocol': {}})}, percent")
    for line in [["", *columns], *body]:
        print("  ".join(f"{x:{'<' if k == 0 else '>'}{w}}" for k, (x, w) in enumerate(zip(line, widths))))


def quality_cells(rows: dict[str, dict[str, float]]) -> tuple[list[str], list[list[str]]]:
    """-> column names, and a line of cells for each row, its name first."""
    columns = list(dict.fromkeys(c for row in rows.values() for c in row))
    cell = lambda row, c: "" if c not in row else f"{row[c]:.2f}" if "/" in c else f"{100 * row[c]:.1f}"  # noqa: E731
    return columns, [[name, *(cell(row, c) for c in columns)] for name, row in rows.items()]


# --- RESULTS.md ------------------------------------------------------------------------------------------------------

REAL = ("nuScenes", "Occ3D-nuScenes", "SemanticKITTI", "NuScenes-QA", "LIBERO", "LIBERO-Plus", "RoboTwin")
# Columns in this order where any run of the table has them; everything else stays in result.json.
COLUMNS = (
    "miou_camera", "constant_miou_camera", "shuffled_miou_camera", "miou_lidar", "miou_both", "miou_none", "iou_camera",
    "rayiou", "miou", "iou", "l2_avg", "col_avg", "qa_accuracy", "success", "random_success", "expert_success", "blind_success", "auroc", "aupr", "fpr95",
)  # fmt: skip


def is_synthetic(dataset: dict[str, Any], where: Path) -> bool:
    """By the dataset's name, which must be 'synthetic ...' or one of REAL: no number may be of unknown origin."""
    name = str(dataset.get("name", ""))
    if name.lower().startswith("synthetic"):
        return True
    if name in REAL:
        return False
    raise InputError(f"{where}: dataset '{name}' is neither 'synthetic ...' nor one of {', '.join(REAL)}")


def results_page(results: Path | str) -> str:
    """RESULTS.md from results/**/result.json and results/**/verdict.json, and from nothing else."""
    results = Path(results)
    runs = {p: read_json(p) for p in sorted(results.rglob("result.json")) if not _inside_claim(p, results)}
    verdicts = {p: read_json(p) for p in sorted(results.rglob("verdict.json"))}
    quality = {p: read_json(p) for p in sorted(results.rglob("label_quality.json"))}
    lines = [
        "# Results", "",
        "Generated by `make table` from `results/`; nothing here is typed by hand. Synthetic and real data never",
        "share a table. Scores are percentages; a number compares only within its table (one dataset, split and",
        "protocol). `not run` means just that.", "",
    ]  # fmt: skip
    for title, synthetic in (("Synthetic worlds", True), ("Real data", False)):
        lines += [f"## {title}", ""]
        groups: dict[str, list[tuple[Path, dict]]] = {}
        for path, r in runs.items():
            if is_synthetic(r["dataset"], path) == synthetic:
                groups.setdefault(describe_data(r), []).append((path, r))
        for data, rows in groups.items():
            lines += [f"**{data}**", "", *_runs_table(rows, results), ""]
        have = {r["method"] for rows in groups.values() for _, r in rows}
        if missing := [m for m in METHODS if m not in have]:
            lines += [*_table(["method", "result"], [[m, NOT_RUN] for m in missing]), ""]
        for path, q in quality.items():
            if is_synthetic(q["dataset"], path) == synthetic:
                columns, body = quality_cells(q["rows"])
                lines += [f"**Label quality, {q['method']}: {describe_data(q | {'protocol': {}})}, percent**", "",
                          *_table(["labels", *columns], body), ""]  # fmt: skip
        told = [v for p, v in verdicts.items() if v["dataset"] and is_synthetic(v["dataset"], p) == synthetic]
        lines += [f"## Claims, {title.lower()}", ""] + ([markdown(v) for v in told] or [NOT_RUN, ""])
    return "\n".join(lines).rstrip() + "\n"


def _runs_table(rows: list[tuple[Path, dict[str, Any]]], results: Path) -> list[str]:
    columns = [c for c in COLUMNS if any(c in r["metrics"] for _, r in rows)]
    body = [
        [
            r["method"], r["preset"], str(r["seed"]), *(_percent(r["metrics"].get(c)) for c in columns),
            f"{r['cost']['params'] / 1e6:.2f}", str(r["cost"]["steps"]), duration(r["cost"]["train_s"]),
            f"{r['cost']['peak_gb']:.1f}", r["commit"][:8], f"[{path.parent.name}]({path.parent.as_posix()})",
        ]
        for path, r in ((p.relative_to(results.parent), r) for p, r in rows)
    ]  # fmt: skip
    return _table(["method", "preset", "seed", *columns, "Mparams", "steps", "train", "GB", "commit", "files"], body)


def _inside_claim(path: Path, top: Path) -> bool:
    return any((parent / "claim.json").is_file() for parent in path.parents if parent.is_relative_to(top))


def publish(run: Path | str, to: Path | str) -> None:
    """Copies the small files of a run (result.json, config.json, the log's last 20 lines) or of a claim (claim.json,
    verdict.json, verdict.md, each arm's result.json) or a label_quality.json to a folder under results/."""
    run, to = Path(run), Path(to)
    claim = (run / "claim.json").is_file()
    wanted = ["claim.json", "verdict.json", "verdict.md"] if claim else ["result.json", "config.json"]
    wanted = ["label_quality.json"] if (run / "label_quality.json").is_file() else wanted
    for name in wanted:
        if not (run / name).is_file():
            raise InputError(f"{run / name}: file not found; finish the run first")
    for path in [run / name for name in wanted] + (sorted(run.glob("*/seed*/result.json")) if claim else []):
        target = to / path.relative_to(run)
        if path.suffix == ".json":
            write_json(target, _without_roots(read_json(path)))
        else:
            write_bytes(target, path.read_bytes())
    if (run / "log.jsonl").is_file():
        write_bytes(to / "log_tail.jsonl", b"".join((run / "log.jsonl").read_bytes().splitlines(keepends=True)[-20:]))


def _without_roots(value: Any) -> Any:
    """Absolute paths (in data, in the command) keep their last part only: where a machine has its files is nobody's."""
    if isinstance(value, dict):
        return {k: _without_roots(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_without_roots(v) for v in value]
    return re.sub(r"(?<![^\s='\"])/(?:[^\s/'\"]+/)*([^\s/'\"]+)", r"\1", value) if isinstance(value, str) else value


@exit_on_input_error
def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == ["publish"] and len(argv) == 3:
        publish(argv[1], argv[2])
        return
    options = dict(zip(argv[1::2], argv[2::2]))
    if argv[:1] != ["table"] or len(argv) % 2 == 0 or not options.keys() <= {"--results", "--out"}:
        raise InputError("usage: python -m common.ablation table [--results results] [--out FILE] | publish RUN TO")
    results = Path(options.get("--results", "results"))
    if not results.is_dir():
        raise InputError(f"--results {results}: no such folder")
    page = results_page(results)
    write_bytes(options.get("--out", "RESULTS.md"), page.encode())
    print(f"{options.get('--out', 'RESULTS.md')}: {page.count(chr(10))} lines from {results}")


if __name__ == "__main__":
    main()
