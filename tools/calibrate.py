"""Choose a trained model's thresholds on a validation set. The model runs once.

    python tools/calibrate.py --config-file C --weights W --output output/calibration

Swept are MODEL.RIS.MASK_THRESHOLD and, where the model says by a score that nothing is there, the
threshold of that: MODEL.DERIS.SCORE_THRESHOLD (T_ref) or MODEL.RIS.EXISTENCE_THRESHOLD. Per
sentence only pixel counts at each threshold are kept. --output gets calibrated.yaml, the
configuration with the best thresholds (use it as --config-file; KEY VALUE changes are not in it),
curves.png and sweep.json, every pair of thresholds with its metrics. Thresholds chosen on a test
split would make its numbers worthless: such splits are refused.
"""

import argparse
import json
import os
from typing import TYPE_CHECKING, Any

from _program import Parser, fail, load, run

if TYPE_CHECKING:
    from detectron2.config import CfgNode


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(__doc__)
    parser.add_config_file(required=True)
    parser.add_argument("--weights", help="checkpoint; default: the config's MODEL.WEIGHTS")
    parser.add_argument(
        "--dataset", help="name of a validation set; default: the only one in DATASETS.TEST"
    )
    parser.add_argument("--metric", help="to be highest; default: the config's TEST.BEST_METRIC")
    parser.add_argument("--output", required=True, help="folder, made if absent")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    parse()  # --help and mistakes are answered before the imports below, which take seconds

import numpy as np
import torch
import yaml
from detectron2.evaluation import inference_on_dataset
from detectron2.utils.logger import setup_logger
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from ris_d2.checkpoint import RISCheckpointer
from ris_d2.data.loader import build_test_loader
from ris_d2.engine import Trainer
from ris_d2.engine.preflight import check_inputs
from ris_d2.evaluation import compute_metrics
from ris_d2.evaluation.evaluator import ground_truth
from ris_d2.evaluation.report import finite_or_null
from ris_d2.io import atomic_write
from ris_d2.modeling.segmenter import ReferringSegmenter
from ris_d2.paper_tables import is_paper_row, nested

DECISIONS = [round(0.01 * step, 2) for step in range(1, 100)]
# Fewer: at each, all masks are made anew.
MASK_THRESHOLDS = [round(0.05 * step, 2) for step in range(4, 17)]
MASK_KEY = "MODEL.RIS.MASK_THRESHOLD"
# A model's threshold of the score by which it says that nothing is there -> its key.
DECISION_KEYS = {
    "score_threshold": "MODEL.DERIS.SCORE_THRESHOLD",
    "existence_threshold": "MODEL.RIS.EXISTENCE_THRESHOLD",
}
SHOWN = ("gIoU", "cIoU", "mIoU", "N_acc", "T_acc")


def check_split(name: str) -> None:
    """Raise ValueError for a split whose numbers are to be reported."""
    if any(part.startswith("test") or part == "heldout" for part in name.split("_")):
        raise ValueError(
            f"{name} is a test split: thresholds chosen on it would make its numbers worthless. "
            "Choose them on a val split"
        )


