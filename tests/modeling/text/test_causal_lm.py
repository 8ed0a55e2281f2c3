import pytest
import torch

from ris_d2 import get_ris_cfg
from ris_d2.modeling.text import RISCausalLM, build_text_encoder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=40,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=32,
    )
    path = tmp_path_factory.mktemp("qwen2")
    Qwen2ForCausalLM(config).save_pretrained(path)
    return str(path)


def test_states_are_those_of_the_whole_model_and_pads_are_masked(folder):
    from transformers import AutoModelForCausalLM

    cfg = get_ris_cfg()
    cfg.MODEL.RIS.TEXT.NAME = "RISCausalLM"
    cfg.MODEL.RIS.TEXT.CAUSAL_LM.PATH = folder
    encoder = build_text_encoder(cfg).eval()
    assert (encoder.dim, encoder.depth, encoder.vocab_size) == (16, 2, 40)
    assert not any("lm_head" in name for name, _ in encoder.named_parameters())
    ids = torch.tensor([[3, 4, 5, 6, 7], [3, 9, 8, 0, 0]])
    mask = torch.tensor([[True] * 5, [True] * 3 + [False] * 2])
    whole = AutoModelForCausalLM.from_pretrained(folder).eval()
    with torch.no_grad():
        states = encoder(ids, mask)
        expected = whole(ids[1:, :3], output_hidden_states=True).hidden_states[-1]
    assert states.shape == (2, 5, 16)
    assert torch.allclose(states[1:, :3], expected, atol=1e-5)


def test_random_weights_and_a_path_that_is_missing(folder):
    trained, random = RISCausalLM(path=folder), RISCausalLM(path=folder, pretrained=False)
    name = "model.embed_tokens.weight"
    assert not torch.equal(trained.state_dict()[name], random.state_dict()[name])
    with pytest.raises(ValueError, match="CAUSAL_LM.PATH is empty"):
        RISCausalLM(path="")
