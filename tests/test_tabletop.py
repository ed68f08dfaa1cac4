"""data/tabletop.py: conventions by hand, contact rules, geometry and pictures, experts, perturbations, files."""

import json

import numpy as np
import pytest
import torch

from common.files import InputError
from common.geometry import invert, project, unproject
from data import tabletop as T
from data.tabletop import (DOWN, KINDS, OPEN, PERTURBATIONS, TASKS, Perturbation, Tabletop, Thing, agentview_pose,
                           axis_angle, degrade, demonstrate, expert, intrinsics, make_world, rotation_of,
                           surface_points)


@pytest.fixture(scope="module")
def world() -> Tabletop:
    return Tabletop(128)


def play(world: Tabletop, task: str, steps: int, seed: int = 0) -> None:
    world.reset(task, seed)
    for _ in range(steps):
        world.step(expert(world))


def empty(world: Tabletop, *things: Thing) -> Tabletop:
    """A world with these things alone, the hand over the middle."""
    world.reset("open_drawer", 0)
    world.things = list(things)
    world.site = np.array([0.0, 0.0, 0.2])
    world._build()
    return world


# --- conventions ------------------------------------------------------------------------------------------------------

def test_action_and_state_follow_libero(world):
    world.reset("lift_cube", 3)
    before = world.state()
    assert before.shape == (8,) and before[6] == OPEN and before[7] == -OPEN           # two finger joints
    assert before[3:6] == pytest.approx([np.pi, 0, 0])                                  # the hand points down
    assert before[2] == pytest.approx(0.9 + world.site[2])                              # base frame, not table frame
    world.step([1, 0, 0, 0, 0, 0, -1])
    assert world.state()[:3] - before[:3] == pytest.approx([0.05 * T.RESPONSE, 0, 0])   # +1 is 5 cm, reached by half
    world.step([0, 0, 0, 0, 0, 0.4, -1])                                                # 0.4 x 0.5 rad about base z
    turned = rotation_of([0, 0, 0.4 * 0.5 * T.RESPONSE]) @ DOWN
    assert np.allclose(world.hand, turned)
    world.step([0, 0, 0, 0, 0, 0, 1])
    assert world.state()[6] == pytest.approx(OPEN - T.GRIP_SPEED)                       # +1 closes
    world.step([9, 0, 0, 0, 0, 0, -1])                                                  # clipped to 1
    assert world.state()[0] - before[0] == pytest.approx(2 * 0.05 * T.RESPONSE)


def test_nan_aborts_and_a_wrong_size_is_told(world):
    world.reset("lift_cube", 0)
    with pytest.raises(InputError, match="7 numbers"):
        world.step([0.0] * 6)
    assert not world.done
    assert world.step([0, 0, np.nan, 0, 0, 0, 0]) and "finite" in world.aborted and not world.success()
    assert world.step(np.zeros(7)) and world.steps == 0                                 # nothing moves afterwards


def test_axis_angle_is_continuous_around_pointing_down():
    for tilt in (-0.05, -1e-6, 1e-6, 0.05):
        vector = axis_angle(rotation_of([0, tilt, 0]) @ DOWN)
        assert np.linalg.norm(vector - [np.pi, 0, 0]) < 0.2
        assert np.allclose(rotation_of(vector), rotation_of([0, tilt, 0]) @ DOWN, atol=1e-6)


def test_agent_view_is_liberos_and_mirrored(world):
    R = agentview_pose()
    assert R[:3, 3] == pytest.approx([0.6586, 0, 1.6103]) and np.allclose(R[:3, :3].T @ R[:3, :3], np.eye(3), atol=1e-6)
    axis = R[:3, 2]
    assert axis[0] < -0.7 and abs(axis[1]) < 1e-6 and axis[2] < -0.6                    # towards the robot, and down
    K = intrinsics("agentview", 256)
    assert K[0, 0] == -309.02 and K[1, 1] == 309.02 and K[0, 2] == 128
    world.reset("lift_cube", 0)
    world.things = [Thing("red cube", (0.0, 0.2))]                                      # on the robot's left ...
    world._build()
    mask = world.render()["instances"][0] == 1
    assert np.nonzero(mask)[1].mean() < 40                                              # ... is on the picture's left


