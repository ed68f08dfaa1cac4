"""common/nuscenes.py against the unmodified devkit on a tiny tree made here, and against real frames where they are."""

import json
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from pyquaternion import Quaternion

from common import files, nuscenes
from common.files import InputError
from common.nuscenes import CAMERAS, CHANNELS, NuScenesOccupancy, open_split, rigid_inverse, stack

ROOT = Path(__file__).parents[1]
SHARED = ROOT.parent / "shared"
needs_real = pytest.mark.skipif(not (SHARED / "real/nuscenes").is_dir(), reason="shared/real/nuscenes is absent")
POSES = SHARED / "real/nuscenes-poses"
needs_poses = pytest.mark.skipif(not POSES.is_dir(), reason="shared/real/nuscenes-poses absent")
WIDTH, HEIGHT, KEYFRAMES, POINTS = 64, 36, 5, 50


def make_tree(root: Path) -> Path:
    """Two scenes (one mini_train, one mini_val) of 5 keyframes with one sweep between, a radar, 4 objects each, all
    optional parts; random poses; table rows shuffled where their order carries no meaning."""
    rng = np.random.default_rng(0)
    tables: dict[str, list] = {name: [] for name in nuscenes.TABLES + ("lidarseg",)}
    count = iter(range(10**6))

    def token() -> str:
        return f"{next(count):032x}"

    def add(table: str, **record) -> str:
        tables[table].append({"token": record.pop("token", None) or token(), **record})
        return tables[table][-1]["token"]

    def rotation() -> list[float]:
        yaw = Quaternion(axis=[0, 0, 1], angle=rng.uniform(-3, 3))
        return (yaw * Quaternion(axis=[1, 0, 0], angle=rng.normal(0, 0.02))).elements.tolist()

    categories = [add("category", name=name, description="", index=k) for k, name in enumerate(nuscenes.LIDARSEG_CLASSES)]
    moving = add("attribute", name="vehicle.moving", description="")
    for level in "1234":
        add("visibility", token=level, level="", description="")
    modalities = ["camera"] * 6 + ["lidar", "radar"]
    channels = [*CHANNELS, "RADAR_FRONT"]
    sensors = {name: add("sensor", channel=name, modality=kind) for name, kind in zip(channels, modalities)}
    log = add("log", logfile="x", vehicle="x", date_captured="2018-01-01", location="boston-seaport")
    add("map", category="semantic_prior", filename="maps/m.png", log_tokens=[log])
    (root / "maps").mkdir(parents=True)
    Image.new("L", (4, 4)).save(root / "maps/m.png")
    questions = []
    start_time = 10**15
    for name in ("scene-0103", "scene-0061"):  # the order of scene.json is not the order of names
        scene = token()
        samples = [token() for _ in range(KEYFRAMES)]
        first = start_time = start_time - 10**9  # nor is it the order of time
        for k, sample in enumerate(samples):
            before, after = samples[k - 1] if k else "", samples[k + 1] if k + 1 < KEYFRAMES else ""
            add("sample", token=sample, timestamp=first + k * 500_000, prev=before, next=after, scene_token=scene)
        add("scene", token=scene, log_token=log, nbr_samples=KEYFRAMES, first_sample_token=samples[0],
            last_sample_token=samples[-1], name=name, description="synthetic")  # fmt: skip
        start = rng.normal(1000, 50, 3)
        for channel in list(sensors):
            camera = channel in CAMERAS
            intrinsic = [[50.0, 0, WIDTH / 2], [0, 50.0, HEIGHT / 2], [0, 0, 1]] if camera else []
            sensor = add("calibrated_sensor", sensor_token=sensors[channel], translation=rng.normal(0, 1, 3).tolist(),
                         rotation=rng.normal(0, 1, 4).tolist(), camera_intrinsic=intrinsic)  # fmt: skip
            tokens = [token() for _ in range(2 * KEYFRAMES - 1)]
            for k, data in enumerate(tokens):
                time_ = first + k * 250_000 + int(rng.integers(0, 40_000)) * (channel != "LIDAR_TOP")
                position = start + np.array([3.0, 1.0, 0.0]) * (time_ - first) * 1e-6
                add("ego_pose", token=data, timestamp=time_, rotation=rotation(), translation=position.tolist())
                kind, suffix = ("samples", "sweeps")[k % 2], ".jpg" if camera else ".pcd.bin"
                file = f"{kind}/{channel}/{name}__{channel}__{time_}{suffix}"
                before, after = tokens[k - 1] if k else "", tokens[k + 1] if k + 1 < len(tokens) else ""
                add("sample_data", token=data, sample_token=samples[(k + 1) // 2], ego_pose_token=data,
                    calibrated_sensor_token=sensor, timestamp=time_, fileformat=suffix[1:], is_key_frame=k % 2 == 0,
                    height=HEIGHT if camera else 0, width=WIDTH if camera else 0, filename=file, prev=before,
                    next=after)  # fmt: skip
                (root / file).parent.mkdir(parents=True, exist_ok=True)
                if camera:
                    Image.fromarray(rng.integers(0, 255, (HEIGHT, WIDTH, 3), np.uint8)).save(root / file)
                elif channel == "LIDAR_TOP":
                    cloud = np.concatenate([rng.normal(0, 20, (POINTS, 3)), rng.uniform(0, 32, (POINTS, 2))], 1)
                    cloud[:, 4] = np.floor(cloud[:, 4])  # the ring
                    cloud.astype(np.float32).tofile(root / file)
                    if k % 2 == 0:
                        label = f"lidarseg/v1.0-mini/{data}_lidarseg.bin"
                        (root / label).parent.mkdir(parents=True, exist_ok=True)
                        rng.integers(0, 32, POINTS).astype(np.uint8).tofile(root / label)
                        add("lidarseg", token=data, sample_data_token=data, filename=label)
        for lifetime in (range(0, 5), range(1, 3), range(4, 5), range(2, 5)):
            category = int(rng.choice([2, 9, 11, 17, 23]))
            chain = [token() for _ in lifetime]
            instance = add("instance", category_token=categories[category], nbr_annotations=len(chain),
                           first_annotation_token=chain[0], last_annotation_token=chain[-1])  # fmt: skip
            place, speed = start + rng.normal(0, 20, 3), rng.normal(0, 3, 3)
            for k, (step, annotation) in enumerate(zip(lifetime, chain)):
                before, after = chain[k - 1] if k else "", chain[k + 1] if k + 1 < len(chain) else ""
                add("sample_annotation", token=annotation, sample_token=samples[step], instance_token=instance,
                    visibility_token="3", attribute_tokens=[moving] if category == 17 else [],
                    translation=(place + speed * step * 0.5).tolist(), size=rng.uniform(0.5, 5, 3).tolist(),
                    rotation=rotation(), prev=before, next=after, num_lidar_pts=k, num_radar_pts=0)  # fmt: skip
        for sample in samples:
            folder = root / "gts" / name / sample
            folder.mkdir(parents=True)
            grid = np.full((200, 200, 16), 17, np.uint8)
            grid[100, 100, :3] = 11
            masks = {"mask_camera": (grid < 17).astype(np.uint8), "mask_lidar": np.zeros_like(grid)}
            np.savez_compressed(folder / "labels.npz", semantics=grid, **masks)
        for sample in samples[1:]:
            questions += [{"sample_token": sample, "question": f"Is it {k}?", "answer": "yes", "template_type": "exist",
                           "num_hop": k} for k in range(2)]  # fmt: skip
    for name in ("sample", "sample_data", "sample_annotation", "ego_pose"):
        rng.shuffle(tables[name])
    (root / "v1.0-mini").mkdir()
    for name, rows in tables.items():
        (root / f"v1.0-mini/{name}.json").write_text(json.dumps(rows))
    (root / "questions").mkdir()
    rng.shuffle(questions)
    for split, rows in (("train", questions[::2]), ("val", questions[1::2])):
        content = {"info": {}, "split": split, "questions": rows}
        (root / f"questions/NuScenes_{split}_questions.json").write_text(json.dumps(content))
    return root


@pytest.fixture(scope="session")
def tree(tmp_path_factory):
    return make_tree(tmp_path_factory.mktemp("nuscenes") / "tree")


@pytest.fixture(scope="session")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="session")
def devkit(tree):
    from nuscenes.nuscenes import NuScenes

    return NuScenes("v1.0-mini", str(tree), verbose=False)


