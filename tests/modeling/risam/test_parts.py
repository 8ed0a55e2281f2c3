"""Feature Enhancement, the other fusions, the mask decoders."""

import pytest
import torch
from torch import nn

from ris_d2 import get_ris_cfg
from ris_d2.modeling.risam.decoder import MutualAwareMaskDecoder
from ris_d2.modeling.risam.feature_enhancement import FeatureEnhancement
from ris_d2.modeling.risam.mutual_aware_attention import MutualFeatures
from ris_d2.modeling.risam.variants import SAMMaskDecoder, build_fusion


def mask():
    return torch.tensor([[True, True, True, True], [True, True, False, False]])


def decoder(**changes):
    torch.manual_seed(0)
    arguments = dict(dim=16, num_heads=2, num_blocks=2, layer_norm=False, ffn_dim=0)
    arguments.update(toi_a=False, elg=True, up_dims=(8, 4), norm="BN")
    return MutualAwareMaskDecoder(**{**arguments, **changes}).eval()


def features(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return MutualFeatures(
        torch.randn(2, 12, 16, generator=generator), torch.randn(2, 4, 16, generator=generator)
    )


def test_feature_enhancement_follows_equations_1_and_2():
    torch.manual_seed(0)
    module = FeatureEnhancement(channels=(6, 8, 10), dim=4, norm="BN")
    maps = [torch.randn(2, c, 3, 5) for c in (6, 8, 10)]

    def mlp(x, layers):
        return layers(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)

    early = module.fuse_early(
        torch.cat([mlp(maps[0], module.shallow), mlp(maps[1], module.middle)], 1)
    )
    expected = module.fuse_deep(torch.cat([mlp(early, module.early), mlp(maps[2], module.deep)], 1))
    assert torch.allclose(module(maps, (3, 5)), expected, atol=1e-5)
    conv, norm, activation = module.fuse_deep
    assert conv.weight.shape == (4, 8, 3, 3) and conv.bias is None
    assert isinstance(norm, nn.BatchNorm2d) and isinstance(activation, nn.GELU)


def test_maps_of_other_strides_are_brought_to_the_grid():
    module = FeatureEnhancement(channels=(6, 8, 10), dim=4, norm="BN")
    maps = [torch.randn(2, 6, 8, 8), torch.randn(2, 8, 4, 4), torch.randn(2, 10, 2, 2)]
    assert module(maps, (4, 4)).shape == (2, 4, 4, 4)


def test_mask_is_token_times_pixels():
    module = decoder()
    with torch.no_grad():
        logits, _ = module(features(), mask(), (3, 4))
        module.token_mlp[4].weight.mul_(2)
        module.token_mlp[4].bias.mul_(2)
        doubled, _ = module(features(), mask(), (3, 4))
    assert logits.shape == (2, 12, 16)
    assert torch.allclose(doubled, 2 * logits, atol=1e-5)


@pytest.mark.parametrize("changes", [{}, {"toi_a": True}, {"layer_norm": True, "ffn_dim": 8}])
def test_padded_words_reach_neither_pixels_nor_token(changes):
    module, given = decoder(**changes), features()
    padded, word = given.words.clone(), given.words.clone()
    padded[1, 2:] += 3
    word[1, 1] += 3
    with torch.no_grad():
        results = [
            module(given._replace(words=w), mask(), (3, 4)) for w in (given.words, padded, word)
        ]
    for value, with_padding, with_word in zip(*results, strict=True):
        assert torch.allclose(value, with_padding, atol=1e-5)
        assert torch.equal(value[0], with_word[0])
        assert not torch.allclose(value[1], with_word[1], atol=1e-3)


def test_the_token_sees_pixels_only_with_toi_a_or_without_elg():
    given = features()
    moved = given._replace(regions=features(1).regions)
    for changes, sees_pixels in (({}, False), ({"toi_a": True}, True), ({"elg": False}, True)):
        module = decoder(**changes)
        with torch.no_grad():
            tokens = [module(x, mask(), (3, 4))[1][:, 16:] for x in (given, moved)]
        assert torch.equal(*tokens) != sees_pixels


def test_without_elg_the_words_are_not_read():
    module, given = decoder(elg=False), features()
    with torch.no_grad():
        logits = [
            module(given._replace(words=w), mask(), (3, 4))[0]
            for w in (given.words, 2 * given.words)
        ]
    assert torch.equal(*logits)


def fusion(name, *changes):
    torch.manual_seed(0)
    cfg = get_ris_cfg()
    cfg.MODEL.RISAM.merge_from_list(["FUSION", name, "DIM", 16, "DEC.NUM_HEADS", 2, *changes])
    return build_fusion(cfg, word_dim=12, norm="BN").eval()


@pytest.mark.parametrize("name", ["ma", "sdf", "bcm", "te", "conv", "none"])
def test_fusions_let_words_reach_regions_and_mask_pads(name):
    module, regions = fusion(name), features().regions
    words = torch.randn(2, 4, 12, generator=torch.Generator().manual_seed(2))
    padded, word = words.clone(), words.clone()
    padded[1, 2:] += 3
    word[1, 1] += 3
    with torch.no_grad():
        out, with_padding, with_word = (
            module(regions, w, mask(), (3, 4)) for w in (words, padded, word)
        )
        moved = module(features(1).regions, words, mask(), (3, 4))
    assert out.regions.shape == (2, 12, 16) and out.words.shape == (2, 4, 16)
    assert torch.allclose(out.regions, with_padding.regions, atol=1e-5)
    assert torch.allclose(out.words[mask()], with_padding.words[mask()], atol=1e-5)
    reads_words = not torch.allclose(out.regions[1], with_word.regions[1], atol=1e-4)
    assert reads_words == (name != "none")
    words_know_the_image = not torch.allclose(out.words, moved.words, atol=1e-4)
    assert words_know_the_image == (name in ("ma", "te"))


def test_last_block_makes_no_words_that_nothing_reads():
    blocks = fusion("ma", "DEC.ELG", False).blocks
    assert [b.language_norm is None for b in blocks] == [False, True]


def test_wrong_names_and_numbers():
    with pytest.raises(ValueError, match="FUSION is 'sum', not one of"):
        fusion("sum")
    with pytest.raises(ValueError, match="MA.NUM_BLOCKS is 0"):
        fusion("ma", "MA.NUM_BLOCKS", 0)
    with pytest.raises(ValueError, match="DEC.NUM_BLOCKS is 0"):
        decoder(num_blocks=0)


def test_sam_decoder_reads_no_pads_and_freezes_what_it_does_not_use():
    torch.manual_seed(0)
    module = SAMMaskDecoder(dim=16, num_heads=2, mlp_dim=32)
    given = features()
    logits, token = module(given, mask(), (3, 4))
    assert logits.shape == (2, 12, 16) and token is None
    cut = MutualFeatures(given.regions[1:], given.words[1:, :2])
    assert torch.allclose(logits[1:], module(cut, mask()[1:, :2], (3, 4))[0], atol=1e-5)
    word = given.words.clone()
    word[1, 1] += 3
    assert not torch.allclose(logits[1], module(given._replace(words=word), mask(), (3, 4))[0][1])
    logits.square().sum().backward()
    without = {n for n, p in module.named_parameters() if p.grad is None}
    assert without == {n for n, p in module.named_parameters() if not p.requires_grad}
    assert any("iou_prediction_head" in n for n in without)


def test_sam_decoder_has_sams_positions():
    """Row 0 is the top, column 0 the left; sines of random frequencies of the cells' centres."""
    module = SAMMaskDecoder(dim=16, num_heads=2, mlp_dim=32)
    positions = module._positions((2, 4))
    x, y = 2 * (2 + 0.5) / 4 - 1, 2 * (1 + 0.5) / 2 - 1
    phase = 2 * torch.pi * (torch.tensor([x, y]) @ module.position_frequencies)
    assert positions.shape == (1, 16, 2, 4)
    assert torch.allclose(positions[0, :, 1, 2], torch.cat([phase.sin(), phase.cos()]), atol=1e-5)
