"""How an image meets the model's input: squash, letterbox, longest side; affine augmentation."""

import math
from typing import NamedTuple

import cv2
import numpy as np

GEOMETRIES = ("squash", "letterbox", "longest_side")
INTERPOLATIONS = ("bilinear", "bicubic", "area")


class Placement(NamedTuple):
    """An image resized to ``height`` x ``width`` with its corner at (left, top) of a canvas."""

    height: int
    width: int
    top: int
    left: int
    canvas_height: int
    canvas_width: int

    @property
    def content_box(self) -> tuple[float, float, float, float]:
        """(x0, y0, x1, y1) of the image in the canvas, in pixels, x1 and y1 exclusive."""
        box = self.left, self.top, self.left + self.width, self.top + self.height
        return tuple(float(edge) for edge in box)

    @property
    def inside(self) -> tuple[slice, slice]:
        """The rows and columns of the canvas that the image takes."""
        rows = slice(self.top, self.top + self.height)
        return rows, slice(self.left, self.left + self.width)

    @property
    def fills_canvas(self) -> bool:
        return (self.height, self.width) == (self.canvas_height, self.canvas_width)


def place(height: int, width: int, size: tuple[int, int], geometry: str) -> Placement:
    """Fit an image of ``height`` x ``width`` to ``size`` = (height, width) of the model's input.

    - squash: fills it, the aspect ratio is not kept.
    - letterbox: aspect kept, centred; an odd rest goes below and to the right (ASDA's public code).
    - longest_side: aspect kept, the longest side becomes max(size), no border (SAM).
    """
    if geometry == "squash":
        return Placement(*size, 0, 0, *size)
    if geometry == "letterbox":
        ratio = min(size[0] / height, size[1] / width)
        inner_height, inner_width = max(round(height * ratio), 1), max(round(width * ratio), 1)
        top, left = (size[0] - inner_height) // 2, (size[1] - inner_width) // 2
        return Placement(inner_height, inner_width, top, left, *size)
    if geometry == "longest_side":
        ratio = max(size) / max(height, width)
        inner = max(int(height * ratio + 0.5), 1), max(int(width * ratio + 0.5), 1)
        return Placement(*inner, 0, 0, *inner)
    raise ValueError(f"INPUT.RIS.GEOMETRY is one of {', '.join(GEOMETRIES)}, not {geometry!r}")


def resize_image(image: np.ndarray, height: int, width: int, interpolation: str) -> np.ndarray:
    """uint8 (h,w,3) -> (height,width,3) by cv2 (no antialiasing except by "area")."""
    if image.shape[:2] == (height, width):
        return image
    if interpolation == "bicubic":
        flag = cv2.INTER_CUBIC
    elif interpolation == "area" and height <= image.shape[0] and width <= image.shape[1]:
        flag = cv2.INTER_AREA
    else:
        flag = cv2.INTER_LINEAR
    return cv2.resize(image, (width, height), interpolation=flag)


def random_affine(
    rng: np.random.Generator,
    height: int,
    width: int,
    *,
    rotation: float,
    scale: float,
    translation: float,
    shear: float,
) -> np.ndarray:
    """Draw shear x translation x (rotation and scale about the centre), as ASDA's public code.

    Args:
        rotation, shear: degrees, drawn from U(-r, r), shear for each axis.
        scale: factor from U(1 - s, 1 + s).
        translation: U(-t, t) of the height and the width.

    Returns:
        float64 (2,3), maps input pixels (x, y, 1) to output pixels.
    """
    rotated = np.eye(3)
    rotated[:2] = cv2.getRotationMatrix2D(
        (width / 2, height / 2), rng.uniform(-rotation, rotation), rng.uniform(1 - scale, 1 + scale)
    )
    shifted = np.eye(3)
    shifted[:2, 2] = rng.uniform(-translation, translation, 2) * (width, height)
    sheared = np.eye(3)
    sheared[[0, 1], [1, 0]] = [math.tan(math.radians(a)) for a in rng.uniform(-shear, shear, 2)]
    return (sheared @ shifted @ rotated)[:2]
