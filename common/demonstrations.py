"""Demonstrations of manipulation tasks: on disk, and in memory as training frames.

One folder a demonstration, demos/<task>/<k as four digits>: episode.npz and one PNG strip per camera, frames
under each other: <camera>_rgb, <camera>_depth (uint16, 0.1 mm, 0 = none), <camera>_instance (uint8). Above
them world.json: name, tasks, demos of each, cameras, and (LIBERO) roles: which objects a task moves, and
where to.

Letters: T frames, V views, H W image, S state, D action channels, A action steps, n objects.
"""

import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from tqdm import tqdm

from common import worlds
from common.files import (InputError, grey16, is_component, misfit, open_image, read_json, read_npz, reading, write_bytes,
                          write_npz)
from common.geometry import unproject
from common.observation import Observation


DEPTH_UNIT = 1e-4  # [m] of one count in <camera>_depth.png


def _png(array: np.ndarray) -> bytes:
    flags = ([cv2.IMWRITE_PNG_COMPRESSION, 1] if array.dtype == np.uint16
             else [cv2.IMWRITE_PNG_COMPRESSION, 1, cv2.IMWRITE_PNG_STRATEGY,
                   cv2.IMWRITE_PNG_STRATEGY_DEFAULT])
    return cv2.imencode(".png", array, flags)[1].tobytes()


def write_episode(folder: Path, cameras: tuple[str, ...], images: np.ndarray, depth: np.ndarray,
                  instances: np.ndarray, **arrays: np.ndarray) -> None:
    """Writes one demonstration of T frames and V cameras; episode.npz last: a folder with it is whole.

    images (T, V, H, W, 3) uint8, depth (T, V, H, W) [m], instances (T, V, H, W) in 0..255 (0 = background, k
    + 1 = things[k]). arrays, as `read_episode` returns them: actions (T, D), states (T, S), poses (T, n, 4, 4)
    of the n things in base, K, T_base_cam (T, V, ...), things (n,) bytes, instruction and task () bytes.
    """
    for v, camera in enumerate(cameras):
        counts = np.round(np.concatenate(depth[:, v]) / DEPTH_UNIT).clip(0, 65535).astype(np.uint16)
        rgb = np.ascontiguousarray(np.concatenate(images[:, v])[..., ::-1])
        write_bytes(folder / f"{camera}_rgb.png", _png(rgb))
        write_bytes(folder / f"{camera}_depth.png", _png(counts))
        write_bytes(folder / f"{camera}_instance.png", _png(np.concatenate(instances[:, v]).astype(np.uint8)))
    write_npz(folder / "episode.npz", **arrays)


def read_world(root: Path) -> dict:
    """world.json of a folder of demonstrations. Raises InputError if it is missing or of another form."""
    path = Path(root) / "world.json"
    world = read_json(path)
    fault = misfit(world, {"name": str, "tasks": [str], "cameras": [str], "demos": int, "roles?": {str: [[str]]}})
    if fault or not (re.search("tabletop|LIBERO", world["name"]) and world["tasks"] and world["cameras"]):
        raise InputError(f"{path}: no demonstrations ({fault or 'a driving world: see common.nuscenes check'}); "
                         "python -m data.tabletop makes some, common.robot convert those of LIBERO")
    if not 1 <= world["demos"] < 10_000:  # folders have four digits
        raise InputError(f"{path}: 'demos' is {world['demos']}, expected 1..9999")
    if bad := [name for name in world["tasks"] + world["cameras"] if not is_component(name)]:
        raise InputError(f"{path}: '{bad[0][:80]}' is no name of a single folder; rename it")
    return world


