"""Values of masks at sampled points, as PointRend and Mask2Former train masks.

Points are (x, y) in [0, 1] of the mask's extent, whatever its resolution.
"""

import itertools

import torch
import torch.nn.functional as F
from torch import Tensor


def sample_masks(masks: Tensor, points: Tensor) -> Tensor:
    """Bilinear values of ``masks`` (M, H, W) float at ``points`` (M, P, 2) -> (M, P)."""
    return F.grid_sample(masks[:, None], 2 * points[:, None] - 1, align_corners=False)[:, 0, 0]


def sample_upsampled(logits: Tensor, points: Tensor, size: tuple[int, int]) -> Tensor:
    """Values that maps would have at the points if they had been upsampled first.

    Equal to bilinear upsampling to ``size`` (align_corners=True, as released) followed by bilinear
    sampling, but the upsampled maps are never made: only their four pixels around each point.

    Args:
        logits: (B, C, h, w).
        points: (B, P, 2).
        size: (H, W) of the upsampled maps.

    Returns:
        (B, C, P), in fp32.
    """
    logits = logits.float()
    rows = _neighbours(points[..., 1], size[0])
    columns = _neighbours(points[..., 0], size[1])
    values = 0
    for (x, x_share), (y, y_share) in itertools.product(columns, rows):
        corners = F.grid_sample(
            logits, torch.stack([x, y], -1)[:, None], padding_mode="border", align_corners=True
        )
        values = values + (x_share * y_share)[:, None] * corners[:, :, 0]
    return values


def _neighbours(positions: Tensor, length: int) -> list[tuple[Tensor, Tensor]]:
    """The two pixels beside each position in [0, 1], as (place in [-1, 1], share in its value)."""
    positions = positions * length - 0.5
    low = positions.floor()
    upper_share = positions - low
    # Pixels outside of the map count as 0, as in grid_sample.
    return [
        (low * (2 / (length - 1)) - 1, (1 - upper_share) * (low >= 0)),
        ((low + 1) * (2 / (length - 1)) - 1, upper_share * (low < length - 1)),
    ]


@torch.no_grad()
def draw_uncertain_points(
    logits: Tensor,
    size: tuple[int, int],
    *,
    num_points: int,
    oversample_ratio: float = 3.0,
    importance_ratio: float = 0.75,
) -> Tensor:
    """Draw the points of the loss: most where the prediction is undecided, the others anywhere.

    The defaults are PointRend's, as released.

    Args:
        logits: (M, h, w), seen as upsampled to ``size``.
        num_points: P.
        oversample_ratio: candidates per point, at least 1.
        importance_ratio: share of the points that are the candidates with the smallest |logit|.

    Returns:
        (M, P, 2)
    """
    num_masks = len(logits)
    num_uncertain = int(importance_ratio * num_points)
    candidates = torch.rand(num_masks, int(oversample_ratio * num_points), 2, device=logits.device)
    values = sample_upsampled(logits[:, None], candidates, size)[:, 0]
    chosen = values.abs().topk(num_uncertain, dim=1, largest=False, sorted=False).indices
    uncertain = candidates.gather(1, chosen[..., None].expand(-1, -1, 2))
    others = torch.rand(num_masks, num_points - num_uncertain, 2, device=logits.device)
    return torch.cat([uncertain, others], dim=1)
