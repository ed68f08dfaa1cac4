"""A real keyframe through the ready checkpoints: an illustration in numbers, no benchmark.

    python -m experiments.keyframe DATA_ROOT       # a nuScenes tree -> experiments/results/keyframe.json

The checkpoints learned on synthetic streets alone. What the keyframe's own LiDAR sweep met is the only truth
here: a voxel with a point is occupied, one that a ray crossed before is free, the others are not counted.
Inside the annotated boxes a point's voxel should have the box's class. Nothing of the tree is copied.
"""

import sys
from pathlib import Path

import numpy as np
import torch

from common.files import InputError, exit_on_input_error, read_json, read_npz
from common.geometry import OCC3D, traversed
from common.loose import write_example
from common.nuscenes import FREE, NuScenesOccupancy
from common.report.occupancy import constants
from common.worlds import WORLDS
from experiments.ready import READY, verb
from experiments.runner import dumps, write_bytes

DRIVING = "easyocc", "occle", "loc", "occvla"
RESULTS = Path("experiments/results")


class Keyframe:
    """What a sweep and the boxes of a keyframe say."""

    def __init__(self, dataset: NuScenesOccupancy, i: int = 0):
        points = torch.from_numpy(dataset.points(i)[:, :3]).double()
        origin = torch.from_numpy(dataset.T_ego_lidar(i)[:3, 3])
        index, inside = OCC3D.index(points)
        self.index, points = index[inside].T.numpy(), points[inside].numpy()
        self.hit = np.zeros(OCC3D.shape, bool)
        self.hit[tuple(self.index)] = True
        self.free = traversed(origin, torch.from_numpy(points), OCC3D).numpy() & ~self.hit
        boxes, self.wanted = dataset.boxes(i), np.full(len(points), FREE)
        for T, size, label in zip(boxes.T_ego_box, boxes.size[:, [1, 0, 2]], boxes.labels):
            local = (points - T[:3, 3]) @ T[:3, :3]
            self.wanted[(np.abs(local) <= size / 2).all(1) & (label > 0)] = label

    def scores(self, ids: np.ndarray) -> dict[str, float]:
        """ids (200, 200, 16) -> shares of voxels, and of the points in annotated boxes."""
        full, things = ids != FREE, self.wanted != FREE
        named = ids[tuple(self.index)][things]
        right, any_ = (full & self.hit).sum(), (self.hit | (full & self.free)).sum()
        return {"occupied": float(full.mean()), "iou": float(right / any_),
                "found": float(right / self.hit.sum()),
                "invented": float((full & self.free).sum() / self.free.sum()),
                "things_found": float((named != FREE).mean()),
                "things_named": float((named == self.wanted[things]).mean())}


@exit_on_input_error
def main() -> None:
    if len(sys.argv) != 2:
        raise InputError("expected a nuScenes tree")
    root, out = Path(sys.argv[1]), Path("runs/keyframe")
    dataset = NuScenesOccupancy(root, split="all", parts=())
    frame, rows = Keyframe(dataset), {}
    loose = write_example(dataset, 0, out / "calibration.json")
    for method in (m for m in DRIVING if (READY / m / "card.json").is_file()):
        ckpt = ["predict", "--ckpt", str(READY / method), "--out"]
        tree = ["--data-root", str(root), "--split", "all", "--eval-frames", "1"]
        verb(method, *ckpt, f"{out}/{method}", *tree)
        if method == "occvla":  # it takes neither a sweep
            loose = [*loose[:7], *loose[9:]]
        verb(method, *ckpt, f"{out}/{method}-loose", *loose)
        read = lambda path: read_npz(path, {"pred": (OCC3D.shape, None)})["pred"]  # noqa: E731
        ids = read(out / method / f"{dataset.tokens[0]}.npz")
        differs = int((ids != read(next((out / f"{method}-loose").glob("*.npz")))).sum())
        commit = read_json(READY / method / "card.json")["commit"]
        rows[method] = {**frame.scores(ids), "loose_differs": differs, "commit": commit}
    if (WORLDS / "driving-demo").is_dir():
        world = NuScenesOccupancy(WORLDS / "driving-demo", split="train", parts=())
        rows["constant of the demo world"] = frame.scores(constants(world, ["camera"])["camera"])
    notes = RESULTS / "keyframe.json"
    kept = read_json(notes).get("seen", {}) if notes.is_file() else {}
    record = {"kind": "keyframe", "method": "all", "command": "python -m experiments.keyframe DATA_ROOT",
              "points_in_boxes": int((frame.wanted != FREE).sum()), "rows": rows, "seen": kept,
              "voxels": {"occupied": int(frame.hit.sum()), "free": int(frame.free.sum())}}
    write_bytes(notes, dumps(record).encode())
    for name, row in rows.items():
        print(name, {k: round(v, 4) if isinstance(v, float) else v for k, v in row.items()})


if __name__ == "__main__":
    main()
