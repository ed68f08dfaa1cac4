"""common/files.py: what readers refuse, what writers leave, one line for every fault of input or output."""

import io
import json
import os
import signal
import struct
import subprocess
import sys
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from common import files as F
from common.files import InputError, atomic, read_image, read_json, read_npy, read_npz, read_text, write_npz

ROOT = Path(__file__).parents[1]


def refusal(read, *args) -> str:
    """The one line with which a reader refuses."""
    with pytest.raises(InputError) as error:
        read(*args)
    assert "\n" not in str(error.value)
    return str(error.value)


# --- npz ----------------------------------------------------------------------------------------------------


def npy(header: str, data: bytes = b"") -> bytes:
    """An npy file with this header, right or not."""
    text = header.encode().ljust(117) + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text + data


def archive(member: bytes, compression: int = zipfile.ZIP_STORED) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as file:
        file.writestr("pred.npy", member)
    return buffer.getvalue()


def flagged(data: bytes, field: int, value: int) -> bytes:
    """A zip whose first local and central header have a 16-bit field (by its local offset) set to value."""
    data = bytearray(data)
    centre = data.find(b"PK\x01\x02")
    struct.pack_into("<H", data, field, value), struct.pack_into("<H", data, centre + field + 2, value)
    return bytes(data)


GOOD = npy("{'descr': '|u1', 'fortran_order': False, 'shape': (4, 4), }", bytes(range(16)))
HUGE = "{'descr': '|u1', 'fortran_order': False, 'shape': (1000000, 1000000), }"


@pytest.mark.parametrize("data, says", [
    (GOOD, "not a readable npz"),  # np.save under the name .npz
    (archive(b"hello"), "not a readable npz"),
    (archive(npy(HUGE)), "has shape (1000000, 1000000), expected (4, 4)"),
    (archive(GOOD[:-1]), "not a readable npz"),
    (archive(GOOD + b"x"), "not a readable npz"),
    (archive(GOOD.replace(b"|u1", b"|O1")), "not a readable npz"),
    (archive(GOOD.replace(b"(4, 4)", b"(4,-4)")), "expected (4, 4)"),
    (archive(GOOD.replace(b"(4, 4)", b"(((((")), "not a readable npz"),
    (archive(GOOD.replace(b"|u1", b"<f8")), "has dtype float64, expected uint8"),
    (archive(GOOD.replace(b"NUMPY\x01", b"NUMPY\x09")), "not a readable npz"),
    (archive(GOOD)[:-30], "not a readable npz"),
    (archive(GOOD).replace(bytes(range(16)), bytes(16)), "not a readable npz (Bad CRC-32"),
    (flagged(archive(GOOD), 6, 1), "not a readable npz"),  # encrypted
    (flagged(archive(GOOD), 8, 99), "not a readable npz"),  # unknown compression
    (b"", "not a readable npz (the file is empty)"),
])  # fmt: skip
def test_broken_npz(data, says, tmp_path):
    path = tmp_path / "x.npz"
    path.write_bytes(data)
    assert f"{path}: " in (line := refusal(read_npz, path, {"pred": ((4, 4), "uint8")})) and says in line


def test_npz_of_unknown_shape_is_limited(tmp_path, monkeypatch):
    path = tmp_path / "x.npz"
    monkeypatch.setattr(F, "MAX_BYTES", 1 << 16)
    write_npz(path, small=np.arange(5.0), large=np.zeros(1 << 17, np.uint8))
    assert np.array_equal(read_npz(path, {"small": (None, None)})["small"], np.arange(5.0))
    assert "more than" in refusal(read_npz, path, {"large": (None, None)})
    assert read_npz(path, {"large": ((1 << 17,), "uint8")})["large"].sum() == 0  # a known shape is its own limit
    path.write_bytes(archive(npy(HUGE)))
    assert "1000.0 GB, more than" in refusal(read_npz, path, {"pred": (None, None)})
    assert F.npz_keys(path) == ["pred"]


@pytest.mark.parametrize("array", [
    np.arange(24, dtype=np.int16).reshape(2, 3, 4), np.asfortranarray(np.arange(6.0).reshape(2, 3)), np.float32(3),
    np.zeros((0, 3)), np.array(["a", "bc"]), np.array([b"a", b"bc"]), np.arange(3, dtype=">u4"), np.array([True, False]),
], ids=str)  # fmt: skip
def test_arrays_come_back(array, tmp_path):
    array = np.asarray(array)
    np.savez_compressed(tmp_path / "x.npz", a=array), np.save(tmp_path / "x.npy", array)
    for found in (read_npz(tmp_path / "x.npz", {"a": (array.shape, array.dtype)})["a"],
                  read_npy(tmp_path / "x.npy", array.shape, None)):  # fmt: skip
        assert found.dtype == array.dtype and np.array_equal(found, array) and found.flags.writeable
    assert "has shape" in refusal(read_npy, tmp_path / "x.npy", (7,), None)
    (tmp_path / "x.npy").write_bytes(b"\x93NUMPY")
    assert "not a readable npy" in refusal(read_npy, tmp_path / "x.npy", None, None)


