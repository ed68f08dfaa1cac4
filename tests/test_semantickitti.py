"""SemanticKITTI, reader and writer: the bit files, the official voxelizer's rule on real frames, the reader against
KITTI's own formulas, every bad file, and the synthetic twin read back.
"""

import hashlib
import shutil
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from vectors import SHARED, load

from common import semantickitti as K
from common.files import InputError
from common.geometry import SEMANTICKITTI, invert, project
from common.nuscenes import rigid_inverse, stack
from common.semantickitti import SemanticKITTI
from data import render
from data.driving import make_world
from data.driving import semantickitti_writer as writer
from data.driving.__main__ import main
from data.driving.city import City
from data.driving.semantickitti_writer import EVERY, PERIOD, make_kitti_world

REAL = SHARED / "real" / "semantickitti"
needs_real = pytest.mark.skipif(not REAL.is_dir(), reason="the real SemanticKITTI frames are not in ../shared")
SIZE = int(np.prod(K.SHAPE))


# --- bits, classes, voxels --------------------------------------------------------------------------------------------


def test_vectors_bits_and_classes():
    v = load("semantickitti_ssc")
    v.exact("bits_in", K.pack(v["bits_out"]))
    assert K.LEARNING_MAP == dict(zip(v["learning_map_keys"].tolist(), v["learning_map_vals"].tolist()))
    for case in "ABC":
        for name in ("gt", "pred"):
            v.exact(f"{case}_{name}_train", K.to_train(v[f"{case}_{name}_raw"]))
        for packed, unpacked in zip(v[f"{case}_invalid_packed"], v[f"{case}_invalid_unpacked"]):
            assert np.array_equal(K.pack(unpacked), packed)


def test_pack_is_most_significant_bit_first():
    assert K.pack(np.array([1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 1])).tolist() == [0x80, 0x03]
    assert K.pack(np.array([0, 5, 0, 0, 0, 0, 0, 0], np.uint16)).tolist() == [0x40]  # any number but 0 counts
    with pytest.raises(ValueError, match="12 voxels"):
        K.pack(np.zeros(12))


def test_raw_ids_become_train_ids():
    assert K.to_train(np.array([0, 1, 52, 99, 252, 60])).tolist() == [0, 255, 255, 255, 1, 9]
    assert K.to_train(np.array([0, 1, 10, 255]), points=True).tolist() == [255, 255, 1, 8]  # points know no "empty"
    assert len(K.CLASSES) == len(K.PALETTE) == 20 and K.PALETTE[9].tolist() == [255, 0, 255]  # roads are magenta
    with pytest.raises(InputError, match="x.label: raw id 12"):
        K.to_train(np.array([10, 12]), "x.label")


def test_voxelize_by_hand():
    inside = np.array([[0.1, -25.5, -1.9], [0.15, -25.45, -1.85], [0.05, -25.55, -1.95], [51.1, 25.5, 4.3]])
    points = np.concatenate([inside, [[-0.1, 0, 0], [51.3, 0, 0], [1, 1, 4.5], [1, 1, -2.1]]])
    voxels = K.voxelize(points, np.array([40, 10, 40, 70, 10, 10, 10, 10]))
    assert voxels[0, 0, 0] == 40 and voxels[255, 255, 31] == 70 and (voxels > 0).sum() == 2
    assert voxels.dtype == np.uint16 and voxels.shape == (256, 256, 32)

    def one(*raw):
        return int(K.voxelize(np.tile([[0.1, -25.5, -1.9]], (len(raw), 1)), np.array(raw)).max())

    assert one(70, 40) == 40 and one(70, 40, 70) == 70  # a tie goes to the smallest id
    assert one(0, 40) == 0 and one(1, 40) == 0 and one(0, 40, 40) == 40 and one(0, 1, 40, 40) == 0
    assert one(99, 99, 40) == 99  # other-object is a candidate like any other; its voxel is ignored
    with pytest.raises(InputError, match="raw id 12"):
        one(12)


def test_stream_shift_by_hand():
    g = np.random.default_rng(0)
    points = g.uniform([0, -25.6, -2], [51.2, 25.6, 0], (5000, 3)).astype(np.float32)
    filled = K.voxelize(points, np.full(len(points), 40)) > 0
    assert K.stream_shift(filled, points) == 0
    assert K.stream_shift(np.roll(filled.ravel(), 1).reshape(K.SHAPE), points) == 1
    assert K.stream_shift(np.zeros(K.SHAPE, bool), points) == 0


# --- a tree by hand ---------------------------------------------------------------------------------------------------

CALIB = {
    "P0": "700 0 20 0 0 700 8 0 0 0 1 0",
    "P2": "700 0 20 42 0 700 8 0.7 0 0 1 0.002",
    "P3": "700 0 20 -336 0 700 8 0.7 0 0 1 0.002",
    "Tr": "0 -1 0 0.01 0 0 -1 -0.08 1 0 0 -0.27",
}


