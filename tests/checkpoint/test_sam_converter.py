"""SAM's two published layouts, on a tiny SAM of transformers with random weights, and what RISAM saves."""

import re

import pytest
import torch
from transformers import (
    SamConfig,
    SamMaskDecoderConfig,
    SamModel,
    SamPromptEncoderConfig,
    SamVisionConfig,
)

from ris_d2 import load_config
from ris_d2.checkpoint import RISCheckpointer, convert_state_dict, load_init
from ris_d2.modeling.backbone import RISSAMViT
from ris_d2.modeling.risam.variants import SAMMaskDecoder

# transformers' names -> the released ones.
TO_RELEASED = {
    r"^vision_encoder\.": "image_encoder.",
    r"patch_embed\.projection": "patch_embed.proj",
    r"^(image_encoder)\.layers": r"\1.blocks",
    r"neck\.conv1": "neck.0",
    r"neck\.layer_norm1": "neck.1",
    r"neck\.conv2": "neck.2",
    r"neck\.layer_norm2": "neck.3",
    r"layer_norm(\d|_final)": r"norm\1",
    r"upscale_conv1": "output_upscaling.0",
    r"upscale_layer_norm|upscale_norm": "output_upscaling.1",
    r"upscale_conv2": "output_upscaling.3",
    r"(mlps\.\d|head)\.layers\.0": r"\1.layers.1",
    r"(mlps\.\d|head)\.proj_in": r"\1.layers.0",
    r"(mlps\.\d|head)\.proj_out": r"\1.layers.2",
    r"^shared_image_embedding.positional_embedding": (
        "prompt_encoder.pe_layer.positional_encoding_gaussian_matrix"
    ),
}


@pytest.fixture(scope="module")
def sam():
    torch.manual_seed(0)
    return SamModel(
        SamConfig(
            vision_config=SamVisionConfig(
                hidden_size=16,
                output_channels=256,
                num_hidden_layers=4,
                num_attention_heads=2,
                image_size=32,
                patch_size=8,
                window_size=2,
                global_attn_indexes=[1, 3],
                num_pos_feats=8,
            ),
            mask_decoder_config=SamMaskDecoderConfig(
                hidden_size=16, num_attention_heads=2, mlp_dim=2048
            ),
            prompt_encoder_config=SamPromptEncoderConfig(
                hidden_size=16, image_size=32, patch_size=8
            ),
        )
    )


def released(sam):
    state = {}
    for name, value in sam.state_dict().items():
        for pattern, replacement in TO_RELEASED.items():
            name = re.sub(pattern, replacement, name)
        state[name] = value
    return state


@pytest.fixture(params=["released", "transformers"])
def published(request, sam):
    return released(sam) if request.param == "released" else sam.state_dict()


def test_the_released_layout_is_the_released_one(sam):
    names = released(sam).keys()
    assert {
        "image_encoder.pos_embed",
        "image_encoder.patch_embed.proj.weight",
        "image_encoder.blocks.3.norm2.bias",
        "image_encoder.blocks.1.attn.rel_pos_h",
        "image_encoder.blocks.0.mlp.lin1.weight",
        "image_encoder.neck.3.weight",
        "mask_decoder.transformer.layers.1.cross_attn_token_to_image.q_proj.weight",
        "mask_decoder.transformer.layers.0.norm4.bias",
        "mask_decoder.transformer.norm_final_attn.weight",
        "mask_decoder.output_upscaling.3.bias",
        "mask_decoder.output_hypernetworks_mlps.3.layers.2.weight",
        "mask_decoder.iou_prediction_head.layers.1.weight",
    } <= names


def test_image_encoder(published, sam):
    model = RISSAMViT(
        image_size=(32, 32),
        patch_size=8,
        embed_dim=16,
        depth=4,
        num_heads=2,
        window_size=2,
        global_blocks=(1, 3),
    )
    converted = convert_state_dict(published, "sam")
    model.load_state_dict(converted)
    expected = sam.vision_encoder.state_dict()
    for name, value in model.vision_encoder.state_dict().items():
        assert torch.equal(value, expected[name])
    assert (
        converted["vision_encoder.pos_embed"]
        is published[next(name for name in published if name.endswith("_encoder.pos_embed"))]
    )


def test_mask_decoder(published, sam):
    model = SAMMaskDecoder(dim=16, num_heads=2)
    model.load_state_dict(convert_state_dict(published, "sam_decoder"))
    expected = sam.mask_decoder.state_dict()
    for name, value in model.mask_decoder.state_dict().items():
        assert torch.equal(value, expected[name])
    table = sam.shared_image_embedding.positional_embedding
    assert torch.equal(model.position_frequencies, table)
    assert torch.equal(model.no_mask, sam.prompt_encoder.no_mask_embed.weight)


@pytest.mark.parametrize("source", ["sam", "sam_decoder"])
def test_other_files_are_refused(source):
    with pytest.raises(ValueError, match="not a SAM checkpoint, .*backbone.weight"):
        convert_state_dict({"backbone.weight": torch.ones(1)}, source)


