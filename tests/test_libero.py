"""common/libero.py: robosuite's rule of angles, its files by hand and, where they are at hand, the real ones; the
adapter and the conversion on stand-ins of the simulator."""

import json
import math
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from vectors import load

from common import libero, robot
from common.demonstrations import read_episode
from common.files import InputError
from common.libero import quat_xyzw_to_axisangle
from common.observation import check_observation

LIBERO_SAMPLES = Path(__file__).parents[1].parent / "shared" / "real" / "libero"
PLUS_SAMPLE = LIBERO_SAMPLES.parent / "libero_plus" / "task_classification.json"
BDDL = """(define (problem LIBERO_Tabletop_Manipulation)
  (:domain robosuite)
  (:language Pick the bowl and place it on the plate)
  (:regions (bowl_region (:target main_table) (:ranges ((-0.1 0.2 -0.05 0.25))) (:yaw_rotation ((0 1))))
            (top_side (:target wooden_cabinet_1)))
  (:fixtures main_table - table wooden_cabinet_1 - wooden_cabinet)
  (:objects bowl_1 bowl_2 - akita_black_bowl plate_1 - plate)
  (:obj_of_interest bowl_1 plate_1)
  (:init (On bowl_1 main_table_bowl_region) (On bowl_2 wooden_cabinet_1_top_side))
  (:goal (And (On bowl_1 plate_1)))
)"""


def f64(*values) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def test_axisangle_is_robosuites():
    v = load("robot_flow")
    q = torch.from_numpy(v["quat_xyzw"])
    v.close("axisangle_robosuite", quat_xyzw_to_axisangle(q), 1e-6)
    v.close("axisangle_lerobot_xvla", quat_xyzw_to_axisangle(q), 1e-6)
    shorter = torch.where(q[:, 3:] < 0, -q, q)  # scipy takes the shorter way round, robosuite not
    v.close("rotvec_scipy", quat_xyzw_to_axisangle(shorter), 1e-6)
    assert np.abs(quat_xyzw_to_axisangle(q).numpy() - v["rotvec_scipy"]).max() > math.pi


def test_axisangle_by_hand():
    s = math.sqrt(0.5)
    quarter = f64(0, 0, s, s)
    torch.testing.assert_close(quat_xyzw_to_axisangle(quarter), f64(0, 0, math.pi / 2))
    torch.testing.assert_close(quat_xyzw_to_axisangle(-quarter), f64(0, 0, -3 * math.pi / 2))  # the long way round
    torch.testing.assert_close(quat_xyzw_to_axisangle(f64(1, 0, 0, 0)), f64(math.pi, 0, 0))
    for w in (1.0, -1.0):
        assert quat_xyzw_to_axisangle(f64(0, 0, 0, w)).tolist() == [0, 0, 0]
    assert quat_xyzw_to_axisangle(f64(1e-9, 0, 0, 1.0)).tolist() == [0, 0, 0]  # 1 - w^2 is 0: robosuite's rule
    assert torch.isfinite(quat_xyzw_to_axisangle(torch.tensor([0, 0, 0, 1.0000001]))).all()  # rounding beyond 1


def test_bddl_by_hand(tmp_path):
    path = tmp_path / "task.bddl"
    path.write_text(BDDL)
    b = libero.read_bddl(path)
    assert b.problem == "LIBERO_Tabletop_Manipulation" and b.language == "Pick the bowl and place it on the plate"
    assert b.regions == {"bowl_region": ("main_table", ((-0.1, 0.2, -0.05, 0.25),)),
                         "top_side": ("wooden_cabinet_1", ())}
    assert b.objects == {"bowl_1": "akita_black_bowl", "bowl_2": "akita_black_bowl", "plate_1": "plate"}
    assert b.fixtures == {"main_table": "table", "wooden_cabinet_1": "wooden_cabinet"}
    assert b.goal == (("On", "bowl_1", "plate_1"),) and len(b.init) == 2 and b.interest == ("bowl_1", "plate_1")
    for text, words in ((BDDL[:-30], "do not close"), (BDDL + ")", "too many"),
                        ("(define (problem X))", "no :language")):
        path.write_text(text)
        with pytest.raises(InputError, match=words):
            libero.read_bddl(path)


