"""Mamba's block (Gu and Dao, arXiv 2312.00752), over a sequence in one or both directions.

The scan itself, forward and backward, is common/kernels/selective_scan.py.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.kernels.selective_scan import selective_scan


class MambaBlock(nn.Module):
    """x + Mamba(LayerNorm x) over a sequence (B, L, C). The defaults are mamba_ssm's.

    bidirectional: the same weights read the sequence backwards too, as further samples of the batch, and both
    results are added.
    """

    def __init__(self, channels: int, d_state: int = 16, d_conv: int = 4, expand: int = 2,
                 bidirectional: bool = True):
        super().__init__()
        self.bidirectional, self.states, self.rank = bidirectional, d_state, max(1, math.ceil(channels / 16))
        inner, self.norm = expand * channels, nn.LayerNorm(channels)
        self.in_proj = nn.Linear(channels, 2 * inner, bias=False)
        self.conv = nn.Parameter(torch.empty(inner, 1, d_conv).uniform_(-1, 1) / math.sqrt(d_conv))
        self.conv_bias = nn.Parameter(torch.zeros(inner))
        self.x_proj = nn.Linear(inner, self.rank + 2 * d_state, bias=False)
        self.dt_proj = nn.Linear(self.rank, inner, bias=False)
        dt = (torch.rand(inner) * (math.log(0.1) - math.log(1e-3)) + math.log(1e-3)).exp()  # .001 to .1
        self.dt_bias = nn.Parameter(torch.log(torch.expm1(dt)))  # softplus of it is dt
        self.A_log = nn.Parameter(torch.arange(1, d_state + 1).float().log().repeat(inner, 1))
        self.D = nn.Parameter(torch.ones(inner))
        self.out_proj = nn.Linear(inner, channels, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(B, L, C) -> (B, L, C)."""
        u, z = self.in_proj(self.norm(x)).transpose(1, 2).chunk(2, 1)  # (B, D, L) each
        u = torch.cat([u, u.flip(-1)]) if self.bidirectional else u  # (2 B, D, L)
        u = F.pad(u, (self.conv.shape[-1] - 1, 0))
        u = F.silu(F.conv1d(u, self.conv, self.conv_bias, groups=u.shape[1]))
        rank, B, C = self.x_proj(u.transpose(1, 2)).split([self.rank, self.states, self.states], -1)
        y = self.scan(u, *(v.transpose(1, 2) for v in (self.dt_proj(rank), B, C)))  # (2 B, D, L)
        if self.bidirectional:
            forward, backward = y.chunk(2)
            y = forward + backward.flip(-1)
        return x + self.out_proj((y * F.silu(z)).transpose(1, 2))

    def scan(self, u: Tensor, delta: Tensor, B: Tensor, C: Tensor) -> Tensor:
        """The recurrence h_t = exp(delta A) h + delta B u, y = C h + D u; on the meta device only its
        shape."""
        if u.is_meta:
            return u * delta
        A = -self.A_log.exp()
        return selective_scan(u, delta, A, B, C, self.D, delta_bias=self.dt_bias, delta_softplus=True)
