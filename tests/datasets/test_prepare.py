import importlib.util
import re
from pathlib import Path

import pytest
from PIL import ExifTags, Image

ROOT = Path(__file__).parents[2]


@pytest.fixture
def prepare(monkeypatch):
    spec = importlib.util.spec_from_file_location("prepare", ROOT / "datasets/prepare.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

    def run(*arguments):
        monkeypatch.setattr("sys.argv", ["prepare.py", *map(str, arguments)])
        return module.main()

    module.run = run
    return module


def counts(prepare):
    """The numbers of the ``dataset_files`` fixture."""
    return {
        "ris_refcoco_unc_train": prepare.Counts(2, 2, 4),
        "ris_refcoco_unc_val": prepare.Counts(1, 1, 2),
        "ris_refcoco_unc_testA": prepare.Counts(1, 1, 2),
    }


def test_nothing_there_is_no_error(prepare, tmp_path, capsys):
    assert prepare.run("--root", tmp_path) == 0
    assert "missing: refcoco/refs(unc).p, refcoco/instances.json (train, val, testA, testB)" in (
        capsys.readouterr().out
    )


def test_right_numbers(prepare, dataset_files, monkeypatch, capsys):
    dataset_files.write_refer()
    dataset_files.write_images()
    monkeypatch.setattr(prepare, "PUBLISHED", counts(prepare))
    assert prepare.run() == 0  # the root is $DETECTRON2_DATASETS
    out = capsys.readouterr().out
    assert f"root: {dataset_files.root}" in out
    counted = "train    2 images, 2 refs, 4 expressions (0 with several targets, 0 with none)"
    assert counted + "; as published" in out
    assert "testB    missing: " in out and "no ref belongs to split 'testB'" in out
    assert "images   4 of 4 are there\n" in out


def test_the_numbers_of_the_file_are_compared_and_its_flaws_shown(
    prepare, dataset_files, monkeypatch, capsys
):
    dataset_files.refs[0]["sentences"][0]["raw"] = "?"
    dataset_files.instances["annotations"][2]["segmentation"] = [[1, 2, 3, 4]]  # all of ref 2
    dataset_files.refs[2]["sentences"] += [{"sent_id": 1, "raw": "", "sent": ""}]
    dataset_files.write_refer()
    expected = counts(prepare) | {"ris_refcoco_unc_val": prepare.Counts(1, 1, 2)}
    monkeypatch.setattr(prepare, "PUBLISHED", expected)
    assert prepare.run() == 1  # the blank sentence of val is not published
    captured = capsys.readouterr()
    assert "train    2 images, 2 refs, 4 expressions (0 with several" in captured.out
    assert "flaws (3 expressions left out): sentences without a letter or digit: 1" in captured.out
    assert "refs without an annotation that can be used: 1" in captured.out
    assert "flaws (1 expressions left out): blank sentences: 1" in captured.out
    problems = [line for line in captured.err.splitlines() if line.startswith("PROBLEM")]
    assert problems == [
        "PROBLEM: ris_refcoco_unc_val: differs from the published numbers: "
        "expressions 3 instead of 2"
    ]


def test_wrong_numbers_and_missing_images(prepare, dataset_files, monkeypatch, capsys):
    dataset_files.write_refer()
    dataset_files.write_images()
    (dataset_files.root / "images/train2014/COCO_train2014_000000000003.jpg").unlink()
    expected = counts(prepare) | {"ris_refcoco_unc_val": prepare.Counts(1, 2, 3)}
    monkeypatch.setattr(prepare, "PUBLISHED", expected)
    assert prepare.run() == 1
    captured = capsys.readouterr()
    assert "images   3 of 4 are there; missing: " in captured.out
    assert captured.err == (
        "PROBLEM: ris_refcoco_unc_val: differs from the published numbers: "
        "refs 1 instead of 2, expressions 2 instead of 3\n"
    )


def test_images_of_another_size_are_reported(prepare, dataset_files, monkeypatch, capsys):
    dataset_files.write_refer()
    monkeypatch.setattr(prepare, "PUBLISHED", counts(prepare))
    for number, image in enumerate(dataset_files.instances["images"]):
        path = dataset_files.root / "images/train2014" / image["file_name"]
        path.parent.mkdir(parents=True, exist_ok=True)
        if number == 0:  # lies on its side, as its EXIF data says
            exif = Image.Exif()
            exif[ExifTags.Base.Orientation] = 6
            Image.new("RGB", (40, 60)).save(path, exif=exif)
        else:
            Image.new("RGB", (60, 40 + (number == 1))).save(path)
    assert prepare.run() == 0
    assert (
        "1 images have another size (height, width) than annotated: "
        "COCO_train2014_000000000002.jpg (41, 60) instead of (40, 60)\n"
    ) in capsys.readouterr().out


def test_unconfirmed_numbers_are_no_error(prepare, dataset_files, capsys):
    dataset_files.write_grefer()
    assert prepare.run() == 0
    out = capsys.readouterr().out
    assert (
        "6 expressions (2 with several targets, 2 with none); expressions 6 instead of 209,344"
        in out
    )
    assert "the expected numbers are unconfirmed" in out


def test_a_broken_file_is_named_and_the_rest_still_checked(
    prepare, dataset_files, monkeypatch, capsys
):
    dataset_files.write_grefer()
    _, instances = dataset_files.write_refer()
    Path(instances).write_text('{"images": [')
    assert prepare.run() == 1
    captured = capsys.readouterr()
    assert re.search(
        r"PROBLEM: ris_refcoco_unc_val: .*instances\.json: not valid JSON", captured.err
    )
    assert "ris_grefcoco_unc\n  train    1 images" in captured.out


def test_refshapes_read_as_refcoco_has_its_own_numbers(prepare, dataset_files, capsys):
    dataset_files.write_refer()
    dataset_files.json("refshapes.json", {})
    assert prepare.run() == 0
    assert "no published numbers" in capsys.readouterr().out


def test_shared_images_are_reported(prepare, dataset_files, capsys):
    dataset_files.refs[2].update(image_id=1, ann_id=11)
    dataset_files.write_refer("refcocog", "google")
    prepare.run()
    assert "train and val share 1 images" in capsys.readouterr().out


def test_the_readme_has_the_same_numbers(prepare):
    text = (ROOT / "datasets/README.md").read_text()
    rows = dict(re.findall(r"^\| `(ris_\S+)` \|(.*)\|$", text, re.MULTILINE))
    for table, bracket in ((prepare.PUBLISHED, "{:,}"), (prepare.UNCONFIRMED, "({:,})")):
        for name, expected in table.items():
            cells = [cell.strip() for cell in rows.pop(name).split("|")]
            assert cells == ["" if n is None else bracket.format(n) for n in expected], name
    assert all(not cells.replace("|", "").strip() for cells in rows.values()), rows
