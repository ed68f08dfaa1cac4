"""Observations and demonstrations: what does not fit is one line; frames, masks and clouds come back as they
were.
"""

import json
import shutil

import numpy as np
import pytest
import torch

from common.demonstrations import DEPTH_UNIT, Demonstrations, read_episode, write_episode
from common.files import InputError, write_npz
from common.observation import Observation, check_observation, mirror_intrinsics, stack_observations
from common.robot import make_environment


def open_demos(root) -> Demonstrations:
    return Demonstrations(root, views=2, state_dim=8, actions=7)


@pytest.mark.parametrize("changes, words", [
    (lambda o: {"depth": None}, "no depth"),
    (lambda o: {"depth": np.ones((2, 32, 32), np.float32)}, "give it at the images' size"),
    (lambda o: {"K": o.K * np.array([2, 2, 1.0])[:, None]}, "another image size"),
    (lambda o: {"K": o.K * np.array([256 / 224, 256 / 224, 1.0])[:, None]}, "another image size"),
    (lambda o: {"T_base_cam": o.T_base_cam * np.nan}, "no number"),
    (lambda o: {"T_base_cam": np.eye(4)[None]}, "for 2 views")])
def test_bad_observations_are_one_line(observations, changes, words):
    with pytest.raises(InputError, match=words) as caught:
        stack_observations([observations[0]._replace(**changes(observations[0]))], 64)
    assert "\n" not in str(caught.value)


def test_depth_that_is_no_number_is_not_measured(observations):
    holes = observations[0].depth.copy()
    holes[:, :9], holes[:, 9:12] = np.nan, np.inf
    none = np.where(np.isfinite(holes), holes, 0)
    a, b = (stack_observations([observations[0]._replace(depth=d)], 64)["depth"] for d in (holes, none))
    assert torch.equal(a, b) and a.isfinite().all()


def test_observations_are_brought_to_the_policys_size(observations):
    o = check_observation(observations[0])
    b = stack_observations([o], 32)
    half = torch.from_numpy(o.K[0]).float() * torch.tensor([0.5, 0.5, 1])[:, None]
    assert b["images"].shape == (1, 2, 3, 32, 32) and torch.allclose(b["K"][0, 0], half)
    assert b["images"].max() <= 1 and b["depth"].shape == (1, 2, 32, 32) and b["texts"] == [o.instruction]


def test_mirrored_intrinsics():
    K = np.array([[150.0, 0, 60], [0, 140, 31], [0, 0, 1]])
    mirrored, point = mirror_intrinsics(K, 128), np.array([0.2, -0.1, 0.9])
    u, v = (K @ point)[:2] / 0.9
    assert (mirrored @ point)[:2] / 0.9 == pytest.approx([128 - u, v])
    assert np.allclose(mirror_intrinsics(mirrored, 128), K)


def test_an_episode_comes_back_as_it_was_written(tmp_path):
    rng, T = np.random.default_rng(0), 3
    images = rng.integers(0, 256, (T, 2, 8, 8, 3)).astype(np.uint8)
    depth, marks = rng.uniform(0.2, 3, (T, 2, 8, 8)), rng.integers(0, 4, (T, 2, 8, 8))
    arrays = dict(actions=rng.normal(size=(T, 14)).astype(np.float32), states=np.zeros((T, 8), np.float32),
                  poses=np.zeros((T, 2, 4, 4), np.float32), K=np.zeros((T, 2, 3, 3)),
                  T_base_cam=np.zeros((T, 2, 4, 4)), things=np.array([b"red cube", b"bowl"]),
                  instruction=np.array(b"lift"), task=np.array(b"lift_cube"))
    write_episode(tmp_path / "e", ("a", "b"), images, depth, marks, **arrays)
    e = read_episode(tmp_path / "e", ["a", "b"])
    assert np.array_equal(e["images"], images) and np.array_equal(e["instances"], marks)
    assert np.abs(e["depth"] * DEPTH_UNIT - depth).max() <= DEPTH_UNIT / 2 and e["things"] == ["red cube",
                                                                                               "bowl"]
    assert np.array_equal(e["actions"], arrays["actions"]) and (e["instruction"], e["task"]) == ("lift",
                                                                                                 "lift_cube")
    path = tmp_path / "e" / "episode.npz"
    whole = path.read_bytes()
    path.write_bytes(whole[:200])
    with pytest.raises(InputError, match="episode.npz"):
        read_episode(tmp_path / "e", ["a", "b"])
    for name in ("actions", "states", "K", "T_base_cam"):
        write_npz(path, **arrays | {name: np.full_like(arrays[name], np.inf)})
        with pytest.raises(InputError, match=f"episode.npz: {name} that are not finite"):
            read_episode(tmp_path / "e", ["a", "b"])
    path.write_bytes(whole)
    (tmp_path / "e" / "b_depth.png").unlink()
    with pytest.raises(InputError, match="b_depth.png: missing"):
        read_episode(tmp_path / "e", ["a", "b"])