@pytest.fixture
def dataset(tree, cache):
    return NuScenesOccupancy(tree, split="all", cache=cache)


@pytest.fixture
def copy(tree, tmp_path):
    """A copy of the tree that a test may break."""
    return Path(shutil.copytree(tree, tmp_path / "copy"))


def matrix(record: dict) -> np.ndarray:
    """A record with translation and rotation -> (4, 4), by pyquaternion."""
    T = Quaternion(record["rotation"]).transformation_matrix
    T[:3, 3] = record["translation"]
    return T


# --- frames equal what the devkit's tables say -----------------------------------------------------------------------


def test_frame_shapes_types_and_stack(dataset):
    frame = dataset[1]
    assert frame.images.shape == (6, 3, HEIGHT, WIDTH) and frame.images.dtype == torch.float32
    assert 0 <= frame.images.min() and 0.9 < frame.images.max() <= 1
    assert frame.K.dtype == frame.T_ego_cam.dtype == frame.points.dtype == torch.float32
    assert frame.T_global_ego.dtype == torch.float64 and frame.points.shape == (POINTS, 5)
    assert frame.semantics.shape == (200, 200, 16) and frame.semantics[100, 100, 0] == 11
    assert frame.mask_camera.dtype == torch.bool and frame.mask_camera.sum() == 3 and not frame.mask_lidar.any()
    batch = stack([dataset[1], dataset[2]])
    assert batch["images"].shape == (2, 6, 3, HEIGHT, WIDTH) and batch["semantics"].shape == (2, 200, 200, 16)
    assert [cloud.shape for cloud in batch["points"]] == [(POINTS, 5)] * 2 and batch["token"] == dataset.tokens[1:3]
    bare = stack([frame._replace(semantics=None), frame])
    assert "semantics" not in bare and "mask_lidar" in bare


def test_order_and_splits(tree, cache, devkit):
    every = NuScenesOccupancy(tree, split="all", cache=cache)
    train, val = (NuScenesOccupancy(tree, split=split, cache=cache) for split in (None, "mini_val"))
    assert train.split == "mini_train" and set(train.scene_names) == {"scene-0061"}
    assert every.tokens == val.tokens + train.tokens and len(every) == 2 * KEYFRAMES
    for data in (train, val):
        scene = next(scene for scene in devkit.scene if scene["name"] == data.scene_names[0])
        walked, token = [], scene["first_sample_token"]
        while token:
            walked.append(token)
            token = devkit.get("sample", token)["next"]
        assert data.tokens == walked
    assert [every.index(token) for token in every.tokens] == list(range(len(every)))
    assert every.past(3, 13) == [2, 1, 0] and every.past(KEYFRAMES, 3) == [] and every.past(KEYFRAMES + 4, 2) == [8, 7]
    assert train[-1].token == train.tokens[-1]
    with pytest.raises(IndexError):
        train[KEYFRAMES]


def test_a_method_opens_the_split_it_names_or_the_versions_own(tree, cache):
    opened = [open_split(tree, None, None, (18, 32), cache, train).split for train in (True, False)]
    assert opened == ["mini_train", "mini_val"]
    named = open_split(tree, "v1.0-mini", "mini_train", (18, 32), cache, train=False)
    assert named.split == "mini_train" and named[0].images.shape[-2:] == (18, 32) and named[0].points is None


def test_custom_split_of_the_devkit(copy, tmp_path):
    (copy / "v1.0-mini/splits.json").write_text(json.dumps({"mine": ["scene-0103"]}))
    assert set(NuScenesOccupancy(copy, split="mine", cache=tmp_path / "c").scene_names) == {"scene-0103"}
    (copy / "v1.0-mini/splits.json").write_text('["scene-0103"]')
    with pytest.raises(InputError, match="splits.json: the value is a list, expected an object"):
        NuScenesOccupancy(copy, split="mine", cache=tmp_path / "c")


def test_cameras_go_through_global_at_both_timestamps(dataset, devkit):
    for i in (0, 3, 9):
        sample = devkit.get("sample", dataset.tokens[i])
        lidar = devkit.get("sample_data", sample["data"]["LIDAR_TOP"])
        T_global_ego = matrix(devkit.get("ego_pose", lidar["ego_pose_token"]))
        K, T_ego_cam, reference = dataset.calibration(i)
        np.testing.assert_allclose(reference, T_global_ego, atol=1e-9)
        for n, camera in enumerate(CAMERAS):
            data = devkit.get("sample_data", sample["data"][camera])
            sensor = devkit.get("calibrated_sensor", data["calibrated_sensor_token"])
            own = matrix(devkit.get("ego_pose", data["ego_pose_token"]))
            expected = np.linalg.inv(T_global_ego) @ own @ matrix(sensor)
            np.testing.assert_allclose(T_ego_cam[n], expected, atol=2e-6)
            assert np.abs(expected - matrix(sensor)).max() > 1e-3  # the static chain is another matrix here
            np.testing.assert_array_equal(K[n], np.array(sensor["camera_intrinsic"], np.float32))
            assert dataset.camera_files(i)[n] == data["filename"]


