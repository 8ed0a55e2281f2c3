"""Say which dataset files are there, which are missing, and whether the counts are the published.

Exit status 1 where a file is broken or a count differs from the published one; a dataset or image
that is not there is reported, and no error. Published are the numbers of what a file holds, so
these are compared; what of it cannot be used is said in the next line.
"""

import argparse
import os
import sys
from pathlib import Path
from typing import NamedTuple

sys.path.append(str(Path(__file__).resolve().parents[1] / "tools"))

from _program import Parser, run


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(__doc__)
    parser.add_argument("--root", help="default: $DETECTRON2_DATASETS")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    parse()  # --help and mistakes are answered before the imports below, which take seconds

from PIL import ExifTags, Image

from ris_d2.data.catalog import DATASETS, Dataset
from ris_d2.data.records import Skipped
from ris_d2.data.refer import MissingSplitError
from ris_d2.io import dataset_root


class Counts(NamedTuple):
    """Numbers of one split; None: no published number."""

    images: int | None = None
    refs: int | None = None
    expressions: int | None = None


# Images and refs as tabulated by TensorFlow Datasets (ref_coco); the expressions add up to 142,210
# (RefCOCO), 141,564 (RefCOCO+) and 95,010 (RefCOCOg, UMD and Google). PhraseCut: its README.
PUBLISHED = {
    "ris_refcoco_unc_train": Counts(16994, 42404, 120624),
    "ris_refcoco_unc_val": Counts(1500, 3811, 10834),
    "ris_refcoco_unc_testA": Counts(750, 1975, 5657),
    "ris_refcoco_unc_testB": Counts(750, 1810, 5095),
    "ris_refcoco+_unc_train": Counts(16992, 42278, 120191),
    "ris_refcoco+_unc_val": Counts(1500, 3805, 10758),
    "ris_refcoco+_unc_testA": Counts(750, 1975, 5726),
    "ris_refcoco+_unc_testB": Counts(750, 1798, 4889),
    "ris_refcocog_umd_train": Counts(21899, 42226, 80512),
    "ris_refcocog_umd_val": Counts(1300, 2573, 4896),
    "ris_refcocog_umd_test": Counts(2600, 5023, 9602),
    "ris_refcocog_google_train": Counts(24698, 44822, 85474),
    "ris_refcocog_google_val": Counts(4650, 5000, 9536),
    "ris_phrasecut_train": Counts(71746, 310816, 310816),
    "ris_phrasecut_test": Counts(2545, 14354, 14354),
    "ris_phrasecut_miniv": Counts(100, 821, 821),
}
# Reported by others or derived, not confirmed by the authors: a difference is shown, and no error.
UNCONFIRMED = {
    "ris_grefcoco_unc_train": Counts(expressions=209344),
    "ris_grefcoco_unc_val": Counts(expressions=16870),
    "ris_grefcoco_unc_testA": Counts(expressions=18712),
    "ris_grefcoco_unc_testB": Counts(expressions=14933),
    "ris_refclef_unc_train": Counts(images=17978),
    "ris_refclef_unc_val": Counts(images=2000, expressions=12029),
    "ris_refclef_unc_testA": Counts(expressions=3565),
    "ris_refclef_unc_testB": Counts(expressions=3423),
    "ris_refclef_unc_testC": Counts(expressions=2750),
    "ris_refclef_berkeley_val": Counts(images=1000),
    "ris_refclef_berkeley_test": Counts(images=10000),
    "ris_phrasecut_val": Counts(2871, 19495, 19495),
    "ris_refzom_final_train": Counts(images=43749),
    "ris_refzom_final_test": Counts(images=11329),
    "ris_rrsisd_unc_train": Counts(expressions=12181),
    "ris_rrsisd_unc_val": Counts(expressions=1740),
    "ris_rrsisd_unc_test": Counts(expressions=3481),
}


def main() -> int:
    root = parse().root or dataset_root()
    print(f"root: {os.path.abspath(root)}")
    problems = [problem for dataset in DATASETS for problem in check(dataset, root)]
    for problem in problems:
        print(f"PROBLEM: {problem}", file=sys.stderr)
    return 1 if problems else 0


