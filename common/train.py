"""What every training loop needs and no paper invents: seeds, ranks, data order, checkpoints, log line, result.json.

A method keeps its own loop, around common.engine.Session, which puts these pieces together.

Determinism: the batch of a step depends on (seed, step) alone, every item has its own generator, and a checkpoint holds
all else, so on a CPU an interrupted run ends bit-equal to an uninterrupted one. Two processes with batch b see the data
of one process with batch 2b; with group norm and losses that are means over samples they compute the same step.
"""

import ctypes
import gc
import json
import math
import os
import random
import resource
import shlex
import shutil
import subprocess
import sys
import time
import zlib
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from common.cli import RUN, to_dict
from common.files import InputError, atomic, naming, note, read_json, reading, reason, sweep, write_bytes, write_json

# --- seeds, device, ranks --------------------------------------------------------------------------------------------


class Run(NamedTuple):
    """Where this process stands among those that train together."""

    rank: int
    world: int
    device: torch.device
    is_main: bool


def seed_everything(seed: int) -> None:
    """python, numpy and torch (all devices)."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def setup(device: str) -> Run:
    """One process, or one of torchrun's (gloo on a CPU, nccl on CUDA).

    On a CPU the operators with a deterministic variant use it: resume is bit-equal there.
    """
    world, rank, local = (int(os.environ.get(k, d)) for k, d in (("WORLD_SIZE", 1), ("RANK", 0), ("LOCAL_RANK", 0)))
    if device == "cuda":
        if local >= torch.cuda.device_count():
            raise InputError(f"--device cuda: process {local} here, but only {torch.cuda.device_count()} GPUs")
        torch.cuda.set_device(local)
        where = torch.device("cuda", local)
    else:
        where = torch.device(device)
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.utils.deterministic.fill_uninitialized_memory = False  # a debugging aid that costs time
    if world > 1 and not dist.is_initialized():
        # Others wait while the main process makes labels; a process that dies is noticed by torchrun, not by a timeout.
        backend = "nccl" if device == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=timedelta(hours=24), device_id=where if device == "cuda" else None)
    return Run(rank, world, where, rank == 0)


def joined(device: torch.device | str = "cpu") -> Run:
    """The processes that `setup` joined, seen from here; one process without it."""
    if not dist.is_initialized():
        return Run(0, 1, torch.device(device), True)
    where = torch.device("cuda", torch.cuda.current_device()) if dist.get_backend() == "nccl" else torch.device("cpu")
    return Run(dist.get_rank(), dist.get_world_size(), where, dist.get_rank() == 0)


def barrier(run: Run) -> None:
    """Waits for all processes."""
    if run.world > 1:
        dist.barrier()


_WRAPPED: list[nn.parallel.DistributedDataParallel] = []


def teardown(run: Run) -> None:
    """Ends the group of processes; safe to call twice. What `wrap` was given still works, what it gave does not.

    gloo's thread needs the GIL to let go of its last tensors, so the group must end while nothing holds the GIL. If the
    reducer of a DistributedDataParallel is its last owner, torch 2.13 hangs; if the interpreter ends first, it aborts
    (each seen in about every second run). Hence: first the reducers go, then the group, and that joins the thread.
    """
    while _WRAPPED:
        net = _WRAPPED.pop()
        for name in ("reducer", "logger", "process_group"):
            delattr(net, name)
    if run.world > 1 and dist.is_initialized():
        dist.destroy_process_group()


def wrap(net: nn.Module, run: Run, find_unused: bool = False) -> nn.Module:
    """net on run.device -> DistributedDataParallel(net) if there is more than one process (SyncBatchNorm on CUDA)."""
    if run.world == 1:
        return net
    if run.device.type == "cuda":
        net = nn.SyncBatchNorm.convert_sync_batchnorm(net)
    elif any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in net.modules()):
        note("batch norm on CPUs: each process takes statistics of its own samples; one process would take them of all")
    ids = [run.device.index] if run.device.type == "cuda" else None
    _WRAPPED.append(nn.parallel.DistributedDataParallel(net, device_ids=ids, find_unused_parameters=find_unused))
    return _WRAPPED[-1]


def shard(net: nn.Module, layers: tuple[str, ...], amp: str) -> nn.Module:
    """FSDP2: every module whose class is named in `layers` is a shard of its own, the rest another; bf16 layers
    with amp "bf16"."""
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32) if amp == "bf16" else MixedPrecisionPolicy()
    for module in net.modules():
        if type(module).__name__ in layers:
            fully_shard(module, mp_policy=policy)
    fully_shard(net).set_reshard_after_backward(False)  # a layer may be called twice a step: `reshard` follows
    return net


def reshard(net: nn.Module) -> None:
    """After a backward pass: every process keeps its shards of `shard`'s net alone."""
    for module in net.modules():
        if hasattr(module, "set_reshard_after_backward"):
            module.reshard()


