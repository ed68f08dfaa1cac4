"""Loose images as keyframes: any rig of calibrated cameras, for the verb predict and for LOC's query.

    python easyocc.py predict --ckpt R --images 1.jpg .. 6.jpg --calibration c.json --out P
    python -m common.loose --data-root D --out c.json    # an example: calibration and images of a keyframe

THE CALIBRATION   c.json, one entry per camera, in the order of the images:
    {"cameras": [{"K": [[fx, 0, cx], [0, fy, cy], [0, 0, 1]], "T_ego_cam": 4x4, "size": [1600, 900]}, ...],
     "T_ego_lidar": 4x4}
    K          [px] of an undistorted image of `size` (width, height; without it: of the image itself)
    T_ego_cam  p_ego = T_ego_cam p_cam [m]. Ego: x forward, y left, z up, origin on the ground below the rear
               axle. Camera: x right, y down, z forward
    T_ego_lidar   optional, of --points FILE: a sweep in nuScenes' form, five float32 a point in its own frame

Several keyframes: their images one after the other, with one calibration. A network expects the rig that it
learned from: OccVLA reads six images in nuScenes' order, and a camera that looks elsewhere is a picture that
it never saw.
"""

import argparse
from pathlib import Path

import numpy as np

from common.files import InputError, exit_on_input_error, open_image, read_json, write_json
from common.nuscenes import CAMERAS, Boxes, Future, NuScenesOccupancy, read_frame, read_resized

SHAPE = {"cameras": [{"K": [[float]], "T_ego_cam": [[float]], "size?": [int]}], "T_ego_lidar?": [[float]]}
LIDAR = [[0, 1, 0, 0.94], [-1, 0, 0, 0], [0, 0, 1, 1.84], [0, 0, 0, 1]]  # nuScenes': x right, y forward


