"""The tabletop world: a 7-DoF gripper, ten kinds of objects, twelve tasks in words, scripted experts, perturbations.

    python -m data.tabletop --out DIR --seed 0                       # 30 demonstrations of each task, resumable
    python -m data.tabletop --out DIR --seed 0 --demos 4 --tasks lift_cube stack_cubes

CONVENTIONS   LIBERO's, so that one policy interface fits both (common.robot):
    base       the frame of everything: x from the robot to the agent-view camera, y to the robot's left, z up, [m]. The
               table's top is at z = 0.90 and the robot stands at x = -0.62, as in LIBERO's tabletop scenes.
    action     7 numbers in [-1, 1]: translation x 0.05 m, axis-angle x 0.5 rad (both in base axes), gripper -1 open,
               +1 close; 20 Hz. The commanded delta is reached to the share RESPONSE in one step.
    state      8 numbers: position of the grip site [m], axis-angle [rad], the two finger joints q, -q [m].
    images     as LIBERO's policies are fed: upright but mirrored (robosuite's raw buffer turned by 180 degrees). K
               has a negative focal length in x for that, so `project` and `unproject` hold without a special case.
               The cameras have LIBERO's intrinsics and, for the agent view, its pose.
    instances  0 = table, wall and robot; 1 + row of `things` else.

CONTACT       Kinematic: nothing has a mass or a speed.
    * Fingers that touch a thing from the side push it (and what it touches), from above they stop on it; heavy things
      (receptacles, cabinet) are not pushed and stop what is carried into them; the table stops everything.
    * Closing fingers centre what lies between them; when both touch it, it is held and moves rigidly with the hand.
    * Opened fingers let go: the thing turns upright and sinks to what lies under its centre: the table, a flat top, the
      inside of a receptacle. On a rim it slides to the nearer side. Balls support nothing.
    * The drawer moves along x: pulled by its fin, or pushed.

PERTURBATIONS  LIBERO-Plus's seven, each at levels 1..5: camera (agent view only), robot (start pose), language
    (held-out paraphrases), light, background, noise (agent view only; motion, Gaussian and zoom blur, fog, glass),
    layout (more things, wider places, from level 3 a carton between camera and target). Their magnitudes are ours.
    `occluded` is ours: a carton hides 40 to 90 % of the target from the agent view at the start.
    `hard` is in the style of RoboTwin 2.0's randomised setting: background, light, clutter, table height +-3 cm,
    unseen words, at once.

FILES         <out>/world.json; per demonstration <out>/demos/<task>/<number>/: episode.npz (actions: the expert's
    answer to what is seen; executed: that plus noise, so that the data also show recoveries; states, K, T_base_cam,
    poses of all things, words) and one PNG strip per camera, frames under each other: <camera>_rgb, <camera>_depth
    (uint16, 0.1 mm, 0 = none), <camera>_instance (uint8). episode.npz is written last: a folder with it is whole.
"""

import argparse
import multiprocessing
import os
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
from tqdm import tqdm

from common.files import InputError, end_with_parent, exit_on_input_error, is_empty, read_json, write_json
from common.demonstrations import write_episode
from data.render import (BOX, CLOTH, CONCRETE, CYLINDER, ELLIPSOID, PLAIN, STRIPES, WOOD, Light, Primitives, Scene,
                         camera_rays, develop, draw, noise, shade)

# the renderer is made for streets (nearest surface 0.2): it sees this world ten times as large
SCALE = 10.0
TABLE = 0.90                # [m] height of the table's top in the base frame
ROBOT = np.array([-0.62, 0.0, 0.0])
CAMERAS = ("agentview", "eye_in_hand")
FOCAL = {"agentview": 309.02, "eye_in_hand": 166.81}      # [px] of a 256 px image: LIBERO's
STEP_M, STEP_RAD, RESPONSE = 0.05, 0.5, 0.5
OPEN, GRIP_SPEED = 0.04, 0.016                            # [m] finger joint when open; its change in one step
PAD, TIP = 0.009, 0.012                                   # [m] radius of a finger pad; tip below the grip site
REACH = np.array([[-0.40, -0.38, 0.0], [0.32, 0.38, 0.45]])   # [m] of the grip site above the table
START = np.array([-0.20, 0.0, 0.24])                      # [m] above the table
DOWN = np.diag([1.0, -1.0, -1.0])                         # the hand's axes when it points down: z along the fingers
CLIMB = 0.012                                             # [m] steps up to this height are slid over
DRAWER = 0.12                                             # [m] travel
GOAL_STEPS = 80                     # control steps a policy has for each of a task's goals

COLORS = {"red": (0.55, 0.03, 0.03), "blue": (0.03, 0.08, 0.50), "green": (0.03, 0.30, 0.05),
          "yellow": (0.65, 0.45, 0.02), "white": (0.75, 0.74, 0.70), "purple": (0.22, 0.04, 0.32),
          "orange": (0.65, 0.18, 0.01), "grey": (0.28, 0.28, 0.30), "brown": (0.20, 0.09, 0.035),
          "black": (0.02, 0.02, 0.022)}


# --- kinds of things --------------------------------------------------------------------------------------------------

class Part(NamedTuple):
    """A primitive in its thing's frame (origin at the bottom's centre, z up)."""

    kind: int
    center: tuple[float, float, float]          # [m]
    half: tuple[float, float, float]            # [m]
    color: str | None = None                    # None: the thing's
    yaw: float = 0.0                            # [rad]
    taper: tuple[float, float] = (0.0, 0.0)
    material: int = PLAIN


class Kind(NamedTuple):
    """What contact knows of a kind: half extents in plan and height [m]; round or rectangular; light enough to move."""

    parts: tuple[Part, ...]
    half: tuple[float, float]
    height: float
    round: bool = False
    light: bool = True
    inner: tuple[float, float] | None = None    # half extents of a receptacle's inside, None: no receptacle
    floor: float = 0.0                          # [m] height of its floor
    flat: bool = True                           # its top can carry something


def _box(half: tuple[float, float, float], **more) -> Part:
    return Part(BOX, (0, 0, half[2]), half, **more)


def _tube(radius: float, bottom: float, top: float, **more) -> Part:
    return Part(CYLINDER, (0, 0, (bottom + top) / 2), (radius, radius, (top - bottom) / 2), **more)


def _ring(radius: float, height: float, walls: int = 12) -> tuple[Part, ...]:
    turns = [2 * np.pi * k / walls for k in range(walls)]
    side = radius * np.tan(np.pi / walls) * 1.05
    return tuple(Part(BOX, (radius * np.cos(a), radius * np.sin(a), height / 2), (0.003, side, height / 2), yaw=a)
                 for a in turns)


def _walls(x: float, y: float, height: float, thick: float, **more) -> tuple[Part, ...]:
    """Four upright walls around an inside of half extents x, y."""
    return tuple(Part(BOX, (sx * (x + thick), sy * (y + thick), height / 2),
                      (thick if sx else x + 2 * thick, thick if sy else y, height / 2), **more)
                 for sx, sy in ((1, 0), (-1, 0), (0, 1), (0, -1)))


KINDS = {
    "cube": Kind((_box((0.024, 0.024, 0.024)),), (0.024, 0.024), 0.048),
    "block": Kind((_box((0.028, 0.024, 0.020), material=STRIPES),), (0.028, 0.024), 0.040),
    "carton": Kind((_box((0.028, 0.055, 0.085), material=CLOTH),), (0.028, 0.055), 0.17),
    "can": Kind((_tube(0.028, 0.004, 0.086), _tube(0.0265, 0, 0.09, color="grey"),
                 _tube(0.0285, 0.03, 0.06, color="white")), (0.0285, 0.0285), 0.09, round=True),
    "ball": Kind((Part(ELLIPSOID, (0, 0, 0.028), (0.028, 0.028, 0.028)),), (0.028, 0.028), 0.056, round=True,
                 flat=False),
    "bottle": Kind((_tube(0.026, 0, 0.085), _tube(0.026, 0.085, 0.115, taper=(0.58, 0.58)), _tube(0.011, 0.115, 0.135),
                    _tube(0.013, 0.135, 0.15, color="white"), _tube(0.0265, 0.025, 0.06, color="white")),
                   (0.026, 0.026), 0.15, round=True, flat=False),
    "mug": Kind((_tube(0.030, 0, 0.066), _tube(0.026, 0.062, 0.0665, color="black"),
                 Part(BOX, (0.040, 0, 0.035), (0.012, 0.004, 0.020))), (0.030, 0.030), 0.0665, round=True, flat=False),
    "bowl": Kind((*_ring(0.062, 0.045), _tube(0.062, 0, 0.006)), (0.065, 0.065), 0.045, round=True, light=False,
                 inner=(0.056, 0.056), floor=0.006),
    "plate": Kind((_tube(0.072, 0, 0.007), _tube(0.050, 0, 0.0075, color="white")), (0.072, 0.072), 0.0075, round=True,
                  light=False, inner=(0.072, 0.072), floor=0.0075),
    "basket": Kind((*_walls(0.078, 0.068, 0.058, 0.004, material=WOOD), _box((0.078, 0.068, 0.004))), (0.086, 0.076),
                   0.058, light=False, inner=(0.078, 0.068), floor=0.008),
    "square": Kind((_box((0.045, 0.045, 0.001)),), (0.045, 0.045), 0.002, light=False, inner=(0.045, 0.045), floor=0.0),
    "cabinet": Kind((Part(BOX, (0, 0.098, 0.055), (0.08, 0.006, 0.055), material=WOOD),
                     Part(BOX, (0, -0.098, 0.055), (0.08, 0.006, 0.055), material=WOOD),
                     Part(BOX, (-0.074, 0, 0.055), (0.006, 0.092, 0.055), material=WOOD),
                     Part(BOX, (0, 0, 0.106), (0.08, 0.104, 0.006), material=WOOD),
                     Part(BOX, (0, 0, 0.004), (0.08, 0.104, 0.004), material=WOOD)),
                    (0.08, 0.104), 0.112, light=False),
    # the drawer's origin is the cabinet's; its front moves from x = 0.08 to 0.20
    "drawer": Kind((Part(BOX, (0.076, 0, 0.050), (0.006, 0.090, 0.042)),
                    Part(BOX, (-0.044, 0, 0.045), (0.004, 0.086, 0.035)),
                    Part(BOX, (0.014, 0.084, 0.045), (0.058, 0.004, 0.035)),
                    Part(BOX, (0.014, -0.084, 0.045), (0.058, 0.004, 0.035)),
                    Part(BOX, (0.014, 0, 0.013), (0.058, 0.084, 0.003)),
                    Part(BOX, (0.110, 0, 0.055), (0.028, 0.006, 0.030), color="black")),
                   (0.07, 0.09), 0.092, light=False, inner=(0.05, 0.078), floor=0.016),
}
FIN = (0.110, 0.006, 0.085)        # [m] the drawer's fin: x of its middle, half thickness, top
SYNONYMS = {"cube": "die", "block": "brick", "can": "tin", "ball": "sphere", "bottle": "flask", "mug": "cup",
            "bowl": "dish", "plate": "saucer", "basket": "crate", "drawer": "compartment", "square": "marked area"}


