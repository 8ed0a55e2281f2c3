import logging
import runpy
import sys
from pathlib import Path

import pytest
from detectron2.data import DatasetCatalog

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def train_net():
    sys.path.insert(0, str(ROOT))
    import train_net

    yield train_net
    sys.path.remove(str(ROOT))


def write(path, text):
    path.write_text(text)
    return str(path)


def test_config_with_base_and_options(train_net, tmp_path):
    write(tmp_path / "base.yaml", "SOLVER: {IMS_PER_BATCH: 64, RIS: {SCHEDULE: cosine}}\n")
    leaf = write(tmp_path / "leaf.yaml", "_BASE_: base.yaml\nSOLVER: {IMS_PER_BATCH: 32}\n")
    cfg = train_net.load_config(leaf, ["SOLVER.BASE_LR", "0.5"])
    solver = cfg.SOLVER
    assert (solver.IMS_PER_BATCH, solver.RIS.SCHEDULE, solver.BASE_LR) == (32, "cosine", 0.5)
    assert cfg.is_frozen()


@pytest.mark.parametrize(
    "text, message",
    [
        ("SOLVER: {RIS: {SHEDULE: poly}}\n", r"leaf.yaml .*SOLVER\.RIS\.SHEDULE"),
        ("SOLVER: {IMS_PER_BATCH: many}\n", r"leaf.yaml .*SOLVER\.IMS_PER_BATCH"),
    ],
)
def test_wrong_key_or_value_in_yaml_names_key_and_file(train_net, tmp_path, text, message):
    with pytest.raises(ValueError, match=message):
        train_net.load_config(write(tmp_path / "leaf.yaml", text), [])


def test_wrong_key_in_the_base_is_found_too(train_net, tmp_path):
    write(tmp_path / "base.yaml", "MODEL: {RIS: {PRECISON: bf16}}\n")
    leaf = write(tmp_path / "leaf.yaml", "_BASE_: base.yaml\n")
    with pytest.raises(ValueError, match=r"leaf.yaml .*_BASE_.*MODEL\.RIS\.PRECISON"):
        train_net.load_config(leaf, [])


def test_wrong_option_on_the_command_line(train_net):
    with pytest.raises(ValueError, match="command line: .*SOLVER.BASELR"):
        train_net.load_config("", ["SOLVER.BASELR", "1"])


def test_unknown_dataset_lists_the_known(train_net):
    DatasetCatalog.register("ris_known_val", list)
    try:
        cfg = train_net.load_config("", ["DATASETS.TRAIN", (), "DATASETS.TEST", ("ris_knwon_val",)])
        with pytest.raises(ValueError, match="'ris_knwon_val'; did you mean ris_known_val.*known: "):
            train_net.check_datasets(cfg)
    finally:
        DatasetCatalog.remove("ris_known_val")


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


def test_help(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["train_net.py", "--help"])
    with pytest.raises(SystemExit) as done:
        runpy.run_path(str(ROOT / "train_net.py"), run_name="__main__")
    assert done.value.code == 0
    assert "--eval-only" in capsys.readouterr().out
