import copy
import itertools
import logging
import math

import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog
from detectron2.data.common import DatasetFromList

from ris_d2 import get_ris_cfg
from ris_d2.data import mapper as mapper_module
from ris_d2.data.loader import build_train_loader
from ris_d2.data.nsc import ConversionLog, NonReferentConversion, SentencePool, similarity
from ris_d2.data.units import take


def record(image, *sentences, source="toy"):
    """A record; a sentence starting with "no " has no target, any other one of its own."""
    expressions = [
        {
            "expression_id": number,
            "ref_id": number,
            "text": text,
            "annotation_ids": [] if text.startswith("no ") else [number],
        }
        for number, text in enumerate(sentences)
    ]
    annotations = [{"id": number, "segmentation": []} for number in range(len(sentences))]
    return {
        "file_name": f"/images/{image}.jpg",
        "image_id": 1,  # of every image: ids collide between families
        "height": 4,
        "width": 4,
        "source": source,
        "annotations": annotations,
        "expressions": expressions,
    }


def whole(record):
    return take(record, range(len(record["expressions"])))


def convert(records, seed=0, unit=None, **settings):
    conversion = NonReferentConversion(**{"rate": 1.0, **settings})
    unit = whole(records[0]) if unit is None else unit
    return conversion(unit, SentencePool(records), np.random.default_rng(seed))


def texts(unit):
    return [expression["text"] for expression in unit["expressions"]]


@pytest.mark.parametrize(
    "one, other, expected",
    [
        ("left man", "man left", 1.0),
        ("left man", "right dog", 0.0),
        ("the left man", "the right man", (2 / 4 + 2 / 3) / 2),
        ("man", "the man in a red coat", (1 / 6 + 1 / math.sqrt(6)) / 2),
        ("the man the dog", "the the the", (2 / 5 + 2 / math.sqrt(12)) / 2),  # multisets
    ],
)
def test_similarity_of_words(one, other, expected):
    assert similarity(one.split(), other.split()) == pytest.approx(expected)
    assert similarity(other.split(), one.split()) == pytest.approx(expected)


def test_similarity_of_characters():
    """As textdistance gives with its defaults: multisets of characters, spaces too."""
    assert similarity("left man", "man left") == 1.0
    # "a cat" and "at " share a, t and the space.
    assert similarity("a cat", "at ") == pytest.approx((3 / 5 + 3 / math.sqrt(15)) / 2)
    assert similarity("Man", "man") == pytest.approx((2 / 4 + 2 / 3) / 2)  # case matters


def test_a_converted_expression_has_no_target_and_a_sentence_of_another_image():
    records = [record("a", "red car on left"), record("b", "small dog sleeping here")]
    before = copy.deepcopy(records)
    unit = convert(records)
    (expression,) = unit["expressions"]
    assert expression["text"] == "small dog sleeping here"
    assert expression["replaced_text"] == "red car on left"
    assert expression["annotation_ids"] == [] and unit["annotations"] == []
    assert (expression["expression_id"], unit["file_name"]) == (0, "/images/a.jpg")
    assert records == before  # the next epoch starts from the annotation again


def test_only_annotations_that_are_still_named_stay():
    unit = whole(record("a", "red car on left", "blue bus on right"))
    unit["expressions"][1]["annotation_ids"] = [0, 1]
    records = [unit, record("b", "small dog sleeping here")]
    for seed in range(20):
        converted = convert(records, seed=seed, unit=unit, rate=0.5)
        named = {i for expression in converted["expressions"] for i in expression["annotation_ids"]}
        assert {annotation["id"] for annotation in converted["annotations"]} == named


def test_a_sentence_without_target_stays():
    records = [record("a", "no cat on left"), record("b", "small dog sleeping here")]
    unit = whole(records[0])
    assert convert(records, unit=unit) is unit


@pytest.mark.parametrize(
    "own, candidate",
    [
        ("red car on left", "red bus on left"),  # 3 of 5 words, (3/5 + 3/4)/2 = 0.675
        ("red car on left", "On left: red car!"),  # the same words
        ("red car on left", "dog"),  # too short
        ("red car on left", "a dog"),  # two words are not more than N_w
    ],
)
def test_candidates_that_the_paper_rejects(own, candidate):
    records = [record("a", own), record("b", candidate)]
    assert texts(convert(records)) == [own]


