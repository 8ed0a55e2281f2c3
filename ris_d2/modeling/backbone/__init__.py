from .beit3 import RISBEiT3

__all__ = ["RISBEiT3"]
