"""The unmodified nuscenes-devkit on the synthetic world: it loads, projects, scores, predicts and draws it.

By default the tiny world of conftest.py. MINOCC_WORLD=<folder that data.driving wrote> checks that one instead, with
what needs the full size (`--size mini`): at least eight of the ten detection classes in mini_val, rows of all kinds.

    MINOCC_WORLD=data/worlds/mini python -m pytest -s tests/test_devkit.py
"""

import contextlib
import io
import json
import os
from collections import Counter, defaultdict
from pathlib import Path

import cv2
import matplotlib
import numpy as np
import pytest
from pyquaternion import Quaternion

from common.nuscenes import CAMERAS, DETECTION_CLASSES

matplotlib.use("Agg")
GIVEN = os.environ.get("MINOCC_WORLD")
needs_given = pytest.mark.skipif(not GIVEN, reason="MINOCC_WORLD names no world; the tiny one lacks the size")
TABLES = ("category", "attribute", "visibility", "instance", "sensor", "calibrated_sensor", "ego_pose", "log", "scene",
          "sample", "sample_data", "sample_annotation", "map")  # fmt: skip
STILL = 0.02  # [m/s] slower things do not move between a camera's time and the LiDAR's


@pytest.fixture(scope="module")
def root(request) -> Path:
    return Path(GIVEN) if GIVEN else request.getfixturevalue("tiny_world")


@pytest.fixture(scope="module")
def nusc(root):
    from nuscenes.nuscenes import NuScenes

    version = next(path.name for path in root.glob("v1.0-*"))
    return NuScenes(version=version, dataroot=str(root), verbose=False)


def some(rows: list, count: int) -> list:
    """`count` of the rows, evenly spread."""
    return [rows[int(k)] for k in np.unique(np.linspace(0, len(rows) - 1, count).round())]


def scenes_of(nusc, part: str) -> tuple[str, list[str]]:
    """part "train" or "val" -> the devkit's split of this version, its scenes here."""
    from nuscenes.utils.splits import create_splits_scenes

    split = {"v1.0-mini": f"mini_{part}", "v1.0-trainval": part}[nusc.version]
    return split, [row["name"] for row in nusc.scene if row["name"] in create_splits_scenes()[split]]


def lidar_in_global(nusc, sample: dict) -> tuple[np.ndarray, np.ndarray]:
    """-> (3, M) [m, global], lidarseg class (M,)."""
    from nuscenes.utils.data_classes import LidarPointCloud

    data = nusc.get("sample_data", sample["data"]["LIDAR_TOP"])
    cloud = LidarPointCloud.from_file(nusc.get_sample_data_path(data["token"]))
    for table in ("calibrated_sensor", "ego_pose"):
        row = nusc.get(table, data[f"{table}_token"])
        cloud.rotate(Quaternion(row["rotation"]).rotation_matrix)
        cloud.translate(np.array(row["translation"]))
    label = np.fromfile(Path(nusc.dataroot) / nusc.get("lidarseg", data["token"])["filename"], np.uint8)
    return cloud.points[:3], label


def exact(nusc, kind: str, data: dict) -> np.ndarray:
    """The exact map (H, W) of a keyframe image: depth [1/256 m] or instance (1 + row of instance.json)."""
    path = Path(nusc.dataroot) / "exact" / kind / data["channel"] / f"{Path(data['filename']).stem}.png"
    return cv2.imread(str(path), cv2.IMREAD_UNCHANGED)


def speed(nusc, token: str) -> float:
    return float(np.linalg.norm(nusc.box_velocity(token)))


# --- tables ----------------------------------------------------------------------------------------------------------


