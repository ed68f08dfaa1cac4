"""OccLE's claims re-tested: its semi-supervision, branches, fusion, projection and pseudo labels, part by
part.

    python occle.py ablate --claim fusion --seeds 3     # or: python -m experiments.occle --claim c
    python occle.py ablate --claim fusion --format semantickitti
    python occle.py ablate --claim cost                 # time of Dual Mamba against the number of tokens

What an arm changes beside Config fields is its `variant`: a rival or a missing part, handed to `occle.train`.
Arms share labels, and those whose first stage is the same share it too, in <out>/../arms.
"""

import math
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

import occle as O
from common import cli, verbs
from common.backbones import conv_norm_relu
from common.files import atomic, read_json, short_hash, write_json
from common.labels import label_record, make_labels
from common.networks.voxelnet import Voxels
from common.report.occupancy import constant_scores, constant_ssc, ground_truth, report, spread
from common.semantickitti import SemanticKITTI
from common.worlds import make
from experiments.runner import Claim, main, once, start_claim

SHARED = {"steps": 160, "warmup": 10}  # config fields of every arm
# One stage: without pseudo labels a first one would leave the semantic branch untaught.
SUPERVISED = {"variant": "supervised", "batch_unlabelled": 0, "branch_share": 0.0}
BY = {"frames": (0.01, 0.05, 0.1, 0.2, 1.0), "scenes": (0.01, 0.05, 0.1, 0.2)}  # all scenes are all frames
CLAIMS = {
    "labels": Claim(
        "labels", "(a) with the same few voxel labels, pseudo labels and unlabelled frames beat supervision "
                  "alone: 10 %, and 1 %",
        {f"{how} {100 * r:g} %": arm | ({"label_ratio": r} if r != 0.1 else {}) for r in (0.1, 0.01)
         for how, arm in (("OccLE", {}), ("supervised", SUPERVISED))},
        (("OccLE 10 %", "supervised 10 %"), ("OccLE 1 %", "supervised 1 %")),
        note="Same optimiser steps, same labelled exposures in the same order; OccLE also sees a frame "
             "without labels a step. The supervised arm has one stage. 1 % of the world are seven frames."),
    "share": Claim(
        "share", "(b) 100 % of the labels is better than 10 %, but 10 % reaches a large share of it",
        {"OccLE 10 %": {}, "OccLE 100 %": {"label_ratio": 1.0}}, (("OccLE 100 %", "OccLE 10 %"),),
        note="At 100 % the second frame of a step is a labelled one without its label: exposures agree."),
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
        {"aligned": {}, "primary": {"variant": "primary"}}, (("aligned", "primary"),), seeds=1),
    "ratios": Claim(
        "ratios", "(g) more labels are better, and spread over frames they beat as many in few scenes",
        {f"{100 * r:g} % by {by}": {"label_ratio": r, "label_by": by}
         for by, many in BY.items() for r in many},
        tuple((f"{100 * b:g} % by {by}", f"{100 * a:g} % by {by}") for by, many in BY.items()
              for a, b in zip(many, many[1:])) + (("10 % by frames", "10 % by scenes"),), seeds=1),
    "decoupled": Claim(
        "decoupled", "(h) two decoupled branches beat one joint branch of as many parameters",
        {"decoupled": {}, "joint": {"variant": "joint"}}, (("decoupled", "joint"),), seeds=1),
    "semi": Claim(
        "semi", "(i) semi-supervised geometry beats supervised geometry with the same few labels; each part "
                "alone",
        {"all": {}, "none": {"variant": "no semi"}} | {name: {"variant": name} for name in (
            "teacher alone", "hits alone", "rays alone", "no warm-up", "no ramp", "no strong augmentation",
            "no thresholds")},
        (("all", "none"), ("all", "none", "iou_camera"), ("teacher alone", "none"), ("hits alone", "none"),
         ("rays alone", "none"), ("all", "no warm-up"), ("all", "no ramp"), ("all", "no strong augmentation"),
         ("all", "no thresholds")), seeds=1),
    "distill": Claim(
        "distill", "(j) distilling pseudo labels into the 2D and the 3D network beats either alone",
        {"both": {}, "2D only": {"variant": "2D only"}, "3D only": {"variant": "3D only"}},
        (("both", "2D only"), ("both", "3D only")), seeds=1),
    "inputs": Claim(
        "inputs", "(k) image and LiDAR together beat each alone",
        {"both": {}, "image": {"variant": "image"}, "LiDAR": {"variant": "LiDAR"}},
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
        return Joint(out.grid, self.head.last(features)[..., 0].float(), out.voxels, out)


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
        even = lambda n: 2 * max(1, round(n * k / 32))  # noqa: E731  for the norms
        return replace(cfg, channels=even(cfg.channels), unet_channels=tuple(map(even, cfg.unet_channels)))

    def count(net: nn.Module) -> int:
        return sum(p.numel() for name, p in net.named_parameters() if not name.startswith("fusion."))

    with torch.device("meta"):
        wanted = sum(p.numel() for p in O.OccLE(cfg, pretrained=False).parameters())
        sizes = {k: count(O.OccLE(wide(k), False, JointBranches)) for k in range(16, 49, 2)}
    return wide(min(sizes, key=lambda k: abs(sizes[k] - wanted)))


def hiding(images: bool, cfg: O.Config, pretrained: bool = True) -> O.OccLE:
    """Inputs (k): OccLE whose branches, and so their teacher, get black images, or no points."""

    def hide(_, args: tuple) -> tuple:
        batch = args[0]
        if images:
            return (batch | {"images": batch["images"] * 0},)
        clouds = [name for name in ("points", "history") if name in batch]
        return (batch | {name: [p[:0] for p in batch[name]] for name in clouds},)

    net = O.OccLE(cfg, pretrained)
    for branch in (net.branches.semantic, net.branches.geometric):
        branch.register_forward_pre_hook(hide)
    return net


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
        for told, kept in self.hidden:
            sensor = sensor if kept else sensor.masked_fill(sensor == told, O.IGNORE)
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
    "primary": {"samples": partial(O.Samples, kind="primary")},
    "joint": {"network": JointOccLE},
    "no semi": {"step": without("semi")},
    **{f"{part} alone": {"teacher": partial(Part, **ALONE | {part: True})} for part in ALONE},
    "no warm-up": {"teacher": partial(Part, warmup=False)},
    "no ramp": {"teacher": partial(Part, ramp=False)},
    "no thresholds": {"teacher": partial(Part, threshold=False)},
    "no strong augmentation": {"samples": partial(O.Samples, strong=False)},
    "2D only": {"step": without("3d")},
    "3D only": {"step": without("2d")},
    "image": {"network": partial(hiding, False)},
    "LiDAR": {"network": partial(hiding, True)},
}
SECOND = {  # the same of the second stage alone: these share OccLE's first stage
    "concatenation": {"network": Concatenation},
    "accumulation": {"step": partial(O.one_step, mode="plain")},
    "no projection": {"step": without("proj")},
}

