"""Dataset names and files in detectron2's catalogs; mixtures without leaked images; seen classes."""

import difflib
import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog

from ..io import dataset_root
from .classes import COCO_48_17, GROUPS, load_class_list, select_classes
from .grefer import load_grefer
from .phrasecut import load_phrasecut
from .records import Skipped, forget_instances, load_instances
from .refclef import load_refclef
from .refer import MissingSplitError, load_refer
from .ris_json import load_ris_json

__all__ = [
    "DATASETS",
    "MIXTURES",
    "Dataset",
    "check_files",
    "load_records",
    "register_all",
    "register_from_config",
    "register_ris_json",
]

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Dataset:
    """One dataset with one division into splits, and where its files lie under the root.

    Its splits are registered as ``<name>_<split>``; all but train are for evaluation. Of a dataset
    with one target of a known class per expression, so are ``train_seen`` and, for each other split,
    ``<split>_seen``, ``<split>_unseen``, and ``<split>_open`` with both.
    """

    name: str
    source: str
    splits: tuple[str, ...]
    image_root: str
    # The files of a split: annotation files first, then what they refer to (instances, images).
    files: tuple[str, ...]
    reader: Callable[..., list[dict]]

    def paths(self, root: str, split: str) -> list[str]:
        """The annotation files of ``split`` under ``root``."""
        return [os.path.join(root, file.format(split=split)) for file in self.files]

    def class_splits(self) -> tuple[str, ...]:
        """The names of the splits by object class."""
        if self.reader is not load_refer:
            return ()
        evaluation = [split for split in self.splits if split != "train"]
        return ("train_seen", *(f"{s}_{kind}" for s in evaluation for kind in (*GROUPS, "open")))

    def load(self, root: str, split: str, *, skipped: Skipped | None = None) -> list[dict]:
        """Read the records of ``split`` from the files under ``root``.

        Args:
            skipped: counts what cannot be used in the file of a split that is not by object class.
        """
        if split in self.class_splits():
            return self._load_classes(root, *split.split("_"))
        self.check_files(root, split, images=False)
        paths, image_root = self.paths(root, split), os.path.join(root, self.image_root)
        if self.reader is load_phrasecut:  # one file per split
            return self.reader(*paths, image_root, source=self.source, skipped=skipped)
        return self.reader(*paths, image_root, split, source=self.source, skipped=skipped)

    def check_files(self, root: str, split: str, *, images: bool = True) -> None:
        """Raise FileNotFoundError if files of ``split``, or the folder of images, are missing."""
        paths = self.paths(root, split.split("_")[0] if split in self.class_splits() else split)
        paths += [os.path.join(root, self.image_root)] * images
        missing = [os.path.abspath(path) for path in paths if not os.path.exists(path)]
        if missing:
            raise FileNotFoundError(
                f"{self.name}_{split}: no such file: {', '.join(missing)}. "
                f"The root is $DETECTRON2_DATASETS, now {root!r}; datasets/README.md says where to get "
                "the files, datasets/prepare.py what is there"
            )

    def _load_classes(self, root: str, split: str, kind: str) -> list[dict]:
        records = self.load(root, split)
        instances = self.paths(root, split)[1]
        own_list = os.path.join(os.path.dirname(instances), "seen_unseen.json")
        return select_classes(
            records,
            GROUPS if kind == "open" else (kind,),
            classes=load_class_list(own_list if os.path.exists(own_list) else COCO_48_17),
            category_names=load_instances(instances).category_names(),
            name=f"{self.name}_{split}",
        )


def _refer(name: str, folder: str, splitby: str, splits: tuple[str, ...], **changes) -> Dataset:
    values = {
        "name": name,
        "source": folder,
        "splits": splits,
        "image_root": "images/train2014",
        "files": (f"{folder}/refs({splitby}).p", f"{folder}/instances.json"),
        "reader": load_refer,
    }
    return Dataset(**(values | changes))


def _refshapes(
    dataset: Dataset, name: str, *more_splits: str, folder: str = "refshapes"
) -> Dataset:
    # RefShapes is laid out as a root of its own, in the formats of RefCOCO and gRefCOCO.
    return Dataset(
        name=f"ris_{name}",
        source=name,
        splits=dataset.splits + more_splits,
        image_root=f"{folder}/{dataset.image_root}",
        files=tuple(f"{folder}/{file}" for file in dataset.files),
        reader=dataset.reader,
    )


_UNC = ("train", "val", "testA", "testB")
_REFCOCO = _refer("ris_refcoco_unc", "refcoco", "unc", _UNC)
_REFCOCO_PLUS = _refer("ris_refcoco+_unc", "refcoco+", "unc", _UNC)
_GREFCOCO = _refer(
    "ris_grefcoco_unc",
    "grefcoco",
    "unc",
    _UNC,
    files=("grefcoco/grefs(unc).json", "grefcoco/instances.json"),
    reader=load_grefer,
)
_REFCLEF = {"image_root": "images/saiapr_tc-12", "reader": load_refclef}

