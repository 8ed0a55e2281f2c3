import pytest
from detectron2.structures import BoxMode

from ris_d2 import masks
from ris_d2.data.phrasecut import load_phrasecut


def load(files):
    return load_phrasecut(*files.write_phrasecut(), "images")


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
        ({"phrase": " "}, r"field 'phrase' is an empty expression"),
        ({"image_id": 9}, r"image_id 9 is not in .*image_data_split\.json"),
        ({"image_id": "2"}, r"field 'image_id' must be an integer, not '2'"),
        ({"Polygons": []}, r"have 1 and 0 entries"),
        ({"Polygons": [], "instance_boxes": []}, r"have 0 and 0 entries"),
        ({"Polygons": [[[]]]}, r"'Polygons', instance 0: has no polygon"),
        ({"Polygons": [[[1, 2, 3, 4, 5, 6]]]}, r"instance 0: polygons must be lists of points"),
        ({"instance_boxes": [[1, 2, 3]]}, r"'instance_boxes', instance 0: must be four numbers"),
    ],
)
def test_malformed_fields_are_named(dataset_files, changes, message):
    dataset_files.tasks[0].update(changes)
    where = r"refer_val\.json: task 0 \(task_id 2__101\).*"
    with pytest.raises(ValueError, match=where + message):
        load(dataset_files)


def test_ids_occur_once(dataset_files):
    dataset_files.tasks[1]["task_id"] = "2__101"
    with pytest.raises(ValueError, match=r"task 1: task_id '2__101' occurs twice"):
        load(dataset_files)
    dataset_files.tasks = []
    with pytest.raises(ValueError, match="must hold a list of tasks"):
        load(dataset_files)
    dataset_files.phrasecut_images *= 2
    with pytest.raises(
        ValueError, match=r"image_data_split\.json: image 2: image_id 1 occurs twice"
    ):
        load(dataset_files)
