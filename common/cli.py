"""A method's command line, made from its config dataclass: `python easyocc.py VERB [--flag value ...]`.

The config stays the single place: a field's name is its flag, its type says what the flag takes, its trailing comment
is the flag's help, and a comment line of its own starts a section of `--help`.

    lr: float = 1e-3  # Sec. 4.2                     ->  --lr 3e-4          help: "Sec. 4.2"
    image_size: tuple[int, int] = (112, 200)  # [px] ->  --image-size 224 400
    ids: tuple[int, ...] = (2, 3)                    ->  --ids 2 3 4   (also 2,3,4; no value: empty)
    norm: Literal["group", "batch"] = "group"        ->  --norm batch
    rayiou: bool = True                              ->  --rayiou / --no-rayiou
    cap: float | None = None                         ->  --cap none

Verbs are a table: name -> (one-line help, the shared flags it takes; `!` marks a required one).

    VERBS = {"train": ("learn from labels", "data-root version split labels out seed steps device resume"),
             "eval": ("score a checkpoint", "ckpt! data-root version split device save-pred")}

Every verb also takes --preset and every config field. Bad input raises InputError (one line, exit code 2).
"""

import ast
import difflib
import inspect
import io
import shutil
import sys
import textwrap
import tokenize
import types
import typing
from collections.abc import Callable
from dataclasses import asdict, fields, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal, NamedTuple

from common.files import InputError, read_json


class Flag(NamedTuple):
    """A flag that is not a config field. `type` is an annotation or a parser str -> value that raises ValueError."""

    help: str
    type: Any = str
    default: Any = None
    least: int | None = None  # smallest accepted value


def shard(text: str) -> tuple[int, int]:
    """'i/n' -> (i, n), 0 <= i < n: this process makes the i-th of n parts."""
    i, slash, n = text.partition("/")
    if not (slash and i.isdigit() and n.isdigit() and int(i) < int(n)):
        raise ValueError("expected i/n with 0 <= i < n, such as 0/4")
    return int(i), int(n)


SHARED = {
    "data-root": Flag("dataset folder; without it a synthetic world is written and used", Path | None),
    "version": Flag("dataset version; default: the only one present", str | None),
    "split": Flag("split by the devkit's lists; default: train for training, val for evaluation", str | None),
    "labels": Flag("folder of labels", Path | None),
    "labeler": Flag("maker of the labels' 2D maps", Literal["world", "foundation", "lidar", "files"], "world"),
    "out": Flag("output folder", Path | None),
    "ckpt": Flag("run folder that holds the checkpoint", Path | None),
    "seed": Flag("seed of weights, data order and augmentation", int, 0, least=0),
    "steps": Flag("optimiser steps", int | None, least=1),
    "device": Flag("cpu or cuda; default: cuda where there is one", Literal["cpu", "cuda"] | None),
    "resume": Flag("go on from the checkpoint in --out (an interrupted run also goes on by itself)", bool, False),
    "save-pred": Flag("folder for <sample_token>.npz with exactly what was scored", Path | None),
    "claim": Flag("which claim to re-test", str | None),
    "seeds": Flag("number of seeds, 0 .. n-1", int, 3, least=1),
    "shard": Flag("i/n: make the i-th of n parts, i from 0", shard, (0, 1)),
    "cache": Flag("folder for parsed tables; default: the user's cache folder", Path | None),
}

Verbs = dict[str, tuple[str, str]]


