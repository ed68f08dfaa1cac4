"""LOC: labels, heads and equations by hand and by slow loops, and the verbs on a tiny world."""

import json
import math
import re
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import commands
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file
from test_lidar import camera, drive

import loc as L
from common import lidar
from common.engine import Session
from common.files import write_npz
from common.geometry import OCC3D, fold
from common.labelers import make_labeler
from common.loose import write_example
from common.labels import label_path, read_label
from common.networks import lss, tinyclip
from common.nuscenes import OCC3D_CLASSES, NuScenesOccupancy
from common.report import openset
from small_clip import save_small_clip
from experiments import loc as X
from experiments import runner

ROOT = Path(__file__).resolve().parents[1]
REAL = ROOT.parent / "shared" / "real"
lss.PRESETS["small"] = lss.Sizes(8, (1.0, 45.0, 1.0), (8, 16), (4, 4, 2), (2, 2, 2), "group")
SMALL = {"network_preset": "small", "image_size": (56, 100), "dcl_samples": 8, "image_samples": 64,
         "warmup": 1, "clip_image": (64, 128)}
ONE = ["--workers", 1]
run, fails = commands.of(L)


def flags(fields: dict) -> list[str]:
    words = []
    for name, value in fields.items():
        flag = f"--{name.replace('_', '-')}"
        if isinstance(value, bool):
            words.append(flag if value else f"--no-{flag[2:]}")
        else:
            words += [flag, *map(str, value if isinstance(value, tuple) else (value,))]
    return words


def untrained_clip(folder: Path) -> Path:
    """A tiny CLIP that has all words of the project's lists and nothing of their meaning."""
    lists = [tinyclip.read_words(path) for path in sorted((ROOT / "data" / "openset").glob("*.txt"))]
    texts = [*tinyclip.TEMPLATES, "tall", *(w for words in lists for given in words.values() for w in given)]
    words = {word for text in texts for word in re.findall(r"[a-z0-9]+|[.,]", text.lower())}
    save_small_clip(folder, words)
    return folder


@pytest.fixture(scope="module")
def base(tiny_world, tmp_path_factory):
    """Flags that name the world and the CLIP, labels of both kinds, all in one folder."""
    base = tmp_path_factory.mktemp("loc")
    data = ["--data-root", tiny_world, "--cache", base / "cache"]
    small = flags(SMALL | {"clip": str(untrained_clip(base / "clip"))})
    for kind, labeler in (("boxes", "lidar"), ("maps", "world")):
        run("labels", *data, "--split", "all", "--labeler", labeler, "--out", base / kind, *small, "--pictures", 0, *ONE)
    cfg = replace(L.PRESETS["tiny"], **SMALL, clip=str(base / "clip"))
    return SimpleNamespace(root=tiny_world, data=data, small=small, boxes=base / "boxes", maps=base / "maps",
                           cache=base / "cache", cfg=cfg)


@pytest.fixture(scope="module")
def trained(base, tmp_path_factory):
    out = tmp_path_factory.mktemp("run") / "x"
    learn(base, base.boxes, out, 6)
    return out


def learn(base, labels: Path, out: Path, steps: int, *more) -> None:
    run("train", *base.data, "--labels", labels, "--out", out, "--steps", steps, *base.small, *more)


def world_set(base, split: str = "all") -> NuScenesOccupancy:
    return NuScenesOccupancy(base.root, split=split, image_size=base.cfg.image_size, cache=base.cache,
                             parts=("images",))


def prompts_of(cfg: L.Config) -> L.Prompts:
    return L.open_prompts(cfg, Path("nowhere"), L.Run(0, 1, torch.device("cpu"), True))


# --- 2.2  labels --------------------------------------------------------------------------------------------


def test_k_and_own_votes_change_names_not_places():
    scene = lidar.fuse(drive([3.0, 3.2], tracked=True))
    labels = [L.densify(scene, 0, L.Config(knn_k=k), name) for k, name in
              ((1, L.name_voxels), (5, L.name_voxels), (9, L.name_voxels), (5, X.own_points))]
    occupied = labels[0]["semantics"] != 17
    assert all(np.array_equal(label["semantics"] != 17, occupied) for label in labels)
    assert set(labels[0]["confidence"][occupied]) == {255} and len(np.unique(labels[1]["confidence"])) > 2


def test_labels_have_the_documented_form_and_resume(base):
    paths = sorted(base.boxes.glob("scene-*/*/labels.npz"))
    assert len(paths) == 6
    arrays = np.load(paths[0])
    for key in ("semantics", "mask_camera", "mask_lidar", "confidence"):
        assert arrays[key].shape == (200, 200, 16) and arrays[key].dtype == np.uint8
    occupied, hit = arrays["semantics"] < 17, arrays["mask_lidar"] > 0
    assert hit[~occupied].sum() == 0 and occupied.sum() > hit.sum() > 1000
    assert (arrays["mask_camera"][occupied] == 1).all() and (arrays["confidence"][occupied] > 0).all()
    before = {p: (p.stat().st_mtime_ns, p.read_bytes()) for p in paths}
    paths[1].unlink()
    for i in range(2):
        run("labels", *base.data, "--split", "all", "--labeler", "lidar", "--out", base.boxes, "--pictures", 0, *base.small,
            *ONE, "--shard", f"{i}/2")
    assert paths[1].read_bytes() == before[paths[1]][1]
    assert all(p.stat().st_mtime_ns == before[p][0] for p in paths if p != paths[1])


