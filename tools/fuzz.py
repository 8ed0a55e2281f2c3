#!/usr/bin/env python
"""Feed damaged and hostile files to every reader of ris_d2 and count what becomes of them.

    python tools/fuzz.py [--reader NAME ...] [--cases N] [--seed S]
    python tools/fuzz.py --reader NAME --seed S --case I     # one case again, with its traceback

Each case changes one file of a small, valid set: bits, bytes and lengths of it, or, where it has a
structure, fields of other types, huge and negative numbers, NaN, deep nesting, things that are
there twice or not at all, written as a valid file again (archives with right checksums). It depends
on reader, seed and number alone. What may become of it:

    read      a result, and nothing of the file is missing in it that is not counted as skipped
    refused   ValueError or FileNotFoundError whose message names the file

and what may not: ``unnamed`` (the message does not name it), ``exception`` (any other), ``dropped``
(missing and not counted, or other content than the file's), ``ran`` (something that the file names
was run), ``crash``, ``hang``. The cases run in a process of their own, with a limit of its memory.
The exit status is 1 if any case failed.
"""

import argparse
import copy
import io
import json
import logging
import math
import multiprocessing
import os
import pickle
import random
import resource
import runpy
import struct
import sys
import tempfile
import time
import traceback
import warnings
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

from _program import Parser, run


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = Parser(__doc__)
    parser.add_argument("--reader", nargs="+", metavar="NAME", help="default: all")
    parser.add_argument("--cases", type=int, default=1000, help="of each reader (1000)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=60, help="that one case may take (60)")
    parser.add_argument("--case", type=int, help="repeat this one case of one reader")
    args = parser.parse_args(arguments)
    if args.case is not None and len(args.reader or ()) != 1:
        parser.error("--case belongs to one --reader")
    return args


if __name__ == "__main__":
    parse()  # --help and mistakes are answered before the imports below, which take seconds

import cv2
import numpy as np
import torch
import yaml
from _errors import read_per_expression
from detectron2.data import DatasetCatalog
from PIL import Image

from ris_d2 import load_config, refshapes
from ris_d2.checkpoint import RISCheckpointer, convert_state_dict, read_weights
from ris_d2.checkpoint.converters import CONVERTERS
from ris_d2.data.classes import load_class_list
from ris_d2.data.grefer import load_grefer
from ris_d2.data.images import read_image
from ris_d2.data.phrasecut import load_phrasecut
from ris_d2.data.records import Skipped, forget_files
from ris_d2.data.refclef import load_refclef
from ris_d2.data.refer import load_refer
from ris_d2.data.refzom import load_refzom
from ris_d2.data.ris_json import load_ris_json
from ris_d2.data.tokenizer import Tokenizer
from ris_d2.engine.history import read_history
from ris_d2.evaluation import score_predictions
from ris_d2.io import load_json, load_pickle, reading
from ris_d2.masks import encode, rasterize

TOOLS = os.path.dirname(os.path.abspath(__file__))
MEMORY = 3 * 2**30  # bytes, beyond what the worker has at its start
STARTING_SECONDS = 120
FAILURES = ("unnamed", "exception", "dropped", "ran", "crash", "hang")
OUTCOMES = ("read", "refused", *FAILURES)
SHOWN = 3  # failures of each reader

Rng = random.Random
Dump = Callable[[Any], bytes]


class Dropped(Exception):
    """Something of the file is neither in the result nor counted as skipped."""


class Ran:
    """Where a format can hold objects: one that makes a folder when it is run."""

    def __reduce__(self) -> tuple:
        return os.mkdir, ("was_run",)

    def __deepcopy__(self, memo: dict) -> "Ran":
        return self  # copying would run it here


# ---------------------------------------------------------------------------------------------------
# Mutations


def flip_bytes(rng: Rng, data: bytes) -> bytes:
    """Change bytes, lengths and order of ``data``, a few times."""
    data = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 3, 8))):
        place = rng.randrange(len(data) + 1)
        end = min(len(data), place + rng.choice((1, 2, 4, 8, 64, 1024)))
        kind = rng.randrange(8)
        if kind == 0 and place < len(data):
            data[place] ^= 1 << rng.randrange(8)
        elif kind == 1 and place < len(data):
            data[place] = rng.randrange(256)
        elif kind == 2:
            number = rng.choice((0, -1, 1, 2**31 - 1, -(2**31), 2**62, 2**16))
            data[place:end] = (number % 2**64).to_bytes(8, rng.choice(("little", "big")))[
                : max(end - place, 1)
            ]
        elif kind == 3:
            del data[place:end]
        elif kind == 4:
            data[place:place] = rng.randbytes(end - place)
        elif kind == 5:
            data[place:place] = data[place:end]
        elif kind == 6:
            data[place:end] = bytes(end - place)
        elif kind == 7 and rng.random() < 0.3:
            del data[place:]
    return bytes(data)


