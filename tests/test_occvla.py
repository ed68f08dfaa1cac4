"""OccVLA: occupancy stream, skipping, meta-actions, planner, losses, stages, verbs, bad input, real
samples."""

import contextlib
import io
import json
import math
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import commands
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from test_networks_occworld import label
from test_networks_paligemma import QUESTIONS, pictures
from test_report_planning import future_of, straight
from torch import nn

import occvla as O
from common import metrics as M
from common.audit import planning_truth
from common.files import read_json, write_json
from common.geometry import OCC3D, rig_offsets
from common.loose import write_example
from common.networks import paligemma as P
from common.nuscenes import CAMERAS, FREE, Boxes, NuScenesOccupancy
from common.report import planning
from common.report.occupancy import ground_truth
from common.train import Run

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared"
POSES, DRIVELM = SHARED / "real/nuscenes-poses", SHARED / "real/drivelm"
CPU, ONE = torch.device("cpu"), torch.zeros(1, dtype=torch.int64)
FIELDS = {"vlm": "toy", "vq": "toy", "image_size": (32, 32), "queries": 5, "occ_dim": 16, "occ_heads": 2,
          "vlm_train": ("vision", "projector", "language"),
          "plan_dim": 16, "plan_heads": 2, "questions": 3, "warmup": 1, "stage_batch": (1, 1, 1, 4)}
TINY = replace(O.PRESETS["tiny"], **FIELDS)
SMALL = [word for name, value in FIELDS.items() for word in
         ("--" + name.replace("_", "-"), *map(str, value if isinstance(value, tuple) else (value,)))]
PREFIXES = pytest.mark.parametrize("prefix", ["image", "image+prompt"])

run, fails = commands.of(O)


def network(seed: int = 0, **changes) -> O.OccVLA:
    """A small network with planner heads whose output layers are not zero."""
    torch.manual_seed(seed)
    net = O.build(replace(TINY, **changes))
    net.add_planner()
    for head in net.planner.values():
        nn.init.normal_(head.out[-1].weight, std=0.3)
        if head.correct is not None:
            nn.init.normal_(head.correct.weight, std=0.3)
    net.keep_best(None)
    return net.eval()


def states(last: torch.Tensor) -> P.States:
    """A pass that left these last states."""
    return P.States(last, 0, None, None, None)


def occupied(net: O.OccVLA, images: torch.Tensor | None = None) -> torch.Tensor:
    return net.occupy(net.occupancy_pass(net.vlm.encode(pictures() if images is None else images)))


def exchanges(net: O.OccVLA, answers=("yes", "3", "parked")) -> list[P.Exchange]:
    return [net.vlm.exchange(q, a) for q, a in zip(QUESTIONS, answers)]


def opened(flags: list) -> NuScenesOccupancy:
    return O.open_split(flags[1], None, None, TINY.image_size, flags[3])


@pytest.fixture(scope="module")
def drives(tmp_path_factory):
    """(root, flags) of one training and one validation scene of 8 keyframes: two of each have 3 s of
    future."""
    from data.driving import make_world

    base = tmp_path_factory.mktemp("drives")
    make_world(base / "w", seed=2, size="mini", scenes=2, keyframes=8, sweeps=0, camera_sweeps=0,
               image=(56, 100),
               workers=1)
    return base / "w", ["--data-root", base / "w", "--cache", base / "cache"]


@pytest.fixture(scope="module")
def trained(drives, tmp_path_factory):
    """A run of all four stages, three steps each."""
    out = tmp_path_factory.mktemp("run") / "x"
    run("train", *drives[1], "--out", out, "--steps", "3", *SMALL)
    return out


# --- 2.5 Occupancy stream -----------------------------------------------------------------------------------


def with_gradient(net: O.OccVLA) -> dict[str, list[bool]]:
    def some(module: nn.Module) -> bool:
        return any(p.grad is not None and p.grad.abs().sum() > 0 for p in module.parameters())

    host = net.vlm.net.model
    return {"vision": [some(m) for m in host.vision_tower.encoder.layers], "tokenizer": [some(net.tokenizer)],
            "projector": [some(host.multi_modal_projector)], "stream": [some(net.occupancy)],
            "language": [some(m) for m in host.language_model.layers]}


@PREFIXES
@pytest.mark.parametrize("changes", [{}, {"rig_bias": False, "occ_target": "latent"}, {"occ_every": 2}],
                         ids=str)
def test_occupancy_gradient_reaches_the_vlm(prefix, changes):
    """Into vision tower, projector and the language layers below the last read; not above it, not the
    tokenizer."""
    net = network(prefix=prefix, **changes).train()
    O.trainable(net, 1)
    sum(O.occupancy_loss(net, occupied(net), label(), label() < 255).values()).backward()
    found, last = with_gradient(net), net.occupancy.reads[-1]
    assert all(found["vision"] + found["projector"] + found["stream"]) and not any(found["tokenizer"])
    assert all(found["language"][:last]) and not any(found["language"][last:])


def test_eq4_attends_to_image_tokens_with_the_rigs_offsets():
    """One head by hand: softmax(LN Q W_q (LN H W_k + place)^T / sqrt(d) + bias) (LN H W_v + place)."""
    block = O.OccupancyBlock(6, 4, 1)
    q, visual, place, bias = (torch.randn(shape) for shape in ((1, 3, 4), (1, 5, 6), (5, 8), (1, 3, 5)))
    with torch.no_grad():
        for layer in (block.self_out, block.ffn[-1]):  # (4) alone
            layer.weight.zero_(), layer.bias.zero_()
        k, v = (block.key_value(block.visual_norm(visual)) + place)[0].chunk(2, -1)
        weight = (block.query(block.norms[1](q))[0] @ k.t() / 2 + bias[0]).softmax(-1)
        assert torch.allclose(block(q, visual, place, bias)[0], (q + block.out(weight @ v))[0], atol=1e-5)


@PREFIXES
def test_skipping_is_exact(prefix):
    """Stream on and off: text logits, generated text, waypoints equal to the last bit."""
    net = network(prefix=prefix)
    on, off = (O.predict(net, pictures()[0], QUESTIONS, None, stream) for stream in (True, False))
    assert (on.answers, on.free, on.thought, on.action) == (off.answers, off.free, off.thought, off.action)
    assert set(on.paths) == set(net.cfg.plan_inputs)
    assert all((on.paths[r] == off.paths[r]).all() for r in on.paths)
    assert (on.occupancy != FREE).any() and (off.occupancy == FREE).all()
    found = O.skipping(net, pictures()[0])
    assert found["skip_difference_text"] == found["skip_difference_path"] == 0
    assert found["plain_difference_text"] < 1e-5
    assert found["memory_on_over_plain"] > found["memory_off_over_plain"]


