"""What a user's program calls: an image and sentences in, masks out; models by folder or name."""

import logging
import math
import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.modeling import build_model
from detectron2.structures import BitMasks
from PIL import Image

from . import hub
from .checkpoint import RISCheckpointer
from .data.images import read_image, to_rgb
from .data.mapper import ReferringMapper
from .masks import encode
from .modeling.options import check_choice
from .modeling.segmenter import PRECISIONS

logger = logging.getLogger(__name__)

ImageInput = str | os.PathLike | Image.Image | np.ndarray


class Results(list[dict]):
    """The answers of one image, one dict per sentence, in order, with all tensors on the CPU.

    ``text`` (the sentence), ``expression_id`` (int, its position), ``mask`` (bool (H,W) of the
    image's size, upright), ``box`` ([x0, y0, x1, y1] of the mask in pixels, the last ones
    exclusive; None if it is empty), ``score`` (float: probability that there is a target, or the
    highest mask probability), ``no_target`` (bool: the model says that nothing fits), ``instances``
    (Instances or None), and ``probabilities`` (float (H,W) in 0..1, also where nothing fits) if
    asked for.
    """

    def to_coco(self, *, image_id: int = 1, first_id: int = 1) -> list[dict]:
        """COCO annotations of the sentences that have a mask, which ``pycocotools`` reads.

        Args:
            image_id: of each annotation.
            first_id: the id of the first one; the next ones count on.

        Returns:
            dicts of ``id``, ``image_id``, ``category_id`` (1), ``segmentation`` (compressed RLE),
            ``bbox`` (x, y, width, height), ``area`` in pixels, ``iscrowd`` (0), ``score``, ``text``
            and ``expression_id``; all of them go into a json as they are.
        """
        found = [result for result in self if result["box"]]
        return [
            {
                "id": first_id + i,
                "image_id": image_id,
                "category_id": 1,
                "segmentation": encode(result["mask"].numpy()),
                "bbox": [x0, y0, x1 - x0, y1 - y0],
                "area": int(result["mask"].sum()),
                "iscrowd": 0,
                "score": result["score"],
                "text": result["text"],
                "expression_id": result["expression_id"],
            }
            for i, result in enumerate(found)
            for x0, y0, x1, y1 in [result["box"]]
        ]

    def to_supervision(self) -> Any:
        """``supervision.Detections`` of the sentences that have a mask.

        ``class_id`` is the sentence's position, ``data["class_name"]`` the sentence.

        Raises:
            ImportError: without the package supervision.
        """
        try:
            import supervision
        except ImportError as error:
            raise ImportError(f"to_supervision needs pip install supervision: {error}") from error
        found = [result for result in self if result["box"]]
        if not found:
            return supervision.Detections.empty()
        return supervision.Detections(
            xyxy=np.array([result["box"] for result in found], np.float32),
            mask=np.stack([result["mask"].numpy() for result in found]),
            confidence=np.array([result["score"] for result in found], np.float32),
            class_id=np.array([result["expression_id"] for result in found]),
            data={"class_name": np.array([result["text"] for result in found])},
        )


