"""The things that are annotated: vehicles, people, cycles, cones, barriers and other movables, as compositions of
primitives.

An object is a few primitives in its own frame: x forward, y left, z up from the ground under its centre, all inside its
box (nuScenes' size). Parts may swing about the y axis at hip height (legs, arms), and brake lights glow when the actor
slows down. Every function draws its variation from the generator it is given.
"""

from typing import NamedTuple

import numpy as np

from data.render import (BOX, BUS_BODY, CAR_BODY, CAR_CABIN, CHEVRON, CLOTH, CONCRETE, CYLINDER, ELLIPSOID, LAMP, PLAIN,
                         STRIPES, WHEEL, PrimitiveList, Primitives)
from data.driving.streets import AXLE, CAR, ID, PEDESTRIAN, TRUCK, linear, rot_y

BUS, BENDY, CONSTRUCTION, MOTORCYCLE, BICYCLE, TRAILER = (ID["vehicle." + n] for n in (
    "bus.rigid", "bus.bendy", "construction", "motorcycle", "bicycle", "trailer"))
CONE, BARRIER, DEBRIS, PUSHABLE = (
    ID["movable_object." + n] for n in ("trafficcone", "barrier", "debris", "pushable_pullable"))
CHILD, WORKER, POLICE, STROLLER, SCOOTER = (ID["human.pedestrian." + n] for n in (
    "child", "construction_worker", "police_officer", "stroller", "personal_mobility"))
RACK, ANIMAL = ID["static_object.bicycle_rack"], ID["animal"]


class Model(NamedTuple):
    """An object's shape, n parts."""

    semantic: int                       # lidarseg class
    size: tuple[float, float, float]    # length, width, height of its box [m]
    parts: Primitives
    swing: np.ndarray                   # (n,) how far a part swings [rad]
    hip: np.ndarray                     # (n,) height of its pivot [m]
    brake: np.ndarray                   # (n,) bool, a brake light


class Parts:
    """Collects the parts of one object."""

    def __init__(self, semantic: int, rng: np.random.Generator):
        self.semantic, self.rng, self.list = semantic, rng, PrimitiveList()
        self.swing, self.hip, self.brake = [], [], []

    def add(self, kind, center, half, color, material=PLAIN, rotation=None, taper=(0, 0), swing=0.0, hip=0.0,
            brake=False):
        """A primitive; swing [rad] about a pivot at height hip [m]; brake: a brake light."""
        self.list.add(kind, center, half, self.semantic, color, rotation, taper, 0, material, 0.0, self.rng.random())
        self.swing.append(swing), self.hip.append(hip), self.brake.append(brake)

    def box(self, x, y, z0, l, w, h, color, material=PLAIN, taper=(0, 0), **more):
        """A box that stands on z0."""
        self.add(BOX, (x, y, z0 + h / 2), (l / 2, w / 2, h / 2), color, material, None, taper, **more)

    def wheels(self, xs, y, radius, width=0.22):
        """A pair of wheels at each of xs; y: half the track's width."""
        for x in xs:
            for side in (-1, 1):
                self.add(CYLINDER, (x, side * (y - width / 2), radius), (radius, radius, width / 2),
                         linear(0.1, 0.1, 0.1), WHEEL, AXLE)

    def brakes(self, x, y, z):
        """A pair of brake lights."""
        for side in (-1, 1):
            self.add(BOX, (x, side * y, z), (0.03, 0.11, 0.07), linear(0.7, 0.05, 0.04), LAMP, brake=True)

    def build(self, size) -> Model:
        """size: length, width, height [m]."""
        return Model(self.semantic, tuple(float(v) for v in size), self.list.build(), np.float64(self.swing),
                     np.float64(self.hip), np.array(self.brake, bool))


