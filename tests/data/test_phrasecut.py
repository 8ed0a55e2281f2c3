import pytest
from detectron2.structures import BoxMode

from ris_d2 import masks
from ris_d2.data.phrasecut import load_phrasecut
from ris_d2.data.records import Skipped


def load(files, **options):
    return load_phrasecut(*files.write_phrasecut(), "images", **options)


def test_one_annotation_per_instance(dataset_files):
    (record,) = load(dataset_files)
    assert record["file_name"] == "images/2.jpg"
    assert (record["image_id"], record["height"], record["width"]) == (2, 40, 60)
    assert record["expressions"] == [
        {"expression_id": 0, "ref_id": 0, "text": "striped cup", "annotation_ids": [1]},
        {"expression_id": 1, "ref_id": 1, "text": "two plates", "annotation_ids": [2, 3]},
    ]
    assert record["annotations"][0] == {
        "id": 1,
        "segmentation": [[10.0, 10.0, 20.0, 10.0, 20.0, 20.0, 10.0, 20.0]],
        "bbox": [10.0, 10.0, 10.0, 10.0],
        "bbox_mode": BoxMode.XYWH_ABS,
        "category_id": 0,
        "iscrowd": 0,
    }


def test_strokes_are_kept_and_enclose_nothing(dataset_files):
    _, second, third = load(dataset_files)[0]["annotations"]
    assert second["segmentation"][1] == [1.0, 1.0, 2.0, 2.0, 2.0, 2.0]
    assert len(third["segmentation"]) == 1  # a polygon without points is none
    triangle = masks.rasterize(second["segmentation"][:1], 40, 60)
    assert (masks.rasterize(second["segmentation"], 40, 60) == triangle).all()


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"phrase": None}, r"TypeError"),
        ({"image_id": 9}, r"image_id 9 is not in .*image_data_split\.json"),
        ({"image_id": "2"}, r"image_id 2 is not in"),
        ({"Polygons": []}, r"1 instance_boxes, but Polygons of 0"),
        ({"Polygons": [[[1, 2, 3, 4, 5, 6]]]}, r"TypeError"),
    ],
)
def test_damage_is_named_by_file_and_entry(dataset_files, changes, message):
    dataset_files.tasks[0].update(changes)
    with pytest.raises(ValueError, match=r"refer_val\.json: task 0 .*" + message):
        load(dataset_files)


@pytest.mark.parametrize(
    "changes, found",
    [
        ({"phrase": " "}, "blank sentences: 1"),
        ({"Polygons": [], "instance_boxes": []}, "phrases without a region: 1"),
        ({"Polygons": [[[]]]}, "annotations without a mask: 1; phrases without a region: 1"),
        (
            {"Polygons": [[[["1", "2"]]]]},
            "polygons or RLE that cannot be drawn: 1; phrases without a region: 1",
        ),
    ],
)
def test_flaws_are_skipped_and_counted(dataset_files, changes, found):
    dataset_files.tasks[0].update(changes)
    skipped = Skipped()
    (record,) = load(dataset_files, skipped=skipped)
    assert [e["text"] for e in record["expressions"]] == ["two plates"]
    assert str(skipped) == found
    assert skipped.expressions == [(2, 0, 1)]


@pytest.mark.parametrize("box", [[1, 2, 3], [1, 2, -3, 4], [1, 2, float("nan"), 4], "box"])
def test_a_box_that_is_none_is_that_of_the_mask(dataset_files, box):
    dataset_files.tasks[0]["instance_boxes"] = [box]
    skipped = Skipped()
    assert load(dataset_files, skipped=skipped)[0]["annotations"][0]["bbox"] == [10, 10, 10, 10]
    assert str(skipped) == "boxes that are none (the masks' are taken): 1"


@pytest.mark.parametrize("size", [{"height": -40}, {"width": 0}, {"width": 2**40}])
def test_sizes_that_no_image_has(dataset_files, size):
    dataset_files.phrasecut_images[1].update(size)
    with pytest.raises(ValueError, match=r"image_data_split\.json: image_id 2: .*positive sides"):
        load(dataset_files)


def test_an_empty_file_and_repeated_images(dataset_files):
    dataset_files.tasks = []
    with pytest.raises(ValueError, match="must hold a list of tasks"):
        load(dataset_files)
    dataset_files.phrasecut_images *= 2
    with pytest.raises(ValueError, match=r"image_data_split\.json: image: image_id 1 occurs twice"):
        load(dataset_files)
