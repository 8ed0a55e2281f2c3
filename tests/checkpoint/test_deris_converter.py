"""Released DeRIS checkpoints: their names and shapes, at the size of a tiny model."""

import logging

import pytest
import torch
from torch import nn

from ris_d2 import get_ris_cfg
from ris_d2.checkpoint import RISCheckpointer, convert_state_dict
from ris_d2.modeling.deris import DeRIS

C, D, E = 32, 24, 8  # channels of queries, BEiT-3 and Swin
WINDOW, FFN, QUERIES = 4, 64, 5
UB, PB = "understanding_branch.", "perception_branch."

IGNORED = [
    UB + "vis_enc.beit3.vision_embed.mask_token",
    UB + "logit_embed.weight",
    PB + "hier_vision_encoder.layers.0.blocks.0.attn.relative_position_index",
    PB + "predictor.box_embed.layers.2.bias",
    PB + "predictor.cls_embed.weight",
    PB + "predictor.SEG_proj.layers.0.weight",
    PB + "predictor.Q2TCA.3.cross_attn.mapmlp.2.weight",
    PB + "nt_embed.weight",
    PB + "perception_query_embed.weight",
    "head.criterion.empty_weight",
]


def make_cfg():
    cfg = get_ris_cfg()
    cfg.merge_from_list(
        [
            *("MODEL.DEVICE", "cpu", "MODEL.META_ARCHITECTURE", "DeRIS"),
            *("INPUT.RIS.SIZE", (64, 64), "INPUT.RIS.VIEWS", [["cognition", 32, 32]]),
            *("MODEL.RIS.BEIT3.EMBED_DIM", D, "MODEL.RIS.BEIT3.DEPTH", 2),
            *("MODEL.RIS.BEIT3.NUM_HEADS", 2, "MODEL.RIS.BEIT3.VOCAB_SIZE", 50),
            *("MODEL.RIS.SWIN.EMBED_DIM", E, "MODEL.RIS.SWIN.DEPTHS", (1, 1, 2, 1)),
            *("MODEL.RIS.SWIN.NUM_HEADS", (1, 1, 2, 2), "MODEL.RIS.SWIN.WINDOW_SIZE", WINDOW),
            *("MODEL.DERIS.DIM", C, "MODEL.DERIS.NUM_HEADS", 8, "MODEL.DERIS.FFN_DIM", FFN),
            *("MODEL.DERIS.PIXEL_DECODER_LAYERS", 2, "MODEL.DERIS.PIXEL_DECODER_FFN_DIM", 48),
            *("MODEL.DERIS.EXISTENCE_FFN_DIM", 40, "MODEL.DERIS.NUM_QUERIES", QUERIES),
        ]
    )
    return cfg


