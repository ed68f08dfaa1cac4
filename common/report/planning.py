"""Scores a driving VLM beside its controls: occupancy, answers, plans, meta-actions.

    drive(i, images=i, questions=(), stream=True) -> Prediction is all that a method gives. i: the keyframe.
    images: the keyframe whose images are shown. stream: False drops the occupancy stream.

`report` writes result.json, by_scene.npz and pictures, and prints the tables. `Baselines` are planners that
see no image, `WordBaseline` answers from the words alone. `skipping_cost` compares passes with and without
the occupancy stream.
"""

import math
import re
import time
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from tqdm import tqdm

from common import viz, worlds
from common.audit import planning_truth
from common.files import InputError, misfit, read_image, read_json, write_npz
from common.geometry import OCC3D
from common.metrics import OccupancyMeter, PlanningMeter, box_corners, protocol_line, qa_scores
from common.nuscenes import CAMERAS, Future, NuScenesOccupancy, find_root, find_version
from common.questions import ANSWERS, TYPES
from common.report.occupancy import (RULES, Truth, constant_scores, describe_dataset, print_controls,
                                     print_cost, spread)
from common.report.pictures import chosen, draw_curves
from common.train import joined, param_groups, reset_peak, schedule, set_lr, share_out, write_result

Action = tuple[str, str] | None  # longitudinal, lateral; None: unknown
COMMANDS = ("right", "left", "straight")  # in the order of Future.command


class Prediction(NamedTuple):
    """What a network predicts for one keyframe."""

    occupancy: np.ndarray  # (200, 200, 16) uint8
    answers: list[str]  # the most probable of the thirty
    free: list[str]  # greedy, unconstrained
    thought: str  # generated text: chain of thought and meta-action
    action: Action  # parsed from that text
    paths: dict[str, np.ndarray]  # planner row -> (6, 2) float64 [m]


Drive = Callable[..., Prediction]

# --- what a planner may be given, and planners that see no image --------------------------------------------


class Ego(NamedTuple):
    """What a planner may be given besides the images; (B, ...) tensors."""

    command: Tensor  # (B,) int64 of COMMANDS
    history: Tensor  # (B, 4, 2) [m] positions at -2.0 ... -0.5 s, LIDAR_TOP frame
    known: Tensor  # (B, 4) bool: that keyframe exists; otherwise the files copy the future, so it is 0 here

    @property
    def speed(self) -> Tensor:
        """(B, 2): the last half second's speed [10 m/s], 0 where there is none, and whether it is known."""
        known = self.known[:, -1].float()
        return torch.stack([self.history[:, -1].norm(dim=1) / 5 * known, known], 1)


def ego_of(futures: Sequence[Future], device: torch.device | str = "cpu") -> Ego:
    """Futures -> `Ego`; a past that is not known is zero."""
    known = torch.from_numpy(np.stack([f.history_mask for f in futures]))
    history = torch.from_numpy(np.stack([f.history for f in futures])) * known[..., None]
    command = torch.tensor([f.command for f in futures])
    return Ego(*(x.to(device) for x in (command, history, known)))


def unknown_future() -> Future:
    """An ego of which nothing is known."""
    path, mask = np.zeros((6, 2), np.float32), np.zeros(6, bool)
    history, agents = np.zeros((4, 2), np.float32), np.zeros((0, 6, 2), np.float32)
    return Future(path, mask, history, mask[:4], COMMANDS.index("straight"), 0.0, agents, agents[..., 0],
                  agents[..., 0] > 0)


MIRRORED = [CAMERAS.index(re.sub("LEFT|RIGHT", lambda m: {"LEFT": "RIGHT", "RIGHT": "LEFT"}[m[0]], name))
            for name in CAMERAS]  # the camera that takes each one's place in a mirror


