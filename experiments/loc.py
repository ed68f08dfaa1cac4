"""LOC's claims re-tested: contrast against distillation, labels step by step, two heads, wrapped networks.

    python loc.py ablate --claim contrast --seeds 3     # or: python -m experiments.loc --claim a
    python loc.py ablate --claim label-quality          # the labels' steps against gts and the exact world

Beside Config fields an arm has a `form`, the language head's loss (the contrast, or a rival by its paper); a
`naming`, by which labelled voxels get their class; a `score`, the head whose unknown score is compared; and a
`feature`, by which predicted voxels are named. Arms share labels and trainings in <out>/../arms. A bare
network's language head learns nothing and is not used.
"""

import math
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

import loc
from common import cli, verbs, viz
from common.files import InputError, read_json, read_npz, short_hash, write_json, write_npz
from common.geometry import OCC3D
from common.kernels.voxel_vote import voxel_vote
from common.labels import WORLD, label_path, make_labels
from common.lidar import UNLABELLED, Now, Scene, move, open_scans
from common.metrics import OccupancyMeter
from common.nuscenes import FREE, NuScenesOccupancy, open_split
from common.report.occupancy import constant_scores, describe_dataset, spread
from common.report.openset import hide_classes
from common.report.pictures import style_of
from common.semantickitti import SemanticKITTI
from common.worlds import is_world, make
from experiments.runner import Claim, main, once, start_claim, write_quality

SHARED = {"steps": 180, "n_sweeps": 90}  # config fields of every arm
FLAGS = {
    "form": cli.Flag("loss of the language head", Literal["contrast", "cosine", "mse", "v2v"], "contrast"),
    "naming": cli.Flag("labels: k nearest points, or a voxel's own", Literal["knn", "own"], "knn"),
    "score": cli.Flag("head of the unknown score", Literal["both", "language", "occupancy"], "both"),
    "feature": cli.Flag("feature that names voxels", Literal["both", "f", "g"], "both"),
    "frame-stride": cli.Flag("every n-th keyframe is learned from", int, 4, least=1),
    "eval-frames": cli.Flag("keyframes evaluated, evenly spaced; 0: all", int, 40),
    "workers": verbs.FLAGS["workers"],
    "world-size": verbs.FLAGS["world-size"]._replace(default="claims"),
    "split": cli.SHARED["split"],  # label-quality: default val
}
SELF = {"mode": "selfsup"}
BARE = {"lambda_dcl": 0.0, "lambda_img": 0.0, "score": "occupancy"}
SPARSE = {"poisson": False, "naming": "own"}
NETWORKS = {"own": "lss", "easyocc": "easyocc", "occle": "occle"}
DIVERSE = ("scene_centroid_distance", "scene_inter_intra", "scene_effective_rank")
OWN = ("naming_unknown_f", "choice_unknown_f", "unknown_miou_f")  # of the language head alone
BOTH = ("naming_unknown", "choice_unknown", "unknown_miou", "known_miou")  # of norm(f + a g)
STOPPED = ("The language head's gradient stops before the trunk unless an arm lets it in. Naming and choice "
           "are on the ground truth's occupied voxels, choice among the held-out classes alone.")