def released(prefix="", num_queries=QUERIES):
    """A released checkpoint's tensors, by the names of its 1250, for ``make_cfg``'s sizes."""
    shapes = {}

    def linear(name, out, *inputs):
        shapes[f"{name}.weight"], shapes[f"{name}.bias"] = (out, *inputs), (out,)

    def norm(name, dim=C):
        linear(name, dim)

    def attention(name):
        shapes[f"{name}.in_proj_weight"], shapes[f"{name}.in_proj_bias"] = (3 * C, C), (3 * C,)
        linear(f"{name}.out_proj", C, C)

    beit3 = UB + "vis_enc.beit3."
    shapes[beit3 + "text_embed.weight"] = (50, D)
    shapes[beit3 + "vision_embed.mask_token"] = shapes[beit3 + "vision_embed.cls_token"] = (1, 1, D)
    linear(beit3 + "vision_embed.proj", D, 3, 16, 16)
    shapes[beit3 + "encoder.embed_positions.A.weight"] = (4 + 3, D)
    shapes[beit3 + "encoder.embed_positions.B.weight"] = (1024, D)
    for way in "AB":
        for layer in range(2):
            at = f"{beit3}encoder.layers.{layer}."
            for part in "kvq":
                linear(f"{at}self_attn.{part}_proj.{way}", D, D)
            linear(f"{at}self_attn.out_proj.{way}", D, D)
            for name in ("self_attn.inner_attn_ln", "self_attn_layer_norm", "final_layer_norm"):
                norm(f"{at}{name}.{way}", D)
            linear(f"{at}ffn.{way}.fc1", 4 * D, D)
            linear(f"{at}ffn.{way}.fc2", D, 4 * D)
            norm(f"{at}ffn.{way}.ffn_layernorm", 4 * D)
        norm(f"{beit3}encoder.layer_norm.{way}", D)
    for name in ("vis_embed", "text_embed", "perception_embed"):
        linear(UB + name, C, D)
    shapes[UB + "init_query.weight"] = (num_queries, D)
    linear(UB + "logit_embed", 2, C)
    linear(UB + "nt_embed", 1, C)
    for layer in range(3):
        at = f"{UB}roialigner.TextCorrelation.layers.{layer}."
        attention(at + "attentions.0.attn")
        attention(at + "attentions.1.attn")
        linear(at + "ffns.0.layers.0.0", 40, C)
        linear(at + "ffns.0.layers.1", C, 40)
        for i in range(3):
            norm(f"{at}norms.{i}")
    norm(UB + "roialigner.TextCorrelation.post_norm_layer")

    swin = PB + "hier_vision_encoder."
    linear(swin + "patch_embed.proj", E, 3, 4, 4)
    norm(swin + "patch_embed.norm", E)
    for stage, (depth, heads) in enumerate(zip((1, 1, 2, 1), (1, 1, 2, 2))):
        dim = E * 2**stage
        norm(f"{swin}norm{stage}", dim)
        for block in range(depth):
            at = f"{swin}layers.{stage}.blocks.{block}."
            norm(at + "norm1", dim)
            norm(at + "norm2", dim)
            shapes[at + "attn.relative_position_bias_table"] = ((2 * WINDOW - 1) ** 2, heads)
            shapes[at + "attn.relative_position_index"] = (WINDOW**2, WINDOW**2)
            linear(at + "attn.qkv", 3 * dim, dim)
            linear(at + "attn.proj", dim, dim)
            linear(at + "mlp.fc1", 4 * dim, dim)
            linear(at + "mlp.fc2", dim, 4 * dim)
        if stage < 3:
            shapes[f"{swin}layers.{stage}.downsample.reduction.weight"] = (2 * dim, 4 * dim)
            norm(f"{swin}layers.{stage}.downsample.norm", 4 * dim)

    pixels = PB + "pixel_decoder."
    for level in range(3):
        linear(f"{pixels}input_proj.{level}.0", C, 8 * E // 2**level, 1, 1)
        norm(f"{pixels}input_proj.{level}.1")
    shapes[pixels + "transformer.level_embed"] = (3, C)
    for layer in range(2):
        at = f"{pixels}transformer.encoder.layers.{layer}."
        linear(at + "self_attn.sampling_offsets", 192, C)
        linear(at + "self_attn.attention_weights", 96, C)
        linear(at + "self_attn.value_proj", C, C)
        linear(at + "self_attn.output_proj", C, C)
        linear(at + "linear1", 48, C)
        linear(at + "linear2", C, 48)
        norm(at + "norm1")
        norm(at + "norm2")
    linear(pixels + "mask_features", C, C, 1, 1)
    linear(pixels + "adapter_1.0", C, E, 1, 1)
    linear(pixels + "layer_1.0", C, C, 3, 3)
    norm(pixels + "adapter_1.1")
    norm(pixels + "layer_1.1")

    predictor = PB + "predictor."
    for layer in range(3):
        attention(f"{predictor}transformer_self_attention_layers.{layer}.self_attn")
        attention(f"{predictor}transformer_cross_attention_layers.{layer}.multihead_attn")
        linear(f"{predictor}transformer_ffn_layers.{layer}.linear1", FFN, C)
        linear(f"{predictor}transformer_ffn_layers.{layer}.linear2", C, FFN)
        for kind in ("self_attention", "cross_attention", "ffn"):
            norm(f"{predictor}transformer_{kind}_layers.{layer}.norm")
        linear(f"{predictor}mask_embed.layers.{layer}", C, C)
        linear(f"{predictor}box_embed.layers.{layer}", 4 if layer == 2 else C, C)
    norm(predictor + "decoder_norm")
    shapes[predictor + "query_embed.weight"] = (num_queries, C)
    shapes[predictor + "level_embed.weight"] = (3, C)
    linear(predictor + "cls_embed", 2, C)
    linear(predictor + "SEG_cls", 2, C)
    for i in range(2):
        linear(f"{predictor}SEG_proj.layers.{i}", C, C)
    for layer in range(4):
        attention(f"{predictor}query_SA.{layer}.self_attn")
        norm(f"{predictor}query_SA.{layer}.norm")
        at = f"{predictor}Q2TCA.{layer}."
        for part in ("q", "k", "v", "proj"):
            linear(f"{at}cross_attn.{part}", C, C)
        linear(at + "cross_attn.mapmlp.0", C, 1)
        shapes[at + "cross_attn.mapmlp.2.weight"] = (8, C)
        attention(at + "self_attn")
        for i in (1, 2, 3):
            norm(f"{at}norm{i}")
        linear(at + "linear1", FFN, C)
        linear(at + "linear2", C, FFN)
        linear(f"{predictor}refer_proj.{layer}", C, 2 * C)
    linear(predictor + "channel_proj_conv", C, 2 * C, 1, 1)
    linear(PB + "nt_embed", 1, C)
    shapes[PB + "perception_query_embed.weight"] = (num_queries, C)
    shapes["head.criterion.empty_weight"] = (2,)
    generator = torch.Generator().manual_seed(0)
    return {
        prefix + name: torch.randn(shape, generator=generator) for name, shape in shapes.items()
    }


def released_file(path, state_dict, training_state=True):
    """As the public code saves it, or thinned out for release."""
    content = {"state_dict": state_dict}
    if training_state:
        layer = nn.Linear(2, 2)
        optimizer = torch.optim.Adam(layer.parameters(), amsgrad=True)
        layer(torch.ones(1, 2)).sum().backward()
        optimizer.step()
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda epoch: 0.5)
        content.update(
            epoch=19,
            metrics={"mIoU": 84.1},
            optimizer=optimizer.state_dict(),
            scheduler=scheduler.state_dict(),
            lr=1e-4,
        )
    torch.save(content, path)
    return str(path)


