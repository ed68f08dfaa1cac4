"""OccWorld's occupancy tokenizer: a VQ-VAE between a semantic voxel grid and a small BEV map of codes.

    tokenizer = OccupancyTokenizer("occworld", height=16)
    logits, quantized = tokenizer(ids)              # (B, 200, 200, 16) ids -> logits, codes (B, 50, 50)
    terms = tokenizer_loss(logits, quantized, ids, weight, tokenizer.sizes)

Zheng et al., "OccWorld: Learning a 3D Occupancy World Model for Autonomous Driving", arXiv 2311.16038; sizes
and weights are those of its code (wzzheng/OccWorld) unless a row of SIZES says otherwise. Equation numbers
are those of occvla.py.
"""

from collections.abc import Iterable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.losses import cross_entropy, lovasz_softmax
from common.metrics import OccupancyMeter
from common.train import joined, sum_over_ranks


class Sizes(NamedTuple):
    """Sizes of the tokenizer and settings of its loss (7)."""

    class_dim: int = 8  # width of a class embedding
    stem: int = 1  # stride of a patchifying first layer; OccWorld has none
    channels: int = 64
    mult: tuple[int, ...] = (1, 2, 4)  # channels per level; each level halves the map
    blocks: int = 2  # residual blocks a level
    attention: int = 50  # cells per side at which attention is added; 0: nowhere
    z_dim: int = 128
    codebook: int = 512
    beta: float = 1.0  # (1)
    revive: int = 100  # [steps] an unused code waits before it moves; ours
    ce: float = 10.0  # (7)
    lovasz: float = 1.0  # (7)
    vq: float = 1.0  # (7)
    balanced: bool = False  # class weights freq^-0.5 in (7); OccWorld has none

    @property
    def stride(self) -> int:
        """Voxels per side of a latent cell."""
        return self.stem * 2 ** (len(self.mult) - 1)


SMALL = Sizes(stem=4, mult=(1,), blocks=1, attention=0, z_dim=64, revive=5, lovasz=0.0, balanced=True)
SIZES = {
    "occworld": Sizes(),
    "tiny": SMALL,  # two CPU cores: the first layer turns 4 x 4 columns into one cell
    "toy": SMALL._replace(stem=8, channels=8, z_dim=8, codebook=32),  # tests
}


def group_norm(channels: int) -> nn.GroupNorm:
    """GroupNorm(32), or groups of two channels where 32 does not divide them."""
    return nn.GroupNorm(32 if channels % 32 == 0 else max(1, channels // 2), channels, eps=1e-6)


class ResBlock(nn.Module):
    """x + conv swish norm conv swish norm (x), as taming-transformers has it."""

    def __init__(self, c_in: int, c_out: int):
        super().__init__()
        self.norm1, self.conv1 = group_norm(c_in), nn.Conv2d(c_in, c_out, 3, 1, 1)
        self.norm2, self.conv2 = group_norm(c_out), nn.Conv2d(c_out, c_out, 3, 1, 1)
        self.skip = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        return self.skip(x) + self.conv2(F.silu(self.norm2(h)))


class Attention2D(nn.Module):
    """One head of attention over all cells."""

    def __init__(self, channels: int):
        super().__init__()
        self.norm = group_norm(channels)
        self.qkv, self.out = nn.Conv2d(channels, 3 * channels, 1), nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm(x)).flatten(2).transpose(1, 2).chunk(3, -1)  # (B, x y, C) each
        return x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).unflatten(2, x.shape[2:]))


def level(c_in: int, c_out: int, blocks: int, attends: bool) -> list[nn.Module]:
    """Residual blocks at one resolution, each followed by attention where the resolution has it."""
    layers: list[nn.Module] = []
    for k in range(blocks):
        layers += [ResBlock(c_out if k else c_in, c_out), *([Attention2D(c_out)] if attends else [])]
    return layers


def middle(channels: int, attends: bool) -> nn.Sequential:
    """Block, attention where the resolution has it, block."""
    attention = [Attention2D(channels)] if attends else []
    return nn.Sequential(ResBlock(channels, channels), *attention, ResBlock(channels, channels))


class Encoder2D(nn.Module):
    """(B, C, X, Y) -> (B, z_dim, x, y)."""

    def __init__(self, c_in: int, side: int, sizes: Sizes):
        super().__init__()
        c, stem, side = sizes.channels, sizes.stem, side // sizes.stem
        first = nn.Conv2d(c_in, c, stem, stem) if stem > 1 else nn.Conv2d(c_in, c, 3, 1, 1)
        layers: list[nn.Module] = [first]
        for depth, mult in enumerate(sizes.mult):
            if depth:
                layers += [nn.ZeroPad2d((0, 1, 0, 1)), nn.Conv2d(c, c, 3, 2)]  # taming's asymmetric padding
                side //= 2
            layers += level(c, sizes.channels * mult, sizes.blocks, side == sizes.attention)
            c = sizes.channels * mult
        layers += [middle(c, side == sizes.attention), group_norm(c), nn.SiLU(),
                   nn.Conv2d(c, sizes.z_dim, 3, 1, 1), nn.Conv2d(sizes.z_dim, sizes.z_dim, 1)]
        self.layers = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


