"""Training's plumbing on a toy network: order of data, bit-equal resume, kill -9 at any moment, two
processes.

Run as a script this file *is* the toy training, so that torchrun and SIGKILL meet the real thing:
    python tests/test_train.py OUT [--batch 2] [--dropout 0.1] [--kill-at STEP]
"""

import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import SimpleNamespace

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import numpy as np
import pytest
import torch
from torch import nn

from common import files
from common import train as T
from common.engine import Session
from common.files import InputError, read_json, write_json

# --- the toy ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Config:
    width: int = 8  # toy
    batch: int = 2  # toy
    dropout: float = 0.1  # toy
    workers: int = 2  # toy


class Toy(nn.Module):
    def __init__(self, cfg: Config):
        super().__init__()
        self.encoder = nn.Sequential(nn.Conv2d(3, cfg.width, 3, stride=2), nn.GroupNorm(2, cfg.width), nn.ReLU())
        self.head = nn.Sequential(nn.Dropout(cfg.dropout), nn.Flatten(), nn.Linear(cfg.width * 9, 4))

    def forward(self, x):
        return self.head(self.encoder(x))


def item(index: int, rng: np.random.Generator) -> dict[str, torch.Tensor]:
    """A fixed image (3, 8, 8) per index plus its own noise, and its class."""
    image = np.random.default_rng(index).normal(size=(3, 8, 8)) + 0.1 * rng.normal(size=(3, 8, 8))
    return {"image": torch.from_numpy(image.astype(np.float32)), "label": torch.tensor(index % 4)}


class Killed(Exception):
    pass


def toy_train(out: Path, cfg: Config = Config(), steps: int = 10, kill_at: int | None = None, hard: bool = False,
              resume: bool = False, seed: int = 0, save_every: int = 5, poison: str = "",
              names: tuple[str, ...] = ()) -> list[float] | None:
    """-> the losses of the steps it took; None if the run was finished. kill_at: dies in that step, after
    backward.

    poison: "loss" or "weight", not finite in step 7.
    """
    torch.set_num_threads(1)
    args = SimpleNamespace(method="toy", preset="tiny", seed=seed, device="cpu", resume=resume)
    run = Session(args, cfg, out, samples=13, batch=cfg.batch, steps=steps, source={"name": "toy", "root": Path("x")},
                  names=names)  # fmt: skip
    if run.finished:
        return None
    run.save_every = save_every
    net = Toy(cfg)
    optimizer = T.make_optimizer("muon", net, 1e-2, 3e-2, 0.1)  # vectors step by AdamW: both rules are resumed
    model = run.attach(net, optimizer)
    losses = []
    for step, batch in run.batches(item, cfg.workers):
        lr = T.set_lr(optimizer, T.schedule(step, steps, "cosine", warmup=3))
        loss = nn.functional.cross_entropy(model(batch["image"]), batch["label"])
        if cfg.dropout:  # the loop's own use of every generator
            loss = loss * (1 + 1e-2 * (random.random() + random.gauss(0, 1) + np.random.rand() + np.random.randn()))
        if step == 7 and poison == "loss":
            loss = loss * math.nan
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        if step == 7 and poison == "weight":
            net.head[2].bias.grad[0] = math.inf
        if step == kill_at:
            if hard:
                os.kill(os.getpid(), signal.SIGKILL)
            raise Killed
        optimizer.step()
        losses.append(loss.item())
        run.log(step, {"ce": loss}, lr)
    T.teardown(run.run)
    return losses


def tensors(out: Path) -> dict[str, torch.Tensor]:
    """Every tensor of the folder's checkpoint: weights, optimiser, random states."""
    folder = out / read_json(out / "latest.json")["folder"]
    files = {name: T._read(folder / f"{name}.safetensors") for name in ("model", "optimizer")}
    return {f"{name}/{key}": value for name, file in files.items() for key, value in file.items()}


def assert_bit_equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys() and len(a) > 20
    different = [name for name in a if a[name].dtype != b[name].dtype or not torch.equal(a[name], b[name])]
    assert not [name for name in different if not torch.isnan(a[name]).all()], different


