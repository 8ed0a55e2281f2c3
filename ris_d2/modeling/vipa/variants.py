"""What VIPA's tables swap in: encoders (II, V and VII), language as keys and values (V)."""

from typing import ClassVar

from detectron2.config import CfgNode
from detectron2.layers import get_norm
from torch import Tensor, nn

from ..backbone import RISBEiT3, RISSwin, backbone_class
from ..options import check_choice
from ..text import RISBert
from .attention import AttentionBlock
from .encoders import EarlyFusion, Encoded, build_early_fusion
from .generator import Expression


class LateFusion(nn.Module):
    """One exchange on the last features of both encoders, each side reading the other's input."""

    def __init__(self, *, vision_dim: int, text_dim: int, num_heads: int):
        super().__init__()
        self.vision = AttentionBlock(
            dim=vision_dim, context_dim=text_dim, attention_dim=text_dim, num_heads=num_heads
        )
        self.text = AttentionBlock(dim=text_dim, context_dim=vision_dim, num_heads=num_heads)

    def forward(self, vision: Tensor, text: Tensor, text_mask: Tensor) -> tuple[Tensor, Tensor]:
        """(E, N, vision_dim), (E, L, text_dim), bool (E, L) -> the same shapes."""
        return self.vision(vision, text, text_mask), self.text(text, vision)


class SeparateEncoders(nn.Module):
    """Swin and BERT on their own; with ``fusion``, one exchange on their last outputs.

    Per image: all of Swin.
    """

    weight_parts: ClassVar[dict[str, str]] = {"swin": "vision", "bert": "text"}

    def __init__(self, *, vision: RISSwin, text: RISBert, fusion: LateFusion | None = None):
        super().__init__()
        self.vision, self.text, self.fusion = vision, text, fusion
        self.dims, self.text_dim, self.vocab_size = vision.dims, text.dim, text.vocab_size

    def encode_images(self, images: Tensor) -> list[Tensor]:
        return list(self.vision(images).values())

    def forward(
        self, features: list[Tensor], image_index: Tensor, input_ids: Tensor, text_mask: Tensor
    ) -> Encoded:
        maps = [feature[image_index] for feature in features]
        text = self.text(input_ids, text_mask)
        if self.fusion is not None:
            size = maps[-1].shape[-2:]
            vision = maps[-1].flatten(2).transpose(1, 2)
            vision, text = self.fusion(vision, text, text_mask)
            maps[-1] = vision.transpose(1, 2).unflatten(2, size)
        return maps, text


class BEiT3Encoder(nn.Module):
    """BEiT-3 on image and sentence together, and four maps made of its last one (Table II).

    Strides p/4, p/2, p and 2p of patch size p: two transposed convolutions, one, none, and
    max-pooling. Per image: the patch embedding.
    """

    weight_parts: ClassVar[dict[str, str]] = {"beit3": "beit3"}

    def __init__(self, *, beit3: RISBEiT3, norm: str):
        """
        Args:
            norm: between the two transposed convolutions: BN, SyncBN, GN, ...
        """
        super().__init__()
        self.beit3 = beit3
        dim = beit3.embed_dim
        self.dims, self.text_dim = (dim // 4, dim // 2, dim, dim), dim
        self.vocab_size = beit3.vocab_size
        self.pyramid = nn.ModuleList(
            [
                nn.Sequential(
                    nn.ConvTranspose2d(dim, dim // 2, 2, 2),
                    get_norm(norm, dim // 2),
                    nn.GELU(),
                    nn.ConvTranspose2d(dim // 2, dim // 4, 2, 2),
                ),
                nn.ConvTranspose2d(dim, dim // 2, 2, 2),
                nn.Identity(),
                nn.MaxPool2d(2),
            ]
        )

    def encode_images(self, images: Tensor) -> Tensor:
        return self.beit3.embed_image(images)

    def forward(
        self, features: Tensor, image_index: Tensor, input_ids: Tensor, text_mask: Tensor
    ) -> Encoded:
        text = self.beit3.embed_text(input_ids, text_mask)
        states = self.beit3.encode(features[image_index], text, text_mask)[self.beit3.depth]
        vision, text = self.beit3.encoder.layer_norm(states)
        last = vision[:, 1:].transpose(1, 2).unflatten(2, self.beit3.grid)
        return [level(last) for level in self.pyramid], text


class LinguisticExpression(nn.Module):
    """Language as keys and values (Table V), with layers that make up for the generator's size."""

    def __init__(self, *, text_dim: int, dim: int, num_heads: int, num_layers: int = 2):
        """
        Args:
            num_layers: self-attention blocks; two have 14.2 M parameters, the generator 16.3 M.
        """
        super().__init__()
        self.project = nn.Linear(text_dim, dim)
        self.layers = nn.ModuleList(
            AttentionBlock(dim=dim, num_heads=num_heads) for _ in range(num_layers)
        )

    def forward(
        self, vision: Tensor, text: Tensor, input_ids: Tensor, text_mask: Tensor
    ) -> Expression:
        """As VisualExpressionGenerator, of which ``vision`` and ``input_ids`` are not read."""
        tokens = self.project(text)
        for layer in self.layers:
            tokens = layer(tokens, attn_mask=text_mask)
        return Expression(tokens=tokens, attn_mask=text_mask)


def build_encoder(cfg: CfgNode) -> EarlyFusion | SeparateEncoders | BEiT3Encoder:
    """Build the encoder that MODEL.VIPA.ENCODER names.

    Raises:
        ValueError: for an unknown name.
    """
    name = cfg.MODEL.VIPA.ENCODER
    check_choice("MODEL.VIPA.ENCODER", name, ("early", "one_way", "late", "none", "beit3"))
    if name == "early":
        return build_early_fusion(cfg)
    if name == "beit3":
        beit3 = backbone_class(cfg, RISBEiT3)(cfg)
        return BEiT3Encoder(beit3=beit3, norm=cfg.MODEL.VIPA.DECODER.NORM)
    swin = backbone_class(cfg, RISSwin)
    if name == "one_way":
        vision = swin(**swin.from_config(cfg), out_features=())
        return EarlyFusion(vision=vision, text=RISBert(cfg), language_reads=False)
    vision, text, fusion = swin(cfg), RISBert(cfg), None
    if name == "late":
        dims = {"vision_dim": vision.dims[-1], "text_dim": text.dim}
        fusion = LateFusion(**dims, num_heads=cfg.MODEL.VIPA.NUM_HEADS)
    return SeparateEncoders(vision=vision, text=text, fusion=fusion)
