"""Models as folders: config.yaml, model.safetensors, tokenizer/, README.md; and where one is found.

Such a folder works from any place and without a network, and holds nothing that could run.
"""

import functools
import logging
import os
import re
import shutil
from collections.abc import Mapping, Sequence
from typing import Any

from detectron2.config import CfgNode, get_cfg
from tabulate import tabulate
from torch import nn

from . import zoo
from .checkpoint.paths import local_path
from .config import load_config
from .data.tokenizer import Tokenizer
from .io import atomic_folder
from .yaml_files import read_yaml

logger = logging.getLogger(__name__)

_CONFIG, _WEIGHTS, _TOKENIZER, _CARD = "config.yaml", "model.safetensors", "tokenizer", "README.md"
_HUB_NAME = re.compile(r"(?:hf://)?([\w.-]+/[\w.-]+?)(?:@([\w./-]+))?")


def find_config(
    name: str | os.PathLike, options: Sequence[str] = (), *, modules: Sequence[str] = ()
) -> CfgNode:
    """The configuration of a trained model, with MODEL.WEIGHTS and the tokenizer's path filled in.

    Args:
        name: a model folder; else a name of the zoo (docs/weights.md); else
            ``organisation/repository`` or ``organisation/repository@revision`` of a model folder on
            the Hugging Face hub. The last two are downloaded unless they are there already; the log
            says so.
        options: KEY, VALUE, ... over the model's configuration.
        modules: see :func:`ris_d2.load_config`.

    Raises:
        FileNotFoundError: nothing of that name; a file is missing, and could not be downloaded. The
            message says where it comes from.
        ValueError: the folder's config.yaml is malformed, or names a file outside of the folder.
    """
    name = os.path.expanduser(os.fspath(name))
    model = None if os.path.isdir(name) else zoo.models().get(name)
    if model is not None and "recipe" in model:
        config_file = zoo.config_file(model["recipe"])
        options = [*(item for pair in model["set"].items() for item in pair), *options]
        find, weights = _published, model["weights"]
    else:
        folder = _folder(
            os.path.join(os.path.dirname(__file__), model["folder"]) if model else name
        )
        config_file = os.path.join(folder, _CONFIG)
        find, weights = functools.partial(_inside, folder), _WEIGHTS
    cfg = load_config(config_file, options, modules=modules)
    # The small files first: where one is missing, nothing large has been downloaded.
    for key, node in (
        ("INPUT.RIS.TOKENIZER.PATH", cfg.INPUT.RIS.TOKENIZER),
        ("MODEL.RIS.TEXT.CAUSAL_LM.PATH", cfg.MODEL.RIS.TEXT.CAUSAL_LM),
    ):
        if node.PATH and key not in options[::2]:
            node.PATH = find(node.PATH)
    if "MODEL.WEIGHTS" not in options[::2]:
        cfg.MODEL.WEIGHTS = find(weights)
    return cfg


def _folder(name: str) -> str:
    folder = os.path.abspath(name) if os.path.isdir(name) else _download_folder(name)
    for file in (_CONFIG, _WEIGHTS):
        if not os.path.isfile(os.path.join(folder, file)):
            raise FileNotFoundError(
                f"{folder}: no {file} in it; Predictor.save_pretrained writes model folders"
            )
    if "_BASE_" in read_yaml(os.path.join(folder, _CONFIG)):
        raise ValueError(f"{folder}: {_CONFIG} has a _BASE_, which may lie outside of the folder")
    return folder


def _inside(folder: str, path: str) -> str:
    """A file of the model folder. What lies elsewhere could be anything, even a download."""
    found = os.path.normpath(os.path.join(folder, path))
    if not found.startswith(folder + os.sep):
        raise ValueError(f"{folder}: {_CONFIG} names {path!r}, which is no path within the folder")
    if not os.path.exists(found):
        raise FileNotFoundError(f"{found}: missing from the model folder")
    return found


def _published(path: str) -> str:
    """A file of the zoo's: from pretrained/, or downloaded once."""
    near = os.path.join("pretrained", os.path.basename(path))
    if os.path.isfile(near):
        return os.path.abspath(near)
    url = path if "://" in path else zoo.known_files()[os.path.basename(path)]["url"]
    try:
        logger.warning("%s is not there; taking it from the cache, or from %s", near, url)
        return local_path(url)
    except Exception as error:  # many kinds: offline, no such repository, gated, disk full, ...
        raise FileNotFoundError(
            f"{near}: no such file, and {url} could not be had ({_first_line(error)}). To get it: "
            f"{zoo.how_to_get(path)}"
        ) from error


