"""What can be said about a RefShapes scene: meanings, their interpretation, and their wording."""

import random
from dataclasses import dataclass

COLORS = {  # RGB
    "red": (205, 40, 40),
    "green": (40, 150, 60),
    "blue": (45, 75, 205),
    "yellow": (240, 220, 50),
    "purple": (140, 50, 170),
    "orange": (245, 140, 30),
    "white": (245, 245, 245),
    "black": (20, 20, 20),
}
KINDS = ("circle", "square", "triangle", "star", "diamond", "cross")
SIZES = {"small": (8, 9), "big": (13, 15)}  # half extent in 1/96 of the image's side
DIRECTIONS = ("left", "right", "top", "bottom")
# Least difference of two positions that are compared, as a share of the image's side.
MARGIN = 0.06


@dataclass(frozen=True)
class Shape:
    """One shape; ``x``, ``y`` (centre) and ``radius`` (half extent) in pixels."""

    kind: str
    color: str
    size: str
    x: int
    y: int
    radius: int


# Meanings: what an expression says, free of its wording.


@dataclass(frozen=True)
class Find:
    """All shapes with the given attributes; None is any."""

    kind: str | None = None
    color: str | None = None
    size: str | None = None


@dataclass(frozen=True)
class Nth:
    """The rank-th (1-based) of ``of``, counted from the left, right, top or bottom."""

    of: Find
    rank: int
    direction: str


@dataclass(frozen=True)
class Side:
    """Those of ``of`` whose centre is in the left, right, top or bottom half."""

    of: Find
    direction: str


@dataclass(frozen=True)
class Relation:
    """Those of ``of`` that are left, right, above or below (top, bottom) of the one ``anchor``."""

    of: Find
    direction: str
    anchor: Find


@dataclass(frozen=True)
class Pair:
    """One shape and another one."""

    first: Find
    second: Find


@dataclass(frozen=True)
class Except:
    """All of ``of`` but those of ``but``."""

    of: Find
    but: Find


@dataclass(frozen=True)
class Count:
    """The ``number`` shapes of ``of``; nothing where there are fewer."""

    of: Find
    number: int


Meaning = Find | Nth | Side | Relation | Pair | Except | Count


@dataclass(frozen=True)
class Expression:
    """A sentence, its meaning, and the indices of the shapes it refers to (empty: no target)."""

    text: str
    meaning: Meaning
    targets: tuple[int, ...]


@dataclass(frozen=True)
class Scene:
    split: str
    index: int
    side: int  # of the square image, pixels
    shapes: tuple[Shape, ...]
    expressions: tuple[Expression, ...] = ()


class Unclear(ValueError):
    """The meaning does not hold clearly in the scene: too close to call, or an ambiguous part."""


def _along(shape: Shape, direction: str) -> int:
    """Coordinate that grows away from the side ``direction``."""
    value = shape.x if direction in ("left", "right") else shape.y
    return value if direction in ("left", "top") else -value


def evaluate(meaning: Meaning, scene: Scene) -> frozenset[int]:
    """Return the indices of the shapes that ``meaning`` refers to in ``scene``; empty is no target.

    Raises ``Unclear`` where positions differ by less than MARGIN of the side, or a part that has to
    be one shape is several.
    """
    shapes, margin = scene.shapes, MARGIN * scene.side

    def before(a: float, b: float) -> bool:
        if abs(a - b) < margin:
            raise Unclear(f"{meaning}: {a} and {b} are too close to call")
        return a < b

    match meaning:
        case Find(kind, color, size):
            return frozenset(
                i
                for i, s in enumerate(shapes)
                if kind in (None, s.kind) and color in (None, s.color) and size in (None, s.size)
            )
        case Nth(of, rank, direction):
            found = sorted(evaluate(of, scene), key=lambda i: _along(shapes[i], direction))
            along = [_along(shapes[i], direction) for i in found[: rank + 1]]
            for a, b in zip(along, along[1:]):
                before(a, b)  # raises where the order is too close to call
            return frozenset(found[rank - 1 : rank])
        case Side(of, direction):
            middle = scene.side / 2 if direction in ("left", "top") else -scene.side / 2
            found = evaluate(of, scene)
            return frozenset(i for i in found if before(_along(shapes[i], direction), middle))
        case Relation(of, direction, anchor):
            anchors = evaluate(anchor, scene)
            if len(anchors) > 1:
                raise Unclear(f"{meaning}: several anchors")
            return frozenset(
                i
                for a in anchors
                for i in evaluate(of, scene) - anchors
                if before(_along(shapes[i], direction), _along(shapes[a], direction))
            )
        case Pair(first, second):
            parts = evaluate(first, scene), evaluate(second, scene)
            both = parts[0] | parts[1]
            if both and not (len(parts[0]) == len(parts[1]) == 1 and len(both) == 2):
                raise Unclear(f"{meaning}: not one and another one")
            return both
        case Except(of, but):
            found, left_out = evaluate(of, scene), evaluate(but, scene)
            if not left_out or not left_out < found:
                raise Unclear(f"{meaning}: nothing to leave out, or nothing left")
            return found - left_out
        case Count(of, number):
            found = evaluate(of, scene)
            if len(found) > number:
                raise Unclear(f"{meaning}: there are more")
            return found if len(found) == number else frozenset()
    raise TypeError(f"not a meaning: {meaning!r}")


