"""docs/predicting.md: its commands and its Python, in its order, in a folder as a reader has it."""

import json
import logging
import re
import shlex
import shutil
import sys
from pathlib import Path

import cv2
import pytest
import torch

from ris_d2 import Predictor, __main__, example, refshapes
from ris_d2.data.catalog import register_all
from ris_d2.predictor import load_rgb

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "predicting.md").read_text()


@pytest.fixture
def reader(tmp_path, monkeypatch):
    """A working directory with photographs, a video and what make quickstart leaves."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(ROOT))
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    register_all()
    refshapes.write(str(tmp_path / "refshapes"), {"train": 8, "val": 2}, refshapes.Options())
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    (tmp_path / "photos").mkdir()
    shutil.copy(example.SCENE, tmp_path / "photos" / "street.png")
    (tmp_path / "sentences.csv").write_text("image,sentence\nstreet.png,the circles\n")
    frame = cv2.cvtColor(load_rgb(example.SCENE), cv2.COLOR_RGB2BGR)
    video = cv2.VideoWriter("clip.avi", cv2.VideoWriter_fourcc(*"MJPG"), 10, frame.shape[1::-1])
    for _ in range(11):
        video.write(frame)
    video.release()
    checkpoint = tmp_path / "output" / "quickstart" / "train" / "model_final.pth"
    checkpoint.parent.mkdir(parents=True)
    model = Predictor.from_pretrained("example").model
    torch.save({"model": model.state_dict()}, checkpoint)
    return tmp_path


def run(command):
    """One line of the page, in this process: starting one takes longer than what it does."""
    program, *words = shlex.split(command)
    if program == "ris_d2":
        __main__.main(words)
        return
    if program == "torchrun":  # several processes: tests/tools/test_predict.py
        words = words[2:]
    path, *words = words
    module = sys.modules.get(Path(path).stem) or __import__(Path(path).stem)
    if path == "tools/webdemo.py":  # waits for visitors: tests/tools/test_webdemo.py
        module.parse(words)
        return
    if path == "train_net.py":
        few = ["SOLVER.MAX_ITER", "2", "SOLVER.IMS_PER_BATCH", "2", "DATALOADER.NUM_WORKERS", "0"]
        module.main(module.parse([*words, *few, "TEST.EVAL_PERIOD", "0", "DATASETS.TEST", "()"]))
    else:
        module.main(words)


def test_the_page(reader, capsys):
    loggers = [logging.getLogger(name) for name in ("ris_d2", "detectron2", "fvcore")]
    before = [(logger.handlers[:], logger.propagate, logger.level) for logger in loggers]
    namespace, ran = {}, []
    try:
        for kind, block in re.findall(r"```(\w*)\n(.*?)```", PAGE, re.S):
            if kind == "python":
                exec(block, namespace)
                continue
            for command in block.strip().splitlines():
                run(command)
                ran.append(command.split()[0])
    finally:
        for logger, (handlers, propagate, level) in zip(loggers, before):
            logger.handlers[:], logger.propagate = handlers, propagate
            logger.setLevel(level)
    assert ran.count("python") == 6 and ran.count("ris_d2") == 2 and ran.count("torchrun") == 1
    assert "mask_threshold" in capsys.readouterr().out
    assert {a["image_id"] for a in namespace["annotations"]} == {7}
    assert "| val | 65.30" in re.sub(" +", " ", (reader / "my_model" / "README.md").read_text())
    for name, count in (("photos", 2), ("asked", 1), ("clip", 2), ("shared", 1)):
        content = json.loads((reader / "out" / name / "predictions.json").read_text())
        assert len(content["expressions"]) == count and content["annotations"]
