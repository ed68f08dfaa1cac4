"""The generated parts of docs/: figures, line anchors, tables of claims and of cost.

    python -m experiments.docs                  # everything (`make docs`; describes 15 presets: minutes)
    python -m experiments.docs --quick          # what `make table` does too: anchors, claims, figures
    python -m experiments.docs --pictures       # docs/show-<method>: what the ready checkpoints show (`make show`)

A page is written by hand but for the part between `<!-- claims -->` and `<!-- end -->`, and for the numbers
of lines: [easyocc.py:0](../easyocc.py#L0) `code` gets the line that holds this code. It must be in the file
once; else InputError names page and code.
"""

import contextlib
import importlib
import io
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from common.files import InputError, atomic, exit_on_input_error, read_text, write_bytes
from common.train import duration
from experiments import ready
from experiments.runner import NOT_RUN, show
from experiments.table import METHODS, comparison_rows, grid, load, Protocols

ROOT = Path(__file__).parents[1]
ANCHOR = re.compile(r"\[([\w/]+\.py):(\d+)\]\(\.\./\1#L(\d+)\) `([^`]+)`")
WIDE, SHEET = 900, {"easyocc": 0, "occle": 1, "loc": 0, "occvla": 0}  # [px]; which sheet of a method is shown
FRAMES = 28_130  # nuScenes' training keyframes: a step count where a preset counts epochs
GPUS = {"hours of one 24 GB GPU": (1, 40e12), "hours of 8 GPUs": (8, 120e12)}  # how many, FLOP/s reached of each


def anchor(page: Path, text: str) -> str:
    """The page's text, each anchor with the line that holds its code."""

    def line_of(match: re.Match) -> str:
        name, _, _, code = match.groups()
        lines = [k + 1 for k, line in enumerate(read_text(ROOT / name).splitlines()) if code in line]
        if len(lines) != 1:
            raise InputError(f"{page}: `{code}` is on {len(lines)} lines of {name}; quote one line of it")
        return f"[{name}:{lines[0]}](../{name}#L{lines[0]}) `{code}`"

    return ANCHOR.sub(line_of, text)


def fill(text: str, name: str, lines: list[str]) -> str:
    """The text, with these lines between `<!-- name -->` and `<!-- end -->`."""
    found = re.compile(rf"(<!-- {name} -->\n).*?(<!-- end -->)", re.S)
    return found.sub(lambda m: m[1] + "\n".join(lines) + "\n" + m[2], text)


def claims(method: str, records: dict[str, dict], results: Path) -> list[str]:
    """What was asked of the paper, with verdicts; and the latest demo run."""
    own, protocols, lines = {n: r for n, r in records.items() if r["method"] == method}, Protocols(), []
    for name, r in own.items():
        if r["kind"] != "run":
            continue
        m, cost = r["metrics"], r["cost"]
        scores = [f"{n} {show(m[n], n)}" for n in ("miou_camera", "constant_miou_camera", "iou_camera",
                  "constant_iou_camera", "auroc", "qa_accuracy", "success", "random_success") if n in m]
        lines += [f"`{name}`, {r['dataset']['name']}, seed {r['seed']}, at {r['commit'][:8]}: "
                  f"{', '.join(scores)}; {cost['steps']} steps in {duration(cost['train_s'])}.", ""]
    rows = []
    for name, r in own.items():
        if r["kind"] == "claim":
            for row in comparison_rows(name, r, Path("..") / results, protocols):
                rows.append([f"[{r['claim']}](../{(results / f'{name}.json').as_posix()})", *row[1:4], *row[5:7],
                             row[8]])
    head = ["claim", "better > worse", "metric", "scores", "effect [95 %]", "seeds", "verdict"]
    return [*lines, *(grid(head, rows) if rows else [NOT_RUN])]


# --- cost ---------------------------------------------------------------------------------------------------


def described(method: str, preset: str) -> str:
    """What `python <method>.py describe --preset <preset>` prints."""
    with contextlib.redirect_stdout(io.StringIO()) as out:
        ready.verb(method, "describe", "--preset", preset)
    return out.getvalue()


