"""From mask logits to the masks of a result, and who says "nothing"."""

from collections.abc import Sequence

from torch import Tensor

from .layers import resize_maps

MASK_ORDERS = ("probabilities", "logits", "binary")
NO_TARGET_RULES = ("none", "area", "head")


def restore_masks(
    logits: Tensor,
    *,
    input_size: tuple[int, int],
    content_box: Sequence[float],
    output_size: tuple[int, int],
    order: str,
    threshold: float | None,
) -> Tensor:
    """Masks of one image at the requested size.

    Args:
        logits: float (E, h, w), over the whole model input.
        input_size: (height, width) of the model input.
        content_box: (x0, y0, x1, y1) in pixels of the model input, where the image lies in it.
        output_size: (height, width).
        order: what is resized: "probabilities", "logits" or "binary" masks, see
            MODEL.RIS.MASK_ORDER.
        threshold: a pixel is foreground if its probability exceeds this. None: the probabilities
            are wanted, also where ``order`` is "binary".

    Returns:
        bool (E, *output_size), or float probabilities.
    """
    order = "probabilities" if threshold is None and order == "binary" else order
    maps = logits if order == "logits" else logits.sigmoid()
    mode = "bilinear"
    if order == "binary":
        maps, mode = (maps > threshold).float(), "nearest"
    x0, y0, x1, y1 = (round(v) for v in content_box)
    if (x0, y0, x1, y1) != (0, 0, input_size[1], input_size[0]):
        maps = resize_maps(maps, input_size, mode)[..., y0:y1, x0:x1]
    maps = resize_maps(maps, output_size, mode)
    if order == "binary":
        return maps > 0.5
    maps = maps.sigmoid() if order == "logits" else maps
    return maps if threshold is None else maps > threshold


def says_nothing(masks: Tensor, absent: Tensor | None, *, rule: str, min_area: int) -> Tensor:
    """Whether the results say that nothing is referred to.

    Args:
        masks: bool (E, height, width).
        absent: bool (E,), the method's own decision; None if it has none.
        rule: "none", "area" or "head", see MODEL.RIS.NO_TARGET.
        min_area: pixels; with "area", masks with fewer say nothing.

    Returns:
        bool (E,)
    """
    if rule == "area":
        return masks.flatten(1).sum(1) < min_area
    if rule == "none" or absent is None:
        return masks.new_zeros(len(masks))
    return absent
