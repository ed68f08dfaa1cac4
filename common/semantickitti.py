"""SemanticKITTI scene completion -> the same frames as common.nuscenes. The only module that knows its files.

    dataset = SemanticKITTI("data/semantickitti", split="train", image_size=(128, 416))
    frame = dataset[0]                       # common.nuscenes.Frame; `common.nuscenes.stack` makes a batch
    python -m common.semantickitti check --data-root data/semantickitti
    python -m common.semantickitti show --data-root data/semantickitti --out pictures    # scans drawn on their images

LAYOUT   <root>/sequences/<seq>/ or <root>/dataset/sequences/<seq>/ with velodyne/*.bin (float32 x, y, z, intensity),
         labels/*.label (uint32: instance << 16 | raw id), image_2/*.png, calib.txt, poses.txt, times.txt, and
         voxels/*.bin, .label, .invalid, .occluded of every fifth frame. All little-endian.
FRAMES   The reference ("ego") of a frame is its own LiDAR: x forward, y left, z up, origin in the sensor. Scans are
         motion-compensated and cameras are triggered with them, so T_ego_cam is static: with P2 = K [I | b] and
         Tr = T_cam0_velo it is inv([I | b] Tr). T_global_ego = inv(Tr) pose Tr.
PIXELS   (0, 0) is the outer corner of the first pixel, here as everywhere; that KITTI's P mean this is an assumption.
LABELS   Train ids 0 empty, 1..19, 255 ignored. semantic-kitti-api's rule: a raw id other than 0 that its learning_map
         sends to 0 (1 outlier, 52 other-structure, 99 other-object) is ignored. Points know no "empty": 1..19 and 255.

WHERE A VOXEL LIES, AND THE TRAP IN THE PACKED FILES
    The grid is common.geometry.SEMANTICKITTI: 256 x 256 x 32 voxels of 0.2 m, lower corner (0, -25.6, -2.0) in the
    LiDAR frame, index by floor, no half-voxel shift. A voxel's class is that of most of its points (ties: the smallest
    raw id; unlabelled and outlier are one candidate); where "unlabelled" wins, the voxel is empty. `voxelize` is this
    rule. It reproduces voxels/000000.bin and 000005.bin of a real sequence 00 bit by bit, *if the files' bits are read
    one late*: bit n + 1 of the stream (most significant bit first, C order) is voxel n. So are .invalid and .occluded
    there: read late, no voxel that the current or a later scan fills is invalid; read as documented, a third of them
    are. One bit late looks like a z origin of -2.2 m, because each column moves up by one voxel; but a column's top
    voxel then turns up at the foot of the next column, below the road, where the files indeed show open air.
    Whether every copy of the data is packed so, and whether .label is late too, the sample at hand cannot tell (it has
    no .label). So it is measured on each tree by `stream_shift`: `packed_shift` for .bin, .invalid and .occluded,
    `label_shift` for .label. `bits` returns voxels in the order of the label files and `grid` is where those lie.
    Scores stay comparable: `labels` masks with .invalid exactly as it is stored, as the official scorer does.
"""

import argparse
import re
import sys
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np

from common.files import InputError, atomic, exit_on_input_error, open_image, read_text
from common.geometry import SEMANTICKITTI, VoxelGrid
from common.nuscenes import FAR, Frame, _line, _sizes, check_parts, read_frame, read_images, rigid_inverse

# --- classes: semantic-kitti-api's config/semantic-kitti.yaml ---------------------------------------------------------

CLASSES = (
    "empty", "car", "bicycle", "motorcycle", "truck", "other-vehicle", "person", "bicyclist", "motorcyclist", "road",
    "parking", "sidewalk", "other-ground", "building", "fence", "vegetation", "trunk", "terrain", "pole",
    "traffic-sign",
)  # fmt: skip
IGNORED = 255
LEARNING_MAP = {  # raw id -> train id; 252 and above are the moving ones
    0: 0, 1: 0, 10: 1, 11: 2, 13: 5, 15: 3, 16: 5, 18: 4, 20: 5, 30: 6, 31: 7, 32: 8, 40: 9, 44: 10, 48: 11, 49: 12,
    50: 13, 51: 14, 52: 0, 60: 9, 70: 15, 71: 16, 72: 17, 80: 18, 81: 19, 99: 0, 252: 1, 253: 7, 254: 6, 255: 8, 256: 5,
    257: 5, 258: 4, 259: 5,
}  # fmt: skip
PALETTE = np.array([  # its color_map (there b, g, r), by train id
    (0, 0, 0), (100, 150, 245), (100, 230, 245), (30, 60, 150), (80, 30, 180), (0, 0, 255), (255, 30, 30),
    (255, 40, 200), (150, 30, 90), (255, 0, 255), (255, 150, 255), (75, 0, 75), (175, 0, 75), (255, 200, 0),
    (255, 120, 50), (0, 175, 0), (135, 60, 0), (150, 240, 80), (255, 240, 150), (255, 0, 0),
], dtype=np.uint8)  # (20, 3) RGB  # fmt: skip

