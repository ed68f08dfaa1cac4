"""Scores an occupancy network the way the field does, with what a constant and the wrong images reach beside it.

    predict(frame) -> (200, 200, 16) uint8 ids is all that is asked of a network; frames come from common.nuscenes.
    Scores are taken on the label files' own grid; what is saved as a prediction is exactly what was scored.
"""

import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from common import viz
from common.files import InputError, read_npz, write_npz
from common.geometry import OCC3D
from common.metrics import OccupancyMeter, constant_prediction, protocol_line
from common.nuscenes import FREE, Frame, NuScenesOccupancy
from common.train import write_result

Truth = Callable[[int], tuple[np.ndarray, np.ndarray, np.ndarray]]
Predict = Callable[[Frame], np.ndarray]


def spread(n: int, count: int) -> list[int]:
    """`count` of n indices, evenly spaced; all of them for count 0 or >= n."""
    return list(range(n)) if not 0 < count < n else sorted({round(k) for k in np.linspace(0, n - 1, count)})


def ground_truth(dataset: NuScenesOccupancy, labels: Path | None) -> Truth:
    """-> truth(i) = (semantics, mask_camera, mask_lidar) of keyframe i: Occ3D's gts, or those of a label folder.

    Raises InputError if the tree has no gts and no labels are given, or a file is missing or of another shape.
    """
    if labels is None:
        if dataset.gts is None:
            raise InputError(f"{dataset.root}: no gts/ (Occ3D labels) to score against; add them or give --labels L")
        return dataset.labels
    arrays = {name: (OCC3D.shape, "uint8") for name in ("semantics", "mask_camera", "mask_lidar")}

    def of_label(i: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        label = read_npz(labels / dataset.scene_names[i] / dataset.tokens[i] / "labels.npz", arrays)
        return label["semantics"], label["mask_camera"] > 0, label["mask_lidar"] > 0

    return of_label


def evaluate(predict: Predict, dataset: NuScenesOccupancy, indices: list[int], truth: Truth, images: str = "own",
             rayiou: bool = False, save: Path | None = None) -> OccupancyMeter:  # fmt: skip
    """Predicts and scores the keyframes `indices`.

    images: own; "shuffled" gives each keyframe the six images of another one (half the list away, so another scene)
    with its own calibration; "black" gives none. Both tell how much of a score needs the images at all.
    save: folder for <token>.npz with key `pred`, exactly what was scored.
    """
    meter = OccupancyMeter()
    for k, i in enumerate(tqdm(indices, f"eval, {images} images", unit="keyframe", leave=False)):
        frame = dataset[i]
        if images == "shuffled":
            frame = frame._replace(images=dataset[indices[(k + len(indices) // 2) % len(indices)]].images)
        elif images == "black":
            frame = frame._replace(images=frame.images * 0)
        ids = predict(frame)
        semantics, camera, lidar = truth(i)
        meter.add(ids, semantics, camera, lidar, group=frame.scene, origins=dataset.ray_origins(i) if rayiou else None)
        if save is not None:
            write_npz(save / f"{frame.token}.npz", pred=ids)
    return meter


def constant_scores(train_set: NuScenesOccupancy, test_set: NuScenesOccupancy, indices: list[int], truth: Truth) -> dict[str, float]:
    """Scores of the constant predictor: each voxel's most frequent class in the training ground truth.

    It is formed once per mask, from what that mask shows of the training keyframes, and scored under that mask: the
    strongest constant for each score. Formed on the full grid.
    """
    masks = ("camera", "lidar", "both", "none")
    counts = {mask: np.zeros((math.prod(OCC3D.shape), FREE + 1), np.uint16) for mask in masks}
    for i in tqdm(range(len(train_set)), "constant predictor", unit="keyframe", leave=False):
        semantics, camera, lidar = train_set.labels(i)
        seen = {"camera": camera, "lidar": lidar, "both": camera & lidar, "none": np.ones_like(camera)}
        for mask in masks:
            index = np.flatnonzero(seen[mask].ravel() & (semantics.ravel() <= FREE))
            counts[mask][index, semantics.ravel()[index]] += 1
    constants = {mask: constant_prediction(counts[mask].reshape(*OCC3D.shape, -1)) for mask in masks}
    meters = {mask: OccupancyMeter() for mask in masks}
    for i in indices:
        semantics, camera, lidar = truth(i)
        for mask in masks:
            meters[mask].add(constants[mask], semantics, camera, lidar, group=test_set.scene_names[i])
    scores = {mask: meters[mask].metrics() for mask in masks}
    names = [(mask, name) for mask in masks for name in (f"miou_{mask}", f"iou_{mask}") if name in scores[mask]]
    return {f"constant_{name}": scores[mask][name] for mask, name in names}


def draw(predict: Predict, dataset: NuScenesOccupancy, indices: list[int], truth: Truth, labels: Path, out: Path,
         title: str, against: str = "ground truth", sheets: int = 3) -> list[Path]:  # fmt: skip
    """PNG sheets, one HTML viewer and the training curves of a run; -> their paths.

    labels: folder whose labels are shown beside the truth where it has the keyframe. against: what the truth is called.
    """
    frames, paths = [], []
    for i in tqdm(indices, "pictures", unit="keyframe", leave=False):
        frame, (semantics, camera, _) = dataset[i], truth(i)
        panels = {against: semantics}
        label = labels / frame.scene / frame.token / "labels.npz"
        if label.is_file() and against != "label":
            panels["label"] = read_npz(label, {"semantics": (OCC3D.shape, "uint8")})["semantics"]
        panels["prediction"] = predict(frame)
        name = f"{frame.scene} {frame.token[:8]}"
        if len(paths) < sheets:
            path = out / "pictures" / f"{len(paths)}_{frame.scene}.png"
            viz.sheet(path, frame.images, panels, OCC3D, mask=camera, error=(against, "prediction"),
                      title=f"{title}: {name}\nerrors inside the camera mask")  # fmt: skip
            paths.append(path)
        frames.append(viz.ViewerFrame(name, panels, np.asarray(frame.images), camera))
    viz.viewer(out / "viewer.html", frames, title=title)
    viz.curves(out / "pictures" / "curves.png", out / "log.jsonl", title=f"{title}: training")
    return [out / "viewer.html", *paths, out / "pictures" / "curves.png"]


def is_world(root: Path) -> bool:
    """Whether a data root is one of our synthetic driving worlds."""
    return (Path(root) / "exact" / "world.json").is_file()


def report(predict: Predict, dataset: NuScenesOccupancy, train_set: NuScenesOccupancy | None, out: Path, run: dict[str, Any],
           state: dict[str, Any], params: int, protocol: dict[str, str], labels: Path | None, frames: int, rayiou: bool,
           pictures: int, save: Path | None) -> dict[str, float]:  # fmt: skip
    """All of a method's `eval`: scores, controls, result.json, by_scene.npz, pictures, and the tables on the terminal.

    run: the run's config.json; state: its checkpoint's; protocol: what the method says of training (mask_train, labels).
    labels: score against these instead of gts. train_set None: an arm of a claim, without controls and pictures.
    """
    begun = time.time()
    truth, indices = ground_truth(dataset, labels), spread(len(dataset), frames)
    meter = evaluate(predict, dataset, indices, truth, rayiou=rayiou, save=save)
    metrics = meter.metrics()
    if train_set is not None:
        for images in ("shuffled", "black"):
            scores = evaluate(predict, dataset, indices, truth, images).metrics()
            metrics |= {f"{images}_{name}": scores[name] for name in ("miou_camera", "iou_camera")}
        if train_set.gts is not None:
            metrics |= constant_scores(train_set, dataset, indices, truth)

    against = f"labels in {labels}" if labels else "Occ3D ground truth"
    data = {"name": "synthetic driving world" if is_world(dataset.root) else "nuScenes", "version": dataset.version,
            "split": dataset.split, "frames": len(indices)}  # fmt: skip
    protocol = protocol | {
        "truth": against, "grid": "200x200x16, 0.4 m", "mask_eval": "camera, lidar, both, none: one score each",
        "classes": "17 without free; miou15 also without others and other_flat",
        "absent": "a class absent from the truth counts 0 if it is predicted anywhere, else it is skipped",
    }  # fmt: skip
    cost = {"params": params, "steps": state["step"], "train_s": state["train_s"], "peak_gb": state["peak_gb"]}
    write_result(out, method=run["method"], preset=run["preset"], seed=run["seed"], dataset=data, protocol=protocol,
                 metrics=metrics, per_class=meter.per_class(), cost=cost)  # fmt: skip
    meter.save(out / "by_scene.npz")
    line = protocol_line(*data.values(), train_mask=protocol["mask_train"], note=f"against {against}")
    if train_set is None:
        print(f"{line}\nmIoU {100 * metrics['miou_camera']:.2f} camera mask, {100 * metrics['miou_none']:.2f} no mask")
        return metrics

    paths = draw(predict, dataset, spread(len(dataset), pictures), truth, Path(run["data"]["labels"]), out,
                 f"{run['method']}, {data['split']}", "label" if labels else "ground truth")  # fmt: skip
    meter.print_table(line)
    print_controls(metrics)
    print(f"training {cost['train_s']:.0f} s for {cost['steps']} steps; evaluation and pictures {time.time() - begun:.0f} s")
    for path in [out / "result.json", *paths]:
        print(f"  {path}")
    return metrics


def print_controls(metrics: dict[str, float]) -> None:
    """The camera-masked score beside what the constant predictor and the wrong images reach on the same frames."""
    constant = metrics.get("constant_miou_camera", math.nan)
    print("\nmIoU, camera mask, 17 classes, same keyframes:")
    for label, name in (("this network", "miou_camera"), ("constant predictor", "constant_miou_camera"),
                        ("its images shuffled", "shuffled_miou_camera"), ("its images black", "black_miou_camera")):  # fmt: skip
        if name in metrics:
            print(f"  {label:20}{100 * metrics[name]:7.2f}{metrics[name] / constant:8.2f} x constant")
