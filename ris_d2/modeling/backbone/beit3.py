"""BEiT-3, the multiway transformer (Wang et al., "Image as a Foreign Language", CVPR 2023).

Vision tokens go through the A weights, text tokens through the B weights of every layer; only the
attention itself is joint. Parameter names are those of the released checkpoints without ``beit3.``.
"""

from collections import OrderedDict
from collections.abc import Iterable, Sequence

import torch
from detectron2.config import CfgNode, configurable
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, Backbone
from torch import Tensor, nn

from ..layers.attention import attend_by_heads, drop_path_scale
from ..layers.multiway import ModalityPair, Streams, join, split, visible_tokens
from ..layers.position import fit_positions
from ..layers.stem import build_stem, patch_grid
from ..options import arguments, check_choice

# Rows 0 and 1 of both position tables are never read (a heritage of fairseq's padding index).
FIRST_POSITION = 2


class Attention(nn.Module):
    """Joint self-attention with projections and sub-LayerNorm per modality."""

    def __init__(self, *, dim: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            setattr(self, name, ModalityPair(lambda: nn.Linear(dim, dim)))
        self.inner_attn_ln = ModalityPair(lambda: nn.LayerNorm(dim))

    def forward(self, streams: Streams, attn_mask: Tensor | None) -> Streams:
        """``attn_mask``: bool (B, 1, 1, k+T), True where a key may be attended; None: all."""
        projections = (self.q_proj, self.k_proj, self.v_proj)
        heads = [join(project(streams)) for project in projections]
        joint = attend_by_heads(*heads, self.num_heads, attn_mask)
        return self.out_proj(self.inner_attn_ln(split(joint, streams)))


def feed_forward(dim: int) -> nn.Sequential:
    """Linear, GELU, LayerNorm, Linear."""
    fc1, norm, fc2 = nn.Linear(dim, 4 * dim), nn.LayerNorm(4 * dim), nn.Linear(4 * dim, dim)
    return nn.Sequential(OrderedDict(fc1=fc1, gelu=nn.GELU(), ffn_layernorm=norm, fc2=fc2))


class EncoderLayer(nn.Module):
    """Pre-norm layer; the released names call the norm before the FFN ``final_layer_norm``."""

    def __init__(self, *, dim: int, num_heads: int, drop_path: float):
        super().__init__()
        self.drop_path = drop_path
        self.self_attn_layer_norm = ModalityPair(lambda: nn.LayerNorm(dim))
        self.self_attn = Attention(dim=dim, num_heads=num_heads)
        self.final_layer_norm = ModalityPair(lambda: nn.LayerNorm(dim))
        self.ffn = ModalityPair(lambda: feed_forward(dim))

    def forward(
        self, vision: Tensor | None, text: Tensor | None, attn_mask: Tensor | None
    ) -> Streams:
        streams = (vision, text)
        update = self.self_attn(self.self_attn_layer_norm(streams), attn_mask)
        streams = self._add(streams, update)
        return self._add(streams, self.ffn(self.final_layer_norm(streams)))

    def _add(self, streams: Streams, update: Streams) -> Streams:
        if self.training and self.drop_path > 0:  # a sample keeps or drops both modalities
            like = next(x for x in update if x is not None)
            scale = drop_path_scale(like.shape[0], self.drop_path, like)
            update = tuple(None if x is None else x * scale for x in update)
        return tuple(None if x is None else x + y for x, y in zip(streams, update, strict=True))


class Encoder(nn.Module):
    """Position tables, layers and the optional last LayerNorm."""

    def __init__(
        self, *, dim: int, num_rows: dict[str, int], drop_paths: Sequence[float], num_heads: int
    ):
        """
        Args:
            num_rows: of the position tables of vision, "A", and text, "B".
            drop_paths: per layer.
        """
        super().__init__()
        tables = {modality: nn.Embedding(rows, dim) for modality, rows in num_rows.items()}
        self.embed_positions = nn.ModuleDict(tables)
        self.layers = nn.ModuleList(
            EncoderLayer(dim=dim, num_heads=num_heads, drop_path=drop_path)
            for drop_path in drop_paths
        )
        self.layer_norm: ModalityPair | None = None

    def positions(self, modality: str, length: int) -> Tensor:
        """(length, dim): the rows that the first ``length`` tokens of a modality add."""
        table = self.embed_positions[modality].weight
        if FIRST_POSITION + length > len(table):
            raise ValueError(f"{length} tokens exceed {len(table)} positions of table {modality}")
        return table[FIRST_POSITION : FIRST_POSITION + length]


class VisionEmbedding(nn.Module):
    def __init__(self, *, dim: int, patch_size: int, stem: str):
        super().__init__()
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.proj = build_stem("MODEL.RIS.BEIT3.STEM", stem, dim=dim, patch_size=patch_size)

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, 1 + (H/p)(W/p), dim)"""
        patches = self.proj(images).flatten(2).transpose(1, 2)
        # Not in half precision under autocast: what layers add to it would be rounded each time.
        patches = patches.to(self.cls_token.dtype)
        return torch.cat([self.cls_token.expand(images.shape[0], -1, -1), patches], 1)


@BACKBONE_REGISTRY.register()
class RISBEiT3(Backbone):
    """BEiT-3 for joint, vision-only and text-only use.

    As a detectron2 backbone (``forward``) it sees images alone. Referring methods call
    ``embed_image`` once per image, ``embed_text`` and ``encode`` once per expression.
    """

    @configurable
    def __init__(
        self,
        *,
        image_size: tuple[int, int],
        patch_size: int = 16,
        stem: str = "patch",
        init: str = "released",
        embed_dim: int = 768,
        depth: int = 12,
        num_heads: int = 12,
        vocab_size: int = 64010,
        max_text_positions: int = 1024,
        drop_path: float = 0.0,
        final_norm: bool = True,
    ):
        """
        Args:
            image_size: (H, W), multiples of ``patch_size``; fixes the vision position table.
            init: of random weights: "released", or "scratch" where no pretrained ones follow.
            drop_path: probability in the last layer; it grows linearly from 0 in the first.
            final_norm: build ``encoder.layer_norm``. Methods that read the residual stream leave it
                out, since it would never receive a gradient.

        Raises:
            ValueError: the image size is no multiple of the patch size, or unknown stem or init.
        """
        super().__init__()
        self.grid = patch_grid(image_size, patch_size)
        self.image_size, self.patch_size = tuple(image_size), patch_size
        self.embed_dim, self.depth, self.vocab_size = embed_dim, depth, vocab_size
        self.text_embed = nn.Embedding(vocab_size, embed_dim)
        self.vision_embed = VisionEmbedding(dim=embed_dim, patch_size=patch_size, stem=stem)
        self.encoder = Encoder(
            dim=embed_dim,
            num_rows={
                "A": FIRST_POSITION + 1 + self.grid[0] * self.grid[1],
                "B": max_text_positions,
            },
            drop_paths=[drop_path * i / max(depth - 1, 1) for i in range(depth)],
            num_heads=num_heads,
        )
        if final_norm:
            self.encoder.layer_norm = ModalityPair(lambda: nn.LayerNorm(embed_dim))
        check_choice("MODEL.RIS.BEIT3.INIT", init, _INITS)
        self.apply(_INITS[init])
        nn.init.trunc_normal_(self.vision_embed.cls_token, std=0.02)

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: ShapeSpec | None = None) -> dict:
        return {"image_size": cfg.INPUT.RIS.SIZE, **arguments(cfg.MODEL.RIS.BEIT3)}

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Vision only: (B, 3, H, W) -> {"last": (B, d, H/p, W/p)}."""
        vision, _ = self.encode(self.embed_image(images), None, None)[self.depth]
        if self.encoder.layer_norm is not None:
            vision = self.encoder.layer_norm["A"](vision)
        return {"last": vision[:, 1:].transpose(1, 2).unflatten(2, self.grid)}

    def output_shape(self) -> dict[str, ShapeSpec]:
        return {"last": ShapeSpec(channels=self.embed_dim, stride=self.patch_size)}

    def embed_image(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) -> tokens (B, 1+n, d) with positions, [CLS] first (Shared-RIS Eq. 1).

        Raises:
            ValueError: if the images do not have the size that the position table was built for.
        """
        if tuple(images.shape[-2:]) != self.image_size:
            raise ValueError(f"images of {tuple(images.shape[-2:])}, built for {self.image_size}")
        tokens = self.vision_embed(images)
        return tokens + self.encoder.positions("A", tokens.shape[1])

    def embed_text(self, input_ids: Tensor, text_mask: Tensor) -> Tensor:
        """int64 (E, T), bool (E, T) -> tokens (E, T, d) with positions, zero where padded."""
        tokens = self.text_embed(input_ids) + self.encoder.positions("B", input_ids.shape[1])
        return tokens * text_mask[..., None]

    def encode(
        self,
        vision: Tensor | None,
        text: Tensor | None,
        text_mask: Tensor | None,
        *,
        taps: Sequence[int] = (),
    ) -> dict[int, Streams]:
        """Run the layers on vision tokens (B, k, d), text tokens (B, T, d), or both together.

        Args:
            text_mask: bool (B, T), True = real token; None if there is no text.
            taps: layers (1-based) whose outputs are wanted; the last layer always is.

        Returns:
            layer -> (vision, text) residual streams, before ``encoder.layer_norm``.
        """
        states, streams = {}, (vision, text)
        attn_mask = visible_tokens(streams, text_mask)
        if attn_mask is not None:
            attn_mask = attn_mask[:, None, None, :]
        for number, layer in enumerate(self.encoder.layers, 1):
            streams = layer(*streams, attn_mask)
            if number in taps or number == self.depth:
                states[number] = streams
        return states

    def layers_to_checkpoint(self) -> Iterable[nn.Module]:
        return self.encoder.layers

    def joint(self, image_tokens: Tensor, input_ids: Tensor, text_mask: Tensor) -> Streams:
        """Read images together with sentences; needs ``final_norm``.

        Args:
            image_tokens: (E, 1+n, d) of ``embed_image``.
            input_ids: int64 (E, T).
            text_mask: bool (E, T), True = real token.

        Returns:
            the normalised last states: vision (E, 1+n, d), [CLS] first, and text (E, T, d).
        """
        text = self.embed_text(input_ids, text_mask)
        return self.encoder.layer_norm(self.encode(image_tokens, text, text_mask)[self.depth])

    def freeze_unread_vision(self) -> None:
        """Stop the gradients of what only the vision states of ``joint`` depend on."""
        last = self.encoder.layers[-1]
        attention = last.self_attn
        for pair in (
            *(attention.q_proj, attention.inner_attn_ln, attention.out_proj),
            *(last.final_layer_norm, last.ffn, self.encoder.layer_norm),
        ):
            pair["A"].requires_grad_(False)

    def fit_state_dict(self, state_dict: dict[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
        """Resize the vision positions of a checkpoint to this model's grid (bicubic, as released).

        Returns:
            a new state dict, and the names of the tensors that changed size.
        """
        name = "encoder.embed_positions.A.weight"
        special = FIRST_POSITION + 1  # two unused rows and [CLS]
        return fit_positions(state_dict, name, self.grid, special=special, mode="bicubic")


def _init_released(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):  # cut at one standard deviation, as released
        nn.init.trunc_normal_(module.weight, std=0.02, a=-0.02, b=0.02)
        nn.init.zeros_(module.bias)
    elif isinstance(module, nn.Embedding):
        nn.init.trunc_normal_(module.weight, std=0.02)


def _init_scratch(module: nn.Module) -> None:
    """Wider, so that attention is not uniform at first, and words do not drown in it."""
    _init_released(module)
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
    elif isinstance(module, RISBEiT3):
        nn.init.normal_(module.text_embed.weight, std=0.5)


_INITS = {"released": _init_released, "scratch": _init_scratch}
