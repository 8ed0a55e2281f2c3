import json

import pytest
from detectron2.structures import BoxMode

from ris_d2.data.refer import MissingSplitError, load_refer

SQUARE = [[10, 10, 20, 10, 20, 20, 10, 20]]


def load(files, split="train", **options):
    return load_refer(*files.write_refer(), "images", split, source="refcoco", **options)


def test_one_record_per_image(dataset_files):
    dataset_files.refs.append(dataset_files.ref(9, ann_id=11, image_id=1, split="train"))
    records = load(dataset_files)
    assert [record["image_id"] for record in records] == [1, 2]
    assert records[0] == {
        "file_name": "images/COCO_train2014_000000000001.jpg",
        "image_id": 1,
        "height": 40,
        "width": 60,
        "source": "refcoco",
        "annotations": [
            {
                "id": 10,
                "segmentation": SQUARE,
                "bbox": [10.0, 10.0, 10.0, 10.0],
                "bbox_mode": BoxMode.XYWH_ABS,
                "category_id": 1,
                "iscrowd": 0,
            },
            {
                "id": 11,
                "segmentation": [[0, 0, 30, 0, 30, 5, 0, 5]],
                "bbox": [0.0, 0.0, 30.0, 5.0],
                "bbox_mode": BoxMode.XYWH_ABS,
                "category_id": 0,
                "iscrowd": 0,
            },
        ],
        "expressions": [
            {
                "expression_id": 100,
                "ref_id": 1,
                "text": "The LEFT man, 1.0",
                "annotation_ids": [10],
            },
            {
                "expression_id": 101,
                "ref_id": 1,
                "text": "The LEFT man, 1.1",
                "annotation_ids": [10],
            },
            {
                "expression_id": 900,
                "ref_id": 9,
                "text": "The LEFT man, 9.0",
                "annotation_ids": [11],
            },
            {
                "expression_id": 901,
                "ref_id": 9,
                "text": "The LEFT man, 9.1",
                "annotation_ids": [11],
            },
        ],
    }


def test_an_annotation_is_listed_once_and_only_if_referred_to(dataset_files):
    dataset_files.refs.append(dataset_files.ref(9, ann_id=10, image_id=1, split="train"))
    first, second = load(dataset_files)
    assert [annotation["id"] for annotation in first["annotations"]] == [10]
    assert [annotation["id"] for annotation in second["annotations"]] == [20]


def test_splits_and_the_other_text(dataset_files):
    (record,) = load(dataset_files, "val", text_field="sent")
    assert [e["text"] for e in record["expressions"]] == ["the left man 3 0", "the left man 3 1"]
    dataset_files.refs[0]["split"] = "testAB"  # RefCLEF has such; REFER counts it in both
    assert [record["image_id"] for record in load(dataset_files, "testA")] == [1, 4]
    assert [record["image_id"] for record in load(dataset_files, "testB")] == [1]
    with pytest.raises(MissingSplitError, match=r"no ref belongs to split 'test'; the file has \["):
        load(dataset_files, "test")
    with pytest.raises(ValueError, match="text_field is 'tokens'"):
        load(dataset_files, text_field="tokens")


def test_crowds_are_kept(dataset_files):
    dataset_files.refs[0].update(ann_id=41, image_id=4)
    (annotation,) = load(dataset_files)[0]["annotations"]
    assert annotation["segmentation"] == {"size": [40, 60], "counts": [0, 5, 2395]}
    assert annotation["iscrowd"] == 1


def test_a_changed_instances_file_is_read_again(dataset_files):
    load(dataset_files)
    dataset_files.instances["annotations"][0]["bbox"] = [1, 2, 3, 4]
    assert load(dataset_files)[0]["annotations"][0]["bbox"] == [1.0, 2.0, 3.0, 4.0]


def remove(*keys):
    def change(files):
        target = files.__dict__
        for key in keys[:-1]:
            target = target[key]
        del target[keys[-1]]

    return change


def put(*keys_and_value):
    *keys, last, value = keys_and_value

    def change(files):
        target = files.__dict__
        for key in keys:
            target = target[key]
        target[last] = value

    return change


REF, SENTENCE = r"refs\(unc\)\.p: ref 0 \(ref_id 1\)", r"\(ref_id 1\), sentence 1"
ANNOTATION = r"instances\.json: annotation 10"


