"""Binary masks: COCO polygons and run lengths to bitmaps and back, union, nearest resizing."""

import math
from collections.abc import Sequence

import cv2
import numpy as np
from pycocotools import mask as coco_mask

SAMPLES = {"corner": cv2.INTER_NEAREST, "center": cv2.INTER_NEAREST_EXACT}


def rasterize(segmentation: list | dict, height: int, width: int) -> np.ndarray:
    """Draw a COCO ``segmentation``; its parts are united, overlaps included.

    Args:
        segmentation: polygons ``[[x0, y0, x1, y1, ...], ...]`` in pixels, or run lengths
            ``{"size": [height, width], "counts": list | str | bytes}`` (a list is uncompressed).
        height, width: of the image, in pixels.

    Returns:
        bool (height, width); all False where polygons enclose no pixel.

    Raises:
        ValueError: no polygon, a polygon with an odd number of coordinates or fewer than three
            points, a coordinate that is no finite number, run lengths of another size or that do
            not add up to it.
    """
    if isinstance(segmentation, dict):
        return _decode(segmentation, height, width)
    if not isinstance(segmentation, list) or not segmentation:
        raise ValueError(
            f"a segmentation is a list of polygons or an RLE dict, not {segmentation!r}"
        )
    for polygon in segmentation:
        _check_polygon(polygon)
    parts = coco_mask.frPyObjects(segmentation, height, width)
    return coco_mask.decode(coco_mask.merge(parts)).view(bool)


def _check_polygon(polygon: list[float]) -> None:
    if not isinstance(polygon, list):
        raise ValueError(f"a polygon is a flat list [x0, y0, x1, y1, ...], not {polygon!r}")
    if len(polygon) % 2 or len(polygon) < 6:
        raise ValueError(
            f"a polygon needs x, y of three or more points, this one has {len(polygon)} numbers"
        )
    try:
        finite = math.isfinite(sum(polygon))
    except TypeError:
        finite = False
    if not finite:
        raise ValueError(f"a polygon's coordinates are finite numbers, got {polygon!r}")


def _decode(rle: dict, height: int, width: int) -> np.ndarray:
    size, counts = rle.get("size"), rle.get("counts")
    if size is None or counts is None:
        raise ValueError(f"an RLE has the keys size and counts, this one has {sorted(rle)}")
    if list(size) != [height, width]:
        raise ValueError(f"the RLE is of size {list(size)}, its image of [{height}, {width}]")
    counts = np.asarray(counts) if isinstance(counts, list) else _decompress(counts)
    # pycocotools returns uninitialised memory where the runs are too short, hence our own check.
    if counts.dtype.kind not in "iu" or (counts < 0).any() or counts.sum() != height * width:
        raise ValueError(
            f"the RLE's runs must be non-negative integers that add up to {height} x {width}"
        )
    runs = np.arange(len(counts)) % 2 == 1  # the first run is background
    return np.repeat(runs, counts).reshape(width, height).T


def _decompress(counts: str | bytes) -> np.ndarray:
    """COCO's compressed counts -> int64 run lengths.

    The format (pycocotools, maskApi.c): groups of five bits, lowest first, one character each from
    "0" on; bit 5 says that the number goes on, bit 4 of its last group is the sign; from the fourth
    run on, the difference to the run before the previous one is stored.
    """
    characters = np.frombuffer(counts.encode() if isinstance(counts, str) else counts, np.uint8)
    groups = characters.astype(np.int64) - 48
    last = (groups & 32) == 0
    if not len(groups) or groups.min() < 0 or groups.max() > 63 or not last[-1]:
        raise ValueError(f"not a compressed RLE: {counts!r}")
    ends = np.flatnonzero(last)
    starts = np.concatenate([[0], ends[:-1] + 1])
    lengths = ends - starts + 1
    if lengths.max() > 8:
        raise ValueError(f"not a compressed RLE, a run is too long: {counts!r}")
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
        sample: the point of a new pixel whose place decides: "corner", the upper left, as
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
    if not mask.flags.c_contiguous and mask.flags.f_contiguous:
        # pycocotools gives column-major bitmaps; resizing the transpose saves copying the large
        # one.
        return resize_nearest(mask.T, width, height, sample=sample).T
    resized = cv2.resize(mask.view(np.uint8), (width, height), interpolation=SAMPLES[sample])
    return resized.view(mask.dtype)


def union(masks: Sequence[np.ndarray] | np.ndarray) -> np.ndarray:
    """bool or uint8 masks (H,W), or an array (N,H,W), N may be 0 -> bool (H,W): True in any mask."""
    masks = np.asarray(masks, dtype=bool)
    if masks.ndim != 3:
        raise ValueError("the union of no masks has no size: pass an array of shape (0, H, W)")
    return masks.any(axis=0)
