"""What RISAM's tables swap in for Feature Enhancement, attention and mask decoder."""

import math
from collections.abc import Sequence

import torch
from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from torch import Tensor, nn

from ..layers import MLP, MultiheadAttention, resize_maps
from ..options import arguments, check_choice
from .decoder import MutualAwareMaskDecoder
from .feature_enhancement import FeatureEnhancement, conv_norm_act
from .mutual_aware_attention import AttentionBlocks, MutualAwareAttention, MutualFeatures

# Names of MODEL.RISAM.FUSION that are attention blocks -> their direction.
_DIRECTIONS = {"ma": "mutual", "sdf": "vision", "bcm": "serial"}


def build_feature_enhancement(
    cfg: CfgNode, shapes: Sequence[ShapeSpec], norm: str
) -> "FeatureEnhancement | LastFeature | SimpleFeaturePyramid":
    """Build MODEL.RISAM.FE.TYPE: (feature maps, grid) -> F_v (B, dim, h, w).

    Args:
        shapes: of MODEL.RISAM.IN_FEATURES.
        norm: BN, SyncBN, GN, ...

    Raises:
        ValueError: an unknown name, or not three maps for "fusion".
    """
    name, dim = cfg.MODEL.RISAM.FE.TYPE, cfg.MODEL.RISAM.DIM
    check_choice("MODEL.RISAM.FE.TYPE", name, ("fusion", "linear", "identity", "vitdet"))
    channels = [shape.channels for shape in shapes]
    if name in ("linear", "identity"):
        return LastFeature(in_dim=channels[-1], dim=dim, projected=name == "linear")
    if name == "vitdet":
        return SimpleFeaturePyramid(in_dim=channels[-1], dim=dim, norm=norm)
    if len(channels) != 3:
        raise ValueError(
            f"Feature Enhancement fuses three maps; MODEL.RISAM.IN_FEATURES has {len(channels)}"
        )
    return FeatureEnhancement(channels=channels, dim=dim, norm=norm)


class LastFeature(nn.Module):
    """Without Feature Enhancement: F_v3, projected (Table 2 #1) or, of ``dim`` channels, as it is.

    The latter suits SAM's neck (Table 11), whose output the mask decoder of SAM reads.
    """

    def __init__(self, *, in_dim: int, dim: int, projected: bool):
        """
        Raises:
            ValueError: not projected, and of other than ``dim`` channels.
        """
        super().__init__()
        if not projected and in_dim != dim:
            raise ValueError(
                f"MODEL.RISAM.FE.TYPE identity takes features of MODEL.RISAM.DIM = {dim} channels; "
                f"the last of MODEL.RISAM.IN_FEATURES has {in_dim}"
            )
        self.projection = nn.Linear(in_dim, dim) if projected else nn.Identity()

    def forward(self, features: Sequence[Tensor], grid: tuple[int, int]) -> Tensor:
        return self.projection(resize_maps(features[-1], grid).movedim(1, -1)).movedim(-1, 1)


class SimpleFeaturePyramid(nn.Module):
    """ViTDet's pyramid of the last map, strides 8, 16, 32 (Table 6 #11), then Feature Enhancement.

    Li et al., "Exploring Plain Vision Transformer Backbones for Object Detection", ECCV 2022.
    """

    def __init__(self, *, in_dim: int, dim: int, norm: str):
        super().__init__()
        half = in_dim // 2
        self.levels = nn.ModuleList(
            [
                nn.Sequential(nn.ConvTranspose2d(in_dim, half, 2, 2), *_pyramid_head(half, dim)),
                nn.Sequential(*_pyramid_head(in_dim, dim)),
                nn.Sequential(nn.MaxPool2d(2, 2), *_pyramid_head(in_dim, dim)),
            ]
        )
        self.enhancement = FeatureEnhancement(channels=(dim, dim, dim), dim=dim, norm=norm)

    def forward(self, features: Sequence[Tensor], grid: tuple[int, int]) -> Tensor:
        return self.enhancement([level(features[-1]) for level in self.levels], grid)


def _pyramid_head(in_channels: int, dim: int) -> list[nn.Module]:
    from timm.layers import LayerNorm2d

    return [
        nn.Conv2d(in_channels, dim, 1, bias=False),
        LayerNorm2d(dim),
        nn.Conv2d(dim, dim, 3, padding=1, bias=False),
        LayerNorm2d(dim),
    ]


