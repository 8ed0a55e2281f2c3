"""gRefCOCO (single, multi, no target): ``grefs(<splitby>).json``, ``instances.json`` -> records."""

import os

from ..io import load_json, load_pickle
from .records import Skipped
from .refer import records_of_refs


def load_grefer(
    grefs_path: str | os.PathLike,
    instances_path: str | os.PathLike,
    image_root: str,
    split: str,
    *,
    source: str = "grefcoco",
    text_field: str = "raw",
    skipped: Skipped | None = None,
) -> list[dict]:
    """Read one split of gRefCOCO (github.com/henghuiding/gRefCOCO).

    As ``load_refer``, except that ``ann_id`` is a list; ``[-1]`` or ``no_target: true`` gives
    expressions with ``annotation_ids == []``. Annotations of crowds are no part of the ground truth,
    as in ReLA (gres_model/data/datasets/grefcoco.py); a ref with no other target is left out.

    Args:
        grefs_path: ``grefs(unc).json``, or the same list as a pickle, ``grefs(unc).p``.
    """
    is_pickle = os.fspath(grefs_path).endswith(".p")
    return records_of_refs(
        load_pickle(grefs_path) if is_pickle else load_json(grefs_path),
        refs_path=grefs_path,
        instances_path=instances_path,
        image_root=image_root,
        split=split,
        source=source,
        text_field=text_field,
        annotation_ids_of=_annotation_ids,
        crowds=False,
        skipped=skipped,
    )


def _annotation_ids(ref: dict) -> list[int]:
    ids, no_target = ref["ann_id"], ref.get("no_target", False)
    ids = ids if isinstance(ids, list) else [ids]
    if ids == [-1] or (no_target is True and not ids):
        return []
    if no_target is not False or not ids:
        raise ValueError(
            f"field 'ann_id' is {ids} and 'no_target' is {no_target!r}; no target is [-1], "
            "anything else lists annotation ids"
        )
    return ids
