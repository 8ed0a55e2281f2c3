from .beit3 import RISBEiT3
from .sam_vit import RISSAMViT
from .vit import RISViT

__all__ = ["RISBEiT3", "RISSAMViT", "RISViT"]
