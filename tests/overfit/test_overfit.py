"""What every method owes, shown on its small leaf: its gradients and its existence score carry, and
(``make overfit``) it learns 8 images with 16 sentences by heart."""

from pathlib import Path

import pytest
import torch
from detectron2.data import DatasetCatalog
from detectron2.evaluation import inference_on_dataset
from detectron2.modeling import build_model
from detectron2.utils.events import EventStorage

from ris_d2 import load_config, refshapes
from ris_d2.data.loader import build_test_loader, build_train_loader
from ris_d2.engine.optimizer import build_optimizer
from ris_d2.engine.schedule import build_lr_scheduler
from ris_d2.engine.step import StepTrainer
from ris_d2.evaluation import ReferringEvaluator

LEAVES = Path(__file__).parents[2] / "configs" / "refshapes"
METHODS = ("deris", "risam", "vipa", "asda", "shared_ris")
DATASET = "ris_grefshapes_train"
# The quickstart's colours and kinds, at the size that most leaves read, so that no mask is resampled on
# its way in. Of seeds 0 to 119 the second best for masks of 32 x 32: an ideal one of soft values has IoU
# 97.8. Smaller shapes would test the masks' grid instead of learning.
SCENES = refshapes.Options(
    size=64,
    min_shapes=3,
    max_shapes=4,
    colors=4,
    kinds=4,
    min_expressions=2,
    max_expressions=2,
    no_target_share=0.25,
    multi_target_share=0.3,
    seed=88,
)

# Adding the same to all scores of a query, or to all values that a BatchNorm centres, changes nothing:
# gradients of rounding errors.
TRUE_ZEROS = ("key.bias", "k_proj.bias", "fusion.words.bias", "aggregator.low.0.bias")

BAR = {"mIoU": 90.0, "N_acc": 100.0, "T_acc": 100.0}
# What learning by heart changes in a small leaf, beside the data: weight decay is 0, and this.
RECIPES = {
    "deris": ["SOLVER.MAX_ITER", 160],
    "risam": ["SOLVER.MAX_ITER", 200],
    # Smaller, for time: 6 x 6 tokens with Muon are at mIoU 71 after 120 steps.
    "vipa": [
        *("INPUT.RIS.SIZE", (96, 96), "MODEL.VIPA.DIM", 64),
        *("MODEL.VIPA.DECODER.ATTENTION_STAGES", (4, 3, 2, 1)),
        *("SOLVER.RIS.OPTIMIZER", "AdamW", "SOLVER.BASE_LR", 1e-3),
        *("SOLVER.RIS.LR_FACTORS", [["encoder.text.layers", 0.1]]),
        *("SOLVER.MAX_ITER", 200, "SOLVER.WARMUP_ITERS", 50),
    ],
    "asda": ["SOLVER.MAX_ITER", 300],
    "shared_ris": ["SOLVER.MAX_ITER", 300],
}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("datasets")
    refshapes.write(str(root / "refshapes"), {"train": 8}, SCENES)
    return root


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def small_leaf(root, monkeypatch):
    """(method, options) -> the config of its small leaf on these images, without augmentation."""
    monkeypatch.setenv("DETECTRON2_DATASETS", str(root))

    def load(method, options=()):
        fixed = {
            "MODEL.DEVICE": "cpu",
            "INPUT.RIS.FLIP_PROB": 0.0,
            "DATALOADER.NUM_WORKERS": 0,
            "DATASETS.TEST": (DATASET,),
            "SOLVER.IMS_PER_BATCH": 8,
        }
        pairs = [word for pair in fixed.items() for word in pair]
        return load_config(str(LEAVES / f"{method}_tiny.yaml"), [*pairs, *options])

    return load


def test_the_images_have_single_several_and_no_targets(root, monkeypatch):
    monkeypatch.setenv("DETECTRON2_DATASETS", str(root))
    records = DatasetCatalog.get(DATASET)
    numbers = [len(e["annotation_ids"]) for r in records for e in r["expressions"]]
    assert len(records) == 8 and len(numbers) == 16
    assert min(numbers) == 0 and 1 in numbers and max(numbers) > 1


@pytest.mark.parametrize("method", METHODS)
def test_every_parameter_gets_a_gradient(method, small_leaf):
    """In the second step: in the first, layers that start at zero pass nothing on."""
    cfg = small_leaf(method)
    model = build_model(cfg)
    optimizer = build_optimizer(cfg, model)
    batch = next(iter(build_train_loader(cfg)))
    sum(model(batch).values()).backward()
    optimizer.step()
    optimizer.zero_grad()
    sum(model(batch).values()).backward()
    gradients = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
    assert [n for n, g in gradients.items() if g is None or not g.isfinite().all()] == []
    assert [n for n, g in gradients.items() if not g.any() and not n.endswith(TRUE_ZEROS)] == []


@pytest.mark.parametrize("method", METHODS)
def test_the_existence_score_depends_on_image_and_sentence(method, small_leaf):
    cfg = small_leaf(method)
    model = build_model(cfg).eval()
    first, second = [x for _, (x,) in zip(range(2), build_test_loader(cfg, DATASET))]

    def scores(**changes):
        (output,) = model([{**first, **changes}])
        return torch.tensor([result["score"] for result in output["referring"]])

    other_image = scores(image=second["image"], views=second["views"])
    other_sentence = scores(
        input_ids=first["input_ids"].flip(0), text_mask=first["text_mask"].flip(0)
    )
    # Rounding alone is below 1e-6.
    assert (other_image - scores()).abs().min() > 1e-6
    assert (other_sentence - scores()).abs().min() > 1e-6


def evaluate(cfg, model):
    evaluator = ReferringEvaluator(DATASET, distributed=False)
    return inference_on_dataset(model, build_test_loader(cfg, DATASET), evaluator)["referring"]


@pytest.mark.overfit
@pytest.mark.parametrize("method", RECIPES)
def test_it_learns_sixteen_sentences_by_heart(method, small_leaf):
    """One that cannot has a gradient that carries nothing, a target that its masks cannot show, or an
    existence head that lacks what it needs, whatever its loss on other data looks like."""
    cfg = small_leaf(method, ["SOLVER.WEIGHT_DECAY", 0.0, *RECIPES[method]])
    model = build_model(cfg)
    optimizer = build_optimizer(cfg, model)
    scheduler = build_lr_scheduler(cfg, optimizer)
    clip = cfg.SOLVER.RIS.CLIP_GRAD_NORM
    trainer = StepTrainer(model, build_train_loader(cfg), optimizer, clip_grad_norm=clip)
    with EventStorage():
        for trainer.iter in range(cfg.SOLVER.MAX_ITER):
            trainer.run_step()
            scheduler.step()
            if (trainer.iter + 1) % 25 == 0:
                metrics = evaluate(cfg, model)
                if all(metrics[name] >= bar for name, bar in BAR.items()):
                    return
    pytest.fail(f"after {cfg.SOLVER.MAX_ITER} steps {dict(metrics)}")