@pytest.mark.parametrize("labeler", ["lidar", "world"])
def test_every_step_of_the_labels_finds_more_and_stays_precise(base, labeler):
    dataset = world_set(base, "mini_train")
    semantics, camera_mask, _ = dataset.labels(1)
    truth, found = semantics < 17, {}
    maker = make_labeler(labeler, dataset, **L.LABELS.options[labeler])
    for step, changes in X.STEPS.items():
        cfg = L.Config(**{name: value for name, value in changes.items() if name != "naming"})
        name = X.own_points if changes.get("naming") == "own" else L.name_voxels
        (_, label), = L.dense_labels(dataset, list(range(len(dataset))), maker, cfg, {1}, name)
        occupied = label["semantics"] < 17
        hit = occupied & truth & camera_mask
        found[step] = (hit.sum() / (truth & camera_mask).sum(), hit.sum() / (occupied & camera_mask).sum(),
                       (label["semantics"] == semantics)[hit].mean())
    recall, precision, named = (dict(zip(found, column)) for column in zip(*found.values(), strict=True))
    assert recall["single sweep"] < recall["fused"] < recall["+ Poisson"] == recall["+ KNN"]
    assert precision["single sweep"] > 0.97 and precision["+ KNN"] > 0.8 and named["+ KNN"] > 0.75


def test_self_supervised_labels_read_neither_boxes_nor_lidarseg(base, monkeypatch):
    dataset = world_set(base, "mini_train")

    def forbidden(*_args, **_kw):
        raise AssertionError("supervision was read")

    monkeypatch.setattr(NuScenesOccupancy, "boxes", forbidden)
    monkeypatch.setattr(NuScenesOccupancy, "lidarseg", forbidden)
    (_, label), = L.dense_labels(dataset, [0, 1, 2], make_labeler("world", dataset), L.Config(), {0})
    assert (label["semantics"] < 17).sum() > 1000
    with pytest.raises(AssertionError, match="supervision"):
        next(L.dense_labels(dataset, [0, 1, 2], make_labeler("lidar", dataset), L.Config(), {0}))


@pytest.fixture
def broken(base, tmp_path) -> Path:
    """A copy of the world that may be broken."""
    shutil.copytree(base.root, tmp_path / "w", ignore=shutil.ignore_patterns("questions", "solid", "maps"))
    return tmp_path / "w"


def labels_of(root: Path, tmp_path: Path, base, labeler: str = "lidar") -> list:
    return ["labels", "--pictures", 0, "--data-root", root, "--cache", tmp_path / "c", "--split", "all", "--labeler", labeler,
            "--out", tmp_path / "l", *base.small, *ONE]


def test_trees_that_lack_what_the_labels_need_are_one_line(broken, base, tmp_path, capsys):
    sweep = next((broken / "sweeps" / "LIDAR_TOP").iterdir())
    sweep.write_bytes(np.array([[1, 1, 0, 9, 0]], np.float32).tobytes())  # the car itself
    assert "no LiDAR point beyond 3.0 m" in fails(capsys, *labels_of(broken, tmp_path / "a", base))
    for path in (broken / "samples" / "LIDAR_TOP").iterdir():
        path.unlink()
    for k, labeler in enumerate(("lidar", "world")):
        words = labels_of(broken, tmp_path / f"b{k}", base, labeler)
        assert "LiDAR file not found" in fails(capsys, *words)
    tables = next(broken.glob("v1.0-*"))
    (tables / "sample_annotation.json").write_text("[]")
    line = fails(capsys, *labels_of(broken, tmp_path / "d", base))
    assert "no boxes" in line and "--labeler world" in line


def test_maps_of_any_tool_need_no_depth(base, tmp_path, capsys):
    """Semantic maps alone, in another size than the images."""
    for path in (base.root / "exact" / "semantic").rglob("*.png"):
        place = tmp_path / "m" / path.relative_to(base.root / "exact")
        place.parent.mkdir(parents=True, exist_ok=True)
        Image.open(path).resize((100, 56), Image.Resampling.NEAREST).save(place)
    words = [*labels_of(base.root, tmp_path, base, "files"), "--maps", tmp_path / "m"]
    run(*words)
    label = np.load(next((tmp_path / "l").glob("scene-*/*/labels.npz")))["semantics"]
    assert {11, 17} <= set(np.unique(label)) and (label < 17).sum() > 5000
    shutil.rmtree(tmp_path / "m" / "semantic")
    assert "needs semantic/ inside" in fails(capsys, *words)


def test_one_sweep_only_is_said(base, tmp_path, capsys):
    from data.driving import make_world

    make_world(tmp_path / "one", seed=0, size="mini", scenes=1, keyframes=1, sweeps=0, camera_sweeps=0,
               image=(112, 200), workers=1)
    run(*labels_of(tmp_path / "one", tmp_path, base))
    assert "one LiDAR sweep only, nothing to fuse" in capsys.readouterr().err


def test_a_tree_of_keyframes_only_is_fused_from_them(broken, base):
    dataset = world_set(base)
    sweeps = dataset.sweeps(3)
    assert [s.keyframe for s in sweeps] == [3, -1, 4, -1, 5] and np.all(np.diff([s.time for s in sweeps]) > 0)
    points = lidar.move(sweeps[2].T_ego_lidar, dataset.sweep_points(sweeps[2])[:, :3])
    assert np.allclose(points, dataset.points(4)[:, :3], atol=1e-3)
    shutil.rmtree(broken / "sweeps" / "LIDAR_TOP")
    bare = NuScenesOccupancy(broken, split="mini_train", cache=base.cache, parts=())
    assert [s.keyframe for s in bare.sweeps(0)] == [0, 1, 2]


# --- 2.3  network -------------------------------------------------------------------------------------------


