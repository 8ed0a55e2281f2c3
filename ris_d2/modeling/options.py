"""From the configuration to the arguments of a class."""

from collections.abc import Iterable
from typing import Any

from detectron2.config import CfgNode


def arguments(node: CfgNode, *keys: str, **renamed: str) -> dict[str, Any]:
    """Keys of a config node as arguments of the same names in lower case: those named, or all.

    For ``from_config`` of a class whose arguments are its keys; groups of keys are left out.

    Args:
        renamed: argument -> key, where the names differ.
    """
    if not keys and not renamed:
        keys = tuple(key for key in node if not isinstance(node[key], CfgNode))
    renamed |= {key.lower(): key for key in keys}
    return {name: getattr(node, key) for name, key in renamed.items()}


def check_choice(key: str, value: Any, known: Iterable[Any]) -> None:
    """
    Raises:
        ValueError: the value of a config key is not among the known ones; names the key.
    """
    if value not in known:
        raise ValueError(f"{key} is {value!r}, not one of {', '.join(map(repr, known))}")
