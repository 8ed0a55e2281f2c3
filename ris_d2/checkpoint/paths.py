"""Weights beyond local files: ``hf://`` and ``timm://``, beside detectron2's ``https://``."""

import os
import re
from typing import IO, Any

from detectron2.utils.file_io import PathHandler, PathManager

from ..zoo import how_to_get


class DownloadHandler(PathHandler):
    """Read-only paths that resolve to a file in huggingface_hub's cache.

    ``hf://organisation/repository[@revision]/path/in/repository``, and ``timm://model.tag``: the
    weights that timm names for a model.

    Raises:
        ValueError: the path does not name organisation, repository and file; timm has no weights
            under that name.
    """

    def _get_supported_prefixes(self) -> list[str]:
        return ["hf://", "timm://"]

    def _get_local_path(self, path: str, force: bool = False, **kwargs: Any) -> str:
        return (_from_hub if path.startswith("hf://") else _from_timm)(path, force)

    def _open(self, path: str, mode: str = "r", **kwargs: Any) -> IO:
        if "r" not in mode:
            raise ValueError(f"{path} can only be read")
        return open(self._get_local_path(path), mode)


def _from_hub(path: str, force: bool) -> str:
    from huggingface_hub import hf_hub_download

    match = re.fullmatch(r"hf://([^/]+/[^/@]+)(?:@([^/]*))?/(.+)", path)
    if not match:
        raise ValueError(f"{path}: expected hf://organisation/repository[@revision]/file")
    repository, revision, filename = match.groups()
    return hf_hub_download(
        repo_id=repository, filename=filename, revision=revision or None, force_download=force
    )


def _from_timm(path: str, force: bool) -> str:
    from timm.models import get_pretrained_cfg

    name = path.removeprefix("timm://")
    try:
        weights = get_pretrained_cfg(name)
    except RuntimeError as error:  # a known model with an unknown tag
        raise ValueError(f"{path}: {error}") from error
    if weights is not None and weights.hf_hub_id:
        filename = weights.hf_hub_filename or "model.safetensors"
        return _from_hub(f"hf://{weights.hf_hub_id}/{filename}", force)
    if weights is not None and weights.url:
        return PathManager.get_local_path(weights.url, force=force)
    raise ValueError(f"{path}: timm knows no weights named {name!r} (see timm.list_pretrained())")


def register_path_handlers() -> None:
    """Teach detectron2's PathManager ``hf://`` and ``timm://``; calling it again is harmless."""
    PathManager.register_handler(DownloadHandler(), allow_override=True)


def local_path(path: str) -> str:
    """Return the local file behind ``path``: a file, or a URL of any prefix (downloaded once).

    Raises:
        FileNotFoundError: there is no such file.
    """
    resolved = os.path.expanduser(PathManager.get_local_path(path))
    if not os.path.isfile(resolved):
        how = f"; to get it: {command}" if (command := how_to_get(path)) else ""
        raise FileNotFoundError(f"{path}: no such weight file{how}")
    return resolved
