import math

import torch

from ris_d2.modeling.losses import mask_bce, mask_dice, mask_focal


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


def test_focal_loss():
    torch.manual_seed(0)
    logits, masks = torch.randn(2, 3, 4, requires_grad=True), torch.rand(2, 3, 4) > 0.5
    plain = mask_focal(logits, masks, alpha=-1, gamma=0)
    assert torch.allclose(plain, mask_bce(logits, masks))
    p_t = torch.where(masks, logits.sigmoid(), 1 - logits.sigmoid())
    weight = torch.where(masks, 0.25, 0.75)
    expected = (-weight * (1 - p_t) ** 2 * p_t.log()).flatten(1).mean(1)
    focal = mask_focal(logits, masks, alpha=0.25, gamma=2)
    assert torch.allclose(focal, expected, atol=1e-6)
    sure = torch.full((1, 2, 2), 200.0, requires_grad=True)  # where p_t is exactly 1
    mask_focal(sure, torch.ones(1, 2, 2), alpha=-1, gamma=2).sum().backward()
    assert torch.isfinite(sure.grad).all()
