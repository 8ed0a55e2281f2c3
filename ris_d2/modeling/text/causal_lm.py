"""A causal language model as text encoder, e.g. Qwen2 (DeRIS' remark on larger cognition)."""

from collections.abc import Iterable

from detectron2.config import CfgNode, configurable
from torch import Tensor, nn

from ..options import arguments
from .registry import TEXT_ENCODER_REGISTRY


@TEXT_ENCODER_REGISTRY.register()
class RISCausalLM(nn.Module):
    """Any causal language model of transformers, without its head.

    A word sees the words before it: the sentence's last token has read all of it. To keep the model
    as it is, name it in MODEL.RIS.FREEZE.
    """

    @configurable
    def __init__(self, *, path: str, pretrained: bool = True):
        """
        Args:
            path: folder with config.json and weights, or a name on the Hugging Face hub.
            pretrained: load the weights; False: random ones, only config.json is read.

        Raises:
            ValueError: no path.
            OSError: nothing of that kind at ``path``.
        """
        super().__init__()
        # Imported here: importing ris_d2 must not import transformers.
        from transformers import AutoConfig, AutoModel

        if not path:
            raise ValueError(
                "MODEL.RIS.TEXT.CAUSAL_LM.PATH is empty; it names a folder or a model on the hub"
            )
        if pretrained:
            self.model = AutoModel.from_pretrained(path)
        else:
            self.model = AutoModel.from_config(AutoConfig.from_pretrained(path))
        config = self.model.config
        self.dim, self.depth = config.hidden_size, config.num_hidden_layers
        self.vocab_size = config.vocab_size

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict:
        return arguments(cfg.MODEL.RIS.TEXT.CAUSAL_LM)

    def layers_to_checkpoint(self) -> Iterable[nn.Module]:
        return self.model.layers

    def forward(self, input_ids: Tensor, text_mask: Tensor) -> Tensor:
        """int64 (E, L), bool (E, L), True = real token -> (E, L, dim), normalised."""
        states = self.model(input_ids=input_ids, attention_mask=text_mask.long(), use_cache=False)
        return states.last_hidden_state
