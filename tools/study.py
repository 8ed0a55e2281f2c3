#!/usr/bin/env python
"""Train and evaluate the cells of a study at equal budget and seeds, and write its table.

    python tools/study.py configs/studies/vipa_tokens.yaml --output output/studies/vipa_tokens

Each cell with each seed is one training by train_net.py in a process of its own, in
OUTPUT/runs/CELL/seedN: console.txt, checkpoints, run.json with the result. Run it again and it goes on
where it stopped: finished runs are kept, stopped ones resume from their last checkpoint, failed ones
are tried again, and a run whose settings have changed starts anew. The table, docs/studies/NAME.md,
is written anew after each run.

A study file has

    title, question          what it is called and what it asks, in one sentence
    note                     optional: what a reader of the numbers must know
    config                   a leaf, relative to the study file (a cell may name another one)
    options                  optional {KEY: value} of all cells
    cells                    {name: {KEY: value, ...}}; the key "config" names the cell's own leaf
    seeds                    list of SEED
    iterations               optional SOLVER.MAX_ITER of all cells; default: each leaf's own
    minutes                  optional: a run that takes longer is stopped and stays unfinished
    refshapes                optional {images: {split: number}, OPTION: value}: the data, written to
                             OUTPUT/datasets (OPTION as in datasets/make_refshapes.py); without it
                             the datasets in $DETECTRON2_DATASETS are used
    datasets                 {label: registered name} to evaluate on, once, at the end
    metrics                  of each data set, for instance [gIoU, cIoU, N_acc]
    groups                   optional {title: {label: cell}}: the tables; a cell may be in several
    reference                optional: the cell whose seconds per iteration are 1
"""

import argparse
import contextlib
import difflib
import fcntl
import json
import os
import re
import shlex
import shutil
import signal
import statistics
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from itertools import combinations
from typing import Any

from _program import Parser, run


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(__doc__)
    parser.add_argument("study", metavar="STUDY.yaml")
    parser.add_argument("--output", required=True, metavar="DIRECTORY")
    parser.add_argument("--report", metavar="FILE", help="default: docs/studies/NAME.md")
    parser.add_argument("--report-only", action="store_true", help="train nothing")
    parser.add_argument("--only", action="append", default=[], metavar="CELL", help="repeatable")
    parser.add_argument("--seed", action="append", default=[], type=int, help="repeatable")
    parser.add_argument(
        "--minutes", type=float, help="stop a run that takes longer, resumptions added up"
    )
    parser.add_argument(
        "--time-limit", type=float, metavar="MINUTES", help="begin no run after so long"
    )
    parser.add_import()
    return parser.parse_args(arguments)


if __name__ == "__main__":
    parse()  # --help and mistakes are answered before the imports below, which take seconds

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog
from detectron2.modeling import META_ARCH_REGISTRY
from tabulate import tabulate

from ris_d2 import get_ris_cfg, load_config, refshapes
from ris_d2.engine.follow import (
    describe_progress,
    follow_training,
    minutes_and_seconds,
    read_history,
    stop_on_signals,
)
from ris_d2.evaluation.report import ROW, summarize
from ris_d2.io import atomic_write, load_json, sweep_temporaries
from ris_d2.yaml_files import read_yaml

REPOSITORY = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
PROGRESS_SECONDS = 20
# What a study says by keys of its own.
RESERVED = {
    "SEED": "seeds",
    "SOLVER.MAX_ITER": "iterations",
    "DATASETS.TEST": "datasets",
    "TEST.EVAL_PERIOD": "datasets",
    "SOLVER.CHECKPOINT_PERIOD": "nothing: five times in a run",
    "OUTPUT_DIR": "--output",
}
KEYS: dict[str, tuple[type, ...]] = {
    "title": (str,),
    "question": (str,),
    "note": (str,),
    "config": (str,),
    "options": (dict,),
    "cells": (dict,),
    "seeds": (list,),
    "iterations": (int,),
    "minutes": (int, float),
    "refshapes": (dict,),
    "datasets": (dict,),
    "metrics": (list,),
    "groups": (dict,),
    "reference": (str,),
}
REQUIRED = ("title", "question", "config", "cells", "seeds", "datasets", "metrics")


