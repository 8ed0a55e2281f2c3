"""pytest --device cuda: all methods compute there what they do on a CPU."""

import copy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from instant import METHODS, build
from placement import made_on
from pretended_device import pretended_device

pytestmark = pytest.mark.places_itself


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


@pytest.mark.cpu_only
def test_what_a_test_makes_lies_on_the_device():
    with pretended_device(), made_on("cuda"):
        norm, image = torch.nn.BatchNorm2d(3), torch.ones(1, 3, 2, 2, requires_grad=True)
        assert {x.device.type for x in (*norm.parameters(), *norm.buffers(), image)} == {"cuda"}
        norm(image).sum().backward()
        assert image.grad.device.type == "cuda" and image.is_leaf
        of_a_loader = build("shared_ris")[1][0]["image"]
        assert of_a_loader.device.type == torch.ones(2, device="cpu").device.type == "cpu"
        with pytest.raises(RuntimeError, match="meets a cpu tensor"):
            norm(of_a_loader[None].float())
    assert torch.nn.Linear(1, 1).weight.device.type == "cpu"


@pytest.mark.cpu_only
def test_the_suite_follows_a_device_that_is_not_there():
    tests = [Path(__file__).with_name("test_losses.py"), Path(__file__).with_name("test_waits.py")]
    command = [sys.executable, "-m", "pytest", "-q", "--device", "pretended", *tests]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0 and "3 passed, 16 deselected" in done.stdout, done.stdout
