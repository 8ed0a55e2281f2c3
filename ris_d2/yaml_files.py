"""YAML files as plain data: nothing in them runs, and errors name the file."""

import itertools
import os
import stat
from collections.abc import Iterator
from typing import Any

import yaml

# Far above what a configuration needs; a file beyond is a mistake or meant to exhaust memory.
MAX_BYTES = 1_000_000
MAX_VALUES = 100_000  # what an alias repeats is counted each time
MAX_DEPTH = 30
MAX_FILES = 100  # of one configuration with its bases

_BASE = "_BASE_"


def read_yaml(path: str | os.PathLike) -> dict[Any, Any]:
    """Read one YAML mapping of plain values (text, numbers, booleans, null, lists, mappings).

    Raises:
        FileNotFoundError: no such file.
        ValueError: a tag asks for anything else (nothing of it is run), a key is there twice, the
            file is no mapping, empty, malformed, too large or too deeply nested. Names file and
            place.
    """
    try:
        is_regular = stat.S_ISREG(os.stat(path).st_mode)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{path}: no such file") from error
    try:
        if not is_regular:
            raise ValueError("is no regular file")
        with open(path, "rb") as file:
            data = file.read(MAX_BYTES + 1)
        if len(data) > MAX_BYTES:
            raise ValueError(f"is larger than {MAX_BYTES:,} bytes")
        loader = yaml.SafeLoader(data)
        tree = loader.get_single_node()
        if not isinstance(tree, yaml.MappingNode):
            raise ValueError("is empty" if tree is None else "holds no mapping (KEY: value)")
        _check_tree(tree)
        return loader.construct_document(tree)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f", line {mark.line + 1}" if mark else ""
        raise ValueError(f"{path}{where}: {error.problem}") from error
    # The reader meets anything that bytes can be: bad UTF-8, brackets without end, dates that are
    # none, integers of 5,000 digits.
    except Exception as error:
        reason = "is too deeply nested" if isinstance(error, RecursionError) else error
        raise ValueError(f"{path}: {reason}") from error


def read_config_files(path: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the files of a configuration, (path, values), each after the ones of its ``_BASE_``.

    ``_BASE_`` is a path or a list of paths, relative to the file that names it; ~ is expanded.

    Raises:
        FileNotFoundError, ValueError: see :func:`read_yaml`; or a ``_BASE_`` is a URL, includes
            itself, or is no path.
    """
    return _read_with_bases(os.path.expanduser(path), (), itertools.count(1))


def _read_with_bases(
    path: str, including: tuple[str, ...], number: Iterator[int]
) -> Iterator[tuple[str, dict[str, Any]]]:
    if os.path.realpath(path) in including:
        raise ValueError(f"{path}: includes itself through {_BASE}")
    if next(number) > MAX_FILES:
        raise ValueError(f"{path}: more than {MAX_FILES} files are included through {_BASE}")
    values = read_yaml(path)
    bases = values.pop(_BASE, [])
    for base in bases if isinstance(bases, list) else [bases]:
        if not isinstance(base, str) or not base or "://" in base or "\0" in base:
            raise ValueError(f"{path}: {_BASE} {base!r} is no path of a file (URLs are not read)")
        base = os.path.join(os.path.dirname(path), os.path.expanduser(base))
        if not os.path.exists(base):
            raise FileNotFoundError(f"{path}: {_BASE} names {base}: no such file")
        yield from _read_with_bases(base, (*including, os.path.realpath(path)), number)
    yield path, values


def _check_tree(tree: yaml.Node) -> None:
    """Raise ValueError for keys that are there twice, for foreign tags, depth and size."""
    waiting, count = [(tree, 0, "")], 0
    while waiting:
        node, depth, name = waiting.pop()
        count += 1
        if depth > MAX_DEPTH or count > MAX_VALUES:
            raise ValueError(
                f"{name.split('.')[0]} holds more than {MAX_DEPTH} levels or {MAX_VALUES:,} values"
            )
        line = f"line {node.start_mark.line + 1}: {name}" if name else "the file"
        if node.tag not in _PLAIN_TAGS:
            tag = node.tag.replace("tag:yaml.org,2002:", "!!")
            raise ValueError(f"{line} has the tag {tag}; only plain values are read, nothing runs")
        if isinstance(node, yaml.MappingNode):
            seen = set()
            for key, value in node.value:
                if not isinstance(key, yaml.ScalarNode):
                    raise ValueError(f"{line} has a list or mapping for a key")
                if key.value in seen:
                    raise ValueError(
                        f"line {key.start_mark.line + 1}: {key.value!r} is there twice"
                    )
                seen.add(key.value)
                below = f"{name}.{key.value}" if name else key.value
                waiting += [(key, depth + 1, below), (value, depth + 1, below)]
        elif isinstance(node, yaml.SequenceNode):
            waiting += [(item, depth + 1, name) for item in node.value]


_PLAIN_TAGS = {
    f"tag:yaml.org,2002:{kind}"
    for kind in ("null", "bool", "int", "float", "str", "seq", "map", "merge")
}
