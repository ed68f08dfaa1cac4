"""VoxelNet's voxel feature encoding (Zhou and Tuzel, arXiv 1711.06396), and a strided sparse convolution.

Points are grouped by cell of a grid; a small network and a maximum over the points give one row per occupied
cell (`VoxelEncoding`). Rows then meet in a coarser, dense grid (`StridedConv`). What happens at rows costs
what is occupied.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from common.geometry import VoxelGrid


class Groups(NamedTuple):
    """The P points inside a grid, ordered by cell; its V occupied cells, ascending."""

    order: Tensor  # (P,) long: the points' places in the cloud
    row: Tensor  # (P,) long: which of the V cells
    rank: Tensor  # (P,) long: index of the point among its cell's points, from 0
    cell: Tensor  # (V,) long: C-order index of the cell in the grid
    size: Tensor  # (V,) long: number of its points


class Voxels(NamedTuple):
    """Occupied cells of a batch, V rows."""

    cell: Tensor  # (V,) long: C-order index in the batch's cells (B, X, Y, Z)
    parent: Tensor  # (V,) long: the same of the coarse cell around it, in (B, X', Y', Z')
    child: Tensor  # (V, D) float: which of the D cells of its coarse cell, one-hot
    features: Tensor  # (V, C)
    mean: Tensor  # (V, 3) [m] mean of its points
    count: tuple[int, ...]  # rows of each sample


def flat_index(index: Tensor, shape: tuple[int, int, int]) -> Tensor:
    """index (..., 3) -> (...) C-order index in a grid of `shape`."""
    return (index[..., 0] * shape[1] + index[..., 1]) * shape[2] + index[..., 2]


def group_points(points: Tensor, grid: VoxelGrid) -> Groups:
    """Groups points (M, >= 3) [m] by cell, within a cell in the order given.

    On the meta device points cannot be counted: each is its own cell, an upper bound.
    """
    if points.is_meta:
        row = torch.arange(len(points), device="meta")
        return Groups(row, row, row, row, row)
    index, inside = grid.index(points[:, :3])
    cell = torch.where(inside, flat_index(index, grid.shape), -1).int()
    cell, order = cell.sort(stable=True)
    outside = int((~inside).sum())
    cell, row, size = cell[outside:].long().unique_consecutive(return_inverse=True, return_counts=True)
    start = size.cumsum(0) - size
    return Groups(order[outside:], row, torch.arange(len(row), device=row.device) - start[row], cell, size)


class VoxelEncoding(nn.Module):
    """The points of a cell -> one feature: a small network at each point, then the maximum.

    A point gives its position, intensity, offset from the cell's centre and from the mean of the cell's
    points, and whether it is of an earlier sweep. Only the first `most` points of a cell are read.
    """

    def __init__(self, grid: VoxelGrid, split: tuple[int, int, int], channels: int, most: int):
        """split: cells of `grid` per coarse cell along x, y, z."""
        super().__init__()
        self.grid, self.split, self.coarse, self.most = grid, split, grid.coarsen(split), most
        self.point = nn.Sequential(nn.Linear(11, channels), nn.LayerNorm(channels), nn.ReLU(),
                                   nn.Linear(channels, channels))

    def forward(self, clouds: list[Tensor]) -> Voxels:
        """clouds: one (M, 5) per sample, x, y, z [m], intensity 0..255, 1 if of an earlier sweep."""
        parts = []
        for b, points in enumerate(clouds):
            groups = group_points(points, self.grid)
            index = torch.stack(torch.unravel_index(groups.cell, self.grid.shape), -1)  # (V, 3)
            places = self.places(b, groups.cell, index)
            parts.append((*places, *self.encode(points[groups.order], index, groups)))
        return Voxels(*(torch.cat(part) for part in zip(*parts)), tuple(len(part[0]) for part in parts))

    def encode(self, points: Tensor, index: Tensor, groups: Groups) -> tuple[Tensor, Tensor]:
        """points (P, 5) ordered by cell, index (V, 3) of the cells -> features (V, C), mean (V, 3)."""
        if points.is_meta:
            return self.point(points.new_empty(len(points), 11)), points[:, :3]
        kept, size = groups.rank < self.most, groups.size.clamp_max(self.most)
        points, row = points[kept], groups.row[kept]
        xyz, grid = points[:, :3], self.grid
        mean = xyz.new_zeros(len(size), 3).index_add(0, row, xyz) / size[:, None]
        step, lower = xyz.new_tensor(grid.voxel_size), xyz.new_tensor(grid.lower)
        centre, extent = lower + (index + 0.5) * step, step * step.new_tensor(grid.shape)
        position = 2 * (xyz - lower) / extent - 1
        offsets = [(xyz - centre[row]) / step, (xyz - mean[row]) / step]
        each = self.point(torch.cat([position, points[:, 3:4] / 255, *offsets, points[:, 4:]], -1)).float()
        if not len(size):
            return each, mean
        return torch.segment_reduce(each, "max", lengths=size), mean

    def places(self, b: int, cell: Tensor, index: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Cells (V,) of sample b, their index (V, 3) -> cell and parent in the batch, child one-hot."""
        split = cell.new_tensor(self.split)
        child = flat_index(index % split, self.split)
        onehot = (child[:, None] == torch.arange(math.prod(self.split), device=cell.device)).float()
        parent = flat_index(index // split, self.coarse.shape) + b * math.prod(self.coarse.shape)
        return cell + b * math.prod(self.grid.shape), parent, onehot


class StridedConv(nn.Module):
    """Rows -> coarse cells: the sparse convolution whose kernel is its stride. Each of the D places in a
    coarse cell has its own weights, and only occupied cells are multiplied."""

    def __init__(self, c_in: int, c_out: int, split: tuple[int, int, int], shape: tuple[int, int, int]):
        """split: cells per coarse cell; shape: of the coarse grid."""
        super().__init__()
        self.shape, self.c_out = shape, c_out
        self.linear = nn.Linear(c_in, c_out * math.prod(split))

    def forward(self, rows: Tensor, voxels: Voxels) -> Tensor:
        """rows (V, c_in) -> (B, X', Y', Z', c_out)."""
        every = self.linear(rows).unflatten(1, (-1, self.c_out))  # (V, D, c_out)
        own, B = (every * voxels.child[..., None]).sum(1), len(voxels.count)
        grid = own.new_zeros(B * math.prod(self.shape), self.c_out).index_add(0, voxels.parent, own)
        return grid.view(B, *self.shape, self.c_out)