def make_tree(root: Path, sequences: tuple[str, ...] = ("00", "08"), frames: int = 7, late: int = 0) -> Path:
    """Scans of 3000 random points, voxels of frames 0 and 5 from their scan and the next; the car drives straight on.

    late: the packed files' stream is so many voxels late.
    """
    for name in sequences:
        g = np.random.default_rng(int(name))
        folder = root / "sequences" / name
        for part in ("velodyne", "labels", "image_2", "voxels"):
            (folder / part).mkdir(parents=True)
        (folder / "calib.txt").write_text("".join(f"{key}: {line}\n" for key, line in CALIB.items()))
        (folder / "times.txt").write_text("".join(f"{0.1 * k:.6e}\n" for k in range(frames)))
        (folder / "poses.txt").write_text("".join(f"1 0 0 0 0 1 0 0 0 0 1 {0.8 * k}\n" for k in range(frames)))
        for k in range(frames):
            points = g.uniform([0, -20, -1.9, 0], [45, 20, 1, 1], (3000, 4)).astype("<f4")
            raw = g.choice([0, 10, 40, 48, 50, 70, 80, 99, 252], 3000).astype("<u4")
            points.tofile(folder / "velodyne" / f"{k:06d}.bin")
            (raw | 7 << 16).astype("<u4").tofile(folder / "labels" / f"{k:06d}.label")
            cv2.imwrite(str(folder / "image_2" / f"{k:06d}.png"), g.integers(0, 256, (16, 40, 3)).astype(np.uint8))
            if k % 5 == 0:
                label = K.voxelize(points, raw)
                bits = {"bin": label > 0, "invalid": g.random(K.SHAPE) < 0.3, "occluded": g.random(K.SHAPE) < 0.5}
                label.astype("<u2").tofile(folder / "voxels" / f"{k:06d}.label")
                for suffix, one in bits.items():
                    K.pack(np.roll(one.ravel(), late)).tofile(folder / "voxels" / f"{k:06d}.{suffix}")
    return root


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    return make_tree(tmp_path_factory.mktemp("kitti") / "tree")


def test_frames_tokens_and_splits(tree, capsys):
    data = SemanticKITTI(tree)
    assert data.split == "train" and "1 of its 10 sequences (00)" in capsys.readouterr().err
    assert data.tokens == ["00/000000", "00/000005"] and data.scene_names == ["00", "00"] and len(data) == 2
    assert SemanticKITTI(tree, "val").tokens == ["08/000000", "08/000005"] and not capsys.readouterr().err
    assert len(SemanticKITTI(tree, "all")) == len(SemanticKITTI(tree, "00,08")) == 4
    every = SemanticKITTI(tree, "00", keyframes="scans")
    assert len(every) == 7 and every.past(4, 2) == [3, 2] and every.past(0, 3) == [] and every.past(1, 3) == [0]
    assert data.index("00/000005") == 1 and data.past(1, 5) == [0] and data.timestamp(1) == 500_000
    assert data.camera_files(1) == ["sequences/00/image_2/000005.png"]
    assert data.lidar_file(1) == "sequences/00/velodyne/000005.bin"
    rebuilt, arguments = data.__reduce__()  # what a spawned loader worker does
    assert rebuilt(*arguments).tokens == data.tokens
    with pytest.raises(InputError, match="frame '00/000001' is not in split"):
        data.index("00/000001")
    with pytest.raises(IndexError):
        data[2]


def test_a_frame_is_a_frame(tree):
    data = SemanticKITTI(tree, image_size=(8, 10))
    batch = stack([data[0], data[1]])
    shapes = {"images": (2, 1, 3, 8, 10), "K": (2, 1, 3, 3), "T_ego_cam": (2, 1, 4, 4), "semantics": (2, *K.SHAPE),
              "mask_camera": (2, *K.SHAPE), "mask_lidar": (2, *K.SHAPE), "T_global_ego": (2, 4, 4)}  # fmt: skip
    assert {name: tuple(batch[name].shape) for name in shapes} == shapes
    assert batch["images"].dtype == torch.float32 and 0 <= batch["images"].min() < batch["images"].max() <= 1
    assert batch["token"] == ["00/000000", "00/000005"] and "boxes" not in batch
    scan = K.read_scan(tree / "sequences/00/velodyne/000005.bin")
    points = batch["points"][1].numpy()
    assert np.array_equal(points[:, :3], scan[:, :3]) and (points[:, 4] == -1).all()
    assert np.allclose(points[:, 3], 255 * scan[:, 3])
    semantics, valid, visible = data.labels(1)
    folder = tree / "sequences/00/voxels"
    assert np.array_equal(semantics, K.to_train(np.fromfile(folder / "000005.label", "<u2").reshape(K.SHAPE)))
    invalid, occluded, own = (K.read_bits(folder / f"000005.{s}")
                              for s in ("invalid", "occluded", "bin"))  # fmt: skip
    assert np.array_equal(valid, ~invalid) and np.array_equal(visible, ~occluded | own)
    raw = np.fromfile(tree / "sequences/00/labels/000005.label", "<u4")
    assert np.array_equal(data.lidarseg(1, raw=True), raw & 0xFFFF)
    assert np.array_equal(data.lidarseg(1) == 255, np.isin(raw & 0xFFFF, (0, 99)))
    assert SemanticKITTI(tree, parts=("points",))[0].images is None
    bare = SemanticKITTI(tree, keyframes="scans", parts=("labels",))[1]
    assert bare.semantics is None and bare.mask_camera is None and bare.points is None


def test_calibration_is_kittis_formula(tree):
    """K, T_ego_cam and T_global_ego against P2 Tr and the pose written out; also resized and for two cameras."""
    data = SemanticKITTI(tree, image_size=(32, 20), cameras=("image_2", "image_3"))
    intrinsics, T_ego_cam, T_global_ego = data.calibration(1)
    Tr = np.vstack([np.array(CALIB["Tr"].split(), float).reshape(3, 4), [0, 0, 0, 1]])
    points = np.random.default_rng(0).uniform([5, -5, -2], [40, 5, 2], (50, 3))
    for n, name in enumerate(("P2", "P3")):
        P = np.array(CALIB[name].split(), float).reshape(3, 4)
        homogeneous = P @ Tr @ np.concatenate([points, np.ones((50, 1))], 1).T
        expected = (homogeneous[:2] / homogeneous[2]).T * [20 / 40, 32 / 16]
        uv, depth = project(torch.from_numpy(points), torch.from_numpy(intrinsics[n]).double(),
                            invert(torch.from_numpy(T_ego_cam[n]).double()))  # fmt: skip
        assert np.allclose(uv, expected, atol=1e-3) and np.allclose(depth, homogeneous[2], atol=1e-4)
    pose = np.eye(4)
    pose[2, 3] = 0.8 * 5
    assert np.allclose(T_global_ego, np.linalg.inv(Tr) @ pose @ Tr, atol=1e-12)
    assert np.allclose(T_global_ego[:3, 3], [4, 0, 0])  # cam0's z is the LiDAR's x


