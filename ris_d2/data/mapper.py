"""Dataset record or training unit -> model input."""

import logging
import re

import cv2
import numpy as np
import torch
from detectron2.config import CfgNode, configurable
from detectron2.structures import BitMasks, Instances
from detectron2.utils.logger import log_first_n

from ..masks import SAMPLES, rasterize, resize_nearest
from .geometry import GEOMETRIES, INTERPOLATIONS, Placement, place, random_affine, resize_image
from .images import read_image
from .tokenizer import Tokenizer
from .units import UNITS, draw_unit, take

logger = logging.getLogger(__name__)


class ReferringMapper:
    """Reads a record's image, resizes it for the model, draws its masks, tokenizes its sentences.

    Works with ris_d2's loaders and, as ``mapper=ReferringMapper(cfg)``, with detectron2's own.
    """

    @configurable
    def __init__(
        self,
        *,
        is_train: bool,
        tokenizer,
        size: tuple[int, int],
        geometry: str = "squash",
        interpolation: str = "bilinear",
        mask_sample: str = "center",
        letterbox_color: tuple[float, float, float] = (123.7, 116.3, 103.5),
        views: dict[str, tuple[int, int]] | None = None,
        resolution: tuple[int, int] | None = None,
        unit: str = "referent",
        max_expressions: int = 8,
        flip_prob: float = 0.0,
        brightness: float = 0.0,
        saturation: float = 0.0,
        affine: dict[str, float] | None = None,
    ):
        """
        Args:
            is_train: draw units and augmentation, and add masks; otherwise add ``content_box`` and
                the record's annotations.
            tokenizer: list of E str -> (input_ids int64 (E,L), text_mask bool (E,L)).
            size: (height, width) of the model's input.
            geometry: how the image meets it, see :func:`ris_d2.data.geometry.place`.
            interpolation: "bilinear", "bicubic" or "area" (shrinking only, bilinear otherwise).
            mask_sample: "center" or "corner", see :func:`ris_d2.masks.resize_nearest`.
            letterbox_color: RGB of the border of a letterbox, and of what an affine map uncovers.
            views: name -> (height, width) of further squashed resizings of the same image.
            resolution: (height, width) of the masks asked of the model; None: the original size.
            unit, max_expressions: what is drawn from a plain record in training, see
                :mod:`ris_d2.data.units`.
            flip_prob: of a horizontal flip of image, masks and the words left and right.
            brightness, saturation: b: HSV value (saturation) times U(1-b, 1+b), clipped at 255.
            affine: rotation, scale, translation, shear of :func:`random_affine`; letterbox only.

        Raises:
            ValueError: an unknown name, a size or range that makes no sense, affine augmentation
                with views or another geometry.
        """
        _check_choice("GEOMETRY", geometry, GEOMETRIES)
        _check_choice("INTERPOLATION", interpolation, INTERPOLATIONS)
        _check_choice("MASK_SAMPLE", mask_sample, tuple(SAMPLES))
        _check_choice("UNIT", unit, UNITS)
        _check_size("INPUT.RIS.SIZE", size)
        for name, view_size in (views or {}).items():
            _check_size(f"the size of INPUT.RIS.VIEWS {name!r}", view_size)
        if resolution is not None:
            _check_size("TEST.RESOLUTION", resolution)
        if max_expressions < 1:
            raise ValueError(f"INPUT.MAX_EXPRESSIONS must be at least 1, not {max_expressions}")
        shares = {"FLIP_PROB": flip_prob, "BRIGHTNESS": brightness, "SATURATION": saturation}
        for name, share in shares.items():
            if not 0 <= share <= 1:
                raise ValueError(f"INPUT.RIS.{name} lies in [0, 1], not {share}")
        if affine is not None and (geometry != "letterbox" or views):
            raise ValueError(
                "INPUT.RIS.AFFINE needs GEOMETRY letterbox and no VIEWS, which would not move along"
            )
        self.is_train = is_train
        self.tokenizer = tokenizer
        self.size = tuple(size)
        self.geometry = geometry
        self.interpolation = interpolation
        self.mask_sample = mask_sample
        # cv2 rounds border colours, so do we.
        self.letterbox_color = tuple(int(round(c)) for c in letterbox_color)
        self.views = views or {}
        self.resolution = resolution
        self.unit = unit
        self.max_expressions = max_expressions
        self.flip_prob = flip_prob
        self.brightness = brightness
        self.saturation = saturation
        self.affine = affine

    @classmethod
    def from_config(cls, cfg: CfgNode, is_train: bool = True) -> dict:
        ris = cfg.INPUT.RIS
        if is_train and cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS:
            logger.warning(
                "DATALOADER.FILTER_EMPTY_ANNOTATIONS is True: detectron2's own train loader leaves "
                "out images whose sentences have no target (ris_d2's loader keeps them); set it to "
                "False, as configs/Base-RIS.yaml does"
            )
        affine = {
            "rotation": ris.AFFINE.ROTATION,
            "scale": ris.AFFINE.SCALE,
            "translation": ris.AFFINE.TRANSLATION,
            "shear": ris.AFFINE.SHEAR,
        }
        return {
            "is_train": is_train,
            "tokenizer": Tokenizer(cfg),
            "size": ris.SIZE,
            "geometry": ris.GEOMETRY,
            "interpolation": ris.INTERPOLATION,
            "mask_sample": ris.MASK_SAMPLE,
            "letterbox_color": ris.LETTERBOX_COLOR,
            "views": {name: (height, width) for name, height, width in ris.VIEWS},
            "resolution": tuple(cfg.TEST.RESOLUTION) or None,
            "unit": ris.UNIT,
            "max_expressions": cfg.INPUT.MAX_EXPRESSIONS,
            "flip_prob": ris.FLIP_PROB,
            "brightness": ris.BRIGHTNESS,
            "saturation": ris.SATURATION,
            "affine": affine if ris.AFFINE.ENABLED else None,
        }

    def __call__(self, record: dict, rng: np.random.Generator | None = None) -> dict:
        """Map one record.

        Args:
            record: one image with its expressions and annotations, as ris_d2's datasets give it.
                It is not changed.
            rng: in training, the random numbers of this draw; the record is then a unit as it
                stands (:func:`ris_d2.data.units.take`). None, as detectron2's loader calls: a unit
                is drawn from the record here, with an rng seeded from torch's global generator,
                which every DataLoader worker seeds for itself. Without meaning in evaluation.

        Returns:
            The model's input of E expressions and N annotations: ``image`` uint8 (3,h,w) RGB;
            ``views`` {name: uint8 (3,H,W)}; ``height``, ``width`` of the masks asked for;
            ``original_size`` (height, width) of the image; ``image_id``, ``file_name``, ``source``;
            ``expressions`` (the dicts, copied; a flip changes ``text``); ``input_ids`` int64 (E,L);
            ``text_mask`` bool (E,L). In training ``instances`` with ``gt_masks`` BitMasks (N,h,w)
            and ``annotation_id`` int64 (N,), and ``targets`` bool (E,N). In evaluation
            ``content_box`` (x0,y0,x1,y1) and the record's ``annotations``.

        Raises:
            FileNotFoundError: no such image.
            ValueError: an unreadable image or one of another size than the record says, an empty
                sentence, an unknown annotation id, a malformed segmentation.
        """
        if self.is_train and rng is None:
            rng = np.random.default_rng(int(torch.empty((), dtype=torch.int64).random_()))
            indices = draw_unit(record, self.unit, rng, max_expressions=self.max_expressions)
            record = take(record, indices)
        image = read_image(record["file_name"])
        if image.shape[:2] != (record["height"], record["width"]):
            raise ValueError(
                f"{record['file_name']}: the image is {image.shape[0]} x {image.shape[1]} "
                f"(height x width), its record says {record['height']} x {record['width']}"
            )
        try:
            if self.is_train:
                mapped = self._prepare_training(image, record, rng)
            else:
                mapped = self.prepare(image, record["expressions"])
                mapped["annotations"] = record["annotations"]
        except ValueError as error:
            raise ValueError(f"{record['file_name']}: {error}") from error
        mapped.update({key: record[key] for key in ("image_id", "file_name", "source")})
        return mapped

    def prepare(self, image: np.ndarray, expressions: list[dict]) -> dict:
        """Map an image in memory for inference; needs no file and no annotation.

        Args:
            image: uint8 (H,W,3) RGB.
            expressions: dicts with at least ``text``.

        Returns:
            What a call in evaluation returns, without ``image_id``, ``file_name``, ``source`` and
            ``annotations``.

        Raises:
            ValueError: an empty sentence.
        """
        placement = place(*image.shape[:2], self.size, self.geometry)
        return {
            "image": _to_tensor(self._place_image(image, placement)),
            "content_box": placement.content_box,
            **self._common(image, [dict(expression) for expression in expressions]),
        }

    def _prepare_training(self, image: np.ndarray, record: dict, rng: np.random.Generator) -> dict:
        expressions = [dict(expression) for expression in record["expressions"]]
        flip = rng.random() < self.flip_prob
        if flip:
            image = cv2.flip(image, 1)
            for expression in expressions:
                expression["text"] = swap_left_right(expression["text"])
        image = self._jitter(image, rng)
        placement = place(*image.shape[:2], self.size, self.geometry)
        placed = self._place_image(image, placement)
        masks = self._place_masks(record, placement, flip)
        if self.affine is not None:
            matrix = random_affine(rng, *self.size, **self.affine)
            size = self.size[::-1]
            placed = cv2.warpAffine(placed, matrix, size, borderValue=self.letterbox_color)
            for mask in masks.view(np.uint8):
                mask[:] = cv2.warpAffine(mask, matrix, size, flags=cv2.INTER_NEAREST)

        ids = [annotation["id"] for annotation in record["annotations"]]
        instances = Instances(masks.shape[1:])
        instances.gt_masks = BitMasks(torch.from_numpy(masks))
        instances.annotation_id = torch.tensor(ids, dtype=torch.int64)
        targets = [[id_ in e["annotation_ids"] for id_ in ids] for e in expressions]
        return {
            "image": _to_tensor(placed),
            "instances": instances,
            "targets": torch.tensor(targets, dtype=torch.bool).reshape(len(expressions), len(ids)),
            **self._common(image, expressions),
        }

    def _common(self, image: np.ndarray, expressions: list[dict]) -> dict:
        """What training and evaluation have in common, from the (flipped) original image."""
        for expression in expressions:
            if not expression["text"].strip():
                raise ValueError(f"expression {expression['expression_id']} is empty")
        input_ids, text_mask = self.tokenizer([expression["text"] for expression in expressions])
        height, width = self.resolution or image.shape[:2]
        return {
            "views": {
                name: _to_tensor(resize_image(image, *size, self.interpolation))
                for name, size in self.views.items()
            },
            "original_size": image.shape[:2],  # of the annotations; the evaluator decodes at it
            "height": height,
            "width": width,
            "expressions": expressions,
            "input_ids": input_ids,
            "text_mask": text_mask,
        }

    def _jitter(self, image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        if not self.brightness and not self.saturation:
            return image
        # Per HSV channel, the new value of each of the 256 old ones.
        table = np.repeat(np.arange(256.0)[None, :, None], 3, axis=2)
        table[..., 1] *= rng.uniform(1 - self.saturation, 1 + self.saturation)
        table[..., 2] *= rng.uniform(1 - self.brightness, 1 + self.brightness)
        table = np.minimum(np.rint(table), 255).astype(np.uint8)
        hsv = cv2.LUT(cv2.cvtColor(image, cv2.COLOR_RGB2HSV), table)
        return cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB)

    def _place_image(self, image: np.ndarray, placement: Placement) -> np.ndarray:
        resized = resize_image(image, placement.height, placement.width, self.interpolation)
        if placement.fills_canvas:
            return resized
        shape = (placement.canvas_height, placement.canvas_width, 3)
        canvas = np.full(shape, self.letterbox_color, np.uint8)
        canvas[placement.inside] = resized
        return canvas

    def _place_masks(self, record: dict, placement: Placement, flip: bool) -> np.ndarray:
        """Draw each annotation once: bool (N, canvas height, canvas width)."""
        shape = (len(record["annotations"]), placement.canvas_height, placement.canvas_width)
        masks = np.zeros(shape, bool)
        for canvas, annotation in zip(masks, record["annotations"]):
            try:
                mask = rasterize(annotation["segmentation"], record["height"], record["width"])
            except ValueError as error:
                raise ValueError(f"annotation {annotation['id']}: {error}") from error
            if not mask.any():
                log_first_n(
                    logging.WARNING,
                    f"{record['file_name']}: annotation {annotation['id']} encloses no pixel",
                    key="message",
                )
            if flip:
                mask = np.asfortranarray(mask[:, ::-1])
            canvas[placement.inside] = resize_nearest(
                mask, placement.height, placement.width, sample=self.mask_sample
            )
        return masks


# Whole words: "bright" and "upright" stay. "right" as in "directly" or "correct" cannot be told
# apart and is swapped too, as the public code does.
_LEFT_RIGHT = re.compile(
    r"\b(left|right)(?=(?:most|er|est|hand|handed|side|ward|wards)?\b)", re.IGNORECASE
)


def swap_left_right(text: str) -> str:
    """Exchange the words left and right, also in leftmost, leftest, left-hand, leftside, leftward.

    Upper and lower case stay with their place: "Left of the RIGHT one" -> "Right of the LEFT one".
    """
    return _LEFT_RIGHT.sub(_opposite, text)


def _opposite(match: re.Match) -> str:
    word = match[1]
    opposite = "right" if word.lower() == "left" else "left"
    if word.isupper():
        return opposite.upper()
    return opposite.capitalize() if word[0].isupper() else opposite


def _to_tensor(image: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.stack(cv2.split(image)))


def _check_choice(key: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"INPUT.RIS.{key} is one of {', '.join(choices)}, not {value!r}")


def _check_size(name: str, size: tuple[int, int]) -> None:
    if len(size) != 2 or min(size) < 1:
        raise ValueError(f"{name} is (height, width) in pixels, not {tuple(size)}")
