"""One training iteration: one optimizer step over one or several micro-batches."""

import contextlib
import math
import time
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from detectron2.engine import SimpleTrainer
from detectron2.utils import comm
from detectron2.utils.events import get_event_storage
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

__all__ = ["StepTrainer"]


class StepTrainer(SimpleTrainer):
    """SimpleTrainer with gradient accumulation, fp16 loss scaling and full-model clipping.

    Micro-batches are weighted by their expressions over all processes, so that losses which are
    means over expressions have the gradient of the whole batch at once, whatever the sizes; losses
    that are means over something else by what the model's ``loss_counts`` says. (BatchNorm sees
    micro-batches.) Precision is the model's own business; only fp16 needs the scaler here.

    The host does not wait for a GPU: losses and gradient norm of a step are read once the next one
    is on its way, checked, and logged under their own iteration. ``settle`` reads what is left;
    ``state_dict`` checks it, so that no checkpoint has taken a step that is not finite.

    Args:
        model: returns a dict of scalar losses, the same keys on every process and step.
        data_loader: yields ``accumulation`` micro-batches (lists of model inputs) per step.
        optimizer: over the model's parameters.
        accumulation: micro-batches per step.
        clip_grad_norm: largest L2 norm of the gradient of all parameters together; 0 = no clipping.
        grad_scaler: for fp16 only.
    """

    def __init__(
        self,
        model: nn.Module,
        data_loader: Iterable[list[dict]],
        optimizer: torch.optim.Optimizer,
        *,
        accumulation: int = 1,
        clip_grad_norm: float = 0.0,
        grad_scaler: torch.amp.GradScaler | None = None,
    ):
        super().__init__(model, data_loader, optimizer)
        self.accumulation = accumulation
        self.clip_grad_norm = clip_grad_norm
        self.grad_scaler = grad_scaler
        self._unread: list[_Step] = []

    def run_step(self) -> None:
        """Take one optimizer step.

        Raises:
            FloatingPointError: a loss, or (without fp16, whose scaler skips such steps) the
                gradient, is infinite or NaN. Names iteration and samples. On a CPU the parameters
                are those before the step; on a GPU the step before this one is meant.
        """
        if not self.model.training:
            raise RuntimeError("the model was left in evaluation mode")
        start = time.perf_counter()
        batches = [next(self._data_loader_iter) for _ in range(self.accumulation)]
        data_time = time.perf_counter() - start

        self.optimizer.zero_grad()
        shares = _shares(self.model, batches)
        try:
            micro_losses = [
                self._backward(batch, share, last=batch is batches[-1])
                for batch, share in zip(batches, shares, strict=True)
            ]
        except FloatingPointError:
            self.settle()  # it may be what the step before has left
            raise
        if self.grad_scaler:
            self.grad_scaler.unscale_(self.optimizer)
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        norm = get_total_norm([p.grad for p in parameters if p.grad is not None])
        self._unread.append(_Step.of(self.iter, batches, data_time, micro_losses, norm))
        if norm.device.type == "cpu":
            self.settle()  # there is nothing to wait for

        if self.clip_grad_norm > 0:
            clip_grads_with_norm_(parameters, self.clip_grad_norm, norm)
        if self.grad_scaler:
            self.grad_scaler.step(self.optimizer)
            self.grad_scaler.update()
        else:
            self.optimizer.step()
        self.settle(keep=1)

    def settle(self, *, keep: int = 0) -> None:
        """Read, check and log the steps that have not been read, but for the last ``keep``.

        With several processes all call it after the same step.

        Raises:
            FloatingPointError: see ``run_step``.
        """
        while len(self._unread) > keep:
            step = self._unread.pop(0)
            losses, norm = self._check_finite(step)
            storage = get_event_storage()
            now, storage.iter, self.iter = self.iter, step.iteration, step.iteration
            self._write_metrics({k: torch.tensor(v) for k, v in losses.items()}, step.data_time)
            if math.isfinite(norm):
                storage.put_scalar("grad_norm", norm)
            storage.iter = self.iter = now

    def state_dict(self) -> dict[str, Any]:
        for step in self._unread:
            self._check_finite(step)
        state = super().state_dict()
        if self.grad_scaler:
            state["grad_scaler"] = self.grad_scaler.state_dict()
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        if self.grad_scaler and "grad_scaler" in state_dict:  # absent after a change of precision
            self.grad_scaler.load_state_dict(state_dict["grad_scaler"])

    def _backward(
        self, batch: list[dict], shares: dict[str, float], *, last: bool
    ) -> dict[str, Tensor]:
        """Add the gradient of one micro-batch; processes exchange gradients after the last one."""
        waits = isinstance(self.model, DistributedDataParallel) and not last
        with self.model.no_sync() if waits else contextlib.nullcontext():
            losses = self.model(batch)
            for key in losses:
                losses[key] = losses[key] * shares[max(filter(key.startswith, shares), key=len)]
            total = sum(losses.values())
            (self.grad_scaler.scale(total) if self.grad_scaler else total).backward()
        return {key: loss.detach() for key, loss in losses.items()}

    def _check_finite(self, step: "_Step") -> tuple[dict[str, float], float]:
        """The losses of a step, summed over its micro-batches, and the norm of its gradient."""
        *rows, (norm,) = step.read()
        for losses, batch in zip(rows, step.batches, strict=True):
            if not all(map(math.isfinite, losses)):
                described = ", ".join(f"{k} {v}" for k, v in zip(step.names, losses, strict=True))
                raise FloatingPointError(
                    f"loss is not finite at iteration {step.iteration}: {described}; samples: "
                    f"{_names(batch)}"
                )
        if not math.isfinite(norm) and not self.grad_scaler:
            raise FloatingPointError(
                f"the gradient is not finite at iteration {step.iteration}, the losses are; "
                f"samples of this process: {_names([x for batch in step.batches for x in batch])}"
            )
        return dict(zip(step.names, map(sum, zip(*rows)), strict=True)), norm


