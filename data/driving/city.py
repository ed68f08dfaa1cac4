"""One scene of the driving world: streets, objects and traffic, drawn from one seeded generator.

`scene(t)` is the renderer's scene at time t [s], `pose(i, t)` where actor i is, `ego(t)` the ego pose. Global frame:
metres, x, y >= 0, z up, road surface at z = 0.
"""

import cv2
import numpy as np

from data.driving.objects import (BENDY, CHILD, DECOYS, PEDESTRIAN, POLICE, SCOOTER, WORKER, Model, barrier, bicycle,
                          bus, car, cone, construction, debris, dog, motorcycle, pedestrian, pushable, rack, stroller,
                          trailer, truck)
from data.render import ELLIPSOID, PrimitiveList, Primitives, Scene, corners
from data.driving.streets import (EGO_CENTER, EGO_SIZE, ID, SHADE_CELL, TICK, WARM_UP, Builder, CityGround, Junction,
                          add_backdrop, add_crossing_structure, add_frontage, add_furniture, add_traffic_light, linear,
                          make_style, make_weather, rectangle, rot_y, rot_z)
from data.driving.traffic import Actor, Path, clashes, make_network, make_path, plan_ego, red, simulate, wanted_speed


class City:
    """One scene. `actors[0]` is ego (no primitives); all others are annotated objects with instance = their index."""

    def __init__(self, seed_words: list[int], duration: float, singapore: bool, turn: int = 0, shown: bool = False,
                 decoys: bool = False):
        """duration [s]; turn 0..6: whose turn it is to have certain rare classes for sure (`_rare_things`). shown: the
        street shows how fast to drive, and no class is mostly parked (data/driving/__init__.py). decoys: more things
        that share the words of rare classes (`objects.DECOYS`)."""
        r = np.random.default_rng(seed_words)
        self.decoys = np.random.default_rng([*seed_words, 77]) if decoys else None
        self.turn, self.shown = turn, shown
        self.rng, self.duration = r, duration
        self.size = 300.0 + 12 * max(duration - 2, 0)
        self.style = make_style(r, singapore)
        self.weather, self.light = make_weather(r)
        self.net, self.middle = make_network(r, self.size, -1 if singapore else 1)
        self.ground = CityGround(self.net.roads, self.size, r, self.style)
        self.builder = Builder(self.ground, r, self.style)
        self.ticks = int((WARM_UP + duration + 1.0) / TICK) + 2
        self.lamps: list = []
        self.signals: list = []
        self.plan, ego_path, ego_start, blocker = plan_ego(
            r, self.net, self.middle, duration, self.style.name if shown else "")
        self.actors = [Actor(Model(ID["vehicle.ego"], EGO_SIZE, PrimitiveList().build(), np.zeros(0), np.zeros(0),
                                   np.zeros(0, bool)),
                             path=ego_path, start=ego_start)]
        self._street_life(ego_path, ego_start, blocker)
        self._stand_still()
        simulate(self.actors, self.net.junctions, self.ticks)
        gone = clashes(self.actors, np.arange(-0.5, duration + 0.6, 0.25))
        self.actors = [a for i, a in enumerate(self.actors) if i not in gone]
        self._finish()

    # what stands
    def _stand_still(self) -> None:
        """Furniture, buildings, backdrop; after the objects, so that these find the free places."""
        b, r = self.builder, self.rng
        reach = 95 + 6 * self.duration
        spans = []
        for i, road in enumerate(self.net.roads):
            mid = self._middle_of(i)
            low = max(mid - reach, 0 if not road.start_open else -1e9)
            spans.append((road, low, mid + reach))
        for j, junction in enumerate(self.net.junctions):
            if junction.signals:
                self._junction_lights(j, junction)
        if r.random() < 0.4:
            add_crossing_structure(b, self.net.roads[0], self.middle + r.choice([-1, 1]) * r.uniform(12, 45))
        for road, low, high in spans:
            add_furniture(b, road, low, high, self.lamps)
        for road, low, high in spans:
            for side in (-1, 1):
                add_frontage(b, road, side, low + r.uniform(0, 6), high)
        add_backdrop(b, np.array([self.size, self.size]) / 2, self.size / 2 - 12)

    def _junction_lights(self, j: int, junction: Junction) -> None:
        """A traffic light at the near right corner of every approach (left, where traffic keeps left)."""
        side = self.net.side
        for road, s, cross, main in ((junction.road, junction.s, junction.other, True),
                                     (junction.other, junction.s_other, junction.road, False)):
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
                    add_traffic_light(self.builder, x, y, yaw, side, self.signals, j, main)

    # what moves or could
    def _street_life(self, ego_path: Path, ego_start: float, blocker) -> None:
        """All annotated things but ego, roughly in the order of their right to a place."""
        r, net = self.rng, self.net
        self._moving_vehicles(ego_path, ego_start)
        if blocker is not None:
            x, y, yaw = blocker
            model = truck(r) if r.random() < 0.4 else car(r)
            self._park(model, x, y, yaw, "vehicle.stopped", margin=0.1)
        near = self._ego_places(ego_path, ego_start)
        self._rare_things(near)
        if self.decoys is not None:
            self._stand_decoys(near)
        self._parked()
        self._walkers()

    def _park(self, model: Model, x, y, yaw, attribute: str = "", margin: float = 0.15, least_edge=None) -> bool:
        """Puts a still thing there if the place is free."""
        if not self.builder.claim(x, y, yaw, model.size[0], model.size[1], margin, least_edge):
            return False
        self.actors.append(Actor(model, pose=(float(x), float(y), float(yaw)), attribute=attribute))
        return True

    def _ego_places(self, path: Path, start: float) -> list[tuple[int, float, int]]:
        """Places beside what ego passes: (road, s, side of d), shuffled."""
        places = []
        for s in np.arange(start + 20, start + 48 + 4 * self.duration, 3.0):
            x, y, _ = path.at(s)
            d, at = min(((abs(road.locate(np.float32([[x, y]]))[0][0]), i) for i, road in enumerate(self.net.roads)))
            s_on = float(self.net.roads[at].locate(np.float32([[x, y]]))[1][0])
            places += [(at, s_on, 1), (at, s_on, -1)]
        self.rng.shuffle(places)
        return places

    def _kerb(self, place, beyond: float) -> tuple[float, float, float]:
        """A point `beyond` [m] outside the carriageway's edge (negative: on it), and the lane's heading there."""
        i, s, side = place
        road = self.net.roads[i]
        half = float(road.half_width(np.array([side]), np.array([s]))[0])
        x, y, heading = road.at(s, side * (half + beyond))
        return x, y, heading + (np.pi if side * self.net.side > 0 else 0)

    def _rare_things(self, places: list) -> None:
        """The rare classes, near ego's way. Each may be there by chance, and is for sure when it is the scene's turn:
        neighbouring turns (so the two scenes of mini_val, 5 and 6) have all ten detection classes between them.
        """
        r = self.rng

        def has(share: float, *turns: int) -> bool:
            return r.random() < share or self.turn in turns

        def park_big(model: Model) -> None:
            """In a bay where it fits, else beyond the kerb, as near as the bend allows."""
            width = model.size[1]
            for beyond in (-width / 2 - 0.15, width / 2 + 0.4, width / 2 + 1.2, width / 2 + 2.4):
                for place in places:
                    x, y, yaw = self._kerb(place, beyond)
                    if beyond < 0 and (not self._bay_holds(place, width) or self._near_junction(x, y, 9)):
                        continue
                    yaw += r.normal(0, 0.02)
                    if self._park(model, x, y, yaw, "vehicle.parked", least_edge=None if beyond < 0 else 0.25):
                        return

        def on_pavement(model: Model, attribute: str = "", turn: float | None = None) -> None:
            reach = max(0.8, self.style.verge + self.style.pavement - 0.4)
            for place in places:
                x, y, yaw = self._kerb(place, r.uniform(0.6, reach))
                yaw += r.uniform(-3.1, 3.1) if turn is None else turn + r.normal(0, 0.1)
                if self._park(model, x, y, yaw, attribute, 0.1, 0.1):
                    return

        for make, share, turns in ((construction, 0.4, (0, 2, 4, 6)), (trailer, 0.35, (1, 3, 5)),
                                   (bus, 0.25, (0, 2, 4, 6)), (truck, 0.5, (1, 3, 5))):
            if has(share, *turns):
                if not self.shown or r.random() < 0.5:            # else it may drive (`_moving_vehicles`)
                    park_big(bus(r, BENDY) if make is bus and r.random() < 0.15 else make(r))
        if has(0.15, 2, 5):
            on_pavement(bicycle(r, False), "cycle.without_rider")
        if has(0.2, 3, 6):
            on_pavement(motorcycle(r, False), "cycle.without_rider", r.choice([0, np.pi / 2]))
        if has(0.08):
            on_pavement(rack(r), turn=np.pi / 2)
        for make, mean in ((pushable, 1.2), (debris, 0.8)):
            for _ in range(r.poisson(mean)):
                on_pavement(make(r))
        if has(0.6, 0, 3, 6):
            self._road_works(places)
        for place in places[:int(r.poisson(1.0))]:                # single cones at the kerb
            x, y, yaw = self._kerb(place, -0.35)
            self._park(cone(r), x, y, yaw, margin=0.05)

    def _stand_decoys(self, places: list) -> None:
        """Of each kind of decoy one or two, bollards more, at the kerbs that ego passes."""
        r = self.decoys
        for make, count in zip(DECOYS, (r.integers(1, 3), r.integers(1, 3), r.integers(4, 9)), strict=True):
            for _ in range(count):
                model = make(r)
                for k in r.permutation(len(places)):
                    x, y, yaw = self._kerb(places[k], model.size[1] / 2 + r.uniform(0.3, 1.2))
                    yaw += r.normal(0, 0.05)
                    if not self._near_junction(x, y, 6) and self._park(model, x, y, yaw, "", 0.1, 0.1):
                        break

    def _bay_holds(self, place: tuple[int, float, int], width: float) -> bool:
        """Whether a vehicle parked there leaves the lane free."""
        i, s, side = place
        road = self.net.roads[i]
        return float(road.half_width(np.array([side]), np.array([s]))[0]) - width - 0.15 >= road.carriageway() - 0.28

    def _middle_of(self, i: int) -> float:
        """Arc length of road i's point next to the middle of the world."""
        return self.middle if i == 0 else next(j.s_other for j in self.net.junctions if j.other == i)

    def _near_junction(self, x: float, y: float, margin: float) -> bool:
        """Whether another road's edge is nearer than margin [m]."""
        return float(self.ground.read(np.float32([x]), np.float32([y]))[3][0]) < margin

    def _road_works(self, places: list) -> None:
        """Cones and a row of barriers along a kerb, with workers behind."""
        r = self.rng
        color = linear(0.9, 0.35, 0.1) if r.random() < 0.5 else linear(0.75, 0.74, 0.72)
        for place in places:
            i, s, side = place
            x, y, _ = self._kerb(place, 0)
            if self._near_junction(x, y, 12):
                continue
            n, placed = int(r.integers(3, 8)), 0
            beyond = 0.45 if self.net.roads[i].parking[0 if side > 0 else 1] == 0 else r.choice([0.45, -0.6])
            mixed = r.random() < 0.3
            for k in range(n):
                x, y, yaw = self._kerb((i, s + k * 2.05, side), beyond)
                tone = linear(0.85, 0.85, 0.83) if mixed and k % 2 else color
                placed += self._park(barrier(r, tone), x, y, yaw + np.pi / 2 + r.normal(0, 0.03), "", 0.0)
            for k in range(int(r.integers(2, 6))):
                x, y, yaw = self._kerb((i, s - 2.0 - 1.8 * k, side), beyond + 0.2 * k * np.sign(beyond))
                self._park(cone(r), x, y, yaw, "", 0.02)
            for _ in range(r.poisson(1.2)):
                x, y, yaw = self._kerb((i, s + r.uniform(0, 2 * n), side), beyond + r.uniform(0.8, 1.8))
                self._park(pedestrian(r, WORKER), x, y, r.uniform(-3, 3), "pedestrian.standing", 0.05, 0.2)
            if placed:
                return

    def _parked(self) -> None:
        """Vehicles in the parking bays."""
        r = self.rng
        reach = 75 + 5 * self.duration
        for i, road in enumerate(self.net.roads):
            mid = self._middle_of(i)
            for side, bay in ((1, road.parking[0]), (-1, road.parking[1])):
                for s in np.arange(mid - reach, mid + reach, 6.2):
                    taken = self.style.parking * (0.4 if self.shown else 1.0)
                    if bay == 0 or (s < 4 and not road.start_open) or r.random() > taken:
                        continue
                    kind = r.choice(["car", "truck", "motorcycle", "police"], p=[0.93, 0.05, 0.01, 0.01])
                    model = truck(r) if kind == "truck" else motorcycle(r, False) if kind == "motorcycle" else \
                        car(r, ID["vehicle.emergency.police"] if kind == "police" else ID["vehicle.car"])
                    width = model.size[1]
                    x, y, yaw = self._kerb((i, s, side), -0.15 - width / 2)
                    if self._bay_holds((i, s, side), width) and not self._near_junction(x, y, 8):
                        attribute = "cycle.without_rider" if kind == "motorcycle" else "vehicle.parked"
                        self._park(model, x, y, yaw + r.normal(0, 0.025), attribute, 0.05)

    def _moving_vehicles(self, ego_path: Path, ego_start: float) -> None:
        """Traffic in every lane, at random gaps, each with its own speed and drift within the lane."""
        r, net = self.rng, self.net
        dense = r.uniform(0.5, 1.6)
        taken = [np.array(ego_path.at(ego_start)[:2])]
        length = 13 * (self.duration + WARM_UP) + 50

        def choose(_, options):
            return options[r.integers(len(options))]

        lanes = [(i, direction, lane) for i, road in enumerate(net.roads) for direction in (1, -1)
                 for lane in range(road.lanes)]
        for i, direction, lane in lanes:
            road, s = net.roads[i], self._middle_of(i) - 100 + r.uniform(0, 30)
            while s < self._middle_of(i) + 110:
                s += r.exponential(26) / dense + 10
                makers = {"car": car, "truck": truck, "bus": bus, "construction": construction, "trailer": trailer,
                          "motorcycle": lambda r: motorcycle(r, True), "bicycle": lambda r: bicycle(r, True),
                          "ambulance": lambda r: car(r, ID["vehicle.emergency.ambulance"])}
                kind = str(r.choice(list(makers), p=[0.52, 0.12, 0.08, 0.08, 0.06, 0.07, 0.06, 0.01])) if self.shown \
                    else r.choice(["car", "truck", "bus", "motorcycle", "ambulance"], p=[0.83, 0.1, 0.04, 0.02, 0.01])
                model = makers[kind](r)
                here = np.array(road.at(s, road.lane(net.side, direction, lane))[:2])
                apart = min(np.linalg.norm(here - other) for other in taken) > 8 + model.size[0] / 2
                if not apart or (s < 15 and not road.start_open) or self._near_junction(*here, 1):
                    continue
                taken.append(here)
                points, stops = net.lane_points(i, direction, lane, s, length, choose)
                speed, phase = r.uniform(6, 12.5), r.uniform(0, 6)
                if self.shown:
                    speed = wanted_speed(self.style.name, net.roads[0].lanes) * r.uniform(0.7, 1.05)
                    speed *= 0.6 if kind == "bicycle" else 1.0
                    if r.random() < 0.25 and np.linalg.norm(ego_path.xy - here, axis=1).min() > 3:
                        x, y, yaw = road.at(s, road.lane(net.side, direction, lane))       # it waits in its lane
                        self._park(model, x, y, yaw + (np.pi if direction < 0 else 0), "cycle.with_rider" if kind in
                                   ("motorcycle", "bicycle") else "vehicle.stopped")
                        continue
                drift = r.normal(0, 0.6 if kind == "motorcycle" else 0.2)
                path = make_path(points, stops, speed, lambda q, a=drift, b=phase: a + 0.12 * np.sin(q / 17 + b))
                self.actors.append(Actor(model, path=path, speed=speed))
        for _ in range(r.poisson(0.35)):                          # cyclists on the carriageway's edge
            i, direction = int(r.integers(len(net.roads))), int(r.choice([-1, 1]))
            road = net.roads[i]
            s = self._middle_of(i) + r.uniform(-40, 40)
            if not road.start_open and s < 15:
                continue
            points, stops = net.lane_points(i, direction, road.lanes - 1, s, 7 * (self.duration + WARM_UP) + 40, choose)
            edge = -net.side * (road.lane_width / 2 - 0.45)
            path = make_path(points, stops, r.uniform(3.5, 6), lambda q, e=edge: e + 0 * q)
            self.actors.append(Actor(bicycle(r, True), path=path, speed=5))

    def _walkers(self) -> None:
        """People on the pavements and at crossings, standing, sitting, in groups; children, strollers, dogs,
        scooters.
        """
        r, net, style = self.rng, self.net, self.style
        count = int(r.poisson({"downtown": 22, "avenue": 13, "residential": 9, "park": 10, "industry": 5}[style.name]))
        for _ in range(count):
            i = int(r.integers(len(net.roads)))
            road = net.roads[i]
            mid = self._middle_of(i)
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
                if walk < (0.4 if self.shown else 0.62):
                    direction, speed = int(r.choice([-1, 1])), float(r.uniform(0.8, 1.7))
                    speed *= 2.5 if semantic == SCOOTER else 1
                    d = side * (half + outer + 0.7 * g)
                    span = np.arange(-8, speed * (self.duration + WARM_UP + 2) + 8, 0.7)
                    edges = side * (road.half_width(np.full(len(span), side), s + direction * span) + outer + 0.7 * g)
                    points = np.array([road.at(s + direction * u, e)[:2] for u, e in zip(span, edges)])
                elif walk < (0.5 if self.shown else 0.74) and self.style.crossings and net.junctions:     # at a crossing
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
                self.builder.keep_free(path.xy)
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
        """-> T_global_ego (4, 4) at time t [s]: rear axle on the road; the body pitches with acceleration and rolls a
        little.
        """
        x, y, yaw, speed, acceleration = self.actors[0].state(t)  # the middle of the car
        x, y = x - EGO_CENTER * np.cos(yaw), y - EGO_CENTER * np.sin(yaw)
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
                    body = np.concatenate([np.insert(foot, 2, z, axis=1) for z in (0.0, 0.9 * height)])
                    _shadow(layer, body, shift, False)
                raster[..., 0] = layer
                self.ground.light_raster = raster
            if setting.night > 0.3:
                x, y, yaw = self.actors[0].state(t)[:3]
                setting = setting._replace(headlight=(x + 3.4 * np.cos(yaw), y + 3.4 * np.sin(yaw), yaw,
                                                      1.2 * setting.night))
        return Scene(Primitives.join([static, mobile]), self.ground, setting,
                     np.concatenate([self.static_corners, corners(mobile)]))


def _shadow(raster: np.ndarray, c: np.ndarray, shift: np.ndarray, round_: bool) -> None:
    """Darkens the ground where a box with corners c (8, 3) stands between it and the sun."""
    points = c[:, :2] + c[:, 2:].clip(0) * shift
    pixels = np.round(points / SHADE_CELL).astype(np.int32)
    if (pixels.max(0) < 0).any() or (pixels.min(0) > len(raster)).any():
        return
    if round_:
        middle, span = points.mean(0) / SHADE_CELL, (points.max(0) - points.min(0)) / SHADE_CELL / 2
        cv2.ellipse(raster, tuple(int(v) for v in middle), tuple(int(v) for v in np.maximum(span * 0.85, 1)), 0, 0, 360,
                    40, -1)
    else:
        cv2.fillConvexPoly(raster, cv2.convexHull(pixels), 30)
