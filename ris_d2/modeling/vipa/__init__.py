from .vipa import VIPA

__all__ = ["VIPA"]
