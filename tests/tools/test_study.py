"""tools/study.py: which runs it trains, keeps, resumes and repeats, and the page that it writes."""

import json
import logging
import re
import shutil
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import _follow
import pytest

ROOT = Path(__file__).parents[2]
STUDIES = sorted((ROOT / "configs" / "studies").glob("*.yaml"))

STUDY = """
title: Two widths
question: Does the width matter?
found: It does.
note: Too small to tell.
config: quick.yaml
options: {SOLVER.BASE_LR: 0.01, SOLVER.MAX_ITER: 4, SOLVER.CHECKPOINT_PERIOD: 1}
seeds: [1, 2]
refshapes: {images: {train: 4, val: 2, heldout: 2}, max_shapes: 4, size: 64}
datasets: {val: ris_grefshapes_val, unseen: ris_grefshapes_heldout}
metrics: [gIoU, N_acc]
groups:
  Width: {narrow: narrow, wide: wide}
  Again: {"default": wide}
cells:
  narrow: {MODEL.SHARED_RIS.DIM: 16}
  wide: {}
"""


@pytest.fixture
def study(load_tool):
    return load_tool("study")


@pytest.fixture
def files(tiny_config, tmp_path):
    """Writes the study file (changed by ``{old: new}``) and returns its path."""
    (tmp_path / "quick.yaml").write_text(f"""
_BASE_: {tiny_config}
MODEL: {{RIS: {{NO_TARGET: none, MASK_THRESHOLD: 0.4, BEIT3: {{EMBED_DIM: 16}}}}, SHARED_RIS: {{DIM: 32}}}}
DATASETS: {{TRAIN: ["ris_grefshapes_train"]}}
DATALOADER: {{NUM_WORKERS: 0}}
SOLVER: {{IMS_PER_BATCH: 1}}
""")

    def write(changes=()):
        text = STUDY
        for old, new in dict(changes).items():
            assert old in text
            text = text.replace(old, new)
        path = tmp_path / "widths.yaml"
        path.write_text(text)
        return str(path)

    return write


class Ended:
    """A process that has run already."""

    def __init__(self, status):
        self.poll = lambda: status


@pytest.fixture
def train(load_tool, monkeypatch):
    """Trainings run by train_net.py's main in this process; ``train.commands`` are its arguments.

    ``train.stop_at`` = i interrupts the next training in its i-th step.
    """
    train_net = load_tool("../train_net")
    stock = train_net.Trainer

    class Train:
        def __init__(self):
            self.commands, self.stop_at = [], None

        def __call__(self, training):
            self.commands.append(training.command)
            assert Path(training.command[1]) == ROOT / "train_net.py"
            for name, value in training.environment.items():
                monkeypatch.setenv(name, value)
            stop_at, self.stop_at = self.stop_at, None
            run_step = stock.run_step

            def step(trainer):
                if trainer.iter == stop_at:
                    raise KeyboardInterrupt
                run_step(trainer)

            with monkeypatch.context() as patch:
                patch.setattr(stock, "run_step", step)
                try:
                    train_net.main(train_net.parse(training.command[2:]))
                except ValueError as error:
                    path = Path(training.folder) / "console.txt"
                    path.write_text(f"at line 3\nValueError: {error}\n")
                    return Ended(1)
            return Ended(0)

    names = ("ris_d2", "detectron2", "fvcore")
    before = [(log.handlers[:], log.propagate, log.level) for log in map(logging.getLogger, names)]
    follower = Train()
    monkeypatch.setattr(_follow, "start", follower)
    yield follower
    for log, (handlers, propagate, level) in zip(map(logging.getLogger, names), before):
        log.handlers[:], log.propagate = handlers, propagate
        log.setLevel(level)