class Thing:
    """One thing of a scene: its kind, name ("red cube") and pose. position is its bottom's centre above the table."""

    def __init__(self, name: str, position, yaw: float = 0.0):
        self.name = name
        self.color, self.what = name.split()[-2] if " " in name else "brown", name.split()[-1]
        self.kind = KINDS[self.what]
        self.position = np.array([*position[:2], position[2] if len(position) > 2 else 0.0], float)     # (3,)
        c, s = np.cos(yaw), np.sin(yaw)
        self.rotation = np.array([[c, -s, 0], [s, c, 0], [0, 0, 1.0]])

    @property
    def yaw(self) -> float:
        return float(np.arctan2(self.rotation[1, 0], self.rotation[0, 0]))

    @property
    def top(self) -> float:
        return float(self.position[2] + self.kind.height)

    def extent(self, direction: np.ndarray) -> float:
        """Half width [m] along a unit direction (2,) of the plan."""
        if self.kind.round:
            return self.kind.half[0]
        local = np.abs(self.rotation[:2, :2].T @ direction)
        return float(local @ self.kind.half)

    def gap(self, xy: np.ndarray) -> tuple[float, np.ndarray]:
        """Signed distance [m] from a point of the plan to the outline (< 0 inside), and the unit normal outward."""
        d = xy - self.position[:2]
        if self.kind.round:
            far = np.hypot(*d)
            return float(far - self.kind.half[0]), d / far if far > 1e-9 else np.array([1.0, 0.0])
        R = self.rotation[:2, :2]
        local, half = R.T @ d, np.array(self.kind.half)
        over = np.abs(local) - half
        if (over <= 0).all():
            axis = int(over.argmax())
            normal = np.zeros(2)
            normal[axis] = np.sign(local[axis]) or 1.0
            return float(over[axis]), R @ normal
        out = np.maximum(over, 0) * np.sign(local)
        far = np.hypot(*out)
        return float(far), R @ (out / far)


# --- tasks ------------------------------------------------------------------------------------------------------------

class Task(NamedTuple):
    """One task. goals are reached in order: ("lift", a) | ("in", a, b) | ("stack", a, b) | ("beside", a, b) | ("push",
    a, b) | ("open",) | ("close",); a, b are names of things. words: the instruction, two more for training.
    """

    goals: tuple[tuple[str, ...], ...]
    things: tuple[str, ...]
    words: tuple[str, str, str]
    # levels 1..5: known words, new order, new fillers, synonyms, all at once
    held_out: tuple[str, str, str, str, str]


def _words(form: str, a: str = "", b: str = "") -> tuple[tuple[str, str, str], tuple[str, str, str, str, str]]:
    """Sentences of a form of task with its things' names: three for training, five held out."""
    say = {
        "lift": (("pick up the {a}", "lift the {a}", "grab the {a}"),
                 ("lift up the {a}", "the {a} , pick it up", "please pick up the {a} for me", "raise the {A}",
                  "could you take hold of the {A} and raise it from the table")),
        "in": (("put the {a} in the {b}", "place the {a} in the {b}", "pick up the {a} and put it in the {b}"),
               ("pick up the {a} and place it in the {b}", "in the {b} put the {a}",
                "please put the {a} in the {b} for me", "set the {A} inside the {B}",
                "could you take the {A} and leave it inside the {B}")),
        "on": (("put the {a} on the {b}", "place the {a} on the {b}", "pick up the {a} and put it on the {b}"),
               ("pick up the {a} and place it on the {b}", "on the {b} put the {a}",
                "please put the {a} on the {b} for me", "set the {A} onto the {B}",
                "could you take the {A} and leave it on top of the {B}")),
        "stack": (("stack the {a} on the {b}", "put the {a} on top of the {b}", "place the {a} on the {b}"),
                  ("place the {a} on top of the {b}", "on top of the {b} stack the {a}",
                   "please stack the {a} on the {b} for me", "pile the {A} onto the {B}",
                   "could you build a tower with the {A} above the {B}")),
        "push": (("push the {a} to the {b}", "slide the {a} to the {b}", "move the {a} to the {b}"),
                 ("slide the {a} on the {b}", "to the {b} push the {a}", "please push the {a} to the {b} for me",
                  "shove the {A} onto the {B}", "could you shift the {A} over until it covers the {B}")),
        "beside": (("put the {a} next to the {b}", "place the {a} next to the {b}",
                    "pick up the {a} and put it next to the {b}"),
                   ("move the {a} next to the {b}", "next to the {b} put the {a}",
                    "please put the {a} next to the {b} for me", "set the {A} beside the {B}",
                    "could you leave the {A} standing near the {B}")),
        "open": (("open the {a}", "pull the {a} open", "open up the {a}"),
                 ("pull open the {a}", "the {a} , open it", "please open the {a} for me", "slide out the {A}",
                  "could you draw the {A} all the way out")),
        "close": (("close the {a}", "push the {a} shut", "shut the {a}"),
                  ("push the {a} close", "the {a} , close it", "please close the {a} for me", "slide in the {A}",
                   "could you press the {A} back in")),
        "sort": (("put each cube on the plate of its color", "place each cube on the plate of its color",
                  "sort each cube on the plate of its color"),
                 ("pick up each cube and put it on the plate of its color", "on the plate of its color put each cube",
                  "please put each cube on the plate of its color for me", "sort every die by color onto the saucer",
                  "could you match every die with the saucer that has the same color")),
    }[form]

    def other(name: str) -> str:
        return " ".join(SYNONYMS.get(word, word) for word in name.split())

    return tuple(tuple(s.format(a=a, b=b, A=other(a), B=other(b)) for s in group) for group in say)


TASKS = {
    "lift_cube": Task((("lift", "red cube"),), ("red cube", "blue cube"), *_words("lift", "red cube")),
    "can_in_basket": Task((("in", "green can", "basket"),), ("green can", "basket"),
                          *_words("in", "green can", "basket")),
    "ball_in_bowl": Task((("in", "orange ball", "white bowl"),), ("orange ball", "white bowl"),
                         *_words("in", "orange ball", "white bowl")),
    "mug_on_plate": Task((("in", "purple mug", "red plate"),), ("purple mug", "red plate"),
                         *_words("on", "purple mug", "red plate")),
    "stack_cubes": Task((("stack", "blue cube", "green cube"),), ("blue cube", "green cube"),
                        *_words("stack", "blue cube", "green cube")),
    "push_block": Task((("push", "yellow block", "black square"),), ("yellow block", "black square"),
                       *_words("push", "yellow block", "black square")),
    "open_drawer": Task((("open",),), ("cabinet", "white drawer"), *_words("open", "drawer")),
    "close_drawer": Task((("close",),), ("cabinet", "white drawer"), *_words("close", "drawer")),
    "cube_in_drawer": Task((("in", "red cube", "white drawer"),), ("cabinet", "white drawer", "red cube"),
                           *_words("in", "red cube", "drawer")),
    "sort_cubes": Task((("in", "red cube", "red plate"), ("in", "blue cube", "blue plate")),
                       ("red cube", "blue cube", "red plate", "blue plate"), *_words("sort")),
    "bottle_by_basket": Task((("beside", "blue bottle", "basket"),), ("blue bottle", "basket"),
                             *_words("beside", "blue bottle", "basket")),
    "near_cube_in_bowl": Task((("in", "red cube", "white bowl"),),
                              ("red cube", "second red cube", "green can", "white bowl"),
                              *_words("in", "red cube next to the can", "bowl")),
}
# the things that a task moves, and where to; a goal that names nothing moves the drawer
_NAMED = {name: [goal[1:] or ("white drawer",) for goal in task.goals] for name, task in TASKS.items()}
ROLES = {name: tuple(tuple(dict.fromkeys(things[role] for things in named if len(things) > role)) for role in range(2))
         for name, named in _NAMED.items()}
