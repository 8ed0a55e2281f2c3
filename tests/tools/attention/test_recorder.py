"""tools/attention: what is recorded of a model, and how it is put together."""

import math

import pytest
import torch
import torch.nn.functional as F
from attention.explanation import Explanation
from attention.recorder import AttentionRecorder, row_entropy
from torch import nn

from ris_d2.modeling.layers import MultiheadAttention


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"attn_mask": torch.tensor([[True, False, True, True]])},
        {"attn_mask": torch.randn(5, 4, generator=torch.Generator().manual_seed(1))},
        {"is_causal": True},
        {"scale": 0.3},
        {"enable_gqa": True},
    ],
    ids=lambda a: "-".join(a) or "plain",
)
def test_recorded_weights_times_values_is_what_the_attention_returns(arguments):
    torch.manual_seed(0)
    heads = 2 if "enable_gqa" in arguments else 4
    query, key, value = torch.randn(2, 4, 5, 8), *torch.randn(2, 2, heads, 4, 8)

    class Attend(nn.Module):
        def forward(self, x):
            return F.scaled_dot_product_attention(x, key, value, **arguments)

    model = nn.Sequential(Attend(), nn.Identity())
    with AttentionRecorder(model, ["0"]) as recorder:
        out = model(query)
    (weights,) = recorder.weights["0"]
    assert torch.allclose(weights.sum(-1), torch.ones(2, 4, 5))
    assert torch.allclose(weights @ value.repeat_interleave(4 // heads, 1), out, atol=1e-6)
    ((argument,),) = recorder.inputs["0"]
    assert argument is query


def test_only_named_modules_and_only_while_entered():
    torch.manual_seed(0)
    model = nn.ModuleDict({name: MultiheadAttention(dim=8, num_heads=2) for name in "ab"})
    x = torch.randn(1, 3, 8)
    expected = model["a"](x, x)
    with AttentionRecorder(model, ["a"]) as recorder:
        assert torch.equal(model["a"](x, x), expected), "looking changes nothing"
        model["b"](x, x)
    model["a"](x, x)
    assert {name: len(w) for name, w in recorder.weights.items()} == {"a": 1}
    with pytest.raises(AttributeError):
        AttentionRecorder(model, ["c"])


def test_an_error_inside_leaves_no_hook_behind():
    model = nn.Sequential(MultiheadAttention(dim=8, num_heads=2))
    with pytest.raises(TypeError), AttentionRecorder(model, ["0"]):
        model[0](None, None)
    x = torch.randn(1, 3, 8)
    with AttentionRecorder(model, ["0"]) as recorder:
        model[0](x, x)
    assert len(recorder.weights["0"]) == len(recorder.inputs["0"]) == 1


def test_entropy():
    one_key = torch.eye(4)[None, None]
    uniform = torch.full((1, 2, 3, 4), 0.25)
    both = torch.cat([one_key.expand(1, 2, 4, 4), uniform], 2)
    assert row_entropy(one_key).tolist() == [0]
    assert row_entropy(uniform).item() == pytest.approx(math.log(4))
    assert row_entropy(both).item() == pytest.approx(3 / 7 * math.log(4))


def test_parts_are_put_together():
    def part(rows):
        return Explanation(maps={"a": torch.zeros(rows, 2, 2)}, entropy={"b": torch.ones(rows)})

    whole = Explanation.concatenate([part(2), part(3)])
    assert whole.maps["a"].shape == (5, 2, 2) and whole.entropy["b"].shape == (5,)
    assert whole.pixels is None and whole.tokens is None
    assert whole.apply(lambda x: x[:1]).maps["a"].shape == (1, 2, 2)
