"""Model folders: what is in them, that they load anywhere and say the same, and where models are found."""

import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
import yaml

import ris_d2
from ris_d2 import Predictor, example, load_config, zoo
from ris_d2.hub import find_config
from ris_d2.predictor import load_rgb

ROOT = Path(__file__).parents[1]
ASK = """
import json, sys
from ris_d2 import Predictor, example
from ris_d2.masks import encode
for name in sys.argv[1:]:
    results = Predictor.from_pretrained(name)(example.SCENE, example.SENTENCES)
    print(json.dumps([[encode(r["mask"].numpy()), r["score"], r["no_target"]] for r in results]))
"""


@pytest.fixture(scope="module")
def predictor():
    return Predictor.from_pretrained("example")


@pytest.fixture
def folder(tmp_path):
    shutil.copytree(example.FOLDER, tmp_path / "model")
    for name in ("__init__.py", "scene.png", "__pycache__"):
        path = tmp_path / "model" / name
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    return tmp_path / "model"


def answers(predictor):
    from ris_d2.masks import encode

    results = predictor(example.SCENE, example.SENTENCES)
    return [[encode(r["mask"].numpy()), r["score"], r["no_target"]] for r in results]


def test_a_folder_from_anywhere_and_one_of_the_hub_answer_alike_in_a_clean_process(
    predictor, folder, tmp_path
):
    sys.path.append(str(ROOT / "tests"))
    from hub_stand_in import serving

    predictor.save_pretrained(tmp_path / "saved")
    (tmp_path / "elsewhere").mkdir()
    shutil.move(tmp_path / "saved", tmp_path / "elsewhere" / "renamed")
    (folder / "pytorch_model.bin").write_text("a pickle")
    (tmp_path / "hub" / "me").mkdir(parents=True)
    shutil.move(folder, tmp_path / "hub" / "me" / "tiny")
    with serving(tmp_path / "hub") as (endpoint, asked):
        settings = {"HF_ENDPOINT": endpoint, "HF_HOME": str(tmp_path / "cache")}
        done = subprocess.run(
            [sys.executable, "-W", "ignore", "-c", ASK, "renamed", "me/tiny"],
            cwd=tmp_path / "elsewhere",
            env={**os.environ, "PYTHONPATH": str(ROOT), **settings},
            capture_output=True,
            text=True,
        )
    assert done.returncode == 0, done.stderr
    expected = answers(predictor)
    for line in done.stdout.splitlines():
        got = json.loads(line)
        assert [mask for mask, *_ in got] == [mask for mask, *_ in expected]
        assert [s for _, s, _ in got] == pytest.approx([s for _, s, _ in expected], abs=1e-5)
        assert [nothing for *_, nothing in got] == [False, False, True]
    assert len(done.stdout.splitlines()) == 2
    assert not any("renamed" in path for path in asked), "a folder asks nobody"
    assert any("model.safetensors" in path for path in asked)
    assert not any("pytorch_model.bin" in path for path in asked), "pickles stay where they are"


def test_a_folder_holds_plain_text_and_tensors_alone(predictor, tmp_path):
    predictor.save_pretrained(tmp_path / "model")
    files = {
        p.relative_to(tmp_path / "model").as_posix() for p in tmp_path.rglob("*") if p.is_file()
    }
    tokenizer = {"tokenizer/tokenizer.json", "tokenizer/tokenizer_config.json"}
    assert files == {"config.yaml", "model.safetensors", "README.md"} | tokenizer
    config = (tmp_path / "model" / "config.yaml").read_text()
    assert yaml.safe_load(config)["MODEL"]["META_ARCHITECTURE"] == "SharedRIS"
    assert str(tmp_path) not in config and str(ROOT) not in config
    assert "VIPA" not in config, "keys of other methods may change their names one day"
    assert not zipfile.is_zipfile(tmp_path / "model" / "model.safetensors")  # no torch.save
    mode = (tmp_path / "model" / "model.safetensors").stat().st_mode
    assert mode == (tmp_path / "model" / "config.yaml").stat().st_mode  # others may read it