def test_interrupted_resumed_kept_and_changed(study, files, train, tmp_path, capsys):
    output, page = tmp_path / "out", tmp_path / "page.md"
    arguments = ["--output", str(output), "--report", str(page)]
    train.stop_at = 3
    with pytest.raises(SystemExit, match="run it again"):
        study.main([files(), *arguments])
    assert "- narrow, seed 1: stopped after" in page.read_text()
    assert "- wide, seed 2: not started" in page.read_text()

    study.main([files(), *arguments])
    cells = [re.search(r"runs/(\w+)/seed(\d)", c[-1]).groups() for c in train.commands]
    every = [("narrow", "1"), ("wide", "1"), ("narrow", "2"), ("wide", "2")]
    assert cells == [("narrow", "1"), *every], "a cell of two groups is trained once"
    assert all("--resume" in command for command in train.commands)
    text = page.read_text()
    assert "4 of 4 runs finished" in text and "Unfinished" not in text
    assert str(tmp_path) not in text and str(ROOT) not in text
    record = json.loads((output / "runs/narrow/seed1/run.json").read_text())
    assert record["iterations"] == 4 and record["parameters"] > 1000

    # Nothing is left to do, and the same runs give the same text.
    capsys.readouterr()
    study.main([files(), *arguments])
    assert len(train.commands) == 5 and page.read_text() == text
    assert capsys.readouterr().out.count(": finished\n") == 4

    # Interrupted or not makes no difference: the very same numbers from a straight run.
    straight = ["--output", str(tmp_path / "straight"), "--report", str(tmp_path / "other.md")]
    study.main([files(), *straight, "--only", "narrow", "--seed", "1"])
    again = json.loads((tmp_path / "straight/runs/narrow/seed1/run.json").read_text())
    assert again["metrics"] == record["metrics"]
    assert record["metrics"]["ris_grefshapes_val"]["gIoU"] > 0
    assert "1 of 4 runs finished" in (tmp_path / "other.md").read_text()

    # Other settings: what no longer holds is not shown, and only that is trained again.
    changed = files({"DIM: 16": "DIM: 24"})
    study.main([changed, *arguments, "--report-only"])
    assert "- narrow, seed 1: not run yet with these settings\n" in page.read_text()
    assert "2 of 4 runs finished" in page.read_text()
    study.main([changed, *arguments])
    assert [command[-1][-12:] for command in train.commands[6:]] == ["narrow/seed1", "narrow/seed2"]
    assert "4 of 4 runs finished" in page.read_text()


PRETRAINED = {
    "seeds: [1, 2]": "seeds: [2, 1]\npretrain: encoder",
    "narrow: {MODEL.SHARED_RIS.DIM: 16}": "narrow: {MODEL.INIT: [[beit3, PRETRAINED]]}",
    "wide: {}": "wide: {MODEL.WEIGHTS: PRETRAINED}\n  encoder: {SOLVER.MAX_ITER: 2}",
    '"default": wide': '"pretrained": encoder',
}


def test_pretraining_comes_first_once_and_for_all(study, files, train, tmp_path, capsys):
    output, page = tmp_path / "out", tmp_path / "page.md"
    arguments = ["--output", str(output), "--report", str(page)]
    study.main([files(PRETRAINED), *arguments, "--only", "wide", "--seed", "1"])
    assert [command[-1] for command in train.commands] == [
        f"{output}/runs/{run}" for run in ("encoder/seed2", "wide/seed1")
    ]
    checkpoint = str(output / "runs/encoder/seed2/model_final.pth")
    assert checkpoint in train.commands[1] and checkpoint not in train.commands[0]
    assert checkpoint in (output / "runs/wide/seed1/log.txt").read_text()
    rows = re.findall(r"^\| (wide|pretrained) +\| (\d of \d)", page.read_text(), re.MULTILINE)
    assert rows == [("wide", "1 of 2"), ("pretrained", "1 of 1")]

    # Started elsewhere from the same part, it is the same run; the path is not its setting.
    runs = study.load_runs(study.load_study(files(PRETRAINED)), str(output))
    other = study.load_runs(study.load_study(files(PRETRAINED)), str(tmp_path / "other"))
    _finished(runs[1], 40.0, 0.3)
    shutil.copytree(runs[1].folder, other[1].folder)
    assert [run.cell for run in runs] == ["encoder", "narrow", "wide", "narrow", "wide"]
    assert other[1].cell == "narrow" and other[1].state == "finished"

    # Another pretraining voids what came from it.
    changed = files(PRETRAINED | {"encoder: {SOLVER.MAX_ITER: 2}": "encoder: {SOLVER.MAX_ITER: 3}"})
    study.main([changed, *arguments, "--report-only"])
    assert "0 of 5 runs finished" in page.read_text()
    study.main([changed, *arguments, "--only", "wide", "--seed", "1"])
    assert [command[-1][-12:] for command in train.commands[2:]] == ["ncoder/seed2", "s/wide/seed1"]
    assert not (output / "runs/narrow").exists() and "2 of 5 runs" in page.read_text()


def test_without_its_pretraining_no_run_starts(study, files, tmp_path, monkeypatch):
    started = []
    monkeypatch.setattr(_follow, "start", lambda training: started.append(training) or Ended(1))
    monkeypatch.setattr(study, "why_failed", lambda training, status: "failed")
    with pytest.raises(SystemExit, match="failed: encoder, seed 2$"):
        study.main([files(PRETRAINED), "--output", str(tmp_path), "--report", f"{tmp_path}/p.md"])
    assert len(started) == 1


