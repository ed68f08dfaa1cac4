"""make bench: kernels and CPU paths against plain torch and the peers a user would pick, as ratios measured in one run.

    python -m tests.bench [--out F.json] [--device cpu|cuda] [--only NAME ...] [--compile] [--seconds 4] [--threads 2]
                          [--data-root D]        # adds the start-up of the devkit against ours on that nuScenes tree

A row times its contestants in turn, round by round (so that another job on the machine slows all of them), and prints
the median of the rounds. `bytes` is the least an operation must move (inputs once, outputs once; with gradients: those
too), `floor` the time this takes at the bandwidth measured by a copy in the same run, or the exponentials at the
measured exp rate where that is longer; `share` is floor / ours. Contestants: ours; eager = the same written the usual
way in torch; compiled = torch.compile of that (--compile; its first call takes tens of seconds); peers by name.

Two threads on two busy cores measure the scheduler: every parallel region waits for the slower one. Use --threads 1 on
a machine that is not idle; the load average is printed and kept in the JSON.
"""

import argparse
import importlib
import os
import platform
import shlex
import statistics
import sys
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parents[2]))

from common import geometry, metrics  # noqa: E402
from common.files import write_json  # noqa: E402
from common.kernels.composite import composite  # noqa: E402
from common.kernels.ms_deform_attn import ms_deform_attn  # noqa: E402
from common.kernels.scatter_project import scatter_project  # noqa: E402
from common.kernels.selective_scan import selective_scan  # noqa: E402
from common.kernels.voxel_vote import voxel_vote  # noqa: E402


class Row(NamedTuple):
    shapes: str
    run: dict[str, Callable]    # contestant -> function of no arguments; the first is ours
    bytes: int = 0              # least to move
    exps: int = 0               # exponentials to evaluate
    work: tuple[float, str] = (0, "")  # amount of work and its unit, for a rate


def size(*tensors: Tensor) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


def with_gradient(f: Callable, inputs: list[Tensor]) -> Callable:
    """-> forward and backward of f(*inputs), all gradients."""
    inputs = [t.detach().requires_grad_() for t in inputs]
    seed = None

    def run():
        nonlocal seed
        out = f(*inputs)
        seed = torch.ones_like(out) if seed is None else seed
        return torch.autograd.grad(out, inputs, seed)

    return run


def optional(module: str, name: str):
    """A peer's function, or None where it does not import."""
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, OSError, AttributeError):
        return None


def without_gradient(f: Callable, inputs: list[Tensor]) -> Callable:
    @torch.no_grad()
    def run():
        return f(*inputs)

    return run


# --- the usual way, in torch: what `eager` means

def scan_unbind(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor) -> Tensor:
    """The loop every Mamba reference has, with unbind: indexing a[:, t] would make its backward quadratic."""
    a = torch.exp(torch.einsum("bdl,dn->lbdn", delta, A))
    b = torch.einsum("bdl,bnl,bdl->lbdn", delta, B, u)
    h, ys = torch.zeros_like(b[0]), []
    for a_t, b_t, C_t in zip(a.unbind(0), b.unbind(0), C.unbind(2)):
        h = a_t * h + b_t
        ys.append((h * C_t.unsqueeze(1)).sum(-1))
    return torch.stack(ys, 2)


def sample_levels(value: Tensor, shapes: list[tuple[int, int]], loc: Tensor, weights: Tensor) -> Tensor:
    """grid_sample, level by level."""
    N, _, H, D = value.shape
    Q, total, start = loc.shape[1], 0, 0
    for level, (h, w) in enumerate(shapes):
        plane = value[:, start:start + h * w].permute(0, 2, 3, 1).reshape(N * H, D, h, w)
        grid = (2 * loc[:, :, :, level] - 1).transpose(1, 2).flatten(0, 1)                # (N H, Q, P, 2)
        a = weights[:, :, :, level].transpose(1, 2).reshape(N * H, 1, Q, -1)
        total = total + (F.grid_sample(plane, grid, align_corners=False) * a).sum(-1)
        start += h * w
    return total.view(N, H * D, Q).transpose(1, 2)


def composite_cumprod(sigma: Tensor, delta: Tensor) -> Tensor:
    alpha = 1 - torch.exp(-sigma * delta)
    left = torch.cumprod(torch.cat([torch.ones_like(alpha[:, :1]), 1 - alpha + 1e-10], -1), -1)[:, :-1]
    return left * alpha


