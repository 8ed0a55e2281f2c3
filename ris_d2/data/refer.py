"""REFER's ``refs(<splitby>).p`` and ``instances.json`` -> records: RefCOCO/+/g, RRSIS-D, ..."""

import os
from collections.abc import Callable

from ..io import load_json, load_pickle, reading
from .records import InstanceTable, RecordBuilder, Skipped, as_id, kept, load_instances


class MissingSplitError(ValueError):
    """The annotation file is sound, but holds no ref of the split asked for."""


def load_refer(
    refs_path: str | os.PathLike,
    instances_path: str | os.PathLike,
    image_root: str,
    split: str,
    *,
    source: str,
    text_field: str = "raw",
    skipped: Skipped | None = None,
    annotation_ids_of: Callable[[dict], list] = lambda ref: [ref["ann_id"]],
    crowds: bool = True,
) -> list[dict]:
    """Read one split of a REFER dataset (github.com/lichengunc/refer), or of one in its form.

    A sentence whose ``exist`` is False refers to nothing (R-RefCOCO).

    Args:
        refs_path: ``refs(unc).p``, ``refs(umd).p`` or ``refs(google).p``; a list of refs, as a
            pickle or json.
        instances_path: ``instances.json`` of the same dataset, COCO's format.
        image_root: directory of the images.
        split: train, val, testA, testB, testC or test.
        source: family name kept in the records, e.g. "refcoco".
        text_field: "raw" (the annotator's text) or "sent" (REFER's: lower case, no punctuation).
        skipped: counts what cannot be used, e.g. refs without sentences; it is logged as well.
        annotation_ids_of: ref -> the annotation ids that it refers to, [] for none.
        crowds: keep annotations of crowds among the targets.

    Returns:
        One record per image, in the order of the refs; see datasets/README.md.

    Raises:
        FileNotFoundError: one of the two files is missing.
        MissingSplitError: no ref belongs to ``split``.
        ValueError: the file is damaged or of another format (a field that is missing, an unknown
            id); names file and ref.
    """
    if text_field not in ("raw", "sent"):
        raise ValueError(f"text_field is {text_field!r}, it must be 'raw' or 'sent'")
    refs = kept(load_json if os.fspath(refs_path).endswith(".json") else load_pickle, refs_path)
    if not isinstance(refs, list):
        raise ValueError(f"{refs_path}: must hold a list of refs, not {type(refs).__name__}")
    table, skipped = load_instances(instances_path), skipped or Skipped()
    builder = RecordBuilder(image_root=image_root, source=source, skipped=skipped)
    splits = set()
    for position, ref in enumerate(refs):
        with reading(refs_path, f"ref {position} (from 0)"):
            splits.add(ref["split"])
            if _belongs(ref["split"], split):
                _add(ref, annotation_ids_of(ref), table, builder, text_field, crowds)
    if not any(_belongs(there, split) for there in splits):
        raise MissingSplitError(
            f"{refs_path}: no ref belongs to split {split!r}; the file has {sorted(splits)}"
        )
    skipped.log(f"{refs_path}, split {split}")
    return builder.records()


def _add(
    ref: dict, named: list, table: InstanceTable, builder: RecordBuilder, field: str, crowds: bool
) -> None:
    image, ref_id, sentences = table.image(ref["image_id"]), as_id(ref["ref_id"]), ref["sentences"]
    made = (table.annotation(id_, image, builder.skipped, crowds=crowds) for id_ in named)
    targets = list(filter(None, made))
    if not sentences:
        builder.skipped.whole("refs without sentences", image["image_id"], ref_id, 0)
    elif named and not targets:
        kind = "refs without an annotation that can be used"
        builder.skipped.whole(kind, image["image_id"], ref_id, len(sentences))
    else:
        for sentence in sentences:
            meant = targets if sentence.get("exist", True) else []
            builder.add(image, sentence["sent_id"], ref_id, sentence[field], meant)


def _belongs(ref_split: str, split: str) -> bool:
    # REFER's rule: a ref of split testAB belongs to testA and to testB (RefCLEF).
    is_lettered_test = len(split) == 5 and split.startswith("test")
    in_several = str.startswith(ref_split, "test") and split[-1] in ref_split[4:]
    return ref_split == split or (is_lettered_test and in_several)
