"""The command line made from a config: values, help, and one line for every mistake."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Literal

import pytest

from common import cli
from common.files import InputError, exit_on_input_error, write_json

DOC = """Toy: a method for tests.

RUN
    python test_cli.py train

GLOSSARY
    x    not shown in the short help
"""


@dataclass(frozen=True)
class Config:
    # model
    image_size: tuple[int, int] = (336, 672)  # [px] height, width
    dynamic_ids: tuple[int, ...] = (2, 3)  # Sec. 2.1
    norm: Literal["batch", "group"] = "batch"  # papers: batch
    levels: Literal[1, 2, 4] = 4  # ours
    backbone: str = "microsoft/resnet-101"  # hub id or "conv" # with a hash
    clip: bool = True  # clips
    cap: float | None = None  # [m], none = no cap
    folder: Path | None = None  # where
    # optimisation
    # (the schedule is cosine)
    lr: float = 1e-3  # Sec. 4.2
    steps: int = 0  # 0: from epochs
    long: tuple[float, ...] = (
        0.1,
        0.2,
    )  # on its last line
    described: int = field(default=3, metadata={"help": "from metadata"})  # then the source


PRESETS = {"tiny": Config(lr=2e-3, norm="group", steps=100), "paper": Config()}
VERBS = {
    "train": ("learn", "data-root out seed steps device resume shard labeler"),
    "eval": ("score", "ckpt! data-root device save-pred"),
    "ablate": ("re-test", "claim! seeds"),
    "describe": ("shapes", ""),
}


def parse(line: str, **kwargs):
    return cli.parse(DOC, Config, PRESETS, VERBS, argv=line.split(), **kwargs)


def test_defaults_are_the_first_preset():
    args, cfg = parse("train")
    assert cfg == PRESETS["tiny"] and args.preset == "tiny" and args.verb == "train" and args.method == "test_cli"
    assert (args.seed, args.steps, args.resume, args.shard, args.out, args.run) == (0, 100, False, (0, 1), None, None)
    assert args.given == frozenset() and args.ckpt is None  # flags of other verbs are there with their defaults
    assert args.device in ("cpu", "cuda")


@pytest.mark.parametrize("line, name, value", [
    ("--image-size 112 200", "image_size", (112, 200)), ("--image-size=112,200", "image_size", (112, 200)),
    ("--dynamic-ids 4 5 6", "dynamic_ids", (4, 5, 6)), ("--dynamic-ids", "dynamic_ids", ()),
    ("--dynamic-ids 7", "dynamic_ids", (7,)), ("--norm batch", "norm", "batch"), ("--levels 2", "levels", 2),
    ("--no-clip", "clip", False), ("--clip", "clip", True),
    ("--cap 3", "cap", 3.0), ("--cap 0.5", "cap", 0.5), ("--cap none", "cap", None),
    ("--folder a/b", "folder", Path("a/b")), ("--lr 3e-4", "lr", 3e-4), ("--lr=3e-4", "lr", 3e-4),
    ("--lr 1 --lr 2", "lr", 2.0),
    ("--steps 7", "steps", 7), ("--long .5", "long", (0.5,)), ("--backbone conv", "backbone", "conv"),
])  # fmt: skip
def test_every_field_is_a_flag(line, name, value):
    args, cfg = parse(f"train --preset paper {line}")
    assert cfg == replace(PRESETS["paper"], **{name: value})
    assert type(getattr(cfg, name)) is type(value) and name in args.given


def test_shared_flags():
    words = "--data-root d --out runs/x --seed 3 --steps 9 --device cpu --resume --shard 1/4 --labeler lidar"
    args, _ = parse(f"train {words}")
    assert (args.data_root, args.out, args.seed, args.steps) == (Path("d"), Path("runs/x"), 3, 9)
    assert (args.device, args.resume, args.shard, args.labeler) == ("cpu", True, (1, 4), "lidar")
    args, _ = parse("ablate --claim time --seeds 1")
    assert (args.claim, args.seeds) == ("time", 1)


def test_a_method_may_add_and_change_flags():
    flags = {"claim": cli.Flag("a claim of this paper", Literal["time", "space"]), "pose": cli.Flag("more", int, 4)}
    verbs = {"ablate": ("re-test", "claim pose")}
    args, _ = cli.parse(DOC, Config, PRESETS, verbs, flags, "ablate --claim space".split())
    assert (args.claim, args.pose) == ("space", 4)
    with pytest.raises(InputError, match="one of time, space"):
        cli.parse(DOC, Config, PRESETS, verbs, flags, "ablate --claim x".split())


MISTAKES = {
    "": "which verb?",
    "--lr 3": "which verb?",
    "trian": "unknown verb 'trian' (did you mean train?)",
    "train --lrr 3": "unknown flag --lrr (did you mean --lr?)",
    "train --image_sizes 3 3": "did you mean --image-size?",
    "train --norm btach": "--norm btach: unknown value 'btach' (did you mean batch?); one of batch, group",
    "train --levels 3": "one of 1, 2, 4",
    "train --image-size 3": "expected 2 values, got 1",
    "train --image-size 3 x": "invalid literal for int() with base 10: 'x'",
    "train --lr": "--lr: expected one argument",
    "train --lr 1 2": "'2': expected a flag",
    "train --lr fast": "could not convert string to float: 'fast'",
    "train --lr nan": "not a finite number",
    "train --steps 1.5": "--steps 1.5: invalid literal for int()",
    "train --steps 0": "--steps 0: must be 1 or more",
    "train --steps -3": "--steps -3: must be 1 or more",
    "train --seed -1": "--seed -1: must be 0 or more",
    f"train --seed {1 << 64}": f"--seed {1 << 64}: too large a number",
    "train --lr -1": "--lr -1: must be 0 or more", "train --image-size 3 -3": "--image-size 3 -3: must be 0 or more",
    "train --seed none": "--seed none: invalid literal for int()",
    "train --clip 3": "'3': expected a flag",
    "train --no-lr": "unknown flag --no-lr",
    "train --out=": "an empty value",
    "train --preset huge": "one of tiny, paper",
    "train --device tpu": "one of cpu, cuda",
    "train --labeler sam": "one of world, foundation, lidar, files",
    "train --shard 4/4": "0 <= i < n",
    "train --shard half": "0 <= i < n",
    "train --ckpt runs/x": "--ckpt: not a flag of train",
    "train runs/x": "'runs/x': expected a flag",
    "eval": "eval needs --ckpt",
    "eval --ckpt /nowhere/at/all": "--ckpt /nowhere/at/all: no such folder",
    "ablate --claim time --seeds 0": "--seeds 0: must be 1 or more",
}


@pytest.mark.parametrize("line", MISTAKES)
def test_a_mistake_costs_one_line_and_exit_code_2(line, capsys):
    @exit_on_input_error
    def main():
        parse(line)

    with pytest.raises(SystemExit) as stop:
        main()
    out, err = capsys.readouterr()
    assert stop.value.code == 2 and out == ""
    assert err.startswith("error: ") and err.count("\n") == 1 and MISTAKES[line] in err


def test_cuda_asked_for_but_absent(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(InputError, match="no CUDA device here; use --device cpu"):
        parse("train --device cuda")
    assert parse("train")[0].device == "cpu"
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    assert parse("train")[0].device == "cuda" and parse("train --device cpu")[0].device == "cpu"


# --- the config of a checkpoint ---------------------------------------------------------------------------------------


def store(folder: Path, cfg=PRESETS["paper"], method="test_cli", **more) -> Path:
    value = {"method": method, "preset": "paper", "seed": 5, "steps": 9, "data": {},
             "config": cli.to_dict(cfg)}  # fmt: skip
    write_json(folder / "config.json", value | more)
    return folder


def test_eval_takes_the_config_of_the_checkpoint(tmp_path):
    mine = replace(PRESETS["paper"], image_size=(8, 9), folder=Path("a"), cap=2.5, dynamic_ids=())
    args, cfg = parse(f"eval --ckpt {store(tmp_path, mine)}")
    assert cfg == mine and isinstance(cfg.image_size, tuple)
    assert args.preset == "paper" and args.run["seed"] == 5
    assert parse(f"eval --ckpt {tmp_path} --levels 1 --preset paper")[1] == replace(cfg, levels=1)
    assert json.loads(json.dumps(cli.to_dict(cfg))) == cli.to_dict(mine)


def test_a_staged_run_is_found_at_its_last_stage(tmp_path):
    store(tmp_path / "1_first", replace(PRESETS["paper"], levels=1))
    store(tmp_path / "2_second", replace(PRESETS["paper"], levels=2))
    (tmp_path / "labels").mkdir()
    assert cli.last_stage(tmp_path) == tmp_path / "2_second"
    assert parse(f"eval --ckpt {tmp_path}")[1].levels == 2


def test_checkpoints_that_do_not_fit(tmp_path):
    def complaint(folder: Path, words: str = "") -> str:
        with pytest.raises(InputError) as error:
            parse(f"eval --ckpt {folder} {words}")
        assert "\n" not in str(error.value)
        return str(error.value)

    (tmp_path / "empty").mkdir()
    assert "no config.json there" in complaint(tmp_path / "empty")
    assert "of preset paper, not tiny" in complaint(store(tmp_path / "a"), "--preset tiny")
    assert "of loc.py, not of test_cli.py" in complaint(store(tmp_path / "b", method="loc"))
    stale = {k: v for k, v in cli.to_dict(PRESETS["paper"]).items() if k != "lr"}
    assert "missing: lr" in complaint(store(tmp_path / "c", config=stale))
    assert "unknown: gamma" in complaint(store(tmp_path / "d", config=stale | {"lr": 1.0, "gamma": 2}))
    write_json(tmp_path / "e" / "config.json", [1])
    assert "the value is a list, expected an object" in complaint(tmp_path / "e")


@pytest.mark.parametrize("field, value", [
    ("lr", "fast"), ("lr", None), ("lr", [0.1]), ("lr", True), ("lr", float("nan")), ("steps", 1.5), ("image_size", [8]),
    ("image_size", [8, "9"]), ("image_size", 8), ("dynamic_ids", [None]), ("dynamic_ids", {}), ("norm", "layer"),
    ("levels", 3), ("levels", "4"), ("clip", 1), ("folder", 3), ("backbone", {"a": 1}),
])  # fmt: skip
def test_a_hand_edited_field_is_one_line(field, value, tmp_path):
    config = cli.to_dict(PRESETS["paper"]) | {field: value}
    with pytest.raises(InputError, match=f"config.json: '{field}' is .*; train again"):
        parse(f"eval --ckpt {store(tmp_path, config=config)}")


# --- help -------------------------------------------------------------------------------------------------------------


def test_notes_come_from_the_source():
    notes = cli.field_notes(Config)
    assert list(notes) == list(asdict(Config()))
    assert notes["image_size"] == ("model", "[px] height, width") and notes["lr"][1] == "Sec. 4.2"
    assert notes["long"][1] == "on its last line" and notes["described"][1] == "from metadata; then the source"
    assert notes["backbone"][1] == 'hub id or "conv" # with a hash'
    assert notes["lr"][0] == "optimisation (the schedule is cosine)"


def test_help(capsys):
    with pytest.raises(SystemExit) as stop:
        parse("--help")
    text = capsys.readouterr().out
    assert stop.value.code == 0 and "python test_cli.py train" in text and "GLOSSARY" not in text
    assert all(f"  {verb} " in text for verb in VERBS)
    with pytest.raises(SystemExit):
        parse("train --lr broken --help")
    text = capsys.readouterr().out
    for name in asdict(Config()):
        assert name.replace("_", "-") in text
    lines = {line.split()[0]: line for line in text.splitlines() if line.startswith("  --")}
    assert "[0.002 / 0.001] Sec. 4.2" in lines["--lr"] and "[336 672]" in lines["--image-size"]
    assert "batch|group" in lines["--norm"] and "[group / batch]" in lines["--norm"]
    assert "--clip, --no-clip" in text and "--ckpt" not in text and "\nmodel:\n" in text
    assert max(map(len, text.splitlines())) <= 130
