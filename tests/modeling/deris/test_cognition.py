import math

import pytest
import torch

from ris_d2.modeling.deris.cognition import (
    CognitionLayer,
    ExistenceDecoder,
    released_positions,
    sine_position_1d,
)


def test_released_positions_are_those_of_the_released_code():
    """Its frequency vector is cast to integers: 1, 0, 0, ..."""
    positions = released_positions(3, 8)
    for word in range(3):
        expected = [math.sin(word), math.cos(word), 0, 1, 0, 1, 0, 1]
        assert positions[word].tolist() == pytest.approx(expected)


def test_sine_positions_have_falling_frequencies():
    positions = sine_position_1d(5, 8)
    assert positions[:, 0].tolist() == pytest.approx([math.sin(word) for word in range(5)])
    assert positions[4, 6].item() == pytest.approx(math.sin(4 * 1e4 ** (-3 / 4)), rel=1e-5)


def test_prior_tells_queries_apart_and_pads_are_not_read(device):
    torch.manual_seed(0)
    layer = CognitionLayer(dim=16, num_heads=2, ffn_dim=32, instance_attention="queries")
    queries, text = torch.randn(1, 4, 16), torch.randn(1, 5, 16)
    mask = torch.tensor([[True, True, True, False, False]])
    positions = released_positions(5, 16).to(device)
    prior = torch.zeros(1, 4, 16)
    fused, referring = layer(queries, prior, text, mask, positions)
    assert fused.shape == referring.shape == (1, 4, 16)
    other, _ = layer(queries, torch.randn(1, 4, 16), text, mask, positions)
    assert not torch.allclose(fused, other, atol=1e-3)
    text[:, 3:] += 1
    same, _ = layer(queries, prior, text, mask, positions)
    assert torch.allclose(fused, same, atol=1e-6)
    text[:, 2] += 1
    other, _ = layer(queries, prior, text, mask, positions)
    assert not torch.allclose(fused, other, atol=1e-3)


def test_existence_is_the_mean_over_queries():
    torch.manual_seed(0)
    decoder = ExistenceDecoder(dim=16, num_heads=2, ffn_dim=32, num_layers=0, dropout=0.0)
    queries, text = torch.randn(2, 4, 16), torch.randn(2, 3, 16)
    logits = decoder(queries, text, torch.ones(2, 3, dtype=torch.bool))
    each = decoder.logit(decoder.norm(queries)).squeeze(-1)
    assert logits.shape == (2,) and torch.allclose(logits, each.mean(1))


def test_released_instances_attend_along_the_batch_in_training_and_themselves_in_evaluation():
    torch.manual_seed(0)
    layer = CognitionLayer(dim=16, num_heads=2, ffn_dim=32, instance_attention="released")
    reference = torch.nn.MultiheadAttention(16, 2)  # over the first axis
    attention = layer.instance_attention
    parts = (attention.query, attention.key, attention.value)
    with torch.no_grad():
        reference.in_proj_weight.copy_(torch.cat([part.weight for part in parts]))
        reference.in_proj_bias.copy_(torch.cat([part.bias for part in parts]))
    reference.out_proj.load_state_dict(attention.out.state_dict())
    queries, prior = torch.randn(3, 4, 16), torch.randn(3, 4, 16)
    expected = reference(queries + prior, queries + prior, queries)[0]
    assert torch.allclose(layer._attend_as_released(queries, prior), expected, atol=1e-6)
    layer.eval()
    for e in range(3):
        own, located = queries[e : e + 1], (queries + prior)[e : e + 1]
        expected = reference(located, located, own)[0]
        assert torch.allclose(layer._attend_as_released(own, prior), expected, atol=1e-6)
