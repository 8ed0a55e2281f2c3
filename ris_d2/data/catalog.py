"""Datasets in detectron2's catalogs: names, splits, files; mixtures without leaked images."""

import difflib
import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog

from ..io import dataset_root, without_collecting
from .classes import GROUPS, select_classes
from .grefer import load_grefer
from .listening import with_other_sentences
from .phrasecut import load_phrasecut
from .records import Skipped, forget_files
from .refclef import load_refclef
from .refer import MissingSplitError, load_refer
from .refzom import load_refzom
from .ris_json import load_ris_json

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Dataset:
    """One dataset with one division into splits, and where its files lie under the root.

    Its splits are registered as ``<name>_<split>``; all but train are for evaluation, and of these
    so is ``<split>_other``, in which each sentence is another one's. With ``by_class`` (one target
    of a known class per expression) so are ``train_seen`` and, for each other split,
    ``<split>_seen``, ``<split>_unseen``, and ``<split>_open`` with both.
    """

    name: str
    source: str
    splits: tuple[str, ...]
    image_root: str
    # The files of a split: annotation files first, then what they refer to (instances, images).
    files: tuple[str, ...]
    # (*files, image root, split, source=, skipped=) -> records
    reader: Callable[..., list[dict]]
    by_class: bool = False

    def paths(self, root: str, split: str) -> list[str]:
        """The annotation files of ``split`` under ``root``."""
        return [os.path.join(root, file.format(split=split)) for file in self.files]

    def derived_splits(self) -> tuple[str, ...]:
        """The names of the splits that are made from others; the first split is train."""
        kinds = ("other", *GROUPS, "open") if self.by_class else ("other",)
        evaluation = [f"{split}_{kind}" for split in self.splits[1:] for kind in kinds]
        return ("train_seen", *evaluation) if self.by_class else tuple(evaluation)

    @without_collecting()
    def load(self, root: str, split: str, *, skipped: Skipped | None = None) -> list[dict]:
        """Read the records of ``split`` from the files under ``root``.

        Args:
            skipped: counts what cannot be used in the file.
        """
        whole, _, kind = split.partition("_")
        paths, image_root = self.paths(root, whole), os.path.join(root, self.image_root)
        _check_there(f"{self.name}_{split}", paths)
        records = self.reader(*paths, image_root, whole, source=self.source, skipped=skipped)
        if not kind:
            return records
        if kind == "other":
            return with_other_sentences(records)
        groups = GROUPS if kind == "open" else (kind,)
        return select_classes(records, groups, instances_path=paths[1], name=f"{self.name}_{whole}")


_UNC, _TWO, _THREE = ("train", "val", "testA", "testB"), ("train", "val"), ("train", "val", "test")


def _refer(folder: str, splitby: str, splits: tuple[str, ...], **changes) -> Dataset:
    """A dataset whose files lie as those of RefCOCO do."""
    values = {
        "name": f"ris_{folder}_{splitby}",
        "source": folder,
        "splits": splits,
        "image_root": "images/train2014",
        "files": (f"{folder}/refs({splitby}).p", f"{folder}/instances.json"),
        "reader": load_refer,
    }
    return Dataset(**(values | changes))


_REFCOCO = _refer("refcoco", "unc", _UNC, by_class=True)
_GREFCOCO = _refer(
    "grefcoco",
    "unc",
    _UNC,
    files=("grefcoco/grefs(unc).json", "grefcoco/instances.json"),
    reader=load_grefer,
)
_REFZOM = {"name": "ris_refzom_final", "source": "refzom", "image_root": "images"}
_REFCLEF = {"image_root": "images/saiapr_tc-12", "reader": load_refclef}


def _refshapes(version: str = "") -> list[Dataset]:
    """RefShapes is laid out as a root of its own, in the formats of RefCOCO and gRefCOCO."""
    folder = f"refshapes{version}"
    return [
        replace(
            dataset,
            name=f"ris_{name}{version}",
            source=f"{name}{version}",
            splits=dataset.splits + more_splits,
            image_root=f"{folder}/{dataset.image_root}",
            files=tuple(f"{folder}/{file}" for file in dataset.files),
        )
        for dataset, name, more_splits in (
            (_REFCOCO, "refshapes", ()),
            (_GREFCOCO, "grefshapes", ("heldout",)),
        )
    ]


