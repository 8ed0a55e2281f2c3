"""Ground truth of RefShapes, proven by reading its sentences; files; determinism."""

import hashlib
import json
import os
import re
import runpy
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
from pycocotools.coco import COCO
from ris_d2.data.grefer import load_grefer
from ris_d2.data.refer import load_refer
from ris_d2.data.tokenizer import Tokenizer
from ris_d2.io import load_json, load_pickle
from ris_d2.masks import rasterize
from ris_d2.refshapes import BENCHMARKS, SPLITS, Options, generate, polygon, render, write, writing
from ris_d2.refshapes.language import (
    COLORS,
    KINDS,
    VOCABULARY,
    Count,
    Except,
    Find,
    Nth,
    Pair,
    Relation,
    Scene,
    Shape,
    Side,
    Unclear,
    evaluate,
)
from ris_d2.refshapes.scenes import FAMILIES, HELDOUT

QUICKSTART = Options(max_shapes=5, kinds=4)
HARD = Options(colors=8, min_shapes=5, max_shapes=9)
SCRIPT = Path(__file__).parents[2] / "datasets" / "make_refshapes.py"


# A reader of the sentences that shares nothing with the generator but the shapes it looks at.

NOUN = r"((?:(?:small|little|big|large) )?(?:\w+ )??(?:\w+?))"
ALL = r"(?:all the |all |the |every )?"
GRAMMAR = (
    (rf"(?:everything|all shapes|all the objects) (?:but|except) the {NOUN}", "rest"),
    (rf"all (?:the )?{NOUN} (?:but|except) the (\w+) ones?", "other colors"),
    (rf"(?:the )?{NOUN} and the {NOUN}", "both"),
    (rf"(?:the )?(first|second|third) {NOUN} from the (\w+)", "ordinal"),
    (rf"(?:the )?{NOUN} farthest to the (\w+)", "farthest"),
    (rf"(?:the )?(\w+most|highest|lowest|left|right|top|bottom) {NOUN}", "most"),
    (rf"{ALL}{NOUN} (?:in|on) the (\w+) (?:half|side)", "half"),
    (
        rf"{ALL}{NOUN} (?:that (?:is|are) )?(?:to the )?"
        rf"(left of|right of|above|higher than|below|under) the {NOUN}",
        "relation",
    ),
    (rf"(?:the |all )?(both|two|three|four) {NOUN}", "number"),
    (rf"{ALL}{NOUN} that (?:is|are) (\w+)", "that is"),
    (rf"{ALL}{NOUN}", "plain"),
)
X_OF = {"left": 1, "leftmost": 1, "left of": 1, "right": -1, "rightmost": -1, "right of": -1}
Y_OF = {word: 1 for word in ("top", "upper", "topmost", "highest", "above", "higher than")}
Y_OF |= {word: -1 for word in ("bottom", "lower", "bottommost", "lowest", "below", "under")}


def nouns(words, shapes):
    """Indices of the shapes that "small red circle" or "red objects" names."""
    *attributes, head = words.split()
    head = {"crosses": "cross"}.get(head, head if head == "cross" else head.removesuffix("s"))
    assert head in (*KINDS, "shape", "object"), words
    found = {i for i, s in enumerate(shapes) if head in ("shape", "object") or s.kind == head}
    for word in attributes:
        size = {"little": "small", "large": "big"}.get(word, word)
        assert size in ("small", "big") or word in COLORS, words
        found = {i for i in found if size in (shapes[i].size, shapes[i].color)}
    return found


def position(shape, word):
    """Coordinate that is smallest where the word is most true."""
    return shape.x * X_OF[word] if word in X_OF else shape.y * Y_OF[word]


