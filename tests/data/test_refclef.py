import logging

import numpy as np
import pytest

from ris_d2 import masks
from ris_d2.data.records import Skipped
from ris_d2.data.refclef import load_refclef


@pytest.fixture
def files(dataset_files):
    dataset_files.refclef()
    return dataset_files


def load(files, split="train", root="images", **options):
    return load_refclef(*files.write_refer("refclef"), str(files.root / root), split, **options)


def test_string_ids_become_positions(files):
    records = load(files)
    assert [record["source"] for record in records] == ["refclef", "refclef"]
    assert [a["id"] for record in records for a in record["annotations"]] == [1, 3]
    assert [e["annotation_ids"] for e in records[1]["expressions"]] == [[3], [3]]
    assert records[0]["annotations"][0]["iscrowd"] == 0


def test_lists_of_rle_are_united(files):
    (annotation,) = load(files)[0]["annotations"]
    assert annotation["segmentation"] == {"size": [40, 60], "counts": [0, 5, 2395]}
    files.instances["annotations"][0]["segmentation"].append(
        {"size": [40, 60], "counts": [3, 7, 2390]}
    )
    (annotation,) = load(files)[0]["annotations"]
    expected = np.zeros(2400, bool)
    expected[:10] = True  # runs go down the columns
    mask = masks.rasterize(annotation["segmentation"], 40, 60)
    np.testing.assert_array_equal(mask, expected.reshape(60, 40).T)


def test_images_lie_flat_or_in_the_folders_of_saiapr(files):
    assert load(files)[0]["file_name"] == str(files.root / "images/1201.jpg")
    (files.root / "images/01/images").mkdir(parents=True)
    (files.root / "images/01/images/1201.jpg").touch()
    assert [record["file_name"] for record in load(files)] == [
        str(files.root / f"images/01/images/{number}.jpg") for number in (1201, 1202)
    ]
    (files.root / "images/1201.jpg").touch()
    assert load(files)[0]["file_name"] == str(files.root / "images/1201.jpg")


def test_only_the_known_missing_images_are_left_out(files, caplog):
    files.instances["images"][1]["file_name"] = "19579.jpg"
    with caplog.at_level(logging.WARNING, logger="ris_d2"):
        assert [record["image_id"] for record in load(files)] == [1]
    assert "leaving out 2 expressions of " in caplog.text and "19579.jpg" in caplog.text
    (files.root / "images").mkdir()
    (files.root / "images/19579.jpg").touch()
    assert [record["image_id"] for record in load(files)] == [1, 2]


def test_an_unknown_annotation_id(files):
    files.refs[0]["ann_id"] = "1_9"
    with pytest.raises(ValueError, match=r"ref 0 .*there is no annotation with the id '1_9'"):
        load(files)


def test_one_bad_rle_of_several_is_skipped(files):
    good = {"size": [40, 60], "counts": [3, 7, 2390]}
    too_long = {"size": [40, 60], "counts": [2**62] * 4 + [2400]}  # adds up in 64 bits
    files.instances["annotations"][0]["segmentation"] = [too_long, good]
    skipped = Skipped()
    annotation = load(files, skipped=skipped)[0]["annotations"][0]
    assert annotation["segmentation"] == good
    assert str(skipped) == "polygons or RLE that cannot be drawn: 1"


def test_a_split_of_nothing_usable_is_empty(files):
    for ref in files.refs:
        ref["sentences"] = []
    assert load(files) == []
