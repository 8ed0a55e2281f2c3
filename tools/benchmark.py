#!/usr/bin/env python
"""Measure what a configuration costs: model latency, mapper, evaluator, training step.

    python tools/benchmark.py --config-file configs/shared_ris_beit3_b.yaml [--json]
        [--parts model mapper evaluator train] [--threads N] [--batch N] [--expressions N]
        [--seconds S] [KEY VALUE ...]

Nothing has to be downloaded: weights are random and images, annotations and the tokenizer of the
mapper's part are made on the fly. Times are medians over repeats after warm-up. The mapper and the
evaluator run on one thread, as in one worker of a data loader. Every part runs in a process of its
own, so that its peak memory is its own: torch's allocations on a GPU, else all of the process, of
which baseline_memory_mb were there before the part began (Python and libraries). A 640x480 jpeg with
3 polygons of 40 corners and 7 expressions stands for a RefCOCO image.
"""

import argparse
import json
import math
import multiprocessing
import os
import platform
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable

import cv2
import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.modeling import build_model
from detectron2.structures import BitMasks, BoxMode, Instances
from tabulate import tabulate

from ris_d2 import load_config
from ris_d2.data.mapper import ReferringMapper
from ris_d2.data.refshapes import write_tokenizer
from ris_d2.evaluation import ReferringEvaluator
from ris_d2.masks import rasterize

HEIGHT, WIDTH = 480, 640
ANNOTATIONS, EXPRESSIONS = 3, 7
REAL_TOKENS = 8
WORDS = ("the", "big", "red", "circle", "left", "of", "the", "small", "square")


def measure_model(cfg: CfgNode, args: argparse.Namespace) -> dict[str, float]:
    """Latency of one image with 1 and with 8 expressions, and the throughput of the latter."""
    model = build_model(cfg).eval()
    figures = {}
    for count in (1, 8):
        inputs = [_model_input(cfg, count)]
        seconds, repeats = _median_seconds(lambda: model(inputs), args.seconds, model.device)
        noun = "expression" if count == 1 else "expressions"
        figures[f"latency_{count}_{noun}_ms"] = 1000 * seconds
        figures[f"repeats_{count}_{noun}"] = repeats
        figures[f"expressions_per_s_at_{count}"] = count / seconds
    figures["peak_memory_mb"] = _peak_memory_mb(model.device)
    return figures


def measure_train(cfg: CfgNode, args: argparse.Namespace) -> dict[str, float]:
    """Forward, backward and AdamW step of ``--batch`` units, with the expressions of INPUT.RIS.UNIT."""
    model = build_model(cfg).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    count = cfg.INPUT.MAX_EXPRESSIONS if cfg.INPUT.RIS.UNIT == "image" else 1
    inputs = [_model_input(cfg, count, training=True) for _ in range(args.batch)]

    def step() -> None:
        optimizer.zero_grad()
        sum(model(inputs).values()).backward()
        optimizer.step()

    seconds, repeats = _median_seconds(step, args.seconds, model.device)
    return {
        "batch_units": args.batch,
        "expressions_per_unit": count,
        "step_ms": 1000 * seconds,
        "repeats": repeats,
        "units_per_s": args.batch / seconds,
        "peak_memory_mb": _peak_memory_mb(model.device),
    }


def measure_mapper(cfg: CfgNode, args: argparse.Namespace) -> dict[str, float]:
    """Training units per second of one process: jpeg and polygons to model input."""
    with tempfile.TemporaryDirectory() as directory:
        record = _record(os.path.join(directory, "image.jpg"))
        cv2.imwrite(record["file_name"], _photo()[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, 90])
        cfg.INPUT.RIS.TOKENIZER.KIND = "hf"
        cfg.INPUT.RIS.TOKENIZER.PATH = os.path.join(directory, "tokenizer")
        write_tokenizer(cfg.INPUT.RIS.TOKENIZER.PATH)
        mapper = ReferringMapper(cfg, is_train=True)
        rng = np.random.default_rng(0)
        seconds, repeats = _median_seconds(lambda: mapper(record, rng), args.seconds)
    return {
        "input_height": cfg.INPUT.RIS.SIZE[0],
        "input_width": cfg.INPUT.RIS.SIZE[1],
        "units_per_s": 1 / seconds,
        "ms_per_unit": 1000 * seconds,
        "repeats": repeats,
        "peak_memory_mb": _peak_memory_mb(),
    }


