"""Robot conventions: rotations, gripper commands, camera images, flow matching over action chunks.

Conventions (the name of a function says which one it takes; tests/test_robot.py holds them)

    quaternions   xyzw is robosuite's and scipy's order, wxyz is nuScenes' and common.geometry's. q and -q are the same
                  rotation; robosuite keeps the sign it is given, so an axis-angle from w < 0 is longer than pi [rad].
    rot6d         `columns`: the first column of the matrix, then its second (Zhou et al. 2019; X-VLA). Six numbers from
                  the first two *rows* (pytorch3d, GR00T) are the transpose of this and not interchangeable with it.
    Euler         angles (x, y, z) [rad]. extrinsic xyz: about the fixed x, then y, then z axis, Rz Ry Rx; intrinsic
                  XYZ: about the body's own axes in that order, Rx Ry Rz. scipy writes them 'xyz' and 'XYZ'.
    gripper       the last channel of an action. `rlds` (also OpenVLA's outputs): 0 = close, 1 = open; `libero`, the
                  environment's command: -1 = open, +1 = close.
    images        the order of the axes is the caller's; rotate_180 is told which two are height and width.
    flow time     as in pi0's code: t = 1 is NOISE and t = 0 the actions, the opposite of the pi0 paper; the velocity
                  points from actions to noise and the sampler walks it backwards.

    Letters       B batch, A action steps, D channels of one action, L tokens, H W image
    Sources       robosuite's transform_utils through openpi's LIBERO example; X-VLA in lerobot; OpenVLA's robot_utils;
                  openpi's pi0 in torch (pi0_pytorch); Zhou et al. 2019, "On the Continuity of Rotation
                  Representations in Neural Networks". Checked against numbers of theirs, not copied.
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from common.geometry import matrix_to_quaternion

ROT6D_EPS_XVLA = 1e-6       # X-VLA's decoder divides by norm + 1e-6: its matrices are that much short of a rotation


# --- rotations --------------------------------------------------------------------------------------------------------

def quat_xyzw_to_wxyz(xyzw: Tensor) -> Tensor:
    """(..., 4) x y z w -> (..., 4) w x y z; same sign."""
    return xyzw.roll(1, dims=-1)


def quat_wxyz_to_xyzw(wxyz: Tensor) -> Tensor:
    """(..., 4) w x y z -> (..., 4) x y z w; same sign."""
    return wxyz.roll(-1, dims=-1)


def quat_xyzw_to_axisangle(xyzw: Tensor) -> Tensor:
    """Unit quaternions (..., 4), x y z w -> axis times angle (..., 3) [rad], by robosuite's rule.

    2 acos(w) along the axis, so between 0 and 2 pi long: the sign is not canonicalised, as policies trained on
    robosuite's states expect. Zero where 1 - w^2 is exactly 0. Loses digits near the identity: in float32 angles
    below about 5e-4 rad come out as zero, so call it in float64 where the source has it.
    """
    w = xyzw[..., 3:].clamp(-1, 1)                                                            # (..., 1)
    flat = 1 - w * w == 0
    w = torch.where(flat, 0, w)                 # keeps the gradient of the branch not taken finite
    scale = 2 * torch.acos(w) / torch.sqrt(1 - w * w)
    return torch.where(flat, 0, xyzw[..., :3] * scale)


def matrix_to_quat_xyzw(rotation: Tensor) -> Tensor:
    """Rotations (..., 3, 3) -> unit quaternions (..., 4), x y z w, w >= 0 (compare with others up to sign).

    A matrix that is a distance e from a rotation gives the nearest rotation's quaternion, as robosuite's eigenvector
    does, up to about e^2: one Newton step of the polar decomposition, differentiable where eigenvectors are not.
    """
    eye = torch.eye(3, dtype=rotation.dtype, device=rotation.device)
    nearest = rotation @ (3 * eye - rotation.mT @ rotation) / 2
    return quat_wxyz_to_xyzw(matrix_to_quaternion(nearest))


def matrix_to_rot6d_columns(rotation: Tensor) -> Tensor:
    """Rotations (..., 3, 3) -> (..., 6): the first column, then the second."""
    return rotation[..., :2].mT.flatten(-2)                                                   # (..., 2, 3) -> (..., 6)


def rot6d_columns_to_matrix(rot6d: Tensor, eps: float = 0.0) -> Tensor:
    """Any (..., 6), two columns one after the other -> rotations (..., 3, 3) by Gram-Schmidt (Zhou et al.).

    The first column keeps its direction, the second is made orthogonal to it, the third is their cross product.
    eps is added to both norms: 0 gives an exact rotation (NaN where the columns are parallel or zero),
    ROT6D_EPS_XVLA what X-VLA decodes: short by 1e-6 over the norm of what the first column leaves of the second.
    """
    a, b = rot6d[..., :3], rot6d[..., 3:]
    first = a / (a.norm(dim=-1, keepdim=True) + eps)
    b = b - (first * b).sum(-1, keepdim=True) * first
    second = b / (b.norm(dim=-1, keepdim=True) + eps)
    return torch.stack([first, second, torch.linalg.cross(first, second, dim=-1)], -1)        # (..., 3, 3)


def _about_axes(angles: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Angles (..., 3) [rad] -> the three rotations (..., 3, 3) about x, about y and about z."""
    cos, sin = angles.cos().unbind(-1), angles.sin().unbind(-1)
    zero, one = torch.zeros_like(cos[0]), torch.ones_like(cos[0])
    rows = ([one, zero, zero, zero, cos[0], -sin[0], zero, sin[0], cos[0]],
            [cos[1], zero, sin[1], zero, one, zero, -sin[1], zero, cos[1]],
            [cos[2], -sin[2], zero, sin[2], cos[2], zero, zero, zero, one])
    x, y, z = (torch.stack(r, -1).unflatten(-1, (3, 3)) for r in rows)
    return x, y, z


