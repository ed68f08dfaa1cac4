"""make faults: the verbs of all five methods, killed, out of space, refused, run twice, fed NaNs and damage.

    python -m tests.bench.faults [--count 500] [--seed 0] [--methods NAME ...] [--kinds KIND ...] [--at K]

Each fault strikes one command on a very small world. Fault k depends on (seed, k) alone: `--at k` repeats it.
A durable call is an open for writing, a rename, mkdir, remove or fsync.

    kill     SIGKILL at the n-th durable call    random   SIGKILL at a random moment
    full     no space: a small tmpfs, a limit on file sizes, or ENOSPC from the n-th durable call on
    readonly EROFS from the n-th call on         taken    a file, a fifo or a dead link where --out should be
    second   a second run into --out             nan      in the loss, a weight or the optimiser
    rank     one of two processes is killed      damage   to a file in the run folder: bytes, values, emptied,
                                                          removed, a folder, a fifo or a link in its place

A command that fails must say so in one line and end with 1 or 2, never hang, and touch nothing but --out and
--cache. The same command afterwards must finish; then every file is the undisturbed run's byte for byte (but
for times, memory and dates), nothing temporary is left, and no process lives on.

A fault is a fork of this process, which has imported all that the commands need: it starts in milliseconds.
"""

import argparse
import collections
import contextlib
import ctypes
import errno
import hashlib
import importlib
import itertools
import json
import multiprocessing.util
import os
import random
import re
import resource
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(folder) for folder in (ROOT, ROOT / "tests") if str(folder) not in sys.path]

import small_policy  # noqa: E402
import test_tinyvlm  # noqa: E402
import torch  # noqa: E402
from test_easyocc_run import SMALL as EASYOCC  # noqa: E402
from test_loc import SMALL as LOC  # noqa: E402
from test_loc import flags, untrained_clip  # noqa: E402
from test_occle import NARROW, SIZES, words  # noqa: E402
from test_occvla import SMALL as OCCVLA  # noqa: E402
from torch.optim.optimizer import register_optimizer_step_post_hook  # noqa: E402

from common import engine  # noqa: E402
from common.files import exit_on_input_error  # noqa: E402
from data import driving, tabletop, tinyclip, tinyvlm  # noqa: E402
from tests.bench.fuzz import damage  # noqa: E402

METHODS = ("easyocc", "occle", "loc", "occvla", "threedvla", "data")
KINDS = {"kill": 30, "random": 15, "full": 14, "readonly": 8, "taken": 3, "second": 6, "nan": 8, "rank": 4,
         "damage": 12}  # and how often
OFTEN = {"labels": 6, "train": 6, "predict": 4, "eval": 1, "ablate": 1}  # likewise of the verbs; makers: 3
VOLATILE = re.compile(  # keys of the JSON files
    rb'"(train_s|peak_gb|ms|gb|data|replan_ms|written|commit|(?:prefill|decode)_o\w+)": '
    rb'("[^"]*"|\[[^]]*\]|[-+.\de]+)')
DURABLE = {"os.rename", "os.mkdir", "os.remove", "os.rmdir", "shutil.rmtree", "os.truncate"}


class Case(NamedTuple):
    """A command. start: the case whose files lie in --out before."""

    name: str  # "easyocc train"
    program: str
    words: list[str]
    start: str = ""


class Whole(NamedTuple):
    """What a case leaves undisturbed."""

    files: dict[str, str]  # path in the box -> digest
    points: int  # durable calls
    seconds: float
    steps: int  # lines of finished steps on stdout


class End(NamedTuple):
    """How a process ended. code: as of a shell; below 0: by a signal; None: it hung."""

    code: int | None
    err: str
    steps: int = 0


# --- what is run --------------------------------------------------------------------------------------------


