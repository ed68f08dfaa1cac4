"""The command line that the methods share: world, labels, train, eval, predict, ablate, describe.

    verbs.main(__doc__, Config, PRESETS, {
        "world": verbs.world,
        "labels": partial(verbs.labels, LABELS),            # LABELS: common.labels.LabelMaker
        "train": partial(verbs.train, LABELS, train),
        "eval": partial(verbs.evaluate, LABELS, build, predict),
    })

A method names the verbs it offers and gives each its function of (cfg, args). The functions here serve
occupancy networks on driving frames; a method with a verb of its own writes its function and its row of the
table. `ablate` needs no function: it runs experiments/<method>.py.
"""

import os
import runpy
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from common import cli
from common.files import InputError, exit_on_input_error, misfit, reading, write_npz
from common.labels import OPTIONS, WORLD, LabelMaker, labels_note, make_labels
from common.loose import LooseImages
from common.nuscenes import Frame, NuScenesOccupancy, open_split
from common.train import Run, barrier, check_architecture, joined, load_checkpoint, setup, teardown
from common.worlds import WORLDS, is_world, make

DATA = "data-root version split"
LOOSE = "images calibration points"
VERBS = {
    "world": ("write the synthetic world that the other verbs use (nothing to do if it is there)",
              "out seed world-size"),
    "labels": ("make the labels that training reads", f"out! labeler {DATA} shard cache workers world-size "
               "depth-level semantic-level correlation label-seed grounding sam depth-model maps pictures"),
    "train": ("learn from the labels; without --labels, default ones are made first",
              f"out {DATA} labels seed steps device resume cache workers world-size"),
    "eval": ("score a run: tables, result.json, pictures",
             f"ckpt! {DATA} labels save-pred device cache eval-frames rayiou pictures"),
    "predict": ("predictions and pictures of any frames or loose images; no ground truth needed",
                f"ckpt! out! {DATA} {LOOSE} device cache eval-frames pictures"),
    "ablate": ("re-test a claim of the paper (experiments/<method>.py)", "claim! seeds out device cache"),
    "describe": ("shapes, parameters, FLOPs and memory on the meta device", ""),
}
TWO_SOURCES = (f"out! labeler {DATA} shard cache workers world-size primary-level auxiliary-level "
               "correlation label-seed segmenter grounding sam maps auxiliary-maps")  # of labelers.TwoSources
LEVEL = Literal["exact", "mild", "heavy"]
FLAGS = {  # what changes neither the network nor what it learns
    "workers": cli.Flag("loader threads, label processes", int, 2),
    "images": cli.Flag("image files instead of a dataset, one per camera of --calibration", tuple[str, ...]),
    "calibration": cli.Flag("JSON of the cameras of --images (common/loose.py)", Path | None),
    "points": cli.Flag("a LiDAR sweep (.bin) per keyframe of --images", tuple[str, ...], ()),
    "eval-frames": cli.Flag("keyframes, evenly spaced; 0: all", int, 0),
    "rayiou": cli.Flag("RayIoU at evaluation", bool, True),
    "pictures": cli.Flag("keyframes drawn", int, 6),
    "world-size": cli.Flag("synthetic world without --data-root", Literal["mini", "demo", "claims"], "demo"),
    "depth-level": cli.Flag("labeler world: depth errors", LEVEL, WORLD["depth_level"]),
    "semantic-level": cli.Flag("labeler world: semantic errors", LEVEL, WORLD["semantic_level"]),
    "correlation": cli.Flag("labeler world: share of errors that persists", float, WORLD["correlation"]),
    "label-seed": cli.Flag("labeler world: seed of the errors", int, WORLD["seed"]),
    "primary-level": cli.Flag("labeler world, two sources: errors of the first", LEVEL, "mild"),
    "auxiliary-level": cli.Flag("labeler world, two sources: errors of the second", LEVEL, "mild"),
    "grounding": cli.Flag("labeler foundation: hub id or folder; none: a GroundingDINO, if here", str | None),
    "sam": cli.Flag("labeler foundation: hub id or folder; none: SAM ViT-H or SAM2, if here", str | None),
    "segmenter": cli.Flag("labeler foundation: hub id or folder; none: a Mask2Former, if here", str | None),
    "depth-model": cli.Flag("labeler foundation: hub id, folder or metric3d", str | None),
    "maps": cli.Flag("labeler files: folder of maps that any tool wrote", str | None),
    "auxiliary-maps": cli.Flag("labeler files: the second source's; none: the first alone", str | None),
}


