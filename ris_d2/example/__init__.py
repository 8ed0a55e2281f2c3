"""A small trained model with a scene to try it on, so that a picture takes no training.

The model is the Shared-RIS that ``make quickstart`` trains on RefShapes (config.yaml,
model.safetensors, tokenizer/); it knows the 72 words of that synthetic world and nothing else.
"""

from pathlib import Path

_FOLDER = Path(__file__).parent

CONFIG_FILE = str(_FOLDER / "config.yaml")
# The files that config.yaml cannot name, as it does not know where the package is.
OPTIONS = (
    *("MODEL.WEIGHTS", str(_FOLDER / "model.safetensors")),
    *("INPUT.RIS.TOKENIZER.PATH", str(_FOLDER / "tokenizer")),
)
SCENE = str(_FOLDER / "scene.png")  # of the split testA, which was not trained on
SENTENCES = (
    "the big green circle that is below the little green circle",
    "the circles on the right side",
    "the green circle on the left side",  # there is none
)
