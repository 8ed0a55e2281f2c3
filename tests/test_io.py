import errno
import gc
import json
import os
import pickle
import shutil
import struct
import subprocess
import sys
import zipfile

import cv2
import numpy as np
import pytest
from PIL import Image

import ris_d2.io
from ris_d2.io import (
    UnreadableFile,
    atomic_write,
    dataset_root,
    load_json,
    load_pickle,
    reading,
    sweep_temporaries,
    without_collecting,
)

PLAIN = {
    "text": ["é", b"\xff\x01", b"", ""],
    "numbers": [1, 2**80, 2.5, True, None, 1j],
    "sets": [{1, 2}, frozenset([3]), bytearray(b"ab"), (1, 2)],
}


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_plain_data_and_numpy_survive_every_protocol(tmp_path, protocol):
    arrays = [
        np.float32(2.5),
        np.int64(3),
        np.arange(6.0).reshape(2, 3),
        np.ones((2, 3), order="F").T,
    ]
    path = tmp_path / "a.p"
    path.write_bytes(pickle.dumps([PLAIN, arrays], protocol=protocol))
    plain, read = load_pickle(path)
    assert plain == PLAIN
    for array, expected in zip(read, arrays):
        np.testing.assert_array_equal(array, expected)
        assert array.dtype == expected.dtype


def test_numpy_1_and_2_module_names_are_both_read(tmp_path):
    data = pickle.dumps([np.float64(1.5), np.arange(3)], protocol=2)
    new = b"numpy._core.multiarray"
    old = b"numpy.core.multiarray"
    path = tmp_path / "a.p"
    for name in (new, old):
        path.write_bytes(data.replace(new, b"@@").replace(old, b"@@").replace(b"@@", name))
        assert name in path.read_bytes()
        scalar, array = load_pickle(path)
        assert scalar == 1.5 and array.tolist() == [0, 1, 2]


def test_python_2_text_is_latin_1(dataset_files):
    path = dataset_files.pickle("a.p", [{"raw": "caf\xe9", "n": 1}, "x" * 300])
    assert b"unicode" not in open(path, "rb").read()
    assert load_pickle(path) == [{"raw": "caf\xe9", "n": 1}, "x" * 300]


class Hostile:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch {self.marker}",)


def test_a_hostile_pickle_is_refused_and_not_run(tmp_path):
    path = tmp_path / "refs(unc).p"
    marker = tmp_path / "was_run"
    path.write_bytes(pickle.dumps([1, Hostile(marker)]))
    with pytest.raises(ValueError, match=r"refs\(unc\)\.p: the pickle asks for (posix|nt)\.system"):
        load_pickle(path)
    assert not marker.exists()
    pickle.loads(path.read_bytes())  # the pickle is indeed hostile
    assert marker.exists()


@pytest.mark.parametrize(
    "data, named",
    [
        (b"cbuiltins\neval\n(S'1'\ntR.", "builtins.eval"),
        (b"c__builtin__\ngetattr\n.", "__builtin__.getattr"),
        (b"c_codecs\nencode\n(S'x'\nS'rot13'\ntR.", "_codecs.encode with 'rot13'"),
        (pickle.dumps(json.JSONDecoder), "json.decoder.JSONDecoder"),
        (pickle.dumps(np.random.default_rng(0)), "numpy.random"),
        (pickle.dumps(np.array(["text"])), "numpy's dtype 'U4'"),
        (pickle.dumps(np.array([None])), "numpy's dtype 'O8'"),
        (pickle.dumps(np.zeros(1, "i4,f8")), "numpy's dtype 'V12'"),
        (b"cbuiltins\nbytearray\n(I1000000000000\ntR.", "bytes of a int"),
        (b"cbuiltins\nbytes\n(I1000000000000\ntR.", "bytes of a int"),
    ],
)
def test_every_other_name_is_refused(tmp_path, data, named):
    path = tmp_path / "a.p"
    path.write_bytes(data)
    with pytest.raises(ValueError, match="not plain data") as error:
        load_pickle(path)
    assert named in str(error.value)


def array_pickle(code="f8", layout="NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00", shape=3, size=24):
    """A pickle of an array as numpy writes it, with any of its parts changed."""
    return (
        b"\x80\x02cnumpy.core.multiarray\n_reconstruct\n"
        b"cnumpy\nndarray\nK\x00\x85U\x01b\x87R(K\x01"
        + (b"J" + struct.pack("<i", shape) + b"\x85")
        + (b"cnumpy\ndtype\nU\x02" + code.encode() + b"K\x00K\x01\x87R")
        + (b"(K\x03U\x01<" + layout.encode("latin1") + b"tb")
        + (b"\x89T" + struct.pack("<i", size) + bytes(size) + b"tb.")
    )


