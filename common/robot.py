"""Manipulation environments by name, and what their data folders hold.

    env = make_environment("tabletop")          # or one of ENVIRONMENTS, each with its own simulator
    observation = env.reset(env.tasks[0], 0)
    outcome = env.step(action)                  # observation, success, done, aborted
    python -m common.robot check --data-root D  # found, missing, size
    python -m common.robot convert --suite libero_spatial --hdf5 H --out O  # LIBERO's, to train on

The interface is common.observation's. Simulators are imported where they are used, so that nothing of them is
needed for the others.
"""

import argparse
import importlib
import math
import os
import sys
from pathlib import Path

import numpy as np

from common import worlds
from common.demonstrations import read_episode, read_world
from common.files import InputError, exit_on_input_error
from common.libero import (LIBERO_SCENE, LIBERO_SUITES, PRO_SUITES, Libero, LiberoPlus, check_libero,
                           check_plus, convert_libero)
from common.observation import Environment, Observation, Outcome, check_action

ENVIRONMENTS = ("tabletop", *LIBERO_SUITES, *PRO_SUITES, "libero_plus", "robotwin")


def make_environment(name: str, data_root: Path | str | None = None, size: int | None = None) -> Environment:
    """One of ENVIRONMENTS -> its environment; size: side of the pictures [px], default 128 (tabletop) or 256
    (LIBERO).

    Raises InputError, in one line, where its simulator or its files are missing.
    """
    if name == "tabletop":
        return TabletopEnvironment(size or 128)
    if name == "libero_plus":
        return LiberoPlus(data_root, size or 256)
    if name in (*LIBERO_SUITES, *PRO_SUITES):
        return Libero(name, data_root, size or 256)
    if name == "robotwin":
        return RoboTwin(data_root)
    raise InputError(f"--env {name}: one of {', '.join(ENVIRONMENTS)}")


class TabletopEnvironment:
    """data.tabletop. A task may carry a perturbation: lift_cube, lift_cube@camera:3, lift_cube@hard."""

    name, action_dim = "synthetic tabletop world", 7

    def __init__(self, size: int = 128):
        self.maker = worlds.tabletop()
        self.world, self.tasks = self.maker.Tabletop(size), tuple(self.maker.TASKS)
        self.max_steps, self.cameras = self.maker.GOAL_STEPS, self.maker.CAMERAS
        self.perturbations = self.maker.PERTURBATIONS
        self.reserved = self.maker.RESERVED  # episode seeds that no demonstration has

    def reset(self, task: str, seed: int) -> Observation:
        """See Environment."""
        name, at, how = task.partition("@")
        kind, _, level = how.partition(":")
        if (at and not kind) or (level and not level.isdecimal()):
            raise InputError(f"task '{task}': expected TASK@KIND:LEVEL, as lift_cube@camera:3")
        self.world.reset(name, seed, self.maker.Perturbation(kind, int(level or 3)) if kind else None)
        self.max_steps = self.world.limit
        return self._look()

    def step(self, action: np.ndarray, look: bool = True) -> Outcome:
        """See Environment."""
        action, aborted = check_action(action, self.action_dim)
        self.world.step(action)
        done = self.world.done or self.world.steps >= self.max_steps
        return Outcome(self._look() if look else None, not aborted and self.world.success(), done, aborted)

    def expert(self) -> np.ndarray:
        """-> (7,): the scripted expert's next action."""
        return self.maker.expert(self.world)

    def close(self) -> None:
        """See Environment: nothing to free."""

    def category(self, task: str) -> str:
        """See Environment."""
        return task.partition("@")[2].partition(":")[0]

    def nominal(self, observation: Observation) -> np.ndarray:
        """See Environment."""
        return np.stack([self.maker.agentview_pose(), *observation.T_base_cam[1:]])

    def visible_share(self) -> float:
        """See Environment."""
        return self.world.visible_share()

    def _look(self) -> Observation:
        r = self.world.render()
        return Observation(r["images"], r["depth"], r["K"], r["T_base_cam"], r["instances"],
                           self.world.state(), self.world.instruction)


