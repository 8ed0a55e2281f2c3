"""Models asked where they look, and their answers on the grid of the image."""

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from detectron2.config import CfgNode
from torch import Tensor

from ris_d2.predictor import Predictor

from .explanation import Explanation
from .methods import explanations


@dataclass(frozen=True, kw_only=True)
class Sample:
    """Sentences about one image, and what they refer to (None where that is not known)."""

    image: np.ndarray
    texts: list[str]
    targets: list[np.ndarray | None]


@dataclass(frozen=True, kw_only=True)
class Looked:
    """One model on one sentence: maps at the image's size, and its target on the grid of the
    pixels."""

    maps: dict[str, Tensor]  # (H, W), or (L, H, W) of the real tokens
    mask: np.ndarray
    tokens: list[str]
    entropy: dict[str, float]
    pixels: Tensor | None  # (N, D)
    embeddings: Tensor | None  # (K, D)
    on_target: np.ndarray | None  # bool (N,)


class Observer:
    """A model, asked where it looks."""

    def __init__(self, cfg: CfgNode) -> None:
        self.predictor = Predictor(cfg)

    def look(self, sample: Sample) -> list[Looked]:
        model = self.predictor.model
        inputs = self.predictor.prepare(sample.image, sample.texts)
        results = model([inputs])[0]["referring"]
        (explanation,) = explanations(model, [inputs])
        text_mask = inputs["text_mask"]
        if model.trims_text:
            text_mask = text_mask[:, : text_mask.sum(1).max()]
        looked = []
        for row, result in enumerate(results):
            real = text_mask[row]
            part = explanation.apply(lambda x, row=row: x[row])
            maps = {
                name: self._placed(values if values.ndim == 2 else values[real], inputs)
                for name, values in part.maps.items()
            }
            looked.append(
                Looked(
                    maps=maps,
                    mask=result["mask"].cpu().numpy(),
                    tokens=self.predictor.mapper.tokenizer.tokens(
                        inputs["input_ids"][row, : len(real)][real].tolist()
                    ),
                    entropy={name: value.item() for name, value in part.entropy.items()},
                    **self._embedded(part, sample.targets[row], inputs),
                )
            )
        return looked

    def _placed(self, maps: Tensor, inputs: dict) -> Tensor:
        """Maps over the model's input (..., h, w) -> over the image (..., H, W)."""
        x0, y0, x1, y1 = (round(v) for v in inputs["content_box"])
        flat = maps.reshape(1, -1, *maps.shape[-2:])
        flat = F.interpolate(flat, size=self.predictor.model.input_size, mode="bilinear")
        size = (inputs["height"], inputs["width"])
        flat = F.interpolate(flat[..., y0:y1, x0:x1], size=size, mode="bilinear")
        return flat.reshape(*maps.shape[:-2], *size)

    def _embedded(self, part: Explanation, target: np.ndarray | None, inputs: dict) -> dict:
        if part.pixels is None:
            return {"pixels": None, "embeddings": None, "on_target": None}
        return {
            "pixels": part.pixels.flatten(0, 1),
            "embeddings": part.tokens[part.attended > 0],
            "on_target": self._on_grid(target, part.pixels.shape[:2], inputs),
        }

    def _on_grid(
        self, target: np.ndarray | None, grid: tuple[int, int], inputs: dict
    ) -> np.ndarray | None:
        """Whether the centre of each cell of the model's input lies on the target: bool (h w,)."""
        if target is None:
            return None
        x0, y0, x1, y1 = (round(v) for v in inputs["content_box"])
        canvas = torch.zeros(1, 1, *self.predictor.model.input_size)
        inside = torch.from_numpy(target)[None, None].float()
        canvas[..., y0:y1, x0:x1] = F.interpolate(inside, size=(y1 - y0, x1 - x0), mode="nearest")
        on_target = F.interpolate(canvas, size=tuple(grid), mode="nearest-exact")
        if not on_target.any():  # smaller than a cell: where most of it lies
            share = F.adaptive_avg_pool2d(canvas, tuple(grid))
            on_target = share == share.max()
        return on_target.flatten().bool().numpy()
