import pytest
import torch

from ris_d2.modeling.layers import MLP, MultiheadAttention


def projections(attention):
    return {name: getattr(attention, name) for name in ("query", "key", "value", "out")}


@pytest.mark.parametrize("context_dim", [None, 384])
def test_it_starts_as_torchs_multihead_attention(context_dim):
    """Without another width of the context, torch fills its three projections as one matrix."""
    torch.manual_seed(0)
    ours = MultiheadAttention(dim=256, num_heads=8, context_dim=context_dim)
    theirs = torch.nn.MultiheadAttention(256, 8, kdim=context_dim, vdim=context_dim)
    if context_dim is None:
        weights = theirs.in_proj_weight.chunk(3)
        assert weights[0].std().item() == pytest.approx(0.0442, abs=5e-4)
    else:
        weights = (theirs.q_proj_weight, theirs.k_proj_weight, theirs.v_proj_weight)
    for (name, layer), weight in zip(projections(ours).items(), (*weights, theirs.out_proj.weight)):
        assert layer.weight.std().item() == pytest.approx(weight.std().item(), rel=0.02), name
        assert layer.weight.abs().max().item() == pytest.approx(
            weight.abs().max().item(), rel=0.01
        ), name
        assert not layer.bias.any(), name


def test_the_start_draws_no_more_random_numbers_than_its_layers():
    """So that the same seed goes on giving the rest of a model the same start."""
    torch.manual_seed(0)
    MultiheadAttention(dim=8, num_heads=2)
    after = torch.rand(1)
    torch.manual_seed(0)
    for _ in range(4):
        torch.nn.Linear(8, 8)
    assert torch.equal(after, torch.rand(1))


def test_it_needs_heads_that_divide_the_channels():
    with pytest.raises(ValueError, match="dim 10 is not a multiple of num_heads 4"):
        MultiheadAttention(dim=10, num_heads=4)
    attention = MultiheadAttention(dim=8, num_heads=2, query_dim=6)
    assert attention(torch.randn(2, 3, 6), torch.randn(2, 4, 8)).shape == (2, 3, 6)


@pytest.mark.parametrize("dropout, names", [(None, ["0", "2", "4"]), (0.1, ["0", "3", "6"])])
def test_mlp_has_activations_and_dropout_between_its_layers(dropout, names):
    mlp = MLP(4, 8, 8, 3, activation=torch.nn.ReLU, dropout=dropout)
    assert [name for name, x in mlp.named_children() if isinstance(x, torch.nn.Linear)] == names
    kinds = [type(x).__name__ for x in mlp]
    between = ["Linear", "ReLU"] + ["Dropout"] * (dropout is not None)
    assert kinds == [*between, *between, *(kind for kind in between if kind != "ReLU")]