def script(*words, processes: int = 1) -> subprocess.CompletedProcess:
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"] if processes > 1 else []
    child = subprocess.Popen(
        [sys.executable, *launcher, __file__, *map(str, words)], cwd=ROOT, text=True, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, env=os.environ | {"OMP_NUM_THREADS": "1"}, start_new_session=True,
    )  # fmt: skip
    try:
        out, err = child.communicate(timeout=900)
    finally:
        if child.poll() is None:  # hung: end torchrun and what it started
            child.terminate()
            child.wait(30)
    return subprocess.CompletedProcess(child.args, child.returncode, out, err)


@pytest.fixture(autouse=True, scope="module")
def leave_torch_as_it_was():
    """`setup` sets threads and determinism for the whole process."""
    threads, deterministic = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    yield
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(deterministic)


@pytest.fixture(scope="module")
def straight(tmp_path_factory) -> tuple[Path, list[float]]:
    """The uninterrupted run of ten steps."""
    out = tmp_path_factory.mktemp("straight")
    return out, toy_train(out)


# --- data order ---------------------------------------------------------------------------------------------


def test_two_processes_share_the_order_of_the_doubled_batch():
    for step in range(20):
        one = T.DataOrder(7, 6, seed=3)
        parts = [T.DataOrder(7, 3, world=2, rank=r, seed=3) for r in (0, 1)]
        assert parts[0](step) + parts[1](step) == one(step)
        position = parts[1].positions(step)[0]
        assert parts[1].generator(position).random() == one.generator(position).random()


def test_each_epoch_is_a_new_permutation_and_seeds_differ():
    order = T.DataOrder(10, 4, seed=0)
    seen = [i for step in range(5) for i in order(step)]
    assert sorted(seen[:10]) == sorted(seen[10:]) == list(range(10)) and seen[:10] != seen[10:]
    assert order(3) == T.DataOrder(10, 4, seed=0)(3)  # stateless: asking for step 3 first gives the same
    assert [T.DataOrder(10, 4, seed=1)(s) for s in range(5)] != [order(s) for s in range(5)]
    assert order.steps(2) == 5 and T.DataOrder(10, 4, world=2).steps(1) == 2
    assert T.DataOrder(2, 5)(0).count(0) in (2, 3)  # fewer samples than a batch: epochs join
    with pytest.raises(InputError, match="no training samples"):
        T.DataOrder(0, 1)


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_prefetch_keeps_order_and_generators(workers):
    def slow(index, rng):
        time.sleep(0.002 * (index % 3))
        return index, rng.random()

    order = T.DataOrder(9, 2, seed=5)
    got = list(T.prefetch(slow, order, 4, 12, workers))
    want = [(s, [slow(order.sample(p), order.generator(p)) for p in order.positions(s)]) for s in range(4, 12)]
    assert got == want


@pytest.mark.parametrize("workers", [0, 2])
def test_prefetch_raises_at_the_step_of_the_bad_item_and_leaves_no_thread(workers):
    order = T.DataOrder(8, 1, seed=0)
    bad = order(5)[0]

    def make(index, rng):
        if index == bad:
            raise InputError("x.jpg: image not found")
        return index

    steps, before = [], threading.active_count()
    with pytest.raises(InputError, match="x.jpg"):
        for step, _ in T.prefetch(make, order, 0, 8, workers):
            steps.append(step)
    assert steps == [0, 1, 2, 3, 4]
    stream = T.prefetch(lambda i, rng: i, order, 0, 8, workers)
    next(stream)
    stream.close()  # a loop that breaks off
    assert threading.active_count() == before


# --- learning rate ------------------------------------------------------------------------------------------


def test_schedule_by_hand():
    assert [T.schedule(s, 100, "cosine", warmup=4) for s in range(4)] == [0.25, 0.5, 0.75, 1.0]
    assert T.schedule(4, 104, "cosine", warmup=4) == 1.0
    assert T.schedule(54, 104, "cosine", warmup=4, floor=0.2) == pytest.approx(0.2 + 0.8 / 2)  # half-way: cos = 0
    assert T.schedule(104, 104, "cosine", warmup=4, floor=0.2) == pytest.approx(0.2)
    assert [T.schedule(s, 12, "step") for s in (0, 9, 10, 11)] == [1, 1, 0.1, 0.1]  # StepLR at epoch 10 of 12
    assert T.schedule(7, 10, "constant") == 1
    with pytest.raises(ValueError, match="linear"):
        T.schedule(7, 10, "linear")


