"""Hooks that detectron2 lacks."""

import json
import logging
import math
import os

import numpy as np
import torch
from detectron2.engine import HookBase
from detectron2.utils import comm

from ..checkpoint import RISCheckpointer
from ..io import atomic_write, load_json

__all__ = ["BestCheckpoint", "StepSeed"]

logger = logging.getLogger(__name__)


class StepSeed(HookBase):
    """Seed torch from (seed, iteration, rank) before each step.

    Dropout, DropPath and sampled noise then depend on nothing that a resumed run has not got.

    Args:
        seed: >= 0; the same on all processes. May be changed before training starts.
    """

    def __init__(self, seed: int):
        self.seed = seed

    def before_step(self) -> None:
        sequence = np.random.SeedSequence((self.seed, self.trainer.iter, comm.get_rank()))
        torch.manual_seed(int(sequence.generate_state(1, np.uint64)[0]))


class BestCheckpoint(HookBase):
    """Keep the weights of the best evaluation in ``model_best.pth``, on resume too.

    Runs after EvalHook. The score is the mean of ``metric`` over the validation sets ("val" in their
    name) that define it; over all test sets only if none of them is a validation set.
    ``model_best.json`` beside the weights, {"metric", "value", "iteration": optimizer steps done},
    is written after them and read when a resumed training starts.

    Args:
        checkpointer: writes to its ``save_dir``.
        metric: name of a metric, higher is better, as in the evaluators' results.
    """

    def __init__(self, checkpointer: RISCheckpointer, metric: str):
        self._checkpointer = checkpointer
        self._metric = metric
        self._best = -math.inf
        self._record = os.path.join(checkpointer.save_dir, "model_best.json")

    def before_train(self) -> None:
        if self.trainer.start_iter == 0 or not os.path.isfile(self._record):
            return
        best = load_json(self._record)
        if best["metric"] != self._metric:
            logger.warning(
                "%s is about %s; the best %s is sought anew",
                self._record,
                best["metric"],
                self._metric,
            )
            return
        self._best = best["value"]
        logger.info("Best %s so far: %.2f", self._metric, self._best)

    def after_step(self) -> None:
        self._keep_if_better(self.trainer.iter + 1)

    def after_train(self) -> None:
        if self.trainer.iter == self.trainer.max_iter:  # not after a failure
            self._keep_if_better(self.trainer.iter)

    def _keep_if_better(self, steps_done: int) -> None:
        value = self._fresh_score()
        if value is None or value <= self._best:
            return
        self._best = value
        self._checkpointer.save_weights("model_best", iteration=steps_done)
        with atomic_write(self._record) as file:
            json.dump({"metric": self._metric, "value": value, "iteration": steps_done}, file)
        logger.info("Best %s: %.2f after %d iterations", self._metric, value, steps_done)

    def _fresh_score(self) -> float | None:
        """The mean over the sets evaluated at this iteration; None if there is none."""
        storage = self.trainer.storage
        # Results are named <test set>/<task>/<metric> or <task>/<metric>; nothing else has a slash.
        fresh = [
            (name, value)
            for name, (value, iteration) in storage.latest().items()
            if "/" in name and iteration == storage.iter
        ]
        # The best of many evaluations on a test split would be chosen by that split.
        validation = [(name, value) for name, value in fresh if "val" in name.split("/")[0]]
        fresh = [(name.split("/")[-1], value) for name, value in validation or fresh]
        values = [value for metric, value in fresh if metric == self._metric]
        if fresh and not values:
            logger.warning(
                "No best checkpoint: TEST.BEST_METRIC %s is none of %s",
                self._metric,
                ", ".join(sorted({metric for metric, _ in fresh})),
            )
        defined = [value for value in values if math.isfinite(value)]
        return sum(defined) / len(defined) if defined else None
