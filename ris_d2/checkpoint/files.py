"""Weight files -> tensors, without running anything that a file names."""

import argparse
import hashlib
import os
import pickle
import re
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from ..io import load_pickle
from .script import is_script, read_script

__all__ = ["file_hash", "read_weights"]


def read_weights(path: str | os.PathLike) -> dict[str, Any]:
    """Read a weight file onto the CPU.

    ``.safetensors``; ``.pkl`` (detectron2's zoo, arrays become tensors); anything else is read as
    torch.save's format, whatever its extension (BEiT-3's ``.zip``), or as a TorchScript archive
    (OpenAI's CLIP), of which the tensors are taken and the code is left alone. Pickled objects are
    limited to tensors, plain containers, numpy values and argparse.Namespace.

    Returns:
        the file's content: tensors by name, or a dict that holds them beside other data.

    Raises:
        FileNotFoundError: no such file.
        ValueError: truncated, damaged, of another format, or the file holds other Python objects.
    """
    path = os.fspath(path)
    if not os.path.isfile(path):
        raise FileNotFoundError(f"{path}: no such weight file")
    if path.endswith(".safetensors"):
        content = _read_safetensors(path)
    elif path.endswith(".pkl"):
        content = _to_tensors(load_pickle(path))
    elif is_script(path):
        content = read_script(path)
    else:
        content = _read_torch(path)
    if not isinstance(content, Mapping):
        raise ValueError(f"{path}: holds a {type(content).__name__}, not weights by name")
    return dict(content)


def file_hash(path: str | os.PathLike) -> str:
    """Return the SHA-256 of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _read_safetensors(path: str) -> dict[str, torch.Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path}: truncated or damaged ({error}); get it again") from error


def _read_torch(path: str) -> Any:
    try:
        with torch.serialization.safe_globals(_PLAIN_GLOBALS):
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        forbidden = re.search(r"(?:GLOBAL|global|class) (\S+) was not an allowed", str(error))
        if forbidden:
            raise ValueError(
                f"{path}: holds Python objects ({forbidden[1]}), which are not run; if you trust "
                "the file, save its tensors alone: torch.save({'model': state_dict}, path)"
            ) from error
        raise _damaged(path, error) from error
    except (RuntimeError, EOFError, OSError, KeyError, ValueError) as error:
        raise _damaged(path, error) from error


def _damaged(path: str, error: Exception) -> ValueError:
    reason = (str(error).strip() or type(error).__name__).splitlines()[0]
    return ValueError(
        f"{path} ({os.path.getsize(path)} bytes): no readable torch file, truncated or of another "
        f"format ({reason})"
    )


def _to_tensors(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _to_tensors(item) for key, item in value.items()}
    return torch.from_numpy(np.array(value)) if isinstance(value, np.ndarray) else value


def _plain_globals() -> list:
    # numpy's callables are found by pickling, because they moved from numpy.core to numpy._core
    # between numpy 1 and 2, and files carry either name.
    scalar = np.float64(0).__reduce__()[0]
    reconstruct = np.zeros(1).__reduce__()[0]
    named = [
        (maker, f"numpy.{core}.multiarray.{name}")
        for core in ("core", "_core")
        for maker, name in ((scalar, "scalar"), (reconstruct, "_reconstruct"))
    ]
    kinds = [type(np.dtype(kind)) for kind in ("f2", "f4", "f8", "i4", "i8", "u1", "?")]
    return [argparse.Namespace, np.dtype, np.ndarray, *kinds, *named]


_PLAIN_GLOBALS = _plain_globals()
