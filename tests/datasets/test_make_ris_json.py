"""Own annotations and sentences, in the forms that COCO and LabelMe have, become checked sets."""

import base64
import csv
import importlib.util
import io
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ris_d2.data.ris_json import load_ris_json
from ris_d2.masks import rasterize

ROOT = Path(__file__).parents[2]
HEIGHT, WIDTH = 30, 40
SQUARE = [[5, 5], [15, 5], [15, 15], [5, 15]]
ROWS = [
    ("a.png", "the left cup", "10"),
    ("a.png", "the cup on the left", "10"),
    ("a.png", "both cups", "cup"),
    ("a.png", "the right cup", "cup#2"),
    ("a.png", "the plate; the left cup", "plate; 10"),
    ("a.png", "the dog", ""),
    ("b.png", "the plate", "plate"),
]


@pytest.fixture(scope="module")
def program():
    path = ROOT / "datasets/make_ris_json.py"
    spec = importlib.util.spec_from_file_location("make_ris_json", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def shape(label, points, kind="polygon", **fields):
    return {"label": label, "points": points, "shape_type": kind, "group_id": None, **fields}


def labelme(folder, name, shapes):
    content = {"version": "5.5.0", "flags": {}, "shapes": shapes, "imageData": None}
    content |= {"imagePath": f"{name}.png", "imageHeight": HEIGHT, "imageWidth": WIDTH}
    (folder / f"{name}.json").write_text(json.dumps(content))


@pytest.fixture
def own(tmp_path):
    """images/a.png and b.png with COCO's instances.json and sentences.csv."""
    (tmp_path / "images").mkdir()
    for name in "ab":
        picture = Image.fromarray(np.zeros((HEIGHT, WIDTH, 3), np.uint8))
        picture.save(tmp_path / "images" / f"{name}.png")
    size = {"height": HEIGHT, "width": WIDTH}
    flat = [v for point in SQUARE for v in point]
    things = [(10, 1, 1), (11, 1, 1), (12, 1, 2), (20, 2, 2)]
    coco = {
        "images": [{"id": i, "file_name": f"{'ab'[i - 1]}.png", **size} for i in (1, 2)],
        "annotations": [
            {"id": i, "image_id": image, "category_id": kind, "segmentation": [flat]}
            for i, image, kind in things
        ],
        "categories": [{"id": 1, "name": "cup"}, {"id": 2, "name": "plate"}],
    }
    (tmp_path / "instances.json").write_text(json.dumps(coco))
    return tmp_path


def write_rows(path, rows, delimiter=",", mark=""):
    with open(path, "w", newline="", encoding="utf-8") as file:
        file.write(mark)
        writer = csv.writer(file, delimiter=delimiter)
        writer.writerows([("image", "text", "targets"), *rows])


def make(program, own, *options, annotations="coco"):
    source = own / ("instances.json" if annotations == "coco" else "images")
    words = [f"--{annotations}", source, "--images", own / "images", "--output", own / "made"]
    if "--sentences" not in options:
        words += ["--sentences", own / "sentences.csv"]
    program.main([str(word) for word in (*words, *options)])
    return {
        path.stem: load_ris_json(path, str(own / "images"))
        for path in (own / "made").glob("*.json")
    }


@pytest.mark.parametrize("form", ["csv", "excel", "json"])
def test_sentences_find_what_they_name(program, own, form, capsys):
    if form == "json":
        path = own / "sentences.json"
        rows = [
            {"image": i, "text": t, "targets": [int(x) if x.isdigit() else x for x in targets]}
            for i, t, targets in ((i, t, t_.split("; ") if t_ else []) for i, t, t_ in ROWS)
        ]
        path.write_text(json.dumps(rows))
    else:
        path = own / "sentences.csv"
        excel = {"delimiter": ";", "mark": "\ufeff"} if form == "excel" else {}
        write_rows(path, ROWS, **excel)
    (records,) = make(program, own, "--val", "0", "--sentences", path).values()
    expressions = [e for record in records for e in record["expressions"]]
    assert [(e["text"], e["annotation_ids"]) for e in expressions] == [
        ("the left cup", [10]),
        ("the cup on the left", [10]),
        ("both cups", [10, 11]),
        ("the right cup", [11]),
        ("the plate; the left cup", [12, 10]),
        ("the dog", []),
        ("the plate", [20]),
    ]
    refs = [e["ref_id"] for e in expressions]
    assert refs[0] == refs[1] and len(set(refs)) == 6
    assert "2 images, 7 sentences (4 of one thing, 2 of several, 1 of nothing)" in (
        capsys.readouterr().out
    )


def test_images_are_divided_the_same_way_each_time(program, own):
    write_rows(own / "sentences.csv", ROWS)
    first = make(program, own)
    assert {len(first["train"]), len(first["val"])} == {1}
    assert first["train"][0]["file_name"] != first["val"][0]["file_name"]
    assert make(program, own) == first


def test_shapes_of_labelme_are_what_they_show(program, own):
    picture = Image.fromarray(np.eye(4, dtype=np.uint8) * 255).convert("1")
    data = io.BytesIO()
    picture.save(data, format="PNG")
    mask = base64.b64encode(data.getvalue()).decode()
    shapes = [
        shape("polygon", SQUARE),
        shape("box", [[15, 15], [5, 5]], "rectangle"),
        shape("disc", [[20, 15], [20, 25]], "circle"),
        shape("mask", [[2, 3], [5, 6]], "mask", mask=mask),
        shape("pair", [[2, 3], [5, 6]], "mask", mask=mask, group_id=1),
        shape("pair", SQUARE, group_id=1),
    ]
    labelme(own / "images", "a", shapes)
    rows = [("a.png", f"the {name}", name) for name in ("polygon", "box", "disc", "mask", "pair")]
    write_rows(own / "images" / "sentences.csv", rows)
    (own / "images" / "other.json").write_text("{}")
    ((record,),) = make(
        program,
        own,
        *("--val", "0", "--sentences", own / "images/sentences.csv"),
        annotations="labelme",
    ).values()
    drawn = [rasterize(a["segmentation"], HEIGHT, WIDTH) for a in record["annotations"]]
    square = np.zeros((HEIGHT, WIDTH), bool)
    square[5:15, 5:15] = True
    small = np.zeros_like(square)
    small[3:7, 2:6] = np.eye(4, dtype=bool)
    assert (drawn[0] == square).all() and (drawn[1] == square).all()
    assert drawn[2].sum() == pytest.approx(np.pi * 100, rel=0.02) and drawn[2][15, 20]
    assert (drawn[3] == small).all() and (drawn[4] == (square | small)).all()


@pytest.mark.parametrize(
    "row, message",
    [
        (("c.png", "the cup", "cup"), "sentences.csv: row 2: image 'c.png' is not in .*instances"),
        (
            ("a.png", "the fork", "fork"),
            "row 2: target 'fork' is not in the image, which has 10 \\(cup",
        ),
        (("a.png", "the fork", "cup#3"), "row 2: target 'cup#3' is not in the image"),
        (
            ("b.png", "a cup", "10"),
            "row 2: target '10' is not in the image, which has 20 \\(plate\\)",
        ),
        (("a.png", "?", ""), "train.json: .*has no letter or digit"),
    ],
)
def test_a_sentence_that_cannot_be_used_is_named_and_nothing_is_written(program, own, row, message):
    write_rows(own / "sentences.csv", [row])
    with pytest.raises(ValueError, match=message):
        make(program, own, "--val", "0")
    assert not list((own / "made").glob("*.json")) if (own / "made").exists() else True


def test_flaws_of_the_files_are_named(program, own):
    write_rows(own / "sentences.csv", [ROWS[0], ROWS[0]])
    with pytest.raises(
        ValueError, match="row 3: the sentence 'the left cup' of a.png was already in row 2"
    ):
        make(program, own)
    write_rows(own / "sentences.csv", [ROWS[0]])
    with pytest.raises(ValueError, match="one image is too few for train and val"):
        make(program, own)
    Image.new("RGB", (HEIGHT, WIDTH)).save(own / "images" / "a.png")
    with pytest.raises(ValueError, match="a.png is 30 x 40 pixels .* annotated as 40 x 30"):
        make(program, own, "--val", "0")
    (own / "sentences.csv").write_text("picture,text\na.png,the cup\n")
    with pytest.raises(
        ValueError, match="row 2: the fields are image, text and targets, not picture"
    ):
        make(program, own)
    with pytest.raises(FileNotFoundError, match="images: no file of LabelMe's"):
        make(program, own, annotations="labelme")


def test_a_mask_without_a_pixel_and_a_line_are_refused(program, own):
    labelme(own / "images", "a", [shape("cup", [[1, 1], [1.2, 1], [1.2, 1.2]])])
    write_rows(own / "sentences.csv", [("a.png", "the cup", "cup")])
    with pytest.raises(ValueError, match="annotation 1 of .*a.png encloses no pixel"):
        make(program, own, "--val", "0", annotations="labelme")
    labelme(own / "images", "a", [shape("cup", [[1, 1], [9, 9]], "line")])
    with pytest.raises(ValueError, match="a.json: shape 'cup' is a line, which has no area"):
        make(program, own, "--val", "0", annotations="labelme")
