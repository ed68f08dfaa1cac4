"""Pre-norm transformer parts (Vaswani et al. 2017; Xiong et al. 2020) that several networks share.

Letters: B batch, N, N' tokens, C channels, M heads, V views, Q queries, L levels, K points, S cells.
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.geometry import fourier
from common.kernels.ms_deform_attn import ms_deform_attn

Rotate = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]  # queries, keys (B, M, N, C / M) -> rotated


class Attention(nn.Module):
    """softmax(Q K^T / sqrt(C / M)) V between two sets of tokens."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.q, self.k, self.v, self.out = (nn.Linear(width, width) for _ in range(4))

    def forward(self, x: Tensor, y: Tensor, mask: Tensor | None = None, rotate: Rotate
                | None = None) -> Tensor:
        """Queries x (B, N, C), keys and values y (B, N', C), mask (B, N'), False = absent -> (B, N, C)."""
        pairs = (self.q, x), (self.k, y), (self.v, y)
        q, k, v = (linear(z).unflatten(-1, (self.heads, -1)).transpose(1, 2) for linear, z in pairs)
        if rotate is not None:
            q, k = rotate(q, k)
        keep = None if mask is None else mask[:, None, None]
        return self.out(F.scaled_dot_product_attention(q, k, v, attn_mask=keep).transpose(1, 2).flatten(-2))


class Block(nn.Module):
    """Self-attention and a feed-forward layer of four times the width, each behind a layer norm."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = Attention(width, heads)
        self.ffn = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor, mask: Tensor | None = None, rotate: Rotate | None = None) -> Tensor:
        """x (B, N, C), mask (B, N) bool, False = absent -> (B, N, C)."""
        y = self.norm1(x)
        x = x + self.attention(y, y, mask, rotate)
        return x + self.ffn(self.norm2(x))


def mlp(*widths: int) -> nn.Sequential:
    """Linear layers of these widths with GELU between them."""
    layers: list[nn.Module] = []
    for a, b in zip(widths, widths[1:]):
        layers += [nn.Linear(a, b), nn.GELU()]
    return nn.Sequential(*layers[:-1])


class DeformableAttention(nn.Module):
    """Deformable DETR's attention (Zhu et al. 2021): each query samples a few places of every level of a
    pyramid.

    Offsets and weights are linear in the query; the weights of a head sum to 1 over levels and points.
    """

    def __init__(self, width: int, heads: int, levels: int = 3, points: int = 4):
        super().__init__()
        self.split, n = (heads, levels, points), heads * levels * points
        self.offset, self.weight = nn.Linear(width, 2 * n), nn.Linear(width, n)
        self.value, self.out = nn.Linear(width, width), nn.Linear(width, width)
        for parameter in (self.offset.weight, self.weight.weight, self.weight.bias):
            nn.init.zeros_(parameter)
        turn = torch.arange(heads) * (2 * math.pi / heads)  # at first the heads look in a ring
        ring = torch.stack([turn.cos(), turn.sin()], -1)
        ring = (ring / ring.abs().amax(-1, keepdim=True))[:, None, None]
        ring = (ring * torch.arange(1, points + 1)[:, None]).expand(-1, levels, -1, -1)
        self.offset.bias = nn.Parameter(ring.flatten().clone())

    def forward(self, query: Tensor, uv: Tensor, pyramid: list[Tensor]) -> Tensor:
        """query (B, Q, C) around uv (B, V, Q, 2) in [0, 1], pyramid of (B, V, C, h, w) -> (B, V, Q, C)."""
        (B, V), heads = uv.shape[:2], self.split[0]
        shapes = [tuple(level.shape[-2:]) for level in pyramid]
        value = torch.cat([level.flatten(3) for level in pyramid], -1).mT  # (B, V, S, C)
        value = self.value(value).flatten(0, 1).unflatten(-1, (heads, -1))  # (B V, S, M, C / M)
        size = uv.new_tensor([[w, h] for h, w in shapes])[:, None]
        offset = self.offset(query).unflatten(-1, (*self.split, 2)) / size  # (B, Q, M, L, K, 2)
        weight = self.weight(query).unflatten(-1, (heads, -1)).softmax(-1).unflatten(-1, self.split[1:])
        weight = weight[:, None].expand(-1, V, *[-1] * 4).flatten(0, 1)  # (B V, Q, M, L, K)
        where = (uv[..., None, None, None, :] + offset[:, None]).flatten(0, 1)  # (B V, Q, M, L, K, 2)
        return self.out(ms_deform_attn(value, shapes, where, weight)).unflatten(0, (B, V))


class PlaceCode(nn.Module):
    """Fourier features of coordinates [m], plus a vector per view; the last is no view."""

    def __init__(self, width: int, views: int, frequencies: int = 10):
        super().__init__()
        self.frequencies, self.linear = frequencies, nn.Linear(3 + 6 * frequencies, width)
        self.views = nn.Embedding(views + 1, width)
        nn.init.normal_(self.views.weight, std=0.02)

    def forward(self, points: Tensor, view: Tensor) -> Tensor:
        """points (B, N, 3), view (B, N) or (N,) long -> (B, N, d)."""
        return self.linear(fourier(points, self.frequencies)) + self.views(view)


class TokenOut(nn.Module):
    """Tokens (B, T, d) -> (B, T, C) in the policy's token space: linear, layer norm, one learned gain."""

    def __init__(self, width: int, out: int):
        super().__init__()
        self.linear, self.norm = nn.Linear(width, out), nn.LayerNorm(out)
        self.gain = nn.Parameter(torch.tensor(0.5))

    def forward(self, tokens: Tensor) -> Tensor:
        return self.norm(self.linear(tokens)) * self.gain
