"""Initialisations that several methods share."""

from torch import nn


def init_xavier(module: nn.Module) -> None:
    """For ``Module.apply``: linear layers Xavier-uniform, as transformers usually start; biases zero."""
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def init_released(module: nn.Module) -> None:
    """For ``Module.apply``: linear layers as Swin and BERT start, truncated normal 0.02; biases zero."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