def test_points_and_sweeps_equal_the_devkits(dataset, devkit):
    from nuscenes.utils.data_classes import LidarPointCloud

    i = 2
    for sweeps in (0, 3):
        sample = devkit.get("sample", dataset.tokens[i])
        arguments = (devkit, sample, "LIDAR_TOP", "LIDAR_TOP", sweeps + 1, 0.0)
        theirs = LidarPointCloud.from_file_multisweep(*arguments)[0].points
        T = dataset.T_ego_lidar(i)
        expected = theirs[:3].T @ T[:3, :3].T + T[:3, 3]
        ours = dataset.points(i, sweeps)
        assert ours.shape == ((sweeps + 1) * POINTS, 5)
        np.testing.assert_allclose(ours[:, :3], expected, atol=1e-3)  # the devkit keeps float32 between two products
        np.testing.assert_array_equal(ours[:, 3], theirs[3])
    assert len(dataset.points(0, 3)) == POINTS  # a scene's first keyframe has no past


def test_boxes_equal_the_devkits(dataset, devkit):
    for i in range(len(dataset)):
        sample = devkit.get("sample", dataset.tokens[i])
        boxes, T = dataset.boxes(i), np.linalg.inv(dataset.calibration(i)[2])
        assert boxes.tokens == sample["anns"] and len(boxes.tokens) >= 1
        for k, annotation_token in enumerate(sample["anns"]):
            box, record = devkit.get_box(annotation_token), devkit.get("sample_annotation", annotation_token)
            np.testing.assert_allclose(boxes.center[k], T[:3, :3] @ box.center + T[:3, 3], atol=1e-6)
            np.testing.assert_allclose(boxes.T_ego_box[k, :3, :3], T[:3, :3] @ box.rotation_matrix, atol=1e-9)
            forward = T[:3, :3] @ box.rotation_matrix[:, 0]
            assert boxes.yaw[k] == pytest.approx(np.arctan2(forward[1], forward[0]))
            np.testing.assert_allclose(boxes.size[k], box.wlh)
            velocity = devkit.box_velocity(annotation_token) * (1, 1, 0)
            np.testing.assert_allclose(boxes.velocity[k], (T[:3, :3] @ velocity)[:2], atol=1e-9)
            assert boxes.names[k] == box.name and boxes.num_lidar_pts[k] == record["num_lidar_pts"]
            assert boxes.attributes[k] == ("vehicle.moving" if box.name == "vehicle.car" else "")
            assert boxes.visibility[k] == 3
            assert devkit.instance[boxes.instance[k]]["token"] == record["instance_token"]
    assert np.isnan(dataset._table["box_velocity"]).any(1).sum() == 2  # the object seen once, in each scene


def test_detection_classes_are_occ3d_ids():
    from nuscenes.eval.detection.constants import DETECTION_NAMES

    assert set(nuscenes.DETECTION_CLASSES) == set(DETECTION_NAMES)
    assert nuscenes.OCC3D_CLASSES[nuscenes.detection_class("vehicle.bus.bendy")] == "bus"
    assert nuscenes.detection_class("human.pedestrian.stroller") == 0
    assert len(nuscenes.OCC3D_CLASSES) == 18 and nuscenes.OCC3D_CLASSES[nuscenes.FREE] == "free"


def test_lidarseg_is_the_official_merge(dataset, devkit, tree):
    from nuscenes.eval.lidarseg.utils import LidarsegClassMapper

    mapper = LidarsegClassMapper(devkit)
    for raw, coarse in mapper.fine_idx_2_coarse_idx_mapping.items():
        assert nuscenes.LIDARSEG_TO_OCC3D[raw] == coarse
    for name, k in mapper.coarse_name_2_coarse_idx_mapping.items():
        assert k == 0 or nuscenes.OCC3D_CLASSES[k] == name
    lidar = devkit.get("sample", dataset.tokens[3])["data"]["LIDAR_TOP"]
    raw = np.fromfile(tree / devkit.get("lidarseg", lidar)["filename"], np.uint8)
    np.testing.assert_array_equal(dataset.lidarseg(3, raw=True), raw)
    np.testing.assert_array_equal(dataset.lidarseg(3), mapper.convert_label(raw))


def test_neighbours_are_sweeps_or_else_keyframes(dataset, devkit, copy, tmp_path):
    def expected(i, camera, hops):
        data = devkit.get("sample_data", devkit.get("sample", dataset.tokens[i])["data"][camera])
        for _ in range(abs(hops)):
            data = devkit.get("sample_data", data["next" if hops > 0 else "prev"])
        own = matrix(devkit.get("ego_pose", data["ego_pose_token"]))
        T = np.linalg.inv(dataset.calibration(i)[2]) @ own
        return data["filename"], T @ matrix(devkit.get("calibrated_sensor", data["calibrated_sensor_token"]))

    shutil.rmtree(copy / "sweeps")
    for data, hops in ((dataset, 1), (NuScenesOccupancy(copy, split="all", cache=tmp_path / "c"), 2)):
        assert data.camera_sweeps == (hops == 1)
        for step in (1, -1):
            images, T, valid = data.neighbour(2, step)
            assert valid.all()
            for n, camera in enumerate(CAMERAS):
                file, matrix_ = expected(2, camera, step * hops)
                np.testing.assert_allclose(T[n], matrix_, atol=2e-6)
                pixels = np.asarray(Image.open(data.root / file)).transpose(2, 0, 1) / 255
                np.testing.assert_allclose(images[n], pixels, atol=1e-6)
        images, T, valid = data.neighbour(0, -1)
        assert not valid.any() and not images.any()
        np.testing.assert_array_equal(T, data.calibration(0)[1])
        assert not data.neighbour(KEYFRAMES - 1, 1)[2].any() and data.neighbour(KEYFRAMES, 1)[2].all()


def test_ray_origins_follow_sparseoccs_rule(dataset):
    """Written again from the rule: through the reference LiDAR frame, one keyframe at a time."""
    for i in (0, 7):
        first = i // KEYFRAMES * KEYFRAMES
        T_ref_global = np.linalg.inv(dataset.calibration(i)[2])
        scene = range(first, first + KEYFRAMES)
        expected = [T_ref_global @ dataset.calibration(k)[2] @ dataset.T_ego_lidar(k)[:, 3] for k in scene]
        np.testing.assert_allclose(dataset.ray_origins(i), np.array(expected)[:, :3], atol=1e-4)
    np.testing.assert_allclose(dataset.ray_origins(2)[2], dataset.T_ego_lidar(2)[:3, 3], atol=1e-5)


@needs_poses
def test_ray_origins_are_limited_to_eight_inside_39_m(cache):
    data = NuScenesOccupancy(POSES, split="mini_val", cache=cache, parts=())
    T_ref_global = np.linalg.inv(data.calibration(20)[2])
    every = np.array([(T_ref_global @ data.calibration(k)[2] @ data.T_ego_lidar(k))[:3, 3] for k in range(len(data))])
    near = every[(abs(every[:, 0]) < 39) & (abs(every[:, 1]) < 39)]
    assert 8 < len(near) < len(every)
    chosen = near[[round(k * (len(near) - 1) / 7) for k in range(8)]]
    np.testing.assert_allclose(data.ray_origins(20), chosen, atol=1e-4)


