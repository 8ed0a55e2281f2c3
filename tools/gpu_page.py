#!/usr/bin/env python
"""Measure all methods on a GPU and write the page: tests, agreement with the CPU, speed, memory, training.

    make gpu        # or: python tools/gpu_page.py [--output docs/gpu.md] [--config-file C ...] [KEY VALUE ...]

Needs a machine with an NVIDIA GPU (80 GB for all of it; what does not fit is said on the page), torch with
CUDA, a C++ compiler for the compiled columns, pytest and detectron2, about two hours, and nothing from the
network: weights are random. On the page:

    the suite, on the CPU and with --device cuda
    per method in fp32, TF32 and bf16, eager and compiled: p50 and p95 of one sentence and of eight, the
        share of the GPU's own matrix rate, peak memory, a training step and its memory
    the greatest difference of its fp32 mask logits from the CPU's, which is to be below 1e-4 of the
        greatest logit (or 1e-4, where that is below 1), and the mean one: far below, if a hard
        decision near its threshold is all that differs
    a training step under DistributedDataParallel with NCCL, one process: its gradients against those
        without

Every part runs in a process of its own, and the page is written anew after every column. What fails,
crashes or hangs is named on it (in full on stderr), all else is measured, and the program ends with status
1. --device cpu tries the program itself on a machine without a GPU.

Where a GPU is lent for minutes, the page is made in pieces:

    python tools/gpu_page.py --parts speed --modes eager --config-file configs/vipa_swin_b.yaml
    python tools/gpu_page.py --add --parts suite --tests tests/modeling
"""

import argparse
import copy
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable

from _program import Parser, run

RECIPES = (
    "deris_swin_s",
    "risam_sam_vit_h",
    "vipa_swin_b",
    "asda_clip_vit_b",
    "shared_ris_beit3_b",
)
PARTS = ("agreement", "speed", "suite")
ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(__doc__)
    parser.add_config_file(action="append", help="default: a recipe of each method")
    parser.add_argument("--device", default="cuda", help="cuda, cuda:1, or cpu to try the program")
    parser.add_argument("--parts", nargs="+", default=PARTS, choices=PARTS, help="default: all")
    parser.add_argument("--tests", nargs="+", default=["tests"], help="of the suite (default: all)")
    parser.add_argument("--modes", nargs="+", default=["eager", "compiled"])
    parser.add_argument("--seconds", type=float, default=3.0, help="least time per measurement")
    parser.add_argument("--add", action="store_true", help="to the page that is there")
    parser.add_argument("--output", default=os.path.join(ROOT, "docs", "gpu.md"), metavar="PAGE")
    args = parser.parse_args(arguments)
    configs = os.path.join(ROOT, "configs")
    args.config_file = args.config_file or [os.path.join(configs, f"{r}.yaml") for r in RECIPES]
    return args


if __name__ == "__main__":
    parse()  # --help and mistakes are answered before the imports below, which take seconds

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import benchmark
from _process import in_a_process
from _sample import model_input
from _timing import machine, synchronize, versions
from ris_d2.io import atomic_write, load_json

TOLERANCE = 1e-4
PART_LIMIT, SUITE_LIMIT = 1800, 5400  # seconds; what takes longer hangs
Differences = tuple[float, float, float]


def difference_of_logits(column: benchmark.Column, args: argparse.Namespace) -> Differences:
    """Greatest difference of mask logits on the column's device from the CPU's, greatest logit, mean
    difference."""
    model, cfg = benchmark.build(column, args)
    inputs = [model_input(cfg, 2)]
    here, there = _logits(copy.deepcopy(model).to("cpu"), inputs), _logits(model, inputs)
    difference = (here - there.cpu()).abs()
    return difference.max().item(), here.abs().max().item(), difference.mean().item()


@torch.no_grad()
def _logits(model: nn.Module, inputs: list[dict]) -> Tensor:
    features = model.encode(inputs)
    outputs = model.run_segment(features, *model._collate_text(inputs))
    return (outputs["rounds"][-1] if "rounds" in outputs else outputs)["mask_logits"].float()


