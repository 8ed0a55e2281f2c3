#!/usr/bin/env python
"""Measure what a model costs: latency, memory, mapper, evaluator, training step, and its accuracy.

    python tools/benchmark.py --config-file configs/shared_ris_beit3_b.yaml [--config-file ANOTHER ...]
        [KEY VALUE ...] [--precisions fp32 tf32 bf16 auto] [--modes eager compiled] [--devices cpu cuda]
    python tools/benchmark.py --model FOLDER --dataset ris_grefshapes_val --precisions fp32 auto
    python tools/benchmark.py --config-file C --json > new.json
    python tools/benchmark.py --compare old.json new.json    # or two yaml files

Each model, device, precision and mode is a column of the table, with its ratio to the first one. All
columns are timed in turns, call by call, so that a machine that slows down does so for all; a ratio is
the median over such rounds. The parts:

    model      one image with --sentences: p50 and p95 of calls with a pause before each, of which
               encode (once per image) and answer (its sentences, and masks of 640x480); multiply-adds,
               and as what share of this machine's own fastest matrix product they are done
    memory     peak of a process that segments an image with the most --sentences
    mapper     jpeg and polygons to model input, on one thread
    evaluator  of one process, on one thread
    train      forward, backward and optimizer step of --batch units; the peak above weights, gradients
               and the optimizer's state, and the activations that wait for the backward pass
    accuracy   with --dataset: metrics of the very weights, precision and mode that the column times

Without --model and --dataset weights are random: nothing has to be downloaded. A made-up 640x480 image
with 3 polygons of 40 corners and 7 expressions stands for a RefCOCO image. Peak memory is torch's on a
GPU, else all of the process, of which baseline_memory_mb were there before (Python and libraries).
"""

import argparse
import json
import multiprocessing
import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from itertools import islice, product
from typing import Any

from _program import Parser, run

NAMES = ("model", "memory", "mapper", "evaluator", "train", "accuracy")


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(__doc__)
    parser.add_config_file(action="append", default=[], help="may be given several times")
    parser.add_model(action="append", default=[])
    parser.add_argument("--precisions", nargs="+", default=["auto"], choices=PRECISIONS)
    parser.add_argument("--modes", nargs="+", default=["eager"], choices=["eager", "compiled"])
    parser.add_argument("--devices", nargs="+", help="default: the configuration's")
    parser.add_argument("--sentences", nargs="+", type=int, default=[1, 8], metavar="N")
    parser.add_argument("--pause", type=float, default=0.05, help="seconds before each call")
    parser.add_argument("--seconds", type=float, default=3.0, help="least time per measurement")
    parser.add_argument("--cpu-time", action="store_true", help="of models, not time by the clock")
    parser.add_argument("--threads", type=int, help="of the model (default: torch's choice)")
    parser.add_argument("--batch", type=int, default=2, help="units per training step")
    parser.add_argument("--expressions", type=int, default=3500, help="of the evaluator's part")
    parser.add_argument("--dataset", help="a registered one, for the part accuracy")
    parser.add_argument("--images", type=int, help="of the dataset, the first ones (default: all)")
    parser.add_argument("--parts", nargs="+", choices=NAMES, help="default: all that can be")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument("--compare", nargs=2, metavar=("A", "B"), help="two .json, or two .yaml")
    args = parser.parse_args(arguments)
    if args.compare and not args.compare[0].endswith(".json"):
        args.config_file += args.compare
        args.compare = None
    if not (args.compare or args.config_file or args.model):
        parser.error("give --config-file, --model or --compare")
    if "accuracy" in (args.parts or ()) and not args.dataset:
        parser.error("the part accuracy needs --dataset")
    args.parts = args.parts or [name for name in NAMES if name != "accuracy" or args.dataset]
    return args


PRECISIONS = ("fp32", "tf32", "bf16", "fp16", "auto")

if __name__ == "__main__":
    parse()  # --help and mistakes are answered before the imports below, which take seconds

import cv2
import torch
import yaml
from detectron2.config import CfgNode
from detectron2.modeling import build_model
from tabulate import tabulate
from torch import nn

from _sample import measure_evaluator, measure_mapper, model_input
from _timing import (
    WARM_UP,
    in_turns,
    machine,
    matrix_product,
    median_ratio,
    peak_memory_mb,
    percentile,
    saved_for_backward_mb,
    set_tf32,
    state_mb,
    synchronize,
    versions,
)
from analyze import count_macs
from ris_d2 import hub, load_config
from ris_d2.checkpoint import RISCheckpointer
from ris_d2.data.loader import build_test_loader
from ris_d2.engine import build_optimizer
from ris_d2.evaluation import ReferringEvaluator
from ris_d2.io import load_json
from ris_d2.modeling.precision import fastest_precision