def test_initial_states_without_running_code(tmp_path):
    states = np.random.default_rng(0).random((50, 92))
    torch.save(states, tmp_path / "task.pruned_init")
    assert np.array_equal(libero.read_init_states(tmp_path / "task.pruned_init"), states)
    np.savez(tmp_path / "other.pruned_init.npz", states=states[0])
    # one state, and found by stem
    assert np.array_equal(libero.read_init_states(tmp_path / "other.pruned_init"), states[:1])

    class Hostile:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "touched",))

    torch.save(Hostile(), tmp_path / "bad.pruned_init")
    with pytest.raises(InputError, match="not loaded") as refused:
        libero.read_init_states(tmp_path / "bad.pruned_init")
    assert not (tmp_path / "touched").exists()
    assert "trust" not in str(refused.value) and "Weights only" not in str(refused.value)  # torch's own advice
    (tmp_path / "short.pruned_init").write_bytes((tmp_path / "task.pruned_init").read_bytes()[:500])
    with pytest.raises(InputError, match="copy it again"):
        libero.read_init_states(tmp_path / "short.pruned_init")


@pytest.mark.parametrize("name, parts", [
    ("put_the_bowl_view_359_15_100_2_352_initstate_0", libero.PlusName("put_the_bowl", "camera",
        (359, 15, 100, 2, 352))),
    ("put_it_view_0_0_100_0_0_initstate_401", libero.PlusName("put_it", "robot", robot=401)),
    ("put_it_language_7_view_0_0_100_0_0_initstate_0", libero.PlusName("put_it", "language", language=7)),
    ("put_it_view_0_0_100_0_0_initstate_0_noise_50", libero.PlusName("put_it", "noise", noise=50)),
    ("put_it_tb_12", libero.PlusName("put_it", "background", variant="tb_12")),
    ("put_it_light_3", libero.PlusName("put_it", "light", variant="light_3")),
    ("put_it_level5_sample4", libero.PlusName("put_it", "layout", variant="level5_sample4")),
])
def test_plus_names_by_hand(name, parts):
    assert libero.parse_plus_name(name) == parts
    with pytest.raises(InputError):
        libero.parse_plus_name("put_it")


def test_libero_sentences_are_the_benchmarks():
    assert libero.libero_language("KITCHEN_SCENE10_close_the_top_drawer") == "close the top drawer"
    assert libero.libero_language("LIVING_ROOM_SCENE2_put_both_the_soup_and_the_sauce_in_the_basket").startswith("put both")
    assert libero.libero_language("push_the_plate_to_the_front_of_the_stove") == "push the plate to the front of the stove"


def test_libero_sentence_of_a_published_observation():
    if not LIBERO_SAMPLES.is_dir():
        pytest.skip("no ../shared/real/libero")
    with np.load(LIBERO_SAMPLES / "observation/sample_libero_spatial_observation.npz") as o:
        said = str(o["task_description"])
    names = [p.stem for p in (LIBERO_SAMPLES / "bddl_files/libero_spatial").glob("*.bddl")]
    assert said in map(libero.libero_language, names)


def test_steps_that_do_nothing_are_left_out():
    a = np.zeros((6, 7))
    a[:, 6] = [-1, -1, 1, 1, 1, -1]
    a[3, 0], a[4, 5] = 0.2, 5e-5
    assert libero.moving_steps(a).tolist() == [2, 3, 5]  # the gripper closes; a move; it opens


