"""Weights: reading files of any published format, placing them, saving and resuming."""

from .checkpointer import RISCheckpointer, load_init
from .converters import convert_state_dict
from .files import read_weights
from .paths import register_path_handlers

register_path_handlers()

__all__ = ["RISCheckpointer", "convert_state_dict", "load_init", "read_weights"]
