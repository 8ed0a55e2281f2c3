import numpy as np
import pytest

from ris_d2.data.units import Draws, Unit, build_units, choose, draw_unit, take


def record(refs, image_id=1):
    """refs: {ref_id: (number of sentences, annotation ids)}"""
    expressions = [
        {"ref_id": ref_id, "text": f"{ref_id}.{n}", "annotation_ids": list(ids)}
        for ref_id, (count, ids) in refs.items()
        for n in range(count)
    ]
    for expression_id, expression in enumerate(expressions):
        expression["expression_id"] = expression_id
    ids = sorted({id_ for _, named in refs.values() for id_ in named})
    return {
        "file_name": f"{image_id}.jpg",
        "image_id": image_id,
        "annotations": [{"id": id_} for id_ in ids],
        "expressions": expressions,
    }


RECORDS = [
    record({10: (2, [1]), 11: (3, [2, 3])}, image_id=1),
    record({}, image_id=2),
    record({10: (1, []), 12: (4, [2])}, image_id=3),  # the ref_id of another image, no target
]


def test_units_of_every_kind():
    sentences = build_units(RECORDS, "sentence")
    assert [(unit.record, unit.expressions) for unit in sentences] == [
        (record, (index,)) for record in (0, 2) for index in range(5)
    ]
    referents = build_units(RECORDS, "referent")
    assert list(referents) == [
        Unit(0, (0, 1)),
        Unit(0, (2, 3, 4)),
        Unit(2, (0,)),
        Unit(2, (1, 2, 3, 4)),
    ]
    images = build_units(RECORDS, "image", max_expressions=3)
    assert list(images) == [Unit(0, (0, 1, 2, 3, 4)), Unit(2, (0, 1, 2, 3, 4))]
    assert sentences.max_expressions == referents.max_expressions == 1
    assert images.max_expressions == 3


def test_interleaved_sentences_of_a_referent_are_one_unit():
    mixed = record({1: (2, [1]), 2: (1, [2])})
    mixed["expressions"] = [mixed["expressions"][i] for i in (0, 2, 1)]
    assert list(build_units([mixed], "referent")) == [Unit(0, (0, 2)), Unit(0, (1,))]


def test_bad_settings_are_errors():
    with pytest.raises(ValueError, match="INPUT.RIS.UNIT .*'phrase'"):
        build_units(RECORDS, "phrase")
    with pytest.raises(ValueError, match="MAX_EXPRESSIONS .* 0"):
        build_units(RECORDS, "image", max_expressions=0)
    with pytest.raises(ValueError, match="2.jpg: an image without expressions"):
        draw_unit(RECORDS[1], "sentence", np.random.default_rng(0))


def test_take_carries_only_the_named_annotations():
    taken = take(RECORDS[0], (0, 3))
    assert [expression["text"] for expression in taken["expressions"]] == ["10.0", "11.1"]
    assert [annotation["id"] for annotation in taken["annotations"]] == [1, 2, 3]
    assert [annotation["id"] for annotation in take(RECORDS[0], (0,))["annotations"]] == [1]
    assert take(RECORDS[2], (0,))["annotations"] == []
    assert len(RECORDS[0]["expressions"]) == 5 and len(RECORDS[0]["annotations"]) == 3


def test_take_names_a_missing_annotation():
    broken = record({1: (1, [7])})
    broken["annotations"] = []
    with pytest.raises(ValueError, match=r"1.jpg: expressions \[0\] name the annotations \[7\]"):
        take(broken, (0,))


def test_every_epoch_visits_every_unit_once_in_an_order_of_its_own():
    units = build_units([record({n: (1, []) for n in range(9)})], "sentence")
    draws = Draws(units, seed=3)
    orders = [[draws(9 * epoch + n)[0].expressions[0] for n in range(9)] for epoch in range(3)]
    assert all(sorted(order) == list(range(9)) for order in orders)
    assert len({tuple(order) for order in orders}) == 3
    assert orders[0] != [Draws(units, seed=4)(n)[0].expressions[0] for n in range(9)]


def test_a_draw_depends_on_nothing_but_seed_and_number():
    units = build_units(RECORDS, "referent")

    def look(draws, number):
        unit, rng = draws(number)
        return unit, rng.random()

    forward = Draws(units, seed=3)
    seen = [look(forward, number) for number in range(30)]
    for number in (29, 3, 4, 17, 0):  # another order, across epochs
        assert look(Draws(units, seed=3), number) == seen[number]
    assert len({value for _, value in seen}) == 30
    assert look(Draws(units, seed=3), 10**12) == look(Draws(units, seed=3), 10**12)


def test_a_referent_is_drawn_with_every_sentence_in_the_long_run():
    draws = Draws(build_units([RECORDS[0]], "referent"), seed=0)
    counts = np.zeros(5)
    for number in range(600):
        unit, _ = draws(number)
        assert len(unit.expressions) == 1
        counts[unit.expressions[0]] += 1
    assert counts[:2].sum() == counts[2:].sum() == 300
    assert (abs(counts - [150, 150, 100, 100, 100]) < 35).all()


def test_an_image_is_drawn_with_up_to_the_limit():
    rng = np.random.default_rng(0)
    assert choose((4, 7, 9), 3, rng) == (4, 7, 9)
    chosen = {choose((4, 7, 9), 2, rng) for _ in range(50)}
    assert chosen == {(4, 7), (4, 9), (7, 9)}


def test_draw_unit_within_one_image():
    rng = np.random.default_rng(0)
    by_referent = [draw_unit(RECORDS[2], "referent", rng)[0] for _ in range(300)]
    assert abs(by_referent.count(0) - 150) < 35  # one of two referents
    by_sentence = [draw_unit(RECORDS[2], "sentence", rng)[0] for _ in range(300)]
    assert abs(by_sentence.count(0) - 60) < 30  # one of five sentences
    assert draw_unit(RECORDS[2], "image", rng, max_expressions=9) == (0, 1, 2, 3, 4)