def test_an_array_has_the_bytes_that_its_shape_needs_and_no_layout_of_its_own(tmp_path):
    path = tmp_path / "a.p"
    path.write_bytes(array_pickle())
    assert load_pickle(path).tolist() == [0, 0, 0]
    hostile = [
        array_pickle("O8", layout="NNNK\x08K\x08K\x00"),  # eight raw bytes as a pointer
        array_pickle("f8", layout="NNNK\x08K\x08K\x01"),
        array_pickle("f8", layout="NU\x01a}J\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00"),
        array_pickle(shape=2**31 - 1),
        array_pickle(shape=-3),
        array_pickle(size=0),
        array_pickle(size=25),
        b"cnumpy\nndarray\n(I1000\ntR.",  # memory that nothing fills
        b"\x80\x02cnumpy\nndarray\nM\xe8\x03\x85\x81.",
        b"cnumpy.core.multiarray\nscalar\n(cnumpy\ndtype\n(S'f8'\nI0\nI1\ntRS'1234'\ntR.",
        b"cnumpy\ndtype\n(S'O'\nI0\nI1\ntR.",
    ]
    for data in hostile:
        path.write_bytes(data)
        with pytest.raises(ValueError, match=r"a\.p: "):
            load_pickle(path)


def test_an_unfilled_array_is_empty(tmp_path):
    path = tmp_path / "a.p"
    data = array_pickle()
    path.write_bytes(data[: data.index(b"(K\x01")].replace(b"K\x00\x85", b"M\xff\xff\x85") + b".")
    assert load_pickle(path).shape == (0,)


def test_big_endian_numbers(tmp_path):
    path = tmp_path / "a.p"
    path.write_bytes(pickle.dumps(np.arange(3, dtype=">i4")))
    assert load_pickle(path).tolist() == [0, 1, 2]


def test_a_truncated_pickle_names_the_file(tmp_path):
    path = tmp_path / "a.p"
    path.write_bytes(pickle.dumps(list(range(1000)))[:-20])
    with pytest.raises(ValueError, match=r"a\.p: not readable, truncated or damaged"):
        load_pickle(path)


def test_truncated_json_names_file_and_position(tmp_path):
    path = tmp_path / "instances.json"
    path.write_text('{"images": [\n{"id": 1}, {"id"')
    with pytest.raises(ValueError, match=r"instances\.json: not valid JSON at line 2, column 17"):
        load_json(path)
    path.write_bytes(b'{"a": "\xff"}')
    with pytest.raises(ValueError, match="not UTF-8 text at byte 7"):
        load_json(path)


def nested(depth):
    return "[" * depth + "]" * depth


@pytest.mark.parametrize(
    "content, named",
    [
        (nested(100_000), "nested too deeply"),
        ('{"id": ' + "9" * 5000 + "}", "digits"),
        (nested(100_000)[:100_000], "nested too deeply"),
    ],
)
def test_json_beyond_measure_names_the_file(tmp_path, content, named):
    path = tmp_path / "a.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=rf"a\.json: .*{named}") as error:
        load_json(path)
    assert len(str(error.value)) < 500


def deep():
    return deep()


def oversized():
    return np.empty(2**62, np.uint8)


@pytest.mark.parametrize(
    "fault, named",
    [
        (deep, "nested too deeply"),
        (oversized, "more memory than there is"),
        (lambda: float(10**400), "OverflowError"),
        (lambda: {}["id"], "KeyError: 'id'"),
        (lambda: len(3), "TypeError"),
        (lambda: cv2.resize(np.zeros((0, 0)), (1, 1)), "error: OpenCV"),
        (lambda: zipfile.ZipFile(__file__), "BadZipFile"),
        (lambda: struct.unpack("<i", b""), "error: unpack requires"),
        (lambda: b"\xff".decode(), "can't decode byte 0xff"),
        (lambda: Image.open(__file__), "UnidentifiedImageError"),
        (lambda: open(__file__, "rb").seek(-1), "Invalid argument"),
        (lambda: int("x" * 10_000), "invalid literal"),
    ],
)
def test_whatever_reading_raises_names_file_and_entry(fault, named):
    with pytest.raises(ValueError, match=rf"^some/refs\.p: ref 7: .*{named}") as error:
        with reading("some/refs.p", "ref 7"):
            fault()
    assert len(str(error.value)) < 500


@pytest.mark.parametrize(
    "error",
    [
        FileNotFoundError("other.jpg: no such file"),
        PermissionError(errno.EACCES, "Permission denied", "a.json"),
        OSError(errno.ENOSPC, "No space left on device"),
        ValueError("a.json: field 'id' is missing"),
        UnreadableFile("b.json: not valid JSON"),
        KeyboardInterrupt(),
    ],
)
def test_what_says_enough_passes_the_boundary(error):
    with pytest.raises(type(error)) as found:
        with reading("a.json"):
            raise error
    assert found.value is error