def test_the_stream_reads_the_joint_pass_as_the_prefix_alone():
    """prefix image: visual tokens do not change with what is asked, so both passes give one occupancy."""
    net = network()
    with torch.no_grad():
        seen = net.vlm.encode(pictures())
        joint = net.vlm.run(seen, net.vlm.stack(exchanges(net)[:1], CPU), ONE, hidden=True)
        assert torch.allclose(net.occupy(joint), occupied(net), atol=1e-5)


@PREFIXES
def test_occupancy_is_supervised_on_a_pass_that_answers(prefix):
    """The shared prefix, or the pass of a keyframe's first question; another question of it changes nothing."""
    net, images = network(prefix=prefix, occ_target="code"), torch.cat([pictures(), pictures(1)])
    packs = net.vlm.stack(exchanges(net) * 2, CPU)
    ids = torch.cat([label(), label(1)])
    batch = {"images": images, "packs": packs, "rows": torch.tensor([0, 0, 0, 1, 1, 1]), "ids": ids,
             "seen": ids < 255}
    with torch.no_grad():
        states = net.vlm.run(net.vlm.encode(images), packs[[0, 3]], torch.tensor([0, 1]), hidden=True)
        predicted = net.occupancy(states.hidden, states.mask)
        expected = O.occupancy_loss(net, predicted, ids, ids < 255)["code"]
        assert net(batch)["code"].item() == pytest.approx(expected.item(), rel=1e-4)


def test_queries_unfold_to_the_latents_cells():
    """A query's own f x f cells: perturbing query (i, j) after the blocks changes those alone."""
    net, q = network(), torch.randn(1, 25, 16)
    with torch.no_grad():
        base = net.occupancy.finish(q)
        q[0, 2 * 5 + 3] += 1
        changed = (net.occupancy.finish(q) - base).abs().sum((0, 1)) > 0
    expected = torch.zeros(25, 25, dtype=torch.bool)
    expected[10:15, 15:20] = True
    assert base.shape == (1, 32, 25, 25) and torch.equal(changed, expected)


def test_rig_offsets_point_where_the_camera_sees_the_cell():
    """A camera 1.5 m above the ego, looking forward: a cell straight ahead is nearest to the image's middle
    column, below the horizon; a cell behind is seen nowhere."""
    K, T = torch.tensor([[100.0, 0, 64], [0, 100, 64], [0, 0, 1]])[None], torch.eye(4)[None]
    T[0, :3, :3] = torch.tensor([[0.0, 0, 1], [-1, 0, 0], [0, -1, 0]])
    T[0, 2, 3] = 1.5
    offsets = rig_offsets(K, T, 128, 8, 25, OCC3D, heads=2).view(2, 25, 25, 8, 8)
    ahead = offsets[0, 15, 12]  # x = 9.6 m, y = 0: v = 64 + 100 * 1.5 / 9.6 = 79.6 px, row 4; u = 64
    row, column = divmod(int(ahead.argmax()), 8)
    assert row == 4 and column in (3, 4)
    left = offsets[0, 15, 14]  # y = 6.4 m left: u = 64 - 100 * 6.4 / 9.6 = -2.7: nearest column 0
    assert int(left.argmax()) % 8 == 0 and (offsets[:, 3, 12] == -6).all()  # behind
    assert (offsets[1, 15, 12].amax(0) == offsets[1, 15, 12].amin(0)).all()  # odd heads: every row alike


def test_occupancy_loss_leaves_out_what_no_camera_sees():
    net = network(l_lov=1.0)
    predicted, ids = occupied(net).detach(), label()
    seen = torch.zeros_like(ids, dtype=torch.bool)
    seen[:, 80:160, 40:120] = True  # cells 10..19 x 5..14 of 25
    base = O.occupancy_loss(net, predicted, ids, seen)
    hidden = ids.clone()
    hidden[:,
           :68] = 9  # elsewhere; the codes of seen cells may change with it, so only voxel terms are compared
    other = O.occupancy_loss(net, predicted, hidden, seen)
    assert other["voxel"] == base["voxel"] and other["lov"] == base["lov"]
    elsewhere = predicted.clone()
    elsewhere[:, :, :10], elsewhere[:, :, 20:] = 7.0, -3.0
    assert O.occupancy_loss(net, elsewhere, ids, seen)["code"] == base["code"]
    elsewhere[:, 3, 12, 8] += 1
    assert O.occupancy_loss(net, elsewhere, ids, seen)["code"] != base["code"]
    nothing = O.occupancy_loss(net, predicted, ids, torch.zeros_like(seen))
    assert all(value.item() == 0 for value in nothing.values())


def test_voxels_without_a_label_are_left_out():
    """255 in the tokenizer is no index; in its loss, and in the stream's, it counts for nothing."""
    net, ids = network().train(), label()
    ids[:, :, :60] = 255
    logits, quantized = net.tokenizer(ids)
    weight = torch.ones(FREE + 1)
    whole = O.tokenizer_loss(logits, quantized, ids, weight, net.tokenizer.sizes)["ce"]
    part = O.tokenizer_loss(logits[:, :, 60:], quantized, ids[:, :, 60:], weight, net.tokenizer.sizes)["ce"]
    assert whole.item() == pytest.approx(part.item(), rel=1e-5)
    terms = O.occupancy_loss(net, occupied(net), ids, ids != 255)
    assert all(value.isfinite() for value in terms.values())


@pytest.mark.parametrize("target, names", [("code", {"code"}), ("latent", {"latent"}), ("voxel", {"voxel"}),
                                           ("code+voxel", {"code", "voxel"})])
def test_eq6_targets(target, names):
    net, ids, seen = network(occ_target=target), label(), torch.ones(1, 200, 200, 16, dtype=torch.bool)
    assert set(O.occupancy_loss(net, occupied(net), ids, seen)) == names
    tokenizer, index = net.tokenizer, net.tokenizer.index(ids)
    perfect = F.one_hot(index, 32).movedim(-1, 1).float() * 60
    if target == "latent":
        perfect = tokenizer.quantizer.lookup(index)
    terms = O.occupancy_loss(net, perfect, ids, seen)
    assert all(terms[n].item() < 1e-6 for n in names - {"voxel"})
    if target == "code+voxel":  # one-hot logits decode to what the tokenizer itself rebuilds
        assert torch.allclose(net.latent(perfect), tokenizer.quantizer.lookup(index), atol=1e-5)
        rebuilt = tokenizer(ids)[0].argmax(-1)[0].to(torch.uint8)
        assert (net.ids(perfect)[0] == rebuilt).float().mean() > 0.999
        logits = torch.randn(1, 32, 25, 25, requires_grad=True)  # an argmax would have no gradient
        net.tokenizer.decode(net.latent(logits)).square().mean().backward()
        assert logits.grad.abs().sum() > 0


