"""EasyOcc: semantic occupancy learned from 3D pseudo-labels that 2D foundation models and time make.

Paper   "EasyOcc: 3D Pseudo-Label Supervision for Fully Self-Supervised Semantic Occupancy Prediction Models"
        (v1-v3), retitled "Easy3D-Labels" (v4), Hayes, Sistu, Eising, Brophy; arXiv 2509.26087.
        Independent re-implementation; the authors released no code.
Idea    Two foundation models give each camera image a semantic map and a metric depth map. Lift every pixel
        to 3D, add the static points of the 13 previous keyframes, let the points vote in each voxel: labels.
        A small network learns from these directly, with no rendering and no human annotation.

RUN
    python easyocc.py train --out runs/x            # writes a synthetic world and labels first; two CPU cores
    python easyocc.py eval --ckpt runs/x            # the field's tables, result.json, pictures
    python easyocc.py predict --ckpt runs/x --data-root D --out P       # any frames, no ground truth needed
    python easyocc.py labels --labeler lidar --data-root D --out L      # real data: then train --labels L
    python easyocc.py ablate --claim time           # re-tests a claim of the paper: experiments/easyocc.py
    python easyocc.py describe --preset paper       # shapes, parameters, memory: no data, no GPU, no network

GLOSSARY
    symbol      name           shape            meaning                                                  place
    S_i, D_i    Maps           (N, h, w)        semantic id; metric z-depth [m], 0 = none                 2.1
    P^sem       points, label  (M, 3), (M,)     pixels in 3D [m] and their class                          (1)
    Delta       past           1..13            how many keyframes ago (2 Hz)                             (2)
    Y*          target         (B, X, Y, Z)     class with most points; 17 = free                         (3)
    V           volume         (B, C, X, Y, Z)  image features averaged into voxels                       (4)
    Y           logits         (B, 18, X, Y, Z) 17 classes and free                                       (4)

EQUATION MAP   The paper's numbers are not all public; these are this repository's.
    2.1 maps, 2.2 encoder   -> common/labelers.py: Foundation, PROMPTS; common/backbones.py: ImageEncoder
    (1) to 3D, (2) past     -> backproject, aggregate
    (3) vote; 2.1  label    -> vote, pseudo_labels
    (4)  lifting; 3D CNN    -> lift, OccupancyNet; common/networks/occnerf.py: StackedHourglass
    (5) (6) (7) the host    -> experiments/easyocc.py: host_loss; common/networks/occnerf.py: contract, render
    (9)  pseudo-loss        -> pseudo_loss (8: --l-ce 100 --l-scal 1; GaussianOcc's CE has no weights)
    (10) (11) (12) losses   -> common/networks/occnerf.py: photometric_loss, smoothness_loss, semantic_loss
    (13) of a ray's light   -> common/networks/occnerf.py: entropy_loss, distortion_loss
    Sec. 6: mIoU, RayIoU    -> common/metrics.py: OccupancyMeter, ray_iou

ASSUMPTIONS    Unpublished; the flag or the line that changes it stands beside.
    * cross-entropy + Lovasz, 1:1; class weights freq^-0.5 of the training labels, mean 1    --l-ce --l-lov
    * a voxel without a point is free, and the whole grid is supervised              --free-unseen
    * most points win a voxel, ties: the current frame; beyond the grid they land in its border   --clamp-oob
    * past frames lose every class that can move: vehicles and pedestrians           --dynamic-ids
    * statistical outlier filter, 20 neighbours, 2 standard deviations, per frame    --outlier-nb
DEVIATIONS
    * cameras are brought to the LiDAR timestamp's ego pose through global; OccNeRF ignores that motion.
    * a camera sees a voxel if its centre projects inside the image; OccNeRF tests for non-zero features.
    * tiny's encoder (common/networks/street.py) has learned classes and metric depth, as the makers of its
      labels have; lift_at_depth and Evidence bring them to the cells. Labels are not clamped or filtered.
    * tiny's (9) parts free from occupied and adds (8)'s scal terms; few unseen voxels are free; --margin is
      where IoU peaks in a world of another seed. For compute: coarse cells, --gates, no --logit-norm.

CLAIMS         the paper's, on Occ3D-nuScenes val; ours are in RESULTS.md and never in one table with these
    transfer    OccNeRF 9.73 < OccNeRF + labels 14.09 (camera mask); EasyOcc 13.86; unmasked: EasyOcc 7.71
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common import verbs
from common.backbones import ImageEncoder, UNet3D, norm_layer
from common.engine import Session, stack
from common.frozen import frozen_views
from common.geometry import (OCC3D, VoxelGrid, between_rows, coarsen, coordinates, divide, image_rays,
                             inliers, invert, pixel_centers, project, range_gates, scale_to, transform,
                             traversed, unproject, where_true)
from common.kernels.voxel_vote import voxel_vote
from common.labels import IGNORE, LabelMaker, class_weights, read_label, under_ground
from common.losses import cross_entropy, geo_scal, lovasz_softmax, occupancy_cross_entropy, sem_scal
from common.networks.occnerf import StackedHourglass, colour_jitter
from common.networks.street import Evidence, lift_at_depth
from common.nuscenes import FREE, Frame, NuScenesOccupancy
from common.train import make_optimizer, schedule, set_lr

# --- 1  Configuration ---------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Config:
    # pseudo-labels
    past_frames: int = 13  # Sec. 2.1: past keyframes, 6.5 s
    dynamic_ids: tuple[int, ...] = (2, 3, 4, 5, 6, 7, 9, 10)  # assumption: classes dropped from past frames
    clamp_oob: bool = True  # assumption from the paper's figure: points beyond the grid land in its border
    free_unseen: tuple[float, float] = (1.0, 1.0)  # assumption: free share of unhit: under ground, else
    outlier_nb: int = 20  # assumption: neighbours in Open3D's statistical filter; 0: no filter
    map_stride: tuple[int, int] = (1, 1)  # every n-th row and column is back-projected; tiny: CPU
    map_fill: float = 0.0  # [m] ours: points between the far-apart rows of small maps; 0: none
    # network
    image_size: tuple[int, int] = (336, 672)  # [px] height, width; OccNeRF's code
    backbone: str = "microsoft/resnet-101"  # hub id, path, conv, street...; Sec. 2.2: ResNet-101
    channels: int = 64  # of the lifted features; OccNeRF's code
    cnn3d: Literal["hourglass", "unet"] = "hourglass"  # OccNeRF's code: PSMNet's three hourglasses; tiny: CPU
    cnn_channels: tuple[int, ...] = (32, 64, 64)  # OccNeRF's code
    grid_stride: tuple[int, int, int] = (1, 1, 1)  # Occ3D voxels per predicted cell along x, y, z; tiny: CPU
    lift_stride: tuple[int, int, int] = (1, 1, 1)  # predicted cells per lifted cell along x, y, z; tiny: CPU
    gates: bool = False  # ours: the position factor starts as range gates, the CNN gets coordinates; tiny
    logit_norm: bool = True  # OccNeRF's code normalises the logits
    norm: Literal["batch", "group", "instance"] = "batch"  # batch: papers; group: any split of a batch alike
    # losses
    l_ce: float = 1.0  # (9), assumption
    l_lov: float = 1.0  # (9), assumption
    l_scal: float = 0.0  # (8) has 1, assumption
    l_free: float = 0.0  # ours, tiny: > 0 factors the cross-entropy, free against occupied weighs this
    margin: float = 0.0  # ours, tiny: a voxel is occupied where its classes outweigh free by e^margin
    # optimisation
    batch: int = 1  # keyframes per process; OccNeRF's code (8 GPUs)
    epochs: int = 12  # OccNeRF's code
    steps: int = 0  # 0: from epochs
    optimizer: Literal["adamw", "muon"] = "adamw"  # OccNeRF's code; muon: common/train.py
    lr: float = 1e-3  # OccNeRF's code; a pretrained encoder learns at a tenth of it
    weight_decay: float = 0.0  # OccNeRF's code
    schedule: Literal["step", "cosine"] = "step"  # OccNeRF's code: x 0.1 after 10 of 12 epochs
    warmup: int = 0  # [steps]
    grad_clip: float = 35.0  # gradient norm; ours
    jitter: float = 0.5  # probability of colour jitter; OccNeRF's code
    amp: Literal["off", "bf16"] = "bf16"  # OccNeRF's code: mixed precision


PRESETS = {
    "tiny": Config(  # two CPU cores, minutes
        clamp_oob=False, free_unseen=(0.02, 0.0005), outlier_nb=0, map_stride=(1, 4), map_fill=0.4,
        image_size=(112, 200), backbone="street-depth+frozen", channels=32, cnn3d="unet",
        cnn_channels=(24, 48, 96), gates=True, grid_stride=(2, 2, 1), lift_stride=(2, 2, 2), logit_norm=False,
        norm="group", l_lov=0.5, l_scal=0.1, l_free=6.0, margin=1.25, steps=360, optimizer="muon", lr=2e-2,
        weight_decay=0.2, schedule="cosine", warmup=20, grad_clip=5.0, jitter=1.0, amp="off"),
    "base": Config(image_size=(256, 704), batch=2, grid_stride=(2, 2, 1), lift_stride=(1, 1, 2)),  # 24 GB GPU
    "paper": Config(),
}

# --- 2.1  Easy3D-Labels: 2D semantics + metric depth + time -> 3D pseudo-labels -----------------------------

class Cloud(NamedTuple):
    """P^sem: semantic points of one keyframe or of several."""
    points: Tensor  # (M, 3) [m]
    label: Tensor  # (M,) uint8, 0..16


def backproject(depth: Tensor, semantic: Tensor, K: Tensor, T_ref_cam: Tensor,
                stride: tuple[int, int] = (1, 1), outlier_nb: int = 0, fill: float = 0.0) -> Cloud:
    """(1) P(u, v) = T_ref_cam [D(u, v) K^-1 (u, v, 1)^T ; 1] of every `stride`-th pixel.

    depth, semantic (N, h, w), K (N, 3, 3) at the maps' resolution, T_ref_cam (N, 4, 4) -> Cloud in `ref`.
    Pixels without depth are dropped, and so are sky and uncertain ones (17 = free): they would vote for free
    space. Outliers are removed. fill [m]: adds points between far-apart rows of one surface (`between_rows`).
    """
    rows, columns = (slice(n // 2, None, n) for n in stride)
    uv = pixel_centers(*depth.shape[-2:]).to(K)[rows, columns]  # (h', w', 2)
    depth, semantic = depth[:, rows, columns], semantic[:, rows, columns]
    surface = [unproject(uv, d.to(K), k, T) for d, k, T in zip(depth, K, T_ref_cam, strict=True)]
    surface, keep = torch.stack(surface), (depth > 0) & (semantic != FREE)  # (N, h', w', 3), (N, h', w')
    keep = keep.masked_scatter(keep, inliers(surface[keep], outlier_nb))
    clouds = [(surface[keep], semantic[keep])]
    if fill:
        clouds += [between_rows(*maps, fill) for maps in zip(surface, depth, semantic, keep, strict=True)]
    return Cloud(*(torch.cat(x) for x in zip(*clouds, strict=True)))


def keyframe_cloud(dataset: NuScenesOccupancy, i: int, maps, cfg: Config) -> tuple[Cloud, Tensor]:
    """-> keyframe i's cloud in global coordinates (float64); (X, Y, Z) bool: voxels that its rays crossed.

    A labeler that measures points (lidar) gives them directly; their raster would only add error.
    """
    K, T_ego_cam, T_global_ego = (torch.as_tensor(x).double() for x in dataset.calibration(i))
    if maps.points is not None:
        end, label = torch.as_tensor(maps.points).double(), torch.as_tensor(maps.labels)
        keep, origin = inliers(end, cfg.outlier_nb), torch.as_tensor(dataset.T_ego_lidar(i)[:3, 3])
        cloud = Cloud(end[keep], label[keep])
    else:
        depth, semantic = torch.as_tensor(maps.depth), torch.as_tensor(maps.semantic)
        K = scale_to(K, dataset.image_size, depth.shape[-2:])
        cloud = backproject(depth, semantic, K, T_ego_cam, cfg.map_stride, cfg.outlier_nb, cfg.map_fill)
        origin, end = image_rays(depth, K, T_ego_cam, max(2, *cfg.map_stride), semantic != FREE)
    return Cloud(transform(T_global_ego, cloud.points), cloud.label), traversed(origin, end, OCC3D)


def aggregate(current: Cloud, past: list[Cloud], dynamic_ids: tuple[int, ...]) -> tuple[Cloud, Tensor]:
    """(2) P_T^final = P_T^sem  U  { (p, l) in P_{T-Delta}^sem : l not dynamic }, Delta = 1..13.

    -> the union, and (M,) bool: from the current frame. No future frame, no tracking, no re-alignment.
    """
    static = [~torch.isin(cloud.label, torch.tensor(dynamic_ids, dtype=torch.uint8)) for cloud in past]
    clouds = [current, *(Cloud(c.points[s], c.label[s]) for c, s in zip(past, static, strict=True))]
    cloud = Cloud(*(torch.cat(x) for x in zip(*clouds, strict=True)))
    return cloud, torch.arange(len(cloud.points)) < len(current.points)


def vote(points: Tensor, label: Tensor, current: Tensor, grid: VoxelGrid,
         clamp_oob: bool) -> tuple[Tensor, Tensor, Tensor]:
    """(3) idx = floor((p - min) / voxel); most points win the voxel, ties go to `current`, no point: free.

    points (M, 3) [m] in ego -> target (X, Y, Z) uint8, the winner's share of the votes, bool: has a vote.
    """
    index, inside = grid.index(points)
    if clamp_oob:
        index = torch.minimum(index.clamp_min(0), torch.tensor(grid.shape) - 1)
        inside = torch.ones_like(inside)
    _, Y, Z = grid.shape
    flat = torch.where(inside, (index[:, 0] * Y + index[:, 1]) * Z + index[:, 2], -1)
    winner, share, count = voxel_vote(flat, label, math.prod(grid.shape), FREE, current=current, empty=FREE)
    return winner.to(torch.uint8).view(grid.shape), share.view(grid.shape), (count > 0).view(grid.shape)


def pseudo_labels(dataset: NuScenesOccupancy, indices: list[int], labeler, cfg: Config, todo: set[int]):
    """Section 2.1 for one scene: yield (keyframe, its label's arrays) for `todo`, in order of time."""
    past: deque[Cloud] = deque(maxlen=cfg.past_frames)
    for k, i in enumerate(indices):
        if not todo & set(indices[k : k + cfg.past_frames + 1]):  # neither wanted nor somebody's past
            past.clear()
            continue
        now, seen = keyframe_cloud(dataset, i, labeler(i), cfg)  # (1)
        if i in todo:
            cloud, current = aggregate(now, list(past), cfg.dynamic_ids)  # (2)
            T_ego_global = invert(torch.as_tensor(dataset.calibration(i)[2]))
            points = transform(T_ego_global, cloud.points)
            target, share, hit = vote(points, cloud.label, current, OCC3D, cfg.clamp_oob)  # (3)
            arrays = {"semantics": target, "mask_camera": seen | hit, "mask_lidar": hit,
                      "confidence": (share * 255).round()}  # mask_camera: a ray crossed the voxel, or hit it
            yield i, {name: value.numpy().astype(np.uint8) for name, value in arrays.items()}
        past.append(now)


FIELDS = ("past_frames", "dynamic_ids", "clamp_oob", "outlier_nb", "map_stride", "map_fill")  # labels follow
LABELS = LabelMaker(pseudo_labels, FIELDS)

# --- 2.2  Network: image features -> voxels -> 3D CNN -> 18 logits ------------------------------------------

def lift(features: Tensor, centers: Tensor, K: Tensor, T_ref_cam: Tensor) -> Tensor:
    """(4) V(x) = mean over the cameras that see x of bilinear(F_img, K T_cam_ref x).

    features (N, C, h, w), centers (V, 3) [m], K (N, 3, 3) at the features' resolution, T_ref_cam (N, 4, 4) ->
    (V, C). Only the pairs of camera and voxel that meet are sampled: 0 to 2 of six cameras see a voxel.
    """
    N, C, h, w = features.shape
    volume, seen_by = features.new_zeros(len(centers), C), features.new_zeros(len(centers), 1)
    for n in range(N):
        uv, depth = project(centers, K[n], invert(T_ref_cam[n]))  # (V, 2), (V,)
        seen = where_true((depth > 1e-3) & (uv >= 0).all(-1) & (uv < uv.new_tensor([w, h])).all(-1))  # (V_n,)
        grid = 2 * uv[seen] / uv.new_tensor([w, h]) - 1
        sampled = F.grid_sample(features[n : n + 1].float(), grid[None, None], align_corners=False)[0, :, 0]
        volume.index_add_(0, seen, sampled.t().to(volume.dtype))  # sampled (C, V_n)
        seen_by.index_add_(0, seen, torch.ones_like(seen, dtype=seen_by.dtype)[:, None])
    return volume / seen_by.clamp_min(1)


class OccupancyNet(nn.Module):
    """Six images -> features -> voxels -> 3D CNN -> 18 logits for each cell of `grid`."""

    def __init__(self, cfg: Config, classes: int = 18, pretrained: bool = True):
        super().__init__()
        self.grid, self.split = OCC3D.coarsen(cfg.grid_stride), cfg.lift_stride
        self.cells, centers, unit = self.lifted_cells(cfg)  # cells (X', Y', Z'); V = X' Y' Z' of them
        self.register_buffer("centers", centers, persistent=False)  # (V, 3) [m]
        norm2d = "group" if cfg.backbone == "conv" else "instance"
        self.encoder = ImageEncoder(cfg.backbone, cfg.channels, norm2d, pretrained)
        self.known, C = self.encoder.known, cfg.channels  # known: channels of class and depth; ours, tiny
        first = range_gates(centers, C) if cfg.gates and not self.known else torch.ones(len(centers), C)
        self.position = nn.Parameter(first)  # (V, C)
        self.register_buffer("place", coordinates(unit) if cfg.gates else unit[:, :0], persistent=False)
        C += self.place.shape[1] + (C + 2 if self.known else 0)  # + 2: lift_at_depth's curves
        self.cnn = (StackedHourglass if cfg.cnn3d == "hourglass" else UNet3D)(C, cfg.cnn_channels, cfg.norm)
        inner, C = math.prod(self.split), cfg.cnn_channels[0]  # predicted cells in a lifted one
        self.channels = cfg.channels if self.known else C // (2 if inner > 1 else 1)
        self.spread = nn.Conv3d(C, self.channels * inner, 1) if inner > 1 or self.known else nn.Identity()
        self.evidence = Evidence(self.grid, self.channels) if self.known else None
        self.classify, self.apart, self.margin = nn.Linear(self.channels, classes), cfg.l_free > 0, cfg.margin
        self.logit_norm = norm_layer(cfg.norm, classes, 3) if cfg.logit_norm else nn.Identity()

    def lifted_cells(self, cfg: Config) -> tuple[tuple[int, int, int], Tensor, Tensor]:
        """-> shape of the lifted cells; their centres (V, 3) in metres, and in the box's [-1, 1]^3."""
        lifted = self.grid.coarsen(cfg.lift_stride)
        centers, lower = lifted.centers().view(-1, 3).float(), torch.tensor(lifted.lower)
        return lifted.shape, centers, 2 * (centers - lower) / (torch.tensor(lifted.upper) - lower) - 1

    def voxels(self, batch: dict) -> Tensor:
        """images (B, N, 3, H, W), K (B, N, 3, 3), T_ego_cam (B, N, 4, 4) -> features (B, C, X, Y, Z)."""
        images, K, T = batch["images"], batch["K"], batch["T_ego_cam"]
        features, *known = self.encoder.with_known(images)
        K = scale_to(K, images.shape[-2:], features.shape[-2:])
        volume = torch.stack([lift(f, self.centers, k, t) for f, k, t in zip(features, K, T, strict=True)])
        more = [lift_at_depth(features, known[-1], self.centers, K, T)] if known else []  # (B, V, C + 2)
        volume = torch.cat([volume * self.position, self.place.expand(len(volume), -1, -1), *more], -1)
        x = self.spread(self.cnn(volume.unflatten(1, self.cells).movedim(-1, 1)))  # (B, s^3 C, X', Y', Z')
        x = divide(x, self.split)  # (B, C, X, Y, Z)
        return self.evidence(x, *known, K, T) if known else x

    def head(self, features: Tensor) -> Tensor:
        """(B, C, X, Y, Z) -> logits (B, 18, X, Y, Z); channel 17 = free."""
        return self.logit_norm(self.classify(features.movedim(1, -1)).movedim(-1, 1).contiguous()).float()

    def forward(self, batch: dict) -> Tensor:
        return self.head(self.voxels(batch))


build = OccupancyNet  # the network protocol: net.grid, net.channels, net.voxels(batch), net.head(features)

# --- 3  Loss ------------------------------------------------------------------------------------------------

def pseudo_loss(logits: Tensor, batch: dict, class_weight: Tensor, cfg: Config) -> dict[str, Tensor]:
    """(9) l_ce CE_w + l_lov Lovasz (+ l_scal (sem_scal + geo_scal), (8)); each a mean over samples.

    logits (B, 18, X, Y, Z); batch["target"] (B, X, Y, Z), 255 ignored; class_weight (18,) -> weighted terms.
    """
    target, p = batch["target"], logits.float().softmax(1)
    entropy = partial(occupancy_cross_entropy, free=FREE, l_free=cfg.l_free) if cfg.l_free else cross_entropy
    terms = {"ce": cfg.l_ce * entropy(logits, target, class_weight, ignore=IGNORE),
             "lov": cfg.l_lov * lovasz_softmax(p, target, per_sample=True, softmax=False)}
    if cfg.l_scal:
        semantic = sem_scal(p, target, per_sample=True, softmax=False)
        geometric = geo_scal(p, target, empty=FREE, per_sample=True, softmax=False)
        terms["scal"] = cfg.l_scal * (semantic + geometric)
    return terms

# --- 4  Data ------------------------------------------------------------------------------------------------

class Keyframes:
    """What a training step reads of a keyframe: six images, their cameras, the pseudo-label."""

    def __init__(self, dataset: NuScenesOccupancy, labels: Path, cfg: Config):
        self.dataset, self.labels, self.cfg, self.views = dataset, labels, cfg, None  # views: cached features

    def target(self, i: int) -> Tensor:
        """The label of keyframe i on the network's cells, uint8, 255 ignored."""
        target, seen = (torch.from_numpy(a) for a in read_label(self.labels, self.dataset, i, "mask_camera"))
        kept = torch.where(under_ground(target), *self.cfg.free_unseen)
        kept = torch.from_numpy(np.random.default_rng(i).random(target.shape)) < kept
        unknown = (target == FREE) & (seen == 0) & ~kept
        return coarsen(target.masked_fill(unknown, IGNORE), self.cfg.grid_stride, FREE)

    def __call__(self, i: int, rng: np.random.Generator) -> dict[str, Tensor]:
        item = self.views(i) if self.views else verbs.inputs(self.dataset[i])
        if not self.views and rng.random() < self.cfg.jitter:
            item["images"] = colour_jitter(item["images"], rng)
        return item | {"target": self.target(i)}

# --- 5  Train -----------------------------------------------------------------------------------------------

def train(cfg: Config, dataset: NuScenesOccupancy, labels: Path, args, network=OccupancyNet, items=Keyframes,
          loss=pseudo_loss) -> None:
    """Learn from the labels; checkpoints and log go to args.out. A killed run goes on by the same command.

    network, items, loss: an experiment's own, such as a rendering host whose terms join (9): (5).
    """
    source = verbs.source(dataset, labels, "none" if min(cfg.free_unseen) == 1 else "seen by label's rays")
    run = Session(args, cfg, args.out, samples=len(dataset), batch=cfg.batch, steps=cfg.steps,
                  epochs=cfg.epochs, source=source, amp=cfg.amp)
    if run.finished:
        return
    keyframes = items(dataset, labels, cfg)
    class_weight = class_weights(keyframes.target(i) for i in range(len(dataset))).to(run.device)
    net = network(cfg).to(run.device)
    rates = (1 if cfg.backbone == "conv" else 0.1) * cfg.lr, cfg.lr  # OccNeRF's code: 1e-4, 1e-3
    optimizer = make_optimizer(cfg.optimizer, net, *rates, cfg.weight_decay, net.encoder.learned)
    model = run.attach(net, optimizer)
    keyframes.views = frozen_views(net.encoder, dataset, labels)
    for step, batch in run.batches(keyframes, args.workers):
        lr = set_lr(optimizer, schedule(step, run.steps, cfg.schedule, cfg.warmup))
        with run.autocast():
            logits = model(batch)  # (B, 18, X, Y, Z)
        terms = loss(logits, batch, class_weight, cfg)
        optimizer.zero_grad()
        sum(terms.values()).backward()
        nn.utils.clip_grad_norm_(net.parameters(), cfg.grad_clip)
        optimizer.step()
        run.log(step, terms, lr)

# --- 6  Predict ---------------------------------------------------------------------------------------------

@torch.no_grad()
def predict(net: OccupancyNet, frame: Frame) -> np.ndarray:
    """One keyframe -> the best class of each voxel of the Occ3D grid (200, 200, 16) uint8."""
    logits = net(stack([verbs.inputs(frame)], net.position.device))  # (1, 18, X, Y, Z)
    logits = F.interpolate(logits, OCC3D.shape, mode="trilinear")[0]  # at the voxels
    best, ids = logits[:FREE].max(0)
    taken = logits[:FREE].logsumexp(0) if net.apart else best  # apart: its classes together against free
    return torch.where(taken < logits[FREE] + net.margin, FREE, ids).to(torch.uint8).cpu().numpy()


def main() -> None:
    verbs.main(__doc__, Config, PRESETS, {
        "world": verbs.world,
        "labels": partial(verbs.labels, LABELS),
        "train": partial(verbs.train, LABELS, train),
        "eval": partial(verbs.evaluate, LABELS, build, predict),
        "predict": partial(verbs.predict_frames, build, predict),
        "describe": partial(verbs.describe, build),
    })


if __name__ == "__main__":
    main()
