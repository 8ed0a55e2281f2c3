import pytest
import torch
import torch.nn.functional as F
from detectron2.modeling import build_model

from ris_d2 import load_config
from ris_d2.modeling.asda import ASDA
from ris_d2.modeling.asda.blocks import convolve_enlarged

LEAF = "configs/asda_clip_vit_b.yaml"
VARIANTS = {
    "released": [],
    "straight_through": ["SELECTION.MODE", "straight_through"],
    "soft_conv": ["SELECTION.MODE", "soft", "SELECTION.NETWORK", "conv"],
    "mlp": ["SELECTION.MODE", "straight_through", "SELECTION.NETWORK", "mlp"],
    "concat_final": [
        *("SELECTION.MODE", "straight_through", "SELECTION.NETWORK", "concat"),
        *("SELECTION.TEXT", "final"),
    ],
    "baseline": ["AGGREGATOR", "none", "ALIGNER", "none"],
    "manual": [
        *("SELECTION.LOW_LAYERS", (2,), "SELECTION.MID_LAYERS", (4,)),
        *("AGGREGATOR", "concat", "ALIGNER", "none"),
    ],
    "single": ["ALIGNER", "single"],
    "paper": [
        *("AGGREGATOR", "paper", "PRE_NORM", True, "DECODER", "paper", "RESPONSES", "sigmoid"),
        *("COEFFICIENT_KERNEL", 1, "FOCAL_ALPHA", 0.25, "FOCAL_GAMMA", 2.0),
    ],
    "group_norm": ["NORM", "GN", "DIM", 64],
}
# Adding the same to each pixel before a BatchNorm changes nothing: true zeros.
NO_GRADIENT = ("fusion.words.bias", "aggregator.low.0.bias")


def published(*options):
    with torch.device("meta"):
        return ASDA(load_config(LEAF, ["MODEL.DEVICE", "cpu", *options]))


def count(module, trainable=False):
    return sum(p.numel() for p in module.parameters() if p.requires_grad or not trainable)


def test_parameters_of_the_default():
    model = published()
    assert count(model, trainable=True) == 180_403_200
    assert count(model) - count(model, trainable=True) == count(model.selection) == 394_240
    millions = {name: round(count(part) / 1e6, 3) for name, part in model.named_children()}
    expected = {"projection": 0.591, "aggregator": 13.578, "attention": 3.157, "decoder": 3.615}
    assert {name: millions[name] for name in expected} == expected
    assert count(model.coefficients.out) == 26 * 26 * 32 * 32


def test_learning_rates_of_the_default():
    from ris_d2.engine.optimizer import build_optimizer

    model = published()
    groups = build_optimizer(load_config(LEAF), model).param_groups
    sizes = {round(g["lr"], 9): 0 for g in groups}
    for group in groups:
        sizes[round(group["lr"], 9)] += sum(p.numel() for p in group["params"])
    position = model.vision.transformer.embeddings.position_embedding.numel()
    encoders = count(model.vision) - position + count(model.text)
    assert sizes == {4.4e-5: 180_403_200 - encoders, 4.4e-6: encoders}


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS)
def test_every_parameter_learns_and_every_variant_segments(
    changes, tiny_cfg, make_inputs, without_gradient
):
    tiny_cfg.MODEL.ASDA.merge_from_list(changes)
    tiny_cfg.MODEL.RIS.NO_TARGET = "head"
    if "GN" in changes:  # 32 groups of channels, half of this many in the pyramid
        tiny_cfg.MODEL.RIS.CLIP_VIT.DIM = 64
    torch.manual_seed(0)
    model = build_model(tiny_cfg)
    losses = model([make_inputs(seed=0), make_inputs(seed=1, num_expressions=2)])
    assert set(losses) == {"loss_dice", "loss_focal", "loss_existence"}
    sum(losses.values()).backward()
    assert [name for name in without_gradient(model) if not name.endswith(NO_GRADIENT)] == []
    results = model.eval()([make_inputs(seed=0)])[0]["referring"]
    assert [r["mask"].shape for r in results] == [(40, 60)] * 3


