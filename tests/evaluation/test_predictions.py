import json
import pathlib
import runpy
import sys

import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog

from ris_d2.evaluation import ReferringEvaluator, score_predictions
from ris_d2.masks import encode

SIZE = (20, 30)


def box(x0, y0, x1, y1, size=SIZE):
    mask = np.zeros(size, bool)
    mask[y0:y1, x0:x1] = True
    return mask


def record(image_id, expressions, **more):
    return {
        "file_name": f"/somewhere/images/{image_id}.jpg",
        "image_id": image_id,
        "height": SIZE[0],
        "width": SIZE[1],
        "source": "test",
        "annotations": [
            {"id": 7, "segmentation": [[0, 0, 10, 0, 10, 10, 0, 10]]},
            {"id": 8, "segmentation": encode(box(20, 0, 30, 10))},
        ],
        "expressions": [
            {"expression_id": k, "ref_id": k, "text": "one", "annotation_ids": ids}
            for k, ids in expressions.items()
        ],
        **more,
    }


@pytest.fixture
def dataset():
    """Registers records for one test; returns the function that does it."""
    name = "test_score_predictions"

    def register(*records):
        DatasetCatalog.register(name, lambda: list(records))
        return name

    yield register
    DatasetCatalog.remove(name)


def write(tmp_path, *lines):
    path = tmp_path / "masks.jsonl"
    path.write_text("\n".join(json.dumps(line) for line in lines) + "\n")
    return path


def line(expression_id, mask, **more):
    return {"expression_id": expression_id, "segmentation": encode(mask), **more}


def test_scores_each_mask_as_given_in_any_order(dataset, tmp_path):
    """Expression 1: 50/100; 2 (no target, said so, with a mask): 1; 3: denied with a full mask.

    gIoU = (0.5 + 1 + 0)/3 = 50 %, cIoU = 50/(100 + 100), oIoU = 150/200.
    """
    name = dataset(record(1, {1: [7], 2: []}), record(2, {3: [8]}))
    path = write(
        tmp_path,
        line(3, box(20, 0, 30, 10), no_target=True, score=0.1),
        line(2, box(0, 0, 30, 1), no_target=True),
        line(1, box(0, 0, 5, 10)),
    )
    metrics = score_predictions(name, path, output_dir=str(tmp_path / "out"))["referring"]
    assert metrics["gIoU"] == 50
    assert metrics["cIoU"] == 25
    assert metrics["oIoU"] == 75
    lines = [json.loads(text) for text in (tmp_path / "out/per_expression.jsonl").open()]
    assert [value["score"] for value in lines] == [None, None, 0.1]


def test_an_uncompressed_rle_and_blank_lines_are_read(dataset, tmp_path):
    counts = [0, 600]  # everything, column by column
    segmentation = {"size": list(SIZE), "counts": counts}
    path = write(tmp_path, {"expression_id": 1, "segmentation": segmentation})
    path.write_text("\n" + path.read_text() + "\n\n")
    metrics = score_predictions(dataset(record(1, {1: [7]})), path)["referring"]
    assert (metrics["cIoU_I"], metrics["cIoU_U"]) == (100, 600)


def test_reads_what_the_evaluator_saves(dataset, tmp_path):
    records = [record(1, {1: [7], 2: []}), record(2, {3: [8]})]
    rng = np.random.default_rng(0)
    evaluator = ReferringEvaluator("saved", output_dir=str(tmp_path), save_predictions=True)
    for unit in records:
        results = [
            {
                "expression_id": expression["expression_id"],
                "mask": torch.from_numpy(rng.random(SIZE) < 0.3),
                "score": rng.random(),
                "no_target": bool(rng.random() < 0.5),
            }
            for expression in unit["expressions"]
        ]
        evaluator.process([unit], [{"referring": results}])
    expected = evaluator.evaluate()["referring"]
    again = score_predictions(dataset(*records), tmp_path / "predictions.jsonl")["referring"]
    np.testing.assert_equal(again, expected)  # nan equals nan


def test_at_a_fixed_resolution(dataset, tmp_path):
    path = write(tmp_path, line(1, box(0, 0, 30, 20, (40, 90))))
    name = dataset(record(1, {1: [7]}))
    metrics = score_predictions(name, path, resolution=(40, 90), output_dir=str(tmp_path))
    assert metrics["referring"]["cIoU"] == 100
    assert json.loads((tmp_path / "results.json").read_text())["resolution"] == [40, 90]


@pytest.mark.parametrize("sample", ["corner", "center"])
def test_a_file_of_the_resized_protocol_scores_as_the_evaluator_does(dataset, tmp_path, sample):
    """The 480 x 480 protocols in small; the two samples of the ground truth are not the same."""
    size, other = (7, 11), {"corner": "center", "center": "corner"}[sample]
    unit = record(1, {1: [7], 2: [8], 3: []})
    rng = np.random.default_rng(0)
    results = [
        {
            "expression_id": expression["expression_id"],
            "mask": torch.from_numpy(rng.random(size) < 0.5),
            "score": 0.5,
            "no_target": False,
        }
        for expression in unit["expressions"]
    ]
    evaluator = ReferringEvaluator(
        "saved", output_dir=str(tmp_path), save_predictions=True, sample=sample
    )
    resized = {**unit, "height": size[0], "width": size[1], "original_size": SIZE}
    evaluator.process([resized], [{"referring": results}])
    expected = evaluator.evaluate()["referring"]
    name, path = dataset(unit), tmp_path / "predictions.jsonl"
    scored = score_predictions(name, path, resolution=size, sample=sample)["referring"]
    np.testing.assert_equal(scored, expected)
    differs = score_predictions(name, path, resolution=size, sample=other)["referring"]
    assert differs["oIoU"] != expected["oIoU"]


