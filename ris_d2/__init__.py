"""ris_d2: referring image segmentation for detectron2."""

from typing import TYPE_CHECKING, Any

from . import _dependencies  # noqa: F401  isort: skip (first: explains a missing detectron2 or cv2)

from . import modeling  # noqa: F401  (registers backbones and meta-architectures)
from .config import add_ris_config, get_ris_cfg, load_config
from .data.catalog import register_all

if TYPE_CHECKING:
    from .predictor import Predictor as Predictor

__all__ = ["Predictor", "add_ris_config", "get_ris_cfg", "load_config"]

register_all()


def __getattr__(name: str) -> Any:
    if name != "Predictor":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    # On first use: importing ris_d2 loads no more than it must.
    from .predictor import Predictor

    return Predictor
