"""Files that are never half-written, and bad input that costs one line.

Writing goes through `atomic`: a temporary name beside the target, fsync, rename. Reading what a user gave
goes through `read_json`, `read_text`, `read_npz`, `read_npy`, `read_image` or, for other formats, `reading`.
They raise `InputError` with the file, the fault and the remedy. `exit_on_input_error` prints that as one line
and exits with code 2.
"""

import errno
import fcntl
import functools
import hashlib
import io
import json
import math
import multiprocessing.connection
import os
import re
import shutil
import sys
import tempfile
import threading
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import wraps
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from safetensors import SafetensorError
from tqdm import tqdm

_BAR = tqdm.__init__
MAX_BYTES = 1 << 30  # of an array whose shape the reader does not know beforehand
MAX_PIXELS = 1 << 26  # of an image, by its header
Shape = tuple[int, ...] | None  # of an array; None: any
PICTURES = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "PPM")  # formats that are read


class InputError(Exception):
    """Bad input from outside. Its message is one line: the file or flag, what is wrong, the remedy."""

    def __init__(self, message: str):
        super().__init__(_printable(message))


def _printable(text: str) -> str:
    """A text without line breaks and control sequences, which names and values from outside may hold."""
    return "".join(letter if letter.isprintable() else " " for letter in text)


# --- errors -------------------------------------------------------------------------------------------------

_REMEDIES = {
    "free space and run the same command again": (errno.ENOSPC, errno.EDQUOT, errno.EFBIG),
    "choose a folder that may be written": (errno.EROFS, errno.EACCES, errno.EPERM),
    "a file is in the way; choose another path": (errno.ENOTDIR, errno.EEXIST, errno.EISDIR, errno.ENOTEMPTY),
    "use a shorter path": (errno.ENAMETOOLONG,),
}


def exit_on_input_error(main):
    """Decorator for a command line's `main`: InputError, OSError, SafetensorError -> one line, exit code 2.

    Under torchrun one process prints: the first that fails once the group exists, rank 0 before.
    """

    @wraps(main)
    def guarded(*args, **kwargs):
        if not sys.stderr.isatty():  # a log: a bar writes its first and its last state, one line
            tqdm.__init__ = functools.partialmethod(_BAR, mininterval=1e9, maxinterval=1e9)
        try:
            return main(*args, **kwargs)
        except (InputError, OSError, SafetensorError, RuntimeError) as error:
            line = _line(error)
            if line is None:
                raise
            if line and _prints():
                print(f"error: {_printable(line)}", file=sys.stderr, flush=True)
            if _world() > 1:
                os._exit(2)  # a group that is torn down by the interpreter's own end aborts with a trace
            sys.exit(2)

    return guarded


def _line(error: Exception) -> str | None:
    """The line about an error, "" for none, None if it is not about input or output."""
    if isinstance(error, BrokenPipeError):  # the reader of our output has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return ""
    if isinstance(error, OSError) and error.strerror:
        remedy = next((text for text, codes in _REMEDIES.items() if error.errno in codes), "check this path")
        return f"{error.filename2 or error.filename or 'output'}: {error.strerror}; {remedy}"
    if isinstance(error, RuntimeError):
        lost = _world() > 1 and re.search(r"onnection (closed|reset|refused)|ECONN", str(error))
        return "another process of this run has ended; start the same command again" if lost else None
    return str(error) if isinstance(error, InputError) else reason(error)


def _world() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


def _prints() -> bool:
    """Whether this process is the one of its group that prints an error."""
    distributed = sys.modules.get("torch.distributed")
    if _world() > 1 and distributed is not None and distributed.is_initialized():
        try:
            return distributed.distributed_c10d._get_default_store().add("minocc/error", 1) == 1
        except RuntimeError:  # the store has gone with its process
            return True
    return os.environ.get("RANK", "0") == "0"


def reason(error: BaseException) -> str:
    """What an exception of another library says, as one short line."""
    text = getattr(error, "strerror", None) or str(error)
    return next(iter(text.strip().splitlines()), "")[:160] or type(error).__name__


@functools.cache
def note(text: str) -> None:
    """Print a note on stderr: once, and only in the main process of rank 0."""
    if multiprocessing.parent_process() is None and os.environ.get("RANK", "0") == "0":
        print(f"note: {_printable(text)}", file=sys.stderr)


# --- writing ------------------------------------------------------------------------------------------------

_TEMPORARY = re.compile(r"\..*\.tmp-[a-z0-9_]{8}(\.[^.]*)?")
_SWEPT: set[Path] = set()  # folders that this process has looked through
_HELD: dict[Path, int] = {}  # run folders that this process holds, and the open handle of each


