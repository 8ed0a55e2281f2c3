"""Pictures of where models look: what they show is checked on pixels."""

import numpy as np
import pytest
from attention.drawing import attention_map, region_words

from ris_d2.visualization import PREDICTION_COLOR


@pytest.fixture
def image():
    return np.full((60, 80, 3), 100, dtype=np.uint8)


def test_attention_map_is_hot_where_the_weight_is(image):
    weights = np.zeros((6, 8))
    weights[1, 6] = 3.0
    heat = attention_map(image, weights).astype(int)
    distance = np.abs(heat - 100).sum(axis=2)
    peak = np.unravel_index(distance.argmax(), distance.shape)
    assert abs(peak[0] - 15) <= 6 and abs(peak[1] - 65) <= 6
    assert distance[50, 10] == 0
    assert (attention_map(image, np.ones((6, 8))) == image).all(), "a constant map has no heat"
    rounded = np.float32(1 / 7) + np.random.default_rng(0).integers(0, 9, (6, 8)) * np.float32(2e-8)
    assert (attention_map(image, rounded) == image).all()
    assert (attention_map(image, np.linspace(0.9999, 1, 48).reshape(6, 8)) != image).any()


def test_attention_map_refuses_nan_and_wrong_shapes(image):
    with pytest.raises(ValueError, match="finite"):
        attention_map(image, np.full((2, 2), np.nan))
    with pytest.raises(ValueError, match="shape"):
        attention_map(image, np.ones((1, 2, 2)))


def test_region_words_marks_the_region_and_draws_bars_by_weight(image):
    weights = np.array([0.1, 0.6, 0.3])
    drawn = region_words(image, (2, 2, 10, 10), ["the", "red", "circle"], weights)
    is_color = (drawn == PREDICTION_COLOR).all(2)
    half = drawn.shape[1] // 2
    assert is_color[:, :half].any()  # the frame of the region
    lengths = is_color[:, half:].sum(1)
    bars = [lengths[part].max() for part in np.array_split(np.arange(len(lengths)), 3)]
    assert np.allclose(np.array(bars) / max(bars), weights / weights.max(), atol=0.03)
    nothing = region_words(image, (2, 2, 10, 10), ["the", "red"], np.zeros(2))
    assert (nothing == PREDICTION_COLOR).all(2)[:, half:].sum(1).max() <= 2
