import pathlib
import runpy
from unittest import mock

import pytest
import torch
from detectron2.modeling import build_model
from detectron2.utils.events import EventStorage

from ris_d2 import load_config
from ris_d2.engine.step import StepTrainer

PARTS = runpy.run_path(str(pathlib.Path(__file__).with_name("train_in_processes.py")))


def step(accumulation, device):
    """Losses and gradients of the step over the same two units, as one batch or as two."""
    torch.manual_seed(0)
    model = build_model(
        load_config(str(PARTS["CONFIG"]), [*PARTS["OPTIONS"], "MODEL.DEVICE", device])
    )
    units = PARTS["make_units"]()
    batches = [units] if accumulation == 1 else [[unit] for unit in units]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    trainer = StepTrainer(model, batches, optimizer, accumulation=accumulation)
    trainer.iter = 0
    with EventStorage() as storage, mock.patch("torch.rand", PARTS["same_points"]):
        trainer.run_step()
        trainer.settle()
        losses = {name: value for name, (value, _) in storage.latest().items() if "loss" in name}
    return losses, {name: parameter.grad for name, parameter in model.named_parameters()}


def test_accumulated_micro_batches_train_as_one_batch(device):
    """Though one has three expressions with three targets, and the other nothing that is meant."""
    (losses, gradients), (accumulated, parts) = step(1, device), step(2, device)
    tolerance = 1e-5 if device == "cpu" else 1e-4
    assert losses.keys() == accumulated.keys() and len(losses) > 12
    for name, loss in losses.items():
        assert accumulated[name] == pytest.approx(loss, rel=tolerance), name
    scale = max(gradient.abs().max() for gradient in gradients.values()).item()
    for name, gradient in gradients.items():
        torch.testing.assert_close(
            parts[name], gradient, atol=tolerance * scale, rtol=1e-3, msg=name
        )
