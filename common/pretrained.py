"""Weights, configs and processors of transformers, from a folder or a hub id; every fault in one line.

    (model, processor) = load_pretrained("--sam", name, SamModel, SamProcessor, model_type="sam")

What a file lacks, holds in another shape or holds as nan would otherwise stay random, or wrong, without a
word. Weights are read as safetensors only. Nothing is downloaded that the local cache has.
"""

import re
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from common.files import InputError, read_json, reason


def load_pretrained(flag: str, name: str, *kinds: Any, model_type: str | tuple[str, ...] = (),
                    local_only: bool = False, may_lack: tuple[str, ...] = (), remedy: str = "",
                    **options: Any) -> list[Any]:
    """Load each kind by its `from_pretrained`: config, tokenizer, processor or model classes -> one of each.

    name: a folder saved by transformers, or a hub id. model_type: what config.json must say. local_only:
    never download. may_lack: beginnings of the names of parameters that the file need not have. remedy: said
    where a model is not to be had. options: for the models. Raises InputError, which starts with the flag.
    """
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    folder, hub = Path(name).is_dir(), name.count("/") == 1 and not name.startswith((".", "/", "~"))
    if not folder and not hub:
        places = f"a folder saved by transformers, a hub id{remedy}"
        raise InputError(f"{flag} {name}: no such folder; give {places}")
    model_type = (model_type,) if isinstance(model_type, str) else model_type
    parts = (flag, name, kinds, model_type, may_lack, options)
    if folder:
        with loading(flag, name):
            if (Path(name) / "config.json").is_file():
                check_sizes(read_json(Path(name) / "config.json"))
            return _load(*parts, local=True)
    try:
        return _load(*parts, local=True)
    except InputError:
        raise
    except Exception as error:
        if local_only:
            where = f"{flag} takes a local folder, or this id to download it"
            raise InputError(f"{name}: not on this machine; {where}") from error
    download = f"run `hf download {name}` once with a network, or give a local folder{remedy}"
    _find_hub(f"{flag} {name}: not in the local cache", download)
    try:
        return _load(*parts, local=False)
    except InputError:
        raise
    except Exception as error:
        why = f"not downloadable ({reason(error)}); give a local folder{remedy}"
        raise InputError(f"{flag} {name}: {why}") from error


@contextmanager
def loading(flag: str, name: str) -> Iterator[None]:
    """Whatever a damaged or foreign model raises (SafetensorError, RuntimeError, KeyError, ...) becomes
    InputError."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        why = f"cannot be loaded ({reason(error)}); it needs config.json and model.safetensors"
        raise InputError(f"{flag} {name}: {why}") from error


def check_sizes(config: Any, key: str = "") -> None:
    """Raises ValueError at a number in a config.json that no network has: building one would take all
    memory."""
    for inner in config if isinstance(config, list) else ():
        check_sizes(inner, key)
    for name, inner in config.items() if isinstance(config, dict) else ():
        check_sizes(inner, name)
    if isinstance(config, int) and abs(config) > (1000 if re.search("layer|depth", key) else 1 << 32):
        raise ValueError(f"{key} of {config!r:.20} in config.json")


def _find_hub(problem: str, remedy: str) -> None:
    """Raises InputError at once where the hub cannot be reached: the downloader itself retries for long."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        raise InputError(f"{problem}, and HF_HUB_OFFLINE is set; {remedy}")
    try:
        urllib.request.urlopen(constants.ENDPOINT, timeout=10).close()
    except urllib.error.HTTPError:
        pass  # it answers
    except OSError as error:
        raise InputError(f"{problem}, and the hub cannot be reached; {remedy}") from error


def _dtypes(file: Path) -> dict[str, str]:
    """Tensor -> its type, such as F32 or I8, in a safetensors file."""
    from safetensors import safe_open

    with safe_open(file, "pt") as tensors:
        return {key: tensors.get_slice(key).get_dtype() for key in tensors.keys()}  # noqa: SIM118


def _load(flag: str, name: str, kinds: tuple, model_types: tuple[str, ...], may_lack: tuple[str, ...],
          options: dict[str, Any], local: bool) -> list[Any]:
    """The loading itself; raises whatever transformers does, and InputError for weights that do not fit."""
    import torch
    from transformers import AutoConfig, PreTrainedModel

    if model_types:
        found = AutoConfig.from_pretrained(name, local_files_only=local).model_type
        if found not in model_types:
            raise InputError(f"{flag} {name}: a model of type '{found}', expected '{model_types[0]}'")
    with torch.device("cpu"):  # torch lists its constructors at the first such use; transformers swaps one
        torch.empty(0)  # while it loads: listed then, torch.linspace would ignore each later torch.device
    loaded = []
    for kind in kinds:
        if not (hasattr(kind, "from_config") or issubclass(kind, PreTrainedModel)):
            loaded.append(kind.from_pretrained(name, local_files_only=local))
            tokenizer = getattr(loaded[-1], "tokenizer", loaded[-1])  # of a processor, or itself
            if hasattr(tokenizer, "get_vocab") and len(set(tokenizer.get_vocab()) - set(tokenizer.all_special_tokens)) < 5:
                raise InputError(f"{flag} {name}: its tokenizer knows no words (tokenizer.json missing?); copy all of it")
            continue
        words = {"use_safetensors": True, "ignore_mismatched_sizes": True, "local_files_only": local} | options
        model, info = kind.from_pretrained(name, output_loading_info=True, **words)
        shapes = {name: tuple(there) for name, there, _ in info["mismatched_keys"]}
        lacks = {key for key in info["missing_keys"] - shapes.keys() if not key.startswith(may_lack or "\0")}
        broken = [key for key, p in model.named_parameters() if p.is_meta or not p.isfinite().all()]
        files = sorted(Path(name).glob("*.safetensors")) if Path(name).is_dir() else []
        whole = [key for file in files for key, kind in _dtypes(file).items() if kind[0] in "IU" and key.endswith("weight")]
        faults = {
            "lacks": sorted(lacks),
            "has whole numbers (quantised?) in": whole,
            "has, in another shape than config.json says,": sorted(f"{k} {v}" for k, v in shapes.items()),
            "has nan or inf in": [key for key in broken if key not in info["missing_keys"]],
        }
        for fault, names in faults.items():
            if names:
                listed = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
                fault = f"model.safetensors {fault} {listed}; use a whole, matching one"
                raise InputError(f"{flag} {name}: {fault}")
        loaded.append(model)
    return loaded
