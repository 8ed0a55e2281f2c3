#!/usr/bin/env python
"""From nothing to a trained, evaluated, pictured model on the CPU: what ``make quickstart`` runs.

    python tools/quickstart.py [--fresh] [--output output/quickstart] [KEY VALUE ...]

1. writes RefShapes, a synthetic benchmark, to $DETECTRON2_DATASETS/refshapes (datasets/refshapes),
2. trains a tiny Shared-RIS on it with train_net.py (log in train/log.txt), and draws predictions of every
   checkpoint to contact_sheet.png: the first ones after a minute or two,
3. evaluates it on the val split, and once more with each sentence replaced by another one of the same
   image that refers to something else: what is left then is what the model gets without listening,
4. writes metrics.json, training_curve.png and contact_sheet.png, and says which bars were met.

Run it again and it goes on where it stopped: data that is there is kept, training resumes from its
last checkpoint, and a finished training is only evaluated. --fresh starts over: it deletes what the
quickstart itself made, and nothing else. KEY VALUE change the configuration, for instance
SOLVER.MAX_ITER 200 for a short trial.
"""

import argparse
import glob
import json
import math
import os
import re
import shlex
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict

from _program import Parser, load, repeated, run

REPOSITORY = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
CONFIG_FILE = os.path.join(REPOSITORY, "configs", "refshapes", "shared_ris_tiny.yaml")
IMAGES = {"train": 10000, "val": 300, "testA": 100, "testB": 100, "heldout": 100}


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(__doc__)
    parser.add_argument(
        "--fresh", action="store_true", help="delete what an earlier quickstart made first"
    )
    parser.add_argument(
        "--output", default=os.path.join("output", "quickstart"), metavar="DIRECTORY"
    )
    parser.add_config_file(default=CONFIG_FILE)
    parser.add_argument("--train-images", type=int, default=IMAGES["train"])
    parser.add_argument("--val-images", type=int, default=IMAGES["val"])
    return parser.parse_args(arguments)


if __name__ == "__main__":
    parse()  # --help and mistakes are answered before the imports below, which take seconds

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog
from detectron2.evaluation import inference_on_dataset
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from tabulate import tabulate

from _follow import Training, follow, minutes_and_seconds, stop_on_signals, why_failed
from _pictures import SheetRow, contact_sheet
from ris_d2 import refshapes
from ris_d2.data.loader import build_test_loader
from ris_d2.engine import claim
from ris_d2.engine.history import has_evaluation, read_history
from ris_d2.evaluation import ReferringEvaluator
from ris_d2.evaluation.metrics import gres_iou
from ris_d2.evaluation.report import finite_or_null
from ris_d2.io import atomic_write, dataset_root, load_json, sweep_temporaries
from ris_d2.masks import rasterize, union
from ris_d2.predictor import Predictor, load_rgb
from ris_d2.visualization import write_png

DATASET = "ris_grefshapes_val"
SCENES = refshapes.Options(
    min_shapes=3,
    max_shapes=5,
    colors=4,
    kinds=4,
    no_target_share=0.22,
    multi_target_share=0.3,
)
# What the trained model has to reach on val; "over_other" is gIoU minus gIoU of other sentences.
BARS = {"gIoU": 66.0, "T_acc": 85.0, "N_acc": 50.0, "over_other": 35.0}
SHEET = "contact_sheet.png"
SHEET_ROWS = {"single": 4, "multi": 3, "none": 3}
# A folder with this file is one of the quickstart, and MADE all that --fresh may delete there.
MARKER = "quickstart.yaml"
MADE = (
    *("metrics.json", "training_curve.png", SHEET),
    *(f"train/{name}" for name in ("config.yaml", "console.txt", "log.txt*", "metrics.json")),
    *(f"train/{name}" for name in ("events.out.tfevents.*", "last_checkpoint", "model_best.json")),
    *(f"train/model_{name}.pth" for name in ("[0-9]" * 7, "final", "best")),
    *(
        f"{folder}/{name}"
        for folder in ("val", "val_other", "train/inference/*")
        for name in ("results.json", "per_expression.jsonl", "predictions.jsonl")
    ),
)
CURVE_COLORS = ("#e66e00", "#0072b2", "#009e73", "#cc79a7", "#56b4e9")  # Okabe and Ito