@dataclass(frozen=True, kw_only=True)
class Study:
    """A study file, checked. ``cells``: {name: (config file, KEY VALUE list)}."""

    path: str
    title: str
    question: str
    note: str | None
    cells: dict[str, tuple[str, list[str]]]
    seeds: list[int]
    datasets: dict[str, str]
    metrics: list[str]
    groups: dict[str, dict[str, str]]
    reference: str | None
    minutes: float | None
    images: dict[str, int] | None  # of RefShapes; None: no data of its own
    scenes: refshapes.Options
    modules: Sequence[str]

    @property
    def name(self) -> str:
        return os.path.splitext(os.path.basename(self.path))[0]


def load_study(path: str, modules: Sequence[str] = ()) -> Study:
    """Read a study file (format: see the top of this file).

    Args:
        modules: the user's own, see ``load_config``.

    Raises:
        FileNotFoundError: no such file, or a config that it names is missing.
        ValueError: unknown, missing, duplicate or malformed entries; names file and entry.
    """
    content = read_yaml(path)
    try:
        return _check_study(path, content, modules)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path}: {error}") from error


def _check_study(path: str, content: dict, modules: Sequence[str]) -> Study:
    for key in content:
        _check_known("key", key, KEYS)
    for key in REQUIRED:
        if not content.get(key):
            raise ValueError(f"{key!r} is missing or empty")
    for key, value in content.items():
        if not isinstance(value, KEYS[key]) or isinstance(value, bool):
            wanted = " or ".join(kind.__name__ for kind in KEYS[key])
            raise ValueError(f"{key} must be {wanted}, it is {value!r}")
    for key in ("iterations", "minutes"):
        if content.get(key, 1) <= 0:
            raise ValueError(f"{key} must be positive, it is {content[key]}")
    seeds = content["seeds"]
    if any(not isinstance(seed, int) or seed < 0 for seed in seeds) or len({*seeds}) < len(seeds):
        raise ValueError(f"seeds must be different integers >= 0, they are {seeds}")
    metrics = [*summarize(np.zeros(0, ROW)), "oracle_mIoU"]
    for metric in content["metrics"]:
        _check_known("metric", metric, metrics)

    common = _options("options", content.get("options", {}))
    if "iterations" in content:
        common += ["SOLVER.MAX_ITER", str(content["iterations"])]
    cells = {}
    for name, options in content["cells"].items():
        if not re.fullmatch(r"[\w.-]+", str(name)):
            raise ValueError(f"cell {name!r}: letters, digits and _ . - only, it names a directory")
        _check_mapping(f"cell {name}", options)
        own = {key: value for key, value in options.items() if key != "config"}
        config = os.path.join(os.path.dirname(path), options.get("config", content["config"]))
        if not os.path.isfile(config):
            raise FileNotFoundError(f"{path}: cell {name}: no such config: {config}")
        cells[name] = os.path.normpath(config), common + _options(f"cell {name}", own)
    groups = content.get("groups", {content["title"]: {name: name for name in cells}})
    _check_groups(groups, cells)
    if "reference" in content:
        _check_known("reference", content["reference"], cells)

    scenes = dict(content.get("refshapes", {}))
    images = scenes.pop("images", None)
    if "refshapes" in content:
        _check_mapping("refshapes: images", images)
        for split in images:
            _check_known("refshapes: split", split, refshapes.SPLITS)
        for option in scenes:
            _check_known("refshapes", option, [f.name for f in fields(refshapes.Options)])
    study = Study(
        path=path,
        title=content["title"],
        question=content["question"],
        note=content.get("note"),
        cells=cells,
        seeds=seeds,
        datasets=content["datasets"],
        metrics=content["metrics"],
        groups=groups,
        reference=content.get("reference"),
        minutes=content.get("minutes"),
        images=images,
        scenes=refshapes.Options(**scenes),
        modules=modules,
    )
    _check_different(study)
    for label, name in study.datasets.items():  # the cells' configs may have registered some
        _check_text("datasets", label, name)
        _check_known("dataset", name, [n for n in DatasetCatalog.list() if n.startswith("ris_")])
    return study


def _check_groups(groups: Mapping, cells: Mapping) -> None:
    for title, rows in groups.items():
        _check_mapping(f"group {title}", rows)
        for label, cell in rows.items():
            _check_text(f"group {title}", label, cell)
            _check_known(f"group {title}: cell", cell, cells)
    shown = {cell for rows in groups.values() for cell in rows.values()}
    hidden = [name for name in cells if name not in shown]
    if hidden:
        raise ValueError(f"cells that no group shows: {', '.join(hidden)}")