def parse(
    doc: str,
    config: type,
    presets: dict[str, Any],
    verbs: Verbs,
    flags: dict[str, Flag] | None = None,
    argv: list[str] | None = None,
) -> tuple[SimpleNamespace, Any]:
    """-> (args, cfg). doc: the method's docstring; flags: further or changed flags, {"name": Flag}.

    args has one attribute per shared flag (its default where the verb does not take it), verb, preset, method (the
    file's stem), given (names on the command line, with underscores) and run (config.json of --ckpt, else None).
    cfg is the preset (default: the first one) with the given fields replaced. With --ckpt it is the *checkpoint's*
    config with the given fields replaced, and --preset, if given, must be the checkpoint's.
    A shared flag that is also a config field (steps) sets both. Raises InputError; prints and exits 0 for --help.
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    method = Path(inspect.getfile(config)).stem
    table = SHARED | (flags or {})
    verb = argv[0] if argv and not argv[0].startswith("-") else None
    if verb is not None and verb not in verbs:
        raise InputError(f"unknown verb '{verb}'{_suggest(verb, verbs)}; one of {', '.join(verbs)}")
    if "-h" in argv or "--help" in argv:
        print(_help(doc, method, config, presets, verbs, table, verb))
        sys.exit(0)
    if verb is None:
        raise InputError(f"which verb? python {method}.py {'|'.join(verbs)} ... ; --help tells more")

    taken = [name.rstrip("!") for name in verbs[verb][1].split()]
    hints = {name: hint for name, hint in typing.get_type_hints(config).items() if name in _names(config)}
    known = {name.replace("_", "-"): hint for name, hint in hints.items()}
    known |= {name: table[name].type for name in taken} | {"preset": Literal[tuple(presets)]}
    given = _read(argv[1:], known, verb, {n for v in verbs.values() for n in v[1].replace("!", "").split()})

    for name, value in given.items():
        least = table[name].least if name in table and name in taken or name == "steps" else None
        if least is not None and value is not None and value < least:
            raise InputError(f"--{name} {value}: must be {least} or more")
    for name in verbs[verb][1].split():
        if name.endswith("!") and name[:-1] not in given:
            raise InputError(f"{verb} needs --{name[:-1]} ({table[name[:-1]].help})")

    preset, run = given.get("preset", next(iter(presets))), None
    base = presets[preset]
    if given.get("ckpt") is not None:
        base, run = _from_run(given["ckpt"], method, config, given.get("preset"))
        preset = run["preset"]
    changed = {name: given[name.replace("_", "-")] for name in hints if name.replace("_", "-") in given}
    cfg = replace(base, **changed)

    values = {name.replace("-", "_"): given.get(name, flag.default) for name, flag in table.items()}
    values |= {name: getattr(cfg, name) for name in hints if name in values}  # a flag that is a field: one value
    args = SimpleNamespace(**values, verb=verb, preset=preset, method=method, run=run)
    args.given = frozenset(name.replace("-", "_") for name in given)
    if "device" in taken:
        args.device = pick_device(args.device)
    return args, cfg


def pick_device(name: str | None) -> str:
    """None -> cuda where there is one, else cpu. Raises InputError if cuda is asked for and absent."""
    import torch

    if name == "cuda" and not torch.cuda.is_available():
        raise InputError("--device cuda: no CUDA device here; use --device cpu")
    return name or ("cuda" if torch.cuda.is_available() else "cpu")


def from_dict(config: type, stored: dict[str, Any], where: Path | str) -> Any:
    """A config from its JSON form (`to_dict`). Unknown or missing fields: InputError that names them."""
    hints = typing.get_type_hints(config)
    unknown, missing = sorted(stored.keys() - _names(config)), sorted(_names(config) - stored.keys())
    if unknown or missing:
        raise InputError(
            f"{where}: written by another version of this method"
            f" ({'unknown: ' + ' '.join(unknown) if unknown else 'missing: ' + ' '.join(missing)}); train again"
        )

    def restored(value: Any, hint: Any) -> Any:
        if isinstance(value, list) and _is_tuple(hint):
            return tuple(value)
        return Path(value) if isinstance(value, str) and _strip_none(hint)[0] is Path else value

    return config(**{name: restored(value, hints[name]) for name, value in stored.items()})


def to_dict(cfg: Any) -> dict[str, Any]:
    """A config as plain JSON values."""

    def plain(value: Any) -> Any:
        return str(value) if isinstance(value, Path) else list(value) if isinstance(value, tuple) else value

    return {name: plain(value) for name, value in asdict(cfg).items()}


def last_stage(folder: Path | str) -> Path:
    """The folder itself if it holds config.json, else its last sub-folder (by name) that does: stages sort by name."""
    folder = Path(folder)
    if not folder.is_dir():
        raise InputError(f"--ckpt {folder}: no such folder")
    if (folder / "config.json").is_file():
        return folder
    stages = sorted(path.parent for path in folder.glob("*/config.json"))
    if not stages:
        raise InputError(f"--ckpt {folder}: no config.json there; not a run folder of `train --out`")
    return stages[-1]


def _from_run(ckpt: Path, method: str, config: type, preset: str | None) -> tuple[Any, dict[str, Any]]:
    path = last_stage(ckpt) / "config.json"
    run = read_json(path)
    if not isinstance(run, dict) or not {"method", "preset", "config"} <= run.keys():
        raise InputError(f"{path}: not the config.json of a run (method, preset, config)")
    if run["method"] != method:
        raise InputError(f"--ckpt {ckpt}: a checkpoint of {run['method']}.py, not of {method}.py")
    if preset is not None and preset != run["preset"]:
        raise InputError(f"--ckpt {ckpt}: a checkpoint of preset {run['preset']}, not {preset}; drop --preset")
    return from_dict(config, run["config"], path), run


# --- words -> values -------------------------------------------------------------------------------------------------


def _read(words: list[str], known: dict[str, Any], verb: str, elsewhere: set[str]) -> dict[str, Any]:
    """['--lr', '1e-3', '--no-rayiou', '--size=3,4'] -> {'lr': 1e-3, 'rayiou': False, 'size': (3, 4)}."""
    given = {}
    i = 0
    while i < len(words):
        word, i = words[i], i + 1
        if not word.startswith("--") or word == "--":
            raise InputError(f"'{word}': expected a flag; flags start with --")
        name, equals, value = word[2:].partition("=")
        name = name.replace("_", "-")
        values = [value] if equals else []
        while not equals and i < len(words) and not words[i].startswith("--"):
            values.append(words[i])
            i += 1
        positive = name[3:] if name.startswith("no-") else None
        if name not in known and positive in known and known[positive] is bool:
            if values:
                raise InputError(f"--{name} takes no value, got '{' '.join(values)}'")
            given[positive] = False
        elif name in known:
            given[name] = _value(name, values, known[name])
        elif name in elsewhere:
            raise InputError(f"--{name}: not a flag of {verb}")
        else:
            raise InputError(f"unknown flag --{name}{_suggest(name, known, '--')}")
    return given


def _value(name: str, words: list[str], hint: Any) -> Any:
    """The words after --name as the annotated type."""
    shown = f"--{name} {' '.join(words)}".rstrip()
    inner, optional = _strip_none(hint)
    if optional and [w.lower() for w in words] == ["none"]:
        return None
    if inner is bool:
        switch = {(): True, ("true",): True, ("false",): False}
        key = tuple(w.lower() for w in words)
        if key not in switch:
            raise InputError(f"{shown}: a switch takes no value; use --{name} or --no-{name}")
        return switch[key]
    if _is_tuple(inner):
        types_ = typing.get_args(inner)
        words = [w for word in words for w in word.replace(",", " ").split()]
        if types_[-1:] == (Ellipsis,):
            types_ = (types_[0],) * len(words)
        if len(words) != len(types_):
            raise InputError(f"{shown}: expected {len(types_)} values, got {len(words)}")
        return tuple(_one(shown, word, t) for word, t in zip(words, types_, strict=True))
    if len(words) != 1:
        raise InputError(f"{shown}: expected {_takes(name, hint) or 'a value'}, got {len(words)} values")
    return _one(shown, words[0], inner)


def _one(shown: str, word: str, hint: Any) -> Any:
    if typing.get_origin(hint) is Literal:
        for choice in typing.get_args(hint):
            if word == str(choice):
                return choice
        choices = [str(c) for c in typing.get_args(hint)]
        raise InputError(f"{shown}: unknown value '{word}'{_suggest(word, choices)}; one of {', '.join(choices)}")
    if hint in (int, float):
        try:
            value = hint(word)
        except ValueError:
            raise InputError(f"{shown}: '{word}' is not {'an integer' if hint is int else 'a number'}") from None
        if value != value or value in (float("inf"), float("-inf")):
            raise InputError(f"{shown}: '{word}' is not a finite number")
        return value
    if hint in (str, Path):
        if not word:
            raise InputError(f"{shown}: an empty value")
        return hint(word)
    if isinstance(hint, Callable) and not isinstance(hint, types.GenericAlias):
        try:
            return hint(word)
        except ValueError as error:
            raise InputError(f"{shown}: {error}") from None
    raise TypeError(f"{shown}: no reader for the annotation {hint}")


def _strip_none(hint: Any) -> tuple[Any, bool]:
    """`int | None` -> (int, True)."""
    if typing.get_origin(hint) in (types.UnionType, typing.Union):
        rest = [a for a in typing.get_args(hint) if a is not type(None)]
        if len(rest) == 1:
            return rest[0], True
    return hint, False


def _is_tuple(hint: Any) -> bool:
    return typing.get_origin(_strip_none(hint)[0]) is tuple


def _names(config: type) -> set[str]:
    return {f.name for f in fields(config)}


def _suggest(word: str, known, dashes: str = "") -> str:
    close = difflib.get_close_matches(word, list(known), n=1)
    return f" (did you mean {dashes}{close[0]}?)" if close else ""


# --- help ------------------------------------------------------------------------------------------------------------


def field_notes(config: type) -> dict[str, tuple[str, str]]:
    """{field: (section, help)} from the comments in the dataclass's source; metadata["help"] precedes the comment."""
    source = textwrap.dedent(inspect.getsource(config))
    comments = {
        token.start[0]: (token.string.lstrip("# ").rstrip(), token.line.lstrip().startswith("#"))
        for token in tokenize.generate_tokens(io.StringIO(source).readline)
        if token.type == tokenize.COMMENT
    }
    sections: dict[int, str] = {}  # last line of a comment that stands alone -> its text; adjacent lines are one
    for line, (text, alone) in sorted(comments.items()):
        if alone:
            sections[line] = f"{sections.pop(line - 1)} {text}" if line - 1 in sections else text
    meta = {f.name: f.metadata.get("help", "") for f in fields(config)}
    notes = {}
    for node in ast.parse(source).body[0].body:
        if isinstance(node, ast.AnnAssign):
            section = next((sections[line] for line in sorted(sections, reverse=True) if line < node.lineno), "")
            text, alone = comments.get(node.end_lineno, ("", True))
            notes[node.target.id] = (section, "; ".join(t for t in (meta.get(node.target.id), not alone and text) if t))
    return notes


