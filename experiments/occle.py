"""OccLE's claims re-tested, part by part: semi-supervision, branches, fusion, projection, pseudo labels.

    python occle.py ablate --claim fusion --seeds 3     # or: python -m experiments.occle --claim c
    python occle.py ablate --claim fusion --format semantickitti
    python occle.py ablate --claim curve --world-size demo --steps 400  # label ratios, the paper's headline
    python occle.py ablate --claim cost                 # time of Dual Mamba against the number of tokens
    python occle.py ablate --claim targets              # what unlabelled frames teach; gradients by loss
    python occle.py ablate --claim projection-probe     # perfect occupancy through (15) and (16)

Beside Config fields an arm has a `variant`, a rival or a missing part that `occle.train` takes, and `inputs`.
Arms share labels in <out>/../arms. Arms whose first stage is the same share that, too.
"""

import math
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

import occle as O
from common import cli, verbs
from common.backbones import conv_norm_relu
from common.datasets import LABEL_SETS, voxel_truth
from common.files import InputError, atomic, read_json, short_hash, write_json
from common.geometry import cast_rays, coarsen, scale_to, unproject
from common.labels import label_record, make_labels
from common.metrics import OccupancyMeter
from common.networks.voxelnet import Voxels
from common.report.occupancy import (SscMeter, constant_scores, constant_ssc, evaluate, ground_truth, report,
                                     spread)
from common.semantickitti import SemanticKITTI
from common.train import load_checkpoint
from common.worlds import is_world, make
from experiments.runner import Claim, main, once, start_claim

SHARED = {"steps": 800, "warmup": 20}  # of every arm: the claims world has 720 labels
# In one stage, as without pseudo labels a first one leaves the semantic branch untaught. LiDAR alone, cells
# of 0.8 x 0.8 x 0.4 m and a small network (Occ3D's grid).
ONE_STAGE = {"branch_share": 0.0}
LIGHT = ONE_STAGE | {"inputs": "LiDAR", "grid_stride": (2, 2, 1), "cell_split": (5, 5, 2),
                     "mamba_stride": (2, 2, 1), "unet_channels": (16, 32), "grid_channels": 16,
                     "head_channels": 8}
