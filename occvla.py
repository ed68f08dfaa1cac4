"""OccVLA: a driving VLM that learns 3D occupancy as an implicit reasoning step, skipped at inference.

Paper   "OccVLA: Vision-Language-Action Model with Implicit 3D Occupancy Supervision", Liu, Kong, Li, Zhao;
        arXiv 2509.05578. Independent re-implementation; no code of the authors is known. Only the structure
        is public, no equation, weight or setting: equations and their numbers are our reconstruction.
Idea    A tokenizer turns dense occupancy into a small map of codes. While a vision-language model reads six
        images, a second stream of BEV queries reads the VLM's visual tokens, layer by layer, and predicts
        that map: the gradient teaches the VLM 3D. No token of the VLM reads the queries, so the stream can be
        dropped: text and trajectory stay the same to the last bit. The VLM reasons in words, a head plans.

RUN
    python occvla.py train --out runs/x             # writes a world first; four stages, two CPU cores
    python occvla.py eval --ckpt runs/x             # QA, planning, occupancy, every baseline, pictures
    python occvla.py train --preset paper --vlm /models/paligemma2-3b-pt-224 --data-root D --labels L
    python occvla.py ask --ckpt runs/x --images f1.jpg f2.jpg ... f6.jpg --question "Are there any buses?"
    python occvla.py ask --ckpt runs/x --drivelm FILE                   # DriveLM's keyframes and questions
    python occvla.py predict --ckpt runs/x --data-root D --out P        # any frames, no ground truth needed
    python occvla.py baselines --data-root D --split mini_val           # planners that see no image
    python occvla.py ablate --claim supervision --seeds 3               # re-tests a claim of the paper
    python occvla.py describe --preset paper        # 3B: parameters, tokens, memory; no data, no GPU

GLOSSARY
    symbol   name      shape            meaning                                                     place
    x        ids       (B, X, Y, Z)     semantic occupancy, Occ3D ids, 17 = free                    2.3
    z_q      codes     (K, D)           codebook of BEV cells; a latent's nearest code              (1)
    I        images    (B, N, 3, s, s)  six cameras; n_frames 2: twelve                             2.4
    H^l      hidden    (B, S, C)        hidden states that enter layer l of the language model      2.4
    H^l_vis  visual    (B, n, C)        those of the n image tokens                                 (4)
    Q        q         (B, q q, d)      BEV queries, learned                                        (3)-(5)
    z_hat    latent    (B, D, x, y)     predicted latent: softmax of code logits times codebook     (6)
    (none)   packs     (R, 6, L)        text of a prompt: ids, segment, position, ...               2.6
    (none)   path      (B, 6, 2)        waypoints [m] at 2 Hz, LIDAR_TOP frame: x right, y forward  2.6

EQUATION MAP
    (1) (2) codebook, class logits  -> common/networks/occworld.py: Quantizer, OccupancyTokenizer.logits
    2.3  tokenizer; (7) its loss    -> common/networks/occworld.py: OccupancyTokenizer, tokenizer_loss
    2.4  host, its prefix mask      -> common/networks/paligemma.py: PaliGemma, pack, attends
    (3)-(5) queries, one way        -> OccupancyBlock, OccupancyTransformer
    2.5  a rival: both ways         -> experiments/occvla.py: TwoWay, TwoWayVLA
    (6)  code, latent, voxel target -> occupancy_loss, OccVLA.latent
    2.6  meta-action, thought       -> common/thoughts.py: meta_action, thought_text
    2.6  planner: decoder and MLP   -> Planner, OccVLA.plan
    (8)  language loss              -> language_loss
    (9)  planning loss              -> planning_loss
    (10) total                      -> OccVLA.forward
    Sec. 4: stages, freezing        -> STAGES, train_stage, trainable
    Sec. 6: QA, occupancy; L2       -> common/metrics.py: qa_scores, OccupancyMeter, planning_errors
            collisions' raster      -> common/metrics.py: rasterize
    Claim 1: skipping loses nothing -> skipping; common/report/planning.py: skipping_cost

ASSUMPTIONS    All unpublished; the flag or the place that changes it stands beside.
    * target: code logits decoded softly, and the decoded voxels; lambda 1       --occ-target --lambda-occ
    * the stream reads H^l of every layer through its own keys and values        --occ-every
    * 50 x 50 queries on the latent's cells; fewer are unfolded to it            --queries
    * cells no camera sees are left out; codes and classes weigh freq^-0.5       occupancy_loss, first_network
    * PaliGemma's prefix attends both ways, so visual tokens carry the question: occupancy is supervised on
      the pass of a keyframe's first question, and predicted with one fixed prompt              --prefix
    * stages: 1 occupancy and QA, 2 the same with chain of thought, 3 planner, VLM frozen: there (10) is
      L_plan alone, as what its other terms teach is frozen                      --vlm-train --lora
    * the planner reads the VLM's last hidden states and the generated meta-action; it alone reads speed,
      history and command, in a head for each protocol row; the first is the main one   --plan-inputs
    * a planner corrects a simple guess: the mean training path, or, given history or speed, driving on
    * nuScenes' command and a scene's first history come from the future: the command is named in the row,
      history and speed count only where there is a past keyframe
DEVIATIONS
    * tiny's host is a PaliGemma 2 in miniature, its vision tower the miniature foundation (common/weights);
      lessons on single pictures of other worlds, nothing in them 3D, stand for its pre-training
      (data/tinyvlm.py). The tower is frozen, and what it sees is kept in a file.
    * tiny uses --prefix image: only the images attend both ways, questions are causal, and one pass over the
      images serves many questions. Its effect on the scores: unmeasured.
    * tiny's cross-attention starts biased to the patches that see each cell (--rig-bias); half its samples
      are mirrored (--mirror)
    * each planner head keeps its best weights for held-out training scenes
    * images are resized bilinearly; PaliGemma's own processor (used by `ask`) is bicubic

CLAIMS         the paper's, nuScenes val; ours are in RESULTS.md and are never in one table with these
    L2 0.18 / 0.26 / 0.40 m at 1 / 2 / 3 s (survey); NuScenes-QA 59.5 %; occupancy about 10 mIoU
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from common import cli, verbs
from common.backbones import describe_memory, describe_parts
from common.engine import Session
from common.files import InputError
from common.geometry import OCC3D, bev_waves, rig_offsets
from common.labels import IGNORE, class_weights
from common.losses import cross_entropy, lovasz_softmax
from common.networks import paligemma
from common.networks.lora import add_lora, lora_parts
from common.networks.occworld import (OccupancyTokenizer, code_weights, reconstruction, seen_cells,
                                      tokenizer_loss)
from common.networks.paligemma import QA, THOUGHT, Encoded, PaliGemma, States, mean_over_keyframes
from common.nuscenes import CAMERAS, FREE, Future, NuScenesOccupancy, open_split
from common.questions import ANSWERS, STATUS, sentences
from common.report import planning
from common.report.occupancy import Truth, ground_truth, spread
from common.report.planning import COMMANDS, Ego, Prediction, constant_velocity, ego_of, read_drivelm
from common.thoughts import DISTANCES, LATERAL, LONGITUDINAL, meta_action, parse_action, thought, thought_text
from common.train import (Muon, autocast, load_checkpoint, param_groups, reshard, schedule, set_apart, set_lr,
                          setup, stages_cost)

STAGES = ("0_tokenizer", "1_occupancy", "2_language", "3_planning")
Row = Literal["none", "speed", "command", "speed+command", "history", "command+history"]  # given to a planner
Part = Literal["vision", "projector", "language"]  # of the VLM
OCCUPANCY_PROMPT, PLAN_PROMPT = "occupancy", "plan the next three seconds"

# --- 1  Configuration ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Config:
    # host VLM and tokenizer: their sizes are rows of common/networks/paligemma.py and occworld.py
    vlm: str = "google/paligemma2-3b-pt-224"  # survey: PaliGemma-2. Hub id, local folder, or tiny
    image_size: tuple[int, int] = (224, 224)  # [px] the host's square images; assumption: the 224 variant
    n_frames: Literal[1, 2] = 1  # keyframes seen: this one, and the one before; assumption
    prefix: Literal["image+prompt", "image"] = "image+prompt"  # attends both ways: PaliGemma's; tiny: image
    vq: Literal["occworld", "tiny", "toy"] = "occworld"  # sizes of the occupancy tokenizer; survey: VQ-VAE
    # occupancy transformer
    lambda_occ: float = 1.0  # (10), assumption
    occ_target: Literal["code+voxel", "code", "latent", "voxel"] = "code+voxel"  # (6), assumption
    occ_every: int = 1  # a block at every n-th layer; assumption
    occ_dim: int = 512  # assumption
    occ_heads: int = 8  # assumption
    queries: int = 50  # per side of the BEV; assumption: the latent's cells
    rig_bias: bool = False  # (4) starts biased to the patches that see a cell; ours: tiny
    l_lov: float = 1.0  # Lovasz beside the cross-entropy in (6c); assumption
    # language
    cot: bool = True  # chain of thought before the meta-action; third party: used
    questions: int = 16  # per keyframe and step, drawn at random; assumption
    mirror: bool = False  # half of the samples are mirrored, words and plans too; ours
    # planner
    plan_inputs: tuple[Row, ...] = ("speed+command", "none", "command", "history", "command+history")  # heads
    plan_dropout: float = 0.0  # ours
    plan_dim: int = 512  # assumption
    plan_layers: int = 3  # assumption
    plan_heads: int = 8  # assumption
    # stages
    vlm_train: tuple[Part, ...] = ("vision", "projector", "language")  # learn in stages 1 and 2; assumption
    lora: int = 0  # rank of adapters on the language model's layers, which then learn; 0: none; ours
    stage_epochs: tuple[float, float, float, float] = (200, 1, 2, 6)  # OccWorld's code; then assumption
    stage_steps: tuple[int, int, int, int] = (0, 0, 0, 0)  # optimiser steps; 0: from the epochs
    stage_batch: tuple[int, int, int, int] = (1, 1, 1, 4)  # keyframes per process; as the epochs
    stage_lr: tuple[float, float, float, float] = (1e-3, 1e-4, 1e-4, 1e-4)  # of new modules; as the epochs
    lr_vlm: float = 1e-5  # language model; assumption
    lr_vision: float = 1e-5  # vision tower and projector; assumption
    optimizer: Literal["adamw", "muon"] = "adamw"  # assumption; muon (common/train.py) learns in fewer steps
    warmup: int = 200  # [steps]; OccWorld's code
    grad_clip: float = 35.0  # gradient norm; OccWorld's code
    amp: Literal["off", "bf16"] = "bf16"  # assumption
    checkpointing: bool = False  # recompute the layers' activations in the backward pass; ours

    def __post_init__(self):
        for heads, width in (("occ_heads", "occ_dim"), ("plan_heads", "plan_dim")):
            if getattr(self, width) % getattr(self, heads):
                raise InputError(f"--{heads} {getattr(self, heads)}: must divide --{width}".replace("_", "-"))


PRESETS = {
    "tiny": Config(  # two CPU cores
        vlm="tiny", image_size=(224, 224), prefix="image", vq="tiny", occ_dim=128, occ_heads=4, queries=25,
        rig_bias=True, l_lov=0.0, questions=32, mirror=True, plan_dim=64, plan_layers=2, plan_heads=4,
        plan_dropout=0.2, vlm_train=("projector", "language"), stage_steps=(200, 300, 200, 1500),
        stage_batch=(1, 4, 4, 16), stage_lr=(1.5e-2, 1e-2, 1e-2, 2e-3), lr_vlm=3e-3, lr_vision=3e-3,
        optimizer="muon", warmup=20, grad_clip=5.0, amp="off"),
    "base": Config(  # ours: one 24 GB GPU, the vision tower frozen, adapters on the language model
        queries=25, occ_every=4, vlm_train=("projector",), lora=16, checkpointing=True),
    "paper": Config(checkpointing=True),
}

# --- 2.5  Occupancy transformer: BEV queries that read the VLM's visual tokens, one way ---------------------


class OccupancyBlock(nn.Module):
    """(3) Q + SA(LN Q);  (4) Q + softmax(LN Q W_q (H_vis W_k)^T / sqrt(d)) H_vis W_v;  (5) Q + FFN(LN Q)."""

    def __init__(self, width: int, d: int, heads: int):
        super().__init__()
        self.heads = heads
        self.norms = nn.ModuleList(nn.LayerNorm(d) for _ in range(3))
        self.self_qkv, self.self_out = nn.Linear(d, 3 * d), nn.Linear(d, d)
        self.query, self.out = nn.Linear(d, d), nn.Linear(d, d)  # W_q
        self.visual_norm, self.key_value = nn.LayerNorm(width), nn.Linear(width, 2 * d)  # W_k, W_v
        self.ffn = nn.Sequential(nn.Linear(d, 4 * d), nn.GELU(), nn.Linear(4 * d, d))

    def attend(self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
        q, k, v = (x.unflatten(-1, (self.heads, -1)).transpose(1, 2) for x in (q, k, v))  # (B, heads, L, c)
        bias = bias if bias is None else bias.to(q.dtype)
        return F.scaled_dot_product_attention(q, k, v, bias).transpose(1, 2).flatten(2)

    def forward(self, q: Tensor, visual: Tensor, place: Tensor, bias: Tensor | None) -> Tensor:
        """q (B, Q, d), visual (B, n, C), place (n, 2 d) added to keys and values, bias (heads, Q, n)."""
        q = q + self.self_out(self.attend(*self.self_qkv(self.norms[0](q)).chunk(3, -1)))  # (3)
        k, v = (self.key_value(self.visual_norm(visual)) + place).chunk(2, -1)
        q = q + self.out(self.attend(self.query(self.norms[1](q)), k, v, bias))  # (4)
        return q + self.ffn(self.norms[2](q))  # (5)


class OccupancyTransformer(nn.Module):
    """The stream beside the VLM; of a host it needs hidden states, the mask of image tokens, and three sizes.

    width, depth: of the host. tokens: n. side: latent cells a side. out: channels of the prediction.
    """

    def __init__(self, width: int, depth: int, tokens: int, side: int, out: int, cfg: Config):
        super().__init__()
        d, self.tokens, self.queries, self.cells = cfg.occ_dim, tokens, cfg.queries, side // cfg.queries
        self.reads = tuple(range(cfg.occ_every - 1, depth, cfg.occ_every))  # layers whose input is read
        if not self.reads:
            raise InputError(f"--occ-every {cfg.occ_every}: the language model has {depth} layers")
        self.start = nn.Parameter(0.02 * torch.randn(self.queries**2, d) + bev_waves(self.queries, d))
        self.place = nn.Parameter(0.02 * torch.randn(tokens, 2 * d))
        self.blocks = nn.ModuleList(OccupancyBlock(width, d, cfg.occ_heads) for _ in self.reads)
        bias = torch.zeros(cfg.occ_heads, self.queries**2, tokens)
        self.bias = nn.Parameter(bias) if cfg.rig_bias else None
        self.norm, self.head = nn.LayerNorm(d), nn.Linear(d, out * self.cells**2)

    def visual(self, hidden: Tensor, mask: Tensor) -> Tensor:
        """(B, S, C), (B, S) bool -> H^l_vis (B, n, C), the image tokens in order."""
        order = mask.to(torch.uint8).argsort(stable=True, dim=1, descending=True)[:, : self.tokens]  # (B, n)
        return hidden.gather(1, order[..., None].expand(-1, -1, hidden.shape[-1]))

    def step(self, k: int, q: Tensor | None, hidden: Tensor, mask: Tensor) -> Tensor:
        """Block k reads the hidden states (B, S, C) that enter layer reads[k]; q None: the first queries."""
        q = self.start.expand(len(hidden), -1, -1) if q is None else q
        return self.blocks[k](q, self.visual(hidden, mask), self.place, self.bias)

    def finish(self, q: Tensor) -> Tensor:
        """(B, Q, d) -> (B, out, side, side): each query predicts its own f x f cells."""
        x = self.head(self.norm(q)).unflatten(1, (self.queries, self.queries))  # (B, q, q, out f f)
        x = x.unflatten(-1, (-1, self.cells, self.cells))  # (B, q, q, out, f, f)
        return x.permute(0, 3, 1, 4, 2, 5).flatten(4, 5).flatten(2, 3)

    def forward(self, hidden: Sequence[Tensor], mask: Tensor) -> Tensor:
        """hidden: the states entering layers 0, 1, ..., mask (B, S): image tokens -> (B, out, side, side)."""
        q = None
        for k, layer in enumerate(self.reads):
            q = self.step(k, q, hidden[layer], mask)
        return self.finish(q)


def occupancy_loss(net: OccVLA, predicted: Tensor, ids: Tensor, seen: Tensor) -> dict[str, Tensor]:
    """(6a) CE of the code, (6b) squared error of the latent, (6c) CE + l_lov Lovasz of the decoded voxels.

    occ_target chooses terms. predicted (B, out, side, side), ids (B, X, Y, Z), seen likewise, bool. Cells
    and voxels that no camera sees are left out. Each term is a mean of each sample, then over samples.
    """
    tokenizer, target, terms = net.tokenizer, net.cfg.occ_target, {}
    if target != "voxel":
        cells = seen_cells(seen, tokenizer.side).float()  # (B, side, side)
        index = tokenizer.index(ids)
        if target == "latent":
            weight, z_q = cells, tokenizer.quantizer.lookup(index)
            value = (predicted.float() - z_q).square().mean(1)  # (6b)
        else:
            weight = net.code_weight[index] * cells
            value = F.cross_entropy(predicted.float(), index, reduction="none")  # (6a)
        per_sample = (weight * value).flatten(1).sum(1) / weight.flatten(1).sum(1).clamp_min(1e-6)
        terms["latent" if target == "latent" else "code"] = per_sample.mean()
    if "voxel" in target:
        features = tokenizer.decode(net.latent(predicted))  # (B, X, Y, Z, E)
        per_sample = [cross_entropy(tokenizer.logits(x[m]), y[m], net.class_weight, per_sample=False)
                      for x, y, m in zip(features, ids, seen, strict=True)]
        terms["voxel"] = torch.stack(per_sample).mean()  # (6c)
        if net.cfg.l_lov:
            logits, labels = tokenizer.logits(features).movedim(-1, 1), ids.masked_fill(~seen, IGNORE)
            terms["lov"] = net.cfg.l_lov * lovasz_softmax(logits, labels, per_sample=True)
    return terms


# --- 2.6  Planner: decoder and MLP over the VLM's states ----------------------------------------------------


class Planner(nn.Module):
    """Waypoint queries attend to the VLM's states; an MLP corrects a simple guess of the path.

    row: what this head is given beside the images. The guess is the mean training path or, where history or
    speed is given and known, driving on as before. A second MLP reads only what is given."""

    def __init__(self, width: int, row: str, cfg: Config):
        super().__init__()
        d, self.given, drop = cfg.plan_dim, frozenset(row.split("+")) - {"none"}, cfg.plan_dropout
        self.enter = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, d), nn.Dropout(drop))
        self.queries = nn.Parameter(0.5 * torch.randn(6, d))
        self.along, self.across = nn.Embedding(len(LONGITUDINAL) + 1, d), nn.Embedding(len(LATERAL) + 1, d)
        size = sum({"command": len(COMMANDS), "history": 12, "speed": 2}[name] for name in self.given)
        self.own = nn.Sequential(nn.Linear(size, d), nn.ReLU(), nn.Linear(d, d), nn.ReLU()) if size else None
        self.correct = nn.Linear(d, 12) if size else None
        block = partial(nn.TransformerDecoderLayer, d, cfg.plan_heads, 4 * d, drop, F.gelu, batch_first=True,
                        norm_first=True)
        self.blocks = nn.ModuleList(block() for _ in range(cfg.plan_layers))
        self.out = nn.Sequential(nn.LayerNorm(d), nn.Linear(d, d), nn.GELU(), nn.Dropout(drop),
                                 nn.Linear(d, 2))
        for layer in filter(None, (self.out[-1], self.correct)):
            nn.init.zeros_(layer.weight), nn.init.zeros_(layer.bias)
        self.register_buffer("mean", torch.zeros(6, 2))  # of the training trajectories [m]
        self.register_buffer("scale", torch.ones(6, 2))  # standard deviation of the corrections [m]
        self.register_buffer("error", torch.tensor(math.inf))  # of the held-out training scenes [m]

    def guess(self, ego: Ego) -> Tensor:
        """The path (B, 6, 2) [m] that the head corrects."""
        known = ego.known[:, -1, None, None]
        if "history" in self.given:
            return torch.where(known, constant_velocity(ego), self.mean)
        if "speed" in self.given:
            on = 5 * ego.speed[:, :1] * torch.arange(1, 7, device=known.device)  # [m]: 0.5 s of [10 m/s]
            return torch.where(known, torch.stack([0 * on, on], -1), self.mean)
        return self.mean.expand(len(ego.command), -1, -1)

    def features(self, ego: Ego) -> Tensor:
        """(B, k): what the head is given; lengths in 10 m."""
        history = torch.cat([ego.history.flatten(1) / 10, ego.known.to(ego.history)], 1)  # (B, 12)
        parts = {"command": F.one_hot(ego.command, len(COMMANDS)), "history": history, "speed": ego.speed}
        return torch.cat([parts[name].float() for name in sorted(self.given)], 1)

    def forward(self, context: Tensor, valid: Tensor, action: Tensor, ego: Ego) -> Tensor:
        """context (B, M, C), valid (B, M) bool, action (B, 2) int64, last id unknown -> (B, 6, 2) [m]."""
        own = None if self.own is None else self.own(self.features(ego))
        tokens = [self.along(action[:, 0]) + self.across(action[:, 1]), *([] if own is None else [own])]
        q = torch.cat([self.queries.expand(len(action), -1, -1), torch.stack(tokens, 1)], 1)
        context = self.enter(context)
        for block in self.blocks:
            q = block(q, context, memory_key_padding_mask=~valid)
        change = self.out(q[:, :6]).float()
        if own is not None:
            change = change + self.correct(own).float().unflatten(1, (6, 2))
        return self.guess(ego) + self.scale * change


# --- (8), (9)  The other losses -----------------------------------------------------------------------------


def language_loss(net: OccVLA, states: States, packs: Tensor, rows: Tensor, B: int) -> dict[str, Tensor]:
    """(8) L_lm: next-token cross-entropy on target tokens only, answers and chain of thought apart.

    It is a mean over each keyframe's target tokens, then over the B keyframes, so that processes add up.
    packs (R, 6, L), rows (R,): the keyframe of each pack.
    """
    terms, graph = {}, 0 * states.last.sum()  # without a target there is a graph still
    for name, kind in (("qa", QA), ("cot", THOUGHT))[: net.stage]:  # stage 1 has no chain of thought
        values, pack = net.vlm.token_losses(states, packs, kind)
        terms[name] = mean_over_keyframes(values, rows[pack], B) + graph
    return terms


def planning_loss(path: Tensor, truth: Tensor, known: Tensor) -> Tensor:
    """(9) mean over the known waypoints of their distance [m]; a sample without any counts 0."""
    value = ((path - truth).square().sum(-1) + 1e-6).sqrt()
    return ((value * known).sum(1) / known.sum(1).clamp_min(1)).mean()


# --- (10)  The network --------------------------------------------------------------------------------------


class OccVLA(nn.Module):
    """Host VLM, frozen occupancy tokenizer, occupancy stream, planner heads.

    forward(batch) -> the loss terms of `stage`; (10) their sum is L_lm + lambda_occ L_occ, in stage 3 L_plan.
    The network protocol of this repository: grid, channels, voxels(batch), head(features).
    """

    def __init__(self, cfg: Config, host: paligemma.Host, classes: int = 18):
        super().__init__()
        self.cfg, self.stage, self.grid = cfg, 1, OCC3D
        if cfg.lora:
            add_lora(host.net.model.language_model.layers, cfg.lora)
        self.vlm = PaliGemma(host, len(CAMERAS) * cfg.n_frames, cfg.prefix)
        self.tokenizer = OccupancyTokenizer(cfg.vq, classes=classes)
        sizes, side, vlm = self.tokenizer.sizes, self.tokenizer.side, self.vlm
        if side % cfg.queries:
            raise InputError(f"--queries {cfg.queries}: must divide the latent's {side} cells per side")
        out = sizes.z_dim if cfg.occ_target == "latent" else sizes.codebook
        self.occupancy = OccupancyTransformer(vlm.width, vlm.layers, vlm.tokens, side, out, cfg)
        self.planner, self.best = nn.ModuleDict(), nn.ModuleDict()
        self.channels = sizes.class_dim
        self.register_buffer("code_weight", torch.ones(sizes.codebook))
        self.register_buffer("class_weight", torch.ones(classes))

    @torch.no_grad()
    def add_planner(self, futures: Sequence[Future] = ()) -> None:
        """The heads of stage 3; training futures give the mean path and the spread of their corrections."""
        cfg = self.cfg
        self.planner = nn.ModuleDict({row: Planner(self.vlm.width, row, cfg) for row in cfg.plan_inputs})
        if futures:
            (truth, known), ego = planning.stack_paths(futures), ego_of(futures)
            for head in self.planner.values():
                head.mean.copy_(planning.mean_path(truth, known))
                variance = planning.mean_path((truth - head.guess(ego)).square(), known)
                head.scale.copy_(variance.sqrt().clamp_min(0.1))
        self.best = deepcopy(self.planner).requires_grad_(False)

    @torch.no_grad()
    def keep_best(self, batch: dict | None) -> None:
        """Keep each head's weights as its best if they plan better for the held-out batch; None: always."""
        inputs = batch and (batch["inputs"] or self.plan_context(self.encode(batch["images"])))
        paths = self.eval().plan(*inputs, batch["ego"], self.planner) if batch else {}
        for row, head in self.train().planner.items():
            error = planning_loss(paths[row], batch["path"], batch["known"]) if batch else head.error
            if batch is None or error < self.best[row].error:
                self.best[row].load_state_dict(head.state_dict())
                self.best[row].error.copy_(error)

    def encode(self, images: Tensor, hidden: bool = False) -> Encoded:
        """(B, N, 3, H, W) -> image tokens, with the pass over them where all prompts share it."""
        return self.vlm.read_prefix(self.vlm.encode(images), hidden)

    def occupancy_pass(self, encoded: Encoded) -> States:
        """The pass whose visual tokens the stream reads: the shared prefix, or the one fixed prompt."""
        if self.cfg.prefix == "image":
            return self.vlm.read_prefix(encoded, hidden=True).prefix
        rows = torch.arange(len(encoded.tokens), device=encoded.tokens.device)
        packs = self.vlm.stack([self.vlm.exchange(OCCUPANCY_PROMPT)] * len(rows), rows.device)
        return self.vlm.run(encoded, packs, rows, hidden=True)

    def occupy(self, states: States, rows: Tensor | slice = slice(None)) -> Tensor:
        """The stream over these rows of a pass -> (B, out, side, side): code logits or latents."""
        return self.occupancy([h[rows] for h in states.hidden], states.mask[rows])

    def latent(self, predicted: Tensor) -> Tensor:
        """z_hat (B, D, x, y): the latent, or softmax(code logits) codebook, as argmax has no gradient."""
        return predicted.float() if self.cfg.occ_target == "latent" else self.tokenizer.soft(predicted)

    def voxels(self, batch: dict) -> Tensor:
        """batch with images (B, N, 3, H, W) -> features (B, E, X, Y, Z)."""
        predicted = self.occupy(self.occupancy_pass(self.vlm.encode(batch["images"])))
        return self.tokenizer.decode(self.latent(predicted)).movedim(-1, 1)

    def head(self, features: Tensor) -> Tensor:
        """(B, E, X, Y, Z) -> logits (B, K, X, Y, Z); channel 17 = free."""
        return self.tokenizer.logits(features.movedim(1, -1)).movedim(-1, 1)

    def ids(self, predicted: Tensor) -> Tensor:
        """Prediction of the stream -> (B, 200, 200, 16) uint8."""
        return self.tokenizer.logits(self.tokenizer.decode(self.latent(predicted))).argmax(-1).to(torch.uint8)

    @torch.no_grad()
    def plan_context(self, encoded: Encoded, limit: int = 40) -> tuple[Tensor, Tensor, list[str]]:
        """Generate the chain of thought, at most `limit` tokens; -> the VLM's states over images, prompt and
        that text (B, M, C), valid (B, M), the text.
        """
        vlm, rows = self.vlm, torch.arange(len(encoded.tokens), device=encoded.tokens.device)
        written = vlm.generate(encoded, [PLAN_PROMPT] * len(rows), rows, limit)
        prompt = vlm.text.prompt(PLAN_PROMPT)
        packs = vlm.stack([paligemma.Exchange(prompt, ids) for ids in written], rows.device)
        context = vlm.follow(encoded, packs, rows).last
        context = context if encoded.prefix is None else torch.cat([encoded.prefix.last, context], 1)
        valid = F.pad(packs[:, paligemma.SEGMENT] >= 0, (vlm.tokens, 0), value=True)
        return context, valid, [vlm.text.decode(ids) for ids in written]

    def plan(self, context: Tensor, valid: Tensor, texts: Sequence[str], ego: Ego,
             heads: nn.ModuleDict | None = None) -> dict[str, Tensor]:  # heads: default the best
        """-> {row: (B, 6, 2) [m]} of every head, which reads the meta-action of the generated text."""
        unknown = len(LONGITUDINAL), len(LATERAL)
        actions = [(LONGITUDINAL.index(a[0]), LATERAL.index(a[1])) if (a := parse_action(text)) else unknown
                   for text in texts]
        action = torch.tensor(actions, device=context.device)
        return {row: head(context, valid, action, ego) for row, head in (heads or self.best).items()}

    def forward(self, batch: dict) -> dict[str, Tensor]:
        """The terms of (10) for this stage, by name."""
        if self.stage == 3:
            inputs = batch["inputs"] or self.plan_context(self.encode(batch["images"]))
            paths = self.plan(*inputs, batch["ego"], self.planner)
            return {row: planning_loss(path, batch["path"], batch["known"]) for row, path in paths.items()}
        occupied, vlm = self.cfg.lambda_occ > 0, self.vlm
        encoded = vlm.read_prefix(vlm.encode(batch["images"]), hidden=occupied)
        states = (vlm.follow(encoded, batch["packs"], batch["rows"]) if encoded.prefix else
                  vlm.run(encoded, batch["packs"], batch["rows"], hidden=occupied))
        terms = language_loss(self, states, batch["packs"], batch["rows"], len(encoded.tokens))
        if occupied:  # on a pass that answers: the shared prefix, or that of a keyframe's first question
            own = batch["rows"] == torch.arange(len(encoded.tokens), device=batch["rows"].device)[:, None]
            predicted = (self.occupy(encoded.prefix) if encoded.prefix else
                         self.occupy(states, own.int().argmax(1)))
            losses = occupancy_loss(self, predicted, batch["ids"], batch["seen"])
            terms |= {name: self.cfg.lambda_occ * value for name, value in losses.items()}
        return terms


