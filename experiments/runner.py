"""Claims re-tested honestly: sign and gates first, then paired arms, then a bootstrap, then a verdict.

    CLAIMS = {"time": Claim("time", "13 past keyframes beat the current frame alone",
                            arms={"past0": {"past_frames": 0}, "past13": {}},
                            pairs=(("past13", "past0"),))}             # (expected better, expected worse)
    main(__doc__, Config, PRESETS, CLAIMS, run_arm, ...)               # so ends experiments/<method>.py

    python -m experiments.easyocc --claim time --seeds 3               # or: python easyocc.py ablate ...
    python -m experiments.runner publish runs/ablate/easyocc/time easyocc-time
                                                                       # -> results/easyocc-time.json
    python -m experiments.runner table                                 # RESULTS.md from these files alone

claim.json with signs and gates is written before any arm starts. Every arm and seed is run once, whichever
claims share it. A killed run goes on: only an arm that left both files, result.json last, counts as finished.

by_scene.npz holds counts that add up over frames, one row a scene: what `metrics.OccupancyMeter.save` writes,
or for episodes `groups` (S,) bytes, `success` and `trials` (S,) int64. For a metric M of a method's own it
may hold `ratio_M` (S, K, 2) float64: the metric is the mean over K of sum first / sum second, where there is
a second.

Interval: scenes and seeds are drawn with replacement, the same draw for both arms; each arm's score is
recomputed from the drawn scenes' summed counts and averaged over the drawn seeds. Verdict, with three seeds
or more: `holds` if the 95 % interval excludes 0 in the expected direction, `does not hold` if in the other,
else `not resolved`. In simulations with ten scenes and three seeds, arms that do not differ are told apart in
4 to 8 % of cases (nominal: 5 %), but in 23 % if the seed is the only source of noise. One seed shows nothing
about seeds: two seeds of one and the same policy differed by +6.49 [0.65, 12.34], so one seed has no verdict.

A gate is a condition without which a comparison means nothing. Always checked: not both arms below the
constant predictor (`constant_<metric>` of the arms), not both at 0 or at 1. A claim may add its own gates.
"""

import json
import math
import os
import re
import sys
import time
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import torch
from scipy.special import ndtr, stdtrit

from common import cli
from common.files import (InputError, exit_on_input_error, read_json, read_npz, short_hash, write_bytes,
                          write_json)
from common.metrics import MASKS
from common.train import command, commit, duration

RESULTS = Path("experiments/results")
FILES = ("by_scene.npz", "result.json")  # what an arm leaves, in the order of writing
NOT_RUN = "not run"
HEADLINE = (  # of a run; everything else is in its file
    "miou_camera", "iou_camera", "constant_miou_camera", "constant_iou_camera", "rayiou", "miou", "iou",
    "constant_miou", "constant_iou", "auroc", "aupr", "fpr95", "l2_avg", "col_avg", "qa_accuracy", "success",
    "qa_balanced", "qa_balanced_shuffled", "qa_balanced_ngram", "l2_avg_shuffled", "l2_avg_speed_trees")
UNITS = {**{f"minus_{kind}": "m" for kind in ("l2", "history_l2", "l2_ego_mlp", "l2_shuffled", "l2_speed_trees")},
         "scene_centroid_distance": "", "scene_inter_intra": "", "scene_effective_rank": ""}


class Gate(NamedTuple):
    """`metric` `rule` `than` must hold for the mean over seeds, or the comparison means nothing.

    metric: of each arm compared, or "arm:metric" of one arm. than: a number, another metric of the same arm,
    or "arm:metric". Gate("it learns", "occnerf:miou_camera", ">", "constant_miou_camera").
    """

    name: str
    metric: str
    rule: str  # ">" or "<"
    than: float | str


@dataclass(frozen=True)
class Claim:
    """One relative claim. pairs: (expected better, expected worse) or (better, worse, metric)."""

    name: str
    sentence: str  # may start with a letter, "(a) ...", by which --claim finds it too
    arms: dict[str, dict[str, Any]]  # arm -> the config fields and flags it changes
    pairs: tuple[tuple[str, ...], ...]
    metric: str = "miou_camera"
    note: str = ""  # what the arms share, what the comparison cannot show
    gates: tuple[Gate, ...] = ()
    seeds: int = 3  # default of --seeds; 1 for a side question

    def __post_init__(self):
        for better, worse, *_ in self.pairs:
            assert {better, worse} <= self.arms.keys(), f"{self.name}: {better} or {worse} is not an arm"

    def expected(self) -> list[dict[str, str]]:
        triples = [(*pair, self.metric)[:3] for pair in self.pairs]
        return [dict(zip(("better", "worse", "metric"), triple)) for triple in triples]