def test_param_groups_split_encoder_from_rest_and_spare_vectors_decay():
    net = Toy(Config())
    net.encoder[0].weight.requires_grad_(False)
    groups = T.param_groups(net, 1e-4, 1e-3, 0.05)
    told = {(g["base_lr"], g["weight_decay"]): sorted(p.ndim for p in g["params"]) for g in groups}
    assert told == {(1e-4, 0.0): [1, 1, 1], (1e-3, 0.05): [2], (1e-3, 0.0): [1]}
    optimizer = torch.optim.AdamW(groups)
    assert T.set_lr(optimizer, 0.5) == 5e-4
    assert sorted({g["lr"] for g in optimizer.param_groups}) == [5e-5, 5e-4]


@pytest.mark.parametrize("shape", [(32, 216), (216, 32), (16, 16)])
def test_orthogonalize_keeps_directions_and_levels_singular_values(shape):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    U, S, Vh = torch.linalg.svd(x, full_matrices=False)
    out = U.t() @ T.orthogonalize([torch.ones(shape[0], 3), x])[1] @ Vh.t()
    assert (out - torch.diag(out.diag())).abs().max() < 1e-3  # the same singular vectors
    assert S.max() / S.min() > 1.5 and 0.6 < out.diag().min() and out.diag().max() < 1.25


def test_muon_steps_layers_by_their_size_and_the_rest_as_adamw():
    torch.manual_seed(0)
    net, twin = (nn.Sequential(nn.Conv3d(4, 8, 3), nn.Flatten(), nn.Linear(8, 2)) for _ in range(2))
    twin.load_state_dict(net.state_dict())
    muon, adamw = (T.make_optimizer(name, n, 1e-2, 1e-2, 0.0) for name, n in (("muon", net), ("adamw", twin)))
    before = net[0].weight.detach().clone()
    for n, optimizer in ((net, muon), (twin, adamw)):
        n(torch.ones(2, 4, 3, 3, 3)).square().sum().backward()
        optimizer.step()
    assert torch.equal(net[0].bias, twin[0].bias) and not torch.equal(net[0].weight, twin[0].weight)
    step = (net[0].weight - before).flatten(1)  # (8, 108): one singular value (one input), scaled to the size of AdamW's
    assert torch.linalg.matrix_norm(step, 2).item() == pytest.approx(0.2 * 1e-2 * 108**0.5, rel=0.4)


def test_the_encoder_of_a_wrapped_network_learns_at_its_own_rate():
    net = nn.ModuleDict({"net": nn.ModuleDict({"encoder": nn.Linear(2, 3)}), "head": nn.Linear(3, 1)})
    groups = T.make_optimizer("muon", net, 1e-3, 1e-2, 0.0, encoder="net.encoder").param_groups
    rate = {id(p): g["base_lr"] for g in groups for p in g["params"]}
    assert {rate[id(p)] for p in net["net"].parameters()} == {1e-3} and {rate[id(p)] for p in net["head"].parameters()} == {1e-2}


# --- resume -------------------------------------------------------------------------------------------------


def test_resume_is_bit_equal(straight, tmp_path, capsys):
    folder, losses = straight
    with pytest.raises(Killed):
        toy_train(tmp_path, kill_at=7)
    assert T.checkpoint_step(tmp_path) == 5
    tail = toy_train(tmp_path)  # the same command, no --resume
    assert "goes on from step 5 of 10" in capsys.readouterr().out
    assert tail == losses[5:]
    assert_bit_equal(tensors(folder), tensors(tmp_path))
    rows = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [r["step"] for r in rows] == list(range(1, 11)) and [r["loss"] for r in rows] == pytest.approx(losses)
    for name in ("step_000005", ".latest.tmp-abcdefgh.json"):  # a kill at the very end, before they are removed
        shutil.copytree(tmp_path / "step_000010", tmp_path / name)
    files._SWEPT.clear()
    assert toy_train(tmp_path) is None
    assert "finished, 10 steps" in capsys.readouterr().out
    assert {path.name for path in tmp_path.iterdir()} == {path.name for path in folder.iterdir()}


def test_resume_after_sigkill_is_bit_equal(straight, tmp_path):
    assert script(tmp_path, "--kill-at", 8).returncode == -signal.SIGKILL
    assert toy_train(tmp_path) == straight[1][5:]
    assert_bit_equal(tensors(straight[0]), tensors(tmp_path))


