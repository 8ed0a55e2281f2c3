#!/usr/bin/env python
"""Time the forms of deformable attention on one device at the size that DeRIS' pixel decoder has.

Prints, for each form that runs there, milliseconds of the forward pass and of forward and backward
(medians, the forms in turns), peak memory of the latter (GPUs), and the greatest differences to
the first form.
"""

import argparse
import statistics
import time

import torch
from tabulate import tabulate

from ris_d2.modeling.layers.deformable_attention import map_constants, weighted_samples

HEADS, POINTS, CHANNELS = 8, 4, 32


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--size", type=int, default=384, help="of the square input, pixels")
    parser.add_argument("--batch", type=int, default=1, help="images")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--repeat", type=int, default=20, help="times that each form runs")
    args = parser.parse_args()
    device, dtype = torch.device(args.device), getattr(torch, args.dtype)
    sizes = tuple((args.size // stride, args.size // stride) for stride in (32, 16, 8))
    constants = [x.to(device) for x in map_constants(sizes, HEADS, POINTS)]
    inputs = make_inputs(args.batch, sizes, device, dtype)
    forms = ["embedding_bag", "grid_sample"] + ["triton"] * (device.type == "cuda")
    times = {(form, backward): [] for form in forms for backward in (False, True)}
    results, memory = {}, {}
    for _ in range(args.repeat + 1):
        for form, backward in times:
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(device)
                before = torch.cuda.memory_allocated(device)
            start = now(device)
            with torch.set_grad_enabled(backward):
                out = weighted_samples(inputs[0], sizes, constants, *inputs[1:], form=form)
                grads = torch.autograd.grad(out.sum(), inputs) if backward else ()
            times[form, backward].append(1000 * (now(device) - start))
            results[form] = [out.detach(), *grads] if backward else [out]
            if device.type == "cuda":
                memory[form] = f"{(torch.cuda.max_memory_allocated(device) - before) / 2**20:.0f}"
    rows = []
    for form in forms:
        differences = [(x - y).abs().max() for x, y in zip(results[form], results[forms[0]])]
        # The first time compiles and allocates.
        medians = [statistics.median(times[form, backward][1:]) for backward in (False, True)]
        worst = max(float(x) for x in differences)
        rows.append([form, *(f"{x:.2f}" for x in medians), memory.get(form, "n/a"), f"{worst:.1e}"])
    header = ["form", "forward ms", "and backward ms", "memory MiB", "difference"]
    print(tabulate(rows, header, tablefmt="pipe", disable_numparse=True))


def make_inputs(
    batch: int, sizes: tuple[tuple[int, int], ...], device: torch.device, dtype: torch.dtype
) -> tuple[torch.Tensor, ...]:
    """Values, points and weights, of which gradients are wanted; one query per pixel, points near it."""
    torch.manual_seed(0)
    total = sum(height * width for height, width in sizes)
    places = (batch, total, HEADS, len(sizes), POINTS)
    values = torch.randn(batch, total, HEADS, CHANNELS, dtype=dtype)
    scales = torch.tensor(sizes, dtype=torch.float32).flip(1)[:, None]
    points = torch.rand(batch, total, 1, 1, 1, 2) * scales + 2 * torch.randn(*places, 2)
    weights = torch.rand(places).flatten(3).softmax(-1).view(places)
    return tuple(x.to(device).requires_grad_() for x in (values, points, weights))


def now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


if __name__ == "__main__":
    main()
