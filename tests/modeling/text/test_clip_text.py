import pytest
import torch

from ris_d2 import get_ris_cfg
from ris_d2.modeling.text import RISCLIPText, build_text_encoder


@pytest.fixture
def tiny():
    torch.manual_seed(0)
    return RISCLIPText(dim=16, depth=3, num_heads=2, vocab_size=30, num_positions=7).eval()


def test_parameters_are_clip_b():
    cfg = get_ris_cfg()
    cfg.merge_from_list(["MODEL.RIS.TEXT.NAME", "RISCLIPText", "INPUT.RIS.MAX_TOKENS", 17])
    with torch.device("meta"):
        model = build_text_encoder(cfg)
    assert sum(p.numel() for p in model.parameters()) == 63_126_528 + 17 * 512
    assert (model.dim, model.depth, model.vocab_size) == (512, 12, 49408)


def test_layers_and_padding(tiny):
    ids = torch.randint(1, 30, (2, 7), generator=torch.Generator().manual_seed(0))
    mask = torch.arange(7) < torch.tensor([[4], [7]])
    states = tiny.forward_layers(ids, mask)
    assert [s.shape for s in states] == [(2, 7, 16)] * 4
    normed = tiny.transformer.final_layer_norm(states[-2])
    assert torch.allclose(states[-1], normed) and torch.equal(tiny(ids, mask), states[-1])
    # Causal: a changed pad, or none at all, leaves the real tokens alone.
    other = torch.where(mask, ids, 0)
    assert torch.allclose(tiny(other, mask)[0, :4], states[-1][0, :4], atol=1e-6)
    assert torch.allclose(tiny(ids[:1, :4], mask[:1, :4])[0], states[-1][0, :4], atol=1e-6)
    other[0, 3] += 1
    assert not torch.allclose(tiny(other, mask)[0, 3], states[-1][0, 3], atol=1e-3)


def test_every_parameter_learns(tiny):
    ids = torch.arange(14).view(2, 7)
    tiny.train()(ids, ids >= 0).square().sum().backward()
    without = [n for n, p in tiny.named_parameters() if p.grad is None]
    assert without == []


def test_position_table_is_cut_and_never_stretched(tiny):
    name = "transformer.embeddings.position_embedding.weight"
    table = torch.rand(77, 16)
    fitted, resized = tiny.fit_state_dict({name: table, "other": table})
    assert resized == [name] and torch.equal(fitted[name], table[:7]) and fitted["other"] is table
    assert tiny.fit_state_dict({name: table[:7]})[1] == []
    with pytest.raises(ValueError, match="sentences of 5 tokens, this model reads 7.*MAX_TOKENS"):
        tiny.fit_state_dict({name: table[:5]})


def test_unknown_encoder_lists_the_known():
    cfg = get_ris_cfg()
    cfg.MODEL.RIS.TEXT.NAME = "RISWord2Vec"
    with pytest.raises(ValueError, match="RISWord2Vec.*RISCLIPText"):
        build_text_encoder(cfg)


def test_words_of_the_init_from_scratch_do_not_drown():
    """The last state still tells the word at its place from others, where CLIP's own init does not."""
    ids = torch.arange(1, 8)[None]
    other = ids.clone()
    other[0, 5] = 20
    change = {}
    for init in ("released", "scratch"):
        torch.manual_seed(0)
        model = RISCLIPText(
            dim=16, depth=3, num_heads=2, vocab_size=30, num_positions=7, init=init
        ).eval()
        with torch.no_grad():
            change[init] = (model(ids, ids > 0) - model(other, ids > 0))[0, 5].norm()
    assert change["scratch"] > 1.5 * change["released"]
    with pytest.raises(ValueError, match="TEXT.CLIP.INIT is 'xavier'"):
        RISCLIPText(init="xavier")