def test_language_head_is_a_convolution_read_at_some_cells():
    torch.manual_seed(0)
    head, features = L.LanguageHead(4, 5, 3, hidden=6), torch.rand(2, 4, 5, 4, 3)
    cells = torch.tensor([[0, 17, 59], [5, 30, 31]])
    got = head.first(head.neighbours(features, cells))
    weight = head.first.weight.view(6, 3, 3, 3, 4).permute(0, 4, 1, 2, 3)  # (out, C, dx, dy, dz)
    dense = F.conv3d(features, weight, head.first.bias, padding=1).flatten(2)
    assert torch.allclose(got, dense.gather(2, cells[:, None].expand(-1, 6, -1)).transpose(1, 2), atol=1e-5)
    assert head(features, cells).shape == (2, 3, 5)


@pytest.mark.parametrize("network", ["easyocc", "occle"])
def test_other_networks_are_wrapped_by_the_protocol(network, base):
    cfg = replace(base.cfg, network=network, network_preset="tiny", image_size=(112, 200))
    dataset = NuScenesOccupancy(base.root, split="mini_train", image_size=cfg.image_size, cache=base.cache,
                                parts=("images", "points"))
    torch.manual_seed(0)
    net = L.Loc(cfg)
    item = L.inputs(dataset[0]) | {"cells": torch.tensor([3, 5])}
    out = net(L.collate([item], torch.device("cpu")))
    assert out["scores"].shape == (1, 13 + 1, *net.grid.shape) and out["f"].shape == (1, 2, 64)


def test_an_unknown_network_preset_is_one_line(base, capsys):
    for network in ("lss", "easyocc"):
        line = fails(capsys, "describe", "--network", network, "--network-preset", "huge")
        assert "--network-preset huge" in line and f"{network}.py" in line


# --- 2.5  contrast ------------------------------------------------------------------------------------------


def test_voxel_to_text_by_hand():
    """f = t_0 = (1, 0), t_1 = (0, 1), tau = 1/2: -log e^2 / (e^2 + 1); and the mean leaves out weight 0."""
    f, text = torch.tensor([[[2.0, 0], [0, 3.0]]]), torch.eye(2)
    value = L.voxel_to_text(f, text, torch.tensor([[0, 0]]), torch.tensor([[1.0, 0]]), 0.5)
    assert value.item() == pytest.approx(math.log(1 + math.exp(-2)))
    both = L.voxel_to_text(f, text, torch.tensor([[0, 0]]), torch.ones(1, 2), 0.5)
    assert both.item() == pytest.approx((math.log(1 + math.exp(-2)) + math.log(1 + math.exp(2))) / 2)


def test_voxel_to_voxel_equals_a_slow_loop():
    torch.manual_seed(0)
    f, label = torch.randn(1, 7, 5, dtype=torch.float64), torch.tensor([[0, 0, 1, 1, 1, 2, 0]])
    weight, unit, values = torch.tensor([[1.0, 1, 1, 1, 1, 1, 0]]), F.normalize(f[0], dim=-1), []
    for i in range(6):
        others = [a for a in range(6) if a != i]
        total = sum(math.exp(float(unit[i] @ unit[a]) / 0.1) for a in others)
        same = [p for p in others if label[0, p] == label[0, i]]
        if same:
            each = [math.log(math.exp(float(unit[i] @ unit[p]) / 0.1) / total) for p in same]
            values.append(-np.mean(each))
    assert X.voxel_to_voxel(f, label, weight, 0.1).item() == pytest.approx(np.mean(values))


def test_image_term_and_rivals_by_hand():
    f, g, w = torch.tensor([[[1.0, 0], [1, 1]]]), torch.tensor([[[0.0, 2], [3, 3]]]), torch.ones(1, 2)
    assert L.image_term(f, g, w).item() == pytest.approx(0.5)  # cosines 0 and 1
    assert X.pixel_mse(f, g, w).item() == pytest.approx((1 + 4 + 4 + 4) / 4)  # nn.MSELoss
    cosine = X.text_cosine(f, torch.eye(2), torch.tensor([[1, 0]]), w)
    assert cosine.item() == pytest.approx((1 + 1 - 1 / math.sqrt(2)) / 2)


@pytest.mark.parametrize("term", range(5))
def test_gradients_are_exact_and_masked_voxels_get_none(term):
    torch.manual_seed(0)
    f, g = (torch.randn(2, 5, 4, dtype=torch.float64, requires_grad=grad) for grad in (True, False))
    text, label = F.normalize(torch.randn(3, 4, dtype=torch.float64), dim=-1), torch.randint(3, (2, 5))
    weight = torch.tensor([[1.0, 1, 1, 1, 0], [1, 1, 0, 0, 0]], dtype=torch.float64)
    call = (lambda f: L.voxel_to_text(f, text, label, weight, 0.3),
            lambda f: X.voxel_to_voxel(f, label, weight, 0.3), lambda f: L.image_term(f, g, weight),
            lambda f: X.text_cosine(f, text, label, weight), lambda f: X.pixel_mse(f, g, weight))[term]
    assert torch.autograd.gradcheck(call, f)
    grad = torch.autograd.grad(call(f), f)[0]
    assert grad[weight == 0].abs().max() == 0 and grad.isfinite().all() and grad[0, 0].abs().sum() > 0


# --- 2.6  inference -----------------------------------------------------------------------------------------


