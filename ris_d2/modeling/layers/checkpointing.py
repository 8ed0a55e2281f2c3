"""Activation checkpointing: layers are computed once more in the backward pass, to save memory."""

import contextlib
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint


def checkpoint_layers(part: nn.Module) -> int:
    """Let the layers of ``part`` keep only their inputs; the backward pass computes the rest again.

    Results, gradients and what is drawn at random stay the same. Layers are what
    ``layers_to_checkpoint`` of a module in ``part`` gives.

    Returns:
        the number of layers.
    """
    owners = [module for module in part.modules() if hasattr(module, "layers_to_checkpoint")]
    layers = [layer for owner in owners for layer in owner.layers_to_checkpoint()]
    for layer in layers:
        norms = [module for module in layer.modules() if hasattr(module, "running_mean")]
        layer.forward = partial(_forward, layer, norms)
    return len(layers)


def _forward(layer: nn.Module, norms: list[nn.Module], *args: Any, **kwargs: Any) -> Any:
    forward = partial(type(layer).forward, layer)
    tensors = (x for x in (*args, *layer.parameters()) if isinstance(x, torch.Tensor))
    has_backward = torch.is_grad_enabled() and any(x.requires_grad for x in tensors)
    # A compiled graph cannot spare the statistics.
    if not has_backward or (norms and torch.compiler.is_compiling()):
        return forward(*args, **kwargs)
    if norms:
        forward = partial(_count_once, forward, norms, [])
    return checkpoint(forward, *args, use_reentrant=False, **kwargs)


def _count_once(
    forward: Any, norms: list[nn.Module], calls: list, *args: Any, **kwargs: Any
) -> Any:
    """BatchNorm's running statistics take in the batch in the first call alone."""
    calls.append(1)
    with _spare_statistics(norms) if len(calls) > 1 else contextlib.nullcontext():
        return forward(*args, **kwargs)


@contextlib.contextmanager
def _spare_statistics(norms: list[nn.Module]) -> Iterator[None]:
    kept = [dict(norm._buffers) for norm in norms]
    for norm in norms:
        norm._buffers.update(
            {k: None if b is None else b.clone() for k, b in norm._buffers.items()}
        )
    try:
        yield
    finally:  # torch leaves the second computation by an exception, as soon as it has what it needs
        for norm, buffers in zip(norms, kept, strict=True):
            norm._buffers.update(buffers)