# --- pictures against geometry ----------------------------------------------------------------------------------------

@pytest.mark.parametrize("task, steps", [("sort_cubes", 0), ("near_cube_in_bowl", 8), ("cube_in_drawer", 14)])
def test_clouds_lie_on_their_things(world, task, steps):
    play(world, task, steps, seed=2)
    r = world.render()
    tested = 0
    for v in range(2):
        K, pose = torch.from_numpy(r["K"][v]), torch.from_numpy(r["T_base_cam"][v])
        for k, thing in enumerate(world.things):
            rows, columns = np.nonzero(r["instances"][v] == k + 1)
            if len(rows) < 25:
                continue
            uv = torch.from_numpy(np.stack([columns + 0.5, rows + 0.5], -1))
            depth = torch.from_numpy(r["depth"][v][rows, columns]).double()
            local = (unproject(uv, depth, K, pose).numpy() - [0, 0, world.height] - thing.position) @ thing.rotation
            reach = max(thing.kind.half) + (0.07 if thing.what == "drawer" else 0.025)
            assert np.abs(local[:, :2]).max() < reach and -0.002 < local[:, 2].min() and local[:,
                2].max() < thing.kind.height + 0.002
            back, z = project(unproject(uv, depth, K, pose), K, invert(pose))
            assert torch.allclose(back, uv, atol=1e-6) and torch.allclose(z, depth, atol=1e-6)
            tested += 1
    assert tested >= 4


def test_pictures_have_shadows_a_gripper_and_depth(world):
    empty(world, Thing("red cube", (0.0, 0.0)))
    world.site = np.array([-0.3, 0.3, 0.3])                                             # the arm's own shadow elsewhere
    K, pose = torch.from_numpy(intrinsics("agentview", 128)), torch.from_numpy(agentview_pose())
    # the sun stands at +x, +y: what the cube's edge, 4.8 cm up, hides from it lies 2 cm beyond the cube at -x, -y
    spots = np.array([[-0.033, -0.014, 0.9], [0.12, 0.12, 0.9]])
    uv = project(torch.from_numpy(spots), K, invert(pose))[0].numpy().astype(int)
    image = world.render()["images"][0].astype(float)
    assert image[uv[0, 1], uv[0, 0]].mean() < 0.8 * image[uv[1, 1], uv[1, 0]].mean()
    wrist = world.render()
    dark = (wrist["images"][1][110:] < 60).all(-1)
    assert dark[:, :50].any() and dark[:, -50:].any()                                   # a finger at either side, below
    assert (wrist["depth"] > 0).all()


def test_what_is_hidden_has_a_small_share(world):
    empty(world, Thing("red cube", (-0.05, 0.0)))
    world.task = TASKS["lift_cube"]
    assert world.visible_share() == pytest.approx(1, abs=0.05)
    world.things.append(Thing("orange carton", (0.05, 0.0)))
    world._build()
    assert world.visible_share() < 0.5


# --- contact ----------------------------------------------------------------------------------------------------------

def test_fingers_stop_on_things_and_table(world):
    empty(world, Thing("red cube", (0.0, T.OPEN + T.PAD)))                              # under one finger
    for _ in range(20):
        world.step([0, 0, -1, 0, 0, 0, -1])
    assert world.site[2] - T.TIP == pytest.approx(0.048, abs=1e-6)
    empty(world)
    for _ in range(20):
        world.step([0, 0, -1, 0, 0, 0, -1])
    assert 0 < world.site[2] - T.TIP < 0.006


def test_grasp_carries_rigidly_and_releases(world):
    cube = Thing("red cube", (0.0, 0.006), 0.1)
    empty(world, cube)
    world.site[2] = 0.03
    for _ in range(4):
        world.step([0, 0, 0, 0, 0, 0, 1])
    assert world.held is cube and cube.position[1] == pytest.approx(0, abs=2e-3)        # closing centres it
    assert world.opening == pytest.approx(cube.extent(world.hand[:2, 1]), abs=1e-6)
    rest = world.hand.T @ (cube.position - world.site)
    for _ in range(5):
        world.step([0.5, 0.2, 1, 0, 0, 0.5, 1])
    assert np.allclose(world.hand.T @ (cube.position - world.site), rest) and cube.position[2] > 0.1
    for _ in range(6):
        world.step([0, 0, 0, 0, 0, 0, -1])
    assert world.held is None and cube.position[2] == 0
    empty(world, Thing("orange carton", (0.0, 0.0)))                                    # 11 cm across the fingers
    world.site[2] = 0.1
    for _ in range(6):
        world.step([0, 0, 0, 0, 0, 0, 1])
    assert world.held is None                                                           # it does not fit


