"""OccLE: occupancy from images and LiDAR that learns from a tenth of the labels, helped by 2D pseudo labels.

Paper   "OccLE: Label-Efficient 3D Semantic Occupancy Prediction", Fang, Zhou, Liu, Yang, Wei, Qiu, Li, Lin;
        arXiv 2505.20617 v1-v4. Independent re-implementation; no code of the authors is known to us. Only
        abstract, introduction and third-party summaries are public: each equation here is a reconstruction.
Idea    Learn semantics and geometry apart, then fuse them. Semantics come from 2D foundation models, lifted
        to LiDAR voxels; geometry from several sweeps and images, taught by few labels, a mean teacher and the
        LiDAR's own rays. Dual Mamba fuses both grids; the projection supervises frames without labels.

RUN
    python occle.py train --out runs/x              # writes a world and 2D labels first; two CPU cores
    python occle.py eval --ckpt runs/x              # the field's tables, result.json, pictures
    python occle.py train --format semantickitti --out runs/k           # the same city as SemanticKITTI
    python occle.py labels --labeler foundation --data-root D --out L   # segmenter + GroundingDINO + SAM2
    python occle.py train --data-root D --labels L --label-list tenth.json --out runs/y   # the 10 % is a file
    python occle.py predict --ckpt runs/x --data-root D --out P         # any frames, no ground truth needed
    python occle.py ablate --claim fusion           # re-tests a claim of the paper: experiments/occle.py
    python occle.py describe --preset paper         # shapes, parameters, memory: no data, no GPU, no network

GLOSSARY
    symbol     name         shape               meaning                                               place
    sbar       semantic     (N, h, w)           aligned 2D pseudo label                                (1)
    s          seg2d        (B, N, S, h, w)     2D segmentation, S occupied classes                    (2)
    V(P)       Voxels       (V, C)              encoded points of the V occupied cells                 (3)
    S          seg3d        (V, S)              classes of the occupied cells                          (3)
    Sbar       target3d     (B, X, Y, Z)        pseudo label lifted to the occupied cells              (4)
    F^s, F^g   grid         (B, X', Y', Z', C)  semantic and geometric features of the lifted cells    (5) (9)
    L, A       L, A         (B, X', Y', Z', C)  LiDAR of all sweeps; image features lifted             (6) (7)
    F_yz, F_x  plane, line  (B, sides, ...)     image on the yz-plane; LiDAR's distribution along x    (7) (8)
    o          occupancy    (B, X, Y, Z)        occupancy logit of a cell                              (10)
    theta'     Teacher      -                   running mean of the geometric branch                   (11)
    Y          logits       (B, X, Y, Z, S + 1) logits of a cell: S classes, then empty                (14)
    Shat       shown        (N, S, h, w)        class shares of the prediction in each image           (16)
    Inside, classes are 0..S-1 and S is empty, whatever the dataset's ids; X' Y' Z' is coarser than X Y Z.

EQUATION MAP   Numbers are the reconstruction's.
    (1)  aligned pseudo label, Boolean rule     -> merge, RULES
    (2)  2D UNet and header                     -> SemanticBranch; common/backbones.py: ImageEncoder, UNet3D
    (3)  V, 3D UNet, header                     -> SemanticBranch; common/networks/voxelnet.py: VoxelEncoding
    (4)  lifting pseudo labels to 3D            -> lift_labels
    (5)  image features in the semantic grid    -> lift_to_grid, SemanticBranch
    (6)  multi-frame LiDAR encoder              -> GeometricBranch
    (7)  image to the yz-plane                  -> image_plane
    (8)  LiDAR along x                          -> softmax_along_x
    (9)  cross-plane synergy                    -> GeometricBranch.cross_plane
    (10) geometry head                          -> DetailHead
    (11) teacher, thresholds, LiDAR hits, rays  -> Teacher, semi_targets, sensor_targets, semi_loss
    (12) (13) Dual Mamba                        -> DualMamba; common/networks/mamba.py: MambaBlock
    (13) fusion, (14) head                      -> OccLE.fuse, OccLE, DetailHead
    (15) (16) scatter-accumulated projection    -> project_logits
    (17) (18) 2D and 3D segmentation            -> segmentation_losses
    (19) labelled geometry                      -> geometry_loss
    (20) projection loss                        -> projection_loss
    (21) (22) labelled and unlabelled frames    -> one_step, completion_losses
    Sec. 4: two stages; 10 % of the labels      -> train, choose_labelled, Samples
    Sec. 6: IoU and mIoU                        -> common/metrics.py: OccupancyMeter, ssc_scores

ASSUMPTIONS    All unpublished; the flag or the line that changes it stands beside.
    * classes that the 2D segmenter lacks, their parents and prompts                    RULES, merge
    * every tenth frame is labelled, all of it; the count goes on from scene to scene   --label-by
    * one image a camera, ten sweeps; (5) lifts features and scores                     --n-sweeps
    * (7)-(9) as they stand; a surround rig has two yz-planes, ahead and behind         LabelSet.sides
    * teacher with warm-up, ramped consistency, thresholds .9 / .1, weak and strong
      augmentation; LiDAR hits are occupied, rays free until 4 m before their hit       --ray-short, augment
    * (12) then (13), 3D Hilbert order, both directions                                 DualMamba
    * the projection weighs by transmittance, without gradient; a cell covers its box   project_logits
    * loss weights are 1, but 20 for (19) and (11); no Lovasz in (21)                   --geo-weight
    * Occ3D: the whole grid is supervised                                               voxel_truth
    * AdamW 2e-4, cosine, clip 35, 20 epochs (VoxFormer's)                              --lr, --epochs
DEVIATIONS
    * the sparse 3D UNets are dense, on lifted cells; the semantic one's output is masked to occupied cells.
    * (5) is a 1x1x1 convolution of F_P, the lifted F_I and s, and the occupied cells' features.
    * the heads (10), (14) read the occupied cells' features beside the upsampled grid; they begin at "empty".
    * (16) projects classes given occupied: the joint probability would also raise the occupancy in front.
    * tiny, for compute: a frozen street encoder (--backbone), coarser cells (--grid-stride), token means
      (--mamba-stride), Muon (--optimizer), class weights freq^-0.5 (--class-weights). Same losses as paper.

CLAIMS         in experiments/occle.py; the paper's 10 %: SemanticKITTI val 16.59 mIoU, Occ3D val 27.53
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common import verbs
from common.backbones import ImageEncoder, UNet3D, conv_norm_relu, encoder_rate
from common.datasets import (IGNORE, LABEL_SETS, LabelSet, format_of, open_dataset, read_frame_list,
                             voxel_truth)
from common.engine import Session
from common.files import InputError, short_hash, write_json
from common.geometry import (VoxelGrid, coarsen, hilbert_order, invert, lift, nearest_ids, project, refine,
                             scale_to, traversed)
from common.kernels.scatter_project import scatter_project
from common.kernels.voxel_vote import voxel_vote
from common.labelers import TwoSources, map_paths, read_semantic
from common.labels import TWO_SOURCES, LabelMaker, class_weights
from common.losses import cross_entropy, geo_scal, lovasz_softmax, sem_scal
from common.networks.mamba import MambaBlock
from common.networks.voxelnet import StridedConv, VoxelEncoding, Voxels, group_points
from common.nuscenes import Frame
from common.report.occupancy import spread
from common.train import (MixedOrder, load_checkpoint, make_optimizer, schedule, set_apart, set_lr, setup,
                          stage_state)

# --- 1  Configuration ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Config:
    # data
    format: Literal["occ3d", "semantickitti"] = "occ3d"  # Sec. 4: both; with --data-root the tree decides
    truth: Literal["files", "aggregate"] = "files"  # aggregate: SemanticKITTI's labelled scans, piled up here
    image_size: tuple[int, int] = (256, 704)  # [px] height, width; assumption: usual with ResNet-50 on Occ3D
    n_sweeps: int = 9  # earlier sweeps beside the current one; assumption: OccMamba's ten in all
    label_shift: int = 0  # SemanticKITTI: voxels that .label files are late; measured on a labelled frame
    label_ratio: float = 0.1  # abstract: 10 % of the voxel annotations
    label_by: Literal["frames", "scenes", "random"] = "frames"  # assumption: every 1/ratio-th; whole scenes
    # network
    backbone: str = "microsoft/resnet-50"  # 2D UNet's encoder: hub id, path or conv; assumption: VoxFormer's
    channels: int = 128  # of image features; assumption: VoxFormer's
    geo_channels: int = 64  # of the geometric branch's image features; assumption
    unet_channels: tuple[int, ...] = (32, 64, 128)  # both 3D UNets; assumption
    grid_channels: int = 128  # of F^s, F^g and their tokens; assumption
    head_channels: int = 64  # assumption
    grid_stride: tuple[int, int, int] = (1, 1, 1)  # label voxels per predicted cell; tiny: CPU
    cell_split: tuple[int, int, int] = (2, 2, 2)  # predicted cells per lifted cell; assumption
    mamba_stride: tuple[int, int, int] = (1, 1, 1)  # lifted cells per token; tiny: CPU
    d_state: int = 16  # mamba_ssm's default
    expand: int = 2  # mamba_ssm's default
    # losses
    class_weights: Literal["log", "sqrt"] = "log"  # MonoScene's 1 / log(freq + .001); tiny: freq^-0.5
    geo_weight: float = 20.0  # of (19), (11); assumption: then they steer the branch as (21) does
    ema: float = 0.999  # (11) m, assumption
    ray_short: float = 4.0  # (11) [m] a ray ends before its return: grazing ones cross the ground; measured
    scatter_stride: int = 4  # image pixels per projected pixel; assumption: 0.2 m voxels leave holes
    # optimisation
    branch_share: float = 0.5  # share of the steps in the first stage, 0: one stage; assumption
    batch: int = 1  # labelled frames per process; VoxFormer's
    batch_unlabelled: int = 1  # frames without labels per process, 0: supervised alone; assumption
    optimizer: Literal["adamw", "muon"] = "adamw"  # VoxFormer's; muon: common/train.py
    steps: int = 0  # of both stages; 0: from epochs
    epochs: int = 20  # VoxFormer's
    lr: float = 2e-4  # VoxFormer's
    warmup: int = 500  # [steps] of each stage; VoxFormer's
    grad_clip: float = 35.0  # gradient norm; VoxFormer's
    amp: Literal["off", "bf16"] = "bf16"  # ours


PRESETS = {
    "tiny": Config(  # two CPU cores, minutes
        image_size=(112, 200), n_sweeps=2, backbone="street+frozen", channels=24, geo_channels=16,
        unet_channels=(16, 32, 64), grid_channels=24, head_channels=16, grid_stride=(2, 2, 1),
        mamba_stride=(2, 2, 2), d_state=4, expand=1, class_weights="sqrt", ema=0.98, scatter_stride=8,
        branch_share=0.4, optimizer="muon", steps=180, lr=1e-2, warmup=20, grad_clip=5.0, amp="off"),
    "base": Config(cell_split=(4, 4, 2), channels=96, grid_channels=64),  # one 24 GB GPU
    "paper": Config(),
}

# --- The paper in one step ----------------------------------------------------------------------------------


def one_step(model: nn.Module, teacher: Teacher, batch: dict, t: int, steps: int, weights: Weights,
             cfg: Config, autocast: Callable, mode: str = "depth") -> dict[str, Tensor]:
    """Forward and losses of a batch whose first batch["labelled"] frames have labels; -> the loss's terms.

    model: both branches in the first stage, the whole network in the second. t: step over both stages.
    """
    n = batch["labelled"]
    with autocast():
        out = model(batch)  # (2) (3) (5)-(10), in the second stage (12)-(14)
        target = teacher(batch, t, steps) if len(batch["points"]) > n else None  # (11)
    occupancy = out["geometric"].occupancy
    terms = segmentation_losses(out["semantic"], batch, weights.maps)  # (17) (18)
    terms["geo"] = cfg.geo_weight * geometry_loss(occupancy[:n], batch["truth"], len(weights.maps))  # (19)
    if target is not None:
        terms["semi"] = cfg.geo_weight * semi_loss(occupancy[n:], *target)  # (11) (22)
    if "logits" in out:
        terms |= completion_losses(out["logits"][:n], batch["truth"], weights.truth)  # (21)
        if target is not None:
            terms["proj"] = projection_loss(out["logits"][n:], batch, weights.maps, cfg, mode)  # (20)
    return terms


# --- 2A  Semantic branch: aligned pseudo labels (1) ---------------------------------------------------------


def merge(primary: np.ndarray, auxiliary: np.ndarray, rules: tuple[Rule, ...],
          labels: LabelSet) -> np.ndarray:
    """(1) sbar = u where M_u AND (primary in parents(u) OR primary unknown), u un-aligned; else primary.

    primary, auxiliary (N, h, w) uint8 dataset ids, `labels.none` where unknown -> (N, h, w). Masks M_u never
    overlap: the auxiliary map holds one class a pixel.
    """
    aligned = primary.copy()
    for rule in rules:
        u, parents = labels.of_name(rule.name), [labels.of_name(name) for name in rule.parents]
        aligned[(auxiliary == u) & np.isin(primary, [*parents, labels.none])] = u
    return aligned


class Rule(NamedTuple):
    """A class that the first segmenter lacks: its open-vocabulary mask replaces the parents there."""

    name: str
    parents: tuple[str, ...]  # classes that the segmenter takes such things for
    prompts: tuple[str, ...]  # words for the open-vocabulary model
    taken_for: str | None  # what the *synthetic* first source takes it for; None: no label


# Un-aligned classes: MSeg's and Mapillary's taxonomies have no such class, or mean another thing by it.
RULES = {
    "occ3d": (
        Rule("barrier", ("manmade", "driveable_surface", "sidewalk"), ("road barrier", "barricade"),
             "manmade"),
        Rule("traffic_cone", ("manmade", "driveable_surface", "sidewalk"), ("traffic cone",), "manmade"),
        Rule("construction_vehicle", ("truck", "manmade", "car"), ("excavator", "crane", "bulldozer"),
             "truck"),
        Rule("trailer", ("truck", "bus", "manmade"), ("trailer",), "truck"),
        Rule("other_flat", ("driveable_surface", "sidewalk", "terrain"), ("traffic island",),
             "driveable_surface"),
        Rule("others", ("manmade", "vegetation", "sidewalk"), ("debris", "trash bin", "stroller"), None),
    ),
    "semantickitti": (
        Rule("other-vehicle", ("car", "truck"), ("bus", "trailer", "van"), "truck"),
        Rule("bicyclist", ("person", "bicycle", "motorcycle"), ("bicyclist", "person riding a bicycle"),
             "person"),
        Rule("motorcyclist", ("person", "motorcycle", "bicycle"), ("motorcyclist",), "person"),
        Rule("parking", ("road", "sidewalk"), ("parking lot", "parking space"), "road"),
        Rule("other-ground", ("road", "sidewalk", "terrain"), ("traffic island",), "sidewalk"),
        Rule("trunk", ("vegetation",), ("tree trunk",), "vegetation"),
    ),
}


def two_sources(name: str, dataset, **options) -> TwoSources:
    """The labeler: both 2D sources of a frame."""
    kind = format_of(dataset.root)
    unaligned = {rule.name: (rule.prompts, rule.taken_for) for rule in RULES[kind]}
    return TwoSources(name, dataset, LABEL_SETS[kind], unaligned, **options)


def aligned_labels(dataset, indices: list[int], sources: TwoSources, cfg: Config, todo: set[int]):
    """For one scene: yield (frame, its maps: the aligned label, and the first source alone) for `todo`."""
    for i in sorted(todo):
        primary, auxiliary = sources(i)
        aligned = merge(primary, auxiliary, RULES[cfg.format], LABEL_SETS[cfg.format])
        yield i, {"primary": primary, "semantic": aligned}


LABELS = LabelMaker(aligned_labels, ("format",), flags=TWO_SOURCES, labeler=two_sources,
                    maps=("primary", "semantic"))

# --- 2A  Semantic branch: networks (2)-(5) ------------------------------------------------------------------

# Grids have their channels last: a 1x1x1 convolution is a matrix product. Occupied cells are rows (`Voxels`).
VOXEL_CHANNELS = 16  # of V(P); assumption: OccMamba's sparse encoder starts at 16
POINTS_PER_VOXEL = 10  # sampled by V; assumption: OccMamba's HardSimpleVFE
PRIOR = 2.0  # ours: first logit of "empty"


def grids(cfg: Config) -> tuple[VoxelGrid, VoxelGrid]:
    """-> the grids of the predicted cells (X, Y, Z) and of the lifted cells (X', Y', Z')."""
    labels, stride, split = LABEL_SETS[cfg.format], cfg.grid_stride, cfg.cell_split
    grid, lifted = labels.moved(cfg.label_shift), tuple(map(math.prod, zip(stride, split, strict=True)))
    for n, size, sides in zip(grid.shape, lifted, (labels.sides, 1, 1), strict=True):
        if n % (size * sides):
            raise InputError(f"--grid-stride {stride} --cell-split {split}: does not divide {n} voxels")
    return grid.coarsen(stride), grid.coarsen(lifted)


def conv3d(layers: nn.Module, x: Tensor) -> Tensor:
    """(B, X, Y, Z, C) through layers whose inputs have channels first."""
    return layers(x.movedim(-1, 1)).movedim(1, -1)


def current_sweep(batch: dict) -> list[Tensor]:
    """Points of the current sweep, (M, 5) a sample: x, y, z, intensity, 0."""
    return [torch.cat([p[:, :4], torch.zeros_like(p[:, :1])], 1) for p in batch["points"]]


def all_sweeps(batch: dict) -> list[Tensor]:
    """Points of the current sweep, then of the earlier ones with a 1 in the last column."""
    history = batch.get("history") or [p[:0] for p in batch["points"]]
    earlier = [torch.cat([h[:, :4], torch.ones_like(h[:, :1])], 1) for h in history]
    return [torch.cat(both) for both in zip(current_sweep(batch), earlier, strict=True)]


class Semantic(NamedTuple):
    """Outputs of the semantic branch."""

    grid: Tensor  # (B, X', Y', Z', C)  F^s
    detail: Tensor  # (V, w)  features of the occupied cells
    seg2d: Tensor  # (B, N, S, h, w)  s
    seg3d: Tensor  # (V, S)  S
    voxels: Voxels


class SemanticBranch(nn.Module):
    """2D UNet with header, voxel encoding, 3D UNet over the occupied cells with header, their grid F^s."""

    sweeps = staticmethod(current_sweep)

    def __init__(self, cfg: Config, pretrained: bool = True):
        super().__init__()
        cells, self.lifted = grids(cfg)
        S, C, w = LABEL_SETS[cfg.format].solid, cfg.grid_channels, cfg.unet_channels[0]
        self.encoder = ImageEncoder(cfg.backbone, cfg.channels, "group", pretrained)  # G_s2d
        self.header2d = nn.Conv2d(cfg.channels, S, 1)
        self.encoding = VoxelEncoding(cells, cfg.cell_split, VOXEL_CHANNELS, POINTS_PER_VOXEL)  # V
        self.down = StridedConv(VOXEL_CHANNELS, w, cfg.cell_split, self.lifted.shape)
        self.unet = UNet3D(w, cfg.unet_channels)  # G_s3d
        row, image = w + VOXEL_CHANNELS + math.prod(cfg.cell_split), cfg.channels + S
        self.header3d = nn.Sequential(nn.Linear(row, 2 * w), nn.ReLU(), nn.Linear(2 * w, S))
        self.detail = nn.Linear(row + S + image, w)
        self.gather = StridedConv(w, w, cfg.cell_split, self.lifted.shape)
        self.mix = nn.Linear(2 * w + image, C)

    def forward(self, batch: dict) -> Semantic:
        F_I = self.encoder(batch["images"])  # (B, N, C, h, w)
        seg2d = self.header2d(F_I.flatten(0, 1)).unflatten(0, F_I.shape[:2])  # (B, N, S, h, w)  (2)

        voxels = self.encoding(self.sweeps(batch))  # V(P)
        x = F.relu(self.down(voxels.features, voxels))  # (B, X', Y', Z', w)
        occupied = x.new_zeros(x[..., 0].numel()).index_fill(0, voxels.parent, 1).view(*x.shape[:4], 1)
        F_P = conv3d(self.unet, x) * occupied
        rows = torch.cat([F_P.flatten(0, 3)[voxels.parent], voxels.features, voxels.child], -1)
        seg3d = self.header3d(rows)  # (V, S)  (3)

        image = torch.cat([F_I, seg2d.softmax(2)], 2)
        volume, _ = lift_to_grid(image, self.lifted, batch)  # (5)
        places, size = voxels.mean.split(voxels.count), batch["images"].shape[-2:]
        at_rows = torch.cat([lift(f, p, k, T, size)[0] for f, p, k, T
                             in zip(image, places, batch["K"], batch["T_ego_cam"], strict=True)])
        detail = F.relu(self.detail(torch.cat([rows, seg3d.softmax(-1), at_rows], -1)))  # (V, w)
        grid = F.relu(self.mix(torch.cat([F_P, volume, self.gather(detail, voxels)], -1)))  # (5)
        return Semantic(grid, detail, seg2d, seg3d, voxels)


def lift_labels(points: Tensor, sbar: Tensor, K: Tensor, T_ref_cam: Tensor, size: tuple[int, int],
                cells: VoxelGrid, classes: int) -> tuple[Tensor, Tensor]:
    """(4) p = K (T P_vox), Sbar = F(sbar, p): labels of the occupied cells; nearest, none outside the images.

    points (M, >= 3) of the current sweep [m], sbar (N, h, w) uint8, K (N, 3, 3) for images of `size`. The
    cells' centres are projected; of several cameras the most frequent class counts -> C-order cell (V,),
    class (V,).
    """
    N, h, w = sbar.shape
    occupied = group_points(points, cells).cell  # (V,)
    centers, found, answers = cells.centers().flatten(0, 2)[occupied], [], []
    for n in range(N):
        uv, depth = project(centers, scale_to(K[n], size, (h, w)), invert(T_ref_cam[n]))
        u, v = uv.floor().long().unbind(-1)
        seen = (depth > 0.1) & (u >= 0) & (u < w) & (v >= 0) & (v < h)
        found.append(occupied[seen])
        answers.append(sbar[n][v[seen], u[seen]])
    place, V = (torch.cat(found), torch.cat(answers)), math.prod(cells.shape)
    label = voxel_vote(*place, V, classes, empty=IGNORE).winner
    known = occupied[label[occupied] != IGNORE]
    return known, label[known]


def lift_to_grid(features: Tensor, grid: VoxelGrid, batch: dict) -> tuple[Tensor, Tensor]:
    """(5) mean_cams bilinear(F_I, K T v) at the cells' centres v: features (B, N, C, h, w) -> (B, X', Y', Z',
    C), and (B, X', Y', Z', 1) bool: a camera sees the cell."""
    centers, size = grid.centers(device=features.device).flatten(0, 2), batch["images"].shape[-2:]
    cameras = zip(features, batch["K"], batch["T_ego_cam"], strict=True)
    each = zip(*(lift(f, centers, k, T, size) for f, k, T in cameras))
    volume, seen = (torch.stack(v).unflatten(1, grid.shape) for v in each)
    return volume, seen[..., None]


# --- 2B  Geometric branch: cross-plane synergy (6)-(10) -----------------------------------------------------


class Geometric(NamedTuple):
    """Outputs of the geometric branch."""

    grid: Tensor  # (B, X', Y', Z', C)  F^g
    occupancy: Tensor  # (B, X, Y, Z)  o, logits
    voxels: Voxels


class GeometricBranch(nn.Module):
    """All sweeps -> 3D encoder; the image's yz-plane spread along x by LiDAR; occupancy of each cell."""

    def __init__(self, cfg: Config, pretrained: bool = True):
        super().__init__()
        (cells, self.lifted), self.sides = grids(cfg), LABEL_SETS[cfg.format].sides
        C, c, w = cfg.grid_channels, cfg.geo_channels, cfg.unet_channels[0]
        self.encoding = VoxelEncoding(cells, cfg.cell_split, VOXEL_CHANNELS, POINTS_PER_VOXEL)
        self.down = StridedConv(VOXEL_CHANNELS, w, cfg.cell_split, self.lifted.shape)
        self.unet = UNet3D(w, cfg.unet_channels)
        self.widen = nn.Linear(w, C)
        self.encoder = ImageEncoder(cfg.backbone, c, "group", pretrained)
        self.image = nn.Linear(c, C)
        self.image_score = nn.Sequential(nn.Linear(c + 3, 16), nn.ReLU(), nn.Linear(16, 1))
        self.lidar_score = nn.Linear(C, 1)
        self.mix = conv_norm_relu(C, C, "group", dims=3)
        self.head = DetailHead(cfg, [VOXEL_CHANNELS], 1)
        nn.init.constant_(self.head.last.bias, -PRIOR)

    def forward(self, batch: dict) -> Geometric:
        voxels = self.encoding(all_sweeps(batch))
        x = F.relu(self.down(voxels.features, voxels))
        L = self.widen(conv3d(self.unet, x))  # (B, X', Y', Z', C)  (6)
        A, seen = lift_to_grid(self.encoder(batch["images"]), self.lifted, batch)  # (.., c), (.., 1)
        grid = conv3d(self.mix, self.cross_plane(L, A, seen))
        features = self.head.features(grid, [(voxels.features, voxels.cell)])
        return Geometric(grid, self.head(features)[..., 0], voxels)  # (10)

    def cross_plane(self, L: Tensor, A: Tensor, seen: Tensor) -> Tensor:
        """(9) L(x, y, z) + F_x(x; y, z) F_yz(y, z), before the convolution; shapes as above."""
        axes = [torch.linspace(-1, 1, n, device=A.device, dtype=A.dtype) for n in self.lifted.shape]
        place = torch.stack(torch.meshgrid(*axes, indexing="ij"), -1).expand(len(A), -1, -1, -1, -1)
        score = self.image_score(torch.cat([A, place], -1))
        plane = self.image(image_plane(A, score, seen.to(A), self.sides))  # (B, sides, 1, Y', Z', C)  (7)
        line = softmax_along_x(self.lidar_score(L).unflatten(1, (self.sides, -1)))  # (B, sides, .., 1)  (8)
        line = line * line.shape[2]  # ours: mean 1, whatever the number of cells
        return L + (line * plane).flatten(1, 2)


def image_plane(A: Tensor, score: Tensor, seen: Tensor, sides: int) -> Tensor:
    """(7) F_yz(y, z) = sum_x a_x(v) A(v), a = softmax over the cells of a side that a camera sees.

    A (B, X, Y, Z, C), score, seen (B, X, Y, Z, 1) -> (B, sides, 1, Y, Z, C).
    """
    A, score, seen = (v.unflatten(1, (sides, -1)) for v in (A, score, seen))
    return (A * softmax_along_x(score, seen)).sum(2, keepdim=True)


def softmax_along_x(scores: Tensor, seen: Tensor | None = None) -> Tensor:
    """(8) F_x(x; y, z) = softmax_x of (B, sides, X, Y, Z, 1), over the cells `seen`, 0 elsewhere."""
    scores = scores - scores.amax(2, keepdim=True).detach()
    share = scores.exp() if seen is None else scores.exp() * seen
    return share / (share.sum(2, keepdim=True) + 1e-6)


class DetailHead(nn.Module):
    """(10), (14) A deconvolution of the lifted grid, plus the occupied cells' rows, ReLU, a linear layer."""

    def __init__(self, cfg: Config, c_rows: list[int], outputs: int):
        super().__init__()
        hidden, self.split = cfg.head_channels, cfg.cell_split
        self.spread = nn.Linear(cfg.grid_channels, hidden * math.prod(self.split))
        self.rows = nn.ModuleList(
            nn.Sequential(nn.Linear(c, 2 * hidden), nn.ReLU(), nn.Linear(2 * hidden, hidden)) for c in c_rows)
        self.last = nn.Linear(hidden, outputs)

    def features(self, grid: Tensor, rows: list[tuple[Tensor, Tensor]]) -> Tensor:
        """grid (B, X', Y', Z', C), rows [(values (V, c), cell (V,))] -> (B, X, Y, Z, hidden)."""
        x = self.spread(grid).unflatten(-1, (*self.split, -1)).permute(0, 1, 4, 2, 5, 3, 6, 7)
        x = x.flatten(5, 6).flatten(3, 4).flatten(1, 2)  # (B, X, Y, Z, hidden)
        values = torch.cat([layer(value) for layer, (value, _) in zip(self.rows, rows, strict=True)])
        cells = torch.cat([cell for _, cell in rows])
        return F.relu(x.flatten(0, 3).index_add(0, cells, values.to(x.dtype)).view(x.shape))

    def forward(self, features: Tensor) -> Tensor:
        """(B, X, Y, Z, hidden) -> logits (B, X, Y, Z, outputs)."""
        return self.last(features).float()


class Branches(nn.Module):
    """Both branches, as decoupled tasks: the first stage trains these alone."""

    def __init__(self, cfg: Config, pretrained: bool = True, geometric: Callable = GeometricBranch):
        super().__init__()
        self.semantic, self.geometric = SemanticBranch(cfg, pretrained), geometric(cfg, pretrained)

    def forward(self, batch: dict) -> dict:
        return {"semantic": self.semantic(batch), "geometric": self.geometric(batch)}


# --- 2B  Semi-supervised geometry (11) ----------------------------------------------------------------------


class Teacher(nn.Module):
    """(11) theta' <- a theta' + (1 - a) theta: the mean teacher, a copy of the geometric branch."""

    def __init__(self, branches: nn.Module, momentum: float):
        super().__init__()
        self.branch, self.momentum = copy.deepcopy(branches.geometric).requires_grad_(False), momentum

    @torch.no_grad()
    def forward(self, batch: dict, t: int, steps: int) -> tuple[Tensor, Tensor]:
        """Step t of `steps` -> occupancy targets, weights (B, X, Y, Z) of the frames without labels."""
        teacher = self.branch(weak_view(batch)).occupancy.sigmoid()
        return semi_targets(batch["sensor"], teacher, ramp(t, steps))

    @torch.no_grad()
    def update(self, branches: nn.Module, t: int) -> None:
        """After step t = 0, 1, ...; buffers are copied."""
        rate = ema_rate(t, self.momentum)
        for mean, one in zip(self.branch.parameters(), branches.geometric.parameters(), strict=True):
            mean.lerp_(one, 1 - rate)
        for mean, one in zip(self.branch.buffers(), branches.geometric.buffers(), strict=True):
            mean.copy_(one)


def weak_view(batch: dict) -> dict:
    """The frames without labels, weakly augmented."""
    still = {name: batch[name][batch["labelled"] :] for name in ("K", "T_ego_cam")}
    return still | {name: batch[f"weak_{name}"] for name in ("images", "points", "history")}


def ema_rate(t: int, m: float) -> float:
    """a = min(1 - 1 / (t + 1), m) at step t = 0, 1, ...: at t = 0 the teacher becomes the student."""
    return min(1 - 1 / (t + 1), m)


def ramp(t: int, steps: int, share: float = 0.3) -> float:
    """Weight of consistency, Laine and Aila's: exp(-5 (1 - t / T)^2) up to T = share * steps, then 1."""
    return 1.0 if t >= share * steps else math.exp(-5 * (1 - t / (share * steps)) ** 2)


def semi_targets(sensor: Tensor, teacher: Tensor, ramp: float, tau_pos: float = 0.9,
                 tau_neg: float = 0.1) -> tuple[Tensor, Tensor]:
    """o' > tau+ -> 1, o' < tau- -> 0, else ignored; LiDAR hits always 1, cells that its rays cross 0.

    sensor uint8: 1 hit, 0 free, 255 unknown; teacher: probabilities -> targets and weights, all (B, X, Y, Z).
    The teacher's targets weigh `ramp`. tau: assumption.
    """
    value, weight = (teacher > tau_pos).float(), ((teacher > tau_pos) | (teacher < tau_neg)).float() * ramp
    value = value.masked_fill(sensor == 0, 0).masked_fill(sensor == 1, 1)
    return value, weight.masked_fill(sensor != IGNORE, 1)


def sensor_targets(points: Tensor, origin: Tensor, cells: VoxelGrid, short: float) -> Tensor:
    """The current sweep's hits and rays: points (M, >= 3) [m], origin (3,) of the sensor -> (X, Y, Z) uint8.

    1: a return lies in the cell. 0: a ray crosses it more than `short` metres before its return, and none
    lies in it. 255: unknown.
    """
    index, inside = cells.index(points[:, :3])
    ray = points[:, :3].double() - origin.double()
    left = 1 - short / ray.norm(dim=1, keepdim=True).clamp_min(1e-3)
    free = traversed(origin.double(), (origin.double() + ray * left)[left[:, 0] > 0], cells)
    sensor = torch.where(free, 0, IGNORE).to(torch.uint8)
    sensor[tuple(index[inside].unbind(-1))] = 1
    return sensor


def semi_loss(logits: Tensor, target: Tensor, weight: Tensor) -> Tensor:
    """Binary cross-entropy times weight, a mean over the cells that have one, then over samples."""
    loss = F.binary_cross_entropy_with_logits(logits.float(), target, weight, reduction="none")
    return (loss.flatten(1).sum(1) / (weight > 0).flatten(1).sum(1).clamp_min(1)).mean()


# --- 2C  Dual Mamba (12), (13), fusion and head (14) --------------------------------------------------------


class DualMamba(nn.Module):
    """(12) S' = S + Mamba_s(LN S), G' = G + Mamba_g(LN G);  (13) [s_1, g_1, s_2, g_2, ...] -> Mamba -> split.

    Grids (B, X', Y', Z', C) twice -> the same. Tokens are in 3D Hilbert order, with a learned position. With
    a stride a token is the mean of its cells, and its change is added to them, interpolated trilinearly.
    """

    def __init__(self, channels: int, shape: tuple[int, int, int], stride: tuple[int, int, int], d_state: int,
                 expand: int):
        super().__init__()
        if any(n % s for n, s in zip(shape, stride, strict=True)):
            raise InputError(f"--mamba-stride {stride}: does not divide {shape} lifted cells")
        self.stride, self.shape = stride, tuple(n // s for n, s in zip(shape, stride, strict=True))
        with torch.device("cpu"):
            order = hilbert_order(self.shape)
            axes = [torch.linspace(-1, 1, n) if n > 1 else torch.zeros(1) for n in self.shape]
            place = torch.stack(torch.meshgrid(*axes, indexing="ij"), -1).flatten(0, 2)[order]  # (L, 3)
        for name, value in (("order", order), ("inverse", order.argsort()), ("place", place)):
            self.register_buffer(name, value, persistent=False)
        self.position = nn.Sequential(nn.Linear(3, channels), nn.ReLU(), nn.Linear(channels, channels))
        blocks = (MambaBlock(channels, d_state, expand=expand) for _ in range(3))
        self.intra_s, self.intra_g, self.cross = blocks

    def blocks(self, s: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
        """Two sequences (B, L, C) through the blocks."""
        s, g = self.intra_s(s), self.intra_g(g)  # (12)
        both = self.cross(torch.stack([s, g], 2).flatten(1, 2))  # (B, 2 L, C)  (13)
        return both.unflatten(1, (-1, 2)).unbind(2)

    def forward(self, s: Tensor, g: Tensor) -> list[Tensor]:
        order, inverse, place = (v.to(s.device) for v in (self.order, self.inverse, self.place))
        pooled = [F.avg_pool3d(x.movedim(-1, 1), self.stride).flatten(2).transpose(1, 2) for x in (s, g)]
        tokens = [x[:, order] + self.position(place.to(s.dtype)) for x in pooled]  # (B, L, C)
        added = []
        for x, before, after in zip((s, g), tokens, self.blocks(*tokens)):
            change = (after - before)[:, inverse].transpose(1, 2).unflatten(2, self.shape)  # (B, C, x, y, z)
            change = F.interpolate(change, x.shape[1:4], mode="trilinear", align_corners=False)
            added.append(x + change.movedim(1, -1))
        return added


class OccLE(nn.Module):
    """Images and LiDAR -> branches -> Dual Mamba -> logits; with the network protocol of this repository."""

    def __init__(self, cfg: Config, pretrained: bool = True, branches: Callable = Branches):
        super().__init__()
        self.labels, (self.grid, lifted), C = LABEL_SETS[cfg.format], grids(cfg), cfg.grid_channels
        self.branches = branches(cfg, pretrained)
        self.fusion = DualMamba(C, lifted.shape, cfg.mamba_stride, cfg.d_state, cfg.expand)
        self.mix, self.channels = conv_norm_relu(C, C, "group", dims=3), cfg.head_channels
        self.last = DetailHead(cfg, [cfg.unet_channels[0], VOXEL_CHANNELS], self.labels.solid + 1)  # (14)
        nn.init.constant_(self.last.last.bias[-1], PRIOR)

    def fuse(self, s: Tensor, g: Tensor) -> Tensor:
        """(13) F = Conv(S'' + G''): (B, X', Y', Z', C) twice -> once."""
        return conv3d(self.mix, sum(self.fusion(s, g)))

    def cells(self, out: dict) -> Tensor:
        """The branches' outputs -> features of the predicted cells (B, X, Y, Z, hidden)."""
        semantic, geometric = out["semantic"], out["geometric"]
        rows = [(semantic.detail, semantic.voxels.cell), (geometric.voxels.features, geometric.voxels.cell)]
        return self.last.features(self.fuse(semantic.grid, geometric.grid), rows)

    def forward(self, batch: dict) -> dict:
        """The one entry that training uses (so that DDP sees it): both branches' outputs, and logits (14)."""
        out = self.branches(batch)
        return out | {"logits": self.last(self.cells(out))}

    def voxels(self, batch: dict) -> Tensor:
        """batch: images, K, T_ego_cam, points a list of (M, >= 4), perhaps history -> (B, C, X, Y, Z)."""
        return self.cells(self.branches(batch)).movedim(-1, 1)

    def head(self, features: Tensor) -> Tensor:
        """(B, C, X, Y, Z) -> logits (B, S + 1, X, Y, Z) in the order of the dataset's ids."""
        logits = self.last(features.movedim(1, -1)).movedim(-1, 1)
        return logits[:, np.argsort(self.labels.ids).tolist()]


def build(cfg: Config, classes: int | None = None, pretrained: bool = True) -> OccLE:
    """The network protocol: net.grid, net.channels, net.voxels(batch), net.head(features)."""
    known = LABEL_SETS[cfg.format].solid + 1
    if classes not in (None, known):
        raise InputError(f"{classes} classes: {cfg.format} has {known}")
    return OccLE(cfg, pretrained)


# --- 2D  Scatter-accumulated projection (15), (16) ----------------------------------------------------------


def project_logits(logits: Tensor, K: Tensor, T_ref_cam: Tensor, size: tuple[int, int], cells: VoxelGrid,
                   mode: str) -> tuple[Tensor, Tensor]:
    """(15) u_v = floor(K T v), and the box of cell v around it; p_v = softmax of Y_v over the S classes,
    without empty; (16) A[u, c] = sum_{v: u in u_v} w_v p_v[c], Shat = A / sum w.

    logits (X, Y, Z, S + 1) of one frame, K (N, 3, 3) for images of `size` (h, w), T_ref_cam (N, 4, 4) -> Shat
    (N, S, h, w), sum w (N, h, w). w_v is the occupancy of v (mode plain: accumulation), or that times what
    nearer cells let through (depth); it has no gradient. Cells less than 5 % occupied are left out.
    """
    logits, half = logits.flatten(0, 2), logits.new_tensor(cells.voxel_size) / 2
    odds = (logits[:, :-1].logsumexp(1) - logits[:, -1]).detach()  # log P(occupied) / P(empty)
    on, T = (odds > math.log(0.05 / 0.95)).nonzero()[:, 0], invert(T_ref_cam)
    uv, depth = project(cells.centers(device=T.device).flatten(0, 2)[on], K, T)  # (N, V, 2), (N, V)
    depth = depth.where(depth > 2 * half.max(), -1)  # a nearer cell covers everything
    A = K @ T[:, :3, :3]  # d(u, v) / d(x, y, z) = (A[:2] - uv A[2]) / depth: the box, to first order
    box = ((A[:, None, :2] - uv[..., None] * A[:, None, 2:]).abs() @ half.to(A)) / depth[..., None].abs()
    out = scatter_project(logits[on, :-1].softmax(1), odds[on].sigmoid(), uv, depth, *size, mode, extent=box)
    return out.image / (out.weight[:, None] + 1e-6), out.weight


# --- 3  Losses ----------------------------------------------------------------------------------------------


class Weights(NamedTuple):
    """Class weights."""

    maps: Tensor  # (S,) of the segmentations and the projection, from pseudo labels
    truth: Tensor  # (S + 1,) of completion, from labelled frames


def segmentation_losses(semantic: Semantic, batch: dict, weight: Tensor) -> dict[str, Tensor]:
    """(17) CE_w of s against sbar, (18) CE_w + Lovasz of S against Sbar: w by class; means over samples."""
    each, target = [], batch["target3d"].flatten()[semantic.voxels.cell]  # (V,)
    for logits, own in zip(*(v.split(semantic.voxels.count) for v in (semantic.seg3d, target)), strict=True):
        logits, own = logits.t()[None], own[None]  # (1, S, V_b), (1, V_b)
        each.append(cross_entropy(logits, own, weight, IGNORE) + lovasz_softmax(logits, own, IGNORE))
    return {"2d": cross_entropy(semantic.seg2d.transpose(1, 2), batch["target2d"], weight, IGNORE),
            "3d": torch.stack(each).mean()}


def geometry_loss(occupancy: Tensor, truth: Tensor, empty: int) -> Tensor:
    """(19) BCE(o, occupied) + geo_scal. occupancy (B, X, Y, Z) logits, truth the same shape, inner ids."""
    known, full = truth != IGNORE, truth < empty
    binary = torch.stack([torch.zeros_like(occupancy), occupancy], 1)  # (B, 2, X, Y, Z)
    scal = geo_scal(binary, torch.where(known, full.long(), IGNORE), 0, IGNORE, per_sample=True)
    return semi_loss(occupancy, full.float(), known.float()) + scal


def completion_losses(logits: Tensor, truth: Tensor, weight: Tensor) -> dict[str, Tensor]:
    """(21) CE_w + sem_scal + geo_scal, w by class; logits (B, X, Y, Z, S + 1), truth (B, X, Y, Z)."""
    logits = logits.movedim(-1, 1)
    return {"ce": cross_entropy(logits, truth, weight, IGNORE),
            "sem_scal": sem_scal(logits, truth, IGNORE, per_sample=True),
            "geo_scal": geo_scal(logits, truth, len(weight) - 1, IGNORE, per_sample=True)}


def projection_loss(logits: Tensor, batch: dict, weight: Tensor, cfg: Config, mode: str = "depth") -> Tensor:
    """(20) CE_w(log Shat[u], sbar[u]), w by class, over pixels that a cell covers and that are not sky.

    logits (B, X, Y, Z, S + 1) of the frames without labels, the last ones of the batch; mean over samples.
    """
    first, image = batch["labelled"], batch["images"].shape[-2:]
    size = (image[0] // cfg.scatter_stride, image[1] // cfg.scatter_stride)
    each, maps = [], nearest_ids(batch["target2d"][first:], size).long()  # (B, N, h, w)
    for one, sbar, K, T in zip(logits, maps, batch["K"][first:], batch["T_ego_cam"][first:], strict=True):
        shown, light = project_logits(one, scale_to(K, image, size), T, size, grids(cfg)[0], mode)
        known = (sbar != IGNORE) & (light >= 0.05)
        label = sbar.where(known, 0)
        mass = weight[label] * known  # (N, h, w)
        nll = -shown.gather(1, label[:, None])[:, 0].clamp_min(1e-6).log()
        each.append((mass * nll).sum() / mass.sum().clamp_min(1e-6))
    return torch.stack(each).mean()


# --- 4  The 10 % protocol -----------------------------------------------------------------------------------


def choose_labelled(scenes: list[str], ratio: float, by: str, seed: int) -> list[int]:
    """Indices of the frames that have labels, about `ratio` of all, at least one.

    frames: every (1/ratio)-th frame, counted on from scene to scene, so that short scenes keep the ratio; the
    seed moves the first. scenes: all frames of drawn scenes, rounded up. random: drawn frames.
    """
    if not 0 < ratio <= 1:
        raise InputError(f"--label-ratio {ratio}: expected more than 0, at most 1")
    count, rng = len(scenes), np.random.default_rng([seed, 10])
    wanted = max(1, round(ratio * count))
    if by == "frames":
        phase = (seed * 0.6180339887) % 1
        return sorted({int((k + phase) * count / wanted) for k in range(wanted)})
    if by == "random":
        return sorted(rng.permutation(count)[:wanted].tolist())
    names = sorted(set(scenes))
    chosen = {names[k] for k in rng.permutation(len(names))[: math.ceil(ratio * len(names) - 1e-9)]}
    return [i for i, scene in enumerate(scenes) if scene in chosen]


# --- 5  Data items ------------------------------------------------------------------------------------------


class Samples:
    """What a training step reads of a frame: images, sweeps, pseudo labels, ground truth or hits and rays.

    folder: of the pseudo labels. kind: "semantic", aligned, or "primary", the first source alone.
    """

    def __init__(self, dataset, folder: Path, labelled: list[int], cfg: Config, kind: str = "semantic",
                 strong: bool = True):
        self.dataset, self.folder, self.labelled, self.cfg = dataset, folder, frozenset(labelled), cfg
        self.kind, self.strong, self.labels, self.cells = kind, strong, LABEL_SETS[cfg.format], grids(cfg)[0]

    def truth(self, i: int) -> Tensor:
        """(X, Y, Z) uint8 inner ids of the predicted cells, 255: not supervised; of labelled frames alone."""
        if i not in self.labelled:
            raise RuntimeError(f"ground truth of frame {self.dataset.tokens[i]}, which has no label")
        truth = torch.from_numpy(voxel_truth(self.dataset, i, self.labels))
        return coarsen(truth, self.cfg.grid_stride, self.labels.solid)

    def pseudo_label(self, i: int) -> Tensor:
        """sbar of frame i: (N, h, w) uint8 inner ids, 255 = none."""
        labels, files = self.labels, self.dataset.camera_files(i)
        path = map_paths(self.folder, self.kind, files)[0]
        if not path.is_file():
            raise InputError(f"{path}: no label of this frame; make it with the verb labels")
        ids = read_semantic(self.folder, files, labels.map_ids(), labels.none, self.kind)
        return torch.from_numpy(np.where(ids == labels.none, np.uint8(IGNORE), labels.inner(ids)))

    def fixed(self, i: int, labelled: bool) -> dict[str, Tensor]:
        """The fields of a frame that no augmentation changes, and its images and points as they are."""
        item, sbar, cells = inputs(self.dataset[i]), self.pseudo_label(i), self.cells
        size = tuple(item["images"].shape[-2:])
        cell, label = lift_labels(item["points"], sbar, item["K"], item["T_ego_cam"], size, cells,
                                  self.labels.solid)
        target3d = torch.full((math.prod(cells.shape),), IGNORE, dtype=torch.uint8)
        target3d[cell] = label.to(torch.uint8)
        item |= {"target2d": nearest_ids(sbar, (-(-size[0] // 4), -(-size[1] // 4))),
                 "target3d": target3d.view(cells.shape)}
        if labelled:
            return item | {"truth": self.truth(i)}
        origin = torch.from_numpy(np.asarray(self.dataset.T_ego_lidar(i))[:3, 3].copy())
        return item | {"sensor": sensor_targets(item["points"], origin, cells, self.cfg.ray_short)}

    def __call__(self, place: tuple[int, bool], rng: np.random.Generator) -> dict[str, Tensor]:
        """(frame, with its label?) -> its fields without a batch axis."""
        item, labelled = self.fixed(*place), place[1]
        seen = augment(item, rng, strong=self.strong and not labelled)
        weak = {} if labelled else augment(item, rng, strong=False)
        return item | seen | {f"weak_{name}": value for name, value in weak.items()}


def inputs(frame: Frame) -> dict[str, Tensor]:
    """What the network reads of a frame: images, K, T_ego_cam, points and the earlier sweeps' history."""
    if frame.points is None:
        raise InputError("--images: OccLE reads a LiDAR sweep too; give it with --points FILE")
    history = frame.points[:0] if frame.history is None else frame.history
    return verbs.inputs(frame) | {"points": frame.points, "history": history}


def augment(item: dict[str, Tensor], rng: np.random.Generator, strong: bool, jitter: float = 0.2,
            drop: float = 0.05) -> dict[str, Tensor]:
    """Images and points, weakly augmented: colour jitter, 5 % of the points left out; labels stay in place.

    strong: twice the jitter, perhaps grey, a box cut out of each image, a third of the points left out and
    the others moved by 2 cm, perhaps no earlier sweeps. All numbers: assumption.
    """
    images, jitter = item["images"], 2 * jitter if strong else jitter
    brightness, contrast, saturation = (1 + jitter * rng.uniform(-1, 1, 3)).tolist()
    images = images * brightness
    images = (images - images.mean()) * contrast + images.mean()
    grey = images.mean(1, keepdim=True)
    images = (grey + (images - grey) * (0.0 if strong and rng.random() < 0.1 else saturation)).clamp(0, 1)
    if strong:
        H, W = images.shape[-2:]
        images = images.clone()
        for one in images:
            h, w = int(H * rng.uniform(0.1, 0.4)), int(W * rng.uniform(0.1, 0.3))
            y, x = int(rng.integers(H - h + 1)), int(rng.integers(W - w + 1))
            one[:, y : y + h, x : x + w] = 0.5
    out, drop = {"images": images}, 0.33 if strong else drop
    for name in ("points", "history"):
        cloud = item[name]
        order = rng.permutation(len(cloud))[: len(cloud) - int(drop * len(cloud))]  # cells keep the first few
        out[name] = cloud[torch.from_numpy(order)]
        if strong:
            out[name][:, :3] += 0.02 * torch.from_numpy(rng.standard_normal((len(order), 3), np.float32))
    if strong and rng.random() < 0.3:
        out["history"] = out["history"][:0]
    return out


def stack_items(items: list[dict[str, Tensor]], device: torch.device | str, n: int = 0) -> dict:
    """Items, the first n labelled -> a batch: tensors with a leading axis, clouds as lists; "labelled": n."""
    batch: dict = {"labelled": n}
    for name in dict.fromkeys(name for item in items for name in item):
        values = [item[name].to(device) for item in items if name in item]
        batch[name] = values if name.endswith(("points", "history")) else torch.stack(values)
    return batch


# --- 6  Train -----------------------------------------------------------------------------------------------


def train(cfg: Config, dataset, labels: Path, args, network=OccLE, teacher=Teacher, samples=Samples,
          step=one_step, branches: Path | None = None) -> None:
    """Learn in two stages: both branches apart in <out>/1-branches, then everything in <out>/2-fusion.

    network, teacher, samples, step: an experiment's own. branches: folder of a first stage that runs share.
    """
    labelled, rest, rule = split_frames(dataset, cfg, args.seed, args.label_list)
    if cfg.format == "semantickitti":
        cfg = replace(cfg, label_shift=dataset.measure_label_shift(labelled[0]))
    data, world, S = samples(dataset, labels, labelled, cfg), setup(args.device), LABEL_SETS[cfg.format].solid
    maps = map(data.pseudo_label, spread(len(dataset), 60))  # not ground truth
    counted = (maps, S), (map(data.truth, labelled), S + 1)
    weights = Weights(*(class_weights(*c, rule=cfg.class_weights).to(world.device) for c in counted))
    order = partial(MixedOrder.of, labelled, rest, cfg.batch, cfg.batch_unlabelled)
    steps = cfg.steps or order(world, args.seed).steps(cfg.epochs)
    source, first = data_source(cfg, dataset, labels, labelled, rule), round(cfg.branch_share * steps)
    seen, n = steps * cfg.batch * world.world, len(labelled)  # labelled frames, one after the other
    source["protocol"]["exposures"] = f"{min(seen, n)} distinct labelled frames, {seen / n:.2f} times each"
    folders = branches or args.out / "1-branches", args.out / "2-fusion"
    if world.is_main:
        tokens = [dataset.tokens[i] for i in labelled]
        write_json(args.out / "labelled.json", {"labelled": tokens, "rule": rule})

    for stage, (done, count) in enumerate(((0, first), (first, steps - first))):
        if not count:
            continue
        run = Session(args, cfg, folders[stage], samples=len(data.dataset), batch=cfg.batch, steps=count,
                      source=source | {"stage": folders[stage].name, "after": done}, amp=cfg.amp, order=order)
        if run.finished:
            continue
        net = network(cfg)
        learns = net if stage else net.branches
        saved = nn.ModuleDict({"net": learns, "teacher": teacher(net.branches, cfg.ema)}).to(run.device)
        if done and not run.start:
            load_checkpoint(folders[0], nn.ModuleDict({"net": net.branches, "teacher": saved["teacher"]}))
            run.state = {name: value for name, value in stage_state(folders[0]).items() if name != "step"}
        rates = encoder_rate(cfg.backbone, cfg.lr), cfg.lr
        optimizer = make_optimizer(cfg.optimizer, learns, *rates, 0.01, "encoder.backbone")
        heads = [m for name, m in learns.named_modules() if name.endswith(("last", "header2d", "header3d"))]
        set_apart(optimizer.param_groups, [p for m in heads for p in m.parameters()], orthogonal=False)
        model = run.attach(saved, optimizer, learns, find_unused=not stage)  # what only the fusion reads
        for k, batch in run.batches(data, args.workers, partial(stack_items, device=run.device, n=cfg.batch)):
            lr = set_lr(optimizer, schedule(k, count, "cosine", cfg.warmup))
            terms = step(model, saved["teacher"], batch, done + k, done + count, weights, cfg, run.autocast)
            optimizer.zero_grad(set_to_none=True)
            sum(terms.values()).backward()
            nn.utils.clip_grad_norm_(learns.parameters(), cfg.grad_clip)
            optimizer.step()
            saved["teacher"].update(net.branches, done + k)
            run.log(k, terms, lr)


def split_frames(dataset, cfg: Config, seed: int, path: Path | None) -> tuple[list[int], list[int], str]:
    """-> frames that have labels, by the file at `path` or by the rule; the others; the rule in words."""
    if path is not None:
        labelled, rule = read_frame_list(path, dataset), f"file {path.name}"
    else:
        labelled = choose_labelled(dataset.scene_names, cfg.label_ratio, cfg.label_by, seed)
        rule = f"{100 * cfg.label_ratio:g} % by {cfg.label_by}, seed {seed}"
    return labelled, sorted(set(range(len(dataset))) - set(labelled)), rule


def data_source(cfg: Config, dataset, labels: Path, labelled: list[int], rule: str) -> dict:
    """The entry `data` of config.json."""
    mask = "none" if cfg.format == "occ3d" else "valid: label not 255, not in .invalid"
    protocol = {"annotations": f"{rule}: {len(labelled)} of {len(dataset)} frames"}
    if cfg.truth == "aggregate":
        protocol["voxel_labels"] = "labelled scans before and after, aggregated"
    frames = short_hash([dataset.tokens[i] for i in labelled])
    return verbs.source(dataset, labels, mask) | {"frames": frames, "protocol": protocol}


# --- 7  Predict, command line -------------------------------------------------------------------------------


def saved_modules(cfg: Config, pretrained: bool = True, network=OccLE, teacher=Teacher) -> nn.ModuleDict:
    """What a checkpoint of the second stage holds."""
    net = network(cfg, pretrained)
    return nn.ModuleDict({"net": net, "teacher": teacher(net.branches, cfg.ema)})


@torch.no_grad()
def predict(saved: nn.ModuleDict, frame: Frame) -> np.ndarray:
    """One frame -> the dataset's ids on the label files' grid, uint8: a voxel takes its cell's best class."""
    net = saved["net"]
    logits = net(stack_items([inputs(frame)], next(net.parameters()).device))["logits"]  # (1, X, Y, Z, S + 1)
    return net.labels.outer(refine(logits[0].argmax(-1), net.labels.grid.shape).cpu().numpy())


def open_frames(cfg: Config, *split, **train):
    """A split (as common.nuscenes.open_split) whose frames hold images, points and earlier sweeps."""
    dataset = open_dataset(*split, **train, history=cfg.n_sweeps, truth=cfg.truth)
    if cfg.format == "semantickitti":
        dataset.label_shift = cfg.label_shift
    last = len(dataset) - 1
    if cfg.n_sweeps and last >= 0 and len(dataset.points(last, cfg.n_sweeps)) == len(dataset.points(last)):
        print(f"note: {dataset.root}: no sweeps before {dataset.tokens[last]}; --n-sweeps 0 does without")
    return dataset


KITTI = {  # what a preset changes for SemanticKITTI: one camera that looks ahead, 0.2 m voxels
    "tiny": {"image_size": (128, 416), "grid_stride": (4, 4, 2)},
    "base": {"image_size": (376, 1241), "grid_stride": (2, 2, 2), "cell_split": (2, 2, 2)},
    "paper": {"image_size": (370, 1220)},
}


def for_format(cfg: Config, args) -> Config:
    """The preset's values for the data's format, which the tree decides; a checkpoint's config has them."""
    if args.run is not None:
        return cfg
    kind = format_of(args.data_root) if args.data_root else cfg.format
    if "format" in args.given and cfg.format != kind:
        raise InputError(f"--format {cfg.format}: {args.data_root} is {kind}")
    changes = KITTI[args.preset] if kind == "semantickitti" else {}
    return replace(cfg, format=kind, **{k: v for k, v in changes.items() if k not in args.given})


def describe(cfg: Config, args) -> None:
    """The verb describe."""
    labels, (H, W), B = LABEL_SETS[cfg.format], cfg.image_size, cfg.batch + cfg.batch_unlabelled
    N, M = labels.cameras, labels.points
    verbs.describe(build, cfg, args, lambda: {
        "images": torch.empty(B, N, 3, H, W), "K": torch.empty(B, N, 3, 3),
        "T_ego_cam": torch.empty(B, N, 4, 4), "points": [torch.empty(M, 5)] * B,
        "history": [torch.empty(M * cfg.n_sweeps, 5)] * B})


def main() -> None:
    kind = {"occ3d": "driving", "semantickitti": "kitti"}
    frames = lambda cfg: partial(open_frames, cfg)  # noqa: E731
    learn, what = verbs.VERBS["train"], "two 2D sources, merged: aligned pseudo labels"
    verbs.main(__doc__, Config, PRESETS, {
        "world": lambda cfg, args: verbs.world(cfg, args, kind[cfg.format]),
        "labels": lambda cfg, args: verbs.labels(LABELS, cfg, args, frames(cfg), kind[cfg.format]),
        "train": lambda cfg, args: verbs.train(
            LABELS, train, cfg, args, open_data=frames(cfg), kind=kind[cfg.format]),
        "eval": lambda cfg, args: verbs.evaluate(None, saved_modules, predict, cfg, args, frames(cfg)),
        "predict": lambda cfg, args: verbs.predict_frames(
            saved_modules, predict, cfg, args, partial(verbs.open_eval, open_data=frames(cfg))),
        "describe": describe},
        verbs={"train": (learn[0], f"{learn[1]} label-list"), "labels": (what, verbs.TWO_SOURCES)},
        flags={"label-list": verbs.cli.Flag("JSON {'labelled': [token, ..]}, not --label-by", Path | None)},
        settle=for_format)


if __name__ == "__main__":
    main()
