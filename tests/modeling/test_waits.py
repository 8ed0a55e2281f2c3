"""What a GPU would have to be waited for, on a device that is pretended (tests/pretended_device.py)."""

import importlib.util
from pathlib import Path

import pytest
import torch
from detectron2.modeling import build_model
from detectron2.structures import BitMasks, Instances

from ris_d2 import load_config

_spec = importlib.util.spec_from_file_location(
    "pretended_device", Path(__file__).parents[1] / "pretended_device.py"
)
pretended = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(pretended)

CONFIGS = Path(__file__).parents[2] / "configs"
METHODS = ("asda", "deris", "risam", "shared_ris", "vipa")


def make_unit(cfg, num_expressions, *, seed):
    generator = torch.Generator().manual_seed(seed)
    (height, width), length = cfg.INPUT.RIS.SIZE, cfg.INPUT.RIS.MAX_TOKENS

    def pixels(*size):
        return torch.randint(0, 256, (3, *size), generator=generator, dtype=torch.uint8)

    masks = torch.zeros(2, height, width, dtype=torch.bool)
    masks[0, 5:20, 5:20] = masks[1, 30:, 30:] = True
    text_mask = (torch.arange(length) < torch.tensor([[5], [7]]))[:num_expressions]
    return {
        "image": pixels(height, width),
        "views": {name: pixels(*size) for name, *size in cfg.INPUT.RIS.VIEWS},
        "input_ids": torch.randint(5, 60, text_mask.shape, generator=generator),
        "text_mask": text_mask,
        "content_box": (0, 0, width, height),
        **{"height": 50, "width": 70, "image_id": seed, "file_name": f"{seed}.jpg"},
        "expressions": [{"expression_id": i} for i in range(num_expressions)],
        "instances": Instances((height, width), gt_masks=BitMasks(masks)),
        "targets": torch.tensor([[True, False], [True, True]])[:num_expressions],
    }


def build(method):
    cfg = load_config(str(CONFIGS / "instant_test" / f"{method}.yaml"), ["MODEL.DEVICE", "cpu"])
    torch.manual_seed(0)
    model = build_model(cfg)
    model.to_be_applied = set()
    return model, [make_unit(cfg, 2, seed=1), make_unit(cfg, 1, seed=2)]


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


@pytest.mark.parametrize("method", METHODS)
def test_training_waits_for_the_matcher_alone(method):
    model, batch = build(method)
    torch.manual_seed(3)
    expected = model.train()(batch)
    pretended.to_device(model)
    torch.manual_seed(3)
    with pretended.pretended_device() as log:
        losses = model(batch)
        own_waits = count(log)
        values = {name: loss.item() for name, loss in losses.items()}
    assert own_waits == ({("to", "modeling/deris/matcher.py"): 1} if method == "deris" else {})
    # All of the batch lies on the device before the forward pass.
    assert {place.split(":")[0] for _, place in log.copies} <= {
        "modeling/segmenter.py",
        "modeling/deris/criterion.py",
        "modeling/deris/matcher.py",
    }
    for name, loss in expected.items():
        assert values[name] == pytest.approx(loss.item(), rel=1e-5)


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