class Unsharded:
    """A sharded network or optimiser as checkpoints hold it. All processes make one, tensor after tensor: the first
    keeps full tensors on the CPU, the others their own shards."""

    def __init__(self, target: nn.Module | torch.optim.Optimizer):
        self.target = target
        self.value = self.gather(target.state_dict())

    def gather(self, value: Any) -> Any:
        """Full tensors in place of shards, through nested dicts."""
        if isinstance(value, dict):
            return {k: self.gather(v) for k, v in value.items()}
        if not hasattr(value, "full_tensor"):
            return value
        full = value.full_tensor()
        return full.cpu() if dist.get_rank() == 0 else value.to_local()

    def state_dict(self) -> dict[str, Any]:
        """What `save_checkpoint` writes."""
        return self.value

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Cut an optimiser's state into shards again; a network's was loaded before it was sharded."""
        from torch.distributed.tensor import distribute_tensor

        if isinstance(self.target, nn.Module):
            return
        parameters = [p for group in self.target.param_groups for p in group["params"]]
        for k, values in state["state"].items():
            p = parameters[k]
            for name, value in values.items():
                if hasattr(p, "device_mesh") and torch.is_tensor(value) and value.shape == p.shape:
                    values[name] = distribute_tensor(value.to(p.device), p.device_mesh, p.placements)
        self.target.load_state_dict(state)


def unwrap(model: nn.Module) -> nn.Module:
    """The network itself, whether `wrap` wrapped it or not."""
    return model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model


def mean_over_ranks(values: dict[str, float], run: Run) -> dict[str, float]:
    """The mean of each number over the processes; all of them call it with the same names."""
    if run.world == 1:
        return {name: float(value) for name, value in values.items()}
    packed = torch.tensor([float(v) for v in values.values()], dtype=torch.float64, device=run.device)
    dist.all_reduce(packed)
    return dict(zip(values, (packed / run.world).tolist(), strict=True))


def sum_over_ranks(tensor: Tensor, run: Run) -> Tensor:
    """The sum over the processes, such as of confusion matrices that each formed on its share of the frames."""
    if run.world == 1:
        return tensor
    total = tensor.to(run.device, copy=True)
    dist.all_reduce(total)
    return total.to(tensor.device)


def share_out(work: Callable[[Any], Any], items: Sequence) -> Iterator[Any]:
    """Yields work(item) of every item, in order and on every process, of which each does its share of the work."""
    run = joined()
    for first in range(run.rank, len(items) + run.rank, run.world):
        done = [[work(item) for item in items[first : first + 1]]]
        if run.world > 1:
            done, mine = [None] * run.world, done[0]
            dist.all_gather_object(done, mine)
        yield from (result for results in done for result in results)


def over_ranks(value: Tensor, least: float = -math.inf) -> Tensor:
    """The mean of `value` over the processes; `value` itself in one process. least: of their sum.

    A sum over this process's samples divided by over_ranks(count) is, in the mean over processes that losses and
    gradients take, the sum over all samples divided by their count. The gradient is that of this process's part:
    right where each process goes on with the same numbers.
    """
    if not dist.is_initialized():
        return value.clamp_min(least)
    total = value.detach().clone()
    dist.all_reduce(total)
    return total.clamp_min(least) / dist.get_world_size() + (value - value.detach())


def autocast(device: torch.device | str, amp: str) -> AbstractContextManager:
    """amp 'bf16' -> autocast to bfloat16 on a CPU or a GPU (no loss scaling needed); 'off' -> nothing."""
    if amp not in ("off", "bf16"):
        raise ValueError(f"amp {amp!r}: off or bf16")
    return torch.autocast(torch.device(device).type, torch.bfloat16, enabled=amp == "bf16")


def stage_state(folder: Path) -> dict[str, Any]:
    """step, train_s and peak_gb of a stage's checkpoint; nothing where the stage was not run here."""
    if not (folder / "latest.json").is_file():
        return {}
    saved = read_json(folder / _latest(folder / "latest.json")["folder"] / "train_state.json", TRAIN_STATE)
    return saved["state"] | {"step": saved["step"]}


def stages_cost(net: nn.Module, folders: Sequence[Path]) -> dict[str, float]:
    """The cost of a staged run, for result.json: parameters, steps and seconds of all stages, their largest peak."""
    states = [stage_state(folder) for folder in folders]
    total = {name: sum(s.get(key, 0) for s in states) for name, key in (("steps", "step"), ("train_s", "train_s"))}
    peak = max(s.get("peak_gb", 0.0) for s in states)
    return {"params": sum(p.numel() for p in net.parameters()), **total, "peak_gb": peak}


def peak_gb(device: torch.device) -> float:
    """Peak memory since `reset_peak` [GB, 1e9 bytes]: the allocator's on CUDA, the process's resident set on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


def reset_peak(device: torch.device) -> None:
    """Starts `peak_gb` anew, so that runs in one process do not inherit each other's peak (on a CPU: Linux only)."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    gc.collect()
    if sys.platform == "linux" and os.access("/proc/self/clear_refs", os.W_OK):
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc: freed memory goes back before the count starts
        if trim is not None:
            trim(0)
        Path("/proc/self/clear_refs").write_text("5")


# --- data order ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class DataOrder:
    """Which samples a process sees at a step: shuffled epochs end to end, cut into global batches of batch * world.

    A pure function of (seed, step): resume needs the step alone, arms of an ablation share it, and two processes of
    batch b share one process's order of batch 2b (rank r takes the r-th slice of the global batch).
    """

    n: int  # samples
    batch: int  # samples per process and step
    world: int = 1
    rank: int = 0
    seed: int = 0

    def __post_init__(self):
        if self.n < 1:
            raise InputError("no training samples in this split; check --data-root, --version and --split")
        if self.batch < 1:
            raise InputError(f"--batch {self.batch}: must be 1 or more")

    def positions(self, step: int) -> range:
        """Places in the endless sequence of samples, this process's share of the step."""
        first = (step * self.world + self.rank) * self.batch
        return range(first, first + self.batch)

    def sample(self, position: int) -> int:
        epoch, place = divmod(position, self.n)
        return int(self._epoch(epoch)[place])

    def __call__(self, step: int) -> list[int]:
        """Sample indices of this process at this step."""
        return [self.sample(p) for p in self.positions(step)]

    def generator(self, position: int) -> np.random.Generator:
        """The generator of one item, the same whichever process or thread makes it."""
        return np.random.default_rng([self.seed, 1, position])

    def steps(self, epochs: float) -> int:
        """Optimiser steps that see every sample `epochs` times."""
        return math.ceil(epochs * self.n / (self.batch * self.world))

    def _epoch(self, epoch: int) -> np.ndarray:
        cached = self.__dict__.get("_last")
        if cached is None or cached[0] != epoch:
            cached = (epoch, np.random.default_rng([self.seed, 0, epoch]).permutation(self.n))
            object.__setattr__(self, "_last", cached)  # one epoch is kept: 20k samples cost 1 ms to shuffle
        return cached[1]