@exit_on_input_error
def main(doc: str, config: type, presets: dict[str, Any], actions: dict[str, Callable], *,
         verbs: dict[str, tuple[str, str]] | None = None, flags: dict[str, cli.Flag] | None = None,
         settle: Callable = lambda cfg, args: cfg) -> None:
    """Run the verb on the command line. verbs, flags: a method's own rows of the two tables above.

    settle(cfg, args): the Config where the data decide some of it.
    """
    method = Path(sys.argv[0]).stem
    if sys.argv[1:2] == ["ablate"]:
        experiment(method, *sys.argv[2:])
        return
    known = VERBS | (verbs or {})
    offered = {verb: known[verb] for verb in (*actions, "ablate")}
    args, cfg = cli.parse(doc, config, presets, offered, FLAGS | (flags or {}))
    actions[args.verb](settle(cfg, args), args)
    teardown(joined())


def experiment(method: str, *words: str) -> None:
    """Run experiments/<method>.py with these words, as the command line would: nothing here imports it."""
    before, sys.argv = sys.argv, [f"experiments/{method}.py", *words]
    try:
        runpy.run_module(f"experiments.{method}", run_name="__main__", alter_sys=True)
    finally:
        sys.argv = before


# --- verbs --------------------------------------------------------------------------------------------------


def world(cfg: Any, args: Any, kind: str = "driving") -> None:
    """The verb world. kind: of `worlds.make`, here and below. open_data: opens a split, as `open_split`."""
    make(kind, args.out, size=args.world_size, seed=args.seed)


def data_root(args: Any, run: Run, kind: str, **options) -> Path:
    """--data-root; without it the world that `worlds.make(kind, **options)` writes, by the main process."""
    if run.is_main and not args.data_root:
        make(kind, **options)
    barrier(run)
    return args.data_root or WORLDS / "-".join(map(str, (kind, *options.values())))


def labels(maker: LabelMaker, cfg: Any, args: Any, open_data: Callable = open_split,
           kind: str = "driving") -> None:
    """The verb labels: 2D maps of a labeler -> a label folder."""
    run = setup("cpu") if int(os.environ.get("WORLD_SIZE", "1")) > 1 else joined()
    root = data_root(args, run, kind, size=args.world_size)
    dataset = open_data(root, args.version, args.split, cfg.image_size, args.cache)
    make_labels(maker, dataset, args.labeler, labeler_options(args, None, maker.flags), cfg, args.out,
                shard=args.shard, workers=args.workers)
    barrier(run)
    if run.is_main and not maker.maps and not args.shard[0]:
        from common.report.pictures import draw_labels

        for path in draw_labels(dataset, args.out, args.pictures, f"{args.method}, labeler {args.labeler}"):
            print(f"  {path}")


def labeler_options(args: Any, labeler: str | None = None, flags: dict = OPTIONS) -> dict[str, Any]:
    """The options of the labeler (default: --labeler) whose flags have a value."""
    given = {option: getattr(args, flag) for option, flag in flags[labeler or args.labeler].items()}
    return {option: value for option, value in given.items() if value is not None}


