"""LOC: open-set occupancy guided by language, on dense labels made of fused LiDAR sweeps.

Paper   "LOC: A General Language-Guided Framework for Open-Set 3D Occupancy Prediction", Gao, Xiang, Zhong,
        Wang; arXiv 2510.22141 v1. Independent re-implementation; no code of theirs is known. Beyond the
        abstract no equation, hyper-parameter or number is public: our choices are marked. LOcc (2411.16072),
        whose host network and prompts are borrowed here, is another paper.
Idea    Fuse a scene's LiDAR sweeps, moving objects apart; Poisson reconstruction fills the voids and the
        nearest points name the voxels: a dense label. Put two heads on any occupancy network: one predicts
        occupancy, one a vector in CLIP's space. Contrast voxels with text prompts, densely, instead of
        copying pixel features, so that classes stay apart. A prompt nobody trained on then finds its voxels.

RUN
    python loc.py train --out runs/loc            # writes a world, labels, a tiny CLIP first; two CPU cores
    python loc.py eval --ckpt runs/loc            # known classes, unknown detection, zero-shot, retrieval
    python loc.py query --ckpt runs/loc --text "a tall yellow vehicle with an arm"
    python loc.py predict --ckpt runs/loc --data-root D --out P      # any frames, no ground truth needed
    python loc.py labels --labeler lidar --data-root D --out L       # real data: boxes and lidarseg
    python loc.py ablate --claim contrast         # re-tests a claim of the paper: experiments/loc.py
    python loc.py describe --preset paper         # shapes, parameters, memory: no data, no GPU, no network

GLOSSARY
    symbol  name      shape               meaning                                                     place
    P_s     Scan      (M, 3), (M,)        points of one sweep in the scene's frame [m], their classes  2.2
    y_i     target    (B, X, Y, Z)        class of voxel i, 0..K-1 known, K free, 255 ignored          2.2
    V       features  (B, C, X, Y, Z)     voxel features of the wrapped network                        (1)
    o_i     scores    (B, K+1, X, Y, Z)   logits of the K known classes and of free                    (2)
    f_i     f         (B, S + S', D)      vector of voxel i in CLIP's space; the losses normalise it   (3)
    t_c     text      (K, D)              unit vector of class c's prompts                             2.4
    g_i     image     (B, S', D)          CLIP's patch feature where voxel i projects                 (6), (7)

EQUATION MAP   Numbers are this repository's reconstruction; 2.2 and 2.4 have none.
    2.2  fuse sweeps, fill voids, name voxels  -> dense_labels, densify, name_voxels
         SurroundOcc's recipe for it           -> common/lidar.py: fuse, in_boxes, at_keyframe, fill_voids
    (1)  V = Lift(E_img(I)); LOcc's host       -> wrapped_network; common/networks/lss.py: lift, LiftNet
    (2)  occupancy head                        -> OccupancyHead
    (3)  language head                         -> LanguageHead
    2.4  prompts; ViLD's templates             -> prompt_table; common/networks/tinyclip.py: ensemble
         image features in voxels; held out    -> lift, name_heldout
    (4)  voxel-to-text contrast, its voxels    -> voxel_to_text, Keyframes.sample_classes
    (5)  voxel-to-voxel contrast, off          -> experiments/loc.py: voxel_to_voxel
    (6)  image term, its voxels                -> image_term, Keyframes.sample_pixels
    (7)  inference, unknown score              -> decide, unknown_score
    (8)  total loss                            -> occupancy_loss, dense_contrast, train
    Sec. 6: unknown classes, diversity         -> common/report/openset.py: report, homogenisation
            known classes, AUROC, AUPR, FPR95  -> common/metrics.py: OccupancyMeter, openset_scores

ASSUMPTIONS    All unpublished; the flag or the line that changes it stands beside.
    * (4) on class-balanced voxels, tau .07; (6) on and sparse; (5) off; weights 1   TAU, --lambda-dcl -img
    * k = 5, majority, ties to the nearest point; all sweeps are fused               --knn-k --n-sweeps
    * self-supervised labels read no box and no lidarseg: rays decide what moves     lidar.py: suspects
    * a held-out object takes the known class that the teacher is sure of, one for the scene; it is matter
      without a class where the teacher is not sure (honest), or always (an oracle's mask); an arbitrary
      list is held out                                                               --holdout -mode
    * voxels are named by norm(f + a g), a from F-VLM; known classes would favour f  --image-weight
    * the language head's gradient does not enter the trunk                          --lang-grad
    * t_c is the mean over LOcc's query words in ViLD's 14 templates                 --vocabulary
    * unknown score: mean of both heads' 1 - max known probability                   unknown_score
    * a voxel is novel if its best prompt is, else the occupancy head names it       --known-by
    * a voxel that no ray met, or a column's lowest seen one, is not taught as free  surely_free
    * AdamW and rates are LOcc's; warm-up + cosine stands for its OneCycle           --lr --warmup --steps
DEVIATIONS
    * Poisson runs on the voxel grid, not on an octree of depth 10, and is trimmed where samples are sparse.
      Measured: `ablate --claim label-quality`; ten times as fast as Open3D's recipe on the same steps.
    * the language head is computed at single cells, so its norm is a LayerNorm of each cell, not LOcc's
      GroupNorm over the volume. tiny predicts coarse cells and learns by Muon: compute. Effects: unmeasured.
    * tiny's encoder (common/networks/street.py) has learned classes, words and metric depth; MARGIN decides.

CLAIMS         the paper's, without public numbers: experiments/loc.py; ours are in RESULTS.md
    a contrast > distillation (unknown mIoU, diversity)   b labels + ground truth > labels   c dense > sparse
    d wrapping keeps known classes, adds open set  e two heads > each   f image term on > off   g f + g > f, g
"""

from __future__ import annotations

import importlib
import math
import sys
from dataclasses import dataclass, replace
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from scipy import ndimage
from torch import Tensor, nn
from tqdm import tqdm

from common import cli, verbs
from common.backbones import conv_norm_relu, encoder_rate
from common.engine import Session
from common.files import InputError, read_json, read_npz, short_hash, write_npz
from common.frozen import frozen_views
from common.geometry import OCC3D, coarsen
from common.labelers import rasterize
from common.labels import IGNORE, LabelMaker, each, read_label, weights_of
from common.lidar import (Now, Scene, at_keyframe, best_pixels, check_supervision, fill_voids, fuse, majority,
                          move, nearest_points, occupy, open_scans, read_sweeps, seen_space)
from common.losses import cross_entropy, lovasz_softmax, occupancy_cross_entropy
from common.networks import lss, tinyclip
from common.nuscenes import FREE, OCC3D_CLASSES, Frame, NuScenesOccupancy
from common.report import openset
from common.report.occupancy import chosen, ground_truth, report, spread
from common.train import Run, barrier, make_optimizer, schedule, set_lr, setup
from common.worlds import is_world, make

