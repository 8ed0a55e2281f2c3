"""RefShapes: rendered scenes of coloured shapes with referring expressions of known meaning.

A scene is a function of (options, seed, split, index) alone: image i is the same however many
images are made, on any machine. An expression is made from a meaning (``Find``, ``Nth`` ...), which
``evaluate`` interprets on the scene; only meanings that hold clearly (``MARGIN``) get words.
"""

import hashlib
from dataclasses import dataclass, field
from math import cos, pi, sin
from typing import Any

import numpy as np

from .language import (
    COLORS,
    DIRECTIONS,
    KINDS,
    SIZES,
    Count,
    Except,
    Expression,
    Find,
    Meaning,
    Nth,
    Pair,
    Relation,
    Rng,
    Scene,
    Shape,
    Side,
    Unclear,
    evaluate,
    phrase,
)

# testA and testB differ in what is referred to, as RefCOCO's do (there: people, other objects).
FAMILIES = {"testA": ("circle", "square"), "testB": ("triangle", "star", "diamond", "cross")}
# In no scene and no sentence but those of "heldout", where every set of targets has one of them.
HELDOUT = (
    ("red", "triangle"),
    ("green", "star"),
    ("blue", "circle"),
    ("yellow", "square"),
    ("purple", "star"),
    ("orange", "circle"),
    ("white", "diamond"),
    ("black", "cross"),
)
SPLITS = ("train", "val", "testA", "testB", "heldout")


def _around(corners: int, inner: int) -> tuple[tuple[int, int], ...]:
    """So many corners around (0, 0), by turns at a distance of 1000 and of ``inner``."""
    turns = [(inner if i % 2 else 1000, 2 * pi * i / corners) for i in range(corners)]
    return tuple((round(r * sin(angle)), round(r * -cos(angle))) for r, angle in turns)


# Corners of shapes of half extent 1000 around (0, 0), integers: the same on every machine.
_OUTLINES = {
    "circle": _around(32, 1000),
    "square": ((-900, -900), (900, -900), (900, 900), (-900, 900)),
    "triangle": ((-1000, 900), (0, -900), (1000, 900)),
    "star": _around(10, 420),
    "diamond": ((-800, 0), (0, -1000), (800, 0), (0, 1000)),
    "cross": (
        (-380, -1000), (380, -1000), (380, -380), (1000, -380), (1000, 380), (380, 380),
        (380, 1000), (-380, 1000), (-380, 380), (-1000, 380), (-1000, -380), (-380, -380),
    ),
}  # fmt: skip


def integer_corners(shape: Shape) -> list[tuple[int, int]]:
    """Corners in hundredths of a pixel."""
    # Upright edges lie between pixels, or the mask would be up to half a pixel off all along them.
    step = 100 if shape.kind in ("square", "cross") else 1

    def at(centre: int, offset: int) -> int:
        return 100 * centre + (offset * shape.radius + 5 * step) // (10 * step) * step

    return [(at(shape.x, x), at(shape.y, y)) for x, y in _OUTLINES[shape.kind]]


def polygon(shape: Shape) -> list[float]:
    """COCO polygon [x0, y0, x1, y1, ...] in pixels, multiples of 0.01."""
    return [value / 100 for corner in integer_corners(shape) for value in corner]


def _option(default: float, help_text: str) -> Any:
    return field(default=default, metadata={"help": help_text})


