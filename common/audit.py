"""The auditor: one folder of predictions, anybody's, under every protocol, with the name of who reports with
which.

    python -m common.metrics audit --pred P --data-root D [--version v] [--split s] [--task occupancy] [--json F]
    python -m common.metrics audit --pred P --data-root D --task planning
    python -m common.metrics audit --pred P --data-root D --task ssc          # D: a SemanticKITTI tree

Occupancy predictions are uint8 200x200x16, ids 0..17; planning's (6, 2) float [m], x right, y forward, 0.5 s
apart, in the LIDAR_TOP frame; scene completion's uint8 256x256x32 train ids 0..19. A file lies at one of
FORMS below, such as <P>/<sample_token>.npz (what --save-pred and SparseOcc write),
<P>/<scene>/<sample_token>/labels.npz (a label folder) or <P>/<sample_token>.npy; in an npz under one of KEYS,
such as `pred`, or `arr_0` as the CVPR 2023 challenge has it. Scene completion also takes SemanticKITTI's
submission form, <P>/sequences/<seq>/predictions/<frame>.label (uint16 raw ids). The form found is printed.
Each file of the split must be there and right, or nothing is scored.
"""

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from common.files import InputError, exit_on_input_error, npz_keys, read_npy, read_npz, write_json
from common.metrics import (FREE, PLANNING_PROTOCOLS, PROTOCOLS, RAY_THRESHOLDS, OccupancyMeter,
                            PlanningMeter, box_corners, protocol_line, rasterize, shown, ssc_confusion,
                            ssc_scores_of)
from common.nuscenes import FAR, NuScenesOccupancy, find_root, find_version, rigid_inverse
from common.semantickitti import CLASSES as SSC_CLASSES
from common.semantickitti import IGNORED, SemanticKITTI, read_voxel_labels, to_train

SEED_NOISE = 1.0  # mIoU points: maintainers report 1 to 2 between seeds of one model; a larger gap is the protocol's
L2_NOISE = 0.05  # [m] at 3 s; ours: no seed study of open-loop planning was found

_RULES = {"zero": "0 if predicted", "skip": "skipped", "one": "counts as 1"}
_SSC_USERS = {
    "semantickitti": "SemanticKITTI's benchmark (semantic-kitti-api)",
    "monoscene": "MonoScene and the code that grew from it (VoxFormer, ...; unverified)",
}
_PLANNING_USERS = {"uniad": "UniAD and its followers", "stp3": "ST-P3", "vad": "VAD, OccWorld, OccVLA (assumed)"}


# --- reading what others wrote ------------------------------------------------------------------------------


PLACES = ("{token}", "{scene}/{token}/labels", "{scene}/{token}/pred", "{scene}/{token}", "{token}/pred")
FORMS = tuple(f"{place}.{suffix}" for suffix in ("npz", "npy") for place in PLACES)
KEYS = {  # of an npz, by task
    "occupancy": ("pred", "semantics", "arr_0"),
    "planning": ("trajectory", "arr_0"),
    "ssc": ("pred", "arr_0"),
}


class Form(NamedTuple):
    """How a folder of predictions is laid out."""

    folder: Path
    place: str  # of FORMS
    key: str  # in an npz

    def path(self, dataset, i: int) -> Path:
        return self.folder / self.place.format(scene=dataset.scene_names[i], token=dataset.tokens[i])

    def read(self, dataset, i: int, shape: tuple[int, ...], dtype: str | None) -> tuple[np.ndarray, Path]:
        """Frame i's array and its file. InputError on a missing, unreadable or wrong file."""
        path = self.path(dataset, i)
        if path.suffix == ".npy":
            return read_npy(path, shape, dtype), path
        return read_npz(path, {self.key: (shape, dtype)})[self.key], path

    def __str__(self) -> str:
        key = "" if self.place.endswith(".npy") else f", key '{self.key}'"
        return self.place.replace("{", "<").replace("}", ">") + key


def find_form(folder: Path, dataset, keys: tuple[str, ...]) -> Form:
    """The first of FORMS that any frame has, and the first of `keys` that its first file holds."""
    for place in FORMS:
        form = Form(folder, place, keys[0])
        for i in range(len(dataset)):
            if (path := form.path(dataset, i)).is_file():
                try:
                    held = npz_keys(path) if path.suffix == ".npz" else []
                except InputError:  # `check_all` tells
                    held = []
                return form._replace(key=next((key for key in keys if key in held), keys[0]))
    return Form(folder, FORMS[0], keys[0])


