"""common/audit.py on a tiny nuScenes tree: the table, the warning, and every way in which a folder can be wrong."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from test_nuscenes import POSES, make_tree, needs_poses
from test_semantickitti import make_tree as make_kitti

from common import audit as A
from common import metrics as M
from common.files import InputError, write_npz
from common.nuscenes import NuScenesOccupancy, rigid_inverse
from common.semantickitti import SemanticKITTI

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """Two scenes of five keyframes, one of them mini_val; labels with all kinds of voxels, each mask its own share."""
    root = make_tree(tmp_path_factory.mktemp("audit") / "tree")
    g = np.random.default_rng(0)
    for path in sorted(root.glob("gts/*/*/labels.npz")):
        full = g.random((200, 200, 16)) < 0.03
        ids = np.where(full, g.choice([0, 1, 4, 11, 12, 15], full.shape), 17).astype(np.uint8)
        camera, lidar = ((g.random(ids.shape) < share).astype(np.uint8) for share in (0.4, 0.2))
        write_npz(path, semantics=ids, mask_camera=camera, mask_lidar=lidar)
    return root


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def val(tree, cache):
    return NuScenesOccupancy(tree, split="mini_val", cache=cache, parts=())


def prediction(val, i: int) -> np.ndarray:
    """The truth with a third of its objects called bus, which no label holds."""
    ids = val.labels(i)[0].copy()
    wrong = (ids != 17) & (np.random.default_rng(i).random(ids.shape) < 1 / 3)
    ids[wrong] = 3
    return ids


@pytest.fixture
def folder(val, tmp_path):
    for i, token in enumerate(val.tokens):
        write_npz(tmp_path / "pred" / f"{token}.npz", pred=prediction(val, i))
    return tmp_path / "pred"


@pytest.fixture
def few_rays(monkeypatch):
    """Every 20th ray: the audit's own arithmetic is what is tested here."""
    rays = M.lidar_ray_directions()[::20]
    monkeypatch.setattr(M, "lidar_ray_directions", lambda: rays)


def row(result: dict, score: str, protocol: str, mask: str) -> dict:
    (found,) = [r for r in result["rows"] if (r["score"], r["protocol"], r["mask"]) == (score, protocol, mask)]
    return found


def test_table_equals_the_metrics(val, tree, cache, folder, few_rays, tmp_path, capsys):
    result = A.audit(folder, tree, cache=cache, json_path=tmp_path / "audit.json")
    meter, frames = M.OccupancyMeter(), []
    for i in range(len(val)):
        frames.append((prediction(val, i), *val.labels(i)))
        meter.add(*frames[-1], group=val.scene_names[i])
    for name, rule in M.PROTOCOLS.items():
        expected = M.occupancy_scores(meter.confusion(rule.mask), name)["miou"]
        assert row(result, "mIoU", name, rule.mask)["percent"] == pytest.approx(100 * expected, abs=1e-9)
    rays = M.ray_iou([f[0] for f in frames], [f[1] for f in frames], [val.ray_origins(i) for i in range(len(val))])
    assert row(result, "RayIoU@2", "rayiou", "rays")["percent"] == pytest.approx(100 * rays["rayiou@2"], abs=1e-9)
    unmasked = 100 * float(M.miou(meter.confusion("none")))
    assert row(result, "mIoU", "flashocc", "none")["percent"] == pytest.approx(unmasked)
    assert row(result, "IoU", "geometry", "camera")["percent"] == 100  # a wrong class is still occupied

    text = capsys.readouterr().out
    assert "nuScenes v1.0-mini mini_val, 5 frames" in text and "train unknown" in text
    for words in ("FlashOcc", "SparseOcc", "GaussTR", "OccNeRF", "SelfOcc", "unverified", "absent class"):
        assert words in text
    # bus is absent from the truth: 0 in FlashOcc's mean, skipped in SparseOcc's, so the two differ by a seventh
    few, many = (row(result, "mIoU", p, "camera")["percent"] for p in ("flashocc", "sparseocc"))
    assert few == pytest.approx(many * 6 / 7) and many - few > A.SEED_NOISE
    assert len(result["warnings"]) == 1 and "compare within one row only" in result["warnings"][0]
    assert f"warning: {result['warnings'][0]}" in text and "seed's noise (1.0 mIoU)" in text
    written = json.loads((tmp_path / "audit.json").read_text())
    assert written == json.loads(json.dumps(result)) and written["dataset"]["split"] == "mini_val"
    assert written["metrics"]["miou_camera"] == pytest.approx(few / 100)


