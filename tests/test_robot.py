"""common/robot.py: environments by name, the tabletop's episodes, RoboTwin on a stand-in, what data folders hold."""

import sys

import numpy as np
import pytest

from common import robot
from common.files import InputError
from common.observation import check_observation


def test_tabletop_environment_plays_an_episode():
    env = robot.make_environment("tabletop", size=64)
    o = env.reset("lift_cube@noise:2", 5)
    assert o.images.shape == (2, 64, 64, 3) and o.images.dtype == np.uint8 and o.depth.dtype == np.float32
    assert o.K.shape == (2, 3, 3) and o.state.shape == (8,
        ) and o.instruction and env.category("lift_cube@noise:2") == "noise"
    assert check_observation(o) is o and np.allclose(env.nominal(o), o.T_base_cam)
    outcome = env.step(np.zeros(7), look=False)
    assert outcome == (None, False, False, "")
    assert env.step(np.zeros(7)).observation.images.shape == o.images.shape
    with pytest.raises(InputError, match=r"takes \(7,\)"):
        env.step(np.zeros(6))
    outcome = env.step(np.array([0, 0, np.inf, 0, 0, 0, 0]), look=False)
    assert outcome.done and not outcome.success and "finite" in outcome.aborted
    with pytest.raises(InputError, match="TASK@KIND:LEVEL"):
        env.reset("lift_cube@noise:high", 0)
    moved = env.reset("lift_cube@camera:5", 5)
    assert not np.allclose(env.nominal(moved)[0], moved.T_base_cam[0]) and np.allclose(env.nominal(moved)[1],
        moved.T_base_cam[1])
    again = env.reset("lift_cube", 5)
    assert np.array_equal(again.images, env.reset("lift_cube", 5).images)


def test_time_runs_out():
    env = robot.make_environment("tabletop", size=64)
    env.reset("lift_cube", 0)
    outcomes = [env.step(np.zeros(7), look=False) for _ in range(env.max_steps)]
    assert not outcomes[-2].done and outcomes[-1].done and not outcomes[-1].success and outcomes[-1].aborted == ""


@pytest.mark.parametrize("name, words", [
    ("libero_spatial", "make setup-libero"), ("libero_plus", "make setup-libero"),
    ("robotwin", "RoboTwin-Platform/RoboTwin"),
    ("maniskill", "one of tabletop"),
])
def test_what_is_missing_is_told_in_one_line(name, words):
    with pytest.raises(InputError, match=words) as told:
        robot.make_environment(name)
    assert "\n" not in str(told.value)


def test_robotwin_adapter_on_a_stand_in(tmp_path, monkeypatch):
    """A clone of RoboTwin's form: only seeds that its expert solves count; depth in mm, extrinsics world -> camera."""
    files = {
        "envs/__init__.py": "", "envs/_base_task.py": "", "task_config/_camera_config.yml": "D435: {h: 24, w: 32}\n",
        "task_config/_embodiment_config.yml": "aloha: {file_path: robots/aloha}\n",
        "robots/aloha/config.yml": "joints: 7\n",
        "task_config/demo_clean.yml": "embodiment: [aloha]\ncamera: {head_camera_type: D435}\ndata_type: {rgb: true}\n",
        "task_config/demo_randomized.yml": "embodiment: [aloha]\ncamera: {head_camera_type: D435}\n",
        "description/utils/generate_episode_instructions.py":
            "def generate_episode_descriptions(task, infos, n): return "
            "[{'seen': ['press it'], 'unseen': ['push it down']}]\n",
        "envs/press.py": """
import numpy as np
class press:
    plan_success, step_lim, eval_success = True, 5, False
    def setup_demo(self, now_ep_num, seed, is_test, **settings):
        if seed == 100_000:
            raise type("UnStableError", (Exception,), {})()
        assert settings["data_type"]["depth"] and settings["data_type"]["endpose"]
        assert settings["head_camera_w"] == 32 and settings["dual_arm_embodied"]
        self.seed, self.take_action_cnt = seed, 0
    def play_once(self): return {"info": {}}
    def check_success(self): return self.seed % 2 == 1 and self.take_action_cnt in (0, 3)
    def close_env(self): pass
    def set_instruction(self, instruction): self.said = instruction
    def take_action(self, action, action_type):
        assert action_type == "qpos" and len(action) == 14
        self.take_action_cnt += 1
    def get_obs(self):
        E = np.eye(4)[:3]; E[2, 3] = 2.0
        view = {"rgb": np.zeros((24, 32, 3), np.uint8), "depth": np.full((24, 32), 1500.0),
                "intrinsic_cv": np.array([[30.0, 0, 16], [0, 30, 12], [0, 0, 1]]),
                "extrinsic_cv": E}
        views = {c: view for c in ("head_camera", "left_camera", "right_camera")}
        return {"observation": views, "joint_action": {"vector": np.arange(14.0)},
                "endpose": {"left_endpose": [0.1, 0.2, 0.3, 1, 0, 0, 0]}}
""",
    }  # fmt: skip
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    for name in ("envs", "envs.press", "generate_episode_instructions"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    env = robot.make_environment("robotwin", tmp_path)
    assert env.tasks == ("press@demo_clean",
                         "press@demo_randomized") and env.category("press@demo_randomized") == "hard"
    o = env.reset("press@demo_randomized", 0)
    assert env.env.seed == 100_001 and o.instruction == "push it down" and env.env.said == "push it down"
    assert (o.depth == 1.5).all() and o.T_base_cam[0, :3, 3].tolist() == [0, 0, -2] and o.instances is None
    assert o.state.tolist() == [0.1, 0.2, 0.3, *range(14)]  # the left hand's place, then the joints
    check_observation(o)
    outcomes = [env.step(np.zeros(14), look=False) for _ in range(3)]
    assert [x.success for x in outcomes] == [False, False, True] and outcomes[-1].done
    assert env.step(np.full(14, np.nan)).aborted
    for name in ("envs", "envs.press", "generate_episode_instructions"):
        sys.modules.pop(name, None)


def test_check_tells_what_is_missing(tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        robot.main(["check", "--data-root", str(tmp_path)])
    assert stop.value.code == 2 and "neither a tabletop world" in capsys.readouterr().err
    from data.tabletop import make_world

    make_world(tmp_path / "w", seed=0, demos=1, tasks=("lift_cube",), size=32, workers=1)
    robot.main(["check", "--data-root", str(tmp_path / "w")])
    assert "7 of 7 files" in capsys.readouterr().out
    (tmp_path / "w/demos/lift_cube/0000/episode.npz").unlink()
    with pytest.raises(SystemExit) as stop:
        robot.main(["check", "--data-root", str(tmp_path / "w")])
    assert stop.value.code == 2 and "missing or empty (1 of 7)" in capsys.readouterr().err
