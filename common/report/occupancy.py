"""Scores an occupancy network the way the field does, with what a constant and the wrong images reach beside
it.

    predict(frame) -> ids is all that a method gives: (200, 200, 16) uint8 on Occ3D's grid, (256, 256, 32) on
    SemanticKITTI's. Scores are taken on the label files' own grid; a saved prediction is exactly what was
    scored.

`report` writes result.json, by_scene.npz and pictures, and prints the tables. The dataset decides the
protocol.
"""

import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from common.files import InputError, write_npz
from common.geometry import OCC3D, SEMANTICKITTI
from common.labels import read_label
from common.backbones import start_of
from common.metrics import (OccupancyMeter, constant_prediction, protocol_line, shown, ssc_confusion,
                            ssc_scores_of)
from common.nuscenes import FREE, Frame, NuScenesOccupancy
from common.report.pictures import chosen, draw, draw_curves, style_of
from common.semantickitti import CLASSES as SSC_CLASSES
from common.semantickitti import SemanticKITTI
from common.train import joined, sum_over_ranks, write_result
from common.worlds import is_world

Truth = Callable[[int], tuple[np.ndarray, ...]]  # i -> ids and the masks that the meter takes
Predict = Callable[[Frame], np.ndarray]
MASKS = ("camera", "lidar", "both", "none")
RULES = {  # entries of a protocol beside the method's own
    "occ3d": {"grid": "200x200x16, 0.4 m", "mask_eval": "camera, lidar, both, none: one score each",
              "classes": "17 without free; miou15 also without others and other_flat",
              "absent": "a class absent from the truth counts 0 if it is predicted, else it is skipped"},
    "ssc": {"grid": "256x256x32, 0.2 m", "mask_eval": "valid: label not 255, not in .invalid",
            "classes": "1..19", "absent": "a class absent from the truth counts 0"},
}


def spread(n: int, count: int) -> list[int]:
    """`count` of n indices, evenly spaced; all of them for count 0 or >= n."""
    return chosen(n, count) if 0 < count < n else list(range(n))


# --- truth, meters, constants -------------------------------------------------------------------------------


def ground_truth(dataset: NuScenesOccupancy | SemanticKITTI, labels: Path | None = None) -> Truth:
    """-> truth(i): Occ3D's (semantics, mask_camera, mask_lidar) or SemanticKITTI's (train ids, invalid) of
    frame i.

    labels: a label folder on Occ3D's grid instead of the dataset's own. Raises InputError where there is no
    truth.
    """
    if labels is not None:
        def of_label(i: int) -> tuple[np.ndarray, ...]:
            semantics, camera, lidar = read_label(labels, dataset, i, "mask_camera", "mask_lidar")
            return semantics, camera > 0, lidar > 0

        return of_label
    ssc = isinstance(dataset, SemanticKITTI)
    if dataset.gts is None:
        what = f"voxels/*.label in split '{dataset.split}'" if ssc else "gts/ (Occ3D labels)"
        remedy = "" if ssc else "; add them or give --labels L"
        raise InputError(f"{dataset.root}: no {what} to score against{remedy}")
    if not ssc:
        return dataset.labels

    def of_frame(i: int) -> tuple[np.ndarray, ...]:
        found = dataset.labels(i)
        if found is None:
            raise InputError(f"{dataset.root}/sequences/{dataset.tokens[i]}: no voxel labels of this frame")
        return found[0], ~found[1]

    return of_frame


