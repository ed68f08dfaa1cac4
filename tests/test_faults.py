"""The short form of `make faults`: ten faults strike EasyOcc's labels and training; the same command then finishes."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def test_faults_lose_nothing(tmp_path):
    words = "--count 10 --seed 304 --methods easyocc --verbs labels train".split()
    done = subprocess.run([sys.executable, "-m", "tests.bench.faults", *words], cwd=ROOT, capture_output=True,
                          text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "10 faults, seed 304" in done.stdout and done.stdout.rstrip().endswith("0 findings")
