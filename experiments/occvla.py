"""OccVLA's claims: arms, the sceptic's two-way attention, and controls.

    python -m experiments.occvla --claim supervision --seeds 3    # or: python occvla.py ablate --claim ...
    python -m experiments.runner publish runs/ablate/occvla/thought occvla-thought && make table

All arms get the same optimiser steps. Stages that arms share are trained once, in <out>/../arms: the
tokenizer, and the VLM of arms that differ in their planners alone.

    --stream two-way      text and planner read the occupancy queries too; then nothing can be skipped
    --stream no-gradient  the stream learns, but its gradient does not reach the VLM
    --supervision easyocc occupancy labels are EasyOcc's pseudo-labels instead of the ground truth

Occupancy supervision should help the depth half of the text-balanced questions (data/driving/balanced.py),
and need not help the bearing half. An arm counts only if it passes the gates below: its images must matter.
"""

from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import easyocc
import occvla as O
from common import cli, verbs, worlds
from common.files import read_json, short_hash
from common.labels import WORLD, make_labels
from common.networks.paligemma import Encoded, Host, PaliGemma, States
from common.nuscenes import open_split
from common.report.occupancy import constant_scores, ground_truth, spread
from experiments.runner import Claim, Gate, main, once

SHARED = {"plan_inputs": ("speed+command", "history")}
HALVES = ("qa_balanced_depth", "qa_balanced_bearing")
PLANNED = ("minus_l2", "minus_col")


def gates(arm: str) -> tuple[Gate, ...]:
    """Conditions on the arm that the others are compared with."""
    return (Gate("own minus another scene's images", f"{arm}:qa_balanced_over_shuffled", ">", 0.2),
            Gate("history head against ego-history MLP", f"{arm}:minus_history_l2", ">",
                 f"{arm}:minus_l2_ego_mlp"),
            Gate("own against another scene's images", f"{arm}:minus_l2", ">", f"{arm}:minus_l2_shuffled"),
            Gate("main row against trees on speed", f"{arm}:minus_l2", ">", f"{arm}:minus_l2_speed_trees"))


LEARNS = {"vlm_train": ("vision", "projector", "language")}  # the tower, too

