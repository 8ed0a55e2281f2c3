"""From the original image to the model's input: Augmentations and Transforms of detectron2's kind.

What is random here takes its numbers from ``rng``, the random numbers of the draw, so that training
resumes exactly; detectron2's own augmentations may stand in the list too, but draw from numpy's
global generator.
"""

import math
from dataclasses import dataclass
from functools import partial

import cv2
import numpy as np
from detectron2.config import CfgNode
from detectron2.data import transforms as T

from ..masks import SAMPLES, resize_nearest

GEOMETRIES = ("squash", "letterbox", "longest_side")
INTERPOLATIONS = ("bilinear", "bicubic", "area")


def build_augmentations(cfg: CfgNode, is_train: bool) -> list[T.Augmentation]:
    """The augmentations of INPUT.RIS, in order; in evaluation, placing alone.

    Raises:
        ValueError: an unknown name, a size or range that makes no sense, affine augmentation with
            views or another geometry than the letterbox.
    """
    ris, affine = cfg.INPUT.RIS, cfg.INPUT.RIS.AFFINE
    place = Place(
        ris.SIZE, ris.GEOMETRY, ris.INTERPOLATION, ris.MASK_SAMPLE, color=ris.LETTERBOX_COLOR
    )
    if affine.ENABLED and (ris.GEOMETRY != "letterbox" or ris.VIEWS):
        raise ValueError("INPUT.RIS.AFFINE needs GEOMETRY letterbox, and no VIEWS")
    # What is off draws no random numbers. The flip always draws: old runs resume exactly.
    augmentations = [RandomFlip(ris.FLIP_PROB)]
    if ris.BRIGHTNESS or ris.SATURATION:
        augmentations.append(RandomHSV(ris.BRIGHTNESS, ris.SATURATION))
    augmentations.append(place)
    if affine.ENABLED:
        ranges = affine.ROTATION, affine.SCALE, affine.TRANSLATION, affine.SHEAR
        augmentations.append(RandomAffine(*ranges, color=place.color))
    return augmentations if is_train else [place]


def build_views(cfg: CfgNode) -> dict[str, T.Augmentation]:
    """INPUT.RIS.VIEWS: name -> how the original image is squashed to this view."""
    interpolation = cfg.INPUT.RIS.INTERPOLATION
    return {name: Place(size, interpolation=interpolation) for name, *size in cfg.INPUT.RIS.VIEWS}


@dataclass
class Place(T.Augmentation):
    """How the image meets the model's input.

    - squash: fills it, the aspect ratio is not kept.
    - letterbox: aspect kept, centred; an odd rest goes below and to the right (ASDA's public code).
    - longest_side: aspect kept, the longest side becomes max(size), no border (SAM).

    Args:
        size: (height, width) of the model's input.
        geometry: one of these.
        interpolation: "bilinear", "bicubic" or "area" (shrinking only, bilinear otherwise).
        mask_sample: "center" or "corner", see :func:`ris_d2.masks.resize_nearest`.
        color: RGB of the border of a letterbox.

    Raises:
        ValueError: an unknown name, or a size that makes no sense.
    """

    size: tuple[int, int]
    geometry: str = "squash"
    interpolation: str = "bilinear"
    mask_sample: str = "center"
    color: tuple[float, float, float] = (123.7, 116.3, 103.5)

    def __post_init__(self) -> None:
        self.size = tuple(self.size)
        self.color = tuple(int(round(c)) for c in self.color)  # as cv2 rounds border colours
        if len(self.size) != 2 or min(self.size) < 1:
            raise ValueError(
                f"INPUT.RIS.SIZE, and that of VIEWS, is (height, width) in pixels, not {self.size}"
            )
        for key, choices in (
            ("GEOMETRY", GEOMETRIES), ("INTERPOLATION", INTERPOLATIONS), ("MASK_SAMPLE", SAMPLES)
        ):  # fmt: skip
            value = getattr(self, key.lower())
            if value not in choices:
                raise ValueError(f"INPUT.RIS.{key} is one of {', '.join(choices)}, not {value!r}")

    def get_transform(self, image: np.ndarray) -> "Placement":
        original, size, canvas, corner = image.shape[:2], self.size, self.size, (0, 0)
        if self.geometry == "letterbox":
            ratio = min(canvas[0] / original[0], canvas[1] / original[1])
            size = tuple(max(round(side * ratio), 1) for side in original)
            corner = (canvas[0] - size[0]) // 2, (canvas[1] - size[1]) // 2
        elif self.geometry == "longest_side":
            ratio = max(size) / max(original)
            size = canvas = tuple(max(int(side * ratio + 0.5), 1) for side in original)
        return Placement(original, size, canvas, corner, self)


