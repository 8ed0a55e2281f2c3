"""Learning-rate schedules: step, cosine and poly, with warm-up."""

import logging
import math

import torch
from detectron2.config import CfgNode, get_cfg
from detectron2.solver.build import build_lr_scheduler as build_stock_lr_scheduler
from detectron2.solver.lr_scheduler import LRMultiplier, WarmupParamScheduler
from fvcore.common.param_scheduler import PolynomialDecayParamScheduler

from ..config import with_values

logger = logging.getLogger(__name__)


def with_iterations(cfg: CfgNode, units_per_epoch: int) -> CfgNode:
    """Turn SOLVER.RIS.EPOCHS, STEP_EPOCHS and WARMUP_EPOCHS into iterations, if they are set.

    Args:
        units_per_epoch: training units of all processes together.

    Returns:
        ``cfg``, or a frozen copy with SOLVER.MAX_ITER, STEPS and WARMUP_ITERS of so many epochs.

    Raises:
        ValueError: both epochs and iterations are set.
    """
    solver, ris = cfg.SOLVER, cfg.SOLVER.RIS
    if not ris.EPOCHS:
        if ris.STEP_EPOCHS or ris.WARMUP_EPOCHS:
            raise ValueError("SOLVER.RIS.STEP_EPOCHS and WARMUP_EPOCHS need SOLVER.RIS.EPOCHS")
        return cfg
    stock = get_cfg().SOLVER
    for key in ("MAX_ITER", "STEPS"):
        if solver[key] != stock[key]:
            raise ValueError(
                f"SOLVER.{key} {solver[key]} and SOLVER.RIS.EPOCHS {ris.EPOCHS} are both set; "
                "SOLVER.RIS.EPOCHS 0 SOLVER.RIS.STEP_EPOCHS () counts in iterations"
            )

    def iterations(epochs: int) -> int:
        return math.ceil(epochs * units_per_epoch / solver.IMS_PER_BATCH)

    values = {
        "SOLVER.MAX_ITER": iterations(ris.EPOCHS),
        "SOLVER.STEPS": tuple(map(iterations, ris.STEP_EPOCHS)),
    }
    if ris.WARMUP_EPOCHS:
        values["SOLVER.WARMUP_ITERS"] = iterations(ris.WARMUP_EPOCHS)
    return with_values(cfg, values)


def build_lr_scheduler(cfg: CfgNode, optimizer: torch.optim.Optimizer) -> LRMultiplier:
    """Build SOLVER.RIS.SCHEDULE: the factor on every group's rate at iteration t of T = MAX_ITER.

    step: GAMMA^(number of SOLVER.STEPS passed); cosine: (1 + cos(pi t/T)) / 2; poly:
    (1 - t/T)^POLY_POWER. The first SOLVER.WARMUP_ITERS iterations are a ramp (WARMUP_METHOD linear
    or constant) from WARMUP_FACTOR to the value that the schedule has at the end of the warm-up;
    its clock is not delayed by the warm-up.

    A SOLVER.LR_SCHEDULER_NAME other than detectron2's default (WarmupCosineLR, ...) is built by
    detectron2, and SCHEDULE must be left alone.

    Raises:
        ValueError: unknown schedule, two of them, or MAX_ITER is not positive.
    """
    solver = cfg.SOLVER
    if solver.MAX_ITER <= 0:
        raise ValueError(f"SOLVER.MAX_ITER is {solver.MAX_ITER}; it must be positive")
    if solver.LR_SCHEDULER_NAME != "WarmupMultiStepLR":
        if solver.RIS.SCHEDULE != "step":
            raise ValueError("set SOLVER.LR_SCHEDULER_NAME or SOLVER.RIS.SCHEDULE, not both")
        logger.info("Learning rate: detectron2's %s", solver.LR_SCHEDULER_NAME)
    if solver.RIS.SCHEDULE == "poly":  # which detectron2 lacks
        warmup = WarmupParamScheduler(
            PolynomialDecayParamScheduler(1.0, solver.RIS.POLY_POWER),
            solver.WARMUP_FACTOR,
            min(solver.WARMUP_ITERS / solver.MAX_ITER, 1.0),
            solver.WARMUP_METHOD,
        )
        return LRMultiplier(optimizer, warmup, solver.MAX_ITER)
    stock = {"step": solver.LR_SCHEDULER_NAME, "cosine": "WarmupCosineLR"}
    if solver.RIS.SCHEDULE not in stock:
        raise ValueError(f"SOLVER.RIS.SCHEDULE {solver.RIS.SCHEDULE!r} is not step, cosine or poly")
    # detectron2 leaves out the steps past MAX_ITER, and stumbles over one at MAX_ITER.
    steps = tuple(step for step in solver.STEPS if step < solver.MAX_ITER)
    if len(steps) < len(solver.STEPS):
        logger.warning("SOLVER.STEPS %s reach past MAX_ITER %d", solver.STEPS, solver.MAX_ITER)
    values = {"SOLVER.LR_SCHEDULER_NAME": stock[solver.RIS.SCHEDULE], "SOLVER.STEPS": steps}
    return build_stock_lr_scheduler(with_values(cfg, values), optimizer)
