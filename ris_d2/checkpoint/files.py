"""Weight files -> tensors, without running anything that a file names."""

import argparse
import hashlib
import os
import re
import zipfile
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from ..io import load_pickle, numpy_globals, reading


def read_weights(path: str | os.PathLike) -> dict[str, Any]:
    """Read a weight file onto the CPU.

    ``.safetensors``; ``.pkl`` (detectron2's zoo, arrays become tensors); anything else is read as
    torch.save's format, whatever its extension (BEiT-3's ``.zip``). Pickled objects are limited to
    tensors, plain containers, numpy's numbers and argparse.Namespace. Archives are compared with
    their checksums; the other formats have none.

    Returns:
        the file's content: tensors by name, or a dict that holds them beside other data.

    Raises:
        FileNotFoundError: no such file.
        ValueError: truncated, damaged, of another format (TorchScript), the file holds other Python
            objects, or it announces more data than it has.
    """
    path = os.fspath(path)
    if not os.path.isfile(path):
        raise FileNotFoundError(f"{path}: no such weight file")
    with reading(path):
        if path.endswith(".safetensors"):
            from safetensors.torch import load_file

            content = load_file(path)
        elif path.endswith(".pkl"):
            content = _to_tensors(load_pickle(path), {})
        else:
            if zipfile.is_zipfile(path):
                _check_archive(path)
            content = _read_torch(path)
        if not isinstance(content, Mapping):
            raise ValueError(f"holds a {type(content).__name__}, not weights by name")
        _check_tensors(content, path)
        return dict(content)


def file_hash(path: str | os.PathLike) -> str:
    """Return the SHA-256 of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _check_archive(path: str) -> None:
    """Read all entries of an archive once, for their checksums, which torch does not look at."""
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
        if any(entry.filename.endswith("/constants.pkl") for entry in entries):
            raise ValueError(
                "a TorchScript archive is a program, not weights; for OpenAI's ViT-B-16.pt give "
                "hf://openai/clip-vit-base-patch16/pytorch_model.bin, the same weights"
            )
        announced, size = sum(entry.file_size for entry in entries), os.path.getsize(path)
        if announced > size:
            raise ValueError(f"its entries announce {announced} bytes; no weight file of {size}")
        if not any(entry.CRC for entry in entries):
            return  # saved without checksums, see torch.serialization.set_crc32_options
        if damaged := archive.testzip():
            raise ValueError(f"{path}: entry {damaged} is damaged (CRC-32); get the file again")


def _check_tensors(content: Mapping[str, Any], path: str) -> None:
    """Refuse tensors without memory of their own, and more of them than the file can fill."""
    announced, seen, values = 0, set(), [content]
    while values:
        value = values.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, Mapping):
            values.extend(value.values())
        elif isinstance(value, list | tuple | set):
            values.extend(value)
        elif isinstance(value, torch.Tensor):
            if value.layout != torch.strided or value.device.type != "cpu" or value.is_quantized:
                raise ValueError(
                    f"a {value.layout} tensor on {value.device}: weights are dense and on the CPU"
                )
            announced += value.nbytes
    # Tied weights are stored once, and buffers may be views of a single number.
    if announced > 4 * os.path.getsize(path) + 2**26:
        raise ValueError(
            f"its tensors announce {announced} bytes: damaged, or made to fill the memory"
        )


def is_whole(path: str | os.PathLike) -> bool:
    """Return whether torch.save's file is there, all of it, as its checksums say."""
    try:
        _check_archive(path)
        return True
    except (OSError, ValueError, zipfile.BadZipFile):
        return False


def _read_torch(path: str) -> Any:
    try:
        with torch.serialization.safe_globals(_PLAIN_GLOBALS):
            return torch.load(path, map_location="cpu", weights_only=True)
    except (MemoryError, OSError):
        raise
    except Exception as error:  # damaged bytes can make the unpickler raise nearly anything
        forbidden = re.search(r"(?:GLOBAL|global|class) (\S+) was not an allowed", str(error))
        if forbidden:
            raise ValueError(
                f"{path}: holds Python objects ({forbidden[1]}), which are not run; if you trust "
                "the file, save its tensors alone: torch.save({'model': state_dict}, path)"
            ) from error
        # Before that mark, torch advises to read the file without any protection.
        text = str(error).rpartition("WeightsUnpickler error:")[2].strip()
        reason = (text or type(error).__name__).splitlines()[0]
        raise ValueError(
            f"{path} ({os.path.getsize(path)} bytes): no readable torch file, truncated or of "
            f"another format ({reason})"
        ) from error


def _to_tensors(value: Any, done: dict[int, Any]) -> Any:
    # Each object once: a pickle may name the same dict again and again, at every depth.
    if id(value) not in done:
        if isinstance(value, Mapping):
            done[id(value)] = {key: _to_tensors(item, done) for key, item in value.items()}
        else:
            is_array = isinstance(value, np.ndarray)
            done[id(value)] = torch.from_numpy(np.array(value)) if is_array else value
    return done[id(value)]


_PLAIN_GLOBALS = [argparse.Namespace, *((maker, name) for name, maker in numpy_globals().items())]
