"""Lane paths, traffic by rules, and the City that puts a scene together. See data/city.py for roads and buildings, data/objects.py for things.

    paths        a Net's lanes, followed through junctions with smooth turns, shifted sideways for lane changes and overtaking
    simulation   vehicles, ego the first, under the Intelligent Driver Model (Treiber et al. 2000) against whatever is on the path ahead
                 and against red lights; people walk at their own pace
    City         one scene: `scene(t)` is the renderer's scene at time t [s], `pose(i, t)` where actor i is, `ego(t)` the ego pose.
                 Everything is drawn from one seeded generator. Global frame: metres, x, y >= 0, z up, road surface at z = 0.
"""

from typing import NamedTuple

import cv2
import numpy as np

from data.city import (EGO_SIZE, ID, SHADE_CELL, TICK, WARM_UP, Builder, CityGround, Junction, Road, _along, _backdrop, _crossing_structure,
                       _frontage, _furniture, _style, _traffic_light, _weather, linear, rectangle, rot_y, rot_z)
from data.objects import (BENDY, BUS, CHILD, MOTORCYCLE, PEDESTRIAN, POLICE, SCOOTER, WORKER, Model, barrier, bicycle, bus, car, cone,
                          construction, debris, dog, motorcycle, pedestrian, pushable, rack, stroller, trailer, truck)
from data.render import ELLIPSOID, PrimitiveList, Primitives, Scene, corners


# --- actors and paths -------------------------------------------------------------------------------------------------

