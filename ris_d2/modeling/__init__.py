"""Models: importing this package registers backbones and meta-architectures with detectron2."""

from . import asda, backbone, deris, risam, shared_ris, vipa  # noqa: F401  (registration)
from .segmenter import ReferringSegmenter

__all__ = ["ReferringSegmenter"]
