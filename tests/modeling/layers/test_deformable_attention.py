import importlib.util
import itertools
import os
import subprocess
import sys

import pytest
import torch

from ris_d2.modeling.layers import deformable_attention
from ris_d2.modeling.layers.deformable_attention import (
    MultiScaleDeformableAttention,
    map_constants,
    weighted_samples,
)

pytestmark = [pytest.mark.not_pretended, pytest.mark.places_itself]
SIZES = [(3, 4), (5, 7)]

# On a GPU, or with TRITON_INTERPRET=1 from the start (see the last test), which runs kernels on the CPU.
IS_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if IS_INTERPRETED or not torch.cuda.is_available() else "cuda"
FORMS = ["embedding_bag", "grid_sample"]
if IS_INTERPRETED or DEVICE == "cuda":
    FORMS.append("triton")
needs_triton = pytest.mark.skipif("triton" not in FORMS, reason="no GPU, or not interpreted")


def read(values, points, weights, form):
    """Computed on DEVICE; the result and its gradients are on the CPU."""
    constants = [x.to(DEVICE) for x in map_constants(SIZES, 3, 5)]
    values, points, weights = (x.to(DEVICE) for x in (values, points, weights))
    return weighted_samples(values, SIZES, constants, points, weights, form=form).cpu()


def by_hand(values, sizes, points, weights):
    """The same sum, point by point."""
    out = torch.zeros(*points.shape[:3], values.shape[-1])
    starts = [0, *torch.tensor([h * w for h, w in sizes]).cumsum(0).tolist()]
    for b, q, m, level, p in itertools.product(*map(range, weights.shape)):
        height, width = sizes[level]
        x, y = (points[b, q, m, level, p] - 0.5).tolist()
        for row, column in itertools.product(range(height), range(width)):
            share = max(0, 1 - abs(x - column)) * max(0, 1 - abs(y - row))
            pixel = values[b, starts[level] + row * width + column, m]
            out[b, q, m] += weights[b, q, m, level, p] * share * pixel
    return out


def samples(num_queries):
    torch.manual_seed(0)
    values = torch.randn(2, 12 + 35, 3, 4, requires_grad=True)
    # Up to 3 beyond the edges.
    points = (torch.rand(2, num_queries, 3, 2, 5, 2) * 12 - 3).requires_grad_()
    weights = torch.randn(2, num_queries, 3, 2, 5, requires_grad=True)
    return values, points, weights


@pytest.mark.parametrize("form", FORMS)
def test_samples_inside_and_outside_are_bilinear(form):
    values, points, weights = (x.detach() for x in samples(2))
    assert (points < 0).any() and (points > 8).any()
    out = read(values, points, weights, form)
    expected = by_hand(values, SIZES, points, weights)
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)


def result_and_gradients(inputs, form):
    out = read(*inputs, form)
    seed = torch.arange(out.numel(), dtype=torch.float32).view(out.shape).sin()
    return [out, *torch.autograd.grad((out * seed).sum(), inputs)]


