"""PointAttN (arXiv 2203.08485): completion of a partial point cloud by attention, rebuilt small.

Farthest-point levels with cross-attention (GDP) and self-attention (SFA), a pooled shape code, a coarse cloud
from it, and offsets around a subset of both. Clouds are centred and scaled by the caller.
Letters: B batch, n m points.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from common.demonstrations import Demonstrations
from common.engine import Session
from common.files import InputError
from common.geometry import farthest_from, farthest_point_sample, largest_cluster
from common.networks.transformer import Attention, Block, mlp

# points of a partial cloud and of its completion, by common.networks.pi0.SIZES; PointAttN: 2048
POINTS = {"tiny": 128, "libero": 2048, "paper": 2048}


class CrossBlock(nn.Module):
    """Pre-norm cross-attention to another set, then a transformer layer."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.norm_x, self.norm_y = nn.LayerNorm(width), nn.LayerNorm(width)
        self.cross = Attention(width, heads)
        self.block = Block(width, heads)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """x (B, n, C), y (B, m, C) -> (B, n, C)."""
        return self.block(x + self.cross(self.norm_x(x), self.norm_y(y)))


class PointAttN(nn.Module):
    """Partial cloud (B, n, 3) -> coarse (B, points / 4, 3) and dense (B, points, 3) completions."""

    def __init__(self, points: int, width: int = 64, heads: int = 4):
        super().__init__()
        self.points, self.coarse = points, max(points // 4, 8)
        self.embed = mlp(3, width, width)
        self.gdp, self.sfa = (nn.ModuleList(CrossBlock(width, heads) for _ in range(2)) for _ in range(2))
        self.code = mlp(2 * width, 2 * width, 3 * self.coarse)
        self.seed, self.refine = mlp(3 + 2 * width, width, width), CrossBlock(width, heads)
        self.offset = mlp(width, width, 12)  # four points around each

    def forward(self, partial: Tensor) -> tuple[Tensor, Tensor]:
        """partial (B, n, 3) -> coarse (B, points / 4, 3), dense (B, points, 3)."""
        where, x = partial, self.embed(partial)
        for cross, own in zip(self.gdp, self.sfa):
            keep = farthest_point_sample(where, max(where.shape[1] // 4, 4))[..., None]
            fewer = x.gather(1, keep.expand(-1, -1, x.shape[-1]))
            where, x = where.gather(1, keep.expand(-1, -1, 3)), cross(fewer, x)
            x = own(x, x)
        code = torch.cat([x.amax(1), x.mean(1)], -1)  # (B, 2 C)
        coarse = self.code(code).unflatten(-1, (self.coarse, 3))
        both = torch.cat([coarse, partial], 1)
        seeds = both.gather(1, farthest_point_sample(both, self.coarse)[..., None].expand(-1, -1, 3))
        y = self.seed(torch.cat([seeds, code[:, None].expand(-1, self.coarse, -1)], -1))
        offset = self.offset(self.refine(y, x)).unflatten(-1, (4, 3))
        return coarse, (seeds[:, :, None] + 0.3 * torch.tanh(offset)).flatten(1, 2)

    @torch.no_grad()
    def complete(self, points: np.ndarray, eye: np.ndarray) -> np.ndarray:
        """Observed points (n, 3) [m] -> the same and their completion. eye (3,) is not needed."""
        center = points.mean(0)
        scale = max(float(np.linalg.norm(points - center, axis=1).max()), 1e-3)
        # points come view by view, row by row: taken evenly
        chosen = points[np.linspace(0, len(points) - 1, self.points).astype(int)]
        weight = next(self.parameters())
        dense = self(torch.from_numpy((chosen - center) / scale).to(weight)[None])[1][0].cpu().numpy()
        return np.concatenate([points, dense * scale + center])


def chamfer(a: Tensor, b: Tensor) -> Tensor:
    """(B, n, 3), (B, m, 3) -> () mean distance to the nearest point, both ways."""
    apart = torch.cdist(a, b)
    return apart.amin(2).mean() + apart.amin(1).mean()


def pretrain(args: Any, cfg: Any, out: Path, demos: Demonstrations, points: int) -> None:
    """Train a PointAttN of `points` on the demonstrations' objects, by the Chamfer distance of both outputs.

    Where their shapes are not known, a trained network must be in `out` already, else InputError.
    """
    if not demos.known_shapes:
        if not (out / "latest.json").is_file():
            raise InputError(f"--completion pointattn: {demos.root}'s shapes are not known here; "
                             f"use --completion mirror, or copy a tabletop run's folder completion to {out}")
        return
    run = Session(args, cfg, out, samples=len(demos), batch=16, steps=400, source={"root": demos.root},
                  seed=args.seed + 4)
    if run.finished:
        return
    net = PointAttN(points).to(run.device)
    optimizer = torch.optim.AdamW(net.parameters(), 1e-3)
    model = run.attach(net, optimizer)
    for step, batch in run.batches(lambda i, rng: demos.object_cloud(i, rng, points)):
        coarse, dense = model(batch["partial"])
        terms = {"coarse": chamfer(coarse, batch["full"]), "dense": chamfer(dense, batch["full"])}
        optimizer.zero_grad(set_to_none=True)
        sum(terms.values()).backward()
        optimizer.step()
        run.log(step, terms, 1e-3)


def mirror_completion(points: np.ndarray, eye: np.ndarray) -> np.ndarray:
    """Completion without a network, ours: observed (n, 3) [m] -> the same and their mirror image (2n, 3).

    The mirror plane is normal to the view ray from `eye` (3,), half the cloud's lateral size behind its
    front: an object is about as deep as it is wide.
    """
    center = points.mean(0)
    ray = (center - eye) / max(np.linalg.norm(center - eye), 1e-9)
    along = (points - center) @ ray
    lateral = np.linalg.norm((points - center) - along[:, None] * ray, axis=1)
    plane = np.quantile(along, 0.05) + np.quantile(lateral, 0.9)
    return np.concatenate([points, points + 2 * (plane - along)[:, None] * ray])


def completion_points(masks: np.ndarray, valid: np.ndarray, order: np.ndarray, points: np.ndarray,
                      eyes: np.ndarray, complete: Callable, most: int, objects: int,
                      queries: int) -> tuple[np.ndarray, np.ndarray]:
    """3DVLA 3.3: P_comp (objects queries, 3), valid: back-project, cluster, complete, keep the farthest.

    masks (V, n, h4, w4) bool of n objects, valid (n,), order (n,): least certain first, points (V, h4, w4, 3)
    [m] of the cells (NaN: no depth), eyes (V, 3): cameras. complete(cloud, eye) -> dense cloud; most: points.
    What lies below all that is measured around the object, or far outside it, is not chosen (ours).
    """
    around = points[np.isfinite(points).all(-1)]  # (m, 3)
    out, keep, slot = np.zeros((objects * queries, 3), np.float32), np.zeros(objects * queries, bool), 0
    for n in order:
        clouds = [points[v][masks[v, n]] for v in range(len(masks))]
        clouds = [c[np.isfinite(c).all(1)] for c in clouds]
        cloud, v = np.concatenate(clouds), int(np.argmax([len(c) for c in clouds]))
        if valid[n] and slot < objects and len(cloud) >= 3:
            cloud = largest_cluster(cloud[:: max(1, len(cloud) // most)].astype(np.float64))
            span = slice(slot * queries, (slot + 1) * queries)
            dense, middle = complete(cloud, eyes[v].astype(np.float64)), np.median(cloud, 0)
            near = around[np.linalg.norm(around[:, :2] - middle[:2], axis=1) < 0.15, 2]  # [m] heights
            near = near if len(near) else cloud[:, 2]
            apart, reach = (np.linalg.norm(x - middle, axis=1) for x in (dense, cloud))
            kept = dense[(dense[:, 2] >= np.quantile(near, 0.02) - 0.005) & (apart <= 2.5 * np.median(reach))]
            dense = kept if len(kept) >= queries else dense[np.argsort(apart)[:queries]]
            out[span] = farthest_from(dense, cloud, 0.4, queries)  # share: assumption
            keep[span], slot = True, slot + 1
    return out, keep
