"""common/robot.py: hand-computed numbers, round trips, scipy's rotations, gradients, the reference vectors."""

import math

import numpy as np
import pytest
import torch
from scipy import stats
from scipy.spatial.transform import Rotation
from torch.autograd import gradcheck
from vectors import load

from common import robot
from common.geometry import quaternion_to_matrix
from common.robot import (
    ROT6D_EPS_XVLA,
    att_2d,
    euler_extrinsic_xyz_to_matrix,
    euler_intrinsic_XYZ_to_matrix,
    gripper_binarise,
    gripper_invert,
    gripper_libero_to_rlds,
    gripper_normalise,
    gripper_rlds_to_libero,
    matrix_to_quat_xyzw,
    matrix_to_rot6d_columns,
    pi0_flow,
    pi0_flow_loss,
    pi0_flow_sample,
    pi0_time,
    pi0_time_embedding,
    pi0_time_quantile,
    quat_wxyz_to_xyzw,
    quat_xyzw_to_axisangle,
    quat_xyzw_to_wxyz,
    rot6d_columns_to_matrix,
    rotate_180,
)

T = torch.from_numpy
TOLERANCE = 1e-6            # vectors/README.md, robot_flow


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def f64(*values) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def randn(*shape: int, seed: int = 0, **kwargs) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64, **kwargs)


def rotations(*batch: int, seed: int = 0) -> torch.Tensor:
    return quaternion_to_matrix(randn(*batch, 4, seed=seed))


# --- rotations --------------------------------------------------------------------------------------------------------

def test_vectors_quaternions():
    v = load("robot_flow")
    q = T(v["quat_xyzw"])
    v.close("axisangle_robosuite", quat_xyzw_to_axisangle(q), TOLERANCE)
    v.close("axisangle_lerobot_xvla", quat_xyzw_to_axisangle(q), TOLERANCE)
    shorter = torch.where(q[:, 3:] < 0, -q, q)                      # scipy takes the shorter way round, robosuite not
    v.close("rotvec_scipy", quat_xyzw_to_axisangle(shorter), TOLERANCE)
    assert np.abs(quat_xyzw_to_axisangle(q).numpy() - v["rotvec_scipy"]).max() > math.pi
    v.close("rotmat", quaternion_to_matrix(quat_xyzw_to_wxyz(q)), TOLERANCE)
    back = matrix_to_quat_xyzw(T(v["rotmat"]))
    same = (back * T(v["mat2quat_robosuite_xyzw_f32"])).sum(-1, keepdim=True).sign()
    v.close("mat2quat_robosuite_xyzw_f32", back * same, TOLERANCE)


def test_vectors_rot6d():
    v = load("robot_flow")
    v.close("rot6d_columns_zhou", matrix_to_rot6d_columns(T(v["rotmat"])), TOLERANCE)
    v.close("rotmat", rot6d_columns_to_matrix(T(v["rot6d_columns_zhou"])), TOLERANCE)
    raw = T(v["rot6d_raw"])
    # the same six numbers read as rows are the transposed matrix: an exact decoder's numbers for ours
    v.close("rot6d_raw_as_rows_matrix", rot6d_columns_to_matrix(raw).mT, TOLERANCE)
    axisangle = quat_xyzw_to_axisangle(matrix_to_quat_xyzw(rot6d_columns_to_matrix(raw, eps=ROT6D_EPS_XVLA)))
    v.close("rot6d_raw_as_cols_axisangle", axisangle, TOLERANCE)
    exact = quat_xyzw_to_axisangle(matrix_to_quat_xyzw(rot6d_columns_to_matrix(raw)))
    assert TOLERANCE < np.abs(exact.numpy() - v["rot6d_raw_as_cols_axisangle"]).max() < 1e-4


def test_vectors_euler():
    v = load("robot_flow")
    v.close("euler_extrinsic_xyz_mat", euler_extrinsic_xyz_to_matrix(T(v["euler_xyz"])), TOLERANCE)
    v.close("euler_intrinsic_XYZ_mat", euler_intrinsic_XYZ_to_matrix(T(v["euler_xyz"])), TOLERANCE)


def test_quaternion_orders_by_hand_and_round_trip():
    assert quat_xyzw_to_wxyz(f64(1, 2, 3, 4)).tolist() == [4, 1, 2, 3]
    assert quat_wxyz_to_xyzw(f64(4, 1, 2, 3)).tolist() == [1, 2, 3, 4]
    q = randn(2, 3, 4)
    assert torch.equal(quat_wxyz_to_xyzw(quat_xyzw_to_wxyz(q)), q)