def test_an_unrestored_generator_would_be_noticed(straight, tmp_path, monkeypatch):
    with pytest.raises(Killed):
        toy_train(tmp_path, kill_at=7)
    monkeypatch.setattr(T, "_set_rng", lambda states: None)
    assert toy_train(tmp_path) != straight[1][5:]


@pytest.mark.parametrize("change, named", [
    (dict(cfg=Config(width=16)), "config.width 8 there, 16 here"),
    (dict(seed=1), "seed 0 there, 1 here"),
    (dict(steps=12), "steps 10 there, 12 here"),
    (dict(steps=8), "steps 10 there, 8 here"),
    (dict(steps=8, resume=True), "steps 10 there, 8 here"),
])  # fmt: skip
def test_a_folder_of_other_settings_is_refused(straight, change, named):
    before = tensors(straight[0])
    with pytest.raises(InputError) as error:
        toy_train(straight[0], **change)
    assert named in str(error.value) and "\n" not in str(error.value)
    assert_bit_equal(before, tensors(straight[0]))


def test_resume_flag(tmp_path, capsys):
    with pytest.raises(InputError, match="no config.json"):
        toy_train(tmp_path / "nothing", resume=True)
    toy_train(tmp_path, steps=4)
    assert toy_train(tmp_path, Config(workers=0), steps=4) is None  # a run-time field may differ
    assert len(toy_train(tmp_path, steps=6, resume=True)) == 2  # extended on purpose, and recorded
    assert "extended from 4 steps" in capsys.readouterr().out
    assert read_json(tmp_path / "config.json")["extended_from"] == [4]
    assert toy_train(tmp_path, steps=6) is None
    (tmp_path / "config.json").unlink()
    with pytest.raises(InputError, match="no config.json"):
        toy_train(tmp_path, steps=6)


@pytest.mark.parametrize("poison, names, says", [
    ("loss", (), "term 'ce' at step 8 (samples 1 11 "),
    ("loss", tuple("abcdefghijklm"), "term 'ce' at step 8 (samples b l "),
    ("weight", (), "term 'ce' at step 9 (samples "),  # the step after shows what the weight did
])  # fmt: skip
def test_a_nan_is_never_saved(poison, names, says, tmp_path):
    """The line is due at steps 1 and 50 alone, the checkpoint at 5 and 10: the save looks at the loss
    first."""
    arguments = {"cfg": Config(dropout=0.0), "poison": poison, "names": names, "steps": 10}
    for _ in range(2):  # the same command again: from the good checkpoint, with the same end
        with pytest.raises(InputError) as error:
            toy_train(tmp_path, **arguments)
        line = str(error.value)
        assert says.split(" (")[0] in line and "the checkpoint of step 5 stays; lower the learning rate" in line
        assert "\n" not in line and (not names or "(samples " in line and set(line.split("(samples ")[1][:3]) <= {*names, " "})
        assert sorted(p.name for p in tmp_path.glob("step_*")) == ["step_000005"]
        assert all(v.isfinite().all() for name, v in tensors(tmp_path).items() if name.startswith("model"))
    assert len(toy_train(tmp_path, Config(dropout=0.0), steps=10)) == 5  # what was saved is whole


def test_weights_that_are_not_finite_are_neither_saved_nor_loaded(tmp_path):
    save(tmp_path, 1)
    net, optimizer = make_net(2.0)
    for broken in (math.nan, math.inf):
        with torch.no_grad():
            net.weight[0, 0] = broken
        with pytest.raises(InputError, match="weight is not finite after step 2: diverged, the checkpoint of step 1 stays"):
            T.save_checkpoint(tmp_path, RUN, net, optimizer, 2, {})
    nn.init.constant_(net.weight, 2.0)
    optimizer.state[net.bias]["exp_avg"][0] = math.nan
    with pytest.raises(InputError, match="exp_avg of the optimiser's parameter 1 is not finite"):
        T.save_checkpoint(tmp_path, RUN, net, optimizer, 2, {})
    assert loaded_value(tmp_path) == (1, 1.0)
    net.register_buffer("mask", torch.tensor([-math.inf, 0.0]))  # a mask may be infinite
    T.save_checkpoint(tmp_path, RUN, net, make_net(2.0)[1], 3, {})
    assert (tmp_path / "step_000003/model.safetensors").stat().st_mode & 0o077 == 0o666 & ~umask() & 0o077
    bad = torch.full((3,), math.nan)
    for file, name, value, says in (("model", "bias", bad, "bias is not finite; train again with another --out"),
                                    ("model", "bias", 1 / torch.zeros(3), "bias is not finite"),
                                    ("model", "bias", bad.int(), "bias is torch.int32 there, torch.float32 here"),
                                    ("optimizer", "1.exp_avg", bad, "a tensor of parameter 1 holds nan")):
        path = tmp_path / f"step_000003/{file}.safetensors"
        whole = T._read(path)
        T._save(path, whole | {name: value})
        with pytest.raises(InputError, match=f"{path}: .*{says}"):
            T.load_checkpoint(tmp_path, net, optimizer)
        T._save(path, whole)


def umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


@pytest.mark.parametrize("name, change, says", [
    ("latest.json", [], "the value is a list, expected an object"),
    ("latest.json", {"step": "5", "folder": "step_000005"}, "'step' is a text, expected a whole number"),
    ("latest.json", {"step": 5, "folder": "../x"}, "names the folder ../x"),
    ("latest.json", {"step": 2, "folder": "step_000005"}, "names the folder step_000005 of step 2"),
    ("config.json", {"method": "toy"}, "the value has no 'preset'"),
    ("step_000005/train_state.json", {"groups": {}}, "'groups' has no 'param_groups'"),
    ("step_000005/train_state.json", {"state": {"train_s": "x"}}, "'train_s' is a text, expected a number"),
    ("step_000005/train_state.json", {"step": 4}, "step 4, not 5"),
    *(("step_000005/train_state.json", {name: value}, "the optimiser has other parameter groups")
      for name, value in (("base_lr", math.nan), ("betas", [0.9]), ("eps", None), ("weight_decay", [0.1]))),
])  # fmt: skip
def test_hand_edited_run_folders_are_one_line(name, change, says, tmp_path):
    with pytest.raises(Killed):
        toy_train(tmp_path, kill_at=6)
    if "train_state" in name:
        whole = read_json(tmp_path / name)
        group = whole["groups"]["param_groups"][0]
        group.update(change) if set(change) <= set(group) else whole.update(change)
        change = whole
    write_json(tmp_path / name, change)
    with pytest.raises(InputError) as error:
        toy_train(tmp_path)
    assert f"{tmp_path / name}: " in str(error.value) and says in str(error.value)


# --- checkpoints --------------------------------------------------------------------------------------------


def make_net(value: float) -> tuple[nn.Module, torch.optim.Optimizer]:
    net = nn.Linear(4, 3)
    nn.init.constant_(net.weight, value)
    optimizer = torch.optim.AdamW(net.parameters())
    net(torch.ones(1, 4)).sum().backward()
    optimizer.step()
    nn.init.constant_(net.weight, value)
    return net, optimizer


RUN = T.Run(0, 1, torch.device("cpu"), True)


def loaded_value(out: Path) -> tuple[int, float]:
    net, optimizer = make_net(-1.0)
    state = T.load_checkpoint(out, net, optimizer, RUN)
    assert (net.weight == net.weight[0, 0]).all() and state["told"] == state["step"]
    return state["step"], net.weight[0, 0].item()


def save(out: Path, step: int) -> None:
    T.save_checkpoint(out, RUN, *make_net(float(step)), step, {"told": step})


def test_a_crash_at_any_point_of_saving_leaves_a_whole_checkpoint(tmp_path, monkeypatch):
    class Crash(Exception):
        pass

    targets = [(T, "_save"), (T, "_sync"), (T, "write_json"), (os, "replace"), (T.shutil, "rmtree"), (os, "fsync")]
    outcomes, stage = [], 0
    while True:
        out = tmp_path / str(stage)
        save(out, 1)
        calls = 0

        def bomb(real):
            def call(*args, **kwargs):
                nonlocal calls
                calls += 1
                if calls == stage + 1:
                    raise Crash
                return real(*args, **kwargs)
            return call

        with monkeypatch.context() as patch:
            for module, name in targets:
                patch.setattr(module, name, bomb(getattr(module, name)))
            try:
                save(out, 2)
                crashed = False
            except Crash:
                crashed = True
        outcomes.append(loaded_value(out))
        save(out, 3)  # the next save works, and clears what the crash left
        assert loaded_value(out) == (3, 3.0)
        assert sorted(p.name for p in out.iterdir()) == ["latest.json", "step_000003"]
        if not crashed:
            break
        stage += 1
    assert stage >= 10 and set(outcomes) == {(1, 1.0), (2, 2.0)}
    assert outcomes == sorted(outcomes)  # one switch: the old one up to it, the new one from it on


