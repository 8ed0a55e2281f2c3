"""The optional head that says whether a sentence has a target."""

from torch import Tensor, nn


class ExistenceHead(nn.Module):
    """Sentence feature -> logit that a target exists.

    An addition of ris_d2 (MODEL.RIS.NO_TARGET "head") for methods whose papers have no such
    decision.
    """

    def __init__(self, *, dim: int):
        super().__init__()
        self.layers = nn.Sequential(
            nn.LayerNorm(dim), nn.Linear(dim, dim), nn.GELU(), nn.Linear(dim, 1)
        )

    def forward(self, sentence: Tensor) -> Tensor:
        """(E, dim) -> (E,)"""
        return self.layers(sentence).squeeze(-1)
