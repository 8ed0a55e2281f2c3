"""README's and docs/'s commands name what exists; README's on RefShapes are run as they stand."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from ris_d2 import get_ris_cfg, load_config, refshapes

ROOT = Path(__file__).parents[1]
PAGES = sorted(
    page
    for pattern in ("*.md", "datasets/*.md", "docs/**/*.md", "tools/**/*.md")
    for page in ROOT.glob(pattern)
)


def commands(page):
    """The Python commands of a page's shell blocks, as lists of words."""
    fenced = re.findall(r"^```(\w*)\n(.*?)^```", page.read_text(), re.S | re.M)
    blocks = [text for language, text in fenced if not language]
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    words = [shlex.split(line, comments=True) for line in lines]
    return [command for command in words if command and command[0] in ("python", "torchrun")]


def anchors(page):
    """The names that a page's headings have on the web."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.M)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in headings}


README = commands(ROOT / "README.md")
EVERYWHERE = [command for page in PAGES for command in commands(page)]


@pytest.mark.parametrize("command", EVERYWHERE, ids=" ".join)
def test_scripts_configs_and_keys_exist(command):
    script = next(word for word in command if word.endswith(".py"))
    assert (ROOT / script).is_file()
    if "--config-file" in command:
        at = command.index("--config-file") + 1
        if "/" not in command[at] or command[at].startswith("my_"):
            return  # the reader's own file
        options = command[at + 1 :]
        first_key = next((i for i, word in enumerate(options) if re.match(r"[A-Z]+\.", word)), None)
        load_config(str(ROOT / command[at]), options[first_key:] if first_key is not None else [])


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if target.startswith("http"):
            continue
        file, _, anchor = target.partition("#")
        linked = page.parent / file if file else page
        assert linked.exists(), target
        assert not anchor or anchor in anchors(linked), target


def test_what_the_small_model_knows(tmp_path):
    refshapes.write_tokenizer(str(tmp_path))
    vocabulary = json.loads((tmp_path / "tokenizer.json").read_text())["model"]["vocab"]
    words = [word for word in vocabulary if not word.startswith("<")]
    assert f": {len(words)} words" in (ROOT / "README.md").read_text()


@pytest.mark.parametrize("study", sorted((ROOT / "configs/studies").glob("*.yaml")), ids=str)
def test_a_study_that_has_a_page_says_there_what_was_found_and_what_to_know(study):
    page = ROOT / "docs/studies" / f"{study.stem}.md"
    content = yaml.safe_load(study.read_text())
    for text in (content.get("found"), content.get("note")):
        if text and page.exists():
            assert " ".join(text.split()) in page.read_text()


def find(*words):
    """The one command of the pages for readers that has all these words."""
    pages = ("README.md", "docs/training.md", "docs/evaluating.md", "docs/looking_inside.md")
    found = [command for page in pages for command in commands(ROOT / page)]
    (command,) = [c for c in found if all(any(w in part for part in c) for w in words)]
    return command


def run(command, tmp_path, *more):
    environment = {**os.environ, "DETECTRON2_DATASETS": str(tmp_path), "OMP_NUM_THREADS": "1"}
    # The package of this checkout, also where it is not installed.
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), environment.get("PYTHONPATH", "")])
    result = subprocess.run(
        [sys.executable, *command[1:], *more],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    return result.stdout + result.stderr


def test_a_reader_gets_from_data_to_masks(tmp_path):
    """RefShapes by hand, training on two CPU processes, evaluation, the demo, scoring of a file, and
    looks inside."""
    place = {
        "datasets/harder/refshapes": str(tmp_path / "refshapes"),
        "sheet.png": str(tmp_path / "s.png"),
    }
    make = [place.get(word, word) for word in find("make_refshapes.py")]
    run(make, tmp_path, "--train-images", "16", "--val-images", "4")
    assert (tmp_path / "s.png").is_file()

    output = tmp_path / "output"
    trained = ["SOLVER.MAX_ITER", "4", "TEST.SAVE_PREDICTIONS", "True", "OUTPUT_DIR", str(output)]
    assert "gIoU" in run(find("instant_test", "--num-gpus"), tmp_path, *trained)
    results = output / "inference" / "ris_grefshapes_val"
    assert (output / "model_final.pth").is_file()

    place = {"predictions.jsonl": str(results / "predictions.jsonl")}
    score = [place.get(word, word) for word in find("score_predictions.py")]
    run(score, tmp_path, "--output", str(tmp_path / "scored"))
    scored, direct = (f / "results.json" for f in (tmp_path / "scored", results))
    assert scored.read_text() == direct.read_text()

    image = next((tmp_path / "refshapes" / "images" / "train2014").iterdir())
    place = {
        "scene.jpg": str(image),
        "output/demo": str(tmp_path / "demo"),
        "configs/refshapes/shared_ris_tiny.yaml": "configs/instant_test/shared_ris.yaml",
        "output/quickstart/train/model_final.pth": str(output / "model_final.pth"),
    }
    out = run([place.get(word, word) for word in find("demo.py")], tmp_path)
    assert "the green triangle" in out and (tmp_path / "demo" / "results.json").is_file()

    errors = find("analyze_errors.py")
    assert "target / image" in run([*errors[:2], str(results / "per_expression.jsonl")], tmp_path)

    place["output/attention"] = str(tmp_path / "attention")
    attention = [place.get(word, word) for word in find("tools/attention/main.py")]
    run(attention, tmp_path, "--images", "2", "--draw", "1")
    assert (tmp_path / "attention" / "maps.png").is_file()


def test_the_published_recipe_runs_in_the_real_directory_tree(tmp_path):
    """The commands for RefCOCO and eight GPUs, on RefShapes laid out as RefCOCO and two CPU processes:
    a small model, an empty MODEL.INIT and two steps instead of epochs are all that differs."""
    shapes = {"train": 6, "val": 2, "testA": 2, "testB": 2}
    refshapes.write(str(tmp_path / "refshapes"), shapes, refshapes.Options())
    output = tmp_path / "output"
    small = {
        "MODEL.INIT": "[]",
        "MODEL.DEVICE": "cpu",
        "MODEL.RIS.BEIT3.EMBED_DIM": "24",
        "INPUT.RIS.SIZE": "(64, 64)",
        "INPUT.RIS.TOKENIZER.KIND": "hf",
        "INPUT.RIS.TOKENIZER.PATH": "tokenizer",
        "MODEL.SHARED_RIS.DIM": "32",
        "DATALOADER.NUM_WORKERS": "0",
        "SOLVER.IMS_PER_BATCH": "4",
        "SOLVER.RIS.EPOCHS": "0",
        "OUTPUT_DIR": str(output),
    }
    options = [word for pair in small.items() for word in pair]
    train, resume, evaluate = (
        ["2" if word == "8" else word for word in command]
        for command in README
        if "configs/shared_ris_beit3_b.yaml" in command and "--num-gpus" in command
    )
    run(train, tmp_path / "refshapes", "SOLVER.MAX_ITER", "1", *options)
    assert "Starting training from iteration 1" in run(
        resume, tmp_path / "refshapes", "SOLVER.MAX_ITER", "2", *options
    )
    results = [output / "inference" / f"ris_refcoco_unc_{s}" for s in ("val", "testA", "testB")]
    before = [(folder / "results.json").read_text() for folder in results]
    weights = ["MODEL.WEIGHTS", str(output / "model_final.pth")]
    run(evaluate[: evaluate.index("MODEL.WEIGHTS")] + weights, tmp_path / "refshapes", *options)
    assert [(folder / "results.json").read_text() for folder in results] == before


def test_pages_name_keys_that_exist():
    cfg = get_ris_cfg()
    for page in PAGES:
        if page.name == "CHANGELOG.md":  # which names former keys, too
            continue
        text = page.read_text()
        names = re.findall(r"\b(?:MODEL|INPUT|SOLVER|TEST|DATASETS)(?:\.[A-Z][A-Z0-9_]*)+", text)
        own = set(re.findall(r"cfg\.(MODEL\.\w+) = ", text))  # keys of a method that a page shows
        for name in names:
            if any(name.startswith(key) for key in own):
                continue
            node = cfg
            for part in name.split(".")[:-1]:
                node = node[part]
            assert name.split(".")[-1] in node, f"{page.name}: {name}"