def euler_extrinsic_xyz_to_matrix(angles: Tensor) -> Tensor:
    """Angles (..., 3) about x, y, z [rad] -> Rz Ry Rx (..., 3, 3): turns about the fixed axes, x first."""
    x, y, z = _about_axes(angles)
    return z @ y @ x


def euler_intrinsic_XYZ_to_matrix(angles: Tensor) -> Tensor:
    """Angles (..., 3) about x, y, z [rad] -> Rx Ry Rz (..., 3, 3): turns about the body's own axes, X first."""
    x, y, z = _about_axes(angles)
    return x @ y @ z


# --- grippers and images ----------------------------------------------------------------------------------------------

def _with_gripper(action: Tensor, gripper: Tensor) -> Tensor:
    """action (..., D) with its last channel replaced by gripper (..., 1)."""
    return torch.cat([action[..., :-1], gripper], -1)


def gripper_normalise(action: Tensor) -> Tensor:
    """(..., D) with a gripper in [0, 1] -> (..., D) with it in [-1, 1]: 0 = close becomes -1, 1 = open stays 1."""
    return _with_gripper(action, 2 * action[..., -1:] - 1)


def gripper_binarise(action: Tensor) -> Tensor:
    """(..., D) with a gripper in [-1, 1] -> (..., D) with its sign: -1, 1, or 0 where it is exactly 0."""
    return _with_gripper(action, action[..., -1:].sign())


def gripper_invert(action: Tensor) -> Tensor:
    """(..., D) -> (..., D) with the gripper's sign turned: between -1 = close, 1 = open and LIBERO's command."""
    return _with_gripper(action, -action[..., -1:])


def gripper_rlds_to_libero(action: Tensor) -> Tensor:
    """(..., D), gripper 0 = close, 1 = open -> (..., D), gripper -1 = open, +1 = close; binarised, 0.5 becomes 0."""
    return gripper_invert(gripper_binarise(gripper_normalise(action)))


def gripper_libero_to_rlds(action: Tensor) -> Tensor:
    """(..., D), gripper -1 = open, +1 = close -> (..., D), gripper 0 = close, 1 = open; 0 becomes 0.5."""
    return _with_gripper(action, (1 - action[..., -1:]) / 2)