def test_sweeps_are_past_scans_in_the_frames_own_place(tree):
    """Only the present and the past are read: a later scan may be broken."""
    data = SemanticKITTI(tree, keyframes="scans", parts=())
    now, two = data.points(3), data.points(3, sweeps=2)
    assert len(two) == 9000 and np.array_equal(two[:3000], now)
    for step in (1, 2):
        scan = K.read_scan(tree / f"sequences/00/velodyne/{3 - step:06d}.bin")
        part = two[3000 * step : 3000 * (step + 1)]
        assert np.allclose(part[:, :3], scan[:, :3] - [0.8 * step, 0, 0], atol=1e-4)
    assert len(data.points(1, sweeps=9)) == 6000


def test_future_scans_are_never_read(tmp_path):
    tree = make_tree(tmp_path, ("00",))
    data = SemanticKITTI(tree, keyframes="scans")
    before = data.points(3, sweeps=3)
    for k in range(4, 7):
        (tree / f"sequences/00/velodyne/{k:06d}.bin").write_bytes(b"broken")
    assert np.array_equal(SemanticKITTI(tree, keyframes="scans").points(3, sweeps=3), before)


def test_aggregate_is_one_vote_over_all_scans(tree):
    data = SemanticKITTI(tree)
    clouds, ids = [], []
    for k in range(3, 7):
        scan = K.read_scan(tree / f"sequences/00/velodyne/{k:06d}.bin")
        clouds.append(scan[:, :3] + np.float32([0.8 * (k - 5), 0, 0]))
        ids.append(np.fromfile(tree / f"sequences/00/labels/{k:06d}.label", "<u4") & 0xFFFF)
    expected = K.voxelize(np.concatenate(clouds), np.concatenate(ids))
    got = data.aggregate(1, before=2, raw=True)
    assert (got != expected).mean() < 1e-6  # a point may round across a face: the poses are not float32
    assert np.array_equal(data.aggregate(1, 2), K.to_train(got))
    assert (data.aggregate(1) > 0).sum() < (got > 0).sum()  # by default later scans only


def test_neighbours(tree, tmp_path):
    data = SemanticKITTI(tree)
    images, T, valid = data.neighbour(1, 1)
    assert valid.all() and images.shape == (1, 3, 16, 40) and data.camera_sweeps
    assert np.array_equal(images[0], SemanticKITTI(tree, keyframes="scans").images(6)[0])
    assert np.allclose(T[0, :3, 3] - data.calibration(1)[1][0, :3, 3], [0.8, 0, 0], atol=1e-5)
    images, T, valid = data.neighbour(0, -1)
    assert not valid.any() and not images.any() and np.array_equal(T, data.calibration(0)[1])
    few = make_tree(tmp_path, ("00",))
    for k in (1, 2, 3, 4, 6):
        (few / f"sequences/00/image_2/{k:06d}.png").unlink()
    data = SemanticKITTI(few)
    images, T, valid = data.neighbour(0, 1)  # the next keyframe's, five scans on
    assert valid.all() and np.array_equal(images[0], data.images(1)[0])
    assert np.allclose(T[0, :3, 3] - data.calibration(0)[1][0, :3, 3], [4, 0, 0], atol=1e-5)
    assert not data.neighbour(1, 1)[2].any()


def test_drives_of_one_sequence_are_scenes(tmp_path):
    """A pause in times.txt starts another drive: neither past nor sweeps nor votes cross it."""
    tree = make_tree(tmp_path, ("00",))
    times = [0.0, 0.1, 0.2, 0.3, 0.4, 11.0, 11.1]
    (tree / "sequences/00/times.txt").write_text("".join(f"{t:.6e}\n" for t in times))
    data = SemanticKITTI(tree)
    assert data.scene_names == ["00.0", "00.1"] and data.past(1, 5) == []
    assert len(data.points(1, sweeps=5)) == 3000
    assert np.array_equal(data.aggregate(1, 9, 0), data.aggregate(1, 0, 0))
    assert not data.neighbour(1, -1)[2].any()


@pytest.mark.parametrize("late", [0, 1])
def test_late_bits_are_measured_and_put_back(late, tmp_path):
    tree = make_tree(tmp_path, ("00",), frames=1, late=late)
    data = SemanticKITTI(tree)
    assert data.packed_shift == late and data.label_shift == 0 and data.grid == SEMANTICKITTI
    raw = np.fromfile(tree / "sequences/00/voxels/000000.label", "<u2").reshape(K.SHAPE)
    assert np.array_equal(data.bits(0, "bin"), raw > 0)
    stored = K.read_bits(tree / "sequences/00/voxels/000000.invalid")
    assert np.array_equal(data.labels(0)[1], ~stored)  # the score's mask is the file as it is
    path = tree / "sequences/00/voxels/000000.label"
    np.roll(raw.ravel(), 1).tofile(path)
    data = SemanticKITTI(tree)
    assert data.label_shift == 1 and data.grid.shape == K.SHAPE
    assert data.grid.lower == pytest.approx((0, -25.6, -2.2)) and data.grid.upper == pytest.approx((51.2, 25.6, 4.2))
    own = data.aggregate(0, 0, 0, raw=True)  # in `grid`, so in the order of the labels
    assert np.array_equal(own[:, :, 1:], np.roll(raw.ravel(), 1).reshape(K.SHAPE)[:, :, 1:])
    assert np.array_equal(data.bits(0, "bin")[:, :, 1:], own[:, :, 1:] > 0)


