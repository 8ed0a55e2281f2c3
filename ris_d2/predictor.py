"""The call a user's program makes: an image and sentences in, masks out."""

import logging
import math
import os
from collections.abc import Sequence

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.modeling import build_model
from PIL import Image

from .checkpoint import RISCheckpointer
from .data.images import read_image, to_rgb
from .data.mapper import ReferringMapper

logger = logging.getLogger(__name__)

ImageInput = str | os.PathLike | Image.Image | np.ndarray


class Predictor:
    """A model that answers referring expressions about single images, on ``cfg.MODEL.DEVICE``.

    The weights are MODEL.WEIGHTS, over MODEL.INIT where they leave something open. Masks have the
    image's own size; TEST.RESOLUTION, which belongs to evaluation protocols, is ignored. The image is
    encoded once for all sentences of a call. Words that the tokenizer does not know and sentences
    that are too long for it are named by a warning of every call.

    Example:
        cfg = load_config("configs/shared_ris_beit3_b.yaml", ["MODEL.WEIGHTS", "model_best.pth"])
        results = Predictor(cfg)("street.jpg", ["the left man", "the red cars"])

    Attributes:
        model: the meta-architecture in evaluation mode.
        mapper: makes its input.

    Raises:
        FileNotFoundError, ValueError: weights or tokenizer that are missing or of another model.
    """

    def __init__(self, cfg: CfgNode) -> None:
        cfg = cfg.clone()
        cfg.defrost()
        cfg.TEST.RESOLUTION = ()
        self.model = build_model(cfg).eval()
        RISCheckpointer(self.model, init=cfg.MODEL.INIT).load(cfg.MODEL.WEIGHTS)
        if not cfg.MODEL.WEIGHTS:
            logger.warning("MODEL.WEIGHTS is empty: the masks of an untrained model mean nothing")
        self.mapper = ReferringMapper(cfg, is_train=False)
        self.mapper.tokenizer.warnings_left = math.inf  # a person asks here, every time

    @torch.no_grad()
    def __call__(self, image: ImageInput, sentences: str | Sequence[str]) -> list[dict]:
        """Segment what each sentence refers to.

        Args:
            image: a path, a PIL image, or a uint8 array; see :func:`load_rgb`.
            sentences: one sentence, or several.

        Returns:
            One dict per sentence, in order: ``expression_id`` (int, its position), ``mask`` (bool
            (H,W) of the image's size, upright), ``score`` (float), ``no_target`` (bool: the model
            says that nothing fits), ``instances`` (Instances or None). All tensors are on the CPU.

        Raises:
            ValueError: no sentence, an empty one, one that is no str, or an image that cannot be
                read or has another type or shape.
            FileNotFoundError: no such image file.
        """
        results = self.model([self.prepare(image, sentences)])[0]["referring"]
        return [_to_cpu(result) for result in results]

    def prepare(self, image: ImageInput, sentences: str | Sequence[str]) -> dict:
        """The model's input, one unit, for the same arguments as a call's (ReferringMapper.prepare)."""
        expressions = [
            {"expression_id": i, "ref_id": i, "text": text, "annotation_ids": []}
            for i, text in enumerate(_check_sentences(sentences))
        ]
        return self.mapper.prepare(load_rgb(image), expressions)


def load_rgb(image: ImageInput) -> np.ndarray:
    """Return any accepted image as upright RGB.

    Args:
        image: a path or a PIL image (turned upright by its EXIF orientation; grey, palette, CMYK
            and 16-bit grey are converted; transparency is composited on white), or a uint8 array of
            shape (H,W,3) RGB, (H,W) grey or (H,W,4) RGBA.

    Returns:
        RGB uint8 (H,W,3).

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file is no readable image, the array has another dtype or shape, or the
            object is of another kind.
    """
    if isinstance(image, (str, os.PathLike)):
        return read_image(image)
    if isinstance(image, (Image.Image, np.ndarray)):
        return to_rgb(image)
    raise ValueError(
        f"image must be a path, a PIL image or a uint8 numpy array, got {type(image).__name__}"
    )


def _check_sentences(sentences: str | Sequence[str]) -> list[str]:
    if isinstance(sentences, str):
        sentences = [sentences]
    if not isinstance(sentences, Sequence):
        raise ValueError(f"sentences must be a str or a list, got {type(sentences).__name__}")
    if not sentences:
        raise ValueError("give at least one sentence")
    for position, sentence in enumerate(sentences):
        if not isinstance(sentence, str):
            raise ValueError(f"sentence {position} must be a str, got {type(sentence).__name__}")
        if not sentence.strip():
            raise ValueError(f"sentence {position} is empty")
    return sentences


def _to_cpu(result: dict) -> dict:
    return {
        key: value.to("cpu") if hasattr(value, "to") else value for key, value in result.items()
    }