class Sweep:
    """Pixel counts of every sentence at every mask threshold, gathered while ``model`` evaluates.

    Of a model that unites instances (DeRIS) the counts are kept for the union of its best one, two,
    ...; of any other there is one mask, as good as one instance.
    """

    def __init__(self, model: ReferringSegmenter, *, sample: str):
        """``sample``: of ground truth that is resized (TEST.SAMPLE)."""
        own = model.thresholds
        self.model = model
        self.sample = sample
        self.unites = "score_threshold" in own
        if self.unites:
            model.return_instances = True
        decision = next((name for name in DECISION_KEYS if name in own), None)
        self.decision_key = DECISION_KEYS.get(decision)
        self.configured = own.get(decision, 0.0), own["mask_threshold"]
        self.decisions = sorted({*DECISIONS, own[decision]}) if decision else [0.0]
        self.mask_thresholds = sorted({*MASK_THRESHOLDS, own["mask_threshold"]})
        self._predict, model.predict = model.predict, self._count
        self._inputs: dict = {}
        self._parts: dict[str, list] = {"scores": [], "areas": [], "shared": [], "truth": []}
        self._targets: list[bool] = []

    def _count(self, outputs: dict[str, Any], rows: slice, inputs: dict) -> tuple:
        """In place of the model's ``predict``; an image's sentences may come in several parts."""
        truths = self._next(inputs, rows.stop - rows.start)
        areas, shared = [], []
        for threshold in self.mask_thresholds:
            asked = {**inputs, "thresholds": {"mask_threshold": threshold}}
            masks, scores, absent, instances = self._predict(outputs, rows, asked)
            counted = [_united(i.pred_masks, i.scores) for i in instances] if self.unites else masks
            counts = [_areas(m, truth) for m, truth in zip(counted, truths, strict=True)]
            areas.append(torch.stack([area for area, _ in counts]))
            shared.append(torch.stack([area for _, area in counts]))
        if self.unites:
            scores = torch.stack([i.scores.sort(descending=True).values for i in instances])
        self._parts["scores"].append(scores.float().view(len(masks), -1).cpu().numpy())
        self._parts["areas"].append(torch.stack(areas, 1).int().cpu().numpy())
        self._parts["shared"].append(torch.stack(shared, 1).int().cpu().numpy())
        self._parts["truth"].append(truths.flatten(1).sum(1).cpu().numpy())
        return masks, scores[:, 0] if self.unites else scores, absent, instances

    def _next(self, inputs: dict, number: int) -> Tensor:
        """Ground truth of the image's next ``number`` sentences, bool (number, H, W)."""
        if inputs is not self._inputs:
            self._inputs, self._done = inputs, 0
            self._truths, self._which = ground_truth(inputs, self.sample)
        part = slice(self._done, self._done + number)
        self._done += number
        self._targets += [bool(e["annotation_ids"]) for e in inputs["expressions"][part]]
        truths = np.stack([self._truths[i] for i in self._which[part]])
        return torch.from_numpy(truths).to(self.model.device)

    def finish(self) -> None:
        """Make one array of each count: scores (n, Q), areas and shared (n, thresholds, Q), truth
        (n,)."""
        self.counts = {name: np.concatenate(parts) for name, parts in self._parts.items()}
        self.no_target = ~np.array(self._targets)

    def metrics(self, decision: float, mask_threshold: float) -> dict[str, float]:
        """What an evaluation with these thresholds reports."""
        model, counts = self.model, self.counts
        scores, limit = counts["scores"], np.float32(decision)
        if self.decision_key is None:
            number = np.ones(len(scores), int)
        else:
            number = (scores > limit if self.unites else scores >= limit).sum(1)
        if getattr(model, "keep_best", False):
            number = np.maximum(number, 1)
        where = np.arange(len(scores)), self.mask_thresholds.index(mask_threshold), number - 1
        area, shared = (np.where(number > 0, counts[n][where], 0) for n in ("areas", "shared"))
        absent = {"none": number < 0, "area": area < model.min_area, "head": number == 0}
        said = absent[model.no_target]
        area, shared = np.where(said, 0, area), np.where(said, 0, shared)
        return compute_metrics(
            intersection=shared,
            union=area + counts["truth"] - shared,
            no_target=self.no_target,
            predicted_no_target=said,
        )


def _united(masks: Tensor, scores: Tensor) -> Tensor:
    """bool (Q, H, W), float (Q,) -> bool (Q, H, W): the union of the best one, two, ... of the
    masks."""
    return masks[scores.argsort(descending=True)].to(torch.uint8).cummax(0).values.bool()


def _areas(masks: Tensor, truth: Tensor) -> tuple[Tensor, Tensor]:
    """bool (H, W) or (Q, H, W), bool (H, W) -> int64 (1,) or (Q,): areas, and areas inside
    ``truth``."""
    masks = masks.view(-1, *truth.shape)
    return masks.flatten(1).sum(1), (masks & truth).flatten(1).sum(1)


