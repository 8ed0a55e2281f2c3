"""The optimizer and its parameter groups."""

import logging
import re
from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.solver.build import maybe_add_gradient_clipping
from torch import nn
from torch.nn.modules.conv import _ConvNd

from .muon import Muon

__all__ = ["build_optimizer", "parameter_groups"]

logger = logging.getLogger(__name__)

_NORMS = (
    nn.modules.batchnorm._NormBase,  # every BatchNorm and InstanceNorm
    nn.GroupNorm,
    nn.LayerNorm,
)


def build_optimizer(
    cfg: CfgNode, model: nn.Module, *, clips_full_model: bool = True
) -> torch.optim.Optimizer:
    """Build SOLVER.RIS.OPTIMIZER over the trainable parameters; the log shows its groups.

    detectron2's SOLVER.BIAS_LR_FACTOR and SOLVER.CLIP_GRADIENTS (CLIP_TYPE value, norm) hold, too.

    Args:
        clips_full_model: ``step`` clips by SOLVER.RIS.CLIP_GRAD_NORM. For trainers that do not;
            under detectron2's AMPTrainer, too, gradients are unscaled by then.

    Raises:
        ValueError: unknown optimizer, or see :func:`parameter_groups`.
    """
    ris = cfg.SOLVER.RIS
    kinds = {"AdamW": torch.optim.AdamW, "Adam": torch.optim.Adam, "Muon": Muon}
    if ris.OPTIMIZER not in kinds:
        raise ValueError(f"SOLVER.RIS.OPTIMIZER is {ris.OPTIMIZER!r}, not one of {list(kinds)}")
    decay, bias_decay = cfg.SOLVER.WEIGHT_DECAY, cfg.SOLVER.WEIGHT_DECAY_BIAS
    groups = parameter_groups(
        model,
        lr=cfg.SOLVER.BASE_LR,
        weight_decay=decay,
        weight_decay_norm=cfg.SOLVER.WEIGHT_DECAY_NORM,
        weight_decay_bias=decay if bias_decay is None else bias_decay,
        lr_factors=ris.LR_FACTORS,
        no_decay=ris.NO_DECAY,
        bias_lr_factor=cfg.SOLVER.BIAS_LR_FACTOR,
    )
    options = {"lr": cfg.SOLVER.BASE_LR, "betas": tuple(ris.BETAS), "eps": ris.EPS}
    if ris.OPTIMIZER == "Muon":
        groups = _with_matrices_apart(model, groups, lr_factor=ris.MATRIX_LR_FACTOR)
    else:
        options.update(amsgrad=ris.AMSGRAD, fused=True)  # a third of the time, on CPUs, too
    _log_groups(ris.OPTIMIZER, groups)
    getattr(getattr(model, "module", model), "to_be_applied", set()).discard("SOLVER.RIS")
    optimizer = kinds[ris.OPTIMIZER](groups, **options)
    if clips_full_model and ris.CLIP_GRAD_NORM > 0:
        optimizer.register_step_pre_hook(partial(_clip_before_step, ris.CLIP_GRAD_NORM))
    if cfg.SOLVER.CLIP_GRADIENTS.CLIP_TYPE == "full_model":
        return optimizer
    return maybe_add_gradient_clipping(cfg, optimizer)


def _clip_before_step(max_norm: float, optimizer: torch.optim.Optimizer, *args: Any) -> None:
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    torch.nn.utils.clip_grad_norm_(parameters, max_norm)


def _with_matrices_apart(
    model: nn.Module, groups: list[dict[str, Any]], *, lr_factor: float
) -> list[dict[str, Any]]:
    """The groups split in two each: weights of linear layers and convolutions, and all else."""
    weights = [m.weight for m in model.modules() if isinstance(m, (nn.Linear, _ConvNd))]
    # A layer with one output or a few has no directions that could be brought into balance.
    matrices = {id(w) for w in weights if min(w.flatten(1).shape) >= 8}
    split = []
    for group in groups:
        for apart in (True, False):
            parameters = [p for p in group["params"] if (id(p) in matrices) == apart]
            lr = group["lr"] * (lr_factor if apart else 1.0)
            if parameters:
                split.append({**group, "params": parameters, "lr": lr, "orthogonal": apart})
    return split


def parameter_groups(
    model: nn.Module,
    *,
    lr: float,
    weight_decay: float,
    weight_decay_norm: float = 0.0,
    weight_decay_bias: float = 0.0,
    lr_factors: Sequence[tuple[str, float]] = (),
    no_decay: Sequence[str] = (),
    bias_lr_factor: float = 1.0,
) -> list[dict[str, Any]]:
    """Group the trainable parameters by learning rate and weight decay.

    Args:
        model: its parameters without gradient are left out.
        lr: base learning rate.
        weight_decay: of matrices and larger tensors.
        weight_decay_norm: of normalisation layers.
        weight_decay_bias: of biases and whatever else has at most one dimension.
        lr_factors: (regex, factor); the first regex found in a parameter's name scales its rate.
        no_decay: regexes of parameters without weight decay, whatever they are.
        bias_lr_factor: on top, for parameters named "bias".

    Returns:
        groups for a torch optimizer, in the order of the model's parameters: "params", "lr",
        "weight_decay".

    Raises:
        ValueError: a regex is found in no parameter's name (frozen ones count), is malformed, or no
            parameter is trainable.
    """
    patterns, factors = zip(*lr_factors) if lr_factors else ((), ())
    patterns = _patterns(model, patterns, "SOLVER.RIS.LR_FACTORS")
    no_decay = _patterns(model, no_decay, "SOLVER.RIS.NO_DECAY")
    modules = [module for module in model.modules() if isinstance(module, _NORMS)]
    norms = {id(p) for module in modules for p in module.parameters(recurse=False)}
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        factor = next((float(f) for p, f in zip(patterns, factors) if p.search(name)), 1.0)
        if name.rpartition(".")[2] == "bias":
            factor *= bias_lr_factor
        if any(pattern.search(name) for pattern in no_decay):
            decay = 0.0
        elif id(parameter) in norms:
            decay = weight_decay_norm
        elif parameter.ndim <= 1:
            decay = weight_decay_bias
        else:
            decay = weight_decay
        groups.setdefault((lr * factor, decay), []).append(parameter)
    if not groups:
        raise ValueError(f"{type(model).__name__} has no trainable parameter (MODEL.RIS.FREEZE?)")
    return [
        {"params": parameters, "lr": rate, "weight_decay": decay}
        for (rate, decay), parameters in groups.items()
    ]


def _patterns(model: nn.Module, patterns: Iterable[str], key: str) -> list[re.Pattern]:
    """Compile regexes, each of which must be found in the name of some parameter."""
    names, compiled = [name for name, _ in model.named_parameters()], []
    for pattern in patterns:
        try:
            compiled.append(re.compile(pattern))
        except re.error as error:
            raise ValueError(f"{key}: {pattern!r} is no regular expression: {error}") from error
        if not any(compiled[-1].search(name) for name in names):
            raise ValueError(
                f"{key}: {pattern!r} is found in no parameter's name; names look like "
                f"{', '.join(names[:: max(1, len(names) // 4)][:4])}"
            )
    return compiled


def _log_groups(optimizer: str, groups: Sequence[dict[str, Any]]) -> None:
    lines = [
        f"  lr {group['lr']:.3g}, weight decay {group['weight_decay']:.3g}: "
        f"{len(group['params'])} tensors, {sum(p.numel() for p in group['params']):,} parameters"
        for group in groups
    ]
    logger.info("%s over %d groups:\n%s", optimizer, len(groups), "\n".join(lines))