def test_loads_with_every_file(nusc, root):
    assert all(len(getattr(nusc, table)) for table in TABLES) and len(nusc.lidarseg) == len(nusc.sample)
    assert len(nusc.category) == len(nusc.lidarseg_idx2name_mapping) == 32
    assert {row["channel"] for row in nusc.sensor} == {*CAMERAS, "LIDAR_TOP"}
    for sample in nusc.sample:
        assert set(sample["data"]) == {*CAMERAS, "LIDAR_TOP"}
    for row in nusc.sample_data:
        path = root / row["filename"]
        assert path.stat().st_size > 0 and row["filename"].startswith("samples/" if row["is_key_frame"] else "sweeps/")
        if row["channel"] == "LIDAR_TOP":
            assert path.stat().st_size % 20 == 0
    for row in nusc.lidarseg:
        cloud = root / nusc.get("sample_data", row["sample_data_token"])["filename"]
        assert (root / row["filename"]).stat().st_size * 20 == cloud.stat().st_size
    for table in TABLES:
        tokens = [row["token"] for row in getattr(nusc, table)]
        assert len(set(tokens)) == len(tokens)
    for row in some(nusc.sample_data, 14):
        if row["channel"] != "LIDAR_TOP":
            assert cv2.imread(str(root / row["filename"])).shape == (row["height"], row["width"], 3)
    assert all("ynthetic" in row["description"] for row in nusc.scene)


def follow(get, first: str) -> list[dict]:
    """The rows from `first` along `next`; each one's `prev` must be the row before."""
    rows, token, before = [], first, ""
    while token:
        rows.append(get(token))
        assert rows[-1]["prev"] == before
        before, token = token, rows[-1]["next"]
    return rows


def test_chains(nusc):
    """prev and next of samples, sample_data and annotations lead through every row exactly once, in time."""
    seen = Counter()
    for scene in nusc.scene:
        samples = follow(lambda token: nusc.get("sample", token), scene["first_sample_token"])
        assert len(samples) == scene["nbr_samples"] and samples[-1]["token"] == scene["last_sample_token"]
        assert all(row["scene_token"] == scene["token"] for row in samples)
        gaps = np.diff([row["timestamp"] for row in samples])
        assert (np.abs(gaps - 500_000) < 5_000).all()
        seen["sample"] += len(samples)
        for channel in (*CAMERAS, "LIDAR_TOP"):
            token = samples[0]["data"][channel]
            while before := nusc.get("sample_data", token)["prev"]:
                token = before
            rows = follow(lambda token: nusc.get("sample_data", token), token)
            assert {row["channel"] for row in rows} == {channel}
            keys = [row["token"] for row in rows if row["is_key_frame"]]
            assert keys == [row["data"][channel] for row in samples]
            assert (np.diff([row["timestamp"] for row in rows]) > 0).all()
            seen["sample_data"] += len(rows)
    for instance in nusc.instance:
        rows = follow(lambda token: nusc.get("sample_annotation", token), instance["first_annotation_token"])
        assert len(rows) == instance["nbr_annotations"] and rows[-1]["token"] == instance["last_annotation_token"]
        assert {row["instance_token"] for row in rows} == {instance["token"]}
        times = [nusc.get("sample", row["sample_token"])["timestamp"] for row in rows]
        assert (np.diff(times) > 0).all()
        seen["sample_annotation"] += len(rows)
    assert seen == {table: len(getattr(nusc, table)) for table in seen}


def test_every_sensor_has_the_pose_of_its_own_time(nusc):
    moved = []
    for sample in nusc.sample:
        rows = {channel: nusc.get("sample_data", token) for channel, token in sample["data"].items()}
        assert rows["LIDAR_TOP"]["timestamp"] == sample["timestamp"]
        late = [sample["timestamp"] - rows[channel]["timestamp"] for channel in CAMERAS]
        assert 0 <= min(late) and max(late) < 60_000 and len(set(late)) > 3  # [us] cameras fire before, one by one
        poses = {channel: nusc.get("ego_pose", row["ego_pose_token"]) for channel, row in rows.items()}
        for channel, row in rows.items():
            assert poses[channel]["timestamp"] == row["timestamp"]
        front, lidar = (np.array(poses[channel]["translation"]) for channel in ("CAM_FRONT_LEFT", "LIDAR_TOP"))
        gap = 1e-6 * (sample["timestamp"] - rows["CAM_FRONT_LEFT"]["timestamp"])
        moved.append(np.linalg.norm(lidar - front) / gap)
    assert max(moved) > 2 and max(moved) < 25, "ego speed [m/s] between two sensors' poses"


