"""The field's recipe for one dense label, for tests/bench/label_factory.py: Open3D's normals and Poisson mesh of depth 10,
the 0.1 quantile of the vertices by density dropped, voxels of what is left, the nearest labelled point's class.

After SurroundOcc's tools/generate_occupancy_nuscenes.py (weiyithu/SurroundOcc; LOcc uses the same), written anew; its
nearest neighbours run on a GPU, here a k-d tree finds them. Needs Open3D, numpy and scipy, nothing of this project:

    python -m venv E && E/bin/pip install open3d-cpu scipy       # and the system library libusb-1.0
    E/bin/python tests/bench/reference_labels.py IN.npz OUT.npz

IN: points (M, 3) [m], labels (M,) uint8 (255 none), sensor (3,), lower (3,), voxel (), shape (3,), free ().
OUT: semantics (X, Y, Z) uint8, seconds and cpu_seconds without reading and writing.
"""

import sys
import time

import numpy as np
import open3d as o3d
from scipy.spatial import cKDTree

DEPTH, MIN_DENSITY, MAX_NN = 10, 0.1, 20  # SurroundOcc's config.yaml


def dense_label(points: np.ndarray, labels: np.ndarray, sensor: np.ndarray, lower: np.ndarray, voxel: float, shape: np.ndarray,
                free: int) -> np.ndarray:  # fmt: skip
    """-> (X, Y, Z) uint8."""
    cloud = o3d.geometry.PointCloud(o3d.utility.Vector3dVector(points))
    cloud.estimate_normals(o3d.geometry.KDTreeSearchParamKNN(MAX_NN))
    cloud.orient_normals_towards_camera_location(sensor)
    mesh, density = o3d.geometry.TriangleMesh.create_from_point_cloud_poisson(cloud, depth=DEPTH)
    density = np.asarray(density)
    vertices = np.asarray(mesh.vertices)[density >= np.quantile(density, MIN_DENSITY)]
    index = np.floor((vertices - lower) / voxel).astype(np.int64)
    index = np.unique(index[((index >= 0) & (index < shape)).all(1)], axis=0)
    known = labels != 255
    nearest = cKDTree(points[known]).query(lower + (index + 0.5) * voxel)[1]
    semantics = np.full(shape, free, np.uint8)
    semantics[tuple(index.T)] = labels[known][nearest]
    return semantics


def main() -> None:
    with np.load(sys.argv[1]) as archive:
        given = {name: archive[name] for name in archive.files}
    wall, cpu = time.perf_counter(), time.process_time()
    semantics = dense_label(given["points"].astype(np.float64), given["labels"], given["sensor"], given["lower"], given["voxel"].item(),
                            given["shape"], given["free"].item())  # fmt: skip
    np.savez(sys.argv[2], semantics=semantics, seconds=time.perf_counter() - wall, cpu_seconds=time.process_time() - cpu)


if __name__ == "__main__":
    main()