def read_occupancy(form: Form, dataset: NuScenesOccupancy, i: int) -> np.ndarray:
    """-> (200, 200, 16) uint8; InputError on a missing, unreadable or wrong file."""
    ids, path = form.read(dataset, i, (200, 200, 16), "uint8")
    if ids.max() > FREE:
        raise InputError(f"{path}: '{form.key}' holds id {ids.max()}, expected 0..{FREE}")
    return ids


def read_trajectory(form: Form, dataset: NuScenesOccupancy, i: int) -> np.ndarray:
    """-> (6, 2) float64; InputError on a missing, unreadable or wrong file."""
    trajectory, path = form.read(dataset, i, (6, 2), None)
    if trajectory.dtype.kind != "f":
        raise InputError(f"{path}: '{form.key}' has dtype {trajectory.dtype}, expected a float")
    if not (np.abs(trajectory) < FAR).all():
        raise InputError(f"{path}: '{form.key}' holds nan, inf or a place {FAR:.0e} m away")
    return trajectory.astype(np.float64)


def check_all(read: Callable, count: int, truth: Callable[[int], tuple] = lambda i: ()) -> None:
    """Reads each prediction once before anything is scored; one line names the first bad one and how many
    there are."""
    problems = []
    for i in tqdm(range(count), "checking files", leave=False):
        known = truth(i)  # a fault of the dataset's is not the predictions': it ends the audit as it is
        try:
            read(i, *known)
        except InputError as error:
            problems.append(str(error))
    if problems:
        bad = f"{len(problems)} of {count} prediction files missing or wrong, nothing scored"
        raise InputError(f"{problems[0]} ({bad})")


# --- occupancy ----------------------------------------------------------------------------------------------


def audit_occupancy(dataset: NuScenesOccupancy, folder: Path, rays: bool = True) -> dict:
    """-> {"rows": the table, "warnings", "metrics", "per_class"}; scores in rows are percent, in metrics
    fractions."""
    if dataset.gts is None:
        raise InputError(f"{dataset.root}: no gts/ (Occ3D labels) to score against")
    form = find_form(folder, dataset, KEYS["occupancy"])
    read = partial(read_occupancy, form, dataset)
    check_all(read, len(dataset))
    meter = OccupancyMeter()
    for i in tqdm(range(len(dataset)), "scoring", unit="frame"):
        semantics, camera, lidar = dataset.labels(i)
        origins = dataset.ray_origins(i) if rays else None
        meter.add(read(i), semantics, camera, lidar, group=dataset.scene_names[i], origins=origins)
    metrics = meter.metrics()

    rows = [_row(name, rule.mask, rule, metrics.get(f"miou_{name}"), rule.users) for name, rule in PROTOCOLS.items()]
    extra = {
        "selfsup15": ("both", "the same under OccNeRF's mask"),
        "flashocc": ("none", "EasyOcc's full scene; occupancy without visibility masks"),
    }
    for name, (mask, users) in extra.items():
        key = f"miou15_{mask}" if name == "selfsup15" else f"miou_{mask}"
        rows.append(_row(name, mask, PROTOCOLS[name], metrics.get(key), users))
    nobody = "nobody known; the labels carry this mask"
    rows.append(_row("flashocc", "lidar", PROTOCOLS["flashocc"], metrics.get("miou_lidar"), nobody))
    warnings = _spread(rows, SEED_NOISE)
    users = {"camera": "GaussTR", "both": "OccNeRF", "none": "scene completion"}
    for mask, who in users.items():
        rows.append(_line("IoU", "geometry", mask, "occupied", "-", metrics.get(f"iou_{mask}"), who))
    rows.append(_line("IoU", "selfocc", "camera", "1..16 occupied", "-", metrics.get("iou_selfocc"), "SelfOcc"))
    for key in ("rayiou", *(f"rayiou@{t}" for t in RAY_THRESHOLDS)) if rays else ():
        rows.append(_line(key.replace("rayiou", "RayIoU"), "rayiou", "rays", "17", "skipped", metrics.get(key),
                          "SparseOcc, EasyOcc v4"))  # fmt: skip
    result = {"rows": rows, "warnings": warnings, "metrics": metrics, "per_class": meter.per_class()}
    return {"form": str(form), **result}


def _line(score: str, protocol: str, mask: str, classes: str, absent: str, value: float | None, users: str) -> dict:
    percent = None if value is None else 100 * value
    return {"score": score, "protocol": protocol, "mask": mask, "classes": classes, "absent": absent,
            "percent": percent, "reported_by": users}  # fmt: skip


def _row(name: str, mask: str, rule, value: float | None, users: str) -> dict:
    return _line("mIoU", name, mask, str(len(rule.mean)), _RULES[rule.absent], value, users)


