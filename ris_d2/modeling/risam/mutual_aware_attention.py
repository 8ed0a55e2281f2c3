"""Mutual-Aware Attention of RISAM (Eq. 3 to 5)."""

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..options import check_choice


class MutualFeatures(NamedTuple):
    """What fusion of the modalities gives.

    Attributes:
        regions: (E, N, dim), F_lav: visual features that know the words.
        words: (E, L, dim), F_val: linguistic features that know the image (of a fusion that makes
            none, the projected words).
        vision_guided: (E, N, L), A: the weights of the words for each region; None if the fusion
            has no such attention.
        language_guided: (E, L, N), the weights of the regions for each word; None likewise.
    """

    regions: Tensor
    words: Tensor
    vision_guided: Tensor | None = None
    language_guided: Tensor | None = None


class MutualAwareAttention(nn.Module):
    """Regions gather words (Vision-Guided), and words regions (Language-Guided Attention).

    S = Z_v Z_l^T / sqrt(C),  A = softmax(S + mask) over the words,
    F_lav = LN(A Z_l + Z_v),  F_val = LN(A^T Z_v + Z_l)

    Where the paper needs reading:

    - Eq. 4 as printed drops the *relevant* pairs, those with sigmoid(S) >= tau; its text, and Fig.
      8, say that the irrelevant ones go. We follow the text.
    - A region without a relevant word gets nothing from the words (softmax over nothing is no
      number).
    - A is normalised over words, so that a row of A^T sums to about N/L = 241 and A^T Z_v drowns
      Z_l: at initialisation all words come out equal (mean cosine 0.997 after the LayerNorm).
      ``lga_norm`` "sum" divides each row by its sum (cosine 0.07), "softmax" is a softmax of S^T
      over regions, "none" is the printed formula.
    """

    def __init__(
        self,
        *,
        word_dim: int,
        dim: int,
        tau: float,
        use_mask: bool,
        lga_norm: str,
        direction: str = "mutual",
    ):
        """
        Args:
            word_dim: C' of the words that come in.
            dim: C.
            tau: relevance below which a pair of region and word is masked.
            use_mask: False: no pair is (Table 3 #8).
            lga_norm: none, sum or softmax.
            direction: "mutual"; "vision": the words stay Z_l (Table 3 #6); "serial": the words
                gather regions first, and the regions gather those words; they go no further, the
                words that leave the block are Z_l ("the serial design fails to further utilize
                vision-aware linguistic features in the mask decoder", Sec. 3.3; Table 3 #7).

        Raises:
            ValueError: for an unknown ``lga_norm`` or ``direction``.
        """
        super().__init__()
        check_choice("MODEL.RISAM.MA.LGA_NORM", lga_norm, ("none", "sum", "softmax"))
        check_choice("direction", direction, ("mutual", "vision", "serial"))
        self.tau, self.use_mask = tau, use_mask
        self.lga_norm, self.direction = lga_norm, direction
        self.vision = nn.Linear(dim, dim, bias=False)  # W_v
        self.language = nn.Linear(word_dim, dim, bias=False)  # W_l
        self.vision_norm = nn.LayerNorm(dim)
        self.language_norm = None if direction == "vision" else nn.LayerNorm(dim)

    def forward(self, regions: Tensor, words: Tensor, text_mask: Tensor) -> MutualFeatures:
        """
        Args:
            regions: (E, N, dim).
            words: (E, L, word_dim).
            text_mask: bool (E, L), True where a word may be attended.
        """
        regions, words = self.vision(regions), self.language(words)  # Z_v, Z_l
        scores, keep = self._relevance(regions, words, text_mask)
        weights = _masked_softmax(scores, keep)  # A
        read, given, region_weights = words, words, None
        if self.direction != "vision":
            region_weights = self._language_guided(scores, keep, weights)
            given = self.language_norm(region_weights.to(regions.dtype) @ regions + words)
        if self.direction == "serial":
            read, given = given, words
            weights = _masked_softmax(*self._relevance(regions, read, text_mask))
        regions = self.vision_norm(weights.to(read.dtype) @ read + regions)
        return MutualFeatures(regions, given, weights, region_weights)

    def _relevance(
        self, regions: Tensor, words: Tensor, text_mask: Tensor
    ) -> tuple[Tensor, Tensor]:
        """S (E, N, L) in fp32, and the pairs that are kept: bool, (E, 1, L) if tau masks none."""
        with torch.autocast(regions.device.type, enabled=False):
            scores = regions.float() @ words.float().transpose(1, 2) / math.sqrt(words.shape[-1])
        keep = text_mask[:, None]
        if self.use_mask:
            keep = keep & (scores.sigmoid() >= self.tau)
        return scores, keep

    def _language_guided(self, scores: Tensor, keep: Tensor, weights: Tensor) -> Tensor:
        """(E, L, N)"""
        if self.lga_norm == "softmax":
            keep = keep.expand_as(scores)
            return _masked_softmax(scores.transpose(1, 2), keep.transpose(1, 2))
        weights = weights.transpose(1, 2)
        if self.lga_norm == "sum":
            weights = weights / weights.sum(-1, keepdim=True).clamp(min=1e-6)
        return weights


class AttentionBlocks(nn.Module):
    """Mutual-Aware Attention blocks in sequence; each has its own weights."""

    def __init__(self, *, blocks: list[MutualAwareAttention]):
        super().__init__()
        self.blocks = nn.ModuleList(blocks)

    def forward(
        self, regions: Tensor, words: Tensor, text_mask: Tensor, grid: tuple[int, int]
    ) -> MutualFeatures:
        """(E, h w, dim), (E, L, word_dim), bool (E, L), (h, w) -> what the last block gives."""
        features = MutualFeatures(regions, words)
        for block in self.blocks:
            features = block(features.regions, features.words, text_mask)
        return features


def _masked_softmax(scores: Tensor, keep: Tensor) -> Tensor:
    """Softmax over the last dimension where ``keep``; zeros in rows that keep nothing."""
    scores = scores.masked_fill(~keep, torch.finfo(scores.dtype).min)
    return scores.softmax(-1) * keep