def read_episode(folder: Path, cameras: list[str]) -> dict:
    """One demonstration's arrays, as `write_episode` names them. Raises InputError that names the file if one
    is missing, cut short or of another form."""
    path = folder / "episode.npz"
    shapes = {k: (None, "float32") for k in ("actions", "states", "poses")}
    shapes |= {k: (None, "float64") for k in ("K", "T_base_cam")}
    e = read_npz(path, shapes | {k: (None, None) for k in ("instruction", "things", "task")})
    T, V, n = len(np.atleast_1d(e["actions"])), len(cameras), len(np.atleast_1d(e["things"]))
    wanted = {key: (T, *e[key].shape[1:2]) for key in ("actions", "states")}
    wanted |= {"poses": (T, n, 4, 4), "K": (T, V, 3, 3), "T_base_cam": (T, V, 4, 4)}
    wanted |= {"instruction": (1,), "task": (1,), "things": (n,)}
    if not T or any(np.atleast_1d(e[k]).shape != shape for k, shape in wanted.items()):
        raise InputError(f"{path}: arrays of different lengths; cut short? remove the folder, make it again")
    bad = [k for k in shapes if k != "poses" and not np.isfinite(e[k]).all()]  # poses: LIBERO's are unknown
    if bad or any(e[k].dtype.kind != "S" for k in ("instruction", "task", "things")):
        why = f"{bad[0]} that are not finite" if bad else "names that are no bytes"
        raise InputError(f"{path}: {why}; remove the folder and make it again")
    with reading(path, "names that are no text", "remove the folder and make it again"):
        out = {k: e[k] for k in shapes} | {k: e[k].item().decode() for k in ("instruction", "task")}
        out["things"] = [t.decode() for t in np.atleast_1d(e["things"]).tolist()]
    for key, suffix, mode in (("images", "rgb", "RGB"), ("depth", "depth", "I;16"), ("instances", "instance", "L")):
        views: list[np.ndarray] = []
        for camera in cameras:
            path = folder / f"{camera}_{suffix}.png"
            strip = None
            with suppress(InputError), open_image(path) as image:
                strip = grey16(image) if suffix == "depth" else np.asarray(image) if image.mode == mode else None
            kept = strip is not None and strip.shape[0] == T * strip.shape[1]
            if not kept or views and views[0].shape[1] != strip.shape[1]:
                reason = "cut short or of another form" if path.is_file() else "missing"
                raise InputError(f"{path}: {reason}; remove the folder and make it again")
            views.append(strip.reshape(T, strip.shape[1], *strip.shape[1:]))
        out[key] = np.stack(views, 1)  # (T, V, H, W, ...)
    return out


def instance_masks(o: Observation) -> list[list[np.ndarray]]:
    """A simulator's instance maps (V, H, W) -> masks of each view, without identities."""
    return [[view == k for k in np.unique(view) if k > 0] for view in o.instances]


def mask_maker(name: str, grounding: str | None, sam: str | None, device: str) -> Callable:
    """-> observation -> masks of each view: the simulator's (world) or GroundingDINO + SAM's (foundation)."""
    if name == "world":
        return instance_masks
    from common.labelers import PromptedMasks  # here, with its models

    return PromptedMasks(grounding, sam, device)


def lift_mask(mask: np.ndarray, depth: np.ndarray, K: np.ndarray, T_base_cam: np.ndarray, cells: int,
              least: int = 12) -> tuple[Tensor, Tensor, Tensor] | None:
    """A view's mask -> point (3,) [m], box (4,) cx cy w h in [0, 1], mask (cells, cells); None if too small.

    The point is the mean of the mask's pixels in space. mask (H', W') bool of any size,
    depth (H, W) [m] and K of the same picture, T_base_cam (4, 4). At least `least` pixels have a depth.
    """
    H, W = depth.shape
    mask = cv2.resize(mask.astype(np.uint8), (W, H), interpolation=cv2.INTER_NEAREST_EXACT) > 0
    seen = np.argwhere(mask & (depth > 0))[:, ::-1]
    if len(seen) < least:
        return None
    z = depth[seen[:, 1], seen[:, 0]]
    rows, columns = np.nonzero(mask.any(1))[0], np.nonzero(mask.any(0))[0]
    low, high = np.array([columns[0], rows[0]]), np.array([columns[-1] + 1, rows[-1] + 1])
    seen, z, K, T = (torch.from_numpy(np.asarray(x, np.float64)) for x in (seen + 0.5, z, K, T_base_cam))
    point = unproject(seen, z, K, T).mean(0)
    low, high = torch.from_numpy(low / [W, H]), torch.from_numpy(high / [W, H])
    small = cv2.resize(mask.astype(np.float32), (cells, cells), interpolation=cv2.INTER_AREA)
    return point, torch.cat([(low + high) / 2, high - low]), torch.from_numpy(small)


