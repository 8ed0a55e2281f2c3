"""The registry of text encoders; see the package's docstring for what they have in common."""

from detectron2.config import CfgNode
from detectron2.utils.registry import Registry
from torch import nn

from ..options import check_choice

TEXT_ENCODER_REGISTRY = Registry("TEXT_ENCODER")
TEXT_ENCODER_REGISTRY.__doc__ = (
    "Text encoders: called with the config, see this package's docstring."
)


def build_text_encoder(cfg: CfgNode) -> nn.Module:
    """Build the text encoder that MODEL.RIS.TEXT.NAME names.

    Raises:
        ValueError: for a name that is not registered.
    """
    name = cfg.MODEL.RIS.TEXT.NAME
    check_choice("MODEL.RIS.TEXT.NAME", name, sorted(key for key, _ in TEXT_ENCODER_REGISTRY))
    return TEXT_ENCODER_REGISTRY.get(name)(cfg)
