"""VoxelNet's encoding: which points count, where cells lie; the strided convolution against torch's."""

import torch
import torch.nn.functional as F

from common.geometry import VoxelGrid
from common.networks.voxelnet import StridedConv, VoxelEncoding

CELLS = VoxelGrid((0.0, -4.0, -1.0), (8.0, 4.0, 3.0), (8, 8, 8))  # 1 x 1 x 0.5 m
SPLIT, COARSE = (2, 2, 2), (4, 4, 4)


def cloud(*rows) -> torch.Tensor:
    """(x, y, z, intensity, earlier) rows."""
    return torch.tensor(rows, dtype=torch.float32)


def test_the_first_points_of_a_cell_are_read_in_any_order():
    encoding = VoxelEncoding(CELLS, SPLIT, 4, 2)
    a, b, c = (0.2, -3.9, -0.9, 50, 0), (0.7, -3.2, -0.6, 10, 1), (0.9, -3.5, -0.8, 90, 0)  # one cell
    other, outside = (5.2, 0.3, 1.1, 7, 1), (9.0, 0, 0, 1, 0)
    full = encoding([cloud(a, b, other, outside)])
    assert full.count == (2,) and full.cell.tolist() == [0, (5 * 8 + 4) * 8 + 4]
    assert full.parent.tolist() == [0, (2 * 4 + 2) * 4 + 2] and full.child.argmax(1).tolist() == [0, 4]
    torch.testing.assert_close(full.mean[0], (cloud(a)[0, :3] + cloud(b)[0, :3]) / 2)
    torch.testing.assert_close(encoding([cloud(other, b, a)]).features, full.features)
    torch.testing.assert_close(encoding([cloud(a, b, c, other)]).features, full.features)  # c: the third point
    moved = encoding([cloud((0.3, *a[1:]), b, other)])
    assert not torch.allclose(moved.features[0], full.features[0]) and torch.equal(moved.features[1], full.features[1])
    empty = encoding([cloud(a).new_zeros(0, 5), cloud(a)])
    assert empty.count == (0, 1) and empty.cell.tolist() == [8 * 8 * 8]


def test_the_strided_convolution_has_its_stride_as_kernel():
    conv = StridedConv(3, 4, SPLIT, COARSE)
    points = torch.cat([torch.rand(60, 3) * 8 - torch.tensor([0, 4, 1.0]), torch.zeros(60, 2)], 1)
    voxels = VoxelEncoding(CELLS, SPLIT, 4, 9)([points])
    rows = torch.randn(len(voxels.cell), 3)
    dense = torch.zeros(8 * 8 * 8, 3).index_copy(0, voxels.cell, rows).view(1, 8, 8, 8, 3).movedim(-1, 1)
    weight = conv.linear.weight.view(2, 2, 2, 4, 3).permute(3, 4, 0, 1, 2)
    bias = torch.einsum("vd,dc->vc", voxels.child, conv.linear.bias.view(8, 4))  # only occupied cells add one
    added = torch.zeros(4 * 4 * 4, 4).index_add(0, voxels.parent, bias).view(1, 4, 4, 4, 4)
    torch.testing.assert_close(conv(rows, voxels), F.conv3d(dense, weight, stride=2).movedim(1, -1) + added)