class SscMeter:
    """semantic-kitti-api's confusion matrix, scene by scene: counts[scene] (20, 20) int64 [pred, gt]."""

    def __init__(self):
        self.counts: dict[str, Tensor] = {}
        self.frames: dict[str, int] = {}

    def add(self, pred, gt, invalid, group: str = "all") -> None:
        """One frame: train ids (X, Y, Z) twice (255 ignored in gt), invalid bool, the scene's name."""
        counts = ssc_confusion(pred, gt, invalid)
        self.counts[group] = self.counts.get(group, 0) + counts
        self.frames[group] = self.frames.get(group, 0) + 1

    def scores(self) -> dict:
        """All scenes by the benchmark's rule: see `metrics.ssc_scores`."""
        return ssc_scores_of(torch.stack(list(self.counts.values())).sum(0))

    def metrics(self) -> dict[str, float]:
        """miou over 19 classes (an absent one counts 0), completion iou, precision, recall: fractions."""
        scores = self.scores()
        return {name: v for name, v in scores.items() if name != "per_class" and math.isfinite(v)}

    def per_class(self) -> dict[str, dict[str, float]]:
        """{"valid": {class: IoU}} of the 20 classes."""
        return {"valid": dict(zip(SSC_CLASSES, self.scores()["per_class"]))}

    def print_table(self, title: str = "") -> None:
        """The well-known line of each class, then completion. Percent."""
        scores, count = self.scores(), sum(self.frames.values())
        print(f"{title}\n===> per class IoU of {count} samples:")
        for name, value in zip(SSC_CLASSES[1:], scores["per_class"][1:]):
            print(f"===> {name} - IoU = {shown(100 * value)}")
        print(f"===> mIoU of {count} samples: {shown(100 * scores['miou'])}")
        rest = (f"{name} {shown(100 * scores[name])}" for name in ("iou", "precision", "recall"))
        print("completion " + "  ".join(rest))

    def save(self, path: Path | str) -> None:
        """by_scene.npz: the counts, and the sums of `miou` and `iou` (intersection, union).

        An absent class counts 0 in this protocol, so its union is kept a little above 0: 0 / 1e-12.
        """
        groups = list(self.counts)
        counts = torch.stack([self.counts[g] for g in groups]).double()  # (S, 20, 20)
        hit = counts.diagonal(dim1=1, dim2=2)
        union = (counts.sum(1) + counts.sum(2) - hit).clamp_min(1e-12)
        both, any_ = counts[:, 1:, 1:].sum((1, 2)), counts.sum((1, 2)) - counts[:, 0, 0]
        write_npz(
            path,
            groups=np.array([g.encode() for g in groups], "S"),
            counts=counts.long().numpy(),
            frames=np.array([self.frames[g] for g in groups]),
            ratio_miou=torch.stack([hit, union], -1)[:, 1:].numpy(),
            ratio_iou=torch.stack([both, any_], -1)[:, None].numpy(),
        )


def constants(train_set: NuScenesOccupancy, masks: Sequence[str] = MASKS) -> dict[str, np.ndarray]:
    """mask -> (200, 200, 16) uint8: each voxel's most frequent class where that mask shows the training keyframes."""
    counts = {mask: np.zeros((math.prod(OCC3D.shape), FREE + 1), np.uint16) for mask in masks}
    for i in tqdm(range(len(train_set)), "constant predictor", unit="keyframe", leave=False):
        semantics, camera, lidar = train_set.labels(i)
        seen = {"camera": camera, "lidar": lidar, "both": camera & lidar, "none": np.ones_like(camera)}
        for mask in masks:
            index = np.flatnonzero(seen[mask].ravel() & (semantics.ravel() <= FREE))
            counts[mask][index, semantics.ravel()[index]] += 1
    return {mask: constant_prediction(count.reshape(*OCC3D.shape, -1)) for mask, count in counts.items()}


def constant_scores(train_set: NuScenesOccupancy, test_set: NuScenesOccupancy, indices: list[int],
                    truth: Truth) -> dict[str, float]:
    """Occ3D scores of the constant predictor: each voxel's most frequent class in the training ground truth.

    One constant is formed per mask and scored under that mask: the strongest constant for each score.
    """
    scores = {}
    for mask, constant in constants(train_set).items():
        meter = OccupancyMeter()
        for i in indices:
            meter.add(constant, *truth(i), group=test_set.scene_names[i])
        metrics = meter.metrics()
        scores |= {f"constant_{n}": metrics[n] for n in (f"miou_{mask}", f"iou_{mask}") if n in metrics}
    return scores


def constant_ssc(train_set: SemanticKITTI, train_truth: Truth, test_set: SemanticKITTI, indices: list[int],
                 truth: Truth) -> dict[str, float]:
    """SemanticKITTI scores of the constant predictor: each voxel's most frequent class among valid training
    voxels.

    Equal counts: an occupied class. Never valid: empty. It is formed on the full grid.
    """
    counts = np.zeros((math.prod(SEMANTICKITTI.shape), len(SSC_CLASSES)), np.uint16)
    for i in tqdm(range(len(train_set)), "constant predictor", unit="frame", leave=False):
        semantics, invalid = train_truth(i)
        index = np.flatnonzero(~invalid.ravel() & (semantics.ravel() < len(SSC_CLASSES)))
        counts[index, semantics.ravel()[index]] += 1
    counts = np.roll(counts, -1, axis=1)  # empty last, so that argmax prefers an occupied class
    constant = ((counts.argmax(1) + 1) % len(SSC_CLASSES)).astype(np.uint8)
    constant[~counts.any(1)] = 0
    meter = SscMeter()
    for i in indices:
        meter.add(constant.reshape(SEMANTICKITTI.shape), *truth(i), group=test_set.scene_names[i])
    return {f"constant_{name}": value for name, value in meter.metrics().items()}