def test_unknown_score_and_decision_by_hand(monkeypatch):
    monkeypatch.setattr(L, "TAU", 1.0)
    text, novel = torch.tensor([[1.0, 0, 0], [0, 1, 0]]), torch.tensor([[0.0, 0, 1]])
    prompts = L.Prompts(None, None, text, torch.tensor([4, 11]), novel, torch.tensor([9]), novel, "")
    f = torch.tensor([[1.0, 0, 0], [0, 0.6, 0.8]])
    heads = L.Heads(None, torch.arange(2), torch.tensor([True, False]), torch.tensor([[0.9, 0.1], [0.5, 0.5]]),
                    {"": f, "_f": f.flip(0), "_g": f})
    how = L.How((8, 8))
    p, scores = math.e / (math.e + 1), L.unknown_score(heads, text)
    assert scores["occupancy"].tolist() == pytest.approx([0.1, 0.5])
    assert scores["language"][0].item() == pytest.approx(1 - p)
    assert scores["both"][0].item() == pytest.approx((0.1 + 1 - p) / 2)
    assert L.decide(heads, prompts, False, how).tolist() == [4, 4]
    assert L.decide(heads, prompts, True, how).tolist() == [4, 9]
    assert L.decide(heads, prompts, True, how, "_f").tolist() == [9, 4]
    assert L.decide(heads, prompts, False, how._replace(known_by="language")).tolist() == [4, 11]
    selfsup = heads._replace(class_share=None)  # the language head alone names
    assert L.decide(selfsup, prompts, False, how).tolist() == [4, 11]
    assert "occupancy" not in L.unknown_score(selfsup, text)


def test_a_cell_near_free_holds_an_unknown_thing_or_nothing():
    text, novel = torch.eye(3)[:2], torch.eye(3)[2:]
    prompts = L.Prompts(None, None, text, torch.tensor([4, 11]), novel, torch.tensor([9]), novel, "")
    occupied = torch.zeros(100, 100, 8, dtype=torch.bool)
    occupied[0, 0, :3] = True
    f = torch.eye(3)[[0, 0, 2]]  # sure of a known class, not sure of it, not sure of an unknown one
    heads = L.Heads(occupied, torch.arange(4), torch.tensor([True, False, False, False]), None,
                    {"": torch.cat([f, f[2:]])})  # the last cell is asked for, and free
    at = [L.to_ids(heads, prompts, novel, L.How((8, 8)))[0, 0, ::2].tolist()[:4] for novel in (False, True)]
    assert at == [[4, 17, 17, 17], [4, 17, 9, 17]]


def test_cells_spread_to_their_voxels():
    occupied = torch.zeros(100, 100, 8, dtype=torch.bool)
    occupied[3, 4, 5] = True
    heads = L.Heads(occupied, occupied.flatten().nonzero()[:, 0], None, None, None)
    volume = L.to_voxels(torch.tensor([7]), heads, 17)
    assert volume.shape == (200, 200, 16) and (volume == 7).sum() == 8
    assert (volume[6:8, 8:10, 10:12] == 7).all()


# --- 4  targets: what happens to a held-out object ----------------------------------------------------------


def keyframes_of(base, labels: Path, named: Path | None = None, **fields) -> L.Keyframes:
    cfg = replace(base.cfg, **fields)
    dataset, prompts = world_set(base, "mini_train"), prompts_of(cfg)
    return L.Keyframes(dataset, labels, range(3), prompts, named, L.Loc(cfg), cfg)


def test_held_out_voxels_are_ignored_or_take_the_teachers_label(base, tmp_path):
    keyframes = keyframes_of(base, tmp_path)
    dataset, words = keyframes.dataset, keyframes.prompts.words
    semantics, seen = (a.copy() for a in read_label(base.boxes, dataset, 0, "mask_camera"))
    semantics[:4, :4, :2] = words.novel[0]
    write_npz(label_path(tmp_path, dataset, 0), semantics=semantics, mask_camera=seen)
    target, novel = keyframes.target(0), np.isin(semantics, words.novel)
    assert (target[novel] == L.UNNAMED).all()
    known = ~novel & (semantics < 17)
    assert np.array_equal(np.array(words.known)[target[known]], semantics[known])
    free, sure = semantics == 17, L.surely_free(seen > 0)
    assert (target[free & ~sure] == 255).all() and (target[free & sure] == len(words.known)).all()
    assert 0 < sure.sum() < seen.sum()
    keyframes.named = tmp_path / "named"
    L.name_heldout(keyframes, [0])
    honest = keyframes.target(0)
    assert np.array_equal(honest[~novel], target[~novel])
    assert len(np.unique(honest[:4, :4, :2])) == 1  # one heap, one name (or none: no camera shows it)
    assert ((honest[novel] < len(words.known)) | (honest[novel] == L.UNNAMED)).all()


def test_ground_truth_is_added_where_a_sensor_saw_it(base):
    dataset = world_set(base, "mini_train")
    (label, seen), (both, known) = (L.read_truth(base.boxes, dataset, 0, gt) for gt in (False, True))
    semantics, camera_mask, lidar_mask = dataset.labels(0)
    observed = camera_mask | lidar_mask | (semantics < 17)
    assert np.array_equal(both, np.where(observed, semantics, label))
    assert np.array_equal(known, observed | seen) and (label[~observed] < 17).any()


def test_the_lowest_seen_voxel_of_a_column_is_not_surely_free():
    seen = np.array([[[0, 0, 1, 1, 1]], [[1, 0, 0, 1, 0]], [[0, 0, 0, 0, 0]]], bool)
    assert L.surely_free(seen)[:, 0].tolist() == [[False, False, False, True, True],
                                                  [False, False, False, True, False], [False] * 5]


def two_keyframes(base, tmp_path, monkeypatch, views) -> list[np.ndarray]:
    """Targets of two keyframes with the same held-out heap, where the teacher's patches are views[k]."""
    keyframes = keyframes_of(base, tmp_path)
    dataset, words, K = keyframes.dataset, keyframes.prompts.words, len(keyframes.prompts.words.known)
    for i in range(2):
        semantics, seen = (a.copy() for a in read_label(base.boxes, dataset, i, "mask_camera"))
        semantics[np.isin(semantics, words.novel)] = 17
        semantics[120:124, 98:102, 3:6] = words.novel[0]
        write_npz(label_path(tmp_path, dataset, i), semantics=semantics, mask_camera=seen)
    keyframes.prompts = keyframes.prompts._replace(text=torch.eye(K, 64))
    calls, pose = iter(views), dataset.calibration(0)
    monkeypatch.setattr(dataset, "calibration", lambda i: pose)  # the car stands
    monkeypatch.setattr(keyframes, "patches", lambda i: next(calls).expand(6, 4, 8, 64))
    keyframes.named = tmp_path / "named"
    L.name_heldout(keyframes, [0, 1])
    return [keyframes.target(i)[120:124, 98:102, 3:6] for i in range(2)]