def test_first_network_is_balanced_and_knows_the_rig(drives, trained):
    """Weights of classes and codes are freq^-0.5, and the queries' attention starts from the calibration."""
    dataset = opened(drives[1])
    net = O.first_network(TINY, dataset, dataset.labels, trained / O.STAGES[0], O.OccVLA)
    assert net.class_weight[FREE] < net.class_weight[4] and len(net.code_weight.unique()) >= 2
    assert net.occupancy.bias.min() == -6 and net.occupancy.bias.max() > -1
    weights = load_file(next((trained / O.STAGES[0]).glob("**/model.safetensors")))
    assert torch.equal(weights["quantizer.codes"], net.tokenizer.quantizer.codes)


def test_network_protocol():
    net = network()
    features = net.voxels({"images": pictures()})
    assert net.grid == OCC3D and features.shape == (1, net.channels, 200, 200, 16)
    assert net.head(features).shape == (1, 18, 200, 200, 16)
    assert torch.equal(net.head(features).argmax(1)[0].to(torch.uint8), net.ids(occupied(net))[0])


# --- 2.6 Language -------------------------------------------------------------------------------------------


def test_eq8_counts_target_tokens_only():
    """A prompt's own words are never a target: with all but the answers' states replaced, the loss is the
    same."""
    net = network()
    net.stage = 2
    words = net.vlm.exchange(O.PLAN_PROMPT, "action: stop, straight", O.THOUGHT)
    pack = net.vlm.pack([*exchanges(net), words])[0][None]
    hidden = torch.randn(1, net.vlm.tokens + pack.shape[2], net.vlm.width)
    base = O.language_loss(net, states(hidden), pack, ONE, 1)
    used = torch.zeros(hidden.shape[1], dtype=torch.bool)
    used[pack[0, P.PREVIOUS, pack[0, P.KIND] > 0]] = True
    assert set(base) == {"qa", "cot"}
    assert used.sum() == (pack[0, P.KIND] > 0).sum()  # one place for every target
    other = torch.where(used[None, :, None], hidden, torch.randn_like(hidden))
    other = O.language_loss(net, states(other), pack, ONE, 1)
    assert {k: v.item() for k, v in other.items()} == pytest.approx({k: v.item() for k, v in base.items()})
    places = (pack[0, P.KIND] == P.QA).nonzero()[:, 0].tolist()
    assert len(places) == sum(len(e.answer) for e in exchanges(net))
    each = [F.cross_entropy(net.vlm.logits(hidden[0, pack[0, P.PREVIOUS, i]])[None],
                            pack[0, P.IDS, i][None]).item()
            for i in places]
    assert base["qa"].item() == pytest.approx(np.mean(each), rel=1e-5)


def test_keyframes_weigh_alike_however_many_questions_they_have():
    net = network()
    packs = P.stack_packs(net.vlm.pack(exchanges(net)[:1]) + net.vlm.pack(exchanges(net)), net.vlm.text.pad)
    hidden, rows = torch.randn(2, net.vlm.tokens + packs.shape[2], net.vlm.width), torch.tensor([0, 1])
    one = lambda k: O.language_loss(net, states(hidden[k : k + 1]), packs[k : k + 1], ONE, 1)  # noqa: E731
    each, both = [one(k)["qa"].item() for k in (0, 1)], O.language_loss(net, states(hidden), packs, rows, 2)
    assert both["qa"].item() == pytest.approx(np.mean(each), rel=1e-5)
    nothing = net.vlm.pack([net.vlm.exchange("x")])[0][None]
    assert O.language_loss(net, states(hidden[:1]), nothing, rows[:1], 1)["qa"].item() == 0


def arc(speed: float, degrees: float) -> np.ndarray:
    """Left for positive degrees over 3 s."""
    angle = np.radians(degrees) * (np.arange(6) + 0.5) / 6
    return np.cumsum(speed * 0.5 * np.stack([-np.sin(angle), np.cos(angle)], 1), 0)


def change_lane(side: int) -> np.ndarray:
    sideways = side * 3.5 * (1 - np.cos(np.pi * np.arange(1, 7) / 6)) / 2
    return np.stack([sideways, np.arange(1, 7) * 5.0], 1)


@pytest.mark.parametrize("path, expected", [
    (straight([8.0] * 6), ("keep", "straight")), (straight([8, 7, 6, 5, 4, 3]), ("decelerate", "straight")),
    (straight([8, 8.5, 9, 9.5, 10, 10.5]), ("accelerate", "straight")),
    (np.zeros((6, 2)), ("stop", "straight")),
    (straight([5, 4, 3, 1, 0.2, 0]), ("stop", "straight")), (arc(6, 40), ("keep", "left")),
    (straight([0, 0, 1, 2, 3, 4]), ("accelerate", "straight")), (arc(6, -40), ("keep", "right")),
    (arc(6, 8), ("keep", "straight")), (change_lane(-1), ("keep", "LC-left")),
    (change_lane(1), ("keep", "LC-right")),
])
def test_meta_action_by_the_stated_thresholds(path, expected):
    assert O.meta_action(future_of(path)) == expected
    assert O.meta_action(future_of(path, mask=5)) is None


def boxes(*rows) -> Boxes:
    """rows: (x, y, Occ3D id, category, attribute, LiDAR points)."""
    n, column = len(rows), lambda k: [row[k] for row in rows]
    center = np.array([[row[0], row[1], 0.5] for row in rows], np.float64).reshape(n, 3)
    return Boxes(center, np.ones((n, 3)), np.zeros(n), np.zeros((n, 2)), column(3),
                 np.array(column(2), np.uint8),
                 [""] * n, np.arange(n), np.array(column(5), np.int64), np.full(n, 4), column(4),
                 np.tile(np.eye(4), (n, 1, 1)))


def test_chain_of_thought_names_what_is_there():
    scene = boxes((12.0, 0.5, 4, "vehicle.car", "vehicle.moving", 9),
                  (30.0, 0.0, 10, "vehicle.truck", "vehicle.stopped", 9),
                  (9.0, 0.0, 3, "vehicle.bus.rigid", "vehicle.parked", 0),
                  (8.0, 5.0, 7, "human.pedestrian.adult", "pedestrian.moving", 3),
                  (6.0, -5.0, 2, "vehicle.bicycle", "cycle.with_rider", 3),
                  (-6.0, 0.0, 7, "human.pedestrian.adult", "pedestrian.moving", 3))
    left = ("keep", "left")
    assert O.thought(scene, left, True) == "ahead: moving car at 10 m; people near: 2; action: keep, left"
    assert O.thought(boxes(), ("stop", "straight"),
                     True) == "ahead: nothing; people near: 0; action: stop, straight"
    assert O.thought(scene, left, False) == "action: keep, left"


