"""What a GPU would have to be waited for, on a device that is pretended (tests/pretended_device.py)."""

import itertools
import math

import pretended_device as pretended
import pytest
import torch
from detectron2.utils.events import EventStorage
from instant import METHODS, build, configure

from ris_d2.engine import build_optimizer
from ris_d2.engine.step import StepTrainer

pytestmark = pytest.mark.cpu_only
MUON = ("SOLVER.RIS.OPTIMIZER", "Muon")


def count(log):
    """What was waited for -> how often, in the lines of ris_d2 whose file is named."""
    return {(what, place.split(":")[0]): number for (what, place), number in log.waits.items()}


@pytest.mark.parametrize("method", METHODS)
def test_evaluation_waits_for_its_results_alone(method):
    model, batch = build(method)
    expected = model.eval()(batch)
    pretended.to_device(model)
    with pretended.pretended_device() as log:
        results = model(batch)
    waits = {("tolist", "modeling/segmenter.py"): 1}  # scores and absences of the whole batch
    if method == "deris":  # per image, which queries were chosen, if others are not restored
        assert model.return_instances
        model.return_instances = False
        with pretended.pretended_device() as other:
            model(batch)
        assert count(other) == {**waits, ("to", "modeling/deris/deris.py"): len(batch)}
    assert count(log) == waits
    assert all(
        place.startswith(("modeling/segmenter", "modeling/deris/deris")) for _, place in log.copies
    )
    for ours, theirs in zip(results, expected, strict=True):
        for a, b in zip(ours["referring"], theirs["referring"], strict=True):
            assert a["mask"].device.type == "cuda" and torch.equal(a["mask"].content, b["mask"])
            assert a["no_target"] == b["no_target"] and a["score"] == pytest.approx(
                b["score"], rel=1e-5
            )


class Recorder(EventStorage):
    """What was put under which iteration: name -> {iteration: value}."""

    def __init__(self):
        super().__init__(0)
        self.found = {}

    def put_scalar(self, name, value, *args, **kwargs):
        self.found.setdefault(name, {})[self.iter] = value


def train(method, *options, device=False):
    """Two steps of a trainer on its way, what was logged when it came out of them, and all of the log."""
    model, batch = build(method)
    cfg = configure(method, *options)
    # Constants that depend on sizes are made in the first call.
    model.train()(batch)
    if device:
        pretended.to_device(model)
    torch.manual_seed(3)
    optimizer = build_optimizer(cfg, model)
    trainer = StepTrainer(model, itertools.repeat(batch), optimizer, clip_grad_norm=0.1)
    with Recorder() as storage:
        for storage.iter in range(2):
            trainer.iter = storage.iter
            trainer.run_step()
        logged = {name: [*values] for name, values in storage.found.items()}
        trainer.settle()
    return trainer, logged, storage.found


@pytest.mark.parametrize("method, options", [(m, ()) for m in METHODS] + [("vipa", MUON)])
def test_a_training_step_waits_for_the_matcher_alone(method, options, monkeypatch):
    """Losses are read a step late, under their own iteration."""
    # It rounds by 1 %.
    monkeypatch.setattr("ris_d2.engine.muon.has_fast_bf16", lambda device: False)
    _, at_once, expected = train(method, *options)
    with pretended.pretended_device() as log:
        _, logged, found = train(method, *options, device=True)
    assert count(log) == ({("to", "modeling/deris/matcher.py"): 2} if method == "deris" else {})
    # All of the batch lies on the device before the forward pass.
    assert {place.split(":")[0] for _, place in log.copies} <= {
        "engine/step.py",
        "modeling/segmenter.py",
        "modeling/deris/criterion.py",
        "modeling/deris/matcher.py",
    }
    assert at_once["total_loss"] == [0, 1] and logged["total_loss"] == logged["grad_norm"] == [0]
    for name in expected.keys() - {"data_time"}:
        assert found[name] == pytest.approx(expected[name], rel=1e-3), name


def test_a_loss_that_is_not_finite_is_named_a_step_late_and_never_saved():
    message = "at iteration 7: loss_bce nan, .*samples: 1.jpg"
    with pretended.pretended_device(), Recorder():
        trainer, *_ = train("shared_ris", device=True)
        assert trainer.state_dict()["optimizer"]["state"]
        losses = {"loss_bce": math.nan, "loss_dice": 1.0}
        trainer.model.mask_losses = lambda outputs, masks: {
            name: outputs["mask_logits"].mean((1, 2)) * value for name, value in losses.items()
        }
        trainer.iter = 7
        trainer.run_step()
        with pytest.raises(FloatingPointError, match=message):
            trainer.state_dict()
        trainer.iter = 8
        with pytest.raises(FloatingPointError, match=message):
            trainer.run_step()


@pytest.mark.parametrize(
    "mistake, message",
    [
        (lambda x: x + torch.ones(2), "meets a cpu tensor"),
        (lambda x: torch.ones(2)[x.long()], "is indexed by one of cuda:0"),
        (lambda x: x.numpy(), "to numpy"),
    ],
)
def test_device_refuses_tensors_of_the_host(mistake, message):
    with pretended.pretended_device(), pytest.raises((RuntimeError, TypeError), match=message):
        mistake(torch.ones(2, device="cuda"))


def test_device_counts_waits():
    waiting = [
        lambda x: x.item(),
        lambda x: x.expand(2).nonzero(),
        lambda x: x.expand(2)[x.expand(2) > 0],
        lambda x: x.expand(2)[[0, 1]],
        lambda x: x.cpu(),
        lambda x: torch.ones(3).to("cuda"),
        lambda x: torch.tensor([1.0], device="cuda"),
        lambda x: bool(x > 0),
    ]
    with pretended.pretended_device() as log:
        number = torch.ones((), device="cuda")
        assert log.waits.total() == 0
        for done, wait in enumerate(waiting, 1):
            wait(number)
            assert log.waits.total() == done
        torch.ones(3).to("cuda", non_blocking=True)
        assert log.waits.total() == len(waiting) and log.copies.total() == 1