CAR_PAINTS = [(0.85, 0.85, 0.85), (0.75, 0.76, 0.78), (0.55, 0.56, 0.58), (0.12, 0.12, 0.13), (0.2, 0.2, 0.22),
              (0.55, 0.08, 0.08), (0.1, 0.2, 0.45), (0.15, 0.3, 0.25), (0.75, 0.65, 0.15), (0.45, 0.35, 0.28)]


def car(r: np.random.Generator, semantic: int = CAR) -> Model:
    """Sedan, hatchback, SUV or van; semantic: also police and ambulance."""
    shape = r.choice(["sedan", "hatch", "suv", "van"], p=[0.4, 0.25, 0.23, 0.12])
    l, w, h = {"sedan": (4.6, 1.82, 1.47), "hatch": (4.05, 1.76, 1.5), "suv": (4.7, 1.92, 1.72),
               "van": (5.0, 1.95, 1.98)}[shape]
    l, w, h = l * r.uniform(0.95, 1.06), w * r.uniform(0.97, 1.04), h * r.uniform(0.97, 1.05)
    color = linear(*CAR_PAINTS[r.integers(len(CAR_PAINTS))])
    if semantic != CAR:
        color = linear(0.95, 0.95, 0.95)
    p = Parts(semantic, r)
    belt = {"sedan": 0.62, "hatch": 0.6, "suv": 0.6, "van": 0.55}[shape] * h
    p.box(0, 0, 0.2, l, w, belt - 0.2, color, CAR_BODY, (0.05, 0.1))
    length, x, taper = {"sedan": (0.58, -0.06, (0.38, 0.26)), "hatch": (0.66, -0.12, (0.32, 0.24)),
                        "suv": (0.7, -0.13, (0.22, 0.2)), "van": (0.84, -0.07, (0.16, 0.12))}[shape]
    p.box(x * l, 0, belt, length * l, w * 0.93, h - belt, color, CAR_CABIN, taper)
    p.wheels((-0.315 * l, 0.315 * l), w / 2, 0.32)
    p.brakes(-l / 2 + 0.03, 0.4 * w, belt - 0.18)
    if semantic != CAR:
        p.box(x * l, 0, h, 0.25, 1.0, 0.12, linear(0.1, 0.2, 0.9))
        h += 0.12
    return p.build((l, w, h))


def truck(r) -> Model:
    """Cab, chassis, box or open bed with a load."""
    l, w, h = r.uniform(5.8, 9.5), r.uniform(2.2, 2.6), r.uniform(2.6, 3.6)
    p, cab, box = Parts(TRUCK, r), linear(*CAR_PAINTS[r.integers(len(CAR_PAINTS))]), linear(*CAR_PAINTS[r.integers(3)])
    lc = 1.9
    p.box(l / 2 - lc / 2, 0, 0.45, lc, w * 0.96, 1.1, cab, CAR_BODY)
    p.box(l / 2 - lc / 2, 0, 1.55, lc * 0.95, w * 0.94, 0.95, cab, CAR_CABIN, (0.2, 0.06))
    p.box(-lc / 2, 0, 0.55, l - lc, w * 0.5, 0.4, linear(0.15, 0.15, 0.15))
    if r.random() < 0.7:
        p.box(-lc / 2 - 0.05, 0, 0.95, l - lc - 0.15, w, h - 0.95, box, PLAIN)
    else:                                                         # open bed with a load
        p.box(-lc / 2 - 0.05, 0, 0.95, l - lc - 0.15, w, 0.6, box, STRIPES)
        p.box(-lc / 2 - 0.3, 0, 1.5, (l - lc) * 0.6, w * 0.8, max(h - 1.6, 0.5), linear(0.45, 0.38, 0.28), CLOTH,
              (0.3, 0.3))
        h = 1.5 + max(h - 1.6, 0.5)
    p.wheels((l / 2 - 1.0, -l / 2 + 1.9, -l / 2 + 0.8), w / 2, 0.45, 0.28)
    p.brakes(-l / 2 + 0.06, 0.4 * w, 0.75)
    return p.build((l, w, max(h, 2.5)))


