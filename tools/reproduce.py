"""Evaluate weights under a published row's protocol and put the numbers beside the published ones.

    python tools/reproduce.py configs/papers/deris.yaml:deris_l --weights deris_l.pth

Every dataset for which the row has numbers is evaluated, all of them looked for before the model is
built. A table is printed and written to OUTPUT_DIR/reproduction.md. The exit status is 0 if every
number is within the tolerance, 1 if one is not (or something is missing).
"""

import argparse
import os
import sys
from typing import TYPE_CHECKING, Any

from _program import Parser, load, repeated, run

if TYPE_CHECKING:
    from detectron2.config import CfgNode


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(__doc__)
    parser.add_argument("row", metavar="TABLE.yaml:ROW", help="as in configs/papers/")
    parser.add_argument("--weights", required=True, help="checkpoint, own or as released")
    parser.add_argument(
        "--dataset",
        action="append",
        help="only this dataset of the row; may be given several times",
    )
    parser.add_argument(
        "--tolerance",
        type=float,
        default=0.1,
        help="in percentage points, either way (default: %(default)s; published numbers are rounded "
        "to 0.01, and GPUs, image decoders and precisions differ by some hundredths)",
    )
    parser.add_argument("--num-gpus", type=int, default=1, help="processes of this machine")
    parser.add_changes()
    return parser.parse_args(arguments)


if __name__ == "__main__":
    parse()  # --help and mistakes are answered before the imports below, which take seconds

import detectron2
import torch
from detectron2.utils import comm
from detectron2.utils.logger import setup_logger
from tabulate import tabulate

from ris_d2.checkpoint import RISCheckpointer
from ris_d2.engine import Trainer, launch
from ris_d2.engine.preflight import check_inputs
from ris_d2.io import atomic_write, load_json
from ris_d2.paper_tables import PaperRow, is_paper_row, read_paper_row

HEADERS = ("dataset", "metric", "published", "measured", "difference", "")


def read(args: argparse.Namespace) -> tuple[PaperRow, "CfgNode"]:
    """The row, its published numbers those asked for, and the configuration that evaluates them.

    Raises:
        ValueError: no row, a row without published numbers, or a dataset that is none of its own.
    """
    if not is_paper_row(args.row):
        raise ValueError(f"{args.row} is no row of a table, TABLE.yaml:ROW as in configs/papers/")
    row = read_paper_row(args.row)
    if not row.published:
        raise ValueError(f"{args.row}: nothing was published for this row")
    for name in args.dataset or ():
        if name not in row.published:
            raise ValueError(f"{args.row}: no numbers of {name}, but of {', '.join(row.published)}")
    names = tuple(args.dataset or row.published)
    options = ["MODEL.WEIGHTS", args.weights, "DATASETS.TEST", str(names)]
    if "OUTPUT_DIR" not in args.opts:
        table, _, name = os.path.basename(args.row).rpartition(":")
        folder = os.path.join("output", "reproduce", os.path.splitext(table)[0], name)
        options += ["OUTPUT_DIR", folder]
    return row, load(args, args.row, options)


def evaluate(args: argparse.Namespace) -> None:
    """Write OUTPUT_DIR/inference/<dataset>/results.json of each dataset; in one process of
    several."""
    _, cfg = read(args)
    setup_logger(cfg.OUTPUT_DIR, distributed_rank=comm.get_rank(), name="ris_d2")
    model = Trainer.build_model(cfg)
    RISCheckpointer(model, cfg.OUTPUT_DIR, init=cfg.MODEL.INIT).load(cfg.MODEL.WEIGHTS)
    Trainer.test(cfg, model)


def measured(results: dict[str, Any], metric: str) -> float:
    """A metric of results.json; "mIoU/seen" is that of the sources that end so. nan where
    undefined."""
    metric, _, group = metric.partition("/")
    values = results["referring"]
    if group:
        sources = results["breakdowns"]["source"]
        values = next((sources[name] for name in sources if name.endswith(f" {group}")), {})
    value = values.get(metric)
    return float("nan") if value is None else value


def compare(
    published: dict[str, dict[str, float]], results: dict[str, dict], tolerance: float
) -> list[tuple[str, str, float, float, float, bool]]:
    """Per dataset and metric: both names, published, measured, difference, whether it is within."""
    rows = []
    for dataset, result in results.items():
        for metric, number in published[dataset].items():
            value = measured(result, metric)
            # Rounding: 0.1 of two decimals is 0.1 in binary, too.
            difference = round(value - number, 6)
            rows.append((dataset, metric, number, value, difference, abs(difference) <= tolerance))
    return rows


def page(args: argparse.Namespace, row: PaperRow, cfg: "CfgNode", rows: list[tuple]) -> str:
    """The comparison in markdown."""
    shown = [
        (
            dataset,
            metric,
            f"{number:.2f}",
            f"{value:.2f}",
            f"{round(difference, 2) + 0.0:+.2f}",
            "" if ok else "off",
        )
        for dataset, metric, number, value, difference, ok in rows
    ]
    within = sum(ok for *_, ok in rows)
    masks = " x ".join(map(str, cfg.TEST.RESOLUTION)) or "the images' own size"
    device = torch.cuda.get_device_name() if cfg.MODEL.DEVICE.startswith("cuda") else "CPU"
    lines = [
        f"# {args.row}",
        "",
        f"{within} of {len(rows)} numbers are within {args.tolerance:g} of the published ones"
        + (f" ({row.paper})." if row.paper else "."),
        "",
        tabulate(shown, HEADERS, tablefmt="pipe", disable_numparse=True),
        "",
        f"- weights: `{args.weights}`",
        f"- recipe: `{row.base}`" + (f"; {row.note.strip()}" if row.note else ""),
        f"- masks at {masks}, ground truth by `TEST.SAMPLE {cfg.TEST.SAMPLE}`; nothing is there by "
        f"`MODEL.RIS.NO_TARGET {cfg.MODEL.RIS.NO_TARGET}`; {cfg.MODEL.RIS.PRECISION}",
        f"- further changes: `{' '.join(repeated(args)) or 'none'}`",
        f"- {device}, torch {torch.__version__}, detectron2 {detectron2.__version__}",
    ]
    return "\n".join(lines) + "\n"


def main(arguments: list[str] | None = None) -> None:
    args = parse(arguments)
    row, cfg = read(args)
    check_inputs(cfg, eval_only=True)
    launch(evaluate, (args,), device=cfg.MODEL.DEVICE, num_processes=args.num_gpus)
    if not comm.is_main_process():
        return
    folders = {name: os.path.join(cfg.OUTPUT_DIR, "inference", name) for name in cfg.DATASETS.TEST}
    results = {n: load_json(os.path.join(f, "results.json")) for n, f in folders.items()}
    rows = compare(row.published, results, args.tolerance)
    text = page(args, row, cfg, rows)
    with atomic_write(os.path.join(cfg.OUTPUT_DIR, "reproduction.md")) as file:
        file.write(text)
    print(text)
    if not all(ok for *_, ok in rows):
        sys.exit(1)


if __name__ == "__main__":
    run(main)
