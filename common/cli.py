"""A method's command line, made from its config dataclass: `python easyocc.py VERB [--flag value ...]`.

A field's name is its flag, its type says what the flag takes, its trailing comment is the flag's help, and a
comment line of its own starts a section of `--help`. argparse splits the words and lays out the help.

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

import argparse
import ast
import difflib
import inspect
import json
import math
import sys
import textwrap
import types
import typing
from dataclasses import asdict, fields, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal, NamedTuple

from common.files import InputError, misfit, read_json


class Flag(NamedTuple):
    """A flag that is not a config field. type: an annotation, or a function str -> value (or ValueError)."""

    help: str
    type: Any = str
    default: Any = None
    least: int = 0  # smallest accepted number: no setting is negative


def shard(text: str) -> tuple[int, int]:
    """'i/n' -> (i, n), 0 <= i < n: this process makes the i-th of n parts."""
    i, slash, n = text.partition("/")
    if not (slash and i.isdigit() and n.isdigit() and int(i) < int(n)):
        raise ValueError("expected i/n with 0 <= i < n, such as 0/4")
    return int(i), int(n)


SHARED = {
    "data-root": Flag("dataset folder; without it a synthetic world is written and used", Path | None),
    "version": Flag("dataset version; default: the only one present", str | None),
    "split": Flag("the devkit's split; default: train for training, val for evaluation", str | None),
    "labels": Flag("folder of labels", Path | None),
    "labeler": Flag("maker of the 2D maps", Literal["world", "foundation", "lidar", "files"], "world"),
    "out": Flag("output folder", Path | None),
    "ckpt": Flag("run folder that holds the checkpoint", Path | None),
    "seed": Flag("seed of weights, data order and augmentation", int, 0),
    "steps": Flag("optimiser steps", int | None, least=1),
    "device": Flag("default: cuda where there is one", Literal["cpu", "cuda"] | None),
    "resume": Flag("go on from the checkpoint in --out, as an interrupted run does by itself", bool, False),
    "save-pred": Flag("folder for <sample_token>.npz with exactly what was scored", Path | None),
    "claim": Flag("which claim to re-test", str | None),
    "seeds": Flag("number of seeds, 0 .. n-1", int, 3, least=1),
    "shard": Flag("i/n: make the i-th of n parts, i from 0", shard, (0, 1)),
    "cache": Flag("folder for parsed tables; default: the user's cache folder", Path | None),
}


def parse(doc: str, config: type, presets: dict[str, Any], verbs: dict[str, tuple[str, str]],
          flags: dict[str, Flag] | None = None, argv: list[str] | None = None) -> tuple[SimpleNamespace, Any]:
    """-> (args, cfg). doc: the method's docstring; flags: further or changed flags, {"name": Flag}.

    args has one attribute per shared flag (its default where the verb does not take it), verb, preset, method
    (the file's stem), given (names on the command line, with underscores) and run (config.json of --ckpt).
    cfg is the preset (default: the first one), or with --ckpt the checkpoint's config, with the given fields
    replaced. With --ckpt a given --preset must be the checkpoint's.
    A shared flag that is also a field (steps) sets both. Raises InputError; prints and exits 0 for --help.
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    method = Path(inspect.getfile(config)).stem
    verb = argv[0] if argv and not argv[0].startswith("-") else None
    asks = "-h" in argv or "--help" in argv
    if verb is None and asks:
        rows = [f"  {name:{max(map(len, verbs))}}  {about}" for name, (about, _) in verbs.items()]
        print(inspect.cleandoc(doc or "").split("\nGLOSSARY")[0].rstrip())
        print("", f"usage: python {method}.py VERB [--flag value ...]", "", *rows, "", sep="\n")
        print(f"python {method}.py VERB --help lists every flag of a verb.")
        sys.exit(0)
    if verb not in verbs:
        problem = f"unknown verb '{verb}'{_suggest(verb, verbs)}" if verb else "which verb? --help tells more"
        raise InputError(f"{problem}; one of {', '.join(verbs)}")

    hints, first = _hints(config), next(iter(presets))
    start = Flag("where the config starts", Literal[tuple(presets)], first)
    table = {"preset": start, **SHARED, **(flags or {})}
    wanted = ["preset", *verbs[verb][1].split()]  # the required ones end in !
    known = {(name := word.rstrip("!")): table[name] for word in wanted if word not in hints}
    known |= _field_flags(config, presets, table)
    about = f"{verbs[verb][0]}. In brackets: the value of {' / '.join(presets)}, once if all have the same."
    parser = _parser(f"{method}.py {verb}", about, known, wanted, config)
    if asks:
        parser.print_help()
        sys.exit(0)
    found, unknown = parser.parse_known_args(argv[1:])
    if unknown:
        name, elsewhere = unknown[0].partition("=")[0], " ".join(line for _, line in verbs.values())
        if not name.startswith("--"):
            raise InputError(f"'{name}': expected a flag; flags start with --")
        if name[2:] in elsewhere.replace("!", "").split():
            raise InputError(f"{name}: not a flag of {verb}")
        raise InputError(f"unknown flag {name}{_suggest(name, [f'--{n}' for n in known])}")
    given = vars(found)

    preset, run = given.get("preset", first), None
    base = presets[preset]
    if given.get("ckpt") is not None:
        base, run = _from_run(given["ckpt"], method, config, given.get("preset"))
        preset = run["preset"]
    cfg = replace(base, **{name: given[name] for name in hints if name in given})
    values = {name.replace("-", "_"): flag.default for name, flag in table.items()}
    values |= {name: value for name, value in (vars(cfg) | given).items() if name in values}
    values |= {"verb": verb, "preset": preset, "method": method, "run": run, "given": frozenset(given)}
    if "device" in known:
        values["device"] = pick_device(values["device"])
    return SimpleNamespace(**values), cfg


def pick_device(name: str | None) -> str:
    """None -> cuda where there is one, else cpu. Raises InputError if cuda is asked for and absent."""
    import torch

    if name == "cuda" and not torch.cuda.is_available():
        raise InputError("--device cuda: no CUDA device here; use --device cpu")
    return name or ("cuda" if torch.cuda.is_available() else "cpu")


# --- a config on disk ---------------------------------------------------------------------------------------


RUN = {"method": str, "preset": str, "seed": int, "steps": int, "config": dict, "data": dict}  # a config.json


def to_dict(cfg: Any) -> dict[str, Any]:
    """A config as plain JSON values."""
    return json.loads(json.dumps(asdict(cfg), default=str))


def from_dict(config: type, stored: dict[str, Any], where: Path | str) -> Any:
    """A config from its JSON form (`to_dict`). Unknown, missing or misshapen fields: InputError that names
    them."""
    hints = _hints(config)
    for word, names in (("unknown", stored.keys() - hints), ("missing", hints.keys() - stored)):
        if names:
            which = f"{word}: {' '.join(sorted(names))}"
            raise InputError(f"{where}: written by another version of this method ({which}); train again")

    fields = {}
    for name, value in stored.items():
        try:
            fields[name] = _restore(value, hints[name])
        except ValueError:
            raise InputError(f"{where}: '{name}' is {json.dumps(value)[:60]}; train again") from None
    return config(**fields)


def _restore(value: Any, hint: Any) -> Any:
    """A field's value from its JSON form. Raises ValueError if it does not fit the annotation."""
    kind = _strip_none(hint)
    if value is None and kind != hint:
        return None
    if typing.get_origin(kind) is tuple:
        kinds = typing.get_args(kind)
        kinds = kinds[:1] * len(value) if kinds[-1] is Ellipsis and isinstance(value, list) else kinds
        if not isinstance(value, list) or len(value) != len(kinds):
            raise ValueError
        return tuple(map(_restore, value, kinds))
    choices = typing.get_args(kind) if typing.get_origin(kind) is Literal else None
    shape = tuple({type(choice) for choice in choices}) if choices else {Path: str}.get(kind, kind)
    if misfit(value, shape) or (choices and value not in choices):
        raise ValueError
    if kind is float and not -1e300 < value < 1e300:
        raise ValueError
    return Path(value) if kind is Path else value


def last_stage(folder: Path | str) -> Path:
    """The folder itself if it holds config.json, else the last of its sub-folders (by name) that does."""
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
    run = read_json(path, RUN)
    if run["method"] != method:
        raise InputError(f"--ckpt {ckpt}: a checkpoint of {run['method']}.py, not of {method}.py")
    if preset is not None and preset != run["preset"]:
        raise InputError(f"--ckpt {ckpt}: of preset {run['preset']}, not {preset}; drop --preset")
    return from_dict(config, run["config"], path), run


# --- the parser ---------------------------------------------------------------------------------------------


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> typing.NoReturn:
        verb, required = self.prog.split()[-1], "the following arguments are required:"
        raise InputError(message.removeprefix("argument ").replace(required, f"{verb} needs"))


class _Read(argparse.Action):
    """Turns the text after a flag into a value of the flag's type (`const` is the Flag)."""

    def __call__(self, parser, namespace, words, option=None):
        text = words if isinstance(words, str) else " ".join(words)
        try:
            setattr(namespace, self.dest, _value(text, self.const.type, self.const.least))
        except ValueError as error:
            raise InputError(f"{option} {text}: {error}") from None


def _value(text: str, hint: Any, least: int = 0) -> Any:
    """The text as the annotated type. Raises ValueError that names what was expected."""
    kind = _strip_none(hint)
    if kind != hint and text.lower() == "none":
        return None
    if typing.get_origin(kind) is tuple:
        words, kinds = text.replace(",", " ").split(), typing.get_args(kind)
        kinds = kinds[:1] * len(words) if kinds[-1] is Ellipsis else kinds
        if len(words) != len(kinds):
            raise ValueError(f"expected {len(kinds)} values, got {len(words)}")
        return tuple(_value(word, kind, least) for word, kind in zip(words, kinds, strict=True))
    if typing.get_origin(kind) is Literal:
        choices = {str(choice): choice for choice in typing.get_args(kind)}
        if text not in choices:
            raise ValueError(f"unknown value '{text}'{_suggest(text, choices)}; one of {', '.join(choices)}")
        return choices[text]
    if not text:
        raise ValueError("an empty value")
    value = kind(text)
    if kind is float and not math.isfinite(value):
        raise ValueError("not a finite number")
    if kind is int and abs(value) >= 1 << 63:
        raise ValueError("too large a number")
    if kind in (int, float) and value < least:
        raise ValueError(f"must be {least} or more")
    return value


def _field_flags(config: type, presets: dict[str, Any], table: dict[str, Flag]) -> dict[str, Flag]:
    """The config's fields as flags, with the value of each preset in the help."""

    def shown(value: Any) -> str:
        if isinstance(value, tuple):
            return " ".join(map(shown, value))
        return f"{value:g}" if isinstance(value, float) else str(value)

    flags = {}
    for field, hint in _hints(config).items():
        name, values = field.replace("_", "-"), [shown(getattr(preset, field)) for preset in presets.values()]
        values = values if len(set(values)) > 1 else values[:1]
        least = table[name].least if name in table else 0
        flags[name] = Flag(f"[{' / '.join(values)}]", hint, least=least)
    return flags


def _parser(prog: str, about: str, known: dict[str, Flag], wanted: list[str], config: type) -> _Parser:
    """One verb's parser. The help has the sections of the config's source."""
    parser = _Parser(prog, f"python {prog} [--flag value ...]", about, add_help=False, allow_abbrev=False,
                     formatter_class=partial(argparse.HelpFormatter, max_help_position=34))  # fmt: skip
    groups, notes = {}, field_notes(config)
    for name, flag in known.items():
        section, note = notes.get(name.replace("-", "_"), ("flags", ""))
        group = groups[section] = groups.get(section) or parser.add_argument_group(section or None)
        required, kind = f"{name}!" in wanted, _strip_none(flag.type)
        default = f"(default {flag.default})" if flag.default not in (None, False, (0, 1)) else ""
        about = "  ".join(filter(None, (flag.help, note, default, "(required)" if required else "")))
        how = {"action": argparse.BooleanOptionalAction}
        if kind is not bool:
            several = "*" if typing.get_origin(kind) is tuple else None
            how = {"action": _Read, "const": flag, "nargs": several, "metavar": _takes(kind)}
            how["required"] = required
        group.add_argument(f"--{name}", default=argparse.SUPPRESS, help=about.replace("%", "%%"), **how)
    return parser


def _takes(kind: Any) -> str:
    """What a flag takes, for its help: INT, PATH, a|b."""
    parts = typing.get_args(kind)
    if typing.get_origin(kind) is Literal:
        return "|".join(map(str, parts))
    return _takes(parts[0]) if parts else kind.__name__.upper()


def field_notes(config: type) -> dict[str, tuple[str, str]]:
    """{field: (section, help)} from the comments in the dataclass's source, after metadata["help"]."""
    meta = {f.name: f.metadata.get("help") for f in fields(config)}
    lines = textwrap.dedent(inspect.getsource(config)).splitlines()
    notes, section, last = {}, "", 0
    for node in ast.parse("\n".join(lines)).body[0].body:
        above = [line.strip("# ") for line in lines[last : node.lineno - 1] if line.lstrip().startswith("#")]
        section, last = " ".join(above) or section, node.end_lineno
        if isinstance(node, ast.AnnAssign):
            comment = lines[last - 1].encode()[node.end_col_offset :].decode().lstrip("# ")
            name = node.target.id
            notes[name] = section, "; ".join(filter(None, (meta[name], comment)))
    return notes


def _hints(config: type) -> dict[str, Any]:
    """{field: annotation} in order."""
    hints = typing.get_type_hints(config)
    return {f.name: hints[f.name] for f in fields(config)}


def _strip_none(hint: Any) -> Any:
    """`int | None` -> int."""
    rest = [kind for kind in typing.get_args(hint) if kind is not types.NoneType]
    return rest[0] if typing.get_origin(hint) in (types.UnionType, typing.Union) and len(rest) == 1 else hint


def _suggest(word: str, known) -> str:
    close = difflib.get_close_matches(word, list(known), n=1)
    return f" (did you mean {close[0]}?)" if close else ""
