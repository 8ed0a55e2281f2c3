"""The method of docs/extending.md, as a reader has it: code, recipe, training, evaluation."""

import json
import math
import re
from pathlib import Path

from detectron2.modeling import META_ARCH_REGISTRY

from ris_d2 import load_config, refshapes
from ris_d2.data.catalog import register_all
from ris_d2.engine import Trainer

ROOT = Path(__file__).parents[1]


def test_a_new_method_of_sixty_lines_trains_and_evaluates(tmp_path, monkeypatch):
    page = (ROOT / "docs/extending.md").read_text().split("## A new method")[1]
    code, recipe = (
        re.search(rf"```{kind}\n(.*?)```", page, re.S)[1] for kind in ("python", "yaml")
    )
    assert len(code.splitlines()) <= 60
    (tmp_path / "dot.py").write_text(code)
    (tmp_path / "dot.yaml").write_text(recipe)
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    register_all()
    refshapes.write(str(tmp_path / "refshapes"), {"train": 4, "val": 2}, refshapes.Options())
    options = ["SOLVER.MAX_ITER", "2", "SOLVER.IMS_PER_BATCH", "2", "DATALOADER.NUM_WORKERS", "0"]
    options += ["OUTPUT_DIR", str(tmp_path / "output"), "MODEL.DEVICE", "cpu"]
    try:
        cfg = load_config(str(tmp_path / "dot.yaml"), options, modules=[str(tmp_path / "dot.py")])
        trainer = Trainer(cfg)
        before = trainer.model.sentence.weight.detach().clone()
        trainer.resume_or_load(resume=False)
        trainer.train()
    finally:
        META_ARCH_REGISTRY._obj_map.pop("Dot", None)
    assert not trainer.model.sentence.weight.equal(before)
    results = json.loads(
        (tmp_path / "output/inference/ris_grefshapes_val/results.json").read_text()
    )
    assert math.isfinite(results["referring"]["gIoU"])
