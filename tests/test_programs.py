"""The programs as a person meets them: their command lines, their errors, what others add to them."""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from ris_d2.refshapes import write_tokenizer

ROOT = Path(__file__).parents[1]
PROGRAMS = ["train_net.py", "tools/attention/main.py"] + sorted(
    f"{folder}/{path.name}"
    for folder in ("datasets", "tools")
    for path in (ROOT / folder).glob("*.py")
    if not path.name.startswith("_")
)
NO_TORCH = """
import runpy, sys
sys.argv = sys.argv[1:]
sys.path.insert(0, sys.argv[0].rpartition("/")[0])
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
finally:
    assert "torch" not in sys.modules, "torch was imported"
"""


def run(*words, cwd=ROOT, **environment):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **environment}
    return subprocess.run(
        [sys.executable, *map(str, words)],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.mark.parametrize("program", PROGRAMS)
def test_help_and_unknown_options_do_not_wait_for_torch(program):
    shown = run("-c", NO_TORCH, ROOT / program, "--help")
    assert shown.returncode == 0, shown.stderr
    assert "usage:" in shown.stdout and len(shown.stdout.splitlines()) < 80
    wrong = run("-c", NO_TORCH, ROOT / program, "--no-such-option")
    assert wrong.returncode == 2 and "usage:" in wrong.stderr, wrong.stderr


@pytest.fixture(scope="module")
def load():
    """``load("demo")`` imports a program."""
    folders = [str(ROOT), str(ROOT / "tools")]
    sys.path += folders
    yield importlib.import_module
    for folder in folders:
        sys.path.remove(folder)


@pytest.fixture(scope="module")
def program(load):
    return load("_program")


@pytest.fixture
def parser(program):
    parser = program.Parser("What it does.")
    parser.add_config_file(required=True)
    parser.add_argument("--text", action="append")
    return parser


ORDERS = [
    "--config-file C A.B 1 D -1e-5 --text T",
    "A.B 1 --config-file C --text T D -1e-5",
    "A.B 1 --text T D -1e-5 --config-file C",
]


@pytest.mark.parametrize("line", ORDERS)
def test_pairs_may_stand_anywhere(parser, line):
    args = parser.parse_args(line.split())
    assert (args.config_file, args.text) == ("C", ["T"])
    assert args.opts == ["A.B", "1", "D", "-1e-5"]


@pytest.mark.parametrize(
    "line, message",
    [
        ("--config-file C A.B 1 --colour red", "--colour"),
        ("--config-file C A.B", "'A.B' has no value"),
        ("--config-file C other.yaml/x 1", "'other.yaml/x' is neither an option nor a KEY"),
        ("--config C", "--config-file"),  # no abbreviations
        ("A.B 1", "--config-file"),
    ],
)
def test_mistakes_are_said_with_status_2(parser, capsys, line, message):
    with pytest.raises(SystemExit) as refused:
        parser.parse_args(line.split())
    assert refused.value.code == 2 and message in capsys.readouterr().err


def test_errors_of_ours_are_one_line_and_others_keep_their_traceback(program, monkeypatch):
    from ris_d2 import load_config
    from ris_d2.data.catalog import check_files

    monkeypatch.setattr(sys, "argv", ["demo.py"])
    with pytest.raises(SystemExit, match="^demo.py: absent.yaml: no such file$"):
        program.run(load_config, "absent.yaml")
    with pytest.raises(
        SystemExit, match="^demo.py: unknown dataset 'ris_refcoco_unc_vall'; did you"
    ):
        program.run(check_files, "ris_refcoco_unc_vall")
    with pytest.raises(ValueError, match="invalid literal"):
        program.run(lambda: int("x"))
    monkeypatch.setattr(sys, "argv", ["demo.py", "--debug"])
    with pytest.raises(FileNotFoundError):
        program.run(load_config, "absent.yaml")


OWN_MODULE = '''
"""Somebody's method: SharedRIS with a bias of its own, a key for it, and a dataset in code."""
import torch
from detectron2.config import CfgNode, configurable
from detectron2.modeling import META_ARCH_REGISTRY
from ris_d2.modeling.shared_ris import SharedRIS


def add_config(cfg):
    cfg.MODEL.MINE = CfgNode()
    cfg.MODEL.MINE.BIAS = 0.0


@META_ARCH_REGISTRY.register()
class Mine(SharedRIS):
    @configurable
    def __init__(self, *, bias, **rest):
        super().__init__(**rest)
        self.bias = torch.nn.Parameter(torch.tensor(bias))

    @classmethod
    def from_config(cls, cfg):
        return {"bias": cfg.MODEL.MINE.BIAS, **super().from_config(cfg)}

    def segment(self, *args, **kwargs):
        outputs = super().segment(*args, **kwargs)
        outputs["mask_logits"] = outputs["mask_logits"] + self.bias
        return outputs
'''


@pytest.fixture(scope="module")
def mine(tmp_path_factory):
    """A folder with somebody's module, json dataset, images, tokenizer and config."""
    folder = tmp_path_factory.mktemp("mine")
    (folder / "my_method.py").write_text(OWN_MODULE)
    write_tokenizer(str(folder / "tokenizer"))
    (folder / "images").mkdir()
    for name, colour in (("a.png", "red"), ("b.png", "blue")):
        Image.new("RGB", (48, 40), colour).save(folder / "images" / name)
    size = {"height": 40, "width": 48}
    data = {
        "images": [{"id": i, "file_name": f"{'ab'[i]}.png", **size} for i in range(2)],
        "annotations": [
            {"id": i, "image_id": i, "segmentation": [[5, 5, 20, 5, 20, 20, 5, 20]]}
            for i in range(2)
        ],
        "expressions": [
            {"id": i, "image_id": i, "text": "the red circle", "annotation_ids": [i]}
            for i in range(2)
        ],
    }
    (folder / "data.json").write_text(json.dumps(data))
    (folder / "mine.yaml").write_text("""
VERSION: 2
MODEL:
  DEVICE: cpu
  META_ARCHITECTURE: Mine
  WEIGHTS: ""
  MINE: {BIAS: 0.5}
  RIS: {BEIT3: {EMBED_DIM: 16, DEPTH: 2, NUM_HEADS: 2, VOCAB_SIZE: 300}}
  SHARED_RIS: {DIM: 16, NUM_HEADS: 2, STAGES: [1, 2]}
INPUT: {RIS: {SIZE: [64, 64], UNIT: image, TOKENIZER: {KIND: hf, PATH: tokenizer}}}
DATASETS: {RIS_JSON: [[mine_all, data.json, images]], TRAIN: [mine_all], TEST: [mine_all]}
DATALOADER: {NUM_WORKERS: 0}
SOLVER: {IMS_PER_BATCH: 2, MAX_ITER: 1}
""")
    return folder


CONFIG = ["--config-file", "mine.yaml"]
OWN = [*CONFIG, "--import", "my_method.py"]


@pytest.fixture(scope="module")
def trained(mine):
    """Somebody's method trained on somebody's data, in two processes."""
    words = ["MODEL.MINE.BIAS", "0.25", "TEST.SAVE_PREDICTIONS", "True", "--num-gpus", "2"]
    done = run(ROOT / "train_net.py", *words, "--dist-url", "auto", *OWN, cwd=mine)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "BIAS: 0.25" in (mine / "output/config.yaml").read_text()
    return mine / "output/model_final.pth", done.stdout + done.stderr


def test_somebodys_method_data_and_keys_train_and_evaluate(mine, trained):
    weights, said = trained
    assert (mine / "output/inference/mine_all/results.json").is_file()
    assert len(said.splitlines()) < 120 and "ROI_HEADS" not in said, "the config is in a file"
    words = ["--import", "my_method", "--eval-only", "MODEL.WEIGHTS", weights]
    again = run(ROOT / "train_net.py", *CONFIG, *words, "OUTPUT_DIR", "again", cwd=mine)
    assert again.returncode == 0, again.stderr
    results = json.loads((mine / "again/inference/mine_all/results.json").read_text())
    assert results["referring"]["num_expressions"] == 2


def test_somebodys_method_and_data_serve_in_every_tool(mine, trained):
    weights, _ = trained
    predictions = "output/inference/mine_all/predictions.jsonl"
    data = ["DATASETS.RIS_JSON", "[['mine_all', 'data.json', 'images']]"]
    model = ["--model", "M", "mine.yaml", weights, "--import", "my_method.py"]
    small = ["--parts", "model", "mapper", "--seconds", "0.01", "--json"]
    demo = ["--text", "a", "--image", "images", "MODEL.MINE.BIAS", "0.1", "--output", "demo"]
    for tool, words, expected in (
        ("demo", [*demo, *OWN, "--weights", weights], "demo/b.png/0_mask.png"),
        ("analyze", [*OWN, "--json"], None),
        ("benchmark", [*OWN, *small], None),
        ("attention/main", [*model, "--dataset", "mine_all", "--output", "look"], "look/maps.png"),
        (
            "score_predictions",
            ["--dataset", "mine_all", "--predictions", predictions, *data, "--output", "scored"],
            "scored/results.json",
        ),
    ):
        done = run(ROOT / "tools" / f"{tool}.py", *words, cwd=mine)
        assert done.returncode == 0, f"{tool}: {done.stdout[-2000:]}{done.stderr[-2000:]}"
        assert expected is None or (mine / expected).is_file(), tool


@pytest.mark.parametrize(
    "words, message",
    [
        (CONFIG, "unknown key MODEL.MINE"),
        (
            [*OWN, "DATASETS.TEST", "['mine_al']"],
            "unknown dataset 'mine_al'; did you mean mine_all",
        ),
        ([*OWN, "DATASETS.TEST", "['ris_refcoco_unc_val']"], "ris_refcoco_unc_val: no such file: "),
        ([*OWN, "DATASETS.RIS_JSON", "[['mine_all', 'x.json', '.']]"], "x.json"),
        ([*OWN, "DATASETS.RIS_JSON", "[['mine_all', 'x.json']]"], "DATASETS.RIS_JSON: .*three"),
        ([*OWN, "MODEL.WEIGHTS", "absent.pth"], "absent.pth: no such weight file"),
        ([*OWN, "MODEL.INIT", "[['beit3', 'absent.pth']]"], "absent.pth: no such weight file"),
        ([*OWN, "MODEL.INIT", "[['beit4', 'absent.pth']]"], "beit4"),
        ([*OWN, "INPUT.RIS.TOKENIZER.PATH", "no_such_folder.json"], "no tokenizer 'no_such_fol"),
        ([*OWN, "SOLVER.IMS_PER_BATCH", "0"], "SOLVER.IMS_PER_BATCH is 0; it must be at least 1"),
        ([*OWN, "--eval-only"], "needs weights: MODEL.WEIGHTS is empty.*--untrained"),
        ([*OWN, "--eval-only", "--resume"], "needs weights: nothing holds no checkpoint"),
        ([*CONFIG, "--import", "absent.py"], "--import .*absent.py: no such file"),
        ([*CONFIG, "--import", "absent_module"], "--import absent_module: no such module"),
    ],
)
def test_what_is_missing_is_said_before_anything_is_begun(
    mine, load, program, monkeypatch, words, message
):
    train_net = load("train_net")
    monkeypatch.chdir(mine)
    monkeypatch.setattr(sys, "argv", ["train_net.py"])
    with pytest.raises(SystemExit, match=f"^train_net.py: .*{message}"):
        program.run(train_net.start, train_net.parse([*words, "OUTPUT_DIR", "nothing"]))
    assert not (mine / "nothing").exists()


def test_missing_data_is_one_line_of_a_real_process(mine):
    done = run(ROOT / "train_net.py", *OWN, "DATASETS.TEST", "['ris_refcoco_unc_val']", cwd=mine)
    assert done.returncode == 1 and done.stdout == ""
    assert len(done.stderr.splitlines()) == 1 and "refs(unc).p" in done.stderr


def test_an_evaluation_without_weights_on_request(mine):
    words = [*OWN, "--eval-only", "--untrained", "OUTPUT_DIR", "random"]
    done = run(ROOT / "train_net.py", *words, cwd=mine)
    assert done.returncode == 0, done.stderr
    assert len((done.stdout + done.stderr).splitlines()) < 60


def test_the_demo_wants_weights_and_images(mine, load, monkeypatch):
    demo = load("demo")
    monkeypatch.chdir(mine)
    words = [*OWN, "--text", "a", "--output", "x"]
    for more, message in (
        (["--image", "images"], "no weights: give --weights FILE, or --untrained"),
        (["--image", "absent", "--untrained"], "^absent: no such file or folder"),
        (
            ["--image", "tokenizer", "--untrained"],
            "no .jpg, .jpeg, .png, .bmp, .webp, .tif, .tiff file in this folder",
        ),
    ):
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            demo.main([*words, *more])
