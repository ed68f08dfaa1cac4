"""The car's sensors: where they sit, what a camera photographs, what a LiDAR measures.

The rules are in data/driving/__init__.py.
"""

from typing import NamedTuple

import cv2
import numpy as np

from data.driving.city import City
from data.driving.nuscenes_writer import rounded
from data.driving.streets import ID
from data.render import GROUND, NONE, RayGrid, camera_rays, develop, draw, lidar_rays, shade

NATIVE = (1600, 900)
RING_ELEVATION = np.radians(np.linspace(-30.67, 10.67, 32))
AZIMUTHS = 1086
LIDAR_RANGE = 100.0             # [m]
# channel: x, y, z [m], yaw [degrees], focal length, cx, cy [px at 1600x900], trigger before the LiDAR [ms]
# (nuScenes' own, rounded)
CAMERA_LAYOUT = {
    "CAM_FRONT": (1.70, 0.00, 1.51, 0.0, 1266, 816, 491, 35.5),
    "CAM_FRONT_RIGHT": (1.55, -0.49, 1.50, -56.0, 1261, 808, 495, 27.6),
    "CAM_BACK_RIGHT": (1.02, -0.48, 1.56, -110.0, 1260, 807, 500, 19.8),
    "CAM_BACK": (0.03, 0.00, 1.57, 180.0, 809, 829, 482, 10.4),
    "CAM_BACK_LEFT": (1.04, 0.48, 1.59, 109.0, 1257, 792, 493, 0.5),
    "CAM_FRONT_LEFT": (1.52, 0.49, 1.51, 55.0, 1273, 827, 480, 43.1),
}
LIDAR_LAYOUT = (0.94, 0.0, 1.84, -90.0)

# --- frames -----------------------------------------------------------------------------------------------------------

def quaternion(R: np.ndarray) -> list[float]:
    """Rotation (3, 3) -> w, x, y, z, w >= 0."""
    m = np.asarray(R, np.float64)
    trace = m[0, 0] + m[1, 1] + m[2, 2]
    wx, wy, wz = m[2, 1] - m[1, 2], m[0, 2] - m[2, 0], m[1, 0] - m[0, 1]
    xy, xz, yz = m[1, 0] + m[0, 1], m[0, 2] + m[2, 0], m[2, 1] + m[1, 2]
    w, x, y, z = 1 + trace, *(1 + 2 * m.diagonal() - trace)
    rows = np.array([[w, wx, wy, wz], [wx, x, xy, xz], [wy, xy, y, yz], [wz, xz, yz, z]])  # row i: 4 q_i times q
    q = rows[rows.diagonal().argmax()]  # the largest component's row loses no digits
    q = q / np.sqrt((q * q).sum())
    return (-q if q[0] < 0 else q).tolist()


def matrix(row: dict) -> np.ndarray:
    """A row of ego_pose or calibrated_sensor -> T (4, 4), exactly as a reader of the tables gets it."""
    w, x, y, z = np.array(row["rotation"]) / np.linalg.norm(row["rotation"])
    T = np.eye(4)
    T[:3, :3] = [[1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)],
                 [2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)],
                 [2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)]]
    T[:3, 3] = row["translation"]
    return T


def calibration(rng: np.random.Generator, image: tuple[int, int]) -> dict[str, dict]:
    """Sensor -> translation, rotation, camera_intrinsic of one car: the nominal layout with a small jitter per log."""
    def small(degrees):
        a = np.radians(rng.normal(0, degrees, 3))
        return np.array([[1, -a[2], a[1]], [a[2], 1, -a[0]], [-a[1], a[0], 1]])

    def turn(yaw):
        c, s = np.cos(np.radians(yaw)), np.sin(np.radians(yaw))
        return np.array([[c, -s, 0], [s, c, 0], [0, 0, 1.0]])

    H, W = image
    scale = W / NATIVE[0]
    optical = np.array([[0, 0, 1], [-1, 0, 0], [0, -1, 0.0]])                               # ego axes <- camera axes
    rows = {}
    for channel, (x, y, z, yaw, focal, cx, cy, _) in CAMERA_LAYOUT.items():
        u, _, v = np.linalg.svd(small(0.35) @ turn(yaw) @ optical)
        f = focal * scale * (1 + rng.normal(0, 0.002))
        u0, v0 = (cx + rng.normal(0, 3)) * scale, (cy + rng.normal(0, 3)) * scale - (NATIVE[1] * scale - H) / 2
        rows[channel] = {"translation": rounded(np.array([x, y, z]) + rng.normal(0, 0.01, 3), 6),
                         "rotation": quaternion(u @ v),
                         "camera_intrinsic": [[f, 0.0, u0], [0.0, f, v0], [0.0, 0.0, 1.0]]}
    x, y, z, yaw = LIDAR_LAYOUT
    u, _, v = np.linalg.svd(small(0.2) @ turn(yaw))
    rows["LIDAR_TOP"] = {"translation": rounded(np.array([x, y, z]) + rng.normal(0, 0.01, 3), 6),
                         "rotation": quaternion(u @ v), "camera_intrinsic": []}
    return rows


# --- sensors ----------------------------------------------------------------------------------------------------------

def class_table() -> np.ndarray:
    """Occ3D id of each of the 32 lidarseg classes."""
    from common.nuscenes import LIDARSEG_TO_OCC3D
    return np.asarray(LIDARSEG_TO_OCC3D, np.uint8)


