"""Tensors that depend on sizes alone."""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn


class Constants(nn.ModuleDict):
    """What ``make(*sizes)`` computes, once for each combination of sizes.

    The tensors are non-persistent buffers: they are in no checkpoint, move with the model and go
    with it.
    """

    def __init__(self, make: Callable[..., Tensor | Iterable[Tensor | None]], *, max_kept: int = 8):
        """
        Args:
            make: from integers, and tuples of them, to a tensor or a few, on the CPU.
            max_kept: combinations of sizes; the oldest is forgotten for another one.
        """
        super().__init__()
        self._make = make
        self._max_kept = max_kept

    def forward(self, *sizes, device: torch.device) -> tuple[Tensor | None, ...]:
        """The tensors for ``sizes``, on ``device``."""
        key = str(sizes)
        kept = self._modules.get(key)
        if kept is None:
            kept = nn.Module()
            # Inference tensors would be of no use to a training that follows.
            with torch.inference_mode(False):
                made = self._make(*sizes)
                for number, tensor in enumerate([made] if isinstance(made, Tensor) else made):
                    moved = None if tensor is None else tensor.to(device)
                    kept.register_buffer(str(number), moved, persistent=False)
            if len(self) >= self._max_kept:
                self._modules.pop(next(iter(self)), None)
            self[key] = kept  # whole: another thread may be asking
        return tuple(kept._buffers.values())
