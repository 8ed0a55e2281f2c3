"""Pictures: what they show is checked on pixels, not on their existence."""

import numpy as np
import pytest
from PIL import Image

from ris_d2.visualization import (
    PREDICTION_COLOR,
    TARGET_COLOR,
    SheetRow,
    attention_map,
    contact_sheet,
    overlay,
    picture_grid,
    region_words,
    write_png,
)


@pytest.fixture
def image():
    return np.full((60, 80, 3), 100, dtype=np.uint8)


@pytest.fixture
def mask():
    mask = np.zeros((60, 80), dtype=bool)
    mask[15:45, 20:60] = True
    return mask


def test_overlay_blends_inside_and_leaves_outside_alone(image, mask):
    painted = overlay(image, mask, color=(200, 0, 100), alpha=0.5)
    assert painted.dtype == np.uint8 and painted.shape == image.shape
    assert painted[30, 40].tolist() == [150, 50, 100]
    assert painted[5, 5].tolist() == [100, 100, 100]
    assert (painted == (200, 0, 100)).all(axis=2).any(), "the contour has the opaque colour"
    assert (image == 100).all(), "the caller's image is not painted on"


def test_overlay_of_an_empty_mask_is_the_image(image):
    assert (overlay(image, np.zeros((60, 80), dtype=bool)) == image).all()


def test_overlay_keeps_a_hole(image, mask):
    mask[25:35, 35:45] = False
    painted = overlay(image, mask, alpha=0.5)
    assert painted[30, 40].tolist() == [100, 100, 100]


@pytest.mark.parametrize(
    "bad_image, message",
    [
        (np.zeros((60, 80, 3), dtype=np.float32), "uint8"),
        (np.zeros((60, 80), dtype=np.uint8), r"\(H,W,3\)"),
        (np.zeros((60, 80, 4), dtype=np.uint8), r"\(60, 80, 4\)"),
        ([[1]], "list"),
    ],
)
def test_overlay_refuses_other_images(bad_image, mask, message):
    with pytest.raises(ValueError, match=message):
        overlay(bad_image, mask)


def test_overlay_refuses_a_mask_of_another_size(image):
    with pytest.raises(ValueError, match="does not fit"):
        overlay(image, np.zeros((80, 60), dtype=bool))
    with pytest.raises(ValueError, match="alpha"):
        overlay(image, np.zeros((60, 80), dtype=bool), alpha=1.5)


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
    with pytest.raises(ValueError, match="nan"):
        attention_map(image, np.full((2, 2), np.nan))
    with pytest.raises(ValueError, match="shape"):
        attention_map(image, np.ones((1, 2, 2)))


def _row(image, **changes):
    row = {"image": image, "text": "the box", "target": None, "prediction": None, "iou": 1.0}
    return SheetRow(**{**row, **changes})


def _count(sheet, color):
    return int((sheet == color).all(axis=2).sum())


def test_contact_sheet_has_one_line_per_row_and_says_nothing_in_words(image, mask):
    blank = contact_sheet([_row(image)])
    shown = contact_sheet([_row(image, target=mask, prediction=mask)])
    empty = contact_sheet([_row(image, prediction=np.zeros_like(mask))])
    assert (blank != empty).any(), "an empty mask and the answer nothing are told apart"
    assert (blank == contact_sheet([_row(image)])).all()
    assert blank.shape == shown.shape and (blank != shown).any()
    assert _count(shown, TARGET_COLOR) > 100 and _count(shown, PREDICTION_COLOR) > 100
    two = contact_sheet([_row(image), _row(image)])
    assert two.shape[1] == blank.shape[1] and two.shape[0] > 1.7 * blank.shape[0]


def test_contact_sheet_shows_a_shared_image_once():
    image = np.full((60, 80, 3), (10, 200, 10), dtype=np.uint8)
    once = contact_sheet([_row(image)])
    shared = contact_sheet([_row(image), _row(image)])
    apart = contact_sheet([_row(image), _row(image.copy())])
    assert _count(shared, (10, 200, 10)) == _count(once, (10, 200, 10))
    assert _count(apart, (10, 200, 10)) == 2 * _count(once, (10, 200, 10))


def test_contact_sheet_wraps_long_text_into_a_taller_line(image):
    short = contact_sheet([_row(image, text="dog")], cell=80)
    long = contact_sheet([_row(image, text="the small dog on the left " * 6)], cell=80)
    assert long.shape[0] > short.shape[0] and long.shape[1] == short.shape[1]
    one_word = contact_sheet([_row(image, text="x" * 200)], cell=80)
    assert one_word.shape[1] == short.shape[1]
    right = one_word[:, 12 + 80 + 12 + 80 : 12 + 80 + 12 + 80 + 12]
    assert (right[60:] > 200).all(), "no ink between the sentence and the next picture"