CLAIMS = {
    "contrast": Claim(
        "contrast", "(a) dense contrast beats distillation: unknown kinds by prompt, and features of "
        "different classes stay apart",
        {form: SELF | {"form": form} for form in ("contrast", "cosine", "mse")},
        tuple(("contrast", rival, m) for rival in ("cosine", "mse")
              for m in (*OWN, *DIVERSE, "known_miou", "scene_auroc")),
        note="All arms see the same CLIP features at the same voxels: beside the text term (contrast, "
        f"cosine) or as the target (mse). {STOPPED}"),
    "ground-truth": Claim(
        "ground-truth", "(b) adding existing ground truth improves on self-supervised labels alone",
        {"labels": SELF, "labels + gt": SELF | {"gt": True}},
        tuple(("labels + gt", "labels", metric) for metric in ("miou_camera", *BOTH)), note=STOPPED),
    "density": Claim(
        "density", "(c) dense labels (fusion, Poisson, k nearest neighbours) teach more than sparse ones",
        {"single sweep": SELF | SPARSE | {"fuse": False}, "fused": SELF | SPARSE,
         "fused + Poisson + KNN": SELF},
        tuple(("fused + Poisson + KNN", rival, m) for rival in ("single sweep", "fused")
              for m in ("miou_camera", *BOTH)),
        note="Labels differ, and with them what is supervised: a single sweep's rays leave most voxels "
        f"unknown. {STOPPED}"),
    "wrap": Claim(
        "wrap", "(d) wrapping a network keeps its known classes and adds open-set ability, for each of three "
        "networks",
        {f"{name} {how}": {"network": network} | changes for name, network in NETWORKS.items()
         for how, changes in (("bare", BARE), ("wrapped", {}), ("with gradient", {"lang_grad": True}))},
        tuple((f"{name} wrapped", f"{name} {rival}", m) for name in NETWORKS
              for rival, metrics in (("bare", ("miou_camera", "scene_auroc", "naming_unknown_f")),
                                     ("with gradient", ("miou_camera", *OWN))) for m in metrics),
        note="Known classes are kept if `wrapped > bare` is not refuted on miou_camera; a bare network's "
        "unknown score is 1 - its largest known probability. Its language head is there, learns nothing and "
        "costs its time. With gradient: the language head's enters the trunk."),
    "heads": Claim(
        "heads", "(e) two heads combined separate unknown from known better than either alone, without extra "
        "training data",
        {"both heads": {}, "occupancy head": {"score": "occupancy"}, "language head": {"score": "language"}},
        (("both heads", "occupancy head"), ("both heads", "language head")), metric="scene_auroc",
        note="One training a seed; the arms differ in the head whose probabilities are scored."),
    "image": Claim(
        "image", "(f) the sparse image term helps: unknown kinds by prompt",
        {"with image term": SELF, "text only": SELF | {"lambda_img": 0.0}},
        tuple(("with image term", "text only", m) for m in (*OWN, "known_miou", "scene_auroc")),
        note=STOPPED),
    "features": Claim(
        "features", "(g) text and image-pixel information together name unknown kinds better than either",
        {"f + g": {}, "f": {"feature": "f"}, "g": {"feature": "g"}},
        tuple(("f + g", rival, m) for rival in ("f", "g") for m in BOTH),
        note="One training a seed. f: the language head's; g: the frozen pixel feature lifted into the "
        "voxel, the teacher's merit; f + g: norm(f + a g), a by known naming in training."),
    "start": start_claim(),
}
STEPS = {  # of the labels, for label-quality
    "single sweep": SPARSE | {"fuse": False}, "fused": SPARSE, "+ Poisson": {"knn_k": 1}, "+ KNN": {},
}


# --- rivals -------------------------------------------------------------------------------------------------


def text_cosine(f: Tensor, text: Tensor, label: Tensor, weight: Tensor) -> Tensor:
    """LOcc's distillation: mean 1 - cos(f_i, t_{y_i}); no negatives. Shapes as in loc.voxel_to_text."""
    return loc.weighted_mean(1 - F.cosine_similarity(f, text[label], dim=-1), weight)


def pixel_mse(f: Tensor, image: Tensor, weight: Tensor) -> Tensor:
    """POP-3D's distillation: MSE of f and g over voxels with a pixel and channels; no text, no norm."""
    return loc.weighted_mean((f - image).square().mean(-1), weight)


def cosine_terms(f: Tensor, batch: dict, text: Tensor, cfg: loc.Config) -> dict[str, Tensor]:
    """`text_cosine` in the place of (4); arguments as of loc.dense_contrast."""
    S = batch["cell_class"].shape[1]
    image = loc.image_term(f[:, S:], batch["pixel_feature"], batch["pixel_weight"])
    return {"dcl": cfg.lambda_dcl * text_cosine(f[:, :S], text, batch["cell_class"], batch["cell_weight"]),
            "img": cfg.lambda_img * image}


