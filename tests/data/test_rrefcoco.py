"""R-RefCOCO: REFER's form, and sentences that say whether their thing exists."""

from ris_d2.data.refer import load_refer


def load(files, split="train"):
    return load_refer(*files.write_refer("rrefcoco"), "images", split, source="rrefcoco")


def test_negative_sentences_refer_to_nothing(dataset_files):
    dataset_files.refs[0]["sentences"][0]["exist"] = True
    dataset_files.refs[0]["sentences"] += [
        {"sent_id": 900 + k, "raw": f"the right man {k}", "sent": "", "exist": exist}
        for k, exist in enumerate((False, 0))
    ]
    for sentence in dataset_files.refs[1]["sentences"]:
        sentence["exist"] = False
    first, second = load(dataset_files)
    assert [(e["ref_id"], e["annotation_ids"]) for e in first["expressions"]] == [
        (1, [10]),
        (1, [10]),
        (1, []),
        (1, []),
    ]
    assert [e["annotation_ids"] for e in second["expressions"]] == [[], []]
    assert [a["id"] for a in first["annotations"]] == [10] and second["annotations"] == []
    assert second["source"] == "rrefcoco"