def cherry_picker(r) -> Model:
    """A decoy: a truck with an arm and a basket."""
    p, l, w = Parts(TRUCK, r), r.uniform(6.0, 7.5), 2.3
    cab = linear(*CAR_PAINTS[r.integers(len(CAR_PAINTS))])
    arm = linear(0.95, 0.7, 0.1) if r.random() < 0.5 else linear(0.9, 0.9, 0.9)
    p.box(l / 2 - 0.95, 0, 0.45, 1.9, w * 0.96, 1.1, cab, CAR_BODY)
    p.box(l / 2 - 0.95, 0, 1.55, 1.8, w * 0.94, 0.95, cab, CAR_CABIN, (0.2, 0.06))
    p.box(-0.95, 0, 0.55, l - 1.9, w, 0.55, linear(0.3, 0.3, 0.32), STRIPES)
    p.box(-l / 2 + 1.2, 0, 1.1, 0.7, 0.8, 0.9, arm)
    p.add(BOX, (-l / 2 + 2.6, 0, 2.6), (1.9, 0.16, 0.18), arm, PLAIN, rot_y(-0.4))
    p.box(-l / 2 + 4.4, 0, 2.7, 0.8, 1.1, 0.9, arm * 0.8, STRIPES)
    p.wheels((l / 2 - 1.0, -l / 2 + 1.3), w / 2, 0.45, 0.28)
    p.brakes(-l / 2 + 0.06, 0.4 * w, 0.75)
    return p.build((l, w, 3.6))


def container(r) -> Model:
    """A decoy: a long roll-off container on small wheels, without windows; nuScenes calls it debris."""
    p, l, w, h = Parts(DEBRIS, r), r.uniform(6.6, 9.0), 2.4, r.uniform(2.4, 2.8)
    color = linear(*[(0.5, 0.2, 0.12), (0.15, 0.3, 0.5), (0.2, 0.4, 0.25)][r.integers(3)])
    p.box(0, 0, 0.3, l, w, h - 0.3, color, STRIPES)
    p.wheels((-l / 2 + 0.4, l / 2 - 0.4), w / 2, 0.17, 0.15)
    return p.build((l, w, h))


def bollard(r) -> Model:
    """A decoy: a pointed post that can be moved, sometimes orange."""
    p, h = Parts(PUSHABLE, r), r.uniform(0.75, 1.1)
    color = linear(*[(0.95, 0.35, 0.05), (0.85, 0.85, 0.85), (0.75, 0.1, 0.1), (0.12, 0.12, 0.13)][r.integers(4)])
    p.add(CYLINDER, (0, 0, 0.41 * h), (0.11, 0.11, 0.41 * h), color)
    p.add(CYLINDER, (0, 0, 0.91 * h), (0.11, 0.11, 0.09 * h), color * 0.6, PLAIN, None, (0.8, 0))
    return p.build((0.3, 0.3, h))


DECOYS = (cherry_picker, container, bollard)  # they share words with held-out kinds, each with one


def bus(r, semantic: int = BUS) -> Model:
    """Rigid, double-decked or bendy."""
    l, w, h = r.uniform(10, 12.3), 2.55, r.choice([3.1, 3.4, 4.2])
    if semantic == BENDY:
        l = 16.5
    p = Parts(semantic, r)
    color = linear(*[(0.75, 0.1, 0.1), (0.85, 0.85, 0.85), (0.15, 0.35, 0.65), (0.2, 0.5, 0.3),
                     (0.85, 0.65, 0.1)][r.integers(5)])
    halves = [(0.0, l)] if semantic == BUS else [(0.26 * l, 0.46 * l), (-0.27 * l, 0.45 * l)]
    for x, length in halves:
        p.box(x, 0, 0.35, length, w, h - 0.35, color, BUS_BODY, (0.01, 0.04))
    if semantic == BENDY:
        p.box(0, 0, 0.5, 0.12 * l, w * 0.9, h - 0.7, linear(0.1, 0.1, 0.1), CLOTH)
    p.wheels((0.3 * l, -0.28 * l, -0.17 * l), w / 2, 0.48, 0.3)
    p.brakes(-l / 2 + 0.02, 0.42 * w, 0.9)
    return p.build((l, w, h))


