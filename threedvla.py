"""3DVLA: 3D understanding that plugs into a vision-language-action policy as a few more tokens.

Paper   "3DVLA" (plug-and-play 3D understanding for VLA policies), Xia, Tang, Wei, Wang; arXiv 2605.29416v1
        (May 2026). Not UMass's "3D-VLA" (2024). Independent re-implementation: no authors' code is known,
        and of the text only a summary and third-party notes: some exact formulas are reconstructions.
Idea    A frozen VLM's image tokens are lifted to 3D by depth and calibration and fused across views. Probes,
        matched once in 3D for all views, become object tokens. A self-supervised predictor gives features at
        coordinates that no camera sees. Both kinds of tokens, encoded relative to the gripper, join the
        prefix that the action expert attends to: the same few lines (`plug`) for every policy.

RUN
    python threedvla.py train --policy pi0 --variant C --out runs/x   # writes demonstrations first; two cores
    python threedvla.py train --variant A --base runs/x --out runs/y  # another variant, the same base policy
    python threedvla.py eval --ckpt runs/x                            # success per perturbation, GIFs
    python threedvla.py eval --ckpt runs/x --env libero_spatial --episodes 1   # make setup-libero
    python threedvla.py train --data-root D --out runs/z              # LIBERO's: common.robot convert
    python threedvla.py ablate --claim main --seeds 3                 # a claim: experiments/threedvla.py
    python threedvla.py describe --preset paper                       # parameters, FLOPs: no data, no GPU

GLOSSARY
    symbol      name         shape                meaning                                             place
    X_fmap      maps         (B, V, C, h, w)      image tokens of the VLM, one per patch                3.1
    P_flat      points       (B, V, h, w, 3)      their 3D coordinates in the base frame [m]            (1)
    M           memory       (B, V, h, w, d)      fused, position-aware tokens                          (1)
    c_j         content      (B, Q, d)            a probe's feature                                     3.2
    p_j         point        (B, Q, 3)            its 3D point [m]                                      (4)
    u_jv        uv           (B, V, Q, 2)         its projection, in [0, 1] of the picture              (2)
    F_l^v       pyramid      (B, V, d, h_l, w_l)  feature levels, strides 8, 16, 32                     3.2
    h_jv        sampled      (B, V, Q, d)         a view's features at a probe                          (3)
    l_j, u_i    logit        (B, Q)               objectness; uncertainty 1 - sigmoid(l)                3.4
    P_comp      comp         (B, 30, 3)           coordinates of unseen object parts [m]                3.3
    Z^          completion   (B, 30, d)           the predictor's features there, f_j of (15)           (10)
    dp          offset       (B, T, 3)            from the gripper to a token's point [m]               (14)
    g_i         gate         (B, 16, d)           share of local context that an object token takes     (16)
    Further letters: A action steps, D action channels, T objects or tokens, N = V h w, M heads.

EQUATION MAP
    (1)  position embedding, spatial fusion -> PositionEmbedding, SpatialFusion
    3.1  coordinates of image tokens        -> token_points
    3.2  pyramid and mask map               -> Pyramid
    (2)  depth-clamped projection           -> project_probes
    (3)  deformable cross-attention         -> ProbeLayer; common/networks/transformer.py: DeformableAttention
         view gate                          -> ViewGate
    (4)  bounded refinement                 -> move_points
    3.2  boxes and masks of a view          -> ProbeHeads
    (5)  one 3D matching for all views      -> match_costs, match
    (6)  instance loss                      -> instance_loss
    3.2  pseudo ground truth                -> common/demonstrations.py: pseudo_targets
    3.3  asymmetric masking                 -> asymmetric_mask
    3.3  completion coordinates             -> common/networks/pointattn.py: completion_points, PointAttN
    (7)  context tokens; their teacher, EMA -> ContextEncoder, ThreeD.teach, ThreeD.move_teacher
    (8)  target queries                     -> Predictor
    (9)  rotated queries and keys, 3D RoPE  -> rotary; common/geometry.py: rope_3d
    (10) hybrid attention                   -> HybridBlock
    (11) self-supervised loss               -> ssl_loss
    (12) direction, (13) variance           -> direction_term, variance_term
    (14) place relative to the end effector -> RelativeEncoding
    (15) spatially biased local context     -> LocalContext
    (16) uncertainty-guided routing gate    -> RoutingGate
    hook: 3D tokens join the prefix         -> plug; common/networks/transformer.py: TokenOut
    Sec. 4: L_action, the base policies     -> common/networks/pi0.py: pi0_flow; common/networks/xvla.py: XVLA
            stages; LIBERO-Plus' average    -> train_stage; common/metrics.py: libero_plus_average
            perturbations                   -> data/tabletop.py: PERTURBATIONS

ASSUMPTIONS    What the summary leaves open; the flag or the place that changes it stands beside.
    * weights of (6): 2, 5, 2, 5, 5, 10; L_action : L_inst = 1 : 1            WEIGHTS
    * learning rates 5e-5 -> 5e-6, weight decay 0.01                           --lr --lr-3d --weight-decay
    * 300 probes (the notes disagree: 300, or 100)                             --probes
    * alpha 0.1 m; eps 1e-3 m; 8 heads, 4 points, 3 levels                     move_points, --sample-heads
    * RoPE scale: 1 is literal: 5 cm turn by 3 degrees or less; tiny: 20; fusion: no RoPE      --rope-scale
    * asymmetric: blocks; twice the ratio (at most 0.8) in one view            asymmetric_mask, --mask-ratio
    * teacher: the EMA of a trainable context encoder over the frozen memory; (13): a hinge at the teacher's
      own deviation per channel                                                ThreeD.teach, variance_term
    * object tokens: the 16 likeliest probes, above 0.3                        choose_objects
    * the six least certain objects are completed; variant C keeps their tokens        ThreeD.complete
    * completion queries, and in stage 2 every fourth hidden token, are of "no view"   ThreeD.forward
    * (14) learns in both stages; stage 2 freezes stage 1's other modules      ThreeD.frozen
    * self-attention among probes; vector gate; 5 neighbours, 10 frequencies   ProbeLayer, LocalContext
DEVIATIONS
    * the tiny policies are random, trained whole on the demonstrations (stage 0 stands in for pre-training),
      then frozen, and every frame's tokens kept on disk: stage 2 learns from batches of --head-batch frames.
      What a pre-trained VLM can do, see what the words name, the image tokens learn in stage 0 from the
      simulator's masks (--w-ground): their keys carry names, their values places in the picture, no points.
    * tiny: actions in one step (--head l1); 3D tokens that read the prefix, unread (--tokens-at front); (4)
      moves probes from their masks' depth (--start mask); mirror images complete objects (--completion).
    * VL-SAM-V2 is not public: --pseudo has the simulator's masks without identities, or GroundingDINO + SAM.

CLAIMS         the paper's; ours are in RESULTS.md and never in one table with these
    main        LIBERO-Plus average, zero-shot: pi0.5 84.2 < A 85.0 < B 85.7 < C 86.0; RoboTwin easy/hard:
                pi0 46.4/16.3 < A 50.1/18.9 < B 53.4/21.8 < C 54.5/23.2; X-VLA 70.0/39.0 < 71.3/40.4 <
                72.1/41.6 < 72.6/42.1
    side        without fusion 84.6, 2D matching 84.5, without relative encoding 84.8 (A: 85.0); 25 % masks
                85.5 (B: 85.7). 0.086 B added parameters; 5,000 + 5,000 steps at batch 64 on 4 A800
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from common import cli, verbs, worlds
from common.backbones import describe as table
from common.demonstrations import Demonstrations, instance_masks, mask_maker, pseudo_targets
from common.engine import Session
from common.files import InputError, read_json
from common.frozen import digest, frozen_rows
from common.geometry import exact, fourier, hide_blocks, invert, rope_3d, unproject_cells
from common.losses import (cxcywh_to_xyxy, dice_loss, focal_cost, generalized_box_iou, mask_cross_entropy,
                           sigmoid_focal_loss)
from common.networks import pointattn
from common.networks.pi0 import SIZES, Pi0, Prefix, ground_loss, pi0_time_quantile
from common.networks.transformer import (Attention, Block, DeformableAttention, PlaceCode, Rotate, TokenOut,
                                         mlp)
from common.networks.xvla import XVLA
from common.observation import Observation, stack_observations
from common.report import episodes
from common.train import (autocast, joined, load_checkpoint, load_weights, make_optimizer, over_ranks,
                          schedule, set_apart, set_lr, setup, stages_cost)

# --- 1  Configuration ---------------------------------------------------------------------------------------

OBJECTS, OCCLUDED, QUERIES = 16, 6, 5  # object tokens; completed objects; completion queries of each; Sec. 4


@dataclass(frozen=True)
class Config:
    # policy
    policy: Literal["pi0", "pi05", "xvla"] = "pi0"  # Sec. 4: pi0, pi0.5, X-VLA
    variant: Literal["base", "A", "B", "C"] = "C"  # Table 3: A + objects, B + predictor, C + routing
    vlm: str | None = None  # hub id or folder of PI0 weights (transformers' form); none: random
    sizes: Literal["tiny", "libero", "paper"] = "paper"  # of the base policy: common.networks.pi0.SIZES
    views: int = 2  # cameras; LIBERO (RoboTwin: 3)
    actions: int = 7  # channels of an action; LIBERO (RoboTwin: 14)
    head: Literal["flow", "l1"] = "flow"  # flow matching, or actions in one step (OpenVLA-OFT; tiny)
    # 3D understanding
    tokens_at: Literal["end", "front"] = "end"  # of the prefix; Sec. 3: appended; front: ours, tiny
    width: int = 768  # d; assumption, lands near the paper's 0.086 B
    heads: int = 12  # assumption
    fusion_layers: int = 3  # assumption
    rope_scale: float = 1.0  # [rad/m] of the fastest pair; literal
    probes: int = 300  # third-party notes: 300, elsewhere 100
    mask_width: int = 256  # channels of the mask product; Mask2Former
    sample_heads: int = 8  # assumption: Deformable DETR
    start: Literal["probe", "mask"] = "probe"  # what (4) moves: a probe; its mask's depth (ours, tiny)
    completion: Literal["pointattn", "mirror"] = "pointattn"  # Sec. 3.3; mirror: ours, tiny
    mask_ratio: float = 0.5  # Sec. 4: asymmetric, 50 %
    ema: float = 0.999  # m of the teacher; Sec. 3.3
    # optimisation
    optimizer: Literal["adamw", "muon"] = "adamw"  # Sec. 4; tiny: Muon, without the expert
    batch: int = 64  # of all processes together; Sec. 4
    head_batch: int = 64  # of stage 2; Sec. 4. Larger (tiny): frozen tokens are kept on disk
    base_steps: int = 30000  # stage 0; openpi's LIBERO fine-tuning; ours
    base_lr: float = 5e-5  # openpi
    w_ground: float = 0.0  # stage 0: image tokens learn where the words' objects are; ours, tiny
    stage1_steps: int = 5000  # Sec. 4
    stage2_steps: int = 5000  # Sec. 4
    warmup: int = 1200  # Sec. 4: 1,200 + 3,800
    lr: float = 5e-5  # of the action expert; assumption
    lr_3d: float = 5e-5  # of the 3D modules; assumption
    lr_floor: float = 0.1  # last rate / peak; assumption: 5e-6
    weight_decay: float = 0.01  # assumption
    amp: Literal["off", "bf16"] = "bf16"  # openpi


PRESETS = {
    "tiny": Config(  # two CPU cores
        sizes="tiny", head="l1", tokens_at="front", width=96, heads=4, fusion_layers=2, rope_scale=20.0,
        probes=40, mask_width=48, sample_heads=4, start="mask", completion="mirror", ema=0.98, amp="off",
        optimizer="muon", batch=16, head_batch=256, base_steps=1200, base_lr=1e-2, w_ground=1.0, warmup=50,
        stage1_steps=1200, stage2_steps=600, lr=1e-3, lr_3d=2e-3, lr_floor=0.05, weight_decay=0.05),
    "base": Config(sizes="libero", batch=8, head_batch=8),  # ours: one 24 GB GPU
    "paper": Config(),
}

# --- 3.1  Multi-view spatial fusion (eq. 1) -----------------------------------------------------------------


class PositionEmbedding(nn.Module):
    """(1) E_3D = LayerNorm(W_2 GELU(W_1 P + b_1) + b_2): coordinates (..., 3) [m] -> (..., d)."""

    def __init__(self, width: int):
        super().__init__()
        self.mlp, self.norm = mlp(3, width, width), nn.LayerNorm(width)

    @exact
    def forward(self, points: Tensor) -> Tensor:
        return self.norm(self.mlp(points))


class SpatialFusion(nn.Module):
    """(1) M = Encoder(M_flat + E_3D): global attention over all V h w tokens."""

    def __init__(self, c_in: int, width: int, heads: int, layers: int):
        super().__init__()
        self.project = nn.Sequential(nn.LayerNorm(c_in), nn.Linear(c_in, width))
        self.position, self.norm = PositionEmbedding(width), nn.LayerNorm(width)
        self.layers = nn.ModuleList(Block(width, heads) for _ in range(layers))

    def forward(self, maps: Tensor, points: Tensor) -> Tensor:
        """maps (B, V, C, h, w), points (B, V, h, w, 3) -> memory (B, V, h, w, d)."""
        x = self.project(maps.permute(0, 1, 3, 4, 2)) + self.position(points)  # (B, V, h, w, d)
        y = x.flatten(1, 3)  # (B, N, d)
        for layer in self.layers:
            y = layer(y)
        return self.norm(y).view_as(x)


@exact
def token_points(depth: Tensor, K: Tensor, T_base_cam: Tensor, h: int, w: int) -> Tensor:
    """Depth (B, V, H, W) [m] -> coordinates (B, V, h, w, 3) of the patches' centres at their median depth.

    A patch without any measured depth lies at 2 m (ours).
    """
    H, W = depth.shape[-2:]
    skip = max(1, H // h // 8)  # some 64 pixels of a patch suffice for its median
    patches = depth[..., skip // 2 :: skip, skip // 2 :: skip].unflatten(-1, (w, -1)).unflatten(-3, (h, -1))
    patches = patches.transpose(-3, -2).flatten(-2).sort(-1).values  # (B, V, h, w, n)
    n, none = patches.shape[-1], (patches <= 0).sum(-1, keepdim=True)
    middle = (none + (n - none) // 2).clamp_max(n - 1)
    z = torch.where(none < n, patches.gather(-1, middle), 2.0)[..., 0]  # (B, V, h, w)
    return unproject_cells(z, K, T_base_cam, (H, W))


# --- 3.2  Object-centric 3D instance module (eq. 2-6) -------------------------------------------------------


class Pyramid(nn.Module):
    """Memory -> levels at strides 8, 16, 32, mask map at stride 4; the memory itself counts as stride 16."""

    def __init__(self, width: int, mask_width: int):
        super().__init__()
        up, conv = partial(nn.ConvTranspose2d, width, kernel_size=2, stride=2), partial(nn.Conv2d, width)
        self.levels = nn.ModuleList([up(width), conv(width, 1), conv(width, 3, 2, 1)])
        self.mask = nn.Sequential(up(width), nn.GELU(), up(mask_width))

    def forward(self, memory: Tensor) -> tuple[list[Tensor], Tensor]:
        """(B, V, h, w, d) -> levels (B, V, d, h_l, w_l), mask map (B, V, d_m, 4 h, 4 w)."""
        x, BV = memory.permute(0, 1, 4, 2, 3).flatten(0, 1), memory.shape[:2]
        return [level(x).unflatten(0, BV) for level in self.levels], self.mask(x).unflatten(0, BV)


@exact
def project_probes(points: Tensor, K: Tensor, T_base_cam: Tensor, size: tuple[int, int],
                   eps: float = 1e-3) -> tuple[Tensor, Tensor]:  # [m] assumption
    """(2) z u = K (R p + t), z clamped to eps: points (B, Q, 3) [m], pictures of size (H, W) -> uv (B, V, Q,
    2) in [0, 1] of the picture, at most one picture outside it; valid (B, V, Q): in it, before the camera."""
    T = invert(T_base_cam)  # camera <- base
    camera = torch.einsum("bvij,bqj->bvqi", T[..., :3, :3], points) + T[..., None, :3, 3]  # (B, V, Q, 3)
    image, z = torch.einsum("bvij,bvqj->bvqi", K, camera), camera[..., 2]
    uv = image[..., :2] / z.clamp_min(eps)[..., None] / image.new_tensor([size[1], size[0]])
    return uv.clamp(-1, 2), (z > eps) & ((uv >= 0) & (uv <= 1)).all(-1)


class ViewGate(nn.Module):
    """g = sigmoid(MLP(h) / tau), normalised over the views that see the probe; none: all weights are 0."""

    def __init__(self, width: int, tau: float = 1.0):  # at first; assumption
        super().__init__()
        self.mlp, self.tau = mlp(width, width // 2, 1), nn.Parameter(torch.tensor(tau))

    def forward(self, sampled: Tensor, valid: Tensor) -> Tensor:
        """sampled (B, V, Q, d), valid (B, V, Q) -> weights (B, V, Q)."""
        gate = torch.sigmoid(self.mlp(sampled)[..., 0] / self.tau.clamp_min(1e-2)) * valid
        return gate / (gate.sum(1, keepdim=True) + 1e-6)


class ProbeLayer(nn.Module):
    """(3) h_jv = sum over heads, levels l and places k of A_lk(c_j) F_l^v(u_jv + du_lk(c_j)), in each view.

    The views' h_jv are gated and added to c_j; self-attention and feed-forward follow; then (4) moves p_j.
    """

    def __init__(self, width: int, heads: int, sample_heads: int):
        super().__init__()
        self.sample, self.gate = DeformableAttention(width, sample_heads), ViewGate(width)
        self.norm, self.block = nn.LayerNorm(width), Block(width, heads)
        self.coordinate = mlp(width, width, 3)
        nn.init.zeros_(self.coordinate[-1].weight), nn.init.zeros_(self.coordinate[-1].bias)

    def forward(self, content: Tensor, point: Tensor, pyramid: list[Tensor], uv: Tensor, valid: Tensor,
                start: Callable | None = None) -> tuple[Tensor, Tensor]:
        """content (B, Q, d), point (B, Q, 3) -> both after this layer. start(content): what (4) moves."""
        sampled = self.sample(content, uv, pyramid)  # (3), (B, V, Q, d)
        update = (self.gate(sampled, valid)[..., None] * sampled).sum(1)
        content = self.block(self.norm(content + update))
        return content, move_points(start(content) if start else point, self.coordinate(content))  # (4)


def move_points(points: Tensor, step: Tensor, alpha: float = 0.1) -> Tensor:  # [m] assumption
    """(4) p + alpha tanh(step): points, step (B, Q, 3) [m] -> (B, Q, 3); no coordinate moves beyond alpha."""
    return points + alpha * torch.tanh(step)


class Probes(NamedTuple):
    """The probes after one layer."""

    content: Tensor  # (B, Q, d)
    point: Tensor  # (B, Q, 3) [m]
    logit: Tensor  # (B, Q) objectness
    boxes: Tensor  # (B, V, Q, 4) cx, cy, w, h in [0, 1]
    embed: Tensor  # (B, V, Q, d_m): its product with the mask map is the mask


class ProbeHeads(nn.Module):
    """Objectness of a probe, by c; its box and mask in each view, by c + PE(u)."""

    def __init__(self, width: int, mask_width: int, octaves: int = 6):
        super().__init__()
        self.octaves, self.view = octaves, nn.Linear(2 + 4 * octaves, width)  # PE(u)
        self.object, self.box = nn.Linear(width, 1), mlp(width, width, 4)
        self.mask = mlp(width, width, mask_width)
        nn.init.constant_(self.object.bias, -math.log(9))  # a tenth of the probes at first
        nn.init.zeros_(self.box[-1].weight)
        self.box[-1].bias = nn.Parameter(torch.tensor([0.0, 0.0, -2.0, -2.0]))

    def embed(self, content: Tensor, uv: Tensor) -> Tensor:
        """content (B, Q, d), uv (B, V, Q, 2) -> the masks' side of the product (B, V, Q, d_m)."""
        return self.mask(content[:, None] + self.view(fourier(uv, self.octaves)))

    def forward(self, content: Tensor, point: Tensor, uv: Tensor) -> Probes:
        """content (B, Q, d), point (B, Q, 3), uv (B, V, Q, 2) -> Probes."""
        seen = content[:, None] + self.view(fourier(uv, self.octaves))  # (B, V, Q, d)
        anchor = torch.logit(uv.clamp(1e-3, 1 - 1e-3))
        boxes = torch.sigmoid(self.box(seen) + torch.cat([anchor, torch.zeros_like(anchor)], -1))
        return Probes(content, point, self.object(content)[..., 0], boxes, self.mask(seen))