@contextmanager
def atomic(path: Path | str, folder: bool = False) -> Iterator[Path]:
    """Yield a temporary file (or folder) beside `path`; on success fsync and rename it to `path`, else remove
    it.

    The temporary name keeps the target's suffix, because writers such as PIL look at it. What killed
    processes left in the same folder is removed first.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    sweep(path.parent)
    temporary, lock = _reserve(path, folder)
    try:
        with naming(path):
            yield temporary
            if not folder:
                with open(temporary, "rb+") as file:
                    os.fsync(file.fileno())
            umask = os.umask(0)
            os.umask(umask)
            os.chmod(temporary, (0o777 if folder else 0o666) & ~umask)  # as readable as any other file
            os.replace(temporary, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True) if folder else temporary.unlink(missing_ok=True)
        if lock is not None:
            os.close(lock)


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """An OSError without a file's name, as of a full disk, becomes one with it."""
    try:
        yield
    except OSError as error:
        if error.errno and error.filename is None:
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise


def _reserve(path: Path, folder: bool) -> tuple[Path, int | None]:
    """A new temporary name beside `path`, and the lock that says it is in use."""
    words = {"dir": path.parent, "prefix": f".{path.stem[:40]}.tmp-", "suffix": "" if folder else path.suffix}
    while True:
        if folder:
            name = tempfile.mkdtemp(**words)
        else:
            handle, name = tempfile.mkstemp(**words)
            os.close(handle)
        lock = _lock(Path(name), wait=True)
        if lock is None or os.path.exists(name):  # else another process swept it before it was locked
            return Path(name), lock
        os.close(lock)


def _lock(path: Path, wait: bool = False) -> int | None:
    """Lock a file or folder until the handle is closed or the process ends; None if it is locked or gone."""
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK)  # else a fifo of that name waits for a writer
    except OSError:
        return None
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError:
        os.close(handle)
        return None
    return handle


def sweep(folder: Path) -> None:
    """Remove temporary files and folders that no living process writes; a process looks once into each
    folder."""
    if folder in _SWEPT:
        return
    _SWEPT.add(folder)
    with suppress(OSError):  # a folder that may not be written is as it is
        for path in [path for path in folder.iterdir() if _TEMPORARY.fullmatch(path.name)]:
            if (lock := _lock(path)) is not None:
                own = path.is_dir() and not path.is_symlink()
                shutil.rmtree(path, ignore_errors=True) if own else path.unlink(missing_ok=True)
                os.close(lock)


@contextmanager
def scratch(folder: Path) -> Iterator[Path]:
    """Yield a folder inside `folder`, removed at the end; after a kill, by the next writer there."""
    folder.mkdir(parents=True, exist_ok=True)
    sweep(folder)
    temporary, lock = _reserve(folder / "scratch", True)
    try:
        yield temporary
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        if lock is not None:
            os.close(lock)


def is_empty(folder: Path) -> bool:
    """Whether a folder holds no file but what killed writers left."""
    return not any(path.is_file() and not any(map(_TEMPORARY.fullmatch, path.relative_to(folder).parts))
                   for path in folder.rglob("*"))


def hold(folder: Path | str) -> None:
    """Claim a run folder for this process until `release` or its end. Raises InputError if another has it.

    The claim is a lock of the system on the folder itself: it leaves no file, and none is stale.
    """
    Path(folder).mkdir(parents=True, exist_ok=True)  # as given: raises at a link that leads nowhere
    folder = Path(os.path.realpath(folder))  # resolve() raises RuntimeError at links in a circle
    if folder in _HELD:
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(handle)
        remedy = "wait for it or use another --out"
        raise InputError(f"{folder}: another process is writing this run; {remedy}") from error
    except OSError:  # a file system without locks
        pass
    _HELD[folder] = handle


def release(folder: Path | str) -> None:
    """Give up the claim of `hold`."""
    handle = _HELD.pop(Path(os.path.realpath(folder)), None)
    if handle is not None:
        os.close(handle)


def write_bytes(path: Path | str, data: bytes) -> None:
    """Write the whole file or nothing; make its folder."""
    with atomic(path) as temporary:
        temporary.write_bytes(data)


def write_json(path: Path | str, value, indent: int | None = 1) -> None:
    """Write a JSON value, whole or not at all."""
    write_bytes(path, (json.dumps(value, indent=indent) + "\n").encode())