def test_axisangle_by_hand():
    s = math.sqrt(0.5)
    quarter = f64(0, 0, s, s)
    torch.testing.assert_close(quat_xyzw_to_axisangle(quarter), f64(0, 0, math.pi / 2))
    torch.testing.assert_close(quat_xyzw_to_axisangle(-quarter), f64(0, 0, -3 * math.pi / 2))   # the long way round
    torch.testing.assert_close(quat_xyzw_to_axisangle(f64(1, 0, 0, 0)), f64(math.pi, 0, 0))
    for w in (1.0, -1.0):
        assert quat_xyzw_to_axisangle(f64(0, 0, 0, w)).tolist() == [0, 0, 0]
    assert quat_xyzw_to_axisangle(f64(1e-9, 0, 0, 1.0)).tolist() == [0, 0, 0]       # 1 - w^2 is 0: robosuite's rule
    assert torch.isfinite(quat_xyzw_to_axisangle(torch.tensor([0, 0, 0, 1.0000001]))).all()     # rounding beyond 1


def test_axisangle_in_float32_is_zero_where_the_docstring_says():
    half = torch.tensor([2.2e-4, 3.7e-4], dtype=torch.float64)                                  # [rad] half the angles
    q = torch.stack([half.sin(), 0 * half, 0 * half, half.cos()], -1)
    single = quat_xyzw_to_axisangle(q.float())[:, 0]
    assert single[0] == 0 and 5e-4 < single[1] < 1e-3
    torch.testing.assert_close(quat_xyzw_to_axisangle(q)[:, 0], 2 * half, rtol=1e-6, atol=0)


def test_quaternions_agree_with_scipy():
    ours = rotations(40)
    theirs = Rotation.from_matrix(ours.numpy())
    q = matrix_to_quat_xyzw(ours)
    assert (q[:, 3] >= 0).all()
    np.testing.assert_allclose(q.numpy(), theirs.as_quat(canonical=True), atol=1e-12)
    np.testing.assert_allclose(quat_xyzw_to_axisangle(q).numpy(), theirs.as_rotvec(), atol=1e-10)
    torch.testing.assert_close(quaternion_to_matrix(quat_xyzw_to_wxyz(q)), ours, atol=1e-12, rtol=0)
    # the sign that robosuite keeps changes the vector, never the rotation
    long_way = Rotation.from_rotvec(quat_xyzw_to_axisangle(-q).numpy()).as_matrix()
    np.testing.assert_allclose(long_way, ours.numpy(), atol=1e-10)


def test_a_matrix_near_a_rotation_gives_the_nearest_one():
    R = rotations(20)
    a = 1e-4 * randn(20, 3, 3, seed=1)
    stretched = R @ (torch.eye(3, dtype=torch.float64) + a + a.mT)              # a symmetric stretch: R is nearest
    np.testing.assert_allclose(matrix_to_quat_xyzw(stretched).numpy(), matrix_to_quat_xyzw(R).numpy(), atol=1e-6)
    u, _, vh = torch.linalg.svd(stretched)      # the same by singular values
    np.testing.assert_allclose((u @ vh).numpy(), R.numpy(), atol=1e-10)


def test_rot6d_by_hand():
    quarter_about_z = f64([0, -1, 0], [1, 0, 0], [0, 0, 1])
    six = matrix_to_rot6d_columns(quarter_about_z)
    assert six.tolist() == [0, 1, 0, -1, 0, 0]                      # the rows would be 0, -1, 0, 1, 0, 0
    assert torch.equal(rot6d_columns_to_matrix(six), quarter_about_z)
    # lengths and the part of the second along the first do not matter
    assert torch.equal(rot6d_columns_to_matrix(f64(0, 2, 0, -4, 3, 0)), quarter_about_z)


def test_rot6d_round_trip_and_decoding_of_anything():
    R = rotations(2, 5)
    torch.testing.assert_close(rot6d_columns_to_matrix(matrix_to_rot6d_columns(R)), R, atol=1e-12, rtol=0)
    R = rot6d_columns_to_matrix(randn(2, 5, 6))
    assert R.shape == (2, 5, 3, 3)
    torch.testing.assert_close(R.mT @ R, torch.eye(3, dtype=torch.float64).expand(2, 5, 3, 3), atol=1e-12, rtol=0)
    torch.testing.assert_close(torch.linalg.det(R), torch.ones(2, 5, dtype=torch.float64))
    assert rot6d_columns_to_matrix(f64(1, 0, 0, 2, 0, 0)).isnan().any()             # parallel: no plausible lie
    assert rot6d_columns_to_matrix(f64(0, 0, 0, 0, 0, 0), eps=ROT6D_EPS_XVLA).tolist() == [[0, 0, 0]] * 3


