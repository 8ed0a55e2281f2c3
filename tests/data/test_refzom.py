import pytest

from ris_d2.data.refzom import load_refzom


def load(files, split="train"):
    paths = files.pickle("ref-zom/refs(final).p", files.refs), files.json(
        "ref-zom/instances.json", files.instances
    )
    return load_refzom(*paths, "images", split)


def test_zero_one_and_many(dataset_files):
    dataset_files.refs = [
        dataset_files.ref(1, ann_id=10, image_id=1, split="train", source="one"),
        dataset_files.ref(2, ann_id=[10, 11], image_id=1, split="train", source="many"),
        dataset_files.ref(3, ann_id=[], image_id=1, split="train", source="zero"),
        dataset_files.ref(4, ann_id=[20], image_id=2, split="test", source="one"),
        # What the field says of nothing is not documented; the source decides.
        dataset_files.ref(5, ann_id=20, image_id=2, split="test", source="zero"),
    ]
    (record,) = load(dataset_files)
    assert record["source"] == "refzom"
    targets = {e["ref_id"]: e["annotation_ids"] for e in record["expressions"]}
    assert targets == {1: [10], 2: [10, 11], 3: []}
    (record,) = load(dataset_files, "test")
    assert {e["ref_id"]: e["annotation_ids"] for e in record["expressions"]} == {4: [20], 5: []}
    assert [a["id"] for a in record["annotations"]] == [20]


def test_images_lie_where_their_names_say(dataset_files):
    val = dataset_files.instances["images"][1]
    val["file_name"] = val["file_name"].replace("train", "val")
    dataset_files.refs = [
        dataset_files.ref(i, ann_id=10 * i, image_id=i, split="train", source="one") for i in (1, 2)
    ]
    assert [record["file_name"] for record in load(dataset_files)] == [
        "images/train2014/COCO_train2014_000000000001.jpg",
        "images/val2014/COCO_val2014_000000000002.jpg",
    ]


def test_a_ref_without_source_is_named(dataset_files):
    with pytest.raises(ValueError, match=r"refs\(final\).p: ref 0 .*source"):
        load(dataset_files)
