import logging
import os
import subprocess
import sys

import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog

from ris_d2.data import load_records, records, refer, register_all, register_ris_json
from ris_d2.data.catalog import DATASETS, MIXTURES
from ris_d2.data.refer import MissingSplitError

# ReLA's register_refcoco.py: dataset, splitby, splits.
RELA = [
    ("refcoco", "unc", ["train", "val", "testA", "testB"]),
    ("refcoco+", "unc", ["train", "val", "testA", "testB"]),
    ("refcocop", "unc", ["train", "val", "testA", "testB"]),
    ("refcocog", "umd", ["train", "val", "test"]),
    ("refcocog", "google", ["train", "val"]),
    ("grefcoco", "unc", ["train", "val", "testA", "testB"]),
]
RELA_NAMES = [f"{name}_{by}_{split}" for name, by, splits in RELA for split in splits]


@pytest.fixture
def catalog():
    """Undoes what a test registers."""
    datasets, metadata = dict(DatasetCatalog), dict(MetadataCatalog)
    yield
    for catalog, before in ((DatasetCatalog, datasets), (MetadataCatalog, metadata)):
        catalog.clear()
        catalog.update(before)


def ids(records):
    return [record["image_id"] for record in records]


def test_every_dataset_is_registered_under_relas_name():
    names = [f"ris_{name}" for name in RELA_NAMES + ["grefcoco_unc_train_full"]]
    names += [f"ris_refclef_unc_{split}" for split in ("train", "val", "testA", "testB", "testC")]
    names += [f"ris_refclef_berkeley_{split}" for split in ("train", "val", "test")]
    families = ("rrefcoco", "rrefcoco+", "rrefcocog")
    names += [f"ris_{family}_unc_{split}" for family in families for split in ("train", "val")]
    names += [f"ris_refzom_final_{split}" for split in ("train", "test")]
    names += [f"ris_rrsisd_unc_{split}" for split in ("train", "val", "test")]
    names += [f"ris_phrasecut_{split}" for split in ("train", "val", "test", "miniv")]
    for version in ("", "_hard_v1"):
        splits = ("train", "val", "testA", "testB")
        names += [f"ris_refshapes{version}_{split}" for split in splits]
        names += [f"ris_grefshapes{version}_{split}" for split in (*splits, "heldout")]
    assert set(names) <= set(DatasetCatalog.list())
    registered = {name for name in DatasetCatalog.list() if name.startswith("ris_")}
    evaluated = {name for name in names if not name.endswith(("_train", "_train_full"))}
    exchanged = {f"{name}_other" for name in evaluated}
    assert exchanged <= registered
    others = registered - set(names) - exchanged - {"ris_refcoco_mixed_train"}
    # By object class, for the families with one target of a known class per expression.
    assert others == {
        f"ris_{family}_{split}_{kind}"
        for family in (
            *(f"{name}_{by}" for name, by, _ in RELA[:-1]),
            "refshapes",
            "refshapes_hard_v1",
        )
        for split in ("train", "val", "testA", "testB", "test")
        for kind in ("seen", "unseen", "open")
        if f"ris_{family}_{split}" in names and (split != "train" or kind == "seen")
    }


def test_registering_reads_no_file_and_may_be_repeated(catalog, monkeypatch):
    monkeypatch.setenv("DETECTRON2_DATASETS", "/nowhere")
    register_all()
    register_all()
    with pytest.raises(
        FileNotFoundError, match=r"ris_refcoco_unc_val: no such file: /nowhere/refcoco/"
    ):
        DatasetCatalog.get("ris_refcoco_unc_val")


def test_metadata_follows_the_root(catalog, dataset_files, monkeypatch):
    dataset_files.write_refer("refcoco+")
    DatasetCatalog.get("ris_refcocop_unc_val")
    metadata = MetadataCatalog.get("ris_refcocop_unc_val")
    root = str(dataset_files.root)
    assert metadata.evaluator_type == "referring"
    assert metadata.image_root == os.path.join(root, "images/train2014")
    assert (metadata.source, metadata.split) == ("refcoco+", "val")
    assert metadata.annotation_files == [
        f"{root}/refcoco+/refs(unc).p",
        f"{root}/refcoco+/instances.json",
    ]
    # thing_classes would make detectron2's loader count classes over COCO's category ids.
    assert metadata.get("thing_classes") is None
    monkeypatch.setenv("DETECTRON2_DATASETS", "/elsewhere")
    register_all()
    assert MetadataCatalog.get("ris_refcocop_unc_val").image_root == "/elsewhere/images/train2014"


