"""tools/predict.py: what it writes is read back as it was predicted, whatever happened on the way."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import cv2
import numpy as np
import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from PIL import Image
from pycocotools.coco import COCO

from ris_d2 import example
from ris_d2.data import register_ris_json
from ris_d2.masks import rasterize
from ris_d2.predictor import Predictor, load_rgb

PROGRAM = Path(__file__).parents[2] / "tools" / "predict.py"
TEXTS = [
    "the big green circle that is below the little green circle",
    "the circles",
    "the red star",
]


@pytest.fixture
def program(load_tool, monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    return load_tool("predict").main


def pictures(folder, count):
    """Views of the example's scene, of odd sizes, some in a folder within."""
    scene = load_rgb(example.SCENE)
    for i in range(count):
        path = folder / ("deep" if i % 3 == 2 else ".") / f"{i:02d} é.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.roll(scene, 5 * i, axis=1)[: 60 + i]).save(path)
    return folder


def read(output):
    return json.loads((output / "predictions.json").read_text())


def words(images, output, texts=TEXTS):
    texts = [word for text in texts for word in ("--text", text)]
    return ["--images", str(images), "--output", str(output), *texts]


def test_pycocotools_and_register_ris_json_read_back_what_was_predicted(program, tmp_path, capsys):
    images, output = pictures(tmp_path / "in", 4), tmp_path / "out"
    program(words(images, output))
    predictor, coco = Predictor.from_pretrained("example"), COCO(output / "predictions.json")
    register_ris_json("predicted", str(output / "predictions.json"), str(images))
    try:
        records = DatasetCatalog.get("predicted")
    finally:
        DatasetCatalog.remove("predicted"), MetadataCatalog.remove("predicted")
    assert len(records) == 4 and sum(len(r["annotations"]) for r in records) == len(coco.anns) > 6
    for record in records:
        results = predictor(record["file_name"], TEXTS)
        masks = {
            a["id"]: rasterize(a["segmentation"], record["height"], record["width"])
            for a in record["annotations"]
        }
        for expression, result in zip(record["expressions"], results, strict=True):
            assert expression["text"] == result["text"]
            ids = expression["annotation_ids"]
            assert len(ids) == bool(result["box"])
            for i in ids:
                assert (masks[i] == result["mask"].numpy()).all()
                assert (coco.annToMask(coco.anns[i]) == masks[i]).all()
                x0, y0, x1, y1 = result["box"]
                assert coco.anns[i]["bbox"] == [x0, y0, x1 - x0, y1 - y0]
                assert coco.anns[i]["score"] == pytest.approx(result["score"], abs=1e-5)
    overlays = sorted(path.name for path in (output / "overlays").iterdir())
    assert overlays[1] == "000001_01 é.png" and len(overlays) == 4
    assert Image.open(output / "contact_sheet.png").width > 448
    assert "4 images, 12 sentences" in capsys.readouterr().out


@pytest.mark.parametrize("kind", ["csv", "tsv", "json"])
def test_a_file_says_which_sentence_goes_with_which_image(program, tmp_path, kind):
    images = pictures(tmp_path / "in", 4)
    pairs = [("deep/02 é.png", 'the "big", red one'), ("00 é.png", "the circles")]
    pairs.append(("deep/02 é.png", "the green circle"))
    path = tmp_path / f"asked.{kind}"
    if kind == "json":
        path.write_text(json.dumps([{"image": i, "sentence": s} for i, s in pairs]))
    else:
        between, quote = {"csv": ",", "tsv": "\t"}[kind], '"the ""big"", red one"'
        rows = [("image", "sentence"), (pairs[0][0], quote), *pairs[1:]]
        path.write_text("\n".join(map(between.join, rows)), encoding="utf-8-sig")
    output = tmp_path / "out"
    program(["--images", str(images), "--output", str(output), "--sentences", str(path)])
    content = read(output)
    names = {image["id"]: image["file_name"] for image in content["images"]}
    answered = sorted((names[e["image_id"]], e["text"]) for e in content["expressions"])
    assert answered == sorted(pairs)


def test_a_corrupt_image_is_counted_and_named_and_tried_again(program, tmp_path, capsys):
    images, output = pictures(tmp_path / "in", 3), tmp_path / "out"
    whole = (images / "01 é.png").read_bytes()
    (images / "01 é.png").write_bytes(whole[:200])
    program(words(images, output))
    content, printed = read(output), capsys.readouterr().out
    assert "1 images could not be read" in printed and "01 é.png" in printed
    assert list(content["info"]["errors"]) == ["01 é.png"] and len(content["images"]) == 2
    (images / "01 é.png").write_bytes(whole)
    program(words(images, output))
    assert len(read(output)["images"]) == 3 and not read(output)["info"]["errors"]


