"""Thresholds from one pass: what the sweep says is what an evaluation with them measures."""

import json
import math
from pathlib import Path

import pytest
import torch

from ris_d2 import load_config
from ris_d2.checkpoint import RISCheckpointer
from ris_d2.engine import Trainer
from ris_d2.modeling.segmenter import ReferringSegmenter
from ris_d2.refshapes import write

CONFIGS = Path(__file__).parents[2] / "configs"
DATASET = "ris_grefshapes_val"
# Several parts of an image's sentences; masks at another size than the image's.
OPTIONS = ["TEST.MAX_EXPRESSIONS", "3", "TEST.RESOLUTION", "(40, 48)", "MODEL.DEVICE", "cpu"]
OPTIONS += ["DATALOADER.NUM_WORKERS", "0", "DATASETS.TEST", f"('{DATASET}',)"]


@pytest.fixture(scope="module")
def calibrate(load_tool):
    return load_tool("calibrate")


@pytest.fixture
def data(tmp_path, monkeypatch):
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    write(str(tmp_path / "refshapes"), {"train": 1, "val": 3})


def weights_of(config_file, options, folder):
    torch.manual_seed(0)
    model = Trainer.build_model(load_config(config_file, options))
    with torch.no_grad():  # scores and masks that thresholds tell apart
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(2)
    RISCheckpointer(model, str(folder)).save("weights")
    return str(folder / "weights.pth")


def evaluate(config_file, weights, options):
    cfg = load_config(config_file, [*options, "MODEL.WEIGHTS", weights])
    model = Trainer.build_model(cfg)
    RISCheckpointer(model, cfg.OUTPUT_DIR).load(weights)
    return Trainer.test(cfg, model)["referring"]


def same(line, metrics):
    """Whether a line of sweep.json has exactly these metrics, but for those of instances."""
    known = {key: value for key, value in line.items() if key in metrics}
    assert len(known) >= 20
    return known == {
        key: None if isinstance(metrics[key], float) and math.isnan(metrics[key]) else metrics[key]
        for key in known
    }


@pytest.mark.parametrize(
    "method, changes, decision_key",
    [
        ("deris", [], "MODEL.DERIS.SCORE_THRESHOLD"),
        ("deris", ["MODEL.RIS.NO_TARGET", "none"], "MODEL.DERIS.SCORE_THRESHOLD"),
        ("shared_ris", [], "MODEL.RIS.EXISTENCE_THRESHOLD"),
        ("shared_ris", ["MODEL.RIS.NO_TARGET", "area"], None),
    ],
)
def test_the_sweep_says_what_an_evaluation_measures(
    calibrate, data, tmp_path, monkeypatch, method, changes, decision_key
):
    config_file = str(CONFIGS / f"instant_test/{method}.yaml")
    options = [*OPTIONS, *changes]
    weights = weights_of(config_file, options, tmp_path)
    segmented = []
    restored = ReferringSegmenter._results

    def counting(self, outputs, owners):
        segmented.append(len(owners))
        return restored(self, outputs, owners)

    monkeypatch.setattr(ReferringSegmenter, "_results", counting)
    words = ["--config-file", config_file, "--weights", weights, "--metric", "gIoU"]
    calibrate.main([*words, "--output", "out", *options])
    sweep = json.loads(Path("out/sweep.json").read_text())
    table = sweep["table"]
    assert sum(segmented) == table[0]["num_expressions"], "the model ran more than once"
    assert Path("out/curves.png").stat().st_size > 5000

    calibrated = evaluate("out/calibrated.yaml", weights, options)
    assert calibrated["gIoU"] == max(line["gIoU"] for line in table)
    values = list(sweep["keys"].values())
    assert list(sweep["keys"]) == [key for key in (decision_key, "MODEL.RIS.MASK_THRESHOLD") if key]
    decision = values[0] if decision_key else 0.0
    (chosen,) = (x for x in table if [x["decision"], x["mask_threshold"]] == [decision, values[-1]])
    assert same(chosen, calibrated)

    # Other pairs, where the answers differ.
    others = {line["gIoU"]: line for line in table}
    assert len(others) > 3
    for line in list(others.values())[:: len(others) // 2][:2]:
        pair = ["MODEL.RIS.MASK_THRESHOLD", str(line["mask_threshold"])]
        pair += [decision_key, str(line["decision"])] if decision_key else []
        assert same(line, evaluate(config_file, weights, [*options, *pair]))


@pytest.mark.parametrize(
    "name", ["ris_refcoco_unc_testA", "ris_grefcoco_unc_testB", "ris_refcocog_umd_test"]
)
def test_test_splits_are_refused(calibrate, tiny_config, name):
    words = ["--config-file", tiny_config, "--output", "x", "--dataset", name]
    with pytest.raises(ValueError, match=f"{name} is a test split.*val split"):
        calibrate.main(words)
    calibrate.check_split("ris_refcoco_unc_val")


def test_a_row_of_a_paper_is_written_whole(calibrate, tiny_config, tmp_path):
    table = tmp_path / "paper.yaml"
    table.write_text("base: tiny.yaml\nrows: {ours: {set: {SOLVER.BASE_LR: 0.5}}}\n")
    words = ["--config-file", f"{table}:ours", "--output", str(tmp_path)]
    args = calibrate.parse(words)
    text = calibrate.configuration(args, calibrate.load(args), {"MODEL.RIS.MASK_THRESHOLD": 0.35})
    (tmp_path / "calibrated.yaml").write_text(text)
    cfg = load_config(str(tmp_path / "calibrated.yaml"))
    assert (cfg.MODEL.RIS.MASK_THRESHOLD, cfg.SOLVER.BASE_LR) == (0.35, 0.5)
    assert cfg.MODEL.META_ARCHITECTURE == "SharedRIS"