def cases(root: Path) -> list[Case]:
    """The commands. root: given/ (worlds, trained runs), whole/ (undisturbed results), box/ (where they run).
    """
    given, out, cache = root / "given", f"{root}/box/out", f"--cache {root}/box/cache"
    world, drives = (f"--data-root {given}/{name} {cache}" for name in ("world", "drives"))
    hands, play = f"--data-root {given}/hands --device cpu", "--episodes 7 --eval-batch 7 --replan 4"
    draw, ask = "--pictures 1 --eval-frames 1", "--eval-questions 2"
    small = {"easyocc": EASYOCC, "occle": words(**NARROW, **SIZES["occ3d"]), "occvla": OCCVLA,
             "loc": flags(LOC | {"clip": str(given / "clip")})}
    found = []

    def add(method: str, line: str, start: str = "") -> None:
        verb = line.split()[0]
        own = [] if verb in ("eval", "predict") else map(str, small.get(method, []))
        found.append(Case(f"{method} {verb}", method, [*line.split(), *own], start))

    for m, claim in (("easyocc", "streamlined"), ("occle", "c"), ("loc", "e")):
        add(m, f"labels {world} --split all --out {out} --workers {1 if m != 'easyocc' else 2}")
        add(m, f"train {world} --out {out} --steps 4 --workers 1")
        add(m, f"eval --ckpt {out} {cache} {draw} --no-rayiou --save-pred {out}/pred", f"{m} train")
        add(m, f"predict --ckpt {given}/{m} --out {out} {world} {draw}")
        add(m, f"ablate --claim {claim} --seeds 1 {world} --steps 2 --out {out}/x")
    add("occvla", f"train {drives} --out {out} --steps 2 --workers 1")
    add("occvla", f"eval --ckpt {out} {cache} {draw} {ask}", "occvla train")
    add("occvla", f"predict --ckpt {given}/occvla --out {out} {drives} {draw}")
    add("occvla", f"ablate --claim two-way --seeds 1 {drives} --stage-steps 1 1 1 1 --out {out}/x "
        f"--eval-frames 1 {ask}")
    add("threedvla", f"train {hands} --out {out}")
    add("threedvla", f"eval --ckpt {out} --device cpu --clean 1 --pictures 1 {play}", "threedvla train")
    add("threedvla", f"ablate --claim masking --seeds 1 {hands} --out {out}/x --base-steps 1 "
        f"--stage1-steps 1 --stage2-steps 1 {play}")
    city = f"--out {out} --scenes 2 --keyframes 1 --image 100x56 --workers"
    makers = {"driving": f"{city} 2", "kitti": f"{city} 1 --format semantickitti", "tinyvlm": f"{out}/vlm",
              "tabletop": f"--out {out} --demos 1 --tasks lift_cube can_in_basket --image 32 --workers 2",
              "tinyclip": f"--out {out}/clip.safetensors --hide data/openset/rare.txt --rigs 1 --steps 2"}
    return found + [Case(f"data {name}", name, line.split()) for name, line in makers.items()]


def programs() -> dict[str, Callable[[], Any]]:
    """The main() of each method and of each maker in data/."""
    methods = {name: importlib.import_module(name) for name in METHODS[:-1]}

    def hands() -> None:
        methods["threedvla"].PRESETS["tiny"], tabletop.GOAL_STEPS = small_policy.SMALL, 4
        methods["threedvla"].main()

    @exit_on_input_error
    def vlm() -> None:
        tinyvlm.RIGS = 1
        tinyvlm.make_tinyvlm(sys.argv[1], *test_tinyvlm.fresh(), test_tinyvlm.no_questions, steps=2)

    city = importlib.import_module("data.driving.__main__").main
    makers = {"driving": city, "kitti": city, "tabletop": tabletop.main, "tinyclip": tinyclip.main}
    own = makers | {"threedvla": hands, "tinyvlm": vlm}
    return {name: module.main for name, module in methods.items()} | own


# --- in the process that a fault strikes --------------------------------------------------------------------