def read(sentence, scene):
    """What the sentence refers to in the scene."""
    shapes = scene.shapes
    for pattern, form in GRAMMAR:
        if match := re.fullmatch(pattern, sentence):
            break
    else:
        raise AssertionError(f"cannot read {sentence!r}")
    part = match.groups()

    def nth(found, number, word):
        return set(sorted(found, key=lambda i: position(shapes[i], word))[number - 1 : number])

    if form == "rest":
        return set(range(len(shapes))) - nouns(part[0], shapes)
    if form == "other colors":
        return {i for i in nouns(part[0], shapes) if shapes[i].color != part[1]}
    if form == "both":
        return nouns(part[0], shapes) | nouns(part[1], shapes)
    if form == "ordinal":
        rank = ["first", "second", "third"].index(part[0]) + 1
        return nth(nouns(part[1], shapes), rank, part[2])
    if form == "farthest":
        return nth(nouns(part[0], shapes), 1, part[1])
    if form == "most":
        return nth(nouns(part[1], shapes), 1, part[0])
    if form == "half":
        middle = scene.side / 2 * (X_OF | Y_OF)[part[1]]
        return {i for i in nouns(part[0], shapes) if position(shapes[i], part[1]) < middle}
    if form == "relation":
        anchors = nouns(part[2], shapes)
        assert len(anchors) <= 1, f"{sentence!r}: which one?"
        return {
            i
            for a in anchors
            for i in nouns(part[0], shapes) - {a}
            if position(shapes[i], part[1]) < position(shapes[a], part[1])
        }
    found = nouns(part[-1] if form == "number" else part[0], shapes)
    if form == "number":
        number = {"both": 2, "two": 2, "three": 3, "four": 4}[part[0]]
        return found if len(found) >= number else set()
    if form == "that is":
        return {i for i in found if shapes[i].color == part[1]}
    return found


OPTIONS = {"quickstart": QUICKSTART, "hard": HARD, "hard-v1": BENCHMARKS["hard-v1"].options}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("split", SPLITS)
def test_sentences_mean_their_targets(split, options):
    scenes = generate(split, 80, options)
    for scene in scenes:
        for expression in scene.expressions:
            assert evaluate(expression.meaning, scene) == set(expression.targets)
            assert read(expression.text, scene) == set(expression.targets), expression
            assert expression.targets == tuple(sorted(expression.targets))
        texts = [e.text for e in scene.expressions]
        assert len(set(texts)) == len(texts)


def test_the_reader_can_disagree():
    """The proof above would notice wrong targets: one moved shape changes what is read."""
    scene = generate("train", 1, QUICKSTART)[0]
    mirrored = Scene(
        scene.split,
        scene.index,
        scene.side,
        tuple(Shape(s.kind, s.color, s.size, 96 - s.x, 96 - s.y, s.radius) for s in scene.shapes),
    )
    for text in ("leftmost shape", "the highest object", "objects in the left half"):
        assert read(text, scene) != read(text, mirrored)


#  small red circle   small red square
#  big blue circle                      big red square (lower right)
HAND = Scene(
    "train",
    0,
    96,
    (
        Shape("circle", "red", "small", 15, 15, 8),
        Shape("square", "red", "small", 40, 25, 8),
        Shape("circle", "blue", "big", 20, 60, 14),
        Shape("square", "red", "big", 75, 75, 14),
    ),
)


@pytest.mark.parametrize(
    "meaning, targets",
    [
        (Find("circle"), {0, 2}),
        (Find(color="red", size="small"), {0, 1}),
        (Find("circle", "red", "big"), set()),
        (Nth(Find("square"), 1, "left"), {1}),
        (Nth(Find("square"), 1, "right"), {3}),
        (Nth(Find("circle"), 1, "bottom"), {2}),
        (Nth(Find(color="red"), 2, "right"), {1}),
        (Nth(Find("circle"), 3, "top"), set()),
        (Side(Find(), "left"), {0, 1, 2}),
        (Side(Find("circle"), "right"), set()),
        (Side(Find("circle"), "bottom"), {2}),
        (Relation(Find("circle"), "bottom", Find("square", size="small")), {2}),
        (Relation(Find(), "left", Find("square", size="big")), {0, 1, 2}),
        (Relation(Find("square"), "left", Find("circle", "blue")), set()),
        (Relation(Find("square"), "left", Find("star")), set()),
        (Pair(Find("circle", "blue"), Find("square", None, "big")), {2, 3}),
        (Pair(Find("star"), Find("cross")), set()),
        (Except(Find(), Find("circle", "blue")), {0, 1, 3}),
        (Except(Find("circle"), Find("circle", "red")), {2}),
        (Count(Find("circle"), 2), {0, 2}),
        (Count(Find("circle"), 3), set()),
    ],
)
def test_evaluate_by_hand(meaning, targets):
    assert evaluate(meaning, HAND) == targets