class InstanceModule(nn.Module):
    """Probes over the fused memory -> one Probes per layer (the last is the result), and the mask map."""

    workspace = (-0.45, -0.40, 0.85), (0.35, 0.40, 1.25)  # [m] box of the probes' first points; assumption

    def __init__(self, cfg: Config, layers: int = 2):  # assumption
        super().__init__()
        (low, high), d, self.from_masks = torch.tensor(self.workspace), cfg.width, cfg.start == "mask"
        self.content = nn.Parameter(0.02 * torch.randn(cfg.probes, d))
        self.point = nn.Parameter(low + (high - low) * torch.rand(cfg.probes, 3))
        self.where, self.pyramid = PositionEmbedding(d), Pyramid(d, cfg.mask_width)
        self.heads = ProbeHeads(d, cfg.mask_width)
        self.layers = nn.ModuleList(ProbeLayer(d, cfg.heads, cfg.sample_heads) for _ in range(layers))

    def forward(self, memory: Tensor, batch: Batch) -> tuple[list[Probes], Tensor]:
        """memory (B, V, h, w, d) -> Probes of each layer, mask map (B, V, d_m, 4 h, 4 w)."""
        cameras = batch.K, batch.T_base_cam, tuple(batch.depth.shape[-2:])
        levels, mask_map = self.pyramid(memory)
        point, out = self.point.expand(len(memory), -1, -1), []
        content, at = self.content + self.where(point), project_probes(point, *cameras)
        cells = cell_points(batch, mask_map.shape[-2:]) if self.from_masks else None
        for layer in self.layers:
            start = partial(self.mask_point, point, at[0], mask_map, cells) if self.from_masks else None
            content, point = layer(content, point, levels, *at, start)
            at = project_probes(point, *cameras)
            out.append(self.heads(content, point, at[0]))
        return out, mask_map

    @exact
    def mask_point(self, point: Tensor, uv: Tensor, mask_map: Tensor, cells: Tensor, content: Tensor):
        """Mean of the cells' points (B, V, h4, w4, 3), NaN without depth, by masks and a Gaussian of 0.1 m
        around the probes' points (B, Q, 3), without which all start as one. -> (B, Q, 3)."""
        masks = view_masks(self.heads.embed(content, uv), mask_map).transpose(1, 2).flatten(2)
        cells, none = cells.flatten(1, 3).nan_to_num(), cells.flatten(1, 3)[:, None, :, 0].isnan()
        weight = 2 * masks.float() - 50 * torch.cdist(point, cells).square()  # (B, Q, V h4 w4)
        return torch.where(none, -1e4, weight).softmax(-1) @ cells


