"""Swin Transformer (Liu et al., ICCV 2021) as it was published for dense prediction.

Mask2Former, LAVT and DeRIS pad the map to whole windows, then shift it, in every second block and
whatever its size. timm and torchvision shift before they pad or not at all on small maps, which
changes every stage, and transformers applies stochastic depth to the attention but not to the MLP;
hence this file. Parameter names are those of the official checkpoints, except that the norms of the
outputs are ``norms.res2`` ... ``norms.res5``.
"""

import math
from collections import OrderedDict
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from detectron2.config import CfgNode, configurable
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, Backbone
from torch import Tensor, nn

from ..layers import Constants, init_released
from ..layers.attention import drop_path_scale
from ..options import arguments

Size = tuple[int, int]
Partition = tuple[Tensor, Tensor, Tensor | None]
PATCH_SIZE = 4
MLP_RATIO = 4
_FEATURES = ("res2", "res3", "res4", "res5")
# What the released models add to the logits of two tokens that only the cyclic shift made
# neighbours.
_MASKED = -100.0


def window_partition(size: Size, window: int, shift: int) -> Partition:
    """Where the tokens of an (h, w) map lie in padded, cyclically shifted windows of M x M.

    Returns:
        - int64 (n * M * M,): the token at each place of the n windows; h * w where there is
          padding.
        - int64 (h * w,): the place of each token.
        - (n, 1, M * M, M * M) logits of what may not meet in a window; None without shift.
    """
    height, width = size
    padded = [math.ceil(length / window) * window for length in size]

    def windows(grid: Tensor) -> Tensor:
        return grid.unflatten(1, (-1, window)).unflatten(0, (-1, window)).transpose(1, 2).flatten(2)

    tokens = torch.full(padded, height * width)
    tokens[:height, :width] = torch.arange(height * width).view(size)
    tokens = windows(tokens.roll((-shift, -shift), (0, 1))).flatten()
    places = tokens.argsort()[: height * width]
    if shift == 0:
        return tokens, places, None
    rows, columns = (
        (at >= length - window).int() + (at >= length - shift).int()
        for length in padded
        for at in [torch.arange(length)]
    )
    regions = windows(3 * rows[:, None] + columns).flatten(0, 1)
    mask = _MASKED * (regions[:, None, :] != regions[:, :, None]).float()
    return tokens, places, mask[:, None]


class WindowAttention(nn.Module):
    """(Shifted) window attention with relative position bias over a map of tokens."""

    def __init__(self, *, dim: int, num_heads: int, window_size: int, shift: int):
        super().__init__()
        self.num_heads, self.head_dim = num_heads, dim // num_heads
        self.window_size = window_size
        self.shift = shift
        self.relative_position_bias_table = nn.Parameter(
            torch.zeros((2 * window_size - 1) ** 2, num_heads)
        )
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)
        at = torch.stack(torch.meshgrid(*[torch.arange(window_size)] * 2, indexing="ij")).flatten(1)
        offset = at[:, :, None] - at[:, None, :] + window_size - 1
        index = offset[0] * (2 * window_size - 1) + offset[1]
        self.register_buffer("relative_position_index", index.flatten(), persistent=False)

    def forward(self, tokens: Tensor, partition: Partition) -> Tensor:
        """(B, h * w, dim), ``window_partition`` of map, window, shift -> (B, h * w, dim)"""
        batch, area = tokens.shape[0], self.window_size**2
        token_at, place_of, mask = partition
        # Padding is zero before the projection, so that its query, key and value are the bias:
        # projecting first spares the padded tokens (a quarter of 28 x 28 windows on a 24 x 24 map).
        qkv = self.qkv(tokens)
        if token_at.shape[0] > qkv.shape[1]:
            qkv = torch.cat([qkv, self.qkv.bias.to(qkv.dtype).expand(batch, 1, -1)], 1)
        qkv = qkv.index_select(1, token_at).view(batch, -1, area, 3, self.num_heads, self.head_dim)
        qkv = qkv.permute(3, 0, 1, 4, 2, 5)  # (3, B, n, heads, M * M, channels of a head)
        bias = self.relative_position_bias_table[self.relative_position_index]
        bias = bias.view(area, area, -1).permute(2, 0, 1)[None]
        if mask is None:
            qkv = qkv.flatten(1, 2)
        else:  # of each window another bias, but of each image the same
            qkv, bias = qkv.flatten(2, 3), (bias + mask).flatten(0, 1)[None]
        attended = F.scaled_dot_product_attention(*qkv, bias.to(qkv.dtype))
        attended = attended.view(batch, -1, self.num_heads, area, self.head_dim).transpose(2, 3)
        return self.proj(attended.reshape(batch, token_at.shape[0], -1).index_select(1, place_of))