def pseudo_targets(masks: list[list[np.ndarray]], depth: np.ndarray, K: np.ndarray, T_base_cam: np.ndarray,
                   cells: int, most: int = 16, radius: float = 0.05) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Masks of V views, (H, W) bool without identities, depth (V, H, W) [m] -> up to `most` objects: points
    (n, 3) [m], boxes (n, V, 4), masks (n, V, cells, cells), valid (n, V), as `lift_mask` has them. Ours.

    Masks of two views are one object if their points are nearest and closer than `radius` [m]. An object's
    point is the mean over views, weighted by their masks' areas. cells: side of the mask map.
    """
    V, objects = len(depth), []  # per object {view: (point, box, mask)}
    for v in range(V):
        found = [lift_mask(mask, depth[v], K[v], T_base_cam[v], cells) for mask in masks[v]]
        found, joined = [f for f in found if f is not None], {}
        if objects and found:
            centers = torch.stack([torch.stack([x[0] for x in o.values()]).mean(0) for o in objects])
            apart = (torch.stack([f[0] for f in found])[:, None] - centers).norm(dim=-1)  # [m]
            joined = {r: c for r, c in zip(*linear_sum_assignment(apart)) if apart[r, c] < radius}
        objects += [{v: f} for r, f in enumerate(found) if r not in joined]
        for r, c in joined.items():
            objects[c][v] = found[r]
    objects = sorted(objects, key=lambda o: -max(x[2].sum() for x in o.values()))[:most]
    n = len(objects)
    points, boxes = torch.zeros(n, 3), torch.full((n, V, 4), 0.5)
    shares, valid = torch.zeros(n, V, cells, cells), torch.zeros(n, V, dtype=torch.bool)
    for t, o in enumerate(objects):
        area = torch.stack([x[2].sum() for x in o.values()])
        points[t] = (area / area.sum()).double() @ torch.stack([x[0] for x in o.values()])
        for v, (_, boxes[t, v], shares[t, v]) in o.items():
            valid[t, v] = True
    return points, boxes, shares, valid


class Demonstrations:
    """Demonstrations of a tabletop world, or LIBERO's (common.robot convert), in memory, a sample a frame.

    views: cameras that are read, the first ones. Raises InputError if there are fewer, if states are wider
    than `state_dim`, or if actions have another width than `actions` (None: any).
    """

    def __init__(self, root: Path, views: int, state_dim: int, actions: int | None = None):
        self.root, world = Path(root), read_world(root)
        self.known_shapes = "roles" not in world  # the tabletop world's
        # task -> moves, where to
        self.roles = worlds.tabletop().ROLES if self.known_shapes else world["roles"]
        folders = [self.root / "demos" / t / f"{k:04d}" for t in world["tasks"] for k
                   in range(world["demos"])]
        with ThreadPoolExecutor(torch.get_num_threads()) as pool:
            read = pool.map(lambda folder: read_episode(folder, world["cameras"]), folders)
            self.demos: list[dict] = list(tqdm(read, "demonstrations", len(folders), leave=False,
                                               disable=None))
        for folder, demo in zip(folders, self.demos):
            V, S, D = len(demo["K"][0]), demo["states"].shape[1], demo["actions"].shape[1]
            actions = actions or D
            if V < views or D != actions or S > state_dim or S != self.demos[0]["states"].shape[1]:
                raise InputError(f"{folder}: {V} cameras, {D} numbers an action, {S} a state; --views "
                                 f"{views} --actions {actions}, states of one length up to {state_dim} here")
            if self.known_shapes and not np.isfinite(demo["poses"]).all():
                raise InputError(f"{folder}: poses that are not finite; remove the folder and make it again")
            roles = self.roles.get(demo["task"])
            if roles is None or len(roles) != 2 or not {*roles[0], *roles[1]} <= {*demo["things"]}:
                raise InputError(f"{folder}: a task whose roles in world.json are not its things ({demo['task']})")
            demo |= {key: demo[key][:, :views] for key in ("images", "depth", "instances", "K", "T_base_cam")}
        self.actions = actions
        self.place = [(e, k) for e, demo in enumerate(self.demos) for k in range(len(demo["actions"]))]

    def __len__(self) -> int:
        return len(self.place)

    def observation(self, i: int) -> Observation:
        """Frame i as the environment would give it."""
        e, k = self.place[i]
        d = self.demos[e]
        depth, marks = d["depth"][k] * np.float32(DEPTH_UNIT), d["instances"][k].astype(np.int32)
        return Observation(d["images"][k], depth, d["K"][k], d["T_base_cam"][k], marks, d["states"][k],
                           d["instruction"])

    def chunk(self, i: int, length: int) -> tuple[Tensor, Tensor]:
        """Actions (A, D) from frame i on, and (A,) which of them are before the end (the last is
        repeated)."""
        e, k = self.place[i]
        actions, index = self.demos[e]["actions"], torch.arange(k, k + length)
        return torch.from_numpy(actions)[index.clamp_max(len(actions) - 1)], index < len(actions)

    def ground(self, i: int, cells: int) -> Tensor:
        """(V, 2, cells, cells): share of each cell that shows the object to move, and its destination."""
        e, k = self.place[i]
        demo, view, maps = self.demos[e], self.demos[e]["instances"][k], []
        for names in self.roles[demo["task"]]:
            ids = [demo["things"].index(name) + 1 for name in names]
            maps.append(torch.from_numpy(np.isin(view, ids).astype(np.float32)))
        return F.adaptive_avg_pool2d(torch.stack(maps, 1), (cells, cells))

    def statistics(self) -> dict[str, Tensor]:
        """Mean and deviation of actions (D,) and states (S,).

        The gripper's action keeps its sign (0, 1). An action channel that hardly moves is not blown up to the
        size of the others: its deviation counts as 0.3 of the range [-1, 1] at least.
        """
        a, s = (torch.from_numpy(np.concatenate([d[key] for d in self.demos])) for key
                in ("actions", "states"))
        out = {"action_mean": a.mean(0), "action_std": a.std(0).clamp_min(0.3), "state_mean": s.mean(0),
               "state_std": s.std(0).clamp_min(0.01)}
        out["action_mean"][-1], out["action_std"][-1] = 0.0, 1.0
        return out

    def object_cloud(self, i: int, rng: np.random.Generator, count: int) -> dict[str, Tensor]:
        """A random object of frame i, or of another frame if too little of it is seen, in the tabletop world.

        -> partial (count, 3) and full (4 count, 3), on its whole surface, and eye (3,), the camera's centre,
        all centred and scaled by the partial cloud.
        """
        while True:
            (e, step), o = self.place[i], self.observation(i)
            names, poses = self.demos[e]["things"], self.demos[e]["poses"][step]
            v, k = int(rng.integers(len(o.images))), int(rng.integers(len(names)))
            mask = (o.instances[v] == k + 1) & (o.depth[v] > 0)
            if mask.sum() >= 24:
                break
            i = int(rng.integers(len(self)))
        rows, columns = np.nonzero(mask)
        uv = torch.from_numpy(np.stack([columns + 0.5, rows + 0.5], -1))
        K, T_base_cam = torch.from_numpy(o.K[v]), torch.from_numpy(o.T_base_cam[v])
        cloud = unproject(uv, torch.from_numpy(o.depth[v][mask]).double(), K, T_base_cam).numpy()
        surface = worlds.tabletop().surface_points(names[k].split()[-1], 4 * count, rng)
        full = surface @ poses[k][:3, :3].T + poses[k][:3, 3]
        cloud = cloud[rng.integers(len(cloud), size=count)]
        center = cloud.mean(0)
        scale = max(float(np.linalg.norm(cloud - center, axis=1).max()), 1e-3)
        parts = {"partial": cloud, "full": full, "eye": o.T_base_cam[v, :3, 3]}
        return {name: torch.from_numpy((x - center) / scale).float() for name, x in parts.items()}