Figures = dict[str, float | str]
Clock = Callable[[], float]


@dataclass(frozen=True)
class Column:
    """What is measured: a configuration or trained model, and how it runs."""

    config_file: str | None
    model: str | None
    device: str
    precision: str
    mode: str

    @property
    def name(self) -> str:
        source = os.path.basename((self.config_file or self.model).rstrip("/"))
        words = [os.path.splitext(source)[0], self.precision]
        return " ".join(
            words + [self.mode] * self.compiles + [self.device] * (self.device != "cpu")
        )

    @property
    def compiles(self) -> bool:
        return self.mode == "compiled"


def columns_of(args: argparse.Namespace) -> list[Column]:
    """One for every model, device, precision and mode."""
    sources = [(path, None) for path in args.config_file] + [(None, name) for name in args.model]
    columns = []
    for source in sources:
        devices = args.devices or [_load(args, *source).MODEL.DEVICE]
        columns += [
            Column(*source, *rest) for rest in product(devices, args.precisions, args.modes)
        ]
    for column in columns:
        if column.precision == "tf32" and not column.device.startswith("cuda"):
            raise ValueError(f"--precisions tf32 is of GPUs, and a device is {column.device}")
    return columns


def _load(args: argparse.Namespace, config_file: str | None, model: str | None) -> CfgNode:
    if model:
        return hub.find_config(model, args.opts, modules=args.modules)
    return load_config(config_file, args.opts, modules=args.modules)


def config_of(column: Column, args: argparse.Namespace) -> CfgNode:
    cfg = _load(args, column.config_file, column.model)
    cfg.MODEL.DEVICE = column.device
    cfg.MODEL.RIS.PRECISION = column.precision.replace("tf32", "fp32")
    cfg.MODEL.RIS.COMPILE = column.compiles
    return cfg


def build(column: Column, args: argparse.Namespace) -> tuple[nn.Module, CfgNode]:
    """The column's model in evaluation mode, with its weights if it was asked for something trained."""
    cfg = config_of(column, args)
    torch.manual_seed(0)
    model = build_model(cfg).eval()
    if column.model or args.dataset:
        init = () if column.model else cfg.MODEL.INIT
        RISCheckpointer(model, init=init).load(cfg.MODEL.WEIGHTS)
    set_tf32(column.precision == "tf32")
    return model, cfg


class _Runner:
    """Calls a column's model; models are shared by columns that differ in precision or mode alone."""

    def __init__(self, column: Column, model: nn.Module, cfg: CfgNode, clock: Clock) -> None:
        self.column, self.model, self.cfg, self.clock = column, model, cfg, clock
        chosen = fastest_precision(model, model.device)
        self.runs_in = chosen if column.precision == "auto" else column.precision
        self.encoding: list[float] = []

    def __call__(self, inputs: list[dict]) -> None:
        set_tf32(self.runs_in == "tf32")
        self.model.precision = self.runs_in.replace("tf32", "fp32")
        self.model.compiles = self.column.compiles
        begin = self.clock()
        features = self.model.encode(inputs)
        synchronize(self.model.device)
        self.encoding.append(self.clock() - begin)
        self.model.answer(features, inputs)
        synchronize(self.model.device)

    def product(self) -> tuple[Callable[[], object], int]:
        """A matrix product in the precision that the model runs in, and its multiply-adds."""
        kinds = {"bf16": torch.bfloat16, "fp16": torch.float16}
        multiply, macs = matrix_product(self.model.device, kinds.get(self.runs_in, torch.float32))

        def call() -> None:
            set_tf32(self.runs_in == "tf32")
            multiply()
            synchronize(self.model.device)

        return call, macs


def measure_models(columns: Sequence[Column], args: argparse.Namespace) -> list[Figures]:
    """Latencies of all columns, taken in turns, and what the multiply-adds of the first say of them."""
    models: dict[tuple, tuple[nn.Module, CfgNode]] = {}
    runners = []
    # On a machine with other work, time on its processors says more than time by the clock.
    clock = time.process_time if args.cpu_time else time.perf_counter
    for column in columns:
        key = column.config_file, column.model, column.device
        if key not in models:
            models[key] = build(column, args)
            models[key][0].compiles = False  # until its runner says so
        runners.append(_Runner(column, *models[key], clock))
    figures: list[Figures] = []
    for runner in runners:
        once = ", ".join(modules_per_image(runner.model, runner.cfg)) or "nothing"
        figures.append({"runs_in": runner.runs_in, "runs_per_image": once})
    for count in args.sentences:
        for row, measured in zip(figures, _latencies(runners, count, args), strict=True):
            row.update({f"{name}_{count}": value for name, value in measured.items()})
    return figures