def test_what_a_goal_moves_and_where_to():
    things = ("Panda0", "bowl_1", "bowl_10", "cabinet_1", "stove_1")
    goal = (("On", "bowl_10", "cabinet_1_top_side"), ("Turnon", "stove_1"), ("In", "bowl_1", "cabinet_1_top_region"))
    assert libero.goal_roles(goal, things) == [["bowl_10", "stove_1", "bowl_1"], ["cabinet_1"]]
    assert libero.goal_roles((("On", "cup_1", "table_region"),), things) == [[], []]


def test_real_libero_files_load(capsys):
    if not LIBERO_SAMPLES.is_dir():
        pytest.skip("no ../shared/real/libero")
    robot.main(["check", "--data-root", str(LIBERO_SAMPLES)])
    told = capsys.readouterr().out
    assert "10 tasks, 500 initial states" in told and "assets" in told and "missing" in told
    b = libero.read_bddl(LIBERO_SAMPLES / "bddl_files/libero_spatial"
                        / "pick_up_the_black_bowl_on_the_stove_and_place_it_on_the_plate.bddl")
    assert b.goal == (("On", "akita_black_bowl_1", "plate_1"),
                      ) and b.regions["plate_region"][1] == ((0.05, 0.19, 0.07, 0.21),)
    assert b.objects["cookies_1"] == "cookies" and b.fixtures["flat_stove_1"] == "flat_stove"


def test_real_libero_plus_table():
    if not PLUS_SAMPLE.is_file():
        pytest.skip("no ../shared/real/libero_plus")
    from common.metrics import LIBERO_PLUS_TASKS

    rows = [row for suite in libero.read_plus_tasks(PLUS_SAMPLE).values() for row in suite]
    assert {c: sum(row["category"] == c for row in rows) for c in LIBERO_PLUS_TASKS} == LIBERO_PLUS_TASKS
    assert all(libero.parse_plus_name(row["name"]).category == row["category"] for row in rows)


def test_libero_picture_agrees_with_our_camera():
    """A real LIBERO-Spatial picture: where bddl puts the plate (white) and the cookies (dark red), our K and pose see
    them."""
    path = LIBERO_SAMPLES / "observation" / "sample_libero_spatial_observation.npz"
    if not path.is_file():
        pytest.skip("no ../shared/real/libero/observation")
    from common.geometry import invert, project
    from data.tabletop import agentview_pose, intrinsics

    with np.load(path) as sample:
        image, state = sample["full_image"].astype(float), sample["state"]
    points = torch.tensor([[0.06, 0.20, 0.91], [0.07, 0.03, 0.92]], dtype=torch.float64)
    K, pose = torch.from_numpy(intrinsics("agentview", 224)), torch.from_numpy(agentview_pose())
    uv, depth = project(points, K, invert(pose))
    plate, cookies = (image[int(v) - 3 : int(v) + 4, int(u) - 3 : int(u) + 4].mean((0, 1)) for u, v in uv.tolist())
    assert (depth > 0.8).all() and plate.min() > 150
    assert cookies[0] > 1.5 * cookies[2] and cookies.mean() < 0.8 * plate.mean()
    assert state.shape == (8,) and abs(state[3] - np.pi) < 0.05 and state[6] == pytest.approx(-state[7], abs=1e-3)


def test_segmentation_ids_beyond_a_byte(monkeypatch):
    """robosuite's ids are read as 24-bit numbers: 300 geoms need more than numpy 2 leaves of uint8."""

    ids = np.array([[0, 1, 259], [300, 301, 2]])  # 301 is out of range: background

    def read(rgb, depth, viewport, con):
        rgb[..., 0], rgb[..., 1], rgb[..., 2] = ids % 256, ids // 256, 0
        if depth is not None:
            depth[:] = 0.5

    fake = types.SimpleNamespace(mjr_readPixels=read, MjrRect=lambda *a: a)
    monkeypatch.setitem(sys.modules, "mujoco", fake)
    geoms = [types.SimpleNamespace(segid=i, objtype=5, objid=1000 + i) for i in range(300)]
    context = types.SimpleNamespace(con=None, scn=types.SimpleNamespace(ngeom=300, geoms=geoms))
    seen, depth = libero._read_pixels(context, 3, 2, depth=True, segmentation=True)
    assert seen[..., 1].tolist() == [[-1, 1000, 1258], [1299, -1, 1001]] and (depth == 0.5).all()


