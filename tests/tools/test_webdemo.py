"""tools/webdemo.py: what a visitor sees says what the predictor says, and an image is encoded once."""

import json
import socket
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco_mask

from ris_d2 import Predictor, example
from ris_d2.predictor import load_rgb

TEXT = "\n".join(example.SENTENCES)


@pytest.fixture(scope="module")
def tool(load_tool):
    return load_tool("webdemo")


@pytest.fixture(scope="module")
def predictor():
    return Predictor.from_pretrained("example")


def test_masks_and_legend_are_the_predictors(tool, predictor):
    shown, painted, said = tool.show(predictor, None, example.SCENE, f" {TEXT}\n\n")
    expected = predictor(example.SCENE, list(example.SENTENCES))
    assert all((a["mask"] == b["mask"]).all() for a, b in zip(shown.results, expected, strict=True))
    assert painted.shape == (640, 640, 3)  # the scene has 96 pixels
    for result in expected[:2]:
        assert f"<b>{result['text']}</b> (score {result['score']:.2f}" in said
    assert said.count("nothing in this picture matches") == 1
    assert f"nothing in this picture matches: <b>{example.SENTENCES[2]}</b>" in said


def test_a_picture_is_encoded_once_and_another_one_again(tool, predictor, monkeypatch, tmp_path):
    encoded, encode = [], predictor.model.encode
    monkeypatch.setattr(predictor.model, "encode", lambda x: encoded.append(1) or encode(x))
    shown, first, _ = tool.show(predictor, None, example.SCENE, "the circles")
    shown, second, said = tool.show(predictor, shown, example.SCENE, "the green triangle")
    assert len(encoded) == 1 and (first != second).any()
    assert "nothing in this picture matches: <b>the green triangle</b>" in said
    Image.fromarray(load_rgb(example.SCENE)[:, ::-1]).save(tmp_path / "other.png")
    shown, _, _ = tool.show(predictor, shown, str(tmp_path / "other.png"), "the circles")
    assert len(encoded) == 2 and shown.path.endswith("other.png")


def test_thresholds_count(tool, predictor):
    values = list(predictor.model.thresholds.values())
    at = list(predictor.model.thresholds).index("mask_threshold")
    shown, usual, _ = tool.show(predictor, None, example.SCENE, "the circles", *values)
    _, high, said = tool.show(
        predictor, shown, example.SCENE, "the circles", *values[:at], 1.0, *values[at + 1 :]
    )
    assert (usual != high).any() and "no pixel reaches the mask threshold" in said


def test_words_that_are_unknown_and_sentences_that_are_long_are_named(tool, predictor):
    long = "the circle " * 40
    _, _, said = tool.show(predictor, None, example.SCENE, f"the zebra\nthe circles\n{long}")
    first, second, third = said.split("<p>")[1:]
    assert "does not know &#x27;zebra&#x27;" in first
    assert "know" not in second and "long" not in second
    assert "too long: " in third and "of 80 tokens are read" in third


def test_text_is_shown_and_never_run(tool, predictor):
    _, _, said = tool.show(predictor, None, example.SCENE, "<script>the circle</script>")
    assert "<script>" not in said and "&lt;script&gt;" in said


def test_nothing_asked_and_nothing_chosen(tool, predictor, tmp_path):
    assert tool.show(predictor, None, None, "the circles") == (None, None, "Choose a picture.")
    shown, painted, said = tool.show(predictor, None, example.SCENE, " \n")
    assert shown.results == [] and said == "Type a sentence." and painted is not None
    (tmp_path / "torn.png").write_bytes(Path(example.SCENE).read_bytes()[:99])
    shown, painted, said = tool.show(predictor, None, str(tmp_path / "torn.png"), "the circles")
    assert shown is None and painted is None and said.startswith("<p>torn.png: ")


def test_files_to_download(tool, predictor, tmp_path):
    shown, _, _ = tool.show(predictor, None, example.SCENE, TEXT)
    files = {Path(path).name: path for path in tool.save(shown, str(tmp_path))}
    assert list(files) == ["0_mask.png", "1_mask.png", "2_mask.png", "coco.json"]
    masks = [np.asarray(Image.open(files[f"{i}_mask.png"])) for i in range(3)]
    coco = json.loads(Path(files["coco.json"]).read_text())
    assert [a["text"] for a in coco["annotations"]] == list(example.SENTENCES[:2])
    for annotation, mask in zip(coco["annotations"], masks):
        assert (coco_mask.decode(annotation["segmentation"]) * 255 == mask).all() and mask.any()
    assert not masks[2].any()
    assert tool.save(shown, str(tmp_path)) != list(files.values())  # visitors do not share files


def test_examples_are_pictures_that_are_here(tool):
    found = tool.examples()
    assert found[0] == [example.SCENE, TEXT]
    photographs = [path for path, _ in found if path != example.SCENE]
    assert any(path.endswith("grace_hopper.jpg") for path in photographs)  # matplotlib is required
    assert all(min(load_rgb(path).shape[:2]) > 200 for path in photographs)


def test_the_small_vocabulary_is_listed(tool, predictor):
    text = tool.introduction(predictor, example.FOLDER)
    assert (
        text.startswith("# ris_d2: example\n")
        and "It knows 72 words" in text
        and "triangle" in text
        and "<unk>" not in text
    )
    assert "its masks are wrong" in text
    assert "its masks are wrong" not in tool.introduction(predictor, "my_model")


def test_a_missing_gradio_is_said_in_one_line_before_the_model_is_loaded(tool, monkeypatch):
    monkeypatch.setitem(sys.modules, "gradio", None)
    with pytest.raises(SystemExit, match=r"needs gradio \(pip install -e '\.\[web\]'\)"):
        tool.main(["--model", "no_such_model"])


def test_the_page_itself(tool, predictor, tmp_path):
    """Over HTTP, as a browser asks; everything above is tested without gradio."""
    pytest.importorskip("gradio", reason="the page itself needs pip install -e '.[web]'")
    from gradio_client import Client, handle_file

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    page = tool.build(predictor, example.FOLDER, str(tmp_path))
    _, url, _ = page.launch(server_name="127.0.0.1", server_port=port, **tool.LAUNCH)
    try:
        client = Client(url, verbose=False, analytics_enabled=False)
        scene, values = handle_file(example.SCENE), list(predictor.model.thresholds.values())
        painted, said, _ = client.predict(scene, "the circles", *values, api_name="/show")
        assert "<b>the circles</b> (score" in said and max(Image.open(painted).size) == 640
        _, said, _ = client.predict(scene, "the green triangle", *values, api_name="/show")
        assert "nothing in this picture matches: <b>the green triangle</b>" in said
        files = client.predict(api_name="/save")["value"]
        names = [Path(file).name for file in files]
        assert names == ["0_mask.png", "coco.json"]
        assert json.loads(Path(files[-1]).read_text())["annotations"] == []
    finally:
        page.close()
