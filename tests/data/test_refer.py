import json
import logging

import pytest
from detectron2.structures import BoxMode

from ris_d2.data.records import Skipped
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


ANNOTATION = r"instances\.json: annotation 10: "


@pytest.mark.parametrize(
    "change, message",
    [
        (remove("refs", 0, "split"), r"refs\(unc\)\.p: ref 0 .*KeyError: 'split'"),
        (put("refs", 0, "split", 3), r"refs\(unc\)\.p: ref 0 .*TypeError: "),
        (put("refs", 0, "ref_id", "1"), r"ref 0 .*TypeError: "),
        (put("refs", 0, "ref_id", 2**63), r"ref 0 .*OverflowError: an id of more than 64 bits"),
        (put("refs", 0, "no refs at all"), r"refs\(unc\)\.p: ref 0 .*TypeError: "),
        (put("refs", {}), r"refs\(unc\)\.p: must hold a list of refs, not dict"),
        (put("refs", 0, "image_id", 77), r"ref 0 .*there is no image with the id 77"),
        (put("refs", 0, "ann_id", 77), r"ref 0 .*there is no annotation with the id 77"),
        (put("refs", 0, "ann_id", [10]), r"ref 0 .*TypeError: unhashable type"),
        (put("refs", 0, "ann_id", 20), r"ref 0 .*annotation 20 is on image 2, .* on image 1"),
        (put("refs", 0, "sentences", 7), r"ref 0 .*TypeError: "),
        (put("refs", 1, "sentences", 1, "raw", None), r"ref 1 .*TypeError: "),
        (remove("refs", 0, "sentences", 1, "sent_id"), r"ref 0 .*KeyError: 'sent_id'"),
        (remove("instances", "images"), r"instances\.json: .*KeyError: 'images'"),
        (put("instances", "images", 1, "id", 1), r"instances\.json: image: id 1 occurs twice"),
        (put("instances", "annotations", 3, "id", 10), r"annotation: id 10 occurs twice"),
        (remove("instances", "annotations", 2, "id"), r"annotation 2 .* no usable field 'id'"),
        (put("instances", "categories", 0, "id", "x"), r"instances\.json: .*TypeError: '<'"),
        (
            remove("instances", "images", 0, "height"),
            r"instances\.json: image 1: .*KeyError: 'height'",
        ),
        (put("instances", "images", 0, "width", 0), r"image 1: .*positive sides .*40 x 0"),
        (put("instances", "images", 0, "width", 10**8), r"image 1: .*at most 89,478,485 pixels"),
        (
            put("instances", "images", 0, "file_name", 7),
            r"instances\.json: image 1: .*TypeError: ",
        ),
        (put("instances", "annotations", 0, "category_id", 5), ANNOTATION + "category_id 5 is not"),
        (
            put("instances", "annotations", 0, "iscrowd", "no"),
            ANNOTATION + ".*TypeError: ",
        ),
    ],
)
def test_damage_is_named_by_file_and_entry(dataset_files, change, message):
    change(dataset_files)
    with pytest.raises(ValueError, match=message):
        load(dataset_files)


def flaws(skipped):
    """{kind: how often} from the text that is logged and shown."""
    return {
        k: int(n) for k, n in (part.rsplit(": ", 1) for part in str(skipped).split("; ") if part)
    }


def text(*ids):
    return [f"The LEFT man, {k}" for k in ids]


@pytest.mark.parametrize(
    "change, texts, found",
    [
        (put("refs", 0, "sentences", []), text("2.0", "2.1"), {"refs without sentences": 1}),
        (
            put("refs", 0, "sentences", 1, "raw", " \n"),
            text("1.0", "2.0", "2.1"),
            {"blank sentences": 1},
        ),
        (
            put("refs", 0, "sentences", 1, "raw", "?! \xa0"),  # nothing that cleaning leaves
            text("1.0", "2.0", "2.1"),
            {"sentences without a letter or digit": 1},
        ),
        (
            put("refs", 0, "sentences", 1, "sent_id", 200),
            text("1.0", "1.1", "2.0", "2.1"),
            {"repeated sentence ids (replaced)": 1},
        ),
        (
            put("instances", "annotations", 0, "segmentation", []),
            text("2.0", "2.1"),
            {"annotations without a mask": 1, "refs without an annotation that can be used": 1},
        ),
        (
            put("instances", "annotations", 0, "segmentation", [[1, 2, 3, 4], [1, 2, 3]]),
            text("2.0", "2.1"),
            {
                "polygons or RLE that cannot be drawn": 2,
                "refs without an annotation that can be used": 1,
            },
        ),
        (
            put("instances", "annotations", 0, "segmentation", {"size": [60, 40], "counts": "x"}),
            text("2.0", "2.1"),
            {
                "polygons or RLE that cannot be drawn": 1,
                "refs without an annotation that can be used": 1,
            },
        ),
        (
            put("instances", "annotations", 0, "bbox", [1, 2, 3, float("nan")]),
            text("1.0", "1.1", "2.0", "2.1"),
            {"boxes that are none (the masks' are taken)": 1},
        ),
    ],
)
def test_flaws_of_published_files_are_skipped_and_counted(dataset_files, change, texts, found):
    change(dataset_files)
    skipped = Skipped()
    records = load(dataset_files, skipped=skipped)
    expressions = [e for record in records for e in record["expressions"]]
    assert [e["text"] for e in expressions] == texts
    assert len({e["expression_id"] for e in expressions}) == len(texts)
    assert flaws(skipped) == found
    assert (
        sum(count for _, _, count in skipped.expressions)
        + len(texts)
        + 2 * ("refs without sentences" in found)
        == 4
    )
    assert all(a["bbox"] == [10, 10, 10, 10] for r in records for a in r["annotations"])


@pytest.mark.parametrize(
    "bad", [[1, 2, 3, 4], [1, 2, 3, 4, 5, 6, 7], [1, 2, 3, 4, 5, 1e8], [0] * 6]
)
def test_an_annotation_keeps_its_good_polygons(dataset_files, bad):
    bar = [0, 0, 30, 0, 30, 5, 0, 5]
    dataset_files.instances["annotations"][0]["segmentation"] = [bad, *SQUARE, bar]
    dataset_files.refs.append(dataset_files.ref(9, ann_id=10, image_id=1, split="train"))
    skipped = Skipped()
    (annotation,) = load(dataset_files, skipped=skipped)[0]["annotations"]
    drawable = bad == [0] * 6  # encloses nothing, and is a polygon nevertheless
    assert annotation["segmentation"] == [bad, *SQUARE, bar][1 - drawable :]
    assert flaws(skipped) == ({} if drawable else {"polygons or RLE that cannot be drawn": 1})


def test_flaws_are_logged_once_per_split_however_often_it_is_read(dataset_files, caplog):
    dataset_files.refs[0]["sentences"] = []
    dataset_files.refs[1]["sentences"][0]["raw"] = ""
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            load(dataset_files)
        load(dataset_files, "val")
    (line,) = [r.message for r in caplog.records if "refs(unc).p" in r.message]
    assert line.endswith("split train: refs without sentences: 1; blank sentences: 1")


def test_a_split_of_nothing_usable_is_empty(dataset_files):
    dataset_files.refs[2]["sentences"] = []
    assert load(dataset_files, "val") == []


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
