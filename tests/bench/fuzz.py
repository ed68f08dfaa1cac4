"""make fuzz: broken files through every reader of common/. Each must be read, or refused in one line.

    python -m tests.bench.fuzz [--inputs 100000] [--seed 0] [--only NAME ...] [--at NUMBER] [--seconds 10]

A target is a reader, the valid files it reads, and a folder. For each input one of the files is damaged, by
bytes or by structure, and read. Input k of a target depends on (seed, target, k) alone: `--only NAME --at k`
repeats it and shows the traceback. Counted as findings: an exception other than InputError, a message of
several lines, a read that takes longer than --seconds, memory beyond LIMIT above the start, a process that
dies. The inputs run in a child process, which the parent starts again behind an input that ends it.
"""

import argparse
import collections
import io
import json
import os
import random
import re
import resource
import select
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import time
import traceback
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[2]
for folder in (ROOT, ROOT / "tests"):
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))

import numpy as np  # noqa: E402
import torch  # noqa: E402
from PIL import Image  # noqa: E402
from test_nuscenes import make_tree as make_nuscenes  # noqa: E402
from test_semantickitti import make_tree as make_kitti  # noqa: E402
from transformers import ResNetConfig, ResNetModel  # noqa: E402

from common import audit, backbones, datasets, demonstrations, files, labelers, labels, libero  # noqa: E402
from common import nuscenes, semantickitti, train  # noqa: E402
from common.cli import RUN, from_dict  # noqa: E402
from common.files import InputError  # noqa: E402
from common.metrics import OccupancyMeter  # noqa: E402
from common.networks import tinyclip  # noqa: E402

LIMIT = 2 << 30  # [bytes] of address space above the start


class Target(NamedTuple):
    """A reader and what it reads."""

    name: str
    read: Callable[[], Any]
    damaged: list[Path]  # one of them is damaged at a time
    weight: int = 1  # inputs of this target among all


class Hang(BaseException):
    """A read that takes too long."""


# --- damage -------------------------------------------------------------------------------------------------

NUMBERS = (0, 1, 2, *(2**k - 1 for k in (7, 8, 15, 16, 31, 32, 63, 64)), 2**7)
VALUES = (
    None, True, False, 0, -1, 1, 255, 2**31, 2**63, 10**400, 1.5, -1e308, 1e-320, float("nan"), float("inf"),
    "", "x", "../../x", "/etc/passwd", ".", "a/b", "a\x00b", "\ud800", "ü", "x" * 5000, "1", "nan", "²",
    [], {}, [[]], [None], [0, 0, 0, 0], {"x": 1}, [1e300] * 3, ["a", "b"], [[[[[[0]]]]]],
)  # fmt: skip


def damage(data: bytes, suffix: str, rng: random.Random) -> bytes:
    """The bytes of a file, broken in one of the ways that suit it; of one that is broken, in any way."""
    try:
        return damage_form(data, suffix, rng)
    except (zipfile.BadZipFile, struct.error):
        return damage_bytes(data, rng)


def damage_form(data: bytes, suffix: str, rng: random.Random) -> bytes:
    if suffix == ".json" and rng.random() < 0.8:
        return damage_json(data, rng)
    if suffix == ".npz" and rng.random() < 0.6:
        return damage_npz(data, rng)
    if suffix in (".txt", ".bddl") and rng.random() < 0.6:
        return damage_words(data, rng)
    if suffix == ".safetensors" and rng.random() < 0.5:
        return damage_safetensors(data, rng)
    if suffix == ".png" and rng.random() < 0.5:
        return damage_png(data, rng)
    return damage_bytes(data, rng)


