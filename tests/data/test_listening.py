import copy

from detectron2.data import DatasetCatalog

from ris_d2 import refshapes
from ris_d2.data.listening import with_other_sentences


def image(*targets):
    ids = {id_ for t in targets for id_ in t}
    return {
        "annotations": [{"id": id_} for id_ in sorted(ids)],
        "expressions": [
            {"expression_id": i, "text": f"sentence {i}", "annotation_ids": list(t)}
            for i, t in enumerate(targets)
        ],
    }


def test_each_sentence_is_the_next_one_with_other_targets():
    records = [image([1], [1], [2, 1], [], [1, 2]), image([3], [3]), image([4])]
    before = copy.deepcopy(records)
    [record] = with_other_sentences(records)
    assert records == before
    # 0 and 1 mean the same and take 2; 2 takes 3; 3 takes 4; 4 = 2 in other order, and takes 0.
    texts = [expression["text"] for expression in record["expressions"]]
    assert texts == [f"sentence {i}" for i in (2, 2, 3, 4, 0)]
    for name in ("expression_id", "annotation_ids"):
        kept = [expression[name] for expression in record["expressions"]]
        assert kept == [expression[name] for expression in before[0]["expressions"]]


def test_images_whose_sentences_mean_the_same_are_left_out():
    assert with_other_sentences([image([3]), image([4], [4]), image()]) == []


def test_evaluation_splits_are_registered_so(tmp_path, monkeypatch):
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    refshapes.write(str(tmp_path / "refshapes"), {"train": 1, "val": 2}, refshapes.Options())
    own, other = (DatasetCatalog.get(f"ris_grefshapes_val{kind}") for kind in ("", "_other"))
    assert with_other_sentences(own) == other != own
    assert "ris_grefshapes_train_other" not in DatasetCatalog