SMALL = "The networks of the claim curve at 10 % of the labels: LiDAR input, small cells, one stage."
SUPERVISED = {"variant": "supervised", "batch_unlabelled": 0}
BOTH = {"OccLE": {}, "supervised": SUPERVISED}
RATIOS = (0.1, 1.0, 0.01, 0.02, 0.05, 0.2, 0.5)  # in the order of running
BY = {"frames": (0.01, 0.05, 0.1, 0.2, 1.0), "scenes": (0.01, 0.05, 0.1, 0.2)}  # all scenes are all frames
CLAIMS = {
    "curve": Claim(
        "curve", "(l) pseudo labels help at each ratio of labels, and with them 10 % are as good as 100 % "
                 "alone",
        {f"{who} {100 * r:g} %": arm | LIGHT | {"label_ratio": r}
         for r in RATIOS for who, arm in BOTH.items()},
        (*((f"OccLE {100 * r:g} %", f"supervised {100 * r:g} %") for r in sorted(RATIOS)),
         ("OccLE 10 %", "supervised 100 %"),
         *((f"supervised {100 * b:g} %", f"supervised {100 * a:g} %")
           for a, b in pairwise(sorted(RATIOS)))),
        note="LiDAR input, cells of 0.8 x 0.8 x 0.4 m, one stage in all arms, the same steps and labelled "
             "exposures in the same order; OccLE also sees a frame without its label a step."),
    "labels": Claim(
        "labels", "(a) with the same few voxel labels, pseudo labels and unlabelled frames beat supervision "
                  "alone: 10 %, and 1 %",
        {f"{how} {100 * r:g} %": arm | ONE_STAGE | ({"label_ratio": r} if r != 0.1 else {})
         for r in (0.1, 0.01) for how, arm in BOTH.items()},
        (("OccLE 10 %", "supervised 10 %"), ("OccLE 1 %", "supervised 1 %")),
        note="One stage, same optimiser steps, same labelled exposures in the same order; OccLE also sees a "
             "frame without labels a step."),
    "share": Claim(
        "share", "(b) 100 % of the labels is better than 10 %, but 10 % reaches a large share of it",
        {"OccLE 10 %": {}, "OccLE 100 %": {"label_ratio": 1.0}}, (("OccLE 100 %", "OccLE 10 %"),),
        note="At 100 % the second frame of a step is another labelled one without its label."),
    "fusion": Claim(
        "fusion", "(c) Dual Mamba fuses better than concatenation",
        {"Dual Mamba": {}, "concatenation": {"variant": "concatenation"}}, (("Dual Mamba", "concatenation"),),
        note="Both arms share the first stage."),
    "projection": Claim(
        "projection", "(d) the scatter-accumulated projection helps, by transmittance and by plain "
                      "accumulation",
        {"transmittance": {}, "accumulation": {"variant": "accumulation"},
         "without": {"variant": "no projection"}},
        (("transmittance", "without"), ("accumulation", "without"), ("transmittance", "accumulation")),
        note="All arms share the first stage."),
    "planes": Claim(
        "planes", "(e) cross-plane synergy beats plain addition of image and LiDAR features",
        {"synergy": {}, "addition": {"variant": "addition"}}, (("synergy", "addition"),), seeds=1),
    "aligned": Claim(
        "aligned", "(f) pseudo labels of two aligned sources beat the first source alone",
        {"aligned": LIGHT, "primary": LIGHT | {"variant": "primary"}}, (("aligned", "primary"),),
        note=SMALL),
    "ratios": Claim(
        "ratios", "(g) more labels are better, and spread over frames they beat as many in few scenes",
        {f"{100 * r:g} % by {by}": {"label_ratio": r, "label_by": by}
         for by, many in BY.items() for r in many},
        tuple((f"{100 * b:g} % by {by}", f"{100 * a:g} % by {by}") for by, many in BY.items()
              for a, b in pairwise(many)) + (("10 % by frames", "10 % by scenes"),), seeds=1),
    "decoupled": Claim(
        "decoupled", "(h) two decoupled branches beat one joint branch of as many parameters",
        {"decoupled": {}, "joint": {"variant": "joint"}}, (("decoupled", "joint"),), seeds=1),
    "semi": Claim(
        "semi", "(i) semi-supervised geometry beats supervised geometry with the same few labels; each part "
                "alone",
        {"all": LIGHT, "none": LIGHT | {"variant": "no semi"}} | {
            name: LIGHT | {"variant": name} for name in (
            "teacher alone", "hits alone", "rays alone", "no warm-up", "no ramp", "no strong augmentation",
            "no thresholds")},
        (("all", "none"), ("all", "none", "iou_camera"), ("teacher alone", "none"), ("hits alone", "none"),
         ("rays alone", "none"), ("all", "no warm-up"), ("all", "no ramp"), ("all", "no strong augmentation"),
         ("all", "no thresholds")), note=SMALL),
    "distill": Claim(
        "distill", "(j) distilling pseudo labels into the 2D and the 3D network beats either alone",
        {"both": {}, "2D only": {"variant": "2D only"}, "3D only": {"variant": "3D only"}},
        (("both", "2D only"), ("both", "3D only")), seeds=1),
    "inputs": Claim(
        "inputs", "(k) image and LiDAR together beat each alone",
        {"both": {}, "image": {"inputs": "image"}, "LiDAR": {"inputs": "LiDAR"}},
        (("both", "image"), ("both", "LiDAR")), seeds=1,
        note="LiDAR still teaches the image-only arm, through hits and rays of frames without labels."),
    "start": start_claim(),
}

# --- rivals and missing parts -------------------------------------------------------------------------------


class Concatenation(O.OccLE):
    """Fusion (c): both grids side by side into the convolution, no Mamba."""

    def __init__(self, cfg: O.Config, pretrained: bool = True):
        super().__init__(cfg, pretrained)
        self.fusion, C = None, cfg.grid_channels
        self.mix = conv_norm_relu(2 * C, C, "group", dims=3)

    def fuse(self, s: Tensor, g: Tensor) -> Tensor:
        return O.conv3d(self.mix, torch.cat([s, g], -1))


class Addition(O.GeometricBranch):
    """Planes (e): image features lifted to the cells are added to the LiDAR's."""

    def __init__(self, cfg: O.Config, pretrained: bool = True):
        super().__init__(cfg, pretrained)
        del self.image_score, self.lidar_score

    def cross_plane(self, L: Tensor, A: Tensor, seen: Tensor) -> Tensor:
        return L + self.image(A)