def test_each_family_is_read_from_its_place(catalog, dataset_files):
    dataset_files.write_refer("refcocog", "google")
    dataset_files.write_grefer()
    dataset_files.write_phrasecut("miniv")
    assert ids(DatasetCatalog.get("ris_refcocog_google_train")) == [1, 2]
    (record,) = DatasetCatalog.get("ris_grefcoco_unc_testA")
    assert record["file_name"].startswith(
        str(dataset_files.root / "images/train2014/COCO_train2014_")
    )
    (record,) = DatasetCatalog.get("ris_phrasecut_miniv")
    assert record["file_name"] == str(dataset_files.root / "phrasecut/images/2.jpg")
    dataset_files.refclef()
    dataset_files.write_refer("refclef", "berkeley")
    records = DatasetCatalog.get("ris_refclef_berkeley_train")
    assert records[0]["file_name"] == str(dataset_files.root / "images/saiapr_tc-12/1201.jpg")


def test_refshapes_is_a_root_of_its_own(catalog, dataset_files):
    dataset_files.write_refer("refshapes/refcoco")
    (record,) = DatasetCatalog.get("ris_refshapes_val")
    assert record["source"] == "refshapes"
    assert os.path.dirname(record["file_name"]) == str(
        dataset_files.root / "refshapes/images/train2014"
    )


def test_one_dataset_is_never_filtered(catalog, dataset_files):
    # The Google split divides objects, not images: train and val share image 1.
    dataset_files.refs[2].update(image_id=1, ann_id=11)
    dataset_files.write_refer("refcocog", "google")
    assert ids(load_records(["ris_refcocog_google_train"], drop_eval_images=True)) == [1, 2]


def test_a_mixed_training_set_reads_each_file_once(dataset_files, monkeypatch):
    names = mixed(dataset_files)
    read = []
    for module, function in ((refer, "load_pickle"), (refer, "load_json"), (records, "load_json")):
        load = getattr(module, function)
        monkeypatch.setattr(
            module, function, lambda path, load=load: read.append(path) or load(path)
        )
    load_records(names, drop_eval_images=True)
    assert len(read) == 2 * len(names)
    assert len(set(read)) == len(read)


def mixed(files, *, with_test_b=True):
    """RefCOCO trains on images 1, 2, evaluates on 3, 4; RefCOCO+ on 1, 3 and on 2, 4."""
    test_b = files.ref(5, ann_id=40, image_id=4, split="testB")
    files.refs += [test_b] * with_test_b
    files.write_refer("refcoco")
    files.refs[4:] = [test_b]
    for ref, image_id in zip(files.refs, (1, 3, 2, 4)):
        ref.update(image_id=image_id, ann_id=10 * image_id)
    files.write_refer("refcoco+")
    return ["ris_refcoco_unc_train", "ris_refcoco+_unc_train"]


def test_a_mixture_drops_every_evaluation_image(catalog, dataset_files, caplog):
    names = mixed(dataset_files)
    with caplog.at_level(logging.INFO, logger="ris_d2"):
        records = load_records(names, drop_eval_images=True)
    assert [(record["source"], record["image_id"]) for record in records] == [
        ("refcoco", 1),
        ("refcoco+", 1),
    ]
    assert "ris_refcoco_unc_train: dropped 1 of 2 images (2 of 4 expressions)" in caplog.text
    assert "ris_refcoco+_unc_train: dropped 1 of 2 images (2 of 4 expressions)" in caplog.text
    records = load_records(names, drop_eval_images=False)
    assert [(record["source"], record["image_id"]) for record in records] == [
        ("refcoco", 1),
        ("refcoco", 2),
        ("refcoco+", 1),
        ("refcoco+", 3),
    ]


def test_images_are_told_apart_by_root_and_name_not_by_id(catalog, dataset_files):
    # RefCOCO evaluates on images 3 and 4; PhraseCut's training image has the id 3, too.
    dataset_files.refs.append(dataset_files.ref(5, ann_id=40, image_id=4, split="testB"))
    dataset_files.write_refer()
    dataset_files.tasks[1]["image_id"] = 3
    dataset_files.phrasecut_images.append({**dataset_files.phrasecut_images[0], "image_id": 3})
    train = dataset_files.tasks
    for split in ("val", "test", "miniv"):
        dataset_files.tasks = [{**train[0], "image_id": 1, "task_id": split}]
        dataset_files.write_phrasecut(split)
    dataset_files.tasks = train
    dataset_files.write_phrasecut("train")
    names = ["ris_refcoco_unc_train", "ris_phrasecut_train"]
    records = load_records(names, drop_eval_images=True)
    assert [(record["source"], record["image_id"]) for record in records] == [
        ("refcoco", 1),
        ("refcoco", 2),
        ("phrasecut", 2),
        ("phrasecut", 3),
    ]