def cell_points(batch: Batch, size: tuple[int, int]) -> Tensor:
    """Points (B, V, h4, w4, 3) [m] of the mask map's cells; NaN without depth."""
    depth = F.interpolate(batch.depth, tuple(size), mode="nearest-exact")
    points = unproject_cells(depth, batch.K, batch.T_base_cam, tuple(batch.depth.shape[-2:]))
    return torch.where(depth[..., None] > 0, points, torch.nan)


def view_masks(embed: Tensor, mask_map: Tensor) -> Tensor:
    """embed (B, V, Q, d_m), mask map (B, V, d_m, h4, w4) -> logits (B, V, Q, h4, w4): a product per cell."""
    return torch.einsum("bvqd,bvdhw->bvqhw", embed, mask_map)


def choose_objects(probes: Probes, matches: Matches | None = None) -> tuple[Tensor, Tensor]:
    """The 16 likeliest probes, matched ones first -> index (B, 16), valid (B, 16): above 0.3, or matched."""
    rank = torch.sigmoid(probes.logit)
    if matches is not None:  # in training
        rank = rank.clone()
        rank[matches.b, matches.q] += 1
    index = rank.topk(min(OBJECTS, rank.shape[1]), dim=1).indices
    return index, rank.gather(1, index) > 0.3  # assumption


# --- 3.2  Matching, the instance loss, pseudo ground truth --------------------------------------------------

WEIGHTS = {"cls": 2.0, "l1": 5.0, "giou": 2.0, "ce": 5.0, "dice": 5.0, "p3d": 10.0}  # (5), (6); assumption


class Targets(NamedTuple):
    """Pseudo ground truth: T objects of each sample."""

    points: Tensor  # (B, T, 3) [m]
    boxes: Tensor  # (B, T, V, 4) cx, cy, w, h in [0, 1]
    masks: Tensor  # (B, T, V, h4, w4) share of each cell
    valid: Tensor  # (B, T, V) bool: view v shows object t


class Matches(NamedTuple):
    """R pairs of a probe and an object."""

    b: Tensor  # (R,) sample
    q: Tensor  # (R,) probe
    t: Tensor  # (R,) object
    views: Tensor  # (R, V) bool: the views in which they count


def match_costs(probes: Probes, targets: Targets, w_3d: float = WEIGHTS["p3d"]) -> Tensor:
    """(5) Cost of probe q for object t, (B, V, Q, T): class, box L1, box GIoU in a view, 3D distance (L1)."""
    views = probes.boxes.shape[:2]
    boxes = probes.boxes.flatten(0, 1), targets.boxes.transpose(1, 2).flatten(0, 1)  # (B V, Q or T, 4)
    cls = torch.stack([focal_cost(l[:, None], l.new_zeros(1))[:, 0] for l in probes.logit])  # (B, Q)
    l1 = torch.cdist(*boxes, p=1).unflatten(0, views)
    giou = torch.vmap(generalized_box_iou)(*map(cxcywh_to_xyxy, boxes)).unflatten(0, views)
    cost = WEIGHTS["cls"] * cls[:, None, :, None] + WEIGHTS["l1"] * l1 - WEIGHTS["giou"] * giou
    return cost + w_3d * torch.cdist(probes.point, targets.points, p=1)[:, None]  # (B, 1, Q, T) [m]


