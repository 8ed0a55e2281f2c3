"""Vision and text tokens side by side: the streams of BEiT-3 and of what is built on it."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

Streams = tuple[Tensor | None, Tensor | None]  # vision (B, k, d) and text (B, T, d)


class ModalityPair(nn.ModuleDict):
    """A layer for vision tokens ("A") and one for text ("B"); ``shared`` makes them the same."""

    def __init__(self, make: Callable[[], nn.Module], *, shared: bool = False):
        vision = make()
        super().__init__({"A": vision, "B": vision if shared else make()})

    def forward(self, streams: Streams) -> Streams:
        vision, text = streams
        return (
            None if vision is None else self["A"](vision),
            None if text is None else self["B"](text),
        )


def join(streams: Streams) -> Tensor:
    """Concatenate the modalities that are there along the token axis."""
    present = [x for x in streams if x is not None]
    return present[0] if len(present) == 1 else torch.cat(present, 1)


def split(joint: Tensor, like: Streams) -> Streams:
    """Undo ``join``."""
    vision, text = like
    if vision is None:
        return None, joint
    if text is None:
        return joint, None
    return joint[:, : vision.shape[1]], joint[:, vision.shape[1] :]


def visible_tokens(streams: Streams, text_mask: Tensor | None) -> Tensor | None:
    """Keys that may be attended in the joined streams: bool (B, k+T), or None without text."""
    vision, text = streams
    if text is None:
        return None
    if vision is None:
        return text_mask
    return torch.cat([text_mask.new_ones(vision.shape[:2]), text_mask], 1)
