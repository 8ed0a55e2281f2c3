"""Files in and out: the dataset root, JSON and pickles with clear errors, atomic writing."""

import contextlib
import errno
import gc
import io
import json
import math
import os
import pickle
import re
import shutil
import time
import uuid
from collections import OrderedDict
from collections.abc import Iterator
from typing import IO, Any

import numpy as np

try:
    import fcntl
except ImportError:  # Windows: nothing is locked, so nothing is swept
    fcntl = None

_TEMPORARY = re.compile(r"\.ris_d2-[0-9a-f]{8}\..+")

# How much of a library's message is repeated: some quote the whole of what they could not read.
_QUOTED = 200


class UnreadableFile(ValueError):
    """The content of a file cannot be used; the message names the file."""


def dataset_root() -> str:
    """Return $DETECTRON2_DATASETS, or "datasets" where unset; read at each call, ~ expanded."""
    return os.path.expanduser(os.environ.get("DETECTRON2_DATASETS") or "datasets")


@contextlib.contextmanager
def reading(path: str | os.PathLike, entry: str = "") -> Iterator[None]:
    """The boundary around everything that interprets the content of a file.

    Parsers, image libraries and our own code meet damaged or hostile content with nearly any
    exception (RecursionError, OverflowError, KeyError, cv2.error, BadZipFile, MemoryError, ...);
    outside of this block it is a ValueError that names the file. What already names the file, and
    what the operating system says of the file itself (missing, no permission, disk full), passes.

    Args:
        path: the file.
        entry: where in the file, e.g. "annotation 7"; "" where the block reads all of it.

    Raises:
        UnreadableFile: anything else was raised inside.
    """
    try:
        yield
    except Exception as error:
        if _says_enough(error, os.fspath(path)):
            raise
        where = f"{path}: {entry}" if entry else f"{path}"
        raise UnreadableFile(f"{where}: {_reason(error)}") from error


def _says_enough(error: Exception, path: str) -> bool:
    if isinstance(error, UnreadableFile | FileNotFoundError):
        return True
    if isinstance(error, OSError):
        # Without a number it is a library's word on the content (PIL); EINVAL is a seek to an
        # impossible place, which damaged content asks for.
        return error.errno not in (None, errno.EINVAL)
    return isinstance(error, ValueError) and path in str(error)


def _reason(error: Exception) -> str:
    if isinstance(error, RecursionError):
        return "its content is nested too deeply, or contains itself"
    if isinstance(error, MemoryError):
        return "its content asks for more memory than there is"
    text = " ".join(str(error).split())
    text = text if len(text) <= _QUOTED else f"{text[:_QUOTED]}..."
    if isinstance(error, ValueError) and text:
        return text
    return f"not readable, truncated or damaged ({type(error).__name__}: {text})"


def load_json(path: str | os.PathLike) -> Any:
    """Read one JSON file (UTF-8).

    Raises:
        FileNotFoundError: no such file.
        ValueError: truncated or malformed; names the file and the position.
    """
    with reading(path):
        data = _content(path)
        try:
            with without_collecting():
                return json.loads(data.decode("utf-8"))
        except json.JSONDecodeError as error:
            raise ValueError(
                f"not valid JSON at line {error.lineno}, column {error.colno} ({error.msg}; "
                f"{len(data)} bytes in all); the file is truncated or damaged, get it again"
            ) from error
        except UnicodeDecodeError as error:
            raise ValueError(f"not UTF-8 text at byte {error.start}; not a JSON file") from error


def load_pickle(path: str | os.PathLike) -> Any:
    """Read a pickle of plain data, written by Python 2 or 3, without running anything it names.

    Allowed are plain containers, str, bytes, numbers, None, and numpy's numbers and arrays of
    numbers (see ``numpy_globals``). Python 2's str is decoded as latin-1, which also restores the
    bytes of its numpy arrays.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the pickle names another class or function (named in the message), or is
            truncated or damaged.
    """
    with reading(path):
        data = _content(path)
        try:
            with without_collecting():
                return load_plain(data)
        except _ForbiddenGlobal as error:
            raise ValueError(
                f"the pickle asks for {error}, which is not plain data; nothing of it was run"
            ) from error
        except ValueError as error:  # its text says nothing of a file
            raise pickle.UnpicklingError(str(error)) from error


