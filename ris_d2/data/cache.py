"""Records of large published datasets in files that later starts map into memory.

A file lies in $RIS_D2_CACHE (~/.cache/ris_d2 where unset; no file where empty) and belongs to the
names, the sizes and times of the annotation files, and this package's code; where one of them has
changed, or the file is damaged, it is made anew. Records are plain pickles, read without running
anything they name.
"""

import contextlib
import hashlib
import json
import logging
import os
import pickle
import zlib
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from detectron2.structures import BoxMode
from detectron2.utils.logger import log_first_n

from ..io import atomic_write, fcntl, load_plain, reading, sweep_temporaries

_SMALL = 10_000_000  # bytes of annotation files that are read as soon as looked up


class MappedRecords(Sequence):
    """Records in a mapped file, each decoded when it is asked for: all processes share one copy.

    Attributes:
        ref_ids: of the expressions, a list per record.
    """

    def __init__(self, path: str, key: str):
        """
        Raises:
            FileNotFoundError: no such file.
            ValueError: it has another key, or is damaged; names the file.
        """
        self._arguments = path, key
        with reading(path):
            data = np.memmap(path, np.uint8, "r")
            length = int.from_bytes(data[-8:].tobytes(), "little")
            self._body, index = data[: -8 - length], json.loads(data[-8 - length : -8].tobytes())
            if index["key"] != key:
                raise ValueError("made of other annotation files, or by another version")
            if index["crc32"] != zlib.crc32(self._body):
                raise ValueError("damaged")
        self._bounds = np.array(index["bounds"])
        self.ref_ids: list[list[int]] = index["ref_ids"]

    def __len__(self) -> int:
        return len(self.ref_ids)

    def __getitem__(self, index: int) -> dict:
        index = range(len(self))[index]
        record = load_plain(self._body[slice(*self._bounds[index : index + 2])].tobytes())
        for annotation in record["annotations"]:
            annotation["bbox_mode"] = BoxMode(annotation["bbox_mode"])
        return record

    def __reduce__(self) -> tuple:
        return MappedRecords, self._arguments  # workers that are not forked map the file, too


def cached(
    read: Callable[[], list[dict]], names: Sequence[str], files: Sequence[str], **options: Any
) -> Sequence[dict]:
    """``read()``, from the cache where it has been read before.

    Processes of one machine take turns, so that one of them reads and the others map what it wrote.

    Args:
        read: the records of ``names``.
        files: all that they come from, see ``annotation_files``; nothing is kept where these are
            small.
        options: whatever else decides what is read; fit for json.
    """
    folder = os.path.expanduser(os.environ.get("RIS_D2_CACHE", "~/.cache/ris_d2"))
    if not folder or not all(map(os.path.exists, files)) or _size(files) < _SMALL:
        return read()
    asked = json.dumps([*names, options, *files])
    digest = hashlib.sha256(asked.encode()).hexdigest()[:12]
    path = os.path.join(folder, f"{names[0]}-{digest}.records")
    versions = [(os.stat(file).st_size, os.stat(file).st_mtime_ns) for file in files]
    key = json.dumps([asked, versions, _code_version()])
    if records := _mapped(path, key):
        return records
    with _turn(folder):
        if records := _mapped(path, key):
            return records
        records = read()
        try:
            _write(path, key, records)
            return MappedRecords(path, key)
        except OSError as error:
            problem = f"the next start reads the annotation files again, no cache: {error}"
            log_first_n(logging.WARNING, problem, name=__name__, key="message")
            return records


def ref_ids(records: Sequence[dict]) -> list[list[int]]:
    """The ref_id of every expression, a list per record."""
    if isinstance(records, MappedRecords):
        return records.ref_ids
    return [[e["ref_id"] for e in record["expressions"]] for record in records]


def _size(files: Sequence[str]) -> int:
    return sum(map(os.path.getsize, files))


@lru_cache
def _code_version() -> int:
    package = Path(__file__).parents[1]
    sources = chain(package.glob("*.py"), Path(__file__).parent.iterdir())
    return zlib.crc32(b"".join(file.read_bytes() for file in sorted(sources) if file.is_file()))


def _mapped(path: str, key: str) -> MappedRecords | None:
    try:
        return MappedRecords(path, key)
    except FileNotFoundError:
        pass
    except (OSError, ValueError) as error:
        log_first_n(logging.INFO, f"{error}; it is made anew", name=__name__, key="message")


@contextlib.contextmanager
def _turn(folder: str) -> Iterator[None]:
    """Within, other processes wait; not where the folder cannot be made or locked."""
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError):
            os.makedirs(folder, exist_ok=True)
            sweep_temporaries(folder)
            if fcntl:
                descriptor = os.open(folder, os.O_RDONLY)
                stack.callback(os.close, descriptor)
                fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield


def _write(path: str, key: str, records: Sequence[dict]) -> None:
    bounds, crc = [0], 0
    with atomic_write(path, "wb") as file:
        for record in records:
            # detectron2's enumeration is no plain data.
            shapes = [{**a, "bbox_mode": int(a["bbox_mode"])} for a in record["annotations"]]
            data = pickle.dumps({**record, "annotations": shapes}, pickle.HIGHEST_PROTOCOL)
            file.write(data)
            bounds.append(bounds[-1] + len(data))
            crc = zlib.crc32(data, crc)
        index = {"key": key, "crc32": crc, "bounds": bounds, "ref_ids": ref_ids(records)}
        encoded = json.dumps(index).encode()
        file.write(encoded + len(encoded).to_bytes(8, "little"))
