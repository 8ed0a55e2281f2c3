"""Training units: what one draw of training data is, and which unit each draw is.

Nothing random is carried over from one draw to the next: draws have global numbers, and whatever is
random about a draw (the order of its epoch, the sentences, flips, augmentation) is a function of
(seed, draw number). Training therefore sees the same data with any number of workers and processes,
and resumes exactly.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from .cache import ref_ids

UNITS = ("sentence", "referent", "image")


class Unit(NamedTuple):
    """An image with some of its sentences: indices into the records and into its expressions."""

    record: int
    expressions: tuple[int, ...]


class Units(Sequence):
    """The units of a training set, each with all the sentences it may be drawn with.

    Kept as three integer arrays: lists of tuples would be copied into every worker process.
    """

    def __init__(self, units: Sequence[Unit], *, max_expressions: int):
        """``max_expressions``: at most so many sentences of a unit are in one draw."""
        self.max_expressions = max_expressions
        self._records = np.array([unit.record for unit in units], np.int64)
        self._ends = np.cumsum([len(unit.expressions) for unit in units], dtype=np.int64)
        self._expressions = np.array([i for unit in units for i in unit.expressions], np.int64)

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> Unit:
        start = self._ends[index - 1] if index else 0
        expressions = self._expressions[start : self._ends[index]]
        return Unit(int(self._records[index]), tuple(expressions.tolist()))


def check_unit(unit: str, max_expressions: int) -> None:
    """Raise ValueError unless such units can be drawn, see :func:`build_units`."""
    if unit not in UNITS:
        raise ValueError(f"INPUT.RIS.UNIT is one of {', '.join(UNITS)}, not {unit!r}")
    if max_expressions < 1:
        raise ValueError(f"INPUT.MAX_EXPRESSIONS must be at least 1, not {max_expressions}")


def build_units(records: Sequence[dict], unit: str, *, max_expressions: int = 8) -> Units:
    """List the units of one epoch, in the order of the records.

    Args:
        records: one dict per image, as ris_d2's datasets give them.
        unit: "sentence" (every expression by itself), "referent" (every ref_id of an image, drawn
            with one random sentence) or "image" (drawn with up to ``max_expressions`` sentences).
        max_expressions: only for "image".

    Raises:
        ValueError: an unknown unit, or fewer than one expression per image asked for.
    """
    check_unit(unit, max_expressions)
    units = [
        Unit(index, group)
        for index, ids in enumerate(ref_ids(records))
        for group in _groups(ids, unit)
    ]
    return Units(units, max_expressions=max_expressions if unit == "image" else 1)


def draw_unit(
    record: dict, unit: str, rng: np.random.Generator, *, max_expressions: int = 8
) -> tuple[int, ...]:
    """Draw one training unit within one image: the indices of its expressions.

    Raises:
        ValueError: the record has no expressions.
    """
    groups = _groups(ref_ids([record])[0], unit)
    if not groups:
        raise ValueError(f"{record['file_name']}: an image without expressions is no training data")
    limit = max_expressions if unit == "image" else 1
    return choose(groups[rng.integers(len(groups))], limit, rng)


def choose(expressions: tuple[int, ...], limit: int, rng: np.random.Generator) -> tuple[int, ...]:
    """Up to ``limit`` of the expressions, without replacement, in the order given."""
    if len(expressions) <= limit:
        return expressions
    positions = np.sort(rng.choice(len(expressions), limit, replace=False))
    return tuple(expressions[position] for position in positions)


def take(record: dict, expression_indices: Sequence[int]) -> dict:
    """Copy of ``record`` with these expressions and only the annotations that they name.

    Raises:
        ValueError: an expression names an annotation that the record does not have.
    """
    expressions = [record["expressions"][index] for index in expression_indices]
    named = {id_ for expression in expressions for id_ in expression["annotation_ids"]}
    annotations = [annotation for annotation in record["annotations"] if annotation["id"] in named]
    missing = named - {annotation["id"] for annotation in annotations}
    if missing:
        ids = [e["expression_id"] for e in expressions if missing & set(e["annotation_ids"])]
        raise ValueError(
            f"{record['file_name']}: expressions {ids} name the annotations {sorted(missing)}, "
            "which the record does not have"
        )
    return {**record, "expressions": expressions, "annotations": annotations}


class Draws:
    """Draw number -> the unit and the random numbers of that draw."""

    def __init__(self, units: Units, *, seed: int):
        """``units``: at least one. ``seed``: >= 0, the same on all processes."""
        self.units = units
        self.seed = seed
        self._epoch, self._order = -1, None

    def __call__(self, draw: int) -> tuple[Unit, np.random.Generator]:
        """Return the unit of draw 0, 1, ..., its sentences chosen, and the rng for the rest.

        Every epoch of len(units) draws visits each unit once, in an order of its own.
        """
        epoch, position = divmod(draw, len(self.units))
        if epoch != self._epoch:
            # The last 1 keeps this stream apart from those of the draws.
            order = np.random.default_rng((self.seed, epoch, 1)).permutation(len(self.units))
            self._epoch, self._order = epoch, order
        unit = self.units[self._order[position]]
        rng = np.random.default_rng((self.seed, draw))
        return Unit(unit.record, choose(unit.expressions, self.units.max_expressions, rng)), rng


def _groups(ids: Sequence[int], unit: str) -> list[tuple[int, ...]]:
    groups = {}
    for index, ref_id in enumerate(ids):
        key = {"sentence": index, "referent": ref_id, "image": None}[unit]
        groups.setdefault(key, []).append(index)
    return [tuple(group) for group in groups.values()]