@dataclass(frozen=True)
class Placement(T.Transform):
    """An image resized to ``size`` with its upper left corner at ``corner`` of a canvas.

    The inverse takes what lies on the canvas, an image or a mask, back to the original image.

    Args:
        original, size, canvas: (height, width) in pixels.
        corner: (top, left).
        settings: how to resize, and the colour of the rest of the canvas.
    """

    original: tuple[int, int]
    size: tuple[int, int]
    canvas: tuple[int, int]
    corner: tuple[int, int]
    settings: Place

    @property
    def content_box(self) -> tuple[float, float, float, float]:
        """(x0, y0, x1, y1) of the image in the canvas, in pixels, x1 and y1 exclusive."""
        (top, left), (height, width) = self.corner, self.size
        return float(left), float(top), float(left + width), float(top + height)

    def apply_image(self, img: np.ndarray) -> np.ndarray:
        resized = resize_image(img, *self.size, self.settings.interpolation)
        return self._put(resized, self.settings.color)

    def apply_segmentation(self, segmentation: np.ndarray) -> np.ndarray:
        resized = resize_nearest(segmentation, *self.size, sample=self.settings.mask_sample)
        return self._put(resized, 0)

    def apply_coords(self, coords: np.ndarray) -> np.ndarray:
        scale = np.divide(self.size, self.original)
        return coords * scale[::-1] + self.corner[::-1]

    def inverse(self) -> T.TransformList:
        crop = T.CropTransform(*self.corner[::-1], *self.size[::-1])
        back = Placement(self.size, self.original, self.original, (0, 0), self.settings)
        return T.TransformList([crop, back])

    def _put(self, resized: np.ndarray, fill: int | tuple[int, int, int]) -> np.ndarray:
        if self.size == self.canvas:
            return resized
        canvas = np.full((*self.canvas, *resized.shape[2:]), fill, resized.dtype)
        (top, left), (height, width) = self.corner, self.size
        canvas[top : top + height, left : left + width] = resized
        return canvas


class HFlip(T.HFlipTransform):
    """detectron2's, with results that OpenCV need not copy first."""

    def apply_image(self, img: np.ndarray) -> np.ndarray:
        return cv2.flip(img, 1)


@dataclass
class RandomFlip(T.Augmentation):
    """A horizontal flip with this probability."""

    probability: float

    def __post_init__(self) -> None:
        _check_share("FLIP_PROB", self.probability)

    def get_transform(self, image: np.ndarray, rng: np.random.Generator) -> T.Transform:
        is_flipped = rng.random() < self.probability
        return HFlip(image.shape[1]) if is_flipped else T.NoOpTransform()


@dataclass
class RandomHSV(T.Augmentation):
    """HSV value times U(1-b, 1+b) and saturation times U(1-s, 1+s), clipped at 255."""

    brightness: float
    saturation: float

    def __post_init__(self) -> None:
        _check_share("BRIGHTNESS", self.brightness)
        _check_share("SATURATION", self.saturation)

    def get_transform(self, image: np.ndarray, rng: np.random.Generator) -> T.Transform:
        # Per HSV channel, the new value of each of the 256 old ones.
        table = np.repeat(np.arange(256.0)[None, :, None], 3, axis=2)
        table[..., 1] *= rng.uniform(1 - self.saturation, 1 + self.saturation)
        table[..., 2] *= rng.uniform(1 - self.brightness, 1 + self.brightness)
        table = np.minimum(np.rint(table), 255).astype(np.uint8)
        return T.ColorTransform(partial(_look_up_hsv, table=table))


@dataclass(frozen=True)
class Affine(T.Transform):
    """Input pixels (x, y, 1) -> ``matrix`` (2,3) -> output pixels, in an image of the same size."""

    matrix: np.ndarray
    color: tuple[int, int, int]  # RGB of what is uncovered

    def apply_image(self, img: np.ndarray) -> np.ndarray:
        return cv2.warpAffine(img, self.matrix, img.shape[1::-1], borderValue=self.color)

    def apply_segmentation(self, segmentation: np.ndarray) -> np.ndarray:
        size = segmentation.shape[::-1]
        return cv2.warpAffine(segmentation, self.matrix, size, flags=cv2.INTER_NEAREST)

    def apply_coords(self, coords: np.ndarray) -> np.ndarray:
        return coords @ self.matrix[:, :2].T + self.matrix[:, 2]


@dataclass
class RandomAffine(T.Augmentation):
    """Shear x translation x (rotation and scale about the centre), as ASDA's public code.

    Args:
        rotation, shear: degrees, drawn from U(-r, r), shear for each axis.
        scale: factor from U(1 - s, 1 + s).
        translation: U(-t, t) of the height and the width.
        color: RGB of what is uncovered.
    """

    rotation: float
    scale: float
    translation: float
    shear: float
    color: tuple[int, int, int]

    def get_transform(self, image: np.ndarray, rng: np.random.Generator) -> Affine:
        height, width = image.shape[:2]
        angle = rng.uniform(-self.rotation, self.rotation)
        scale = rng.uniform(1 - self.scale, 1 + self.scale)
        rotated, shifted, sheared = np.eye(3), np.eye(3), np.eye(3)
        rotated[:2] = cv2.getRotationMatrix2D((width / 2, height / 2), angle, scale)
        shifted[:2, 2] = rng.uniform(-self.translation, self.translation, 2) * (width, height)
        angles = rng.uniform(-self.shear, self.shear, 2)
        sheared[[0, 1], [1, 0]] = [math.tan(math.radians(a)) for a in angles]
        return Affine((sheared @ shifted @ rotated)[:2], self.color)


def resize_image(image: np.ndarray, height: int, width: int, interpolation: str) -> np.ndarray:
    """uint8 (h,w,3) -> (height,width,3) by cv2 (no antialiasing except by "area")."""
    if image.shape[:2] == (height, width):
        return image
    flag = {"bicubic": cv2.INTER_CUBIC, "area": cv2.INTER_AREA}.get(interpolation, cv2.INTER_LINEAR)
    if interpolation == "area" and (height > image.shape[0] or width > image.shape[1]):
        flag = cv2.INTER_LINEAR
    return cv2.resize(image, (width, height), interpolation=flag)


def _look_up_hsv(image: np.ndarray, table: np.ndarray) -> np.ndarray:
    hsv = cv2.LUT(cv2.cvtColor(image, cv2.COLOR_RGB2HSV), table)
    return cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB)


def _check_share(key: str, value: float) -> None:
    if not 0 <= value <= 1:
        raise ValueError(f"INPUT.RIS.{key} lies in [0, 1], not {value}")
