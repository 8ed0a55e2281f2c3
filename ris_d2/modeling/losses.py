"""Mask losses that more than one method uses. All return one value per expression, in fp32."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from detectron2.utils import comm
from torch import Tensor


def mask_bce(logits: Tensor, targets: Tensor) -> Tensor:
    """Binary cross-entropy, mean over pixels: (E, H, W), (E, H, W) in [0, 1] -> (E,)."""
    return mask_focal(logits, targets, alpha=-1, gamma=0)


def mask_focal(logits: Tensor, targets: Tensor, *, alpha: float, gamma: float) -> Tensor:
    """Focal loss (Lin et al., ICCV 2017), mean over pixels: (E, H, W), (E, H, W) in [0, 1] -> (E,).

    Args:
        alpha: weight of foreground, 1 - alpha that of background; negative: no weights.
        gamma: exponent of (1 - p_t); 0 with a negative alpha is plain cross-entropy.
    """
    logits, targets = logits.float(), targets.float()
    loss = F.binary_cross_entropy_with_logits(logits, targets, reduction="none")
    if gamma > 0:
        loss = loss * (logits.sigmoid() - targets).abs() ** gamma  # |p - t| = 1 - p_t
    if alpha >= 0:
        loss = loss * (alpha * targets + (1 - alpha) * (1 - targets))
    return loss.flatten(1).mean(1)


def mask_dice(logits: Tensor, targets: Tensor, *, smooth: float = 1.0) -> Tensor:
    """Dice loss 1 - (2 sum(pg) + s) / (sum p + sum g + s): (E, H, W), (E, H, W) -> (E,)."""
    return dice_loss(logits.float().sigmoid(), targets.float(), smooth=smooth)


def dice_loss(probabilities: Tensor, targets: Tensor, *, smooth: float = 1.0) -> Tensor:
    """As ``mask_dice``, of probabilities."""
    probabilities, targets = probabilities.flatten(1), targets.flatten(1)
    overlap = (probabilities * targets).sum(1)
    return 1 - (2 * overlap + smooth) / (probabilities.sum(1) + targets.sum(1) + smooth)


@dataclass(frozen=True, kw_only=True)
class FocalAndDice:
    """Two losses of masks: logits (E, H, W), targets (E, H, W) in [0, 1] -> name -> (E,).

    Attributes:
        focal_weight, dice_weight: of the two terms.
        focal_alpha, focal_gamma: see ``mask_focal``; the defaults are plain cross-entropy.
        focal_name: what the first term is called.
        dice_smooth: see ``mask_dice``.
    """

    focal_weight: float
    dice_weight: float
    focal_gamma: float = 0.0
    focal_alpha: float = -1.0
    focal_name: str = "loss_focal"
    dice_smooth: float = 1.0

    def __call__(self, logits: Tensor, targets: Tensor) -> dict[str, Tensor]:
        focal = mask_focal(logits, targets, alpha=self.focal_alpha, gamma=self.focal_gamma)
        dice = mask_dice(logits, targets, smooth=self.dice_smooth)
        return {self.focal_name: self.focal_weight * focal, "loss_dice": self.dice_weight * dice}


def mean_over_processes(count: float, device: torch.device) -> float | Tensor:
    """Mean of ``count`` over processes, so that DDP's mean of gradients is the mean over samples.

    To be divided by: where nothing was counted, and 0 is to be divided, it is just not 0.
    """
    nothing = 1e-6
    processes = comm.get_world_size()
    if processes == 1:
        return max(float(count), nothing)
    total = torch.full((), float(count), device=device)  # not read: that would wait for a GPU
    torch.distributed.all_reduce(total)
    return (total / processes).clamp(min=nothing)
