import json

import cv2
import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco_mask

from ris_d2.masks import encode, rasterize, resize_nearest, union


def blob(height=23, width=17, seed=0):
    noise = np.random.default_rng(seed).normal(size=(height, width)).astype(np.float32)
    return cv2.GaussianBlur(noise, (5, 5), 2) > 0


def test_polygon_covers_its_pixels():
    mask = rasterize([[2, 1, 6, 1, 6, 4, 2, 4]], 8, 10)
    expected = np.zeros((8, 10), bool)
    expected[1:4, 2:6] = True
    assert mask.dtype == bool
    np.testing.assert_array_equal(mask, expected)


def test_overlapping_polygons_are_united():
    first, second = [0, 0, 6, 0, 6, 6, 0, 6], [3, 3, 9, 3, 9, 9, 3, 9]
    mask = rasterize([first, second], 10, 10)
    assert mask.sum() == 36 + 36 - 9
    np.testing.assert_array_equal(mask, rasterize([first], 10, 10) | rasterize([second], 10, 10))


def test_polygon_without_area_is_an_empty_mask():
    mask = rasterize([[1, 1, 9, 1, 1, 1]], 10, 10)
    assert mask.shape == (10, 10) and not mask.any()


@pytest.mark.parametrize("size", [(8, 10), (1, 10), (10, 1)])
def test_masks_are_row_major(size):
    polygon = [[0, 0, 6, 0, 6, 6, 0, 6]]
    for segmentation in (polygon, encode(rasterize(polygon, *size))):
        mask = rasterize(segmentation, *size)
        assert mask.flags.c_contiguous and mask.shape == size
        assert mask[:6, :6].all() and mask.sum() == min(6, size[0]) * min(6, size[1])


@pytest.mark.parametrize("fill", ["blob", "empty", "full", "stripes"])
def test_encode_and_rasterize_are_inverse(fill):
    mask = blob()
    if fill in ("empty", "full"):
        mask = np.full_like(mask, fill == "full")
    if fill == "stripes":  # many equal runs: zero differences
        mask = np.arange(mask.size).reshape(mask.shape) % 2 == 0
    rle = json.loads(json.dumps(encode(mask)))
    np.testing.assert_array_equal(rasterize(rle, *mask.shape), mask)
    np.testing.assert_array_equal(coco_mask.decode(rle), mask)


def test_run_lengths_of_every_kind_agree_with_pycocotools():
    rng = np.random.default_rng(1)
    for size in (1, 31, 32, 500, 40_000):  # one and several five-bit groups, both signs
        counts = [int(count) for count in rng.integers(0, size, 9)]
        height, width = 1, sum(counts)
        rle = {"size": [height, width], "counts": counts}
        if width == 0:
            continue
        compressed = coco_mask.frPyObjects(rle, height, width)
        expected = coco_mask.decode(compressed)
        np.testing.assert_array_equal(rasterize(rle, height, width), expected)
        np.testing.assert_array_equal(rasterize(compressed, height, width), expected)
        text = {**compressed, "counts": compressed["counts"].decode()}
        np.testing.assert_array_equal(rasterize(text, height, width), expected)


