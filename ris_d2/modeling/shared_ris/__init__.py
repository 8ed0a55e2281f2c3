from .shared_ris import SharedRIS

__all__ = ["SharedRIS"]