DATASETS: tuple[Dataset, ...] = (
    _REFCOCO,
    _refer("refcoco+", "unc", _UNC, by_class=True),
    _refer("refcocog", "umd", _THREE, by_class=True),
    _refer("refcocog", "google", _TWO, by_class=True),
    _GREFCOCO,
    *(_refer(f"r{name}", "unc", _TWO) for name in ("refcoco", "refcoco+", "refcocog")),
    _refer("ref-zom", "final", ("train", "test"), reader=load_refzom, **_REFZOM),
    _refer("rrsisd", "unc", _THREE, image_root="images/rrsisd/JPEGImages"),
    _refer("refclef", "unc", (*_UNC, "testC"), **_REFCLEF),
    _refer("refclef", "berkeley", _THREE, **_REFCLEF),
    Dataset(
        name="ris_phrasecut",
        source="phrasecut",
        splits=(*_THREE, "miniv"),
        image_root="phrasecut/images",
        files=("phrasecut/refer_{split}.json", "phrasecut/image_data_split.json"),
        # One file per split.
        reader=lambda *paths_and_split, **options: load_phrasecut(*paths_and_split[:-1], **options),
    ),
    *_refshapes(),
    *_refshapes("_hard_v1"),
)

# Training sets of several datasets.
MIXTURES: dict[str, tuple[str, ...]] = {
    "ris_refcoco_mixed_train": tuple(
        f"ris_{name}_train" for name in ("refcoco_unc", "refcoco+_unc", "refcocog_umd")
    ),
    "ris_grefcoco_unc_train_full": ("ris_grefcoco_unc_train", "ris_refcoco_unc_train"),
}


_SPLITS = {
    f"{dataset.name}_{split}": (dataset, split)
    for dataset in DATASETS
    for split in dataset.splits + dataset.derived_splits()
}
# Another name, as ReLA has it.
_SPLITS |= {
    name.replace("refcoco+", "refcocop"): value
    for name, value in _SPLITS.items()
    if name.startswith("ris_refcoco+")
}


def register_all() -> None:
    """Register every dataset and mixture in detectron2's catalogs; files are read when asked for.

    The root, $DETECTRON2_DATASETS, is looked up here for the metadata and again at each reading.
    Repeated calls change nothing, or follow a changed root.
    """
    for name in [*_SPLITS, *MIXTURES]:
        if name not in DatasetCatalog:
            DatasetCatalog.register(name, partial(_load_registered, name))
        _set_metadata(name)


def _load_registered(name: str) -> list[dict]:
    if name in MIXTURES:
        return load_records([name], drop_eval_images=True)
    _set_metadata(name)
    dataset, split = _SPLITS[name]
    return dataset.load(dataset_root(), split)


def _set_metadata(name: str) -> None:
    values = {"evaluator_type": "referring"}
    if name in _SPLITS:
        (dataset, split), root = _SPLITS[name], dataset_root()
        values["image_root"] = os.path.join(root, dataset.image_root)
        values["source"], values["split"] = dataset.source, split
        values["annotation_files"] = dataset.paths(root, split.partition("_")[0])
    metadata = MetadataCatalog.get(name)
    if metadata.get("image_root") not in (None, values.get("image_root")):
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
    values = {
        "evaluator_type": "referring",
        "image_root": os.path.abspath(image_root),
        "source": source,
        "annotation_files": [os.path.abspath(json_file)],
    }
    metadata = MetadataCatalog.get(name)
    if name in DatasetCatalog and any(metadata.get(k) != value for k, value in values.items()):
        raise ValueError(f"the dataset name {name!r} is taken; choose another for {json_file}")
    if name not in DatasetCatalog:
        paths = os.path.abspath(json_file), os.path.abspath(image_root)
        DatasetCatalog.register(name, partial(load_ris_json, *paths, source=source))
    metadata.set(**values)


