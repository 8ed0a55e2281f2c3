"""Multi-scale deformable attention (Zhu et al., Deformable DETR, ICLR 2021); nothing to compile."""

import functools
import importlib.util
import logging
import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .constants import Constants

logger = logging.getLogger(__name__)


class MultiScaleDeformableAttention(nn.Module):
    """Each query reads a few points per head and level, which it places and weighs itself."""

    def __init__(self, *, dim: int, num_heads: int, num_levels: int, num_points: int = 4):
        """
        Raises:
            ValueError: if the heads do not divide ``dim``.
        """
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"dim {dim} is not a multiple of num_heads {num_heads}")
        self.num_heads = num_heads
        self.num_levels = num_levels
        self.num_points = num_points
        places = num_heads * num_levels * num_points
        self.offsets = nn.Linear(dim, 2 * places)
        self.weights = nn.Linear(dim, places)
        self.value = nn.Linear(dim, dim)
        self.out = nn.Linear(dim, dim)
        self.map_constants = Constants(map_constants)
        self._reset_parameters()

    def _reset_parameters(self) -> None:
        """Heads look in as many directions, their points ever farther away, all with equal weight."""
        nn.init.zeros_(self.offsets.weight)
        nn.init.zeros_(self.weights.weight)
        nn.init.zeros_(self.weights.bias)
        angles = torch.arange(self.num_heads) * (2 * math.pi / self.num_heads)
        directions = torch.stack([angles.cos(), angles.sin()], -1)
        directions = directions / directions.abs().max(-1, keepdim=True).values
        steps = torch.arange(1, self.num_points + 1)
        offsets = directions[:, None, None] * steps[:, None]  # (heads, 1, points, 2)
        with torch.no_grad():
            self.offsets.bias.copy_(offsets.expand(-1, self.num_levels, -1, -1).flatten())
        for projection in (self.value, self.out):
            nn.init.xavier_uniform_(projection.weight)
            nn.init.zeros_(projection.bias)

    def forward(
        self, query: Tensor, reference: Tensor, values: Tensor, sizes: Sequence[tuple[int, int]]
    ) -> Tensor:
        """Places and weights are computed in fp32 under autocast.

        Args:
            query: (B, Q, dim).
            reference: (Q, 2), (x, y) in 0..1 of the point that each query's offsets start from.
            values: (B, sum of h * w, dim), the maps of all levels, one after the other.
            sizes: (h, w) per level; offsets are in pixels of it.

        Returns:
            (B, Q, dim)
        """
        places = (self.num_heads, self.num_levels, self.num_points)
        values = self.value(values).unflatten(2, (self.num_heads, -1))
        with torch.autocast(query.device.type, enabled=False):
            query = query.float()
            offsets = self.offsets(query).unflatten(2, (*places, 2))
            weights = self.weights(query).unflatten(2, (self.num_heads, -1)).softmax(-1)
            constants = self.map_constants(
                tuple(sizes), self.num_heads, self.num_points, device=query.device
            )
            start = (reference[:, None] * constants[0]).unsqueeze(2)  # (Q, levels, 1, 2)
            points = offsets + start[:, None]
            weights = weights.unflatten(3, places[1:])
            read = weighted_samples(values, sizes, constants, points, weights)
        return self.out(read.flatten(2))


def weighted_samples(
    values: Tensor,
    sizes: Sequence[tuple[int, int]],
    constants: Sequence[Tensor],
    points: Tensor,
    weights: Tensor,
    *,
    form: str | None = None,
) -> Tensor:
    """Sum bilinear samples of several maps; what lies outside of a map counts as zero.

    Args:
        values: float (B, sum of h * w, M, D), M heads; sums are fp32 whatever they are.
        sizes: (h, w) of L maps.
        constants: of ``map_constants`` for them.
        points: float32 (B, Q, M, L, P, 2), (x, y) in pixels; the centre of the first is at 0.5.
        weights: float32 (B, Q, M, L, P).
        form: "triton", for GPUs; "embedding_bag", the faster one on CPUs; "grid_sample", of operations
            that other runtimes have; None: the last while a graph is exported, "triton" where the
            tensors are on a GPU and the package is there (it comes with torch's CUDA wheels), else
            "embedding_bag". ``tools/compare/deformable_attention.py`` times them.

    Returns:
        float32 (B, Q, M, D)
    """
    if form is None and torch.compiler.is_exporting():
        form = "grid_sample"
    elif form is None:
        form = "triton" if values.is_cuda and _has_triton() else "embedding_bag"
    return _FORMS[form](values, sizes, constants, points, weights)