EXTRAS = ("orange cube", "purple block", "red can", "green ball", "green bottle", "yellow mug", "white cube",
          "grey can")
PERTURBATIONS = ("camera", "robot", "language", "light", "background", "noise", "layout")
KINDS_OF_EPISODE = (*PERTURBATIONS, "hard", "occluded")


class Perturbation(NamedTuple):
    """kind: one of PERTURBATIONS, "hard" (all of RoboTwin's at once) or "occluded"; these two have no level 1..5."""

    kind: str
    level: int = 3


class Style(NamedTuple):
    """What a scene looks like."""

    light: Light
    table: tuple[float, float, float] = (0.42, 0.29, 0.17)
    pattern: str = "wood"               # wood | plain | checker | stripes
    wall: tuple[float, float, float] = (0.26, 0.27, 0.28)


LIGHT = Light(sun=(0.45, 0.30, 1.0), sun_color=(1.25, 1.2, 1.1), ambient=(0.62, 0.62, 0.64), fog=0.0, clouds=0.0,
              exposure=0.95)


class Top:
    """The table as the renderer's ground (an infinite plane): its paint, and the shadows of all that stands on it."""

    step = 0.0
    CELLS, SPAN = 320, 16.0             # shadow map: cells along a side; side [render units]

    def __init__(self, style: Style):
        self.style, self.shadow = style, np.ones((self.CELLS, self.CELLS), np.float32)

    def raised(self, x, y):
        return np.full(len(x), -1, np.float32)

    def classes(self, x, y):
        return np.zeros(len(x), np.uint8)

    def paint(self, x, y, distance):
        base = np.float32(self.style.table)[:, None]
        if self.style.pattern == "checker":
            return base * np.where((np.floor(x / 1.2) + np.floor(y / 1.2)) % 2 > 0, np.float32(1.2), np.float32(0.55))
        if self.style.pattern == "stripes":
            return base * np.where(np.floor(y / 0.9) % 2 > 0, np.float32(1.15), np.float32(0.6))
        if self.style.pattern == "plain":
            return base * (0.96 + 0.08 * noise(x, y, 0.8))
        return base * (0.88 + 0.24 * noise(x * np.float32(0.12), y, 1.1))

    def light(self, x, y, light):
        half = self.CELLS / 2
        i = (x * np.float32(self.CELLS / self.SPAN) + half).astype(np.int32)
        j = (y * np.float32(self.CELLS / self.SPAN) + half).astype(np.int32)
        inside = (i >= 0) & (i < self.CELLS) & (j >= 0) & (j < self.CELLS)
        return np.where(inside, self.shadow[i.clip(0, self.CELLS - 1), j.clip(0, self.CELLS - 1)], 1), np.zeros(len(x))

    def cast(self, p: Primitives, keep: np.ndarray) -> None:
        """Draws the shadows of the primitives `keep` along the sun's rays: the hull of each one's outline points."""
        sun = np.array(self.style.light.sun)
        points = _OUTLINE[p.kind[keep]] * p.half[keep, None]                             # (n, 16, 3)
        points = points @ p.rotation[keep].transpose(0, 2, 1) + p.center[keep, None]
        flat = points[..., :2] - sun[:2] / sun[2] * np.maximum(points[..., 2:], 0)
        cells = np.round((flat * (self.CELLS / self.SPAN) + self.CELLS / 2 - 0.5) * 4).astype(np.int32)[..., ::-1]
        image = np.full((self.CELLS, self.CELLS), 255, np.uint8)
        for outline in np.ascontiguousarray(cells):
            cv2.fillConvexPoly(image, cv2.convexHull(outline), 40, shift=2)
        self.shadow = cv2.GaussianBlur(image, (7, 7), 1.8).astype(np.float32) * np.float32(1 / 255)


def _outline_points() -> np.ndarray:
    """16 points of the outline of each unit primitive: (3, 16, 3), by BOX, ELLIPSOID, CYLINDER."""
    box = np.array([[x, y, z] for x in (-1, 1) for y in (-1, 1) for z in (-1, 1)] * 2, float)
    turn = np.arange(8) * np.pi / 4
    circle = np.stack([np.cos(turn), np.sin(turn), 0 * turn], 1)
    tube = np.concatenate([circle + [0, 0, z] for z in (-1, 1)])
    ball = np.concatenate([circle, np.stack([0 * turn, np.cos(turn), np.sin(turn)], 1)])
    return np.stack([box, ball, tube])


_OUTLINE = _outline_points()


# --- cameras ----------------------------------------------------------------------------------------------------------

def agentview_pose() -> np.ndarray:
    """T_base_cam (4, 4) of LIBERO's agent view (OpenCV axes); MuJoCo gives its quaternion as wxyz, looking along -z."""
    w, x, y, z = np.array([0.6380, 0.3048, 0.3048, 0.6380]) / np.linalg.norm([0.6380, 0.3048, 0.3048, 0.6380])
    T = np.eye(4)
    T[:3, :3] = [[1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)],
                 [2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)],
                 [2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)]]
    T[:3, 1:3] *= -1                                                    # OpenGL's axes -> OpenCV's
    T[:3, 3] = 0.6586, 0.0, 1.6103
    return T


# in the hand: looks along the fingers from beside them; picture up is the hand's x, right its y
HAND_CAM = np.array([[0, -1, 0, 0.065], [1, 0, 0, 0], [0, 0, 1, -0.095], [0, 0, 0, 1.0]])


def intrinsics(camera: str, size: int, mirrored: bool = True) -> np.ndarray:
    """K (3, 3) of a square picture of `size` px; mirrored: of the picture that a policy is fed."""
    f = FOCAL[camera] * size / 256
    return np.array([[-f if mirrored else f, 0, size / 2], [0, f, size / 2], [0, 0, 1.0]])


def rotation_of(vector: np.ndarray) -> np.ndarray:
    """Axis times angle (3,) [rad] -> rotation (3, 3)."""
    return cv2.Rodrigues(np.asarray(vector, np.float64))[0]


def axis_angle(R: np.ndarray) -> np.ndarray:
    """Rotation (3, 3) -> axis times angle (3,) [rad] of the quaternion with x >= 0: continuous around a hand that
    points down, where w changes its sign; the angle may then pass pi, as robosuite's does."""
    from scipy.spatial.transform import Rotation

    q = Rotation.from_matrix(R).as_quat()
    q = -q if q[0] < 0 or (abs(q[0]) < 1e-9 and q[3] < 0) else q
    w = np.clip(q[3], -1, 1)
    return np.zeros(3) if 1 - w * w < 1e-12 else q[:3] * (2 * np.arccos(w) / np.sqrt(1 - w * w))


# --- the world --------------------------------------------------------------------------------------------------------

