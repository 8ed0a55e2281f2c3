"""Object classes held out of training: the seen and unseen parts of a dataset's splits."""

import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass

from ..io import load_json
from .records import field

logger = logging.getLogger(__name__)

GROUPS = ("seen", "unseen")
# The 48 seen and 17 unseen COCO classes of open-vocabulary detection; COCO's other 15 are in neither.
# VIPA's Table IV takes its setting from CGFormer, which publishes no list of classes, only the numbers
# below. That it means these classes is our inference.
COCO_48_17 = os.path.join(os.path.dirname(__file__), "coco_48_17.json")

# Referents of each group according to CGFormer (utils/dataset_open.py). Its RefCOCO and RefCOCO+
# tests are testA and testB together and do not appear here.
PUBLISHED = {
    "ris_refcoco_unc_train": {"seen": 35473},
    "ris_refcoco_unc_val": {"seen": 3175, "unseen": 445},
    "ris_refcoco+_unc_train": {"seen": 35375},
    "ris_refcoco+_unc_val": {"seen": 3171, "unseen": 444},
    "ris_refcocog_umd_train": {"seen": 33093},
    "ris_refcocog_umd_val": {"seen": 2000, "unseen": 386},
    "ris_refcocog_umd_test": {"seen": 3935, "unseen": 759},
    "ris_refcocog_google_train": {"seen": 35105},
    "ris_refcocog_google_val": {"seen": 3923, "unseen": 760},
}


@dataclass(frozen=True, kw_only=True)
class ClassList:
    """Which classes are seen in training and which are not; those in neither are left out."""

    path: str
    seen: frozenset[str]
    unseen: frozenset[str]


def load_class_list(path: str | os.PathLike) -> ClassList:
    """Read {"seen": [class names], "unseen": [class names]}.

    Raises:
        ValueError: a list is missing, empty or not of strings, or a class is in both.
    """
    path, data = str(path), load_json(path)
    groups = {}
    for group in GROUPS:
        names = field(data, group, list, path)
        if not names or not all(isinstance(name, str) for name in names):
            raise ValueError(f"{path}: field {group!r} must be a list of class names")
        groups[group] = frozenset(names)
    both = groups["seen"] & groups["unseen"]
    if both:
        raise ValueError(f"{path}: {sorted(both)} are both seen and unseen")
    return ClassList(path=path, **groups)


def select_classes(
    records: Sequence[dict],
    groups: Sequence[str],
    *,
    classes: ClassList,
    category_names: Sequence[str],
    name: str,
) -> list[dict]:
    """Keep the expressions whose targets all belong to one of the groups, and say how many they are.

    Args:
        records: of one split, as the readers make them; they are not changed.
        groups: "seen", "unseen", or both; with both, an image has a record for each, and the group
            is added to the record's source, so that the evaluator's tables tell them apart.
        category_names: of the contiguous category ids.
        name: of the split, for the log and for the comparison with the published numbers.

    Raises:
        ValueError: a group has no class that the dataset knows, or no expression at all.
    """
    selected = []
    for group in groups:
        members = getattr(classes, group)
        _check_names(members, category_names, group, classes)
        ids = {i for i, category in enumerate(category_names) if category in members}
        own = [r for record in records if (r := _only(record, ids))["expressions"]]
        if not own:
            raise ValueError(
                f"{name}: no expression is about the {group} classes of {classes.path}"
            )
        _report(own, records, group=group, classes=classes, name=name)
        if len(groups) > 1:
            own = [{**record, "source": f"{record['source']} {group}"} for record in own]
        selected += own
    return selected


def _only(record: dict, ids: set[int]) -> dict:
    """The record with those expressions that name annotations of the categories, and no others."""
    inside = {a["id"] for a in record["annotations"] if a["category_id"] in ids}
    expressions = [
        e
        for e in record["expressions"]
        if e["annotation_ids"] and inside.issuperset(e["annotation_ids"])
    ]
    used = {i for e in expressions for i in e["annotation_ids"]}
    annotations = [a for a in record["annotations"] if a["id"] in used]
    return {**record, "annotations": annotations, "expressions": expressions}


def _check_names(
    members: frozenset[str], category_names: Sequence[str], group: str, classes: ClassList
) -> None:
    unknown = members - set(category_names)
    if unknown == members:
        raise ValueError(
            f"{classes.path}: the dataset knows none of the {group} classes; its own are "
            f"{sorted(category_names)}. A seen_unseen.json beside its instances.json takes the "
            "place of the default list"
        )
    if unknown:
        logger.warning(
            "%s: no such class in the dataset: %s", classes.path, ", ".join(sorted(unknown))
        )


def _report(
    own: Sequence[dict], records: Sequence[dict], *, group: str, classes: ClassList, name: str
) -> None:
    count = _referents(own)
    published = PUBLISHED.get(name, {}).get(group)
    if published is None or classes.path != COCO_48_17:
        verdict = "no published number to compare"
    elif published == count:
        verdict = f"the same as CGFormer's {published:,}"
    else:
        verdict = f"CGFormer has {published:,}: not the same classes or files"
    logger.info(
        "%s: %d of %d referents are of the %d %s classes of %s; %s",
        name,
        count,
        _referents(records),
        len(getattr(classes, group)),
        group,
        classes.path,
        verdict,
    )


def _referents(records: Sequence[dict]) -> int:
    return len({e["ref_id"] for record in records for e in record["expressions"]})