def test_only_the_hard_selector_is_frozen(tiny_cfg):
    model = build_model(tiny_cfg)
    frozen = {n for n, p in model.named_parameters() if not p.requires_grad}
    assert frozen == {n for n, _ in model.named_parameters() if n.startswith("selection.")}
    tiny_cfg.MODEL.ASDA.SELECTION.MODE = "soft"
    assert all(p.requires_grad for p in build_model(tiny_cfg).parameters())


def test_images_are_encoded_once_and_maps_enlarged_once(tiny_cfg, make_inputs):
    """Eight expressions of one image: at most one map per candidate layer goes through the pyramid."""
    model = build_model(tiny_cfg).eval()
    seen = {"vision": [], "mid": [], "low": []}
    model.vision.transformer.register_forward_hook(lambda *_: seen["vision"].append(1))
    for level in ("mid", "low"):
        getattr(model.aggregator, level).register_forward_hook(
            lambda _, args, out, level=level: seen[level].append(len(args[0]))
        )
    inputs = make_inputs(num_expressions=8)
    together = model([inputs])[0]["referring"]
    assert seen["vision"] == [1] and max(seen["mid"] + seen["low"]) <= 2
    for i in range(8):
        alone = dict(inputs, input_ids=inputs["input_ids"][i : i + 1])
        alone["text_mask"] = inputs["text_mask"][i : i + 1]
        alone["expressions"] = inputs["expressions"][i : i + 1]
        result = model([alone])[0]["referring"][0]
        assert torch.equal(result["mask"], together[i]["mask"])
        assert result["score"] == pytest.approx(together[i]["score"], abs=1e-6)


def test_two_images_do_not_mix(tiny_cfg, make_inputs):
    model = build_model(tiny_cfg).eval()
    a, b = make_inputs(seed=0), make_inputs(seed=1)
    with torch.no_grad():
        both = [r["score"] for x in model([a, b]) for r in x["referring"]]
        alone = [r["score"] for u in (a, b) for r in model([u])[0]["referring"]]
    assert both == pytest.approx(alone, abs=1e-6)


def test_masks_are_weighted_responses(tiny_cfg, make_inputs):
    """Eq. 10, and the names under which intermediate results are handed out."""
    model = build_model(tiny_cfg).eval()
    kept = {}
    model.decoder.register_forward_hook(lambda m, a, out: kept.update(masks=out.clone()))
    model.coefficients.register_forward_hook(lambda m, a, out: kept.update(weights=out))
    ids = torch.randint(1, 50, (2, 8))
    with torch.no_grad():
        features = model.encode_images(torch.rand(1, 3, 32, 48), {})
        mask = torch.ones(2, 8, dtype=torch.bool)
        out = model.segment(features, torch.zeros(2, dtype=torch.long), ids, mask)
    expected = (kept["masks"].relu() * kept["weights"][..., None, None]).sum(1)
    assert torch.allclose(out["mask_logits"], expected, atol=1e-6)
    assert out["mask_logits"].shape == (2, 32, 48)
    assert out["coarse"].shape == out["fine"].shape == (2, 24, 4, 6)
    assert set(out["low_layer"].tolist()) <= {1, 2} and set(out["mid_layer"].tolist()) <= {3, 4}


def test_the_end_token_is_the_last_real_one(tiny_cfg):
    """Padding beyond it changes words (they are read, as released) but not the sentence."""
    model = build_model(tiny_cfg).eval()
    ids = torch.randint(1, 50, (1, 8))
    mask = torch.arange(8)[None] < 5
    with torch.no_grad():
        features = model.encode_images(torch.rand(1, 3, 32, 48), {})
        row = torch.zeros(1, dtype=torch.long)
        first = model.segment(features, row, ids, mask)
        second = model.segment(features, row, torch.where(mask, ids, 0), mask)
    assert torch.allclose(first["sentence"][:, -16:], second["sentence"][:, -16:], atol=1e-6)
    assert not torch.allclose(first["fine"], second["fine"], atol=1e-5)