def test_the_truth_scores_100_everywhere_as_labels_and_as_predictions(val, tree, cache, few_rays, tmp_path, capsys):
    as_labels = A.audit(tree / "gts", tree, cache=cache)
    for i, token in enumerate(val.tokens):
        write_npz(tmp_path / f"{token}.npz", pred=val.labels(i)[0])
    as_predictions = A.audit(tmp_path, tree, cache=cache)
    assert as_labels["rows"] == as_predictions["rows"] and len(as_labels["rows"]) > 12
    assert all(r["percent"] == 100 for r in as_labels["rows"]) and not as_labels["warnings"]
    assert "undefined" not in capsys.readouterr().out


@pytest.mark.parametrize("place, key", [
    ("{token}.npz", "arr_0"), ("{token}.npz", "semantics"), ("{token}.npy", ""), ("{scene}/{token}/pred.npz", "pred"),
    ("{scene}/{token}/labels.npz", "semantics"), ("{scene}/{token}.npz", "arr_0"), ("{scene}/{token}/pred.npy", ""),
])  # fmt: skip
def test_the_fields_forms_give_the_same_table(place, key, val, tree, cache, folder, tmp_path, capsys):
    """What other code bases write (np.savez without names, a file a folder, np.save) is found, said and scored alike."""
    for i, token in enumerate(val.tokens):
        path = tmp_path / "theirs" / place.format(scene=val.scene_names[i], token=token)
        path.parent.mkdir(parents=True, exist_ok=True)
        np.savez_compressed(path, **{key: prediction(val, i)}) if key else np.save(path, prediction(val, i))
    ours = A.audit(folder, tree, cache=cache, rays=False)
    capsys.readouterr()
    theirs = A.audit(tmp_path / "theirs", tree, cache=cache, rays=False)
    form = place.replace("{", "<").replace("}", ">") + (f", key '{key}'" if key else "")
    assert theirs["form"] == form and f"theirs ({form})" in capsys.readouterr().out
    assert theirs["metrics"] == ours["metrics"] and ours["form"] == "<token>.npz, key 'pred'"