class Tabletop:
    """One episode at a time. Everything is a function of (task, seed, perturbation) and the actions."""

    def __init__(self, size: int = 128):
        self.size = size

    # reset

    def reset(self, task: str, seed: int, perturbation: Perturbation | None = None, words: int = 0) -> None:
        """words: which training sentence (a language perturbation overrides it). Raises InputError on an unknown task
        or perturbation."""
        if task not in TASKS:
            raise InputError(f"task '{task}': one of {', '.join(TASKS)}")
        if perturbation is not None and (perturbation.kind not in KINDS_OF_EPISODE
                                         or not 1 <= perturbation.level <= 5):
            raise InputError(f"perturbation {perturbation.kind} level {perturbation.level}: one of "
                             f"{', '.join(KINDS_OF_EPISODE)}; level 1 to 5")
        self.task, self.name, self.seed = TASKS[task], task, seed
        number = list(TASKS).index(task)
        rng = np.random.default_rng([seed, number])
        kind, level = perturbation or ("", 0)
        twist = np.random.default_rng([seed, number, 1 + KINDS_OF_EPISODE.index(kind), level]) if kind else rng
        self.steps, self.done, self.aborted, self.held = 0, False, "", None
        self.opening, self.drawer = OPEN, DRAWER if task in ("close_drawer", "cube_in_drawer") else 0.0
        self.height = TABLE + (twist.uniform(-0.03, 0.03) if kind == "hard" else 0.0)
        self.site = START + rng.uniform(-1, 1, 3) * [0.03, 0.03, 0.02]
        self.hand = DOWN.copy()
        clutter = {"layout": level, "hard": 3}.get(kind, 0)
        self.things = self._place(rng, twist, clutter, 0.012 * level if kind == "layout" else 0.0)
        if kind == "layout" and level >= 3:
            self._add_occluder(twist)
        self.instruction = self.task.words[words]
        self.style, self.T_base_agent, self.blur = Style(LIGHT), agentview_pose(), None
        if kind == "robot":
            way = twist.normal(size=3)
            self.site = np.clip(self.site + 0.02 * level * way / np.linalg.norm(way), START - 0.12, START + 0.12)
            self.hand = rotation_of([*twist.uniform(-0.02, 0.02, 2) * level, twist.uniform(-0.06, 0.06) * level]) @ DOWN
        if kind == "camera":
            self.T_base_agent = self._orbit(twist, level)
        if kind == "language":
            self.instruction = self.task.held_out[level - 1]
        if kind in ("light", "hard"):
            self.style = self.style._replace(light=_relight(twist,
                level if kind == "light" else int(twist.integers(1, 6))))
        if kind in ("background", "hard"):
            self.style = _repaint(twist, level if kind == "background" else 5, self.style)
        if kind == "noise":
            self.blur = int(twist.integers(5)), 2 * level - int(twist.integers(2))
        if kind == "hard":
            self.instruction = self.task.held_out[int(twist.integers(2, 5))]
        if kind == "occluded":
            self._hide_target(twist)
        self.start = {t.name: t.position.copy() for t in self.things}
        self._build()

    def _place(self, rng, twist, clutter: int, wider: float) -> list[Thing]:
        """Things at random places without overlap: the task's, one or two others, and `clutter` more."""
        used = {(t.split()[-2:-1] or [""])[0] + t.split()[-1] for t in self.task.things}
        spare = [e for e in EXTRAS if e.replace(" ", "") not in used and not (self.name == "near_cube_in_bowl" and e.endswith("can"))]
        extra = list(rng.choice(spare, int(rng.integers(1, 3)), replace=False))
        rest = [e for e in spare if e not in extra]
        names = [*self.task.things, *extra] + list(twist.choice(rest, min(clutter, len(rest)), replace=False))
        placed: list[Thing] = []
        low, high = np.array([-0.16, -0.22]) - wider, np.array([0.14, 0.22]) + wider
        if "cabinet" in names:
            y = rng.uniform(-0.06, 0.06)
            placed = [Thing("cabinet", (-0.36, y)), Thing("white drawer", (-0.36 + self.drawer, y))]
            low = np.array([-0.02, -0.22]) - [0, wider]
            names = [n for n in names if n not in ("cabinet", "white drawer")]
        beside_can = self.name == "near_cube_in_bowl"                   # one of two red cubes stands by the can
        for name in names:
            source = rng if name in self.task.things or name in extra else twist
            for attempt in range(400):
                thing, least = self._propose(name, source, placed, low, high), 0.045 - 0.015 * (attempt > 200)
                xy = thing.position[:2]
                room = [np.hypot(*(t.position[:2] - xy)) - max(t.kind.half) - max(thing.kind.half) for t in placed]
                if beside_can and name == "second red cube":
                    least = 0.14
                if beside_can and name == "green can":
                    least = 0.028
                    room[1] -= 0.10
                if all(r > least for r in room) and (np.abs(xy) < [0.24, 0.30]).all():
                    placed.append(thing)
                    break
            else:
                if name in self.task.things:                            # a dead end: start over with the next numbers
                    return self._place(rng, twist, clutter, wider)
        return placed

    def _propose(self, name: str, rng, placed: list[Thing], low, high) -> Thing:
        """A thing at a random place, each kind in its region."""
        xy = rng.uniform(low, high)
        yaw = rng.uniform(-0.3, 0.3) if name.split()[-1] in ("cube", "block") else 0.0
        if name == "basket":
            xy = rng.uniform([-0.06, 0.13], [0.08, 0.20]) * [1, rng.choice([-1, 1])]
        elif name == "yellow block":
            xy = rng.uniform([-0.14, -0.15], [0.0, 0.15])
        elif name == "black square" or (name == "green can" and self.name == "near_cube_in_bowl"):
            square = name == "black square"                             # ahead of the block, away from the robot
            way = rng.uniform(-0.5, 0.5) if square else rng.uniform(0, 2 * np.pi)
            far = rng.uniform(0.12, 0.16) if square else 0.095
            xy = placed[0].position[:2] + far * np.array([np.cos(way), np.sin(way)])
        return Thing(name, xy, yaw)

    def _add_occluder(self, twist) -> None:
        """A tall carton between the agent-view camera and the task's first thing, where there is room for it; not before a
        drawer, whose way it would block."""
        if self.target == "white drawer":
            return
        target = self.thing(self.target)
        toward = agentview_pose()[:2, 3] - target.position[:2]
        for _ in range(300):
            xy = target.position[:2] + toward / np.linalg.norm(toward) * twist.uniform(0.085, 0.16) + [0, twist.uniform(-0.06, 0.06)]
            carton = Thing("orange carton", xy, twist.uniform(-0.2, 0.2))
            if all(np.hypot(*(t.position[:2] - xy)) > max(t.kind.half) * 0.9 + 0.055 for t in self.things):
                self.things.append(carton)
                return

    def _hide_target(self, twist) -> None:
        """Of some cartons before the target, keep the first that hides it by 40 to 90 %; where none does, none."""
        if self.target == "white drawer":
            return
        target, things = self.thing(self.target), self.things
        toward = agentview_pose()[:2, 3] - target.position[:2]
        for _ in range(40):
            xy = target.position[:2] + toward / np.linalg.norm(toward) * twist.uniform(0.065, 0.16) \
                + [0, twist.uniform(-0.08, 0.08)]
            carton = Thing("orange carton", xy, twist.uniform(-0.2, 0.2))
            if all(np.hypot(*(t.position[:2] - xy)) > max(t.kind.half) * 0.9 + 0.035 for t in things):
                self.things = [*things, carton]
                self._build()
                if 0.1 <= self.visible_share() <= 0.6:
                    return
        self.things = things

    def _orbit(self, twist, level: int) -> np.ndarray:
        """LIBERO-Plus's camera: around a pivot by a horizontal and a vertical angle, farther or nearer, then turned."""
        horizontal, vertical, end_roll, end_pitch = np.radians(twist.uniform(0.5, 1, 4) * twist.choice([-1, 1], 4)
                                                               * np.array([3.0, 2.0, 1.0, 0.8]) * level)
        scale = 1 + 0.03 * level * twist.uniform(-1, 1)
        T, pivot = agentview_pose(), np.array([-0.1, 0.0, TABLE])
        turn = rotation_of([0, 0, horizontal]) @ rotation_of([0, vertical, 0])
        T[:3, 3] = pivot + scale * turn @ (T[:3, 3] - pivot)
        T[:3, :3] = turn @ T[:3, :3] @ rotation_of([end_pitch, 0, end_roll])
        return T

    def thing(self, name: str) -> Thing:
        """The thing of that name."""
        return next(t for t in self.things if t.name == name)

    @property
    def target(self) -> str:
        """Name of the thing that the first goal not yet reached is about."""
        goal = next((g for g in self.task.goals if not self.reached(g)), self.task.goals[-1])
        return goal[1] if len(goal) > 1 else "white drawer"

    @property
    def limit(self) -> int:
        """Control steps that an episode may take."""
        return GOAL_STEPS * len(self.task.goals)

    # contact

    def step(self, action) -> bool:
        """One control step of 7 numbers -> whether the episode is over. NaN or infinity aborts it: `aborted` tells why.

        Raises InputError on another number of numbers.
        """
        action = np.asarray(action, np.float64).reshape(-1)
        if action.shape != (7,):
            raise InputError(f"an action has 7 numbers (position, rotation, gripper), this one {action.size}")
        if self.done:
            return True
        if not np.isfinite(action).all():
            self.done, self.aborted = True, "the action is not finite"
            return True
        action = action.clip(-1, 1)
        self.steps += 1
        if self.held is None or self.held.what != "drawer":
            self.hand = _orthonormal(rotation_of(action[3:6] * STEP_RAD * RESPONSE) @ self.hand)
            self._carry()
        shift = action[:3] * STEP_M * RESPONSE
        parts = max(1, int(np.ceil(np.linalg.norm(shift) / 0.01)))
        for _ in range(parts):
            self._move(shift / parts)
        self._grip(float(np.sign(action[6])))
        for thing in self.things:
            self._sink(thing)
        self.done = self.success()
        return self.done

    def pads(self, site: np.ndarray | None = None) -> np.ndarray:
        """Plan positions (2, 2) of the two finger pads."""
        site = self.site if site is None else site
        return site[:2] + np.array([[1], [-1]]) * self.hand[:2, 1] * (self.opening + PAD)

    def _carry(self) -> None:
        """The held thing follows the hand."""
        if self.held is not None and self.held.what != "drawer":
            self.held.rotation = self.hand @ self.grasp[0]
            self.held.position = self.site + self.hand @ self.grasp[1]

    def _move(self, shift: np.ndarray) -> None:
        """Moves the hand by at most 1 cm, stopped and pushing as the contact rules say."""
        if self.held is not None and self.held.what == "drawer":
            self._slide_drawer(shift[0], follow=True)
            return
        low = max([REACH[0, 2] + TIP + 0.002] + [t.top + TIP for t in self.things if t.what == "cabinet"
                                                 and t.gap(self.site[:2])[0] < 0.02])
        site = np.clip(self.site + shift, [*REACH[0, :2], min(low, max(self.site[2], REACH[0, 2]))], REACH[1])
        site[2] = max(site[2], min(low, self.site[2]))
        if self.held is not None:
            self._move_held(site)
            return
        for pad in self.pads(site):
            for thing in self.things:
                if thing.what in ("drawer", "cabinet") or thing.kind.inner is not None:
                    continue
                gap, normal = thing.gap(pad)
                tip = site[2] - TIP
                if gap >= PAD or tip >= thing.top - 1e-6 or tip + 0.05 < thing.position[2]:
                    continue
                if self.site[2] - TIP >= thing.top - 0.005:              # from above: stops on it
                    site[2] = max(site[2], thing.top + TIP)
                elif not self._push(thing, -normal * (PAD - gap)):
                    site[:2] = self.site[:2]
        self._push_drawer(site)
        self.site = site

    def _move_held(self, site: np.ndarray) -> None:
        """As `_move`, with something between the fingers."""
        held, offset = self.held, self.hand @ self.grasp[1]
        bottom, now = site + offset, self.site + offset
        for thing in self.things:
            if thing is held or thing.what in ("square", "plate"):
                continue
            if thing.kind.inner is not None or thing.what == "cabinet":
                # a wall of a receptacle: stepping from a lower support onto its rim stops the motion
                if self._support(held, bottom[:2], 10.0, thing) > max(now[2], bottom[2]) + CLIMB and \
                        self._support(held, now[:2], 10.0, thing) <= now[2] + CLIMB:
                    site[:2], bottom[:2] = self.site[:2], now[:2]
                continue
            gap, normal = thing.gap(bottom[:2])
            reach = held.extent(normal)
            if gap < reach and now[2] < thing.top - CLIMB and bottom[2] + held.kind.height > thing.position[2]:
                if not self._push(thing, -normal * (reach - gap)):
                    site[:2], bottom[:2] = self.site[:2], now[:2]
        floor = self._support(held, bottom[:2], max(now[2], bottom[2]))
        site[2] += max(0.0, floor - bottom[2])
        self.site = site
        self._carry()

    def _push(self, thing: Thing, shift: np.ndarray, depth: int = 0) -> bool:
        """Moves a light thing over the table, and what it runs into; False if something heavy or the edge stops it."""
        if not thing.kind.light or thing is self.held or depth > 2:
            return False
        to = thing.position[:2] + shift
        if (np.abs(to) > [0.32, 0.38]).any():
            return False
        for other in self.things:
            if other is thing or other is self.held or other.what in ("square",
                "plate") or other.position[2] > thing.top \
                    or other.top < thing.position[2] + 0.002:
                continue
            gap, normal = other.gap(to)
            touch = thing.extent(normal) - gap
            if other.what == "drawer" or (other.kind.inner is not None and touch > 0 and gap < -0.02):
                continue                                                # inside a receptacle
            if touch > 0 and gap < other.gap(thing.position[:2])[0] and not self._push(other, -normal * touch,
                depth + 1):
                return False
        for rider in self.things:                                       # what stands on it comes along
            if rider is not thing and rider is not self.held and abs(rider.position[2] - thing.top) < 0.003 \
                    and thing.gap(rider.position[:2])[0] < 0:
                rider.position[:2] += shift
        thing.position[:2] = to
        return True

    def _slide_drawer(self, shift: float, follow: bool) -> float:
        """Moves the drawer along x within its travel, with what lies in it; -> how far it went."""
        drawer = self.thing("white drawer")
        went = float(np.clip(self.drawer + shift, 0, DRAWER) - self.drawer)
        for thing in self.things:
            if thing is not drawer and thing.kind.light and thing is not self.held and self._inside(thing, drawer):
                thing.position[0] += went
        self.drawer += went
        drawer.position[0] += went
        if follow:
            self.site[0] += went
        return went

    def _push_drawer(self, site: np.ndarray) -> None:
        """Pads that touch the drawer's front or the end of its fin push it in."""
        drawer = next((t for t in self.things if t.what == "drawer"), None)
        if drawer is None or site[2] - TIP > drawer.top - 0.005:
            return
        for pad, before in zip(self.pads(site), self.pads()):
            beside = abs(pad[1] - drawer.position[1])
            if beside > 0.09 + PAD:
                continue
            fin = beside < FIN[1] + PAD and site[2] - TIP < FIN[2]
            face = drawer.position[0] + (0.138 if fin else 0.082) + PAD
            if pad[0] < face and before[0] >= face - 0.011:
                went = self._slide_drawer(pad[0] - face, follow=False)
                site[0] += max(0.0, face + went - pad[0])

    def _grip(self, command: float) -> None:
        """Opens (-1) or closes (+1) the fingers by one step; takes hold of or lets go what lies between them."""
        opening = float(np.clip(self.opening - GRIP_SPEED * command, 0, OPEN))
        if self.held is not None:
            if command < 0 and opening > self.grasp[2] + 1e-4:
                if self.held.what != "drawer":
                    yaw = self.held.yaw
                    c, s = np.cos(yaw), np.sin(yaw)
                    self.held.rotation = np.array([[c, -s, 0], [s, c, 0], [0, 0, 1.0]])
                self.held = None
                self.opening = opening
            elif command < 0:
                self.opening = opening
            else:
                self.opening = self.grasp[2]
            return
        if command > 0:
            for thing in sorted(self.things, key=lambda t: np.abs(t.position[:2] - self.site[:2]).sum()):
                width = self._between(thing)
                if width is None:
                    continue
                along = self.hand[:2, 1]
                offset = float((self._middle(thing) - self.site[:2]) @ along)
                if opening <= width:
                    if thing.what == "drawer":
                        self.site[1] = thing.position[1]
                        self.held, self.grasp = thing, (np.eye(3), np.zeros(3), width)
                    elif self._push(thing, -along * offset):
                        self.held = thing
                        self.grasp = (self.hand.T @ thing.rotation, self.hand.T @ (thing.position - self.site), width)
                    opening = max(opening, min(width, OPEN))
                elif abs(offset) + width > opening and thing.what != "drawer":
                    self._push(thing, -along * np.sign(offset) * (abs(offset) + width - opening))
                break
        self.opening = opening

    def _middle(self, thing: Thing) -> np.ndarray:
        """Plan position (2,) of what fingers can hold: the thing's middle, a drawer's fin."""
        return thing.position[:2] + ([FIN[0], 0.0] if thing.what == "drawer" else [0.0, 0.0])

    def _between(self, thing: Thing) -> float | None:
        """Half width [m] of a thing that lies between the fingers and fits, else None."""
        if not (thing.kind.light or thing.what == "drawer"):
            return None
        along, across = self.hand[:2, 1], self.hand[:2, 0]
        offset = self._middle(thing) - self.site[:2]
        drawer = thing.what == "drawer"
        width = FIN[1] if drawer else thing.extent(along / max(np.linalg.norm(along), 1e-6))
        length = 0.028 if drawer else thing.extent(across / max(np.linalg.norm(across), 1e-6))
        low, high = self.site[2] - TIP, self.site[2] + 0.025
        top = FIN[2] if drawer else thing.top
        if abs(offset @ across) > length + 0.004 or abs(offset @ along) > self.opening or width > OPEN:
            return None
        return width if low < top - 0.006 and high > thing.position[2] + 0.003 else None

    def _inside(self, thing: Thing, holder: Thing) -> bool:
        """Whether a thing's centre is over the inside of a receptacle, below its rim."""
        x, y = self._inner(holder)
        d = np.abs(holder.rotation[:2, :2].T @ (thing.position[:2] - holder.position[:2] - self._inner_center(holder)))
        over = np.hypot(*d) < x if holder.kind.round else (d < [x, y]).all()
        return bool(over and thing.position[2] < holder.position[2] + max(holder.kind.height, holder.kind.floor + 0.02))

    def _inner(self, holder: Thing) -> tuple[float, float]:
        """Half extents of a receptacle's inside; of a drawer, of the part that is out of the cabinet."""
        return (max(self.drawer - 0.012, 0) / 2, holder.kind.inner[1]) if holder.what == "drawer" else holder.kind.inner

    def _inner_center(self, holder: Thing) -> np.ndarray:
        return np.array([0.07 - max(self.drawer - 0.012, 0) / 2, 0]) if holder.what == "drawer" else np.zeros(2)

    def _support(self, thing: Thing, xy: np.ndarray, bottom: float, only: Thing | None = None) -> float:
        """Height [m] of what carries a thing at xy whose bottom is at `bottom`: the highest surface not above it."""
        best = 0.0
        for other in self.things if only is None else [only]:
            if other is thing or other is self.held or other.what == "square":
                continue
            gap, normal = other.gap(xy)
            if other.kind.inner is not None:
                x, y = self._inner(other)
                d = np.abs(other.rotation[:2, :2].T @ (xy - other.position[:2] - self._inner_center(other)))
                slack = 0.7 * min(thing.kind.half)
                inside = np.hypot(*d) < max(x - slack, 0.2 * x) if other.kind.round else (d < np.maximum([x - slack,
                    y - slack], 0.2 * x)).all()
                if inside or (other.what == "plate" and gap < 0):
                    height = other.position[2] + other.kind.floor
                elif gap < 0.5 * thing.extent(normal) and (other.what != "drawer" or self.drawer > 0.02
                                                           and xy[0] > other.position[0] + 0.02 - self.drawer):
                    height = other.top
                else:
                    continue
            elif gap < 0 and other.kind.flat:
                height = other.top
            else:
                continue
            if height <= bottom + CLIMB:
                best = max(best, height)
        return best

    def _sink(self, thing: Thing) -> None:
        """Lets a free thing down by up to 4 cm; off a rim or another thing's side it slides first."""
        if thing is self.held or not thing.kind.light:
            return
        floor = self._support(thing, thing.position[:2], thing.position[2])
        thing.position[2] = max(floor, thing.position[2] - 0.04)
        for other in self.things:
            if other is thing or other is self.held or other.what in ("square", "plate", "cabinet"):
                continue
            gap, normal = other.gap(thing.position[:2])
            if other.kind.inner is not None:
                on_rim = abs(thing.position[2] - other.top) < 1e-3 and floor == other.top
                if on_rim:                                              # slides to the nearer side
                    inward = -normal if gap < -0.004 else normal
                    thing.position[:2] += 0.01 * inward
            elif other.kind.light and thing.position[2] < other.top - 0.004 and other.position[2] < thing.top - 0.004 \
                    and gap < thing.extent(normal) - 0.002 and thing.position[2] >= other.position[2]:
                thing.position[:2] += normal * min(thing.extent(normal) - gap, 0.01)

    # success

    def success(self) -> bool:
        """Whether all goals are reached now."""
        return all(self.reached(goal) for goal in self.task.goals)

    def reached(self, goal: tuple[str, ...]) -> bool:
        """Whether one goal is reached now."""
        verb = goal[0]
        if verb == "open":
            return self.drawer > 0.85 * DRAWER
        if verb == "close":
            return self.drawer < 0.08 * DRAWER
        a = self.thing(goal[1])
        if verb == "lift":
            return a is self.held and a.position[2] > 0.08
        if a is self.held:
            return False
        b = self.thing(goal[2])
        apart = np.hypot(*(a.position[:2] - b.position[:2]))
        if verb == "in":
            return self._inside(a, b) and a.position[2] < b.position[2] + b.kind.floor + 0.008
        if verb == "stack":
            return apart < 0.026 and abs(a.position[2] - b.top) < 0.004
        if verb == "push":
            return apart < 0.030 and a.position[2] < 0.01
        if verb == "beside":
            return a.position[2] < 0.004 and b.gap(a.position[:2])[0] < 0.075
        raise ValueError(f"goal {goal}")

    # pictures

    def _build(self) -> None:
        """The parts of all bodies as arrays; `_primitives` only moves them."""
        bodies = [(t.kind.parts, t.color, k) for k, t in enumerate(self.things)]
        bodies += [(parts, "white", -1) for parts in ROBOT_PARTS]
        rows = [(part, color, body, instance) for body, (parts, color, instance) in enumerate(bodies) for part in parts]
        part = [r[0] for r in rows]
        turns = np.array([p.yaw for p in part])
        local = np.zeros((len(part), 3, 3))
        local[:, 0, 0] = local[:, 1, 1] = np.cos(turns)
        local[:, 1, 0], local[:, 0, 1], local[:, 2, 2] = np.sin(turns), -np.sin(turns), 1
        colors = [self.style.wall if p.color == "wall" else COLORS[p.color or c] for p, c, _, _ in rows]
        self._offset, self._local = np.array([p.center for p in part]), local
        self._body = np.array([r[2] for r in rows])
        self._fixed = dict(kind=np.array([p.kind for p in part], np.uint8),
                           half=SCALE * np.array([p.half for p in part]),
                           taper=np.array([p.taper for p in part], float), semantic=np.ones(len(part), np.uint8),
                           instance=np.array([r[3] for r in rows], np.int32),
                           material=np.array([p.material for p in part], np.uint8),
                           color=np.array(colors, np.float32), glow=np.zeros(len(part), np.float32),
                           seed=(np.array([r[3] for r in rows]) % 7 / 7).astype(np.float32))
        self._top = Top(self.style)
        self._casting = np.array([r[0].color != "wall" and (r[3] < 0 or self.things[r[3]].what != "square")
                                  for r in rows])

    def _primitives(self) -> Primitives:
        """Everything there is, in the renderer's units, the table's top at z = 0."""
        links = arm(self.site, self.hand, self.opening)
        R = np.stack([t.rotation for t in self.things] + [T[:3, :3] for T in links])
        p = np.stack([t.position for t in self.things] + [T[:3, 3] for T in links])
        center = np.einsum("nij,nj->ni", R[self._body], self._offset) + p[self._body]
        return Primitives(center=SCALE * center, rotation=R[self._body] @ self._local, **self._fixed)

    def camera_pose(self, camera: str) -> np.ndarray:
        """T_base_cam (4, 4), OpenCV axes."""
        if camera == "agentview":
            return self.T_base_agent
        T = np.eye(4)
        T[:3, :3], T[:3, 3] = self.hand, self.site + [0, 0, self.height]
        return T @ HAND_CAM

    def render(self, size: int | None = None, cameras: tuple[str, ...] = CAMERAS) -> dict[str, np.ndarray]:
        """-> images (V, H, W, 3) uint8, depth (V, H, W) float32 [m], instances (V, H, W) int32, K, T_base_cam and
        share: {name: (V,) visible pixels / pixels if nothing else stood before it}. As policies are fed: mirrored."""
        size = size or self.size
        p = self._primitives()
        self._top.cast(p, self._casting)
        scene = Scene(p, self._top, self.style.light)
        plain = scene._replace(primitives=p._replace(instance=np.full(len(p.kind), -1, np.int32)))   # no street shadows
        out: dict[str, list] = {key: [] for key in ("images", "depth", "instances", "K", "T_base_cam", "share")}
        for camera in cameras:
            T = self.camera_pose(camera)
            K, T_render = intrinsics(camera, size, mirrored=False), T.copy()
            T_render[:3, 3] = SCALE * (T[:3, 3] - [0, 0, self.height])
            grid = camera_rays(K, T_render, (size, size))
            view = draw(scene, grid, count=True)
            image = develop(shade(plain, grid, view), self.style.light.exposure, _NoGrain())
            if camera == "agentview" and self.blur is not None:
                image = degrade(image, *self.blur, np.random.default_rng([self.seed, self.steps]))
            instance = np.where(view.ids >= 0, p.instance[view.ids.clip(0)] + 1, 0)
            seen = np.bincount(instance.ravel(), minlength=len(self.things) + 1)[1:]
            covered = np.zeros(len(self.things))
            covered[:len(view.covered)] = view.covered
            out["share"].append(np.where(covered > 0, seen / np.maximum(covered, 1), 0.0))
            out["images"].append(image[:, ::-1])
            out["depth"].append(view.t[:, ::-1] / np.float32(SCALE))
            out["instances"].append(instance[:, ::-1].astype(np.int32))
            out["K"].append(intrinsics(camera, size))
            out["T_base_cam"].append(T)
        return {key: np.ascontiguousarray(np.stack(value)) for key, value in out.items()}

    def state(self) -> np.ndarray:
        """(8,) float64: grip site [m, base], axis-angle [rad], finger joints [m]."""
        return np.array([*(self.site + [0, 0, self.height]), *axis_angle(self.hand), self.opening, -self.opening])

    def visible_share(self) -> float:
        """Share of the target that the agent view sees now: 1 if nothing else stands before it. NaN for a drawer, which its
        own cabinet hides."""
        if self.target == "white drawer":
            return float("nan")
        share = self.render(cameras=("agentview",))["share"][0]
        return float(share[[t.name for t in self.things].index(self.target)])