@pytest.mark.parametrize(
    "meaning",
    [
        Nth(Find("circle"), 1, "right"),  # 15 against 20
        Relation(Find("circle", "red"), "left", Find("circle", "blue")),  # 15 against 20
        Relation(Find("circle"), "left", Find("square")),  # which square?
        Pair(Find("circle"), Find("square", size="big")),  # which circle?
        Pair(Find("circle", "blue"), Find("circle", None, "big")),  # the same one
        Pair(Find("circle", "blue"), Find("star")),  # one of them is not there
        Except(Find(), Find("star")),  # but what?
        Except(Find("circle"), Find("circle")),  # nothing left
        Count(Find(color="red"), 2),  # there are three
    ],
)
def test_unclear_by_hand(meaning):
    with pytest.raises(Unclear):
        evaluate(meaning, HAND)


def test_evaluate_rejects_what_is_no_meaning():
    with pytest.raises(TypeError, match="not a meaning"):
        evaluate("the circle", HAND)


@pytest.mark.parametrize(
    "options", [QUICKSTART, Options(no_target_share=0.4, multi_target_share=0.1)]
)
def test_shares_and_numbers(options):
    for split in SPLITS:
        scenes = generate(split, 150, options)
        counts = np.array([len(e.targets) for s in scenes for e in s.expressions])
        assert np.mean(counts == 0) == pytest.approx(options.no_target_share, abs=0.03)
        assert np.mean(counts > 1) == pytest.approx(options.multi_target_share, abs=0.03)
        assert all(options.min_shapes <= len(s.shapes) <= options.max_shapes for s in scenes)
        assert {len(s.shapes) for s in scenes} >= {options.min_shapes, options.max_shapes}
        assert 6 <= len(counts) / len(scenes) <= 8


def test_every_kind_of_word_is_used_and_in_the_vocabulary():
    scenes = [s for options in (QUICKSTART, HARD) for s in generate("train", 400, options)]
    used = {word for s in scenes for e in s.expressions for word in e.text.split()}
    assert used <= set(VOCABULARY)
    assert set(VOCABULARY) <= used  # no embedding that is never trained
    forms = {(min(len(e.targets), 2), type(e.meaning)) for s in scenes for e in s.expressions}
    single, multi, none = ({form for number, form in forms if number == n} for n in (1, 2, 0))
    assert single == {Find, Nth, Side, Relation}
    assert multi == {Find, Side, Relation, Pair, Except, Count}
    assert none == {Find, Nth, Side, Relation, Count, Pair}


def test_no_target_sentences_are_plausible():
    """Most name a colour and a kind of shape that are both in the scene."""
    scenes = generate("train", 150, QUICKSTART)
    plausible = []
    for scene in scenes:
        here = {w for s in scene.shapes for w in (s.color, s.kind)}
        for expression in scene.expressions:
            if not expression.targets:
                named = {w.removesuffix("s") for w in expression.text.split()} & {*COLORS, *KINDS}
                plausible.append(named <= here)
    assert np.mean(plausible) > 0.7


def test_heldout_pairs_are_seen_in_heldout_only():
    pairs = [(c, k) for c, k in HELDOUT]
    words = re.compile("|".join(rf"\b{c} {k}|\b{k}(?:s|es)? that (?:is|are) {c}" for c, k in pairs))
    for split in ("train", "val", "testA", "testB"):
        for scene in generate(split, 200, HARD):
            assert not any((s.color, s.kind) in pairs for s in scene.shapes)
            assert not any(words.search(e.text) for e in scene.expressions)
    named = 0
    for scene in generate("heldout", 200, HARD):
        new = {i for i, s in enumerate(scene.shapes) if (s.color, s.kind) in pairs}
        assert new
        for expression in scene.expressions:
            assert not expression.targets or new & set(expression.targets)
            named += bool(words.search(expression.text))
    assert named > 200