def build(cfg: Config, classes: int = 18, pretrained: bool = True, folder: Path | None = None,
          network: type[OccVLA] = OccVLA) -> OccVLA:
    """The network of a preset. Raises InputError if host and settings do not fit.

    pretrained False, or a run's 0_host folder: the host's architecture alone.
    """
    small = cfg.vlm in paligemma.SIZES
    if folder is None and not pretrained and not small:
        return network(cfg, paligemma.paper_host(), classes)
    ahead = [(f"{status} car", d, n) for status in STATUS.values() for n, d in enumerate(DISTANCES)]
    thoughts = [thought_text(*a, (x, y)) for a in ahead for x in LONGITUDINAL for y in LATERAL]
    words = [*sentences(), OCCUPANCY_PROMPT, PLAN_PROMPT, *thoughts] if small else []  # of its tokenizer
    host = paligemma.load_host(cfg.vlm if pretrained or not small else "tiny-random", words, folder)
    paligemma.check_host(host, cfg.vlm, cfg.image_size[0], len(CAMERAS) * cfg.n_frames)
    return network(cfg, host, classes)


# --- 3  Data ------------------------------------------------------------------------------------------------


class Keyframes:
    """What a training step reads of a keyframe. kept: keyframe of each sample. seen: features of the frozen
    vision tower for each keyframe and its mirror image; None: images are read. inputs: the same of
    `plan_context`."""

    def __init__(self, dataset: NuScenesOccupancy, truth: Truth | None, cfg: Config, vlm: PaliGemma | None,
                 stage: int, kept: Sequence[int], seen: Sequence | None = None,
                 inputs: Sequence | None = None):
        self.dataset, self.truth, self.cfg, self.vlm, self.stage = dataset, truth, cfg, vlm, stage
        self.kept, self.seen, self.inputs = kept, seen, inputs

    def __call__(self, sample: int, rng: np.random.Generator) -> dict[str, Any]:
        """A sample -> its fields as tensors without a batch axis; packs: a list."""
        i, item = self.kept[sample], {}
        flip = bool(self.cfg.mirror and self.stage and rng.random() < 0.5)
        if self.truth is not None:
            item["ids"], item["seen"] = (x.flip(1) if flip else x for x in read_truth(self.truth, i))
        return item if self.stage == 0 else item | self.read(i, flip, rng)

    def read(self, i: int, flip: bool, rng: np.random.Generator | None = None) -> dict[str, Any]:
        """Images or what stands for them, text or plan of keyframe i."""
        item: dict[str, Any] = {}
        if self.inputs is None:
            item["images"] = (read_images(self.dataset, i, self.cfg.n_frames, flip) if self.seen is None else
                              torch.from_numpy(np.array(self.seen[i, int(flip)])))
        if self.stage == 3:
            future = planning.mirrored_future(self.dataset.future(i)) if flip else self.dataset.future(i)
            return item | {"future": future, "inputs": self.inputs and self.inputs[i][int(flip)]}
        rows, turn = self.dataset.questions(i) or [], planning.mirrored_words if flip else str
        picked = [rows[k] for k in rng.permutation(len(rows))[: self.cfg.questions]]
        exchanges = [self.vlm.exchange(turn(row["question"]), str(row["answer"])) for row in picked]
        action = meta_action(self.dataset.future(i))
        if self.stage == 2 and action is not None:
            words = turn(thought(self.dataset.boxes(i), action, self.cfg.cot))
            exchanges.append(self.vlm.exchange(PLAN_PROMPT, words, THOUGHT))
        exchanges = exchanges or [self.vlm.exchange(PLAN_PROMPT)]
        return item | {"packs": [self.vlm.pack([exchange])[0] for exchange in exchanges]}

    def collate(self, items: list[dict], device: torch.device) -> dict[str, Any]:
        """Items -> a batch on the device; packs get `rows`, the place of their keyframe in the batch."""
        batch: dict[str, Any] = {name: torch.stack([item[name] for item in items]).to(device)
                                 for name in ("ids", "seen", "images") if name in items[0]}
        if "packs" in items[0]:
            packs = [p for item in items for p in item["packs"]]
            batch["packs"] = paligemma.stack_packs(packs, self.vlm.text.pad).to(device)
            rows = [b for b, item in enumerate(items) for _ in item["packs"]]
            batch["rows"] = torch.tensor(rows, device=device)
        if "future" in items[0]:
            futures, batch["inputs"] = [item["future"] for item in items], None
            batch["ego"] = ego_of(futures, device)
            batch["path"], batch["known"] = (x.to(device) for x in planning.stack_paths(futures))
            if self.inputs is not None:
                context, valid, texts = zip(*(item["inputs"] for item in items), strict=True)
                pad = partial(nn.utils.rnn.pad_sequence, batch_first=True)
                batch["inputs"] = pad(context).to(device), pad(valid).to(device), texts
        return batch