def trailer(r) -> Model:
    """A box or a tank on three axles, without its tractor."""
    l, w, h = r.uniform(7, 12), 2.5, r.uniform(2.8, 3.8)
    p = Parts(TRAILER, r)
    if r.random() < 0.7:
        p.box(0.2, 0, 1.1, l - 0.4, w, h - 1.1, linear(*CAR_PAINTS[r.integers(len(CAR_PAINTS))]),
              STRIPES if r.random() < 0.3 else PLAIN)
    else:
        p.add(CYLINDER, (0.2, 0, 1.0 + 0.45 * (h - 1)), ((h - 1) * 0.45, w / 2, l / 2 - 0.3), linear(0.75, 0.76, 0.78),
              PLAIN, rot_y(np.pi / 2))
    p.box(0, 0, 0.8, l, 1.0, 0.3, linear(0.15, 0.15, 0.15))
    p.wheels((-l / 2 + 0.7, -l / 2 + 1.8, -l / 2 + 2.9), w / 2, 0.48, 0.3)
    p.box(l / 2 - 1.5, 0, 0, 0.2, 1.4, 0.9, linear(0.2, 0.2, 0.2))
    return p.build((l, w, h))


def construction(r) -> Model:
    """An excavator or a wheel loader."""
    p, yellow = Parts(CONSTRUCTION, r), linear(0.95, 0.68, 0.08)
    if r.random() < 0.6:                                          # excavator
        for side in (-1, 1):
            p.box(0, side * 1.05, 0, 3.4, 0.5, 0.85, linear(0.12, 0.12, 0.12), STRIPES)
        p.box(-0.4, 0, 0.9, 3.0, 2.4, 0.9, yellow)
        p.box(0.3, 0.6, 1.8, 1.5, 1.1, 1.25, yellow, CAR_CABIN, (0.1, 0.05))
        p.box(-1.4, 0, 1.7, 1.0, 2.3, 0.5, linear(0.25, 0.25, 0.25))
        p.add(BOX, (1.9, -0.4, 2.5), (1.6, 0.2, 0.22), yellow, PLAIN, rot_y(-0.55))
        p.add(BOX, (3.4, -0.4, 2.2), (0.2, 0.17, 1.25), yellow, PLAIN, rot_y(-0.25))
        p.box(3.2, -0.4, 0.3, 0.8, 0.9, 0.8, linear(0.3, 0.3, 0.3), PLAIN, (0.3, 0.0))
        # the box is centred between tail and bucket
        return _centred(p, 0.85, (5.9, 2.6, 3.6))
    p.box(-0.5, 0, 0.7, 3.6, 1.9, 0.9, yellow)                    # wheel loader
    p.box(-0.4, 0, 1.6, 1.5, 1.5, 1.4, yellow, CAR_CABIN, (0.12, 0.1))
    p.wheels((-1.5, 1.0), 1.2, 0.75, 0.5)
    p.add(BOX, (1.8, 0, 1.2), (1.2, 0.6, 0.15), yellow, PLAIN, rot_y(0.35))
    p.box(2.7, 0, 0.15, 0.9, 2.4, 1.0, linear(0.6, 0.45, 0.1), PLAIN, (0.5, 0))
    return _centred(p, 0.4, (5.6, 2.45, 3.05))


def _centred(p: Parts, x: float, size) -> Model:
    """Moves the parts back by x [m], so that the box is centred on them."""
    m = p.build(size)
    m.parts.center[:, 0] -= x
    return m


