import pytest
import torch

from ris_d2.modeling.backbone import RISBEiT3

TINY = {"embed_dim": 48, "depth": 3, "num_heads": 4, "vocab_size": 60, "patch_size": 16}


def build(image_size=(64, 64), **arguments):
    torch.manual_seed(0)
    model = RISBEiT3(image_size=image_size, **{**TINY, **arguments}).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # biases and norms too: zeros would hide a wrong order
            parameter.normal_(std=0.2)
    return model


def text(lengths, total):
    mask = torch.arange(total) < torch.tensor(lengths)[:, None]
    ids = torch.randint(4, 60, mask.shape, generator=torch.Generator().manual_seed(1))
    return torch.where(mask, ids, 1), mask


@pytest.mark.parametrize(
    "size, arguments, parameters",
    [
        (224, {}, 220_987_392),
        (480, {}, 221_528_064),
        (224, {"embed_dim": 1024, "depth": 24, "num_heads": 16}, 672_702_464),
    ],
)
def test_parameter_counts_of_the_released_models(size, arguments, parameters):
    """The released model has one tensor more than ours, the mask token that fine-tuning never uses."""
    with torch.device("meta"):
        model = RISBEiT3(image_size=(size, size), **arguments)
    assert sum(p.numel() for p in model.parameters()) + model.embed_dim == parameters
    assert len(model.state_dict()) + 1 == (971 if model.depth == 24 else 491)


def test_vision_branch_equals_timm():
    """timm's BEiT-3 is written by others and holds the vision branch; weights go over by name."""
    import timm

    ours = build()
    theirs = timm.create_model(
        "beit3_base_patch16_224",
        img_size=64,
        embed_dim=48,
        depth=3,
        num_heads=4,
        num_classes=0,
        global_pool="",
    ).eval()
    renamed = {
        "cls_token": ours.vision_embed.cls_token,
        "patch_embed.proj.weight": ours.vision_embed.proj.weight,
        "patch_embed.proj.bias": ours.vision_embed.proj.bias,
        "pos_embed": ours.encoder.embed_positions["A"].weight[None, 2:],
        "norm.weight": ours.encoder.layer_norm["A"].weight,
        "norm.bias": ours.encoder.layer_norm["A"].bias,
    }
    for i, layer in enumerate(ours.encoder.layers):
        attention, ffn = layer.self_attn, layer.ffn["A"]
        qkv = [getattr(attention, name)["A"] for name in ("q_proj", "k_proj", "v_proj")]
        modules = {
            "attn.norm": attention.inner_attn_ln["A"],
            "attn.proj": attention.out_proj["A"],
            "norm1": layer.self_attn_layer_norm["A"],
            "norm2": layer.final_layer_norm["A"],
            "mlp.fc1": ffn.fc1,
            "mlp.norm": ffn.ffn_layernorm,
            "mlp.fc2": ffn.fc2,
        }
        for name, module in modules.items():
            renamed[f"blocks.{i}.{name}.weight"] = module.weight
            renamed[f"blocks.{i}.{name}.bias"] = module.bias
        renamed[f"blocks.{i}.attn.qkv.weight"] = torch.cat([m.weight for m in qkv])
        renamed[f"blocks.{i}.attn.qkv.bias"] = torch.cat([m.bias for m in qkv])
    theirs.load_state_dict(renamed)
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        expected = theirs.forward_features(images)[:, 1:].transpose(1, 2).unflatten(2, (4, 4))
        assert torch.allclose(ours(images)["last"], expected, atol=1e-5)


def test_joint_states_do_not_depend_on_padding():
    model = build()
    images = torch.randn(2, 3, 64, 64)
    ids, mask = text([5, 3], 5)
    longer_ids, longer_mask = torch.cat([ids, ids.new_ones(2, 4)], 1), torch.cat(
        [mask, mask.new_zeros(2, 4)], 1
    )
    with torch.no_grad():
        vision = model.embed_image(images)
        short = model.encode(vision, model.embed_text(ids, mask), mask, taps=(1, 3))
        long = model.encode(
            vision, model.embed_text(longer_ids, longer_mask), longer_mask, taps=(1, 3)
        )
    for layer in (1, 3):
        assert torch.allclose(short[layer][0], long[layer][0], atol=1e-5)
        assert torch.allclose(short[layer][1][mask], long[layer][1][:, :5][mask], atol=1e-5)


