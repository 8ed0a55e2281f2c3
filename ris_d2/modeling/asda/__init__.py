from .asda import ASDA

__all__ = ["ASDA"]