def main(arguments: list[str] | None = None) -> dict:
    """Parse ``arguments`` (default: the command line), do all four steps, return metrics.json."""
    args = parse(arguments)
    begin = time.perf_counter()
    cfg = _load_cfg(args)
    try:
        with claim(args.output):
            return _all_steps(args, cfg, begin)
    except BlockingIOError as error:
        sys.exit(str(error))
    except KeyboardInterrupt:
        sys.exit("\nstopped; run it again to go on from the last checkpoint")


def _all_steps(args: argparse.Namespace, cfg: CfgNode, begin: float) -> dict:
    _prepare_output(args.output, cfg, fresh=args.fresh)

    print(f"[1/4] RefShapes in {dataset_root()}/refshapes", flush=True)
    _write_data({**IMAGES, "train": args.train_images, "val": args.val_images}, fresh=args.fresh)

    train_begin = time.perf_counter()
    print(f"[2/4] training {cfg.SOLVER.MAX_ITER} iterations on {cfg.MODEL.DEVICE}", flush=True)
    _train(args, cfg)
    train_seconds = time.perf_counter() - train_begin

    print(f"[3/4] evaluating on {DATASET}", flush=True)
    cfg.MODEL.WEIGHTS = os.path.join(cfg.OUTPUT_DIR, "model_final.pth")
    predictor = Predictor(cfg)
    metrics, other = (
        _evaluate(cfg, predictor.model, DATASET + suffix, os.path.join(args.output, f"val{suffix}"))
        for suffix in ("", "_other")
    )

    print("[4/4] drawing", flush=True)
    history = read_history(cfg.OUTPUT_DIR)
    _draw_curve(history, os.path.join(args.output, "training_curve.png"))
    _draw_sheet(args, predictor, f"gIoU {metrics['gIoU']:.1f}")

    reached = {**metrics, "over_other": metrics["gIoU"] - other["gIoU"]}
    report = {
        "dataset": DATASET,
        "metrics": metrics,
        "other_sentences": other,
        "bars": {
            name: {"bar": bar, "reached": reached[name], "met": bool(reached[name] >= bar)}
            for name, bar in BARS.items()
        },
        "training_seconds": train_seconds,
        "total_seconds": time.perf_counter() - begin,
        "iterations": cfg.SOLVER.MAX_ITER,
        "torch_threads": torch.get_num_threads(),
    }
    with atomic_write(os.path.join(args.output, "metrics.json")) as file:
        json.dump(finite_or_null(report), file, indent=2)
    _print_summary(args, cfg, report)
    return report


def _load_cfg(args: argparse.Namespace) -> CfgNode:
    cfg = load(args)
    cfg.OUTPUT_DIR = os.path.join(args.output, "train")
    return cfg


def _prepare_output(output: str, cfg: CfgNode, *, fresh: bool) -> None:
    """Note the configuration in ``output``, or stop if it holds the work of another one."""
    path = os.path.join(output, MARKER)
    is_ours = os.path.exists(path)
    if not is_ours and any(not name.startswith(".") for name in os.listdir(output)):
        sys.exit(f"{output} holds files that are not of this quickstart; choose another --output")
    if fresh:
        _delete_made(output)
    for folder in (output, *(os.path.join(output, name) for name in ("val", "val_other"))):
        sweep_temporaries(folder)
    if is_ours and not fresh:
        with open(path) as file:
            if file.read() != cfg.dump():
                sys.exit(f"{output} holds another configuration's work; pass --fresh or --output")
        return
    with atomic_write(path) as file:
        file.write(cfg.dump())


def _delete_made(output: str) -> None:
    with claim(os.path.join(output, "train")):  # no training of an earlier quickstart goes on there
        for pattern in MADE:
            for path in glob.glob(os.path.join(glob.escape(output), pattern)):
                os.remove(path)


