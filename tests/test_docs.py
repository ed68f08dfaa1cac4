"""README, docs/ and CONTRIBUTING: links lead somewhere, lines hold the code they quote, every command is one."""

import importlib
import importlib.util
import re
import runpy
import shlex
import shutil
import sys
from pathlib import Path

import pytest

from common import cli, verbs
from common.nuscenes import NuScenesOccupancy
from experiments import docs
from experiments.table import METHODS, load

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "data/README.md")]
PAGES += sorted((ROOT / "docs").glob("*.md"))
PARSED = {  # what of a command -> why it is only parsed here, by test_every_command_of_a_page_is_one
    "make": "its recipe is commands like these; tests/test_bench.py, test_fuzz.py and test_faults.py run the short forms",
    "torchrun": "several GPUs; tests/test_ranks.py runs two processes",
    "pytest": "it is what runs this",
    "ablate": "hours; tests/test_experiments_*.py",
    "semantickitti": "real data; tests/test_semantickitti.py and test_occle.py run it on a small world",
    "files": "maps that another tool wrote; tests/test_labelers.py",
    "occle.py loc.py occvla.py threedvla.py": "tests/test_<method>.py run these verbs with small networks; those of ready/ "
                                              "run here",
}
SIZES = ["--image-size", "56", "100", "--workers", "1"]
SMALL = {  # what a command of the README gets besides, to be over in seconds
    "labels": ["--map-stride", "8", "8", *SIZES],
    "train": ["--map-stride", "8", "8", "--grid-stride", "4", "4", "2", "--lift-stride", "1", "1", "1", "--cnn-channels",
              "8", "16", "--channels", "8", "--steps", "2", "--warmup", "1", "--backbone", "conv", *SIZES],
    "eval": ["--no-rayiou", "--pictures", "1"], "predict": ["--pictures", "1"],
    "threedvla.py eval": ["--clean", "1", "--pictures", "1"], "loc.py query": ["--eval-frames", "1"],
}


def commands_of(page: Path) -> list[list[str]]:
    """The words of every command in a page's code blocks."""
    blocks = re.findall(r"^```[a-z]*\n(.*?)^```", page.read_text(), re.M | re.S)
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    return [shlex.split(line, comments=True) for line in lines if re.match(r"(python|make|torchrun) ", line)]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(page):
    """Files exist; so do the headings after a #. Lines (#L12) are the next test's."""
    links = re.findall(r"\]\(([^)#\s]*)(?:#([^)]*))?\)", page.read_text())
    for name, place in links:
        there = page.parent / name if name else page
        assert "://" in name or there.exists(), name
        if place and there.suffix == ".md":
            titles = re.findall(r"^#+ (.*)$", there.read_text(), re.M)
            assert place in [re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles], (name, place)


@pytest.mark.parametrize("method", METHODS)
def test_pages_quote_the_lines_they_name(method):
    page = ROOT / "docs" / f"{method}.md"
    text, records = page.read_text(), load(ROOT / "experiments" / "results")
    details = text.partition("## Implementation details")[2].partition("\n## ")[0]
    numbered = re.findall(r"^\d+\. (?:.*\n(?:   .*\n)*)", details, re.M)
    assert len(numbered) >= 10 and all(docs.ANCHOR.search(one) for one in numbered)
    assert docs.anchor(page, text) == text, "run make docs"
    assert docs.fill(text, "claims", docs.claims(method, records, Path("experiments/results"))) == text, "run make docs"
    assert (page.parent / f"{method}-flow.png").stat().st_size < 300_000


def test_an_anchor_that_is_gone_is_named(tmp_path):
    with pytest.raises(docs.InputError, match="on 0 lines of easyocc.py"):
        docs.anchor(tmp_path, "[easyocc.py:3](../easyocc.py#L3) `no such code`")
    with pytest.raises(docs.InputError, match="quote one line"):
        docs.anchor(tmp_path, "[easyocc.py:3](../easyocc.py#L3) `import`")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_every_command_of_a_page_is_one(page, monkeypatch):
    """Flags and verbs are parsed as the method does; nothing runs."""
    real, seen = verbs.main, []

    def only_parse(doc, config, presets, actions, **options):
        record = lambda cfg, args: seen.append(args.verb)  # noqa: E731
        real(doc, config, presets, dict.fromkeys(actions, record), **options)

    run = lambda ckpt, method, config, preset: (None, {"preset": "tiny", "config": {}, "data": {}})  # noqa: E731
    monkeypatch.setattr(verbs, "main", only_parse)
    monkeypatch.setattr(verbs, "experiment", lambda *words: seen.append("ablate"))
    for words in commands_of(page):
        if words[0] == "make":
            names = [word for word in words[1:] if "=" not in word]
            assert not names or all(f"\n{name}:" in (ROOT / "Makefile").read_text() for name in names), words
            continue
        first = next(k for k, word in enumerate(words[1:], 1) if word == "-m" or word.endswith(".py"))
        words = words[first:]
        if words[0] == "-m":
            assert importlib.util.find_spec(words[1]) is not None, words
            continue
        words = [word for word in words if word != "..."]
        method = importlib.import_module(words[0].removesuffix(".py"))
        if "--ckpt" in words:
            monkeypatch.setattr(cli, "_from_run", lambda *a, m=method: (m.PRESETS["tiny"], run(*a)[1]))
        if "--help" in words:
            continue
        monkeypatch.setattr(sys, "argv", words)
        before = len(seen)
        method.main()
        assert len(seen) == before + 1, words


def only_parsed(words: list[str]) -> str | None:
    """Why a command is not run here."""
    if any(word.startswith("ready/") for word in words):
        return None
    return next((why for what, why in PARSED.items() if set(what.split()) & set(words)), None)


def test_the_other_commands_of_the_pages_run(tiny_world, tmp_path, monkeypatch, capsys):
    """README's and docs', as they stand there, one after the other, on six keyframes and with a small network."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr("common.verbs.make", lambda *a, **k: None)  # the worlds are tested elsewhere: test_world.py
    monkeypatch.chdir(tmp_path)
    trees = dict.fromkeys(("data/nuscenes", "data/worlds/driving-demo", "D"), str(tiny_world))
    dataset = NuScenesOccupancy(tiny_world, split="all", parts=())  # six loose images, by the pages' names
    for names in ("f fr br b bl fl", "1 2 3 4 5 6"):
        for name, file in zip(names.split(), dataset.camera_files(0), strict=True):
            Path(f"{name}.jpg").symlink_to(tiny_world / file)
    shutil.copytree(ROOT / "ready", "ready")  # verbs write beside a checkpoint
    shutil.copytree(ROOT / "data" / "openset", "data/openset")
    ran = []
    for words in (words for page in PAGES for words in commands_of(page) if not only_parsed(words)):
        words = [trees.get(word, word) for word in words[1:]]
        if "--help" not in words and words[0] != "-m":
            own = "--data-root" in words or "--images" in words or words[1] in ("describe", "eval", "world")
            words += SMALL.get(" ".join(words[:2]), SMALL.get(words[1], [])) + ([] if own else ["--data-root", str(tiny_world)])
        monkeypatch.setattr(sys, "argv", words if words[0] != "-m" else words[1:])
        try:
            if words[0] == "-m":
                monkeypatch.delitem(sys.modules, words[1], raising=False)
                runpy.run_module(words[1], run_name="__main__", alter_sys=True)
            else:
                importlib.import_module(words[0].removesuffix(".py")).main()
        except SystemExit as end:
            assert not end.code, (words, capsys.readouterr().err)
        ran.append(words)
    assert len(ran) >= 16 and Path("runs/x/result.json").is_file(), ran
