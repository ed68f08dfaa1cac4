"""Kernels: reference vectors, hand numbers, slow loop oracles, gradcheck; Triton interpreted, compiled, on a GPU."""

import json
import os
import subprocess
import sys
from pathlib import Path

import kernel_interpreter
import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck
from vectors import load

from common.kernels import selective_scan as scan_module
from common.kernels.composite import composite, composite_probability, composite_ref
from common.kernels.dispatch import HAS_TRITON
from common.kernels.ms_deform_attn import ms_deform_attn, ms_deform_attn_ref
from common.kernels.scatter_project import scatter_project, scatter_project_ref
from common.kernels.selective_scan import selective_scan, selective_scan_ref
from common.kernels.voxel_vote import Votes, voxel_vote, voxel_vote_ref

F64 = torch.float64
HERE = Path(__file__).parent
pytestmark = pytest.mark.usefixtures("one_thread")
needs_triton = pytest.mark.skipif(not HAS_TRITON, reason="triton is not installed")


def numbers(seed: int, dtype: torch.dtype = F64):
    g = torch.Generator().manual_seed(seed)
    return (lambda *shape: torch.rand(*shape, generator=g, dtype=dtype),
            lambda *shape: torch.randn(*shape, generator=g, dtype=dtype))


def leaves(*tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(t.detach().clone().requires_grad_() for t in tensors)


# --- composite

def test_composite_by_hand():
    """Two samples of thickness ln 2: half the light stops at the first, half of the rest at the second."""
    ln2 = torch.tensor(2.0, dtype=F64).log()
    weight, hit = composite(ln2.expand(1, 2), torch.ones(1, 2, dtype=F64))
    assert torch.allclose(weight, torch.tensor([[1 / 2, 1 / 2 * 1 / 2]], dtype=F64), atol=1e-15)
    assert torch.allclose(hit, torch.tensor([3 / 4], dtype=F64), atol=1e-15)


@pytest.mark.parametrize("big", [1e4, 1e6, 1e8])
def test_composite_survives_an_opaque_sample_in_float32(big):
    weight, hit = composite(torch.tensor([[0.1, 0.2, big]]), torch.ones(1, 3))
    exact = -torch.expm1(torch.tensor(-0.1)), torch.exp(torch.tensor(-0.1)) - torch.exp(torch.tensor(-0.3))
    assert abs(float(hit) - 1) < 2e-7
    assert torch.allclose(weight[0, :2], torch.stack(exact), atol=1e-7)


def test_composite_keeps_thin_samples_in_float32():
    weight, _ = composite(torch.full((1, 3), 1e-8), torch.ones(1, 3))
    assert torch.allclose(weight, torch.full((1, 3), 1e-8), rtol=1e-6, atol=0)


@pytest.mark.parametrize("R, S", [(1, 1), (31, 33), (3, 257), (0, 5), (5, 0)])
def test_composite_against_a_loop(R, S):
    rand, _ = numbers(R * 1000 + S)
    sigma, delta = (rand(R, S) * 4).T.contiguous().T, rand(R, S)        # sigma is not contiguous
    weight, hit = composite(sigma, delta)
    for r in range(R):
        left = 1.0
        for s in range(S):
            alpha = 1 - float(torch.exp(-sigma[r, s] * delta[r, s]))
            assert abs(float(weight[r, s]) - left * alpha) < 1e-14
            left *= 1 - alpha
        assert abs(float(hit[r]) - (1 - left)) < 1e-14
    assert (weight >= 0).all() and (hit <= 1 + 1e-14).all() and weight.shape == (R, S) and hit.shape == (R,)


def test_composite_gradient():
    rand, _ = numbers(0)
    assert gradcheck(composite_ref, leaves(rand(3, 5), rand(3, 5)))
    assert gradcheck(composite_probability, leaves(rand(3, 5) * 0.1))   # below the clamp; above it nothing depends on q


def test_composite_probability_by_hand():
    q = torch.tensor([[0.25, 0.5, 0.125], [0.75, 0.5, 0.25], [0.0, 0.0, 0.0]], dtype=F64)
    expected = torch.tensor([[0.25, 0.5, 0.25], [0.75, 0.25, 0.0], [0.0, 0.0, 1.0]], dtype=F64)
    assert torch.equal(composite_probability(q), expected)              # the last sample takes what is left
    assert composite_probability(q[:, :0]).shape == (3, 0)


def test_composite_nerfacc_vectors():
    v = load("render_curves_rope")
    start, end, sigma = (torch.from_numpy(v[f"vr_{k}"]) for k in ("t_start", "t_end", "sigma"))
    sigma.requires_grad_()
    weight, hit = composite(sigma, end - start)
    depth = (weight * (start + end) / 2).sum(-1)
    v.close("vr_weights", weight.detach(), 1e-9)
    v.close("vr_opacity", hit.detach(), 1e-9)
    v.close("vr_alpha", composite(sigma.reshape(-1, 1), (end - start).reshape(-1, 1))[1].view_as(sigma).detach(), 1e-9)
    v.close("vr_depth_sum", depth.detach(), 1e-9)
    v.close("vr_rgb", torch.einsum("rs,rsc->rc", weight, torch.from_numpy(v["vr_rgb_in"])).detach(), 1e-9)
    v.close("vr_grad_sigma", torch.autograd.grad(depth.sum() + 0.3 * hit.sum(), sigma)[0], 1e-9)


def test_composite_occnerf_vectors():
    v = load("render_curves_rope")
    z, density, inside = (torch.from_numpy(v[f"on_{k}"]) for k in ("z", "density", "inside"))
    delta = torch.cat([z.diff(dim=-1), torch.full_like(z[:, :1], 1e4)], -1)     # OccNeRF's last interval
    sigma = density.relu() * inside
    weight, _ = composite(sigma, delta)
    v.close("on_weights", weight, 1e-9)
    v.close("on_depth", (weight * z).sum(-1), 1e-9)
    v.close("on_alpha", composite(sigma.reshape(-1, 1), delta.reshape(-1, 1))[1].view_as(z), 1e-9)  # one-sample rays
    probability = composite_probability(density.sigmoid() * inside)
    v.close("on_prob_weights", probability, 1e-9)
    v.close("on_prob_depth", (probability * z).sum(-1), 1e-9)
    v.close("on_prob_final", probability.sum(-1), 1e-9)


# --- voxel_vote

def vote_loop(index, label, n_voxels, classes, current=None, weight=None, empty=17) -> Votes:
    out = Votes(torch.full((n_voxels,), empty, dtype=torch.uint8), torch.zeros(n_voxels),
                torch.zeros(n_voxels, dtype=torch.int32))
    votes: dict[int, list[list[int]]] = {}
    for m, (i, k) in enumerate(zip(index.tolist(), label.tolist())):
        if 0 <= i < n_voxels and 0 <= k < classes:
            units = 65536 if weight is None else round(float(weight[m]) * 65536)
            rows = votes.setdefault(i, [[0, 0, -c] for c in range(classes)])    # votes, current votes, -id
            rows[k][0] += units
            rows[k][1] += units if current is not None and current[m] else 0
            out.count[i] += 1
    for i, rows in votes.items():
        if total := sum(row[0] for row in rows):
            best = max(rows)
            out.winner[i], out.share[i] = -best[2], best[0] / total
    return out


def same_votes(a: Votes, b: Votes) -> bool:
    return all(torch.equal(x, y) and x.dtype == y.dtype for x, y in zip(a, b))


def test_vote_by_hand():
    """Voxel 0: 2 to 1. Voxel 1: a tie, 3 has the current vote. Voxel 2: a full tie, lowest id. Voxel 3: nobody."""
    index = torch.tensor([0, 0, 0, 1, 1, 2, 2, -1, 4, 3])
    label = torch.tensor([5, 5, 1, 2, 3, 4, 2, 0, 0, 17])               # -1, 4 are no voxels, 17 is no class
    current = torch.tensor([0, 0, 0, 0, 1, 0, 0, 1, 1, 1]).bool()
    votes = voxel_vote(index, label, 4, 17, current=current)
    assert votes.winner.tolist() == [5, 3, 2, 17] and votes.count.tolist() == [3, 2, 2, 0]
    assert torch.allclose(votes.share, torch.tensor([2 / 3, 1 / 2, 1 / 2, 0]))
    assert voxel_vote(index, label, 4, 17).winner.tolist() == [5, 2, 2, 17]     # without the current frame
    heavy = voxel_vote(index, label, 4, 17, weight=torch.tensor([0.1, 0.1, 0.3, 0, 0, 1, 2, 1, 1, 1]), empty=255)
    assert heavy.winner.tolist() == [1, 255, 2, 255] and heavy.count.tolist() == [3, 2, 2, 0]


@pytest.mark.parametrize("M, V, K", [(1, 1, 1), (31, 33, 17), (257, 31, 4), (0, 5, 3), (5, 0, 3)])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("with_current", [False, True])
def test_vote_against_a_loop(M, V, K, weighted, with_current):
    rand, _ = numbers(M + V + K)
    index = (rand(M, 2) * (V + 2)).long()[:, 0] - 1                     # not contiguous; some outside
    label = (rand(M) * (K + 1)).to(torch.uint8)
    options = {"weight": (rand(M) * 3).floor() * 0.1 if weighted else None,     # many ties; 0.1 + 0.2 == 0.3 here
               "current": rand(M) < 0.3 if with_current else None}
    assert same_votes(voxel_vote(index, label, V, K, **options), vote_loop(index, label, V, K, **options))


def test_vote_order_does_not_matter_and_large_grids_agree_with_a_histogram():
    rand, _ = numbers(7)
    M, V, K = 60_000, 640_000, 17
    index, label, weight = (rand(M) ** 4 * V).long(), (rand(M) * K).long(), rand(M).float()
    votes = voxel_vote(index, label, V, K, weight=weight)
    order = torch.randperm(M, generator=torch.Generator().manual_seed(0))
    assert same_votes(votes, voxel_vote(index[order], label[order], V, K, weight=weight[order]))
    histogram = torch.bincount(index * K + label, minlength=V * K).view(V, K)
    most, winner = histogram.max(-1)
    plain = voxel_vote(index, label, V, K)
    assert torch.equal(plain.count.long(), histogram.sum(-1))
    assert torch.equal(plain.winner.long(), torch.where(most > 0, winner, 17))  # max returns the first of equals
    assert torch.allclose(plain.share, most / histogram.sum(-1).clamp(min=1))


def test_vote_rejects():
    with pytest.raises(ValueError, match="label"):
        voxel_vote(torch.zeros(3).long(), torch.zeros(2).long(), 1, 1)
    with pytest.raises(ValueError, match="classes 256"):
        voxel_vote_ref(torch.zeros(3).long(), torch.zeros(3).long(), 1, 256)


# --- selective_scan

def scan_loop(u, delta, A, B, C, D=None, z=None, delta_bias=None, delta_softplus=False):
    """Mamba's equations, token by token, nothing clever."""
    batch, channels, L = u.shape
    step = delta if delta_bias is None else delta + delta_bias[:, None]
    step = torch.nn.functional.softplus(step) if delta_softplus else step

    def at(v: Tensor, token: int) -> Tensor:                            # -> (batch, channels, N)
        if v.dim() == 2:
            return v.expand(batch, -1, -1)
        v = v.unsqueeze(1) if v.dim() == 3 else v
        return v[..., token].repeat_interleave(channels // v.shape[1], 1)

    h, ys = u.new_zeros(batch, *A.shape), []
    for token in range(L):
        s = step[..., token, None]
        h = torch.exp(s * A) * h + s * at(B, token) * u[..., token, None]
        ys.append((at(C, token) * h).sum(-1))
    y = torch.stack(ys, -1) if ys else u
    y = y if D is None else y + D[:, None] * u
    return (y if z is None else y * torch.nn.functional.silu(z)), h


@pytest.mark.parametrize("case", "ABCDE")
@pytest.mark.parametrize("dtype", [F64, torch.float32])
def test_scan_vectors(case, dtype):
    v = load("selective_scan")
    names = [n for n in ("u", "delta", "A", "B", "C", "D", "z", "delta_bias") if f"{case}_{n}" in v]
    inputs = {n: torch.from_numpy(v[f"{case}_{n}"]).to(dtype).requires_grad_() for n in names}
    y, state = selective_scan(**inputs, delta_softplus=bool(v[f"{case}_softplus"]), return_last_state=True)
    assert y.dtype == state.dtype == dtype
    if dtype == torch.float32:
        v.close(f"{case}_y_f32", y.detach(), 1e-4)
        v.close(f"{case}_last_state_f32", state.detach(), 1e-4)
        return
    v.close(f"{case}_y", y.detach(), 1e-9)
    v.close(f"{case}_last_state", state.detach(), 1e-9)
    gradients = torch.autograd.grad(y, list(inputs.values()), torch.from_numpy(v[f"{case}_grad_y"]))
    for name, gradient in zip(names, gradients):
        v.close(f"{case}_grad_{name}", gradient, 1e-9)


@pytest.mark.parametrize("steps, buffer", [(32, 2 ** 20), (8, 512), (5, 1)])    # one segment, several, one chunk each
@pytest.mark.parametrize("B, D, N, L, kind", [
    (1, 1, 1, 1, "shared"), (2, 3, 4, 33, "shared"), (1, 4, 2, 257, "grouped"), (2, 4, 3, 31, "constant")])
def test_scan_against_a_loop(monkeypatch, steps, buffer, B, D, N, L, kind):
    """Outputs and every gradient, of the last state too; u and B are views of token-major tensors."""
    monkeypatch.setattr(scan_module, "STEPS", steps)
    monkeypatch.setattr(scan_module, "BUFFER", buffer)
    rand, randn = numbers(L)
    projection = {"shared": (B, N, L), "grouped": (B, 2, N, L), "constant": (D, N)}[kind]
    inputs = {"u": randn(B, L, D).transpose(1, 2), "delta": randn(B, D, L), "A": -rand(D, N) * 3,
              "B": randn(*projection[:-2], *projection[:-3:-1]).transpose(-1, -2), "C": randn(*projection),
              "D": randn(D), "z": randn(B, D, L), "delta_bias": randn(D)}
    for t in inputs.values():
        t.requires_grad_()
    results = [selective_scan(**inputs, delta_softplus=True, return_last_state=True),
               scan_loop(**inputs, delta_softplus=True)]
    seeds = [randn(*t.shape) for t in results[0]]
    for y in zip(*results):
        assert torch.allclose(*y, rtol=1e-11, atol=1e-12)
    totals = [sum((t * s).sum() for t, s in zip(result, seeds)) for result in results]
    for name, a, b in zip(inputs, *(torch.autograd.grad(t, list(inputs.values())) for t in totals)):
        assert torch.allclose(a, b, rtol=1e-10, atol=1e-11), name


def test_scan_groups_may_be_shared_by_one_side():
    rand, randn = numbers(3)
    u, delta, A = randn(1, 4, 9), rand(1, 4, 9), -rand(4, 2)
    B, C = randn(1, 2, 9), randn(1, 2, 2, 9)
    assert torch.allclose(selective_scan(u, delta, A, B, C), scan_loop(u, delta, A, B, C)[0], atol=1e-12)


def test_scan_gradient():
    rand, randn = numbers(5)
    inputs = leaves(randn(2, 2, 5), randn(2, 2, 5), -rand(2, 3), randn(2, 3, 5), randn(2, 3, 5), randn(2),
                    randn(2, 2, 5), randn(2))
    assert gradcheck(lambda *x: selective_scan_ref(*x, delta_softplus=True, return_last_state=True), inputs)


def test_scan_of_nothing_and_rejects():
    u, A, B = leaves(torch.zeros(1, 2, 0, dtype=F64), -torch.ones(2, 3, dtype=F64), torch.zeros(1, 3, 0, dtype=F64))
    y, state = selective_scan(u, u, A, B, B, return_last_state=True)
    assert y.shape == (1, 2, 0) and torch.equal(state, torch.zeros(1, 2, 3, dtype=F64))
    assert torch.equal(torch.autograd.grad(y.sum() + state.sum(), A)[0], torch.zeros(2, 3, dtype=F64))
    x = torch.zeros(1, 2, 4)
    with pytest.raises(ValueError, match=r"B \(1, 3, 5\)"):
        selective_scan(x, x, A.float(), torch.zeros(1, 3, 5), torch.zeros(1, 3, 4))
    with pytest.raises(ValueError, match="must be"):
        selective_scan(x, x[..., :3], A.float(), torch.zeros(1, 3, 4), torch.zeros(1, 3, 4))


# --- ms_deform_attn

def deform_loop(value, shapes, loc, weights) -> Tensor:
    N, _, H, D = value.shape
    _, Q, _, L, P, _ = loc.shape
    rows = []
    for n in range(N):
        for q in range(Q):
            for head in range(H):
                total, start = torch.zeros(D, dtype=value.dtype), 0
                for level, (h, w) in enumerate(shapes):
                    for (x, y), a in zip(loc[n, q, head, level], weights[n, q, head, level]):
                        for i in range(w):                      # a tent around the point reaches its four neighbours
                            for j in range(h):
                                k = 1 - (x * w - 0.5 - i).abs(), 1 - (y * h - 0.5 - j).abs()
                                if min(k) > 0:
                                    total = total + a * k[0] * k[1] * value[n, start + j * w + i, head]
                    start += h * w
                rows.append(total)
    return torch.stack(rows).view(N, Q, H * D)


@pytest.mark.parametrize("case", "ABCD")
@pytest.mark.parametrize("dtype, atol", [(F64, 1e-9), (torch.float32, 1e-4)])
def test_deform_vectors(case, dtype, atol):
    v = load("ms_deform_attn")
    inputs = {n: torch.from_numpy(v[f"{case}_{n}"]).to(dtype).requires_grad_() for n in ("value", "loc", "w")}
    out = ms_deform_attn(inputs["value"], torch.from_numpy(v[f"{case}_shapes"]), inputs["loc"], inputs["w"])
    v.close(f"{case}_out", out.detach(), atol)
    if dtype == F64:
        gradients = torch.autograd.grad(out, list(inputs.values()), torch.from_numpy(v[f"{case}_grad_out"]))
        for name, gradient in zip(inputs, gradients):
            if (case, name) != ("D", "loc"):                    # at pixel centres: the subgradient is a choice
                v.close(f"{case}_grad_{name}", gradient, atol)


def test_deform_by_hand():
    """The middle of four pixels is their mean; half outside the image counts half."""
    value = torch.tensor([1.0, 2, 3, 4], dtype=F64).view(1, 4, 1, 1)
    loc = torch.tensor([[0.5, 0.5], [0.0, 0.25]], dtype=F64).view(1, 2, 1, 1, 1, 2)
    out = ms_deform_attn(value, [(2, 2)], loc, torch.ones(1, 2, 1, 1, 1, dtype=F64))
    assert torch.allclose(out.flatten(), torch.tensor([(1 + 2 + 3 + 4) / 4, 1 / 2], dtype=F64))


@pytest.mark.parametrize("block", [2 ** 16, 7])                 # all rows at once; a block a few rows
@pytest.mark.parametrize("N, H, D, Q, P, shapes", [(1, 1, 1, 1, 1, [(1, 1)]), (2, 3, 5, 3, 2, [(3, 1), (2, 4)]),
                                                   (1, 2, 33, 31, 1, [(2, 2)])])
def test_deform_against_a_loop(monkeypatch, block, N, H, D, Q, P, shapes):
    monkeypatch.setattr("common.kernels.ms_deform_attn.BLOCK", block)
    rand, randn = numbers(Q)
    S, L = sum(h * w for h, w in shapes), len(shapes)
    inputs = (randn(N, H, S, D).transpose(1, 2), rand(N, Q, H, L, P, 2) * 1.4 - 0.2,
              rand(N, Q, H, P, L).transpose(-1, -2))
    for t in inputs:
        t.requires_grad_()
    out, expected = (f(inputs[0], shapes, *inputs[1:]) for f in (ms_deform_attn, deform_loop))
    assert torch.allclose(out, expected, atol=1e-12)
    seed = randn(*out.shape)
    for a, b in zip(torch.autograd.grad(out, inputs, seed), torch.autograd.grad(expected, inputs, seed)):
        assert torch.allclose(a, b, atol=1e-11)


def test_deform_gradient_empty_and_rejects():
    rand, randn = numbers(1)
    shapes = [(2, 3), (1, 2)]
    inputs = leaves(randn(1, 8, 2, 3), rand(1, 4, 2, 2, 2, 2) * 1.2 - 0.1, rand(1, 4, 2, 2, 2))
    assert gradcheck(lambda value, loc, weights: ms_deform_attn_ref(value, shapes, loc, weights), inputs)
    out = ms_deform_attn(inputs[0], shapes, inputs[1][:, :0], inputs[2][:, :0])
    assert out.shape == (1, 0, 6)
    assert torch.equal(torch.autograd.grad(out.sum(), inputs[0])[0], torch.zeros(1, 8, 2, 3, dtype=F64))
    with pytest.raises(ValueError, match="8 pixels|7 pixels"):
        ms_deform_attn(inputs[0][:, :7], shapes, *inputs[1:])
    with pytest.raises(ValueError, match="do not fit"):
        ms_deform_attn(inputs[0], shapes, inputs[1], inputs[2][:, :3])


# --- scatter_project

def scatter_loop(value, opacity, uv, depth, height, width, mode, extent=None):
    N, V = depth.shape
    nothing = 0 * (value.sum() + opacity.sum())                 # so that an unseen voxel has a zero gradient
    image = [[[nothing.expand(value.shape[1]) for _ in range(width)] for _ in range(height)] for _ in range(N)]
    weight = [[[nothing for _ in range(width)] for _ in range(height)] for _ in range(N)]
    for n in range(N):
        left: dict[tuple[int, int], Tensor] = {}
        for _, v in sorted((float(depth[n, v]), v) for v in range(V) if depth[n, v] > 0):
            half = torch.zeros(2) if extent is None else extent[n, v]
            for x, y in ((x, y) for x in range(width) for y in range(height)):
                centre = abs(x + 0.5 - uv[n, v, 0]) <= half[0], abs(y + 0.5 - uv[n, v, 1]) <= half[1]
                own = uv[n, v].floor().tolist() == [x, y]
                if not (all((centre[0] or x == uv[n, v, 0].floor(), centre[1] or y == uv[n, v, 1].floor())) or own):
                    continue
                t = left.get((x, y), 1.0) if mode == "depth" else 1.0
                image[n][y][x] = image[n][y][x] + t * opacity[v] * value[v]
                weight[n][y][x] = weight[n][y][x] + t * opacity[v]
                left[x, y] = t * (1 - opacity[v])
    image, weight = (torch.stack([torch.stack(row) for plane in t for row in plane]).unflatten(0, (N, height))
                     for t in (image, weight))
    return image.permute(0, 3, 1, 2), weight


def test_scatter_by_hand():
    """Two voxels in one pixel, the nearer half opaque; a third behind the camera, a fourth outside the image."""
    value = torch.tensor([[1.0, 0], [0, 1], [5, 5], [5, 5]], dtype=F64)
    opacity = torch.tensor([1.0, 0.5, 1, 1], dtype=F64)
    uv = torch.tensor([[[0.9, 0.1], [0.2, 0.6], [0.5, 0.5], [-0.1, 0.5]]], dtype=F64)
    depth = torch.tensor([[4.0, 2, -1, 3]], dtype=F64)
    image, weight = scatter_project(value, opacity, uv, depth, 1, 2)
    assert torch.equal(image, torch.tensor([[[[0.5, 0]], [[0.5, 0]]]], dtype=F64))      # (1, C, 1, 2): 1/2 each
    assert torch.equal(weight, torch.tensor([[[1.0, 0]]], dtype=F64))
    image, weight = scatter_project(value, opacity, uv, depth, 1, 2, mode="plain")
    assert torch.equal(image[0, :, 0, 0], torch.tensor([1, 0.5], dtype=F64)) and float(weight[0, 0, 0]) == 1.5


@pytest.mark.parametrize("mode", ["depth", "plain"])
@pytest.mark.parametrize("N, V, C, H, W, size", [(1, 1, 1, 1, 1, 0), (2, 31, 3, 3, 2, 0), (1, 257, 5, 1, 4, 0), (2, 17, 3, 4, 5, 2)])
def test_scatter_against_a_loop(mode, N, V, C, H, W, size):
    rand, randn = numbers(V)
    value, opacity = rand(C, V).T, rand(V)                      # value is not contiguous
    opacity[::7] = 1.0                                          # nothing may be divided by 1 - o
    value.requires_grad_(), opacity.requires_grad_()
    uv = rand(N, V, 2) * torch.tensor([W + 1.0, H + 1.0], dtype=F64) - 0.5
    depth = (rand(N, V) * 16 - 2).round() / 4                   # ties go by voxel index
    extent = rand(N, V, 2) * size if size else None             # half a voxel's size on the image [px]
    results = [f(value, opacity, uv, depth, H, W, mode, extent=extent) for f in (scatter_project, scatter_loop)]
    seeds = [randn(*t.shape) for t in results[0]]
    gradients = [torch.autograd.grad(sum((t * s).sum() for t, s in zip(r, seeds)), (value, opacity)) for r in results]
    for a, b in zip((*results[0], *gradients[0]), (*results[1], *gradients[1])):
        assert torch.allclose(a, b, atol=1e-12)


def test_scatter_gradient_invariant_empty_and_rejects():
    rand, _ = numbers(2)
    value, opacity = leaves(rand(9, 2), rand(9))
    uv, depth = rand(2, 9, 2) * 2, rand(2, 9)
    assert gradcheck(lambda v, o: tuple(scatter_project_ref(v, o, uv, depth, 2, 2)), (value, opacity))
    assert (scatter_project(value, opacity, uv, depth, 2, 2).weight <= 1).all()
    image, weight = scatter_project(value, opacity, uv, -depth, 2, 2)  # nothing in front of the camera
    assert not image.any() and not weight.any()
    assert not torch.autograd.grad(image.sum() + weight.sum(), value)[0].any()
    assert scatter_project(value[:0], opacity[:0], uv[:, :0], depth[:, :0], 2, 3).image.shape == (2, 2, 2, 3)
    with pytest.raises(ValueError, match="mode='front'"):
        scatter_project(value, opacity, uv, depth, 2, 2, mode="front")
    with pytest.raises(ValueError, match="do not fit"):
        scatter_project(value, opacity[:8], uv, depth, 2, 2)
    with pytest.raises(ValueError, match="extent .*1, 9, 2"):
        scatter_project(value, opacity, uv, depth, 2, 2, extent=uv[:1])


# --- dispatch

def operations() -> dict[str, tuple]:
    x = torch.ones(1, 2, 4)
    return {"composite": (composite, torch.ones(1, 2), torch.ones(1, 2)),
            "voxel_vote": (voxel_vote, torch.zeros(2).long(), torch.zeros(2).long(), 1, 1),
            "selective_scan": (selective_scan, x, x, -torch.ones(2, 3), torch.ones(1, 3, 4), torch.ones(1, 3, 4)),
            "ms_deform_attn": (ms_deform_attn, torch.ones(1, 1, 1, 1), [(1, 1)], torch.ones(1, 1, 1, 1, 1, 2) / 2,
                               torch.ones(1, 1, 1, 1, 1)),
            "scatter_project": (scatter_project, torch.ones(1, 1), torch.ones(1), torch.zeros(1, 1, 2),
                                torch.ones(1, 1), 1, 1)}


@pytest.mark.parametrize("name", ["composite", "voxel_vote", "selective_scan", "ms_deform_attn", "scatter_project"])
def test_dispatch(name):
    op, *inputs = operations()[name]
    auto, torch_ = op(*inputs), op(*inputs, backend="torch")
    for a, b in zip(*(r if isinstance(r, tuple) else (r,) for r in (auto, torch_))):
        assert torch.equal(a, b)
    with pytest.raises(ValueError, match=f"{name}: backend='triton'") as error:
        op(*inputs, backend="triton")
    assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match="not one of auto, torch, triton"):
        op(*inputs, backend="cuda")


def test_networks_may_be_described_on_the_meta_device():
    """Shapes without data: what `describe` needs of the operations inside a network."""
    x = torch.empty(2, 6, 300, device="meta")
    y = selective_scan(x, x, torch.empty(6, 4, device="meta"), x[:, :4], x[:, :4])
    assert y.shape == x.shape and y.device.type == "meta"
    value, loc = torch.empty(1, 8, 2, 3, device="meta"), torch.empty(1, 5, 2, 2, 4, 2, device="meta")
    assert ms_deform_attn(value, [(2, 3), (1, 2)], loc, loc[..., 0]).shape == (1, 5, 6)


def test_scan_ignores_autocast():
    rand, randn = numbers(4, torch.float32)
    inputs = leaves(randn(1, 3, 20), rand(1, 3, 20), -rand(3, 2), randn(1, 2, 20), randn(1, 2, 20))
    plain = selective_scan(*inputs)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = selective_scan(*inputs)
        gradients = torch.autograd.grad(inside.sum(), inputs)
    assert inside.dtype == torch.float32 and torch.equal(inside, plain)
    assert all(torch.equal(a, b) for a, b in zip(gradients, torch.autograd.grad(plain.sum(), inputs)))


def test_kernels_import_without_triton():
    code = ("import sys; sys.modules['triton'] = None\n"
            "import torch\n"
            "from common.kernels import composite, ms_deform_attn, scatter_project, selective_scan, voxel_vote\n"
            "print(composite.composite(torch.ones(1, 1), torch.ones(1, 1))[1].item())\n"
            "try: composite.composite(torch.ones(1, 1), torch.ones(1, 1), backend='triton')\n"
            "except ValueError as error: print(error)\n")
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=HERE.parent, timeout=120)
    assert run.returncode == 0, run.stderr
    hit, message = run.stdout.splitlines()
    assert abs(float(hit) - 0.6321205588) < 1e-6 and "triton is not installed" in message