def test_a_held_out_object_has_one_name_a_scene_or_none_if_the_teacher_is_unsure(base, tmp_path, monkeypatch):
    sure, other, unsure = torch.eye(64)[3], 0.2 * torch.eye(64)[5], torch.ones(64) / 8
    first, second = two_keyframes(base, tmp_path / "a", monkeypatch, [sure, other])
    assert (first == 3).all() and (second == 3).all()  # together: the second alone would be another class
    first, second = two_keyframes(base, tmp_path / "b", monkeypatch, [unsure, unsure])
    assert (first == L.UNNAMED).all() and (second == L.UNNAMED).all()


def test_a_patch_is_lifted_to_the_voxels_that_it_shows():
    patches = torch.zeros(1, 3, 5, 4)
    patches[0, 1, 2] = torch.tensor([0, 0, 1.0, 0])  # the middle of the image
    K, T = camera()
    frame = {"K": K[None], "T_ego_cam": T[None]}
    g = L.lift(patches, np.array([[10.0, 0, 0], [10, 4, 0], [-10, 0, 0]]), frame, (60, 100))
    assert g[0].tolist() == [0, 0, 1, 0] and not g[1:].any()  # beside it; behind the camera


@pytest.mark.parametrize("enters", [False, True])
def test_the_language_heads_gradient_stops_before_the_trunk(enters, base):
    keyframes = keyframes_of(base, base.boxes, lang_grad=enters)
    net = L.Loc(keyframes.cfg)
    batch = L.collate([keyframes(0, np.random.default_rng(0))], torch.device("cpu"))
    net(batch)["f"].sum().backward()
    inner = {name: p.grad is not None for name, p in net.named_parameters()}
    assert inner["language.first.weight"] and not inner["occupancy.last.weight"]
    assert any(there for name, there in inner.items() if name.startswith("net.")) == enters


def test_sampling_is_balanced_and_reads_the_right_cells(base):
    keyframes = keyframes_of(base, base.boxes, dcl_samples=16)
    K, target = keyframes.free, keyframes.target(0)
    cells, label, weight = keyframes.sample_classes(target, np.random.default_rng(0))
    present = np.unique(target[target < K])
    assert len(cells) == 16 * K and weight.sum() == 16 * len(present)
    assert set(label[weight > 0]) == set(present) and np.bincount(label[weight > 0]).max() == 16
    folded = fold(torch.from_numpy(target)[None], (4, 4, 2))[0].flatten(1)  # (F, cells)
    for cell, k in zip(cells[weight > 0][::7], label[weight > 0][::7], strict=True):
        assert k in folded[:, cell].tolist()
    assert keyframes.sample_classes(np.full_like(target, 255), np.random.default_rng(0))[2].sum() == 0


def test_pixels_of_voxels_are_the_patches_that_show_them(base):
    keyframes = keyframes_of(base, base.boxes, image_samples=256)
    patches = torch.zeros(6, 4, 8, 64)
    patches[..., :3] = torch.stack(torch.meshgrid(*map(torch.arange, (6, 4, 8)), indexing="ij"), -1).float()
    dataset, target = keyframes.dataset, keyframes.target(0)
    points, item = dataset.points(0)[:, :3].astype(np.float64), L.inputs(dataset[0])
    cells, feature, weight = keyframes.sample_pixels(points, target, patches, item, np.random.default_rng(0))
    assert weight.sum() > 100 and len(np.unique(cells[weight > 0])) == weight.sum()
    at = lidar.best_pixels(points, item["K"].numpy(), item["T_ego_cam"].numpy(), (56, 100), (4, 8))
    index, inside = (x.numpy() for x in OCC3D.index(torch.from_numpy(points)))
    seen = np.flatnonzero(inside & (at[0] >= 0))
    shown = set(zip(keyframes.cell_of(index[seen]).tolist(), *(x[seen].tolist() for x in at)))
    assert all((cell, *f[:3].astype(int)) in shown for cell, f in zip(cells[weight > 0], feature[weight > 0]))


# --- 5  training --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fields, more", [
    ({}, set()), ({"gt": True}, set()), ({"mode": "selfsup"}, set()),
    ({"lang_kernel": 3, "occ_hidden": 8, "holdout_mode": "ignore"}, set())])
def test_every_form_learns_its_own_terms(fields, more, base, tmp_path):
    learn(base, base.maps if "mode" in fields else base.boxes, tmp_path / "x", 2, *flags(fields))
    terms = {"ce", "lov", "depth", "dcl", "img"} | more
    last = json.loads((tmp_path / "x" / "log.jsonl").read_text().splitlines()[-1])
    assert terms == set(last) - {"step", "loss", "lr", "ms", "data", "gb"} and np.isfinite(last["loss"])


