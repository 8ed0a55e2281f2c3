import pytest
import torch
from detectron2.modeling import build_backbone

from ris_d2 import get_ris_cfg
from ris_d2.checkpoint import convert_state_dict
from ris_d2.modeling.backbone import RISViT


def tiny(**changes):
    torch.manual_seed(0)
    return RISViT(**{"name": "test_vit", "image_size": (64, 96), "out_blocks": (1, 4), **changes})


def test_vit_b_by_name():
    cfg = get_ris_cfg()
    cfg.MODEL.BACKBONE.NAME = "RISViT"
    with torch.device("meta"):
        model = build_backbone(cfg)
    # ViT-B/16 without classifier and last norm, with 901 positions instead of 197.
    assert sum(p.numel() for p in model.parameters()) == 85_797_120 - 197 * 768 + 901 * 768
    assert {n: (s.channels, s.stride) for n, s in model.output_shape().items()} == {
        f"block{i}": (768, 16) for i in (5, 8, 11)
    }


def test_features_are_outputs_of_blocks():
    model = tiny().eval()
    images = torch.randn(2, 3, 64, 96)
    outputs = {}
    for i in (1, 4):
        model.model.blocks[i].register_forward_hook(
            lambda _, args, out, i=i: outputs.update({f"block{i}": out})
        )
    features = model(images)
    assert list(features) == ["block1", "block4"]
    for name, tokens in outputs.items():
        prefix = model.model.num_prefix_tokens
        expected = tokens[:, prefix:].transpose(1, 2).unflatten(2, (4, 6))
        assert torch.equal(features[name], expected)
    sum(x.square().sum() for x in features.values()).backward()
    assert [n for n, p in model.named_parameters() if p.grad is None] == []


def test_published_weights_of_another_size():
    import timm

    published = timm.create_model("test_vit", img_size=160, num_classes=10).state_dict()
    model = tiny()
    converted = convert_state_dict(published, "vit")
    fitted, resized = model.fit_state_dict(converted)
    assert resized == ["model.pos_embed"]
    missing, unexpected = model.load_state_dict(fitted, strict=False)
    assert missing == []
    assert all(name.startswith("model.blocks.5.") for name in unexpected)  # above the last output
    assert torch.equal(model.model.cls_token, published["cls_token"])


def test_other_files_are_refused():
    with pytest.raises(
        ValueError, match="not a vision transformer with timm's names, .* stem.weight"
    ):
        convert_state_dict({"stem.weight": torch.ones(1)}, "vit")