# --- evaluation ---------------------------------------------------------------------------------------------


def evaluate(predict: Predict, dataset: NuScenesOccupancy | SemanticKITTI, indices: list[int], truth: Truth,
             images: str = "own", rayiou: bool = False,
             save: Path | None = None) -> "OccupancyMeter | SscMeter":
    """Predict and score the frames `indices`, under torchrun a share on each process; -> the meter of all.

    images: "own"; "shuffled" gives each frame the images of the one half the list away with its own
    calibration; "black" gives none. save: folder for <token>.npz with key `pred`, exactly what was scored.
    """
    meter, run = SscMeter() if isinstance(dataset, SemanticKITTI) else OccupancyMeter(), joined()
    mine = range(run.rank, len(indices), run.world)
    for k in tqdm(mine, f"eval, {images} images", unit="frame", leave=False):
        i = indices[k]
        frame = with_images(dataset, indices, k, images)
        ids = predict(frame)
        rays = {"origins": dataset.ray_origins(i)} if rayiou else {}
        meter.add(ids, *truth(i), group=frame.scene, **rays)
        if save is not None:
            write_npz(save / f"{frame.token}.npz", pred=ids)
    if run.world > 1:
        merge(meter, list(dict.fromkeys(dataset.scene_names[i] for i in indices)), rayiou)
    return meter


def merge(meter: "OccupancyMeter | SscMeter", groups: list[str], rays: bool) -> None:
    """Give every process the counts of all, scene by scene in one order. All processes call it."""
    shapes = {"counts": (20, 20) if isinstance(meter, SscMeter) else (4, FREE + 1, FREE + 1), "frames": ()}
    for name, shape in (shapes | ({"rays": (5, FREE)} if rays else {})).items():
        mine, none = getattr(meter, name), torch.zeros(shape, dtype=torch.int64)
        stacked = torch.stack([torch.as_tensor(mine.get(group, none)).long() for group in groups])
        total = sum_over_ranks(stacked, joined())
        setattr(meter, name, dict(zip(groups, total if shape else total.tolist(), strict=True)))


