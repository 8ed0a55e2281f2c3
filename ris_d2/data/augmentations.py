"""From the original image to the model's input: Augmentations and Transforms of detectron2's kind.

What is random here takes its numbers from ``rng``, the random numbers of the draw, so that training
resumes exactly; detectron2's own augmentations may stand in the list too, but draw from numpy's global
generator.
"""

import math
from dataclasses import dataclass, replace
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
    ris = cfg.INPUT.RIS
    place = Place(
        ris.SIZE,
        ris.GEOMETRY,
        interpolation=ris.INTERPOLATION,
        mask_sample=ris.MASK_SAMPLE,
        color=ris.LETTERBOX_COLOR,
    )
    affine = ris.AFFINE
    if affine.ENABLED and (ris.GEOMETRY != "letterbox" or ris.VIEWS):
        raise ValueError(
            "INPUT.RIS.AFFINE needs GEOMETRY letterbox and no VIEWS, which would not move along"
        )
    # One that is off draws no random numbers, except the flip: runs of old resume exactly.
    augmentations = [RandomFlip(ris.FLIP_PROB)]
    if ris.BRIGHTNESS or ris.SATURATION:
        augmentations.append(RandomHSV(brightness=ris.BRIGHTNESS, saturation=ris.SATURATION))
    augmentations.append(place)
    if affine.ENABLED:
        ranges = affine.ROTATION, affine.SCALE, affine.TRANSLATION, affine.SHEAR
        augmentations.append(RandomAffine(*ranges, color=place.color))
    return augmentations if is_train else [place]


def build_views(cfg: CfgNode) -> dict[str, T.Augmentation]:
    """INPUT.RIS.VIEWS: name -> how the original image is squashed to this view."""
    interpolation = cfg.INPUT.RIS.INTERPOLATION
    return {
        name: Place(size, interpolation=interpolation, key=f"the size of INPUT.RIS.VIEWS {name!r}")
        for name, *size in cfg.INPUT.RIS.VIEWS
    }


@dataclass(frozen=True, kw_only=True)
class Placement(T.Transform):
    """An image resized to ``size`` with its upper left corner at ``corner`` of a canvas.

    All sizes are (height, width) in pixels. The inverse takes what lies on the canvas, an image or
    a mask, back to the original image.
    """

    original: tuple[int, int]
    size: tuple[int, int]
    canvas: tuple[int, int]
    corner: tuple[int, int] = (0, 0)  # (top, left)
    interpolation: str = "bilinear"
    mask_sample: str = "center"
    color: tuple[int, int, int] = (0, 0, 0)  # of the rest of the canvas

    @property
    def content_box(self) -> tuple[float, float, float, float]:
        """(x0, y0, x1, y1) of the image in the canvas, in pixels, x1 and y1 exclusive."""
        (top, left), (height, width) = self.corner, self.size
        return float(left), float(top), float(left + width), float(top + height)

    def apply_image(self, img: np.ndarray) -> np.ndarray:
        return self._put(resize_image(img, *self.size, self.interpolation), self.color)

    def apply_segmentation(self, segmentation: np.ndarray) -> np.ndarray:
        return self._put(resize_nearest(segmentation, *self.size, sample=self.mask_sample), 0)

    def apply_coords(self, coords: np.ndarray) -> np.ndarray:
        scale = np.divide(self.size, self.original)
        return coords * scale[::-1] + self.corner[::-1]

    def inverse(self) -> T.TransformList:
        (top, left), (height, width) = self.corner, self.size
        back = replace(
            self, original=self.size, size=self.original, canvas=self.original, corner=(0, 0)
        )
        return T.TransformList([T.CropTransform(left, top, width, height), back])

    def _put(self, resized: np.ndarray, fill: int | tuple[int, int, int]) -> np.ndarray:
        if self.size == self.canvas:
            return resized
        (top, left), (height, width) = self.corner, self.size
        canvas = np.full((*self.canvas, *resized.shape[2:]), fill, resized.dtype)
        canvas[top : top + height, left : left + width] = resized
        return canvas