def vote_histogram(index: Tensor, label: Tensor, V: int, K: int) -> Tensor:
    """The dense (V, K) histogram of the whole grid."""
    votes = torch.bincount(index * K + label, minlength=V * K).view(V, K)
    most, winner = votes.max(-1)
    return torch.where(most > 0, winner, K)


def scatter_logs(value: Tensor, opacity: Tensor, uv: Tensor, depth: Tensor, H: int, W: int) -> Tensor:
    """Sort, a running sum of log(1 - o) over all pairs (loses precision), index_add of (pairs, C)."""
    x, y = uv.floor().unbind(-1)
    camera, voxel = ((depth > 0) & (x >= 0) & (x < W) & (y >= 0) & (y < H)).nonzero(as_tuple=True)
    pixel = (camera * H + y[camera, voxel].long()) * W + x[camera, voxel].long()
    order = depth[camera, voxel].argsort()
    order = order[pixel[order].argsort(stable=True)]
    voxel, pixel = voxel[order], pixel[order]
    log = torch.log1p(-opacity[voxel])
    before = log.cumsum(0) - log
    first = torch.searchsorted(pixel, pixel)
    weight = opacity[voxel] * torch.exp(before - before[first])
    return value.new_zeros(len(depth) * H * W, value.shape[1]).index_add(0, pixel, weight[:, None] * value[voxel])


def fps_numpy(points: np.ndarray, k: int) -> np.ndarray:
    nearest, chosen = np.full(len(points), np.inf), [0]
    for _ in range(k - 1):
        nearest = np.minimum(nearest, ((points - points[chosen[-1]]) ** 2).sum(1))
        chosen.append(int(nearest.argmax()))
    return np.array(chosen)


# --- rows

def scan_row(device: str, L: int, gradient: bool, D: int = 64, N: int = 16) -> Row:
    g = torch.Generator().manual_seed(0)
    inputs = [torch.randn(1, D, L, generator=g), torch.rand(1, D, L, generator=g) * 0.1,
              -torch.rand(D, N, generator=g) * 4, torch.randn(1, N, L, generator=g), torch.randn(1, N, L, generator=g)]
    inputs = [t.to(device) for t in inputs]
    time_it = with_gradient if gradient else without_gradient
    run = {"ours": time_it(selective_scan, inputs), "eager unbind loop": time_it(scan_unbind, inputs)}
    if device == "cuda":
        run["ours torch"] = time_it(lambda *x: selective_scan(*x, backend="torch"), inputs)
        if theirs := optional("mamba_ssm.ops.selective_scan_interface", "selective_scan_fn"):
            run["mamba_ssm"] = time_it(theirs, inputs)
    moved = size(*inputs) + size(inputs[0])                                                # and y
    return Row(f"B1 D{D} N{N} L{L} fp32", run, moved + (size(*inputs) + size(inputs[0])) * gradient,
               L * D * N * (2 if gradient else 1))


def deform_row(device: str, N: int, Q: int, P: int, shapes: list[tuple[int, int]], gradient: bool) -> Row:
    from transformers.models.deformable_detr.modeling_deformable_detr import MultiScaleDeformableAttention

    g, H, D = torch.Generator().manual_seed(0), 8, 32
    S, L = sum(h * w for h, w in shapes), len(shapes)
    value, loc = torch.randn(N, S, H, D, generator=g), torch.rand(N, Q, H, L, P, 2, generator=g) * 1.2 - 0.1
    weights = torch.randn(N, Q, H, L * P, generator=g).softmax(-1).view(N, Q, H, L, P)
    inputs = [t.to(device) for t in (value, loc, weights)]
    areas = torch.tensor(shapes, device=device)
    starts, peer = F.pad(areas.prod(1).cumsum(0)[:-1], (1, 0)), MultiScaleDeformableAttention()
    time_it = with_gradient if gradient else without_gradient
    run = {"ours": time_it(lambda v, r, a: ms_deform_attn(v, shapes, r, a), inputs),
           "eager grid_sample": time_it(lambda v, r, a: sample_levels(v, shapes, r, a), inputs),
           "transformers": time_it(lambda v, r, a: peer(v, areas, shapes, starts, r, a, 64), inputs)}
    theirs = optional("mmcv.ops.multi_scale_deform_attn", "MultiScaleDeformableAttnFunction")
    if device == "cuda" and theirs:
        run["mmcv"] = time_it(lambda v, r, a: theirs.apply(v, areas, starts, r, a, 64), inputs)
    out = N * Q * H * D * 4
    return Row(f"N{N} H8 D32 Q{Q} P{P} levels {'+'.join(f'{h}x{w}' for h, w in shapes)} fp32", run,
               size(*inputs) * (1 + gradient) + out * (1 + gradient))