def damage_png(data: bytes, rng: random.Random) -> bytes:
    """Another size, depth or kind in the header, or other pixels, with the right checksums."""
    chunks, at = [], 8
    while at + 12 <= len(data):
        length = struct.unpack(">I", data[at : at + 4])[0]
        chunks.append((data[at + 4 : at + 8], data[at + 8 : at + 8 + length]))
        at += 12 + length
    k = 0 if rng.random() < 0.7 else rng.randrange(len(chunks))
    name, body = chunks[k]
    if name == b"IHDR":
        body = bytearray(body)
        field = rng.choice((0, 4, 8, 9, 10, 12))
        if field < 8:
            struct.pack_into(">I", body, field, rng.choice(NUMBERS) & 0xFFFFFFFF)
        else:
            body[field] = rng.choice((0, 1, 2, 3, 4, 6, 8, 16, 99))
        body = bytes(body)
    else:
        body = damage_bytes(body, rng)
    chunks[k] = rng.choice((name, name, name, b"tRNS", b"PLTE", b"zTXt")), body
    parts = (struct.pack(">I", len(b)) + n + b + struct.pack(">I", zlib.crc32(n + b)) for n, b in chunks)
    return data[:8] + b"".join(parts)


def damage_bytes(data: bytes, rng: random.Random) -> bytes:
    data = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 4, 16))):
        at = rng.randrange(len(data) + 1) if rng.random() < 0.7 else rng.randrange(min(len(data), 64) + 1)
        match rng.randrange(8):
            case 0:
                data[at : at + 1] = bytes([rng.randrange(256)])
            case 1:
                data[at : at + 1] = bytes(b ^ 1 << rng.randrange(8) for b in data[at : at + 1])
            case 2:
                del data[at:]
            case 3:
                del data[at : at + rng.randrange(1, 64)]
            case 4:
                data[at:at] = rng.randbytes(rng.randrange(1, 64))
            case 5:
                data[at:at] = data[max(0, at - rng.randrange(1, 256)) : at]
            case 6:
                width, order = rng.choice("BHIQ"), rng.choice("<>")
                limit = 1 << 8 * struct.calcsize(width)
                number = struct.pack(order + width, rng.choice(NUMBERS) % limit)
                data[at : at + len(number)] = number
            case 7:
                data[at : at + rng.randrange(1, 512)] = b""
    return bytes(data)


def damage_json(data: bytes, rng: random.Random) -> bytes:
    """Another value, a key or an element less or more at a random place of the tree."""
    try:
        value = json.loads(data)
    except ValueError:
        return damage_bytes(data, rng)
    for _ in range(rng.choice((1, 1, 1, 2, 5))):
        if not isinstance(value, (dict, list)) or not value or rng.random() < 0.03:
            value = rng.choice(VALUES)
            continue
        at = value
        while True:
            key = rng.choice(list(at)) if isinstance(at, dict) else rng.randrange(len(at))
            if not isinstance(at[key], (dict, list)) or not at[key] or rng.random() < 0.25:
                break
            at = at[key]
        match rng.randrange(6):
            case 0:
                del at[key]
            case 1 if isinstance(at, list):
                at.append(at[key])
            case 1:
                at[str(rng.choice(VALUES))[:9]] = at[key]
            case 2 if isinstance(at[key], (int, float)) and not isinstance(at[key], bool):
                at[key] = rng.choice((-at[key], at[key] * 10**9, at[key] + 1, 0, repr(at[key])[:99]))
            case 3 if isinstance(at, list):
                at[key] = at[rng.randrange(len(at))]
            case _:
                at[key] = rng.choice(VALUES)
    try:
        text = json.dumps(value)
    except (ValueError, RecursionError):  # a value that JSON has only as text: 6000 digits
        text = "9" * 6000
    if rng.random() < 0.02:
        text = "[" * 50_000 + text + "]" * 50_000
    return text.encode(errors="surrogatepass")