def test_attributes_and_visibility(nusc):
    allowed = {
        "vehicle": ("vehicle.moving", "vehicle.stopped", "vehicle.parked"),
        "cycle": ("cycle.with_rider", "cycle.without_rider"),
        "human": ("pedestrian.moving", "pedestrian.standing", "pedestrian.sitting_lying_down"),
    }
    for row in nusc.sample_annotation:
        category = row["category_name"]
        group = "cycle" if category in ("vehicle.bicycle", "vehicle.motorcycle") else category.split(".")[0]
        names = [nusc.get("attribute", token)["name"] for token in row["attribute_tokens"]]
        assert len(names) <= 1 and all(name in allowed.get(group, ()) for name in names), (category, names)
        if group in ("vehicle", "cycle"):
            assert len(names) == 1, category
        assert row["visibility_token"] in ("1", "2", "3", "4") and min(row["size"]) > 0
        nusc.get("visibility", row["visibility_token"])
    hidden = sum(row["num_lidar_pts"] == 0 for row in nusc.sample_annotation)
    assert hidden > 0, "hidden objects stay annotated, with no points"
    print(f"{hidden} of {len(nusc.sample_annotation)} annotations have no LiDAR point")


# --- geometry --------------------------------------------------------------------------------------------------------


def test_points_in_boxes(nusc):
    """num_lidar_pts is the devkit's own count; what lies in a box has its lidarseg class, the ground under it apart."""
    from nuscenes.utils.data_classes import LidarPointCloud
    from nuscenes.utils.geometry_utils import points_in_box

    counts, right, wrong = Counter(), 0, 0
    flat = [index for index, name in nusc.lidarseg_idx2name_mapping.items() if name.startswith("flat.")]
    for sample in some(nusc.sample, 24):
        token = sample["data"]["LIDAR_TOP"]
        path, boxes, _ = nusc.get_sample_data(token)
        points = LidarPointCloud.from_file(path).points[:3]
        label = np.fromfile(Path(nusc.dataroot) / nusc.get("lidarseg", token)["filename"], np.uint8)
        for box in boxes:
            inside = points_in_box(box, points)
            row = nusc.get("sample_annotation", box.token)
            counts[int(inside.sum()) - row["num_lidar_pts"]] += 1
            own = label[inside & ~np.isin(label, flat)]
            right += int((own == nusc.lidarseg_name2idx_mapping[row["category_name"]]).sum())
            wrong += int((own != nusc.lidarseg_name2idx_mapping[row["category_name"]]).sum())
    total = sum(counts.values())
    print(f"{total} boxes, {counts[0]} with the devkit's own count; {right} points of the box's class, {wrong} others")
    assert counts[0] >= 0.99 * total and max(abs(difference) for difference in counts) <= 2  # a point on the face
    assert right > 500 and wrong < 0.02 * right


