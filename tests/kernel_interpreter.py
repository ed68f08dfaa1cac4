"""Triton kernels against their torch references, outputs and every input gradient.

Run as a script with TRITON_INTERPRET=1 in the environment (test_kernels.py does, in a process of its own, because
Triton reads the variable when a kernel is decorated): tiny CPU cases in fp32, a JSON line {case: {tensor: RMS ratio}}.
The gpu-marked tests import `cases` and `compare` and run larger ones on the device, in fp32 and bf16.
"""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))

from common.kernels import composite, ms_deform_attn, scatter_project, selective_scan, voxel_vote  # noqa: E402


class Case(NamedTuple):
    name: str
    run: Callable                   # (inputs, backend) -> tuple of outputs
    inputs: dict[str, Tensor]
    gradient: tuple[str, ...] = ()  # inputs to differentiate


def _numbers(seed: int, device: str):
    g = torch.Generator().manual_seed(seed)
    return (lambda *shape: torch.rand(*shape, generator=g).to(device),
            lambda *shape: torch.randn(*shape, generator=g).to(device))


def _composite(rand, randn, R: int, S: int, contiguous: bool = True) -> Case:
    sigma, delta = rand(R, S) * 3, rand(R, S)
    if R * S:
        sigma[0, S // 2] = 1e4                                  # one opaque sample
    if not contiguous:
        sigma, delta = sigma.T.contiguous().T, delta.T.contiguous().T
    return Case(f"composite {R}x{S}{'' if contiguous else ' strided'}",
                lambda x, backend: composite.composite(x["sigma"], x["delta"], backend),
                {"sigma": sigma, "delta": delta}, ("sigma", "delta"))


def _vote(rand, randn, M: int, V: int, K: int, weighted: bool, current: bool) -> Case:
    inputs = {"index": (rand(M) * (V + 2)).long() - 1, "label": (rand(M) * (K + 1)).to(torch.uint8)}
    if weighted:
        inputs["weight"] = (rand(M) * 3).floor() * 0.1          # many exact ties, some zeros
    if current:
        inputs["current"] = rand(M) < 0.3
    return Case(f"voxel_vote M{M} V{V} K{K}{' weighted' if weighted else ''}{' current' if current else ''}",
                lambda x, backend: voxel_vote.voxel_vote(x["index"], x["label"], V, K, x.get("current"),
                                                         x.get("weight"), backend=backend), inputs)


def _scan(rand, randn, B: int, D: int, N: int, L: int, groups: int, gated: bool, token_major: bool = False) -> Case:
    def rows(F: int) -> Tensor:                                 # (B, F, L), as a view of (B, L, F) if token_major
        return randn(B, L, F).transpose(1, 2) if token_major else randn(B, F, L)

    projection = (B, N, L) if groups == 0 else (B, groups, N, L)
    inputs = {"u": rows(D), "delta": rows(D), "A": -rand(D, N) * 2, "B": randn(*projection), "C": randn(*projection)}
    if gated:
        inputs |= {"D": randn(D), "z": rows(D), "delta_bias": randn(D)}
    return Case(f"selective_scan B{B} D{D} N{N} L{L} G{groups}{' gated' if gated else ''}{' strided' * token_major}",
                lambda x, backend: selective_scan.selective_scan(**x, delta_softplus=True, return_last_state=True,
                                                                 backend=backend), inputs, tuple(inputs))


def _deform(rand, randn, N: int, H: int, D: int, Q: int, P: int, shapes: list[tuple[int, int]],
            contiguous: bool = True) -> Case:
    S, L = sum(h * w for h, w in shapes), len(shapes)
    value = randn(N, S, H, D) if contiguous else randn(N, H, S, D).transpose(1, 2)
    inputs = {"value": value, "loc": rand(N, Q, H, L, P, 2) * 1.4 - 0.2, "weights": rand(N, Q, H, L, P)}
    attend = ms_deform_attn.ms_deform_attn
    return Case(f"ms_deform_attn N{N} H{H} D{D} Q{Q} P{P} L{L}{'' if contiguous else ' strided'}",
                lambda x, backend: (attend(x["value"], shapes, x["loc"], x["weights"], backend),),
                inputs, ("value", "loc", "weights"))


def _scatter(rand, randn, N: int, V: int, C: int, H: int, W: int, mode: str, size: float = 0) -> Case:
    opacity = rand(V)
    opacity[::7] = 1.0                                          # fully opaque: nothing may be divided by 1 - o
    uv = rand(N, V, 2) * torch.tensor([W + 1.0, H + 1.0], device=opacity.device) - 0.5
    depth = (rand(N, V) * 16 - 2).round() / 4                   # ties, and voxels behind the camera
    extent = rand(N, V, 2) * size if size else None             # [px]
    return Case(f"scatter_project N{N} V{V} C{C} {H}x{W} {mode}{' splatted' if size else ''}",
                lambda x, backend: scatter_project.scatter_project(x["value"], x["opacity"], uv, depth, H, W, mode,
                                                                   backend, extent),
                {"value": rand(V, C), "opacity": opacity}, ("value", "opacity"))


def cases(device: str, big: bool) -> list[Case]:
    """`big` for a GPU; otherwise sizes for the interpreter, which is a thousand times slower than torch."""
    make = _numbers(0, device)
    out = [_composite(*make, 1, 1), _composite(*make, 31, 33), _composite(*make, 3, 257),
           _composite(*make, 33, 31, contiguous=False), _composite(*make, 0, 5), _composite(*make, 5, 0),
           _vote(*make, 257, 33, 17, False, False), _vote(*make, 257, 33, 17, True, True),
           _vote(*make, 31, 1, 1, False, True), _vote(*make, 0, 5, 3, False, False),
           _deform(*make, 1, 1, 1, 1, 1, [(1, 1)]), _deform(*make, 2, 3, 5, 7, 2, [(5, 1), (3, 4)]),
           _deform(*make, 1, 2, 33, 31, 1, [(4, 3)], contiguous=False), _deform(*make, 1, 1, 4, 0, 1, [(2, 2)]),
           _scatter(*make, 1, 1, 1, 2, 2, "depth"), _scatter(*make, 2, 33, 3, 3, 2, "depth"),
           _scatter(*make, 2, 31, 3, 3, 2, "plain"), _scatter(*make, 1, 257, 5, 1, 4, "depth"),
           _scatter(*make, 1, 0, 5, 1, 4, "depth"), _scatter(*make, 2, 17, 3, 4, 5, "depth", 2.0),
           _scan(*make, 1, 1, 1, 1, 0, False), _scan(*make, 2, 5, 3, 33, 0, True),
           _scan(*make, 1, 6, 2, 31, 2, False, token_major=True), _scan(*make, 1, 2, 2, 0, 0, False)]
    if big:
        out += [_composite(*make, 4099, 128), _composite(*make, 33, 4096),
                _vote(*make, 300_007, 20_011, 17, True, True), _deform(*make, 2, 8, 32, 257, 8, [(28, 50), (14, 25)]),
                _scatter(*make, 6, 50_021, 17, 28, 50, "depth"), _scatter(*make, 6, 50_021, 17, 28, 50, "plain"),
                _scatter(*make, 6, 20_011, 17, 28, 50, "depth", 3.0),
                _scan(*make, 2, 33, 16, 257, 0, True), _scan(*make, 1, 64, 16, 4099, 4, True),
                _scan(*make, 1, 24, 5, 1031, 0, True, token_major=True)]
    return out


def rms_ratio(actual: Tensor, expected: Tensor) -> float:
    """Root mean square of the difference over that of `expected`; over 1e-6 where that is smaller."""
    if actual.shape != expected.shape:
        raise AssertionError(f"shape {tuple(actual.shape)}, expected {tuple(expected.shape)}")
    if expected.numel() == 0:
        return 0.0
    difference = (actual.double() - expected.double()).square().mean().sqrt()
    return float(difference / expected.double().square().mean().sqrt().clamp(min=1e-6))


def compare(case: Case, dtype: torch.dtype = torch.float32) -> dict[str, float]:
    """Runs torch in fp32 and triton in `dtype` on the same (rounded) inputs -> {output or "d input": RMS ratio}."""
    rounded = {n: t.to(dtype) if t.is_floating_point() else t for n, t in case.inputs.items()}
    results, seed = {}, torch.Generator().manual_seed(1)
    weights = []
    for backend in ("torch", "triton"):
        inputs = {n: t.float() if t.is_floating_point() and backend == "torch" else t for n, t in rounded.items()}
        inputs |= {n: inputs[n].detach().requires_grad_() for n in case.gradient}
        outputs = tuple(case.run(inputs, backend))
        results[backend] = {f"output {i}": o.detach() for i, o in enumerate(outputs)}
        if case.gradient:
            weights = weights or [torch.randn(o.shape, generator=seed).to(o.device) for o in outputs]
            total = sum((o.float() * w).sum() for o, w in zip(outputs, weights))
            gradients = torch.autograd.grad(total, [inputs[n] for n in case.gradient])
            results[backend] |= {f"d {n}": g for n, g in zip(case.gradient, gradients)}
    return {n: rms_ratio(results["triton"][n], t) for n, t in results["torch"].items()}


if __name__ == "__main__":
    torch.set_num_threads(1)
    selective_scan.BLOCK_T, selective_scan.BLOCK_D, selective_scan.TILES = 8, 2, 2  # several chunks in 33 tokens
    print(json.dumps({case.name: compare(case) for case in cases("cpu", big=False)}))
