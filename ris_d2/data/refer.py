"""RefCOCO, RefCOCO+, RefCOCOg: REFER's ``refs(<splitby>).p``, ``instances.json`` -> records."""

import os
from collections.abc import Callable

from ..io import load_pickle, reading
from .records import RecordBuilder, Skipped, as_id, load_instances, without_crowds


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
) -> list[dict]:
    """Read one split of a REFER dataset (github.com/lichengunc/refer).

    Args:
        refs_path: ``refs(unc).p``, ``refs(umd).p`` or ``refs(google).p``.
        instances_path: ``instances.json`` of the same dataset, COCO's format.
        image_root: directory of the images.
        split: train, val, testA, testB, testC or test.
        source: family name kept in the records, e.g. "refcoco".
        text_field: "raw" (the annotator's text) or "sent" (REFER's: lower case, no punctuation).
        skipped: counts what cannot be used, e.g. refs without sentences; it is logged as well.

    Returns:
        One record per image, in the order of the refs; see datasets/README.md.

    Raises:
        FileNotFoundError: one of the two files is missing.
        MissingSplitError: no ref belongs to ``split``.
        ValueError: the file is damaged or of another format (a field that is missing, an unknown
            id); names file and ref.
    """
    return records_of_refs(
        load_pickle(refs_path),
        refs_path=refs_path,
        instances_path=instances_path,
        image_root=image_root,
        split=split,
        source=source,
        text_field=text_field,
        annotation_ids_of=lambda ref: [ref["ann_id"]],
        skipped=skipped,
    )


def records_of_refs(
    refs: list,
    *,
    refs_path: str | os.PathLike,
    instances_path: str | os.PathLike,
    image_root: str,
    split: str,
    source: str,
    text_field: str,
    annotation_ids_of: Callable[[dict], list],
    crowds: bool = True,
    skipped: Skipped | None = None,
) -> list[dict]:
    """The part of ``load_refer`` that gRefCOCO and RefCLEF share.

    Args:
        refs: content of ``refs_path``.
        annotation_ids_of: ref -> the annotation ids that it refers to, [] for none.
        crowds: keep annotations of crowds among the targets.
    """
    if text_field not in ("raw", "sent"):
        raise ValueError(f"text_field is {text_field!r}, it must be 'raw' or 'sent'")
    if not isinstance(refs, list):
        raise ValueError(f"{refs_path}: must hold a list of refs, not {type(refs).__name__}")
    table = load_instances(instances_path)
    skipped = skipped or Skipped()
    builder = RecordBuilder(image_root=image_root, source=source, skipped=skipped)
    splits, found = set(), False
    for position, ref in enumerate(refs):
        with reading(refs_path, f"ref {position} (from 0)"):
            splits.add(ref["split"])
            if not _belongs(ref["split"], split):
                continue
            found = True
            image, ref_id = table.image(ref["image_id"]), as_id(ref["ref_id"])
            annotation_ids = annotation_ids_of(ref)
            made = (table.annotation(id_, image, skipped) for id_ in annotation_ids)
            annotations = [annotation for annotation in made if annotation]
            if not crowds:
                annotations = without_crowds(annotations, skipped)
            sentences = ref["sentences"]
            if not sentences:
                skipped.whole("refs without sentences", image["image_id"], ref_id, 0)
            elif annotation_ids and not annotations:
                kind = "refs without an annotation that can be used"
                skipped.whole(kind, image["image_id"], ref_id, len(sentences))
            else:
                for sentence in sentences:
                    builder.add(
                        image=image,
                        expression_id=sentence["sent_id"],
                        ref_id=ref_id,
                        text=sentence[text_field],
                        annotations=annotations,
                    )
    if not found:
        raise MissingSplitError(
            f"{refs_path}: no ref belongs to split {split!r}; the file has {sorted(splits)}"
        )
    skipped.log(f"{refs_path}, split {split}")
    return builder.records()


def _belongs(ref_split: str, split: str) -> bool:
    is_test = str.startswith(ref_split, "test")
    # REFER's rule: a ref of split testAB belongs to testA and to testB (RefCLEF).
    if ref_split == split:
        return True
    is_lettered_test = len(split) == 5 and split.startswith("test")
    return is_lettered_test and is_test and split[4] in ref_split[4:]