def load_plain(data: bytes) -> Any:
    """As ``load_pickle``, from memory; ``pickle.UnpicklingError`` names what is no plain data."""
    return _PlainUnpickler(io.BytesIO(data), encoding="latin1").load()


@contextlib.contextmanager
def without_collecting() -> Iterator[None]:
    """Within, Python looks for no cycles: millions of new objects without any take half as long."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


@contextlib.contextmanager
def atomic_write(path: str | os.PathLike, mode: str = "w") -> Iterator[IO]:
    """Yield a file that becomes ``path`` when the block ends, and disappears if the block raises.

    The temporary file lies beside ``path`` (missing directories are made) and keeps its extension;
    code that wants a path rather than a file object uses ``file.name``.

    Args:
        path: where the file shall be.
        mode: "w" (text, UTF-8) or "wb".

    Raises:
        ValueError: ``mode`` is neither "w" nor "wb".
    """
    if mode not in ("w", "wb"):
        raise ValueError(f"atomic_write: mode is {mode!r}, it must be 'w' or 'wb'")
    path = os.path.abspath(path)
    folder, name = os.path.split(path)
    os.makedirs(folder, exist_ok=True)
    temporary = _temporary(folder, name)
    file = open(temporary, mode, encoding="utf-8" if mode == "w" else None)
    with _locked(temporary):
        try:
            with file:
                yield file
                if not file.closed:
                    file.flush()
                    os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            with contextlib.suppress(FileNotFoundError):
                os.remove(temporary)
            raise


@contextlib.contextmanager
def atomic_folder(path: str | os.PathLike) -> Iterator[str]:
    """Yield a folder that becomes ``path``, in place of what is there, when the block ends.

    If the block raises, the folder disappears and ``path`` is as it was.
    """
    path = os.path.abspath(path)
    parent, name = os.path.split(path)
    os.makedirs(parent, exist_ok=True)
    temporary = _temporary(parent, name)
    os.mkdir(temporary)
    with _locked(temporary):
        try:
            yield temporary
            if os.path.isdir(path):
                replaced = _temporary(parent, name)
                os.rename(path, replaced)
                os.rename(temporary, path)
                shutil.rmtree(replaced, ignore_errors=True)
            else:
                os.rename(temporary, path)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def sweep_temporaries(folder: str | os.PathLike) -> list[str]:
    """Remove from ``folder`` what killed processes left of atomic writing; return the paths.

    What a living process writes is locked, and stays.
    """
    if not os.path.isdir(folder):
        return []
    swept = []
    for name in sorted(os.listdir(folder)):
        path = os.path.join(folder, name)
        if _TEMPORARY.fullmatch(name):
            with contextlib.suppress(OSError), _locked(path, sweep=True):
                shutil.rmtree(path) if os.path.isdir(path) else os.remove(path)
                swept.append(path)
    return swept


def _temporary(folder: str, name: str) -> str:
    return os.path.join(folder, f".ris_d2-{uuid.uuid4().hex[:8]}.{name}")


@contextlib.contextmanager
def _locked(path: str, *, sweep: bool = False) -> Iterator[None]:
    """Within, ``path`` is locked; the system drops the lock when this process ends.

    Raises:
        OSError: with ``sweep``, another process holds the lock, or locks do not work here.
    """
    if fcntl is None:
        if sweep:
            raise OSError("no locks on this system")
        yield
        return
    descriptor = os.open(path, os.O_RDONLY if os.path.isdir(path) else os.O_RDWR)
    try:
        with contextlib.nullcontext() if sweep else contextlib.suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # Its process may not have come to lock it yet.
        if sweep and time.time() - os.fstat(descriptor).st_mtime < 1:
            raise BlockingIOError("just written")
        yield
    finally:
        os.close(descriptor)


def _content(path: str | os.PathLike) -> bytes:
    try:
        with open(path, "rb") as file:
            return file.read()
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{os.path.abspath(path)}: no such file") from error


class _ForbiddenGlobal(pickle.UnpicklingError):
    pass


def _encode_latin1(text: str, encoding: str) -> bytes:
    # Python 3 writes bytes at protocol <= 2 as a call of _codecs.encode(text, "latin1").
    if encoding not in ("latin1", "latin-1"):
        raise _ForbiddenGlobal(f"_codecs.encode with {encoding!r}")
    return text.encode("latin1")


def _bytes(data: bytes | str = b"", encoding: str = "latin1") -> bytes:
    # Called by its own name, bytes(10**12) would be a terabyte.
    if isinstance(data, str):
        return _encode_latin1(data, encoding)
    if not isinstance(data, bytes | bytearray):
        raise _ForbiddenGlobal(f"bytes of a {type(data).__name__}")
    return bytes(data)


class _NumberType:
    """Stands for a pickled numpy.dtype: a kind of number by its name, and a byte order.

    numpy's own dtype takes its layout (fields, item size, whether items are pointers) from the
    pickle, and then reads memory by it.
    """

    __slots__ = ("dtype",)

    _CODES = frozenset("b1 i1 i2 i4 i8 u1 u2 u4 u8 f2 f4 f8 c8 c16".split())

    def __init__(self, code: str, align: bool = False, copy: bool = True) -> None:
        if code not in self._CODES:
            raise _ForbiddenGlobal(f"numpy's dtype {code!r}")
        self.dtype = np.dtype(code)

    def __setstate__(self, state: tuple) -> None:
        _, order, *layout = state
        if order not in ("<", ">", "|", "=") or layout != [None, None, None, -1, -1, 0]:
            raise _ForbiddenGlobal(f"numpy's dtype {self.dtype} with a layout of its own")
        self.dtype = self.dtype.newbyteorder(order)


class _Array(np.ndarray):
    """An array that starts empty and is filled from as many bytes as its shape needs."""

    __slots__ = ()

    def __new__(cls) -> "_Array":
        # No shape: memory that the pickle does not fill would hold anything.
        return super().__new__(cls, 0)

    def __setstate__(self, state: tuple) -> None:
        _, shape, number_type, is_fortran, data = state
        dtype, data = number_type.dtype, _bytes(data)
        if not all(type(side) is int and side >= 0 for side in shape):
            raise ValueError(f"an array of shape {shape}")
        if math.prod(shape) * dtype.itemsize != len(data):
            raise ValueError(f"{len(data)} bytes for an array {shape} of {dtype}")
        super().__setstate__((1, shape, dtype, bool(is_fortran), data))


def _reconstruct(kind: type, shape: tuple, code: bytes) -> _Array:
    return _Array()  # as numpy's: the content comes by __setstate__


def _from_buffer(data: bytes, number_type: _NumberType, shape: tuple, order: str) -> _Array:
    array = _Array()
    array.__setstate__((1, shape, number_type, order == "F", data))
    return array


def _scalar(number_type: _NumberType, data: bytes | str) -> np.generic:
    return _from_buffer(data, number_type, (1,), "C")[0]


def numpy_globals() -> dict[str, Any]:
    """Names that numpy's pickles use -> what takes their place when a file is read.

    Only numbers and arrays of numbers come of it: no objects, no text, no records, no memory that
    the file did not fill. numpy 1 says numpy.core where numpy 2 says numpy._core.
    """
    makers = {
        "multiarray.scalar": _scalar,
        "multiarray._reconstruct": _reconstruct,
        "numeric._frombuffer": _from_buffer,
    }
    functions = {f"numpy.{core}.{k}": v for core in ("core", "_core") for k, v in makers.items()}
    return {"numpy.ndarray": _Array, "numpy.dtype": _NumberType, **functions}


_PLAIN = {
    "set": set,
    "frozenset": frozenset,
    "complex": complex,
    "bytes": _bytes,
    "bytearray": lambda *arguments: bytearray(_bytes(*arguments)),
}
_ALLOWED_GLOBALS: dict[str, Any] = {
    **{f"{module}.{k}": v for module in ("builtins", "__builtin__") for k, v in _PLAIN.items()},
    "collections.OrderedDict": OrderedDict,
    "_codecs.encode": _encode_latin1,
    **numpy_globals(),
}


class _PlainUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        try:
            return _ALLOWED_GLOBALS[f"{module}.{name}"]
        except KeyError:
            raise _ForbiddenGlobal(f"{module}.{name}") from None