class RoboTwin:
    """RoboTwin 2.0 by its documented interface: setup_demo, get_obs, take_action, check_success.

    A task is NAME@demo_clean (easy) or NAME@demo_randomized (hard). An action is 14 joint positions of two
    arms; the state is the left hand's position (3) and the 14 joints. As in the official evaluation, a seed
    counts only if the scripted expert solves it: reset tries the next ones. Not run here: it needs Python
    3.10, an NVIDIA GPU, Vulkan and several GB of assets.
    """

    name, action_dim, perturbations = "RoboTwin", 14, ()
    cameras = ("head_camera", "left_camera", "right_camera")

    def __init__(self, data_root: Path | str | None = None):
        self.root = Path(data_root or "RoboTwin").resolve()  # reset changes the folder
        if not (self.root / "envs" / "_base_task.py").is_file():
            raise InputError(f"{self.root}: no RoboTwin 2.0 there (envs/_base_task.py): clone "
                             "github.com/RoboTwin-Platform/RoboTwin, install it as its page says, give "
                             "--data-root CLONE")
        names = sorted(p.stem for p in (self.root / "envs").glob("[a-z]*.py"))
        self.tasks = tuple(f"{n}@{config}" for config in ("demo_clean", "demo_randomized") for n in names)
        self.max_steps, self.env = 400, None

    def reset(self, task: str, seed: int) -> Observation:
        """See Environment."""
        if task not in self.tasks:
            raise InputError(f"task '{task}': as {self.tasks[0]}")
        name, _, config = task.partition("@")
        self.close()
        os.chdir(self.root)  # its own paths are relative to the clone
        sys.path[:0] = [p for p in (str(self.root), str(self.root / "description/utils")) if p not
                        in sys.path]
        try:
            env = getattr(importlib.import_module(f"envs.{name}"), name)()
            words = importlib.import_module("generate_episode_instructions")
        except ImportError as error:
            raise InputError(
                f"RoboTwin: {error}; install it as its page says, in its own environment"
            ) from error
        settings = self._settings(name, config)
        for number in range(100_000 + 1000 * seed, 100_100 + 1000 * seed):
            try:
                env.setup_demo(now_ep_num=seed, seed=number, is_test=True, **settings)
                info, solved = env.play_once(), env.plan_success and env.check_success()
            except Exception as error:
                if type(error).__name__ != "UnStableError":  # a scene that does not come to rest
                    raise
                solved = False
            env.close_env()
            if solved:
                break
        else:
            raise InputError(f"RoboTwin {task}: a hundred seeds without a scene that its expert solves")
        env.setup_demo(now_ep_num=seed, seed=number, is_test=True, **settings)
        kind = "unseen" if config == "demo_randomized" else "seen"
        sentences = words.generate_episode_descriptions(name, [info["info"]], 100)[0][kind]
        self.env, self.max_steps, self.instruction = env, int(env.step_lim), sentences[seed % len(sentences)]
        env.set_instruction(instruction=self.instruction)
        return self._look()

    def _settings(self, name: str, config: str) -> dict:
        """setup_demo's arguments: the task's configuration with its embodiment; depth and hands are on."""
        import yaml

        def load(path: str) -> dict:
            return yaml.safe_load((self.root / path).read_text())

        out, files = load(f"task_config/{config}.yml"), load("task_config/_embodiment_config.yml")
        head = load("task_config/_camera_config.yml")[out["camera"]["head_camera_type"]]
        robots = out["embodiment"]
        for side, robot in (("left", robots[0]), ("right", robots[min(1, len(robots) - 1)])):
            path = files[robot]["file_path"]
            out |= {f"{side}_robot_file": path, f"{side}_embodiment_config": load(f"{path}/config.yml")}
        kinds = out.get("data_type", {}) | {"rgb": True, "depth": True, "qpos": True, "endpose": True}
        return out | {"task_name": name, "task_config": config, "eval_mode": True, "render_freq": 0,
                      "data_type": kinds, "head_camera_h": head["h"], "head_camera_w": head["w"],
                      "dual_arm_embodied": len(robots) == 1, "embodiment_dis": robots[2] if len(robots) == 3
                      else None}

    def step(self, action: np.ndarray, look: bool = True) -> Outcome:
        """See Environment."""
        action, aborted = check_action(action, self.action_dim)
        if aborted:
            return Outcome(None, False, True, aborted)
        self.env.take_action(action, action_type="qpos")
        success = bool(self.env.eval_success or self.env.check_success())
        done = success or self.env.take_action_cnt >= self.env.step_lim
        return Outcome(self._look() if look else None, success, done)

    def _look(self) -> Observation:
        raw = self.env.get_obs()
        views, T_base_cam = [raw["observation"][camera] for camera in self.cameras], []
        for v in views:  # extrinsic_cv: world -> camera, 3x4 or 4x4
            T_cam_base = np.vstack([np.asarray(v["extrinsic_cv"], np.float64)[:3], [0, 0, 0, 1]])
            T_base_cam.append(np.linalg.inv(T_cam_base))
        depth = np.stack([np.asarray(v["depth"], np.float32) / 1000 for v in views])  # [mm]
        state = np.concatenate([raw["endpose"]["left_endpose"][:3], raw["joint_action"]["vector"]])
        return Observation(np.stack([v["rgb"][..., :3] for v in views]), depth,
                           np.stack([np.asarray(v["intrinsic_cv"], np.float64) for v in views]),
                           np.stack(T_base_cam), None, state, self.instruction)

    def close(self) -> None:
        """See Environment."""
        if self.env is not None:
            self.env.close_env()
            self.env = None

    def category(self, task: str) -> str:
        """See Environment."""
        return "hard" if task.endswith("@demo_randomized") else ""

    def nominal(self, observation: Observation) -> np.ndarray:
        """See Environment: its cameras are not perturbed."""
        return observation.T_base_cam

    def visible_share(self) -> float:
        """See Environment."""
        return math.nan


