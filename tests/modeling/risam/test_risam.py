import pytest
import torch
from detectron2.modeling import build_model

from ris_d2 import get_ris_cfg, load_config
from ris_d2.modeling.risam import RISAM

# Every row of the paper's ablations that changes the network, and every reading that is a key.
VARIANTS = [
    [],
    ["FE.TYPE", "linear"],
    ["FE.TYPE", "vitdet"],
    ["FUSION", "conv"],
    ["FUSION", "te"],
    ["FUSION", "sdf", "MA.USE_MASK", False],
    ["FUSION", "bcm"],
    ["DEC.TYPE", "sam"],
    ["DEC.TYPE", "sam", "FUSION", "none"],
    ["DEC.TOI_A", True],
    ["DEC.ELG", False],
    ["DEC.NORM", "LN", "DEC.FFN_DIM", 24, "DEC.NUM_BLOCKS", 1],
    ["MA.LGA_NORM", "none", "MA.NUM_BLOCKS", 1, "LANG_POS_ENC", "learned"],
    ["MA.LGA_NORM", "softmax", "MA.NUM_BLOCKS", 3, "LANG_POS_ENC", "none"],
]


def published(*changes):
    cfg = get_ris_cfg()
    cfg.MODEL.BACKBONE.NAME = "RISSAMViT"
    cfg.MODEL.PIXEL_MEAN, cfg.MODEL.PIXEL_STD = [127.5] * 3, [127.5] * 3
    cfg.INPUT.RIS.SIZE, cfg.INPUT.RIS.MAX_TOKENS = (1024, 1024), 17
    cfg.MODEL.RIS.FREEZE = type(cfg)({"backbone": "eval", "text": "eval"})
    cfg.merge_from_list(list(changes))
    with torch.device("meta"):
        return RISAM(cfg)


def count(module, *, trainable=False):
    return sum(p.numel() for p in module.parameters() if p.requires_grad or not trainable)


def test_parameters_of_the_default():
    model = published()
    decoder = model.decoder
    assert count(model.enhancement) == 3_673_088
    assert count(model.fusion) == 329_728
    assert count(decoder.query) == 256
    assert count(decoder.blocks) == 1_579_008
    assert count(decoder.upsample) == 164_416
    assert count(decoder.token_mlp) == 148_032
    assert count(model, trainable=True) == 5_894_528
    assert round(100 * count(model, trainable=True) / count(model), 2) == 0.83


@pytest.mark.parametrize(
    "changes, parameters",
    [
        (["RIS.TEXT.CLIP.DIM", 768, "RIS.TEXT.CLIP.NUM_HEADS", 12], 5_960_064),
        (["RISAM.DEC.NORM", "LN"], 5_897_600),
        (["RISAM.MA.NUM_BLOCKS", 1], 5_762_432),
        (["RISAM.MA.NUM_BLOCKS", 3], 6_026_624),
        (["RISAM.DEC.TOI_A", True], 6_420_864),
        (["RIS.SAM.EMBED_DIM", 1024], 5_697_920),
        (["RIS.SAM.EMBED_DIM", 768], 5_501_312),
    ],
)
def test_parameters_of_variants(changes, parameters):
    changes = [f"MODEL.{x}" if i % 2 == 0 else x for i, x in enumerate(changes)]
    assert count(published(*changes), trainable=True) == parameters


@pytest.mark.parametrize(
    "leaf, parameters",
    [
        ("risam_sam_vit_l", 5_697_920),
        ("risam_sam_vit_b", 5_501_312),
        ("risam_vit_b", 5_501_312),
        ("risam_swin_b", 5_370_240),
    ],
)
def test_parameters_of_other_backbones(leaf, parameters):
    """Table 7, and SAM's smaller encoders: frozen, so that Feature Enhancement alone is another."""
    with torch.device("meta"):
        model = RISAM(load_config(f"configs/{leaf}.yaml", ["MODEL.DEVICE", "cpu"]))
    assert count(model, trainable=True) == parameters


@pytest.mark.parametrize(
    "blocks, up_dims, millions",
    [
        (1, (128, 64), 5.11),
        (2, (128, 64), 5.89),
        (3, (128, 64), 6.68),
        (2, (64, 32), 5.80),
        (2, (256, 256), 6.31),
    ],
)
def test_sizes_that_the_paper_leaves_open(blocks, up_dims, millions):
    small = ["MODEL.RIS.SAM.DEPTH", 4, "MODEL.RIS.SAM.GLOBAL_BLOCKS", (0, 1, 2, 3)]
    sizes = ["MODEL.RISAM.DEC.NUM_BLOCKS", blocks, "MODEL.RISAM.DEC.UP_DIMS", up_dims]
    model = published(*small, *sizes)
    assert count(model, trainable=True) / 1e6 == pytest.approx(millions, abs=0.0051)


