import itertools
import sys

import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog, build_detection_train_loader
from detectron2.engine import DefaultTrainer
from detectron2.modeling import META_ARCH_REGISTRY

from ris_d2 import get_ris_cfg
from ris_d2.data import mapper as mapper_module
from ris_d2.data.loader import ResumableTrainLoader, build_test_loader, build_train_loader, shard
from ris_d2.data.mapper import ReferringMapper
from ris_d2.data.units import build_units

REFS = [
    ((2, (1,)), (1, (1, 2)), (1, ())),
    ((3, (2,)),),
    ((1, ()),),
    ((1, (3,)), (2, (1, 2, 3))),
]


@pytest.fixture
def records(make_record):
    return [make_record(image_id=n, refs=refs) for n, refs in enumerate(REFS, start=1)]


@pytest.fixture
def cfg(records, tokenizer, monkeypatch):
    """A config whose training and test set are the toy records."""
    monkeypatch.setattr(mapper_module, "Tokenizer", lambda cfg: tokenizer)
    DatasetCatalog.register("toy_records", lambda: records)
    cfg = get_ris_cfg()
    cfg.DATASETS.TRAIN = cfg.DATASETS.TEST = ("toy_records",)
    cfg.INPUT.RIS.SIZE = (8, 8)
    cfg.DATALOADER.NUM_WORKERS = 0
    cfg.SOLVER.IMS_PER_BATCH = 2
    cfg.SEED = 5
    yield cfg
    DatasetCatalog.remove("toy_records")


def make_loader(records, make_mapper, unit="referent", **kwargs):
    mapper = make_mapper(
        is_train=True,
        size=(16, 16),
        geometry="letterbox",
        flip_prob=0.5,
        brightness=0.5,
        saturation=0.5,
        affine={"rotation": 5.0, "scale": 0.1, "translation": 0.1, "shear": 2.0},
    )
    units = build_units(records, unit, max_expressions=2)
    settings = {"seed": 5, "units_per_step": 4, **kwargs}
    return ResumableTrainLoader(records=records, units=units, mapper=mapper, **settings)


def take_batches(loader, count):
    batches = iter(loader)
    taken = list(itertools.islice(batches, count))
    batches.close()  # ends the workers
    return taken


def assert_equal(batches, others):
    assert len(batches) == len(others)
    for batch, other in zip(batches, others):
        assert len(batch) == len(other)
        for one, two in zip(batch, other):
            assert one.keys() == two.keys()
            for key in ("image", "input_ids", "text_mask", "targets"):
                assert torch.equal(one[key], two[key]), key
            assert one["expressions"] == two["expressions"]
            masks, other_masks = one["instances"].gt_masks.tensor, two["instances"].gt_masks.tensor
            assert torch.equal(masks, other_masks)


def drawn(batches):
    return [[e["expression_id"] for x in batch for e in x["expressions"]] for batch in batches]


def test_batches_are_the_same_with_any_number_of_workers(records, make_mapper):
    straight = take_batches(make_loader(records, make_mapper), 7)
    torch.manual_seed(99)
    for num_workers in (2, 3):
        loader = make_loader(records, make_mapper, num_workers=num_workers)
        assert_equal(take_batches(loader, 7), straight)
    texts = [e["text"] for batch in straight for x in batch for e in x["expressions"]]
    assert any("right" in text for text in texts) and any("left" in text for text in texts)
    assert len({tuple(ids) for ids in drawn(straight)}) > 1


@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_loader_that_starts_later_goes_on_exactly(records, make_mapper, accumulation):
    straight = take_batches(make_loader(records, make_mapper, accumulation=accumulation), 8)
    resumed = make_loader(records, make_mapper, accumulation=accumulation, num_workers=2)
    batches = iter(resumed)  # as detectron2 0.6: asked for before the start is known
    resumed.start = 3
    taken = list(itertools.islice(batches, 8 - 3 * accumulation))
    batches.close()
    assert_equal(taken, straight[3 * accumulation :])


def test_another_seed_draws_otherwise(records, make_mapper):
    loader = make_loader(records, make_mapper)
    first = drawn(take_batches(loader, 6))
    loader.seed = 6
    assert drawn(take_batches(loader, 6)) != first


def test_loading_draws_no_global_random_numbers(records, make_mapper):
    torch.manual_seed(0)
    np.random.seed(0)
    states = torch.get_rng_state(), np.random.get_state()[1]
    take_batches(make_loader(records, make_mapper), 3)
    take_batches(make_loader(records, make_mapper, num_workers=2), 3)
    assert torch.equal(torch.get_rng_state(), states[0])
    assert (np.random.get_state()[1] == states[1]).all()


