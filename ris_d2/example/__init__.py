"""A small trained model with a scene to try it on, so that a picture takes no training.

The model is the Shared-RIS that ``make quickstart`` trains on RefShapes, as a model folder; it
knows the 72 words of that synthetic world and nothing else.
"""

import os

FOLDER = os.path.dirname(os.path.abspath(__file__))
SCENE = os.path.join(FOLDER, "scene.png")  # of the split testA, which was not trained on
SENTENCES = (
    "the big green circle that is below the little green circle",
    "the circles on the right side",
    "the green circle on the left side",  # there is none
)
