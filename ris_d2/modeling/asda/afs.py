"""Adaptive Feature Selection (Eq. 1 to 3): the sentence chooses layers of the vision encoder."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..options import check_choice


class Selected(NamedTuple):
    """One level's feature maps, and which of them each expression has chosen.

    Attributes:
        features: (P, C, h, w).
        rows: int64 (E,), the map of each expression.
        layers: int64 (E,), the layer (1-based) that each expression's scores are highest for.
    """

    features: Tensor
    rows: Tensor
    layers: Tensor


class AdaptiveFeatureSelection(nn.Module):
    """Scores a level's candidate layers by their [CLS] and the sentence, and takes the best one."""

    def __init__(
        self,
        *,
        vision_dim: int,
        text_dim: int,
        levels: dict[str, Sequence[int]],
        network: Callable[..., nn.Module],
        mode: str,
        grid: tuple[int, int],
    ):
        """
        Args:
            levels: name -> candidate layers (1-based). One candidate is a manual choice: nothing is
                built for it.
            network: dim, candidates -> Phi_as, scores (E, K, dim) of Eq. 1 -> logits (E, K).
            mode: hard (as released: no gradient reaches the scores, they stay as they were
                initialised, and are frozen), straight_through (hard forward, soft backward) or soft
                (a mixture of the candidates).
            grid: (h, w) of the vision encoder's tokens.

        Raises:
            ValueError: for an unknown mode.
        """
        super().__init__()
        check_choice("MODEL.ASDA.SELECTION.MODE", mode, ("hard", "straight_through", "soft"))
        self.levels = {name: tuple(layers) for name, layers in levels.items()}
        self.mode, self.grid = mode, grid
        for name, layers in self.levels.items():
            self.register_buffer(f"layers_of_{name}", torch.tensor(layers), persistent=False)
        chosen = {name: layers for name, layers in self.levels.items() if len(layers) > 1}
        self.project = nn.Linear(vision_dim, text_dim, bias=False) if chosen else None  # Phi_T
        self.networks = nn.ModuleDict(
            {name: network(dim=text_dim, candidates=len(layers)) for name, layers in chosen.items()}
        )
        if mode == "hard":
            self.requires_grad_(False)

    def forward(
        self, states: Sequence[Tensor], sentences: Sequence[Tensor], image_index: Tensor
    ) -> dict[str, Selected]:
        """
        Args:
            states: of the vision encoder, per layer (B, 1 + h w, C), [CLS] first.
            sentences: per layer (E, D), what the [CLS] of that layer is compared with.
            image_index: int64 (E,), the image of each expression.

        Returns:
            level -> what was selected.
        """
        return {name: self._select(name, states, sentences, image_index) for name in self.levels}

    def _select(
        self, name: str, states: Sequence[Tensor], sentences: Sequence[Tensor], image_index: Tensor
    ) -> Selected:
        layers = self.levels[name]
        candidates = torch.stack([states[layer - 1][:, 1:] for layer in layers], 1)  # (B, K, n, C)
        if name not in self.networks:
            chosen_layers = torch.full_like(image_index, layers[0])
            return Selected(to_map(candidates[:, 0], self.grid), image_index, chosen_layers)
        scores = self.score(name, states, sentences, image_index)
        choice = scores.argmax(1)
        chosen_layers = getattr(self, f"layers_of_{name}")[choice]
        if self.mode == "soft" or (self.mode == "straight_through" and self.training):
            weights = scores.softmax(1)
            if self.mode == "straight_through":
                hard = nn.functional.one_hot(choice, len(layers)).to(weights)
                weights = hard + (weights - weights.detach())
            weights = weights.to(candidates.dtype)
            tokens = torch.einsum("ek,eknc->enc", weights, candidates[image_index])
            rows = torch.arange(choice.shape[0], device=choice.device)
        else:
            tokens, rows = candidates.flatten(0, 1), image_index * len(layers) + choice
            # Sizes must not depend on what was chosen: a GPU would be waited for. In training each
            # expression counts in BatchNorm's statistics, as released.
            few = torch.compiler.is_compiling() or choice.shape[0] < tokens.shape[0]
            if self.training or few:
                tokens, rows = tokens[rows], torch.arange(choice.shape[0], device=choice.device)
        return Selected(to_map(tokens, self.grid), rows, chosen_layers)

    def score(
        self, name: str, states: Sequence[Tensor], sentences: Sequence[Tensor], image_index: Tensor
    ) -> Tensor:
        """Scores of a level's candidates before the softmax: fp32 (E, K)."""
        layers = self.levels[name]
        with torch.autocast(image_index.device.type, enabled=False):
            cls = torch.stack([states[layer - 1][:, 0] for layer in layers], 1).float()
            sentence = torch.stack([sentences[layer - 1] for layer in layers], 1).float()
            return self.networks[name](self.project(cls)[image_index] * sentence)


def to_map(tokens: Tensor, grid: tuple[int, int]) -> Tensor:
    """(P, n, C) -> (P, C, h, w), channels last in memory."""
    return tokens.transpose(1, 2).unflatten(2, grid)
