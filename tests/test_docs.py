"""README, docs/ and CONTRIBUTING: links lead somewhere, lines hold the code they quote, every command is one."""

import importlib
import importlib.util
import re
import shlex
import sys
from pathlib import Path

import pytest

from common import cli, verbs
from experiments import docs
from experiments.table import METHODS, load

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "data/README.md")]
PAGES += sorted((ROOT / "docs").glob("*.md"))


def commands_of(page: Path) -> list[list[str]]:
    """The words of every command in a page's code blocks."""
    blocks = re.findall(r"^```[a-z]*\n(.*?)^```", page.read_text(), re.M | re.S)
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    return [shlex.split(line, comments=True) for line in lines if re.match(r"(python|make|torchrun) ", line)]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(page):
    links = re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", page.read_text())
    missing = [link for link in links if "://" not in link and not (page.parent / link).exists()]
    assert not missing


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