DATASETS: tuple[Dataset, ...] = (
    _REFCOCO,
    _REFCOCO_PLUS,
    _refer("ris_refcocog_umd", "refcocog", "umd", ("train", "val", "test")),
    _refer("ris_refcocog_google", "refcocog", "google", ("train", "val")),
    _GREFCOCO,
    _refer("ris_refclef_unc", "refclef", "unc", _UNC + ("testC",), **_REFCLEF),
    _refer("ris_refclef_berkeley", "refclef", "berkeley", ("train", "val", "test"), **_REFCLEF),
    Dataset(
        name="ris_phrasecut",
        source="phrasecut",
        splits=("train", "val", "test", "miniv"),
        image_root="phrasecut/images",
        files=("phrasecut/refer_{split}.json", "phrasecut/image_data_split.json"),
        reader=load_phrasecut,
    ),
    _refshapes(_REFCOCO, "refshapes"),
    _refshapes(_GREFCOCO, "grefshapes", "heldout"),
    _refshapes(_REFCOCO, "refshapes_hard_v1", folder="refshapes_hard_v1"),
    _refshapes(_GREFCOCO, "grefshapes_hard_v1", "heldout", folder="refshapes_hard_v1"),
)

# Other names of the same dataset, as ReLA has them.
_ALIASES = {"ris_refcocop_unc": "ris_refcoco+_unc"}

# Training sets of several datasets.
MIXTURES: dict[str, tuple[str, ...]] = {
    "ris_refcoco_mixed_train": (
        "ris_refcoco_unc_train",
        "ris_refcoco+_unc_train",
        "ris_refcocog_umd_train",
    ),
    "ris_grefcoco_unc_train_full": ("ris_grefcoco_unc_train", "ris_refcoco_unc_train"),
}


def _names() -> dict[str, tuple[Dataset, str]]:
    by_name = {dataset.name: dataset for dataset in DATASETS}
    named = {**by_name, **{alias: by_name[name] for alias, name in _ALIASES.items()}}
    return {
        f"{name}_{split}": (dataset, split)
        for name, dataset in named.items()
        for split in dataset.splits + dataset.class_splits()
    }


_SPLITS = _names()


def register_all() -> None:
    """Register every dataset and mixture in detectron2's catalogs; files are read when asked for.

    The root, $DETECTRON2_DATASETS, is looked up here for the metadata and again at each reading.
    Repeated calls change nothing, or follow a changed root.
    """
    root = dataset_root()
    for name in [*_SPLITS, *MIXTURES]:
        if name not in DatasetCatalog:
            DatasetCatalog.register(name, partial(_load_registered, name))
        if name in _SPLITS:
            _set_metadata(name, root)
        else:
            MetadataCatalog.get(name).set(evaluator_type="referring")


def _load_registered(name: str) -> list[dict]:
    if name in MIXTURES:
        return load_records([name], drop_eval_images=True)
    dataset, split = _SPLITS[name]
    root = dataset_root()
    _set_metadata(name, root)
    return dataset.load(root, split)


def _set_metadata(name: str, root: str) -> None:
    dataset, split = _SPLITS[name]
    paths = dataset.paths(root, split)
    values = {
        "evaluator_type": "referring",
        "image_root": os.path.join(root, dataset.image_root),
        "source": dataset.source,
        "split": split,
        "annotation_files": paths,
    }
    if MetadataCatalog.get(name).get("annotation_files", paths) != paths:
        MetadataCatalog.remove(name)  # detectron2's metadata cannot be changed, and the root was
    MetadataCatalog.get(name).set(**values)


def register_ris_json(
    name: str,
    json_file: str | os.PathLike,
    image_root: str | os.PathLike,
    *,
    source: str = "custom",
) -> None:
    """Register a dataset in the custom format (datasets/README.md) under ``name``.

    Args:
        name: as used in DATASETS.TRAIN and DATASETS.TEST.
        json_file: read when the dataset is first asked for.
        image_root: directory in front of the images' file names.
        source: family name kept in the records.

    Raises:
        ValueError: ``name`` is taken by another dataset.
    """
    files = [os.path.abspath(json_file)]
    image_root = os.path.abspath(image_root)
    values = {
        "evaluator_type": "referring",
        "image_root": image_root,
        "source": source,
        "annotation_files": files,
    }
    metadata = MetadataCatalog.get(name)
    if name not in DatasetCatalog:
        DatasetCatalog.register(name, partial(load_ris_json, files[0], image_root, source=source))
    elif any(metadata.get(key) != value for key, value in values.items()):
        raise ValueError(f"the dataset name {name!r} is taken; choose another for {json_file}")
    metadata.set(**values)