class Joint(NamedTuple):
    """Outputs of the joint branch: those of the geometric one, and the semantic ones."""

    grid: Tensor
    occupancy: Tensor
    voxels: Voxels
    semantic: O.Semantic


class JointSemantic(O.SemanticBranch):
    """The semantic branch on all sweeps, as the geometric one reads them."""

    sweeps = staticmethod(O.all_sweeps)


class JointBranch(nn.Module):
    """Decoupled (h): one branch that learns both tasks."""

    def __init__(self, cfg: O.Config, pretrained: bool = True):
        super().__init__()
        self.branch = JointSemantic(cfg, pretrained)
        self.head = O.DetailHead(cfg, [O.VOXEL_CHANNELS], 1)
        nn.init.constant_(self.head.last.bias, -O.PRIOR)

    def forward(self, batch: dict) -> Joint:
        out = self.branch(batch)
        features = self.head.features(out.grid, [(out.voxels.features, out.voxels.cell)])
        return Joint(out.grid, self.head(features)[..., 0], out.voxels, out)


class JointBranches(nn.Module):
    """The joint branch in the place of both."""

    def __init__(self, cfg: O.Config, pretrained: bool = True):
        super().__init__()
        self.geometric = JointBranch(cfg, pretrained)  # the teacher is a copy of all of it

    def forward(self, batch: dict) -> dict:
        out = self.geometric(batch)
        return {"semantic": out.semantic, "geometric": out}


class JointOccLE(O.OccLE):
    """A network of one branch, without fusion, as wide as the decoupled one has parameters."""

    def __init__(self, cfg: O.Config, pretrained: bool = True):
        super().__init__(widened(cfg), pretrained, JointBranches)
        self.fusion = None

    def fuse(self, s: Tensor, g: Tensor) -> Tensor:
        return O.conv3d(self.mix, s)


def widened(cfg: O.Config) -> O.Config:
    """Image and UNet widths, grown together by sixteenths, that bring `JointOccLE` closest to OccLE's
    parameters.
    """

    def wide(k: int) -> O.Config:
        even = lambda n: 2 * max(1, round(n * k / 32))  # for the norms
        return replace(cfg, channels=even(cfg.channels), unet_channels=tuple(map(even, cfg.unet_channels)))

    def count(net: nn.Module) -> int:
        return sum(p.numel() for name, p in net.named_parameters() if not name.startswith("fusion."))

    with torch.device("meta"):
        wanted = sum(p.numel() for p in O.OccLE(cfg, pretrained=False).parameters())
        sizes = {k: count(O.OccLE(wide(k), False, JointBranches)) for k in range(16, 49, 2)}
    return wide(min(sizes, key=lambda k: abs(sizes[k] - wanted)))


