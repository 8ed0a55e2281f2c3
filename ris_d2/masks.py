"""Binary masks: COCO polygons and run lengths to bitmaps and back, union, nearest resizing."""

import math
import reprlib
from collections.abc import Sequence
from numbers import Integral

import cv2
import numpy as np
from pycocotools import mask as coco_mask

SAMPLES = {"corner": cv2.INTER_NEAREST, "center": cv2.INTER_NEAREST_EXACT}

# Of an image or mask. Pillow's own limit for files that claim to be huge, and 270 MB as RGB.
MAX_PIXELS = 2**30 // 4 // 3
# Of the polygons of one annotation, in pixels: 0.1 s and 50 MB in pycocotools.
MAX_OUTLINE = 1_000_000


def check_size(height: int, width: int) -> None:
    """Raise ValueError unless these are the sides of an image or mask of at most MAX_PIXELS."""
    are_sides = all(isinstance(side, int | Integral) and side > 0 for side in (height, width))
    if not are_sides or int(height) * int(width) > MAX_PIXELS:
        raise ValueError(
            f"an image or mask has positive sides and at most {MAX_PIXELS:,} pixels, not "
            f"{reprlib.repr(height)} x {reprlib.repr(width)} (height x width)"
        )


def check_part(part: list[float] | dict, height: int, width: int) -> None:
    """Raise ValueError unless ``rasterize`` can draw this polygon or RLE."""
    if isinstance(part, dict):
        _runs(part, height, width)
    else:
        _check_polygon(part, max(height, width))


def rasterize(segmentation: list | dict, height: int, width: int) -> np.ndarray:
    """Draw a COCO ``segmentation``; its parts are united, overlaps included.

    Args:
        segmentation: polygons ``[[x0, y0, x1, y1, ...], ...]`` in pixels, or run lengths
            ``{"size": [height, width], "counts": list | str | bytes}`` (a list is uncompressed).
        height, width: of the image, in pixels.

    Returns:
        bool (height, width), row-major; all False where polygons enclose no pixel.

    Raises:
        ValueError: more than MAX_PIXELS; no polygon, a polygon with an odd number of coordinates or
            fewer than three points, a coordinate that is no number or farther outside than the
            image is long, outlines of more than MAX_OUTLINE; run lengths of another size or that do
            not add up to it.
    """
    check_size(height, width)
    if isinstance(segmentation, dict):
        runs = _runs(segmentation, height, width)
        is_inside = np.arange(len(runs)) % 2 == 1  # the first run is background
        columns = np.repeat(is_inside, runs).reshape(width, height).view(np.uint8)
        return cv2.transpose(columns).view(bool)
    if not isinstance(segmentation, list) or not segmentation:
        shown = reprlib.repr(segmentation)
        raise ValueError(f"a segmentation is a list of polygons or an RLE dict, not {shown}")
    side = max(height, width)
    for polygon in segmentation:
        _check_polygon(polygon, side)
    _check_outlines(segmentation, side)
    parts = coco_mask.frPyObjects(segmentation, height, width)
    # pycocotools draws column by column. OpenCV turns that seven times as fast as numpy does.
    return cv2.transpose(coco_mask.decode(coco_mask.merge(parts)).T).view(bool)


def _check_polygon(polygon: list[float], side: int) -> None:
    if not isinstance(polygon, list):
        raise ValueError(f"a polygon is a flat list [x0, y0, ...], not {reprlib.repr(polygon)}")
    if len(polygon) % 2 or len(polygon) < 6:
        raise ValueError(
            f"a polygon needs three points or more, this one has {len(polygon)} numbers"
        )
    try:
        finite = math.isfinite(sum(polygon))
    except (TypeError, OverflowError):
        finite = False
    if not finite:
        raise ValueError(f"a polygon's coordinates are finite numbers, not {reprlib.repr(polygon)}")
    # Polygons of COCO and of objects that the image cuts lie partly outside of it.
    if min(polygon) < -side or max(polygon) > 2 * side:
        raise ValueError(
            f"a polygon's coordinates lie at most the image's longer side, {side} px, outside of "
            f"it; these reach from {min(polygon)} to {max(polygon)}"
        )


def _check_outlines(polygons: list[list[float]], side: int) -> None:
    # No edge is longer than three sides, so that hardly a real polygon has to be measured.
    if sum(map(len, polygons)) / 2 * 3 * side <= MAX_OUTLINE:
        return
    rings = [np.reshape(polygon, (-1, 2)) for polygon in polygons]
    length = sum(np.abs(ring - np.roll(ring, 1, axis=0)).max(axis=1).sum() for ring in rings)
    if length > MAX_OUTLINE:
        raise ValueError(f"the polygons' outlines are {length:,.0f} px long, over {MAX_OUTLINE:,}")