def test_each_modality_works_alone_and_sees_the_other_when_joint():
    model = build()
    ids, mask = text([4], 4)
    tokens = model.embed_text(ids, mask)
    vision = model.embed_image(torch.randn(1, 3, 64, 64))
    with torch.no_grad():
        nothing, alone = model.encode(None, tokens, mask)[3]
        joint_vision, joint_text = model.encode(vision, tokens, mask)[3]
        only_vision, _ = model.encode(vision, None, None)[3]
    assert nothing is None and alone.shape == joint_text.shape == (1, 4, 48)
    assert not torch.allclose(alone, joint_text, atol=1e-3)
    assert not torch.allclose(only_vision, joint_vision, atol=1e-3)


@pytest.mark.parametrize("grid", [(4, 4), (5, 7), (14, 14)])
def test_positions_of_a_checkpoint_are_resized_to_any_grid(grid):
    """Two unused rows and [CLS] are kept, the 14 x 14 grid is resized bicubically."""
    model = build(image_size=(16 * grid[0], 16 * grid[1]))
    name = "encoder.embed_positions.A.weight"
    table = torch.randn(3 + 14 * 14, 48)
    fitted, resized = model.fit_state_dict({name: table, "other": table})
    assert fitted[name].shape == (3 + grid[0] * grid[1], 48)
    assert torch.equal(fitted[name][:3], table[:3]) and fitted["other"] is table
    assert resized == ([] if grid == (14, 14) else [name])
    rows = table[3:].T.reshape(1, 48, 14, 14)
    expected = torch.nn.functional.interpolate(rows, grid, mode="bicubic", align_corners=False)
    assert torch.allclose(fitted[name][3:], expected[0].flatten(1).T, atol=1e-6)


def test_bad_sizes_are_refused():
    with pytest.raises(ValueError, match="not a multiple of patch size 16"):
        build(image_size=(60, 64))
    model = build()
    with pytest.raises(ValueError, match="built for"):
        model(torch.randn(1, 3, 64, 80))
    with pytest.raises(ValueError, match="not 3 plus a square grid"):
        model.fit_state_dict({"encoder.embed_positions.A.weight": torch.zeros(3 + 15, 48)})
    with pytest.raises(ValueError, match="exceed"):
        model.embed_text(torch.ones(1, 1023, dtype=torch.int64), torch.ones(1, 1023).bool())


def test_drop_path_keeps_or_drops_both_modalities_of_a_sample():
    torch.manual_seed(0)
    model = RISBEiT3(image_size=(64, 64), **{**TINY, "depth": 2}, drop_path=0.5).train()
    last = model.encoder.layers[1]
    assert [layer.drop_path for layer in model.encoder.layers] == [0.0, 0.5]
    vision, words = torch.randn(64, 17, 48), torch.randn(64, 4, 48)
    with torch.no_grad():
        out_vision, out_text = last(vision, words, None)
    kept_vision = (out_vision == vision).flatten(1).all(1)
    kept_text = (out_text == words).flatten(1).all(1)
    assert torch.equal(kept_vision, kept_text)
    assert 0.1 < kept_vision.float().mean() < 0.4  # both branches dropped: a quarter


def test_conv_stem_makes_one_token_per_patch():
    model = build(image_size=(32, 48), patch_size=8, stem="conv")
    assert model.embed_image(torch.randn(2, 3, 32, 48)).shape == (2, 1 + 4 * 6, 48)
    with pytest.raises(ValueError, match="STEM"):
        build(stem="convolution")
    with pytest.raises(ValueError, match="power of two"):
        build(image_size=(48, 48), patch_size=12, stem="conv")
