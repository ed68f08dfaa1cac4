"""nuScenes, Occ3D, lidarseg and NuScenes-QA -> frames. The only module that knows the tables.

The official nuscenes-devkit reads the tables once; what is needed afterwards lies as memory-mapped arrays in a cache
folder, so opening trainval (2.6 million sample_data rows) costs milliseconds, workers share the pages, and neither the
devkit nor any table's JSON is touched again until a table changes. The dataset's own folder is never written.

    dataset = NuScenesOccupancy("data/nuscenes", split="mini_val", image_size=(224, 400))
    frame = dataset[0]                       # torch tensors; `stack([dataset[0], dataset[1]])` makes a batch
    python -m common.nuscenes check --data-root data/nuscenes

FRAMES   The reference of a frame is the ego pose at its LIDAR_TOP timestamp (x forward, y left, z up). Each camera and
         sweep is brought there through global at both timestamps:
         T_ego_cam = inv(T_global_ego(t_lidar)) @ T_global_ego(t_cam) @ T_ego_cam(static).
PIXELS   (0, 0) is the outer corner of the first pixel; resizing scales K's first two rows and nothing else. That
         nuScenes' own intrinsics mean this is an assumption (they do not say).
RESIZING PIL: JPEG decoding at 1/2, 1/4 or 1/8 scale where that is still at least as large as the wanted size, then
         the area-weighted ("antialiased") bilinear filter.
"""

import argparse
import hashlib
import json
import os
import sys
import tempfile
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from common.files import (InputError, atomic, exit_on_input_error, is_component, misfit, note, open_image, read_json,
                          read_npz, reading, short_hash, sweep, to_rgb, write_json)

CAMERAS = ("CAM_FRONT", "CAM_FRONT_RIGHT", "CAM_BACK_RIGHT", "CAM_BACK", "CAM_BACK_LEFT", "CAM_FRONT_LEFT")
CHANNELS = CAMERAS + ("LIDAR_TOP",)  # the sensors that are read; radar rows are left out of the cache
LIDAR = len(CAMERAS)  # LIDAR_TOP's place in CHANNELS

OCC3D_CLASSES = (
    "others", "barrier", "bicycle", "bus", "car", "construction_vehicle", "motorcycle", "pedestrian", "traffic_cone",
    "trailer", "truck", "driveable_surface", "other_flat", "sidewalk", "terrain", "manmade", "vegetation", "free",
)  # fmt: skip
FREE = 17
DETECTION_CLASSES = OCC3D_CLASSES[1:11]  # nuScenes' ten detection classes are Occ3D ids 1..10

# Raw lidarseg id (index of the 32-class category.json) -> Occ3D id: the official lidarseg challenge's merge, whose
# "ignore" is 0 here ("others"). Noise (raw 0) and the ego vehicle (raw 31) also become 0; `lidarseg(i, raw=True)` tells
# them apart.
LIDARSEG_TO_OCC3D = np.array(
    [0, 0, 7, 7, 7, 0, 7, 0, 0, 1, 0, 0, 8, 0, 2, 3, 3, 4, 5, 0, 0, 6, 9, 10, 11, 12, 13, 14, 15, 0, 16, 0], np.uint8
)

# nuScenes-lidarseg's classes in the order of their own numbers, 0..31
LIDARSEG_CLASSES = (
    "noise", "animal", "human.pedestrian.adult", "human.pedestrian.child", "human.pedestrian.construction_worker",
    "human.pedestrian.personal_mobility", "human.pedestrian.police_officer", "human.pedestrian.stroller",
    "human.pedestrian.wheelchair", "movable_object.barrier", "movable_object.debris",
    "movable_object.pushable_pullable", "movable_object.trafficcone", "static_object.bicycle_rack", "vehicle.bicycle",
    "vehicle.bus.bendy", "vehicle.bus.rigid", "vehicle.car", "vehicle.construction", "vehicle.emergency.ambulance",
    "vehicle.emergency.police", "vehicle.motorcycle", "vehicle.trailer", "vehicle.truck", "flat.driveable_surface",
    "flat.other", "flat.sidewalk", "flat.terrain", "static.manmade", "static.other", "static.vegetation", "vehicle.ego",
)  # fmt: skip
UNPLACED = 255  # in `lidarseg_table`: a number of the tree that is no class of nuScenes-lidarseg

STEP = 0.5  # [s] between nuScenes' keyframes
FUTURE_STEPS, HISTORY_STEPS = 6, 4  # keyframes
PARTS = ("images", "points", "labels", "boxes", "future", "questions")
GTS_FOLDERS = ("gts", "occ3d/gts", "occ3d")  # OccNeRF and FlashOcc, SparseOcc's with and without Occ3D's own folder
QUESTION_FOLDERS = ("questions", "NuScenes-QA/data/questions", "NuScenes-QA/questions", "NuScenes-QA")

FAR = 1e8  # [m] no pose is further from its origin (UTM's go to 1e7)
TABLES = (
    "category", "attribute", "visibility", "instance", "sensor", "calibrated_sensor", "ego_pose", "log", "scene",
    "sample", "sample_data", "sample_annotation", "map",
)  # fmt: skip
CACHE_FORMAT = 4  # raise when the arrays below change: old caches are then made again
_VERSION_SPLITS = {
    "mini": ("mini_train", "mini_val"),
    "trainval": ("train", "val", "train_detect", "train_track"),
    "test": ("test",),
}


class Boxes(NamedTuple):
    """Annotated boxes of one keyframe in the reference ego frame, in the tables' order. All numpy."""

    center: np.ndarray  # (B, 3) float64 [m]
    size: np.ndarray  # (B, 3) float64 width, length, height [m]; length lies along the box's own x axis
    yaw: np.ndarray  # (B,) float64 [rad] heading of the box's x axis, counter-clockwise from ego x
    velocity: np.ndarray  # (B, 2) float64 [m/s] along ego x, y; nan where undefined (devkit's box_velocity rule)
    names: list[str]  # category names, e.g. "vehicle.car"
    labels: np.ndarray  # (B,) uint8 Occ3D id 1..10 of the detection class; 0: the category is in none of the ten
    tokens: list[str]  # sample_annotation tokens
    instance: np.ndarray  # (B,) int64 row of the instance table: the same object keeps it over time
    num_lidar_pts: np.ndarray  # (B,) int64
    visibility: np.ndarray  # (B,) int64 nuScenes' level 1..4 (0-40, 40-60, 60-80, 80-100 %); 0: not given
    attributes: list[str]  # first attribute's name, e.g. "vehicle.moving"; "" where there is none
    T_ego_box: np.ndarray  # (B, 4, 4) float64 full pose: real ego poses pitch and roll, so `yaw` alone is rounded


class Future(NamedTuple):
    """Where the ego and the boxes go, in nuScenes' LIDAR_TOP frame of this keyframe (x right, y forward), as VAD's.

    The ego is the LIDAR_TOP origin. Positions, not displacements; steps are keyframes (0.5 s). After the scene's last
    keyframe a row repeats the last known position and its mask is 0.
    """

    trajectory: np.ndarray  # (6, 2) float32 [m]
    mask: np.ndarray  # (6,) bool
    history: np.ndarray  # (4, 2) float32 [m] positions at -2.0, -1.5, -1.0, -0.5 s
    history_mask: np.ndarray  # (4,) bool; where False the nearest known displacement was repeated (VAD's rule)
    command: int  # 0 right (last trajectory x >= 2 m), 1 left (<= -2 m), 2 straight: VAD's rule and order
    speed: float  # [m/s] planar, since the previous keyframe (a scene's first: to the next); ours, VAD reads CAN
    agents: np.ndarray  # (B, 6, 2) float32 [m] displacement of each box's centre from now, rows as in Boxes
    agents_yaw: np.ndarray  # (B, 6) float32 [rad] heading change from now, in (-pi, pi]
    agents_mask: np.ndarray  # (B, 6) bool


class Sweep(NamedTuple):
    """One LIDAR_TOP sweep of a scene, a keyframe's or one between two; its points: `NuScenesOccupancy.sweep_points`."""

    file: str  # path relative to the root
    time: int  # [us]
    T_global_ego: np.ndarray  # (4, 4) float64 ego pose at the sweep's own time
    T_ego_lidar: np.ndarray  # (4, 4) float64, static
    keyframe: int  # dataset index of the keyframe whose sweep this is, -1 between keyframes


