"""Small trained checkpoints that come with the repository, and what they show.

    python -m experiments.ready runs/demo        # pack a finished, evaluated run into ready/<method>
    python -m experiments.ready show             # `make show`: a small world, five viewers or pictures
    python -m experiments.ready show loc         # of these methods

ready/<method> is a run folder as `train` writes it, without optimiser: every verb's --ckpt takes it. card.json says
what it is: command, commit, scores of the run before packing, bytes and checksum, what is left out.
"""

import hashlib
import importlib
import re
import shlex
import shutil
import sys
import time
from pathlib import Path

from common.cli import RUN, last_stage
from common.files import InputError, exit_on_input_error, read_json, read_npz, write_json
from common.geometry import OCC3D
from common.nuscenes import open_split
from common.report.pictures import draw
from common.train import duration, pack_weights
from common.worlds import make
from experiments.table import METHODS

ROOT = Path(__file__).parents[1]
READY, WORLD = ROOT / "ready", Path("data/worlds/show")
STREETS = {"size": "mini", "seed": 7, "scenes": 2, "keyframes": 5}
QUERY = "a tall yellow vehicle with an arm"
EPISODE = ("--episodes", "0", "--clean", "1", "--pictures", "1")
LEFT_OUT = {  # what training alone reads
    "occle": ("teacher.",), "threedvla": ("three.teacher.",),
    "occvla": ("tokenizer.encoder.", "vlm.net.lm_head.", "planner.", "best.command", "best.history")}  # lm_head: tied
KEPT = {"occvla": {"plan_inputs": ["speed+command", "none"]}}  # settings that follow: two of five planner heads
SCORES = ("miou_camera", "constant_miou_camera", "shuffled_miou_camera", "iou_camera", "constant_iou_camera",
          "unknown_miou", "unknown_miou_chance", "auroc", "qa_balanced", "qa_balanced_shuffled", "l2_avg",
          "success", "success_clean", "success_hard", "random_success", "token_error_m")
LIMIT = 10 << 20  # [bytes] of the folder


def pack(folder: Path, out: Path = READY) -> Path:
    """Copy a run's last stage into out/<method>, its weights packed; -> that folder."""
    stage = last_stage(folder)
    run, result = read_json(stage / "config.json", RUN), stage / "result.json"
    if not result.is_file():
        raise InputError(f"{stage}: no result.json; run: python {run['method']}.py eval --ckpt {folder}")
    method, latest = run["method"], read_json(stage / "latest.json", {"folder": str, "step": int})
    home = out / method
    shutil.rmtree(home, ignore_errors=True)
    new = home / stage.relative_to(folder)
    weights = new / latest["folder"] / "model.safetensors"
    weights.parent.mkdir(parents=True)
    if (host := stage.parent / "0_host").is_dir():  # a VLM's processor
        shutil.copytree(host, home / host.name, ignore=shutil.ignore_patterns("*.safetensors"))
    left_out = LEFT_OUT.get(method, ())
    levels = pack_weights(stage / latest["folder"] / "model.safetensors", weights, left_out)
    state = read_json(stage / latest["folder"] / "train_state.json", {"state": dict})
    write_json(weights.with_name("train_state.json"), state | {"groups": {"param_groups": [], "plain": {}}})
    shutil.copy(stage / "latest.json", new / "latest.json")
    data = {name: shorten(value, folder) for name, value in run["data"].items()}
    settings = run["config"] | KEPT.get(method, {})
    asked = shorten(run.get("command", ""), folder)
    write_json(new / "config.json", run | {"config": settings, "data": data, "command": asked})
    scored = read_json(result, {"metrics": dict, "protocol": dict, "dataset": dict})
    scores = {name: round(scored["metrics"][name], 5) for name in SCORES if name in scored["metrics"]}
    write_json(home / "card.json", {
        "method": method, "preset": run["preset"], "seed": run["seed"], "steps": run["steps"],
        "command": asked, "commit": run.get("commit", "unknown"), "scores": scores,
        "scored_on": f"{scored['dataset']['name']}, {scored['dataset']['split']}; before packing",
        "weights": weights.relative_to(home).as_posix(), "bytes": weights.stat().st_size, "sha256": checksum(weights),
        "form": f"matrices of {2 * levels + 1} levels with a float16 scale for each row, compressed; the rest float16; "
                "a frozen encoder is common/weights'",
        "left_out": list(left_out),
        "learned_from": "a synthetic world of this repository; nothing of a real dataset", "licence": "Apache-2.0"})
    return home