# Written into text formats as what JSON's and YAML's writers cannot produce.
_TEXTUAL = {"@deep@": "[" * 20_000 + "]" * 20_000, "@digits@": "9" * 5_000, "@open@": "[{" * 5_000}


def _deep(depth: int) -> list:
    value: list = []
    for _ in range(depth):
        value = [value]
    return value


_RLE = {"size": [96, 96], "counts": [2**62] * 4 + [9216]}
NONSENSE = [
    *(None, True, False, 0, 1, -1, 2**31, 2**63 - 1, 2**63, 2**64, -(2**70), 10**400),
    *(0.5, -0.0, 1e308, 1e10, math.nan, math.inf, -math.inf),
    *("", " ", *"?x1~%", "true", "nan", "../x", "x" * 5000, "\x00", "\ud800", "é\u202e"),
    *("- :", "&a [*a, *a]", "_BASE_: leaf.yaml", "!!python/object/apply:os.mkdir [was_run]"),
    *([], {}, [[]], [{}], [None], [0], {"id": {}}, _deep(3), _deep(150), Ran(), *_TEXTUAL),
    *(_RLE, {"size": [2**31, 2**31], "counts": "0"}, _RLE["counts"], [-1, 2401]),
    *([1e8] * 6, [math.nan] * 6, [0] * 6, ["0"] * 6),
]


def change_content(rng: Rng, content: Any) -> Any:
    """Change some places of nested dicts and lists; ``content`` stays as it is."""
    root = [copy.deepcopy(content)]
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        places = list(_places(root))
        container, key = rng.choice(places)
        kind = rng.randrange(8)
        if kind <= 2:
            container[key] = copy.deepcopy(rng.choice(NONSENSE))
        elif kind == 3:
            container[key] = _tweak(rng, container[key])
        elif kind == 4 and container is not root:
            del container[key]
        elif kind == 5:
            again = copy.deepcopy(container[key])
            if isinstance(container, list) and container is not root:
                container.insert(key, again)
            elif isinstance(container, dict):
                container[rng.choice((f"{key}2", 0, None, "id", "model"))] = again
        elif kind == 6:
            other, place = rng.choice(places)
            if other is not root and container is not root:
                try:
                    container[key], other[place] = other[place], container[key]
                except (KeyError, IndexError):
                    pass  # what an earlier change has removed
        elif rng.random() < 0.5:
            container[key] = [container[key]]
        elif container is not root:
            container[key] = root[0]  # contains itself; most formats cannot say that
    return root[0]


def _places(root: list) -> Iterator[tuple[Any, Any]]:
    """(container, key) of every value."""
    seen, containers = set(), [root]
    while containers:
        container = containers.pop()
        if id(container) in seen:
            continue
        seen.add(id(container))
        for key, value in (
            container.items() if isinstance(container, dict) else enumerate(container)
        ):
            yield container, key
            if isinstance(value, dict | list):
                containers.append(value)


def _tweak(rng: Rng, value: Any) -> Any:
    """A value near ``value``, mostly of the same type."""
    if isinstance(value, bytes):
        return flip_bytes(rng, value)
    if isinstance(value, str):
        cut = rng.randrange(len(value) + 1)
        return rng.choice((value[:cut], value + "0", value[:cut] + "\n" + value[cut:], value * 50))
    if isinstance(value, bool) or value is None:
        return not value
    if isinstance(value, int | float):
        return rng.choice((value + 1, value - 1, -value, value * 1000, value / 7, str(value)))
    if isinstance(value, torch.Tensor):
        return rng.choice(
            (
                value[:1],
                value.double(),
                value * math.nan,
                value.T,
                value.to(torch.int8),
                value[None],
            )
        )
    if isinstance(value, list):
        return rng.choice((value[1:], value * 3, value[::-1], dict(enumerate(value))))
    return list(value) if isinstance(value, dict) else repr(value)


