import pytest
import torch
from detectron2.modeling import build_model

from ris_d2 import get_ris_cfg
from ris_d2.modeling.shared_ris import SharedRIS
from ris_d2.modeling.shared_ris.variants import BiDirection, CrossAttention

ABLATIONS = [
    [],
    ["STAGES", (), "DECODER_LAYERS", 0],
    ["STAGES", ()],
    ["DECODER_LAYERS", 0],
    ["PROJ_PER_MODALITY", False],
    ["FPN_FUSION", "cross", "DECODER_FUSION", "cross"],
    ["FPN_FUSION", "bi", "DECODER_FUSION", "bi", "DECODER_LAYERS", 2],
    ["NORM", "GN", "DIM", 32],
    ["FPN", "cris", "PROJ_PER_MODALITY", False],
    ["FPN", "cris", "STAGES", (2,), "DECODER_LAYERS", 0],
    ["FPN", "pwam"],
    ["FPN", "pwam", "DECODER_LAYERS", 0],
]


def published(*changes):
    cfg = get_ris_cfg()
    cfg.merge_from_list([*("MODEL.PIXEL_MEAN", [127.5] * 3, "MODEL.PIXEL_STD", [127.5] * 3)])
    cfg.MODEL.SHARED_RIS.merge_from_list(list(changes))
    with torch.device("meta"):
        return SharedRIS(cfg)


def count(module):
    return sum(p.numel() for p in module.parameters())


def test_parameters_of_the_default():
    """The whole less BEiT-3's parts that Shared-RIS does not read: mask token and last LayerNorm."""
    model = published()
    assert count(model.encoder) == 221_528_064 - 768 - 4 * 768
    assert count(model.fpn) == 8_405_504
    assert count(model.decoder) == 8_660_992
    assert round(count(model) / 1e6, 1) == 238.6


@pytest.mark.parametrize(
    "changes, part, millions",
    [  # the paper's tables III, VII and VIII, to the digit that the counts of the spec have
        (["STAGES", (6, 12)], "fpn", 4.20),
        (["STAGES", (4, 8, 12)], "fpn", 6.30),
        (["PROJ_PER_MODALITY", False], "fpn", 6.83),
        (["PROJ_PER_MODALITY", False, "STAGES", (6, 12)], "fpn", 3.42),
        (["FPN_FUSION", "cross"], "fpn", 8.41),
        (["FPN_FUSION", "bi"], "fpn", 37.84),
        (["FPN_FUSION", "bi", "PROJ_PER_MODALITY", False], "fpn", 36.26),
        # Table IV, whose figures we cannot read; both are more than the shared FPN's, as it says.
        (["FPN", "cris", "STAGES", (4, 8, 12)], "fpn", 21.91),
        (["FPN", "pwam"], "fpn", 15.75),
        (["DECODER_LAYERS", 0], "decoder", 5.51),
        (["DECODER_LAYERS", 2], "decoder", 11.81),
        (["DECODER_LAYERS", 3], "decoder", 14.97),
    ],
)
def test_parameters_of_the_ablations(changes, part, millions):
    assert count(getattr(published(*changes), part)) / 1e6 == pytest.approx(millions, abs=0.0051)


@pytest.mark.parametrize("changes", ABLATIONS)
def test_every_parameter_learns_and_every_variant_segments(
    changes, tiny_cfg, make_inputs, without_gradient
):
    tiny_cfg.MODEL.SHARED_RIS.merge_from_list(changes)
    tiny_cfg.MODEL.RIS.NO_TARGET = "head"
    torch.manual_seed(0)
    model = build_model(tiny_cfg)
    losses = model([make_inputs(seed=0), make_inputs(seed=1, num_expressions=2)])
    assert set(losses) == {"loss_bce", "loss_dice", "loss_existence"}
    sum(losses.values()).backward()
    assert without_gradient(model) == []
    results = model.eval()([make_inputs(seed=0)])[0]["referring"]
    assert [r["mask"].shape for r in results] == [(40, 60)] * 3


def test_mask_is_sentence_times_pixels(tiny_cfg, make_inputs):
    """Eq. 11: scaling the sentence vector scales the logits."""
    model = build_model(tiny_cfg).eval()
    inputs = make_inputs()
    streams = torch.randn(2, 25, 16), torch.randn(2, 8, 16)
    mask = inputs["text_mask"][:2].to(model.device)
    with torch.no_grad():
        logits, sentence = model.decoder(streams, mask)
        model.decoder.sentence[2].weight.mul_(2)
        model.decoder.sentence[2].bias.mul_(2)
        doubled, _ = model.decoder(streams, mask)
    assert logits.shape == (2, 16, 24) and sentence.shape == (2, 16)
    assert torch.allclose(doubled, 2 * logits, atol=1e-5)


@pytest.mark.parametrize("fusion", [CrossAttention, BiDirection])
def test_fusions_let_the_modalities_meet_and_mask_pads(fusion):
    torch.manual_seed(0)
    module = fusion(dim=16, num_heads=2)
    vision, text = torch.randn(1, 6, 16), torch.randn(1, 4, 16)
    mask = torch.tensor([[True, True, True, False]])
    changed_pad, changed_word = text.clone(), text.clone()
    changed_pad[0, 3] += 1
    changed_word[0, 0, 0] += 1
    outputs = [module((vision, t), mask) for t in (text, changed_pad, changed_word)]
    assert torch.allclose(outputs[0][0], outputs[1][0], atol=1e-6)
    assert not torch.allclose(outputs[0][0], outputs[2][0], atol=1e-4)
    moved = module((vision + torch.randn_like(vision), text), mask)
    assert not torch.allclose(outputs[0][1], moved[1], atol=1e-4)


