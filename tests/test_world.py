"""The driving world: its masks against a slow oracle, its labels against its sensors, its bytes.

The devkit's own checks of its tables are in test_devkit.py.
"""

import hashlib
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from common.files import InputError
from common.nuscenes import CAMERAS, LIDARSEG_TO_OCC3D, NuScenesOccupancy
from data import render
from data.driving import make_world, world
from data.driving.__main__ import main
from data.driving.ground_truth import label_statistics, seen_voxels

ROOT = Path(__file__).parents[1]
LOWER, VOXEL, SHAPE = np.array([-40.0, -40.0, -1.0]), 0.4, (200, 200, 16)


@pytest.fixture(scope="session")
def devkit(tiny_world):
    nuscenes = pytest.importorskip("nuscenes.nuscenes")
    return nuscenes.NuScenes("v1.0-mini", str(tiny_world), verbose=False)


def pose(row: dict) -> np.ndarray:
    from pyquaternion import Quaternion

    T = np.eye(4)
    T[:3, :3], T[:3, 3] = Quaternion(row["rotation"]).rotation_matrix, row["translation"]
    return T


def sensor(nusc, token: str) -> tuple[dict, np.ndarray, np.ndarray]:
    """sample_data token -> row, T_global_ego, T_ego_sensor."""
    row = nusc.get("sample_data", token)
    calibration = nusc.get("calibrated_sensor", row["calibrated_sensor_token"])
    return row, pose(nusc.get("ego_pose", row["ego_pose_token"])), pose(calibration)


def labels(root: Path, nusc, sample: dict) -> dict[str, np.ndarray]:
    scene = nusc.get("scene", sample["scene_token"])["name"]
    with np.load(root / "gts" / scene / sample["token"] / "labels.npz") as file:
        return {key: file[key] for key in file.files}


def returns(root: Path, nusc, sample: dict) -> tuple[np.ndarray, np.ndarray]:
    """LiDAR points (M, 3) float64 in the reference ego and the sensor's place (3,)."""
    row, _, T_ego_lidar = sensor(nusc, sample["data"]["LIDAR_TOP"])
    points = np.fromfile(root / row["filename"], np.float32).reshape(-1, 5)[:, :3].astype(np.float64)
    return points @ T_ego_lidar[:3, :3].T + T_ego_lidar[:3, 3], T_ego_lidar[:3, 3]


def read_map(root: Path, kind: str, camera: str, name: str) -> np.ndarray:
    """The exact map of an image, given its file name or stem."""
    return cv2.imread(str(root / f"exact/{kind}/{camera}/{Path(name).stem}.png"), cv2.IMREAD_UNCHANGED)


# --- the renderer -----------------------------------------------------------------------------------------------------

def test_drawing_equals_plain_ray_casting():
    """Every kind of primitive, tilted and tapered: the culled, batched float32 drawing against plain float64 rays."""
    rng = np.random.default_rng(0)
    things = render.PrimitiveList()
    for i in range(150):
        turn, _ = np.linalg.qr(rng.normal(size=(3, 3)))
        turn *= np.sign(np.linalg.det(turn))
        things.add(i % 3, rng.uniform([-20, -20, 0], [20, 20, 15]), rng.uniform(0.1, 2, 3), 0, (0.5, 0.5, 0.5), turn,
                   rng.uniform(0, 0.9, 2))
    scene = render.Scene(things.build(), render.Plane())
    K = np.array([[45.0, 0, 50], [0, 45, 40], [0, 0, 1]])
    T = np.eye(4)
    T[:3, :3] = [[0.2, 0, 0.98], [-0.98, 0, 0.2], [0, -1, 0]]
    T[:3, :3] = np.linalg.svd(T[:3, :3])[0] @ np.linalg.svd(T[:3, :3])[2]
    T[:3, 3] = -25, -3, 2.0
    for grid in (render.camera_rays(K, T, (61, 101)), render.lidar_rays(T, np.radians(np.linspace(-30, 30, 24)), 90)):
        view = render.draw(scene, grid)
        t, ids = render.cast(scene, grid.origin, grid.directions().reshape(3, -1).T)
        same = view.ids.ravel() == ids
        assert same.mean() > 0.995                                     # the rest: rays that graze an edge
        assert len(np.unique(ids)) > 15
        assert np.abs(view.t.ravel() - t)[same].max() < 2e-3