# --- check --------------------------------------------------------------------------------------------------


def check(root: Path | str) -> None:
    """Prints what a folder holds of the tabletop world, LIBERO, LIBERO-Plus or RoboTwin, and its size; raises
    InputError if anything required is missing or does not read."""
    root = Path(root)
    if not root.is_dir():
        raise InputError(f"--data-root {root}: no such folder")
    found = False
    if (root / "world.json").is_file():
        found = True
        world = read_world(root)
        folders = [root / "demos" / task / f"{k:04d}" for task in world["tasks"] for k
                   in range(world["demos"])]
        names = ["episode.npz", *(f"{camera}_{what}.png" for camera in world["cameras"] for what
                                  in ("rgb", "depth", "instance"))]
        _report("demonstrations", [folder / name for folder in folders for name in names])
        for folder in folders:
            read_episode(folder, world["cameras"])
    if any((root / name).exists() for name in ("bddl_files", "init_files", Path("assets") / LIBERO_SCENE)):
        found = True
        check_libero(root)
    if (root / "task_classification.json").is_file():
        found = True
        check_plus(root / "task_classification.json")
    if (root / "envs" / "_base_task.py").is_file():
        found = True
        names = [p for p in (root / "envs").glob("[a-z]*.py")]
        print(f"RoboTwin 2.0: {len(names)} tasks")
        _report("RoboTwin settings", [root / "task_config" / f"{c}.yml" for c
                                      in ("demo_clean", "demo_randomized")])
        print(f"{'assets':26}{'found' if (root / 'assets').is_dir() else 'missing'}")
    if not found:
        raise InputError(f"{root}: neither a tabletop world (world.json), LIBERO (bddl_files/, init_files/), "
                         f"LIBERO-Plus " "(task_classification.json) nor RoboTwin (envs/)")


def _report(title: str, files: list[Path]) -> None:
    there = [f for f in files if f.is_file() and f.stat().st_size]
    print(
        f"{title:26}{len(there)} of {len(files)} files, {sum(f.stat().st_size for f in there) / 1e6:.1f} MB"
    )
    if len(there) < len(files):
        raise InputError(f"{next(f for f in files if f not in there)}: missing or empty "
                         f"({len(files) - len(there)} of {len(files)})")


@exit_on_input_error
def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m common.robot",
                                     description="what manipulation data folders hold")
    commands = parser.add_subparsers(required=True, dest="command")
    command = commands.add_parser("check",
                                  help="found, missing, size; exit code 2 if anything required is missing")
    command.add_argument("--data-root", required=True,
                         help="folder of the tabletop world, LIBERO, LIBERO-Plus or RoboTwin")
    command = commands.add_parser("convert",
                                  help="LIBERO's demonstrations, rendered anew with depth, to train on")
    command.add_argument("--suite", required=True, choices=LIBERO_SUITES)
    command.add_argument("--hdf5", required=True, help="folder of the suite's <task>_demo.hdf5 files")
    command.add_argument("--out", required=True, help="folder to write; what is there already is kept")
    command.add_argument("--data-root",
                         help="LIBERO's assets and task definitions; default: the installed package's")
    command.add_argument("--demos", type=int, help="of each task; default: all")
    command.add_argument("--image", type=int, default=128,
                         help="side of the pictures [px]; training holds a suite's 55,000 "
                         "frames in memory: 11 GB at 128, 43 GB at 256")
    args = parser.parse_args(argv)
    if args.command == "check":
        check(args.data_root)
    else:
        convert_libero(args.suite, args.hdf5, args.out, args.data_root, args.demos, args.image)


if __name__ == "__main__":
    main()