def with_images(dataset: Any, indices: list[int], k: int, images: str) -> Frame:
    """Frame indices[k] with its own images, those of the frame half the list away (shuffled), or black
    ones."""
    frame = dataset[indices[k]]
    if images == "shuffled":
        return frame._replace(images=dataset[indices[(k + len(indices) // 2) % len(indices)]].images)
    return frame._replace(images=frame.images * 0) if images == "black" else frame


def describe_dataset(dataset: NuScenesOccupancy | SemanticKITTI, frames: int) -> dict[str, Any]:
    """The data of a result.json: name, version, split, frames."""
    real = "SemanticKITTI" if isinstance(dataset, SemanticKITTI) else "nuScenes"
    name = "synthetic driving world" if is_world(dataset.root) else real
    return {"name": name, "version": dataset.version, "split": dataset.split, "frames": frames}


def report(predict: Predict, *, dataset: NuScenesOccupancy | SemanticKITTI, train_set: Any, out: Path,
           run: dict[str, Any], state: dict[str, Any], params: int, protocol: dict[str, str],
           truth: Callable[[Any], Truth] = ground_truth, against: str = "", frames: int = 0,
           rayiou: bool = True, pictures: int = 6, labels: Path | None = None, save: Path | None = None,
           known: dict[str, float] | None = None, controls: tuple[str, ...] = ()) -> dict[str, float]:
    """Score, compare with the controls, draw and print; write result.json and by_scene.npz into `out`; -> the
    metrics.

    run: config.json of the run. state: its checkpoint's. protocol: the method's words on training
    (mask_train, labels). train_set: what the constant predictor is formed from; None: no constant.
    truth(dataset) -> `Truth`; against: its name, if it is not the dataset's ground truth. labels: folder of
    labels drawn beside. known: metrics known already (an arm of a claim: its constant); then no pictures are
    made, and of the controls (shuffled, black) only these.
    """
    begun, ssc = time.time(), isinstance(dataset, SemanticKITTI)
    of, indices = truth(dataset), spread(len(dataset), frames)
    meter = evaluate(predict, dataset, indices, of, rayiou=rayiou and not ssc, save=save)
    score = "miou" if ssc else "miou_camera"
    metrics = meter.metrics() | (known or {})
    if known is None:
        controls = ("shuffled", "black") if len(indices) > 1 else ("black",)
    for images in controls:
        scores = evaluate(predict, dataset, indices, of, images).metrics()
        metrics |= {f"{images}_{name}": scores[name] for name in (score, score[1:]) if name in scores}
    if known is None and train_set is not None and train_set.gts is not None and joined().is_main:
        metrics |= (constant_ssc(train_set, truth(train_set), dataset, indices, of) if ssc
                    else constant_scores(train_set, dataset, indices, of))

    if not joined().is_main:  # one process writes
        return metrics
    data = describe_dataset(dataset, len(indices))
    against_what = against or ("ground truth" if ssc else "Occ3D ground truth")
    encoder = run.get("config", {}).get("backbone")
    protocol = protocol | {"truth": against_what} | RULES["ssc" if ssc else "occ3d"]
    protocol |= {"encoder": start_of(encoder)} if encoder else {}
    cost = {"params": params, "steps": state["step"]} | {name: state[name] for name in ("train_s", "peak_gb")}
    meter.save(out / "by_scene.npz")
    write_result(out, method=run["method"], preset=run["preset"], seed=run["seed"], dataset=data,
                 protocol=protocol, metrics=metrics, per_class=meter.per_class(), cost=cost)
    note = f"against {against_what}" + (f"; encoder {protocol['encoder']}" if encoder else "")
    rules = {"train_mask": protocol["mask_train"], "note": note}
    if ssc:
        rules |= {"grid": "256x256x32 at 0.2 m", "eval_mask": protocol["mask_eval"],
                  "classes": "classes 1..19, absent ones as 0"}
    line = protocol_line(*data.values(), **rules)
    if known is not None:
        print(f"{line}\n{score} {shown(100 * metrics.get(score, math.nan))}")
        return metrics

    title, style = f"{run['method']}, {data['split']}", style_of(dataset)

    def masked(i: int) -> tuple[np.ndarray, np.ndarray]:  # ids, and where errors are drawn
        ids, mask, *_ = of(i)
        return ids, ~mask & (ids != 255) if ssc else mask

    paths = draw(predict, dataset, chosen(len(dataset), pictures), out, title=title, truth=masked,
                 labels=labels, against="label" if against else "ground truth", style=style)
    paths.append(draw_curves(out, f"{title}: training"))
    meter.print_table(line)
    print_controls(metrics, score, "valid voxels, 19 classes" if ssc else "camera mask, 17 classes")
    print_cost(cost, begun, [out / "result.json", *paths])
    return metrics


def print_controls(metrics: dict[str, float], score: str = "miou_camera",
                   rule: str = "camera mask, 17 classes") -> None:
    """Print mIoU `score` and geometric IoU beside what the constant predictor and wrong images reach."""
    constant = metrics.get(f"constant_{score}", math.nan)
    print(f"\nmIoU and IoU, {rule}, same frames:")
    for label, prefix in (("this network", ""), ("constant predictor", "constant_"),
                          ("its images shuffled", "shuffled_"), ("its images black", "black_")):
        if prefix + score in metrics or not prefix:
            value, iou = (metrics.get(prefix + name, math.nan) for name in (score, score[1:]))
            ratio = f"{value / constant:6.2f} x constant" if constant > 0 and math.isfinite(value) else ""
            print(f"  {label:20}{shown(100 * value):>9}{ratio:17}{shown(100 * iou):>9}")


def print_cost(cost: dict[str, float], begun: float, paths: list[Path]) -> None:
    """Print what training and evaluation (since `begun`) took, and the files that were written."""
    took = time.time() - begun
    print(f"training {cost['train_s']:.0f} s for {cost['steps']} steps; evaluation and pictures {took:.0f} s")
    for path in paths:
        print(f"  {path}")