def choose(sweep: Sweep, metric: str) -> tuple[list[dict[str, Any]], tuple[float, float]]:
    """Every pair of thresholds with its metrics, and the best pair, of equal ones the nearest to
    the config's.

    Raises:
        ValueError: no such metric, or it is nowhere defined.
    """
    table = [
        {"decision": decision, "mask_threshold": mask, **sweep.metrics(decision, mask)}
        for decision in sweep.decisions
        for mask in sweep.mask_thresholds
    ]
    if metric not in table[0]:
        raise ValueError(f"no metric {metric!r}; there are {', '.join(table[0])}")
    known = [line for line in table if not np.isnan(line[metric])]
    if not known:
        raise ValueError(f"{metric} is not defined on this set; choose another --metric")

    def distance(line: dict) -> float:
        pair = line["decision"], line["mask_threshold"]
        return sum(abs(a - b) for a, b in zip(pair, sweep.configured))

    best = max(known, key=lambda line: (line[metric], -distance(line)))
    return table, (best["decision"], best["mask_threshold"])


def draw(path: str, sweep: Sweep, table: list[dict], best: tuple[float, float]) -> None:
    """Metrics over each threshold, the other one at its best value."""
    names = ("decision", "mask_threshold")
    labels = (sweep.decision_key, MASK_KEY)
    swept = [i for i in (0, 1) if labels[i]]
    figure = Figure(figsize=(5 * len(swept), 4), layout="constrained")
    axes = figure.subplots(1, len(swept), squeeze=False)[0]
    for axis, i in zip(axes, swept):
        lines = [line for line in table if line[names[1 - i]] == best[1 - i]]
        _curves(axis, [line[names[i]] for line in lines], lines)
        axis.axvline(sweep.configured[i], color="grey", linestyle=":", label="configured")
        axis.axvline(best[i], color="black", linestyle="--", label="chosen")
        axis.set_xlabel(labels[i])
    axes[0].set_ylabel("%")
    axes[-1].legend()
    with atomic_write(path, "wb") as file:
        figure.savefig(file, format="png", dpi=120)


def _curves(axis: Axes, thresholds: list[float], lines: list[dict]) -> None:
    for metric in SHOWN:
        values = [line[metric] for line in lines]
        if not np.isnan(values).all():
            axis.plot(thresholds, values, label=metric)


def configuration(args: argparse.Namespace, cfg: "CfgNode", keys: dict[str, float]) -> str:
    """A yaml of the configuration with ``keys``; of a paper's row, which is no file, with all
    keys."""
    if is_paper_row(args.config_file):
        cfg.merge_from_list([part for pair in keys.items() for part in pair])
        return cfg.dump()
    base = os.path.relpath(args.config_file, args.output)
    return yaml.safe_dump({"_BASE_": base, **nested(keys)}, sort_keys=False)


def main(arguments: list[str] | None = None) -> None:
    args = parse(arguments)
    cfg = load(args, options=["MODEL.WEIGHTS", args.weights] if args.weights else [])
    names = (
        [args.dataset] if args.dataset else [n for n in cfg.DATASETS.TEST if "val" in n.split("_")]
    )
    if len(names) != 1:
        fail(f"--dataset NAME is needed: DATASETS.TEST has {len(names)} validation sets")
    check_split(names[0])
    cfg.DATASETS.TEST = tuple(names)
    check_inputs(cfg, eval_only=True)
    setup_logger(name="detectron2")
    model = Trainer.build_model(cfg)
    RISCheckpointer(model, cfg.OUTPUT_DIR, init=cfg.MODEL.INIT, save_to_disk=False).load(
        cfg.MODEL.WEIGHTS
    )
    sweep = Sweep(model, sample=cfg.TEST.SAMPLE)
    inference_on_dataset(model, build_test_loader(cfg, names[0]), None)
    sweep.finish()
    metric = args.metric or cfg.TEST.BEST_METRIC
    table, best = choose(sweep, metric)

    os.makedirs(args.output, exist_ok=True)
    keys = {k: v for k, v in zip((sweep.decision_key, MASK_KEY), best) if k}
    with atomic_write(os.path.join(args.output, "sweep.json")) as file:
        json.dump(finite_or_null({"dataset": names[0], "keys": keys, "table": table}), file)
    draw(os.path.join(args.output, "curves.png"), sweep, table, best)
    before, after = (sweep.metrics(*pair)[metric] for pair in (sweep.configured, best))
    said = f"{metric} on {names[0]}: {before:.2f} as configured, {after:.2f} with {keys}"
    with atomic_write(os.path.join(args.output, "calibrated.yaml")) as file:
        file.write(f"# {said}\n" + configuration(args, cfg, keys))
    print(said)


if __name__ == "__main__":
    run(main)