# --- JSON and text ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("data", [
    b"", b"{", b"\xff\xfe", b"[" * 100_000 + b"]" * 100_000, b"1" * 6000, b'{"a": nope}', b'["\\ud83d"]',
], ids=lambda data: repr(data[:10]))  # fmt: skip
def test_json_that_does_not_parse(data, tmp_path):
    path = tmp_path / "x.json"
    path.write_bytes(data)
    assert f"{path}: not valid JSON" in refusal(read_json, path)


@pytest.mark.parametrize("value, shape, says", [
    ([], dict, "the value is a list, expected an object"),
    (None, {str: list}, "the value is null, expected an object"),
    ({"a": 1}, {"b": int}, "the value has no 'b'"),
    ({"a": True}, {"a": int}, "'a' is true or false, expected a whole number"),
    ({"a": 1}, {"a": float, "b?": str}, ""),
    ({"a": 1, "b": 2}, {"a": float, "b?": str}, "'b' is a whole number, expected a text"),
    ({"a": ["x", None]}, {"a": [str]}, "'a'[1] is null, expected a text"),
    ({"a": {"x": [1]}, "b": {"x": [1.5]}}, {str: {"x": [int]}}, "'x'[0] is a number, expected a whole number"),
    ({"a": None}, {"a": (str, type(None))}, ""),
    ([{"q": 1}], ({"rows": [{"q": str}]}, [{"q": str}]), "'q' is a whole number, expected a text"),
    ({"a": True}, {"a": object}, ""),
])  # fmt: skip
def test_json_of_another_shape(value, shape, says, tmp_path):
    (tmp_path / "x.json").write_text(json.dumps(value))
    if says:
        assert refusal(read_json, tmp_path / "x.json", shape) == f"{tmp_path}/x.json: {says}"
    else:
        assert read_json(tmp_path / "x.json", shape) == value


def test_text_is_utf8(tmp_path):
    path = tmp_path / "x.txt"
    path.write_bytes("\ufeffZürich\n".encode())
    assert read_text(path) == "Zürich\n"
    path.write_bytes("Zürich".encode("latin-1"))
    assert "not a UTF-8 text" in refusal(read_text, path)
    assert "file not found" in refusal(read_text, tmp_path)
    assert refusal(read_text, tmp_path / ("x" * 300)).endswith("(File name too long); save it as UTF-8")


# --- images -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix, dtype", [("png", np.uint16), ("png", np.uint8), ("ppm", np.uint16)])
def test_grey_pictures_keep_their_levels(suffix, dtype, tmp_path):
    """A ramp over the whole range of 8 or 16 bits comes back as the same ramp of 8 bits."""
    top, path = np.iinfo(dtype).max, tmp_path / f"x.{suffix}"
    ramp = np.linspace(0, top, 256).astype(dtype)[None].repeat(4, 0)
    if suffix == "ppm":  # PIL writes no 16-bit one: "P5", big-endian
        path.write_bytes(b"P5 256 4 65535\n" + ramp.astype(">u2").tobytes())
    else:
        Image.fromarray(ramp).save(path)
    found = read_image(path)
    assert found.shape == (4, 256, 3) and np.array_equal(found[0, :, 0], np.arange(256))
    assert (found == found[..., :1]).all()
    if suffix == "png":  # a phone's picture lies on its side, and EXIF says so
        image, exif = Image.open(path), Image.Exif()
        exif[0x0112] = 6
        image.save(path, exif=exif)
        assert np.array_equal(read_image(path, upright=True), np.rot90(found, -1))
        assert np.array_equal(read_image(path), found)


