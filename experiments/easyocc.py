"""EasyOcc's claims: arms, the rendering host OccNeRF and its controls, and the quality of the labels.

    python -m experiments.easyocc --claim time --seeds 3     # or: python easyocc.py ablate --claim time ...
    python -m experiments.easyocc --claim label-quality      # labels against ground truth and exact solids
    python -m experiments.runner publish runs/ablate/easyocc/time easyocc-time && make table

OccNeRF (networks/occnerf.py) learns from rendered 2D losses, here with EasyOcc's own network on cells that
reach to infinity. `occnerf+labels` adds the pseudo-loss: equation (5). `rendered` is the control of claim
loss-space: the label's own 2D maps, metric depth included, as rendered losses on the box's cells.
"""

from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

import easyocc as E
from common import cli, verbs
from common.engine import stack
from common.files import read_json, read_npz, short_hash
from common.geometry import OCC3D, VoxelGrid, invert, scale_to
from common.labelers import Maps, make_labeler
from common.labels import IGNORE, class_weights, label_record, labels_note, make_labels, read_label
from common.metrics import OccupancyMeter
from common.networks import occnerf as N
from common.nuscenes import FREE, NuScenesOccupancy, open_split
from common.report.occupancy import constant_scores, describe_dataset, ground_truth, report, spread
from common.worlds import make
from experiments.runner import Claim, Gate, main, once, start_claim, write_quality

# All arms get the steps that a rendering host needs. OccNeRF never sees metric depth, so no arm's encoder has:
# `street` knows classes, objects and words. The class wins that has most probability, as in the paper.
SHARED = {"steps": 600, "map_stride": (4, 4), "backbone": "street+frozen", "margin": 0.0}
RAYS, SAMPLES = (20, 36), 96  # rays a camera, samples a ray: CPU
# OccNeRF's configs/nusc-sem.txt has photo 1, sem .05, ent and dist .01. There the classes, which fit at any
# depth, place the surfaces before the images can: one frame, overfitted, ends at a tenth or six times its
# depth.
WEIGHTS = {"photo": 3.0, "smooth": 0.001, "sem": 0.02, "ent": 0.001, "dist": 0.001}
KNOWN_DEPTH = {"depth": 1.0, "sem": 0.1, "ent": 0.01, "dist": 0.05}  # of `rendered`, ours
SCALES = (1, 2, 4, 8)  # of the images that (10) compares: far from the depth only coarse ones have a slope
START = 6.0  # first free logit: most light passes, so that surfaces come from far to where they are
LEARNS = Gate("the host learns", "occnerf:miou_camera", ">", "constant_miou_camera")
READS = Gate("arms read their own images", "miou_camera", ">", "shuffled_miou_camera")

