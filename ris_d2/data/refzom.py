"""Ref-ZOM (zero, one, many targets): ``refs(final).p``, ``instances.json`` -> records."""

import os
import re
from typing import Any

from .refer import load_refer


def load_refzom(refs_path: str | os.PathLike, *where: str, **options: Any) -> list[dict]:
    """Read one split of Ref-ZOM (github.com/toggle1995/RIS-DMMI).

    As ``load_refer``, whose arguments it takes, except that ``ann_id`` is an id or a list of them,
    and that a ref whose ``source`` is "zero" refers to nothing, whatever its ``ann_id``. Images are
    COCO's of 2014, train and val: each lies in the folder that its name says, so that those of
    RefCOCO are the same files.

    Args:
        refs_path: ``Ref-ZOM(final).p``, renamed to ``refs(final).p`` as its authors do.
        where: the other files and the split; image_root has train2014/ and val2014/.
    """
    ours = {"source": "refzom", "annotation_ids_of": _annotation_ids}
    records = load_refer(refs_path, *where, **(ours | options))
    for record in records:
        folder, name = os.path.split(record["file_name"])
        if match := re.match(r"COCO_((?:train|val)2014)_", name):
            record["file_name"] = os.path.join(folder, match[1], name)
    return records


def _annotation_ids(ref: dict) -> list[int]:
    if ref["source"] == "zero":
        return []
    return ref["ann_id"] if isinstance(ref["ann_id"], list) else [ref["ann_id"]]