TAU = 0.07  # temperature of the contrasts and of the language head's probabilities; assumption
SURE = 0.5  # the teacher's least probability of a held-out object's known label; assumption
UNNAMED = 254  # in targets: matter whose class training may not know
MARGIN = 1.0  # ours: known matter outweighs free by e^MARGIN: there IoU peaks in a world of another seed
IMAGE_WEIGHT = 0.65 / 0.35  # a of (7): F-VLM's shares of CLIP and of what learned, for unlabelled classes

# --- 1  Configuration ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Config:
    # network
    network: Literal["lss", "easyocc", "occle"] = "lss"  # what is wrapped; the paper wraps several, unnamed
    network_preset: str = "paper"  # sizes in common/networks/lss.py, or the preset of easyocc, occle
    mode: Literal["supervised", "selfsup"] = "supervised"  # Sec. 1: K + 1 logits, or occupied and free
    image_size: tuple[int, int] = (256, 704)  # [px] height, width; LOcc-BEVDet
    backbone: str = "microsoft/resnet-50"  # hub id, local path, or "conv"; LOcc-BEVDet
    occ_hidden: int = 64  # channels of (2)'s 3x3x3 convolution, LOcc 32 to 128; 0: none; tiny: CPU
    lang_kernel: Literal[1, 3] = 3  # of (3)'s convolution; LOcc: 3; tiny: CPU
    # language and open set
    clip: str | None = "openai/clip-vit-base-patch16"  # hub id or folder; none: the tiny CLIP, made if needed
    clip_dim: int = 512  # D; ViT-B/16
    clip_image: tuple[int, int] = (448, 896)  # [px] at which CLIP reads the images; assumption
    lang_grad: bool = False  # whether the language head's gradient enters the trunk; ours
    language: Literal["3d-unseen", "name-unseen"] = "3d-unseen"  # whether captions name the held-out classes
    vocabulary: str = "data/openset/vocabulary.txt"  # class: query words; LOcc's table
    holdout: str = "data/openset/rare.txt"  # held-out classes, a file; assumption
    holdout_mode: Literal["nearest", "ignore"] = "nearest"  # a held-out object in training; assumption
    # labels
    fuse: bool = True  # Sec. 2.2; off: each keyframe's own sweep alone
    n_sweeps: int = 0  # sweeps of a scene that are fused, keyframes first; 0: all, SurroundOcc's code
    poisson: bool = True  # Sec. 2.2; off: voxels with points alone
    knn_k: int = 5  # Sec. 2.2, the number is an assumption; 1: SurroundOcc's code
    gt: bool = False  # Sec. 1: ground truth where a sensor saw it, labels elsewhere
    # losses
    dcl_samples: int = 128  # voxels per class and keyframe in (4); assumption
    image_samples: int = 2048  # voxels with a projected LiDAR point per keyframe in (6); assumption
    lambda_dcl: float = 1.0  # (8), assumption
    lambda_img: float = 1.0  # (6), assumption
    lambda_depth: float = 0.05  # of the lss network's LiDAR depth; LOcc-BEVDet
    l_free: float = 0.0  # ours, tiny: > 0 factors (8)'s cross-entropy, free against occupied weighs this
    # optimisation
    batch: int = 1  # keyframes per process; assumption
    optimizer: Literal["adamw", "muon"] = "adamw"  # LOcc; muon: common/train.py
    steps: int = 93_000  # LOcc
    lr: float = 3e-4  # LOcc
    weight_decay: float = 0.01  # LOcc
    warmup: int = 4650  # [steps] LOcc: 5 % of a one-cycle schedule
    jitter: float = 0.5  # probability of brightness and contrast jitter; ours
    amp: Literal["off", "bf16"] = "bf16"  # ours


PRESETS = {
    "tiny": Config(  # two CPU cores, minutes
        network_preset="tiny", image_size=(112, 200), backbone="street-depth+frozen", occ_hidden=0,
        lang_kernel=1, clip=None, clip_dim=64, clip_image=(112, 200), dcl_samples=64, image_samples=512,
        lambda_dcl=0.5, lambda_img=0.5, lambda_depth=0.3, l_free=1.0, optimizer="muon", steps=600, lr=1e-2,
        weight_decay=0.6, warmup=20, jitter=1.0, amp="off"),
    "base": Config(network_preset="base", batch=2, steps=60_000, warmup=3000),  # one 24 GB GPU
    "paper": Config(),
}

# --- 2.2  Dense labels: fuse sweeps, moving objects apart -> Poisson fills voids -> k nearest points name ---


