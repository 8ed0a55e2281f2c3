#!/usr/bin/env python
"""Train and evaluate the runs of a study at equal budget and seeds, and write its page.

    python tools/study.py configs/studies/vipa_tokens.yaml --output output/studies/vipa_tokens [--jobs 2]

Each cell with each seed is one run of train_net.py in a process of its own, in
OUTPUT/runs/CELL/seedN. Run it again and it goes on: finished runs (they have a run.json) are kept,
stopped and failed ones resume from their last checkpoint, and a run whose settings have changed is
deleted and starts anew. The page, docs/studies/NAME.md, is written anew after each run. On a
cluster, make each run a job of its own: --only CELL --seed N.

A study file has

    title, question     what it is called and what it asks, in one sentence
    found               optional: what the runs have shown; the page begins with it
    note                optional: what a reader of the numbers must know
    config              a recipe, relative to the study file (a cell may name another one)
    options             optional {KEY: value} of all cells, for instance SOLVER.MAX_ITER
    cells               {name: {KEY: value, ...}}; the key "config" names the cell's own recipe
    pretrain            optional: the cell that comes before all others, with the first seed alone;
                        what they say may name its final checkpoint: PRETRAINED
    seeds               list of SEED
    refshapes           optional {images: {split: number}, OPTION: value}: the data, written to
                        OUTPUT/datasets (OPTION as in datasets/make_refshapes.py); without it the
                        datasets in $DETECTRON2_DATASETS are used
    datasets            {label: registered name} to evaluate on at the end
    metrics             of each data set, for instance [gIoU, cIoU, N_acc]
    groups              optional {title: {label: cell}}: the tables; a cell may be in several

Where options and cells do not say otherwise (TEST.EVAL_PERIOD), a run is evaluated once, at its
end.
"""

import argparse
import contextlib
import itertools
import json
import os
import re
import shutil
import statistics
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields
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
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, on this machine")
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

from _follow import Training, follow, stop_on_signals, why_failed
from ris_d2 import load_config, refshapes
from ris_d2.engine import claim
from ris_d2.engine.history import read_history
from ris_d2.evaluation.report import ROW, summarize
from ris_d2.io import atomic_write, load_json, reading
from ris_d2.yaml_files import read_yaml

REPOSITORY = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
OTHER_SETTINGS = "not run yet with these settings"
# What a study says by keys of its own.
RESERVED = {"SEED": "seeds", "DATASETS.TEST": "datasets", "OUTPUT_DIR": "--output"}


@dataclass(frozen=True, kw_only=True)
class Study:
    """A study file: its keys, see the top of this file, and where it lies."""

    path: str
    title: str
    question: str
    config: str
    cells: dict[str, dict[str, Any]]
    seeds: list[int]
    datasets: dict[str, str]
    metrics: list[str]
    found: str = ""
    note: str = ""
    pretrain: str = ""
    options: dict[str, Any] = field(default_factory=dict)
    refshapes: dict[str, Any] = field(default_factory=dict)
    groups: dict[str, dict[str, str]] = field(default_factory=dict)


def load_study(path: str) -> Study:
    """Read a study file.

    Raises:
        FileNotFoundError: no such file.
        ValueError: unknown, missing or malformed entries; names file and entry.
    """
    content = read_yaml(path)
    known = {key.name: key.default is key.default_factory is MISSING for key in fields(Study)[1:]}
    with reading(path):
        for key in content:
            _check_known("key", key, known)
        for key, is_required in known.items():
            if is_required and not content.get(key):
                raise ValueError(f"{key!r} is missing or empty")
        study = Study(path=path, **content)
        if not isinstance(study.cells, dict):
            raise ValueError(f"cells must be a mapping, it is {study.cells!r}")
        if any(type(seed) is not int or seed < 0 for seed in study.seeds):
            raise ValueError(f"seeds must be integers >= 0, they are {study.seeds}")
        for metric in study.metrics:
            _check_known("metric", metric, [*summarize(np.zeros(0, ROW)), "oracle_mIoU"])
        named = [cell for rows in study.groups.values() for cell in rows.values()]
        for cell in [*named, *([study.pretrain] if study.pretrain else [])]:
            _check_known("cell", cell, study.cells)
        if study.refshapes:
            _scenes(study)
    return study