# --- bad input: one line, by the reader and by check ------------------------------------------------------------------


def spoil(kind: str, root: Path) -> None:
    folder = root / "sequences/00"
    scan, label = folder / "velodyne/000005.bin", folder / "labels/000005.label"
    match kind:
        case "nan":
            points = np.fromfile(scan, "<f4")
            points[[40, 401]] = np.nan, np.inf
            points.tofile(scan)
        case "empty scan":
            scan.write_bytes(b"")
        case "cut scan":
            scan.write_bytes(scan.read_bytes()[:-4])
        case "no Tr" | "no P2":
            lines = (folder / "calib.txt").read_text().splitlines()
            kept = [line for line in lines if not line.startswith(kind[3:])]
            (folder / "calib.txt").write_text("\n".join(kept))
        case "short Tr":
            text = (folder / "calib.txt").read_text().replace(CALIB["Tr"], CALIB["Tr"][:-6])
            (folder / "calib.txt").write_text(text)
        case "no calib":
            (folder / "calib.txt").unlink()
        case "fewer labels":
            label.write_bytes(label.read_bytes()[:-4])
        case "raw id":
            np.full(3000, 12, "<u4").tofile(label)
        case "short voxels":
            (folder / "voxels/000005.invalid").write_bytes(b"\0" * 1000)
        case "short voxel labels":
            (folder / "voxels/000005.label").write_bytes(b"\0" * 1000)
        case "no voxel labels":
            (folder / "voxels/000005.label").unlink()
        case "no image":
            (folder / "image_2/000005.png").unlink()
        case "broken image":
            path = folder / "image_2/000005.png"
            path.write_bytes(path.read_bytes()[:60])
        case "other size":
            cv2.imwrite(str(folder / "image_2/000005.png"), np.zeros((10, 10, 3), np.uint8))
        case "few poses":
            (folder / "poses.txt").write_text("1 0 0 0 0 1 0 0 0 0 1 0\n" * 6)
        case "bad pose":
            (folder / "poses.txt").write_text("1 0 0 0 0 1 0 0 0 0 1 zero\n" * 7)
        case "no rotation":
            (folder / "poses.txt").write_text("1 0 0 0 0 1 0 0 0 0 2 0\n" * 7)
        case "mirror":
            (folder / "poses.txt").write_text("1 0 0 0 0 1 0 0 0 0 -1 0\n" * 7)
        case "flat Tr":
            (folder / "calib.txt").write_text((folder / "calib.txt").read_text().replace(CALIB["Tr"], "0 " * 12))
        case "no focal length":
            (folder / "calib.txt").write_text((folder / "calib.txt").read_text().replace("P2: 700", "P2: 0"))
        case "not text":
            (folder / "poses.txt").write_bytes(b"\xff\xfe1 0 0")
        case "few times":
            (folder / "times.txt").write_text("0.0\n0.1\n")
        case "times back":
            (folder / "times.txt").write_text("".join(f"{9 - k}\n" for k in range(10)))


@pytest.mark.parametrize("kind, says", [
    ("nan", "000005.bin: 2 of 3000 points hold nan or inf"), ("empty scan", "000005.bin: 0 bytes"),
    ("cut scan", "000005.bin: 47996 bytes"), ("no Tr", "calib.txt: no line 'Tr:'"),
    ("no P2", "calib.txt: no line 'P2:'"), ("short Tr", "is not 12 finite numbers"),
    ("no calib", "calib.txt: file not found"), ("fewer labels", "2999 labels for 3000 points"),
    ("raw id", "raw id 12 is not"), ("short voxels", "000005.invalid: 1000 bytes, expected 262144"),
    ("short voxel labels", "000005.label: 1000 bytes, expected 4194304"),
    ("no voxel labels", "000005.label: voxel labels not found"), ("no image", "000005.png: image not found"),
    ("broken image", "000005.png: not a readable image"), ("other size", "10x10 px, expected 40x16"),
    ("few poses", "poses.txt: 6 poses, but scans go up to 000006.bin"), ("bad pose", "is not 12 numbers"),
    ("few times", "times.txt: 2 times"), ("times back", "times.txt: a time is before the one above it"), ("no rotation", "poses.txt: '1 0 0 0 0 1 0 0 0 0 2 0 ...' is no rotation"),
    ("mirror", "is no rotation and translation"), ("flat Tr", "calib.txt: '0 0 0 0 0 0 0 0 0 0 0 0 ...' is no rotation"),
    ("no focal length", "is no projection K [I | b] with positive focal lengths"), ("not text", "not a UTF-8 text"),
])  # fmt: skip
def test_bad_files_are_one_line(kind, says, tmp_path):
    tree = make_tree(tmp_path, ("00",))
    spoil(kind, tree)
    with pytest.raises(InputError) as error:
        data = SemanticKITTI(tree)
        data[1], data.lidarseg(1)
    assert says in str(error.value) and "\n" not in str(error.value)


def test_wrong_roots_splits_and_options(tree, tmp_path):
    for arguments, says in (
        ((tree, "33"), "'33' is not in"), ((tree, "00,7"), "'7' is not in"),
        ((tree, "test"), "use --split train or val"),
        ((tmp_path / "no",), "no such folder"), ((tmp_path,), "no sequences/"), ((tree, None, (0, 5)), "image size"),
        ((tree, None, None, None, ("boxes",)), "parts: unknown boxes"),
    ):  # fmt: skip
        with pytest.raises(InputError, match=says.replace("(", r"\(")):
            SemanticKITTI(*arguments)
    with pytest.raises(InputError, match="keyframes 'all'"):
        SemanticKITTI(tree, keyframes="all")
    with pytest.raises(InputError, match="no line 'P4:'"):
        SemanticKITTI(tree, cameras=("image_4",))
    (tmp_path / "v1.0-mini").mkdir()
    with pytest.raises(InputError, match="which is nuScenes"):
        SemanticKITTI(tmp_path)
    (tmp_path / "dataset/sequences").mkdir(parents=True)
    with pytest.raises(InputError, match="holds both"):
        SemanticKITTI(tmp_path)