class SwinBlock(nn.Module):
    """x + WindowAttention(LN(x)), then x + MLP(LN(x)), each with stochastic depth."""

    def __init__(self, *, dim: int, num_heads: int, window_size: int, shift: int, drop_path: float):
        super().__init__()
        self.drop_path = drop_path
        self.norm1 = nn.LayerNorm(dim)
        self.attn = WindowAttention(
            dim=dim, num_heads=num_heads, window_size=window_size, shift=shift
        )
        self.norm2 = nn.LayerNorm(dim)
        fc1, fc2 = nn.Linear(dim, MLP_RATIO * dim), nn.Linear(MLP_RATIO * dim, dim)
        self.mlp = nn.Sequential(OrderedDict(fc1=fc1, act=nn.GELU(), fc2=fc2))

    def forward(self, tokens: Tensor, partition: Partition) -> Tensor:
        tokens = tokens + self._drop(self.attn(self.norm1(tokens), partition))
        return tokens + self._drop(self.mlp(self.norm2(tokens)))

    def _drop(self, update: Tensor) -> Tensor:
        if not self.training or self.drop_path == 0:
            return update
        return update * drop_path_scale(update.shape[0], self.drop_path, update)


class PatchMerging(nn.Module):
    """Four neighbours become one token of twice the channels."""

    def __init__(self, *, dim: int):
        super().__init__()
        self.norm = nn.LayerNorm(4 * dim)
        self.reduction = nn.Linear(4 * dim, 2 * dim, bias=False)

    def forward(self, tokens: Tensor, size: Size) -> tuple[Tensor, Size]:
        height, width = size
        grid = F.pad(tokens.unflatten(1, size), (0, 0, 0, width % 2, 0, height % 2))
        quads = [grid[:, row::2, column::2] for column in (0, 1) for row in (0, 1)]
        merged = torch.cat(quads, -1)
        return self.reduction(self.norm(merged.flatten(1, 2))), tuple(merged.shape[1:3])


class SwinStage(nn.Module):
    """Blocks, every second one shifted, and what leads to the next stage."""

    def __init__(
        self, *, dim: int, num_heads: int, window_size: int, drop_paths: list[float], last: bool
    ):
        super().__init__()
        self.blocks = nn.ModuleList(
            SwinBlock(
                dim=dim,
                num_heads=num_heads,
                window_size=window_size,
                shift=window_size // 2 if number % 2 else 0,
                drop_path=drop_path,
            )
            for number, drop_path in enumerate(drop_paths)
        )
        if not last:
            self.downsample = PatchMerging(dim=dim)


class PatchEmbedding(nn.Module):
    """Non-overlapping 4 x 4 patches; the image is padded with zeros to whole patches."""

    def __init__(self, *, dim: int):
        super().__init__()
        self.proj = nn.Conv2d(3, dim, PATCH_SIZE, PATCH_SIZE)
        self.norm = nn.LayerNorm(dim)

    def forward(self, images: Tensor) -> tuple[Tensor, Size]:
        height, width = images.shape[-2:]
        patches = self.proj(F.pad(images, (0, -width % PATCH_SIZE, 0, -height % PATCH_SIZE)))
        return self.norm(patches.flatten(2).transpose(1, 2)), tuple(patches.shape[-2:])