def _check_different(study: Study) -> None:
    settings = {}
    for name in study.cells:
        try:
            settings[name] = _settings(study, _config(study, name, study.seeds[0], ""))
        except ValueError as error:
            raise ValueError(f"cell {name}: {error}") from error
    for first, second in combinations(settings, 2):
        if settings[first] == settings[second]:
            raise ValueError(
                f"duplicate cell: {first} and {second} are the same run; keep one and name it in "
                "several groups"
            )


def _check_mapping(what: str, value: Any) -> None:
    if not isinstance(value, dict):
        raise ValueError(f"{what} must be a mapping, it is {value!r}")


def _check_text(what: str, *values: Any) -> None:
    for value in values:
        if not isinstance(value, str):
            raise ValueError(f"{what}: {value!r} must be text; put it in quotes")


def _check_known(what: str, name: Any, known: Sequence[str] | Mapping) -> None:
    if name not in known:
        close = difflib.get_close_matches(str(name), known, 1)
        hint = f"did you mean {close[0]}? " if close else ""
        raise ValueError(f"unknown {what} {name!r}; {hint}known: {', '.join(known)}")


def _options(what: str, options: Mapping[str, Any]) -> list[str]:
    for key in options:
        if key in RESERVED:
            raise ValueError(f"{what}: {key} cannot be set here; it is said by {RESERVED[key]}")
    return [str(word) for pair in options.items() for word in pair]


@dataclass(frozen=True, kw_only=True)
class Run:
    """One cell with one seed."""

    study: Study
    cell: str
    seed: int
    output: str  # of the whole study

    @property
    def folder(self) -> str:
        return os.path.join(self.output, "runs", self.cell, f"seed{self.seed}")

    @property
    def config(self) -> CfgNode:
        return _config(self.study, self.cell, self.seed, self.folder)

    @property
    def record(self) -> dict:
        """What run.json says, with ``state``: finished | stopped | failed | changed | "not started".

        "changed" (``error`` names the keys) is a run with other settings than the study's of now.
        """
        path = os.path.join(self.folder, "run.json")
        if not os.path.exists(path) or not os.path.exists(self._settings_path):
            return {"state": "not started", "seconds": 0.0}
        changed = self._changed_settings()
        if changed:
            return {"state": "changed", "seconds": 0.0, "error": ", ".join(changed)}
        return load_json(path)

    def write(self, record: dict) -> None:
        with atomic_write(os.path.join(self.folder, "run.json")) as file:
            json.dump(record, file, indent=2)

    def clear(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)
        with atomic_write(self._settings_path) as file:
            json.dump(_settings(self.study, self.config), file, indent=0)

    @property
    def _settings_path(self) -> str:
        return os.path.join(self.folder, "settings.json")

    def _changed_settings(self) -> list[str]:
        # A key that is new since then does not make a run worthless: its default keeps what was.
        defaults = _flat(get_ris_cfg())
        then = load_json(self._settings_path)
        now = _settings(self.study, self.config)
        return [k for k, v in now.items() if then.get(k, defaults.get(k)) != v] + [
            k for k in then if k not in now
        ]


def runs_of(study: Study, output: str) -> list[Run]:
    """All runs, the first seed of every cell first, so that the table fills evenly."""
    return [
        Run(study=study, cell=cell, seed=seed, output=output)
        for seed in study.seeds
        for cell in study.cells
    ]


