"""detectron2's own keys and its own trainer, with models and settings of ris_d2."""

import logging

import pytest
import torch
from detectron2.config import get_cfg
from detectron2.engine import DefaultTrainer
from detectron2.modeling import build_model
from detectron2.utils.events import EventStorage
from torch import nn

from ris_d2 import add_ris_config, get_ris_cfg, load_config
from ris_d2.engine import build_lr_scheduler, build_optimizer
from ris_d2.engine.trainer import with_stock_keys


def flat(cfg, path=""):
    for key, value in cfg.items():
        if isinstance(value, type(cfg)) and value:
            yield from flat(value, f"{path}{key}.")
        else:
            yield f"{path}{key}", value


def test_other_projects_keys_keep_their_values():
    cfg = get_cfg()
    stock = dict(flat(cfg))
    add_ris_config(cfg)
    assert {k: v for k, v in flat(cfg) if k in stock} == stock
    recipe = load_config("configs/Base-RIS.yaml")
    assert recipe.INPUT.FORMAT == "RGB" and recipe.SOLVER.WEIGHT_DECAY_BIAS == 0.0
    assert recipe.DATALOADER.FILTER_EMPTY_ANNOTATIONS is False


def settings(**values):
    cfg = get_ris_cfg()
    for key, value in values.items():
        cfg.merge_from_list([key.replace("__", "."), value])
    return cfg


def test_amp_is_fp16_on_a_gpu(caplog):
    cfg = settings(SOLVER__AMP__ENABLED=True, MODEL__DEVICE="cuda")
    with caplog.at_level(logging.INFO, "ris_d2"):
        assert with_stock_keys(cfg).MODEL.RIS.PRECISION == "fp16"
    assert "MODEL.RIS.PRECISION" in caplog.text
    bf16 = settings(SOLVER__AMP__ENABLED=True, MODEL__RIS__PRECISION="bf16", MODEL__DEVICE="cpu")
    assert with_stock_keys(bf16).MODEL.RIS.PRECISION == "bf16"


CLIP = {"SOLVER__CLIP_GRADIENTS__ENABLED": True, "SOLVER__CLIP_GRADIENTS__CLIP_VALUE": 0.5}


def test_full_model_clipping_is_ours():
    cfg = settings(**CLIP, SOLVER__CLIP_GRADIENTS__CLIP_TYPE="full_model")
    mapped = with_stock_keys(cfg)
    assert mapped.SOLVER.RIS.CLIP_GRAD_NORM == 0.5 and cfg.SOLVER.RIS.CLIP_GRAD_NORM == 0.0
    assert with_stock_keys(mapped) is mapped, "a second reading changes nothing"
    cfg.SOLVER.RIS.CLIP_GRAD_NORM = 0.1
    with pytest.raises(ValueError, match="not both"):
        with_stock_keys(cfg)


def stepped(cfg):
    """Two parameters, and their gradients (3, 4) and (0.1,) as the optimizer's step leaves them."""
    model = nn.ParameterList([torch.zeros(2), torch.zeros(1)])
    optimizer = build_optimizer(cfg, model)
    model[0].grad, model[1].grad = torch.tensor([3.0, 4.0]), torch.tensor([0.1])
    optimizer.step()
    return [parameter.grad for parameter in model]


def test_each_kind_of_clipping():
    free = settings(SOLVER__CLIP_GRADIENTS__ENABLED=False)
    assert stepped(free)[0].tolist() == [3.0, 4.0]
    value = settings(**CLIP, SOLVER__CLIP_GRADIENTS__CLIP_TYPE="value")
    assert [g.tolist() for g in stepped(value)] == [[0.5, 0.5], [pytest.approx(0.1)]]
    norm = settings(**CLIP, SOLVER__CLIP_GRADIENTS__CLIP_TYPE="norm")
    torch.testing.assert_close(stepped(norm)[0], torch.tensor([0.3, 0.4]))
    torch.testing.assert_close(stepped(norm)[1], torch.tensor([0.1]))
    whole = stepped(settings(SOLVER__RIS__CLIP_GRAD_NORM=0.5))
    torch.testing.assert_close(torch.cat(whole).norm(), torch.tensor(0.5), atol=1e-5, rtol=0)


