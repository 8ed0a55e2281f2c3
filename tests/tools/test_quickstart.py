"""tools/quickstart.py: the whole way on a handful of images, and what its parts promise."""

import contextlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import _follow
import numpy as np
import pytest
import torch
from PIL import Image

from ris_d2.engine import claim


@pytest.fixture
def quickstart(load_tool, tmp_path, monkeypatch):
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path / "datasets"))
    return load_tool("quickstart")


@pytest.fixture
def config(tiny_config, tmp_path):
    path = tmp_path / "quick.yaml"
    path.write_text(f"""
_BASE_: {tiny_config}
INPUT: {{RIS: {{TOKENIZER: {{PATH: refshapes/tokenizer}}}}}}
DATASETS: {{TRAIN: ["ris_grefshapes_train"], TEST: ["ris_grefshapes_val"]}}
DATALOADER: {{NUM_WORKERS: 0}}
SOLVER: {{IMS_PER_BATCH: 2, MAX_ITER: 3, BASE_LR: 0.001, CHECKPOINT_PERIOD: 2}}
""")
    return str(path)


def _arguments(config, output, *more):
    paths = ["--config-file", config, "--output", str(output)]
    return paths + ["--train-images", "8", "--val-images", "12", *more]


def test_the_whole_way_and_the_command_that_it_prints(
    quickstart, load_tool, config, tmp_path, capsys
):
    output = tmp_path / "out"
    report = quickstart.main(_arguments(config, output))
    printed = capsys.readouterr().out
    assert json.loads((output / "metrics.json").read_text()) == report
    assert report["metrics"]["num_expressions"] > 50
    assert report["bars"]["gIoU"]["met"] is False and "MISSED" in printed
    reached = report["bars"]["over_other"]["reached"]
    assert reached == report["metrics"]["gIoU"] - report["other_sentences"]["gIoU"]
    sheet = Image.open(output / "contact_sheet.png")
    assert sheet.height > 7 * (168 + 12), "a line each for most of the 12 images"
    assert Image.open(output / "training_curve.png").width > 500

    # The printed command gives the same numbers.
    command = printed.split("The same numbers again:\n")[1].split()
    assert command[:2] == ["python", os.path.relpath(quickstart.REPOSITORY + "/train_net.py")]
    train_net = load_tool("../train_net")
    results = train_net.main(train_net.parse(command[2:]))
    assert results["referring"] == report["metrics"]

    # A second run keeps data and training, and another configuration is not mixed in.
    weights = output / "train" / "model_final.pth"
    before = weights.stat().st_mtime_ns
    assert quickstart.main(_arguments(config, output))["metrics"] == report["metrics"]
    assert "finished before" in capsys.readouterr().out
    assert weights.stat().st_mtime_ns == before
    with pytest.raises(SystemExit, match="--fresh"):
        quickstart.main(_arguments(config, output, "SOLVER.BASE_LR", "0.1"))

    # While it trains, each new checkpoint's predictions are drawn once.
    args = quickstart.parse(_arguments(config, output))
    draw = quickstart._sheets(args, quickstart._load_cfg(args))
    for expected in (True, False):
        (output / "contact_sheet.png").unlink()
        draw()
        assert (output / "contact_sheet.png").exists() is expected
        assert ("contact_sheet.png after 2 iterations" in capsys.readouterr().out) is expected
        (output / "contact_sheet.png").touch()


def test_a_failing_training_shows_its_error(quickstart, config, tmp_path):
    arguments = _arguments(config, tmp_path / "out", "MODEL.RIS.PRECISION", "fp17")
    with pytest.raises(SystemExit, match="(?s)fp17.*training failed"):
        quickstart.main(arguments)