class Decoder2D(nn.Module):
    """(B, z_dim, x, y) -> (B, C, X, Y): the encoder mirrored, with one more block a level."""

    def __init__(self, c_out: int, side: int, sizes: Sizes):
        super().__init__()
        c, stem, side = sizes.channels * sizes.mult[-1], sizes.stem, side // sizes.stride
        layers: list[nn.Module] = [nn.Conv2d(sizes.z_dim, sizes.z_dim, 1), nn.Conv2d(sizes.z_dim, c, 3, 1, 1),
                                   middle(c, side == sizes.attention)]
        for depth, mult in reversed(list(enumerate(sizes.mult))):
            layers += level(c, sizes.channels * mult, sizes.blocks + 1, side == sizes.attention)
            c = sizes.channels * mult
            if depth:
                layers += [nn.Upsample(scale_factor=2, mode="nearest"), nn.Conv2d(c, c, 3, 1, 1)]
                side *= 2
        out = nn.ConvTranspose2d(c, c_out, stem, stem) if stem > 1 else nn.Conv2d(c, c_out, 3, 1, 1)
        self.layers = nn.Sequential(*layers, group_norm(c), nn.SiLU(), out)

    def forward(self, z: Tensor) -> Tensor:
        return self.layers(z.contiguous(memory_format=torch.channels_last))  # voxels stay in order: no copies


class Quantized(NamedTuple):
    """What the codebook makes of a latent map."""

    z_q: Tensor  # (B, D, x, y) straight-through: the code's value, the latent's gradient
    index: Tensor  # (B, x, y) int64
    loss: Tensor  # (1)


