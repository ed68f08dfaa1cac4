"""LIBERO's own simulator, in its own environment (make setup-libero); skipped where that is not made."""

import json
import os
import subprocess
from pathlib import Path

import pytest

PYTHON = Path(__file__).parents[1] / ".venv-libero" / "bin" / "python"
PLAY = """
import json, numpy as np
from common.robot import make_environment
out = {}
for suite in ("libero_spatial", "libero_goal_lan"):
    env = make_environment(suite, None, 64)
    o = env.reset(env.tasks[0], 0)
    for _ in range(10):
        step = env.step(np.array([0, 0, 1, 0, 0, 0, -1.0]))
    p = step.observation
    out[suite] = {"tasks": len(env.tasks), "words": env.instruction, "spread": float(np.std(p.images)),
                  "hand": [float(o.state[2]), float(p.state[2])],
                  "depth": [float(np.min(p.depth)), float(np.max(p.depth))],
                  "things": len(env.things), "done": step.done}
    env.close()
print(json.dumps(out))
"""


@pytest.mark.skipif(not PYTHON.exists(), reason="no .venv-libero: make setup-libero")
def test_the_simulator_plays_from_the_packages_alone(tmp_path):
    environment = os.environ | {"MUJOCO_GL": "egl", "TMPDIR": str(tmp_path)}
    run = subprocess.run([PYTHON, "-c", PLAY], cwd=PYTHON.parents[2], env=environment, capture_output=True,
                         text=True)
    assert run.returncode == 0, run.stderr[-2000:]
    seen = json.loads(run.stdout.splitlines()[-1])
    for suite in seen.values():
        before, after = suite["hand"]
        assert suite["tasks"] == 10 and suite["things"] >= 5 and suite["done"] is False
        assert after - before > 0.02, "ten steps upwards raise the hand"
        assert suite["spread"] > 10 and 0 < suite["depth"][0] < suite["depth"][1] < 20
    assert seen["libero_spatial"]["words"].startswith("pick up the black bowl between")
    assert seen["libero_goal_lan"]["words"] != "open the middle drawer of the cabinet"  # its own words
