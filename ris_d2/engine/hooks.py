"""Hooks that detectron2 lacks."""

import json
import logging
import math
import os
import signal
import threading
from collections.abc import Callable
from operator import index

import numpy as np
import torch
import torch.distributed as dist
from detectron2.engine import HookBase, hooks
from detectron2.utils import comm

from ..checkpoint import RISCheckpointer
from ..io import atomic_write, load_json, reading
from .history import cut_history, has_evaluation, read_history

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


class Evaluation(hooks.EvalHook):
    """EvalHook that makes up, on resume, for an evaluation that was interrupted.

    Checkpoints are written before the evaluation of the same iteration. That metrics.json has its
    metrics says that the evaluation came to its end.

    Args:
        period: iterations between evaluations; 0 = only at the end.
        evaluate: returns a nested dict of metrics.
        output_dir: has metrics.json.
    """

    def __init__(self, period: int, evaluate: Callable[[], dict], output_dir: str):
        super().__init__(period, evaluate)
        self._output_dir = output_dir

    def before_train(self) -> None:
        start, end = self.trainer.start_iter, self.trainer.max_iter
        if comm.is_main_process():
            cut_history(self._output_dir, start or math.inf)
        is_due = 0 < start < end and self._period > 0 and start % self._period == 0
        if not is_due:
            return
        history = read_history(self._output_dir) if comm.is_main_process() else []
        if comm.all_gather(has_evaluation(history, start - 1))[0]:
            return
        logger.info("The evaluation after %d iterations was interrupted: evaluating", start)
        self.trainer.storage.iter = start - 1
        self._do_eval()

    def after_train(self) -> None:
        # The stock hook evaluates after a last step that failed, too.
        if self.trainer.iter >= self.trainer.max_iter:
            super().after_train()


class BestCheckpoint(HookBase):
    """Keep the weights of the best evaluation in ``model_best.pth``, on resume too.

    Runs after Evaluation. The score is the mean of ``metric`` over the validation sets ("val" in
    their name) that define it; over all test sets only if none of them is a validation set.
    ``model_best.json`` beside the weights, {"metric", "value", "iteration": optimizer steps done},
    is written after them and read when a resumed training starts.

    Args:
        checkpointer: writes to its ``save_dir``.
        metric: name of a metric, higher is better, as in the evaluators' results.

    Attributes:
        iteration: optimizer steps that the best weights have seen; 0 where there are none yet.
    """

    def __init__(self, checkpointer: RISCheckpointer, metric: str):
        self._checkpointer = checkpointer
        self._metric = metric
        self._best = -math.inf
        self.iteration = 0
        self._record = os.path.join(checkpointer.save_dir, "model_best.json")

    def before_train(self) -> None:
        if self.trainer.start_iter > 0 and os.path.isfile(self._record):
            self._read_record()
        self._keep_if_better(self.trainer.start_iter)  # of an evaluation that was made up for

    def _read_record(self) -> None:
        best = load_json(self._record)
        with reading(self._record):
            metric, value = str(best["metric"]), float(best["value"])
            iteration = index(best["iteration"])
        if metric != self._metric:
            logger.warning(
                "%s is about %s; the best %s is sought anew", self._record, metric, self._metric
            )
            return
        self._best, self.iteration = value, iteration
        logger.info("Best %s so far: %.2f", metric, value)

    def after_step(self) -> None:
        self._keep_if_better(self.trainer.iter + 1)

    def after_train(self) -> None:
        if self.trainer.iter >= self.trainer.max_iter:  # not after a failure
            self._keep_if_better(self.trainer.iter)

    def _keep_if_better(self, steps_done: int) -> None:
        value = self._fresh_score()
        if value is None or value <= self._best:
            return
        self._best, self.iteration = value, steps_done
        self._checkpointer.save_weights("model_best", iteration=steps_done)
        with atomic_write(self._record) as file:
            json.dump({"metric": self._metric, "value": value, "iteration": steps_done}, file)
        logger.info("Best %s: %.2f after %d iterations", self._metric, value, steps_done)

    def _fresh_score(self) -> float | None:
        """The mean over the sets evaluated at this iteration; None if there is none."""
        storage = self.trainer.storage
        # Results are named <test set>/<task>/<metric> or <task>/<metric>; nothing else has a slash.
        latest = storage.latest().items()
        fresh = {k: value for k, (value, at) in latest if "/" in k and at == storage.iter}
        # The best of many evaluations on a test split would be chosen by that split.
        fresh = {k: value for k, value in fresh.items() if "val" in k.split("/")[0]} or fresh
        values = [value for k, value in fresh.items() if k.split("/")[-1] == self._metric]
        if fresh and not values:
            known = ", ".join(sorted({k.split("/")[-1] for k in fresh}))
            logger.warning(
                f"No best checkpoint: TEST.BEST_METRIC {self._metric} is none of {known}"
            )
        defined = [value for value in values if math.isfinite(value)]
        return sum(defined) / len(defined) if defined else None