def test_a_failing_cell_does_not_stop_the_others(study, files, train, tmp_path, capsys):
    path = files({"DIM: 16": "DIM: 15", "seeds: [1, 2]": "seeds: [1]"})
    page = tmp_path / "page.md"
    arguments = [path, "--output", str(tmp_path / "out"), "--report", str(page)]
    for trainings in (2, 3):  # tried again, the finished one not
        with pytest.raises(SystemExit, match="failed: narrow, seed 1"):
            study.main(arguments)
        assert len(train.commands) == trainings
    assert "ValueError: " in capsys.readouterr().out
    assert "- narrow, seed 1: stopped after 0 iterations" in page.read_text()
    rows = re.findall(r"^\| (narrow|wide|default) +\| (\d of \d)", page.read_text(), re.MULTILINE)
    assert rows == [("narrow", "0 of 1"), ("wide", "1 of 1"), ("default", "1 of 1")]


def test_a_run_without_results_is_no_finished_one(study, files, tmp_path, monkeypatch, capsys):
    statuses = iter((0, -9))

    def start(training):
        Path(training.folder).mkdir(parents=True)
        (Path(training.folder) / "console.txt").write_text("")
        return Ended(next(statuses))

    monkeypatch.setattr(_follow, "start", start)
    path = files({"seeds: [1, 2]": "seeds: [1]"})
    with pytest.raises(SystemExit, match="failed: narrow, seed 1; wide, seed 1"):
        study.main([path, "--output", str(tmp_path / "out"), "--report", str(tmp_path / "page.md")])
    printed = capsys.readouterr().out
    assert "results.json" in printed and "training failed (ended by SIGKILL)" in printed


def _is_free(file):  # another process has claimed the output, but not its datasets
    return "datasets" in file.name


def test_two_commands_do_not_work_on_one_output(study, files, train, tmp_path, monkeypatch):
    monkeypatch.setattr("ris_d2.engine.distributed._lock", _is_free)
    monkeypatch.setattr(study, "claim", partial(study.claim, patience=0))
    page = ["--report", str(tmp_path / "page.md")]
    with pytest.raises(BlockingIOError, match="another training is at work in .*out"):
        study.main([files(), "--output", str(tmp_path / "out"), *page])
    assert not train.commands
    study.main([files(), "--output", str(tmp_path / "out"), *page, "--report-only"])
    monkeypatch.setattr(_follow, "start", lambda training: train.commands.append(1) or Ended(0))
    monkeypatch.setattr(study.Run, "finish", lambda run: None)
    one = ["--only", "wide", "--seed", "2"]  # as a job of a cluster, beside others
    study.main([files(), "--output", str(tmp_path / "out"), *page, *one])
    assert len(train.commands) == 1


def test_several_at_a_time(study, files, tmp_path, monkeypatch):
    """As many processes as --jobs says, and all of them gone where one interrupts them."""
    script = "import sys, time; time.sleep(0.3)"
    running, most = [], []

    def start(training):
        folder = Path(training.folder)
        (folder / "inference").mkdir(parents=True)
        running.append(subprocess.Popen([sys.executable, "-c", script]))
        most.append(sum(process.poll() is None for process in running))
        return running[-1]

    monkeypatch.setattr(_follow, "start", start)
    arguments = [files(), "--output", str(tmp_path / "out"), "--report", str(tmp_path / "p.md")]
    monkeypatch.setattr(study.Run, "finish", lambda run: None)
    study.main([*arguments, "--jobs", "3"])
    assert len(most) == 4 and max(most) == 3

    script = "import time; time.sleep(100)"
    monkeypatch.setattr(study.shutil, "rmtree", lambda folder: None)
    monkeypatch.setattr(Path, "mkdir", lambda *args, **keywords: None)
    # What SIGINT does, also in a suite that was told to ignore it, as a shell tells its background.
    interrupt = lambda seconds: signal.default_int_handler(signal.SIGINT, None)
    monkeypatch.setattr(_follow.time, "sleep", interrupt)
    with pytest.raises(SystemExit, match="run it again"):
        study.main([*arguments, "--jobs", "2"])
    assert len(running) == 6 and all(process.poll() is not None for process in running)


def _finished(run, giou, seconds):
    path = Path(run.folder)
    path.mkdir(parents=True)
    (path / "config.yaml").write_text(run.cfg.dump())
    metrics = {"gIoU": giou, "N_acc": None}
    record = {
        "iterations": 4,
        "seconds_per_iteration": seconds,
        "parameters": 1_234_567,
        "machine": "2 cores, torch 2.5",
        "metrics": {name: metrics for name in run.cfg.DATASETS.TEST},
    }
    (path / "run.json").write_text(json.dumps(record))


