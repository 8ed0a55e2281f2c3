"""Learning-rate schedules: step, cosine and poly, with warm-up."""

import logging

import torch
from detectron2.config import CfgNode
from detectron2.solver.lr_scheduler import LRMultiplier, WarmupParamScheduler
from fvcore.common.param_scheduler import (
    CosineParamScheduler,
    MultiStepParamScheduler,
    ParamScheduler,
    PolynomialDecayParamScheduler,
)

__all__ = ["build_lr_scheduler"]

logger = logging.getLogger(__name__)


def build_lr_scheduler(cfg: CfgNode, optimizer: torch.optim.Optimizer) -> LRMultiplier:
    """Build SOLVER.RIS.SCHEDULE: the factor on every group's rate at iteration t of T = MAX_ITER.

    step: GAMMA^(number of SOLVER.STEPS passed); cosine: (1 + cos(pi t/T)) / 2; poly:
    (1 - t/T)^POLY_POWER. The first SOLVER.WARMUP_ITERS iterations are a ramp (WARMUP_METHOD linear
    or constant) from WARMUP_FACTOR to the value that the schedule has at the end of the warm-up;
    its clock is not delayed by the warm-up.

    Raises:
        ValueError: unknown schedule, or MAX_ITER is not positive.
    """
    solver = cfg.SOLVER
    if solver.MAX_ITER <= 0:
        raise ValueError(f"SOLVER.MAX_ITER is {solver.MAX_ITER}; it must be positive")
    if solver.RIS.SCHEDULE == "step":
        schedule = _steps(cfg)
    elif solver.RIS.SCHEDULE == "cosine":
        schedule = CosineParamScheduler(1.0, 0.0)
    elif solver.RIS.SCHEDULE == "poly":
        schedule = PolynomialDecayParamScheduler(1.0, solver.RIS.POLY_POWER)
    else:
        raise ValueError(
            f"SOLVER.RIS.SCHEDULE is {solver.RIS.SCHEDULE!r}, not step, cosine or poly"
        )
    if solver.WARMUP_ITERS > 0:
        length = min(solver.WARMUP_ITERS / solver.MAX_ITER, 1.0)
        schedule = WarmupParamScheduler(
            schedule, solver.WARMUP_FACTOR, length, solver.WARMUP_METHOD
        )
    return LRMultiplier(optimizer, schedule, solver.MAX_ITER)


def _steps(cfg: CfgNode) -> ParamScheduler:
    solver = cfg.SOLVER
    steps = [step for step in solver.STEPS if step < solver.MAX_ITER]
    if len(steps) < len(solver.STEPS):
        logger.warning("SOLVER.STEPS %s reach past MAX_ITER %d", solver.STEPS, solver.MAX_ITER)
    return MultiStepParamScheduler(
        [solver.GAMMA**k for k in range(len(steps) + 1)],
        milestones=steps,
        num_updates=solver.MAX_ITER,
    )