def difference_under_ddp(column: benchmark.Column, args: argparse.Namespace) -> Differences:
    """The same of gradients with DistributedDataParallel and those without."""
    model, cfg = benchmark.build(column, args)
    model.train().to_be_applied.clear()
    cuda = model.device.type == "cuda"
    inputs = [model_input(cfg, 2, training=True)]  # BatchNorm wants two sentences
    with tempfile.TemporaryDirectory() as directory:
        torch.distributed.init_process_group(
            "nccl" if cuda else "gloo",
            init_method=f"file://{directory}/store",
            rank=0,
            world_size=1,
        )
        plain = _gradients(model, model, inputs)
        wrapped = DistributedDataParallel(  # as the trainer does
            model,
            device_ids=[model.device] if cuda else None,
            gradient_as_bucket_view=True,
            static_graph=True,
        )
        under = _gradients(model, wrapped, inputs)
        torch.distributed.destroy_process_group()
    difference = torch.cat([(under[name] - plain[name]).abs().flatten() for name in plain])
    greatest = max(gradient.abs().max().item() for gradient in plain.values())
    return difference.max().item(), greatest, difference.mean().item()


def _gradients(model: nn.Module, called: nn.Module, inputs: list[dict]) -> dict[str, Tensor]:
    model.zero_grad()
    torch.manual_seed(0)  # of dropout
    sum(called(inputs).values()).backward()
    synchronize(model.device)
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


class Page:
    """What was measured so far, and what failed. A JSON file beside the page has the same, to be added to."""

    def __init__(self, path: str, *, add: bool) -> None:
        self.path, self.data = path, f"{os.path.splitext(path)[0]}.json"
        empty = {name: {} for name in ("suite", "speed", "agreement", "failed")}
        self.content: dict[str, dict] = load_json(self.data) if add else empty
        self.content["facts"] = {**machine(torch.get_num_threads()), **versions()}

    def attempt(self, what: str, function: Callable, *arguments: object) -> object | None:
        """What the function returns in a process of its own; None if it failed, which the page then says."""
        print(what, flush=True)
        result, error = in_a_process(function, *arguments, limit=PART_LIMIT)
        self.judge(what, [error] if error else [])
        return result

    def judge(self, what: str, errors: list[str]) -> None:
        """Replace what is said of the failure of a part; nothing if it is none."""
        self.content["failed"].pop(what, None)
        if errors:
            texts = [f"{what}: {' '.join(error.split())}"[:400] for error in errors]
            self.content["failed"][what] = texts
            print(*texts, sep="\n", file=sys.stderr)

    def write(self) -> None:
        facts, suite, speed, agreement, failed = (
            self.content[name] for name in ("facts", "suite", "speed", "agreement", "failed")
        )
        facts = ", ".join(
            f"{key} {', '.join(value) if isinstance(value, list) else value}"
            for key, value in facts.items()
        )
        lines = ["# On a GPU", "", f"Written by `make gpu`. {facts}.", ""]
        lines += [
            line for words, last in suite.items() for line in (f"`pytest {words}`: {last}.", "")
        ]
        lines += [
            "Milliseconds; 8: eight sentences on one image; share: of the device's own matrix rate with "
            "eight; memory in MiB, of training above weights, gradients and optimizer.",
            "",
        ]
        lines += [*_markdown(SPEED, speed), "", *_markdown(AGREEMENT, agreement), ""]
        if failed:
            lines += ["Failed:", "", *(f"- {text}" for own in failed.values() for text in own), ""]
        with atomic_write(self.path) as file:
            file.write("\n".join(lines))
        with atomic_write(self.data) as file:
            json.dump(self.content, file, indent=1)


SPEED = ("model", "p50", "p95", "p50 of 8", "share", "memory", "step", "its memory")
AGREEMENT = ("model", "fp32 mask logits against the CPU", "gradients under DDP")


def _markdown(header: tuple[str, ...], rows: dict[str, list[str]]) -> list[str]:
    cells = (header, ["---"] * len(header), *([name, *row] for name, row in rows.items()))
    return [f"| {' | '.join(row)} |" for row in cells]