def _runs(rle: dict, height: int, width: int) -> np.ndarray:
    """The checked run lengths of an RLE: int64, adding up to height x width."""
    size, counts = rle.get("size"), rle.get("counts")
    if size is None or counts is None:
        raise ValueError(f"an RLE has the keys size and counts, not {reprlib.repr(list(rle))}")
    if not isinstance(size, list | tuple) or list(size) != [height, width]:
        raise ValueError(f"the RLE is of size {reprlib.repr(size)}, not of [{height}, {width}]")
    runs = np.array(counts) if isinstance(counts, list) else _decompress(counts)
    # pycocotools returns uninitialised memory where the runs are too short and writes beyond its
    # own where they are too long, hence our own check. Runs are bounded one by one before they are
    # added up, because a sum of 64 bits can wrap to the right one.
    pixels = height * width
    if (
        runs.ndim != 1
        or runs.dtype.kind not in "iu"
        or (runs < 0).any()
        or (runs > pixels).any()
        or int(runs.sum(dtype=np.int64)) != pixels
    ):
        raise ValueError(
            f"the RLE's runs must be non-negative integers that add up to {height} x {width}"
        )
    return runs


def _decompress(counts: str | bytes) -> np.ndarray:
    """COCO's compressed counts -> int64 run lengths.

    The format (pycocotools, maskApi.c): groups of five bits, lowest first, one character each from
    "0" on; bit 5 says that the number goes on, bit 4 of its last group is the sign; from the fourth
    run on, the difference to the run before the previous one is stored.
    """
    if not isinstance(counts, str | bytes):
        raise ValueError(f"an RLE's counts are a list or a string, not {reprlib.repr(counts)}")
    characters = np.frombuffer(counts.encode() if isinstance(counts, str) else counts, np.uint8)
    groups = characters.astype(np.int64) - 48
    last = (groups & 32) == 0
    if not len(groups) or groups.min() < 0 or groups.max() > 63 or not last[-1]:
        raise ValueError(f"not a compressed RLE: {reprlib.repr(counts)}")
    ends = np.flatnonzero(last)
    starts = np.concatenate([[0], ends[:-1] + 1])
    lengths = ends - starts + 1
    if lengths.max() > 8:
        raise ValueError(f"not a compressed RLE, a run is too long: {reprlib.repr(counts)}")
    shifts = 5 * (np.arange(len(groups)) - np.repeat(starts, lengths))
    runs = np.add.reduceat((groups & 31) << shifts, starts)
    runs -= ((groups[ends] & 16) != 0) * (1 << 5 * lengths)
    runs[1::2] = np.cumsum(runs[1::2])
    runs[2::2] = np.cumsum(runs[2::2])
    return runs


def encode(mask: np.ndarray) -> dict:
    """bool or uint8 (H,W) -> compressed RLE ``{"size": [H, W], "counts": str}``, fit for json."""
    rle = coco_mask.encode(np.asfortranarray(mask, dtype=np.uint8))
    return {"size": [int(side) for side in rle["size"]], "counts": rle["counts"].decode()}


def resize_nearest(
    mask: np.ndarray, height: int, width: int, *, sample: str = "corner"
) -> np.ndarray:
    """Resize by taking one pixel each.

    Args:
        mask: bool or uint8 (H,W).
        sample: the point of a new pixel at which the mask is read: "corner", the upper left, as
            cv2.INTER_NEAREST does; "center", as PIL and cv2.INTER_NEAREST_EXACT do.

    Returns:
        (height,width), same dtype.

    Raises:
        ValueError: for another ``sample``.
    """
    if sample not in SAMPLES:
        raise ValueError(f"a resized mask is sampled at {' or '.join(SAMPLES)}, not {sample!r}")
    if mask.shape == (height, width):
        return mask
    resized = cv2.resize(mask.view(np.uint8), (width, height), interpolation=SAMPLES[sample])
    return resized.view(mask.dtype)


def union(masks: Sequence[np.ndarray] | np.ndarray) -> np.ndarray:
    """bool or uint8 masks (H,W), or an array (N,H,W), N = 0 too -> bool (H,W): in any of them."""
    masks = np.asarray(masks, dtype=bool)
    if masks.ndim != 3:
        raise ValueError("the union of no masks has no size: pass an array of shape (0, H, W)")
    return masks.any(axis=0)