def test_length_and_similarity_are_settings():
    records = [record("a", "red car on left"), record("b", "a dog")]
    assert texts(convert(records, min_words=1)) == ["a dog"]
    records = [record("a", "red car on left"), record("b", "red bus on left")]
    assert texts(convert(records, max_similarity=0.7)) == ["red bus on left"]


def test_the_same_image_is_known_by_its_file():
    """Another record of the image, of another data set, gives no candidates; its id says nothing."""
    same = record("a", "no big tree in garden", source="other")
    records = [record("a", "red car on left"), same]
    assert texts(convert(records)) == ["red car on left"]
    assert texts(convert(records, rules="released")) == ["no big tree in garden"]  # no image test
    records[1] = {**same, "file_name": "/others/a.jpg"}
    assert texts(convert(records)) == ["no big tree in garden"]


@pytest.mark.parametrize("rules", ["paper", "released"])
def test_a_candidate_that_is_true_of_the_image_is_never_taken(rules):
    """Nor one that only differs in order, case and punctuation, nor one from another data set."""
    records = [
        record("a", "red car on left", "small dog sleeping here"),
        record("b", "Here: sleeping small dog.", "tall tree in garden"),
        record("a", "tall tree in garden", source="other"),
        record("c", "no yellow bird up there", "no tall tree in garden"),
    ]
    pool = SentencePool(records)
    seen = set()
    for seed in range(60):
        seen.update(texts(convert(records, seed=seed, unit=take(records[0], [0]), rules=rules)))
    assert pool.true_sentences("/images/a.jpg") == [
        "red car on left",
        "small dog sleeping here",
        "tall tree in garden",
    ]
    assert seen <= {"no yellow bird up there", "no tall tree in garden", "red car on left"}
    assert "no yellow bird up there" in seen


def test_released_rules_take_short_sentences_and_compare_characters():
    records = [record("a", "red car on left"), record("b", "zz")]
    assert texts(convert(records, rules="released")) == ["zz"]
    # Different words of the same letters.
    records = [record("a", "tales on dear god"), record("b", "stale no dare dog")]
    assert texts(convert(records, rules="released")) == ["tales on dear god"]
    assert texts(convert(records)) == ["stale no dare dog"]


@pytest.mark.parametrize("rules", ["paper", "released"])
def test_a_candidate_has_words(rules):
    """Cleaning leaves nothing of punctuation alone, which a tokenizer would refuse."""
    records = [record("a", "red car on left"), record("b", "?!")]
    converted = convert(records, rules=rules, min_words=0)
    assert texts(converted) == ["red car on left"]


def test_images_are_drawn_uniformly_and_then_their_sentences():
    many = record("b", *(f"no sentence number {n} of many" for n in range(9)))
    records = [record("a", "red car on left"), many, record("c", "no lonely little sentence")]
    drawn = [texts(convert(records, seed=seed))[0] for seed in range(200)]
    assert 70 < drawn.count("no lonely little sentence") < 130
    assert len(set(drawn)) == 10


def test_the_rate_is_that_of_sentences_with_a_target():
    sentences = [f"word{n} car on left" for n in range(10)]
    records = [record("a", *sentences), record("b", "small dog sleeping here")]
    converted = sum(
        "replaced_text" in expression
        for seed in range(200)
        for expression in convert(records, seed=seed, rate=0.15)["expressions"]
    )
    assert 0.13 < converted / 2000 < 0.17


def test_the_random_numbers_decide_alone():
    records = [record("a", "red car on left", "blue bus on right")] + [
        record(f"b{n}", f"small dog number {n}") for n in range(20)
    ]
    first = [convert(records, seed=seed, rate=0.5) for seed in range(10)]
    assert first == [convert(records, seed=seed, rate=0.5) for seed in range(10)]
    assert len({tuple(texts(unit)) for unit in first}) > 4


def test_few_records_are_read(monkeypatch):
    """A conversion looks at the candidates that it draws and at its own image, not at the pool."""
    records = [record(f"a{n}", f"number {n} red car") for n in range(500)]
    serialized = DatasetFromList(records, serialize=True)
    pool = SentencePool(serialized)
    reads = []
    get = DatasetFromList.__getitem__
    monkeypatch.setattr(
        DatasetFromList, "__getitem__", lambda self, i: reads.append(i) or get(self, i)
    )
    conversion = NonReferentConversion(rate=1.0, max_similarity=0.99)
    conversion(whole(records[0]), pool, np.random.default_rng(0))
    assert 2 <= len(reads) <= 4


