"""Loose images: the same frames as the tree's own reader gives, predictions too, and one line for each mistake."""

import json
from pathlib import Path

import commands
import numpy as np
import pytest
import torch

import easyocc as E
from common.files import InputError, read_json, write_json
from common.loose import LooseImages, check, main, write_example
from common.nuscenes import NuScenesOccupancy

REAL = Path(__file__).resolve().parents[2] / "shared" / "real" / "nuscenes"
SIZE = (56, 100)


def take_apart(root: Path, tmp: Path) -> tuple[list[str], Path, str]:
    """The first keyframe of a tree -> its image files, calibration and sweep."""
    dataset = NuScenesOccupancy(root, split="all", cache=tmp / "cache")
    words = write_example(dataset, 0, tmp / "c.json")
    return words[1:7], tmp / "c.json", words[8]


@pytest.mark.parametrize("tree", ["synthetic", "real"])
def test_frames_are_the_readers_own(tree, tiny_world, tmp_path):
    root = tiny_world if tree == "synthetic" else REAL
    if not root.is_dir():
        pytest.skip("../shared/real/nuscenes is absent")
    images, path, sweep = take_apart(root, tmp_path)
    own = NuScenesOccupancy(root, split="all", image_size=SIZE, cache=tmp_path / "cache", parts=("images", "points"))
    loose = LooseImages(tuple(images), path, SIZE, (sweep,))
    a, b = own[0], loose[0]
    assert torch.equal(a.images, b.images) and a.images.shape == (6, 3, *SIZE) and len(loose) == 1
    torch.testing.assert_close(b.K, a.K)
    torch.testing.assert_close(b.T_ego_cam, a.T_ego_cam)
    torch.testing.assert_close(b.points, a.points, atol=1e-4, rtol=0)
    assert not loose.future(0).mask.any() and len(loose.boxes(0).names) == 0 and loose.past(0, 3) == []


def test_two_keyframes_of_two_cameras(tiny_world, tmp_path):
    images, path, _ = take_apart(tiny_world, tmp_path)
    stored = read_json(path)
    write_json(path, {"cameras": stored["cameras"][:2]})
    loose = LooseImages(tuple(images[:4]), path, SIZE)
    assert len(loose) == 2 and loose[1].images.shape[0] == 2 and loose[0].points is None
    assert loose.camera_files(1) == [str(Path(name).absolute()) for name in images[2:4]]
    del stored["cameras"][0]["size"]  # then the image's own
    write_json(path, stored)
    torch.testing.assert_close(LooseImages(tuple(images), path, SIZE)[0].K[0], loose[0].K[0])


def test_each_mistake_is_one_line(tiny_world, tmp_path):
    images, path, sweep = take_apart(tiny_world, tmp_path)
    stored = json.loads(path.read_text())
    with pytest.raises(InputError, match="5 files, .* has 6 cameras"):
        LooseImages(tuple(images[:5]), path, SIZE)
    with pytest.raises(InputError, match="1 files for 2 keyframes"):
        LooseImages(tuple(images + images), path, SIZE, (sweep,))
    with pytest.raises(InputError, match="rename one"):
        LooseImages(tuple(images + images), path, SIZE)
    with pytest.raises(InputError, match="give it with --points"):
        LooseImages(tuple(images), path, SIZE).points(0)
    for name, value in (("K", [[1, 0, 0]]), ("K", np.diag([1, -1, 1]).tolist()), ("T_ego_cam", np.ones((4, 4)).tolist()),
                        ("size", [0, 4]), ("T_ego_cam", np.diag([1, 1, -1, 1]).tolist()), ("K", [[1], [1, 2]])):
        broken = {"cameras": [dict(stored["cameras"][0], **{name: value}), *stored["cameras"][1:]]}
        write_json(path, broken)
        with pytest.raises(InputError, match=f"'{name}' is not"):
            LooseImages(tuple(images), path, SIZE)
    write_json(path, {"cameras": [{"K": 3}]})
    with pytest.raises(InputError, match="c.json"):
        LooseImages(tuple(images), path, SIZE)
    assert check(path, "K", [[2, 0, 1], [0, 2, 1], [0, 0, 1]], (3, 3)).dtype == np.float64


def test_easyocc_predicts_loose_images_as_the_tree(tiny_world, tmp_path, capsys, monkeypatch):
    run, fails = commands.of(E)
    images, path, _ = take_apart(tiny_world, tmp_path)
    words = ["loose", "--data-root", str(tiny_world), "--out", str(tmp_path / "c.json")]
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr("sys.argv", words)
    main()
    assert capsys.readouterr().out.split()[:3] == ["predict", "--images", images[0]]
    monkeypatch.setattr("sys.argv", [*words, "--frame", "99"])
    with pytest.raises(SystemExit):
        main()
    assert "the split has 6 keyframes" in capsys.readouterr().err
    small = ["--map-stride", "8", "8", "--grid-stride", "4", "4", "2", "--lift-stride", "1", "1", "1", "--cnn-channels",
             "8", "16", "--channels", "8", "--image-size", *SIZE, "--workers", "1", "--warmup", "1"]
    run("train", "--data-root", tiny_world, "--out", tmp_path / "x", "--steps", "1", *small)
    words = ["predict", "--ckpt", tmp_path / "x", "--out", tmp_path / "p"]
    run(*words, "--images", *images, "--calibration", path)
    run("predict", "--ckpt", tmp_path / "x", "--out", tmp_path / "q", "--data-root", tiny_world, "--split", "all",
        "--eval-frames", "1", "--pictures", "0")
    loose, = (np.load(p)["pred"] for p in (tmp_path / "p").glob("*.npz"))
    own, = (np.load(p)["pred"] for p in (tmp_path / "q").glob("*.npz"))
    assert np.array_equal(loose, own) and (tmp_path / "p" / "viewer.html").is_file()
    assert "--calibration" in fails(capsys, *words, "--images", *images)
