"""Mamba's selective scan: a linear recurrence whose decay depends on the input.

    Symbol   Name         Shape                   Meaning
    u        u            (B, D, L)               input of channel d at token l
    delta    delta        (B, D, L)               step size, after + delta_bias (D,) and softplus where asked
    A        A            (D, N) < 0              decay rate of state n of channel d
    B, C     B, C         (B, N, L)               input and output projection, shared by all channels; or
                          (B, G, N, L)            by the D // G consecutive channels of a group; or
                          (D, N)                  constant in time
    h        (inside)     (B, D, N) for each l    state, h_{-1} = 0
    y        (result)     (B, D, L)

    a_l = exp(delta_l A),   b_l = delta_l u_l B_l          (zero-order hold for A, Euler for B, as Mamba has it)
    h_l = a_l h_{l-1} + b_l,   y_l = sum_n C_l h_l + D u_l,   then y_l silu(z_l)     D (D,), z (B, D, L) optional

Letters are Mamba's (B batch or projection, D channels, N states, L tokens). The last state (B, D, N) is h_{L-1}, before
the gate. bf16 and fp16 inputs are computed in fp32.

Both backends cut time into chunks and make two passes: first each chunk's end state from zero (all chunks at once) and
its total decay exp(A sum delta), from which a short scan over chunks gives every chunk's start state; then the chunks
again from the right start. Nothing of size (B, L, D, N) leaves the cache, or the registers.

`selective_scan_ref` is the definition. It is fast on a CPU because it works token-major (a step of all chunks is one
contiguous block), in buffers of 2^20 values used again and again, and because its backward is the adjoint scan, not
autograd's record of L steps: at B1 D64 N16 L4096 on one core 5 times faster than a loop over `unbind` forward, 6 times
forward and backward, more for longer sequences (`make bench`).

Why a kernel: eager torch needs the (B, L, D, N) arrays. The floor on a GPU is not bandwidth but B L D N exponentials
(16 a clock and multiprocessor on Hopper: 0.54 G of them, 262k tokens x 128 x 16, take 135 us); two passes evaluate them
twice forward and three times backward, so half of that floor is the most this algorithm can reach. It is chosen because
one pass leaves a batch of one on B D / BLOCK_D programs. Not tuned on a GPU yet. Softplus, D u and the gate stay in
torch.
Determinism: gradients of B and C are summed over blocks of channels with fp32 atomics when a group
has more than one block, so their last bits vary; everything else is bit-stable.
Not supported: complex A, an initial state, second derivatives; by the kernel, B or C constant in time.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from common.kernels.dispatch import HAS_TRITON, pick

STEPS, BUFFER = 64, 2 ** 20      # CPU: tokens in a chunk; values in a buffer (4 MB, near the second-level cache). One
#                                  step is 2^14 values: torch runs it on one thread, no barrier at every step
BLOCK_T, BLOCK_D, TILES = 16, 8, 32  # GPU: tokens and channels in a tile (registers); tiles in a chunk


# --- the reference: chunks in lockstep, and their adjoint
# Token-major inside: u, delta (B, L, D), A (N, D), B and C (B, L, N), or (N, D) if constant.

def _spread(x: Tensor, v: Tensor, out: Tensor) -> Tensor:
    """x (S, M, D), v (S, M, N) or (N, D) -> out[s, m, n, d] = x v."""
    return torch.mul(x.unsqueeze(-2), v.unsqueeze(-1) if v.dim() == 3 else v, out=out)


def _over_states(h: Tensor, v: Tensor) -> Tensor:
    """h (S, M, N, D), v (S, M, N) or (N, D) -> sum_n h v (S, M, D)."""
    if v.dim() == 2:
        return (h * v).sum(-2)
    out = h.new_empty(*h.shape[:2], 1, h.shape[3])              # `out` also keeps autocast away
    return torch.matmul(v.unsqueeze(-2), h, out=out).squeeze(-2)


def _over_channels(h: Tensor, x: Tensor, v: Tensor) -> Tensor:
    """Gradient of v in sum h x v: h (S, M, N, D), x (S, M, D) -> (S, M, N), or (N, D) if v is constant."""
    if v.dim() == 2:
        return (h * x.unsqueeze(-2)).sum((0, 1))
    return torch.matmul(h, x.unsqueeze(-1), out=h.new_empty(*h.shape[:3], 1)).squeeze(-1)


class _Segments:
    """Time in chunks of S steps, chunks in segments that fit the buffers; a segment is stepped through in lockstep."""

    def __init__(self, u: Tensor, A: Tensor):
        self.batch, self.tokens, self.channels = u.shape
        self.states = A.shape[0]
        self.S = min(STEPS, self.tokens)
        self.chunks = -(-self.tokens // self.S)
        lanes = BUFFER // (self.S * self.batch * self.states * self.channels)
        self.lanes = min(max(1, lanes), self.chunks)            # chunks in a segment

    def __iter__(self):
        return iter([(j, min(j + self.lanes, self.chunks)) for j in range(0, self.chunks, self.lanes)])

    def buffer(self, like: Tensor, j: int, k: int) -> Tensor:
        return like.new_empty(self.S, self.batch * (k - j), self.states, self.channels)    # (S, M, N, D), M = B (k - j)

    def split(self, x: Tensor) -> Tensor:
        """(B, L, F) -> (B, chunks, S, F), zeros after the end: delta = 0 is the identity step. (N, D) passes."""
        if x.dim() == 2:
            return x
        return F.pad(x, (0, 0, 0, self.chunks * self.S - self.tokens)).unflatten(1, (self.chunks, self.S))

    def take(self, x: Tensor, j: int, k: int) -> Tensor:
        """(B, chunks, S, F) -> (S, M, F), step-major and contiguous. (N, D) passes."""
        return x if x.dim() == 2 else x[:, j:k].permute(2, 0, 1, 3).reshape(self.S, -1, x.shape[-1])

    def put(self, into: Tensor, j: int, k: int, x: Tensor) -> None:
        """The inverse of take: (S, M, F) -> into[:, j:k]."""
        into[:, j:k] = x.unflatten(1, (self.batch, k - j)).permute(1, 2, 0, 3)

    def join(self, x: Tensor) -> Tensor:
        return x.flatten(1, 2)[:, :self.tokens] if x.dim() == 4 else x


def _steps(delta: Tensor, A: Tensor, x: Tensor, B: Tensor, a: Tensor, b: Tensor) -> None:
    """Fills a = exp(delta A) and b = x B, both (S, M, N, D)."""
    torch.mul(delta.unsqueeze(-2), A, out=a).exp_()
    _spread(x, B, b)


class _Chunked(torch.autograd.Function):
    """Saves the inputs and one state per chunk (1/64 of all states); a and b are computed again in the backward."""

    @staticmethod
    def forward(ctx, u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor) -> tuple[Tensor, Tensor]:
        time = _Segments(u, A)
        us, deltas, Bs, Cs = (time.split(x) for x in (u, delta, B, C))
        y = torch.empty_like(us)                                                        # (B, chunks, S, D)
        state = u.new_zeros(time.batch, time.states, time.channels)                     # (B, N, D)
        starts = u.new_empty(time.batch, time.chunks, time.states, time.channels)       # (B, chunks, N, D)
        a, b = time.buffer(u, 0, time.lanes), time.buffer(u, 0, time.lanes)
        for j, k in time:
            if a.shape[1] != time.batch * (k - j):
                a, b = time.buffer(u, j, k), time.buffer(u, j, k)
            d = time.take(deltas, j, k)                                                 # (S, M, D)
            _steps(d, A, d * time.take(us, j, k), time.take(Bs, j, k), a, b)
            h = b[0].clone()                                                            # (M, N, D)  first pass
            for s in range(1, time.S):
                torch.addcmul(b[s], a[s], h, out=h)
            decay = torch.exp(d.sum(0).unsqueeze(-2) * A).unflatten(0, (time.batch, k - j))
            ends, start = h.unflatten(0, (time.batch, k - j)), starts[:, j:k]
            for i in range(k - j):                                                      # over chunks
                start[:, i] = state
                state = torch.addcmul(ends[:, i], decay[:, i], state)
            b[0].addcmul_(a[0], start.flatten(0, 1))                                    # second pass: b becomes h
            for s in range(1, time.S):
                b[s].addcmul_(a[s], b[s - 1])
            time.put(y, j, k, _over_states(b, time.take(Cs, j, k)))
        ctx.save_for_backward(u, delta, A, B, C, starts)
        return time.join(y), state

    # The adjoint. Let g_l = C_l dL/dy_l be what y sends to h_l, and m_l all that reaches h_l, now and later:
    #   m_l = g_l + a_{l+1} m_{l+1},   m_{L-1} = g_{L-1} + dL/d last_state      the same scan, backwards in time
    # From h_l = a_l h_{l-1} + b_l:  dL/db_l = m_l and dL/da_l = m_l h_{l-1}; with q_l = m_l a_l h_{l-1} and x = delta u
    #   dL/dx_l = sum_n m_l B_l,       dL/du = delta dL/dx,    dL/ddelta_l = sum_n q_l A + u_l dL/dx_l
    #   dL/dA = sum_l q_l delta_l,     dL/dB_l = sum_d m_l x_l,    dL/dC_l = sum_d h_l dL/dy_l
    # It runs as the forward does: each chunk from zero, a scan over chunks, each chunk from what reaches its end.
    @staticmethod
    @once_differentiable
    def backward(ctx, grad_y: Tensor, grad_state: Tensor) -> tuple[Tensor, ...]:
        u, delta, A, B, C, starts = ctx.saved_tensors
        time = _Segments(u, A)
        us, deltas, Bs, Cs, gs = (time.split(x) for x in (u, delta, B, C, grad_y))
        grad_u, grad_delta, grad_A = torch.empty_like(us), torch.empty_like(deltas), torch.zeros_like(A)
        grad_B, grad_C = torch.zeros_like(Bs), torch.zeros_like(Cs)
        reach = grad_state                                                              # (B, N, D)
        a, b, m = (time.buffer(u, 0, time.lanes) for _ in range(3))
        for j, k in reversed(list(time)):
            if a.shape[1] != time.batch * (k - j):
                a, b, m = (time.buffer(u, j, k) for _ in range(3))
            d, v, g = (time.take(t, j, k) for t in (deltas, us, gs))                    # (S, M, D)
            Bj, Cj, x = time.take(Bs, j, k), time.take(Cs, j, k), d * v
            start = starts[:, j:k].flatten(0, 1)                                        # (M, N, D)
            _steps(d, A, x, Bj, a, b)
            _spread(g, Cj, m)
            b[0].addcmul_(a[0], start)                                                  # b becomes h
            for s in range(1, time.S):
                b[s].addcmul_(a[s], b[s - 1])
            h = m[-1].clone()                                                           # first pass back, from zero
            for s in reversed(range(time.S - 1)):
                torch.addcmul(m[s], a[s + 1], h, out=h)
            local = (a[0] * h).unflatten(0, (time.batch, k - j))                        # (B, k - j, N, D)
            decay = torch.exp(d.sum(0).unsqueeze(-2) * A).unflatten(0, (time.batch, k - j))
            last = m[-1].unflatten(0, (time.batch, k - j))
            for i in reversed(range(k - j)):                                            # over chunks
                last[:, i] += reach
                reach = torch.addcmul(local[:, i], decay[:, i], reach)
            for s in reversed(range(time.S - 1)):                                       # second pass back
                m[s].addcmul_(a[s + 1], m[s + 1])
            grad_x = _over_states(m, Bj)                                                # (S, M, D)
            for grad, value, whole in ((_over_channels(m, x, Bj), Bj, grad_B), (_over_channels(b, g, Cj), Cj, grad_C)):
                whole.add_(grad) if value.dim() == 2 else time.put(whole, j, k, grad)
            a.mul_(m)                                                                   # a becomes q
            a[1:].mul_(b[:-1])
            a[0].mul_(start)
            time.put(grad_u, j, k, d * grad_x)
            time.put(grad_delta, j, k, torch.mul(a, A, out=m).sum(-2).addcmul_(v, grad_x))
            grad_A += a.mul_(d.unsqueeze(-2)).sum((0, 1))
        return (time.join(grad_u), time.join(grad_delta), grad_A, time.join(grad_B), time.join(grad_C))


def _scan_torch(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor) -> tuple[Tensor, Tensor]:
    """u, delta (B, L, D), A (D, N), B, C (B, G, L, N) or (D, N) -> y (B, L, D), last state (B, D, N)."""
    dtype = delta.dtype
    groups = max(v.shape[1] if v.dim() == 4 else 1 for v in (B, C))
    width = u.shape[-1] // groups
    ys, states = [], []
    for g in range(groups):
        own = slice(g * width, (g + 1) * width)
        part = [v[:, g if v.shape[1] > 1 else 0] if v.dim() == 4 else v[own].T for v in (B, C)]
        y, state = _Chunked.apply(u[..., own].to(dtype), delta[..., own], A[own].T.to(dtype).contiguous(),
                                  part[0].to(dtype).contiguous(), part[1].to(dtype).contiguous())
        ys.append(y)
        states.append(state.transpose(1, 2))
    return (ys[0], states[0]) if groups == 1 else (torch.cat(ys, -1), torch.cat(states, 1))


def _run(scan: Callable, u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, z: Tensor | None,
         delta_bias: Tensor | None, delta_softplus: bool, return_last_state: bool):
    """Everything around the recurrence, the same for both backends."""
    channels, states = A.shape
    if u.shape != delta.shape or u.dim() != 3 or u.shape[1] != channels or (z is not None and z.shape != u.shape):
        raise ValueError(f"selective_scan: u {tuple(u.shape)}, delta {tuple(delta.shape)} and z must be (B, D, L) with "
                         f"the D of A {tuple(A.shape)}")
    for name, v in (("B", B), ("C", C)):
        expected = {2: (channels, states), 3: (u.shape[0], states, u.shape[2])}.get(
            v.dim(), (u.shape[0], v.shape[1], states, u.shape[2]))
        if tuple(v.shape) != expected or (v.dim() == 4 and channels % v.shape[1]):
            raise ValueError(f"selective_scan: {name} {tuple(v.shape)} is none of (B, N, L), (B, G, N, L) with G "
                             f"dividing D, (D, N) for u {tuple(u.shape)} and A {tuple(A.shape)}")
    if B.dim() == C.dim() == 4 and B.shape[1] != C.shape[1]:
        raise ValueError(f"selective_scan: B has {B.shape[1]} groups, C has {C.shape[1]}")
    wide = torch.promote_types(u.dtype, torch.float32)          # float32, or float64 if u is
    step = delta.to(wide)
    step = step if delta_bias is None else step + delta_bias.to(wide)[:, None]
    step = F.softplus(step) if delta_softplus else step         # (B, D, L)
    # Token-major: a view of a (B, L, D) tensor, as a network's linear layer makes it, costs nothing here.
    B, C = (v if v.dim() == 2 else (v.unsqueeze(1) if v.dim() == 3 else v).transpose(-1, -2) for v in (B, C))
    if u.numel() == 0:
        nothing = 0 * (A.sum() + B.sum() + C.sum()).to(wide)    # keeps the graph: zero gradients
        y, state = u.to(wide) * step, u.new_zeros(u.shape[0], channels, states, dtype=wide) + nothing
    else:
        y, state = scan(u.transpose(1, 2), step.transpose(1, 2), A, B, C)
        y = y.transpose(1, 2)                                   # (B, D, L)
    y = y if D is None else y + D.to(wide)[:, None] * u
    y = (y if z is None else y * F.silu(z.to(wide))).to(u.dtype)
    return (y, state) if return_last_state else y


def selective_scan_ref(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None = None,
                       z: Tensor | None = None, delta_bias: Tensor | None = None, delta_softplus: bool = False,
                       return_last_state: bool = False):
    """The definition (module docstring) -> y (B, D, L), and the last state (B, D, N) if asked for."""
    return _run(_scan_torch, u, delta, A, B, C, D, z, delta_bias, delta_softplus, return_last_state)


if HAS_TRITON:
    import triton
    import triton.language as tl

    # The kernels keep the two passes. A tile is (BLOCK_T, BLOCK_D, BLOCK_N) = (t, d, n) in registers, a chunk is TILES
    # tiles. A block of channels never crosses a group, so a tile reads one (t, n) block of B and of C, (B, G, L, N).

    @triton.jit
    def _after(a_left, b_left, a_right, b_right):
        """Composition of two steps h -> a h + b, left first."""
        return a_left * a_right, a_right * b_left + b_right

    @triton.jit
    def _rows(ptr, o_t, L, m_t, i_b, o_d, D):
        """x[b, t, d] of a token-major (B, L, D) tensor as fp32; 0 where the mask says no."""
        return tl.load(ptr + (i_b * L + o_t[:, None]) * D + o_d[None, :], m_t[:, None] & (o_d[None, :] < D),
                       0.0).to(tl.float32)                                              # (BLOCK_T, BLOCK_D)

    @triton.jit
    def _projection(ptr, o_t, L, m_t, i_row, o_n, N):
        """B or C of a tile; i_row = b G + g."""
        return tl.load(ptr + (i_row * L + o_t[:, None]) * N + o_n[None, :], m_t[:, None] & (o_n[None, :] < N),
                       0.0).to(tl.float32)[:, None, :]                                  # (BLOCK_T, 1, BLOCK_N)

    @triton.jit
    def _summarise(x_ptr, delta_ptr, A_ptr, V_ptr, end_ptr, total_ptr, L, D, N, G, chunks, REVERSE: tl.constexpr,
                   BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr,
                   TILES: tl.constexpr):
        """First pass. What a chunk alone leaves behind, and its sum of delta. Forward, x = u:
        end = sum_t exp(A sum_{s>t} delta_s) delta_t u_t B_t. REVERSE, x = dL/dy, V = C: what its own y send to the
        state before it, sum_t exp(A sum_{s<=t} delta_s) x_t C_t."""
        i_c, i_b = tl.program_id(0).to(tl.int64), tl.program_id(2).to(tl.int64)
        o_d, o_n = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_N)
        m_dn = (o_d[:, None] < D) & (o_n[None, :] < N)
        i_row = i_b * G + tl.program_id(1) * BLOCK_D // (D // G)
        A = tl.load(A_ptr + o_d[:, None] * N + o_n[None, :], m_dn, 0.0)                 # (BLOCK_D, BLOCK_N)
        end, total = tl.zeros((BLOCK_D, BLOCK_N), tl.float32), tl.zeros((BLOCK_D,), tl.float32)
        for i in range(TILES):
            first = (i_c * TILES + (TILES - 1 - i if REVERSE else i)) * BLOCK_T
            o_t = first + tl.arange(0, BLOCK_T)
            delta = _rows(delta_ptr, o_t, L, o_t < L, i_b, o_d, D)                      # (BLOCK_T, BLOCK_D)
            x = _rows(x_ptr, o_t, L, o_t < L, i_b, o_d, D)                              # (BLOCK_T, BLOCK_D)
            V = _projection(V_ptr, o_t, L, o_t < L, i_row, o_n, N)
            if REVERSE:
                lag = tl.cumsum(delta, 0)
            else:
                m_next = (o_t + 1 < L) & (o_t + 1 < first + BLOCK_T)
                lag = tl.cumsum(_rows(delta_ptr, o_t + 1, L, m_next, i_b, o_d, D), 0, reverse=True)
                x *= delta
            tile = tl.sum(tl.exp(lag[:, :, None] * A[None, :, :]) * (x[:, :, None] * V), 0)   # (BLOCK_D, BLOCK_N)
            gone = tl.sum(delta, 0)                                                     # (BLOCK_D,)
            end = tl.exp(A * gone[:, None]) * end + tile
            total += gone
        at = (i_b * chunks + i_c) * D + o_d                                             # (BLOCK_D,)
        tl.store(total_ptr + at, total, o_d < D)
        tl.store(end_ptr + at[:, None] * N + o_n[None, :], end, m_dn)

    @triton.jit
    def _carry(end_ptr, total_ptr, A_ptr, start_ptr, chunks, D, N, REVERSE: tl.constexpr, BLOCK_C: tl.constexpr,
               BLOCK_X: tl.constexpr):
        """Scan over chunks: start (B, chunks + 1, D, N) from start[first], given, and each chunk's end and total.
        Row j is what arrives at chunk j; the row after the last chunk is the last state. REVERSE: from the other side,
        row j + 1 is what arrives at the end of chunk j, and row 0 is of no use."""
        o_x = tl.program_id(0) * BLOCK_X + tl.arange(0, BLOCK_X)                        # (BLOCK_X,) = d N + n
        m_x, i_b = o_x < D * N, tl.program_id(1).to(tl.int64)
        A = tl.load(A_ptr + o_x, m_x, 0.0)                                              # (BLOCK_X,)
        given = chunks if REVERSE else 0
        state = tl.load(start_ptr + (i_b * (chunks + 1) + given) * D * N + o_x, m_x, 0.0)
        for first in range(0, chunks, BLOCK_C):
            o_c = first + tl.arange(0, BLOCK_C)
            j = tl.where(o_c < chunks, chunks - 1 - o_c if REVERSE else o_c, 0)         # (BLOCK_C,)  chunk to pass
            m = (o_c < chunks)[:, None] & m_x[None, :]
            at = (i_b * chunks + j)[:, None] * D                                        # (BLOCK_C, 1)
            a = tl.exp(A[None, :] * tl.load(total_ptr + at + (o_x // N)[None, :], m, 0.0))
            b = tl.load(end_ptr + at * N + o_x[None, :], m, 0.0)                        # (BLOCK_C, BLOCK_X)
            a, b = tl.associative_scan((a, b), 0, _after)
            past = a * state[None, :] + b                                               # (BLOCK_C, BLOCK_X)
            row = i_b * (chunks + 1) + (j if REVERSE else j + 1)
            tl.store(start_ptr + row[:, None] * D * N + o_x[None, :], past, m)
            state = tl.sum(tl.where((o_c == first + BLOCK_C - 1)[:, None], past, 0.0), 0)

    @triton.jit
    def _output(u_ptr, delta_ptr, A_ptr, B_ptr, C_ptr, start_ptr, y_ptr, tile_ptr, L, D, N, G, chunks,
                SAVE: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr,
                TILES: tl.constexpr):
        """Second pass: y from the right start. SAVE keeps the state before each tile for the backward."""
        i_c, i_b = tl.program_id(0).to(tl.int64), tl.program_id(2).to(tl.int64)
        o_d, o_n = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_N)
        m_dn, o_dn = (o_d[:, None] < D) & (o_n[None, :] < N), o_d[:, None] * N + o_n[None, :]
        i_row = i_b * G + tl.program_id(1) * BLOCK_D // (D // G)
        A = tl.load(A_ptr + o_dn, m_dn, 0.0)                                            # (BLOCK_D, BLOCK_N)
        h = tl.load(start_ptr + (i_b * (chunks + 1) + i_c) * D * N + o_dn, m_dn, 0.0)   # (BLOCK_D, BLOCK_N)
        for i in range(TILES):
            o_t = (i_c * TILES + i) * BLOCK_T + tl.arange(0, BLOCK_T)
            if SAVE:
                tl.store(tile_ptr + ((i_b * chunks + i_c) * TILES + i) * D * N + o_dn, h, m_dn)
            delta = _rows(delta_ptr, o_t, L, o_t < L, i_b, o_d, D)                      # (BLOCK_T, BLOCK_D)
            x = delta * _rows(u_ptr, o_t, L, o_t < L, i_b, o_d, D)                      # (BLOCK_T, BLOCK_D)
            B = _projection(B_ptr, o_t, L, o_t < L, i_row, o_n, N)
            C = _projection(C_ptr, o_t, L, o_t < L, i_row, o_n, N)
            a = tl.exp(delta[:, :, None] * A[None, :, :])                               # (t, d, n)
            a, b = tl.associative_scan((a, x[:, :, None] * B), 0, _after)
            states = a * h[None, :, :] + b                                              # (t, d, n)  h_l
            tl.store(y_ptr + (i_b * L + o_t[:, None]) * D + o_d[None, :], tl.sum(states * C, 2),
                     (o_t < L)[:, None] & (o_d < D)[None, :])
            is_last = (tl.arange(0, BLOCK_T) == BLOCK_T - 1)[:, None, None]
            h = tl.sum(tl.where(is_last, states, 0.0), 0)                               # (BLOCK_D, BLOCK_N)

    # Backward: the formulas above _Chunked.backward, tile by tile from the end. Two things differ.
    #   m_l = g_l + a_{l+1} m_{l+1} needs the next token's decay. Inside a tile it is read one token later; the last
    #   token of a tile gets `reach` = a_first m_first of the tile after it, which that tile left behind.
    #   q_l = m_l a_l h_{l-1} is formed as m_l (h_l - b_l), which needs no shifted states.
    @triton.jit
    def _gradient(u_ptr, delta_ptr, A_ptr, B_ptr, C_ptr, g_ptr, tile_ptr, reach_ptr, du_ptr, ddelta_ptr, dA_ptr, dB_ptr,
                  dC_ptr, L, D, N, G, chunks, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr,
                  TILES: tl.constexpr):
        i_c, i_b = tl.program_id(0).to(tl.int64), tl.program_id(2).to(tl.int64)
        o_d, o_n = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_N)
        m_dn, o_dn = (o_d[:, None] < D) & (o_n[None, :] < N), o_d[:, None] * N + o_n[None, :]
        i_row = i_b * G + tl.program_id(1) * BLOCK_D // (D // G)
        A = tl.load(A_ptr + o_dn, m_dn, 0.0)                                            # (BLOCK_D, BLOCK_N)
        reach = tl.load(reach_ptr + (i_b * (chunks + 1) + i_c + 1) * D * N + o_dn, m_dn, 0.0)
        dA = tl.zeros_like(A)
        for i in range(TILES):
            i_tile = i_c * TILES + TILES - 1 - i
            o_t = i_tile * BLOCK_T + tl.arange(0, BLOCK_T)
            m_next = (o_t + 1 < L) & (tl.arange(0, BLOCK_T) + 1 < BLOCK_T)
            h = tl.load(tile_ptr + (i_b * chunks * TILES + i_tile) * D * N + o_dn, m_dn, 0.0)  # (BLOCK_D, BLOCK_N)
            delta = _rows(delta_ptr, o_t, L, o_t < L, i_b, o_d, D)                      # (BLOCK_T, BLOCK_D)
            later = _rows(delta_ptr, o_t + 1, L, m_next, i_b, o_d, D)                   # (BLOCK_T, BLOCK_D)
            u = _rows(u_ptr, o_t, L, o_t < L, i_b, o_d, D)                              # (BLOCK_T, BLOCK_D)
            g = _rows(g_ptr, o_t, L, o_t < L, i_b, o_d, D)                              # (BLOCK_T, BLOCK_D)
            B = _projection(B_ptr, o_t, L, o_t < L, i_row, o_n, N)
            C = _projection(C_ptr, o_t, L, o_t < L, i_row, o_n, N)
            a = tl.exp(delta[:, :, None] * A[None, :, :])                               # (t, d, n)
            b = (delta * u)[:, :, None] * B                                             # (t, d, n)
            decay, states = tl.associative_scan((a, b), 0, _after)
            states += decay * h[None, :, :]                                             # (t, d, n)  h_l
            decay, m = tl.associative_scan((tl.exp(later[:, :, None] * A[None, :, :]), g[:, :, None] * C), 0, _after,
                                           reverse=True)
            m += decay * reach[None, :, :]                                              # (t, d, n)  m_l
            is_first = (tl.arange(0, BLOCK_T) == 0)[:, None, None]
            reach = tl.sum(tl.where(is_first, a * m, 0.0), 0)                           # (BLOCK_D, BLOCK_N)
            dx = tl.sum(m * B, 2)                                                       # (BLOCK_T, BLOCK_D)
            q = m * (states - b)                                                        # (t, d, n)
            at, m_td = (i_b * L + o_t[:, None]) * D + o_d[None, :], (o_t < L)[:, None] & (o_d < D)[None, :]
            tl.store(du_ptr + at, delta * dx, m_td)
            tl.store(ddelta_ptr + at, tl.sum(q * A[None, :, :], 2) + u * dx, m_td)
            dA += tl.sum(q * delta[:, :, None], 0)
            at, m_tn = (i_row * L + o_t[:, None]) * N + o_n[None, :], (o_t < L)[:, None] & (o_n < N)[None, :]
            tl.atomic_add(dB_ptr + at, tl.sum(m * (delta * u)[:, :, None], 1), m_tn, sem="relaxed")
            tl.atomic_add(dC_ptr + at, tl.sum(states * g[:, :, None], 1), m_tn, sem="relaxed")
        tl.store(dA_ptr + (i_b * chunks + i_c) * D * N + o_dn, dA, m_dn)                # a row a chunk, summed outside


def _pass_chunks(x: Tensor, delta: Tensor, A: Tensor, V: Tensor, start: Tensor,
                 reverse: bool) -> tuple[tuple, tuple, dict]:
    """First pass and carry: fills start (B, chunks + 1, D, N) from its given row -> grid, sizes, options."""
    (batch, L, D), N, G = x.shape, A.shape[1], V.shape[1]
    chunks = start.shape[1] - 1
    width = BLOCK_D if G == 1 else min(BLOCK_D, (D // G) & -(D // G))                   # a power of 2 dividing D / G
    grid, sizes = (chunks, triton.cdiv(D, width), batch), (L, D, N, G, chunks)
    options = {"BLOCK_T": BLOCK_T, "BLOCK_D": width, "BLOCK_N": triton.next_power_of_2(N), "TILES": TILES}
    end, total = x.new_empty(batch, chunks, D, N, dtype=torch.float32), delta.new_empty(batch, chunks, D)
    _summarise[grid](x, delta, A, V, end, total, *sizes, REVERSE=reverse, **options)
    _carry[(triton.cdiv(D * N, 32), batch)](end, total, A, start, chunks, D, N, REVERSE=reverse, BLOCK_C=64, BLOCK_X=32)
    return grid, sizes, options


class _Scan(torch.autograd.Function):
    """u, delta (B, L, D), A (D, N), B, C (B, G, L, N), all contiguous. Saves them and the state before each tile."""

    @staticmethod
    def forward(ctx, u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor) -> tuple[Tensor, Tensor]:
        (batch, L, D), N = u.shape, A.shape[1]
        chunks, save = triton.cdiv(L, BLOCK_T * TILES), any(ctx.needs_input_grad)
        start = delta.new_zeros(batch, chunks + 1, D, N)                                # row 0: h_{-1} = 0
        grid, sizes, options = _pass_chunks(u, delta, A, B, start, reverse=False)
        y = torch.empty_like(delta)                                                     # (B, L, D)
        tiles = delta.new_empty((batch, chunks * TILES, D, N) if save else (1,))
        _output[grid](u, delta, A, B, C, start, y, tiles, *sizes, SAVE=save, **options)
        ctx.save_for_backward(u, delta, A, B, C, tiles)
        return y, start[:, -1].clone()                                                  # (B, L, D), (B, D, N)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_y: Tensor, grad_state: Tensor) -> tuple[Tensor, ...]:
        u, delta, A, B, C, tiles = ctx.saved_tensors
        (batch, L, D), N = u.shape, A.shape[1]
        chunks, g = triton.cdiv(L, BLOCK_T * TILES), grad_y.contiguous()
        reach = delta.new_zeros(batch, chunks + 1, D, N)
        reach[:, -1] = grad_state                                                       # what reaches h_{L-1} directly
        grid, sizes, options = _pass_chunks(g, delta, A, C, reach, reverse=True)
        grad_u, grad_delta = torch.empty_like(delta), torch.empty_like(delta)
        grad_A = delta.new_empty(batch, chunks, D, N)
        grad_B, grad_C = torch.zeros_like(B, dtype=torch.float32), torch.zeros_like(C, dtype=torch.float32)
        _gradient[grid](u, delta, A, B, C, g, tiles, reach, grad_u, grad_delta, grad_A, grad_B, grad_C, *sizes,
                        **options)
        return grad_u.to(u.dtype), grad_delta, grad_A.sum((0, 1)), grad_B.to(B.dtype), grad_C.to(C.dtype)


def _scan_triton(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor) -> tuple[Tensor, Tensor]:
    """As _scan_torch; B and C vary in time."""
    groups = max(B.shape[1], C.shape[1])
    with torch.cuda.device_of(u):
        return _Scan.apply(u.contiguous(), delta.contiguous(), A.float().contiguous(),
                           *(v.expand(-1, groups, -1, -1).contiguous() for v in (B, C)))


def selective_scan(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None = None,
                   z: Tensor | None = None, delta_bias: Tensor | None = None, delta_softplus: bool = False,
                   return_last_state: bool = False, backend: str = "auto"):
    """Shapes and equation in the module docstring -> y (B, D, L) in u's dtype, and, if asked for, the last state
    (B, D, N) in fp32 (fp64). backend: auto | torch | triton (`dispatch.pick`); constant B or C need torch, auto knows.
    """
    constant = B.dim() == 2 or C.dim() == 2
    if constant and backend == "triton":
        raise ValueError("selective_scan: the kernel takes B and C that vary in time; use backend='torch'")
    scan = _scan_torch if constant or pick("selective_scan", backend, u) == "torch" else _scan_triton
    return _run(scan, u, delta, A, B, C, D, z, delta_bias, delta_softplus, return_last_state)