def read_described(text: str) -> dict[str, float]:
    """{params [M], gflops of one forward pass, weights [GB], activations [GB]} from the verb's table."""
    if totals := re.findall(r"^total .*?([\d,]+) +([\d.]+)$", text, re.M):
        memory = re.findall(r"activations ([\d.]+) GB \+ weights, gradients and AdamW ([\d.]+) GB", text)[-1]
        return {"params": int(totals[-1][0].replace(",", "")) / 1e6, "gflops": float(totals[-1][1]),
                "activations": float(memory[0]), "weights": float(memory[1])}
    parts = re.findall(r"([\d.]+) M parameters +([\d.]+) GFLOPs", text)
    stages = [float(x) for x in re.findall(r"AdamW ([\d.]+) GB", text)]
    return {"params": sum(float(p) for p, _ in parts), "gflops": sum(float(f) for _, f in parts),
            "weights": max(stages)}


def steps_of(cfg: Any) -> tuple[int, float, str]:
    """A preset's optimiser steps of one process, forward passes of its described batch in them, in words."""
    if hasattr(cfg, "stage_epochs"):  # OccVLA: four stages
        each = [steps or round(epochs * FRAMES / batch) for steps, epochs, batch in
                zip(cfg.stage_steps, cfg.stage_epochs, cfg.stage_batch, strict=True)]
        passes = sum(n * batch for n, batch in list(zip(each, cfg.stage_batch, strict=True))[1:])
        return sum(each), passes, "stages 1 to 3, a keyframe a pass"
    if hasattr(cfg, "base_steps"):
        steps = cfg.base_steps + cfg.stage1_steps + cfg.stage2_steps
        passes = (cfg.base_steps + cfg.stage1_steps) * cfg.batch + cfg.stage2_steps * cfg.head_batch
        return steps, passes, "one plan a sample: ten passes of the expert, so an upper bound"
    steps = cfg.steps or round(cfg.epochs * FRAMES / cfg.batch)
    return steps, steps, f"{cfg.epochs} epochs" if not cfg.steps else ""


def cost_table(records: dict[str, dict]) -> list[str]:
    """Preset x method."""
    rows = []
    for method in METHODS:
        presets = importlib.import_module(method).PRESETS
        runs = [r for r in records.values() if r["method"] == method and r["kind"] == "run"]
        for preset, cfg in presets.items():
            d, (steps, passes, note) = read_described(described(method, preset)), steps_of(cfg)
            flops = 3 * 1e9 * d["gflops"] * passes  # backward: twice the forward
            hours = [flops / (n * rate) / 3600 for n, rate in GPUS.values()]
            hours = [f"{h:.2g}" if h >= 0.01 else "< 0.01" for h in hours]
            own = [r["cost"] for r in runs if r["preset"] == preset and r["cost"]["steps"]]
            here = f"{own[0]['train_s'] / own[0]['steps']:.2f}" if own else NOT_RUN
            memory = f"{d['weights']:.2f}" + (f" + {d['activations']:.2f}" if d.get("activations") else "")
            rows.append([method, preset, f"{d['params']:,.1f}", f"{d['gflops']:,.0f}" if d["gflops"] > 9 else
                         f"{d['gflops']:.1f}", memory, f"{steps:,}", here, *hours, note])
    head = ["method", "preset", "M parameters", "GFLOPs forward", "GB float32: weights + activations", "steps",
            "s a step here", *(f"{name}, *estimated*" for name in GPUS), "counted as"]
    return grid(head, rows)


def cost_page(records: dict[str, dict]) -> str:
    """docs/cost.md."""
    rates = "; ".join(f"{name}: {n} x {rate / 1e12:.0f} TFLOP/s" for name, (n, rate) in GPUS.items())
    return "\n".join([
        "# What it costs", "",
        "Generated by `make docs`. Parameters, FLOPs and memory are `describe`'s, which computes nothing: the network",
        "on the meta device. *Seconds a step here* are of the runs in `experiments/results/`, on two shared CPU",
        "cores. **Hours on GPUs are estimated from FLOPs and were never measured**: forward FLOPs x 3 (backward) x",
        f"passes, at an assumed rate ({rates}).",
        "Data loading, a slower kernel or a small batch make them longer.",
        f"Epochs count nuScenes' {FRAMES:,} training keyframes. Where the weights, gradients and AdamW alone exceed",
        "24 GB the first hour column is arithmetic, not a plan.", "", *cost_table(records)]) + "\n"


