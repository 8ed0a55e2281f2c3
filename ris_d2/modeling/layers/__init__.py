from .attention import MLP, MultiheadAttention
from .existence import ExistenceHead
from .init import init_xavier
from .norm import instance_norm

__all__ = ["MLP", "ExistenceHead", "MultiheadAttention", "init_xavier", "instance_norm"]
