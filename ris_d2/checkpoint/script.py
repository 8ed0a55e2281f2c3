"""TorchScript archives -> tensors. Their code is neither compiled nor run."""

import pickle
import zipfile
from collections import OrderedDict
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..io import reading

__all__ = ["is_script", "read_script"]

# Far above any network's; a small archive can name one module inside another without end.
MAX_MODULES = 10_000

_DTYPES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}


def is_script(path: str) -> bool:
    """Whether an archive is one that torch.jit.save wrote."""
    with zipfile.ZipFile(path) as archive:
        return any(name.endswith("/constants.pkl") for name in archive.namelist())


def read_script(path: str) -> dict[str, Tensor]:
    """Return the parameters and buffers of a scripted or traced module by name, on the CPU.

    Raises:
        ValueError: the archive is damaged, or holds other objects than modules and plain values.
    """
    with reading(path):
        try:
            with zipfile.ZipFile(path) as archive:
                data = next(name for name in archive.namelist() if name.endswith("/data.pkl"))
                with archive.open(data) as file:
                    module = _Unpickler(file, archive, data[: -len(".pkl")]).load()
            return _tensors(module)
        except pickle.UnpicklingError as error:
            raise ValueError(f"{path}: {error}") from error
        except (StopIteration, KeyError, zipfile.BadZipFile, RuntimeError, EOFError) as error:
            raise ValueError(f"{path}: damaged TorchScript archive ({error})") from error


class _Object:
    """Stands for any class that the archive's code defines: its attributes, and nothing else."""

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.attributes = state


class _Unpickler(pickle.Unpickler):
    def __init__(self, file: Any, archive: zipfile.ZipFile, directory: str):
        super().__init__(file)
        self.archive, self.directory = archive, directory
        self.storages: dict[str, torch.UntypedStorage] = {}

    def find_class(self, module: str, name: str) -> Any:
        if module.startswith("__torch__"):
            return _Object
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return _rebuild_tensor
        if (module, name) == ("torch._utils", "_rebuild_parameter"):
            return lambda data, *_: nn.Parameter(data, requires_grad=False)
        if module == "torch.jit._pickle":  # typed lists, restore_type_tag: the value comes first
            return lambda value, *_: value
        if module == "torch" and name in _DTYPES:
            return _DTYPES[name]
        raise pickle.UnpicklingError(f"holds Python objects ({module}.{name}), which are not run")

    def persistent_load(self, pid: tuple) -> tuple[torch.dtype, torch.UntypedStorage]:
        _, dtype, key, _, _ = pid  # the device that it was saved from does not matter
        if key not in self.storages:
            content = bytearray(self.archive.read(f"{self.directory}/{key}"))
            # numpy takes an empty storage, too; memory that it owns cannot grow to what a tensor
            # announces.
            memory = torch.from_numpy(np.frombuffer(content, np.uint8))
            self.storages[key] = memory.untyped_storage()
        return dtype, self.storages[key]


def _rebuild_tensor(
    source: tuple[torch.dtype, torch.UntypedStorage],
    offset: int,
    size: tuple[int, ...],
    stride: tuple[int, ...],
    *_: Any,
) -> Tensor:
    dtype, storage = source
    return torch.empty(0, dtype=dtype).set_(storage, offset, size, stride)


def _tensors(root: _Object) -> dict[str, Tensor]:
    found, modules, count = {}, [("", root)], 0
    while modules:
        prefix, module = modules.pop()
        count += 1
        if count > MAX_MODULES:
            raise ValueError(f"more than {MAX_MODULES} modules inside each other")
        for name, value in module.attributes.items():
            if isinstance(value, Tensor):
                found[prefix + name] = value
            elif isinstance(value, _Object):
                modules.append((f"{prefix}{name}.", value))
    return found
