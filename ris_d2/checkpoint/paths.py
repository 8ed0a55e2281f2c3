"""Weights beyond local files: ``hf://`` and ``timm://``, beside detectron2's ``https://``."""

import os
from typing import IO, Any

from detectron2.utils.file_io import PathHandler, PathManager

from ..zoo import how_to_get


class _DownloadHandler(PathHandler):
    """Read-only paths that resolve to a file in a library's own cache."""

    prefix: str

    def _get_supported_prefixes(self) -> list[str]:
        return [self.prefix]

    def _open(self, path: str, mode: str = "r", **kwargs: Any) -> IO:
        if "r" not in mode:
            raise ValueError(f"{path}: {self.prefix} paths can only be read")
        return open(self._get_local_path(path), mode)


class HuggingFaceHandler(_DownloadHandler):
    """``hf://org/repo[@revision]/path/in/repo``; needs huggingface_hub.

    Raises:
        ValueError: the path does not name organisation, repository and file.
    """

    prefix = "hf://"

    def _get_local_path(self, path: str, force: bool = False, **kwargs: Any) -> str:
        parts = path[len(self.prefix) :].split("/", 2)
        if len(parts) != 3 or not all(parts):
            raise ValueError(f"{path}: expected hf://organisation/repository[@revision]/file")
        organisation, repository, filename = parts
        repository, _, revision = repository.partition("@")

        from huggingface_hub import hf_hub_download

        return hf_hub_download(
            repo_id=f"{organisation}/{repository}",
            filename=filename,
            revision=revision or None,
            force_download=force,
        )


class TimmHandler(_DownloadHandler):
    """``timm://model.tag``: the weights that timm names for a model; needs timm.

    Raises:
        ValueError: timm has no weights under that name.
    """

    prefix = "timm://"

    def _get_local_path(self, path: str, force: bool = False, **kwargs: Any) -> str:
        from timm.models import get_pretrained_cfg

        name = path[len(self.prefix) :]
        try:
            weights = get_pretrained_cfg(name)
        except RuntimeError as error:  # a known model with an unknown tag
            raise ValueError(f"{path}: {error}") from error
        if weights is not None and weights.hf_hub_id:
            filename = weights.hf_hub_filename or "model.safetensors"
            return PathManager.get_local_path(f"hf://{weights.hf_hub_id}/{filename}", force=force)
        if weights is not None and weights.url:
            return PathManager.get_local_path(weights.url, force=force)
        raise ValueError(
            f"{path}: timm knows no weights named {name!r} (see timm.list_pretrained())"
        )


def register_path_handlers() -> None:
    """Teach detectron2's PathManager ``hf://`` and ``timm://``; calling it again is harmless."""
    for handler in (HuggingFaceHandler(), TimmHandler()):
        PathManager.register_handler(handler, allow_override=True)


def local_path(path: str) -> str:
    """Return the local file behind ``path``: a file, or a URL of any prefix (downloaded once).

    Raises:
        FileNotFoundError: there is no such file.
    """
    resolved = os.path.expanduser(PathManager.get_local_path(path))
    if not os.path.isfile(resolved):
        how = how_to_get(path)
        raise FileNotFoundError(
            f"{path}: no such weight file" + (f"; to get it: {how}" if how else "")
        )
    return resolved
