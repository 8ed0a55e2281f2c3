import copy

import pytest
import torch
from pretended_device import pretended_device, to_device
from torch import nn

from ris_d2 import get_ris_cfg
from ris_d2.engine.muon import Muon, orthogonalize
from ris_d2.engine.optimizer import build_optimizer


def gradients(parameters, seed):
    torch.manual_seed(seed)
    for p in parameters:
        p.grad = torch.randn_like(p)


@pytest.mark.parametrize(("has_bf16", "error"), [(False, 1e-4), (True, 0.03)])
@pytest.mark.parametrize("shape", [(24, 24), (40, 8), (8, 40)])
def test_orthogonalized_matrices_keep_directions_and_lose_lengths(
    shape, has_bf16, error, monkeypatch
):
    monkeypatch.setattr("ris_d2.engine.muon.has_fast_bf16", lambda device: has_bf16)
    torch.manual_seed(0)
    u, s, vt = torch.linalg.svd(torch.randn(3, *shape), full_matrices=False)
    lengths = torch.linspace(0.05, 5, s.shape[1])  # whatever they were
    result = u.mT @ orthogonalize(u * lengths @ vt) @ vt.mT
    on_diagonal = result.diagonal(dim1=1, dim2=2)
    assert on_diagonal.min() > 0.4 and on_diagonal.max() < 1.3
    assert (result - torch.diag_embed(on_diagonal)).abs().max() < error


def test_matrices_step_as_with_torch_and_all_else_as_with_adamw():
    torch.manual_seed(0)
    ours = nn.ParameterList([torch.randn(16, 48), torch.randn(7), torch.randn(12, 5)])
    theirs = copy.deepcopy(ours)
    settings = {"lr": 0.1, "weight_decay": 0.3}
    groups = [{"params": ours[:1], "orthogonal": True}, {"params": ours[1:]}]
    optimizer = Muon(groups, betas=(0.8, 0.9), eps=1e-6, **settings)
    others = [
        torch.optim.Muon(theirs[:1], adjust_lr_fn="match_rms_adamw", **settings),
        torch.optim.AdamW(theirs[1:], betas=(0.8, 0.9), eps=1e-6, **settings),
    ]
    start = ours[0].detach().clone()
    for step in range(4):
        gradients(ours, step)
        gradients(theirs, step)
        optimizer.step()
        for other in others:
            other.step()
    distance = (ours[0] - theirs[0]).norm() / (theirs[0] - start).norm()
    assert distance < 0.03  # torch iterates in bf16
    for a, b in zip(ours[1:], theirs[1:]):
        assert torch.allclose(a, b, atol=1e-6)


def test_a_resumed_optimizer_goes_on_as_if_it_had_not_stopped():
    torch.manual_seed(0)
    straight = nn.ParameterList([torch.randn(8, 8, 3, 3), torch.randn(8)])
    resumed = copy.deepcopy(straight)

    def build(parameters):
        groups = [{"params": parameters[:1], "orthogonal": True}, {"params": parameters[1:]}]
        return Muon(groups, lr=0.1, betas=(0.9, 0.98), eps=1e-8)

    first, second = build(straight), build(resumed)
    for step in range(4):
        if step == 2:
            state = copy.deepcopy(second.state_dict())
            second = build(resumed)
            second.load_state_dict(state)
        for parameters, optimizer in ((straight, first), (resumed, second)):
            gradients(parameters, step)
            optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(straight, resumed))


def test_a_loaded_checkpoint_is_gone_on_with_on_a_gpu():
    """It lies on the CPU, the counts of steps too, which torch leaves there."""
    with pretended_device():
        layer = to_device(nn.Linear(8, 8))
        optimizer = Muon([{"params": [layer.bias]}], lr=0.1, betas=(0.9, 0.98), eps=1e-8)
        for step in (1, 2):
            layer.bias.grad = torch.ones(8, device="cuda")
            optimizer.step()
            state = optimizer.state_dict()
            loaded = state["state"][0]["step"].cpu()
            assert loaded == step
            state["state"][0]["step"] = loaded
            optimizer.load_state_dict(state)


def test_the_config_sets_linear_layers_and_convolutions_apart():
    model = nn.ModuleDict(
        {
            "words": nn.Embedding(20, 16),
            "stem": nn.Conv2d(3, 16, 3),
            "layer": nn.Linear(16, 16),
            "logit": nn.Linear(16, 1),
        }
    )
    cfg = get_ris_cfg()
    cfg.SOLVER.BASE_LR, cfg.SOLVER.WEIGHT_DECAY = 0.5, 0.25
    cfg.SOLVER.RIS.OPTIMIZER, cfg.SOLVER.RIS.MATRIX_LR_FACTOR = "Muon", 4.0
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    found = {
        names[id(p)]: (group["orthogonal"], group["lr"])
        for group in build_optimizer(cfg, model).param_groups
        for p in group["params"]
    }
    apart = {name for name, (orthogonal, _) in found.items() if orthogonal}
    assert len(found) == 7 and apart == {"stem.weight", "layer.weight"}
    assert {found[name][1] for name in apart} == {2.0}
    assert {rate for name, (_, rate) in found.items() if name not in apart} == {0.5}


def test_checkpoints_that_count_steps_in_numbers_are_gone_on_with():
    first, second = (nn.ParameterList([torch.full((8,), 0.5)]) for _ in range(2))
    optimizers = [
        Muon([{"params": p}], lr=0.1, betas=(0.9, 0.98), eps=1e-8) for p in (first, second)
    ]
    for step in range(2):
        if step == 1:
            state = copy.deepcopy(optimizers[0].state_dict())
            state["state"][0]["step"] = int(state["state"][0]["step"])
            second.load_state_dict(first.state_dict())
            optimizers[1].load_state_dict(state)
        for parameters, optimizer in zip((first, second), optimizers):
            gradients(parameters, step)
            optimizer.step()
    assert torch.equal(first[0], second[0])