def train(maker: LabelMaker, learn: Callable, cfg: Any, args: Any, labeler: str = "world",
          open_data: Callable = open_split, kind: str = "driving") -> None:
    """The verb train: learn(cfg, dataset, labels, args). Without --labels, `labeler` makes some first."""
    run, args.out = setup(args.device), args.out or Path("runs") / args.method
    root = data_root(args, run, kind, size=args.world_size)
    dataset = open_data(root, args.version, args.split, cfg.image_size, args.cache)
    folder = args.labels or args.out / "labels"
    if not args.labels:
        if labeler == "world" and not is_world(dataset.root):
            raise InputError(f"{dataset.root}: no exact maps to make default labels from; run: python "
                             f"{args.method}.py labels --labeler lidar --data-root {dataset.root} --out L, "
                             "then train --labels L")
        options = labeler_options(args, labeler, maker.flags) if labeler == "world" else {}
        make_labels(maker, dataset, labeler, options, cfg, folder, workers=args.workers)
    barrier(run)
    learn(cfg, dataset, folder, args)


def evaluate(maker: LabelMaker | None, build: Callable, predict: Callable, cfg: Any, args: Any,
             open_data: Callable = open_split) -> None:
    """The verb eval. build(cfg, pretrained=False) -> network; predict(net, frame) -> ids.

    maker: makes labels to draw beside predictions. result.json's protocol takes `mask_train` and `protocol`
    of the run's source.
    """
    from common.report.occupancy import chosen, ground_truth, report

    net, out, state = load(build, cfg, args)
    dataset, train_set = open_eval(cfg, args, open_data), open_train(cfg, args, open_data)
    labels = Path(args.run["data"]["labels"])
    if maker and is_world(dataset.root) and args.pictures:  # labels to draw beside the prediction
        labels = out / "labels-drawn"
        make_labels(maker, dataset, "world", WORLD, cfg, labels, only=chosen(len(dataset), args.pictures))
    protocol = training_protocol(args.run)
    state["step"] += args.run["data"].get("after", 0)  # steps of the stages before
    report(partial(predict, net), dataset=dataset, train_set=train_set, out=out, run=args.run, state=state,
           params=sum(p.numel() for p in net.parameters() if p.requires_grad), protocol=protocol,
           truth=partial(ground_truth, labels=args.labels),
           against=f"labels in {args.labels}" if args.labels else "", frames=args.eval_frames,
           rayiou=args.rayiou, pictures=args.pictures, labels=labels, save=args.save_pred)


def predict_frames(build: Callable, predict: Callable, cfg: Any, args: Any,
                   open_data: Callable | None = None) -> None:
    """The verb predict: <token>.npz of each frame, PNG sheets and the viewer; no ground truth is read."""
    from common.report.occupancy import spread
    from common.report.pictures import chosen, draw, style_of

    net, _, _ = load(build, cfg, args)
    dataset = (open_data or open_eval)(cfg, args)
    run, indices = joined(), spread(len(dataset), args.eval_frames)
    for i in indices[run.rank :: run.world]:
        frame = dataset[i]
        write_npz(args.out / f"{frame.token}.npz", pred=predict(net, frame))
    if not run.is_main:
        return
    for path in draw(partial(predict, net), dataset, chosen(len(dataset), args.pictures), args.out,
                     title=f"{args.method}, split {dataset.split}", style=style_of(dataset)):
        print(f"  {path}")
    print(f"{args.out}: {len(indices)} predictions")


def describe(build: Callable, cfg: Any, args: Any, more: Callable[[], dict] = dict) -> None:
    """The verb describe, for networks that read six images, K and T_ego_cam. more(): the rest of a batch."""
    from common.backbones import describe as table

    H, W = cfg.image_size
    with torch.device("meta"):
        net, B = build(cfg, pretrained=False), cfg.batch
        batch = {"images": torch.empty(B, 6, 3, H, W), "K": torch.empty(B, 6, 3, 3),
                 "T_ego_cam": torch.empty(B, 6, 4, 4)} | more()
    images, grid = ("x".join(map(str, shape)) for shape in (batch["images"].shape, net.grid.shape))
    print(f"{args.method}, preset {args.preset}: images {images} -> logits on {grid}")
    table(net, batch)