def arm(kind: str, at: int, log: Path, out: Path) -> None:
    """Install a fault; count durable calls, note what is written elsewhere."""
    count, main, inside = itertools.count(1), os.getpid(), (str(out.parent), "/dev/shm/pym-")
    code = {"nospace": errno.ENOSPC, "readonly": errno.EROFS}.get(kind)

    def durable(path: str) -> None:
        n = next(count)
        if kind == "count":
            (log / "points").write_text(str(n))
        if n == at and kind in ("kill", "stop"):
            os.kill(main, signal.SIGKILL if kind == "kill" else signal.SIGSTOP)
        if code and n >= at and path.startswith(str(out)):
            raise OSError(code, os.strerror(code), path)

    def watch(event: str, args: tuple) -> None:
        writing = os.O_WRONLY | os.O_RDWR | os.O_CREAT
        writes = event == "open" and isinstance(args[2], int) and args[2] & writing
        if (writes or event in DURABLE) and not isinstance(args[0], int) and os.getpid() == main:
            folder, name = os.path.split(os.path.abspath(os.fsdecode(args[0])))
            path = os.path.join(os.path.realpath(folder), name)
            path = os.path.realpath(path) if event == "open" else path  # the others take a link for itself
            if path.startswith((str(log), "/dev/null", "/proc/")):
                return
            if not path.startswith(inside):
                with open(log / "escapes", "a") as file:
                    file.write(f"{event} {path}\n")
            durable(path)

    sync = os.fsync
    os.fsync = lambda handle: (durable(os.readlink(f"/proc/self/fd/{handle}")), sync(handle))[1]
    sys.addaudithook(watch)
    poison(kind, at)


def poison(kind: str, at: int) -> None:
    """NaN in the loss, a weight or the optimiser's state, at the step `at` of the command."""
    steps, log = itertools.count(1), engine.Session.log

    def bad_loss(self, step, terms, lr):
        name = list(terms)[-1]
        log(self, step, terms | ({name: terms[name] * float("nan")} if next(steps) == at else {}), lr)

    def bad_state(optimizer, args, kwargs):
        if next(steps) == at:
            one = next(p for group in optimizer.param_groups for p in group["params"] if p.grad is not None)
            tensor = one.detach() if kind == "weight" else optimizer.state[one]["step"]
            tensor.view(-1)[0] = float("nan")

    if kind == "loss":
        engine.Session.log = bad_loss
    if kind in ("weight", "optimizer"):
        register_optimizer_step_post_hook(bad_state)


# --- the laboratory -----------------------------------------------------------------------------------------


