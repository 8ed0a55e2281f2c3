"""fp16's loss scaling, with the scaler that torch has for CPUs."""

import itertools

import pytest
import torch
from detectron2.utils.events import EventStorage
from torch import nn

from ris_d2.engine.step import StepTrainer


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([3.0, 4.0]))

    def forward(self, batch):
        return {"loss": torch.stack([sample["numbers"] for sample in batch]).mv(self.weight).mean()}


def trainer(scaled, numbers=((1.0, 0.0), (0.0, 1.0)), **options):
    model = Model()
    sample = {"file_name": "a.jpg", "image_id": 1, "expressions": [{"expression_id": 2}]}
    batches = [[{**sample, "numbers": torch.tensor(row)}] for row in numbers]
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0) if scaled else None
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    loader = itertools.cycle(batches)
    return StepTrainer(model, loader, optimizer, accumulation=2, grad_scaler=scaler, **options)


def step(trainer):
    with EventStorage():
        trainer.run_step()
    return trainer.model.weight.tolist()


@pytest.mark.parametrize("clip", [0.0, 0.1])
def test_scaled_step_is_the_plain_step(clip):
    plain, scaled = (step(trainer(flag, clip_grad_norm=clip)) for flag in (False, True))
    assert scaled == pytest.approx(plain, abs=1e-6)
    length = (0.5**2 + 0.5**2) ** 0.5
    expected = 0.5 * (min(1.0, clip / length) if clip else 1.0)
    assert plain == pytest.approx([3 - expected, 4 - expected], abs=1e-5)


def test_overflowing_gradient_is_skipped_and_lowers_the_scale():
    stepper = trainer(True, clip_grad_norm=1.0)
    handle = stepper.model.weight.register_hook(lambda gradient: gradient * float("inf"))
    assert step(stepper) == [3.0, 4.0]
    handle.remove()
    assert stepper.grad_scaler.get_scale() == 512.0
    assert step(stepper) != [3.0, 4.0]


def test_scale_is_part_of_the_checkpoint_but_not_demanded():
    stepper = trainer(True)
    step(stepper)
    stepper.grad_scaler.update(64.0)
    resumed = trainer(True)
    resumed.load_state_dict(stepper.state_dict())
    assert resumed.grad_scaler.get_scale() == 64.0
    trainer(True).load_state_dict(trainer(False).state_dict())  # precision changed
    trainer(False).load_state_dict(stepper.state_dict())


def test_model_left_in_evaluation_mode_is_an_error():
    stepper = trainer(False)
    stepper.model.eval()
    with pytest.raises(RuntimeError, match="evaluation mode"):
        step(stepper)