SPLITS = {
    "train": ("00", "01", "02", "03", "04", "05", "06", "07", "09", "10"),
    "val": ("08",),
    "test": tuple(str(n) for n in range(11, 22)),
}
PARTS = ("images", "points", "labels")
CAMERAS = ("image_2",)
SHAPE = SEMANTICKITTI.shape
DRIVE_GAP = 1.0  # [s] a longer pause in times.txt starts another drive (ours; real sequences have none)
FUTURE_SCANS = 70  # of the real labels: the current scan and this many later ones (as commonly stated)

_UNKNOWN = 254
_RAW_IDS = np.array(sorted(set(LEARNING_MAP) - {1}), np.uint16)  # a vote's candidates, smallest first
_SLOT = np.full(65536, -1, np.int8)  # raw id -> candidate; outlier counts as unlabelled
_VOXEL_TRAIN, _POINT_TRAIN = np.full(65536, _UNKNOWN, np.uint8), np.full(65536, _UNKNOWN, np.uint8)
_SLOT[_RAW_IDS], _SLOT[1] = np.arange(len(_RAW_IDS)), 0
for _raw, _train in LEARNING_MAP.items():
    _VOXEL_TRAIN[_raw] = _train if _train or _raw == 0 else IGNORED
    _POINT_TRAIN[_raw] = _train or IGNORED


def to_train(raw: np.ndarray, where: str = "labels", points: bool = False) -> np.ndarray:
    """Raw ids (any shape) -> train ids uint8. Of voxels: 0 empty, 255 ignored; of points 0 is ignored as well.

    Raises InputError, naming `where`, on an id that the learning map does not have.
    """
    train = (_POINT_TRAIN if points else _VOXEL_TRAIN)[raw]
    if (train == _UNKNOWN).any():
        raise InputError(f"{where}: raw id {int(raw[train == _UNKNOWN].flat[0])} is not one of SemanticKITTI's")
    return train


# --- voxels -----------------------------------------------------------------------------------------------------------


def pack(bits: np.ndarray) -> np.ndarray:
    """Any array of a multiple of 8 elements, in C order -> uint8, an eighth as many, most significant bit first."""
    bits = np.asarray(bits)
    if bits.size % 8:
        raise ValueError(f"{bits.size} voxels are not a multiple of 8")
    return np.packbits(bits.ravel() > 0)


def voxel_index(points: np.ndarray, grid: VoxelGrid = SEMANTICKITTI) -> np.ndarray:
    """(M, >= 3) LiDAR frame [m] -> (M,) flat voxel index, -1 outside.

    In float32, as the official files were made: in float64 one point of scan 0 falls on the other side of a face.
    """
    scaled = (np.asarray(points)[:, :3].astype(np.float32) - np.float32(grid.lower)) / np.float32(grid.voxel_size[0])
    index = np.floor(scaled).astype(np.int64)
    inside = ((index >= 0) & (index < grid.shape)).all(1)
    flat = (index[:, 0] * grid.shape[1] + index[:, 1]) * grid.shape[2] + index[:, 2]
    return np.where(inside, flat, -1)


def voxelize(points: np.ndarray, raw: np.ndarray, grid: VoxelGrid = SEMANTICKITTI) -> np.ndarray:
    """Labelled points of one or several scans -> (256, 256, 32) uint16 raw id of each voxel, 0 empty.

    points (M, >= 3) [m] in the LiDAR frame of the keyframe, raw (M,) raw ids. The official rule: see the module's text.
    """
    flat, slot = voxel_index(points, grid), _SLOT[raw]
    if (slot < 0).any():
        raise InputError(f"raw id {int(np.asarray(raw)[slot < 0][0])} is not one of SemanticKITTI's")
    keep = flat >= 0
    flat, slot = flat[keep], slot[keep]
    filled = np.zeros(np.prod(grid.shape), bool)
    filled[flat] = True
    row = np.cumsum(filled) - 1  # voxel -> its row among the filled ones
    classes = len(_RAW_IDS)
    votes = np.bincount(row[flat] * classes + slot, minlength=int(filled.sum()) * classes).reshape(-1, classes)
    out = np.zeros(filled.shape, np.uint16)
    out[filled] = _RAW_IDS[votes.argmax(1)]  # of equal counts the first, so the smallest id
    return out.reshape(grid.shape)


def stream_shift(stored: np.ndarray, points: np.ndarray) -> int:
    """How many voxels late the stream of a file is: 0 as documented, 1 as in the real sample.

    stored (256, 256, 32) bool, occupied as the file has it; points (M, >= 3): the scan of the same frame. The shift
    under which more of the voxels with points are occupied; 0 if neither is better.
    """
    flat = np.unique(voxel_index(points))
    flat = flat[flat >= 0]
    stored = stored.ravel()
    return int(stored[(flat + 1) % stored.size].sum() > stored[flat].sum())


def move_points(T: np.ndarray, points: np.ndarray) -> np.ndarray:
    """T (4, 4) float64 applied to the first three columns of points (M, >= 3) -> (M, 3) float32."""
    return (points[:, :3].astype(np.float64) @ T[:3, :3].T + T[:3, 3]).astype(np.float32)


# --- files ------------------------------------------------------------------------------------------------------------


def _read(path: Path, dtype: str, what: str) -> np.ndarray:
    """A whole little-endian file as a flat array; InputError if it is missing or not a whole number of elements."""
    if not path.is_file():
        raise InputError(f"{path}: {what} not found")
    size, item = path.stat().st_size, np.dtype(dtype).itemsize
    if size % item:
        raise InputError(f"{path}: {size} bytes, not a multiple of {item}; copy it again")
    return np.fromfile(path, dtype)


