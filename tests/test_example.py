"""The small trained model that comes with the package."""

from pathlib import Path

from ris_d2 import example, load_config
from ris_d2.predictor import Predictor

CONFIGS = Path(__file__).parents[1] / "configs"


def test_example_is_the_model_of_the_quickstart():
    mine = load_config(example.CONFIG_FILE)
    recipe = load_config(str(CONFIGS / "refshapes" / "shared_ris_tiny.yaml"))
    recipe.MODEL.SHARED_RIS.DICE_WEIGHT = mine.MODEL.SHARED_RIS.DICE_WEIGHT
    for key in ("RIS", "SHARED_RIS", "PIXEL_MEAN", "PIXEL_STD"):
        ours, theirs = mine.MODEL[key], recipe.MODEL[key]
        if key == "RIS":  # how an untrained one starts, and what training alone reads
            theirs.BEIT3.INIT, theirs.BEIT3.DROP_PATH = ours.BEIT3.INIT, ours.BEIT3.DROP_PATH
        assert ours == theirs
    assert mine.INPUT.RIS.SIZE == recipe.INPUT.RIS.SIZE
    assert mine.INPUT.RIS.MAX_TOKENS == recipe.INPUT.RIS.MAX_TOKENS


def test_its_scene_and_sentences_are_answered_as_they_are_true():
    results = Predictor(load_config(example.CONFIG_FILE, example.OPTIONS))(
        example.SCENE, example.SENTENCES
    )
    assert [result["no_target"] for result in results] == [False, False, True]
    areas = [int(result["mask"].sum()) for result in results]
    assert areas[0] > 50 and areas[1] > areas[0] and areas[2] == 0