def test_the_card_says_what_the_model_is(predictor, tmp_path):
    predictor.cfg.MODEL.INIT = [["beit3", "/home/me/pretrained/beit3_base_patch16_224.pth"]]
    predictor.save_pretrained(
        tmp_path / "model",
        title="Tiny",
        metrics={"val": {"gIoU": 65.3, "N_acc": None}},
        licence="Apache-2.0",
        notes="Knows circles.",
    )
    predictor.cfg.MODEL.INIT = []
    card = (tmp_path / "model" / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: ris_d2\n") and "# Tiny\n\nKnows circles.\n" in card
    for fact in ("SharedRIS, 1.9 M", "ris_grefshapes_train", "fp32", "65.30", "n/a", "Apache-2.0"):
        assert fact in card
    assert "beit3_base_patch16_224.pth (MIT)" in card and "/home/me" not in card
    assert "/home/me" not in (tmp_path / "model" / "config.yaml").read_text()


def test_saving_replaces_a_model_folder_and_nothing_else(predictor, tmp_path):
    predictor.save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "README.md").write_text("old")
    predictor.save_pretrained(tmp_path / "model")
    assert (tmp_path / "model" / "README.md").read_text() != "old"
    (tmp_path / "model" / "thesis.tex").write_text("years")
    with pytest.raises(ValueError, match="thesis.tex"):
        predictor.save_pretrained(tmp_path / "model")
    assert (tmp_path / "model" / "thesis.tex").read_text() == "years"
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize(
    "path", ["/etc/tokenizer.json", "../tokenizer", "openai/clip-vit-base-patch16", "."]
)
def test_a_folder_reads_and_fetches_nothing_from_outside_of_itself(folder, path):
    config = yaml.safe_load((folder / "config.yaml").read_text())
    config["INPUT"]["RIS"]["TOKENIZER"]["PATH"] = path
    config["MODEL"]["WEIGHTS"] = "hf://nobody/nothing/model.pkl"
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    with pytest.raises((ValueError, FileNotFoundError), match=str(folder)):
        find_config(folder)


@pytest.mark.parametrize(
    "text", ["_BASE_: /etc/other.yaml", "MODEL: {RIS: {TEXT: {CAUSAL_LM: {PATH: gpt2}}}}"]
)
def test_a_folder_names_no_other_file(folder, text):
    (folder / "config.yaml").write_text(text)
    with pytest.raises((ValueError, FileNotFoundError), match=str(folder)):
        find_config(folder)


def test_weights_that_leave_something_open_are_refused_rather_than_filled_from_elsewhere(folder):
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    tensors.pop(next(n for n in tensors if n.startswith("decoder") and n.endswith("weight")))
    save_file(tensors, folder / "model.safetensors")
    options = ["MODEL.INIT", '[["beit3", "hf://nobody/nothing/model.pth"]]']
    with pytest.raises(ValueError, match="model.safetensors.*missing"):
        Predictor.from_pretrained(folder, options)


@pytest.mark.parametrize(
    "missing", ["config.yaml", "model.safetensors", "tokenizer/tokenizer.json"]
)
def test_a_missing_file_is_named(folder, missing):
    (folder / missing).unlink()
    with pytest.raises(FileNotFoundError, match=missing.split("/")[0]):
        find_config(folder)


def test_options_go_over_the_folders_configuration(folder):
    cfg = find_config(folder, ["MODEL.RIS.MASK_THRESHOLD", "0.3", "MODEL.WEIGHTS", "mine.pth"])
    assert cfg.MODEL.RIS.MASK_THRESHOLD == 0.3 and cfg.MODEL.WEIGHTS == "mine.pth"


def test_tied_weights_are_saved(tmp_path):
    predictor = Predictor.from_pretrained("example")
    head = predictor.model.existence_head
    predictor.model.register_parameter("tied", next(head.parameters()))
    predictor.save_pretrained(tmp_path / "model")
    from safetensors.torch import load_file

    assert "tied" in load_file(tmp_path / "model" / "model.safetensors")


