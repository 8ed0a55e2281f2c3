"""CLIP's two published layouts, on a tiny CLIP of transformers with random weights."""

import re

import pytest
import torch
from transformers import CLIPConfig, CLIPModel

from ris_d2.checkpoint import convert_state_dict, load_init
from ris_d2.modeling.backbone import RISCLIPViT
from ris_d2.modeling.text import RISCLIPText

TO_OPENAI = {
    r"^vision_model\.embeddings\.patch_embedding": "visual.conv1",
    r"^vision_model\.embeddings\.position_embedding\.weight": "visual.positional_embedding",
    r"^vision_model\.embeddings\.": "visual.",
    r"^vision_model\.pre_layrnorm": "visual.ln_pre",
    r"^vision_model\.post_layernorm": "visual.ln_post",
    r"^vision_model\.encoder\.layers": "visual.transformer.resblocks",
    r"^text_model\.encoder\.layers": "transformer.resblocks",
    r"^text_model\.embeddings\.position_embedding\.weight": "positional_embedding",
    r"^text_model\.embeddings\.": "",
    r"^text_model\.final_layer_norm": "ln_final",
    r"self_attn\.out_proj": "attn.out_proj",
    r"layer_norm(\d)": r"ln_\1",
    r"mlp\.fc1": "mlp.c_fc",
    r"mlp\.fc2": "mlp.c_proj",
    r"^visual_projection\.weight": "visual.proj",
    r"^text_projection\.weight": "text_projection",
}


@pytest.fixture(scope="module")
def clip():
    shared = dict(num_hidden_layers=2, num_attention_heads=2, projection_dim=8)
    torch.manual_seed(0)
    config = CLIPConfig(
        vision_config=dict(
            hidden_size=16, intermediate_size=64, image_size=24, patch_size=8, **shared
        ),
        text_config=dict(
            **dict(hidden_size=12, intermediate_size=48, vocab_size=30, eos_token_id=29),
            **dict(max_position_embeddings=9, **shared),
        ),
    )
    return CLIPModel(config).eval()


def openai_layout(state_dict):
    renamed, parts = {}, {}
    for name, value in state_dict.items():
        for pattern, replacement in TO_OPENAI.items():
            name = re.sub(pattern, replacement, name)
        qkv = re.match(r"(.*)self_attn\.([qkv])_proj\.(\w+)$", name)
        if qkv:
            parts.setdefault(f"{qkv[1]}attn.in_proj_{qkv[3]}", {})[qkv[2]] = value
        else:
            renamed[name] = value
    for name, qkv in parts.items():
        renamed[name] = torch.cat([qkv[k] for k in "qkv"])
    return renamed


class Towers(torch.nn.Module):
    weight_parts = {"clip": ("vision", "text")}

    def __init__(self, image_size=(24, 24), num_positions=9):
        super().__init__()
        self.vision = RISCLIPViT(image_size=image_size, patch_size=8, dim=16, depth=2, num_heads=2)
        self.text = RISCLIPText(
            dim=12, depth=2, num_heads=2, vocab_size=30, num_positions=num_positions
        )
        self.head = torch.nn.Linear(2, 2)


@pytest.mark.parametrize("layout", [dict, openai_layout])
def test_both_towers_from_one_file(layout, clip, tmp_path):
    torch.save(layout(clip.state_dict()), tmp_path / "clip.pt")
    model = Towers().eval()
    filled = load_init(model, [("clip", str(tmp_path / "clip.pt"))])
    assert set(filled) == {n for n in model.state_dict() if not n.startswith("head.")}
    images, ids = torch.rand(2, 3, 24, 24), torch.tensor([[3, 7, 29, 0, 0], [4, 5, 6, 8, 29]])
    with torch.no_grad():
        expected = clip.vision_model(images, output_hidden_states=True).hidden_states
        for ours, theirs in zip(model.vision.forward_layers(images), expected[1:], strict=True):
            assert torch.allclose(ours, theirs, atol=1e-5)
        expected = clip.text_model(ids).last_hidden_state
        assert torch.allclose(model.text(ids, ids > 0), expected, atol=1e-5)


def test_one_tower_alone(clip, tmp_path):
    torch.save(clip.state_dict(), tmp_path / "clip.pt")
    model = Towers()
    model.weight_parts = {"clip": ("text",)}
    filled = load_init(model, [("clip", str(tmp_path / "clip.pt"))])
    assert set(filled) == {n for n in model.state_dict() if n.startswith("text.")}


def test_other_sizes(clip, tmp_path, caplog):
    torch.save(openai_layout(clip.state_dict()), tmp_path / "clip.pt")
    init = [("clip", str(tmp_path / "clip.pt"))]
    model = Towers(image_size=(32, 16), num_positions=5)
    with caplog.at_level("INFO"):
        load_init(model, init)
    assert (
        "2 resized" in caplog.text
        and "logit_scale" in caplog.text
        and "vision, text" in caplog.text
    )
    positions = clip.text_model.embeddings.position_embedding.weight[:5]
    assert torch.equal(model.text.transformer.embeddings.position_embedding.weight, positions)
    with pytest.raises(ValueError, match="sentences of 9 tokens, this model reads 12"):
        load_init(Towers(num_positions=12), init)


def test_what_is_not_clip_is_refused():
    with pytest.raises(ValueError, match="not a CLIP checkpoint.*layer1.weight"):
        convert_state_dict({"visual.layer1.weight": torch.ones(1)}, "clip")