@pytest.mark.parametrize(
    "key, value, message",
    [
        ("SELECTION.MODE", "argmax", "SELECTION.MODE is 'argmax'"),
        ("SELECTION.NETWORK", "deep", "SELECTION.NETWORK is 'deep'"),
        ("SELECTION.TEXT", "word", "SELECTION.TEXT is 'word'"),
        ("SELECTION.LOW_LAYERS", (0, 1), "LOW_LAYERS is .0, 1.: .* 1..5"),
        ("SELECTION.MID_LAYERS", (5, 6), "MID_LAYERS is .5, 6."),
        ("AGGREGATOR", "sum", "AGGREGATOR is 'sum'"),
        ("ALIGNER", "triple", "ALIGNER is 'triple'"),
        ("DECODER", "deep", "DECODER is 'deep'"),
        ("RESPONSES", "gelu", "RESPONSES is 'gelu'"),
    ],
)
def test_wrong_values_are_named(key, value, message, tiny_cfg):
    tiny_cfg.MODEL.ASDA.merge_from_list([key, value])
    with pytest.raises(ValueError, match=message):
        build_model(tiny_cfg)


def test_one_expression_has_no_batch_statistics(tiny_cfg, make_inputs):
    with pytest.raises(ValueError, match="two expressions per process.*MODEL.ASDA.NORM"):
        build_model(tiny_cfg)([make_inputs(num_expressions=1)])


@pytest.mark.not_pretended
def test_it_learns_one_image(tiny_cfg, make_inputs, fit_one_image):
    tiny_cfg.MODEL.ASDA.merge_from_list(["NORM_MOMENTUM", 0.1, "DROPOUT", 0.0])
    torch.manual_seed(0)
    model, inputs = build_model(tiny_cfg), make_inputs()
    assert fit_one_image(model, inputs) < 0.5


def test_the_existence_head_reads_the_sentence_and_what_pixels_made_of_it(tiny_cfg):
    """Of the strongest pixel, wherever it is: a target is not missed because it is small."""
    model = build_model(tiny_cfg).eval()
    ids = torch.randint(1, 50, (2, 8))
    mask, rows = torch.ones(2, 8, dtype=torch.bool), torch.tensor([0, 1])
    with torch.no_grad():
        one = model.segment(model.encode_images(torch.rand(2, 3, 32, 48), {}), rows, ids, mask)
        two = model.segment(model.encode_images(torch.rand(2, 3, 32, 48), {}), rows, ids, mask)
    assert torch.equal(one["sentence"][:, :24], one["fine"].flatten(2).max(2).values)
    assert torch.equal(one["sentence"][:, 24:], two["sentence"][:, 24:])
    assert not torch.allclose(one["sentence"][:, :24], two["sentence"][:, :24], atol=1e-4)


@pytest.mark.not_pretended
def test_layers_are_selected_in_fp32_under_autocast(tiny_cfg, device):
    """Rounded scores would choose other layers."""
    torch.manual_seed(0)
    selection = build_model(tiny_cfg).selection
    states = [torch.randn(4, 25, 32) for _ in range(5)]
    sentences = [torch.randn(4, 16) for _ in range(5)]
    expected = selection.score("low", states, sentences, torch.arange(4))
    with torch.autocast(device, torch.bfloat16):
        assert selection.project(states[0][:, 0]).dtype == torch.bfloat16  # what would happen
        scores = selection.score("low", states, sentences, torch.arange(4))
    assert scores.dtype == torch.float32 and torch.equal(scores, expected)


def test_bfloat16_stays_near_fp32(tiny_cfg, make_inputs):
    tiny_cfg.MODEL.ASDA.DROPOUT = 0.0
    torch.manual_seed(0)
    model, inputs = build_model(tiny_cfg), [make_inputs()]
    expected = {name: loss.item() for name, loss in model(inputs).items()}
    model.precision = "bf16"
    losses = model(inputs)
    sum(losses.values()).backward()
    assert {n: loss.item() for n, loss in losses.items()} == pytest.approx(expected, rel=0.03)
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.requires_grad)


def test_a_convolution_of_an_enlarged_map_and_its_gradients():
    torch.manual_seed(0)
    x = torch.randn(2, 3, 4, 5, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(6, 3, 3, 3, dtype=torch.float64, requires_grad=True)
    enlarged = F.interpolate(x, scale_factor=2, mode="nearest")
    expected, result = F.conv2d(enlarged, weight, padding=1), convolve_enlarged(x, weight)
    assert torch.allclose(result, expected)
    seed = torch.randn_like(expected)
    for a, b in zip(*(torch.autograd.grad(y, (x, weight), seed) for y in (result, expected))):
        assert torch.allclose(a, b)
