import math

import pytest
import torch

from ris_d2.modeling.risam.mutual_aware_attention import MutualAwareAttention

DIM, REGIONS, WORDS = 16, 30, 5


def block(**changes):
    torch.manual_seed(0)
    arguments = dict(word_dim=12, dim=DIM, tau=0.35, use_mask=True, lga_norm="sum")
    return MutualAwareAttention(**{**arguments, **changes})


def inputs(scale=1.0):
    generator = torch.Generator().manual_seed(1)
    regions = scale * torch.randn(2, REGIONS, DIM, generator=generator)
    words = scale * torch.randn(2, WORDS, 12, generator=generator)
    return regions, words, torch.tensor([[True] * 5, [True, True, True, False, False]])


@pytest.mark.parametrize("lga_norm", ["none", "sum", "softmax"])
def test_equations_3_to_5(lga_norm):
    """Word by word and region by region, in plain loops."""
    module, (regions, words, text_mask) = block(lga_norm=lga_norm), inputs(3.0)
    with torch.no_grad():
        out = module(regions, words, text_mask)
        for e in range(2):
            z_v = regions[e] @ module.vision.weight.T
            z_l = words[e] @ module.language.weight.T
            scores = z_v @ z_l.T / math.sqrt(DIM)
            weights = torch.zeros(REGIONS, WORDS)
            keep = torch.zeros(REGIONS, WORDS, dtype=torch.bool)
            for i in range(REGIONS):
                for j in range(WORDS):
                    relevant = 1 / (1 + math.exp(-scores[i, j])) >= 0.35
                    keep[i, j] = relevant and bool(text_mask[e, j])
                total = sum(math.exp(scores[i, j]) for j in range(WORDS) if keep[i, j])
                for j in range(WORDS):
                    weights[i, j] = math.exp(scores[i, j]) / total if keep[i, j] else 0.0
            back = weights.T.clone()
            for j in range(WORDS):
                if lga_norm == "sum" and back[j].sum() > 0:
                    back[j] /= back[j].sum()
                if lga_norm == "softmax":
                    total = sum(math.exp(scores[i, j]) for i in range(REGIONS) if keep[i, j])
                    for i in range(REGIONS):
                        back[j, i] = math.exp(scores[i, j]) / total if keep[i, j] else 0.0
            assert 0 < keep.float().mean() < 1
            assert torch.allclose(out.vision_guided[e], weights, atol=1e-5)
            assert torch.allclose(out.language_guided[e], back, atol=1e-5)
            regions_out = module.vision_norm(weights @ z_l + z_v)
            words_out = module.language_norm(back @ z_v + z_l)
            assert torch.allclose(out.regions[e], regions_out, atol=1e-4)
            assert torch.allclose(out.words[e], words_out, atol=1e-4)


def test_a_region_without_relevant_word_and_a_word_without_region_stay_themselves():
    """A threshold that nothing reaches: zeros instead of the softmax over nothing, also backwards."""
    for lga_norm in ("none", "sum", "softmax"):
        module, (regions, words, text_mask) = block(tau=1.1, lga_norm=lga_norm), inputs()
        out = module(regions.requires_grad_(), words, text_mask)
        assert not out.vision_guided.any() and not out.language_guided.any()
        assert torch.allclose(out.regions, module.vision_norm(module.vision(regions)), atol=1e-6)
        assert torch.allclose(out.words, module.language_norm(module.language(words)), atol=1e-6)
        (out.regions.square().sum() + out.words.square().sum()).backward()
        assert torch.isfinite(regions.grad).all()
        assert all(torch.isfinite(p.grad).all() for p in module.parameters())


def test_padded_words_reach_no_region():
    module, (regions, words, text_mask) = block(), inputs()
    changed = words.clone()
    changed[1, 3:] += 5
    before, after = (module(regions, w, text_mask) for w in (words, changed))
    assert torch.equal(before.regions, after.regions)
    assert torch.equal(before.words[text_mask], after.words[text_mask])
    assert not before.vision_guided[1, :, 3:].any()


def test_without_mask_every_region_weighs_every_word():
    module, (regions, words, text_mask) = block(use_mask=False), inputs(3.0)
    weights = module(regions, words, text_mask).vision_guided
    assert (weights[0] > 0).all() and torch.allclose(weights.sum(-1), torch.ones(2, REGIONS))


def test_printed_equation_5_makes_all_words_equal_and_sum_does_not():
    """Why LGA_NORM is sum: at 4096 regions a row of A^T sums to hundreds."""
    torch.manual_seed(0)
    regions = torch.nn.functional.gelu(torch.randn(1, 4096, 64))  # as Feature Enhancement ends
    words = torch.randn(1, 17, 64)
    similarity = {}
    for lga_norm in ("none", "sum", "softmax"):
        module = block(word_dim=64, dim=64, lga_norm=lga_norm, use_mask=False)
        out = module(regions, words, torch.ones(1, 17, dtype=torch.bool)).words[0]
        cosines = torch.nn.functional.cosine_similarity(out[:, None], out[None], dim=-1)
        similarity[lga_norm] = ((cosines.sum() - 17) / (17 * 16)).item()
    assert similarity["none"] > 0.95
    assert similarity["sum"] < 0.3 and similarity["softmax"] < 0.3


def test_vision_guided_attention_alone_leaves_the_words():
    module, (regions, words, text_mask) = block(direction="vision"), inputs()
    out = module(regions, words, text_mask)
    assert torch.equal(out.words, module.language(words)) and out.language_guided is None
    assert torch.equal(out.regions, block()(regions, words, text_mask).regions)


def test_serial_regions_read_the_updated_words_and_the_decoder_does_not():
    """Its regions are those of a mutual block given the other's words and no projection of them."""
    serial, (regions, words, text_mask) = block(direction="serial"), inputs()
    out = serial(regions, words, text_mask)
    assert torch.equal(out.words, serial.language(words))
    updated = block()(regions, words, text_mask).words
    second = block(word_dim=DIM)
    second.load_state_dict({**serial.state_dict(), "language.weight": torch.eye(DIM)})
    expected = second(regions, updated, text_mask)
    assert torch.allclose(out.regions, expected.regions, atol=1e-6)
    assert torch.allclose(out.vision_guided, expected.vision_guided, atol=1e-6)


def test_scores_are_not_rounded_under_autocast(device):
    module, (regions, words, text_mask) = block(), inputs()
    with torch.autocast(device, torch.bfloat16):
        out = module(regions, words, text_mask)
    assert out.vision_guided.dtype == torch.float32
    assert out.regions.dtype == torch.float32 or out.regions.dtype == torch.bfloat16
    expected = module(regions, words, text_mask)
    assert (out.vision_guided - expected.vision_guided).abs().mean() < 0.02


@pytest.mark.parametrize("changes", [{"lga_norm": "mean"}, {"direction": "both"}])
def test_unknown_names(changes):
    with pytest.raises(ValueError, match="'mean'|'both'"):
        block(**changes)
