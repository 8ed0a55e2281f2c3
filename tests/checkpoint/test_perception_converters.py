"""Swin and Mask2Former files of every layout, by the names that they were published with."""

import re

import pytest
import torch

from ris_d2 import get_ris_cfg
from ris_d2.checkpoint import convert_state_dict
from ris_d2.checkpoint.converters import get_converter
from ris_d2.modeling.backbone import RISSwin
from ris_d2.modeling.deris.perception import PerceptionBranch


def make_branch():
    cfg = get_ris_cfg()
    swin = ["EMBED_DIM", 8, "DEPTHS", (1, 2, 1, 1), "NUM_HEADS", (1, 2, 2, 4), "WINDOW_SIZE", 3]
    cfg.MODEL.RIS.SWIN.merge_from_list(swin)
    deris = ["DIM", 16, "NUM_HEADS", 2, "FFN_DIM", 24, "NUM_QUERIES", 5]
    deris += ["PIXEL_DECODER_LAYERS", 2, "PIXEL_DECODER_FFN_DIM", 24]
    cfg.MODEL.DERIS.merge_from_list(deris)
    return PerceptionBranch(cfg)


def official_swin(model: RISSwin):
    """As Microsoft's and Mask2Former's files name it, with what they hold beside."""
    state = {}
    for name, value in model.state_dict().items():
        state[re.sub(r"^norms\.res(\d)", lambda m: f"norm{int(m[1]) - 2}", name)] = value
        if name.endswith("relative_position_bias_table"):
            state[name.replace("bias_table", "index")] = torch.zeros(9, 9, dtype=torch.int64)
    return state


def assert_same(converted, expected):
    assert converted.keys() == expected.keys()
    assert all(torch.equal(converted[name], expected[name]) for name in expected)


def test_swin_of_every_age():
    torch.manual_seed(0)
    model = make_branch().backbone
    ours = model.state_dict()
    official = official_swin(model)
    assert_same(convert_state_dict({"model": official}, "swin"), ours)

    classifier = {k: v for k, v in official.items() if not re.match(r"norm\d", k)}
    classifier |= {"norm.weight": torch.ones(64), "norm.bias": torch.zeros(64)}
    classifier |= {"layers.0.blocks.0.attn_mask": torch.zeros(4, 9, 9)}
    expected = {k: v for k, v in ours.items() if not k.startswith("norms.")}
    assert_same(
        convert_state_dict({**classifier, "head.weight": torch.ones(2, 64)}, "swin"), expected
    )

    timm = {
        re.sub(r"layers\.(\d)\.down", lambda m: f"layers.{int(m[1]) + 1}.down", k): v
        for k, v in classifier.items()
    }
    assert "layers.3.downsample.norm.weight" in timm
    assert_same(convert_state_dict({**timm, "head.fc.weight": torch.ones(2, 64)}, "swin"), expected)
    may_miss = get_converter("swin").may_miss
    assert all(any(re.search(p, n) for p in may_miss) for n in ours.keys() - expected.keys())


def test_timm_model_itself():
    timm = pytest.importorskip("timm")
    other = timm.models.swin_transformer.SwinTransformer(
        img_size=96, window_size=3, embed_dim=8, depths=(1, 2, 1, 1), num_heads=(1, 2, 2, 4)
    )
    model = make_branch().backbone
    converted = convert_state_dict(other.state_dict(), "swin")
    missing = model.load_state_dict(converted, strict=False)
    assert not missing.unexpected_keys and all(n.startswith("norms.") for n in missing.missing_keys)


