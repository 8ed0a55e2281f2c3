"""MODEL.RIS.COMPILE: whole graphs, few of them, and the same results. No compiler is needed here: what
dynamo captures is run as it is."""

import copy
import functools
from pathlib import Path

import pytest
import torch
from detectron2.modeling import build_model
from detectron2.structures import BitMasks, Instances
from torch._dynamo.utils import counters

from ris_d2 import load_config
from ris_d2.modeling import segmenter

pytestmark = [pytest.mark.not_pretended, pytest.mark.places_itself]
CONFIGS = Path(__file__).parents[2] / "configs"
METHODS = ("asda", "deris", "risam", "shared_ris", "vipa")


@pytest.fixture
def captured(monkeypatch):
    """Number of graphs captured so far."""
    compile = functools.partial(torch.compile, backend="eager", fullgraph=True)
    monkeypatch.setattr(segmenter, "_compiled", functools.cache(compile))
    torch._dynamo.reset()
    counters.clear()
    return lambda: counters["stats"]["unique_graphs"]


def build(method, device):
    options = ["MODEL.DEVICE", device, "MODEL.RIS.COMPILE", "True"]
    cfg = load_config(str(CONFIGS / "instant_test" / f"{method}.yaml"), options)
    torch.manual_seed(0)
    model = build_model(cfg)
    model.to_be_applied = set()

    def make_unit(count):
        (height, width), length = cfg.INPUT.RIS.SIZE, cfg.INPUT.RIS.MAX_TOKENS
        generator = torch.Generator().manual_seed(count)
        mask = torch.arange(length) < torch.randint(3, 9, (count, 1), generator=generator)
        masks = torch.zeros(2, height, width, dtype=torch.bool)
        masks[0, 5:20, 5:20] = masks[1, 30:, 30:] = True
        pixels = {name: (3, *size) for name, *size in cfg.INPUT.RIS.VIEWS}
        return {
            "image": torch.randint(0, 256, (3, height, width), generator=generator),
            "views": {k: torch.randint(0, 256, v, generator=generator) for k, v in pixels.items()},
            "input_ids": torch.randint(5, 60, mask.shape, generator=generator) * mask,
            "text_mask": mask,
            **{"content_box": (0, 0, width, height), "height": 50, "width": 70},
            "expressions": [{"expression_id": i} for i in range(count)],
            "instances": Instances((height, width), gt_masks=BitMasks(masks)),
            "targets": torch.tensor([[True, False]] * count),
        }

    return model, make_unit


@pytest.mark.parametrize("method", METHODS)
def test_1_to_16_sentences_take_one_recompilation_and_no_break(method, captured, device):
    model, make_unit = build(method, device)
    model.eval()
    model([make_unit(2)])  # the first call is not compiled
    graphs = []
    for count in (3, 7, 15, 16, 33, 1, 2):
        results = model([make_unit(count)])[0]["referring"]
        graphs.append(captured())
        model.compiles = False
        expected = model([make_unit(count)])[0]["referring"]
        model.compiles = True
        for ours, eager in zip(results, expected, strict=True):
            assert torch.equal(ours["mask"], eager["mask"])
            assert ours["score"] == pytest.approx(eager["score"], abs=1e-5)
    # encode_images and segment; segment once more for a single sentence, whose graph is another.
    # A GPU takes the 33 as 32 and 1, a CPU as equal slices.
    of_33 = 2 if device == "cpu" else 3
    assert graphs == [2, 2, 2, 2, of_33, 3, 3] and not counters["graph_break"]


@pytest.mark.parametrize("method", METHODS)
def test_training_takes_one_graph_each_and_gives_the_same_losses_and_gradients(
    method, captured, device
):
    model, make_unit = build(method, device)
    model.train()
    results = {}
    for step, counts in enumerate([(2, 1), (2, 3), (5, 6)]):
        for model.compiles in (False, True) if step else (True,):
            torch.manual_seed(step)
            losses = model([make_unit(count) for count in counts])
            model.zero_grad()
            sum(losses.values()).backward()
            grads = [p.grad.norm() for p in model.parameters() if p.grad is not None]
            results[model.compiles] = {**losses, "gradient": torch.stack(grads).norm()}
        for name, value in results[True].items():
            torch.testing.assert_close(
                value, results.get(False, results[True])[name], rtol=1e-3, atol=1e-4
            )
    assert captured() == 2 and not counters["graph_break"]


def test_a_copy_computes_with_its_own_weights_and_gradients_pass(captured, device):
    model, make_unit = build("shared_ris", device)
    model.eval()
    for _ in range(2):
        model([make_unit(2)])
    other = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    assert other([make_unit(2)])[0]["referring"][0]["score"] == 0.5
    arguments = [model._move(torch.rand(1, 3, 64, 64))], model._collate_text([make_unit(3)])
    features = model._run("encode_images", *arguments[0], {})
    outputs = model._run("run_segment", features, *arguments[1])
    outputs["mask_logits"].sum().backward()
    assert model.encoder.vision_embed.cls_token.grad.any() and captured() > 2


def test_a_missing_compiler_is_named(monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(ValueError, match="MODEL.RIS.COMPILE needs a C.. compiler, .* no-such-comp"):
        segmenter._compiled.__wrapped__(print)