def hold_out(scenes: Sequence[str], n: int, every: int = 10) -> tuple[list[int], list[int]]:
    """Scene of each of n keyframes -> those to learn from, and at most 256 of each tenth scene, by
    which training picks its best weights. No scenes: all, none."""
    held = set(list(dict.fromkeys(scenes))[every // 2 :: every])
    apart = [i for i, name in enumerate(scenes) if name in held]
    return [i for i in range(n) if i not in set(apart)], [apart[k] for k in spread(len(apart), 256)]


def mirrored_words(text: str) -> str:
    """left becomes right, and right left."""
    return re.sub("left|right", lambda m: {"left": "right", "right": "left"}[m[0]], text)


def mirrored_future(future: Future) -> Future:
    """Ego's path, history and command in a mirror that stands along its way; the agents stay."""
    across = np.float32([-1, 1])
    return future._replace(trajectory=future.trajectory * across, history=future.history * across,
                           command=(1, 0, 2)[future.command])


def constant_velocity(ego: Ego) -> Tensor:
    """(B, 6, 2): the last half second's displacement goes on; without a known past: standing still."""
    return -ego.history[:, -1:] * torch.arange(1, 7, device=ego.history.device)[:, None]


def constant_turn_rate(ego: Ego) -> Tensor:
    """(B, 6, 2): speed and yaw rate of the last two displacements go on. Unless both moved: constant
    velocity."""
    new, old = -ego.history[:, -1], ego.history[:, -1] - ego.history[:, -2]  # of the last two half seconds
    angle_new, angle_old = (torch.atan2(-d[:, 0], d[:, 1]) for d in (new, old))
    turn = angle_new - angle_old
    turn = torch.atan2(turn.sin(), turn.cos())
    moved = ego.known[:, -2:].all(1) & (new.norm(dim=1) > 0.25) & (old.norm(dim=1) > 0.25)
    turn = torch.where(moved, turn, 0.0)
    angle = angle_new[:, None] + torch.arange(1, 7, device=turn.device) * turn[:, None]  # (B, 6)
    steps = new.norm(dim=1)[:, None, None] * torch.stack([-angle.sin(), angle.cos()], -1)
    return steps.cumsum(1)


def mean_path(truth: Tensor, known: Tensor) -> Tensor:
    """(M, 6, 2) paths, (M, 6) known -> (6, 2): the mean of each step's known waypoints."""
    return (truth * known[..., None]).sum(0) / known.sum(0).clamp_min(1)[:, None]


def stack_paths(futures: Sequence[Future]) -> tuple[Tensor, Tensor]:
    """Futures -> paths (B, 6, 2) [m], known (B, 6)."""
    pairs = ([f.trajectory for f in futures], [f.mask for f in futures])
    return tuple(torch.from_numpy(np.stack(x)) for x in pairs)


class Baselines:
    """Planners that see no image, fitted to training futures: mean path (also per command), constant velocity
    and turn rate, an MLP on the ego's history, and trees on its speed (scikit-learn's).

    Without a known past the motion models return the mean path. `cv_tables` takes VAD's history instead,
    which at a scene's start is copied from the future: a leak, but often what is reported.
    """

    NAMES = {"mean": "mean training trajectory", "mean_command": "mean per command",
             "cv": "constant velocity", "cv_tables": "constant velocity, VAD's history",
             "ctr": "constant turn rate",
             "ego_mlp": "ego-history MLP", "ego_mlp_command": "ego-history MLP, command",
             "speed_trees": "trees on speed", "speed_trees_command": "trees on speed, command"}

    def __init__(self, futures: Sequence[Future], seed: int = 0):
        (truth, known), ego = stack_paths(futures), ego_of(futures)
        if not known.any():
            raise InputError(f"none of the {len(futures)} training keyframes has a known future; planning "
                             "needs scenes of two or more keyframes")
        self.mean, self.per_command = mean_path(truth, known), []
        for k in range(len(COMMANDS)):
            rows = ego.command == k
            there = known[rows].any(0)[:, None]
            self.per_command.append(torch.where(there, mean_path(truth[rows], known[rows]), self.mean))
        self.mlps = {name: self.fit(truth, known, ego, name.endswith("command"), seed)
                     for name in ("ego_mlp", "ego_mlp_command")}
        self.trees = {name: self.grow(truth, known, ego, name.endswith("command"), seed)
                      for name in ("speed_trees", "speed_trees_command")} if known.all(1).any() else {}

    @staticmethod
    def spoken(ego: Ego, command: bool) -> np.ndarray:
        """(B, 2), or with the command (B, 5): what trees are given."""
        named = [F.one_hot(ego.command, len(COMMANDS))] if command else []
        return torch.cat([ego.speed, *named], 1).numpy()

    def grow(self, truth: Tensor, known: Tensor, ego: Ego, command: bool, seed: int) -> Any:
        """A forest on the full horizons; at least eight of them in a leaf."""
        from sklearn.ensemble import RandomForestRegressor  # here: half a second that others do not need

        full = known.all(1).numpy()
        forest = RandomForestRegressor(100, min_samples_leaf=8, random_state=seed)
        return forest.fit(self.spoken(ego, command)[full], truth.flatten(1).numpy()[full])

    @staticmethod
    def features(ego: Ego, command: bool) -> Tensor:
        """(B, 12), or with the command (B, 15)."""
        parts = [ego.history.flatten(1) / 10, ego.known.float()]
        return torch.cat(parts + ([F.one_hot(ego.command, len(COMMANDS)).float()] if command else []), 1)

    def guess(self, ego: Ego, kind: Callable[[Ego], Tensor] = constant_velocity) -> Tensor:
        """(B, 6, 2): a motion model, or the mean path where there is no past."""
        return torch.where(ego.known[:, -1, None, None], kind(ego), self.mean)

    def fit(self, truth: Tensor, known: Tensor, ego: Ego, command: bool, seed: int) -> nn.Module:
        """300 full-batch steps on the correction of constant velocity; -> the MLP."""
        with torch.random.fork_rng(), torch.enable_grad():
            torch.manual_seed(seed)
            x, base = self.features(ego, command), self.guess(ego)
            net = nn.Sequential(nn.Linear(x.shape[1], 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(),
                                nn.Linear(64, 12))
            optimizer = torch.optim.AdamW(param_groups(net, 5e-3, 5e-3, 1e-2))
            for step in range(300):
                set_lr(optimizer, schedule(step, 300))
                error = (base + net(x).unflatten(1, (6, 2)) - truth).square().sum(-1).add(1e-6).sqrt() * known
                optimizer.zero_grad()
                (error.sum(1) / known.sum(1).clamp_min(1)).mean().backward()
                optimizer.step()
        if not all(p.isfinite().all() for p in net.parameters()):
            raise InputError("the ego-history MLP is not finite after its fit; check the tables' poses, run it again")
        return net.requires_grad_(False)

    def __call__(self, future: Future) -> dict[str, np.ndarray]:
        """-> {name: (6, 2) [m]}"""
        ego = ego_of([future])
        tables = -torch.arange(1, 7)[:, None] * torch.from_numpy(future.history)[-1]
        paths = {"mean": self.mean, "mean_command": self.per_command[future.command],
                 "cv": self.guess(ego)[0], "cv_tables": tables,
                 "ctr": self.guess(ego, constant_turn_rate)[0]}
        for name, net in self.mlps.items():
            correction = net(self.features(ego, name.endswith("command"))).unflatten(1, (6, 2))
            paths[name] = (self.guess(ego) + correction)[0]
        for name in ("speed_trees", "speed_trees_command"):
            found = self.trees and self.trees[name].predict(self.spoken(ego, name.endswith("command")))
            paths[name] = torch.from_numpy(found).view(6, 2) if self.trees else self.mean
        return {name: path.double().numpy() for name, path in paths.items()}


class WordBaseline:
    """Answers questions from their words alone: logistic regression on the n-grams of training questions."""

    def __init__(self, rows: Sequence[dict]):
        from sklearn.feature_extraction.text import CountVectorizer  # here: as the trees
        from sklearn.linear_model import LogisticRegression
        from sklearn.pipeline import make_pipeline

        texts, answers = [row["question"] for row in rows], [str(row["answer"]) for row in rows]
        self.only = answers[0] if len(set(answers)) == 1 else None
        self.model = make_pipeline(CountVectorizer(ngram_range=(1, 3), binary=True, token_pattern=r"\S+"),
                                   LogisticRegression(C=1.0, max_iter=100))
        if self.only is None:
            self.model.fit(texts, answers)

    def __call__(self, questions: Sequence[str]) -> list[str]:
        return [self.only] * len(questions) if self.only else self.model.predict(list(questions)).tolist()


def best_constants(questions: Sequence[dict]) -> dict[str, str]:
    """Training questions -> the most frequent answer of each type; ties: the first in the alphabet."""
    counts: dict[str, Counter] = {}
    for row in questions:
        counts.setdefault(row["template_type"], Counter())[str(row["answer"])] += 1
    return {kind: min(c, key=lambda a: (-c[a], a)) for kind, c in counts.items()}


def check_questions(dataset: NuScenesOccupancy) -> str:
    """-> a line that counts the keyframes' questions and futures. InputError: an answer outside NuScenes-QA's
    thirty."""
    asked = full = some = 0
    for i, token in enumerate(dataset.tokens):
        for row in dataset.questions(i) or []:
            asked += 1
            if str(row["answer"]) not in ANSWERS:
                raise InputError(f"{dataset.root}: keyframe {token} has the answer '{row['answer']}', which "
                                 "is none of NuScenes-QA's thirty; use its own question files")
        mask = dataset.future(i).mask
        full, some = full + bool(mask.all()), some + bool(mask.any())
    n = len(dataset)
    return (f"{dataset.split}: {n} keyframes, {asked} questions; {full} with a full 3 s of future (they "
            f"teach the chain of thought), {some - full} with a part of it (their missing waypoints are "
            f"masked), {n - some} without any")


# --- scores of one arm --------------------------------------------------------------------------------------


class Scores:
    """The scores of one arm: own or shuffled images, or the stream skipped. rows: planner rows."""

    def __init__(self, rows: Sequence[str] = (), standing: float = 0.5):
        self.occupancy, self.standing = OccupancyMeter(), standing  # standing: [m/s] below it a car stands
        self.plans = {name: PlanningMeter() for name in rows}
        self.hard = {name: PlanningMeter() for name in rows}  # turning and braking scenes alone
        self.questions: list[dict] = []
        self.actions: list[tuple[Action, tuple[str, str]]] = []
        self.scenes: dict[str, None] = {}  # in order

    def add_plans(self, paths: dict[str, np.ndarray], truth: tuple, action: Action, scene: str) -> None:
        """truth: `audit.planning_truth`'s trajectory, mask, rasters. action: the recorded one."""
        moving = np.linalg.norm(truth[0][0]) / 0.5 > self.standing  # a car that keeps standing does not brake
        hard = action is not None and (action[0] == "decelerate" or action[1] in ("left", "right")
                                       or action[0] == "stop" and moving)
        for name, path in paths.items():
            for meters in (self.plans, self.hard) if hard else (self.plans,):
                meters[name].add(path, truth[0].astype(np.float64), truth[1], truth[2], group=scene)

    def qa(self, key: str = "pred") -> dict[str, float]:
        """{qa_accuracy, qa_<type>, qa_<type>_h<hop>} of NuScenes-QA's form as fractions; {qa_balanced,
        qa_balanced_<half>} of the text-balanced set."""
        scores, rows = {}, [row | {"pred": row[key]} for row in self.questions]
        for half in ("", "bearing", "depth"):
            right = [str(row["pred"]) == str(row["answer"]) for row in rows if half in row.get("half", "-")]
            if right:
                scores[f"qa_balanced_{half}".rstrip("_")] = float(np.mean(right))
        table = qa_scores([row for row in rows if "half" not in row])
        if not table["Overall"][1]:
            return scores
        for name, (correct, total, _) in table.items():
            kind, _, hop = name.rpartition("_")
            name = "accuracy" if name == "Overall" else f"{kind}_h{hop}" if hop in ("0", "1") else name
            scores[f"qa_{name}"] = correct / total
        return scores

    def action_metrics(self) -> dict[str, float]:
        """Accuracy of the generated meta-action beside the commonest recorded one; how often it could be
        parsed."""
        if not self.actions:
            return {}
        metrics = {"meta_parsed": float(np.mean([a is not None for a, _ in self.actions]))}
        for k, name in enumerate(("longitudinal", "lateral")):
            right = [a is not None and a[k] == t[k] for a, t in self.actions]
            commonest = Counter(t[k] for _, t in self.actions).most_common(1)[0][1]
            metrics |= {f"meta_{name}": float(np.mean(right)),
                        f"constant_meta_{name}": commonest / len(self.actions)}
        return metrics


class Plans(Mapping):
    """{keyframe: `audit.planning_truth`}, the rasters compressed: some kB each, not 1.4 MB."""

    def __init__(self, dataset: NuScenesOccupancy, indices: Sequence[int]):
        self.kept: dict[int, tuple] = {}
        for i in tqdm(indices, "planning truth", leave=False):
            path, mask, rasters = planning_truth(dataset, i)
            both = np.stack([np.stack(pair) for pair in rasters.values()])  # (protocols, 2, 6, 200, 200)
            packed = zlib.compress(np.packbits(both).tobytes(), 1)
            self.kept[i] = path, mask, tuple(rasters), both.shape, packed

    def __getitem__(self, i: int) -> tuple[np.ndarray, np.ndarray, dict[str, tuple]]:
        path, mask, names, shape, packed = self.kept[i]
        bits = np.unpackbits(np.frombuffer(zlib.decompress(packed), np.uint8), count=math.prod(shape))
        return path, mask, {name: tuple(pair) for name, pair in zip(names, bits.reshape(shape).astype(bool))}

    def __iter__(self) -> Iterator[int]:
        return iter(self.kept)

    def __len__(self) -> int:
        return len(self.kept)


def plan_metrics(meters: dict[str, PlanningMeter], main: str | None = None,
                 prefix: str = "") -> dict[str, float]:
    """{l2_avg_vad, command_l2_avg_vad, ...}: the main row without its name. UniAD's own averages count masked
    steps as 0: they are named *_uniad_masked; *_uniad are those of full horizons."""
    found = {}
    for row, meter in meters.items():
        name = f"{prefix}{'' if row == main else f'{row}_'}"
        for key, value in meter.metrics().items() if meter.steps else ():
            found[f"{name}{key}_masked" if key.endswith("uniad") else f"{name}{key}"] = value
        for key, value in meter.full_horizons().items():
            found[f"{name}{key}"] = value
    return found


def run_arm(drive: Drive, dataset: NuScenesOccupancy, indices: list[int], truth: Truth | None,
            plans: Mapping[int, tuple], *, arm: str, rows: Sequence[str],
            action_of: Callable[[Future], Action], questions: int = 0, rayiou: bool = False,
            save: Path | None = None) -> Scores:
    """Drive the keyframes `indices` and score them; -> the scores.

    arm: "own" images, another scene's ("shuffled"), or own ones without the stream ("skipped"). truth None:
    the occupancy is not scored. Under torchrun each process drives its share, and the main one scores.
    plans: {keyframe: planning truth}. questions: how many a keyframe, 0: all. save: folder for <token>.npz.
    """
    scores = Scores(rows)

    def asked_of(i: int) -> list[dict]:
        rows = dataset.questions(i) or []
        return [rows[q] for q in spread(len(rows), questions)]

    def work(k: int) -> Prediction:
        i, other = indices[k], indices[(k + len(indices) // 2) % len(indices)]
        return drive(i, images=other if arm == "shuffled" else i, stream=arm != "skipped",
                     questions=[row["question"] for row in asked_of(i)])

    driven = tqdm(share_out(work, range(len(indices))), f"eval, {arm} images", len(indices), leave=False)
    for i, found in zip(indices, driven, strict=True):
        if not joined().is_main:  # one process scores
            continue
        asked, future, scene = asked_of(i), dataset.future(i), dataset.scene_names[i]
        scores.scenes[scene] = None
        if truth is not None and arm != "skipped":
            origins = dataset.ray_origins(i) if rayiou else None
            scores.occupancy.add(found.occupancy, *truth(i), group=scene, origins=origins)
        for row, answer, free in zip(asked, found.answers, found.free, strict=True):
            scores.questions.append({**row, "pred": answer, "free": free, "scene": scene})
        action = action_of(future)
        if action is not None:
            scores.actions.append((found.action, action))
        if i in plans:
            scores.add_plans(found.paths, plans[i], action, scene)
        if save is not None:
            save_prediction(save, dataset.tokens[i], found)
    return scores


def save_prediction(folder: Path, token: str, found: Prediction) -> None:
    """<token>.npz: `pred` and the first row's `trajectory`, exactly what is scored."""
    path = next(iter(found.paths.values()), None)
    write_npz(folder / f"{token}.npz", pred=found.occupancy, **({} if path is None else {"trajectory": path}))


def images_alone(found: Prediction) -> Prediction:
    """Without the paths that were planned from a command or the ego's motion."""
    return found._replace(paths={row: path for row, path in found.paths.items() if row == "none"})


def changed(own: Scores, skipped: Scores) -> dict[str, float]:
    """What dropping the stream changed over the whole evaluation: answers, and waypoint errors [m]. 0: not a
    bit."""
    answers = [a["pred"] != b["pred"] or a["free"] != b["free"]
               for a, b in zip(own.questions, skipped.questions, strict=True)]
    errors = [(steps["uniad"] - skipped.plans[row].by_group()[scene]["uniad"]).abs().max()
              for row in own.plans for scene, steps in own.plans[row].by_group().items()]
    return {"skip_changed_answers": float(sum(answers)), "skip_changed_l2": float(max(errors, default=0.0))}


def scene_sums(own: Scores, other: Scores, main: str | None) -> dict[str, np.ndarray]:
    """{metric: (S, K, 2) sums by scene}, rows as in by_scene.npz, for the claims' bootstrap; higher is
    better.

    minus_l2 and minus_col are the negative of VAD's average L2 [m] and box collision, so a table's percent
    are centimetres. *_over_shuffled: what own images add to the same network's answers on another scene's.
    """
    scenes, sums = list(own.scenes), {}
    kinds = (*TYPES, "depth", "bearing")
    right, gain = ({kind: np.zeros((len(scenes), 2)) for kind in kinds} for _ in range(2))
    for mine, wrong in zip(own.questions, other.questions, strict=True):
        s, kind = scenes.index(mine["scene"]), mine.get("half", mine["template_type"])
        hit, lucky = (str(row["pred"]) == str(row["answer"]) for row in (mine, wrong))
        right[kind][s] += hit, 1
        gain[kind][s] += float(hit) - float(lucky), 1
    for name, table in (("", right), ("_over_shuffled", gain)):
        asked = [kind for kind in TYPES if table[kind].any() or right[kind].any()]
        sums |= {f"qa_{kind}{name}": table[kind][:, None] for kind in asked}
        if asked:
            sums[f"qa_accuracy{name}"] = sum(table[kind] for kind in asked)[:, None]
            sums[f"qa_types{name}"] = np.stack([table[kind] for kind in asked], 1)  # the mean of the types
        halves = {f"qa_balanced_{half}{name}": table[half][:, None] for half in ("depth", "bearing")
                  if right[half].any()}
        sums |= halves | ({f"qa_balanced{name}": sum(halves.values())} if halves else {})
    for row in own.plans:
        for name, column in (("l2", 0), ("col", 2)):
            table = np.zeros((len(scenes), 1, 2))
            for scene, steps in own.plans[row].by_group().items():
                error = steps["vad"][:, column]  # (samples, 6)
                each = sum(error[:, : 2 * t].mean(1) for t in (1, 2, 3)) / 3
                table[scenes.index(scene), 0] = -float(each.sum()), len(each)
            sums[f"minus_{name}" if row == main else f"minus_{row}_{name}"] = table
    return sums


def sum_metrics(sums: dict[str, np.ndarray]) -> dict[str, float]:
    """Sums by scene -> the metrics over all scenes, undefined ones left out: the mean over K of first /
    second."""
    metrics = {}
    for name, table in sums.items():
        first, second = table.sum(0).T
        if (second > 0).any():
            metrics[name] = float((first[second > 0] / second[second > 0]).mean())
    return metrics


# --- the report ---------------------------------------------------------------------------------------------


def report(drive: Drive, *, dataset: NuScenesOccupancy, train_set: NuScenesOccupancy, out: Path,
           run: dict[str, Any], cost: dict[str, float], protocol: dict[str, str], truth: Truth | None,
           action_of: Callable[[Future], Action], rows: Sequence[str], against: str = "", frames: int = 0,
           questions: int = 0, rayiou: bool = True, pictures: int = 6, save: Path | None = None,
           extra: dict[str, float] | None = None, known: dict[str, float] | None = None) -> dict[str, float]:
    """Score, compare with the controls, draw and print; write result.json and by_scene.npz into `out`; ->
    metrics.

    run: config.json of the run. cost: of all its stages. protocol: the method's entries. against: the name of
    the truth, if it is not Occ3D's. action_of: the recorded meta-action of a future. rows: planner rows, the
    first is the main one; none: no planner yet. train_set: what baselines are fitted to. extra: metrics of
    the method's own (vq_*, skip_*, *_over_plain). known: metrics known already (an arm of a claim: its
    constant); then another scene's images are the only control, and nothing is drawn. truth None: no
    occupancy is scored.
    """
    begun, indices, main = time.time(), spread(len(dataset), frames), next(iter(rows), None)
    plans = Plans(dataset, [i for i in indices if rows and dataset.future(i).mask.any()])
    arms = {}
    for arm in ("own", "shuffled") if known is not None else ("own", "shuffled", "skipped"):
        own = {"rayiou": rayiou, "save": save} if arm == "own" else {}
        arms[arm] = run_arm(drive, dataset, indices, truth, plans, arm=arm, rows=rows, action_of=action_of,
                            questions=questions, **own)
    if not joined().is_main:  # one process writes
        return {}
    own = arms["own"]
    metrics = (own.occupancy.metrics() if truth else {}) | own.qa() | own.action_metrics()
    metrics |= (extra or {}) | (known or {})
    metrics |= plan_metrics(own.plans, main) | plan_metrics(own.hard, main, "hard_")
    if any("half" not in row for row in own.questions):
        metrics |= {"free_qa_accuracy": own.qa("free")["qa_accuracy"],
                    "free_in_vocabulary": float(np.mean([r["free"] in ANSWERS for r in own.questions]))}
    kept = ("miou_camera", "iou_camera", "qa_", "l2_", "obj_box_", *(f"{row}_" for row in rows))
    for arm, scores in list(arms.items())[1:]:
        values = scores.qa() | plan_metrics(scores.plans, main)
        values |= scores.occupancy.metrics() if scores.occupancy.counts else {}
        metrics |= {f"{arm}_{name}": value for name, value in values.items() if name.startswith(kept)}
    metrics |= {f"qa_balanced_shuffled{half}": metrics[f"shuffled_qa_balanced{half}"]
                for half in ("", "_depth", "_bearing") if f"shuffled_qa_balanced{half}" in metrics}
    metrics |= {"l2_avg": metrics.get("l2_avg_vad", math.nan),
                "l2_avg_shuffled": metrics.get("shuffled_l2_avg_vad", math.nan),
                "col_avg": metrics.get("obj_box_col_avg_vad", math.nan)}
    others = score_baselines(dataset, train_set, plans, action_of)
    metrics |= plan_metrics(others.plans) | plan_metrics(others.hard, prefix="hard_")
    metrics |= {f"l2_avg_{name}": metrics.get(f"{key}_l2_avg_vad", math.nan) for name, key in (
        ("mean_trajectory", "mean"), ("ego_mlp", "ego_mlp"), ("speed_trees", "speed_trees"))}
    others_l2 = ("shuffled", "ego_mlp", "speed_trees")
    metrics |= {f"minus_l2_{name}": -metrics[f"l2_avg_{name}"] for name in others_l2}
    for name, key in (("l2", "l2_avg_vad"), ("col", "obj_box_col_avg_vad")):  # what a claim's arms must beat
        metrics[f"constant_minus_{name}"] = -metrics.get(f"mean_{key}", math.nan)
    if own.questions:
        metrics |= constant_answers(train_set, own.questions) | blind_answers(train_set, own.questions)
    if known is None:
        metrics |= changed(own, arms["skipped"])
        if train_set.gts is not None and truth:
            metrics |= constant_scores(train_set, dataset, indices, truth)
    sums = scene_sums(own, arms["shuffled"], main)
    metrics |= sum_metrics(sums)
    per_class = own.occupancy.per_class() if truth else {}
    for scene in own.scenes:  # without truth: no voxel was counted
        own.occupancy.counts.setdefault(scene, torch.zeros(4, 18, 18, dtype=torch.int64))
        own.occupancy.frames.setdefault(scene, 0)
    save_scenes(out / "by_scene.npz", own.occupancy, sums)

    data = describe_dataset(dataset, len(indices))
    shown = against or ("Occ3D ground truth" if truth else "nothing")
    protocol = {"truth": shown} | RULES["occ3d"] | protocol | {
        "planning": planning_note(plans, len(indices)) if rows else "not scored: no planner in this stage",
        "planner_given": ", ".join(rows) or "no planner",
        "command": "derived from the future, as nuScenes' is; rows with 'command' are given it",
        "meta_action": "generated", "shuffled": "another scene's images",
        "questions": f"{len(own.questions)}, exact match, best of the thirty; free_: greedy text"}
    write_result(out, method=run["method"], preset=run["preset"], seed=run["seed"], dataset=data,
                 protocol=protocol, metrics=metrics, per_class=per_class, cost=cost)
    line = protocol_line(*data.values(), train_mask=protocol["mask_train"], note=f"against {shown}")
    if known is not None:
        print(f"{line}\nmIoU {100 * metrics.get('miou_camera', math.nan):.2f}, QA "
              f"{100 * metrics.get('qa_accuracy', math.nan):.1f} %, L2 {metrics['l2_avg']:.2f} m")
        print_gates(metrics)
        return metrics
    title = f"{run['method']}, {data['split']}"
    paths = draw(drive, dataset, chosen(len(dataset), pictures), out, title=title, truth=truth,
                 action_of=action_of, against="label" if against else "ground truth")
    paths.append(draw_curves(out, f"{run['method']}: {out.name}"))
    if truth:
        own.occupancy.print_table(line)
        print_controls(metrics)
    else:
        print(f"{line}\noccupancy: not scored (this network learned none, and the tree has no labels)")
    print_questions(metrics, len(own.questions))
    print_plans(arms, others, protocol["planning"])
    print_skipping(metrics)
    print_gates(metrics)
    print_cost(cost, begun, [out / "result.json", *paths])
    return metrics


def report_options(args: Any) -> dict[str, Any]:
    """The flags of the verb eval, and the run of --ckpt, as `report` takes them."""
    labels = Path(args.run["data"]["labels"]).name
    return {"run": args.run, "protocol": {"mask_train": "camera", "labels": labels},
            "against": f"labels in {args.labels}" if args.labels else "", "frames": args.eval_frames,
            "questions": args.eval_questions, "rayiou": args.rayiou, "pictures": args.pictures,
            "save": args.save_pred}


def predict_frames(drive: Drive, dataset: NuScenesOccupancy, out: Path, *,
                   action_of: Callable[[Future], Action], frames: int = 0, pictures: int = 6) -> None:
    """Write <token>.npz of each keyframe, sheets and the viewer into `out`; no ground truth is read."""
    if (views := len(dataset.camera_files(0))) != len(CAMERAS):
        raise InputError(f"--images: {views} a keyframe, expected {len(CAMERAS)} ({', '.join(CAMERAS)})")
    if dataset.version == "loose":  # neither command nor motion is known: the plan of the images alone
        all_rows = drive
        drive = lambda i, **how: images_alone(all_rows(i, **how))  # noqa: E731
    indices, run = spread(len(dataset), frames), joined()
    for i in tqdm(indices[run.rank :: run.world], "predictions", unit="keyframe", leave=False):
        save_prediction(out, dataset.tokens[i], drive(i, images=i))
    if not run.is_main:
        return
    paths = draw(drive, dataset, chosen(len(dataset), pictures), out, action_of=action_of,
                 title=f"predictions, split {dataset.split}")
    print("\n".join([*(f"  {path}" for path in paths), f"{out}: {len(indices)} predictions"]))


def planning_note(plans: dict[int, tuple], frames: int) -> str:
    """How many keyframes have a future, for the protocol."""
    full = sum(bool(t[1].all()) for t in plans.values())
    return (f"{full} keyframes with a full 3 s, {len(plans) - full} with a part (left out of the averages; "
            f"*_uniad_masked counts their masked steps as 0), {frames - len(plans)} without; obstacles: all "
            "boxes then")


GATES = {  # name: what must be at least how much for an arm to count as one that uses its images
    "images": ("own minus another scene's images on the text-balanced questions", 0.20),
    "history": ("L2 of the ego-history MLP minus that of the head with the history [m]", 0.0),
    "plans": ("L2 with another scene's images minus with its own [m]", 0.0),
    "speed": ("L2 of trees on speed minus that of the main row [m]", 0.0),
}


def gates(metrics: dict[str, float]) -> dict[str, float]:
    """{gate: its value}, nan where it was not measured."""
    m = lambda name: metrics.get(name, math.nan)  # noqa: E731
    history = min((m(f"{row}l2_avg_vad") for row in ("history_", "command+history_") if
                   f"{row}l2_avg_vad" in metrics), default=math.nan)
    return {"images": m("qa_balanced") - m("qa_balanced_shuffled"), "history": m("l2_avg_ego_mlp") - history,
            "plans": m("l2_avg_shuffled") - m("l2_avg"), "speed": m("l2_avg_speed_trees") - m("l2_avg")}


def print_gates(metrics: dict[str, float]) -> None:
    """Print the conditions on an arm without which it shows nothing about a claim."""
    print("\ngates:")
    for name, value in gates(metrics).items():
        what, least = GATES[name]
        verdict = "not measured" if math.isnan(value) else "met" if value >= least else "gate not met"
        print(f"  {verdict:13}{value:8.3f} of {least:.2f}  {what}")


def score_baselines(dataset: NuScenesOccupancy, train_set: NuScenesOccupancy, plans: Mapping[int, tuple],
                    action_of: Callable[[Future], Action]) -> Scores:
    """`Baselines`, fitted to train_set's futures, on the keyframes of `plans`."""
    scores = Scores(list(Baselines.NAMES))
    baselines = Baselines([train_set.future(i) for i in range(len(train_set))]) if plans else None
    for i, truth in plans.items():
        future = dataset.future(i)
        scores.add_plans(baselines(future), truth, action_of(future), dataset.scene_names[i])
    return scores


def constant_answers(train_set: NuScenesOccupancy, questions: list[dict]) -> dict[str, float]:
    """{constant_qa_...}: the training split's commonest answer of each type."""
    asked = [row for i in range(len(train_set)) for row in train_set.questions(i) or [] if "half" not in row]
    best, scores = best_constants(asked), Scores()
    scores.questions = [row | {"pred": best.get(row["template_type"], "")} for row in questions
                        if "half" not in row]
    if not scores.questions:
        return {}
    found = {f"constant_{name}": value for name, value in scores.qa().items()}
    kinds = [found[f"constant_qa_{kind}"] for kind in TYPES if f"constant_qa_{kind}" in found]
    return found | {"constant_qa_types": float(np.mean(kinds))}


def blind_answers(train_set: NuScenesOccupancy, questions: list[dict]) -> dict[str, float]:
    """{ngram_qa_..., qa_balanced_ngram, ...}: `WordBaseline` of each set, learned on the training
    questions.
    """
    asked, found = [row for i in range(len(train_set)) for row in train_set.questions(i) or []], {}
    for balanced in (False, True):
        own, shown = ([row for row in rows if ("half" in row) == balanced] for rows in (asked, questions))
        if own and shown:
            scores = Scores()
            answers = WordBaseline(own)([row["question"] for row in shown])
            scores.questions = [row | {"pred": answer} for row, answer in zip(shown, answers, strict=True)]
            found |= {f"ngram_{name}": value for name, value in scores.qa().items()}
    return found | {f"qa_balanced_ngram{half}": found[f"ngram_qa_balanced{half}"]
                    for half in ("", "_depth", "_bearing") if f"ngram_qa_balanced{half}" in found}


def save_scenes(path: Path, occupancy: OccupancyMeter, sums: dict[str, np.ndarray]) -> None:
    """by_scene.npz: the occupancy counts and `ratio_<metric>` sums of each scene."""
    occupancy.save(path)
    with np.load(path, allow_pickle=False) as archive:
        counts = {name: archive[name] for name in archive.files}
    write_npz(path, **counts, **{f"ratio_{name}": table for name, table in sums.items()})


def print_questions(metrics: dict[str, float], count: int) -> None:
    """Print the accuracy of each question type beside the controls."""
    if not count:
        print("\nno questions in this tree")
        return

    def percent(name: str, width: int = 0) -> str:
        return f"{100 * metrics.get(name, math.nan):{width}.1f}"

    columns = ["accuracy", *TYPES, "balanced", "bearing", "depth"]
    print(f"\nNuScenes-QA style questions, {count} asked, exact match [%]:")
    print(f"  {'':28}" + "".join(f"{c:>12}" for c in columns))
    for label, arm in (("this network", ""), ("occupancy stream skipped", "skipped_"),
                       ("another scene's images", "shuffled_"), ("n-grams of the words alone", "ngram_"),
                       ("best constant of the type", "constant_")):
        halves = {half: f"balanced_{half}" for half in ("bearing", "depth")}
        print(f"  {label:28}" + "".join(percent(f"{arm}qa_{halves.get(c, c)}", 12) for c in columns))
    hops = (f"{kind} {percent(f'qa_{kind}_h0')}, {percent(f'qa_{kind}_h1')}" for kind in TYPES)
    print("  zero hops, one hop: " + ", ".join(hops))
    if "free_qa_accuracy" in metrics:
        print(f"  free text {percent('free_qa_accuracy')} %, {metrics['free_in_vocabulary']:.0%} of it one "
              "of the thirty answers")
    if "meta_parsed" in metrics:
        parts = (f"{n} {percent(f'meta_{n}')} % (commonest {percent(f'constant_meta_{n}')} %)"
                 for n in ("longitudinal", "lateral"))
        print("  meta-action " + ", ".join(parts) + f"; parsed {metrics['meta_parsed']:.0%}")


def print_plans(arms: dict[str, Scores], others: Scores, note: str) -> None:
    """Print all planners under VAD's and UniAD's rule: all keyframes, and the turning or braking ones."""
    if not any(meter.steps for meter in others.plans.values()):
        print("\nplanning: not scored (no planner, or no known future)")
        return
    groups = []
    for arm, label in (("own", "this network, "), ("skipped", "  stream skipped, "),
                       ("shuffled", "  another scene's images, ")):
        groups += [(label + ("images only" if r == "none" else r), arms[arm].plans[r], arms[arm].hard[r])
                   for r in (arms[arm].plans if arm in arms else ())]
    groups += [(Baselines.NAMES[name], others.plans[name], others.hard[name]) for name in others.plans]
    print(f"\nopen-loop planning ({note}), L2 [m] and box collision [%]:")
    print(f"  {'':36}{'VAD 1s':>8}{'2s':>8}{'3s':>8}{'avg':>8}{'col avg':>9}{'UniAD 1s':>10}{'2s':>8}"
          f"{'3s':>8}{'turning/braking avg':>21}")
    for label, meter, hard in groups:
        m, h = (x.metrics() | x.full_horizons() if x.steps else {} for x in (meter, hard))
        cells = [(m, f"l2_{t}_vad", 8) for t in ("1s", "2s", "3s", "avg")] + [(m, "obj_box_col_avg_vad", 9)]
        cells += [(m, f"l2_{t}_uniad", w) for t, w in (("1s", 10), ("2s", 8), ("3s", 8))]
        cells += [(h, "l2_avg_vad", 21)]
        print(f"  {label:36}" + "".join(f"{(100 if 'col' in k else 1) * x.get(k, math.nan):{w}.2f}"
                                        for x, k, w in cells))


def report_baselines(args: Any, *, action_of: Callable[[Future], Action]) -> None:
    """Print each keyframe's meta-action beside its speed, and L2 of the planners that see no image.

    args: data_root, version, split and cache of the command line.
    """
    root = find_root(args.data_root or worlds.make("driving", size="drives"))
    version = find_version(root, args.version)
    split = args.split or ("mini_val" if "mini" in version else "val")
    dataset = NuScenesOccupancy(root, version, split, cache=args.cache, parts=())
    try:
        train_set = NuScenesOccupancy(root, version, None, cache=args.cache, parts=())
        note = "fitted to the training split"
    except InputError:  # a tree of validation scenes alone
        train_set, note = dataset, "fitted to the scored scenes themselves: no training scene here"
    print(f"{'scene':12}{'time [s]':>9}{'speed':>8}{'at 3 s':>8} [m/s]  {'right at 3 s':>13} [m]  "
          "meta-action; command")
    plans = {}
    for i in range(len(dataset)):
        future, end = dataset.future(i), f"{'-':>8}{'-':>23}"
        action = action_of(future)
        if action:
            last = np.linalg.norm(future.trajectory[5] - future.trajectory[4]) / 0.5
            end = f"{last:8.2f}{future.trajectory[5, 0]:23.2f}"
        if future.mask.any():
            plans[i] = planning_truth(dataset, i)
        named = ", ".join(action) if action else "no full 3 s of future"
        seconds = 1e-6 * (dataset.timestamp(i) - dataset.timestamp(i - len(dataset.past(i, 10**6))))
        print(f"{dataset.scene_names[i]:12}{seconds:9.1f}{future.speed:8.2f}{end}      {named}; "
              f"{COMMANDS[future.command]}")
    full = sum(bool(t[1].all()) for t in plans.values())
    print_plans({}, score_baselines(dataset, train_set, plans, action_of),
                f"{version} {split}: {full} of {len(dataset)} keyframes with a full 3 s of future; {note}")


# --- questions about any six images -------------------------------------------------------------------------


class Asked(NamedTuple):
    """Any keyframe: its name, six image files in nuScenes' order, questions with recorded answers ("":
    none)."""

    name: str
    images: list[Path]
    questions: list[tuple[str, str]]


def read_asked(images: Sequence[str] | None, question: str | None) -> list[Asked]:
    """Six image files and a question -> one keyframe. Raises InputError if they are not given or not six."""
    if images is None or question is None:
        raise InputError("ask needs --images (six files) and --question, or --drivelm FILE")
    if len(images) != len(CAMERAS):
        raise InputError(f"--images: {len(images)} files, expected {len(CAMERAS)} ({', '.join(CAMERAS)})")
    return [Asked("", [Path(path) for path in images], [(question, "")])]


def read_drivelm(drivelm: Path) -> list[Asked]:
    """DriveLM's question file, image paths relative to it -> keyframes.

    Raises InputError: another form, or a keyframe without one of the six views.
    """
    frame = {"image_paths?": {str: str}, "QA?": {str: [{"Q?": str}]}}
    asked: list[Asked] = []
    scenes = read_json(drivelm)
    if fault := misfit(scenes, {str: {"key_frames": {str: frame}}}):
        raise InputError(f"{drivelm}: not DriveLM's form (scene -> key_frames -> image_paths, QA): {fault}")
    for token, frame in (pair for scene in scenes.values() for pair in scene["key_frames"].items()):
        paths = frame.get("image_paths", {})
        if missing := [name for name in CAMERAS if name not in paths]:
            raise InputError(f"{drivelm}: keyframe {token} has no {missing[0]}; all six views are needed")
        rows = [row for part in frame.get("QA", {}).values() for row in part if "Q" in row]
        asked.append(Asked(token, [drivelm.parent / paths[name] for name in CAMERAS],
                           [(row["Q"], row.get("A") or "") for row in rows]))
    return asked


def ask(answer: Callable[[list[Path], list[str]], Prediction], asked: Sequence[Asked]) -> None:
    """Print answers, chain of thought and waypoints. answer(image files, questions) -> `Prediction`."""
    for frame in asked:
        found = answer(frame.images, [question for question, _ in frame.questions])
        print(f"{frame.name}\n" if frame.name else "", end="")
        for (question, recorded), best, free in zip(frame.questions, found.answers, found.free, strict=True):
            print(f"question  {question}\nanswer    {best} (of the thirty)\nfree text {free}"
                  + (f"\nrecorded  {recorded}" if recorded else ""))
        print(f"thought   {found.thought}")
        if found.paths and "none" not in found.paths:
            print(f"waypoints none: no head plans from images alone (the heads: {', '.join(found.paths)})")
        if "none" in found.paths:
            path = "  ".join(f"({x:.1f}, {y:.1f})" for x, y in found.paths["none"])
            print(f"waypoints {path} m, x right, y forward")


# --- skipping: what it costs, and that it changes nothing ---------------------------------------------------


class Allocated(TorchDispatchMode):
    """Sums the bytes of every new tensor: the memory traffic of a pass, the same on every machine."""

    def __init__(self):
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        inputs = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        self.bytes += sum(t.nbytes for t in tree_leaves(out)
                          if isinstance(t, Tensor) and t.untyped_storage()._cdata not in inputs)
        return out


Pass = tuple[Tensor, Callable[[], Any]]  # the next token's logits, a call that decodes one more


@torch.no_grad()
def skipping_cost(own: Callable[[bool], Pass], plain: Callable[[], Pass], device: torch.device,
                  rounds: int = 5) -> dict[str, float]:
    """Passes over one keyframe and prompt: own(False) without the stream, own(True) with it, plain: host.

    -> {skip, plain}_difference_text: largest difference of the next token's logits, 0: bit-equal.
    {prefill, decode}_{off, on}_over_plain: ratios of the medians of `rounds`, in turn. memory_{off,
    on}_over_plain: peak on CUDA, else the bytes that the pass allocates.
    """
    passes = {"off": partial(own, False), "on": partial(own, True), "plain": plain}
    memory, logits = {}, {}
    for name, one in passes.items():
        if device.type == "cuda":
            reset_peak(device)
            base = torch.cuda.memory_allocated(device)
            logits[name], _ = one()
            memory[name] = torch.cuda.max_memory_allocated(device) - base
        else:
            with Allocated() as counter:
                logits[name], _ = one()
            memory[name] = counter.bytes
    times: dict[str, list[float]] = {f"{k}_{name}": [] for name in passes for k in ("prefill", "decode")}
    for _ in range(rounds):
        for name, one in passes.items():
            begun = clock(device)
            _, decode = one()
            middle = clock(device)
            decode()
            times[f"prefill_{name}"].append(middle - begun)
            times[f"decode_{name}"].append(clock(device) - middle)
    result = {f"{n}_difference_text": float((logits[x] - logits["off"]).abs().max())
              for n, x in (("skip", "on"), ("plain", "plain"))}
    for name in ("off", "on"):
        result[f"memory_{name}_over_plain"] = memory[name] / memory["plain"]
        for kind in ("prefill", "decode"):
            mine, host = (float(np.median(times[f"{kind}_{x}"])) for x in (name, "plain"))
            result[f"{kind}_{name}_over_plain"] = mine / host
    return result


def clock(device: torch.device) -> float:
    """Seconds, after all that the device still has to do."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def print_skipping(metrics: dict[str, float]) -> None:
    """Print what dropping the stream changes and costs."""
    if "skip_difference_text" not in metrics:
        return
    path = metrics.get("skip_difference_path")
    path = "" if path is None else f", waypoints by {path:g} m"
    print(f"\noccupancy stream on against off: logits differ by {metrics['skip_difference_text']:g}{path}; "
          f"over all keyframes {metrics['skip_changed_answers']:.0f} answers and "
          f"{metrics['skip_changed_l2']:g} m")
    for name in ("off", "on"):
        parts = (f"{k} {metrics[f'{k}_{name}_over_plain']:.2f}" for k in ("prefill", "decode", "memory"))
        print(f"  {name:4} over the plain VLM: " + ", ".join(parts))


# --- pictures -----------------------------------------------------------------------------------------------


def draw(drive: Drive, dataset: NuScenesOccupancy, indices: list[int], out: Path, *, title: str,
         action_of: Callable[[Future], Action], truth: Truth | None = None, against: str = "ground truth"
         ) -> list[Path]:
    """Draw a sheet per keyframe and one HTML viewer; -> their paths.

    A sheet shows the cameras, both trajectories and the boxes from above, the occupancies, questions, answers
    and the chain of thought. truth None: predictions alone.
    """
    frames, paths = [], []
    for i in tqdm(indices, "pictures", unit="keyframe", leave=False):
        pixels = np.stack([read_image(dataset.root / name) for name in dataset.camera_files(i)])
        pixels = pixels.transpose(0, 3, 1, 2) / np.float32(255)
        future, boxes, asked = dataset.future(i), dataset.boxes(i), (dataset.questions(i) or [])[:3]
        found = drive(i, images=i, questions=[row["question"] for row in asked])
        T = dataset.T_ego_lidar(i)
        to_ego = lambda path, T=T: np.concatenate([[T[:2, 3]], path @ T[:2, :2].T + T[:2, 3]])  # noqa: E731
        lines = {"recorded": to_ego(future.trajectory[: int(future.mask.sum())])} if future.mask.any() else {}
        lines |= {"images only" if row == "none" else row: to_ego(path) for row, path in found.paths.items()}
        corners = [box_corners(*boxes.center[b, :2], boxes.yaw[b], boxes.size[b, 1], boxes.size[b, 0])
                   for b in range(len(boxes.names))]
        action, name = action_of(future), f"{dataset.scene_names[i]} {dataset.tokens[i][:8]}"
        recorded = ", ".join(action) if action else "no full 3 s of future"
        texts = [f"{title}: {name}", f"thought: {found.thought}   (recorded: {recorded})"]
        texts += [f"question: {row['question']}  {answer} (true: {row['answer']})"
                  for row, answer in zip(asked, found.answers, strict=True)]
        panels, mask = {"prediction": found.occupancy}, None
        if truth is not None:
            semantics, mask, _ = truth(i)
            panels, meter = {against: semantics, **panels}, OccupancyMeter()
            meter.add(found.occupancy, semantics, mask, mask)
            iou, miou = (100 * meter.metrics().get(f"{key}_camera", math.nan) for key in ("iou", "miou"))
            texts.append(f"occupancy inside the camera mask: IoU {iou:.1f} %, mIoU {miou:.1f} %")
        paths.append(out / "pictures" / f"{len(paths)}_{dataset.scene_names[i]}.png")
        viz.sheet(paths[-1], pixels, panels, OCC3D, mask=mask, title="\n".join(texts),
                  error=(against, "prediction"),
                  pictures=[("drive", "", viz.drive_bev(lines, corners, next(iter(panels.values()))))])
        frames.append(viz.ViewerFrame(name, panels, pixels, mask))
    if frames:
        viz.viewer(out / "viewer.html", frames, title=title, difference=(against, "prediction"))
        paths.insert(0, out / "viewer.html")
    return paths