def published_mask2former(branch, num_layers=4, num_queries=9):
    """Names of ``maskformer2_swin_*``'s files -> tensors of this branch's sizes."""
    state = {f"backbone.{k}": v for k, v in official_swin(branch.backbone).items()}
    pixel, predictor = "sem_seg_head.pixel_decoder.", "sem_seg_head.predictor."

    def put(prefix, shapes):
        state.update({prefix + name: torch.randn(*shape) for name, shape in shapes.items()})

    def linear(name, rows, columns):
        return {f"{name}.weight": (rows, columns), f"{name}.bias": (rows,)}

    def norm(name):
        return {f"{name}.weight": (16,), f"{name}.bias": (16,)}

    for i, channels in enumerate((64, 32, 16)):
        put(f"{pixel}input_proj.{i}.", {"0.weight": (16, channels, 1, 1), "0.bias": (16,)})
        put(f"{pixel}input_proj.{i}.", norm("1"))
    put(f"{pixel}transformer.", {"level_embed": (3, 16)})
    for i in range(2):
        layer = f"{pixel}transformer.encoder.layers.{i}."
        put(layer + "self_attn.", linear("sampling_offsets", 48, 16))
        put(layer + "self_attn.", linear("attention_weights", 24, 16))
        put(layer + "self_attn.", linear("value_proj", 16, 16) | linear("output_proj", 16, 16))
        put(layer, norm("norm1") | linear("linear1", 24, 16) | linear("linear2", 16, 24))
        put(layer, norm("norm2"))
    put(f"{pixel}", {"mask_features.weight": (16, 16, 1, 1), "mask_features.bias": (16,)})
    put(f"{pixel}adapter_1.", {"weight": (16, 8, 1, 1)} | norm("norm"))
    put(f"{pixel}layer_1.", {"weight": (16, 16, 3, 3)} | norm("norm"))
    for i in range(num_layers):
        for kind, module in (("self", "self_attn"), ("cross", "multihead_attn")):
            layer = f"{predictor}transformer_{kind}_attention_layers.{i}."
            put(f"{layer}{module}.", {"in_proj_weight": (48, 16), "in_proj_bias": (48,)})
            put(f"{layer}{module}.", linear("out_proj", 16, 16))
            put(layer, norm("norm"))
        layer = f"{predictor}transformer_ffn_layers.{i}."
        put(layer, linear("linear1", 24, 16) | linear("linear2", 16, 24) | norm("norm"))
    put(predictor, norm("decoder_norm") | {"level_embed.weight": (3, 16)})
    put(
        predictor, {"query_feat.weight": (num_queries, 16), "query_embed.weight": (num_queries, 16)}
    )
    put(predictor, linear("class_embed", 81, 16))
    for i in range(3):
        put(predictor, linear(f"mask_embed.layers.{i}", 16, 16))
    state["criterion.empty_weight"] = torch.ones(81)
    return state


def test_mask2former():
    torch.manual_seed(0)
    branch = make_branch()
    state = published_mask2former(branch)
    converted = convert_state_dict({"model": state, "__author__": "zoo"}, "mask2former")
    fitted, resized = branch.fit_state_dict(converted)
    assert resized == ["query_position.weight"]
    loaded = branch.load_state_dict(fitted, strict=False)
    assert all(name.startswith("layers.3.") for name in loaded.unexpected_keys)
    assert len(loaded.unexpected_keys) == 26
    may_miss = get_converter("mask2former").may_miss
    assert all(any(re.search(p, n) for p in may_miss) for n in loaded.missing_keys)
    assert set(loaded.missing_keys) == {
        "pixel_decoder.lateral.0.bias",
        "pixel_decoder.output.0.bias",
        "mask_proj.weight",
        "mask_proj.bias",
        "visual_proj.weight",
    }
    rows = state[
        "sem_seg_head.predictor.transformer_cross_attention_layers.1.multihead_attn.in_proj_weight"
    ]
    assert torch.equal(branch.layers[1].cross_attention.key.weight, rows[16:32])
    assert torch.equal(branch.layers[1].cross_attention.value.weight, rows[32:])
    offsets = (
        "sem_seg_head.pixel_decoder.transformer.encoder.layers.1.self_attn.sampling_offsets.bias"
    )
    assert torch.equal(branch.pixel_decoder.layers[1].attention.offsets.bias, state[offsets])
    last = state["sem_seg_head.predictor.mask_embed.layers.2.weight"]
    assert torch.equal(branch.mask_embed[4].weight, last)
    norm = state["sem_seg_head.pixel_decoder.adapter_1.norm.weight"]
    assert torch.equal(branch.pixel_decoder.lateral[1].weight, norm)


@pytest.mark.parametrize(
    "source, message", [("swin", "not a Swin"), ("mask2former", "not a Mask2")]
)
def test_other_files_are_refused(source, message):
    with pytest.raises(ValueError, match=f"{message}.*stem.conv1.weight"):
        convert_state_dict({"stem.conv1.weight": torch.ones(1)}, source)