@pytest.fixture
def tiny_files(tmp_path, sam):
    """Image encoder and text encoder in published layouts, and the config that they fit."""
    from transformers import CLIPConfig, CLIPModel

    torch.save(released(sam), tmp_path / "sam.pth")
    shared = dict(num_hidden_layers=1, num_attention_heads=2)
    clip = CLIPModel(
        CLIPConfig(
            text_config=dict(
                hidden_size=8,
                intermediate_size=32,
                vocab_size=50,
                max_position_embeddings=9,
                **shared,
            ),
            vision_config=dict(
                hidden_size=8, intermediate_size=32, image_size=8, patch_size=4, **shared
            ),
        )
    )
    torch.save(clip.state_dict(), tmp_path / "clip.pth")
    cfg = load_config("")
    cfg.merge_from_list(
        [
            *("MODEL.PIXEL_MEAN", [127.5] * 3, "MODEL.PIXEL_STD", [127.5] * 3),
            *("MODEL.BACKBONE.NAME", "RISSAMViT", "INPUT.RIS.SIZE", (32, 32)),
            *("INPUT.RIS.MAX_TOKENS", 8, "MODEL.RISAM.STRIDE", 8, "MODEL.RISAM.DIM", 16),
            *("MODEL.RISAM.IN_FEATURES", ("global1", "global1", "global2")),
            *("MODEL.RISAM.DEC.UP_DIMS", (8, 4)),
            *(
                "MODEL.INIT",
                [["sam", str(tmp_path / "sam.pth")], ["clip", str(tmp_path / "clip.pth")]],
            ),
        ]
    )
    cfg.MODEL.RIS.FREEZE = type(cfg)({"backbone": "eval", "text": "eval"})
    cfg.MODEL.RIS.SAM.merge_from_list(
        [
            *("EMBED_DIM", 16, "DEPTH", 4, "NUM_HEADS", 2, "PATCH_SIZE", 8),
            *("WINDOW_SIZE", 2, "GLOBAL_BLOCKS", (1, 3)),
        ]
    )
    cfg.MODEL.RIS.TEXT.CLIP.merge_from_list(
        ["DIM", 8, "DEPTH", 1, "NUM_HEADS", 2, "VOCAB_SIZE", 50]
    )
    return cfg


def build(cfg, seed):
    from ris_d2.modeling.risam import RISAM

    torch.manual_seed(seed)
    return RISAM(cfg)


def test_checkpoints_of_risam_hold_what_was_trained(tiny_files, tmp_path):
    """The file names the frozen weights by hash; loading it finds them, or refuses others."""
    cfg = tiny_files
    model = build(cfg, 0)
    saver = RISCheckpointer(model, str(tmp_path), init=cfg.MODEL.INIT, save_frozen=False)
    saver.load("")
    saver.save("model")
    content = torch.load(tmp_path / "model.pth")
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    frozen = {n for n, p in model.named_parameters() if not p.requires_grad}
    assert trained <= content["model"].keys() and not frozen & content["model"].keys()
    assert [source for source, _, _ in content["frozen_sources"]] == ["clip", "sam"]

    other = build(cfg, 1)
    RISCheckpointer(other, init=cfg.MODEL.INIT).load(str(tmp_path / "model.pth"))
    expected = model.state_dict()
    assert all(torch.equal(v, expected[n]) for n, v in other.state_dict().items())

    weights = torch.load(tmp_path / "sam.pth")
    torch.save({n: v + 1 for n, v in weights.items()}, tmp_path / "sam.pth")
    with pytest.raises(ValueError, match="leaves its frozen sam weights out"):
        RISCheckpointer(build(cfg, 2), init=cfg.MODEL.INIT).load(str(tmp_path / "model.pth"))


def test_sam_decoder_starts_from_sams(tiny_files, tmp_path, sam):
    cfg = tiny_files
    cfg.MODEL.RISAM.DEC.TYPE, cfg.MODEL.RISAM.DEC.NUM_HEADS = "sam", 2
    cfg.MODEL.INIT += [["sam_decoder", str(tmp_path / "sam.pth")]]
    model = build(cfg, 0)
    filled = load_init(model, cfg.MODEL.INIT)
    expected = {
        f"{part}.{n}"
        for part in ("backbone", "text", "decoder")
        for n in model.get_submodule(part).state_dict()
    }
    assert filled.keys() == expected
    tokens = model.decoder.mask_decoder.mask_tokens.weight
    assert torch.equal(tokens, sam.mask_decoder.mask_tokens.weight)


def test_a_trained_risam_gives_its_encoders_to_another_head(tiny_files, tmp_path):
    cfg = tiny_files
    trained = build(cfg, 0)
    RISCheckpointer(trained, str(tmp_path)).save("trained")
    path = str(tmp_path / "trained.pth")
    cfg.MODEL.RISAM.FUSION = "te"
    model, same = build(cfg, 1), build(cfg, 1)
    filled = load_init(model, [["risam", path]])
    weights, random = trained.state_dict(), same.state_dict()
    for name, value in model.state_dict().items():
        is_encoder = name.startswith(("backbone.", "text."))
        assert (name in filled) == is_encoder
        assert torch.equal(value, (weights if is_encoder else random)[name])
    with pytest.raises(ValueError, match="not a checkpoint of RISAM.*backbone., text.*it has e.g."):
        convert_state_dict({"encoder.weight": torch.ones(1)}, "risam")
