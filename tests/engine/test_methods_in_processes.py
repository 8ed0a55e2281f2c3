"""All five methods in two processes against one, and what a training evaluates against what it saves."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import methods_in_processes as methods
import pytest

from ris_d2 import refshapes

pytestmark = pytest.mark.cpu_only

SCRIPT = Path(methods.__file__)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    root = tmp_path_factory.mktemp("datasets")
    options = refshapes.Options(min_shapes=3, max_shapes=4, size=64)
    refshapes.write(str(root / "refshapes"), {"train": 12, "val": 5}, options)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DETECTRON2_DATASETS", str(root))
        yield


@pytest.fixture(scope="module")
def two(data, tmp_path_factory):
    """The folder in which two processes worked."""
    folder = tmp_path_factory.mktemp("two")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(SCRIPT.parents[2]), os.environ.get("PYTHONPATH", "")]),
        "OMP_NUM_THREADS": "1",
    }
    logs = [folder / f"process{rank}.txt" for rank in range(2)]
    processes = []
    try:
        for rank, log in enumerate(logs):
            command = [sys.executable, str(SCRIPT), str(rank), str(port), str(folder)]
            with open(log, "w") as file:
                processes.append(
                    subprocess.Popen(command, env=environment, stdout=file, stderr=file)
                )
        for process, log in zip(processes, logs, strict=True):
            assert process.wait(timeout=200) == 0, log.read_text()[-5000:]
    finally:
        for process in processes:
            process.kill()
    return folder


@pytest.mark.parametrize("name", methods.NAMES)
def test_losses_are_those_of_one_process(name, two, tmp_path):
    """With BatchNorm over all processes and the same noise; see ``Comparable`` for what differs."""
    assert_same_losses(methods.losses_of(name, tmp_path), two / name)


def test_losses_of_micro_batches_are_those_of_one_process(two, tmp_path):
    one = methods.losses_of("shared_ris", tmp_path, **methods.MICRO)
    assert_same_losses(one, two / "micro")


def assert_same_losses(one, folder):
    both = json.loads((folder / "losses.json").read_text())
    assert len(one) == methods.STEPS and one[0].keys() == both[0].keys()
    for ours, theirs in zip(one, both, strict=True):
        assert theirs == pytest.approx(ours, rel=1e-4, abs=1e-5)


def predictions(folder):
    path = folder / "inference" / "ris_grefshapes_val" / "predictions.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return lines, [line.pop("score") for line in lines]


@pytest.mark.parametrize("name", methods.NAMES)
def test_a_training_evaluates_what_it_saves(name, two, tmp_path):
    trained, scores = predictions(two / name / "trained")
    assert len(trained) > 20
    methods.evaluate(name, two / name / "trained" / "model_final.pth", tmp_path)
    for folder in (two / name / "evaluated", tmp_path):  # in two processes, and in one
        evaluated, own_scores = predictions(folder)
        assert evaluated == trained
        # Other numbers of threads add in another order.
        assert own_scores == pytest.approx(scores, abs=1e-5)


@pytest.mark.parametrize("name", methods.NAMES)
def test_processes_evaluate_with_the_same_statistics(name, two):
    """Each had seen its own part of the data."""
    buffers, equal = json.loads((two / name / "shared.json").read_text())
    assert buffers >= 3 and equal == buffers
