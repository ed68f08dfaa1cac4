"""The reference vectors of ../shared/vectors: loading, comparing, and the count of cases that passed.

A test says `v = load("rayiou")` (skips, with the reason shown, where the set is absent) and then compares what a public
function returns with a key of the set: `v.exact("s0_gt_ray_label", labels)` or `v.close("rayiou", score, atol=1e-3)`.
Each comparison that holds is one case passed. Sets or parts of sets that nothing here uses are listed in NOT_USED.
"""

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

SHARED = Path(__file__).parents[1].parent / "shared"
PASSED: Counter[str] = Counter()        # set -> cases passed in this session

# Behaviour that no method and no protocol of ours has: not reimplemented for a test's sake.
NOT_USED = (
    "bevpool_lss",
    "points_match_loss: ball query (bq_idx_*), chamfer distance (ch_*), FPS on a distance matrix (fps_mmcv_*), iou",
    "semantickitti_ssc: bits_out, learning_map_inv (nothing here writes a submission)",
    "ssc_losses: context prior (crp_*), KL_sep",
    "render_curves_rope: sfc16_hilbert_batched (a dummy)",
    "nuscenes_geometry: slerp*, quat_mul_ab, box_*, vp_*, inst_* (the devkit does it)",
    "points_match_loss: DETR's softmax cost (*_detr_*), Mask2Former's matching costs (m2f_batch_*)",
    "voxel_traversal: the order of a path",
    "robot_flow: rotations but axis-angle, grippers, openvla_bin_*, the sampler, time_mean, time_var, att_2d",
    "planning_openloop: *_agentdriver_* (its variants of UniAD's and ST-P3's rules)",
    "language_metrics: drivelm_match",
)


class Vectors:
    """One set: indexing gives its arrays (or, for the json set, its objects)."""

    def __init__(self, name: str, content):
        self.name, self.content = name, content

    def __getitem__(self, key: str):
        return self.content[key]

    def __contains__(self, key: str) -> bool:
        return key in self.content

    def passed(self, cases: int = 1) -> None:
        """Counts cases that a test has compared by other means than the two methods below."""
        PASSED[self.name] += cases

    def exact(self, key: str, actual) -> None:
        """Same shape, same values as this key."""
        expected, actual = np.asarray(self[key]), np.asarray(actual)
        assert actual.shape == expected.shape, f"{self.name}/{key}: shape {actual.shape}, expected {expected.shape}"
        wrong = int((actual != expected).sum())
        assert wrong == 0, f"{self.name}/{key}: {wrong} of {expected.size} values differ"
        self.passed()

    def close(self, key: str, actual, atol: float) -> None:
        """Same shape as this key, nowhere farther from it than atol (no relative part), NaN only where it has NaN."""
        expected, actual = np.asarray(self[key]), np.asarray(actual)
        assert actual.shape == expected.shape, f"{self.name}/{key}: shape {actual.shape}, expected {expected.shape}"
        assert (np.isnan(actual) == np.isnan(expected)).all(), f"{self.name}/{key}: NaN in other places"
        worst = float(np.nanmax(np.abs(actual - expected.astype(np.float64)), initial=0.0))
        assert worst <= atol, f"{self.name}/{key}: off by {worst:.3g}, allowed {atol:.3g}"
        self.passed()


def load(name: str) -> Vectors:
    """The set `name`, a .npz or .json of ../shared/vectors; skips the calling test where it is absent."""
    for path in (SHARED / "vectors" / f"{name}.npz", SHARED / "vectors" / f"{name}.json"):
        if path.is_file():
            content = json.loads(path.read_text()) if path.suffix == ".json" else dict(np.load(path))
            return Vectors(name, content)
    pytest.skip(f"reference vectors {name} are not in ../shared/vectors")
