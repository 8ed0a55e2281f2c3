"""Say where an evaluated model loses gIoU: perception or cognition, small targets or large ones.

    python tools/analyze_errors.py output/inference/ris_grefcoco_unc_val/per_expression.jsonl
        [more files] [--edges 0 1 5 10 30 100] [--json FILE] [--plot FILE.png]
        [--board FILE.png] [--config-file C]

Reads the per_expression.jsonl of an evaluation. Perception has lost what even an oracle that
chooses among the predicted instances cannot reach; cognition what the oracle would have gained
(DeRIS, ICCV 2025: "cognition is the bottleneck"). This needs results with instances (TEST.INSTANCES
True, methods with queries); the IoU by target size (Shared-RIS, Fig. 6) needs nothing. The board
shows the sentences of the first file that went worst, those the model was surest of first; the
evaluation has to have saved its masks (TEST.SAVE_PREDICTIONS True), and --config-file names your
own datasets (DATASETS.RIS_JSON).
"""

import argparse
import json
import math
from pathlib import Path

from _program import Parser, load, run


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(__doc__)
    parser.add_argument("files", nargs="+", help="per_expression.jsonl of evaluations")
    parser.add_argument(
        "--edges",
        nargs="+",
        type=float,
        help="of the bins of target size, percent of the image (default: those of Shared-RIS, Fig. 6)",
    )
    parser.add_argument("--json", metavar="FILE", help="write the figures there")
    parser.add_argument("--plot", metavar="FILE", help="draw IoU over target size there (.png)")
    parser.add_argument("--board", metavar="FILE", help="draw the worst sentences there (.png)")
    parser.add_argument("--rows", type=int, default=12, help="sentences on the board")
    parser.add_argument("--config-file", metavar="FILE", help="the yaml of the evaluation")
    parser.add_import()
    parser.set_defaults(opts=[])
    return parser.parse_args(arguments)


if __name__ == "__main__":
    parse()  # --help and mistakes are answered before the imports below, which take seconds

import cv2
import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from _errors import (
    SIZE_EDGES,
    attribute_loss,
    by_target_size,
    read_per_expression,
)
from _pictures import SheetRow, contact_sheet
from detectron2.data import DatasetCatalog
from tabulate import tabulate

from ris_d2.data.images import read_image
from ris_d2.evaluation.report import finite_or_null
from ris_d2.io import atomic_write
from ris_d2.masks import rasterize, resize_nearest, union
from ris_d2.visualization import write_png


def describe(analysis: dict) -> str:
    """The tables of one file."""
    loss, sizes = analysis["loss"], analysis["target_size"]
    parts = []
    if loss:
        columns = ("gIoU", "oracle", "lost", "perception", "cognition")
        reasons = ("wrong_choice", "denied", "invented")
        shares = ("perception_share", "cognition_share", "failed", "failed_with_mask")
        header = ["group", "expressions", *columns, *reasons, *(f"{name} %" for name in shares)]
        rows = [
            [group, values["num_expressions"]]
            + [_number(values[name]) for name in (*columns, *reasons, *shares)]
            for group, values in loss.items()
        ]
        whole = loss["all"]
        parts += [_table(rows, header), _sentence(whole)]
        if whole["num_expressions"] < analysis["num_expressions"]:
            parts.append(
                f"{analysis['num_expressions'] - whole['num_expressions']} expressions without "
                "instances are left out above."
            )
    else:
        parts.append(
            "No result carries instances (TEST.INSTANCES True, for methods with queries), so the "
            "loss cannot be split."
        )
    rows = [
        [f"{100 * row['low']:g}-{100 * row['high']:g} %", row["num_expressions"]]
        + [_number(row[name]) for name in ("mIoU", "Pr@0.5", "oracle_mIoU")]
        for row in sizes
    ]
    header = ["target / image", "expressions", "mIoU", "Pr@0.5", "oracle mIoU"]
    parts.append(_table(rows, header) if rows else "No expression has a target.")
    return "\n\n".join(parts)