@BACKBONE_REGISTRY.register()
class RISSwin(Backbone):
    """Swin-T/S/B/L for images of any size.

    ``forward`` runs everything; ``embed``, ``run_stage`` and ``downsample`` run it piece by piece
    for methods whose sentence enters between the stages.
    """

    @configurable
    def __init__(
        self,
        *,
        embed_dim: int,
        depths: Sequence[int],
        num_heads: Sequence[int],
        window_size: int,
        drop_path: float = 0.0,
        out_features: Sequence[str] = _FEATURES,
    ):
        """
        Args:
            embed_dim: C, channels of the first stage; each stage has twice those of the one before.
            depths: blocks per stage.
            num_heads: per stage.
            window_size: M, in tokens.
            drop_path: of the last block; grows linearly from 0 in the first.
            out_features: what ``forward`` returns, of "res2" ... "res5" (stage 0 ... 3); each has
                its own LayerNorm, and the others have none.

        Raises:
            ValueError: unless there are four depths and heads, channels divide by the heads, and
                ``out_features`` are known.
        """
        super().__init__()
        if not len(depths) == len(num_heads) == len(_FEATURES):
            raise ValueError(
                f"MODEL.RIS.SWIN.DEPTHS {tuple(depths)} and NUM_HEADS {tuple(num_heads)} must have "
                f"{len(_FEATURES)} entries each"
            )
        unknown = set(out_features) - set(_FEATURES)
        if unknown:
            raise ValueError(f"out_features {sorted(unknown)} are not among {_FEATURES}")
        self.dims = tuple(embed_dim * 2**stage for stage in range(len(_FEATURES)))
        for dim, heads in zip(self.dims, num_heads, strict=True):
            if dim % heads:
                raise ValueError(f"MODEL.RIS.SWIN: {dim} channels do not divide by {heads} heads")
        self.patch_embed = PatchEmbedding(dim=embed_dim)
        rates = torch.linspace(0, drop_path, sum(depths), device="cpu").split(list(depths))
        stages = zip(self.dims, num_heads, rates, strict=True)
        self.layers = nn.ModuleList(
            SwinStage(
                dim=dim,
                num_heads=heads,
                window_size=window_size,
                drop_paths=own.tolist(),
                last=dim == self.dims[-1],
            )
            for dim, heads, own in stages
        )
        dims = zip(_FEATURES, self.dims, strict=True)
        self.norms = nn.ModuleDict({x: nn.LayerNorm(dim) for x, dim in dims if x in out_features})
        self.partitions = Constants(window_partition, max_kept=64)
        self.apply(_init_weights)

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: ShapeSpec | None = None) -> dict:
        return arguments(cfg.MODEL.RIS.SWIN)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """(B, 3, H, W) -> {"res2": (B, C, H/4, W/4), ..., "res5": (B, 8C, H/32, W/32)}."""
        outputs = {}
        tokens, size = self.embed(images)
        for stage, name in enumerate(_FEATURES):
            tokens = self.run_stage(stage, tokens, size)
            if name in self.norms:
                outputs[name] = self.norms[name](tokens).transpose(1, 2).unflatten(2, size)
            if stage + 1 < len(_FEATURES):
                tokens, size = self.downsample(stage, tokens, size)
        return outputs

    def output_shape(self) -> dict[str, ShapeSpec]:
        return {
            name: ShapeSpec(channels=dim, stride=PATCH_SIZE * 2**stage)
            for stage, (name, dim) in enumerate(zip(_FEATURES, self.dims, strict=True))
            if name in self.norms
        }

    def embed(self, images: Tensor) -> tuple[Tensor, Size]:
        """(B, 3, H, W) -> tokens (B, h * w, C) of the first stage, row by row, and (h, w)."""
        return self.patch_embed(images)

    def run_stage(self, stage: int, tokens: Tensor, size: Size) -> Tensor:
        """Run the blocks of a stage (0-based): (B, h * w, 2^stage C), (h, w) -> the same shape."""
        for block in self.layers[stage].blocks:
            partition = self.partitions(
                tuple(size), block.attn.window_size, block.attn.shift, device=tokens.device
            )
            tokens = block(tokens, partition)
        return tokens

    def layers_to_checkpoint(self) -> list[nn.Module]:
        return [block for stage in self.layers for block in stage.blocks]

    def downsample(self, stage: int, tokens: Tensor, size: Size) -> tuple[Tensor, Size]:
        """Go from a stage's output to the next one's input: half the size, twice the channels."""
        return self.layers[stage].downsample(tokens, size)

    def fit_state_dict(self, state_dict: dict[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
        """Resize position biases of another window size (bicubic, as Swin's authors do).

        Returns:
            a new state dict, and the names of the tensors that changed size.
        """
        fitted, resized = dict(state_dict), []
        own = self.state_dict()
        for name, table in state_dict.items():
            if not name.endswith("relative_position_bias_table") or name not in own:
                continue
            side, wanted = math.isqrt(len(table)), math.isqrt(len(own[name]))
            if side == wanted or side**2 != len(table):
                continue
            grid = table.float().T.reshape(1, -1, side, side)
            grid = F.interpolate(grid, size=(wanted, wanted), mode="bicubic", align_corners=False)
            fitted[name] = grid[0].flatten(1).T.to(table.dtype)
            resized.append(name)
        return fitted, resized


def _init_weights(module: nn.Module) -> None:
    init_released(module)
    if isinstance(module, WindowAttention):
        nn.init.trunc_normal_(module.relative_position_bias_table, std=0.02)
