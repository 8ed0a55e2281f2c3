#!/usr/bin/env python
"""Show where models look, side by side on the same images, and measure it.

    python tools/attention.py --model "Advanced LE" configs/papers/vipa.yaml:t5_advanced_le le.pth \
        --model VE configs/papers/vipa.yaml:refcocop ve.pth \
        --dataset ris_refcoco+_unc_val --images 200 --output out [--tsne] [KEY VALUE ...]
    python tools/attention.py --model Shared-RIS configs/shared_ris_beit3_b.yaml model_best.pth \
        --image street.jpg --text "the left man" --output out

draws for the first ``--draw`` sentences with a target, and measures over all of them:

    maps.png        a line per sentence: the target, and of each model its mask and its maps. Of a map
                    per word that of the first token ([CLS], <s>), which stands for the sentence
    words_0.png     sentence 0: the maps of each of its tokens, where a model has them
    region_0.png    --point X Y: sentence 0: what the tokens' maps are at that pixel of the image, the
                    weights of the words for a region (RISAM's Fig. 7 a)
    tsne_0.png      --tsne: sentence 0: the decoder's pixels, on target and off it, and the tokens that
                    they attend, in two dimensions (scikit-learn; perplexity 30, cosine distance)
    attention.json  per model, means over the sentences: the entropy of the rows of its decoder's
                    attentions, in nats (less: each query looks at fewer keys); per map, how well it
                    tells the target from the rest (AUC in percent: the probability that a place on
                    target has the higher value; 50 is chance); with tokens, their cosine with pixels
                    on and off target. And of the sentences drawn, the AUC of each token's maps

What a model shows is its method's ``explain``: Shared-RIS's Figs. 7 and 8, VIPA's Figs. 1, 5 and 6,
RISAM's Fig. 7, ASDA's Fig. 4. KEY VALUE pairs go to all models.
"""

import argparse
import json
import os
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass

from _program import Parser, load, run


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(__doc__)
    parser.add_argument(
        "--model",
        required=True,
        action="append",
        nargs=3,
        metavar=("NAME", "CONFIG", "WEIGHTS"),
        help="may be given several times; WEIGHTS '' is an untrained model",
    )
    parser.add_changes()
    parser.add_argument("--dataset", metavar="NAME", help="a registered one")
    parser.add_argument(
        "--images", type=int, default=50, help="of the dataset (default: %(default)s)"
    )
    parser.add_argument(
        "--sentences", type=int, default=2, help="per image of the dataset, at most"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the draw of images")
    parser.add_argument("--image", metavar="FILE", help="instead of a dataset")
    parser.add_argument("--text", action="append", help="with --image; may be given several times")
    parser.add_argument(
        "--point", type=int, nargs=2, metavar=("X", "Y"), help="with --image: a pixel of it"
    )
    parser.add_argument("--draw", type=int, default=4, help="sentences to draw")
    parser.add_argument("--tsne", action="store_true")
    parser.add_argument("--output", required=True, metavar="DIRECTORY", help="made if absent")
    args = parser.parse_args(arguments)
    if bool(args.dataset) == bool(args.image) or bool(args.image) != bool(args.text):
        parser.error("give either --dataset, or --image and --text")
    if args.point and not args.image:
        parser.error("--point is a pixel of the --image")
    if len({name for name, _, _ in args.model}) < len(args.model):
        parser.error("every --model needs a name of its own")
    return args


if __name__ == "__main__":
    parse()  # --help and mistakes are answered before the imports below, which take seconds

import numpy as np
import torch
import torch.nn.functional as F
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog
from matplotlib.figure import Figure
from tabulate import tabulate
from torch import Tensor

from ris_d2.evaluation.report import finite_or_null
from ris_d2.io import atomic_write
from ris_d2.masks import rasterize, union
from ris_d2.modeling.explanation import Explanation
from ris_d2.predictor import Predictor, load_rgb
from ris_d2.visualization import (
    PREDICTION_COLOR,
    TARGET_COLOR,
    attention_map,
    overlay,
    picture_grid,
    region_words,
    write_png,
)


@dataclass(frozen=True, kw_only=True)
class Sample:
    """Sentences about one image, and what they refer to (None where that is not known)."""

    image: np.ndarray
    texts: list[str]
    targets: list[np.ndarray | None]


@dataclass(frozen=True, kw_only=True)
class Looked:
    """One model on one sentence: maps at the image's size, and its target on the grid of the pixels."""

    maps: dict[str, Tensor]  # (H, W), or (L, H, W) of the real tokens
    mask: np.ndarray
    tokens: list[str]
    entropy: dict[str, float]
    pixels: Tensor | None  # (N, D)
    embeddings: Tensor | None  # (K, D)
    on_target: np.ndarray | None  # bool (N,)


class Observer:
    """A model, asked where it looks."""

    def __init__(self, cfg: CfgNode) -> None:
        self.predictor = Predictor(cfg)

    def look(self, sample: Sample) -> list[Looked]:
        model = self.predictor.model
        inputs = self.predictor.prepare(sample.image, sample.texts)
        results = model([inputs])[0]["referring"]
        (explanation,) = model.explanations([inputs])
        text_mask = inputs["text_mask"]
        if model.trims_text:
            text_mask = text_mask[:, : text_mask.sum(1).max()]
        looked = []
        for row, result in enumerate(results):
            real = text_mask[row]
            part = explanation.apply(lambda x, row=row: x[row])
            maps = {
                name: self._placed(values if values.ndim == 2 else values[real], inputs)
                for name, values in part.maps.items()
            }
            looked.append(
                Looked(
                    maps=maps,
                    mask=result["mask"].cpu().numpy(),
                    tokens=self.predictor.mapper.tokenizer.tokens(
                        inputs["input_ids"][row, : len(real)][real].tolist()
                    ),
                    entropy={name: value.item() for name, value in part.entropy.items()},
                    **self._embedded(part, sample.targets[row], inputs),
                )
            )
        return looked

    def _placed(self, maps: Tensor, inputs: dict) -> Tensor:
        """Maps over the model's input (..., h, w) -> over the image (..., H, W)."""
        x0, y0, x1, y1 = (round(v) for v in inputs["content_box"])
        flat = maps.reshape(1, -1, *maps.shape[-2:])
        flat = F.interpolate(flat, size=self.predictor.model.input_size, mode="bilinear")
        size = (inputs["height"], inputs["width"])
        flat = F.interpolate(flat[..., y0:y1, x0:x1], size=size, mode="bilinear")
        return flat.reshape(*maps.shape[:-2], *size)

    def _embedded(self, part: Explanation, target: np.ndarray | None, inputs: dict) -> dict:
        if part.pixels is None:
            return {"pixels": None, "embeddings": None, "on_target": None}
        return {
            "pixels": part.pixels.flatten(0, 1),
            "embeddings": part.tokens[part.attended > 0],
            "on_target": self._on_grid(target, part.pixels.shape[:2], inputs),
        }

    def _on_grid(
        self, target: np.ndarray | None, grid: tuple[int, int], inputs: dict
    ) -> np.ndarray | None:
        """Whether the centre of each cell of the model's input lies on the target: bool (h w,)."""
        if target is None:
            return None
        x0, y0, x1, y1 = (round(v) for v in inputs["content_box"])
        canvas = torch.zeros(1, 1, *self.predictor.model.input_size)
        inside = torch.from_numpy(target)[None, None].float()
        canvas[..., y0:y1, x0:x1] = F.interpolate(inside, size=(y1 - y0, x1 - x0), mode="nearest")
        on_target = F.interpolate(canvas, size=tuple(grid), mode="nearest-exact")
        if not on_target.any():  # smaller than a cell: where most of it lies
            share = F.adaptive_avg_pool2d(canvas, tuple(grid))
            on_target = share == share.max()
        return on_target.flatten().bool().numpy()


def samples(args: argparse.Namespace) -> Iterator[Sample]:
    """The image and texts of the command line, or images of a dataset drawn by chance."""
    if args.image:
        yield Sample(image=load_rgb(args.image), texts=args.text, targets=[None] * len(args.text))
        return
    records = DatasetCatalog.get(args.dataset)
    order = np.random.default_rng(args.seed).permutation(len(records))
    for number in order[: args.images]:
        record = records[number]
        expressions = [e for e in record["expressions"] if e["annotation_ids"]]
        if not expressions:
            continue
        masks = {
            a["id"]: rasterize(a["segmentation"], record["height"], record["width"])
            for a in record["annotations"]
        }
        expressions = expressions[: args.sentences]
        yield Sample(
            image=load_rgb(record["file_name"]),
            texts=[e["text"] for e in expressions],
            targets=[union([masks[i] for i in e["annotation_ids"]]) for e in expressions],
        )


class Measures:
    """Means over the sentences of one model."""

    def __init__(self) -> None:
        self._values: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
        self.sentences = 0

    def add(self, looked: Looked, target: np.ndarray | None) -> None:
        self.sentences += 1
        for name, value in looked.entropy.items():
            self._values["entropy"][name].append(value)
        if target is None:
            return
        for name, values in looked.maps.items():
            of_sentence = values if values.ndim == 2 else values[0]
            self._values["auc"][name].append(100 * auc(of_sentence.numpy(), target))
        if looked.pixels is not None:
            cosines = F.normalize(looked.pixels, dim=-1) @ F.normalize(looked.embeddings, dim=-1).T
            per_pixel = cosines.mean(1).numpy()
            for name, where in (("on", looked.on_target), ("off", ~looked.on_target)):
                if where.any():
                    self._values["cosine"][f"{name} target"].append(per_pixel[where].mean())

    def means(self) -> dict[str, dict[str, float]]:
        return {
            kind: {name: float(np.mean(values)) for name, values in by_name.items()}
            for kind, by_name in self._values.items()
        }


def auc(values: np.ndarray, target: np.ndarray) -> float:
    """Probability that a pixel on target has a higher value than one off it, ties counting half.

    nan if the target is nothing or everything.
    """
    on, off = values[target], np.sort(values[~target])
    if not len(on) or not len(off):
        return float("nan")
    below = np.searchsorted(off, on, "left") + np.searchsorted(off, on, "right")
    return float(below.mean() / 2 / len(off))


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


def _per_token(sample: Sample, row: int, looked: Looked) -> dict:
    """What attention.json says of a sentence that is drawn."""
    target = sample.targets[row]
    return {
        "text": sample.texts[row],
        "tokens": looked.tokens,
        "auc": {
            name: [100 * auc(of_token.numpy(), target) for of_token in values]
            for name, values in looked.maps.items()
            if values.ndim == 3 and target is not None
        },
    }


def main(arguments: list[str] | None = None) -> dict:
    """Parse ``arguments`` (default: the command line), draw, write, print and return the report."""
    args = parse(arguments)
    if args.point:
        height, width = load_rgb(args.image).shape[:2]
        if not (0 <= args.point[0] < width and 0 <= args.point[1] < height):
            raise ValueError(f"--point lies outside the image of {width} x {height} pixels")
    observers = {
        name: Observer(load(args, config, ["MODEL.WEIGHTS", weights]))
        for name, config, weights in args.model
    }
    measures = {name: Measures() for name in observers}
    drawn: list[tuple[Sample, int, dict[str, Looked]]] = []
    for sample in samples(args):
        looked = {name: observer.look(sample) for name, observer in observers.items()}
        for row, target in enumerate(sample.targets):
            for name in observers:
                measures[name].add(looked[name][row], target)
        # One sentence of each image, and all of the command line's.
        for row in range(len(sample.texts) if args.image else 1):
            if len(drawn) < args.draw:
                drawn.append((sample, row, {name: looked[name][row] for name in observers}))
    if not drawn:
        raise SystemExit(f"{args.dataset}: none of the images drawn has a sentence with a target")
    draw_maps(os.path.join(args.output, "maps.png"), drawn)
    for number, (sample, row, models) in enumerate(drawn):
        draw_words(os.path.join(args.output, f"words_{number}.png"), sample, row, models)
        if args.point:
            path = os.path.join(args.output, f"region_{number}.png")
            draw_region(path, sample, row, models, args.point)
        if args.tsne and any(looked.pixels is not None for looked in models.values()):
            path = os.path.join(args.output, f"tsne_{number}.png")
            draw_tsne(path, sample.texts[row], models)
    report = {
        name: {
            "config_file": config,
            "weights": weights,
            "sentences": measures[name].sentences,
            **measures[name].means(),
            "drawn": [_per_token(sample, row, models[name]) for sample, row, models in drawn],
        }
        for name, config, weights in args.model
    }
    with atomic_write(os.path.join(args.output, "attention.json")) as file:
        json.dump(finite_or_null(report), file, indent=2)
    rows = [
        (name, kind, what, value)
        for name, figures in report.items()
        for kind in ("entropy", "auc", "cosine")
        for what, value in figures.get(kind, {}).items()
    ]
    print(tabulate(rows, headers=("model", "measure", "of", "mean"), floatfmt=".3f"))
    print(f"\n{measures[args.model[0][0]].sentences} sentences; pictures in {args.output}")
    return report


if __name__ == "__main__":
    run(main)