# ---------------------------------------------------------------------------------------------------
# Formats: what a valid file is made of, and how it is written


@dataclass(frozen=True)
class File:
    """A valid file, and the structures that can be changed in it with the way to write each."""

    data: bytes
    views: tuple[tuple[Any, Dump], ...] = ()

    def mutated(self, rng: Rng) -> bytes:
        if self.views and rng.random() < 0.7:
            content, dump = rng.choice(self.views)
            for _ in range(5):
                try:
                    return dump(change_content(rng, content))
                except Exception:
                    continue  # this format cannot say that
        return flip_bytes(rng, self.data)


def made(content: Any, dump: Dump, *views: tuple[Any, Dump]) -> File:
    return File(dump(content), ((content, dump), *views))


def dump_json(content: Any) -> bytes:
    return _with_textual(json.dumps(content), '"')


def dump_json_lines(content: Any) -> bytes:
    return b"\n".join(map(dump_json, content))


def dump_yaml(content: Any) -> bytes:
    return _with_textual(yaml.safe_dump(content), "'")


def dump_lines(content: Any) -> bytes:
    return _with_textual("\n".join(map(str, content)), "")


def _with_textual(text: str, quote: str) -> bytes:
    for mark, written in _TEXTUAL.items():
        text = text.replace(f"{quote}{mark}{quote}", written)
    return text.encode("utf-8", "surrogatepass")


def dump_archive(entries: dict[str, bytes]) -> bytes:
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w") as archive:
        for name, value in entries.items():
            archive.writestr(name, value)
    return data.getvalue()


def dump_torch(content: Any, old: bool = False) -> bytes:
    data = io.BytesIO()
    torch.save(content, data, _use_new_zipfile_serialization=not old)
    return data.getvalue()


def dump_safetensors(content: list) -> bytes:
    header, tensors = content
    text = dump_json(header)
    return struct.pack("<Q", len(text)) + text + tensors