def test_euler_by_hand_and_scipy():
    turns = f64(math.pi / 2, 0, math.pi / 2)                        # a quarter about x and one about z
    x = f64(1, 0, 0)
    torch.testing.assert_close(euler_extrinsic_xyz_to_matrix(turns) @ x, f64(0, 1, 0))      # x stays, then goes to y
    torch.testing.assert_close(euler_intrinsic_XYZ_to_matrix(turns) @ x, f64(0, 0, 1))
    angles = 2 * randn(4, 5, 3)
    for ours, name in ((euler_extrinsic_xyz_to_matrix, "xyz"), (euler_intrinsic_XYZ_to_matrix, "XYZ")):
        theirs = Rotation.from_euler(name, angles.numpy().reshape(-1, 3)).as_matrix().reshape(4, 5, 3, 3)
        np.testing.assert_allclose(ours(angles).numpy(), theirs, atol=1e-12)
    turned_back = euler_extrinsic_xyz_to_matrix(-angles)            # undoes the intrinsic turns, last one first
    torch.testing.assert_close(euler_intrinsic_XYZ_to_matrix(angles), turned_back.mT)


# --- grippers and images ----------------------------------------------------------------------------------------------

def test_vectors_gripper():
    v = load("robot_flow")
    action = T(v["grip_in"])
    v.close("grip_normalized", gripper_normalise(action), TOLERANCE)
    v.exact("grip_normalized_binarized", gripper_binarise(gripper_normalise(action)))
    v.exact("grip_libero_cmd", gripper_rlds_to_libero(action))


def test_gripper_by_hand():
    action = f64([7, 0.0], [7, 0.5], [7, 1.0], [7, 0.75])
    before = action.clone()
    assert gripper_normalise(action).tolist() == [[7, -1], [7, 0], [7, 1], [7, 0.5]]
    assert gripper_binarise(gripper_normalise(action)).tolist() == [[7, -1], [7, 0], [7, 1], [7, 1]]
    assert gripper_rlds_to_libero(action).tolist() == [[7, 1], [7, 0], [7, -1], [7, -1]]        # open (1) is -1
    assert gripper_libero_to_rlds(f64([7, 1.0], [7, -1.0], [7, 0.0])).tolist() == [[7, 0], [7, 1], [7, 0.5]]
    assert torch.equal(action, before)


def test_gripper_round_trips():
    decided = torch.cat([randn(2, 3, 6), (randn(2, 3, 1, seed=1) > 0).double()], -1)
    assert torch.equal(gripper_libero_to_rlds(gripper_rlds_to_libero(decided)), decided)
    assert torch.equal(gripper_invert(gripper_invert(decided)), decided)
    assert torch.equal(gripper_invert(decided)[..., :6], decided[..., :6])


def test_rotate_180_by_hand():
    image = torch.arange(6).reshape(2, 3)
    assert rotate_180(image).tolist() == [[5, 4, 3], [2, 1, 0]]
    stack = torch.arange(4 * 3 * 2 * 5, dtype=torch.uint8).reshape(4, 3, 2, 5)                  # (B, 3, H, W)
    assert torch.equal(rotate_180(rotate_180(stack)), stack)
    last = rotate_180(stack.permute(0, 2, 3, 1), axes=(-3, -2))                                 # (B, H, W, 3)
    assert torch.equal(last.permute(0, 3, 1, 2), rotate_180(stack))
    assert np.array_equal(last[0].numpy(), stack[0].permute(1, 2, 0).numpy()[::-1, ::-1])       # openpi's [::-1, ::-1]


# --- flow matching (pi0) ----------------------------------------------------------------------------------------------

def test_vectors_flow():
    v = load("robot_flow")
    x_t, u_t = pi0_flow(T(v["fm_actions"]), T(v["fm_noise"]), T(v["fm_time"]))
    v.close("fm_x_t", x_t, TOLERANCE)
    v.close("fm_u_t", u_t, TOLERANCE)
    v.close("fm_loss", pi0_flow_loss(T(v["fm_v"]), u_t), TOLERANCE)


