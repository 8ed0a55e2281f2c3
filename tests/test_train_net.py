import json
import logging
import runpy
import sys
from pathlib import Path

import pytest
from detectron2.data import DatasetCatalog

from ris_d2 import refshapes
from ris_d2.engine.preflight import check_inputs

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def train_net():
    sys.path.insert(0, str(ROOT))
    import train_net

    yield train_net
    sys.path.remove(str(ROOT))


@pytest.fixture(autouse=True)
def restore_loggers():
    """detectron2's setup_logger cuts loggers off from the root, and so from pytest's caplog."""
    loggers = [logging.getLogger(name) for name in ("ris_d2", "detectron2", "fvcore")]
    before = [(logger.handlers[:], logger.propagate, logger.level) for logger in loggers]
    yield
    for logger, (handlers, propagate, level) in zip(loggers, before):
        logger.handlers[:], logger.propagate = handlers, propagate
        logger.setLevel(level)


def write(path, text):
    path.write_text(text)
    return str(path)


def test_config_with_base_and_options(train_net, tmp_path):
    write(tmp_path / "base.yaml", "SOLVER: {IMS_PER_BATCH: 64, RIS: {SCHEDULE: cosine}}\n")
    leaf = write(tmp_path / "leaf.yaml", "_BASE_: base.yaml\nSOLVER: {IMS_PER_BATCH: 32}\n")
    cfg = train_net.load_config(leaf, ["SOLVER.BASE_LR", "0.5"])
    solver = cfg.SOLVER
    assert (solver.IMS_PER_BATCH, solver.RIS.SCHEDULE, solver.BASE_LR) == (32, "cosine", 0.5)


@pytest.mark.parametrize(
    "text, message",
    [
        ("SOLVER: {RIS: {SHEDULE: poly}}\n", r"leaf.yaml: .*SOLVER\.RIS\.SHEDULE"),
        ("SOLVER: {IMS_PER_BATCH: many}\n", r"leaf.yaml, SOLVER: .*SOLVER\.IMS_PER_BATCH"),
    ],
)
def test_wrong_key_or_value_in_yaml_names_key_and_file(train_net, tmp_path, text, message):
    with pytest.raises(ValueError, match=message):
        train_net.load_config(write(tmp_path / "leaf.yaml", text), [])


def test_wrong_key_in_the_base_is_found_too(train_net, tmp_path):
    write(tmp_path / "base.yaml", "MODEL: {RIS: {PRECISON: bf16}}\n")
    leaf = write(tmp_path / "leaf.yaml", "_BASE_: base.yaml\n")
    with pytest.raises(ValueError, match=r"base.yaml: .*MODEL\.RIS\.PRECISON"):
        train_net.load_config(leaf, [])


def test_wrong_option_on_the_command_line(train_net):
    with pytest.raises(ValueError, match="command line: .*SOLVER.BASELR"):
        train_net.load_config("", ["SOLVER.BASELR", "1"])


def test_unknown_dataset_lists_the_known(train_net):
    DatasetCatalog.register("ris_known_val", list)
    try:
        cfg = train_net.load_config("", ["DATASETS.TRAIN", (), "DATASETS.TEST", ("ris_knwon_val",)])
        with pytest.raises(
            ValueError, match="'ris_knwon_val'; did you mean ris_known_val.*known: "
        ):
            check_inputs(cfg)
    finally:
        DatasetCatalog.remove("ris_known_val")


@pytest.mark.parametrize(
    "key, value, message",
    [
        ("SOLVER.RIS.EMA", "1.0", r"SOLVER.RIS.EMA is 1.0; it lies in \[0, 1\)"),
        ("SOLVER.RIS.PATIENCE", "2", "counts evaluations; set TEST.EVAL_PERIOD"),
        ("SOLVER.RIS.ACCUMULATION", "0", "ACCUMULATION is 0; it must be at least 1"),
    ],
)
def test_numbers_are_checked_before_data_and_model(train_net, key, value, message):
    cfg = train_net.load_config("", ["DATASETS.TRAIN", ("ris_no_such_set",), key, value])
    with pytest.raises(ValueError, match=message):
        check_inputs(cfg)