def dump_png(chunks: Any) -> bytes:
    written = [
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in chunks
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(written)


def _entries(data: bytes) -> dict[str, bytes]:
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def _png_chunks(data: bytes) -> list:
    chunks, place = [], 8
    while place < len(data):
        (length,) = struct.unpack_from(">I", data, place)
        chunks.append([data[place + 4 : place + 8], data[place + 8 : place + 8 + length]])
        place += 12 + length
    return chunks


# ---------------------------------------------------------------------------------------------------
# Readers


@dataclass(frozen=True)
class Reader:
    """One way to read files.

    Attributes:
        files: () -> {name: valid file}; all of them lie in the working directory.
        read: name of the file that was changed -> anything, once it is checked to be complete.
    """

    files: Callable[[], dict[str, File]]
    read: Callable[[str], Any]


def here(name: str) -> str:
    return os.path.join(os.getcwd(), name)


def _scenes() -> list[refshapes.Scene]:
    return refshapes.generate("train", 3) + refshapes.generate("val", 1)


def _instances() -> dict:
    """All ways to write a mask: polygons, run lengths as numbers and as text."""
    content = refshapes.instances(_scenes())
    first, second = content["annotations"][:2]
    first["segmentation"] = _rle(first)
    second["segmentation"] = _numbers(_rle(second))
    second["iscrowd"] = 1
    return content


def _rle(annotation: dict) -> dict:
    return encode(rasterize(annotation["segmentation"], 96, 96))


def _numbers(rle: dict) -> dict:
    pixels = rasterize(rle, *rle["size"]).T.ravel()
    edges = np.flatnonzero(np.diff(pixels, prepend=False, append=~pixels[-1]))
    return {**rle, "counts": np.diff(edges, prepend=0).tolist()}


def _refs_pickle(content: list) -> File:
    return made(content, partial(pickle.dumps, protocol=2), (content, pickle.dumps))


def refcoco_files() -> dict[str, File]:
    refs = refshapes.references(_scenes(), generalized=False)
    return {"refs(unc).p": _refs_pickle(refs), "instances.json": made(_instances(), dump_json)}


def grefcoco_files() -> dict[str, File]:
    refs = refshapes.references(_scenes(), generalized=True)
    return {
        "grefs(unc).json": made(refs, dump_json),
        "instances.json": made(_instances(), dump_json),
    }


def refzom_files() -> dict[str, File]:
    refs = [
        {**ref, "source": "zero" if ref["no_target"] else "one"}
        for ref in refshapes.references(_scenes(), generalized=True)
    ]
    return {"refs(final).p": _refs_pickle(refs), "instances.json": made(_instances(), dump_json)}


def refclef_files() -> dict[str, File]:
    instances = _instances()
    names = {}
    for annotation in instances["annotations"]:
        names[annotation["id"]] = f"{annotation['image_id']}_{annotation['id'] % 10}"
        if isinstance(annotation["segmentation"], list):
            annotation["segmentation"] = _rle(annotation)
        annotation.update(id=names[annotation["id"]], segmentation=[annotation["segmentation"]])
        del annotation["iscrowd"]
    refs = refshapes.references(_scenes(), generalized=False)
    refs = [{**ref, "ann_id": names[ref["ann_id"]]} for ref in refs]
    return {"refs(unc).p": _refs_pickle(refs), "instances.json": made(instances, dump_json)}


def phrasecut_files() -> dict[str, File]:
    square, point = [[10, 10], [20, 10], [20, 20.5]], [[1, 1]]
    tasks = [
        {
            "task_id": f"{image}__{number}",
            "image_id": image,
            "ann_ids": [number],
            "phrase": "striped cup",
            "instance_boxes": [[10, 10, 10, 10]] * number,
            "Polygons": [[square, point]] * number,
        }
        for image in (1, 2)
        for number in (1, 2)
    ]
    images = [{"image_id": i, "height": 40, "width": 60, "split": "val"} for i in (1, 2, 3)]
    return {"refer_val.json": made(tasks, dump_json), "images.json": made(images, dump_json)}


def ris_json_files() -> dict[str, File]:
    refs = refshapes.references(_scenes(), generalized=True)
    expressions = [
        {
            "id": sentence["sent_id"],
            "image_id": ref["image_id"],
            "text": sentence["raw"],
            "annotation_ids": [] if ref["no_target"] else ref["ann_id"],
            "ref_id": ref["ref_id"],
        }
        for ref in refs
        for sentence in ref["sentences"]
    ]
    return {"own.json": made({**_instances(), "expressions": expressions}, dump_json)}


def read_refs(load: Callable, refs: str, total: Callable[[Any], int], name: str) -> None:
    """Read a published format; what is not in the records must be counted as skipped."""
    forget_files()
    skipped = Skipped()
    records = load(here(refs), skipped)
    content = (load_pickle if refs.endswith(".p") else load_json)(here(refs))
    used = sum(len(record["expressions"]) for record in records)
    counted = sum(count for _, _, count in skipped.expressions)
    if used + counted != total(content):
        raise Dropped(f"{total(content)} expressions, {used} used, {counted} counted: {skipped}")
    _draw(records)


def _draw(records: Sequence[dict]) -> None:
    """What a reader lets pass can be drawn, or training would end at it."""
    for record in records:
        ids = {annotation["id"] for annotation in record["annotations"]}
        for expression in record["expressions"]:
            if not ids.issuperset(expression["annotation_ids"]):
                raise Dropped(f"{expression} names annotations that are not there")
        for annotation in record["annotations"]:
            rasterize(annotation["segmentation"], record["height"], record["width"])


def _sentences(refs: list) -> int:
    # Null or 0 for a list is a ref without sentences, and counted as such.
    return sum(len(ref["sentences"] or ()) for ref in refs if ref["split"] == "train")


def _refs_reader(load: Callable, files: Callable, refs: str) -> Reader:
    def loaded(path: str, skipped: Skipped) -> list[dict]:
        return load(path, here("instances.json"), "images", "train", source="s", skipped=skipped)

    return Reader(files, partial(read_refs, loaded, refs, _sentences))


def _load_phrasecut(path: str, skipped: Skipped) -> list[dict]:
    return load_phrasecut(path, here("images.json"), "images", skipped=skipped)


def read_ris_json(name: str) -> None:
    records = load_ris_json(here(name), "images")
    used = sum(len(record["expressions"]) for record in records)
    if used != len(load_json(here(name))["expressions"]):
        raise Dropped(f"{used} expressions are used")
    _draw(records)


def mask_files() -> dict[str, File]:
    polygons = [[10, 10, 40, 10, 40.5, 30, 10, 30], [50, 20, 55, 20, 55, 39]]
    rle = encode(rasterize(polygons, 40, 60))
    return {
        "polygons.json": made(polygons, dump_json),
        "numbers.json": made(_numbers(rle), dump_json),
        "text.json": made(rle, dump_json),
    }


def read_mask(name: str) -> None:
    path = here(name)
    segmentation = load_json(path)
    with reading(path):
        mask = rasterize(segmentation, 40, 60)
    if mask.shape != (40, 60) or mask.dtype != bool:
        raise Dropped(f"a mask {mask.shape} of {mask.dtype}")
    if isinstance(segmentation, dict) and isinstance(segmentation["counts"], list):
        if mask.sum() != sum(segmentation["counts"][1::2]):
            raise Dropped(f"{mask.sum()} pixels")


def image_files() -> dict[str, File]:
    pixels = refshapes.render(_scenes()[0])[:48]
    image = Image.fromarray(pixels)
    files = {}
    for kind in ("jpg", "bmp", "gif", "tiff", "webp", "ppm"):
        data = io.BytesIO()
        image.save(data, {"jpg": "jpeg"}.get(kind, kind))
        files[f"image.{kind}"] = File(data.getvalue())
    cmyk = io.BytesIO()
    image.convert("CMYK").save(cmyk, "jpeg")
    files["cmyk.jpg"] = File(cmyk.getvalue())
    transparent = np.dstack([pixels, np.full(pixels.shape[:2], 100, np.uint8)])
    for name, array in (("rgba", transparent), ("grey", pixels[..., 0].astype(np.uint16) * 257)):
        data = cv2.imencode(".png", array)[1].tobytes()
        files[f"{name}.png"] = File(data, ((_png_chunks(data), dump_png),))
    return files


def read_one_image(name: str) -> None:
    image = read_image(here(name))
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or not image.size:
        raise Dropped(f"an image {image.shape} of {image.dtype}")


def _files_of(folder: str, names: Sequence[str]) -> dict[str, bytes]:
    found = {}
    for name in names:
        with open(os.path.join(folder, name), "rb") as file:
            found[name] = file.read()
    return found


def hf_files() -> dict[str, File]:
    with tempfile.TemporaryDirectory() as folder:
        refshapes.write_tokenizer(folder)
        found = _files_of(folder, ("tokenizer.json", "tokenizer_config.json"))
    return {name: made(json.loads(data), dump_json) for name, data in found.items()}


def bert_files() -> dict[str, File]:
    words = "[PAD] [unused0] [UNK] [CLS] [SEP] [MASK] the a red man left of on ##s sq ##uare"
    return {"vocab.txt": made(words.split(), dump_lines)}


def clip_files() -> dict[str, File]:
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    letters = [chr(b) for b in printable] + [chr(256 + i) for i in range(256 - len(printable))]
    merges = ["t h", "th e</w>", "r e", "re d</w>"]
    tokens = [*letters, *(c + "</w>" for c in letters), *(m.replace(" ", "") for m in merges)]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    return {
        "vocab.json": made({token: i for i, token in enumerate(tokens)}, dump_json),
        "merges.txt": made(["#version: 0.2", *merges], dump_lines),
    }


def spm_files() -> dict[str, File]:
    import sentencepiece

    with tempfile.TemporaryDirectory() as folder:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(["the red man on the left", "left square"] * 20),
            model_prefix=f"{folder}/tiny",
            vocab_size=30,
            hard_vocab_limit=False,
            minloglevel=2,
        )
        return {"tiny.spm": File(_files_of(folder, ["tiny.model"])["tiny.model"])}