# --- Triton: interpreted, compiled, on a GPU

def run_script(name: str, tmp_path_factory, **environment: str) -> dict:
    environment |= {"TRITON_CACHE_DIR": str(tmp_path_factory.mktemp("triton"))}
    run = subprocess.run([sys.executable, str(HERE / name)], capture_output=True, text=True, timeout=300,
                         env={k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | environment)
    assert run.returncode == 0, run.stderr[-3000:]
    return json.loads(run.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def interpreted(tmp_path_factory):
    return run_script("kernel_interpreter.py", tmp_path_factory, TRITON_INTERPRET="1")


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    return run_script("kernel_compile.py", tmp_path_factory)


@needs_triton
@pytest.mark.parametrize("name", [case.name for case in kernel_interpreter.cases("cpu", big=False)])
def test_interpreted_kernel(interpreted, name):
    """fp32, outputs and every input gradient; votes are integers and equal."""
    limit = 0.0 if name.startswith("voxel_vote") else 5e-6
    assert interpreted[name] and max(interpreted[name].values()) <= limit, interpreted[name]


@needs_triton
def test_kernels_compile_for_hopper(compiled):
    assert len(compiled) == 14
    for name, built in compiled.items():
        assert built["cubin"] > 0 and built["target"], name
        assert built["shared"] <= 48 * 1024, name               # what a block gets without asking


@pytest.mark.gpu
@needs_triton
@pytest.mark.parametrize("dtype, limit", [(torch.float32, 2e-5), (torch.bfloat16, 1e-2)], ids=["fp32", "bf16"])
@pytest.mark.parametrize("i_case", range(len(kernel_interpreter.cases("cpu", big=True))))
def test_kernel_on_gpu(i_case, dtype, limit):
    """Against the reference in fp32 on the same rounded inputs; bf16 results carry bf16's own 0.4 %."""
    case = kernel_interpreter.cases("cuda", big=True)[i_case]
    ratios = kernel_interpreter.compare(case, dtype)
    limit = 0.0 if case.name.startswith("voxel_vote") else limit
    assert max(ratios.values()) <= limit, (case.name, ratios)