def read_images(dataset: NuScenesOccupancy, i: int, n_frames: int, flip: bool = False) -> Tensor:
    """(N, 3, s, s) in [0, 1]; n_frames 2: then those of the keyframe before, or a scene's first again."""
    images = [dataset.images(i)]
    if n_frames == 2:
        images.append(dataset.images(next(iter(dataset.past(i, 1)), i)))
    images = [x[planning.MIRRORED][..., ::-1] if flip else x for x in images]
    return torch.from_numpy(np.concatenate(images))


def read_truth(truth: Truth, i: int) -> tuple[Tensor, Tensor]:
    """-> ids (X, Y, Z) uint8, and bool: labelled and seen by a camera."""
    ids, camera, _ = (torch.from_numpy(x) for x in truth(i))
    return ids, camera & (ids != IGNORE)


# --- 4  Train: four stages ----------------------------------------------------------------------------------


def trainable(net: OccVLA, stage: int) -> None:
    """Freezes what the stage does not train: in stage 3 all but the planner; the tokenizer always."""
    host = net.vlm.net
    parts = {"vision": [host.model.vision_tower], "projector": [host.model.multi_modal_projector],
             "language": [host.model.language_model, host.lm_head]}
    learning = [module for name in net.cfg.vlm_train for module in parts[name]]
    learning += [net.occupancy] if net.cfg.lambda_occ > 0 else []
    learning += lora_parts(host)
    net.requires_grad_(False)
    for module in [net.planner] if stage == 3 else learning:
        module.requires_grad_(True)


