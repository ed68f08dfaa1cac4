"""EasyOcc's verbs, end to end on a tiny world: labels, train, resume, two processes, eval, claims, and bad input."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import commands
import pytest
import torch
from safetensors.torch import load_file

import easyocc as E
from common.engine import stack
from common.nuscenes import NuScenesOccupancy, open_split

ROOT = Path(__file__).resolve().parents[1]
LABEL = ["--map-stride", "8", "8"]
SMALL = [*LABEL, "--grid-stride", "4", "4", "2", "--lift-stride", "1", "1", "1", "--cnn-channels", "8", "16",
         "--channels", "8", "--image-size", "56", "100", "--workers", "1", "--warmup", "1"]


run, fails = commands.of(E)
torchrun = partial(commands.torchrun, "easyocc.py")


@pytest.fixture(scope="module")
def data(tiny_world, tmp_path_factory):
    """(flags that name the world, a folder with its labels)."""
    base = tmp_path_factory.mktemp("easyocc")
    flags = ["--data-root", tiny_world, "--cache", base / "cache"]
    run("labels", *flags, "--split", "all", "--out", base / "labels", "--pictures", "0", *SMALL)
    return flags, base / "labels"


@pytest.fixture(scope="module")
def trained(data, tmp_path_factory):
    flags, labels = data
    out = tmp_path_factory.mktemp("run") / "x"
    run("train", *flags, "--labels", labels, "--out", out, "--steps", "8", *SMALL)
    return out


# --- labels -----------------------------------------------------------------------------------------------------------


def test_labels_have_the_documented_form_and_resume(data, tiny_world):
    flags, labels = data
    dataset = NuScenesOccupancy(tiny_world, split="all", cache=flags[3])
    paths = sorted(labels.glob("scene-*/*/labels.npz"))
    assert len(paths) == len(dataset) == 6
    arrays = np.load(paths[0])
    for key in ("semantics", "mask_camera", "mask_lidar", "confidence"):
        assert arrays[key].shape == (200, 200, 16) and arrays[key].dtype == np.uint8
    hit = arrays["mask_lidar"] > 0
    assert ((arrays["semantics"] < 17) == hit).all() and (arrays["confidence"][hit] > 0).all()
    assert (arrays["mask_camera"][hit] == 1).all() and arrays["mask_camera"].sum() > hit.sum()
    before = {p: (p.stat().st_mtime_ns, p.read_bytes()) for p in paths}
    paths[1].unlink()
    run("labels", *flags, "--split", "all", "--out", labels, "--pictures", "2", *SMALL)
    assert paths[1].read_bytes() == before[paths[1]][1]  # made again, the same bytes
    assert all(p.stat().st_mtime_ns == before[p][0] for p in paths if p != paths[1])  # the others untouched
    assert len(list((labels / "pictures").glob("*.png"))) == 2 and (labels / "viewer.html").is_file()


def test_shards_make_the_same_labels(data, tmp_path):
    flags, labels = data
    for i in range(2):
        run("labels", *flags, "--split", "all", "--out", tmp_path / "l", "--shard", f"{i}/2", "--pictures", "0", *SMALL)
    for path in sorted(labels.glob("scene-*/*/labels.npz")):
        assert (tmp_path / "l" / path.relative_to(labels)).read_bytes() == path.read_bytes()


def test_labels_of_other_settings_are_refused(data, capsys):
    flags, labels = data
    line = fails(capsys, "labels", *flags, "--split", "all", "--out", labels, *SMALL, "--past-frames", "2")
    assert "past_frames" in line


def test_exact_labels_lie_in_matter(tiny_world, data, tmp_path):
    """Frames are right end to end: exact maps of one keyframe, brought to 3D, hit exact solids (or touch them)."""
    from scipy.ndimage import binary_dilation

    flags, _ = data
    run("labels", *flags, "--out", tmp_path / "l", "--pictures", "0", *SMALL, "--depth-level", "exact", "--semantic-level", "exact",
        "--past-frames", "0", "--no-clamp-oob", "--map-fill", "0")
    for path in (tmp_path / "l").glob("scene-*/*/labels.npz"):
        label = np.load(path)["semantics"]
        solid = np.load(tiny_world / "exact" / "solid" / path.parent.parent.name / f"{path.parent.name}.npz")["semantics"]
        occupied = label != 17
        assert occupied.sum() > 500
        assert (binary_dilation(solid != 17)[occupied]).mean() > 0.99
        agree = occupied & (solid != 17)
        assert (label[agree] == solid[agree]).mean() > 0.9


def test_killed_labels_leave_nothing_half_written(data, tmp_path):
    flags, labels = data
    command = [sys.executable, "easyocc.py", "labels", *map(str, flags), "--split", "all", "--out", str(tmp_path / "l"), "--pictures", "0", *SMALL]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
    while not list((tmp_path / "l").glob("scene-*/*/labels.npz")) and process.poll() is None:
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    for path in (tmp_path / "l").glob("scene-*/*/labels.npz"):
        assert np.load(path)["semantics"].shape == (200, 200, 16)
    run(*[str(w) for w in command[2:]])
    for path in sorted(labels.glob("scene-*/*/labels.npz")):
        assert (tmp_path / "l" / path.relative_to(labels)).read_bytes() == path.read_bytes()


# --- train ------------------------------------------------------------------------------------------------------------


def test_one_keyframe_is_overfitted(tiny_world, data, tmp_path):
    flags, labels = data
    cfg = replace(E.PRESETS["tiny"], grid_stride=(4, 4, 2), lift_stride=(1, 1, 1), cnn_channels=(16, 32), channels=16,
                  image_size=(56, 100), jitter=0.0)
    dataset = open_split(tiny_world, None, None, cfg.image_size, flags[3])
    torch.manual_seed(0)
    net, item = E.build(cfg), E.Keyframes(dataset, labels, cfg)(0, np.random.default_rng(0))
    batch, optimizer = stack([item], "cpu"), torch.optim.AdamW(net.parameters(), 5e-3)
    values = []
    for _ in range(50):
        total = sum(E.pseudo_loss(net(batch), batch, torch.ones(18), cfg).values())
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
        values.append(total.item())
    assert values[-1] < values[0] / 2


def test_killed_training_goes_on_bit_equal(data, trained, tmp_path):
    flags, labels = data
    out = tmp_path / "x"
    command = [sys.executable, "easyocc.py", "train", *map(str, flags), "--labels", str(labels), "--out", str(out), "--steps", "8", *SMALL]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
    while not (out / "latest.json").exists() and process.poll() is None:
        time.sleep(0.005)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert (out / "latest.json").exists()
    run(*command[2:])
    ours, theirs = (load_file(next(folder.glob("step_*")) / "model.safetensors") for folder in (out, trained))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


# --- eval, pictures, claims, describe ----------------------------------------------------------------------------------


def test_eval_of_a_tree_without_training_scenes_and_without_a_visible_voxel(data, trained, tmp_path, capsys):
    """Validation alone needs no training split, and a score of nothing is undefined."""
    tree, out = (Path(shutil.copytree(*pair)) for pair in ((data[0][1], tmp_path / "tree"), (trained, tmp_path / "run")))
    (tree / "v1.0-mini/splits.json").write_text('{"mini_train": ["scene-9999"]}')
    for path in tree.glob("gts/*/*/labels.npz"):
        arrays = dict(np.load(path))
        np.savez(path, **arrays | {"mask_camera": np.zeros_like(arrays["mask_camera"])})
    run("eval", "--ckpt", out, "--data-root", tree, "--cache", tmp_path / "c", "--split", "mini_val", "--pictures", "0",
        "--no-rayiou")
    said, metrics = capsys.readouterr().out, json.loads((out / "result.json").read_text())["metrics"]
    assert "no constant predictor: " in said and "mini_train" in said and "undefined" in said
    assert "miou_none" in metrics and not {"miou_camera", "constant_miou_camera"} & set(metrics)


def test_two_processes_share_labels_and_eval(data, trained, tmp_path, one_thread):
    """Each makes its scenes' labels and scores its frames; the files are one process's, and one line tells of bad input."""
    flags, labels = data
    one, two = (Path(shutil.copytree(trained, tmp_path / name)) for name in ("one", "two"))
    words = (*flags, "--split", "all", "--pictures", "1")
    run("eval", "--ckpt", one, *words)
    done = torchrun("eval", "--ckpt", two, *words, "--save-pred", tmp_path / "pred")
    assert done.returncode == 0, done.stderr[-2000:]
    assert (one / "by_scene.npz").read_bytes() == (two / "by_scene.npz").read_bytes()
    first, second = (json.loads((folder / "result.json").read_text())["metrics"] for folder in (one, two))
    assert first == second and len(first) > 20 and len(list((tmp_path / "pred").glob("*.npz"))) == 6
    done = torchrun("labels", *flags, "--split", "all", "--out", tmp_path / "l", "--pictures", "0", *SMALL)
    assert done.returncode == 0 and done.stdout.count("3 keyframes of 1 scenes, 3 new") == 2, done.stderr[-2000:]
    for path in sorted(labels.glob("scene-*/*/labels.npz")):
        assert (tmp_path / "l" / path.relative_to(labels)).read_bytes() == path.read_bytes()
    done = torchrun("train", "--data-root", tmp_path / "none", "--out", tmp_path / "x")
    assert done.returncode != 0 and done.stderr.count("error: ") == 1 and "no such folder" in done.stderr
    done = torchrun("train", *flags, "--labels", labels, "--out", two, "--steps", "9", *SMALL)  # found once the group is there
    assert done.returncode != 0 and done.stderr.count("error: ") == 1 and "other settings" in done.stderr


def test_eval_writes_what_it_promises_and_is_deterministic(data, trained, tmp_path, capsys):
    flags, _ = data
    run("eval", "--ckpt", trained, "--save-pred", tmp_path / "pred", *flags[2:])
    text = capsys.readouterr().out
    assert "===> car - IoU =" in text and "===> mIoU of 3 samples:" in text and "x constant" in text
    result = json.loads((trained / "result.json").read_text())
    assert {"method", "preset", "seed", "dataset", "protocol", "metrics", "per_class", "cost", "commit", "command"} <= set(result)
    for name in ("miou_camera", "miou_lidar", "miou_both", "miou_none", "iou_camera", "rayiou", "rayiou@1", "constant_miou_camera",
                 "shuffled_miou_camera", "black_miou_camera"):  # fmt: skip
        assert isinstance(result["metrics"][name], float), name
    assert (trained / "viewer.html").stat().st_size > 10_000 and list((trained / "pictures").glob("*.png"))
    saved = sorted((tmp_path / "pred").glob("*.npz"))
    assert len(saved) == result["dataset"]["frames"] == 3
    pred = np.load(saved[0])["pred"]
    assert pred.shape == (200, 200, 16) and pred.dtype == np.uint8
    capsys.readouterr()
    run("eval", "--ckpt", trained, *flags[2:], "--pictures", "0")
    assert json.loads((trained / "result.json").read_text())["metrics"] == result["metrics"]
    assert "viewer.html" not in capsys.readouterr().out


def test_saved_predictions_are_what_was_scored(data, trained, tiny_world, tmp_path):
    from common.metrics import OccupancyMeter

    flags, _ = data
    run("eval", "--ckpt", trained, "--save-pred", tmp_path / "pred", *flags[2:])
    dataset, meter = NuScenesOccupancy(tiny_world, split="mini_val", cache=flags[3]), OccupancyMeter()
    for i, token in enumerate(dataset.tokens):
        meter.add(np.load(tmp_path / "pred" / f"{token}.npz")["pred"], *dataset.labels(i))
    metrics = json.loads((trained / "result.json").read_text())["metrics"]
    assert meter.metrics()["miou_camera"] == pytest.approx(metrics["miou_camera"], abs=1e-12)


def test_eval_against_labels_says_so(data, trained, capsys):
    flags, labels = data
    run("eval", "--ckpt", trained, "--labels", labels, *flags[2:])
    assert f"labels in {labels}" in json.loads((trained / "result.json").read_text())["protocol"]["truth"]


def test_predict_needs_no_ground_truth(trained, tiny_world, data, tmp_path, capsys):
    shutil.copytree(tiny_world, tmp_path / "w", ignore=shutil.ignore_patterns("gts", "exact", "lidarseg"))
    run("predict", "--ckpt", trained, "--data-root", tmp_path / "w", "--cache", tmp_path / "c", "--out", tmp_path / "p", "--pictures", "1")
    saved = sorted((tmp_path / "p").glob("*.npz"))
    assert len(saved) == 3 and np.load(saved[0])["pred"].shape == (200, 200, 16)
    assert (tmp_path / "p" / "viewer.html").is_file() and len(list((tmp_path / "p" / "pictures").glob("*.png"))) == 1


def test_eval_leaves_the_training_labels_alone(data, trained, capsys):
    flags, labels = data
    before = {path: path.stat().st_mtime_ns for path in labels.rglob("*")}
    run("eval", "--ckpt", trained, *flags[2:], "--pictures", "1")
    assert {path: path.stat().st_mtime_ns for path in labels.rglob("*")} == before


def test_describe_needs_nothing(capsys):
    run("describe", "--preset", "paper")
    text = capsys.readouterr().out
    assert "200x200x16" in text and "parameters" in text


# --- bad input ---------------------------------------------------------------------------------------------------------


def test_bad_flags(data, trained, tmp_path, capsys):
    flags, labels = data
    assert "nowhere" in fails(capsys, "train", "--data-root", tmp_path / "nowhere", "--out", tmp_path / "x")
    assert "steps" in fails(capsys, "train", *flags, "--labels", labels, "--out", tmp_path / "x", "--steps", "0")
    assert "norm" in fails(capsys, "train", "--norm", "layer")
    assert "v1.0-trainval" in fails(capsys, "train", *flags, "--version", "v1.0-trainval", "--labels", labels, "--out", tmp_path / "x")
    assert "preset" in fails(capsys, "eval", "--ckpt", trained, "--preset", "paper")
    assert "other settings" in fails(capsys, "train", *flags, "--labels", labels, "--out", trained, "--steps", "9", *SMALL)


@pytest.mark.parametrize("damage, names", [
    (lambda label: label.unlink(), "no label"),
    (lambda label: label.write_bytes(label.read_bytes()[:100]), "npz"),
    (lambda label: np.savez(label, **{k: np.zeros((2, 2, 2), np.uint8) for k in ("semantics", "mask_camera", "confidence")}), "shape"),
    (lambda label: np.savez(label, **{k: np.zeros((200, 200, 16)) for k in ("semantics", "mask_camera", "confidence")}), "dtype"),
])  # fmt: skip
def test_bad_label_files(damage, names, data, tmp_path, capsys):
    flags, labels = data
    shutil.copytree(labels, tmp_path / "l")
    for label in (tmp_path / "l").glob("scene-*/*/labels.npz"):
        damage(label)
    line = fails(capsys, "train", *flags, "--labels", tmp_path / "l", "--out", tmp_path / "x", "--steps", "1", *SMALL)
    assert names in line and str(tmp_path / "l") in line


@pytest.mark.parametrize("content, backbone", [(None, "conv"), (b"", "street+frozen"), (b"not a jpeg", "conv")])
def test_bad_images(content, backbone, tiny_world, data, tmp_path, capsys):
    shutil.copytree(tiny_world, tmp_path / "w")
    for image in (tmp_path / "w" / "samples" / "CAM_BACK").glob("*.jpg"):
        image.unlink() if content is None else image.write_bytes(content)
    line = fails(capsys, "train", "--data-root", tmp_path / "w", "--cache", tmp_path / "c", "--labels", data[1], "--out", tmp_path / "x",
                 "--steps", "1", *SMALL, "--backbone", backbone)  # fmt: skip
    assert "CAM_BACK" in line


@pytest.mark.parametrize("table", ["sample_data", "ego_pose", "scene"])
def test_bad_tables(table, tiny_world, data, tmp_path, capsys):
    shutil.copytree(tiny_world / "v1.0-mini", tmp_path / "w" / "v1.0-mini")
    path = tmp_path / "w" / "v1.0-mini" / f"{table}.json"
    words = ["train", "--data-root", tmp_path / "w", "--cache", tmp_path / "c", "--labels", data[1], "--out", tmp_path / "x", "--steps", "1"]
    path.write_bytes(path.read_bytes()[:-50])
    assert f"{table}.json" in fails(capsys, *words, *SMALL)
    path.unlink()
    assert f"{table}.json" in fails(capsys, *words, *SMALL)


def test_real_tree_without_maps_names_the_remedy(capsys, tmp_path):
    real = ROOT.parent / "shared" / "real" / "nuscenes"
    if not real.is_dir():
        pytest.skip("../shared/real/nuscenes is absent")
    assert "--labeler lidar" in fails(capsys, "train", "--data-root", real, "--cache", tmp_path / "c", "--out", tmp_path / "x", "--steps", "1")
    run("labels", "--labeler", "lidar", "--data-root", real, "--cache", tmp_path / "c", "--out", tmp_path / "l")
    assert "driveable surface within 0.3 m" in json.loads((tmp_path / "l" / "labels.json").read_text())["data"]["note"]
    label = np.load(next((tmp_path / "l").glob("scene-*/*/labels.npz")))["semantics"]
    assert set(np.unique(label)) >= {0, 4, 11, 17}  # others, car, driveable surface, free


def test_a_world_at_a_relative_path_is_whole(tmp_path, monkeypatch):
    """The verbs write to data/worlds/..., a relative folder: every image has its three exact maps, and nothing is beside."""
    from data.driving import make_world

    monkeypatch.chdir(tmp_path)
    make_world("w", seed=1, size="mini", scenes=1, keyframes=1, sweeps=0, image=(56, 100))
    names = {kind: sorted(p.name for p in Path("w/exact", kind).glob("*/*.png")) for kind in ("depth", "semantic", "instance")}
    assert len(names["depth"]) == 6 and names["depth"] == names["semantic"] == names["instance"]
    assert not Path("w/w").exists()
