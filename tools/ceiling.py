#!/usr/bin/env python3
"""The best masks that a method's training targets and its inference leave room for, and where they
lie.

    python tools/ceiling.py --config-file configs/risam_sam_vit_h.yaml [--config-file ...] [--json]

Ellipses of known outline on a 480 x 640 image go through the method's own mapper and loss: free
mask logits in place of the model's are fitted to that loss, then restored to the image's size by
the method's own inference. What such a perfect model loses is lost by resizing alone. Printed per
diameter of the ellipses: the mean IoU (%), and how far the masks' centroids lie from the ellipses'
in the mean, in pixels of the model's input (right and down are positive). A shift of all masks to
one side is what targets teach that are not aligned with the predictions. Needs no weights and no
data; the model is built as it stands in the config, with random weights.
"""

import argparse
import json
import os
import tempfile
from typing import Any

from _program import Parser, load, run


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(__doc__)
    parser.add_config_file(required=True, action="append", help="may be given several times")
    parser.add_argument("--ellipses", type=int, default=24, help="per range of diameters")
    parser.add_argument("--steps", type=int, default=200, help="of the fit of the logits")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    parse()  # --help and mistakes are answered before the imports below, which take seconds

import cv2
import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.modeling import build_model
from detectron2.structures import BoxMode
from tabulate import tabulate
from torch import Tensor

from ris_d2.data.mapper import ReferringMapper
from ris_d2.masks import rasterize
from ris_d2.modeling.segmenter import ReferringSegmenter
from ris_d2.refshapes import write_tokenizer

HEIGHT, WIDTH = 480, 640
DIAMETERS = ((20, 40), (40, 90), (90, 250))  # pixels of the image; both axes of an ellipse
RATE = 0.2  # of Adam, on logits


def measure(cfg: CfgNode, *, per_band: int, steps: int, seed: int = 0) -> dict:
    """Fit free logits to the losses of ``cfg``'s method and restore them.

    Args:
        per_band: ellipses per range of DIAMETERS.
        steps: of the fit.

    Returns:
        {"<from>-<to>": {"iou": mean IoU in percent, "shift": [x, y] mean shift of centroids in
        pixels of the model's input}}
    """
    cfg = cfg.clone()
    cfg.defrost()
    cfg.MODEL.INIT, cfg.MODEL.WEIGHTS = [], ""
    cfg.TEST.RESOLUTION = ()  # masks at the image's own size, whatever the published protocol
    ris = cfg.INPUT.RIS
    ris.FLIP_PROB = ris.BRIGHTNESS = ris.SATURATION = 0.0
    ris.AFFINE.ENABLED = False
    torch.manual_seed(seed)
    with tempfile.TemporaryDirectory() as folder:
        write_tokenizer(os.path.join(folder, "tokenizer"))
        # Sentences play no part: any tokenizer whose ids the model knows will do.
        ris.TOKENIZER.KIND, ris.TOKENIZER.PATH = "hf", os.path.join(folder, "tokenizer")
        record = _ellipses(os.path.join(folder, "image.png"), per_band, np.random.default_rng(seed))
        trained = ReferringMapper(cfg)(record, np.random.default_rng(seed))
        tested = ReferringMapper(cfg, is_train=False)(record)
    model = build_model(cfg).eval()
    outputs, logits = _free_outputs(model, tested)
    optimizer = torch.optim.Adam([logits], lr=RATE)
    targets = model.prepare_targets([trained])
    for _ in range(steps):
        optimizer.zero_grad()
        sum(model.losses(outputs, targets).values()).backward()
        optimizer.step()
    with torch.no_grad():
        masks = model.predict(outputs, slice(None), tested)[0].numpy()
    return _compare(record, masks, tested)