@torch.no_grad()
def match(probes: Probes, targets: Targets) -> Matches:
    """(5) The costs are averaged over the views that see an object, and assigned once for all views."""
    cost, valid = match_costs(probes, targets).float().cpu(), targets.valid.transpose(1, 2).cpu()
    if not cost.isfinite().all():
        raise InputError("matching: costs are not finite: lower --lr-3d, or mend the frames' camera poses")
    pairs = []
    for b in range(len(cost)):
        present = valid[b].any(0).nonzero()[:, 0]  # (T',)
        share = valid[b][:, None, present].float()  # (V, 1, T')
        mean = (cost[b][..., present] * share).sum(0) / share.sum(0)  # (Q, T')
        pairs += [(b, int(q), int(present[j])) for q, j in zip(*linear_sum_assignment(mean.numpy()))]
    b, q, t = torch.tensor(pairs, dtype=torch.long, device=probes.logit.device).view(-1, 3).T
    return Matches(b, q, t, targets.valid[b, t])


def instance_loss(layers: list[Probes], mask_map: Tensor, targets: Targets,
                  match: Callable = match) -> tuple[dict[str, Tensor], Matches]:
    """(6) Focal, box L1, GIoU, mask CE, mask dice, 3D L1, weighted, mean over layers; the last matches."""
    terms = {name: mask_map.new_zeros(()) for name in WEIGHTS}
    for probes in layers:
        m = match(probes, targets)
        count, shown = over_ranks(mask_map.new_tensor([len(m.b), int(m.views.sum())]), 1)
        wanted = torch.zeros_like(probes.logit)
        wanted[m.b, m.q] = 1
        boxes = probes.boxes.transpose(1, 2)[m.b, m.q], targets.boxes[m.b, m.t]  # (R, V, 4)
        corners = (cxcywh_to_xyxy(x).flatten(0, 1)[:, None] for x in boxes)
        giou = torch.vmap(generalized_box_iou)(*corners)[:, 0, 0].view(m.views.shape)
        weight = m.views / m.views.sum(1, keepdim=True).clamp_min(1) / count  # mean over views, then pairs
        now = {"cls": sigmoid_focal_loss(probes.logit, wanted, reduction="sum") / count,
               "l1": (weight * (boxes[0] - boxes[1]).abs().sum(-1)).sum(),
               "giou": (weight * (1 - giou)).sum(), "ce": 0.0, "dice": 0.0,
               "p3d": (probes.point[m.b, m.q] - targets.points[m.b, m.t]).abs().sum() / count}
        for b in range(len(mask_map)):  # one sample's masks at a time bound the memory
            q, t, views = (x[m.b == b] for x in m[1:])
            logits = view_masks(probes.embed[b : b + 1, :, q], mask_map[b : b + 1])[0].transpose(0, 1)[views]
            truth = targets.masks[b, t][views]  # (n, h4, w4)
            now["ce"] = now["ce"] + mask_cross_entropy(logits, truth, shown)
            now["dice"] = now["dice"] + dice_loss(logits, truth, shown)
        terms = {name: terms[name] + WEIGHTS[name] * now[name] / len(layers) for name in terms}
    return terms, m


# --- 3.3  Coordinate-driven 3D self-supervised predictor (eq. 7-13) -----------------------------------------