class Place(T.Augmentation):
    """How the image meets the model's input.

    - squash: fills it, the aspect ratio is not kept.
    - letterbox: aspect kept, centred; an odd rest goes below and to the right (ASDA's public code).
    - longest_side: aspect kept, the longest side becomes max(size), no border (SAM).
    """

    def __init__(
        self,
        size: tuple[int, int],
        geometry: str = "squash",
        *,
        interpolation: str = "bilinear",
        mask_sample: str = "center",
        color: tuple[float, float, float] = (123.7, 116.3, 103.5),
        key: str = "INPUT.RIS.SIZE",
    ):
        """
        Args:
            size: (height, width) of the model's input.
            geometry: see above.
            interpolation: "bilinear", "bicubic" or "area" (shrinking only, bilinear otherwise).
            mask_sample: "center" or "corner", see :func:`ris_d2.masks.resize_nearest`.
            color: RGB of the border of a letterbox.
            key: what an error calls ``size``.

        Raises:
            ValueError: an unknown name, or a size that makes no sense.
        """
        if len(size) != 2 or min(size) < 1:
            raise ValueError(f"{key} is (height, width) in pixels, not {tuple(size)}")
        for name, value, choices in (
            ("GEOMETRY", geometry, GEOMETRIES),
            ("INTERPOLATION", interpolation, INTERPOLATIONS),
            ("MASK_SAMPLE", mask_sample, SAMPLES),
        ):
            if value not in choices:
                raise ValueError(f"INPUT.RIS.{name} is one of {', '.join(choices)}, not {value!r}")
        self.size, self.geometry = tuple(size), geometry
        self.interpolation, self.mask_sample = interpolation, mask_sample
        self.color = tuple(int(round(c)) for c in color)  # as cv2 rounds border colours

    def get_transform(self, image: np.ndarray) -> Placement:
        original, size, corner = image.shape[:2], self.size, (0, 0)
        if self.geometry == "letterbox":
            ratio = min(self.size[0] / original[0], self.size[1] / original[1])
            size = tuple(max(round(side * ratio), 1) for side in original)
            corner = tuple((outer - inner) // 2 for outer, inner in zip(self.size, size))
        elif self.geometry == "longest_side":
            ratio = max(self.size) / max(original)
            size = tuple(max(int(side * ratio + 0.5), 1) for side in original)
        return Placement(
            original=original,
            size=size,
            canvas=size if self.geometry == "longest_side" else self.size,
            corner=corner,
            interpolation=self.interpolation,
            mask_sample=self.mask_sample,
            color=self.color,
        )


class HFlip(T.HFlipTransform):
    """detectron2's, with results that OpenCV need not copy first."""

    def apply_image(self, img: np.ndarray) -> np.ndarray:
        return cv2.flip(img, 1)

    def apply_segmentation(self, segmentation: np.ndarray) -> np.ndarray:
        return np.asfortranarray(segmentation[:, ::-1])  # column-major, as pycocotools draws


class RandomFlip(T.Augmentation):
    """A horizontal flip with this probability."""

    def __init__(self, probability: float):
        self.probability = _share("FLIP_PROB", probability)

    def get_transform(self, image: np.ndarray, rng: np.random.Generator) -> T.Transform:
        is_flipped = rng.random() < self.probability
        return HFlip(image.shape[1]) if is_flipped else T.NoOpTransform()


class RandomHSV(T.Augmentation):
    """HSV saturation times U(1-s, 1+s) and value times U(1-b, 1+b), clipped at 255."""

    def __init__(self, *, brightness: float, saturation: float):
        self.brightness = _share("BRIGHTNESS", brightness)
        self.saturation = _share("SATURATION", saturation)

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


def _share(key: str, value: float) -> float:
    if not 0 <= value <= 1:
        raise ValueError(f"INPUT.RIS.{key} lies in [0, 1], not {value}")
    return value
