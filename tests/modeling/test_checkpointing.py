"""MODEL.RIS.CHECKPOINT_ACTIVATIONS: the same training step with less memory between its two passes."""

import copy

import pytest
import torch
import transformers
from instant import build

from ris_d2.modeling.backbone import RISSAMViT, RISViT
from ris_d2.modeling.layers.checkpointing import checkpoint_layers
from ris_d2.modeling.text import RISCausalLM


def step(model, compute):
    """Losses, gradients and buffers after a training step, and the bytes that wait for the backward pass."""
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    torch.manual_seed(5)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        losses = compute()
        saved = sum(kept.values())
    sum(losses.values()).backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return losses, gradients, dict(model.named_buffers()), saved


def assert_equal(ours, theirs):
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        assert torch.equal(ours[name], value), name


# What is left of the bytes, and what is frozen; the most of some tiny models is heads.
@pytest.mark.not_pretended
@pytest.mark.parametrize(
    "method, share, freeze",
    [
        ("asda", 0.85, {}),
        ("deris", 0.5, {"perception.backbone": "train"}),
        ("risam", 0.75, {}),
        ("risam", 1.01, {"backbone": "eval", "text": "eval"}),
        ("shared_ris", 0.8, {}),
        ("vipa", 0.4, {"encoder.vision": "eval"}),
    ],
)
def test_losses_gradients_and_statistics_stay_while_less_is_kept(method, share, freeze, device):
    precision = "fp32" if freeze else "bf16"
    model, batch = build(method, "MODEL.DEVICE", device, "MODEL.RIS.PRECISION", precision)
    model.requires_grad_(True).freeze = freeze
    model.train()
    other = copy.deepcopy(model)
    other.checkpoint_activations = ("all",)
    other.train()
    *expected, bytes_kept = step(model, lambda: model(batch))
    *results, fewer_bytes = step(other, lambda: other(batch))
    for ours, theirs in zip(results, expected, strict=True):
        if device == "cpu":
            assert_equal(ours, theirs)
        for name, value in theirs.items():  # a GPU adds in any order
            torch.testing.assert_close(
                ours[name], value, rtol=0.05, atol=0.05 * value.abs().max().item()
            )
    # Attention of a GPU keeps other things than that of a CPU.
    assert fewer_bytes < (share if device == "cpu" else 1.01) * bytes_kept
    assert other.state_dict().keys() == model.state_dict().keys()


def test_layers_of_libraries_are_recomputed(tmp_path):
    transformers.Qwen2Config(
        **{"vocab_size": 20, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2},
        **{"num_attention_heads": 2, "num_key_value_heads": 2},
    ).save_pretrained(tmp_path)
    sam = {"embed_dim": 32, "depth": 2, "num_heads": 2, "window_size": 2, "global_blocks": (1,)}
    images, ids = torch.randn(1, 3, 64, 64), torch.ones(2, 5, dtype=torch.int64)
    for model, inputs in (
        (RISSAMViT(image_size=(64, 64), **sam), (images,)),
        (RISViT(name="vit_tiny_patch16_224", image_size=(64, 64), out_blocks=(1, 3)), (images,)),
        (RISCausalLM(path=str(tmp_path), pretrained=False), (ids, ids > 0)),
    ):
        other = copy.deepcopy(model.train())
        assert checkpoint_layers(other) == len(list(other.layers_to_checkpoint())) >= 2
        both = []
        for each in (model, other):
            outputs = each(*inputs)
            outputs = outputs.values() if isinstance(outputs, dict) else [outputs]
            sum(x.square().mean() for x in outputs).backward()
            both.append({name: p.grad for name, p in each.named_parameters() if p.grad is not None})
        assert both[0] and all(grad.any() for grad in both[0].values())
        assert_equal(*both)


@pytest.mark.not_pretended
@pytest.mark.places_itself
def test_compiled_layers_are_recomputed(device):
    """Captured by dynamo as one graph, and run as it is."""
    model = build("shared_ris", "MODEL.DEVICE", device)[0].encoder.train()
    other = copy.deepcopy(model)
    checkpoint_layers(other)
    torch._dynamo.reset()
    compiled = torch.compile(type(other).forward, backend="eager", fullgraph=True)
    images = torch.randn(2, 3, *model.image_size).to(device)
    *expected, bytes_kept = step(model, lambda: {"loss": model(images)["last"].square().mean()})
    *results, fewer_bytes = step(
        other, lambda: {"loss": compiled(other, images)["last"].square().mean()}
    )
    for ours, theirs in zip(results[:2], expected):
        for name, value in theirs.items():
            assert torch.allclose(ours[name], value, rtol=1e-4, atol=1e-6), name
    assert fewer_bytes < 0.8 * bytes_kept


@pytest.mark.parametrize(
    "part, message",
    [("encoders", "names 'encoders'; the parts"), ("fpn", "names 'fpn', which has no such")],
)
def test_parts_that_are_not_there_or_have_no_layers_are_refused(part, message):
    model, _ = build("shared_ris", "MODEL.RIS.CHECKPOINT_ACTIVATIONS", f"['{part}']")
    with pytest.raises(ValueError, match=f"CHECKPOINT_ACTIVATIONS {message}"):
        model.train()