def register_from_config(cfg: CfgNode) -> None:
    """Register the datasets of DATASETS.RIS_JSON; calling it again changes nothing.

    Raises:
        ValueError: an entry is no (name, json file, image folder), or its name is taken.
    """
    for entry in cfg.DATASETS.RIS_JSON:
        if len(entry) != 3 or not all(isinstance(part, str) for part in entry):
            raise ValueError(
                f"DATASETS.RIS_JSON: {entry!r} must be three texts: name, json file, image folder"
            )
        name, json_file, image_root = entry
        register_ris_json(name, _found(json_file), _found(image_root))


def _found(path: str) -> str:
    path = os.path.expanduser(path)
    under_root = os.path.join(dataset_root(), path)
    return under_root if not os.path.exists(path) and os.path.exists(under_root) else path


def check_files(name: str) -> None:
    """Look whether the files of a registered dataset are there, without reading them.

    Raises:
        FileNotFoundError: annotation files or the folder of images are missing.
        ValueError: no such dataset; the message lists what is known.
    """
    if name not in DatasetCatalog:
        known = sorted(n for n in DatasetCatalog.list() if n.startswith("ris_") or _is_referring(n))
        close = difflib.get_close_matches(name, known, 1)
        hint = f"did you mean {close[0]}? " if close else ""
        raise ValueError(f"unknown dataset {name!r}; {hint}known: {', '.join(known)}")
    for member in MIXTURES.get(name, (name,)):
        if member in _SPLITS:
            dataset, split = _SPLITS[member]
            dataset.check_files(dataset_root(), split)
            continue
        metadata = MetadataCatalog.get(member)
        files = [*metadata.get("annotation_files", ()), metadata.get("image_root", ".")]
        missing = [path for path in files if not os.path.exists(path)]
        if missing:
            raise FileNotFoundError(f"dataset {member}: no such file: {', '.join(missing)}")


def _is_referring(name: str) -> bool:
    return MetadataCatalog.get(name).get("evaluator_type") == "referring"


def load_records(names: Sequence[str], *, drop_eval_images: bool) -> list[dict]:
    """Read and concatenate datasets for training.

    Args:
        names: registered names; a mixture stands for its members.
        drop_eval_images: DATASETS.DROP_EVAL_IMAGES; where the names belong to more than one
            dataset, leave out every image that an evaluation split (all but train) of any uses.

    Returns:
        The records of one name after the other. An image that several datasets use has a record
        from each.

    Raises:
        KeyError: a name is not registered.
        FileNotFoundError, MissingSplitError: as the readers; also where only the evaluation splits
            of a mixture are missing.
        ValueError: as the readers; or nothing is left of a dataset.
    """
    members = [member for name in names for member in MIXTURES.get(name, (name,))]
    datasets = [_SPLITS[name][0] if name in _SPLITS else name for name in members]
    drop = drop_eval_images and len(set(datasets)) > 1
    parts, eval_images, done = [], set(), set()
    for name, dataset in zip(members, datasets):
        parts.append(DatasetCatalog.get(name))
        if drop and isinstance(dataset, Dataset) and dataset not in done:
            done.add(dataset)
            eval_images |= _eval_images(dataset)
    forget_instances()
    if drop:
        parts = [_without(part, eval_images, name) for name, part in zip(members, parts)]
    return [record for part in parts for record in part]


def _eval_images(dataset: Dataset) -> set[str]:
    root = dataset_root()
    images = set()
    for split in dataset.splits:
        if split == "train":
            continue
        try:
            records = dataset.load(root, split)
        except (FileNotFoundError, MissingSplitError) as error:
            raise type(error)(
                f"{error}. {dataset.name}_{split} is needed because a mixed training set leaves "
                "out the images of its members' evaluation splits; DATASETS.DROP_EVAL_IMAGES False "
                "trains without leaving out any"
            ) from error
        images.update(image_key(record) for record in records)
    return images


def _without(records: list[dict], eval_images: set[str], name: str) -> list[dict]:
    kept = [record for record in records if image_key(record) not in eval_images]
    logger.info(
        "%s: dropped %d of %d images (%d of %d expressions) that evaluation splits use",
        name,
        len(records) - len(kept),
        len(records),
        _expressions(records) - _expressions(kept),
        _expressions(records),
    )
    if records and not kept:
        raise ValueError(
            f"{name}: every image is used by an evaluation split; it cannot be part of a mixed "
            "training set unless DATASETS.DROP_EVAL_IMAGES is False"
        )
    return kept


def _expressions(records: list[dict]) -> int:
    return sum(len(record["expressions"]) for record in records)


def image_key(record: dict) -> str:
    """What identifies a record's image: its file, since image ids collide between families."""
    folder, name = os.path.split(record["file_name"])
    return os.path.join(_real_path(folder), name)


@lru_cache(maxsize=None)
def _real_path(folder: str) -> str:
    return os.path.realpath(folder)