class Rng:
    """Draws from ``random.Random.random`` only, the one stream Python promises to keep."""

    def __init__(self, *key: object) -> None:
        self.random = random.Random("/".join(map(str, key))).random

    def below(self, number: int) -> int:
        return int(self.random() * number)

    def between(self, low: int, high: int) -> int:
        return low + self.below(high - low + 1)

    def pick(self, options):
        return options[self.below(len(options))]

    def chance(self, probability: float) -> bool:
        return self.random() < probability

    def sample(self, options, number: int) -> list:
        rest = list(options)
        return [rest.pop(self.below(len(rest))) for _ in range(min(number, len(rest)))]


# Wording. Left and right words are whole words or leftmost and rightmost, so that a mirrored image
# can have them exchanged.

_SIZE_WORDS = {"small": ("small", "little"), "big": ("big", "large")}
_MOST = {
    "left": ("leftmost",),
    "right": ("rightmost",),
    "top": ("topmost", "highest"),
    "bottom": ("bottommost", "lowest"),
}
_HALF = {
    "left": ("in the left half", "on the left side"),
    "right": ("in the right half", "on the right side"),
    "top": ("in the top half", "in the upper half"),
    "bottom": ("in the bottom half", "in the lower half"),
}
_RELATION = {
    "left": ("left of", "to the left of"),
    "right": ("right of", "to the right of"),
    "top": ("above", "higher than"),
    "bottom": ("below", "under"),
}
_NOUNS = (*KINDS, "shape", "object")
_ORDINALS = ("first", "second", "third")
_NUMBERS = {2: "two", 3: "three", 4: "four"}


def _plural(noun: str) -> str:
    return noun + ("es" if noun == "cross" else "s")


def _noun(find: Find, rng: Rng, *, plural: bool, relative: bool = False) -> str:
    """Words for ``find`` without article; ``relative`` allows "circle that is red"."""
    head = find.kind or rng.pick(("shape", "object"))
    head = _plural(head) if plural else head
    size = [rng.pick(_SIZE_WORDS[find.size])] if find.size else []
    if relative and find.color and rng.chance(0.25):
        return " ".join([*size, head, "that", "are" if plural else "is", find.color])
    return " ".join([*size, *([find.color] if find.color else []), head])


def phrase(meaning: Meaning, scene: Scene, rng: Rng, *, plural: bool) -> str:
    """Put a meaning into words; ``plural`` where it refers, or would refer, to several shapes."""
    the = rng.pick(("all ", "all the ", "the ", "")) if plural else rng.pick(("the ", "the ", ""))
    match meaning:
        case Find():
            if plural and rng.chance(0.2):
                return "every " + _noun(meaning, rng, plural=False, relative=True)
            return the + _noun(meaning, rng, plural=plural, relative=True)
        case Nth(of, rank, direction):
            the, noun = rng.pick(("the ", "")), _noun(of, rng, plural=False)
            if rank > 1 or rng.chance(0.2):
                return f"{the}{_ORDINALS[rank - 1]} {noun} from the {direction}"
            if len(evaluate(of, scene)) == 2 and rng.chance(0.5):
                return f"{the}{direction} {noun}"
            if rng.chance(0.3):
                return f"{the}{noun} farthest to the {direction}"
            return f"{the}{rng.pick(_MOST[direction])} {noun}"
        case Side(of, direction):
            return f"{the}{_noun(of, rng, plural=plural)} {rng.pick(_HALF[direction])}"
        case Relation(of, direction, anchor):
            that = rng.pick(("", "", "that are " if plural else "that is "))
            there = f"{that}{rng.pick(_RELATION[direction])}"
            noun = _noun(of, rng, plural=plural)
            return f"{the}{noun} {there} the {_noun(anchor, rng, plural=False)}"
        case Pair(first, second):
            # Without the second article, "big red circle and square" could be a big red square.
            nouns = [_noun(part, rng, plural=False) for part in (first, second)]
            return f"{rng.pick(('the ', ''))}{nouns[0]} and the {nouns[1]}"
        case Except(of, but):
            several = len(evaluate(but, scene)) > 1
            but_word = rng.pick(("but", "except"))
            if of == Find():
                everything = rng.pick(("everything", "everything", "all shapes", "all the objects"))
                return f"{everything} {but_word} the {_noun(but, rng, plural=several)}"
            ones = "ones" if several else "one"
            every = rng.pick(("all ", "all the ")) + _noun(of, rng, plural=True)
            return f"{every} {but_word} the {but.color} {ones}"
        case Count(of, number):
            noun = _noun(of, rng, plural=True)
            if number == 2 and rng.chance(0.25):
                return f"both {noun}"
            the = rng.pick(("the ", "", "all ") if number > 2 else ("the ", ""))
            return f"{the}{_NUMBERS[number]} {noun}"
    raise TypeError(f"not a meaning: {meaning!r}")


_TABLES = _SIZE_WORDS, _MOST, _HALF, _RELATION
_OTHER_WORDS = """the all every both that is are from farthest to and
everything but except one ones"""
# Every word that ``phrase`` can say, sorted.
VOCABULARY = tuple(
    sorted(
        {*COLORS, *DIRECTIONS, *_ORDINALS, *_NUMBERS.values(), *_OTHER_WORDS.split(), *_NOUNS}
        | {_plural(noun) for noun in _NOUNS}
        | {w for t in _TABLES for phrases in t.values() for p in phrases for w in p.split()}
    )
)