def test_other_sequences_and_frames_without_a_scan(tmp_path, capsys):
    """A tree takes what is there and says so; dataset/sequences is found too."""
    tree = make_tree(tmp_path / "dataset", ("00", "77"))
    (tree / "sequences/00/velodyne/000005.bin").unlink()
    (tree / "sequences/03").mkdir()  # the voxel archive makes every folder
    data = SemanticKITTI(tmp_path, "all")
    said = capsys.readouterr().err
    assert data.tokens == ["00/000000", "77/000000", "77/000005"] and data.root == tmp_path / "dataset"
    assert "77 are in no official split" in said and "1 frames with voxels but without a scan" in said
    for path in tree.glob("sequences/*/voxels/*"):
        path.unlink()
    with pytest.raises(InputError, match="no voxels"):
        SemanticKITTI(tmp_path)


def test_check(tmp_path, capsys):
    tree = make_tree(tmp_path, late=1)
    K.main(["check", "--data-root", str(tree)])
    out = capsys.readouterr().out
    assert "2 sequences, 4 frames with voxels" in out and "train  1 of 10 sequences, 2 such frames" in out
    assert "packed files 1 voxel late" in out and "kB" in out
    (tree / "sequences/08/image_2/000003.png").unlink()  # between frames with voxels: optional
    (tree / "sequences/08/times.txt").unlink()
    (tree / "sequences/08/voxels/000005.occluded").unlink()  # no score needs it
    (tree / "sequences/__MACOSX").mkdir()
    K.main(["check", "--data-root", str(tree)])
    assert "2 sequences, 4 frames with voxels" in capsys.readouterr().out
    for name, says in (("voxels/000000.label", "000000.label: 4 bytes, expected 4194304"),
                       ("image_2/000005.png", "000005.png: missing or empty; 1 required"),
                       ("voxels/000005.invalid", "2 required"), ("calib.txt", "3 required")):  # fmt: skip
        path = tree / "sequences/08" / name
        path.write_bytes(b"1234") if path.suffix == ".label" else path.unlink()
        with pytest.raises(SystemExit) as stop:
            K.main(["check", "--data-root", str(tree)])
        err = capsys.readouterr().err
        assert stop.value.code == 2 and says in err and err.count("\n") == 1


def test_show_draws_each_point_on_its_pixel_and_the_nearer_one_on_top(tmp_path, capsys):
    tree = make_tree(tmp_path / "t", ("00",))
    at = lambda z, u, v: [z + 0.27, 0.01 + (42 - u * z) / 700, -0.08 - (v * z - 0.7) / 700, 0]  # P2 Tr, inverted by hand  # noqa: E731
    scan = np.array([at(10.0, 1.5, 0.5), at(30.0, 1.5, 0.5), at(30.0, -9.5, -4.5), at(-5.0, 1.5, 0.5)], "<f4")
    scan.tofile(tree / "sequences/00/velodyne/000000.bin")
    np.array([10, 40, 0, 70], "<u4").tofile(tree / "sequences/00/labels/000000.label")
    words = ["show", "--data-root", str(tree), "--out", str(tmp_path / "p"), "--frames", "1"]

    def drawn() -> tuple[np.ndarray, np.ndarray]:
        K.main(words)
        both = [cv2.imread(str(path))[..., ::-1] for path in (tmp_path / "p/00_000000.png", tree / "sequences/00/image_2/000000.png")]
        return both[0], (both[0] != both[1]).any(-1)

    image, changed = drawn()
    assert (image[8:10, 21:23] == K.PALETTE[1]).all() and (image[3:5, 10:12] == 128).all() and changed.sum() == 8  # a car, no class
    shutil.rmtree(tree / "sequences/00/labels")
    near, far = drawn()[0][8, 21].astype(int), drawn()[0][3, 10].astype(int)
    assert near[1] > near[2] and far[2] > far[0], "warm is near, blue is far"
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        K.main([*words[:2], str(tmp_path / "none"), *words[3:]])
    assert stop.value.code == 2 and "no such folder" in capsys.readouterr().err


# --- the real frames --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def real():
    return SemanticKITTI(REAL, "00")


@needs_real
def test_the_real_scan_reproduces_the_real_voxels_bit_by_bit(real):
    """The z-origin trap: exact with the documented grid once the bits are read one late, and not otherwise."""
    assert real.tokens == ["00/000000", "00/000005"] and real.packed_shift == 1 and real.grid == SEMANTICKITTI
    for i in range(2):
        voxels = K.voxelize(real.points(i), real.lidarseg(i, raw=True))
        assert np.array_equal(voxels > 0, real.bits(i, "bin")) and (voxels > 0).sum() > 11_000
        stored = K.read_bits(real.root / f"sequences/00/voxels/{5 * i:06d}.bin")
        share = {}
        for z in (-2.2, -2.0):
            grid = K.VoxelGrid((0, -25.6, z), (51.2, 25.6, z + 6.4), K.SHAPE)
            filled = np.zeros(SIZE, bool)
            flat = K.voxel_index(real.points(i), grid)
            filled[flat[flat >= 0]] = True
            filled = filled.reshape(K.SHAPE)
            share[z] = (filled & stored).sum() / (filled | stored).sum()
        assert 0.99 < share[-2.2] < 1 and share[-2.0] < 0.24  # the sample's README: 0.997 and 0.23
        # not a lower origin: the scans have points in [-2.2, -2.0), and the layer that would hold them is empty
        assert not stored[:, :, 0].any()
    lower = K.VoxelGrid((0, -25.6, -2.2), (51.2, 25.6, 4.2), K.SHAPE)
    assert (K.voxel_index(real.points(1), lower) % 32 == 0).any()