@pytest.mark.parametrize(
    "change, message",
    [
        (remove("refs", 0, "split"), r"refs\(unc\)\.p: ref 0: field 'split' is missing"),
        (put("refs", 0, "split", 3), r"ref 0: field 'split' must be a string, not 3"),
        (put("refs", 0, "ref_id", True), r"ref 0: field 'ref_id' must be an integer, not True"),
        (put("refs", 0, "ref_id", 2), r"ref 1: ref_id 2 occurs twice"),
        (put("refs", 0, "no refs at all"), r"refs\(unc\)\.p: ref 0: must be an object"),
        (put("refs", {}), r"refs\(unc\)\.p: must hold a list of refs, not dict"),
        (
            put("refs", 0, "image_id", 77),
            REF + r": image_id 77 is not among the images of .*instances",
        ),
        (
            put("refs", 0, "ann_id", 77),
            REF + r": annotation 77 is not among the annotations of .*inst",
        ),
        (put("refs", 0, "ann_id", [10]), REF + r": field 'ann_id' must be an integer, not \[10\]"),
        (put("refs", 0, "ann_id", 20), REF + r": annotation 20 is on image 2, .* on image 1"),
        (put("refs", 0, "sentences", []), REF + r": field 'sentences' is empty"),
        (
            put("refs", 0, "sentences", 1, "raw", " "),
            SENTENCE + ": field 'raw' is an empty expression",
        ),
        (put("refs", 0, "sentences", 1, "raw", None), SENTENCE + ": field 'raw' must be a string"),
        (remove("refs", 0, "sentences", 1, "sent_id"), SENTENCE + ": field 'sent_id' is missing"),
        (put("refs", 0, "sentences", 1, "sent_id", 100), SENTENCE + ".* id 100 occurs twice"),
        (remove("instances", "images"), r"instances\.json: field 'images' is missing"),
        (put("instances", "images", 1, "id", 1), r"instances\.json: images: id 1 occurs twice"),
        (put("instances", "annotations", 3, "id", 10), r"annotations: id 10 occurs twice"),
        (remove("instances", "annotations", 2, "id"), r"annotations\[2\]: no usable field 'id'"),
        (remove("instances", "images", 0, "height"), r"instances\.json: image 1: field 'height'"),
        (put("instances", "images", 0, "width", 0), r"image 1: field 'width' must be positive"),
        (
            put("instances", "images", 0, "file_name", 7),
            r"image 1: field 'file_name' must be a string",
        ),
        (
            put("instances", "annotations", 0, "bbox", [1, 2, 3]),
            ANNOTATION + ": field 'bbox': must be four",
        ),
        (
            put("instances", "annotations", 0, "category_id", 5),
            ANNOTATION + ": category_id 5 is not",
        ),
        (
            put("instances", "annotations", 0, "iscrowd", "no"),
            ANNOTATION + ": field 'iscrowd' must be",
        ),
        (
            remove("instances", "annotations", 0, "segmentation"),
            ANNOTATION + ": field 'segmentation': must",
        ),
        (
            put("instances", "annotations", 0, "segmentation", []),
            ANNOTATION + ": field 'segmentation': must",
        ),
        (
            put("instances", "annotations", 0, "segmentation", [[1, 2, 3, 4, 5, 6, 7]]),
            ANNOTATION + ": field 'segmentation': a polygon is a list of 6 or more .* even number",
        ),
        (
            put("instances", "annotations", 0, "segmentation", {"size": [60, 40], "counts": "x"}),
            ANNOTATION
            + r": field 'segmentation': the RLE's size is \[60, 40\], the image's \[40, 60\]",
        ),
        (
            put("instances", "annotations", 0, "segmentation", {"size": [40, 60]}),
            ANNOTATION + ": field 'segmentation': an RLE's counts",
        ),
    ],
)
def test_malformed_fields_are_named(dataset_files, change, message):
    change(dataset_files)
    with pytest.raises(ValueError, match=message):
        load(dataset_files)


def test_other_splits_may_be_malformed(dataset_files):
    dataset_files.refs[2]["ann_id"] = 77
    assert len(load(dataset_files)) == 2


def test_truncated_and_missing_files(dataset_files):
    refs, instances = dataset_files.write_refer()
    with pytest.raises(FileNotFoundError, match=r"refs\(google\)\.p: no such file"):
        load_refer(refs.replace("unc", "google"), instances, "", "train", source="refcoco")
    with pytest.raises(FileNotFoundError, match="others.json: no such file"):
        load_refer(refs, instances.replace("instances", "others"), "", "train", source="refcoco")
    with open(instances, "w") as file:
        file.write(json.dumps(dataset_files.instances)[:-30])
    with pytest.raises(ValueError, match=r"instances\.json: not valid JSON at line 1"):
        load_refer(refs, instances, "", "train", source="refcoco")