def build_fusion(cfg: CfgNode, *, word_dim: int, norm: str) -> "AttentionBlocks | ProjectedWords":
    """Build MODEL.RISAM.FUSION: (regions, words, text_mask, grid) -> MutualFeatures.

    Raises:
        ValueError: for an unknown name, less than one block, or a sentence that reaches nothing.
    """
    risam, ma, dec = cfg.MODEL.RISAM, cfg.MODEL.RISAM.MA, cfg.MODEL.RISAM.DEC
    name, dim = risam.FUSION, risam.DIM
    words_are_read = dec.TYPE == "sam" or dec.ELG  # F_val, by the mask decoder
    check_choice("MODEL.RISAM.FUSION", name, (*_DIRECTIONS, "te", "conv", "none"))
    if ma.NUM_BLOCKS < 1:
        raise ValueError(f"MODEL.RISAM.MA.NUM_BLOCKS is {ma.NUM_BLOCKS}, it must be at least 1")
    if name == "none" and not words_are_read:
        raise ValueError("MODEL.RISAM.FUSION none with DEC.ELG False: the sentence reaches nothing")
    if name in _DIRECTIONS:
        directions = [_DIRECTIONS[name]] * ma.NUM_BLOCKS
        if name == "ma" and not words_are_read:  # the last block need not make them
            directions[-1] = "vision"
        blocks = [
            MutualAwareAttention(
                word_dim=dim if i else word_dim,
                dim=dim,
                direction=direction,
                **arguments(ma, "TAU", "USE_MASK", "LGA_NORM"),
            )
            for i, direction in enumerate(directions)
        ]
        return AttentionBlocks(blocks=blocks)
    if name == "te":
        layers = {"num_layers": ma.NUM_BLOCKS, "num_heads": dec.NUM_HEADS}
        return TransformerEncoder(word_dim=word_dim, dim=dim, **layers)
    if name == "conv":
        return ConvFusion(word_dim=word_dim, dim=dim, norm=norm)
    return ProjectedWords(word_dim=word_dim, dim=dim)


class ProjectedWords(nn.Module):
    """No fusion (Table 11): the words, projected."""

    def __init__(self, *, word_dim: int, dim: int):
        super().__init__()
        self.words = nn.Linear(word_dim, dim)

    def forward(
        self, regions: Tensor, words: Tensor, text_mask: Tensor, grid: tuple[int, int]
    ) -> MutualFeatures:
        return MutualFeatures(regions, self.words(words))


class ConvFusion(ProjectedWords):
    """Convolutions over the features and the tiled sentence (Table 2 #2).

    The sentence is the end token's; the paper gives neither the layers nor F_val: two CBA, and the
    projected words.
    """

    def __init__(self, *, word_dim: int, dim: int, norm: str):
        super().__init__(word_dim=word_dim, dim=dim)
        self.convs = nn.Sequential(conv_norm_act(2 * dim, dim, norm), conv_norm_act(dim, dim, norm))

    def forward(
        self, regions: Tensor, words: Tensor, text_mask: Tensor, grid: tuple[int, int]
    ) -> MutualFeatures:
        words = self.words(words)
        end = text_mask.sum(1) - 1
        sentence = words[torch.arange(words.shape[0], device=words.device), end]
        pixels = regions.transpose(1, 2).unflatten(2, grid)
        tiled = sentence[:, :, None, None].expand_as(pixels)
        fused = self.convs(torch.cat([pixels, tiled], 1))
        return MutualFeatures(fused.flatten(2).transpose(1, 2), words)


class TransformerEncoder(ProjectedWords):
    """Transformer layers over regions and words together (Table 3 #5, ReSTR).

    Kim et al., "ReSTR: Convolution-free Referring Image Segmentation Using Transformers", CVPR
    2022.
    """

    def __init__(self, *, word_dim: int, dim: int, num_layers: int, num_heads: int):
        super().__init__(word_dim=word_dim, dim=dim)
        self.layers = nn.ModuleList(
            _EncoderLayer(dim=dim, num_heads=num_heads) for _ in range(num_layers)
        )

    def forward(
        self, regions: Tensor, words: Tensor, text_mask: Tensor, grid: tuple[int, int]
    ) -> MutualFeatures:
        count = regions.shape[1]
        tokens = torch.cat([regions, self.words(words)], 1)
        attn_mask = torch.cat([text_mask.new_ones(regions.shape[:2]), text_mask], 1)
        for layer in self.layers:
            tokens = layer(tokens, attn_mask)
        return MutualFeatures(tokens[:, :count], tokens[:, count:])


class _EncoderLayer(nn.Module):
    def __init__(self, *, dim: int, num_heads: int):
        super().__init__()
        self.attention_norm = nn.LayerNorm(dim)
        self.attention = MultiheadAttention(dim=dim, num_heads=num_heads)
        self.mlp_norm = nn.LayerNorm(dim)
        self.mlp = MLP(dim, 4 * dim, dim)

    def forward(self, tokens: Tensor, attn_mask: Tensor) -> Tensor:
        normed = self.attention_norm(tokens)
        tokens = tokens + self.attention(normed, normed, attn_mask)
        return tokens + self.mlp(self.mlp_norm(tokens))


