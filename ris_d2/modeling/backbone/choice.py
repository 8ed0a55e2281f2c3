"""MODEL.BACKBONE.NAME for methods that are built on one kind of backbone."""

from collections.abc import Sequence
from typing import TypeVar

from detectron2.config import CfgNode
from detectron2.modeling import BACKBONE_REGISTRY, Backbone, build_backbone

__all__ = ["backbone_class", "build_pyramid_backbone"]

Kind = TypeVar("Kind", bound=Backbone)

# What a config names that says nothing: the method's own backbone.
STOCK_NAME = "build_resnet_backbone"


def backbone_class(cfg: CfgNode, kind: type[Kind]) -> type[Kind]:
    """The class that MODEL.BACKBONE.NAME names; detectron2's default name stands for ``kind``.

    Raises:
        ValueError: the name is unknown, or its class is not derived from ``kind``.
    """
    name = cfg.MODEL.BACKBONE.NAME
    if name == STOCK_NAME:
        return kind
    found = BACKBONE_REGISTRY.get(name) if name in BACKBONE_REGISTRY else None
    if not isinstance(found, type) or not issubclass(found, kind):
        raise ValueError(
            f"MODEL.BACKBONE.NAME is {name!r}; {cfg.MODEL.META_ARCHITECTURE} is built on "
            f"{kind.__name__}, or a registered class derived from it"
        )
    return found


def build_pyramid_backbone(
    cfg: CfgNode, levels: Sequence[str], kind: type[Backbone] | None = None
) -> Backbone:
    """Build any backbone that gives ``levels``.

    detectron2's default name stands for ``kind``, if that is given.

    Raises:
        ValueError: the name is unknown, or a level is missing.
    """
    name = cfg.MODEL.BACKBONE.NAME
    if kind is not None and name == STOCK_NAME:
        return kind(cfg)
    if name not in BACKBONE_REGISTRY:
        raise ValueError(f"MODEL.BACKBONE.NAME is {name!r}, which nobody has registered")
    backbone = build_backbone(cfg)
    missing = [level for level in levels if level not in backbone.output_shape()]
    if missing:
        raise ValueError(
            f"MODEL.BACKBONE.NAME is {name!r}, which gives {', '.join(backbone.output_shape())}; "
            f"{cfg.MODEL.META_ARCHITECTURE} needs {', '.join(levels)}"
        )
    return backbone