class Frame(NamedTuple):
    """One keyframe as torch tensors; what the tree does not have (or `parts` leaves out) is None."""

    token: str  # sample token
    scene: str  # scene name
    images: Tensor | None  # (N, 3, H, W) float32 RGB in [0, 1], cameras in CAMERAS order
    K: Tensor  # (N, 3, 3) float32 [px], for images of this size
    T_ego_cam: Tensor  # (N, 4, 4) float32, reference ego <- camera, computed in float64
    points: Tensor | None  # (M, 5) float32 x, y, z [m] in the reference ego, intensity 0..255, ring
    T_global_ego: Tensor  # (4, 4) float64
    semantics: Tensor | None = None  # (200, 200, 16) uint8 Occ3D ids
    mask_camera: Tensor | None = None  # (200, 200, 16) bool
    mask_lidar: Tensor | None = None  # (200, 200, 16) bool
    boxes: Boxes | None = None
    future: Future | None = None
    questions: list[dict] | None = None  # NuScenes-QA rows of this keyframe
    history: Tensor | None = None  # (M', 5) like points, of the earlier sweeps that the dataset was opened for


def stack(frames: list[Frame]) -> dict:
    """Frames -> a batch: torch tensors with a leading B where shapes agree, plain lists for the rest.

    images (B, N, 3, H, W), K, T_ego_cam, T_global_ego (float64), semantics (uint8), mask_camera, mask_lidar (bool);
    lists: token, scene, points (tensors), boxes, future, questions. A field that is None in any frame is left out.
    """
    batch = {}
    for name in Frame._fields:
        values = [getattr(frame, name) for frame in frames]
        if any(value is None for value in values):
            continue
        if isinstance(values[0], torch.Tensor) and name != "points":
            values = torch.stack(values)
        batch[name] = values
    return batch


def check_parts(parts: tuple[str, ...], known: tuple[str, ...], image_size: tuple[int, int] | None) -> None:
    """Raises InputError if a reader is opened for a part that it does not know, or for images of no size."""
    if unknown := set(parts) - set(known):
        raise InputError(f"parts: unknown {', '.join(sorted(unknown))}; choose from {', '.join(known)}")
    if image_size is not None and (len(image_size) != 2 or min(image_size) < 1):
        raise InputError(f"image size {image_size}: expected height and width, both at least 1")


def read_frame(dataset, i: int) -> Frame:
    """Frame i of either reader, with what its `parts` name."""
    if not -len(dataset) <= i < len(dataset):
        raise IndexError(f"frame {i} of {len(dataset)}")
    i = range(len(dataset))[i]
    fields = dict(zip(("K", "T_ego_cam", "T_global_ego"), dataset.calibration(i)))
    if "points" in dataset.parts:
        fields["points"] = dataset.points(i, dataset.history)
        if dataset.history:
            own = len(dataset.points(i))
            fields["points"], fields["history"] = fields["points"][:own], fields["points"][own:]
    if "labels" in dataset.parts:
        fields |= zip(("semantics", "mask_camera", "mask_lidar"), dataset.labels(i) or ())
    fields |= {name: getattr(dataset, name)(i) for name in dataset.parts if name not in ("points", "labels")}
    tensors = {name: torch.from_numpy(x) if isinstance(x, np.ndarray) else x for name, x in fields.items()}
    return Frame(dataset.tokens[i], dataset.scene_names[i], **{"images": None, "points": None} | tensors)


def read_images(paths: list[Path], native: tuple[int, int], size: tuple[int, int]) -> np.ndarray:
    """-> (N, 3, H, W) float32 RGB in [0, 1] by `read_resized`."""
    images = np.empty((len(paths), 3, *size), np.float32)
    for path, image in zip(paths, images):
        np.divide(read_resized(path, native, size).transpose(2, 0, 1), np.float32(255), out=image)
    return images


# --- rigid transforms of the tables' float64 arrays ------------------------------------------------------------------


def pose_matrix(pose: np.ndarray) -> np.ndarray:
    """(..., 7) translation [m] and quaternion wxyz -> (..., 4, 4) float64; quaternions are normalised first."""
    pose = np.asarray(pose, np.float64)
    w, x, y, z = np.moveaxis(pose[..., 3:] / np.linalg.norm(pose[..., 3:], axis=-1, keepdims=True), -1, 0)
    T = np.zeros(pose.shape[:-1] + (4, 4))
    T[..., 0, 0], T[..., 0, 1], T[..., 0, 2] = 1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)
    T[..., 1, 0], T[..., 1, 1], T[..., 1, 2] = 2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)
    T[..., 2, 0], T[..., 2, 1], T[..., 2, 2] = 2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)
    T[..., :3, 3] = pose[..., :3]
    T[..., 3, 3] = 1
    return T


def rigid_inverse(T: np.ndarray) -> np.ndarray:
    """(..., 4, 4) rotation and translation -> its inverse."""
    inverse = np.zeros_like(T)
    inverse[..., :3, :3] = np.swapaxes(T[..., :3, :3], -1, -2)
    inverse[..., :3, 3] = -np.einsum("...ij,...j->...i", inverse[..., :3, :3], T[..., :3, 3])
    inverse[..., 3, 3] = 1
    return inverse


def detection_class(category: str) -> int:
    """Category name -> Occ3D id 1..10 of its detection class by the devkit's own table, 0 if it has none."""
    category_to_detection_name = _devkit("nuscenes.eval.detection.utils").category_to_detection_name
    name = category_to_detection_name(category)
    return 0 if name is None else OCC3D_CLASSES.index(name)


# --- where things lie ------------------------------------------------------------------------------------------------


def find_root(root: Path | str) -> Path:
    """-> the folder that holds `v1.0-*`: `root` itself or `root/nuscenes` (OccNeRF's nesting)."""
    root = Path(root)
    if not root.is_dir():
        raise InputError(f"{root}: no such folder; give --data-root the folder that holds v1.0-mini or v1.0-trainval")
    kitti = next((name for name in ("sequences", "dataset/sequences") if (root / name).is_dir()), None)
    for folder in (root, root / "nuscenes"):
        if any(path.is_dir() for path in folder.glob("v1.0-*")):
            if kitti:
                raise InputError(f"{root}: holds both v1.0-* (nuScenes) and {kitti}/ (SemanticKITTI); give one of them")
            return folder
    if kitti:
        raise InputError(f"{root}: holds {kitti}/, which is SemanticKITTI, not nuScenes (no v1.0-* folder)")
    raise InputError(f"{root}: no v1.0-* folder, so not a nuScenes tree; data/README.md shows the expected layout")


def find_version(root: Path, version: str | None = None) -> str:
    """-> `version` if the tree has it, or without one the only version there is."""
    present = sorted(path.name for path in root.glob("v1.0-*") if path.is_dir())
    if version is None:
        if len(present) > 1:
            raise InputError(f"{root}: several versions ({', '.join(present)}); choose one with --version")
        return present[0]
    if version not in present:
        raise InputError(f"{root}: no version '{version}' here; it holds {', '.join(present)}")
    return version


def default_cache() -> Path:
    """The user's cache folder for parsed tables: $XDG_CACHE_HOME/minocc or ~/.cache/minocc; without a home, one
    of this user's in the system's temporary folder."""
    if given := os.environ.get("XDG_CACHE_HOME"):
        return Path(given) / "minocc"
    try:
        return Path.home() / ".cache" / "minocc"
    except RuntimeError:  # a container's user without an entry in passwd
        folder = Path(tempfile.gettempdir()) / f"minocc-{os.getuid()}"
        folder.mkdir(mode=0o700, exist_ok=True)
        if folder.stat().st_uid != os.getuid():
            raise InputError(f"{folder}: belongs to another user, and there is no home folder; give --cache") from None
        note(f"no home folder: tables are kept in {folder}; choose another with --cache or XDG_CACHE_HOME")
        return folder


def cache_folder(root: Path, version: str, cache: Path | str | None = None) -> Path:
    """The cache's place for these tables: named by a hash of their absolute paths, sizes and times."""
    folder = root / version
    names = [f"{table}.json" for table in TABLES]
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise InputError(f"{folder / missing[0]}: table not found ({len(missing)} of 13 missing); unpack it again")
    names += [name for name in ("lidarseg.json", "splits.json") if (folder / name).is_file()]
    return Path(cache or default_cache()) / f"nuscenes-{version}-{_fingerprint([folder / name for name in names])}"