def test_families_of_the_test_splits():
    for split, family in FAMILIES.items():
        for scene in generate(split, 100, HARD):
            for expression in scene.expressions:
                assert all(scene.shapes[i].kind in family for i in expression.targets)
    assert {*FAMILIES["testA"], *FAMILIES["testB"]} == set(KINDS)


@pytest.mark.parametrize("size, least", [(64, 0.8), (96, 0.9), (160, 0.9)])
def test_polygons_are_what_is_drawn(size, least):
    options = Options(size=size, colors=8, noise=0, texture=0)
    for scene in generate("train", 12, options) + generate("heldout", 4, options):
        image = render(scene, options).astype(int)
        assert image.shape == (size, size, 3)
        masks = [rasterize([polygon(s)], size, size) for s in scene.shapes]
        assert np.sum(masks, 0).max() == 1  # no shape hides another
        background = np.median(image[~np.any(masks, 0)], 0)
        drawn = np.abs(image - background).sum(-1)
        for shape, mask in zip(scene.shapes, masks):
            y, x = np.nonzero(mask)
            box = np.s_[max(y.min() - 2, 0) : y.max() + 3, max(x.min() - 2, 0) : x.max() + 3]
            # Half covered: half of the difference between the shape's colour and the background.
            inside = drawn[box] > np.median(drawn[mask]) / 2
            others = np.any([m for m in masks if m is not mask], 0)[box]
            intersection = (inside & mask[box]).sum()
            assert intersection / ((inside & ~others) | mask[box]).sum() > least, shape
            color = np.median(image[mask], 0)
            nearest = min(COLORS, key=lambda c: np.abs(color - COLORS[c]).sum())
            assert nearest == shape.color


def test_scene_does_not_depend_on_the_number_of_scenes():
    few, many = generate("val", 3, HARD), generate("val", 9, HARD)
    assert few == many[:3]
    assert few != generate("val", 3, Options(**{**vars(HARD), "seed": 1}))
    assert generate("train", 3, HARD) != few
    assert np.array_equal(render(few[2], HARD), render(many[2], HARD))
    assert not np.array_equal(render(few[1], HARD), render(few[2], HARD))


NUMBERS = {"train": 6, "val": 3, "testA": 2, "testB": 2, "heldout": 3}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("datasets") / "refshapes"
    assert write(str(root), NUMBERS, QUICKSTART)
    return root


def test_annotation_files_are_the_same_everywhere(root):
    """Pinned: figures measured on RefShapes can be compared between machines and versions."""
    names = ("refcoco/instances.json", "grefcoco/instances.json", "grefcoco/grefs(unc).json")
    contents = [(root / name).read_bytes() for name in names]
    contents.append(json.dumps(load_pickle(root / "refcoco/refs(unc).p")).encode())
    assert [hashlib.sha256(content).hexdigest()[:16] for content in contents] == [
        "c66c602fda4564ea",
        "c0ab605805ff9374",
        "b3c8aa7d0f16b45b",
        "bbb252bb4bc8d0fc",
    ]