def make_optimizer(net: nn.Module, stage: int, cfg: Config) -> torch.optim.Optimizer:
    """AdamW or Muon, each part with its own rate. The word embedding, tied with the output layer, is always
    AdamW's. Weight decay 0.01: OccWorld's code."""
    muon, new = cfg.optimizer == "muon", cfg.stage_lr[stage]
    groups = param_groups(net, cfg.lr_vlm, new, 0.01, encoder="vlm", muon=muon)
    if stage:
        host = net.vlm.net
        vision = [*host.model.vision_tower.parameters(), *host.model.multi_modal_projector.parameters()]
        set_apart(groups, vision, lr=cfg.lr_vision, base_lr=cfg.lr_vision)
        if muon:
            set_apart(groups, [host.lm_head.weight], orthogonal=False)
    return (Muon if muon else torch.optim.AdamW)([g for g in groups if g["params"]], lr=new)


def cached_sight(net: OccVLA, dataset: NuScenesOccupancy, run: Session) -> np.ndarray | None:
    """Features of the frozen vision tower for each keyframe and its mirror image; None: the tower learns."""
    cfg = net.cfg
    flips = (False, True) if cfg.mirror else (False,)
    return None if "vision" in cfg.vlm_train else net.vlm.cached_sight(
        lambda i: torch.stack([read_images(dataset, i, cfg.n_frames, flip) for flip in flips]), len(dataset),
        dataset.cache, [dataset.tokens, len(flips), cfg.n_frames], run.run)