FAKE_LIBERO = {
    "libero/__init__.py": "", "libero/libero/__init__.py": "def _packaged_asset_path(): pass\n",
    "libero/libero/envs.py": """
import numpy as np
class OffScreenRenderEnv:
    def __init__(self, bddl_file_name, camera_heights, camera_widths, camera_depths, camera_segmentations):
        assert camera_depths and camera_segmentations == "instance"
        self.size, self.n, self.env, self.drawn, self.pictures = camera_heights, 0, self, 0, {}
        self.model = type("M", (), {"instances_to_ids": {"Panda0": 0, "bowl_1": 1}})()
        self.obj_body_id = {"bowl_1": 0}
        self.sim = type("S", (), {"data": type("D", (), {"body_xmat": np.eye(3).reshape(1, 9), "body_xpos": np.ones((1, 3))})()})()
        self.observation_names = {c + k for c in ("agentview", "robot0_eye_in_hand")
                                  for k in ("_image", "_depth", "_segmentation_instance")} | {"robot0_eef_pos"}
    def modify_observable(self, name, attribute, on):
        assert attribute == "enabled" and name != "robot0_eef_pos"
        self.pictures[name] = on
    def seed(self, seed): self.seeded = seed
    def reset(self): self.state = None
    def _get_observations(self, force_update):
        assert force_update
        return self.raw()
    def raw(self):
        s = self.size
        picture, ids = np.zeros((s, s, 3), np.uint8), np.zeros((s, s, 1), np.int32)
        picture[s - 1, 0] = 255  # the buffer's last row is the picture's first; first column
        ids[s - 1, 0], ids[0, 0] = 2, 1  # the bowl there, the robot elsewhere
        out = {"robot0_eef_pos": np.arange(3.0), "robot0_eef_quat": np.array([1.0, 0, 0, 0])}
        out["robot0_gripper_qpos"] = np.array([0.04, -0.04])
        if not any(self.pictures.values()):
            return out
        self.drawn += 1
        for c in ("agentview", "robot0_eye_in_hand"):
            out |= {c + "_image": picture, c + "_depth": np.full((s, s, 1), 0.25, np.float32)}
            out[c + "_segmentation_instance"] = ids
        return out
    def set_init_state(self, state): self.state = state; return self.raw()
    def get_sim_state(self): return np.zeros(2)
    def step(self, action):
        self.n += 1
        assert len(action) == 7
        return self.raw(), 0.0, self.n > 12, {}
    def close(self): pass
""",
    "robosuite/__init__.py": "", "robosuite/utils/__init__.py": "",
    "robosuite/utils/binding_utils.py": "class MjRenderContext: pass\n",
    "robosuite/utils/camera_utils.py": """
import numpy as np
def get_camera_intrinsic_matrix(sim, camera, h, w): return np.array([[300.0, 0, w / 2], [0, 300, h / 2], [0, 0, 1]])
def get_camera_extrinsic_matrix(sim, camera): return np.eye(4)
def get_real_depth_map(sim, depth): return 4 * depth
""",
}