def test_the_declared_size_is_the_limit(tmp_path, monkeypatch):
    """A header of 40,000 x 40,000 px is refused before any decoding, whatever another library lets PIL do."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    path = tmp_path / "x.png"
    Image.new("L", (8, 8)).save(path)
    data = bytearray(path.read_bytes())
    struct.pack_into(">II", data, 16, 40_000, 40_000)
    struct.pack_into(">I", data, 29, zlib.crc32(data[12:29]))
    path.write_bytes(data)
    assert "40000x40000 px by its header, expected up to 67 megapixels" in refusal(read_image, path)


def test_the_devkit_does_not_lift_pils_limit():
    from common.nuscenes import _devkit

    _devkit("nuscenes.nuscenes")
    assert Image.MAX_IMAGE_PIXELS < 1e8


@pytest.mark.parametrize("data", [b"", b"GIF?", b"\x89PNG\r\n\x1a\n" + bytes(50), b"%!PS-Adobe-3.0 EPSF-3.0\n"])
def test_broken_pictures(data, tmp_path):
    (tmp_path / "x.png").write_bytes(data)
    assert "not a readable image" in refusal(read_image, tmp_path / "x.png")
    assert "image not found" in refusal(read_image, tmp_path / "y.png")


# --- writing ------------------------------------------------------------------------------------------------


def run(code: str, *words: str, **kwargs) -> subprocess.CompletedProcess:
    """The code in a process of its own."""
    command = [sys.executable, "-c", code, *map(str, words)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, **kwargs)


def test_a_chunk_that_says_it_is_huge_allocates_nothing(tmp_path):
    """A PNG of 100 bytes whose pixels are 3 GB by their chunk's header, with 1 GB to spend."""
    Image.new("L", (30, 20), 7).save(path := tmp_path / "x.png")
    data = path.read_bytes()
    path.write_bytes(data.replace(data[data.find(b"IDAT") - 4 :][:8], b"\xb6\0\x03\xd9IDAT"))
    code = MAIN.format("import resource, common.files as F; from PIL import Image; Image.init(); "
                       "size = int(open('/proc/self/statm').read().split()[0]) * resource.getpagesize() + 2**30; "
                       "resource.setrlimit(resource.RLIMIT_AS, (size, size)); F.read_image(sys.argv[1])")  # fmt: skip
    done = run(code, path)
    assert (done.returncode, done.stderr) == (0, "")  # all pixels are there


KILLED = """
import os, signal, sys
from pathlib import Path
from common.files import atomic
with atomic(Path(sys.argv[1]) / "a.json") as file, atomic(Path(sys.argv[1]) / "b", folder=True) as folder:
    file.write_text("half"), (folder / "x").write_text("half")
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_leftovers_of_killed_writers_go_and_those_of_living_ones_stay(tmp_path):
    assert run(KILLED, tmp_path).returncode == -signal.SIGKILL
    assert len(list(tmp_path.iterdir())) == 2  # a temporary file and a temporary folder
    (tmp_path / ".mine.json").write_text("not ours")
    os.mkfifo(tmp_path / ".x.tmp-abcdefgh.npz")  # nobody writes to it: an open that waits would wait for ever
    (tmp_path / ".y.tmp-abcdefgh").symlink_to(tmp_path)  # the link goes, what it leads to stays
    write = "import sys; from common.files import write_json; write_json(sys.argv[1] + '/c.json', 1)"
    with atomic(tmp_path / "a.json") as temporary, atomic(tmp_path / "b", folder=True) as folder:
        assert run(write, tmp_path).returncode == 0
        assert {path.name for path in tmp_path.iterdir()} == {".mine.json", "c.json", temporary.name, folder.name}
        temporary.write_text("1"), (folder / "x").write_text("2")
    assert read_json(tmp_path / "a.json") == 1 and (tmp_path / "b/x").read_text() == "2"
    umask = os.umask(0)
    os.umask(umask)
    assert (tmp_path / "a.json").stat().st_mode & 0o777 == 0o666 & ~umask
    assert (tmp_path / "b").stat().st_mode & 0o777 == 0o777 & ~umask


WORKER = """
import multiprocessing, os, sys, time
from common.files import end_with_parent
def work(start):
    start()
    print(os.getpid(), flush=True)
    time.sleep(60)
if __name__ == "__main__":
    multiprocessing.get_context("spawn").Process(target=work, args=(end_with_parent,)).start()
"""


def test_workers_end_with_a_killed_parent(tmp_path):
    (tmp_path / "w.py").write_text(WORKER)
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    parent = subprocess.Popen([sys.executable, tmp_path / "w.py"], env=environment, stdout=subprocess.PIPE)
    assert int(parent.stdout.readline()) != parent.pid
    parent.kill(), parent.wait()
    assert parent.stdout.read() == b""  # the worker had the pipe too: it has ended
    parent.stdout.close()


def test_scratch_folders_and_leftovers_are_nothing(tmp_path):
    (tmp_path / "a").mkdir()
    with F.scratch(tmp_path / "a") as folder:
        (folder / "x").write_text("x")
        assert F.is_empty(tmp_path) and folder.parent == tmp_path / "a"
    assert not list((tmp_path / "a").iterdir()) and F.is_empty(tmp_path)
    (tmp_path / "a/.hidden").touch()
    assert not F.is_empty(tmp_path)


def test_a_failed_writer_leaves_nothing(tmp_path):
    for folder in (False, True):
        with pytest.raises(ZeroDivisionError), atomic(tmp_path / "x", folder=folder):
            raise ZeroDivisionError
    assert not list(tmp_path.iterdir())


MAIN = """
import errno, sys
from common.files import InputError, exit_on_input_error, write_json
@exit_on_input_error
def main():
    {}