def test_vectors_sampler():
    v = load("robot_flow")
    times = []

    def velocity(x, time):
        assert time.shape == (4,) and (time == time[0]).all()
        times.append(float(time[0]))
        return x @ T(v["fm_sampler_A"]).T + T(v["fm_sampler_b"]) * time[:, None, None]

    v.close("fm_sampler_x0", pi0_flow_sample(velocity, T(v["fm_noise"])), TOLERANCE)
    v.close("fm_sampler_times", times, TOLERANCE)


def test_vectors_time():
    v = load("robot_flow")
    v.close("time_quantile", pi0_time_quantile(T(v["time_quantile_q"])), TOLERANCE)
    n = 100_000                                                     # moments by the midpoint rule over the quantiles
    time = pi0_time_quantile((torch.arange(n, dtype=torch.float64) + 0.5) / n)
    v.close("time_mean", time.mean(), TOLERANCE)
    v.close("time_var", time.var(correction=0), TOLERANCE)
    for dim in (8, 64):
        v.close(f"pe_{dim}", pi0_time_embedding(T(v["pe_time"]).double(), dim), TOLERANCE)


def test_vectors_attention():
    v = load("robot_flow")
    v.exact("att_2d", att_2d(T(v["att_ar"]), T(v["att_pad"])))


def test_flow_by_hand():
    actions, noise = torch.full((3, 2, 1), 2.0), torch.full((3, 2, 1), 10.0)
    x_t, u_t = pi0_flow(actions, noise, torch.tensor([0.0, 0.25, 1.0]))
    assert x_t[:, 0, 0].tolist() == [2, 0.25 * 10 + 0.75 * 2, 10]   # t = 1 is noise
    assert (u_t == 8).all()
    assert pi0_flow_loss(torch.full_like(u_t, 5), u_t).tolist() == [[[9.0]] * 2] * 3            # (8 - 5)^2, not reduced


@pytest.mark.parametrize("steps", [1, 4, 10])
def test_sampler_walks_back_to_the_actions(steps):
    actions, noise = randn(2, 3, 4), randn(2, 3, 4, seed=1)
    kept = noise.clone()
    _, u_t = pi0_flow(actions, noise, torch.ones(2, dtype=torch.float64))
    torch.testing.assert_close(pi0_flow_sample(lambda x, time: u_t, noise, steps), actions)     # a straight path
    decay = pi0_flow_sample(lambda x, time: x, noise, steps)
    torch.testing.assert_close(decay, noise * (1 - 1 / steps) ** steps)
    assert torch.equal(noise, kept)


def test_sampler_refuses_no_steps():
    with pytest.raises(ValueError, match="steps"):
        pi0_flow_sample(lambda x, time: x, randn(1, 1, 1), 0)


def test_times_follow_the_beta_law():
    torch.testing.assert_close(pi0_time_quantile(f64(0, 1 / 8, 1)), f64(0.001, 0.999 / 4 + 0.001, 1))
    time = pi0_time(4000, torch.Generator().manual_seed(0), torch.float64)
    assert time.shape == (4000,) and time.min() >= 0.001 and time.max() <= 1
    assert torch.equal(time, pi0_time(4000, torch.Generator().manual_seed(0), torch.float64))
    assert pi0_time(2).dtype == torch.float32
    draws = (time.numpy() - 0.001) / 0.999
    assert stats.kstest(draws, stats.beta(1.5, 1).cdf).pvalue > 0.01
    assert stats.kstest(draws, stats.beta(1, 1.5).cdf).pvalue < 1e-6            # the mirrored law is told apart


def test_time_embedding_by_hand():
    # periods 4e-3, 4: a quarter turn of the first, 1/4000 of the second
    expected = f64(1, math.sin(2 * math.pi / 4000), 0, math.cos(2 * math.pi / 4000))
    torch.testing.assert_close(pi0_time_embedding(f64(0.001), 4)[0], expected, atol=1e-12, rtol=0)
    assert pi0_time_embedding(torch.zeros(2, 3), 6).tolist() == [[[0] * 3 + [1] * 3] * 3] * 2
    time = torch.tensor([0.987654])
    single = pi0_time_embedding(time, 64)
    assert single.dtype == torch.float32
    torch.testing.assert_close(single.double(), pi0_time_embedding(time.double(), 64), atol=1e-7, rtol=0)
    with pytest.raises(ValueError, match="7"):
        pi0_time_embedding(time, 7)