@pytest.mark.parametrize(
    "options, warned",
    [
        ([], False),
        (["SOLVER.IMS_PER_BATCH", 4], True),
        (["SOLVER.IMS_PER_BATCH", 32], False),
        (["SOLVER.IMS_PER_BATCH", 4, "SOLVER.BASE_LR", 1e-5], False),
    ],
)
def test_smaller_batch_at_the_same_rate_warns(train_net, caplog, options, warned):
    recipe = train_net.load_config("", [])
    with caplog.at_level(logging.WARNING, "ris_d2"):
        train_net.warn_of_smaller_batch(recipe, train_net.load_config("", options))
    assert ("SOLVER.IMS_PER_BATCH is 4, the recipe's is 16" in caplog.text) == warned
    assert ("0.00025 if linear) and MAX_ITER (160000" in caplog.text) == warned


def test_smaller_batch_of_a_recipe_in_epochs_needs_no_other_length(train_net, caplog):
    recipe = train_net.load_config("", ["SOLVER.RIS.EPOCHS", "3"])
    cfg = train_net.load_config("", ["SOLVER.RIS.EPOCHS", "3", "SOLVER.IMS_PER_BATCH", "4"])
    with caplog.at_level(logging.WARNING, "ris_d2"):
        train_net.warn_of_smaller_batch(recipe, cfg)
    assert "if linear)." in caplog.text and "MAX_ITER" not in caplog.text


TINY = """
MODEL:
  META_ARCHITECTURE: SharedRIS
  WEIGHTS: ""
  RIS:
    NO_TARGET: head
    BEIT3: {EMBED_DIM: 16, DEPTH: 2, NUM_HEADS: 2, MLP_RATIO: 2, VOCAB_SIZE: 200}
  SHARED_RIS: {DIM: 16, NUM_HEADS: 2, STAGES: [1, 2]}
INPUT:
  RIS:
    UNIT: image
    SIZE: [64, 64]
    TOKENIZER: {KIND: hf, PATH: refshapes/tokenizer}
DATASETS: {TRAIN: [ris_grefshapes_train], TEST: [ris_grefshapes_val, ris_refshapes_val]}
DATALOADER: {NUM_WORKERS: 0}
SOLVER: {IMS_PER_BATCH: 4, MAX_ITER: 3, WARMUP_ITERS: 0, RIS: {ACCUMULATION: 2, SCHEDULE: cosine}}
TEST: {EVAL_PERIOD: 2}
SEED: 1
"""


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    """A config file of a tiny Shared-RIS on a few RefShapes scenes."""
    options = refshapes.Options(size=64, max_shapes=4)
    refshapes.write(str(tmp_path / "data/refshapes"), {"train": 6, "val": 3, "testA": 1}, options)
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path / "data"))
    return write(tmp_path / "tiny.yaml", TINY)


def test_trains_resumes_and_evaluates_with_the_same_numbers(train_net, tiny, tmp_path):
    def run(*arguments):
        arguments = ["--config-file", tiny, *arguments, "OUTPUT_DIR", str(tmp_path / "out")]
        return train_net.main(train_net.parse(arguments))

    results = tmp_path / "out/inference/ris_grefshapes_val/results.json"
    run()
    run("--resume", "SOLVER.MAX_ITER", "5")
    trained = results.read_text()
    results.unlink()
    resumed = run("--eval-only", "--resume")
    assert results.read_text() == trained
    results.unlink()
    given = run("--eval-only", "MODEL.WEIGHTS", str(tmp_path / "out/model_final.pth"))
    assert results.read_text() == trained
    assert list(resumed) == ["ris_grefshapes_val/referring", "ris_refshapes_val/referring"]
    for name, metrics in given.items():
        assert metrics == pytest.approx(resumed[name], nan_ok=True, abs=0)
    lines = (tmp_path / "out/metrics.json").read_text().splitlines()
    assert json.loads(lines[-1])["iteration"] == 5
    assert (tmp_path / "out/model_best.json").is_file()


def test_wrong_expected_results_fail_an_evaluation(train_net, tiny, tmp_path):
    wrong = "[['ris_refshapes_val/referring', 'gIoU', 101.0, 0.1]]"
    arguments = ["--config-file", tiny, "--eval-only", "OUTPUT_DIR", str(tmp_path / "out")]
    arguments += ["TEST.EXPECTED_RESULTS", wrong]
    with pytest.raises(SystemExit):
        train_net.main(train_net.parse(arguments))


def test_help(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["train_net.py", "--help"])
    with pytest.raises(SystemExit) as done:
        runpy.run_path(str(ROOT / "train_net.py"), run_name="__main__")
    assert done.value.code == 0
    assert "--eval-only" in capsys.readouterr().out