@pytest.mark.parametrize("world_size, accumulation", [(2, 1), (1, 2), (2, 2), (4, 1)])
def test_processes_and_micro_batches_partition_the_draws(
    records, make_mapper, world_size, accumulation
):
    whole = take_batches(make_loader(records, make_mapper), 4)
    parts = [
        take_batches(
            make_loader(
                records, make_mapper, accumulation=accumulation, rank=rank, world_size=world_size
            ),
            4 * accumulation,
        )
        for rank in range(world_size)
    ]
    for step, batch in enumerate(whole):
        micro = [
            parts[rank][step * accumulation + number]
            for number in range(accumulation)
            for rank in range(world_size)
        ]
        assert {len(samples) for samples in micro} == {4 // world_size // accumulation}
        assert_equal([[sample for samples in micro for sample in samples]], [batch])


@pytest.mark.parametrize("unit, per_epoch", [("sentence", 11), ("referent", 7), ("image", 4)])
def test_an_epoch_sees_every_unit(records, make_mapper, unit, per_epoch):
    loader = make_loader(records, make_mapper, unit, units_per_step=1)
    assert loader.units_per_epoch == per_epoch
    samples = [batch[0] for batch in take_batches(loader, per_epoch)]
    expressions = [e for x in samples for e in x["expressions"]]
    if unit == "sentence":
        expected = [e["expression_id"] for r in records for e in r["expressions"]]
        assert sorted(e["expression_id"] for e in expressions) == sorted(expected)
    if unit == "referent":
        keys = [(x["image_id"], e["ref_id"]) for x in samples for e in x["expressions"]]
        assert len(keys) == len(set(keys)) == 7
    assert sorted({x["image_id"] for x in samples}) == [1, 2, 3, 4]
    assert max(len(x["expressions"]) for x in samples) == (2 if unit == "image" else 1)
    assert any(e["annotation_ids"] == [] for e in expressions)  # no target


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"units_per_step": 5, "world_size": 2}, "IMS_PER_BATCH 5 .* 2 processes"),
        ({"units_per_step": 4, "world_size": 2, "accumulation": 4}, "ACCUMULATION 4"),
        ({"units_per_step": 0}, "IMS_PER_BATCH 0"),
        ({"accumulation": 0}, "ACCUMULATION must be at least 1"),
    ],
)
def test_batches_that_cannot_be_shared_are_errors(records, make_mapper, settings, message):
    with pytest.raises(ValueError, match=message):
        make_loader(records, make_mapper, **settings)


def test_a_damaged_image_is_named_from_a_worker(records, make_mapper):
    with open(records[2]["file_name"], "wb") as file:
        file.write(b"nothing")
    with pytest.raises(ValueError, match="3.png: not an image"):
        take_batches(make_loader(records, make_mapper, num_workers=2), 8)


def test_train_loader_from_config(cfg):
    loader = build_train_loader(cfg)
    assert (loader.seed, loader.start, loader.units_per_epoch) == (5, 0, 7)
    batches = take_batches(loader, 4)
    assert {len(batch) for batch in batches} == {2}
    assert batches[0][0]["image"].shape == (3, 8, 8)
    seen = [x["targets"].any().item() for batch in batches for x in batch][:7]
    assert seen.count(False) == 2  # two of seven referents are no target
    for key in ("image_id", "file_name", "expressions"):
        assert key in batches[0][0]
    cfg.SEED = -1
    assert build_train_loader(cfg).seed >= 0
    cfg.SOLVER.IMS_PER_BATCH, cfg.SOLVER.RIS.ACCUMULATION = 4, 2
    assert len(take_batches(build_train_loader(cfg), 1)[0]) == 2
    cfg.INPUT.RIS.UNIT, cfg.INPUT.MAX_EXPRESSIONS = "image", 0
    with pytest.raises(ValueError, match="MAX_EXPRESSIONS"):
        build_train_loader(cfg)


def test_a_mapper_of_ones_own(cfg):
    loader = build_train_loader(cfg, mapper=lambda unit, rng: (unit["image_id"], rng.random()))
    (first, second), *_ = take_batches(loader, 1)
    assert first[0] in (1, 2, 3, 4) and first[1] != second[1]
    (one,) = itertools.islice(
        build_test_loader(cfg, "toy_records", mapper=lambda record: record["image_id"]), 1
    )
    assert one == [1]


def test_a_dataset_without_expressions_is_an_error(cfg, records):
    for record in records:
        record["expressions"] = []
    with pytest.raises(ValueError, match="DATASETS.TRAIN .*toy_records.* has no expressions"):
        build_train_loader(cfg)
    with pytest.raises(ValueError, match="DATASETS.TEST 'toy_records' has no expressions"):
        build_test_loader(cfg, "toy_records")


@pytest.mark.parametrize("num_workers", [0, 2])
def test_test_loader_gives_each_image_with_all_its_expressions(cfg, records, num_workers):
    cfg.DATALOADER.NUM_WORKERS = num_workers
    loader = build_test_loader(cfg, "toy_records")
    assert len(loader) == 4
    batches = list(loader)
    assert [len(batch) for batch in batches] == [1, 1, 1, 1]
    for (mapped,), record in zip(batches, records):
        assert mapped["file_name"] == record["file_name"]
        assert mapped["expressions"] == record["expressions"]
        assert mapped["annotations"] == record["annotations"]
        assert mapped["content_box"] == (0, 0, 8, 8)
        assert len(mapped["input_ids"]) == len(record["expressions"])