def start_claim() -> Claim:
    """What the image encoder starts from, for any method with --backbone: ours, at equal steps."""
    names = ("conv", "street", "street+frozen", "street-depth", "street-depth+frozen")
    pairs = (("street", "conv"), ("street-depth", "street"), ("street+frozen", "street"),
             ("street-depth+frozen", "street-depth"))
    return Claim(
        "start", "ours: an encoder that learned on single pictures of other streets beats random weights; "
                 "metric depth adds to it; frozen is no worse",
        {name: {"backbone": name} for name in names}, pairs, seeds=1,
        note="common/networks/street.py: street knows classes, objects and words, street-depth metric depth "
             "too. Frozen features have no colour jitter.")


# --- running ------------------------------------------------------------------------------------------------


def run_claim(claim: Claim, seeds: int, out: Path | str, preset: str, settings: dict[str, Any],
              run_arm: Callable[[str, dict[str, Any], int, Path], None],
              only: tuple[str, ...] | None = None) -> dict[str, Any]:
    """Run what is missing, print the table, write verdict.json; -> the verdict.

    run_arm(arm, overrides, seed, folder) must leave result.json and by_scene.npz in folder. settings: JSON
    values common to all arms; they are stored in claim.json, and other ones later are an InputError. only:
    run these arms; the others read `not run`.
    """
    out = Path(out)
    declare(claim, seeds, out, preset, settings)
    jobs = [(arm, seed) for seed in range(seeds) for arm in claim.arms if only is None or arm in only]
    todo = [job for job in jobs if not finished(arm_folder(out, *job))]
    print(f"claim {claim.name}: {claim.sentence}; {len(jobs) - len(todo)} of {len(jobs)} runs are done")
    begun = time.perf_counter()
    for i, (arm, seed) in enumerate(todo):
        left = f" | eta {duration((time.perf_counter() - begun) / i * (len(todo) - i))}" if i else ""
        print(f"--- {i + 1}/{len(todo)} {arm} seed {seed}{left}", flush=True)
        folder = arm_folder(out, arm, seed)
        run_arm(arm, claim.arms[arm], seed, folder)
        if not finished(folder):
            raise RuntimeError(f"{folder}: arm {arm} did not leave {' and '.join(FILES)}")
    verdict = judge(claim, seeds, out, preset)
    write_json(out / "verdict.json", verdict)
    print_verdict(verdict)
    return verdict


def arm_folder(out: Path | str, arm: str, seed: int) -> Path:
    """Where the result of one arm and seed lies."""
    return Path(out) / arm / f"seed{seed}"


def finished(folder: Path) -> bool:
    """Whether both files are there. A result.json alone is what a kill between the two leaves: run again."""
    return all((folder / name).is_file() for name in FILES)


def take(source: Path, folder: Path) -> None:
    """Copy an arm's files, result.json last."""
    for name in FILES:
        write_bytes(folder / name, (source / name).read_bytes())


def once(path: Path, make: Callable[[], Any]) -> Any:
    """The JSON value in `path`, made first if it is not there: what arms share, such as the constant
    predictor.
    """
    if not path.is_file():
        write_json(path, make())
    return read_json(path)


def declare(claim: Claim, seeds: int, out: Path, preset: str, settings: dict[str, Any]) -> None:
    """Write claim.json before any run. Later calls may add seeds and arms, not change a sign, gate or
    setting.
    """
    fixed = {"claim": claim.name, "sentence": claim.sentence, "preset": preset, "settings": settings,
             "gates": claim.gates}
    value = fixed | {"expected": claim.expected(), "arms": claim.arms, "seeds": seeds}
    value = json.loads(json.dumps(value, default=str))
    path = out / "claim.json"
    if path.is_file():
        old = read_json(path)
        changed = [name for name in fixed if old.get(name) != value[name]]
        changed += ["sign"] if value["expected"][: len(old["expected"])] != old["expected"] else []
        changed += ["arm"] if value["arms"] | old["arms"] != value["arms"] else []
        if changed:
            raise InputError(f"{path}: written before the runs with another {changed[0]}; use another --out")
        value |= {"seeds": max(seeds, old["seeds"]), "written": old["written"], "commit": old["commit"]}
        if value == old:
            return
    elif any(out.glob("*/seed*/result.json")):
        raise InputError(f"{out}: results but no claim.json; the sign is written first, so use another --out")
    else:
        value |= {"written": time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime()), "commit": commit()}
    write_json(path, value)