def test_one_keyframe_is_overfitted(base):
    keyframes = keyframes_of(base, base.boxes, jitter=0.0, dcl_samples=16, lang_grad=True, backbone="street")
    generator = torch.Generator().manual_seed(0)  # prompts apart, unlike an untrained CLIP's
    text = F.normalize(torch.randn(keyframes.free, 64, generator=generator), dim=-1)
    patches = torch.zeros(6, 8, 16, 64)
    patches[..., :6] = torch.eye(6)[:, None, None]
    keyframes.patches = lambda i: patches
    torch.manual_seed(0)
    net, cfg = L.Loc(keyframes.cfg), keyframes.cfg
    batch = L.collate([keyframes(0, np.random.default_rng(0))], torch.device("cpu"))
    optimizer, first = torch.optim.AdamW(net.parameters(), 1e-2), None
    for _ in range(80):
        out = net(batch)
        terms = L.occupancy_loss(out, batch, torch.ones(keyframes.free + 1), net, cfg)
        terms |= L.dense_contrast(out["f"], batch, text, cfg)
        first = first or {name: value.item() for name, value in terms.items()}
        optimizer.zero_grad()
        sum(terms.values()).backward()
        optimizer.step()
    last = {name: value.item() for name, value in terms.items()}
    assert sum(last.values()) < sum(first.values()) / 2
    assert all(last[name] < first[name] / 2 for name in ("ce", "dcl", "img"))
    heads = L.run_heads(net.eval(), keyframes.dataset[0], keyframes.prompts, L.How((64, 128)))
    length = heads.features["_f"].norm(dim=-1)
    assert len(length) > 0 and torch.allclose(length, torch.ones_like(length), atol=1e-4)


def weights(folder: Path) -> dict:
    return load_file(next(folder.glob("step_*")) / "model.safetensors")


def test_poisoned_held_out_classes_leave_training_bit_equal(base, tmp_path):
    """Their labels (any of the held-out ids), names and descriptions change; not a bit of the weights
    does."""
    words, rng, changed = L.read_vocabulary(base.cfg), np.random.default_rng(0), 0
    held = tuple(OCC3D_CLASSES[c] for c in words.novel)
    for name, poison in (("clean", False), ("poisoned", True)):
        for path in base.boxes.glob("scene-*/*/labels.npz"):
            arrays = dict(np.load(path))
            semantics = arrays["semantics"]
            hit = np.flatnonzero(arrays["mask_lidar"].ravel())
            semantics.reshape(-1)[hit[::50]] = words.novel[0]  # plenty
            novel = np.isin(semantics, words.novel)
            if poison:
                semantics[novel] = rng.choice(words.novel, novel.sum())
                changed += int(novel.sum())
            write_npz(tmp_path / name / path.relative_to(base.boxes), **arrays)
        for field in ("vocabulary", "holdout"):
            lines = Path(getattr(base.cfg, field)).read_text().splitlines()
            if poison:
                lines = [f"{line.split(':')[0]}: nonsense {k}" if line.startswith(held) else line
                         for k, line in enumerate(lines)]
            (tmp_path / name / f"{field}.txt").write_text("\n".join(lines))
    known = tmp_path / "known"  # the test can fail: a changed *known* class shows
    shutil.copytree(tmp_path / "poisoned", known)
    for path in known.glob("scene-*/*/labels.npz"):
        arrays = dict(np.load(path))
        arrays["semantics"][arrays["semantics"] == 11] = 13
        write_npz(path, **arrays)
    for name in ("clean", "poisoned", "known"):
        lists = [word for f in ("vocabulary", "holdout") for word in (f"--{f}", tmp_path / name / f"{f}.txt")]
        learn(base, tmp_path / name, tmp_path / f"{name}-run", 3, "--holdout-mode", "ignore", *lists)
    a, b, c = (weights(tmp_path / f"{name}-run") for name in ("clean", "poisoned", "known"))
    assert changed > 500 and all(torch.equal(a[name], b[name]) for name in a)
    assert not all(torch.equal(a[name], c[name]) for name in a)


def test_an_interrupted_run_goes_on_bit_equal(base, trained, tmp_path, monkeypatch):
    log = Session.log

    def log_then_die(self, step, terms, lr):
        log(self, step, terms, lr)
        if step == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(Session, "log", log_then_die)
    with pytest.raises(KeyboardInterrupt):
        learn(base, base.boxes, tmp_path / "x", 6)
    monkeypatch.setattr(Session, "log", log)
    assert [path.name for path in (tmp_path / "x").glob("step_*")] == ["step_000003"]
    learn(base, base.boxes, tmp_path / "x", 6)
    ours, theirs = weights(tmp_path / "x"), weights(trained)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_no_training_voxel_of_a_class_is_said(base, tmp_path, capsys):
    for path in base.boxes.glob("scene-*/*/labels.npz"):
        arrays = dict(np.load(path))
        arrays["semantics"][arrays["semantics"] == 16] = 15
        write_npz(tmp_path / "l" / path.relative_to(base.boxes), **arrays)
    learn(base, tmp_path / "l", tmp_path / "x", 1)
    lines = capsys.readouterr().err.replace("\r", "\n").splitlines()
    notes = [line for line in lines if line.startswith("note: no training voxel of")]
    assert len(notes) == 1 and "vegetation" in notes[0]


# --- 6  eval, query, predict, claims, bad input -------------------------------------------------------------


