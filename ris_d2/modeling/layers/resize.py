"""Masks from maps: products with a vector, and resizing in training and in inference."""

import torch
import torch.nn.functional as F
from torch import Tensor


def resize_maps(maps: Tensor, size: tuple[int, int], mode: str = "bilinear") -> Tensor:
    """Resize maps so that the centres of pixels stay where they are in the image.

    A target that was shrunk by one rule and a prediction that is enlarged by another teach the
    model to shift its masks, by up to half a cell. "bilinear" (align_corners False) and "area" fit
    each other; "nearest" takes the upper left pixel of a cell and does not fit, but is what some
    published code trains with.

    Args:
        maps: (..., h, w), bool or floating point, with one or more leading dimensions.
        size: (height, width).
        mode: "bilinear" to enlarge, "area" to shrink (the share of each cell that is covered),
            "nearest", "nearest-exact".

    Returns:
        (..., height, width); float32 where ``maps`` is bool.
    """
    maps = maps if maps.is_floating_point() else maps.float()
    if tuple(maps.shape[-2:]) == tuple(size):
        return maps
    align = {"align_corners": False} if mode == "bilinear" else {}
    flat = maps.reshape(1, -1, *maps.shape[-2:])
    resized = F.interpolate(flat, size=tuple(size), mode=mode, **align)
    return resized.view(*maps.shape[:-2], *size)


def mask_product(maps: Tensor, vectors: Tensor) -> Tensor:
    """Mask logits (E, h, w) of maps (E, C, h, w) and vectors (E, C), in fp32 under autocast, too.

    A sum of C products in half precision would move the mask's edge.
    """
    with torch.autocast(maps.device.type, enabled=False):
        dtype = torch.promote_types(maps.dtype, torch.float32)
        return torch.einsum("echw,ec->ehw", maps.to(dtype), vectors.to(dtype))