def _command_options(study: Study, cell: str, seed: int, folder: str) -> list[str]:
    config_file, options = study.cells[cell]
    iterations = load_config(config_file, options, modules=study.modules).SOLVER.MAX_ITER
    ours = {
        "SEED": seed,
        "DATASETS.TEST": tuple(study.datasets.values()),
        "TEST.EVAL_PERIOD": 0,
        "SOLVER.CHECKPOINT_PERIOD": max(iterations // 5, 1),
        "OUTPUT_DIR": folder,
    }
    return options + [str(word) for pair in ours.items() for word in pair]


def _config(study: Study, cell: str, seed: int, folder: str) -> CfgNode:
    options = _command_options(study, cell, seed, folder)
    return load_config(study.cells[cell][0], options, modules=study.modules)


def _settings(study: Study, cfg: CfgNode) -> dict[str, Any]:
    """All that a run's result depends on, beside the code: {KEY: value}, as json reads it back."""
    settings = _flat(cfg)
    del settings["OUTPUT_DIR"]
    if study.images is not None:
        settings["refshapes"] = {"images": study.images, **asdict(study.scenes)}
    return json.loads(json.dumps(settings))


def _flat(cfg: CfgNode, prefix: str = "") -> dict[str, Any]:
    flat = {}
    for key, value in cfg.items():
        if isinstance(value, CfgNode):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = list(value) if isinstance(value, tuple) else value
    return flat


class _TooLong(Exception):
    pass


def execute(run: Run, limit: float | None) -> dict:
    """Train and evaluate one run, or go on with it; print, and return its record.

    Args:
        run: its folder is cleared if its settings have changed.
        limit: seconds, those of earlier attempts included; None: no limit.
    """
    record = run.record
    if record["state"] in ("not started", "changed"):
        run.clear()
    before = record["seconds"]
    state = {"state": "stopped", "seconds": before}
    run.write(state)
    cfg = run.config
    command = ["python", os.path.join(REPOSITORY, "train_net.py"), "--resume"]
    command += ["--config-file", run.study.cells[run.cell][0]]
    command += [word for module in run.study.modules for word in ("--import", module)]
    command += _command_options(run.study, run.cell, run.seed, run.folder)

    def progress(seconds: float) -> None:
        history = read_history(run.folder)
        state["seconds"] = before + seconds
        state["iterations"] = history[-1]["iteration"] + 1 if history else 0
        run.write(state)
        print(f"      {describe_progress(seconds, history, cfg.SOLVER.MAX_ITER)}", flush=True)
        if limit is not None and before + seconds >= limit:
            raise _TooLong

    environment = {}
    if run.study.images is not None:
        environment["DETECTRON2_DATASETS"] = os.path.join(run.output, "datasets")
    begin = time.perf_counter()
    try:
        status = follow_training(
            [sys.executable, *command[1:]],
            run.folder,
            progress,
            every=PROGRESS_SECONDS,
            environment=environment,
        )
    except _TooLong:
        state["error"] = f"more than {limit / 60:g} minutes"
        run.write(state)
        return state
    state["seconds"] = before + time.perf_counter() - begin
    try:
        if status:
            state |= {"state": "failed", "error": _last_error(run.folder, status)}
        else:
            state |= {"state": "finished", **_result(run, cfg)}
    except Exception as error:  # the other runs go on, whatever is wrong with this one's files
        state |= {"state": "failed", "error": f"{type(error).__name__}: {error}"}
    run.write(state)
    return state


def _result(run: Run, cfg: CfgNode) -> dict:
    metrics = {
        name: load_json(os.path.join(run.folder, "inference", name, "results.json"))["referring"]
        for name in run.study.datasets.values()
    }
    # Each is the median of the last 20 steps; there is none of the first three steps of a process.
    times = [line["time"] for line in read_history(run.folder) if "time" in line]
    with torch.device("meta"):
        model = META_ARCH_REGISTRY.get(cfg.MODEL.META_ARCHITECTURE)(cfg)
    for name in os.listdir(run.folder):
        if re.fullmatch(r"model_(\d+|best)\.pth", name):  # the final one is enough now
            os.remove(os.path.join(run.folder, name))
    return {
        "iterations": cfg.SOLVER.MAX_ITER,
        "seconds_per_iteration": statistics.median(times) if times else None,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "machine": {
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
        },
        "metrics": metrics,
    }


def _last_error(folder: str, status: int) -> str:
    if status < 0:
        name = signal.Signals(-status).name
        return f"ended by {name}" + (", out of memory?" if name == "SIGKILL" else "")
    with open(os.path.join(folder, "console.txt")) as file:
        lines = [line.strip() for line in file if line.strip()]
    errors = [line for line in lines if re.match(r"[\w.]*(Error|Exception)\b", line)]
    return (errors or lines or [f"status {status}"])[-1]


def report(study: Study, output: str) -> str:
    """The study's page in Markdown; the same text for the same runs."""
    records = {(run.cell, run.seed): run.record for run in runs_of(study, output)}
    finished = {
        cell: [
            records[cell, seed]
            for seed in study.seeds
            if records[cell, seed]["state"] == "finished"
        ]
        for cell in study.cells
    }
    all_finished = [record for of_cell in finished.values() for record in of_cell]
    tables = [
        f"## {title}\n\n{_table(study, rows, finished)}" for title, rows in study.groups.items()
    ]
    unfinished: dict[tuple[str, str], list[str]] = {}
    for (cell, seed), record in records.items():
        if record["state"] != "finished":
            unfinished.setdefault((cell, _describe(record)), []).append(str(seed))
    cells = [
        (name, f"`{_relative(config)}`", f"`{shlex.join(options)}`" if options else "")
        for name, (config, options) in study.cells.items()
    ]
    spread = " Mean over the finished seeds; in brackets the lowest and the highest."
    return (
        "\n\n".join(
            [
                f"# {study.title}",
                study.question,
                f"{len(all_finished)} of {len(records)} runs finished."
                + spread * (len(study.seeds) > 1)
                + " Metrics in percent; s/iteration is the median of the training, evaluation apart.",
                *([study.note] if study.note else []),
                *tables,
                *(["## Unfinished", _list(unfinished)] if unfinished else []),
                "## How it was made",
                _conditions(study, all_finished),
                f"```\n{_reproduce(study, output)}\n```",
                tabulate(cells, ("cell", "config", "options"), "pipe", disable_numparse=True),
            ]
        )
        + "\n"
    )


def _list(unfinished: Mapping[tuple[str, str], Sequence[str]]) -> str:
    return "\n".join(
        f"- {cell}, {'seed' if len(seeds) == 1 else 'seeds'} {', '.join(seeds)}: {description}"
        for (cell, description), seeds in unfinished.items()
    )


def _table(study: Study, rows: Mapping[str, str], finished: Mapping[str, list[dict]]) -> str:
    several = len(study.datasets) > 1
    headers = ["", "runs"]
    headers += [
        f"{label} {metric}" if several else metric
        for label in study.datasets
        for metric in study.metrics
    ]
    headers += ["parameters", "iterations", "minutes", "s/iteration"]
    if study.reference:
        headers.append(f"x {study.reference}")
    lines = []
    for label, cell in rows.items():
        of_cell = finished[cell]
        line = [label, f"{len(of_cell)} of {len(study.seeds)}"]
        for dataset in study.datasets.values():
            for metric in study.metrics:
                line.append(_mean([record["metrics"][dataset].get(metric) for record in of_cell]))
        seconds = _seconds(of_cell)
        line += [
            f"{of_cell[0]['parameters'] / 1e6:.2f} M" if of_cell else "-",
            str(of_cell[0]["iterations"]) if of_cell else "-",
            _mean([record["seconds"] / 60 for record in of_cell], spread=False),
            f"{seconds:.3f}" if seconds else "-",
        ]
        if study.reference:
            reference = _seconds(finished[study.reference])
            line.append(f"{seconds / reference:.2f}" if seconds and reference else "-")
        lines.append(line)
    return tabulate(lines, headers, "pipe", disable_numparse=True)


def _mean(values: Sequence[float | None], *, spread: bool = True) -> str:
    if not values:
        return "-"
    if None in values:  # undefined: nothing to average in that data set
        return "n/a"
    text = f"{statistics.fmean(values):.1f}"
    if len(values) > 1 and spread:
        text += f" ({min(values):.1f} to {max(values):.1f})"
    return text


def _seconds(records: Sequence[dict]) -> float | None:
    """Mean of the runs' seconds per iteration."""
    values = [record["seconds_per_iteration"] for record in records]
    return statistics.fmean(values) if values and None not in values else None


def _describe(record: Mapping) -> str:
    if record["state"] == "changed":
        return f"not run yet with these settings (changed: {record['error']})"
    words = record["state"]
    if words != "finished" and "iterations" in record:
        words += f" after {record['iterations']} iterations"
    if "error" in record:
        # Without directories: they belong to one machine.
        error = re.sub(r"(?<![\w.:/])/(?:[^/\s'\"]+/)+", "", record["error"])
        words += f": {error[:200]}"
    return words


def _conditions(study: Study, records: Sequence[Mapping]) -> str:
    data = "The data are the registered datasets."
    if study.images is not None:
        default = refshapes.Options()
        changes = [
            f"{field.name} {getattr(study.scenes, field.name)}"
            for field in fields(refshapes.Options)
            if getattr(study.scenes, field.name) != getattr(default, field.name)
        ]
        numbers = ", ".join(f"{number} {split}" for split, number in study.images.items())
        data = f"RefShapes with {numbers} images; {', '.join(changes) or 'default options'}."
    evaluated = ", ".join(f"{label} is `{name}`" for label, name in study.datasets.items())
    machines = sorted(
        {
            f"{m['cores']} cores, OMP_NUM_THREADS {m['threads']}, torch {m['torch']}"
            for m in (record["machine"] for record in records)
        }
    )
    seeds = ", ".join(map(str, study.seeds))
    return f"{data} Evaluated: {evaluated}. Seeds {seeds}." + "".join(
        f" Machine: {machine}." for machine in machines
    )


def _reproduce(study: Study, output: str) -> str:
    return f"python tools/study.py {_relative(study.path)} --output {_relative(output)}"


def _relative(path: str) -> str:
    """Seen from the repository; the mere name of what lies outside."""
    path = os.path.relpath(path, REPOSITORY)
    return os.path.basename(path) if path.startswith(os.pardir) else path


def main(arguments: list[str] | None = None) -> None:
    args = parse(arguments)
    study = load_study(args.study, args.modules)
    runs = _chosen(study, args)
    page = args.report or os.path.join(REPOSITORY, "docs", "studies", f"{study.name}.md")
    if not args.report_only:
        sweep_temporaries(os.path.dirname(page))
        with _claimed(args.output):
            try:
                _execute_all(study, runs, args, page)
            except KeyboardInterrupt:
                _write_report(study, args.output, page)
                sys.exit("\nstopped; run it again to go on from the last checkpoint")
    _write_report(study, args.output, page)
    print(f"      {page}", flush=True)


def _execute_all(study: Study, runs: Sequence[Run], args: argparse.Namespace, page: str) -> None:
    begin = time.perf_counter()
    if study.images is not None:
        root = os.path.join(args.output, "datasets", "refshapes")
        print(f"RefShapes in {root}", flush=True)
        try:
            refshapes.write(root, study.images, study.scenes)
        except FileExistsError as error:
            sys.exit(f"{error}\n(here: choose another --output, or delete this one's datasets)")
    minutes = args.minutes or study.minutes
    limit = None if minutes is None else 60 * minutes
    for number, run in enumerate(runs, 1):
        record = run.record
        head = f"[{number}/{len(runs)}] {run.cell}, seed {run.seed}:"
        if record["state"] == "finished":
            print(f"{head} finished before", flush=True)
            continue
        if record["state"] == "stopped" and limit is not None and record["seconds"] >= limit:
            print(f"{head} stopped before, after {minutes:g} minutes", flush=True)
            continue
        spent = time.perf_counter() - begin
        if args.time_limit is not None and spent >= 60 * args.time_limit:
            print(f"{head} not begun, --time-limit is over; run it again to go on", flush=True)
            return
        print(f"{head} {_describe(record)}, {run.config.SOLVER.MAX_ITER} iterations", flush=True)
        record = execute(run, limit)
        values = [
            f"{label} {metric} {_mean([record['metrics'][name].get(metric)])}"
            for label, name in study.datasets.items()
            for metric in study.metrics
            if record["state"] == "finished"
        ]
        words = ", ".join([_describe(record), *values])
        print(f"      {minutes_and_seconds(record['seconds'])}  {words}", flush=True)
        _write_report(study, args.output, page)


def _write_report(study: Study, output: str, page: str) -> None:
    with atomic_write(page) as file:
        file.write(report(study, output))


def _chosen(study: Study, args: argparse.Namespace) -> list[Run]:
    for cell in args.only:
        _check_known("--only", cell, study.cells)
    for seed in args.seed:
        _check_known("--seed", str(seed), [*map(str, study.seeds)])
    return [
        run
        for run in runs_of(study, args.output)
        if (not args.only or run.cell in args.only) and (not args.seed or run.seed in args.seed)
    ]


@contextlib.contextmanager
def _claimed(output: str) -> Iterator[None]:
    """Within, no second command works on the same runs."""
    os.makedirs(output, exist_ok=True)
    with open(os.path.join(output, ".lock"), "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            sys.exit(f"another command is at work in {output}; --report-only does not disturb it")
        yield


if __name__ == "__main__":
    stop_on_signals()
    run(main)
