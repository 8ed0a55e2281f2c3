"""SAM's own mask decoder in the place of RISAM's (Table 2 #3, Table 11), on transformers' SAM."""

import math

import torch
from torch import Tensor, nn

from .mutual_aware_attention import MutualFeatures


class SAMMaskDecoder(nn.Module):
    """The words are sparse prompts. Of SAM's outputs only the single mask is read."""

    def __init__(self, *, dim: int, num_heads: int, mlp_dim: int = 2048):
        """SAM's has ``dim`` 256 and 8 heads. What nothing would train (the MLPs of three more masks, and
        the head for their quality) is frozen."""
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
        # transformers has no argument for prompts that are padding: every attention whose keys are the
        # tokens is told here which of them are words.
        self._keep: Tensor | None = None
        for layer in self.mask_decoder.transformer.layers:
            for attention in (layer.self_attn, layer.cross_attn_image_to_token):
                attention.register_forward_pre_hook(self._mask_pads, with_kwargs=True)
        # Fixed parts of SAM's prompt encoder: random Fourier features of positions, and what stands for
        # "no mask is given".
        self.register_buffer("position_frequencies", torch.randn(2, dim // 2))
        self.register_buffer("no_mask", torch.zeros(1, dim))

    def forward(
        self, features: MutualFeatures, text_mask: Tensor, grid: tuple[int, int]
    ) -> tuple[Tensor, None]:
        """As MutualAwareMaskDecoder, but with nothing for an existence head to read."""
        image = features.regions.transpose(1, 2).unflatten(2, grid)
        own_tokens = text_mask.new_ones(len(text_mask), 1 + self.mask_decoder.num_mask_tokens)
        self._keep = torch.cat([own_tokens, text_mask], 1)[:, None, None]
        masks, _ = self.mask_decoder(
            image_embeddings=image,
            image_positional_embeddings=self._positions(grid).expand(len(image), -1, -1, -1),
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
