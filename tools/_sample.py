"""An image with its sentences, made up in place of RefCOCO's, and what it costs mapper and evaluator.

640x480, 3 annotations (polygons of 40 corners), 7 expressions of 4 to 9 words.
"""

import os
import tempfile
import time

import cv2
import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.structures import BitMasks, BoxMode, Instances

from _timing import in_turns, peak_memory_mb, percentile
from ris_d2.data.mapper import ReferringMapper
from ris_d2.evaluation import ReferringEvaluator
from ris_d2.masks import rasterize
from ris_d2.refshapes import write_tokenizer

HEIGHT, WIDTH = 480, 640
ANNOTATIONS, EXPRESSIONS = 3, 7
REAL_TOKENS = 8
WORDS = ("the", "big", "red", "circle", "left", "of", "the", "small", "square")


def model_input(cfg: CfgNode, count: int, *, training: bool = False) -> dict:
    """What the mapper makes of an image with ``count`` expressions; token ids small enough for any model."""
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


def make_record(file_name: str) -> dict:
    """A record as the readers of datasets make them: 3 polygon annotations, 7 expressions of 4 to 9 words."""
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


def make_photo() -> np.ndarray:
    """An image with detail at all scales, so that its jpeg costs about what a photo's costs."""
    rng = np.random.default_rng(0)
    layers = [
        cv2.resize(rng.normal(size=(HEIGHT // s, WIDTH // s, 3)), (WIDTH, HEIGHT)) * s**0.5
        for s in (2, 4, 16, 80)
    ]
    return np.clip(128 + 12 * sum(layers), 0, 255).astype(np.uint8)


def nearly_right(annotation: dict) -> np.ndarray:
    """The annotation's mask moved by 9 pixels: a prediction that is nearly right."""
    return np.roll(rasterize(annotation["segmentation"], HEIGHT, WIDTH), 9, axis=1)


def measure_mapper(cfg: CfgNode, seconds: float) -> dict[str, float]:
    """Training units per second of one process: jpeg and polygons to model input."""
    with tempfile.TemporaryDirectory() as directory:
        record = make_record(os.path.join(directory, "image.jpg"))
        cv2.imwrite(record["file_name"], make_photo()[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, 90])
        cfg.INPUT.RIS.TOKENIZER.KIND = "hf"
        cfg.INPUT.RIS.TOKENIZER.PATH = os.path.join(directory, "tokenizer")
        write_tokenizer(cfg.INPUT.RIS.TOKENIZER.PATH)
        mapper = ReferringMapper(cfg, is_train=True)
        rng = np.random.default_rng(0)
        times = in_turns({"unit": lambda: mapper(record, rng)}, seconds=seconds)["unit"]
    return {
        "input_height": cfg.INPUT.RIS.SIZE[0],
        "input_width": cfg.INPUT.RIS.SIZE[1],
        "units_per_s": 1 / percentile(times, 50),
        "ms_per_unit": 1000 * percentile(times, 50),
        "peak_memory_mb": peak_memory_mb(),
    }


def measure_evaluator(count: int) -> dict[str, float]:
    """Expressions per second of process(), and memory growth over ``count`` of them."""
    record = make_record("image.jpg")
    masks = [nearly_right(a) for a in record["annotations"]]
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
    before = peak_memory_mb()
    images = -(-count // EXPRESSIONS)
    seconds = process(warm_up, images)
    processed = peak_memory_mb()
    begin = time.perf_counter()
    evaluator.evaluate()
    return {
        "expressions": images * EXPRESSIONS,
        "expressions_per_s": images * EXPRESSIONS / seconds,
        "evaluate_s": time.perf_counter() - begin,
        "memory_growth_process_mb": processed - before,
        "memory_growth_evaluate_mb": peak_memory_mb() - processed,
        "peak_memory_mb": peak_memory_mb(),
    }
