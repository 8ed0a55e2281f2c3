"""ris_d2: referring image segmentation for detectron2."""

from . import _dependencies  # noqa: F401  isort: skip (first: explains a missing detectron2 or cv2)

from . import modeling  # noqa: F401  (registers backbones and meta-architectures)
from .config import add_ris_config, get_ris_cfg, load_config
from .data.catalog import register_all

__all__ = ["add_ris_config", "get_ris_cfg", "load_config"]

register_all()
