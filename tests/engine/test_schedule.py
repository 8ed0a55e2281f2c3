import math

import pytest
import torch

from ris_d2 import get_ris_cfg
from ris_d2.engine.schedule import build_lr_scheduler, with_iterations

pytestmark = pytest.mark.cpu_only


def rates(**options):
    """The learning rate of each iteration, for a base rate of 1 and a second group of 0.1."""
    cfg = get_ris_cfg()
    cfg.SOLVER.MAX_ITER, cfg.SOLVER.WARMUP_ITERS = 10, 0
    cfg.SOLVER.STEPS, cfg.SOLVER.GAMMA = (4, 8), 0.5
    cfg.merge_from_list([x for k, v in options.items() for x in (f"SOLVER.{k}", v)])
    groups = [{"params": [torch.zeros(1)], "lr": lr} for lr in (1.0, 0.1)]
    optimizer = torch.optim.AdamW(groups)
    scheduler = build_lr_scheduler(cfg, optimizer)
    result = []
    for _ in range(cfg.SOLVER.MAX_ITER):
        first, second = (group["lr"] for group in optimizer.param_groups)
        assert second == pytest.approx(first / 10)
        result.append(first)
        optimizer.step()
        scheduler.step()
    return result


def test_step():
    assert rates() == [1.0] * 4 + [0.5] * 4 + [0.25] * 2


def test_steps_past_the_end_are_left_out():
    assert rates(STEPS=(4, 30000)) == [1.0] * 4 + [0.5] * 6
    assert rates(STEPS=(4, 10)) == [1.0] * 4 + [0.5] * 6, "MAX_ITER is 10"


def test_cosine():
    found = rates(**{"RIS.SCHEDULE": "cosine"})
    assert found == pytest.approx([(1 + math.cos(math.pi * t / 10)) / 2 for t in range(10)])


def test_poly():
    found = rates(**{"RIS.SCHEDULE": "poly", "RIS.POLY_POWER": 0.9})
    assert found == pytest.approx([(1 - t / 10) ** 0.9 for t in range(10)])


def test_warmup_ramps_to_the_schedule_without_delaying_it():
    options = {
        "RIS.SCHEDULE": "poly",
        "RIS.POLY_POWER": 1.0,
        "WARMUP_ITERS": 4,
        "WARMUP_FACTOR": 0.2,
    }
    ramp = [0.2 + (0.6 - 0.2) * t / 4 for t in range(4)]
    assert rates(**options) == pytest.approx(ramp + [1 - t / 10 for t in range(4, 10)])
    constant = rates(**options, WARMUP_METHOD="constant")
    assert constant == pytest.approx([0.2] * 4 + [1 - t / 10 for t in range(4, 10)])


@pytest.mark.parametrize(
    "options, message",
    [({"RIS.SCHEDULE": "linear"}, "'linear'"), ({"MAX_ITER": 0}, "MAX_ITER is 0")],
)
def test_unusable_settings(options, message):
    with pytest.raises(ValueError, match=message):
        rates(**options)


def epochs(units, **options):
    cfg = get_ris_cfg()
    cfg.SOLVER.IMS_PER_BATCH = 28
    cfg.merge_from_list([x for k, v in options.items() for x in (f"SOLVER.{k}", v)])
    return with_iterations(cfg, units).SOLVER


def test_epochs_become_iterations_of_the_units_that_are_there():
    """ASDA's released schedule: 32 epochs of 120,624 sentences, 28 a step, x 0.1 after 18 and 28."""
    keys = {"RIS.EPOCHS": 32, "RIS.STEP_EPOCHS": (18, 28), "RIS.WARMUP_EPOCHS": 1}
    solver = epochs(120_624, **keys)
    assert (solver.MAX_ITER, solver.STEPS, solver.WARMUP_ITERS) == (
        137_856,
        (77_544, 120_624),
        4308,
    )
    assert (
        epochs(120_191, **keys).MAX_ITER == 137_362
    )  # RefCOCO+: the recipe stays, its length follows


def test_iterations_count_without_epochs():
    assert epochs(1000, MAX_ITER=7).MAX_ITER == 7


@pytest.mark.parametrize(
    "keys, named",
    [
        ({"RIS.EPOCHS": 2, "MAX_ITER": 7}, "SOLVER.MAX_ITER 7"),
        ({"RIS.EPOCHS": 2, "STEPS": (7,)}, "SOLVER.STEPS"),
        ({"RIS.STEP_EPOCHS": (1,)}, "need SOLVER.RIS.EPOCHS"),
    ],
)
def test_epochs_and_iterations_exclude_each_other(keys, named):
    with pytest.raises(ValueError, match=named):
        epochs(1000, **keys)
