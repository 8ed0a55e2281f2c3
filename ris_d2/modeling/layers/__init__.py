from .attention import MLP, MultiheadAttention
from .constants import Constants
from .existence import ExistenceHead
from .init import init_xavier
from .norm import instance_norm
from .resize import mask_product, resize_maps

__all__ = [
    "MLP",
    "Constants",
    "ExistenceHead",
    "MultiheadAttention",
    "init_xavier",
    "instance_norm",
    "mask_product",
    "resize_maps",
]
