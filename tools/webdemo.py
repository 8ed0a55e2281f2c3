#!/usr/bin/env python
"""A page in the browser: a picture, sentences, and the masks of what they refer to.

    python tools/webdemo.py
    python tools/webdemo.py --model my_model --port 8000 MODEL.DEVICE cuda

It needs gradio (pip install -e '.[web]') and a browser, but no network: nothing is fetched, sent or
shared. The default is the small model that comes with ris_d2 and knows RefShapes alone. --host
0.0.0.0 lets other machines in: anyone who reaches the port may use the model.
"""

import argparse
import html
import importlib.util
import json
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from _program import Parser, fail, run


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(__doc__)
    parser.add_model()
    parser.add_argument("--host", default="127.0.0.1", help="who may come (default: this machine)")
    parser.add_argument("--port", type=int, default=7860)
    parser.add_changes()
    return parser.parse_args(arguments)


if __name__ == "__main__":
    parse()  # --help and mistakes are answered before the imports below, which take seconds

import numpy as np

from _pictures import SENTENCE_COLORS, enlarge, overlay_all
from ris_d2 import example
from ris_d2.io import atomic_write
from ris_d2.predictor import Predictor, Results, Session, load_rgb
from ris_d2.visualization import write_png

# Photographs that come with packages, where these are installed: package, file, sentences.
PHOTOGRAPHS = (
    ("gradio", "media_assets/images/lion.jpg", "the lion in front\nthe lioness behind"),
    ("gradio", "media_assets/images/cheetah.jpg", "the running cheetah"),
    ("matplotlib", "mpl-data/sample_data/grace_hopper.jpg", "the woman\nher cap"),
    ("skimage", "data/coffee.png", "the spoon\nthe cup"),
    ("sklearn", "datasets/images/flower.jpg", "the flower"),
)
SMALL_MODEL = (
    "This small model comes with ris_d2 and knows drawings of coloured shapes (RefShapes) alone: "
    "**on a photograph its masks are wrong, however sure they look.**\n\n"
)
LAUNCH = {"share": False, "quiet": True, "prevent_thread_lock": True, "footer_links": []}
LAUNCH |= {"max_file_size": "50mb", "ssr_mode": False}  # ssr_mode would start Node
SQUARE = '<span style="display:inline-block;width:1em;height:1em;border:1px solid gray;background:{}"></span>'


@dataclass(eq=False)
class Shown:
    """What a visitor looks at: a picture, encoded once, and the last answers about it."""

    path: str
    image: np.ndarray
    session: Session
    results: Results


def show(
    predictor: Predictor, shown: Shown | None, path: str | None, text: str, *thresholds: float
) -> tuple[Shown | None, np.ndarray | None, str]:
    """Answer the lines of ``text`` about the picture at ``path``.

    Args:
        shown: what this returned last to the visitor; the picture is encoded if it is another one.
        thresholds: in the order of ``predictor.model.thresholds``.

    Returns:
        (what is shown now, the painted picture, a legend in HTML).
    """
    if not path:
        return None, None, "Choose a picture."
    try:
        if shown is None or shown.path != path:
            image = load_rgb(path)
            shown = Shown(path, image, predictor.set_image(image), Results())
        sentences = [line.strip() for line in text.splitlines() if line.strip()]
        settings = dict(zip(predictor.model.thresholds, thresholds))
        shown.results = shown.session(sentences, **settings) if sentences else Results()
    except ValueError as error:
        message = str(error).replace(path, os.path.basename(path))  # visitors see no folders
        return shown, None, f"<p>{html.escape(message)}</p>"
    masks = [result["mask"].numpy() for result in shown.results]
    painted = overlay_all(*enlarge(shown.image, masks, width=640))
    return shown, painted, legend(predictor, shown.results)


def legend(predictor: Predictor, results: Results) -> str:
    """A line per sentence: its colour, score and area, or that nothing matches; words that are
    unknown."""
    lines = []
    for i, result in enumerate(results):
        said = f"<b>{html.escape(result['text'])}</b>"
        area = f", {100 * result['mask'].float().mean():.1f} % of the picture"
        color = "rgb{}".format(SENTENCE_COLORS[i % len(SENTENCE_COLORS)])
        if result["no_target"]:
            color, area, said = "transparent", "", f"nothing in this picture matches: {said}"
        elif not result["box"]:
            color, area, said = "transparent", "", f"no pixel reaches the mask threshold: {said}"
        unknown, cut = predictor.mapper.tokenizer.unread([result["text"]])
        warnings = [f"too long: {sentence}" for sentence in cut]
        if unknown:
            names = ", ".join(map(repr, unknown))
            warnings.append(f"the model does not know {names}: do not trust this answer")
        warnings = "".join(f"<br>&#9888; {html.escape(warning)}" for warning in warnings)
        score = f"(score {result['score']:.2f}{area})"
        lines.append(f"<p>{SQUARE.format(color)} {said} {score}{warnings}</p>")
    return "".join(lines) or "Type a sentence."


