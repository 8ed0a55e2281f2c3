"""gRefCOCO (single, multi, no target): ``grefs(<splitby>).json``, ``instances.json`` -> records."""

import os

from ..io import load_json, load_pickle
from .records import field
from .refer import records_of_refs


def load_grefer(
    grefs_path: str | os.PathLike,
    instances_path: str | os.PathLike,
    image_root: str,
    split: str,
    *,
    source: str = "grefcoco",
    text_field: str = "raw",
) -> list[dict]:
    """Read one split of gRefCOCO (github.com/henghuiding/gRefCOCO).

    As ``load_refer``, except that ``ann_id`` is a list; ``[-1]`` or ``no_target: true`` gives
    expressions with ``annotation_ids == []``.

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
        annotation_ids_of=_annotations,
    )


def _annotations(ref: dict, where: str) -> list[int]:
    value = ref.get("ann_id")
    ids = value if isinstance(value, list) else [value]
    ids = [field({"ann_id": one}, "ann_id", int, where) for one in ids]
    no_target = ref.get("no_target", False)
    if not isinstance(no_target, bool):
        raise ValueError(f"{where}: field 'no_target' must be true or false, not {no_target!r}")
    if ids == [-1] or (no_target and not ids):
        return []
    if no_target or -1 in ids or not ids:
        raise ValueError(
            f"{where}: field 'ann_id' is {ids} and 'no_target' is {no_target}; no target is "
            "[-1], anything else lists annotation ids"
        )
    return ids
