import pytest
import torch

from ris_d2.modeling.vipa.generator import VisualExpressionGenerator

ARTICLE, SEP = 7, 9


def make(**changes):
    torch.manual_seed(0)
    sizes = {"vision_dim": 12, "text_dim": 16, "dim": 8, "num_heads": 2, "joint_dim": 6}
    return VisualExpressionGenerator(**{**sizes, **changes})


@pytest.fixture
def inputs():
    torch.manual_seed(1)
    vision, text = torch.randn(2, 10, 12), torch.randn(2, 5, 16)
    input_ids = torch.tensor([[1, 4, ARTICLE, 5, SEP], [1, ARTICLE, SEP, 0, 0]])
    return vision, text, input_ids, input_ids > 0


@pytest.mark.parametrize("ratio, expected", [(0.3, 3), (0.1, 1), (0.05, 1), (0.8, 8), (1.0, 10)])
@pytest.mark.parametrize("training", [True, False])
def test_each_row_retrieves_exactly_n_p_tokens(ratio, expected, training, inputs):
    expression = make(ratio=ratio).train(training)(*inputs)
    assert expression.retrieved.dtype == torch.bool
    assert (expression.retrieved.sum(-1) == expected).all()
    assert make(ratio=0.3).num_retrieved(225) == 67  # the paper's 15 x 15 grid


def test_inference_takes_the_highest_cosines_and_is_deterministic(inputs):
    generator = make().eval()
    first, second = generator(*inputs), generator(*inputs)
    assert torch.equal(first.tokens, second.tokens)
    assert first.tokens.shape == (2, 5, 8)
    x, y = generator.phi_vision(inputs[0]), generator.phi_text(inputs[1])
    cosine = torch.cosine_similarity(y[:, :, None], x[:, None], dim=-1)
    assert torch.allclose(first.relevance, cosine, atol=1e-6)
    threshold = cosine.sort(-1, descending=True).values[..., 2:3]
    assert torch.equal(first.retrieved, cosine >= threshold)


def test_training_draws_and_gradients_reach_temperature_and_both_projections(inputs):
    generator = make()
    assert not torch.equal(generator(*inputs).retrieved, generator(*inputs).retrieved)
    torch.manual_seed(3)
    generator(*inputs).tokens.square().sum().backward()
    for parameter in (
        generator.log_temperature,
        generator.phi_vision.weight,
        generator.phi_text.weight,
    ):
        assert parameter.grad.abs().sum() > 0


@pytest.mark.parametrize("aggregation, count", [("mean", 3), ("sum", 1)])
def test_weights_are_those_of_the_retrieved_and_their_gradient_is_the_softmaxs(
    aggregation, count, inputs
):
    generator = make(aggregation=aggregation)
    relevance = generator.relevance(*inputs[:2]).detach().requires_grad_()
    torch.manual_seed(4)
    weights, retrieved = generator.sample(relevance)
    assert torch.allclose(weights, retrieved / count, atol=1e-6)
    torch.manual_seed(4)
    noise = -torch.empty_like(relevance).exponential_().log()
    soft = (relevance / 0.07 + noise).softmax(-1)
    upstream = torch.randn(2, 5, 10)
    found, expected = (
        torch.autograd.grad((upstream * x).sum(), relevance)[0] for x in (weights, soft)
    )
    assert torch.allclose(found, expected, atol=1e-6) and found.abs().sum() > 0


@pytest.mark.parametrize(
    "noise, tau, low, high", [("temperature", 0.07, 0.9, 1.0), ("scores", 1.0, 0.3, 0.4)]
)
def test_weak_cosines_retrieve_the_target_unless_noise_drowns_them(noise, tau, low, high):
    """225 tokens of which 34 are on target, cosines of 0.1 there and -0.1 elsewhere; chance is 0.3."""
    torch.manual_seed(0)
    generator = make(noise=noise, tau_init=tau)
    relevance = torch.full((20, 21, 225), -0.1)
    relevance[..., :34] = 0.1
    _, retrieved = generator.sample(relevance)
    recall = retrieved[..., :34].float().mean().item()
    assert low < recall < high


