"""Label folders: <out>/<scene>/<token>/labels.npz and labels.json, made scene by scene, resumable, refused if
mixed.

A method gives a `LabelMaker`: the generator that turns one scene's 2D maps into labels, and the names of the
Config fields that the labels depend on. What a label is stays in the method's file; folders, resume, shards
and processes are here.
"""

import json
import multiprocessing
import os
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from common.files import InputError, end_with_parent, read_json, read_npz, sweep, write_json, write_npz
from common.geometry import OCC3D
from common.nuscenes import FREE

IGNORE = 255
WORLD = {"depth_level": "mild", "semantic_level": "mild", "correlation": 0.8, "seed": 0}  # its 2D maps

OPTIONS = {  # labeler -> its options, and the flag of each
    "world": {"depth_level": "depth_level", "semantic_level": "semantic_level", "correlation": "correlation",
              "seed": "label_seed"},
    "foundation": {"grounding": "grounding", "sam": "sam", "depth": "depth_model"},
    "files": {"maps": "maps"},
    "lidar": {},
}
TWO_SOURCES = {  # the same of labelers.TwoSources
    "world": {"primary_level": "primary_level", "auxiliary_level": "auxiliary_level",
              "correlation": "correlation", "seed": "label_seed"},
    "foundation": {"segmenter": "segmenter", "grounding": "grounding", "sam": "sam"},
    "files": {"maps": "maps", "auxiliary_maps": "auxiliary_maps"},
    "lidar": {},
}


class LabelMaker(NamedTuple):
    """How a method makes labels.

    of_scene(dataset, indices, labeler, cfg, todo) yields (keyframe, {array name: array}) in order of time. It
    may skip keyframes that are not in `todo`. fields: the Config fields that the labels depend on. options:
    labeler options that the method sets. check(dataset, labeler): text for the protocol line, before the
    labeler's own; raises InputError if the tree lacks what the labels need. flags: of the labeler's options.
    labeler(name, dataset, **options): the 2D labeler; None: labelers.make_labeler. maps: names of the arrays,
    where labels are 2D maps: PNGs in the maps format, not one labels.npz.
    """

    of_scene: Callable[..., Iterator[tuple[int, dict[str, np.ndarray]]]]
    fields: tuple[str, ...]
    options: dict[str, dict[str, Any]] = {}
    check: Callable[[Any, str], str] | None = None
    flags: dict[str, dict[str, str]] = OPTIONS
    labeler: Callable | None = None
    maps: tuple[str, ...] = ()

    def open(self, name: str, dataset: Any, options: dict[str, Any]) -> Callable:
        """-> the labeler named."""
        from common.labelers import make_labeler

        return (self.labeler or make_labeler)(name, dataset, **options)

    def files(self, folder: Path, dataset: Any, i: int) -> list[Path]:
        """The label files of keyframe i."""
        from common.labelers import map_paths

        if not self.maps:
            return [label_path(folder, dataset, i)]
        return [path for kind in self.maps for path in map_paths(folder, kind, dataset.camera_files(i))]

    def write(self, folder: Path, dataset: Any, i: int, arrays: dict[str, np.ndarray]) -> None:
        """Write the label of keyframe i, each file whole or not at all."""
        from common.labelers import write_semantic

        if not self.maps:
            write_npz(label_path(folder, dataset, i), **arrays)
        for kind in self.maps:
            write_semantic(folder, dataset.camera_files(i), arrays[kind], kind)


def label_path(folder: Path, dataset: Any, i: int) -> Path:
    """The label file of keyframe i."""
    return Path(folder) / dataset.scene_names[i] / dataset.tokens[i].split("/")[-1] / "labels.npz"


def label_record(maker: LabelMaker, dataset: Any, labeler: str, options: dict[str, Any],
                 cfg: Any) -> dict[str, Any]:
    """All that a set of labels depends on, as labels.json keeps it. Raises the labeler's own InputError."""
    note = f"{maker.check(dataset, labeler)}; " if maker.check else ""
    note += maker.open(labeler, dataset, options).note
    kept = {name: value for name, value in options.items() if name != "cache_maps"}
    fields = {name: getattr(cfg, name) for name in maker.fields}
    record = {"labeler": labeler, **kept, **fields, "data": {"version": dataset.version, "note": note}}
    return json.loads(json.dumps(record, default=str))


