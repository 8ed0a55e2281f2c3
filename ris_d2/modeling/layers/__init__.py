from .attention import MLP, MultiheadAttention, VisionFromWords
from .constants import Constants
from .existence import ExistenceHead
from .init import init_released, init_xavier
from .resize import mask_product, resize_maps

__all__ = [
    "MLP",
    "Constants",
    "ExistenceHead",
    "MultiheadAttention",
    "VisionFromWords",
    "init_released",
    "init_xavier",
    "mask_product",
    "resize_maps",
]