def measure_evaluator(cfg: CfgNode, args: argparse.Namespace) -> dict[str, float]:
    """Expressions per second of process(), and memory growth over ``--expressions`` of them."""
    record = _record("image.jpg")
    masks = [_mask(a) for a in record["annotations"]]
    evaluator = ReferringEvaluator("benchmark", distributed=False)

    def process(start: int, images: int) -> float:
        begin = time.perf_counter()
        for image in range(start, start + images):
            expressions = [
                {**e, "expression_id": image * EXPRESSIONS + i, "ref_id": image * EXPRESSIONS + i}
                for i, e in enumerate(record["expressions"])
            ]
            referring = [
                {
                    "expression_id": e["expression_id"],
                    "mask": torch.from_numpy(masks[i % ANNOTATIONS]),
                    "score": 0.9,
                    "no_target": False,
                    "instances": None,
                }
                for i, e in enumerate(expressions)
            ]
            inputs = {**record, "image_id": image, "expressions": expressions}
            evaluator.process([inputs], [{"referring": referring}])
        return time.perf_counter() - begin

    evaluator.reset()
    warm_up = 50
    process(0, warm_up)
    before = _peak_memory_mb()
    images = math.ceil(args.expressions / EXPRESSIONS)
    seconds = process(warm_up, images)
    processed = _peak_memory_mb()
    begin = time.perf_counter()
    evaluator.evaluate()
    return {
        "expressions": images * EXPRESSIONS,
        "expressions_per_s": images * EXPRESSIONS / seconds,
        "evaluate_s": time.perf_counter() - begin,
        "memory_growth_process_mb": processed - before,
        "memory_growth_evaluate_mb": _peak_memory_mb() - processed,
        "peak_memory_mb": _peak_memory_mb(),
    }


PARTS: dict[str, Callable[[CfgNode, argparse.Namespace], dict[str, float]]] = {
    "model": measure_model,
    "mapper": measure_mapper,
    "evaluator": measure_evaluator,
    "train": measure_train,
}
ONE_THREAD = ("mapper", "evaluator")


def run_part(part: str, args: argparse.Namespace) -> dict[str, float]:
    """Measure one part in this process; adds the number of threads it ran on."""
    threads = 1 if part in ONE_THREAD else args.threads or torch.get_num_threads()
    torch.set_num_threads(threads)
    cv2.setNumThreads(threads)
    torch.manual_seed(0)
    cfg = load_config(args.config_file, args.opts)
    baseline = _peak_memory_mb(torch.device(cfg.MODEL.DEVICE) if part not in ONE_THREAD else None)
    return {"threads": threads, **PARTS[part](cfg, args), "baseline_memory_mb": baseline}


def main(arguments: list[str] | None = None) -> dict:
    """Parse ``arguments`` (default: the command line), measure, print and return the figures."""
    args = _parse(arguments)
    cfg = load_config(args.config_file, args.opts)
    cuda = cfg.MODEL.DEVICE.startswith("cuda")
    processor = f"{platform.machine()} CPU, {os.cpu_count()} cores"
    report = {
        "config_file": args.config_file,
        "device": torch.cuda.get_device_name() if cuda else processor,
        "precision": cfg.MODEL.RIS.PRECISION,
        "torch": torch.__version__,
        "parts": {},
    }
    context = multiprocessing.get_context("spawn")
    for part in args.parts:
        with context.Pool(1) as pool:
            report["parts"][part] = pool.apply(run_part, (part, args))
    if args.json:
        print(json.dumps(report, indent=2))
    else:
        print(", ".join(f"{key} {value}" for key, value in report.items() if key != "parts"))
        rows = [(p, name, v) for p, f in report["parts"].items() for name, v in f.items()]
        print(tabulate(rows, headers=("part", "measure", "value"), floatfmt=".1f"))
    return report


def _median_seconds(
    function: Callable[[], object], budget: float, device: torch.device | None = None
) -> tuple[float, int]:
    """Median time of a call and their number: after two for warm-up at least five, and ``budget`` s."""
    synchronize = (
        torch.cuda.synchronize if device is not None and device.type == "cuda" else lambda: None
    )
    for _ in range(2):
        function()
    synchronize()
    times: list[float] = []
    while len(times) < 5 or sum(times) < budget:
        begin = time.perf_counter()
        function()
        synchronize()
        times.append(time.perf_counter() - begin)
    return statistics.median(times), len(times)


