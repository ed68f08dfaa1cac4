"""OccLE's experiments: claims, rivals and missing parts, the shared first stage, the cost of Dual Mamba."""

import json
from dataclasses import replace

import commands
import numpy as np
import pytest
import torch
from test_occle import COARSE, kitti_world, make_batch, one_thread, small, words  # noqa: F401
from test_occle import NARROW, SIZES

import occle as O
from common import cli
from common.files import InputError
from experiments import occle as X

run, fails = commands.of(O)


def test_claims_cover_the_paper():
    assert sorted(claim.sentence[1] for name, claim in X.CLAIMS.items() if name != "start") == list("abcdefghijkl")
    assert [name for name, claim in X.CLAIMS.items() if claim.seeds == 3] == [
        "curve", "labels", "share", "fusion", "projection", "aligned", "semi"]
    fields = cli.to_dict(O.Config()).keys()
    for claim in X.CLAIMS.values():
        for name, arm in claim.arms.items():
            assert {k for k in arm if k not in fields} <= {"variant", "inputs"} and arm.get("variant", "occle") in X.FIRST | X.SECOND
            for kind, given in (("occ3d", arm), ("semantickitti", X.on_kitti(claim).arms[name] | O.KITTI["tiny"])):
                sizes = {k: v for k, v in given.items() if k in fields}
                O.grids(replace(O.PRESETS["tiny"], format=kind, **sizes))  # raises where cells do not divide the grid
    for name in ("labels", "curve"):
        arms = X.CLAIMS[name].arms
        both = [arms[f"{who} 10 %"] for who in ("OccLE", "supervised")]
        assert both[1] == both[0] | X.SUPERVISED, "the same stages, steps and exposures"
    assert {X.CLAIMS["curve"].arms[arm]["label_ratio"] for arm in X.CLAIMS["curve"].arms} == {0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1}
    assert {p[2] for p in X.on_kitti(X.CLAIMS["semi"]).pairs if len(p) > 2} == {"iou"}


def test_ratios_that_see_the_same_labels_are_refused():
    """The fault of the first published claims: three ratios of one and the same 72 frames."""
    class Frames:
        scene_names = [f"s{k // 2}" for k in range(122)]
        __len__ = lambda self: 122

    cfg = replace(O.PRESETS["tiny"], steps=400)
    for name in ("curve", "l", "ratios"):
        X.refuse_equals(name, cfg, Frames(), 0)
    for name, steps in (("curve", 50), ("ratios", 20)):
        with pytest.raises(InputError, match="both see"):
            X.refuse_equals(name, replace(cfg, steps=steps), Frames(), 0)
    scenes = [len(O.choose_labelled(Frames.scene_names, r, "scenes", 0)) for r in X.BY["scenes"]]
    assert len(set(scenes)) == 4 and scenes == sorted(scenes)


@pytest.mark.parametrize("variant", ["occle", "addition", "concatenation", "joint", "image", "LiDAR"])
def test_every_network_runs_learns_and_has_its_teacher(variant):
    cfg = small(grid_stride=COARSE["occ3d"])
    network, batch = (X.FIRST | X.SECOND).get(variant, {}).get("network", O.OccLE), make_batch(cfg)
    network = X.partial(X.seeing, variant, network) if variant in ("image", "LiDAR") else network
    torch.manual_seed(0)
    net = network(cfg, pretrained=False)
    teacher = O.Teacher(net.branches, 0.9)
    terms = O.one_step(net, teacher, batch, 0, 9, O.Weights(torch.ones(17), torch.ones(18)), cfg, torch.no_grad)
    assert all(term.isfinite() for term in terms.values())
    first, black = net(batch)["logits"], net(batch | {"images": batch["images"] * 0})["logits"]
    empty = net(batch | {"points": [p[:5] for p in batch["points"]]})["logits"]
    assert torch.equal(first, black) == (variant == "LiDAR") and torch.equal(first, empty) == (variant == "image")
    weak = {name: batch[f"weak_{name}"] for name in ("images", "points", "history")} | {n: batch[n][1:] for n in ("K", "T_ego_cam")}
    with torch.no_grad():
        torch.testing.assert_close(teacher.branch(weak).occupancy, net.branches.geometric(weak).occupancy)


def test_the_joint_network_has_as_many_parameters():
    for kind in SIZES:
        cfg = replace(O.PRESETS["tiny"], format=kind, **(O.KITTI["tiny"] if kind == "semantickitti" else {}))
        count = [sum(p.numel() for p in network(cfg, pretrained=False).parameters()) for network in (O.OccLE, X.JointOccLE)]
        assert abs(count[1] / count[0] - 1) < 0.05, count