def test_eval_reports_known_and_unknown_and_is_deterministic(base, trained, tmp_path, capsys):
    words = ["eval", "--ckpt", trained, "--cache", base.cache, "--pictures", "1"]
    run(*words, "--save-pred", tmp_path / "pred")
    text, novel = capsys.readouterr().out, L.read_vocabulary(base.cfg).novel
    for words_there in ("===> mIoU of 3 samples:", "held out, voxels: construction_vehicle", "chance"):
        assert words_there in text
    result = json.loads((trained / "result.json").read_text())
    for name in ("miou_camera", "constant_miou_camera", "auroc", "aupr", "fpr95", "auroc_language",
                 "unknown_share", "scene_auroc", "voxels_trailer", "auroc_height", "auroc_margin",
                 "constant_known_miou", "iou_camera", "constant_iou_camera", *(
                     name + kind for name in ("known_miou",) for kind in ("", "_f", "_g"))):
        assert isinstance(result["metrics"][name], float), name
    assert "rare.txt" in result["protocol"]["held_out"] and "nearest" in result["protocol"]["held_out"]
    for path in (tmp_path / "pred").glob("*.npz"):
        pred = np.load(path)["pred"]
        assert pred.shape == (200, 200, 16) and pred.dtype == np.uint8 and not np.isin(pred, novel).any()
    assert all(list((trained / "pictures").glob(f"{kind}_*.png")) for kind in ("open", "unknown"))
    for metric in {"scene_auroc", "unknown_miou", "scene_effective_rank"} & result["metrics"].keys():
        scenes, counts = runner.read_counts(trained, metric)
        made = runner.score(counts.sum(0), metric)
        assert len(scenes) == 1 and made == pytest.approx(result["metrics"][metric])
    run(*words)
    assert json.loads((trained / "result.json").read_text())["metrics"] == result["metrics"]


def test_predict_needs_no_ground_truth(base, trained, tmp_path):
    bare = tmp_path / "w"
    shutil.copytree(base.root, bare, ignore=shutil.ignore_patterns("gts", "exact", "sweeps", "lidarseg"))
    run("predict", "--ckpt", trained, "--data-root", bare, "--cache", tmp_path / "c", "--out", tmp_path / "p")
    assert len(list((tmp_path / "p").glob("*.npz"))) == 3 and (tmp_path / "p" / "viewer.html").is_file()
    words = write_example(NuScenesOccupancy(bare, split="all", cache=tmp_path / "c"), 0, tmp_path / "c.json")
    run("predict", "--ckpt", trained, "--out", tmp_path / "q", *words)
    assert len(list((tmp_path / "q").glob("*.npz"))) == 1
    run("query", "--ckpt", trained, "--text", "a tall yellow vehicle with an arm", *words)


def test_query_writes_a_picture_and_a_page(base, trained, capsys, monkeypatch):
    sheets, real = [], openset.viz.sheet

    def sheet(path, images, panels, **kw):
        sheets.append(panels)
        real(path, images, panels, **kw)

    monkeypatch.setattr(openset.viz, "sheet", sheet)
    words = ["query", "--ckpt", trained, "--cache", base.cache, "--text"]
    run(*words, "a tall yellow vehicle with an arm")
    drawn = np.concatenate([v[v < 255] for panels in sheets for v in panels.values()])
    levels = np.bincount(drawn, minlength=8)  # of ranks: some always light up, few are bright
    assert levels[1:].any() and levels[0] > 4 * levels[4:].sum()
    for name in ("a_tall_yellow_vehicle_with_an_arm.html", "a_tall_yellow_vehicle_with_an_arm_0.png"):
        assert (trained / "query" / name).stat().st_size > 10_000
    run(*words, "a yellow zebra")
    assert "does not know zebra" in capsys.readouterr().err
    assert "knows none of these words" in fails(capsys, *words, "zebra")


def test_a_clip_that_does_not_fit_the_checkpoint_is_one_line(base, trained, tmp_path, capsys):
    tokenizer = tinyclip.load(base.cfg.clip).tokenizer
    known = set(tokenizer.get_vocab()) - {"<pad>", "<start>", "<unk>", "<end>"}
    save_small_clip(tmp_path / "narrow", known, dim=32)
    save_small_clip(tmp_path / "other", known, seed=1)
    words = ["eval", "--ckpt", trained, "--cache", base.cache, "--clip"]
    for name, complaint in (("narrow", "32 dimensions"), ("other", "are not those of the checkpoint")):
        tokenizer.save_pretrained(tmp_path / name)
        assert complaint in fails(capsys, *words, tmp_path / name)
    assert "no such folder" in fails(capsys, *words, "./nowhere")


def test_bad_lists_of_held_out_classes_are_one_line(base, tmp_path, capsys):
    words = ["train", *base.data, "--labels", base.boxes, "--out", tmp_path / "x", *base.small,
             "--holdout", tmp_path / "h.txt"]
    everything = "\n".join(f"{c}: {k}" for k, c in enumerate(OCC3D_CLASSES[:16]))
    for text, complaint in (("car: a\ncar: b", "'car' a second time"), ("car:", "empty prompt"),
                            ("bus: thing\ntruck: thing", "already there for 'bus'"),
                            (everything, "at least two must stay known")):
        (tmp_path / "h.txt").write_text(text)
        assert complaint in fails(capsys, *words)


def test_labels_and_gts_that_are_missing_are_one_line(base, tmp_path, capsys):
    words = ["train", *base.data, "--out", tmp_path / "x", "--steps", "1", *base.small]
    assert "make it with the verb labels" in fails(capsys, *words, "--labels", tmp_path / "none")
    shutil.copytree(base.root, tmp_path / "w",
                    ignore=shutil.ignore_patterns("gts", "exact", "sweeps", "maps", "questions"))
    bare = ["train", "--data-root", tmp_path / "w", "--cache", base.cache, "--out", tmp_path / "y",
            *base.small]
    assert "which --gt trains on" in fails(capsys, *bare, "--labels", base.boxes, "--gt")
    assert "no exact maps" in fails(capsys, *bare, "--mode", "selfsup")


def ablate(base, claim: str, steps: int, out: Path, *more) -> None:
    run("ablate", "--claim", claim, *base.data, "--steps", steps, "--out", out, *base.small, *more)