def _scenes(study: Study) -> tuple[dict[str, int], refshapes.Options]:
    options = dict(study.refshapes)
    images = options.pop("images")
    return images, refshapes.Options(**options)


def _check_known(what: str, name: Any, known: Iterable[str]) -> None:
    if name not in known:
        raise ValueError(f"unknown {what} {name!r}; known: {', '.join(known)}")


@dataclass(frozen=True, kw_only=True, eq=False)
class Run(Training):
    """One cell with one seed; ``cfg`` is the configuration that its command line gives.

    ``pretraining`` is the run that comes before it.
    """

    cell: str
    seed: int
    cfg: CfgNode
    modules: Sequence[str]
    pretraining: "Run | None"

    @property
    def state(self) -> str:
        """In words; "finished" with run.json and the settings of now."""
        path = os.path.join(self.folder, "config.yaml")
        if not os.path.exists(path):
            return "not started"
        if self.pretraining and self.pretraining.state == OTHER_SETTINGS:
            return OTHER_SETTINGS
        try:
            then, now = load_config(path, modules=self.modules), self.cfg.clone()
            for cfg in (then, now):  # the same run in another folder, or on another machine
                cfg.OUTPUT_DIR = cfg.MODEL.DEVICE = ""
                cfg.DATALOADER.NUM_WORKERS = 0
                cfg.MODEL.INIT = [[part, os.path.basename(file)] for part, file in cfg.MODEL.INIT]
            if json.dumps(then, sort_keys=True) != json.dumps(now, sort_keys=True):
                return OTHER_SETTINGS
        except ValueError:  # a key that is no more
            return OTHER_SETTINGS
        is_finished = os.path.exists(os.path.join(self.folder, "run.json"))
        return "finished" if is_finished else f"stopped after {self.iterations} iterations"

    @property
    def iterations(self) -> int:
        lines = [line for line in read_history(self.folder) if "total_loss" in line]
        return lines[-1]["iteration"] + 1 if lines else 0

    def finish(self) -> None:
        """Write run.json from what the training left."""
        metrics = {
            name: load_json(f"{self.folder}/inference/{name}/results.json")["referring"]
            for name in self.cfg.DATASETS.TEST
        }
        # Each is the median of the last 20 steps; there is none of the first three steps of a
        # process.
        times = [line["time"] for line in read_history(self.folder) if "time" in line]
        with torch.device("meta"):
            model = META_ARCH_REGISTRY.get(self.cfg.MODEL.META_ARCHITECTURE)(self.cfg)
        cpu = f"{os.cpu_count()} cores, OMP_NUM_THREADS {torch.get_num_threads()}"
        device = torch.cuda.get_device_name() if torch.cuda.is_available() else cpu
        record = {
            "metrics": metrics,
            "parameters": sum(parameter.numel() for parameter in model.parameters()),
            "iterations": self.iterations,
            "seconds_per_iteration": statistics.median(times) if times else None,
            "machine": f"{device}, torch {torch.__version__}",
        }
        with atomic_write(os.path.join(self.folder, "run.json")) as file:
            json.dump(record, file, indent=2)


def load_runs(study: Study, output: str, modules: Sequence[str] = ()) -> list[Run]:
    """The runs of a study, the first seed of every cell first; raises as ``load_config``."""
    runs, first = [], None
    if study.pretrain:
        first = _load_run(study, output, study.pretrain, study.seeds[0], modules)
        runs.append(first)
    for seed, cell in itertools.product(study.seeds, study.cells):
        if cell != study.pretrain:
            runs.append(_load_run(study, output, cell, seed, modules, first))
    return runs