class Lab:
    """Runs commands in root/box and judges what they leave."""

    def __init__(self, root: Path, methods: list[str], verbs: list[str], seconds: float):
        self.root, self.box, self.out, self.log = root, root / "box", root / "box/out", root / "log"
        self.seconds, self.programs, self.whole, self.given = seconds, programs(), {}, ""
        self.cases = [case for case in cases(root) if case.name.split()[0] in methods
                      and (not verbs or case.name.split()[1] in verbs)]
        libc, private = ctypes.CDLL(None), ["mount", "--make-rprivate", "/"]
        libc.prctl(36, 1)  # PR_SET_CHILD_SUBREAPER: orphans become children of this process
        own = libc.unshare(0x20000) == 0  # CLONE_NEWNS: mounts of its own, which end with it; root alone may
        self.mounts = own and subprocess.run(private, check=False, capture_output=True).returncode == 0
        self.log.mkdir(parents=True)
        os.environ["MPLCONFIGDIR"] = str(self.log)  # matplotlib's list of fonts is not what is tested

    def clear(self, case: Case) -> None:
        """An empty box, with what the case starts from in --out."""
        shutil.rmtree(self.box, ignore_errors=True)
        for name in ("home", "tmp", "data"):
            (self.box / name).mkdir(parents=True)
        (self.box / "data/openset").symlink_to(ROOT / "data/openset")
        if case.start:
            shutil.copytree(self.root / "whole" / case.start, self.out)

    def start(self, case: Case, kind: str = "", at: int = 0, limit: int = 0, tag: str = "a", **env) -> int:
        """Fork a process that runs the case's command -> its pid. limit: bytes of a file."""
        for stream in ("out", "err"):
            (self.log / f"{tag}.{stream}").unlink(missing_ok=True)
        if pid := os.fork():
            return pid
        code = 70
        try:
            out, err = (os.open(self.log / f"{tag}.{s}", os.O_WRONLY | os.O_CREAT) for s in ("out", "err"))
            null = os.open(os.devnull, os.O_RDWR)
            os.dup2(null, 0), os.dup2(null if limit else out, 1), os.dup2(err, 2), os.chdir(self.box)
            os.environ.pop("XDG_CACHE_HOME", None)
            os.environ |= {"HOME": f"{self.box}/home", "TMPDIR": f"{self.box}/tmp", "TQDM_DISABLE": "1"} | env
            tempfile.tempdir, sys.dont_write_bytecode = None, True
            main, sys.argv = self.programs[case.program], [f"{case.program}.py", *case.words]
            sys.modules["__main__"] = sys.modules[main.__module__]  # what spawned workers import
            if limit:
                resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
            arm(kind, at, self.log, self.out)
            main()
            code = 0
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
        except BaseException:
            traceback.print_exc()
        finally:
            if kind == "count":
                (self.log / "modules").write_text(" ".join(sys.modules))
            multiprocessing.util._exit_function(), threading._shutdown()
            sys.stdout.flush(), sys.stderr.flush(), os._exit(code)

    def end(self, pid: int, tag: str = "a") -> End:
        """Wait for a process; one that hangs is killed."""
        late, code = time.time() + self.seconds, None
        while (found := os.waitpid(pid, os.WNOHANG))[0] == 0 and time.time() < late:
            time.sleep(0.004)
        if found[0]:
            code = os.waitstatus_to_exitcode(found[1])
        else:
            os.kill(pid, signal.SIGKILL), os.waitpid(pid, 0)
        steps = len(re.findall(r"^step \d+/", self.read(f"{tag}.out"), re.M))
        return End(code, self.read(f"{tag}.err"), steps)

    def run(self, case: Case, **how: Any) -> End:
        return self.end(self.start(case, **how))

    def read(self, name: str) -> str:
        path = self.log / name
        return path.read_text(errors="replace") if path.is_file() else ""

    def prepare(self, tell: Callable[[str], Any]) -> None:
        """Worlds, trained runs, and what every case leaves undisturbed."""
        given, needed = self.root / "given", {case.name.split()[0] for case in self.cases}

        def make(methods: str, work: Callable[..., Any], *args: Any, **options: Any) -> None:
            if needed & {*methods.split()}:
                if not (pid := os.fork()):  # torch may start no threads here
                    os.dup2(os.open(os.devnull, os.O_WRONLY), 1), torch.set_num_threads(1)
                    work(*args, **options), os._exit(0)
                assert os.waitpid(pid, 0)[1] == 0

        city = {"size": "mini", "scenes": 2, "image": (56, 100), "workers": 1}
        make("easyocc occle loc", driving.make_world, given / "world", 0, keyframes=2, sweeps=1, **city)
        make("occvla", driving.make_world, given / "drives", 2, keyframes=8, sweeps=0, **city)
        make("loc", untrained_clip, given / "clip")
        make("threedvla", tabletop.make_world, given / "hands", 0, 1, ("lift_cube",), 64, 1)
        for case in self.cases:
            self.clear(case)
            begun = time.time()
            end, took = self.run(case, kind="count"), time.time() - begun
            if problems := [f"{end.code}: {end.err[-3000:]}"] * (end.code != 0) + self.traces():
                sys.exit(f"{case.name}, undisturbed: {problems}\n{case.words}")
            shutil.copytree(self.out, self.root / "whole" / case.name)
            if case.name.endswith(" train"):
                shutil.copytree(self.out, given / case.program)
            for name in self.read("modules").split():  # so that a fork imports nothing any more
                with contextlib.suppress(Exception):
                    importlib.import_module(name)
            self.whole[case.name] = Whole(self.digest(), int(self.read("points")), took, end.steps)
            tell(f"{case.name:20} {took:5.1f} s, {self.whole[case.name].points} durable calls")
        self.given = self.fingerprint()

    # judging

    def digest(self) -> dict[str, str]:
        """{path: hash} of all in the box; of JSON without times, memory and dates."""
        found = {}
        for path in sorted(path for path in self.box.rglob("*") if not path.is_symlink()):
            data = path.read_bytes() if path.is_file() else b"folder"
            data = VOLATILE.sub(b"", data) if path.suffix in (".json", ".jsonl") else data
            found[str(path.relative_to(self.box))] = hashlib.sha256(data).hexdigest()
        return found

    def fingerprint(self) -> list[tuple]:
        """Of the worlds, which no command may touch."""
        paths = sorted((self.root / "given").rglob("*"))
        return [(path, path.lstat().st_size, path.lstat().st_mtime_ns) for path in paths]

    def traces(self) -> list[str]:
        """What must not be there: processes that live on, writes elsewhere."""
        problems, late = [], time.time() + 60
        while living := self.orphans():
            if time.time() > late:
                problems, late = [f"left a process: {name}" for name in living.values()], late + 60
                for pid in living:
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.01)
        problems += [f"wrote elsewhere: {line}" for line in self.read("escapes").splitlines()[:3]]
        (self.log / "escapes").unlink(missing_ok=True)
        return problems

    def orphans(self) -> dict[int, str]:
        """Living children of this process, none of which it waits for: {pid: command}."""
        found = {}
        for entry in (entry for entry in os.scandir("/proc") if entry.name.isdigit()):
            with contextlib.suppress(OSError):
                parent = Path(entry.path, "stat").read_text().rsplit(")")[-1].split()[1]
                if parent == str(os.getpid()) and os.waitpid(int(entry.name), os.WNOHANG)[0] == 0:
                    found[int(entry.name)] = Path(entry.path, "cmdline").read_text().replace("\0", " ")[:120]
        return found

    def refused(self, end: End) -> list[str]:
        """What is wrong about how a command failed; nothing if it did not."""
        lines = [line for line in end.err.splitlines() if line.startswith("error: ")]
        fine = end.code == 0 or (end.code in (1, 2) and len(lines) == 1)
        how = "hangs" if end.code is None else f"ended with {end.code} and {len(lines)} error lines"
        return [] if fine and "Traceback" not in end.err else [f"{how}: ...{end.err[-1500:]}"]

    def again(self, case: Case, name: str = "", ends: list[End] | None = None) -> list[str]:
        """The same command, undisturbed: it finishes, and all is as if nothing had been."""
        for end in ends or [self.run(case)]:
            if end.code != 0:
                return [f"again: {'hangs' if end.code is None else end.code}: ...{end.err[-1500:]}"]
        problems, now, whole = self.traces(), self.digest(), self.whole[name or case.name].files
        differ = sorted((path.count("/"), path) for path in now | whole if now.get(path) != whole.get(path))
        for _, path in differ[:6]:
            word = "lost" if path not in now else "left behind" if path not in whole else "differs"
            problems.append(f"again: {path} {word}")
        return problems + ["the world was changed"] * (self.fingerprint() != self.given)

    # faults: each a function of (case, what it leaves undisturbed, generator) -> what went wrong

    def do_kill(self, case: Case, whole: Whole, rng: random.Random) -> list[str]:
        self.run(case, kind="kill", at=rng.randint(1, whole.points))
        return self.traces() + self.again(case)

    def do_random(self, case: Case, whole: Whole, rng: random.Random) -> list[str]:
        pid, late = self.start(case), time.time() + whole.seconds * rng.random()
        while time.time() < late and os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
            time.sleep(0.002)
        os.kill(pid, signal.SIGKILL), self.end(pid)
        return self.traces() + self.again(case)

    def do_full(self, case: Case, whole: Whole, rng: random.Random) -> list[str]:
        before = self.whole[case.start].files if case.start else {}
        new = [self.root / "whole" / case.name / name[4:] for name, digest in whole.files.items()
               if name.startswith("out/") and before.get(name) != digest]
        sizes = sorted(path.stat().st_size for path in new if path.is_file())
        way, room = rng.choice(("tmpfs", "limit", "nospace")), rng.randint(1, 9 + sum(sizes) // 4096)
        way = "limit" if way == "tmpfs" and not self.mounts else way
        if way == "tmpfs":
            room += sum(1 + path.stat().st_size // 4096 for path in self.out.rglob("*"))
            self.out.mkdir(exist_ok=True)
            words = ["mount", "-t", "tmpfs", "-o", f"size={4096 * room}", "none", self.out]
            subprocess.run(words, check=True)
        try:
            if way == "tmpfs" and case.start:
                shutil.copytree(self.root / "whole" / case.start, self.out, dirs_exist_ok=True)
            large = [size for size in sizes if size > 4000] or [4000]  # stderr is a file too
            limit = rng.choice(large) - rng.randint(1, 99) if way == "limit" else 0
            end = self.run(case, kind=way, at=rng.randint(1, whole.points), limit=limit)
            problems = self.refused(end) + self.traces()
            if way == "tmpfs":
                subprocess.run(["mount", "-o", "remount,size=4g", self.out], check=True)
            return [f"{way}: {text}" for text in problems + self.again(case)]
        finally:
            if way == "tmpfs":
                subprocess.run(["umount", self.out], check=True)

    def do_readonly(self, case: Case, whole: Whole, rng: random.Random) -> list[str]:
        at = 1 if rng.random() < 0.5 else rng.randint(1, whole.points)
        return self.refused(self.run(case, kind="readonly", at=at)) + self.traces() + self.again(case)

    def do_taken(self, case: Case, whole: Whole, rng: random.Random) -> list[str]:
        shutil.rmtree(self.out, ignore_errors=True)
        ways = {"file": self.out.touch, "fifo": lambda: os.mkfifo(self.out),
                "dead link": lambda: self.out.symlink_to("no/no"), "loop": lambda: self.out.symlink_to("out")}
        ways[way := rng.choice(list(ways))]()
        end = self.run(case)
        problems = self.refused(end) + self.traces() + ["it ends with 0"] * (end.code == 0)
        return [f"{way}: {text}" for text in problems]

    def do_second(self, case: Case, whole: Whole, rng: random.Random) -> list[str]:
        pid = self.start(case, kind="stop", at=rng.randint(1, whole.points))
        os.waitid(os.P_PID, pid, os.WEXITED | os.WSTOPPED | os.WNOWAIT)
        second = self.end(self.start(case, tag="b"), "b")
        os.kill(pid, signal.SIGCONT)
        first = self.end(pid)
        problems = [f"a run beside: {text}" for end in (first, second) for text in self.refused(end)]
        problems += ["both trained"] * (not case.start and first.steps + second.steps > whole.steps)
        problems += ["neither finished"] * (first.code != 0 and second.code != 0)
        return problems + self.traces() + self.again(case)

    def do_nan(self, case: Case, whole: Whole, rng: random.Random) -> list[str]:
        kind = rng.choice(("loss", "weight", "optimizer"))
        end = self.run(case, kind=kind, at=rng.randint(1, max(1, whole.steps)))
        problems = self.refused(end) + ["not noticed"] * (kind == "loss" and end.code == 0)
        problems += ["no word of it"] * (end.code != 0 and "not finite" not in end.err)
        return [f"{kind}: {text}" for text in problems + self.again(case)]

    def do_rank(self, case: Case, whole: Whole, rng: random.Random) -> list[str]:
        """Without torchrun's agent, which would end the other: it must notice by itself."""
        name, dies = f"{case.name} by two", rng.randrange(2)
        if name not in self.whole:
            if any(end.code != 0 for end in self.pair(case)):
                return [f"two, undisturbed: {self.read('a.err')[-900:]} {self.read('b.err')[-900:]}"]
            self.whole[name] = whole._replace(files=self.digest())
            self.clear(case)
        ends = self.pair(case, dies, rng.randint(1, whole.points))
        problems = [f"the other {text}" for text in self.refused(ends[1 - dies])]
        return problems + self.traces() + self.again(case, name, self.pair(case))

    def pair(self, case: Case, dies: int = -1, at: int = 0) -> list[End]:
        """The case in two processes; one of them is killed."""
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        env = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        pids = [self.start(case, "kill" * (k == dies), at, tag="ab"[k], RANK=str(k), LOCAL_RANK=str(k), **env)
                for k in range(2)]
        return [self.end(pid, "ab"[k]) for k, pid in enumerate(pids)]

    def do_damage(self, case: Case, whole: Whole, rng: random.Random) -> list[str]:
        if not case.start:
            self.run(case, kind="kill", at=rng.randint(whole.points // 2, whole.points)), self.traces()
        files = sorted(path for path in self.out.rglob("*") if path.is_file())
        plain = [path for path in files if path.suffix in (".json", ".jsonl", ".safetensors")]
        if not files:
            return []
        path = rng.choice(plain if plain and rng.random() < 0.7 else files)
        data = path.read_bytes()
        path.unlink()
        ways = {"change": lambda: path.write_bytes(damage(data, path.suffix, rng)), "empty": path.touch,
                "folder": path.mkdir, "fifo": lambda: os.mkfifo(path), "gone": lambda: None,
                "link": lambda: path.symlink_to("/etc/passwd")}
        ways[way := rng.choices(list(ways), (3, 1, 1, 1, 1, 1))[0]]()
        problems = self.refused(self.run(case)) + self.traces()
        return [f"{path.relative_to(self.box)} {way}: {text}" for text in problems]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.faults", description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--methods", nargs="+", default=METHODS, choices=METHODS)
    parser.add_argument("--verbs", nargs="+", default=[], help="commands of the methods and makers of data/")
    parser.add_argument("--kinds", nargs="+", default=[*KINDS], choices=KINDS)
    parser.add_argument("--seconds", type=float, default=120, help="a command that takes longer hangs")
    parser.add_argument("--at", type=int, nargs="+", metavar="K", help="these faults alone")
    parser.add_argument("--report", type=Path, help="write counts and findings as JSON")
    args = parser.parse_args()
    begun, findings, done = time.time(), [], collections.Counter()
    memory = "/dev/shm" if os.path.isdir("/dev/shm") else None
    with tempfile.TemporaryDirectory(prefix="faults-", dir=memory) as folder:
        lab = Lab(Path(folder).resolve(), args.methods, args.verbs, args.seconds)
        lab.prepare(lambda line: print(line, flush=True))
        often = [(case, OFTEN.get(case.name.split()[1], 3)) for case in lab.cases]
        for k in args.at or range(args.count):
            rng = random.Random(f"{args.seed}/{k}")
            kind = rng.choices(args.kinds, [KINDS[kind] for kind in args.kinds])[0]
            fit = [one for one in often if kind not in ("nan", "rank") or lab.whole[one[0].name].steps]
            fit = [one for one in fit if kind != "rank" or not one[0].name.endswith("ablate")]  # refused
            case = rng.choices(*zip(*fit))[0]
            lab.clear(case)
            problems = getattr(lab, f"do_{kind}")(case, lab.whole[case.name], rng)
            done.update([kind, case.name])
            if problems:
                findings.append({"fault": k, "kind": kind, "case": case.name, "problems": problems})
                print(f"--at {k}: {case.name}, {kind}: " + "\n    ".join(problems), flush=True)
            if done.total() % 50 == 0:
                took = time.time() - begun
                print(f"{done.total() // 2} faults, {took:.0f} s, {len(findings)} findings", flush=True)
        shutil.rmtree(lab.box, ignore_errors=True)
    value = {"command": shlex.join(["python", "-m", "tests.bench.faults", *sys.argv[1:]]), "seed": args.seed,
             "date": time.strftime("%Y-%m-%d"), "seconds": round(time.time() - begun),
             "faults": {kind: done[kind] for kind in args.kinds},
             "commands": {case.name: done[case.name] for case in lab.cases}, "findings": findings}
    if args.report:
        args.report.write_text(json.dumps(value, indent=1) + "\n")
    print(f"{done.total() // 2} faults, seed {args.seed}: {value['faults']}; {len(findings)} findings")
    sys.exit(bool(findings))


if __name__ == "__main__":
    main()
