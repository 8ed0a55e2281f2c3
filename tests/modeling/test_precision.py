"""MODEL.RIS.PRECISION: auto, and what stays fp32 under bf16."""

from pathlib import Path

import pytest
import torch
from detectron2.modeling import build_model

from ris_d2 import example, load_config
from ris_d2.modeling import precision
from ris_d2.modeling.layers import mask_product
from ris_d2.predictor import Predictor

CONFIGS = Path(__file__).parents[2] / "configs"
CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)


def model_of(number):
    return torch.nn.Linear(number, 1, bias=False, device="meta")


@pytest.mark.parametrize(
    "capabilities, fast",
    [
        ({"amx_bf16": True, "avx512_bf16": False}, True),
        ({"avx512_bf16": True}, True),
        ({"avx512_f": True, "amx_int8": True}, False),
    ],
)
def test_bf16_of_a_cpu(monkeypatch, capabilities, fast):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
    assert precision.has_fast_bf16(CPU) is fast
    large, small = model_of(10_000_000), model_of(9_999_999)
    assert precision.fastest_precision(large, CPU) == ("bf16" if fast else "fp32")
    assert precision.fastest_precision(small, CPU) == "fp32"


def test_bf16_of_a_cpu_whose_torch_has_no_public_question(monkeypatch):
    monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    for fast in (True, False):
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda fast=fast: fast)
        assert precision.has_fast_bf16(CPU) is fast


@pytest.mark.parametrize("capability, fast", [((7, 5), False), ((8, 0), True), ((9, 0), True)])
def test_bf16_of_a_gpu(monkeypatch, capability, fast):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert precision.has_fast_bf16(CUDA) is fast
    assert precision.has_fast_bf16(torch.device("mps")) is False


@pytest.mark.not_pretended
@pytest.mark.parametrize("method", ["asda", "deris", "risam", "shared_ris", "vipa"])
def test_masks_under_bf16_agree(method, make_inputs, monkeypatch, device):
    cfg = load_config(str(CONFIGS / "instant_test" / f"{method}.yaml"), ["MODEL.DEVICE", device])
    cfg.MODEL.RIS.PRECISION = "auto"
    torch.manual_seed(0)
    model = build_model(cfg).eval()
    inputs = make_inputs(size=tuple(cfg.INPUT.RIS.SIZE), lengths=[4, 6, 8])
    for name, height, width in cfg.INPUT.RIS.VIEWS:
        inputs["views"][name] = torch.nn.functional.interpolate(
            inputs["image"][None], (height, width)
        )[0]

    def logits():
        text, images = model._collate_text([inputs]), model._collate_images([inputs])
        with torch.no_grad(), model._autocast():
            outputs = model.segment(model.encode_images(*images), *text)
        last = outputs["rounds"][-1] if "rounds" in outputs else outputs
        return last["mask_logits"]

    expected = logits()
    assert model.precision == "fp32"  # as small as it is
    monkeypatch.setattr(precision, "MIN_PARAMETERS", 1000)
    monkeypatch.setattr(precision, "has_fast_bf16", lambda device: True)
    model.precision = "auto"
    half = logits()
    assert model.precision == "bf16" and not torch.equal(half, expected)
    # Of random weights. (VIPA's words retrieve other visual tokens where cosines are nearly equal.)
    flat = torch.stack([half.float().flatten(), expected.flatten()])
    assert torch.corrcoef(flat)[0, 1] > 0.9
    if method in ("asda", "risam", "shared_ris"):
        assert half.dtype == torch.float32


def test_a_trained_model_draws_the_same_masks_in_bf16():
    masks = {}
    for name in ("fp32", "bf16"):
        predictor = Predictor.from_pretrained("example", precision=name)
        results = predictor(example.SCENE, example.SENTENCES)
        masks[name] = torch.stack([result["mask"] for result in results])
    overlap = (masks["fp32"] & masks["bf16"]).sum() / (masks["fp32"] | masks["bf16"]).sum()
    assert overlap > 0.95
    predictor = Predictor.from_pretrained("example")  # whatever its recipe trains with
    assert predictor.model.precision == "auto" and predictor.cfg.MODEL.RIS.PRECISION == "fp32"
    with pytest.raises(ValueError, match="precision is 'fp17'"):
        Predictor.from_pretrained("example", precision="fp17")


def test_product_of_a_mask_is_not_rounded_under_autocast(device):
    torch.manual_seed(0)
    maps, vectors = torch.randn(2, 64, 4, 4), torch.randn(2, 64)
    expected = torch.einsum("echw,ec->ehw", maps, vectors)
    with torch.autocast(device, torch.bfloat16):
        assert torch.allclose(mask_product(maps, vectors), expected, atol=1e-5)
    assert mask_product(maps.double(), vectors.double()).dtype == torch.float64


@pytest.mark.not_pretended
@pytest.mark.parametrize("method", ["shared_ris", "asda"])
def test_residual_streams_are_fp32_under_autocast(method, device):
    cfg = load_config(str(CONFIGS / "instant_test" / f"{method}.yaml"), ["MODEL.DEVICE", device])
    torch.manual_seed(0)
    model = build_model(cfg).eval()
    images = torch.randn(1, 3, *cfg.INPUT.RIS.SIZE)
    with torch.no_grad(), torch.autocast(device, torch.bfloat16):
        if method == "asda":
            states = model.vision.forward_layers(images)
        else:
            vision = model.encoder.embed_image(images)
            states = [vision, *(x for x, _ in model.encoder.encode(vision, None, None).values())]
    assert {state.dtype for state in states} == {torch.float32}