def _takes(name: str, hint: Any) -> str:
    """What a flag takes, for help: 'INT', 'a|b', 'INT INT', ''."""
    hint, optional = _strip_none(hint)
    if hint is bool:
        return ""
    if typing.get_origin(hint) is Literal:
        text = "|".join(str(c) for c in typing.get_args(hint))
    elif _is_tuple(hint):
        parts = typing.get_args(hint)
        text = f"{_takes(name, parts[0])} ..." if parts[-1] is Ellipsis else " ".join(_takes(name, p) for p in parts)
    else:
        text = {int: "INT", float: "FLOAT", str: "TEXT", Path: "PATH"}.get(hint, name.upper())
    return text + ("|none" if optional and hint in (int, float) else "")


def _shown(value: Any) -> str:
    if isinstance(value, tuple):
        return " ".join(map(_shown, value))
    return f"{value:g}" if isinstance(value, float) else str(value)


def _help(
    doc: str, method: str, config: type, presets: dict, verbs: Verbs, table: dict[str, Flag], verb: str | None
) -> str:
    if verb is None:
        intro = inspect.cleandoc(doc or "").split("\nGLOSSARY")[0].rstrip()
        width = max(map(len, verbs))
        lines = [intro, "", f"usage: python {method}.py VERB [--flag value ...]", ""]
        lines += [f"  {name:{width}}  {verbs[name][0]}" for name in verbs]
        return "\n".join([*lines, "", f"python {method}.py VERB --help lists every flag of a verb."])

    width = min(max(shutil.get_terminal_size((110, 24)).columns, 80), 130)
    hints = typing.get_type_hints(config)

    def row(name: str, takes: str, text: str) -> list[str]:
        head = f"  --{name} {takes}".rstrip()
        body = textwrap.wrap(text, width - 34) or [""]
        first = [f"{head:32}  {body[0]}"] if len(head) <= 32 else [head, " " * 34 + body[0]]
        return [line.rstrip() for line in first + [" " * 34 + line for line in body[1:]]]

    taken = [n for n in verbs[verb][1].split() if n.rstrip("!").replace("-", "_") not in hints]
    lines = [f"{verb}: {verbs[verb][0]}", "", f"usage: python {method}.py {verb} [--flag value ...]", ""]
    lines += row("preset", "|".join(presets), f"which column below is the default; {next(iter(presets))} if not given")
    for name in taken:
        flag = table[name.rstrip("!")]
        default = "" if flag.default in (None, False, (0, 1)) else f" (default {_shown(flag.default)})"
        required = " (required)" if name.endswith("!") else ""
        lines += row(name.rstrip("!"), _takes(name, flag.type), flag.help + default + required)
    lines += ["", f"config flags, with the value of {' / '.join(presets)} (one value: the same in all):"]
    section = None
    for name, (head, note) in field_notes(config).items():
        if head != section:
            lines += ["", head] if head else [""]
            section = head
        values = [_shown(getattr(preset, name)) for preset in presets.values()]
        default = values[0] if len(set(values)) == 1 else " / ".join(values)
        takes = _takes(name, hints[name])
        flag = ("[no-]" if hints[name] is bool else "") + name.replace("_", "-")
        lines += row(flag, takes, f"[{default}]" + (f"  {note}" if note else ""))
    return "\n".join(lines)