@pytest.mark.parametrize("prefix", ["", "module."])
def test_a_released_checkpoint_fills_the_whole_model(prefix):
    converted = convert_state_dict({"state_dict": released(prefix)}, "deris")
    model = DeRIS(make_cfg())
    model.load_state_dict(converted)  # every name, every shape, and nothing else


def test_what_is_ignored_is_no_part_of_the_model():
    state = released()
    assert set(IGNORED) <= state.keys()
    without = {name: value for name, value in state.items() if name not in IGNORED}
    assert convert_state_dict(without, "deris").keys() == convert_state_dict(state, "deris").keys()


def test_attention_is_the_same_function():
    state = released()
    model = DeRIS(make_cfg()).eval()
    model.load_state_dict(convert_state_dict(state, "deris"))
    theirs = nn.MultiheadAttention(C, 8, batch_first=True)
    queries, text = torch.randn(2, 5, C), torch.randn(2, 7, C)
    for prefix, ours, context in (
        (UB + "roialigner.TextCorrelation.layers.1.attentions.1.attn.", "text_attention", text),
        (UB + "roialigner.TextCorrelation.layers.1.attentions.0.attn.", "self_attention", queries),
    ):
        theirs.load_state_dict(
            {k[len(prefix) :]: v for k, v in state.items() if k.startswith(prefix)}
        )
        layer = getattr(model.cognition.existence.layers[1], ours)
        expected = theirs(queries, context, context, need_weights=False)[0]
        torch.testing.assert_close(layer(queries, context), expected, atol=1e-4, rtol=1e-4)