EASY, HOST, BOTH, RENDERED = ({"network": n} for n in ("easyocc", "occnerf", "occnerf+labels", "rendered"))
CLAIMS = {
    "transfer": Claim(
        "transfer", "(a) pseudo-labels improve the rendering host: OccNeRF < OccNeRF + labels",
        {"occnerf": HOST, "occnerf+labels": BOTH},
        (("occnerf+labels", "occnerf"), ("occnerf+labels", "occnerf", "rayiou")), gates=(LEARNS, READS),
        note="OccNeRF never sees metric depth, so this mixes new information with a new loss space; claim "
             "loss-space separates them. In three of ten training scenes the car stands: no parallax there."),
    "streamlined": Claim(
        "streamlined", "(b) EasyOcc, without rendering, reaches the better host: score, step time, memory "
                       "(paper: 13.86 against 14.09)",
        {"easyocc": EASY, "occnerf+labels": BOTH, "occnerf": HOST},
        (("occnerf+labels", "easyocc"), ("easyocc", "occnerf")), gates=(LEARNS, READS),
        note="Step times are each run's own, on whatever else the machine did."),
    "time": Claim(
        "time", "(c) 13 past keyframes beat the current frame alone, with label errors that persist and with "
                "independent ones",
        {f"past{n} corr{c}": {"past_frames": n, "correlation": c} for c in (0.8, 0.0) for n in (13, 0)},
        (("past13 corr0.8", "past0 corr0.8"), ("past13 corr0.0", "past0 corr0.0")), gates=(READS,)),
    "unmasked": Claim(
        "unmasked", "(d) without a mask EasyOcc beats OccNeRF, whether un-hit voxels count as free or only "
                    "carved ones do",
        {"easyocc unhit": EASY | {"free_unseen": (1.0, 1.0)},
         "easyocc carved": EASY | {"free_unseen": (0.0, 0.0)}, "occnerf": HOST},
        (("easyocc unhit", "occnerf"), ("easyocc carved", "occnerf")), metric="miou_none",
        gates=(LEARNS, READS,
               Gate("EasyOcc learns the whole grid", "easyocc unhit:miou_none", ">", "constant_miou_none")),
        note="No ray of OccNeRF's ends behind a surface: what it says there is nobody's. So it must be above "
             "the constant where it was taught, in the camera mask."),
    "loss-space": Claim(
        "loss-space", "(e) the same 2D maps with metric depth teach more as 3D labels than as rendered 2D "
                      "losses, same network",
        {"3D labels": EASY, "rendered 2D": RENDERED}, (("3D labels", "rendered 2D"),),
        gates=(LEARNS._replace(metric="rendered 2D:miou_camera"), READS),
        note="Both arms see the same maps of the same 14 keyframes; the rendered arm draws one a step."),
    "movers": Claim(
        "movers", "(g) past points of classes that can move are better dropped than kept",
        {"dropped": EASY, "kept": EASY | {"dynamic_ids": ()}},
        (("dropped", "kept"), ("dropped", "kept", "rayiou")), gates=(READS,),
        note="In the claims world 73 % of the LiDAR points on what can move lie on what stands, as parked "
             "cars and all trailers do. So labels that keep it gain more recall than they lose precision: claim "
             "label-quality has the opposite sign of the paper."),
    "lovasz": Claim(
        "lovasz", "(h) cross-entropy and Lovasz beat cross-entropy alone",
        {"both": EASY, "cross-entropy": EASY | {"l_lov": 0.0}},
        (("both", "cross-entropy"), ("both", "cross-entropy", "iou_camera")), gates=(READS,)),
    "labeler": Claim(
        "labeler", "(f) better 2D maps make better occupancy, depth and semantics apart",
        {f"depth {d}, semantics {s}": {"depth_level": d, "semantic_level": s}
         for d, s in (("exact", "exact"), ("exact", "mild"), ("mild", "exact"), ("mild", "mild"),
                      ("heavy", "mild"), ("mild", "heavy"))},
        (("depth exact, semantics mild", "depth heavy, semantics mild"),
         ("depth mild, semantics exact", "depth mild, semantics heavy"),
         ("depth exact, semantics exact", "depth mild, semantics mild")), gates=(READS,)),
    "start": start_claim(),
}  # fmt: skip

# --- the host -----------------------------------------------------------------------------------------------


class Host(E.OccupancyNet):
    """EasyOcc's network on OccNeRF's contracted cells (6). ratio: the real box's share of an axis; 1: not
    contracted.

    In training it returns the logits of its own cells, which are rendered; in evaluation those of `grid`.
    Class logits are normalised, so free's logit alone is the density (7). A ray spends its light over several
    samples: no voxel need stop half of it, and where one counts as occupied is measured, see `calibrate`.
    """

    def __init__(self, cfg: E.Config, classes: int = 18, pretrained: bool = True, *, ratio: float):
        self.ratio = ratio
        super().__init__(cfg, classes, pretrained)
        self.apart, self.margin = True, 0.0
        with torch.no_grad():  # rays that end at their first samples teach nothing
            self.classify.bias[FREE] = START

    def lifted_cells(self, cfg: E.Config) -> tuple[tuple[int, int, int], Tensor, Tensor]:
        if self.ratio == 1:
            return super().lifted_cells(cfg)
        axes, size = [], zip(self.grid.shape, cfg.lift_stride, strict=True)
        shape = tuple(round(n / self.ratio / stride) for n, stride in size)
        for n, edge in zip(shape, (0.5, 0.5, 0.05), strict=True):  # OccNeRF clamps border cells off infinity
            axes.append((2 * torch.arange(n, dtype=torch.float32).clamp(edge, n - 1 - edge) + 1) / n - 1)
        unit = torch.stack(torch.meshgrid(*axes, indexing="ij"), -1).view(-1, 3)
        return shape, N.uncontract(unit, self.grid, self.ratio), unit

    def forward(self, batch: dict) -> Tensor:
        logits = super().forward(batch)
        logits = torch.cat([logits[:, :FREE].log_softmax(1), logits[:, FREE:]], 1)
        return logits if self.training else on_grid(logits, self.grid, self.ratio)