@needs_real
def test_the_real_invalid_mask_is_late_too(real):
    """No voxel that the current or a later scan fills is invalid, if read one late; as stored, a fifth or more are."""
    for i in range(2):
        filled = real.aggregate(i) > 0
        stored = K.read_bits(real.root / f"sequences/00/voxels/{5 * i:06d}.invalid")
        assert filled.sum() > 20_000 and not (filled & real.bits(i, "invalid")).any()
        assert (filled & stored).sum() > 0.2 * filled.sum()
        assert not (real.bits(i, "invalid") & ~real.bits(i, "occluded")).any()
        occluded = K.read_bits(real.root / f"sequences/00/voxels/{5 * i:06d}.occluded").mean((0, 1))
        # a column's foot holds what continues the top of the column before it, not what is below the road
        assert abs(occluded[0] - occluded[31]) < 0.02 and occluded[1] > 0.99 > occluded[0] + 0.5


@needs_real
def test_real_geometry(real):
    """P2 Tr by KITTI's formula; the poses bring two scans that lie 7 m apart together."""
    scans = SemanticKITTI(REAL, "00", keyframes="scans")
    assert len(scans) == 10 and scans.image_shape == (376, 1241) and scans.gts is None and scans[3].semantics is None
    frame = scans[0]
    calib = K.read_calib(REAL / "dataset/sequences/00/calib.txt")
    Tr = np.vstack([calib["Tr"], [0, 0, 0, 1]])
    points = frame.points[:, :3].double()
    image = calib["P2"] @ Tr @ np.concatenate([points.numpy(), np.ones((len(points), 1))], 1).T
    uv, depth = project(points, frame.K[0].double(), invert(frame.T_ego_cam[0].double()))
    near = depth > 1
    assert np.abs(uv.numpy()[near] - (image[:2] / image[2]).T[near]).max() < 0.01
    inside = near & (uv[:, 0] >= 0) & (uv[:, 0] < 1241) & (uv[:, 1] >= 0) & (uv[:, 1] < 376)
    assert 18_000 < inside.sum() < 21_000
    # where the range jumps from one return to the next, the image has an upright edge; 8 px beside it has fewer
    steep = np.abs(cv2.Sobel(cv2.GaussianBlur(frame.images[0].mean(0).numpy(), (0, 0), 1.0), cv2.CV_32F, 1, 0))
    reach, (u, v) = points.norm(dim=1).numpy(), uv.numpy().T
    pair = (inside[1:] & inside[:-1]).numpy()
    jump = np.flatnonzero((np.abs(np.diff(reach)) > 1) & (np.abs(np.diff(u)) < 6) & pair)
    edge = np.where(reach[jump] < reach[jump + 1], jump, jump + 1)
    edge = edge[(reach[edge] < 30) & (u[edge] > 20) & (u[edge] < 1220)]
    at = {step: steep[v[edge].astype(int), (u[edge] + step).astype(int)].mean() for step in range(-16, 17, 2)}
    assert len(edge) > 200 and max(at, key=at.get) in (-2, 0, 2)
    assert at[0] > 1.4 * np.mean([value for step, value in at.items() if abs(step) >= 8])
    moved = np.linalg.norm(scans.calibration(9)[2][:3, 3] - scans.calibration(0)[2][:3, 3])
    assert 5 < moved < 10
    now, all_ten = scans.points(9), scans.points(9, sweeps=9)
    old = all_ten[-len(scans.points(0)) :]

    def filled(points):
        flat = K.voxel_index(points)
        return set(flat[flat >= 0].tolist())

    here, still, raw = filled(now), filled(old), filled(scans.points(0))
    assert len(here & still) / len(still) > 0.5 > 1.8 * len(here & raw) / len(raw)


@needs_real
def test_check_of_the_real_sample_names_what_is_missing(capsys):
    with pytest.raises(SystemExit) as stop:
        K.main(["check", "--data-root", str(REAL)])
    out, err = capsys.readouterr()
    assert stop.value.code == 2 and "velodyne/000010.bin: missing or empty; 16 required" in err
    assert "1 sequences, 10 frames with voxels" in out


# --- the synthetic twin -----------------------------------------------------------------------------------------------

DRIVES = ["00.0", "08.0", "08.1"]
TINY = dict(seed=3, size="mini", scenes=None, keyframes=2, image=(48, 160), workers=1)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(writer, "drive_names", lambda size, scenes: DRIVES)
        return make_kitti_world(tmp_path_factory.mktemp("twin") / "world", **TINY)


def test_the_twin_reads_back(world, capsys):
    K.check(world)
    assert "order of voxels: as documented" in capsys.readouterr().out
    train, val = SemanticKITTI(world), SemanticKITTI(world, "val")
    assert train.scene_names == ["00"] * 2 and val.scene_names == ["08.0"] * 2 + ["08.1"] * 2
    assert val.tokens == ["08/000000", "08/000005", "08/000010", "08/000015"]
    assert val.past(2, 5) == [] and val.past(3, 5) == [2] and not val.camera_sweeps
    assert val.timestamp(1) - val.timestamp(0) == round(1e6 * EVERY * PERIOD)
    frame = val[3]
    assert frame.images.shape == (1, 3, 48, 160) and frame.images.std() > 0.05
    assert len(frame.points) > 30_000 and frame.points[:, 3].max() <= 255