def cached_inputs(net: OccVLA, keyframes: Keyframes, run: Session, limit: float = 4e9) -> list | None:
    """The frozen VLM's `plan_context` of each keyframe and its mirror image; None above `limit` bytes."""
    n, flips = len(keyframes.dataset), (False, True) if net.cfg.mirror else (False,)
    if 4 * len(flips) * n * net.vlm.tokens * net.vlm.width > limit:
        return None
    inputs: list = [[] for _ in range(n)]
    for first in tqdm(range(0, n, 16), "VLM states", leave=False, disable=not run.is_main):
        several = range(first, min(first + 16, n))
        for flip in flips:
            images = torch.stack([keyframes.read(i, flip)["images"] for i in several]).to(run.device)
            with run.autocast(), torch.no_grad():
                context, valid, texts = net.plan_context(net.encode(images))
            for i, *found in zip(several, context.float().cpu(), valid.cpu(), texts, strict=True):
                inputs[i].append(found)
    return inputs


def first_network(cfg: Config, dataset: NuScenesOccupancy, truth: Truth | None, tokenizer: Path,
                  network: type[OccVLA]) -> OccVLA:
    """The network as stage 1 begins: the host's weights, stage 0's tokenizer, class and code weights."""
    net = build(cfg, network=network)
    load_checkpoint(tokenizer, net.tokenizer)
    if cfg.rig_bias:
        K, T, _ = (torch.from_numpy(x) for x in dataset.calibration(0))
        offsets = rig_offsets(K, T, net.vlm.image_size, net.vlm.patches, cfg.queries, net.grid, cfg.occ_heads)
        net.occupancy.bias.data.copy_(offsets.repeat(1, 1, cfg.n_frames))
    if truth is not None:  # unweighted, the code of empty space would be most of (6a)
        pairs = [read_truth(truth, i) for i in spread(len(dataset), 64)]
        net.class_weight.copy_(class_weights(ids.masked_fill(~seen, IGNORE) for ids, seen in pairs))
        net.code_weight.copy_(code_weights(net.tokenizer, pairs))
    return net