def _orthonormal(R: np.ndarray) -> np.ndarray:
    """The nearest rotation, by one Newton step of the polar decomposition."""
    return R @ (1.5 * np.eye(3) - 0.5 * R.T @ R)


class _NoGrain:
    """Stands for a random generator in `develop`: no sensor noise, so that files stay small and pictures are exact."""

    def integers(self, low, high, shape, dtype):
        return np.full(shape, 128, dtype)


def surface_points(what: str, count: int, rng: np.random.Generator) -> np.ndarray:
    """Points (count, 3) [m] spread evenly over the surface of a kind of thing, in its own frame (parts' insides
    too)."""
    points, areas = [], []
    for part in KINDS[what].parts:
        x, y, z = part.half
        if part.kind == ELLIPSOID:
            d = rng.normal(size=(count, 3))
            q, area = d / np.linalg.norm(d, axis=1, keepdims=True) * part.half, 4 * np.pi * x * x
        elif part.kind == CYLINDER:
            caps, side = np.pi * x * x, 4 * np.pi * x * z
            turn, kind = rng.uniform(0, 2 * np.pi, count), rng.random(count) * (side + 2 * caps)
            r = np.where(kind < side, 1.0, np.sqrt(rng.random(count)))
            up = np.where(kind < side, rng.uniform(-1, 1, count), np.where(kind < side + caps, 1.0, -1.0))
            r = r * (1 - part.taper[0] * (up + 1) / 2)
            q, area = np.stack([r * x * np.cos(turn), r * y * np.sin(turn), up * z], 1), side + 2 * caps
        else:
            q = rng.uniform(-1, 1, (count, 3))
            faces = np.array([y * z, x * z, x * y])
            axis = rng.choice(3, count, p=faces / faces.sum())
            q[np.arange(count), axis] = rng.choice([-1.0, 1.0], count)
            q, area = q * part.half, 8 * faces.sum()
        c, s = np.cos(part.yaw), np.sin(part.yaw)
        points.append(q @ np.array([[c, -s, 0], [s, c, 0], [0, 0, 1]]).T + part.center)
        areas.append(area)
    which = rng.choice(len(areas), count, p=np.array(areas) / sum(areas))
    return np.stack(points, 1)[np.arange(count), which]


