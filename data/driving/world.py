"""The driving world as nuScenes records it: one scene after another, then the tables.

The rules are in data/driving/__init__.py.
"""

import os
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np

from common.files import InputError, read_json, read_npz, write_json, write_npz
from data.driving.building import claim_folder, describe_world, record_all, tick_keyframe
from data.driving.city import City
from data.driving.ground_truth import (FREE, SHAPE, Keyframe, Surfaces, add_hits, camera_ends, inverse,
                                       label_statistics, move, observed, seen_voxels)
from data.driving.nuscenes_writer import CAMERAS, PER_SCENE, chain, rounded, token, write_tables
from data.driving.sensors import (CAMERA_LAYOUT, calibration, class_table, jpeg, matrix, photograph, png,
                                  quaternion, sweep)
from data.driving.streets import CELL, LIDARSEG_NAMES

ANNOTATED = 60.0                # [m] from ego
LOCATIONS = ("boston-seaport", "singapore-onenorth", "singapore-queenstown", "singapore-hollandvillage")
MINI_LOCATIONS = {"scene-0061": 1, "scene-0103": 0, "scene-0553": 0, "scene-0655": 0, "scene-0757": 0, "scene-0796": 2,
                  "scene-0916": 2, "scene-1077": 3, "scene-1094": 3, "scene-1100": 3}


class Settings(NamedTuple):
    """What decides a world's bytes. image is (H, W)."""

    seed: int
    size: str
    version: str
    scenes: list[str]
    keyframes: int
    sweeps: int
    camera_sweeps: int
    image: tuple[int, int]
    decoys: bool = False


# --- one scene --------------------------------------------------------------------------------------------------------