def register_from_config(cfg: CfgNode) -> None:
    """Register the datasets of DATASETS.RIS_JSON; calling it again changes nothing.

    Raises:
        ValueError: an entry is no (name, json file, image folder), or its name is taken.
    """
    for entry in cfg.DATASETS.RIS_JSON:
        if [*map(type, entry)] != [str] * 3:
            raise ValueError(
                f"DATASETS.RIS_JSON: {entry!r} has not the three: [name, json file, image folder]"
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
        known = sorted(
            other
            for other in DatasetCatalog.list()
            if MetadataCatalog.get(other).get("evaluator_type") == "referring"
        )
        close = difflib.get_close_matches(name, DatasetCatalog.list(), 1)
        hint = f"did you mean {close[0]}? " if close else ""
        raise ValueError(f"unknown dataset {name!r}; {hint}known: {', '.join(known)}")
    for member in MIXTURES.get(name, (name,)):
        if member in _SPLITS:
            _set_metadata(member)
        metadata = MetadataCatalog.get(member)
        paths = [*metadata.get("annotation_files", ()), metadata.get("image_root", ".")]
        _check_there(member, paths)


def _check_there(name: str, paths: Sequence[str]) -> None:
    missing = [os.path.abspath(path) for path in paths if not os.path.exists(path)]
    if missing:
        raise FileNotFoundError(
            f"{name}: no such file: {', '.join(missing)}. $DETECTRON2_DATASETS is "
            f"{dataset_root()!r}; datasets/README.md says where to get the files"
        )


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
    datasets = [_SPLITS.get(name, (name,))[0] for name in members]
    parts = []
    eval_images = {}  # of each dataset; read beside its training split, for their files are shared
    for name, dataset in zip(members, datasets):
        parts.append(DatasetCatalog.get(name))
        is_mixed = drop_eval_images and len(set(datasets)) > 1
        if is_mixed and isinstance(dataset, Dataset) and dataset not in eval_images:
            eval_images[dataset] = _eval_images(dataset)
        forget_files()
    if eval_images:
        dropped = set().union(*eval_images.values())
        parts = [_without(part, dropped, name) for name, part in zip(members, parts)]
    return [record for part in parts for record in part]


def annotation_files(names: Sequence[str]) -> list[str]:
    """The files that these names' records come from; [] where more than files decides on them."""
    files = set()
    for name in (member for name in names for member in MIXTURES.get(name, (name,))):
        dataset, split = _SPLITS.get(name, (None, None))
        # Those by class read one more file and say what they found; RefCLEF looks for images.
        if not dataset or split not in dataset.splits or dataset.reader is load_refclef:
            return []
        for split in dataset.splits:
            files.update(dataset.paths(dataset_root(), split))
    return sorted(map(os.path.abspath, files))


def _eval_images(dataset: Dataset) -> set[str]:
    images = set()
    for split in dataset.splits[1:]:  # the first is train
        try:
            images.update(map(image_key, dataset.load(dataset_root(), split)))
        except (FileNotFoundError, MissingSplitError) as error:
            raise type(error)(
                f"{error}. A mixed training set leaves out the images of {dataset.name}_{split}; "
                "with DATASETS.DROP_EVAL_IMAGES False it does not"
            ) from error
    return images


def _without(records: list[dict], eval_images: set[str], name: str) -> list[dict]:
    kept = [record for record in records if image_key(record) not in eval_images]
    before, after = (sum(len(r["expressions"]) for r in part) for part in (records, kept))
    logger.info(
        "%s: dropped %d of %d images (%d of %d expressions) that evaluation splits use",
        *(name, len(records) - len(kept), len(records), before - after, before),
    )
    if records and not kept:
        raise ValueError(
            f"{name}: every image is used by an evaluation split (DATASETS.DROP_EVAL_IMAGES)"
        )
    return kept


def image_key(record: dict) -> str:
    """What identifies a record's image: its file, since image ids collide between families."""
    folder, name = os.path.split(record["file_name"])
    return os.path.join(_real_path(folder), name)


_real_path = lru_cache(maxsize=None)(os.path.realpath)