def composite_row(device: str, R: int, S: int, gradient: bool) -> Row:
    g = torch.Generator().manual_seed(0)
    inputs = [(torch.rand(R, S, generator=g) * 2).to(device), torch.rand(R, S, generator=g).to(device)]
    time_it = with_gradient if gradient else without_gradient
    run = {"ours": time_it(lambda s, d: composite(s, d)[0], inputs),
           "eager cumprod": time_it(composite_cumprod, inputs)}
    return Row(f"R{R} S{S} fp32", run, (5 if gradient else 3) * R * S * 4)


def vote_row(device: str, M: int) -> Row:
    g, V, K = torch.Generator().manual_seed(0), 640_000, 17
    occupied = torch.randperm(V, generator=g)[:60_000]
    index = occupied[(torch.rand(M, generator=g) ** 2 * len(occupied)).long()].to(device)
    label = torch.randint(0, K, (M,), generator=g).to(device)
    return Row(f"{M} points, {V} voxels, {K} classes",
               {"ours": lambda: voxel_vote(index, label, V, K),
                "eager histogram": lambda: vote_histogram(index, label, V, K)},
               size(index, label) + 9 * V)


def scatter_row(device: str, gradient: bool, H: int = 56, W: int = 100, C: int = 17) -> Row:
    """Occ3D's grid and six cameras 60 degrees apart."""
    g, grid = torch.Generator().manual_seed(0), geometry.OCC3D
    centers = grid.centers().reshape(-1, 3).float()
    K, views = torch.tensor([[0.8 * W, 0, W / 2], [0, 0.8 * W, H / 2], [0, 0, 1.0]]), []
    for yaw in torch.arange(6) * torch.pi / 3:
        c, s = yaw.cos(), yaw.sin()
        T = torch.tensor([[s, -c, 0, 0], [0, 0, -1, 1.5], [c, s, 0, 0], [0, 0, 0, 1]])
        views.append(geometry.project(centers, K, T))
    uv, depth = (torch.stack(x).to(device) for x in zip(*views))
    inputs = [torch.rand(len(centers), C, generator=g), torch.rand(len(centers), generator=g) * 0.1]
    inputs = [t.to(device) for t in inputs]
    time_it = with_gradient if gradient else without_gradient
    run = {"ours": time_it(lambda v, o: scatter_project(v, o, uv, depth, H, W).image, inputs),
           "eager log cumsum": time_it(lambda v, o: scatter_logs(v, o, uv, depth, H, W), inputs)}
    return Row(f"640k voxels, C{C}, 6 cameras {H}x{W} fp32", run,
               size(uv, depth) + (size(*inputs) + 6 * H * W * (C + 1) * 4) * (1 + gradient))


def city(seed: int = 0) -> Tensor:
    """(200, 200, 16) uint8: a ground, boxes on it, 17 free."""
    g, labels = np.random.default_rng(seed), np.full((200, 200, 16), 17, np.uint8)
    labels[..., :2] = 11
    for _ in range(250):
        x, y = g.integers(0, 190, 2)
        dx, dy, dz = g.integers(1, 10, 3)
        labels[x:x + dx, y:y + dy, 2:2 + dz] = g.integers(0, 17)
    return torch.from_numpy(labels)


def confusion_row() -> Row:
    pred, gt = city(0), city(1)
    mask = torch.from_numpy(np.random.default_rng(0).random(gt.shape) < 0.4)
    a, b, keep = pred.numpy(), gt.numpy(), mask.numpy()
    return Row("640k voxels uint8, masked", {
        "ours": lambda: metrics.occupancy_confusion(pred, gt, mask),
        "one numpy pass (a == b).sum()": lambda: (a == b).sum(),
        "numpy bincount": lambda: np.bincount(18 * b[keep].astype(np.int64) + a[keep], minlength=324)},
               size(pred, gt, mask))


def ray_row() -> Row:
    pred, gt = city(0), city(1)
    origins = torch.tensor([[x, 0.0, 1.0] for x in range(-4, 4)])
    rays = 2 * len(origins) * 14040
    return Row(f"one frame, 8 origins x 14040 rays, twice = {rays} rays",
               {"ours": lambda: metrics.ray_iou([pred], [gt], [origins])}, work=(rays, "rays"))