class NoEncoder(nn.Module):
    """Zeros in the place of image features: inputs (k), LiDAR alone."""

    def __init__(self, channels: int):
        super().__init__()
        self.channels = channels

    def forward(self, images: Tensor) -> Tensor:
        h, w = (-(-n // 4) for n in images.shape[-2:])
        return images.new_zeros(*images.shape[:2], self.channels, h, w)


def seeing(inputs: str, network: Callable, cfg: O.Config, pretrained: bool = True) -> O.OccLE:
    """Inputs (k): a network whose branches, and so their teacher, have no image encoder, or get no points."""

    def hide(_, args: tuple) -> tuple:
        clouds = [name for name in ("points", "history") if name in args[0]]
        return (args[0] | {name: [p[:0] for p in args[0][name]] for name in clouds},)

    net = network(cfg, pretrained)
    for name, channels in (("semantic", cfg.channels), ("geometric", cfg.geo_channels)):
        branch = getattr(net.branches, name)
        if inputs == "image":
            branch.register_forward_pre_hook(hide)
        elif inputs == "LiDAR":
            branch.encoder = NoEncoder(channels)
    return net


class Kept(O.Samples):
    """Samples that keep their unaugmented fields in memory, for all arms of this process."""

    store: ClassVar[dict] = {}

    def fixed(self, i: int, labelled: bool) -> dict[str, Tensor]:
        c, data = self.cfg, self.dataset
        key = (str(data.root), data.split, str(self.folder), self.kind, "images" in vars(data), c.grid_stride,
               c.label_shift, c.ray_short, c.n_sweeps, c.image_size, c.truth, i, labelled)
        if labelled and i not in self.labelled:
            raise RuntimeError(f"ground truth of frame {data.tokens[i]}, which has no label")
        if key not in self.store:
            self.store[key] = super().fixed(i, labelled)
        return dict(self.store[key])


def darken(dataset, cfg: O.Config) -> None:
    """Inputs (k): give every frame black images, without reading a file."""
    size = (LABEL_SETS[cfg.format].cameras, 3, *cfg.image_size)
    dataset.images = lambda i: np.zeros(size, np.float32)


class Part(O.Teacher):
    """Semi (i): the teacher with some of its parts."""

    def __init__(self, branches: nn.Module, momentum: float, teacher: bool = True, hits: bool = True,
                 rays: bool = True, warmup: bool = True, ramp: bool = True, threshold: bool = True):
        super().__init__(branches, momentum)
        self.teacher, self.hidden, self.warmup, self.ramp = teacher, ((1, hits), (0, rays)), warmup, ramp
        self.tau = (0.9, 0.1) if threshold else (0.5, 0.5)

    @torch.no_grad()
    def forward(self, batch: dict, t: int, steps: int) -> tuple[Tensor, Tensor]:
        sensor = batch["sensor"]
        for value, kept in self.hidden:
            sensor = sensor if kept else sensor.masked_fill(sensor == value, O.IGNORE)
        weight = float(self.teacher) * (O.ramp(t, steps) if self.ramp else 1.0)
        return O.semi_targets(sensor, self.branch(O.weak_view(batch)).occupancy.sigmoid(), weight, *self.tau)

    def update(self, branches: nn.Module, t: int) -> None:
        super().update(branches, t if self.warmup else 10**9)


def without(*names: str):
    """A step whose loss lacks these terms."""

    def step(*args) -> dict[str, Tensor]:
        return {name: term for name, term in O.one_step(*args).items() if name not in names}

    return step


ALONE = {"teacher": False, "hits": False, "rays": False}
FIRST = {  # variant -> the parts of occle.train that differ, from the first stage on
    "occle": {},
    "supervised": {"step": without("2d", "3d")},
    "addition": {"network": partial(O.OccLE, branches=partial(O.Branches, geometric=Addition))},
    "primary": {"samples": partial(Kept, kind="primary")},
    "joint": {"network": JointOccLE},
    "no semi": {"step": without("semi")},
    **{f"{part} alone": {"teacher": partial(Part, **ALONE | {part: True})} for part in ALONE},
    "no warm-up": {"teacher": partial(Part, warmup=False)},
    "no ramp": {"teacher": partial(Part, ramp=False)},
    "no thresholds": {"teacher": partial(Part, threshold=False)},
    "no strong augmentation": {"samples": partial(Kept, strong=False)},
    "2D only": {"step": without("3d")},
    "3D only": {"step": without("2d")},
}
SECOND = {  # the same of the second stage alone: these share OccLE's first stage
    "concatenation": {"network": Concatenation},
    "accumulation": {"step": partial(O.one_step, mode="plain")},
    "no projection": {"step": without("proj")},
}

# --- arms ---------------------------------------------------------------------------------------------------


def labels_of(dataset, cfg: O.Config, args: SimpleNamespace, **options) -> Path:
    """The folder of aligned labels in args.pool, made if it is not there."""
    record = label_record(O.LABELS, dataset, "world", options, cfg)
    folder = args.pool / f"labels-{short_hash([record, str(dataset.root), dataset.split])}"
    make_labels(O.LABELS, dataset, "world", options, cfg, folder, workers=args.workers)
    return folder


def constants_of(dataset, test, indices: list[int]) -> dict[str, float]:
    """The constant predictor's scores."""
    if isinstance(test, SemanticKITTI):
        return constant_ssc(dataset, ground_truth(dataset), test, indices, ground_truth(test))
    return constant_scores(dataset, test, indices, ground_truth(test))


def references(test, indices: list[int], cfg: O.Config, args: SimpleNamespace) -> dict[str, float]:
    """mIoU of the pseudo labels, lifted to the voxels that the sweep hits, over these voxels alone."""
    ssc, labels, rows = isinstance(test, SemanticKITTI), LABEL_SETS[cfg.format], {}
    grid, truth = labels.moved(cfg.label_shift), ground_truth(test)
    for level in ("mild", "exact"):
        folder = labels_of(test, cfg, args, primary_level=level, auxiliary_level=level)
        for kind, word in (("semantic", "aligned"), ("primary", "primary")):
            data, meter = O.Samples(test, folder, [], cfg, kind), SscMeter() if ssc else OccupancyMeter()
            for i in indices:
                item, ids = O.inputs(test[i]), np.full(math.prod(grid.shape), labels.solid, np.uint8)
                camera = item["K"], item["T_ego_cam"], tuple(item["images"].shape[-2:])
                cell, name = O.lift_labels(item["points"], data.pseudo_label(i), *camera, grid, labels.solid)
                ids[cell] = name
                there, (gt, mask, *_) = (ids < labels.solid).reshape(grid.shape), truth(i)
                masks = (mask | ~there,) if ssc else (mask & there, mask & there)
                meter.add(labels.outer(ids).reshape(grid.shape), gt, *masks)
            rows[f"{word}_{level}_at_hits"] = meter.metrics()["miou" if ssc else "miou_camera"]
    return rows


def fit(saved: nn.Module, dataset, labelled: list[int], count: int = 12) -> dict[str, float]:
    """mIoU on labelled and on unlabelled training frames: does the network fit its labels?"""
    rest, scores = sorted(set(range(len(dataset))) - set(labelled)), {}
    for name, some in (("labelled", labelled), ("unlabelled", rest)):
        some = [some[k] for k in spread(len(some), count)]
        metrics = evaluate(partial(O.predict, saved), dataset, some, ground_truth(dataset)).metrics()
        scores |= {f"{name}_{score}": metrics[score] for score in ("miou", "miou_camera") if score in metrics}
    return scores


def refuse_equals(name: str, cfg: O.Config, dataset, seed: int) -> None:
    """InputError if two ratios of a claim see equally many distinct labelled frames: one experiment, not two.
    """
    claim = next(c for key, c in CLAIMS.items() if name == key or c.sentence.startswith(f"({name})"))
    for pair in claim.pairs:
        ratio = lambda arm: {"label_ratio": 0.1, "label_by": "frames"} | claim.arms[arm]
        given = [(ratio(arm)["label_ratio"], ratio(arm)["label_by"]) for arm in pair[:2]]
        chosen = [O.choose_labelled(dataset.scene_names, *how, seed) for how in given]
        seen = [min(len(one), cfg.steps * cfg.batch) for one in chosen]
        if given[0] != given[1] and (seen[0] == seen[1] and given[0][1] == given[1][1]):
            raise InputError(f"{pair[0]} and {pair[1]}: both see {seen[0]} distinct labelled frames of "
                             f"{len(dataset)} in {cfg.steps} steps; more --steps, or another world")


def run_arm(cfg: O.Config, args: SimpleNamespace) -> Path:
    """Train and evaluate one arm."""
    cfg, stages = O.for_format(cfg, args), FIRST | SECOND

    def open_data(*split, **train):
        dataset = O.open_frames(cfg, *split, **train)
        if args.inputs == "LiDAR":
            darken(dataset, cfg)
        return dataset

    dataset = open_data(args.data_root, args.version, None, cfg.image_size, args.cache)
    if args.label_list is None:
        refuse_equals(args.claim, cfg, dataset, args.seed)
    labels, parts = labels_of(dataset, cfg, args), {"samples": Kept} | stages[args.variant]
    if args.inputs != "both":
        parts["network"] = partial(seeing, args.inputs, parts.get("network", O.OccLE))
    first = "occle" if args.variant in SECOND else args.variant
    key = short_hash([cli.to_dict(cfg), first, args.inputs, str(dataset.root), args.version])
    O.train(cfg, dataset, labels, args, **parts, branches=args.pool / f"branches-{key}" / f"seed{args.seed}")
    args.run = read_json(args.out / "2-fusion" / "config.json")
    cfg = cli.from_dict(O.Config, args.run["config"], args.out)
    shapes = {name: parts[name] for name in ("network", "teacher") if name in parts}
    saved, out, state = verbs.load(partial(O.saved_modules, **shapes), cfg, args)
    state["step"] += args.run["data"]["after"]
    test = verbs.open_eval(cfg, args, lambda *split, **train: open_data(*split, **train))
    indices = spread(len(test), args.eval_frames)
    named = short_hash([str(test.root), test.version, indices])
    known = once(args.pool / f"constants-{named}.json", lambda: constants_of(dataset, test, indices))
    if is_world(test.root):
        known |= once(args.pool / f"references-{named}.json", lambda: references(test, indices, cfg, args))
    known |= fit(saved, dataset, O.split_frames(dataset, cfg, args.seed, args.label_list)[0])
    metrics = report(partial(O.predict, saved), dataset=test, train_set=None, out=out, run=args.run,
                     state=state, params=sum(p.numel() for p in saved.parameters() if p.requires_grad),
                     frames=args.eval_frames, rayiou=False, known=known,
                     protocol=verbs.training_protocol(args.run) | {"inputs": args.inputs})
    shown = {name: value for name, value in metrics.items() if name in known and not name.startswith("iou")}
    print("  ".join(f"{name} {100 * value:.2f}" for name, value in shown.items()), flush=True)
    return out


# --- what unlabelled frames teach, and where cells are seen -------------------------------------------------


def targets(cfg: O.Config, args: SimpleNamespace) -> None:
    """targets.json: what frames without labels teach, in percent of the cells, and gradient norms.

    For each --ray-short: occupied cells taught as occupied (hits) and as free, empty cells taught as free.
    --of: also the occupied cells without hit or ray that this run's teacher takes for occupied and for free.
    Gradient norms are of each loss at the geometric branch, with all weights 1.
    """
    cfg = replace(O.for_format(cfg, args), geo_weight=1.0)
    dataset = O.open_frames(cfg, args.data_root, args.version, None, cfg.image_size, args.cache)
    indices = spread(len(dataset), args.eval_frames)
    if cfg.format == "semantickitti":
        cfg = replace(cfg, label_shift=dataset.measure_label_shift(indices[0]))
    net = O.OccLE(cfg, pretrained=False)
    saved = nn.ModuleDict({"net": net, "teacher": O.Teacher(net.branches, cfg.ema)})
    if args.of is not None:
        load_checkpoint(args.of / "2-fusion", saved)
    labels, rows = labels_of(dataset, cfg, args), []
    for short in (0.0, 1.0, 2.0, 4.0, 8.0):
        data = O.Samples(dataset, labels, indices, replace(cfg, ray_short=short))
        counts = np.zeros(7)
        for i in indices:
            item, truth = data((i, False), np.random.default_rng(i)), data.truth(i)
            sensor, full, empty = item["sensor"], truth < data.labels.solid, truth == data.labels.solid
            free = sensor == 0
            counts[:5] += [x.sum() for x in (full, (sensor == 1) & full, free & full, free & empty, empty)]
            if args.of is not None and short == cfg.ray_short:
                batch = O.stack_items([item], "cpu")
                target, weight = saved["teacher"](batch, 1, 1)
                own = (weight[0] > 0) & (sensor == O.IGNORE) & full
                counts[5:] += [(own & (target[0] == 1)).sum(), (own & (target[0] == 0)).sum()]
        full, hit, wrong, free, empty, right, no = counts
        rows.append({"ray_short": short, "occupied_taught_occupied": 100 * hit / full,
                     "occupied_taught_free": 100 * wrong / full, "empty_taught_free": 100 * free / empty}
                    | ({"teacher_right": 100 * right / full, "teacher_wrong": 100 * no / full}
                       if right + no else {}))
        print("  ".join(f"{name} {value:.1f}" for name, value in rows[-1].items()), flush=True)
    rng, data = np.random.default_rng(0), O.Samples(dataset, labels, indices, cfg)
    batch = O.stack_items([data((indices[0], True), rng), data((indices[-1], False), rng)], "cpu", 1)
    S, norms = data.labels.solid, {}
    weights = O.Weights(torch.ones(S), torch.ones(S + 1))
    learnt = [p for p in net.branches.geometric.parameters() if p.requires_grad]
    terms = O.one_step(net, saved["teacher"], batch, 1, 1, weights, cfg, nullcontext)
    for name, term in terms.items():
        grads = torch.autograd.grad(term, learnt, retain_graph=True, allow_unused=True)
        norms[name] = math.sqrt(sum(float(g.square().sum()) for g in grads if g is not None))
    print("gradient norm at the geometric branch: " + "  ".join(f"{k} {v:.3f}" for k, v in norms.items()))
    write_json(args.out / "targets.json", {"frames": len(indices), "rows": rows, "gradients": norms})


def probe(cfg: O.Config, args: SimpleNamespace) -> None:
    """probe.json: perfect occupancy through (15), (16) at each preset, in percent.

    hit: pixels with a projected cell, of those whose ray meets an occupied cell. hidden: frontmost projected
    cells that are not the first on any of 4 x 4 rays a pixel. class: those of the class that the ray meets.
    """
    rows, frames = [], args.eval_frames if "eval_frames" in args.given else 2
    for name, preset in O.PRESETS.items():
        own = SimpleNamespace(**vars(args) | {"preset": name})
        preset = O.for_format(replace(preset, format=cfg.format, n_sweeps=0), own)
        dataset = O.open_frames(preset, args.data_root, args.version, None, preset.image_size)
        dataset.parts = ()
        counts = np.sum([probe_frame(dataset, i, preset) for i in spread(len(dataset), frames)], 0)
        hit, there, hidden, right = counts.tolist()
        shares = {"hit": 100 * hit / there, "hidden": 100 * hidden / hit, "class": 100 * right / hit}
        rows.append({"preset": name} | shares)
        print(f"{name}: " + "  ".join(f"{k} {v:.1f}" for k, v in shares.items()), flush=True)
    write_json(args.out / "probe.json", {"frames": frames, "rows": rows})


def probe_frame(dataset, i: int, cfg: O.Config) -> tuple[int, ...]:
    """-> pixels hit of those whose ray meets a cell, all of these, hidden frontmost cells, right classes."""
    labels, cells, frame, stride = LABEL_SETS[cfg.format], O.grids(cfg)[0], dataset[i], cfg.scatter_stride
    truth = coarsen(torch.from_numpy(voxel_truth(dataset, i, labels)), cfg.grid_stride, labels.solid).long()
    size, full = tuple(n // stride for n in cfg.image_size), truth < labels.solid
    K, T = scale_to(frame.K, cfg.image_size, size).double(), frame.T_ego_cam.double()
    share = (torch.arange(full.numel()).double().view(full.shape) + 0.5) / full.numel()  # a cell's number
    logits = torch.stack([share.log(), (1 - share).log(), torch.where(full, -40.0, 40.0)], -1)
    shown, light = O.project_logits(logits, K, T, size, cells, "depth")
    share = shown[:, 0] * (1 + 1e-6 / light.clamp_min(1e-6))  # without the quotient's epsilon
    front = (share * full.numel()).long().flatten(1)  # (N, h w)
    y, x = torch.meshgrid(*(torch.arange(n) for n in size), indexing="ij")
    at, seen, total = torch.stack([x, y], -1).flatten(0, 1), torch.zeros_like(full).flatten(), []
    for n in range(len(K)):
        met = None
        for dx, dy in [(0.5, 0.5), *((a / 8, b / 8) for a in (1, 3, 5, 7) for b in (1, 3, 5, 7))]:
            uv = at + torch.tensor([dx, dy], dtype=torch.float64)
            ray = unproject(uv, torch.ones(len(uv)), K[n], T[n]) - T[n, :3, 3]
            index, _, found = cast_rays(full, T[n, :3, 3], ray, cells)
            flat = index @ torch.tensor([full.shape[1] * full.shape[2], full.shape[2], 1])
            first = torch.where(found, flat, -1)
            met = first if met is None else met
            seen[first[found]] = True
        total.append(met)
    met = torch.stack(total)
    hit = (light.flatten(1) > 0.5) & (met >= 0)
    same = truth.flatten()[front[hit]] == truth.flatten()[met[hit]]
    return int(hit.sum()), int((met >= 0).sum()), int((~seen[front[hit]]).sum()), int(same.sum())


# --- cost of Dual Mamba -------------------------------------------------------------------------------------


def cost(cfg: O.Config, args: SimpleNamespace, repeat: int = 3) -> None:
    """Forward, and forward and backward, of Dual Mamba on 1k .. --tokens tokens a grid: cost.json and
    cost.png.

    slope: of log time against log tokens from 16k on; 1 is linear. ns_per_token: at the largest number.
    """
    where, rows, tokens, passes = torch.device(args.device), [], 1024, ("forward", "training step")
    while tokens <= args.tokens:
        side = round((tokens / 16) ** 0.5)
        shape = (side, tokens // 16 // side, 16)
        block = O.DualMamba(cfg.grid_channels, shape, (1, 1, 1), cfg.d_state, cfg.expand).to(where)
        s, g = (torch.randn(1, *shape, cfg.grid_channels, device=where) for _ in range(2))
        rows.append({"tokens": math.prod(shape)} | {name: min(timed(block, s, g, name != "forward")
                    for _ in range(repeat + 1)) for name in passes})
        shown = ", ".join(f"{name} {1000 * rows[-1][name]:9.1f} ms" for name in passes)
        print(f"{rows[-1]['tokens']:8d} tokens a grid: {shown}", flush=True)
        tokens *= 4
    large = [row for row in rows if row["tokens"] >= 16384] or rows
    logs = {name: np.log([row[name] for row in large]) for name in ("tokens", *passes)}
    device = f"cpu, {torch.get_num_threads()} threads"
    value = {"device": torch.cuda.get_device_name(where) if where.type == "cuda" else device,
             "channels": cfg.grid_channels, "d_state": cfg.d_state, "expand": cfg.expand, "rows": rows,
             "slope": {name: float(np.polyfit(logs["tokens"], logs[name], 1)[0]) for name in passes}
             if len(large) > 1 else None,
             "ns_per_token": {name: 1e9 * rows[-1][name] / rows[-1]["tokens"] for name in passes}}
    write_json(args.out / "cost.json", value)
    plot_cost(args.out / "cost.png", value)


def timed(block: nn.Module, s: Tensor, g: Tensor, backward: bool) -> float:
    """Seconds of one pass."""
    begun = time.perf_counter()
    with torch.set_grad_enabled(backward):
        out = block(s, g)
        if backward:
            sum(x.sum() for x in out).backward()
    if s.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - begun


def plot_cost(path: Path, value: dict) -> None:
    """Time against tokens, both logarithmic, with the line of slope 1 through the last point."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axis = plt.subplots(figsize=(6, 4))
    tokens = np.array([row["tokens"] for row in value["rows"]])
    for name, colour in (("forward", "tab:blue"), ("training step", "tab:orange")):
        ms = 1000 * np.array([row[name] for row in value["rows"]])
        axis.loglog(tokens, ms, "o-", color=colour, label=name)
        axis.loglog(tokens, ms[-1] * tokens / tokens[-1], "--", color=colour, alpha=0.5, linewidth=1)
    title = f"Dual Mamba, {value['channels']} channels, {value['d_state']} states; {value['device']}"
    axis.set(xlabel="tokens a grid", ylabel="ms (dashed: linear)", title=title)
    axis.legend()
    axis.grid(True, which="both", alpha=0.2)
    with atomic(path) as temporary:
        figure.savefig(temporary, dpi=130, bbox_inches="tight", format="png", metadata={"Software": None})
    plt.close(figure)


FLAGS = {
    "variant": cli.Flag("the rival or the missing part", Literal[tuple(FIRST | SECOND)], "occle"),
    "inputs": cli.Flag("what the network reads", Literal["both", "image", "LiDAR"], "both"),
    "of": cli.Flag("targets: a trained run, for its teacher; default: none", Path | None),
    "eval-frames": verbs.FLAGS["eval-frames"]._replace(default=60),
    "label-list": cli.Flag("JSON {'labelled': [token, ...]}; default: by --label-by", Path | None),
    "tokens": cli.Flag("cost: largest number of tokens a grid", int, 262144, least=1024),
    "workers": verbs.FLAGS["workers"],
    "world-size": verbs.FLAGS["world-size"]._replace(default="claims"),
}


def on_kitti(claim: Claim) -> Claim:
    """The claim by SemanticKITTI's scores, in its preset's own cells: LIGHT's divide Occ3D's grid alone."""
    cells = ("grid_stride", "cell_split", "mamba_stride")
    arms = {name: {k: v for k, v in arm.items() if k not in cells} for name, arm in claim.arms.items()}
    named = {"miou_camera": "miou", "iou_camera": "iou"}
    pairs = tuple(tuple(named.get(word, word) for word in pair) for pair in claim.pairs)
    return replace(claim, arms=arms, metric="miou", pairs=pairs)


if __name__ == "__main__":
    kitti = "semantickitti" in sys.argv
    claims = {name: on_kitti(claim) for name, claim in CLAIMS.items()} if kitti else CLAIMS
    main(__doc__, O.Config, O.PRESETS, claims, run_arm, shared=SHARED, flags=FLAGS,
         other={"cost": cost, "targets": targets, "projection-probe": probe},
         world=lambda args: make("kitti" if kitti else "driving", size=args.world_size))