def test_map_pointcloud_to_image_lands_on_the_exact_depth(nusc):
    """Each point's depth lies within the exact depths of the 3x3 pixels around it, to 0.10 m (LiDAR noise 0.03 m).

    Counted apart: pixels and points of things that move (the camera fires up to 43 ms earlier), pixels where the 3x3
    depths differ by more than 0.5 m + 10 % (edges, thin things), and points behind the surface: the LiDAR looks from
    above, so it sees over what hides them from the camera. Of the rest at most 0.3 % may lie in front of what the
    camera sees. The same points three pixels lower must not fit.
    """
    from nuscenes.utils.geometry_utils import points_in_box

    still = [speed(nusc, row["first_annotation_token"]) < STILL and speed(nusc, row["last_annotation_token"]) < STILL
             for row in nusc.instance]  # fmt: skip
    moves = ~np.array([True, *still])
    shifted = Counter()
    for channel in CAMERAS:
        count = Counter()
        for sample in some(nusc.sample, 10):
            data = nusc.get("sample_data", sample["data"][channel])
            points, z, image = nusc.explorer.map_pointcloud_to_image(sample["data"]["LIDAR_TOP"], data["token"])
            depth, instance = exact(nusc, "depth", data) / 256.0, exact(nusc, "instance", data)
            assert depth.shape == instance.shape == image.size[::-1]
            depth[depth == 0] = 1e4  # sky
            camera = nusc.get("calibrated_sensor", data["calibrated_sensor_token"])
            place = np.linalg.inv(camera["camera_intrinsic"]) @ (points * z)
            for row in (camera, nusc.get("ego_pose", data["ego_pose_token"])):  # back to global
                place = Quaternion(row["rotation"]).rotation_matrix @ place + np.array(row["translation"])[:, None]
            on_mover = np.zeros(len(z), bool)
            for token in sample["anns"]:
                if not speed(nusc, token) < STILL:
                    on_mover |= points_in_box(nusc.get_box(token), place, wlh_factor=1.2)
            for down in (0, 3):
                u, v = np.floor(points[0]).astype(int), np.floor(points[1] + down).astype(int)
                keep = (u >= 1) & (v >= 1) & (u < depth.shape[1] - 1) & (v < depth.shape[0] - 1)
                window = [(v[keep] + dv, u[keep] + du) for dv in (-1, 0, 1) for du in (-1, 0, 1)]
                around = np.stack([depth[pixel] for pixel in window])
                low, high, own = around.min(0), around.max(0), z[keep]
                moving = on_mover[keep] | np.any([moves[instance[pixel]] for pixel in window], axis=0)
                edge = ~moving & (high - low > 0.5 + 0.1 * low)
                plain = ~moving & ~edge
                fits = plain & (own > low - 0.1) & (own < high + 0.1)
                if down:
                    shifted.update(points=int(plain.sum()), fit=int(fits.sum()))
                    continue
                count.update(points=len(own), moving=int(moving.sum()), edge=int(edge.sum()), plain=int(plain.sum()),
                             fit=int(fits.sum()), behind=int((plain & (own >= high + 0.1)).sum()),
                             front=int((plain & (own <= low - 0.1)).sum()))  # fmt: skip
        share = {name: round(count[name] / count["plain"], 4) for name in ("fit", "behind", "front")}
        print(f"{channel:16} {count['points']:7} points, {count['moving']} moving, {count['edge']} edges; rest {share}")
        assert count["plain"] > 0.5 * count["points"] > 500
        assert share["front"] < 0.003 and share["fit"] > 0.92
    assert shifted["fit"] < 0.85 * shifted["points"]


def test_boxes_cover_their_pixels(nusc):
    """Still objects: the pixels of the exact instance map lie within the box that the devkit projects, to 1 px."""
    from nuscenes.utils.geometry_utils import view_points

    row_of = {row["token"]: k + 1 for k, row in enumerate(nusc.instance)}
    checked = 0
    for sample in some(nusc.sample, 12):
        for channel in CAMERAS:
            token = sample["data"][channel]
            _, boxes, K = nusc.get_sample_data(token)
            instance = exact(nusc, "instance", nusc.get("sample_data", token))
            for box in boxes:
                if not speed(nusc, box.token) < STILL or box.corners()[2].min() < 0.5:
                    continue
                row = nusc.get("sample_annotation", box.token)
                pixels = np.argwhere(instance == row_of[row["instance_token"]])[:, ::-1] + 0.5
                if len(pixels) < 10:
                    continue
                hull = cv2.convexHull(view_points(box.corners(), K, normalize=True)[:2].T.astype(np.float32))
                far = [cv2.pointPolygonTest(hull, (float(u), float(v)), True) for u, v in pixels]
                assert np.mean(np.array(far) >= -1) > 0.98, (row["category_name"], channel, len(pixels), min(far))
                checked += 1
    assert checked > 20
    print(f"{checked} boxes cover their pixels")


