from .beit3 import RISBEiT3
from .choice import backbone_class, build_pyramid_backbone
from .clip_vit import RISCLIPViT
from .sam_vit import RISSAMViT
from .swin import RISSwin
from .vit import RISViT

__all__ = [
    "RISBEiT3",
    "RISCLIPViT",
    "RISSAMViT",
    "RISSwin",
    "RISViT",
    "backbone_class",
    "build_pyramid_backbone",
]