def _load_run(
    study: Study,
    output: str,
    cell: str,
    seed: int,
    modules: Sequence[str],
    pretraining: Run | None = None,
) -> Run:
    with reading(study.path, f"cell {cell}"):
        if not re.fullmatch(r"[\w-][\w.-]*", cell):
            raise ValueError("letters, digits and _ . - only, it names a directory")
        settings = {"TEST.EVAL_PERIOD": 0, **study.options, **study.cells[cell]}
        config = os.path.join(os.path.dirname(study.path), settings.pop("config", study.config))
        for key in settings.keys() & RESERVED:
            raise ValueError(f"{key} cannot be set here; it is said by {RESERVED[key]}")
        folder = os.path.join(output, "runs", cell, f"seed{seed}")
        settings |= {"SEED": seed, "DATASETS.TEST": [*study.datasets.values()]}
        options = [str(word) for pair in settings.items() for word in pair]
        if pretraining:
            checkpoint = os.path.join(pretraining.folder, "model_final.pth")
            options = [word.replace("PRETRAINED", checkpoint) for word in options]
        options += ["OUTPUT_DIR", folder]
        cfg = load_config(config, options, modules=modules)
        for name in study.datasets.values():
            _check_known("dataset", name, [n for n in DatasetCatalog.list() if "ris_" in n])
    command = [sys.executable, os.path.join(REPOSITORY, "train_net.py"), "--resume"]
    command += [word for module in modules for word in ("--import", module)]
    data = {"DETECTRON2_DATASETS": os.path.join(output, "datasets")}
    return Run(
        name=f"{cell}, seed {seed}",
        command=[*command, "--config-file", config, *options],
        folder=folder,
        max_iter=cfg.SOLVER.MAX_ITER,
        environment=data if study.refshapes else {},
        cell=cell,
        seed=seed,
        cfg=cfg,
        modules=modules,
        pretraining=pretraining,
    )


def report(study: Study, runs: Sequence[Run], command: str) -> str:
    """The study's page in Markdown, with the command that makes it; the same for the same runs."""
    states = {run: run.state for run in runs}
    unfinished = [f"- {run.name}: {state}" for run, state in states.items() if state != "finished"]
    finished = {
        run: load_json(os.path.join(run.folder, "run.json"))
        for run, state in states.items()
        if state == "finished"
    }
    data = ", ".join(f"{key} {value}" for key, value in study.refshapes.items())
    labels = ", ".join(f"{label} is `{name}`" for label, name in study.datasets.items())
    machines = sorted({record["machine"] for record in finished.values()})
    several = " Mean over the finished seeds; in brackets the lowest and the highest."
    groups = study.groups or {study.title: {cell: cell for cell in study.cells}}
    tables = [
        f"## {title}\n\n{_table(study, rows, runs, finished)}" for title, rows in groups.items()
    ]
    parts = [
        f"# {study.title}",
        study.found,
        study.question,
        f"{len(finished)} of {len(runs)} runs finished.{several * (len(study.seeds) > 1)} Metrics in "
        "percent; s/iteration is the median of the training, evaluation apart.",
        study.note,
        *tables,
        "## Unfinished\n\n" + "\n".join(unfinished) if unfinished else "",
        "## How it was made",
        f"{f'RefShapes: {data}. ' if data else ''}Evaluated: {labels}. Machine: "
        f"{'; '.join(machines) or '-'}. Cells and options are in `{_relative(study.path)}`.",
        f"```\n{command}\n```",
    ]
    return "\n\n".join(str(part) for part in parts if part) + "\n"


def _table(
    study: Study, rows: Mapping[str, str], runs: Sequence[Run], finished: Mapping[Run, dict]
) -> str:
    lines = []
    for label, cell in rows.items():
        records = [record for run, record in finished.items() if run.cell == cell]
        wanted = sum(run.cell == cell for run in runs)
        line = {"": label, "runs": f"{len(records)} of {wanted}"}
        for (dataset, name), metric in itertools.product(study.datasets.items(), study.metrics):
            values = [record["metrics"][name].get(metric) for record in records]
            line[f"{dataset} {metric}"] = _mean(values)
        line["parameters"] = f"{records[0]['parameters'] / 1e6:.2f} M" if records else "-"
        line["iterations"] = records[0]["iterations"] if records else "-"
        line["s/iteration"] = _mean([r["seconds_per_iteration"] for r in records], 3)
        lines.append(line)
    return tabulate(lines, "keys", "pipe", disable_numparse=True)