CLAIMS = {
    "supervision": Claim(
        "supervision", "(a) occupancy supervision makes a better VLM: answers that need "
                       "depth, planning, collision",
        {"on": {}, "off": {"lambda_occ": 0.0}, "on, no gradient": {"stream": "no-gradient"}},
        tuple(("on", other, m) for other in ("off", "on, no gradient") for m in (*HALVES, *PLANNED)),
        metric="qa_balanced_depth", gates=gates("on"),
        note="Written before any run: the depth half gains, the bearing half need not. minus_l2: VAD's "
             "average, given speed and command; its 'percent' are centimetres, minus_col's percent of "
             "steps."),
    "grid": Claim(
        "grid", "(b) occupancy supervision and a chain of thought each help, and both together most",
        {"both": {}, "occupancy": {"cot": False}, "thought": {"lambda_occ": 0.0},
         "neither": {"cot": False, "lambda_occ": 0.0}},
        tuple((*pair, m) for pair in (("both", "occupancy"), ("both", "thought"), ("occupancy", "neither"),
                                      ("thought", "neither")) for m in ("qa_balanced_depth", "minus_l2")),
        metric="qa_balanced_depth", gates=gates("both")),
    "ceiling": Claim(
        "ceiling", "(c) a vision tower that knows metric depth answers the depth half better "
                   "than occupancy makes it",
        {"depth": {"vlm": "tiny-depth"}, "on": {}, "off": {"lambda_occ": 0.0}},
        tuple((*pair, m) for pair in (("depth", "on"), ("on", "off")) for m in HALVES),
        metric="qa_balanced_depth", gates=gates("on"), seeds=1, note="Ours."),
    "start": Claim(
        "start", "ours: a vision tower that learned on single pictures of other streets beats random "
                 "weights; metric depth adds to it; frozen is no worse",
        {"conv": {"vlm": "tiny-conv"} | LEARNS, "street": LEARNS, "street+frozen": {},
         "street-depth": {"vlm": "tiny-depth"} | LEARNS, "street-depth+frozen": {"vlm": "tiny-depth"}},
        tuple((*pair, m) for pair in (("street", "conv"), ("street-depth", "street"),
                                      ("street+frozen", "street"), ("street-depth+frozen", "street-depth"))
              for m in ("miou_camera", "qa_accuracy")), seeds=1,
        note="Each host has its two lessons on pictures of other streets; its encoder stays as it is there."),
    "lambda": Claim(
        "lambda", "(d) the weight of the occupancy loss: 1 is better than 0.1 and 0 (the paper has no sweep)",
        {"1": {}, "0.1": {"lambda_occ": 0.1}, "0": {"lambda_occ": 0.0}},
        (*((*pair, m) for pair in (("1", "0.1"), ("0.1", "0")) for m in ("qa_balanced_depth", "minus_l2")),
         ("1", "0.1", "miou_camera")), metric="qa_balanced_depth", gates=gates("1")),
    "ego": Claim(
        "ego", "(e) past ego motion and the driving command help planning (and then the images matter less)",
        {"images": {"plan_inputs": ("none",)}, "command": {"plan_inputs": ("command",)},
         "history": {"plan_inputs": ("history",)}, "command+history": {"plan_inputs": ("command+history",)}},
        (("history", "images"), ("command", "images"), ("command+history", "command"),
         ("command+history", "history")), metric="minus_l2", seeds=1,
        note="One VLM for all arms; nuScenes' command is derived from the future."),
    "target": Claim(
        "target", "(f) code logits with decoded voxels are the best form of the target",
        {"code+voxel": {}, "code": {"occ_target": "code"}, "latent": {"occ_target": "latent"},
         "voxel": {"occ_target": "voxel"}},
        tuple(("code+voxel", a, m) for m in ("miou_camera", "qa_balanced_depth")
              for a in ("code", "latent", "voxel")), metric="miou_camera", gates=gates("code+voxel")),
    "labels": Claim(
        "labels", "(g) occupancy without manual labels (EasyOcc's pseudo-labels) supervises too, if less "
                  "than ground truth",
        {"ground truth": {}, "pseudo-labels": {"supervision": "easyocc"}, "off": {"lambda_occ": 0.0}},
        (("ground truth", "pseudo-labels", "miou_camera"), ("pseudo-labels", "off", "qa_balanced_depth"),
         ("pseudo-labels", "off", "minus_l2")), metric="miou_camera", seeds=1, gates=gates("ground truth"),
        note="Scored against ground truth. The tokenizer of the second arm learns from pseudo-labels too."),
    "two-way": Claim(
        "two-way", "(h) the sceptic's sign: text and planner that read the occupancy queries do better than "
                   "one-way, skipped",
        {"two-way": {"stream": "two-way"}, "one-way": {}},
        tuple(("two-way", "one-way", m) for m in ("qa_balanced_depth", "minus_l2")), metric="minus_l2",
        seeds=1, gates=gates("one-way"),
        note="The paper says that nothing is lost by skipping: this sign should not hold."),
    "frames": Claim(
        "frames", "(i) two keyframes, half a second apart, show speed: planning without ego input is better "
                  "than from one",
        {"two": {"n_frames": 2, "plan_inputs": ("none",)}, "one": {"plan_inputs": ("none",)}},
        (("two", "one", "minus_l2"), ("two", "one", "qa_balanced")), metric="minus_l2", seeds=1,
        note="Ours."),
}

# --- networks of the arms -----------------------------------------------------------------------------------


class NoGradient(O.OccVLA):
    """OccVLA whose stream reads the VLM's states without their graph."""

    def __init__(self, cfg: O.Config, host: Host, classes: int = 18):
        super().__init__(cfg, host, classes)
        self.occupancy.register_forward_pre_hook(lambda _, args: ([h.detach() for h in args[0]], args[1]))