def test_the_twins_voxels_are_what_its_scans_say(world):
    """.label = the vote of all scans of the drive, .bin = the own scan's; masks as their definitions have it."""
    data = SemanticKITTI(world, "all")
    for i in range(len(data)):
        semantics, valid, visible = data.labels(i)
        assert np.array_equal(semantics, data.aggregate(i, before=99))
        own = K.voxelize(data.points(i), data.lidarseg(i, raw=True)) > 0
        assert np.array_equal(own, data.bits(i, "bin")) and own.sum() > 3000
        invalid, occluded = data.bits(i, "invalid"), data.bits(i, "occluded")
        assert not (invalid & ((semantics > 0) | own)).any() and not (invalid & ~occluded).any()
        assert (occluded | ~own).all() and np.array_equal(visible, ~occluded | own)
        assert 0.2 < invalid.mean() < 0.8 and valid[:, :, 31].mean() > valid[:, :, 0].mean() + 0.3
        assert (semantics > 0).sum() > 1.2 * own.sum()
    present = set(np.unique(np.stack([data.labels(i)[0] for i in range(len(data))])).tolist())
    assert {0, 1, 7, 8, 9, 11, 13, 15, 17, 18, 255} <= present


def test_the_twins_sensors_agree(world):
    """LiDAR points projected on the image meet the exact depth and class maps there."""
    data = SemanticKITTI(world, "all")
    for i in (0, 3):
        frame, seg, path = data[i], data.lidarseg(i), data.camera_files(i)[0]
        depth = cv2.imread(str(world / "exact/depth" / path), cv2.IMREAD_UNCHANGED) / 256
        classes = cv2.imread(str(world / "exact/semantic" / path), cv2.IMREAD_UNCHANGED)
        uv, z = project(frame.points[:, :3].double(), frame.K[0].double(), invert(frame.T_ego_cam[0].double()))
        u, v, z = uv[:, 0].numpy(), uv[:, 1].numpy(), z.numpy()
        inside = (z > 1) & (u >= 0) & (u < 160) & (v >= 0) & (v < 48)
        there = v[inside].astype(int), u[inside].astype(int)
        # a pixel is 0.4 degrees wide: on the road its depth differs by some percent from its lower to its upper edge
        assert inside.sum() > 3000 and np.median(np.abs(depth[there] / z[inside] - 1)) < 0.02
        labelled = (seg[inside] != 255) & (classes[there] != 255)
        assert (seg[inside] == classes[there])[labelled].mean() > 0.9
        assert not classes[depth == 0].min(initial=255) < 255 and set(np.unique(classes)) <= {*range(1, 20), 255}
    scan = data.points(0)
    reach = np.linalg.norm(scan[:, :3], axis=1)
    assert (data.lidarseg(0, raw=True)[(reach > 50.01) | (reach < 2.49)] == 0).all() and (reach > 50).any()
    elevation = np.degrees(np.arcsin(scan[:, 2] / reach))
    assert elevation[:50].mean() > elevation[-50:].mean() + 20  # the top ring first, as in KITTI's files


def test_poses_of_the_twin_are_the_citys(world):
    """Relative poses against City.ego; a drive's first pose is 10 km from the one before."""
    data = SemanticKITTI(world, "val", parts=())
    city = writer.RecordedCity([3, 108, 1], PERIOD * (2 * EVERY - 1), False, 1)
    _, T_ego_velo = writer.calibration(3, "08", (48, 160))
    first, second = (city.ego(t) @ T_ego_velo for t in (0.0, EVERY * PERIOD))
    got = rigid_inverse(data.calibration(2)[2]) @ data.calibration(3)[2]
    assert np.allclose(got, rigid_inverse(first) @ second, atol=1e-5) and np.linalg.norm(got[:3, 3]) > 0.5
    gap = data.calibration(2)[2][:3, 3] - data.calibration(0)[2][:3, 3]
    assert np.linalg.norm(gap) == pytest.approx(writer.APART, rel=1e-6)


def fingerprint(root: Path) -> dict[str, str]:
    files = (path for path in sorted(root.rglob("*")) if path.is_file())
    return {str(path.relative_to(root)): hashlib.md5(path.read_bytes()).hexdigest() for path in files}


def test_the_same_seed_gives_the_same_bytes_and_a_broken_run_goes_on(world, tmp_path, monkeypatch, capsys):
    out, record, done = tmp_path / "again", writer.record_drive, []

    def breaks(root, settings, index, tick):
        if done:
            raise KeyboardInterrupt
        done.append(index)
        record(root, settings, index, tick)

    monkeypatch.setattr(writer, "drive_names", lambda size, scenes: DRIVES)
    monkeypatch.setattr(writer, "record_drive", breaks)
    with pytest.raises(KeyboardInterrupt):
        make_kitti_world(out, **TINY)
    assert not (out / "exact/world.json").exists()
    monkeypatch.setattr(writer, "record_drive", record)
    with pytest.raises(InputError, match="another seed"):
        make_kitti_world(out, **{**TINY, "seed": 4})
    capsys.readouterr()
    make_kitti_world(out, **TINY)
    assert "4 keyframes in" in capsys.readouterr().out  # the first drive was kept
    assert fingerprint(out) == fingerprint(world)
    make_kitti_world(out, **TINY)
    assert "there already (3 drives x 2 keyframes)" in capsys.readouterr().out
    with pytest.raises(InputError, match="holds a world with another"):
        make_world(out, scenes=1)


def test_what_is_hidden_against_plain_ray_casting():
    """`visible_from` on its panorama against an exact ray to each voxel's centre, from the car and from ahead of it."""
    city = City([3, 100, 0], 1.0, False, 0)
    scene = city.scene(0.0, light=False)
    T = city.ego(0.0)
    T[:3, 3] += [0, 0, 1.73]
    centers = SEMANTICKITTI.centers(torch.float64).numpy()
    index = np.random.default_rng(0).integers(0, K.SHAPE, (1500, 3))
    for at in (np.zeros(3), np.array([12.0, 1.0, 0.1])):
        seen = writer.visible_from(scene, T, at)[tuple(index.T)]
        ray = centers[tuple(index.T)] - at
        length = np.linalg.norm(ray, axis=1)
        origin = T[:3, :3] @ at + T[:3, 3]
        t, ids = render.cast(scene, origin, (ray / length[:, None]) @ T[:3, :3].T)
        free = (ids == render.NONE) | (t > length)
        assert (seen == free).mean() > 0.97 and 0.2 < free.mean() < 0.9