def traversal_row(R: int = 35_000) -> Row:
    g = torch.Generator().manual_seed(0)
    origin = torch.tensor([0.9, 0.0, 1.8], dtype=torch.float64)
    end = origin + torch.randn(R, 3, generator=g, dtype=torch.float64) * torch.tensor([20.0, 20.0, 1.0])
    return Row(f"{R} rays, Occ3D grid", {"ours": lambda: geometry.traversed(origin, end, geometry.OCC3D)},
               work=(R, "rays"))


def knn_row(Q: int = 60_000, M: int = 300_000, k: int = 5) -> Row:
    from scipy.spatial import cKDTree

    g = torch.Generator().manual_seed(0)
    query, points = torch.rand(Q, 3, generator=g) * 80, torch.rand(M, 3, generator=g) * 80
    q, p = query.numpy(), points.numpy()
    return Row(f"{Q} queries, {M} points, k{k}", {"ours": lambda: geometry.knn(query, points, k),
                                                  "scipy cKDTree": lambda: cKDTree(p).query(q, k, workers=-1)})


def fps_row(M: int = 50_000, k: int = 512) -> Row:
    points = torch.rand(M, 3, generator=torch.Generator().manual_seed(0))
    p = points.numpy()
    return Row(f"{M} points, k{k}", {"ours": lambda: geometry.farthest_point_sample(points, k),
                                     "numpy loop": lambda: fps_numpy(p, k)})


def startup_row(root: str) -> Row:
    from nuscenes.nuscenes import NuScenes

    from common.nuscenes import NuScenesOccupancy

    version = NuScenesOccupancy(root).version                   # fills the cache: a later start reads memory maps
    return Row(f"{version} of {Path(root).name}", {
        "ours (cached tables)": lambda: len(NuScenesOccupancy(root, version)),
        "nuscenes-devkit": lambda: NuScenes(version, dataroot=root, verbose=False)})


def rows(device: str, data_root: str | None) -> dict[str, Callable[[], Row]]:
    lengths = (4096, 16384) if device == "cpu" else (16384, 262_144)
    wide = {} if device == "cpu" else {"D": 128}
    pyramid, out = [(50, 50), (25, 25), (13, 13)], {}
    for b, what in ((False, "forward"), (True, "forward+backward")):
        out |= {f"selective_scan {what} {L}": lambda L=L, b=b: scan_row(device, L, b, **wide) for L in lengths}
        out |= {f"ms_deform_attn {what} cameras": lambda b=b: deform_row(device, 6, 2000, 8, [(28, 50)], b),
                f"ms_deform_attn {what} pyramid": lambda b=b: deform_row(device, 1, 2500, 4, pyramid, b),
                f"composite {what}": lambda b=b: composite_row(device, 21_600, 128, b),
                f"scatter_project {what}": lambda b=b: scatter_row(device, b)}
    out |= {"voxel_vote 14 frames": lambda: vote_row(device, 1_900_000),
            "voxel_vote 1 frame": lambda: vote_row(device, 35_000)}
    if device == "cpu":
        out |= {"occupancy_confusion": confusion_row, "ray_iou": ray_row, "traversed": traversal_row, "knn": knn_row,
                "farthest_point_sample": fps_row}
        if data_root:
            out["dataset start-up"] = lambda: startup_row(data_root)
    return out


# --- measuring