class Recorder:
    """Drives one scene and writes its files; `rows` collects its table rows."""

    def __init__(self, root: Path, settings: Settings, index: int, tick=lambda: None):
        self.root, self.settings, self.index, self.tick = root, settings, index, tick
        self.name = settings.scenes[index]
        seed = settings.seed
        self.number = int(self.name.split("-")[1])
        place = (0, 0, 1, 0, 2, 0, 3)[self.number % 7]                  # half of nuScenes is from Boston
        self.location = LOCATIONS[MINI_LOCATIONS.get(self.name, place)]
        duration = 0.5 * (settings.keyframes - 1)
        self.city = City([seed, self.number], duration, not self.location.startswith("boston"), self.number % 7,
                         settings.size == "questions", settings.decoys)
        self.rng = np.random.default_rng([seed, self.number, 1])
        self.id = lambda *words: token(seed, self.name, *words)    # noqa: E731
        hour = {"night": 20, "dusk": 18}.get(self.city.weather, int(self.rng.integers(9, 17)))
        vehicle = "n008" if self.location.startswith("boston") else "n015"
        day = f"2018-{6 + self.number % 5:02d}-{1 + self.number % 28:02d}"
        clock = f"{hour:02d}-{self.number % 60:02d}-{self.number * 7 % 60:02d}"
        self.logfile = f"{vehicle}-{day}-{clock}{'-0400' if vehicle == 'n008' else '+0800'}"
        self.start = 1_527_811_200_000_000 + self.number * 86_400_000_000 + hour * 3_600_000_000        # [us]
        self.rows: dict[str, list[dict]] = {name: [] for name in PER_SCENE}
        self.classes = np.append(class_table(), np.full(224, FREE, np.uint8))                # index 255: nothing
        self.frames: list[Keyframe] = []
        self.visible: list[np.ndarray] = []
        self.folders: set[Path] = set()
        self.writer, self.written = ThreadPoolExecutor(1), []          # compresses and syncs arrays in the background
        self.calibration = calibration(self.rng, settings.image)
        for channel, row in self.calibration.items():
            self.rows["calibrated_sensor"].append({
                "token": self.id("calibrated_sensor", channel), "sensor_token": token(seed, "sensor", channel), **row})

    # rows
    def pose(self, stamp: int, *words) -> dict:
        """An ego_pose row at a timestamp [us since the start]; returns it."""
        T = self.city.ego(stamp / 1e6)
        row = {"token": self.id("ego_pose", *words), "timestamp": self.start + stamp, "rotation": quaternion(T[:3, :3]),
               "translation": [float(v) for v in T[:3, 3]]}
        self.rows["ego_pose"].append(row)
        return row

    def data(self, channel: str, stamp: int, sample: str, key: bool) -> tuple[dict, np.ndarray]:
        """A sample_data row with its ego pose -> row, T_global_sensor."""
        camera = channel != "LIDAR_TOP"
        pose = self.pose(stamp, channel, stamp)
        row = {"token": pose["token"], "sample_token": sample, "ego_pose_token": pose["token"],
               "calibrated_sensor_token": self.id("calibrated_sensor", channel), "timestamp": self.start + stamp,
               "fileformat": "jpg" if camera else "pcd", "is_key_frame": key,
               "height": self.settings.image[0] if camera else 0, "width": self.settings.image[1] if camera else 0,
               "filename": f"{'samples' if key else 'sweeps'}/{channel}/{self.logfile}__{channel}__{self.start + stamp}"
                           f".{'jpg' if camera else 'pcd.bin'}", "prev": "", "next": ""}
        self.rows["sample_data"].append(row)
        return row, matrix(pose) @ matrix(self.calibration[channel])

    # files
    def record(self) -> None:
        """The whole scene, all but rows.json."""
        jitter = self.rng.uniform(-400, 400, self.settings.keyframes)
        stamps = [500_000 * k + int(round(jitter[k] * (k > 0))) for k in range(self.settings.keyframes)]      # [us]
        path = np.stack([self.city.ego(s / 1e6)[:2, 3] for s in stamps])
        self.surfaces = Surfaces(self.city, path)
        for k, stamp in enumerate(stamps):
            self.keyframe(k, stamp)
            if k + 1 < len(stamps):
                gap = stamps[k + 1] - stamp
                for j in range(self.settings.sweeps):
                    self.lidar(stamp + gap * (j + 1) // (self.settings.sweeps + 1), self.id("sample", k + 1), False)
            self.tick()
        self.labels()
        self.annotate()
        self.map()
        self.link(stamps)
        for file in self.written:
            file.result()
        self.writer.shutdown()

    def write(self, name: Path | str, data: bytes) -> None:
        """A sensor file, without fsync: a scene counts once its rows.json is there, written last, after a sync."""
        path = self.root / name
        if path.parent not in self.folders:
            path.parent.mkdir(parents=True, exist_ok=True)
            self.folders.add(path.parent)
        path.write_bytes(data)

    def write_arrays(self, name: str, **arrays: np.ndarray) -> None:
        """An npz file, in the background; `record` waits for it."""
        self.written.append(self.writer.submit(write_npz, self.root / name, **arrays))

    def lidar(self, stamp: int, sample: str, key: bool):
        """Casts and writes one sweep -> points (M, 5), lidarseg classes (M,), sample_data token."""
        row, T = self.data("LIDAR_TOP", stamp, sample, key)
        rng = np.random.default_rng([self.settings.seed, self.number, 2, stamp])
        points, kind = sweep(self.city, stamp / 1e6, T, rng)
        self.write(row["filename"], points.tobytes())
        return points, kind, row["token"]

    def keyframe(self, k: int, stamp: int) -> None:
        """One sample: sweep, six images with exact maps, masks, surface voxels, solids, annotations."""
        settings, sample, t = self.settings, self.id("sample", k), stamp / 1e6
        self.rows["sample"].append({"token": sample, "timestamp": self.start + stamp, "prev": "", "next": "",
                                    "scene_token": self.id("scene")})
        points, kind, data_token = self.lidar(stamp, sample, True)
        name = f"lidarseg/{settings.version}/{data_token}_lidarseg.bin"
        self.write(name, kind.tobytes())
        self.rows["lidarseg"].append({"token": data_token, "sample_data_token": data_token, "filename": name})
        T_global_ego = matrix(self.rows["ego_pose"][-1])
        T_ego_global = inverse(T_global_ego)
        T_ego_lidar = matrix(self.calibration["LIDAR_TOP"])
        returns = move(T_ego_lidar, np.ascontiguousarray(points[:, :3].T, np.float64))       # (3, M), reference ego
        mask_lidar = seen_voxels(T_ego_lidar[:3, 3], returns)

        mask_camera = np.zeros(SHAPE, bool)
        count = len(self.city.actors)
        pixels, covered = np.zeros(count + 1, np.int64), np.zeros(count, np.int64)
        moving = np.array([False] + [a.path is not None for a in self.city.actors])          # by actor + 1
        hits, classes = [returns], [kind]
        for channel in CAMERAS:
            trigger = stamp - int(round(1000 * (CAMERA_LAYOUT[channel][7] + self.rng.uniform(-0.4, 0.4))))
            row, T_global_cam = self.data(channel, trigger, sample, True)
            K = np.array(self.calibration[channel]["camera_intrinsic"])
            image = photograph(self.city, trigger / 1e6, K, T_global_cam, settings.image, self.rng, True)
            stem = Path(row["filename"]).stem
            self.write(row["filename"], jpeg(image.color))
            self.write(f"exact/depth/{channel}/{stem}.png", png(image.depth))
            self.write(f"exact/semantic/{channel}/{stem}.png", png(self.classes[image.semantic]))
            self.write(self.staging.relative_to(self.root) / f"{channel}/{stem}.png", png(image.instance))
            T_ego_cam = T_ego_global @ T_global_cam
            ends = camera_ends(image.depth, K, T_ego_cam)
            mask_camera |= seen_voxels(T_ego_cam[:3, 3], ends)
            fixed = np.nonzero((image.depth[::2, ::2] > 0) & ~moving[image.instance[::2, ::2]])
            hits.append(ends[:, fixed[0] * image.depth[::2, ::2].shape[1] + fixed[1]])
            classes.append(image.semantic[::2, ::2][fixed])
            pixels += np.bincount(image.instance.ravel(), minlength=count + 1)
            covered[:len(image.covered)] += image.covered
            self.camera_sweeps(channel, trigger, sample)
        self.visible.append(np.where(covered > 0, pixels[1:] / np.maximum(covered, 1), 0.0))
        mobile = self.city.mobile_at(t)
        shell = self.surfaces.voxels(mobile, T_global_ego)
        shell = add_hits(shell, np.concatenate(hits, 1), np.concatenate(classes), T_global_ego)
        self.frames.append(Keyframe(t, sample, T_global_ego, mask_camera, mask_lidar, shell))
        solid = self.surfaces.solids(mobile, T_global_ego, shell, self.classes)
        self.write_arrays(f"exact/solid/{self.name}/{sample}.npz", semantics=solid)
        self.annotations_of(k, move(T_global_ego, returns))

    @property
    def staging(self) -> Path:
        """Where the scene keeps what the finished tree does not have."""
        return self.root / "exact" / "building" / self.name

    def camera_sweeps(self, channel: str, trigger: int, sample: str) -> None:
        """One image 1/12 s before the keyframe's and one after."""
        if self.settings.camera_sweeps:
            for offset in (-83_333, 83_333):
                row, T = self.data(channel, trigger + offset, sample, False)
                K = np.array(self.calibration[channel]["camera_intrinsic"])
                image = photograph(self.city, (trigger + offset) / 1e6, K, T, self.settings.image, self.rng, False)
                self.write(row["filename"], jpeg(image.color))

    def annotations_of(self, k: int, points: np.ndarray) -> None:
        """sample_annotation rows of keyframe k. points (3, M): its returns in global."""
        frame, city = self.frames[k], self.city
        points = points[:, np.argsort(points[0], kind="stable")]       # by x: an object's candidates are a slice
        for index, actor in enumerate(city.actors):
            if index == 0:
                continue
            x, y, yaw, speed, _ = actor.state(frame.t)
            if np.hypot(x - frame.T_global_ego[0, 3], y - frame.T_global_ego[1, 3]) > ANNOTATED:
                continue
            length, width, height = (round(v, 3) for v in actor.model.size)
            z = city.pose(index, frame.t)[2, 3]
            center = rounded([x, y, z + height / 2], 3)
            reach = np.hypot(length, width) / 2
            near = slice(*np.searchsorted(points[0], [center[0] - reach, center[0] + reach]))
            dx, dy, dz = (points[i, near] - center[i] for i in range(3))
            inside = (np.abs(dx * np.cos(yaw) + dy * np.sin(yaw)) <= length / 2) & \
                (np.abs(dy * np.cos(yaw) - dx * np.sin(yaw)) <= width / 2) & (np.abs(dz) <= height / 2)
            share = self.visible[k][index]
            attribute = self.attribute(actor, speed)
            self.rows["sample_annotation"].append({
                "token": self.id("annotation", k, index), "sample_token": frame.token,
                "instance_token": self.id("instance", index),
                "visibility_token": str(1 + int(np.searchsorted([0.4, 0.6, 0.8], share, side="right"))),
                "attribute_tokens": [token(self.settings.seed, "attribute", attribute)] if attribute else [],
                "translation": center, "size": [width, length, height],
                "rotation": [float(np.cos(yaw / 2)), 0.0, 0.0, float(np.sin(yaw / 2))], "prev": "", "next": "",
                "num_lidar_pts": int(inside.sum()), "num_radar_pts": 0})

    @staticmethod
    def attribute(actor, speed: float) -> str:
        """An annotation's attribute name, or none."""
        name = LIDARSEG_NAMES[actor.model.semantic]
        if name in ("vehicle.bicycle", "vehicle.motorcycle"):
            return actor.attribute or "cycle.with_rider"
        if name.startswith("vehicle."):
            return actor.attribute or ("vehicle.moving" if speed > 0.2 else "vehicle.stopped")
        if name.startswith("human.") and name not in ("human.pedestrian.stroller",
                                                      "human.pedestrian.personal_mobility"):
            return actor.attribute or "pedestrian.moving"
        return ""

    def labels(self) -> None:
        """gts of every keyframe, once all masks are known."""
        self.counts = np.zeros((3, 18), np.int64)                                            # as label_statistics
        self.shares = np.zeros(5)
        for k, frame in enumerate(self.frames):
            seen = observed(self.city, self.frames, k)
            semantics = np.full(np.prod(SHAPE), FREE, np.uint8)
            semantics[frame.shell.voxel[seen]] = self.classes[frame.shell.semantic[seen]]
            semantics = semantics.reshape(SHAPE)
            self.write_arrays(f"gts/{self.name}/{frame.token}/labels.npz", semantics=semantics,
                              mask_lidar=frame.mask_lidar.astype(np.uint8),
                              mask_camera=frame.mask_camera.astype(np.uint8))
            counts, shares = label_statistics(semantics, frame.mask_camera, frame.mask_lidar)
            self.counts += counts
            self.shares += shares

    def annotate(self) -> None:
        """instance rows and the chains of annotations."""
        by_instance: dict[str, list[dict]] = {}
        for row in self.rows["sample_annotation"]:
            by_instance.setdefault(row["instance_token"], []).append(row)
        self.instance_row = np.zeros(len(self.city.actors) + 1, np.uint16)                   # actor + 1 -> 1 + row
        for index, actor in enumerate(self.city.actors):
            rows = by_instance.get(self.id("instance", index), [])
            if rows:
                chain(rows)
                self.rows["instance"].append({
                    "token": rows[0]["instance_token"],
                    "category_token": token(self.settings.seed, "category", LIDARSEG_NAMES[actor.model.semantic]),
                    "nbr_annotations": len(rows), "first_annotation_token": rows[0]["token"],
                    "last_annotation_token": rows[-1]["token"]})
                self.instance_row[index + 1] = len(self.rows["instance"])

    def map(self) -> None:
        """The semantic prior: driveable surface as 255, 0.1 m, row 0 at the highest y."""
        ground, size = self.city.ground, round(10 * self.city.ground.size)
        M = np.float64([[0.1 / CELL, 0, 0], [0, -0.1 / CELL, size * 0.1 / CELL]])            # mask pixel -> node
        edge = np.clip(128 - 100 * ground.edges, 0, 255).astype(np.uint8)                    # 1 cm steps near the edge
        mask = cv2.warpAffine(edge, M, (size, size), flags=cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP,
                              borderMode=cv2.BORDER_REPLICATE)
        name = self.id("map")
        self.write(f"maps/{name}.png", png(cv2.threshold(mask, 127, 255, cv2.THRESH_BINARY)[1]))
        self.rows["map"].append({"category": "semantic_prior", "token": name, "filename": f"maps/{name}.png",
                                 "log_tokens": [self.id("log")]})

    def link(self, stamps: list[int]) -> None:
        """Chains of samples and sensors; the log and scene rows."""
        rows, city = self.rows, self.city
        chain(rows["sample"])
        by_sensor: dict[str, list[dict]] = {}
        for row in rows["sample_data"]:
            by_sensor.setdefault(row["calibrated_sensor_token"], []).append(row)
        for data in by_sensor.values():
            chain(sorted(data, key=lambda row: row["timestamp"]))
        rows["log"].append({"token": self.id("log"), "logfile": self.logfile, "vehicle": self.logfile[:4],
                            "date_captured": self.logfile[5:15], "location": self.location})
        rows["scene"].append({"token": self.id("scene"), "log_token": self.id("log"), "nbr_samples": len(stamps),
                              "first_sample_token": rows["sample"][0]["token"],
                              "last_sample_token": rows["sample"][-1]["token"], "name": self.name,
                              "description": f"Synthetic, {city.weather}, {city.style.name}, {city.plan}"})



def record_scene(root: Path, settings: Settings, index: int, tick=tick_keyframe) -> None:
    """Writes one scene's files and, last, its rows into exact/building/<scene>/rows.json."""
    recorder = Recorder(root, settings, index, tick)
    recorder.record()
    os.sync()
    write_json(recorder.staging / "rows.json", {"rows": recorder.rows, "instance_row": recorder.instance_row.tolist(),
                                                "counts": recorder.counts.tolist(), "shares": recorder.shares.tolist()},
                                                indent=None)


# --- the world --------------------------------------------------------------------------------------------------------

# version, keyframes a scene, camera sweeps a keyframe
SIZES = {"mini": ("v1.0-mini", 20, 0), "demo": ("v1.0-trainval", 2, 0), "claims": ("v1.0-trainval", 30, 2),
         "questions": ("v1.0-trainval", 12, 0)}
SCENES = {"demo": (61, 13), "claims": (24, 10), "questions": (150, 40)}    # training and validation scenes


def scene_names(size: str, scenes: int | None) -> list[str]:
    """The devkit's own names. mini: its ten, a fewer number keeps one of mini_val; demo, claims: from train and val."""
    try:
        from nuscenes.utils.splits import mini_train, mini_val, train, val
    except ImportError as error:
        raise InputError(f"nuscenes-devkit is not installed ({error}): pip install nuscenes-devkit") from error
    if size == "mini":
        count = 10 if scenes is None else scenes
        if not 1 <= count <= 10:
            raise InputError(f"--scenes {count}: a mini world has 1 to 10 scenes")
        held = 1 if count < 6 else 2
        return sorted([*mini_val[:held], *mini_train[:count - held]])
    training, validation = SCENES[size]
    count = training + validation if scenes is None else scenes
    if not 2 <= count <= len(train) + len(val):
        raise InputError(f"--scenes {count}: a {size} world has 2 to {len(train) + len(val)} scenes")
    held = max(1, round(count * validation / (training + validation)))
    spread = lambda names, n: [names[i * len(names) // n] for i in range(n)]    # noqa: E731
    return sorted([*spread(sorted(train), count - held), *spread(sorted(val), held)])


def make_world(out: Path | str, seed: int = 0, size: str = "mini", scenes: int | None = None,
               keyframes: int | None = None, sweeps: int = 2, camera_sweeps: int | None = None,
               image: tuple[int, int] = (224, 400), workers: int | None = None, decoys: bool = False) -> Path:
    """Writes the world into `out` unless it is there already. image is (H, W). Returns `out`.

    A finished world with the same settings is left alone; an unfinished one goes on with the scenes that it lacks.
    Raises InputError if the settings make no sense or `out` holds anything else.
    """
    from tqdm import tqdm

    from data.driving.questions import make_questions

    out = Path(out)
    if size not in SIZES:
        raise InputError(f"--size {size}: it is one of {', '.join(SIZES)}")
    version, default_keyframes, default_camera = SIZES[size]
    keyframes = default_keyframes if keyframes is None else keyframes
    camera_sweeps = default_camera if camera_sweeps is None else camera_sweeps
    for flag, value, low, high in (
            ("--keyframes", keyframes, 1, 200), ("--sweeps", sweeps, 0, 9), ("--seed", seed, 0, 2**31 - 1),
            ("--image height", image[0], 16, 4096), ("--image width", image[1], 16, 4096),
            ("--workers", 1 if workers is None else workers, 1, 1024)):
        if not low <= value <= high:
            raise InputError(f"{flag} {value}: it must be from {low} to {high}")
    if camera_sweeps not in (0, 2):
        raise InputError(f"--camera-sweeps {camera_sweeps}: it is 0, or 2 (one before and one after each keyframe)")
    settings = Settings(seed, size, version, scene_names(size, scenes), keyframes, sweeps, camera_sweeps, tuple(image),
                        decoys)
    if not claim_folder(out, settings):
        print(f"world {out}: there already ({len(settings.scenes)} scenes x {keyframes} keyframes)")
        return out

    started = time.time()
    building = out / "exact" / "building"
    todo = [i for i, name in enumerate(settings.scenes) if not (building / name / "rows.json").is_file()]
    workers = min(workers or os.cpu_count() or 1, max(len(todo), 1))
    with tqdm(total=len(todo) * keyframes, unit="keyframe", desc=f"world {out.name}") as bar:  # in a log: one line
        record_all(record_scene, out, settings, todo, workers, bar)
    made = len(todo) * keyframes
    recorded = time.time() - started
    results = [read_json(building / name / "rows.json") for name in settings.scenes]
    _write_instances(out, settings, results)
    write_tables(out / version, seed, [r["rows"] for r in results])
    make_questions(out, version, seed, balanced=size == "questions")
    write_json(out / "exact" / "world.json", describe_world(settings))
    shutil.rmtree(building, ignore_errors=True)                        # another run may clean up too
    if made:
        print(f"world {out}: {made} keyframes in {recorded:.0f} s, {made / recorded:.2f} keyframes/s with {workers} "
              f"process{'es' if workers > 1 else ''}; {time.time() - started:.0f} s in all")
    shares = np.sum([r["shares"] for r in results], 0) / (len(results) * keyframes)
    print_shares(np.sum([r["counts"] for r in results], 0), shares)
    return out


def _write_instances(out: Path, settings: Settings, results: list[dict]) -> None:
    """Instance maps get their final values, 1 + row of instance.json, once every scene's number of rows is known."""

    def finish(path: Path, table: np.ndarray) -> None:
        folder = out / "exact" / "instance" / path.parent.name
        folder.mkdir(parents=True, exist_ok=True)
        (folder / path.name).write_bytes(png(table[cv2.imread(str(path), cv2.IMREAD_UNCHANGED)]))

    before = 0
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for name, result in zip(settings.scenes, results):
            rows = np.array(result["instance_row"], np.uint32)
            table = np.where(rows > 0, rows + before, 0).astype(np.uint16)
            paths = sorted((out / "exact" / "building" / name).glob("*/*.png"))
            list(pool.map(finish, paths, [table] * len(paths)))
            before += len(result["rows"]["instance"])
    os.sync()                                                          # before world.json says that all is there


def print_shares(counts: np.ndarray, shares: np.ndarray) -> None:
    """The share table; beside it a real label file's, where the developer's samples are at hand."""
    from common.nuscenes import OCC3D_CLASSES

    real = Path(__file__).resolve().parents[3] / "shared" / "real" / "occ3d" / "labels.npz"
    columns = [("world", counts, shares)]
    if real.is_file():
        label = read_npz(real, {key: (SHAPE, "uint8") for key in ("semantics", "mask_camera", "mask_lidar")})
        statistics = label_statistics(label["semantics"], label["mask_camera"], label["mask_lidar"])
        columns.append(("one real frame", *statistics))
    print(f"{'share [%]':28s}" + "".join(f"{name:>16s}" for name, _, _ in columns))
    lines = ("seen by cameras", "seen by LiDAR", "seen by either", "occupied", "unseen voxels that are free")
    for i, name in enumerate(lines):
        print(f"{name:28s}" + "".join(f"{100 * s[i]:16.2f}" for _, _, s in columns))
    print(f"{'class: of the occupied':28s}" + "".join(f"{'all':>8s}{'interior':>8s}" for _ in columns))
    for c in range(FREE):
        cells = ""
        for _, n, _ in columns:
            interior = f"{100 * n[2, c] / n[0, c]:.1f}" if n[0, c] else "-"
            cells += f"{100 * n[0, c] / max(n[0, :FREE].sum(), 1):8.3f}{interior:>8s}"
        print(f"  {OCC3D_CLASSES[c]:26s}{cells}")