def _fingerprint(paths: list[Path]) -> str:
    facts = [(str(p.resolve()), p.stat().st_size, p.stat().st_mtime_ns) for p in paths]
    return hashlib.sha256(json.dumps([CACHE_FORMAT, facts]).encode()).hexdigest()[:20]


# --- the cache: written once through the devkit, then memory-mapped --------------------------------------------------


def write_cache(folder: Path, arrays: dict[str, np.ndarray], meta: dict) -> None:
    """Writes <name>.npy and meta.json into a temporary folder and renames it; of two processes the first one wins.

    meta gets the arrays' names, shapes and types, so that `read_cache` opens exactly what was written.
    """
    arrays = {name: np.asarray(array) for name, array in arrays.items()}
    meta = meta | {"arrays": {name: [list(array.shape), array.dtype.str] for name, array in arrays.items()}}
    try:
        with atomic(folder, folder=True) as temporary:
            for name, array in arrays.items():
                with open(temporary / f"{name}.npy", "wb") as file:
                    np.lib.format.write_array(file, array, allow_pickle=False)
                    file.flush()
                    os.fsync(file.fileno())
            write_json(temporary / "meta.json", {"hash": short_hash(meta), "meta": meta}, indent=None)
    except OSError as error:
        if not (folder / "meta.json").is_file():  # else another process was faster, with the same content
            reason = f"cannot write the cache here ({error.strerror})"
            raise InputError(f"{folder.parent}: {reason}; free space or choose another with --cache") from error


def read_cache(folder: Path) -> tuple[dict[str, np.ndarray], dict]:
    """-> ({name: memory-mapped array}, meta). Constant time: no table is parsed, no row is visited."""
    sweep(folder.parent)
    with reading(folder / "meta.json", "the cache is damaged", "delete this folder, it is made again"):
        stored = read_json(folder / "meta.json", {"hash": str, "meta": {"arrays": {str: list}}})
        meta = stored["meta"]
        arrays = {name: np.load(folder / f"{name}.npy", mmap_mode="r", allow_pickle=False) for name in meta["arrays"]}
        found = meta | {"arrays": {name: [list(array.shape), array.dtype.str] for name, array in arrays.items()}}
        if short_hash(found) != stored["hash"]:
            raise ValueError("not as it was written")
    return arrays, meta


def _devkit(module: str):
    """Imports a module of the nuscenes-devkit, late: an open cache needs none of it (and it costs seconds)."""
    import importlib

    from PIL import Image

    limit = Image.MAX_IMAGE_PIXELS
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise InputError(f"cannot import {module} ({error}); pip install nuscenes-devkit==1.2.0") from error
    finally:
        Image.MAX_IMAGE_PIXELS = limit  # the devkit raises it to 160 gigapixels


class _Table:
    """Columns of one table, read by the devkit's own loader. Using a column frees it: trainval stays under 8 GB.

    (The devkit's constructor would hold all tables at once, index them and open the map images.)
    """

    def __init__(self, devkit, name: str, columns: str):
        self.name, self.path = name, Path(devkit.table_root) / f"{name}.json"
        with reading(self.path, "not valid JSON", "truncated? unpack nuScenes again"):
            records = devkit.__load_table__(name)
        if not isinstance(records, list) or not all(isinstance(record, dict) for record in records):
            raise InputError(f"{self.path}: not a list of records; unpack nuScenes again")
        try:
            self.columns = {
                column.rstrip("?"): [r.get(column[:-1]) if column[-1] == "?" else r[column] for r in records]
                for column in columns.split()
            }
        except KeyError as error:
            raise InputError(f"{self.path}: a record has no field {error}; unpack nuScenes again") from error
        self.token = self.strings("token")

    def refuse(self, bad: np.ndarray, why: str) -> None:
        """Raises InputError, naming the record, if any of `bad` (rows,) is True."""
        if bad.any():
            token = self.token[np.argmax(bad)].decode()
            more = f" ({bad.sum()} such records)" if bad.sum() > 1 else ""
            raise InputError(f"{self.path}: record '{token}' {why}{more}; mend the table")

    def __len__(self) -> int:
        return len(self.token)

    def take(self, column: str) -> list:
        return self.columns.pop(column)

    def strings(self, column: str) -> np.ndarray:
        """-> (rows,) fixed-width bytes."""
        try:
            return _bytes(self.take(column))
        except (AttributeError, UnicodeEncodeError) as error:
            raise InputError(f"{self.path}: '{column}' is not a string everywhere; unpack nuScenes again") from error

    def column(self, column: str, shape) -> list:
        """A column whose every value has the shape (`files.misfit`)."""
        values = self.take(column)
        if fault := misfit(values, [shape], column):
            raise InputError(f"{self.path}: {fault}; unpack nuScenes again")
        return values

    def numbers(self, column: str, width: int | None = None, dtype=np.float64) -> np.ndarray:
        """-> (rows,) or (rows, width) array."""
        values = self.take(column)
        try:
            if dtype is bool and not all(value in (False, True) for value in values):
                raise ValueError("neither true nor false")
            return np.array(values, dtype).reshape((len(self),) if width is None else (len(self), width))
        except (TypeError, ValueError, OverflowError) as error:
            raise InputError(f"{self.path}: '{column}' is not {width or 1} numbers everywhere ({error})") from error

    def pose(self) -> np.ndarray:
        """-> (rows, 7) translation [m], quaternion wxyz. InputError where that is no rigid transform."""
        place, turn = self.numbers("translation", 3), self.numbers("rotation", 4)
        with np.errstate(all="ignore"):
            length = np.linalg.norm(turn, axis=1)
            self.refuse(~(np.abs(place).max(1, initial=0) <= FAR), "has a translation that is not finite [m]")
            self.refuse(~((length > 1e-6) & (length < FAR)), "has a rotation that is no quaternion")
        return np.concatenate([place, turn], 1)

    def names(self, column: str, values: list[str]) -> None:
        """Raises InputError unless each value is a name that is one component of a path, and no two are equal."""
        for value in values:
            if not is_component(value):
                raise InputError(f"{self.path}: {column} '{value[:80]}' is no name of a single folder; rename it")
        if len(set(values)) < len(values):
            raise InputError(f"{self.path}: two records have the same {column}; mend the table")

    def files(self, column: str) -> list[str]:
        """Paths below the root, one a row. InputError on an absolute one, one that climbs, or none at all."""
        values = self.column(column, str)
        for value in values:
            climbs = value[:1] == "/" or "\\" in value or (".." in value and ".." in Path(value).parts)
            if climbs or not value.isprintable():
                raise InputError(f"{self.path}: {column} '{value[:80]}' leaves the dataset's folder; make it relative")
            if not value.strip("./"):
                raise InputError(f"{self.path}: {column} '{value[:80]}' names no file; mend the table")
        return values

    def join(self, column: str, other: "_Table", optional: bool = False) -> np.ndarray:
        """Row of `other` for each token in `column`; -1 for '', which is an error unless `optional`.

        A sorted search: no dictionary of millions of strings.
        """
        keys = self.strings(column)
        if not optional:
            self.refuse(keys == b"", f"has no {column}")
        rows = np.full(len(keys), -1, np.int64)
        given = np.flatnonzero(keys != b"")
        order = np.argsort(other.token, kind="stable")
        twice = np.zeros(len(other), bool)
        twice[order[1:]] = other.token[order[1:]] == other.token[order[:-1]]
        other.refuse(twice, "has the token of another record")
        place = np.searchsorted(other.token, keys[given], sorter=order)
        found = np.append(order, -1)[place]  # behind the last token: not there
        wrong = np.flatnonzero((found < 0) | (np.append(other.token, b"")[found] != keys[given]))
        if len(wrong):
            token = keys[given][wrong[0]].decode()
            raise InputError(f"{self.path}: {column} '{token}' is not in {other.name}.json; unpack nuScenes again")
        rows[given] = found
        return rows


def _bytes(values: list[str]) -> np.ndarray:
    """Strings -> fixed-width bytes."""
    return np.array([value.encode() for value in values], dtype=None if values else "S1")


def _texts(values: np.ndarray) -> list[str]:
    """Fixed-width bytes -> strings."""
    return [value.decode() for value in values.tolist()]


