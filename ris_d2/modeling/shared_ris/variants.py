"""What Shared-RIS' tables swap in: other ways for the modalities to meet, other FPNs."""

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from detectron2.layers import Conv2d, get_norm
from torch import Tensor, nn

from ..layers import MultiheadAttention, VisionFromWords
from ..layers.multiway import ModalityPair, Streams
from ..options import check_choice
from .fusion import ResidualMLP, SharedSelfAttention


class CrossAttention(nn.Module):
    """Vision attends text and text attends vision, with one set of weights."""

    def __init__(self, *, dim: int, num_heads: int):
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.attention = MultiheadAttention(dim=dim, num_heads=num_heads)

    def forward(self, streams: Streams, text_mask: Tensor) -> Streams:
        vision, text = streams
        v, t = self.norm(vision), self.norm(text)
        return vision + self.attention(v, t, text_mask), text + self.attention(t, v)


class BiDirection(nn.Module):
    """Grounding DINO's enhancer (Fig. 5): attention in and between the modalities, two MLPs."""

    def __init__(self, *, dim: int, num_heads: int):
        super().__init__()
        self.vision_self = SharedSelfAttention(dim=dim, num_heads=num_heads)
        self.text_self = SharedSelfAttention(dim=dim, num_heads=num_heads)
        self.vision_from_text = _CrossBlock(dim=dim, num_heads=num_heads)
        self.text_from_vision = _CrossBlock(dim=dim, num_heads=num_heads)
        self.vision_mlp = ResidualMLP(dim=dim)
        self.text_mlp = ResidualMLP(dim=dim)

    def forward(self, streams: Streams, text_mask: Tensor) -> Streams:
        vision, _ = self.vision_self((streams[0], None), text_mask)
        _, text = self.text_self((None, streams[1]), text_mask)
        attended_vision = self.vision_from_text(vision, text, text_mask)
        attended_text = self.text_from_vision(text, vision, None)
        return self.vision_mlp(attended_vision), self.text_mlp(attended_text)


class _CrossBlock(nn.Module):
    def __init__(self, *, dim: int, num_heads: int):
        super().__init__()
        self.query_norm = nn.LayerNorm(dim)
        self.context_norm = nn.LayerNorm(dim)
        self.attention = MultiheadAttention(dim=dim, num_heads=num_heads)

    def forward(self, query: Tensor, context: Tensor, attn_mask: Tensor | None) -> Tensor:
        return query + self.attention(self.query_norm(query), self.context_norm(context), attn_mask)


_FUSIONS = {"self": SharedSelfAttention, "cross": CrossAttention, "bi": BiDirection}


def build_fusion(name: str, *, dim: int, num_heads: int) -> nn.Module:
    """Build the fusion module called ``name``: (streams, text_mask) -> streams.

    Raises:
        ValueError: for an unknown name.
    """
    check_choice("MODEL.SHARED_RIS' fusion", name, _FUSIONS)
    return _FUSIONS[name](dim=dim, num_heads=num_heads)


class LastLayer(nn.Module):
    """Without FPN (Table III, VII a): the last encoder layer, projected to d_w."""

    def __init__(self, *, stages: tuple[int], in_dim: int, dim: int, proj_per_modality: bool):
        super().__init__()
        self.stages = stages
        self.projection = ModalityPair(lambda: nn.Linear(in_dim, dim), shared=not proj_per_modality)

    def forward(self, states: Mapping[int, Streams], text_mask: Tensor) -> Streams:
        """As SharedFPN; ``text_mask`` plays no part."""
        return self.projection(states[self.stages[0]])