# --- the robot's looks ------------------------------------------------------------------------------------------------

_LINK = 0.43                        # [m] upper arm and forearm
ROBOT_PARTS = (
    (Part(CYLINDER, (0, 0, 0.16), (0.085, 0.085, 0.17)), Part(ELLIPSOID, (0, 0, 0.33), (0.09, 0.09, 0.09))),
    (Part(CYLINDER, (0, 0, _LINK / 2), (0.058, 0.058, _LINK / 2)),
     Part(ELLIPSOID, (0, 0, _LINK), (0.068, 0.068, 0.068))),
    (Part(CYLINDER, (0, 0, _LINK / 2), (0.052, 0.052, _LINK / 2)),
     Part(ELLIPSOID, (0, 0, _LINK), (0.058, 0.058, 0.058))),
    (Part(CYLINDER, (0, 0, -0.16), (0.042, 0.042, 0.045)), Part(BOX, (0, 0, -0.085), (0.026, 0.095, 0.033),
        color="grey"),
     Part(CYLINDER, (0.052, 0, -0.105), (0.016, 0.016, 0.016), color="black")),
    (Part(BOX, (0, 0, -0.022), (0.010, 0.008, 0.034), color="black"),),
    (Part(BOX, (0, 0, -0.022), (0.010, 0.008, 0.034), color="black"),),
    (Part(BOX, (-1.05, 0, 0.8), (0.05, 4.0, 1.6), color="wall", material=CONCRETE),),
)