@exit_on_input_error
def main(doc: str, config: type, presets: dict[str, Any], claims: dict[str, Claim],
         run_arm: Callable[[Any, SimpleNamespace], Path], *, shared: dict[str, Any] | None = None,
         flags: dict[str, cli.Flag] | None = None, other: dict[str, Callable] | None = None,
         world: Callable[[SimpleNamespace], Path],
         steps: Callable[[Any], str] = lambda cfg: f"{cfg.steps} steps") -> dict[str, Any] | None:
    """The command line of experiments/<method>.py: `--claim NAME --seeds N`; -> the verdict.

    run_arm(cfg, args) trains and evaluates one arm in args.out and returns the folder with its result.json
    and by_scene.npz. cfg and args have the arm's overrides; args.seed is set, args.data_root is the data,
    args.pool a folder for what arms share. It is called again after a kill. shared: config fields of every
    arm, where the command line does not give them. flags: the experiment's own; an arm may override them.
    other: further words for --claim, name -> f(cfg, args). world(args): the data without --data-root.
    steps(cfg): printed beside the preset.
    """
    arms = cli.Flag("run these arms; the others read `not run`", tuple[str, ...] | None)
    flags = {"arms": arms} | (flags or {})
    words = f"claim! seeds out data-root version cache device {' '.join(flags)}"
    about = f"re-test a claim: {', '.join([*claims, *(other or {})])}; arms have {shared or 'the preset'}"
    args, cfg = cli.parse(doc, config, presets, {"ablate": (about, words)}, flags, ["ablate", *sys.argv[1:]])
    cfg = replace(cfg, **{name: value for name, value in (shared or {}).items() if name not in args.given})
    letters = {match[1]: name for name, c in claims.items() if (match := re.match(r"\((\w)\)", c.sentence))}
    name = letters.get(args.claim, args.claim)
    if name not in claims and name not in (other or {}):
        raise InputError(f"--claim {args.claim}: one of {', '.join([*claims, *(other or {})])}")
    if name in claims and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise InputError("ablate runs its arms in one process; start it without torchrun")
    args.data_root = args.data_root or world(args)
    args.out = args.out or Path("runs/ablate") / args.method / name
    args.pool = args.out.parent / "arms"
    if name not in claims:
        return other[name](cfg, args)
    claim = claims[name]
    args.arms = args.arms and arms_of(args.arms, claim)
    fields = cli.to_dict(cfg).keys()
    names = ["data_root", "version", *(flag.replace("-", "_") for flag in flags)]
    given = {name: getattr(args, name) for name in names if name not in ("arms", "workers")}

    def one_arm(arm: str, overrides: dict[str, Any], seed: int, folder: Path) -> None:
        arm_cfg = replace(cfg, **{key: value for key, value in overrides.items() if key in fields})
        options = given | {key: value for key, value in overrides.items() if key not in fields}
        assert options.keys() == given.keys(), f"{arm}: no field or flag {options.keys() - given.keys()}"
        key = short_hash({"config": cli.to_dict(arm_cfg), "options": options})
        done = args.pool / key / f"seed{seed}"
        if not finished(done):
            own = {"seed": seed, "out": done / "run", "ckpt": done / "run", "resume": False}
            take(run_arm(arm_cfg, SimpleNamespace(**vars(args) | options | own)), done)
        take(done, folder)

    seeds = args.seeds if "seeds" in args.given else claim.seeds
    settings = {"config": cli.to_dict(cfg), "options": given}
    return run_claim(claim, seeds, args.out, f"{args.preset} ({steps(cfg)})", settings, one_arm, args.arms)


def arms_of(words: tuple[str, ...], claim: Claim) -> tuple[str, ...]:
    """The words of --arms -> the claim's arms, whose names may be of several words."""
    rest, found = " ".join(words), []
    while rest:
        starts = [arm for arm in claim.arms if f"{rest} ".startswith(f"{arm} ")]
        if not starts:
            raise InputError(f"--arms {rest}: {claim.name} has {', '.join(claim.arms)}")
        found.append(max(starts, key=len))
        rest = rest[len(found[-1]) + 1 :]
    return tuple(found)