def write_npz(path: Path | str, **arrays: np.ndarray) -> None:
    """Write a compressed npz with the same bytes for the same arrays (np.savez puts the time into the
    zip)."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        for name, array in arrays.items():
            data = io.BytesIO()
            np.lib.format.write_array(data, np.ascontiguousarray(array), allow_pickle=False)
            archive.writestr(zipfile.ZipInfo(f"{name}.npy"), data.getvalue(), zipfile.ZIP_DEFLATED, 1)
    write_bytes(path, buffer.getvalue())


def end_with_parent() -> None:
    """In a worker process: end as soon as the process that started it is gone, however it went.

    A worker that lived on would write beside the run that is started again.
    """

    def wait() -> None:
        multiprocessing.connection.wait([multiprocessing.parent_process().sentinel])
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


# --- reading ------------------------------------------------------------------------------------------------


@contextmanager
def reading(path: Path, problem: str, remedy: str = "copy it again", what: str = "file") -> Iterator[None]:
    """Whatever a decoder raises about the bytes of `path` becomes one InputError: "path: problem (why);
    remedy".

    Raises InputError too if there is no such file.
    """
    try:
        if not path.is_file():
            raise InputError(f"{path}: {what} not found")
        yield
    except InputError:
        raise
    except Exception as error:  # decoders raise what they like: struct.error, KeyError, MemoryError, ...
        empty = os.path.isfile(path) and os.path.getsize(path) == 0
        why = "the file is empty" if empty else reason(error)
        raise InputError(f"{path}: {problem} ({why}); {remedy}") from error


def is_component(name: str) -> bool:
    """Whether a name from outside is one visible component of a path, on any system."""
    single = name[:1] != "." and Path(name).name == name != "" and "\\" not in name
    return single and name.isprintable() and len(name.encode()) <= 200


def read_text(path: Path | str) -> str:
    """Read a UTF-8 text. Raises InputError if the file is missing or is not one."""
    path = Path(path)
    with reading(path, "not a UTF-8 text", "save it as UTF-8"):
        return path.read_bytes().decode("utf-8-sig")


def read_json(path: Path | str, shape: Any = None) -> Any:
    """Read a JSON value of a shape (`misfit`).

    Raises InputError if the file is missing, does not parse or has another shape.
    """
    path = Path(path)
    with reading(path, "not valid JSON", "truncated? copy it again"):
        data = path.read_bytes()
        value = json.loads(data)
        if b"\\ud" in data.lower():  # half a letter: no text, and nothing can write it
            json.dumps(value, ensure_ascii=False).encode()
    if shape is not None and (fault := misfit(value, shape)):
        raise InputError(f"{path}: {fault}")
    return value


_WORDS = {dict: "an object", list: "a list", str: "a text", int: "a whole number", float: "a number",
          bool: "true or false", type(None): "null"}


def misfit(value: Any, shape: Any, place: str = "the value") -> str:
    """What of a JSON value has another shape, in words; "" if all fits.

    A shape is a type, a tuple of shapes (one of them), [shape] (a list of such), {str: shape} (an object with
    any names) or {"name": shape, ...} (an object with these names at least; "name?" may be absent).
    """
    if isinstance(shape, tuple):
        faults = [misfit(value, one, place) for one in shape]
        near = [fault for fault in faults if not fault.startswith(f"{place} is ")]  # the kind is right
        return "" if "" in faults else (near or faults)[0]
    kind = shape if isinstance(shape, type) else type(shape)
    wanted = (int, float) if kind is float else kind
    if not isinstance(value, wanted) or (isinstance(value, bool) and kind is not bool and kind is not object):
        return f"{place} is {_WORDS.get(type(value), 'something else')}, expected {_WORDS[kind]}"
    if isinstance(shape, list):
        inner = ((f"{place}[{k}]", one, shape[0]) for k, one in enumerate(value))
    elif isinstance(shape, dict) and str in shape:
        inner = ((f"'{name[:40]}'", one, shape[str]) for name, one in value.items())
    elif isinstance(shape, dict):
        if missing := [name for name in shape if name not in value and not name.endswith("?")]:
            return f"{place} has no '{missing[0]}'"
        names = {key.rstrip("?"): one for key, one in shape.items()}
        inner = ((f"'{name}'", value[name], one) for name, one in names.items() if name in value)
    else:
        return ""
    return next((fault for where, one, kind in inner if (fault := misfit(one, kind, where))), "")


_NPZ = "not a readable npz", "truncated? copy or make it again"


def read_npz(path: Path | str, expect: dict[str, tuple[Shape, str | None]]) -> dict[str, np.ndarray]:
    """Read the arrays named in `expect`: {key: (shape or None, dtype or None)}. Never unpickles.

    An array's header is read first: nothing is allocated for a wrong shape or dtype, nor more than MAX_BYTES
    for an unknown one. Raises InputError if the file is missing or broken, a key is absent, or a shape or
    dtype differs.
    """
    path, arrays = Path(path), {}
    with reading(path, *_NPZ), zipfile.ZipFile(path) as archive:
        members = {name.removesuffix(".npy"): name for name in archive.namelist()}
        for key, (shape, dtype) in expect.items():
            if key not in members:
                held = ", ".join(members)[:200] or "nothing"
                raise InputError(f"{path}: no array '{key}' (it holds {held})")
            with archive.open(members[key]) as member:
                size = archive.getinfo(members[key]).file_size
                arrays[key] = _read_array(member, size, f"{path}: '{key}'", shape, dtype)
    return arrays


def npz_keys(path: Path | str) -> list[str]:
    """The names of an npz's arrays. Raises InputError if the file is missing or broken."""
    path = Path(path)
    with reading(path, *_NPZ), zipfile.ZipFile(path) as archive:
        return [name.removesuffix(".npy") for name in archive.namelist()]