def test_keyframes_that_are_not_half_a_second_apart_are_refused(tree, tmp_path):
    shutil.copytree(tree, tmp_path / "fast")
    for name in ("sample", "sample_data"):
        path = tmp_path / f"fast/v1.0-mini/{name}.json"
        rows = json.loads(path.read_text())
        path.write_text(json.dumps([row | {"timestamp": row["timestamp"] // 5} for row in rows]))
    with pytest.raises(InputError, match="keyframes are 0.1 s apart"):
        A.audit(tmp_path, tmp_path / "fast", cache=tmp_path / "c", task="planning")


def test_split_and_rays_are_choices(tree, cache, capsys):
    result = A.audit(tree / "gts", tree, split="mini_train", cache=cache, rays=False)
    assert result["dataset"]["split"] == "mini_train" and not any(r["protocol"] == "rayiou" for r in result["rows"])
    assert "rayiou" not in result["metrics"]


def run_main(*words: str) -> tuple[int, str, str]:
    """A fresh process: exit code, stdout, stderr (where the progress bar writes too)."""
    done = subprocess.run([sys.executable, "-m", "common.metrics", *words], cwd=ROOT, capture_output=True, text=True)
    return done.returncode, done.stdout, done.stderr


def spoil(kind: str, path: Path) -> None:
    ids = np.full((200, 200, 16), 17, np.uint8)
    match kind:
        case "missing":
            path.unlink()
        case "shape":
            write_npz(path, pred=ids[:100])
        case "dtype":
            write_npz(path, pred=ids.astype(np.int64))
        case "id":
            ids[3, 4, 5] = 18
            write_npz(path, pred=ids)
        case "key":
            write_npz(path, predictions=ids)
        case "cut":
            path.write_bytes(path.read_bytes()[:1000])
        case "empty":
            path.write_bytes(b"")


@pytest.mark.parametrize("kind, says", [
    ("missing", "file not found"), ("shape", "shape (100, 200, 16)"), ("dtype", "dtype int64"), ("id", "id 18"),
    ("key", "no array 'pred'"), ("cut", "not a readable npz"), ("empty", "not a readable npz"),
])  # fmt: skip
def test_a_wrong_file_is_one_line_and_nothing_scored(kind, says, val, tree, cache, folder, capsys):
    for token in (val.tokens[1], val.tokens[3]):
        spoil(kind, folder / f"{token}.npz")
    with pytest.raises(SystemExit) as exit_:
        A.main(["audit", "--pred", str(folder), "--data-root", str(tree), "--cache", str(cache)])
    assert exit_.value.code == 2
    out, err = capsys.readouterr()
    lines = [line for line in err.replace("\r", "\n").splitlines() if line.startswith("error")]
    assert len(lines) == 1 and says in lines[0] and f"{val.tokens[1]}.npz" in lines[0]
    assert "2 of 5 prediction files" in lines[0] and "nothing scored" in lines[0]
    assert "mIoU" not in out and "Traceback" not in err


def test_command_line_in_its_own_process(val, tree, cache, folder, tmp_path):
    words = ("audit", "--pred", str(folder), "--data-root", str(tree), "--cache", str(cache), "--no-rayiou")
    code, out, err = run_main(*words, "--json", str(tmp_path / "table.json"))
    assert code == 0 and "flashocc" in out and "Traceback" not in err
    assert json.loads((tmp_path / "table.json").read_text())["task"] == "occupancy"
    (folder / f"{val.tokens[0]}.npz").unlink()
    code, out, err = run_main(*words)
    assert code == 2 and "mIoU" not in out and err.strip().splitlines()[-1].startswith("error: ") and "1 of 5" in err


@pytest.mark.parametrize("words, says", [
    (("--pred", "nowhere"), "no such folder of predictions"),
    (("--task", "ssc"), "SemanticKITTI"),
    (("--split", "val"), "split 'val'"),
    (("--version", "v1.0-trainval"), "no version"),
])  # fmt: skip
def test_wrong_arguments_are_one_line(words, says, tree, cache, folder, capsys):
    with pytest.raises(SystemExit) as exit_:
        A.main(["audit", "--pred", str(folder), "--data-root", str(tree), "--cache", str(cache), *words])
    err = capsys.readouterr().err
    assert exit_.value.code == 2 and says in err and err.count("\n") == 1


def test_a_tree_without_labels_and_an_empty_folder(tree, cache, folder, tmp_path):
    bare = tmp_path / "bare"
    for name in ("v1.0-mini", "samples"):
        shutil.copytree(tree / name, bare / name)
    with pytest.raises(InputError, match="no gts/"):
        A.audit(folder, bare, cache=cache)
    (tmp_path / "none").mkdir()
    with pytest.raises(InputError, match="5 of 5 prediction files"):
        A.audit(tmp_path / "none", tree, cache=cache)


def test_a_broken_label_of_the_dataset_is_one_line(val, tree, cache, folder, tmp_path):
    broken = tmp_path / "broken"
    shutil.copytree(tree, broken)
    path = next(broken.glob(f"gts/*/{val.tokens[2]}/labels.npz"))
    path.write_bytes(b"PK")
    with pytest.raises(InputError, match=val.tokens[2]):
        A.audit(folder, broken, cache=cache, rays=False)


# --- planning --------------------------------------------------------------------------------------------------------


def write_plans(folder: Path, val, shift: float = 0.0) -> Path:
    for i, token in enumerate(val.tokens):
        trajectory = val.future(i).trajectory.astype(np.float32)
        trajectory[:, 0] += shift
        write_npz(folder / f"{token}.npz", trajectory=trajectory)
    return folder


@needs_poses
def test_planning_on_a_real_scene(tmp_path, capsys):
    val = NuScenesOccupancy(POSES, split="mini_val", cache=tmp_path / "cache", parts=())
    perfect = A.audit(write_plans(tmp_path / "a", val), POSES, task="planning", cache=tmp_path / "cache")
    for r in perfect["rows"]:
        assert r["l2_3s"] == pytest.approx(0, abs=1e-6) and r["obj_box_col_3s"] == r["obj_col_avg"] == 0
    assert [r["samples"] for r in perfect["rows"]] == [40, 34, 34] and not perfect["warnings"]
    known = np.load(POSES / "expected.npz")["gt_ego_fut_masks"]
    assert (known.sum(1) == 6).sum() == 34
    # half a metre to the right at each known step; UniAD counts the unknown ones as zero error
    shifted = A.audit(write_plans(tmp_path / "b", val, 0.5), POSES, task="planning", cache=tmp_path / "cache")
    uniad, stp3, vad = shifted["rows"]
    assert uniad["l2_3s"] == pytest.approx(0.5 * known[:, 5].mean(), abs=1e-6)
    assert stp3["l2_3s"] == pytest.approx(0.5, abs=1e-6) and vad["l2_avg"] == pytest.approx(0.5, abs=1e-6)
    assert len(shifted["warnings"]) == 1 and "0.05 m" in shifted["warnings"][0]
    text = capsys.readouterr().out
    assert "AT 1/2/3 s" in text and "UP TO 1/2/3 s" in text and "VAD" in text


@needs_poses
def test_planning_truth_is_vads_on_a_real_scene(tmp_path):
    """Rasters of the boxes that VAD follows (those of the current keyframe with LiDAR points or not) lie in ours."""
    val = NuScenesOccupancy(POSES, split="mini_val", cache=tmp_path / "cache", parts=())
    e = np.load(POSES / "expected.npz")
    agents = e["gt_agent_fut_trajs"].reshape(-1, 6, 2).astype(np.float64).cumsum(1) + e["gt_boxes"][:, None, :2]
    turns = e["gt_agent_fut_yaw"].astype(np.float64).cumsum(1)
    kinds = ["car", "truck", "bus", "trailer", "construction_vehicle", "bicycle", "motorcycle"]
    vehicles = np.isin(e["gt_names"], kinds)
    checked = missed = 0
    for i in (0, 7, 20, 33):
        trajectory, mask, rasters = A.planning_truth(val, i)
        assert np.array_equal(mask, e["gt_ego_fut_masks"][i] > 0)
        assert np.allclose(trajectory[mask], e["gt_ego_fut_trajs"][i].cumsum(0)[mask], atol=1e-3)
        rows = range(e["box_start"][i], e["box_start"][i + 1])
        for kind, chosen in ((0, vehicles), (1, e["gt_names"] == "pedestrian")):
            for t in np.flatnonzero(mask):
                there = [k for k in rows if chosen[k] and e["gt_agent_fut_masks"][k, t] > 0]
                boxes = [M.box_corners(*agents[k, t], -(e["gt_boxes"][k, 6] + np.pi / 2) + turns[k, t],
                                       e["gt_boxes"][k, 4], e["gt_boxes"][k, 3]) for k in there]  # fmt: skip
                theirs = M.rasterize(boxes, "vad")
                ours = rasters["vad"][kind][t]
                checked, missed = checked + int(theirs.sum()), missed + int((theirs & ~ours).sum())
    assert checked > 10_000 and missed <= 0.002 * checked  # the source is float32: a corner may round over


def test_planning_truth_by_hand(tree, cache):
    """The boxes of a future keyframe, brought to the current LiDAR frame by the tables' poses, cover their centres."""
    data = NuScenesOccupancy(tree, split="all", cache=cache, parts=())
    i = 0
    _, mask, rasters = A.planning_truth(data, i)
    assert mask.tolist() == [True] * 4 + [False] * 2  # five keyframes a scene
    seen = 0
    for t in range(4):
        boxes = data.boxes(i + 1 + t)
        T = rigid_inverse(data.calibration(i)[2] @ data.T_ego_lidar(i)) @ data.calibration(i + 1 + t)[2]
        centre = boxes.center @ T[:3, :3].T + T[:3, 3]
        for name, (x, y, _) in zip(boxes.names, centre):
            kind = {"vehicle": 0, "human": 1}.get(name.split(".")[0])
            if kind is None or max(abs(x), abs(y)) > 48:
                continue
            seen += 1
            assert rasters["vad"][kind][t, int(round((50 - y) / 0.5)), int(round((50 + x) / 0.5))]
            assert rasters["uniad"][kind][t, int(round((50 + y) / 0.5)), int(round((50 + x) / 0.5))]
            assert rasters["stp3"][kind][t, int(round((50 + y) / 0.5)), int(round((50 - x) / 0.5))]
    assert seen > 0 and not any(r[4:].any() for pair in rasters.values() for r in pair)


@pytest.mark.parametrize("kind, says", [
    ("missing", "file not found"), ("shape", "shape (5, 2)"), ("dtype", "dtype int64"),
    (np.nan, "nan, inf or"), (1e300, "nan, inf or a place 1e+08 m away"),
])  # fmt: skip
def test_a_wrong_trajectory_is_one_line(kind, says, val, tree, cache, tmp_path):
    folder = write_plans(tmp_path, val)
    path = folder / f"{val.tokens[2]}.npz"
    plan = np.zeros((6, 2), np.float32)
    if kind == "missing":
        path.unlink()
    elif isinstance(kind, float):
        write_npz(path, trajectory=plan + np.float64(kind))
    else:
        write_npz(path, trajectory=plan[:5] if kind == "shape" else plan.astype(np.int64))
    with pytest.raises(InputError, match="1 of 5 prediction files") as error:
        A.audit(folder, tree, task="planning", cache=cache)
    assert says in str(error.value) and "\n" not in str(error.value)


# --- SemanticKITTI ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def kitti(tmp_path_factory):
    return make_kitti(tmp_path_factory.mktemp("ssc") / "tree", frames=6)


def submit(folder: Path, kitti: Path, wrong: float = 0.0) -> Path:
    """The truth of sequence 08 as a submission, its labels' own ids; a share of its voxels emptied or made road."""
    for path in sorted((kitti / "sequences/08/voxels").glob("*.label")):
        raw, g = np.fromfile(path, "<u2"), np.random.default_rng(int(path.stem))
        raw[(g.random(len(raw)) < wrong) & (raw > 0)] = 0
        raw[(g.random(len(raw)) < wrong) & (raw > 0)] = 40
        raw[g.integers(0, len(raw), int(3000 * wrong))] = 10
        target = folder / "sequences/08/predictions" / path.name
        target.parent.mkdir(parents=True, exist_ok=True)
        raw.tofile(target)
    return folder


def test_ssc_truth_scores_100_but_absent_classes_count(kitti, tmp_path, capsys):
    """The truth's own files, "other-object" and moving ids included, in the form of a submission."""
    result = A.audit(submit(tmp_path, kitti), kitti, task="ssc", json_path=tmp_path / "ssc.json")
    present = {"car", "road", "sidewalk", "building", "vegetation", "pole"}
    assert {name for name, iou in result["per_class"].items() if iou > 0.999} == present | {"empty"}
    for score in ("IoU", "precision", "recall"):
        assert row(result, score, "semantickitti", "valid")["percent"] == pytest.approx(100, abs=1e-4)
    for protocol in ("semantickitti", "monoscene"):
        assert row(result, "mIoU", protocol, "valid")["percent"] == pytest.approx(100 * 6 / 19, abs=1e-3)
    out = capsys.readouterr().out
    assert "SemanticKITTI semantickitti val, 2 frames, grid 256x256x32" in out and "===> car - IoU = 100.00" in out
    assert "warning: 13 of 19 classes are not in this truth" in out and "mIoU 31.58" in out
    assert json.loads((tmp_path / "ssc.json").read_text()) == json.loads(json.dumps(result))


def test_ssc_equals_the_metric_in_both_forms(kitti, tmp_path):
    folder, data = submit(tmp_path / "P", kitti, 0.3), SemanticKITTI(kitti, "val")
    frames = []
    for i, token in enumerate(data.tokens):
        semantics, valid, _ = data.labels(i)
        raw = np.fromfile(folder / f"sequences/08/predictions/{token[3:]}.label", "<u2").reshape(semantics.shape)
        pred = semantics.copy()
        pred[raw == 0], pred[raw == 10], pred[raw == 40] = 0, 1, 9
        write_npz(tmp_path / "Q" / f"{token}.npz", pred=pred)
        frames.append((pred, semantics, ~valid))
    expected = M.ssc_scores(*(np.stack(field) for field in zip(*frames)))
    result = A.audit(folder, kitti, task="ssc")
    assert 0.3 < expected["iou"] < 0.9 and 0 < expected["miou"] < 0.3
    for key in ("iou", "miou", "precision", "recall"):
        assert result["metrics"][f"{key}_semantickitti"] == pytest.approx(expected[key], abs=1e-12)
    assert list(result["per_class"].values()) == pytest.approx(expected["per_class"], abs=1e-12)
    assert A.audit(tmp_path / "Q", kitti, task="ssc")["metrics"] == result["metrics"]
    with pytest.raises(InputError, match="2 of 2 prediction files"):
        A.audit(folder, kitti, split="train", task="ssc")


@pytest.mark.parametrize("kind, says", [
    ("missing", "000005.label: voxel labels not found"), ("short", "000005.label: 2000 bytes"),
    ("id", "raw id 12 is not one of"), ("ignored", "an ignored class at"), ("odd", "not a multiple of 2"),
])  # fmt: skip
def test_a_wrong_submission_is_one_line_and_nothing_scored(kind, says, kitti, tmp_path, capsys):
    path = submit(tmp_path, kitti) / "sequences/08/predictions/000005.label"
    raw = np.fromfile(path, "<u2")
    match kind:
        case "missing":
            path.unlink()
        case "short":
            raw[:1000].tofile(path)
        case "odd":
            path.write_bytes(path.read_bytes() + b"x")
        case "id":
            raw[77] = 12
            raw.tofile(path)
        case "ignored":
            raw[:] = 99
            raw.tofile(path)
    with pytest.raises(SystemExit) as stop:
        A.main(["audit", "--task", "ssc", "--pred", str(tmp_path), "--data-root", str(kitti)])
    out, err = capsys.readouterr()
    lines = [line for line in err.replace("\r", "\n").splitlines() if line.startswith("error")]
    assert stop.value.code == 2 and len(lines) == 1 and says in lines[0]
    assert "1 of 2 prediction files" in lines[0] and "nothing scored" in lines[0] and "IoU" not in out


def test_a_fault_of_the_truth_is_not_the_predictions(kitti, tmp_path):
    """.occluded is never scored; a missing .invalid or .label is the dataset's, whatever the predictions are."""
    tree = shutil.copytree(kitti, tmp_path / "tree")
    folder = submit(tmp_path / "P", tree)
    before = A.audit(folder, tree, task="ssc")["metrics"]
    for path in tree.rglob("*.occluded"):
        path.unlink()
    assert A.audit(folder, tree, task="ssc")["metrics"] == before and SemanticKITTI(tree, "val")[0].mask_lidar is None
    (tree / "sequences/08/voxels/000005.invalid").unlink()
    with pytest.raises(InputError, match="000005.invalid: voxel file not found$"):
        A.audit(folder, tree, task="ssc")


def test_ssc_needs_a_semantickitti_tree_with_labels(kitti, tree, folder, tmp_path):
    with pytest.raises(InputError, match="which is nuScenes, not SemanticKITTI"):
        A.audit(folder, tree, task="ssc")
    bare = make_kitti(tmp_path / "bare", ("08",), frames=1)
    (bare / "sequences/08/voxels/000000.label").unlink()
    with pytest.raises(InputError, match=r"no voxels/\*.label in split 'val'"):
        A.audit(folder, bare, task="ssc")