def _rider(p: Parts, x, seat, r) -> None:
    """Somebody on a cycle, with the seat at x and height seat [m]."""
    shirt = linear(*r.uniform(0.15, 0.85, 3))
    p.add(ELLIPSOID, (x, 0, seat + 0.32), (0.19, 0.22, 0.36), shirt, CLOTH, rot_y(0.35))
    p.add(ELLIPSOID, (x + 0.14, 0, seat + 0.76), (0.12, 0.11, 0.14), linear(*r.uniform(0.1, 0.9, 3)), PLAIN)
    for side in (-1, 1):
        p.add(CYLINDER, (x + 0.13, side * 0.13, seat - 0.22), (0.075, 0.075, 0.36), linear(0.15, 0.17, 0.25), CLOTH,
              rot_y(-0.5))
        p.add(CYLINDER, (x + 0.33, side * 0.21, seat + 0.36), (0.05, 0.05, 0.27), shirt, CLOTH, rot_y(1.15))


def bicycle(r, rider: bool) -> Model:
    """With or without a rider."""
    p, color = Parts(BICYCLE, r), linear(*r.uniform(0.1, 0.8, 3))
    for x in (-0.52, 0.52):
        p.add(CYLINDER, (x, 0, 0.34), (0.34, 0.34, 0.03), linear(0.1, 0.1, 0.1), WHEEL, AXLE)
    p.add(BOX, (0.1, 0, 0.62), (0.42, 0.03, 0.03), color, PLAIN, rot_y(-0.15))
    p.add(BOX, (-0.08, 0, 0.5), (0.36, 0.03, 0.03), color, PLAIN, rot_y(-0.75))
    p.add(BOX, (-0.28, 0, 0.6), (0.03, 0.03, 0.3), color, PLAIN, rot_y(-0.25))
    p.add(BOX, (0.46, 0, 0.68), (0.03, 0.03, 0.36), color, PLAIN, rot_y(-0.25))
    p.box(0.4, 0, 0.98, 0.05, 0.52, 0.05, linear(0.1, 0.1, 0.1))
    p.box(-0.33, 0, 0.9, 0.24, 0.14, 0.06, linear(0.1, 0.1, 0.1))
    if rider:
        _rider(p, -0.22, 0.95, r)
    return p.build((1.74, 0.56, 1.85 if rider else 1.05))


def motorcycle(r, rider: bool) -> Model:
    """With or without a rider."""
    p, color = Parts(MOTORCYCLE, r), linear(*CAR_PAINTS[r.integers(len(CAR_PAINTS))])
    for x in (-0.68, 0.68):
        p.add(CYLINDER, (x, 0, 0.31), (0.31, 0.31, 0.08), linear(0.1, 0.1, 0.1), WHEEL, AXLE)
    p.box(-0.02, 0, 0.35, 0.85, 0.34, 0.4, linear(0.2, 0.2, 0.2))
    p.box(0.15, 0, 0.7, 0.6, 0.36, 0.25, color, PLAIN, (0.4, 0.3))
    p.box(-0.45, 0, 0.72, 0.7, 0.3, 0.14, linear(0.05, 0.05, 0.05))
    p.add(BOX, (0.55, 0, 0.75), (0.05, 0.1, 0.4), color, PLAIN, rot_y(-0.35))
    p.box(0.45, 0, 1.02, 0.08, 0.72, 0.06, linear(0.1, 0.1, 0.1))
    p.box(-0.85, 0, 0.7, 0.3, 0.4, 0.35, color)
    if rider:
        _rider(p, -0.3, 0.85, r)
    return p.build((2.1, 0.76, 1.78 if rider else 1.15))


