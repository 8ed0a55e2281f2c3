"""docs/own_data.md, step by step as a reader does it, on generated pictures."""

import csv
import json
import re
import runpy
import shlex
import shutil
import sys
from pathlib import Path

import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from PIL import Image

from ris_d2 import load_config, refshapes
from ris_d2.data.ris_json import load_ris_json
from ris_d2.masks import rasterize
from ris_d2.predictor import Predictor

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs/own_data.md").read_text()


def blocks(language):
    fenced = re.findall(r"^```(\w*)\n(.*?)^```", PAGE, re.S | re.M)
    return [text for written_in, text in fenced if written_in == language]


MAKE_COCO, MAKE_LABELME, TRAIN, EVALUATE, ERRORS = (
    shlex.split(block.replace("\\\n", " ")) for block in blocks("")
)


@pytest.fixture
def run(monkeypatch):
    def run(command, *more):
        monkeypatch.setattr(sys, "argv", [*command[1:], *more])
        return runpy.run_path(command[1], run_name="__main__")

    return run


@pytest.fixture
def kitchen(tmp_path, monkeypatch):
    """A checkout, and in it kitchen/ with images, COCO's and LabelMe's files, and sentences."""
    for name in ("configs", "datasets", "ris_d2", "tools", "train_net.py"):
        (tmp_path / name).symlink_to(ROOT / name)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    folder = tmp_path / "kitchen"
    (folder / "images").mkdir(parents=True)
    options = refshapes.Options()
    scenes = refshapes.generate("train", 8, options)
    coco = {"images": [], "annotations": [], "categories": []}
    names = sorted({shape.kind for scene in scenes for shape in scene.shapes})
    coco["categories"] = [{"id": i, "name": name} for i, name in enumerate(names)]
    rows = [("image", "text", "targets")]
    for number, scene in enumerate(scenes):
        name, size = f"IMG_{number:04d}.png", {"height": scene.side, "width": scene.side}
        Image.fromarray(refshapes.render(scene, options)).save(folder / "images" / name)
        coco["images"].append({"id": number, "file_name": name, **size})
        shapes, targets = [], []
        for shape in scene.shapes:
            outline = refshapes.polygon(shape)
            coco["annotations"].append(
                {
                    "id": 100 * number + len(shapes),
                    "image_id": number,
                    "category_id": names.index(shape.kind),
                    "segmentation": [outline],
                }
            )
            points = [outline[i : i + 2] for i in range(0, len(outline), 2)]
            shapes.append({"label": shape.kind, "points": points, "shape_type": "polygon"})
            kinds = [other["label"] for other in shapes]
            targets.append(f"{shape.kind}#{kinds.count(shape.kind)}")
        content = {"imagePath": name, "shapes": shapes}
        content |= {"imageHeight": scene.side, "imageWidth": scene.side}
        (folder / "images" / name).with_suffix(".json").write_text(json.dumps(content))
        rows += [(name, e.text, ";".join(targets[t] for t in e.targets)) for e in scene.expressions]
    (folder / "instances.json").write_text(json.dumps(coco))
    with open(folder / "sentences.csv", "w", newline="") as file:
        csv.writer(file).writerows(rows)
    (tmp_path / "kitchen.yaml").write_text(blocks("yaml")[0])
    yield folder
    for name in ("kitchen_train", "kitchen_val"):
        if name in DatasetCatalog:
            DatasetCatalog.remove(name)
            MetadataCatalog.remove(name)


def sentences(folder, name):
    """Text -> the drawn masks that it names, of each sentence of one json."""
    return [
        (
            e["text"],
            [
                rasterize(a["segmentation"], record["height"], record["width"]).tolist()
                for a in record["annotations"]
                if a["id"] in e["annotation_ids"]
            ],
        )
        for record in load_ris_json(folder / name, folder / "images")
        for e in record["expressions"]
    ]


def test_the_table_of_the_page_is_read_as_it_says(tmp_path, kitchen):
    program = runpy.run_path("datasets/make_ris_json.py")
    (tmp_path / "table.csv").write_text(blocks("csv")[0])
    things = [(1, "cup"), (2, "cup"), (3, "kettle")]
    found = [
        [i for target in targets for i in program["find_targets"](target, things)]
        for _, _, _, targets in program["read_sentences"](str(tmp_path / "table.csv"))
    ]
    assert found == [[2], [1, 2], [3, 1], []]


def test_pictures_and_sentences_become_a_model_that_others_load(
    run, kitchen, tmp_path, monkeypatch, capfd
):
    run(MAKE_COCO)
    assert "kitchen/train.json: 6 images" in capfd.readouterr().out
    made = {name: sentences(kitchen, name) for name in ("train.json", "val.json")}
    run(MAKE_LABELME)
    assert {name: sentences(kitchen, name) for name in made} == made
    assert all(any(not masks for _, masks in part) for part in made.values())

    short = ["SOLVER.MAX_ITER", "3", "TEST.EVAL_PERIOD", "2"]
    run(TRAIN, *short, "MODEL.DEVICE", "cpu", "DATALOADER.NUM_WORKERS", "0")
    output = tmp_path / "output/kitchen"
    trained = torch.load(output / "model_final.pth", weights_only=True)
    assert trained["trainer"]["hooks"]["WeightAverage"]
    capfd.readouterr()
    run(EVALUATE, "MODEL.DEVICE", "cpu")
    assert "N_acc" in capfd.readouterr().out
    results = json.loads((output / "inference/kitchen_val/results.json").read_text())["referring"]
    best = json.loads((output / "model_best.json").read_text())
    assert results["gIoU"] == pytest.approx(best["value"], abs=1e-3)
    run(ERRORS)
    assert Image.open(output / "errors.png").height > 300

    ship, load = blocks("python")
    exec(ship, {})
    picture = kitchen / "images" / "IMG_0006.png"
    tuned = Predictor(
        load_config("kitchen.yaml", ["MODEL.WEIGHTS", str(output / "model_best.pth")])
    )
    (tmp_path / "elsewhere/output").mkdir(parents=True)
    shutil.move(tmp_path / "output/kitchen_model", tmp_path / "elsewhere/output/kitchen_model")
    shutil.rmtree(output)
    monkeypatch.chdir(tmp_path / "elsewhere")
    shutil.copy(picture, "picture.jpg")
    theirs = {}
    exec(load, theirs)
    asked = ["the circles", "the red square"]
    for mine, other in zip(tuned(picture, asked), theirs["predictor"](picture, asked)):
        assert mine["mask"].equal(other["mask"]) and mine["no_target"] == other["no_target"]
    assert theirs["result"]["mask"].shape == (96, 96)
