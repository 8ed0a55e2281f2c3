#!/usr/bin/env python
"""Measure all methods on a GPU and write the page: tests, agreement with the CPU, speed, memory, training.

    make gpu        # or: python tools/gpu_page.py [--output docs/gpu.md] [--config-file C ...] [KEY VALUE ...]

Needs a machine with an NVIDIA GPU (80 GB for all of it; what does not fit is said on the page), torch with
CUDA, a C++ compiler for the compiled columns, pytest and detectron2, about two hours, and nothing from the
network: weights are random. On the page:

    the suite with --device cuda
    per method in fp32, TF32 and bf16, eager and compiled: p50 and p95 of one sentence and of eight, the
        share of the GPU's own matrix rate, peak memory, a training step and its memory
    the greatest difference of its fp32 mask logits from the CPU's, which is to be below 1e-4 of the
        greatest logit (or 1e-4, where that is below 1)
    a training step under DistributedDataParallel with NCCL, one process: its gradients against those
        without

The page is written anew after every method. What fails is named on it, and the program then ends with
status 1. --device cpu tries the program itself on a machine without a GPU.
"""

import argparse
import copy
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
ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(__doc__)
    parser.add_config_file(action="append", help="default: a recipe of each method")
    parser.add_argument("--device", default="cuda", help="cuda, cuda:1, or cpu to try the program")
    parser.add_argument("--tests", nargs="*", default=["tests"], help="none: leave the suite out")
    parser.add_argument("--modes", nargs="+", default=["eager", "compiled"])
    parser.add_argument("--seconds", type=float, default=3.0, help="least time per measurement")
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
from _sample import model_input
from _timing import machine, synchronize, versions
from ris_d2.io import atomic_write

TOLERANCE = 1e-4


def difference_of_logits(column: benchmark.Column, args: argparse.Namespace) -> tuple[float, float]:
    """Greatest difference of mask logits on the column's device from the CPU's, and greatest logit."""
    model, cfg = benchmark.build(column, args)
    inputs = [model_input(cfg, 2)]
    here, there = _logits(copy.deepcopy(model).to("cpu"), inputs), _logits(model, inputs)
    return (here - there.cpu()).abs().max().item(), here.abs().max().item()


@torch.no_grad()
def _logits(model: nn.Module, inputs: list[dict]) -> Tensor:
    features = model.encode(inputs)
    outputs = model.run_segment(features, *model._collate_text(inputs))
    return (outputs["rounds"][-1] if "rounds" in outputs else outputs)["mask_logits"].float()


def difference_under_ddp(column: benchmark.Column, args: argparse.Namespace) -> tuple[float, float]:
    """Greatest difference of gradients with DistributedDataParallel from those without, and greatest one."""
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
        wrapped = DistributedDataParallel(model, device_ids=[model.device] if cuda else None)
        under = _gradients(model, wrapped, inputs)
        torch.distributed.destroy_process_group()
    differences = [(under[name] - plain[name]).abs().max().item() for name in plain]
    return max(differences), max(gradient.abs().max().item() for gradient in plain.values())


def _gradients(model: nn.Module, called: nn.Module, inputs: list[dict]) -> dict[str, Tensor]:
    model.zero_grad()
    torch.manual_seed(0)  # of dropout
    sum(called(inputs).values()).backward()
    synchronize(model.device)
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


class Page:
    """What was measured so far, and what failed."""

    def __init__(self, path: str, threads: int) -> None:
        self.path, self.failed = path, []
        self.suite = ""
        self.facts = {**machine(threads), **versions()}
        self.speed: list[list[str]] = []
        self.agreement: list[list[str]] = []

    def attempt(self, what: str, function: Callable, *arguments: object) -> object | None:
        """What the function returns; None if it failed, which the page then says."""
        try:
            return function(*arguments)
        except Exception as error:  # out of memory, no compiler, ...: the rest is still wanted
            self.failed.append(f"{what}: {type(error).__name__}: {str(error).strip()[:300]}")
            print(self.failed[-1], file=sys.stderr)
            return None

    def write(self) -> None:
        facts = ", ".join(
            f"{key} {', '.join(value) if isinstance(value, list) else value}"
            for key, value in self.facts.items()
        )
        lines = ["# On a GPU", "", f"Written by `make gpu`. {facts}.", ""]
        lines += [f"Suite: {self.suite}.", ""] if self.suite else []
        lines += [
            "Milliseconds; 8: eight sentences on one image; share: of the device's own matrix rate with "
            "eight; memory in MiB, of training above weights, gradients and optimizer.",
            "",
        ]
        lines += _markdown(SPEED, self.speed) + [""]
        lines += _markdown(AGREEMENT, self.agreement) + [""]
        lines += ["Failed:", "", *(f"- {x}" for x in self.failed), ""] if self.failed else []
        with atomic_write(self.path) as file:
            file.write("\n".join(lines))


