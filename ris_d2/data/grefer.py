"""gRefCOCO (single, multi, no target): ``grefs(<splitby>).json``, ``instances.json`` -> records."""

import os
from typing import Any

from .refer import load_refer


def load_grefer(grefs_path: str | os.PathLike, *where: str, **options: Any) -> list[dict]:
    """Read one split of gRefCOCO (github.com/henghuiding/gRefCOCO).

    As ``load_refer``, whose arguments it takes, except that ``ann_id`` is a list; ``[-1]`` or
    ``no_target: true`` gives expressions with ``annotation_ids == []``. Annotations of crowds are
    no part of the ground truth, as in ReLA (gres_model/data/datasets/grefcoco.py); a ref with no
    other target is left out.

    Args:
        grefs_path: ``grefs(unc).json``, or the same list as a pickle, ``grefs(unc).p``.
    """
    ours = {"source": "grefcoco", "annotation_ids_of": _annotation_ids, "crowds": False}
    return load_refer(grefs_path, *where, **(ours | options))


def _annotation_ids(ref: dict) -> list[int]:
    ids, no_target = ref["ann_id"], ref.get("no_target", False)
    ids = ids if isinstance(ids, list) else [ids]
    if ids == [-1] or (no_target is True and not ids):
        return []
    if no_target is not False or not ids:
        raise ValueError(
            f"field 'ann_id' is {ids} and 'no_target' is {no_target!r}; no target is [-1]"
        )
    return ids