def _mean(values: Sequence[float | None], digits: int = 1) -> str:
    if not values or None in values:
        return "n/a" if values else "-"  # undefined: nothing to average in that data set
    text = f"{statistics.fmean(values):.{digits}f}"
    return text + f" ({min(values):.{digits}f} to {max(values):.{digits}f})" * (len(values) > 1)


def _relative(path: str) -> str:
    """Seen from the repository; the mere name of what lies outside."""
    path = os.path.relpath(path, REPOSITORY)
    return os.path.basename(path) if path.startswith(os.pardir) else path


def main(arguments: list[str] | None = None) -> None:
    args = parse(arguments)
    study = load_study(args.study)
    for cell in args.only:
        _check_known("--only", cell, study.cells)
    runs = load_runs(study, args.output, args.modules)
    name = os.path.splitext(os.path.basename(args.study))[0]
    page = args.report or os.path.join(REPOSITORY, "docs", "studies", f"{name}.md")
    command = f"python tools/study.py {_relative(args.study)} --output {_relative(args.output)}"

    def write_page() -> None:
        with atomic_write(page) as file:
            file.write(report(study, runs, command))

    failed = []
    try:
        if not args.report_only:
            failed = _execute(study, runs, args, write_page)
    except KeyboardInterrupt:
        sys.exit("\nstopped; run it again to go on from the last checkpoint")
    finally:
        write_page()
    print(f"      {page}", flush=True)
    if failed:
        sys.exit(f"failed: {'; '.join(failed)}")


def _execute(
    study: Study, runs: Sequence[Run], args: argparse.Namespace, write_page: Callable[[], None]
) -> list[str]:
    """Train what is not finished; return the names of the runs that failed."""
    # Chosen runs may be trained beside others of the study: each claims its own folder.
    chosen = args.only or args.seed
    with contextlib.nullcontext() if chosen else claim(args.output):
        # What all need is made by one process, for which the others wait.
        with claim(os.path.join(args.output, "datasets"), patience=3600):
            if study.refshapes:
                root = os.path.join(args.output, "datasets", "refshapes")
                print(f"RefShapes in {root}", flush=True)
                refshapes.write(root, *_scenes(study))
            first = [run for run in runs if run.cell == study.pretrain]
            if first and first[0].state == OTHER_SETTINGS:  # what was made from it is void
                shutil.rmtree(os.path.join(args.output, "runs"))
            if failed := _train(first, 1, write_page):
                return failed
        wanted = [run for run in runs if run.cell in (args.only or study.cells)]
        wanted = [run for run in wanted if run.seed in (args.seed or study.seeds)]
        return _train([run for run in wanted if run not in first], args.jobs, write_page)


def _train(runs: Sequence[Run], at_once: int, write_page: Callable[[], None]) -> list[str]:
    failed = []
    with contextlib.closing(follow(_unfinished(runs), at_once=at_once)) as ended:
        for run, status in ended:
            try:
                if status:
                    raise ValueError(why_failed(run, status))
                run.finish()
            except (ValueError, OSError, KeyError) as error:  # the others go on
                print(f"      {error}", flush=True)
                failed.append(run.name)
            print(f"      {run.name}: {run.state}", flush=True)
            write_page()
    return failed


def _unfinished(runs: Sequence[Run]) -> Iterator[Run]:
    for number, run in enumerate(runs, 1):
        state = run.state
        print(f"[{number}/{len(runs)}] {run.name}: {state}", flush=True)
        if state == OTHER_SETTINGS:
            shutil.rmtree(run.folder)
        if state != "finished":
            yield run


if __name__ == "__main__":
    stop_on_signals()
    run(main)