class SAMMaskDecoder(nn.Module):
    """SAM's own (Table 2 #3, Table 11), on transformers' SAM: the words are sparse prompts.

    Of SAM's outputs only the single mask is read.
    """

    def __init__(self, *, dim: int, num_heads: int, mlp_dim: int = 2048):
        """SAM's has ``dim`` 256 and 8 heads. What nothing would train (the MLPs of three more
        masks, and the head for their quality) is frozen."""
        super().__init__()
        from transformers import SamMaskDecoderConfig
        from transformers.models.sam.modeling_sam import SamMaskDecoder

        self.mask_decoder = SamMaskDecoder(
            SamMaskDecoderConfig(
                hidden_size=dim,
                num_attention_heads=num_heads,
                mlp_dim=mlp_dim,
                layer_norm_eps=1e-5,  # SAM's; the library's default is 1e-6
                attn_implementation="sdpa",
            )
        )
        self.mask_decoder.iou_prediction_head.requires_grad_(False)
        self.mask_decoder.output_hypernetworks_mlps[1:].requires_grad_(False)
        # transformers has no argument for prompts that are padding: every attention whose
        # keys are the tokens is told here which of them are words.
        self._keep: Tensor | None = None
        for layer in self.mask_decoder.transformer.layers:
            for attention in (layer.self_attn, layer.cross_attn_image_to_token):
                attention.register_forward_pre_hook(self._mask_pads, with_kwargs=True)
        # Fixed parts of SAM's prompt encoder: random Fourier features of positions, and
        # what stands for "no mask is given".
        self.register_buffer("position_frequencies", torch.randn(2, dim // 2))
        self.register_buffer("no_mask", torch.zeros(1, dim))

    def forward(
        self, features: MutualFeatures, text_mask: Tensor, grid: tuple[int, int]
    ) -> tuple[Tensor, None]:
        """As MutualAwareMaskDecoder, but with nothing for an existence head to read."""
        image = features.regions.transpose(1, 2).unflatten(2, grid)
        own_tokens = text_mask.new_ones(text_mask.shape[0], 1 + self.mask_decoder.num_mask_tokens)
        self._keep = torch.cat([own_tokens, text_mask], 1)[:, None, None]
        masks, _ = self.mask_decoder(
            image_embeddings=image,
            image_positional_embeddings=self._positions(grid).expand(image.shape[0], -1, -1, -1),
            sparse_prompt_embeddings=features.words[:, None],
            dense_prompt_embeddings=self.no_mask[:, :, None, None],
            multimask_output=False,
        )
        return masks[:, 0, 0], None

    def _mask_pads(self, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        return args, {**kwargs, "attention_similarity": self._keep}

    def _positions(self, grid: tuple[int, int]) -> Tensor:
        """(1, dim, h, w), of the centres of the cells."""
        y, x = (2 * (torch.arange(n, device=self.no_mask.device) + 0.5) / n - 1 for n in grid)
        centres = torch.stack([x.expand(*grid), y[:, None].expand(*grid)], -1)
        # No matrix product: autocast would round the phases.
        phases = 2 * math.pi * (centres[..., None] * self.position_frequencies).sum(-2)
        return torch.cat([phases.sin(), phases.cos()], -1).permute(2, 0, 1)[None]


def build_decoder(cfg: CfgNode, norm: str) -> MutualAwareMaskDecoder | SAMMaskDecoder:
    risam, dec = cfg.MODEL.RISAM, cfg.MODEL.RISAM.DEC
    check_choice("MODEL.RISAM.DEC.TYPE", dec.TYPE, ("mutual", "sam"))
    check_choice("MODEL.RISAM.DEC.NORM", dec.NORM, ("none", "LN"))
    if dec.TYPE == "sam":
        if cfg.MODEL.RIS.NO_TARGET == "head":
            raise ValueError(
                "MODEL.RIS.NO_TARGET head needs RISAM's query token; with MODEL.RISAM.DEC.TYPE sam "
                "there is none or area"
            )
        return SAMMaskDecoder(dim=risam.DIM, num_heads=dec.NUM_HEADS)
    own = ("NUM_HEADS", "NUM_BLOCKS", "FFN_DIM", "TOI_A", "ELG", "UP_DIMS")
    return MutualAwareMaskDecoder(
        dim=risam.DIM, layer_norm=dec.NORM == "LN", norm=norm, **arguments(dec, *own)
    )
