"""tools/benchmark.py: every part runs and its figures agree with each other."""

import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.modeling import build_model

from ris_d2 import load_config

REPOSITORY = Path(__file__).parents[2]


@pytest.fixture
def benchmark(load_tool):
    """The module; run_part changes the number of threads, which is put back."""
    torch_threads = torch.get_num_threads()
    yield load_tool("benchmark")
    torch.set_num_threads(torch_threads)


def _args(benchmark, tiny_config, *more):
    return benchmark.parse(["--config-file", tiny_config, "--seconds", "0.05", *more])


def test_median_seconds_measures_a_known_time(benchmark):
    calls = []

    def function():
        calls.append(1)
        time.sleep(0.1 if len(calls) <= 3 else 0.01)  # slow while warm-up, and once more

    seconds, repeats = benchmark._median_seconds(function, 0.0)
    assert 0.01 <= seconds < 0.09, "one slow call of five is no median"
    assert repeats == 5 and len(calls) == 7


def test_model(benchmark, tiny_config):
    figures = benchmark.run_part(
        "model", tiny_config, _args(benchmark, tiny_config, "--threads", "1")
    )
    assert figures["threads"] == 1
    assert 0 < figures["latency_1_expression_ms"] < 2 * figures["latency_8_expressions_ms"]
    assert figures["expressions_per_s_at_8"] == pytest.approx(
        8000 / figures["latency_8_expressions_ms"]
    )
    assert figures["peak_memory_mb"] >= figures["baseline_memory_mb"] > 50
    # Image and sentence meet in Shared-RIS's first layer: little is shared.
    assert figures["runs_per_image"] == "encoder.vision_embed"
    for noun in ("1_expression", "8_expressions"):
        shares = [figures[f"{name}_{noun}_ms"] for name in ("encode_images", "segment", "rest")]
        assert min(shares[:2]) > 0
        assert sum(shares) == pytest.approx(figures[f"latency_{noun}_ms"])
    assert figures["latency_8_to_8_times_1"] == pytest.approx(
        figures["latency_8_expressions_ms"] / (8 * figures["latency_1_expression_ms"])
    )


class TwoSides(torch.nn.Module):
    """10 ms for an image, 20 ms for its expressions, 5 ms around them."""

    device = torch.device("cpu")

    def __init__(self):
        super().__init__()
        self.image = torch.nn.Sequential(torch.nn.Identity())
        self.text = torch.nn.Identity()

    def encode_images(self, images):
        time.sleep(0.01)
        return self.image(images)

    def segment(self, features):
        time.sleep(0.02)
        return self.text(features)

    def forward(self, inputs):
        time.sleep(0.005)
        return self.segment(self.encode_images(0))


def test_stopwatch_tells_the_image_from_its_expressions(benchmark):
    model = TwoSides()
    with benchmark._Stopwatch(model, ("encode_images", "segment")) as stopwatch:
        for _ in range(5):
            stopwatch.call([])
    seconds = stopwatch.medians()
    assert 0.01 <= seconds["encode_images"] < seconds["segment"]
    assert 0.02 <= seconds["segment"]
    assert not {"encode_images", "segment"} & set(vars(model)), "the methods are the class's again"


def test_modules_per_image(benchmark, monkeypatch):
    monkeypatch.setattr(benchmark, "_model_input", lambda cfg, count: {})
    model = TwoSides()
    assert benchmark._modules_per_image(model, None) == ["image"], "outermost, and no text"
    assert not model.image._forward_pre_hooks and "encode_images" not in vars(model)