@torch.no_grad()
def calibrate(net: Host, dataset: NuScenesOccupancy, frames: int = 10) -> float:
    """-> the margin [log odds] at which the host's mIoU peaks on training keyframes, camera mask. Ours."""
    meters = {margin: OccupancyMeter() for margin in np.arange(-6, 3.1, 0.5).tolist()}
    for i in spread(len(dataset), frames):
        logits = net(stack([verbs.inputs(dataset[i])], net.position.device))  # (1, 18, X, Y, Z)
        logits = F.interpolate(logits, OCC3D.shape, mode="trilinear")[0].cpu()
        taken, ids = logits[:FREE].logsumexp(0) - logits[FREE], logits[:FREE].argmax(0)
        for margin, meter in meters.items():
            found = torch.where(taken < margin, FREE, ids).to(torch.uint8).numpy()
            meter.add(found, *dataset.labels(i), group=dataset.scene_names[i])
    return max(meters, key=lambda margin: meters[margin].metrics()["miou_camera"])


def on_grid(logits: Tensor, grid: VoxelGrid, ratio: float) -> Tensor:
    """Logits (B, K, ...) on contracted cells -> (B, K, X, Y, Z) at the centres of `grid`."""
    if ratio == 1:
        return logits
    unit = N.contract(grid.centers(dtype=torch.float32, device=logits.device), grid, ratio)
    return F.grid_sample(logits, unit.flip(-1).expand(len(logits), *unit.shape), align_corners=False)


class RayFrames(E.Keyframes):
    """A keyframe's item with what rendering reads: 2D maps at the rays, neighbours in time, images without
    jitter.

    past: the maps are drawn from this many past keyframes too, without classes that can move, as the 3D label
    is. pseudo: 3D labels are read too; without, no label file is opened.
    """

    def __init__(self, dataset: NuScenesOccupancy, labels: Path, cfg: E.Config, past: int = 0,
                 pseudo: bool = False):
        super().__init__(dataset, labels, cfg)
        self.maps, self.past, self.pseudo = make_labeler("files", dataset, maps=labels / "maps"), past, pseudo
        self.ray_weight = class_weights(self.on_rays(self.maps(i))[0] for i in range(len(dataset)))

    def target(self, i: int) -> Tensor:
        return super().target(i) if self.pseudo else torch.empty(0, dtype=torch.uint8)

    def on_rays(self, maps: Maps) -> tuple[Tensor, Tensor]:
        """Semantic and depth maps (N, h, w) at the pixels of `RAYS`."""
        size = zip(RAYS, maps.depth.shape[-2:], strict=True)
        pixels = [((np.arange(n) + 0.5) * m / n).astype(int) for n, m in size]
        at = np.ix_(range(len(maps.depth)), *pixels)
        return torch.from_numpy(maps.semantic[at].copy()), torch.from_numpy(maps.depth[at].copy())

    def __call__(self, i: int, rng: np.random.Generator) -> dict[str, Tensor]:
        raw = verbs.inputs(self.dataset[i])  # what (10) warps; the network may read cached features
        item = super().__call__(i, rng) | {"raw": raw["images"], "raw_K": raw["K"]}
        for name, step in (("prev", -1), ("next", 1)):
            images, T, valid = (torch.as_tensor(x) for x in self.dataset.neighbour(i, step))
            item |= {f"{name}_images": images, f"{name}_T": T, f"{name}_valid": valid}
        window = [i, *self.dataset.past(i, self.past)]
        j = window[rng.integers(len(window))]
        K, T_ego_cam, T_global_ego = (torch.as_tensor(x) for x in self.dataset.calibration(j))
        T = invert(torch.as_tensor(self.dataset.calibration(i)[2])) @ T_global_ego @ T_ego_cam.double()
        semantic, depth = self.on_rays(self.maps(j))
        if j != i:
            moving = torch.isin(semantic, torch.tensor(self.cfg.dynamic_ids, dtype=semantic.dtype))
            semantic, depth = semantic.masked_fill(moving, IGNORE), depth.masked_fill(moving, 0)
        return item | {"ray_K": K.float(), "ray_T": T.float(), "ray_semantic": semantic, "ray_depth": depth,
                       "ray_seed": torch.tensor(rng.integers(2**31)), "ray_weight": self.ray_weight}


def host_loss(logits: Tensor, batch: dict, class_weight: Tensor, cfg: E.Config, *, terms: tuple[str, ...],
              ratio: float, pseudo: bool = False) -> dict[str, Tensor]:
    """The rendered `terms` of WEIGHTS, means over samples; with pseudo also (9): together (5)."""
    grid = OCC3D.coarsen(cfg.grid_stride)
    losses = E.pseudo_loss(on_grid(logits, grid, ratio), batch, class_weight, cfg) if pseudo else {}
    weights = KNOWN_DEPTH if "depth" in terms else WEIGHTS
    frames = [{name: value[b] for name, value in batch.items()} for b in range(len(logits))]
    each = [rendered_losses(x, frame, cfg, grid, ratio, terms)
            for x, frame in zip(logits, frames, strict=True)]
    return losses | {name: weights[name] * torch.stack([e[name] for e in each]).mean() for name in terms}


