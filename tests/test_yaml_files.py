"""Configurations and studies are data: no yaml runs code, and what is wrong is said with its place."""

import re
import runpy
import sys
from pathlib import Path

import pytest
import yaml

from ris_d2 import load_config
from ris_d2.yaml_files import MAX_BYTES, read_yaml

ROOT = Path(__file__).parents[1]


def write(path, text):
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return str(path)


def dangerous(tmp_path):
    """Values that write the file ``ran`` if a loader obeys them, by three kinds of tags."""
    ran = tmp_path / "ran"
    return ran, {
        "apply": f'!!python/object/apply:os.system ["touch {ran}"]',
        "new": f"!!python/object/new:type {{args: [x, !!python/tuple [], {{}}], state: {ran}}}",
        "open": f'!!python/object/apply:builtins.open ["{ran}", "w"]',
    }


@pytest.mark.parametrize("kind", ["apply", "new", "open"])
@pytest.mark.parametrize("place", ["file", "base", "nested", "list"])
def test_no_configuration_runs_code(tmp_path, kind, place):
    ran, values = dangerous(tmp_path)
    texts = {
        "file": f"SEED: {values[kind]}\n",
        "base": f"SEED: {values[kind]}\n",
        "nested": f"SOLVER: {{RIS: {{EPS: {values[kind]}}}}}\n",
        "list": f"DATASETS:\n  TRAIN: [{values[kind]}]\n",
    }
    path = write(tmp_path / "leaf.yaml", texts[place])
    if place == "base":
        (tmp_path / "leaf.yaml").rename(tmp_path / "base.yaml")
        path = write(tmp_path / "leaf.yaml", "_BASE_: base.yaml\n")
    file = "base" if place == "base" else "leaf"
    with pytest.raises(ValueError, match=rf"{file}\.yaml: line \d: .*!!python/object"):
        load_config(path)
    assert not ran.exists()


CONFIG, OUT = ["--config-file", "{config}"], ["--output", "{out}"]
PROGRAMS = [  # all that read a configuration or a study
    ("train_net.py", CONFIG),
    ("tools/analyze.py", CONFIG),
    ("tools/benchmark.py", CONFIG),
    ("tools/demo.py", [*CONFIG, "--image", "x.png", "--text", "x", *OUT]),
    ("tools/selected_layers.py", [*CONFIG, "--dataset", "ris_refcoco_unc_val", *OUT]),
    ("tools/quickstart.py", [*CONFIG, *OUT]),
    ("tools/attention/main.py", ["--model", "A", "{config}", "w.pth", "--dataset", "ris_x", *OUT]),
    ("tools/study.py", ["{config}", *OUT]),
    ("tools/study.py", ["{study}", *OUT]),
]


@pytest.mark.parametrize("program, words", PROGRAMS)
def test_no_program_runs_code_of_a_yaml(tmp_path, monkeypatch, capsys, program, words):
    ran, values = dangerous(tmp_path)
    config = write(tmp_path / "leaf.yaml", f"SEED: {values['apply']}\n")
    study = (
        "{title: T, question: Q, config: leaf.yaml, seeds: [1], metrics: [gIoU],\n"
        " datasets: {a: ris_refcoco_unc_val}, cells: {one: {}}}\n"
    )
    paths = {
        "config": config,
        "study": write(tmp_path / "study.yaml", study),
        "out": tmp_path / "o",
    }
    arguments = [word.format(**paths) for word in words]
    monkeypatch.setattr(sys, "argv", [program, *arguments])
    monkeypatch.setattr(sys, "path", [str((ROOT / program).parent), *sys.path])
    with pytest.raises((ValueError, SystemExit)) as refused:
        runpy.run_path(str(ROOT / program), run_name="__main__")
    said = f"{refused.value} {capsys.readouterr().err}"
    assert "leaf.yaml: line 1: SEED has the tag !!python/object/apply:os.system" in said
    assert not ran.exists()


BAD = {
    "empty": ("# nothing\n", "is empty"),
    "a list": ("- SEED\n", "holds no mapping"),
    "a word": ("SEED\n", "holds no mapping"),
    "broken": ("SEED: [1\n", "line 2: expected ',' or '\\]'"),
    "two documents": ("SEED: 1\n---\nSEED: 2\n", "line 2: but found another document"),
    "duplicate": ("SEED: 1\nSOLVER: {}\nSEED: 2\n", "line 3: 'SEED' is there twice"),
    "nested duplicate": ("SOLVER: {BASE_LR: 1.0, BASE_LR: 2.0}\n", "line 1: 'BASE_LR' is there"),
    "quoted duplicate": ("SEED: 1\n'SEED': 2\n", "'SEED' is there twice"),
    "deep": ("SEED: " + 300 * "[" + 300 * "]", "nested|more than"),
    "very deep": ("SEED: " + 100_000 * "[", "nested"),
    "alias of itself": ("SEED: &a [*a]\n", "SEED holds more than"),
    "billion laughs": (
        "a0: &a0 [x]\n" + "".join(f"a{i}: &a{i} [{9 * f'*a{i - 1},'}]\n" for i in range(1, 12)),
        "holds more than",
    ),
    "not text": (b"SEED: \xff\xfe\n", "codec|character"),
    "a zip": (b"PK\x03\x04" + bytes(range(256)), "character|codec|byte"),
    "a huge integer": ("SEED: " + 5000 * "9", "digits"),
    "a date": ("SEED: 2024-13-77\n", "SEED has the tag !!timestamp"),
    "a list as key": ("? [a, b]\n: 1\n", "list or mapping for a key"),
    "a number as key": ("MODEL: {RIS: {FREEZE: {1: eval}}}\n", r"MODEL\.RIS\.FREEZE\.1 is no text"),
    "an unknown alias": ("SEED: *a\n", "line 1: found undefined alias"),
    "large": ("SEED: '" + MAX_BYTES * "x" + "'\n", "larger than"),
    "parentheses": (f"OUTPUT_DIR: 1\nSEED: '{5000 * '('}'\n", "SEED: "),
    "signs": (f"SEED: '{20_000 * '-'}1'\n", "SEED: (Memory|Recursion)Error"),
    "itself": ("_BASE_: leaf.yaml\n", "includes itself"),
    "a URL": ("_BASE_: https://example.com/a.yaml\n", "_BASE_ 'https.*URLs are not read"),
    "another URL": ("_BASE_: [detectron2://a.yaml]\n", "URLs are not read"),
    "a number for a base": ("_BASE_: 3\n", "_BASE_ 3 is no path"),
    "a device": ("_BASE_: /dev/zero\n", "/dev/zero: is no regular file"),
    "many bases": (
        "_BASE_: [" + ", ".join(["twice.yaml"] * 99) + "]\n",
        "more than 100 files",
    ),
    "misspelt": (
        "SOLVER: {BASELR: 1.0}\n",
        "unknown key SOLVER.BASELR; did you mean SOLVER.BASE_LR",
    ),
    "misplaced": ("SOLVER: {SCHEDULE: poly}\n", "did you mean SOLVER.RIS.SCHEDULE"),
    "emptied": ("SOLVER:\n", "SOLVER is a group of keys, None is not"),
    "no group": ("SEED: {A: 1}\n", "SEED is a value, no group"),
    "wrong type": ("SOLVER: {BASE_LR: fast}\n", r"SOLVER\.BASE_LR"),
}