def asymmetric_mask(B: int, V: int, h: int, w: int, ratio: float, generator: torch.Generator) -> Tensor:
    """Tokens to hide, (B, V, h, w) bool, V h w ratio of them in each sample, in blocks.

    Of one random view min(2 ratio, 0.8) is hidden (assumption): what one view hides another shows.
    """
    hidden, total = torch.zeros(B, V, h, w, dtype=torch.bool), round(V * h * w * ratio)
    for b in range(B):
        heavy = int(torch.randint(V, (1,), generator=generator))
        first = min(round(min(2 * ratio, 0.8) * h * w) if V > 1 else total, total)
        others, left = [v for v in range(V) if v != heavy], total - first
        shares = {v: left // (V - 1) + (k < left % (V - 1)) for k, v in enumerate(others)}
        for v, count in ({heavy: first} | shares).items():
            hide_blocks(hidden[b, v], min(count, h * w), generator)
    return hidden


class ContextEncoder(nn.Module):
    """(7) X~ = X + Phi_pos + E_view of the shown tokens, a transformer. The teacher, its EMA, sees all."""

    def __init__(self, cfg: Config, layers: int = 1):  # assumption
        super().__init__()
        self.place, self.scale = PlaceCode(cfg.width, cfg.views), cfg.rope_scale
        self.layers = nn.ModuleList(Block(cfg.width, cfg.heads) for _ in range(layers))
        self.norm = nn.LayerNorm(cfg.width)

    def forward(self, tokens: Tensor, points: Tensor, view: Tensor, shown: Tensor | None) -> Tensor:
        """tokens (B, N, d), points (B, N, 3), view (N,), shown (B, N) bool, None: all -> (B, N, d)."""
        x = tokens + self.place(points, view)
        for layer in self.layers:
            x = layer(x, shown, rotary(points, points, self.scale))
        return self.norm(x)


class Predictor(nn.Module):
    """(8) Q~ = q_mask + Phi_pos(P) + E_view reads the context by (10); a norm and a linear layer give Z^."""

    def __init__(self, cfg: Config, layers: int = 2):  # assumption
        super().__init__()
        self.token = nn.Parameter(0.02 * torch.randn(cfg.width))
        self.place = PlaceCode(cfg.width, cfg.views)
        self.layers = nn.ModuleList(HybridBlock(cfg.width, cfg.heads, cfg.rope_scale) for _ in range(layers))
        self.out = nn.Sequential(nn.LayerNorm(cfg.width), nn.Linear(cfg.width, cfg.width))

    def forward(self, points: Tensor, view: Tensor, keep: Tensor, context: Tensor, context_points: Tensor,
                shown: Tensor | None) -> Tensor:
        """points (B, n, 3), keep (B, n): which count; context (B, N, d), its points, shown -> (B, n, d)."""
        x = self.token + self.place(points, view)
        keep = keep | ~keep.any(1, keepdim=True)  # a softmax needs one; a frame without any is masked later
        for layer in self.layers:
            x = layer(x, context, points, context_points, shown, keep)
        return self.out(x)


def rotary(px: Tensor, py: Tensor, scale: float) -> Rotate:
    """(9) 3D RoPE: queries turn by their points px (B, N, 3) [m], keys by py (B, N', 3); values never do."""
    return lambda q, k: (rope_3d(q, px[:, None], scale=scale), rope_3d(k, py[:, None], scale=scale))


class HybridBlock(nn.Module):
    """(10) X <- X + HA(X, context), X <- X + HA(X, X), X <- X + FFN(X), pre-norm, rotated by (9)."""

    def __init__(self, width: int, heads: int, scale: float):
        super().__init__()
        self.norm_x, self.norm_y = nn.LayerNorm(width), nn.LayerNorm(width)
        self.cross, self.block, self.scale = Attention(width, heads), Block(width, heads), scale

    def forward(self, x: Tensor, y: Tensor, px: Tensor, py: Tensor, my: Tensor | None, mx: Tensor) -> Tensor:
        """x (B, N, d) at px, context y (B, N', d) at py; my (B, N'), mx (B, N): what counts -> (B, N, d)."""
        x = x + self.cross(self.norm_x(x), self.norm_y(y), my, rotary(px, py, self.scale))
        return self.block(x, mx, rotary(px, px, self.scale))


def ssl_loss(predicted: Tensor, true: Tensor, w_recon: float = 1.0, w_cos: float = 1.0,  # assumption
             w_var: float = 10.0) -> dict[str, Tensor]:  # third-party note
    """(11) Magnitude, direction and variance of the predictions at hidden tokens, weighted; both (n, d)."""
    return {"recon": w_recon * F.smooth_l1_loss(predicted, true),
            "cos": w_cos * direction_term(predicted, true), "var": w_var * variance_term(predicted, true)}


def direction_term(predicted: Tensor, true: Tensor) -> Tensor:
    """(12) 1 - cosine, mean over tokens; predicted, true (n, d)."""
    return (1 - F.cosine_similarity(predicted, true, dim=-1)).mean()


def variance_term(predicted: Tensor, true: Tensor) -> Tensor:
    """(13) mean over channels of max(0, gamma - std over all processes' tokens), against collapse; (n, d).
    gamma: the teacher channel's own deviation (assumption)."""
    both = true.float(), predicted.float()
    centred = (x - over_ranks(x.detach().mean(0)) for x in both)  # no gradient flows through the mean
    gamma, deviation = (torch.sqrt(over_ranks(x.square().mean(0)) + 1e-4) for x in centred)
    return F.relu(gamma - deviation).mean()


# --- 3.4  Spatially-conditioned geometry aggregation (eq. 14-16) --------------------------------------------


class RelativeEncoding(nn.Module):
    """(14) MLP of the Fourier features of dp = p - p_ee, added to object and completion tokens."""

    def __init__(self, width: int, frequencies: int = 10):  # F; assumption
        super().__init__()
        self.frequencies, self.mlp = frequencies, mlp(3 + 6 * frequencies, width, width)

    def forward(self, points: Tensor, hand: Tensor) -> Tensor:
        """points (B, T, 3), hand (B, 3) [m] -> (B, T, d)."""
        return self.mlp(fourier(points - hand[:, None], self.frequencies))


class LocalContext(nn.Module):
    """(15) h_i = sum over the K nearest P_comp of softmax_j(q_i k_j / sqrt(d) + MLP_bias(p_j - p_i)) v_j."""

    def __init__(self, width: int, neighbours: int = 5, radius: float = 0.3):  # K; [m]; assumptions
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(width, width) for _ in range(3))
        self.bias, self.count, self.radius = mlp(3, width // 2, 1), neighbours, radius

    def forward(self, content: Tensor, point: Tensor, completion: Tensor, comp: Tensor,
                valid: Tensor) -> Tensor:
        """c (B, T, d) at point (B, T, 3); f (B, n, d) at comp, valid (B, n) -> h (B, T, d), 0: none near."""
        apart = torch.cdist(point, comp)  # (B, T, n) [m]
        apart = torch.where(valid[:, None] & (apart < self.radius), apart, torch.inf)
        near = apart.topk(min(self.count, apart.shape[-1]), largest=False)  # (B, T, K)
        rows, there = torch.arange(len(content), device=content.device)[:, None, None], near.values.isfinite()
        k, v, at = (x[rows, near.indices] for x in (self.k(completion), self.v(completion), comp))
        score = torch.einsum("btd,btkd->btk", self.q(content), k) / math.sqrt(k.shape[-1])
        score = score + self.bias(at - point[:, :, None])[..., 0]
        return torch.einsum("btk,btkd->btd", torch.where(there, score, -1e4).softmax(-1) * there, v)


class RoutingGate(nn.Module):
    """(16) c^ = c + g LayerNorm(h), g = sigmoid(tau (MLP([c, h, u]) - 3)), at first 0.047."""

    def __init__(self, width: int, bias: float = -3.0, tau: float = 1.0):  # Sec. 3.4; tau: assumption
        super().__init__()
        self.mlp, self.norm = mlp(2 * width + 1, width, width), nn.LayerNorm(width)
        nn.init.zeros_(self.mlp[-1].weight), nn.init.zeros_(self.mlp[-1].bias)
        self.tau, self.bias = nn.Parameter(torch.tensor(tau)), bias

    def forward(self, content: Tensor, context: Tensor, logit: Tensor) -> Tensor:
        """content c, context h (B, T, d), objectness logit (B, T) -> c^ (B, T, d); c itself where h is 0."""
        some, u = (context != 0).any(-1, keepdim=True), 1 - torch.sigmoid(logit)[..., None]
        gate = torch.sigmoid(self.tau * (self.mlp(torch.cat([content, context, u], -1)) + self.bias))
        return content + gate * self.norm(context) * some


# --- 4  The plug-in -----------------------------------------------------------------------------------------


def plug(prefix: Prefix, tokens: Tensor, mask: Tensor, front: bool = False) -> Prefix:
    """The hook, the same for every policy: tokens (B, T, C) and their mask (B, T) join the prefix.

    They attend, and are attended to, like image tokens. front: they read the prefix, unread, and all rotary
    distances stay. With T = 0 the policy's actions are the same bit for bit.
    """
    if front:
        return prefix._replace(front=(tokens, mask))
    return prefix._replace(tokens=torch.cat([prefix.tokens, tokens.to(prefix.tokens)], 1), keys=None,
                           mask=torch.cat([prefix.mask, mask.to(prefix.mask)], 1))


class Batch(NamedTuple):
    """Observations of a batch as tensors, or what is frozen of them; fields of training alone may be None."""

    images: Tensor | None  # (B, V, 3, H, W) in [0, 1]
    depth: Tensor | None  # (B, V, H, W) [m], 0 = none
    K: Tensor | None  # (B, V, 3, 3) [px]
    T_base_cam: Tensor | None  # (B, V, 4, 4)
    state: Tensor  # (B, S); the first three: the gripper's place [m]
    texts: list[str] | None
    actions: Tensor | None = None  # (B, A, D)
    valid: Tensor | None = None  # (B, A) bool: before the demonstration's end
    targets: Targets | None = None
    ground: Tensor | None = None  # (B, V, 2, H / 4, W / 4) the object to move, and its destination
    prefix: Prefix | None = None  # from stage 1 on: the frozen VLM's
    found: Found | None = None  # stage 2: what the frozen modules found
    comp: tuple[Tensor, Tensor] | None = None  # or its completion points alone
    noise: Tensor | None = None  # (B, A, D)
    time: Tensor | None = None  # (B,) of the flow
    hidden: Tensor | None = None  # (B', V, h, w) bool of the first B' samples


class Found(NamedTuple):
    """What the 3D modules found in a batch."""

    memory: Tensor  # (B, N, d)
    points: Tensor  # (B, N, 3)
    view: Tensor  # (B, N)
    masks: Tensor  # (B, V, T, h4, w4) bool: the chosen probes' own
    probes: Probes  # of the last layer; T chosen of Q
    index: Tensor  # (B, T) which were chosen
    valid: Tensor  # (B, T) bool: which count
    terms: dict[str, Tensor]  # losses
    comp: tuple[Tensor, Tensor] | None = None  # (B, 30, 3) [m], (B, 30) bool: which are there


class ThreeD(nn.Module):
    """3DVLA's modules: fusion, instances (A), predictor (B), routing (C)."""

    match = staticmethod(match)

    def __init__(self, cfg: Config, c_in: int, c_out: int):
        super().__init__()
        d, self.views, self.ema, self.teacher, self.completer = cfg.width, cfg.views, cfg.ema, None, None
        self.fusion = SpatialFusion(c_in, d, cfg.heads, cfg.fusion_layers)
        self.instances = InstanceModule(cfg)
        self.relative, self.out_inst = RelativeEncoding(d), TokenOut(d, c_out)
        self.predicts, self.routes = cfg.variant in ("B", "C"), cfg.variant == "C"
        self.most = pointattn.POINTS[cfg.sizes]
        if self.predicts:
            self.context, self.predictor = ContextEncoder(cfg), Predictor(cfg)
            self.out_comp, self.teacher = TokenOut(d, c_out), copy.deepcopy(self.context)
            self.completer = pointattn.PointAttN(self.most) if cfg.completion == "pointattn" else None
        if self.routes:
            self.local, self.routing = LocalContext(d), RoutingGate(d)

    def frozen(self, stage: int) -> list[nn.Module | None]:
        """What does not learn. Stage 1 trains fusion, instances, (14); stage 2 predictor, (14)-(16)."""
        known = {0: [self], 1: [], 2: [self.fusion, self.instances]}[stage]
        return [*known, self.teacher, self.completer]

    def find(self, prefix: Prefix, batch: Batch) -> Found:
        """Fusion and instances; where there are targets (stage 1) with gradients and the instance loss."""
        V, _, h, w = prefix.maps.shape[1:]
        points, terms, matches = token_points(batch.depth, batch.K, batch.T_base_cam, h, w), {}, None
        with torch.set_grad_enabled(batch.targets is not None and torch.is_grad_enabled()):
            memory = self.fusion(prefix.maps, points)
            layers, mask_map = self.instances(memory, batch)
            if batch.targets is not None:
                terms, matches = instance_loss(layers, mask_map, batch.targets, self.match)
        index, valid = choose_objects(layers[-1], matches)
        rows = torch.arange(len(index), device=index.device)[:, None]
        chosen = [x[rows, index] for x in layers[-1][:3]]
        chosen += [x.transpose(1, 2)[rows, index].transpose(1, 2) for x in layers[-1][3:]]
        view = torch.arange(V, device=index.device).repeat_interleave(h * w).expand(len(index), -1)
        found = Found(memory.flatten(1, 3), points.flatten(1, 3), view, view_masks(chosen[-1], mask_map) > 0,
                      Probes(*chosen), index, valid, terms)
        return found._replace(comp=batch.comp or self.complete(found, batch)) if self.predicts else found

    @torch.no_grad()
    def complete(self, found: Found, batch: Batch) -> tuple[Tensor, Tensor]:
        """Completion coordinates from the probes' own masks: (B, 30, 3) [m] and which of them are there."""
        size, probes = tuple(batch.depth.shape[-2:]), found.probes
        seen = project_probes(probes.point, batch.K, batch.T_base_cam, size)[1][..., None, None]
        masks = found.masks & seen  # learned where probes are seen
        points = cell_points(batch, masks.shape[-2:])
        inputs = masks, found.valid, probes.logit.argsort(1), points, batch.T_base_cam[..., :3, 3]
        frames = zip(*(x.cpu().numpy() for x in inputs))
        complete = pointattn.mirror_completion if self.completer is None else self.completer.complete
        options = complete, self.most, OCCLUDED, QUERIES
        parts = [pointattn.completion_points(*frame, *options) for frame in frames]
        return tuple(torch.from_numpy(np.stack(x)).to(batch.depth.device) for x in zip(*parts))

    def tokens(self, found: Found, hand: Tensor) -> tuple[Tensor, Tensor]:
        """hand (B, 3) -> tokens (B, T, C), mask (B, T) for `plug`: 16 of objects, then 30 of completion."""
        content, point, logit = found.probes[:3]
        if not self.predicts:
            return self.out_inst(content + self.relative(point, hand)), found.valid
        comp, there = found.comp
        context = self.context(found.memory, found.points, found.view, None)
        none = torch.full(comp.shape[:2], self.views, device=comp.device)  # no view sees these points
        completion = self.predictor(comp, none, there, context, found.points, None)  # (B, 30, d)
        if self.routes:
            content = self.routing(content, self.local(content, point, completion, comp, there), logit)
        objects = self.out_inst(content + self.relative(point, hand))
        tokens = torch.cat([objects, self.out_comp(completion + self.relative(comp, hand))], 1)
        return tokens, torch.cat([found.valid, there], 1)

    def teach(self, found: Found) -> Tensor:
        """The predictor's targets at all tokens (B, N, d): the EMA teacher's, layer-normed (I-JEPA)."""
        true = self.teacher(found.memory, found.points, found.view, None)
        return F.layer_norm(true, true.shape[-1:])

    def predict_hidden(self, found: Found, hidden: Tensor, unseen: int = 0) -> tuple[Tensor, Tensor, Tensor]:
        """hidden (B, V, h, w), n in each sample -> predicted, true (B, n, d), index (B, n). Every `unseen`-th
        query is of "no view", as completion queries are."""
        hidden = hidden.flatten(1)
        index = hidden.nonzero()[:, 1].view(len(hidden), -1)  # (B, n)
        rows, view = torch.arange(len(hidden), device=hidden.device)[:, None], found.view.gather(1, index)
        if unseen:
            view[:, ::unseen] = self.views
        context = self.context(found.memory, found.points, found.view, ~hidden)
        keep, points = torch.ones_like(index, dtype=torch.bool), found.points[rows, index]
        predicted = self.predictor(points, view, keep, context, found.points, ~hidden)
        with torch.no_grad():
            return predicted, self.teach(found)[rows, index], index

    def forward(self, prefix: Prefix, batch: Batch) -> tuple[Tensor, Tensor, Found]:
        """-> tokens, mask for `plug`, Found; in training with the terms of L_inst or L_ssl."""
        found = batch.found or self.find(prefix, batch)
        tokens, mask = self.tokens(found, batch.state[:, :3])
        if batch.hidden is not None and batch.targets is None and self.predicts:  # stage 2
            first = found._replace(**{k: getattr(found, k)[: len(batch.hidden)] for k in Found._fields[:3]})
            predicted, true, _ = self.predict_hidden(first, batch.hidden, unseen=4)
            found = found._replace(terms=ssl_loss(predicted.flatten(0, 1), true.flatten(0, 1)))
        return tokens, mask, found

    @torch.no_grad()
    def move_teacher(self) -> None:
        """theta_T <- m theta_T + (1 - m) theta_S."""
        if self.teacher is not None:
            for old, new in zip(self.teacher.parameters(), self.context.parameters()):
                old.lerp_(new, 1 - self.ema)


class Agent(nn.Module):
    """A base policy with or without a plug-in; observations in, actions out. three: 3DVLA's, or a rival."""

    def __init__(self, cfg: Config, three: Callable = ThreeD):
        super().__init__()
        self.cfg, self.stage, sizes, l1 = cfg, 2, SIZES[cfg.sizes], {"l1": cfg.actions - 1}.get(cfg.head)
        if cfg.policy == "xvla":
            self.policy = XVLA(sizes, cfg.views, cfg.actions - 1, OBJECTS + OCCLUDED * QUERIES, l1)
        else:
            self.policy = Pi0(sizes, cfg.policy == "pi05", cfg.vlm, l1)
        cells = 2 * (sizes.patch // 4) ** 2  # of 4 px, for the object to move and for its destination
        self.ground = nn.Linear(self.policy.width, cells) if cfg.w_ground and not cfg.vlm else None
        self.named, self.placed = (nn.Linear(sizes.head_dim, 2) for _ in range(2))  # of a key, of a value
        self.front = cfg.tokens_at == "front" and cfg.policy != "xvla"  # X-VLA's slots are no distances
        self.three = three(cfg, self.policy.map_width, self.policy.width) if cfg.variant != "base" else None
        for name, size in (("action", cfg.actions), ("state", self.policy.state_dim)):
            self.register_buffer(f"{name}_mean", torch.zeros(size))
            self.register_buffer(f"{name}_std", torch.ones(size))

    def set_stage(self, stage: int) -> None:
        """0: the whole policy learns. 1, 2: the expert and the plug-in's part; the VLM is frozen."""
        self.stage = stage
        self.requires_grad_(True)
        modules = self.frozen() * (stage > 0) + (self.three.frozen(stage) if self.three is not None else [])
        for module in filter(None, modules):
            module.requires_grad_(False)

    def frozen(self) -> list[nn.Module]:
        """What gives the prefix."""
        return [self.policy.vlm(), self.named, self.placed] + [self.ground] * (self.ground is not None)

    def state(self, batch: Batch) -> Tensor:
        """(B, S) normalised."""
        S = batch.state.shape[1]
        return (batch.state - self.state_mean[:S]) / self.state_std[:S]

    def encode(self, batch: Batch) -> Prefix:
        """The policy's own prefix: frozen from stage 1 on, so that a frame is encoded once."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.stage == 0):
            prefix = self.policy.encode(batch.images, batch.texts, self.state(batch))
            if self.front or self.ground is not None:
                prefix = self.policy.read(prefix)
            if self.ground is not None:
                V, _, h, w = prefix.maps.shape[1:]
                heat = self.ground(prefix.last).unflatten(1, (V, h, w)).permute(0, 1, 4, 2, 3)
                prefix = prefix._replace(heat=F.pixel_shuffle(heat, round((heat.shape[2] / 2) ** 0.5)))
        return prefix._replace(last=None)

    def prefix(self, batch: Batch) -> tuple[Prefix, Found | None]:
        """The policy's prefix with the plug-in's tokens, and what that found."""
        prefix = batch.prefix or self.encode(batch)
        if self.stage == 0 or self.three is None:
            return prefix, None
        tokens, mask, found = self.three(prefix, batch)
        return plug(prefix, tokens, mask, self.front), found

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """-> the loss's terms: L_action; in stage 0 + L_ground, in stage 1 + L_inst, in stage 2 + L_ssl."""
        prefix, found = self.prefix(batch)
        actions = (batch.actions - self.action_mean) / self.action_std
        error = self.policy.loss(prefix, self.state(batch), actions, batch.noise, batch.time).mean(-1)
        terms = {"action": (error * batch.valid).sum() / over_ranks(batch.valid.sum().to(error), 1)}
        terms |= found.terms if found is not None else {}
        if batch.ground is not None:  # stage 0
            named = ground_loss(prefix, batch.ground, self.named, self.placed)
            terms |= {name: self.cfg.w_ground * value for name, value in named.items()}
        return terms

    @torch.no_grad()
    def act(self, batch: Batch, noise: Tensor) -> tuple[Tensor, Found | None]:
        """noise (B, A, D) -> actions (B, A, real D) in the environment's units, and what was found."""
        prefix, found = self.prefix(batch)
        actions = self.policy.act(prefix, self.state(batch), noise)[..., : self.cfg.actions]
        return actions * self.action_std + self.action_mean, found


# --- 5  Data ------------------------------------------------------------------------------------------------


def observe(observations: list[Observation], cfg: Config, device: torch.device | str = "cpu") -> Batch:
    """Observations -> Batch at the policy's image size, of its first views."""
    return Batch(**stack_observations(observations, SIZES[cfg.sizes].image_size, device, cfg.views))


class Frames:
    """Frames of demonstrations as training samples. masks(observation): of each view, for pseudo_targets."""

    prefix = found = comp = staticmethod(lambda index: None)  # of frames: what is frozen, from the disk

    def __init__(self, cfg: Config, root: Path, masks: Callable = instance_masks, actions: int | None = None):
        self.cfg, self.sizes, self.masks = cfg, SIZES[cfg.sizes], masks
        self.demos, self.pseudo = Demonstrations(root, cfg.views, self.sizes.state_dim, actions), {}
        if (D := self.demos.actions) > (most := self.sizes.action_dim):
            raise InputError(f"{root}: {D} numbers an action; --sizes {cfg.sizes} has {most}")
        frames = range(len(self.demos))
        self.rows = [torch.stack(x) for x in zip(*(self.demos.chunk(i, self.sizes.chunk) for i in frames))]
        self.rows += [torch.from_numpy(np.concatenate([d["states"] for d in self.demos.demos])).float()]

    def targets(self, i: int) -> Targets:
        """Pseudo ground truth of frame i, made once; without B."""
        if i not in self.pseudo:
            o = self.demos.observation(i)
            scene = (x[0].numpy() for x in observe([o], self.cfg)[1:4])  # depth, K, T_base_cam
            self.pseudo[i] = Targets(*pseudo_targets(self.masks(o), *scene, cells=4 * self.sizes.grid))
        return self.pseudo[i]

    def batch(self, index: list[int], agent: Agent) -> Batch:
        """Frames -> Batch with actions; stage 0: ground, stage 1: prefix, targets, stage 2: prefix, found."""
        device, three = agent.action_mean.device, agent.three
        (actions, valid, state), prefix = (x[index].to(device) for x in self.rows), self.prefix(index)
        batch = Batch(None, None, None, None, state, None, actions, valid, prefix=prefix,
                      found=self.found(index), comp=self.comp(index))
        if prefix is not None and (agent.stage == 2 or three is None):
            return batch
        seen = observe([self.demos.observation(i) for i in index], self.cfg, device)
        batch = seen._replace(**{k: x for k, x in batch._asdict().items() if x is not None})
        if agent.stage == 0 and agent.ground is not None:
            ground = [self.demos.ground(i, self.sizes.image_size // 4) for i in index]
            return batch._replace(ground=torch.stack(ground).to(device))
        if agent.stage == 1 and three is not None:
            fields = zip(*(self.targets(i) for i in index))  # of 0 to 16 objects each
            return batch._replace(targets=Targets(*(pad_sequence(x, True).to(device) for x in fields)))
        return batch

    def freeze(self, agent: Agent, base: Path, before: Path) -> None:
        """Compute once what is frozen in this stage, of all frames, into the stages' folders; without a
        larger --head-batch (base, paper), completion points alone."""
        device, three, stage, cfg = agent.action_mean.device, agent.three, agent.stage, agent.cfg
        self.prefix = self.found = self.comp = Frames.prefix
        rows = partial(frozen_rows, count=len(self.demos), device=device)
        key = digest(nn.ModuleList(agent.frozen() * (stage > 0)), self.demos.root.resolve(), agent.front)
        unread = {"tokens": None} if agent.front else {}

        def see(index: list[int]) -> Batch:
            return observe([self.demos.observation(i) for i in index], self.cfg, device)

        if stage and cfg.head_batch > cfg.batch:
            self.prefix = rows(base / f"tokens-{key}", make=lambda i: agent.encode(see(i))._replace(**unread))
        if stage == 2 and three is not None:
            key = digest(nn.ModuleList(filter(None, three.frozen(2))), key, three.predicts)
            find = lambda i: three.find(self.prefix(i) or agent.encode(see(i)), see(i))  # noqa: E731
            if cfg.head_batch > cfg.batch:
                self.found = rows(before / f"found-{key}", make=find)
            elif three.predicts:
                self.comp = rows(before / f"comp-{key}", make=lambda i: find(i).comp)


def draw_step(cfg: Config, B: int, seed: int, step: int, rank: int = 0, world: int = 1) -> dict[str, Tensor]:
    """Batch's noise, time and hidden at a step: a process's share of what one process would draw for all."""
    g, sizes = torch.Generator().manual_seed(((seed << 40) + step) % 2**63), SIZES[cfg.sizes]
    flow = int(cfg.head == "flow")  # l1: from noise 0 at time 1
    noise = flow * torch.randn(world * B, sizes.chunk, sizes.action_dim, generator=g)
    time = pi0_time_quantile(torch.rand(world * B, generator=g)) ** flow
    hidden = asymmetric_mask(min(world * B, cfg.batch), cfg.views, *[sizes.grid] * 2, cfg.mask_ratio, g)
    return {k: x.chunk(world)[rank] for k, x in (("noise", noise), ("time", time), ("hidden", hidden))}


# --- 6  Train -----------------------------------------------------------------------------------------------


def train_stage(stage: int, cfg: Config, args, frames: Frames, out: Path, before: Path | None = None,
                three: Callable = ThreeD, base: Path | None = None) -> None:
    """Stage 0 (base policy), 1 (fusion, instances), 2 (predictor, aggregation) from `before`. base: 0's."""
    steps = args.steps or (cfg.base_steps, cfg.stage1_steps, cfg.stage2_steps)[stage]
    source = {"root": frames.demos.root, "stage": stage, "from": before, "pseudo": args.pseudo}
    run = Session(args, cfg, out, samples=len(frames.demos), steps=steps, source=source, amp=cfg.amp,
                  batch=(cfg.head_batch if stage == 2 else cfg.batch) // setup(args.device).world,
                  seed=args.seed + 1000 * stage)
    if run.finished:
        return
    agent = Agent(cfg, three)
    if before is None:
        for name, value in frames.demos.statistics().items():
            getattr(agent, name)[: len(value)] = value
    elif not run.start:
        inherit(agent, before, stage - 1)
    optimizer = prepare(agent, stage, run.device, frames)
    model, warmup = run.attach(agent, optimizer, find_unused=True), min(cfg.warmup, steps // 4)
    frames.freeze(agent, base or before, before)
    for step, index in run.batches(lambda i, _: i, workers=0, collate=list):
        lr = set_lr(optimizer, schedule(step, steps, "cosine", warmup, cfg.lr_floor))
        batch = frames.batch(index, agent)
        drawn = draw_step(cfg, len(index), args.seed + 7919 * stage, step, run.rank, run.world)
        with run.autocast():
            terms = model(batch._replace(**{name: x.to(run.device) for name, x in drawn.items()}))
        optimizer.zero_grad(set_to_none=True)
        sum(terms.values()).backward()
        nn.utils.clip_grad_norm_([p for p in agent.parameters() if p.requires_grad], 0.5)  # Sec. 4
        optimizer.step()
        if stage == 2 and agent.three is not None:
            agent.three.move_teacher()
        run.log(step, terms, lr)


def prepare(agent: Agent, stage: int, device: torch.device, frames: Frames) -> torch.optim.Optimizer:
    """Set what learns in a stage, and the probes' first points; -> its optimizer."""
    cfg, instances = agent.cfg, getattr(agent.three, "instances", None)
    agent.to(device).train()
    agent.set_stage(stage)
    if stage == 1 and instances is not None:  # where the objects of some frames are, 5 cm around
        points = [frames.targets(i).points for i in range(0, len(frames.demos), 1 + len(frames.demos) // 64)]
        if len(points := torch.cat(points).to(device)):
            low, high = points.amin(0) - 0.05, points.amax(0) + 0.05
            instances.point.data = low + (high - low) * torch.rand_like(instances.point)
    peak = cfg.lr if stage else cfg.base_lr
    optimizer = make_optimizer(cfg.optimizer, agent, peak, cfg.lr_3d, cfg.weight_decay, encoder="policy")
    if stage:  # a head on frozen tokens learns by AdamW
        set_apart(optimizer.param_groups, [*agent.policy.parameters()], orthogonal=False)
    if instances is not None:  # metres do not decay
        set_apart(optimizer.param_groups, [instances.point], weight_decay=0.0)
    return optimizer


def inherit(agent: Agent, folder: Path, stage: int) -> None:
    """Take the weights of `stage`, finished in `folder`, else InputError; new tokens get the words' size."""
    run, names = read_json(folder / "config.json"), ("policy", "sizes", "vlm", "views", "w_ground", "head")
    if run["data"].get("stage") != stage:
        raise InputError(f"{folder}: not a stage {stage}; train one with --out first")
    if differ := [f"{k} {run['config'][k]}" for k in names if run["config"][k] != getattr(agent.cfg, k)]:
        raise InputError(f"{folder}: another base policy ({', '.join(differ)} there); use its own settings")
    learned = load_weights(folder, agent)
    for name, module in agent.named_modules():
        if isinstance(module, TokenOut) and f"{name}.gain" not in learned:
            nn.init.constant_(module.gain, agent.policy.word_size())
    if getattr(agent.three, "completer", None) is not None:
        load_weights(folder.parent / "completion", agent.three.completer)


def train(cfg: Config, args) -> None:
    """The verb train: stage 0 (or --base), then 1 and 2, in which variant base trains its expert alone."""
    check(cfg)
    if args.steps and args.resume:
        raise InputError("--steps with --resume: a run of stages is not extended; take another --out")
    out = args.out or Path("runs/threedvla")
    if any(size % setup(args.device).world for size in (cfg.batch, cfg.head_batch)):
        raise InputError(f"--batch {cfg.batch}, --head-batch {cfg.head_batch}: multiples of the processes")
    if args.resume and not any(out.glob("stage*/config.json")):
        raise InputError(f"{out}: no config.json of a run there; drop --resume")
    args.resume = False  # stages that are not begun begin, others go on anyway
    frames, base = open_frames(cfg, args), args.base or out
    base = base if (base / "config.json").is_file() else base / "stage0"
    cfg = replace(cfg, actions=frames.demos.actions)
    if not args.base:
        train_stage(0, replace(cfg, variant="base"), args, frames, base)
    if cfg.completion == "pointattn" and cfg.variant in ("B", "C"):
        pointattn.pretrain(args, cfg, out / "completion", frames.demos, pointattn.POINTS[cfg.sizes])
    first = replace(cfg, variant="A") if cfg.variant != "base" else cfg
    train_stage(1, first, args, frames, out / "stage1", base)
    train_stage(2, cfg, args, frames, out / "stage2", out / "stage1", base=base)


def open_frames(cfg: Config, args) -> Frames:
    """The demonstrations of --data-root, or of the tabletop world, which is written if it is not there."""
    root = verbs.data_root(args, setup(args.device), "tabletop", demos=args.demos)
    masks = mask_maker(args.pseudo, args.grounding, args.sam, args.device)
    return Frames(cfg, root, masks, cfg.actions if "actions" in args.given else None)


# --- 7  Predict, evaluate, describe -------------------------------------------------------------------------


def predict(agent: Agent, observations: list[Observation], seeds: list[int], when: int) -> tuple:
    """Plans for n observations -> actions (n, A, D), mark(row) for pictures (or None); when: plans before.

    The noise depends on the episode's seed and `when` alone: all variants share it.
    """
    shape, device = (agent.policy.chunk, agent.policy.action_dim), agent.action_mean.device
    generators = [torch.Generator().manual_seed(1009 * seed + when) for seed in seeds]
    noise = torch.stack([torch.randn(shape, generator=g) for g in generators]).to(device)
    batch = observe(observations, agent.cfg, device)
    with autocast(device, agent.cfg.amp):
        actions, found = agent.act(batch, noise * (agent.cfg.head == "flow"))
    return actions.float().cpu().numpy(), partial(marks, found, batch) if found is not None else None


def marks(found: Found, batch: Batch, row: int) -> episodes.Marks:
    """What a picture of observation `row` shows: masks and points of its objects, completion points."""
    def seen(points: Tensor) -> np.ndarray:
        uv, valid = project_probes(points[None], batch.K[row, None], batch.T_base_cam[row, None],
                                   tuple(batch.depth.shape[-2:]))
        return torch.where(valid[..., None], uv, torch.nan)[0].float().cpu().numpy()  # (V, n, 2)

    keep, none = found.valid[row], (found.points[:, :0], found.valid[:, :0])
    comp, there = (x[row] for x in found.comp or none)
    return episodes.Marks(found.index[row][keep].cpu().numpy(), found.masks[row][:, keep].cpu().numpy(),
                          seen(found.probes.point[row][keep]), seen(comp[there]))


def load_agent(cfg: Config, args, three: Callable = ThreeD) -> tuple[Agent, Path, dict[str, float]]:
    """--ckpt -> the agent, its folder, what stages 1 and 2 cost (variants share stage 0)."""
    out, agent = cli.last_stage(args.ckpt).resolve(), Agent(cfg, three)  # RoboTwin changes the folder
    load_checkpoint(out, agent)
    source = read_json(out / "config.json")["data"]
    folders = [out] + ([Path(source["from"])] if source["stage"] == 2 else [])
    return agent.to(setup(args.device).device).eval(), out, stages_cost(agent, folders)


def evaluate(cfg: Config, args) -> None:
    """The verb eval: episodes and controls (common.report.episodes), then the 3D modules' own diagnostics."""
    rules, size = episodes.rules_of(args, SIZES[cfg.sizes].chunk), SIZES[cfg.sizes].image_size
    agent, out, cost = load_agent(cfg, args)
    envs = episodes.open_environments(args.env, args.data_root, size, rules.eval_batch, views=cfg.views,
                                      actions=cfg.actions)
    episodes.report(partial(predict, agent), envs, rules, out=out, version=args.env, run=args.run, cost=cost,
                    policy=f"{cfg.policy} {cfg.variant}", pictures=args.pictures,
                    reads_depth=agent.three is not None)
    if args.env == "tabletop" and agent.three is not None and joined().is_main:
        verbs.experiment(args.method, *f"--claim diagnose --device {args.device} --run-folder".split(),
                         str(out))


def describe(cfg: Config, args) -> None:
    """The verb describe: one plan on the meta device, without and with the plug-in."""
    check(cfg)
    sizes, n, V, flops = SIZES[cfg.sizes], OCCLUDED * QUERIES, cfg.views, []
    for variant in dict.fromkeys(("base", cfg.variant)):
        with torch.device("meta"):
            agent = Agent(replace(cfg, variant=variant, vlm=None)).requires_grad_(False)
            image, comp = torch.zeros(1, V, *[sizes.image_size] * 2), torch.zeros(1, n, 3)
            batch = Batch(image[:, :, None].expand(-1, -1, 3, -1, -1), image, torch.ones(1, V, 3, 3),
                          torch.ones(1, V, 4, 4), torch.zeros(1, 8), ["lift the red cube"],
                          comp=(comp, comp[..., 0] > 0))
            agent.forward, noise = agent.act, torch.zeros(1, sizes.chunk, sizes.action_dim)
            print(f"{cfg.policy} {variant}, preset {args.preset}: {V} x {sizes.image_size} px, one plan")
            flops.append(table(agent, batch, noise, train=False)["flops"])
    idle = "three.teacher", "three.completer"  # training's EMA, and a network that is not 3DVLA's
    added = sum(p.numel() for name, p in agent.named_parameters()
                if name.startswith("three") and not name.startswith(idle)) / 1e9
    print(f"added: {100 * (flops[-1] / flops[0] - 1):+.1f} % FLOPs a plan, {added:.4f} B parameters (without "
          f"teacher and completion network); the paper's 0.086 B, difference {added - 0.086:+.4f} B")


def check(cfg: Config) -> None:
    """Raise InputError, naming the flag, for numbers that do not fit."""
    zero = "w_ground", "warmup", "lr_floor", "weight_decay"  # may be 0
    wrong = [f"--{k.replace('_', '-')} {v}" for k, v in asdict(cfg).items()
             if isinstance(v, (int, float)) and not (v > 0 or k in zero and v == 0)]
    if wrong or max(cfg.mask_ratio, cfg.ema) >= 1:
        wrong = wrong or [f"--mask-ratio {cfg.mask_ratio} --ema {cfg.ema}"]
        raise InputError(f"{' '.join(wrong)}: out of range")
    if cfg.vlm and cfg.policy != "pi0":
        raise InputError(f"--policy {cfg.policy} --vlm {cfg.vlm}: only pi0's weights load here (transformers "
                         "has no pi0.5 and no X-VLA); drop --vlm, or take --policy pi0")
    if cfg.width % cfg.heads or cfg.width % cfg.sample_heads or cfg.width < 6 * cfg.heads:
        raise InputError(f"--width {cfg.width}: a multiple of --heads {cfg.heads} and --sample-heads "
                         f"{cfg.sample_heads}, with at least 6 channels a head for 3D RoPE")


DATA = "data-root demos pseudo grounding sam"
VERBS = {"world": ("write the demonstrations in the synthetic tabletop world", "out seed demos"),
         "train": ("base policy, then the plug-in's two stages", f"out base seed steps device resume {DATA}"),
         "eval": ("play episodes: success per perturbation, result.json, GIFs",
                  f"ckpt! data-root device {episodes.EVAL_FLAGS}")}
FLAGS = episodes.FLAGS | {
    "base": cli.Flag("run folder whose base policy (stage 0) is used instead of training one", Path | None),
    "demos": cli.Flag("demonstrations of each task in the synthetic world", int, 30, 1),
    "pseudo": cli.Flag("maker of the masks of pseudo ground truth", Literal["world", "foundation"], "world")}


def main() -> None:
    verbs.main(__doc__, Config, PRESETS, {
        "world": lambda cfg, args: worlds.make("tabletop", args.out, demos=args.demos, seed=args.seed),
        "train": train, "eval": evaluate, "describe": describe}, verbs=VERBS, flags=FLAGS)


if __name__ == "__main__":
    main()