def _peak_memory_mb(device: torch.device | None = None) -> float:
    """Most memory so far: of torch's allocator on a GPU, else resident memory of this process."""
    if device is not None and device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)


def _model_input(cfg: CfgNode, count: int, *, training: bool = False) -> dict:
    """A model input of design.md with ``count`` expressions; token ids are small enough for any model."""
    height, width = cfg.INPUT.RIS.SIZE
    generator = torch.Generator().manual_seed(count)
    length = cfg.INPUT.RIS.MAX_TOKENS
    text_mask = torch.zeros(count, length, dtype=torch.bool)
    text_mask[:, :REAL_TOKENS] = True
    inputs = {
        "image": torch.randint(256, (3, height, width), dtype=torch.uint8, generator=generator),
        "views": {
            name: torch.randint(256, (3, h, w), dtype=torch.uint8, generator=generator)
            for name, h, w in cfg.INPUT.RIS.VIEWS
        },
        "content_box": (0.0, 0.0, float(width), float(height)),
        "height": HEIGHT,
        "width": WIDTH,
        "input_ids": torch.randint(8, 30, (count, length), generator=generator) * text_mask,
        "text_mask": text_mask,
        "expressions": [{"expression_id": i} for i in range(count)],
    }
    if training:
        masks = torch.zeros(ANNOTATIONS, height, width, dtype=torch.bool)
        for i in range(ANNOTATIONS):
            masks[i, height // 4 : height // 2, i * width // 8 : (i + 2) * width // 8] = True
        inputs["instances"] = Instances((height, width), gt_masks=BitMasks(masks))
        inputs["instances"].annotation_id = torch.arange(ANNOTATIONS)
        inputs["targets"] = torch.eye(ANNOTATIONS, dtype=torch.bool)[
            torch.arange(count) % ANNOTATIONS
        ]
    return inputs


def _record(file_name: str) -> dict:
    """A record of design.md: 3 polygon annotations, 7 expressions of 4 to 9 words."""
    annotations = []
    for i in range(ANNOTATIONS):
        angle = np.linspace(0, 2 * np.pi, 40, endpoint=False)
        radius = 70 + 20 * np.sin(5 * angle + i)
        x = 160 * (i + 1) + radius * np.cos(angle)
        y = 240 + 1.4 * radius * np.sin(angle)
        annotations.append(
            {
                "id": i + 1,
                "segmentation": [np.stack([x, y], axis=1).ravel().tolist()],
                "bbox": [x.min(), y.min(), x.max() - x.min(), y.max() - y.min()],
                "bbox_mode": BoxMode.XYWH_ABS,
                "category_id": 0,
                "iscrowd": 0,
            }
        )
    expressions = [
        {
            "expression_id": i,
            "ref_id": i,
            "text": " ".join(WORDS[: 4 + i % 6]),
            "annotation_ids": [i % ANNOTATIONS + 1],
        }
        for i in range(EXPRESSIONS)
    ]
    return {
        "file_name": file_name,
        "image_id": 0,
        "height": HEIGHT,
        "width": WIDTH,
        "source": "benchmark",
        "annotations": annotations,
        "expressions": expressions,
    }


def _photo() -> np.ndarray:
    """An image with detail at all scales, so that its jpeg costs about what a photo's costs."""
    rng = np.random.default_rng(0)
    layers = [
        cv2.resize(rng.normal(size=(HEIGHT // s, WIDTH // s, 3)), (WIDTH, HEIGHT)) * s**0.5
        for s in (2, 4, 16, 80)
    ]
    return np.clip(128 + 12 * sum(layers), 0, 255).astype(np.uint8)


def _mask(annotation: dict) -> np.ndarray:
    """The annotation's mask moved by 9 pixels: a prediction that is nearly right."""
    return np.roll(rasterize(annotation["segmentation"], HEIGHT, WIDTH), 9, axis=1)


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config-file", required=True, metavar="FILE")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--threads", type=int, help="of model and train (default: torch's choice)")
    parser.add_argument("--batch", type=int, default=2, help="units per training step")
    parser.add_argument("--expressions", type=int, default=3500, help="of the evaluator's part")
    parser.add_argument("--seconds", type=float, default=3.0, help="least time per measurement")
    parser.add_argument(
        "opts", nargs=argparse.REMAINDER, metavar="KEY VALUE", help="changes to the configuration"
    )
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
