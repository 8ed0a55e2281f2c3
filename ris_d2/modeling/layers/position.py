"""Position encodings without parameters."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def sine_position_2d(height: int, width: int, dim: int, *, normalize: bool) -> Tensor:
    """Sine and cosine of rows and columns, as in DETR.

    Args:
        dim: a multiple of 4; the first half of the channels is of the row, the second of the
            column, sine and cosine of each frequency side by side.
        normalize: positions are 2 pi k / (n + 1e-6) for k = 1..n, so that maps of all sizes cover
            the same range; otherwise k itself.

    Returns:
        float32 (height, width, dim)
    """
    frequencies = 1e4 ** (-torch.arange(0, dim // 2, 2) / (dim // 2))

    def encode(count: int) -> Tensor:
        position = torch.arange(1, count + 1, dtype=torch.float32)
        if normalize:
            position = 2 * math.pi * position / (count + 1e-6)
        angles = position[:, None] * frequencies
        return torch.stack([angles.sin(), angles.cos()], -1).flatten(1)  # (count, dim / 2)

    rows = encode(height)[:, None].expand(-1, width, -1)
    columns = encode(width)[None].expand(height, -1, -1)
    return torch.cat([rows, columns], -1)


def sine_position_1d(length: int, dim: int) -> Tensor:
    """Sine and cosine of 0 .. length - 1 side by side, temperature 10000: float32 (length, dim)."""
    frequencies = 1e4 ** -(torch.arange(dim // 2) / (dim // 2))
    angles = torch.arange(length)[:, None] * frequencies
    return torch.stack([angles.sin(), angles.cos()], -1).flatten(1)


def fit_positions(
    state_dict: dict[str, Tensor], name: str, grid: tuple[int, int], *, special: int, mode: str
) -> tuple[dict[str, Tensor], list[str]]:
    """Fit a checkpoint's learned positions to another grid.

    Args:
        name: of the table (special + side * side, C), whose first ``special`` rows are of no place.
        grid: (h, w).
        mode: of ``interpolate``.

    Returns:
        a new state dict, with the table as float32 (special + h * w, C) if it did not fit, and the
        names of the tensors that changed size.

    Raises:
        ValueError: the table is of no square grid.
    """
    table = state_dict.get(name)
    if table is None or len(table) == special + grid[0] * grid[1]:
        return state_dict, []
    side = math.isqrt(len(table) - special)
    if side * side != len(table) - special:
        raise ValueError(f"{name} has {len(table)} rows, not {special} plus a square grid")
    maps = table[special:].float().T.reshape(1, -1, side, side)
    maps = F.interpolate(maps, size=grid, mode=mode, align_corners=False)
    rows = torch.cat([table[:special].float(), maps[0].flatten(1).T])
    return {**state_dict, name: rows}, [name]