def _ellipses(file_name: str, per_band: int, rng: np.random.Generator) -> dict:
    """A record of one blank image with an expression for each ellipse."""
    cv2.imwrite(file_name, np.zeros((HEIGHT, WIDTH, 3), np.uint8))
    angles = np.linspace(0, 2 * np.pi, 128, endpoint=False)
    annotations = []
    for low, high in np.repeat(DIAMETERS, per_band, axis=0):
        radii = rng.uniform(low, high, 2) / 2
        turn = rng.uniform(0, np.pi)
        along, across = radii[0] * np.cos(angles), radii[1] * np.sin(angles)
        x = rng.uniform(high / 2, WIDTH - high / 2) + along * np.cos(turn) - across * np.sin(turn)
        y = rng.uniform(high / 2, HEIGHT - high / 2) + along * np.sin(turn) + across * np.cos(turn)
        annotations.append(
            {
                "id": len(annotations) + 1,
                "segmentation": [np.stack([x, y], 1).ravel().tolist()],
                "bbox": [x.min(), y.min(), x.max(), y.max()],
                "bbox_mode": BoxMode.XYXY_ABS,
                "category_id": 0,
                "iscrowd": 0,
            }
        )
    return {
        "file_name": file_name,
        "image_id": 1,
        "height": HEIGHT,
        "width": WIDTH,
        "source": "ellipses",
        "annotations": annotations,
        "expressions": [
            {
                "expression_id": a["id"],
                "ref_id": a["id"],
                "text": "the circle",
                "annotation_ids": [a["id"]],
            }
            for a in annotations
        ],
    }


def _free_outputs(model: ReferringSegmenter, inputs: dict) -> tuple[dict[str, Any], Tensor]:
    """Outputs of ``segment`` for all expressions with the mask logits as one free leaf tensor."""
    count = len(inputs["input_ids"])
    one = {**inputs, "input_ids": inputs["input_ids"][:1], "text_mask": inputs["text_mask"][:1]}
    with torch.no_grad():
        features = model.encode_images(*model._collate_images([one]))
        outputs = model.segment(features, *model._collate_text([one]))
    if "rounds" in outputs:  # DeRIS: the last round, with one query that is surely referred to
        shape = outputs["rounds"][-1]["mask_logits"].shape[-2:]
        logits = torch.zeros(count, 1, *shape, requires_grad=True)
        scores = torch.tensor([[10.0, -10.0]]).expand(count, 1, 2)
        rounds = [{"mask_logits": logits, "class_logits": scores}]
        return {"rounds": rounds, "existence_logits": torch.full((count,), 10.0)}, logits
    free = {name: x.expand(count, *x.shape[1:]) for name, x in outputs.items()}
    logits = torch.zeros(count, *outputs["mask_logits"].shape[1:], requires_grad=True)
    return {**free, "mask_logits": logits, "existence_logits": torch.full((count,), 10.0)}, logits


def _compare(record: dict, masks: np.ndarray, inputs: dict) -> dict:
    x0, y0, x1, y1 = inputs["content_box"]
    scale = np.array([(x1 - x0) / WIDTH, (y1 - y0) / HEIGHT])
    truths = [rasterize(a["segmentation"], HEIGHT, WIDTH) for a in record["annotations"]]
    ious = [100 * (m & t).sum() / (m | t).sum() for m, t in zip(masks, truths, strict=True)]
    shifts = [(_centroid(m) - _centroid(t)) * scale for m, t in zip(masks, truths, strict=True)]
    per_band = len(truths) // len(DIAMETERS)
    report = {}
    for number, (low, high) in enumerate(DIAMETERS):
        band = slice(number * per_band, (number + 1) * per_band)
        report[f"{low}-{high}"] = {
            "iou": float(np.mean(ious[band])),
            "shift": np.mean(shifts[band], axis=0).tolist(),
        }
    return report


def _centroid(mask: np.ndarray) -> np.ndarray:
    rows, columns = np.nonzero(mask)
    return np.array([columns.mean(), rows.mean()])


def main(arguments: list[str] | None = None) -> None:
    args = parse(arguments)
    reports = {
        path: measure(load(args, path), per_band=args.ellipses, steps=args.steps)
        for path in args.config_file
    }
    if args.json:
        print(json.dumps(reports, indent=2))
        return
    rows = [
        (
            os.path.basename(path),
            *(
                f"{band['iou']:.1f} ({band['shift'][0]:+.2f}, {band['shift'][1]:+.2f})"
                for band in report.values()
            ),
        )
        for path, report in reports.items()
    ]
    headers = ("IoU in % (shift x, y)", *(f"{low} to {high} px" for low, high in DIAMETERS))
    print(tabulate(rows, headers=headers))


if __name__ == "__main__":
    run(main)
