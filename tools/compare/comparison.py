"""What the comparisons with public code share: checkouts, seeded weights, differences, times."""

import argparse
import contextlib
import os
import subprocess
import sys
import time
import types
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from tabulate import tabulate
from torch import Tensor, nn

# Beside this folder lies what all programs share.
sys.path.append(str(Path(__file__).resolve().parents[1]))

from _timing import in_turns, median_ratio, percentile


@dataclass(frozen=True)
class Source:
    """A public repository: owner/name on GitHub, the commit compared, a file that it has."""

    repository: str
    commit: str
    marker: str

    @property
    def argument(self) -> str:
        return self.repository.split("/")[1].replace("-", "_").lower()


@dataclass
class Table:
    """The greatest differences between ours and theirs; with --time, their times."""

    seconds: float = 0.0
    rows: list[tuple[str, float, float, float]] = field(default_factory=list)
    times: list[tuple[str, float, float]] = field(default_factory=list)

    def add(self, name: str, ours: Tensor, theirs: Tensor, tolerance: float) -> None:
        """Compare two tensors of one shape; ``tolerance`` bounds the absolute difference.

        Raises:
            ValueError: the shapes differ.
        """
        if ours.shape != theirs.shape:
            raise ValueError(f"{name}: ours is {tuple(ours.shape)}, theirs {tuple(theirs.shape)}")
        difference = (ours.double() - theirs.double()).abs().max().item()
        self.rows.append((name, theirs.double().abs().max().item(), difference, tolerance))

    def race(
        self,
        name: str,
        theirs: Callable[[], object],
        ours: nn.Module,
        unit: Callable[[int], dict],
        counts: Sequence[int] = (1, 8),
    ) -> None:
        """With --time: time theirs and ours in turns, and note ours per sentence as a share of theirs.

        Args:
            theirs: segments one sentence in one image, in fp32.
            ours: segments one image with so many sentences, in fp32 and with PRECISION auto.
            unit: number of sentences -> input of ours.
        """
        if not self.seconds:
            return

        def answer(precision: str, inputs: list[dict]) -> None:
            ours.precision = precision
            ours(inputs)

        contestants: dict[str, Callable[[], object]] = {f"{name}, public code": theirs}
        for count in counts:
            for precision in ("fp32", "auto"):
                noun = "1 sentence" if count == 1 else f"{count} sentences"
                contestants[f"{name}, {noun}, {precision}"] = partial(
                    answer, precision, [unit(count)]
                )
        torch.backends.mha.set_fastpath_enabled(True)
        # On a machine with other work, time on a processor says more than time by the clock.
        times = in_turns(contestants, seconds=self.seconds, clock=time.process_time)
        torch.backends.mha.set_fastpath_enabled(False)
        reference, *_ = times.values()
        sentences = [1, *(count for count in counts for _ in range(2))]
        for (label, own), count in zip(times.items(), sentences, strict=True):
            share = median_ratio(own, reference) / count
            self.times.append((label, 1000 * percentile(own, 50), share))

    @property
    def failures(self) -> list[str]:
        # "not <=" and not ">": a nan is a failure, too.
        return [name for name, _, difference, tolerance in self.rows if not difference <= tolerance]

    def __str__(self) -> str:
        header = ["compared", "greatest value", "greatest difference", "allowed"]
        rows = [[n, f"{size:.3g}", f"{d:.1e}", f"{t:.0e}"] for n, size, d, t in self.rows]
        table = tabulate(rows, header, tablefmt="pipe", disable_numparse=True)
        if not self.times:
            return table
        header = ["timed", "ms of CPU", "per sentence, of the public code's"]
        rows = [[name, f"{ms:.0f}", f"{share:.2f}"] for name, ms, share in self.times]
        return f"{table}\n\n" + tabulate(rows, header, tablefmt="pipe", disable_numparse=True)


