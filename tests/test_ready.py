"""The checkpoints that come with the repository: small, whole, of today's code; how a run is packed."""

import importlib
import re
import zlib

import pytest
import torch
from torch import nn

from common import cli
from common.files import InputError, read_json, write_json
from common.train import LEFT_OUT, _save, check_architecture, load_checkpoint, pack_weights
from experiments import ready
from experiments.table import METHODS

NETWORKS = {  # what a checkpoint of a method's last stage holds
    "easyocc": lambda m, cfg, stage: m.build(cfg, pretrained=False),
    "occle": lambda m, cfg, stage: m.saved_modules(cfg, pretrained=False),
    "loc": lambda m, cfg, stage: m.Loc(cfg, pretrained=False),
    "occvla": lambda m, cfg, stage: m.load_run(cfg, stage),
    "threedvla": lambda m, cfg, stage: m.Agent(cfg, m.ThreeD),
}
CARDS = sorted(ready.READY.glob("*/card.json"))


@pytest.mark.parametrize("path", CARDS, ids=lambda path: path.parent.name)
def test_a_ready_checkpoint_is_what_its_card_says(path):
    card, method = read_json(path), importlib.import_module(path.parent.name)
    weights = path.parent / card["weights"]
    assert weights.stat().st_size == card["bytes"] and ready.checksum(weights) == card["sha256"]
    assert card["licence"] == "Apache-2.0" and card["command"].startswith(f"python {path.parent.name}.py train")
    assert card["scores"] and len(card["commit"].removesuffix("-dirty")) == 40
    stage = cli.last_stage(path.parent)
    run = read_json(stage / "config.json", cli.RUN)
    cfg = cli.from_dict(method.Config, run["config"], stage)  # no field is gone, none is new
    load_checkpoint(stage, NETWORKS[path.parent.name](method, cfg, stage))  # else train and pack it again: ready.py
    files = [file.read_text() for file in path.parent.glob("**/*.json")]
    assert not any(re.search(r'[" =]/\w', text) for text in files)  # no machine's path


def test_ready_checkpoints_are_small():
    assert {path.parent.name for path in CARDS} <= {*METHODS}
    assert max(read_json(path)["bytes"] for path in CARDS) <= 2 << 20
    assert sum(file.stat().st_size for file in ready.READY.glob("**/*") if file.is_file()) <= ready.LIMIT
    pictures = [*ready.ROOT.glob("docs/show-*"), *ready.ROOT.glob("docs/*.png")]  # the README's and the pages'
    assert len(pictures) >= 9 and max(file.stat().st_size for file in pictures) <= 300_000


def test_packed_weights_are_read_as_any_others(tmp_path, seeded):
    net = nn.ModuleDict({"a": nn.Linear(64, 8), "b": nn.Conv3d(4, 6, 3), "c": nn.Linear(3, 3), "idle": nn.Linear(40, 40)})
    whole, out = tmp_path / "whole.safetensors", tmp_path / "run"
    out.mkdir()
    with torch.no_grad():
        net["a"].weight[3] = 0
    _save(whole, net.state_dict())
    small = out / "step_000007" / "model.safetensors"
    with pytest.raises(InputError, match="packed with 11 levels, more than 100"):
        pack_weights(whole, small, ("idle.",), limit=100)
    fewest = small.stat().st_size
    assert pack_weights(whole, small, ("idle.",), limit=fewest) == 11 and small.stat().st_size == fewest
    assert pack_weights(whole, small, ("idle.",)) == 127 and fewest < small.stat().st_size < whole.stat().st_size / 2
    write_json(out / "latest.json", {"folder": "step_000007", "step": 7})
    write_json(out / "step_000007" / "train_state.json", {"step": 7, "world": 1, "state": {"train_s": 1.0},
                                                          "groups": {"param_groups": [], "plain": {}}})
    other = nn.ModuleDict({"a": nn.Linear(64, 8), "b": nn.Conv3d(4, 6, 3), "c": nn.Linear(3, 3), "idle": nn.Linear(40, 40)})
    kept = other["idle"].weight.clone()
    assert load_checkpoint(out, other) == {"train_s": 1.0, "step": 7}
    for name, value in net.state_dict().items():
        if not name.startswith("idle"):
            step = value.flatten(1).abs().amax(1).max() / 127 if value.dim() > 1 else value.abs().max() / 1024
            assert (other.state_dict()[name] - value).abs().max() <= 0.51 * step, name
    assert torch.equal(other["idle"].weight, kept) and not other["a"].weight[3].any()
    del other["idle"]
    check_architecture(out, other)  # left out, so it may be absent here, too
    with pytest.raises(InputError, match="another architecture"):
        check_architecture(out, nn.ModuleDict({"a": nn.Linear(64, 9)}))
    _save(out / "step_000007" / "model.safetensors", {"a.weight:rows": torch.ones(8)}, {LEFT_OUT: '["a", "b", "c"]'})
    with pytest.raises(InputError, match="not a readable safetensors file"):  # scales of nothing
        load_checkpoint(out, other)
    bomb = torch.frombuffer(bytearray(zlib.compress(bytes(10_000_000))), dtype=torch.uint8)  # 10 MB from 10 kB
    _save(out / "step_000007" / "model.safetensors", {"a.weight": bomb},
          {LEFT_OUT: '["a.bias", "b", "c"]', "deflated": '{"a.weight": [8, 64]}'})
    with pytest.raises(InputError, match="not a readable safetensors file"):
        load_checkpoint(out, other)


def test_a_run_that_was_not_scored_is_not_packed(tmp_path):
    write_json(tmp_path / "x" / "config.json", {"method": "loc", "preset": "tiny", "seed": 0, "steps": 1, "config": {},
                                                "data": {}})
    with pytest.raises(InputError, match="run: python loc.py eval"):
        ready.pack(tmp_path / "x", tmp_path / "ready")
    with pytest.raises(InputError, match="no easyocc, occle, loc, occvla, threedvla there"):
        ready.show(tmp_path / "show", tmp_path / "nothing")


def test_a_run_without_its_world_names_the_way_out(tmp_path, monkeypatch, capsys):
    import commands

    import easyocc

    monkeypatch.chdir(tmp_path)
    _, fails = commands.of(easyocc)
    ckpt = ready.READY / "easyocc"
    assert "run: python easyocc.py world" in fails(capsys, "predict", "--ckpt", ckpt, "--out", "P")
