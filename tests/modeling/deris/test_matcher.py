import itertools

import pytest
import torch
import torch.nn.functional as F

from ris_d2.modeling.deris.matcher import HungarianMatcher
from ris_d2.modeling.deris.points import draw_uncertain_points, sample_masks, sample_upsampled

MATCHER = {"class_weight": 2.0, "mask_weight": 5.0, "dice_weight": 5.0, "num_points": 200}


def quadrants(size=16):
    """Four masks that do not overlap, float (4, size, size)."""
    masks = torch.zeros(4, size, size)
    half = size // 2
    for index, (y, x) in enumerate(itertools.product((0, half), repeat=2)):
        masks[index, y : y + half, x : x + half] = 1
    return masks


def logits_of(masks, sharpness=8.0):
    return F.avg_pool2d(masks, 2) * 2 * sharpness - sharpness


def scores(num_expressions, num_queries):
    return torch.zeros(num_expressions, num_queries, 2)


@pytest.mark.parametrize("size", [(24, 40), (12, 20)])
def test_sampling_sees_the_upsampled_map(size):
    torch.manual_seed(0)
    logits, points = torch.randn(2, 3, 6, 10), torch.rand(2, 50, 2)
    points[:, :3] = torch.tensor([[0.0, 0.0], [1.0, 1.0], [0.001, 0.7]])  # beyond pixel centres
    upsampled = F.interpolate(logits, size=size, mode="bilinear", align_corners=True)
    expected = F.grid_sample(upsampled, 2 * points[:, None] - 1, align_corners=False)[:, :, 0]
    torch.testing.assert_close(sample_upsampled(logits, points, size), expected)


def test_masks_are_sampled_at_pixel_centres():
    masks = quadrants()
    points = torch.tensor([[[0.25, 0.25], [0.75, 0.25], [0.25, 0.75], [0.75, 0.75]]])
    assert sample_masks(masks, points.expand(4, 4, 2)).tolist() == torch.eye(4).tolist()


def test_points_of_the_loss_lie_where_the_prediction_is_undecided():
    torch.manual_seed(0)
    columns = torch.linspace(-10, 10, 32).expand(1, 32, 32)  # undecided in the middle
    drawn = {"num_points": 400, "oversample_ratio": 4.0}
    points = draw_uncertain_points(columns, (64, 64), importance_ratio=1.0, **drawn)
    assert points.shape == (1, 400, 2)
    # A quarter of the candidates is kept: those within an eighth of the middle.
    inside = (points[..., 1] - 0.5).abs() < 0.49  # the border is decided halfway only
    assert inside.sum() > 350 and ((points[..., 0][inside] - 0.5).abs() < 0.15).all()
    mixed = draw_uncertain_points(columns, (64, 64), importance_ratio=0.5, **drawn)
    near = ((mixed[..., 0] - 0.5).abs() < 0.15).float().mean()
    assert 0.55 < near < 0.75  # half of them, and 0.3 of the other half
    assert not torch.equal(points[:, :200], mixed[:, :200])


def test_each_instance_gets_the_query_that_draws_it():
    masks = quadrants()
    order = torch.tensor([2, 0, 3, 1])
    rounds = [
        {"mask_logits": logits_of(masks)[None, order], "class_logits": scores(1, 4)},
        {"mask_logits": logits_of(masks)[None], "class_logits": scores(1, 4)},
    ]
    chosen = torch.tensor([1, 3])
    queries, instances = HungarianMatcher(**MATCHER)(
        rounds, masks[chosen], torch.zeros(2, dtype=torch.int64), ["a"]
    )
    found = [dict(zip(i.tolist(), q.tolist())) for i, q in zip(instances, queries)]
    assert found == [{0: 3, 1: 2}, {0: 1, 1: 3}]  # every round by itself


def test_expressions_are_matched_apart_and_some_have_no_target():
    masks = quadrants()
    rounds = [{"mask_logits": logits_of(masks).expand(4, 4, 8, 8), "class_logits": scores(4, 4)}]
    owners = torch.tensor([1, 1, 3])  # expressions 0 and 2 without target
    queries, instances = HungarianMatcher(**MATCHER)(rounds, masks[[3, 0, 3]], owners, list("abcd"))
    assert queries.tolist() == [[0, 3, 3]] and instances.tolist() == [[1, 0, 2]]


