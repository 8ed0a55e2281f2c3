"""What a training has logged so far: OUTPUT_DIR/metrics.json, one line of json after another."""

import contextlib
import json
import os
from collections.abc import Mapping, Sequence
from operator import index

from ..io import reading


def read_history(output_dir: str) -> list[dict]:
    """The log lines (metrics.json) of the training in ``output_dir``, by iteration.

    A line that a resumed training repeats counts once; no file, no lines.

    Raises:
        ValueError: the file is damaged, or of something else.
    """
    path = os.path.join(output_dir, "metrics.json")
    lines: dict[int, dict] = {}
    if os.path.exists(path):
        with reading(path), open(path, encoding="utf-8") as file:
            for line in file:
                # A process that is killed leaves half a line; a resumed one writes on behind it.
                with contextlib.suppress(json.JSONDecodeError):
                    record = json.loads(line)
                    lines.setdefault(index(record["iteration"]), {}).update(record)
    return [lines[i] for i in sorted(lines)]


def cut_history(output_dir: str, iteration: float) -> None:
    """Cut metrics.json where a training goes on from ``iteration``.

    What is cut off comes anew: the lines from there on, and half a line of a killed process, which
    would take the next whole one with it.
    """
    path = os.path.join(output_dir, "metrics.json")
    if not os.path.exists(path):
        return
    with open(path, "rb") as file:
        lines = file.readlines()
    kept = len(lines)
    while kept and not _is_before(lines[kept - 1], iteration):
        kept -= 1
    if kept < len(lines):
        os.truncate(path, sum(map(len, lines[:kept])))


def _is_before(line: bytes, iteration: float) -> bool:
    try:
        return line.endswith(b"\n") and json.loads(line)["iteration"] < iteration
    except (ValueError, KeyError, TypeError):
        return False


def has_evaluation(history: Sequence[Mapping], iteration: int) -> bool:
    """Whether ``history`` (``read_history``) has metrics of an evaluation at that iteration."""
    # Results are named <task>/<metric> or <test set>/<task>/<metric>; nothing else has a slash.
    return any("/" in name for line in history if line["iteration"] == iteration for name in line)
