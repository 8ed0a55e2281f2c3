"""Initialisations that several methods share."""

from torch import nn


def init_xavier(module: nn.Module) -> None:
    """For ``Module.apply``: linear layers Xavier-uniform, as transformers usually start; biases zero."""
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
