"""Pictures: what they show is checked on pixels, not on their existence."""

import numpy as np
import pytest
from PIL import Image

from _pictures import (
    SENTENCE_COLORS,
    SheetRow,
    contact_sheet,
    enlarge,
    overlay_all,
    picture_grid,
)

from ris_d2.visualization import PREDICTION_COLOR, TARGET_COLOR, overlay, write_png


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


def test_masks_of_several_sentences_have_their_colours_again_from_the_start():
    image = np.full((60, 140, 3), 100, dtype=np.uint8)
    masks = np.zeros((len(SENTENCE_COLORS) + 1, 60, 140), dtype=bool)
    for i, mask in enumerate(masks):
        mask[10:50, 20 * i : 20 * i + 15] = True
    painted = overlay_all(image, masks)
    for i in range(len(masks)):
        color = np.array(SENTENCE_COLORS[i % len(SENTENCE_COLORS)])
        inside = np.rint(0.55 * image[30, 20 * i + 7] + 0.45 * color)
        assert painted[30, 20 * i + 7].tolist() == inside.tolist()
    assert (overlay_all(image, []) == image).all()


def test_small_images_are_enlarged_with_their_masks_and_large_ones_stay(image, mask):
    large, (large_mask,) = enlarge(image, [mask], width=160)
    assert large.shape == (120, 160, 3) and large_mask.sum() == 4 * mask.sum()
    same, (same_mask,) = enlarge(image, [mask], width=40)
    assert (same == image).all() and (same_mask == mask).all()


@pytest.mark.parametrize(
    "bad_image, message",
    [
        (np.zeros((60, 80, 3), dtype=np.float32), "uint8"),
        (np.zeros((60, 80), dtype=np.uint8), r"\(H,W,3\)"),
        (np.zeros((60, 80, 4), dtype=np.uint8), r"\(60, 80, 4\)"),
        ([[1]], "uint8"),
    ],
)
def test_overlay_refuses_other_images(bad_image, mask, message):
    with pytest.raises(ValueError, match=message):
        overlay(bad_image, mask)


def test_overlay_refuses_a_mask_of_another_size(image):
    with pytest.raises(ValueError, match="does not fit"):
        overlay(image, np.zeros((80, 60), dtype=bool))


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
    right = one_word[:, 12 + 80 : 12 + 80 + 10]
    assert (right > 200).all(), "no ink between the sentence and the picture beside it"
    titled = contact_sheet([_row(image)], title="a long title " * 20, cell=80)
    assert titled.shape[1] == short.shape[1] and (titled[:, -10:] > 200).all()


def test_contact_sheet_keeps_a_tiny_target_visible():
    image = np.full((1200, 1600, 3), 100, dtype=np.uint8)
    dot = np.zeros((1200, 1600), dtype=bool)
    dot[600, 800] = True
    sheet = contact_sheet([_row(image, target=dot)]).astype(int)
    column = sheet[:, 12 + 2 * (224 + 12) :][:, :224]
    blue = column[..., 2] - column[..., 0] > 60
    assert 4 <= blue.sum() <= 100 and _count(sheet, (100, 100, 100)) > 0


def test_contact_sheet_says_the_iou(image):
    ink = [(contact_sheet([_row(image, iou=iou, text="")]) < 100).sum() for iou in (0.0, 1.0)]
    assert ink[0] < ink[1]  # IoU 0.0, IoU 100.0


def test_contact_sheet_refuses_bad_rows(image, mask):
    with pytest.raises(ValueError, match="at least one row"):
        contact_sheet([])
    with pytest.raises(ValueError, match="does not fit"):
        contact_sheet([_row(image, target=mask.T)])


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
    grey = (grid == 100).all(2)
    grey[grey.sum(1) < 20] = grey[:, :104] = False
    ys, xs = np.nonzero(grey)
    dark = (grid == 50).all(2)
    dark[:, :196] = False
    assert (xs.min(), xs.max() + 1) == (12 + 92, 12 + 92 + 80)
    assert ys.max() + 1 - ys.min() == 60
    below, right = np.nonzero(dark)
    assert (right.min(), right.max() + 1) == (12 + 2 * 92, 12 + 2 * 92 + 60)
    assert below.max() + 1 - below.min() == 120, "a tall one is 1.5 x as high as a cell is wide"
    assert below.min() > ys.max(), "a row of its own"
    titled = picture_grid(rows, columns=["grey", "dark"], cell=80, title="sentence")
    assert titled.shape[0] > grid.shape[0]


def test_picture_grid_refuses_rows_that_do_not_fit(image):
    with pytest.raises(ValueError, match="at least one row"):
        picture_grid([], columns=["a"])
    with pytest.raises(ValueError, match="row 'x' has 1 pictures for 2 columns"):
        picture_grid([("x", [image])], columns=["a", "b"])