def _links(table: _Table, name: str, rows: np.ndarray, time: np.ndarray, arrays: dict) -> None:
    """prev and next of the kept `rows` of a table, renumbered to their new places; -1: none.

    time (kept rows,) [us]: a link that does not lead that way in time is refused (it could go round for ever).
    """
    place = np.full(len(table) + 1, -1, np.int32)  # the extra last entry maps -1 to itself
    place[rows] = np.arange(len(rows))
    for column, sign in (("prev", -1), ("next", 1)):
        links = arrays[f"{name}_{column}"] = place[table.join(column, table, optional=True)][rows]
        wrong = np.zeros(len(table), bool)
        wrong[rows[(links >= 0) & (sign * (time[links] - time) <= 0)]] = True
        table.refuse(wrong, f"has a '{column}' that does not lie {'before' if sign < 0 else 'after'} it in time")


def build_tables(root: Path, version: str) -> tuple[dict[str, np.ndarray], dict]:
    """The thirteen tables (and lidarseg.json, splits.json) -> the cache's arrays and meta.

    Samples are sorted by scene (scene.json's order) and time; annotations by sample, else in the table's order;
    sample_data keeps its order, without sensors other than CHANNELS. All joins are done here, once.
    """
    NuScenes = _devkit("nuscenes.nuscenes").NuScenes
    devkit = NuScenes.__new__(NuScenes)
    devkit.version, devkit.dataroot = version, str(root)
    arrays: dict[str, np.ndarray] = {}

    def read(name: str, columns: str) -> _Table:
        return _Table(devkit, name, columns)

    for name in ("visibility", "map"):  # nothing is taken from them, but a broken tree is told at once
        read(name, "token")

    sensor = read("sensor", "token channel")
    calibration = read("calibrated_sensor", "token sensor_token translation rotation camera_intrinsic")
    channel = np.array([CHANNELS.index(name) if name in CHANNELS else -1 for name in sensor.column("channel", str)], np.int8)
    calibration_channel = channel[calibration.join("sensor_token", sensor)]
    arrays["calibration"] = calibration.pose()
    calibration.columns["camera_intrinsic"] = [k or [[0] * 3] * 3 for k in calibration.take("camera_intrinsic")]
    K = arrays["intrinsics"] = calibration.numbers("camera_intrinsic", 9).reshape(-1, 3, 3)
    regular = (np.abs(K).max((1, 2), initial=0) <= FAR) & (np.minimum(K[:, 0, 0], K[:, 1, 1]) > 1e-3)  # nan: False
    regular &= np.isclose(K[:, 1, 0], 0, atol=1e-3) & np.isclose(K[:, 2], (0, 0, 1), atol=1e-6).all(1)
    camera = (calibration_channel >= 0) & (calibration_channel < LIDAR)
    calibration.refuse(camera & ~regular, "is a camera's without a camera_intrinsic [fx s cx; 0 fy cy; 0 0 1], f > 0")

    scene, log = read("scene", "token name log_token"), read("log", "token location")
    locations = [*log.column("location", str), ""]  # -1 finds the last: none
    of_log = scene.join("log_token", log, optional=True).tolist()
    names = scene.column("name", str)
    scene.names("name", names)
    scenes = [{"name": name, "location": locations[k]} for name, k in zip(names, of_log)]
    sample = read("sample", "token timestamp scene_token")
    sample.names("token", _texts(sample.token))
    time, of_scene = sample.numbers("timestamp", dtype=np.int64), sample.join("scene_token", scene)
    order = np.lexsort((time, of_scene))
    sample_place = np.argsort(order)  # table row -> row here
    arrays["sample_token"], arrays["sample_scene"] = sample.token[order], of_scene[order].astype(np.int32)
    arrays["sample_time"] = time[order]
    twice = np.zeros(len(sample), bool)
    twice[order[1:]] = (np.diff(of_scene[order]) == 0) & (np.diff(time[order]) == 0)
    sample.refuse(twice, "has the same timestamp as another keyframe of its scene")

    ego_pose = read("ego_pose", "token translation rotation")
    poses = ego_pose.pose()
    columns = "ego_pose_token calibrated_sensor_token sample_token is_key_frame height width filename timestamp prev next"
    data = read("sample_data", f"token {columns}")
    of_calibration = data.join("calibrated_sensor_token", calibration)
    rows = np.flatnonzero(calibration_channel[of_calibration] >= 0)
    arrays["data_calibration"] = of_calibration[rows].astype(np.int32)
    arrays["data_channel"] = calibration_channel[of_calibration[rows]]
    arrays["data_pose"] = poses[data.join("ego_pose_token", ego_pose)[rows]]
    arrays["data_sample"] = sample_place[data.join("sample_token", sample)[rows]].astype(np.int32)
    arrays["data_key"] = data.numbers("is_key_frame", dtype=bool)[rows]
    arrays["data_time"] = data.numbers("timestamp", dtype=np.int64)[rows]
    for name in ("height", "width"):
        data.columns[name] = [value or 0 for value in data.take(name)]
    arrays["data_size"] = np.stack([data.numbers(name, dtype=np.int32)[rows] for name in ("height", "width")], 1)
    arrays["data_file"] = _bytes(data.files("filename"))[rows]
    _links(data, "data", rows, arrays["data_time"], arrays)
    key = np.flatnonzero(arrays["data_key"])
    arrays["sample_data"] = np.full((len(sample), len(CHANNELS)), -1, np.int32)
    arrays["sample_data"][arrays["data_sample"][key], arrays["data_channel"][key]] = key
    twice = np.zeros(len(data), bool)
    twice[rows[key]] = arrays["sample_data"][arrays["data_sample"][key], arrays["data_channel"][key]] != key
    data.refuse(twice, "is one of two keyframes of the same sample and sensor")
    lidar = arrays["sample_data"][:, LIDAR]
    arrays["sample_lidar_token"] = np.where(lidar >= 0, np.append(data.token[rows], b"")[lidar], b"")
    del data, ego_pose, poses
    if (root / version / "lidarseg.json").is_file():
        lidarseg = read("lidarseg", "token sample_data_token filename")
        file_of = dict(zip(lidarseg.column("sample_data_token", str), lidarseg.files("filename")))
        arrays["sample_lidarseg"] = _bytes([file_of.get(t.decode(), "") for t in arrays["sample_lidar_token"]])

    category, attribute = read("category", "token name index?"), read("attribute", "token name")
    instance = read("instance", "token category_token")
    columns = "sample_token instance_token visibility_token attribute_tokens translation rotation size"
    box = read("sample_annotation", f"token {columns} num_lidar_pts prev next")
    of_sample = sample_place[box.join("sample_token", sample)]
    order = np.argsort(of_sample, kind="stable")
    arrays["box_start"] = np.searchsorted(of_sample[order], np.arange(len(sample) + 1))
    arrays["box_token"], arrays["box_sample"] = box.token[order], of_sample[order].astype(np.int32)
    arrays["box_instance"] = box.join("instance_token", instance)[order].astype(np.int32)
    arrays["box_category"] = instance.join("category_token", category)[arrays["box_instance"]].astype(np.int16)
    box.columns["attribute"] = [tokens[0] if tokens else "" for tokens in box.column("attribute_tokens", [str])]
    arrays["box_attribute"] = box.join("attribute", attribute, optional=True)[order].astype(np.int16)
    levels = [{"1": 1, "2": 2, "3": 3, "4": 4}.get(str(level), 0) for level in box.take("visibility_token")]
    arrays["box_visibility"] = np.array(levels, np.int16)[order]
    arrays["box_points"] = box.numbers("num_lidar_pts", dtype=np.int32)[order]
    size = box.numbers("size", 3)
    box.refuse(~((size >= 0) & (size <= FAR)).all(1), "has a size that is not finite [m]")
    arrays["box_pose"], arrays["box_size"] = box.pose()[order], size[order]
    _links(box, "box", order, arrays["sample_time"][arrays["box_sample"]], arrays)
    arrays["box_velocity"] = box_velocity(arrays)

    splits = _devkit("nuscenes.utils.splits").create_splits_scenes()
    known = next((names for kind, names in _VERSION_SPLITS.items() if version.endswith(kind)), tuple(splits))
    splits = {name: splits[name] for name in known}
    if (root / version / "splits.json").is_file():  # the devkit's custom splits
        splits |= read_json(root / version / "splits.json", {str: [str]})
    categories = category.column("name", str)
    boxes = np.bincount(arrays["box_category"], minlength=len(categories)).tolist()
    meta = {
        "version": version,
        "scenes": scenes,
        "splits": splits,
        "categories": categories,
        "category_label": [detection_class(name) for name in categories],
        "unknown": {name: n for name, n in zip(categories, boxes) if n and name not in LIDARSEG_CLASSES},
        "lidarseg": lidarseg_table(categories, category.take("index")),
        "attributes": attribute.column("name", str),
    }
    return arrays, meta