def damage_npz(data: bytes, rng: random.Random) -> bytes:
    """Headers, dtypes, missing arrays, compression and flags of a zip of arrays."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    name = rng.choice(list(members))
    how = rng.randrange(7)
    if how == 0:
        del members[name]
    elif how == 1:
        members[name] = damage_bytes(members[name], rng)
    elif how in (2, 3):  # another header over the same data
        kinds = ("|u1", "<f8", "|O", "<U9", "|S0", ">i8", "<M8[s]", "|V5", "[('a','<i4')]", "x", "<c16")
        kind, order = rng.choice(kinds), rng.choice((True, False, 0))
        kind = kind if kind[0] == "[" else repr(kind)
        shape = rng.choice(("()", "(3,)", "(0,)", "(1000000, 1000000)", "(-1,)", "(2, 3", "4", "(True,)"))
        text = f"{{'descr': {kind}, 'fortran_order': {order}, 'shape': {shape}, }}".encode()
        members[name] = b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text + members[name][128:]
    elif how == 4:
        buffer = io.BytesIO()
        shape, kind = rng.choice(((), (3,), (0, 2), (70, 70))), rng.choice(("f4", "i8", "S3", "?"))
        np.save(buffer, np.zeros(shape).astype(kind))
        members[name] = buffer.getvalue()
    buffer = io.BytesIO()
    kinds = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA)
    with zipfile.ZipFile(buffer, "w", rng.choice(kinds)) as archive:
        for key, member in members.items():
            archive.writestr(key, member)
    data = bytearray(buffer.getvalue())
    if how >= 5 and (centre := data.find(b"PK\x01\x02")) > 0:
        field = rng.choice((6, 8, 14, 18, 22, 26))
        struct.pack_into("<H", data, field, rng.choice(NUMBERS) & 0xFFFF)
        struct.pack_into("<H", data, centre + field + 2, rng.choice(NUMBERS) & 0xFFFF)
    return bytes(data)


def damage_words(data: bytes, rng: random.Random) -> bytes:
    """Words of a text replaced, repeated, dropped."""
    words = data.split(b" ")
    at = rng.randrange(len(words))
    others = ([], [b"nan"], [b"1e999"], [b"-1"], [b"\xff"], [b"x" * 999], [words[at]] * 3, [b"\n"], [b"("])
    words[at : at + 1] = rng.choice(others)
    return b" ".join(words)


def damage_safetensors(data: bytes, rng: random.Random) -> bytes:
    """The JSON header changed, its length right."""
    length = struct.unpack("<Q", data[:8])[0]
    header = damage_json(data[8 : 8 + length], rng)
    return struct.pack("<Q", len(header)) + header + data[8 + length :]


# --- targets ------------------------------------------------------------------------------------------------


def targets(root: Path) -> list[Target]:
    """All readers on small valid files below `root`."""
    rng, found = np.random.default_rng(0), []

    def put(name: str, data: Any) -> Path:
        path = root / name
        if isinstance(data, dict):
            files.write_npz(path, **data)
        else:
            files.write_bytes(path, data.encode() if isinstance(data, str) else data)
        return path

    def add(name: str, weight: int, read: Callable, *damaged: Path) -> None:
        """read(the first of the damaged files)."""
        found.append(Target(name, partial(read, damaged[0]), list(damaged), weight))

    # 1) the readers of common/files.py
    u, f = rng.integers(0, 9, (20, 20, 4)).astype(np.uint8), rng.normal(size=(7, 3))
    wanted = {"u": (u.shape, "uint8"), "f": (None, None), "s": (None, None)}
    path = put("a.npz", {"u": u, "f": f, "s": np.array([b"x", b"yz"])})
    add("npz", 8, lambda path: files.read_npz(path, wanted), path)
    np.save(root / "a.npy", f)
    add("npy", 4, lambda path: files.read_npy(path, f.shape, None), root / "a.npy")
    shape = {"a": [int], "b": {"c": str}, "d?": {str: [float]}, "e": (str, [bool])}
    path = put("a.json", json.dumps({"a": [1, 2], "b": {"c": "x"}, "d": {"y": [1.5, 2]}, "e": [True]}))
    add("json", 8, lambda path: files.read_json(path, shape), path)
    add("text", 1, files.read_text, put("a.txt", "some words\n" * 5))
    colour = rng.integers(0, 255, (20, 30, 3)).astype(np.uint8)
    grey = rng.integers(0, 17, (20, 30)).astype(np.uint8)
    deep = grey.astype(np.uint16) * 999
    for kind, array in [*((kind, colour) for kind in files.PICTURES), ("PNG", grey), ("PNG", deep)]:
        buffer = io.BytesIO()
        Image.fromarray(array).save(buffer, kind)
        path = put(f"{kind}-{array.ndim}-{array.itemsize}.{kind.lower()}", buffer.getvalue())
        add(f"image {path.stem}", 2, files.read_image, path)
        add(f"resized {path.stem}", 1, lambda path: nuscenes.read_resized(path, (20, 30), (10, 15)), path)
    for bits in (8, 16):
        add(f"map {bits}", 2, partial(labelers.read_map, bits=bits), root / f"PNG-2-{bits // 8}.png")

    # 2) nuScenes: tables, cache, sensors, labels, questions
    tree, cache = make_nuscenes(root / "nuscenes"), root / "cache"
    put("nuscenes/v1.0-mini/splits.json", json.dumps({"mine": ["scene-0061"]}))

    def use(data) -> None:
        for i in (0, len(data) - 1):
            data[i], data.neighbour(i), data.sweeps(i), data.ray_origins(i)
            data.lidarseg(i), data.points(i, 2)
        data.check_steps()

    def open_tables(_: Path) -> None:
        shutil.rmtree(root / "fresh", ignore_errors=True)
        use(nuscenes.NuScenesOccupancy(tree, split="all", cache=root / "fresh"))

    def questions(_: Path) -> None:
        shutil.rmtree(root / "asked", ignore_errors=True)
        fresh = nuscenes._open_questions(tree, root / "asked")
        [json.loads(bytes(fresh["rows"][a:b])) for a, b in zip(fresh["start"][:-1], fresh["start"][1:])]

    data = nuscenes.NuScenesOccupancy(tree, split="all", cache=cache)
    use(data)
    scene, token = data.scene_names[0], data.tokens[0]
    seg = Path(data._table["sample_lidarseg"][data._rows[0]].decode()).name
    add("tables", 8, open_tables, *sorted((tree / "v1.0-mini").glob("*.json")))
    opened = partial(nuscenes.NuScenesOccupancy, tree, split="all", cache=cache)
    add("cache", 2, lambda _: opened(), next(cache.glob("nuscenes*/meta.json")))
    add("cloud", 1, lambda _: data.points(0), tree / data.lidar_file(0))
    add("lidarseg", 1, lambda _: data.lidarseg(0), tree / "lidarseg/v1.0-mini" / seg)
    add("occ3d label", 2, lambda _: data.labels(0), tree / "gts" / scene / token / "labels.npz")
    add("camera", 1, lambda _: data.images(0), tree / data.camera_files(0)[0])
    add("questions", 4, questions, *nuscenes.question_files(tree))
    path = put("list.json", json.dumps({"labelled": data.tokens[:2]}))
    add("frame list", 1, lambda path: datasets.read_frame_list(path, data), path)

    # 3) SemanticKITTI
    kitti = make_kitti(root / "kitti", ("08",), frames=2)

    def scan(_: Path) -> None:
        data = semantickitti.SemanticKITTI(kitti, "val")
        data[0], data.lidarseg(0), data.neighbour(0), data.points(0, 1), data.aggregate(0)

    texts = [kitti / "sequences/08" / name for name in ("calib.txt", "poses.txt", "times.txt")]
    rest = [path for path in sorted((kitti / "sequences/08").glob("*/*")) if path.stem == "000000"]
    add("semantickitti", 3, scan, *rest)
    add("semantickitti text", 6, lambda _: semantickitti.SemanticKITTI(kitti, "val", parts=()), *texts)

    # 4) run folders, labels, counts by scene, predictions, weights
    def toy() -> tuple[torch.nn.Module, torch.optim.Optimizer]:
        net = torch.nn.Linear(4, 3)
        return net, torch.optim.AdamW(net.parameters())

    (net, optimizer), run, one = toy(), root / "run", train.Run(0, 1, torch.device("cpu"), True)
    net(torch.ones(1, 4)).sum().backward()
    optimizer.step()
    args = SimpleNamespace(method="toy", preset="tiny", seed=0)
    settings = train.settings(args, Settings(), 5, {"root": "x"})
    train.begin(run, one, settings)
    train.save_checkpoint(run, one, net, optimizer, 3, {"train_s": 1.0, "peak_gb": 0.1})

    def resume(_: Path) -> None:
        stored = files.read_json(run / "config.json", RUN)
        from_dict(Settings, stored["config"], run / "config.json")
        train.begin(run, one, settings)
        train.load_checkpoint(run, *toy(), one, settings)
        train.stage_state(run)

    log = "".join(json.dumps({"step": k, "loss": 1.0}) + "\n" for k in range(5))
    add("run folder", 8, resume, *sorted(path for path in run.rglob("*") if path.is_file()))
    add("log", 1, lambda _: train.Log(run, one, 5, 3), put("run/log.jsonl", log))
    weights = run / "step_000003/model.safetensors"
    add("weights", 2, lambda _: train.load_weights(run, toy()[0]), weights)
    ids, mask = np.full((200, 200, 16), 17, np.uint8), np.ones((200, 200, 16), np.uint8)
    path = put(f"labels/{scene}/{token}/labels.npz", {"semantics": ids, "mask_camera": mask})
    add("label", 2, lambda _: labels.read_label(root / "labels", data, 0, "mask_camera"), path)
    path = put("labels/labels.json", json.dumps({"labeler": "world", "data": {"note": "x"}}))
    add("labels note", 1, lambda _: labels.labels_note(root / "labels"), path)
    meter = OccupancyMeter()
    meter.add(ids, ids, mask, mask, group="a")
    meter.save(root / "by_scene.npz")
    add("by scene", 4, lambda path: OccupancyMeter.load(path).metrics(), root / "by_scene.npz")
    planned = ("planning", audit.read_trajectory, "trajectory", np.zeros((6, 2)))
    for_tasks = ("occupancy", audit.read_occupancy, "pred", ids), planned
    for task, read, key, array in for_tasks:
        def score(path: Path, read: Callable = read, task: str = task) -> None:
            read(audit.find_form(path.parent, data, audit.KEYS[task]), data, 0)

        add(task, 3, score, put(f"{task}/{token}.npz", {key: array}))
    sizes = {"embedding_size": 4, "hidden_sizes": [4] * 4, "depths": [1] * 4, "layer_type": "basic"}
    ResNetModel(ResNetConfig(**sizes)).save_pretrained(root / "resnet")
    load = partial(backbones.load_backbone, str(root / "resnet"))
    add("pretrained", 2, lambda _: load(), *sorted((root / "resnet").iterdir()))

    # 5) robots and words
    path = put("words.txt", "car: a car, an automobile\ntrailer: a long vehicle # note\n")
    add("words", 2, tinyclip.read_words, path)
    add("bddl", 4, libero.read_bddl, put("task.bddl", TASK))
    row = {"id": 1, "name": "a_table_1", "category": "Background Textures", "difficulty_level": 1}
    add("libero-plus", 3, libero.read_plus_tasks, put("plus.json", json.dumps({"libero_goal": [row]})))
    add("states", 1, libero.read_init_states, put("states.pruned_init.npz", {"states": np.zeros((3, 4))}))
    torch.save(np.zeros((3, 4)), root / "states.pruned_init")
    add("states of torch", 3, libero.read_init_states, root / "states.pruned_init")
    floats = {"actions": (2, 7), "states": (2, 8), "poses": (2, 1, 4, 4)}
    arrays = {name: np.zeros(shape, np.float32) for name, shape in floats.items()}
    arrays |= {"K": np.zeros((2, 1, 3, 3)), "T_base_cam": np.zeros((2, 1, 4, 4))}
    arrays |= {"things": np.array([b"cup"]), "instruction": np.array(b"push"), "task": np.array(b"push")}
    views, flat = np.zeros((2, 1, 8, 8, 3), np.uint8), np.zeros((2, 1, 8, 8), np.uint8)
    demonstrations.write_episode(root / "demo", ("front",), views, flat.astype(float), flat, **arrays)
    read = partial(demonstrations.read_episode, root / "demo", ["front"])
    add("episode", 4, lambda _: read(), *sorted((root / "demo").iterdir()))
    world = {"name": "tabletop", "tasks": ["push"], "cameras": ["front"], "demos": 2}
    path = put("demos/world.json", json.dumps(world))
    add("demonstrations", 2, lambda path: demonstrations.read_world(path.parent), path)
    return found


TASK = """(define (problem P) (:domain robosuite) (:language put it)
 (:regions (top (:target table) (:ranges ((0 0 1 1))))) (:fixtures table - table)
 (:objects cup_1 - cup) (:obj_of_interest cup_1) (:init (On cup_1 table_top))
 (:goal (And (On cup_1 table))))"""



@dataclass(frozen=True)
class Settings:
    """A method's config, for the run folder."""

    width: int = 8  # toy
    size: tuple[int, int] = (4, 5)  # toy
    rate: float = 0.1  # toy
    folder: Path | None = None  # toy


