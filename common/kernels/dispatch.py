"""Which backend an operation runs on: one rule for every kernel file.

`auto` is triton for CUDA tensors of 16 or 32 bits where triton is installed, torch for everything else. Asking for
triton where it cannot run is an error, never a silent change of backend. Triton's interpreter (TRITON_INTERPRET=1 in
the environment before this module is imported) runs the kernels on CPU tensors, slowly: that is for tests.
"""

import os
from importlib.util import find_spec

import torch
from torch import Tensor

HAS_TRITON = find_spec("triton") is not None  # Linux only
INTERPRETED = HAS_TRITON and os.environ.get("TRITON_INTERPRET") == "1"  # read once, as triton.jit reads it


def pick(op: str, backend: str, tensor: Tensor) -> str:
    """-> "torch" or "triton" for this call of `op`. Raises ValueError in one line if `backend` cannot be had."""
    if backend not in ("auto", "torch", "triton"):
        raise ValueError(f"{op}: backend={backend!r} is not one of auto, torch, triton")
    if backend == "auto":
        return "triton" if tensor.is_cuda and HAS_TRITON and tensor.dtype != torch.float64 else "torch"
    if backend == "triton":
        if not HAS_TRITON:
            raise ValueError(f"{op}: backend='triton' but triton is not installed (Linux only); use backend='torch'")
        if not (tensor.is_cuda or INTERPRETED):
            raise ValueError(f"{op}: backend='triton' needs CUDA tensors, these are on {tensor.device}; use 'torch'")
        if tensor.dtype == torch.float64:
            raise ValueError(f"{op}: the triton kernel computes in float32, the input is float64; use backend='torch'")
        if INTERPRETED and tensor.dtype == torch.bfloat16:
            raise ValueError(f"{op}: Triton's interpreter is silently wrong in bfloat16; use float32")
    return backend