def lidarseg_table(categories: list[str], index: list) -> list[list] | str:
    """category.json's names and numbers -> [number in the tree's files, nuScenes-lidarseg's number or UNPLACED,
    name] of each class; or, where the numbers cannot be had, why.

    Another tree may number the same classes otherwise: the name decides.
    """
    if not all(isinstance(k, int) and 0 <= k < 256 for k in index) or len(set(index)) < len(index):
        return "its records need an 'index' of their own each, 0..255, as nuScenes-lidarseg's category.json has"
    place = {name: k for k, name in enumerate(LIDARSEG_CLASSES)}
    return [[k, place.get(name, UNPLACED), name] for k, name in zip(index, categories)]


def box_velocity(arrays: dict[str, np.ndarray], max_time_diff: float = 1.5) -> np.ndarray:
    """The devkit's NuScenes.box_velocity for all annotations at once -> (A, 3) float64 [m/s], global.

    Centred difference between the previous and the next annotation of the instance, one-sided where one is missing;
    nan where both are, or where they are more than 1.5 s apart (3 s for the centred difference).
    """
    here = np.arange(len(arrays["box_prev"]))
    has_prev, has_next = arrays["box_prev"] >= 0, arrays["box_next"] >= 0
    first, last = np.where(has_prev, arrays["box_prev"], here), np.where(has_next, arrays["box_next"], here)
    time = 1e-6 * arrays["sample_time"]
    elapsed = time[arrays["box_sample"][last]] - time[arrays["box_sample"][first]]
    position = arrays["box_pose"][:, :3]
    known = (has_prev | has_next) & (elapsed <= np.where(has_prev & has_next, 2 * max_time_diff, max_time_diff))
    velocity = np.full((len(here), 3), np.nan)
    velocity[known] = (position[last] - position[first])[known] / elapsed[known, None]
    return velocity


# --- the dataset -----------------------------------------------------------------------------------------------------


