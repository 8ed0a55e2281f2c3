"""tools/benchmark.py: every part runs and its figures agree with each other."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog
from detectron2.modeling import build_model

from ris_d2 import load_config
from ris_d2.masks import encode

REPOSITORY = Path(__file__).parents[2]


@pytest.fixture
def benchmark(load_tool):
    """The module; run_part changes the number of threads, which is put back."""
    torch_threads = torch.get_num_threads()
    yield load_tool("benchmark")
    torch.set_num_threads(torch_threads)
    torch.backends.cudnn.allow_tf32 = True  # PyTorch's default


def _args(benchmark, tiny_config, *more):
    few = ["--seconds", "0.01", "--pause", "0", "--threads", "1"]
    return benchmark.parse(["--config-file", tiny_config, *few, *more])


def _measure(benchmark, part, args):
    columns = benchmark.columns_of(args)
    return benchmark.run_part(part, columns if part == "model" else columns[:1], args)


def test_functions_are_called_in_turns_and_their_times_measured(monkeypatch):
    import _timing

    now, calls, pauses = [0.0], [], []
    monkeypatch.setattr(_timing.time, "sleep", pauses.append)

    def function(name, seconds):
        def call():
            calls.append(name)
            now[0] += seconds if len(calls) > 2 * _timing.WARM_UP else 100

        return call

    functions = {"a": function("a", 1.0), "b": function("b", 4.0)}
    times = _timing.in_turns(functions, seconds=6, pause=0.5, clock=lambda: now[0])
    rounds = _timing.WARM_UP + 6
    assert calls == ["a", "b"] * rounds and pauses == [0.5] * len(calls)
    assert times == {"a": [1.0] * 6, "b": [4.0] * 6}, "without the first ones"
    assert _timing.median_ratio(times["b"], times["a"]) == 4
    times = _timing.in_turns(functions, seconds=20, enough=["b"], clock=lambda: now[0])
    assert len(times["a"]) == 5


def test_percentiles_are_of_the_times_themselves():
    from _timing import percentile

    times = [float(i) for i in range(20, 0, -1)]
    assert [percentile(times, p) for p in (50, 95, 100)] == [10, 19, 20]
    assert percentile([3.0], 95) == percentile([3.0], 50) == 3


def test_model(benchmark, tiny_config):
    args = _args(benchmark, tiny_config, "--precisions", "fp32", "bf16", "--sentences", "1", "3")
    assert [column.name for column in benchmark.columns_of(args)] == ["tiny fp32", "tiny bf16"]
    first, second = _measure(benchmark, "model", args)
    assert (first["runs_in"], second["runs_in"]) == ("fp32", "bf16")
    assert first["of_first_column_3"] == 1 and second["of_first_column_3"] > 0
    # Image and sentence meet in Shared-RIS's first layer: little is shared.
    assert first["runs_per_image"] == "encoder.vision_embed"
    for figures in (first, second):
        for count in (1, 3):
            p50, macs = figures[f"p50_ms_{count}"], figures[f"gmacs_{count}"]
            shares = [figures[f"{name}_ms_{count}"] for name in ("encode", "answer")]
            assert min(shares) > 0 and sum(shares) == pytest.approx(p50)
            assert p50 <= figures[f"p95_ms_{count}"]
            assert figures[f"per_sentence_ms_{count}"] == pytest.approx(p50 / count)
            assert figures[f"gmacs_per_s_{count}"] == pytest.approx(1000 * macs / p50)
            assert 0 < figures[f"of_matrix_rate_{count}"] < 1, "a tiny model is far from it"
        assert 2 < figures["gmacs_3"] / figures["gmacs_1"] < 3


def test_auto_says_what_it_became_and_modes_are_columns(benchmark, tiny_config):
    args = _args(benchmark, tiny_config, "--modes", "eager", "compiled")
    names = [column.name for column in benchmark.columns_of(args)]
    assert names == ["tiny auto", "tiny auto compiled"]
    configs = [benchmark.config_of(column, args) for column in benchmark.columns_of(args)]
    assert [cfg.MODEL.RIS.COMPILE for cfg in configs] == [False, True]
    args = _args(benchmark, tiny_config, "--sentences", "1")
    (figures,) = _measure(benchmark, "model", args)
    assert figures["runs_in"] == "fp32", "as small as it is"


def test_encode_and_answer_are_told_apart_when_compiled(benchmark, tiny_config, monkeypatch):
    from torch.utils._python_dispatch import _get_current_dispatch_mode

    from ris_d2.modeling import segmenter

    ran = []

    def compiled(function):
        def call(*arguments):
            assert _get_current_dispatch_mode() is None, "torch.compile refuses what counts"
            ran.append(function.__name__)
            return function(*arguments)

        return call

    monkeypatch.setattr(segmenter, "_compiled", compiled)
    args = _args(benchmark, tiny_config, "--modes", "eager", "compiled", "--sentences", "1", "2")
    eager, compiles = _measure(benchmark, "model", args)
    assert len(ran) == 2 * 2 * (compiles["calls_1"] + 3), "two methods of one column's calls, twice"
    assert set(ran) == {"encode_images", "run_segment"}
    for figures in (eager, compiles):
        assert 0 < figures["encode_ms_2"] < figures["p50_ms_2"]


def test_precisions_that_a_device_does_not_have_are_one_line(benchmark, tiny_config):
    args = _args(benchmark, tiny_config, "--precisions", "tf32")
    with pytest.raises(ValueError, match="tf32 is of GPUs, and a device is cpu"):
        benchmark.columns_of(args)
    args = _args(benchmark, tiny_config, "--precisions", "tf32", "--devices", "cuda")
    (column,) = benchmark.columns_of(args)
    assert benchmark.config_of(column, args).MODEL.RIS.PRECISION == "fp32"
    assert column.name == "tiny tf32 cuda"


@pytest.mark.parametrize("fusion", ["early", "late", "none"])
def test_early_fusion_shares_what_comes_before_the_first_exchange(benchmark, fusion):
    """VIPA: the whole image encoder is per image with late and no fusion, a stage with early."""
    options = ["MODEL.VIPA.ENCODER", fusion, "MODEL.WEIGHTS", ""]
    cfg = load_config(str(REPOSITORY / "configs" / "refshapes" / "vipa_tiny.yaml"), options)
    modules = benchmark.modules_per_image(build_model(cfg).eval(), cfg)
    if fusion == "early":
        assert [name for name in modules if name != "encoder.vision.partitions"] == [
            "encoder.vision.patch_embed",
            "encoder.vision.layers.0.blocks.0",
        ]
    else:
        assert modules == ["encoder.vision"]


def test_train_takes_a_step_with_the_units_of_the_config(benchmark, tiny_config):
    args = _args(benchmark, tiny_config, "--batch", "3", "INPUT.MAX_EXPRESSIONS", "4")
    figures = _measure(benchmark, "train", args)
    assert (figures["batch_units"], figures["expressions_per_unit"]) == (3, 4)
    assert figures["units_per_s"] == pytest.approx(3000 / figures["step_ms"])
    args = _args(benchmark, tiny_config, "INPUT.RIS.UNIT", "sentence")
    sentence = _measure(benchmark, "train", args)
    assert sentence["expressions_per_unit"] == 1
    assert sentence["saved_for_backward_mb"] < figures["saved_for_backward_mb"]


def test_memory_of_a_training_step_by_hand():
    """One linear layer of 64 x 64: AdamW keeps two moments and a step count per tensor."""
    from _timing import saved_for_backward_mb, state_mb

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
    assert state_mb(model, optimizer) * 2**20 == 4 * weights + 2 * 4
    # x for the weight's gradient, exp(x) for its own; the weight itself is no activation.
    assert saved_for_backward_mb(model, []) * 2**20 == 2 * 256 * 64 * 4


def test_memory(benchmark, tiny_config):
    figures = _measure(benchmark, "memory", _args(benchmark, tiny_config))
    assert 0.05 < figures["weights_mb"] < 1
    assert figures["peak_memory_mb"] >= figures["baseline_memory_mb"] > 50


def test_mapper(benchmark, tiny_config):
    args = _args(benchmark, tiny_config, "INPUT.RIS.SIZE", "(480, 480)")
    figures = _measure(benchmark, "mapper", args)
    assert (figures["input_height"], figures["input_width"]) == (480, 480)
    assert figures["units_per_s"] == pytest.approx(1000 / figures["ms_per_unit"])


def test_evaluator(benchmark, tiny_config):
    figures = _measure(
        benchmark, "evaluator", _args(benchmark, tiny_config, "--expressions", "100")
    )
    assert figures["expressions"] == 105, "whole images of 7 expressions"
    assert figures["expressions_per_s"] > 0 and figures["evaluate_s"] > 0
    assert 0 <= figures["memory_growth_process_mb"] < 50


def test_the_evaluators_predictions_are_neither_perfect_nor_hopeless():
    import _sample

    record = _sample.make_record("image.jpg")
    for annotation in record["annotations"]:
        truth = _sample.rasterize(annotation["segmentation"], 480, 640)
        mask = _sample.nearly_right(annotation)
        assert 0.7 < np.count_nonzero(mask & truth) / np.count_nonzero(mask | truth) < 0.95


@pytest.fixture
def scene():
    """A dataset whose truth is what the packaged model answers: its gIoU on it is 100."""
    from ris_d2 import example
    from ris_d2.predictor import Predictor

    results = Predictor.from_pretrained("example", precision="fp32")(
        example.SCENE, example.SENTENCES
    )
    height, width = results[0]["mask"].shape
    found = [result for result in results if result["box"]]
    annotations = [
        {"id": r["expression_id"], "segmentation": encode(r["mask"].numpy()), "bbox": r["box"]}
        for r in found
    ]
    record = {
        **{"file_name": example.SCENE, "image_id": 1, "height": height, "width": width},
        "source": "scene",
        "annotations": [{**a, "bbox_mode": 0, "category_id": 0, "iscrowd": 0} for a in annotations],
        "expressions": [
            {
                **{"expression_id": r["expression_id"], "ref_id": r["expression_id"]},
                "text": r["text"],
                "annotation_ids": [r["expression_id"]] if r["box"] else [],
            }
            for r in results
        ],
    }
    DatasetCatalog.register("benchmark_scene", lambda: [record, {**record, "image_id": 2}])
    yield "benchmark_scene"
    DatasetCatalog.remove("benchmark_scene")


def test_accuracy_is_of_the_weights_and_precision_that_are_timed(benchmark, scene):
    words = ["--model", "example", "--dataset", scene, "--threads", "1", "--images", "1"]
    words += ["DATALOADER.NUM_WORKERS", "0", "--precisions", "fp32", "bf16"]
    args = benchmark.parse(words)
    assert args.parts[-1] == "accuracy"
    exact, half = (benchmark.run_part("accuracy", [c], args) for c in benchmark.columns_of(args))
    assert (exact["ran_in"], half["ran_in"]) == ("fp32", "bf16")
    # Cut out at the original size, the masks of the evaluation are those of Predictor.
    assert exact["gIoU"] > 99.9 and 95 < half["gIoU"]
    trained = benchmark.build(benchmark.columns_of(args)[0], args)[0].state_dict()
    again = benchmark.build(benchmark.columns_of(args)[1], args)[0].state_dict()
    assert all(torch.equal(trained[name], again[name]) for name in trained)


@pytest.mark.parametrize(
    "words, message",
    [
        ([], "give --config-file, --model or --compare"),
        (["--model", "example", "--parts", "accuracy"], "the part accuracy needs --dataset"),
    ],
)
def test_what_is_missing_from_the_command_line_is_said(benchmark, words, message, capsys):
    with pytest.raises(SystemExit):
        benchmark.parse(words)
    assert message in capsys.readouterr().err


def test_command_line_prints_one_json_object_that_can_be_compared(benchmark, tiny_config, tmp_path):
    command = [sys.executable, "tools/benchmark.py", "--config-file", tiny_config, "--json"]
    command += ["--parts", "model", "memory", "--seconds", "0.01", "--threads", "1"]
    done = subprocess.run(
        command,
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        env={"PYTHONPATH": str(REPOSITORY), "PATH": "/usr/bin:/bin"},
    )
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    (column,) = report["columns"]
    assert list(column["parts"]) == ["model", "memory"] and column["name"] == "tiny auto"
    assert column["config"]["MODEL"]["SHARED_RIS"]["DIM"] == 32
    assert report["machine"]["threads"] == 1 and report["machine"]["cores"] >= 1
    assert report["versions"]["torch"] == torch.__version__
    files = [str(tmp_path / name) for name in ("old.json", "new.json")]
    for file in files:
        Path(file).write_text(done.stdout)
    compared = benchmark.main(["--compare", *files])
    assert [c["name"] for c in compared["columns"]] == ["old: tiny auto", "new: tiny auto"]


def test_two_configurations_are_compared_in_one_run(benchmark):
    args = benchmark.parse(["--compare", "configs/a.yaml", "configs/b.yaml"])
    assert args.config_file == ["configs/a.yaml", "configs/b.yaml"] and not args.compare


def test_table_has_a_column_each_and_ratios_to_the_first(benchmark):
    def column(name, **figures):
        return {"name": name, "parts": {"train": figures}}

    report = {
        "machine": {"cpu": "x", "gpus": ["y", "z"]},
        "versions": {"torch": "2"},
        "columns": [
            column("a", step_ms=20.0, runs_per_image="stem", frozen_mb=0.0),
            column("b", step_ms=30.0, runs_per_image="stem", frozen_mb=0.0, more=None),
        ],
    }
    table = benchmark.as_table(report)
    lines = [line.split() for line in table.splitlines()]
    assert lines[0] == ["cpu", "x,", "gpus", "y", "z"]
    assert ["part", "measure", "a", "b", "ratio"] in lines
    assert ["train", "step_ms", "20", "30", "x", "1.50"] in lines
    assert ["train", "runs_per_image", "stem", "stem"] in lines
    assert ["train", "frozen_mb", "0", "0"] in lines, "no ratio to nothing"
    assert ["train", "more"] in lines


def test_columns_are_timed_on_a_device_that_is_pretended(benchmark, tiny_config, monkeypatch):
    sys.path.append(str(REPOSITORY / "tests"))
    import pretended_device as pretended

    args = _args(benchmark, tiny_config, "--sentences", "2", "--precisions", "fp32")
    (column,) = benchmark.columns_of(args)
    model, cfg = benchmark.build(column, args)
    runner = benchmark._Runner(column, model, cfg, benchmark.time.perf_counter)
    inputs = [benchmark.model_input(cfg, 2)]
    pretended.to_device(model)
    waited = []
    monkeypatch.setattr(torch.cuda, "synchronize", waited.append)
    with pretended.pretended_device() as log:
        runner(inputs)
    assert waited == [torch.device("cuda", 0)] * 2, "after encoding, and after the answer"
    assert log.waits.total() == 1, "and not in between, but for the results"