main()
"""


@pytest.mark.parametrize("body, says", [
    ("write_json('/proc/none/x.json', 1)", "error: /proc/none: No such file or directory; check this path"),
    ("write_json('/dev/null/x.json', 1)", "error: /dev/null: File exists; a file is in the way; choose another path"),
    ("raise OSError(errno.ENOSPC, 'No space left on device', 'x')",
     "error: x: No space left on device; free space and run the same command again"),
    ("raise OSError(errno.EROFS, 'Read-only file system', 'x')", "error: x: Read-only file system; choose a folder that "
     "may be written"),
    ("from safetensors import SafetensorError; raise SafetensorError('I/O error')", "error: I/O error"),
    ("raise InputError('a\\x1b[2Jb\\nc')", "error: a [2Jb c"),
])  # fmt: skip
def test_faults_of_output_are_one_line(body, says):
    done = run(MAIN.format(body))
    assert done.returncode == 2 and done.stderr.splitlines() == [says]


def test_a_bug_keeps_its_traceback_and_a_closed_pipe_is_silent():
    assert "ZeroDivisionError" in run(MAIN.format("1 / 0")).stderr
    code = MAIN.format("print('x' * 10**6, flush=True)")
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.close()
    assert process.stderr.read() == b"" and process.wait() == 2
    process.stderr.close()


def test_a_full_disk_names_the_file(tmp_path):
    """RLIMIT_FSIZE stands for the disk: the write beyond it fails as on a full one, without a name."""
    code = MAIN.format("import resource, signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); "
                       "resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100)); write_json(sys.argv[1], 'x' * 1000)")  # fmt: skip
    done = run(code, tmp_path / "x.json")
    assert done.stderr == f"error: {tmp_path}/x.json: File too large; free space and run the same command again\n"
    assert done.returncode == 2 and not list(tmp_path.iterdir())


def test_two_runs_do_not_share_a_folder(tmp_path):
    hold = MAIN.format("from common.files import hold; hold(sys.argv[1]); print('held', flush=True); sys.stdin.read()")
    first = subprocess.Popen([sys.executable, "-c", hold, str(tmp_path)], cwd=ROOT, stdin=subprocess.PIPE,
                             stdout=subprocess.PIPE)  # fmt: skip
    assert first.stdout.readline() == b"held\n"
    second = run(hold, tmp_path, input="")
    assert second.returncode == 2 and "another process is writing this run" in second.stderr
    first.kill(), first.wait()  # a killed holder leaves no stale claim, and no file
    first.stdin.close(), first.stdout.close()
    F.hold(tmp_path), F.hold(tmp_path)  # the same process may claim it again: a run has several stages
    assert run(hold, tmp_path, input="").returncode == 2
    F.release(tmp_path)
    assert run(hold, tmp_path, input="").returncode == 0 and not list(tmp_path.iterdir())
    (tmp_path / "dead").symlink_to("no/no")  # nothing is made where a link leads
    assert "dead: File exists; a file is in the way" in run(hold, tmp_path / "dead/stage", input="").stderr


def test_a_bar_in_a_log_is_one_line():
    body = ("from common.files import exit_on_input_error as main\nfrom tqdm import tqdm\nimport time\n"
            "main(lambda: [time.sleep(0.002) for _ in tqdm(range(200), 'labels')])()")
    err = subprocess.run([sys.executable, "-c", body], cwd=ROOT, capture_output=True).stderr.decode()
    assert err.count("labels") == 2 and err.count("\n") == 1 and "200/200" in err


def test_notes_are_said_once(capsys):
    F.note("only once"), F.note("only once")
    assert capsys.readouterr().err == "note: only once\n"


def test_one_rank_prints(monkeypatch, tmp_path):
    code = MAIN.format("raise InputError('bad flag')")
    ranks = [run(code, env=os.environ | {"RANK": str(rank), "WORLD_SIZE": "2"}) for rank in range(2)]
    assert [done.returncode for done in ranks] == [2, 2]
    assert [done.stderr for done in ranks] == ["error: bad flag\n", ""]
