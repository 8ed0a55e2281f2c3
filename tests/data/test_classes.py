import json
import logging
import os

import pytest
import torch
from detectron2.data import DatasetCatalog

from ris_d2.data import load_records
from ris_d2.data.classes import COCO_48_17, PUBLISHED, load_class_list, select_classes
from ris_d2.evaluation import ReferringEvaluator
from ris_d2.masks import rasterize


@pytest.fixture
def animals(dataset_files):
    """RefCOCO: a cat in image 1, a dog and a cat in image 3 (val), a chair in image 2."""
    dataset_files.instances["categories"] = [
        {"id": 90, "name": "dog"},
        {"id": 3, "name": "horse"},
        {"id": 7, "name": "dining table"},
    ]
    by_id = {a["id"]: a for a in dataset_files.instances["annotations"]}
    by_id[10]["category_id"] = 3
    by_id[20]["category_id"] = 7
    by_id[30]["category_id"] = 90
    by_id[31]["category_id"] = 3
    dataset_files.refs.append(dataset_files.ref(9, ann_id=31, image_id=3, split="val"))
    dataset_files.write_refer()
    return dataset_files


def summary(records):
    return [
        (r["source"], r["image_id"], [a["id"] for a in r["annotations"]], len(r["expressions"]))
        for r in records
    ]


def test_the_list_of_open_vocabulary_detection():
    classes = load_class_list(COCO_48_17)
    seen, unseen = classes["seen"], classes["unseen"]
    assert (len(seen), len(unseen)) == (48, 17)
    assert {"person", "tv", "toothbrush"} < seen
    assert {"cat", "couch", "scissors"} < unseen
    assert not (seen | unseen) & {"dining table", "potted plant", "cell phone"}


def test_splits_by_class(animals):
    before = DatasetCatalog.get("ris_refcoco_unc_val")
    assert summary(DatasetCatalog.get("ris_refcoco_unc_train_seen")) == [("refcoco", 1, [10], 2)]
    assert summary(DatasetCatalog.get("ris_refcoco_unc_val_seen")) == [("refcoco", 3, [31], 2)]
    assert summary(DatasetCatalog.get("ris_refcoco_unc_val_unseen")) == [("refcoco", 3, [30], 2)]
    assert summary(DatasetCatalog.get("ris_refcoco_unc_val_open")) == [
        ("refcoco seen", 3, [31], 2),
        ("refcoco unseen", 3, [30], 2),
    ]
    assert DatasetCatalog.get("ris_refcoco_unc_val") == before
    assert summary(before) == [("refcoco", 3, [30, 31], 4)]


def test_the_log_compares_with_the_published_numbers(animals, caplog, monkeypatch):
    with caplog.at_level(logging.INFO, logger="ris_d2"):
        DatasetCatalog.get("ris_refcoco_unc_val_open")
    seen, unseen = [r.message for r in caplog.records if "referents" in r.message]
    assert seen.startswith("ris_refcoco_unc_val: 1 of 2 referents are of the 48 seen classes of")
    assert seen.endswith("coco_48_17.json; CGFormer has 3,175: not the same classes or files")
    assert unseen.endswith("CGFormer has 445: not the same classes or files")
    caplog.clear()
    monkeypatch.setitem(PUBLISHED, "ris_refcoco_unc_train", {"seen": 1})
    with caplog.at_level(logging.INFO, logger="ris_d2"):
        DatasetCatalog.get("ris_refcoco_unc_train_seen")
    assert caplog.records[-1].message.endswith("the same as CGFormer's 1")


def test_a_list_beside_the_instances_takes_the_place_of_the_default(animals, caplog):
    animals.json("refcoco/seen_unseen.json", {"seen": ["dining table"], "unseen": ["horse"]})
    with caplog.at_level(logging.INFO, logger="ris_d2"):
        records = DatasetCatalog.get("ris_refcoco_unc_train_seen")
    assert summary(records) == [("refcoco", 2, [20], 2)]
    path = os.path.join(str(animals.root), "refcoco", "seen_unseen.json")
    assert f"1 of 2 referents are of the 1 seen classes of {path}; no published" in caplog.text
    assert summary(DatasetCatalog.get("ris_refcoco_unc_val_unseen")) == [("refcoco", 3, [31], 2)]


