"""Pictures: geometry against a slow ray oracle, sides and order, counts, layout, the HTML viewer's embedded data."""

import base64
import json
import os
import re
import shutil
import signal
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from common import viz
from common.files import InputError
from common.geometry import OCC3D, VoxelGrid

SHARED = Path(__file__).parents[1].parent / "shared"
FREE, CAR, ROAD, TREE = 17, 4, 11, 16
NAMES = ("others", "barrier", "bicycle", "bus", "car", "construction_vehicle", "motorcycle", "pedestrian",
         "traffic_cone", "trailer", "truck", "driveable_surface", "other_flat", "sidewalk", "terrain", "manmade",
         "vegetation", "free")
SMALL = VoxelGrid((-8.0, -8.0, -1.0), (8.0, 8.0, 3.0), (20, 20, 5))  # 0.8 m voxels
LOOK = {"grid": SMALL, "size": (150, 240), "ego": None, "triad": False}


def scene(seed: int = 0, share: float = 0.15) -> np.ndarray:
    """(20, 20, 5) random labels."""
    rng = np.random.default_rng(seed)
    return np.where(rng.random(SMALL.shape) < share, rng.integers(0, 17, SMALL.shape), FREE).astype(np.uint8)


def empty() -> np.ndarray:
    return np.full(SMALL.shape, FREE, np.uint8)


