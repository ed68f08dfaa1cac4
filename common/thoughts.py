"""A drive in words, by rule: the meta-action of its next 3 s, and the chain of thought that leads to it.

    action = meta_action(dataset.future(i))                  # ("decelerate", "straight"), or None
    text = thought(dataset.boxes(i), action, cot=True)       # what a driving VLM learns to write
    parse_action(text) == action

OccVLA (papers/occvla.md) names such a pipeline and publishes no rule of it: all of these are assumptions.
"""

import math
import re

import numpy as np

from common.nuscenes import Boxes, Future
from common.questions import CLASSES, STATUS
from common.report.planning import Action

LONGITUDINAL = ("keep", "accelerate", "decelerate", "stop")
LATERAL = ("straight", "left", "right", "LC-left", "LC-right")
DISTANCES = (5, 10, 15, 20, 30, 40)  # [m] as the chain of thought rounds them


def meta_action(future: Future, stop: float = 0.5, speed: float = 1.0, turn: float = 15.0,
                shift: float = 1.5) -> Action:
    """The recorded meta-action (longitudinal, lateral); None without the full 3 s. Thresholds: assumption.

    Longitudinal, by speed: at the end (mean of 2-3 s) below `stop` [m/s]: stop; against the first half
    second's by more than `speed` [m/s]: accelerate or decelerate; else keep. Lateral, by the change of
    heading: at least `turn` [degrees]: left or right; else sideways by at least `shift` [m] with a heading
    that ends nearer to where it began than an arc's would: a lane change; else straight. An arc that moves d
    sideways on L turns by 2 d / L; less than d / L is a lane change.
    """
    trajectory, mask = future.trajectory, future.mask  # (6, 2) [m] x right, y forward at 2 Hz; (6,)
    if not mask.all():
        return None
    steps = np.diff(np.concatenate([np.zeros((1, 2)), trajectory.astype(np.float64)]), axis=0)  # (6, 2)
    pace = np.linalg.norm(steps, axis=1) / 0.5  # [m/s]
    change = pace[4:].mean() - pace[0]
    along = "accelerate" if change > speed else "decelerate" if change < -speed else "keep"
    if pace[4:].mean() < stop:
        along = "stop"
    length, left = np.linalg.norm(steps, axis=1).sum(), -float(trajectory[-1, 0])
    moving = steps[pace > 0.5]
    if length < 2 or not len(moving):
        return along, "straight"
    heading = math.atan2(-moving[-1, 0], moving[-1, 1])  # counter-clockwise from straight ahead
    if abs(heading) >= math.radians(turn):
        return along, "left" if heading > 0 else "right"
    if abs(left) >= shift and abs(heading) < abs(left) / length:
        return along, "LC-left" if left > 0 else "LC-right"
    return along, "straight"


def thought_text(ahead: str, distance: int, people: int, action: tuple[str, str], cot: bool = True) -> str:
    """The sentence that is learned and generated. ahead "": nothing there."""
    act = f"action: {action[0]}, {action[1]}"
    if not cot:
        return act
    return f"ahead: {f'{ahead} at {distance} m' if ahead else 'nothing'}; people near: {people}; {act}"


def thought(boxes: Boxes, action: tuple[str, str], cot: bool) -> str:
    """Chain of thought by rule: the nearest annotated object in the car's own corridor (4 m wide, to 40 m
    ahead, at least one LiDAR point) with its status and rounded distance; how many people and riders are
    within 20 m ahead (at most 9); the meta-action.
    """
    x, y = boxes.center[:, 0], boxes.center[:, 1]
    seen = (boxes.labels > 0) & (boxes.num_lidar_pts > 0)
    people = np.array([name.startswith("human") or attribute == "cycle.with_rider"
                       for name, attribute in zip(boxes.names, boxes.attributes, strict=True)], bool)
    near = min(9, int((seen & people & (x > 0) & (np.hypot(x, y) < 20)).sum()))
    corridor = np.flatnonzero(seen & (x > 2) & (x < 40) & (np.abs(y) < 2))
    if not len(corridor):
        return thought_text("", 0, near, action, cot)
    k = corridor[x[corridor].argmin()]
    name = f"{STATUS.get(boxes.attributes[k], '')} {CLASSES[boxes.labels[k] - 1]}".strip()
    return thought_text(name, min(DISTANCES, key=lambda d: abs(d - x[k])), near, action, cot)


def parse_action(text: str) -> Action:
    """Generated text -> its meta-action; None if it does not end in one."""
    found = re.search(rf"action: ({'|'.join(LONGITUDINAL)}), ({'|'.join(LATERAL)})$", text.strip())
    return (found[1], found[2]) if found else None
