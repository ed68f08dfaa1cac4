"""Every method file keeps the promises of its docstring: its equation map names real code, its sections are there."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
METHODS = ("easyocc", "occle", "loc", "occvla", "threedvla")


def parse(method: str) -> tuple[str, ast.Module]:
    tree = ast.parse((ROOT / f"{method}.py").read_text())
    return ast.get_docstring(tree), tree


def section(doc: str, title: str) -> str:
    """The lines of a section: from its title at the margin to the next line at the margin."""
    lines = doc.splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith(title))
    end = next((i for i in range(start + 1, len(lines)) if lines[i][:1].strip()), len(lines))
    return "\n".join(lines[start:end])


def equation_map(doc: str, method: str) -> list[tuple[str, Path, str]]:
    """[(left of the arrow, file, a name in it)] of rows `left -> Name, Class.method; common/x.py: Name`."""
    rows = []
    for line in section(doc, "EQUATION MAP").splitlines()[1:]:
        left, arrow, right = line.partition("->")
        for part in re.sub(r"\(.*?\)", "", right).split(";") if arrow else ():
            path, colon, names = part.rpartition(":")
            path = ROOT / (path.strip() if colon else f"{method}.py")
            rows += [(left.strip(), path, name.strip()) for name in names.split(",") if name.strip()]
    return rows


def defined(path: Path) -> set[str]:
    """Names of a file's functions, classes, methods and constants."""
    names = set()
    for node in ast.parse(path.read_text()).body if path.is_file() else ():
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
            names |= {f"{node.name}.{x.name}" for x in node.body if isinstance(x, ast.FunctionDef)}
        elif isinstance(node, ast.Assign):
            names |= {t.id for t in node.targets if isinstance(t, ast.Name)}
    return names


@pytest.mark.parametrize("method", METHODS)
def test_equation_map_names_exist(method):
    rows = equation_map(parse(method)[0], method)
    assert len(rows) >= 8, "an equation map of fewer than eight rows is no map"
    missing = [f"{left} -> {path.name}: {name}" for left, path, name in rows if name not in defined(path)]
    assert not missing, missing


@pytest.mark.parametrize("method", METHODS)
def test_docstring_has_its_sections(method):
    doc, _ = parse(method)
    for title in ("Paper", "Idea", "RUN", "GLOSSARY", "EQUATION MAP", "ASSUMPTIONS", "CLAIMS"):
        assert section(doc, title).strip(), title


@pytest.mark.parametrize("method", METHODS)
def test_every_config_field_names_its_source(method):
    """Each config value carries a trailing comment (paper section, assumption, ours or tiny)."""
    source, tree = (ROOT / f"{method}.py").read_text().splitlines(), parse(method)[1]
    config = next(node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == "Config")
    bare = [n.target.id for n in config.body if isinstance(n, ast.AnnAssign)
            and not any("#" in line for line in source[n.lineno - 1 : n.end_lineno])]
    assert not bare, bare


def test_public_common_names_are_documented():
    """Every public function and class of common/ has a docstring."""
    bare = []
    for path in sorted((ROOT / "common").rglob("*.py")):
        for node in ast.parse(path.read_text()).body:
            public = isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_")
            if public and node.name != "main" and not ast.get_docstring(node):
                bare.append(f"{path.relative_to(ROOT)}:{node.name}")
    assert not bare, bare