# --- arms ---------------------------------------------------------------------------------------------------


def labels_of(dataset, cfg: O.Config, args: SimpleNamespace) -> Path:
    """The folder of aligned labels in args.pool, made if it is not there."""
    record = label_record(O.LABELS, dataset, "world", {}, cfg)
    folder = args.pool / f"labels-{short_hash([record, str(dataset.root), dataset.split])}"
    make_labels(O.LABELS, dataset, "world", {}, cfg, folder, workers=args.workers)
    return folder


def constants_of(dataset, test, indices: list[int]) -> dict[str, float]:
    """The constant predictor's scores."""
    if isinstance(test, SemanticKITTI):
        return constant_ssc(dataset, ground_truth(dataset), test, indices, ground_truth(test))
    return constant_scores(dataset, test, indices, ground_truth(test))


def run_arm(cfg: O.Config, args: SimpleNamespace) -> Path:
    """Train and evaluate one arm."""
    cfg, open_data, stages = O.for_format(cfg, args), partial(O.open_frames, cfg), FIRST | SECOND
    dataset = open_data(args.data_root, args.version, None, cfg.image_size, args.cache)
    labels, parts = labels_of(dataset, cfg, args), stages[args.variant]
    first = "occle" if args.variant in SECOND else args.variant
    key = short_hash([cli.to_dict(cfg), first, str(dataset.root), args.version])
    O.train(cfg, dataset, labels, args, **parts, branches=args.pool / f"branches-{key}" / f"seed{args.seed}")
    args.run = read_json(args.out / "2-fusion" / "config.json")
    cfg = cli.from_dict(O.Config, args.run["config"], args.out)
    shapes = {name: parts[name] for name in ("network", "teacher") if name in parts}
    saved, out, state = verbs.load(partial(O.saved_modules, **shapes), cfg, args)
    state["step"] += args.run["data"]["after"]
    test = verbs.open_eval(cfg, args, partial(O.open_frames, cfg))
    indices = spread(len(test), args.eval_frames)
    named = short_hash([str(test.root), test.version, indices])
    known = once(args.pool / f"constants-{named}.json", lambda: constants_of(dataset, test, indices))
    report(partial(O.predict, saved), dataset=test, train_set=None, out=out, run=args.run, state=state,
           params=sum(p.numel() for p in saved.parameters() if p.requires_grad), frames=args.eval_frames,
           rayiou=False, protocol=verbs.training_protocol(args.run), known=known)
    return out


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
    "eval-frames": verbs.FLAGS["eval-frames"]._replace(default=60),
    "label-list": cli.Flag("JSON {'labelled': [token, ...]}; default: by --label-by", Path | None),
    "tokens": cli.Flag("cost: largest number of tokens a grid", int, 262144, least=1024),
    "workers": verbs.FLAGS["workers"],
    "world-size": verbs.FLAGS["world-size"]._replace(default="claims"),
}


def on_kitti(claim: Claim) -> Claim:
    """The claim by SemanticKITTI's scores."""
    named = {"miou_camera": "miou", "iou_camera": "iou"}
    pairs = tuple(tuple(named.get(word, word) for word in pair) for pair in claim.pairs)
    return replace(claim, metric="miou", pairs=pairs)


if __name__ == "__main__":
    kitti = "semantickitti" in sys.argv
    claims = {name: on_kitti(claim) for name, claim in CLAIMS.items()} if kitti else CLAIMS
    main(__doc__, O.Config, O.PRESETS, claims, run_arm, shared=SHARED, flags=FLAGS, other={"cost": cost},
         world=lambda args: make("kitti" if kitti else "driving", size=args.world_size))