def test_fresh_deletes_what_the_quickstart_made_and_nothing_else(quickstart, config, tmp_path):
    output = tmp_path / "out"
    (output / "train").mkdir(parents=True)
    (output / "thesis.txt").write_text("years")
    with pytest.raises(SystemExit, match="files that are not of this quickstart"):
        quickstart.main(_arguments(config, output, "--fresh"))
    assert (output / "thesis.txt").read_text() == "years"

    cfg = quickstart._load_cfg(quickstart.parse(_arguments(config, output)))
    (output / "quickstart.yaml").write_text("of other settings")
    made = ["metrics.json", "train/model_0000001.pth", "train/log.txt", "val/results.json"]
    made.append("train/inference/ris_grefshapes_val/results.json")
    strangers = ["thesis.txt", "train/model_of_a_car.pth", "val/notes.txt", "eval/results.json"]
    for name in made + strangers:
        (output / name).parent.mkdir(parents=True, exist_ok=True)
        (output / name).write_text("content")
    with pytest.raises(SystemExit, match="another configuration's work; pass --fresh"):
        quickstart._prepare_output(str(output), cfg, fresh=False)
    quickstart._prepare_output(str(output), cfg, fresh=True)
    assert not any((output / name).exists() for name in made)
    assert all((output / name).read_text() == "content" for name in strangers)
    assert (output / "quickstart.yaml").read_text() == cfg.dump()


def test_fresh_leaves_data_of_others(quickstart, config, tmp_path):
    refshapes = quickstart.refshapes
    root = tmp_path / "datasets" / "refshapes"
    refshapes.write(str(root), {"train": 2, "val": 1}, refshapes.Options(max_shapes=6))
    before = (root / "refshapes.json").read_text()
    with pytest.raises(SystemExit, match="(?s)other options.*no others"):
        quickstart.main(_arguments(config, tmp_path / "out", "--fresh"))
    assert (root / "refshapes.json").read_text() == before


def _is_free(folder):
    """A process that is ending has no name any more, but still its files, and so its claim."""
    try:
        with claim(folder):
            return True
    except BlockingIOError:
        return False


def _processes_that_name(path):
    found = []
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            if str(path) in entry.read_text():
                found.append(entry.parent.name)
    return found


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere a killed process takes nobody along")
def test_killed_in_the_middle_it_leaves_no_process_and_ends_as_a_straight_one(
    quickstart, load_tool, config, tmp_path, monkeypatch
):
    options = [
        "SEED",
        "1",
        "SOLVER.MAX_ITER",
        "6",
        "SOLVER.CHECKPOINT_PERIOD",
        "2",
        "TEST.EVAL_PERIOD",
        "2",
    ]
    killed, straight = tmp_path / "killed", tmp_path / "straight"
    command = [sys.executable, quickstart.__file__, *_arguments(config, killed, *options)]
    with open(tmp_path / "log.txt", "w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
    try:
        deadline = time.monotonic() + 120
        while not (killed / "train" / "model_0000001.pth").exists():
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.01)
    finally:
        process.kill()
        process.wait()
    deadline = time.monotonic() + 10
    while _processes_that_name(killed) or not _is_free(killed / "train"):
        assert time.monotonic() < deadline, "its training goes on"
        time.sleep(0.05)

    train_net = load_tool("../train_net")

    class Trained:  # a process of its own takes seconds to start
        def __init__(self, training):
            train_net.main(train_net.parse(training.command[2:]))

        def poll(self):
            return 0

    monkeypatch.setattr(_follow, "start", Trained)
    report = quickstart.main(_arguments(config, killed, *options))
    expected = quickstart.main(_arguments(config, straight, *options))
    for name in ("metrics", "other_sentences"):
        assert report[name] == pytest.approx(expected[name], nan_ok=True, abs=0)
    histories = [
        [
            {key: value for key, value in line.items() if "/" in key or key == "iteration"}
            for line in quickstart.read_history(str(output / "train"))
            if "referring/gIoU" in line
        ]
        for output in (killed, straight)
    ]
    assert histories[0] == histories[1] and len(histories[0]) == 3
    best = [(output / "train" / "model_best.json").read_text() for output in (killed, straight)]
    assert best[0] == best[1]


def test_the_scenes_of_the_quickstart_are_as_promised(quickstart):
    """3 to 5 shapes; at least 20 % of the expressions without target, 20 % with several."""
    scenes = quickstart.refshapes.generate("val", 150, quickstart.SCENES)
    shapes = {len(scene.shapes) for scene in scenes}
    assert min(shapes) >= 3 and max(shapes) <= 5
    numbers = np.array([len(e.targets) for scene in scenes for e in scene.expressions])
    assert (numbers == 0).mean() >= 0.2 and (numbers > 1).mean() >= 0.2
    words = {word for scene in scenes for e in scene.expressions for word in e.text.split()}
    assert {"red", "circle", "big", "left", "above"} <= words