class TwoWay(nn.Module):
    """Text tokens read the queries before every layer that the stream reads; gates start at 0.

    mask: the image tokens of the pass under way; None: a pass behind a cache, whose text reads the queries of
    the pass before. queries: those of the last pass, after each block.
    """

    def __init__(self, width: int, stream: O.OccupancyTransformer, d: int, heads: int):
        super().__init__()
        self.heads = heads
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in stream.reads)
        self.query = nn.ModuleList(nn.Linear(width, d) for _ in stream.reads)
        self.key_value = nn.ModuleList(nn.Linear(d, 2 * d) for _ in stream.reads)
        self.out = nn.ModuleList(nn.Linear(d, width) for _ in stream.reads)
        self.gate = nn.Parameter(torch.zeros(len(stream.reads)))
        self.show = nn.Linear(d, width)  # queries -> states for the planner; as random as it begins
        self.mask: Tensor | None = None
        self.queries: list[Tensor] = []

    def before(self, k: int, stream: O.OccupancyTransformer, layer: nn.Module, args: tuple,
               kwargs: dict) -> tuple:
        """Hook: the queries read the layer's input, then its text reads the queries."""
        hidden = args[0]
        if self.mask is not None:
            q = None if k == 0 else self.queries[k - 1]
            self.queries = self.queries[:k] + [stream.step(k, q, hidden, self.mask)]
        text = 1.0 if self.mask is None else (~self.mask)[..., None].to(hidden.dtype)
        key, value = self.key_value[k](self.queries[k]).chunk(2, -1)
        query, key, value = (x.unflatten(-1, (self.heads, -1)).transpose(1, 2)
                             for x in (self.query[k](self.norms[k](hidden)), key, value))
        read = F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)
        return (hidden + self.gate[k] * text * self.out[k](read), *args[1:]), kwargs


class TwoWayHost(PaliGemma):
    """The host whose text reads the queries: every pass keeps those it made in its cache."""

    def __init__(self, host: Host, images: int, prefix: str, two_way: TwoWay):
        super().__init__(host, images, prefix)
        self.shared = (two_way,)  # a part of the stream, not of the host

    def run(self, encoded: Encoded, packs: Tensor, rows: Tensor, hidden: bool = False,
            keep: bool = False) -> States:
        (two_way,), n = self.shared, encoded.tokens.shape[1]
        two_way.mask = torch.arange(n + packs.shape[2], device=packs.device).expand(len(packs), -1) < n
        states = super().run(encoded, packs, rows, hidden, keep=True)
        two_way.mask, states.cache.queries = None, list(two_way.queries)
        return states

    def follow(self, encoded: Encoded, packs: Tensor, rows: Tensor, keep: bool = False) -> States:
        if encoded.prefix is not None:
            self.shared[0].queries = [q[rows] for q in encoded.prefix.cache.queries]
        return super().follow(encoded, packs, rows, keep)


class TwoWayVLA(O.OccVLA):
    """OccVLA whose text and planner read the occupancy queries."""

    def __init__(self, cfg: O.Config, host: Host, classes: int = 18):
        super().__init__(cfg, host, classes)
        stream, layers = self.occupancy, host.net.model.language_model.layers
        stream.two_way = TwoWay(self.vlm.width, stream, cfg.occ_dim, cfg.occ_heads)
        self.vlm = TwoWayHost(host, len(O.CAMERAS) * cfg.n_frames, cfg.prefix, stream.two_way)
        for k, layer in enumerate(stream.reads):
            hook = partial(stream.two_way.before, k, stream)
            layers[layer].register_forward_pre_hook(hook, with_kwargs=True)

    def occupy(self, states: States, rows: Tensor | slice = slice(None)) -> Tensor:
        return self.occupancy.finish(states.cache.queries[-1][rows])

    def plan_context(self, encoded: Encoded, limit: int = 40) -> tuple[Tensor, Tensor, list[str]]:
        context, valid, texts = super().plan_context(encoded, limit)
        with torch.no_grad():
            queries = self.occupancy.two_way.show(self.occupancy.two_way.queries[-1])
        return torch.cat([context, queries], 1), F.pad(valid, (0, queries.shape[1]), value=True), texts


