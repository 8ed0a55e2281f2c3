"""Weighted bilinear samples of several maps as two Triton kernels, for tensors on a GPU.

A program has a few bags, each of one query and head; per place (level, point) it reads the four pixels
around the point and keeps the sum in fp32. Nothing per place is stored, forward or backward. Values
are fp32, fp16 or bf16; places and weights are fp32. ``import`` needs the package triton.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

_BAGS = 16  # per program; with 32 channels, four values per thread of four warps


@triton.jit
def _bags(queries, total, HEADS: tl.constexpr, BAGS: tl.constexpr):
    bag = tl.program_id(0).to(tl.int64) * BAGS + tl.arange(0, BAGS)
    return bag, bag < total, bag % HEADS, bag // (queries * HEADS)


@triton.jit
def _place(points, weights, levels, bag, alive, head, k, PLACES: tl.constexpr):
    """Position, weight, and height, width and first row of the map of each bag's k-th place."""
    own, shared = bag * PLACES + k, (head * PLACES + k) * 3
    x = tl.load(points + 2 * own, mask=alive, other=0) - 0.5
    y = tl.load(points + 2 * own + 1, mask=alive, other=0) - 0.5
    weight = tl.load(weights + own, mask=alive, other=0)
    height, width = tl.load(levels + shared), tl.load(levels + shared + 1)
    return own, x, y, weight, height, width, tl.load(levels + shared + 2)


@triton.jit
def _neighbour(position, length, UPPER: tl.constexpr):
    """The pixel below or above a position on an axis, its share, and whether it is in the map."""
    low = tl.floor(position)
    share = position - low if UPPER else 1 - (position - low)
    pixel = low.to(tl.int32) + UPPER
    return pixel, share, (pixel >= 0) & (pixel < length)


@triton.jit
def _forward(
    values,
    points,
    weights,
    levels,
    out,
    rows,
    queries,
    total,
    HEADS: tl.constexpr,
    PLACES: tl.constexpr,
    DIM: tl.constexpr,
    CHANNELS: tl.constexpr,
    BAGS: tl.constexpr,
):
    bag, alive, head, image = _bags(queries, total, HEADS, BAGS)
    channel = tl.arange(0, CHANNELS)[None, :]
    read = tl.zeros([BAGS, CHANNELS], tl.float32)
    for k in range(PLACES):
        _, x, y, weight, height, width, first = _place(
            points, weights, levels, bag, alive, head, k, PLACES
        )
        for v in tl.static_range(2):
            row, row_share, row_inside = _neighbour(y, height, v)
            for h in tl.static_range(2):
                column, share, inside = _neighbour(x, width, h)
                pixel = image * rows + first + (row * width + column) * HEADS
                inside = (inside & row_inside & alive)[:, None] & (channel < DIM)
                value = tl.load(values + pixel[:, None] * DIM + channel, mask=inside, other=0)
                read += (weight * share * row_share)[:, None] * value.to(tl.float32)
    tl.store(out + bag[:, None] * DIM + channel, read, mask=alive[:, None] & (channel < DIM))


@triton.jit
def _backward(
    grad,
    values,
    points,
    weights,
    levels,
    grad_values,
    grad_points,
    grad_weights,
    rows,
    queries,
    total,
    HEADS: tl.constexpr,
    PLACES: tl.constexpr,
    DIM: tl.constexpr,
    CHANNELS: tl.constexpr,
    BAGS: tl.constexpr,
):
    bag, alive, head, image = _bags(queries, total, HEADS, BAGS)
    channel = tl.arange(0, CHANNELS)[None, :]
    wanted = alive[:, None] & (channel < DIM)
    own_grad = tl.load(grad + bag[:, None] * DIM + channel, mask=wanted, other=0)
    for k in range(PLACES):
        own, x, y, weight, height, width, first = _place(
            points, weights, levels, bag, alive, head, k, PLACES
        )
        along_x = tl.zeros([BAGS], tl.float32)
        along_y = tl.zeros([BAGS], tl.float32)
        sample = tl.zeros([BAGS], tl.float32)
        for v in tl.static_range(2):
            row, row_share, row_inside = _neighbour(y, height, v)
            for h in tl.static_range(2):
                column, share, inside = _neighbour(x, width, h)
                pixel = (image * rows + first + (row * width + column) * HEADS)[:, None] * DIM
                inside = (inside & row_inside)[:, None] & wanted
                value = tl.load(values + pixel + channel, mask=inside, other=0).to(tl.float32)
                dot = tl.sum(value * own_grad, 1)
                sample += share * row_share * dot
                along_x += (2 * h - 1) * row_share * dot
                along_y += (2 * v - 1) * share * dot
                part = (weight * share * row_share)[:, None] * own_grad
                # Nothing is read before all programs have ended: no order is needed.
                tl.atomic_add(grad_values + pixel + channel, part, mask=inside, sem="relaxed")
        tl.store(grad_points + 2 * own, weight * along_x, mask=alive)
        tl.store(grad_points + 2 * own + 1, weight * along_y, mask=alive)
        tl.store(grad_weights + own, sample, mask=alive)


def _launch(kernel, tensors: tuple[Tensor, ...], values: Tensor, weights: Tensor) -> None:
    batch, length, heads, dim = values.shape
    queries, places = weights.shape[1], weights.shape[3]
    total = batch * queries * heads
    with torch.cuda.device_of(values):
        kernel[(triton.cdiv(total, _BAGS),)](
            *tensors,
            *(length * heads, queries, total),
            HEADS=heads,
            PLACES=places,
            DIM=dim,
            CHANNELS=triton.next_power_of_2(dim),
            BAGS=_BAGS,
        )


@torch.library.custom_op("ris_d2::weighted_samples", mutates_args=())
def weighted_samples(values: Tensor, points: Tensor, weights: Tensor, levels: Tensor) -> Tensor:
    """
    Args:
        values: float (B, N, M, D), contiguous like the rest.
        points: float32 (B, Q, M, places, 2), pixels.
        weights: float32 (B, Q, M, places).
        levels: int32 (M, places, 3), height, width and first row of the map of each place.

    Returns:
        float32 (B, Q, M, D)
    """
    out = points.new_empty((*weights.shape[:3], values.shape[3]))
    _launch(_forward, (values, points, weights, levels, out), values, weights)
    return out


@torch.library.custom_op("ris_d2::weighted_samples_backward", mutates_args=())
def _weighted_samples_backward(
    grad: Tensor, values: Tensor, points: Tensor, weights: Tensor, levels: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    grads = torch.zeros_like(values, dtype=torch.float32), *map(torch.empty_like, (points, weights))
    _launch(_backward, (grad, values, points, weights, levels, *grads), values, weights)
    return grads[0].to(values.dtype), *grads[1:]


@weighted_samples.register_fake
def _(values: Tensor, points: Tensor, weights: Tensor, levels: Tensor) -> Tensor:
    return points.new_empty((*weights.shape[:3], values.shape[3]))


@_weighted_samples_backward.register_fake
def _(
    grad: Tensor, values: Tensor, points: Tensor, weights: Tensor, levels: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    return tuple(map(torch.empty_like, (values, points, weights)))


def _save(ctx, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _gradients(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
    return *_weighted_samples_backward(grad.contiguous(), *ctx.saved_tensors), None


weighted_samples.register_autograd(_gradients, setup_context=_save)
