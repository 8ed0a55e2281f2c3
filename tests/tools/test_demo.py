"""tools/demo.py: the files that it writes say what the predictor says."""

import json

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco_mask

from ris_d2 import example


@pytest.fixture
def photo(tmp_path):
    path = tmp_path / "photo.jpg"
    pixels = np.random.default_rng(0).integers(256, size=(40, 60, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return str(path)


def _run(load_tool, tiny_config, photo, output, threshold):
    load_tool("demo").main(
        ["--config-file", tiny_config, "--image", photo, "--output", str(output)]
        + ["--text", "the red circle", "--text", "blue squares"]
        + [
            "MODEL.RIS.EXISTENCE_THRESHOLD",
            threshold,
            "MODEL.RIS.MASK_THRESHOLD",
            "0.0",
            "--untrained",
        ]
    )
    return json.loads((output / "results.json").read_text())


def test_files_and_table(load_tool, tiny_config, photo, tmp_path, capsys):
    output = tmp_path / "new" / "out"
    report = _run(load_tool, tiny_config, photo, output, "0.0")
    assert (report["height"], report["width"]) == (40, 60)
    assert [r["text"] for r in report["results"]] == ["the red circle", "blue squares"]
    for result in report["results"]:
        assert result["no_target"] is False and 0 <= result["score"] <= 1
        mask = np.asarray(Image.open(output / result["files"]["mask"]))
        assert (coco_mask.decode(result["mask"]) * 255 == mask).all()
        assert result["area"] == np.count_nonzero(mask) == 2400  # every probability exceeds 0
        painted = np.asarray(Image.open(output / result["files"]["overlay"]))
        assert painted.shape == (40, 60, 3)
        assert (painted != np.asarray(Image.open(photo))).any()
    printed = capsys.readouterr().out
    assert "the red circle" in printed and "100.0 %" in printed and str(output) in printed


def test_no_target_is_said_and_leaves_the_picture_alone(
    load_tool, tiny_config, photo, tmp_path, capsys
):
    report = _run(load_tool, tiny_config, photo, tmp_path / "out", "1.0")
    for result in report["results"]:
        assert result["no_target"] is True and result["area"] == 0
        painted = np.asarray(Image.open(tmp_path / "out" / result["files"]["overlay"]))
        assert (painted == np.asarray(Image.open(photo))).all()
    assert capsys.readouterr().out.count("nothing") == 2


def test_text_is_needed(load_tool, tiny_config, photo, tmp_path, capsys):
    with pytest.raises(SystemExit):
        load_tool("demo").main(
            ["--config-file", tiny_config, "--image", photo, "--output", str(tmp_path / "out")]
        )
    assert "--text" in capsys.readouterr().err


def test_demo_without_arguments_draws_it(load_tool, tmp_path, capsys):
    load_tool("demo").main(["--output", str(tmp_path)])
    report = json.loads((tmp_path / "results.json").read_text())
    assert [result["text"] for result in report["results"]] == list(example.SENTENCES)
    assert (tmp_path / "0_overlay.png").exists() and "nothing" in capsys.readouterr().out