def test_test_images_are_shared_by_rank(cfg, monkeypatch):
    seen = []
    for rank in range(6):
        monkeypatch.setattr("detectron2.utils.comm.get_rank", lambda: rank)
        monkeypatch.setattr("detectron2.utils.comm.get_world_size", lambda: 6)
        seen.append([x["image_id"] for (x,) in build_test_loader(cfg, "toy_records")])
    assert sum(seen, []) == [1, 2, 3, 4]
    assert [] in seen  # more processes than images


def test_shards_are_contiguous_and_even():
    rng = np.random.default_rng(0)
    for world_size in (1, 2, 3, 8):
        counts = rng.integers(1, 20, 150)
        ranges = [shard(counts, rank=rank, world_size=world_size) for rank in range(world_size)]
        assert [index for images in ranges for index in images] == list(range(150))
        loads = [counts[images.start : images.stop].sum() for images in ranges]
        assert max(abs(load - counts.sum() / world_size) for load in loads) <= counts.max()
    assert [len(shard([1], rank=rank, world_size=3)) for rank in range(3)] == [0, 1, 0]


class ToySegmenter(torch.nn.Module):
    """One number per expression from the mean colour, as a model of somebody else's could have."""

    seen: list[dict] = []

    def __init__(self, cfg):
        super().__init__()
        self.linear = torch.nn.Linear(3, 1)

    def forward(self, batched_inputs):
        self.seen.extend(batched_inputs)
        losses = []
        for x in batched_inputs:
            score = self.linear(x["image"].float().mean((1, 2)) / 255)
            masks = x["instances"].gt_masks.tensor.float()
            target = torch.einsum("en,nhw->ehw", x["targets"].float(), masks).clamp(max=1)
            losses.append((score - target.mean((1, 2))).pow(2).mean())
        return {"loss_toy": torch.stack(losses).mean()}


def test_detectron2s_own_loader_and_trainer(cfg, records, tmp_path, monkeypatch):
    monkeypatch.setitem(META_ARCH_REGISTRY._obj_map, "ToySegmenter", ToySegmenter)
    monkeypatch.setattr(ToySegmenter, "seen", [])

    class StockTrainer(DefaultTrainer):
        @classmethod
        def build_train_loader(cls, cfg):
            return build_detection_train_loader(cfg, mapper=ReferringMapper(cfg))

    cfg.MODEL.META_ARCHITECTURE, cfg.MODEL.DEVICE, cfg.MODEL.WEIGHTS = "ToySegmenter", "cpu", ""
    cfg.DATASETS.TEST, cfg.OUTPUT_DIR = (), str(tmp_path)
    cfg.SOLVER.MAX_ITER, cfg.SOLVER.STEPS, cfg.SOLVER.BASE_LR = 2, (), 0.1
    trainer = StockTrainer(cfg)
    before = trainer.model.linear.weight.detach().clone()
    trainer.train()
    assert not torch.equal(trainer.model.linear.weight, before)
    assert len(ToySegmenter.seen) == 4


def test_expressions_without_target_survive_detectron2s_own_loader(cfg):
    cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS = False  # as Base-RIS.yaml has it
    loader = build_detection_train_loader(cfg, mapper=ReferringMapper(cfg))
    samples = [x for batch in itertools.islice(loader, 30) for x in batch]
    assert {x["image_id"] for x in samples} == {1, 2, 3, 4}  # image 3 has nothing but no targets
    assert any(not x["targets"].any() for x in samples if x["image_id"] == 1)
    cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS = True  # detectron2's default
    loader = build_detection_train_loader(cfg, mapper=ReferringMapper(cfg))
    assert {x["image_id"] for batch in itertools.islice(loader, 30) for x in batch} == {1, 2, 4}


def private_megabytes(record, rng):
    """The memory that this worker shares with nobody, looked up for one image of fifty."""
    np.array(record["annotations"][0]["segmentation"])
    if record["image_id"] % 50:
        return 0
    with open("/proc/self/smaps_rollup") as file:
        return sum(int(line.split()[1]) for line in file if line.startswith("Private")) / 1024


@pytest.mark.skipif(sys.platform != "linux", reason="asks the kernel")
def test_workers_share_the_records_and_do_not_grow():
    records = [
        {
            "image_id": n,
            "file_name": f"{n}.jpg",
            "annotations": [{"id": n, "segmentation": [[n + i / 7 for i in range(2000)]]}],
            "expressions": [{"expression_id": n, "ref_id": n, "text": "it", "annotation_ids": [n]}],
        }
        for n in range(600)
    ]  # 43 MB of Python's numbers
    loader = ResumableTrainLoader(
        records=records,
        units=build_units(records, "image"),
        mapper=private_megabytes,
        seed=0,
        units_per_step=10,
        num_workers=1,
    )
    batches = itertools.islice(loader, 300)  # five epochs
    measured = [megabytes for batch in batches for megabytes in batch if megabytes]
    assert len(measured) == 60
    assert max(measured) - measured[0] < 4
