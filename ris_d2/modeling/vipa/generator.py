"""Keys and values of the decoder: the visual expression (Sec. III B)."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..options import check_choice
from .attention import AttentionBlock


@dataclass(frozen=True, kw_only=True)
class Expression:
    """Keys and values of the decoder.

    Attributes:
        tokens: (E, K, D); K = L where each token has its own, N without retrieval.
        attn_mask: bool (E, K), False where a token is no information (padding, excluded cue).
        relevance: (E, L, N) cosines S_c of each token and each visual token (Eq. 1); None for
            language.
        retrieved: bool (E, L, N), M of Eq. 3, rows of no information included; None without
            retrieval.
    """

    tokens: Tensor
    attn_mask: Tensor | None
    relevance: Tensor | None = None
    retrieved: Tensor | None = None


class VisualExpressionGenerator(nn.Module):
    """Retrieves visual tokens for each linguistic cue, then refines what it found."""

    def __init__(
        self,
        *,
        vision_dim: int,
        text_dim: int,
        dim: int,
        num_heads: int,
        joint_dim: int = 512,
        ratio: float = 0.3,
        noise: str = "temperature",
        tau_init: float = 0.07,
        cues: str = "both",
        excluded_ids: Sequence[int] = (),
        retrieve: bool = True,
        refine: bool = True,
        aggregation: str = "mean",
    ):
        """
        Args:
            vision_dim, text_dim: C of F_v, channels of the linguistic tokens.
            dim: D of the visual expression.
            joint_dim: E, of the space in which both modalities are compared.
            ratio: r, of retrieved visual tokens to all; N_p = max(1, floor(r N)).
            noise: g ~ Gumbel(0, 1) in training. "temperature": softmax(S_c / tau + g); "scores":
                softmax((S_c + g) / tau), Eq. 2 to the letter, where what is retrieved does not
                depend on tau and noise of standard deviation 1.28 drowns the cosines.
            tau_init: tau at the start.
            cues: "both"; "global", the [CLS] token alone; "local", the others (Table VI b).
            excluded_ids: token ids that are no cues (Table IX: articles).
            retrieve: step 1 (Table VI a); False: each visual token is its own.
            refine: step 2 (Table VI a); False: the aggregated tokens are the expression.
            aggregation: "mean" or "sum" (Eq. 5) of retrieved tokens. They differ by a constant that
                the linear layer can learn; a sum of 67 tokens starts far too large.

        Raises:
            ValueError: a ratio outside (0, 1], a temperature that is not positive, or an unknown
                name.
        """
        super().__init__()
        if not 0 < ratio <= 1:
            raise ValueError(f"MODEL.VIPA.GENERATOR.RATIO lies in (0, 1], not {ratio}")
        if tau_init <= 0:
            raise ValueError(f"MODEL.VIPA.GENERATOR.TAU_INIT must be positive, not {tau_init}")
        check_choice("MODEL.VIPA.GENERATOR.NOISE", noise, ("scores", "temperature"))
        check_choice("MODEL.VIPA.GENERATOR.CUES", cues, ("both", "global", "local"))
        check_choice("MODEL.VIPA.GENERATOR.AGGREGATION", aggregation, ("mean", "sum"))
        self.ratio, self.noise, self.cues = ratio, noise, cues
        self.excluded_ids = tuple(excluded_ids)
        self.retrieve, self.aggregation = retrieve, aggregation
        self.phi_vision = nn.Linear(vision_dim, joint_dim)
        self.phi_text = nn.Linear(text_dim, joint_dim)
        # tau = exp(this), always positive.
        self.log_temperature = nn.Parameter(torch.tensor(math.log(tau_init))) if retrieve else None
        self.aggregate = nn.Linear(vision_dim, dim)
        self.refine_by_vision = self.share = None
        if refine:
            self.refine_by_vision = AttentionBlock(
                dim=dim, num_heads=num_heads, context_dim=vision_dim, attention_dim=dim
            )
            self.share = AttentionBlock(dim=dim, num_heads=num_heads)

    def forward(
        self, vision: Tensor, text: Tensor, input_ids: Tensor, text_mask: Tensor
    ) -> Expression:
        """
        Args:
            vision: F_v (E, N, C).
            text: (E, L, text_dim), [CLS] first.
            input_ids: int64 (E, L).
            text_mask: bool (E, L), True = real token.
        """
        relevance = self.relevance(vision, text)
        if self.retrieve:
            attn_mask = self._cue_mask(input_ids, text_mask)
            weights, retrieved = self.sample(relevance)
            aggregated = weights.to(vision.dtype) @ vision
        else:
            attn_mask = retrieved = None
            aggregated = vision
        tokens = self.aggregate(aggregated)  # F_a, Eq. 5
        if self.refine_by_vision is not None:
            tokens = self.refine_by_vision(tokens, vision, retrieved)  # F_r, Eq. 6
            tokens = self.share(tokens, attn_mask=attn_mask)  # Eq. 7
        return Expression(
            tokens=tokens, attn_mask=attn_mask, relevance=relevance, retrieved=retrieved
        )

    def relevance(self, vision: Tensor, text: Tensor) -> Tensor:
        """Cosine S_c of each linguistic and each visual token (Eq. 1), fp32 (E, L, N)."""
        x, y = self.phi_vision(vision).float(), self.phi_text(text).float()
        with torch.autocast(x.device.type, enabled=False):
            return F.normalize(y, dim=-1) @ F.normalize(x, dim=-1).transpose(1, 2)

    def sample(self, relevance: Tensor) -> tuple[Tensor, Tensor]:
        """Retrieve the N_p visual tokens of the highest scores per row (Eqs. 2 and 3).

        In training Gumbel noise is added to the scores, and the weights' gradient is that of the
        softmax (straight-through); in evaluation they depend on the cosines alone.

        Args:
            relevance: (E, L, N).

        Returns:
            weights of the visual tokens as float (E, L, N), M / N_p (M with aggregation "sum"), and
            M as bool.
        """
        scores = relevance
        if self.training:
            noise = -torch.empty_like(scores).exponential_().log()
            temperature = self.log_temperature.exp()
            if self.noise == "temperature":
                scores = scores / temperature + noise
            else:
                scores = (scores + noise) / temperature
        count = self.num_retrieved(scores.shape[-1])
        retrieved = torch.zeros_like(scores, dtype=torch.bool)
        retrieved = retrieved.scatter(-1, scores.topk(count, dim=-1).indices, True)
        weights = retrieved.to(scores.dtype)
        if self.aggregation == "mean":
            weights = weights / count
        if self.training:
            # Rows of M / N_p and of the softmax both sum to 1. Straight-through before the division
            # would make the gradient of the retrieval N_p times weaker.
            soft = scores.softmax(-1)
            weights = weights + soft - soft.detach()
        return weights, retrieved

    def num_retrieved(self, num_tokens: int) -> int:
        """N_p of N visual tokens."""
        # The tiny addition: 0.29 * 100 is 28.999... in binary.
        return max(1, math.floor(self.ratio * num_tokens + 1e-6))

    def _cue_mask(self, input_ids: Tensor, text_mask: Tensor) -> Tensor:
        """bool (E, L): the tokens that are cues."""
        cues = text_mask.clone()
        if self.cues == "global":
            cues[:, 1:] = False
        elif self.cues == "local":
            cues[:, 0] = False
        for token_id in self.excluded_ids:
            cues &= input_ids != token_id
        # A sentence of nothing but excluded words keeps them.
        return cues | (text_mask & ~cues.any(1, keepdim=True))