# --- parts --------------------------------------------------------------------------------------------------


# Shape of `data` in a run's config.json (`files.misfit`)
SOURCE = {"root": str, "version": str, "split": str, "labels": str, "note": str, "mask_train?": str,
          "protocol?": {str: str}, "after?": int}


def load(build: Callable, cfg: Any, args: Any) -> tuple[nn.Module, Path, dict[str, Any]]:
    """--ckpt -> the network with its weights, in eval mode on --device, the run's folder, its checkpoint's
    state."""
    out = cli.last_stage(args.ckpt)
    if fault := misfit(args.run["data"], SOURCE, "'data'"):
        raise InputError(f"{out / 'config.json'}: {fault}; train again")
    with reading(out / "config.json", "no network can be built from it", "train again"), torch.device("meta"):
        check_architecture(out, build(cfg, pretrained=False))  # before anything is allocated
    net = build(cfg, pretrained=False).to(setup(args.device).device).eval()
    state = load_checkpoint(out, net)
    if fault := misfit(state, {"step": int, "train_s": float, "peak_gb": float}, "'state'"):
        raise InputError(f"{out}: train_state.json: {fault}; copy the run folder again")
    return net, out, state


def run_data(args: Any) -> tuple[Path, str | None]:
    """--data-root and --version, or the data that the run of --ckpt was trained on."""
    source = args.run["data"]
    version = args.version or (None if args.data_root else source["version"])
    return args.data_root or Path(source["root"]), version


def open_eval(cfg: Any, args: Any, open_data: Callable = open_split) -> Any:
    """The split to score (default: the validation split), or --images with their --calibration."""
    if getattr(args, "images", None):
        if args.calibration is None or args.data_root or args.run["config"].get("format") == "semantickitti":
            raise InputError("--images: they need --calibration FILE (common/loose.py), no --data-root, and "
                             "a run that learned on nuScenes' grid")
        return LooseImages(args.images, args.calibration, cfg.image_size, args.points)
    root, version = run_data(args)
    if not args.data_root and not root.is_dir():
        raise InputError(f"{root}: not here, the data that this run learned from; give --data-root, or for a "
                         f"synthetic world run: python {args.method}.py world")
    return open_data(root, version, args.split, cfg.image_size, args.cache, train=False)


def open_train(cfg: Any, args: Any, open_data: Callable = open_split) -> Any:
    """The training split, for the constant predictor; None, and a line, where the tree lacks its scenes."""
    split = None if args.data_root else args.run["data"]["split"]
    try:
        return open_data(*run_data(args), split, cfg.image_size, args.cache)
    except InputError as error:
        print(f"no constant predictor: {error}")
        return None


def training_protocol(run: dict[str, Any]) -> dict[str, str]:
    """The protocol entries of result.json on a run's training, from its config.json."""
    data = {"mask_train": "none", "protocol": {}} | run["data"]
    return {"mask_train": data["mask_train"], "labels": data["note"] or "none"} | data["protocol"]


def source(dataset: NuScenesOccupancy, folder: Path, mask_train: str = "none") -> dict[str, Any]:
    """The data of a run's config.json: where frames and labels come from, what training masks."""
    return {"root": dataset.root, "version": dataset.version, "split": dataset.split, "labels": folder,
            "note": labels_note(folder), "mask_train": mask_train}


def inputs(frame: Frame) -> dict[str, Tensor]:
    """What an occupancy network reads of a keyframe: images (6, 3, H, W), K (6, 3, 3), T_ego_cam (6, 4,
    4)."""
    return {name: torch.as_tensor(getattr(frame, name)) for name in ("images", "K", "T_ego_cam")}
