"""RefShapes' benchmarks: what their protocol promises, and that they never change."""

import dataclasses
import hashlib
import json
import runpy
import sys
from collections import Counter
from pathlib import Path

import pytest
from detectron2.data import DatasetCatalog

import ris_d2  # noqa: F401  (registers the datasets)
from ris_d2.evaluation.kinds import KINDS, kind_names, kinds_of
from ris_d2.io import load_json
from ris_d2.refshapes import BENCHMARKS, SPLITS, generate, instances, references
from ris_d2.refshapes.scenes import FAMILIES, HELDOUT

SCRIPT = Path(__file__).parents[2] / "datasets" / "make_refshapes.py"
HARD = BENCHMARKS["hard-v1"]


@pytest.fixture(scope="module")
def scenes():
    return {split: generate(split, 60, HARD.options) for split in SPLITS}


def test_benchmark_is_the_same_everywhere(scenes):
    """Pinned: rows of the table in docs/refshapes.md can be compared. A change is another version."""
    assert HARD.scenes == {"train": 6000, "val": 500, "testA": 500, "testB": 500, "heldout": 500}
    excerpt = [scene for split in SPLITS for scene in scenes[split][:4]]
    contents = [instances(excerpt), references(excerpt, generalized=True)]
    assert [hashlib.sha256(json.dumps(c).encode()).hexdigest()[:16] for c in contents] == [
        "36cbb3df93c6e242",
        "07b570d95960cb31",
    ]


@pytest.mark.parametrize("split", SPLITS)
def test_every_scene_has_one_sentence_of_each_kind(scenes, split):
    for scene in scenes[split]:
        assert 5 <= len(scene.shapes) <= 8
        kinds = Counter(kind for e in scene.expressions for kind in kind_names(kinds_of(e.text)))
        assert kinds == dict.fromkeys(KINDS, 1)
    targets = [len(e.targets) for scene in scenes[split] for e in scene.expressions]
    assert 0.18 < targets.count(0) / len(targets) < 0.32
    assert 0.22 < targets.count(1) / len(targets) < 0.38


def test_held_out_combinations_are_new_and_their_parts_are_not(scenes):
    seen = {
        (s.color, s.kind) for split in SPLITS[:-1] for scene in scenes[split] for s in scene.shapes
    }
    assert not seen & {*HELDOUT}
    assert {color for color, _ in HELDOUT} <= {color for color, _ in seen}
    assert {kind for _, kind in HELDOUT} <= {kind for _, kind in seen}
    for scene in scenes["heldout"]:
        for expression in scene.expressions:
            named = {(scene.shapes[i].color, scene.shapes[i].kind) for i in expression.targets}
            assert not named or named & {*HELDOUT}


def test_test_splits_refer_to_their_families(scenes):
    for split, family in FAMILIES.items():
        for scene in scenes[split]:
            targets = {scene.shapes[i].kind for e in scene.expressions for i in e.targets}
            assert targets <= {*family}


def test_the_command_writes_it_under_the_registered_names(monkeypatch, tmp_path, capsys):
    few = dataclasses.replace(HARD, scenes={"train": 2, "heldout": 2})
    monkeypatch.setitem(BENCHMARKS, "hard-v1", few)
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    words = ["make_refshapes.py", "--root", str(tmp_path / "refshapes_hard_v1")]
    monkeypatch.setattr(sys, "argv", [*words, "--benchmark", "hard-v1"])
    runpy.run_path(str(SCRIPT), run_name="__main__")
    assert load_json(tmp_path / "refshapes_hard_v1/refshapes.json")["per_form"] == 1
    for split in ("train", "heldout"):
        records = DatasetCatalog.get(f"ris_grefshapes_hard_v1_{split}")
        assert [len(record["expressions"]) for record in records] == [7, 7]
    assert len(DatasetCatalog.get("ris_refshapes_hard_v1_train")) == 2

    monkeypatch.setattr(sys, "argv", [*words, "--benchmark", "hard-v1", "--max-shapes", "5"])
    with pytest.raises(SystemExit):
        runpy.run_path(str(SCRIPT), run_name="__main__")
    assert "--benchmark hard-v1 fixes max_shapes" in capsys.readouterr().err