def read_npy(path: Path | str, shape: Shape, dtype: str | None) -> np.ndarray:
    """Read the array of an npy file, as `read_npz` reads one."""
    path = Path(path)
    with reading(path, "not a readable npy", "copy or make it again"), open(path, "rb") as file:
        return _read_array(file, path.stat().st_size, f"{path}: the array", shape, dtype)


def _read_array(file: BinaryIO, size: int, name: str, shape: Shape, dtype: str | None) -> np.ndarray:
    """An array in npy's format out of a stream of `size` bytes."""
    version = np.lib.format.read_magic(file)
    if version not in ((1, 0), (2, 0)):
        raise ValueError(f"npy format {version}")
    header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    found, fortran, kind = header(file)
    if kind.hasobject:
        raise ValueError("it holds Python objects, which are never unpickled")
    if shape is not None and found != tuple(shape):
        raise InputError(f"{name} has shape {found}, expected {tuple(shape)}")
    if dtype is not None and kind != np.dtype(dtype):
        raise InputError(f"{name} has dtype {kind}, expected {np.dtype(dtype)}")
    count = math.prod(found) * kind.itemsize
    if shape is None and count > MAX_BYTES:
        raise InputError(f"{name} has {count / 1e9:.1f} GB, more than {MAX_BYTES / 1e9:.1f}")
    if min(found, default=0) < 0 or count + file.tell() != size:
        raise ValueError(f"{size} bytes for an array {found} of {kind}")
    raw, done = np.empty(count, np.uint8), 0
    while done < count:
        part = file.read(min(count - done, 1 << 24))
        if not part:
            raise ValueError("it ends too early")
        raw[done : done + len(part)] = np.frombuffer(part, np.uint8)
        done += len(part)
    array = raw.view(kind)
    return array.reshape(found[::-1]).T if fortran else array.reshape(found)


class _Bounded(io.BufferedReader):
    """A file that is never asked for more than is left in it: PIL allocates what a damaged chunk declares."""

    def read(self, size: int | None = -1) -> bytes:
        left = max(0, os.fstat(self.fileno()).st_size - self.tell())
        return super().read(left if size is None or size < 0 else min(size, left))

    def __repr__(self) -> str:
        return repr(self.name)


@contextmanager
def open_image(path: Path | str, what: str = "image") -> Iterator[Any]:
    """Yield a PIL image whose pixels are not decoded yet. Raises InputError as `read_image`, inside the block
    too."""
    from PIL import Image

    path = Path(path)
    with (reading(path, f"not a readable {what}", what=what), _Bounded(io.FileIO(path)) as file,
          Image.open(file, formats=PICTURES) as image):
        if not 0 < image.width * image.height <= MAX_PIXELS:
            size, limit = f"{image.width}x{image.height} px", f"{MAX_PIXELS / 1e6:.0f} megapixels"
            raise InputError(f"{path}: {size} by its header, expected up to {limit}; make it smaller")
        yield image


def to_rgb(image) -> Any:
    """A PIL image -> 8-bit RGB. 16 bits are scaled to 8 (PIL itself clips them to white)."""
    from PIL import Image

    if image.mode.startswith("I") or image.mode == "F":
        image = Image.fromarray(np.round(grey16(image) / 257).astype(np.uint8))
    return image.convert("RGB")


def grey16(image) -> np.ndarray:
    """A PIL image of one 16-bit channel -> (H, W) uint16. Raises ValueError for other modes and larger
    values."""
    if not image.mode.startswith("I"):
        raise ValueError(f"PIL mode '{image.mode}', expected 16 bits and one channel")
    values = np.asarray(image)
    if values.size and (values.min() < 0 or values.max() > 65535):
        raise ValueError("more than 16 bits a pixel")
    return values.astype(np.uint16)


def read_image(path: Path | str, upright: bool = False) -> np.ndarray:
    """-> (H, W, 3) uint8 RGB. Raises InputError if the file is missing, does not decode, or is too large.

    upright: turned as EXIF asks; else the stored pixels, which a camera's calibration counts.
    """
    from PIL import ImageOps

    with open_image(path) as image:
        return np.asarray(to_rgb(ImageOps.exif_transpose(image) if upright else image))


def short_hash(value) -> str:
    """A short name for a JSON value (what JSON lacks by its str): settings that several arms share are made
    once."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:12]