def pedestrian(r, semantic: int = PEDESTRIAN, seated: bool = False) -> Model:
    """Walking or standing, or seated on something low."""
    scale = {CHILD: r.uniform(0.62, 0.78)}.get(semantic, r.normal(1.0, 0.045))
    h = 1.73 * scale
    p = Parts(semantic, r)
    skin = linear(*(np.array([0.85, 0.65, 0.52]) * r.uniform(0.45, 1.05)))
    shirt = linear(*r.uniform(0.08, 0.9, 3))
    if semantic == WORKER:
        shirt = linear(0.95, 0.45, 0.05)
    if semantic == POLICE:
        shirt = linear(0.75, 0.9, 0.1)
    trousers = linear(*(np.array([0.2, 0.24, 0.36]) * r.uniform(0.4, 1.8)))
    hip = 0.49 * h
    if seated:                                                    # on a low box, thighs forward
        low = hip - 0.45
        p.box(-0.05, 0, 0, 0.4, 0.5, 0.42, linear(0.45, 0.35, 0.25), CLOTH)
        for side in (-1, 1):
            p.add(CYLINDER, (0.2, side * 0.1, 0.48), (0.08, 0.08, 0.22), trousers, CLOTH, rot_y(np.pi / 2))
            p.add(CYLINDER, (0.42, side * 0.1, 0.23), (0.06, 0.06, 0.23), trousers, CLOTH)
        p.add(CYLINDER, (-0.02, 0, 0.655 * h - low), (0.13, 0.2, 0.175 * h), shirt, CLOTH)
        p.add(ELLIPSOID, (0.02, 0, 0.92 * h - low), (0.1, 0.085, 0.08 * h), skin)
        return p.build((1.0, 0.6, h - low))
    for side in (-1, 1):
        p.add(CYLINDER, (0, side * 0.09 * scale, hip / 2), (0.085 * scale, 0.085 * scale, hip / 2), trousers, CLOTH,
              swing=0.45 * side, hip=hip)
        p.add(CYLINDER, (0, side * 0.235 * scale, 0.62 * h), (0.05 * scale, 0.05 * scale, 0.17 * h), shirt, CLOTH,
              swing=-0.35 * side, hip=0.78 * h)
    p.add(CYLINDER, (0, 0, 0.655 * h), (0.13 * scale, 0.19 * scale, 0.175 * h), shirt, CLOTH)
    p.add(ELLIPSOID, (0, 0, 0.82 * h), (0.11 * scale, 0.2 * scale, 0.06 * h), shirt, CLOTH)
    p.add(ELLIPSOID, (0.02, 0, 0.92 * h), (0.1 * scale, 0.085 * scale, 0.08 * h), skin)
    p.add(ELLIPSOID, (-0.015, 0, 0.945 * h), (0.105 * scale, 0.095 * scale, 0.06 * h),
          linear(0.9, 0.8, 0.1) if semantic == WORKER else linear(*(np.array([0.25, 0.18, 0.12]) * r.uniform(0.3, 2))))
    if r.random() < 0.3:
        p.add(BOX, (-0.2 * scale, 0, 0.68 * h), (0.09, 0.14, 0.2 * scale), linear(*r.uniform(0.05, 0.7, 3)), CLOTH)
    return p.build((0.72 * scale, 0.64 * scale, h))


def stroller(r) -> Model:
    """A child's carriage."""
    p = Parts(STROLLER, r)
    p.box(0, 0, 0.45, 0.6, 0.45, 0.35, linear(*r.uniform(0.1, 0.6, 3)), CLOTH)
    p.add(ELLIPSOID, (-0.1, 0, 0.85), (0.25, 0.23, 0.2), linear(*r.uniform(0.1, 0.6, 3)), CLOTH)
    p.wheels((-0.3, 0.3), 0.28, 0.14, 0.06)
    return p.build((0.95, 0.56, 1.05))


def cone(r) -> Model:
    """A traffic cone with stripes."""
    p, h = Parts(CONE, r), r.uniform(0.6, 0.95)
    p.box(0, 0, 0, 0.4, 0.4, 0.05, linear(0.1, 0.1, 0.1))
    p.add(CYLINDER, (0, 0, h / 2 + 0.02), (0.16, 0.16, h / 2 - 0.02), linear(0.95, 0.3, 0.05), CHEVRON, None, (0.8, 0))
    return p.build((0.42, 0.42, h))


