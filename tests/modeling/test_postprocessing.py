import pytest
import torch

from ris_d2 import load_config
from ris_d2.modeling.postprocessing import restore_masks, says_nothing


def test_what_is_resized_is_the_key_s_choice():
    """Logits 2, -4 to four pixels. The second lies a quarter of the way: probability 0.665, or logit
    0.5, probability 0.622; or, cut before, all of the first."""
    logits = torch.tensor([[[2.0, -4.0]]])

    def row(order, threshold):
        mask = restore_masks(
            logits,
            input_size=(1, 2),
            content_box=(0, 0, 2, 1),
            output_size=(1, 4),
            order=order,
            threshold=threshold,
        )
        assert mask.dtype == torch.bool and mask.shape == (1, 1, 4)
        return mask[0, 0].int().tolist()

    assert [row("probabilities", t)[1] for t in (0.62, 0.64, 0.67)] == [1, 1, 0]
    assert [row("logits", t)[1] for t in (0.62, 0.64, 0.67)] == [1, 0, 0]
    assert [row("binary", t)[1] for t in (0.62, 0.64, 0.67)] == [1, 1, 1]


def test_who_says_nothing_by_rule():
    masks = torch.zeros(3, 4, 4, dtype=torch.bool)
    masks[1, 0, 0], masks[2] = True, True
    absent = torch.tensor([False, True, True])
    rules = {rule: says_nothing(masks, absent, rule=rule, min_area=2) for rule in ("area", "head")}
    assert rules["area"].tolist() == [True, True, False]
    assert rules["head"].tolist() == [False, True, True]
    assert not says_nothing(masks, absent, rule="none", min_area=2).any()
    assert not says_nothing(masks, None, rule="head", min_area=2).any()


@pytest.mark.parametrize("key", ("SIGMOID_FIRST", "THRESHOLD_FIRST"))
def test_the_former_keys_name_the_new_one(key):
    with pytest.raises(ValueError, match=f"{key}; did you mean MODEL.RIS.MASK_ORDER"):
        load_config("", [f"MODEL.RIS.{key}", "True"])
