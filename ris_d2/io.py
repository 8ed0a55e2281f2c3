"""Files in and out: the dataset root, JSON and pickles with clear errors, atomic writing."""

import contextlib
import io
import json
import os
import pickle
import uuid
from collections import OrderedDict
from collections.abc import Iterator
from typing import IO, Any

import numpy as np

__all__ = ["atomic_write", "dataset_root", "load_json", "load_pickle"]


def dataset_root() -> str:
    """Return $DETECTRON2_DATASETS, or "datasets" where unset; read at each call, ~ expanded."""
    return os.path.expanduser(os.environ.get("DETECTRON2_DATASETS") or "datasets")


def load_json(path: str | os.PathLike) -> Any:
    """Read one JSON file (UTF-8).

    Raises:
        FileNotFoundError: no such file.
        ValueError: truncated or malformed; names the file and the position.
    """
    with _open_for_reading(path) as file:
        data = file.read()
    try:
        return json.loads(data.decode("utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{path}: not valid JSON at line {error.lineno}, column {error.colno} "
            f"({error.msg}; {len(data)} bytes in all); the file is truncated or damaged, "
            "get it again"
        ) from error
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path}: not UTF-8 text at byte {error.start}; not a JSON file"
        ) from error


def load_pickle(path: str | os.PathLike) -> Any:
    """Read a pickle of plain data, written by Python 2 or 3, without running anything it names.

    Allowed are plain containers, str, bytes, numbers, None, and numpy arrays and scalars (under the
    module names of numpy 1 and 2). Python 2's str is decoded as latin-1, which also restores the
    bytes of its numpy arrays.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the pickle names another class or function (named in the message), or is
            truncated or damaged.
    """
    with _open_for_reading(path) as file:
        data = file.read()
    try:
        return _PlainUnpickler(io.BytesIO(data), encoding="latin1").load()
    except _ForbiddenGlobal as error:
        raise ValueError(
            f"{path}: the pickle asks for {error}, which is not plain data; nothing of it was run"
        ) from error
    except Exception as error:  # damaged bytes can make the unpickler raise nearly anything
        raise ValueError(
            f"{path}: not a readable pickle ({type(error).__name__}: {error}); "
            "the file is truncated or damaged, get it again"
        ) from error


@contextlib.contextmanager
def atomic_write(
    path: str | os.PathLike, mode: str = "w", encoding: str | None = None
) -> Iterator[IO]:
    """Yield a file that becomes ``path`` when the block ends, and disappears if the block raises.

    The temporary file lies beside ``path`` (missing directories are made) and keeps its extension;
    code that wants a path rather than a file object uses ``file.name``.

    Args:
        path: where the file shall be.
        mode: "w" (text, UTF-8 unless ``encoding`` is given) or "wb".
        encoding: of the text.

    Raises:
        ValueError: ``mode`` is neither "w" nor "wb".
    """
    if mode not in ("w", "wb"):
        raise ValueError(f"atomic_write: mode is {mode!r}, it must be 'w' or 'wb'")
    path = os.path.abspath(path)
    folder, name = os.path.split(path)
    os.makedirs(folder, exist_ok=True)
    temporary = os.path.join(folder, f".{uuid.uuid4().hex[:8]}.{name}")
    text_encoding = (encoding or "utf-8") if mode == "w" else None
    try:
        with open(temporary, mode, encoding=text_encoding) as file:
            yield file
            if not file.closed:
                file.flush()
                os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.remove(temporary)
        raise


def _open_for_reading(path: str | os.PathLike) -> IO[bytes]:
    try:
        return open(path, "rb")
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{os.path.abspath(path)}: no such file") from error


def _encode_latin1(text: str, encoding: str) -> bytes:
    # Python 3 writes bytes at protocol <= 2 as a call of _codecs.encode(text, "latin1").
    if encoding not in ("latin1", "latin-1"):
        raise _ForbiddenGlobal(f"_codecs.encode with {encoding!r}")
    return text.encode("latin1")


def _numpy_globals() -> dict[tuple[str, str], Any]:
    allowed: dict[tuple[str, str], Any] = {
        ("numpy", "ndarray"): np.ndarray,
        ("numpy", "dtype"): np.dtype,
    }
    # What numpy itself names when it pickles: the callables are found by pickling, because the
    # modules moved from numpy.core to numpy._core between numpy 1 and 2.
    makers = {
        ("multiarray", "scalar"): np.float64(0).__reduce__()[0],
        ("multiarray", "_reconstruct"): np.zeros(1).__reduce__()[0],
        ("numeric", "_frombuffer"): np.zeros(1).__reduce_ex__(5)[0],
    }
    for (module, name), maker in makers.items():
        allowed[f"numpy.core.{module}", name] = maker
        allowed[f"numpy._core.{module}", name] = maker
    return allowed


_ALLOWED_GLOBALS: dict[tuple[str, str], Any] = {
    **{
        (module, kind.__name__): kind
        for module in ("builtins", "__builtin__")
        for kind in (set, frozenset, bytearray, complex)
    },
    ("collections", "OrderedDict"): OrderedDict,
    ("_codecs", "encode"): _encode_latin1,
    **_numpy_globals(),
}


class _ForbiddenGlobal(pickle.UnpicklingError):
    pass


class _PlainUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        try:
            return _ALLOWED_GLOBALS[module, name]
        except KeyError:
            raise _ForbiddenGlobal(f"{module}.{name}") from None
