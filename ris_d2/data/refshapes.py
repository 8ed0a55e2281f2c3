"""RefShapes: rendered scenes of coloured shapes with referring expressions of known meaning.

A scene is a function of (options, seed, split, index) alone: image i is the same however many
images are made, on any machine. An expression is made from a meaning (``Find``, ``Nth`` ...), which
``evaluate`` interprets on the scene; only meanings that hold clearly (``MARGIN``) get words.
``write`` stores the scenes in the exact formats of RefCOCO and gRefCOCO (see datasets/README.md).
"""

import hashlib
import json
import logging
import os
import pickle
from dataclasses import asdict, dataclass, field
from math import cos, pi, sin
from typing import Any

import numpy as np

from ..io import atomic_folder, sweep_temporaries
from .refshapes_language import (
    COLORS,
    DIRECTIONS,
    KINDS,
    SIZES,
    VOCABULARY,
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

logger = logging.getLogger(__name__)

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


def _outline(kind: str) -> tuple[tuple[int, int], ...]:
    """Corners of a shape of half extent 1000 around (0, 0), integers: the same on every machine."""
    if kind == "square":
        return (-900, -900), (900, -900), (900, 900), (-900, 900)
    if kind == "triangle":
        return (-1000, 900), (0, -900), (1000, 900)
    if kind == "diamond":
        return (-800, 0), (0, -1000), (800, 0), (0, 1000)
    if kind == "cross":
        a, b = 380, 1000
        return (
            (-a, -b), (a, -b), (a, -a), (b, -a), (b, a), (a, a),
            (a, b), (-a, b), (-a, a), (-b, a), (-b, -a), (-a, -a),
        )  # fmt: skip
    corners, inner = (10, 420) if kind == "star" else (32, 1000)
    return tuple(
        (
            round((inner if i % 2 else 1000) * sin(2 * pi * i / corners)),
            round((inner if i % 2 else 1000) * -cos(2 * pi * i / corners)),
        )
        for i in range(corners)
    )


_OUTLINES = {kind: _outline(kind) for kind in KINDS}


def _corners(shape: Shape) -> list[tuple[int, int]]:
    """Corners in hundredths of a pixel."""
    # Upright edges lie between pixels, or the mask would be up to half a pixel off all along them.
    step = 100 if shape.kind in ("square", "cross") else 1

    def at(centre: int, offset: int) -> int:
        return 100 * centre + (offset * shape.radius + 5 * step) // (10 * step) * step

    return [(at(shape.x, x), at(shape.y, y)) for x, y in _OUTLINES[shape.kind]]


def polygon(shape: Shape) -> list[float]:
    """COCO polygon [x0, y0, x1, y1, ...] in pixels, multiples of 0.01."""
    return [value / 100 for corner in _corners(shape) for value in corner]


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
        low, high = (round(bound * unit) for bound in SIZES[size])
        radius = low + rng.below(high - low + 1)
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


def _express(scene: Scene, options: Options, rng: Rng) -> tuple[Expression, ...]:
    """Draw the expressions of a scene, the shares of no and multi target met on average."""
    number = options.min_expressions + rng.below(
        options.max_expressions - options.min_expressions + 1
    )
    none = int(number * options.no_target_share + rng.random())
    multi = min(int(number * options.multi_target_share + rng.random()), number - none)
    family = FAMILIES.get(scene.split)
    expressions: list[Expression] = []
    for wanted in ("none",) * none + ("multi",) * multi + ("single",) * (number - none - multi):
        forms = [form for form, weight in _FORMS[wanted].items() for _ in range(weight)]
        # The form stays for a number of tries, or easy forms would crowd out the others.
        for attempt in range(240):
            if attempt % 24 == 0:
                form = rng.pick(forms)
            meaning = _propose(form, wanted, scene, options, rng)
            try:
                targets = tuple(sorted(evaluate(meaning, scene)))
            except Unclear:
                continue
            shapes = [scene.shapes[i] for i in targets]
            if (
                wanted != ("none", "single", "multi")[min(len(targets), 2)]
                or not _plausible(meaning, wanted, scene)
                or (family and any(s.kind not in family for s in shapes))
                or (scene.split != "heldout" and _names_heldout(meaning))
                or (
                    scene.split == "heldout"
                    and shapes
                    and all((s.color, s.kind) not in HELDOUT for s in shapes)
                )
                # RefCOCO's objects have about three sentences each.
                or sum(e.targets == targets for e in expressions) >= (3 if targets else number)
            ):
                continue
            plural = wanted == "multi" or (wanted == "none" and rng.chance(0.2))
            text = phrase(meaning, scene, rng, plural=plural)
            if all(text != e.text for e in expressions):
                expressions.append(Expression(text, meaning, targets))
                break
    return tuple(expressions)


def generate(split: str, number: int, options: Options = Options()) -> list[Scene]:
    """Return the first ``number`` scenes of ``split`` with their expressions.

    Raises ``ValueError`` for an unknown split, or where the shapes asked for do not fit.
    """
    _check_split(split)
    scenes = []
    for index in range(number):
        rng = Rng("refshapes", options.seed, split, index)
        shape_number = options.min_shapes + rng.below(options.max_shapes - options.min_shapes + 1)
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


def _check_split(split: str) -> None:
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


def _image_id(scene: Scene) -> int:
    return (SPLITS.index(scene.split) + 1) * 1_000_000 + scene.index


def instances(scenes: list[Scene]) -> dict:
    """COCO ``instances.json`` of the scenes: images, one annotation per shape, categories."""
    images, annotations = [], []
    for scene in scenes:
        image_id = _image_id(scene)
        name = f"COCO_train2014_{image_id:012d}.jpg"
        images.append(
            {"id": image_id, "file_name": name, "height": scene.side, "width": scene.side}
        )
        for number, shape in enumerate(scene.shapes):
            corners = _corners(shape)
            # In integers: float sums are not the same in every Python.
            shoelace = sum(
                a[0] * b[1] - b[0] * a[1] for a, b in zip(corners, corners[1:] + corners)
            )
            (left, right), (top, bottom) = ((min(v), max(v)) for v in zip(*corners))
            annotations.append(
                {
                    "id": image_id * 10 + number,
                    "image_id": image_id,
                    "category_id": KINDS.index(shape.kind) + 1,
                    "segmentation": [polygon(shape)],
                    "area": abs(shoelace) / 20_000,
                    "bbox": [v / 100 for v in (left, top, right - left, bottom - top)],
                    "iscrowd": 0,
                }
            )
    categories = [
        {"supercategory": "shape", "id": i + 1, "name": kind} for i, kind in enumerate(KINDS)
    ]
    return {
        "info": {"description": "RefShapes"},
        "images": images,
        "annotations": annotations,
        "categories": categories,
    }


def references(scenes: list[Scene], *, generalized: bool) -> list[dict]:
    """RefCOCO's refs (single targets only) or, if ``generalized``, gRefCOCO's.

    A ref has the sentences of one set of targets; one without target is a ref of its own.
    """
    refs = []
    for scene in scenes:
        image_id = _image_id(scene)
        groups: dict[tuple, list[int]] = {}
        for number, expression in enumerate(scene.expressions):
            if generalized or len(expression.targets) == 1:
                key = expression.targets or ("no target", number)
                groups.setdefault(key, []).append(number)
        for place, numbers in enumerate(groups.values()):
            targets = scene.expressions[numbers[0]].targets
            ann_ids = [image_id * 10 + target for target in targets]
            categories = [KINDS.index(scene.shapes[target].kind) + 1 for target in targets]
            ref = {
                "ref_id": image_id * 100 + place,
                "image_id": image_id,
                "file_name": f"COCO_train2014_{image_id:012d}_{place}.jpg",
                "split": scene.split,
                "sent_ids": [image_id * 100 + number for number in numbers],
                "sentences": [
                    {
                        "raw": scene.expressions[number].text,
                        "sent": scene.expressions[number].text,
                        "sent_id": image_id * 100 + number,
                        "tokens": scene.expressions[number].text.split(),
                    }
                    for number in numbers
                ],
            }
            if generalized:
                ref |= {
                    "ann_id": ann_ids or [-1],
                    "category_id": categories or [-1],
                    "no_target": not targets,
                }
            else:
                ref |= {"ann_id": ann_ids[0], "category_id": categories[0]}
            refs.append(ref)
    return refs


def write_tokenizer(directory: str) -> None:
    """Write a word-level tokenizer of VOCABULARY: <s> 0, <pad> 1, </s> 2, <unk> 3."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

    special = ["<s>", "<pad>", "</s>", "<unk>"]
    vocabulary = {word: i for i, word in enumerate([*special, *VOCABULARY])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.add_special_tokens(special)
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 2)]
    )
    os.makedirs(directory, exist_ok=True)
    tokenizer.save(os.path.join(directory, "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": 512,
        **dict(bos_token="<s>", pad_token="<pad>", eos_token="</s>", unk_token="<unk>"),
    }
    with open(os.path.join(directory, "tokenizer_config.json"), "w") as file:
        json.dump(config, file, indent=2)


def write(
    root: str, numbers: dict[str, int], options: Options = Options(), *, overwrite: bool = False
) -> bool:
    """Write ``numbers[split]`` scenes per split under ``root``, laid out as a real dataset root.

    images/train2014/*.jpg, refcoco/refs(unc).p and instances.json (without "heldout"),
    grefcoco/grefs(unc).json and instances.json, tokenizer/, refshapes.json with the options. The
    tree appears whole or not at all. Returns False where the same set is there already.

    Raises ``FileExistsError`` where another set (unless ``overwrite``) or anything else is there.
    """
    import cv2

    for split in numbers:
        _check_split(split)
    root = os.path.abspath(root)
    made = {
        "version": 1,
        "numbers": {split: numbers.get(split, 0) for split in SPLITS},
        **asdict(options),
    }
    _check_free(root, made, overwrite)
    if os.path.isdir(root) and _made(root) == made and not overwrite:
        logger.info("RefShapes is in %s already", root)
        return False
    scenes = {split: generate(split, made["numbers"][split], options) for split in SPLITS}
    everything = [scene for split in SPLITS for scene in scenes[split]]
    published = [scene for scene in everything if scene.split != "heldout"]

    for path in sweep_temporaries(os.path.dirname(root)):
        logger.info("Removed %s, which a killed process left", path)
    with atomic_folder(root) as partial:
        for folder in ("images/train2014", "refcoco", "grefcoco"):
            os.makedirs(os.path.join(partial, folder))
        for scene in everything:
            path = f"{partial}/images/train2014/COCO_train2014_{_image_id(scene):012d}.jpg"
            pixels = render(scene, options)[..., ::-1]
            if not cv2.imwrite(path, pixels, [cv2.IMWRITE_JPEG_QUALITY, 95]):
                raise OSError(f"cannot write {path}")
        _dump(f"{partial}/refcoco/instances.json", instances(published))
        _dump(f"{partial}/grefcoco/instances.json", instances(everything))
        _dump(f"{partial}/grefcoco/grefs(unc).json", references(everything, generalized=True))
        # Through json, or the bytes would depend on which equal strings are one object.
        refs = json.loads(json.dumps(references(published, generalized=False)))
        with open(f"{partial}/refcoco/refs(unc).p", "wb") as file:
            pickle.dump(refs, file, protocol=2)
        write_tokenizer(f"{partial}/tokenizer")
        _dump(f"{partial}/refshapes.json", made)
    return True


def _dump(path: str, value: object) -> None:
    with open(path, "w") as file:
        json.dump(value, file)


_TREE = ("images", "refcoco", "grefcoco", "tokenizer", "refshapes.json")


def _made(root: str) -> dict | None:
    """The options that ``root`` was written with, or None."""
    try:
        with open(os.path.join(root, "refshapes.json")) as file:
            return json.load(file)
    except (OSError, ValueError):
        return None


def _check_free(root: str, made: dict, overwrite: bool) -> None:
    if not os.path.exists(root) or (os.path.isdir(root) and not os.listdir(root)):
        return
    there = _made(root)
    if there is None:
        raise FileExistsError(
            f"{root} exists and was not written by RefShapes; choose another --root"
        )
    strangers = sorted({*os.listdir(root)} - {*_TREE})
    if overwrite and strangers:
        raise FileExistsError(
            f"{root} also holds {', '.join(strangers[:3])}, which RefShapes did not write; move it, or "
            "choose another --root"
        )
    if there != made and not overwrite:
        different = [k for k in made if there.get(k) != made[k]]
        raise FileExistsError(
            f"{root} holds a RefShapes set with other options ({', '.join(different)}); "
            "pass --overwrite to replace it, or choose another --root"
        )
