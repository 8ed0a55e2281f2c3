"""Initialisations that several methods share."""

from torch import nn


def init_xavier(module: nn.Module) -> None:
    """For ``Module.apply``: linear layers Xavier-uniform, as transformers start; biases zero."""
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def init_released(module: nn.Module) -> None:
    """For ``Module.apply``: linear layers truncated normal 0.02, as Swin; biases zero."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