def rendered_losses(logits: Tensor, frame: dict, cfg: E.Config, grid: VoxelGrid, ratio: float,
                    terms: tuple[str, ...]) -> dict[str, Tensor]:
    """(10)-(13) of one keyframe; `depth`, ours: |log depth - log map| where the map has a depth.

    Classes weigh by how many pixels show them, as in OccNeRF: sky is rare among pixels, free space is not
    among voxels.
    """
    rays = N.camera_rays(frame["ray_K"], frame["ray_T"], RAYS, cfg.image_size)
    noise = torch.Generator().manual_seed(int(frame["ray_seed"]))
    z = N.ray_depths(rays, grid, ratio, tuple(logits.shape[1:]), SAMPLES, jitter=0.1, generator=noise)
    out = N.render(logits, rays, z, grid, ratio)
    semantic, depth = frame["ray_semantic"].flatten(), frame["ray_depth"].flatten()
    losses = {"ent": N.entropy_loss(out.light), "dist": N.distortion_loss(out.weight, out.position)}
    if "depth" in terms:  # what lies past the box's exit is free all the way to it
        semantic, depth = semantic.masked_fill(depth > out.far, FREE), torch.minimum(depth, out.far)
        error = (out.depth.log() - depth.clamp_min(0.1).log()).abs() * (depth > 0)
        losses["depth"] = error.sum() / (depth > 0).sum().clamp_min(1)
    losses["sem"] = N.semantic_loss(out.semantic, semantic, frame["ray_weight"])
    if "photo" in terms:
        coarse = out.depth.view(len(frame["raw"]), 1, *RAYS)
        fine = F.interpolate(coarse, cfg.image_size, mode="bilinear", align_corners=False)[:, 0]  # (N, H, W)
        others = [(frame[f"{s}_images"], frame[f"{s}_T"], frame[f"{s}_valid"]) for s in ("prev", "next")]
        losses["photo"] = photometric(frame["raw"], fine, frame["raw_K"], frame["T_ego_cam"], others)
        losses["smooth"] = N.smoothness_loss(fine, frame["raw"])
    return losses