def make_labels(maker: LabelMaker, dataset: Any, labeler: str, options: dict[str, Any], cfg: Any, out: Path,
                *, only: Iterable[int] | None = None, shard: tuple[int, int] = (0, 1), workers: int = 2,
                keep_maps: bool = False) -> None:
    """Write the labels of `dataset`'s keyframes that are missing in `out`.

    only: these keyframes. shard (i, n): the i-th of n parts, by scene; torchrun's ranks divide it further.
    keep_maps: store the 2D maps too, in out/maps. Raises InputError if `out` was made with other settings.
    """
    begun, path, options = time.time(), out / "labels.json", options | maker.options.get(labeler, {})
    if labeler == "foundation" and not maker.maps:
        options = options | {"cache_maps": out / "maps"}  # the models' work outlives a killed run
    wanted = label_record(maker, dataset, labeler, options, cfg)
    if path.is_file():
        sweep(out)
        old = read_json(path, dict)
        if differ := [name for name in wanted if old.get(name) != wanted[name]]:
            raise InputError(f"{path}: made with another {', '.join(differ)}; choose another folder or "
                             "delete this one")
    else:
        write_json(path, wanted)
    scenes: dict[str, list[int]] = {}
    for i, scene in enumerate(dataset.scene_names):
        scenes.setdefault(scene, []).append(i)
    asked = set(range(len(dataset)) if only is None else only)
    rank, ranks = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    mine = sorted(scene for scene in scenes if asked & set(scenes[scene]))
    mine = mine[shard[0] * ranks + rank :: shard[1] * ranks]
    jobs = [(maker, dataset, scenes[scene], asked & set(scenes[scene]), labeler, options, cfg, out, keep_maps)
            for scene in mine]
    total, written = sum(len(job[3]) for job in jobs), 0
    processes = 1 if labeler == "foundation" else min(workers, len(jobs))  # one set of models in memory
    with tqdm(total=total, desc="labels", unit="keyframe") as bar:
        for job, count in zip(jobs, each(_label_scene, jobs, processes), strict=True):
            written += count
            bar.update(len(job[3]))
    print(f"labels: {total} keyframes of {len(jobs)} scenes, {written} new, {time.time() - begun:.0f} s -> "
          f"{out}")


def each(function: Callable, jobs: list, processes: int) -> Iterator:
    """function(job) of every job, in order; in spawned processes, since torch's threads do not survive a
    fork."""
    if processes < 2:
        yield from map(function, jobs)
        return
    with multiprocessing.get_context("spawn").Pool(processes, _start_worker) as pool:
        yield from pool.imap(function, jobs)


def _start_worker() -> None:
    torch.set_num_threads(1)
    end_with_parent()


def _label_scene(job: tuple) -> int:
    """Write one scene's missing labels; -> how many were written."""
    from common.labelers import write_maps

    maker, dataset, indices, asked, name, options, cfg, out, keep_maps = job
    todo = {i for i in asked if not all(path.is_file() for path in maker.files(out, dataset, i))}
    if not todo:
        return 0
    labeler = maker.open(name, dataset, options)

    def kept(i: int):
        maps = labeler(i)
        write_maps(out / "maps", dataset.camera_files(i), maps)
        return maps

    for i, arrays in maker.of_scene(dataset, indices, kept if keep_maps else labeler, cfg, todo):
        if i in todo:
            maker.write(out, dataset, i, arrays)
    return len(todo)


def read_label(folder: Path, dataset: Any, i: int, *names: str, shape: tuple[int, ...] = OCC3D.shape,
               top: int = FREE) -> tuple[np.ndarray, ...]:
    """-> uint8 arrays `semantics`, *names of keyframe i. Raises InputError if one is missing or an id is
    above `top`."""
    path = label_path(folder, dataset, i)
    if not path.is_file():
        raise InputError(
            f"{path}: no label of this keyframe; make it with the verb labels and --out {folder}"
        )
    arrays = read_npz(path, {name: (shape, "uint8") for name in ("semantics", *names)})
    if (arrays["semantics"] > top).any():
        raise InputError(f"{path}: 'semantics' holds id {arrays['semantics'].max()}, expected 0..{top}")
    return tuple(arrays[name] for name in ("semantics", *names))


def labels_note(folder: Path) -> str:
    """The text of labels.json for the protocol line; empty without that file."""
    path = Path(folder) / "labels.json"
    record = read_json(path, {"data?": {"note?": str}}) if path.is_file() else {}
    return record.get("data", {}).get("note", "")


def under_ground(target: Tensor, first: int = 11, last: int = 14, reach: int = 5) -> Tensor:
    """Voxels below the lowest ground voxel (ids first to last) that is at most `reach` voxels away along x and y. Ours.

    target (X, Y, Z) ids of Occ3D, z upwards -> bool; False where no ground is near. One depth error lifts the ground
    of a column, so its neighbours are asked too.
    """
    flat = ((target >= first) & (target <= last)).numpy()
    lowest = np.where(flat.any(2), flat.argmax(2), flat.shape[2])  # (X, Y)
    lowest = -F.max_pool2d(-torch.from_numpy(lowest).float()[None], 2 * reach + 1, 1, reach)[0]
    return (torch.arange(flat.shape[2]) < lowest[..., None]) & (lowest < flat.shape[2])[..., None]


def class_weights(targets: Iterable[Tensor | np.ndarray], classes: int = 18, rule: str = "sqrt") -> Tensor:
    """The `weights_of` the targets' ids; 255 ignored."""
    count = np.zeros(classes)
    for target in tqdm(targets, "class weights", leave=False):
        count += np.bincount(np.asarray(target).ravel(), minlength=IGNORE + 1)[:classes]
    return weights_of(count, rule)


def weights_of(count: np.ndarray, rule: str = "sqrt") -> Tensor:
    """How often each id occurs -> its weight, mean 1 over the classes present, 0 for absent ones.

    rule: sqrt, freq^-0.5; log, MonoScene's 1 / log(freq + .001).
    """
    weight = 1 / (np.log(np.maximum(count, 2) + 0.001) if rule == "log" else np.sqrt(np.maximum(count, 1)))
    weight = np.where(count > 0, weight, 0)
    return torch.from_numpy(weight / weight[weight > 0].mean() if weight.any() else weight).float()
