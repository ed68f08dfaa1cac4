"""Mamba's block: the recurrence by hand, its directions."""

import torch
import torch.nn.functional as F

from common.networks.mamba import MambaBlock


def test_a_block_is_the_recurrence():
    block = MambaBlock(6, 3, 4, 2, bidirectional=False)
    x = torch.randn(1, 7, 6)
    u, z = block.in_proj(block.norm(x))[0].chunk(2, -1)  # (L, D)
    padded = torch.cat([torch.zeros(3, 12), u])
    u = F.silu(torch.stack([(padded[t : t + 4] * block.conv[:, 0].t()).sum(0) for t in range(7)]) + block.conv_bias)
    rank, B, C = block.x_proj(u).split([1, 3, 3], -1)
    delta = F.softplus(block.dt_proj(rank) + block.dt_bias)
    h, ys = torch.zeros(12, 3), []
    for t in range(7):
        h = torch.exp(-delta[t][:, None] * block.A_log.exp()) * h + (delta[t] * u[t])[:, None] * B[t]
        ys.append((h * C[t]).sum(-1) + block.D * u[t])
    expected = x[0] + block.out_proj(torch.stack(ys) * F.silu(z))
    torch.testing.assert_close(block(x)[0], expected, rtol=1e-4, atol=1e-5)


def test_one_way_is_causal_and_both_ways_are_symmetric():
    for both in (False, True):
        block, x = MambaBlock(8, 4, 4, 1, both), torch.randn(1, 12, 8)
        changed = x.clone()
        changed[0, 9] = torch.randn(8)
        same = torch.isclose(block(x), block(changed)).all(-1)[0]
        assert same[:9].all() != both and not same[9:].all()
        if both:
            torch.testing.assert_close(block(x.flip(1)).flip(1), block(x), rtol=1e-4, atol=1e-5)