def test_saving_the_same_step_twice_and_the_files_of_a_checkpoint(tmp_path):
    for _ in range(3):
        save(tmp_path, 4)
        assert loaded_value(tmp_path) == (4, 4.0)
    files = sorted(p.name for p in tmp_path.rglob("*") if p.is_file())
    assert files == ["latest.json", "model.safetensors", "optimizer.safetensors", "train_state.json"]  # and no pickle


def test_buffers_tied_weights_and_dtypes_survive(tmp_path):
    net = nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 3), nn.Linear(3, 3)).to(torch.float64)
    net[2].weight = net[1].weight
    net(torch.randn(5, 3, dtype=torch.float64)).sum().backward()
    optimizer = torch.optim.SGD(net.parameters(), 0.1, momentum=0.9)
    optimizer.step()
    T.save_checkpoint(tmp_path, RUN, net, optimizer, 1, {})
    other = nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 3), nn.Linear(3, 3)).to(torch.float64)
    other[2].weight = other[1].weight
    again = torch.optim.SGD(other.parameters(), 0.1, momentum=0.9)
    T.load_checkpoint(tmp_path, other, again, RUN)
    for (name, a), (_, b) in zip(net.state_dict().items(), other.state_dict().items(), strict=True):
        assert torch.equal(a, b), name
    assert torch.equal(*(o.state_dict()["state"][0]["momentum_buffer"] for o in (optimizer, again)))


def test_bad_checkpoints_are_one_line(tmp_path):
    def complaint(out, net=None, **kwargs) -> str:
        with pytest.raises(InputError) as error:
            T.load_checkpoint(out, net or nn.Linear(4, 3), **kwargs)
        assert "\n" not in str(error.value)
        return str(error.value)

    assert "no checkpoint there" in complaint(tmp_path)
    save(tmp_path, 1)
    told = complaint(tmp_path, nn.Linear(5, 3))
    assert "weight is (3, 4) there, (3, 5) here" in told
    args = SimpleNamespace(method="toy", preset="tiny", seed=0)
    write_json(tmp_path / "config.json", T.settings(args, Config(width=4), 1, {}))
    wanted = T.settings(SimpleNamespace(method="toy", preset="paper", seed=0), Config(width=5), 1, {})
    told = complaint(tmp_path, nn.Linear(5, 3), wanted=wanted)
    assert "preset tiny there, paper here" in told and "config.width 4 there, 5 here" in told
    told = complaint(tmp_path, optimizer=make_net(0)[1], run=T.Run(0, 2, RUN.device, True))
    assert "trained by 1 processes, not 2" in told
    two = torch.optim.AdamW([{"params": p} for p in nn.Linear(4, 3).parameters()])
    assert "other parameter groups" in complaint(tmp_path, optimizer=two, run=RUN)

    weights = tmp_path / "step_000001" / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    assert "model.safetensors: not a readable safetensors" in complaint(tmp_path)
    weights.unlink()
    assert "model.safetensors: file not found" in complaint(tmp_path)
    write_json(tmp_path / "latest.json", {"folder": "../elsewhere", "step": 1})
    assert "not there" in complaint(tmp_path)
    (tmp_path / "latest.json").write_text("{")
    assert "not valid JSON" in complaint(tmp_path)


# --- two processes ------------------------------------------------------------------------------------------


def test_two_processes_equal_one_with_the_doubled_batch(tmp_path):
    one = toy_train(tmp_path / "one", Config(batch=4, dropout=0.0))
    done = script(tmp_path / "two", "--batch", 2, "--dropout", 0, processes=2)
    assert done.returncode == 0, done.stderr[-2000:]
    rows = [json.loads(line) for line in (tmp_path / "two" / "log.jsonl").read_text().splitlines()]
    assert [r["loss"] for r in rows] == pytest.approx(one, abs=1e-6)
    assert done.stdout.count("step 000010/10") == 1  # one of them talks
    a, b = tensors(tmp_path / "one"), tensors(tmp_path / "two")
    for name in (n for n in a if n.startswith("model/")):
        torch.testing.assert_close(a[name], b[name], rtol=0, atol=5e-6)  # float32, ten steps of lr up to 3e-2
    assert {n.split("/")[1].split(".")[0] for n in b if "/rng" in n} == {"rng0", "rng1"}
    with pytest.raises(InputError, match="world 2 there, 1 here"):
        toy_train(tmp_path / "two", Config(batch=2, dropout=0.0))