def shorten(value, folder: Path):
    """A JSON value without the path of this checkout, or of another that a run used the weights of; a run outside
    is called runs/<name>.
    """
    if not isinstance(value, str):
        return value
    value = re.sub(r"/\S*/(?=common/weights/)", "", value.replace(f"{ROOT}/", ""))
    return value.replace(str(folder), f"runs/{folder.name}") if folder.is_absolute() else value


def checksum(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def verb(method: str, *words: str) -> None:
    """Run a verb in this process."""
    print(f"$ python {method}.py {shlex.join(words)}", flush=True)
    before, sys.argv = sys.argv, [f"{method}.py", *words]
    try:
        importlib.import_module(method).main()
    finally:
        sys.argv = before


def show(out: Path = Path("runs/show"), ready: Path = READY, methods: tuple[str, ...] = METHODS) -> list[Path]:
    """A viewer or an episode of each ready checkpoint, on streets that none has seen; -> one path a method."""
    started = time.time()
    missing = [method for method in methods if not (ready / method / "card.json").is_file()]
    if len(missing) == len(methods):
        raise InputError(f"{ready}: no {', '.join(missing)} there; pack one: python -m experiments.ready RUN")
    for method in missing:
        print(f"{method}: no checkpoint in {ready}; pack one: python -m experiments.ready RUN")
    methods = tuple(method for method in methods if method not in missing)
    if {*methods} - {"threedvla"}:
        make("driving", WORLD, **STREETS)
    shutil.rmtree(out, ignore_errors=True)
    paths = []
    for method in methods:
        home = shutil.copytree(ready / method, out / method)  # verbs write beside a checkpoint: not into ready/
        frames = ["--ckpt", str(home), "--data-root", str(WORLD), "--split", "all", "--eval-frames", "10"]
        if method == "threedvla":
            verb(method, "eval", "--ckpt", str(home), *EPISODE)
            paths += sorted(home.glob("**/pictures/episode_*.gif"))[:1]
        elif method == "loc":
            verb(method, "query", *frames, "--text", QUERY)
            paths += home.glob("query/*.html")
        else:
            pictures = "10" if method == "occvla" else "0"
            verb(method, "predict", *frames, "--out", str(home / "predicted"), "--pictures", pictures)
            paths.append(home / "predicted" / "viewer.html")
            if pictures == "0":
                draw_beside_truth(method, paths[-1].parent)
    print(f"{duration(time.time() - started)} in all:", *(f"  {path}" for path in paths), sep="\n")
    return paths


def draw_beside_truth(method: str, folder: Path) -> None:
    """Sheets and the viewer of saved predictions, with the truth of the world beside them."""
    dataset = open_split(WORLD, None, "all", (112, 200), None)
    made = [i for i, token in enumerate(dataset.tokens) if (folder / f"{token}.npz").is_file()]
    saved = lambda frame: read_npz(folder / f"{frame.token}.npz", {"pred": (OCC3D.shape, None)})["pred"]  # noqa: E731
    draw(saved, dataset, made, folder,
         title=f"{method}, a ready checkpoint on streets it never saw", truth=dataset.labels)


@exit_on_input_error
def main() -> None:
    words = sys.argv[1:]
    if words[:1] == ["show"] and {*words[1:]} <= {*METHODS}:
        show(methods=tuple(words[1:]) or METHODS)
    elif len(words) == 1 and not words[0].startswith("-"):
        home = pack(Path(words[0]))
        card = read_json(home / "card.json")
        print(f"{home}: {card['bytes'] / 1e6:.2f} MB, {card['scores']}")
    else:
        raise InputError(f"expected a run folder, or: show [{' '.join(METHODS)}]")


if __name__ == "__main__":
    main()