def check(dataset: Dataset, root: str) -> list[str]:
    """Print what there is of one dataset; return its broken files and wrong numbers."""
    print(f"\n{dataset.name}")
    problems, by_split, missing = [], {}, {}
    # RefShapes, read as RefCOCO and gRefCOCO, has its own numbers.
    is_refshapes = os.path.exists(os.path.join(root, "refshapes.json"))
    for split in dataset.splits:
        absent = [file for file in dataset.paths("", split) if not os.path.exists(f"{root}/{file}")]
        if absent:
            missing.setdefault(", ".join(absent), []).append(split)
            continue
        skipped = Skipped()
        try:
            records = dataset.load(root, split, skipped=skipped)
        except MissingSplitError as error:
            print(f"  {split:8} missing: {error}")
            continue
        except ValueError as error:
            print(f"  {split:8} BROKEN: {error}")
            problems.append(f"{dataset.name}_{split}: {error}")
            continue
        by_split[split] = records
        name = "RefShapes" if is_refshapes else f"{dataset.name}_{split}"
        verdict, differs = compare(name, count(records, skipped))
        print(f"  {split:8} {describe(records, skipped)}; {verdict}")
        if str(skipped):
            left_out = sum(number for _, _, number in skipped.expressions)
            print(f"  {'':8} flaws ({left_out:,} expressions left out): {skipped}")
        if differs:
            problems.append(f"{dataset.name}_{split}: {verdict}")
    for files, splits in missing.items():
        print(f"  missing: {files} ({', '.join(splits)})")
    if by_split:
        _report_images({split: _files(records) for split, records in by_split.items()})
        _report_sizes([record for records in by_split.values() for record in records])
    return problems


def count(records: list[dict], skipped: Skipped) -> Counts:
    """Images, refs and expressions that the file has of a split, those left out included."""
    expressions = [expression for record in records for expression in record["expressions"]]
    images = {record["image_id"] for record in records}
    refs = {expression["ref_id"] for expression in expressions}
    for image_id, ref_id, _ in skipped.expressions:
        images.add(image_id)
        refs.add(ref_id)
    left_out = sum(number for _, _, number in skipped.expressions)
    return Counts(len(images), len(refs), len(expressions) + left_out)


def describe(records: list[dict], skipped: Skipped) -> str:
    counts = count(records, skipped)
    targets = [len(e["annotation_ids"]) for record in records for e in record["expressions"]]
    several, none = sum(n > 1 for n in targets), targets.count(0)
    return (
        f"{counts.images:,} images, {counts.refs:,} refs, {counts.expressions:,} expressions "
        f"({several:,} with several targets, {none:,} with none)"
    )


def compare(name: str, found: Counts) -> tuple[str, bool]:
    """Return the verdict on a split's numbers, and whether it is an error."""
    expected = PUBLISHED.get(name) or UNCONFIRMED.get(name)
    if expected is None:
        return "no published numbers", False
    differences = [
        f"{field} {have:,} instead of {want:,}"
        for field, have, want in zip(Counts._fields, found, expected)
        if want is not None and have != want
    ]
    if name in UNCONFIRMED:
        said = ", ".join(differences) if differences else "as expected"
        return f"{said} (the expected numbers are unconfirmed)", False
    if differences:
        return "differs from the published numbers: " + ", ".join(differences), True
    return "as published", False


def _files(records: list[dict]) -> set[str]:
    return {record["file_name"] for record in records}


def _report_images(files_by_split: dict[str, set[str]]) -> None:
    files = set().union(*files_by_split.values())
    folders = {os.path.dirname(file) for file in files}
    there = {
        os.path.join(folder, name)
        for folder in folders
        if os.path.isdir(folder)
        for name in os.listdir(folder)
    }
    missing = sorted(files - there)
    print(f"  images   {len(files) - len(missing):,} of {len(files):,} are there", end="")
    print(f"; missing: {', '.join(missing[:3])}{' ...' * (len(missing) > 3)}" if missing else "")
    train = files_by_split.get("train", set())
    for split, others in files_by_split.items():
        if split != "train" and train & others:
            print(f"  train and {split} share {len(train & others):,} images")


def _report_sizes(records: list[dict]) -> None:
    """Say which of the images that are there are of another size than their annotations."""
    sizes = {record["file_name"]: (record["height"], record["width"]) for record in records}
    differing = []
    for file, annotated in sizes.items():
        try:
            with Image.open(file) as image:  # reads the header alone
                width, height = image.size
                lies = image.getexif().get(ExifTags.Base.Orientation, 1) > 4
        except OSError:
            continue  # missing ones are reported already; a training names what it cannot read
        found = (width, height) if lies else (height, width)
        if found != annotated:
            differing.append(f"{os.path.basename(file)} {found} instead of {annotated}")
    if differing:
        more = " ..." * (len(differing) > 3)
        print(
            f"  {len(differing):,} images have another size (height, width) than annotated: "
            f"{', '.join(differing[:3])}{more}"
        )


if __name__ == "__main__":
    sys.exit(run(main))