def test_files_have_the_published_fields(root):
    refs = load_pickle(root / "refcoco/refs(unc).p")
    assert (root / "refcoco/refs(unc).p").read_bytes()[:2] == b"\x80\x02"  # as Python 2 wrote it
    assert {ref["split"] for ref in refs} == {"train", "val", "testA", "testB"}
    keys = {
        "ref_id",
        "ann_id",
        "category_id",
        "file_name",
        "image_id",
        "split",
        "sent_ids",
        "sentences",
    }
    coco = COCO(str(root / "grefcoco/instances.json"))
    sent_ids = []
    for ref in refs:
        assert set(ref) == keys
        annotation = coco.anns[ref["ann_id"]]
        assert annotation["image_id"] == ref["image_id"]
        assert annotation["category_id"] == ref["category_id"]
        assert re.fullmatch(r"COCO_train2014_\d{12}_\d+\.jpg", ref["file_name"])
        assert 1 <= len(ref["sentences"]) <= 3
        assert [s["sent_id"] for s in ref["sentences"]] == ref["sent_ids"]
        assert all(s["tokens"] == s["sent"].split() and s["raw"] for s in ref["sentences"])
        sent_ids += ref["sent_ids"]
    assert len(set(sent_ids)) == len(sent_ids)
    assert len({ref["ref_id"] for ref in refs}) == len(refs)

    grefs = load_json(root / "grefcoco/grefs(unc).json")
    assert {ref["split"] for ref in grefs} == set(SPLITS)
    for ref in grefs:
        assert set(ref) == keys | {"no_target"}
        if ref["no_target"]:
            assert ref["ann_id"] == ref["category_id"] == [-1]
        else:
            assert [coco.anns[i]["category_id"] for i in ref["ann_id"]] == ref["category_id"]
    assert {len(ref["ann_id"]) for ref in grefs} >= {1, 2}

    for annotation in coco.anns.values():
        x, y, width, height = annotation["bbox"]
        rows, columns = np.nonzero(coco.annToMask(annotation))
        assert abs(columns.min() - x) <= 2 and abs(columns.max() + 1 - x - width) <= 2
        assert abs(rows.min() - y) <= 2 and abs(rows.max() + 1 - y - height) <= 2
        assert annotation["area"] == pytest.approx(len(rows), rel=0.1)
    for image in coco.imgs.values():
        picture = cv2.imread(str(root / "images/train2014" / image["file_name"]))
        assert picture.shape == (image["height"], image["width"], 3)
    assert len(list((root / "images/train2014").iterdir())) == sum(NUMBERS.values())


def test_jpeg_shows_the_scene(root):
    scene = generate("train", 1, QUICKSTART)[0]
    picture = cv2.imread(str(root / "images/train2014/COCO_train2014_000001000000.jpg"))[..., ::-1]
    difference = np.abs(picture.astype(int) - render(scene, QUICKSTART))
    assert difference.mean() < 8


@pytest.mark.parametrize("split", SPLITS)
def test_the_readers_give_the_scenes_back(root, split):
    images = str(root / "images/train2014")
    scenes = generate(split, NUMBERS[split], QUICKSTART)
    general = load_grefer(
        root / "grefcoco/grefs(unc).json", root / "grefcoco/instances.json", images, split
    )
    read_back = {
        (
            record["image_id"] % 1_000_000,
            e["text"],
            tuple(sorted(i % 10 for i in e["annotation_ids"])),
        )
        for record in general
        for e in record["expressions"]
    }
    assert read_back == {(s.index, e.text, e.targets) for s in scenes for e in s.expressions}
    if split != "heldout":
        single = load_refer(
            root / "refcoco/refs(unc).p",
            root / "refcoco/instances.json",
            images,
            split,
            source="refshapes",
        )
        texts = {(r["image_id"] % 1_000_000, e["text"]) for r in single for e in r["expressions"]}
        assert texts == {
            (s.index, e.text) for s in scenes for e in s.expressions if len(e.targets) == 1
        }


def test_tokenizer_of_the_set_knows_every_word(root):
    tokenizer = Tokenizer(kind="hf", path=str(root / "tokenizer"), max_tokens=20, clean=True)
    texts = [e.text for s in generate("val", 50, HARD) for e in s.expressions]
    ids, mask = tokenizer(texts)
    assert not (ids == 3).any()
    assert (mask.sum(1) < 20).all()  # nothing is cut
    assert mask.sum(1).tolist() == [len(text.split()) + 2 for text in texts]


