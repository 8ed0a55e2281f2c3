"""One training iteration: one optimizer step over one or several micro-batches."""

import contextlib
import math
import time
from collections.abc import Iterable, Sequence
from typing import Any

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
    micro-batches.) Precision is the model's
    own business; only fp16 needs the scaler here.

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

    def run_step(self) -> None:
        """Take one optimizer step.

        Raises:
            FloatingPointError: a loss, or (without fp16, whose scaler skips such steps) the
                gradient, is infinite or NaN. Names iteration and samples; the parameters are those
                before the step.
        """
        if not self.model.training:
            raise RuntimeError("the model was left in evaluation mode")
        start = time.perf_counter()
        batches = [next(self._data_loader_iter) for _ in range(self.accumulation)]
        data_time = time.perf_counter() - start

        self.optimizer.zero_grad()
        shares = _shares(self.model, batches)
        micro_losses = [
            self._backward(batch, share, last=batch is batches[-1])
            for batch, share in zip(batches, shares, strict=True)
        ]
        if self.grad_scaler:
            self.grad_scaler.unscale_(self.optimizer)
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        norm = get_total_norm([p.grad for p in parameters if p.grad is not None])
        # The only read of the step, after all its work: reading waits for the GPU.
        *micro_losses, norm_value = _read(micro_losses, norm)
        self._check_finite(micro_losses, norm_value, batches)
        total = {
            key: torch.tensor(sum(losses[key] for losses in micro_losses))
            for key in micro_losses[0]
        }
        self._write_metrics(total, data_time)
        if math.isfinite(norm_value):
            get_event_storage().put_scalar("grad_norm", norm_value)

        if self.clip_grad_norm > 0:
            clip_grads_with_norm_(parameters, self.clip_grad_norm, norm)
        if self.grad_scaler:
            self.grad_scaler.step(self.optimizer)
            self.grad_scaler.update()
        else:
            self.optimizer.step()

    def state_dict(self) -> dict[str, Any]:
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

    def _check_finite(
        self,
        micro_losses: Sequence[dict[str, float]],
        norm: float,
        batches: Sequence[Sequence[dict]],
    ) -> None:
        for losses, batch in zip(micro_losses, batches, strict=True):
            if not all(map(math.isfinite, losses.values())):
                described = ", ".join(f"{key} {value}" for key, value in losses.items())
                raise FloatingPointError(
                    f"loss is not finite at iteration {self.iter}: {described}; samples: "
                    f"{_names(batch)}"
                )
        if not math.isfinite(norm) and not self.grad_scaler:
            raise FloatingPointError(
                f"the gradient is not finite at iteration {self.iter}, the losses are; samples of "
                f"this process: {_names([sample for batch in batches for sample in batch])}"
            )


def _read(micro_losses: Sequence[dict[str, Tensor]], norm: Tensor) -> list[Any]:
    """The values of the losses, dict by dict, and then of the norm."""
    tensors = [loss for losses in micro_losses for loss in losses.values()]
    values = iter(torch.stack([tensor.float() for tensor in (*tensors, norm)]).tolist())
    return [{key: next(values) for key in losses} for losses in micro_losses] + [next(values)]


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