class NuScenesOccupancy:
    """Keyframes of one split as `Frame`s. Safe to use from forked or spawned data-loader workers.

    root      folder with v1.0-*, samples/, sweeps/, ... (or with nuscenes/ that holds them)
    version   "v1.0-mini", "v1.0-trainval", ...; None: the only one present
    split     a split of the devkit or of <version>/splits.json; "all": each scene of the tree; None: the train split
    image_size (H, W) [px] to resize to, K scaled; None: native
    cache     folder for the memory-mapped tables; None: $XDG_CACHE_HOME/minocc or ~/.cache/minocc
    parts     what `[i]` reads beyond poses; leave out what a loop does not use

    Raises InputError (one line: file, value, remedy) on a missing or broken table, file, version or split.
    """

    history = 0  # earlier LiDAR sweeps that `[i]` gives; set it after opening

    def __init__(self, root: Path | str, version: str | None = None, split: str | None = None,
                 image_size: tuple[int, int] | None = None, cache: Path | str | None = None,
                 parts: tuple[str, ...] = PARTS):
        self._arguments = (root, version, split, image_size, cache, parts)
        given, self.root = Path(root), find_root(root)
        self.version = find_version(self.root, version)
        self.cache = Path(cache or default_cache())
        check_parts(parts, PARTS, image_size)
        self.parts = tuple(parts)

        folder = cache_folder(self.root, self.version, cache)
        if not folder.is_dir():
            if (self.root / self.version / "sample_data.json").stat().st_size > 50e6:
                print(f"reading {self.root / self.version} once (trainval: about a minute, 5 GB)", file=sys.stderr)
            write_cache(folder, *build_tables(self.root, self.version))
        self._table, self._meta = read_cache(folder)
        if unknown := self._meta["unknown"]:
            shown = ", ".join([*unknown][:4]) + (", ..." if len(unknown) > 4 else "")
            note(f"{self.root / self.version}/category.json: {len(unknown)} categories ({shown}) of "
                 f"{sum(unknown.values())} boxes are not nuScenes'; these boxes count as 'others'")

        self.split = split or next(iter(self._meta["splits"]))
        scenes = [scene["name"] for scene in self._meta["scenes"]]
        self._rows = self._select(scenes)  # dataset index -> row of the sample arrays; a scene's rows are contiguous
        scene = self._table["sample_scene"][self._rows]
        self.scene_names = [scenes[k] for k in scene.tolist()]
        self.tokens = _texts(self._table["sample_token"][self._rows])
        self._position = {token: i for i, token in enumerate(self.tokens)}
        starts = np.flatnonzero(np.diff(scene, prepend=-1))
        self._scene_start = starts[np.searchsorted(starts, np.arange(len(scene)), "right") - 1]

        row = self._data_row(0, 0)
        self.image_shape = tuple(int(v) for v in self._table["data_size"][row])  # native (H, W)
        if min(self.image_shape) < 1:
            with open_image(self._file(row)) as image:
                self.image_shape = image.height, image.width
        self.image_size = tuple(int(v) for v in image_size) if image_size is not None else self.image_shape

        places = [folder / name for folder in dict.fromkeys((self.root, given)) for name in GTS_FOLDERS]
        here = dict.fromkeys(self.scene_names)
        self.gts = next((path for path in places if any((path / name).is_dir() for name in here)), None)
        self._questions = None
        self._sweeps_present = None

    def __reduce__(self):
        return NuScenesOccupancy, self._arguments  # a spawned worker maps the arrays itself instead of copying them

    def _select(self, scenes: list[str]) -> np.ndarray:
        """Rows of the sample arrays that the split holds, by scene and time."""
        splits = self._meta["splits"]
        if self.split == "all":
            wanted = set(scenes)
        elif self.split in splits:
            wanted = set(splits[self.split])
        else:
            raise InputError(f"split '{self.split}': {self.version} has {', '.join(splits)} and all")
        chosen = np.array([name in wanted for name in scenes], bool)
        rows = np.flatnonzero(chosen[self._table["sample_scene"]]) if len(scenes) else np.zeros(0, int)
        if not len(rows):
            homes = [name for name, members in splits.items() if set(members) & set(scenes)]
            shown = ", ".join(scenes[:5]) + (f" and {len(scenes) - 5} more" if len(scenes) > 5 else "")
            raise InputError(f"{self.root}: split '{self.split}' holds no scene of this tree, which has "
                             f"{shown or 'none'}; use --split {' or '.join(homes + ['all'])}")
        return rows

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, i: int) -> Frame:
        return read_frame(self, i)

    # places in time

    def index(self, token: str) -> int:
        """Sample token -> dataset index."""
        if token not in self._position:
            raise InputError(f"sample token '{token}' is not in split '{self.split}' of {self.root}")
        return self._position[token]

    def past(self, i: int, n: int) -> list[int]:
        """Dataset indices of up to n previous keyframes of the same scene, nearest first."""
        return list(range(i - 1, max(i - 1 - n, int(self._scene_start[i]) - 1), -1))

    def timestamp(self, i: int) -> int:
        """[us]"""
        return int(self._table["sample_time"][self._rows[i]])

    def location(self, i: int) -> str:
        """The log's city, e.g. "boston-seaport"."""
        return self._meta["scenes"][self._table["sample_scene"][self._rows[i]]]["location"]

    # rows, files, poses

    def _data_row(self, i: int, channel: int) -> int:
        """The keyframe's sample_data row of CHANNELS[channel]."""
        row = int(self._table["sample_data"][self._rows[i], channel])
        if row < 0:
            path = self.root / self.version / "sample_data.json"
            raise InputError(f"{path}: keyframe {self.tokens[i]} has no {CHANNELS[channel]} record")
        return row

    def _name(self, row: int) -> str:
        return self._table["data_file"][row].decode()

    def _file(self, row: int) -> Path:
        return self.root / self._name(row)

    def _global_ego(self, rows) -> np.ndarray:
        """sample_data row(s) -> (..., 4, 4) ego pose at their own timestamps."""
        return pose_matrix(self._table["data_pose"][rows])

    def _ego_sensor(self, rows) -> np.ndarray:
        """sample_data row(s) -> (..., 4, 4) sensor in the ego frame of its own timestamp."""
        return pose_matrix(self._table["calibration"][self._table["data_calibration"][rows]])

    def _reference(self, i: int) -> np.ndarray:
        """(4, 4) T_global_ego at the LIDAR_TOP timestamp."""
        return self._global_ego(self._data_row(i, LIDAR))

    def _camera_rows(self, i: int) -> np.ndarray:
        return np.array([self._data_row(i, n) for n in range(len(CAMERAS))])

    def camera_files(self, i: int) -> list[str]:
        """Six paths relative to root ("samples/CAM_FRONT/x.jpg") in CAMERAS order."""
        return [self._name(row) for row in self._camera_rows(i)]

    def lidar_file(self, i: int) -> str:
        """Path relative to root ("samples/LIDAR_TOP/x.pcd.bin")."""
        return self._name(self._data_row(i, LIDAR))

    def calibration(self, i: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """-> K (6, 3, 3) float32 for `image_size`, T_ego_cam (6, 4, 4) float32, T_global_ego (4, 4) float64."""
        rows = self._camera_rows(i)
        T_global_ego = self._reference(i)
        return self._intrinsics(rows), self._to_reference(rows, T_global_ego).astype(np.float32), T_global_ego

    def _intrinsics(self, rows: np.ndarray) -> np.ndarray:
        scale = np.array([self.image_size[1] / self.image_shape[1], self.image_size[0] / self.image_shape[0], 1])
        K = self._table["intrinsics"][self._table["data_calibration"][rows]]
        return (K * scale[:, None]).astype(np.float32)

    def _to_reference(self, rows, T_global_ego: np.ndarray) -> np.ndarray:
        """(..., 4, 4) float64 reference ego <- sensor, through global at both timestamps."""
        return rigid_inverse(T_global_ego) @ self._global_ego(rows) @ self._ego_sensor(rows)

    def T_ego_lidar(self, i: int) -> np.ndarray:
        """(4, 4) float64. Static: the reference is the ego pose at this very timestamp."""
        return self._ego_sensor(self._data_row(i, LIDAR))

    # sensors

    def images(self, i: int) -> np.ndarray:
        """(6, 3, H, W) float32 RGB in [0, 1]."""
        return self._read_images(self._camera_rows(i))

    def _read_images(self, rows: np.ndarray) -> np.ndarray:
        return read_images([self._file(row) for row in rows], self.image_shape, self.image_size)

    def points(self, i: int, sweeps: int = 0) -> np.ndarray:
        """(M, 5) float32: x, y, z [m] in the reference ego, intensity, ring. Optionally with up to `sweeps` earlier
        LiDAR sweeps (newest first, each through global at its own time); the keyframe's points come first. A sweep
        between keyframes whose file is not there is left out, as in `sweeps`."""
        row, clouds = self._data_row(i, LIDAR), []
        T_global_ego = self._global_ego(row)
        for _ in range(1 + sweeps):
            if self._table["data_key"][row] or self._file(row).is_file():
                cloud = self._read_points(self._file(row))
                T = self._to_reference(row, T_global_ego)
                cloud[:, :3] = cloud[:, :3] @ T[:3, :3].T + T[:3, 3]
                clouds.append(cloud)
            row = int(self._table["data_prev"][row])
            if row < 0:
                break
        return np.concatenate(clouds)

    def sweeps(self, i: int) -> list[Sweep]:
        """All LiDAR sweeps of keyframe i's scene in time order. One between keyframes whose file is not there (a tree
        of keyframes only) is left out; a keyframe's never is."""
        table, first = self._table, int(self._scene_start[i])
        scene = table["sample_scene"][self._rows[i]]
        keyframe = {self._data_row(k, LIDAR): k for k in range(first, len(self)) if self._scene_start[k] == first}
        row = next(iter(keyframe))
        while (before := int(table["data_prev"][row])) >= 0 and table["sample_scene"][table["data_sample"][before]] == scene:
            row = before
        found = []
        while row >= 0 and table["sample_scene"][table["data_sample"][row]] == scene:
            if row in keyframe or self._file(row).is_file():
                place = self._global_ego(row), self._ego_sensor(row)
                found.append(Sweep(self._name(row), int(table["data_time"][row]), *place, keyframe.get(row, -1)))
            row = int(table["data_next"][row])
        return found

    def sweep_points(self, sweep: Sweep) -> np.ndarray:
        """(M, 5) float32 x, y, z [m] in the LiDAR's own frame, intensity, ring."""
        return self._read_points(self.root / sweep.file)

    @staticmethod
    def _read_points(path: Path) -> np.ndarray:
        """(M, 5) float32 in the sensor's frame."""
        if not path.is_file():
            raise InputError(f"{path}: LiDAR file not found")
        size = path.stat().st_size
        if size == 0 or size % 20:
            raise InputError(f"{path}: {size} bytes, expected a multiple of 20 (5 float32 a point); copy it again")
        points = np.fromfile(path, np.float32).reshape(-1, 5)
        if bad := int((~np.isfinite(points).all(1)).sum()):
            raise InputError(f"{path}: {bad} of {len(points)} points hold nan or inf; copy it again")
        if (points[:, 4] != np.floor(points[:, 4])).any():
            columns = "x, y, z, intensity, ring (a whole number; 0 if unknown)"
            raise InputError(f"{path}: not nuScenes' five float32 a point, {columns}; convert it")
        return points

    def lidarseg(self, i: int, raw: bool = False) -> np.ndarray | None:
        """(M,) uint8 Occ3D id of each keyframe point (raw: nuScenes-lidarseg's own 0..31), None without lidarseg."""
        if "sample_lidarseg" not in self._table:
            return None
        name = self._table["sample_lidarseg"][self._rows[i]].decode()
        if not name:
            return None
        path = self.root / name
        if not path.is_file():
            raise InputError(f"{path}: lidarseg file not found")
        label = np.fromfile(path, np.uint8)
        points = self._file(self._data_row(i, LIDAR))
        if not points.is_file():
            raise InputError(f"{points}: LiDAR file not found")
        count = points.stat().st_size // 20
        if len(label) != count:
            raise InputError(f"{path}: {len(label)} labels for {count} points of {self.lidar_file(i)}; copy it again")
        label = self._lidarseg_place[label]
        if (label == UNPLACED).any():
            k = int(np.fromfile(path, np.uint8)[label == UNPLACED][0])
            name = next((f" '{name}'" for number, _, name in self._meta["lidarseg"] if number == k), "")
            remedy = "rename it in category.json, or remove lidarseg.json to label by boxes"
            raise InputError(f"{path}: class {k}{name} is none of nuScenes-lidarseg's 32; {remedy}")
        return label if raw else LIDARSEG_TO_OCC3D[label]

    @cached_property
    def _lidarseg_place(self) -> np.ndarray:
        """(256,) uint8: a number in the tree's lidarseg files -> nuScenes-lidarseg's own, or UNPLACED."""
        table = self._meta["lidarseg"]
        if isinstance(table, str):
            raise InputError(f"{self.root / self.version}/category.json: {table}")
        places = np.full(256, UNPLACED, np.uint8)
        for number, place, _ in table:
            places[number] = place
        return places

    def check_steps(self) -> None:
        """Raises InputError if the keyframes are not about 0.5 s apart: planning's scores count them as such."""
        same = np.diff(self._table["sample_scene"][self._rows]) == 0
        gaps = 1e-6 * np.diff(self._table["sample_time"][self._rows])[same]
        if len(gaps) and abs(np.median(gaps) - STEP) > 0.2 * STEP:
            raise InputError(f"{self.root}: keyframes are {np.median(gaps):.2g} s apart (median); planning's steps are "
                             f"{STEP} s: use a split at 2 Hz")

    @property
    def camera_sweeps(self) -> bool:
        """Whether the tree has the camera images between keyframes (decided once, by the first one in the tables)."""
        if self._sweeps_present is None:
            between = ~self._table["data_key"] & (self._table["data_channel"] < LIDAR)
            row = int(np.argmax(between)) if len(between) else 0
            self._sweeps_present = bool(len(between) and between[row] and self._file(row).is_file())
        return self._sweeps_present

    def neighbour(self, i: int, step: int = 1) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Each camera's image just after (step=+1) or before (-1) the keyframe's.

        -> images (6, 3, H, W) float32, T (6, 4, 4) float32 reference ego <- neighbour camera, valid (6,) bool.
        The neighbour is the adjacent camera sweep if the tree has them, else the adjacent keyframe. Where the scene
        ends, valid is False, the image is black and T is the keyframe's own.
        """
        if step not in (-1, 1):
            raise ValueError(f"step {step}: expected +1 or -1")
        own = self._camera_rows(i)
        link = self._table["data_next" if step > 0 else "data_prev"]
        rows = link[own].astype(np.int64)
        while not self.camera_sweeps and (move := (rows >= 0) & ~self._table["data_key"][rows]).any():
            rows[move] = link[rows[move]]
        valid = rows >= 0
        scene = self._table["sample_scene"]
        valid &= scene[self._table["data_sample"][rows]] == scene[self._rows[i]]
        rows = np.where(valid, rows, own)
        images = np.zeros((len(rows), 3, *self.image_size), np.float32)
        if valid.any():
            images[valid] = self._read_images(rows[valid])
        return images, self._to_reference(rows, self._reference(i)).astype(np.float32), valid

    # annotations

    def labels(self, i: int) -> tuple[np.ndarray, np.ndarray, np.ndarray] | None:
        """Occ3D's (semantics uint8, mask_camera bool, mask_lidar bool), each (200, 200, 16); None without gts."""
        if self.gts is None:
            return None
        path = self._label_file(i)
        shape = (200, 200, 16)
        expect = {"semantics": (shape, "uint8"), "mask_camera": (shape, None), "mask_lidar": (shape, None)}
        labels = read_npz(path, expect)
        for name in ("mask_camera", "mask_lidar"):
            if labels[name].dtype not in (np.uint8, np.bool_):
                raise InputError(f"{path}: '{name}' has dtype {labels[name].dtype}, expected uint8")
        if ((labels["semantics"] > FREE) & (labels["semantics"] < 255)).any():
            raise InputError(f"{path}: 'semantics' holds ids above {FREE}, not Occ3D's 0..17 (255: not labelled)")
        return labels["semantics"], labels["mask_camera"].astype(bool), labels["mask_lidar"].astype(bool)

    def _label_file(self, i: int) -> Path:
        return self.gts / self.scene_names[i] / self.tokens[i] / "labels.npz"

    def _box_rows(self, i: int) -> np.ndarray:
        start = self._table["box_start"]
        return np.arange(start[self._rows[i]], start[self._rows[i] + 1])

    def boxes(self, i: int) -> Boxes:
        """All annotations of the keyframe, hidden ones (num_lidar_pts 0) included."""
        table, rows = self._table, self._box_rows(i)
        T_ego_global = rigid_inverse(self._reference(i))
        T = T_ego_global @ pose_matrix(table["box_pose"][rows])
        level = table["box_velocity"][rows] * (1, 1, 0)  # the global vertical speed is dropped, as the field does
        category = table["box_category"][rows].tolist()
        attributes = [*self._meta["attributes"], ""]  # -1 finds the last: none
        return Boxes(
            center=T[:, :3, 3],
            size=table["box_size"][rows],
            yaw=np.arctan2(T[:, 1, 0], T[:, 0, 0]),
            velocity=(level @ T_ego_global[:3, :3].T)[:, :2],
            names=[self._meta["categories"][k] for k in category],
            labels=np.array([self._meta["category_label"][k] for k in category], np.uint8),
            tokens=_texts(table["box_token"][rows]),
            instance=table["box_instance"][rows].astype(np.int64),
            num_lidar_pts=table["box_points"][rows].astype(np.int64),
            visibility=table["box_visibility"][rows].astype(np.int64),
            attributes=[attributes[k] for k in table["box_attribute"][rows].tolist()],
            T_ego_box=T,
        )

    def future(self, i: int) -> Future:
        """See `Future`."""
        row = int(self._rows[i])
        T_lidar_global = rigid_inverse(self._reference(i) @ self.T_ego_lidar(i))
        path, known = self._lidar_path(row, T_lidar_global)
        now = HISTORY_STEPS
        for k in range(now + 1, len(path)):
            if not known[k]:
                path[k] = path[k - 1]
        moved = np.diff(path[: now + 1], axis=0)  # (4, 2) displacements, oldest first
        for k in range(now - 1, -1, -1):
            if not known[k]:
                moved[k] = moved[k + 1] if k + 1 < now else path[now + 1]
        speed = 0.0  # a scene of one keyframe
        if known[now - 1] or known[now + 1]:
            first = row - 1 if known[now - 1] else row
            speed = np.linalg.norm(moved[-1]) / (1e-6 * np.diff(self._table["sample_time"][first : first + 2])[0])
        right = path[-1, 0]
        agents, agents_yaw, agents_mask = self._agents(self._box_rows(i), T_lidar_global)
        return Future(
            trajectory=path[now + 1 :].astype(np.float32),
            mask=known[now + 1 :],
            history=-np.cumsum(moved[::-1], axis=0)[::-1].astype(np.float32),
            history_mask=known[:now],
            command=0 if right >= 2 else 1 if right <= -2 else 2,
            speed=float(speed),
            agents=agents,
            agents_yaw=agents_yaw,
            agents_mask=agents_mask,
        )

    def _lidar_path(self, row: int, T_lidar_global: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """LIDAR_TOP's origin at the keyframes row - 4 ... row + 6: (11, 2) [m], (11,) bool known (same scene)."""
        scene = self._table["sample_scene"]
        rows = np.arange(row - HISTORY_STEPS, row + FUTURE_STEPS + 1)
        near = rows.clip(0, len(scene) - 1)
        data = self._table["sample_data"][near, LIDAR]
        known = (near == rows) & (scene[near] == scene[row]) & (data >= 0)
        path = np.zeros((len(rows), 2))
        path[known] = (T_lidar_global @ self._global_ego(data[known]) @ self._ego_sensor(data[known]))[:, :2, 3]
        path[HISTORY_STEPS] = 0  # by definition; the product leaves 1e-13
        return path, known

    def _agents(self, rows: np.ndarray, T_lidar_global: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Annotation rows -> displacement (B, 6, 2), heading change (B, 6), mask (B, 6), along their `next` chain."""
        agents = np.zeros((len(rows), FUTURE_STEPS, 2), np.float32)
        yaw = np.zeros((len(rows), FUTURE_STEPS), np.float32)
        mask = np.zeros((len(rows), FUTURE_STEPS), bool)
        start = T_lidar_global @ pose_matrix(self._table["box_pose"][rows])
        heading = np.arctan2(start[:, 1, 0], start[:, 0, 0])
        for k in range(FUTURE_STEPS):
            following = self._table["box_next"][rows]
            mask[:, k] = following >= 0  # stays False once the chain has ended: rows stops at its last box
            rows = np.where(mask[:, k], following, rows)
            T = T_lidar_global @ pose_matrix(self._table["box_pose"][rows])
            agents[:, k] = T[:, :2, 3] - start[:, :2, 3]
            turn = np.arctan2(T[:, 1, 0], T[:, 0, 0]) - heading
            yaw[:, k] = np.arctan2(np.sin(turn), np.cos(turn))
        return agents, yaw, mask

    def questions(self, i: int) -> list[dict] | None:
        """NuScenes-QA rows (question, answer, template_type, num_hop, ...) of the keyframe; None without questions."""
        if self._questions is None:
            self._questions = _open_questions(self.root, self.cache)
        if not self._questions:
            return None
        tokens, start, rows = (self._questions[name] for name in ("token", "start", "rows"))
        key = self.tokens[i].encode()
        k = int(np.searchsorted(tokens, key))
        if k == len(tokens) or tokens[k] != key:
            return []
        return json.loads(bytes(rows[start[k] : start[k + 1]]))

    def ray_origins(self, i: int) -> np.ndarray:
        """(T, 3) float32 [m, reference ego]: RayIoU's query origins by SparseOcc's rule.

        The LIDAR_TOP origins of all keyframes of the scene, in time order, brought to the reference through global;
        those with |x| < 39 and |y| < 39; if more than 8, the 8 at np.round(np.linspace(0, count - 1, 8)).
        """
        scene = self._table["sample_scene"]
        row = self._rows[i]
        rows = np.arange(np.searchsorted(scene, scene[row], "left"), np.searchsorted(scene, scene[row], "right"))
        data = self._table["sample_data"][rows, LIDAR]
        origin = self._to_reference(data[data >= 0], self._reference(i))[:, :3, 3].astype(np.float32)
        origin = origin[(np.abs(origin[:, :2]) < 39).all(1)]
        if len(origin) > 8:
            origin = origin[np.round(np.linspace(0, len(origin) - 1, 8)).astype(int)]
        return origin


def open_split(root: Path, version: str | None, split: str | None, image_size: tuple[int, int] | None, cache: Path | None,
               train: bool = True) -> NuScenesOccupancy:  # fmt: skip
    """The keyframes and images of the split named, else of the version's own train or validation split. Raises InputError."""
    if split is None and not train:
        version = find_version(find_root(root), version)
        split = "mini_val" if "mini" in version else "val"
    return NuScenesOccupancy(root, version, split, image_size=image_size, cache=cache, parts=("images",))


def read_resized(path: Path, native: tuple[int, int], size: tuple[int, int]) -> np.ndarray:
    """-> (h, w, 3) uint8 RGB of `size` (h, w). A JPEG is decoded at a reduced scale where that is large enough.

    Raises InputError if the file is missing, empty, corrupt, or not of the `native` (H, W) size.
    """
    from PIL import Image

    with open_image(path) as image:
        width, height = image.size
        if (height, width) != native:
            raise InputError(f"{path}: {width}x{height} px, expected {native[1]}x{native[0]}")
        if size == native:
            return np.asarray(to_rgb(image))
        image.draft("RGB", (size[1], size[0]))  # no effect unless a JPEG
        scale = max(1, round(width / image.width))  # 1, 2, 4 or 8: odd sizes are rounded up, the box undoes it
        box = (0, 0, min(width / scale, image.width), min(height / scale, image.height))
        return np.asarray(to_rgb(image).resize((size[1], size[0]), Image.Resampling.BILINEAR, box))


# --- NuScenes-QA -----------------------------------------------------------------------------------------------------


def question_files(root: Path) -> list[Path]:
    """NuScenes_{train,val}_questions.json, wherever the tree keeps them."""
    for name in QUESTION_FOLDERS:
        if files := sorted((root / name).glob("NuScenes_*_questions.json")):
            return files
    return []


def _open_questions(root: Path, cache: Path) -> dict[str, np.ndarray]:
    """Questions by sample token, as memory-mapped arrays (460 thousand rows of the real set stay out of memory)."""
    files = question_files(root)
    if not files:
        return {}
    folder = cache / f"questions-{_fingerprint(files)}"
    if not folder.is_dir():
        of_sample: dict[str, list] = {}
        for path in files:
            row = {"answer": object, "num_hop": object, "question": str, "sample_token": str, "template_type": str}
            content = read_json(path, ({"questions": [row]}, [row]))
            for row in content["questions"] if isinstance(content, dict) else content:
                of_sample.setdefault(row["sample_token"], []).append(row)
        tokens = sorted(of_sample)
        blobs = [json.dumps(of_sample[token]).encode() for token in tokens]
        arrays = {
            "token": _bytes(tokens),
            "start": np.cumsum([0] + [len(blob) for blob in blobs]),
            "rows": np.frombuffer(b"".join(blobs), np.uint8),
        }
        write_cache(folder, arrays, {"files": [str(path) for path in files]})
    return read_cache(folder)[0]


# --- python -m common.nuscenes check ---------------------------------------------------------------------------------


def _sizes(paths: list[Path], name: str) -> np.ndarray:
    """Bytes of each file, 0 where it is missing. Shows a progress bar."""
    from tqdm import tqdm

    sizes = np.zeros(len(paths), np.int64)
    for k, path in enumerate(tqdm(paths, desc=name, unit=" files", leave=False, disable=len(paths) < 1000)):
        if path.is_file():
            sizes[k] = path.stat().st_size
    return sizes


def _line(part: str, sizes: np.ndarray, note: str = "") -> None:
    found = f"{(sizes > 0).sum()} of {len(sizes)}" if len(sizes) else "absent"
    total, unit = float(sizes.sum()), "B"
    for larger in ("kB", "MB", "GB"):
        if total >= 1000:
            total, unit = total / 1000, larger
    print(f"{part:24} {found:>20} {total:>8.1f} {unit:2}  {note}".rstrip())


def check(root: Path | str, version: str | None = None, cache: Path | str | None = None) -> None:
    """Prints what of the dataset is there, and its size; raises InputError if anything required is missing.

    Required: the thirteen tables, and of each keyframe the six images and the LiDAR file; with a gts folder, each
    keyframe's label too. Optional: sweeps, gts, lidarseg, questions, maps. An empty file counts as missing. Of the
    first keyframe the reader reads all.
    """
    dataset = NuScenesOccupancy(root, version, "all", cache=cache, parts=())
    table, root, tables = dataset._table, dataset.root, dataset.root / dataset.version
    print(f"{root}: {dataset.version}, {len(dataset)} keyframes in {len(set(dataset.scene_names))} scenes")
    _line("tables", _sizes([tables / f"{name}.json" for name in TABLES], "tables"))

    required: list[list[Path]] = []  # per part, one path a keyframe
    for c, channel in enumerate(CHANNELS):
        rows = table["sample_data"][:, c].tolist()
        required.append([root / (dataset._name(row) if row >= 0 else f"samples/{channel}/(no record)") for row in rows])
    names = [f"samples/{channel}" for channel in CHANNELS]
    if dataset.gts is not None:
        required.append([dataset._label_file(i) for i in range(len(dataset))])
        names.append("gts")
    sizes = np.zeros((len(required), len(dataset)), np.int64)
    for k, (name, paths) in enumerate(zip(names, required)):
        sizes[k] = _sizes(paths, name)
        _line(name, sizes[k], str(dataset.gts) if name == "gts" else "")
    if dataset.gts is None:
        _line("gts", np.zeros(0), "optional: scores against Occ3D need it")

    between, channel = ~np.asarray(table["data_key"]), np.asarray(table["data_channel"])
    for c, name in enumerate(CHANNELS):
        paths = [dataset._file(row) for row in np.flatnonzero(between & (channel == c))]
        _line(f"sweeps/{name}", _sizes(paths, f"sweeps/{name}"), "optional")
    lidarseg = [root / name.decode() for name in table.get("sample_lidarseg", []) if name]
    _line("lidarseg", lidarseg_sizes := _sizes(lidarseg, "lidarseg"), "optional")
    _line("questions", _sizes(question_files(root), "questions"), "optional")
    maps = sorted(path for path in (root / "maps").rglob("*") if path.is_file())
    _line("maps", _sizes(maps, "maps"), "optional here; the devkit's NuScenes() opens them")

    complete = (sizes > 0).all(0)
    what = "six images, LiDAR and label" if dataset.gts is not None else "six images and LiDAR"
    print(f"keyframes with {what}: {complete.sum()} of {len(complete)}")
    if not complete.all():
        k, i = np.argwhere(sizes == 0)[0]
        count = f"{(~complete).sum()} of {len(complete)}"
        raise InputError(f"{required[k][i]}: missing or empty; {count} keyframes lack a file")
    dataset.images(0), dataset.points(0), dataset.labels(0)  # files of another form are refused, as by the commands
    if lidarseg_sizes.all():
        dataset.lidarseg(0)


@exit_on_input_error
def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m common.nuscenes", description="what a nuScenes folder holds")
    commands = parser.add_subparsers(required=True)
    command = commands.add_parser("check", help="found, missing, size; exit code 2 if anything required is missing")
    command.add_argument("--data-root", required=True, help="folder with v1.0-*, samples/, ...")
    command.add_argument("--version", help="v1.0-mini, v1.0-trainval, ...; default: the only one present")
    command.add_argument("--cache", help="folder for the memory-mapped tables; default: the user's cache folder")
    arguments = parser.parse_args()
    check(arguments.data_root, arguments.version, arguments.cache)


if __name__ == "__main__":
    main()