def test_meta_action_is_read_off_the_text():
    for a in O.LONGITUDINAL:
        for b in O.LATERAL:
            assert O.parse_action(O.thought_text("moving car", 10, 2, (a, b))) == (a, b)
    for text in ("", "ahead: nothing", "action: fly, left", "action: keep, left, and then some"):
        assert O.parse_action(text) is None


# --- 2.6 Planner --------------------------------------------------------------------------------------------


def paths_of(net: O.OccVLA, future) -> dict[str, np.ndarray]:
    return O.predict(net, pictures()[0], (), future).paths


def test_each_planner_row_sees_what_it_is_given_and_no_more():
    net = network()
    base = future_of(np.zeros((6, 2)), straight([4, 4, 4, 4, 0, 0])[:4] - [0, 8])
    bent = np.float32([[1, 2], [1, 2], [1, 2], [1, 1]])
    changed = {"command": base._replace(command=0), "tables' speed": base._replace(speed=9.0),
               "trajectory": base._replace(trajectory=base.trajectory + 5),
               "history": base._replace(history=base.history * bent + np.float32([0, 0.5]))}
    before, plans = paths_of(net, base), {name: paths_of(net, f) for name, f in changed.items()}
    for row in net.cfg.plan_inputs:
        for name in changed:
            given = row.replace("speed", "history").split("+")  # the speed is the history's last
            assert (plans[name][row] == before[row]).all() != (name in given), (row, name)


def test_no_past_no_history():
    """A scene's first keyframe: the files copy the history from the future, so a planner is not given it."""
    copied, net = straight([5] * 6)[:4] - [0, 12.5], network(plan_inputs=("history",))
    a, b = (paths_of(net, future_of(np.zeros((6, 2)), copied * k, known=0)) for k in (1, 3))
    assert (a["history"] == b["history"]).all()
    ego = planning.ego_of([future_of(np.zeros((6, 2)), copied, known=0)])
    assert ego.history.abs().sum() == 0 and not ego.known.any()


def test_the_recorded_action_is_never_read(monkeypatch):
    """Prediction plans from the generated meta-action, whatever the future holds."""
    net = network()
    clean = O.predict(net, pictures()[0], QUESTIONS, future_of(straight([5] * 6)))
    monkeypatch.setattr(O, "meta_action", lambda *a: ("stop", "left"))
    poisoned = O.predict(net, pictures()[0], QUESTIONS, future_of(arc(9, 60)))
    assert all((clean.paths[r] == poisoned.paths[r]).all() for r in clean.paths)
    assert clean.thought == poisoned.thought


def test_the_generated_meta_action_is_read_by_the_planner(monkeypatch):
    net, found = network(), {}
    for words in ("action: stop, left", "action: keep, straight", "gibberish"):
        monkeypatch.setattr(net.vlm, "generate", lambda *a, w=words, **k: [net.vlm.text.answer(w)])
        found[words] = O.predict(net, pictures()[0])
    assert found["action: stop, left"].action == ("stop", "left") and found["gibberish"].action is None
    a, b = (found[f"action: {x}"].paths["none"] for x in ("stop, left", "keep, straight"))
    assert not (a == b).all()
    context, valid = torch.randn(1, 9, net.vlm.width), torch.ones(1, 9, dtype=torch.bool)
    ego = planning.ego_of([planning.unknown_future()])
    with torch.no_grad():  # also with the same states: the head itself is given the action
        a, b = (net.plan(context, valid, [f"action: {x}, left"], ego)["none"] for x in ("stop", "keep"))
    assert not torch.equal(a, b)


def test_eq9_is_a_mean_over_known_waypoints():
    path, truth, known = torch.zeros(2, 6, 2), torch.zeros(2, 6, 2), torch.ones(2, 6, dtype=torch.bool)
    path[0, 0], path[0, 5], path[1, 2] = (torch.tensor(x) for x in ([3.0, 4.0], [60.0, 80.0], [1.0, -1.0]))
    known[0, 2:] = False
    assert O.planning_loss(path, truth, known).item() == pytest.approx((5 / 2 + 2**0.5 / 6) / 2, rel=2e-3)
    assert O.planning_loss(path, truth, known & False).item() == 0


def test_a_head_keeps_its_best_weights():
    """Only a smaller error of the held-out scenes replaces them; each head for itself; no scenes: always."""
    net, batch = network(plan_inputs=("none", "command")), planning_batch()
    net.keep_best(batch)
    kept = {row: head.error.item() for row, head in net.best.items()}
    assert all(math.isfinite(error) for error in kept.values())
    before = net.best["none"].out[-1].bias.clone()
    with torch.no_grad():
        net.planner["none"].out[-1].bias += 100
        net.planner["command"].mean += (batch["path"] - net.eval().plan(
            *net.plan_context(net.encode(batch["images"])), batch["ego"], net.planner)["command"])[0]
    net.keep_best(batch)
    assert torch.equal(net.best["none"].out[-1].bias, before)
    assert net.best["none"].error.item() == kept["none"]
    assert net.best["command"].error < 0.01 < kept["command"]
    net.keep_best(None)
    assert torch.equal(net.best["none"].out[-1].bias, net.planner["none"].out[-1].bias)


def test_planner_starts_from_the_simple_guess(drives):
    """Before its first step a head predicts the mean training path, or where history is known, driving on."""
    dataset, net = opened(drives[1]), O.build(TINY)
    futures = [dataset.future(i) for i in range(len(dataset))]
    net.add_planner(futures)
    known = np.stack([f.mask for f in futures])[..., None]
    mean = (np.stack([f.trajectory for f in futures]) * known).sum(0) / known.sum(0).clip(1)
    found = paths_of(net.eval(), futures[3])
    np.testing.assert_allclose(found["none"], mean, atol=1e-4)
    np.testing.assert_allclose(found["history"], np.arange(1, 7)[:, None] * -futures[3].history[-1],
                               atol=1e-4)
    np.testing.assert_allclose(paths_of(net, futures[0])["history"], mean, atol=1e-4)


# --- 4 Stages and data --------------------------------------------------------------------------------------


@pytest.mark.parametrize("changes, stage, wanted", [
    ({}, 1, {"vlm", "occupancy"}), ({}, 2, {"vlm", "occupancy"}), ({}, 3, {"planner"}),
    ({"lambda_occ": 0.0}, 1, {"vlm"}), ({"vlm_train": ("projector",), "lambda_occ": 0.0}, 1, {"vlm"})])
def test_stages_train_what_they_name(changes, stage, wanted):
    net = network(**changes)
    O.trainable(net, stage)
    learn = [n for n, p in net.named_parameters() if p.requires_grad]
    assert {n.split(".")[0] for n in learn} == wanted
    if "vlm_train" in changes:
        assert all("multi_modal_projector" in n for n in learn)


def planning_batch() -> dict:
    return {"images": pictures(), "ego": planning.ego_of([planning.unknown_future()]), "inputs": None,
            "path": torch.ones(1, 6, 2), "known": torch.ones(1, 6, dtype=torch.bool)}