def test_map_mask(nusc):
    """The ego drives on the semantic prior, and so lies what lidarseg calls driveable; the prior is not displaced.

    Sidewalk may lie on it: the carriageway's traffic islands.
    """
    shares = defaultdict(list)
    names = {name: index for index, name in nusc.lidarseg_idx2name_mapping.items()}
    road, off = names["flat.driveable_surface"], [names["flat.sidewalk"], names["flat.terrain"]]
    for sample in some(nusc.sample, 12):
        log = nusc.get("log", nusc.get("scene", sample["scene_token"])["log_token"])
        mask = nusc.get("map", log["map_token"])["mask"]
        ego = nusc.get("ego_pose", nusc.get("sample_data", sample["data"]["LIDAR_TOP"])["ego_pose_token"])
        assert mask.is_on_mask(ego["translation"][0], ego["translation"][1])[0]
        points, label = lidar_in_global(nusc, sample)
        for shift in ((0, 0), (0.2, 0), (-0.2, 0), (0, 0.2), (0, -0.2)):
            on = mask.is_on_mask(points[0] + shift[0], points[1] + shift[1])
            right = on[label == road].sum() + (~on[np.isin(label, off)]).sum()
            shares[shift].append((right, (label == road).sum() + np.isin(label, off).sum()))
            if shift == (0, 0):
                shares["road"].append((on[label == road].sum(), (label == road).sum()))
    shares = {what: float(np.divide(*np.sum(rows, 0))) for what, rows in shares.items()}
    print({what: round(share, 4) for what, share in shares.items()})
    assert shares.pop("road") > 0.985 and shares[0, 0] > 0.96
    assert max(shares, key=shares.get) == (0, 0)


def test_multisweep(nusc):
    """from_file_multisweep adds the earlier sweeps through global: what stands still falls onto itself."""
    from nuscenes.utils.data_classes import LidarPointCloud
    from scipy.spatial import cKDTree

    sample = nusc.get("sample", nusc.get("sample", nusc.scene[0]["first_sample_token"])["next"])
    cloud, times = LidarPointCloud.from_file_multisweep(nusc, sample, "LIDAR_TOP", "LIDAR_TOP", nsweeps=2)
    lags = np.unique(times.round(4))
    assert len(lags) == 2 and lags[0] == 0 and 0.02 < lags[1] < 0.5
    now, before = (cloud.points[:3, np.isclose(times[0], lag, atol=1e-3)].T for lag in lags)
    assert min(len(now), len(before)) > 5000
    near = np.abs(before[:, :2]).max(1) < 15
    distance = cKDTree(now).query(before[near])[0]
    print(f"median distance of the earlier sweep from this one: {np.median(distance):.3f} m")
    assert np.median(distance) < 0.15


# --- detection -------------------------------------------------------------------------------------------------------