class TrainingEnded(BaseException):
    """Ends a training early. No Exception, which detectron2 would log as a failure."""


class EarlyStop(HookBase):
    """Ends the training once ``patience`` evaluations in a row have brought no better checkpoint.

    Runs after BestCheckpoint, on all processes.

    Args:
        best: None on other processes than the main one, which decides.
        patience: SOLVER.RIS.PATIENCE, evaluations.
        period: TEST.EVAL_PERIOD, iterations; at least 1.
    """

    def __init__(self, best: BestCheckpoint | None, patience: int, period: int):
        self._best, self._patience, self._period = best, patience, period

    def before_train(self) -> None:
        self._end_without_progress(self.trainer.start_iter)

    def after_step(self) -> None:
        self._end_without_progress(self.trainer.iter + 1)

    def _end_without_progress(self, steps_done: int) -> None:
        if steps_done % self._period or steps_done >= self.trainer.max_iter:
            return
        best = comm.all_gather(self._best and self._best.iteration)[0]
        if steps_done - best >= self._patience * self._period:
            logger.info(
                f"Training ends after {steps_done} iterations: nothing was better than "
                f"model_best.pth of iteration {best} for {self._patience} evaluations "
                "(SOLVER.RIS.PATIENCE)"
            )
            raise TrainingEnded


class Preempted(SystemExit):
    """Ends the program with 143, as shells say SIGTERM: the training is not done."""

    def __init__(self) -> None:
        super().__init__(128 + signal.SIGTERM)


class Preemption(HookBase):
    """On SIGTERM to any process, saves a checkpoint and ends all of them after the same step.

    Runs on all processes, before Evaluation, which a resumed training makes up for. Whether one has
    been asked to end is summed up over CPU tensors while the next step runs: nobody waits for it,
    and with several processes the training ends one step later than with one.

    Args:
        checkpointer: writes to its ``save_dir``.
    """

    def __init__(self, checkpointer: RISCheckpointer):
        self._checkpointer = checkpointer
        self._is_asked = False
        self._sum: tuple[torch.Tensor, dist.Work] | None = None
        self._handles = threading.current_thread() is threading.main_thread()  # Python's rule

    def before_train(self) -> None:
        if self._handles:
            self._before = signal.signal(signal.SIGTERM, self._ask)

    def after_step(self) -> None:
        if self._someone_was_asked():
            iteration = self.trainer.iter
            if comm.is_main_process():
                self._checkpointer.save(f"model_{iteration:07d}", iteration=iteration)
                logger.info(
                    "SIGTERM: the training ends after %d iterations; --resume goes on",
                    iteration + 1,
                )
            raise Preempted

    def after_train(self) -> None:
        if self._handles:
            signal.signal(signal.SIGTERM, self._before)

    def _ask(self, *_: object) -> None:
        self._is_asked = True

    def _someone_was_asked(self) -> bool:
        """Of one process: now. Of several: before the last call, of which all know the same."""
        if comm.get_world_size() == 1:
            return self._is_asked
        last, self._sum = self._sum, None
        if last:
            last[1].wait()
            if last[0].item():
                return True
        if self.trainer.iter + 1 < self.trainer.max_iter:
            asked = torch.tensor([int(self._is_asked)])
            group = comm._get_global_gloo_group()
            self._sum = asked, dist.all_reduce(asked, group=group, async_op=True)
        return False