def test_attention_by_hand():
    # prefix of two, a suffix block of two, one padded token that would have joined it
    mask = att_2d(torch.tensor([[0, 0, 1, 0, 0]]), torch.tensor([[1, 1, 1, 1, 0]]))
    assert mask.dtype == torch.bool and mask.int().tolist() == [[[1, 1, 0, 0, 0], [1, 1, 0, 0, 0], [1, 1, 1, 1, 0],
                                                                 [1, 1, 1, 1, 0], [0, 0, 0, 0, 0]]]
    everyone = torch.ones(2, 6, dtype=torch.bool)
    assert att_2d(torch.zeros(2, 6), everyone).all()
    assert torch.equal(att_2d(everyone, everyone)[1], torch.ones(6, 6).tril().bool())           # bool starts: causal


# --- gradients --------------------------------------------------------------------------------------------------------

def test_gradients_of_rotations():
    q = torch.nn.functional.normalize(randn(5, 4), dim=-1).requires_grad_()
    assert gradcheck(quat_xyzw_to_axisangle, q)
    assert gradcheck(matrix_to_quat_xyzw, rotations(5).requires_grad_())
    assert gradcheck(matrix_to_rot6d_columns, rotations(5).requires_grad_())
    six = randn(5, 6).requires_grad_()
    assert gradcheck(rot6d_columns_to_matrix, six)
    assert gradcheck(lambda x: rot6d_columns_to_matrix(x, ROT6D_EPS_XVLA), six)
    angles = randn(5, 3).requires_grad_()
    assert gradcheck(euler_extrinsic_xyz_to_matrix, angles)
    assert gradcheck(euler_intrinsic_XYZ_to_matrix, angles)


def test_gradient_at_the_identity_is_finite():
    q = f64([0, 0, 0, 1], [0, 0, 0, -1]).requires_grad_()
    quat_xyzw_to_axisangle(q).sum().backward()
    assert torch.isfinite(q.grad).all()


def test_gradients_of_grippers_and_flow():
    action = randn(2, 3, 4).requires_grad_()
    for function in (gripper_normalise, gripper_invert, gripper_libero_to_rlds):
        assert gradcheck(function, action)
    noise, time = randn(2, 3, 4, seed=1).requires_grad_(), f64(0.2, 0.9).requires_grad_()
    assert gradcheck(pi0_flow, (action, noise, time))
    assert gradcheck(pi0_flow_loss, (action, noise))
    weight = randn(4, 4, seed=2).requires_grad_()
    assert gradcheck(lambda x, w: pi0_flow_sample(lambda y, t: y @ w + t[:, None, None], x, 3), (noise, weight))
    assert gradcheck(pi0_time_quantile, time)
    assert gradcheck(lambda t: pi0_time_embedding(t, 6, 0.5, 4.0), time)


# --- all of them ------------------------------------------------------------------------------------------------------

def test_batch_axes_and_float32_pass_through():
    quaternions = torch.nn.functional.normalize(randn(2, 3, 4), dim=-1)
    cases = [(quat_xyzw_to_axisangle, quaternions), (quat_xyzw_to_wxyz, quaternions), (quat_wxyz_to_xyzw, quaternions),
             (matrix_to_quat_xyzw, rotations(2, 3)), (matrix_to_rot6d_columns, rotations(2, 3)),
             (rot6d_columns_to_matrix, randn(2, 3, 6)), (euler_extrinsic_xyz_to_matrix, randn(2, 3, 3)),
             (euler_intrinsic_XYZ_to_matrix, randn(2, 3, 3)), (gripper_rlds_to_libero, randn(2, 3, 7))]
    for function, x in cases:
        whole = function(x)
        assert whole.dtype == torch.float64 and whole.shape[:2] == (2, 3), function.__name__
        torch.testing.assert_close(whole[1, 2], function(x[1, 2]), msg=function.__name__)
        assert function(x[:0]).shape == (0, *whole.shape[1:]), function.__name__
        single = function(x.float())
        assert single.dtype == torch.float32
        torch.testing.assert_close(single.double(), whole, atol=1e-5, rtol=0, msg=function.__name__)


def test_every_public_function_documents_its_shapes():
    for name, thing in vars(robot).items():
        if callable(thing) and getattr(thing, "__module__", "") == robot.__name__ and not name.startswith("_"):
            assert thing.__doc__ and ("(..." in thing.__doc__ or "(B" in thing.__doc__), name