# --- scores from counts -------------------------------------------------------------------------------------


def read_counts(folder: Path, metric: str) -> tuple[list[str], np.ndarray]:
    """<folder>/by_scene.npz -> scene names in order, (S, ...) counts that `score` turns into the metric."""
    path = folder / "by_scene.npz"
    if metric == "success":
        wanted = {"groups": (None, None), "success": (None, "int64"), "trials": (None, "int64")}
        arrays = read_npz(path, wanted)
        names, counts = arrays["groups"].tolist(), np.stack([arrays["success"], arrays["trials"]], axis=-1)
        return [name.decode() for name in names], counts
    if _has_ratio(path, metric):
        arrays = read_npz(path, {"groups": (None, None), f"ratio_{metric}": (None, "float64")})
        names = [name.decode() for name in arrays["groups"].tolist()]
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
    """OccupancyMeter's metric name -> (the counts it is made of, protocol): miou_lidar -> (lidar, flashocc).
    """
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
    """Summed counts (..., 18, 18), (..., 5, 17), (..., 2) or (..., K, 2) -> (...), by common.metrics' rules.
    """
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
    """A paired difference, better - worse, mean over seeds, with its 95 % interval."""

    value: float
    low: float
    high: float


def paired_difference(better: np.ndarray, worse: np.ndarray, metric: str, draws: int = 2000,
                      seed: int = 0) -> Difference:
    """better, worse (seeds, S, ...) counts of the same seeds and scenes -> the bootstrapped difference.

    A draw takes S scenes and as many seeds as there are, with replacement, the same for both arms. NaN draws
    (no class left) do not occur with real masks; if they do, the interval is NaN and nothing is resolved.
    """
    assert better.shape == worse.shape and better.ndim > 2, f"unpaired: {better.shape} and {worse.shape}"
    n_seeds, n_scenes = better.shape[:2]
    rng = np.random.default_rng(seed)
    weight = rng.multinomial(n_scenes, np.full(n_scenes, 1 / n_scenes), size=draws).astype(float)
    picked = rng.multinomial(n_seeds, np.full(n_seeds, 1 / n_seeds), size=draws) / n_seeds  # (draws, seeds)

    def resampled(counts: np.ndarray) -> np.ndarray:  # (S, ...) of one arm and seed -> (draws,) scores
        sums = weight @ counts.reshape(n_scenes, -1).astype(np.float64)
        return score(sums.reshape(draws, *counts.shape[1:]), metric)

    seeds = list(zip(better, worse, strict=True))
    point = float(np.mean([score(b.sum(0), metric) - score(w.sum(0), metric) for b, w in seeds]))
    drawn = sum(picked[:, k] * (resampled(b) - resampled(w)) for k, (b, w) in enumerate(seeds))
    # Plain percentiles are too narrow for few scenes; expanded ones (Hesterberg 2015) make up for that.
    spread = stdtrit(n_scenes - 1, 0.975) * math.sqrt(n_scenes / (n_scenes - 1)) if n_scenes > 1 else math.inf
    tail = ndtr(-spread)  # 0.025 for many scenes, 0.009 for ten
    return Difference(point, *np.quantile(drawn, [tail, 1 - tail]).tolist())


# --- the verdict --------------------------------------------------------------------------------------------


