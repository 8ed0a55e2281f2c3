import re
from pathlib import Path

import pytest

from ris_d2.data.ris_json import load_ris_json
from ris_d2.io import load_json


def load(files):
    return load_ris_json(files.json("custom.json", files.custom), "images")


def test_defaults(dataset_files):
    (record,) = load(dataset_files)
    assert record["source"] == "custom" and record["file_name"] == "images/a.jpg"
    assert [a["bbox"] for a in record["annotations"]] == [[10, 10, 10, 10], [0, 0, 1, 5]]
    assert [(a["category_id"], a["iscrowd"]) for a in record["annotations"]] == [(0, 0)] * 2
    assert [(e["ref_id"], e["annotation_ids"]) for e in record["expressions"]] == [
        (100, [10]),
        (7, [10, 11]),
        (102, []),
    ]


@pytest.mark.parametrize(
    "key, index, changes, message",
    [
        (
            "expressions",
            1,
            {"annotation_ids": [10, 12]},
            r"expression 1: there is no annotation with the id 12",
        ),
        (
            "expressions",
            1,
            {"annotation_ids": 10},
            r"expression 1: field 'annotation_ids' must be a list",
        ),
        (
            "expressions",
            1,
            {"annotation_ids": [[10]]},
            r"expression 1: field 'annotation_ids' must be",
        ),
        ("expressions", 0, {"text": ""}, r"expression 0: the text '' has no letter or digit"),
        ("expressions", 0, {"text": "?"}, r"expression 0: the text '\?' has no letter or digit"),
        ("expressions", 2, {"id": 100}, r"expression 2: the expression id 100 occurs twice"),
        ("expressions", 0, {"image_id": 3}, r"expression 0: there is no image with the id 3"),
        ("expressions", 0, {"text": "the \ud800"}, r"expression 0: .*surrogates"),
        ("expressions", 0, {"ref_id": "7"}, r"expression 0: field 'ref_id' must be an integer"),
        (
            "annotations",
            0,
            {"segmentation": [[1, 2, 3, 4], [10, 10, 20, 10, 20, 20]]},
            r"annotation 10: field 'segmentation': a polygon needs .* has 4 numbers",
        ),
        (
            "annotations",
            0,
            {"segmentation": [[1, 2, 3, 4, 5, 1e8]]},
            r"annotation 10: field 'segmentation': .*coordinates lie at most",
        ),
        ("annotations", 0, {"segmentation": []}, r"annotation 10: field 'segmentation': must be"),
        (
            "annotations",
            1,
            {"segmentation": {"size": [40, 60], "counts": [2**62] * 4 + [2400]}},
            r"annotation 11: field 'segmentation': the RLE's runs must be",
        ),
        ("annotations", 0, {"bbox": [1, 2, -3, 4]}, r"annotation 10: field 'bbox': must be four"),
        ("annotations", 0, {"id": 2**70}, r"expression 0: there is no annotation with the id 10"),
        ("expressions", 0, {"id": 2**70}, r"expression 0: .*more than 64 bits"),
        ("images", 0, {"height": "40"}, r"image 1: field 'height' must be an integer, not '40'"),
        ("images", 0, {"height": 10**9}, r"image 1: .*at most 89,478,485 pixels"),
    ],
)
def test_malformed_fields_are_named(dataset_files, key, index, changes, message):
    dataset_files.custom[key][index].update(changes)
    with pytest.raises(ValueError, match=r"custom\.json: " + message):
        load(dataset_files)


@pytest.mark.parametrize(
    "key, index, name, value, message",
    [
        (
            "images",
            1,
            "height",
            None,
            r"image 2: field 'height' is missing; there are \['file_name",
        ),
        ("annotations", 0, "iscrowd", "no", r"annotation 10: field 'iscrowd' must be an integer"),
        ("annotations", 0, "iscrowd", True, r"annotation 10: field 'iscrowd' .*, not True"),
        ("annotations", 1, "segmentation", 3, r"annotation 11: .* must be a list or an object"),
        ("expressions", 2, "text", 5, r"expression 2: field 'text' must be a text, not 5"),
        ("expressions", 1, "image_id", None, r"expression 1: field 'image_id' is missing"),
    ],
)
def test_every_entry_has_its_fields(dataset_files, key, index, name, value, message):
    """Also one that no expression names."""
    dataset_files.custom["images"].append({**dataset_files.custom["images"][0], "id": 2})
    entry = dataset_files.custom[key][index]
    entry[name] = value
    if value is None:
        del entry[name]
    with pytest.raises(ValueError, match=r"custom\.json: " + message):
        load(dataset_files)
    dataset_files.custom[key][index] = "entry"
    with pytest.raises(ValueError, match=rf"{key[:-1]} {index}: must be an object with fields"):
        load(dataset_files)


def test_expressions_are_required(dataset_files):
    dataset_files.custom["expressions"] = []
    with pytest.raises(ValueError, match="field 'expressions' is empty"):
        load(dataset_files)
    del dataset_files.custom["expressions"]
    with pytest.raises(ValueError, match="field 'expressions' is missing"):
        load(dataset_files)


def test_the_example_of_the_readme_is_valid(tmp_path):
    readme = Path(__file__).parents[2] / "datasets/README.md"
    path = tmp_path / "kitchen.json"
    path.write_text(re.search(r"```json\n(.*?)```", readme.read_text(), re.DOTALL).group(1))
    (record,) = load_ris_json(path, "kitchen/images")
    assert len(record["expressions"]) == len(load_json(path)["expressions"]) == 3
