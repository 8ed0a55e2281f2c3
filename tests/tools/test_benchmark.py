"""tools/benchmark.py: every part runs and its figures agree with each other."""

import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

REPOSITORY = Path(__file__).parents[2]


@pytest.fixture
def benchmark(load_tool):
    """The module; run_part changes the number of threads, which is put back."""
    torch_threads = torch.get_num_threads()
    yield load_tool("benchmark")
    torch.set_num_threads(torch_threads)


def _args(benchmark, tiny_config, *more):
    return benchmark._parse(["--config-file", tiny_config, "--seconds", "0.05", *more])


def test_median_seconds_measures_a_known_time(benchmark):
    calls = []

    def function():
        calls.append(1)
        time.sleep(0.1 if len(calls) <= 3 else 0.01)  # slow while warm-up, and once more

    seconds, repeats = benchmark._median_seconds(function, 0.0)
    assert 0.01 <= seconds < 0.09, "one slow call of five is no median"
    assert repeats == 5 and len(calls) == 7


def test_model(benchmark, tiny_config):
    figures = benchmark.run_part("model", _args(benchmark, tiny_config, "--threads", "1"))
    assert figures["threads"] == 1
    assert 0 < figures["latency_1_expression_ms"] < 2 * figures["latency_8_expressions_ms"]
    assert figures["expressions_per_s_at_8"] == pytest.approx(
        8000 / figures["latency_8_expressions_ms"]
    )
    assert figures["peak_memory_mb"] >= figures["baseline_memory_mb"] > 50


def test_train_takes_a_step_with_the_units_of_the_config(benchmark, tiny_config):
    args = _args(benchmark, tiny_config, "--batch", "3", "INPUT.MAX_EXPRESSIONS", "4")
    figures = benchmark.run_part("train", args)
    assert (figures["batch_units"], figures["expressions_per_unit"]) == (3, 4)
    assert figures["units_per_s"] == pytest.approx(3000 / figures["step_ms"])
    sentence = benchmark.run_part(
        "train", _args(benchmark, tiny_config, "INPUT.RIS.UNIT", "sentence")
    )
    assert sentence["expressions_per_unit"] == 1


def test_mapper(benchmark, tiny_config):
    args = _args(benchmark, tiny_config, "INPUT.RIS.SIZE", "(480, 480)")
    figures = benchmark.run_part("mapper", args)
    assert (figures["input_height"], figures["input_width"], figures["threads"]) == (480, 480, 1)
    assert figures["units_per_s"] == pytest.approx(1000 / figures["ms_per_unit"])


def test_evaluator(benchmark, tiny_config):
    figures = benchmark.run_part("evaluator", _args(benchmark, tiny_config, "--expressions", "100"))
    assert figures["expressions"] == 105, "whole images of 7 expressions"
    assert figures["expressions_per_s"] > 0 and figures["evaluate_s"] > 0
    assert 0 <= figures["memory_growth_process_mb"] < 50


def test_the_evaluators_predictions_are_neither_perfect_nor_hopeless(benchmark):
    record = benchmark._record("image.jpg")
    for annotation in record["annotations"]:
        truth = benchmark.rasterize(annotation["segmentation"], 480, 640)
        mask = benchmark._mask(annotation)
        assert 0.7 < np.count_nonzero(mask & truth) / np.count_nonzero(mask | truth) < 0.95


def test_command_line_prints_one_json_object(tiny_config):
    command = [sys.executable, "tools/benchmark.py", "--config-file", tiny_config, "--json"]
    command += ["--parts", "model", "--seconds", "0.05", "--threads", "1"]
    done = subprocess.run(
        command,
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        env={"PYTHONPATH": str(REPOSITORY), "PATH": "/usr/bin:/bin"},
    )
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert list(report["parts"]) == ["model"] and report["device"].endswith("cores")