@dataclass(frozen=True, kw_only=True)
class Options:
    """What is drawn and said; ``ValueError`` names the option that is out of range."""

    size: int = _option(96, "side of the square images in pixels")
    min_shapes: int = _option(3, "shapes per scene, at least")
    max_shapes: int = _option(8, "shapes per scene, at most (9)")
    colors: int = _option(6, f"the first so many of {', '.join(COLORS)}")
    kinds: int = _option(6, f"the first so many of {', '.join(KINDS)}")
    min_expressions: int = _option(6, "expressions per scene, at least")
    max_expressions: int = _option(8, "expressions per scene, at most (20)")
    no_target_share: float = _option(0.25, "of the expressions")
    multi_target_share: float = _option(0.25, "of the expressions")
    noise: float = _option(6.0, "standard deviation of the pixel noise, of 255")
    texture: float = _option(16.0, "amplitude of the background's clouds, of 255")
    seed: int = _option(0, "of everything")

    def __post_init__(self) -> None:
        shares = self.no_target_share, self.multi_target_share
        expressions = self.min_expressions, self.max_expressions
        for ok, what in (
            (self.size >= 48, "size must be at least 48 pixels"),
            (2 <= self.min_shapes <= self.max_shapes <= 9, "shapes: 2 <= min <= max <= 9"),
            (4 <= self.colors <= len(COLORS), f"colors must be 4 to {len(COLORS)}"),
            (4 <= self.kinds <= len(KINDS), f"kinds must be 4 to {len(KINDS)}"),
            (1 <= expressions[0] <= expressions[1] <= 20, "expressions: 1 <= min <= max <= 20"),
            (min(shares) >= 0 and sum(shares) < 1, "shares must be >= 0 and add up to less than 1"),
            (self.noise >= 0 and self.texture >= 0, "noise and texture must not be negative"),
        ):
            if not ok:
                raise ValueError(f"RefShapes options: {what}, but they are {self}")


@dataclass(frozen=True, kw_only=True)
class BalancedOptions(Options):
    """Every scene has ``per_form`` sentences of each form; min and max_expressions do not count.

    ``no_target_share`` of all have no target (none of ``Except``), and where a form can have one or
    several, a third have several.
    """

    per_form: int = _option(1, "sentences of each form per scene")


@dataclass(frozen=True, kw_only=True)
class Benchmark:
    """A set that never changes under its name: another one gets another name."""

    scenes: dict[str, int]  # per split
    options: Options


BENCHMARKS = {
    "hard-v1": Benchmark(
        scenes={"train": 6000, "val": 500, "testA": 500, "testB": 500, "heldout": 500},
        options=BalancedOptions(size=128, min_shapes=5, max_shapes=8, colors=8, per_form=1),
    )
}


def _place(split: str, number: int, options: Options, rng: Rng) -> tuple[Shape, ...] | None:
    """Draw the shapes of a scene, or None when they do not fit."""
    # A scene keeps to a few colours and kinds: only then does one word not give the target away.
    colors = rng.sample(list(COLORS)[: options.colors], 2 + rng.below(3))
    kinds = rng.sample(KINDS[: options.kinds], 2 + rng.below(2))
    pairs = [(c, k) for c in colors for k in kinds if (c, k) not in HELDOUT]
    wanted = FAMILIES.get(split, ())
    favoured = [(c, k) for c, k in pairs if k in wanted]
    if split == "heldout":
        favoured = [pair for pair in HELDOUT if pair[0] in colors and pair[1] in kinds]
    if not pairs or (split in ("testA", "testB", "heldout") and not favoured):
        return None
    shapes: list[Shape] = []
    unit = options.size / 96
    for i in range(number):
        if favoured and (i < 2 or rng.chance(0.4)):
            color, kind = rng.pick(favoured)
        else:
            color, kind = rng.pick(pairs)
        size = "big" if rng.chance(0.45) else "small"
        radius = rng.between(*(round(bound * unit) for bound in SIZES[size]))
        for _ in range(40):
            x, y = (radius + 1 + rng.below(options.size - 2 * radius - 1) for _ in range(2))
            if all(
                max(abs(x - s.x), abs(y - s.y)) >= radius + s.radius + round(2 * unit)
                for s in shapes
            ):
                shapes.append(Shape(kind, color, size, x, y, radius))
                break
        else:
            return None
    return tuple(shapes)


# How often each form is tried, per number of targets.
_FORMS = {
    "single": {Find: 4, Nth: 3, Side: 2, Relation: 4},
    "multi": {Find: 3, Count: 3, Pair: 3, Except: 3, Side: 2, Relation: 2},
    "none": {Find: 5, Relation: 4, Nth: 2, Side: 2, Count: 1, Pair: 1},
}
FORMS = (Find, Side, Nth, Relation, Pair, Except, Count)


