import math

import torch

from ris_d2.modeling.losses import mask_bce, mask_dice


def test_values_by_hand():
    """Probabilities 1/2 everywhere: BCE = ln 2; dice = 1 - (2 * 1 + 1) / (2 + 2 + 1) = 0.4 for half a mask."""
    logits = torch.zeros(2, 2, 2)
    masks = torch.tensor([[[1, 1], [0, 0]], [[0, 0], [0, 0]]])
    assert torch.allclose(mask_bce(logits, masks), torch.full((2,), math.log(2)))
    assert torch.allclose(mask_dice(logits, masks), torch.tensor([0.4, 1 - 1 / 3]))


def test_half_precision_logits_are_counted_in_fp32():
    logits = torch.full((1, 300, 300), 0.5, dtype=torch.bfloat16)
    masks = torch.ones(1, 300, 300)
    for loss in (mask_bce, mask_dice):
        assert loss(logits, masks).dtype == torch.float32
        assert torch.allclose(loss(logits, masks), loss(logits.float(), masks))