def judge(claim: Claim, seeds: int, out: Path, preset: str) -> dict[str, Any]:
    """Read the arms' results -> the claim's record, which experiments/results/ keeps.

    A run is an arm and a seed. `runs`, `metrics` and `per_class` hold a list with a value for each run, or
    one value if all have the same. `constants` are the scores of the constant predictor.
    """
    results = {(arm, k): read_json(arm_folder(out, arm, k) / "result.json")
               for arm in claim.arms for k in range(seeds) if finished(arm_folder(out, arm, k))}
    found = list(results.values())
    rules = ("mask_eval", "classes", "absent", "grid", "truth")  # how an arm is trained may differ, not these
    for r in found:
        scored = [[x["dataset"], *(x["protocol"].get(rule) for rule in rules)] for x in (r, found[0])]
        if scored[0] != scored[1]:
            raise InputError(f"{out}: arms scored on different data or under different rules; use "
                             "another --out")
    protocol = found[0]["protocol"] if found else {}
    protocol = {k: v for k, v in protocol.items() if all(r["protocol"].get(k) == v for r in found)}
    record = {
        "kind": "claim", "method": found[0]["method"] if found else "", "claim": claim.name,
        "sentence": claim.sentence, "note": claim.note, "preset": preset,
        **{key: read_json(out / "claim.json")[key] for key in ("written", "commit", "settings", "gates")},
        "dataset": found[0]["dataset"] if found else None, "protocol": protocol, "arms": claim.arms,
        "runs": columns([{**r["cost"], "commit": r["commit"], "command": r["command"],
                          **{n: v for n, v in r["protocol"].items() if n not in protocol}} for r in found])
        | {"arm": [arm for arm, _ in results], "seed": [k for _, k in results]},
        "metrics": columns([r["metrics"] for r in found]),
        "per_class": columns([r["per_class"] for r in found]),
    }
    names = {e["metric"] for e in claim.expected()}
    record["constants"] = {m: 0.5 for m in names if m.endswith("auroc")}  # chance
    for m in sorted({*names, *(m[1:] for m in names)}):
        values = column(record, "metrics", f"constant_{m}") + column(record, "metrics", f"random_{m}")
        if values := [value for value in values if value is not None]:
            record["constants"][m] = float(np.mean(values))
    record["comparisons"] = [_compare(record, out, **e) for e in claim.expected()]
    return json.loads(json.dumps(record, default=str))