class CRISFPN(nn.Module):
    """CRIS's neck: the deepest map times the sentence, met by shallower maps, then all together.

    CRIS takes three levels of a convolutional network at three resolutions. The encoder's levels
    have one resolution, so nothing is resized, and one width, so all layers have d_w channels.
    CRIS's neck gives a map alone: the visual [CLS] and the words, which the decoder reads as well,
    are the last layer's, projected.
    """

    def __init__(
        self, *, stages: Sequence[int], in_dim: int, dim: int, grid: tuple[int, int], norm: str
    ):
        """
        Args:
            stages: encoder layers (1-based), in increasing order; CRIS has three.
            in_dim: d of the encoder.
            dim: d_w.
            grid: (H/p, W/p) of the visual tokens.
            norm: BN, SyncBN, GN, ... of all convolutions. Batch norms need two expressions per
                process in training: one follows the sentence's projection, which has no pixels.
        """
        super().__init__()
        self.stages, self.grid = tuple(stages), grid
        self.projection = nn.Linear(in_dim, dim)
        self.sentence = _conv(in_dim, dim, norm=norm)
        self.deepest = _conv(in_dim, dim, norm=norm)
        self.product = nn.Sequential(get_norm(norm, dim), nn.ReLU())
        shallower = self.stages[:-1]
        self.laterals = nn.ModuleList(_conv(in_dim, dim, size=3, norm=norm) for _ in shallower)
        self.meets = nn.ModuleList(_conv(2 * dim, dim, norm=norm) for _ in shallower)
        self.levels = nn.ModuleList(_conv(dim, dim, size=3, norm=norm) for _ in self.stages)
        self.merge = _conv(len(self.stages) * dim, dim, norm=norm)
        # CoordConv: two more channels with the position, in -1..1.
        self.locate = _conv(dim + 2, dim, size=3, norm=norm)
        self.refine = _conv(dim, dim, size=3, norm=norm)

    def forward(self, states: Mapping[int, Streams], text_mask: Tensor) -> Streams:
        """Layer -> streams of width ``in_dim`` -> streams of width ``dim``; pads pass, too."""
        *shallower, deepest = (self._map(states[stage][0]) for stage in self.stages)
        last_vision, last_text = states[self.stages[-1]]
        sentence = self.sentence(last_text[:, 0, :, None, None])  # t_cls
        maps = [self.product(self.deepest(deepest) * sentence)]
        for level, lateral, meet in zip(
            reversed(shallower), reversed(self.laterals), reversed(self.meets), strict=True
        ):
            maps.insert(0, meet(torch.cat([lateral(level), maps[0]], 1)))
        merged = self.merge(
            torch.cat([conv(x) for conv, x in zip(self.levels, maps, strict=True)], 1)
        )
        merged = self.refine(self.locate(torch.cat([merged, self._positions(merged)], 1)))
        cls, text = self.projection(last_vision[:, :1]), self.projection(last_text)
        return torch.cat([cls, merged.flatten(2).transpose(1, 2)], 1), text

    def _map(self, vision: Tensor) -> Tensor:
        """Visual tokens (E, 1+n, d) -> (E, d, H/p, W/p)."""
        return vision[:, 1:].transpose(1, 2).unflatten(2, self.grid)

    def _positions(self, like: Tensor) -> Tensor:
        """Of (E, C, h, w): x and y in -1..1, (E, 2, h, w)."""
        y, x = torch.meshgrid(
            *(torch.linspace(-1, 1, side, device=like.device) for side in self.grid), indexing="ij"
        )
        return torch.stack([x, y]).to(like).expand(like.shape[0], -1, -1, -1)


def _conv(in_dim: int, dim: int, *, norm: str, size: int = 1) -> nn.Module:
    return Conv2d(
        in_dim,
        dim,
        size,
        padding=size // 2,
        bias=False,
        norm=get_norm(norm, dim),
        activation=F.relu,
    )


class PixelWordFPN(nn.Module):
    """LAVT's pixel-word attention at every level, then W_f over the levels as in Eq. 7.

    As in LAVT it works at the encoder's width (at d_w it would need fewer multiply-adds than the
    Shared FPN, and the paper has it the other way round). Words pass unchanged to W_f.
    """

    def __init__(self, *, stages: Sequence[int], in_dim: int, dim: int):
        """
        Args:
            stages: encoder layers (1-based), in increasing order.
            in_dim: d of the encoder.
            dim: d_w.
        """
        super().__init__()
        self.stages = tuple(stages)
        self.levels = nn.ModuleList(PixelWordAttention(dim=in_dim) for _ in self.stages)
        self.merge = nn.Linear(len(self.stages) * in_dim, dim)  # W_f

    def forward(self, states: Mapping[int, Streams], text_mask: Tensor) -> Streams:
        """Layer -> streams of width ``in_dim``, bool (B, T) -> streams of width ``dim``."""
        streams = [states[stage] for stage in self.stages]
        vision = [
            level(v, t, text_mask) for level, (v, t) in zip(self.levels, streams, strict=True)
        ]
        text = [t for _, t in streams]
        return self.merge(torch.cat(vision, -1)), self.merge(torch.cat(text, -1))


class PixelWordAttention(VisionFromWords):
    """PWAM (LAVT): what each pixel reads in the words, times the pixel; one head."""

    def __init__(self, *, dim: int):
        super().__init__(vision_dim=dim, text_dim=dim, dim=dim)
        self.pixel = nn.Linear(dim, dim)
        self.product = nn.Linear(dim, dim)
        self.norm = nn.LayerNorm(dim)  # LAVT's of each level that its decoder reads

    def forward(self, vision: Tensor, text: Tensor, text_mask: Tensor) -> Tensor:
        """Vision (B, k, dim), text (B, T, dim), bool (B, T) -> (B, k, dim)"""
        words = self.read(vision, text, text_mask)
        return self.norm(F.gelu(self.product(F.gelu(self.pixel(vision)) * words)))