@pytest.mark.parametrize(
    "segmentation, message",
    [
        ([[1, 1, 5, 1, 5, 5, 1]], "7 numbers"),
        ([[1, 1, 5, 5]], "4 numbers"),
        ([], "list of polygons"),
        (None, "list of polygons"),
        ([1, 1, 5, 1, 5, 5], "flat list"),
        ([[1, 1, 5, 1, 5, float("nan")]], "finite"),
        ([[1, 1, 5, 1, 5, "5"]], "finite"),
        ({"counts": [100]}, "keys size and counts"),
        ({"size": [10, 9], "counts": [90]}, "of size"),
        ({"size": [10, 10], "counts": [40, 59]}, "add up"),
        ({"size": [10, 10], "counts": [140, -40]}, "non-negative"),
        ({"size": [10, 10], "counts": "51"}, "add up"),
        ({"size": [10, 10], "counts": ""}, "compressed"),
        ({"size": [10, 10], "counts": "`"}, "compressed"),
        ({"size": [10, 10], "counts": "o" * 30 + "0"}, "too long"),
        ({"size": [10, 10], "counts": [2**62] * 4 + [100]}, "add up"),  # 100 in 64 bits
        ({"size": [10, 10], "counts": [101]}, "add up"),
        ({"size": [10, 10], "counts": [10**30]}, "non-negative integers"),
        ({"size": [10, 10], "counts": [50.0, 50.0]}, "non-negative integers"),
        ({"size": [10, 10], "counts": [[100]]}, "non-negative integers"),
        ({"size": [10, 10], "counts": ["100"]}, "non-negative integers"),
        ({"size": [10, 10], "counts": 100}, "a list or a string"),
        ({"size": 100, "counts": [100]}, "of size 100"),
        ([[0, 0, 1e8, 0, 1e8, 1e8]], "at most the image's longer side, 10 px, outside"),
        ([[-11, 0, 5, 0, 5, 5]], "reach from -11 to 5"),
        ([[0, 0, 5, 0, 5, 10**400]], "finite"),
        ([[0, 0, 5, 0, 5, None]], "finite"),
        ([[0, 0, 9, 9] * 60_000], "outlines are 1,08.* px long"),
        ([[0, 0, 5, 0, 5, 5], {"size": [10, 10], "counts": [100]}], "flat list"),
    ],
)
def test_malformed_segmentation_is_an_error(segmentation, message):
    with pytest.raises(ValueError, match=message):
        rasterize(segmentation, 10, 10)


@pytest.mark.parametrize("size", [(0, 5), (5, -1), (2.0, 5), (10**5, 10**5), (2**40, 2**40)])
def test_sizes_that_no_mask_has(size):
    for segmentation in ([[0, 0, 1, 0, 1, 1]], {"size": list(size), "counts": [25]}):
        with pytest.raises(ValueError, match="positive sides and at most 89,478,485 pixels"):
            rasterize(segmentation, *size)


def test_polygons_may_reach_over_the_edge():
    inside = [[0, 0, 10, 0, 10, 10, 0, 10]]
    outside = [[-10, -10, 20, -10, 20, 20, -10, 20]]
    np.testing.assert_array_equal(rasterize(outside, 10, 10), rasterize(inside, 10, 10))
    detailed = 30 * np.random.default_rng(0).random(4000) - 10  # long for its size, and drawn
    assert rasterize([detailed.tolist()], 10, 10).any()


@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("dtype", [bool, np.uint8])
def test_resize_nearest_is_cv2_nearest(order, dtype):
    mask = blob()
    expected = cv2.resize(mask.astype(np.uint8), (40, 11), interpolation=cv2.INTER_NEAREST)
    resized = resize_nearest(np.asarray(mask, dtype=dtype, order=order), 11, 40)
    assert resized.dtype == dtype
    np.testing.assert_array_equal(resized, expected)
    assert resize_nearest(mask, *mask.shape) is mask


def test_resize_nearest_at_centers_is_pil_nearest():
    mask = np.random.default_rng(0).random((30, 17)) > 0.5
    resized = resize_nearest(mask, 11, 40, sample="center")
    expected = np.asarray(Image.fromarray(mask.view(np.uint8)).resize((40, 11), Image.NEAREST))
    assert resized.dtype == bool and np.array_equal(resized, expected)
    assert np.array_equal(resize_nearest(mask.T, 40, 11, sample="center"), expected.T)
    assert not np.array_equal(resized, resize_nearest(mask, 11, 40))
    with pytest.raises(ValueError, match="corner or center, not 'middle'"):
        resize_nearest(mask, 11, 40, sample="middle")


def test_union():
    masks = [blob(seed=seed) for seed in range(3)]
    np.testing.assert_array_equal(union(masks), masks[0] | masks[1] | masks[2])
    np.testing.assert_array_equal(union(np.zeros((0, 4, 5), bool)), np.zeros((4, 5), bool))
    with pytest.raises(ValueError, match="no size"):
        union([])
