"""OccVLA's experiments: claims, the two-way and no-gradient networks, shared stages."""

from dataclasses import replace

import commands
import pytest
import torch
from test_networks_occworld import label
from test_networks_paligemma import pictures
from test_occvla import CPU, SMALL, TINY, drives, exchanges, occupied, with_gradient  # noqa: F401

import occvla as O
from common import cli
from common.files import read_json
from common.networks.paligemma import States
from common.report import planning
from experiments import occvla as X

run, fails = commands.of(O)


def network(kind: str, **changes) -> O.OccVLA:
    torch.manual_seed(0)
    net = O.build(replace(TINY, **changes), network=X.NETWORKS[kind])
    net.add_planner()
    return net


def test_claims_cover_the_paper():
    names = ["supervision", "grid", "ceiling", "start", "lambda", "ego", "target", "labels", "two-way",
             "frames"]
    assert list(X.CLAIMS) == names and X.CLAIMS["supervision"].seeds == 3
    fields = cli.to_dict(TINY).keys()
    for claim in X.CLAIMS.values():
        for overrides in claim.arms.values():
            replace(TINY, **{k: v for k, v in overrides.items() if k in fields})
            assert {k for k in overrides if k not in fields} <= X.FLAGS.keys()
    metrics = {p[2] for p in X.CLAIMS["supervision"].pairs}
    assert {"minus_l2", "minus_col", "qa_balanced_depth", "qa_balanced_bearing"} == metrics
    assert len(X.CLAIMS["grid"].arms) == 4  # occupancy supervision x chain of thought
    for name in ("supervision", "grid", "lambda", "target"):
        gates = {gate.name: gate for gate in X.CLAIMS[name].gates}
        assert len(gates) == 4 and gates["own minus another scene's images"].than == 0.2, name


def test_no_gradient_reaches_the_vlm():
    net = network("no-gradient").train()
    O.trainable(net, 1)
    sum(O.occupancy_loss(net, occupied(net), label(), label() < 255).values()).backward()
    found = with_gradient(net)
    assert all(found["stream"]) and not any(found["vision"] + found["projector"] + found["language"])


@pytest.mark.parametrize("prefix", ["image", "image+prompt"])
def test_two_way_text_reads_and_teaches_the_queries(prefix):
    """With open gates the answers change and teach the stream; the occupancy is the one-way stream's."""
    net, plain = network("two-way", prefix=prefix), network("one-way", prefix=prefix)
    plain.load_state_dict(net.state_dict(), strict=False)
    packs = net.vlm.stack(exchanges(net), CPU)
    rows = torch.zeros(len(packs), dtype=torch.int64)
    with torch.no_grad():
        one = plain.vlm.run(plain.vlm.encode(pictures()), packs, rows).last
        assert torch.allclose(net.vlm.run(net.vlm.encode(pictures()), packs, rows).last, one, atol=1e-5)
        assert torch.allclose(occupied(net), occupied(plain), atol=1e-4)  # gates are closed
        net.occupancy.two_way.gate.fill_(0.5)
    O.trainable(net.train(), 1)
    last = net.vlm.run(net.vlm.encode(pictures()), packs, rows).last
    assert (last - one).abs().max() > 1e-3
    O.language_loss(net, States(last, 0, None, None, None), packs, rows, 1)["qa"].backward()
    assert all(with_gradient(net)["stream"]) and net.occupancy.two_way.gate.grad.abs().min() > 0


@pytest.mark.parametrize("prefix", ["image", "image+prompt"])
def test_two_way_generation_equals_whole_passes(prefix):
    """Behind the cache the text reads the queries of its own keyframe, as in one whole pass."""
    net = network("two-way", prefix=prefix).eval()
    with torch.no_grad():
        net.occupancy.two_way.gate.fill_(0.5)
        images = torch.cat([pictures(0), pictures(1)])
        encoded, rows = net.encode(images), torch.tensor([1, 0, 1])
        written = net.vlm.generate(encoded, ["How many?", "Where?", "What?"], rows, 2)
        for question, row, ids in zip(("How many?", "Where?", "What?"), rows.tolist(), written):
            packs = net.vlm.stack([O.paligemma.Exchange(net.vlm.text.prompt(question), [*ids[:1], 0])], CPU)
            encoded = net.vlm.encode(images[row : row + 1])
            last = net.vlm.run(encoded, packs, torch.zeros(1, dtype=torch.int64)).last
            assert net.vlm.logits(last[0, -3]).argmax().item() == ids[0]
            assert net.vlm.logits(last[0, -2]).argmax().item() == ids[1]
        context, valid, _ = net.plan_context(net.encode(images))
        assert valid[:, -25:].all() and context.shape[:2] == valid.shape  # the planner reads the queries too
        ego = planning.ego_of([planning.unknown_future()] * 2)
        assert net.plan(context, valid, ["", ""], ego)["none"].shape == (2, 6, 2)


@pytest.mark.parametrize("claim, expected", [("two-way", (1, 2, 2, 2)), ("e", (1, 1, 1, 4))])
def test_arms_share_what_they_have_in_common(claim, expected, drives, tmp_path, capsys):  # noqa: F811
    """In (e) the planner's inputs alone differ."""
    words = ["ablate", "--claim", claim, "--out", tmp_path / "a" / claim, *drives[1], *SMALL, "--stage-steps",
             "2", "2",
             "2", "2", "--eval-questions", "2", "--eval-frames", "1"]
    run(*words)
    verdict = read_json(next((tmp_path / "a").glob("*/verdict.json")))
    stages = [p.name for p in (tmp_path / "a" / "arms").glob("*/seed0/*") if p.name in O.STAGES]
    assert tuple(stages.count(s) for s in O.STAGES) == expected and len(verdict["arms"]) == expected[3]
    capsys.readouterr()
    run(*words)
    assert f"{expected[3]} of {expected[3]} runs are done" in capsys.readouterr().out


def test_an_unknown_claim_is_one_line(capsys):
    assert "one of supervision, grid" in fails(capsys, "ablate", "--claim", "magic")