class Predictor:
    """A model that answers referring expressions about images, on ``cfg.MODEL.DEVICE``.

    Masks have the image's own size; TEST.RESOLUTION, which belongs to evaluation protocols, is
    ignored. An image is encoded once for all sentences of a call, or of a session. Words that the
    tokenizer does not know and sentences that are too long for it are named by a warning of every
    call. Several threads may use one predictor.

    Example:
        predictor = Predictor.from_pretrained("deris_l_grefcoco")
        results = predictor("street.jpg", ["the left man", "the red cars"])

    Attributes:
        cfg: the configuration.
        model: the meta-architecture in evaluation mode.
        mapper: makes its input.
    """

    def __init__(self, cfg: CfgNode, *, use_init: bool = True, precision: str = "auto") -> None:
        """
        Args:
            cfg: the weights are MODEL.WEIGHTS.
            use_init: let MODEL.INIT fill what MODEL.WEIGHTS leaves open.
            precision: auto (what is fastest here, see MODEL.RIS.PRECISION), fp32, bf16 or fp16;
                what the config says is for training.

        Raises:
            FileNotFoundError, ValueError: weights or tokenizer that are missing or of another
                model.
            ValueError: an unknown precision.
        """
        self.cfg, cfg = cfg.clone(), cfg.clone()
        cfg.defrost()
        cfg.TEST.RESOLUTION = ()
        self.model = build_model(cfg).eval()
        check_choice("precision", precision, PRECISIONS)
        self.model.precision = precision
        init = cfg.MODEL.INIT if use_init else ()
        RISCheckpointer(self.model, init=init).load(cfg.MODEL.WEIGHTS)
        if not cfg.MODEL.WEIGHTS:
            logger.warning("MODEL.WEIGHTS is empty: the masks of an untrained model mean nothing")
        self.mapper = ReferringMapper(cfg, is_train=False)
        self.mapper.tokenizer.warnings_left = math.inf  # a person asks here, every time

    @classmethod
    def from_pretrained(
        cls,
        name: str | os.PathLike,
        options: Sequence[str] = (),
        *,
        modules: Sequence[str] = (),
        precision: str = "auto",
    ) -> "Predictor":
        """A trained model: a folder of ``save_pretrained``, a name of the zoo (docs/weights.md), or
        ``organisation/repository[@revision]`` of such a folder on the Hugging Face hub.

        A folder needs no network. For arguments and errors see :func:`ris_d2.hub.find_config`.
        """
        cfg = hub.find_config(name, options, modules=modules)
        return cls(cfg, use_init=False, precision=precision)

    def save_pretrained(
        self,
        folder: str | os.PathLike,
        *,
        title: str = "",
        metrics: Mapping[str, Mapping[str, float | None]] | None = None,
        licence: str = "",
        notes: str = "",
    ) -> None:
        """Write a model folder that :meth:`from_pretrained` loads anywhere, without a network:
        config.yaml, model.safetensors, tokenizer/ and README.md, the model card.

        An earlier model folder of that name is replaced.

        Args:
            title, licence, notes: for the card (Markdown).
            metrics: dataset -> metric -> number, for the card.

        Raises:
            ValueError: the folder holds files that are of no model folder.
        """
        card = {"title": title, "metrics": metrics or {}, "licence": licence, "notes": notes}
        hub.save_model(folder, self.cfg, self.model, self.mapper.tokenizer, **card)

    def __call__(
        self, image: ImageInput, sentences: str | Sequence[str], **settings: Any
    ) -> Results:
        """Segment what each sentence refers to.

        Args:
            image: a path, a PIL image, or a uint8 array; see :func:`load_rgb`.
            sentences: one sentence, or several.
            settings: ``probabilities=True`` asks for them; thresholds for this call alone, by the
                names in ``predictor.model.thresholds``: ``mask_threshold``, and as the model
                decides that nothing fits ``existence_threshold``, ``score_threshold`` or
                ``min_area``.

        Raises:
            ValueError: no sentence, an empty one, one that is no str, an image that cannot be read
                or has another type or shape, or a threshold that this model does not have.
            FileNotFoundError: no such image file.
        """
        return self.batch([image], [sentences], **settings)[0]

    def batch(
        self,
        images: Sequence[ImageInput],
        sentences: Sequence[str | Sequence[str]],
        **settings: Any,
    ) -> list[Results]:
        """Ask about several images at once, each with sentences of its own: faster on a GPU."""
        if len(images) != len(sentences):
            raise ValueError(f"{len(images)} images and {len(sentences)} lists of sentences")
        units = [
            {**self.prepare(image, own), **self._settings(**settings)}
            for image, own in zip(images, sentences)
        ]
        with torch.no_grad():
            return [_results(unit, answer) for unit, answer in zip(units, self.model(units))]

    def set_image(self, image: ImageInput) -> "Session":
        """Encode an image now, and ask about it as often as wished: ``session(sentences)``."""
        return Session(self, image)

    def prepare(self, image: ImageInput, sentences: str | Sequence[str]) -> dict:
        """The model's input for the arguments of a call: one unit, see ReferringMapper.prepare."""
        return self.mapper.prepare(load_rgb(image), _expressions(sentences))

    def _settings(self, *, probabilities: bool = False, **thresholds: float) -> dict:
        known = getattr(self.model, "thresholds", {})
        for name, value in thresholds.items():
            if name not in known:
                raise ValueError(f"{name}: the thresholds of this model are {', '.join(known)}")
            if not 0 <= value <= (1 if name != "min_area" else math.inf):
                raise ValueError(f"{name} is {value}; it lies in 0..1 (min_area: pixels)")
        return {"probabilities": probabilities, "thresholds": thresholds}


class Session:
    """One image, encoded once by :meth:`Predictor.set_image`, for any number of sentences."""

    def __init__(self, predictor: Predictor, image: ImageInput) -> None:
        self._predictor = predictor
        self._unit = predictor.mapper.prepare(load_rgb(image), [])
        self._features = predictor.model.encode([self._unit])

    def __call__(self, sentences: str | Sequence[str], **settings: Any) -> Results:
        """As :meth:`Predictor.__call__` of the same image."""
        expressions = _expressions(sentences)
        input_ids, text_mask = self._predictor.mapper.tokenizer([e["text"] for e in expressions])
        asked = {"expressions": expressions, "input_ids": input_ids, "text_mask": text_mask}
        unit = {**self._unit, **asked, **self._predictor._settings(**settings)}
        return _results(unit, self._predictor.model.answer(self._features, [unit])[0])


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
    raise ValueError(f"image must be a path, a PIL image or an array, got {type(image).__name__}")


def _expressions(sentences: str | Sequence[str]) -> list[dict]:
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
    return [
        {"expression_id": i, "ref_id": i, "text": text, "annotation_ids": []}
        for i, text in enumerate(sentences)
    ]


def _results(unit: dict, answer: dict) -> Results:
    results = Results()
    for expression, result in zip(unit["expressions"], answer["referring"], strict=True):
        result = {k: v.to("cpu") if hasattr(v, "to") else v for k, v in result.items()}
        results.append({"text": expression["text"], **result, "box": _box(result["mask"])})
    return results


def _box(mask: torch.Tensor) -> list[int] | None:
    """Mask (H,W) -> [x0, y0, x1, y1], the last ones exclusive; None without a pixel."""
    box = BitMasks(mask[None]).get_bounding_boxes().tensor[0].int().tolist()
    return box if any(box) else None
