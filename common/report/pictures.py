"""PNG sheets, the HTML viewer and training curves of an occupancy run, from `predict(frame) -> ids`."""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from common import viz
from common.geometry import OCC3D, SEMANTICKITTI, VoxelGrid
from common.labels import label_path, read_label
from common.nuscenes import FREE, OCC3D_CLASSES
from common.semantickitti import CLASSES as SSC_CLASSES
from common.semantickitti import PALETTE as SSC_PALETTE


class Style(NamedTuple):
    """How a set of labels is drawn."""

    grid: VoxelGrid
    classes: tuple[str, ...]
    palette: np.ndarray
    free: int  # the empty id
    ego: tuple[float, float, float]  # ground under the ego [m]
    mask: str  # what the errors are confined to


SHEETS = 3  # PNG sheets of a run; the viewer has all keyframes
OCC3D_STYLE = Style(OCC3D, OCC3D_CLASSES, viz.PALETTE, FREE, (0.0, 0.0, 0.0), "camera mask")
LIDAR = (0.0, 0.0, -1.73)  # it is 1.73 m up
SSC_STYLE = Style(SEMANTICKITTI, SSC_CLASSES, SSC_PALETTE, 0, LIDAR, "valid voxels")


def style_of(dataset) -> Style:
    """How the labels of a dataset are drawn."""
    return SSC_STYLE if dataset.version == "semantickitti" else OCC3D_STYLE


def chosen(n: int, count: int) -> list[int]:
    """Which of n keyframes are drawn: `count`, evenly spaced; none for count 0."""
    return sorted({round(k) for k in np.linspace(0, n - 1, min(n, count))}) if count else []


def draw(predict: Callable, dataset, indices: list[int], out: Path, *, title: str,
         truth: Callable | None = None, labels: Path | None = None, against: str = "ground truth",
         style: Style = OCC3D_STYLE, name: str = "prediction") -> list[Path]:
    """Draw keyframes `indices`: PNG sheets of the first ones, one HTML viewer of all; -> their paths.

    truth(i) -> (ids, mask, ...); None: predictions alone. against: what the truth is called.
    labels: a label folder whose labels are drawn beside where it has the keyframe. name: of the prediction.
    """
    frames, paths = [], []
    drawn = {"classes": style.classes, "palette": style.palette, "free": style.free, "ego": style.ego}
    for i in tqdm(indices, "pictures", unit="keyframe", leave=False):
        frame, known = dataset[i], truth(i) if truth else (None, None)
        images = np.asarray(dataset.images(i) if frame.images is None else frame.images)
        panels = {against: known[0]} if truth else {}
        if labels and label_path(labels, dataset, i).is_file():
            panels["label"] = saved_label(labels, dataset, i, style)
        panels[name] = predict(frame)
        place = f"{frame.scene} {frame.token[-9:] if '/' in frame.token else frame.token[:8]}"
        if len(paths) < SHEETS:
            note = f"\nerrors inside the {style.mask}" if truth else ""
            paths.append(out / "pictures" / f"{len(paths)}_{frame.scene}.png")
            viz.sheet(paths[-1], images, panels, style.grid, mask=known[1],
                      title=f"{title}: {place}{note}", error=(against, name) if truth else None,
                      **drawn)
        frames.append(viz.ViewerFrame(place, panels, images, known[1]))
    if frames:
        viz.viewer(out / "viewer.html", frames, grid=style.grid, title=title, **drawn)
        paths.insert(0, out / "viewer.html")
    return paths


def saved_label(labels: Path, dataset, i: int, style: Style) -> np.ndarray:
    """The label of keyframe i in the folder `labels`."""
    return read_label(labels, dataset, i, shape=style.grid.shape, top=len(style.classes))[0]


def draw_labels(dataset, labels: Path, count: int, title: str) -> list[Path]:
    """Draw `count` evenly spaced keyframes that have a label in the folder `labels`, and images; -> the paths."""
    made = [i for i in range(len(dataset)) if label_path(labels, dataset, i).is_file()
            and all((dataset.root / file).is_file() for file in dataset.camera_files(i))]
    style, place = style_of(dataset), {dataset.tokens[i]: i for i in made}
    return draw(lambda frame: saved_label(labels, dataset, place[frame.token], style), dataset,
                [made[k] for k in chosen(len(made), count)], labels, title=title, style=style, name="label")


def draw_curves(out: Path, title: str) -> Path:
    """The training curves of the run folder `out`, from its log.jsonl; -> the PNG's path."""
    viz.curves(out / "pictures" / "curves.png", out / "log.jsonl", title=title)
    return out / "pictures" / "curves.png"
