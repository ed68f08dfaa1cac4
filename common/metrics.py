"""Every score the field reports, under the names of the code bases that report it.

    occupancy_confusion, occupancy_scores    Occ3D mIoU and IoU under six named protocols (`PROTOCOLS`)
    ray_iou, lidar_ray_directions            SparseOcc's RayIoU
    OccupancyMeter                           all of these at once, per scene, over an evaluation
    constant_prediction                      what a model must beat: each voxel's most frequent training class
    ssc_scores                               SemanticKITTI scene completion
    planning_scores, PlanningMeter           open-loop planning: UniAD, ST-P3, VAD
    qa_scores, openset_scores, libero_plus_average
    python -m common.metrics audit --pred P --data-root D    anybody's predictions, every protocol (common/audit.py)

Tensors in (numpy arrays too), plain floats out; scores are fractions, the printed lines are percent. Sums are integers
or float64. No protocol is "the right one": two numbers compare only when they carry the same name.
"""

import sys
from contextlib import contextmanager
from pathlib import Path
from typing import Iterable, NamedTuple

import numpy as np
import torch
from torch import Tensor

from common.files import InputError, read_npz, write_npz
from common.geometry import OCC3D, VoxelGrid, cast_rays
from common.nuscenes import FREE
from common.nuscenes import OCC3D_CLASSES as CLASSES

NAN = float("nan")


def _tensor(x) -> Tensor:
    return x if isinstance(x, Tensor) else torch.as_tensor(np.ascontiguousarray(x))


@contextmanager
def _one_thread():
    """Around short operations: a second thread gains a little on an idle machine, and on a busy one the waiting for it
    costs many times the work (measured: 60 times for a confusion matrix, 5 times for rays)."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _pairs(first: Tensor, second: Tensor, classes: int, code: Tensor | None = None, codes: int = 1) -> Tensor:
    """Counts of (code, first, second) as int64 (codes, classes, classes). Both ids must be below `classes`.

    Neighbours, which mostly hold the same, count in different banks: increments of one number wait for each other.
    """
    cells, banks, row = codes * classes * classes, 8, 1600  # a short inner loop is slow
    narrow = torch.int16 if banks * cells < 2**15 else torch.int64  # half the time is memory traffic
    pair = first.flatten()
    if code is not None:
        small = pair.dtype == torch.uint8 and codes * classes <= 256
        pair = (torch.add(pair, code.flatten().view(torch.uint8), alpha=classes) if small else
                pair + code.flatten().to(narrow) * classes)
    pair = second.flatten().to(narrow).add_(pair.to(narrow), alpha=classes)
    whole = len(pair) // row * row
    pair[:whole].view(-1, row).add_(torch.arange(row, dtype=narrow, device=pair.device) % banks * cells)
    return torch.bincount(pair, minlength=banks * cells).view(banks, codes, classes, classes).sum(0)


def _valid(name: str, ids: Tensor, classes: int) -> None:
    low, high = _range(ids)
    if low < 0 or high >= classes:
        raise ValueError(f"{name} holds ids {low}..{high}, expected 0..{classes - 1}")


def _range(ids: Tensor) -> tuple[int, int]:
    """The smallest and the largest id; 0, 0 of none."""
    return tuple(int(x) for x in ids.aminmax()) if ids.numel() else (0, 0)


# --- Occ3D: one confusion matrix over the whole set, then a protocol -------------------------------------------------


class Protocol(NamedTuple):
    """How a code base turns the set's confusion matrix into its number."""

    mask: str  # which voxels its users count: camera, lidar, both, none
    mean: tuple[int, ...]  # classes in the mean
    absent: str  # class absent from the ground truth: "zero" if predicted, else skipped; "skip"; "one"
    empty: tuple[int, ...]  # ids that count as empty, for the mean's unions and for IoU
    users: str


_ALL17, _NO_OTHERS = tuple(range(17)), tuple(c for c in range(17) if c not in (0, 12))
PROTOCOLS = {
    "flashocc": Protocol("camera", _ALL17, "zero", (17,), "FlashOcc, Occ3D challenge, LOcc, most supervised tables"),
    "sparseocc": Protocol("camera", _ALL17, "skip", (17,), "SparseOcc (its mIoU)"),
    "gausstr": Protocol("camera", _ALL17, "zero", (17,), "GaussTR"),
    "occnerf": Protocol("both", _ALL17, "zero", (17,), "OccNeRF, GaussianOcc; EasyOcc v3 does not say"),
    "selfocc": Protocol("camera", tuple(range(1, 17)), "one", (0, 17), "SelfOcc"),
    "selfsup15": Protocol("camera", _NO_OTHERS, "zero", (17,), "self-supervised tables, EasyOcc v4 (unverified)"),
}
MASKS = ("camera", "lidar", "both", "none")


def occupancy_confusion(pred, gt, mask=None, classes: int = 18) -> Tensor:
    """One frame of ids, pred and gt (X, Y, Z) -> int64 (classes, classes) counts [gt, pred].

    mask (X, Y, Z): voxels that count, all without it. gt outside 0..classes-1 is dropped (255: not labelled).
    Raises ValueError if a shape differs or a prediction is not an id: a wrong id would land in another row.
    """
    pred, gt = _tensor(pred), _tensor(gt)
    code = None if mask is None else _tensor(mask).bool()
    return _masked_confusions(pred, gt, code, classes)[-1]


