"""The encoders of Tables II, V and VII: early, one-way, late and no fusion, and BEiT-3.

Each is called in two steps, ``encode_images`` once per image and ``forward`` once per expression, and
gives vision features F_1 ... F_4 and linguistic tokens.
"""

from typing import Any, ClassVar

from detectron2.config import CfgNode
from detectron2.layers import get_norm
from torch import Tensor, nn

from ..backbone import RISBEiT3, RISSwin, backbone_class
from ..text import BertStack, RISBert
from .exchange import LateFusion, StageFusion

NUM_STAGES = 4
# BERT layers of a language stage after the first: one reads vision, one is ordinary.
_STAGE_LAYERS = 2
_LATER_LAYERS = _STAGE_LAYERS * (NUM_STAGES - 1)

Encoded = tuple[list[Tensor], Tensor]  # F_1 ... F_4, each (E, C_i, h_i, w_i), and tokens (E, L, d)


class EarlyFusion(nn.Module):
    """Swin and BERT stage by stage, with cross-attention between them (CrossVLT).

    Order: language stage 1, vision stage 1, language stage 2, which reads the image between vision
    stages 1 and 2, and so on; the last language tokens have seen vision up to stage 3. Of CrossVLT,
    the alignment heads are left out. Language stage 1 has all BERT layers but six; each further
    stage has two, of which the first reads the image.

    Per image: patch embedding and the blocks of stage 1. Everything else follows the first exchange.
    """

    weight_parts: ClassVar[dict[str, str]] = {"swin": "vision", "bert": "text"}

    def __init__(
        self,
        *,
        vision: RISSwin,
        text: RISBert,
        language_stages: BertStack | None = None,
        language_reads: bool = True,
    ):
        """
        Args:
            vision: without norms of outputs.
            text: with ``context_dims`` of ``context_dims_of``, unless the stages come apart.
            language_stages: the layers of language stages 2 to 4, where they are not ``text``'s own.
            language_reads: False: one-way, all of BERT runs first and vision reads its output.

        Raises:
            ValueError: if BERT has too few layers.
        """
        super().__init__()
        self.vision, self.text = vision, text
        self.language_stages = language_stages
        self.language_reads = language_reads
        self.dims, self.text_dim, self.vocab_size = vision.dims, text.dim, text.vocab_size
        self.first_layers = text.depth
        if language_reads and language_stages is None:
            self.first_layers = text.depth - _LATER_LAYERS
        if self.first_layers < 1:
            raise ValueError(
                f"early fusion needs more than {_LATER_LAYERS} BERT layers, "
                f"MODEL.RIS.TEXT.BERT.DEPTH is {text.depth}"
            )
        self.fusions = nn.ModuleList(
            StageFusion(
                vision_dim=dim,
                text_dim=text.dim,
                dim=max(dim, vision.dims[1]),
                last=stage == NUM_STAGES - 1,
            )
            for stage, dim in enumerate(vision.dims)
        )

    @staticmethod
    def context_dims_of(vision: RISSwin, first: int) -> dict[int, int]:
        """BERT layer -> channels of the vision tokens it reads; language stage 2 starts at ``first``."""
        return {first + _STAGE_LAYERS * i: dim for i, dim in enumerate(vision.dims[1:])}

    def encode_images(self, images: Tensor) -> tuple[Tensor, tuple[int, int]]:
        tokens, size = self.vision.embed(images)
        return self.vision.run_stage(0, tokens, size), size

    def forward(
        self,
        features: tuple[Tensor, tuple[int, int]],
        image_index: Tensor,
        input_ids: Tensor,
        text_mask: Tensor,
    ) -> Encoded:
        text = self.text.run_layers(
            self.text.embed(input_ids), text_mask, 0, self.first_layers
        )  # language stage 1, or all of BERT
        tokens, size = features
        tokens, maps = tokens[image_index], []
        for stage, fusion in enumerate(self.fusions):
            if stage > 0:
                if self.language_reads:
                    text = self._language_stage(stage, text, text_mask, tokens)
                tokens = self.vision.run_stage(stage, tokens, size)
            residual = fusion.read(tokens, text, text_mask)
            maps.append(fusion.norm(residual).transpose(1, 2).unflatten(2, size))
            if stage < NUM_STAGES - 1:
                tokens = fusion.gate(tokens, residual)
                tokens, size = self.vision.downsample(stage, tokens, size)
                residual = fusion.read_down(tokens, text, text_mask)
                tokens = fusion.gate_down(tokens, residual)
        return maps, text

    def _language_stage(
        self, stage: int, text: Tensor, text_mask: Tensor, vision: Tensor
    ) -> Tensor:
        stack, start = self.text, self.first_layers
        if self.language_stages is not None:
            stack, start = self.language_stages, 0
        start += _STAGE_LAYERS * (stage - 1)
        return stack.run_layers(text, text_mask, start, start + _STAGE_LAYERS, vision)


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

    Strides p/4, p/2, p and 2p of patch size p: two transposed convolutions, one, none, and max-pooling.
    Per image: the patch embedding.
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
        self.dims, self.text_dim, self.vocab_size = (
            (dim // 4, dim // 2, dim, dim),
            dim,
            beit3.vocab_size,
        )
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


def build_encoder(cfg: CfgNode) -> EarlyFusion | SeparateEncoders | BEiT3Encoder:
    """Build the encoder that MODEL.VIPA.ENCODER names.

    Raises:
        ValueError: for an unknown name.
    """
    name = cfg.MODEL.VIPA.ENCODER
    builders = {
        "early": _build_early,
        "one_way": _build_one_way,
        "late": _build_late,
        "none": _build_separate,
        "beit3": _build_beit3,
    }
    if name not in builders:
        raise ValueError(f"MODEL.VIPA.ENCODER is {name!r}, not one of {list(builders)}")
    return builders[name](cfg)


def _build_early(cfg: CfgNode) -> EarlyFusion:
    swin = backbone_class(cfg, RISSwin)
    vision = swin(**swin.from_config(cfg), out_features=())
    bert: dict[str, Any] = RISBert.from_config(cfg)
    first = bert["depth"] - _LATER_LAYERS
    if cfg.MODEL.VIPA.INIT_STAGES_FROM_BERT:
        context_dims = EarlyFusion.context_dims_of(vision, max(first, 0))
        return EarlyFusion(vision=vision, text=RISBert(**bert, context_dims=context_dims))
    stages = {key: bert[key] for key in ("dim", "num_heads", "dropout", "init")}
    return EarlyFusion(
        vision=vision,
        text=RISBert(**{**bert, "depth": first}),
        language_stages=BertStack(
            **stages, depth=_LATER_LAYERS, context_dims=EarlyFusion.context_dims_of(vision, 0)
        ),
    )


def _build_one_way(cfg: CfgNode) -> EarlyFusion:
    swin = backbone_class(cfg, RISSwin)
    return EarlyFusion(
        vision=swin(**swin.from_config(cfg), out_features=()),
        text=RISBert(cfg),
        language_reads=False,
    )


def _build_separate(cfg: CfgNode) -> SeparateEncoders:
    return SeparateEncoders(vision=backbone_class(cfg, RISSwin)(cfg), text=RISBert(cfg))


def _build_late(cfg: CfgNode) -> SeparateEncoders:
    vision, text = backbone_class(cfg, RISSwin)(cfg), RISBert(cfg)
    num_heads = cfg.MODEL.VIPA.NUM_HEADS
    fusion = LateFusion(vision_dim=vision.dims[-1], text_dim=text.dim, num_heads=num_heads)
    return SeparateEncoders(vision=vision, text=text, fusion=fusion)


def _build_beit3(cfg: CfgNode) -> BEiT3Encoder:
    return BEiT3Encoder(beit3=backbone_class(cfg, RISBEiT3)(cfg), norm=cfg.MODEL.VIPA.DECODER.NORM)