def test_future_turns_and_ends(dataset, devkit):
    """Positions by hand: the LiDAR origin of later keyframes in this keyframe's LiDAR frame."""
    i = 1
    T_lidar_global = np.linalg.inv(dataset.calibration(i)[2] @ dataset.T_ego_lidar(i))
    place = [(T_lidar_global @ dataset.calibration(k)[2] @ dataset.T_ego_lidar(k))[:2, 3] for k in range(KEYFRAMES)]
    future = dataset.future(i)
    np.testing.assert_array_equal(future.mask, [True] * 3 + [False] * 3)
    np.testing.assert_allclose(future.trajectory, [*place[2:], place[4], place[4], place[4]], atol=1e-4)
    np.testing.assert_array_equal(future.history_mask, [False, False, False, True])
    np.testing.assert_allclose(future.history, np.outer([4, 3, 2, 1], place[0]), atol=1e-4)
    assert future.speed == pytest.approx(np.linalg.norm(place[0]) / 0.5, rel=1e-4)
    boxes = dataset.boxes(i)
    for k, token in enumerate(boxes.tokens):
        record, steps = devkit.get("sample_annotation", token), 0
        start = np.array(record["translation"])
        while record["next"]:
            record = devkit.get("sample_annotation", record["next"])
            moved = T_lidar_global[:3, :3] @ (np.array(record["translation"]) - start)
            np.testing.assert_allclose(future.agents[k, steps], moved[:2], atol=1e-5)
            steps += 1
        assert future.agents_mask[k].tolist() == [True] * steps + [False] * (6 - steps)


def test_questions_by_keyframe(dataset, copy, tmp_path):
    assert dataset.questions(0) == []
    rows = dataset.questions(3)
    assert sorted(row["num_hop"] for row in rows) == [0, 1] and rows[0]["sample_token"] == dataset.tokens[3]
    (copy / "NuScenes-QA").mkdir()
    os.rename(copy / "questions", copy / "NuScenes-QA/questions")  # as a clone beside the data keeps them
    data = NuScenesOccupancy(copy, split="all", cache=tmp_path / "c")
    assert sorted(row["num_hop"] for row in data.questions(3)) == [0, 1]
    shutil.rmtree(copy / "NuScenes-QA")
    assert NuScenesOccupancy(copy, split="all", cache=tmp_path / "c")[0].questions is None


# --- images ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(122, 226), (61, 113), (50, 80), (30, 56), (15, 28), (130, 240)])
def test_resizing_keeps_the_outer_corner_at_zero(tmp_path, size):
    """On a linear ramp, output pixel (v, u) holds the ramp at ((u + 0.5) W / w, (v + 0.5) H / h): no half-pixel shift,
    whatever scale the JPEG was decoded at."""
    H, W = 122, 226
    u, v = np.meshgrid(np.arange(W) + 0.5, np.arange(H) + 0.5)
    ramp = np.stack([u, 2 * v, 0 * u + 128], -1)
    Image.fromarray(ramp.round().astype(np.uint8)).save(tmp_path / "ramp.jpg", quality=100, subsampling=0)
    pixels = nuscenes.read_resized(tmp_path / "ramp.jpg", (H, W), size).astype(float)
    h, w = size
    assert pixels.shape == (h, w, 3)
    edge = slice(1, -1)  # at the border the filter has one side only
    expected = ((np.arange(w) + 0.5) * W / w)[edge]
    assert np.abs(pixels[edge, edge, 0].mean(0) - expected).max() < 1.0
    assert np.abs((pixels[edge, edge, 0].mean(0) - expected).mean()) < 0.6  # JPEG's own rounding is 0.5
    expected = ((np.arange(h) + 0.5) * H / h)[edge]
    assert np.abs((pixels[edge, edge, 1].mean(1) / 2 - expected).mean()) < 0.6


def test_image_size_scales_intrinsics(tree, cache):
    native = NuScenesOccupancy(tree, split="all", cache=cache)
    small = NuScenesOccupancy(tree, split="all", cache=cache, image_size=(18, 16))
    K, _, _ = native.calibration(0)
    np.testing.assert_allclose(small.calibration(0)[0], K * np.array([0.25, 0.5, 1])[:, None])
    assert small[0].images.shape == (6, 3, 18, 16) and small.image_shape == (HEIGHT, WIDTH)
    assert small.neighbour(1)[0].shape == (6, 3, 18, 16)


def test_parts_read_only_what_is_asked(tree, cache, copy, tmp_path):
    shutil.rmtree(copy / "samples")
    frame = NuScenesOccupancy(copy, split="all", cache=tmp_path / "c", parts=("boxes",))[0]
    assert frame.images is None and frame.points is None and frame.future is None and len(frame.boxes.tokens)
    with pytest.raises(InputError, match="parts: unknown video"):
        NuScenesOccupancy(tree, cache=cache, parts=("video",))


# --- layouts ---------------------------------------------------------------------------------------------------------


def test_accepted_layouts(copy, tmp_path):
    cache = tmp_path / "c"
    for alias in ("occ3d", "occ3d/gts"):
        here = next(folder for folder in ("gts", "occ3d") if (copy / folder).is_dir())
        os.rename(copy / here, tmp_path / "moved")
        (copy / alias).parent.mkdir(exist_ok=True)
        os.rename(tmp_path / "moved", copy / alias)
        assert NuScenesOccupancy(copy, split="all", cache=cache)[0].semantics is not None
    nested = tmp_path / "outer"
    nested.mkdir()
    os.rename(copy / "occ3d/gts", nested / "gts")
    os.rename(copy, nested / "nuscenes")
    data = NuScenesOccupancy(nested, split="all", cache=cache)
    assert data.root == nested / "nuscenes" and data[0].semantics is not None
    shutil.rmtree(nested / "gts")
    assert NuScenesOccupancy(nested, split="all", cache=cache)[0].semantics is None


# --- the cache -------------------------------------------------------------------------------------------------------


