from functools import partial

import pytest
import torch
import torch.nn.functional as F

from ris_d2 import get_ris_cfg
from ris_d2.modeling.deris import criterion as criterion_module
from ris_d2.modeling.deris.criterion import DeRISCriterion

SIZE = 16


def make(**changes):
    cfg = get_ris_cfg()
    cfg.MODEL.DERIS.NUM_POINTS = 300
    return DeRISCriterion(**{**DeRISCriterion.from_config(cfg), **changes})


@pytest.fixture
def whole_mask(monkeypatch):
    """Losses at all pixels instead of at random points."""
    centres = (torch.arange(SIZE) + 0.5) / SIZE
    y, x = torch.meshgrid(centres, centres, indexing="ij")
    grid = torch.stack([x, y], -1).view(1, -1, 2)
    monkeypatch.setattr(
        criterion_module,
        "draw_uncertain_points",
        lambda logits, size, **settings: grid.expand(len(logits), -1, -1),
    )


def halves():
    """Left, right, top and bottom half: bool (4, SIZE, SIZE)."""
    masks = torch.zeros(4, SIZE, SIZE, dtype=torch.bool)
    masks[0, :, : SIZE // 2] = masks[2, : SIZE // 2] = True
    masks[1], masks[3] = ~masks[0], ~masks[2]
    return masks


def make_rounds(num_expressions, num_queries=5, num_rounds=3, seed=0):
    """Queries 0 to 3 draw the halves, roughly; the others nothing."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.full((num_queries, SIZE // 2, SIZE // 2), -3.0)
    drawn[:4] = F.avg_pool2d(halves().float(), 2) * 6 - 3
    rounds = []
    for _ in range(num_rounds):
        noise = torch.randn(num_expressions, num_queries, *drawn.shape[1:], generator=generator)
        logits = torch.randn(num_expressions, num_queries, 2, generator=generator)
        rounds.append(
            {
                "mask_logits": (drawn + 0.3 * noise).requires_grad_(),
                "class_logits": logits.requires_grad_(),
            }
        )
    return rounds, torch.randn(num_expressions, generator=generator).requires_grad_()


# One unit with three expressions (one, two, no instances), one with two (none, one).
def masks():
    return [halves(), halves()[1:]]


TARGETS = [
    torch.tensor([[1, 0, 0, 0], [0, 1, 1, 0], [0, 0, 0, 0]], dtype=torch.bool),
    torch.tensor([[0, 0, 0], [0, 0, 1]], dtype=torch.bool),
]
NAMES = ["one.jpg"] * 3 + ["two.jpg"] * 2
MATCHED = {0: [0], 1: [1, 2], 4: [3]}  # expression -> halves = the queries that draw them


def reference(rounds, existence_logits, *, weights=(2.0, 5.0, 5.0), aux=0.2, not_referred=0.1):
    """The losses, expression by expression on whole upsampled masks, with the known matching."""
    losses = {}
    for number, outputs in enumerate(rounds):
        bce = dice = nll = total_weight = 0.0
        for e, (logits, scores) in enumerate(zip(outputs["mask_logits"], outputs["class_logits"])):
            for query in range(len(logits)):
                referred = query in MATCHED.get(e, [])
                weight = 1.0 if referred else not_referred
                nll -= weight * scores[query].log_softmax(0)[0 if referred else 1]
                total_weight += weight
                if referred:
                    x = F.interpolate(
                        logits[None, query : query + 1],
                        size=(SIZE, SIZE),
                        mode="bilinear",
                        align_corners=True,
                    )[0, 0]
                    t, p = halves()[query].float(), x.sigmoid()
                    bce = bce + F.binary_cross_entropy_with_logits(x, t)
                    dice = dice + 1 - (2 * (p * t).sum() + 1) / (p.sum() + t.sum() + 1)
        last = number == len(rounds) - 1
        suffix, factor = ("", 1.0) if last else (f"_{number}", aux)
        losses[f"loss_class{suffix}"] = factor * weights[0] * nll / total_weight
        losses[f"loss_mask{suffix}"] = factor * weights[1] * bce / 4
        losses[f"loss_dice{suffix}"] = factor * weights[2] * dice / 4
    exists = torch.tensor([1.0, 1, 0, 0, 1])
    losses["loss_existence"] = F.binary_cross_entropy_with_logits(existence_logits, exists)
    return losses


@pytest.mark.parametrize(
    "changes, expected",
    [
        ({}, {}),
        (  # the paper's text: every weight 1, plain binary cross-entropy
            dict.fromkeys(["class_weight", "mask_weight", "dice_weight", "not_referred_weight"], 1),
            {"weights": (1, 1, 1), "not_referred": 1.0},
        ),
        ({"aux_weight": 0.0}, {"aux": 0.0}),
    ],
)
def test_losses_and_gradients_are_those_of_the_definition(whole_mask, changes, expected):
    rounds, existence = make_rounds(5)
    losses = make(**changes)(rounds, existence, masks(), TARGETS, NAMES)
    wanted = reference(rounds, existence, **expected)
    assert losses.keys() == wanted.keys()
    for name in wanted:
        torch.testing.assert_close(losses[name], wanted[name], msg=name)
    leaves = [x for outputs in rounds for x in outputs.values()] + [existence]
    gradients = torch.autograd.grad(sum(losses.values()), leaves)
    for mine, theirs in zip(gradients, torch.autograd.grad(sum(wanted.values()), leaves)):
        torch.testing.assert_close(mine, theirs)


def test_the_readings_of_bce():
    """Without weights, two-class cross-entropy is the binary one of the logits' difference."""
    rounds, existence = make_rounds(5, num_rounds=1)
    loss = make(not_referred_weight=1.0, class_weight=1.0)(
        rounds, existence, masks(), TARGETS, NAMES
    )["loss_class"]
    logits = rounds[0]["class_logits"]
    referred = torch.zeros(5, 5)
    for e, queries in MATCHED.items():
        referred[e, queries] = 1
    difference = logits[..., 0] - logits[..., 1]
    torch.testing.assert_close(loss, F.binary_cross_entropy_with_logits(difference, referred))


def test_uncertain_points_weigh_errors_more(monkeypatch):
    rounds, existence = make_rounds(5, num_rounds=1)
    arguments = (rounds, existence, masks(), TARGETS, NAMES)
    torch.manual_seed(0)
    losses, draw = [], criterion_module.draw_uncertain_points
    for ratio in (0.0, 1.0):
        points = partial(draw, importance_ratio=ratio)
        monkeypatch.setattr(criterion_module, "draw_uncertain_points", points)
        losses.append(make()(*arguments)["loss_mask"])
    assert losses[1] > 1.5 * losses[0]


def test_a_batch_without_any_target():
    rounds, existence = make_rounds(5)
    nothing = [torch.zeros_like(rows) for rows in TARGETS]
    losses = make()(rounds, existence, masks(), nothing, NAMES)
    assert losses.keys() == make()(rounds, existence, masks(), TARGETS, NAMES).keys()
    assert all(losses[name] == 0 for name in losses if "mask" in name or "dice" in name)
    expected = 2 * -rounds[-1]["class_logits"].log_softmax(-1)[..., 1].mean()
    torch.testing.assert_close(losses["loss_class"], expected)
    torch.testing.assert_close(losses["loss_existence"], F.softplus(existence).mean())
    sum(losses.values()).backward()
    # Zeros rather than no gradient at all: DistributedDataParallel waits for every parameter.
    assert all((outputs["mask_logits"].grad == 0).all() for outputs in rounds)
    assert all((outputs["class_logits"].grad != 0).any() for outputs in rounds)


def test_units_without_annotations():
    rounds, existence = make_rounds(2)
    masks = [torch.zeros(0, SIZE, SIZE, dtype=torch.bool)] * 2
    losses = make()(
        rounds, existence, masks, [torch.zeros(1, 0, dtype=torch.bool, device="cpu")] * 2, NAMES
    )
    assert losses["loss_mask"] == 0 and losses["loss_class"].isfinite()


def test_an_emptied_instance_is_still_a_target():
    """A mask that augmentation has moved out of the image keeps its row: its query draws nothing."""
    rounds, existence = make_rounds(1, num_rounds=1)
    empty = torch.zeros(1, SIZE, SIZE, dtype=torch.bool)
    losses = make()(
        rounds, existence, [empty], [torch.ones(1, 1, dtype=torch.bool, device="cpu")], NAMES[:1]
    )
    assert losses["loss_mask"] > 0
    torch.testing.assert_close(losses["loss_existence"], F.softplus(-existence[0]))


def test_a_round_without_scores_is_supervised_on_masks_alone(whole_mask):
    rounds, existence = make_rounds(5)
    expected = reference(rounds, existence)
    del rounds[1]["class_logits"]
    losses = make()(rounds, existence, masks(), TARGETS, NAMES)
    del expected["loss_class_1"]
    assert losses.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(losses[name], expected[name], msg=name)


def test_two_processes_train_as_one(whole_mask, monkeypatch):
    """Processes of 3 and 2 expressions; their mean is the loss of all 5 together."""
    rounds, existence = make_rounds(5)
    whole = make()(rounds, existence, masks(), TARGETS, NAMES)
    parts = []
    for process, rows in enumerate([slice(0, 3), slice(3, 5)]):
        part = [{key: value[rows] for key, value in outputs.items()} for outputs in rounds]
        own = slice(process, process + 1)
        parts.append((part, existence[rows], masks()[own], TARGETS[own], NAMES[own]))
    counts = []
    for part in parts:
        seen = []
        monkeypatch.setattr(
            criterion_module,
            "mean_over_processes",
            lambda count, device, seen=seen: seen.append(count) or float(count),
        )
        make()(*part)
        counts.append(seen)
    assert len(counts[0]) == len(counts[1]) > 0  # as many exchanges on every process
    means = [(a + b) / 2 for a, b in zip(*counts)]
    halves_of_loss = []
    for part in parts:
        remaining = iter(means)
        monkeypatch.setattr(
            criterion_module,
            "mean_over_processes",
            lambda count, device, rest=remaining: next(rest),
        )
        halves_of_loss.append(make()(*part))
    for name in whole:
        torch.testing.assert_close(sum(half[name] for half in halves_of_loss) / 2, whole[name])


def test_losses_are_fp32_under_autocast(device):
    rounds, existence = make_rounds(5)
    torch.manual_seed(0)
    exact = make()(rounds, existence, masks(), TARGETS, NAMES)
    torch.manual_seed(0)
    with torch.autocast(device, torch.bfloat16):
        losses = make()(rounds, existence, masks(), TARGETS, NAMES)
    for name, loss in losses.items():
        assert loss.dtype == torch.float32 and loss == exact[name]
    half = [{key: x.detach().bfloat16() for key, x in outputs.items()} for outputs in rounds]
    losses = make()(half, existence.bfloat16(), masks(), TARGETS, NAMES)
    assert all(loss.dtype == torch.float32 for loss in losses.values())


def test_logits_that_are_not_finite_name_the_image():
    rounds, existence = make_rounds(5)
    rounds[0]["class_logits"] = torch.full((5, 5, 2), float("inf"))
    with pytest.raises(FloatingPointError, match="one.jpg, two.jpg"):
        make()(rounds, existence, masks(), TARGETS, NAMES)


def test_settings_that_make_no_sense_are_errors():
    with pytest.raises(ValueError, match="NUM_POINTS is 0"):
        make(num_points=0)