def test_a_killed_run_goes_on_and_two_processes_make_the_same(program, tmp_path):
    images, output = pictures(tmp_path / "in", 30), tmp_path / "out"
    program(words(images, tmp_path / "one"))
    part = output / "parts" / "0.jsonl"
    command = [sys.executable, "-W", "ignore", str(PROGRAM), *words(images, output)]
    settings = {**os.environ, "PYTHONPATH": str(PROGRAM.parents[1]), "OMP_NUM_THREADS": "1"}
    killed = subprocess.Popen(command, env=settings, stderr=subprocess.PIPE)
    while not part.is_file() or part.read_bytes().count(b"\n") < 4:
        assert killed.poll() is None, killed.stderr.read().decode()
        time.sleep(0.005)
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    with open(part, "ab") as file:
        file.write(b'{"position": 29, "na')  # as a full disk, or a kill within a write, leaves it
    kept = part.read_bytes().split(b"\n")[:-1]
    assert 4 <= len(kept) < 30 and not (output / "predictions.json").exists()

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        settings |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    settings |= {"WORLD_SIZE": "2"}
    both = [
        subprocess.Popen(command, env={**settings, "RANK": rank}, stderr=subprocess.PIPE)
        for rank in "01"
    ]
    for process in both:
        _, errors = process.communicate(timeout=300)
        assert process.returncode == 0, errors.decode()
    lines = part.read_bytes().split(b"\n")[:-1]
    assert lines[: len(kept)] == kept and len(lines) > len(kept)
    other = (output / "parts" / "1.jsonl").read_bytes().count(b"\n")
    assert len(lines) + other == 30 and other > 5, "each took its share, and nothing twice"
    assert read(output) == read(tmp_path / "one")
    assert len(list((output / "overlays").iterdir())) == 30


def test_frames_of_a_video(program, tmp_path):
    scene = load_rgb(example.SCENE)
    path = str(tmp_path / "clip.avi")
    video = cv2.VideoWriter(path, cv2.VideoWriter_fourcc(*"MJPG"), 10, scene.shape[1::-1])
    for i in range(7):
        video.write(cv2.cvtColor(np.roll(scene, 3 * i, axis=1), cv2.COLOR_RGB2BGR))
    video.release()
    program([*words(path, tmp_path / "out", ["the circles"]), "--every", "3"])
    content = read(tmp_path / "out")
    names = [image["file_name"] for image in content["images"]]
    assert names == ["frame_000000.png", "frame_000003.png", "frame_000006.png"]
    frame = load_rgb(tmp_path / "out" / "frames" / names[1])
    expected = Predictor.from_pretrained("example")(frame, "the circles")[0]
    found = rasterize(content["annotations"][1]["segmentation"], *frame.shape[:2])
    assert (found == expected["mask"].numpy()).all()


def test_a_list_names_images_relative_to_itself(program, tmp_path):
    pictures(tmp_path / "in", 3)
    (tmp_path / "list.txt").write_text("in/01 é.png\n\nin/deep/02 é.png\n", encoding="utf-8")
    program(words(tmp_path / "list.txt", tmp_path / "out"))
    names = [image["file_name"] for image in read(tmp_path / "out")["images"]]
    assert names == ["in/01 é.png", "in/deep/02 é.png"]


@pytest.mark.parametrize(
    "change, message",
    [
        (["--images", "absent"], "--images absent: no such file or folder"),
        (["--images", "empty"], "empty: no .jpg, .jpeg, .png"),
        (["--images", "text.mp4"], "text.mp4: no frame can be read"),
        (["--sentences", "a.txt"], "a.txt: sentences come in"),
        (["--sentences", "unknown.json"], "unknown.json names b.png, which in does not hold"),
        (["--sentences", "bad.json"], "bad.json: entry 0 has no image and sentence"),
        (["--model", "absent"], "absent: no such model folder"),
    ],
)
def test_mistakes_are_said_in_one_line(program, tmp_path, monkeypatch, change, message):
    monkeypatch.chdir(tmp_path)
    pictures(tmp_path / "in", 1)
    (tmp_path / "empty").mkdir()
    for name, text in {
        "text.mp4": "no video",
        "a.txt": "the circle",
        "unknown.json": '[{"image": "b.png", "sentence": "a"}]',
        "bad.json": '[{"image": "b.png"}]',
    }.items():
        (tmp_path / name).write_text(text)
    asked = [] if "--sentences" in change else ["--text", "a"]
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        program(["--images", "in", "--output", "out", *asked, *change])
    assert not (tmp_path / "out" / "predictions.json").exists()


def test_the_output_of_another_run_is_left_alone(program, tmp_path):
    images = pictures(tmp_path / "in", 1)
    program(words(images, tmp_path / "out"))
    before = (tmp_path / "out" / "predictions.json").read_bytes()
    with pytest.raises(ValueError, match="holds a run with other sentences"):
        program(words(images, tmp_path / "out", ["the square"]))
    assert (tmp_path / "out" / "predictions.json").read_bytes() == before
