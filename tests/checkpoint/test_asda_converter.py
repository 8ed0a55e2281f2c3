"""The layout of a released ASDA checkpoint, sizes shrunk."""

import pytest
import torch
from detectron2.modeling import build_model

from ris_d2 import get_ris_cfg
from ris_d2.checkpoint import RISCheckpointer, convert_state_dict

VISION, TEXT, DIM, MASKS, WORDS, VOCABULARY = 16, 12, 24, 3, 6, 20
GRID = 2


def conv(inputs, outputs, kernel, bias=False):
    shapes = {"weight": (outputs, inputs, kernel, kernel)}
    return {**shapes, "bias": (outputs,)} if bias else shapes


def norm(channels, running=True):
    shapes = {"weight": (channels,), "bias": (channels,)}
    if running:
        shapes.update(running_mean=(channels,), running_var=(channels,), num_batches_tracked=())
    return shapes


def linear(inputs, outputs, bias=True):
    return {"weight": (outputs, inputs), **({"bias": (outputs,)} if bias else {})}


def block(inputs, outputs, kernel):
    """The released convolution block."""
    return under("conv", conv(inputs, outputs, kernel)) | under("bn", norm(outputs))


def under(prefix, shapes):
    return {f"{prefix}.{name}": shape for name, shape in shapes.items()}


def attention(dim):
    shapes = {"in_proj_weight": (3 * dim, dim), "in_proj_bias": (3 * dim,)}
    return shapes | under("out_proj", linear(dim, dim))


def clip_block(dim):
    return (
        under("attn", attention(dim))
        | under("ln_1", norm(dim, False))
        | under("ln_2", norm(dim, False))
        | under("mlp.c_fc", linear(dim, 4 * dim))
        | under("mlp.c_proj", linear(4 * dim, dim))
    )