def test_pushing_moves_light_things_and_their_neighbours(world):
    first, second = Thing("red cube", (0.06, 0.0)), Thing("blue cube", (0.115, 0.0))
    empty(world, first, second)
    world.opening, world.site[2] = 0.0, 0.02
    for _ in range(6):
        world.step([1, 0, 0, 0, 0, 0, 1])
    assert first.position[0] > 0.12 and second.position[0] > first.position[0] + 0.04
    plate = Thing("red plate", (0.1, 0.0))
    empty(world, plate)
    world.opening, world.site[2] = 0.0, 0.02
    for _ in range(6):
        world.step([1, 0, 0, 0, 0, 0, 1])
    assert plate.position[0] == 0.1                                                     # heavy


def test_things_sink_into_receptacles_and_onto_tops(world):
    basket, cube, can = Thing("basket", (0.0, 0.0)), Thing("red cube", (0.0, 0.01, 0.2)), Thing("green can", (0.2, 0.0))
    ball = Thing("orange ball", (0.2, 0.005, 0.3))
    empty(world, basket, cube, can, ball)
    for _ in range(12):
        world.step(np.zeros(7))
    assert cube.position[2] == pytest.approx(KINDS["basket"].floor) and world._inside(cube, basket)
    assert ball.position[2] == pytest.approx(can.top)
    rim = Thing("blue cube", (0.081, 0.0, 0.2))                                         # comes down on the rim
    empty(world, basket, rim)
    for _ in range(20):
        world.step(np.zeros(7))
    assert rim.position[2] in (pytest.approx(KINDS["basket"].floor), pytest.approx(0.0))


def test_carried_things_do_not_pass_walls(world):
    basket, cube = Thing("basket", (0.2, 0.0)), Thing("red cube", (0.0, 0.0))
    empty(world, basket, cube)
    world.site[2] = 0.03
    for _ in range(4):
        world.step([0, 0, 0, 0, 0, 0, 1])
    for _ in range(12):
        world.step([1, 0, 0, 0, 0, 0, 1])
    assert world.held is cube and cube.position[0] < 0.2 - 0.086                        # stopped by the near wall


def test_drawer_is_pulled_and_pushed_within_its_travel(world):
    play(world, "open_drawer", 60)
    assert world.success() and world.drawer > 0.85 * T.DRAWER
    assert world.thing("white drawer").position[0] - world.thing("cabinet").position[0] == pytest.approx(world.drawer)
    for _ in range(20):
        world.done = False
        world.step([1, 0, 0, 0, 0, 0, 1])
    assert world.drawer == pytest.approx(T.DRAWER)
    play(world, "close_drawer", 60)
    assert world.success() and world.held is None                                       # pushed, not carried


# --- tasks and experts ------------------------------------------------------------------------------------------------

def test_experts_succeed_and_luck_does_not(world):
    runs = [(task, seed, demonstrate(world, task, seed)) for task in TASKS for seed in range(5)]
    failed = [(task, seed) for task, seed, demo in runs if not demo["success"]]
    assert len(failed) <= 0.05 * len(runs), failed
    for _, _, demo in runs:
        assert np.abs(demo["executed"]).max() <= 1 and np.isfinite(demo["states"]).all() and len(demo["actions"]) < 160
    lucky = 0
    for k, task in enumerate(TASKS):
        world.reset(task, 7)
        rng = np.random.default_rng(k)
        assert not world.success()                                                      # nothing starts solved
        while not world.done and world.steps < world.limit:
            world.step(rng.uniform(-1, 1, 7))
        lucky += world.success()
    assert lucky <= 2


def test_same_seed_same_episode(world):
    first = demonstrate(world, "stack_cubes", 5)
    pictures = world.render()["images"]
    again = demonstrate(world, "stack_cubes", 5)
    assert all(np.array_equal(first[k], again[k]) for k in first) and np.array_equal(pictures, world.render()["images"])
    assert not np.array_equal(first["states"][0], demonstrate(world, "stack_cubes", 6)["states"][0])