@pytest.mark.parametrize("kind", BAD)
def test_a_bad_configuration_is_a_value_error_with_its_name(tmp_path, kind):
    write(tmp_path / "twice.yaml", "_BASE_: [end.yaml, end.yaml]\n")
    write(tmp_path / "end.yaml", "SEED: 1\n")
    text, message = BAD[kind]
    path = write(tmp_path / "leaf.yaml", text)
    with pytest.raises(ValueError, match=f"(?s){re.escape(str(tmp_path))}|/dev/zero") as refused:
        load_config(path)
    assert re.search(message, str(refused.value)), str(refused.value)[:300]
    assert len(str(refused.value)) < 1000


def test_a_missing_base_is_named_with_who_names_it(tmp_path):
    write(tmp_path / "middle.yaml", "_BASE_: gone.yaml\n")
    path = write(tmp_path / "leaf.yaml", "_BASE_: middle.yaml\n")
    with pytest.raises(FileNotFoundError, match="middle.yaml: _BASE_ names .*gone.yaml: no such"):
        load_config(path)
    with pytest.raises(FileNotFoundError, match="absent.yaml: no such file"):
        load_config(str(tmp_path / "absent.yaml"))


def test_bases_merge_in_order_relative_to_their_files_and_from_home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "home").mkdir()
    (tmp_path / "more").mkdir()
    write(tmp_path / "home/home.yaml", "SEED: 1\nSOLVER: {IMS_PER_BATCH: 2, MAX_ITER: 3}\n")
    write(tmp_path / "more/side.yaml", "_BASE_: ../first.yaml\nSOLVER: {MAX_ITER: 4}\n")
    write(tmp_path / "first.yaml", "SEED: 5\nMODEL: {RIS: {FREEZE: {backbone: eval}}}\n")
    text = "_BASE_: [~/home.yaml, more/side.yaml]\nMODEL: {RIS: {FREEZE: {text: train}}}\n"
    cfg = load_config(write(tmp_path / "leaf.yaml", text), ["MODEL.RIS.FREEZE.backbone", "none"])
    assert (cfg.SEED, cfg.SOLVER.IMS_PER_BATCH, cfg.SOLVER.MAX_ITER) == (5, 2, 4)
    assert dict(cfg.MODEL.RIS.FREEZE) == {"backbone": "none", "text": "train"}


def test_a_dumped_configuration_reads_back(tmp_path):
    """Also its aliases, which yaml writes where two keys share one value."""
    cfg = load_config(str(ROOT / "configs" / "deris_swin_s.yaml"))
    dumped = cfg.dump()
    assert "&id001" in dumped
    again = load_config(write(tmp_path / "config.yaml", dumped))
    assert yaml.safe_load(again.dump()) == yaml.safe_load(dumped)


def test_merge_keys_and_aliases_are_plain_yaml(tmp_path):
    path = write(tmp_path / "a.yaml", "a: &a {x: 1, y: 2}\nb: {<<: *a, y: 3}\nc: *a\n")
    assert read_yaml(path) == {"a": {"x": 1, "y": 2}, "b": {"x": 1, "y": 3}, "c": {"x": 1, "y": 2}}


@pytest.mark.parametrize(
    "options, message",
    [
        (["SOLVER.BASELR", "1"], "unknown key SOLVER.BASELR; did you mean SOLVER.BASE_LR"),
        (["SOLVER.BASE_LR"], "'SOLVER.BASE_LR' has no value"),
        (["SOLVER.BASE_LR.X", "1"], "SOLVER.BASE_LR is a value, no group"),
        (["SOLVER", "1"], "SOLVER is a group of keys"),
        (["_BASE_", "a.yaml"], "unknown key _BASE_"),
        (["SEED", "__import__('os').getpid()"], "SEED"),
        (["", "1"], "unknown key "),
        (["SEED", "(" * 5000], "SEED: "),
    ],
)
def test_bad_options_name_the_command_line_and_the_key(options, message):
    with pytest.raises(ValueError, match=f"^command line.*{message}"):
        load_config("", options)