def test_contact_sheet_keeps_a_tiny_target_visible():
    image = np.full((1200, 1600, 3), 100, dtype=np.uint8)
    dot = np.zeros((1200, 1600), dtype=bool)
    dot[600, 800] = True
    sheet = contact_sheet([_row(image, target=dot)])
    without = contact_sheet([_row(image, target=None)])
    assert (sheet != without).any() and _count(sheet, (100, 100, 100)) > 0


def test_contact_sheet_iou_bar_grows_with_iou(image):
    ink = [
        _count(contact_sheet([_row(image, iou=iou, text="")]), (34, 34, 34))
        for iou in (0.0, 0.5, 1.0)
    ]
    assert ink[0] < ink[1] < ink[2]


def test_contact_sheet_refuses_bad_rows(image, mask):
    with pytest.raises(ValueError, match="at least one row"):
        contact_sheet([])
    with pytest.raises(ValueError, match="does not fit"):
        contact_sheet([_row(image, target=mask.T)])
    with pytest.raises(ValueError, match="64 pixels"):
        contact_sheet([_row(image)], cell=10)


def test_write_png_round_trips_images_and_masks(tmp_path, image, mask):
    image[0, 0] = (1, 2, 3)
    write_png(tmp_path / "image.png", image)
    write_png(tmp_path / "mask.png", mask)
    assert (np.asarray(Image.open(tmp_path / "image.png")) == image).all()
    stored = np.asarray(Image.open(tmp_path / "mask.png"))
    assert stored.shape == (60, 80) and set(np.unique(stored)) == {0, 255}
    assert ((stored == 255) == mask).all()


def test_picture_grid_places_pictures_under_their_columns(image):
    tall = np.full((80, 40, 3), 50, dtype=np.uint8)
    rows = [("one", [image, None]), ("two", [None, tall])]
    grid = picture_grid(rows, columns=["grey", "dark"], cell=80)
    assert grid.dtype == np.uint8 and grid.shape[1] == 12 + 3 * (80 + 12)
    # Letters may have any grey, pictures are whole lines of theirs.
    ys, xs = np.nonzero((grid[:, 104:] == 100).all(2))
    xs += 104
    dark = (grid == 50).all(2)
    dark[:, :196] = False
    assert (xs.min(), xs.max() + 1) == (12 + 92, 12 + 92 + 80)
    assert ys.max() + 1 - ys.min() == 60
    below, right = np.nonzero(dark)
    assert (right.min(), right.max() + 1) == (12 + 2 * 92, 12 + 2 * 92 + 80)
    assert below.max() + 1 - below.min() == 160, "twice the size, as wide as the cell"
    assert below.min() > ys.max(), "a row of its own"
    titled = picture_grid(rows, columns=["grey", "dark"], cell=80, title="sentence")
    assert titled.shape[0] > grid.shape[0]


def test_picture_grid_refuses_rows_that_do_not_fit(image):
    with pytest.raises(ValueError, match="at least one row"):
        picture_grid([], columns=["a"])
    with pytest.raises(ValueError, match="row 'x' has 1 pictures for 2 columns"):
        picture_grid([("x", [image])], columns=["a", "b"])


def test_region_words_marks_the_region_and_draws_bars_by_weight(image):
    weights = np.array([0.1, 0.6, 0.3])
    drawn = region_words(image, (2, 2, 10, 10), ["the", "red", "circle"], weights)
    is_color = (drawn == PREDICTION_COLOR).all(2)
    left = 12 + 224
    assert is_color[:, :left].any()  # the frame of the region
    chart = is_color[:, left:].sum(1)
    rows = np.array_split(np.arange(12, 12 + 3 * 16), 3)
    bars = np.array([chart[row].max() for row in rows])
    assert np.allclose(bars / bars.max(), weights / weights.max(), atol=0.03)
    nothing = region_words(image, (2, 2, 10, 10), ["the", "red"], [0.0, 0.0])
    assert (nothing == PREDICTION_COLOR).all(2)[:, left:].sum(1).max() == 2  # a hair per word


@pytest.mark.parametrize("words, weights", [([], []), (["a"], [0.1, 0.2]), (["a"], [-1.0])])
def test_region_words_refuses_weights_that_do_not_fit(words, weights, image):
    with pytest.raises(ValueError, match="weights"):
        region_words(image, (0, 0, 4, 4), words, np.array(weights))