def train_stage(stage: int, cfg: Config, dataset: NuScenesOccupancy, labels: Path | None, args, out: Path,
                previous: Path, host: Path, network: type[OccVLA] = OccVLA) -> None:
    """One stage into the folder `out`, from the weights in `previous`.

    host: folder of the VLM's architecture. network: what an experiment replaces.
    """
    kept, held = planning.hold_out(dataset.scene_names if stage == 3 else [], len(dataset))
    run = Session(args, cfg, out, samples=len(kept), batch=cfg.stage_batch[stage], amp=cfg.amp,
                  steps=args.steps or cfg.stage_steps[stage], epochs=cfg.stage_epochs[stage],
                  source=verbs.source(dataset, labels or Path("gts"), "camera"))
    if run.finished:
        return
    truth = ground_truth(dataset, labels) if stage < 3 and (stage == 0 or cfg.lambda_occ > 0) else None
    vlm, seen, inputs = None, None, None
    if stage == 0:
        net: nn.Module = OccupancyTokenizer(cfg.vq)
        ids = (truth(i)[0] for i in spread(len(dataset), 64))
        weight = (class_weights(ids) if net.sizes.balanced else torch.ones(FREE + 1)).to(run.device)
    else:
        net = (first_network(cfg, dataset, truth, previous, network) if stage == 1
               else load_run(cfg, previous, host, network))
        if stage == 1 and run.is_main:
            net.vlm.save_host(host)
        net.stage, vlm = stage, net.vlm
        seen = cached_sight(net.to(run.device), dataset, run)
        if stage == 3:
            net.add_planner([dataset.future(i) for i in kept])
            inputs = cached_inputs(net.eval(), Keyframes(dataset, None, cfg, vlm, stage, kept, seen), run)
        trainable(net, stage)
        if cfg.checkpointing and stage < 3:  # stage 3 writes its chain of thought with a cache instead
            vlm.net.gradient_checkpointing_enable({"use_reentrant": False})
    net.to(run.device).train()
    if args.fsdp and stage:
        run.shard(net, ("Gemma2DecoderLayer", "SiglipEncoderLayer"))
    optimizer = make_optimizer(net, stage, cfg)
    model = run.attach(net, optimizer)
    keyframes = Keyframes(dataset, truth, cfg, vlm, stage, kept, seen, inputs)
    unseen = [keyframes.read(i, False) for i in held] if held and inputs else None
    unseen = unseen and keyframes.collate(unseen, run.device)
    for step, batch in run.batches(keyframes, args.workers, partial(keyframes.collate, device=run.device)):
        lr = set_lr(optimizer, schedule(step, run.steps, "cosine", cfg.warmup))
        with run.autocast():
            if stage == 0:
                terms = tokenizer_loss(*model(batch["ids"]), batch["ids"], weight, net.sizes)  # (7)
            else:
                terms = model(batch)  # (10)
        optimizer.zero_grad(set_to_none=True)
        sum(terms.values()).backward()
        reshard(net)
        nn.utils.clip_grad_norm_(net.parameters(), cfg.grad_clip)
        optimizer.step()
        if stage == 3 and ((step + 1) % 50 == 0 or step + 1 == run.steps):
            net.keep_best(unseen)
        run.log(step, terms, lr)