# --- log and result -----------------------------------------------------------------------------------------


def test_log_line_has_the_house_format(capsys, tmp_path):
    row = {"step": 1200, "loss": 2.314, "ce": 1.201, "lov": 0.902, "lr": 1.9e-4, "ms": 412.2, "data": 0.09, "gb": 18.2}
    assert T.format_line(row, 24000) == (
        "step 001200/24000  5.0% | loss 2.314 (ce 1.201 lov 0.902) | lr 1.9e-4 | 412 ms (data 9%) | 18.2 GB | eta 2h36m"
    )
    assert T.format_line({"step": 10, "loss": 1.0, "lr": 1e-3, "ms": 100, "data": 0, "gb": 0.5}, 10) == (
        "step 000010/10 100.0% | loss 1.000 | lr 1.0e-3 | 100 ms (data 0%) | 0.5 GB | eta 0s"
    )
    assert [T.duration(s) for s in (0.4, 75, 3600, 9420)] == ["0s", "1m15s", "1h00m", "2h37m"]


@pytest.fixture
def clock(monkeypatch) -> list[float]:
    """What the log's clock shows [s], as its last element; a test moves it."""
    shown = [0.0]
    monkeypatch.setattr(T.time, "perf_counter", lambda: shown[-1])
    return shown


def test_log_averages_between_lines_and_drops_what_lies_past_the_resumed_step(tmp_path, capsys, clock):
    old = [{"step": s, "loss": 9.0} for s in (1, 2, 3, 4)]
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(r) + "\n" for r in old) + '{"step": 5, "lo')
    log = T.Log(tmp_path, RUN, steps=8, start=2, every=4)
    for step in range(2, 8):
        clock.append(clock[-1] + 0.5)
        log(step, {"loss": torch.tensor(float(step)), "ce": 1.0}, 1e-3)
    rows = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [r["step"] for r in rows] == [1, 2, 3, 4, 8]  # the first step after a resume is shown at once
    assert [r["loss"] for r in rows[2:]] == [2.0, 3.0, (4 + 5 + 6 + 7) / 4]
    assert "eta" in capsys.readouterr().out
    state = log.state()
    assert state["train_s"] == 3.0 and rows[-1]["ms"] == 500 and 0.01 < state["peak_gb"] < 100
    assert T.Log(tmp_path, RUN, 8, 8, {"train_s": 100.0}).state()["train_s"] == 100
    with pytest.raises(InputError, match="term 'loss' at step 8: diverged, nothing was saved"):
        log(7, {"loss": math.nan}, 1e-3)


def test_mixed_order_gives_both_kinds_and_the_first_whatever_the_second():
    labelled, rest = [0, 10, 20], [k for k in range(30) if k % 10]
    order, alone = (T.MixedOrder.of(labelled, rest, 2, n, RUN, 0) for n in (1, 0))
    places = [[o.sample(p) for p in o.positions(step)] for o in (order, alone) for step in range(30)]
    assert all([known for _, known in step] == [True, True, False] for step in places[:30])
    assert {i for step in places for i, known in step if known} == set(labelled)
    assert {i for step in places[:30] for i, known in step if not known} <= set(rest)
    assert places[30:] == [step[:2] for step in places[:30]], "the same exposures without the second kind"
    draws = [o.generator(p).random() for o in (order, alone) for p in o.positions(7)[:2]]
    assert draws[:2] == draws[2:] and order.batch == 3 and order.steps(2) == 20 and alone.steps(2) == 3
    both = T.MixedOrder.of(labelled, [4, 5, 6], 1, 1, RUN, 0)
    slots = [[labelled.index(i) if known else i - 4 for i, known in map(both.sample, both.positions(step))] for step in range(30)]
    assert 0 < sum(a != b for a, b in slots) < 30, "two slots of as many samples have orders of their own"
    everything = T.MixedOrder.of(labelled, [], 1, 1, RUN, 0)
    assert all(a[0] != b[0] for a, b in (map(everything.sample, everything.positions(step)) for step in range(30)))
    assert {everything.sample(p) for step in range(9) for p in everything.positions(step)} == {
        (i, known) for i in labelled for known in (True, False)}