def test_claims_declare_their_signs_and_share_trainings(base, tmp_path, capsys):
    assert [claim.sentence[1] for name, claim in X.CLAIMS.items() if name != "start"] == list("abcdefg")
    known = set(L.Config.__dataclass_fields__) | {name.replace("-", "_") for name in X.FLAGS}
    assert all(set(fields) <= known for claim in X.CLAIMS.values() for fields in claim.arms.values())
    out = tmp_path / "heads"
    ablate(base, "e", 2, out, "--seeds", 1, "--frame-stride", 2)
    claim = json.loads((out / "claim.json").read_text())
    assert {"better": "both heads", "worse": "language head", "metric": "scene_auroc"} in claim["expected"]
    arms = {arm: json.loads((out / arm / "seed0" / "result.json").read_text()) for arm in claim["arms"]}
    assert arms["language head"]["metrics"]["auroc"] == arms["both heads"]["metrics"]["auroc_language"]
    assert len(list((tmp_path / "arms").glob("run-*/seed0/step_*"))) == 1  # one training for three arms
    dataset = world_set(base, "mini_train")
    made = sorted(path.parent.name for path in (tmp_path / "arms").glob("labels-*/scene-*/*/labels.npz"))
    assert made == sorted(dataset.tokens[i] for i in (0, 2))  # what is learned from, no more
    for form in ("cosine", "mse"):
        ablate(base, "b", 1, tmp_path / form / "b", "--form", form, "--arms", "labels")


def test_label_quality_has_a_row_for_each_step_and_labeler(base, tmp_path, capsys):
    ablate(base, "label-quality", 1, tmp_path / "q", *ONE)
    rows = json.loads((tmp_path / "q" / "label_quality.json").read_text())["rows"]
    columns = {"prec camera", "recall none", "IoU camera", "mIoU none", "prec solid"}
    assert len(rows) == 8 and all(columns <= set(row) for row in rows.values())
    for labeler in ("boxes + lidarseg", "2D maps, no boxes"):
        steps = [rows[f"{labeler}: {step}"]["IoU camera"] for step in ("single sweep", "fused", "+ KNN")]
        assert steps == sorted(steps)
    assert "2D maps, no boxes: + Poisson" in capsys.readouterr().out
    assert {p.name for p in (tmp_path / "q").glob("*.png")} == {"boxes_lidarseg.png", "2d_maps_no_boxes.png"}


@pytest.mark.parametrize("words", [[], ["--preset", "base"], ["--preset", "paper"],
                                   ["--network", "easyocc", "--network-preset", "paper"]])
def test_describe_needs_no_data(words, capsys):
    run("describe", *words)
    text = capsys.readouterr().out
    assert "language" in text and "GFLOPs" in text


# --- real data ----------------------------------------------------------------------------------------------


@pytest.mark.skipif(not (REAL / "semantickitti").is_dir(), reason="../shared/real/semantickitti is not here")
def test_real_semantickitti_scans_fuse_to_what_their_voxel_files_show(tmp_path, monkeypatch):
    """Scan 0's own voxels are voxels/000000.bin; the fused label holds them nearly all, and fills more."""
    dataset = lidar.open_scans(REAL / "semantickitti", None, "00")
    sweeps, stored = lidar.read_sweeps(dataset, [0, 1, 2]), dataset.bits(0, "bin")
    cfg = L.Config(poisson=False, knn_k=1)
    own, fused = (L.densify(lidar.fuse(s, cell, surfaces=False), 0, cfg)["semantics"]
                  for s, cell in ((sweeps.only(0), 0.0), (sweeps, 0.1)))
    hit, occupied = own != 0, fused != 0
    assert (hit & stored).sum() / (hit | stored).sum() > 0.995
    still = stored & ~np.isin(own, (0, 6, 7, 8))
    assert (occupied & still).sum() / still.sum() > 0.93 and occupied.sum() > 1.3 * stored.sum()
    assert (fused == own)[occupied & hit].mean() > 0.9
    monkeypatch.setattr(X, "STEPS", {name: X.STEPS[name] for name in ("single sweep", "+ KNN")})
    X.label_quality(L.PRESETS["tiny"], SimpleNamespace(
        data_root=REAL / "semantickitti", version=None, split="00", cache=None, out=tmp_path / "q", workers=1,
        eval_frames=0, pool=tmp_path / "arms"))
    rows = json.loads((tmp_path / "q" / "label_quality.json").read_text())["rows"]
    single, dense = rows["own labels: single sweep"], rows["own labels: + KNN"]
    assert single["recall of bin"] > 0.97 and single["in bin"] > 0.99  # thinned to a point every 0.1 m
    assert dense["recall of bin"] > single["recall of bin"] and dense["voxels / bin"] > 2.5
    assert dense["seen empty"] < 0.03
    assert (tmp_path / "q" / "own_labels.png").stat().st_size > 50_000


@pytest.mark.skipif(not (REAL / "nuscenes").is_dir(), reason="../shared/real/nuscenes is not here")
def test_the_real_nuscenes_keyframe_gets_a_label(tmp_path, capsys):
    run("labels", "--data-root", REAL / "nuscenes", "--cache", tmp_path / "c", "--labeler", "lidar",
        "--out", tmp_path / "l")
    arrays = np.load(next((tmp_path / "l").glob("scene-*/*/labels.npz")))
    dataset = NuScenesOccupancy(REAL / "nuscenes", cache=tmp_path / "c", parts=())
    maps = make_labeler("lidar", dataset, scale=0.05, seen_only=False)(0)
    index, inside = OCC3D.index(torch.from_numpy(maps.points.astype(np.float64)))
    outside_car = (np.abs(lidar.move(np.linalg.inv(dataset.T_ego_lidar(0)), maps.points)) > 3.0).any(1)
    own = tuple(index.numpy()[inside.numpy() & outside_car].T)
    assert (arrays["semantics"][own] < 17).mean() > 0.99 and (arrays["semantics"] < 17).sum() > 6000
    assert "one LiDAR sweep only" in capsys.readouterr().err
