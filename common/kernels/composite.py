"""Volume rendering of sampled rays: density -> the share of the ray that ends at each sample.

    Symbol   Name     Shape    Meaning                                      Equation
    sigma    sigma    (R, S)   density at sample s of ray r, >= 0, [1/m]
    delta    delta    (R, S)   spacing between neighbouring samples, [m]
    tau      tau      (R, S)   optical thickness sigma delta, no unit
    alpha    alpha    (R, S)   share of the arriving light that stops here  alpha_s = 1 - exp(-tau_s)
    T        (inside) (R, S)   light left on arrival at sample s, [0, 1]    T_s = exp(-sum_{j<s} tau_j)
    w        weight   (R, S)   share of the ray that ends at sample s       w_s = T_s alpha_s
             hit      (R,)     share that ends anywhere, sum_s w_s; < 1 means that light left the samples

The convention is nerfacc's (alpha of the interval, exclusive transmittance). `composite_ref` is the definition;
`composite` is what methods call: maybe faster, never different. `composite_probability` is OccNeRF's other
parametrisation, in which a sample carries a probability to stop instead of a density.

Why a kernel: eager torch makes six (R, S) temporaries forward and about twice that backward; the fused passes read
sigma and delta once and write the result once: 12 R S bytes forward in fp32, 20 R S backward, which recomputes T from
sigma and delta and keeps no temporary. Deterministic: each ray belongs to one program, no atomics.
Not supported by the kernel: more than 4096 samples a ray (a ray is one tile), float64, second derivatives.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from common.kernels.dispatch import HAS_TRITON, pick

MAX_SAMPLES = 4096  # a ray in registers: 4096 samples are 32 values a thread at 128 threads


def composite_ref(sigma: Tensor, delta: Tensor) -> tuple[Tensor, Tensor]:
    """sigma (R, S), delta (R, S) -> weight (R, S), hit (R,). Any leading axes for R; bf16 is computed in fp32."""
    dtype = sigma.dtype
    minus = (sigma.to(torch.promote_types(dtype, torch.float32)) * delta).neg_()      # (R, S)  -tau
    # Sum over j < s. The shift comes first: cumsum(tau) - tau would cancel when one sample is very opaque
    # (weights summing to 1.26 at tau = 1e8), and a 1e4 m last interval makes that ordinary.
    before = F.pad(minus, (1, 0))[..., :-1].cumsum(dim=-1)                            # (R, S)  log T
    # T alpha = -exp(log T) expm1(-tau); expm1, so that tau = 1e-8 survives fp32
    weight = before.exp().mul(minus.expm1()).neg_()                                   # (R, S)
    return weight.to(dtype), weight.sum(dim=-1).to(dtype)       # (R, S), (R,)


def composite_probability(q: Tensor) -> Tensor:
    """OccNeRF's 'prob' rendering: q (R, S) in [0, 1], probability to stop at a sample -> weight (R, S), sums to 1.

    cum_s = min(1, sum_{j<=s} q_j);   w_s = cum_s - cum_{s-1}
    and what is left after the last sample stops there (cum_S = 1): every ray is fully absorbed.
    """
    if q.shape[-1] == 0:
        return q.clone()
    inner = q[..., :-1].cumsum(dim=-1).clamp(max=1)             # (R, S-1)
    cum = torch.cat([inner, torch.ones_like(q[..., :1])], -1)   # (R, S)  the last sample completes to 1
    return cum - F.pad(inner, (1, 0))                           # (R, S)


if HAS_TRITON:
    import triton
    import triton.language as tl

    @triton.jit
    def _absorbed(tau):
        """1 - exp(-tau) without cancellation: a series below 0.1 (relative error 1.4e-8), Triton has no expm1."""
        series = tau * (1 - tau / 2 * (1 - tau / 3 * (1 - tau / 4 * (1 - tau / 5))))
        return tl.where(tau < 0.1, series, 1 - tl.exp(-tau))

    @triton.jit
    def _forward(sigma_ptr, delta_ptr, weight_ptr, hit_ptr, R, S, BLOCK_R: tl.constexpr, BLOCK_S: tl.constexpr):
        """One program composites BLOCK_R whole rays."""
        o_r = (tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)).to(tl.int64)
        o_s = tl.arange(0, BLOCK_S)
        at = o_r[:, None] * S + o_s[None, :]                                          # (BLOCK_R, BLOCK_S)
        m = (o_r[:, None] < R) & (o_s[None, :] < S)
        m_before = m & (o_s[None, :] > 0)
        tau = tl.load(sigma_ptr + at, m, 0.0).to(tl.float32) * tl.load(delta_ptr + at, m, 0.0).to(tl.float32)
        # The same tile one sample earlier, from cache: an exclusive sum without subtracting (see composite_ref).
        tau_before = (tl.load(sigma_ptr + at - 1, m_before, 0.0).to(tl.float32)
                      * tl.load(delta_ptr + at - 1, m_before, 0.0).to(tl.float32))    # (BLOCK_R, BLOCK_S)
        weight = tl.exp(-tl.cumsum(tau_before, 1)) * _absorbed(tau)                   # (BLOCK_R, BLOCK_S)
        tl.store(weight_ptr + at, weight, m)
        tl.store(hit_ptr + o_r, tl.sum(weight, 1), o_r < R)

    # Backward. g_s is the gradient arriving at w_s, h the one at hit; both reach w_s, so let G_s = g_s + h.
    #   w_s = exp(-sum_{j<s} tau_j) - exp(-sum_{j<=s} tau_j) = T_s - T_{s+1}
    #   d w_s / d tau_s = T_{s+1}                 (more thickness at s takes more of what arrives)
    #   d w_s / d tau_j = -w_s       for j < s    (and lets less through to every later sample)
    #   d L / d tau_j = G_j T_{j+1} - sum_{s>j} G_s w_s
    # T_{j+1} = exp(-inclusive sum), and w_{j+1} = T_{j+1} (1 - exp(-tau_{j+1})) needs the tile one sample later, so
    # that the suffix sum over s > j is an inclusive reverse sum over the shifted tile: again nothing is subtracted.
    #   d L / d sigma = d L / d tau * delta,   d L / d delta = d L / d tau * sigma
    @triton.jit
    def _backward(sigma_ptr, delta_ptr, grad_weight_ptr, grad_hit_ptr, grad_sigma_ptr, grad_delta_ptr, R, S,
                  BLOCK_R: tl.constexpr, BLOCK_S: tl.constexpr):
        o_r = (tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)).to(tl.int64)
        o_s = tl.arange(0, BLOCK_S)
        at = o_r[:, None] * S + o_s[None, :]                                          # (BLOCK_R, BLOCK_S)
        m = (o_r[:, None] < R) & (o_s[None, :] < S)
        m_after = m & (o_s[None, :] < S - 1)
        sigma = tl.load(sigma_ptr + at, m, 0.0).to(tl.float32)                        # (BLOCK_R, BLOCK_S)
        delta = tl.load(delta_ptr + at, m, 0.0).to(tl.float32)                        # (BLOCK_R, BLOCK_S)
        tau_after = (tl.load(sigma_ptr + at + 1, m_after, 0.0).to(tl.float32)
                     * tl.load(delta_ptr + at + 1, m_after, 0.0).to(tl.float32))      # (BLOCK_R, BLOCK_S)
        h = tl.load(grad_hit_ptr + o_r, o_r < R, 0.0).to(tl.float32)[:, None]         # (BLOCK_R, 1)
        here = tl.load(grad_weight_ptr + at, m, 0.0).to(tl.float32) + h               # (BLOCK_R, BLOCK_S)  G_j
        after = tl.load(grad_weight_ptr + at + 1, m_after, 0.0).to(tl.float32) + h    # (BLOCK_R, BLOCK_S)  G_{j+1}
        left = tl.exp(-tl.cumsum(sigma * delta, 1))                                   # (BLOCK_R, BLOCK_S)  T_{j+1}
        later = tl.where(m_after, after * left * _absorbed(tau_after), 0.0)           # G_{j+1} w_{j+1}
        grad_tau = here * left - tl.cumsum(later, 1, reverse=True)                    # (BLOCK_R, BLOCK_S)
        tl.store(grad_sigma_ptr + at, grad_tau * delta, m)
        tl.store(grad_delta_ptr + at, grad_tau * sigma, m)

    def _launch(R: int, S: int) -> tuple[tuple[int], dict]:
        block_s = triton.next_power_of_2(S)
        block_r = max(1, 2048 // block_s)                       # 2048 values: 16 a thread, enough loads in flight
        return (triton.cdiv(R, block_r),), {"BLOCK_R": block_r, "BLOCK_S": block_s, "num_warps": 4}


class _Composite(torch.autograd.Function):
    """Saves the inputs only; the backward recomputes tau and T, cheaper than reading them back."""

    @staticmethod
    def forward(ctx, sigma: Tensor, delta: Tensor) -> tuple[Tensor, Tensor]:
        R, S = sigma.shape
        weight, hit = torch.empty_like(sigma), sigma.new_empty(R)                     # (R, S), (R,)
        grid, options = _launch(R, S)
        _forward[grid](sigma, delta, weight, hit, R, S, **options)
        ctx.save_for_backward(sigma, delta)
        return weight, hit

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_weight: Tensor, grad_hit: Tensor) -> tuple[Tensor, Tensor]:
        sigma, delta = ctx.saved_tensors
        R, S = sigma.shape
        grad_sigma, grad_delta = torch.empty_like(sigma), torch.empty_like(delta)     # (R, S) each
        grid, options = _launch(R, S)
        _backward[grid](sigma, delta, grad_weight.contiguous(), grad_hit.contiguous(), grad_sigma, grad_delta,
                        R, S, **options)
        return grad_sigma, grad_delta


def composite(sigma: Tensor, delta: Tensor, backend: str = "auto") -> tuple[Tensor, Tensor]:
    """sigma (R, S) >= 0 [1/m], delta (R, S) [m] -> weight (R, S), hit (R,). Differentiable in both.

    backend: auto | torch | triton (`dispatch.pick`). Raises ValueError on a shape or a backend that cannot be had.
    """
    if sigma.shape != delta.shape:
        raise ValueError(f"composite: sigma {tuple(sigma.shape)} and delta {tuple(delta.shape)} differ in shape")
    if pick("composite", backend, sigma) == "torch" or sigma.numel() == 0:
        return composite_ref(sigma, delta)
    S = sigma.shape[-1]
    if S > MAX_SAMPLES:
        raise ValueError(f"composite: {S} samples a ray, the kernel takes {MAX_SAMPLES}; use backend='torch'")
    with torch.cuda.device_of(sigma):
        weight, hit = _Composite.apply(sigma.reshape(-1, S).contiguous(), delta.reshape(-1, S).contiguous())
    return weight.reshape(sigma.shape), hit.reshape(sigma.shape[:-1])
