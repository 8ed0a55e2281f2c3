"""ris_d2: referring image segmentation for detectron2."""

from .config import add_ris_config, get_ris_cfg

__all__ = ["add_ris_config", "get_ris_cfg"]