def changed(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return (a.astype(int) != b).any(axis=-1)


# --- the renderer ---------------------------------------------------------------------------------------------------

def first_voxel(occupied: np.ndarray, eye: np.ndarray, ray: np.ndarray, grid: VoxelGrid) -> np.ndarray:
    """Oracle: per pixel ray (P, 3), slab test against every occupied voxel -> (P, 3) index of the nearest, or -1."""
    index = np.argwhere(occupied)
    low = np.array(grid.lower) + index * np.array(grid.voxel_size)  # (V, 3)
    with np.errstate(divide="ignore"):
        a, b = (low - eye) / ray[:, None], (low + grid.voxel_size - eye) / ray[:, None]  # (P, V, 3)
    enter, leave = np.minimum(a, b).max(axis=2), np.maximum(a, b).min(axis=2)
    enter[(enter > leave) | (enter <= 0)] = np.inf  # a voxel around the eye has no face to see
    best = enter.argmin(axis=1)
    return np.where(np.isfinite(enter.min(axis=1))[:, None], index[best], -1)


@pytest.mark.parametrize("eye, target", [
    ((-14.0, -3.0, 9.0), (0.0, 0.0, 0.0)),  # outside the box: the sheets' case
    ((0.3, -0.2, 1.1), (6.0, 2.0, 0.4)),  # inside it: the overlay's
    ((-7.0, 9.5, 1.0), (0.0, 0.0, 1.0)),  # level with it: some faces are seen edge-on
])
def test_every_pixel_shows_the_nearest_voxel(eye, target):
    labels = scene(3)
    labels[tuple(((np.array(eye) - SMALL.lower) / SMALL.voxel_size).astype(int).clip(0, [19, 19, 4]))] = FREE
    size = (60, 90)
    K, T_cam_ref = viz.view_camera(viz.View(eye, target, 1.0), SMALL, size)
    faces, _, ids = viz.face_image(labels, SMALL, K, T_cam_ref, size)
    shown = np.where(ids[..., None] >= 0, faces.voxel[ids], -1)  # (60, 90, 3)
    v, u = np.mgrid[0:60, 0:90] + 0.5
    ray = np.stack(((u - K[0, 2]) / K[0, 0], (v - K[1, 2]) / K[1, 1], np.ones_like(u)), -1).reshape(-1, 3)
    expected = first_voxel(labels != FREE, np.array(eye), ray @ T_cam_ref[:3, :3], SMALL).reshape(60, 90, 3)
    wrong = (shown != expected).any(axis=-1)
    assert (expected >= 0).all(axis=-1).mean() > 0.1  # the picture is not empty
    assert wrong.sum() == 0, np.argwhere(wrong)[:5]


def test_polygons_that_share_edges_cover_each_pixel_once():
    rng = np.random.default_rng(1)
    points = np.stack(np.meshgrid(np.linspace(-3, 43, 12), np.linspace(-3, 33, 9)), -1)  # (9, 12, 2)
    points[1:-1, 1:-1] += rng.uniform(-1.2, 1.2, (7, 10, 2))
    points[:, ::2] = np.round(points[:, ::2]) + 0.5  # corners exactly on pixel centres: ties
    quads = np.stack((points[:-1, :-1], points[:-1, 1:], points[1:, 1:], points[1:, :-1]), 2).reshape(-1, 4, 2)
    triangles = np.concatenate((quads[:, [0, 1, 2]], quads[:, [0, 2, 3]]))
    cover = sum((viz.rasterise(triangle[None], (30, 40)) == 0).astype(int) for triangle in triangles)
    assert (cover == 1).all()
    assert (viz.rasterise(triangles[:0], (30, 40)) == -1).all()


@pytest.mark.parametrize("dx, dy, dz, side", [(0, 5, 0, "left"), (0, -5, 0, "right"), (6, 0, 0, "up"),
                                              (-6, 0, 0, "down"), (0, 0, 3, "up")])
def test_directions_in_the_picture(dx, dy, dz, side):
    blank = viz.render_voxels(empty(), **LOOK)

    def centre(x, y, z):
        labels = empty()
        labels[x, y, z] = CAR
        v, u = np.nonzero(changed(viz.render_voxels(labels, **LOOK), blank))
        return np.array((u.mean(), v.mean()))

    move = centre(10 + dx, 10 + dy, 1 + dz) - centre(10, 10, 1)
    axis, sign = {"left": (0, -1), "right": (0, 1), "up": (1, -1), "down": (1, 1)}[side]
    assert sign * move[axis] > 5 and abs(move[axis]) > abs(move[1 - axis])


def test_free_and_ignored_voxels_are_not_drawn():
    blank = viz.render_voxels(empty(), **LOOK)
    ignored = empty()
    ignored[5:9, 5:9, 2] = 255
    assert not changed(viz.render_voxels(ignored, **LOOK), blank).any()
    assert changed(viz.render_voxels(np.where(ignored == 255, CAR, FREE).astype(np.uint8), **LOOK), blank).sum() > 100
    zero_is_free = np.zeros(SMALL.shape, np.int64)
    assert not changed(viz.render_voxels(zero_is_free, free=0, **LOOK), blank).any()
    assert changed(viz.render_voxels(zero_is_free, **LOOK), blank).any()  # 0 is a class of Occ3D


def test_the_shared_view_frames_the_box_of_any_grid():
    for grid in (OCC3D, SMALL, VoxelGrid((0.0, -25.6, -2.0), (51.2, 25.6, 4.4), (256, 256, 32))):
        for size in ((580, 966), (400, 300)):
            K, T_cam_ref = viz.view_camera(viz.oblique_view(grid), grid, size)
            corners = np.stack(np.meshgrid(*zip(grid.lower, grid.upper)), -1).reshape(-1, 3)
            uv, depth = viz._project(corners, K, T_cam_ref)
            assert depth.min() > 0 and (uv >= 0).all() and (uv <= np.array(size)[::-1]).all()
            assert max(np.ptp(uv[:, 0]) / size[1], np.ptp(uv[:, 1]) / size[0]) > 0.8


def test_the_ego_marker_hides_and_is_hidden():
    size, grid = (150, 240), SMALL

    def marker(labels):
        """Pixels that the marker changes."""
        plain, marked = (viz.render_voxels(labels, grid, size=size, triad=False, ego=ego) for ego in (None, (0, 0, -1)))
        return changed(plain, marked)

    alone = marker(empty())
    v, u = np.nonzero(alone)
    K, T_cam_ref = viz.view_camera(viz.oblique_view(grid), grid, size)
    (u0, v0), _ = viz._project(np.array((1.4, 0.0, -0.3)), K, T_cam_ref)
    assert alone.sum() > 100 and abs(u.mean() - u0) < 6 and abs(v.mean() - v0) < 6
    wall = empty()
    wall[8, 4:16, :] = CAR  # right behind the ego, between it and the eye
    assert marker(wall).sum() < 0.1 * alone.sum()
    wall = empty()
    wall[16, :, :] = CAR  # ahead of it
    assert marker(wall).sum() > 0.95 * alone.sum()


def test_bev_is_the_palette_colour_of_the_highest_voxel():
    labels = scene(1)
    picture = viz.bev(labels, scale=2)
    assert picture.shape == (40, 40, 3)
    for x in range(20):
        for y in range(20):
            column = [k for k in labels[x, y] if k != FREE]
            expected = viz.PALETTE[column[-1]] if column else viz._PANEL
            assert (picture[2 * (19 - x), 2 * (19 - y)] == expected).all()


# --- error map, sheet, overlay, curves ------------------------------------------------------------------------------

def test_errors_count_like_a_plain_loop():
    gt, pred = scene(5, 0.5), scene(6, 0.5)
    pred[::2] = gt[::2]
    gt[0, 0, :3] = 255
    mask = np.random.default_rng(2).random(gt.shape) < 0.7
    count = [0, 0, 0, 0]
    for g, p, m in zip(gt.ravel().tolist(), pred.ravel().tolist(), mask.ravel().tolist()):
        if m and g != 255 and (g != FREE or p != FREE):
            count[2 if p == FREE else 3 if g == FREE else 0 if g == p else 1] += 1
    result = viz.errors(gt, pred, mask, known=18)
    assert min(count) > 0 and np.bincount(result.ravel(), minlength=5)[:4].tolist() == count
    assert (result[~mask] == viz.NO_ERROR).all()
    with pytest.raises(ValueError, match="shape"):
        viz.errors(gt, pred[:5])


def flat_images(h: int = 36, w: int = 64) -> np.ndarray:
    """(6, 3, h, w) in nuScenes order, camera n in one grey of its own."""
    return np.broadcast_to((0.1 + 0.13 * np.arange(6))[:, None, None, None], (6, 3, h, w)).astype(np.float32)


def test_sheet_layout_legend_and_error_map(tmp_path):
    gt, pred = empty(), empty()
    gt[:, 8:12, 0], pred[:, 8:12, 0] = ROAD, ROAD
    gt[14, 3, 0:3], pred[4, 15, 0:3], gt[9, 9, 1:3], pred[9, 9, 1:3] = CAR, TREE, CAR, 15
    path = tmp_path / "new" / "sheet.png"
    panels = {"ground truth": gt, "label": gt, "prediction": torch.from_numpy(pred)}
    viz.sheet(path, torch.from_numpy(flat_images()), panels, SMALL, title="one\nprotocol", classes=NAMES)
    picture = np.asarray(Image.open(path))
    assert picture.shape[1] == 2000 and picture.shape[2] == 3
    assert [p.name for p in path.parent.iterdir()] == ["sheet.png"]  # nothing half-written is left
    grey = [int((0.1 + 0.13 * n) * 255 + 0.5) for n in range(6)]
    top = np.flatnonzero((picture[:, 400] == grey[5]).all(axis=1))[0]  # the first camera row
    w, h = (2000 - 56 - 24) // 3, round((2000 - 56 - 24) // 3 * 36 / 64)
    for place, n in enumerate((5, 0, 1, 4, 3, 2)):  # front left, front, front right / back left, back, back right
        v, u = top + h // 2 + (place // 3) * (h + 12), 28 + w // 2 + (place % 3) * (w + 12)
        assert picture[v, u].tolist() == [grey[n]] * 3
    legend = picture[-28 - 34:-28].reshape(-1, 3)
    present = {k for k in range(17) if (legend == viz.PALETTE[k]).all(axis=1).sum() > 150}
    assert present == {CAR, ROAD, 15, TREE}
    for colour in viz.ERROR_PALETTE:  # the swatches of the error map's legend, above the classes'
        assert (picture[-28 - 34 - 46:-28 - 34] == colour).all(axis=2).sum() > 150
    wrong = viz.errors(gt, pred)
    shown = [(labels, viz.PALETTE, FREE) for labels in (gt, gt, pred)] + [(wrong, viz.ERROR_PALETTE, viz.NO_ERROR)]
    for place, (labels, palette, free) in enumerate(shown):
        v, u = top + 2 * h + 24 + (place // 2) * (580 + 12), 28 + (place % 2) * (966 + 12)
        render = viz.render_voxels(labels, SMALL, palette, size=(580, 966), free=free)
        panel = picture[v:v + 580, u:u + 966]
        assert (panel[80:, 300:] == render[80:, 300:]).all()  # beside and below the name and the top view


def test_sheet_of_one_panel_without_images_and_of_nothing(tmp_path):
    viz.sheet(tmp_path / "a.png", None, {"prediction": empty()}, SMALL, classes=NAMES)
    viz.sheet(tmp_path / "b.png", None, {"prediction": scene()}, SMALL, classes=NAMES)
    a, b = Image.open(tmp_path / "a.png"), Image.open(tmp_path / "b.png")
    assert b.height > a.height  # the legend


def camera(h: int, w: int) -> tuple[np.ndarray, np.ndarray]:
    """K, T_ego_cam of a camera at (-2, 0, 1) that looks along +x; 90 degrees wide."""
    T_ego_cam = np.eye(4)
    T_ego_cam[:3, :3] = np.array(((0, 0, 1), (-1, 0, 0), (0, -1, 0)))  # columns: camera x, y, z in ego
    T_ego_cam[:3, 3] = (-2, 0, 1)
    return np.array(((w / 2, 0, w / 2), (0, w / 2, h / 2), (0, 0, 1.0))), T_ego_cam


@pytest.mark.parametrize("h, w", [(224, 400), (900, 1600)])
def test_overlay_paints_where_the_camera_sees_the_voxel(h, w):
    K, T_ego_cam = camera(h, w)
    labels = empty()
    labels[15, 12, 2] = CAR  # x 4 .. 4.8, y 1.6 .. 2.4, z 0.6 .. 1.4: ahead, left, level with the camera
    labels[2, 10, 2] = TREE  # behind
    image = np.full((h, w, 3), 100, np.uint8)
    result = viz.overlay_image(image, K, T_ego_cam, labels, SMALL, alpha=0.5)
    v, u = np.nonzero(changed(result, image))
    f = w / 2  # front face at depth 6, its right side to depth 6.8
    assert abs(u.min() - (w / 2 - f * 2.4 / 6)) <= 1 and abs(u.max() + 1 - (w / 2 - f * 1.6 / 6.8)) <= 1
    assert abs(v.min() - (h / 2 - f * 0.4 / 6)) <= 1 and abs(v.max() + 1 - (h / 2 + f * 0.4 / 6)) <= 1
    middle = result[h // 2, int(w / 2 - f * 2.0 / 6)].astype(int)
    assert middle[2] > 140 and middle[0] < 80  # half image, half car
    labels[13, 12, 2] = TREE  # nearer, in the way
    hidden = viz.overlay_image(image, K, T_ego_cam, labels, SMALL, alpha=0.5)[h // 2, int(w / 2 - f * 2.0 / 6)]
    assert hidden[1] > 100 and hidden[2] < 80


def test_overlay_sheet_scales_the_intrinsics(tmp_path):
    images, K, T_ego_cam = flat_images(45, 80), *(np.stack([a] * 6) for a in camera(45, 80))
    labels = empty()
    labels[15, 12, 2] = CAR
    for width in (600, 1200):
        viz.overlay(tmp_path / "o.png", images, K, T_ego_cam, labels, SMALL, classes=NAMES, width=width)
        picture = np.asarray(Image.open(tmp_path / "o.png")).astype(int)
        w = (width - 24) // 3
        tile = picture[28:28 + round(w * 45 / 80), 28 + w + 12:28 + 2 * w + 12]  # front: camera 0, grey 26
        u = np.nonzero(tile[round(0.5 * tile.shape[0])][:, 2] > 90)[0]
        assert abs(u.min() - w * (0.5 - 0.5 * 2.4 / 6)) <= 2
    viz.overlay(tmp_path / "none.png", images, K, T_ego_cam, empty(), SMALL, classes=NAMES, width=600)


def write_log(path: Path, n: int, metric: float = 0.3) -> Path:
    rows = [{"step": 10 * k, "loss": 3.0 / k, "ce": 2.0 / k, "lr": 1e-4, "ms": 80.0, "data": 0.1, "gb": 1.0}
            | ({"miou_camera": metric} if k % 3 == 0 else {}) for k in range(1, n + 1)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_curves(tmp_path):
    pictures = {}
    for name, n, metric in (("few", 9, 0.3), ("other", 9, 0.2), ("many", 120, 0.3)):
        viz.curves(tmp_path / f"{name}.png", write_log(tmp_path / f"{name}.jsonl", n, metric), title="run")
        pictures[name] = np.asarray(Image.open(tmp_path / f"{name}.png"))
    assert pictures["few"].shape == pictures["other"].shape and changed(pictures["few"], pictures["other"]).any()
    assert pictures["many"].shape[0] > 400
    with open(tmp_path / "few.jsonl", "a") as file:
        file.write('{"step": 100, "lo')  # a line that is being written
    assert len(viz.read_log(tmp_path / "few.jsonl")) == 9
    with open(tmp_path / "few.jsonl", "a") as file:
        file.write("\n")
    with pytest.raises(InputError, match="few.jsonl: line 10 is not JSON"):
        viz.curves(tmp_path / "x.png", tmp_path / "few.jsonl")
    with pytest.raises(InputError, match="log not found"):
        viz.curves(tmp_path / "x.png", tmp_path / "none.jsonl")
    assert not (tmp_path / "x.png").exists()


# --- the HTML viewer ------------------------------------------------------------------------------------------------

def exposed(labels: np.ndarray) -> set[tuple[int, int, int, int]]:
    """Voxels with at least one of six neighbours free or outside -> {(x, y, z, class)}."""
    padded = np.pad(labels, 1, constant_values=FREE)
    found = set()
    for x, y, z in np.argwhere(labels != FREE):
        around = [padded[x + 1 + a, y + 1 + b, z + 1 + c]
                  for a, b, c in ((1, 0, 0), (-1, 0, 0), (0, 1, 0), (0, -1, 0), (0, 0, 1), (0, 0, -1))]
        if FREE in around:
            found.add((int(x), int(y), int(z), int(labels[x, y, z])))
    return found


def page(path: Path, **kwargs) -> str:
    gt, pred = scene(1, 0.6), scene(2, 0.6)
    pred[:10] = gt[:10]
    mask = np.zeros(SMALL.shape, bool)
    mask[4:] = True
    panels = {"ground truth": gt, "label": gt, "prediction": pred}
    frames = [viz.ViewerFrame("scene-1 · a", panels, flat_images(), mask),
              ("b </script><b>", {"ground truth": pred, "prediction": gt})]
    viz.viewer(path, frames, SMALL, title="Title <1>\nprotocol & line", classes=NAMES, **kwargs)
    return path.read_text()


def test_viewer_embeds_exactly_the_labels(tmp_path):
    text = page(tmp_path / "v.html")
    data = viz.viewer_data(text)
    gt, pred = scene(1, 0.6), scene(2, 0.6)
    pred[:10] = gt[:10]
    frames = data["frames"]
    assert list(frames[0]["panels"]) == data["panels"] == ["ground truth", "label", "prediction"]
    assert list(frames[1]["panels"]) == ["ground truth", "prediction"]
    shown = ((0, "ground truth", gt), (0, "label", gt), (0, "prediction", pred), (1, "prediction", gt))
    for k, name, expected in shown:
        decoded = viz.unpack_volume(frames[k]["panels"][name], SMALL.shape)
        assert (decoded == expected).all() and exposed(decoded) == exposed(expected)
        assert frames[k]["counts"][name] == [int((expected == c).sum()) for c in range(18)]
    assert (viz.unpack_volume(frames[0]["mask"], SMALL.shape)[:, 0, 0] == ([0] * 4 + [1] * 16)).all()
    wrong = viz.errors(gt, pred, viz.unpack_volume(frames[0]["mask"], SMALL.shape))
    assert frames[0]["counts"]["difference"] == np.bincount(wrong.ravel(), minlength=5)[:4].tolist()
    assert data["classes"] == list(NAMES) and data["palette"] == viz.PALETTE.tolist() and data["free"] == FREE
    assert data["shape"] == [20, 20, 5] and np.allclose(data["voxel"], 0.8)
    assert data["difference"] == ["ground truth", "prediction"]
    cameras = frames[0]["images"]
    assert [name for name, _ in cameras] == list(viz._CAMERA_NAMES) and frames[1]["images"] is None
    jpeg = base64.b64decode(cameras[0][1])
    assert jpeg[:2] == b"\xff\xd8"


def test_viewer_is_one_safe_offline_file(tmp_path):
    text = page(tmp_path / "v.html")
    assert "://" not in text and not re.search(r"<(link|script)[^>]+(src|href)", text) and "import(" not in text
    assert text.count("</script>") == 2 and text.count("<b>") == 1  # a name cannot close the data or add markup
    assert "<title>Title &lt;1&gt;</title>" in text
    assert viz.viewer_data(text)["frames"][1]["name"] == "b </script><b>"
    assert [p.name for p in tmp_path.iterdir()] == ["v.html"]


def test_viewer_refuses_what_it_cannot_show(tmp_path):
    with pytest.raises(ValueError, match="do not fit the grid"):
        viz.viewer(tmp_path / "v.html", [("a", {"p": empty()[:5]})], SMALL, classes=NAMES)
    with pytest.raises(ValueError, match="no frames"):
        viz.viewer(tmp_path / "v.html", [], SMALL, classes=NAMES)
    with pytest.raises(ValueError, match="byte"):
        viz.viewer(tmp_path / "v.html", [("a", {"p": np.full(SMALL.shape, -1)})], SMALL, classes=NAMES)
    assert not (tmp_path / "v.html").exists()


CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


def title_after_check(path: Path, folder: Path) -> str:
    """The page's title after its self-check in a headless browser with a software GPU; the console must be empty."""
    for attempt in range(2):  # a browser on an overloaded machine may hang as it starts; a page that hangs, hangs twice
        command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--use-gl=angle", "--use-angle=swiftshader",
                   "--enable-unsafe-swiftshader", "--disable-background-networking", "--no-first-run",
                   f"--user-data-dir={folder}{attempt}", "--window-size=900,640", "--virtual-time-budget=20000",
                   "--enable-logging=stderr", "--dump-dom", f"file://{path}#check"]
        with open(f"{folder}{attempt}.html", "w+") as dom, open(f"{folder}{attempt}.log", "w+") as log:
            browser = subprocess.Popen(command, stdout=dom, stderr=log, start_new_session=True)
            try:
                browser.wait(timeout=90)
            except subprocess.TimeoutExpired:
                os.killpg(browser.pid, signal.SIGKILL)  # the browser and its helpers, no other
                browser.wait()
                continue
            dom.seek(0), log.seek(0)
            said = [line for line in log if ":CONSOLE" in line and "GL Driver Message" not in line]
            assert not said, said
            return re.search(r"<title>(.*?)</title>", dom.read()).group(1)
    raise AssertionError(f"{path.name}: the browser did not finish, twice")


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium on PATH: the viewer's self-check needs a browser")
def test_viewer_checks_itself_in_a_browser(tmp_path):
    text = page(tmp_path / "v.html")
    title = title_after_check(tmp_path / "v.html", tmp_path / "profile")
    found = dict(re.findall(r"(frames|panels|voxels|faces|picked) (\d+)", title))
    data = viz.viewer_data(text)
    voxels = sum(sum(count[:17]) for frame in data["frames"] for count in frame["counts"].values())
    assert title.startswith("self-check passed") and found["frames"] == "2" and found["panels"] == "4", title
    assert int(found["voxels"]) == voxels and int(found["picked"]) > 20
    faces = 0
    for name in ("ground truth", "label", "prediction", "difference"):  # of the first frame
        volumes = {k: viz.unpack_volume(v, SMALL.shape) for k, v in data["frames"][0]["panels"].items()}
        mask = viz.unpack_volume(data["frames"][0]["mask"], SMALL.shape)
        volumes["difference"] = viz.errors(volumes["ground truth"], volumes["prediction"], mask)
        on = np.pad(volumes[name] != (viz.NO_ERROR if name == "difference" else FREE), 1)
        faces += sum(int((on & ~np.roll(on, shift, axis)).sum()) for axis in range(3) for shift in (-1, 1))
    assert int(found["faces"]) == faces
    assert title.endswith("toggles cut view mask class kind of error"), title  # each changed pixels and was undone


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium on PATH: the viewer's self-check needs a browser")
def test_the_self_check_can_fail(tmp_path):
    text = page(tmp_path / "v.html")
    count = viz.viewer_data(text)["frames"][1]["counts"]["prediction"][CAR]
    broken = re.sub(r'("prediction":\[(?:\d+,){4})\d+', lambda m: f"{m.group(1)}{count + 1}", text)
    dead = text.replace('$("cut").oninput = (e) => {', '$("cut").onclick = (e) => {')
    for name, page_text in (("w", broken), ("x", dead)):
        assert page_text != text
        (tmp_path / f"{name}.html").write_text(page_text)
        title = title_after_check(tmp_path / f"{name}.html", tmp_path / f"profile-{name}")
        assert title.startswith("self-check failed"), title
    assert "cut: nothing changed" in title


# --- a real label file ----------------------------------------------------------------------------------------------

REAL = SHARED / "real" / "occ3d" / "labels.npz"


@pytest.mark.skipif(not REAL.is_file(), reason="no ../shared/real/occ3d/labels.npz")
def test_a_real_label_file_is_small_and_exact_in_the_viewer(tmp_path):
    with np.load(REAL) as archive:
        labels, mask = archive["semantics"], archive["mask_camera"]
    noisy = np.where(np.random.default_rng(0).random(labels.shape) < 0.003, 15, labels).astype(np.uint8)
    panels = {"ground truth": labels, "label": noisy, "prediction": noisy}
    viz.viewer(tmp_path / "v.html", [("real", panels, None, mask)], classes=NAMES)
    assert (tmp_path / "v.html").stat().st_size < 200_000  # the budget of a frame; the page itself included
    frame = viz.viewer_data((tmp_path / "v.html").read_text())["frames"][0]
    assert (viz.unpack_volume(frame["panels"]["ground truth"], OCC3D.shape) == labels).all()
    picture = viz.render_voxels(labels, size=(200, 320))
    road = (picture[..., 0] > 150) & (picture[..., 2] > 150) & (picture[..., 1] < 90)
    assert 0.03 < road.mean() < 0.5