@pytest.mark.parametrize("changes", VARIANTS)
def test_every_parameter_learns_and_every_variant_segments(
    changes, risam_cfg, make_square, without_gradient
):
    risam_cfg.MODEL.RISAM.merge_from_list(changes)
    if risam_cfg.MODEL.RISAM.DEC.TYPE == "mutual":
        risam_cfg.MODEL.RIS.NO_TARGET = "head"
    torch.manual_seed(0)
    model = build_model(risam_cfg)
    losses = model([make_square(seed=0), make_square(seed=1, num_expressions=2)])
    assert {"loss_focal", "loss_dice"} <= set(losses)
    sum(losses.values()).backward()
    assert without_gradient(model) == []
    results = model.eval()([make_square(seed=0)])[0]["referring"]
    assert [r["mask"].shape for r in results] == [(40, 60)] * 3


@pytest.mark.parametrize("changes", [v for v in VARIANTS if "sam" not in v])
def test_existence_depends_on_image_and_sentence(
    changes, risam_cfg, make_square, existence_differs
):
    """In fusions, too, whose words do not know the image."""
    risam_cfg.MODEL.RISAM.merge_from_list(changes)
    risam_cfg.MODEL.RIS.NO_TARGET = "head"
    torch.manual_seed(0)
    model = build_model(risam_cfg)
    assert existence_differs(model, make_square(seed=0), make_square(seed=1)) == [True, True]


def test_frozen_encoders_stay_in_eval_mode_and_leave_no_graph(risam_cfg, make_square):
    risam_cfg.MODEL.RIS.FREEZE = type(risam_cfg)({"backbone": "eval", "text": "eval"})
    model = build_model(risam_cfg).train()
    assert not model.backbone.training and not model.text.training and model.fusion.training
    seen = {}
    for name in ("backbone", "text"):
        model.get_submodule(name).register_forward_hook(
            lambda _, args, out, name=name: seen.update({name: out})
        )
    before = {n: p.clone() for n, p in model.named_parameters() if not p.requires_grad}
    sum(model([make_square()]).values()).backward()
    assert not any(x.requires_grad for x in (*seen["backbone"].values(), seen["text"]))
    assert all(
        p.grad is None and torch.equal(p, before[n])
        for n, p in model.named_parameters()
        if n in before
    )
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_image_encoder_and_enhancement_run_once_per_image(risam_cfg, make_square):
    risam_cfg.TEST.MAX_EXPRESSIONS = 2
    model, seen = build_model(risam_cfg).eval(), []
    for name in ("backbone", "enhancement", "text"):
        model.get_submodule(name).register_forward_hook(
            lambda _, args, out, name=name: seen.append((name, len(args[0])))
        )
    model([make_square(num_expressions=5)])
    assert seen == [("backbone", 1), ("enhancement", 3), ("text", 2), ("text", 2), ("text", 1)]


def test_expressions_do_not_depend_on_their_company(risam_cfg, make_square):
    """Slices, other sentences' lengths, other images."""
    for changes in ([], ["DEC.TYPE", "sam"]):
        cfg = risam_cfg.clone()
        cfg.MODEL.RISAM.merge_from_list(changes)
        torch.manual_seed(0)
        model = build_model(cfg).eval()
        together = [make_square(seed=0, lengths=[8, 4, 5]), make_square(seed=1)]
        alone = make_square(seed=0, lengths=[8, 4, 5])
        for key in ("input_ids", "text_mask"):
            alone[key] = alone[key][1:2]
        alone["expressions"] = alone["expressions"][1:2]
        scores = [model(x)[0]["referring"] for x in (together, [alone])]
        assert scores[0][1]["score"] == pytest.approx(scores[1][0]["score"], abs=1e-5)


def test_losses_are_those_of_the_equations(risam_cfg):
    model = build_model(risam_cfg)
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 8, 8, generator=generator)
    masks = torch.zeros(2, 32, 32, dtype=torch.bool)
    masks[0, 8:24, 8:24] = True
    losses = model.mask_losses({"mask_logits": logits}, masks)
    p, t = logits.sigmoid(), masks[:, ::4, ::4].float()
    p_t = torch.where(t == 1, p, 1 - p)
    focal = (-((1 - p_t) ** 2) * p_t.log()).mean((1, 2))
    dice = 1 - 2 * (p * t).sum((1, 2)) / (p.sum((1, 2)) + t.sum((1, 2)))
    assert torch.allclose(losses["loss_focal"], 0.5 * focal, atol=1e-6)
    assert torch.allclose(losses["loss_dice"], 0.5 * dice, atol=1e-6)


def test_the_two_thresholds_are_two(risam_cfg, make_square):
    """tau changes what is attended, MASK_THRESHOLD what is foreground."""
    torch.manual_seed(0)
    model = build_model(risam_cfg).eval()
    results = model([make_square()])[0]["referring"]
    model.mask_threshold = results[0]["score"] + 1e-3
    strict = model([make_square()])[0]["referring"]
    assert not strict[0]["mask"].any() and strict[0]["score"] == results[0]["score"]
    for block in model.fusion.blocks:
        block.tau = 0.6
    assert model([make_square()])[0]["referring"][0]["score"] != results[0]["score"]