def run(
    doc: str,
    sources: list[Source],
    parts: dict[str, Callable[[list[Path], Table], None]],
    arguments: list[str] | None = None,
) -> None:
    """The command line of a comparison: checkouts in, table out; exits with 1 above a tolerance.

    Args:
        doc: the script's docstring.
        sources: of the checkouts that the script takes, in order.
        parts: name -> comparison, called with the checkouts and the table that it fills; all of
            them unless --part names some.
    """
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=doc, formatter_class=formatter)
    for source in sources:
        parser.add_argument(
            source.argument,
            type=Path,
            help=f"folder of a checkout of {source.repository}, commit {source.commit[:7]}",
        )
    parser.add_argument("--part", nargs="+", choices=list(parts), default=list(parts))
    parser.add_argument(
        "--time",
        type=float,
        default=0.0,
        metavar="SECONDS",
        help="also time whole models, in turns, each for so long (DeRIS and ASDA)",
    )
    args = parser.parse_args(arguments)

    checkouts = [getattr(args, source.argument).resolve() for source in sources]
    for checkout, source in zip(checkouts, sources, strict=True):
        _check(checkout, source)
    sys.path[:0] = [str(checkout) for checkout in checkouts]
    torch.backends.mha.set_fastpath_enabled(False)  # one arithmetic for all
    table = Table(args.time)
    for name in args.part:
        torch.manual_seed(0)  # random buffers, which randomise leaves alone
        parts[name](checkouts, table)
    print(table)
    if table.failures:
        sys.exit("differs by more than allowed: " + ", ".join(table.failures))


def unit(image: Tensor, views: dict[str, Tensor], input_ids: Tensor, text_mask: Tensor) -> dict:
    """Input of our models: one image uint8 (3, H, W) with E sentences (E, L); masks of its size."""
    height, width = image.shape[-2:]
    return {
        "image": image,
        "views": views,
        "content_box": (0, 0, width, height),
        "height": height,
        "width": width,
        "input_ids": input_ids,
        "text_mask": text_mask,
        "expressions": [{"expression_id": i} for i in range(len(input_ids))],
    }


def _check(checkout: Path, source: Source) -> None:
    if not (checkout / source.marker).is_file():
        sys.exit(
            f"{checkout}: no checkout of {source.repository} ({source.marker} is not there); clone "
            f"that repository from GitHub and check out {source.commit[:7]}"
        )
    command = ["git", "-C", str(checkout), "rev-parse", "HEAD"]
    head = subprocess.run(command, capture_output=True, text=True)  # an archive has none
    if head.returncode == 0 and head.stdout.strip() != source.commit:
        print(f"note: {source.repository} is at {head.stdout.strip()[:7]}, not {source.commit[:7]}")


def stub(name: str, **content: object) -> None:
    """Stand in for a module that public code imports and that the comparison does not need.

    Parent packages are made as far as they are missing. Names that are not in ``content`` can be
    imported and called only to decorate: they return what they are given.
    """
    for parent in _parents(name):
        if parent not in sys.modules:
            sys.modules[parent] = module = types.ModuleType(parent)
            module.__path__ = []
            module.__getattr__ = lambda _: _pass_through
    module = sys.modules[name]
    for key, value in content.items():
        setattr(module, key, value)


def _parents(name: str) -> Iterator[str]:
    words = name.split(".")
    return (".".join(words[: i + 1]) for i in range(len(words)))


def _pass_through(value: object = None, *_: object, **__: object) -> object:
    return value if callable(value) else _pass_through


@contextlib.contextmanager
def inside(folder: Path) -> Iterator[None]:
    """Public code that names its files relative to the checkout runs in it."""
    before = os.getcwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


@torch.no_grad()
def randomise(module: nn.Module, seed: int = 0) -> nn.Module:
    """Fill every parameter and statistic with seeded noise that keeps activations near 1.

    Fresh models are no test of equality: many of their biases, gates and embeddings are 0 or 1.
    """
    generator = torch.Generator().manual_seed(seed)

    def noise(tensor: Tensor) -> Tensor:
        return torch.randn(tensor.shape, generator=generator)

    for name, parameter in module.named_parameters():
        if parameter.ndim > 1:
            fan_in = parameter[0].numel() if len(parameter) > 1 else parameter.shape[-1]
            parameter.copy_(noise(parameter) / fan_in**0.5)
        else:  # scales of norms are called weight, too
            parameter.copy_(0.1 * noise(parameter) + name.endswith("weight"))
    for name, buffer in module.named_buffers():
        if name.endswith("running_mean"):
            buffer.copy_(0.1 * noise(buffer))
        elif name.endswith("running_var"):
            buffer.copy_((1 + 0.1 * noise(buffer)).abs())
    return module.eval()