def save(shown: Shown, folder: str) -> list[str]:
    """Write a mask per sentence, and COCO annotations of those that match, into a new folder in
    ``folder``; return the paths."""
    folder = tempfile.mkdtemp(dir=folder)
    paths = [os.path.join(folder, f"{i}_mask.png") for i in range(len(shown.results))]
    for path, result in zip(paths, shown.results):
        write_png(path, result["mask"].numpy())
    height, width = shown.image.shape[:2]
    name = os.path.basename(shown.path)
    coco = {
        "images": [{"id": 1, "file_name": name, "height": height, "width": width}],
        "annotations": shown.results.to_coco(image_id=1),
        "categories": [{"id": 1, "name": "referred"}],
    }
    paths.append(os.path.join(folder, "coco.json"))
    with atomic_write(paths[-1]) as file:
        json.dump(coco, file)
    return paths


def examples() -> list[list[str]]:
    """Pictures with sentences: RefShapes' scene, and the photographs that are on this machine."""
    text = "\n".join(example.SENTENCES)
    found = [[example.SCENE, text], [example.SCENE, "the circles\nthe green triangle"]]
    for package, file, sentences in PHOTOGRAPHS:
        spec = importlib.util.find_spec(package)
        path = Path(spec.origin).parent / file if spec and spec.origin else Path()
        if path.is_file():
            found.append([str(path), sentences])
    return found


def introduction(predictor: Predictor, model: str) -> str:
    """Markdown above the page; a small vocabulary is listed."""
    text = f"# ris_d2: {os.path.basename(os.path.normpath(model))}\n\nAn image and sentences in, one mask per sentence out.\n\n"
    if model == example.FOLDER:
        text += SMALL_MODEL
    tokenizer = predictor.mapper.tokenizer
    if tokenizer.vocab_size <= 1000:
        tokens = tokenizer.tokens(range(tokenizer.vocab_size))
        words = sorted(token for token in tokens if not token.startswith("<"))
        summary = f"<summary>It knows {len(words)} words</summary>"
        text += f"<details>{summary}{', '.join(words)}</details>"
    return text


def build(predictor: Predictor, model: str, folder: str) -> Any:
    """The page, a ``gradio.Blocks``; files to download are written into ``folder``."""
    gr = import_gradio()
    first, text = examples()[0]
    # Uploads and painted pictures are deleted after an hour, encoded pictures as well.
    with gr.Blocks(title="ris_d2", analytics_enabled=False, delete_cache=(600, 3600)) as page:
        gr.Markdown(introduction(predictor, model))
        shown = gr.State(time_to_live=3600)
        with gr.Row():
            with gr.Column():
                # No mode: the file is passed on as it is, and load_rgb turns it upright.
                settings = {"type": "filepath", "image_mode": None, "height": 320}
                image = gr.Image(first, label="picture", **settings)
                sentences = gr.Textbox(text, lines=3, label="sentences, one per line")
                sliders = [
                    (
                        gr.Slider(0, 1, value, step=0.01, label=name)
                        if name != "min_area"
                        else gr.Number(value, label=name, minimum=0)
                    )
                    for name, value in predictor.model.thresholds.items()
                ]
            with gr.Column():
                buttons = ["download", "fullscreen"]
                painted = gr.Image(label="masks", format="png", interactive=False, buttons=buttons)
                said = gr.HTML()
                button = gr.Button("Files of these masks (PNG, COCO json)")
                files = gr.Files(label="files", visible=False, interactive=False)
        gr.Examples(examples(), [image, sentences])
        inputs = [image, sentences, *sliders]
        gr.on(
            [page.load, *(component.change for component in inputs)],
            lambda *given: (*show(predictor, *given), gr.Files(visible=False)),
            [shown, *inputs],
            [shown, painted, said, files],
            api_name="show",
            show_progress="hidden",
            trigger_mode="always_last",  # while a sentence is typed, only its last form matters
        )
        button.click(
            lambda shown: gr.Files(shown and save(shown, folder), visible=bool(shown)),
            shown,
            files,
            api_name="save",
        )
    return page


def import_gradio() -> Any:
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read while it is imported
    try:
        import gradio
    except ImportError as error:
        fail(f"the page needs gradio (pip install -e '.[web]'): {error}")
    return gradio


def main(arguments: list[str] | None = None) -> None:
    """Parse ``arguments`` (default: the command line), load the model, serve until interrupted."""
    args = parse(arguments)
    import_gradio()  # before a model that may be large is loaded
    model = args.model or example.FOLDER
    predictor = Predictor.from_pretrained(model, args.opts, modules=args.modules)
    with tempfile.TemporaryDirectory() as folder:
        page = build(predictor, model, folder)
        try:
            _, url, _ = page.launch(server_name=args.host, server_port=args.port, **LAUNCH)
        except OSError as error:
            raise OSError(f"--host {args.host} --port {args.port}: {error}") from error
        print(f"The page is at {url} (Ctrl+C ends it)", flush=True)
        page.block_thread()


if __name__ == "__main__":
    run(main)