def _sentence(whole: dict) -> str:
    if math.isnan(whole["perception_share"]):
        return "No gIoU is lost."
    text = (
        f"Of {whole['lost']:.2f} points of lost gIoU, perception loses "
        f"{whole['perception']:.2f} ({whole['perception_share']:.1f} %: no query has the mask) and "
        f"cognition {whole['cognition']:.2f} ({whole['cognition_share']:.1f} %: the wrong queries "
        "were chosen)."
    )
    if whole["failed"] > 0:  # nan where no expression has a target
        text += (
            f" {whole['failed']:.1f} % of the expressions with a target stay below IoU 0.5; for "
            f"{whole['failed_with_mask']:.1f} % of those the queries have a mask above."
        )
    return text


def _table(rows: list[list], header: list[str]) -> str:
    return tabulate(rows, header, tablefmt="pipe", disable_numparse=True)


def _number(value: float) -> str:
    return "n/a" if math.isnan(value) else f"{value:.2f}"


def plot(analyses: dict[str, dict], path: str) -> None:
    """IoU over target size, one line per file; the oracle's dashed."""
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    for name, analysis in analyses.items():
        sizes = analysis["target_size"]
        centres = [100 * (row["low"] + row["high"]) / 2 for row in sizes]
        (line,) = axes.plot(centres, [row["mIoU"] for row in sizes], marker="o", label=name)
        if analysis["loss"]:
            oracle = [row["oracle_mIoU"] for row in sizes]
            axes.plot(centres, oracle, "--", color=line.get_color(), label=f"{name}, oracle")
    axes.set(xlabel="target area / image area (%)", ylabel="mIoU (%)", ylim=(0, 100))
    axes.set_xscale("symlog", linthresh=1)
    axes.legend(fontsize="small")
    figure.savefig(path, dpi=150)
    plt.close(figure)


def board(path: str, number: int) -> list[SheetRow]:
    """The sentences of ``path`` with the lowest gIoU, of equal ones those with the highest score
    first."""
    folder = Path(path).parent
    predictions = folder / "predictions.jsonl"
    if not predictions.is_file():
        raise FileNotFoundError(
            f"{predictions}: no such file; evaluate with TEST.SAVE_PREDICTIONS True"
        )
    records = {(r["source"], r["file_name"]): r for r in DatasetCatalog.get(folder.name)}
    with open(path) as results, open(
        predictions
    ) as masks:  # a line each per sentence, in one order
        lines = [(json.loads(one), json.loads(other)) for one, other in zip(results, masks)]
    lines.sort(key=lambda pair: (pair[0]["gIoU"], -(pair[0]["score"] or 0)))
    rows = []
    for result, prediction in lines[:number]:
        record = records[result["source"], result["file_name"]]
        names = {e["expression_id"]: e for e in record["expressions"]}[result["expression_id"]]
        height, width = prediction["segmentation"]["size"]
        drawn = [
            rasterize(annotation["segmentation"], record["height"], record["width"])
            for annotation in record["annotations"]
            if annotation["id"] in names["annotation_ids"]
        ]
        said = rasterize(prediction["segmentation"], height, width)
        rows.append(
            SheetRow(
                image=cv2.resize(read_image(record["file_name"]), (width, height)),
                text=names["text"],
                target=resize_nearest(union(drawn), height, width) if drawn else None,
                prediction=None if prediction["no_target"] else said,
                iou=result["gIoU"],
                note=f"{Path(record['file_name']).name}, score {result['score'] or math.nan:.2f}",
            )
        )
    return rows


def main(arguments: list[str] | None = None) -> None:
    args = parse(arguments)
    edges = [edge / 100 for edge in args.edges] if args.edges else SIZE_EDGES
    analyses = {}
    for file in args.files:
        rows = read_per_expression(file)
        analyses[file] = {
            "num_expressions": len(rows["gIoU"]),
            "loss": attribute_loss(rows),
            "target_size": by_target_size(rows, edges),
        }
    for file, analysis in analyses.items():
        print(f"{file}: {analysis['num_expressions']} expressions\n\n{describe(analysis)}\n")
    if args.board:
        load(args)  # registers the datasets
        write_png(args.board, contact_sheet(board(args.files[0], args.rows), title=args.files[0]))
    if args.json:
        with atomic_write(args.json) as file:
            json.dump(finite_or_null(analyses), file, indent=2)
    if args.plot:
        plot({Path(file).parent.name or file: a for file, a in analyses.items()}, args.plot)


if __name__ == "__main__":
    run(main)