def barrier(r, color) -> Model:
    """nuScenes gives a barrier's long side as its width."""
    p, w = Parts(BARRIER, r), 1.95
    p.box(0, 0, 0, 0.5, w, 0.35, color, CONCRETE)
    p.box(0, 0, 0.35, 0.42, w, 0.6, color, CONCRETE, (0.55, 0.0))
    return p.build((0.5, w, 0.95))


def debris(r) -> Model:
    """A heap of boxes and sacks."""
    p = Parts(DEBRIS, r)
    for _ in range(3):
        p.box(r.uniform(-0.3, 0.3), r.uniform(-0.3, 0.3), 0, r.uniform(0.2, 0.6), r.uniform(0.2, 0.6),
              r.uniform(0.15, 0.5), linear(*(np.array([0.55, 0.45, 0.35]) * r.uniform(0.5, 1.3))), CLOTH, (0.3, 0.3))
    return p.build((1.2, 1.2, 0.5))


def pushable(r) -> Model:
    """A wheeled bin or a trolley."""
    p = Parts(PUSHABLE, r)
    color = linear(*[(0.15, 0.4, 0.2), (0.2, 0.25, 0.5), (0.25, 0.25, 0.25), (0.6, 0.5, 0.15)][r.integers(4)])
    if r.random() < 0.6:                                          # wheeled bin
        p.box(0, 0, 0.08, 0.6, 0.55, 0.92, color, PLAIN, (-0.12, -0.1))
        p.box(0, 0, 1.0, 0.68, 0.62, 0.08, color * 0.7)
        p.wheels((-0.22,), 0.27, 0.1, 0.06)
        return p.build((0.72, 0.64, 1.08))
    p.box(0, 0, 0.25, 1.1, 0.6, 0.55, linear(0.6, 0.6, 0.62), STRIPES)      # trolley
    p.box(-0.5, 0, 0.8, 0.06, 0.6, 0.3, linear(0.3, 0.3, 0.3))
    p.wheels((-0.4, 0.4), 0.3, 0.12, 0.06)
    return p.build((1.16, 0.62, 1.1))


def dog(r) -> Model:
    """Some dog."""
    p, fur = Parts(ANIMAL, r), linear(*(np.array([0.6, 0.45, 0.3]) * r.uniform(0.3, 1.3)))
    p.add(ELLIPSOID, (0, 0, 0.42), (0.34, 0.13, 0.14), fur, CLOTH)
    p.add(ELLIPSOID, (0.38, 0, 0.58), (0.14, 0.09, 0.1), fur, CLOTH)
    for x in (-0.22, 0.22):
        for side in (-1, 1):
            p.add(CYLINDER, (x, side * 0.07, 0.17), (0.035, 0.035, 0.17), fur, CLOTH)
    return p.build((1.0, 0.3, 0.7))


def rack(r) -> Model:
    """A rack with its bicycles, one object as nuScenes annotates it."""
    p, n = Parts(RACK, r), int(r.integers(2, 5))
    for i in range(n):
        y = (i - (n - 1) / 2) * 0.65
        for x in (-0.52, 0.52):
            p.add(CYLINDER, (x, y, 0.34), (0.33, 0.33, 0.03), linear(0.1, 0.1, 0.1), WHEEL, AXLE)
        p.add(BOX, (0, y, 0.62), (0.45, 0.03, 0.04), linear(*r.uniform(0.1, 0.8, 3)))
        p.add(BOX, (0.2, y + 0.3, 0.4), (0.3, 0.03, 0.4), linear(0.5, 0.5, 0.5))
    return p.build((1.8, n * 0.65 + 0.35, 1.05))
