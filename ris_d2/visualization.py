"""Pictures for people: mask overlays.

All images are RGB uint8 numpy arrays (H,W,3). Blue marks ground truth and orange marks predictions
(the pair of the Okabe-Ito palette that stays apart for every kind of colour blindness); a contour
line says the same as the fill, so that nothing hangs on colour alone.
"""

import os

import cv2
import numpy as np
from PIL import Image

from .io import atomic_write

TARGET_COLOR = (0, 114, 178)
PREDICTION_COLOR = (230, 110, 0)


def overlay(
    image: np.ndarray,
    mask: np.ndarray,
    *,
    color: tuple[int, int, int] = PREDICTION_COLOR,
    alpha: float = 0.45,
    width: int | None = None,
) -> np.ndarray:
    """Paint ``mask`` over ``image``: translucent fill, opaque contour with a white rim.

    Args:
        image: RGB uint8 (H,W,3); it is not changed.
        mask: bool or 0/1 (H,W). An empty mask returns a copy of the image.
        color: RGB of fill and contour.
        alpha: opacity of the fill, 0 (contour only) to 1.
        width: of the contour, in pixels; default: a 200th of the shorter side, at least 2.

    Returns:
        RGB uint8 (H,W,3).

    Raises:
        ValueError: ``image`` is no RGB uint8 array, or ``mask`` does not fit it.
    """
    image, mask = np.asarray(image), np.asarray(mask).astype(bool)
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        raise ValueError(f"image must be uint8 (H,W,3), it is {image.dtype} {image.shape}")
    if mask.shape != image.shape[:2]:
        raise ValueError(f"mask {mask.shape} does not fit the image {image.shape[:2]}")
    painted = image.copy()
    painted[mask] = np.rint((1 - alpha) * image[mask] + alpha * np.array(color)).astype(np.uint8)
    contours, _ = cv2.findContours(mask.astype(np.uint8), cv2.RETR_CCOMP, cv2.CHAIN_APPROX_NONE)
    width = width or max(2, round(min(mask.shape) / 200))
    cv2.drawContours(painted, contours, -1, (255, 255, 255), width + 2, cv2.LINE_AA)
    cv2.drawContours(painted, contours, -1, tuple(color), width, cv2.LINE_AA)
    return painted


def write_png(path: str | os.PathLike, image: np.ndarray) -> None:
    """Write an RGB uint8 (H,W,3) image or a bool (H,W) mask (0 and 255) as PNG, atomically."""
    picture = Image.fromarray(image.astype(np.uint8) * 255 if image.dtype == bool else image)
    with atomic_write(path, mode="wb") as file:
        picture.save(file, format="PNG")
