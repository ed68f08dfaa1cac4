"""Lane paths, traffic by rules, the net of roads and what ego does in it. data/driving/city.py puts it all together.

    paths        a Net's lanes, followed through junctions with smooth turns, shifted sideways for lane changes and
                 overtaking
    simulation   vehicles, ego the first, under the Intelligent Driver Model (Treiber et al. 2000) against whatever is
                 on the path ahead and against red lights; people walk at their own pace
"""

from typing import NamedTuple

import numpy as np

from data.driving.objects import Model
from data.driving.streets import TICK, WARM_UP, Junction, Road, along, rot_z


# --- actors and paths -------------------------------------------------------------------------------------------------

class Path(NamedTuple):
    """A way to go, a point every 0.5 m."""

    xy: np.ndarray                              # (L, 2)
    yaw: np.ndarray                             # (L,) unwrapped
    limit: np.ndarray                           # (L,) speed that bends allow [m/s]
    stops: list[tuple[float, int, bool]]        # stop lines: arc length, junction, whether on its through road

    def at(self, s: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Arc length (...) -> x, y, yaw."""
        u = np.clip(np.asarray(s, np.float64) / 0.5, 0, len(self.yaw) - 1.001)
        i = u.astype(int)
        f = u - i
        a, b = self.xy[i], self.xy[i + 1]
        return (a[..., 0] + f * (b[..., 0] - a[..., 0]), a[..., 1] + f * (b[..., 1] - a[..., 1]),
                self.yaw[i] + f * (self.yaw[i + 1] - self.yaw[i]))


def make_path(points: np.ndarray, stops, speed: float, shift=None) -> Path:
    """Polyline (n, 2) -> Path: resampled, smoothed, moved sideways by shift(s) [m]; bends are taken at 2 m/s^2."""
    run = np.concatenate([[0], np.cumsum(np.linalg.norm(np.diff(points, axis=0), axis=1))])
    keep = np.concatenate([[True], np.diff(run) > 1e-6])
    points, run = points[keep], run[keep]
    s = np.arange(0, run[-1], 0.5)
    xy = np.stack([np.interp(s, run, points[:, k]) for k in (0, 1)], 1)
    kernel = np.hanning(13)[1:-1]
    kernel /= kernel.sum()
    padded = np.concatenate([2 * xy[:1] - xy[5:0:-1], xy, 2 * xy[-1:] - xy[-2:-7:-1]])
    xy = np.stack([np.convolve(padded[:, k], kernel, "valid") for k in (0, 1)], 1)
    if shift is not None:
        t = np.gradient(xy, axis=0)
        t /= np.linalg.norm(t, axis=1, keepdims=True)
        xy = xy + shift(s)[:, None] * np.stack([-t[:, 1], t[:, 0]], 1)
    t = np.gradient(xy, 0.5, axis=0)
    yaw = np.unwrap(np.arctan2(t[:, 1], t[:, 0]))
    curvature = np.abs(np.gradient(yaw, 0.5))
    limit = np.minimum(speed, np.sqrt(2.0 / np.maximum(curvature, 1e-4)))
    for i in range(len(limit) - 2, -1, -1):                       # brake in time for the bend, 1.8 m/s^2
        limit[i] = min(limit[i], np.sqrt(limit[i + 1] ** 2 + 2 * 1.8 * 0.5))
    return Path(xy, yaw, limit, stops)


class Actor:
    """One annotated thing: still, with a pose x, y, yaw; or a mover with a path and, once simulated, s and v per
    tick.
    """

    def __init__(self, model: Model, pose=None, path: Path | None = None, start: float = 0.0, speed: float = 0.0,
                 idm: bool = True, attribute: str = ""):
        self.model, self.pose, self.path, self.attribute = model, pose, path, attribute
        self.start, self.speed, self.idm = start, speed, idm
        self.s = self.v = None

    def state(self, t: float) -> tuple[float, float, float, float, float]:
        """-> x, y, yaw, speed, acceleration at time t (between ticks: cubic Hermite)."""
        if self.path is None:
            return (*self.pose, 0.0, 0.0)
        u = np.clip((t + WARM_UP) / TICK, 0, len(self.s) - 1.001)
        i = int(u)
        f = u - i
        s0, s1, v0, v1 = self.s[i], self.s[i + 1], self.v[i] * TICK, self.v[i + 1] * TICK
        s = s0 + f * v0 + f * f * (3 * (s1 - s0) - 2 * v0 - v1) + f ** 3 * (2 * (s0 - s1) + v0 + v1)
        x, y, yaw = self.path.at(s)
        speed = self.v[i] + f * (self.v[i + 1] - self.v[i])
        return float(x), float(y), float(yaw), float(speed), float((self.v[i + 1] - self.v[i]) / TICK)


class Net(NamedTuple):
    """Roads and where they meet. side 1: traffic keeps right, -1: left."""

    roads: list[Road]
    junctions: list[Junction]
    side: int

    def lane_points(self, road: int, direction: int, lane: int, s0: float, length: float, choose):
        """Follows a lane from s0 for `length` [m] -> points (n, 2), stops as in Path.

        choose(junction, options) picks one of the options "left", "right", "straight" at every junction.
        """
        points, stops, total, s = [], [], 0.0, s0
        passed = set()
        while total < length:
            r = self.roads[road]
            lane = min(lane, r.lanes - 1)
            d = r.lane(self.side, direction, lane)
            ahead = []
            for j, (first, s_first, second, s_second, *_) in enumerate(self.junctions):
                for here, at, there, s_there, main in ((first, s_first, second, s_second, True),
                                                       (second, s_second, first, s_first, False)):
                    if here == road and (at - s) * direction > 2 and j not in passed:
                        ahead.append(((at - s) * direction, j, at, there, s_there, main))
            if not ahead:
                points += [r.at(s + direction * u, d)[:2] for u in np.arange(0, length - total + 1, 1.0)]
                break
            _, j, at, there, s_there, main = min(ahead)
            passed.add(j)
            cross = self.roads[there]
            clear = cross.carriageway() + 2.5
            stop = at - direction * (clear + 3.2)
            for u in np.arange(0, max((at - direction * clear - s) * direction, 0), 1.0):
                points.append(r.at(s + direction * u, d)[:2])
            if (stop - s) * direction > 0:
                stops.append((total + (stop - s) * direction, j, main))
            total += max((at - direction * clear - s) * direction, 0)
            s = at - direction * clear
            heading = r.at(at)[2] + (np.pi if direction < 0 else 0)
            options = {}
            for way in (1, -1):
                if way < 0 and not cross.start_open and s_there < 5:
                    continue                                      # a branch leads away from the junction only
                h = cross.at(s_there)[2] + (np.pi if way < 0 else 0)
                turn = (h - heading + np.pi) % (2 * np.pi) - np.pi
                options["left" if turn > 0 else "right"] = way
            branch_end = not main and not r.start_open and at < 5
            if not branch_end:
                options["straight"] = 0
            choice = choose(j, sorted(options))
            if choice == "straight":
                run = 2 * clear
                points += [r.at(s + direction * u, d)[:2] for u in np.arange(0, run, 1.0)]
                s, total = s + direction * run, total + run
                continue
            way = options[choice]
            near = (choice == "right") == (self.side > 0)         # the turn that does not cross oncoming traffic
            new_lane = cross.lanes - 1 if near else 0
            s_new = s_there + way * (r.carriageway() + 2.5)
            a = np.array(r.at(s, d)[:2])
            b = np.array(cross.at(s_new, cross.lane(self.side, way, new_lane))[:2])
            ta = np.array([np.cos(heading), np.sin(heading)])
            hb = cross.at(s_new)[2] + (np.pi if way < 0 else 0)
            tb = np.array([np.cos(hb), np.sin(hb)])
            reach = 0.4 * np.linalg.norm(b - a)
            f = np.linspace(0, 1, 20)[:, None]
            g = 1 - f
            curve = g ** 3 * a + 3 * f * g * g * (a + reach * ta) + 3 * f * f * g * (b - reach * tb) + f ** 3 * b
            points += [tuple(q) for q in curve]
            total += float(np.linalg.norm(np.diff(curve, axis=0), axis=1).sum())
            road, direction, lane, s = there, way, new_lane, s_new + way * 0.5
        return np.array(points), stops


# --- simulation -------------------------------------------------------------------------------------------------------

def _circles(x, y, yaw, length, width):
    """Three circles that cover a vehicle -> (n, 3, 2), radius (n,)."""
    off = np.array([-1, 0, 1]) * (length[:, None] - width[:, None]) / 2
    return np.stack([x[:, None] + off * np.cos(yaw)[:, None], y[:, None] + off * np.sin(yaw)[:, None]], -1), width / 2


def _touched(path: np.ndarray, circles: np.ndarray, radius: np.ndarray) -> np.ndarray:
    """Which points of a path (L, 2) lie in any of the circles (n, 2), radius (n,) -> (L,) bool."""
    dx, dy = (path[:, None, k] - circles[:, k] for k in (0, 1))
    return (dx * dx + dy * dy < radius ** 2).any(1)


def _still_circles(still: list[Actor], xy: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Circles (n, 2), radius (n,) of still things within 6 m of any path xy (M, L, 2)."""
    if not still:
        return np.zeros((0, 2)), np.zeros(0)
    x, y, yaw, length, width = np.array([(*a.pose, *a.model.size[:2]) for a in still]).T
    yaw = np.where(width > length, yaw + np.pi / 2, yaw)          # a barrier's long side is its width
    circles, radius = _circles(x, y, yaw, np.maximum(length, width), np.minimum(length, width))
    circles, radius = circles.reshape(-1, 2), np.repeat(radius, 3)
    near = np.zeros(len(circles), bool)
    for path in xy:
        near |= np.linalg.norm(circles[:, None] - path[None, ::8], axis=2).min(1) < 6
    return circles[near], radius[near]


def simulate(actors: list[Actor], junctions: list[Junction], ticks: int) -> None:
    """Fills s and v of every mover, ego the first: Intelligent Driver Model against the nearest thing on the path."""
    for a in actors:
        if a.path is not None and not a.idm:
            a.v = np.full(ticks, a.speed)
            a.s = a.start + a.speed * TICK * np.arange(ticks)
    drivers = [a for a in actors if a.path is not None and a.idm]
    walkers = [a for a in actors if a.path is not None and not a.idm]
    M = len(drivers)
    length = np.array([a.model.size[0] for a in drivers])
    width = np.array([a.model.size[1] for a in drivers])
    longest = max(len(a.path.yaw) for a in drivers)
    pad = lambda v: np.concatenate([v, np.repeat(v[-1:], longest - len(v), 0)])     # noqa: E731
    xy, yaw, limit = (np.stack([pad(getattr(a.path, k)) for a in drivers]) for k in ("xy", "yaw", "limit"))
    s = np.array([a.start for a in drivers], np.float64)
    rows = np.arange(M)
    v = 0.8 * limit[rows, (s / 0.5).astype(int)]
    fixed, fixed_r = _still_circles([a for a in actors if a.path is None and a.model.size[2] > 0.3], xy)
    reach = width / 2 + 0.12
    still = np.stack([_touched(path, fixed, fixed_r + r) for path, r in zip(xy, reach)])                 # (M, L)
    look = np.arange(0.6, 40, 1.2)
    S, V = np.zeros((ticks, M)), np.zeros((ticks, M))
    own = np.repeat(np.eye(M, dtype=bool), 3, axis=1)
    for tick in range(ticks):
        S[tick], V[tick] = s, v
        now = tick * TICK - WARM_UP
        i = np.minimum((s / 0.5).astype(int), longest - 2)
        circles, radius = _circles(xy[rows, i, 0] + (s / 0.5 - i) * (xy[rows, i + 1, 0] - xy[rows, i, 0]),
                                   xy[rows, i, 1] + (s / 0.5 - i) * (xy[rows, i + 1, 1] - xy[rows, i, 1]), yaw[rows, i],
                                   length, width)
        ahead = np.minimum(((s + length / 2)[:, None] + look) / 0.5, longest - 1).astype(int)
        points, heading = xy[rows[:, None], ahead], yaw[rows[:, None], ahead]        # (M, A, 2)
        feet = np.array([a.path.at(a.s[tick])[:2] for a in walkers]).reshape(-1, 2)
        things = np.concatenate([circles.reshape(-1, 2), feet])
        r = np.concatenate([np.repeat(radius, 3), np.full(len(feet), 0.45)])
        speed = np.concatenate([np.repeat(v, 3), np.zeros(len(feet))])
        way = np.concatenate([np.repeat(yaw[rows, i], 3), np.zeros(len(feet))])
        dx, dy = (points[:, :, None, k] - things[:, k] for k in (0, 1))                           # (M, A, things)
        hit = dx * dx + dy * dy < (reach[:, None, None] + r) ** 2
        hit[:, :, :3 * M] &= ~own[:, None]
        first = np.where(hit.any(2) | still[rows[:, None], ahead], look, np.inf)
        k = first.argmin(1)
        gap = first[rows, k]
        blocker = hit[rows, k].argmax(1)
        lead = np.where(hit[rows, k, blocker], speed[blocker] * np.cos(way[blocker] - heading[rows, k]), 0).clip(0)
        for m, a in enumerate(drivers):
            for stop, j, main in a.path.stops:
                d = stop - (s[m] + length[m] / 2)
                in_time = -0.5 < d < 40 and v[m] ** 2 / 9 < d + 0.5               # it can still stop, 4.5 m/s^2
                if in_time and d < gap[m] and junctions[j].signals and red(junctions[j], main, now):
                    gap[m], lead[m] = max(d, 0.1), 0.0
        target = np.maximum(limit[rows, i], 0.5)
        with np.errstate(over="ignore"):
            wish = 2.0 + np.maximum(0, v * 1.2 + v * (v - lead) / (2 * np.sqrt(1.8 * 2.5)))
            acceleration = 1.8 * (1 - (v / target) ** 4 - (wish / np.maximum(gap, 0.3)) ** 2)
        acceleration = np.clip(acceleration, -6.5, 1.8)
        new = np.maximum(v + TICK * acceleration, 0)
        s, v = s + TICK * (v + new) / 2, new
    for m, a in enumerate(drivers):
        a.s, a.v = S[:, m], V[:, m]


def red(junction: Junction, main: bool, t: float) -> bool:
    """Whether a junction's light is red at time t [s] for its through road (main) or the other one."""
    phase = (t - junction.green) % 15
    return phase >= 6.5 if main else not 7.5 <= phase < 14


def clashes(actors: list[Actor], times: np.ndarray) -> set[int]:
    """Indices of actors to take away because they run into each other.

    Ego stays, and so do still things unless ego runs into them; of two others the one with the higher index goes.
    """
    states = np.array([[a.state(t)[:3] for a in actors] for t in times])                       # (T, N, 3)
    l = np.array([max(a.model.size[:2]) for a in actors])
    w = np.array([min(a.model.size[:2]) for a in actors])
    moving = np.array([a.path is not None for a in actors])
    gone: set[int] = set()
    for state in states:
        circles, r = _circles(state[:, 0], state[:, 1], state[:, 2], l, w)
        center = state[:, :2]
        near = np.linalg.norm(center[:, None] - center[None], axis=2) < (l[:, None] + l[None]) / 2
        for i, j in zip(*np.nonzero(np.triu(near, 1))):
            if (moving[i] or moving[j]) and i not in gone and j not in gone:
                d = np.linalg.norm(circles[i][:, None] - circles[j][None], axis=2).min()
                if d < 0.93 * (r[i] + r[j]):                           # i < j: ego is 0
                    gone.add(j if i == 0 or moving[j] else i)
    return gone


# --- where the roads go, and ego -------------------------------------------------------------------------------------

def make_network(r: np.random.Generator, size: float, side: int) -> tuple[Net, float]:
    """A through road past the middle of the world and one to three others across or into it -> Net, s of the middle.

    A road that comes too near to another one elsewhere than at its junction is drawn again.
    """
    def bends(n, gentle):
        return [(float(r.uniform(30, 70)), float(r.choice([0, 1, 1]) * np.clip(r.normal(0, gentle), -0.03, 0.03)))
                for _ in range(n)]

    lanes = int(r.choice([1, 2, 3], p=[0.66, 0.3, 0.04]))
    median = float(r.uniform(0.9, 1.6)) if lanes > 1 and r.random() < 0.5 else 0.0
    parking = tuple(float(v) for v in (2.35 * (r.random(2) < 0.5)))
    width = float(r.uniform(2.9, 3.5))
    for _ in range(40):
        arcs = bends(8, 0.012)
        middle = sum(a[0] for a in arcs) / 2
        main = _through(np.array([size / 2, size / 2]), r.uniform(0, 2 * np.pi), arcs, middle, lanes, width, median,
                        parking)
        if _apart(main, None, middle, middle, size):
            break
    roads, junctions = [main], []
    s = middle + r.uniform(-12, 38)
    for k in range(int(r.choice([1, 2, 3], p=[0.5, 0.38, 0.12]))):
        for _ in range(20):
            at = s if not k else s + r.choice([-1, 1]) * r.uniform(55, 95)
            if any(abs(at - j.s) < 45 for j in junctions):
                continue
            road, s_other = _side_road(r, main, at, lanes, bends)
            if all(_apart(road, other, s_other, at if i == 0 else None, size) for i, other in enumerate(roads)) and \
                    _apart(road, None, s_other, s_other, size):
                junctions.append(Junction(0, float(at), len(roads), float(s_other), bool(r.random() < 0.65),
                                          float(r.uniform(0, 15))))
                roads.append(road)
                break
    return Net(roads, junctions, side), middle


def _side_road(r: np.random.Generator, main: Road, s: float, lanes: int, bends) -> tuple[Road, float]:
    """A road across the main one at s, or one that ends there -> Road, its own s at the junction."""
    turn = r.choice([-1, 1]) * np.pi / 2 + r.normal(0, 0.14)
    x, y, heading = main.at(s)
    parking = tuple(float(v) for v in (2.35 * (r.random(2) < 0.4)))
    width = float(r.uniform(2.8, 3.3))
    if r.random() < 0.55:
        arcs = [(25.0, 0.0), *bends(4, 0.014)]
        own = Road(0, 0, 0, arcs, 1, width, 0.0, parking).carriageway()
        shift = max(0.0, own + max(parking) + 0.6 - main.carriageway())
        x, y = x + shift * np.cos(heading + turn), y + shift * np.sin(heading + turn)
        return Road(x, y, heading + turn, arcs, 1, width, 0.0, parking, start_open=False), -shift
    arcs = [*bends(3, 0.014), (50.0, 0.0), *bends(3, 0.014)]
    s_other = sum(a[0] for a in arcs[:3]) + 25.0
    lanes = int(r.choice([1, 2], p=[0.75, 0.25])) if lanes > 1 else 1
    return _through(np.array([x, y]), heading + turn, arcs, s_other, lanes, width, 0.0, parking), s_other


def _apart(road: Road, other: Road | None, s: float, s_other: float | None, size: float) -> bool:
    """Whether a road keeps its distance from another one (None: from itself) within the world, junction (s, s_other)
    apart.
    """
    def points(q: Road, s0: float):
        """A point every 5 m within the world -> (n, 2), arc lengths (n,)."""
        run = np.arange(max(s0 - size, 0.0 if not q.start_open else -1e9), s0 + size, 5.0)
        xy = np.array([q.at(v)[:2] for v in run])
        keep = ((xy > -10) & (xy < size + 10)).all(1)
        return xy[keep], run[keep]

    a, sa = points(road, s)
    b, sb = (a, sa) if other is None else points(other, s_other if s_other is not None else other.length / 2)
    gap = road.carriageway() + (road if other is None else other).carriageway() + 16
    near = np.linalg.norm(a[:, None] - b[None], axis=2) < gap
    if other is None:
        return not (near & (np.abs(sa[:, None] - sb[None]) > 2.5 * gap)).any()
    if s_other is not None:
        near &= (np.abs(sa[:, None] - s) > 45) | (np.abs(sb[None] - s_other) > 45)
    return not near.any()


def _through(point, heading, arcs, s, lanes, width, median, parking) -> Road:
    """The road whose point at arc length s is `point` with `heading`."""
    x, y, h, run = 0.0, 0.0, 0.0, 0.0
    for length, curvature in arcs:
        part = min(length, s - run)
        x, y, h = along(x, y, h, part, curvature)
        run += part
        if run >= s:
            break
    turn = heading - h
    R = rot_z(turn)[:2, :2]
    start = point - R @ np.array([x, y])
    return Road(float(start[0]), float(start[1]), turn, arcs, lanes, width, median, parking)


def wanted_speed(style: str, lanes: int) -> float:
    """The speed [m/s] that a street shows to be wanted: its neighbourhood, and its lanes for each direction."""
    return {"residential": 6.0, "park": 7.5, "downtown": 8.0, "industry": 9.0, "avenue": 10.5}[style] + 1.5 * (lanes - 1)


def plan_ego(r: np.random.Generator, net: Net, middle: float, duration: float, style: str = ""):
    """What ego does -> name, path, start on it [m], pose of a vehicle to overtake or None.

    On an open road ego would be at the manoeuvre (the bend, the lane change, the vehicle to overtake) at a random time
    of the scene; traffic and lights may hold it up. style: of a world whose plans can be read off its images
    (data/driving/__init__.py): there the time lies inside the scene and a light may turn as ego comes.
    """
    plan = str(r.choice(["straight", "left", "right", "lane change", "overtake"], p=[0.18, 0.25, 0.25, 0.16, 0.16]))
    if not net.junctions and plan in ("left", "right"):
        plan = "straight"
    when = WARM_UP + float(r.uniform(-0.5, duration + 0.8))       # [s] from the start of the simulation
    direction, speed = int(r.choice([-1, 1])), float(r.uniform(6.0, 11.5))
    number, road, at = None, 0, middle + r.uniform(-25, 25)
    if style:
        when = WARM_UP + float(r.uniform(0.8, max(0.9, duration - 0.7)))
        speed = wanted_speed(style, net.roads[0].lanes) * float(r.uniform(0.94, 1.06))
    if plan in ("lane change", "overtake"):
        for _ in range(20):                                       # well away from junctions
            at = middle + r.uniform(-55, 55)
            if all(abs(j.s - at) > 30 for j in net.junctions):
                break
    elif plan in ("left", "right") or (net.junctions and r.random() < (0.8 if style else 0.35)):
        number = int(np.argmin([abs(j.s - middle) for j in net.junctions]))
        junction = net.junctions[number]
        road, at = (junction.road, junction.s) if r.random() < 0.65 else (junction.other, junction.s_other)
        if not net.roads[road].start_open:
            direction = -1
        if junction.signals and r.random() < 0.7:                 # mostly green when ego comes
            middle_of_green = 3.25 if road == junction.road else 10.75
            net.junctions[number] = junction._replace(green=when - WARM_UP - middle_of_green + float(r.uniform(-2, 2)))
        if junction.signals and style and r.random() < 0.6:       # it turns red before ego, or lets it start
            end, begin = (6.5, 15.0) if road == junction.road else (14.0, 7.5)
            turns = float(r.uniform(-1, duration - 1))
            net.junctions[number] = junction._replace(green=turns - (end if r.random() < 0.5 else begin))
    here = net.roads[road]
    outer = (plan == "right") == (net.side > 0)
    lane = int(r.integers(here.lanes)) if plan not in ("left", "right") else (here.lanes - 1 if outer else 0)

    def choose(j, options):
        if plan in options and j == number:
            return plan
        return "straight" if "straight" in options else options[r.integers(len(options))]

    before = speed * when + 12                                    # [m] of path ahead of the manoeuvre
    points, stops = net.lane_points(road, direction, lane, at - direction * before, before + 13 * (duration + 2) + 60,
                                    choose)
    path = make_path(points, stops, speed)
    # [s] at every point of the path
    arrival = np.concatenate([[0], np.cumsum(0.5 / np.maximum(path.limit[:-1], 1))])
    turn = min(int(before / 0.5), len(arrival) - 1)
    start = 0.5 * float(np.searchsorted(arrival, arrival[turn] - when))
    base, wave, phase = r.normal(0, 0.22), r.uniform(0, 0.2), r.uniform(0, 6)
    smooth = lambda u: np.clip(u, 0, 1) ** 2 * (3 - 2 * np.clip(u, 0, 1))       # noqa: E731
    blocker, aside = None, None
    if plan == "lane change" and here.lanes > 1:
        to = here.lane_width * (1 if lane > 0 else -1) * net.side
        aside = lambda q: to * smooth((q - before + 11) / 22)  # noqa: E731
    elif plan == "overtake" and lane == here.lanes - 1 and not any(
            (j.road == road and abs(j.s - at) < 30) or (j.other == road and abs(j.s_other - at) < 30)
            for j in net.junctions):
        out = (2.2 if here.lanes == 1 else 2.7) * net.side
        d = here.lane(net.side, direction, lane) - net.side * direction * (here.lane_width / 2 - 0.75)
        x, y, heading = here.at(at, d)
        blocker = (x, y, heading + (np.pi if direction < 0 else 0))
        aside = lambda q: out * smooth((q - before + 17) / 11) * smooth((before + 18 - q) / 11)  # noqa: E731
    elif plan in ("lane change", "overtake"):
        plan = "straight"
    shift = lambda q: base + wave * np.sin(q / 15 + phase) + (aside(q) if aside else 0 * q)  # noqa: E731
    return plan, make_path(points, stops, speed, shift), start, blocker