class Quantizer(nn.Module):
    """(1) L_vq = ||sg[z_q] - z||^2 + beta ||z_q - sg[z]||^2, the codebook learned by gradient.

    A code that no latent chose for `revive` steps moves to a random latent of the batch, of all processes'
    together: counts and latents are those of one process with the whole batch.
    """

    def __init__(self, codebook: int, z_dim: int, beta: float = 1.0, revive: int = 100):
        super().__init__()
        self.beta, self.revive = beta, revive
        codes = torch.empty(codebook, z_dim).uniform_(-1 / codebook, 1 / codebook)
        self.codes = nn.Parameter(codes)  # (K, D)
        self.register_buffer("idle", torch.zeros(codebook, dtype=torch.int64))  # (K,) steps since last chosen
        self.register_buffer("step", torch.zeros((), dtype=torch.int64))

    @torch.no_grad()
    def nearest(self, z: Tensor) -> Tensor:
        """(B, D, x, y) -> (B, x, y): argmin over the codes of the distance."""
        flat = z.movedim(1, -1).float()
        distance = self.codes.square().sum(1) - 2 * flat @ self.codes.t()  # |z|^2 is the same for all codes
        return distance.argmin(-1)

    def lookup(self, index: Tensor) -> Tensor:
        """(B, x, y) -> (B, D, x, y)."""
        return F.embedding(index, self.codes).movedim(-1, 1)

    def forward(self, z: Tensor) -> Quantized:
        index = self.nearest(z)
        z_q = self.lookup(index)
        loss = F.mse_loss(z, z_q.detach()) + self.beta * F.mse_loss(z_q, z.detach())
        if self.training:
            self.move_idle_codes(z.detach(), index)
        return Quantized(z + (z_q - z).detach(), index, loss)

    @torch.no_grad()
    def move_idle_codes(self, z: Tensor, index: Tensor) -> None:
        """Count the steps for which each code went unused, and move those that waited `revive` steps."""
        flat, run = z.movedim(1, -1).flatten(0, 2), joined()
        count = torch.bincount(index.flatten(), minlength=len(self.codes)).to(flat)
        count = sum_over_ranks(count, run)
        self.step += 1
        self.idle.add_(1).masked_fill_(count > 0, 0)
        dead = self.idle >= self.revive
        if dead.any():
            generator = torch.Generator().manual_seed(int(self.step))
            pick = torch.randint(run.world * len(flat), (int(dead.sum()), 1), generator=generator)
            pick = pick.to(flat.device)
            new = flat[pick[:, 0] % len(flat)] * (pick // len(flat) == run.rank)  # zeros where others have it
            self.codes.data[dead] = sum_over_ranks(new, run).to(self.codes.dtype)
            self.idle[dead] = 0


class OccupancyTokenizer(nn.Module):
    """Occupancy <-> a map of codes: class embedding, height folded into channels, 2D encoder, codebook,
    decoder.

    sizes: a row of SIZES. side, height: voxels of the square grid.
    """

    def __init__(self, sizes: str = "occworld", side: int = 200, height: int = 16, classes: int = 18):
        super().__init__()
        self.sizes = s = SIZES[sizes]
        self.height, self.side = height, side // s.stride  # latent cells per side
        self.classes = nn.Embedding(classes, s.class_dim)  # E_c
        self.encoder = Encoder2D(height * s.class_dim, side, s)
        self.quantizer = Quantizer(s.codebook, s.z_dim, s.beta, s.revive)
        self.decoder = Decoder2D(height * s.class_dim, side, s)

    def encode(self, ids: Tensor) -> Tensor:
        """(B, X, Y, Z) ids -> z (B, D, x, y); 255, not labelled, is read as the last class: free."""
        ids = ids.long().clamp_max(len(self.classes.weight) - 1)
        return self.encoder(self.classes(ids).flatten(3).movedim(-1, 1))

    @torch.no_grad()
    def index(self, ids: Tensor) -> Tensor:
        """(B, X, Y, Z) ids -> codes (B, x, y)."""
        return self.quantizer.nearest(self.encode(ids))

    def decode(self, z: Tensor) -> Tensor:
        """(B, D, x, y) -> features (B, X, Y, Z, E)."""
        return self.decoder(z).movedim(1, -1).unflatten(-1, (self.height, -1))

    def logits(self, features: Tensor) -> Tensor:
        """(2) logit_c = <feature, E_c>: (..., E) -> (..., K)."""
        return features.float() @ self.classes.weight.float().t()

    def soft(self, code_logits: Tensor) -> Tensor:
        """softmax(code logits) times codebook: (B, codes, x, y) -> (B, D, x, y). An argmax has no
        gradient."""
        return torch.einsum("bkxy,kd->bdxy", code_logits.float().softmax(1), self.quantizer.codes)

    def forward(self, ids: Tensor) -> tuple[Tensor, Quantized]:
        """(B, X, Y, Z) ids -> logits (B, X, Y, Z, K), the quantised latent."""
        quantized = self.quantizer(self.encode(ids))
        return self.logits(self.decode(quantized.z_q)), quantized


def tokenizer_loss(logits: Tensor, quantized: Quantized, ids: Tensor, weight: Tensor, sizes: Sizes
                   ) -> dict[str, Tensor]:
    """(7) L_tok = 10 CE + 1 Lovasz + 1 L_vq over the whole grid.

    logits (B, X, Y, Z, K), ids (B, X, Y, Z), weight (K,) class weights of the cross-entropy.
    """
    logits = logits.movedim(-1, 1)
    terms = {"ce": sizes.ce * cross_entropy(logits, ids, weight), "vq": sizes.vq * quantized.loss}
    if sizes.lovasz:
        terms["lov"] = sizes.lovasz * lovasz_softmax(logits, ids, per_sample=True)
    return terms


def seen_cells(seen: Tensor, side: int) -> Tensor:
    """(B, X, Y, Z) bool -> (B, side, side): latent cells with a voxel that a camera sees."""
    return F.adaptive_max_pool2d(seen.any(-1).float(), side) > 0


@torch.no_grad()
def code_weights(tokenizer: OccupancyTokenizer, pairs: Iterable[tuple[Tensor, Tensor]]) -> Tensor:
    """-> (K,) freq^-0.5 of the codes in cells that a camera sees, mean 1 over the cells.

    pairs: ids, seen, each (X, Y, Z).
    """
    count = torch.zeros(tokenizer.sizes.codebook, dtype=torch.int64)
    for ids, seen in pairs:
        index = tokenizer.index(ids[None])[seen_cells(seen[None], tokenizer.side)]
        count += torch.bincount(index, minlength=len(count))
    weight = count.clamp_min(1).double() ** -0.5
    return weight * count.sum() / (weight * count).sum()


@torch.no_grad()
def reconstruction(tokenizer: OccupancyTokenizer, truths: Iterable[tuple]) -> dict[str, float]:
    """How well the tokenizer rebuilds occupancy: vq_miou, vq_iou (camera mask), vq_codes_used, vq_perplexity.

    truths: (semantics, mask_camera, mask_lidar), each (X, Y, Z).
    """
    device, meter = tokenizer.classes.weight.device, OccupancyMeter()
    count = torch.zeros(tokenizer.sizes.codebook, dtype=torch.int64)
    for semantics, camera, lidar in truths:
        ids = torch.from_numpy(semantics)[None].to(device)
        logits, quantized = tokenizer(ids)
        meter.add(logits[0].argmax(-1).to(torch.uint8).cpu(), semantics, camera, lidar)
        count += torch.bincount(quantized.index.flatten().cpu(), minlength=len(count))
    p, scores = count.double() / count.sum(), meter.metrics()
    return {"vq_miou": scores["miou_camera"], "vq_iou": scores["iou_camera"],
            "vq_codes_used": float((count > 0).double().mean()),
            "vq_perplexity": float((-(p * p.clamp_min(1e-12).log()).sum()).exp())}
