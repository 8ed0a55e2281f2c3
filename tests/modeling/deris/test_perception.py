import pytest
import torch
import torch.nn.functional as F
from detectron2.layers import ShapeSpec
from detectron2.modeling import META_ARCH_REGISTRY

from ris_d2 import get_ris_cfg
from ris_d2.modeling.deris.perception import (
    MaskFeatures,
    PerceptionBranch,
    upsample_and_pool,
)
from ris_d2.modeling.deris.pixel_decoder import PixelDecoder, level_positions
from ris_d2.modeling.layers import Constants


def tiny_cfg(**deris):
    cfg = get_ris_cfg()
    cfg.MODEL.RIS.SWIN.merge_from_list(
        [
            *("EMBED_DIM", 8, "DEPTHS", (1, 1, 1, 1), "NUM_HEADS", (1, 2, 2, 4)),
            *("WINDOW_SIZE", 3, "DROP_PATH", 0.0),
        ]
    )
    cfg.MODEL.DERIS.merge_from_list(
        [
            *("DIM", 16, "NUM_HEADS", 2, "FFN_DIM", 24, "NUM_QUERIES", 5),
            *("PIXEL_DECODER_LAYERS", 2, "PIXEL_DECODER_FFN_DIM", 24),
        ]
    )
    for name, value in deris.items():
        cfg.MODEL.DERIS[name] = value
    return cfg


def make(**deris):
    torch.manual_seed(0)
    branch = PerceptionBranch(tiny_cfg(**deris))
    for parameter in branch.parameters():  # biases too, so that nothing hides
        if parameter.ndim == 1:
            torch.nn.init.normal_(parameter, std=0.5)
    return branch


def run(branch, images, image_index, visual, queries):
    """All layers without cognition: mask logits per round, and the priors."""
    features = branch.encode_images(images)
    mask_features = branch.mask_features(features, image_index, visual)
    logits, priors = [], []
    for number in range(len(branch.layers) + 1):
        if number:
            keep = branch.attention_mask(logits[-1], number - 1)
            queries = branch.layer(number - 1, queries, keep, features, mask_features)
        logits.append(branch.predict_masks(queries, mask_features))
        priors.append(branch.mask_prior(logits[-1], mask_features))
    return torch.stack(logits), torch.stack(priors)


def inputs(num_images=2, image_index=(1, 0, 1), size=(72, 100)):
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(num_images, 3, *size, generator=generator)
    visual = torch.randn(len(image_index), 16, 5, 5, generator=generator)
    queries = torch.randn(len(image_index), 5, 16, generator=generator)
    return images, torch.tensor(image_index), visual, queries


