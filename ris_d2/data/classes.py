"""Object classes held out of training: the seen and unseen parts of a dataset's splits."""

import logging
import os
from collections.abc import Sequence

from ..io import load_json, reading
from .records import load_instances
from .units import take

logger = logging.getLogger(__name__)

GROUPS = ("seen", "unseen")
# The 48 seen and 17 unseen COCO classes of open-vocabulary detection; COCO's other 15 are in
# neither. VIPA's Table IV takes its setting from CGFormer, which publishes no list of classes, only
# the numbers below. That it means these classes is our inference.
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


def load_class_list(path: str | os.PathLike) -> dict[str, frozenset[str]]:
    """Read {"seen": [class names], "unseen": [class names]}.

    Raises:
        ValueError: a list is missing, empty or not of strings, or a class is in both.
    """
    with reading(path):
        data = load_json(path)
        for group in GROUPS:
            names = data.get(group)
            if not isinstance(names, list) or {*map(type, names)} != {str}:
                raise ValueError(f"field {group!r} must be a list of class names")
        classes = {group: frozenset(data[group]) for group in GROUPS}
        both = sorted(classes["seen"] & classes["unseen"])
        if both:
            raise ValueError(f"{both} are both seen and unseen")
    return classes


def select_classes(
    records: Sequence[dict], groups: Sequence[str], *, instances_path: str, name: str
) -> list[dict]:
    """Keep the expressions whose targets all belong to one of the groups; log how many they are.

    Args:
        records: of one split, as the readers make them; they are not changed.
        groups: "seen", "unseen", or both; with both, an image has a record for each, and the group
            is added to the record's source, so that the evaluator's tables tell them apart.
        instances_path: the split's instances.json, which names the categories; a seen_unseen.json
            beside it takes the place of ``COCO_48_17``.
        name: of the split, for the log and for the comparison with the published numbers.

    Raises:
        ValueError: a group has no class that the dataset knows, or no expression at all.
    """
    own_list = os.path.join(os.path.dirname(instances_path), "seen_unseen.json")
    path = own_list if os.path.exists(own_list) else COCO_48_17
    classes, category_names = load_class_list(path), load_instances(instances_path).category_names
    selected = []
    for group in groups:
        unknown = classes[group].difference(category_names)
        if unknown == classes[group]:
            raise ValueError(
                f"{path}: the dataset knows none of the {group} classes, but "
                f"{sorted(category_names)}; name them in a seen_unseen.json beside its instances"
            )
        if unknown:
            missing = ", ".join(sorted(unknown))
            logger.warning("%s: no such class in the dataset: %s", path, missing)
        ids = {i for i, category in enumerate(category_names) if category in classes[group]}
        own = [r for record in records if (r := _only(record, ids))["expressions"]]
        if not own:
            raise ValueError(f"{name}: no expression is about the {group} classes of {path}")
        published = PUBLISHED.get(name, {}).get(group) if path == COCO_48_17 else None
        referents = _referents(own)
        if published is None:
            verdict = "no published number to compare"
        elif published == referents:
            verdict = f"the same as CGFormer's {published:,}"
        else:
            verdict = f"CGFormer has {published:,}: not the same classes or files"
        logger.info(
            f"{name}: {referents} of {_referents(records)} referents are of the "
            f"{len(classes[group])} {group} classes of {path}; {verdict}"
        )
        if len(groups) > 1:
            own = [{**record, "source": f"{record['source']} {group}"} for record in own]
        selected += own
    return selected


def _only(record: dict, ids: set[int]) -> dict:
    """The record with those expressions that name annotations of the categories, and no others."""
    inside = {a["id"] for a in record["annotations"] if a["category_id"] in ids}
    chosen = [
        index
        for index, expression in enumerate(record["expressions"])
        if expression["annotation_ids"] and inside.issuperset(expression["annotation_ids"])
    ]
    return take(record, chosen)


def _referents(records: Sequence[dict]) -> int:
    return len({e["ref_id"] for record in records for e in record["expressions"]})