@pytest.mark.parametrize("num_queries", [6, 1])
def test_all_forms_give_the_same_samples_and_gradients(num_queries):
    inputs = samples(num_queries)
    expected = result_and_gradients(inputs, "embedding_bag")
    for form in FORMS[1:]:
        for ours, theirs in zip(result_and_gradients(inputs, form), expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("form", FORMS)
def test_half_precision_values_are_summed_in_fp32(form, dtype):
    values, points, weights = samples(3)
    values = values.to(dtype).detach().requires_grad_()
    out, grad, *grads = result_and_gradients((values, points, weights), form)
    assert (out.dtype, grad.dtype, grads[0].dtype) == (torch.float32, dtype, torch.float32)
    inputs = (values.detach().float().requires_grad_(), points, weights)
    for ours, exact in zip((out, grad, *grads), result_and_gradients(inputs, "embedding_bag")):
        rounding = torch.finfo(ours.dtype).eps
        torch.testing.assert_close(ours.float(), exact, rtol=rounding, atol=max(rounding, 1e-5))


@needs_triton
def test_the_triton_form_is_an_operator_that_compiles():
    from ris_d2.modeling.layers.deformable_attention_triton import weighted_samples as operator

    values, points, weights = (x.detach().to(DEVICE) for x in samples(2))
    levels = torch.stack(map_constants(SIZES, 3, 5)[1:], -1).view(3, 10, 3).to(DEVICE)
    inputs = [values, points.flatten(3, 4).clone(), weights.flatten(3).clone()]
    torch.library.opcheck(operator, (*(x.requires_grad_() for x in inputs), levels))
    compiled = torch.compile(read, backend="aot_eager", fullgraph=True, dynamic=True)
    inputs = samples(4)
    out = compiled(*inputs, "triton")
    torch.testing.assert_close(out, read(*inputs, "embedding_bag"), rtol=1e-4, atol=1e-5)
    torch._dynamo.reset()


@pytest.mark.skipif(not importlib.util.find_spec("triton"), reason="no triton")
@pytest.mark.skipif(IS_INTERPRETED, reason="not compiled")
@pytest.mark.parametrize("name", ["_forward", "_backward"])
def test_kernels_compile_without_a_gpu(name, tmp_path, monkeypatch):
    """To its machine code: Triton brings the assembler."""
    import triton
    from triton.backends.compiler import GPUTarget

    from ris_d2.modeling.layers import deformable_attention_triton

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    kernel = getattr(deformable_attention_triton, name)
    constants = {"HEADS": 8, "PLACES": 12, "DIM": 30, "CHANNELS": 32, "BAGS": 16}
    types = {"values": "*bf16", "levels": "*i32", "rows": "i32", "queries": "i32", "total": "i32"}
    types |= dict.fromkeys(constants, "constexpr")
    signature = {name: types.get(name, "*fp32") for name in kernel.arg_names}
    source = triton.compiler.ASTSource(kernel, signature, constants)
    assert triton.compile(source, target=GPUTarget("cuda", 90, 32)).asm["cubin"]


@pytest.mark.skipif(not importlib.util.find_spec("triton"), reason="no triton")
@pytest.mark.skipif("triton" in FORMS, reason="run above")
def test_the_triton_form_without_a_gpu():
    command = [sys.executable, "-m", "pytest", "-q", __file__, "-k", "not without_a_gpu"]
    settings = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(command, env=settings, capture_output=True, text=True)
    assert done.returncode == 0 and "skipped" not in done.stdout, done.stdout


def test_the_form_is_chosen_by_device(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert not deformable_attention._has_triton()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    for starts in (False, True):
        monkeypatch.setattr(deformable_attention, "_triton_starts", lambda starts=starts: starts)
        assert deformable_attention._has_triton() == starts
    chosen = []
    for form in ("embedding_bag", "triton"):
        forms = {form: lambda *inputs, form=form: chosen.append(form)}
        monkeypatch.setattr(deformable_attention, "_FORMS", deformable_attention._FORMS | forms)
    on_gpu = torch.Tensor()
    weighted_samples(on_gpu, SIZES, (), None, None)
    monkeypatch.setattr(deformable_attention, "_has_triton", lambda: True)
    weighted_samples(on_gpu, SIZES, (), None, None)
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    weighted_samples(on_gpu, SIZES, (), None, None)
    assert chosen == ["embedding_bag", "embedding_bag", "triton"]


@pytest.mark.skipif(not importlib.util.find_spec("triton"), reason="no triton")
def test_without_a_compiler_triton_is_done_without(monkeypatch, caplog):
    import triton

    class NoCompiler:
        def get_current_target(self):
            raise RuntimeError("Failed to find C compiler")

    monkeypatch.setattr(triton.runtime.driver, "_active", NoCompiler())
    assert not deformable_attention._triton_starts.__wrapped__()
    assert "does without Triton, and is slower: Failed to find C compiler" in caplog.text


def make():
    torch.manual_seed(0)
    layer = MultiScaleDeformableAttention(dim=8, num_heads=4, num_levels=2, num_points=3)
    return layer, torch.randn(2, 9, 8), torch.rand(9, 2), torch.randn(2, 47, 8)


def test_heads_start_in_all_directions_with_equal_weights():
    layer, *_ = make()
    offsets = layer.offsets.bias.view(4, 2, 3, 2)
    expected = torch.tensor([[1.0, 0], [0, 1], [-1, 0], [0, -1]])
    for point in range(3):
        for level in range(2):
            torch.testing.assert_close(offsets[:, level, point], (point + 1) * expected)


def test_constant_maps_are_read_as_they_are():
    layer, query, _, _ = make()
    values = torch.full((1, 3 * 40 + 5 * 70, 8), 2.0)
    centre = torch.full((9, 2), 0.5)
    out = layer(query[:1], centre, values, [(12, 10), (14, 25)])
    torch.testing.assert_close(out, layer.out(layer.value(values[:, :9])))


def test_places_are_fp32_under_autocast():
    layer, query, reference, values = make()
    torch.nn.init.normal_(layer.offsets.weight)
    torch.nn.init.normal_(layer.weights.weight)
    expected = layer(query, reference, values, SIZES)
    with torch.autocast("cpu", torch.bfloat16):
        out = layer(query, reference, values, SIZES)
    assert out.dtype == torch.bfloat16
    # bf16 offsets of this size would be off by tenths of a pixel; bf16 values are by 1 %.
    torch.testing.assert_close(out.float(), expected, rtol=0, atol=0.02)


def test_every_parameter_gets_a_gradient():
    layer, query, reference, values = make()
    layer(query, reference, values, SIZES).square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in layer.parameters())
