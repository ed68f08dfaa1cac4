"""A world's folder while it is being built: whose it is, and the processes that record its scenes."""

import multiprocessing
import shutil
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from pathlib import Path
from typing import NamedTuple

import cv2

from common.files import InputError, end_with_parent, is_empty, read_json, write_json


def describe_world(settings: NamedTuple) -> dict:
    """What world.json says."""
    kept = {name: value for name, value in settings._asdict().items() if name != "decoys" or value}
    return {**kept, "image": f"{settings.image[1]}x{settings.image[0]}", "generator": "data.driving"}


def claim_folder(out: Path, settings: NamedTuple) -> bool:
    """True if there is something to build in `out`; refuses a folder that holds anything else."""
    wanted = describe_world(settings)
    finished, plan = out / "exact" / "world.json", out / "exact" / "building" / "settings.json"
    for path in (finished, plan):
        if path.is_file():
            found = read_json(path)
            if found != wanted:
                other = [key for key in wanted if not isinstance(found, dict) or found.get(key) != wanted[key]]
                raise InputError(
                    f"{out}: holds a world with another {', '.join(other)}: choose another --out or delete it")
            if path == finished:
                shutil.rmtree(out / "exact" / "building", ignore_errors=True)
            return path == plan
    if out.exists() and (not out.is_dir() or not is_empty(out)):
        raise InputError(f"{out}: not empty and not a world of data.driving: choose another --out")
    try:
        write_json(plan, wanted)
    except OSError as error:
        raise InputError(f"{out}: cannot be written ({error.strerror}): choose another --out") from error
    return True


def record_all(record, out: Path, settings: NamedTuple, todo: list[int], workers: int, bar) -> None:
    """record(out, settings, i, tick) for i of `todo`, in `workers` processes; bar counts ticks (keyframes)."""
    if workers == 1:
        _one_thread()
        for i in todo:
            record(out, settings, i, bar.update)
        return
    context = multiprocessing.get_context("spawn")
    counter = context.Value("l", 0)
    shown = 0
    with ProcessPoolExecutor(workers, mp_context=context, initializer=_start_worker, initargs=(counter,)) as pool:
        jobs = {pool.submit(record, out, settings, i, tick_keyframe) for i in todo}
        while jobs:
            done, jobs = wait(jobs, timeout=0.5, return_when=FIRST_COMPLETED)
            bar.update(counter.value - shown)
            shown = counter.value
            for job in done:
                try:
                    job.result()
                except BaseException:
                    pool.shutdown(cancel_futures=True)
                    raise


_COUNTER = None


def _start_worker(counter) -> None:
    global _COUNTER
    _COUNTER = counter
    _one_thread()
    end_with_parent()


def _one_thread() -> None:
    """Scenes are the parallel unit; their libraries stay on one core."""
    import torch
    torch.set_num_threads(1)
    cv2.setNumThreads(1)


def tick_keyframe() -> None:
    """One keyframe more, for the progress bar of the process that waits."""
    if _COUNTER is not None:
        with _COUNTER.get_lock():
            _COUNTER.value += 1