def _describe(scene: Scene, options: Options, rng: Rng, *, mixed: bool = False) -> Find:
    """Attributes of one shape, or (``mixed``) each from any shape, or a colour from none."""
    base = rng.pick(scene.shapes)
    other = rng.pick(scene.shapes) if mixed else base
    color, kind, size = other.color, base.kind, other.size
    if mixed and rng.chance(0.1):
        color = rng.pick(list(COLORS)[: options.colors])
    if rng.chance(0.12):
        return Find(None, color, size if rng.chance(0.4) else None)
    return Find(kind, color if rng.chance(0.65) else None, size if rng.chance(0.3) else None)


def _propose(form: type, wanted: str, scene: Scene, options: Options, rng: Rng) -> Meaning:
    """Draw a meaning of the given form; whether it holds, ``evaluate`` has to say."""
    none = wanted == "none"
    of = _describe(scene, options, rng, mixed=none and (form in (Find, Pair) or rng.chance(0.3)))
    direction = rng.pick(DIRECTIONS)
    if form is Find:
        return of
    if form is Nth:
        rank = 1 if rng.chance(0.5) else 2 + rng.below(2)
        return Nth(of, len(evaluate(of, scene)) + 1 if none else rank, direction)
    if form is Side:
        return Side(of, direction)
    if form is Relation:
        anchor = _describe(scene, options, rng, mixed=none and rng.chance(0.2))
        return Relation(of, direction, anchor)
    if form is Pair:
        return Pair(of, _describe(scene, options, rng, mixed=none))
    if form is Except:
        if rng.chance(0.6):
            return Except(Find(), of)
        return Except(Find(of.kind), Find(of.kind, rng.pick(scene.shapes).color))
    return Count(of, len(evaluate(of, scene)) + none)


def _plausible(meaning: Meaning, wanted: str, scene: Scene) -> bool:
    """Whether a person might say it: an order needs two to compare, a count a number above one."""
    match meaning:
        case Nth(of, rank, _):
            return rank <= 3 if wanted == "none" else len(evaluate(of, scene)) >= 2
        case Count(of, number):
            return 2 <= number <= 4 and len(evaluate(of, scene)) > 0
        case Relation(of, _, anchor):
            found = evaluate(of, scene)
            return not found or not found <= evaluate(anchor, scene)
        case Except(of, but):
            return of.kind == but.kind or of == Find()
        case Pair(first, second):
            return first != second
    return True


def _names_heldout(meaning: Meaning) -> bool:
    parts = [v for v in vars(meaning).values() if isinstance(v, Find)] or [meaning]
    return any((part.color, part.kind) in HELDOUT for part in parts)


def _names_side_alone(meaning: Meaning, text: str) -> bool:
    """Whether an order is said as a place: "the left circle"."""
    words = text.split()
    return (
        isinstance(meaning, Nth)
        and meaning.direction in words
        and not {"from", "farthest"} & {*words}
    )


def _plan(options: Options, rng: Rng) -> list[tuple[str, list[type]]]:
    """Draw each sentence's number of targets ("none", "single", "multi") and its possible forms."""
    if isinstance(options, BalancedOptions):
        return _balanced_plan(options, rng)
    number = rng.between(options.min_expressions, options.max_expressions)
    none = int(number * options.no_target_share + rng.random())
    multi = min(int(number * options.multi_target_share + rng.random()), number - none)
    wanted = ("none",) * none + ("multi",) * multi + ("single",) * (number - none - multi)
    return [(w, [f for f, weight in _FORMS[w].items() for _ in range(weight)]) for w in wanted]


def _balanced_plan(options: BalancedOptions, rng: Rng) -> list[tuple[str, list[type]]]:
    numbers = ("single", "single", "multi")
    forms = {form: [w for w in numbers if form in _FORMS[w]] for form in FORMS}
    absent_share = options.no_target_share * len(forms) / len(_FORMS["none"])
    plan = []
    for form in [form for form in forms for _ in range(options.per_form)]:
        absent = form in _FORMS["none"] and rng.chance(absent_share)
        plan.append(("none" if absent else rng.pick(forms[form]), [form]))
    return plan


