import pytest
import torch

from ris_d2 import get_ris_cfg
from ris_d2.modeling.backbone import RISSwin
from ris_d2.modeling.backbone.swin import SwinBlock, window_partition

TINY = {"embed_dim": 8, "depths": (2, 2, 2, 2), "num_heads": (1, 2, 2, 4), "window_size": 3}


def make(seed=0, **options):
    torch.manual_seed(seed)
    model = RISSwin(**{**TINY, **options}).eval()
    for parameter in model.parameters():  # biases and norms too, so that nothing hides
        torch.nn.init.normal_(parameter, std=0.2)
    return model


def to_transformers(state_dict):
    """Our names -> those of transformers' SwinBackbone."""
    renames = [
        ("patch_embed.proj", "swin.embeddings.patch_embeddings.projection"),
        ("patch_embed.norm", "swin.embeddings.norm"),
        ("layers.", "swin.encoder.layers."),
        ("norm1", "layernorm_before"),
        ("norm2", "layernorm_after"),
        ("attn.proj", "attention.o_proj"),
        ("attn.relative", "attention.relative_position_bias.relative"),
        ("attn.", "attention."),
        ("norms.res2", "hidden_states_norms.stage1"),
        ("norms.res3", "hidden_states_norms.stage2"),
        ("norms.res4", "hidden_states_norms.stage3"),
        ("norms.res5", "hidden_states_norms.stage4"),
    ]
    renamed = {}
    for name, value in state_dict.items():
        for ours, theirs in renames:
            name = name.replace(ours, theirs)
        if ".qkv." in name:
            for part, chunk in zip("qkv", value.chunk(3), strict=True):
                renamed[name.replace("qkv", f"{part}_proj")] = chunk
        else:
            renamed[name] = value
    return renamed


@pytest.mark.parametrize("size", [(64, 96), (50, 71), (24, 24)])  # whole, odd, smaller than windows
def test_equals_transformers_swin(size):
    transformers = pytest.importorskip("transformers", minversion="5")
    model = make()
    config = transformers.SwinConfig(
        **{name: value for name, value in TINY.items() if name != "depths"},
        depths=list(TINY["depths"]),
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )
    other = transformers.SwinBackbone(config).eval()
    loaded = other.load_state_dict(to_transformers(model.state_dict()), strict=False)
    assert not loaded.unexpected_keys
    assert all(name.startswith("swin.layernorm") for name in loaded.missing_keys)
    images = torch.randn(2, 3, *size)
    with torch.no_grad():
        expected, outputs = other(images).feature_maps, model(images)
    for value, theirs in zip(outputs.values(), expected, strict=True):
        torch.testing.assert_close(value, theirs, rtol=1e-4, atol=1e-4)


def test_piece_by_piece_and_chosen_outputs():
    model, images = make(out_features=("res3", "res5")), torch.randn(1, 3, 40, 56)
    shapes = model.output_shape()
    assert {name: (s.channels, s.stride) for name, s in shapes.items()} == {
        "res3": (16, 8),
        "res5": (64, 32),
    }
    outputs = model(images)
    tokens, size = model.embed(images)
    assert tokens.shape == (1, 140, 8) and size == (10, 14)
    for stage, expected in enumerate([(10, 14), (5, 7), (3, 4), (2, 2)]):
        assert size == expected
        tokens = model.run_stage(stage, tokens, size)
        name = f"res{stage + 2}"
        if name in outputs:
            normed = model.norms[name](tokens).transpose(1, 2).unflatten(2, size)
            assert torch.equal(normed, outputs[name])
        if stage < 3:
            tokens, size = model.downsample(stage, tokens, size)
    assert list(outputs) == ["res3", "res5"]


def test_drop_path_drops_attention_and_mlp_of_a_sample(device):
    torch.manual_seed(0)
    block = SwinBlock(dim=8, num_heads=2, window_size=3, shift=1, drop_path=0.5)
    tokens = torch.randn(64, 12, 8)
    partition = [x.to(device) for x in window_partition((3, 4), 3, 1)]
    with torch.no_grad():
        kept = block.eval()(tokens, partition)
        out = block.train()(tokens, partition)
    untouched = (out == tokens).flatten(1).all(1)
    assert 4 <= untouched.sum() <= 32  # both branches dropped: a quarter of the samples
    assert not (kept == tokens).flatten(1).all(1).any()
    rates = [b.drop_path for layer in make(drop_path=0.7).layers for b in layer.blocks]
    assert rates == pytest.approx([0.1 * i for i in range(8)])


def test_window_biases_of_another_size_are_resized():
    model, other = make(), make(window_size=4).state_dict()
    fitted, resized = model.fit_state_dict(other)
    assert len(resized) == 8 and resized[0].endswith("relative_position_bias_table")
    model.load_state_dict(fitted)
    assert model.fit_state_dict(model.state_dict())[1] == []


def test_from_config_and_what_it_refuses():
    cfg = get_ris_cfg()
    with torch.device("meta"):
        model = RISSwin(cfg)
    assert sum(p.numel() for p in model.parameters()) == 86_880_376
    assert model.layers[3].blocks[1].drop_path == pytest.approx(0.3)
    for options, message in [
        ({"depths": (2, 2, 2)}, "4 entries"),
        ({"num_heads": (3, 2, 2, 4)}, "8 channels do not divide by 3"),
        ({"out_features": ("res6",)}, "res6"),
    ]:
        with pytest.raises(ValueError, match=message):
            RISSwin(**{**TINY, **options})


def test_inference_mode_first_does_not_spoil_training():
    model, images = make(window_size=5), torch.randn(1, 3, 44, 44)
    with torch.inference_mode():
        model(images)
    sum(x.sum() for x in model(images).values()).backward()
