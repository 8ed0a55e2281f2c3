"""Pictures for people: mask overlays, attention maps and contact sheets of predictions.

All functions take and return RGB uint8 numpy images of shape (H,W,3). Blue marks ground truth and
orange marks predictions (the pair of the Okabe-Ito palette that stays apart for every kind of colour
blindness); a contour line says the same as the fill, so that nothing hangs on colour alone.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import matplotlib
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from .io import atomic_write

TARGET_COLOR = (0, 114, 178)
PREDICTION_COLOR = (230, 110, 0)

_INK, _GREY, _LINE, _PAPER = (34, 34, 34), (118, 118, 118), (214, 214, 214), (255, 255, 255)
_FONT_SIZE, _SMALL_FONT_SIZE = 16, 12
_GAP = 12
_SCORE_WIDTH = 96


def overlay(
    image: np.ndarray,
    mask: np.ndarray,
    *,
    color: tuple[int, int, int] = PREDICTION_COLOR,
    alpha: float = 0.45,
) -> np.ndarray:
    """Paint ``mask`` over ``image``: translucent fill, opaque contour with a white rim.

    Args:
        image: RGB uint8 (H,W,3); it is not changed.
        mask: bool or 0/1 (H,W). An empty mask returns a copy of the image.
        color: RGB of fill and contour.
        alpha: opacity of the fill, 0 (contour only) to 1.

    Returns:
        RGB uint8 (H,W,3).

    Raises:
        ValueError: if image or mask has another shape or type, or alpha lies outside 0..1.
    """
    _check_image(image)
    mask = _check_mask(mask, image)
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha must lie between 0 and 1, got {alpha}")
    painted = image.copy()
    if not mask.any():
        return painted
    blend = (1 - alpha) * image[mask] + alpha * np.asarray(color, dtype=np.float64)
    painted[mask] = np.rint(blend).astype(np.uint8)
    contours, _ = cv2.findContours(mask.astype(np.uint8), cv2.RETR_CCOMP, cv2.CHAIN_APPROX_NONE)
    width = max(2, round(min(mask.shape) / 200))
    cv2.drawContours(painted, contours, -1, (255, 255, 255), width + 2, cv2.LINE_AA)
    cv2.drawContours(painted, contours, -1, tuple(color), width, cv2.LINE_AA)
    return painted


def attention_map(image: np.ndarray, weights: np.ndarray, *, alpha: float = 0.75) -> np.ndarray:
    """Lay a heat map over a greyed image; the heat is the brighter and the denser the larger the weight.

    Args:
        image: RGB uint8 (H,W,3).
        weights: float (h,w) of any size; shown between its own minimum and maximum, so that two maps
            are comparable in shape and not in strength. A map that is constant but for rounding shows
            no heat.
        alpha: opacity at the largest weight.

    Returns:
        RGB uint8 (H,W,3).

    Raises:
        ValueError: if an argument has another shape, or a weight is not finite.
    """
    _check_image(image)
    weights = np.asarray(weights, dtype=np.float32)
    if weights.ndim != 2 or weights.size == 0:
        raise ValueError(f"weights must be a (h,w) array, got shape {weights.shape}")
    if not np.isfinite(weights).all():
        raise ValueError("weights hold nan or infinite values")
    height, width = image.shape[:2]
    span = float(weights.max() - weights.min())
    constant = span <= 1e-5 * float(np.abs(weights).max())
    heat = np.zeros_like(weights) if constant else (weights - weights.min()) / span
    heat = np.clip(cv2.resize(heat, (width, height), interpolation=cv2.INTER_CUBIC), 0, 1)
    colors = cv2.applyColorMap(np.rint(heat * 255).astype(np.uint8), cv2.COLORMAP_INFERNO)[
        ..., ::-1
    ]
    grey = cv2.cvtColor(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY), cv2.COLOR_GRAY2RGB)
    opacity = (alpha * np.sqrt(heat))[..., None]  # the root keeps middling weights visible
    return np.rint((1 - opacity) * grey + opacity * colors).astype(np.uint8)


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
    """Draw one line per expression: image, sentence, ground truth, prediction, IoU.

    Consecutive rows that share one image object show it once.

    Args:
        rows: at least one row; images may differ in size.
        title: a line above the table.
        cell: width of each picture in pixels; pictures keep their aspect ratio up to a height of
            1.5 x cell, beyond that they are drawn narrower.

    Returns:
        RGB uint8 (H',W',3); W' depends on ``cell`` only.

    Raises:
        ValueError: without rows, with a cell below 64 pixels, or if a row's mask does not fit its
            image.
    """
    if not rows:
        raise ValueError("a contact sheet needs at least one row")
    if cell < 64:
        raise ValueError(f"cell must be at least 64 pixels, got {cell}")
    font, small = _font(_FONT_SIZE), _font(_SMALL_FONT_SIZE)
    lefts, x = [], _GAP
    for width in (cell, cell, cell, cell, _SCORE_WIDTH):
        lefts.append(x)
        x += width + _GAP
    lines = [_SheetLine(row, cell=cell, font=font, small=small) for row in rows]
    head = _GAP + (_line_height(font) + _GAP if title else 0) + _line_height(small) + _GAP
    sheet = Image.new("RGB", (x, head + sum(line.height + 2 * _GAP for line in lines)), _PAPER)
    draw = ImageDraw.Draw(sheet)
    y = _GAP
    if title:
        draw.text((lefts[0], y), title, font=font, fill=_INK)
        y += _line_height(font) + _GAP
    names = ("image", "sentence", "ground truth", "prediction", "IoU")
    colors = (_GREY, _GREY, TARGET_COLOR, PREDICTION_COLOR, _GREY)
    for left, name, color in zip(lefts, names, colors):
        draw.text((left, y), name, font=small, fill=color)
    y = head
    previous = None
    for line in lines:
        same_image = previous is not None and line.row.image is previous.image
        draw.line([(lefts[1] if same_image else _GAP, y), (x - _GAP, y)], fill=_LINE, width=1)
        line.draw(sheet, lefts=lefts, top=y + _GAP, show_image=not same_image)
        previous = line.row
        y += line.height + 2 * _GAP
    return np.asarray(sheet)


def picture_grid(
    rows: Sequence[tuple[str, Sequence[np.ndarray | None]]],
    *,
    columns: Sequence[str],
    title: str = "",
    cell: int = 160,
) -> np.ndarray:
    """Draw pictures in rows and named columns, each row beginning with a text.

    Args:
        rows: (text, pictures), pictures RGB uint8 (H,W,3) or None for an empty place; those of a row
            are drawn equally wide and may differ in height.
        columns: a name per picture of a row; longer ones are wrapped.
        title: a line above the table.
        cell: width of each picture and of the text in pixels.

    Returns:
        RGB uint8 (H',W',3).

    Raises:
        ValueError: without rows, or with a row of another length than ``columns``.
    """
    if not rows:
        raise ValueError("a grid of pictures needs at least one row")
    font, small = _font(_FONT_SIZE), _font(_SMALL_FONT_SIZE)
    lines = []
    for text, pictures in rows:
        if len(pictures) != len(columns):
            raise ValueError(
                f"row {text!r} has {len(pictures)} pictures for {len(columns)} columns"
            )
        shown = [None if p is None else _at_width(p, cell) for p in pictures]
        wrapped = _wrap(text, small, cell)
        height = max(
            [len(wrapped) * _line_height(small), *(len(p) for p in shown if p is not None)]
        )
        lines.append((wrapped, shown, height))
    names = [_wrap(column, small, cell) for column in columns]
    head = _GAP + (_line_height(font) + _GAP if title else 0)
    top = head + max(len(name) for name in names) * _line_height(small) + _GAP // 2
    width = _GAP + (len(columns) + 1) * (cell + _GAP)
    sheet = Image.new("RGB", (width, top + sum(h + _GAP for _, _, h in lines)), _PAPER)
    draw = ImageDraw.Draw(sheet)
    if title:
        draw.text((_GAP, _GAP), title, font=font, fill=_INK)
    lefts = [_GAP + i * (cell + _GAP) for i in range(len(columns) + 1)]
    for left, name in zip(lefts[1:], names, strict=True):
        _draw_lines(draw, (left, head), name, small, _GREY)
    for wrapped, shown, height in lines:
        _draw_lines(draw, (lefts[0], top), wrapped, small, _INK)
        for left, picture in zip(lefts[1:], shown, strict=True):
            if picture is not None:
                sheet.paste(Image.fromarray(picture), (left, top))
        top += height + _GAP
    return np.asarray(sheet)


def _at_width(image: np.ndarray, width: int) -> np.ndarray:
    _check_image(image)
    size = (width, max(1, round(width * image.shape[0] / image.shape[1])))
    enlarged = width > image.shape[1]
    return cv2.resize(image, size, interpolation=cv2.INTER_CUBIC if enlarged else cv2.INTER_AREA)


def _draw_lines(
    draw: ImageDraw.ImageDraw,
    corner: tuple[int, int],
    lines: Sequence[str],
    font: ImageFont.FreeTypeFont,
    color: tuple[int, int, int],
) -> None:
    for number, line in enumerate(lines):
        draw.text((corner[0], corner[1] + number * _line_height(font)), line, font=font, fill=color)


def region_words(
    image: np.ndarray,
    box: tuple[float, float, float, float],
    words: Sequence[str],
    weights: np.ndarray,
    *,
    cell: int = 224,
) -> np.ndarray:
    """Draw a region of an image beside the weights that it gives to the words of a sentence.

    Args:
        image: RGB uint8 (H,W,3).
        box: (x0, y0, x1, y1) of the region, in pixels.
        words: L of them, in the order of the sentence.
        weights: float (L,), at least 0; the bars are as long as their shares of the largest.
        cell: width of the picture and of the chart in pixels.

    Returns:
        RGB uint8 (H',W',3).

    Raises:
        ValueError: without words, with another number of weights, or with a negative weight or one that
            is not finite.
    """
    weights = np.asarray(weights, dtype=np.float64)
    if not len(words) or weights.shape != (len(words),):
        raise ValueError(f"{len(words)} words have weights of the shape {weights.shape}")
    if not np.isfinite(weights).all() or (weights < 0).any():
        raise ValueError("weights hold negative, nan or infinite values")
    scale = cell / image.shape[1]
    picture = _at_width(image, cell).copy()
    corners = [round(v * scale) for v in box]
    cv2.rectangle(picture, corners[:2], corners[2:], (255, 255, 255), 4)
    cv2.rectangle(picture, corners[:2], corners[2:], PREDICTION_COLOR, 2)
    small = _font(_SMALL_FONT_SIZE)
    line = _line_height(small)
    height = max(len(picture), len(words) * line)
    sheet = Image.new("RGB", (2 * cell + 3 * _GAP, height + 2 * _GAP), _PAPER)
    sheet.paste(Image.fromarray(picture), (_GAP, _GAP))
    draw = ImageDraw.Draw(sheet)
    left = cell + 2 * _GAP
    names = [_wrap(word, small, cell // 2)[0] if word.strip() else word for word in words]
    bars = left + max(round(small.getlength(name)) for name in names) + _GAP // 2
    number = round(small.getlength("0.00")) + _GAP // 2
    longest = left + cell - number - bars
    for row, (name, weight) in enumerate(zip(names, weights, strict=True)):
        top = _GAP + row * line
        draw.text((left, top), name, font=small, fill=_INK)
        end = bars + round(longest * weight / max(weights.max(), 1e-12))
        draw.rectangle((bars, top + 3, max(end, bars + 1), top + line - 4), fill=PREDICTION_COLOR)
        draw.text((end + _GAP // 2, top), f"{weight:.2f}", font=small, fill=_GREY)
    return np.asarray(sheet)


def write_png(path: str | os.PathLike, image: np.ndarray) -> None:
    """Write an RGB uint8 (H,W,3) image or a bool (H,W) mask (as 0 and 255) to a PNG file, atomically."""
    picture = Image.fromarray(image.astype(np.uint8) * 255 if image.dtype == bool else image)
    with atomic_write(path, mode="wb") as file:
        picture.save(file, format="PNG")


class _SheetLine:
    """One row, measured first (its text decides its height) and drawn later."""

    def __init__(
        self,
        row: SheetRow,
        *,
        cell: int,
        font: ImageFont.FreeTypeFont,
        small: ImageFont.FreeTypeFont,
    ) -> None:
        _check_image(row.image)
        self.row, self.cell, self.font, self.small = row, cell, font, small
        height, width = row.image.shape[:2]
        scale = min(cell / width, 1.5 * cell / height)
        self.size = (max(1, round(width * scale)), max(1, round(height * scale)))
        enlarged = scale > 1
        self.image = cv2.resize(
            row.image, self.size, interpolation=cv2.INTER_CUBIC if enlarged else cv2.INTER_AREA
        )
        self.text = _wrap(row.text, font, cell)
        self.note = _wrap(row.note, small, cell)
        text_height = len(self.text) * _line_height(font) + len(self.note) * _line_height(small)
        self.height = max(self.size[1], text_height + (_GAP // 2 if self.note else 0))

    def draw(self, sheet: Image.Image, *, lefts: list[int], top: int, show_image: bool) -> None:
        row, draw = self.row, ImageDraw.Draw(sheet)
        if show_image:
            sheet.paste(Image.fromarray(self.image), (lefts[0], top))
        y = top
        for text in self.text:
            draw.text((lefts[1], y), text, font=self.font, fill=_INK)
            y += _line_height(self.font)
        y += _GAP // 2
        for text in self.note:
            draw.text((lefts[1], y), text, font=self.small, fill=_GREY)
            y += _line_height(self.small)
        self._draw_cell(sheet, (lefts[2], top), row.target, TARGET_COLOR, "no target")
        self._draw_cell(sheet, (lefts[3], top), row.prediction, PREDICTION_COLOR, "nothing")
        draw.text((lefts[4], top), f"{100 * row.iou:.1f}", font=self.font, fill=_INK)
        bar = top + _line_height(self.font) + 4
        filled = round((_SCORE_WIDTH - 1) * min(max(row.iou, 0.0), 1.0))
        draw.rectangle((lefts[4], bar, lefts[4] + _SCORE_WIDTH - 1, bar + 6), fill=_LINE)
        if filled > 0:
            draw.rectangle((lefts[4], bar, lefts[4] + filled, bar + 6), fill=_INK)

    def _draw_cell(
        self,
        sheet: Image.Image,
        corner: tuple[int, int],
        mask: np.ndarray | None,
        color: tuple[int, int, int],
        word: str,
    ) -> None:
        if mask is not None:
            mask = _check_mask(mask, self.row.image)
            word = "empty mask"
        if mask is None or not mask.any():
            _draw_word(sheet, corner, self.size, word=word, color=color, font=self.font)
            return
        coverage = cv2.resize(
            mask.astype(np.float32),
            self.size,
            interpolation=cv2.INTER_LINEAR if self.size[0] > mask.shape[1] else cv2.INTER_AREA,
        )
        shown = coverage >= 0.5
        if not shown.any():  # a target thinner than a pixel of the sheet stays visible
            shown = coverage > 0
        sheet.paste(Image.fromarray(overlay(self.image, shown, color=color)), corner)


def _draw_word(
    sheet: Image.Image,
    corner: tuple[int, int],
    size: tuple[int, int],
    *,
    word: str,
    color: tuple[int, int, int],
    font: ImageFont.FreeTypeFont,
) -> None:
    """Draw a tinted box with ``word`` in it where a picture is missing."""
    draw = ImageDraw.Draw(sheet)
    right, bottom = corner[0] + size[0] - 1, corner[1] + size[1] - 1
    tint = tuple(round(0.08 * c + 0.92 * 255) for c in color)
    draw.rectangle((*corner, right, bottom), fill=tint, outline=color, width=1)
    middle = ((corner[0] + right) / 2, (corner[1] + bottom) / 2)
    draw.text(middle, word, font=font, fill=color, anchor="mm")


def _font(size: int) -> ImageFont.FreeTypeFont:
    """DejaVu Sans as matplotlib ships it: the same on every machine, and it knows accents and Greek."""
    return ImageFont.truetype(
        os.path.join(matplotlib.get_data_path(), "fonts", "ttf", "DejaVuSans.ttf"), size
    )


def _line_height(font: ImageFont.FreeTypeFont) -> int:
    return round(font.size * 1.3)


def _wrap(text: str, font: ImageFont.FreeTypeFont, width: int) -> list[str]:
    """Break ``text`` into lines of at most ``width`` pixels; a longer word is cut."""
    lines: list[str] = []
    for word in text.split():
        if lines and font.getlength(f"{lines[-1]} {word}") <= width:
            lines[-1] = f"{lines[-1]} {word}"
            continue
        while font.getlength(word) > width:
            cut = next(n for n in range(len(word) - 1, 0, -1) if font.getlength(word[:n]) <= width)
            lines.append(word[:cut])
            word = word[cut:]
        lines.append(word)
    return lines


def _check_image(image: np.ndarray) -> None:
    if not isinstance(image, np.ndarray) or image.dtype != np.uint8 or image.ndim != 3:
        kind = (
            f"{image.dtype} {image.shape}"
            if isinstance(image, np.ndarray)
            else type(image).__name__
        )
        raise ValueError(f"image must be an RGB uint8 numpy array of shape (H,W,3), got {kind}")
    if image.shape[2] != 3 or image.size == 0:
        raise ValueError(f"image must have the shape (H,W,3), got {image.shape}")


def _check_mask(mask: np.ndarray, image: np.ndarray) -> np.ndarray:
    mask = np.asarray(mask)
    if mask.shape != image.shape[:2]:
        raise ValueError(f"mask {mask.shape} does not fit the image {image.shape[:2]}")
    return mask.astype(bool)