def test_second_open_touches_neither_json_nor_devkit(copy, tmp_path, monkeypatch):
    before = sorted((str(path), path.stat().st_mtime_ns) for path in copy.rglob("*"))
    tokens = NuScenesOccupancy(copy, split="all", cache=tmp_path / "c").tokens
    assert sorted((str(path), path.stat().st_mtime_ns) for path in copy.rglob("*")) == before  # nothing written there
    code = f"""
import sys
from common import nuscenes
def fail(*_): raise AssertionError("tables were parsed again")
nuscenes.build_tables = nuscenes._Table = fail
data = nuscenes.NuScenesOccupancy({str(copy)!r}, split="all", cache={str(tmp_path / "c")!r})
frame = data[0]
assert "nuscenes" not in sys.modules, "an open cache does not need the devkit"
print(" ".join(data.tokens))
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == tokens


def test_cache_follows_the_tables(copy, tmp_path):
    cache = tmp_path / "c"
    first = NuScenesOccupancy(copy, split="all", cache=cache)
    change_table(copy, "sample_annotation", lambda row, k: row.update(num_lidar_pts=77))
    second = NuScenesOccupancy(copy, split="all", cache=cache)
    assert (second.boxes(0).num_lidar_pts == 77).all() and (first.boxes(0).num_lidar_pts != 77).all()
    assert len(list(cache.glob("nuscenes-*"))) == 2 and not list(cache.glob(".nuscenes-*"))  # no temporary folder stays


def test_cache_that_another_process_wrote_first_is_kept(tmp_path):
    folder = tmp_path / "c" / "x"
    nuscenes.write_cache(folder, {"a": np.arange(3)}, {"who": "first"})
    nuscenes.write_cache(folder, {"a": np.arange(4)}, {"who": "second"})
    (tmp_path / "c" / ".x.tmp-abcdefgh").mkdir()  # a third was killed
    files._SWEPT.clear()
    arrays, meta = nuscenes.read_cache(folder)
    assert meta["who"] == "first" and len(arrays["a"]) == 3 and isinstance(arrays["a"], np.memmap)
    assert [path.name for path in folder.parent.iterdir()] == ["x"]


def test_damaged_or_unwritable_cache_is_one_line(tree, tmp_path):
    cache = tmp_path / "c"
    NuScenesOccupancy(tree, cache=cache)
    array = next(cache.glob("*/data_pose.npy"))
    array.write_bytes(array.read_bytes()[:200])
    with pytest.raises(InputError, match="cache is damaged.*delete this folder"):
        NuScenesOccupancy(tree, cache=cache)
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot write the cache.*--cache"):
        NuScenesOccupancy(tree, cache=tmp_path / "file" / "c")


def test_spawned_workers_reopen_instead_of_copying(dataset):
    blob = pickle.dumps(dataset)  # what a spawned data-loader worker receives
    assert len(blob) < 2000
    assert pickle.loads(blob).tokens == dataset.tokens


# --- bad input: one line that names the file, the value and the remedy ----------------------------------------------


def _open_all(root: Path, cache: Path, **arguments):
    return NuScenesOccupancy(root, cache=cache, **({"split": "all"} | arguments))


@pytest.mark.parametrize("name", nuscenes.TABLES)
def test_missing_and_truncated_tables(copy, tmp_path, name):
    path = copy / f"v1.0-mini/{name}.json"
    whole = path.read_bytes()
    for broken in (whole[: len(whole) // 2], b"", b'{"not": "a list"}'):
        path.write_bytes(broken)
        with pytest.raises(InputError, match=f"/{name}.json: not"):
            _open_all(copy, tmp_path / "c")
    path.unlink()
    with pytest.raises(InputError, match=f"/{name}.json: table not found"):
        _open_all(copy, tmp_path / "c")
    assert not (tmp_path / "c").exists() or not list((tmp_path / "c").iterdir())  # no half-made cache


def change_table(root: Path, table: str, change) -> None:
    """change(row, k) on the rows of a table, in place."""
    path = root / f"v1.0-mini/{table}.json"
    rows = json.loads(path.read_text())
    for k, row in enumerate(rows):
        change(row, k)
    path.write_text(json.dumps(rows))


NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize("table, record, says", [
    ("scene", {"name": "../../x"}, "scene.json: name '../../x' is no name of a single folder"),
    ("scene", {"name": "/x"}, "no name of a single folder"), ("scene", {"name": "a\\b"}, "no name of a single folder"),
    ("scene", {"name": ".."}, "no name of a single folder"), ("scene", {"name": ""}, "no name of a single folder"),
    ("scene", {"name": ".a.tmp-abcdefgh"}, "no name of a single folder"),  # one that a sweep would take for a leftover
    ("sample_data", {"filename": ""}, "names no file"), ("lidarseg", {"filename": "./"}, "names no file"),
    ("scene", {"name": "a\nb"}, "no name of a single folder"), ("scene", {"name": "a\0b"}, "no name of a single folder"),
    ("scene", {"name": "x" * 300}, "no name of a single folder"), ("scene", {"name": 7}, "is a whole number, expected a"),
    ("scene", {"name": "scene-0061"}, "two records have the same name"),
    ("sample", {"token": "../x"}, "sample.json: token '../x' is no name"), ("sample", {"token": 3}, "not a string"),
    ("sample_data", {"filename": "../x.jpg"}, "sample_data.json: filename '../x.jpg' leaves the dataset's folder"),
    ("sample_data", {"filename": "samples/../../x"}, "leaves the dataset's folder"),
    ("sample_data", {"filename": "/etc/passwd"}, "leaves the dataset's folder"),
    ("lidarseg", {"filename": "/etc/passwd"}, "lidarseg.json: filename '/etc/passwd' leaves the dataset's folder"),
    ("ego_pose", {"rotation": [0, 0, 0, 0]}, "has a rotation that is no quaternion"),
    ("ego_pose", {"rotation": [NAN, 0, 0, 1]}, "has a rotation that is no quaternion"),
    ("ego_pose", {"translation": [INF, 0, 0]}, "has a translation that is not finite"),
    ("ego_pose", {"translation": [1e300, 0, 0]}, "has a translation that is not finite"),
    ("calibrated_sensor", {"translation": [0, NAN, 0]}, "has a translation that is not finite"),
    ("calibrated_sensor", {"camera_intrinsic": []}, "is a camera's without a camera_intrinsic"),
    ("calibrated_sensor", {"camera_intrinsic": [[0, 0, 32], [0, 50, 18], [0, 0, 1]]}, "without a camera_intrinsic"),
    ("calibrated_sensor", {"camera_intrinsic": [[50, 0, 32], [0, -50, 18], [0, 0, 1]]}, "without a camera_intrinsic"),
    ("calibrated_sensor", {"camera_intrinsic": [[50, 0, NAN], [0, 50, 18], [0, 0, 1]]}, "without a camera_intrinsic"),
    ("calibrated_sensor", {"camera_intrinsic": [[50, 0, 32], [0, 50, 18], [0, 0, 0]]}, "without a camera_intrinsic"),
    ("sample_annotation", {"size": [1, NAN, 1]}, "has a size that is not finite"),
    ("sample_annotation", {"rotation": [0, 0, 0, 0]}, "sample_annotation.json: record"),
    ("sample_annotation", {"attribute_tokens": [3]}, "attribute_tokens[0]"),
    ("sample_annotation", {"num_lidar_pts": 10**300}, "'num_lidar_pts' is not 1 numbers"),
    ("sample", {"timestamp": 10**30}, "'timestamp' is not 1 numbers"),
    ("sample_data", {"is_key_frame": "false"}, "'is_key_frame' is not 1 numbers"),
    ("sample_data", {"ego_pose_token": ""}, "has no ego_pose_token"),
    ("category", {"name": None}, "name[0] is null, expected a text"),
    ("sample_data", {"ego_pose_token": "x"}, "ego_pose_token 'x' is not in ego_pose.json"),
    ("sample", {"scene_token": "zzz"}, "scene_token 'zzz' is not in scene.json"),
    ("ego_pose", {"rotation": [1, 0, 0]}, "'rotation' is not 4 numbers"),
    ("sample_annotation", {"size": ["wide", 1, 1]}, "'size' is not 3 numbers"),
    ("sample_data", {"filename": None}, "filename[0] is null, expected a text"),
    ("sample", {"timestamp": ...}, "a record has no field 'timestamp'"),
], ids=lambda value: str(value)[:40])  # fmt: skip
def test_tables_that_would_lead_astray(copy, tmp_path, table, record, says):
    """Names that climb, poses and calibrations that are none, wrong types: one line that names table and record."""
    def change(row: dict, k: int) -> None:
        if k == 0:
            for name, value in record.items():
                row.pop(name) if value is ... else row.update({name: value})

    change_table(copy, table, change)
    with pytest.raises(InputError) as caught:
        _open_all(copy, tmp_path / "c")
    assert f"/{table}.json: " in str(caught.value) and says in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("table, change, says", [
    ("sample_data", lambda row, k: row.update(next=row["token"]) if k == 3 else None, "has a 'next' that does not lie"),
    ("ego_pose", lambda row, k: row.update(token="twin") if k < 2 else None, "has the token of another record"),
    ("sample_data", lambda row, k: row.update(is_key_frame=True), "is one of two keyframes of the same sample and sensor"),
])  # fmt: skip
def test_records_that_contradict_each_other_are_refused(copy, tmp_path, table, change, says):
    change_table(copy, table, change)
    with pytest.raises(InputError, match=f"{table}.json: record '.*' {says}"):
        _open_all(copy, tmp_path / "c")


def test_another_trees_lidarseg_numbers_are_mapped_by_name(copy, tree, tmp_path, cache):
    """A tree that numbers the classes otherwise has the same classes; one of a class of its own is refused where a
    point has it; one without numbers is refused."""
    place = np.random.default_rng(0).permutation(200)[:32]
    change_table(copy, "category", lambda row, k: row.update(index=int(place[row["index"]])))
    for path in (copy / "lidarseg").rglob("*.bin"):
        place[np.fromfile(path, np.uint8)].astype(np.uint8).tofile(path)
    mine, theirs = _open_all(tree, cache), _open_all(copy, tmp_path / "c")
    for raw in (False, True):
        assert all(np.array_equal(mine.lidarseg(i, raw), theirs.lidarseg(i, raw)) for i in range(len(mine)))
    change_table(copy, "category", lambda row, k: row.update(name="vehicle.hovercraft") if row["name"] == "vehicle.car" else None)
    with pytest.raises(InputError, match=f"class {place[17]} 'vehicle.hovercraft' is none of nuScenes-lidarseg's 32"):
        data = _open_all(copy, tmp_path / "c")
        [data.lidarseg(i) for i in range(len(data))]
    change_table(copy, "category", lambda row, k: row.pop("index"))
    with pytest.raises(InputError, match="category.json: its records need an 'index' of their own"):
        _open_all(copy, tmp_path / "c").lidarseg(0)


def test_unknown_categories_are_counted_in_a_note(copy, tmp_path, capsys):
    change_table(copy, "category", lambda row, k: row.update(name=row["name"].split(".")[-1]))
    data = _open_all(copy, tmp_path / "c")
    note = capsys.readouterr().err
    boxes = sum(len(data.boxes(i).labels) for i in range(len(data)))
    assert f"of {boxes} boxes are not nuScenes'" in note and "count as 'others'" in note and note.count("\n") == 1
    assert not any(data.boxes(i).labels.any() for i in range(len(data)))


@pytest.mark.parametrize("factor, fits", [(1.0, True), (0.2, False), (1.2, True), (2.0, False)])
def test_steps_of_planning_are_half_a_second(copy, tmp_path, factor, fits):
    for table in ("sample", "sample_data"):
        change_table(copy, table, lambda row, k: row.update(timestamp=int(row["timestamp"] * factor)))
    data = _open_all(copy, tmp_path / "c")
    if fits:
        return data.check_steps()
    with pytest.raises(InputError, match=f"keyframes are {0.5 * factor:.2g} s apart .median.; planning's steps are 0.5 s"):
        data.check_steps()


def test_clouds_of_other_columns_are_refused(copy, tmp_path):
    """80 bytes are four points of five columns or five of four: the ring tells. nan is refused too."""
    data = _open_all(copy, tmp_path / "c")
    cloud = copy / data.lidar_file(0)
    points = np.random.default_rng(0).normal(0, 20, (50, 4)).astype(np.float32)
    points.tofile(cloud)
    with pytest.raises(InputError, match="not nuScenes' five float32 a point, x, y, z, intensity, ring"):
        data.points(0)
    five = np.concatenate([points, np.zeros((50, 1), np.float32)], 1)
    five.tofile(cloud)
    assert len(data.points(0)) == 50
    five[3, 1] = NAN
    five.tofile(cloud)
    with pytest.raises(InputError, match="1 of 50 points hold nan or inf"):
        data.points(0)


def test_without_a_home_the_cache_lies_in_the_temporary_folder(monkeypatch, tmp_path, capsys):
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", lambda: (_ for _ in ()).throw(RuntimeError("Could not determine home directory.")))
    monkeypatch.setattr(nuscenes.tempfile, "gettempdir", lambda: str(tmp_path))
    assert nuscenes.default_cache() == tmp_path / f"minocc-{os.getuid()}"
    assert "choose another with --cache or XDG_CACHE_HOME" in capsys.readouterr().err
    assert nuscenes.default_cache().stat().st_mode & 0o777 == 0o700


def test_versions_splits_and_roots(copy, tmp_path):
    cache = tmp_path / "c"
    with pytest.raises(InputError, match="no version 'v1.0-trainval' here; it holds v1.0-mini"):
        _open_all(copy, cache, version="v1.0-trainval")
    with pytest.raises(InputError, match="split 'train': v1.0-mini has mini_train, mini_val and all"):
        _open_all(copy, cache, split="train")
    with pytest.raises(InputError, match="no such folder; give --data-root"):
        _open_all(tmp_path / "nowhere", cache)
    with pytest.raises(InputError, match="no v1.0-.* folder"):
        _open_all(copy / "samples", cache)
    with pytest.raises(InputError, match="image size"):
        _open_all(copy, cache, image_size=(0, 10))
    with pytest.raises(InputError, match="token 'abc' is not in split 'all'"):
        _open_all(copy, cache).index("abc")
    (tmp_path / "kitti/dataset/sequences").mkdir(parents=True)
    with pytest.raises(InputError, match="SemanticKITTI, not nuScenes"):
        _open_all(tmp_path / "kitti", cache)
    (copy / "sequences").mkdir()
    with pytest.raises(InputError, match="holds both"):
        _open_all(copy, cache)
    (copy / "sequences").rmdir()
    shutil.copytree(copy / "v1.0-mini", copy / "v1.0-trainval")
    with pytest.raises(InputError, match="several versions .v1.0-mini, v1.0-trainval.; choose one with --version"):
        _open_all(copy, cache)


def test_split_without_a_scene_of_this_tree(copy, tmp_path):
    path = copy / "v1.0-mini/scene.json"
    path.write_text(path.read_text().replace("scene-0103", "scene-0553"))
    message = "split 'mini_val' holds no scene of this tree, which has scene-0553, scene-0061.*--split mini_train or"
    with pytest.raises(InputError, match=message):
        _open_all(copy, tmp_path / "c", split="mini_val")


def test_bad_sensor_files(copy, tmp_path):
    small = _open_all(copy, tmp_path / "c", image_size=(9, 16))
    native = _open_all(copy, tmp_path / "c")
    image, cloud = copy / native.camera_files(0)[2], copy / native.lidar_file(0)
    whole = image.read_bytes()
    unreadable = "not a readable image"
    for broken, message in ((whole[: len(whole) // 2], unreadable), (b"", "empty"), (b"GIF?", unreadable)):
        image.write_bytes(broken)
        for data in (native, small):
            with pytest.raises(InputError, match=message) as caught:
                data[0]
            assert str(image) in str(caught.value) and "\n" not in str(caught.value)
    Image.new("RGB", (WIDTH, HEIGHT + 1)).save(image)
    for data in (native, small):
        with pytest.raises(InputError, match=f"{WIDTH}x{HEIGHT + 1} px, expected {WIDTH}x{HEIGHT}"):
            data[0]
    image.unlink()
    for data in (native, small):
        with pytest.raises(InputError, match="image not found"):
            data[0]
    whole = cloud.read_bytes()
    for broken in (whole[:-3], b""):
        cloud.write_bytes(broken)
        with pytest.raises(InputError, match="expected a multiple of 20"):
            native.points(0)
    cloud.unlink()
    with pytest.raises(InputError, match="LiDAR file not found"):
        native.points(0)


def test_bad_label_files(copy, tmp_path):
    data = _open_all(copy, tmp_path / "c")
    path = copy / "gts" / data.scene_names[0] / data.tokens[0] / "labels.npz"
    grid = np.zeros((200, 200, 16), np.uint8)
    good = {"semantics": grid, "mask_camera": grid, "mask_lidar": grid}
    for change, message in (({"semantics": grid[:100]}, "'semantics' has shape"),
                            ({"semantics": grid.astype(np.int64)}, "'semantics' has dtype int64"),
                            ({"mask_camera": grid.astype(np.float32)}, "'mask_camera' has dtype float32"),
                            ({"semantics": grid + 40}, "ids above 17"),
                            ({"mask_lidar": None}, "no array 'mask_lidar'")):
        np.savez(path, **{key: value for key, value in (good | change).items() if value is not None})
        with pytest.raises(InputError, match=message):
            data[0]
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(InputError, match="not a readable npz"):
        data.labels(0)
    path.unlink()
    with pytest.raises(InputError, match="labels.npz: file not found"):
        data.labels(0)
    label = copy / data._table["sample_lidarseg"][data._rows[0]].decode()
    label.write_bytes(label.read_bytes()[:-1])
    with pytest.raises(InputError, match=f"{POINTS - 1} labels for {POINTS} points"):
        data.lidarseg(0)
    label.write_bytes(bytes([40] * POINTS))
    with pytest.raises(InputError, match="class 40 is none of nuScenes-lidarseg's 32"):
        data.lidarseg(0)
    (copy / "questions/NuScenes_val_questions.json").write_text('{"questions": [{"question": "?"}]}')
    with pytest.raises(InputError, match="'questions'.0. has no 'answer'"):
        data.questions(0)


def test_keyframe_without_a_camera_record(copy, tmp_path):
    path = copy / "v1.0-mini/sample_data.json"
    rows = json.loads(path.read_text())
    lost = next(row for row in rows if "samples/CAM_BACK/" in row["filename"] and "scene-0061" in row["filename"])
    for row in rows:
        row.update({key: "" for key in ("prev", "next") if row[key] == lost["token"]})
    path.write_text(json.dumps([row for row in rows if row is not lost]))
    data = _open_all(copy, tmp_path / "c")
    with pytest.raises(InputError, match=f"keyframe {lost['sample_token']} has no CAM_BACK record"):
        data[data.index(lost["sample_token"])]


def test_test_set_without_annotations(copy, tmp_path):
    os.rename(copy / "v1.0-mini", copy / "v1.0-test")
    for name in ("sample_annotation", "instance"):
        (copy / f"v1.0-test/{name}.json").write_text("[]")
    shutil.rmtree(copy / "gts")
    frame = _open_all(copy, tmp_path / "c")[0]
    assert frame.boxes.center.shape == (0, 3) and frame.future.agents.shape == (0, 6, 2) and frame.semantics is None


# --- python -m common.nuscenes check ---------------------------------------------------------------------------------


def run_check(root: Path, cache: Path) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "common.nuscenes", "check", "--data-root", str(root), "--cache", str(cache)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


def test_check_counts_and_exit_codes(copy, tmp_path):
    done = run_check(copy, tmp_path / "c")
    assert done.returncode == 0, done.stderr
    lines = {line.split()[0]: line for line in done.stdout.splitlines()}
    count = 2 * KEYFRAMES
    assert "13 of 13" in lines["tables"] and f"{count} of {count}" in lines["samples/LIDAR_TOP"]
    assert f"{count - 2} of {count - 2}" in lines["sweeps/CAM_BACK"] and f"{count} of {count}" in lines["gts"]
    assert f"keyframes with six images, LiDAR and label: {count} of {count}" in done.stdout
    data = _open_all(copy, tmp_path / "c")
    cloud = (copy / data.lidar_file(0)).read_bytes()
    (copy / data.lidar_file(0)).write_bytes(cloud[:-4])
    assert "bytes, expected a multiple of 20" in run_check(copy, tmp_path / "c").stderr
    (copy / data.lidar_file(0)).write_bytes(cloud)
    (copy / data.camera_files(4)[1]).write_bytes(b"")
    done = run_check(copy, tmp_path / "c")
    assert done.returncode == 2 and len(done.stderr.strip().splitlines()) == 1
    assert data.camera_files(4)[1] in done.stderr and f"1 of {count} keyframes" in done.stderr
    assert run_check(tmp_path / "nowhere", tmp_path / "c").returncode == 2


# --- real frames (never copied into the project) ---------------------------------------------------------------------


@needs_real
def test_real_frame_projects_to_the_reference_pixels(cache):
    """Vectors: 2500 real points and where they fall, by independent code. Stated tolerance 1e-3 px."""
    reference = np.load(SHARED / "vectors/nuscenes_geometry.npz")
    frame = NuScenesOccupancy(SHARED / "real/nuscenes", cache=cache)[0]
    points = np.c_[frame.points[reference["point_index"], :3].double().numpy(), np.ones(2500)]
    np.testing.assert_allclose(points[:, :3], reference["points_ego"], atol=1e-5)
    for n, camera in enumerate(CAMERAS):
        seen = reference[f"{camera}_mask_strict"]
        assert seen.sum() > 50
        cam = np.linalg.inv(frame.T_ego_cam[n].double().numpy()) @ points.T
        uv = (frame.K[n].double().numpy() @ cam[:3] / cam[2])[:2].T
        assert np.abs(uv - reference[f"{camera}_uv"])[seen].max() < 1e-3
        static = reference[f"{camera}_px_err_static_median"]
        assert static > 0.5  # the test would notice the static chain


@needs_real
def test_real_frame_calibration_and_boxes(cache):
    expected = np.load(SHARED / "real/nuscenes/expected.npz")
    data = NuScenesOccupancy(SHARED / "real/nuscenes", cache=cache, parts=("boxes",))
    K, T_ego_cam, T_global_ego = data.calibration(0)
    T_ego_lidar = data.T_ego_lidar(0)
    np.testing.assert_allclose(T_ego_lidar, expected["lidar2ego"], atol=1e-6)
    np.testing.assert_allclose(T_global_ego, expected["ego2global"], atol=1e-4)
    cameras = expected["camera"].tolist()
    for n, camera in enumerate(CAMERAS):
        T_cam_lidar = np.linalg.inv(T_ego_cam[n].astype(np.float64)) @ T_ego_lidar
        np.testing.assert_allclose(T_cam_lidar, expected["lidar2cam"][cameras.index(camera)], atol=1e-5)
        np.testing.assert_allclose(K[n], expected["cam2img"][cameras.index(camera)], rtol=1e-6)
    boxes = data.boxes(0)
    order = [boxes.tokens.index(token) for token in expected["annotation_token"]]
    T = rigid_inverse(T_ego_lidar) @ boxes.T_ego_box[order]
    np.testing.assert_allclose(T[:, :3, 3], expected["gt_boxes"][:, :3], atol=2e-3)  # tables round to the millimetre
    np.testing.assert_allclose(boxes.size[order], expected["gt_boxes"][:, 3:6], atol=1e-3)
    turn = np.array([Quaternion(matrix=pose, rtol=1e-3, atol=1e-5).yaw_pitch_roll[0] for pose in T])
    turn -= expected["gt_boxes"][:, 6]
    assert np.abs(np.arctan2(np.sin(turn), np.cos(turn))).max() < 1e-4
    names = ["other" if boxes.labels[k] == 0 else nuscenes.OCC3D_CLASSES[boxes.labels[k]] for k in order]
    assert names == expected["gt_names"].tolist()
    assert boxes.num_lidar_pts[order].tolist() == expected["num_lidar_pts"].tolist()


@needs_real
def test_real_frame_default_split_and_error(cache):
    assert NuScenesOccupancy(SHARED / "real/nuscenes", cache=cache).split == "mini_train"
    with pytest.raises(InputError, match="split 'mini_val' holds no scene.*scene-0061.*--split mini_train or all"):
        NuScenesOccupancy(SHARED / "real/nuscenes", split="mini_val", cache=cache)


@needs_poses
def test_real_poses_equal_vads_arrays(cache):
    """40 real keyframes: ego future, history, command, agents' futures, boxes and velocities as VAD's info files."""
    expected = np.load(SHARED / "real/nuscenes-poses/expected.npz")
    data = NuScenesOccupancy(POSES, split="mini_val", cache=cache, parts=("boxes", "future"))
    assert data.tokens == expected["sample_token"].tolist()
    commands = set()
    for i in range(len(data)):
        frame = data[i]
        future, boxes = frame.future, frame.boxes
        displacement = np.diff(future.trajectory, axis=0, prepend=0)
        np.testing.assert_allclose(displacement, expected["gt_ego_fut_trajs"][i], atol=1e-5)
        np.testing.assert_array_equal(future.mask, expected["gt_ego_fut_masks"][i])
        history = np.diff(np.r_[future.history, [[0, 0]]], axis=0)[-2:]
        np.testing.assert_allclose(history, expected["gt_ego_his_trajs"][i], atol=1e-5)
        assert future.command == expected["gt_ego_fut_cmd"][i].argmax()
        commands.add(future.command)

        rows = slice(expected["box_start"][i], expected["box_start"][i + 1])
        order = [boxes.tokens.index(token) for token in expected["annotation_token"][rows]]
        T_lidar_ego = rigid_inverse(data.T_ego_lidar(i))
        T = (T_lidar_ego @ boxes.T_ego_box)[order]
        np.testing.assert_allclose(T[:, :3, 3], expected["gt_boxes"][rows, :3], atol=1e-9)
        np.testing.assert_allclose(boxes.size[order], expected["gt_boxes"][rows, 3:6])
        turn = np.array([Quaternion(matrix=pose, rtol=1e-6, atol=1e-8).yaw_pitch_roll[0] for pose in T])
        turn += expected["gt_boxes"][rows, 6] + np.pi / 2  # the source keeps -yaw - pi/2
        assert np.abs(np.arctan2(np.sin(turn), np.cos(turn))).max() < 1e-6
        # `velocity` is the ego-frame vector's first two components; its third is what tilted axes leave over.
        level = data._table["box_velocity"][data._box_rows(i)] * (1, 1, 0) @ frame.T_global_ego[:3, :3].numpy()
        np.testing.assert_allclose(boxes.velocity, level[:, :2], atol=1e-12)
        velocity = (level @ T_lidar_ego[:3, :3].T)[order, :2]
        np.testing.assert_allclose(velocity, expected["gt_velocity"][rows], atol=1e-9)  # nan in the same places

        agents = np.diff(future.agents, axis=1, prepend=0)[order]
        np.testing.assert_allclose(agents.reshape(-1, 12), expected["gt_agent_fut_trajs"][rows], atol=1e-5)
        np.testing.assert_array_equal(future.agents_mask[order], expected["gt_agent_fut_masks"][rows])
        turn = np.diff(future.agents_yaw, axis=1, prepend=0)[order] - expected["gt_agent_fut_yaw"][rows]
        assert np.abs(np.arctan2(np.sin(turn), np.cos(turn))).max() < 1e-5
    assert commands == set(expected["gt_ego_fut_cmd"].argmax(1)) and len(commands) >= 2
