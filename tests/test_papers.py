"""Every method file keeps the promises of its docstring: the equation map names real code, the sections are there."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
METHODS = [p for p in ("easyocc", "occle", "loc", "occvla", "threedvla") if (ROOT / f"{p}.py").exists()]


def parse(method: str) -> tuple[str, ast.Module]:
    tree = ast.parse((ROOT / f"{method}.py").read_text())
    return ast.get_docstring(tree), tree


def section(doc: str, title: str) -> str:
    """The lines of a section: from its title at the margin to the next line at the margin."""
    lines = doc.splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith(title))
    end = next((i for i in range(start + 1, len(lines)) if lines[i][:1].strip()), len(lines))
    return "\n".join(lines[start:end])


def equation_map(doc: str) -> list[tuple[str, str]]:
    """[(left of the arrow, one name right of it)]"""
    rows = []
    for line in section(doc, "EQUATION MAP").splitlines()[1:]:
        if "->" in line:
            left, right = line.split("->", 1)
            names = re.sub(r"\(.*?\)", "", right)
            rows += [(left.strip(), name.strip()) for name in names.split(",") if name.strip()]
    return rows


@pytest.mark.parametrize("method", METHODS)
def test_equation_map_names_exist(method):
    doc, tree = parse(method)
    defined = {node.name for node in tree.body if isinstance(node, (ast.FunctionDef, ast.ClassDef))}
    defined |= {t.id for node in tree.body if isinstance(node, ast.Assign) for t in node.targets if isinstance(t, ast.Name)}
    rows = equation_map(doc)
    assert len(rows) >= 8, "an equation map of fewer than eight rows is no map"
    missing = [f"{left} -> {name}" for left, name in rows if name not in defined]
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


@pytest.mark.parametrize("method", METHODS)
def test_no_method_imports_another_at_module_level(method):
    tree = parse(method)[1]
    imported = set()
    for node in tree.body:
        if isinstance(node, ast.Import):
            imported |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            imported.add((node.module or "").split(".")[0])
    assert not imported & {"easyocc", "occle", "loc", "occvla", "threedvla"}


def test_public_common_names_are_documented():
    """Every public function and class of common/ has a docstring."""
    bare = []
    for path in sorted((ROOT / "common").rglob("*.py")):
        for node in ast.parse(path.read_text()).body:
            public = isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_") and node.name != "main"
            if public and not ast.get_docstring(node):
                bare.append(f"{path.relative_to(ROOT)}:{node.name}")
    assert not bare, bare