def read_tokenizer(kind: str, name: str) -> None:
    path = here("tiny.spm" if kind == "beit3" else "")
    tokenizer = Tokenizer(kind=kind, path=path, max_tokens=10, clean=True)
    with reading(path):
        ids, mask = tokenizer(["the red man on the left", "zzz"])
    if ids.shape != (2, 10) or not mask.any() or ids.min() < 0:
        raise Dropped(f"ids {ids}")


def prediction_files() -> dict[str, File]:
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "own.json")
        with open(path, "wb") as file:
            file.write(ris_json_files()["own.json"].data)
        records = load_ris_json(path, "images")[:2]
    DatasetCatalog.register("fuzz", lambda: records)
    rle = encode(np.eye(96, dtype=bool))
    lines = [
        {
            "expression_id": expression["expression_id"],
            "image_id": record["image_id"],
            "file_name": record["file_name"],
            "segmentation": (rle, _numbers(rle))[number % 2],
            "no_target": False,
            "score": 0.5,
        }
        for record in records
        for number, expression in enumerate(record["expressions"])
    ]
    return {"predictions.jsonl": made(lines, dump_json_lines)}


def read_predictions(name: str) -> None:
    results = score_predictions("fuzz", here(name))
    if not all(map(math.isfinite, (results["referring"]["gIoU"], results["referring"]["cIoU"]))):
        raise Dropped(f"{results}")