BOMBS = {
    "nested.json": nested(10**6).encode(),
    "digits.json": b"[" + b"9" * 10**6 + b"]",
    "array.p": array_pickle(shape=2**31 - 1),
    "bytes.p": b"\x80\x04\x8e" + struct.pack("<Q", 2**40) + b"abc.",
    "text.p": b"\x80\x04\x8d" + struct.pack("<Q", 2**62) + b"abc.",
    "frame.p": b"\x80\x04\x95" + struct.pack("<Q", 2**40) + b"abc.",
    "memo.p": b"\x80\x02Nr\xff\xff\xff\x7f.",
    "bytearray.p": b"c__builtin__\nbytearray\n(L999999999999L\ntR.",
}


def test_bombs_are_refused_under_a_memory_cap(tmp_path):
    for name, data in BOMBS.items():
        (tmp_path / name).write_bytes(data)
    script = """
import resource, sys
from ris_d2.io import load_json, load_pickle
now = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (now + 2**29, now + 2**29))
for name in sys.argv[1:]:
    try:
        (load_json if name.endswith("json") else load_pickle)(name)
    except ValueError as error:
        print(error)
"""
    result = subprocess.run(
        [sys.executable, "-c", script, *BOMBS], cwd=tmp_path, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    assert [line.partition(": ")[0] for line in result.stdout.splitlines()] == list(BOMBS)


@pytest.mark.parametrize("load", [load_json, load_pickle])
def test_a_missing_file_is_named(tmp_path, load):
    with pytest.raises(FileNotFoundError, match="nothing.json: no such file"):
        load(tmp_path / "nothing.json")


def test_the_dataset_root_is_looked_up_at_each_call(monkeypatch):
    monkeypatch.setenv("DETECTRON2_DATASETS", "/somewhere")
    assert dataset_root() == "/somewhere"
    monkeypatch.setenv("DETECTRON2_DATASETS", "~/data")
    assert dataset_root() == os.path.expanduser("~/data")
    monkeypatch.delenv("DETECTRON2_DATASETS")
    assert dataset_root() == "datasets"


def test_a_write_appears_whole_or_not_at_all(tmp_path):
    path = tmp_path / "new" / "results.json"
    with atomic_write(path) as file:
        file.write("é")
        assert os.path.splitext(file.name)[1] == ".json"
        assert not path.exists()
    assert path.read_text(encoding="utf-8") == "é"

    with pytest.raises(RuntimeError, match="in the middle"):
        with atomic_write(path, "wb") as file:
            file.write(b"half")
            raise RuntimeError("in the middle")
    assert path.read_text(encoding="utf-8") == "é"
    assert os.listdir(path.parent) == ["results.json"]
    with pytest.raises(ValueError, match="mode is 'a'"):
        with atomic_write(path, "a"):
            pass


def test_a_write_by_path_keeps_what_was_written(tmp_path):
    path = tmp_path / "picture.png"
    with atomic_write(path, "wb") as file:
        with open(file.name, "wb") as other:
            other.write(b"by path")
    assert path.read_bytes() == b"by path"


def test_only_temporaries_of_dead_processes_are_swept(tmp_path):
    script = (
        "import sys, time; sys.path.insert(0, sys.argv[2]); from io_alone import atomic_write\n"
        "with atomic_write(sys.argv[1]) as file:\n"
        "    file.write('half'); file.flush(); print('writing', flush=True); time.sleep(60)"
    )
    command = [sys.executable, "-c", script, str(tmp_path / "results.json"), str(tmp_path / "code")]
    (tmp_path / "code").mkdir()
    # The whole package takes seconds to import.
    shutil.copy(ris_d2.io.__file__, tmp_path / "code" / "io_alone.py")
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout.readline() == "writing\n"
        (left,) = tmp_path.glob(".*")
        os.utime(left, (0, 0))
        assert sweep_temporaries(tmp_path) == [] and left.exists()
        process.kill()
        process.wait()
        strangers = [
            tmp_path / name for name in (".0123abcd.a.json", "ris_d2-0123abcd.b", ".ris_d2")
        ]
        for path in strangers:
            path.write_text("")
            os.utime(path, (0, 0))
        assert sweep_temporaries(tmp_path) == [str(left)]
        assert not left.exists() and all(path.exists() for path in strangers)
    finally:
        process.kill()
    assert sweep_temporaries(tmp_path / "absent") == []


def test_collecting_goes_on_after_a_file_that_cannot_be_read(tmp_path):
    (tmp_path / "a.json").write_text("[1,")
    with pytest.raises(ValueError, match="not valid JSON"):
        load_json(tmp_path / "a.json")
    assert gc.isenabled()
    with without_collecting():
        (tmp_path / "a.json").write_text("[]")
        assert load_json(tmp_path / "a.json") == []
        assert not gc.isenabled()
    assert gc.isenabled()
