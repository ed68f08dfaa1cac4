"""Two processes under torchrun learn what one process learns with the doubled batch, in every stage of every method.

Run as a script this file is a process of the run: it trains all methods, one after the other. Everything is float64:
in float32 one sum has another order, that over the batch in the gradient of each weight (one process adds the samples'
shares inside one product, two add theirs apart), and training multiplies its rounding, by up to a thousand in 20 steps.
"""

import json
import os
import subprocess
import sys
import threading
from importlib import import_module
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
METHODS = ("easyocc", "occle", "loc", "occvla", "threedvla")
STEPS = 6  # a stage; 20 were measured: 1e-15 to 5e-8
STAGES = {"easyocc": 1, "occle": 2, "loc": 1, "occvla": 4, "threedvla": 3}
NET = "--backbone conv --image-size 56 100 --warmup 1 --workers 1 "
WORDS = {  # how each is made small; what one process takes; what each of two takes
    "easyocc": (NET + "--grid-stride 4 4 2 --lift-stride 1 1 1 --cnn-channels 8 16 --channels 8 --l-scal 1", "--batch 2", "--batch 1"),
    "occle": (NET + "--channels 8 --unet-channels 8 16 --geo-channels 8 --grid-channels 8 --head-channels 8 --n-sweeps 1 "
              "--mamba-stride 2 2 2 --cell-split 2 2 2 --grid-stride 5 5 2 --branch-share 0.5 --label-ratio 0.6",
              "--batch 2 --batch-unlabelled 2", "--batch 1 --batch-unlabelled 1"),
    "loc": (NET + "--network-preset small --dcl-samples 8 --image-samples 64 --clip-image 64 128", "--batch 2", "--batch 1"),
    "occvla": ("--vlm toy --vq toy --image-size 32 32 --queries 5 --occ-dim 16 --occ-heads 2 --plan-dim 16 --plan-heads 2 --questions 3 "
               "--warmup 1 --workers 1 --plan-dropout 0", "--stage-batch 2 2 2 4", "--stage-batch 1 1 1 2"),
    "threedvla": ("--sizes small --head-batch 4 --width 48 --heads 2 --fusion-layers 1 --probes 12 --mask-width 8 --sample-heads 2 --batch 4",
                  "", ""),  # its batch is that of all processes
}  # fmt: skip


def wide(value):
    """float64 for every float tensor of a batch."""
    if isinstance(value, torch.Tensor):
        return value.double() if value.is_floating_point() else value
    if isinstance(value, dict):
        return {name: wide(v) for name, v in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(*map(wide, value)) if hasattr(value, "_fields") else type(value)(map(wide, value))
    return value


def drive(jobs: dict[str, list[str]]) -> None:
    """Train the methods in float64 from the moment that a stage's network is there."""
    sys.path[:0] = [str(ROOT)]
    import common.engine as engine
    import common.train as train
    from common import verbs

    attach, batches, narrow = engine.Session.attach, engine.Session.batches, torch.Tensor.float

    def widen(self, saved, *rest, **options):
        torch.Tensor.float = lambda x: (narrow if threading.current_thread().name.startswith("prefetch") else torch.Tensor.double)(x)
        return attach(self, saved.double(), *rest, **options)

    def finish(self, *args, **options):
        for step, batch in batches(self, *args, **options):
            yield step, wide(batch)
        torch.Tensor.float = narrow

    engine.Session.attach, engine.Session.batches = widen, finish
    verbs.teardown = lambda run: None  # one group of processes for all methods
    for method, words in jobs.items():
        module = import_module(method)
        if method == "threedvla":
            import small_policy  # noqa: F401  (the size `small`)

            for owner, name in ((module.Frames, "batch"), (module, "draw_step"), (module, "observe")):
                setattr(owner, name, lambda *args, real=getattr(owner, name): wide(real(*args)))
        if method == "loc":
            from common.networks import lss

            module.voxel_to_text = lambda *args, real=module.voxel_to_text: real(*wide(args))  # CLIP's vectors
            lss.PRESETS["small"] = lss.Sizes(8, (1.0, 45.0, 1.0), (8, 16), (4, 4, 2), (2, 2, 2), "group")
        sys.argv = [f"{method}.py", *words]
        module.main()
    train.teardown(train.joined())


@pytest.fixture(scope="module")
def losses(tiny_world, tmp_path_factory) -> dict[str, dict[str, list[dict[str, float]]]]:
    """{method: {"one" or "two": a row of loss terms for each stage and step}}; both run at the same time."""
    import commands
    from test_loc import untrained_clip

    from data.driving import make_world
    from data.tabletop import make_world as make_tabletop

    base = tmp_path_factory.mktemp("ranks")
    make_world(base / "drives", seed=2, size="mini", scenes=2, keyframes=9, sweeps=0, camera_sweeps=0, image=(56, 100), workers=1)
    make_tabletop(base / "table", seed=0, demos=1, tasks=("lift_cube", "open_drawer"), size=64, workers=1)
    roots = {"occvla": base / "drives", "threedvla": base / "table"}
    for method, folder, *words in (("easyocc", "l", "--map-stride", 8, 8), ("occle", "maps")):
        run, _ = commands.of(import_module(method))
        run("labels", "--data-root", tiny_world, "--cache", base / "cache", "--out", base / folder, "--workers", 1, *words)
    more = {"easyocc": ["--labels", base / "l"], "loc": ["--labels", base / "l", "--clip", untrained_clip(base / "clip")], "occle": ["--labels", base / "maps"]}
    processes = {}
    for k, name in enumerate(("one", "two")):
        jobs = {}
        for method in METHODS:
            words, *batch = WORDS[method]
            steps = 2 * STEPS if method == "occle" else STEPS  # of both stages
            jobs[method] = ["train", "--data-root", roots.get(method, tiny_world), *more.get(method, []), "--steps", str(steps),
                            "--out", base / name / method, *words.split(), *batch[k].split()]  # fmt: skip
            if method != "threedvla":
                jobs[method] += ["--cache", base / f"cache-{name}"]
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"] if k else []
        processes[name] = subprocess.Popen(
            [sys.executable, *launcher, __file__, json.dumps(jobs, default=str)], cwd=ROOT, text=True, stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE, env=os.environ | {"OMP_NUM_THREADS": "1"})  # fmt: skip
    for process in processes.values():
        error = process.communicate()[1]
        assert process.returncode == 0, error[-3000:]

    def rows(folder: Path) -> list[dict[str, float]]:
        return [json.loads(line) for path in sorted(folder.rglob("log.jsonl")) for line in path.read_text().splitlines()]

    return {method: {name: rows(base / name / method) for name in processes} for method in METHODS}


@pytest.mark.parametrize("method", METHODS)
def test_two_processes_equal_one_with_the_doubled_batch(method, losses):
    """Three frames make no whole batches of two, so that batches cross epochs."""
    one, two = losses[method].values()
    assert len(one) == len(two) == STEPS * STAGES[method]
    for k, (a, b) in enumerate(zip(one, two, strict=True)):
        for name in a.keys() - {"lr", "ms", "data", "gb"}:
            assert b[name] == pytest.approx(a[name], rel=1e-6, abs=1e-9), (k, name)


if __name__ == "__main__":
    drive(json.loads(sys.argv[1]))