def run_suite(page: Page, tests: list[str], device: str) -> None:
    """Note pytest's last line, and each test that failed."""
    words = ["--device", device, *tests]
    command = [sys.executable, "-m", "pytest", "-q", "-o", "faulthandler_timeout=600", *words]
    print(*command, flush=True)
    with tempfile.TemporaryFile("w+") as output:
        try:
            done = subprocess.run(
                command, cwd=ROOT, stdout=output, stderr=subprocess.STDOUT, timeout=SUITE_LIMIT
            )
            errors = [f"status {done.returncode}"] if done.returncode else []
        except subprocess.TimeoutExpired:
            errors = [f"not done after {SUITE_LIMIT // 60} minutes"]
        output.seek(0)
        lines = output.read().splitlines() or ["no output"]
    page.content["suite"][" ".join(words)] = lines[-1].strip("= ")
    if errors:
        print(*lines, sep="\n", file=sys.stderr)
        errors += [line for line in lines if line.startswith(("FAILED ", "ERROR "))]
    page.judge(f"pytest {' '.join(words)}", errors)
    page.write()


def measure_speed(page: Page, args: argparse.Namespace) -> None:
    """A row for each precision and mode of the one configuration in ``args``."""
    columns = benchmark.columns_of(args)
    what = f"{columns[0].name} and the other columns: latency"
    figures = page.attempt(what, benchmark.run_part, "model", columns, args)
    for i, column in enumerate(columns):
        # Where one of them fails, the others are not to be without figures.
        own = figures and figures[i : i + 1]
        own = own or page.attempt(
            f"{column.name}: latency", benchmark.run_part, "model", [column], args
        )
        row = dict(own[0]) if own else {}
        for part in ("memory", "train"):
            own = page.attempt(f"{column.name}: {part}", benchmark.run_part, part, [column], args)
            row |= {f"{part}.{name}": value for name, value in (own or {}).items()}
        names = ("p50_ms_1", "p95_ms_1", "p50_ms_8", "of_matrix_rate_8", "memory.peak_memory_mb")
        names += ("train.step_ms", "train.peak_above_state_mb")
        page.content["speed"][column.name] = [_shown(row.get(name)) for name in names]
        page.write()


def _shown(value: float | None) -> str:
    return "" if value is None else f"{value:.3g}" if value < 100 else f"{value:.0f}"


def measure_agreement(page: Page, args: argparse.Namespace) -> None:
    column = benchmark.columns_of(args)[0]  # fp32, eager
    row = page.content["agreement"][column.name] = []
    for name, function, allowed in (
        ("logits", difference_of_logits, TOLERANCE),
        ("DDP", difference_under_ddp, 10 * TOLERANCE),
    ):
        what = f"{column.name}: {name}"
        found = page.attempt(what, function, column, args)
        row.append("{:.1e} of {:.2g} (mean {:.1e})".format(*found) if found else "")
        if found and not found[0] <= allowed * max(1.0, found[1]):  # NaN, too
            page.judge(what, [f"differ by {row[-1]}"])
    page.write()


def main(arguments: list[str] | None = None) -> None:
    """Parse ``arguments`` (default: the command line), measure, write the page."""
    args = parse(arguments)
    cuda = args.device.startswith("cuda")
    if cuda and not torch.cuda.is_available():
        raise ValueError(
            "no CUDA GPU here: run this on a machine with one, or try the program with --device cpu"
        )
    page = Page(args.output, add=args.add)
    for config_file in args.config_file:
        words = ["--config-file", config_file, *args.opts, "MODEL.INIT", "[]"]
        words += [word for module in args.modules for word in ("--import", module)]
        words += ["--devices", args.device, "--seconds", str(args.seconds), "--modes", *args.modes]
        words += ["--sentences", "1", "8", "--precisions", "fp32", *["tf32"] * cuda, "bf16"]
        own = benchmark.parse(words)
        if "agreement" in args.parts:
            measure_agreement(page, own)
        if "speed" in args.parts:
            measure_speed(page, own)
    if "suite" in args.parts:
        for device in ("cpu", "cuda") if cuda else ("cpu",):
            run_suite(page, args.tests, device)
    print(f"Written: {args.output}")
    if page.content["failed"]:
        sys.exit(1)


if __name__ == "__main__":
    run(main)
