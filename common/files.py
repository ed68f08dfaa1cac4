"""Files that are never half-written, and bad input that costs one line.

Everything the project writes goes through `atomic`: a temporary name beside the target, fsync, rename. Everything it
reads from a user's folder goes through `read_json`, `read_npz` or `read_image`, which raise `InputError` with the
file, the value and the remedy; `exit_on_input_error` turns that into one line and exit code 2.
"""

import hashlib
import io
import json
import os
import sys
import tempfile
import zipfile
import zlib
from contextlib import contextmanager
from functools import wraps
from pathlib import Path

import numpy as np


class InputError(Exception):
    """Bad input from outside. Its message is one line: the file or flag, what is wrong, the remedy."""


def exit_on_input_error(main):
    """Decorator for a command line's `main`: InputError -> one line on stderr and exit code 2."""

    @wraps(main)
    def guarded(*args, **kwargs):
        try:
            return main(*args, **kwargs)
        except InputError as error:
            print(f"error: {error}", file=sys.stderr)
            sys.exit(2)

    return guarded


@contextmanager
def atomic(path: Path | str):
    """Yields a temporary path in the target's folder; on success fsync and rename to `path`, on failure remove it.

    The temporary name keeps the target's suffix, because writers such as np.savez and PIL look at it.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.stem}.", suffix=path.suffix)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)  # mkstemp makes 0600; a result is as readable as any other file
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_bytes(path: Path | str, data: bytes) -> None:
    """Writes the whole file or nothing; makes its folder."""
    with atomic(path) as temporary:
        temporary.write_bytes(data)


def write_json(path: Path | str, value, indent: int | None = 1) -> None:
    """A JSON value, whole or not at all."""
    write_bytes(path, (json.dumps(value, indent=indent) + "\n").encode())


def write_npz(path: Path | str, **arrays: np.ndarray) -> None:
    """Compressed npz with the same bytes for the same arrays (np.savez stamps the time of writing into the zip)."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        for name, array in arrays.items():
            data = io.BytesIO()
            np.lib.format.write_array(data, np.ascontiguousarray(array), allow_pickle=False)
            archive.writestr(zipfile.ZipInfo(f"{name}.npy"), data.getvalue(), zipfile.ZIP_DEFLATED, 1)
    write_bytes(path, buffer.getvalue())


def read_json(path: Path | str):
    """The JSON value. Raises InputError if the file is missing or does not parse."""
    path = Path(path)
    if not path.is_file():
        raise InputError(f"{path}: file not found")
    try:
        return json.loads(path.read_bytes())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: not valid JSON ({error}); truncated? copy it again") from error


def read_npz(path: Path | str, expect: dict[str, tuple[tuple[int, ...] | None, str | None]]) -> dict[str, np.ndarray]:
    """Reads the arrays named in `expect`: {key: (shape or None, dtype or None)}. Never unpickles.

    Raises InputError if the file is missing or broken, a key is absent, or a shape or dtype differs.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"{path}: file not found")
    arrays = {}
    try:
        with np.load(path, allow_pickle=False) as archive:
            for key in expect:
                if key not in archive.files:
                    raise InputError(f"{path}: no array '{key}' (it holds {', '.join(archive.files) or 'nothing'})")
                arrays[key] = archive[key]
    except (OSError, ValueError, EOFError, AttributeError, zipfile.BadZipFile, zlib.error) as error:
        raise InputError(f"{path}: not a readable npz ({error}); truncated? copy or make it again") from error
    for key, (shape, dtype) in expect.items():
        if shape is not None and arrays[key].shape != tuple(shape):
            raise InputError(f"{path}: '{key}' has shape {arrays[key].shape}, expected {tuple(shape)}")
        if dtype is not None and arrays[key].dtype != np.dtype(dtype):
            raise InputError(f"{path}: '{key}' has dtype {arrays[key].dtype}, expected {np.dtype(dtype)}")
    return arrays


def read_image(path: Path | str) -> np.ndarray:
    """-> (H, W, 3) uint8 RGB. Raises InputError if the file is missing, empty or does not decode."""
    from PIL import Image, UnidentifiedImageError

    path = Path(path)
    if not path.is_file():
        raise InputError(f"{path}: image not found")
    try:
        with Image.open(path) as image:
            return np.asarray(image.convert("RGB"))
    except (UnidentifiedImageError, OSError, ValueError, SyntaxError) as error:
        reason = "the file is empty" if path.stat().st_size == 0 else str(error).split(":")[0]
        raise InputError(f"{path}: not a readable image ({reason}); copy it again") from error


def short_hash(value) -> str:
    """A short name for a JSON value (what JSON lacks by its str): settings that several arms share are made once."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:12]
