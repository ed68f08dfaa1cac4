"""What all tests share: the root on the path, the gpu marker's skip, the count of reference vectors."""

import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
for folder in (ROOT, ROOT / "tests"):
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))

import vectors  # noqa: E402  (needs the path above)


def pytest_collection_modifyitems(items):
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))


def pytest_sessionfinish(session):
    if hasattr(session.config, "workeroutput"):  # a worker of `pytest -n`: its counts go to the process that reports
        session.config.workeroutput["vectors"] = dict(vectors.PASSED)


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node):
    vectors.PASSED.update(getattr(node, "workeroutput", {}).get("vectors", {}))


def pytest_terminal_summary(terminalreporter):
    if not vectors.PASSED:
        return
    sets = ", ".join(f"{name} {count}" for name, count in sorted(vectors.PASSED.items()))
    terminalreporter.section("reference vectors")
    terminalreporter.write_line(
        f"reference vectors: {sum(vectors.PASSED.values())} cases passed, not used here: {'; '.join(vectors.NOT_USED)}")
    terminalreporter.write_line(f"by set: {sets}")


@pytest.fixture(scope="session")
def tiny_world(tmp_path_factory) -> Path:
    """A driving world small enough for tests: one training and one validation scene of 3 keyframes, 200x112 images."""
    from data.driving import make_world

    out = tmp_path_factory.mktemp("world") / "tiny"
    make_world(out, seed=0, size="mini", scenes=2, keyframes=3, sweeps=1, camera_sweeps=2, image=(112, 200))
    return out


@pytest.fixture
def one_thread():
    """Small tensors: a second thread costs more than it gives, above all beside other jobs."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def seeded():
    torch.manual_seed(0)


@pytest.fixture(scope="module")
def observations():
    """Three observations of the tabletop world."""
    from small_policy import look

    return look()


@pytest.fixture(scope="module")
def tabletop(tmp_path_factory) -> Path:
    """One demonstration of each of two tasks."""
    from data.tabletop import make_world

    out = tmp_path_factory.mktemp("tabletop") / "w"
    make_world(out, seed=0, demos=1, tasks=("lift_cube", "open_drawer"), size=64, workers=1)
    return out