def _write_data(images: dict[str, int], *, fresh: bool) -> None:
    root = os.path.join(dataset_root(), "refshapes")
    notes = os.path.join(root, "refshapes.json")
    made = load_json(notes) if os.path.exists(notes) else {}
    is_ours = made.items() >= asdict(SCENES).items()
    try:
        refshapes.write(root, images, SCENES, overwrite=fresh and is_ours)
    except FileExistsError as error:
        sys.exit(
            f"{error}\n(here: --fresh replaces the data of an earlier quickstart, and no others; "
            "DETECTRON2_DATASETS=DIRECTORY puts the quickstart's elsewhere)"
        )


def _command(args: argparse.Namespace, *options: str) -> list[str]:
    train_net = os.path.relpath(os.path.join(REPOSITORY, "train_net.py"))
    config_file = os.path.relpath(args.config_file)
    return ["python", train_net, "--config-file", config_file, *options, *repeated(args)]


def _train(args: argparse.Namespace, cfg: CfgNode) -> None:
    """Run train_net.py to the end."""
    history = read_history(cfg.OUTPUT_DIR)
    final = os.path.join(cfg.OUTPUT_DIR, "model_final.pth")
    if os.path.exists(final) and has_evaluation(history, cfg.SOLVER.MAX_ITER):
        print("      finished before; --fresh trains again", flush=True)
        return
    command = _command(args, "--resume") + ["OUTPUT_DIR", cfg.OUTPUT_DIR]
    print(f"      {shlex.join(command)}", flush=True)
    training = Training(
        command=[sys.executable, *command[1:]],
        folder=cfg.OUTPUT_DIR,
        max_iter=cfg.SOLVER.MAX_ITER,
    )
    [(_, status)] = follow([training], on_progress=_sheets(args, cfg))
    if status:
        sys.exit(why_failed(training, status, lines=25))


def _sheets(args: argparse.Namespace, cfg: CfgNode) -> Callable[[], None]:
    """A function that draws the newest checkpoint's predictions, if it has not yet."""
    cfg, drawn = cfg.clone(), ""

    def draw() -> None:
        nonlocal drawn
        numbered = glob.glob(os.path.join(cfg.OUTPUT_DIR, f"model_{'[0-9]' * 7}.pth"))
        newest = max(numbered, default="")
        if newest != drawn:
            drawn = cfg.MODEL.WEIGHTS = newest
            iterations = int(re.findall(r"\d{7}", newest)[-1]) + 1
            _draw_sheet(args, Predictor(cfg), f"after {iterations} iterations")
            print(
                f"      {os.path.join(args.output, SHEET)} after {iterations} iterations",
                flush=True,
            )

    return draw


def _evaluate(
    cfg: CfgNode, model: torch.nn.Module, dataset: str, output_dir: str
) -> dict[str, float]:
    evaluator = ReferringEvaluator(dataset, output_dir=output_dir, distributed=False)
    loader = build_test_loader(cfg, dataset)
    return dict(inference_on_dataset(model, loader, evaluator)["referring"])


def _draw_curve(history: list[dict], path: str) -> None:
    """Training losses (medians of 20 iterations, as detectron2 logs them) and gIoU of
    evaluations."""
    losses = [line for line in history if "total_loss" in line]
    evaluations = [line for line in history if "referring/gIoU" in line]
    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    names = sorted({n for line in losses for n in line if n.startswith("loss_")})
    for name, color in zip(["total_loss", *names], CURVE_COLORS):
        label = name.removeprefix("loss_").removesuffix("_loss")
        width = 2.2 if name == "total_loss" else 1.3
        _draw_line(left, losses, name, color=color, linewidth=width, label=label)
    left.set(title="training loss", xlim=(0, None), ylim=(0, None))
    left.legend(frameon=False)
    _draw_line(
        right, evaluations, "referring/gIoU", color=CURVE_COLORS[0], marker="o", linewidth=2.2
    )
    right.axhline(BARS["gIoU"], color="0.6", linestyle="--", linewidth=1)
    right.set(title=f"gIoU on {DATASET} (dashed: the bar)", ylim=(0, 100), xlim=left.get_xlim())
    for axes in (left, right):
        axes.set_xlabel("iteration")
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", color="0.92")
    with atomic_write(path, mode="wb") as file:
        figure.savefig(file, format="png", dpi=120)


