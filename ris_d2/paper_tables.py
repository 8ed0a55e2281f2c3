"""Tables of papers as data: a recipe, the keys that each row of a table changes, what was published."""

import dataclasses
import os
from typing import Any

from .yaml_files import read_yaml

__all__ = ["PaperRow", "is_paper_row", "read_paper_row", "row_names"]

_ROW_KEYS = {"paper", "base", "like", "set", "published", "note"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class PaperRow:
    """One row of a table.

    Attributes:
        base: path of the recipe that the row changes.
        changes: (origin, values), to be merged over the recipe in this order; ``like`` comes first.
        paper: where the numbers stand, e.g. "Table VII".
        published: dataset -> metric -> number, in percent, under the protocol of the configuration.
        note: what the table leaves open, and what was chosen.
    """

    base: str
    changes: list[tuple[str, dict[str, Any]]]
    paper: str
    published: dict[str, dict[str, float]]
    note: str


def is_paper_row(config_file: str) -> bool:
    """Whether ``config_file`` names a row, as configs/papers/vipa.yaml:t7_none_le does."""
    path, colon, row = config_file.rpartition(":")
    return bool(colon) and path.endswith((".yaml", ".yml")) and os.sep not in row


def read_paper_row(config_file: str) -> PaperRow:
    """Read the row that ``<table>.yaml:<row>`` names.

    A table has ``base``, the path of a recipe relative to the table, and ``rows``: name -> {``set``:
    {KEY: value}, ``like``: a row whose changes come first, ``base``: another recipe, ``paper``,
    ``published``, ``note``}.

    Raises:
        FileNotFoundError: no such table, or its recipe does not exist.
        ValueError: no such row, an unknown field, or rows that are like each other in a circle; names
            table and row.
    """
    path, _, name = config_file.rpartition(":")
    table = _read_table(path)
    if name not in table["rows"]:
        raise ValueError(f"{path}: no row {name!r}; the rows are {', '.join(table['rows'])}")
    chain: list[str] = []
    while name:
        if name in chain or name not in table["rows"]:
            raise ValueError(f"{path}: row {chain[-1]} is like {name!r}, which is no row before it")
        chain.append(name)
        name = table["rows"][name].get("like", "")
    rows = [table["rows"][name] for name in reversed(chain)]
    base = next((row["base"] for row in reversed(rows) if "base" in row), table["base"])
    base = os.path.join(os.path.dirname(path), base)
    if not os.path.exists(base):
        raise FileNotFoundError(f"{config_file}: base names {base}: no such file")
    changes = [
        (f"{path}:{name}", _nested(row.get("set", {})))
        for name, row in zip(reversed(chain), rows, strict=True)
    ]
    own = rows[-1]
    return PaperRow(
        base=base,
        changes=changes,
        paper=own.get("paper", ""),
        published=own.get("published", {}),
        note=own.get("note", ""),
    )


def row_names(path: str) -> list[str]:
    """The rows of a table, in its order."""
    return list(_read_table(path)["rows"])


def _read_table(path: str) -> dict[str, Any]:
    table = read_yaml(path)
    rows = table.get("rows")
    if not isinstance(table.get("base"), str) or not isinstance(rows, dict):
        raise ValueError(f"{path}: a table has base, the path of a recipe, and rows")
    for name, row in rows.items():
        if not isinstance(row, dict) or row.keys() - _ROW_KEYS:
            raise ValueError(f"{path}: row {name} has other fields than {sorted(_ROW_KEYS)}")
        if not all(isinstance(row.get(key, {}), dict) for key in ("set", "published")):
            raise ValueError(f"{path}: row {name}: set and published are mappings")
    return table


def _nested(values: dict[str, Any]) -> dict[str, Any]:
    """{"MODEL.VIPA.DIM": 64} -> {"MODEL": {"VIPA": {"DIM": 64}}}"""
    tree: dict[str, Any] = {}
    for dotted, value in values.items():
        *groups, key = dotted.split(".")
        node = tree
        for group in groups:
            node = node.setdefault(group, {})
        node[key] = value
    return tree