def test_planning_stage_leaves_the_vlm_alone():
    net = network().train()
    net.stage = 3
    O.trainable(net, 3)
    before, optimizer = {n: p.clone() for n, p in net.named_parameters()}, O.make_optimizer(net, 3, net.cfg)
    sum(net(planning_batch()).values()).backward()
    assert not any(any(v) for v in with_gradient(net).values())
    optimizer.step()
    moved = {n.split(".")[0] for n, p in net.named_parameters() if not torch.equal(p, before[n])}
    assert moved == {"planner"}


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_each_part_learns_at_its_own_rate(optimizer):
    """Every parameter once; vision and projector at lr_vision, language at lr_vlm, the stream at the
    stage's."""
    net = network()
    cfg = replace(TINY, optimizer=optimizer, lr_vision=1e-4, lr_vlm=2e-4, stage_lr=(1, 3e-4, 1, 1))
    groups = O.make_optimizer(net, 1, cfg).param_groups
    rate = {id(p): g["base_lr"] for g in groups for p in g["params"]}
    learn = [n for n, _ in net.named_parameters() if not n.startswith("best.")]
    assert len(rate) == sum(len(g["params"]) for g in groups) == len(learn)
    host = net.vlm.net.model
    for part, lr in ((host.vision_tower, 1e-4), (host.multi_modal_projector, 1e-4),
                     (host.language_model, 2e-4),
                     (net.occupancy, 3e-4)):
        assert {rate[id(p)] for p in part.parameters()} == {lr}
    if optimizer == "muon":
        plain = {id(p) for g in groups if not g["orthogonal"] for p in g["params"]}
        assert id(net.vlm.net.lm_head.weight) in plain
        assert id(host.language_model.layers[0].mlp.up_proj.weight) not in plain


def test_one_keyframe_is_learned_by_heart(drives, monkeypatch):
    """Stage 2 on a single keyframe: occupancy, answers and chain of thought."""
    monkeypatch.setitem(P.SIZES, "toy", (P.SIZES["toy"][0]._replace(width=32), 0))
    torch.manual_seed(0)
    cfg = replace(TINY, occ_dim=32, questions=4, occ_target="code", lr_vlm=2e-2, mirror=False,
                  stage_lr=(1, 1, 2e-2, 1))
    net, dataset = O.build(cfg), opened(drives[1])
    net.stage = 2
    O.trainable(net, 2)
    keyframes = O.Keyframes(dataset, ground_truth(dataset), cfg, net.vlm, 2, [0])
    item = keyframes(0, np.random.default_rng(0))
    batch, optimizer, rows = keyframes.collate([item], CPU), O.make_optimizer(net, 2, cfg), []
    for step in range(60):
        O.set_lr(optimizer, O.schedule(step, 60, "cosine", 5))
        terms = net(batch)
        optimizer.zero_grad()
        sum(terms.values()).backward()
        optimizer.step()
        rows.append({k: v.item() for k, v in terms.items()})
    assert set(rows[0]) == {"qa", "cot", "code"}
    assert all(rows[-1][k] < 0.35 * rows[0][k] for k in rows[0]), (rows[0], rows[-1])
    written = O.predict(net.eval(), item["images"]).thought
    future = dataset.future(0)
    assert written and O.thought(dataset.boxes(0), O.meta_action(future), True).startswith(written)


def test_official_files_may_count_in_numbers(drives):
    """NuScenes-QA's loader turns every answer into text; so do we."""
    net, dataset = network(), opened(drives[1])
    dataset.questions = lambda i: [{"question": "How many cars are there?", "answer": 3}]
    pack = O.Keyframes(dataset, None, net.cfg, net.vlm, 1, [0])(0, np.random.default_rng(0))["packs"][0]
    assert net.vlm.text.decode(pack[P.IDS, pack[P.KIND] == P.QA].tolist()) == "3"
    assert f"{len(dataset)} questions" in planning.check_questions(dataset)


def test_a_mirrored_keyframe_is_mirrored_throughout(drives, tmp_path):
    """Images, cameras, words, labels and plans; what is cached is what the tower makes of these images."""
    dataset, cfg = opened(drives[1]), replace(TINY, vlm_train=("projector",), mirror=True)
    net = O.build(cfg).eval()
    left, right = CAMERAS.index("CAM_FRONT_LEFT"), CAMERAS.index("CAM_FRONT_RIGHT")
    images, other = (O.read_images(dataset, 2, 1, flip) for flip in (False, True))
    assert torch.equal(other[left], images[right].flip(-1))
    assert torch.equal(other.flip(-1)[planning.MIRRORED], images)
    run_ = SimpleNamespace(run=Run(0, 1, CPU, True))
    for _ in range(2):  # made, then read
        seen = O.cached_sight(net, dataset, run_)
    with torch.no_grad():
        again = net.vlm.see(torch.stack([images, other]))
    assert torch.allclose(torch.from_numpy(seen[2]).float(), again, atol=5e-3)
    assert O.cached_sight(net.cfg and O.build(replace(cfg, vlm_train=("vision",))), dataset, run_) is None
    keyframes = O.Keyframes(dataset, None, cfg, net.vlm, 3, [0, 1, 2], seen)
    plain, flipped = (keyframes.read(2, flip)["future"] for flip in (False, True))
    np.testing.assert_array_equal(plain.trajectory * [-1, 1], flipped.trajectory)
    assert planning.mirrored_words("the car to the front left: LC-right, left") == \
        "the car to the front right: LC-left, right"
    assert planning.mirrored_future(plain._replace(command=0)).command == 1


def test_scenes_are_held_out():
    kept, held = planning.hold_out([f"s{k // 3}" for k in range(60)], 60)
    assert held == [15, 16, 17, 45, 46, 47] and sorted(kept + held) == list(range(60))
    assert planning.hold_out([], 60) == (list(range(60)), [])


