import itertools

import pytest
import torch

from ris_d2.modeling.layers.deformable_attention import (
    MultiScaleDeformableAttention,
    map_constants,
    weighted_samples,
)

SIZES = [(3, 4), (5, 7)]


def by_hand(values, sizes, points, weights):
    """The same sum, point by point."""
    out = torch.zeros(*points.shape[:3], values.shape[-1])
    starts = [0, *torch.tensor([h * w for h, w in sizes]).cumsum(0).tolist()]
    for b, q, m, level, p in itertools.product(*map(range, weights.shape)):
        height, width = sizes[level]
        x, y = (points[b, q, m, level, p] - 0.5).tolist()
        for row, column in itertools.product(range(height), range(width)):
            share = max(0, 1 - abs(x - column)) * max(0, 1 - abs(y - row))
            pixel = values[b, starts[level] + row * width + column, m]
            out[b, q, m] += weights[b, q, m, level, p] * share * pixel
    return out


def samples(num_queries):
    torch.manual_seed(0)
    values = torch.randn(2, 12 + 35, 3, 4, requires_grad=True)
    # Up to 3 beyond the edges.
    points = (torch.rand(2, num_queries, 3, 2, 5, 2) * 12 - 3).requires_grad_()
    weights = torch.randn(2, num_queries, 3, 2, 5, requires_grad=True)
    return values, points, weights


@pytest.mark.parametrize("form", ["embedding_bag", "grid_sample"])
def test_samples_inside_and_outside_are_bilinear(form):
    values, points, weights = (x.detach() for x in samples(2))
    assert (points < 0).any() and (points > 8).any()
    out = weighted_samples(values, SIZES, map_constants(SIZES, 3, 5), points, weights, form=form)
    expected = by_hand(values, SIZES, points, weights)
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)


def test_all_forms_give_the_same_samples_and_gradients():
    inputs = values, points, weights = samples(6)
    results = []
    for form in ("embedding_bag", "grid_sample"):
        out = weighted_samples(
            values, SIZES, map_constants(SIZES, 3, 5), points, weights, form=form
        )
        seed = torch.arange(out.numel(), dtype=torch.float32).view(out.shape).sin()
        results.append([out, *torch.autograd.grad((out * seed).sum(), inputs)])
    for ours, expected in zip(*results, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)


def make():
    torch.manual_seed(0)
    layer = MultiScaleDeformableAttention(dim=8, num_heads=4, num_levels=2, num_points=3)
    return layer, torch.randn(2, 9, 8), torch.rand(9, 2), torch.randn(2, 47, 8)


def test_heads_start_in_all_directions_with_equal_weights():
    layer, *_ = make()
    offsets = layer.offsets.bias.view(4, 2, 3, 2)
    expected = torch.tensor([[1.0, 0], [0, 1], [-1, 0], [0, -1]])
    for point in range(3):
        for level in range(2):
            torch.testing.assert_close(offsets[:, level, point], (point + 1) * expected)


def test_constant_maps_are_read_as_they_are():
    layer, query, _, _ = make()
    values = torch.full((1, 3 * 40 + 5 * 70, 8), 2.0)
    centre = torch.full((9, 2), 0.5)
    out = layer(query[:1], centre, values, [(12, 10), (14, 25)])
    torch.testing.assert_close(out, layer.out(layer.value(values[:, :9])))


def test_places_are_fp32_under_autocast():
    layer, query, reference, values = make()
    torch.nn.init.normal_(layer.offsets.weight)
    torch.nn.init.normal_(layer.weights.weight)
    expected = layer(query, reference, values, SIZES)
    with torch.autocast("cpu", torch.bfloat16):
        out = layer(query, reference, values, SIZES)
    assert out.dtype == torch.bfloat16
    # bf16 offsets of this size would be off by tenths of a pixel; bf16 values are by 1 %.
    torch.testing.assert_close(out.float(), expected, rtol=0, atol=0.02)


def test_every_parameter_gets_a_gradient():
    layer, query, reference, values = make()
    layer(query, reference, values, SIZES).square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in layer.parameters())