def test_frames_are_the_environments(tabletop):
    demos = open_demos(tabletop)
    o, first = demos.observation(0), make_environment("tabletop", size=64).reset("lift_cube", 0)
    assert isinstance(o, Observation) and np.array_equal(o.images,
                                                         first.images) and o.instruction == first.instruction
    actions, valid = demos.chunk(len(demos.demos[0]["actions"]) - 2, 4)
    assert valid.tolist() == [True, True, False, False] and torch.equal(actions[1], actions[3])
    with pytest.raises(InputError, match="2 cameras, 7 numbers an action, 8 a state; --views 3"):
        Demonstrations(tabletop, views=3, state_dim=8, actions=7)


def test_grounding_maps_lie_where_the_picture_has_them(tabletop):
    demos = open_demos(tabletop)
    truth = demos.ground(0, 16)
    target = demos.demos[0]["instances"][0, 0] == demos.demos[0]["things"].index("red cube") + 1
    assert truth.shape == (2, 2, 16, 16) and truth[0, 0].sum() * 16 == pytest.approx(target.sum())


def test_demonstrations_from_elsewhere_bring_their_roles(tabletop, tmp_path):
    """LIBERO's, as common.robot convert writes them: what moves where is in world.json, shapes are not
    known."""
    shutil.copytree(tabletop, tmp_path / "w")
    world = json.loads((tmp_path / "w" / "world.json").read_text())
    world |= {"name": "LIBERO demonstrations, libero_spatial",
              "roles": {"lift_cube": [["blue cube"], ["red cube"]], "open_drawer": [["white drawer"], []]}}
    (tmp_path / "w" / "world.json").write_text(json.dumps(world))
    own, other = open_demos(tabletop), open_demos(tmp_path / "w")
    for change, says in (({"tasks": ["../../x"]}, "'../../x' is no name of a single folder"),
                         ({"cameras": ["/etc/front"]}, "'/etc/front' is no name of a single folder"),
                         ({"demos": 2**31}, "'demos' is 2147483648, expected 1..9999"), ({"demos": "2"}, "no demonstrations"),
                         ({"roles": [1]}, "'roles' is a list"), ({"roles": {"lift_cube": [["x"], []]}}, "are not its things")):
        (tmp_path / "w" / "world.json").write_text(json.dumps(world | change))
        with pytest.raises(InputError, match=says):
            open_demos(tmp_path / "w")
    a, b = own.ground(0, 16), other.ground(0, 16)
    assert torch.equal(a[:, 0], b[:, 1]) and b[:, 0].sum() > 0
    assert own.known_shapes and not other.known_shapes


def test_an_object_cloud_lies_on_its_shape(tabletop):
    demos, rng = open_demos(tabletop), np.random.default_rng(0)
    for _ in range(10):
        pair = demos.object_cloud(0, rng, 64)
        nearest = torch.cdist(pair["partial"], pair["full"]).amin(1)
        assert nearest.quantile(0.9) < 0.5 and pair["eye"].norm() > 2  # [object radii]
