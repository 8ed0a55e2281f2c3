"""The fuzzer on all readers, in small, and what it makes of readers that fail."""

import faulthandler
import functools
import importlib.util
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

TOOL = Path(__file__).parents[2] / "tools" / "fuzz.py"


@pytest.fixture(scope="module")
def fuzz():
    spec = importlib.util.spec_from_file_location("fuzz", TOOL)
    module = importlib.util.module_from_spec(spec)
    sys.modules["fuzz"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    yield module
    del sys.modules["fuzz"]


def test_no_reader_fails(fuzz):
    result = subprocess.run(
        [sys.executable, str(TOOL), "--cases", "30", "--seed", "5"], capture_output=True, text=True
    )
    assert result.returncode == 0, result.stdout + result.stderr
    rows = [line.split() for line in result.stdout.splitlines()[1:] if line]
    assert [row[0] for row in rows] == list(fuzz.READERS)
    for name, read, refused, *failures, _ in rows:
        assert int(read) + int(refused) == 30 and int(refused) > 0 and set(failures) == {"0"}, name


def try_reader(fuzz, monkeypatch, read, *, cases=40, seconds=10, content=None):
    """Outcomes of a reader of one json file; a case is what ``read`` makes of a file that changed."""
    files = {"a.json": fuzz.made(content or [1, 2, 3], fuzz.dump_json)}

    def read_changed(name):
        with open(name, "rb") as file:
            data = file.read()
        if data != files["a.json"].data:
            read(data)

    monkeypatch.setitem(fuzz.READERS, "toy", fuzz.Reader(lambda: files, read_changed))
    return [outcome for outcome, _ in fuzz.fuzz("toy", cases, 0, seconds)]


def unnamed(data):
    raise ValueError("something is wrong")


def named(data):
    raise ValueError(f"{os.getcwd()}/a.json: something is wrong")


def other(data):
    raise KeyError(f"{os.getcwd()}/a.json")


def crash(data):
    faulthandler.disable()  # pytest's, whose report would look like a crash of the suite
    os.kill(os.getpid(), signal.SIGSEGV)


def hang(data):
    time.sleep(60)


def run_it(data):
    os.mkdir("was_run")
    raise ValueError(f"{os.getcwd()}/a.json: but it was run")


def fill_memory(data):
    bytearray(2**36)


@pytest.mark.parametrize(
    "read, outcome",
    [
        (named, "refused"),
        (unnamed, "unnamed"),
        (other, "exception"),
        (fill_memory, "exception"),
        (run_it, "ran"),
        (crash, "crash"),
        (lambda data: None, "read"),
    ],
)
def test_each_outcome_is_told_apart(fuzz, monkeypatch, read, outcome):
    found = try_reader(fuzz, monkeypatch, read, cases=12)
    assert set(found) <= {outcome, "read"} and found.count(outcome) >= 8


def test_a_hang_is_ended_and_the_next_case_runs(fuzz, monkeypatch):
    found = try_reader(fuzz, monkeypatch, hang, cases=3, seconds=0.3)
    assert len(found) == 3 and found.count("hang") >= 2


def test_what_is_dropped_must_be_counted(fuzz, monkeypatch, tmp_path):
    def load(path, skipped, count):
        refs = [ref for ref in fuzz.load_json(path) if len(ref["sentences"]) < 4]
        skipped.whole("long refs", 1, 1, count)
        return [{"expressions": [], "annotations": []} for ref in refs]

    def read(count):
        load_counted = functools.partial(load, count=count)
        fuzz.read_refs(load_counted, "a.json", fuzz._sentences, "a.json")

    monkeypatch.chdir(tmp_path)
    refs = [{"split": split, "sentences": [{}] * 4} for split in ("train", "train", "val")]
    Path("a.json").write_text(json.dumps(refs))
    read(8)
    with pytest.raises(fuzz.Dropped, match="8 expressions, 0 used, 7 counted: long refs"):
        read(7)


def test_a_case_is_the_same_again(fuzz, monkeypatch, tmp_path):
    def changed(case):
        bench.damage(case)
        return Path("classes.json").read_bytes()

    monkeypatch.chdir(tmp_path)
    bench = fuzz.Bench("classes", 3)
    first = [changed(case) for case in range(50)]
    assert first == [changed(case) for case in range(50)]
    assert len(set(first)) > 40
    bench.run(7)
    assert json.loads(Path("classes.json").read_bytes())["seen"] == ["circle", "square"]


def test_status_and_repetition(fuzz, monkeypatch, capfd, tmp_path):
    monkeypatch.chdir(tmp_path)
    try_reader(fuzz, monkeypatch, unnamed, cases=1)
    assert fuzz.main(["--reader", "toy", "--cases", "12"]) == 1
    out = capfd.readouterr().out
    assert "unnamed: --reader toy --seed 0 --case" in out and out.count("something is wrong") == 3
    case = out.partition("--case ")[2].partition(":")[0]
    assert fuzz.main(["--reader", "toy", "--case", case]) == 0
    assert "something is wrong" in capfd.readouterr().err


def test_the_worker_ends_with_its_parent(fuzz):
    context = multiprocessing.get_context("fork")
    parent = context.Process(target=fuzz.fuzz, args=("classes", 10**6, 0, 10))
    parent.start()
    children = Path(f"/proc/{parent.pid}/task/{parent.pid}/children")
    wait_until(lambda: children.read_text().strip())
    worker = Path("/proc", children.read_text().strip())
    parent.kill()
    parent.join()
    wait_until(lambda: not worker.exists() or "State:\tZ" in (worker / "status").read_text())


def wait_until(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)