def test_each_part_of_the_semi_supervision_is_left_out():
    cfg = small(grid_stride=COARSE["occ3d"])
    batch, net = make_batch(cfg), O.OccLE(cfg, pretrained=False)
    batch["sensor"][0, :10] = 255

    def targets(t=0, **parts):
        return X.Part(net.branches, 0.9, **parts)(batch, t, 10)

    whole, plain = targets(), O.Teacher(net.branches, 0.9)(batch, 0, 10)
    assert all(torch.equal(a, b) for a, b in zip(whole, plain, strict=True))
    assert ((targets(teacher=False)[1] == 0) == (batch["sensor"] == 255)).all()
    for told, name in ((1, "hits"), (0, "rays")):
        kept = targets(teacher=False, **{name: False})[1] > 0
        assert (kept == ((batch["sensor"] != 255) & (batch["sensor"] != told))).all()
    unknown = batch["sensor"] == 255
    assert targets(ramp=False)[1][unknown].max() == 1 > targets()[1][unknown].max()
    assert (targets(threshold=False, ramp=False)[1] > 0).all() and not (whole[1] > 0).all()
    teacher, old = X.Part(net.branches, 0.9, warmup=False), net.branches.geometric.widen.weight.clone()
    net.branches.geometric.widen.weight.data += 1
    teacher.update(net.branches, 0)
    torch.testing.assert_close(teacher.branch.widen.weight, old + 0.1)


def test_a_claim_shares_the_first_stage_and_goes_on(kitti_world, tmp_path, capsys):  # noqa: F811
    args = ["ablate", "--claim", "c", "--seeds", "1", "--format", "semantickitti", "--data-root", kitti_world, "--workers", "1",
            "--out", tmp_path / "fusion", "--steps", "2", *words(**NARROW, **SIZES["semantickitti"])]  # fmt: skip
    run(*args)
    claim = json.loads((tmp_path / "fusion" / "claim.json").read_text())
    assert claim["expected"] == [{"better": "Dual Mamba", "worse": "concatenation", "metric": "miou"}]
    assert len(list((tmp_path / "arms").glob("branches-*/seed0/latest.json"))) == 1
    results = [json.loads(path.read_text()) for path in (tmp_path / "arms").glob("*/seed0/result.json")]
    assert len(results) == 2 and all(r["cost"]["steps"] == 2 and "constant_miou" in r["metrics"] for r in results)
    assert all(0 < r["metrics"][name] for r in results for name in ("aligned_mild_at_hits", "primary_exact_at_hits"))
    assert all({"labelled_miou", "unlabelled_miou"} <= r["metrics"].keys() for r in results)
    assert all(r["protocol"]["exposures"] == "1 distinct labelled frames, 2.00 times each" for r in results)
    capsys.readouterr()
    run(*args)
    assert "2 of 2 runs are done" in capsys.readouterr().out
    assert "--claim z" in fails(capsys, "ablate", "--claim", "z", "--data-root", kitti_world)


def test_arms_keep_what_no_augmentation_changes_and_refuse_other_truth(kitti_world, tmp_path):  # noqa: F811
    cfg, args = small("semantickitti"), X.SimpleNamespace(pool=tmp_path, workers=1)
    dataset = O.open_frames(cfg, kitti_world, None, "train", cfg.image_size)
    X.darken(dataset, cfg)
    data = [kind(dataset, X.labels_of(dataset, cfg, args), [0], cfg) for kind in (O.Samples, X.Kept, X.Kept)]
    items = [samples((0, True), np.random.default_rng(0)) for samples in data]
    for item in items[1:]:
        assert all(torch.equal(item[name], items[0][name]) for name in items[0]) and not item["images"].any()
    with pytest.raises(RuntimeError, match="has no label"):
        X.Kept(dataset, data[0].folder, [1], cfg).fixed(0, True)


def test_targets_and_perfect_occupancy_are_measured(kitti_world, tmp_path, capsys):  # noqa: F811
    words_ = ["--data-root", kitti_world, "--format", "semantickitti", "--eval-frames", "1", "--workers", "1"]
    run("ablate", "--claim", "targets", *words_, "--out", tmp_path / "t", *words(**NARROW, **SIZES["semantickitti"]))
    value = json.loads((tmp_path / "t" / "targets.json").read_text())
    wrong = [row["occupied_taught_free"] for row in value["rows"]]
    assert wrong == sorted(wrong, reverse=True) and wrong[0] > 2 * wrong[4] and value["gradients"]["geo"] > 0
    run("ablate", "--claim", "projection-probe", *words_, "--out", tmp_path / "p")
    rows = json.loads((tmp_path / "p" / "probe.json").read_text())["rows"]
    assert all(row["hit"] > 90 and row["hidden"] < 10 and row["class"] > 80 for row in rows), rows


def test_the_cost_of_dual_mamba_is_measured_and_drawn(tmp_path):
    run("ablate", "--claim", "cost", "--out", tmp_path, "--tokens", "4096", "--device", "cpu", "--data-root", tmp_path)
    value = json.loads((tmp_path / "cost.json").read_text())
    assert [row["tokens"] for row in value["rows"]] == [1024, 4096] and value["ns_per_token"]["forward"] > 0
    assert (tmp_path / "cost.png").read_bytes()[:4] == b"\x89PNG"