def test_one_evaluation_reports_seen_unseen_and_overall(animals, tmp_path):
    """The model gets the seen one right (in both sentences) and says an empty mask to the other."""
    records = DatasetCatalog.get("ris_refcoco_unc_val_open")
    evaluator = ReferringEvaluator("open", output_dir=str(tmp_path), distributed=False)
    for record in records:
        (annotation,) = record["annotations"]
        mask = torch.from_numpy(rasterize(annotation["segmentation"], 40, 60))
        mask &= "unseen" not in record["source"]
        results = [
            {
                "expression_id": e["expression_id"],
                "mask": mask,
                "score": 1.0,
                "no_target": False,
                "instances": None,
            }
            for e in record["expressions"]
        ]
        evaluator.process([record], [{"referring": results}])
    assert evaluator.evaluate()["referring"]["mIoU"] == 50
    groups = json.loads((tmp_path / "results.json").read_text())["breakdowns"]["source"]
    assert {name: group["mIoU"] for name, group in groups.items()} == {
        "refcoco seen": 100,
        "refcoco unseen": 0,
    }


def test_mixtures_of_seen_splits_leak_no_evaluation_image(animals):
    for ref in animals.refs[:2]:
        ref.update(image_id=3, ann_id=31)
    test_b = animals.ref(5, ann_id=40, image_id=4, split="testB")
    animals.refs.append(test_b)
    animals.write_refer("refcoco+")
    for ref, image_id in zip(animals.refs, (1, 2)):
        ref.update(image_id=image_id, ann_id=10 * image_id)
    animals.write_refer("refcoco")
    names = ["ris_refcoco_unc_train_seen", "ris_refcoco+_unc_train_seen"]
    with pytest.raises(ValueError, match="every image is used by an evaluation split"):
        load_records(names, drop_eval_images=True)
    records = load_records(names, drop_eval_images=False)
    assert [(r["source"], r["image_id"]) for r in records] == [("refcoco", 1), ("refcoco+", 3)]


def test_several_targets_must_all_belong_and_none_belongs_nowhere(dataset_files):
    dataset_files.json("toy/seen_unseen.json", {"seen": ["cup"], "unseen": ["cat"]})
    dataset_files.instances["categories"] = [{"id": 1, "name": "cup"}, {"id": 2, "name": "cat"}]
    instances_path = dataset_files.json("toy/instances.json", dataset_files.instances)
    annotations = [{"id": i, "category_id": c} for i, c in ((1, 0), (2, 1), (3, 0))]
    expressions = [
        {"ref_id": i, "annotation_ids": ids} for i, ids in enumerate(([1], [1, 2], [], [1, 3]))
    ]
    record = {"source": "toy", "annotations": annotations, "expressions": expressions}
    arguments = dict(instances_path=instances_path, name="toy")
    (seen,) = select_classes([record], ["seen"], **arguments)
    assert [e["ref_id"] for e in seen["expressions"]] == [0, 3]
    assert [a["id"] for a in seen["annotations"]] == [1, 3]
    with pytest.raises(ValueError, match="toy: no expression is about the unseen classes"):
        select_classes([record], ["unseen"], **arguments)


def _write(tmp_path, content):
    path = tmp_path / "classes.json"
    path.write_text(json.dumps(content))
    return path


def test_classes_that_the_dataset_does_not_know(tmp_path, animals, caplog):
    animals.json("refcoco/seen_unseen.json", {"seen": ["horse", "hrose"], "unseen": ["unicorn"]})
    assert DatasetCatalog.get("ris_refcoco_unc_train_seen")
    assert "no such class in the dataset: hrose" in caplog.text
    with pytest.raises(ValueError, match=r"knows none of the unseen.*\['dining table', 'dog'"):
        DatasetCatalog.get("ris_refcoco_unc_val_open")


@pytest.mark.parametrize(
    "content, message",
    [
        ({"seen": ["cat"]}, "field 'unseen' must be a list of class names"),
        ({"seen": ["cat"], "unseen": []}, "field 'unseen' must be a list of class names"),
        ({"seen": [3], "unseen": ["cat"]}, "field 'seen' must be a list of class names"),
        ({"seen": "cat", "unseen": ["dog"]}, "field 'seen' must be a list of class names"),
        ({"seen": ["cat", "dog"], "unseen": ["cat"]}, r"\['cat'\] are both seen and unseen"),
    ],
)
def test_broken_lists(content, message, tmp_path):
    with pytest.raises(ValueError, match=f"classes.json: {message}"):
        load_class_list(_write(tmp_path, content))