def photometric(images: Tensor, depth: Tensor, K: Tensor, T_ego_cam: Tensor, others: list[tuple]) -> Tensor:
    """(10), the mean over `SCALES`; arguments as N.photometric_loss."""
    losses, size = [], images.shape[-2:]
    for scale in SCALES:
        new = (size[0] // scale, size[1] // scale)
        shrink = partial(F.interpolate, size=new, mode="area")
        seen = [(shrink(image), T, valid) for image, T, valid in others]
        at = shrink(depth[:, None])[:, 0]  # (N, h, w)
        losses.append(N.photometric_loss(shrink(images), at, scale_to(K, size, new), T_ego_cam, seen))
    return torch.stack(losses).mean()


def parts(network: str, cfg: E.Config) -> tuple[Any, Any, Any]:
    """-> the network, items and loss of `easyocc.train` that an arm's --network names."""
    if network == "easyocc":
        return E.OccupancyNet, E.Keyframes, E.pseudo_loss
    ratio, past, terms = N.RATIO["tiny"], 0, ("photo", "smooth", "sem", "ent", "dist")
    if network == "rendered":
        ratio, past, terms = 1.0, cfg.past_frames, ("sem", "depth", "ent", "dist")
    pseudo = network == "occnerf+labels"
    loss = partial(host_loss, terms=terms, ratio=ratio, pseudo=pseudo)
    return partial(Host, ratio=ratio), partial(RayFrames, past=past, pseudo=pseudo), loss


# --- arms ---------------------------------------------------------------------------------------------------


def labels_of(dataset: NuScenesOccupancy, cfg: E.Config, args: SimpleNamespace,
              only: list[int] | None = None) -> Path:
    """The label folder of these settings in args.pool, made if it is not there. -> its path."""
    options = verbs.labeler_options(args)
    record = label_record(E.LABELS, dataset, "world", options, cfg)
    folder = args.pool / f"labels-{short_hash([record, str(dataset.root), dataset.split])}"
    make_labels(E.LABELS, dataset, "world", options, cfg, folder, only=only, workers=args.workers,
                keep_maps=True)
    return folder


def run_arm(cfg: E.Config, args: SimpleNamespace) -> Path:
    """Train and evaluate one arm in args.out."""
    dataset = open_split(args.data_root, args.version, args.train_split, cfg.image_size, args.cache)
    labels = labels_of(dataset, cfg, args)
    network, items, loss = parts(args.network, cfg)
    E.train(cfg, dataset, labels, args, network, items, loss)
    args.run = read_json(args.out / "config.json")
    net, out, state = verbs.load(network, cfg, args)
    test = verbs.open_eval(cfg, args)
    indices = spread(len(test), args.eval_frames)
    if isinstance(net, Host):
        net.margin = calibrate(net, dataset)
    constants = once(args.pool / f"constants-{short_hash([str(test.root), test.version, indices])}.json",
                     lambda: constant_scores(dataset, test, indices, ground_truth(test)))
    report(partial(E.predict, net), dataset=test, train_set=None, out=out, run=args.run, state=state,
           params=sum(p.numel() for p in net.parameters()), frames=args.eval_frames,
           protocol={"mask_train": args.run["data"]["mask_train"], "labels": labels_note(labels)},
           known=constants | {"margin": net.margin}, controls=("shuffled",))
    return out


# --- label quality ------------------------------------------------------------------------------------------


def label_quality(cfg: E.Config, args: SimpleNamespace) -> None:
    """Precision and recall of `world` labels against gts (surfaces that some sensor saw) and the exact
    solids.
    """
    dataset = open_split(args.data_root, args.version, None, cfg.image_size, args.cache)
    variants = {f"{n} past, correlation {c}": ({"past_frames": n}, c) for c in (0.8, 0.0) for n in (0, 3, 13)}
    variants |= {"13 past, movers kept": ({"dynamic_ids": ()}, 0.8),
                 "13 past, no border clamp": ({"clamp_oob": False}, 0.8)}
    rows, indices = {}, spread(len(dataset), args.eval_frames)
    for name, (fields, args.correlation) in variants.items():
        labels = labels_of(dataset, replace(cfg, **fields), args, only=indices)
        rows[name] = score_labels(dataset, labels, indices)
    write_quality(args.out, "easyocc", describe_dataset(dataset, len(indices)), cli.to_dict(cfg), rows)


def score_labels(dataset: NuScenesOccupancy, labels: Path, indices: list[int]) -> dict[str, float]:
    """Occupied precision, recall and mIoU of labels against gts, inside the camera mask and over the whole
    grid.

    Against the exact solids, precision is the share of labelled voxels inside matter, recall that of its
    visible shell: the camera mask ends at surfaces, so the solid voxels in it are the shell.
    """
    meter, labelled, inside, shell, found = OccupancyMeter(), 0, 0, 0, 0
    for i in tqdm(indices, "label quality", leave=False):
        (label,), (semantics, camera, lidar) = read_label(labels, dataset, i), dataset.labels(i)
        meter.add(label, semantics, camera, lidar, group=dataset.scene_names[i])
        path = dataset.root / "exact" / "solid" / dataset.scene_names[i] / f"{dataset.tokens[i]}.npz"
        solid = read_npz(path, {"semantics": (OCC3D.shape, "uint8")})["semantics"] != FREE
        occupied, seen = label != FREE, solid & camera
        labelled, inside = labelled + occupied.sum(), inside + (occupied & solid).sum()
        shell, found = shell + seen.sum(), found + (seen & occupied).sum()
    scores = {}
    for mask in ("camera", "none"):
        confusion = meter.confusion(mask).double()
        hit = confusion[:FREE, :FREE].sum()
        scores[f"precision {mask}"] = float(hit / confusion[:, :FREE].sum())
        scores[f"recall {mask}"] = float(hit / confusion[:FREE].sum())
        scores[f"mIoU {mask}"] = meter.metrics()[f"miou_{mask}"]
    return scores | {"precision solid": float(inside / labelled), "recall solid": float(found / shell)}


NETWORKS = Literal["easyocc", "occnerf", "occnerf+labels", "rendered"]
FLAGS = {name: verbs.FLAGS[name]
         for name in ("workers", "depth-level", "semantic-level", "correlation", "label-seed")}
FLAGS |= {"eval-frames": verbs.FLAGS["eval-frames"]._replace(default=40),
          "world-size": verbs.FLAGS["world-size"]._replace(default="claims"),
          "train-split": cli.Flag("what arms learn from; none: the version's own", str | None),
          "network": cli.Flag("what learns", NETWORKS, "easyocc")}

if __name__ == "__main__":
    main(__doc__, E.Config, E.PRESETS, CLAIMS, run_arm, shared=SHARED, flags=FLAGS,
         other={"label-quality": label_quality}, world=lambda args: make("driving", size=args.world_size))