def train(cfg: Config, args) -> None:
    """The verb train: all stages. A finished one is not run again: the same command goes on after a kill."""
    if args.fsdp and cfg.optimizer == "muon":
        raise InputError("--fsdp: Muon's matrices cannot be sharded; use --optimizer adamw")
    run, out = setup(args.device), args.out or Path("runs/occvla")
    root = verbs.data_root(args, run, "driving", size=args.world_size)
    dataset = open_split(root, args.version, args.split, cfg.image_size, args.cache)
    previous, resume = args.tokenizer or out / STAGES[0], args.resume
    counted = planning.check_questions(dataset)
    for stage in range(1 if args.tokenizer else 0, len(STAGES)):
        if run.is_main:
            print(f"{counted}\n--- stage {stage}: {STAGES[stage][2:]}")
        args.resume = resume and (out / STAGES[stage] / "config.json").is_file()
        train_stage(stage, cfg, dataset, args.labels, args, out / STAGES[stage], previous, out / "0_host")
        previous = out / STAGES[stage]


# --- 5  Predict and evaluate --------------------------------------------------------------------------------


@torch.no_grad()
def predict(net: OccVLA, images: Tensor, questions: Sequence[str] = (), future: Future | None = None,
            stream: bool = True) -> Prediction:
    """images (N, 3, H, W) of a keyframe -> all that the network predicts. stream False skips the occupancy
    stream: nothing else changes. A head reads command and history of `future` if its row has them.
    """
    vlm, device = net.vlm, net.code_weight.device
    with autocast(device, net.cfg.amp):
        encoded = net.encode(images[None].to(device), hidden=stream)
        occupancy, answers, free = np.full(OCC3D.shape, FREE, np.uint8), [], []
        if stream:
            occupancy = net.ids(net.occupy(net.occupancy_pass(encoded)))[0].cpu().numpy()
        if questions:
            rows = torch.zeros(len(questions), dtype=torch.int64, device=device)
            best = vlm.score(encoded, questions, rows, ANSWERS).argmax(1)
            answers = [ANSWERS[k] for k in best.tolist()]
            free = [vlm.text.decode(ids) for ids in vlm.generate(encoded, questions, rows, limit=6)]
        context, valid, (text,) = net.plan_context(encoded)
        paths = net.plan(context, valid, [text], ego_of([future or planning.unknown_future()], device))
    paths = {row: path[0].double().cpu().numpy() for row, path in paths.items()}
    return Prediction(occupancy, answers, free, text, parse_action(text), paths)


def drive(net: OccVLA, dataset: NuScenesOccupancy, i: int, *, images: int,
          questions: Sequence[str] = (), stream: bool = True) -> Prediction:
    """Keyframe i with the images of keyframe `images`."""
    pixels = read_images(dataset, images, net.cfg.n_frames)
    return predict(net, pixels, questions, dataset.future(i), stream)


@torch.no_grad()
def skipping(net: OccVLA, images: Tensor) -> dict[str, float]:
    """Images (N, 3, s, s): what the stream changes in text and waypoints; its cost beside the plain VLM."""
    vlm, batch = net.vlm, images[None].to(net.code_weight.device)

    def own(stream: bool) -> tuple[Tensor, Callable]:
        encoded = net.encode(batch, hidden=stream)
        if stream:  # before the text, which must not change
            net.ids(net.occupy(net.occupancy_pass(encoded)))
        return vlm.own_pass(encoded, PLAN_PROMPT)

    with autocast(batch.device, net.cfg.amp):
        metrics = planning.skipping_cost(own, partial(vlm.plain_pass, batch, PLAN_PROMPT), batch.device)
    on, off = (predict(net, images, stream=stream).paths for stream in (True, False))
    paths = {"skip_difference_path": max(float(np.abs(on[row] - off[row]).max()) for row in on)} if on else {}
    return metrics | paths


