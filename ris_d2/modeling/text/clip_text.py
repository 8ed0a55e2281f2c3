"""CLIP's text transformer (Radford et al., ICML 2021), on transformers' ``CLIPTextModel``."""

from collections.abc import Iterable
from typing import Any

from detectron2.config import CfgNode, configurable
from torch import Tensor, nn

from ..layers import init_xavier
from ..options import arguments, check_choice
from .registry import TEXT_ENCODER_REGISTRY


@TEXT_ENCODER_REGISTRY.register()
class RISCLIPText(nn.Module):
    """Words to hidden states, without the projection to CLIP's joint space.

    Attention is causal, so that padding (at the end) changes no real token and no mask is needed.

    Attributes:
        dim: channels of the hidden states.
        depth: number of layers.
        vocab_size: rows of the token embedding.
    """

    @configurable
    def __init__(
        self,
        *,
        dim: int = 512,
        depth: int = 12,
        num_heads: int = 8,
        vocab_size: int = 49408,
        num_positions: int = 77,
        init: str = "released",
    ):
        """The defaults are the text transformer of CLIP ViT-B/16.

        Args:
            num_positions: rows of the position table, the longest sentence in tokens. A
                checkpoint's longer table is cut, a shorter one refused.
            init: of random weights: "released", or "scratch" where no pretrained ones follow.

        Raises:
            ValueError: for an unknown init.
        """
        super().__init__()
        from transformers import CLIPTextConfig, CLIPTextModel

        check_choice("MODEL.RIS.TEXT.CLIP.INIT", init, ("released", "scratch"))
        self.dim, self.depth, self.vocab_size = dim, depth, vocab_size
        self.num_positions = num_positions
        model = CLIPTextModel(
            CLIPTextConfig(
                vocab_size=vocab_size,
                hidden_size=dim,
                intermediate_size=4 * dim,
                num_hidden_layers=depth,
                num_attention_heads=num_heads,
                max_position_embeddings=num_positions,
                bos_token_id=vocab_size - 2,  # as CLIP's; transformers warns of ids beyond a table
                eos_token_id=vocab_size - 1,
            )
        )
        # transformers 4 has one more level than 5.
        self.transformer = getattr(model, "text_model", model)
        if init == "scratch":
            self.apply(_init_scratch)

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        return {"num_positions": cfg.INPUT.RIS.MAX_TOKENS, **arguments(cfg.MODEL.RIS.TEXT.CLIP)}

    def forward(self, input_ids: Tensor, text_mask: Tensor) -> Tensor:
        """int64 (E, L), bool (E, L) -> (E, L, dim): the last hidden states, normalised."""
        return self.forward_layers(input_ids, text_mask)[-1]

    def forward_layers(self, input_ids: Tensor, text_mask: Tensor) -> list[Tensor]:
        """Run all layers.

        Args:
            input_ids: int64 (E, L), L at most ``num_positions``.
            text_mask: bool (E, L); every text encoder is given it, causal attention needs none.

        Returns:
            depth + 1 tensors (E, L, dim): the residual stream after each layer, then the last one
            normalised.
        """
        outputs = self.transformer(input_ids=input_ids, output_hidden_states=True)
        return [*outputs.hidden_states[1 : self.depth + 1], outputs.last_hidden_state]

    def layers_to_checkpoint(self) -> Iterable[nn.Module]:
        return self.transformer.encoder.layers

    def fit_state_dict(self, state_dict: dict[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
        """Cut a checkpoint's position table to the length of this one.

        Returns:
            a new state dict, and the names of the tensors that changed size.

        Raises:
            ValueError: the table is shorter; the missing positions were never learned.
        """
        name = "transformer.embeddings.position_embedding.weight"
        table = state_dict.get(name)
        if table is None or len(table) == self.num_positions:
            return state_dict, []
        if len(table) < self.num_positions:
            raise ValueError(
                f"the weights know sentences of {len(table)} tokens, this model reads "
                f"{self.num_positions}; set INPUT.RIS.MAX_TOKENS to {len(table)}, or start from "
                "CLIP's own 77"
            )
        return {**state_dict, name: table[: self.num_positions]}, [name]


def _init_scratch(module: nn.Module) -> None:
    """Xavier; with CLIP's 0.02 words would be small against what the first layer adds to them."""
    init_xavier(module)
    if isinstance(module, nn.Embedding):
        nn.init.normal_(module.weight, std=0.5)