def test_the_score_decides_between_equal_masks():
    masks = quadrants()[:1]
    class_logits = torch.tensor([[[-3.0, 3.0], [2.0, -2.0], [0.0, 0.0]]])
    rounds = [{"mask_logits": logits_of(masks).expand(1, 3, 8, 8), "class_logits": class_logits}]
    match = HungarianMatcher(**MATCHER)
    assert match(rounds, masks, torch.tensor([0]), ["a"])[0].item() == 1
    # Without scores, the masks alone decide.
    better = torch.stack([logits_of(masks)[0] * share for share in (0.2, 0.3, 1.0)])
    assert match([{"mask_logits": better[None]}], masks, torch.tensor([0]), ["a"])[0].item() == 2


def test_the_cost_is_the_least_of_all_assignments():
    """Against all assignments, with costs pair by pair from torch's own losses."""
    torch.manual_seed(0)
    masks = (torch.rand(3, 16, 16) > 0.5).float()
    mask_logits, class_logits = torch.randn(1, 4, 8, 8), torch.randn(1, 4, 2)
    torch.manual_seed(1)
    points = torch.rand(1, MATCHER["num_points"], 2)
    values = sample_upsampled(mask_logits, points, (16, 16))[0]
    truths = sample_masks(masks, points.expand(3, -1, -1))

    def cost(query, instance):
        x, t = values[query], truths[instance]
        p = x.sigmoid()
        dice = 1 - (2 * (p * t).sum() + 1) / (p.sum() + t.sum() + 1)
        referred = class_logits[0, query].softmax(0)[0]
        return (5 * F.binary_cross_entropy_with_logits(x, t) + 5 * dice - 2 * referred).item()

    costs = {
        assignment: sum(cost(query, i) for i, query in enumerate(assignment))
        for assignment in itertools.permutations(range(4), 3)
    }
    torch.manual_seed(1)
    queries, instances = HungarianMatcher(**MATCHER)(
        [{"mask_logits": mask_logits, "class_logits": class_logits}],
        masks,
        torch.zeros(3, dtype=torch.int64),
        ["a"],
    )
    found = dict(zip(instances[0].tolist(), queries[0].tolist()))
    assert tuple(found[i] for i in range(3)) == min(costs, key=costs.get)


def test_more_instances_than_queries():
    masks = quadrants()
    rounds = [{"mask_logits": logits_of(masks)[None, 1:3], "class_logits": scores(1, 2)}]
    queries, instances = HungarianMatcher(**MATCHER)(
        rounds, masks, torch.zeros(4, dtype=torch.int64), ["a"]
    )
    assert queries.tolist() == [[0, 1]] and instances.tolist() == [[1, 2]]


def test_no_target_at_all():
    rounds = [{"mask_logits": torch.randn(2, 3, 4, 4), "class_logits": scores(2, 3)}] * 4
    empty = torch.zeros(0, dtype=torch.int64)
    queries, instances = HungarianMatcher(**MATCHER)(rounds, torch.zeros(0, 8, 8), empty, ["a"] * 2)
    assert queries.shape == instances.shape == (4, 0)


def test_costs_that_are_not_finite_name_the_images():
    masks = quadrants()[:3]
    mask_logits = logits_of(quadrants()).expand(3, 4, 8, 8).clone()
    mask_logits[1, 2, 0, 0] = float("nan")
    rounds = [
        {"mask_logits": logits_of(quadrants()).expand(3, 4, 8, 8), "class_logits": scores(3, 4)},
        {"mask_logits": mask_logits, "class_logits": scores(3, 4)},
    ]
    with pytest.raises(
        FloatingPointError, match=r"\(rounds \[1\]\) in two.jpg: the model"
    ) as error:
        HungarianMatcher(**{**MATCHER, "num_points": 2000})(
            rounds, masks, torch.arange(3), ["one.jpg", "two.jpg", "three.jpg"]
        )
    assert "one.jpg" not in str(error.value)