class _Step(NamedTuple):
    """A step whose losses and gradient norm are on their way to the host."""

    iteration: int
    batches: list[list[dict]]
    data_time: float
    names: list[str]  # of the losses
    values: Tensor  # losses of all micro-batches, then the norm
    copied: torch.cuda.Event | None

    @classmethod
    def of(
        cls,
        iteration: int,
        batches: list[list[dict]],
        data_time: float,
        micro_losses: list[dict[str, Tensor]],
        norm: Tensor,
    ) -> "_Step":
        tensors = [loss for losses in micro_losses for loss in losses.values()]
        values = torch.stack([x.float() for x in (*tensors, norm)]).to("cpu", non_blocking=True)
        copied = None
        if norm.is_cuda and torch.cuda.is_available():
            copied = torch.cuda.Event()
            copied.record()
        return cls(iteration, batches, data_time, list(micro_losses[0]), values, copied)

    def read(self) -> list[tuple[float, ...]]:
        """Losses per micro-batch, and last the norm alone."""
        if self.copied is not None:
            self.copied.synchronize()
        *losses, norm = self.values.tolist()
        count = len(self.names)
        return [tuple(losses[i : i + count]) for i in range(0, len(losses), count)] + [(norm,)]


def _shares(model: nn.Module, batches: Sequence[Sequence[dict]]) -> list[dict[str, float]]:
    """What each micro-batch holds of the step's counts, over all processes.

    Returns:
        per micro-batch: start of a loss's name -> share; "" is that of expressions, for all others.
    """
    if len(batches) == 1:
        return [{"": 1.0}]
    model = model.module if isinstance(model, DistributedDataParallel) else model
    own_counts = getattr(model, "loss_counts", lambda batch: {})
    counts = [
        {"": sum(len(sample["expressions"]) for sample in batch), **own_counts(batch)}
        for batch in batches
    ]
    totals = [
        {name: sum(count[name] for count in ranks) for name in ranks[0]}
        for ranks in zip(*comm.all_gather(counts), strict=True)
    ]
    step = {name: sum(total[name] for total in totals) for name in totals[0]}
    # Without anything to count in the whole step, the loss is 0.
    return [{name: total[name] / (step[name] or 1) for name in step} for total in totals]


def _names(samples: Sequence[dict]) -> str:
    return "; ".join(
        f"{sample['file_name']} (image_id {sample['image_id']}, expression_ids "
        f"{[expression['expression_id'] for expression in sample['expressions']]})"
        for sample in samples
    )
