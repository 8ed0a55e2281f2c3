"""Dataset record or training unit -> model input."""

import logging
import re
from collections.abc import Sequence

import cv2
import numpy as np
import torch
from detectron2.config import CfgNode, configurable
from detectron2.data import transforms as T
from detectron2.structures import BitMasks, Instances
from detectron2.utils.logger import log_first_n

from ..masks import rasterize
from .augmentations import Place, Placement, build_augmentations, build_views
from .images import read_image
from .tokenizer import Tokenizer
from .units import check_unit, draw_unit, take

logger = logging.getLogger(__name__)

# Of an image's sides from those annotated. RRSIS-D, squares of 800 px, has images of 801 and of
# 787.
MAX_DEVIATION = 0.02


class ReferringMapper:
    """Reads a record's image, augments and places it, draws its masks, tokenizes its sentences.

    Works with ris_d2's loaders and, as ``mapper=ReferringMapper(cfg)``, with detectron2's own.
    """

    @configurable
    def __init__(
        self,
        *,
        is_train: bool,
        tokenizer,
        augmentations: Sequence[T.Augmentation],
        views: dict[str, Place] | None = None,
        resolution: tuple[int, int] | None = None,
        unit: str = "referent",
        max_expressions: int = 8,
    ):
        """
        Args:
            is_train: draw units, and add masks; otherwise add ``content_box`` and the record's
                annotations.
            tokenizer: list of E str -> (input_ids int64 (E,L), text_mask bool (E,L)).
            augmentations: original image -> model's input, mostly a
                :class:`ris_d2.data.augmentations.Place` with others before and after; their
                ``get_transform`` may ask for ``image`` and ``rng``. A flip exchanges the words left
                and right.
            views: further resizings of the image as it is before it is placed.
            resolution: (height, width) of the masks asked of the model; None: the original size.
            unit, max_expressions: what is drawn from a plain record in training, see
                :mod:`ris_d2.data.units`.

        Raises:
            ValueError: an unknown unit, or a size or number that makes no sense.
        """
        check_unit(unit, max_expressions)
        if resolution is not None and (len(resolution) != 2 or min(resolution) < 1):
            raise ValueError(f"TEST.RESOLUTION is (height, width) in pixels, not {resolution}")
        self.is_train = is_train
        self.tokenizer = tokenizer
        self.augmentations = augmentations
        self.views = views or {}
        self.resolution = resolution
        self.unit = unit
        self.max_expressions = max_expressions

    @classmethod
    def from_config(cls, cfg: CfgNode, is_train: bool = True) -> dict:
        if is_train and cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS:
            logger.warning(
                "DATALOADER.FILTER_EMPTY_ANNOTATIONS is True: detectron2's own train loader leaves "
                "out images whose sentences have no target (ris_d2's loader keeps them); set it to "
                "False, as configs/Base-RIS.yaml does"
            )
        return {
            "is_train": is_train,
            "tokenizer": Tokenizer(cfg),
            "augmentations": build_augmentations(cfg, is_train),
            "views": build_views(cfg),
            "resolution": tuple(cfg.TEST.RESOLUTION) or None,
            "unit": cfg.INPUT.RIS.UNIT,
            "max_expressions": cfg.INPUT.MAX_EXPRESSIONS,
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
            ValueError: an unreadable image or one of another size than the record says (by more
                than ``MAX_DEVIATION``; else it is resized, with a warning), an empty sentence, an
                unknown annotation id, a malformed segmentation.
        """
        if self.is_train and rng is None:
            rng = np.random.default_rng(int(torch.empty((), dtype=torch.int64).random_()))
            indices = draw_unit(record, self.unit, rng, max_expressions=self.max_expressions)
            record = take(record, indices)
        image = _at_annotated_size(read_image(record["file_name"]), record)
        try:
            mapped, transforms = self._map(image, record["expressions"], rng)
            if self.is_train:
                del mapped["content_box"]
                mapped["instances"] = self._draw(record, transforms, mapped["image"].shape[1:])
                mapped["targets"] = _targets(record)
            else:
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
        return self._map(image, expressions)[0]

    def _map(
        self, image: np.ndarray, expressions: list[dict], rng: np.random.Generator | None = None
    ) -> tuple[dict, T.TransformList]:
        """What training and evaluation have in common, and what happened to the image."""
        inputs = T.AugInput(image)
        inputs.rng = rng
        transforms, unplaced, content_box = T.TransformList([]), image, None
        for augmentation in self.augmentations:
            before = inputs.image
            transform = augmentation(inputs)
            if isinstance(transform, Placement):
                unplaced, content_box = before, transform.content_box
            transforms += transform
        if content_box is None:
            content_box = (0.0, 0.0, float(inputs.image.shape[1]), float(inputs.image.shape[0]))

        expressions = [dict(expression) for expression in expressions]
        is_flipped = sum(isinstance(t, T.HFlipTransform) for t in transforms.transforms) % 2
        for expression in expressions:
            if not expression["text"].strip():
                raise ValueError(f"expression {expression['expression_id']} is empty")
            if is_flipped:
                expression["text"] = swap_left_right(expression["text"])
        input_ids, text_mask = self.tokenizer([expression["text"] for expression in expressions])
        height, width = self.resolution or image.shape[:2]
        mapped = {
            "image": _to_tensor(inputs.image),
            "views": {
                name: _to_tensor(view.get_transform(unplaced).apply_image(unplaced))
                for name, view in self.views.items()
            },
            "content_box": content_box,
            "original_size": image.shape[:2],  # of the annotations; the evaluator decodes at it
            "height": height,
            "width": width,
            "expressions": expressions,
            "input_ids": input_ids,
            "text_mask": text_mask,
        }
        return mapped, transforms

    def _draw(self, record: dict, transforms: T.TransformList, size: Sequence[int]) -> Instances:
        """Draw each annotation once, and take it where the image went: masks of this ``size``."""
        masks = np.empty((len(record["annotations"]), *size), bool)
        for placed, annotation in zip(masks, record["annotations"]):
            try:
                mask = rasterize(annotation["segmentation"], record["height"], record["width"])
            except ValueError as error:
                raise ValueError(f"annotation {annotation['id']}: {error}") from error
            if not mask.any():
                flaw = f"{record['file_name']}: annotation {annotation['id']} encloses no pixel"
                log_first_n(logging.WARNING, flaw, key="message")
            placed[:] = transforms.apply_segmentation(mask.view(np.uint8))
        ids = [annotation["id"] for annotation in record["annotations"]]
        gt_masks = BitMasks(torch.from_numpy(masks))
        annotation_id = torch.tensor(ids, dtype=torch.int64)
        return Instances(tuple(size), gt_masks=gt_masks, annotation_id=annotation_id)


def _targets(record: dict) -> torch.Tensor:
    """bool (E,N): which annotations each expression refers to."""
    ids = [annotation["id"] for annotation in record["annotations"]]
    rows = [[id_ in e["annotation_ids"] for id_ in ids] for e in record["expressions"]]
    return torch.tensor(rows, dtype=torch.bool).reshape(len(rows), len(ids))


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
    planes = np.empty((3, *image.shape[:2]), np.uint8)
    cv2.split(image, list(planes))  # writes into them
    return torch.from_numpy(planes)


def _at_annotated_size(image: np.ndarray, record: dict) -> np.ndarray:
    height, width = record["height"], record["width"]
    if image.shape[:2] == (height, width):
        return image
    said = (
        f"{record['file_name']}: the image is {image.shape[0]} x {image.shape[1]} "
        f"(height x width), its record says {height} x {width}"
    )
    if max(abs(image.shape[0] / height - 1), abs(image.shape[1] / width - 1)) > MAX_DEVIATION:
        raise ValueError(said)
    message = f"{said}. Images that are off so little are resized to it; prepare.py lists them"
    log_first_n(logging.WARNING, message, name=__name__)  # of the first alone
    return cv2.resize(image, (width, height), interpolation=cv2.INTER_LINEAR)