def load_run(cfg: Config, out: Path, host: Path | None = None, network: type[OccVLA] = OccVLA) -> OccVLA:
    """The network of stage folder `out` with its weights. host: default <run>/0_host."""
    net = build(cfg, folder=host or out.parent / "0_host", network=network)
    if out.name == STAGES[3]:
        net.add_planner()
    load_checkpoint(out, net)
    net.stage = STAGES.index(out.name)
    return net.eval()


def score(net: OccVLA, args, out: Path, folders: Sequence[Path], dataset: NuScenesOccupancy,
          train_set: NuScenesOccupancy, known: dict[str, float] | None = None) -> dict[str, float]:
    """Scores the stage `out`; folders: all its stages. known: see `planning.report`."""
    indices, scored = spread(len(dataset), args.eval_frames), args.labels or dataset.gts is not None
    truth = ground_truth(dataset, args.labels) if scored or net.cfg.lambda_occ > 0 else None
    extra = reconstruction(net.tokenizer, map(truth, indices[:: max(1, len(indices) // 20)])) if truth else {}
    if known is None:
        extra |= skipping(net, read_images(dataset, indices[0], net.cfg.n_frames))
    return planning.report(partial(drive, net, dataset), dataset=dataset, train_set=train_set, out=out,
                           cost=stages_cost(net, folders), truth=truth, action_of=meta_action,
                           rows=list(net.planner), extra=extra, known=known, **planning.report_options(args))


def evaluate(cfg: Config, args) -> None:
    """The verb eval: tables, result.json, pictures beside the checkpoint."""
    out, source = cli.last_stage(args.ckpt), args.run["data"]
    if out.name not in STAGES[1:]:
        raise InputError(f"--ckpt {args.ckpt}: not a stage of a run with a VLM ({', '.join(STAGES[1:])})")
    dataset = verbs.open_eval(cfg, args)
    home = Path(source["root"]) if Path(source["root"]).is_dir() else dataset.root
    train_set = open_split(home, source["version"], source["split"], cfg.image_size, args.cache)  # the run's
    print(planning.check_questions(dataset))
    folders = [out.parent / stage for stage in STAGES[: STAGES.index(out.name) + 1]]
    score(load_run(cfg, out).to(setup(args.device).device), args, out, folders, dataset, train_set)


def predict_frames(cfg: Config, args) -> None:
    """The verb predict: <token>.npz of each keyframe, sheets and the viewer; no ground truth is read."""
    net = load_run(cfg, cli.last_stage(args.ckpt)).to(setup(args.device).device)
    dataset = verbs.open_eval(cfg, args)
    planning.predict_frames(partial(drive, net, dataset), dataset, args.out, action_of=meta_action,
                            frames=args.eval_frames, pictures=args.pictures)


def ask(cfg: Config, args) -> None:
    """The verb ask: any six images, or DriveLM's, through the host's own processor."""
    asked = read_drivelm(args.drivelm) if args.drivelm else planning.read_asked(args.images, args.question)
    net = load_run(cfg, cli.last_stage(args.ckpt)).to(setup(args.device).device)
    pixels = lambda files: net.vlm.text.pixels(files).repeat(cfg.n_frames, 1, 1, 1)  # noqa: E731
    planning.ask(lambda files, questions: predict(net, pixels(files), questions, stream=False), asked)


def describe(cfg: Config, args) -> None:
    """The verb describe: parameters and FLOPs of the parts, memory of the stages; on the meta device."""
    with torch.device("meta"):
        net = build(cfg, pretrained=False)
        net.add_planner()
        images = torch.empty(1, len(CAMERAS) * cfg.n_frames, 3, *cfg.image_size)
    vlm, tokenizer, ego = net.vlm, net.tokenizer, ego_of([planning.unknown_future()], "meta")
    text = thought_text("moving car", 10, 2, ("keep", "left"))
    packs = vlm.stack([vlm.exchange(PLAN_PROMPT, text)], "meta")

    def everything() -> None:
        states = vlm.run(vlm.encode(images), packs, torch.zeros(1, dtype=torch.int64), hidden=True)
        tokenizer.logits(tokenizer.decode(net.latent(net.occupy(states))))
        net.plan(states.last, torch.ones_like(states.last[..., 0], dtype=torch.bool), [text], ego,
                 net.planner)

    print(f"{args.preset}: {vlm.tokens} image tokens a keyframe, {packs.shape[2]} of text, codes "
          f"{tokenizer.side}x{tokenizer.side}")
    host = vlm.net.model
    describe_parts(everything, {
        "vision": host.vision_tower, "projector": host.multi_modal_projector, "language": host.language_model,
        "occupancy": net.occupancy, "decoder": tokenizer.decoder, "planner": net.planner})
    for stage, name in enumerate(STAGES):
        trainable(net, stage) if stage else tokenizer.requires_grad_(True)
        describe_memory(f"stage {name}", net if stage else tokenizer)


def world(cfg: Config, args) -> None:
    """The verb world: the synthetic world, and the tiny VLM that has encoded others."""
    verbs.world(cfg, args)
    if cfg.vlm in paligemma.SIZES:
        build(cfg)


VERBS = {
    "train": ("all four stages",
              f"out {verbs.DATA} labels tokenizer seed steps device fsdp resume cache workers world-size"),
    "eval": ("score a run: QA, planning, occupancy, baselines, pictures",
             f"ckpt! {verbs.DATA} labels save-pred device cache eval-frames eval-questions rayiou pictures"),
    "ask": ("six images and a question, or DriveLM's keyframes -> answer, chain of thought, waypoints",
            "ckpt! images question drivelm device"),
    "baselines": ("planners that see no image, and the meta-actions of a split", f"{verbs.DATA} cache"),
}
FLAGS = {
    "images": cli.Flag(f"image files of the six cameras: {' '.join(CAMERAS)}", tuple[str, ...]),
    "question": cli.Flag("what to ask", str),
    "drivelm": cli.Flag("a DriveLM question file (image paths relative to it): all of it is asked", Path),
    "tokenizer": cli.Flag("a run's 0_tokenizer, instead of training one", Path | None),
    "fsdp": cli.Flag("under torchrun, shard the weights (FSDP2) instead of copying them", bool, False),
    "eval-questions": cli.Flag("questions asked per keyframe, evenly spaced; 0: all", int, 0),
    "world-size": cli.Flag("synthetic world", Literal["questions", "drives", "mini", "demo", "claims"],
                           "drives"),
}


def main() -> None:
    actions = {"world": world, "train": train, "eval": evaluate, "predict": predict_frames, "ask": ask,
               "baselines": lambda cfg, args: planning.report_baselines(args, action_of=meta_action),
               "describe": describe}
    verbs.main(__doc__, Config, PRESETS, actions, verbs=VERBS, flags=FLAGS)


if __name__ == "__main__":
    main()
