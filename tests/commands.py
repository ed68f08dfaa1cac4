"""A method's command line, run inside the test's own process or by torchrun in two; losses of a run."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest


def of(method: ModuleType) -> tuple[Callable, Callable]:
    """-> run(*words): the method's main() with these words; fails(capsys, *words): the same with bad input, which must
    end with exit code 2 and one line on stderr, which is returned."""

    def run(*words) -> None:
        argv, sys.argv = sys.argv, [Path(method.__file__).name, *map(str, words)]
        try:
            method.main()
        finally:
            sys.argv = argv

    def fails(capsys, *words) -> str:
        with pytest.raises(SystemExit) as stop:
            run(*words)
        lines = [line for line in capsys.readouterr().err.replace("\r", "\n").splitlines() if line.startswith("error:")]
        assert stop.value.code == 2 and len(lines) == 1, lines
        return lines[0]

    return run, fails


def torchrun(script: str, *words) -> subprocess.CompletedProcess:
    """A method's script with these words in two processes."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", script]
    return subprocess.run([*command, *map(str, words)], cwd=Path(__file__).parents[1], capture_output=True, text=True,
                          env=os.environ | {"OMP_NUM_THREADS": "1"})


def losses(stage: Path) -> list[float]:
    """The loss of each line of a stage's log."""
    return [json.loads(line)["loss"] for line in (stage / "log.jsonl").read_text().splitlines()]