def synchronise(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def race(run: dict[str, Callable], device: str, seconds: float) -> tuple[dict[str, float], int]:
    """Round by round until each has had `seconds` or 50 rounds (3 at least) -> median [ms] by contestant, rounds."""
    for f in run.values():                                      # warm-up: caches, allocator, compilation
        f()
    synchronise(device)
    times, started = {name: [] for name in run}, time.perf_counter()
    while len(rounds := times[next(iter(run))]) < 3 or (
            len(rounds) < 50 and time.perf_counter() - started < seconds * len(run)):
        for name, f in run.items():
            begin = time.perf_counter()
            f()
            synchronise(device)
            times[name].append((time.perf_counter() - begin) * 1e3)
    return {name: statistics.median(t) for name, t in times.items()}, len(rounds)


def ceilings(device: str, seconds: float) -> dict[str, float]:
    """Measured on this machine, in this run: copy [GB/s, read + written], fp32 GEMM [GFLOP/s], exp [G/s]."""
    n, m = (2 ** 26, 1024) if device == "cpu" else (2 ** 29, 8192)
    source, target = torch.rand(n, device=device), torch.empty(n, device=device)
    a, b = torch.rand(m, m, device=device), torch.rand(m, m, device=device)
    small = torch.rand(2 ** 18 if device == "cpu" else 2 ** 24, device=device)      # in cache: arithmetic, not memory
    out = torch.empty_like(small)
    ms, _ = race({"copy": lambda: target.copy_(source), "gemm": lambda: a @ b,
                  "exp": lambda: torch.exp(small, out=out)}, device, seconds)
    return {"copy_gb_s": 8 * n / ms["copy"] / 1e6, "gemm_gflop_s": 2 * m ** 3 / ms["gemm"] / 1e6,
            "exp_g_s": small.numel() / ms["exp"] / 1e6}


def measure(row: Row, device: str, seconds: float, ceiling: dict[str, float]) -> dict:
    ms, rounds = race(row.run, device, seconds)
    (ours, best), *others = ms.items()
    result = {"shapes": row.shapes, "ms": ms, "rounds": rounds, "ratio": {name: t / best for name, t in others}}
    if row.bytes:
        floor = max(row.bytes / ceiling["copy_gb_s"], row.exps / ceiling["exp_g_s"]) / 1e6     # [ms]
        result |= {"bytes": row.bytes, "exps": row.exps, "gb_s": row.bytes / best / 1e6,
                   "bandwidth_share": row.bytes / best / 1e6 / ceiling["copy_gb_s"], "floor_ms": floor,
                   "floor_share": floor / best}
    if row.work[0]:
        result |= {f"{row.work[1]}_per_s": row.work[0] / best * 1e3}
    return result


def describe(name: str, r: dict) -> str:
    times = [f"{who} {t:.4g} ms" + (f" = {r['ratio'][who]:.2f} x ours" if who in r["ratio"] else "")
             for who, t in r["ms"].items()]
    lines = [f"{name}   [{r['shapes']}]", "    " + "   ".join(times)]
    extra = [f"{r['bytes'] / 1e6:.3g} MB, {r['gb_s']:.3g} GB/s = {r['bandwidth_share']:.1%} of copy bandwidth, "
             f"{r['floor_share']:.1%} of its floor"] if "bytes" in r else []
    extra += [f"{v:.3g} {k.removesuffix('_per_s')}/s" for k, v in r.items() if k.endswith("_per_s")]
    return "\n".join(lines + (["    " + "; ".join(extra)] if extra else []))


def machine(device: str) -> str:
    if device == "cuda":
        return torch.cuda.get_device_name()
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{models[0] if models else platform.processor() or platform.machine()}, {len(models) or '?'} logical cores"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.bench", description=__doc__.splitlines()[0])
    parser.add_argument("--out", help="JSON file to write")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--only", nargs="*", default=[], metavar="NAME", help="rows whose name contains one of these")
    parser.add_argument("--compile", action="store_true", help="also torch.compile of two kernels' eager code")
    parser.add_argument("--seconds", type=float, default=4.0, help="time for each contestant of a row")
    parser.add_argument("--threads", type=int, default=min(2, torch.get_num_threads()))
    parser.add_argument("--data-root", help="a nuScenes tree, for the start-up row")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    todo = {name: build for name, build in rows(args.device, args.data_root).items()
            if not args.only or any(word in name for word in args.only)}
    if not todo:
        names = ", ".join(rows(args.device, args.data_root))
        parser.error(f"--only {' '.join(args.only)}: no such row; there are {names}")
    ceiling = ceilings(args.device, args.seconds / 2)
    report = {"command": shlex.join(["python", "-m", "tests.bench", *sys.argv[1:]]),
              "machine": machine(args.device), "device": args.device, "threads": args.threads,
              "load": os.getloadavg()[0], "date": str(date.today()), "torch": torch.__version__,
              "python": platform.python_version(), "ceilings": ceiling, "rows": {}}
    tqdm.write(f"{report['machine']}, {args.threads} thread(s), load {report['load']:.1f}, torch {torch.__version__}: "
               f"copy {ceiling['copy_gb_s']:.3g} GB/s, fp32 GEMM {ceiling['gemm_gflop_s']:.3g} GFLOP/s, exp "
               f"{ceiling['exp_g_s']:.3g} G/s")
    for name, build in tqdm(todo.items(), desc="bench", unit="row"):
        row = build()
        if args.compile:
            row.run.update({f"compiled {who.removeprefix('eager ')}": torch.compile(f) for who, f in row.run.items()
                            if who in ("eager cumprod", "eager grid_sample")})
        report["rows"][name] = measure(row, args.device, args.seconds, ceiling)
        tqdm.write(describe(name, report["rows"][name]))
        report["rows"][name]["load"] = os.getloadavg()[0]
    if args.out:
        write_json(args.out, report)
        print(f"wrote {args.out}")


if __name__ == "__main__":
    main()
