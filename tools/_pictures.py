"""Tables of pictures for people: contact sheets, and several masks in one image.

Blue marks ground truth and orange predictions, as in ris_d2.visualization; all images are RGB uint8
numpy arrays (H,W,3).
"""

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from ris_d2.visualization import PREDICTION_COLOR, TARGET_COLOR, overlay

# Of the sentences 0, 1, ... about one image, again from the start behind the last one.
SENTENCE_COLORS = (
    (230, 40, 40),
    (40, 110, 240),
    (30, 170, 60),
    (240, 160, 0),
    (150, 60, 200),
    (0, 180, 190),
)

_GAP, _FONT, _LINE, _LETTER = 12, 14, 18, 8.3  # pixels; the last is the width of an average letter


def enlarge(
    image: np.ndarray, masks: Sequence[np.ndarray], *, width: int
) -> tuple[np.ndarray, list[np.ndarray]]:
    """Image and bool masks, larger if the image is less than ``width`` pixels wide: contours that
    are painted then are thin beside what they surround."""
    scale = max(1.0, width / image.shape[1])
    large = cv2.resize(image, None, fx=scale, fy=scale, interpolation=cv2.INTER_CUBIC)
    masks = [np.asarray(mask, np.float32) for mask in masks]
    return large, [cv2.resize(mask, None, fx=scale, fy=scale) >= 0.5 for mask in masks]


def overlay_all(image: np.ndarray, masks: Sequence[np.ndarray]) -> np.ndarray:
    """Paint the masks of sentences 0, 1, ..., each in its SENTENCE_COLORS; see :func:`overlay`."""
    for i, mask in enumerate(masks):
        image = overlay(image, mask, color=SENTENCE_COLORS[i % len(SENTENCE_COLORS)])
    return image


@dataclass(frozen=True, kw_only=True)
class SheetRow:
    """One line of a contact sheet: an expression, what it refers to, and what the model said.

    Attributes:
        image: RGB uint8 (H,W,3).
        text: the referring expression.
        target: bool (H,W) ground truth, or None where the expression refers to nothing.
        prediction: bool (H,W), or None for the answer "nothing". A mask without a pixel that does
            not come with this answer reads "empty mask": it does not count as having said it.
        iou: 0..1, as the evaluator counts it (1 for "nothing" where nothing is right).
        note: a few words under the sentence, such as the score.
    """

    image: np.ndarray
    text: str
    target: np.ndarray | None
    prediction: np.ndarray | None
    iou: float
    note: str = ""


def contact_sheet(rows: Sequence[SheetRow], *, title: str = "", cell: int = 224) -> np.ndarray:
    """Draw one line per expression: sentence, note and IoU, image, ground truth, prediction.

    Consecutive rows that share one image object show it once. Arguments, result and errors are
    those of :func:`picture_grid`.
    """
    lines = []
    for before, row in zip([None, *rows], rows):
        picture = None if before is not None and row.image is before.image else row.image
        target = _answer(row.image, row.target, TARGET_COLOR, "no target", cell)
        prediction = _answer(row.image, row.prediction, PREDICTION_COLOR, "nothing", cell)
        text = "\n".join(filter(None, [row.text, row.note, f"IoU {100 * row.iou:.1f}"]))
        lines.append((text, [picture, target, prediction]))
    columns = ["image", "ground truth", "prediction"]
    return picture_grid(lines, columns=columns, title=title, cell=cell)


def _answer(
    image: np.ndarray,
    mask: np.ndarray | None,
    color: tuple[int, int, int],
    nothing: str,
    cell: int,
) -> np.ndarray | tuple[np.ndarray, str]:
    if mask is None or not np.any(mask):
        tint = (235 + 0.08 * np.array(color)).astype(np.uint8)
        return np.broadcast_to(tint, image.shape), nothing if mask is None else "empty mask"
    # A contour of 2 pixels of the sheet, whether the image is drawn larger or smaller.
    image, (mask,) = enlarge(image, [mask], width=cell)
    return overlay(image, mask, color=color, width=max(2, round(2 * image.shape[1] / cell)))


def picture_grid(
    rows: Sequence[tuple[str, Sequence[np.ndarray | tuple[np.ndarray, str] | None]]],
    *,
    columns: Sequence[str],
    title: str = "",
    cell: int = 160,
) -> np.ndarray:
    """Draw pictures in rows and named columns, each row beginning with a text.

    Args:
        rows: (text, pictures), pictures RGB uint8 (H,W,3), (picture, word to write on it) or None
            for an empty place. Pictures are as wide as the cell, those of more than 1.5 x its
            height narrower.
        columns: a name per picture of a row; names and texts are wrapped.
        title: a line above the table.
        cell: width of each picture and of the text in pixels.

    Returns:
        RGB uint8 (H',W',3).

    Raises:
        ValueError: without rows, or with a row of another length than ``columns``.
    """
    if not rows:
        raise ValueError("a grid of pictures needs at least one row")
    for text, pictures in rows:
        if len(pictures) != len(columns):
            raise ValueError(
                f"row {text!r} has {len(pictures)} pictures for {len(columns)} columns"
            )
    width = _GAP + (1 + len(columns)) * (cell + _GAP)
    lines = [[_wrap("", cell), *(_wrap(name, cell) for name in columns)]]
    lines += [[_wrap(text, cell), *pictures] for text, pictures in rows]
    heights = [max(_size(content, cell)[1] for content in line) for line in lines]
    title = _wrap(title, width)
    top = _GAP + (_size(title, cell)[1] + _GAP if title else 0)
    height = top + sum(heights) + _GAP * len(heights)
    figure = Figure(figsize=(width / 72, height / 72), dpi=72)  # a point is a pixel
    figure.text(_GAP / width, 1 - _GAP / height, title, fontsize=_FONT + 2, va="top")
    for line, line_height in zip(lines, heights):
        for number, content in enumerate(line):
            w, h = _size(content, cell)
            left = _GAP + number * (cell + _GAP)
            axes = figure.add_axes((left / width, 1 - (top + h) / height, w / width, h / height))
            axes.set_axis_off()
            picture, word = content if isinstance(content, tuple) else (content, "")
            if isinstance(content, str):
                axes.text(0, 1, content, fontsize=_FONT, va="top", clip_on=True)
            elif picture is not None:
                axes.imshow(picture, aspect="auto")
                middle = {"ha": "center", "va": "center", "transform": axes.transAxes}
                axes.text(0.5, 0.5, word, fontsize=_FONT + 2, color="0.3", **middle)
        top += line_height + _GAP
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def _wrap(text: str, width: int) -> str:
    return "\n".join(textwrap.fill(line, int(width / _LETTER)) for line in text.splitlines())


def _size(content: str | np.ndarray | tuple[np.ndarray, str] | None, cell: int) -> tuple[int, int]:
    """(width, height) in pixels of what stands in a cell."""
    if content is None or isinstance(content, str):
        return cell, _LINE * (1 + content.count("\n")) if content else 1
    height, width = (content[0] if isinstance(content, tuple) else content).shape[:2]
    scale = min(cell / width, 1.5 * cell / height)
    return max(1, round(scale * width)), max(1, round(scale * height))