def arm(site: np.ndarray, hand: np.ndarray, opening: float) -> list[np.ndarray]:
    """Poses (4, 4) of ROBOT_PARTS' bodies above the table: base, two links by inverse kinematics, hand, fingers,
    wall."""
    wrist, shoulder = site - hand[:, 2] * 0.20, ROBOT + [0, 0, 0.33]
    way = wrist - shoulder
    far = min(np.linalg.norm(way), 2 * _LINK * 0.999)
    way = way / max(np.linalg.norm(way), 1e-9)
    side = np.cross(way, [0, 0, 1.0])
    up = np.cross(side / max(np.linalg.norm(side), 1e-9), way)
    bend = np.sqrt(_LINK ** 2 - (far / 2) ** 2)
    elbow = shoulder + way * far / 2 + up * bend
    poses = [_pose(np.eye(3), ROBOT)]
    for a, b in ((shoulder, elbow), (elbow, wrist)):
        z = (b - a) / np.linalg.norm(b - a)
        x = np.cross([0, 1.0, 0], z)
        x = x / np.linalg.norm(x)
        poses.append(_pose(np.stack([x, np.cross(z, x), z], 1), a))
    poses.append(_pose(hand, site))
    poses += [_pose(hand, site + hand[:, 1] * sign * (opening + 0.008)) for sign in (1, -1)]
    return [*poses, np.eye(4)]


def _pose(R: np.ndarray, p: np.ndarray) -> np.ndarray:
    T = np.eye(4)
    T[:3, :3], T[:3, 3] = R, p
    return T


# --- perturbations of what is seen ------------------------------------------------------------------------------------

def _relight(rng, level: int) -> Light:
    """Direction, strength and colour of the light."""
    turn = np.radians(14 * level) * rng.choice([-1, 1])
    c, s = np.cos(turn), np.sin(turn)
    x, y, z = LIGHT.sun
    strength = 1 + 0.13 * level * rng.choice([-1, 1])
    cast = 1 + 0.05 * level * rng.uniform(-1, 1, 3)
    return LIGHT._replace(sun=(c * x - s * y, s * x + c * y, z / (1 + 0.15 * level)),
                          sun_color=tuple(np.array(LIGHT.sun_color) * strength * cast),
                          ambient=tuple(np.array(LIGHT.ambient) * (1 + (strength - 1) / 2) * cast))


def _repaint(rng, level: int, style: Style) -> Style:
    """Another table, from level 3 another pattern, from level 4 another wall."""
    new = rng.uniform(0.06, 0.6, 3)
    share = 0.2 * level
    table = tuple((1 - share) * np.array(style.table) + share * new)
    pattern = str(rng.choice(["checker", "stripes", "plain"])) if level >= 3 else style.pattern
    wall = tuple(rng.uniform(0.08, 0.6, 3)) if level >= 4 else style.wall
    return style._replace(table=table, pattern=pattern, wall=wall)


