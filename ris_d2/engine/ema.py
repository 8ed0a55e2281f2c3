"""Exponential moving average of the weights."""

import contextlib
from collections.abc import Iterator

import torch
from detectron2.engine import HookBase
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn


class WeightAverage(HookBase):
    """Averages the trainable parameters after step t with min(decay, (1 + t) / (10 + t)).

    The average starts with the weights that training starts with; the smaller decay of the first
    steps forgets them soon. Buffers are the model's own: BatchNorm's statistics are averages
    already. All processes average the same numbers.

    Args:
        model: the model, or its DistributedDataParallel wrapper.
        decay: SOLVER.RIS.EMA, in [0, 1).
    """

    def __init__(self, model: nn.Module, decay: float):
        model = getattr(model, "module", model)
        self._decay = decay
        self._trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self._average: list[Tensor] = []

    def before_train(self) -> None:
        if not self._average:
            self._average = [p.detach().clone() for p in self._trained.values()]

    def after_step(self) -> None:
        step = self.trainer.iter
        update = get_ema_multi_avg_fn(min(self._decay, (1 + step) / (10 + step)))
        update(self._average, list(self._trained.values()), None)

    @contextlib.contextmanager
    def applied(self) -> Iterator[None]:
        """Within, the model has the average; afterwards again what is being trained."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    def _swap(self) -> None:
        for parameter, average in zip(self._trained.values(), self._average):
            parameter.data, average.data = average.data, parameter.data

    def state_dict(self) -> dict[str, Tensor]:
        """What is being trained; the average is the checkpoint's model."""
        return {name: parameter.detach() for name, parameter in self._trained.items()}

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Tensor]) -> None:
        self.before_train()
        for name, value in state_dict.items():
            self._trained[name].copy_(value)
