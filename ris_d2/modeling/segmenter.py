"""ReferringSegmenter: what all methods have in common as detectron2 meta-architectures."""

import contextlib
import functools
import logging
import math
import os
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from detectron2.config import CfgNode
from detectron2.structures import Instances
from torch import Tensor, nn

from .layers import ExistenceHead, resize_maps
from .layers.checkpointing import checkpoint_layers
from .options import arguments, check_choice
from .losses import mean_over_processes
from .precision import fastest_precision
from .postprocessing import MASK_ORDERS, NO_TARGET_RULES, restore_masks, says_nothing

logger = logging.getLogger(__name__)

PRECISIONS = {"auto": None, "fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


class ReferringSegmenter(nn.Module):
    """Base of the meta-architectures: images and sentences in, losses or masks out.

    A method implements ``encode_images`` (once per image), ``segment`` (once per expression) and
    ``mask_losses``, or has a ``loss``; one with losses that are no means over expressions
    implements ``losses``, one that predicts instances ``predict``. The base collates, normalises
    and pads, autocasts, freezes, slices expressions in evaluation with image features kept, and
    restores masks to the requested size.

    A part that ``freeze`` names is frozen as the method's constructor assigns it.

    Args:
        pixel_mean, pixel_std: per RGB channel, in 0..255.
        input_size: (height, width) that smaller images are padded to with zeros after
            normalisation.
        precision: fp32, bf16, fp16 or auto; the autocast dtype of the forward pass.
        compiles: run ``encode_images`` and ``segment`` through torch.compile.
        checkpoint_activations: parts whose layers are computed once more in the backward pass, or
            "all"; see MODEL.RIS.CHECKPOINT_ACTIVATIONS.
        freeze: part -> "eval" or "train": parts without gradients and the mode they stay in;
            "none": a part that a config's _BASE_ freezes and the config does not.
        no_target: none, area or head; see MODEL.RIS.NO_TARGET.
        sentence_dim: channels of ``outputs["sentence"]``; with no_target "head" the base builds an
            ExistenceHead on it. None for methods that decide themselves.
        mask_order: probabilities, logits or binary; see MODEL.RIS.MASK_ORDER.
        target_resizing: area or nearest, how ``shrink_targets`` makes training targets.
        max_expressions: expressions segmented at once in evaluation.
        to_be_applied: groups of config keys that say how to train the model, but that others must
            apply: MODEL.INIT (``load_init``, ``RISCheckpointer``), SOLVER.RIS
            (``build_optimizer``). A training without them is warned of.

    Raises:
        ValueError: for an unknown precision, no_target, mask_order, target_resizing or mode of a
            frozen part.
    """

    # MODEL.INIT source -> path of the sub-module that its weights fill, e.g. {"beit3":
    # "encoder"}, or the children that one file fills, as its converter names them:
    # {"clip": ("vision", "text")}.
    weight_parts: Mapping[str, str | tuple[str, ...]] = {}
    # Methods that mask padded tokens everywhere may have them cut off before they compute anything.
    trims_text = False
    # Logits (E, h, w), targets (E, h, w) -> name (starting with "loss") -> (E,).
    loss: Callable[[Tensor, Tensor], dict[str, Tensor]]
    # Rows of the method's token embedding; None = not checked.
    vocab_size: int | None = None

    def __init__(
        self,
        *,
        pixel_mean: Sequence[float],
        pixel_std: Sequence[float],
        input_size: tuple[int, int],
        precision: str = "fp32",
        compiles: bool = False,
        checkpoint_activations: Sequence[str] = (),
        freeze: Mapping[str, str] | None = None,
        no_target: str = "none",
        sentence_dim: int | None = None,
        existence_weight: float = 1.0,
        existence_threshold: float = 0.5,
        min_area: int = 50,
        mask_threshold: float = 0.5,
        mask_order: str = "probabilities",
        target_resizing: str = "area",
        max_expressions: int = 32,
        to_be_applied: Sequence[str] = (),
    ):
        super().__init__()
        check_choice("MODEL.RIS.PRECISION", precision, PRECISIONS)
        check_choice("MODEL.RIS.NO_TARGET", no_target, NO_TARGET_RULES)
        check_choice("MODEL.RIS.MASK_ORDER", mask_order, MASK_ORDERS)
        check_choice("MODEL.RIS.TARGET_RESIZING", target_resizing, ("area", "nearest"))
        self.register_buffer("pixel_mean", torch.tensor(pixel_mean).view(-1, 1, 1), False)
        self.register_buffer("pixel_std", torch.tensor(pixel_std).view(-1, 1, 1), False)
        self.input_size = tuple(input_size)
        self.precision = precision
        self.compiles = compiles
        self._ran: set[str] = set()
        self.checkpoint_activations = tuple(checkpoint_activations)
        for part, mode in (freeze or {}).items():
            check_choice(f"MODEL.RIS.FREEZE.{part}", mode, ("eval", "train", "none"))
        self.freeze = {part: mode for part, mode in (freeze or {}).items() if mode != "none"}
        self.no_target = no_target
        has_head = no_target == "head" and sentence_dim is not None
        self.existence_head = ExistenceHead(dim=sentence_dim) if has_head else None
        self.existence_weight, self.existence_threshold = existence_weight, existence_threshold
        self.mask_threshold, self.mask_order = mask_threshold, mask_order
        self.target_resizing = target_resizing
        self.min_area, self.max_expressions = min_area, max_expressions
        self.to_be_applied = set(to_be_applied)

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        """The arguments of the base; a method adds its own to this dict."""
        ris = cfg.MODEL.RIS
        return {
            "to_be_applied": ["SOLVER.RIS"] + ["MODEL.INIT"] * bool(cfg.MODEL.INIT),
            "input_size": cfg.INPUT.RIS.SIZE,
            "compiles": ris.COMPILE,
            "checkpoint_activations": ris.CHECKPOINT_ACTIVATIONS,
            "freeze": ris.FREEZE,
            "min_area": cfg.TEST.NO_TARGET_MIN_AREA,
            "max_expressions": cfg.TEST.MAX_EXPRESSIONS,
            **arguments(cfg.MODEL, "PIXEL_MEAN", "PIXEL_STD"),
            **arguments(ris, "PRECISION", "NO_TARGET", "EXISTENCE_WEIGHT", "EXISTENCE_THRESHOLD"),
            **arguments(ris, "MASK_THRESHOLD", "MASK_ORDER", "TARGET_RESIZING"),
        }

    # The hooks of a method.

    def encode_images(self, images: Tensor, views: dict[str, Tensor]) -> Any:
        """Compute what does not depend on language.

        Args:
            images: (B, 3, H, W), normalised and padded.
            views: further resizings of the same images, name -> (B, 3, h, w).

        Returns:
            whatever ``segment`` takes as features.
        """
        raise NotImplementedError

    def segment(
        self, features: Any, image_index: Tensor, input_ids: Tensor, text_mask: Tensor
    ) -> dict[str, Tensor]:
        """Segment E expressions.

        Args:
            features: of ``encode_images``.
            image_index: int64 (E,), the row of the image that each expression belongs to.
            input_ids: int64 (E, L).
            text_mask: bool (E, L), True = real token.

        Returns:
            at least "mask_logits" (E, h, w), and "sentence" (E, sentence_dim) if the method asked
            for an existence head.
        """
        raise NotImplementedError

    def mask_losses(self, outputs: dict[str, Tensor], masks: Tensor) -> dict[str, Tensor]:
        """Weighted losses per expression; here ``loss`` at the size of the predicted masks.

        Args:
            outputs: of ``segment``.
            masks: bool (E, H, W) referred masks at the input size; all False = no target.

        Returns:
            name (starting with "loss") -> (E,)
        """
        logits = outputs["mask_logits"]
        return self.loss(logits, self.shrink_targets(masks, logits.shape[-2:]))

    def prepare_targets(self, batched_inputs: list[dict]) -> dict[str, Any]:
        """What ``losses`` compares outputs with, made on the CPU and moved before the forward pass.

        Args:
            batched_inputs: as in ``forward``.

        Returns:
            "masks" bool (E, H, W), the referred masks at the padded input size; "exists" float
            (E,).
        """
        exists = torch.cat([x["targets"].any(1) for x in batched_inputs]).float()
        return {
            "masks": self._move(self._referred_masks(batched_inputs)),
            "exists": self._move(exists),
        }

    def losses(self, outputs: dict[str, Any], targets: dict[str, Any]) -> dict[str, Tensor]:
        """Weighted losses of a batch.

        Args:
            outputs: of ``segment``.
            targets: of ``prepare_targets``; E expressions in the order of ``outputs``.

        Returns:
            name (starting with "loss") -> scalar, the mean over the samples of all processes. A
            method whose losses are means over something else says what, for accumulation, by
            ``loss_counts`` (see DeRIS).
        """
        losses = self.mask_losses(outputs, targets["masks"])
        if self.existence_head is not None:
            losses["loss_existence"] = self.existence_weight * F.binary_cross_entropy_with_logits(
                outputs["existence_logits"].float(), targets["exists"], reduction="none"
            )
        count = mean_over_processes(len(targets["exists"]), self.device)
        return {name: loss.sum() / count for name, loss in losses.items()}

    def predict(
        self, outputs: dict[str, Any], rows: slice, inputs: dict
    ) -> tuple[Tensor, Tensor, Tensor | None, list[Instances | None]]:
        """Decide on E expressions of one image.

        Args:
            outputs: of ``segment``.
            rows: where the image's expressions lie in them.
            inputs: the image's dict, as in ``forward``.

        Returns:
            masks bool (E, height, width); scores float (E,); absent bool (E,), whether nothing is
            referred to, or None if that is not the method's to say; E times predicted instances, or
            None.
        """
        logits, scores, absent = self.decide(outputs, rows, inputs)
        return self.restore(logits, inputs), scores, absent, [None] * len(scores)

    def decide(
        self, outputs: dict[str, Any], rows: slice, inputs: dict
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """The part of ``predict`` that does not depend on the output's size: exported graphs have
        it.

        Returns:
            mask logits (E, h, w), over the whole input; scores and absent as of ``predict``.
        """
        logits = outputs["mask_logits"][rows].float()
        if self.existence_head is None:
            return logits, logits.flatten(1).max(1).values.sigmoid(), None
        scores = outputs["existence_logits"][rows].float().sigmoid()
        return logits, scores, scores < self.threshold("existence_threshold", inputs)

    def probabilities(self, outputs: dict[str, Any], rows: slice, inputs: dict) -> Tensor:
        """Of which ``predict`` makes the masks: float (E, height, width); arguments as there."""
        return self.restore(outputs["mask_logits"][rows].float(), inputs, threshold=None)

    # detectron2's contract.

    @property
    def device(self) -> torch.device:
        return self.pixel_mean.device

    def forward(self, batched_inputs: list[dict]) -> dict[str, Tensor] | list[dict]:
        """
        Args:
            batched_inputs: one dict per unit, as ReferringMapper makes them: "image" uint8 (3, h,
                w), "views", "input_ids" int64 (E, L), "text_mask" bool (E, L); in training
                "instances" with gt_masks (N, h, w) and "targets" bool (E, N); in evaluation
                "height", "width", "content_box" (x0, y0, x1, y1) in input pixels, "expressions"; if
                wished "thresholds" (see ``thresholds``) and "probabilities": True.

        Returns:
            training: name -> scalar loss, means over the expressions of all processes.
            evaluation: per unit {"referring": [...]}, one dict per expression: "expression_id",
            "mask" bool (height, width) on the model's device, "score" (existence probability if
            there is a head, else the highest mask probability), "no_target", "instances", and
            "probabilities" float (height, width) where the input asks for them.
        """
        if self.training:
            self._warn_of_what_nobody_applied()
            return self._training_step(batched_inputs)
        return self.answer(self.encode(batched_inputs), batched_inputs)

    def _warn_of_what_nobody_applied(self) -> None:
        if self.to_be_applied:
            logger.warning(
                "%s is trained without what the config says under %s: the optimizer was not built "
                "by ris_d2.engine.build_optimizer, or the weights were not loaded by "
                "ris_d2.checkpoint.load_init. docs/extending.md has the lines for another trainer",
                type(self).__name__,
                " and ".join(sorted(self.to_be_applied)),
            )
            self.to_be_applied.clear()  # said once

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if isinstance(value, nn.Module):
            # Here, so that optimizer and DDP, whoever builds them, find frozen what is to
            # be frozen.
            self._freeze(part for part in self.freeze if part.split(".")[0] == name)

    def train(self, mode: bool = True) -> "ReferringSegmenter":
        """As nn.Module's, but frozen parts are in the mode that ``freeze`` says.

        Raises:
            ValueError: ``freeze`` or ``checkpoint_activations`` names a part that is not there, or
                the latter one without layers.
        """
        super().train(mode)
        self._freeze(self.freeze)
        for part in self.checkpoint_activations:
            module = self if part == "all" else self._part("CHECKPOINT_ACTIVATIONS", part)
            if not checkpoint_layers(module):
                raise ValueError(
                    f"MODEL.RIS.CHECKPOINT_ACTIVATIONS names {part!r}, which has no such layers"
                )
        return self

    def _freeze(self, parts: Iterable[str]) -> None:
        for part in parts:
            module = self._part("FREEZE", part)
            module.requires_grad_(False).train(self.training and self.freeze[part] == "train")

    def _part(self, key: str, name: str) -> nn.Module:
        try:
            return self.get_submodule(name)
        except AttributeError:
            known = [child for child, _ in self.named_children()]
            raise ValueError(f"MODEL.RIS.{key} names {name!r}; the parts are {known}") from None

    # What the base does.

    def _training_step(self, batched_inputs: list[dict]) -> dict[str, Tensor]:
        text = self._collate_text(batched_inputs)
        images, views = self._collate_images(batched_inputs)
        # Before the forward pass: a GPU copies them while it computes, and the losses
        # need not wait.
        targets = self.prepare_targets(batched_inputs)
        with self._autocast():
            outputs = self._run("run_segment", self._run("encode_images", images, views), *text)
        return self.losses(outputs, targets)

    @property
    def thresholds(self) -> dict[str, float]:
        """What decides in evaluation; an input's "thresholds" may set them, by these names."""
        used = {"mask_threshold": self.mask_threshold}
        if self.existence_head is not None:
            used["existence_threshold"] = self.existence_threshold
        if self.no_target == "area":
            used["min_area"] = self.min_area
        return used

    def threshold(self, name: str, inputs: dict) -> float:
        """The threshold of one image's input: its own, or the model's."""
        return inputs.get("thresholds", {}).get(name, getattr(self, name))

    @torch.no_grad()
    def encode(self, batched_inputs: list[dict]) -> Any:
        """Features of B inputs, whatever their sentences, for any number of calls of ``answer``."""
        images, views = self._collate_images(batched_inputs)
        with self._autocast():
            return self._run("encode_images", images, views)

    @torch.no_grad()
    def answer(self, features: Any, batched_inputs: list[dict]) -> list[dict]:
        """Evaluate the expressions of the inputs that ``features`` are of; see ``forward``."""
        text = self._collate_text(batched_inputs)
        results: list[dict] = []
        owners = [(x, e) for x in batched_inputs for e in x["expressions"]]
        size = self._slice_size(len(owners))
        for start in range(0, len(owners), size):
            part = slice(start, start + size)
            with self._autocast():
                outputs = self._run("run_segment", features, *(x[part] for x in text))
            results.extend(self._results(outputs, owners[part]))
        # All numbers at once and last: reading waits for a GPU.
        numbers = torch.stack([torch.stack([x["score"], x["no_target"]]) for x in results])
        for result, (score, no_target) in zip(results, numbers.tolist(), strict=True):
            result.update(score=score, no_target=bool(no_target))
        remaining = iter(results)
        return [{"referring": [next(remaining) for _ in x["expressions"]]} for x in batched_inputs]

    def _slice_size(self, count: int) -> int:
        """How many of ``count`` expressions are answered at a time."""
        if not self.compiles or self.device.type != "cpu":
            return self.max_expressions
        # torch asks whether a CPU's convolution has 16 images, and so another graph would be made. Equal
        # slices, for one of a single expression has another graph, too.
        slices = math.ceil(count / min(self.max_expressions, 15))
        return math.ceil(count / slices)

    def _run(self, method: str, *arguments: Any) -> Any:
        """Call a method of this object, compiled if MODEL.RIS.COMPILE says so."""
        # The first call is not: it computes what depends on sizes alone, which must not be traced.
        if not self.compiles or method not in self._ran:
            self._ran.add(method)
            return getattr(self, method)(*arguments)
        if method == "run_segment":
            for text in arguments[1:]:  # one graph for all numbers and lengths of sentences
                for dimension in range(text.ndim):
                    torch._dynamo.maybe_mark_dynamic(text, dimension)
        # Not a bound method: a copy of the model must not compute with the weights of its original.
        return _compiled(getattr(type(self), method))(self, *arguments)

    def run_segment(self, features: Any, *text: Tensor) -> dict[str, Any]:
        """``segment``, and "existence_logits" (E,) of the existence head if there is one."""
        outputs = self.segment(features, *text)
        if self.existence_head is not None:
            outputs["existence_logits"] = self.existence_head(outputs["sentence"])
        return outputs

    def _results(self, outputs: dict[str, Any], owners: Sequence[tuple[dict, dict]]) -> list[dict]:
        """Outputs of E expressions and the (input, expression) each belongs to -> E results, whose
        "score" and "no_target" are float tensors ()."""
        results = []
        # Expressions of one image share its geometry and are restored together.
        for group in _runs([id(x) for x, _ in owners]):
            inputs = owners[group.start][0]
            masks, scores, absent, instances = self.predict(outputs, group, inputs)
            min_area = self.threshold("min_area", inputs)
            absent = says_nothing(masks, absent, rule=self.no_target, min_area=min_area)
            masks &= ~absent[:, None, None]
            columns = {
                "mask": masks,
                "score": scores,
                "no_target": absent.float(),
                "instances": instances,
            }
            if inputs.get("probabilities"):
                columns["probabilities"] = self.probabilities(outputs, group, inputs)
            rows = zip(*columns.values(), strict=True)
            results.extend(
                {"expression_id": expression["expression_id"], **dict(zip(columns, row))}
                for (_, expression), row in zip(owners[group], rows, strict=True)
            )
        return results

    def shrink_targets(self, masks: Tensor, size: tuple[int, int]) -> Tensor:
        """Masks bool (E, H, W) at the input size -> targets float (E, h, w) in [0, 1]."""
        return resize_maps(masks, size, self.target_resizing)

    def restore(self, logits: Tensor, inputs: dict, **threshold: float | None) -> Tensor:
        """Mask logits (E, h, w) of one image -> bool (E, height, width), see ``restore_masks``."""
        return restore_masks(
            logits,
            input_size=self.input_size,
            content_box=inputs["content_box"],
            output_size=(inputs["height"], inputs["width"]),
            order=self.mask_order,
            **{"threshold": self.threshold("mask_threshold", inputs), **threshold},
        )

    def _collate_images(self, batched_inputs: list[dict]) -> tuple[Tensor, dict[str, Tensor]]:
        for x in batched_inputs:
            (h, w), (height, width) = x["image"].shape[-2:], self.input_size
            if h > height or w > width:
                raise ValueError(
                    f"{x.get('file_name', 'image')}: input of {h}x{w} exceeds "
                    f"INPUT.RIS.SIZE {height}x{width}"
                )
        images = self._normalize([self._pad(x["image"]) for x in batched_inputs])
        for image, x in zip(images, batched_inputs, strict=True):
            h, w = x["image"].shape[-2:]
            image[:, h:], image[:, :, w:] = 0, 0  # the mean's colour, not black
        views = {
            name: self._normalize([x["views"][name] for x in batched_inputs])
            for name in batched_inputs[0].get("views", {})
        }
        return images, views

    def _normalize(self, images: Sequence[Tensor]) -> Tensor:
        """uint8 (3, H, W) each, one size -> float (B, 3, H, W) on the model's device."""
        return (self._move(torch.stack(list(images))) - self.pixel_mean) / self.pixel_std

    def _move(self, tensor: Tensor) -> Tensor:
        """To the model's device; the host does not wait for a GPU."""
        if self.device.type == "cuda" and tensor.device.type == "cpu" and torch.cuda.is_available():
            tensor = tensor.pin_memory()
        return tensor.to(self.device, non_blocking=True)

    def _collate_text(self, batched_inputs: list[dict]) -> tuple[Tensor, Tensor, Tensor]:
        counts = torch.tensor([len(x["input_ids"]) for x in batched_inputs])
        if not counts.any():
            raise ValueError(
                "no input has an expression: give at least one of the batch a sentence"
            )
        image_index = torch.arange(len(counts)).repeat_interleave(counts)
        input_ids = torch.cat([x["input_ids"] for x in batched_inputs])
        text_mask = torch.cat([x["text_mask"] for x in batched_inputs])
        # Before they move: a GPU would stop at such an id without saying why.
        if self.vocab_size is not None and input_ids.max() >= self.vocab_size:
            raise ValueError(
                f"token id {int(input_ids.max())} is beyond the model's vocabulary of "
                f"{self.vocab_size}: INPUT.RIS.TOKENIZER is not the tokenizer of this model"
            )
        if self.trims_text:
            length = int(text_mask.sum(1).max())
            input_ids, text_mask = input_ids[:, :length], text_mask[:, :length]
        return tuple(self._move(x) for x in (image_index, input_ids, text_mask))

    def _referred_masks(self, batched_inputs: list[dict]) -> Tensor:
        """Union of each expression's instances: bool (E, H, W) at the input size, on the CPU."""
        unions = []
        for x in batched_inputs:
            masks = self._pad(x["instances"].gt_masks.tensor)
            union = x["targets"].float() @ masks.flatten(1).float() > 0
            unions.append(union.view(-1, *masks.shape[1:]))
        return torch.cat(unions)

    def _pad(self, maps: Tensor) -> Tensor:
        """(N, h, w) -> (N, H, W), the model's input size."""
        height, width = self.input_size
        return F.pad(maps, (0, width - maps.shape[-1], 0, height - maps.shape[-2]))

    def _autocast(self) -> contextlib.AbstractContextManager:
        if self.precision == "auto":  # asked now, when the device is known
            self.precision = fastest_precision(self, self.device)
        dtype = PRECISIONS[self.precision]
        if dtype is None:
            return contextlib.nullcontext()
        if dtype is torch.float16 and self.device.type == "cpu":
            raise ValueError("MODEL.RIS.PRECISION fp16 needs a GPU; use bf16 on a CPU")
        return torch.autocast(self.device.type, dtype)


@functools.cache
def _compiled(function: Callable) -> Callable:
    """
    Raises:
        ValueError: no C++ compiler, which torch.compile would miss with a page of its own.
    """
    compiler = os.environ.get("CXX", "g++")
    if not shutil.which(compiler):
        raise ValueError(
            f"MODEL.RIS.COMPILE needs a C++ compiler, and there is no {compiler}: install one, "
            "name it in $CXX, or leave COMPILE False"
        )
    return torch.compile(function, fullgraph=True)


def _runs(keys: Sequence[int]) -> list[slice]:
    """Slices of equal neighbours."""
    starts = [i for i, key in enumerate(keys) if i == 0 or key != keys[i - 1]]
    return [slice(a, b) for a, b in zip(starts, [*starts[1:], len(keys)], strict=True)]
