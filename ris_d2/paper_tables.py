"""Tables of papers as data: a recipe, the keys that each row changes, what was published."""

import dataclasses
import os
from typing import Any

from .yaml_files import read_yaml

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

    A table has ``base``, the path of a recipe relative to the table, and ``rows``: name ->
    {``set``: {KEY: value}, ``like``: a row or a list of rows whose changes come first, ``base``:
    another recipe, ``paper``, ``published``, ``note``}.

    Raises:
        FileNotFoundError: no such table, or its recipe does not exist.
        ValueError: no such row, an unknown field, or rows that are like each other in a circle;
            names table and row.
    """
    path, _, name = config_file.rpartition(":")
    table = _read_table(path)
    if name not in table["rows"]:
        raise ValueError(f"{path}: no row {name!r}; the rows are {', '.join(table['rows'])}")
    rows = {key: table["rows"][key] for key in _with_likes(path, table["rows"], name, ())}
    base = [table["base"], *(row["base"] for row in rows.values() if "base" in row)][-1]
    base = os.path.join(os.path.dirname(path), base)
    if not os.path.exists(base):
        raise FileNotFoundError(f"{config_file}: base names {base}: no such file")
    own = rows[name]
    return PaperRow(
        base=base,
        changes=[(f"{path}:{key}", nested(row.get("set", {}))) for key, row in rows.items()],
        paper=own.get("paper", ""),
        published=own.get("published", {}),
        note=own.get("note", ""),
    )


def _with_likes(path: str, rows: dict[str, Any], name: str, above: tuple[str, ...]) -> list[str]:
    """Names of the rows that ``name`` is like, in the order of their changes, then ``name``."""
    if name in above or name not in rows:
        raise ValueError(f"{path}: row {above[-1]} is like {name!r}, which is no row before it")
    likes = rows[name].get("like", [])
    names = []
    for like in likes if isinstance(likes, list) else [likes]:
        names += _with_likes(path, rows, like, (*above, name))
    return [*names, name]


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


def nested(values: dict[str, Any]) -> dict[str, Any]:
    """Keys of a configuration as a yaml has them: {"A.B": 1} -> {"A": {"B": 1}}."""
    tree: dict[str, Any] = {}
    for dotted, value in values.items():
        *groups, key = dotted.split(".")
        node = tree
        for group in groups:
            node = node.setdefault(group, {})
        node[key] = value
    return tree