def mse_terms(f: Tensor, batch: dict, text: Tensor, cfg: loc.Config) -> dict[str, Tensor]:
    """`pixel_mse` in the place of (4) and (6)."""
    S = batch["cell_class"].shape[1]
    return {"dcl": cfg.lambda_dcl * pixel_mse(f[:, S:], batch["pixel_feature"], batch["pixel_weight"])}


def voxel_to_voxel(f: Tensor, label: Tensor, weight: Tensor, tau: float = loc.TAU) -> Tensor:
    """(5) supervised contrast among a keyframe's sampled voxels: positives share the label.

    f (B, S, D), label (B, S), weight (B, S).
    """
    f, valid = F.normalize(f, dim=-1), weight > 0
    other = valid[:, None, :] & ~torch.eye(f.shape[1], dtype=torch.bool, device=f.device)  # (B, S, S) a != i
    logits = (f @ f.transpose(1, 2) / tau).masked_fill(~other, -1e4)  # -inf has no gradient
    log_p = logits - logits.logsumexp(-1, keepdim=True)
    positive = other & (label[:, :, None] == label[:, None, :])
    count = positive.sum(-1)
    value = -torch.where(positive, log_p, 0.0).sum(-1) / count.clamp_min(1)
    return loc.weighted_mean(value, weight * (count > 0))


def voxel_terms(f: Tensor, batch: dict, text: Tensor, cfg: loc.Config) -> dict[str, Tensor]:
    """(4), (5) at half its weight, and (6)."""
    label, weight = batch["cell_class"], batch["cell_weight"]
    more = cfg.lambda_dcl / 2 * voxel_to_voxel(f[:, : label.shape[1]], label, weight)
    return loc.dense_contrast(f, batch, text, cfg) | {"v2v": more}


FORMS = {"contrast": loc.dense_contrast, "cosine": cosine_terms, "mse": mse_terms, "v2v": voxel_terms}