def test_peak_memory_is_of_this_run(tmp_path):
    if not os.access("/proc/self/clear_refs", os.W_OK):
        pytest.skip("the peak resident set can be reset on Linux only")
    T.reset_peak(RUN.device)
    before = T.peak_gb(RUN.device)
    block = np.ones(40_000_000)  # 0.32 GB
    assert T.peak_gb(RUN.device) > before + 0.3
    del block
    T.reset_peak(RUN.device)
    assert T.peak_gb(RUN.device) < before + 0.1


def result(folder: Path, **changes) -> dict:
    fields = dict(
        method="easyocc", preset="tiny", seed=0,
        dataset={"name": "synthetic", "version": "v", "split": "val", "frames": 3},
        protocol={"mask_eval": "camera"}, metrics={"miou_camera": np.float32(0.25), "rayiou": math.nan}, per_class={},
        cost={"params": 10, "steps": 5, "train_s": 1.0, "peak_gb": 0.5},
    )  # fmt: skip
    return T.write_result(folder, **(fields | changes))


def test_result_json_follows_the_contract(tmp_path):
    value = result(tmp_path)
    assert read_json(tmp_path / "result.json") == value
    assert list(value) == "method preset seed dataset protocol metrics per_class cost commit command".split()
    assert value["metrics"] == {"miou_camera": 0.25}  # an undefined score is left out, not NaN
    assert len(value["commit"].removesuffix("-dirty")) == 40 or value["commit"] == "unknown"


@pytest.mark.parametrize("changes, named", [
    (dict(metrics={"a": {"b": 1.0}}), "metric a is dict"), (dict(metrics={"a": True}), "metric a is bool"),
    (dict(metrics={"a": "1"}), "metric a is str"), (dict(protocol={}), "protocol"),
    (dict(dataset={"name": "x"}), "dataset needs frames, split, version"), (dict(cost={"params": 1}), "cost needs"),
])  # fmt: skip
def test_result_json_refuses_what_is_no_result(tmp_path, changes, named):
    with pytest.raises(ValueError, match=named):
        result(tmp_path, **changes)
    assert not (tmp_path / "result.json").exists()


def test_autocast_and_device():
    with T.autocast("cpu", "bf16"):
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.bfloat16
    with T.autocast("cpu", "off"):
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.float32
    with pytest.raises(ValueError, match="fp16"):
        T.autocast("cpu", "fp16")


@pytest.mark.gpu
def test_cuda_resume_restores_the_generator(tmp_path):
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    run = T.setup("cuda")
    net = nn.Linear(4, 3).to(run.device)
    optimizer = torch.optim.AdamW(net.parameters())
    torch.rand(3, device=run.device)
    T.save_checkpoint(tmp_path, run, net, optimizer, 1, {})
    want = torch.rand(5, device=run.device)
    T.load_checkpoint(tmp_path, net, optimizer, run)
    assert torch.equal(torch.rand(5, device=run.device), want)


if __name__ == "__main__":
    words = dict(zip(sys.argv[2::2], sys.argv[3::2], strict=True))
    chosen = {name: type(v)(words[f"--{name}"]) for name, v in asdict(Config()).items() if f"--{name}" in words}
    toy_train(Path(sys.argv[1]), replace(Config(), **chosen), kill_at=int(words.get("--kill-at", -1)), hard=True)


@pytest.mark.parametrize("rank", [0, 1])
def test_the_first_process_alone_keeps_full_tensors(rank, monkeypatch):
    """A sharded network is gathered tensor by tensor; the other processes keep their own shards."""
    shard = SimpleNamespace(full_tensor=lambda: torch.ones(4), to_local=lambda: torch.ones(2))
    monkeypatch.setattr(T.dist, "get_rank", lambda: rank)
    held = T.Unsharded(SimpleNamespace(state_dict=lambda: {"w": shard, "step": {"k": 3}})).state_dict()
    assert len(held["w"]) == (2 if rank else 4) and held["step"] == {"k": 3}
