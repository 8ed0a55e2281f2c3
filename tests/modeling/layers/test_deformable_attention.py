import torch
import torch.nn.functional as F

from ris_d2.modeling.layers.deformable_attention import (
    MultiScaleDeformableAttention,
    map_constants,
    weighted_samples,
)

SIZES = [(3, 4), (5, 7)]


def by_grid_sample(values, sizes, points, weights):
    """The same, a level at a time."""
    batch, _, heads, dim = values.shape
    read = 0
    for level, value in enumerate(values.split([h * w for h, w in sizes], 1)):
        height, width = sizes[level]
        maps = value.permute(0, 2, 3, 1).reshape(batch * heads, dim, height, width)
        grid = points[:, :, :, level] / torch.tensor([width, height]) * 2 - 1
        grid = grid.transpose(1, 2).flatten(0, 1)
        samples = F.grid_sample(maps, grid, mode="bilinear", align_corners=False)
        level_weights = weights[:, :, :, level].transpose(1, 2).flatten(0, 1)
        read = read + (samples * level_weights[:, None]).sum(-1)
    return read.view(batch, heads, dim, -1).permute(0, 3, 1, 2)


def test_samples_and_gradients_equal_grid_sample_inside_and_outside():
    torch.manual_seed(0)
    values = torch.randn(2, 12 + 35, 3, 4, requires_grad=True)
    points = (torch.rand(2, 6, 3, 2, 5, 2) * 12 - 3).requires_grad_()  # up to 3 beyond the edges
    weights = torch.randn(2, 6, 3, 2, 5, requires_grad=True)
    assert (points < 0).any() and (points > 8).any()
    results = []
    _, *constants = map_constants(SIZES, 3, 5)
    for function, maps in ((weighted_samples, constants), (by_grid_sample, SIZES)):
        out = function(values, maps, points, weights)
        seed = torch.arange(out.numel(), dtype=torch.float32).view(out.shape).sin()
        results.append([out, *torch.autograd.grad((out * seed).sum(), (values, points, weights))])
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