@pytest.mark.parametrize("fusion", ["early", "late", "none"])
def test_early_fusion_shares_what_comes_before_the_first_exchange(benchmark, fusion):
    """VIPA: the whole image encoder is per image with late and no fusion, a stage with early."""
    options = ["MODEL.VIPA.ENCODER", fusion, "MODEL.WEIGHTS", ""]
    cfg = load_config(str(REPOSITORY / "configs" / "refshapes" / "vipa_tiny.yaml"), options)
    modules = benchmark._modules_per_image(build_model(cfg).eval(), cfg)
    if fusion == "early":
        assert [name for name in modules if name != "encoder.vision.partitions"] == [
            "encoder.vision.patch_embed",
            "encoder.vision.layers.0.blocks.0",
        ]
    else:
        assert modules == ["encoder.vision"]


def test_train_takes_a_step_with_the_units_of_the_config(benchmark, tiny_config):
    args = _args(benchmark, tiny_config, "--batch", "3", "INPUT.MAX_EXPRESSIONS", "4")
    figures = benchmark.run_part("train", tiny_config, args)
    assert (figures["batch_units"], figures["expressions_per_unit"]) == (3, 4)
    assert figures["units_per_s"] == pytest.approx(3000 / figures["step_ms"])
    sentence = benchmark.run_part(
        "train", tiny_config, _args(benchmark, tiny_config, "INPUT.RIS.UNIT", "sentence")
    )
    assert sentence["expressions_per_unit"] == 1
    assert sentence["saved_for_backward_mb"] < figures["saved_for_backward_mb"]


def test_memory_of_a_training_step_by_hand(benchmark):
    """One linear layer of 64 x 64: AdamW keeps two moments and a step count per tensor."""

    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = torch.nn.Linear(64, 64)

        def forward(self, inputs):
            x = torch.ones(256, 64)
            return {"loss": self.layer(x).exp().sum()}

    model = Model()
    optimizer = torch.optim.AdamW(model.parameters())
    model([])["loss"].backward()
    optimizer.step()
    weights = 4 * (64 * 64 + 64)
    assert benchmark._state_mb(model, optimizer) * 2**20 == 4 * weights + 2 * 4
    # x for the weight's gradient, exp(x) for its own; the weight itself is no activation.
    assert benchmark._saved_for_backward_mb(model, []) * 2**20 == 2 * 256 * 64 * 4


def test_mapper(benchmark, tiny_config):
    args = _args(benchmark, tiny_config, "INPUT.RIS.SIZE", "(480, 480)")
    figures = benchmark.run_part("mapper", tiny_config, args)
    assert (figures["input_height"], figures["input_width"], figures["threads"]) == (480, 480, 1)
    assert figures["units_per_s"] == pytest.approx(1000 / figures["ms_per_unit"])


def test_evaluator(benchmark, tiny_config):
    figures = benchmark.run_part(
        "evaluator", tiny_config, _args(benchmark, tiny_config, "--expressions", "100")
    )
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


def test_configurations_side_by_side(benchmark, monkeypatch, capsys):
    """``_report`` starts processes, which cannot import a tool that was loaded from its file."""
    steps = {"configs/a.yaml": 20.0, "configs/b.yaml": 30.0}

    def report(config_file, args):
        train = {"runs_per_image": "stem", "step_ms": steps[config_file], "frozen_mb": 0.0}
        return {"config_file": config_file, "device": "cpu", "parts": {"train": train}}

    monkeypatch.setattr(benchmark, "_report", report)
    both = ["--config-file", "configs/a.yaml", "--config-file", "configs/b.yaml"]
    assert [r["config_file"] for r in benchmark.main(both)] == list(steps)
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["part", "measure", "a", "b", "ratio"] in lines
    assert ["train", "step_ms", "20", "30", "x", "1.50"] in lines
    assert ["train", "runs_per_image", "stem", "stem"] in lines
    assert ["train", "frozen_mb", "0", "0"] in lines, "no ratio to nothing"
    benchmark.main([*both, "--json"])
    assert [r["config_file"] for r in json.loads(capsys.readouterr().out)] == list(steps)
    assert benchmark.main(both[:2])["config_file"] == "configs/a.yaml"
    assert ["train", "step_ms", "20"] in [l.split() for l in capsys.readouterr().out.splitlines()]
