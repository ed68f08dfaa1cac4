"""Episodes of a manipulation policy: rollouts, success by perturbation, controls, result.json, GIFs.

All of it asks the policy one thing:

    plan(observations, seeds, when) -> actions (n, A, D), mark

observations: of n episodes that run side by side; seeds: theirs; when: plans before this one. mark(row) ->
Marks of observation `row` to draw, or None; mark itself may be None.
"""

import math
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal, NamedTuple

import cv2
import numpy as np
from tqdm import tqdm

from common.cli import Flag
from common.files import InputError, write_npz
from common.observation import Environment, Observation
from common.robot import ENVIRONMENTS, make_environment
from common.train import joined, share_out, write_result

Plan = Callable[[list[Observation], list[int], int], tuple[np.ndarray, Callable | None]]
Listed = list[tuple[str, int]]  # (task, seed) of each episode


class Rules(NamedTuple):
    """How episodes are played."""

    episodes: int = 154  # of the seven perturbations together (tabletop), or in all; ours
    clean: int = 48  # without perturbation, and as many hard ones (tabletop); ours
    eval_seed: int = 50000  # first episode seed: no demonstration has it
    eval_batch: int = 22  # episodes side by side (tabletop)
    replan: int = 5  # control steps executed of each plan; openpi's LIBERO example
    depth_noise: float = 0.0  # relative standard deviation of the depth that the policy reads
    extrinsics: Literal["true", "nominal"] = "true"  # camera poses that it reads: perturbed, or training's
    images: Literal["own", "black"] = "own"  # black: a blind policy


EVAL_FLAGS = "env episodes clean eval-seed eval-batch replan depth-noise extrinsics pictures"
FLAGS = {"env": Flag("environment to play in", Literal[ENVIRONMENTS], "tabletop"),
         "episodes": Flag("perturbed episodes (tabletop), or episodes in all", int, Rules().episodes, 0),
         "clean": Flag("episodes without perturbation, and as many hard ones (tabletop)", int, Rules().clean,
                       0), "eval-seed": Flag("first episode seed (tabletop): no demonstration has it", int,
                                             Rules().eval_seed,
                                             0), "eval-batch": Flag("episodes side by side (tabletop)", int,
                                                                    Rules().eval_batch, 1),
         "replan": Flag("control steps executed of each plan", int, Rules().replan, 1),
         "depth-noise": Flag("relative standard deviation of the depth", float, 0.0, 0),
         "extrinsics": Flag("camera poses: perturbed, or training's", Literal["true", "nominal"], "true"),
         "pictures": Flag("episodes drawn as GIFs", int, 4, 0)}


def rules_of(args: SimpleNamespace, chunk: int) -> Rules:
    """The flags above as Rules. Raises InputError if nothing is played, or `chunk` steps are too few."""
    if args.episodes + args.clean < 1:
        raise InputError("--episodes 0 --clean 0: nothing to evaluate")
    if args.replan > chunk:
        raise InputError(f"--replan {args.replan}: a plan has {chunk} steps")
    return Rules(*(getattr(args, name) for name in Rules._fields[:-1]))


def open_environments(name: str, data_root: Path | None, size: int, count: int, *, views: int,
                      actions: int) -> list[Environment]:
    """`count` tabletop worlds of `size` px side by side, or one environment of another kind.

    Raises InputError if a policy of so many views and action channels cannot play there.
    """
    if name == "tabletop":
        envs = [make_environment(name, size=size) for _ in range(count)]
    else:
        envs = [make_environment(name, data_root)]
    cameras, numbers = len(envs[0].cameras), envs[0].action_dim
    if numbers != actions or cameras < views:
        raise InputError(f"--env {name}: {cameras} cameras and {numbers} numbers an action; this policy has "
                         f"{views} and {actions}")
    return envs


# --- episodes -----------------------------------------------------------------------------------------------