def test_adapters_let_the_occupancy_teach_a_frozen_language_model():
    """LoRA: nothing changes at first, and without it no gradient reaches the language model's own layers."""
    plain = network(vlm_train=("projector",), prefix="image+prompt")
    net = network(vlm_train=("projector",), prefix="image+prompt", lora=2)
    inside = lambda k: k.replace("_proj.weight", "_proj.base.weight") if ".layers." in k else k  # noqa: E731
    weights = {inside(k) if "language_model" in k else k: v for k, v in plain.state_dict().items()}
    missing, _ = net.load_state_dict(weights, strict=False)
    assert missing and all(".up." in name or ".down." in name for name in missing)
    assert torch.equal(occupied(plain), occupied(net))
    O.trainable(net.train(), 1)
    sum(O.occupancy_loss(net, occupied(net), label(), label() < 255).values()).backward()
    learned = {n for n, p in net.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    assert any("language_model.layers.0" in n and ".up." in n for n in learned)
    assert not any("language_model" in n and ".up." not in n and ".down." not in n for n in learned)


def test_two_frames_double_the_image_tokens(drives):
    dataset, net = opened(drives[1]), network(n_frames=2)
    both, first = O.read_images(dataset, 3, 2), O.read_images(dataset, 0, 2)
    assert both.shape == (12, 3, 32, 32) and torch.equal(both[:6], torch.from_numpy(dataset.images(3)))
    assert torch.equal(both[6:], torch.from_numpy(dataset.images(2)))
    assert torch.equal(first[6:], first[:6])  # a scene's first keyframe: its own images again
    assert net.vlm.tokens == 2 * network().vlm.tokens
    assert O.predict(net, both, QUESTIONS[:1]).occupancy.shape == (200, 200, 16)


# --- 4 Train ------------------------------------------------------------------------------------------------


def lines_of(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def test_train_runs_its_four_stages(trained):
    terms = {"0_tokenizer": {"ce", "vq"}, "1_occupancy": {"qa", "code", "voxel"},
             "2_language": {"qa", "cot", "code", "voxel"}, "3_planning": set(TINY.plan_inputs)}
    for stage, names in terms.items():
        last = lines_of(trained / stage)[-1]
        assert names <= set(last) and last["step"] == 3 and math.isfinite(last["loss"])
        assert list((trained / stage).glob("**/*.safetensors"))
        assert not list((trained / stage).glob("**/*.pt"))
    assert (trained / "0_host" / "config.json").is_file()


def test_train_counts_scenes_too_short_for_three_seconds(drives, capsys):
    """Eight keyframes a scene: two have 3 s of future, five a part of it, the last none: masked, counted,
    kept."""
    dataset = opened(drives[1])
    text = planning.check_questions(dataset)
    assert text.startswith("mini_train: 8 keyframes,")
    assert "2 with a full 3 s of future (they teach the chain of thought), 5 with a part of it" in text
    keyframes = O.Keyframes(dataset, None, TINY, network().vlm, 3, range(len(dataset)))
    batch = keyframes.collate([keyframes(i, np.random.default_rng(0)) for i in range(8)], CPU)
    assert batch["known"].sum(1).tolist() == [6, 6, 5, 4, 3, 2, 1, 0]


def same_weights(one: Path, two: Path) -> bool:
    files = [sorted(p.relative_to(f) for p in f.glob("**/*.safetensors")) for f in (one, two)]
    assert files[0] == files[1] and files[0]
    return all((one / name).read_bytes() == (two / name).read_bytes() for name in files[0])


@pytest.mark.parametrize("stop", [0, 1, 2, 3])
def test_resume_is_bit_equal(drives, trained, tmp_path, stop, monkeypatch):
    """Killed in the middle of a stage, the same command ends with the same bytes."""
    from common import train

    shutil.copytree(trained, tmp_path / "x")
    for stage in O.STAGES[stop:]:
        shutil.rmtree(tmp_path / "x" / stage)
    real, saves = train.save_checkpoint, []

    def killed(out, *args, **kwargs):
        real(out, *args, **kwargs)
        saves.append(out)
        if out.name == O.STAGES[stop] and saves.count(out) == 2:
            raise KeyboardInterrupt

    words = ["train", *drives[1], "--out", tmp_path / "x", "--steps", "3", *SMALL]
    monkeypatch.setattr(train, "save_checkpoint", killed)
    with pytest.raises(KeyboardInterrupt):
        run(*words)
    monkeypatch.undo()
    run(*words)
    for stage in O.STAGES[stop:]:
        assert same_weights(tmp_path / "x" / stage, trained / stage)
        assert commands.losses(tmp_path / "x" / stage) == commands.losses(trained / stage)


def test_labels_of_another_source_supervise(drives, tmp_path):
    """--labels L: tokenizer and stream learn from L's occupancy, not from the tree's ground truth."""
    dataset = opened(drives[1])
    semantics = np.full((200, 200, 16), FREE, np.uint8)
    semantics[:, :, 0] = 11
    mask = np.ones_like(semantics)
    for i, token in enumerate(dataset.tokens):
        folder = tmp_path / "l" / dataset.scene_names[i] / token
        folder.mkdir(parents=True)
        np.savez(folder / "labels.npz", semantics=semantics, mask_camera=mask, mask_lidar=mask)
    ids, seen = O.read_truth(ground_truth(dataset, tmp_path / "l"), 0)
    assert (ids[:, :, 0] == 11).all() and (ids[:, :, 1:] == FREE).all() and seen.all()
    run("train", *drives[1], "--labels", tmp_path / "l", "--out", tmp_path / "x", "--steps", "1", *SMALL)
    assert read_json(tmp_path / "x" / "1_occupancy" / "config.json")["data"]["labels"].endswith("/l")


def test_stage_zero_may_be_given(drives, trained, tmp_path, capsys):
    words = ["train", *drives[1], "--out", tmp_path / "x", "--steps", "1", *SMALL, "--tokenizer"]
    run(*words, trained / O.STAGES[0])
    assert not (tmp_path / "x" / "0_tokenizer").exists()
    a, b = (load_file(next(folder.glob("**/model.safetensors")))
            for folder in (trained / "0_tokenizer", tmp_path / "x" / "3_planning"))
    assert all(torch.equal(value, b[f"tokenizer.{name}"]) for name, value in a.items() if "idle" not in name)
    for folder, more, message in ((trained / O.STAGES[0], ("--vq", "tiny"), "another architecture"),
                                  (tmp_path / "nothing", (), "no checkpoint there")):
        shutil.rmtree(tmp_path / "x")
        assert message in fails(capsys, *words, folder, *more)


def test_two_processes_with_shards_equal_one_with_the_doubled_batch(drives, trained, tmp_path):
    words = [*drives[1], *SMALL, "--steps", "4", "--tokenizer", trained / O.STAGES[0], "--optimizer", "adamw",
             "--lr-vlm", "1e-3", "--stage-lr", "1e-3", "1e-3", "1e-3", "1e-3"]
    done = commands.torchrun("occvla.py", "train", *words, "--out", tmp_path / "two", "--stage-batch", 1, 1, 1, 2, "--fsdp")
    assert done.returncode == 0, done.stderr[-3000:]
    run("train", *words, "--out", tmp_path / "one", "--stage-batch", "2", "2", "2", "4")
    for stage in O.STAGES[1:]:
        one, two = (commands.losses(tmp_path / name / stage) for name in ("one", "two"))
        assert one == pytest.approx(two, rel=2e-3), stage


# --- 6 Verbs ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def evaluated(drives, trained, tmp_path_factory):
    """(result.json, what eval printed, folder of predictions)"""
    pred, out = tmp_path_factory.mktemp("pred"), io.StringIO()
    with contextlib.redirect_stdout(out):
        run("eval", "--ckpt", trained, "--save-pred", pred, *drives[1][2:], "--eval-frames", "3",
            "--pictures", "1")
    return read_json(trained / "3_planning" / "result.json"), out.getvalue(), pred


def test_eval_scores_everything_beside_its_controls(evaluated):
    result, text, _ = evaluated
    metrics, protocol = result["metrics"], result["protocol"]
    kinds = {f"qa_{kind}" for kind in ("accuracy", *planning.TYPES)}
    expected = kinds | {f"{arm}_{k}" for arm in ("ngram", "shuffled", "skipped", "constant") for k in kinds}
    rows = ("", "none_", "command_", "history_", "command+history_")
    rows += tuple(f"{b}_" for b in planning.Baselines.NAMES)
    expected |= {f"{row}{m}_{s}s_{protocol}" for row in rows for m in ("l2", "obj_box_col") for s in (1, 2, 3)
                 for protocol in ("uniad", "stp3", "vad")}
    expected |= {f"{mask}_{m}" for mask in ("miou", "iou") for m in ("camera", "lidar", "both", "none")}
    expected |= {"vq_miou", "vq_codes_used", "meta_parsed", "free_qa_accuracy", "shuffled_l2_avg_vad",
                 "rayiou@1", "l2_avg_shuffled", "l2_avg_mean_trajectory", "l2_avg_ego_mlp",
                 "l2_avg_speed_trees",
                 "l2_avg_uniad", "l2_avg_uniad_masked",
                 "skipped_l2_avg_vad", "constant_miou_camera", "constant_iou_camera", "l2_avg", "col_avg",
                 "minus_l2", "qa_types_over_shuffled", "plain_difference_text", "prefill_off_over_plain"}
    assert not expected - set(metrics), expected - set(metrics)
    assert any(k.startswith("qa_") and k.endswith(("_h0", "_h1")) for k in metrics)
    assert all(metrics[f"skip_{k}"] == 0 for k in ("changed_answers", "changed_l2", "difference_text",
                                                  "difference_path"))
    assert metrics["skipped_qa_accuracy"] == metrics["qa_accuracy"]
    assert metrics["skipped_l2_avg_vad"] == metrics["l2_avg_vad"]
    assert protocol["planner_given"] == "speed+command, none, command, history, command+history"
    assert "full 3 s" in protocol["planning"]
    assert protocol["meta_action"] == "generated" and "future" in protocol["command"]
    for line in ("===> mIoU of 3 samples:", "best constant of the type", "another scene's images",
                 "n-grams of the words",
                 "constant turn rate",
                 "ego-history MLP", "mean per command", "logits differ by 0, waypoints by 0 m",
                 "over the plain VLM: prefill", "without any"):
        assert line in text, line
    assert all(isinstance(v, (int, float)) for v in metrics.values()) and result["cost"]["steps"] == 12


def test_eval_draws_a_sheet_a_viewer_and_curves(evaluated, trained):
    from PIL import Image

    out = trained / "3_planning"
    sheets = [p for p in (out / "pictures").glob("*.png") if p.name != "curves.png"]
    assert len(sheets) == 1 and Image.open(sheets[0]).size[0] > 1000
    assert (out / "viewer.html").stat().st_size > 10_000 and (out / "pictures" / "curves.png").is_file()


def test_saved_predictions_are_what_was_scored(evaluated, drives):
    """The repository's own auditor finds eval's numbers in the saved files."""
    result, _, pred = evaluated
    dataset = NuScenesOccupancy(drives[0], split="mini_val", cache=drives[1][3], parts=())
    files = sorted(pred.glob("*.npz"))
    assert len(files) == result["dataset"]["frames"] == 3
    meter, plans = M.OccupancyMeter(), M.PlanningMeter()
    for path in files:
        i, arrays = dataset.index(path.stem), np.load(path)
        meter.add(arrays["pred"], *dataset.labels(i))
        if dataset.future(i).mask.any():
            truth = planning_truth(dataset, i)
            plans.add(arrays["trajectory"], truth[0].astype(np.float64), truth[1], truth[2])
    assert meter.metrics()["miou_camera"] == pytest.approx(result["metrics"]["miou_camera"])
    assert plans.metrics()["l2_3s_uniad"] == pytest.approx(result["metrics"]["l2_3s_uniad_masked"])


def test_eval_scores_earlier_stages(evaluated, drives, trained, capsys):
    assert "not a stage of a run with a VLM" in fails(capsys, "eval", "--ckpt", trained / "0_tokenizer")
    run("eval", "--ckpt", trained / "1_occupancy", *drives[1][2:], "--eval-frames", "1", "--no-rayiou",
        "--pictures", "0", "--eval-questions", "2")
    text = capsys.readouterr().out
    assert "planning: not scored" in text and "best constant of the type" in text
    assert read_json(trained / "3_planning" / "result.json") == evaluated[0]  # its own folder each


def test_predict_needs_no_ground_truth(drives, trained, tmp_path, capsys):
    shutil.copytree(drives[0], tmp_path / "w")
    shutil.rmtree(tmp_path / "w" / "gts")
    run("predict", "--ckpt", trained, "--data-root", tmp_path / "w", "--out", tmp_path / "p", "--eval-frames",
        "2", "--pictures", "1")
    assert len(list((tmp_path / "p").glob("*.npz"))) == 2 and (tmp_path / "p" / "viewer.html").is_file()
    dataset = NuScenesOccupancy(tmp_path / "w", split="all", cache=tmp_path / "c")
    words = write_example(dataset, 0, tmp_path / "c.json")
    run("predict", "--ckpt", trained, "--out", tmp_path / "q", *words)
    (saved,) = (tmp_path / "q").glob("*.npz")
    assert np.load(saved)["pred"].shape == (200, 200, 16) and (tmp_path / "q" / "viewer.html").is_file()
    del words[1]
    write_json(tmp_path / "c.json", {"cameras": read_json(tmp_path / "c.json")["cameras"][:5]})
    assert "expected 6" in fails(capsys, "predict", "--ckpt", trained, "--out", tmp_path / "q", *words)


def test_an_arm_without_occupancy_is_scored_without_labels(drives, trained, tmp_path, capsys):
    shutil.copytree(drives[0], tmp_path / "w")
    shutil.rmtree(tmp_path / "w" / "gts")
    shutil.copytree(trained, tmp_path / "x")
    words = ["eval", "--ckpt", tmp_path / "x", "--data-root", tmp_path / "w", "--cache", tmp_path / "cache",
             "--eval-frames", "1", "--no-rayiou", "--pictures", "0", "--eval-questions", "2"]
    assert "gts" in fails(capsys, *words)  # this one predicts occupancy
    path = tmp_path / "x" / "3_planning" / "config.json"
    content = read_json(path)
    content["config"]["lambda_occ"] = 0.0
    write_json(path, content)
    run(*words)
    assert "occupancy: not scored" in capsys.readouterr().out
    metrics = read_json(path.with_name("result.json"))["metrics"]
    assert "l2_avg" in metrics and not {"miou_camera", "iou_camera", "vq_miou"} & set(metrics)


def test_baselines_print_meta_actions_beside_speeds(drives, capsys):
    run("baselines", *drives[1])
    text = capsys.readouterr().out
    assert text.count("no full 3 s of future") == 6 and "v1.0-mini mini_val: 2 of 8 keyframes" in text
    assert all(name in text for name in planning.Baselines.NAMES.values())


def test_describe_the_paper_at_its_true_size(capsys):
    run("describe", "--preset", "paper")
    rows = {line.split("  ")[0]: line for line in capsys.readouterr().out.splitlines()}
    assert any("1536 image tokens a keyframe" in line and "codes 50x50" in line for line in rows.values())
    millions = {name: float(line[20:].split()[0]) for name, line in rows.items() if " M " in line}
    assert 2900 < millions["vision"] + millions["language"] < 3100
    assert millions["stage 1_occupancy"] > 3000 > 0.1 * 3000 > millions["stage 3_planning"]
    assert float(rows["stage 1_occupancy"].split()[-4]) > 45  # GB: weights, gradients, two moments


def test_ask_through_a_saved_paligemma(drives, tmp_path, capsys):
    """--vlm PATH: from_pretrained with its processor, a step of each stage, resume, then any six images."""
    torch.manual_seed(5)
    host, folder = P.random_host(P.SIZES["toy"][0], ["Are there any buses?"]), tmp_path / "paligemma2-toy"
    host.net.save_pretrained(folder)
    host.processor.save_pretrained(folder)
    words = ["train", *drives[1], "--steps", "2", *SMALL, "--vlm", folder, "--prefix", "image+prompt",
             "--amp", "bf16",
             "--checkpointing", "--out"]  # as the paper's preset
    out = tmp_path / "x"
    run(*words, out)
    shutil.copytree(out, tmp_path / "y")
    shutil.rmtree(tmp_path / "y" / "3_planning")
    run(*words, tmp_path / "y", "--resume")
    assert same_weights(out / "3_planning", tmp_path / "y" / "3_planning")
    folder.rename(tmp_path / "moved")  # a finished run needs the folder no more
    capsys.readouterr()
    run("ask", "--ckpt", out, "--images", *image_files(drives[0]), "--question", "Are there any buses?")
    text = capsys.readouterr().out
    assert text.startswith("question  Are there any buses?\nanswer    ") and "thought   " in text
    assert text.count("(") >= 7


def image_files(root: Path) -> list[str]:
    return [str(sorted((root / "samples" / name).glob("*.jpg"))[0]) for name in CAMERAS]


# --- 7 Bad input: one clear line each -----------------------------------------------------------------------


def copied_world(drives, tmp_path) -> tuple[Path, list]:
    shutil.copytree(drives[0], tmp_path / "w")
    return tmp_path / "w", ["--data-root", tmp_path / "w", "--cache", tmp_path / "cache"]


def test_an_answer_outside_the_vocabulary(drives, tmp_path, capsys):
    root, flags = copied_world(drives, tmp_path)
    path = root / "questions" / "NuScenes_train_questions.json"
    content = read_json(path)
    content["questions"][2]["answer"] = "a red dragon"
    write_json(path, content)
    line = fails(capsys, "train", *flags, "--out", tmp_path / "x", "--steps", "1", *SMALL)
    assert "'a red dragon'" in line and content["questions"][2]["sample_token"] in line and "thirty" in line


@pytest.mark.parametrize("words, message", [
    (["--plan-inputs", "lidar"], "lidar"), (["--queries", "7"], "must divide the latent's 25 cells"),
    (["--stage-batch", "1", "1"], "expected 4 values"), (["--vlm-train", "planner"], "planner"),
    (["--occ-every", "9"], "the language model has"), (["--occ-heads", "3"], "must divide --occ-dim"),
    (["--vq", "huge"], "--vq huge"), (["--fsdp"], "--optimizer adamw"),
])
def test_contradicting_flags(words, message, drives, tmp_path, capsys):
    line = fails(capsys, "train", *drives[1], "--out", tmp_path / "x", "--steps", "1", *SMALL, *words)
    assert message in line


# --- 5 Real input -------------------------------------------------------------------------------------------


@pytest.mark.skipif(not POSES.is_dir(), reason="shared/real/nuscenes-poses absent")
def test_real_poses_are_scored_as_by_hand(tmp_path, capsys):
    """40 real keyframes (tests/test_nuscenes.py compares their futures): constant velocity's L2 by VAD's
    rule.
    """
    expected = np.load(POSES / "expected.npz")
    run("baselines", "--data-root", POSES, "--split", "mini_val", "--cache", tmp_path)
    text = capsys.readouterr().out
    assert "34 of 40 keyframes with a full 3 s of future" in text
    row = next(line for line in text.splitlines() if "constant velocity, VAD's history" in line).split()[-9:]
    full = expected["gt_ego_fut_masks"].all(1)
    driven = expected["gt_ego_fut_trajs"].cumsum(1)[full]
    ahead = np.arange(1, 7)[:, None] * expected["gt_ego_his_trajs"][full][:, -1:]
    error = np.linalg.norm(ahead - driven, axis=2).mean(0)  # (6,) [m]
    assert [float(x) for x in row[:3]] == pytest.approx([error[: 2 * s].mean() for s in (1, 2, 3)], abs=0.006)


@pytest.mark.skipif(not DRIVELM.is_dir(), reason="shared/real/drivelm absent")
def test_drivelms_keyframes_and_questions_run(trained, capsys):
    asked = planning.read_drivelm(DRIVELM / "qa/test_eval.json")
    images = network().vlm.text.pixels(asked[0].images)
    assert images.shape == (6, 3, 32, 32) and 0 <= images.min() < images.max() <= 1
    run("ask", "--ckpt", trained, "--drivelm", DRIVELM / "qa/test_eval.json")
    text, questions = capsys.readouterr().out, [q for frame in asked for q, _ in frame.questions]
    assert text.count("question  ") == text.count("answer    ") == len(questions) and questions[0] in text
    assert text.count("thought   ") == len(asked) == text.count("waypoints")


@pytest.mark.skipif(not (SHARED / "real/nuscenes_qa").is_dir(), reason="shared/real/nuscenes_qa absent")
def test_answers_are_nuscenes_qas_thirty():
    content = read_json(SHARED / "real/nuscenes_qa/answer_dict.json")
    words = content[0] if isinstance(content, list) else content  # answer -> index, then the reverse
    assert set(words) >= set(O.ANSWERS) and len(set(words) & set(O.ANSWERS)) == 30