class LooseImages:
    """What `predict` reads of a dataset, from image files and a calibration. Raises InputError as a reader
    does.
    """

    version, split, gts, history = "loose", "loose images", None, 0

    def __init__(self, images: tuple[str, ...], calibration: Path, image_size: tuple[int, int],
                 points: tuple[str, ...] = ()):
        stored = read_json(calibration, SHAPE)
        self.files, self.image_size = [Path(name).absolute() for name in images], image_size
        self.root, self.cameras = Path(calibration), len(stored["cameras"])
        if not self.cameras or not images or len(images) % self.cameras:
            raise InputError(f"--images: {len(images)} files, {calibration} has {self.cameras} cameras; give "
                             "one image for each, in its order")
        self.sweeps = [Path(name) for name in points]
        if self.sweeps and len(self.sweeps) != len(self):
            raise InputError(f"--points: {len(self.sweeps)} files for {len(self)} keyframes")
        array = lambda name, value, shape: check(calibration, name, value, shape)  # noqa: E731
        self.K = np.stack([array("K", c["K"], (3, 3)) for c in stored["cameras"]])
        self.T = np.stack([array("T_ego_cam", c["T_ego_cam"], (4, 4)) for c in stored["cameras"]])
        self.sizes = [array("size", c["size"], (2,)) if "size" in c else None for c in stored["cameras"]]
        self.lidar = array("T_ego_lidar", stored.get("T_ego_lidar", LIDAR), (4, 4))
        self.parts = ("images", "points") if points else ("images",)
        self.tokens = [self.files[k].stem for k in range(0, len(images), self.cameras)]
        if len(set(self.tokens)) < len(self.tokens):
            raise InputError(f"--images: two keyframes' first images are called {self.tokens[0]}; rename one")
        self.scene_names = ["loose"] * len(self)

    def __len__(self) -> int:
        return len(self.files) // self.cameras

    def __getitem__(self, i: int):
        return read_frame(self, i)

    def camera_files(self, i: int) -> list[str]:
        """Paths of keyframe i's images."""
        return [str(path) for path in self.files[i * self.cameras : (i + 1) * self.cameras]]

    def native(self, i: int) -> list[tuple[int, int]]:
        """(H, W) of keyframe i's image files."""
        sizes = []
        for path in self.camera_files(i):
            with open_image(path) as image:
                sizes.append((image.height, image.width))
        return sizes

    def calibration(self, i: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """-> K (N, 3, 3) float32 for `image_size`, T_ego_cam (N, 4, 4) float32, identity (4, 4) float64."""
        sizes = [own[::-1] if size is None else size for size, own in zip(self.sizes, self.native(i))]
        scale = [(self.image_size[1] / w, self.image_size[0] / h, 1) for w, h in sizes]
        return (self.K * np.array(scale)[..., None]).astype(np.float32), self.T.astype(np.float32), np.eye(4)

    def images(self, i: int) -> np.ndarray:
        """(N, 3, H, W) float32 RGB in [0, 1]."""
        files = zip(map(Path, self.camera_files(i)), self.native(i))
        images = [read_resized(path, own, self.image_size) for path, own in files]
        return np.stack(images).transpose(0, 3, 1, 2).astype(np.float32) / 255

    def points(self, i: int, sweeps: int = 0) -> np.ndarray:
        """(M, 5) float32: x, y, z [m] in ego, intensity, ring. There is one sweep."""
        if not self.sweeps:
            raise InputError("--images: this network reads a LiDAR sweep too; give it with --points FILE")
        points = NuScenesOccupancy._read_points(self.sweeps[i])
        points[:, :3] = points[:, :3] @ self.lidar[:3, :3].T + self.lidar[:3, 3]
        return points.astype(np.float32)

    def T_ego_lidar(self, i: int) -> np.ndarray:
        """(4, 4) float64."""
        return self.lidar

    def past(self, i: int, n: int) -> list[int]:
        """No keyframe is known to be earlier than another."""
        return []

    def future(self, i: int) -> Future:
        """Unknown; the ego stands still."""
        from common.report.planning import unknown_future

        return unknown_future()

    def boxes(self, i: int) -> Boxes:
        """None are known."""
        count = np.zeros(0, np.int64)
        return Boxes(np.zeros((0, 3)), np.zeros((0, 3)), np.zeros(0), np.zeros((0, 2)), [],
                     count.astype(np.uint8), [], count, count, count, [], np.zeros((0, 4, 4)))

    def questions(self, i: int) -> None:
        """None are asked; OccVLA's verb ask does that."""


def check(path: Path, name: str, value: list, shape: tuple[int, ...]) -> np.ndarray:
    """A finite float64 array of the shape; a 4x4 must be a rigid transform. InputError: the file, what is
    wrong.
    """
    try:
        array = np.array(value, np.float64)
    except (ValueError, OverflowError):
        array = np.full(1, np.nan)
    good = array.shape == shape and np.isfinite(array).all()
    if good and shape == (4, 4):
        turn = array[:3, :3]
        good = np.allclose(turn @ turn.T, np.eye(3), atol=1e-3) and np.linalg.det(turn) > 0
        good = good and np.allclose(array[3], (0, 0, 0, 1))
    elif good:
        good = array.min() > 0 if shape == (2,) else array[0, 0] > 0 < array[1, 1] and array[2, 2] == 1
    if not good:
        what = {(4, 4): "a rigid transform [R t; 0 0 0 1]", (3, 3): "[fx 0 cx; 0 fy cy; 0 0 1]"}
        raise InputError(f"{path}: '{name}' is not {what.get(shape, 'width, height')}")
    return array


def write_example(dataset: NuScenesOccupancy, i: int, path: Path) -> list[str]:
    """Write keyframe i's calibration -> the flags that predict it as loose images."""
    (H, W), (K, T, _) = dataset.image_shape, dataset.calibration(i)
    cameras = [{"name": name, "size": [W, H], "K": k.tolist(), "T_ego_cam": t.tolist()}
               for name, k, t in zip(CAMERAS, K, T)]
    write_json(path, {"cameras": cameras, "T_ego_lidar": dataset.T_ego_lidar(i).tolist()})
    images = [str(dataset.root / name) for name in dataset.camera_files(i)]
    return ["--images", *images, "--points", str(dataset.root / dataset.lidar_file(i)), "--calibration", str(path)]


@exit_on_input_error
def main() -> None:
    """Write a keyframe's calibration, and print the command that reads it with the keyframe's images."""
    parser = argparse.ArgumentParser("python -m common.loose", description=main.__doc__)
    parser.add_argument("--data-root", type=Path, required=True, help="a nuScenes tree")
    parser.add_argument("--split", default="all")
    parser.add_argument("--frame", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True, help="the JSON file")
    args = parser.parse_args()
    dataset = NuScenesOccupancy(args.data_root, split=args.split, parts=())
    if not 0 <= args.frame < len(dataset):
        raise InputError(f"--frame {args.frame}: the split has {len(dataset)} keyframes")
    print("predict", *write_example(dataset, args.frame, args.out))


if __name__ == "__main__":
    main()