def test_classes_of_things_and_of_what_stands(world):
    """Points with an instance lie on their actor and have its class; street furniture is told apart by shape."""
    from data.driving import streets
    from data.render import PrimitiveList

    duration = PERIOD * (2 * EVERY - 1)
    city = writer.RecordedCity([3, 108, 1], duration, False, 1)
    labeller = writer.Labeller(city, duration)
    _, T_ego_velo = writer.calibration(3, "08", (48, 160))
    T = city.ego(0.0) @ T_ego_velo
    points, labels = writer.scan(city, labeller, 0.0, T, np.random.default_rng(0))
    raw, instance = labels & 0xFFFF, labels >> 16
    kinds = set()
    for k in np.unique(instance[instance > 0]):
        actor, mine = city.actors[k], instance == k
        own = K.move_points(rigid_inverse(city.pose(int(k), 0.0)) @ T, points[mine])
        assert (np.abs(own[:, :2]) < np.array(actor.model.size[:2]) / 2 + 0.15).all(1).mean() > 0.95
        assert len(np.unique(raw[mine])) == 1
        goes = np.linalg.norm(np.subtract(actor.state(duration)[:2], actor.state(0.0)[:2])) > 0.5
        kind = int(raw[mine][0])
        assert kind not in range(40, 99) or kind == 51
        assert (kind >= 252) == (goes and kind not in (11, 15, 99))
        kinds.add(kind)
    assert kinds & {10, 252} and len(kinds) >= 3
    assert set(np.unique(raw[instance == 0])) <= {0, 40, 44, 48, 49, 50, 51, 70, 71, 72, 80, 81, 99}

    def classes(build, *words, **more) -> list[int]:
        city.builder.list = PrimitiveList()
        build(city.builder, *words, **more)
        return writer.background_ids(city.builder.list.build()).tolist()

    assert classes(streets._lamp_post, 50, 50, 0.3, []) == [80, 80, 80]
    assert {tuple(classes(streets._sign, 50, 50, k)) for k in range(8)} == {(80, 81)}
    assert set(classes(streets._wall, 50, 50, 0.3, 9, 2.5)) == {51}
    assert set(classes(streets._hedge, 50, 50, 0.3, 9, 2.5)) == {70}
    assert all(set(classes(streets._building, 50, 50, 0.3, 15, 9, 12, 1)) == {50} for _ in range(10))
    assert all(set(classes(streets._tree, 50, 50)) == {70, 71} for _ in range(5))
    assert set(classes(streets.add_traffic_light, 50, 50, 0.3, 1, [], 0, True)) == {80, 99}


def test_drive_names_are_official():
    for size, (train, held, _) in writer.SIZES.items():
        names = writer.drive_names(size, None)
        homes = [name.split(".")[0] for name in names]
        assert len(set(names)) == len(names) == train + held and homes.count("08") == held
        assert set(homes) == {*K.SPLITS["train"], "08"}
        for sequence in set(homes):  # numbered from 0 without a gap: frame numbers run on
            numbers = sorted(int(name.split(".")[1]) for name in names if name.startswith(sequence))
            assert numbers == list(range(len(numbers)))
    assert writer.drive_names("demo", 2) == ["00.0", "08.0"]


def test_a_cyclist_rides_in_a_cars_place_when_it_is_the_drives_turn():
    plain, riding = (kind([3, 100, 0], 1.8, False, 0) for kind in (City, writer.RecordedCity))
    changed = [i for i, (a, b) in enumerate(zip(plain.actors, riding.actors)) if a.model.size != b.model.size]
    assert len(plain.actors) == len(riding.actors) and len(changed) == 1
    (i,) = changed
    cars = [k for k, a in enumerate(plain.actors) if k and a.path is not None and a.model.semantic == writer.CAR]
    assert i in cars and riding._away(i) == min(map(riding._away, cars)) < 40
    assert plain.actors[i].state(1.0) == riding.actors[i].state(1.0)
    assert writer.Labeller(riding, 1.8).of_actor[i] in (31, 253)
    assert writer.Labeller(plain, 1.8).of_actor[i] in (10, 252)


def test_command_line(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(writer, "drive_names", lambda size, scenes: ["00.0"])
    common = ["--format", "semantickitti", "--keyframes", "1", "--workers", "1"]
    main(["--out", str(tmp_path / "w"), *common, "--image", "80x24", "--camera-sweeps", "2"])
    assert "1 keyframes in" in capsys.readouterr().out
    data = SemanticKITTI(tmp_path / "w")
    assert len(data) == 1 and data.image_shape == (24, 80) and data.camera_sweeps and data.neighbour(0)[2].all()
    monkeypatch.undo()
    capsys.readouterr()
    for flags, says in ((["--sweeps", "2"], "--sweeps 2"), (["--camera-sweeps", "1"], "--camera-sweeps 1"),
                        (["--image", "4x4"], "--image"), (["--keyframes", "0"], "--keyframes 0"),
                        (["--scenes", "1"], "--scenes 1")):  # fmt: skip
        with pytest.raises(SystemExit) as stop:
            main(["--out", str(tmp_path / "no"), "--format", "semantickitti", *flags])
        message = capsys.readouterr().err
        assert stop.value.code == 2 and says in message and message.count("\n") == 1 and not (tmp_path / "no").exists()