def test_a_linked_image_root_is_the_same_root(catalog, dataset_files):
    dataset_files.refs.append(dataset_files.ref(5, ann_id=40, image_id=4, split="testB"))
    dataset_files.write_refer()
    (dataset_files.root / "images/train2014").mkdir(parents=True)
    (dataset_files.root / "linked").symlink_to(dataset_files.root / "images/train2014")
    file_names = [image["file_name"] for image in dataset_files.instances["images"]]
    dataset_files.custom["images"] = [
        {**dataset_files.custom["images"][0], "id": i, "file_name": file_names[i - 1]}
        for i in (1, 3)
    ]
    dataset_files.custom["expressions"].append(
        {"id": 103, "image_id": 3, "text": "nothing", "annotation_ids": []}
    )
    path = dataset_files.json("custom.json", dataset_files.custom)
    register_ris_json("my_train", path, dataset_files.root / "linked")
    records = load_records(["my_train", "ris_refcoco_unc_train"], drop_eval_images=True)
    assert [(r["source"], r["image_id"]) for r in records] == [
        ("custom", 1),
        ("refcoco", 1),
        ("refcoco", 2),
    ]


def test_missing_evaluation_files_name_the_way_out(catalog, dataset_files):
    names = mixed(dataset_files, with_test_b=False)
    with pytest.raises(MissingSplitError, match=r"'testB'.*DATASETS.DROP_EVAL_IMAGES False"):
        load_records(names, drop_eval_images=True)
    assert len(load_records(names, drop_eval_images=False)) == 4
    dataset_files.write_phrasecut("train")
    with pytest.raises(
        FileNotFoundError, match=r"refer_val\.json.*DATASETS.DROP_EVAL_IMAGES False"
    ):
        load_records(["ris_phrasecut_train", "ris_refcoco+_unc_train"], drop_eval_images=True)


def test_a_dataset_that_loses_everything_is_an_error(catalog, dataset_files):
    names = mixed(dataset_files)
    with pytest.raises(
        ValueError, match=r"ris_refcoco_unc_val: every image is used by an evaluation"
    ):
        load_records([*names, "ris_refcoco_unc_val"], drop_eval_images=True)


def test_mixtures_stand_for_their_members(catalog, dataset_files):
    dataset_files.refs.append(dataset_files.ref(5, ann_id=40, image_id=4, split="testB"))
    dataset_files.write_refer()
    dataset_files.write_grefer()
    name = "ris_grefcoco_unc_train_full"
    records = DatasetCatalog.get(name)
    assert [(r["source"], r["image_id"]) for r in records] == [
        ("grefcoco", 1),
        ("refcoco", 1),
        ("refcoco", 2),
    ]
    assert load_records([name], drop_eval_images=True) == records
    for members in MIXTURES.values():
        assert set(members) <= set(DatasetCatalog.list())


def test_a_name_listed_twice_counts_twice(catalog, dataset_files):
    dataset_files.write_refer()
    names = ["ris_refcoco_unc_train"] * 2
    assert ids(load_records(names, drop_eval_images=True)) == [1, 2, 1, 2]


def test_an_unknown_name():
    with pytest.raises(KeyError, match="ris_refcoco_unc_trian"):
        load_records(["ris_refcoco_unc_trian"], drop_eval_images=True)


def test_custom_datasets(catalog, dataset_files, tmp_path):
    path = tmp_path / "custom.json"
    register_ris_json("my_val", path, "pictures")
    register_ris_json("my_val", path, "pictures")
    with pytest.raises(ValueError, match="the dataset name 'my_val' is taken"):
        register_ris_json("my_val", tmp_path / "other.json", "pictures")
    with pytest.raises(ValueError, match="the dataset name 'ris_refcoco_unc_val' is taken"):
        register_ris_json("ris_refcoco_unc_val", path, "pictures")
    dataset_files.json("custom.json", dataset_files.custom)
    (record,) = DatasetCatalog.get("my_val")
    assert record["file_name"] == os.path.abspath("pictures/a.jpg")
    assert MetadataCatalog.get("my_val").evaluator_type == "referring"


RELA_IMPORT = f"""
from detectron2.data import DatasetCatalog, MetadataCatalog
for name in {RELA_NAMES!r}:
    DatasetCatalog.register(name, lambda: "rela")  # asserts that the name is free
    MetadataCatalog.get(name).set(evaluator_type="refer", root="datasets")
"""


@pytest.mark.parametrize("order", ["ours first", "rela first"])
def test_lives_beside_rela(order):
    ours = "import ris_d2\n"
    program = ours + RELA_IMPORT if order == "ours first" else RELA_IMPORT + ours
    program += (
        "ris_d2.data.register_all()\n"
        "assert DatasetCatalog.get('refcoco_unc_val') == 'rela'\n"
        "assert MetadataCatalog.get('refcoco_unc_val').evaluator_type == 'refer'\n"
        "assert MetadataCatalog.get('ris_refcoco_unc_val').evaluator_type == 'referring'\n"
        "import sys\n"
        "assert not {'transformers', 'timm'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-W", "ignore", "-c", program], check=True)


def test_names_are_distinct():
    names = [f"{dataset.name}_{split}" for dataset in DATASETS for split in dataset.splits]
    assert len(names) == len(set(names))