def read_scan(path: Path) -> np.ndarray:
    """velodyne/*.bin -> (M, 4) float32 x, y, z [m], intensity 0..1."""
    values = _read(path, "<f4", "scan")
    if not len(values) or len(values) % 4:
        raise InputError(f"{path}: {4 * len(values)} bytes, expected 16 a point and at least one; copy it again")
    points = values.reshape(-1, 4)
    if not np.isfinite(points).all():
        bad = int((~np.isfinite(points).all(1)).sum())
        raise InputError(f"{path}: {bad} of {len(points)} points hold nan or inf; copy it again")
    return points


def read_point_labels(path: Path, count: int) -> np.ndarray:
    """labels/*.label -> (count,) uint32: instance << 16 | raw id."""
    labels = _read(path, "<u4", "point labels")
    if len(labels) != count:
        raise InputError(f"{path}: {len(labels)} labels for {count} points of its scan; copy both again")
    return labels


def read_bits(path: Path) -> np.ndarray:
    """voxels/*.bin, .invalid, .occluded -> (256, 256, 32) bool, as stored."""
    packed = _read(path, "u1", "voxel file")
    size = int(np.prod(SHAPE)) // 8
    if len(packed) != size:
        raise InputError(f"{path}: {len(packed)} bytes, expected {size} (one bit a voxel); copy it again")
    return np.unpackbits(packed).astype(bool).reshape(SHAPE)  # most significant bit first


def read_voxel_labels(path: Path) -> np.ndarray:
    """voxels/*.label, or a submission's -> (256, 256, 32) uint16 raw ids, as stored."""
    raw = _read(path, "<u2", "voxel labels")
    if len(raw) != np.prod(SHAPE):
        raise InputError(f"{path}: {2 * len(raw)} bytes, expected {2 * int(np.prod(SHAPE))} (uint16 a voxel)")
    return raw.reshape(SHAPE)


def _numbers(path: Path, line: str, count: int) -> np.ndarray:
    try:
        values = np.array(line.split(), np.float64)
    except ValueError as error:
        raise InputError(f"{path}: '{line[:40]}' is not {count} numbers") from error
    if len(values) != count or not np.isfinite(values).all():
        raise InputError(f"{path}: '{line[:40]}' is not {count} finite numbers")
    return values


def _rigid(path: Path, line: str) -> np.ndarray:
    """12 numbers -> (3, 4) float64 rotation and translation. InputError if it is none, to the files' own digits."""
    T = _numbers(path, line, 12).reshape(3, 4)
    turn = T[:, :3]
    if np.abs(T).max() > FAR or np.abs(turn @ turn.T - np.eye(3)).max() > 0.01 or np.linalg.det(turn) < 0:
        raise InputError(f"{path}: '{line.strip()[:40]} ...' is no rotation and translation; copy it again")
    return T


def read_calib(path: Path, names: tuple[str, ...] = ("P2", "Tr")) -> dict[str, np.ndarray]:
    """calib.txt -> {name: (3, 4) float64} of the wanted lines; InputError if one is absent."""
    lines = dict(line.split(":", 1) for line in read_text(path).splitlines() if ":" in line)
    lines = {name.strip(): line for name, line in lines.items()}
    for name in names:
        if name not in lines:
            raise InputError(f"{path}: no line '{name}:'; unpack KITTI odometry's data_odometry_calib.zip again")
    return {name: (_rigid if name == "Tr" else _camera)(path, lines[name]) for name in names}


def _camera(path: Path, line: str) -> np.ndarray:
    """12 numbers -> (3, 4) float64 projection K [I | b]. InputError without positive focal lengths."""
    P = _numbers(path, line, 12).reshape(3, 4)
    upper = np.allclose((P[1, 0], *P[2, :3]), (0, 0, 0, 1), atol=1e-3)
    if not (upper and np.abs(P).max() < FAR and min(P[0, 0], P[1, 1]) > 1e-3):
        raise InputError(f"{path}: '{line.strip()[:40]} ...' is no projection K [I | b] with positive focal lengths")
    return P


def read_poses(path: Path) -> np.ndarray:
    """poses.txt -> (F, 4, 4) float64, world <- cam0."""
    lines = [line for line in read_text(path).splitlines() if line.strip()]
    poses = np.tile(np.eye(4), (len(lines), 1, 1))
    for pose, line in zip(poses, lines):
        pose[:3] = _rigid(path, line)
    return poses


def find_root(root: Path | str) -> Path:
    """-> the folder that holds `sequences/`: `root` itself or `root/dataset`."""
    root = Path(root)
    if not root.is_dir():
        raise InputError(f"{root}: no such folder; give --data-root the folder that holds sequences/")
    nuscenes = next((path.name for path in sorted(root.glob("v1.0-*")) if path.is_dir()), None)
    for folder in (root, root / "dataset"):
        if (folder / "sequences").is_dir():
            if nuscenes:
                raise InputError(f"{root}: holds both sequences/ (SemanticKITTI) and {nuscenes} (nuScenes); give one")
            return folder
    if nuscenes:
        raise InputError(f"{root}: holds {nuscenes}/, which is nuScenes, not SemanticKITTI (no sequences/)")
    raise InputError(f"{root}: no sequences/, so not a SemanticKITTI tree; data/README.md shows the expected layout")


