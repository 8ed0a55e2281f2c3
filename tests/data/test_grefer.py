import pytest

from ris_d2.data.grefer import load_grefer
from ris_d2.data.records import Skipped
from ris_d2.data.refer import MissingSplitError


def load(files, split="train", **options):
    return load_grefer(*files.write_grefer(), "images", split, **options)


def test_single_multi_and_no_target_share_one_record(dataset_files):
    (record,) = load(dataset_files)
    assert record["source"] == "grefcoco"
    assert [annotation["id"] for annotation in record["annotations"]] == [10, 11]
    targets = {e["ref_id"]: e["annotation_ids"] for e in record["expressions"]}
    assert targets == {1: [10], 2: [10, 11], 3: []}


def test_an_image_with_nothing_but_no_target_expressions_is_a_record(dataset_files):
    (record,) = load(dataset_files, "testA")
    assert record["annotations"] == []
    assert [e["annotation_ids"] for e in record["expressions"]] == [[], []]


def test_crowds_are_no_part_of_the_ground_truth(dataset_files):
    """ReLA's rule, gres_model/data/datasets/grefcoco.py: `if anno_dict['iscrowd']: continue`."""
    skipped = Skipped()
    assert load(dataset_files, "testB", skipped=skipped) == []  # a crowd is its only target
    assert str(skipped) == (
        "crowds left out of the ground truth: 1; refs without an annotation that can be used: 1"
    )
    dataset_files.grefs[5]["ann_id"] = [40, 41]
    (record,) = load(dataset_files, "testB")
    assert [annotation["id"] for annotation in record["annotations"]] == [40]
    assert [e["annotation_ids"] for e in record["expressions"]] == [[40], [40]]


def test_refs_without_sentences_are_skipped(dataset_files):
    """As in the released file (gRefCOCO's issues 3 and 8)."""
    dataset_files.grefs[1]["sentences"] = []
    skipped = Skipped()
    (record,) = load(dataset_files, skipped=skipped)
    assert {e["ref_id"] for e in record["expressions"]} == {1, 3}
    assert str(skipped) == "refs without sentences: 1"


def test_no_target_is_minus_one_or_the_flag(dataset_files):
    del dataset_files.grefs[2]["no_target"]
    assert load(dataset_files)[0]["expressions"][-1]["annotation_ids"] == []
    dataset_files.grefs[2].update(ann_id=[], no_target=True)
    assert load(dataset_files)[0]["expressions"][-1]["annotation_ids"] == []


def test_pickled_grefs_and_repeated_ids(dataset_files):
    dataset_files.grefs[1]["ann_id"] = [11, 10, 11]
    dataset_files.grefs[0]["ann_id"] = 10
    _, instances = dataset_files.write_grefer()
    path = dataset_files.pickle("grefcoco/grefs(unc).p", dataset_files.grefs)
    (record,) = load_grefer(path, instances, "images", "train")
    assert record["expressions"][0]["annotation_ids"] == [10]
    assert record["expressions"][2]["annotation_ids"] == [11, 10]


@pytest.mark.parametrize(
    "changes, message",
    [
        (
            {"ann_id": [10], "no_target": True},
            r"field 'ann_id' is \[10\] and 'no_target'",
        ),
        ({"ann_id": [10, -1]}, r"there is no annotation with the id -1"),
        ({"ann_id": []}, r"'ann_id' is \[\]"),
        ({"ann_id": ["10"]}, r"there is no annotation with the id '10'"),
        ({"ann_id": None}, r"there is no annotation with the id None"),
        ({"ann_id": [10, 77]}, r"there is no annotation with the id 77"),
        ({"no_target": "no"}, r"'no_target' is 'no'"),
    ],
)
def test_contradictions_are_errors(dataset_files, changes, message):
    dataset_files.grefs[0].update(changes)
    with pytest.raises(ValueError, match=r"grefs\(unc\)\.json: ref 0 .*" + message):
        load(dataset_files)


def test_a_release_without_test_sets_says_so(dataset_files):
    dataset_files.grefs = dataset_files.grefs[:4]
    with pytest.raises(MissingSplitError, match=r"split 'testA'; the file has \['train', 'val'\]"):
        load(dataset_files, "testA")
