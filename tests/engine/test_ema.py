"""SOLVER.RIS.EMA: the average of the weights is what is evaluated and saved."""

import logging

import pytest
import torch
from detectron2.engine import HookBase
from ris_toy import ToyTrainer
from test_trainer import parameters, train

DECAY = 0.6
ON = {"SOLVER__RIS__EMA": DECAY}


def saved(output_dir, name="model_final"):
    weights = torch.load(output_dir / f"{name}.pth", weights_only=True)["model"]
    return torch.cat([value.flatten().cpu() for value in weights.values()])


class Follower(HookBase):
    """The average in plain arithmetic."""

    def before_train(self):
        self.averages = [parameters(self.trainer)]

    def after_step(self):
        step = self.trainer.iter
        decay = min(DECAY, (1 + step) / (10 + step))
        self.averages.append(decay * self.averages[-1] + (1 - decay) * parameters(self.trainer))


class Followed(ToyTrainer):
    evaluated = []

    def build_hooks(self):
        self.follower = Follower()
        return [*super().build_hooks(), self.follower]

    @classmethod
    def test(cls, cfg, model, evaluators=None):
        cls.evaluated.append(torch.cat([p.detach().flatten().cpu() for p in model.parameters()]))
        return super().test(cfg, model, evaluators)


def test_the_average_is_evaluated_and_saved_and_training_does_not_see_it(tmp_path):
    plain, losses = train(tmp_path / "plain")
    options = {**ON, "TEST__EVAL_PERIOD": 4, "SOLVER__CHECKPOINT_PERIOD": 4}
    Followed.evaluated = []
    trainer, same = train(tmp_path / "ema", trainer_class=Followed, **options)
    assert same == losses
    assert torch.equal(parameters(trainer), parameters(plain))
    averages = trainer.follower.averages
    assert not torch.allclose(averages[-1], parameters(trainer), atol=1e-4)
    for name, step in (("model_0000003", 4), ("model_final", 8)):
        assert torch.allclose(saved(tmp_path / "ema", name), averages[step], atol=1e-6)
    assert [torch.allclose(e, averages[s]) for e, s in zip(Followed.evaluated, (4, 8))] == [
        True
    ] * 2
    best = torch.load(tmp_path / "ema" / "model_best.pth", weights_only=True)
    expected = saved(tmp_path / "ema", {4: "model_0000003", 8: "model_final"}[best["iteration"]])
    assert torch.equal(saved(tmp_path / "ema", "model_best"), expected)


def test_a_resumed_average_is_that_of_the_straight_training(tmp_path):
    options = {**ON, "SOLVER__STEPS": (), "SOLVER__WARMUP_ITERS": 0}
    straight, losses = train(tmp_path / "straight", SOLVER__MAX_ITER=8, **options)
    train(tmp_path / "halves", SOLVER__MAX_ITER=4, **options)
    resumed, rest = train(
        tmp_path / "halves", resume=True, seed_of_init=99, SOLVER__MAX_ITER=8, **options
    )
    assert rest == losses[4:]
    assert torch.equal(parameters(resumed), parameters(straight))
    assert torch.equal(saved(tmp_path / "halves"), saved(tmp_path / "straight"))


def test_an_average_begins_where_a_training_without_one_stopped(tmp_path, caplog):
    before, _ = train(tmp_path, SOLVER__MAX_ITER=2)
    train(tmp_path, resume=True, SOLVER__MAX_ITER=3, SOLVER__BASE_LR=0.0, **ON)
    assert torch.allclose(saved(tmp_path), parameters(before), atol=1e-2)
    with caplog.at_level(logging.WARNING):
        train(tmp_path, resume=True, SOLVER__MAX_ITER=4)
    assert "Cannot find the hook 'WeightAverage'" in caplog.text


def test_frozen_parameters_are_not_copied(tmp_path):
    trainer, _ = train(tmp_path, SOLVER__MAX_ITER=1, TOY_FREEZE=True, **ON)
    state = torch.load(tmp_path / "model_final.pth", weights_only=True)["trainer"]["hooks"]
    names = [name for name, p in trainer.model.named_parameters() if p.requires_grad]
    assert list(state["WeightAverage"]) == names and not any("encoder" in name for name in names)


@pytest.mark.parametrize("decay", [-0.1, 1.0])
def test_a_decay_out_of_range_is_refused(tmp_path, decay):
    with pytest.raises(ValueError, match=r"SOLVER.RIS.EMA is .*; it lies in \[0, 1\)"):
        train(tmp_path, SOLVER__RIS__EMA=decay)