NETWORKS = {"one-way": O.OccVLA, "no-gradient": NoGradient, "two-way": TwoWayVLA}


# --- arms ---------------------------------------------------------------------------------------------------


def pseudo_labels(args: SimpleNamespace) -> Path:
    """EasyOcc's labels of the training split in args.pool, made if they are not there."""
    cfg, folder = easyocc.PRESETS["tiny"], args.pool / "labels-easyocc"
    dataset = open_split(args.data_root, args.version, None, cfg.image_size, args.cache)
    make_labels(easyocc.LABELS, dataset, "world", WORLD, cfg, folder, workers=args.workers)
    return folder


def run_arm(cfg: O.Config, args: SimpleNamespace) -> Path:
    """Train and evaluate one arm; -> the folder of its last stage."""
    opened = [open_split(args.data_root, args.version, None, cfg.image_size, args.cache, train=train)
              for train in (True, False)]
    train_set, test = opened
    labels = pseudo_labels(args) if args.supervision == "easyocc" else None
    # what a stage does not use is reset, so that arms which differ only there share it
    plain = O.PRESETS[args.preset]
    kept = ("plan_inputs", "plan_dim", "plan_layers", "plan_heads", "plan_dropout")
    language = replace(cfg, **{name: getattr(plain, name) for name in kept})
    kept = ("lambda_occ", "occ_target", "cot", "n_frames", "vlm")
    tokenizer = replace(language, **{name: getattr(plain, name) for name in kept})
    folders = []
    for kind, part in (("tokenizer", tokenizer), ("language", language), ("planning", cfg)):
        options = () if kind == "tokenizer" else (args.stream,)
        key = [asdict(part), str(labels), str(args.data_root), args.version, *options]
        folders.append(args.pool / f"{kind}-{short_hash(key)}" / f"seed{args.seed}")
    stages = [folder / name for folder, name in zip((folders[0], folders[1], *folders[1:]), O.STAGES)]
    network, host = NETWORKS[args.stream], folders[1] / "0_host"
    args.resume, args.steps, args.fsdp, args.labels, args.save_pred = False, None, False, None, None
    for stage, part in enumerate((tokenizer, language, language, cfg)):
        previous = stages[max(stage - 1, 0)]
        O.train_stage(stage, part, train_set, labels, args, stages[stage], previous, host, network)
    indices = spread(len(test), args.eval_frames)
    constants = once(args.pool / f"constants-{short_hash([str(args.data_root), args.version, indices])}.json",
                     lambda: constant_scores(train_set, test, indices, ground_truth(test)))
    args.run, args.rayiou, args.pictures = read_json(stages[3] / "config.json"), False, 0
    net = O.load_run(cfg, stages[3], host, network).to(args.device)
    O.score(net, args, stages[3], stages, test, train_set, known=constants)
    return stages[3]


FLAGS = {"workers": verbs.FLAGS["workers"], "eval-frames": verbs.FLAGS["eval-frames"]._replace(default=120),
         "eval-questions": O.FLAGS["eval-questions"]._replace(default=24),
         "world-size": O.FLAGS["world-size"]._replace(default="questions"),
         "stream": cli.Flag("who reads what", Literal["one-way", "no-gradient", "two-way"], "one-way"),
         "supervision": cli.Flag("occupancy labels", Literal["gts", "easyocc"], "gts")}

if __name__ == "__main__":
    main(__doc__, O.Config, O.PRESETS, CLAIMS, run_arm, shared=SHARED, flags=FLAGS,
         world=lambda args: worlds.make("driving", size=args.world_size),
         steps=lambda cfg: f"{'/'.join(map(str, cfg.stage_steps))} steps")