def columns(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Rows of nested dicts -> one nested dict of lists with a value for each row; equal values once."""
    table: dict[str, Any] = {}
    for name in dict.fromkeys(name for row in rows for name in row):
        values = [row.get(name) for row in rows]
        if any(isinstance(value, dict) for value in values):
            table[name] = columns([value or {} for value in values])
        else:
            table[name] = values[0] if values.count(values[0]) == len(values) else values
    return table


def column(record: dict[str, Any], table: str, name: str) -> list:
    """A list with the value of each run; None where a run lacks it."""
    value = record[table].get(name)
    return value if isinstance(value, list) else [value] * len(record["runs"]["arm"])


def scores_of(record: dict[str, Any], arm: str, metric: str) -> dict[int, float]:
    """-> {seed: the metric} of an arm's runs, without those that lack it."""
    runs = zip(record["runs"]["arm"], record["runs"]["seed"], column(record, "metrics", metric), strict=True)
    return {seed: value for which, seed, value in runs if which == arm and value is not None}


def mean_of(record: dict[str, Any], arm: str, metric: str) -> float | None:
    """The mean over an arm's seeds; None if it was not run or lacks the metric."""
    scores = list(scores_of(record, arm, metric).values())
    return float(np.mean(scores)) if scores else None


def _compare(record: dict[str, Any], out: Path, better: str, worse: str, metric: str) -> dict[str, Any]:
    row = {"better": better, "worse": worse, "metric": metric}
    seeds = sorted(scores_of(record, better, metric).keys() & scores_of(record, worse, metric).keys())
    if not seeds:
        return row | {"seeds": [], "verdict": NOT_RUN}
    counts: dict[str, list[np.ndarray]] = {better: [], worse: []}
    scenes = None
    for arm in (better, worse):
        for k in seeds:
            folder = arm_folder(out, arm, k)
            names, value = read_counts(folder, metric)
            if scenes is not None and names != scenes:
                raise InputError(f"{folder}/by_scene.npz: not the first arm's scenes; arms must be paired")
            scenes = names
            stored, made = scores_of(record, arm, metric)[k], float(score(value.sum(0), metric))
            if not math.isclose(stored, made, rel_tol=1e-6, abs_tol=1e-9):
                raise InputError(f"{folder}: result.json has {metric} {stored}, by_scene.npz {made:.6f}; "
                                 "remove both")
            counts[arm].append(value)
    d = paired_difference(np.stack(counts[better]), np.stack(counts[worse]), metric)
    row |= {"seeds": seeds, "scenes": len(scenes), "difference": d.value, "interval": [d.low, d.high]}
    row["gate"] = unmet(record, row)
    return row | {"verdict": verdict(row)}


def unmet(record: dict[str, Any], row: dict[str, Any]) -> str:
    """Why a comparison means nothing: the gates that it does not meet, with figures; "" if it meets all."""
    arms, metric = (row["better"], row["worse"]), row["metric"]
    means, constant = [mean_of(record, arm, metric) for arm in arms], record["constants"].get(metric)
    reasons = []
    if constant is not None and max(means) < constant:
        reasons.append(f"both arms below the constant predictor {show(constant, metric)}")
    every = [value for arm in arms for value in scores_of(record, arm, metric).values()]
    ends = [end for end in (0, 1) if all(abs(value - end) < 5e-4 for value in every)]
    reasons += [f"both arms at {show(end, metric)}" for end in ends]
    reasons += [line for line, met in gates_of(record, arms) if not met]
    return "; ".join(dict.fromkeys(reasons))


def gates_of(record: dict[str, Any], arms: tuple[str, ...]) -> list[tuple[str, bool]]:
    """The claim's own gates for these arms: a line with figures, and whether it is met."""
    lines = []
    for name, subject, rule, than in record["gates"]:
        arm, _, of = subject.rpartition(":")
        for which in (arm,) if arm else arms:
            figure, limit = mean_of(record, which, of), than
            if isinstance(than, str):
                other, _, what = than.rpartition(":")
                limit = mean_of(record, other or which, what)
            shown = [NOT_RUN if v is None else show(v, of) for v in (figure, limit)]
            known = figure is not None and limit is not None
            met = known and (figure > limit if rule == ">" else figure < limit)
            lines.append((f"{name}: {which} {shown[0]}, needs {rule} {shown[1]}", met))
    return lines


def verdict(row: dict[str, Any]) -> str:
    """A comparison's verdict in words: from its gate, its number of seeds and its interval."""
    if not row["seeds"]:
        return NOT_RUN
    if row.get("gate"):
        return f"gate not met: {row['gate']}"
    if len(row["seeds"]) < 3:
        return ("one seed", "two seeds")[len(row["seeds"]) - 1]
    low, high = row["interval"]
    return "holds" if low > 0 else "does not hold" if high < 0 else "not resolved"


def show(value: float | None, metric: str = "", sign: str = "") -> str:
    """A value as the tables print it: percent, or its unit in UNITS."""
    if value is None:
        return NOT_RUN
    unit = UNITS.get(metric)
    return f"{100 * value:{sign}.2f}" if unit is None else f"{value:{sign}.2f} {unit}".strip()


def print_verdict(v: dict[str, Any]) -> None:
    """The claim's table on the terminal."""
    for m in dict.fromkeys(c["metric"] for c in v["comparisons"]):
        print(m)
        for arm in v["arms"]:
            print(f"  {arm:24}", " ".join(show(x, m) for x in scores_of(v, arm, m).values()) or NOT_RUN)
        if m in v["constants"]:
            print(f"  {'constant predictor':24} {show(v['constants'][m], m)}")
    for line, met in dict.fromkeys(gates_of(v, tuple(v["arms"]))):
        print(f"gate {'met' if met else 'NOT met'}: {line}")
    for c in v["comparisons"]:
        effect = ""
        if c["seeds"]:
            low, high = (show(x, c["metric"], "+") for x in c["interval"])
            effect = f"{show(c['difference'], c['metric'], '+')} [{low}, {high}], "
        print(f"{c['better']} > {c['worse']}, {c['metric']}: {effect}{c['verdict']}")


# --- label quality ------------------------------------------------------------------------------------------


def write_quality(out: Path | str, method: str, dataset: dict[str, Any], config: dict[str, Any],
                  rows: dict[str, dict[str, float]]) -> None:
    """label_quality.json of a comparison of labels, and its table on the terminal. dataset: name, version,
    split, frames; rows: what was made -> column -> share (a column that names a unit, as s/keyframe: a
    number).
    """
    record = {"kind": "labels", "method": method, "dataset": dataset, "commit": commit(),
              "command": command(), "config": config, "rows": rows}
    write_json(Path(out) / "label_quality.json", record)
    head, body = quality_cells(rows)
    widths = [max(map(len, column)) for column in zip(head, *body)]
    for line in [head, *body]:
        print("  ".join(f"{x:{'<' if k == 0 else '>'}{w}}" for k, (x, w) in enumerate(zip(line, widths))))


def quality_cells(rows: dict[str, dict[str, float]]) -> tuple[list[str], list[list[str]]]:
    """-> the head, and a line of cells for each row, its name first. Percent."""
    head = list(dict.fromkeys(c for row in rows.values() for c in row))

    def cell(row: dict[str, float], c: str) -> str:
        return "" if c not in row else f"{row[c]:.2f}" if "/" in c else f"{100 * row[c]:.1f}"

    return ["labels", *head], [[name, *(cell(row, c) for c in head)] for name, row in rows.items()]


# --- publishing ---------------------------------------------------------------------------------------------


def publish(source: Path | str, name: str, results: Path = RESULTS) -> Path:
    """Write <results>/<name>.json of a run's or a claim's folder, a label quality's folder, or a bench's JSON
    file.

    What the file held before is kept in short, with its commit, under `replaced`.
    """
    source, path = Path(source), results / f"{name}.json"
    if source.is_file():
        record = {"kind": "bench", "method": name.partition("-")[0], **read_json(source)}
        if isinstance(rows := record.get("rows"), dict):  # tests.bench's: what the table shows
            record["rows"] = {k: {"shapes": v["shapes"], "ms": {"ours": v["ms"]["ours"]}, "ratio": v["ratio"]}
                              for k, v in rows.items()}
    elif (source / "verdict.json").is_file():
        record = slim(read_json(source / "verdict.json"))
    elif (source / "label_quality.json").is_file():
        record = read_json(source / "label_quality.json")
    else:
        result, config = read_json(source / "result.json"), read_json(source / "config.json")
        config = {key: value for key, value in config.items() if result.get(key) != value}
        record = {"kind": "run", **result, "trained": config}
        if (source / "log.jsonl").is_file():
            lines = (source / "log.jsonl").read_text().splitlines()[-20:]
            record["log"] = columns([json.loads(line) for line in lines])
    if path.is_file():
        old = read_json(path)
        record["replaced"] = old.get("replaced", []) + ([brief(old)] if brief(old) != brief(record) else [])
    write_bytes(path, dumps(record).encode())
    print(f"{path}: {path.stat().st_size / 1000:.0f} kB")
    return path


def slim(claim: dict[str, Any]) -> dict[str, Any]:
    """A claim's record with the scores by class of the masks that it is judged in, and camera's.

    A run's result.json has them of every mask; they would be half of the published file.
    """
    judged = {"camera", *(row["metric"].rpartition("_")[2] for row in claim["comparisons"])}
    masks = {name: scores for name, scores in claim["per_class"].items()
             if name in judged or name not in MASKS}
    return claim | {"per_class": masks}


def brief(record: dict[str, Any]) -> dict[str, Any]:
    """What is kept of a result that a later one replaces: commits and headline numbers."""
    kept = {key: record[key] for key in ("commit", "comparisons", "rows") if key in record}
    kept["runs"] = sorted(set(column(record, "runs", "commit"))) if "runs" in record else []
    if record["kind"] == "run":
        kept["metrics"] = {name: record["metrics"][name] for name in HEADLINE if name in record["metrics"]}
    return {key: value for key, value in kept.items() if value}


def dumps(value: Any) -> str:
    """JSON with a line for each list or small dict. Numbers have five digits, those of per_class four.

    Absolute paths keep their last part alone: a machine's folders are private.
    """

    def tidy(x: Any, digits: int = 5) -> Any:
        if isinstance(x, dict):
            return {k: tidy(v, 4 if k == "per_class" else digits) for k, v in x.items()}
        if isinstance(x, list):
            return [int(v) if isinstance(v, bool) else tidy(v, digits) for v in x]
        if isinstance(x, str):
            return re.sub(r"(?<![^\s='\"])/(?:[^\s/'\"]+/)*([^\s/'\"]+)", r"\1", x)
        return (float(f"{x:.{digits}g}") or 0) if isinstance(x, float) else x

    text = json.dumps(tidy(value), indent=0, ensure_ascii=False)
    return re.sub(r"[\[{][^\[\]{}]*[\]}]", lambda m: m[0].replace("\n", ""), text) + "\n"


@exit_on_input_error
def command_line(argv: list[str] | None = None) -> None:
    """table, publish."""
    from experiments import table

    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == ["publish"] and len(argv) == 3:
        publish(argv[1], argv[2])
    elif argv in (["table"], ["table", *argv[1:2]]):
        table.write(Path(argv[1]) if argv[1:] else RESULTS)
    else:
        raise InputError("usage: python -m experiments.runner table [RESULTS] | publish RUN NAME")


if __name__ == "__main__":
    command_line()
