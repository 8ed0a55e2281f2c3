import pytest
import torch
import torch.nn.functional as F
from detectron2.modeling import build_backbone

from ris_d2 import get_ris_cfg
from ris_d2.modeling.backbone import RISCLIPViT


def tiny(**changes):
    torch.manual_seed(0)
    arguments = dict(image_size=(16, 24), patch_size=8, dim=16, depth=2, num_heads=2)
    return RISCLIPViT(**{**arguments, **changes})


def test_parameters_are_vit_b_without_last_norm_and_projection():
    cfg = get_ris_cfg()
    cfg.merge_from_list(["MODEL.BACKBONE.NAME", "RISCLIPViT", "INPUT.RIS.SIZE", (416, 416)])
    with torch.device("meta"):
        model = build_backbone(cfg)
    assert sum(p.numel() for p in model.parameters()) == 85_646_592 + 677 * 768
    assert model.output_shape()["last"].channels == 768


@pytest.mark.parametrize("stem", ["patch", "conv"])
def test_layers_maps_and_gradients(stem):
    model = tiny(stem=stem)
    images = torch.rand(2, 3, 16, 24)
    states = model.forward_layers(images)
    assert [s.shape for s in states] == [(2, 7, 16)] * 2
    feature_map = model(images)["last"]
    assert torch.allclose(
        feature_map[1, :, 1, 2], model.forward_layers(images)[-1][1, 6], atol=1e-5
    )
    feature_map.square().sum().backward()
    assert [n for n, p in model.named_parameters() if p.grad is None] == []


def test_positions_are_resized_bilinearly():
    model = tiny()
    name = "transformer.embeddings.position_embedding"
    table = torch.rand(1 + 9, 16)
    fitted, resized = model.fit_state_dict({name: table.half()})
    grid = table.half().float()[1:].T.view(1, 16, 3, 3)
    expected = F.interpolate(grid, size=(2, 3), mode="bilinear")[0].flatten(1).T
    assert resized == [name] and torch.equal(fitted[name][1:], expected)
    assert torch.equal(fitted[name][0], table[0].half().float())
    assert model.fit_state_dict({name: torch.rand(7, 16)})[1] == []
    with pytest.raises(ValueError, match="9 rows, not 1 plus a square grid"):
        model.fit_state_dict({name: torch.rand(9, 16)})


def test_wrong_sizes_are_named():
    with pytest.raises(ValueError, match="not a multiple of patch size 8"):
        tiny(image_size=(16, 20))
    with pytest.raises(ValueError, match="images of .16, 16., built for .16, 24."):
        tiny()(torch.rand(1, 3, 16, 16))
    with pytest.raises(ValueError, match="STEM is 'stem'"):
        tiny(stem="stem")
