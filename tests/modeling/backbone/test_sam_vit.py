import pytest
import torch
from detectron2.modeling import build_backbone
from torch.utils._python_dispatch import TorchDispatchMode

from ris_d2 import get_ris_cfg
from ris_d2.modeling.backbone import RISSAMViT


def tiny(**changes):
    torch.manual_seed(0)
    arguments = dict(image_size=(48, 48), patch_size=8, embed_dim=16, depth=4, num_heads=2)
    return RISSAMViT(**{**arguments, "window_size": 4, "global_blocks": (1, 3), **changes})


@pytest.mark.parametrize(
    "dim, depth, heads, blocks, parameters",
    [
        (1280, 32, 16, (7, 15, 23, 31), 637_026_048),
        (1024, 24, 16, (5, 11, 17, 23), 308_278_272),
        (768, 12, 12, (2, 5, 8, 11), 89_670_912),
    ],
)
def test_parameters_of_the_published_encoders(dim, depth, heads, blocks, parameters):
    cfg = get_ris_cfg()
    cfg.merge_from_list(["MODEL.BACKBONE.NAME", "RISSAMViT", "INPUT.RIS.SIZE", (1024, 1024)])
    cfg.MODEL.RIS.SAM.merge_from_list(
        ["EMBED_DIM", dim, "DEPTH", depth, "NUM_HEADS", heads, "GLOBAL_BLOCKS", blocks]
    )
    with torch.device("meta"):
        model = build_backbone(cfg)
    assert sum(p.numel() for p in model.parameters()) == parameters
    shape = model.output_shape()["global4"]
    assert (shape.channels, shape.stride) == (dim, 16)


def test_features_are_outputs_of_the_blocks_with_global_attention():
    """The same numbers as transformers' own forward pass gives."""
    model = tiny(neck=True).eval()
    images = torch.randn(2, 3, 48, 48)
    with torch.no_grad():
        outputs = model(images)
        expected = model.vision_encoder(images, output_hidden_states=True)
    assert list(outputs) == ["global1", "global2", "neck"] == list(model.output_shape())
    for name, state in (("global1", 2), ("global2", 4)):
        assert outputs[name].shape == (2, 16, 6, 6)
        assert torch.equal(outputs[name].permute(0, 2, 3, 1), expected.hidden_states[state])
    assert torch.equal(outputs["neck"], expected.last_hidden_state)
    # Random weights of a usable size, where the library's own give 1e-8.
    assert outputs["global2"].std() > 0.1


class Largest(TorchDispatchMode):
    """Notes the number of elements of the largest tensor that any operation makes."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        tensors = [
            x for x in (out if isinstance(out, (tuple, list)) else [out]) if torch.is_tensor(x)
        ]
        self.elements = max([self.elements, *(x.numel() for x in tensors)])
        return out


@pytest.mark.not_pretended
def test_attention_equals_transformers_own_and_makes_no_tensor_of_tokens_times_tokens():
    from transformers.models.sam.modeling_sam import SamVisionSdpaAttention

    model = tiny(image_size=(128, 128))  # 16 x 16 tokens, two heads
    for block, size in ((model.vision_encoder.layers[0], 4), (model.vision_encoder.layers[1], 16)):
        own = block.attn
        torch.nn.init.normal_(own.rel_pos_h)
        torch.nn.init.normal_(own.rel_pos_w)
        theirs = SamVisionSdpaAttention(model.vision_encoder.config, size if size == 4 else 0)
        theirs.load_state_dict(own.state_dict())
        tokens = torch.randn(2, size, size, 16)
        results = []
        for attention in (own, theirs):
            with torch.no_grad(), Largest() as largest:
                attention(tokens)
            out = attention(tokens)[0]
            gradients = torch.autograd.grad(out.square().sum(), list(attention.parameters()))
            results.append((largest.elements, out, *gradients))
        (elements, *ours), (_, *expected) = results
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)
        if size == 16:
            assert elements < 2 * 256 * 256  # of one image and one head


def test_a_window_sees_itself_and_a_global_block_everything():
    model = tiny().eval()
    images = torch.randn(1, 3, 48, 48)
    changed = images.clone()
    changed[..., 40:, 40:] += 1  # the last patch; the window of the first ends 16 pixels before it
    with torch.no_grad():
        encoder = model.vision_encoder
        first = [encoder.layers[0](encoder.patch_embed(x))[0, 0, 0] for x in (images, changed)]
        last = [model(x)["global1"][0, :, 0, 0] for x in (images, changed)]
    assert torch.equal(*first)
    assert not torch.allclose(*last, atol=1e-4)


@pytest.mark.parametrize("neck, stem", [(False, "patch"), (True, "conv")])
def test_every_parameter_that_is_read_learns(neck, stem):
    model = tiny(neck=neck, stem=stem)
    outputs = model(torch.randn(1, 3, 48, 48))
    sum(x.square().sum() for x in outputs.values()).backward()
    trained = {n for n, p in model.named_parameters() if p.grad is not None}
    assert trained == {n for n, p in model.named_parameters() if p.requires_grad}
    assert any(".neck." in n for n in trained) == neck


def test_positions_fit_another_size():
    large, small = tiny(image_size=(64, 64)), tiny()
    for p in large.parameters():
        torch.nn.init.normal_(p)
    fitted, names = small.fit_state_dict(large.state_dict())
    own = "vision_encoder.pos_embed"
    globals_ = {f"vision_encoder.layers.{i}.attn.rel_pos_{x}" for i in (1, 3) for x in "hw"}
    assert set(names) == {own, *globals_}  # windows keep their size
    small.load_state_dict(fitted)
    grid = large.vision_encoder.pos_embed[0]
    resized = fitted[own][0]
    assert torch.allclose(resized.mean((0, 1)), grid.mean((0, 1)), atol=0.1)
    same, names = large.fit_state_dict(large.state_dict())
    assert names == [] and torch.equal(same[own], large.vision_encoder.pos_embed)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"image_size": (48, 64)}, r"SIZE is \(48, 64\): SAM takes squares"),
        ({"image_size": (50, 50)}, "multiple of 8"),
        ({"global_blocks": (1, 2)}, "end with the last block, 3"),
        ({"global_blocks": (3, 1, 3)}, "must increase"),
        ({"stem": "linear"}, "STEM is 'linear'"),
    ],
)
def test_settings_that_make_no_sense(changes, message):
    with pytest.raises(ValueError, match=message):
        tiny(**changes)