def _download_folder(name: str) -> str:
    match = _HUB_NAME.fullmatch(name)
    if not match:
        raise FileNotFoundError(
            f"{name}: no such model folder, no model of the zoo ({', '.join(zoo.models())}), and "
            "no name on the Hugging Face hub (organisation/repository)"
        )
    from huggingface_hub import snapshot_download

    repository, revision = match.groups()
    logger.warning("No folder %s here; taking it from the Hugging Face hub or its cache", name)
    wanted = [_CONFIG, _WEIGHTS, _CARD, f"{_TOKENIZER}/*"]
    try:
        return snapshot_download(repository, revision=revision, allow_patterns=wanted)
    except Exception as error:
        raise FileNotFoundError(
            f"{name}: no such model folder here, and the Hugging Face hub did not give it "
            f"({_first_line(error)}). Elsewhere: hf download {repository} --local-dir FOLDER"
        ) from error


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"


def save_model(
    folder: str | os.PathLike, cfg: CfgNode, model: nn.Module, tokenizer: Tokenizer, **card: Any
) -> None:
    """Write a model folder; see :meth:`ris_d2.predictor.Predictor.save_pretrained`."""
    from safetensors.torch import save_file

    ours = {_CONFIG, _WEIGHTS, _TOKENIZER, _CARD}
    if os.path.isdir(folder) and (other := set(os.listdir(folder)) - ours):
        raise ValueError(f"{folder} holds {min(other)!r}, which is of no model folder")
    if cfg.MODEL.RIS.TEXT.CAUSAL_LM.PATH:
        raise ValueError("a model whose words go through MODEL.RIS.TEXT.CAUSAL_LM cannot be saved")
    cfg = cfg.clone()
    cfg.defrost()
    cfg.MODEL.WEIGHTS = _WEIGHTS
    cfg.INPUT.RIS.TOKENIZER.PATH = f"{_TOKENIZER}/{tokenizer.file.name}"
    # Where these lay on this machine is of no use elsewhere.
    cfg.MODEL.INIT = [[s, p if "://" in p else os.path.basename(p)] for s, p in cfg.MODEL.INIT]
    cfg.DATASETS.RIS_JSON = []
    stock = get_cfg()
    cfg.MODEL.DEVICE, cfg.OUTPUT_DIR = stock.MODEL.DEVICE, stock.OUTPUT_DIR
    used = {part.upper() for kind in type(model).__mro__ for part in kind.__module__.split(".")}
    for method in {"ASDA", "DERIS", "RISAM", "SHARED_RIS", "VIPA"} - used:
        del cfg.MODEL[method]
    text = _card(cfg, model, **card)
    with atomic_folder(folder) as temporary:
        with open(os.path.join(temporary, _CONFIG), "w", encoding="utf-8") as file:
            file.write(CfgNode(_own_and_changed(cfg, stock)).dump())
        # A copy of each: tied weights share memory, which the format refuses.
        tensors = {k: v.cpu().clone().contiguous() for k, v in model.state_dict().items()}
        save_file(tensors, os.path.join(temporary, _WEIGHTS), metadata={"format": "pt"})
        shutil.copymode(os.path.join(temporary, _CONFIG), os.path.join(temporary, _WEIGHTS))
        tokenizer.save(os.path.join(temporary, _TOKENIZER))
        with open(os.path.join(temporary, _CARD), "w", encoding="utf-8") as file:
            file.write(text)


def _own_and_changed(cfg: CfgNode, stock: CfgNode) -> dict[str, Any]:
    """All keys of ris_d2, for their defaults may change; of detectron2's, those that differ."""
    kept = {}
    for key, value in cfg.items():
        if isinstance(value, CfgNode):
            value = _own_and_changed(value, stock.get(key, CfgNode()))
            if value or key not in stock:
                kept[key] = value
        elif key not in stock or value != stock[key]:
            kept[key] = value
    return kept


def _card(
    cfg: CfgNode,
    model: nn.Module,
    *,
    title: str,
    metrics: Mapping[str, Mapping[str, float | None]],
    licence: str,
    notes: str,
) -> str:
    known = zoo.known_files()
    sources = [os.path.basename(path) for _, path in cfg.MODEL.INIT]
    sources = [f"{s} ({known[s]['licence']})" if s in known else s for s in sources]
    numbers = [{"": dataset, **values} for dataset, values in metrics.items()]
    with open(os.path.join(os.path.dirname(__file__), "model_card.md"), encoding="utf-8") as file:
        return file.read().format(
            cfg=cfg,
            title=title or f"{cfg.MODEL.META_ARCHITECTURE}, referring image segmentation",
            notes=notes,
            parameters=sum(p.numel() for p in model.parameters()) / 1e6,
            trained_on=", ".join(cfg.DATASETS.TRAIN) or "not stated",
            sources=", ".join(sources) or "not stated",
            licence=licence or "not stated",
            metrics=tabulate(numbers, "keys", "github", floatfmt=".2f", missingval="n/a")
            or "None were given.",
        )