# --- the dataset ------------------------------------------------------------------------------------------------------


class _Sequence(NamedTuple):
    """One sequence: cameras, and its frames by number F."""

    name: str
    folder: Path
    K: np.ndarray  # (N, 3, 3) float64, native image
    T_ego_cam: np.ndarray  # (N, 4, 4) float64
    T_global_ego: np.ndarray  # (F, 4, 4) float64
    times: np.ndarray  # (F,) [s]
    drive: np.ndarray  # (F,) which drive of the sequence; real sequences are one
    scans: np.ndarray  # (S,) numbers of the frames with a scan, ascending


def _frame_numbers(folder: Path, *suffixes: str) -> list[int]:
    """Ascending numbers of the files NNNNNN.<suffix> of a folder."""
    names = (re.fullmatch(r"(\d{6})\.(\w+)", path.name) for path in (folder.iterdir() if folder.is_dir() else ()))
    return sorted({int(name[1]) for name in names if name and name[2] in suffixes})


def _sequences(root: Path, *kinds: str) -> list[str]:
    """Names of the sequences that have a frame in one of these folders; others are not unpacked, or not the dataset's
    (__MACOSX)."""
    folders = sorted((root / "sequences").iterdir())
    suffixes = {"velodyne": ("bin",), "voxels": ("bin", "label")}
    return [path.name for path in folders if any(_frame_numbers(path / kind, *suffixes[kind]) for kind in kinds)]