def per_expression_files() -> dict[str, File]:
    line = {"gIoU": 0.5, "IoU": 0.5, "num_targets": 1, "no_target": False, "area_ratio": 0.1}
    lines = [{**line, "oracle_IoU": value} for value in (None, 0.7, 1.0)]
    return {"per_expression.jsonl": made(lines, dump_json_lines)}


def history_files() -> dict[str, File]:
    lines = [{"iteration": i, "total_loss": 1.0 / (i + 1), "eta_seconds": 3.5} for i in range(4)]
    return {"metrics.json": made(lines, dump_json_lines)}


def class_files() -> dict[str, File]:
    return {"classes.json": made({"seen": ["circle", "square"], "unseen": ["star"]}, dump_json)}


def _weights() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    model = _model()
    return {
        name: torch.rand(value.shape, generator=generator).to(value.dtype)
        for name, value in model.state_dict().items()
    }


def _model() -> torch.nn.Module:
    return torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4))


def _checkpoint() -> dict[str, Any]:
    states = {i: {"step": torch.tensor(3.0), "exp_avg": torch.ones(2)} for i in range(2)}
    return {
        "model": _weights(),
        "optimizer": {"state": states, "param_groups": [{"lr": 0.1, "params": [0, 1]}]},
        "args": argparse.Namespace(lr=0.1),
        "best": np.float64(3.5),
        "order": np.arange(4, dtype=">i2"),
        "iteration": 7,
    }


def pth_files() -> dict[str, File]:
    content = _checkpoint()
    return {"model.pth": made(content, dump_torch, (_entries(dump_torch(content)), dump_archive))}


def flipped_pth_files() -> dict[str, File]:
    return {"model.pth": File(dump_torch({"model": _weights(), "iteration": 7}))}


def old_pth_files() -> dict[str, File]:
    return {"model.pth": made(_checkpoint(), partial(dump_torch, old=True))}


def pkl_files() -> dict[str, File]:
    weights = {name: value.numpy() for name, value in _weights().items()}
    content = {"model": weights, "__author__": "Caffe2", "best": np.float32(1)}
    return {"model.pkl": made(content, partial(pickle.dumps, protocol=2), (content, pickle.dumps))}


def safetensors_files() -> dict[str, File]:
    from safetensors.torch import save

    data = save(_weights())
    (length,) = struct.unpack("<Q", data[:8])
    return {
        "model.safetensors": made(
            [json.loads(data[8 : 8 + length]), data[8 + length :]], dump_safetensors
        )
    }


def read_checkpoint(name: str) -> None:
    path = here(name)
    content = read_weights(path)
    for source in CONVERTERS:
        try:
            with reading(path):
                convert_state_dict(content, source)
        except ValueError:
            pass  # of none of these formats
    model = _model()
    RISCheckpointer(model).load(path)
    for value in model.state_dict().values():
        value.sum()


def read_flipped_pth(name: str) -> None:
    """Checksums tell whether any byte of the content has changed."""
    content = read_weights(here(name))
    same = all(torch.equal(content["model"][key], value) for key, value in _weights().items())
    if not same or content["iteration"] != 7:
        raise Dropped("other weights than those that were saved")


def config_files() -> dict[str, File]:
    base = {"MODEL": {"META_ARCHITECTURE": "SharedRIS", "DEVICE": "cpu"}, "VERSION": 2}
    leaf = {
        "_BASE_": "base.yaml",
        "INPUT": {"RIS": {"SIZE": [64, 64], "FLIP_PROB": 0.5, "VIEWS": [["a", 32, 32]]}},
        "SOLVER": {"BASE_LR": 0.001, "MAX_ITER": 10, "STEPS": [5, 8]},
        "DATASETS": {"TRAIN": ["ris_refcoco_unc_train"], "TEST": []},
    }
    return {
        name: made(content, dump_yaml, (dump_yaml(content).decode().split("\n"), dump_lines))
        for name, content in (("base.yaml", base), ("leaf.yaml", leaf))
    }