def _draw_line(axes: Axes, history: list[dict], name: str, **style: object) -> None:
    axes.plot(
        [line["iteration"] + 1 for line in history], [line[name] for line in history], **style
    )


def _draw_sheet(args: argparse.Namespace, predictor: Predictor, when: str) -> None:
    method = type(predictor.model).__name__
    title = f"{method} on {DATASET}: {when}, drawn at random"
    sheet = contact_sheet(list(_sheet_rows(predictor)), title=title, cell=168)
    write_png(os.path.join(args.output, SHEET), sheet)


def _sheet_rows(predictor: Predictor, *, seed: int = 0) -> Iterator[SheetRow]:
    """Expressions of val drawn by chance, as many of each kind as SHEET_ROWS says, one per
    image."""
    rng = np.random.default_rng(seed)
    records = DatasetCatalog.get(DATASET)
    wanted = dict(SHEET_ROWS)
    for number in rng.permutation(len(records)):
        record = records[number]
        expression = record["expressions"][rng.integers(len(record["expressions"]))]
        kind = {0: "none", 1: "single"}.get(len(expression["annotation_ids"]), "multi")
        if not wanted[kind]:
            continue
        wanted[kind] -= 1
        yield _sheet_row(predictor, record, expression)


def _sheet_row(predictor: Predictor, record: dict, expression: dict) -> SheetRow:
    ids = expression["annotation_ids"]
    parts = [
        rasterize(a["segmentation"], record["height"], record["width"])
        for a in record["annotations"]
        if a["id"] in ids
    ]
    result = predictor(record["file_name"], expression["text"])[0]
    prediction = result["mask"].numpy()
    target = union(parts) if parts else np.zeros_like(prediction)
    iou = gres_iou(
        intersection=np.array([np.count_nonzero(prediction & target)]),
        union=np.array([np.count_nonzero(prediction | target)]),
        no_target=np.array([not ids]),
        predicted_no_target=np.array([result["no_target"]]),
    )[0]
    return SheetRow(
        image=load_rgb(record["file_name"]),
        text=expression["text"],
        target=target if ids else None,
        prediction=None if result["no_target"] else prediction,
        iou=float(iou),
        note=f"score {result['score']:.2f}",
    )


def _print_summary(args: argparse.Namespace, cfg: CfgNode, report: dict) -> None:
    names = ("gIoU", "cIoU", "mIoU", "Pr@0.5", "T_acc", "N_acc")
    rows = [
        (title, *(_percent(report[key][name]) for name in names))
        for title, key in (("its own sentence", "metrics"), ("another one", "other_sentences"))
    ]
    print(f"\n{DATASET}, the model fed")
    print(tabulate(rows, headers=("", *names), disable_numparse=True))
    rows = [
        (name, f">= {bar['bar']:.0f}", _percent(bar["reached"]), "met" if bar["met"] else "MISSED")
        for name, bar in report["bars"].items()
    ]
    print("\n" + tabulate(rows, headers=("bar", "", "reached", ""), disable_numparse=True))
    print(
        f"\n{minutes_and_seconds(report['total_seconds'])} on {report['torch_threads']} threads, "
        f"training {minutes_and_seconds(report['training_seconds'])} of it"
    )
    for name in (SHEET, "training_curve.png", "metrics.json"):
        print(f"  {os.path.join(args.output, name)}")
    command = _command(args, "--eval-only") + ["MODEL.WEIGHTS", cfg.MODEL.WEIGHTS]
    command += ["OUTPUT_DIR", os.path.join(args.output, "eval")]
    print("\nThe same numbers again:\n  " + shlex.join(command), flush=True)


def _percent(value: float) -> str:
    return "n/a" if math.isnan(value) else f"{value:.2f}"


if __name__ == "__main__":
    stop_on_signals()
    run(main)