def name_voxels(scene: Scene, now: Now, index: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Occupied voxels (V, 3) -> class (V,), its share: the majority of the k nearest labelled points."""
    centers = np.asarray(scene.grid.lower) + (index + 0.5) * np.asarray(scene.grid.voxel_size)
    return majority(nearest_points(scene, now, centers, k))


def densify(scene: Scene, i: int, cfg: Config, name=name_voxels) -> dict[str, np.ndarray]:
    """The label of keyframe i from its fused scene, the paper's three steps; -> arrays (X, Y, Z) uint8."""
    now, grid = at_keyframe(scene, i), scene.grid  # static map and moving objects where they are now
    hit = occupy(now.points, grid)
    occupied = hit | fill_voids(now.surface, now.normals, grid) if cfg.poisson else hit
    semantics, share = np.full(grid.shape, scene.free, np.uint8), np.zeros(grid.shape, np.float32)
    semantics[occupied], share[occupied] = name(scene, now, np.argwhere(occupied), cfg.knn_k)
    return {"semantics": semantics, "mask_camera": (seen_space(scene, i) | occupied).astype(np.uint8),
            "mask_lidar": hit.astype(np.uint8), "confidence": (share * 255).round().astype(np.uint8)}


def dense_labels(dataset, indices: list[int], labeler, cfg: Config, todo: set[int], name=name_voxels):
    """One scene, keyframes `indices` in order of time: yield (keyframe, its label's arrays) for `todo`."""
    sweeps = read_sweeps(dataset, indices, labeler, most=cfg.n_sweeps if cfg.fuse else 1)
    scene = fuse(sweeps, surfaces=cfg.poisson) if cfg.fuse else None
    for i in sorted(todo):
        yield i, densify(scene or fuse(sweeps.only(i), surfaces=cfg.poisson), i, cfg, name)


LABELS = LabelMaker(dense_labels, ("fuse", "n_sweeps", "poisson", "knn_k"), check=check_supervision,
                    options={"world": {"depth_level": "exact"}, "files": {"depth": False},
                             "lidar": {"scale": 0.05, "seen_only": False}})

# --- 2.3  Network: any that keeps the network protocol, and two heads ---------------------------------------


def wrapped_network(cfg: Config, classes: int = 18, pretrained: bool = True) -> nn.Module:
    """(1) V = Lift(E_img(I)): LOcc's host, or another method's network by the protocol, imported only now."""
    with torch.device("cpu"):
        method = lss if cfg.network == "lss" else importlib.import_module(cfg.network)
    if cfg.network_preset not in method.PRESETS:
        raise InputError(f"--network-preset {cfg.network_preset}: {cfg.network}.py has "
                         f"{', '.join(method.PRESETS)}")
    preset = method.PRESETS[cfg.network_preset]
    if method is lss:
        return lss.LiftNet(preset, cfg.backbone, classes, pretrained)
    return method.build(replace(preset, image_size=cfg.image_size), classes, pretrained)


build = wrapped_network  # the network protocol of this repository


class OccupancyHead(nn.Module):
    """(2) features (B, C, X, Y, Z) -> logits (B, K + 1, X, Y, Z), free last. Self-supervised: K = 1."""

    def __init__(self, channels: int, hidden: int, classes: int):
        super().__init__()
        self.first = conv_norm_relu(channels, hidden, "group", dims=3) if hidden else nn.Identity()
        self.last = nn.Linear(hidden or channels, classes + 1)  # of each cell

    def forward(self, features: Tensor) -> Tensor:
        return self.last(self.first(features).movedim(1, -1)).movedim(-1, 1).contiguous().float()


class LanguageHead(nn.Module):
    """(3) features (B, C, X, Y, Z), cells (B, S) flat index -> (B, S, D) in CLIP's space, not normalised.

    A convolution of `kernel`^3, norm, ReLU and a linear map, computed at the cells asked for alone.
    """

    def __init__(self, channels: int, dim: int, kernel: int, hidden: int = 128):  # hidden: LOcc
        super().__init__()
        self.kernel, self.first = kernel, nn.Linear(channels * kernel**3, hidden)
        self.norm, self.last = nn.LayerNorm(hidden), nn.Linear(hidden, dim)

    def forward(self, features: Tensor, cells: Tensor) -> Tensor:
        return self.last(F.relu(self.norm(self.first(self.neighbours(features, cells))))).float()

    def neighbours(self, features: Tensor, cells: Tensor) -> Tensor:
        """-> (B, S, kernel^3 C): the features around each cell, zeros outside the grid."""
        r, steps = self.kernel // 2, torch.arange(self.kernel, device=cells.device)
        padded = F.pad(features, (r,) * 6)
        at = torch.stack(torch.unravel_index(cells, features.shape[2:]), -1)  # (B, S, 3)
        at = at[..., None, :] + torch.cartesian_prod(steps, steps, steps)  # (B, S, kernel^3, 3)
        Y, Z = padded.shape[3:]
        flat = ((at[..., 0] * Y + at[..., 1]) * Z + at[..., 2]).flatten(1)  # (B, S kernel^3)
        rows = padded.flatten(2).transpose(1, 2)  # (B, X Y Z, C)
        return rows.gather(1, flat[..., None].expand(-1, -1, rows.shape[-1])).view(*cells.shape, -1)


class Loc(nn.Module):
    """A network and its two heads."""

    def __init__(self, cfg: Config, pretrained: bool = True):
        super().__init__()
        self.net, words = wrapped_network(cfg, 18, pretrained), read_vocabulary(cfg)
        self.grid, self.classes = self.net.grid, len(words.known) if cfg.mode == "supervised" else 1
        if any(n % m for n, m in zip(OCC3D.shape, self.grid.shape, strict=True)):
            raise InputError(f"--network {cfg.network}: its {self.grid.shape} cells do not divide Occ3D's "
                             f"{OCC3D.shape}")
        self.stride = tuple(n // m for n, m in zip(OCC3D.shape, self.grid.shape, strict=True))
        self.occupancy = OccupancyHead(self.net.channels, cfg.occ_hidden, self.classes)
        self.language = LanguageHead(self.net.channels, cfg.clip_dim, cfg.lang_kernel)
        self.lang_grad, self.apart = cfg.lang_grad, cfg.l_free > 0

    def voxels(self, batch: dict) -> tuple[Tensor, Tensor | None]:
        """-> V (B, C, X, Y, Z), and the lss network's depth logits."""
        depth = hasattr(self.net, "voxels_and_depth")
        return self.net.voxels_and_depth(batch) if depth else (self.net.voxels(batch), None)

    def forward(self, batch: dict) -> dict[str, Tensor]:
        """-> scores (B, K + 1, X, Y, Z), f (B, S, D) at batch["cells"] (B, S), the lss network's depth."""
        features, depth = self.voxels(batch)
        read = features if self.lang_grad else features.detach()
        out = {"scores": self.occupancy(features), "f": self.language(read, batch["cells"])}
        return out if depth is None else out | {"depth": depth}


# --- 2.4  Language: prompts, CLIP, held-out classes ---------------------------------------------------------


class Words(NamedTuple):
    """Known classes, held-out (novel) classes, and the words for each."""

    known: list[int]  # Occ3D ids
    novel: list[int]  # Occ3D ids, held out
    names: dict[int, list[str]]  # id -> query words
    described: dict[int, list[str]]  # held-out id -> description in other words


class Prompts(NamedTuple):
    """Unit vectors of the classes' prompts."""

    words: Words
    clip: tinyclip.Clip
    text: Tensor  # (K, D) known classes
    known_ids: Tensor  # (K,) Occ3D
    novel_text: Tensor  # (J, D)
    novel_ids: Tensor  # (J,) Occ3D
    described: Tensor  # (J, D) the held-out classes in other words
    key: str  # hash of `text`


def read_vocabulary(cfg: Config) -> Words:
    """The vocabulary's classes, split by the held-out list. InputError if fewer than two stay known."""
    words, held = tinyclip.read_words(cfg.vocabulary), tinyclip.read_words(cfg.holdout)
    ids = {OCC3D_CLASSES.index(name): given for name, given in words.items()}
    described = {OCC3D_CLASSES.index(name): given for name, given in held.items()}
    known = [c for c in sorted(ids) if c not in described]
    if missing := [OCC3D_CLASSES[c] for c in sorted(described) if c not in ids]:
        raise InputError(f"{cfg.holdout}: {missing[0]} is not in {cfg.vocabulary}; a held-out class needs a "
                         "name there")
    if len(known) < 2:
        raise InputError(f"{cfg.holdout}: holds out {len(described)} of {len(ids)} classes; at least two "
                         "must stay known")
    return Words(known, sorted(described), ids, described)


def prompt_table(clip: tinyclip.Clip, ids: list[int], names: dict[int, list[str]]) -> Tensor:
    """2.4 t_c: (len(ids), D) unit vectors, each the mean over a class's words in ViLD's templates."""
    return torch.stack([tinyclip.ensemble(clip, names[c]) for c in ids])


def open_prompts(cfg: Config, root: Path, run: Run) -> Prompts:
    """--clip, or the tiny CLIP (made if it is not there), and its prompt vectors.

    name-unseen: the tiny CLIP's captions do not name held-out classes; their descriptions are the prompts.
    """
    words, name, unseen = read_vocabulary(cfg), cfg.clip, cfg.language == "name-unseen"
    if name is None:
        if is_world(root) and read_json(root / "exact" / "world.json").get("seed", 0) >= tinyclip.SEED_OFFSET:
            raise InputError(f"{root}: made from a seed of the tiny CLIP's own worlds, which it has seen")
        if run.is_main:
            make("tinyclip", hide=cfg.holdout if unseen else None)
        barrier(run)
        name = make("tinyclip", hide=cfg.holdout if unseen else None)  # now it is there
    clip = tinyclip.load(name, run.device)
    if clip.dim != cfg.clip_dim:
        raise InputError(f"--clip {name}: its space has {clip.dim} dimensions, this configuration's language "
                         f"head {cfg.clip_dim}; use the CLIP of the checkpoint, or --clip-dim {clip.dim}")
    prompts = {**words.names, **(words.described if unseen else {})}
    if strange := {word for given in prompts.values() for text in given
                   for word in tinyclip.unknown_words(clip, text)}:
        print(f"note: {name} does not know {', '.join(sorted(strange))}; no prompt has it", file=sys.stderr)
    text = prompt_table(clip, words.known, words.names)
    described = prompt_table(clip, words.novel, words.described)
    novel = described if unseen else prompt_table(clip, words.novel, words.names)
    known_ids, novel_ids = (torch.tensor(ids, device=run.device) for ids in (words.known, words.novel))
    return Prompts(words, clip, text, known_ids, novel, novel_ids, described,
                   key=short_hash((text * 1000).round().int().tolist()))


def lift(patches: Tensor, centers: np.ndarray, item: dict, size: tuple, occlusion: float = 0.0) -> Tensor:
    """patches (6, h, w, D), centers (S, 3) [m] ego -> g (S, D): the patch that shows each, or zeros."""
    K, T_ego_cam = (np.asarray(item[name]) for name in ("K", "T_ego_cam"))  # of images of `size`
    camera, row, column = best_pixels(centers, K, T_ego_cam, size, patches.shape[1:3], occlusion)
    camera, row, column = (torch.from_numpy(x).to(patches.device) for x in (camera, row, column))
    return patches[camera, row, column] * (camera >= 0)[:, None]


def voxel_centers(index: np.ndarray, stride: tuple[int, ...] = (1, 1, 1)) -> np.ndarray:
    """Indices (V, 3) of cells of `stride` voxels -> centres (V, 3) [m] ego."""
    return np.asarray(OCC3D.lower) + (index + 0.5) * np.asarray(stride) * OCC3D.voxel_size[0]


def name_heldout(keyframes: Keyframes, indices: list[int]) -> None:
    """Give each held-out object of a scene the known class that CLIP, the teacher, takes it for; write files.

    <keyframes.named>/<scene>/<token>.npz: `index`, the objects' voxels; `label`, their class. An object is a
    connected heap of held-out voxels, followed over keyframes where heaps overlap. Its class is the best
    known prompt for the mean of its patch features. It is ignored if that is less likely than SURE.
    """
    dataset, prompts, found, before, sums = keyframes.dataset, keyframes.prompts, {}, {}, []
    for i in indices:
        semantics, _ = keyframes.truth(i)
        occupied = np.argwhere(semantics < FREE)
        heap = ndimage.label(np.isin(semantics, prompts.words.novel), np.ones((3, 3, 3), bool))[0]
        heap, centers = heap[tuple(occupied.T)], voxel_centers(occupied)
        K, T_ego_cam, T_global_ego = dataset.calibration(i)
        item = {"K": K, "T_ego_cam": T_ego_cam}
        g = lift(keyframes.patches(i), centers, item, keyframes.cfg.image_size, occlusion=0.25).cpu()
        places = np.floor(move(T_global_ego, centers) / 0.8).astype(np.int64)  # two voxels
        now, track = {}, np.full(len(occupied), -1)
        for h in range(1, heap.max(initial=0) + 1):
            rows = np.flatnonzero(heap == h)
            cells = set(map(tuple, places[rows].tolist()))
            met = [before[cell] for cell in cells if cell in before]
            own = max(set(met), key=met.count) if met else len(sums)
            if own == len(sums):
                sums.append(torch.zeros(g.shape[1]))
            sums[own] += g[rows].sum(0)
            track[rows] = own
            now |= dict.fromkeys(cells, own)
        before = now
        index = np.ravel_multi_index(tuple(occupied.T), semantics.shape)
        found[i] = index[track >= 0].astype(np.int32), track[track >= 0]
    label = np.full(len(sums), IGNORE, np.uint8)
    if sums:
        p = (F.normalize(torch.stack(sums), dim=-1) @ prompts.text.cpu().t() / TAU).softmax(-1).max(-1)
        sure = (p.values >= SURE).numpy()
        label[sure] = np.array(prompts.words.known, np.uint8)[p.indices.numpy()[sure]]
    for i, (index, track) in found.items():
        write_npz(keyframes.named_path(i), index=index, label=label[track])


# --- 2.5  Densely Contrastive Learning ----------------------------------------------------------------------


def weighted_mean(value: Tensor, weight: Tensor) -> Tensor:
    """(B, S) each: the weighted mean of each keyframe, then over keyframes (a split batch sums up alike)."""
    return ((value * weight).sum(1) / weight.sum(1).clamp_min(1e-6)).mean()


def voxel_to_text(f: Tensor, text: Tensor, label: Tensor, weight: Tensor, tau: float = TAU) -> Tensor:
    """(4) L_v2t = -mean_i log exp(f_i t_{y_i} / tau) / sum_c exp(f_i t_c / tau).

    f (B, S, D), text (K, D), label (B, S), weight (B, S).
    """
    logits = F.normalize(f, dim=-1) @ text.t() / tau  # (B, S, K)
    return weighted_mean(F.cross_entropy(logits.transpose(1, 2), label, reduction="none"), weight)


def image_term(f: Tensor, image: Tensor, weight: Tensor) -> Tensor:
    """(6) L_img = mean 1 - cos(f_i, g_i). f, image (B, S, D), weight (B, S)."""
    return weighted_mean(1 - F.cosine_similarity(f, image, dim=-1), weight)


def dense_contrast(f: Tensor, batch: dict, text: Tensor, cfg: Config) -> dict[str, Tensor]:
    """The language head's terms of (8): (4) at the voxels sampled by class, (6) at those with a pixel.

    f (B, S + S', D): S voxels by class, then S' voxels into which a LiDAR point projects.
    """
    label, weight = batch["cell_class"], batch["cell_weight"]
    f_class, f_pixel = f.split([label.shape[1], f.shape[1] - label.shape[1]], 1)
    return {"dcl": cfg.lambda_dcl * voxel_to_text(f_class, text, label, weight),
            "img": cfg.lambda_img * image_term(f_pixel, batch["pixel_feature"], batch["pixel_weight"])}


# --- 2.6  Inference -----------------------------------------------------------------------------------------


class How(NamedTuple):
    """How voxels are named."""

    clip_image: tuple[int, int]  # [px] at which CLIP reads the images
    image_weight: float = IMAGE_WEIGHT  # a of (7)
    known_by: str = "occupancy"  # the head that names known classes


class Heads(NamedTuple):
    """What the two heads predict for S cells of one keyframe, and the image's features there."""

    occupied: Tensor  # (X, Y, Z) bool, of all cells
    cells: Tensor  # (S,) flat index
    sure: Tensor  # (S,) bool, by MARGIN
    class_share: Tensor | None  # (S, K) probabilities of known classes, given matter; None: self-supervised
    features: dict[str, Tensor]  # (S, D) unit vectors: "" norm(f + a g), "_f" the head's, "_g" CLIP's


@torch.no_grad()
def run_heads(net: Loc, frame: Frame, prompts: Prompts, how: How,
              voxels: np.ndarray | None = None) -> Heads:
    """Both heads at every occupied cell, and at those that hold one of `voxels` (200, 200, 16) bool."""
    device, item = net.language.last.weight.device, inputs(frame)
    features, _ = net.voxels(collate([item], device))
    scores = net.occupancy(features)[0]  # (K + 1, X, Y, Z)
    matter = scores[:-1].logsumexp(0) if net.apart else scores[:-1].amax(0)
    gap = matter - scores[-1]
    wanted = occupied = gap > 0
    if voxels is not None:
        asked = torch.nonzero(torch.from_numpy(voxels).to(device)) // torch.tensor(net.stride, device=device)
        wanted = occupied.index_put(tuple(asked.t()), torch.ones((), dtype=torch.bool, device=device))
    cells = wanted.flatten().nonzero()[:, 0]
    share = scores[:-1].flatten(1)[:, cells].t().softmax(-1) if net.classes > 1 else None
    f = F.normalize(net.language(features, cells[None])[0], dim=-1)
    centers = voxel_centers(wanted.nonzero().cpu().numpy(), net.stride)
    patches = tinyclip.patch_features(prompts.clip, item["images"].to(device), how.clip_image)
    g = lift(patches, centers, item, item["images"].shape[-2:])
    named = {"": F.normalize(f + how.image_weight * g, dim=-1), "_f": f, "_g": g}
    return Heads(occupied, cells, gap.flatten()[cells] > net.apart * MARGIN, share, named)


def unknown_score(heads: Heads, text: Tensor) -> dict[str, Tensor]:
    """(7) 1 - the largest probability of a known class, (S,) in [0, 1]: each head's and "both", the mean."""
    scores = {"language": 1 - (heads.features[""] @ text.t() / TAU).softmax(-1).amax(-1)}
    if heads.class_share is not None:
        scores["occupancy"] = 1 - heads.class_share.amax(-1)
    return scores | {"both": torch.stack(list(scores.values())).mean(0)}


def decide(heads: Heads, prompts: Prompts, novel: bool, how: How, kind: str = "") -> Tensor:
    """(7) class (S,) of each cell: the occupancy head's best, or (self-supervised) the best known prompt.

    novel: a held-out class where its prompt is the best of all. kind: key of the features to compare.
    """
    alike = heads.features[kind] @ prompts.text.t()
    by_language = heads.class_share is None or how.known_by == "language"
    label = prompts.known_ids[(alike if by_language else heads.class_share).argmax(-1)]
    if not novel:
        return label
    other = heads.features[kind] @ prompts.novel_text.t()
    return torch.where(other.amax(-1) > alike.amax(-1), prompts.novel_ids[other.argmax(-1)], label)


def to_voxels(values: Tensor, heads: Heads, empty: float) -> Tensor:
    """values (S,) of cells -> (200, 200, 16), each voxel its cell's, `empty` elsewhere."""
    volume = values.new_full(heads.occupied.shape, empty)
    volume.view(-1)[heads.cells] = values
    for axis, n in enumerate(OCC3D.shape):
        volume = volume.repeat_interleave(n // volume.shape[axis], axis)
    return volume


def to_ids(heads: Heads, prompts: Prompts, novel: bool, how: How, kind: str = "") -> np.ndarray:
    """-> (200, 200, 16) uint8 Occ3D ids, 17 free."""
    label = decide(heads, prompts, novel, how, kind)
    taken = heads.sure | torch.isin(label, prompts.novel_ids)  # no label taught what unknown things look like
    label = torch.where(taken & heads.occupied.flatten()[heads.cells], label, FREE)
    return to_voxels(label, heads, FREE).to(torch.uint8).cpu().numpy()


def answer(net: Loc, prompts: Prompts, how: How, frame: Frame, voxels: np.ndarray) -> openset.Answer:
    """One keyframe's answer to the open-set report, at M voxels (200, 200, 16) bool."""
    heads = run_heads(net, frame, prompts, how, voxels)
    rows = to_voxels(torch.arange(len(heads.cells), device=heads.cells.device), heads, -1).cpu()
    rows = rows[torch.from_numpy(voxels)]  # (M,)
    text, f = torch.cat([prompts.text, prompts.novel_text]), heads.features
    return openset.Answer({name: u.cpu()[rows] for name, u in unknown_score(heads, prompts.text).items()},
                          {kind: (f[kind] @ text.t()).cpu()[rows] for kind in f},
                          (f[""] @ prompts.described.t()).cpu()[rows], f[""].cpu()[rows],
                          {kind: to_ids(heads, prompts, True, how, kind) for kind in f})


# --- 3  Losses ----------------------------------------------------------------------------------------------


def occupancy_loss(out: dict[str, Tensor], batch: dict, class_weight: Tensor, net: Loc,
                   cfg: Config) -> dict[str, Tensor]:
    """The other terms of (8): weighted cross-entropy + Lovasz, and the lss network's LiDAR depth."""
    scores, target = out["scores"], batch["target"]  # (B, K + 1, X, Y, Z), (B, X, Y, Z) with 255 ignored
    named = target.masked_fill(target == UNNAMED, IGNORE)
    apart = partial(occupancy_cross_entropy, free=scores.shape[1] - 1, l_free=cfg.l_free)
    entropy = apart if net.apart else cross_entropy
    terms = {"ce": entropy(scores, target if net.apart else named, class_weight, ignore=IGNORE),
             "lov": lovasz_softmax(scores, named, ignore=IGNORE, per_sample=True)}
    if "depth" in out:
        terms["depth"] = cfg.lambda_depth * lss.depth_loss(out["depth"], batch["depth"], net.net.bins)
    return terms


# --- 4  Data ------------------------------------------------------------------------------------------------


def read_truth(labels: Path, dataset: NuScenesOccupancy, i: int, gt: bool) -> tuple[np.ndarray, np.ndarray]:
    """-> semantics uint8, seen bool (200, 200, 16): the label; gt: ground truth where a sensor saw it."""
    label, seen = read_label(labels, dataset, i, "mask_camera")
    if not gt:
        return label, seen > 0
    found = dataset.labels(i)
    if found is None:
        raise InputError(f"{dataset.root}: no gts/ (Occ3D labels), which --gt trains on; drop --gt")
    semantics, camera, lidar = found
    observed = camera | lidar | (semantics < FREE)
    return np.where(observed, semantics, label), observed | (seen > 0)


def surely_free(seen: np.ndarray) -> np.ndarray:
    """seen (X, Y, Z) bool, by rays -> the same without each column's lowest seen voxel. Ours.

    Rays meet the ground at a grazing angle and cross its voxels for metres before they end in one. Measured
    on the demo world in the camera mask: 14 % of the occupied voxels were taught as free, with this 7 %.
    """
    return seen & (np.cumsum(seen, 2, dtype=np.uint8) > 1)


class Keyframes:
    """What a training step reads of a keyframe: images, target, LiDAR depth, voxels by class, pixels."""

    def __init__(self, dataset: NuScenesOccupancy, labels: Path, frames, prompts: Prompts, named: Path | None,
                 net: Loc, cfg: Config):
        self.dataset, self.labels, self.frames, self.named, self.views = dataset, labels, frames, named, None
        self.prompts, self.cfg, self.free = prompts, cfg, len(prompts.words.known)
        self.stride, self.shape, self.classes = net.stride, net.grid.shape, net.classes
        self.rank = np.full(256, IGNORE, np.uint8)  # Occ3D id -> 0..K-1 known, K free; held out: ignored
        self.rank[[*prompts.words.known, FREE]] = np.arange(self.free + 1)

    def truth(self, i: int) -> tuple[np.ndarray, np.ndarray]:
        """-> semantics, seen (200, 200, 16) of keyframe i, held-out classes among them."""
        return read_truth(self.labels, self.dataset, i, self.cfg.gt)

    def target(self, i: int) -> np.ndarray:
        """(200, 200, 16) uint8: 0..K-1 known, K free, 254 occupied without a class, 255 ignored."""
        return self.taught(i, *self.truth(i))

    def taught(self, i: int, semantics: np.ndarray, seen: np.ndarray) -> np.ndarray:
        """The target of keyframe i from its truth."""
        target = self.rank[semantics]
        target[(target == self.free) & ~surely_free(seen)] = IGNORE
        if self.named is not None:
            arrays = read_npz(self.named_path(i), {"index": (None, "int32"), "label": (None, "uint8")})
            target.reshape(-1)[arrays["index"]] = self.rank[arrays["label"]]
        target[(target == IGNORE) & (semantics < FREE)] = UNNAMED
        return target

    def named_path(self, i: int) -> Path:
        """The file with the known classes of keyframe i's held-out objects."""
        return self.named / self.dataset.scene_names[i] / f"{self.dataset.tokens[i]}.npz"

    def occupancy(self, target: np.ndarray) -> Tensor:
        """The occupancy head's target on the network's cells; self-supervised: 0 occupied, 1 free."""
        target, free = torch.from_numpy(target), self.free
        if self.classes == 1:
            target, free = torch.where(target == IGNORE, IGNORE, (target == free).to(torch.uint8)), 1
        return coarsen(target, self.stride, free)

    def __call__(self, k: int, rng: np.random.Generator) -> dict[str, Tensor]:
        cfg, i = self.cfg, self.frames[k]
        K, T_ego_cam, _ = map(torch.as_tensor, self.dataset.calibration(i))
        item, target = {"K": K, "T_ego_cam": T_ego_cam}, self.target(i)
        points = self.dataset.points(i)[:, :3].astype(np.float64)
        shown, patches = self.views(i) if self.views else inputs(self.dataset[i]), self.patches(i)
        if rng.random() < cfg.jitter and not self.views:
            brightness, contrast = float(rng.uniform(0.7, 1.3)), float(rng.uniform(-0.1, 0.1))
            shown["images"] = (shown["images"] * brightness + contrast).clamp(0, 1)
        h, w = (-(-s // 4) for s in cfg.image_size)  # of the features
        K = item["K"].numpy() * np.array([w / cfg.image_size[1], h / cfg.image_size[0], 1])[:, None]
        depth = rasterize(points, np.zeros(len(points), np.uint8), K, item["T_ego_cam"].numpy(), h, w)[1]
        cells, label, weight = self.sample_classes(target, rng)
        seen, feature, seen_weight = self.sample_pixels(points, target, patches, item, rng)
        arrays = {"depth": depth, "cells": np.concatenate([cells, seen]), "cell_class": label,
                  "cell_weight": weight, "pixel_feature": feature, "pixel_weight": seen_weight}
        shown["target"] = self.occupancy(target)
        return shown | {name: torch.from_numpy(array) for name, array in arrays.items()}

    def cell_of(self, index: np.ndarray) -> np.ndarray:
        """Voxel index (V, 3) -> flat cell (V,)."""
        return np.ravel_multi_index(tuple((index // self.stride).T), self.shape)

    def sample_classes(self, target: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, ...]:
        """(4): cells (S,), class 0..K-1 (S,), weight (S,): `dcl_samples` voxels of each class.

        weight 0: the keyframe has no voxel of that class.
        """
        K, n = self.free, self.cfg.dcl_samples
        flat = np.flatnonzero(target.ravel() < K)
        label = target.ravel()[flat]
        rows, weight = np.zeros(K * n, np.int64), np.zeros(K * n, np.float32)
        for k in np.unique(label):
            mine, part = np.flatnonzero(label == k), slice(k * n, (k + 1) * n)
            rows[part], weight[part] = rng.choice(mine, n, replace=len(mine) < n), 1
        if not len(flat):
            return np.zeros(K * n, np.int64), np.zeros(K * n, np.int64), weight
        index = np.stack(np.unravel_index(flat[rows], target.shape), 1)
        return self.cell_of(index), label[rows].astype(np.int64), weight

    def sample_pixels(self, points: np.ndarray, target: np.ndarray, patches: Tensor, item: dict,
                      rng: np.random.Generator) -> tuple[np.ndarray, ...]:
        """(6): cells (S,) with a LiDAR point that a camera sees, CLIP's feature there (S, D), weight (S,).

        Voxels that training ignores (an oracle's mask on held-out objects) stay out.
        """
        S, D = self.cfg.image_samples, self.cfg.clip_dim
        cells, feature, weight = np.zeros(S, np.int64), np.zeros((S, D), np.float32), np.zeros(S, np.float32)
        patches = patches.cpu().numpy()  # (6, rows, columns, D)
        camera, row, column = best_pixels(points, item["K"].numpy(), item["T_ego_cam"].numpy(),
                                          self.cfg.image_size, patches.shape[1:3])
        index, inside = (x.numpy() for x in OCC3D.index(torch.from_numpy(points)))
        usable = np.flatnonzero(inside & (camera >= 0))
        usable = rng.permutation(usable[target[tuple(index[usable].T)] < self.free])
        first = np.unique(self.cell_of(index[usable]), return_index=True)[1]  # one point a cell, a random one
        chosen = usable[np.sort(first)[:S]]
        n = len(chosen)
        cells[:n], weight[:n] = self.cell_of(index[chosen]), 1
        feature[:n] = patches[camera[chosen], row[chosen], column[chosen]]
        return cells, feature, weight

    def patches(self, i: int) -> Tensor:
        """CLIP's patch features (6, rows, columns, D) of keyframe i."""
        images = torch.from_numpy(self.dataset.images(i)).to(self.prompts.text.device)
        return tinyclip.patch_features(self.prompts.clip, images, self.cfg.clip_image)


def inputs(frame: Frame) -> dict[str, Tensor]:
    """What a network reads: images, K, T_ego_cam, and the keyframe's points (M, 5) if the frame has them."""
    return verbs.inputs(frame) | ({} if frame.points is None else {"points": torch.as_tensor(frame.points)})


def read_points(dataset: NuScenesOccupancy, cfg: Config) -> NuScenesOccupancy:
    """The dataset, whose frames have their LiDAR points where a network of another file is wrapped."""
    dataset.parts = ("images",) if cfg.network == "lss" else ("images", "points")
    return dataset


def collate(items: list[dict], device: torch.device) -> dict:
    """Items -> a batch: tensors with a leading B; points a list (their number differs)."""
    batch = {name: [item[name].to(device) for item in items] for name in items[0]}
    return {name: values if name == "points" else torch.stack(values) for name, values in batch.items()}


def prepare_scene(job: tuple[Keyframes, list[int]]) -> tuple[np.ndarray, np.ndarray]:
    """Name a scene's held-out objects, if that is wanted and not done yet, and count its targets.

    -> cells of each occupancy class (256,), held-out voxels by true id and target (18, 256).
    """
    keyframes, indices = job
    if keyframes.named is not None and not all(keyframes.named_path(i).is_file() for i in indices):
        name_heldout(keyframes, indices)
    cells, named = np.zeros(256), np.zeros((18, 256))
    for i in indices:
        semantics, seen = keyframes.truth(i)
        target = keyframes.taught(i, semantics, seen)
        cells += np.bincount(keyframes.occupancy(target).flatten().numpy(), minlength=256)
        held = np.isin(semantics, keyframes.prompts.words.novel)
        np.add.at(named, (semantics[held], target[held]), 1)
    return cells, named


def target_weights(keyframes: Keyframes, workers: int = 1) -> Tensor:
    """freq^-0.5 of the occupancy head's classes, free last, over the training targets; assumption.

    Held-out objects are named on the way, scene by scene in `workers` processes.
    """
    scenes = groupby(keyframes.frames, keyframes.dataset.scene_names.__getitem__)
    jobs = [(keyframes, list(indices)) for _, indices in scenes]
    parallel = workers if keyframes.prompts.text.device.type == "cpu" and len(keyframes.frames) > 200 else 1
    bar = tqdm(each(prepare_scene, jobs, parallel), "training targets", len(jobs), unit="scene", leave=False)
    cells, named = (sum(parts) for parts in zip(*bar, strict=True))
    weight = weights_of(cells[: keyframes.classes + 1])
    if not weight[:-1].any():
        raise InputError(f"{keyframes.labels}: no occupied voxel of any known class; make them again")
    words = keyframes.prompts.words
    if absent := [OCC3D_CLASSES[c] for c, w in zip(words.known, weight, strict=False) if w == 0]:
        print(f"note: no training voxel of {', '.join(absent)}: only ever a negative", file=sys.stderr)
    for c in (c for c in words.novel if keyframes.named is not None and named[c].any()):
        share = named[c, : keyframes.free] / named[c].sum()
        print(f"note: {OCC3D_CLASSES[c]} in training: {100 * share.max():.0f} % of its voxels are called "
              f"{OCC3D_CLASSES[words.known[share.argmax()]]}, {100 * (1 - share.sum()):.0f} % have no class",
              file=sys.stderr)
    return weight


# --- 5  Train -----------------------------------------------------------------------------------------------


def train(cfg: Config, dataset: NuScenesOccupancy, labels: Path, args, frames=None, contrast=dense_contrast,
          shared: Path | None = None) -> None:
    """Learn from the labels; checkpoints and log go to args.out. A killed run goes on by the same command.

    frames: keyframes that are learned from; default: all. contrast: the language head's terms. shared: folder
    for what several runs have in common. An experiment changes these.
    """
    dataset, frames = read_points(dataset, cfg), frames or range(len(dataset))
    prompts = open_prompts(cfg, dataset.root, setup(args.device))
    source = verbs.source(dataset, labels, "voxels that the label's rays met")
    run = Session(args, cfg, args.out, samples=len(frames), batch=cfg.batch, steps=cfg.steps, amp=cfg.amp,
                  source=source | {"clip": prompts.clip.name, "prompts": prompts.key})
    if run.finished:
        return
    net, named = Loc(cfg).to(run.device), (shared or args.out) / f"nearest-{prompts.key}{'-gt' * cfg.gt}"
    named = named if cfg.holdout_mode == "nearest" else None
    keyframes = Keyframes(dataset, labels, frames, prompts, named, net, cfg)
    if not run.is_main:
        barrier(run.run)  # the first rank names held-out objects for all
    class_weight = target_weights(keyframes, args.workers).to(run.device)
    if run.is_main:
        barrier(run.run)
    rates = encoder_rate(cfg.backbone, cfg.lr), cfg.lr
    optimizer = make_optimizer(cfg.optimizer, net, *rates, cfg.weight_decay, "encoder.backbone")
    model = run.attach(net, optimizer, find_unused=True)  # the wrapped network's own head is not used
    keyframes.views = frozen_views(getattr(net.net, "encoder", None), dataset, labels)
    for step, batch in run.batches(keyframes, args.workers, partial(collate, device=run.device)):
        lr = set_lr(optimizer, schedule(step, run.steps, "cosine", cfg.warmup))
        with run.autocast():
            out = model(batch)
        terms = occupancy_loss(out, batch, class_weight, net, cfg)
        terms |= contrast(out["f"], batch, prompts.text, cfg)
        optimizer.zero_grad(set_to_none=True)
        sum(terms.values()).backward()  # (8)
        nn.utils.clip_grad_norm_(net.parameters(), 5.0)  # ours
        optimizer.step()
        run.log(step, terms, lr)


# --- 6  Evaluate, query, predict ----------------------------------------------------------------------------


def predict(net: Loc, frame: Frame, prompts: Prompts, how: How, novel: bool = True) -> np.ndarray:
    """One keyframe -> ids (200, 200, 16) uint8, with the known prompts alone or with the novel ones too."""
    return to_ids(run_heads(net, frame, prompts, how), prompts, novel, how)


def prompts_of(cfg: Config, args) -> Prompts:
    """The prompts that --ckpt learned. InputError if the CLIP or the words given now make others."""
    source = args.run["data"]
    prompts = open_prompts(cfg, verbs.run_data(args)[0], setup(args.device))
    if source["prompts"] != prompts.key:
        raise InputError(f"--clip {prompts.clip.name}: its known prompts are not those of the checkpoint, "
                         f"which learned {source['clip']} with {cfg.vocabulary} and {cfg.holdout}")
    return prompts


def open_frames(cfg: Config, args) -> NuScenesOccupancy:
    """The split to score or predict."""
    return read_points(verbs.open_eval(cfg, args), cfg)


def evaluate(cfg: Config, args, measured: dict[str, float] | None = None) -> None:
    """The verb eval: known classes by the field's protocols with controls, then the open-set tests.

    measured: metrics that a claim has already; then neither controls nor pictures are made.
    """
    net, out, state = verbs.load(Loc, cfg, args)
    prompts, dataset, train_set = prompts_of(cfg, args), open_frames(cfg, args), verbs.open_train(cfg, args)
    words, data, how = prompts.words, args.run["data"], How(cfg.clip_image, args.image_weight, args.known_by)
    held_out = f"{', '.join(OCC3D_CLASSES[c] for c in words.novel)} ({Path(cfg.holdout).name})"
    language = cfg.clip or f"tiny CLIP, {cfg.language}"
    naming = f"norm(f + {how.image_weight:.3g} g); known classes by the {how.known_by} head"
    protocol = {"naming": naming, "mask_train": data["mask_train"], "language": language,
                "labels": "Occ3D ground truth where observed, else " * cfg.gt + data["note"],
                "held_out": f"{held_out}; in training {cfg.holdout_mode}; their voxels are in no known score"}
    report(partial(predict, net, prompts=prompts, how=how, novel=False), run=args.run, state=state, out=out,
           dataset=openset.hide_classes(open_frames(cfg, args), words.novel), protocol=protocol,
           train_set=train_set and openset.hide_classes(train_set, words.novel), save=args.save_pred,
           params=sum(p.numel() for p in net.parameters()), truth=partial(ground_truth, labels=args.labels),
           against=f"labels in {args.labels}" if args.labels else "", frames=args.eval_frames,
           rayiou=args.rayiou, pictures=args.pictures, known=measured)
    openset.report(partial(answer, net, prompts, how), dataset=dataset, out=out, known=words.known,
                   indices=spread(len(dataset), args.eval_frames), novel=words.novel,
                   setting=f"language: {language}", drawn=chosen(len(dataset), args.pictures)[:2])


def query(cfg: Config, args) -> None:
    """The verb query: which occupied voxels of all keyframes are most like a free text: PNG and HTML."""
    net, out, _ = verbs.load(Loc, cfg, args)
    prompts, dataset, text = prompts_of(cfg, args), open_frames(cfg, args), " ".join(args.text.split())
    phrases = [word for names in prompts.words.names.values() for word in names]
    asked = tinyclip.ensemble(prompts.clip, [tinyclip.understood(prompts.clip, text, phrases)])

    def find(frame: Frame) -> np.ndarray:
        heads = run_heads(net, frame, prompts, How(cfg.clip_image, args.image_weight))
        return to_voxels(heads.features[""] @ asked, heads, math.nan).float().cpu().numpy()

    for path in openset.query(find, text, dataset=dataset, out=out,
                              indices=spread(len(dataset), args.eval_frames or 10)):
        print(f"  {path}")


def cells_of(cfg: Config) -> dict[str, Tensor]:
    """The rest of a batch, for the verb describe."""
    samples = len(read_vocabulary(cfg).known) * cfg.dcl_samples + cfg.image_samples
    return {"cells": torch.zeros(cfg.batch, samples, dtype=torch.int64),
            "points": [torch.empty(30_000, 5)] * cfg.batch}  # a sweep's


FLAGS = {
    "text": cli.Flag("what to look for, in words", str),
    "image-weight": cli.Flag("a of norm(f + a g)", float, IMAGE_WEIGHT),
    "known-by": cli.Flag("the head that names known classes", Literal["occupancy", "language"], "occupancy"),
}


def main() -> None:
    verbs.main(__doc__, Config, PRESETS, {
        "world": verbs.world,
        "labels": partial(verbs.labels, LABELS, open_data=open_scans),
        "train": lambda cfg, args: verbs.train(LABELS, train, cfg, args,
                                               "lidar" if cfg.mode == "supervised" else "world"),
        "eval": evaluate,
        "query": query,
        "predict": lambda cfg, args: verbs.predict_frames(
            Loc, partial(predict, prompts=prompts_of(cfg, args),
                         how=How(cfg.clip_image, args.image_weight, args.known_by)), cfg, args, open_frames),
        "describe": lambda cfg, args: verbs.describe(Loc, cfg, args, partial(cells_of, cfg)),
    }, verbs={
        "query": ("find the voxels that a text means: PNG and HTML",
                  f"ckpt! text! {verbs.DATA} {verbs.LOOSE} device cache eval-frames image-weight known-by"),
        **{v: (verbs.VERBS[v][0], f"{verbs.VERBS[v][1]} image-weight known-by") for v in ("eval", "predict")},
    }, flags=FLAGS)


if __name__ == "__main__":
    main()