def test_kerb_is_a_vertical_face():
    """A ray that passes above the upper level and would meet the lower one under it stops at the kerb between them."""
    class Step(render.Plane):
        step = 0.2

        def raised(self, x, y):
            return x - 5

    origin, directions = np.array([0, 0, 1.0]), np.array([[1, 0, -0.17], [1, 0, -0.1], [1, 0, -0.5], [1, 0, 0.1]])
    t, ids = render.cast(render.Scene(render.PrimitiveList().build(), Step()), origin, directions)
    assert t[:3] == pytest.approx([5.0, 8.0, 2.0], abs=2e-3) and ids.tolist() == [-2, -2, -2, -1]


# --- tables and the devkit --------------------------------------------------------------------------------------------

def test_the_tree_is_complete_and_cameras_fire_in_the_real_order(tiny_world, devkit):
    assert sorted(s["name"] for s in devkit.scene) == ["scene-0061", "scene-0103"]
    tables = ("sample", "sensor", "calibrated_sensor", "log", "map", "lidarseg")
    assert [len(getattr(devkit, t)) for t in tables] == [6, 7, 14, 2, 2, 6]
    # per scene: 3 samples x (1 sweep + 6 images + 12 camera sweeps) + 2 LiDAR sweeps
    assert len(devkit.sample_data) == len(devkit.ego_pose) == 2 * (3 * 19 + 2)
    assert sorted(c["index"] for c in devkit.category) == list(range(32))
    assert all(len(row["token"]) == 32 and int(row["token"], 16) for row in devkit.sample_data)
    assert {(row["height"], row["width"]) for row in devkit.sample_data} == {(112, 200), (0, 0)}
    for sample in devkit.sample:
        times = {c: devkit.get("sample_data", sample["data"][c])["timestamp"] - sample["timestamp"] for c in CAMERAS}
        assert sorted(times, key=times.get) == ["CAM_FRONT_LEFT", *CAMERAS[:5]]
        assert -46_000 < min(times.values()) < max(times.values()) < 0


def test_boxes_stand_on_the_ground_and_hidden_ones_are_there(devkit):
    for row in devkit.sample_annotation:
        assert -0.01 < row["translation"][2] - row["size"][2] / 2 < 0.16
    hidden = {a["visibility_token"] for a in devkit.sample_annotation if a["num_lidar_pts"] == 0}
    assert any(a["visibility_token"] == "4" for a in devkit.sample_annotation) and hidden - {"4"}


def test_reader_agrees(tiny_world):
    dataset = NuScenesOccupancy(tiny_world, split="mini_val", cache=tiny_world.parent / "cache")
    frame = dataset[1]
    assert frame.semantics.shape == SHAPE and frame.images.shape == (6, 3, 112, 200) and len(frame.points) > 20_000
    images, _, valid = dataset.neighbour(1, +1)
    assert valid.all() and not np.array_equal(images, frame.images)       # the camera sweeps


# --- labels -----------------------------------------------------------------------------------------------------------

