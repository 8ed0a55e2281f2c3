"""pytest --device cuda: all methods compute there what they do on a CPU."""

import copy

import pytest
import torch
from instant import METHODS, build


@pytest.mark.parametrize("method", METHODS)
def test_results_are_those_of_a_cpu(method, device):
    model, batch = build(method)
    batch = [{**inputs, "probabilities": True} for inputs in batch]
    other = copy.deepcopy(model.eval()).to(device)
    for ours, theirs in zip(other(batch), model(batch), strict=True):
        for a, b in zip(ours["referring"], theirs["referring"], strict=True):
            assert a["mask"].device == other.device
            assert torch.allclose(a["probabilities"].cpu(), b["probabilities"], atol=1e-4)
            assert a["score"] == pytest.approx(b["score"], abs=1e-4)


@pytest.mark.parametrize("parts", [(), ("all",)])
@pytest.mark.parametrize("method", METHODS)
def test_a_training_step_gives_every_parameter_a_gradient(method, parts, device):
    model, batch = build(method, "MODEL.RIS.CHECKPOINT_ACTIVATIONS", str(parts))
    model.to(device).train()
    losses = model(batch)
    sum(losses.values()).backward()
    trained = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    assert all(loss.isfinite() and loss.device == model.device for loss in losses.values())
    assert all(grad is not None and grad.isfinite().all() for grad in trained.values())
