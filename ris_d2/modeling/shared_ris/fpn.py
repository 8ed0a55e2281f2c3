"""The Shared FPN of Shared-RIS (Eq. 6 and 7)."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from ..layers.multiway import ModalityPair, Streams
from .variants import build_fusion


class SharedFPN(nn.Module):
    """Project K levels to d_w, fuse each, concatenate the channels, and project to d_w."""

    def __init__(
        self,
        *,
        stages: Sequence[int],
        in_dim: int,
        dim: int,
        num_heads: int,
        fusion: str,
        proj_per_modality: bool,
    ):
        """
        Args:
            stages: encoder layers j (1-based), in increasing order.
            in_dim: d of the encoder.
            dim: d_w.
            fusion: self, cross or bi; see Table VII b.
            proj_per_modality: W_j apart for vision and text tokens.
        """
        super().__init__()
        self.stages = tuple(stages)
        self.projections = nn.ModuleList(
            ModalityPair(lambda: nn.Linear(in_dim, dim), shared=not proj_per_modality)
            for _ in self.stages
        )
        self.fusions = nn.ModuleList(
            build_fusion(fusion, dim=dim, num_heads=num_heads) for _ in self.stages
        )
        self.merge = nn.Linear(len(self.stages) * dim, dim)  # W_f

    def forward(self, states: Mapping[int, Streams], text_mask: Tensor) -> Streams:
        """Layer -> streams of width ``in_dim``, bool (B, T) -> streams of width ``dim``."""
        levels = [
            fuse(project(states[stage]), text_mask)  # z_j, Eq. 6
            for stage, project, fuse in zip(
                self.stages, self.projections, self.fusions, strict=True
            )
        ]
        vision, text = zip(*levels, strict=True)
        return self.merge(torch.cat(vision, -1)), self.merge(torch.cat(text, -1))  # z, Eq. 7