def test_unknown_names_are_told(world):
    with pytest.raises(InputError, match="one of lift_cube"):
        world.reset("fly", 0)
    with pytest.raises(InputError, match="level 1 to 5"):
        world.reset("lift_cube", 0, Perturbation("camera", 6))


# --- perturbations ----------------------------------------------------------------------------------------------------

def test_every_perturbation_changes_its_own_thing_only(world):
    world.reset("can_in_basket", 4)
    plain, places, site = world.render(), {t.name: t.position.copy() for t in world.things}, world.site.copy()
    words, names = world.instruction, [t.name for t in world.things]
    for kind in PERTURBATIONS:
        world.reset("can_in_basket", 4, Perturbation(kind, 5))
        r = world.render()
        assert (world.instruction != words) == (kind == "language"), kind
        assert (not np.array_equal(world.T_base_agent, agentview_pose())) == (kind == "camera"), kind
        assert (not np.array_equal(world.site, site)) == (kind == "robot"), kind
        assert ([t.name for t in world.things] != names) == (kind == "layout"), kind
        if kind != "layout":
            assert all(np.array_equal(t.position, places[t.name]) for t in world.things), kind
        same_agent = np.array_equal(r["images"][0], plain["images"][0])
        assert same_agent == (kind == "language"), kind
        if kind in ("camera", "noise"):                                                 # the wrist camera is untouched
            assert np.array_equal(r["images"][1], plain["images"][1]), kind
        if kind in ("noise", "light", "background"):
            assert np.array_equal(r["depth"], plain["depth"]), kind


def test_levels_are_graded(world):
    def change(kind: str, level: int) -> float:
        total = 0.0
        for seed in range(4):
            world.reset("lift_cube", seed)
            plain, site, count = world.render(), world.site.copy(), len(world.things)
            world.reset("lift_cube", seed, Perturbation(kind, level))
            if kind == "robot":
                total += float(np.linalg.norm(world.site - site))
            elif kind == "layout":
                total += len(world.things) - count
            elif kind == "camera":
                total += float(np.linalg.norm(world.T_base_agent[:3, 3] - agentview_pose()[:3, 3]))
            else:
                total += float(np.abs(world.render()["images"][0].astype(float) - plain["images"][0]).mean())
        return total

    for kind in PERTURBATIONS:
        if kind != "language":
            assert change(kind, 1) < change(kind, 3) < change(kind, 5), kind
    tables = [np.mean([np.abs(np.subtract(T._repaint(np.random.default_rng(k), level, T.Style(T.LIGHT)).table, T.Style(T.LIGHT).table))
                       for k in range(50)]) for level in range(1, 6)]
    assert all(a < b for a, b in zip(tables, tables[1:]))       # each level of the background, too


@pytest.mark.parametrize("kind, level", [("", 1), ("layout", 5), ("hard", 3)])
def test_the_cube_next_to_the_can_is_one(world, kind, level):
    for seed in range(40):
        world.reset("near_cube_in_bowl", seed, Perturbation(kind, level) if kind else None)
        cans = [t.position[:2] for t in world.things if t.what == "can"]
        near, far = (min(np.hypot(*(c - world.thing(n).position[:2])) for c in cans) for n in ("red cube", "second red cube"))
        assert near < 0.1 < far


def test_an_occluded_target_is_mostly_hidden_and_can_be_reached(world):
    solved = []
    for seed in range(6):
        world.reset("mug_on_plate", seed)
        before = {t.name: t.position.copy() for t in world.things}
        world.reset("mug_on_plate", seed, Perturbation("occluded"))
        assert 0.1 <= world.visible_share() <= 0.6
        assert all((world.thing(name).position == place).all() for name, place in before.items())
        while not world.done and world.steps < world.limit:
            world.step(expert(world))
        solved.append(world.success())
    assert sum(solved) >= 5


def test_a_carton_stands_before_most_targets_but_no_drawer(world):
    def share(task: str) -> float:
        there = []
        for seed in range(20):
            world.reset(task, seed, Perturbation("layout", 4))
            there.append(any(t.what == "carton" for t in world.things))
        return float(np.mean(there))

    assert share("lift_cube") > 0.8 and share("open_drawer") == 0


