"""Loaders of training units and of test images with all their expressions."""

import functools
import itertools
import logging
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import cv2
import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog
from detectron2.data.common import DatasetFromList, MapDataset
from detectron2.utils import comm
from torch.utils.data import DataLoader, Dataset

from ..io import without_collecting
from ..processes import die_with_parent
from .cache import MappedRecords, cached, ref_ids
from .catalog import annotation_files, load_records
from .mapper import ReferringMapper
from .nsc import ConversionLog, NonReferentConversion, SentencePool
from .units import Draws, Units, build_units, take

logger = logging.getLogger(__name__)

Mapper = Callable[..., dict]


@without_collecting()
def build_train_loader(cfg: CfgNode, *, mapper: Mapper | None = None) -> "ResumableTrainLoader":
    """Build the endless loader of this process over DATASETS.TRAIN.

    Args:
        cfg: SOLVER.IMS_PER_BATCH counts units per optimizer step, over all processes and
            SOLVER.RIS.ACCUMULATION micro-batches. SEED < 0 draws a seed that all processes share.
        mapper: called as mapper(unit, rng); ReferringMapper(cfg, is_train=True) by default.

    Raises:
        ValueError: no training data, or a batch that processes and micro-batches cannot share
            equally.
    """
    names, options = cfg.DATASETS.TRAIN, {"drop_eval_images": cfg.DATASETS.DROP_EVAL_IMAGES}
    files = annotation_files(names)
    records = cached(lambda: load_records(names, **options), names, files, **options)
    units = build_units(records, cfg.INPUT.RIS.UNIT, max_expressions=cfg.INPUT.MAX_EXPRESSIONS)
    if not len(units):
        raise ValueError(f"DATASETS.TRAIN {tuple(cfg.DATASETS.TRAIN)} has no expressions")
    logger.info(
        f"{len(units)} training units ({cfg.INPUT.RIS.UNIT}) in {len(records)} images of "
        f"{', '.join(cfg.DATASETS.TRAIN)}"
    )
    nsc = cfg.INPUT.RIS.NSC
    conversion = NonReferentConversion(
        rate=nsc.RATE, min_words=nsc.MIN_WORDS, max_similarity=nsc.SIMILARITY, rules=nsc.RULES
    )
    return ResumableTrainLoader(
        records=records,
        units=units,
        mapper=mapper or ReferringMapper(cfg, is_train=True),
        conversion=conversion if conversion.rate else None,
        seed=cfg.SEED if cfg.SEED >= 0 else comm.shared_random_seed(),
        units_per_step=cfg.SOLVER.IMS_PER_BATCH,
        accumulation=cfg.SOLVER.RIS.ACCUMULATION,
        num_workers=cfg.DATALOADER.NUM_WORKERS,
        rank=comm.get_rank(),
        world_size=comm.get_world_size(),
    )


@dataclass(kw_only=True, eq=False, repr=False)
class ResumableTrainLoader:
    """Micro-batches that are a function of the seed and the optimizer step alone.

    They are the same with any number of workers, and from step k on the same whether the run came
    from step 0 or resumed at k. Several processes share the draws of a step.

    Args:
        records, units: see :func:`ris_d2.data.units.build_units`.
        mapper: mapper(unit record, rng) -> model input.
        conversion: of some units' sentences, before they are mapped.
        seed: of all data randomness; a resumed run sets the one it was started with.
        units_per_step: of all processes and micro-batches together.
        accumulation: micro-batches per optimizer step.
        start: optimizer step to begin at; set it before the first batch is asked for.

    Raises:
        ValueError: units_per_step is no positive multiple of world_size x accumulation.
    """

    records: Sequence[dict]
    units: Units
    mapper: Mapper
    conversion: Callable[..., dict] | None = None
    seed: int
    units_per_step: int
    accumulation: int = 1
    num_workers: int = 0
    rank: int = 0
    world_size: int = 1
    start: int = 0

    def __post_init__(self) -> None:
        if self.accumulation < 1:
            raise ValueError(f"SOLVER.RIS.ACCUMULATION must be at least 1, not {self.accumulation}")
        if self.units_per_step < 1 or self.units_per_step % (self.world_size * self.accumulation):
            raise ValueError(
                f"SOLVER.IMS_PER_BATCH {self.units_per_step} is not a multiple of "
                f"{self.world_size} processes x SOLVER.RIS.ACCUMULATION {self.accumulation}"
            )
        self.records = _shared(self.records)
        if self.conversion:
            self.conversion = functools.partial(self.conversion, pool=SentencePool(self.records))

    @property
    def units_per_epoch(self) -> int:
        """Draws until each unit was seen once."""
        return len(self.units)

    def __iter__(self) -> Iterator[list[dict]]:
        """Yield this process' micro-batches, ``accumulation`` of them per optimizer step.

        A generator: detectron2 0.6 calls iter() in the trainer's constructor, before a checkpoint
        can say where to start.
        """
        draws = Draws(self.units, seed=self.seed)
        first = self.start * self.accumulation * self.world_size + self.rank
        size = self.units_per_step // (self.world_size * self.accumulation)
        loader = DataLoader(
            _DrawnUnits(self.records, draws, self.mapper, self.conversion),
            batch_sampler=(  # the numbers of the draws of each of this process' batches
                list(range(batch * size, (batch + 1) * size))
                for batch in itertools.count(first, self.world_size)
            ),
            num_workers=self.num_workers,
            collate_fn=list,
            worker_init_fn=_init_worker,
            generator=torch.Generator(),  # its own: starting workers draws no global random number
        )
        log = ConversionLog() if self.conversion else None
        for batch in loader:
            if log:
                log.count(batch)
            yield batch