# --- running ------------------------------------------------------------------------------------------------


@contextmanager
def quiet() -> Iterator[None]:
    """Nothing printed by readers; no fsync, which is not what is tested."""
    sync, out, err = os.fsync, sys.stdout, sys.stderr
    os.fsync = lambda handle: None
    with open(os.devnull, "w") as sink:
        sys.stdout = sys.stderr = sink
        try:
            yield
        finally:
            os.fsync, sys.stdout, sys.stderr = sync, out, err


def judge(target: Target, number: int, seed: int, seconds: float) -> tuple[str, str]:
    """Damage one file, read, put it back; -> ("read" | "refused" | a kind of finding, what was raised)."""
    rng = random.Random(f"{seed}/{target.name}/{number}")
    path = rng.choice(target.damaged)
    whole, times = path.read_bytes(), path.stat()
    path.write_bytes(damage(whole, path.suffix, rng))

    def late(*_: Any) -> None:
        raise Hang

    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        with quiet():
            target.read()
        return "read", ""
    except InputError as error:
        text = str(error)
        kind = "refused" if "\n" not in text else "several lines"
        return ("memory" if "MemoryError" in text or "Unable to allocate" in text else kind), text
    except Hang:
        return "hang", ""
    except MemoryError:
        return "memory", traceback.format_exc()
    except Exception:
        return "traceback", traceback.format_exc()
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        path.write_bytes(whole)
        os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))  # the tables' cache goes by the time