def _by_embedding_bag(
    values: Tensor,
    sizes: Sequence[tuple[int, int]],
    constants: Sequence[Tensor],
    points: Tensor,
    weights: Tensor,
) -> Tensor:
    """The four neighbours of all points of a query and head are summed in one weighted embedding bag: of
    ``grid_sample`` per level, whose samples have to be stored and summed, this takes a sixth of the
    time, and an eighth of the memory for the backward pass."""
    batch, length, heads, _ = values.shape
    values = values.float()
    _, heights, widths, first = constants
    images = torch.arange(batch, dtype=torch.int32, device=values.device)[:, None, None]
    first = first + images * (length * heads)

    x, y = points.flatten(2, 4).unbind(-1)
    columns, rows = _neighbours(x, widths), _neighbours(y, heights)
    weights = weights.flatten(2)
    index, share = [], []
    for row, row_share in rows:
        row_start, row_share = row * widths, row_share * weights
        for column, column_share in columns:
            index.append((row_start + column) * heads + first)
            share.append(row_share * column_share)
    bags = batch * points.shape[1] * heads
    read = F.embedding_bag(
        torch.stack(index, -1).view(bags, -1),
        values.reshape(batch * length * heads, -1),
        per_sample_weights=torch.stack(share, -1).view(bags, -1),
        mode="sum",
    )
    return read.view(batch, -1, heads, read.shape[-1])


def _by_grid_sample(
    values: Tensor,
    sizes: Sequence[tuple[int, int]],
    constants: Sequence[Tensor],
    points: Tensor,
    weights: Tensor,
) -> Tensor:
    """A level at a time."""
    heads, values = values.shape[2], values.float()
    grids = (points / constants[0][:, None] * 2 - 1).transpose(1, 2).flatten(0, 1)  # of a head each
    weights = weights.transpose(1, 2).flatten(0, 1)  # (B M, Q, L, P)
    levels = values.split([height * width for height, width in sizes], 1)
    read = 0
    for level, (own, size) in enumerate(zip(levels, sizes, strict=True)):
        maps = own.permute(0, 2, 3, 1).unflatten(3, size).flatten(0, 1)  # (B M, D, h, w)
        samples = F.grid_sample(maps, grids[:, :, level], align_corners=False)  # (B M, D, Q, P)
        read = read + (samples * weights[:, None, :, level]).sum(-1)
    return read.unflatten(0, (-1, heads)).permute(0, 3, 1, 2)


def _by_triton(
    values: Tensor,
    sizes: Sequence[tuple[int, int]],
    constants: Sequence[Tensor],
    points: Tensor,
    weights: Tensor,
) -> Tensor:
    """All at once, with nothing kept per sample."""
    from .deformable_attention_triton import weighted_samples  # needs a package that CPUs lack

    levels = torch.stack(constants[1:], -1)
    inputs = values, points.flatten(3, 4), weights.flatten(3), levels
    return weighted_samples(*(x.contiguous() for x in inputs))


@torch.compiler.assume_constant_result
def _has_triton() -> bool:
    # The simulated GPU of the tests has tensors, too.
    is_there = torch.cuda.is_available() and importlib.util.find_spec("triton") is not None
    return is_there and torch.cuda.get_device_capability() >= (7, 0) and _triton_starts()


@functools.cache
def _triton_starts() -> bool:
    """Whether Triton finds what it builds its launcher with: a C compiler and Python's headers."""
    import triton

    try:
        triton.runtime.driver.active.get_current_target()
    except Exception as error:  # of its own kinds, or the compiler's
        logger.warning("Deformable attention does without Triton, and is slower: %s", error)
        return False
    return True


_FORMS = {"embedding_bag": _by_embedding_bag, "grid_sample": _by_grid_sample, "triton": _by_triton}


def map_constants(
    sizes: tuple[tuple[int, int], ...], heads: int, per_level: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Width and height of each map, int64 (L, 2); and per place (head, level, point): height and width of
    its map, and the row of the map's first pixel among all pixels x heads; int32 (places,) each."""
    areas = [0] + [height * width for height, width in sizes[:-1]]
    levels = torch.tensor([(h, w, 0) for h, w in sizes], dtype=torch.int32)
    levels[:, 2] = torch.tensor(areas).cumsum(0) * heads
    places = levels.repeat_interleave(per_level, 0).repeat(heads, 1)
    places[:, 2] += torch.arange(heads).repeat_interleave(len(places) // heads)
    return torch.tensor(sizes).flip(1), *places.unbind(1)


def _neighbours(position: Tensor, length: Tensor) -> list[tuple[Tensor, Tensor]]:
    """The two pixels around a position on an axis and their shares, 0 for one that is outside."""
    position = position - 0.5
    low = position.floor()
    high_share = position - low
    low = low.int()
    return [
        (torch.minimum(pixel.clamp(min=0), length - 1), share * ((pixel >= 0) & (pixel < length)))
        for pixel, share in ((low, 1 - high_share), (low + 1, high_share))
    ]