@dataclass(frozen=True)
class _DrawnUnits(Dataset):
    """Draw number -> model input."""

    records: Sequence[dict]
    draws: Draws
    mapper: Mapper
    conversion: Callable[..., dict] | None

    def __getitem__(self, draw: int) -> dict:
        unit, rng = self.draws(draw)
        record = take(self.records[unit.record], unit.expressions)
        if self.conversion is not None:
            record = self.conversion(record, rng=rng)
        return self.mapper(record, rng)


@without_collecting()
def build_test_loader(
    cfg: CfgNode, dataset_name: str, *, mapper: Mapper | None = None
) -> DataLoader:
    """Build this process' loader of a test set: one image with all its expressions per batch.

    Processes take contiguous ranges of images with about equal numbers of expressions, each image
    once; where there are fewer images than processes, some take none.

    Args:
        mapper: called as mapper(record); ReferringMapper(cfg, is_train=False) by default.

    Raises:
        ValueError: the dataset has no expressions.
    """
    records = cached(
        lambda: [record for record in DatasetCatalog.get(dataset_name) if record["expressions"]],
        [dataset_name],
        annotation_files([dataset_name]),
    )
    if not len(records):
        raise ValueError(f"DATASETS.TEST {dataset_name!r} has no expressions")
    counts = [len(ids) for ids in ref_ids(records)]
    mapper = mapper or ReferringMapper(cfg, is_train=False)
    return DataLoader(
        MapDataset(_shared(records), mapper),
        batch_size=1,
        sampler=shard(counts, rank=comm.get_rank(), world_size=comm.get_world_size()),
        num_workers=cfg.DATALOADER.NUM_WORKERS,
        collate_fn=list,
        worker_init_fn=_init_worker,
    )


def _shared(records: Sequence[dict]) -> Sequence[dict]:
    """Records of which all workers have one copy: mapped from the cache, or serialised."""
    is_mapped = isinstance(records, MappedRecords)
    return records if is_mapped else DatasetFromList(records, serialize=True)


def shard(counts: Sequence[int], *, rank: int, world_size: int) -> range:
    """Images of one process: contiguous, each image at one process, expressions about equal.

    Args:
        counts: expressions per image.

    Returns:
        Image indices; the ranges of all ranks in order are all the images in order.
    """
    counts = np.asarray(counts)
    # Each process takes an equal stretch of all expressions; an image goes where the middle one of
    # its own expressions lies.
    middles = np.cumsum(counts) - counts / 2
    edges = counts.sum() * np.array([rank, rank + 1]) / world_size
    first, end = np.searchsorted(middles, edges)
    return range(int(first), int(end))


def _init_worker(worker_id: int) -> None:
    # torch's workers watch their parent only once they have started, which takes them seconds.
    die_with_parent(multiprocessing.parent_process().pid)
    if hasattr(signal, "sigwaitinfo"):
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_obey_parent_alone, daemon=True).start()
    cv2.setNumThreads(0)  # every worker a core; OpenCV's own threads would compete for it


def _obey_parent_alone() -> None:
    # Schedulers and torchrun end whole groups of processes; the training's last step needs its
    # workers.
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
        pass
    os._exit(0)
