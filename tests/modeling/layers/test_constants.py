import copy

import pytest
import torch
from torch import nn

from ris_d2.modeling.layers import Constants

pytestmark = pytest.mark.cpu_only


def make_constants(calls, **arguments):
    def make(length, sizes):
        calls.append((length, sizes))
        return torch.ones(length), None, torch.zeros(sizes)

    return Constants(make, **arguments)


def test_computed_once_per_sizes_and_the_oldest_is_forgotten():
    calls = []
    constants = make_constants(calls, max_kept=2)
    first = constants(2, (3, 4), device=torch.device("cpu"))
    assert [None if x is None else tuple(x.shape) for x in first] == [(2,), None, (3, 4)]
    assert constants(2, (3, 4), device=torch.device("cpu"))[0] is first[0] and len(calls) == 1
    for length in (3, 4):
        constants(length, (3, 4), device=torch.device("cpu"))
    assert len(constants) == 2
    constants(2, (3, 4), device=torch.device("cpu"))
    assert [length for length, _ in calls] == [2, 3, 4, 2]


def test_kept_with_the_model_but_in_no_checkpoint():
    model = nn.Sequential(make_constants([]))
    with torch.inference_mode():
        kept = model[0](2, (1, 1), device=torch.device("cpu"))
    assert not kept[0].is_inference()  # a later training could not use it
    assert model.state_dict() == {} and len(list(model.buffers())) == 2
    moved = copy.deepcopy(model).to("meta")
    assert moved[0](2, (1, 1), device=torch.device("meta"))[0].is_meta
