#!/usr/bin/env python
"""Write a model as two ONNX graphs, and check them against the model.

    python tools/export.py --model FOLDER --output onnx
    python tools/export.py --config-file configs/asda_clip_vit_b.yaml --weights model_best.pth --output onnx

The output directory then holds what docs/export.md runs without ris_d2 and torch:

    image.onnx      an image -> its features, once per image
    sentences.onnx  features and any number of sentences of any length -> masks, scores, no_target
    export.json     input size, how images and sentences are prepared, how masks are restored
    tokenizer.json  (or the other files that the model's tokenizer is read from)

Both graphs are run by onnxruntime on the CPU with several numbers and lengths of sentences; where a
value differs from the model's by more than 1e-3 (of its size, if that is above 1) the program
fails. It prints the largest difference, and the latencies of both.
"""

import argparse
import importlib.util
import json
import os
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

from _program import Parser, load, run

NEEDED = ("onnx", "onnxscript", "onnxruntime")
TOLERANCE = 1e-3
OUTPUTS = ("mask_logits", "score", "no_target")


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(__doc__)
    parser.add_config_file()
    parser.add_argument(
        "--model", metavar="M", help="a model folder, or a name; see docs/weights.md"
    )
    parser.add_argument("--weights", metavar="FILE", help="a checkpoint; the same as MODEL.WEIGHTS")
    parser.add_argument("--output", required=True, metavar="DIRECTORY", help="made if absent")
    parser.add_argument("--repeats", type=int, default=5, help="runs per latency (default: 5)")
    args = parser.parse_args(arguments)
    if bool(args.config_file) == bool(args.model):
        parser.error("give --model, or --config-file with --weights")
    return args


if __name__ == "__main__":
    parse()  # --help and mistakes are answered before the imports below, which take seconds

import numpy as np
import torch
from tabulate import tabulate
from torch import Tensor, nn
from torch.utils import _pytree as pytree  # there is no public name for it

from ris_d2.io import atomic_write
from ris_d2.modeling.segmenter import ReferringSegmenter
from ris_d2.predictor import Predictor


class ImageGraph(nn.Module):
    """Images with values in 0..255 -> the tensors among the model's features."""

    def __init__(self, model: ReferringSegmenter, views: Sequence[str]):
        super().__init__()
        self.model, self.views = model, tuple(views)
        self.structure: Any = None  # of the features, as of the last call

    def forward(self, image: Tensor, *views: Tensor) -> list[Tensor]:
        """float (1, 3, H, W) each."""
        image, *views = (
            (x - self.model.pixel_mean) / self.model.pixel_std for x in (image, *views)
        )
        features = self.model.encode_images(image, dict(zip(self.views, views, strict=True)))
        leaves, form = pytree.tree_flatten(features)
        tensors = [x for x in leaves if torch.is_tensor(x)]
        self.structure = form, [None if torch.is_tensor(x) else (x,) for x in leaves]
        return tensors