def _latencies(
    runners: Sequence[_Runner], count: int, args: argparse.Namespace
) -> list[dict[str, float]]:
    """Of one image with ``count`` sentences, a dict per runner."""
    inputs = [[model_input(runner.cfg, count)] for runner in runners]
    macs = []
    for runner, (unit,) in zip(runners, inputs, strict=True):
        runner.model.compiles = False  # in a compiled graph nothing can be counted
        macs.append(count_macs(runner.model, unit)["Global"])
    calls = {i: lambda r=r, x=x: r(x) for i, (r, x) in enumerate(zip(runners, inputs))}
    products = {(r.model.device, r.runs_in): r.product() for r in runners}
    for runner in runners:
        runner.encoding.clear()
    times = in_turns(
        {**calls, **{key: call for key, (call, _) in products.items()}},
        seconds=args.seconds,
        pause=args.pause,
        enough=list(calls),
        clock=runners[0].clock,
    )
    rows = []
    for i, runner in enumerate(runners):
        key = runner.model.device, runner.runs_in
        p50, encode = percentile(times[i], 50), percentile(runner.encoding[WARM_UP:], 50)
        rate = products[key][1] / percentile(times[key], 50)
        rows.append(
            {
                "p50_ms": 1000 * p50,
                "p95_ms": 1000 * percentile(times[i], 95),
                "of_first_column": median_ratio(times[i], times[0]),
                "encode_ms": 1000 * encode,
                "answer_ms": 1000 * (p50 - encode),
                "per_sentence_ms": 1000 * p50 / count,
                "gmacs": macs[i] / 1e9,
                "gmacs_per_s": macs[i] / p50 / 1e9,
                "of_matrix_rate": macs[i] / p50 / rate,
                "calls": len(times[i]),
            }
        )
    return rows


def modules_per_image(model: nn.Module, cfg: CfgNode) -> list[str]:
    """The outermost modules that run while an image is encoded, in order."""
    ran: list[str] = []

    def note(name: str) -> None:
        if name not in ran and not any(name.startswith(f"{other}.") for other in ran):
            ran.append(name)

    hooks = [
        module.register_forward_pre_hook(lambda *_, name=name: note(name))
        for name, module in model.named_modules()
        if name
    ]
    model.encode([model_input(cfg, 1)])
    for hook in hooks:
        hook.remove()
    return ran


def measure_memory(column: Column, args: argparse.Namespace) -> Figures:
    """Peak memory of segmenting one image with the most sentences."""
    baseline = peak_memory_mb(torch.device(column.device))
    model, cfg = build(column, args)
    weights = sum(t.nbytes for t in (*model.parameters(), *model.buffers())) / 2**20
    for _ in range(2):
        model([model_input(cfg, max(args.sentences))])
    peak = peak_memory_mb(model.device)
    return {"weights_mb": weights, "peak_memory_mb": peak, "baseline_memory_mb": baseline}


def measure_train(column: Column, args: argparse.Namespace) -> Figures:
    """Forward, backward and optimizer step of ``--batch`` units, with the expressions of INPUT.RIS.UNIT."""
    baseline = peak_memory_mb(torch.device(column.device))
    model, cfg = build(column, args)
    model.train().to_be_applied.clear()
    optimizer = build_optimizer(cfg, model)
    count = cfg.INPUT.MAX_EXPRESSIONS if cfg.INPUT.RIS.UNIT == "image" else 1
    inputs = [model_input(cfg, count, training=True) for _ in range(args.batch)]

    def step() -> None:
        optimizer.zero_grad()
        sum(model(inputs).values()).backward()
        optimizer.step()
        synchronize(model.device)

    times = in_turns({"step": step}, seconds=args.seconds)["step"]
    peak, state = peak_memory_mb(model.device), state_mb(model, optimizer)
    model.compiles = False  # what a graph keeps is not seen by hooks
    return {
        "batch_units": args.batch,
        "expressions_per_unit": count,
        "step_ms": 1000 * percentile(times, 50),
        "steps": len(times),
        "units_per_s": args.batch / percentile(times, 50),
        "peak_memory_mb": peak,
        "state_mb": state,
        "peak_above_state_mb": peak - baseline - state,
        "saved_for_backward_mb": saved_for_backward_mb(model, inputs),
    }