def test_words_know_their_position_by_sine(risam_cfg):
    model = build_model(risam_cfg)
    words = torch.zeros(1, 5, 24)
    table = model.word_positions(words)[0]
    for position in range(5):
        for i in range(12):
            angle = position / 10000 ** (2 * i / 24)
            pair = torch.tensor([angle, angle + torch.pi / 2]).sin()
            assert torch.allclose(table[position, 2 * i : 2 * i + 2], pair, atol=1e-5)


def test_another_backbone(risam_cfg, make_inputs):
    risam_cfg.merge_from_list(["MODEL.BACKBONE.NAME", "RISViT", "INPUT.RIS.SIZE", (32, 48)])
    risam_cfg.MODEL.RISAM.STRIDE = 16
    risam_cfg.MODEL.RIS.VIT.merge_from_list(["NAME", "test_vit", "OUT_BLOCKS", (1, 3, 5)])
    risam_cfg.MODEL.RISAM.IN_FEATURES = ("block1", "block3", "block5")
    model = build_model(risam_cfg)
    assert model.grid == (2, 3)
    sum(model([make_inputs()]).values()).backward()
    assert model.eval()([make_inputs()])[0]["referring"][0]["mask"].shape == (40, 60)


def test_synchronised_batch_norm_falls_back_on_the_cpu(risam_cfg, make_square):
    risam_cfg.MODEL.RISAM.NORM = "SyncBN"
    torch.manual_seed(0)
    synchronised = build_model(risam_cfg)
    risam_cfg.MODEL.RISAM.NORM = "BN"
    plain = build_model(risam_cfg)
    plain.load_state_dict(synchronised.state_dict())
    losses = [model([make_square()]) for model in (synchronised, plain)]
    for name, loss in losses[0].items():
        assert loss.item() == pytest.approx(losses[1][name].item(), abs=1e-6)
    risam_cfg.MODEL.RISAM.NORM, risam_cfg.MODEL.DEVICE = "SyncBN", "cuda"
    assert isinstance(RISAM(risam_cfg).decoder.upsample[1], torch.nn.SyncBatchNorm)


def test_bfloat16_stays_near_fp32(risam_cfg, make_square):
    torch.manual_seed(0)
    model, inputs = build_model(risam_cfg), [make_square()]
    expected = {name: loss.item() for name, loss in model(inputs).items()}
    model.precision = "bf16"
    losses = model(inputs)
    sum(losses.values()).backward()
    assert {n: x.item() for n, x in losses.items()} == pytest.approx(expected, rel=0.03)
    assert all(p.grad is None or torch.isfinite(p.grad).all() for p in model.parameters())


@pytest.mark.not_pretended
def test_it_learns_one_image(risam_cfg, make_square, fit_one_image):
    risam_cfg.MODEL.RIS.NO_TARGET = "head"
    risam_cfg.MODEL.RISAM.merge_from_list(["DEC.NORM", "LN", "DICE_SMOOTH", 1.0, "DIM", 32])
    torch.manual_seed(1)
    model, inputs = build_model(risam_cfg), make_square()
    assert fit_one_image(model, inputs) < 0.3
    results = model.eval()([inputs])[0]["referring"]
    assert [r["no_target"] for r in results] == [False, False, True]


@pytest.mark.parametrize(
    "changes, message",
    [
        (
            ["RISAM.IN_FEATURES", ("res3", "res4")],
            "RISSAMViT', which gives global1.* needs res3, res4",
        ),
        (["RISAM.IN_FEATURES", ("global4",)], "fuses three maps; .* has 1"),
        (["RISAM.FE.TYPE", "fpn"], "FE.TYPE is 'fpn'"),
        (["RISAM.FE.TYPE", "identity", "RISAM.DIM", 32], "DIM = 32 channels; .* has 16"),
        (["RISAM.FUSION", "none", "RISAM.DEC.ELG", False], "the sentence reaches nothing"),
        (["RISAM.DEC.TYPE", "mask2former"], "DEC.TYPE is 'mask2former'"),
        (["RISAM.DEC.TYPE", "sam", "RIS.NO_TARGET", "head"], "needs RISAM's query token"),
        (["RISAM.DEC.NORM", "BN"], "DEC.NORM is 'BN', not one of 'none', 'LN'"),
        (["RISAM.LANG_POS_ENC", "rotary"], "LANG_POS_ENC is 'rotary'"),
        (["RISAM.MA.LGA_NORM", "mean"], "LGA_NORM is 'mean'"),
    ],
)
def test_settings_that_make_no_sense_are_named(changes, message, risam_cfg):
    risam_cfg.MODEL.merge_from_list(changes)
    with pytest.raises(ValueError, match=message):
        build_model(risam_cfg)
