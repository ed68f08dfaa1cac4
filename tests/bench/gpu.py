"""make bench-gpu: every kernel against its floor and its peers, then a training step of each paper preset. Minutes.

    python -m tests.bench.gpu [--out F.json] [--seconds 1] [--preset paper]      # on a CUDA device
    TRITON_INTERPRET=1 python -m tests.bench.gpu --dry --preset tiny              # a rehearsal on a CPU: no figure counts

Kernels: the rows of `python -m tests.bench` on the device, with mamba_ssm's and mmcv's own operators where they import.
Steps: the preset's network with random weights, random images of six cameras around and a random sweep; forward,
backward and AdamW under bf16 autocast, the median of five; peak memory allocated. The loss is 3DVLA's own in its second
stage; for the others it is the mean square of what the network returns: the same graph, without labels.
"""

import argparse
import json
import math
import os
import statistics
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path

import torch
from torch import Tensor, nn

from common.files import write_json
from common.kernels.dispatch import INTERPRETED
from tests.bench import __main__ as bench
from tests.kernel_interpreter import cases, compare


def rig(B: int, N: int, H: int, W: int, device: str) -> dict[str, Tensor]:
    """B keyframes of N cameras around: images, K (90 degrees wide), T_ego_cam at 1.5 m."""
    yaw = torch.arange(N) * (2 * math.pi / N)
    c, s, zero, one = yaw.cos(), yaw.sin(), torch.zeros(N), torch.ones(N)
    T = torch.stack([torch.stack(row, -1) for row in ((s, zero, c, 0 * c), (-c, zero, s, 0 * c),
                                                      (zero, -one, zero, 1.5 * one), (zero, zero, zero, one))], 1)
    K = torch.tensor([[W / 2, 0, W / 2], [0, W / 2, H / 2], [0, 0, 1]])
    return {"images": torch.rand(B, N, 3, H, W, device=device), "K": K.expand(B, N, 3, 3).to(device).contiguous(),
            "T_ego_cam": T.expand(B, N, 4, 4).to(device).contiguous()}


def cloud(M: int, device: str) -> Tensor:
    """A sweep (M, 5): x, y, z [m], intensity, ring."""
    points = torch.randn(M, 5, device=device) * torch.tensor([20.0, 20.0, 1.0, 50.0, 0.0], device=device)
    return points.abs_() * torch.tensor([1.0, 1, 1, 1, 0], device=device) * torch.sign(torch.randn_like(points))


def squares(value) -> Tensor:
    """Mean square of every floating tensor in a nest of dicts, tuples and lists."""
    if isinstance(value, Tensor):
        return value.float().square().mean() if value.is_floating_point() and value.requires_grad else 0.0
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, (tuple, list)) else ()
    return sum(map(squares, parts))


def occupancy_step(method: str, preset: str, device: str) -> tuple[nn.Module, Callable[[], Tensor]]:
    """EasyOcc, OccLE or LOC: the network and a call that gives its loss."""
    import easyocc
    import loc
    import occle

    module = {"easyocc": easyocc, "occle": occle, "loc": loc}[method]
    cfg = module.PRESETS[preset]
    B = cfg.batch + getattr(cfg, "batch_unlabelled", 0)
    net = {"easyocc": easyocc.build, "occle": occle.OccLE, "loc": loc.Loc}[method](cfg, pretrained=False).to(device)
    batch = rig(B, 6, *cfg.image_size, device)
    if method == "occle":
        batch |= {"points": [cloud(35_000, device) for _ in range(B)],
                  "history": [cloud(35_000 * cfg.n_sweeps, device) for _ in range(B)]}
    if method == "loc":
        batch["cells"] = loc.cells_of(cfg)["cells"].to(device)
    return net, lambda: squares(net(batch))


def occvla_step(preset: str, device: str) -> tuple[nn.Module, Callable[[], Tensor]]:
    """Stage 1: a keyframe through the host and the occupancy stream."""
    import occvla as O

    cfg = O.PRESETS[preset]
    with torch.device(device):
        net = O.build(cfg, pretrained=False)
    net.stage = 1
    O.trainable(net, 1)
    if cfg.checkpointing:
        net.vlm.net.gradient_checkpointing_enable({"use_reentrant": False})
    packs = net.vlm.stack([net.vlm.exchange(O.PLAN_PROMPT, "keep left")], device)
    images = rig(1, len(O.CAMERAS) * cfg.n_frames, *cfg.image_size, device)["images"]

    def loss() -> Tensor:
        states = net.vlm.run(net.vlm.encode(images), packs, torch.zeros(1, dtype=torch.int64, device=device), hidden=True)
        return squares([states.last, net.occupy(states)])

    return net.train(), loss