def measure_accuracy(column: Column, args: argparse.Namespace) -> Figures:
    """Metrics of ``--dataset``, of the weights and in the precision and mode of the column."""
    model, cfg = build(column, args)
    evaluator = ReferringEvaluator(args.dataset, distributed=False)
    evaluator.reset()
    with torch.no_grad():
        for inputs in islice(build_test_loader(cfg, args.dataset), args.images):
            evaluator.process(inputs, model(inputs))
    return {"dataset": args.dataset, "ran_in": model.precision, **evaluator.evaluate()["referring"]}


PARTS: dict[str, Callable[[Column, argparse.Namespace], Figures]] = {
    "memory": measure_memory,
    "mapper": lambda column, args: measure_mapper(config_of(column, args), args.seconds),
    "evaluator": lambda column, args: measure_evaluator(args.expressions),
    "train": measure_train,
    "accuracy": measure_accuracy,
}
ONE_THREAD = ("mapper", "evaluator")  # and nothing of precision and mode


def run_part(
    part: str, columns: Sequence[Column], args: argparse.Namespace
) -> Figures | list[Figures]:
    """Measure the part "model" of all columns, or another one of a single column, in this process."""
    threads = 1 if part in ONE_THREAD else args.threads or torch.get_num_threads()
    torch.set_num_threads(threads)
    cv2.setNumThreads(threads)
    return measure_models(columns, args) if part == "model" else PARTS[part](*columns, args)


def in_a_process(function: Callable, *arguments: object) -> Any:
    """What the function returns. In a process of its own, its peak memory is its own."""
    # Not one of multiprocessing.Pool: those may not have processes, as data loaders want them.
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def measure(args: argparse.Namespace) -> dict:
    """The report that --json prints."""
    columns = columns_of(args)
    parts: list[dict[str, Figures]] = [{} for _ in columns]
    for part in args.parts:
        if part == "model":
            for own, figures in zip(
                parts, in_a_process(run_part, part, columns, args), strict=True
            ):
                own[part] = figures
            continue
        seen = set()
        for own, column in zip(parts, columns, strict=True):
            source = column.config_file, column.model
            if part not in ONE_THREAD or source not in seen:
                own[part] = in_a_process(run_part, part, [column], args)
            seen.add(source)
    return {
        "machine": machine(args.threads or torch.get_num_threads()),
        "versions": versions(),
        "columns": [
            {
                "name": column.name,
                **asdict(column),
                "parts": own,
                "config": yaml.safe_load(config_of(column, args).dump()),
            }
            for column, own in zip(columns, parts, strict=True)
        ],
    }


def main(arguments: list[str] | None = None) -> dict:
    """Parse ``arguments`` (default: the command line), measure, print and return the report."""
    args = parse(arguments)
    if args.compare:
        report = compare(*args.compare)
    else:
        report = measure(args)
    if args.json:
        print(json.dumps(report, indent=2))
    else:
        print(as_table(report))
    return report


def compare(old: str, new: str) -> dict:
    """The columns of two files side by side; machine and versions are the second's."""
    columns = [
        {**column, "name": f"{os.path.splitext(os.path.basename(path))[0]}: {column['name']}"}
        for path in (old, new)
        for column in load_json(path)["columns"]
    ]
    return {**load_json(new), "columns": columns}


def as_table(report: dict) -> str:
    """The machine, then a line per measure: a column each, and its ratio to the first."""
    columns = report["columns"]
    headers = ["part", "measure", columns[0]["name"]]
    headers += [header for column in columns[1:] for header in (column["name"], "ratio")]
    measures = {(p, m): None for c in columns for p, f in c["parts"].items() for m in f}
    rows = []
    for part, measure in measures:
        first, *others = (c["parts"].get(part, {}).get(measure) for c in columns)
        row = [part, measure, _shown(first)]
        for other in others:
            row += [_shown(other), _ratio(other, first)]
        rows.append(row)
    head = [
        ", ".join(
            f"{k} {' '.join(v) if isinstance(v, list) else v}" for k, v in report[key].items()
        )
        for key in ("machine", "versions")
    ]
    table = tabulate(rows, headers, disable_numparse=True, maxcolwidths=48, stralign="right")
    return "\n".join([*head, table])


def _shown(value: float | str | None) -> str:
    if isinstance(value, (int, float)):
        return f"{value:.2f}".removesuffix(".00")
    return value or ""


def _ratio(value: float | str | None, reference: float | str | None) -> str:
    numbers = isinstance(value, (int, float)) and isinstance(reference, (int, float))
    return f"x {value / reference:.2f}" if numbers and reference else ""


if __name__ == "__main__":
    run(main)
