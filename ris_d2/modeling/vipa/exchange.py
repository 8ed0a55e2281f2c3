"""How vision and language meet inside the encoders (CrossVLT's early fusion)."""

import torch.nn.functional as F
from torch import Tensor, nn

from ..layers import VisionFromWords, init_released

HEAD_DIM = 64


class VisionReadsLanguage(VisionFromWords):
    """Vision tokens attend language tokens (CrossVLT's MHCA): GELU(W (x + IN(attended)))."""

    def __init__(self, *, vision_dim: int, text_dim: int, dim: int):
        """
        Args:
            dim: channels of all heads together, of 64 each; below 128 there is one head.

        Raises:
            ValueError: unless the heads divide ``dim``.
        """
        num_heads = max(1, dim // HEAD_DIM)
        if dim % num_heads:
            raise ValueError(
                f"early fusion cannot share {dim} channels among {num_heads} heads: let "
                f"MODEL.RIS.SWIN.EMBED_DIM be a multiple of {HEAD_DIM // 2}"
            )
        super().__init__(vision_dim=vision_dim, text_dim=text_dim, dim=dim, num_heads=num_heads)
        self.mix = nn.Linear(vision_dim, vision_dim)
        # As CrossVLT starts: what it writes as 1x1 convolutions (v_q, w_v, project_mm) by
        # Kaiming, all other linear layers, gates included, by BERT's and Swin's 0.02.
        for layer in (self.query, self.out, self.mix):
            nn.init.kaiming_normal_(layer.weight)
        for layer in (self.key, self.value):
            init_released(layer)
        nn.init.zeros_(self.mix.bias)

    def forward(self, vision: Tensor, text: Tensor, text_mask: Tensor) -> Tensor:
        """(E, N, vision_dim), (E, L, text_dim), bool (E, L) -> residual (E, N, vision_dim)."""
        return F.gelu(self.mix(vision + self.read(vision, text, text_mask)))


class Gate(nn.Module):
    """x + tanh-gate(residual) * residual, the gate a bottleneck-free MLP without biases."""

    def __init__(self, *, dim: int):
        super().__init__()
        # CrossVLT sets both to zero in its constructor, where neither would ever get a
        # gradient, and then overwrites them.
        self.layers = nn.Sequential(
            nn.Linear(dim, dim, bias=False), nn.ReLU(), nn.Linear(dim, dim, bias=False), nn.Tanh()
        )
        self.layers.apply(init_released)

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        return x + self.layers(residual) * residual


class StageFusion(nn.Module):
    """What one vision stage adds to its Swin blocks in early fusion.

    The stage's output F_i is the normalised residual itself, as in CrossVLT and LAVT.
    """

    def __init__(self, *, vision_dim: int, text_dim: int, dim: int, last: bool):
        """
        Args:
            dim: channels of the first exchange; the second, after downsampling, has 2 vision_dim.
            last: the last stage only gives its output: no gate, no second exchange.
        """
        super().__init__()
        self.read = VisionReadsLanguage(vision_dim=vision_dim, text_dim=text_dim, dim=dim)
        self.norm = nn.LayerNorm(vision_dim)
        if not last:
            down = 2 * vision_dim
            self.gate = Gate(dim=vision_dim)
            self.read_down = VisionReadsLanguage(vision_dim=down, text_dim=text_dim, dim=down)
            self.gate_down = Gate(dim=down)