def shapes(depth=4):
    half, quarter = VISION // 2, VISION // 4
    parts = {
        "positional_embedding": (1, 1 + GRID * GRID, VISION),
        "textmodel_pos_embed": (1, WORDS, TEXT),
        "textmodel_token_embedding.weight": (VOCABULARY, TEXT),
        **under("textmodel_ln_final", norm(TEXT, False)),
        "visumodel.class_embedding": (VISION,),
        "visumodel.positional_embedding": (5, VISION),
        "visumodel.proj": (VISION, TEXT),
        "visumodel.conv1.weight": (VISION, 3, 8, 8),
        **under("visumodel.ln_pre", norm(VISION, False)),
        **under("visumodel.ln_post", norm(VISION, False)),
        "vis_select.weight": (TEXT, VISION),
        **under("feature_selector_l", linear(TEXT, 1)),
        **under("feature_selector_m", linear(TEXT, 1)),
        **under("fusion.mapping_visu", block(VISION, VISION, 1)),
        **under("fusion.lang_attn.0", linear(TEXT, TEXT)),
        **under("fusion.lang_proj.0", linear(TEXT, VISION)),
        **under("fusion.lang_proj.1", norm(VISION)),
        **under("fusion.fusion.0", norm(VISION)),
        **under("up_proj_cat_proj_1.proj1", block(VISION, VISION, 1)),
        **under("proj_0", block(DIM, DIM, 1)),
        **under("norm1", norm(DIM, False)),
        **under("fpn.stages.0.0", block(VISION, DIM, 1)),
        **under("fpn.stages.0.1", block(DIM, DIM, 3)),
        "fpn.stages.1.0.weight": (VISION, half, 2, 2),
        "fpn.stages.1.0.bias": (half,),
        **under("fpn.stages.1.1", block(half, DIM, 1)),
        **under("fpn.stages.1.2", block(DIM, DIM, 3)),
        "fpn.stages.2.0.weight": (VISION, half, 2, 2),
        "fpn.stages.2.0.bias": (half,),
        **under("fpn.stages.2.1", norm(half)),
        "fpn.stages.2.3.weight": (half, quarter, 2, 2),
        "fpn.stages.2.3.bias": (quarter,),
        **under("fpn.stages.2.4", block(quarter, DIM, 1)),
        **under("fpn.stages.2.5", block(DIM, DIM, 3)),
        "fc_2.weight": (DIM, TEXT),
        **under("encoder.norm", norm(DIM, False)),
        **under("mask_decoder.proj1", block(DIM, DIM // 2, 3)),
        **under("mask_decoder.proj", conv(DIM // 2, MASKS, 3, bias=True)),
        **under("lang_tf_enc.self_attn", attention(DIM)),
        **under("lang_tf_enc.norm1", norm(DIM, False)),
        **under("lang_tf_enc.norm2", norm(DIM, False)),
        **under("lang_tf_enc.linear1", linear(DIM, 4 * DIM)),
        **under("lang_tf_enc.linear2", linear(4 * DIM, DIM)),
        **under("proj1", block(DIM, DIM, 3)),
        **under("proj2", block(DIM, DIM, 3)),
        **under("proj3", conv(DIM, MASKS, 3, bias=True)),
        "projout.weight": (MASKS, GRID * GRID * MASKS),
    }
    for i in range(depth):
        parts |= under(f"visumodel.transformer.resblocks.{i}", clip_block(VISION))
        parts |= under(f"visu_resblocks.{i}.clip_module", clip_block(VISION))
        parts |= under(f"textmodel.resblocks.{i}", clip_block(TEXT))
    for i in range(3):
        parts |= under(f"fpn.lateral_convs.{i}", block(DIM, DIM, 1))
        parts |= under(f"fpn.output_convs.{i}", block(DIM, DIM, 3))
    for i in range(2, 6):
        parts |= under(f"mask_decoder.proj{i}", block(DIM // 2, DIM // 2, 3))
    for i in range(2):
        layer = under("self_attn", attention(DIM)) | under("linear1", linear(DIM, DIM))
        layer |= under("linear2", linear(DIM, DIM))
        for name in ("norm1", "norm2"):
            layer |= under(name, norm(DIM, False))
        parts |= under(f"encoder.layers.{i}", layer)
    for name in ("dense_q", "dense_k", "dense_v"):
        parts |= under(f"lang_tf_enc.{name}", linear(DIM, DIM))
    return parts


def released():
    torch.manual_seed(0)
    state = {name: torch.rand(shape) for name, shape in shapes().items()}
    for name in [n for n in state if n.startswith("visu_resblocks.")]:  # the same tensors
        own = name.replace("visu_resblocks.", "visumodel.transformer.resblocks.")
        state[name] = state[own.replace(".clip_module", "")]
    return state


def config(*options):
    cfg = get_ris_cfg()
    size = 8 * GRID
    cfg.merge_from_list(
        [
            *("MODEL.DEVICE", "cpu", "MODEL.META_ARCHITECTURE", "ASDA"),
            *("MODEL.PIXEL_MEAN", [127.5] * 3, "MODEL.PIXEL_STD", [127.5] * 3),
            *("MODEL.BACKBONE.NAME", "RISCLIPViT", "INPUT.RIS.SIZE", (size, size)),
            *("INPUT.RIS.MAX_TOKENS", WORDS, "MODEL.RIS.CLIP_VIT.PATCH_SIZE", 8),
            *("MODEL.RIS.CLIP_VIT.DIM", VISION, "MODEL.RIS.CLIP_VIT.NUM_HEADS", 2),
            *("MODEL.RIS.CLIP_VIT.DEPTH", 4, "MODEL.RIS.TEXT.CLIP.DEPTH", 4),
            *("MODEL.RIS.TEXT.CLIP.DIM", TEXT, "MODEL.RIS.TEXT.CLIP.NUM_HEADS", 2),
            *("MODEL.RIS.TEXT.CLIP.VOCAB_SIZE", VOCABULARY),
            *("MODEL.ASDA.DIM", DIM, "MODEL.ASDA.NUM_HEADS", 2, "MODEL.ASDA.NUM_MASKS", MASKS),
            *("MODEL.ASDA.SELECTION.LOW_LAYERS", (1, 2)),
            *("MODEL.ASDA.SELECTION.MID_LAYERS", (3, 4), *options),
        ]
    )
    return cfg


@pytest.fixture
def released_file(tmp_path):
    path = tmp_path / "RefCOCO_model_best.pth.tar"
    state = {f"module.{name}": value for name, value in released().items()}
    torch.save({"epoch": 30, "state_dict": state, "best_iou": 0.7, "optimizer": {}}, path)
    return path


def test_a_released_file_serves_as_model_weights(released_file, caplog):
    model = build_model(config())
    with caplog.at_level("INFO"):
        RISCheckpointer(model).load(str(released_file))
    assert " 0 missing; 0 of another shape" in caplog.text
    state, ours = released(), model.state_dict()
    assert torch.equal(
        ours["vision.transformer.embeddings.position_embedding"][3],
        state["positional_embedding"][0, 3],
    )
    query, key, value = state["encoder.layers.1.self_attn.in_proj_weight"].chunk(3)
    assert torch.equal(ours["attention.layers.1.attention.key.weight"], key)
    assert torch.equal(
        ours["decoder.upsampling.2.1.running_var"], state["mask_decoder.proj5.bn.running_var"]
    )
    assert torch.equal(ours["aggregator.out.0.weight"], state["fpn.output_convs.2.conv.weight"])
    assert torch.equal(
        ours["word_attention.feed_forward.3.bias"], state["lang_tf_enc.linear2.bias"]
    )


def test_dead_weights_are_listed_and_twins_are_not(released_file, caplog, monkeypatch):
    monkeypatch.setattr("ris_d2.checkpoint.checkpointer._some", lambda names, **_: f" {names}")
    with caplog.at_level("INFO"):
        RISCheckpointer(build_model(config())).load(str(released_file))
    for dead in ("proj_0.conv.weight", "fpn.output_convs.1.bn.weight", "visumodel.ln_post.bias"):
        assert f"'{dead}'" in caplog.text
    assert "visu_resblocks" not in caplog.text and "in_proj" not in caplog.text


def test_more_words_than_the_checkpoint_knows_are_refused(released_file):
    model = build_model(config("INPUT.RIS.MAX_TOKENS", 8))
    with pytest.raises(
        ValueError, match="best.pth.tar: .*sentences of 6 tokens.* reads 8.*MAX_TOK"
    ):
        RISCheckpointer(model).load(str(released_file))


def test_fewer_words_and_another_input_size_are_fitted(released_file, caplog):
    model = build_model(config("INPUT.RIS.MAX_TOKENS", 5, "INPUT.RIS.SIZE", (24, 32)))
    with caplog.at_level("INFO"):
        RISCheckpointer(model).load(str(released_file))
    assert "3 resized" in caplog.text
    # A constant map stays the same sum over places.
    state = {"out.weight": torch.ones(MASKS, GRID * GRID * MASKS)}
    fitted, _ = model.coefficients.fit_state_dict(state)
    assert fitted["out.weight"].sum(1).tolist() == pytest.approx([GRID * GRID * MASKS] * MASKS)


def test_what_is_not_asda_is_refused():
    with pytest.raises(ValueError, match="not a released ASDA checkpoint.*layer.weight"):
        convert_state_dict({"layer.weight": torch.ones(1)}, "asda")