def plan(found: list[Target], inputs: int) -> list[tuple[Target, int]]:
    """(target, number) of every input, the targets by turns."""
    total = sum(target.weight for target in found)
    counts = {target.name: -(-inputs * target.weight // total) for target in found}
    turns = ((target, k) for k in range(max(counts.values())) for target in found if k < counts[target.name])
    return list(turns)[:inputs]


def fuzz(root: Path, inputs: int, seed: int = 0, seconds: float = 10, only: tuple[str, ...] = (),
         first: int = 0, leave: tuple[str, ...] = (),
         tell: Callable[[int, str, int, str, str], None] = lambda *_: None) -> collections.Counter:
    """Run the inputs from `first` on -> how many ended how. tell(place, target, number, outcome, detail)
    after each."""
    found = [one for one in targets(root) if one.name not in leave and (not only or one.name in only)]
    ends: collections.Counter = collections.Counter()
    with np.errstate(all="ignore"):
        for place, (target, number) in enumerate(plan(found, inputs)):
            if place >= first:
                end, detail = judge(target, number, seed, seconds)
                ends[end] += 1
                tell(place, target.name, number, end, detail)
    return ends


def child(args: argparse.Namespace) -> None:
    """The inputs from --first on, one JSON line each on stdout; address space limited."""
    import warnings

    warnings.simplefilter("ignore")
    out = os.fdopen(os.dup(1), "w", buffering=1)

    def tell(place: int, *rest: Any) -> None:
        out.write(json.dumps([place, *rest]) + "\n")

    with tempfile.TemporaryDirectory() as folder:
        targets(Path(folder) / "warm")  # what is imported late is imported before the limit is set
        size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (size + LIMIT, resource.RLIM_INFINITY))
        words = args.inputs, args.seed, args.seconds, tuple(args.only), args.first
        fuzz(Path(folder) / "x", *words, tell=tell)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.fuzz", description=__doc__.splitlines()[0])
    parser.add_argument("--inputs", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=10, help="a read that takes longer hangs")
    parser.add_argument("--only", nargs="*", default=[], metavar="NAME", help="these targets")
    parser.add_argument("--at", type=int, help="this input of one target, with its traceback")
    parser.add_argument("--first", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.first is not None:
        child(args)
        return
    if args.at is not None:
        with tempfile.TemporaryDirectory() as folder:
            for target in targets(Path(folder)):
                if target.name in args.only:
                    print(target.name, args.at, *judge(target, args.at, args.seed, args.seconds), sep="\n")
        return
    begun, first, ends, shown = time.time(), 0, collections.Counter(), collections.Counter()
    by_target: dict[str, collections.Counter] = collections.defaultdict(collections.Counter)
    while (start := first) < args.inputs:
        command = [sys.executable, "-m", "tests.bench.fuzz", "--first", first, "--inputs", args.inputs]
        command += ["--seed", args.seed, "--seconds", args.seconds]
        command += ["--only", *args.only] if args.only else []
        said = tempfile.TemporaryFile("w+")  # not a pipe: libpng's warnings would fill it
        pipes = {"stdout": subprocess.PIPE, "stderr": said, "text": True}
        process = subprocess.Popen([*map(str, command)], cwd=ROOT, **pipes)
        while True:
            if not select.select([process.stdout], [], [], 6 * args.seconds + 60)[0]:
                process.kill()  # a hang that no signal ends
            if not (line := process.stdout.readline()):
                break
            place, name, number, end, detail = json.loads(line)
            first = place + 1
            ends[end] += 1
            by_target[name][end] += 1
            if end not in ("read", "refused"):
                rows = [row.strip() for row in detail.splitlines()]
                places = [row for row in rows if "/common/" in row]  # the last: where it was raised
                cause = re.sub(r"/tmp/\S+|\d+", "*", rows[-1]) if rows else ""
                key = f"{end}: {name}: {cause[:120]} {places[-1][:120] if places else ''}"
                shown[key] += 1
                if shown[key] == 1:
                    print(f"{key}   (--only '{name}' --at {number})", flush=True)
            if first % 10_000 == 0:
                print(f"{first} inputs, {time.time() - begun:.0f} s: {dict(ends)}", flush=True)
        code = process.wait()
        said.seek(0)
        tail = said.read()[-2000:]
        said.close()
        if code != 0:
            if first == start:
                sys.exit(f"no input was read: {tail}")
            print(f"the process ended at input {first} with {process.returncode}: {tail[-600:]}", flush=True)
            ends["process died"] += 1
            first += 1
    print(f"\n{'target':28}" + "".join(f"{end:>12}" for end in ends))
    for name, counts in by_target.items():
        print(f"{name:28}" + "".join(f"{counts[end]:12}" for end in ends))
    bad = sum(count for end, count in ends.items() if end not in ("read", "refused"))
    took = time.time() - begun
    print(f"\n{args.inputs} inputs, seed {args.seed}, {took:.0f} s: {dict(ends)}; {bad} findings")
    for key, count in shown.most_common():
        print(f"  {count:6} {key}")
    sys.exit(bool(bad))


if __name__ == "__main__":
    main()
