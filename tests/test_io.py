import json
import os
import pickle

import numpy as np
import pytest

from ris_d2.io import atomic_write, dataset_root, load_json, load_pickle

PLAIN = {
    "text": ["é", b"\xff\x01", ""],
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
    ],
)
def test_every_other_name_is_refused(tmp_path, data, named):
    path = tmp_path / "a.p"
    path.write_bytes(data)
    with pytest.raises(ValueError, match="not plain data") as error:
        load_pickle(path)
    assert named in str(error.value)


def test_a_truncated_pickle_names_the_file(tmp_path):
    path = tmp_path / "a.p"
    path.write_bytes(pickle.dumps(list(range(1000)))[:-20])
    with pytest.raises(ValueError, match=r"a\.p: not a readable pickle"):
        load_pickle(path)


def test_truncated_json_names_file_and_position(tmp_path):
    path = tmp_path / "instances.json"
    path.write_text('{"images": [\n{"id": 1}, {"id"')
    with pytest.raises(ValueError, match=r"instances\.json: not valid JSON at line 2, column 17"):
        load_json(path)
    path.write_bytes(b'{"a": "\xff"}')
    with pytest.raises(ValueError, match="not UTF-8 text at byte 7"):
        load_json(path)


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