class Path(NamedTuple):
    """Points every 0.5 m: xy (L, 2), yaw (L,) unwrapped, limit (L,) [m/s]; stops: (arc length, junction, on the through road)."""

    xy: np.ndarray
    yaw: np.ndarray
    limit: np.ndarray
    stops: list[tuple[float, int, bool]]

    def at(self, s: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Arc length (...) -> x, y, yaw."""
        u = np.clip(np.asarray(s, np.float64) / 0.5, 0, len(self.yaw) - 1.001)
        i = u.astype(int)
        f = u - i
        a, b = self.xy[i], self.xy[i + 1]
        return (a[..., 0] + f * (b[..., 0] - a[..., 0]), a[..., 1] + f * (b[..., 1] - a[..., 1]),
                self.yaw[i] + f * (self.yaw[i + 1] - self.yaw[i]))


def make_path(points: np.ndarray, stops, speed: float, shift=None) -> Path:
    """Polyline (n, 2) -> Path: resampled, smoothed, moved sideways by shift(s) [m], speed limited by curvature (2 m/s^2)."""
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
    """One annotated thing. A mover has `path` and, after the simulation, s and v at every tick; else `pose` x, y, yaw."""

    def __init__(self, model: Model, pose=None, path: Path | None = None, start: float = 0.0, speed: float = 0.0, idm: bool = True,
                 attribute: str = ""):
        self.model, self.pose, self.path, self.start, self.speed, self.idm, self.attribute = model, pose, path, start, speed, idm, attribute
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
    roads: list[Road]
    junctions: list[Junction]
    side: int                       # 1: traffic keeps right, -1: left

    def lane_points(self, road: int, direction: int, lane: int, s0: float, length: float, choose) -> tuple[np.ndarray, list]:
        """Follows a lane for `length` [m]; choose(junction, options) -> "straight", "left" or "right" -> points (n, 2), stops."""
        points, stops, total, s = [], [], 0.0, s0
        passed = set()
        while total < length:
            r = self.roads[road]
            lane = min(lane, r.lanes - 1)
            d = r.lane(self.side, direction, lane)
            ahead = []
            for j, junction in enumerate(self.junctions):
                for here, at, there, s_there, main in ((junction.road, junction.s, junction.other, junction.s_other, True),
                                                       (junction.other, junction.s_other, junction.road, junction.s, False)):
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
            curve = (1 - f) ** 3 * a + 3 * f * (1 - f) ** 2 * (a + reach * ta) + 3 * f * f * (1 - f) * (b - reach * tb) + f ** 3 * b
            points += [tuple(q) for q in curve]
            total += float(np.linalg.norm(np.diff(curve, axis=0), axis=1).sum())
            road, direction, lane, s = there, way, new_lane, s_new + way * 0.5
        return np.array(points), stops


# --- simulation -------------------------------------------------------------------------------------------------------

def _circles(x, y, yaw, length, width):
    """Three circles that cover a vehicle -> (n, 3, 2), radius (n,)."""
    off = np.array([-1, 0, 1]) * (length[:, None] - width[:, None]) / 2
    return np.stack([x[:, None] + off * np.cos(yaw)[:, None], y[:, None] + off * np.sin(yaw)[:, None]], -1), width / 2


def simulate(actors: list[Actor], junctions: list[Junction], ticks: int) -> None:
    """Fills s and v of every mover. The first is ego. Intelligent Driver Model against the nearest thing on the path ahead."""
    for a in actors:
        if a.path is not None and not a.idm:
            a.v = np.full(ticks, a.speed)
            a.s = a.start + a.speed * TICK * np.arange(ticks)
    drivers = [a for a in actors if a.path is not None and a.idm]
    walkers = [a for a in actors if a.path is not None and not a.idm]
    still = [a for a in actors if a.path is None and a.model.size[2] > 0.3]
    M = len(drivers)
    length = np.array([a.model.size[0] for a in drivers])
    width = np.array([a.model.size[1] for a in drivers])
    longest = max(len(a.path.yaw) for a in drivers)
    pad = lambda v: np.concatenate([v, np.repeat(v[-1:], longest - len(v), 0)])     # noqa: E731
    xy, yaw, limit = (np.stack([pad(getattr(a.path, k)) for a in drivers]) for k in ("xy", "yaw", "limit"))
    s = np.array([a.start for a in drivers], np.float64)
    rows = np.arange(M)
    v = 0.8 * limit[rows, (s / 0.5).astype(int)]
    if still:
        pose = np.array([a.pose for a in still])
        fixed, fixed_r = _circles(pose[:, 0], pose[:, 1], pose[:, 2], np.array([max(a.model.size[:2]) for a in still]),
                                  np.array([min(a.model.size[:2]) for a in still]))
        swap = np.array([a.model.size[1] > a.model.size[0] for a in still])          # a barrier's long side is its width
        turned, _ = _circles(pose[:, 0], pose[:, 1], pose[:, 2] + np.pi / 2, np.array([max(a.model.size[:2]) for a in still]),
                             np.array([min(a.model.size[:2]) for a in still]))
        fixed = np.where(swap[:, None, None], turned, fixed).reshape(-1, 2)
        fixed_r = np.repeat(fixed_r, 3)
        near = np.zeros(len(fixed), bool)
        for i in range(M):
            d = np.linalg.norm(fixed[:, None] - xy[i][None, ::8], axis=2).min(1)
            near |= d < 6
        fixed, fixed_r = fixed[near], fixed_r[near]
    else:
        fixed, fixed_r = np.zeros((0, 2)), np.zeros(0)
    look = np.arange(0.6, 40, 1.2)
    S, V = np.zeros((ticks, M)), np.zeros((ticks, M))
    own = np.repeat(np.eye(M, dtype=bool), 3, axis=1)
    for tick in range(ticks):
        S[tick], V[tick] = s, v
        now = tick * TICK - WARM_UP
        i = np.minimum((s / 0.5).astype(int), longest - 2)
        circles, radius = _circles(xy[rows, i, 0] + (s / 0.5 - i) * (xy[rows, i + 1, 0] - xy[rows, i, 0]),
                                   xy[rows, i, 1] + (s / 0.5 - i) * (xy[rows, i + 1, 1] - xy[rows, i, 1]), yaw[rows, i], length, width)
        ahead = np.minimum(((s + length / 2)[:, None] + look) / 0.5, longest - 1).astype(int)
        points, heading = xy[rows[:, None], ahead], yaw[rows[:, None], ahead]        # (M, A, 2)
        feet = np.array([a.path.at(a.s[tick])[:2] for a in walkers]).reshape(-1, 2)
        things = np.concatenate([circles.reshape(-1, 2), fixed, feet])
        r = np.concatenate([np.repeat(radius, 3), fixed_r, np.full(len(feet), 0.45)])
        speed = np.concatenate([np.repeat(v, 3), np.zeros(len(fixed) + len(feet))])
        way = np.concatenate([np.repeat(yaw[rows, i], 3), np.zeros(len(fixed) + len(feet))])
        distance = np.sqrt(((points[:, :, None] - things[None, None]) ** 2).sum(-1))              # (M, A, things)
        hit = distance < (width[:, None, None] / 2 + r + 0.2)
        hit[:, :, :3 * M] &= ~own[:, None]
        first = np.where(hit.any(2), look, np.inf)
        k = first.argmin(1)
        gap = first[rows, k]
        blocker = hit[rows, k].argmax(1)
        lead = np.where(np.isfinite(gap), speed[blocker] * np.cos(way[blocker] - heading[rows, k]), 0).clip(0)
        for m, a in enumerate(drivers):
            for stop, j, main in a.path.stops:
                d = stop - (s[m] + length[m] / 2)
                if -0.5 < d < 40 and junctions[j].signals and red(junctions[j], main, now) and v[m] ** 2 / 9 < d + 0.5 and d < gap[m]:
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
    phase = (t - junction.green) % 15
    return phase >= 6.5 if main else not 7.5 <= phase < 14


def _clashes(actors: list[Actor], times: np.ndarray) -> set[int]:
    """Indices of movers to take away because they run into others. Ego and still things stay; the higher index goes."""
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
                if d < 0.93 * (r[i] + r[j]):
                    gone.add(j if moving[j] and j else i)
    gone.discard(0)
    return gone


# --- the city ---------------------------------------------------------------------------------------------------------

class City:
    """One scene. `actors[0]` is ego (no primitives); all others are annotated objects with instance = their index."""

    def __init__(self, seed_words: list[int], duration: float, singapore: bool):
        r = np.random.default_rng(seed_words)
        self.rng, self.duration = r, duration
        self.size = 300.0 + 12 * max(duration - 2, 0)
        self.style = _style(r, singapore)
        self.weather, self.light = _weather(r)
        self.net, self.middle = _network(r, self.size, -1 if singapore else 1)
        self.ground = CityGround(self.net.roads, self.size, r, self.style)
        self.builder = Builder(self.ground, r, self.style)
        self.ticks = int((WARM_UP + duration + 1.0) / TICK) + 2
        self.lamps: list = []
        self.signals: list = []
        self.plan, ego_path, ego_start, blocker = _ego_plan(r, self.net, self.middle, duration)
        self.actors = [Actor(Model(ID["vehicle.ego"], EGO_SIZE, PrimitiveList().build(), np.zeros(0), np.zeros(0), np.zeros(0, bool)),
                             path=ego_path, start=ego_start)]
        self._street_life(ego_path, ego_start, blocker)
        self._stand_still()
        simulate(self.actors, self.net.junctions, self.ticks)
        gone = _clashes(self.actors, np.arange(-0.5, duration + 0.6, 0.25))
        self.actors = [a for i, a in enumerate(self.actors) if i not in gone]
        self._finish()

    # what stands
    def _stand_still(self) -> None:
        """Furniture, buildings, backdrop; after the objects, so that these find the free places."""
        b, r = self.builder, self.rng
        reach = 95 + 6 * self.duration
        spans = []
        for i, road in enumerate(self.net.roads):
            mid = self.middle if i == 0 else next(j.s_other for j in self.net.junctions if j.other == i)
            low = max(mid - reach, 0 if not road.start_open else -1e9)
            spans.append((road, low, mid + reach))
        for j, junction in enumerate(self.net.junctions):
            if junction.signals:
                self._junction_lights(j, junction)
        if r.random() < 0.4:
            _crossing_structure(b, self.net.roads[0], self.middle + r.choice([-1, 1]) * r.uniform(12, 45))
        for road, low, high in spans:
            _furniture(b, road, low, high, self.lamps)
        for road, low, high in spans:
            for side in (-1, 1):
                _frontage(b, road, side, low + r.uniform(0, 6), high)
        _backdrop(b, np.array([self.size, self.size]) / 2, self.size / 2 - 12)

    def _junction_lights(self, j: int, junction: Junction) -> None:
        side = self.net.side
        for road, s, cross, main in ((junction.road, junction.s, junction.other, True), (junction.other, junction.s_other, junction.road, False)):
            road, cross = self.net.roads[road], self.net.roads[cross]
            for direction in (1, -1):
                if not road.start_open and direction > 0 and s < 5:
                    continue
                at = s - direction * (cross.carriageway() + 6.5)
                d = -side * direction
                half = float(road.half_width(np.array([d]), np.array([at]))[0])
                x, y, heading = road.at(at, d * (half + 0.6))
                yaw = heading + (np.pi if direction < 0 else 0)
                if self.builder.claim(x, y, yaw, 0.5, 0.5, 0.1, 0.2):
                    _traffic_light(self.builder, x, y, yaw if side > 0 else yaw, self.signals, j, main) if side > 0 else \
                        _traffic_light_left(self.builder, x, y, yaw, self.signals, j, main)

    # what moves or could
    def _street_life(self, ego_path: Path, ego_start: float, blocker) -> None:
        r, net = self.rng, self.net
        self._moving_vehicles(ego_path, ego_start)
        if blocker is not None:
            x, y, yaw = blocker
            model = truck(r) if r.random() < 0.4 else car(r)
            self._park(model, x, y, yaw, "vehicle.stopped", margin=0.1)
        near = self._ego_places(ego_path, ego_start)
        self._rare_things(near)
        self._parked()
        self._walkers()

    def _park(self, model: Model, x, y, yaw, attribute: str = "", margin: float = 0.15, least_edge=None) -> bool:
        if not self.builder.claim(x, y, yaw, model.size[0], model.size[1], margin, least_edge):
            return False
        self.actors.append(Actor(model, pose=(float(x), float(y), float(yaw)), attribute=attribute))
        return True

    def _ego_places(self, path: Path, start: float) -> list[tuple[int, float, int]]:
        """Places beside what ego passes: (road, s, side of d), shuffled."""
        places = []
        for s in np.arange(start + 5, start + 45 + 9 * self.duration, 4.0):
            x, y, _ = path.at(s)
            d, at = min(((abs(road.locate(np.float32([[x, y]]))[0][0]), i) for i, road in enumerate(self.net.roads)))
            s_on = float(self.net.roads[at].locate(np.float32([[x, y]]))[1][0])
            places += [(at, s_on, 1), (at, s_on, -1)]
        self.rng.shuffle(places)
        return places

    def _kerb(self, place, beyond: float) -> tuple[float, float, float]:
        """A point `beyond` [m] outside the carriageway's edge (negative: on it) and the heading of the lane beside it."""
        i, s, side = place
        road = self.net.roads[i]
        half = float(road.half_width(np.array([side]), np.array([s]))[0])
        x, y, heading = road.at(s, side * (half + beyond))
        return x, y, heading + (np.pi if side * self.net.side > 0 else 0)

    def _rare_things(self, places: list) -> None:
        """The rare classes, a few each, near ego's way: each scene lacks about a quarter of them."""
        r = self.rng
        def parked_big(model):                                    # at the kerb or behind the pavement
            w = model.size[1]
            for place in places:
                road = self.net.roads[place[0]]
                bay = road.parking[0 if place[2] > 0 else 1]
                for beyond, edge in ((-w / 2 - 0.15, None), (w / 2 + 0.4, 0.25)):
                    if beyond < 0 and bay < w - 0.6:
                        continue
                    x, y, yaw = self._kerb(place, beyond)
                    if beyond < 0:
                        half = float(road.half_width(np.array([place[2]]), np.array([place[1]]))[0])
                        if half - w - 0.3 < road.carriageway() - 0.4 or self._near_junction(x, y, 9):
                            continue
                    if self._park(model, x, y, yaw + r.normal(0, 0.02), "vehicle.parked", least_edge=edge):
                        return
        def on_pavement(model, attribute, yaw_offset=None):
            for place in places:
                x, y, yaw = self._kerb(place, r.uniform(0.6, max(0.8, self.style.verge + self.style.pavement - 0.4)))
                turn = r.uniform(-3.1, 3.1) if yaw_offset is None else yaw_offset + r.normal(0, 0.1)
                if self._park(model, x, y, yaw + turn, attribute, 0.1, 0.1):
                    return place
            return None
        has = lambda p: r.random() < p                            # noqa: E731
        if has(0.72):
            parked_big(construction(r))
        if has(0.72):
            parked_big(trailer(r))
        if has(0.5):
            parked_big(bus(r, BENDY if has(0.15) else BUS))
        if has(0.75):
            parked_big(truck(r))
        for _ in range(r.poisson(1.3)):
            on_pavement(bicycle(r, False), "cycle.without_rider")
        for _ in range(r.poisson(1.2)):
            on_pavement(motorcycle(r, False), "cycle.without_rider", r.choice([0, np.pi / 2]))
        if has(0.2):
            on_pavement(rack(r), "", np.pi / 2)
        for _ in range(r.poisson(1.2)):
            on_pavement(pushable(r), "")
        for _ in range(r.poisson(0.8)):
            on_pavement(debris(r), "")
        if has(0.8):
            self._road_works(places)
        for place in places[:int(r.poisson(1.0))]:                # single cones at the kerb
            x, y, yaw = self._kerb(place, -0.35)
            self._park(cone(r), x, y, yaw, "", 0.05)

    def _near_junction(self, x: float, y: float, margin: float) -> bool:
        return float(self.ground.read(np.float32([x]), np.float32([y]))[3][0]) < margin

    def _road_works(self, places: list) -> None:
        """Cones and a row of barriers along a kerb, with workers behind."""
        r = self.rng
        color = linear(0.9, 0.35, 0.1) if r.random() < 0.5 else linear(0.75, 0.74, 0.72)
        for place in places:
            i, s, side = place
            x, y, _ = self._kerb(place, 0)
            if self._near_junction(x, y, 14):
                continue
            n, placed = int(r.integers(3, 8)), 0
            beyond = 0.45 if self.net.roads[i].parking[0 if side > 0 else 1] == 0 else r.choice([0.45, -0.6])
            mixed = r.random() < 0.3
            for k in range(n):
                x, y, yaw = self._kerb((i, s + k * 2.05, side), beyond)
                tone = linear(0.85, 0.85, 0.83) if mixed and k % 2 else color
                placed += self._park(barrier(r, tone), x, y, yaw + np.pi / 2 + r.normal(0, 0.03), "", 0.0)
            for k in range(int(r.integers(2, 6))):
                x, y, yaw = self._kerb((i, s - 2.0 - 1.8 * k, side), beyond + 0.2 * k * np.sign(beyond) + r.normal(0, 0.05))
                self._park(cone(r), x, y, yaw, "", 0.02)
            for _ in range(r.poisson(1.2)):
                x, y, yaw = self._kerb((i, s + r.uniform(0, 2 * n), side), beyond + r.uniform(0.8, 1.8))
                self._park(pedestrian(r, WORKER), x, y, r.uniform(-3, 3), "pedestrian.standing", 0.05, 0.2)
            if placed:
                return

    def _parked(self) -> None:
        """Vehicles in the parking bays."""
        r = self.rng
        for i, road in enumerate(self.net.roads):
            mid = self.middle if i == 0 else next(j.s_other for j in self.net.junctions if j.other == i)
            for side, bay in ((1, road.parking[0]), (-1, road.parking[1])):
                if bay == 0:
                    continue
                for s in np.arange(mid - 75 - 5 * self.duration, mid + 75 + 5 * self.duration, 6.2):
                    if s < 4 and not road.start_open or r.random() > self.style.parking:
                        continue
                    model = r.choice([0, 1, 2, 3], p=[0.9, 0.05, 0.03, 0.02])
                    model = [car, truck, lambda r: motorcycle(r, False), lambda r: car(r, ID["vehicle.emergency.police"])][model](r)
                    half = float(road.half_width(np.array([side]), np.array([s]))[0])
                    if half - model.size[1] - 0.2 < road.carriageway() - 0.5:
                        continue
                    x, y, heading = road.at(s, side * (half - 0.15 - model.size[1] / 2))
                    if self._near_junction(x, y, 8):
                        continue
                    yaw = heading + (np.pi if side * self.net.side > 0 else 0) + r.normal(0, 0.025)
                    cycle = model.semantic == MOTORCYCLE
                    self._park(model, x, y, yaw, "cycle.without_rider" if cycle else "vehicle.parked", 0.05)
                    if cycle is False and r.random() < 0.01:
                        self.actors[-1].attribute = "vehicle.stopped"

    def _moving_vehicles(self, ego_path: Path, ego_start: float) -> None:
        r, net = self.rng, self.net
        dense = r.uniform(0.5, 1.6)
        taken = [np.array(ego_path.at(ego_start)[:2])]
        choose = lambda j, options: options[r.integers(len(options))]                     # noqa: E731
        for i, road in enumerate(net.roads):
            mid = self.middle if i == 0 else next(j.s_other for j in net.junctions if j.other == i)
            for direction in (1, -1):
                for lane in range(road.lanes):
                    s = mid - 100 + r.uniform(0, 30)
                    while s < mid + 110:
                        s += r.exponential(26) / dense + 10
                        if not road.start_open and s < 15:
                            continue
                        kind = r.choice(6, p=[0.76, 0.07, 0.05, 0.03, 0.05, 0.04])
                        model = [car, truck, bus, trailer, lambda q: motorcycle(q, True), lambda q: car(q, ID["vehicle.emergency.ambulance"])][
                            kind if kind != 3 else 1](r)
                        x, y, _ = road.at(s, road.lane(net.side, direction, lane))
                        here = np.array([x, y])
                        if min(np.linalg.norm(here - q) for q in taken) < 8 + model.size[0] / 2 or self._near_junction(x, y, 1):
                            continue
                        taken.append(here)
                        speed = r.uniform(6, 12.5)
                        points, stops = net.lane_points(road=i, direction=direction, lane=lane, s0=s,
                                                        length=13 * (self.duration + WARM_UP) + 50, choose=choose)
                        drift, phase = r.normal(0, 0.2), r.uniform(0, 6)
                        if model.semantic == MOTORCYCLE:
                            drift *= 3
                        path = make_path(points, stops, speed, lambda q, a=drift, b=phase: a + 0.12 * np.sin(q / 17 + b))
                        self.actors.append(Actor(model, path=path, speed=speed))
        for _ in range(r.poisson(1.2)):                           # cyclists on the carriageway's edge
            i, direction = int(r.integers(len(net.roads))), int(r.choice([-1, 1]))
            road = net.roads[i]
            s = (self.middle if i == 0 else 30) + r.uniform(-30, 30)
            if not road.start_open and s < 15:
                continue
            points, stops = net.lane_points(i, direction, road.lanes - 1, s, 7 * (self.duration + WARM_UP) + 40, choose)
            edge = -net.side * (road.lane_width / 2 - 0.45)
            self.actors.append(Actor(bicycle(r, True), path=make_path(points, stops, r.uniform(3.5, 6), lambda q, e=edge: e + 0 * q), speed=5))

    def _walkers(self) -> None:
        """People on the pavements, at crossings, in groups, standing; children, a police officer, strollers, dogs, scooters."""
        r, net, style = self.rng, self.net, self.style
        count = int(r.poisson({"downtown": 22, "avenue": 13, "residential": 9, "park": 10, "industry": 5}[style.name]))
        for _ in range(count):
            i = int(r.integers(len(net.roads)))
            road = net.roads[i]
            mid = self.middle if i == 0 else next(j.s_other for j in net.junctions if j.other == i)
            s, side = mid + r.normal(0, 28), int(r.choice([-1, 1]))
            if not road.start_open and s < 12:
                continue
            semantic = int(r.choice([PEDESTRIAN, CHILD, POLICE, SCOOTER], p=[0.87, 0.07, 0.03, 0.03]))
            outer = style.verge + 1.0 + r.uniform(0, max(style.pavement - 1.5, 0.3))
            group = 1 + int(r.random() < 0.25)
            for g in range(group):
                model = pedestrian(r, semantic)
                walk = r.random()
                half = float(road.half_width(np.array([side]), np.array([s]))[0])
                if walk < 0.62:
                    direction, speed = int(r.choice([-1, 1])), float(r.uniform(0.8, 1.7)) * (2.5 if semantic == SCOOTER else 1)
                    d = side * (half + outer + 0.7 * g)
                    span = np.arange(-8, speed * (self.duration + WARM_UP + 2) + 8, 0.7)
                    edges = side * (road.half_width(np.full(len(span), side), s + direction * span) + outer + 0.7 * g)
                    points = np.array([road.at(s + direction * u, e)[:2] for u, e in zip(span, edges)])
                elif walk < 0.74 and self.style.crossings and net.junctions:     # at a crossing
                    junction = net.junctions[int(r.integers(len(net.junctions)))]
                    main = net.roads[junction.road]
                    cross = net.roads[junction.other]
                    at = junction.s + int(r.choice([-1, 1])) * (cross.carriageway() + 3.3 + r.uniform(-1, 1))
                    speed, direction = float(r.uniform(1.0, 1.6)), int(r.choice([-1, 1]))
                    reach = main.carriageway() + 12
                    points = np.array([main.at(at, direction * d)[:2] for d in np.arange(-reach, reach + 18, 0.7)])
                else:
                    seated = semantic == PEDESTRIAN and r.random() < 0.2
                    x, y, heading = road.at(s + 0.3 * g, side * (half + outer + 0.7 * g))
                    if self.ground.edge(np.float32([x]), np.float32([y]))[0] > 0.3:
                        self._park(pedestrian(r, seated=True) if seated else model, x, y, heading + r.uniform(-3, 3),
                                   "pedestrian.sitting_lying_down" if seated else "pedestrian.standing", 0.02)
                    continue
                path = make_path(points, [], speed)
                start = float(r.uniform(0, 6))
                self.actors.append(Actor(model, path=path, start=start, speed=speed, idm=False))
                if r.random() < 0.06:                             # a companion on four legs or wheels, a step ahead
                    other = dog(r) if r.random() < 0.5 else stroller(r)
                    self.actors.append(Actor(other, path=path, start=start + 1.1, speed=speed, idm=False))

    # freezing
    def _finish(self) -> None:
        """Stacks primitives and lights; from here on the city only answers questions."""
        static = self.builder.list.build()
        fixed, moving = [], []
        for index, a in enumerate(self.actors):
            parts = a.model.parts._replace(instance=np.full(len(a.model.parts.kind), index, np.int32))
            if a.path is None:
                x, y, yaw = a.pose
                z = float(self.ground.height([x], [y])[0])
                R = rot_z(yaw)
                fixed.append(parts._replace(center=parts.center @ R.T + [x, y, z], rotation=R @ parts.rotation))
            else:
                moving.append((index, parts, a))
        self.static = Primitives.join([static, *fixed]) if fixed else static
        self.static_corners = corners(self.static)
        self.movers = [i for i, _, _ in moving if i != 0]
        if moving:
            self.mobile = Primitives.join([p for _, p, _ in moving])
            self.mobile_actor = np.concatenate([np.full(len(p.kind), k) for k, (_, p, _) in enumerate(moving)])
            self.swing = np.concatenate([a.model.swing for _, _, a in moving])
            self.hip = np.concatenate([a.model.hip for _, _, a in moving])
            self.brake = np.concatenate([a.model.brake for _, _, a in moving])
            self.moving = [a for _, _, a in moving]
        self._bake_light()

    def _bake_light(self) -> None:
        """Shadows of everything that stands (their outline swept along the sun), pools of street light."""
        raster = self.ground.static_light
        sun = np.asarray(self.light.sun)
        shift = -sun[:2] / max(sun[2], 0.2)
        p = self.static
        shadow = np.full(raster.shape[:2], 255, np.uint8)
        if max(self.light.sun_color) > 0.5:
            c = self.static_corners
            tall = (c[..., 2].max(1) - c[..., 2].min(1) > 0.25) & (p.instance < 0)
            for k in np.nonzero(tall)[0]:
                _shadow(shadow, c[k], shift, p.kind[k] == ELLIPSOID)
            for k in np.nonzero((p.instance >= 0))[0]:
                _shadow(shadow, c[k], shift, False)
            shadow = cv2.GaussianBlur(shadow, (5, 5), 1.0)
        lamps = np.zeros(raster.shape[:2], np.float32)
        if self.light.night > 0:
            for x, y in self.lamps:
                n, j, i = 60, int(x / SHADE_CELL), int(y / SHADE_CELL)
                if n < i < len(lamps) - n and n < j < len(lamps) - n:
                    dy, dx = np.mgrid[-n:n + 1, -n:n + 1] * SHADE_CELL
                    lamps[i - n:i + n + 1, j - n:j + n + 1] += np.exp(-(dx ** 2 + dy ** 2) / 38)
        raster[..., 0], raster[..., 1] = shadow, np.clip(lamps, 0, 1) * 255

    # answers
    def ego(self, t: float) -> np.ndarray:
        """-> T_global_ego (4, 4) at time t [s]: rear axle on the road; the body pitches with acceleration and rolls a little."""
        x, y, yaw, speed, acceleration = self.actors[0].state(t)
        wobble = min(speed / 5, 1.0)
        pitch = -0.0025 * acceleration + wobble * 0.0022 * np.sin(1.9 * t + x)
        roll = wobble * 0.003 * np.sin(1.3 * t + y)
        c, s = np.cos(roll), np.sin(roll)
        T = np.eye(4)
        T[:3, :3] = rot_z(yaw) @ rot_y(pitch) @ np.array([[1, 0, 0], [0, c, -s], [0, s, c]])
        T[:3, 3] = x, y, 0
        return T

    def pose(self, index: int, t: float) -> np.ndarray:
        """-> T_global_object (4, 4): origin on the ground under the box's centre."""
        x, y, yaw = self.actors[index].state(t)[:3]
        T = np.eye(4)
        T[:3, :3] = rot_z(yaw)
        T[:3, 3] = x, y, self.ground.height([x], [y])[0]
        return T

    def mobile_at(self, t: float) -> Primitives:
        """The movers' primitives at time t."""
        states = np.array([a.state(t) for a in self.moving])
        z = self.ground.height(states[:, 0], states[:, 1])
        k = self.mobile_actor
        yaw, speed = states[k, 2], states[k, 3]
        travelled = np.array([float(np.interp((t + WARM_UP) / TICK, np.arange(len(a.s)), a.s)) for a in self.moving])[k]
        angle = self.swing * np.sin(4.2 * travelled) * np.minimum(speed, 1)
        cs, sn = np.cos(angle), np.sin(angle)
        center, rotation = self.mobile.center, self.mobile.rotation
        rel = center - np.stack([0 * self.hip, 0 * self.hip, self.hip], 1)
        swung = np.stack([cs * rel[:, 0] + sn * rel[:, 2], rel[:, 1], -sn * rel[:, 0] + cs * rel[:, 2] + self.hip], 1)
        S = np.zeros((len(k), 3, 3))
        S[:, 0, 0], S[:, 0, 2], S[:, 1, 1], S[:, 2, 0], S[:, 2, 2] = cs, sn, 1, -sn, cs
        c, s = np.cos(yaw), np.sin(yaw)
        R = np.zeros((len(k), 3, 3))
        R[:, 0, 0], R[:, 0, 1], R[:, 1, 0], R[:, 1, 1], R[:, 2, 2] = c, -s, s, c, 1
        world = np.einsum("pij,pj->pi", R, swung) + np.stack([states[k, 0], states[k, 1], z[k]], 1)
        braking = np.array([a[4] < -0.6 or a[3] < 0.3 for a in states])[k]
        glow = np.where(self.brake & braking, 2.5, 0).astype(np.float32)
        return self.mobile._replace(center=world, rotation=R @ S @ rotation, glow=glow)

    def scene(self, t: float, light: bool = True) -> Scene:
        """The renderer's scene at time t. light=False leaves out what only colours need."""
        static = self.static
        if light and self.signals:
            glow = static.glow.copy()
            for row, j, main, i in self.signals:
                stop = red(self.net.junctions[j], main, t)
                glow[row] = 2.0 if (i == 0 and stop) or (i == 2 and not stop) else 0.02
            static = static._replace(glow=glow)
        mobile = self.mobile_at(t)
        self.ground.light_raster = self.ground.static_light
        setting = self.light
        if light:
            if max(setting.sun_color) > 0.2 or setting.night == 0:
                raster = self.ground.static_light.copy()
                layer = np.ascontiguousarray(raster[..., 0])
                sun = np.asarray(setting.sun)
                shift = -sun[:2] / max(sun[2], 0.2) * (max(setting.sun_color) > 0.5)
                for a in self.moving[1:]:
                    x, y, yaw = a.state(t)[:3]
                    length, width, height = a.model.size
                    foot = rectangle(x, y, yaw, 0.96 * length, 0.9 * width)
                    _shadow(layer, np.concatenate([np.pad(foot, ((0, 0), (0, 1)), constant_values=z) for z in (0.0, 0.9 * height)]), shift, False)
                raster[..., 0] = layer
                self.ground.light_raster = raster
            if setting.night > 0.3:
                x, y, yaw = self.actors[0].state(t)[:3]
                setting = setting._replace(headlight=(x + 3.4 * np.cos(yaw), y + 3.4 * np.sin(yaw), yaw, 1.2 * setting.night))
        return Scene(Primitives.join([static, mobile]), self.ground, setting, np.concatenate([self.static_corners, corners(mobile)]))


def _shadow(raster: np.ndarray, c: np.ndarray, shift: np.ndarray, round_: bool) -> None:
    """Darkens the ground where a box with corners c (8, 3) stands between it and the sun."""
    points = c[:, :2] + c[:, 2:].clip(0) * shift
    pixels = np.round(points / SHADE_CELL).astype(np.int32)
    if (pixels.max(0) < 0).any() or (pixels.min(0) > len(raster)).any():
        return
    if round_:
        middle, span = points.mean(0) / SHADE_CELL, (points.max(0) - points.min(0)) / SHADE_CELL / 2
        cv2.ellipse(raster, tuple(int(v) for v in middle), tuple(int(v) for v in np.maximum(span * 0.85, 1)), 0, 0, 360, 40, -1)
    else:
        cv2.fillConvexPoly(raster, cv2.convexHull(pixels), 30)


def _traffic_light_left(b: Builder, x, y, yaw, signals, junction, main) -> None:
    """Where traffic keeps left the arm reaches to the other side."""
    before = len(b.list.rows)
    _traffic_light(b, x, y, yaw, signals, junction, main)
    across = np.array([-np.sin(yaw), np.cos(yaw)])
    for k in range(before, len(b.list.rows)):
        row = list(b.list.rows[k])
        center = np.array(row[1], float)
        u = (center[:2] - [x, y]) @ across
        center[:2] -= 2 * u * across
        row[1] = center
        b.list.rows[k] = tuple(row)


def _network(r: np.random.Generator, size: float, side: int) -> tuple[Net, float]:
    """A through road past the middle of the world and one to three others across or into it -> Net, s of the middle.

    A road that comes too near to another one elsewhere than at its junction is drawn again.
    """
    def bends(n, gentle):
        return [(float(r.uniform(30, 70)), float(r.choice([0, 1, 1]) * np.clip(r.normal(0, gentle), -0.03, 0.03))) for _ in range(n)]

    lanes = int(r.choice([1, 2, 3], p=[0.66, 0.3, 0.04]))
    median = float(r.uniform(0.9, 1.6)) if lanes > 1 and r.random() < 0.5 else 0.0
    parking = tuple(float(v) for v in (2.35 * (r.random(2) < 0.5)))
    width = float(r.uniform(2.9, 3.5))
    for _ in range(40):
        arcs = bends(8, 0.012)
        middle = sum(a[0] for a in arcs) / 2
        main = _through(np.array([size / 2, size / 2]), r.uniform(0, 2 * np.pi), arcs, middle, lanes, width, median, parking)
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
                junctions.append(Junction(0, float(at), len(roads), float(s_other), bool(r.random() < 0.65), float(r.uniform(0, 15))))
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
    """Whether a road keeps its distance from another one (None: from itself) within the world, junction (s, s_other) apart."""
    def points(q: Road, s0: float):
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
        x, y, h = _along(x, y, h, part, curvature)
        run += part
        if run >= s:
            break
    turn = heading - h
    R = rot_z(turn)[:2, :2]
    start = point - R @ np.array([x, y])
    return Road(float(start[0]), float(start[1]), turn, arcs, lanes, width, median, parking)


def _ego_plan(r: np.random.Generator, net: Net, middle: float, duration: float):
    """What ego does -> name, path, start on it [m], pose of a vehicle to overtake or None."""
    plan = r.choice(["straight", "left", "right", "lane change", "overtake", "branch"], p=[0.2, 0.2, 0.18, 0.16, 0.16, 0.1])
    road, direction = 0, int(r.choice([-1, 1]))
    if not net.junctions and plan in ("left", "right", "branch"):
        plan = "straight"
    speed = float(r.uniform(6.0, 11.5))
    head_start = speed * WARM_UP * 0.7
    s0 = middle - direction * (r.uniform(5, 40) + head_start)
    if plan == "branch" or (plan in ("left", "right") and r.random() < 0.25):
        road = int(r.integers(1, len(net.roads)))
        s_at = net.junctions[road - 1].s_other
        direction = -1 if not net.roads[road].start_open else int(r.choice([-1, 1]))
        s0 = s_at - direction * (r.uniform(25, 50) + head_start)
    elif net.junctions and (plan in ("left", "right") or r.random() < 0.4):
        nearest = min(net.junctions, key=lambda j: abs(j.s - middle))
        s0 = nearest.s - direction * (r.uniform(14, 40) + head_start)
    here = net.roads[road]
    outer = (plan == "right") == (net.side > 0)
    lane = int(r.integers(here.lanes)) if plan not in ("left", "right") else (here.lanes - 1 if outer else 0)

    def choose(_, options):
        if plan in options:
            return plan
        return "straight" if "straight" in options else options[r.integers(len(options))]

    points, stops = net.lane_points(road, direction, lane, s0, 13 * (duration + WARM_UP) + 60, choose)
    base, wave, phase = r.normal(0, 0.28), r.uniform(0, 0.2), r.uniform(0, 6)
    at = head_start + r.uniform(6, 8 + 4.5 * duration)
    smooth = lambda u: np.clip(u, 0, 1) ** 2 * (3 - 2 * np.clip(u, 0, 1))       # noqa: E731
    blocker = None
    if plan == "lane change" and here.lanes > 1:
        to = here.lane_width * (1 if lane > 0 else -1) * net.side
        shift = lambda q: base + wave * np.sin(q / 15 + phase) + to * smooth((q - at) / 22)                      # noqa: E731
    elif plan == "overtake":
        out = (2.2 if here.lanes == 1 else 2.7) * net.side
        s_block = s0 + direction * (at + 18)
        d = here.lane(net.side, direction, here.lanes - 1) - net.side * direction * (here.lane_width / 2 - 0.75)
        lane_is_outer = lane == here.lanes - 1
        x, y, heading = here.at(s_block, d)
        if lane_is_outer and not any(j.road == 0 and abs(j.s - s_block) < 26 for j in net.junctions) and road == 0:
            blocker = (x, y, heading + (np.pi if direction < 0 else 0))
        bump = lambda q: smooth((q - at - 2) / 11) * smooth((at + 35 - q) / 11)                                  # noqa: E731
        shift = lambda q: base * 0.5 + (out * bump(q) if blocker is not None else wave * np.sin(q / 15))         # noqa: E731
    else:
        shift = lambda q: base + wave * np.sin(q / 15 + phase)                  # noqa: E731
    return str(plan), make_path(points, stops, speed, shift), 0.0, blocker