def study_files() -> dict[str, File]:
    content = {
        "title": "Words",
        "question": "Do words help?",
        "config": "leaf.yaml",
        "options": {"SOLVER.BASE_LR": 0.01},
        "cells": {"short": {"INPUT.RIS.MAX_TOKENS": 10}, "long": {"INPUT.RIS.MAX_TOKENS": 20}},
        "seeds": [1, 2],
        "refshapes": {"images": {"train": 2, "val": 2}, "size": 64},
        "datasets": {"val": "ris_grefcoco_unc_val"},
        "metrics": ["gIoU", "cIoU"],
        "groups": {"All": {"few": "short", "many": "long"}},
    }
    lines = dump_yaml(content).decode().split("\n")
    return {"study.yaml": made(content, dump_yaml, (lines, dump_lines)), **config_files()}


@cache
def _study_tool() -> dict[str, Any]:
    return runpy.run_path(os.path.join(TOOLS, "study.py"))


def read_study(name: str) -> None:
    tool = _study_tool()
    tool["load_runs"](tool["load_study"](here("study.yaml")), "unused")


READERS = {
    "refcoco": _refs_reader(load_refer, refcoco_files, "refs(unc).p"),
    "grefcoco": _refs_reader(load_grefer, grefcoco_files, "grefs(unc).json"),
    "refzom": _refs_reader(load_refzom, refzom_files, "refs(final).p"),
    "refclef": _refs_reader(load_refclef, refclef_files, "refs(unc).p"),
    "phrasecut": Reader(
        phrasecut_files, partial(read_refs, _load_phrasecut, "refer_val.json", len)
    ),
    "ris_json": Reader(ris_json_files, read_ris_json),
    "classes": Reader(class_files, lambda name: load_class_list(here(name))),
    "masks": Reader(mask_files, read_mask),
    "images": Reader(image_files, read_one_image),
    "tokenizer_hf": Reader(hf_files, partial(read_tokenizer, "hf")),
    "tokenizer_bert": Reader(bert_files, partial(read_tokenizer, "bert")),
    "tokenizer_clip": Reader(clip_files, partial(read_tokenizer, "clip")),
    "tokenizer_spm": Reader(spm_files, partial(read_tokenizer, "beit3")),
    "predictions": Reader(prediction_files, read_predictions),
    "per_expression": Reader(per_expression_files, lambda name: read_per_expression(here(name))),
    "history": Reader(history_files, lambda name: read_history(os.getcwd())),
    "pth": Reader(pth_files, read_checkpoint),
    "pth_flipped": Reader(flipped_pth_files, read_flipped_pth),
    "pth_old": Reader(old_pth_files, read_checkpoint),
    "pkl": Reader(pkl_files, read_checkpoint),
    "safetensors": Reader(safetensors_files, read_checkpoint),
    "config": Reader(config_files, lambda name: load_config(here("leaf.yaml"))),
    "study": Reader(study_files, read_study),
}


# ---------------------------------------------------------------------------------------------------
# Cases


class Bench:
    """The valid files of one reader in the working directory, and its cases on them."""

    def __init__(self, name: str, seed: int) -> None:
        self.name, self.seed, self.reader = name, seed, READERS[name]
        self.files = self.reader.files()
        for file_name, file in self.files.items():
            self._write(file_name, file.data)
        for file_name in self.files:
            self.reader.read(file_name)  # the valid files are read

    def damage(self, case: int) -> str:
        """Write the mutated file of a case and return its name."""
        rng = Rng(f"{self.seed} {self.name} {case}")
        file_name = rng.choice(list(self.files))
        self._write(file_name, self.files[file_name].mutated(rng))
        return file_name

    def run(self, case: int) -> tuple[str, str]:
        """Return outcome and message of a case, and mend its file."""
        file_name = self.damage(case)
        try:
            outcome, message = self._outcome(file_name)
        finally:
            self._write(file_name, self.files[file_name].data)
        if os.path.exists("was_run"):
            os.rmdir("was_run")
            return "ran", message
        return outcome, f"{file_name}: {message}"

    def _outcome(self, file_name: str) -> tuple[str, str]:
        try:
            self.reader.read(file_name)
        except (ValueError, FileNotFoundError) as error:
            named = os.getcwd() in str(error)
            return ("refused" if named else "unnamed"), f"{type(error).__name__}: {error}"
        except Dropped as error:
            return "dropped", str(error)
        except BaseException as error:  # a panic of a library in Rust is no Exception
            return "exception", f"{type(error).__name__}: {error}"
        return "read", ""

    @staticmethod
    def _write(name: str, data: bytes) -> None:
        with open(name, "wb") as file:
            file.write(data)