class SentencesGraph(nn.Module):
    """Features of one image, ids int64 (E, L), mask bool (E, L) -> OUTPUTS."""

    def __init__(self, model: ReferringSegmenter, structure: Any):
        super().__init__()
        self.model, self.structure = model, structure

    def forward(
        self, features: list[Tensor], input_ids: Tensor, text_mask: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        form, constants = self.structure
        tensors = iter(features)
        leaves = [next(tensors) if constant is None else constant[0] for constant in constants]
        image_index = input_ids.new_zeros(input_ids.shape[0])
        outputs = self.model.run_segment(
            pytree.tree_unflatten(leaves, form), image_index, input_ids, text_mask
        )
        logits, scores, absent = self.model.decide(outputs, slice(None), {})
        if absent is None or self.model.no_target != "head":
            absent = torch.zeros_like(scores, dtype=torch.bool)
        return logits, scores, absent


def main(arguments: list[str] | None = None) -> list[dict[str, Any]]:
    """Parse ``arguments`` (default: the command line), write, check, print a table and return
    it."""
    args = parse(arguments)
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise ValueError(f"no {' and no '.join(missing)} here: pip install 'ris_d2[export]'")
    predictor = _predictor(args)
    model = predictor.model
    model.requires_grad_(False)  # else attention is traced by a form that ONNX cannot follow
    description = describe(predictor)
    os.makedirs(args.output, exist_ok=True)
    image = ImageGraph(model, list(description["views"]))
    examples = _pictures(description), _sentences(description, 3)
    with torch.no_grad():
        features = image(*examples[0])
        sentences = SentencesGraph(model, image.structure)
        sentences(features, *examples[1])  # constants are computed outside of the traces
    names = [f"feature_{i}" for i in range(len(features))]
    paths = {name: os.path.join(args.output, f"{name}.onnx") for name in ("image", "sentences")}
    _write(image, examples[0], paths["image"], ["image", *description["views"]], names)
    inputs = (features, *examples[1])
    count, length = torch.export.Dim.DYNAMIC, torch.export.Dim.DYNAMIC
    dynamic = ([None] * len(features), {0: count, 1: length}, {0: count, 1: length})
    _write(
        sentences, inputs, paths["sentences"], [*names, "input_ids", "text_mask"], OUTPUTS, dynamic
    )
    predictor.mapper.tokenizer.save(args.output)
    with atomic_write(os.path.join(args.output, "export.json")) as file:
        json.dump(description, file, indent=2)
    rows = check(image, sentences, paths, description, args.repeats)
    print(tabulate(rows, headers="keys", floatfmt=".3g"))
    worst = max(row["difference"] for row in rows)
    if not worst <= TOLERANCE:
        raise ValueError(f"{args.output}: onnxruntime differs from the model by {worst:.2g}")
    return rows


def _predictor(args: argparse.Namespace) -> Predictor:
    options = ["MODEL.DEVICE", "cpu", "MODEL.RIS.PRECISION", "fp32", "MODEL.RIS.COMPILE", "False"]
    if args.model:
        return Predictor.from_pretrained(args.model, [*args.opts, *options], modules=args.modules)
    weights = ["MODEL.WEIGHTS", args.weights] if args.weights else []
    return Predictor(load(args, options=[*weights, *options]))


def describe(predictor: Predictor) -> dict[str, Any]:
    """What export.json says: all that a program needs beside the two graphs."""
    model, cfg, tokenizer = predictor.model, predictor.cfg, predictor.mapper.tokenizer
    return {
        "method": type(model).__name__,
        "input_size": list(model.input_size),
        "views": {name: [height, width] for name, height, width in cfg.INPUT.RIS.VIEWS},
        "geometry": cfg.INPUT.RIS.GEOMETRY,
        "interpolation": cfg.INPUT.RIS.INTERPOLATION,
        # What stands beside the image: zero after normalisation, unless it is a letterbox.
        "padding": list(
            cfg.INPUT.RIS.LETTERBOX_COLOR
            if cfg.INPUT.RIS.GEOMETRY == "letterbox"
            else cfg.MODEL.PIXEL_MEAN
        ),
        "max_tokens": tokenizer.max_tokens,
        "pad_sentences": not model.trims_text,  # to max_tokens, which such a model reads, too
        "start_id": tokenizer.start_id,
        "end_id": tokenizer.end_id,
        "pad_id": tokenizer.pad_id,
        "clean_text": tokenizer.clean,
        "mask_order": model.mask_order,
        "mask_threshold": model.mask_threshold,
        "no_target": model.no_target,
        "min_area": model.min_area,
    }


def _pictures(description: dict[str, Any]) -> tuple[Tensor, ...]:
    sizes = [description["input_size"], *description["views"].values()]
    return tuple(torch.rand(1, 3, *size) * 255 for size in sizes)


def _sentences(description: dict[str, Any], count: int, length: int = 0) -> tuple[Tensor, Tensor]:
    """Ids and mask of random sentences, of up to ``length`` tokens (default: as many as may be)."""
    length = length or description["max_tokens"]
    lengths = torch.randint(3, length + 1, (count, 1))
    lengths[0] = length
    mask = torch.arange(length) < lengths
    return torch.where(mask, torch.randint(5, 50, mask.shape), description["pad_id"]), mask


def _write(
    graph: nn.Module,
    inputs: tuple,
    path: str,
    input_names: Sequence[str],
    output_names: Sequence[str],
    dynamic: Any = None,
) -> None:
    with torch.no_grad():
        program = torch.export.export(graph, inputs, dynamic_shapes=dynamic, strict=False)
        torch.onnx.export(
            program,
            input_names=list(input_names),
            output_names=list(output_names),
            verbose=False,
        ).save(path)


def check(
    image: ImageGraph,
    sentences: SentencesGraph,
    paths: dict[str, str],
    description: dict[str, Any],
    repeats: int,
) -> list[dict[str, Any]]:
    """Run both graphs and the model on new inputs: what, the largest difference, milliseconds."""
    import onnxruntime

    sessions = {
        name: onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        for name, path in paths.items()
    }

    def compare(what: str, graph: nn.Module, session: Any, arguments: tuple) -> dict[str, Any]:
        flat = [x.numpy() for x in pytree.tree_leaves(arguments)]
        names = [x.name for x in session.get_inputs()]
        with torch.no_grad():
            expected, eager = _timed(lambda: graph(*arguments), repeats)
        got, onnx = _timed(lambda: session.run(None, dict(zip(names, flat, strict=True))), repeats)
        difference = max(_difference(a, b.numpy()) for a, b in zip(got, expected, strict=True))
        return {"": what, "difference": difference, "model ms": eager, "onnxruntime ms": onnx}

    pictures = _pictures(description)
    rows = [compare("an image", image, sessions["image"], pictures)]
    with torch.no_grad():
        features = image(*pictures)
    longest = description["max_tokens"]
    lengths = [longest] * 3 if description["pad_sentences"] else [longest, 3, longest // 2 + 2]
    for count, length in zip((1, 2, 8), lengths, strict=True):
        arguments = (features, *_sentences(description, count, length))
        what = f"{count} of {length} tokens"
        rows.append(compare(what, sentences, sessions["sentences"], arguments))
    return rows


def _difference(ours: np.ndarray, expected: np.ndarray) -> float:
    """The largest difference, relative where values are larger than 1."""
    ours, expected = ours.astype(np.float64), expected.astype(np.float64)
    return float((np.abs(ours - expected) / np.maximum(1, np.abs(expected))).max())


def _timed(function: Callable[[], Any], repeats: int) -> tuple[Any, float]:
    """The result, and the median time in milliseconds of ``repeats`` calls after one for
    warm-up."""
    result, times = function(), []
    for _ in range(repeats):
        start = time.perf_counter()
        function()
        times.append(1000 * (time.perf_counter() - start))
    return result, statistics.median(times)


if __name__ == "__main__":
    run(main)
