"""What a method looked at: attention maps, the tokens that its decoder compared, and how
sharply."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Explanation:
    """What explains the masks of E expressions, float tensors; those given are drawn.

    Attributes:
        maps: name -> (E, h, w), where in the model's input each expression looks, or (E, L, h, w),
            the same for each of its L tokens (rows of padding are not drawn). Any h, w; the map
            covers the whole input.
        entropy: name -> (E,), mean entropy in nats of an attention's rows (``row_entropy``).
        pixels: (E, h, w, D), the vision tokens that the decoder's first attention takes in; None if
            the method has no such attention.
        tokens: (E, K, D), what it takes in as keys; with ``pixels``.
        attended: (E, K), 1 where one of the tokens may be attended, 0 where it is masked (padding,
            excluded cue); with ``pixels``.
    """

    maps: dict[str, Tensor]
    entropy: dict[str, Tensor] = field(default_factory=dict)
    pixels: Tensor | None = None
    tokens: Tensor | None = None
    attended: Tensor | None = None

    def apply(self, function: Callable[[Tensor], Tensor]) -> "Explanation":
        """``function`` of every tensor."""
        return Explanation(
            **{f.name: _apply(function, getattr(self, f.name)) for f in fields(self)}
        )

    @classmethod
    def concatenate(cls, parts: Sequence["Explanation"]) -> "Explanation":
        """The expressions of one part after the other; all parts have the same names."""
        return cls(**{f.name: _cat([getattr(p, f.name) for p in parts]) for f in fields(cls)})


def _apply(function: Callable[[Tensor], Tensor], value: Any) -> Any:
    if isinstance(value, dict):
        return {name: function(tensor) for name, tensor in value.items()}
    return None if value is None else function(value)


def _cat(values: Sequence[Any]) -> Any:
    if isinstance(values[0], dict):
        return {name: torch.cat([value[name] for value in values]) for name in values[0]}
    return None if values[0] is None else torch.cat(list(values))