def test_rewriting(tmp_path, monkeypatch):
    root, one = tmp_path / "set", {"train": 1}
    root.mkdir()  # an empty folder may be there
    assert write(str(root), one, QUICKSTART)
    before = (root / "grefcoco/grefs(unc).json").stat().st_mtime_ns
    assert not write(str(root), one, QUICKSTART)
    assert (root / "grefcoco/grefs(unc).json").stat().st_mtime_ns == before
    with pytest.raises(FileExistsError, match="other options \\(numbers\\).*--overwrite"):
        write(str(root), {"train": 2}, QUICKSTART)

    # A failure in the middle leaves the old set whole and nothing beside it.
    monkeypatch.setattr(writing, "references", lambda *args, **kwargs: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        write(str(root), {"train": 2}, QUICKSTART, overwrite=True)
    monkeypatch.undo()
    assert [path.name for path in tmp_path.iterdir()] == ["set"]
    assert (root / "grefcoco/grefs(unc).json").stat().st_mtime_ns == before

    assert write(str(root), {"train": 2}, QUICKSTART, overwrite=True)
    assert len(list((root / "images/train2014").iterdir())) == 2
    assert [path.name for path in tmp_path.iterdir()] == ["set"]


def test_overwriting_loses_no_file_of_others(tmp_path):
    assert write(str(tmp_path), {"train": 1}, QUICKSTART)
    (tmp_path / "precious.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="also holds precious.txt"):
        write(str(tmp_path), {"train": 2}, QUICKSTART, overwrite=True)
    assert (tmp_path / "precious.txt").read_text() == "mine"


def test_what_a_killed_process_left_is_swept(tmp_path):
    left = tmp_path / ".ris_d2-0123abcd.set"
    (left / "images").mkdir(parents=True)
    os.utime(left, (0, 0))
    assert write(str(tmp_path / "set"), {"train": 1}, QUICKSTART)
    assert [path.name for path in tmp_path.iterdir()] == ["set"]


@pytest.mark.parametrize("overwrite", [False, True])
def test_never_touches_what_it_did_not_write(tmp_path, overwrite):
    (tmp_path / "precious.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="not written by RefShapes"):
        write(str(tmp_path), {"train": 1}, QUICKSTART, overwrite=overwrite)
    assert [path.name for path in tmp_path.iterdir()] == ["precious.txt"]


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"size": 20}, "size must be at least 48"),
        ({"min_shapes": 6, "max_shapes": 5}, "min <= max"),
        ({"max_shapes": 10}, "max <= 9"),
        ({"colors": 9}, "colors must be 4 to 8"),
        ({"kinds": 2}, "kinds must be 4 to 6"),
        ({"min_expressions": 0}, "expressions"),
        ({"no_target_share": 0.7, "multi_target_share": 0.6}, "shares"),
        ({"noise": -1}, "noise"),
    ],
)
def test_wrong_options(wrong, message):
    with pytest.raises(ValueError, match=message):
        Options(**wrong)


def test_unknown_split():
    with pytest.raises(ValueError, match="unknown RefShapes split 'test'"):
        generate("test", 1)
    with pytest.raises(ValueError, match="unknown RefShapes split 'tset'"):
        write("unused", {"tset": 1})


def test_script(tmp_path, monkeypatch, capsys):
    few = [f"--{split}-images=1" for split in SPLITS]
    arguments = ["--root", str(tmp_path / "set"), *few, "--max-shapes", "4", "--seed", "7"]
    monkeypatch.setattr(sys, "argv", ["x", *arguments, "--sheet", str(tmp_path / "sheet.png")])
    runpy.run_path(str(SCRIPT), run_name="__main__")
    assert load_json(tmp_path / "set/refshapes.json")["seed"] == 7
    sheet = cv2.imread(str(tmp_path / "sheet.png"))
    assert sheet.shape[1] == 1000 and sheet.std() > 30

    monkeypatch.setattr(sys, "argv", ["x", *arguments, "--max-shapes", "5"])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(SCRIPT), run_name="__main__")
    assert stop.value.code == 2
    assert "--overwrite" in capsys.readouterr().err