class SemanticKITTI:
    """Keyframes of one split as `common.nuscenes.Frame`s. Safe to use from forked or spawned data-loader workers.

    root       folder with sequences/ or dataset/sequences/
    split      train, val, test, "all": each sequence of the tree, or sequences by name ("00" or "00,05"); None: train
    image_size (H, W) [px] to resize to, K scaled; None: native (KITTI's images differ by some pixels per sequence)
    cache      not used: opening the whole dataset lists a few folders; it is there so that both readers open alike
    parts      what `[i]` reads beyond poses
    keyframes  "voxels": frames with voxels/*.bin or .label (every fifth); "scans": each frame with a scan
    cameras    folders of images; image_2 is the left colour camera, image_3 the right one
    truth      what `labels` gives: "files", the voxel labels; "aggregate", the labelled scans before and after (as
               the real ones: after) in the voxels, nothing invalid, for a tree without voxel labels

    A frame's fields: N = len(cameras); points (M, 5) x, y, z [m], intensity (KITTI's 0..1 times 255, nuScenes' scale),
    ring -1 (not stored); semantics (256, 256, 32) train ids; mask_camera: where the protocol scores, not .invalid as
    it is stored (there is no camera mask here); mask_lidar: what the current scan sees, not .occluded, or filled in
    .bin. Without voxel labels all three are None. boxes, future and questions do not exist.

    Raises InputError (one line: file, value, remedy) on a missing or broken file, sequence or split.
    """

    version = "semantickitti"
    classes, palette = CLASSES, PALETTE
    history = 0  # earlier scans that `[i]` gives; set it after opening

    def __init__(self, root: Path | str, split: str | None = None, image_size: tuple[int, int] | None = None,
                 cache: Path | str | None = None, parts: tuple[str, ...] = PARTS, keyframes: str = "voxels",
                 cameras: tuple[str, ...] = CAMERAS, truth: str = "files"):
        self._arguments = (root, split, image_size, cache, parts, keyframes, cameras, truth)
        self.root, self.split = find_root(root), split or "train"
        check_parts(parts, PARTS, image_size)
        if keyframes not in ("voxels", "scans"):
            raise InputError(f"keyframes '{keyframes}': choose voxels or scans")
        self.parts, self.cameras, self.truth = tuple(parts), tuple(cameras), truth
        if truth == "aggregate":
            self.label_shift = 0  # the labels are made here, where they belong
        self._size = None if image_size is None else tuple(int(v) for v in image_size)

        self._sequences: list[_Sequence] = []
        self._places: list[tuple[int, int]] = []  # dataset index -> row of _sequences, frame number
        left_out, labelled = 0, False
        for k, name in enumerate(self._select()):
            folder = self.root / "sequences" / name
            sequence = self._open(name, folder)
            self._sequences.append(sequence)
            scans = set(sequence.scans.tolist())
            wanted = _frame_numbers(folder / "voxels", "bin", "label") if keyframes == "voxels" else sorted(scans)
            self._places += [(k, frame) for frame in wanted if frame in scans]
            left_out += sum(frame not in scans for frame in wanted)
            labelled |= bool(_frame_numbers(folder / "voxels", "label"))
        if left_out:
            print(f"note: {self.root}: {left_out} frames with voxels but without a scan are left out", file=sys.stderr)
        if not self._places:
            raise InputError(f"{self.root}: split '{self.split}' has no voxels/*.bin or .label; unpack the voxel data")
        self.gts = self.root / "sequences" if labelled or truth == "aggregate" else None
        self.tokens = [f"{self._sequences[k].name}/{frame:06d}" for k, frame in self._places]
        self.scene_names = [self._scene(k, frame) for k, frame in self._places]
        self._position = {token: i for i, token in enumerate(self.tokens)}
        self._native: dict[int, tuple[int, int]] = {}

    def __reduce__(self):
        return SemanticKITTI, self._arguments

    def _select(self) -> list[str]:
        """Names of the sequences of the split that the tree has; prints a note if it has only some of them."""
        here = _sequences(self.root, "velodyne")
        official = {name for names in SPLITS.values() for name in names}
        if self.split == "all":
            chosen = here
            if others := [name for name in here if name not in official]:
                print(f"note: {self.root}: {', '.join(others)} are in no official split", file=sys.stderr)
        elif self.split in SPLITS:
            wanted = SPLITS[self.split]
            chosen = [name for name in wanted if name in here]
            if chosen and len(chosen) < len(wanted):
                few = f"{len(chosen)} of its {len(wanted)} sequences ({', '.join(chosen)})"
                print(f"note: {self.root}: split '{self.split}' has {few} here", file=sys.stderr)
        else:
            chosen = list(dict.fromkeys(name.strip() for name in self.split.split(",")))
            if unknown := [name for name in chosen if name not in here]:
                raise InputError(f"sequence or split '{unknown[0]}' is not in {self.root}, which has scans "
                                 f"of {', '.join(here) or 'no sequence'}; splits are {', '.join(SPLITS)} and "
                                 "all")
        if not chosen:
            homes = [name for name, members in SPLITS.items() if set(members) & set(here)]
            raise InputError(f"{self.root}: split '{self.split}' holds no sequence of this tree, which has "
                             f"scans of {', '.join(here) or 'none'}; use --split "
                             f"{' or '.join(homes + ['all'])}")
        return chosen

    def _open(self, name: str, folder: Path) -> _Sequence:
        P = {camera: f"P{camera.rsplit('_', 1)[-1]}" for camera in self.cameras}
        calib = read_calib(folder / "calib.txt", ("Tr", *P.values()))
        Tr, K, T = np.eye(4), [], []
        Tr[:3] = calib["Tr"]
        for camera in self.cameras:
            K.append(calib[P[camera]][:, :3])
            T_cam_cam0 = np.eye(4)
            T_cam_cam0[:3, 3] = np.linalg.solve(K[-1], calib[P[camera]][:, 3])
            T.append(rigid_inverse(T_cam_cam0 @ Tr))
        scans = np.array(_frame_numbers(folder / "velodyne", "bin"), np.int64)
        poses = read_poses(folder / "poses.txt")
        if len(poses) <= scans[-1]:
            raise InputError(f"{folder / 'poses.txt'}: {len(poses)} poses, but scans go up to {scans[-1]:06d}.bin")
        times = 0.1 * np.arange(len(poses))  # without times.txt: 10 Hz
        if (folder / "times.txt").is_file():
            path = folder / "times.txt"
            times = np.array([_numbers(path, line, 1)[0] for line in read_text(path).splitlines() if line.strip()])
            if len(times) <= scans[-1]:
                raise InputError(f"{path}: {len(times)} times, but scans go up to {scans[-1]:06d}.bin")
            if (np.diff(times) < 0).any():
                raise InputError(f"{path}: a time is before the one above it; copy it again")
        drive = np.cumsum(np.diff(times, prepend=times[:1]) > DRIVE_GAP)
        return _Sequence(name, folder, np.stack(K), np.stack(T), rigid_inverse(Tr) @ poses @ Tr, times, drive, scans)

    def _scene(self, k: int, frame: int) -> str:
        """The sequence's name; where it holds several drives, "08.3" is the fourth."""
        sequence = self._sequences[k]
        return f"{sequence.name}.{sequence.drive[frame]}" if sequence.drive[-1] else sequence.name

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, i: int) -> Frame:
        return read_frame(self, i)

    # places in time

    def index(self, token: str) -> int:
        """Token "00/000005" -> dataset index."""
        if token not in self._position:
            raise InputError(f"frame '{token}' is not in split '{self.split}' of {self.root}")
        return self._position[token]

    def past(self, i: int, n: int) -> list[int]:
        """Dataset indices of up to n previous keyframes of the same scene, nearest first."""
        first = i
        while first > 0 and first > i - n and self.scene_names[first - 1] == self.scene_names[i]:
            first -= 1
        return list(range(i - 1, first - 1, -1))

    def timestamp(self, i: int) -> int:
        """[us]"""
        k, frame = self._places[i]
        return int(round(1e6 * self._sequences[k].times[frame]))

    # files and calibration

    def _file(self, i: int, folder: str, suffix: str, step: int = 0) -> Path:
        k, frame = self._places[i]
        return self._sequences[k].folder / folder / f"{frame + step:06d}.{suffix}"

    def camera_files(self, i: int) -> list[str]:
        """Paths relative to root ("sequences/00/image_2/000005.png"), one a camera."""
        return [str(self._file(i, camera, "png").relative_to(self.root)) for camera in self.cameras]

    def lidar_file(self, i: int) -> str:
        """Path relative to root ("sequences/00/velodyne/000005.bin")."""
        return str(self._file(i, "velodyne", "bin").relative_to(self.root))

    def native(self, i: int) -> tuple[int, int]:
        """(H, W) of the images of frame i's sequence, read once, from its first keyframe's."""
        k = self._places[i][0]
        if k not in self._native:
            first = next(j for j, place in enumerate(self._places) if place[0] == k)
            with open_image(self._file(first, self.cameras[0], "png")) as image:
                self._native[k] = image.height, image.width
        return self._native[k]

    @property
    def image_shape(self) -> tuple[int, int]:
        """Native (H, W) of the first sequence."""
        return self.native(0)

    @property
    def image_size(self) -> tuple[int, int]:
        """(H, W) that images are given in; native (of the first sequence) if none was chosen."""
        return self._size or self.image_shape

    def calibration(self, i: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """-> K (N, 3, 3) float32 for `image_size`, T_ego_cam (N, 4, 4) float32, T_global_ego (4, 4) float64."""
        k, frame = self._places[i]
        sequence, scale = self._sequences[k], np.ones(3)
        if self._size is not None:
            H, W = self.native(i)
            scale = np.array([self._size[1] / W, self._size[0] / H, 1])
        K = (sequence.K * scale[:, None]).astype(np.float32)
        return K, sequence.T_ego_cam.astype(np.float32), sequence.T_global_ego[frame].copy()

    def T_ego_lidar(self, i: int) -> np.ndarray:
        """(4, 4) float64: the identity, the reference is the LiDAR."""
        return np.eye(4)

    # sensors

    def _read_images(self, i: int, step: int = 0) -> np.ndarray:
        paths, native = [self._file(i, camera, "png", step) for camera in self.cameras], self.native(i)
        return read_images(paths, native, self._size or native)

    def images(self, i: int) -> np.ndarray:
        """(N, 3, H, W) float32 RGB in [0, 1]."""
        return self._read_images(i)

    @cached_property
    def camera_sweeps(self) -> bool:
        """Whether the tree has images of the frames between keyframes (decided once, by the first frame's next)."""
        return self._file(0, self.cameras[0], "png", 1).is_file()

    def neighbour(self, i: int, step: int = 1) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Each camera's image just after (step=+1) or before (-1) the keyframe's.

        -> images (N, 3, H, W) float32, T (N, 4, 4) float32 reference <- neighbour camera, valid (N,) bool. The next
        frame's where the tree has images of every frame, else the adjacent keyframe's. Where the drive ends, valid is
        False, the image is black and T is the keyframe's own.
        """
        if step not in (-1, 1):
            raise ValueError(f"step {step}: expected +1 or -1")
        k, frame = self._places[i]
        sequence = self._sequences[k]
        there, far = i + step, 0
        if self.camera_sweeps:
            far = step
        elif 0 <= there < len(self) and self.scene_names[there] == self.scene_names[i]:
            far = self._places[there][1] - frame
        other = frame + far
        if far == 0 or other not in sequence.scans or sequence.drive[other] != sequence.drive[frame]:
            own = self.calibration(i)[1]
            H, W = self._size or self.native(i)
            return np.zeros((len(own), 3, H, W), np.float32), own, np.zeros(len(own), bool)
        T = rigid_inverse(sequence.T_global_ego[frame]) @ sequence.T_global_ego[other] @ sequence.T_ego_cam
        return self._read_images(i, far), T.astype(np.float32), np.ones(len(T), bool)

    def points(self, i: int, sweeps: int = 0) -> np.ndarray:
        """(M, 5) float32: x, y, z [m] in the reference, intensity 0..255, ring -1. Optionally with up to `sweeps`
        earlier scans of the drive (10 Hz, newest first), brought here by the poses; the keyframe's come first."""
        clouds = []
        for xyz, scan in self._scans(i, sweeps, 0):
            cloud = np.empty((len(scan), 5), np.float32)
            cloud[:, :3], cloud[:, 3], cloud[:, 4] = xyz, 255 * scan[:, 3], -1
            clouds.append(cloud)
        return np.concatenate(clouds)

    def _scans(self, i: int, before: int, after: int, labels: bool = False):
        """Yields (xyz (M, 3) float32 in frame i's reference, scan (M, 4) or raw ids (M,)) of the keyframe, then of up
        to `before` earlier and `after` later scans of its drive, nearest first."""
        k, frame = self._places[i]
        sequence = self._sequences[k]
        T_ego_global = rigid_inverse(sequence.T_global_ego[frame])
        place = int(np.searchsorted(sequence.scans, frame))
        around = [*range(place, max(place - before, 0) - 1, -1),
                  *range(place + 1, min(place + after, len(sequence.scans) - 1) + 1)]  # fmt: skip
        for other in sequence.scans[around].tolist():
            if sequence.drive[other] != sequence.drive[frame]:
                continue
            scan = read_scan(sequence.folder / "velodyne" / f"{other:06d}.bin")
            xyz = scan[:, :3]
            if other != frame:
                xyz = move_points(T_ego_global @ sequence.T_global_ego[other], scan)
            if labels:
                path = sequence.folder / "labels" / f"{other:06d}.label"
                yield xyz, (read_point_labels(path, len(scan)) & 0xFFFF).astype(np.uint16)
            else:
                yield xyz, scan

    # annotations

    def lidarseg(self, i: int, raw: bool = False) -> np.ndarray | None:
        """(M,) uint8 train id 1..19 of each keyframe point, 255 unlabelled or ignored (raw: the files' own ids,
        uint16); None for a sequence without labels/."""
        path = self._file(i, "labels", "label")
        if not path.parent.is_dir():
            return None
        ids = read_point_labels(path, len(read_scan(self.root / self.lidar_file(i)))) & 0xFFFF
        return ids.astype(np.uint16) if raw else to_train(ids, str(path), points=True)

    def labels(self, i: int) -> tuple[np.ndarray, np.ndarray, np.ndarray | None] | None:
        """-> semantics uint8 train ids, valid bool, visible bool, each (256, 256, 32); None without voxel labels.

        valid is not .invalid as stored, which is what the official scorer masks with (beside label 255); visible is
        not .occluded, or filled in .bin, put where they belong; None where there is no .occluded. A frame that has
        .bin but no .label, in a tree with labels, is an error.
        """
        if self.truth == "aggregate":
            everywhere = np.ones(SHAPE, bool)
            return self.aggregate(i, FUTURE_SCANS, FUTURE_SCANS), everywhere, everywhere
        path = self._file(i, "voxels", "label")
        if self.gts is None or not (path.is_file() or path.with_suffix(".bin").is_file()):
            return None
        semantics = to_train(read_voxel_labels(path), str(path))
        visible = ~self.bits(i, "occluded") if path.with_suffix(".occluded").is_file() else None
        if visible is not None and path.with_suffix(".bin").is_file():
            visible |= self.bits(i, "bin")
        return semantics, ~read_bits(path.with_suffix(".invalid")), visible

    def bits(self, i: int, kind: str) -> np.ndarray:
        """The frame's .bin, .invalid or .occluded -> (256, 256, 32) bool in the order of the label files (`grid`)."""
        bits = read_bits(self._file(i, "voxels", kind))
        return np.roll(bits.ravel(), self.label_shift - self.packed_shift).reshape(SHAPE)

    @cached_property
    def packed_shift(self) -> int:
        """How many voxels late the tree's packed files are: `stream_shift` of its first .bin with a scan."""
        return self._measure("bin", read_bits)

    @cached_property
    def label_shift(self) -> int:
        """The same of its voxels/*.label."""
        return self._measure("label", lambda path: read_voxel_labels(path) != 0)

    def measure_label_shift(self, i: int) -> int:
        """Set `label_shift` from frame i's .label alone, where other frames' labels are not read; -> it."""
        if self.truth == "files":
            stored = read_voxel_labels(self._file(i, "voxels", "label"))
            self.label_shift = stream_shift(stored != 0, read_scan(self.root / self.lidar_file(i)))
        return self.label_shift

    def _measure(self, suffix: str, read) -> int:
        for i in range(len(self)):
            if (path := self._file(i, "voxels", suffix)).is_file():
                return stream_shift(read(path), read_scan(self.root / self.lidar_file(i)))
        return 0

    @property
    def grid(self) -> VoxelGrid:
        """Where the voxels of the label files lie in the LiDAR frame: SEMANTICKITTI, or one voxel lower where
        `label_shift` is 1."""
        down = 0.2 * self.label_shift
        lower, upper, shape = SEMANTICKITTI
        return VoxelGrid((*lower[:2], lower[2] - down), (*upper[:2], upper[2] - down), shape)

    def aggregate(self, i: int, before: int = 0, after: int = FUTURE_SCANS, raw: bool = False) -> np.ndarray:
        """Voxel labels from the labelled scans around keyframe i -> (256, 256, 32) uint8 train ids, 0 empty (raw:
        uint16 raw ids).

        SemanticKITTI's way: the scans of the drive, brought to the keyframe by the poses, one vote a point. Objects
        that move leave their trace, as in the real labels. The defaults are the real labels': later scans only.
        """
        xyz, ids = zip(*self._scans(i, before, after, labels=True))
        voxels = voxelize(np.concatenate(xyz), np.concatenate(ids), self.grid)
        return voxels if raw else to_train(voxels)


# --- python -m common.semantickitti check -----------------------------------------------------------------------------


def check(root: Path | str) -> None:
    """Prints what of the dataset is there, and its size; raises InputError if anything required is missing.

    Required: per sequence calib.txt and poses.txt; per frame with voxels its scan and its image_2; in a sequence with
    voxel labels each such frame's .label and .invalid. Optional: the other frames' scans and images, point labels,
    .bin, .occluded, image_3, times.txt. An empty file counts as missing. Sequences are those the reader takes, which
    reads the first frame of each.
    """
    root = find_root(root)
    folders = [root / "sequences" / name for name in _sequences(root, "velodyne", "voxels")]
    frames = {folder: _frame_numbers(folder / "voxels", "bin", "label") for folder in folders}
    labelled = {folder for folder in folders if _frame_numbers(folder / "voxels", "label")}
    count = sum(map(len, frames.values()))
    print(f"{root}: {len(folders)} sequences, {count} frames with voxels")
    for name, members in SPLITS.items():
        here = [folder for folder in folders if folder.name in members]
        print(f"  {name:6} {len(here)} of {len(members)} sequences, {sum(len(frames[f]) for f in here)} such frames")

    missing: list[Path] = []

    def line(name: str, paths: list[Path], required: bool, note: str = "") -> None:
        sizes = _sizes(paths, name)
        _line(name, sizes, note or ("" if required else "optional"))
        if required:
            missing.extend(path for path, size in zip(paths, sizes) if size == 0)

    for name in ("calib.txt", "poses.txt"):
        line(name, [folder / name for folder in folders], True)
    line("times.txt", [folder / "times.txt" for folder in folders], False)
    for name, suffix in (("velodyne", "bin"), ("image_2", "png")):
        wanted = [folder / name / f"{n:06d}.{suffix}" for folder in folders for n in frames[folder]]
        line(f"{name}, with voxels", wanted, True)
        known = set(wanted)
        others = [folder / name / f"{n:06d}.{suffix}" for folder in folders for n in _frame_numbers(folder / name, suffix)]
        line(f"{name}, other frames", [path for path in others if path not in known], False)
    scans = [path for folder in folders for path in sorted((folder / "labels").glob("*.label"))]
    line("labels (points)", scans, False)
    for suffix in ("bin", "label", "invalid", "occluded"):
        needed = suffix in ("label", "invalid")
        wanted = [folder / "voxels" / f"{n:06d}.{suffix}" for folder in folders for n in frames[folder]
                  if folder in labelled or not needed]  # fmt: skip
        line(f"voxels/*.{suffix}", wanted, needed, "" if wanted else "optional: scores need it")

    complete = count > 0 and not missing
    if complete:
        dataset = SemanticKITTI(root, "all", parts=())
        late = [f"{name} 1 voxel late" for name, shift in (("packed files", dataset.packed_shift),
                                                           (".label", dataset.label_shift)) if shift]  # fmt: skip
        print(f"order of voxels: {', '.join(late) if late else 'as documented'}")
        for i in np.unique([token.split("/")[0] for token in dataset.tokens], return_index=True)[1].tolist():
            dataset.images(i), dataset.points(i), dataset.labels(i)  # files of another form are refused here
    if not count:
        raise InputError(f"{root}: no voxels/*.bin or .label in any sequence; unpack SemanticKITTI's voxel data")
    if missing:
        raise InputError(f"{missing[0]}: missing or empty; {len(missing)} required files are")


# --- python -m common.semantickitti show ------------------------------------------------------------------------------


def points_on_image(dataset: SemanticKITTI, i: int) -> np.ndarray:
    """Frame i's first image with its scan drawn on it, near over far, two pixels a point -> (H, W, 3) uint8. Colours: the
    point labels' classes (grey: none of them); without labels by distance, from red at 2 m to blue at 50 m."""
    image = np.round(255 * dataset.images(i)[0].transpose(1, 2, 0)).astype(np.uint8)
    K, T_ego_cam, _ = (m[0].astype(np.float64) if m.ndim == 3 else m for m in dataset.calibration(i))
    points, ids = dataset.points(i), dataset.lidarseg(i)
    if ids is None:
        near = np.clip(np.log(np.linalg.norm(points[:, :3], axis=1).clip(2, 50) / 2) / np.log(25), 0, 1)[:, None]
        colours = np.round(255 * np.clip(1.5 - np.abs(4 * (1 - near) - np.array([3.5, 2, 0.5])), 0, 1)).astype(np.uint8)
    else:
        colours = np.concatenate([PALETTE, np.full((236, 3), 128, np.uint8)])[ids]
    p = move_points(rigid_inverse(T_ego_cam), points) @ K.T  # (M, 3)
    order = np.argsort(-p[:, 2])
    order = order[p[order, 2] > 0.1]
    u, v = np.floor(p[order, :2] / p[order, 2:]).astype(np.int64).T
    for du, dv in ((0, 0), (1, 0), (0, 1), (1, 1)):
        inside = (u >= 0) & (u + du < image.shape[1]) & (v >= 0) & (v + dv < image.shape[0])
        image[v[inside] + dv, u[inside] + du] = colours[order[inside]]
    return image


def show(root: Path | str, out: Path | str, split: str = "all", frames: int = 4) -> list[Path]:
    """Writes <out>/<sequence>_<frame>.png of some frames, evenly spaced; -> their paths."""
    from PIL import Image

    dataset, paths = SemanticKITTI(root, split, parts=(), keyframes="scans"), []
    for i in sorted({k * len(dataset) // frames for k in range(frames)}):
        paths.append(Path(out) / f"{dataset.tokens[i].replace('/', '_')}.png")
        with atomic(paths[-1]) as temporary:
            Image.fromarray(points_on_image(dataset, i)).save(temporary, format="PNG")
        print(paths[-1])
    return paths


@exit_on_input_error
def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m common.semantickitti", description="what a folder holds")
    commands = parser.add_subparsers(required=True, dest="command")
    helps = {"check": "found, missing, size; exit code 2 if anything required is missing",
             "show": "scans drawn on their images, in the colours of their labels"}  # fmt: skip
    made = {name: commands.add_parser(name, help=text) for name, text in helps.items()}
    for command in made.values():
        command.add_argument("--data-root", required=True, help="folder with sequences/ or dataset/sequences/")
    made["show"].add_argument("--out", required=True, help="folder for the pictures")
    made["show"].add_argument("--split", default="all", help="train, val, test, all, or sequences by name (all)")
    made["show"].add_argument("--frames", type=int, default=4, choices=range(1, 1001), metavar="N", help="how many, evenly spaced (4)")
    args = parser.parse_args(argv)
    check(args.data_root) if args.command == "check" else show(args.data_root, args.out, args.split, args.frames)


if __name__ == "__main__":
    main()
