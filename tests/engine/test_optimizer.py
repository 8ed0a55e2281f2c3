import logging

import pytest
import torch
from torch import nn

from ris_d2 import get_ris_cfg
from ris_d2.engine.optimizer import build_optimizer, parameter_groups


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1))
        self.positions = nn.Parameter(torch.zeros(5, 4))
        self.temperature = nn.Parameter(torch.zeros(()))
        self.head = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4))
        self.frozen = nn.Linear(4, 4).requires_grad_(False)


def settings(model, groups):
    """parameter name -> (lr, weight decay)"""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    listed = [
        (names[id(parameter)], (group["lr"], group["weight_decay"]))
        for group in groups
        for parameter in group["params"]
    ]
    assert len(listed) == len(dict(listed))
    return dict(listed)


def test_groups_by_name_and_kind():
    model = Model()
    groups = parameter_groups(
        model,
        lr=1.0,
        weight_decay=0.3,
        weight_decay_norm=0.1,
        weight_decay_bias=0.2,
        lr_factors=[[r"encoder\.2", 0.5], ["^encoder", 0.25]],
        no_decay=["positions"],
    )
    assert settings(model, groups) == {
        "encoder.0.weight": (0.25, 0.3),
        "encoder.0.bias": (0.25, 0.2),
        "encoder.1.weight": (0.25, 0.1),
        "encoder.1.bias": (0.25, 0.1),
        "encoder.2.weight": (0.5, 0.3),
        "encoder.2.bias": (0.5, 0.2),
        "positions": (1.0, 0.0),
        "temperature": (1.0, 0.2),
        "head.0.weight": (1.0, 0.3),
        "head.0.bias": (1.0, 0.2),
        "head.1.weight": (1.0, 0.1),
        "head.1.bias": (1.0, 0.1),
    }
    kinds = [(group["lr"], group["weight_decay"]) for group in groups]
    assert len(kinds) == len(set(kinds))  # as few groups as there are settings


@pytest.mark.parametrize(
    "options, message",
    [
        ({"lr_factors": [["encodr", 0.1]]}, "LR_FACTORS: 'encodr' is found in no parameter's name"),
        ({"no_decay": ["pos_embed"]}, "NO_DECAY: 'pos_embed' is found in no parameter's name"),
        ({"no_decay": ["(a"]}, "no regular expression"),
    ],
)
def test_a_pattern_without_effect_is_an_error(options, message):
    with pytest.raises(ValueError, match=message):
        parameter_groups(Model(), lr=1.0, weight_decay=0.0, **options)


def test_a_pattern_may_name_frozen_parameters_only():
    groups = parameter_groups(Model(), lr=1.0, weight_decay=0.0, lr_factors=[["frozen", 0.1]])
    assert [group["lr"] for group in groups] == [1.0]


def test_a_model_without_trainable_parameters_is_an_error():
    with pytest.raises(ValueError, match="no trainable parameter"):
        parameter_groups(nn.Linear(2, 2).requires_grad_(False), lr=1.0, weight_decay=0.0)


@pytest.mark.parametrize("name", ["AdamW", "Adam"])
def test_optimizer_follows_the_config(name, caplog):
    cfg = get_ris_cfg()
    cfg.SOLVER.BASE_LR, cfg.SOLVER.WEIGHT_DECAY = 0.5, 0.25
    cfg.SOLVER.WEIGHT_DECAY_BIAS = 0.0  # as configs/Base-RIS.yaml
    ris = cfg.SOLVER.RIS
    ris.OPTIMIZER, ris.BETAS, ris.EPS, ris.AMSGRAD = name, (0.8, 0.9), 1e-5, True
    model = Model()
    with caplog.at_level(logging.INFO, "ris_d2"):
        optimizer = build_optimizer(cfg, model)
    assert type(optimizer).__name__ == name and optimizer.defaults["fused"]
    for group in optimizer.param_groups:
        assert (group["betas"], group["eps"], group["amsgrad"]) == ((0.8, 0.9), 1e-5, True)
    found = settings(model, optimizer.param_groups)
    assert found["head.0.weight"] == (0.5, 0.25)
    assert {found[n][1] for n in ("head.0.bias", "head.1.weight", "temperature")} == {0.0}
    assert "lr 0.5, weight decay 0.25: 4 tensors, 64 parameters" in caplog.text


def test_weight_decay_bias_none_is_that_of_detectron2():
    cfg = get_ris_cfg()
    cfg.SOLVER.WEIGHT_DECAY = 0.25
    cfg.merge_from_list(["SOLVER.WEIGHT_DECAY_BIAS", None])
    model = Model()
    found = settings(model, build_optimizer(cfg, model).param_groups)
    assert found["head.0.bias"][1] == 0.25


def test_unknown_optimizer():
    cfg = get_ris_cfg()
    cfg.SOLVER.RIS.OPTIMIZER = "SGD"
    with pytest.raises(ValueError, match="'SGD', not one of"):
        build_optimizer(cfg, Model())
