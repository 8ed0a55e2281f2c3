"""The Word-Guided Coefficient Generator (Eq. 9): F_fine to a weight for each response mask."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .blocks import ConvBlock


class CoefficientGenerator(nn.Module):
    """Convolutions, and one linear map of all pixels to N_c coefficients.

    The linear map knows every place of the grid apart, so that it exists for one input size;
    weights of another size are resized when they are loaded.
    """

    def __init__(
        self, *, dim: int, num_masks: int, grid: tuple[int, int], last_kernel: int, norm: str
    ):
        """
        Args:
            num_masks: N_c.
            grid: (h, w) of F_fine.
            last_kernel: of the third convolution, 3 as released or 1 as in the paper.
        """
        super().__init__()
        self.num_masks, self.grid = num_masks, tuple(grid)
        self.convs = nn.Sequential(
            ConvBlock(dim, dim, kernel=3, norm=norm),
            ConvBlock(dim, dim, kernel=3, norm=norm),
            nn.Conv2d(dim, num_masks, last_kernel, padding=last_kernel // 2),
        )
        self.out = nn.Linear(grid[0] * grid[1] * num_masks, num_masks, bias=False)

    def forward(self, fine: Tensor) -> Tensor:
        """(E, dim, h, w) -> (E, N_c) in -1..1."""
        return torch.tanh(self.out(self.convs(fine).permute(0, 2, 3, 1).flatten(1)))

    def fit_state_dict(self, state_dict: dict[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
        """Resize the linear map of a square grid to this one's: bilinear, sums over places kept.

        Returns:
            a new state dict, and the names of the tensors that changed size.

        Raises:
            ValueError: the weights are of no square grid.
        """
        name = "out.weight"
        weight = state_dict.get(name)
        if weight is None or weight.shape == self.out.weight.shape or len(weight) != self.num_masks:
            return state_dict, []
        side = round((weight.shape[1] / self.num_masks) ** 0.5)
        if side * side * self.num_masks != weight.shape[1]:
            raise ValueError(
                f"{name} has {weight.shape[1]} columns, not {self.num_masks} x a square grid"
            )
        maps = weight.float().view(self.num_masks, side, side, -1).permute(0, 3, 1, 2)
        maps = F.interpolate(maps, size=self.grid, mode="bilinear", align_corners=False)
        maps = maps * (side * side / (self.grid[0] * self.grid[1]))
        return {**state_dict, name: maps.permute(0, 2, 3, 1).flatten(1)}, [name]