def threedvla_step(preset: str, device: str, batch: int) -> tuple[nn.Module, Callable[[], Tensor]]:
    """Stage 2: `batch` observations."""
    import threedvla as T

    cfg = T.PRESETS[preset]
    sizes, B, V = T.SIZES[cfg.sizes], batch, cfg.views
    with torch.device(device):
        agent = T.Agent(cfg)
    agent.set_stage(2)
    drawn = {name: x.to(device) for name, x in T.draw_step(cfg, B, 0, 0).items()}
    view = rig(B, V, sizes.image_size, sizes.image_size, device)
    n = T.OCCLUDED * T.QUERIES
    observed = T.Batch(view["images"], view["images"][:, :, 0] + 0.5, view["K"], view["T_ego_cam"],
                       torch.zeros(B, 8, device=device), ["lift the red cube"] * B,
                       torch.zeros(B, sizes.chunk, cfg.actions, device=device),
                       torch.ones(B, sizes.chunk, dtype=torch.bool, device=device),
                       comp=(torch.zeros(B, n, 3, device=device), torch.ones(B, n, dtype=torch.bool, device=device)),
                       **drawn)
    return agent.train(), lambda: sum(agent(observed).values())


STEPS = {  # name -> (preset, device) -> network, loss
    "easyocc": lambda *a: occupancy_step("easyocc", *a), "occle": lambda *a: occupancy_step("occle", *a),
    "loc": lambda *a: occupancy_step("loc", *a), "occvla, stage 1": occvla_step,
    "threedvla, stage 2, batch 8": lambda *a: threedvla_step(*a, 8),
}


def measure_step(make: Callable, preset: str, device: str, rounds: int = 5) -> dict[str, float]:
    """-> ms of a training step, its share in the forward pass, peak GB allocated."""
    cuda = device == "cuda"
    if cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    net, loss = make(preset, device)
    learned = [p for p in net.parameters() if p.requires_grad]
    optimizer, times = torch.optim.AdamW(learned, 1e-6), []
    for _ in range(rounds + 2):
        bench.synchronise(device)
        begin = time.perf_counter()
        with torch.autocast(device, torch.bfloat16, enabled=cuda):
            value = loss()
        bench.synchronise(device)
        middle = time.perf_counter()
        value.backward()
        optimizer.step()
        optimizer.zero_grad()
        bench.synchronise(device)
        times.append((time.perf_counter() - begin, middle - begin))
    if not math.isfinite(value := float(value.detach())):
        raise ValueError(f"loss {value}")
    step, forward = (statistics.median(t) for t in zip(*times[2:], strict=True))
    return {"ms": 1e3 * step, "forward": forward / step, "learned": sum(p.numel() for p in learned),
            "peak_gb": torch.cuda.max_memory_allocated() / 1e9 if cuda else math.nan}


def main(argv: list[str] | None = None) -> dict:
    """-> the report, also printed and written to --out."""
    parser = argparse.ArgumentParser("python -m tests.bench.gpu", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--seconds", type=float, default=1.0, help="for each contestant of a row")
    parser.add_argument("--preset", default="paper")
    parser.add_argument("--dry", action="store_true", help="on a CPU: kernels in Triton's interpreter, small; nothing counts")
    args = parser.parse_args(argv)
    if not args.dry and not torch.cuda.is_available():
        parser.exit(2, "error: no CUDA device here; --dry rehearses on a CPU\n")
    device, began = "cpu" if args.dry else "cuda", time.time()
    report = {"machine": bench.machine(device), "device": device, "date": str(date.today()), "torch": torch.__version__,
              "rehearsal": args.dry, "kernels": {}, "steps": {}}
    ceiling = {} if args.dry else bench.ceilings("cuda", args.seconds)
    print(f"{report['machine']}" + (": a rehearsal, no figure counts" if args.dry else f", {json.dumps(ceiling)}"), flush=True)
    if args.dry and INTERPRETED:
        report["kernels"] = {case.name: compare(case) for case in cases("cpu", big=False)}
    elif not args.dry:
        report["ceilings"] = ceiling
        for name, build in bench.rows("cuda", None).items():
            report["kernels"][name] = bench.measure(build(), "cuda", args.seconds, ceiling)
            print(bench.describe(name, report["kernels"][name]), flush=True)
    for name, make in STEPS.items():
        try:
            r = report["steps"][name] = measure_step(make, args.preset, device, 1 if args.dry else 5)
            shown = "ran" if args.dry else f"{r['ms']:.0f} ms a step, {r['forward']:.0%} forward, {r['peak_gb']:.1f} GB"
            print(f"{name}, {args.preset}: {shown}", flush=True)
        except (RuntimeError, ValueError) as error:  # out of memory too
            report["steps"][name] = {"error": str(error).splitlines()[0]}
            print(f"{name}, {args.preset}: {report['steps'][name]['error']}", flush=True)
    report["seconds"] = time.time() - began
    if args.out:
        write_json(args.out, report)
    return report


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    main()