def rotate_180(images: Tensor, axes: tuple[int, int] = (-2, -1)) -> Tensor:
    """Images turned by half a turn, element [v, u] -> [H - 1 - v, W - 1 - u]; same shape.

    axes: height and width; (-2, -1) for (..., H, W) and (..., 3, H, W), (-3, -2) for (..., H, W, 3). Policies for
    LIBERO are fed images turned so. robosuite's buffers are upside down (rows only), so the turned picture is upright
    but mirrored: a point that projects to column u [px] of the upright picture shows at W - u in this one.
    """
    return images.flip(axes)


# --- flow matching (pi0) ----------------------------------------------------------------------------------------------

def pi0_flow(actions: Tensor, noise: Tensor, time: Tensor) -> tuple[Tensor, Tensor]:
    """actions, noise (B, A, D), time (B,) in [0, 1], 1 = noise -> x_t, u_t (B, A, D).

    x_t = t noise + (1 - t) actions is what the network sees, u_t = noise - actions = dx_t/dt what it should say.
    """
    t = time.reshape(-1, *[1] * (actions.dim() - 1))                                          # (B, 1, 1)
    return t * noise + (1 - t) * actions, noise - actions


def pi0_flow_loss(velocity: Tensor, u_t: Tensor) -> Tensor:
    """velocity, u_t (B, A, D) -> squared error (B, A, D), not reduced: padded steps and channels are the caller's."""
    return F.mse_loss(velocity, u_t, reduction="none")


def pi0_flow_sample(velocity: Callable[[Tensor, Tensor], Tensor], noise: Tensor, steps: int = 10) -> Tensor:
    """Integrates dx/dt = velocity(x, t) from t = 1, noise (B, A, D), to t = 0, actions (B, A, D), by Euler's rule.

    velocity: x (B, A, D), time (B,) -> (B, A, D); called at t = 1, 1 - 1/steps, ..., 1/steps.
    """
    if steps < 1:
        raise ValueError(f"steps must be at least 1, not {steps}")
    x = noise
    for step in range(steps):
        x = x - velocity(x, x.new_full(x.shape[:1], 1 - step / steps)) / steps
    return x


def pi0_time_quantile(q: Tensor) -> Tensor:
    """Probabilities (...) -> flow times (...): the quantiles of 0.999 Beta(1.5, 1) + 0.001, whose CDF is x^1.5."""
    return 0.999 * q ** (2 / 3) + 0.001


def pi0_time(batch: int, generator: torch.Generator | None = None, dtype: torch.dtype = torch.float32,
             device: torch.device | str | None = None) -> Tensor:
    """-> (B,) flow times to train at, in [0.001, 1]: more of them near noise (t = 1). One uniform number each."""
    return pi0_time_quantile(torch.rand(batch, generator=generator, dtype=dtype, device=device))


def pi0_time_embedding(time: Tensor, dim: int, min_period: float = 4e-3, max_period: float = 4.0) -> Tensor:
    """time (...) -> (..., dim): sines, then cosines, of 2 pi t / period, the dim / 2 periods in geometric progression.

    Worked out in float64, whatever the dtype of time and of the result: the fastest one turns 250 times from 0 to 1.
    """
    if dim < 2 or dim % 2:
        raise ValueError(f"the embedding needs an even number of channels, not {dim}")
    fraction = torch.linspace(0, 1, dim // 2, dtype=torch.float64, device=time.device)
    period = min_period * (max_period / min_period) ** fraction                               # (dim / 2)
    angle = 2 * math.pi * time.double()[..., None] / period                                   # (..., dim / 2) [rad]
    return torch.cat([angle.sin(), angle.cos()], -1).to(time.dtype)


def att_2d(starts: Tensor, valid: Tensor) -> Tensor:
    """Which token may attend to which: starts, valid (B, L) -> (B, L, L) bool, [b, query, key].

    starts is 1 where a token opens a new block and 0 where it stays in the one before it (openpi's `ar`): a token sees
    its own block, both ways, and every earlier one. All zeros is full attention, all ones causal; a prefix of zeros and
    a suffix that starts with a one lets the suffix see the prefix but not the reverse. Where valid is 0 (padding) a
    token neither sees nor is seen: its row is all False, which a softmax must be spared.
    """
    block = starts.long().cumsum(-1)                                                          # (B, L)
    valid = valid.bool()
    return (block[:, None, :] <= block[:, :, None]) & valid[:, None, :] & valid[:, :, None]