@_one_thread()
def _masked_confusions(pred: Tensor, gt: Tensor, code: Tensor | None, classes: int, codes: int = 2) -> Tensor:
    """-> (codes, classes, classes) counts by the voxels' code, or (1, ...) of all voxels where code is None."""
    if pred.shape != gt.shape or (code is not None and code.shape != gt.shape):
        shapes = [tuple(x.shape) for x in (pred, gt, code) if x is not None]
        raise ValueError(f"prediction, ground truth and mask differ in shape: {shapes}")
    _valid("the prediction", pred, classes)
    low, high = _range(gt)
    if low < 0 or high >= classes:
        labelled = (gt >= 0) & (gt < classes)
        pred, gt, code = pred[labelled], gt[labelled], None if code is None else code[labelled]
    return _pairs(gt, pred, classes, code, 1 if code is None else codes)


def class_iou(confusion: Tensor, protocol: str) -> Tensor:
    """confusion (..., 18, 18) [gt, pred] -> (..., 18) float64 IoU by class id, NaN where the protocol scores nothing.

    NaN: the class is skipped by the protocol's absent rule, or is one of its empty ids other than free. Free's own IoU
    stands at 17 where free alone is empty; it is in no mean.
    """
    rule, counts = PROTOCOLS[protocol], _tensor(confusion).double()
    hit, gt, pred = counts.diagonal(dim1=-2, dim2=-1), counts.sum(-1), counts.sum(-2)
    iou = hit / (gt + pred - hit)  # 0 / 0 = NaN: absent from both
    if rule.absent == "skip":
        iou = torch.where(gt == 0, NAN, iou)
    elif rule.absent == "one":
        iou = torch.where(gt == 0, 1.0, iou)
    if len(rule.empty) > 1:
        iou = iou.clone()
        iou[..., list(rule.empty)] = NAN
    return iou


def miou(confusion: Tensor, protocol: str = "flashocc") -> Tensor:
    """confusion (..., 18, 18) -> (...) float64. Batched, so that thousands of resampled scene sets cost one call."""
    return class_iou(confusion, protocol)[..., list(PROTOCOLS[protocol].mean)].nanmean(-1)


def geometric_iou(confusion: Tensor, protocol: str = "flashocc") -> Tensor:
    """confusion (..., 18, 18) -> (...) float64 IoU of occupied against the protocol's empty ids."""
    counts = _tensor(confusion).double()
    full = [c for c in range(counts.shape[-1]) if c not in PROTOCOLS[protocol].empty]
    empty = list(PROTOCOLS[protocol].empty)
    both_empty = counts[..., empty, :][..., empty].sum((-2, -1))
    return counts[..., full, :][..., full].sum((-2, -1)) / (counts.sum((-2, -1)) - both_empty)


def occupancy_scores(confusion, protocol: str) -> dict:
    """confusion (18, 18) [gt, pred] of a whole set, under the mask named in PROTOCOLS[protocol] -> fractions.

    -> {"miou", "iou": floats, "per_class": 18 floats by class id as in `class_iou`}.

        flashocc    mean of 17 classes ("others" in, free out); absent from gt but predicted: 0; from both: skipped
        gausstr     the same, and reports IoU of occupied against free;    occnerf   the same under its own mask
        sparseocc   a class absent from gt is skipped, also where it was predicted (SparseOcc's old_metrics)
        selfocc     ids 0 and 17 are both empty, mean of 1..16, absent from gt counts as 1 (SelfOcc's MeanIoU)
        selfsup15   flashocc's IoUs without 0 (others) and 12 (other_flat). Nobody's code shows this rule: unverified
    """
    if protocol not in PROTOCOLS:
        raise ValueError(f"protocol '{protocol}': choose from {', '.join(PROTOCOLS)}")
    confusion = _tensor(confusion)
    if confusion.shape != (len(CLASSES), len(CLASSES)):
        raise ValueError(f"confusion has shape {tuple(confusion.shape)}, expected (18, 18)")
    return {
        "miou": float(miou(confusion, protocol)),
        "iou": float(geometric_iou(confusion, protocol)),
        "per_class": class_iou(confusion, protocol).tolist(),
    }


# --- RayIoU ----------------------------------------------------------------------------------------------------------

RAY_THRESHOLDS = (1, 2, 4)  # [m]


def lidar_ray_directions() -> Tensor:
    """SparseOcc's query rays: (14040, 3) float32 unit directions in ego, pitch by pitch, 360 azimuths of 1 degree each.

    Pitch: -(pi/2 - atan(k + 1)) for k = 0..9, from there in steps of the last difference up to the first >= 0.21 rad.
    """
    pitch = [-(np.pi / 2 - np.arctan(k + 1)) for k in range(10)]
    while pitch[-1] < 0.21:
        pitch.append(2 * pitch[-1] - pitch[-2])
    pitch, azimuth = np.meshgrid(pitch, np.deg2rad(np.arange(360)), indexing="ij")
    xyz = np.stack([np.cos(pitch) * np.cos(azimuth), np.cos(pitch) * np.sin(azimuth), np.sin(pitch)], -1)
    return torch.from_numpy(xyz.reshape(-1, 3).astype(np.float32))