@pytest.fixture
def stand_in(tmp_path, monkeypatch):
    """A package of LIBERO's form on the path, and a data folder with one task, still without assets."""
    for name, text in FAKE_LIBERO.items():
        (tmp_path / "site" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "site" / name).write_text(text)
    data = tmp_path / "data"
    for suite in ("libero_spatial",):
        (data / "bddl_files" / suite).mkdir(parents=True)
        (data / "bddl_files" / suite / "put_it.bddl").write_text(BDDL)
        (data / "init_files" / suite).mkdir(parents=True)
        np.savez(data / "init_files" / suite / "put_it.pruned_init.npz", states=np.arange(6.0).reshape(3, 2))
    for name in [n for n in sys.modules if n.partition(".")[0] in ("libero", "robosuite")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    monkeypatch.setenv("LIBERO_CONFIG_PATH", "unset")
    monkeypatch.setenv("MUJOCO_GL", "egl")
    monkeypatch.setattr(libero.tempfile, "gettempdir", lambda: str(tmp_path))
    yield data
    for name in [n for n in sys.modules if n.partition(".")[0] in ("libero", "robosuite")]:
        del sys.modules[name]


def give_assets(data: Path) -> None:
    scene = data / "assets/scenes/libero_tabletop_base_style.xml"
    scene.parent.mkdir(parents=True)
    scene.write_text("")


def test_libero_adapter_on_a_stand_in(stand_in, monkeypatch):
    """Assets are asked for, then states, no-ops, orientation and gripper follow LIBERO's conventions."""
    data = stand_in
    with pytest.raises(InputError, match="assets are missing"):
        robot.make_environment("libero_spatial", data)
    give_assets(data)
    env = robot.make_environment("libero_spatial", data, size=16)
    package = sys.modules["libero.libero"]
    with monkeypatch.context() as clone:  # a clone cannot be told
        clone.delattr(package, "_packaged_asset_path")
        with pytest.raises(InputError, match="own folder alone: copy or link"):
            robot.make_environment("libero_spatial", data)
    assert (Path(libero.os.environ["LIBERO_CONFIG_PATH"]) / "config.yaml").read_text().count(str(data)) == 3
    assert env.tasks == ("put_it",) and env.max_steps == 220
    o = env.reset("put_it", 4)
    assert env.env.state.tolist() == [2, 3] and env.env.n == 10  # state 4 % 3, ten no-ops
    assert o.images[0, 0, 15].tolist() == [255] * 3 and o.images[0].sum() == 3 * 255  # upright, mirrored
    assert o.instances[0, 0, 15] == 2 and (o.instances[0] > 0).sum() == 1  # the robot is background
    assert (o.depth == 1.0).all() and o.K[0].tolist() == [[-300, 0, 8], [0, 300, 8], [0, 0, 1]]
    assert o.state.tolist() == pytest.approx([0, 1, 2, np.pi, 0, 0, 0.04, -0.04])
    assert env.env.seeded == 11  # the same scene for the same number
    assert o.instruction == "put it"  # the file's name, as published policies are told
    check_observation(o)
    assert env.env.drawn == 1  # not in the ten no-ops
    assert not env.step(np.zeros(7)).done and not env.step(np.zeros(7), look=False).success and env.env.drawn == 2
    assert env.step(np.zeros(7)).success  # its `done` is success
    with pytest.raises(InputError, match="not of libero_spatial"):
        env.reset("fly", 0)

    def no_mesh(**settings):
        raise FileNotFoundError("bowl.msh\nTraceback")

    monkeypatch.setattr(sys.modules["libero.libero.envs"], "OffScreenRenderEnv", no_mesh)
    with pytest.raises(InputError, match=r"put_it.bddl: the scene cannot be built \(bowl.msh\)"):
        robot.make_environment("libero_spatial", data, size=16).reset("put_it", 0)


def test_liberos_demonstrations_become_episodes(stand_in, tmp_path, monkeypatch, capsys):
    """On the stand-in, with a reader of hdf5's form: moving steps only, depth and calibration from the simulator, roles from the
    goal; what is there is kept, what is broken told."""
    class File(dict):
        def __init__(self, path):
            if path.read_bytes() != b"whole":
                raise OSError("truncated file")
            actions = np.zeros((4, 7))
            actions[1:, 0] = 1
            demo = {"actions": {(): actions}, "states": {(): np.arange(8.0).reshape(4, 2)}}
            super().__init__(data={"demo_10": demo, "demo_9": demo})
        __enter__ = lambda self: self  # noqa: E731
        __exit__ = lambda self, *_: None  # noqa: E731

    monkeypatch.setitem(sys.modules, "h5py", types.SimpleNamespace(File=File))
    give_assets(stand_in)
    (tmp_path / "h").mkdir()
    ask = ["convert", "--suite", "libero_spatial", "--hdf5", str(tmp_path / "h"), "--out", str(tmp_path / "o"), "--data-root",
           str(stand_in), "--image", "32"]

    def told() -> str:
        with pytest.raises(SystemExit) as end:
            robot.main(ask)
        assert end.value.code == 2
        return capsys.readouterr().err

    assert "put_it_demo.hdf5: missing" in told()
    (tmp_path / "h" / "put_it_demo.hdf5").write_bytes(b"who")
    assert "put_it_demo.hdf5: not LIBERO's demonstrations (truncated file); cut short?" in told()
    (tmp_path / "h" / "put_it_demo.hdf5").write_bytes(b"whole")
    robot.main(ask)
    world = json.loads((tmp_path / "o" / "world.json").read_text())
    assert world["demos"] == 2 and world["tasks"] == ["put_it"] and world["roles"] == {"put_it": [["bowl_1"], []]}
    e = read_episode(tmp_path / "o/demos/put_it/0001", world["cameras"])
    assert len(e["actions"]) == 3 and e["actions"][0, 0] == 1 and e["instruction"] == "put it"
    assert e["things"] == ["Panda0", "bowl_1"] and np.isnan(e["poses"][0, 0]).all() and e["poses"][0, 1, 0, 3] == 1
    assert (e["depth"] == 10000).all() and e["K"][0, 0, 0, 0] == -300
    robot.main(["check", "--data-root", str(tmp_path / "o")])
    assert "14 of 14 files" in capsys.readouterr().out
    ask[-1] = "64"
    assert "holds other demonstrations" in told()
    ask[-1] = "32"
    whole = (tmp_path / "o" / "world.json").read_bytes()
    (tmp_path / "h" / "put_it_demo.hdf5").rename(tmp_path / "h" / "away")
    assert "put_it_demo.hdf5: missing" in told() and (tmp_path / "o" / "world.json").read_bytes() == whole
    (tmp_path / "h" / "away").rename(tmp_path / "h" / "put_it_demo.hdf5")
    monkeypatch.setattr(sys.modules["libero.libero.envs"].OffScreenRenderEnv, "get_sim_state", lambda self: np.zeros(5))
    (tmp_path / "o/demos/put_it/0001/episode.npz").unlink()
    assert "a state of (2,) numbers; this scene has (5,)" in told()


@pytest.mark.parametrize("text", [BDDL.replace("(problem LIBERO_Tabletop_Manipulation)", "(problem)"), BDDL.replace("-0.1", "x")])
def test_definitions_of_another_form_are_told(tmp_path, text):
    (tmp_path / "a.bddl").write_text(text)
    with pytest.raises(InputError, match="a.bddl: a part of another form"):
        libero.read_bddl(tmp_path / "a.bddl")
    (tmp_path / "b.bddl").write_bytes(b"\xff(define")
    with pytest.raises(InputError, match="b.bddl: not a UTF-8 text"):
        libero.read_bddl(tmp_path / "b.bddl")


@pytest.mark.parametrize("value", [[3], {"libero_spatial": 3}, {"libero_spatial": [{"category": "Sensor Noise"}]}])
def test_plus_tables_of_another_form_are_told(tmp_path, value):
    (tmp_path / "t.json").write_text(json.dumps(value))
    with pytest.raises(InputError, match="t.json: not LIBERO-Plus's"):
        libero.read_plus_tasks(tmp_path / "t.json")


def test_assets_alone_are_a_data_root(tmp_path, capsys):
    give_assets(tmp_path)
    robot.main(["check", "--data-root", str(tmp_path)])
    assert "found" in capsys.readouterr().out
