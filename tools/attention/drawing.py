"""Pictures of where models look."""

import cv2
import matplotlib
import numpy as np
import torch
from _pictures import picture_grid
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from torch import Tensor

from ris_d2.io import atomic_write
from ris_d2.visualization import PREDICTION_COLOR, TARGET_COLOR, overlay, write_png

from .looking import Looked, Sample


def tsne(pixels: Tensor, tokens: Tensor) -> np.ndarray:
    """Pixels (N, D) and tokens (K, D) in one plane: float (N + K, 2)."""
    from sklearn.manifold import TSNE

    points = torch.cat([pixels, tokens]).numpy()
    perplexity = min(30.0, (len(points) - 1) / 3)
    return TSNE(
        perplexity=perplexity, metric="cosine", init="random", random_state=0
    ).fit_transform(points)


def draw_tsne(path: str, text: str, models: dict[str, Looked]) -> None:
    """A scatter plot per model that has tokens to show."""
    shown = {name: looked for name, looked in models.items() if looked.pixels is not None}
    figure = Figure(figsize=(5 * len(shown), 4.6), layout="constrained")
    figure.suptitle(text)
    for axes, (name, looked) in zip(
        np.atleast_1d(figure.subplots(1, len(shown))), shown.items(), strict=True
    ):
        places = tsne(looked.pixels, looked.embeddings)
        pixels, tokens = np.split(places, [len(looked.pixels)])
        on = looked.on_target if looked.on_target is not None else np.zeros(len(pixels), bool)
        axes.scatter(*pixels[~on].T, s=14, color="0.75", label="pixels off target")
        axes.scatter(*pixels[on].T, s=14, color=_rgb(TARGET_COLOR), label="pixels on target")
        axes.scatter(
            *tokens.T, s=50, marker="^", color=_rgb(PREDICTION_COLOR), label="tokens attended"
        )
        axes.set(title=name, xticks=[], yticks=[])
        axes.spines[:].set_color("0.8")
    figure.legend(
        *axes.get_legend_handles_labels(),
        loc="outside lower center",
        ncols=3,
        fontsize="small",
        columnspacing=1,
        frameon=False,
    )
    with atomic_write(path, mode="wb") as file:
        figure.savefig(file, format="png", dpi=110)


def attention_map(image: np.ndarray, weights: np.ndarray, *, alpha: float = 0.75) -> np.ndarray:
    """Lay a heat map over a greyed image; the heat is the brighter and the denser the larger the
    weight.

    Args:
        image: RGB uint8 (H,W,3).
        weights: float (h,w) of any size; shown between its own minimum and maximum, so that two
            maps are comparable in shape and not in strength. A map that is constant but for
            rounding shows no heat.
        alpha: opacity at the largest weight.

    Returns:
        RGB uint8 (H,W,3).

    Raises:
        ValueError: ``weights`` has another shape, or holds a value that is not finite.
    """
    weights = np.asarray(weights, dtype=np.float32)
    if weights.ndim != 2 or not np.isfinite(weights).all():
        raise ValueError(f"weights of shape {weights.shape} are no (h,w) array of finite values")
    span = float(weights.max() - weights.min())
    constant = span <= 1e-5 * float(np.abs(weights).max())
    heat = np.zeros_like(weights) if constant else (weights - weights.min()) / span
    heat = np.clip(cv2.resize(heat, image.shape[1::-1], interpolation=cv2.INTER_CUBIC), 0, 1)
    colors = 255 * matplotlib.colormaps["inferno"](heat)[..., :3]
    grey = cv2.cvtColor(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY), cv2.COLOR_GRAY2RGB)
    opacity = (alpha * np.sqrt(heat))[..., None]  # the root keeps middling weights visible
    return np.rint((1 - opacity) * grey + opacity * colors).astype(np.uint8)


def region_words(
    image: np.ndarray, box: tuple[int, int, int, int], words: list[str], weights: np.ndarray
) -> np.ndarray:
    """Draw a region of an image beside the weights that it gives to the words of a sentence.

    Args:
        image: RGB uint8 (H,W,3).
        box: (x0, y0, x1, y1) of the region, in pixels.
        words: L of them, in the order of the sentence.
        weights: float (L,).

    Returns:
        RGB uint8 (H',W',3).
    """
    figure = Figure(figsize=(8, max(3, 0.3 * len(words))), layout="constrained")
    left, right = figure.subplots(1, 2)
    left.imshow(image)
    left.set_axis_off()
    size = (box[2] - box[0], box[3] - box[1])
    for color, width in (("white", 4), (_rgb(PREDICTION_COLOR), 2)):
        left.add_patch(Rectangle(box[:2], *size, fill=False, color=color, linewidth=width))
    bars = right.barh(range(len(words)), weights, color=_rgb(PREDICTION_COLOR), tick_label=words)
    right.bar_label(bars, fmt="%.2f", padding=3)
    right.set(xlim=(0, 1.2 * max(*weights, 1e-12)), xticks=[])
    right.invert_yaxis()
    right.spines[:].set_visible(False)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def _rgb(color: tuple[int, int, int]) -> tuple[float, ...]:
    return tuple(c / 255 for c in color)


def draw_maps(path: str, drawn: list[tuple[Sample, int, dict[str, Looked]]]) -> None:
    """A line per sentence: target, then mask and maps of each model."""
    columns, rows = ["target"], []
    for name, looked in drawn[0][2].items():
        columns += [f"{name}: mask", *(f"{name}: {key}" for key in looked.maps)]
    for sample, row, models in drawn:
        target = sample.targets[row]
        pictures = [
            sample.image if target is None else overlay(sample.image, target, color=TARGET_COLOR)
        ]
        for looked in models.values():
            pictures.append(overlay(sample.image, looked.mask))
            for values in looked.maps.values():
                of_sentence = values if values.ndim == 2 else values[0]
                pictures.append(attention_map(sample.image, of_sentence.numpy()))
        rows.append((sample.texts[row], pictures))
    write_png(path, picture_grid(rows, columns=columns))


def draw_words(path: str, sample: Sample, row: int, models: dict[str, Looked]) -> None:
    """A line per map and a column per token; nothing where no model has maps per token."""
    lines, tokens = [], []
    for name, looked in models.items():
        for key, values in looked.maps.items():
            if values.ndim == 3:
                tokens = max(tokens, looked.tokens, key=len)
                pictures = [attention_map(sample.image, v.numpy()) for v in values]
                lines.append((f"{name}: {key}", pictures))
    if not lines:
        return
    width = max(len(pictures) for _, pictures in lines)
    columns = [*tokens, *[""] * (width - len(tokens))]
    padded = [(text, [*pictures, *[None] * (width - len(pictures))]) for text, pictures in lines]
    write_png(path, picture_grid(padded, columns=columns, title=sample.texts[row], cell=120))


def draw_region(
    path: str, sample: Sample, row: int, models: dict[str, Looked], point: tuple[int, int]
) -> None:
    """A column per map of the tokens: the place of ``point`` (x, y), and the maps' values there."""
    x, y = point
    half = max(2, round(min(sample.image.shape[:2]) / 24))
    box = (x - half, y - half, x + half, y + half)
    columns = {
        f"{name}: {key}": region_words(sample.image, box, looked.tokens, values[:, y, x].numpy())
        for name, looked in models.items()
        for key, values in looked.maps.items()
        if values.ndim == 3 and len(values) == len(looked.tokens)
    }
    if columns:
        row_of_pictures = (sample.texts[row], list(columns.values()))
        write_png(path, picture_grid([row_of_pictures], columns=list(columns), cell=400))
