"""tools/selected_layers.py: counts of the layers that ASDA's sentences select."""

import json

import pytest
from PIL import Image

from ris_d2 import refshapes
from ris_d2.data.catalog import register_all


@pytest.fixture
def tool(load_tool):
    return load_tool("selected_layers")


def test_types_of_expressions(tool):
    assert [
        tool.expression_type(text)
        for text in ("Leftmost man", "red cup", "the big dog behind him", "upright bottle")
    ] == ["position", "attribute", "both", "neither"]


def test_counts_pictures_and_files(tool, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    register_all()
    refshapes.write(str(tmp_path / "refshapes"), {"train": 1, "val": 4}, refshapes.Options())
    output = tmp_path / "out"
    counts = tool.main(
        ["--config-file", "configs/instant_test/asda.yaml", "--output", str(output)]
        + ["--dataset", "ris_refshapes_val", "--dataset", "ris_grefshapes_val", "--images", "3"]
        + ["MODEL.DEVICE", "cpu"]
    )
    assert set(counts) == {"ris_refshapes_val", "ris_grefshapes_val"}
    for of_type in counts["ris_grefshapes_val"].values():
        assert of_type["low"].total() == of_type["mid"].total() == of_type["sentences"]
        assert set(of_type["low"]) <= {1, 2} and set(of_type["mid"]) <= {3, 4}
    assert sum(t["sentences"] for t in counts["ris_refshapes_val"].values()) >= 3
    written = json.loads((output / "selected_layers.json").read_text())
    assert written["ris_refshapes_val"].keys() == counts["ris_refshapes_val"].keys()
    assert Image.open(output / "selected_layers.png").width > 800
    assert "ris_grefshapes_val" in capsys.readouterr().out


def test_other_methods_are_refused(tool, tiny_config, tmp_path):
    with pytest.raises(ValueError, match="its model is no ASDA"):
        tool.main(["--config-file", tiny_config, "--dataset", "x", "--output", str(tmp_path)])
