"""Which query answers for which referred instance: Hungarian matching on sampled points."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .points import sample_masks, sample_upsampled


@dataclass(frozen=True, kw_only=True)
class HungarianMatcher:
    """Assignment of the least cost between an expression's queries and its referred instances.

    The cost of a pair is -class_weight * p(referred) + mask_weight * BCE + dice_weight * dice, the
    mask terms on ``num_points`` points that are drawn uniformly and shared by all pairs of an
    expression.
    """

    class_weight: float
    mask_weight: float
    dice_weight: float
    num_points: int

    @torch.no_grad()
    def __call__(
        self,
        rounds: Sequence[dict[str, Tensor]],
        masks: Tensor,
        owners: Tensor,
        names: Sequence[str],
    ) -> tuple[Tensor, Tensor]:
        """Match every round by itself.

        Args:
            rounds: R of them: "mask_logits" (E, Q, h, w); "class_logits" (E, Q, 2), class 0 =
                referred, absent = matched by masks alone.
            masks: float (M, H, W) in {0, 1}, the referred instances of all expressions.
            owners: int64 (M,) on the CPU, the expression of each, ascending.
            names: per expression, of its image, for messages.

        Returns:
            queries, instances: int64 (R, K) both, on the CPU: in round r, query ``queries[r, k]``
            of expression ``owners[instances[r, k]]`` is matched to ``masks[instances[r, k]]``. K is
            the sum of min(Q, instances of the expression).

        Raises:
            FloatingPointError: a cost is infinite or NaN; names the images.
        """
        if not len(masks):
            nothing = owners.new_empty(len(rounds), 0)
            return nothing, nothing
        expressions, row = owners.unique_consecutive(return_inverse=True)
        places = [x.to(masks.device, non_blocking=True) for x in (owners, expressions, row)]
        # The one wait of a step for the GPU.
        costs = torch.stack([self._costs(outputs, masks, *places) for outputs in rounds]).cpu()
        _check_finite(costs, owners, names)
        counts = owners.bincount()
        sizes = counts[counts > 0].tolist()
        matched = [_assign(round_costs, sizes) for round_costs in costs]
        queries, instances = torch.tensor(matched).unbind(1)
        return queries, instances

    def _costs(
        self,
        outputs: dict[str, Tensor],
        masks: Tensor,
        owners: Tensor,
        expressions: Tensor,
        row: Tensor,
    ) -> Tensor:
        """(M, Q) costs of one round; mask m is of expression owners[m] = expressions[row[m]]."""
        points = torch.rand(len(expressions), self.num_points, 2, device=masks.device)
        with torch.autocast(masks.device.type, enabled=False):
            logits = outputs["mask_logits"][expressions]
            logits = sample_upsampled(logits, points, masks.shape[-2:])
            probabilities = logits.sigmoid()
            truths = sample_masks(masks, points[row])[..., None]
            # t softplus(-x) + (1 - t) softplus(x) = softplus(x) - t x
            shared = (logits[row] @ truths)[..., 0]
            bce = (F.softplus(logits).sum(-1)[row] - shared) / self.num_points
            overlap = (probabilities[row] @ truths)[..., 0]
            areas = probabilities.sum(-1)[row] + truths.sum(1)
            dice = 1 - (2 * overlap + 1) / (areas + 1)
            costs = self.mask_weight * bce + self.dice_weight * dice
            if "class_logits" in outputs:
                referred = outputs["class_logits"].float().softmax(-1)[..., 0]
                costs = costs - self.class_weight * referred[owners]
        return costs


def _assign(costs: Tensor, sizes: Sequence[int]) -> list[list[int]]:
    """[queries, instances] of the assignment within consecutive groups of rows of (M, Q) costs."""
    from scipy.optimize import linear_sum_assignment

    queries, instances, start = [], [], 0
    for group in costs.split(sizes):
        rows, columns = linear_sum_assignment(group.T.numpy())
        queries += rows.tolist()
        instances += (columns + start).tolist()
        start += len(group)
    return [queries, instances]


def _check_finite(costs: Tensor, owners: Tensor, names: Sequence[str]) -> None:
    bad = ~costs.isfinite().all(-1)
    if bad.any():
        images = dict.fromkeys(names[owner] for owner in owners[bad.any(0)].tolist())
        rounds = bad.any(1).nonzero()[:, 0].tolist()
        raise FloatingPointError(
            f"matching costs are not finite (rounds {rounds}) in {', '.join(images)}: the model's "
            "logits are infinite or NaN; lower the learning rate or use MODEL.RIS.PRECISION fp32"
        )