def test_a_name_that_is_nowhere_says_what_was_tried(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(FileNotFoundError, match="no such model folder.*deris_l_grefcoco"):
        Predictor.from_pretrained("modle")
    with pytest.raises(FileNotFoundError, match="hf download me/nothing-of-this-name"):
        Predictor.from_pretrained("me/nothing-of-this-name")


def test_every_model_of_the_zoo_has_a_recipe_weights_and_words_on_how_to_get_them():
    for name, model in zoo.models().items():
        assert model["about"] and model["licence"]
        if "recipe" in model:
            cfg = load_config(zoo.config_file(model["recipe"]))
            assert Path(cfg.INPUT.RIS.TOKENIZER.PATH).name == model["tokenizer"]
            assert zoo.how_to_get(model["weights"]) and zoo.how_to_get(model["tokenizer"])


def test_every_file_that_a_recipe_starts_from_is_known():
    for path in (ROOT / "configs").glob("*.yaml"):
        cfg = load_config(str(path))
        for _, file in [*cfg.MODEL.INIT, ["", cfg.INPUT.RIS.TOKENIZER.PATH]]:
            assert not file.startswith("pretrained/") or zoo.how_to_get(file), f"{path}: {file}"


def test_a_zoo_model_takes_what_lies_in_pretrained(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pretrained").mkdir()
    for name in ("DeRIS-L-grefcoco.pth", "beit3.spm"):
        (tmp_path / "pretrained" / name).touch()
    cfg = find_config("deris_l_grefcoco", ["MODEL.DEVICE", "cpu"])
    assert cfg.MODEL.WEIGHTS == str(tmp_path / "pretrained" / "DeRIS-L-grefcoco.pth")
    assert cfg.INPUT.RIS.TOKENIZER.PATH == str(tmp_path / "pretrained" / "beit3.spm")
    assert cfg.MODEL.DERIS.INSTANCE_ATTENTION == "released"
    assert cfg.MODEL.DERIS.SCORE_THRESHOLD == 0.9 and cfg.MODEL.RIS.BEIT3.DEPTH == 24


def test_what_is_missing_of_a_zoo_model_says_how_to_get_it(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        "ris_d2.hub.local_path", lambda url: (_ for _ in ()).throw(OSError("offline"))
    )
    with pytest.raises(FileNotFoundError, match="curl -L .* pretrained/beit3.spm https://"):
        find_config("deris_b_refcoco")
    (tmp_path / "pretrained").mkdir()
    (tmp_path / "pretrained" / "beit3.spm").touch()
    command = "hf download Dmmm997/DeRIS DeRIS-B-refcoco.pth --local-dir pretrained"
    with pytest.raises(FileNotFoundError, match=command):
        find_config("deris_b_refcoco")


def test_a_zoo_model_is_fetched_and_answers(monkeypatch, tmp_path, predictor):
    """The way of the table, recipe and weights and tokenizer, with a small model in their place."""
    torch.save({"model": predictor.model.state_dict()}, tmp_path / "tiny.pth")
    entry = {
        "recipe": "refshapes/shared_ris_tiny.yaml",
        "set": {"MODEL.RIS.MASK_THRESHOLD": 0.4},
        "weights": "hf://me/tiny/tiny.pth",
    }
    asked = []

    def fetch(url):
        asked.append(url)
        return {"hf://me/tiny/tiny.pth": str(tmp_path / "tiny.pth")}[url]

    monkeypatch.setattr(zoo, "models", lambda: {"tiny": entry})
    monkeypatch.setattr("ris_d2.hub.local_path", fetch)
    options = ["INPUT.RIS.TOKENIZER.PATH", os.path.join(example.FOLDER, "tokenizer")]
    found = Predictor.from_pretrained("tiny", options)
    assert asked == ["hf://me/tiny/tiny.pth"] and found.model.mask_threshold == 0.4
    mask, expected = (p(example.SCENE, "the circles")[0]["mask"] for p in (found, predictor))
    assert (mask >= expected).all() and mask.sum() > expected.sum() > 0


def test_the_page_of_weights_is_current():
    page = (ROOT / "docs" / "weights.md").read_text()
    for table in zoo.tables().split("\n\n"):
        assert table in page, "run python -m ris_d2.zoo and put its tables into docs/weights.md"


def test_a_missing_file_of_a_recipe_says_how_to_get_it(tmp_path):
    from ris_d2.checkpoint.paths import local_path

    with pytest.raises(FileNotFoundError, match="curl -L .*sam_vit_b_01ec64.pth https://"):
        local_path(str(tmp_path / "sam_vit_b_01ec64.pth"))
    with pytest.raises(FileNotFoundError, match="no such weight file$"):
        local_path(str(tmp_path / "mine.pth"))


def test_the_package_gives_its_predictor_when_asked():
    assert ris_d2.Predictor is Predictor is sys.modules["ris_d2.predictor"].Predictor
    with pytest.raises(AttributeError, match="no attribute 'Segmenter'"):
        ris_d2.Segmenter


@pytest.mark.parametrize("method", ["deris", "risam", "vipa", "asda", "shared_ris"])
def test_every_method_is_saved_with_its_protocol_and_loaded(method, tmp_path):
    path = ["INPUT.RIS.TOKENIZER.PATH", os.path.join(example.FOLDER, "tokenizer")]
    path += ["TEST.RESOLUTION", "(40, 50)", "MODEL.RIS.MASK_THRESHOLD", "0.45"]
    torch.manual_seed(0)
    saved = Predictor(load_config(zoo.config_file(f"instant_test/{method}.yaml"), path))
    saved.save_pretrained(tmp_path / "model")
    found = Predictor.from_pretrained(tmp_path / "model")
    assert tuple(found.cfg.TEST.RESOLUTION) == (40, 50)
    assert "TEST.RESOLUTION (40, 50)" in (tmp_path / "model" / "README.md").read_text()
    assert saved.cfg.MODEL[method.upper()] == found.cfg.MODEL[method.upper()]
    assert (
        saved.cfg.SOLVER == found.cfg.SOLVER
        and saved.cfg.INPUT.RIS.SIZE == found.cfg.INPUT.RIS.SIZE
    )
    settings = {"probabilities": True}
    if method == "deris":  # so that some of the untrained queries make up a mask
        settings["score_threshold"] = 0.18
    results = [p(example.SCENE, "the circles", **settings)[0] for p in (saved, found)]
    assert results[0]["probabilities"].any()
    assert torch.equal(results[0]["mask"], results[1]["mask"]) and results[0]["mask"].ndim == 2
    assert torch.allclose(results[0]["probabilities"], results[1]["probabilities"], atol=1e-5)
    assert results[0]["mask"].shape == load_rgb(example.SCENE).shape[:2]
