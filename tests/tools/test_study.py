"""tools/study.py: which runs it trains, keeps, resumes and repeats, and the page that it writes."""

import json
import logging
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
STUDIES = sorted((ROOT / "configs" / "studies").glob("*.yaml"))

STUDY = """
title: Two widths
question: Does the width matter?
note: Too small to tell.
config: quick.yaml
options: {SOLVER.BASE_LR: 0.01}
iterations: 4
seeds: [1, 2]
refshapes: {images: {train: 4, val: 2, heldout: 2}, max_shapes: 4, size: 64}
datasets: {val: ris_grefshapes_val, unseen: ris_grefshapes_heldout}
metrics: [gIoU, N_acc]
reference: wide
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


@pytest.fixture
def train(study, load_tool, monkeypatch):
    """Trainings run by train_net.py's main in this process; ``train.commands`` are its arguments.

    ``train.stop_at`` = i interrupts the next training in its i-th step.
    """
    train_net = load_tool("../train_net")
    stock = train_net.Trainer

    class Train:
        def __init__(self):
            self.commands, self.stop_at = [], None

        def __call__(self, command, output_dir, on_progress, *, every, environment):
            self.commands.append(command)
            assert Path(command[1]) == ROOT / "train_net.py"
            for name, value in environment.items():
                monkeypatch.setenv(name, value)
            stop_at, self.stop_at = self.stop_at, None
            run_step = stock.run_step

            def step(trainer):
                if trainer.iter == stop_at:
                    on_progress(30.0)
                    raise KeyboardInterrupt
                run_step(trainer)

            with monkeypatch.context() as patch:
                patch.setattr(stock, "run_step", step)
                try:
                    train_net.main(train_net.parse(command[2:]))
                except ValueError as error:
                    (Path(output_dir) / "console.txt").write_text(
                        f"at line 3\nValueError: {error}\n"
                    )
                    return 1
            return 0

    names = ("ris_d2", "detectron2", "fvcore")
    before = [(log.handlers[:], log.propagate, log.level) for log in map(logging.getLogger, names)]
    follower = Train()
    monkeypatch.setattr(study, "follow_training", follower)
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
    assert "- wide, seeds 1, 2: not started" in page.read_text()

    study.main([files(), *arguments])
    cells = [re.search(r"runs/(\w+)/seed(\d)", c[-1]).groups() for c in train.commands]
    every = [("narrow", "1"), ("wide", "1"), ("narrow", "2"), ("wide", "2")]
    assert cells == [("narrow", "1"), *every], "a cell of two groups is trained once"
    assert all("--resume" in command for command in train.commands)
    text = page.read_text()
    assert "4 of 4 runs finished" in text and "Unfinished" not in text
    assert str(tmp_path) not in text and str(ROOT) not in text
    record = json.loads((output / "runs/narrow/seed1/run.json").read_text())
    assert record["seconds"] > 30 and record["iterations"] == 4

    # Nothing is left to do, and the same runs give the same text.
    study.main([files(), *arguments])
    assert len(train.commands) == 5 and page.read_text() == text
    assert capsys.readouterr().out.count("finished before") == 4

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
    assert (
        "- narrow, seeds 1, 2: not run yet with these settings (changed: MODEL.SHARED_RIS.DIM)"
        in (page.read_text())
    )
    study.main([changed, *arguments])
    assert [command[-1][-12:] for command in train.commands[6:]] == ["narrow/seed1", "narrow/seed2"]
    assert "4 of 4 runs finished" in page.read_text()


def test_a_failing_cell_does_not_stop_the_others(study, files, train, tmp_path, capsys):
    path = files({"DIM: 16": "DIM: 15", "seeds: [1, 2]": "seeds: [1]"})
    page = tmp_path / "page.md"
    arguments = [path, "--output", str(tmp_path / "out"), "--report", str(page)]
    study.main(arguments)
    line = next(line for line in page.read_text().splitlines() if line.startswith("- narrow"))
    assert line.startswith("- narrow, seed 1: failed: ValueError: ")
    rows = re.findall(r"^\| (narrow|wide|default) +\| (\d of \d)", page.read_text(), re.MULTILINE)
    assert rows == [("narrow", "0 of 1"), ("wide", "1 of 1"), ("default", "1 of 1")]
    study.main(arguments)
    assert len(train.commands) == 3, "tried again, the finished one not"


def test_a_run_without_results_is_no_finished_one(study, files, tmp_path, monkeypatch):
    statuses = iter((0, -9))
    monkeypatch.setattr(study, "follow_training", lambda *args, **keywords: next(statuses))
    page = tmp_path / "page.md"
    path = files({"seeds: [1, 2]": "seeds: [1]"})
    study.main([path, "--output", str(tmp_path / "out"), "--report", str(page)])
    text = page.read_text()
    assert re.search(r"- narrow, seed 1: failed: FileNotFoundError: results.json", text)
    assert "- wide, seed 1: failed: ended by SIGKILL, out of memory?" in text


def test_limits(study, files, train, tmp_path, capsys):
    page = tmp_path / "page.md"
    arguments = [files({"seeds: [1, 2]": "seeds: [1]"}), "--output", str(tmp_path / "out")]
    arguments += ["--report", str(page)]
    study.main([*arguments, "--time-limit", "0"])
    assert not train.commands and "run it again to go on" in capsys.readouterr().out

    train.stop_at = 2  # 30 seconds are over then
    study.main([*arguments, "--only", "narrow", "--minutes", "0.5"])
    assert "- narrow, seed 1: stopped after 0 iterations: more than 0.5 minutes" in page.read_text()
    study.main([*arguments, "--only", "narrow", "--minutes", "0.5"])
    assert len(train.commands) == 1, "it has had its time"
    study.main([*arguments, "--only", "narrow"])
    assert "--resume" in train.commands[1] and "1 of 2 runs finished" in page.read_text()


def test_two_commands_do_not_work_on_one_output(study, files, train, tmp_path):
    output = tmp_path / "out"
    refused = pytest.raises(SystemExit, match="at work in .*--report-only")
    with study._claimed(str(output)), refused:
        study.main([files(), "--output", str(output)])
    assert not train.commands


def _finished(study, run, giou, seconds):
    run.clear()
    metrics = {"gIoU": giou, "N_acc": None}
    run.write(
        {
            "state": "finished",
            "seconds": 90.0,
            "iterations": 4,
            "seconds_per_iteration": seconds,
            "parameters": 1_234_567,
            "machine": {"cores": 2, "threads": 1, "torch": "2.5"},
            "metrics": {name: metrics for name in run.study.datasets.values()},
        }
    )


def test_the_page(study, files, tmp_path):
    loaded = study.load_study(files())
    runs = study.runs_of(loaded, str(tmp_path / "out"))
    for run, giou, seconds in zip(runs, (40.0, 50.0, 41.0), (0.3, 0.2, 0.4)):
        _finished(study, run, giou, seconds)
    runs[3].clear()
    runs[3].write({"state": "failed", "seconds": 1.0, "error": f"OSError: no {tmp_path}/a/b.pth"})
    text = study.report(loaded, str(tmp_path / "out"))
    assert "\n\nToo small to tell.\n\n" in text
    rows = {
        cells[1]: cells[2:-1]
        for line in text.splitlines()
        if (cells := [cell.strip() for cell in line.split("|")])[0] == "" and len(cells) > 8
    }
    names = ["runs", "val gIoU", "val N_acc", "unseen gIoU", "unseen N_acc"]
    assert rows[""] == [*names, "parameters", "iterations", "minutes", "s/iteration", "x wide"]
    narrow = ["2 of 2", *2 * ["40.5 (40.0 to 41.0)", "n/a"], "1.23 M", "4", "1.5", "0.350", "1.75"]
    assert rows["narrow"] == narrow
    wide = ["1 of 2", *2 * ["50.0", "n/a"], "1.23 M", "4", "1.5", "0.200", "1.00"]
    assert rows["wide"] == rows["default"] == wide
    assert "- wide, seed 2: failed: OSError: no b.pth\n" in text
    assert "3 of 4 runs finished" in text and "2 cores, OMP_NUM_THREADS 1, torch 2.5" in text
    assert "4 train, 2 val, 2 heldout images; size 64, max_shapes 4." in text
    assert "python tools/study.py widths.yaml --output out\n" in text


def test_a_key_that_is_new_in_the_code_makes_no_run_worthless(study, files, tmp_path):
    run = study.runs_of(study.load_study(files()), str(tmp_path / "out"))[0]
    _finished(study, run, 40.0, 0.3)
    path = Path(run.folder) / "settings.json"
    settings = json.loads(path.read_text())
    del settings["MODEL.SHARED_RIS.DECODER_LAYERS"]  # at its default
    path.write_text(json.dumps(settings))
    assert run.record["state"] == "finished"
    del settings["MODEL.SHARED_RIS.DIM"]  # not at its default
    path.write_text(json.dumps({**settings, "MODEL.GONE": 1}))
    assert run.record["error"] == "MODEL.SHARED_RIS.DIM, MODEL.GONE"


@pytest.mark.parametrize(
    "old, new, message",
    [
        ("question:", "qestion:", "unknown key 'qestion'; did you mean question"),
        ("question: Does the width matter?", "", "'question' is missing"),
        ("iterations: 4", "iterations: many", "iterations must be int, it is 'many'"),
        ("iterations: 4", "iterations: 0", "iterations must be positive"),
        ("iterations: 4", "minutes: -1", "minutes must be positive"),
        ("seeds: [1, 2]", "seeds: [1, 1]", "seeds must be different"),
        ("config: quick.yaml", "config: absent.yaml", "cell narrow: no such config: .*absent.yaml"),
        ("DIM: 16", "DIMM: 16", "cell narrow: command line: .*MODEL.SHARED_RIS.DIMM"),
        ("MODEL.SHARED_RIS.DIM: 16", "SEED: 3", "cell narrow: SEED cannot be set.*by seeds"),
        ("SOLVER.BASE_LR: 0.01", "SOLVER.MAX_ITER: 9", "options: SOLVER.MAX_ITER .*by iterations"),
        ("{MODEL.SHARED_RIS.DIM: 16}", "3", "cell narrow must be a mapping"),
        ("wide: {}", "wide: {}\n  narrow: {}", "'narrow' is there twice"),
        ("DIM: 16", "DIM: 32", "duplicate cell: narrow and wide are the same run"),
        ("wide: {}", "wide: {}\n  w/o: {A: 1}", "cell 'w/o': letters, digits"),
        ("narrow: narrow", "narrow: narow", "unknown group Width: cell 'narow'; did you mean narr"),
        ('"default"', "no", "group Again: False must be text; put it in quotes"),
        ("narrow: narrow,", "", "cells that no group shows: narrow"),
        ("reference: wide", "reference: w", "unknown reference 'w'"),
        ("ris_grefshapes_val", "ris_grefshapes_vla", "unknown dataset .*did you mean ris_grefsh"),
        ("gIoU,", "GIoU,", "unknown metric 'GIoU'; .*known: gIoU, cIoU"),
        ("train: 4", "trian: 4", "unknown refshapes: split 'trian'; did you mean train"),
        ("max_shapes: 4", "max_shape: 4", "unknown refshapes 'max_shape'; did you mean max_shapes"),
        ("max_shapes: 4", "max_shapes: 40", "min <= max <= 9"),
        ("title: Two", "title: [Two", "line 3: expected"),
    ],
)
def test_a_malformed_study_is_refused(study, files, old, new, message):
    path = files({old: new})
    with pytest.raises((ValueError, FileNotFoundError), match=f"(?s)widths.yaml.*{message}"):
        study.main([path, "--output", "unused"])


def test_unknown_choices_on_the_command_line(study, files):
    for words, message in ((["--only", "narow"], "narrow"), (["--seed", "3"], "known: 1, 2")):
        with pytest.raises(ValueError, match=message):
            study.main([files(), "--output", "unused", *words])


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.stem)
def test_the_studies_of_the_project_load(study, path):
    loaded = study.load_study(str(path))
    assert loaded.question.endswith("?")
    study.report(loaded, "unused")
