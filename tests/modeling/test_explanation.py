import math

import pytest
import torch
import torch.nn.functional as F
from detectron2.modeling import build_model
from torch import nn

from ris_d2.modeling.explanation import AttentionRecorder, Explanation, row_entropy
from ris_d2.modeling.layers import MultiheadAttention
from ris_d2.modeling.segmenter import ReferringSegmenter


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


@pytest.mark.parametrize("fusion", ["self", "cross", "bi"])
def test_shared_ris_maps_are_the_sentences_row(fusion, tiny_cfg, make_inputs):
    tiny_cfg.MODEL.SHARED_RIS.merge_from_list(["FPN_FUSION", fusion, "DECODER_FUSION", fusion])
    torch.manual_seed(0)
    model = build_model(tiny_cfg).eval()
    inputs = [make_inputs(seed=0), make_inputs(seed=1, num_expressions=2)]
    first, second = model.explanations(inputs)
    assert {name: tuple(m.shape) for name, m in first.maps.items()} == {
        name: (3, 4, 6) for name in ("encoder", "FPN", "decoder")
    }
    assert (first.maps["encoder"] > 0).all()
    assert (first.maps["encoder"].flatten(1).sum(1) < 1).all(), "some weight is on [CLS] and text"
    assert first.pixels.shape == (3, 4, 6, 16) and first.tokens.shape == (3, 6, 16)
    assert torch.equal(first.attended, inputs[0]["text_mask"][:, :6].float())
    assert second.maps["decoder"].shape == (2, 4, 6)
    assert set(first.entropy) == {"decoder 1"}
    # An expression's maps are its own, whatever is segmented beside it.
    model.max_expressions = 2
    (alone,) = model.explanations([inputs[1]])
    for name, maps in alone.maps.items():
        assert torch.allclose(maps, second.maps[name], atol=1e-6)
    with torch.no_grad():  # [CLS] of the text now looks for nothing in particular
        layer = model.encoder.encoder.layers[-1].self_attn
        layer.q_proj["B"].weight.zero_()
        layer.q_proj["B"].bias.zero_()
    (uniform,) = model.explanations([inputs[1]])
    num_tokens = 1 + 24 + 6
    expected = torch.full((2, 4, 6), 1 / num_tokens)
    assert torch.allclose(uniform.maps["encoder"], expected, atol=1e-6)


@pytest.mark.parametrize("changes", [["STAGES", ()], ["FPN", "pwam"], ["FPN", "cris"]])
def test_parts_that_are_not_there_have_no_map(changes, tiny_cfg, make_inputs):
    tiny_cfg.MODEL.SHARED_RIS.merge_from_list([*changes, "DECODER_LAYERS", 0])
    (explanation,) = build_model(tiny_cfg).eval().explanations([make_inputs()])
    assert set(explanation.maps) == {"encoder"}
    assert explanation.entropy == {} and explanation.pixels is None


def test_a_method_without_maps_says_so(tiny_cfg, make_inputs):
    class Mute(ReferringSegmenter):
        def encode_images(self, images, views):
            return images

    model = Mute(pixel_mean=[0] * 3, pixel_std=[1] * 3, input_size=(32, 48)).eval()
    with pytest.raises(NotImplementedError, match="Mute has no attention maps"):
        model.explanations([make_inputs()])