def test_the_temperature_weighs_cosines_against_noise_unless_eq_2_is_read_to_the_letter(inputs):
    vision, text, *_ = inputs
    relevance = make().relevance(vision, text)
    _, expected = make().eval().sample(relevance)
    for noise, same in (("scores", True), ("temperature", False)):
        generator, drawn = make(noise=noise), []
        for value in (0.0, -6.0):
            generator.log_temperature.data.fill_(value)
            torch.manual_seed(5)
            drawn.append(generator.sample(relevance)[1])
        assert torch.equal(*drawn) == same
    assert torch.equal(drawn[1], expected)  # a low temperature leaves no room for the noise


def test_gumbel_noise_has_its_mean_and_deviation(inputs, monkeypatch):
    generator = make()
    seen = []
    monkeypatch.setattr(
        torch.Tensor, "topk", lambda x, k, dim: seen.append(x) or torch.topk(x, k, dim)
    )
    generator.sample(torch.zeros(1, 100, 2000))
    assert seen[0].mean().item() == pytest.approx(0.5772, abs=0.02)
    assert seen[0].std().item() == pytest.approx(1.2825, abs=0.02)


def test_pads_and_excluded_words_are_no_cues(inputs):
    assert make()(*inputs).attn_mask.tolist() == [[True] * 5, [True] * 3 + [False] * 2]
    attn_mask = make(excluded_ids=(ARTICLE, SEP))(*inputs).attn_mask
    assert attn_mask.tolist() == [[True, True, False, True, False], [True] + [False] * 4]
    attn_mask = make(cues="global")(*inputs).attn_mask
    assert attn_mask.tolist() == [[True] + [False] * 4] * 2
    attn_mask = make(cues="local")(*inputs).attn_mask
    assert attn_mask.tolist() == [[False] + [True] * 4, [False, True, True, False, False]]
    attn_mask = make(cues="local", excluded_ids=(ARTICLE, SEP))(*inputs).attn_mask
    assert attn_mask[1].tolist() == [True, True, True, False, False]  # nothing else would be left


def test_excluded_words_do_not_change_the_others(inputs):
    vision, text, input_ids, mask = inputs
    generator = make(excluded_ids=(ARTICLE,)).eval()
    changed = text.clone()
    changed[0, 2] += 1  # the article
    tokens = [generator(vision, t, input_ids, mask).tokens for t in (text, changed)]
    others = torch.tensor([0, 1, 3, 4])
    assert torch.equal(tokens[0][0, others], tokens[1][0, others])


class WithoutSharing(torch.nn.Module):
    def forward(self, x, attn_mask):
        return x


def test_refinement_reads_retrieved_tokens_alone(inputs, monkeypatch):
    """Row by row, before the rows share what they found."""
    vision, text, input_ids, mask = inputs
    generator = make().eval()
    generator.share = WithoutSharing()
    monkeypatch.setattr(generator, "relevance", lambda *_: torch.randn(2, 5, 10))
    torch.manual_seed(2)
    before = generator(*inputs)
    row = before.retrieved[0, 1]
    assert not torch.equal(before.retrieved[0, 0], row)
    torch.manual_seed(2)
    changed = torch.where(row[:, None], vision, vision + 1)
    after = generator(changed, text, input_ids, mask)
    assert torch.allclose(before.tokens[0, 1], after.tokens[0, 1], atol=1e-6)
    assert not torch.allclose(before.tokens[0, 0], after.tokens[0, 0], atol=1e-3)


def test_without_a_step(inputs):
    vision = inputs[0]
    no_retrieval = make(retrieve=False)
    expression = no_retrieval(*inputs)
    assert expression.tokens.shape == (2, 10, 8) and expression.attn_mask is None
    assert expression.retrieved is None and no_retrieval.log_temperature is None
    no_refinement = make(refine=False).eval()
    expression = no_refinement(*inputs)
    mean = vision[0][expression.retrieved[0, 2]].mean(0)
    assert torch.allclose(expression.tokens[0, 2], no_refinement.aggregate(mean), atol=1e-6)
    summed = make(refine=False, aggregation="sum").eval()(*inputs)
    assert torch.equal(summed.retrieved, expression.retrieved)
    assert not torch.allclose(summed.tokens, expression.tokens)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"ratio": 0.0}, "RATIO"),
        ({"ratio": 30}, "RATIO"),
        ({"noise": "loud"}, "NOISE is 'loud'"),
        ({"tau_init": 0.0}, "TAU_INIT must be positive"),
        ({"cues": "all"}, "CUES is 'all'"),
        ({"aggregation": "max"}, "AGGREGATION is 'max'"),
    ],
)
def test_wrong_values_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        make(**changes)