@dataclass(frozen=True)
class MixedOrder:
    """Each step some labelled samples, then some without a label: samples are (index, with its label?).

    Each kind is shuffled by itself, so runs with and without the second see the first alike. Where every
    sample has a label, the second kind are these without it: in a step others, half an epoch away.
    """

    labelled: list[int]
    rest: list[int]
    first: DataOrder
    second: DataOrder | None

    @classmethod
    def of(cls, labelled: list[int], rest: list[int], batch: int, batch_rest: int, run: Run,
           seed: int) -> "MixedOrder":
        """batch labelled samples a process and step, and batch_rest others (perhaps 0)."""
        first = DataOrder(len(labelled), batch, run.world, run.rank, seed)
        others = len(rest or labelled)
        other_seed = seed + 2**20 * bool(rest)
        second = DataOrder(others, batch_rest, run.world, run.rank, other_seed) if batch_rest else None
        return cls(labelled, rest, first, second)

    @property
    def batch(self) -> int:
        return self.first.batch + (self.second.batch if self.second else 0)

    def positions(self, step: int) -> list[tuple[int, bool]]:
        second = self.second.positions(step) if self.second else ()
        return [(p, True) for p in self.first.positions(step)] + [(p, False) for p in second]

    def sample(self, position: tuple[int, bool]) -> tuple[int, bool]:
        place, labelled = position
        if labelled:
            return self.labelled[self.first.sample(place)], True
        if self.rest:
            return self.rest[self.second.sample(place)], False
        n, start = self.second.n, place // self.second.n * self.second.n
        return self.labelled[self.second.sample(start + (place + n // 2) % n)], False

    def generator(self, position: tuple[int, bool]) -> np.random.Generator:
        return np.random.default_rng([self.first.seed, 2 + position[1], position[0]])

    def steps(self, epochs: float) -> int:
        """Optimiser steps that see as many samples as there are, `epochs` times."""
        seen = self.first.n + (len(self.rest) if self.second else 0)
        return math.ceil(epochs * seen / (self.batch * self.first.world))


def prefetch(make: Callable[[int, np.random.Generator], Any], order: DataOrder, start: int, steps: int,
             workers: int = 2, log: "Log | None" = None) -> Iterator[tuple[int, list[Any]]]:
    """Yields (step, [make(index, generator), ...]) for start <= step < steps, made ahead by `workers` threads.

    `make` must draw from its generator alone. What it raises is raised here, at its step. workers 0: no threads.
    Time spent waiting goes to log.waited.
    """

    def wait(get: Callable[[], list[Any]]) -> list[Any]:
        begun = time.perf_counter()
        items = get()
        if log is not None:
            log.waited += time.perf_counter() - begun
        return items

    def jobs(step: int) -> list[tuple[int, np.random.Generator]]:
        return [(order.sample(p), order.generator(p)) for p in order.positions(step)]

    if workers < 1:
        for step in range(start, steps):
            yield step, wait(lambda step=step: [make(*job) for job in jobs(step)])
        return
    pool = ThreadPoolExecutor(workers, thread_name_prefix="prefetch")
    ahead = max(2, math.ceil(2 * workers / order.batch))  # [batches] enough to keep every thread busy
    queue: deque = deque()
    try:
        for step in range(start, steps):
            while len(queue) < ahead and step + len(queue) < steps:
                queue.append([pool.submit(make, *job) for job in jobs(step + len(queue))])
            futures = queue.popleft()
            yield step, wait(lambda futures=futures: [future.result() for future in futures])
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


# --- learning rate ---------------------------------------------------------------------------------------------------


def schedule(step: int, steps: int, kind: str = "cosine", warmup: int = 0, floor: float = 0.0) -> float:
    """Factor on the learning rate, in (0, 1], for step 0 .. steps - 1."""
    # 1) linear warm-up, from 1/warmup up
    if step < warmup:
        return (step + 1) / warmup
    # 2) constant, or ten times less for the last sixth of the run (StepLR at epoch 10 of 12)
    if kind == "constant":
        return 1.0
    if kind == "step":
        return 1.0 if step < steps * 10 / 12 else 0.1
    # 3) cosine from 1 down to floor at the last step
    if kind != "cosine":
        raise ValueError(f"schedule {kind!r}: constant, step or cosine")
    ratio = min(1.0, (step - warmup) / max(1, steps - warmup))
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * ratio))


def param_groups(net: nn.Module, lr_enc: float, lr_dec: float, weight_decay: float, encoder: str = "encoder",
                 muon: bool = False) -> list[dict[str, Any]]:
    """Groups for an optimiser: parameters of a part named `encoder` learn at lr_enc, the rest at lr_dec; vectors (norms, biases)
    do not decay. Each group keeps its own rate in `base_lr`, which `set_lr` scales. muon: the weights of convolutions
    and linear layers get groups of their own with `orthogonal` True, for `Muon`."""
    layers = (nn.Linear, nn.modules.conv._ConvNd)
    matrices = {id(m.weight) for m in net.modules() if muon and isinstance(m, layers)}
    groups: dict[tuple[float, float, bool], list[Tensor]] = {}
    for name, parameter in net.named_parameters():
        if parameter.requires_grad:
            lr = lr_enc if f".{encoder}." in f".{name}" else lr_dec
            decay = weight_decay if parameter.ndim > 1 else 0.0
            groups.setdefault((lr, decay, id(parameter) in matrices), []).append(parameter)
    extra = [{"orthogonal": orthogonal} if muon else {} for _, _, orthogonal in groups]
    return [{"params": p, "lr": lr, "base_lr": lr, "weight_decay": wd} | e for ((lr, wd, _), p),
            e in zip(groups.items(), extra, strict=True)]


def set_apart(groups: list[dict], parameters: Sequence[Tensor], **changes: Any) -> None:
    """Gives these parameters, out of `param_groups`, groups of their own with other settings."""
    chosen = {id(p) for p in parameters}
    for group in list(groups):
        if mine := [p for p in group["params"] if id(p) in chosen]:
            group["params"] = [p for p in group["params"] if id(p) not in chosen]
            groups.append(group | {"params": mine} | changes)


class Muon(torch.optim.AdamW):
    """AdamW, except in groups with `orthogonal` True: there a weight, seen as a matrix (out, in * kernel), steps by its
    Nesterov momentum with all singular values set to about 1 (five Newton-Schulz iterations), times 0.2 sqrt(max side),
    so that its size matches an AdamW step and one learning rate serves both.

    Jordan et al., "Muon" (2024); the scale: Liu et al., arXiv 2502.16982. torch.optim.Muon takes no convolutions. On the
    demo world the tiny networks here need less than half of AdamW's steps; the papers' presets keep AdamW.
    """

    @torch.no_grad()
    def step(self, closure: Callable | None = None) -> Any:
        groups = self.param_groups
        self.param_groups = [g for g in groups if not g["orthogonal"]]
        result = super().step(closure)
        self.param_groups = groups
        steps = [(group, p, self._momentum(p)) for group in groups if group["orthogonal"] for p in group["params"]
                 if p.grad is not None]  # fmt: skip
        for (group, p, _), update in zip(steps, orthogonalize([m for _, _, m in steps]), strict=True):
            p.mul_(1 - group["lr"] * group["weight_decay"])
            p.add_(update.view_as(p), alpha=-0.2 * group["lr"] * max(update.shape) ** 0.5)
        return result

    def _momentum(self, p: Tensor) -> Tensor:
        """The Nesterov momentum of a weight as a matrix (out, in * kernel)."""
        state = self.state[p]
        state.setdefault("step", torch.zeros(()))  # AdamW's loader asks every parameter for one
        momentum = state.setdefault("momentum", torch.zeros_like(p)).lerp_(p.grad, 0.05)
        return p.grad.lerp(momentum, 0.95).flatten(1)


def make_optimizer(name: str, net: nn.Module, lr_enc: float, lr_dec: float, weight_decay: float,
                   encoder: str = "encoder") -> torch.optim.Optimizer:
    """name: adamw or muon. encoder: the parameters that learn at lr_enc."""
    muon = name == "muon"
    groups = param_groups(net, lr_enc, lr_dec, weight_decay, encoder, muon)
    return (Muon if muon else torch.optim.AdamW)(groups, lr=lr_dec)


def orthogonalize(matrices: list[Tensor]) -> list[Tensor]:
    """Each (a, b) -> U V^T of x = U S V^T, about: singular values near 1, by the quintic iteration of Jordan et al.

    X <- (3.4445 I - 4.775 X X^T + 2.0315 (X X^T)^2) X five times. Only the small Gram matrices are iterated (their
    factors commute), those of one size together, so the long side is multiplied twice, not ten times."""
    wide = [x if x.shape[0] <= x.shape[1] else x.t() for x in matrices]
    wide = [x / (x.norm() + 1e-7) for x in wide]
    by_size: dict[int, list[int]] = {}
    for i, x in enumerate(wide):
        by_size.setdefault(len(x), []).append(i)
    for size, members in by_size.items():
        gram = torch.stack([wide[i] @ wide[i].t() for i in members])  # (n, size, size)
        product = torch.eye(size, dtype=gram.dtype, device=gram.device).expand_as(gram)
        for _ in range(5):  # factor = 3.4445 I + rest
            rest = torch.baddbmm(gram, gram, gram, beta=-4.7750, alpha=2.0315)
            product = torch.baddbmm(product, rest, product, beta=3.4445)
            gram = torch.baddbmm(gram, rest, gram, beta=3.4445)
            gram = torch.baddbmm(gram, gram, rest, beta=3.4445)
        for i, q in zip(members, product, strict=True):
            wide[i] = q @ wide[i]
    return [y if x.shape[0] <= x.shape[1] else y.t() for x, y in zip(matrices, wide, strict=True)]


def set_lr(optimizer: torch.optim.Optimizer, factor: float) -> float:
    """Sets each group's lr to base_lr * factor; -> the largest, for the log line."""
    for group in optimizer.param_groups:
        group["lr"] = group["base_lr"] * factor
    return max(group["lr"] for group in optimizer.param_groups)


# --- starting or going on --------------------------------------------------------------------------------------------

# Shape of train_state.json (`files.misfit`)
TRAIN_STATE = {"step": int, "groups": {"param_groups": [{"params": [int]}], "plain": dict},
               "state": {"train_s?": float, "peak_gb?": float}, "world": int}

# Config fields that change neither weights nor data order: a run may go on with other values of these.
RUNTIME = ("workers", "eval_frames", "rayiou", "pictures", "world_size")


def settings(args: Any, cfg: Any, steps: int, data: dict[str, Any]) -> dict[str, Any]:
    """What makes a run this run; written as <out>/config.json. data: root, version, split, labels ... (JSON values)."""
    return {
        "method": args.method,
        "preset": args.preset,
        "seed": args.seed,
        "steps": steps,
        "config": to_dict(cfg),
        "data": {name: str(v) if isinstance(v, Path) else v for name, v in data.items()},
    }


def begin(out: Path | str, run: Run, wanted: dict[str, Any], resume: bool = False) -> int | None:
    """Opens the run folder: -> the step to start from, or None if the run is finished. All ranks call it.

    An empty or absent folder starts a new run. A folder with the same settings goes on from its checkpoint, with or
    without --resume: the command that was killed is the command that goes on. Other settings: InputError that names
    them. One exception: `--resume --steps N` with more steps extends a run; its schedule then follows the new length,
    so it does not equal a run of N steps from the start, and config.json says so (`extended_from`).
    """
    out = Path(out)
    path = out / "config.json"
    found = checkpoint_step(out)
    if not path.is_file() and (resume or found is not None):
        remedy = "drop --resume" if resume else "use another --out"
        raise InputError(f"{out}: no config.json of a run there; {remedy}")
    old = read_json(path, RUN) if path.is_file() else None
    barrier(run)  # every rank has looked before the main one writes
    if old is not None:
        differ = differences(old, wanted | {"world": run.world})
        extends = set(differ) <= {"steps", "config.steps", "config.epochs"} and wanted["steps"] > old["steps"]
        longer = resume and extends
        if differ and not longer:
            shown = ", ".join(f"{name} {there} there, {here} here" for name, (there, here) in list(differ.items())[:4])
            more = f" and {len(differ) - 4} more" if len(differ) > 4 else ""
            remedy = "add --resume to extend it" if extends else "use another --out"
            raise InputError(f"{out}: holds a run with other settings ({shown}{more}); {remedy}")
        if not longer and found is not None and found >= wanted["steps"]:
            if run.is_main:
                sweep(out), _clean(out)  # what a kill at the very end left
                print(f"{out}: finished, {found} steps; nothing to train (another --out trains anew)")
            return None
        if run.is_main:
            length = f", extended from {old['steps']} steps" if longer else ""
            print(f"{out}: goes on from step {found or 0} of {wanted['steps']}{length}")
        if longer:
            wanted = wanted | {"extended_from": [*old.get("extended_from", []), old["steps"]]}
        elif "extended_from" in old:
            wanted = wanted | {"extended_from": old["extended_from"]}
    if run.is_main:
        write_json(path, wanted | {"world": run.world} | environment(run))
    barrier(run)
    return found or 0


def differences(old: dict[str, Any], new: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """{name: (old, new)} over method, preset, seed, steps, world, config.* and data.*, without RUNTIME fields."""

    def flat(value: dict[str, Any]) -> dict[str, Any]:
        plain = {k: value.get(k) for k in ("method", "preset", "seed", "steps", "world")}
        config = {f"config.{k}": v for k, v in value.get("config", {}).items() if k not in RUNTIME}
        return plain | config | {f"data.{k}": v for k, v in value.get("data", {}).items()}

    a, b = flat(old), flat(json.loads(json.dumps(new)))
    return {name: (a.get(name), b.get(name)) for name in a | b if a.get(name) != b.get(name)}


def environment(run: Run) -> dict[str, str]:
    """What produced a run, for config.json: commit, command, torch version, device name."""
    device = torch.cuda.get_device_name(run.device) if run.device.type == "cuda" else "cpu"
    return {"commit": commit(), "command": command(), "torch": torch.__version__, "device": device}


def commit() -> str:
    """The checkout's commit, with `-dirty` if tracked files differ from it; `unknown` outside git."""
    root = Path(__file__).resolve().parents[1]
    try:
        head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=root, capture_output=True, text=True, check=True)
        changed = subprocess.run(["git", "diff", "--quiet", "HEAD"], cwd=root, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return head.stdout.strip() + ("-dirty" if changed.returncode else "")


def command() -> str:
    """The command line; paths inside the working folder are shown relative to it."""
    here = f"{Path.cwd()}{os.sep}"
    words = [word.removeprefix(here) for word in sys.argv]
    return shlex.join(["python", *words])


# --- checkpoints -----------------------------------------------------------------------------------------------------
#
#   <out>/latest.json                 {"folder": "step_000400", "step": 400}; replacing it is the one atomic switch
#   <out>/step_000400/model.safetensors        parameters and buffers
#   <out>/step_000400/optimizer.safetensors    optimiser tensors "0.exp_avg", random states "rng0.torch" of each rank
#   <out>/step_000400/train_state.json         step, parameter groups, and what the method gave
#
# A new folder is complete on disk before latest.json names it, and the old one goes only afterwards.


def save_checkpoint(out: Path | str, run: Run, net: nn.Module, optimizer: torch.optim.Optimizer, step: int,
                    state: dict[str, Any]) -> None:
    """Writes the checkpoint after `step` finished steps. All ranks call it; state: JSON values (best, train_s, ...).

    Raises InputError, and leaves the last checkpoint as it is, if a weight or the optimiser's state is not finite.
    """
    _check_finite(Path(out), unwrap(net), optimizer, step)
    rng = _gather_rng(run)
    if run.is_main:
        out = Path(out)
        _clean(out)
        folder = out / f"step_{step:06d}"
        if folder.exists():  # the current checkpoint has this name: it stays until the switch
            folder = out / f"step_{step:06d}b"
        packed, groups = _pack(optimizer)
        with atomic(folder, folder=True) as temporary:
            _save(temporary / "model.safetensors", {k: v for k, v in unwrap(net).state_dict().items()})
            _save(temporary / "optimizer.safetensors", packed | rng)
            saved = {"step": step, "groups": groups, "state": state, "world": run.world}
            write_json(temporary / "train_state.json", saved)
            _sync(temporary)
        _sync(out)
        write_json(out / "latest.json", {"folder": folder.name, "step": step})
        _sync(out)
        _clean(out)
    barrier(run)


def _check_finite(out: Path, net: nn.Module, optimizer: torch.optim.Optimizer, step: int) -> None:
    """Raises InputError that names the first weight that is not finite, or the first nan of a buffer or the optimiser's
    state (there inf may stand: a mask, an overflown square)."""
    weights = {name for name, _ in getattr(net, "target", net).named_parameters()}
    state = optimizer.state_dict()["state"]
    bad = [name for name, v in net.state_dict().items() if v.isnan().any() or (name in weights and v.isinf().any())]
    bad += [f"{name} of the optimiser's parameter {k}" for k, values in state.items() for name, v in values.items()
            if isinstance(v, Tensor) and v.isnan().any()]  # fmt: skip
    if bad:
        raise InputError(f"{out}: {bad[0]} is not finite after step {step}: {diverged(out)}")


def diverged(out: Path) -> str:
    """What a run that has diverged leaves, and the remedy."""
    kept = checkpoint_step(out)
    last = f"the checkpoint of step {kept} stays" if kept else "nothing was saved"
    return f"diverged, {last}; lower the learning rate"


def checkpoint_step(out: Path | str) -> int | None:
    """Finished steps of the folder's checkpoint; None if it has none."""
    path = Path(out) / "latest.json"
    return _latest(path)["step"] if path.is_file() else None


def check_architecture(out: Path, net: nn.Module) -> None:
    """Raises InputError if the checkpoint's weights have other names or shapes than `net`'s, which may be on the meta
    device: their headers are read, nothing is allocated."""
    path = out / _latest(out / "latest.json")["folder"] / "model.safetensors"
    with reading(path, *_DAMAGED), safe_open(path, framework="pt", device="cpu") as file:
        there = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys() if not name.endswith(_ROWS)}
        there |= {name: tuple(shape) for name, shape in _note(file, _DEFLATED, {}).items()}
        absent = tuple(_note(file, LEFT_OUT, ["-"])) + tuple(_note(file, _SHIPPED, {}))
    here = {name: tuple(value.shape) for name, value in net.state_dict().items() if not name.startswith(absent)}
    if there != here:
        name = next(k for k in here | there if here.get(k) != there.get(k))
        detail = f"{name} is {there.get(name, 'absent')} there, {here.get(name, 'absent')} here"
        raise InputError(f"{out}: a checkpoint of another architecture ({detail}); use its own settings")


def load_weights(out: Path, net: nn.Module) -> set[str]:
    """Load what a finished stage's checkpoint and `net` both have; -> its names. The rest keeps its own start.

    Raises InputError: no checkpoint, a damaged one, or a tensor of another shape.
    """
    if not (out / "latest.json").is_file():
        raise InputError(f"{out}: no checkpoint there (latest.json); train with --out {out} first")
    path, mine = out / _latest(out / "latest.json")["folder"] / "model.safetensors", net.state_dict()
    weights = {name: value for name, value in _read(path).items() if name in mine}
    for name, value in weights.items():
        if value.shape != mine[name].shape:
            there, here = tuple(value.shape), tuple(mine[name].shape)
            raise InputError(f"{out}: {name} is {there} there, {here} here; use its own settings")
    _load_finite(path, net, weights)
    return set(weights)


def _load_finite(path: Path, net: nn.Module, weights: dict[str, Tensor]) -> None:
    """Load tensors of the right shapes. Raises InputError if one is not finite, or whole numbers are not where they
    were. (In a buffer inf may stand.)"""
    mine, learned = net.state_dict(), {name for name, _ in net.named_parameters()}
    for name, value in weights.items():
        if value.is_floating_point() != mine[name].is_floating_point():
            raise InputError(f"{path}: {name} is {value.dtype} there, {mine[name].dtype} here; copy the whole run folder")
        if value.isnan().any() or (name in learned and value.isinf().any()):
            raise InputError(f"{path}: {name} is not finite; train again with another --out")
    net.load_state_dict(weights, strict=False)


def load_checkpoint(out: Path | str, net: nn.Module, optimizer: torch.optim.Optimizer | None = None,
                    run: Run | None = None, wanted: dict[str, Any] | None = None) -> dict[str, Any]:
    """Loads weights (and with an optimiser: its state and this rank's random state); -> the saved state with "step".

    wanted: settings(...) of the caller, so that a checkpoint that does not fit is explained by the fields that differ.
    Raises InputError: no checkpoint, a damaged one, or one of another architecture.
    """
    out = Path(out)
    if not (out / "latest.json").is_file():
        raise InputError(f"{out}: no checkpoint there (latest.json); train with --out {out} first")
    folder = out / _latest(out / "latest.json")["folder"]
    saved = read_json(folder / "train_state.json", TRAIN_STATE)
    try:
        check_architecture(out, net)
    except InputError as error:
        path = out / "config.json"
        fields = differences(read_json(path, RUN), wanted) if wanted is not None and path.is_file() else {}
        named = [f"{n} {a} there, {b} here" for n, (a, b) in fields.items() if n != "world" and n[:5] != "data."]
        if not named:
            raise
        problem = f"a checkpoint of another architecture ({', '.join(named)}); use its own settings"
        raise InputError(f"{out}: {problem}") from error
    if saved["step"] != (named := _latest(out / "latest.json")["step"]):
        raise InputError(f"{folder}/train_state.json: step {saved['step']}, not {named}; copy the whole run folder again")
    _load_finite(folder / "model.safetensors", net, _read(folder / "model.safetensors"))
    if optimizer is not None:
        tensors = _read(folder / "optimizer.safetensors")
        _unpack(optimizer, tensors, saved["groups"], folder)
        rank, world = (run.rank, run.world) if run else (0, 1)
        if saved["world"] != world:
            raise InputError(f"{out}: trained by {saved['world']} processes, not {world}; use the same number")
        with reading(folder / "optimizer.safetensors", "not a run's random state", "copy the whole run folder again"):
            _set_rng({k.split(".", 1)[1]: v for k, v in tensors.items() if k.startswith(f"rng{rank}.")})
    return saved["state"] | {"step": saved["step"]}


def _latest(path: Path) -> dict[str, Any]:
    value = read_json(path, {"step": int, "folder": str})
    name = f"step_{value['step']:06d}"
    if value["folder"] not in (name, f"{name}b") or not (path.parent / value["folder"]).is_dir():
        problem = f"names the folder {value['folder']} of step {value['step']}, which is not there"
        raise InputError(f"{path}: {problem}; copy the whole run folder")
    return value


def _clean(out: Path) -> None:
    """Removes checkpoint folders that latest.json does not name: older ones, and what a killed process left."""
    current = _latest(out / "latest.json")["folder"] if (out / "latest.json").is_file() else None
    for folder in out.glob("step_*"):
        if folder.is_dir() and folder.name != current:
            shutil.rmtree(folder)


def _sync(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    os.fsync(handle)
    os.close(handle)


def _save(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Tensors that share memory (tied weights) are written once per name."""
    tensors = {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in tensors.items()}
    with atomic(path) as temporary:
        try:
            save_file(tensors, temporary, metadata)
        except SafetensorError as error:  # a full disk, as text alone
            problem = f"the checkpoint cannot be written ({reason(error)})"
            raise InputError(f"{path.parent.parent}: {problem}; free space and run the same command again") from error


_DAMAGED = "not a readable safetensors file", "truncated? copy the whole run folder again"


def _read(path: Path) -> dict[str, Tensor]:
    with reading(path, *_DAMAGED), safe_open(path, framework="pt", device="cpu") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}
        for name, shape in _note(file, _DEFLATED, {}).items():
            data = zlib.decompressobj().decompress(tensors[name].numpy().tobytes(), math.prod(shape) + 1)
            tensors[name] = torch.frombuffer(bytearray(data), dtype=torch.int8).view(shape)
        for name in [name for name in tensors if name.endswith(_ROWS)]:
            whole, rows = name.removesuffix(_ROWS), tensors.pop(name).float()
            tensors[whole] = tensors[whole] * rows.view(-1, *[1] * (tensors[whole].dim() - 1))
        for name, (weights, there) in _note(file, _SHIPPED, {}).items():
            with safe_open(WEIGHTS / weights, framework="pt", device="cpu") as shipped:
                tensors[name] = shipped.get_tensor(there).float()
    return tensors


WEIGHTS = Path(__file__).parent / "weights"
_ROWS = ":rows"  # suffix of a packed checkpoint's scales
# Its metadata: prefixes it lacks; names -> file and name in common/weights; names of compressed matrices -> shapes.
LEFT_OUT, _SHIPPED, _DEFLATED = "left_out", "shipped", "deflated"
LEVELS = (127, 63, 31, 15, 11)  # of a packed matrix's entries, above and below zero


def _note(file: Any, name: str, none: Any) -> Any:
    """An entry of a safetensors file's metadata, as JSON; `none` where it has none."""
    return json.loads((file.metadata() or {}).get(name, "null")) or none


def pack_weights(path: Path, out: Path, left_out: tuple[str, ...] = (), limit: int = 2 << 20) -> int:
    """Write a checkpoint's weights as small as wanted; -> levels. `load_checkpoint` reads them as any others.

    A matrix becomes int8 with a float16 scale for each row, compressed; the rest float16. The levels are the most of
    LEVELS with which the file has at most `limit` bytes. What equals a tensor of common/weights (a frozen encoder) is
    named only. left_out: prefixes of what no prediction reads; it keeps the network's own start.
    Raises InputError if the file is larger with the fewest levels.
    """
    matrices, packed, shipped = {}, {}, {}
    known = [(file.name, name, value.float()) for file in sorted(WEIGHTS.glob("*.safetensors"))
             for name, value in _read(file).items()]
    for name, value in _read(path).items():
        if name.startswith(left_out):
            continue
        same = [[file, there] for file, there, other in known if other.shape == value.shape and torch.equal(other, value)]
        if same:
            shipped[name] = same[0]
        elif value.is_floating_point() and value.dim() > 1 and value[0].numel() >= 16:
            matrices[name] = value.float()
        else:
            packed[name] = value.half() if value.is_floating_point() else value
    shapes = {name: list(value.shape) for name, value in matrices.items()}
    notes = {LEFT_OUT: json.dumps(left_out), _SHIPPED: json.dumps(shipped), _DEFLATED: json.dumps(shapes)}
    for levels in LEVELS:
        for name, value in matrices.items():
            scale = (value.flatten(1).abs().amax(1).clamp_min(1e-6) / levels).half()
            packed[name + _ROWS] = scale
            entries = value / scale.float().view(-1, *[1] * (value.dim() - 1))
            entries = entries.round().clamp(-levels, levels).to(torch.int8).contiguous()
            packed[name] = torch.frombuffer(bytearray(zlib.compress(entries.numpy().tobytes(), 9)), dtype=torch.uint8)
        _save(out, packed, notes)
        if out.stat().st_size <= limit:
            return levels
    raise InputError(f"{path}: {out.stat().st_size} bytes packed with {levels} levels, more than {limit}")


def _pack(optimizer: torch.optim.Optimizer) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Optimiser state -> ({"<parameter>.<name>": tensor}, JSON of the rest)."""
    state = optimizer.state_dict()
    tensors, plain = {}, {}
    for parameter, values in state["state"].items():
        for name, value in values.items():
            (tensors if isinstance(value, Tensor) else plain)[f"{parameter}.{name}"] = value
    return tensors, {"param_groups": state["param_groups"], "plain": plain}


def _unpack(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor], groups: dict[str, Any], where: Path) -> None:
    now = optimizer.state_dict()["param_groups"]
    plain = [[{k: v for k, v in group.items() if k != "lr"} for group in json.loads(json.dumps(one))]
             for one in (now, groups["param_groups"])]  # fmt: skip
    if plain[0] != plain[1]:  # the rate follows from the step
        problem = "the optimiser has other parameter groups; use the settings of the run"
        raise InputError(f"{where / 'train_state.json'}: {problem}")
    state: dict[int, dict[str, Any]] = {}
    for key, value in (tensors | groups["plain"]).items():
        parameter, _, name = key.partition(".")
        if parameter.isdigit():
            state.setdefault(int(parameter), {})[name] = value
    with reading(where / "optimizer.safetensors", "not this optimiser's state", "copy the whole run folder again"):
        parameters = [p for group in getattr(optimizer, "target", optimizer).param_groups for p in group["params"]]
        for k, values in state.items():
            if any(isinstance(v, Tensor) and v.dim() and v.shape != parameters[k].shape for v in values.values()):
                raise ValueError(f"a tensor of parameter {k} has another shape")
            if any(isinstance(v, Tensor) and v.isnan().any() for v in values.values()):
                raise ValueError(f"a tensor of parameter {k} holds nan")
        optimizer.load_state_dict({"state": state, "param_groups": now})


def _rng() -> dict[str, Tensor]:
    """Random states of python, numpy, torch and this process's GPU as tensors of fixed size."""
    version, numbers, gauss = random.getstate()
    _, keys, position, has_gauss, cached = np.random.get_state()
    states = {
        "python": torch.tensor([version, *numbers], dtype=torch.int64),
        "python_gauss": torch.tensor([math.nan if gauss is None else gauss], dtype=torch.float64),
        "numpy": torch.tensor([*keys.tolist(), position, has_gauss], dtype=torch.int64),
        "numpy_gauss": torch.tensor([cached], dtype=torch.float64),
        "torch": torch.get_rng_state(),
    }
    return states | ({"cuda": torch.cuda.get_rng_state()} if torch.cuda.is_initialized() else {})


def _set_rng(states: dict[str, Tensor]) -> None:
    version, *numbers = states["python"].tolist()
    gauss = states["python_gauss"].item()
    random.setstate((version, tuple(numbers), None if math.isnan(gauss) else gauss))
    *keys, position, has_gauss = states["numpy"].tolist()
    np.random.set_state(("MT19937", np.array(keys, np.uint32), position, has_gauss, states["numpy_gauss"].item()))
    torch.set_rng_state(states["torch"])
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])


def _gather_rng(run: Run) -> dict[str, Tensor]:
    """{"rng<rank>.<name>": state} of every rank, on all of them."""
    gathered = {}
    for name, state in _rng().items():
        raw = state.contiguous().view(torch.uint8).to(run.device)
        copies = [torch.empty_like(raw) for _ in range(run.world)]
        if run.world > 1:
            dist.all_gather(copies, raw)
        else:
            copies = [raw]
        gathered |= {f"rng{rank}.{name}": copy.cpu().view(state.dtype) for rank, copy in enumerate(copies)}
    return gathered


# --- the log ---------------------------------------------------------------------------------------------------------


class Log:
    """One greppable line per `every` steps, also as <out>/log.jsonl; lines past the resumed step are dropped.

    Called once per step with tensors; they are kept where they are, and read (one synchronisation) when a line is due,
    so each line shows means over its steps and over the processes. Raises InputError if one of them is not finite.
    """

    def __init__(self, out: Path | str, run: Run, steps: int, start: int = 0, state: dict | None = None,
                 every: int = 0):
        self.path, self.run, self.steps, self.start = Path(out) / "log.jsonl", run, steps, start
        self.every = every or max(1, min(50, steps // 20))
        self.waited = 0.0  # [s] for data, since the last line
        self.trained = float((state or {}).get("train_s", 0.0))  # [s] over all runs of this folder
        self.peak = float((state or {}).get("peak_gb", 0.0))  # [GB] likewise
        self.terms: dict[str, list[Tensor | float]] = {}  # of each step since the last line
        self.clock = self.last = time.perf_counter()
        reset_peak(run.device)
        if run.is_main:
            lines = self.path.read_text(errors="replace").splitlines() if self.path.is_file() else []
            kept = [line + "\n" for line in lines if (_step_of(line) or math.inf) <= start]
            write_bytes(self.path, "".join(kept).encode())

    def state(self) -> dict[str, float]:
        """For save_checkpoint: {train_s, peak_gb} so far, for result.json's cost; without start-up."""
        now = time.perf_counter()
        self.trained, self.clock = self.trained + now - self.clock, now
        self.peak = max(self.peak, peak_gb(self.run.device))
        return {"train_s": self.trained, "peak_gb": self.peak}

    def __call__(self, step: int, terms: dict[str, Tensor | float], lr: float, look: bool = False,
                 samples: Callable[[int], str] = lambda step: "") -> None:  # fmt: skip
        """terms: "loss" first, then its parts (unweighted or weighted, as the method says). look: write the line now,
        as before a checkpoint. samples(step): what a step saw, for the error of a loss that is not finite."""
        for name, value in terms.items():
            self.terms.setdefault(name, []).append(value.detach().double() if isinstance(value, Tensor) else value)
        count = len(next(iter(self.terms.values())))
        done = step + 1
        if done % self.every and done != self.steps and done != self.start + 1 and not look:
            return
        means = mean_over_ranks({name: float(sum(values)) / count for name, values in self.terms.items()}, self.run)
        now = time.perf_counter()
        seconds, waited = (now - self.last) / count, min(1.0, self.waited / max(1e-9, now - self.last))
        if self.run.is_main:
            row = {"step": done, **means, "lr": lr, "ms": 1000 * seconds, "data": waited}
            row["gb"] = peak_gb(self.run.device)
            print(format_line(row, self.steps), flush=True)
            with naming(self.path), open(self.path, "a") as file:
                file.write(json.dumps(row) + "\n")
        if not math.isfinite(means["loss"]):
            self._refuse(done - count, samples)
        self.terms, self.waited, self.last = {}, 0.0, now

    def _refuse(self, first: int, samples: Callable[[int], str]) -> None:
        """Raises InputError that names the term and the step at which it was first not finite, on any process."""
        bad = {name: next((k for k, value in enumerate(values) if not math.isfinite(float(value))), math.inf)
               for name, values in self.terms.items()}  # fmt: skip
        steps = torch.tensor([float(k) for k in bad.values()], device=self.run.device)
        if self.run.world > 1:
            dist.all_reduce(steps, dist.ReduceOp.MIN)
        found = dict(zip(bad, steps.tolist(), strict=True))
        name = min(found, key=lambda name: (found[name], name == "loss"))  # a part names the cause, their sum does not
        step = first + int(found[name] if math.isfinite(found[name]) else 0)
        seen = f" ({seen})" if (seen := samples(step)) else ""
        out = self.path.parent
        raise InputError(f"{out}: the loss is not finite: term '{name}' at step {step + 1}{seen}: {diverged(out)}")


def format_line(row: dict[str, float], steps: int) -> str:
    """step 001200/24000  5.0% | loss 2.314 (ce 1.201 lov 0.902) | lr 1.9e-4 | 412 ms (data 9%) | 18.2 GB | eta 2h37m"""
    known = ("step", "loss", "lr", "ms", "data", "gb")
    parts = " ".join(f"{name} {value:.3f}" for name, value in row.items() if name not in known)
    mantissa, exponent = f"{row['lr']:.1e}".split("e")
    left = (steps - row["step"]) * row["ms"] / 1000
    return (
        f"step {row['step']:06d}/{steps} {100 * row['step'] / steps:4.1f}% | loss {row['loss']:.3f}"
        f"{f' ({parts})' if parts else ''} | lr {mantissa}e{int(exponent)}"
        f" | {row['ms']:.0f} ms (data {row['data']:.0%}) | {row['gb']:.1f} GB | eta {duration(left)}"
    )


def duration(seconds: float) -> str:
    """9420 -> '2h37m', 75 -> '1m15s', 8.2 -> '8s'."""
    minutes, s = divmod(round(seconds), 60)
    hours, m = divmod(minutes, 60)
    return f"{hours}h{m:02d}m" if hours else f"{m}m{s:02d}s" if m else f"{s}s"


def _step_of(line: str) -> int | None:
    """The step of a log.jsonl line; None for a half-written one."""
    try:
        return json.loads(line)["step"]
    except (json.JSONDecodeError, KeyError, TypeError):
        return None


# --- result.json -----------------------------------------------------------------------------------------------------


def write_result(folder: Path | str, *, method: str, preset: str, seed: int, dataset: dict[str, Any],
                 protocol: dict[str, Any], metrics: dict[str, float], per_class: dict[str, Any],
                 cost: dict[str, float]) -> dict[str, Any]:
    """Writes <folder>/result.json; -> what it wrote. metrics: flat fractions; an undefined one (NaN) is left out.

    dataset needs name, version, split, frames; cost params, steps, train_s, peak_gb.
    """
    for name, wanted, value in (("dataset", ("name", "version", "split", "frames"), dataset),
                                ("cost", ("params", "steps", "train_s", "peak_gb"), cost)):
        if not set(wanted) <= value.keys():
            raise ValueError(f"result.json: {name} needs {', '.join(sorted(set(wanted) - value.keys()))}")
    if not protocol:
        raise ValueError("result.json: a number is written only with its protocol")
    plain = {}
    for name, value in metrics.items():
        if isinstance(value, bool) or not isinstance(value, (int, float, np.integer, np.floating)):
            raise ValueError(f"result.json: metric {name} is {type(value).__name__}, not a number")
        if math.isfinite(value):
            plain[name] = float(value)
    value = {
        "method": method, "preset": preset, "seed": seed, "dataset": dataset, "protocol": protocol, "metrics": plain,
        "per_class": per_class, "cost": cost, "commit": commit(), "command": command(),
    }  # fmt: skip
    write_json(Path(folder) / "result.json", value)
    return value