def test_bias_lr_factor_and_schedules_of_detectron2():
    cfg = settings(SOLVER__BIAS_LR_FACTOR=2.0, SOLVER__BASE_LR=0.5, SOLVER__WARMUP_ITERS=0)
    cfg.SOLVER.LR_SCHEDULER_NAME, cfg.SOLVER.MAX_ITER = "WarmupCosineLR", 10
    optimizer = build_optimizer(cfg, nn.Linear(2, 2))
    assert sorted(group["lr"] for group in optimizer.param_groups) == [0.5, 1.0]
    schedule = build_lr_scheduler(cfg, optimizer)
    for _ in range(5):
        optimizer.step()
        schedule.step()
    assert sorted(schedule.get_last_lr()) == pytest.approx([0.25, 0.5])
    cfg.SOLVER.RIS.SCHEDULE = "poly"
    with pytest.raises(ValueError, match="not both"):
        build_lr_scheduler(cfg, optimizer)


SMALL = [
    "MODEL.RIS.BEIT3.EMBED_DIM",
    16,
    "MODEL.RIS.BEIT3.DEPTH",
    2,
    "MODEL.RIS.BEIT3.NUM_HEADS",
    2,
]
SMALL += ["MODEL.SHARED_RIS.DIM", 16, "MODEL.SHARED_RIS.NUM_HEADS", 2, "INPUT.RIS.SIZE", (32, 32)]
SMALL += ["MODEL.SHARED_RIS.STAGES", (1, 2), "MODEL.META_ARCHITECTURE", "SharedRIS"]
SMALL += ["MODEL.DEVICE", "cpu", "MODEL.WEIGHTS", "", "MODEL.RIS.BEIT3.VOCAB_SIZE", 50]


def unit():
    from detectron2.structures import BitMasks, Instances

    instances = Instances((32, 32), gt_masks=BitMasks(torch.ones(1, 32, 32, dtype=torch.bool)))
    return {
        "image": torch.zeros(3, 32, 32, dtype=torch.uint8),
        "views": {},
        "input_ids": torch.ones(1, 20, dtype=torch.int64),
        "text_mask": torch.ones(1, 20, dtype=torch.bool),
        "expressions": [{"expression_id": 0}],
        "instances": instances,
        "targets": torch.ones(1, 1, dtype=torch.bool),
    }


def test_a_stock_trainer_is_told_what_it_leaves_out(caplog):
    cfg = load_config("", [*SMALL, "MODEL.INIT", [["beit3", "absent.pth"]]])
    model = build_model(cfg).train()
    with caplog.at_level(logging.WARNING, "ris_d2"), EventStorage():
        DefaultTrainer.build_optimizer(cfg, model)
        model([unit()])
        model([unit()])
    assert caplog.text.count("under MODEL.INIT and SOLVER.RIS") == 1


def test_the_documented_lines_make_a_stock_trainer_right(caplog, monkeypatch):
    """docs/extending.md: our optimizer and schedule in DefaultTrainer, and no warning."""
    from ris_d2.checkpoint import load_init

    class MyTrainer(DefaultTrainer):
        build_optimizer = staticmethod(build_optimizer)
        build_lr_scheduler = staticmethod(build_lr_scheduler)

        @classmethod
        def build_train_loader(cls, cfg):
            return [[unit()]] * 2

        def build_hooks(self):
            return []

    options = [
        "SOLVER.RIS.SCHEDULE",
        "poly",
        "SOLVER.MAX_ITER",
        2,
        "SOLVER.RIS.CLIP_GRAD_NORM",
        0.1,
    ]
    cfg = load_config("", [*SMALL, *options])
    cfg.SOLVER.WARMUP_ITERS = 0
    with caplog.at_level(logging.WARNING, "ris_d2"):
        trainer = MyTrainer(cfg)
        load_init(trainer.model, cfg.MODEL.INIT)
        trainer.train()
    assert isinstance(trainer.optimizer, torch.optim.AdamW)
    parameters = [p for p in trainer.model.parameters() if p.grad is not None]
    norm = torch.stack([p.grad.norm() for p in parameters]).norm()
    assert norm <= 0.1 + 1e-5
    assert "is trained without" not in caplog.text


@pytest.mark.parametrize("leaf", ["deris", "shared_ris", "vipa", "asda"])
def test_a_backbone_that_a_method_cannot_use_is_refused(leaf):
    name = "build_no_such_backbone" if leaf == "deris" else "RISSAMViT"
    cfg = load_config(f"configs/instant_test/{leaf}.yaml", ["MODEL.BACKBONE.NAME", name])
    with pytest.raises(ValueError, match=f"MODEL.BACKBONE.NAME is '{name}'"):
        build_model(cfg)