def degrade(image: np.ndarray, kind: int, severity: int, rng: np.random.Generator) -> np.ndarray:
    """Sensor noise on (H, W, 3) uint8: 0 motion blur, 1 Gaussian blur, 2 zoom blur, 3 fog, 4 glass blur; severity
    1..10.

    After LIBERO-Plus's five; magnitudes for 128 px, scaled with the image.
    """
    H, W = image.shape[:2]
    unit = severity * W / 128
    if kind == 0:
        length = int(2 * round(0.6 * unit) + 1)
        kernel = np.zeros((length, length), np.float32)
        kernel[length // 2] = 1 / length
        turn = cv2.getRotationMatrix2D((length / 2 - 0.5, length / 2 - 0.5), float(rng.uniform(-45, 45)), 1)
        kernel = cv2.warpAffine(kernel, turn, (length, length))
        return cv2.filter2D(image, -1, kernel / kernel.sum(), borderType=cv2.BORDER_REFLECT)
    if kind == 1:
        return cv2.GaussianBlur(image, (0, 0), 0.22 * unit + 0.2)
    if kind == 2:
        total = np.zeros((H, W, 3), np.float32)
        scales = np.linspace(1, 1 + 0.02 * severity, 8)
        for scale in scales:
            total += cv2.warpAffine(image, cv2.getRotationMatrix2D((W / 2, H / 2), 0, scale), (W, H),
                                    borderMode=cv2.BORDER_REFLECT)
        return (total / len(scales)).astype(np.uint8)
    if kind == 3:
        field = cv2.resize(rng.random((6, 6)).astype(np.float32), (W, H), interpolation=cv2.INTER_CUBIC)[..., None]
        share = 0.07 * severity * (0.6 + 0.4 * field)
        return (image * (1 - share) + 215 * share).clip(0, 255).astype(np.uint8)
    shift = rng.normal(0, 0.16 * unit, (2, H, W)).astype(np.float32)
    y, x = np.mgrid[:H, :W].astype(np.float32)
    return cv2.remap(image, x + shift[0], y + shift[1], cv2.INTER_LINEAR, borderMode=cv2.BORDER_REFLECT)


# --- the scripted expert ----------------------------------------------------------------------------------------------

CARRY = 0.16                        # [m] height of the grip site on the way
ABOVE = 0.055                       # [m] over a thing's top before going down


def expert(world: Tabletop) -> np.ndarray:
    """The action (7,) of a scripted expert that looks at the simulator's state. It keeps no memory, so it recovers from
    whatever happened before, and its answers are a function of what there is to see."""
    goal = next((g for g in world.task.goals if not world.reached(g)), None)
    if goal is None:
        return _go(world, world.site, -1)
    verb = goal[0]
    if verb == "open":
        return _open(world)
    if verb == "close":
        return _close(world)
    if verb == "push":
        return _push_to(world, world.thing(goal[1]), world.thing(goal[2]))
    a = world.thing(goal[1])
    if world.held is not None and world.held is not a:
        return _go(world, world.site, -1)
    if world.held is None:
        return _pick(world, a)
    if verb == "lift":
        return _go(world, [*world.site[:2], CARRY], 1)
    b = world.thing(goal[2])
    to = b.position[:2] + world._inner_center(b)
    height = b.position[2] + b.kind.floor
    if verb == "stack":
        height = b.top
    if verb == "beside":
        side = -np.sign(b.position[1]) or 1.0
        to, height = b.position[:2] + [0, side * (b.kind.half[1] + 0.045)], 0.0
    return _place(world, to, height + 0.004)


def _go(world: Tabletop, to, grip: float, yaw: float | None = None) -> np.ndarray:
    """Action towards a grip site (3,) above the table, turning the hand upright and to yaw [rad]."""
    action = np.zeros(7)
    action[:3] = np.clip((np.asarray(to) - world.site) / (STEP_M * RESPONSE), -1, 1)
    wish = rotation_of([0, 0, yaw or 0.0]) @ DOWN
    turn = cv2.Rodrigues(wish @ world.hand.T)[0][:, 0]
    action[3:6] = np.clip(turn / (STEP_RAD * RESPONSE), -1, 1)
    action[6] = grip
    return action


def _pick(world: Tabletop, a: Thing) -> np.ndarray:
    """Over the thing, down, close."""
    yaw = (a.yaw + np.pi / 4) % (np.pi / 2) - np.pi / 4 if not a.kind.round else 0.0
    depth = a.position[2] + max(0.5 * a.kind.height, min(a.kind.height - 0.03, 0.07))
    depth = max(depth, TIP + 0.004)
    off = np.hypot(*(a.position[:2] - world.site[:2]))
    over, clear = a.top + ABOVE, world.site[2] - TIP - a.top             # clear > 0: the tips are above the thing
    # far: at the height of the way, straight up first
    if off > 0.1 or (clear < 0.03 and off > 0.03):
        way = max(over, CARRY)
        return _go(world, [*(a.position[:2] if clear > 0.02 else world.site[:2]), way], -1, yaw)
    if clear > 0 and off > 0.010:
        return _go(world, [*a.position[:2], over], -1, yaw)
    if world.site[2] > depth + 0.008:
        return _go(world, [*a.position[:2], depth], -1, yaw)
    return _go(world, [*a.position[:2], depth], 1, yaw)


def _place(world: Tabletop, to: np.ndarray, height: float) -> np.ndarray:
    """Up, over the place, down, open. The hand's height over the held thing's bottom is known."""
    held = world.held
    lift = world.site[2] - held.position[2]
    aim = to - (held.position[:2] - world.site[:2])
    off = np.hypot(*(aim - world.site[:2]))
    carry = max(CARRY, 0.085 + lift + height)
    if off > 0.03 and world.site[2] < carry - 0.03:
        return _go(world, [*world.site[:2], carry], 1)
    if off > 0.010:
        return _go(world, [*aim, carry], 1)
    if held.position[2] > height + 0.008:
        return _go(world, [*aim, height + lift], 1)
    return _go(world, [*aim, height + lift], -1)


def _open(world: Tabletop) -> np.ndarray:
    """Over the fin, down, close, pull."""
    drawer = world.thing("white drawer")
    fin = drawer.position[:2] + [FIN[0] + 0.006, 0]
    if world.held is drawer:
        return _go(world, world.site + [0.05, 0, 0], 1)
    off = np.abs(fin - world.site[:2])
    if (off > [0.014, 0.010]).any() and (world.site[2] < 0.11 or off.max() > 0.1):
        return _go(world, [*(fin if world.site[2] > 0.11 else world.site[:2]), 0.15], -1)
    if (off > [0.014, 0.010]).any():
        return _go(world, [*fin, 0.13], -1)
    if world.site[2] > 0.062:
        return _go(world, [*fin, 0.055], -1)
    return _go(world, [*fin, 0.055], 1)


def _close(world: Tabletop) -> np.ndarray:
    """With closed fingers before the fin, down, push."""
    drawer = world.thing("white drawer")
    if world.held is not None:
        return _go(world, world.site, -1)
    end = drawer.position[0] + 0.138
    before = np.array([end + 0.035, drawer.position[1]])
    aligned = abs(world.site[1] - drawer.position[1]) < 0.012 and world.site[0] > end
    if world.site[2] < 0.075 and aligned:
        return _go(world, [world.site[0] - 0.05, drawer.position[1], 0.05], 1)
    if aligned and abs(world.site[0] - before[0]) < 0.02:
        return _go(world, [*before, 0.05], 1)
    if world.site[2] < 0.12:
        return _go(world, [*world.site[:2], 0.16], 1)
    return _go(world, [*before, 0.15], 1)


def _push_to(world: Tabletop, a: Thing, b: Thing) -> np.ndarray:
    """Closed fingers behind the thing, seen from the goal; down; push through its middle."""
    if world.held is not None:
        return _go(world, world.site, -1)
    way = b.position[:2] - a.position[:2]
    way = way / max(np.linalg.norm(way), 1e-9)
    rel = world.site[:2] - a.position[:2]
    behind, beside = float(-rel @ way), float(abs(rel @ [-way[1], way[0]]))
    start = a.position[:2] - way * (a.extent(way) + 0.032)
    low = world.site[2] < 0.04
    if low and behind > 0.5 * a.extent(way) and beside < 0.02:
        aside = np.array([-way[1], way[0]]) * float(rel @ [-way[1], way[0]])
        return _go(world, [*(world.site[:2] + 0.02 * way - 0.6 * aside), 0.022], 1)
    if np.hypot(*(start - world.site[:2])) < 0.012:
        return _go(world, [*start, 0.022], 1)
    if world.site[2] < a.top + 0.03:
        return _go(world, [*world.site[:2], a.top + 0.06], 1)
    return _go(world, [*start, a.top + 0.05], 1)


def demonstrate(world: Tabletop, task: str, seed: int, perturbation: Perturbation | None = None, nudges: float = 0.07,
                words: int = 0, watch=None) -> dict[str, np.ndarray]:
    """One episode of the expert -> actions, executed (T, 7), states (T, 8), success.

    nudges: probability that at a step the hand is pushed off its way for two steps (after Laskey et al. 2017, DART);
    the recorded answer is the expert's own to the state that this led to. Rare and strong instead of always and weak:
    the steps between them stay predictable, as a chunk of actions must be. watch(world): called before each step.
    """
    world.reset(task, seed, perturbation, words)
    rng = np.random.default_rng([seed, list(TASKS).index(task), 99])
    actions, executed, states = [], [], []
    push, left = np.zeros(7), 0
    while not world.done and world.steps < world.limit:
        action = expert(world)
        states.append(world.state())
        if watch is not None:
            watch(world)
        if left == 0 and rng.random() < nudges:
            way = rng.normal(size=3)
            push[:3], push[3:6], left = 0.8 * way / np.linalg.norm(way), rng.normal(0, 0.15, 3), 2
        moved = action + push * (left > 0)
        left = max(0, left - 1)
        actions.append(action)
        executed.append(moved.clip(-1, 1))
        world.step(executed[-1])
    return {"actions": np.array(actions), "executed": np.array(executed), "states": np.array(states),
            "success": np.array(world.success())}


# --- writing ----------------------------------------------------------------------------------------------------------

def write_demo(folder: Path, task: str, seed: int, size: int) -> None:
    """One demonstration that succeeds: the first of the seeds seed, seed + 100000, ... whose episode does."""
    world = Tabletop(size)
    for attempt in range(20):
        own = seed + 100_000 * attempt
        seen: list[dict] = []
        poses: list[np.ndarray] = []

        def watch(w: Tabletop) -> None:
            seen.append(w.render())
            poses.append(np.stack([_pose(t.rotation, t.position + [0, 0, w.height]) for t in w.things]))

        demo = demonstrate(world, task, own, words=own % 3, watch=watch)
        if demo["success"]:
            break
    else:
        raise RuntimeError(f"{task}: twenty seeds from {seed} without a success")
    write_episode(
        folder, CAMERAS, *(np.stack([s[k] for s in seen]) for k in ("images", "depth", "instances")),
        actions=demo["actions"].astype(np.float32), executed=demo["executed"].astype(np.float32),
        states=demo["states"].astype(np.float32), K=np.stack([s["K"] for s in seen]),
        T_base_cam=np.stack([s["T_base_cam"] for s in seen]), poses=np.stack(poses).astype(np.float32),
        things=np.array([t.name.encode() for t in world.things]), instruction=np.array(world.instruction.encode()),
        task=np.array(task.encode()), seed=np.array(own))  # fmt: skip


def _write_job(job: tuple[Path, str, int, int]) -> None:
    cv2.setNumThreads(1)
    write_demo(*job)


RESERVED = range(50_000, 60_000)  # episode seeds that no demonstration has: threedvla.py's --eval-seed


def make_world(out: Path, seed: int = 0, demos: int = 30, tasks: tuple[str, ...] | None = None, size: int = 128,
               workers: int | None = None) -> None:
    """Writes what is missing of a set of demonstrations. Raises InputError if `out` holds another one."""
    tasks = tuple(dict.fromkeys(tasks or TASKS))
    if unknown := [t for t in tasks if t not in TASKS]:
        raise InputError(f"--tasks {' '.join(unknown)}: one of {', '.join(TASKS)}")
    if seed < 0 or (workers is not None and workers < 1):
        raise InputError(f"--seed {seed}, --workers {workers}: not below 0, and at least 1")
    if out.exists() and not out.is_dir():
        raise InputError(f"--out {out}: not a folder")
    if RESERVED.start <= 1000 * seed + demos and 1000 * seed < RESERVED.stop:
        raise InputError(f"--seed {seed}: its episodes would be evaluation's ({RESERVED.start} to {RESERVED.stop - 1}); choose a smaller one")
    if demos < 1 or size < 32:
        raise InputError(f"--demos {demos}, --image {size}: at least 1 demonstration and 32 px")
    settings = {"name": "synthetic tabletop world", "version": 2, "seed": seed, "demos": demos, "tasks": list(tasks),
                "image": size, "cameras": list(CAMERAS)}
    path = out / "world.json"
    if path.is_file():
        old = read_json(path)
        old = old if isinstance(old, dict) else {}
        if differ := [k for k in settings if old.get(k) != settings[k]]:
            raise InputError(f"{out}: holds another world ({', '.join(f'{k} {old.get(k)}' for k in differ)}); use "
                             f"another --out, or remove it")
    elif out.is_dir() and not is_empty(out):
        raise InputError(f"{out}: not empty, and not a world of this maker; use another --out")
    jobs = [(out / "demos" / task / f"{k:04d}", task, 1000 * seed + k, size) for k in range(demos) for task in tasks]
    jobs = [job for job in jobs if not (job[0] / "episode.npz").is_file()]
    if path.is_file() and not jobs and old.get("whole"):
        return
    write_json(path, settings | {"whole": False})
    workers = min(workers or os.cpu_count() or 1, max(len(jobs), 1))
    begun = time.time()
    bar = tqdm(total=len(jobs), desc=out.name, unit="demonstration", disable=None)
    if workers == 1:
        for job in jobs:
            _write_job(job)
            bar.update()
    else:
        spawn = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(workers, mp_context=spawn, initializer=end_with_parent) as pool:
            for _ in pool.map(_write_job, jobs):
                bar.update()
    bar.close()
    write_json(path, settings | {"whole": True})
    print(f"{out}: {demos} demonstrations of each of {len(tasks)} tasks, {time.time() - begun:.0f} s")


@exit_on_input_error
def main(argv: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m data.tabletop", description="Write demonstrations in the tabletop "
                                                                                 "world.")
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--demos", type=int, default=30, help="demonstrations of each task")
    parser.add_argument("--tasks", nargs="+", help=f"default: all of {', '.join(TASKS)}")
    parser.add_argument("--image", type=int, default=128, help="side of the square pictures [px]")
    parser.add_argument("--workers", type=int, help="processes (default: all cores)")
    args = parser.parse_args(argv)
    make_world(args.out, args.seed, args.demos, args.tasks, args.image, args.workers)


if __name__ == "__main__":
    main()