def test_the_page(study, files, tmp_path):
    loaded = study.load_study(files())
    runs = study.load_runs(loaded, str(tmp_path / "out"))
    for run, giou, seconds in zip(runs, (40.0, 50.0, 41.0), (0.3, 0.2, 0.4)):
        _finished(run, giou, seconds)
    text = study.report(loaded, runs, "python tools/study.py widths.yaml")
    assert text.startswith("# Two widths\n\nIt does.\n\nDoes the width matter?\n\n")
    assert "\n\nToo small to tell.\n\n" in text
    rows = {
        cells[1]: cells[2:-1]
        for line in text.splitlines()
        if (cells := [cell.strip() for cell in line.split("|")])[0] == "" and len(cells) > 8
    }
    names = ["runs", "val gIoU", "val N_acc", "unseen gIoU", "unseen N_acc"]
    assert rows[""] == [*names, "parameters", "iterations", "s/iteration"]
    time = "0.350 (0.300 to 0.400)"
    narrow = ["2 of 2", *2 * ["40.5 (40.0 to 41.0)", "n/a"], "1.23 M", "4", time]
    assert rows["narrow"] == narrow
    wide = ["1 of 2", *2 * ["50.0", "n/a"], "1.23 M", "4", "0.200"]
    assert rows["wide"] == rows["default"] == wide
    assert "- wide, seed 2: not started\n" in text
    assert "3 of 4 runs finished" in text and "Machine: 2 cores, torch 2.5." in text
    assert "RefShapes: images {'train': 4, 'val': 2, 'heldout': 2}, max_shapes 4, size 64." in text
    assert "```\npython tools/study.py widths.yaml\n```" in text


def test_a_key_that_is_new_in_the_code_makes_no_run_worthless(study, files, tmp_path):
    run = study.load_runs(study.load_study(files()), str(tmp_path / "out"))[0]
    _finished(run, 40.0, 0.3)
    path = Path(run.folder) / "config.yaml"
    then = run.cfg.clone()
    del then.MODEL.SHARED_RIS["DECODER_LAYERS"]  # at its default
    then.OUTPUT_DIR = "elsewhere"
    path.write_text(then.dump())
    assert run.state == "finished"
    path.write_text(then.dump() + "GONE: 1\n")
    assert run.state == "not run yet with these settings"
    del then.MODEL.SHARED_RIS["DIM"]  # not at its default
    path.write_text(then.dump())
    assert run.state == "not run yet with these settings"


@pytest.mark.parametrize(
    "old, new, message",
    [
        ("question:", "qestion:", "unknown key 'qestion'; known: .*question"),
        ("question: Does the width matter?", "", "'question' is missing"),
        ("seeds: [1, 2]", "seeds: [1, no]", "seeds must be integers"),
        ("DIM: 16", "DIMM: 16", "cell narrow: command line: .*MODEL.SHARED_RIS.DIMM"),
        ("MODEL.SHARED_RIS.DIM: 16", "SEED: 3", "cell narrow: SEED cannot be set.*by seeds"),
        ("{MODEL.SHARED_RIS.DIM: 16}", "3", "cell narrow: .*not a mapping"),
        ("wide: {}", "wide: {}\n  narrow: {}", "'narrow' is there twice"),
        ("wide: {}", "wide: {}\n  w/o: {A: 1}", "cell w/o: letters, digits"),
        ("title:", "pretrain: first\ntitle:", "unknown cell 'first'; known: narrow, wide"),
        ("narrow: narrow", "narrow: narow", "unknown cell 'narow'; known: narrow, wide"),
        ("ris_grefshapes_val", "ris_grefshapes_vla", "unknown dataset .ris_grefshapes_vla"),
        ("gIoU,", "GIoU,", "unknown metric 'GIoU'; known: gIoU, cIoU"),
        ("max_shapes: 4", "max_shape: 4", "unexpected keyword argument 'max_shape'"),
        ("max_shapes: 4", "max_shapes: 40", "min <= max <= 9"),
        ("title: Two", "title: [Two", "line 3: expected"),
    ],
)
def test_a_malformed_study_is_refused(study, files, old, new, message):
    path = files({old: new})
    with pytest.raises(ValueError, match=f"(?s)widths.yaml.*{message}"):
        study.main([path, "--output", "unused"])


def test_what_is_not_there_is_named(study, files):
    with pytest.raises(FileNotFoundError, match="absent.yaml"):
        study.main([files({"config: quick.yaml": "config: absent.yaml"}), "--output", "unused"])
    with pytest.raises(ValueError, match="unknown --only 'narow'; known: narrow, wide"):
        study.main([files(), "--output", "unused", "--only", "narow"])


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.stem)
def test_the_studies_of_the_project_load(study, path):
    loaded = study.load_study(str(path))
    assert loaded.question.endswith("?")
    study.report(loaded, study.load_runs(loaded, "unused"), "")