def test_mask_features_equal_the_convolution_of_a_concatenation():
    torch.manual_seed(0)
    conv = torch.nn.Conv2d(16, 8, 1)
    f_h4, f_v = torch.randn(2, 8, 18, 25), torch.randn(4, 8, 5, 6)
    image_index = torch.tensor([1, 0, 1, 1])
    features = MaskFeatures(
        maps=F.conv2d(f_h4, conv.weight[:, :8], conv.bias),
        visual=F.conv2d(f_v, conv.weight[:, 8:]),
        level_visual=[],
        image_index=image_index,
        upsample_and_pool=Constants(upsample_and_pool),
    )
    upsampled = F.interpolate(f_v, size=(18, 25), mode="bilinear", align_corners=False)
    f_m = conv(torch.cat([f_h4[image_index], upsampled], 1))
    embeddings, masks = torch.randn(4, 3, 8), torch.rand(4, 3, 4, 6)
    expected = torch.einsum("eqc,echw->eqhw", embeddings, f_m)
    torch.testing.assert_close(features.dot(embeddings), expected, rtol=1e-4, atol=1e-5)
    pooled = F.avg_pool2d(f_m, 4)
    expected = (masks[:, :, None] * pooled[:, None]).mean((3, 4))
    torch.testing.assert_close(features.average(masks), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("flow", ["loopback", "hierarchical"])
def test_expressions_together_equal_each_alone(flow):
    branch = make(QUERY_FLOW=flow).eval()
    images, image_index, visual, queries = inputs()
    with torch.no_grad():
        together = run(branch, images, image_index, visual, queries)
        assert together[0].shape == (4, 3, 5, 18, 25) and together[1].shape == (4, 3, 5, 16)
        for e, image in enumerate(image_index.tolist()):
            one = slice(e, e + 1)
            alone = run(
                branch,
                images[image : image + 1],
                torch.zeros(1, dtype=torch.int64),
                visual[one],
                queries[one],
            )
            for all_of_them, single in zip(together, alone, strict=True):
                # Group norms over a dozen pixels magnify rounding; another image is far off.
                torch.testing.assert_close(all_of_them[:, one], single, rtol=0, atol=5e-3)


def test_visual_tokens_change_levels_only_in_the_hierarchical_flow():
    images, image_index, visual, queries = inputs()
    for flow, same in (("loopback", True), ("hierarchical", False)):
        branch = make(QUERY_FLOW=flow)
        features = branch.encode_images(images)
        keep = torch.ones(3, 5, 3 * 4, dtype=torch.bool)
        out = [
            branch.layer(
                0, queries, keep, features,
                branch.mask_features(features, image_index, tokens),
            )
            for tokens in (visual, -visual)
        ]  # fmt: skip
        assert torch.allclose(*out) == same


@pytest.mark.parametrize(
    "deris",
    [
        {},
        {"QUERY_FLOW": "hierarchical"},
        {"ROUNDS": 1},
        {"ROUNDS": 4, "VISUAL_FEATURES": False},
        {"COGNITION": "text"},
    ],
)
def test_every_parameter_gets_a_gradient(deris):
    branch = make(**deris)
    logits, priors = run(branch, *inputs())
    (logits.square().mean() + priors.square().mean()).backward()
    assert [name for name, p in branch.named_parameters() if p.grad is None] == []
    assert (branch.visual_proj is None) == (
        deris.get("COGNITION") == "text" or not deris.get("VISUAL_FEATURES", True)
    )


def test_attention_mask_looks_inside_of_masks_and_everywhere_for_none():
    branch = make()
    logits = torch.full((1, 2, 16, 24), -5.0)
    logits[0, 0, :8, :8] = 5
    for number, size in enumerate([(2, 3), (4, 6), (8, 12), (2, 3)]):
        keep = branch.attention_mask(logits, number).view(1, 2, *size)
        inside = torch.zeros(size, dtype=torch.bool)
        inside[: size[0] // 2, : size[1] // 3] = True
        assert torch.equal(keep[0, 0], inside)
        assert keep[0, 1].all()
    # Maps halve by rounding up, as Swin's do.
    features = branch.encode_images(torch.randn(1, 3, 72, 100))
    logits = torch.randn(1, 5, 18, 25)
    for number, (height, width) in enumerate(features.sizes):
        assert branch.attention_mask(logits, number).shape == (1, 5, height * width)


def test_pixel_decoder_shapes_and_positions():
    shapes = {f"res{i}": ShapeSpec(channels=4 * i, stride=2**i) for i in range(2, 6)}
    torch.manual_seed(0)
    decoder = PixelDecoder(input_shape=shapes, dim=16, num_heads=2, num_layers=1, ffn_dim=8)
    maps = {"res2": (9, 13), "res3": (5, 7), "res4": (3, 4), "res5": (2, 2)}
    features = {n: torch.randn(2, 4 * int(n[3]), *size) for n, size in maps.items()}
    tokens, sizes, finest = decoder(features)
    assert sizes == [(2, 2), (3, 4), (5, 7)] and finest.shape == (2, 16, 9, 13)
    assert [x.shape for x in tokens] == [(2, 4, 16), (2, 12, 16), (2, 35, 16)]
    centres, *sine = level_positions(((1, 2), (2, 2)), 16)
    assert [x.shape for x in sine] == [(2, 16), (4, 16)]
    expected = [[0.25, 0.5], [0.75, 0.5], [0.25, 0.25], [0.75, 0.25], [0.25, 0.75], [0.75, 0.75]]
    assert centres.tolist() == expected


def test_published_size():
    cfg = get_ris_cfg()
    cfg.MODEL.RIS.SWIN.merge_from_list(
        ["EMBED_DIM", 96, "NUM_HEADS", (3, 6, 12, 24), "WINDOW_SIZE", 7]
    )
    with torch.device("meta"):
        branch = PerceptionBranch(cfg)
    count = {n: sum(p.numel() for p in m.parameters()) for n, m in branch.named_children()}
    assert count["backbone"] == 48_838_602
    assert count["pixel_decoder"] == 5_422_016
    assert count["mask_proj"] + count["visual_proj"] == 512 * 256 + 256  # channel_proj_conv


def test_fewer_queries_than_the_checkpoint():
    branch = make()
    state = branch.state_dict()
    table = torch.arange(7.0)[:, None].expand(7, 16)
    fitted, resized = branch.fit_state_dict({**state, "query_position.weight": table})
    assert resized == ["query_position.weight"]
    assert torch.equal(fitted["query_position.weight"], table[:5])
    assert branch.fit_state_dict(state) == (state, [])


@pytest.mark.parametrize(
    "deris, message",
    [
        ({"ROUNDS": 0}, "ROUNDS is 0"),
        ({"QUERY_FLOW": "hierarchical", "VISUAL_FEATURES": False}, "VISUAL_FEATURES True"),
        ({"QUERY_FLOW": "hierarchical", "COGNITION": "text"}, "sees the image"),
    ],
)
def test_refuses(deris, message):
    with pytest.raises(ValueError, match=message):
        make(**deris)


def test_bf16_stays_near_fp32(device):
    branch = make().eval()
    with torch.no_grad():
        expected, _ = run(branch, *inputs())
        with torch.autocast(device, torch.bfloat16):
            logits, priors = run(branch, *inputs())
    assert priors.isfinite().all()
    # Round 0 alone: later queries attend masks whose edges bf16 moves.
    scale = expected[0].abs().mean()
    assert (logits[0].float() - expected[0]).abs().mean() < 0.05 * scale


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_frozen_swin_keeps_drop_path_in_mode_train(deris_cfg, mode):
    deris_cfg.MODEL.RIS.FREEZE = type(deris_cfg)({"perception.backbone": mode})
    deris_cfg.MODEL.RIS.SWIN.DROP_PATH = 0.9
    torch.manual_seed(0)
    model = META_ARCH_REGISTRY.get("DeRIS")(deris_cfg).train()
    images = torch.randn(8, 3, 64, 96)
    twice = [model.perception.backbone(images)["res5"] for _ in range(2)]
    assert torch.equal(*twice) == (mode == "eval")
    assert not twice[0].requires_grad
    assert model.perception.encode_images(images).maps.requires_grad
    model.eval()
    assert torch.equal(*[model.perception.backbone(images)["res5"] for _ in range(2)])