def test_a_huge_resolution_is_refused(dataset, tmp_path):
    with pytest.raises(ValueError, match="at most 89,478,485 pixels, not 100000 x 100000"):
        score_predictions(dataset(record(1, {1: [7]})), write(tmp_path), resolution=(10**5, 10**5))


def test_an_expression_id_of_several_images_needs_the_image(dataset, tmp_path):
    name = dataset(record(1, {1: [7]}), record(2, {1: [8]}))
    left, right = box(0, 0, 10, 10), box(20, 0, 30, 10)
    path = write(tmp_path, line(1, right, image_id=2), line(1, left, file_name="images/1.jpg"))
    assert score_predictions(name, path)["referring"]["gIoU"] == 100
    path = write(tmp_path, line(1, right))
    with pytest.raises(ValueError, match="masks.jsonl: line 1: expression 1 is in 2 images"):
        score_predictions(name, path)


@pytest.mark.parametrize(
    "second, message",
    [
        ("{", "line 2: not valid JSON"),
        ("[]", "line 2: expected an object with expression_id and segmentation"),
        ('{"expression_id": 2}', "line 2: expected an object with expression_id"),
        (
            '{"expression_id": 2, "segmentation": [[0, 0, 5, 0, 5, 5]]}',
            r"line 2: segmentation must be dict, not \[\[0, 0, 5",
        ),
        (
            json.dumps(line(2, box(0, 0, 1, 1), no_target="false")),
            "line 2: no_target must be bool, not 'false'",
        ),
        (
            json.dumps(line(2, box(0, 0, 1, 1), score="0.5")),
            "line 2: score must be int or float or null, not '0.5'",
        ),
        (json.dumps(line(2, box(0, 0, 1, 1), score=10**400)), "line 2: .*too large"),
        (json.dumps(line(True, box(0, 0, 1, 1))), "line 2: expression_id must be int, not True"),
        (json.dumps(line(2, box(0, 0, 1, 1), file_name=3)), "line 2: file_name must be str, not 3"),
        ("[" * 100_000, "line 2: its content is nested too deeply"),
        ('{"expression_id": ' + "1" * 5000 + "}", "masks.jsonl: line 2: .*4300 digits"),
        (
            '{"expression_id": 2, "segmentation": {"size": [20, 30], "counts": '
            "[4611686018427387904, 4611686018427387904, 4611686018427387904, "
            "4611686018427387904, 600]}}",
            "line 2: the RLE's runs must be",
        ),
        (json.dumps(line(3, box(0, 0, 1, 1))), "line 2: expression 3 is not in the dataset"),
        (
            json.dumps(line(2, box(0, 0, 1, 1), image_id=9)),
            "line 2: expression 2 is not in the dataset, or not in the image",
        ),
        (json.dumps(line(1, box(0, 0, 1, 1))), "line 2: expression 1 was already in line 1"),
        (
            json.dumps(line(2, box(0, 0, 1, 1, (30, 20)))),
            r"line 2: the RLE is of size \[30, 20\]",
        ),
        ("", r"masks.jsonl: .*images/1.jpg \(id 1\): expression 2 has no result"),
    ],
)
def test_bad_files_are_named(dataset, tmp_path, second, message):
    name = dataset(record(1, {1: [7], 2: [8]}))
    path = write(tmp_path, line(1, box(0, 0, 1, 1)))
    path.write_text(path.read_text() + second + "\n")
    with pytest.raises(ValueError, match=message):
        score_predictions(name, path)


def test_unknown_dataset_and_file(dataset, tmp_path):
    with pytest.raises(KeyError, match="no_such_set"):
        score_predictions("no_such_set", write(tmp_path))
    with pytest.raises(FileNotFoundError, match="no_such_file"):
        score_predictions(dataset(record(1, {1: [7]})), tmp_path / "no_such_file.jsonl")


def test_command_line(dataset, tmp_path, monkeypatch, capsys):
    name = dataset(record(1, {1: [7]}))
    path = write(tmp_path, line(1, box(0, 0, 5, 10)))
    tool = pathlib.Path(__file__).parents[2] / "tools/score_predictions.py"
    arguments = ["--dataset", name, "--predictions", str(path), "--output", str(tmp_path)]
    arguments += ["--sample", "center"]
    monkeypatch.setattr(sys, "argv", [str(tool), *arguments])
    runpy.run_path(str(tool), run_name="__main__")
    assert "50.00" in capsys.readouterr().out
    assert json.loads((tmp_path / "results.json").read_text())["referring"]["cIoU"] == 50