def _spread(rows: list[dict], threshold: float) -> list[str]:
    """One line if two mIoU rows are further apart than a seed's noise."""
    scored = sorted((row for row in rows if row["percent"] is not None), key=lambda row: row["percent"])
    if len(scored) < 2 or scored[-1]["percent"] - scored[0]["percent"] <= threshold:
        return []
    pairs = [(a, b) for k, a in enumerate(scored) for b in scored[k + 1 :] if b["percent"] - a["percent"] > threshold]
    low, high = ({"name": f"{r['protocol']} ({r['mask']})", "percent": r["percent"]} for r in (scored[0], scored[-1]))
    return [
        f"{len(pairs)} pairs of protocols differ by more than a seed's noise ({threshold:.1f} mIoU), the most "
        f"{low['name']} {low['percent']:.2f} and {high['name']} {high['percent']:.2f}: compare within one row only"
    ]


def occupancy_table(rows: list[dict]) -> list[str]:
    """Rows of an occupancy audit -> the lines of its table."""
    head = ("score", "protocol", "mask", "classes", "absent class", "%", "reported by")
    body = [
        (r["score"], r["protocol"], r["mask"], r["classes"], r["absent"], shown(r["percent"], 2), r["reported_by"])
        for r in rows
    ]
    return _aligned([head, *body], right=(5,))