# --- the figure ---------------------------------------------------------------------------------------------


def flow_of(text: str) -> list[list[tuple[str, str, str]]]:
    """The rows (what, shape, where) of the page's section `Data flow`; an empty row ends a line of the figure."""
    section = text.partition("## Data flow")[2].partition("\n## ")[0]
    rows = [[cell.strip() for cell in line.strip("| \n").split("|")] for line in section.splitlines()
            if line.startswith("|")]
    lines: list[list[tuple[str, str, str]]] = [[]]
    for row in rows[2:]:
        if any(row):
            lines[-1].append(tuple(row))
        else:
            lines.append([])
    return lines


def draw_flow(path: Path, title: str, flow: list[list[tuple[str, str, str]]]) -> None:
    """PNG: a line of boxes for each chain, with shapes."""
    import textwrap

    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    across = max(map(len, flow))
    figure, axis = plt.subplots(figsize=(2.35 * across, 1.3 * len(flow) + 0.4), layout="constrained")
    for y, boxes in enumerate(flow):
        for x, (what, shape, where) in enumerate(boxes):
            lines = [*textwrap.wrap(what, 26), shape, *textwrap.wrap(where, 28)]
            axis.text(x, -y, "\n".join(lines), ha="center", va="center", fontsize=7.5, linespacing=1.35, zorder=2,
                      bbox={"boxstyle": "round,pad=0.45", "fc": "#eef4ff" if x else "#f6f0ff", "ec": "#57606a"})
        axis.annotate("", (len(boxes) - 1, -y), (0, -y), zorder=0, arrowprops={"arrowstyle": "-", "color": "#57606a"})
        for x in range(len(boxes) - 1):
            axis.annotate("", (x + 0.57, -y), (x + 0.44, -y), zorder=1,
                          arrowprops={"arrowstyle": "->", "color": "#57606a"})
    axis.set(xlim=(-0.5, across - 0.5), ylim=(0.5 - len(flow), 0.5))
    axis.axis("off")
    axis.set_title(title, fontsize=10, loc="left")
    with atomic(path) as temporary:
        figure.savefig(temporary, dpi=90, format="png", metadata={"Software": None})
    plt.close(figure)


def pictures(out: Path = ROOT / "docs", folder: Path = Path("runs/show"),
             made: Sequence[str] = METHODS) -> list[Path]:
    """The README's pictures, at most 300 kB each, of the ready checkpoints; -> their paths."""
    from PIL import Image

    paths = []
    made = [method for method in made if (ready.READY / method).is_dir()]
    for method, found in zip(made, ready.show(folder, methods=tuple(made)), strict=True):
        paths.append(out / f"show-{method}{found.suffix.replace('.html', '.jpg')}")
        if found.suffix == ".gif":
            write_bytes(paths[-1], found.read_bytes())
            continue
        sheets = sorted([*found.parent.glob("*.png"), *found.parent.glob("pictures/*.png")])
        with Image.open(sheets[SHEET[method]]) as sheet, atomic(paths[-1]) as temporary:
            size = WIDE, round(sheet.height * WIDE / sheet.width)
            sheet.convert("RGB").resize(size, Image.Resampling.LANCZOS).save(temporary, "JPEG", quality=85)
    for path in paths:
        print(f"  {path}: {path.stat().st_size / 1e3:.0f} kB")
    return paths


def write(results: Path = Path("experiments/results"), out: Path = ROOT / "docs", quick: bool = True) -> None:
    """Anchors, claims and figures of every page of `out`; not quick: docs/cost.md too."""
    records = load(results)
    for page in sorted(out.glob("*.md")):
        text = anchor(page, read_text(page))
        if page.stem in METHODS:
            text = fill(text, "claims", claims(page.stem, records, results))
            draw_flow(out / f"{page.stem}-flow.png", f"{page.stem}.py, preset tiny, batch left out", flow_of(text))
        write_bytes(page, text.encode())
    if not quick:
        write_bytes(out / "cost.md", cost_page(records).encode())
    print(f"{out}: {len(list(out.glob('*.md')))} pages")


@exit_on_input_error
def main() -> None:
    pictures() if "--pictures" in sys.argv[1:] else write(quick="--quick" in sys.argv[1:])


if __name__ == "__main__":
    main()
