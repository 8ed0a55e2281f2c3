"""Feature Enhancement of RISAM (Eq. 1 and 2), and what Tables 2 and 6 put in its place."""

import itertools
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from detectron2.layers import ShapeSpec, get_norm
from torch import Tensor, nn


class FeatureEnhancement(nn.Module):
    """Fuse shallow with middle features, and the result with deep ones.

    F^ = CBA([MLP(F_v1), MLP(F_v2)]),  F_v = CBA([MLP(F^), MLP(F_v3)])
    """

    def __init__(
        self, *, channels: Sequence[int], dim: int, mlp_layers: int, num_convs: int, norm: str
    ):
        """
        Args:
            channels: of F_v1, F_v2, F_v3.
            dim: C of the fused features. (The paper has one C for backbone and head, which would be
                59M parameters here instead of 6M in all.)
            mlp_layers: linear layers of an MLP, 1 or 2.
            num_convs: 3x3 convolutions in a CBA.
            norm: BN, SyncBN, GN, ...
        """
        super().__init__()
        shallow, middle, deep = channels
        self.shallow = _mlp(shallow, dim, mlp_layers)
        self.middle = _mlp(middle, dim, mlp_layers)
        self.early = _mlp(dim, dim, mlp_layers)
        self.deep = _mlp(deep, dim, mlp_layers)
        self.fuse_early = conv_norm_act(2 * dim, dim, num_convs, norm)
        self.fuse_deep = conv_norm_act(2 * dim, dim, num_convs, norm)

    def forward(self, features: Sequence[Tensor], grid: tuple[int, int]) -> Tensor:
        """F_v1, F_v2, F_v3 (B, C_i, h_i, w_i) -> F_v (B, dim, h, w); maps are brought to ``grid`` = (h, w)."""
        shallow, middle, deep = (_channels_last(resize(x, grid)) for x in features)
        early = self.fuse_early(_concatenate(self.shallow(shallow), self.middle(middle)))
        return self.fuse_deep(_concatenate(self.early(_channels_last(early)), self.deep(deep)))


class LastFeature(nn.Module):
    """Without Feature Enhancement: F_v3, projected (Table 2 #1) or, of ``dim`` channels, as it is.

    The latter suits SAM's neck (Table 11), whose output the mask decoder of SAM reads.
    """

    def __init__(self, *, channels: Sequence[int], dim: int, projected: bool):
        """
        Raises:
            ValueError: not projected, and of other than ``dim`` channels.
        """
        super().__init__()
        if not projected and channels[-1] != dim:
            raise ValueError(
                f"MODEL.RISAM.FE.TYPE identity takes features of MODEL.RISAM.DIM = {dim} channels; "
                f"the last of MODEL.RISAM.IN_FEATURES has {channels[-1]}"
            )
        self.projection = nn.Linear(channels[-1], dim) if projected else nn.Identity()

    def forward(self, features: Sequence[Tensor], grid: tuple[int, int]) -> Tensor:
        return _channels_first(self.projection(_channels_last(resize(features[-1], grid))))


class SimpleFeaturePyramid(nn.Module):
    """ViTDet's pyramid of the last map at strides 8, 16 and 32 (Table 6 #11), then Feature Enhancement.

    Li et al., "Exploring Plain Vision Transformer Backbones for Object Detection", ECCV 2022.
    """

    def __init__(
        self, *, channels: Sequence[int], dim: int, mlp_layers: int, num_convs: int, norm: str
    ):
        super().__init__()
        last = channels[-1]
        self.levels = nn.ModuleList(
            [
                nn.Sequential(
                    nn.ConvTranspose2d(last, last // 2, 2, 2), *_pyramid_head(last // 2, dim)
                ),
                nn.Sequential(*_pyramid_head(last, dim)),
                nn.Sequential(nn.MaxPool2d(2, 2), *_pyramid_head(last, dim)),
            ]
        )
        self.enhancement = FeatureEnhancement(
            channels=(dim, dim, dim),
            dim=dim,
            mlp_layers=mlp_layers,
            num_convs=num_convs,
            norm=norm,
        )

    def forward(self, features: Sequence[Tensor], grid: tuple[int, int]) -> Tensor:
        return self.enhancement([level(features[-1]) for level in self.levels], grid)


def build_feature_enhancement(
    name: str,
    *,
    shapes: Sequence[ShapeSpec],
    dim: int,
    mlp_layers: int,
    num_convs: int,
    norm: str,
) -> nn.Module:
    """Build MODEL.RISAM.FE.TYPE: (feature maps, grid) -> F_v (B, dim, h, w).

    Raises:
        ValueError: an unknown name, or not three maps for "fusion".
    """
    channels = [shape.channels for shape in shapes]
    fusing = {"channels": channels, "dim": dim, "norm": norm}
    fusing.update(mlp_layers=mlp_layers, num_convs=num_convs)
    if name == "fusion":
        if len(channels) != 3:
            raise ValueError(
                f"Feature Enhancement fuses three maps; MODEL.RISAM.IN_FEATURES has {len(channels)}"
            )
        return FeatureEnhancement(**fusing)
    if name == "vitdet":
        return SimpleFeaturePyramid(**fusing)
    if name in ("linear", "identity"):
        return LastFeature(channels=channels, dim=dim, projected=name == "linear")
    raise ValueError(f"MODEL.RISAM.FE.TYPE is {name!r}, not fusion, linear, identity or vitdet")


def conv_norm_act(in_channels: int, channels: int, num_convs: int, norm: str) -> nn.Sequential:
    """Build the paper's CBA: 3x3 convolutions, one normalisation, GELU."""
    inputs = [in_channels] + [channels] * (num_convs - 1)
    convs = [nn.Conv2d(c, channels, 3, padding=1, bias=False) for c in inputs]
    return nn.Sequential(*convs, get_norm(norm, channels), nn.GELU())


def resize(x: Tensor, size: tuple[int, int]) -> Tensor:
    """Bilinear, where the map (B, C, h, w) has another size."""
    if tuple(x.shape[-2:]) == tuple(size):
        return x
    return F.interpolate(x, size=tuple(size), mode="bilinear", align_corners=False)


def _mlp(in_dim: int, dim: int, layers: int) -> nn.Sequential:
    dims = [in_dim] + [dim] * layers
    linears = [nn.Linear(a, b) for a, b in itertools.pairwise(dims)]
    return nn.Sequential(*[m for x in linears for m in (x, nn.GELU())][:-1])


def _pyramid_head(in_channels: int, dim: int) -> list[nn.Module]:
    from timm.layers import LayerNorm2d

    return [
        nn.Conv2d(in_channels, dim, 1, bias=False),
        LayerNorm2d(dim),
        nn.Conv2d(dim, dim, 3, padding=1, bias=False),
        LayerNorm2d(dim),
    ]


def _concatenate(*channel_last: Tensor) -> Tensor:
    return _channels_first(torch.cat(channel_last, -1))


def _channels_last(x: Tensor) -> Tensor:
    return x.permute(0, 2, 3, 1)


def _channels_first(x: Tensor) -> Tensor:
    return x.permute(0, 3, 1, 2)