def _work(name: str, seed: int, cases: Sequence[int], folder: str, pipe: Any, other: Any) -> None:
    """In the worker: send None when ready, then (outcome, message) of each case."""
    other.close()  # so that sending fails, and this ends, when nobody receives any more
    os.chdir(folder)
    silence = os.open(os.devnull, os.O_WRONLY)
    for stream in (1, 2):
        os.dup2(silence, stream)
    logging.disable(logging.CRITICAL)
    torch.set_num_threads(1)
    bench = Bench(name, seed)
    pages = int(open("/proc/self/statm").read().split()[0])
    limit = pages * resource.getpagesize() + MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    pipe.send(None)
    for case in cases:
        outcome, message = bench.run(case)
        pipe.send((outcome, message[:500]))


def fuzz(name: str, cases: int, seed: int, seconds: float) -> list[tuple[str, str]]:
    """Run the first ``cases`` cases of a reader; (outcome, message) of each.

    Args:
        seconds: that one case may take.
    """
    context = multiprocessing.get_context("fork")
    results: list[tuple[str, str]] = []
    while len(results) < cases:
        receiver, sender = context.Pipe(duplex=False)
        with tempfile.TemporaryDirectory(prefix=f"fuzz_{name}_") as folder:
            todo = range(len(results), cases)
            worker = context.Process(
                target=_work, args=(name, seed, todo, folder, sender, receiver)
            )
            worker.start()
            sender.close()
            ready = False
            try:
                while len(results) < cases:
                    if not receiver.poll(seconds if ready else STARTING_SECONDS):
                        results.append(("hang", f"more than {seconds:g} s"))
                        break
                    result = receiver.recv()
                    if ready:
                        results.append(result)
                    ready = True
            except EOFError:
                worker.join()
                if not ready:
                    raise RuntimeError(f"{name}: the valid files are not read") from None
                results.append(("crash", f"exit status {worker.exitcode}"))
            finally:
                worker.kill()
                worker.join()
                receiver.close()
    return results


def repeat(name: str, seed: int, case: int) -> None:
    """Run one case in this process, keep its files and show what is raised."""
    folder = tempfile.mkdtemp(prefix=f"fuzz_{name}_{case}_")
    os.chdir(folder)
    bench = Bench(name, seed)
    file_name = bench.damage(case)
    print(f"{folder}: {file_name} is changed")
    try:
        bench.reader.read(file_name)
    except BaseException:
        traceback.print_exc()


def main(arguments: Sequence[str] | None = None) -> int:
    args = parse(arguments)
    unknown = [name for name in args.reader or () if name not in READERS]
    if unknown:
        raise ValueError(f"--reader {unknown[0]}: not one of {', '.join(READERS)}")
    if args.case is not None:
        repeat(args.reader[0], args.seed, args.case)
        return 0
    failures = []
    print(_row("reader", *OUTCOMES, "seconds"), flush=True)
    for name in args.reader or READERS:
        begin = time.perf_counter()
        results = fuzz(name, args.cases, args.seed, args.seconds)
        counts = Counter(outcome for outcome, _ in results)
        seconds = f"{time.perf_counter() - begin:.1f}"
        print(_row(name, *(counts[outcome] for outcome in OUTCOMES), seconds), flush=True)
        failed = [(case, *result) for case, result in enumerate(results) if result[0] in FAILURES]
        failures += [
            f"{outcome}: --reader {name} --seed {args.seed} --case {case}: {message}"
            for case, outcome, message in failed[:SHOWN]
        ]
    print(*failures, sep="\n", flush=True)
    return 1 if failures else 0


def _row(name: str, *cells: object) -> str:
    return f"{name:16}" + "".join(f"{cell:>10}" for cell in cells)


if __name__ == "__main__":
    sys.exit(run(main))