def own_points(scene: Scene, now: Now, index: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """loc.name_voxels' rival: the majority of a voxel's own labelled points; none: the nearest one."""
    static = np.zeros((0, 3)) if scene.tree is None else move(now.T_ego_scene, scene.tree.data)
    labels = torch.from_numpy(np.concatenate([scene.tree_labels, now.movers.labels]))
    at, inside = scene.grid.index(torch.from_numpy(np.concatenate([static, now.movers.points])))
    _, Y, Z = shape = scene.grid.shape
    flat = torch.where(inside, (at[:, 0] * Y + at[:, 1]) * Z + at[:, 2], -1)
    votes = voxel_vote(flat, labels, math.prod(shape), UNLABELLED, empty=UNLABELLED)
    own, own_share, count = (x.view(shape).numpy()[tuple(index.T)] for x in votes)
    nearest, share = loc.name_voxels(scene, now, index, 1)
    return np.where(count > 0, own, nearest), np.where(count > 0, own_share, share)


# --- arms ---------------------------------------------------------------------------------------------------


def labels_of(dataset, labeler: str, cfg: loc.Config, args: SimpleNamespace, only=None) -> Path:
    """Make the labels of keyframes `only` that args.pool lacks; -> the folder of these settings."""
    naming = {"knn": loc.name_voxels, "own": own_points}[args.naming]
    maker = loc.LABELS._replace(of_scene=partial(loc.dense_labels, name=naming))
    fields = [getattr(cfg, name) for name in maker.fields]
    key = short_hash([labeler, fields, args.naming, str(dataset.root), dataset.version, dataset.split])
    folder, options = args.pool / f"labels-{key}", WORLD if labeler == "world" else {}
    make_labels(maker, dataset, labeler, options, cfg, folder, only=only, workers=args.workers)
    return folder


def run_arm(cfg: loc.Config, args: SimpleNamespace) -> Path:
    """Train and evaluate one arm; arms that differ in `score` alone share a training."""
    trained = {"config": cli.to_dict(cfg), "form": args.form, "naming": args.naming,
               "stride": args.frame_stride, "data": [str(args.data_root), args.version]}
    run = args.pool / f"run-{short_hash(trained)}" / f"seed{args.seed}"
    dataset = open_split(args.data_root, args.version, None, cfg.image_size, args.cache)
    frames = range(0, len(dataset), args.frame_stride)
    labels = labels_of(dataset, "lidar" if cfg.mode == "supervised" else "world", cfg, args, only=frames)
    own = {"out": run, "ckpt": run, "split": None, "labels": None, "save_pred": None, "rayiou": False,
           "image_weight": loc.IMAGE_WEIGHT, "known_by": "occupancy"}
    args = SimpleNamespace(**vars(args) | own | {"pictures": 0})
    loc.train(cfg, dataset, labels, args, frames=frames, contrast=FORMS[args.form], shared=labels)
    args.run = read_json(run / "config.json")
    key = short_hash([trained["data"], cfg.holdout, args.eval_frames])
    constants = once(args.pool / f"constants-{key}.json", lambda: constants_of(cfg, dataset, args))
    loc.evaluate(cfg, args, measured=constants)
    return with_score(run, args.score, args.feature)


def constants_of(cfg: loc.Config, dataset: NuScenesOccupancy, args: SimpleNamespace) -> dict[str, float]:
    """The constant predictor's scores, held-out voxels left out."""
    novel = loc.read_vocabulary(cfg).novel
    test, train_set = hide_classes(verbs.open_eval(cfg, args), novel), hide_classes(dataset, novel)
    return constant_scores(train_set, test, spread(len(test), args.eval_frames), test.labels)


def with_score(run: Path, head: str, feature: str) -> Path:
    """-> a folder with the run's results: AUROC of one head (or both), naming by one feature (or both)."""
    folder, result = run / f"{head}-{feature}", read_json(run / "result.json")
    with np.load(run / "by_scene.npz", allow_pickle=False) as archive:
        arrays = {name: archive[name] for name in archive.files}
    taken = {name: f"{name}_{head}" for name in ("auroc", "aupr", "fpr95", "scene_auroc")}
    if feature != "both":
        taken |= {name: f"{name}_{feature}" for name in BOTH}
    for name, source in taken.items():
        result["metrics"][name] = result["metrics"][source]
        if f"ratio_{source}" in arrays:
            arrays[f"ratio_{name}"] = arrays[f"ratio_{source}"]
    write_npz(folder / "by_scene.npz", **arrays)
    write_json(folder / "result.json", result)
    return folder


# --- label quality ------------------------------------------------------------------------------------------


def label_quality(cfg: loc.Config, args: SimpleNamespace) -> None:
    """Each step of the labels against what is known of a split: a table, its JSON, a picture a labeler.

    A world or nuScenes: gts (surfaces that some sensor saw), and a world's exact solids. SemanticKITTI:
    voxels/*.bin and .occluded.
    """
    dataset = open_scans(args.data_root, args.version, args.split, cfg.image_size, args.cache, train=False)
    kitti = isinstance(dataset, SemanticKITTI)
    labelers = {"own labels": "lidar"} if kitti else {"boxes + lidarseg": "lidar"}
    if is_world(dataset.root):
        labelers["2D maps, no boxes"] = "world"
    known = dataset.gts is not None  # nuScenes
    indices = known_scans(dataset) if kitti else spread(len(dataset), args.eval_frames) * known
    if not indices:
        raise InputError(f"{dataset.root}: nothing to compare labels with in split '{dataset.split}' "
                         "(nuScenes: gts/; SemanticKITTI: voxels/*.bin, .occluded)")
    rows = {}
    for title, labeler in labelers.items():
        panels = {} if kitti else {"ground truth": dataset.labels(indices[0])[0]}
        for step, changes in STEPS.items():
            begun, fields = time.time(), {k: v for k, v in changes.items() if k != "naming"}
            args.naming = changes.get("naming", "knn")
            labels = labels_of(dataset, labeler, replace(cfg, **fields), args, only=indices)
            seconds = (time.time() - begun) * args.workers / len(indices)
            scores = (score_scans if kitti else score_labels)(dataset, labels, indices)
            rows[f"{title}: {step}"] = scores | {"s/keyframe": seconds}
            panels[step] = read_semantics(dataset, labels, indices[0])
        draw_steps(dataset, indices[0], panels, title, args.out)
    write_quality(args.out, "loc", describe_dataset(dataset, len(indices)), cli.to_dict(cfg), rows)


def read_semantics(dataset, labels: Path, i: int) -> np.ndarray:
    """(X, Y, Z) uint8 of keyframe i's label."""
    shape = OCC3D.shape if isinstance(dataset, NuScenesOccupancy) else dataset.grid.shape
    return read_npz(label_path(labels, dataset, i), {"semantics": (shape, "uint8")})["semantics"]


def known_scans(dataset: SemanticKITTI) -> list[int]:
    """Scans that have voxels/*.bin and .occluded."""
    files = [dataset.root / dataset.lidar_file(i).replace("velodyne", "voxels") for i in range(len(dataset))]
    return [i for i, file in enumerate(files) if file.is_file() and file.with_suffix(".occluded").is_file()]


def draw_steps(dataset, i: int, panels: dict[str, np.ndarray], title: str, out: Path) -> None:
    """PNG: keyframe i's label after each step; beside ground truth the errors of the last one."""
    kitti = isinstance(dataset, SemanticKITTI)
    path = out / f"{'_'.join(''.join(c if c.isalnum() else ' ' for c in title.lower()).split())}.png"
    style = style_of(dataset)._asdict()
    style.pop("mask")
    viz.sheet(path, dataset.images(i), panels, mask=None if kitti else dataset.labels(i)[1],
              error=None if kitti else ("ground truth", "+ KNN"),
              title=f"LOC label, {title}: {dataset.scene_names[i]} {dataset.tokens[i]}", **style)
    print(f"  {path}")


def score_labels(dataset: NuScenesOccupancy, labels: Path, indices: list[int]) -> dict[str, float]:
    """Precision, recall, IoU of occupied voxels and mIoU against gts, in the camera mask and everywhere.

    Against the exact solids: the share of labelled voxels inside matter; the rest is hallucinated.
    """
    meter, labelled, inside = OccupancyMeter(), 0, 0
    for i in tqdm(indices, "label quality", unit="keyframe", leave=False):
        label = read_semantics(dataset, labels, i)
        meter.add(label, *dataset.labels(i), group=dataset.scene_names[i])
        path = dataset.root / "exact" / "solid" / dataset.scene_names[i] / f"{dataset.tokens[i]}.npz"
        if path.is_file():
            solid = read_npz(path, {"semantics": (OCC3D.shape, "uint8")})["semantics"] != FREE
            labelled, inside = labelled + (label != FREE).sum(), inside + ((label != FREE) & solid).sum()
    scores = {}
    for mask in ("camera", "none"):
        confusion = meter.confusion(mask).double()
        hit, found, truth = confusion[:FREE, :FREE].sum(), confusion[:, :FREE].sum(), confusion[:FREE].sum()
        scores |= {f"prec {mask}": float(hit / found), f"recall {mask}": float(hit / truth),
                   f"IoU {mask}": float(hit / (found + truth - hit)),
                   f"mIoU {mask}": meter.metrics()[f"miou_{mask}"]}
    return scores | ({"prec solid": float(inside / labelled)} if labelled else {})


def score_scans(dataset: SemanticKITTI, labels: Path, indices: list[int]) -> dict[str, float]:
    """SemanticKITTI: how much of voxels/*.bin (the scan's own returns) the label holds, and what else.

    The rest divides into what the scan could not see (.occluded) and what it saw empty: movers, and surfaces
    that are too thick.
    """
    count = np.zeros(5)
    for i in indices:
        label, returns = read_semantics(dataset, labels, i) != 0, dataset.bits(i, "bin")
        hidden = dataset.bits(i, "occluded")
        count += [(label & returns).sum(), returns.sum(), label.sum(), (label & hidden & ~returns).sum(),
                  (label & ~hidden & ~returns).sum()]
    both, returns, label, hidden, empty = count
    return {"recall of bin": both / returns, "voxels / bin": label / returns, "in bin": both / label,
            "hidden": hidden / label, "seen empty": empty / label}


if __name__ == "__main__":
    main(__doc__, loc.Config, loc.PRESETS, CLAIMS, run_arm, shared=SHARED, flags=FLAGS,
         other={"label-quality": label_quality}, world=lambda args: make("driving", size=args.world_size))
