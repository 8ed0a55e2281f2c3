"""Published beside measured: a stand-in of a paper whose numbers are known."""

import json

import pytest
import torch
import yaml

from ris_d2 import load_config
from ris_d2.checkpoint import RISCheckpointer
from ris_d2.engine import Trainer
from ris_d2.refshapes import write

DATASETS = ("ris_grefshapes_val", "ris_refshapes_testA")


@pytest.fixture(scope="module")
def reproduce(load_tool):
    return load_tool("reproduce")


@pytest.fixture
def paper(tiny_config, tmp_path, monkeypatch):
    """(table, weights, what the stand-in's model measures under the row's protocol)."""
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    write(str(tmp_path / "refshapes"), {"train": 1, "val": 4, "testA": 3})
    torch.manual_seed(0)
    changes = ["TEST.RESOLUTION", "(48, 40)", "DATALOADER.NUM_WORKERS", "0"]
    cfg = load_config(tiny_config, [*changes, "DATASETS.TEST", str(DATASETS)])
    model = Trainer.build_model(cfg)
    RISCheckpointer(model, str(tmp_path)).save("weights")
    known = Trainer.test(cfg, model)
    row = {
        "paper": "Table 1",
        "set": {"TEST.RESOLUTION": [48, 40], "DATALOADER.NUM_WORKERS": 0},
        "published": {
            name: {
                metric: round(known[f"{name}/referring"][metric], 2) for metric in ("gIoU", "oIoU")
            }
            for name in DATASETS
        },
    }
    table = tmp_path / "paper.yaml"
    table.write_text(yaml.safe_dump({"base": "tiny.yaml", "rows": {"ours": row, "bare": {}}}))
    return table, str(tmp_path / "weights.pth"), row["published"]


def test_known_numbers_are_reproduced(reproduce, paper, tmp_path, capsys):
    table, weights, published = paper
    assert any(number > 0 for numbers in published.values() for number in numbers.values())
    reproduce.main([f"{table}:ours", "--weights", weights, "--tolerance", "0.006"])
    page = (tmp_path / "output/reproduce/paper/ours/reproduction.md").read_text()
    assert page in capsys.readouterr().out
    assert "4 of 4 numbers are within 0.006 of the published ones (Table 1)." in page
    assert "masks at 48 x 40" in page and "| off" not in page
    for dataset, numbers in published.items():
        for metric, number in numbers.items():
            assert f"| {dataset}" in page and f"| {number:.2f}" in page, metric


def test_a_number_beyond_the_tolerance_fails(reproduce, paper, tmp_path, capsys):
    table, weights, published = paper
    content = yaml.safe_load(table.read_text())
    numbers = content["rows"]["ours"]["published"][DATASETS[1]]
    numbers["oIoU"] = round(numbers["oIoU"] + 0.5, 2)
    table.write_text(yaml.safe_dump(content))
    words = [f"{table}:ours", "--weights", weights, "OUTPUT_DIR", str(tmp_path / "out")]
    with pytest.raises(SystemExit) as stop:
        reproduce.main(words)
    assert stop.value.code == 1
    said = capsys.readouterr().out
    assert "3 of 4 numbers are within 0.1" in said and "| -0.50" in said and "| off" in said
    reproduce.main([*words, "--tolerance", "0.51"])
    reproduce.main([*words, "--dataset", DATASETS[0]])
    assert "2 of 2 numbers" in capsys.readouterr().out


def test_data_and_weights_are_looked_for_first(reproduce, paper, tmp_path):
    table, weights, _ = paper
    for words, message in (
        ([f"{table}:ours", "--weights", "absent.pth"], "absent.pth: no such weight file"),
        ([f"{table}:bare", "--weights", weights], "nothing was published for this row"),
        (["tiny.yaml", "--weights", weights], "tiny.yaml is no row of a table"),
        ([f"{table}:ours", "--weights", weights, "--dataset", "x"], "no numbers of x, but of ris_"),
    ):
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            reproduce.main(words)
    (tmp_path / "refshapes/refcoco/instances.json").unlink()
    with pytest.raises(FileNotFoundError, match="ris_refshapes_testA: no such file: .*instances"):
        reproduce.main([f"{table}:ours", "--weights", weights])
    assert not (tmp_path / "output/reproduce").exists()


def test_seen_and_unseen_classes_have_numbers_of_their_own(reproduce):
    results = json.loads(
        '{"referring": {"mIoU": 1.0, "oIoU": null}, '
        '"breakdowns": {"source": {"refcocog seen": {"mIoU": 2.0}, "refcocog unseen": {"mIoU": 3.0}}}}'
    )
    found = [reproduce.measured(results, metric) for metric in ("mIoU", "mIoU/seen", "mIoU/unseen")]
    assert found == [1, 2, 3]
    published = {"d": {"oIoU": 5.0, "mIoU/none": 5.0, "mIoU": 0.9}}
    rows = reproduce.compare(published, {"d": results}, 0.1)
    assert [ok for *_, ok in rows] == [False, False, True]