def test_the_fusing_convolution_is_split():
    state = released()
    model = DeRIS(make_cfg())
    model.load_state_dict(convert_state_dict(state, "deris"))
    maps, visual = torch.randn(1, C, 6, 6), torch.randn(1, C, 6, 6)
    name = PB + "predictor.channel_proj_conv"
    expected = nn.functional.conv2d(
        torch.cat([maps, visual], 1), state[f"{name}.weight"], state[f"{name}.bias"]
    )
    branch = model.perception
    torch.testing.assert_close(branch.mask_proj(maps) + branch.visual_proj(visual), expected)


def test_norms_follow_what_they_normalise():
    """norm1 comes after the cross-attention, norm2 after the self-attention that precedes it."""
    state = released()
    converted = convert_state_dict(state, "deris")
    for theirs, ours in (("norm1", "text_norm"), ("norm2", "self_norm"), ("norm3", "ffn_norm")):
        value = state[f"{PB}predictor.Q2TCA.2.{theirs}.weight"]
        assert converted[f"cognition.layers.2.instance_text.{ours}.weight"] is value


@pytest.mark.parametrize("prefix, training_state", [("module.", True), ("", False)])
def test_a_released_file_serves_as_weights(tmp_path, caplog, prefix, training_state):
    state = released(prefix)
    path = released_file(tmp_path / "segm_best.pth", state, training_state)
    model = DeRIS(make_cfg())
    with caplog.at_level(logging.INFO, "ris_d2"):
        RISCheckpointer(model).load(path)  # as for evaluation: refuses if anything is missing
    name = "understanding_branch.init_query.weight"
    assert torch.equal(model.cognition.query.weight, state[prefix + name])
    assert f"{len(model.state_dict())} used; 0 resized;" in caplog.text
    assert "0 missing; 0 of another shape" in caplog.text
    # 12 of mapmlp, 6 of box_embed, 5 indices of Swin, 4 of SEG_proj, 2 of cls_embed, logit_embed and
    # nt_embed, the mask token, the unused queries and the criterion's buffer.
    assert "; 36 ignored (head.criterion.empty_weight, " in caplog.text


def test_fewer_queries_of_a_released_file_start_a_training(tmp_path, caplog):
    """Weights for 20 queries in a model of 5: the query positions are cut, the contents start anew."""
    path = released_file(tmp_path / "gres.pth", released(num_queries=20))
    with caplog.at_level(logging.INFO, "ris_d2"):
        RISCheckpointer(DeRIS(make_cfg())).load(path, checkpointables=[])
    assert "1 resized (perception.query_position.weight)" in caplog.text
    assert "1 of another shape (cognition.query.weight)" in caplog.text


def test_names_that_are_not_released_are_refused(tmp_path):
    state = {**released(), PB + "predictor.query_SA.0.gate.weight": torch.ones(1)}
    with pytest.raises(ValueError, match=r"1 names .*predictor.query_SA.0.gate.weight"):
        convert_state_dict(state, "deris")
    path = released_file(tmp_path / "other.pth", state)
    with pytest.raises(ValueError, match="other.pth: a DeRIS checkpoint with 1 names"):
        RISCheckpointer(DeRIS(make_cfg())).load(path)


def test_other_formats_are_refused():
    with pytest.raises(ValueError, match="not a released DeRIS checkpoint, .*backbone.weight"):
        convert_state_dict({"backbone.weight": torch.ones(1)}, "deris")


def test_a_truncated_release_is_refused(tmp_path):
    state = {name: value for name, value in released().items() if "SEG_cls" not in name}
    path = released_file(tmp_path / "part.pth", state)
    with pytest.raises(ValueError, match="cognition.referring"):
        RISCheckpointer(DeRIS(make_cfg())).load(path)