def _aligned(rows: list[tuple[str, ...]], right: tuple[int, ...]) -> list[str]:
    widths = [max(len(row[k]) for row in rows) for k in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [cell.rjust(w) if k in right else cell.ljust(w) for k, (cell, w) in enumerate(zip(row, widths))]
        lines.append("  ".join(cells).rstrip())
    return [lines[0], "-" * max(map(len, lines)), *lines[1:]]


# --- planning -----------------------------------------------------------------------------------------------


def planning_truth(dataset: NuScenesOccupancy, i: int) -> tuple[np.ndarray, np.ndarray, dict[str, tuple]]:
    """Keyframe i -> trajectory (6, 2) [m], mask (6,), {protocol: (vehicles, pedestrians)}, each (6, 200, 200)
    bool.

    All in the LIDAR_TOP frame of i (x right, y forward). Obstacles are all boxes of the future keyframe
    itself, painted as ST-P3 and VAD paint them; so they also hold those that appear later (VAD follows only
    the boxes of keyframe i) and those without LiDAR points. Vehicles: categories vehicle.*, bicycles among
    them; pedestrians: human.*.
    """
    future = dataset.future(i)
    T_lidar_global = rigid_inverse(dataset.calibration(i)[2] @ dataset.T_ego_lidar(i))
    corners = {"vehicle": [[] for _ in range(6)], "human": [[] for _ in range(6)]}
    for step in np.flatnonzero(future.mask).tolist():
        j = i + 1 + step  # a scene's keyframes are consecutive, and the mask ends with the scene
        boxes = dataset.boxes(j)
        T = T_lidar_global @ dataset.calibration(j)[2] @ boxes.T_ego_box
        yaw = np.arctan2(T[:, 1, 0], T[:, 0, 0])
        for b, name in enumerate(boxes.names):
            kind = name.split(".")[0]
            if kind in corners:
                corners[kind][step].append(box_corners(*T[b, :2, 3], yaw[b], boxes.size[b, 1], boxes.size[b, 0]))
    rasters = {
        protocol: tuple(np.stack([rasterize(step, protocol) for step in corners[kind]]) for kind in corners)
        for protocol in PLANNING_PROTOCOLS
    }
    return future.trajectory, future.mask, rasters


def audit_planning(dataset: NuScenesOccupancy, folder: Path) -> dict:
    """-> {"rows", "warnings", "metrics"}: l2 in [m], collisions in percent (rows) and fractions (metrics)."""
    dataset.check_steps()
    form = find_form(folder, dataset, KEYS["planning"])
    read = partial(read_trajectory, form, dataset)
    check_all(read, len(dataset))
    meter = PlanningMeter()
    for i in tqdm(range(len(dataset)), "scoring", unit="frame"):
        trajectory, mask, rasters = planning_truth(dataset, i)
        meter.add(read(i), trajectory.astype(np.float64), mask, rasters, group=dataset.scene_names[i])
    metrics, rows = meter.metrics(), []
    for protocol, rule in PLANNING_PROTOCOLS.items():
        row = {"protocol": protocol, "rule": rule, "samples": meter.counted(protocol)}
        for name, scale in (("l2", 1), ("obj_col", 100), ("obj_box_col", 100)):
            for horizon in ("1s", "2s", "3s", "avg"):
                value = metrics.get(f"{name}_{horizon}_{protocol}")
                row[f"{name}_{horizon}"] = None if value is None else scale * value
        rows.append(row | {"reported_by": _PLANNING_USERS[protocol]})
    return {"form": str(form), "rows": rows, "warnings": _planning_spread(rows), "metrics": metrics}


def _planning_spread(rows: list[dict]) -> list[str]:
    scored = sorted((row for row in rows if row["l2_3s"] is not None), key=lambda row: row["l2_3s"])
    if len(scored) < 2 or scored[-1]["l2_3s"] - scored[0]["l2_3s"] <= L2_NOISE:
        return []
    low, high = scored[0], scored[-1]
    return [
        f"L2 at 3 s differs by more than {L2_NOISE} m between protocols ({low['protocol']} {low['l2_3s']:.2f}, "
        f"{high['protocol']} {high['l2_3s']:.2f}): compare within one row only"
    ]


def planning_table(rows: list[dict]) -> list[str]:
    """Rows of a planning audit -> the lines of its table."""
    horizons = ("1s", "2s", "3s", "avg")
    columns = [f"L2 {h} [m]" for h in horizons] + [f"box col {h} %" for h in horizons]
    head = ("protocol", "samples", *columns, "reported by")
    body = [
        (r["protocol"], str(r["samples"]), *(shown(r[f"l2_{h}"], 3) for h in horizons),
         *(shown(r[f"obj_box_col_{h}"], 2) for h in horizons), r["reported_by"])
        for r in rows
    ]  # fmt: skip
    rules = [f"{r['protocol']}: {r['rule']}" for r in rows]
    return _aligned([head, *body], right=tuple(range(1, 10))) + rules


# --- scene completion ---------------------------------------------------------------------------------------


SUBMISSION = "sequences/<seq>/predictions/<frame>.label"


def read_ssc(form: Form | None, dataset: SemanticKITTI, folder: Path, i: int, scored: np.ndarray) -> np.ndarray:
    """-> (256, 256, 32) uint8 train ids; InputError on a missing, unreadable or wrong file.

    form None: a submission. scored (256, 256, 32) bool: an id that means "ignored" (raw 1, 52, 99) is an
    error only where it would be scored.
    """
    if form is not None:
        ids, path = form.read(dataset, i, scored.shape, "uint8")
    else:
        sequence, frame = dataset.tokens[i].split("/")
        path = folder / "sequences" / sequence / "predictions" / f"{frame}.label"
        ids = to_train(read_voxel_labels(path), str(path))
    wrong = scored & (ids >= len(SSC_CLASSES))
    if wrong.any():
        what = "an ignored class" if ids[wrong][0] == IGNORED else f"id {ids[wrong][0]}"
        raise InputError(f"{path}: {what} at {wrong.sum()} voxels that count, expected the classes 0..19")
    return ids


def audit_ssc(dataset: SemanticKITTI, folder: Path) -> dict:
    """-> {"rows", "warnings", "metrics", "per_class"}; scores in rows are percent, elsewhere fractions."""
    if dataset.gts is None:
        raise InputError(f"{dataset.root}: no voxels/*.label in split '{dataset.split}' to score against")
    form = find_form(folder, dataset, KEYS["ssc"])
    form = form if any(form.path(dataset, i).is_file() for i in range(len(dataset))) else None

    def truth(i: int) -> tuple[np.ndarray, np.ndarray]:
        found = dataset.labels(i)
        if found is None:
            raise InputError(f"{dataset.root}/sequences/{dataset.tokens[i]}: no voxel labels of this frame")
        return found[:2]

    def read(i: int, semantics: np.ndarray, valid: np.ndarray) -> np.ndarray:
        return read_ssc(form, dataset, folder, i, valid & (semantics != IGNORED))

    check_all(read, len(dataset), truth)
    confusion = 0
    for i in tqdm(range(len(dataset)), "scoring", unit="frame"):
        semantics, valid = truth(i)
        confusion = confusion + ssc_confusion(read(i, semantics, valid), semantics, ~valid)
    scores = {protocol: ssc_scores_of(confusion, protocol) for protocol in _SSC_USERS}
    rows, metrics = [], {}
    for protocol, users in _SSC_USERS.items():
        for key, name, classes, absent in (("miou", "mIoU", "19", "counts as 0"), ("iou", "IoU", "occupied", "-"),
                                           ("precision", "precision", "occupied", "-"),
                                           ("recall", "recall", "occupied", "-")):  # fmt: skip
            metrics[f"{key}_{protocol}"] = scores[protocol][key]
            rows.append(_line(name, protocol, "valid", classes, absent, scores[protocol][key], users))
    per_class = dict(zip(SSC_CLASSES, scores["semantickitti"]["per_class"]))
    absent = [name for k, name in enumerate(SSC_CLASSES) if k and not confusion[:, k].sum()]
    warnings = [f"{len(absent)} of 19 classes are not in this truth and count as 0 ({', '.join(absent)}): a perfect "
                f"prediction has mIoU {100 * (19 - len(absent)) / 19:.2f}"] if absent else []  # fmt: skip
    result = {"rows": rows, "warnings": warnings, "metrics": metrics, "per_class": per_class}
    return {"form": str(form or SUBMISSION), **result}


def ssc_class_lines(per_class: dict[str, float]) -> list[str]:
    """The well-known line of each class 1..19."""
    return [f"===> {name} - IoU = {100 * iou:.2f}" for name, iou in per_class.items() if name != SSC_CLASSES[0]]


# --- python -m common.metrics audit -------------------------------------------------------------------------


def audit(pred: Path | str, data_root: Path | str, version: str | None = None, split: str | None = None,
          task: str = "occupancy", json_path: Path | str | None = None, cache: Path | str | None = None,
          rays: bool = True) -> dict:
    """Scores a folder, prints the table, writes it as JSON if asked; -> what the JSON holds."""
    folder = Path(pred)
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder of predictions; give --pred the folder that holds <token>.npz")
    if task == "ssc":
        split, name = split or "val", "SemanticKITTI"
        dataset = SemanticKITTI(data_root, split, parts=())
        root, version = dataset.root, dataset.version
        result = audit_ssc(dataset, folder)
    else:
        root = find_root(data_root)
        version, name = find_version(root, version), "nuScenes"
        split = split or ("mini_val" if version.endswith("mini") else "val")
        dataset = NuScenesOccupancy(data_root, version, split, cache=cache, parts=())
        result = audit_occupancy(dataset, folder, rays) if task == "occupancy" else audit_planning(dataset, folder)

    # the synthetic world says what it is in exact/world.json
    name = "synthetic driving world" if (root / "exact" / "world.json").is_file() else name
    frames = len(dataset)
    if task == "ssc":
        line = protocol_line(name, version, split, frames, "256x256x32 at 0.2 m", "unknown",
                             "valid: label not 255, not in .invalid", "classes 1..19, absent ones as 0")  # fmt: skip
        table = occupancy_table(result["rows"]) + ["", *ssc_class_lines(result["per_class"])]
    elif task == "occupancy":
        line = protocol_line(name, version, split, frames, train_mask="unknown", eval_mask="as named in each row",
                             classes="the classes named in each row")  # fmt: skip
        table = occupancy_table(result["rows"])
    else:
        line = f"protocol: {name} {version} {split}, {frames} frames, 6 steps of 0.5 s; obstacles: all boxes then"
        table = planning_table(result["rows"])
    print("\n".join([f"predictions: {folder} ({result['form']})", line, "", *table]))
    for warning in result["warnings"]:
        print(f"warning: {warning}")
    result = {"task": task, "predictions": str(folder),
              "dataset": {"name": name, "version": version, "split": split, "frames": frames},
              "noise": L2_NOISE if task == "planning" else SEED_NOISE, **result}  # fmt: skip
    if json_path is not None:
        write_json(json_path, result)
    return result


@exit_on_input_error
def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m common.metrics", description="scores anybody's predictions")
    command = parser.add_subparsers(required=True).add_parser("audit", help="one folder under every protocol")
    command.add_argument("--pred", required=True, help="folder of <token>.npz, of labels, or of an ssc submission")
    command.add_argument("--data-root", required=True, help="folder with v1.0-* and gts/; for ssc with sequences/")
    command.add_argument("--version", help="v1.0-mini, v1.0-trainval, ...; default: the only one present")
    command.add_argument("--split", help="default: the version's val split")
    command.add_argument("--task", choices=("occupancy", "planning", "ssc"), default="occupancy")
    command.add_argument("--json", help="also write the table, the flat metrics and the warnings to this file")
    command.add_argument("--cache", help="folder for the memory-mapped tables; default: the user's cache folder")
    command.add_argument("--no-rayiou", action="store_true", help="leave RayIoU out (most of the time goes there)")
    a = parser.parse_args(argv)
    audit(a.pred, a.data_root, a.version, a.split, a.task, a.json, a.cache, not a.no_rayiou)