def oracle(origin: np.ndarray, ends: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The definition, slowly: cut every segment at all faces of the grid, ask each piece's middle for its voxel.

    origin (3,), ends (n, 3), float64. -> seen: voxels with a piece longer than 1e-9 of an edge, and the ends' own;
    tied: those with a shorter one only, where the segment touches an edge or a corner, and rounding decides.
    """
    seen, tied = np.zeros(SHAPE, bool), np.zeros(SHAPE, bool)
    a, b = (origin - LOWER) / VOXEL, (ends - LOWER) / VOXEL
    index = np.floor(b).astype(int)
    index = index[((index >= 0) & (index < SHAPE)).all(1)]
    seen[tuple(index.T)] = True
    for start in range(0, len(b), 2000):
        end = b[start:start + 2000]
        along = end - a
        cuts = [np.zeros((len(end), 1)), np.ones((len(end), 1))]
        for axis in range(3):
            with np.errstate(divide="ignore", invalid="ignore"):
                t = (np.arange(SHAPE[axis] + 1) - a[axis]) / along[:, axis:axis + 1]
            cuts.append(np.where((t > 0) & (t < 1), t, 1.0))
        t = np.sort(np.concatenate(cuts, 1), 1)
        length = np.diff(t, axis=1)
        ray, piece = np.nonzero(length > 0)
        middle = a + (0.5 * (t[ray, piece] + t[ray, piece + 1]))[:, None] * along[ray]
        index = np.floor(middle).astype(int)
        inside = ((index >= 0) & (index < SHAPE)).all(1)
        short = length[ray, piece] * np.linalg.norm(along[ray], axis=1) < 1e-9
        tied[tuple(index[inside & short].T)] = True
        seen[tuple(index[inside & ~short].T)] = True
    return seen, tied & ~seen


def test_masks_equal_the_oracle(tiny_world, devkit):
    """Both masks from the files alone: tables, .pcd.bin and exact/depth. Not one voxel differs, ties apart."""
    for sample in (devkit.sample[0], devkit.sample[-1]):
        truth = labels(tiny_world, devkit, sample)
        points, origin = returns(tiny_world, devkit, sample)
        seen, tied = oracle(origin, points)
        assert ((truth["mask_lidar"] > 0) == seen)[~tied].all() and tied.sum() < 20 and seen.sum() > 10_000
        _, T_global_ego, _ = sensor(devkit, sample["data"]["LIDAR_TOP"])
        seen, tied = np.zeros(SHAPE, bool), np.zeros(SHAPE, bool)
        for camera in CAMERAS:
            row, T_global_own, T_own_cam = sensor(devkit, sample["data"][camera])
            K = np.array(devkit.get("calibrated_sensor", row["calibrated_sensor_token"])["camera_intrinsic"])
            depth = read_map(tiny_world, "depth", camera, row["filename"])
            v, u = (g[::2, ::2] + 0.5 for g in np.mgrid[:depth.shape[0], :depth.shape[1]])
            z = np.where(depth == 0, 300 * 256, depth)[::2, ::2] / 256.0
            rays = np.stack([u, v, np.ones_like(u)], -1) @ np.linalg.inv(K).T * z[..., None]
            T = np.linalg.inv(T_global_ego) @ T_global_own @ T_own_cam
            s, t = oracle(T[:3, 3], rays.reshape(-1, 3) @ T[:3, :3].T + T[:3, 3])
            seen, tied = seen | s, tied | t
        different = ((truth["mask_camera"] > 0) != seen) & ~tied
        # the two sides multiply their matrices in different orders: 1e-13 m, so a few grazed voxels may differ
        assert different.sum() <= 2 and tied.sum() < 50 and seen.sum() > 20_000


def test_fast_walk_with_ties():
    """Ends on faces, axis-parallel rays, and from a voxel's middle rays exactly through edges:
    common.geometry's rule."""
    from common.geometry import OCC3D, traversed

    rng = np.random.default_rng(1)
    for origin in (np.array([0.13, 0.07, 1.81]), np.array([0.2, -0.2, 2.0])):
        ends = origin + rng.integers(-60, 60, (400, 3)) * [0.4, 0.4, 0.05]
        ends[:40, 1:] = origin[1:]
        mine = seen_voxels(origin, np.ascontiguousarray(ends.T))
        theirs = traversed(torch.from_numpy(origin), torch.from_numpy(ends), OCC3D).numpy()
        exact, tied = oracle(origin, ends)
        assert (mine == theirs).all() and not ((mine != exact) & ~tied).any()
        assert tied.any()                                              # there is something to decide


def test_returns_lie_in_occupied_voxels(tiny_world, devkit):
    """Tolerance zero: the voxel (by floor) of every return inside the grid is occupied, and seen."""
    for sample in devkit.sample:
        truth = labels(tiny_world, devkit, sample)
        index = np.floor((returns(tiny_world, devkit, sample)[0] - LOWER) / VOXEL).astype(int)
        index = tuple(index[((index >= 0) & (index < SHAPE)).all(1)].T)
        assert len(index[0]) > 10_000
        assert (truth["semantics"][index] < 17).all() and (truth["mask_lidar"][index] == 1).all()


def test_labels_are_like_real_ones(tiny_world, devkit):
    """Surfaces that somebody saw: shares as in a real label file, few interior voxels, nothing where nobody looked."""
    counts, shares = np.zeros((3, 18)), []
    for sample in devkit.sample:
        truth = labels(tiny_world, devkit, sample)
        assert {*truth} == {"semantics", "mask_lidar", "mask_camera"} and truth["semantics"].max() == 17
        assert all(v.shape == SHAPE and v.dtype == np.uint8 for v in truth.values())
        c, s = label_statistics(truth["semantics"], truth["mask_camera"], truth["mask_lidar"])
        counts, shares = counts + c, [*shares, s]
        scene = devkit.get("scene", sample["scene_token"])["name"]
        with np.load(tiny_world / "exact/solid" / scene / f"{sample['token']}.npz") as file:
            solid = file["semantics"]
        occupied = truth["semantics"] < 17
        assert (solid[occupied] == truth["semantics"][occupied]).all() and (solid < 17).sum() > occupied.sum()
    camera, lidar, either, occupied, unseen_free = np.mean(shares, 0)
    assert 0.08 < camera < 0.45 and 0.06 < lidar < 0.3 and 0.015 < occupied < 0.08 and unseen_free > 0.97
    assert all(counts[2, k] <= 0.08 * counts[0, k] for k in range(17))
    order = np.argsort(-counts[0, :17])[:4]
    assert {11, 15} <= set(order)                                      # driveable surface and manmade dominate


def test_exact_maps(tiny_world, devkit):
    """Sky has neither depth nor class; an instance's pixels have its category's class."""
    category = {c["token"]: c for c in devkit.category}
    kinds = LIDARSEG_TO_OCC3D[[category[i["category_token"]]["index"] for i in devkit.instance]]
    seen = set()
    for camera in CAMERAS:
        for row in devkit.sample_data:
            if row["channel"] == camera and row["is_key_frame"]:
                depth, semantic, instance = (
                    read_map(tiny_world, kind, camera, row["filename"]) for kind in ("depth", "semantic", "instance"))
                assert depth.dtype == instance.dtype == np.uint16 and semantic.dtype == np.uint8
                assert ((semantic == 17) == (depth == 0)).all()
                assert semantic.max() <= 17 and instance.max() <= len(kinds)
                there = instance > 0
                assert (semantic[there] == kinds[instance[there] - 1]).all()
                seen |= set(np.unique(instance[there]) - 1)
    assert len(seen) > 15


# --- bytes, errors ----------------------------------------------------------------------------------------------------

def fingerprint(root: Path) -> dict[str, str]:
    files = sorted(p for p in root.rglob("*") if p.is_file())
    return {str(p.relative_to(root)): hashlib.md5(p.read_bytes()).hexdigest() for p in files}


def test_same_seed_same_bytes_also_after_an_interruption(tiny_world, tmp_path, monkeypatch):
    """One process that breaks off in the second scene and is started again, against the fixture's parallel ones."""
    before = {p: p.stat().st_mtime_ns for p in tiny_world.rglob("*")}
    settings = dict(seed=0, size="mini", scenes=2, keyframes=3, sweeps=1, camera_sweeps=2, image=(112, 200))
    make_world(tiny_world, **settings)                                 # finished: nothing is touched
    assert {p: p.stat().st_mtime_ns for p in tiny_world.rglob("*")} == before
    out, record = tmp_path / "again", world.record_scene

    def breaks(root, settings, index, tick):
        if index == 1:
            raise KeyboardInterrupt
        record(root, settings, index, tick)

    monkeypatch.setattr(world, "record_scene", breaks)
    with pytest.raises(KeyboardInterrupt):
        make_world(out, **settings, workers=1)
    assert not (out / "exact/world.json").exists()
    monkeypatch.setattr(world, "record_scene", record)
    with pytest.raises(InputError, match="another seed"):
        make_world(out, **{**settings, "seed": 1}, workers=1)
    make_world(out, **settings, workers=1)
    first, second = fingerprint(tiny_world), fingerprint(out)
    assert first == second


def test_decoys_share_a_word_with_a_held_out_kind_and_leave_the_default_world_alone():
    from data.captions import shape_words, size_words
    from data.driving import objects
    from data.driving.building import describe_world
    from data.driving.city import City
    from data.driving.world import Settings

    words = [set(size_words(m.size) + shape_words(m)) for m in
             (make(np.random.default_rng(3)) for make in objects.DECOYS)]
    assert "with an arm" in words[0] and {"large", "without windows"} <= words[1]
    assert {"small", "pointed"} <= words[2]
    for make in objects.DECOYS:  # the parts' centres are in the box, but for the cherry picker's basket
        model = make(np.random.default_rng(4))
        place = np.abs(model.parts.center)
        assert (place[:, :2] <= np.array(model.size[:2]) / 2 + 0.6).all() and (place[:, 2] <= model.size[2]).all()
    plain, more = (City([0, 5], 1.0, False, 1, decoys=on) for on in (False, True))
    found = [sum(np.allclose(a.model.size[2], 3.6) and a.model.semantic == objects.TRUCK for a in city.actors)
             for city in (plain, more)]
    assert found[1] > found[0] and len(more.actors) > len(plain.actors)
    settings = Settings(0, "demo", "v1.0-trainval", ["scene-0001"], 2, 2, 0, (224, 400))
    assert "decoys" not in describe_world(settings) and describe_world(settings._replace(decoys=True))["decoys"]


def test_scene_names_are_the_devkits():
    from nuscenes.utils.splits import create_splits_scenes

    splits = create_splits_scenes()
    assert set(world.scene_names("mini", None)) == {*splits["mini_train"], *splits["mini_val"]}
    for n in range(1, 11):
        assert len(set(world.scene_names("mini", n))) == n and set(world.scene_names("mini", n)) & set(splits["mini_val"])
    for size, (training, validation) in (("demo", (61, 13)), ("claims", (24, 10))):
        names = set(world.scene_names(size, None))
        counts = len(names & set(splits["train"])), len(names & set(splits["val"])), len(names)
        assert counts == (training, validation, training + validation)


@pytest.mark.parametrize("flags, words", [
    (["--scenes", "0"], "--scenes 0"), (["--scenes", "11"], "--scenes 11"), (["--keyframes", "0"], "--keyframes 0"),
    (["--image", "400"], "--image 400"), (["--image", "4x4"], "--image"),
    (["--camera-sweeps", "1"], "--camera-sweeps 1"),
    (["--sweeps", "-1"], "--sweeps -1"), (["--seed", "-1"], "--seed -1"), (["--workers", "0"], "--workers 0")])
def test_bad_flags_are_one_line_and_exit_2(flags, words, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--out", str(tmp_path / "w"), *flags])
    message = capsys.readouterr().err
    assert stop.value.code == 2 and words in message and message.count("\n") == 1 and not (tmp_path / "w").exists()


def test_command_line(tiny_world, tmp_path):
    """A folder with other data is refused and left alone; an unknown size is argparse's error."""
    (tmp_path / "thesis.txt").write_text("do not lose me")
    command = [sys.executable, "-m", "data.driving", "--out", str(tmp_path)]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 2 and "not empty" in run.stderr and run.stderr.count("\n") == 1
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.txt"]
    with pytest.raises(SystemExit) as stop:
        main(["--out", str(tmp_path / "w"), "--size", "huge"])
    assert stop.value.code == 2
    with pytest.raises(InputError, match="another"):
        make_world(tiny_world, seed=5, size="mini", scenes=2, keyframes=3)
