"""Muon (Jordan et al., 2024): steps of weight matrices are made orthogonal."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from ..modeling.precision import has_fast_bf16

MOMENTUM = 0.95
# Quintic Newton-Schulz iteration that takes singular values of 0..1 to about 1 in five rounds.
_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
_ROUNDS = 5


class Muon(torch.optim.Optimizer):
    """Muon for the groups with "orthogonal", AdamW for all others.

    torch.optim.Muon takes matrices alone, one by one. Here convolutions count as matrices (outputs
    x all else), and those of one shape are orthogonalised together.

    An update of a matrix has a root mean square of about 0.2, as AdamW's has (Liu et al., "Muon is
    Scalable for LLM Training", Sec. 2.2), times its group's rate.
    """

    def __init__(
        self,
        groups: list[dict[str, Any]],
        *,
        lr: float,
        betas: tuple[float, float],
        eps: float,
        weight_decay: float = 0.0,
    ):
        """
        Args:
            groups: of parameters, with "orthogonal" True where they have two dimensions or more.
            betas, eps: of AdamW.
        """
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(groups, {**defaults, "orthogonal": False})

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:
        """One step; ``closure`` as in torch.optim."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            parameters = [p for p in group["params"] if p.grad is not None]
            if group["orthogonal"]:
                self._step_matrices(parameters, group)
            else:
                self._step_adam(parameters, group)
        return loss

    def _step_matrices(self, parameters: list[Tensor], group: dict[str, Any]) -> None:
        lr = group["lr"]
        shapes: dict[tuple[int, int], list[tuple[Tensor, Tensor]]] = {}
        for p in parameters:
            state = self.state[p]
            if not state:
                state["momentum"] = torch.zeros_like(p)
            state["momentum"].lerp_(p.grad, 1 - MOMENTUM)
            ahead = p.grad.lerp(state["momentum"], MOMENTUM).flatten(1)  # Nesterov
            shapes.setdefault(tuple(ahead.shape), []).append((p, ahead))
        for shape, pairs in shapes.items():
            updates = orthogonalize(torch.stack([ahead for _, ahead in pairs]))
            for (p, _), update in zip(pairs, updates, strict=True):
                p.mul_(1 - lr * group["weight_decay"])
                p.add_(update.view(p.shape), alpha=-0.2 * lr * math.sqrt(max(shape)))

    def _step_adam(self, parameters: list[Tensor], group: dict[str, Any]) -> None:
        states = [self.state[p] for p in parameters]
        for p, state in zip(parameters, states, strict=True):
            if not state:
                state.update(step=0, mean=torch.zeros_like(p), square=torch.zeros_like(p))
            step = state["step"]  # a number in earlier checkpoints, on the CPU after loading one
            if not isinstance(step, Tensor) or step.device != p.device:
                state["step"] = torch.full((), float(step), device=p.device)
        adamw(
            parameters,
            [p.grad for p in parameters],
            *([state[name] for state in states] for name in ("mean", "square")),
            max_exp_avg_sqs=[],
            state_steps=[state["step"] for state in states],
            fused=True,
            amsgrad=False,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            maximize=False,
            **{name: group[name] for name in ("lr", "weight_decay", "eps")},
        )


def orthogonalize(matrices: Tensor) -> Tensor:
    """The nearest matrices with singular values of about 1 (0.7 to 1.2): (K, m, n) -> (K, m, n).

    Iterates in bf16 where that is fast (4 to 6 times as fast on a CPU with AVX512-BF16), as
    torch.optim.Muon always does: 1 % of a matrix' length.
    """
    is_tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.mT if is_tall else matrices
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    if has_fast_bf16(x.device):
        x = x.bfloat16()
    a, b, c = _COEFFICIENTS
    for _ in range(_ROUNDS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x.mT if is_tall else x).to(matrices.dtype)
