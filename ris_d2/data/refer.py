"""RefCOCO, RefCOCO+, RefCOCOg: REFER's ``refs(<splitby>).p``, ``instances.json`` -> records."""

import os
from collections.abc import Callable

from ..io import load_pickle
from .records import RecordBuilder, field, load_instances
from .records import text_field as read_text


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
) -> list[dict]:
    """Read one split of a REFER dataset (github.com/lichengunc/refer).

    Args:
        refs_path: ``refs(unc).p``, ``refs(umd).p`` or ``refs(google).p``.
        instances_path: ``instances.json`` of the same dataset, COCO's format.
        image_root: directory of the images.
        split: train, val, testA, testB, testC or test.
        source: family name kept in the records, e.g. "refcoco".
        text_field: "raw" (the annotator's text) or "sent" (REFER's: lower case, no punctuation).

    Returns:
        One record per image, in the order of the refs; see datasets/README.md.

    Raises:
        FileNotFoundError: one of the two files is missing.
        MissingSplitError: no ref belongs to ``split``.
        ValueError: a field is missing or malformed, an id is unknown or occurs twice, a text is
            empty; names file, record and field.
    """
    return records_of_refs(
        load_pickle(refs_path),
        refs_path=refs_path,
        instances_path=instances_path,
        image_root=image_root,
        split=split,
        source=source,
        text_field=text_field,
        annotation_ids_of=_single_annotation,
    )


def _single_annotation(ref: dict, where: str) -> list[int]:
    return [field(ref, "ann_id", int, where)]


def records_of_refs(
    refs: list,
    *,
    refs_path: str | os.PathLike,
    instances_path: str | os.PathLike,
    image_root: str,
    split: str,
    source: str,
    text_field: str,
    annotation_ids_of: Callable[[dict, str], list],
) -> list[dict]:
    """The part of ``load_refer`` that gRefCOCO and RefCLEF share.

    Args:
        refs: content of ``refs_path``.
        annotation_ids_of: (ref, where) -> the annotation ids that it refers to, [] for none.
    """
    if text_field not in ("raw", "sent"):
        raise ValueError(f"text_field is {text_field!r}, it must be 'raw' or 'sent'")
    if not isinstance(refs, list):
        raise ValueError(f"{refs_path}: must hold a list of refs, not {type(refs).__name__}")
    table = load_instances(instances_path)
    builder = RecordBuilder(image_root=image_root, source=source)
    splits, ref_ids = set(), set()
    for position, ref in enumerate(refs):
        where = f"{refs_path}: ref {position}"
        ref_split = field(ref, "split", str, where)
        splits.add(ref_split)
        if not _belongs(ref_split, split):
            continue
        ref_id = field(ref, "ref_id", int, where)
        if ref_id in ref_ids:
            raise ValueError(f"{where}: ref_id {ref_id} occurs twice in this split")
        ref_ids.add(ref_id)
        where = f"{where} (ref_id {ref_id})"
        image = table.image(field(ref, "image_id", int, where), where)
        annotation_ids = annotation_ids_of(ref, where)
        annotations = [table.annotation(i, image, where) for i in annotation_ids]
        sentences = field(ref, "sentences", list, where)
        if not sentences:
            raise ValueError(f"{where}: field 'sentences' is empty")
        for number, sentence in enumerate(sentences):
            here = f"{where}, sentence {number}"
            builder.add(
                image=image,
                expression_id=field(sentence, "sent_id", int, here),
                ref_id=ref_id,
                text=read_text(sentence, text_field, here),
                annotations=annotations,
                where=here,
            )
    if not ref_ids:
        raise MissingSplitError(
            f"{refs_path}: no ref belongs to split {split!r}; the file has {sorted(splits)}"
        )
    return builder.records()


def _belongs(ref_split: str, split: str) -> bool:
    # REFER's rule: a ref of split testAB belongs to testA and to testB (RefCLEF).
    if ref_split == split:
        return True
    is_lettered_test = len(split) == 5 and split.startswith("test")
    return is_lettered_test and ref_split.startswith("test") and split[4] in ref_split[4:]