@pytest.mark.parametrize("fpn", ["cris", "pwam"])
def test_other_fpns_let_words_reach_the_pixels_and_mask_pads(fpn, tiny_cfg):
    tiny_cfg.MODEL.SHARED_RIS.FPN = fpn
    torch.manual_seed(0)
    module = build_model(tiny_cfg).eval().fpn
    vision, text = torch.randn(2, 2, 25, 32), torch.randn(2, 2, 6, 32)
    mask = torch.arange(6) < torch.tensor([[6], [4]])

    def pixels(text):
        states = {stage: (vision[i], text[i]) for i, stage in enumerate(module.stages)}
        vision_out, text_out = module(states, mask)
        assert vision_out.shape == (2, 25, 16) and text_out.shape == (2, 6, 16)
        return vision_out[:, 1:]

    first_word, pads = text.clone(), text.clone()
    first_word[:, :, 0] += 1
    pads[:, 1, 4:] += 1
    assert torch.allclose(pixels(pads), pixels(text), atol=1e-6)
    assert (pixels(first_word) - pixels(text)).abs().amax((1, 2)).min() > 1e-3


def test_cris_fpn_sees_where_pixels_are(tiny_cfg):
    """Alike pixels get unlike features only from CoordConv and from the padding at the borders."""
    tiny_cfg.MODEL.SHARED_RIS.FPN = "cris"
    tiny_cfg.INPUT.RIS.SIZE = (
        96,
        96,
    )  # 12 x 12 patches: the inner ones are out of the borders' reach
    module = build_model(tiny_cfg).eval().fpn
    states = {stage: (torch.ones(1, 145, 32), torch.ones(1, 6, 32)) for stage in module.stages}
    inner = module(states, torch.ones(1, 6, dtype=torch.bool))[0][0, 1:].view(12, 12, 16)[5:7, 5:7]
    rows = inner.flatten(0, 1)
    assert (rows[0] - rows[1]).abs().max() > 1e-6 and (rows[0] - rows[2]).abs().max() > 1e-6
    with torch.no_grad():
        module.locate.weight[:, -2:] = 0
    inner = module(states, torch.ones(1, 6, dtype=torch.bool))[0][0, 1:].view(12, 12, 16)[5:7, 5:7]
    assert torch.allclose(inner, inner[:1, :1].expand(2, 2, 16), atol=1e-7)


def test_no_target_and_single_expression_batches(tiny_cfg, make_inputs):
    model = build_model(tiny_cfg)
    inputs = make_inputs(num_expressions=1)  # its only expression has no target
    assert not inputs["targets"].any()
    assert all(torch.isfinite(loss) for loss in model([inputs]).values())


@pytest.mark.parametrize("stages", [(1,), (2, 1), (1, 3), (1, 1, 2)])
def test_stages_that_leave_layers_untrained_are_refused(stages, tiny_cfg):
    tiny_cfg.MODEL.SHARED_RIS.STAGES = stages
    with pytest.raises(ValueError, match="STAGES"):
        build_model(tiny_cfg)


def test_wrong_names_are_refused(tiny_cfg):
    for key in ("FPN", "FPN_FUSION", "DECODER_FUSION"):
        cfg = tiny_cfg.clone()
        cfg.MODEL.SHARED_RIS[key] = "best"
        with pytest.raises(ValueError, match="best"):
            build_model(cfg)


@pytest.mark.not_pretended
def test_it_learns_one_image(tiny_cfg, make_inputs, fit_one_image):
    tiny_cfg.MODEL.RIS.NO_TARGET = "head"
    tiny_cfg.MODEL.SHARED_RIS.merge_from_list(["NORM", "GN", "DIM", 32])
    torch.manual_seed(0)
    model, inputs = build_model(tiny_cfg), make_inputs()
    assert fit_one_image(model, inputs) < 0.3
    results = model.eval()([inputs])[0]["referring"]
    assert [r["no_target"] for r in results] == [False, False, True]


def test_token_ids_of_another_tokenizer_are_named(tiny_cfg, make_inputs):
    inputs = make_inputs()
    inputs["input_ids"][0, 0] = 50
    with pytest.raises(ValueError, match="token id 50 .* vocabulary of 50: INPUT.RIS.TOKENIZER"):
        build_model(tiny_cfg)([inputs])


def test_bfloat16_trains_and_stays_near_fp32(tiny_cfg, make_inputs):
    tiny_cfg.MODEL.RIS.BEIT3.DROP_PATH = 0.0
    torch.manual_seed(0)
    model, inputs = build_model(tiny_cfg), [make_inputs()]
    expected = {name: loss.item() for name, loss in model(inputs).items()}
    model.precision = "bf16"
    losses = model(inputs)
    sum(losses.values()).backward()
    assert {name: loss.item() for name, loss in losses.items()} == pytest.approx(expected, rel=0.02)
    assert all(p.grad is None or torch.isfinite(p.grad).all() for p in model.parameters())
    assert all(p.dtype == torch.float32 for p in model.parameters())
