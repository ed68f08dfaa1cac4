"""Occ3D-nuScenes and SemanticKITTI behind one door, for methods that run on both: label sets, opening, truth.

Inside a network the classes of either are 0..S-1 and S is empty, whatever the dataset's ids (`LabelSet`).
"""

from pathlib import Path
from typing import NamedTuple

import numpy as np

from common.files import InputError, read_json
from common.geometry import OCC3D, SEMANTICKITTI, VoxelGrid
from common.nuscenes import FREE, OCC3D_CLASSES, NuScenesOccupancy, open_split
from common.semantickitti import CLASSES as KITTI_CLASSES
from common.semantickitti import SemanticKITTI

IGNORE = 255


class LabelSet(NamedTuple):
    """A dataset's grid and classes, its ids of these and of empty, and what its rig sees."""

    grid: VoxelGrid
    classes: tuple[str, ...]  # S names
    ids: tuple[int, ...]  # S + 1, empty's last
    none: int  # "no label" in 2D maps
    cameras: int
    sides: int  # directions along x that cameras look in: 2, before and behind the ego, or 1
    points: int  # of a sweep, about

    @property
    def solid(self) -> int:
        """S, the number of occupied classes and the inner id of empty."""
        return len(self.classes)

    def moved(self, shift: int) -> VoxelGrid:
        """The grid where label files are `shift` voxels late (see common/semantickitti.py)."""
        (x, y, low), (x1, y1, top), _ = self.grid
        down = shift * self.grid.voxel_size[2]
        return self.grid._replace(lower=(x, y, low - down), upper=(x1, y1, top - down))

    def of_name(self, name: str) -> int:
        """The dataset's id of a class."""
        return self.ids[self.classes.index(name)]

    def inner(self, ids: np.ndarray) -> np.ndarray:
        """Dataset ids (...) uint8 -> inner ids, 255 for all others."""
        table = np.full(256, IGNORE, np.uint8)
        table[list(self.ids)] = np.arange(len(self.ids))
        return table[ids]

    def outer(self, inner: np.ndarray) -> np.ndarray:
        """Inner ids 0..S (...) -> the dataset's, uint8."""
        return np.array(self.ids, np.uint8)[inner]

    def map_ids(self) -> range:
        """The dataset's ids of the occupied classes."""
        return range(min(self.ids[:-1]), max(self.ids[:-1]) + 1)


LABEL_SETS = {
    "occ3d": LabelSet(OCC3D, OCC3D_CLASSES[:FREE], tuple(range(FREE + 1)), FREE, 6, 2, 35000),
    "semantickitti": LabelSet(SEMANTICKITTI, KITTI_CLASSES[1:], (*range(1, 20), 0), IGNORE, 1, 1, 120000),
}


def format_of(root: Path) -> str:
    """The format of a tree, by its folders; the readers refuse one that has both or neither."""
    kitti = any((folder / "sequences").is_dir() for folder in (Path(root), Path(root) / "dataset"))
    return "semantickitti" if kitti else "occ3d"


def open_dataset(root: Path, version: str | None, split: str | None, image_size: tuple[int, int],
                 cache: Path | None = None, train: bool = True, history: int = 0,
                 truth: str = "files") -> NuScenesOccupancy | SemanticKITTI:
    """Images, points and calibration of the split named, else of the tree's own training or validation split.

    history: earlier sweeps in Frame.history. truth: see `SemanticKITTI`; with "aggregate" every scan is a
    keyframe.
    """
    if format_of(root) == "semantickitti":
        keyframes = "scans" if truth == "aggregate" else "voxels"
        split = split or ("train" if train else "val")
        dataset = SemanticKITTI(root, split, image_size, cache, keyframes=keyframes, truth=truth)
    elif truth != "files":
        raise InputError(f"--truth {truth}: only SemanticKITTI's scans have labels of points; use files")
    else:
        dataset = open_split(root, version, split, image_size, cache, train)
    dataset.parts, dataset.history = ("images", "points"), history
    return dataset


def voxel_truth(dataset: NuScenesOccupancy | SemanticKITTI, i: int, labels: LabelSet) -> np.ndarray:
    """Ground truth of frame i: (X, Y, Z) uint8 inner ids, 255 where the dataset has none."""
    found = dataset.labels(i)
    if found is None:
        token = dataset.tokens[i]
        raise InputError(f"{dataset.root}: frame {token} is in the label list but has no voxel labels")
    ids = labels.inner(found[0])
    return np.where(found[1], ids, IGNORE).astype(np.uint8) if isinstance(dataset, SemanticKITTI) else ids


def read_frame_list(path: Path, dataset: NuScenesOccupancy | SemanticKITTI) -> list[int]:
    """A label list {"labelled": [token, ...]} -> dataset indices, ascending; InputError: an unknown frame or
    a broken file."""
    value = read_json(path)
    tokens = value.get("labelled") if isinstance(value, dict) else None
    if not (isinstance(tokens, list) and tokens and all(isinstance(token, str) for token in tokens)):
        raise InputError(f"{path}: expected JSON with a list 'labelled' of frame tokens")
    known = {token: i for i, token in enumerate(dataset.tokens)}
    for token in tokens:
        if token not in known:
            raise InputError(f"{path}: frame '{token}' is not in split '{dataset.split}' of {dataset.root}")
    if len(set(tokens)) < len(tokens):
        raise InputError(f"{path}: a frame is named twice")
    return sorted(known[token] for token in tokens)
