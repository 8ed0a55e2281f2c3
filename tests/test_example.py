"""The small trained model that comes with the package."""

from pathlib import Path

import pytest

from ris_d2 import example, hub, load_config
from ris_d2.__main__ import main
from ris_d2.predictor import Predictor

CONFIGS = Path(__file__).parents[1] / "configs"


def test_example_is_the_model_of_the_quickstart():
    mine = hub.find_config(example.FOLDER)
    recipe = load_config(str(CONFIGS / "refshapes" / "shared_ris_tiny.yaml"))
    for key in ("RIS", "SHARED_RIS", "PIXEL_MEAN", "PIXEL_STD"):
        assert mine.MODEL[key] == recipe.MODEL[key]
    assert mine.INPUT.RIS.SIZE == recipe.INPUT.RIS.SIZE
    assert mine.INPUT.RIS.MAX_TOKENS == recipe.INPUT.RIS.MAX_TOKENS


def test_its_scene_and_sentences_are_answered_as_they_are_true():
    results = Predictor.from_pretrained("example")(example.SCENE, example.SENTENCES)
    assert [result["no_target"] for result in results] == [False, False, True]
    areas = [int(result["mask"].sum()) for result in results]
    assert areas[0] > 50 and areas[1] > areas[0] and areas[2] == 0


@pytest.mark.parametrize(
    "words, message",
    [
        (["absent.png", "a"], "ris_d2: absent.png: no such file or folder"),
        ([example.SCENE, "a", "--model", "nowhere"], "ris_d2: nowhere: no such model folder"),
    ],
)
def test_the_command_says_mistakes_in_one_line(words, message, tmp_path):
    with pytest.raises(SystemExit) as stopped:
        main([*words, "--output", str(tmp_path / "out")])
    assert stopped.value.code.startswith(message) and "\n" not in stopped.value.code
    assert not (tmp_path / "out").exists()


def test_without_arguments_it_is_the_example_whatever_lies_here(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "example").mkdir()
    main([])
    assert example.SENTENCES[0] in capsys.readouterr().out
    assert (tmp_path / "output" / "demo" / "0_overlay.png").is_file()


def test_the_command_wants_sentences_of_an_image(capsys):
    with pytest.raises(SystemExit):
        main([example.SCENE])
    assert "give a sentence" in capsys.readouterr().err