def test_held_out_words_are_new():
    trained = {sentence for task in TASKS.values() for sentence in task.words}
    known = {word for sentence in trained for word in sentence.split()}
    for name, task in TASKS.items():
        assert len(set(task.held_out)) == 5 and not trained & set(task.held_out), name
        # level 1: known words, new sentence
        assert set(task.held_out[0].split()) <= known, name
        assert set(task.held_out[4].split()) - known, name                              # level 5: new words too


def test_hard_changes_everything_at_once(world):
    world.reset("ball_in_bowl", 1)
    words, count = world.instruction, len(world.things)
    world.reset("ball_in_bowl", 1, Perturbation("hard"))
    assert world.instruction != words and len(world.things) > count and world.style.light != T.LIGHT
    assert world.style.table != T.Style(T.LIGHT).table and 0 < abs(world.height - 0.9) <= 0.03
    demo = demonstrate(world, "ball_in_bowl", 1, Perturbation("hard"))
    assert demo["success"] and demo["states"][0, 2] == pytest.approx(world.height + 0.24, abs=0.05)


@pytest.mark.parametrize("kind", range(5))
def test_noise_kinds_grow_with_severity(kind):
    image = np.zeros((64, 64, 3), np.uint8)
    image[16:48, 16:48] = (200, 60, 30)
    image[:, 30:34] = 255
    near, far = (np.abs(degrade(image, kind, s, np.random.default_rng(0)).astype(float) - image).mean() for s in (2, 9))
    assert 0 < near < far


# --- shapes and files -------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("what", sorted(KINDS))
def test_surface_points_lie_within_the_kind(what):
    points = surface_points(what, 400, np.random.default_rng(0))
    kind = KINDS[what]
    margin = 0.075 if what == "drawer" else 0.025
    assert points.shape == (400, 3) and points[:, 2].min() > -1e-6 and points[:, 2].max() < kind.height + 1e-6
    assert (np.abs(points[:, :2]) < np.array(kind.half) + margin).all()
    if what == "ball":
        assert np.allclose(np.linalg.norm(points - [0, 0, 0.028], axis=1), 0.028)


def test_make_world_writes_resumes_and_refuses(tmp_path, capsys):
    out, settings = tmp_path / "w", dict(demos=1, tasks=("lift_cube", "open_drawer"), size=64, workers=1)
    written = lambda: {p.relative_to(out): p.read_bytes() for p in sorted(out.rglob("*")) if p.is_file()}  # noqa: E731
    make_world(out, seed=3, **settings)
    files = written()
    assert len(files) == 1 + 2 * 7 and json.loads(files[T.Path("world.json")])["whole"]
    (out / "demos/lift_cube/0000/episode.npz").unlink()
    (out / "world.json").write_text(json.dumps(json.loads(files[T.Path("world.json")]) | {"whole": False}))
    make_world(out, seed=3, **settings)
    assert written() == files                                               # same bytes
    (out / "world.json").write_text(json.dumps(json.loads(files[T.Path("world.json")]) | {"whole": False}))
    make_world(out, seed=3, **settings)                                     # killed before the last word
    assert written() == files
    (out / "demos/open_drawer/0000/episode.npz").unlink()                   # a whole world that has lost one mends it
    make_world(out, seed=3, **settings)
    assert written() == files
    for bad, told in (
        (dict(seed=-1), "--seed -1"), (dict(workers=0), "--workers 0"), (dict(out=out / "world.json"), "not a folder"),
        (dict(out=out, seed=4, **settings), "another world .seed 3"), (dict(out=tmp_path), "not empty"),
        (dict(seed=50), "--seed 50: its episodes would be evaluation's"), (dict(tasks=("juggle",)), "--tasks juggle"),
    ):  # fmt: skip
        with pytest.raises(InputError, match=told):
            make_world(**(dict(out=tmp_path / "z", demos=1) | bad))
    with pytest.raises(SystemExit) as stop:
        T.main(["--out", str(tmp_path / "x"), "--tasks", "fly"])
    assert stop.value.code == 2 and capsys.readouterr().err.startswith("error: --tasks fly")