def score_annotations(nusc, folder: Path, part: str = "val"):
    """The annotations with a LiDAR point as predictions -> (metrics, boxes per class after the devkit's filters)."""
    from nuscenes.eval.common.config import config_factory
    from nuscenes.eval.detection.evaluate import DetectionEval
    from nuscenes.eval.detection.utils import category_to_detection_name

    split, names = scenes_of(nusc, part)
    results = {}
    for sample in nusc.sample:
        if nusc.get("scene", sample["scene_token"])["name"] not in names:
            continue
        results[sample["token"]] = []
        for token in sample["anns"]:
            row = nusc.get("sample_annotation", token)
            name = category_to_detection_name(row["category_name"])
            if name is None or row["num_lidar_pts"] == 0:
                continue
            attribute = [nusc.get("attribute", a)["name"] for a in row["attribute_tokens"]]
            results[sample["token"]].append({
                "sample_token": sample["token"], "translation": row["translation"], "size": row["size"],
                "rotation": row["rotation"], "velocity": np.nan_to_num(nusc.box_velocity(token)[:2]).tolist(),
                "detection_name": name, "detection_score": 0.9, "attribute_name": attribute[0] if attribute else "",
            })  # fmt: skip
    modality = {f"use_{name}": name == "lidar" for name in ("camera", "lidar", "radar", "map", "external")}
    path = folder / "results.json"
    path.write_text(json.dumps({"meta": modality, "results": results}))
    config = config_factory("detection_cvpr_2019")
    with contextlib.redirect_stderr(io.StringIO()):  # the devkit's progress bars
        evaluation = DetectionEval(nusc, config, str(path), split, str(folder), verbose=False)
        metrics, _ = evaluation.evaluate()
    return metrics, Counter(box.detection_name for box in evaluation.gt_boxes.all)


def test_annotations_score_as_perfect_detections(nusc, tmp_path):
    metrics, present = score_annotations(nusc, tmp_path)
    for name in sorted(present):
        errors = {kind: round(value, 4) for kind, value in metrics._label_tp_errors[name].items()}
        print(f"{name:22} {present[name]:5} boxes, AP {metrics.mean_dist_aps[name]:.4f}, {errors}")
        assert metrics.mean_dist_aps[name] > 0.99
        for kind in ("trans_err", "scale_err", "orient_err", "vel_err", "attr_err"):
            value = metrics.get_label_tp(name, kind)
            assert np.isnan(value) or value < 1e-3, (name, kind)  # nan: the class has no such error
    assert len(present) >= 4
    print(f"{len(present)} of the ten classes in the validation scenes")


@needs_given
def test_at_least_eight_classes_in_the_validation_scenes(nusc, tmp_path):
    _, present = score_annotations(nusc, tmp_path)
    absent = sorted(set(DETECTION_CLASSES) - set(present))
    assert len(present) >= 8, f"absent: {absent}"
    print(f"{len(present)} of ten; absent: {absent}")


# --- drawing ---------------------------------------------------------------------------------------------------------


def test_renders(nusc, tmp_path):
    """render_sample, render_sample_data, render_annotation and friends write their pictures without a display."""
    import matplotlib.pyplot as plt

    sample = nusc.sample[len(nusc.sample) // 2]
    seen = [row for row in nusc.sample_annotation if row["visibility_token"] == "4" and row["num_lidar_pts"] > 20]
    draw = {
        "sample": lambda path: nusc.render_sample(sample["token"], out_path=path, verbose=False),
        "camera": lambda path: nusc.render_sample_data(sample["data"]["CAM_BACK"], out_path=path, verbose=False),
        "lidar": lambda path: nusc.render_sample_data(
            sample["data"]["LIDAR_TOP"], nsweeps=2, underlay_map=True, out_path=path, verbose=False),
        "annotation": lambda path: nusc.render_annotation(seen[0]["token"], out_path=path),
        "points": lambda path: nusc.render_pointcloud_in_image(
            sample["token"], camera_channel="CAM_FRONT", show_lidarseg=True, out_path=path, verbose=False),
        "egoposes": lambda path: nusc.render_egoposes_on_map(
            nusc.get("log", nusc.scene[0]["log_token"])["location"], out_path=path),
    }  # fmt: skip
    for name, make in draw.items():
        path = tmp_path / f"{name}.png"
        with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
            make(str(path))
        plt.close("all")
        picture = cv2.imread(str(path))
        assert picture is not None and min(picture.shape[:2]) > 100 and picture.std() > 5, name
