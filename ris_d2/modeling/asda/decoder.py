"""The segmentation decoder (Eq. 7): N_c response masks."""

from torch import Tensor, nn

from ..options import check_choice
from .blocks import ConvBlock, UpsamplingBlock


class SegmentationDecoder(nn.Module):
    """F_A to response masks at 8 times its resolution."""

    def __init__(self, *, dim: int, num_masks: int, form: str, norm: str):
        """
        Args:
            num_masks: N_c.
            form: released (two convolutions, three times x2 and convolution, a 3x3 convolution) or
                paper (without the first two, and the last one 1x1).

        Raises:
            ValueError: for an unknown form.
        """
        super().__init__()
        check_choice("MODEL.ASDA.DECODER", form, ("released", "paper"))
        half = dim // 2
        first = [(dim, half), (half, half)] if form == "released" else []
        self.convs = nn.Sequential(*(ConvBlock(a, b, kernel=3, norm=norm) for a, b in first))
        inner = half if first else dim
        self.upsampling = nn.Sequential(
            *(UpsamplingBlock(a, half, norm=norm) for a in (inner, half, half))
        )
        kernel = 3 if form == "released" else 1
        self.out = nn.Conv2d(half, num_masks, kernel, padding=kernel // 2)

    def forward(self, x: Tensor) -> Tensor:
        """(E, dim, h, w) -> (E, num_masks, 8 h, 8 w), before their activation."""
        return self.out(self.upsampling(self.convs(x)))