class Image(NamedTuple):
    """One camera frame; all but the colours are None if only these were asked for."""

    color: np.ndarray                   # (H, W, 3) uint8
    depth: np.ndarray | None            # (H, W) uint16 [m * 256], 0: nothing
    semantic: np.ndarray | None         # (H, W) uint8 lidarseg class, 255: nothing
    instance: np.ndarray | None         # (H, W) uint16 1 + actor, 0: none
    covered: np.ndarray | None          # (actors,) pixels that each would have if nothing stood before it


def photograph(city: City, t: float, K: np.ndarray, T_global_cam: np.ndarray, shape: tuple[int, int],
               rng: np.random.Generator, exact: bool) -> Image:
    """A camera's frame at time t; exact=False renders the colours only."""
    scene = city.scene(t)
    grid = camera_rays(K, T_global_cam, shape)
    view = draw(scene, grid, count=exact)
    color = develop(shade(scene, grid, view), scene.light.exposure, rng, gain=float(rng.uniform(0.97, 1.03)))
    if not exact:
        return Image(color, None, None, None, None)
    depth = np.round(view.t * 256).astype(np.uint16)
    semantic = surface_classes(city, scene, grid, view)
    instance = np.where(view.ids >= 0, scene.primitives.instance[view.ids.clip(0)] + 1, 0).astype(np.uint16)
    return Image(color, depth, semantic, instance, view.covered)


def surface_classes(city: City, scene, grid: RayGrid, view) -> np.ndarray:
    """lidarseg class of every ray of a view, 255 where it hits nothing."""
    out = np.full(view.ids.shape, 255, np.uint8)
    thing = view.ids >= 0
    out[thing] = scene.primitives.semantic[view.ids[thing]]
    i, j = np.nonzero(view.ids == GROUND)
    if len(i):
        d, t = grid.directions()[:2, i, j], view.t[i, j]
        out[i, j] = city.ground.classes(*(np.float32(grid.origin[a]) + t * d[a] for a in (0, 1)))
    return out


# intensity by class: mean of 0..255 (ours, after the look of real sweeps)
_REFLECT = np.full(32, 22.0, np.float32)
for _name, _value in (("flat.driveable_surface", 9), ("flat.sidewalk", 16), ("flat.terrain", 18),
                      ("static.vegetation", 20), ("static.manmade", 26), ("movable_object.trafficcone", 60),
                      ("movable_object.barrier", 35), ("vehicle.car", 32), ("vehicle.truck", 40)):
    _REFLECT[ID[_name]] = _value


def sweep(city: City, t: float, T_global_lidar: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """-> points (M, 5) float32 x, y, z [m, LiDAR frame], intensity, ring; lidarseg class (M,). Azimuth by azimuth."""
    scene = city.scene(t, light=False)
    grid = lidar_rays(T_global_lidar, RING_ELEVATION, AZIMUTHS)
    view = draw(scene, grid)
    semantic = surface_classes(city, scene, grid, view)
    points, ring, column = returns(scene, view, semantic, RING_ELEVATION, rng)
    return points, semantic[ring, column]


def returns(scene, view, semantic: np.ndarray, elevation: np.ndarray,
            rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """What a LiDAR with rings at `elevation` [rad] measures of a view: points (M, 5) as `sweep`, ring, column (M,)."""
    H, W = view.t.shape
    distance = view.t + np.clip(rng.normal(0, 0.01, (H, W)), -0.03, 0.03).astype(np.float32)
    fade = 0.004 + 0.06 * (view.t / LIDAR_RANGE) ** 2 + 0.05 * scene.light.wet * (view.t / 40)
    keep = (view.ids != NONE) & (view.t < LIDAR_RANGE) & (rng.random((H, W)) > fade)
    noise = rng.gamma(4, 0.25, (H, W)).astype(np.float32)
    azimuth = (np.arange(W) + 0.5) / W * 2 * np.pi - np.pi
    j, ring = np.nonzero(keep.T)                                       # azimuth first
    distance, kind = distance[ring, j], semantic[ring, j]
    flat = np.cos(elevation)[ring] * distance
    intensity = np.clip(_REFLECT[kind] * noise[ring, j], 0, 255).round()
    x, y, z = flat * np.cos(azimuth)[j], flat * np.sin(azimuth)[j], np.sin(elevation)[ring] * distance
    return np.stack([x, y, z, intensity, ring], 1).astype(np.float32), ring, j


def png(array: np.ndarray) -> bytes:
    """Lossless, fast: level 1, and run lengths for 8-bit maps."""
    strategy = cv2.IMWRITE_PNG_STRATEGY_DEFAULT if array.dtype == np.uint16 else cv2.IMWRITE_PNG_STRATEGY_RLE
    flags = [cv2.IMWRITE_PNG_COMPRESSION, 1, cv2.IMWRITE_PNG_STRATEGY, strategy]
    return cv2.imencode(".png", array, flags)[1].tobytes()


def jpeg(color: np.ndarray) -> bytes:
    """color (H, W, 3) RGB."""
    return cv2.imencode(".jpg", cv2.cvtColor(color, cv2.COLOR_RGB2BGR), [cv2.IMWRITE_JPEG_QUALITY, 92])[1].tobytes()