class Episode(NamedTuple):
    """One episode's outcome."""

    task: str
    seed: int
    category: str  # "" clean, a perturbation's name, or "hard"
    success: bool
    aborted: str
    share: float  # of the target, visible to the first view at the first decision; NaN unknown
    steps: int


def episode_list(env: Environment, rules: Rules) -> Listed:
    """(task, seed) of all episodes, the same for every arm.

    Where perturbations can be chosen: clean and hard ones, then the seven perturbations in turn, tasks and
    levels going round. Elsewhere `episodes` of the benchmark's own, evenly spread over its tasks.
    """
    n, first = len(env.tasks), rules.eval_seed
    if not env.perturbations:
        n = min(n, rules.episodes)
        tasks = [env.tasks[k * len(env.tasks) // n] for k in range(n)]
        return [(tasks[k % n], k // n) for k in range(rules.episodes)]
    kinds, reserved = env.perturbations, env.reserved
    if first not in reserved or first + max(rules.clean, 1000 + rules.episodes // len(kinds)) not in reserved:
        raise InputError(f"--eval-seed {first}: demonstrations may have these seeds; evaluation's are "
                         f"{reserved.start} to {reserved.stop - 1}")
    listed = [(env.tasks[k % n] + hard, first + k) for hard in ("", "@hard") for k in range(rules.clean)]
    for k in range(rules.episodes):
        turn, kind = divmod(k, len(kinds))
        listed.append((f"{env.tasks[turn % n]}@{kinds[kind]}:{1 + (turn + k) % 5}", first + 1000 + turn))
    return listed


def degraded(o: Observation, env: Environment, rules: Rules, seed: int) -> Observation:
    """What the policy reads: depth noise, nominal camera poses, black images, by the rules."""
    if rules.extrinsics == "nominal":
        o = o._replace(T_base_cam=env.nominal(o))
    if rules.depth_noise > 0 and o.depth is not None:
        factor = 1 + rules.depth_noise * np.random.default_rng(seed).standard_normal(o.depth.shape)
        o = o._replace(depth=(o.depth * factor).clip(0, None).astype(np.float32))
    return o._replace(images=np.zeros_like(o.images)) if rules.images == "black" else o


def rollout(plan: Plan, envs: list[Environment], listed: Listed, rules: Rules, *, watch: Callable
            | None = None, clock: list[float] | None = None, title: str = "episodes") -> list[Episode]:
    """Play the episodes, len(envs) side by side: plan, execute `replan` steps, look. An abort is a failure.

    watch(k, observation, mark): called at each plan of episode k, mark() -> Marks or None. clock: receives
    seconds an observation of each plan. Under torchrun each process plays its share.
    """

    def play(first: int) -> list[Episode]:
        group = listed[first : first + len(envs)]
        seen = [env.reset(task, seed) for env, (task, seed) in zip(envs, group)]
        shares = [env.visible_share() for env, _ in zip(envs, group)]
        steps, result, when = [0] * len(group), [None] * len(group), 0
        while any(r is None for r in result):
            live = [k for k, r in enumerate(result) if r is None]
            read = [degraded(seen[k], envs[k], rules, group[k][1] * 1009 + when) for k in live]
            begun = time.perf_counter()
            actions, mark = plan(read, [group[k][1] for k in live], when)
            if clock is not None:
                clock.append((time.perf_counter() - begun) / len(live))
            for row, k in enumerate(live):
                if watch is not None:
                    watch(first + k, read[row], partial(mark, row) if mark else lambda: None)
                for j in range(rules.replan):
                    last = j == rules.replan - 1
                    outcome = envs[k].step(actions[row, j], look=last)
                    steps[k] += 1
                    if outcome.done:
                        result[k] = outcome
                        break
                    if last:
                        seen[k] = outcome.observation
            when += 1
        return [Episode(task, seed, envs[k].category(task), end.success, end.aborted, shares[k], steps[k])
                for k, ((task, seed), end) in enumerate(zip(group, result, strict=True))]

    firsts = range(0, len(listed), len(envs))
    played = tqdm(share_out(play, firsts), title, len(firsts), unit="group", leave=False, disable=None)
    return [episode for group in played for episode in group]


def random_plan(width: int, chunk: int) -> Plan:
    """Uniform actions (n, chunk, width): what luck alone reaches."""

    def plan(observations: list[Observation], seeds: list[int], when: int) -> tuple[np.ndarray, None]:
        return np.stack([np.random.default_rng([s, when]).uniform(-1, 1, (chunk, width)) for s
                         in seeds]), None

    return plan


def controls(plan: Plan, envs: list[Environment], listed: Listed, rules: Rules, *, reads_depth: bool,
             watch: Callable | None = None) -> tuple[dict[str, float], list[Episode]]:
    """Success of luck, of the blind policy and (tabletop) of the scripted expert on the same episodes.

    reads_depth: also with the other camera poses and with noisy depth (tabletop). -> metrics, luck's
    episodes.
    """
    env = envs[0]
    pooled = [e for e in listed if env.category(e[0]) not in ("", "hard")] or listed
    clean = [e for e in listed if env.category(e[0]) == ""] or pooled

    def reach(chosen: Listed, title: str, **changes) -> float:
        return summarise(rollout(plan, envs, chosen, rules._replace(**changes), title=title))["success"]

    lucky = rollout(random_plan(env.action_dim, rules.replan), envs, pooled, rules, watch=watch,
                    title="random")
    out = {"random_success": summarise(lucky)["success"],
           "blind_success": reach(clean, "blind", images="black")}
    if not env.perturbations:
        return out, lucky

    def expert(episode: tuple[str, int]) -> bool:
        env.reset(*episode)
        while not (outcome := env.step(env.expert(), look=False)).done:
            pass
        return outcome.success

    out["expert_success"] = float(np.mean(list(share_out(expert, pooled))))
    if reads_depth:
        moved = [e for e in listed if env.category(e[0]) == "camera"]
        other = "nominal" if rules.extrinsics == "true" else "true"
        out[f"success_camera_{other}"] = reach(moved, f"{other} extrinsics", extrinsics=other)
        out["success_depth_noise_2"] = reach(clean, "noisy depth", depth_noise=0.02)
    return out, lucky


# --- scores -------------------------------------------------------------------------------------------------

SHARES = {"visible_high": (0.75, 1.01), "visible_mid": (0.25, 0.75), "visible_low": (-0.01, 0.25)}


def summarise(episodes: list[Episode]) -> dict[str, float]:
    """Success: pooled over the perturbations (`success`; all episodes where there are none), per category,
    weighted as LIBERO-Plus weighs its categories, and by the target's visible share at the first decision."""

    def rate(chosen: list[Episode]) -> float:
        return float(np.mean([e.success for e in chosen])) if chosen else math.nan

    pooled = [e for e in episodes if e.category not in ("", "hard")] or episodes
    out = {"success": rate(pooled), "success_clean": rate([e for e in episodes if e.category == ""]),
           "success_hard": rate([e for e in episodes if e.category == "hard"])}
    kinds = sorted({e.category for e in pooled} - {"", "hard"})
    out |= {f"success_{kind}": rate([e for e in pooled if e.category == kind]) for kind in kinds}
    if len(kinds) == 7:
        from common.metrics import libero_plus_average  # here: it comes with the nuScenes metrics

        out["success_weighted"] = libero_plus_average({k: 100 * out[f"success_{k}"] for k in kinds}) / 100
    for name, (low, high) in SHARES.items():
        seen = [e for e in episodes if low <= e.share < high]
        out |= {f"success_{name}": rate(seen), f"episodes_{name}": float(len(seen))}
    return out | {"aborted": sum(bool(e.aborted) for e in episodes) / max(len(episodes), 1)}


def save_episodes(path: Path, episodes: list[Episode]) -> None:
    """by_scene.npz for the experiments' bootstrap: one row an episode of the pooled success."""
    pooled = [e for e in episodes if e.category not in ("", "hard")] or episodes
    pooled = sorted(pooled, key=lambda e: (e.task, e.seed))
    cells = {}
    for kind in sorted({e.category for e in pooled} - {"", "hard"}):  # (S, 1, 2): success and 1, or nothing
        rows = [[[e.success, 1] if e.category == kind else [0, 0]] for e in pooled]
        cells[f"ratio_success_{kind}"] = np.array(rows, np.float64)
    write_npz(path, groups=np.array([f"{e.task}#{e.seed}".encode() for e in pooled]),
              success=np.array([int(e.success) for e in pooled], np.int64),
              trials=np.ones(len(pooled), np.int64), **cells)


def write(out: Path, episodes: list[Episode], metrics: dict[str, float], rules: Rules, *, env: Environment,
          version: str, policy: str, run: dict[str, Any], cost: dict[str, float]) -> tuple[dict, dict]:
    """result.json and by_scene.npz into `out`. run: config.json of the checkpoint. -> dataset, protocol."""
    split = f"zero-shot, seeds from {rules.eval_seed}" if env.perturbations else "benchmark"
    data = {"name": env.name, "version": version, "split": split, "frames": len(episodes)}
    protocol = {"unit": "episodes (frames counts them)",
                "success": "at any step within the limit; aborted = failure",
                "replan": f"every {rules.replan} steps",
                "perturbations": "none in training or checkpoint choice; language: held-out paraphrases",
                "depth": f"simulator, noise {rules.depth_noise:g}", "extrinsics": rules.extrinsics,
                "variant": policy}
    rows = {f"{e.task}#{e.seed}": {"success": e.success, "aborted": e.aborted, "share": None
                                   if math.isnan(e.share) else round(e.share, 3)} for e in episodes}
    write_result(out, method=run["method"], preset=run["preset"], seed=run["seed"], dataset=data,
                 protocol=protocol, metrics=metrics, per_class=rows, cost=cost)
    save_episodes(out / "by_scene.npz", episodes)
    return data, protocol


def report(plan: Plan, envs: list[Environment], rules: Rules, *, out: Path, version: str, policy: str,
           run: dict[str, Any], cost: dict[str, float], pictures: int = 4, reads_depth: bool = False) -> None:
    """The verb eval: play episodes and controls, write result.json, by_scene.npz, GIFs, print a table."""
    env, clock = envs[0], []
    listed = episode_list(env, rules)
    film = to_film(env, listed, pictures)
    episodes = rollout(plan, envs, listed, rules, watch=record(film), clock=clock, title=policy)
    metrics = summarise(episodes) | {"replan_ms": 1000 * float(np.median(clock))}
    luck_film = {} if env.perturbations else to_film(env, listed, min(pictures, 1))
    more, lucky = controls(plan, envs, listed, rules, reads_depth=reads_depth, watch=record(luck_film))
    film, luck_film = map(gathered, (film, luck_film))
    for each in envs:
        each.close()
    if not joined().is_main:  # one process writes
        return
    paths = write_gifs(film, episodes, out) + write_gifs(luck_film, lucky, out, "random")
    data, protocol = write(out, episodes, metrics | more, rules, env=env, version=version, policy=policy,
                           run=run, cost=cost)
    print(f"{data['name']}, {data['version']}, {data['frames']} episodes, {data['split']}; {policy}, "
          f"{rules.extrinsics} extrinsics, depth: {protocol['depth']}")
    for name, value in (metrics | more).items():
        if "success" in name and not math.isnan(value):
            print(f"===> {name} = {100 * value:.2f}")
    if metrics["aborted"] > 0:
        aborted = 100 * metrics["aborted"]
        print(f"===> aborted episodes (an action that is not finite), counted as failures = {aborted:.2f}")
    print(f"replan {metrics['replan_ms']:.0f} ms an observation")
    for path in [out / "result.json", *paths]:
        print(f"  {path}")


# --- pictures -----------------------------------------------------------------------------------------------


class Marks(NamedTuple):
    """What a policy found in one observation, to be drawn; T objects, n points."""

    ids: np.ndarray  # (T,) int: a colour each
    masks: np.ndarray  # (V, T, h, w) bool
    objects: np.ndarray  # (V, T, 2) in [0, 1], NaN where a view does not see it
    points: np.ndarray  # (V, n, 2) in [0, 1], likewise


def paint(o: Observation, marks: Marks | None, side: int = 320) -> np.ndarray:
    """All views with masks (tinted), objects (circles), points (crosses) and the sentence: (H, W, 3)
    uint8."""
    panels = []
    for v in range(len(o.images)):
        image = cv2.resize(o.images[v], (side, side), interpolation=cv2.INTER_CUBIC)
        for t, k in enumerate(marks.ids if marks else ()):
            shade = cv2.applyColorMap(np.uint8([[37 * int(k) % 256]]), cv2.COLORMAP_HSV)[0, 0]
            mask = cv2.resize(marks.masks[v, t].astype(np.float32), (side, side)) > 0.5
            image[mask] = (0.65 * image[mask] + 0.35 * shade).astype(np.uint8)
            if np.isfinite(marks.objects[v, t]).all():
                at = tuple(int(x * side) for x in marks.objects[v, t])
                cv2.circle(image, at, 4, tuple(int(c) for c in shade), 2, cv2.LINE_AA)
        for point in marks.points[v] if marks else ():
            if np.isfinite(point).all():
                cv2.drawMarker(image, tuple(int(x * side) for x in point), (255, 255, 255),
                               cv2.MARKER_TILTED_CROSS, 7, 1, cv2.LINE_AA)
        panels.append(image)
    sheet = np.concatenate(panels, 1)
    bar = np.full((22, sheet.shape[1], 3), 24, np.uint8)
    cv2.putText(bar, o.instruction[:80], (6, 15), cv2.FONT_HERSHEY_SIMPLEX, 0.42, (235,) * 3, 1, cv2.LINE_AA)
    return np.concatenate([bar, sheet])


def to_film(env: Environment, listed: Listed, count: int) -> dict[int, list[np.ndarray]]:
    """Episodes that become GIFs, a clean one, a hard one, then perturbed ones, each of another task: index ->
    []."""
    of: dict[str, list[int]] = {}
    for k, (task, _) in enumerate(listed):
        of.setdefault(env.category(task), []).append(k)
    order = ["", "hard", "layout", "camera"]
    kinds = sorted(of, key=lambda kind: order.index(kind) if kind in order else 9)[:count]
    return {of[kind][min(nth, len(of[kind]) - 1)]: [] for nth, kind in enumerate(kinds)}


def record(film: dict[int, list[np.ndarray]]) -> Callable:
    """What `rollout` calls at each plan: a frame is added to the episodes that are filmed."""

    def watch(k: int, o: Observation, mark: Callable) -> None:
        if k in film:
            film[k].append(paint(o, mark()))

    return watch


def gathered(film: dict[int, list[np.ndarray]]) -> dict[int, list[np.ndarray]]:
    """The pictures of all processes: each filmed what it played."""
    films = list(share_out(lambda _: film, range(joined().world)))
    return {k: [picture for each in films for picture in each[k]] for k in film}


def write_gifs(film: dict[int, list[np.ndarray]], episodes: list[Episode], out: Path,
               name: str = "episode") -> list[Path]:
    """One GIF a filmed episode, its outcome in the name."""
    from PIL import Image

    paths = []
    for k, frames in film.items():
        task = episodes[k].task.replace("@", "_").replace(":", "").replace("/", "_")[:60]
        path = out / "pictures" / f"{name}_{task}_{'success' if episodes[k].success else 'failure'}.gif"
        pictures = [Image.fromarray(f).quantize(96, method=Image.Quantize.FASTOCTREE) for f in frames]
        path.parent.mkdir(parents=True, exist_ok=True)
        pictures[0].save(path, save_all=True, append_images=pictures[1:], duration=250, loop=0)
        paths.append(path)
    return paths