def test_a_pool_without_candidates_ends():
    records = [record("a", "red car on left"), {**record("b"), "expressions": []}]
    assert texts(convert(records)) == ["red car on left"]


@pytest.mark.parametrize(
    "settings, message",
    [({"rules": "none"}, "NSC.RULES is 'none'"), ({"rate": 1.5}, r"RATE lies in \[0, 1\]")],
)
def test_settings_that_make_no_sense_are_errors(settings, message):
    with pytest.raises(ValueError, match=message):
        NonReferentConversion(**{"rate": 0.1, **settings})


def test_log_of_the_converted_share(caplog):
    log = ConversionLog(period=2)
    unit = whole(record("a", "red car on left", "blue bus on right", "no cat on left"))
    converted = copy.deepcopy(unit)
    converted["expressions"][0].update(annotation_ids=[], replaced_text="x")
    with caplog.at_level(logging.INFO, logger="ris_d2"):
        log.count([unit])
        assert not caplog.records
        log.count([converted])
    (message,) = caplog.messages
    assert "1 of 4 sentences with a target converted (25.0 %)" in message
    assert "50.0 % of all 6 sentences have no target, 33.3 % without" in message


@pytest.fixture
def cfg(make_record, tokenizer, monkeypatch):
    records = [make_record(image_id=n, refs=((2, (1,)), (1, (1, 2)), (1, ()))) for n in range(1, 6)]
    for item in records:
        for number, expression in enumerate(item["expressions"]):
            expression["text"] = f"sentence{item['image_id']}{number} of image{item['image_id']}"
    monkeypatch.setattr(mapper_module, "Tokenizer", lambda cfg: tokenizer)
    DatasetCatalog.register("toy_nsc", lambda: records)
    cfg = get_ris_cfg()
    cfg.DATASETS.TRAIN, cfg.INPUT.RIS.SIZE, cfg.INPUT.RIS.UNIT = ("toy_nsc",), (8, 8), "image"
    cfg.SEED, cfg.SOLVER.IMS_PER_BATCH, cfg.DATALOADER.NUM_WORKERS = 5, 2, 0
    cfg.INPUT.RIS.FLIP_PROB = 0.5
    cfg.INPUT.RIS.NSC.RATE = 0.5
    yield cfg
    DatasetCatalog.remove("toy_nsc")


def batches_of(cfg, count, start=0, seed=None):
    loader = build_train_loader(cfg)
    loader.start = start
    loader.seed = loader.seed if seed is None else seed
    iterator = iter(loader)
    taken = list(itertools.islice(iterator, count))
    iterator.close()
    return taken


def drawn(batches):
    return [[x["expressions"] for x in batch] for batch in batches]


def test_converted_samples_reach_the_model(cfg):
    samples = [x for batch in batches_of(cfg, 10) for x in batch]
    expressions = [e for x in samples for e in x["expressions"]]
    assert 0.3 < sum("replaced_text" in e for e in expressions) / len(expressions) < 0.45  # of 3/4
    for x in samples:
        for expression, targets in zip(x["expressions"], x["targets"]):
            if "replaced_text" in expression:
                assert not targets.any()
                assert not expression["text"].endswith(f"image{x['image_id']}")
    cfg.INPUT.RIS.NSC.RATE = 0.0
    assert "replaced_text" not in str(drawn(batches_of(cfg, 10)))


def test_conversion_is_reproducible_over_workers_and_resumes(cfg):
    straight = batches_of(cfg, 8)
    assert "replaced_text" in str(drawn(straight))
    epochs = drawn(straight)  # 5 images, 2 per batch: batches 0-2 and 2-5 are two epochs
    assert epochs[:2] != epochs[2:4]
    cfg.DATALOADER.NUM_WORKERS = 2
    for taken, expected in ((batches_of(cfg, 8), straight), (batches_of(cfg, 5, 3), straight[3:])):
        assert drawn(taken) == drawn(expected)
        for batch, other in zip(taken, expected):
            for x, y in zip(batch, other):
                assert torch.equal(x["input_ids"], y["input_ids"])
                assert torch.equal(x["targets"], y["targets"])
                assert torch.equal(x["image"], y["image"])
    assert drawn(batches_of(cfg, 8, seed=6)) != drawn(straight)