SPEED = ("model", "p50", "p95", "p50 of 8", "share", "memory", "step", "its memory")
AGREEMENT = ("model", "fp32 mask logits against the CPU", "gradients under DDP")


def _markdown(header: tuple[str, ...], rows: list[list[str]]) -> list[str]:
    return [f"| {' | '.join(row)} |" for row in (header, ["---"] * len(header), *rows)]


def run_suite(tests: list[str], device: str) -> str:
    """The last line of pytest.

    Raises:
        ValueError: a test failed.
    """
    option = [] if device == "cpu" else ["--device", device]
    command = [sys.executable, "-m", "pytest", "-q", *option, *tests]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    last = (done.stdout.strip().splitlines() or ["no output"])[-1].strip("= ")
    if done.returncode:
        raise ValueError(f"{' '.join(command[1:])}: {last} {done.stderr[-300:]}")
    return last


def measure_speed(page: Page, args: argparse.Namespace) -> None:
    """A row for each precision and mode of the one configuration in ``args``."""
    columns = benchmark.columns_of(args)
    figures = page.attempt(
        f"{columns[0].name}: latency",
        benchmark.in_a_process,
        benchmark.run_part,
        "model",
        columns,
        args,
    )
    for i, column in enumerate(columns):
        row = {**figures[i]} if figures else {}
        for part in ("memory", "train"):
            own = page.attempt(
                f"{column.name}: {part}",
                benchmark.in_a_process,
                benchmark.run_part,
                part,
                [column],
                args,
            )
            row |= {f"{part}.{name}": value for name, value in (own or {}).items()}
        names = ("p50_ms_1", "p95_ms_1", "p50_ms_8", "of_matrix_rate_8", "memory.peak_memory_mb")
        names += ("train.step_ms", "train.peak_above_state_mb")
        page.speed.append([column.name, *(_shown(row.get(name)) for name in names)])


def _shown(value: float | None) -> str:
    return "" if value is None else f"{value:.3g}" if value < 100 else f"{value:.0f}"


def measure_agreement(page: Page, args: argparse.Namespace) -> None:
    column = benchmark.columns_of(args)[0]  # fp32, eager
    row = [column.name]
    for what, function, allowed in (
        ("logits", difference_of_logits, TOLERANCE),
        ("DDP", difference_under_ddp, 10 * TOLERANCE),
    ):
        found = page.attempt(
            f"{column.name}: {what}", benchmark.in_a_process, function, column, args
        )
        row.append("" if found is None else f"{found[0]:.1e} of {found[1]:.2g}")
        if found is not None and not found[0] <= allowed * max(1.0, found[1]):
            page.failed.append(f"{column.name}: {what} differ by {found[0]:.1e} of {found[1]:.2g}")
    page.agreement.append(row)


def main(arguments: list[str] | None = None) -> None:
    """Parse ``arguments`` (default: the command line), measure, write the page."""
    args = parse(arguments)
    cuda = args.device.startswith("cuda")
    if cuda and not torch.cuda.is_available():
        raise ValueError(
            "no CUDA GPU here: run this on a machine with one, or try the program with --device cpu"
        )
    page = Page(args.output, torch.get_num_threads())
    for config_file in args.config_file:
        words = [
            "--config-file",
            config_file,
            *args.opts,
            "MODEL.INIT",
            "[]",
            "--sentences",
            "1",
            "8",
        ]
        words += [word for module in args.modules for word in ("--import", module)]
        words += ["--devices", args.device, "--seconds", str(args.seconds), "--modes", *args.modes]
        words += ["--precisions", "fp32", *["tf32"] * cuda, "bf16"]
        own = benchmark.parse(words)
        measure_agreement(page, own)
        measure_speed(page, own)
        page.write()
    if args.tests:
        page.suite = page.attempt("suite", run_suite, args.tests, args.device) or "failed"
        page.write()
    print(f"Written: {args.output}")
    if page.failed:
        sys.exit(1)


if __name__ == "__main__":
    run(main)
