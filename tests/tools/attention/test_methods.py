"""tools/attention: what each method shows of itself."""

import pytest
import torch
from attention.methods import explanations
from detectron2.modeling import build_model

from ris_d2.modeling.segmenter import ReferringSegmenter


@pytest.mark.parametrize("fusion", ["self", "cross", "bi"])
def test_shared_ris_maps_are_the_sentences_row(fusion, tiny_cfg, make_inputs):
    tiny_cfg.MODEL.SHARED_RIS.merge_from_list(["FPN_FUSION", fusion, "DECODER_FUSION", fusion])
    torch.manual_seed(0)
    model = build_model(tiny_cfg).eval()
    inputs = [make_inputs(seed=0), make_inputs(seed=1, num_expressions=2)]
    first, second = explanations(model, inputs)
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
    (alone,) = explanations(model, [inputs[1]])
    for name, maps in alone.maps.items():
        assert torch.allclose(maps, second.maps[name], atol=1e-6)
    with torch.no_grad():  # [CLS] of the text now looks for nothing in particular
        layer = model.encoder.encoder.layers[-1].self_attn
        layer.q_proj["B"].weight.zero_()
        layer.q_proj["B"].bias.zero_()
    (uniform,) = explanations(model, [inputs[1]])
    num_tokens = 1 + 24 + 6
    expected = torch.full((2, 4, 6), 1 / num_tokens)
    assert torch.allclose(uniform.maps["encoder"], expected, atol=1e-6)


@pytest.mark.parametrize("changes", [["STAGES", ()], ["FPN", "pwam"], ["FPN", "cris"]])
def test_parts_that_are_not_there_have_no_map(changes, tiny_cfg, make_inputs):
    tiny_cfg.MODEL.SHARED_RIS.merge_from_list([*changes, "DECODER_LAYERS", 0])
    (explanation,) = explanations(build_model(tiny_cfg).eval(), [make_inputs()])
    assert set(explanation.maps) == {"encoder"}
    assert explanation.entropy == {} and explanation.pixels is None


def test_vipa(vipa_cfg, make_inputs):
    def build(*changes):
        cfg = vipa_cfg.clone()
        cfg.MODEL.VIPA.merge_from_list(list(changes))
        torch.manual_seed(0)
        return build_model(cfg).eval()

    model = build()
    inputs = make_inputs(size=(64, 96), lengths=[6, 4, 5])
    explanation = explanations(model, [inputs])[0]
    length = 6  # of the longest sentence: padding behind it is cut off
    assert {name: tuple(x.shape) for name, x in explanation.maps.items()} == {
        "relevance": (3, length, 2, 3),
        "retrieved": (3, length, 2, 3),
        "decoder 4": (3, length, 2, 3),
        "decoder 3": (3, length, 4, 6),
        "decoder 2": (3, length, 8, 12),
        "decoder 1": (3, length, 16, 24),
    }
    retrieved = explanation.maps["retrieved"].flatten(2).sum(2)
    assert torch.equal(retrieved, inputs["text_mask"][:, :length].float())  # floor(0.3 * 6) each
    attended = explanation.maps["decoder 1"].sum(1)
    assert torch.allclose(attended, torch.ones_like(attended), atol=1e-5)
    assert not explanation.maps["decoder 1"][1, 4:].any()  # padding
    assert set(explanation.entropy) == {f"decoder {i}" for i in (4, 3, 2, 1)}
    assert explanation.pixels.shape == (3, 2, 3, 16) and explanation.tokens.shape == (3, length, 16)
    language = explanations(build("KEY_VALUES", "language"), [inputs])[0]
    assert set(language.maps) == {f"decoder {i}" for i in (4, 3, 2, 1)}
    coarse = explanations(build("DECODER.ATTENTION_STAGES", (2, 4)), [inputs])[0]
    assert coarse.pixels.shape == (3, 2, 3, 16)  # the first to run, not the first in the list
    all_tokens = explanations(build("GENERATOR.RETRIEVE", False), [inputs])[0]
    assert set(all_tokens.maps) == {"relevance"} and all_tokens.tokens.shape == (3, 6, 16)
    assert all_tokens.attended.all(), "visual tokens, as many as words"
    assert explanation.attended.sum(1).tolist() == [6, 4, 5]
    of_cls = explanations(build("GENERATOR.CUES", "global"), [inputs])[0]
    assert of_cls.attended.tolist() == [[1, 0, 0, 0, 0, 0]] * 3
    assert of_cls.maps["retrieved"].flatten(2).any(2).sum(1).tolist() == [1, 1, 1]


def test_risam_shows_both_directions(risam_cfg, make_square):
    torch.manual_seed(0)
    model, inputs = build_model(risam_cfg).eval(), make_square(lengths=[8, 4, 5])
    (explanation,) = explanations(model, [inputs])
    vision, language = (explanation.maps[f"{x}-guided"] for x in ("vision", "language"))
    assert vision.shape == language.shape == (3, 8, 4, 4)
    some = (
        vision.sum(1) > 0
    )  # regions that a word is relevant for share themselves out among the words
    assert torch.allclose(vision.sum(1)[some], torch.ones(int(some.sum())), atol=1e-5)
    words = language[inputs["text_mask"]]
    assert torch.allclose(words.sum((1, 2)), torch.ones(17), atol=1e-4)
    assert not language[~inputs["text_mask"]].any()


def test_other_fusions_of_risam_show_what_attention_they_have(risam_cfg, make_square):
    inputs, text_mask = make_square(lengths=[8, 4, 5]), make_square(lengths=[8, 4, 5])["text_mask"]
    risam_cfg.MODEL.RISAM.FUSION = "te"
    (explanation,) = explanations(build_model(risam_cfg).eval(), [inputs])
    assert set(explanation.maps) == {"vision-guided", "language-guided"}
    for values in explanation.maps.values():
        # The rest of a region's attention goes to regions, of a word's to words.
        assert values.shape == (3, 8, 4, 4) and (values[text_mask] > 0).all()
    assert (explanation.maps["vision-guided"].sum(1) < 1).all()
    assert not explanation.maps["vision-guided"][~text_mask].any()
    assert (explanation.maps["language-guided"].sum((2, 3)) < 1).all()
    for fusion in ("conv", "none"):
        risam_cfg.MODEL.RISAM.FUSION = fusion
        assert explanations(build_model(risam_cfg).eval(), [inputs])[0].maps == {}


def test_asda_shows_coarse_and_fine_maps(asda_cfg, make_inputs):
    model = build_model(asda_cfg).eval()
    first, _ = explanations(model, [make_inputs(seed=0), make_inputs(seed=1)])
    assert {name: m.shape for name, m in first.maps.items()} == {
        "coarse": (3, 4, 6),
        "fine": (3, 4, 6),
    }
    asda_cfg.MODEL.ASDA.ALIGNER = "none"
    assert set(explanations(build_model(asda_cfg).eval(), [make_inputs()])[0].maps) == {"coarse"}


def test_a_method_without_maps_says_so(tiny_cfg, make_inputs):
    class Mute(ReferringSegmenter):
        def encode_images(self, images, views):
            return images

    model = Mute(pixel_mean=[0] * 3, pixel_std=[1] * 3, input_size=(32, 48)).eval()
    with pytest.raises(NotImplementedError, match="Mute has no attention maps"):
        explanations(model, [make_inputs()])
