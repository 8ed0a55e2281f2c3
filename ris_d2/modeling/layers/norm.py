"""Norms of token sequences."""

import torch.nn.functional as F
from torch import Tensor


def instance_norm(tokens: Tensor) -> Tensor:
    """Each channel of (B, N, C) over its N tokens, without scale and shift."""
    return F.instance_norm(tokens.transpose(1, 2)).transpose(1, 2)
