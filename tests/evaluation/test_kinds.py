"""Kinds of sentences: by words, exact on RefShapes, and what the report says of each."""

import json

import pytest
import torch
from ris_d2.evaluation import ReferringEvaluator
from ris_d2.evaluation.kinds import KINDS, kind_names, kinds_of
from ris_d2.refshapes import Options, generate
from ris_d2.refshapes.language import Count, Except, Find, Nth, Pair, Relation, Side

SAID = {
    Find: "attribute",
    Nth: "ordinal",
    Side: "position",
    Relation: "relation",
    Pair: "conjunction",
    Except: "negation",
    Count: "count",
}


@pytest.mark.parametrize(
    "text, kinds",
    [
        ("vest guy", "attribute"),
        ("black and white cat in red", "attribute"),
        ("the elephant in front", "position"),
        ("Person on the far LEFT", "position"),
        ("2nd from right", "ordinal"),
        ("left most zebra", "ordinal"),
        ("bench to the left of the tree", "relation"),
        ("giraffe on the right side of the tree", "relation"),
        ("cat on bed", "relation"),
        ("woman on left holding umbrella", "relation position"),
        ("second man from the left behind the table", "ordinal relation"),
        ("two kids on the left", "position count"),
        ("man and woman", "conjunction"),
        ("dog that isn't black", "negation"),
        ("chair without person", "negation"),
        ("", "attribute"),
    ],
)
def test_kinds_by_words(text, kinds):
    assert kind_names(kinds_of(text)) == kinds.split()


@pytest.mark.parametrize("split", ["train", "heldout"])
def test_words_tell_what_the_generator_meant(split):
    """One kind per sentence, that of its meaning; only "the left circle" is a position, not a rank."""
    scenes = generate(split, 250, Options(colors=8, min_shapes=4, max_shapes=8))
    expressions = [e for scene in scenes for e in scene.expressions]
    seen = set()
    for expression in expressions:
        said = SAID[type(expression.meaning)]
        found = kind_names(kinds_of(expression.text))
        if said == "ordinal" and found == ["position"]:
            of, direction = expression.meaning.of, expression.meaning.direction
            assert expression.meaning.rank == 1
            assert direction in expression.text.split() and str(of.kind) not in direction
        else:
            assert found == [said], expression
            seen.add(said)
    assert seen == set(KINDS)


def test_report_tells_kinds_apart(tmp_path):
    """Two of three relations are missed; "nothing" is said of the sentence without a target."""
    texts = ["cup left of the jug", "cup above the jug", "cup behind the left jug", "red cup"]
    box, nothing = [[0, 0, 4, 0, 4, 4, 0, 4]], torch.zeros(8, 8, dtype=torch.bool)
    found = nothing.clone()
    found[:4, :4] = True
    unit = {
        "height": 8,
        "width": 8,
        "image_id": 1,
        "annotations": [{"id": 1, "segmentation": box}],
        "expressions": [
            {"expression_id": i, "ref_id": i, "text": text, "annotation_ids": [1] if i < 3 else []}
            for i, text in enumerate(texts)
        ],
    }
    results = [
        {"expression_id": i, "mask": mask, "score": 0.5, "no_target": i == 3}
        for i, mask in enumerate([found, nothing, nothing, nothing])
    ]
    evaluator = ReferringEvaluator("test", output_dir=str(tmp_path))
    evaluator.process([unit], [{"referring": results}])
    evaluator.evaluate()
    groups = json.loads((tmp_path / "results.json").read_text())["breakdowns"]["kind"]
    shown = {
        kind: (group["num_expressions"], group["gIoU"], group["N_acc"])
        for kind, group in groups.items()
    }
    assert shown == {
        "attribute": (1, 100, 100),
        "relation": (3, pytest.approx(100 / 3), None),
        "position": (1, 0, None),
        "absence": (1, 100, 100),
    }
    lines = [json.loads(line) for line in (tmp_path / "per_expression.jsonl").open()]
    assert [line["kinds"] for line in lines] == [
        ["relation"],
        ["relation"],
        ["relation", "position"],
        ["attribute"],
    ]