def cast_lidar(labels, origins, keep: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """labels (200, 200, 16) ids, origins (T, 3) [m, ego] -> label (T*14040,), depth [m] to the exit face, met bool.

    met: the ray was inside the grid at all. A ray that hits nothing has the label (free) and depth of its last voxel.
    keep (T*14040,) bool: only these rays, in their order.
    SparseOcc hands its renderer float32 end points in voxel units. The same rounding is done here (it turns a ray by up
    to 1e-5): it decides the rays that pass exactly through an edge, and with it the scores agree to the last digit.
    """
    labels = _tensor(labels)
    if labels.shape != OCC3D.shape:
        raise ValueError(f"labels of shape {tuple(labels.shape)}: RayIoU is defined on {OCC3D.shape}")
    lower, edge = torch.tensor(OCC3D.lower), torch.tensor(OCC3D.voxel_size).float()  # (3,), (3,) float32
    origins = _tensor(origins).reshape(-1, 1, 3).float().cpu()  # (T, 1, 3)
    start = (origins - lower) / edge
    along = (lidar_ray_directions() + origins - lower) / edge - start  # (T, 14040, 3) voxels
    start, along = start.expand_as(along).reshape(-1, 3), along.reshape(-1, 3)
    if keep is not None:
        start, along = start[keep.cpu()], along[keep.cpu()]
    grid = VoxelGrid((0.0, 0.0, 0.0), tuple(float(n) for n in OCC3D.shape), OCC3D.shape)
    with _one_thread():
        index, depth, _ = cast_rays(labels != FREE, start.to(labels.device), along.to(labels.device).double(), grid)
    x, y, z = index.clamp_min(0).unbind(-1)
    return labels[x, y, z], depth * OCC3D.voxel_size[0], index[:, 0] >= 0


def ray_counts(pred, gt, origins, gt_rays: tuple | None = None) -> Tensor:
    """One frame -> (5, 17) int64 [rays of gt, rays of pred, hits within 1 m, 2 m, 4 m] by class. Frames add up.

    Counted are rays whose gt is an object. SparseOcc also counts rays that never enter the grid, with the label of
    voxel (0, 0, 0); these are dropped here. gt_rays: `cast_lidar(gt, origins)`, where it is at hand.
    """
    gt_label, gt_depth, met = gt_rays or cast_lidar(gt, origins)
    keep = met & (gt_label < FREE)  # also drops 255, not labelled
    gt_label, gt_depth = gt_label[keep].long(), gt_depth[keep]
    pred_label, pred_depth, _ = cast_lidar(pred, origins, keep)
    pred_label, error = pred_label.long(), (pred_depth - gt_depth).abs()
    same = gt_label == pred_label
    rows = [gt_label, pred_label[pred_label < FREE]] + [gt_label[same & (error < t)] for t in RAY_THRESHOLDS]
    return torch.stack([torch.bincount(row, minlength=FREE) for row in rows])


def ray_scores(counts: Tensor) -> dict:
    """(5, 17) summed `ray_counts` -> as `ray_iou`."""
    gt, pred, hits = counts[0].double(), counts[1].double(), counts[2:].double()
    iou = hits / (gt + pred - hits)  # (3, 17) NaN: absent from both
    means = {f"rayiou@{t}": float(row.nanmean()) for t, row in zip(RAY_THRESHOLDS, iou)}
    return {"rayiou": float(iou.nanmean()), **means, "per_class": iou.tolist()}


def ray_iou(preds: Iterable, gts: Iterable, origins: Iterable) -> dict:
    """Lists over frames: ids (200, 200, 16) twice, origins (T, 3) [m, ego] -> fractions, pooled over all frames.

    -> {"rayiou", "rayiou@1", "rayiou@2", "rayiou@4", "per_class": 3 thresholds x 17 classes, NaN where absent}.
    A ray ends at the first voxel that is not free; a hit is the same class and |difference of the exit depths| < t.
    """
    total = torch.zeros(5, FREE, dtype=torch.int64)
    for pred, gt, origin in zip(preds, gts, origins, strict=True):
        total += ray_counts(pred, gt, origin).cpu()
    return ray_scores(total)


# --- the constant predictor, the protocol line, the meter ------------------------------------------------------------


def constant_prediction(class_counts) -> np.ndarray:
    """class_counts (X, Y, Z, 18) of training labels -> (X, Y, Z) uint8, most frequent class.

    On the label files' own grid. Equal counts: the lower id, so an object rather than free. No count at all: free.
    """
    counts = np.asarray(class_counts)
    best = counts.argmax(-1).astype(np.uint8)
    best[counts.sum(-1, dtype=np.int64) == 0] = FREE
    return best


def protocol_line(dataset: str, version: str, split: str, frames: int, grid: str = "200x200x16 at 0.4 m",
                  train_mask: str = "none", eval_mask: str = "camera",
                  classes: str = "17 classes, free not among them", note: str = "") -> str:
    """The line that goes with every number: where it was measured, and what was counted."""
    where = f"{dataset} {version} {split}, {frames} frames, grid {grid}"
    what = f"mask: train {train_mask}, eval {eval_mask}; mean over {classes}"
    return f"protocol: {where}; {what}" + (f"; {note}" if note else "")


class OccupancyMeter:
    """Accumulates an evaluation scene by scene; any set of scenes can be scored afterwards, without the predictions.

    State per scene: counts (4, 18, 18) int64 by voxel code (1 camera sees it, 2 LiDAR sees it, 3 both, 0 neither), rays
    (5, 17) int64 and the number of frames. All sums are integers, so neither order nor grouping changes a score.
    """

    def __init__(self):
        self.counts: dict[str, Tensor] = {}
        self.rays: dict[str, Tensor] = {}
        self.frames: dict[str, int] = {}
        self.seen = set(MASKS)  # masks that every frame so far came with

    def add(self, pred, gt, mask_camera, mask_lidar, group: str = "all", origins=None, gt_rays: tuple | None = None):
        """One frame: ids (X, Y, Z) twice, the two masks (None where the labels have none), the scene's name.

        origins (T, 3) [m, ego]: count RayIoU's rays too (200x200x16 only); gt_rays as in `ray_counts`.
        """
        gt = _tensor(gt)
        pred = _tensor(pred).to(gt.device)
        with _one_thread():
            code = torch.zeros(gt.shape, dtype=torch.uint8, device=gt.device)
            for bit, name, mask in ((1, "camera", mask_camera), (2, "lidar", mask_lidar)):
                if mask is None:
                    self.seen -= {name, "both"}
                else:
                    code += _tensor(mask).to(gt.device).bool().to(torch.uint8) * bit
            counts = _masked_confusions(pred, gt, code, len(CLASSES), 4).cpu()
        group = str(group)
        self.counts[group] = self.counts.get(group, 0) + counts
        self.frames[group] = self.frames.get(group, 0) + 1
        if origins is not None:
            self.rays[group] = self.rays.get(group, 0) + ray_counts(pred, gt, origins, gt_rays).cpu()

    def merge(self, other: "OccupancyMeter") -> None:
        """Adds another meter's scenes (another process's, another shard's)."""
        for name in ("counts", "rays", "frames"):
            mine, theirs = getattr(self, name), getattr(other, name)
            for group, value in theirs.items():
                mine[group] = mine.get(group, 0) + value
        self.seen &= other.seen

    def confusion(self, mask: str = "camera", groups: Iterable[str] | None = None) -> Tensor:
        """(18, 18) int64 [gt, pred] under a mask of MASKS, of all scenes or of those named (repeats count again)."""
        codes = {"camera": [1, 3], "lidar": [2, 3], "both": [3], "none": [0, 1, 2, 3]}[mask]
        total = torch.zeros(len(CLASSES), len(CLASSES), dtype=torch.int64)
        for group in self.counts if groups is None else groups:
            total += self.counts[group][codes].sum(0)
        return total

    def by_group(self) -> dict[str, dict[str, Tensor]]:
        """{scene: {mask: (18, 18) int64, ..., "rays": (5, 17) int64 if counted}}. They add up over any scenes:
        `miou(torch.stack([...]).sum(0))` is the score of that set, which is what a paired bootstrap resamples."""
        scenes = {g: {m: self.confusion(m, [g]) for m in MASKS if m in self.seen} for g in self.counts}
        for group, rays in self.rays.items():
            scenes[group]["rays"] = rays
        return scenes

    def metrics(self, groups: Iterable[str] | None = None) -> dict[str, float]:
        """Flat fractions; of the named scenes only, if given (repeats count again).

        miou_<mask>, iou_<mask>, miou15_<mask> for the masks camera, lidar, both, none: 17 classes by flashocc's rule,
        the geometry, and 15 classes. miou_<protocol>, and iou_selfocc (its empty ids differ). rayiou, rayiou@1, @2, @4.
        A score that is undefined (nothing labelled, mask not there) is left out.
        """
        groups = list(self.counts if groups is None else groups)
        scores = {}
        matrices = {mask: self.confusion(mask, groups) for mask in MASKS if mask in self.seen}
        for mask, matrix in matrices.items():
            scores[f"miou_{mask}"] = float(miou(matrix))
            scores[f"iou_{mask}"] = float(geometric_iou(matrix))
            scores[f"miou15_{mask}"] = float(miou(matrix, "selfsup15"))
        for name, rule in PROTOCOLS.items():
            if rule.mask in matrices:
                scores[f"miou_{name}"] = float(miou(matrices[rule.mask], name))
        if "camera" in matrices:
            scores["iou_selfocc"] = float(geometric_iou(matrices["camera"], "selfocc"))
        if self.rays:
            rays = ray_scores(torch.stack([self.rays[group] for group in groups]).sum(0))
            scores |= {name: value for name, value in rays.items() if name != "per_class"}
        return {name: value for name, value in scores.items() if np.isfinite(value)}

    def per_class(self) -> dict[str, dict[str, float | None]]:
        """{mask: {class: IoU by flashocc's rule, None where undefined}}, and "rayiou": mean of the thresholds."""
        tables = {m: class_iou(self.confusion(m), "flashocc").tolist() for m in MASKS if m in self.seen}
        if self.rays:
            iou = torch.tensor(ray_scores(torch.stack(list(self.rays.values())).sum(0))["per_class"])  # (3, 17)
            tables["rayiou"] = iou.nanmean(0).tolist()
        return {m: {name: v if np.isfinite(v) else None for name, v in zip(CLASSES, row)} for m, row in tables.items()}

    def print_table(self, title: str = "", file=None) -> None:
        """The field's own lines (FlashOcc's, camera mask), then every mask and RayIoU in one small table. Percent."""
        file = file or sys.stdout
        count, scores = sum(self.frames.values()), self.metrics()
        main = next((mask for mask in MASKS if mask in self.seen), "none")
        if title:
            print(title, file=file)
        print(f"===> per class IoU of {count} samples:", file=file)
        for name, value in zip(CLASSES[:-1], class_iou(self.confusion(main), "flashocc").tolist()):
            print(f"===> {name} - IoU = {round(100 * value, 2)}", file=file)
        print(f"===> mIoU of {count} samples: {round(100 * scores.get(f'miou_{main}', NAN), 2)}", file=file)
        print(f"(the lines above: {main} mask)" if main != "none" else "(the lines above: no mask)", file=file)
        print(f"{'mask':8}{'mIoU':>8}{'mIoU15':>8}{'IoU':>8}", file=file)
        for mask in (m for m in MASKS if m in self.seen):
            row = [100 * scores.get(f"{key}_{mask}", NAN) for key in ("miou", "miou15", "iou")]
            print(f"{mask:8}" + "".join(f"{value:8.2f}" for value in row), file=file)
        if "rayiou" in scores:
            parts = "  ".join(f"@{t} {100 * scores[f'rayiou@{t}']:.2f}" for t in RAY_THRESHOLDS)
            print(f"RayIoU {100 * scores['rayiou']:.2f}  {parts}", file=file)

    def save(self, path: Path | str) -> None:
        """Writes the per-scene counts as npz, so that arms can be paired by scene later, without predictions."""
        groups = list(self.counts)
        rays = [self.rays.get(g, torch.full((5, FREE), -1)) for g in groups]
        write_npz(
            path,
            groups=np.array([g.encode() for g in groups], "S"),
            counts=torch.stack([self.counts[g] for g in groups]).numpy(),
            rays=torch.stack(rays).numpy(),
            frames=np.array([self.frames[g] for g in groups]),
            masks=np.array([mask in self.seen for mask in MASKS]),
        )

    @classmethod
    def load(cls, path: Path | str) -> "OccupancyMeter":
        data = read_npz(path, {key: (None, None) for key in ("groups", "counts", "rays", "frames", "masks")})
        n = len(data["groups"]) if data["groups"].dtype.kind == "S" and data["groups"].ndim == 1 else -1
        shapes = {"counts": (n, 4, len(CLASSES), len(CLASSES)), "rays": (n, 5, FREE), "frames": (n,), "masks": (4,)}
        if wrong := [k for k, shape in shapes.items() if data[k].shape != shape or data[k].dtype.kind not in "iub"]:
            raise InputError(f"{path}: '{wrong[0]}' does not fit the scenes; evaluate again")
        meter = cls()
        for k, name in enumerate(data["groups"].tolist()):
            group = name.decode()
            meter.counts[group], meter.frames[group] = torch.from_numpy(data["counts"][k]), int(data["frames"][k])
            if data["rays"][k].min() >= 0:
                meter.rays[group] = torch.from_numpy(data["rays"][k])
        meter.seen = {mask for mask, there in zip(MASKS, data["masks"].tolist()) if there}
        return meter


# --- SemanticKITTI scene completion ----------------------------------------------------------------------------------


def shown(value: float | None, digits: int = 2) -> str:
    """A score for a table; `undefined` for None, nan and inf."""
    return "undefined" if value is None or not np.isfinite(value) else f"{value:.{digits}f}"


def ssc_confusion(pred, gt, invalid) -> Tensor:
    """Train ids (B, X, Y, Z), 0 empty, 1..19, 255 ignored in gt; invalid 0/1 -> (20, 20) int64 counts [pred, gt].

    The transpose of Occ3D's matrix, as in semantic-kitti-api. Evaluated where gt != 255 and invalid != 1; predictions
    are never masked, and an id above 19 at an evaluated voxel raises ValueError (there: an index error).
    """
    pred, gt, invalid = _tensor(pred), _tensor(gt), _tensor(invalid)
    if not pred.shape == gt.shape == invalid.shape:
        raise ValueError(f"shapes differ: {tuple(pred.shape)}, {tuple(gt.shape)}, {tuple(invalid.shape)}")
    keep = (gt != 255) & (invalid != 1)
    pred, gt = pred[keep], gt[keep]
    _valid("the prediction", pred, 20)
    _valid("the ground truth", gt, 20)
    return _pairs(pred, gt, 20)[0]


def ssc_scores_of(confusion: Tensor, protocol: str = "semantickitti") -> dict:
    """(20, 20) summed `ssc_confusion` -> as `ssc_scores`."""
    if protocol not in ("semantickitti", "monoscene"):
        raise ValueError(f"protocol '{protocol}': choose semantickitti or monoscene")
    counts = _tensor(confusion).double()
    hit = counts.diagonal()
    small = 1e-15 if protocol == "semantickitti" else 1e-5
    eps = float(np.finfo(np.float32).eps) if protocol == "semantickitti" else 0.0
    iou = hit / (counts.sum(0) + counts.sum(1) - hit + small)
    both = counts[1:, 1:].sum()  # predicted and really occupied, of whatever class
    return {
        "iou": float(both / (counts.sum() - counts[0, 0])),
        "miou": float(iou[1:].mean()),  # absent classes stay in as 0: a perfect prediction without class k is 18/19
        "precision": float(both / (counts[1:].sum() + eps)),
        "recall": float(both / (counts[:, 1:].sum() + eps)),
        "per_class": iou.tolist(),
    }


def ssc_scores(pred, gt, invalid, protocol: str = "semantickitti") -> dict:
    """Train ids (B, X, Y, Z) twice, invalid 0/1 -> {"iou", "miou", "precision", "recall", "per_class": 20 floats}.

    semantic-kitti-api's rule: completion IoU, precision and recall of occupied against empty; mIoU is the mean over the
    classes 1..19, absent ones included as 0; per_class[0] is empty's. protocol="monoscene": MonoScene's sscMetrics
    (other epsilons, the same numbers to 1e-5). A whole set: sum `ssc_confusion`, then `ssc_scores_of`.
    """
    return ssc_scores_of(ssc_confusion(pred, gt, invalid), protocol)


# --- open-loop planning ----------------------------------------------------------------------------------------------

PLANNING_PROTOCOLS = {
    "uniad": "value AT 1/2/3 s; a masked step counts as zero error; obstacles: vehicles",
    "stp3": "mean of the steps UP TO 1/2/3 s, of samples with a full horizon; obstacles: vehicles and pedestrians",
    "vad": "as stp3, averaged per sample first; its rasters' rows run backwards",
}
CELL, CELLS, FIRST = 0.5, 200, -49.75  # [m] cell edge; cells per side of [-50, 50]^2; [m] centre of cell 0
_EGO_WIDTH, _EGO_LENGTH, _EGO_SHIFT = 1.85, 4.084, 0.5  # [m] the box's centre lies 0.5 m before the reference point


def ego_footprint() -> Tensor:
    """(32, 2) long cells (forward, sideways) that the ego box covers at the origin: 97..104 by 98..101."""
    spans = []
    for half, shift in ((_EGO_LENGTH / 2, _EGO_SHIFT), (_EGO_WIDTH / 2, 0.0)):
        low, high = (shift - half - FIRST) / CELL, (shift + half - FIRST) / CELL
        spans.append(torch.arange(int(np.ceil(low)), int(np.floor(high)) + 1))
    return torch.cartesian_prod(*spans)


def _collisions(path: Tensor, occupied: Tensor, protocol: str) -> tuple[Tensor, Tensor]:
    """path (B, T, 2) [m] x right, y forward; occupied (B, T, 200, 200) -> point hits, box hits: (B, T) bool each.

    Cells, [row, column], by protocol: uniad (forward, right), stp3 (forward, left), vad (backward, right); that is how
    each one's own rasters lie. An index is (coordinate - FIRST) / CELL, truncated towards zero. A box's cells beyond
    the border are clipped to it (so a car off the grid can meet border cells); a point off the grid meets nothing.
    VAD's own point collision reads cell (49, 49) for a car at the origin. Not followed: the point takes VAD's row rule
    of its boxes, 200 - forward, and reads (100, 99), which lies in the car's box.
    """
    sideways = -path[..., 0] if protocol == "stp3" else path[..., 0]
    forward = path[..., 1]

    def look(row: Tensor, column: Tensor) -> Tensor:
        batch, step = torch.meshgrid(*(torch.arange(n, device=path.device) for n in path.shape[:2]), indexing="ij")
        extra = (1,) * (row.dim() - 2)
        return occupied[batch.view(*batch.shape, *extra), step.view(*step.shape, *extra), row, column].bool()

    row, column = (forward - FIRST) / CELL, (sideways - FIRST) / CELL
    row, column = (CELLS - row if protocol == "vad" else row).long(), column.long()  # .long() truncates
    inside = (row >= 0) & (row < CELLS) & (column >= 0) & (column < CELLS)
    point = look(row.clamp(0, CELLS - 1), column.clamp(0, CELLS - 1)) & inside

    foot = ego_footprint().to(path.device)
    row = (forward / CELL)[..., None].double() + foot[:, 0]  # (B, T, 32)
    column = (sideways / CELL)[..., None].double() + foot[:, 1]
    row = CELLS - row if protocol == "vad" else row
    box = look(row.long().clamp(0, CELLS - 1), column.long().clamp(0, CELLS - 1)).any(-1)
    return point, box


def planning_errors(pred, gt, mask, vehicles, pedestrians, protocol: str) -> dict[str, Tensor]:
    """Arguments as `planning_scores` -> {"l2", "obj_col", "obj_box_col"}: (B, 6) float64 of each sample and step."""
    if protocol not in PLANNING_PROTOCOLS:
        raise ValueError(f"protocol '{protocol}': choose from {', '.join(PLANNING_PROTOCOLS)}")
    pred, gt, mask = _tensor(pred), _tensor(gt), _tensor(mask)
    occupied = _tensor(vehicles).bool()
    if protocol != "uniad":
        occupied = occupied | _tensor(pedestrians).bool()
    if pred.shape != gt.shape or pred.shape[1:] != (6, 2) or occupied.shape != (len(pred), 6, CELLS, CELLS):
        shapes = tuple(pred.shape), tuple(gt.shape), tuple(occupied.shape)
        raise ValueError(f"expected (B, 6, 2), (B, 6, 2), (B, 6, 200, 200), got {shapes}")
    mask = mask[..., None].expand(-1, -1, 2) if mask.dim() == 2 else mask
    square = (pred.double() - gt.double()) ** 2
    if protocol == "uniad":
        square = torch.where(mask > 0, square, 0.0)
    _, gt_box = _collisions(gt, occupied, protocol)
    point, box = _collisions(pred, occupied, protocol)
    return {
        "l2": square.sum(-1).sqrt(),
        "obj_col": (point & ~gt_box).double(),  # a step where the recorded drive itself collides is no fault
        "obj_box_col": (box & ~gt_box).double(),
    }


def _horizons(steps: dict[str, Tensor], protocol: str) -> dict[str, float]:
    """{name: (B, 6)} -> {name_{1,2,3}s}: at the step, or the mean up to it. No samples: NaN."""
    scores = {}
    for name, values in steps.items():
        per_step = values.mean(0)  # VAD averages each sample first: the same, as every sample has six steps
        for s in (1, 2, 3):
            value = per_step[2 * s - 1] if protocol == "uniad" else per_step[: 2 * s].mean()
            scores[f"{name}_{s}s"] = float(value)
    return scores


def planning_scores(pred, gt, mask, vehicles, pedestrians, protocol: str, full_horizon: bool = False) -> dict:
    """pred, gt (B, 6, 2) [m] x right, y forward (LiDAR frame), 0.5 s apart; mask the same shape or (B, 6), 1 = known;
    vehicles, pedestrians (B, 6, 200, 200) bool, in the cells of the protocol's own rasters (`_collisions`, `rasterize`)
    -> {l2, obj_col, obj_box_col}_{1,2,3}s: [m] and fractions of samples. Protocols: PLANNING_PROTOCOLS.

    stp3 and vad score each step of each sample given, masked or not: their loaders leave out samples without a full
    horizon beforehand. full_horizon does that here (`PlanningMeter` always does it for these two).
    """
    steps = planning_errors(pred, gt, mask, vehicles, pedestrians, protocol)
    if full_horizon:
        whole = _tensor(mask).bool().flatten(1).all(1)
        steps = {name: values[whole] for name, values in steps.items()}
    return _horizons(steps, protocol)


def rasterize(corners: Iterable[np.ndarray], protocol: str) -> np.ndarray:
    """corners: (4, 2) [m] box corners, x right, y forward -> (200, 200) bool, in the protocol's cells.

    ST-P3's and VAD's painting: corners rounded to cells, cv2.fillPoly (border cells included).
    """
    import cv2

    axes = {"uniad": ((1, 1), (0, 1)), "stp3": ((1, 1), (0, -1)), "vad": ((1, -1), (0, 1))}[protocol]  # row, column
    image = np.zeros((CELLS, CELLS), np.uint8)
    for box in corners:
        row, column = ((sign * box[:, axis] - FIRST + CELL / 2) / CELL for axis, sign in axes)
        cv2.fillPoly(image, [np.round(np.stack([column, row], 1)).astype(np.int32)], 1)
    return image.astype(bool)


def box_corners(x: float, y: float, yaw: float, length: float, width: float) -> np.ndarray:
    """(4, 2) [m] corners of a box whose length lies along `yaw` [rad], counter-clockwise from x."""
    forward, left = np.array([np.cos(yaw), np.sin(yaw)]) * length / 2, np.array([-np.sin(yaw), np.cos(yaw)]) * width / 2
    return np.array([x, y]) + np.stack([forward + left, left - forward, -forward - left, forward - left])


class PlanningMeter:
    """All three planning protocols over an evaluation, scene by scene. ST-P3 and VAD take full horizons only."""

    def __init__(self):
        self.steps: dict[str, dict[str, list[Tensor]]] = {}  # scene -> protocol -> [(3, 6) l2, point, box]
        self.full: dict[str, dict[str, list[Tensor]]] = {}  # the same, of full horizons alone
        self.samples = 0

    def add(self, pred, gt, mask, rasters: dict[str, tuple], group: str = "all") -> None:
        """One sample: pred, gt (6, 2) [m] x right, y forward, mask (6,); rasters {protocol: (vehicles, pedestrians)},
        each (6, 200, 200) bool, as `audit.planning_truth` makes them."""
        pred, gt, mask = (_tensor(x)[None] for x in (pred, gt, mask))
        scene = self.steps.setdefault(str(group), {name: [] for name in PLANNING_PROTOCOLS})
        self.samples += 1
        for protocol, (vehicles, pedestrians) in rasters.items():
            if protocol != "uniad" and not bool(mask.bool().all()):
                continue
            steps = planning_errors(pred, gt, mask, _tensor(vehicles)[None], _tensor(pedestrians)[None], protocol)
            scene[protocol].append(torch.cat([values for values in steps.values()]))
            if bool(mask.bool().all()):
                full = self.full.setdefault(str(group), {name: [] for name in PLANNING_PROTOCOLS})
                full[protocol].append(scene[protocol][-1])

    def counted(self, protocol: str) -> int:
        """Samples in the protocol's mean."""
        return sum(len(scene[protocol]) for scene in self.steps.values())

    def by_group(self) -> dict[str, dict[str, Tensor]]:
        """{scene: {protocol: (samples, 3, 6) float64: l2 [m], obj_col, obj_box_col}}, for resampling by scene."""
        empty = torch.zeros(0, 3, 6, dtype=torch.float64)
        return {g: {p: torch.stack(v) if v else empty for p, v in s.items()} for g, s in self.steps.items()}

    def metrics(self, groups: Iterable[str] | None = None) -> dict[str, float]:
        """{l2, obj_col, obj_box_col}_{1,2,3}s_<protocol> and _avg_<protocol>; undefined ones are left out."""
        scenes, scores = self.by_group(), {}
        for protocol in PLANNING_PROTOCOLS:
            steps = torch.cat([scenes[g][protocol] for g in (scenes if groups is None else groups)])  # (B, 3, 6)
            named = dict(zip(("l2", "obj_col", "obj_box_col"), steps.unbind(1)))
            values = _horizons(named, protocol)
            values |= {f"{name}_avg": sum(values[f"{name}_{s}s"] for s in (1, 2, 3)) / 3 for name in named}
            scores |= {f"{name}_{protocol}": value for name, value in values.items() if np.isfinite(value)}
        return scores

    def full_horizons(self) -> dict[str, float]:
        """`metrics` by UniAD's rule, of samples with all six steps alone: it counts a masked step as 0."""
        own = PlanningMeter()
        own.steps, own.samples = self.full, self.samples
        return {name: value for name, value in own.metrics().items() if name.endswith("uniad")} if self.full else {}


# --- question answering, open set, LIBERO-Plus -----------------------------------------------------------------------


def qa_scores(rows: Iterable[dict]) -> dict[str, tuple[int, int, float]]:
    """NuScenes-QA rows with pred, answer, template_type, num_hop -> {group: (correct, total, percent)}.

    Groups: "Overall", each template type, each "<type>_<hop>"; equality of the strings, nothing normalised; percent
    with two decimals, as result_eval.py prints it.
    """
    counts: dict[str, list[int]] = {"Overall": [0, 0]}
    for row in rows:
        right = str(row["pred"]) == str(row["answer"])
        kind = row["template_type"]
        for group in ("Overall", kind, f"{kind}_{row['num_hop']}"):
            entry = counts.setdefault(group, [0, 0])
            entry[0] += right
            entry[1] += 1
    names = ["Overall"] + sorted(set(counts) - {"Overall"})
    return {g: (counts[g][0], counts[g][1], round(100 * counts[g][0] / max(counts[g][1], 1), 2)) for g in names}


def openset_scores(score, unknown, count=None) -> dict[str, float]:
    """score (M,), higher = more unknown; unknown (M,) bool -> {"auroc", "aupr", "fpr95"}, unknown being positive.

    scikit-learn's: equal scores move together, AUPR is the average precision (steps, no interpolation). FPR95: false
    positives at the first threshold that finds 95 % of the unknown. NaN where there is no unknown or no known element.
    count (M,): how many elements each of them stands for.
    """
    from sklearn.metrics import average_precision_score, roc_auc_score, roc_curve

    score, unknown = _tensor(score).flatten().double().cpu().numpy(), _tensor(unknown).flatten().bool().cpu().numpy()
    if score.shape != unknown.shape:
        raise ValueError(f"{len(score)} scores for {len(unknown)} labels")
    if np.isnan(score).any():
        raise ValueError(f"{int(np.isnan(score).sum())} of {len(score)} scores are NaN")
    if unknown.all() or not unknown.any():
        return {"auroc": NAN, "aupr": NAN, "fpr95": NAN}
    weight = None if count is None else _tensor(count).flatten().double().cpu().numpy()
    false, true, _ = roc_curve(unknown, score, drop_intermediate=False, sample_weight=weight)
    return {
        "auroc": float(roc_auc_score(unknown, score, sample_weight=weight)),
        "aupr": float(average_precision_score(unknown, score, sample_weight=weight)),
        "fpr95": float(false[true >= 0.95][0]),
    }


# Tasks per category in LIBERO-Plus' task_classification.json (sylvestf/LIBERO-plus@4976dc3): 10030, one episode each.
LIBERO_PLUS_TASKS = {
    "camera": 1599, "robot": 1550, "language": 1537, "light": 1142, "background": 1076, "noise": 1601, "layout": 1525,
}  # fmt: skip
_LIBERO_PLUS_NAMES = {"lang": "language", "bg": "background", "sensor": "noise", "objects": "layout"}


def libero_plus_average(success: dict[str, float]) -> float:
    """{category: percent} of all seven perturbations -> their mean weighted by the tasks of each, as the tables' "Avg".

    Names as in the file ("Camera Viewpoints"), the papers' columns ("Camera", "Lang", "Bg") or this module's. Raises
    ValueError on an unknown, double or missing category: a mean over fewer is another number.
    """
    rates = {}
    for name, percent in success.items():
        word = name.lower().replace("_", " ").split()[0]
        category = _LIBERO_PLUS_NAMES.get(word, word)
        if category not in LIBERO_PLUS_TASKS or category in rates:
            raise ValueError(f"category '{name}' is {'given twice' if category in rates else 'unknown'}")
        rates[category] = percent
    if missing := set(LIBERO_PLUS_TASKS) - set(rates):
        raise ValueError(f"no success rate for {', '.join(sorted(missing))}")
    return sum(rates[c] * n for c, n in LIBERO_PLUS_TASKS.items()) / sum(LIBERO_PLUS_TASKS.values())


if __name__ == "__main__":
    from common.audit import main

    main()
