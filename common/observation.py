"""What a manipulation policy sees and does, and one interface to environments.

Conventions  images as LIBERO's policies are fed: upright and mirrored (robosuite's buffers with rows and
             columns reversed). K belongs to them, with a negative focal length in x, so common.geometry's
             project and unproject hold as they are. RoboTwin's are upright and not mirrored.
             A gripper is the last channel of an action: -1 = open, +1 = close.
Letters      B batch, V views, H W image, S state, D action channels.
"""

from typing import NamedTuple, Protocol

import cv2
import numpy as np
import torch
from torch import Tensor

from common.files import InputError
from common.geometry import scale_intrinsics


class Observation(NamedTuple):
    """What a policy sees of V cameras at one time, in numpy."""

    images: np.ndarray  # (V, H, W, 3) uint8; view 0 stands still, the others move with the arm
    depth: np.ndarray | None  # (V, H, W) float32 z-depth [m], 0 = none
    K: np.ndarray  # (V, 3, 3) float64 [px]
    T_base_cam: np.ndarray  # (V, 4, 4) float64; base: the frame in which the state's position is given
    instances: np.ndarray | None  # (V, H, W) int32, 0 = background; a training label only
    state: np.ndarray  # (S,) float64; LIBERO: position (3) [m], axis-angle (3) [rad], fingers (2) [m]
    instruction: str


class Outcome(NamedTuple):
    """After one control step. aborted: why an episode was given up (a failure), else ""."""

    observation: Observation | None  # None if it was not asked for
    success: bool
    done: bool
    aborted: str = ""


class Environment(Protocol):
    """What a policy's evaluation asks of a simulator."""

    name: str  # as result.json names the dataset
    tasks: tuple[str, ...]
    max_steps: int  # control steps a policy has in the episode that was reset last
    action_dim: int
    cameras: tuple[str, ...]  # V names
    # kinds that reset takes as TASK@KIND:LEVEL; none: the benchmark's tasks have their own
    perturbations: tuple[str, ...]

    def reset(self, task: str, seed: int) -> Observation:
        """Starts an episode; equal (task, seed) start equally. Raises InputError on an unknown task."""

    def step(self, action: np.ndarray, look: bool = True) -> Outcome:
        """One control step of (D,) numbers; look False: no pictures. NaN aborts; a wrong number:
        InputError."""

    def close(self) -> None:
        """Frees the simulator."""

    def category(self, task: str) -> str:
        """The kind of perturbation, "" if there is none."""

    def nominal(self, observation: Observation) -> np.ndarray:
        """T_base_cam (V, 4, 4) as it would be without a camera perturbation."""

    def visible_share(self) -> float:
        """Share of the task's target that the first view sees now; NaN where the simulator does not tell."""


def check_action(action, dim: int) -> tuple[np.ndarray, str]:
    """Any action -> (dim,) float64, and why the episode must be given up ("": it need not).

    Raises InputError if it has another number of channels: that is the caller's mistake, NaN is the policy's.
    """
    action = np.asarray(action, np.float64)
    if action.shape != (dim,):
        raise InputError(f"an action of shape {action.shape}: this environment takes ({dim},)")
    return action, "" if np.isfinite(action).all() else "the action is not finite"


def check_observation(o: Observation, where: str = "observation") -> Observation:
    """The observation itself. Raises InputError if depth is missing or of another size than the images, or if
    a camera matrix belongs to images of another size (its principal point is far from their middle)."""
    V, H, W = o.images.shape[:3]
    if o.depth is None:
        raise InputError(f"{where}: no depth; 3D tokens need aligned depth (LIBERO: camera_depths, RoboTwin: "
                         f"data_type.depth)")
    if o.depth.shape != (V, H, W):
        raise InputError(f"{where}: depth of shape {o.depth.shape} with images {V}x{H}x{W}; give it at the "
                         "images' size")
    if o.K.shape != (V, 3, 3) or o.T_base_cam.shape != (V, 4, 4):
        raise InputError(f"{where}: K {o.K.shape} and T_base_cam {o.T_base_cam.shape} for {V} views")
    if not np.isfinite(o.K).all() or not np.isfinite(o.T_base_cam).all():
        raise InputError(f"{where}: K or T_base_cam holds what is no number")
    for v in range(V):
        cx, cy = o.K[v, 0, 2] / W, o.K[v, 1, 2] / H
        if not (0.45 < cx < 0.55 and 0.45 < cy < 0.55):
            raise InputError(f"{where}: K of view {v} has its centre at {o.K[v, 0, 2]:.0f}, "
                             f"{o.K[v, 1, 2]:.0f} px in a picture of {W}x{H}: a calibration of another image "
                             "size; scale it (common.geometry.scale_intrinsics)")
    return o


def mirror_intrinsics(K: np.ndarray, width: int) -> np.ndarray:
    """K (..., 3, 3) of pictures -> that of the same pictures with their columns reversed (rotate_180's): u ->
    W - u."""
    flip = np.array([[-1.0, 0, width], [0, 1, 0], [0, 0, 1]])
    return flip @ K


def stack_observations(observations: list[Observation], size: int, device: torch.device | str = "cpu",
                       views: int | None = None) -> dict:
    """Observations -> tensors at `size` px: images (B, V, 3, H, W) in [0, 1], depth (B, V, H, W) [m], K (B,
    V, 3, 3), T_base_cam (B, V, 4, 4), state (B, S), and texts. Instance masks are not read: they are training
    labels."""
    fields: dict[str, list] = {k: [] for k in ("images", "depth", "K", "T_base_cam", "state")}
    for o in observations:
        o = o._replace(K=check_observation(o).K[:views], T_base_cam=o.T_base_cam[:views])  # the first views
        H, W = o.images.shape[1:3]
        images, depth = o.images[:views], o.depth[:views]
        if (H, W) != (size, size):
            how = cv2.INTER_AREA if H > size else cv2.INTER_LINEAR
            images = np.stack([cv2.resize(i, (size, size), interpolation=how) for i in images])
            nearest = cv2.INTER_NEAREST_EXACT
            depth = np.stack([cv2.resize(d, (size, size), interpolation=nearest) for d in depth])
        depth = np.where(np.isfinite(depth), depth, np.float32(0))  # no number: not measured
        fields["images"].append(torch.from_numpy(np.ascontiguousarray(images)))
        fields["depth"].append(torch.from_numpy(np.ascontiguousarray(depth)))
        fields["K"].append(scale_intrinsics(torch.from_numpy(o.K).float(), size / W, size / H))
        fields["T_base_cam"].append(torch.from_numpy(o.T_base_cam).float())
        fields["state"].append(torch.from_numpy(np.asarray(o.state, np.float32)))
    stacked: dict[str, Tensor] = {k: torch.stack(v).to(device) for k, v in fields.items()}
    stacked["images"] = stacked["images"].permute(0, 1, 4, 2, 3).float() / 255  # (B, V, 3, H, W)
    return stacked | {"texts": [o.instruction for o in observations]}
