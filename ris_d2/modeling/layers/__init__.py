from .attention import MLP, MultiheadAttention
from .existence import ExistenceHead

__all__ = ["MLP", "ExistenceHead", "MultiheadAttention"]