def _express(scene: Scene, options: Options, rng: Rng) -> tuple[Expression, ...]:
    """Draw the expressions of a scene, the shares of no and multi target met on average.

    A balanced scene that has no sentence of some form has none at all.
    """
    plan, is_balanced = _plan(options, rng), isinstance(options, BalancedOptions)
    family = FAMILIES.get(scene.split)
    expressions: list[Expression] = []
    for wanted, forms in plan:
        # The form stays for a number of tries, or easy forms would crowd out the others.
        for attempt in range(240):
            if attempt % 24 == 0:
                form = rng.pick(forms)
            meaning = _propose(form, wanted, scene, options, rng)
            try:
                targets = tuple(sorted(evaluate(meaning, scene)))
            except Unclear:
                continue
            meant = {(scene.shapes[i].color, scene.shapes[i].kind) for i in targets}
            if (
                wanted != ("none", "single", "multi")[min(len(targets), 2)]
                or not _plausible(meaning, wanted, scene)
                or (family and any(kind not in family for _, kind in meant))
                or (scene.split != "heldout" and _names_heldout(meaning))
                or (scene.split == "heldout" and meant and meant.isdisjoint(HELDOUT))
                # RefCOCO's objects have about three sentences each.
                or sum(e.targets == targets for e in expressions) >= (3 if targets else len(plan))
            ):
                continue
            plural = wanted == "multi" or (wanted == "none" and rng.chance(0.2))
            text = phrase(meaning, scene, rng, plural=plural)
            if is_balanced and _names_side_alone(meaning, text):
                continue
            if all(text != e.text for e in expressions):
                expressions.append(Expression(text, meaning, targets))
                break
        else:
            if is_balanced:
                return ()
    return tuple(expressions)


def generate(split: str, number: int, options: Options = Options()) -> list[Scene]:
    """Return the first ``number`` scenes of ``split`` with their expressions.

    Raises ``ValueError`` for an unknown split, or where the shapes asked for do not fit.
    """
    check_split(split)
    scenes = []
    for index in range(number):
        rng = Rng("refshapes", options.seed, split, index)
        shape_number = rng.between(options.min_shapes, options.max_shapes)
        for _ in range(1000):
            shapes = _place(split, shape_number, options, rng)
            if shapes is None:
                continue
            scene = Scene(split, index, options.size, shapes)
            expressions = _express(scene, options, rng)
            if any(e.targets for e in expressions):
                scenes.append(Scene(split, index, options.size, shapes, expressions))
                break
        else:
            raise ValueError(f"no scene of {split} fits {options}; ask for fewer shapes")
    return scenes


def check_split(split: str) -> None:
    """Raise ``ValueError`` for a split that there is not."""
    if split not in SPLITS:
        raise ValueError(f"unknown RefShapes split {split!r}; there are {', '.join(SPLITS)}")


def render(scene: Scene, options: Options = Options()) -> np.ndarray:
    """Draw a scene: uint8 (side, side, 3) RGB, anti-aliased, clouds behind and noise over all."""
    import cv2

    seed = hashlib.sha256(f"{options.seed}/{scene.split}/{scene.index}".encode()).digest()
    rng = np.random.Generator(np.random.PCG64(int.from_bytes(seed[:8], "big")))
    side, scale = scene.side, 8
    clouds = (
        rng.uniform(-1, 1, (6, 6, 1)) * options.texture
        + rng.uniform(-1, 1, (6, 6, 3)) * options.texture / 3
    )
    background = cv2.resize(clouds.astype(np.float32), (side, side), interpolation=cv2.INTER_CUBIC)
    background += rng.uniform(95, 165) + rng.uniform(-12, 12, 3).astype(np.float32)
    canvas = np.zeros((side * scale, side * scale, 4), np.uint8)  # RGB and coverage
    for shape in scene.shapes:
        color = np.clip(np.array(COLORS[shape.color]) + rng.uniform(-14, 14, 3), 0, 255)
        # In COCO polygons a pixel spans [i, i + 1), cv2 counts from its centre; 4 bits of fraction.
        corners = (np.array(polygon(shape)).reshape(-1, 2) * scale - 0.5) * 16
        cv2.fillPoly(canvas, [np.round(corners).astype(np.int32)], (*color.tolist(), 255), shift=4)
    canvas = cv2.resize(canvas, (side, side), interpolation=cv2.INTER_AREA).astype(np.float32)
    image = background * (1 - canvas[..., 3:] / 255) + canvas[..., :3]
    image += rng.standard_normal((side, side, 3), dtype=np.float32) * options.noise
    return np.clip(image + 0.5, 0, 255).astype(np.uint8)
