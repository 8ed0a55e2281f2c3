"""DeRIS' losses: which queries are referred to, what their masks are, whether there is a target."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from detectron2.config import CfgNode, configurable
from torch import Tensor, nn

from ..losses import mask_bce, mask_dice, mean_over_processes
from ..options import arguments
from .matcher import HungarianMatcher
from .points import draw_uncertain_points, sample_masks, sample_upsampled


class DeRISCriterion(nn.Module):
    """L = sum over rounds of lambda^r (class + mask + dice) + existence, each with its weight.

    The lambda of the last round is 1, that of the others aux_weight. Every round is matched by
    itself. Only the instances that an expression refers to are targets; each is matched to a query
    of its own, and all other queries are trained to be not referred to, which is all that an
    expression without target asks for.

    Normalisers (number of instances, class weights, expressions) are means over the processes, so
    that several processes train as one does. (Released: the class and existence terms are
    normalised per process; on one process it is the same.)
    """

    @configurable
    def __init__(
        self,
        *,
        aux_weight: float,
        existence_weight: float,
        not_referred_weight: float,
        num_points: int,
        **weights: float,
    ):
        """
        Args:
            aux_weight: lambda_aux, weight of all rounds but the last.
            not_referred_weight: of unmatched queries in the class term; matched ones weigh 1.
            num_points: P per mask, in matching and loss.
            weights: class_weight, mask_weight and dice_weight, of the terms in the loss and in the
                matching.

        Raises:
            ValueError: no points.
        """
        super().__init__()
        if num_points < 1:
            raise ValueError(f"MODEL.DERIS.NUM_POINTS is {num_points}, not at least 1")
        self.aux_weight, self.existence_weight = aux_weight, existence_weight
        self.not_referred_weight = not_referred_weight
        label_weights = torch.tensor([1.0, not_referred_weight])
        self.register_buffer("label_weights", label_weights, persistent=False)
        self.matcher = HungarianMatcher(num_points=num_points, **weights)

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        deris = cfg.MODEL.DERIS
        return {
            "existence_weight": cfg.MODEL.RIS.EXISTENCE_WEIGHT,
            **arguments(deris, "CLASS_WEIGHT", "MASK_WEIGHT", "DICE_WEIGHT", "AUX_WEIGHT"),
            **arguments(deris, "NOT_REFERRED_WEIGHT", "NUM_POINTS"),
        }

    def forward(
        self,
        rounds: Sequence[dict[str, Tensor]],
        existence_logits: Tensor,
        instance_masks: Sequence[Tensor],
        targets: Sequence[Tensor],
        names: Sequence[str],
    ) -> dict[str, Tensor]:
        """
        Args:
            rounds: R of them, the last one final: "mask_logits" (E, Q, h, w), as the mask head
                gives them, not upsampled; "class_logits" (E, Q, 2), before softmax, class 0 =
                referred, 1 = not. A round without "class_logits" (query flows that score once) is
                matched and supervised on masks alone; the last one has them.
            existence_logits: (E,), before sigmoid; positive = a target exists.
            instance_masks: per unit bool (N, H, W) at the model's input size (padded if smaller),
                at which losses are taken.
            targets: per unit bool (E of the unit, N), on the CPU: which instances each expression
                refers to.
            names: per expression, of its image, for messages.

        Returns:
            weighted scalars: loss_class, loss_mask, loss_dice of the last round, the same with
            _0, _1, ... of the rounds before it (loss_class_r only where there are scores), and
            loss_existence. The same names on every step; without any target, mask terms are 0.

        Raises:
            FloatingPointError: the costs of matching are infinite or NaN; names the images.
        """
        device = existence_logits.device
        with torch.autocast(device.type, enabled=False):
            masks, owners = _referred(instance_masks, targets, device)
            queries, matched = self.matcher(rounds, masks, owners, names)
            indices = torch.stack([owners[matched], queries, matched])  # matched on the CPU
            expressions, queries, matched = indices.to(device, non_blocking=True)
            class_losses = self._class_losses(rounds, expressions, queries)
            mask_losses, dice_losses = self._mask_losses(
                rounds, expressions, queries, masks, matched
            )
            exists = torch.cat([rows.any(1) for rows in targets]).float()
            existence = F.binary_cross_entropy_with_logits(
                existence_logits.float(), exists.to(device, non_blocking=True), reduction="sum"
            ) / mean_over_processes(len(exists), device)
        losses = {"loss_existence": self.existence_weight * existence}
        last, term = len(rounds) - 1, self.matcher
        for number in range(len(rounds)):
            suffix, weight = ("", 1.0) if number == last else (f"_{number}", self.aux_weight)
            if number in class_losses:
                losses[f"loss_class{suffix}"] = weight * term.class_weight * class_losses[number]
            losses[f"loss_mask{suffix}"] = weight * term.mask_weight * mask_losses[number]
            losses[f"loss_dice{suffix}"] = weight * term.dice_weight * dice_losses[number]
        return losses

    def counts(self, targets: Sequence[Tensor], num_queries: int) -> dict[str, float]:
        """What losses are divided by, by the start of their names; existence is a mean.

        Args:
            targets: as ``forward``.
            num_queries: Q.
        """
        wanted = torch.cat([rows.sum(1) for rows in targets])
        matched = wanted.clamp(max=num_queries).sum().item()
        others = len(wanted) * num_queries - matched
        num_masks = wanted.sum().item()
        return {
            "loss_class": matched + self.not_referred_weight * others,
            "loss_mask": num_masks,
            "loss_dice": num_masks,
        }

    def _class_losses(
        self, rounds: Sequence[dict[str, Tensor]], expressions: Tensor, queries: Tensor
    ) -> dict[int, Tensor]:
        """Two-class cross-entropy, weighted mean over all queries: round -> scalar."""
        numbers = [number for number, outputs in enumerate(rounds) if "class_logits" in outputs]
        logits = torch.stack([rounds[number]["class_logits"].float() for number in numbers])
        labels = torch.ones(logits.shape[:3], dtype=torch.int64, device=logits.device)
        for row, number in zip(labels, numbers, strict=True):
            row[expressions[number], queries[number]] = 0
        losses = F.cross_entropy(
            logits.flatten(0, 2), labels.flatten(), self.label_weights, reduction="none"
        )
        # All rounds match equally many queries: one normaliser, the sum of the labels' weights.
        matched = queries.shape[1]
        weight = matched + self.not_referred_weight * (labels[0].numel() - matched)
        count = mean_over_processes(weight, logits.device)
        return dict(zip(numbers, losses.view(len(numbers), -1).sum(1) / count, strict=True))

    def _mask_losses(
        self,
        rounds: Sequence[dict[str, Tensor]],
        expressions: Tensor,
        queries: Tensor,
        masks: Tensor,
        matched: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """Cross-entropy and dice on points: (R,), (R,)."""
        logits = torch.cat(
            [
                outputs["mask_logits"][e, q]
                for outputs, e, q in zip(rounds, expressions, queries, strict=True)
            ]
        )
        size = masks.shape[-2:]
        points = draw_uncertain_points(logits, size, num_points=self.matcher.num_points)
        truths = sample_masks(masks[matched.flatten()], points)
        logits = sample_upsampled(logits[:, None], points, size)[:, 0]
        bce, dice = mask_bce(logits, truths), mask_dice(logits, truths)
        # Released: at least 1. With fewer targets than processes that would not be one
        # process' loss.
        count = mean_over_processes(len(masks), logits.device)
        return bce.view(matched.shape).sum(1) / count, dice.view(matched.shape).sum(1) / count


def _referred(
    instance_masks: Sequence[Tensor], targets: Sequence[Tensor], device: torch.device
) -> tuple[Tensor, Tensor]:
    """Referred instances: masks float (M, H, W), their expressions int64 (M,) on the CPU."""
    owners, instances = torch.block_diag(*targets).nonzero().T
    masks = torch.cat(list(instance_masks)).to(device, non_blocking=True)
    return masks[instances.to(device, non_blocking=True)].float(), owners
