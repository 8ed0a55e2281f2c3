import json
import logging
import math
import os
import signal

import pytest
import torch
from detectron2.engine import HookBase, defaults
from ris_toy import ToyTrainer, toy_cfg, toy_mapper

from ris_d2.data.loader import build_train_loader
from ris_d2.engine import trainer as trainer_module
from ris_d2.engine.history import read_history


class Recorder(HookBase):
    """The losses as they were logged, at full precision."""

    def __init__(self):
        self.losses = []

    def after_train(self):  # on a GPU they are logged a step late
        if "total_loss" in self.trainer.storage.histories():
            history = self.trainer.storage.history("total_loss").values()
            self.losses = [value for value, _ in history]


def train(output_dir, *, resume=False, seed_of_init=0, trainer_class=ToyTrainer, **options):
    torch.manual_seed(seed_of_init)
    trainer, recorder = trainer_class(toy_cfg(output_dir, **options)), Recorder()
    trainer.register_hooks([recorder])
    trainer.resume_or_load(resume)
    trainer.train()
    return trainer, recorder.losses


def parameters(trainer):
    return torch.cat([p.detach().flatten().cpu() for p in trainer.model.parameters()])


@pytest.mark.parametrize(
    "workers, resumed_workers, accumulation", [(0, 0, 1), (2, 0, 2), (0, 2, 2)]
)
def test_resumed_training_repeats_the_straight_one(
    tmp_path, workers, resumed_workers, accumulation
):
    # A schedule without end, so that MAX_ITER does not change the learning rates.
    options = {
        "SOLVER__RIS__ACCUMULATION": accumulation,
        "SOLVER__STEPS": (),
        "SOLVER__WARMUP_ITERS": 0,
    }
    straight, losses = train(tmp_path / "straight", SOLVER__MAX_ITER=20, **options)
    _, first = train(
        tmp_path / "halves", SOLVER__MAX_ITER=10, DATALOADER__NUM_WORKERS=workers, **options
    )
    resumed, second = train(
        tmp_path / "halves",
        resume=True,
        seed_of_init=99,
        SOLVER__MAX_ITER=20,
        DATALOADER__NUM_WORKERS=resumed_workers,
        **options,
    )
    assert len(losses) == 20 and len(set(losses)) == 20
    assert first + second == losses
    assert torch.equal(parameters(resumed), parameters(straight))


def test_interrupted_schedule_resumes_where_it_was(tmp_path):
    class Interrupted(ToyTrainer):
        def run_step(self):
            if self.iter == 5:
                raise KeyboardInterrupt
            super().run_step()

    options = {"SOLVER__CHECKPOINT_PERIOD": 4, "SOLVER__RIS__SCHEDULE": "poly"}
    straight, losses = train(tmp_path / "straight", **options)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "halves", trainer_class=Interrupted, **options)
    resumed, rest = train(tmp_path / "halves", resume=True, seed_of_init=99, **options)
    assert rest == losses[4:]
    assert torch.equal(parameters(resumed), parameters(straight))


@pytest.mark.parametrize("workers", [0, 2])
def test_sigterm_saves_after_the_step_and_resume_goes_on_as_straight(tmp_path, caplog, workers):
    options = {
        "SOLVER__CHECKPOINT_PERIOD": 100,
        "TEST__EVAL_PERIOD": 6,
        "SOLVER__RIS__EMA": 0.9,
        "DATALOADER__NUM_WORKERS": workers,
    }
    straight, losses = train(tmp_path / "straight", **options)
    handler = signal.getsignal(signal.SIGTERM)
    with caplog.at_level(logging.INFO, "ris_d2"), pytest.raises(SystemExit) as ended:
        train(tmp_path / "ended", TOY_SIGTERM=5, **options)
    assert ended.value.code == 143
    assert "SIGTERM: the training ends after 6 iterations" in caplog.text
    assert signal.getsignal(signal.SIGTERM) is handler
    # Not evaluated while the scheduler waits, but on resume.
    assert not (tmp_path / "ended/inference").exists()
    resumed, rest = train(tmp_path / "ended", resume=True, seed_of_init=99, **options)
    assert rest == losses[6:]
    assert torch.equal(parameters(resumed), parameters(straight))
    names = ("model_final.pth", "model_best.pth")
    models = [
        [torch.load(p / n)["model"] for n in names]
        for p in (tmp_path / "ended", tmp_path / "straight")
    ]
    torch.testing.assert_close(*models, rtol=0, atol=0)


def test_free_seed_is_drawn_once_and_resumed(tmp_path):
    first, _ = train(tmp_path, SEED=-1, SOLVER__MAX_ITER=2)
    resumed, _ = train(tmp_path, resume=True, SEED=-1, SOLVER__MAX_ITER=4)
    other, _ = train(tmp_path / "other", SEED=-1, SOLVER__MAX_ITER=2)
    assert first.cfg.SEED >= 0
    assert first.cfg.SEED == resumed.cfg.SEED == resumed.data_loader.seed
    assert resumed._step_seed.seed == first.cfg.SEED
    assert other.cfg.SEED != first.cfg.SEED


def test_resuming_with_another_seed_warns(tmp_path, caplog):
    train(tmp_path, SEED=1, SOLVER__MAX_ITER=1)
    with caplog.at_level(logging.WARNING, "ris_d2"):
        trainer, _ = train(tmp_path, resume=True, SEED=2, SOLVER__MAX_ITER=2)
    assert "SEED is 2, the checkpoint's 1" in caplog.text
    assert trainer.data_loader.seed == 2


def test_micro_batches_have_the_gradient_of_the_whole_batch(tmp_path):
    options = {"SOLVER__MAX_ITER": 5, "TOY_DROPOUT": 0.0}  # units differ in their expressions
    whole, losses = train(tmp_path / "1", **options)
    parts, same = train(tmp_path / "4", SOLVER__RIS__ACCUMULATION=4, **options)
    assert same == pytest.approx(losses, abs=1e-6)
    assert torch.allclose(parameters(parts), parameters(whole), atol=1e-5)


def test_checkpoint_without_optimizer_state_loads(tmp_path, caplog):
    """As stock detectron2 0.6 writes it."""
    train(tmp_path, SOLVER__MAX_ITER=2)
    path = tmp_path / "model_final.pth"
    checkpoint = torch.load(path, weights_only=True)
    assert checkpoint["trainer"]["_trainer"]["optimizer"]["state"]
    del checkpoint["trainer"]["_trainer"]
    del checkpoint["trainer"]["seed"]
    torch.save(checkpoint, path)
    with caplog.at_level(logging.WARNING, "ris_d2"):
        trainer, losses = train(tmp_path, resume=True, SOLVER__MAX_ITER=4)
    assert "no optimizer state" in caplog.text
    assert trainer.start_iter == 2 and len(losses) == 2


def test_nan_loss_stops_and_names_the_samples(tmp_path):
    def mapper(record, rng=None):
        inputs = toy_mapper(record, rng)
        if record["image_id"] == 5:
            inputs["numbers"] = inputs["numbers"] * math.nan
        return inputs

    class Poisoned(ToyTrainer):
        @classmethod
        def build_train_loader(cls, cfg):
            return build_train_loader(cfg, mapper=mapper)

    with pytest.raises(FloatingPointError) as stopped:
        train(
            tmp_path, trainer_class=Poisoned, SOLVER__IMS_PER_BATCH=2, SOLVER__RIS__ACCUMULATION=2
        )
    message = str(stopped.value)
    assert "at iteration " in message and "loss_toy nan" in message
    assert "image5.jpg (image_id 5, expression_ids [9, 10, 11])" in message
    assert message.count(".jpg") == 1  # the other micro-batch is innocent
    assert not (tmp_path / "model_final.pth").exists()


class Killed(BaseException):
    """Ends a training at once; as a killed process, it writes nothing more."""


def killed_in(function, call):
    """A trainer that dies in its ``call``-th call (from 1) of a method: before it does anything."""
    calls = []

    def dying(self, *args, **kwargs):
        calls.append(1)
        if len(calls) == call:
            raise Killed
        return getattr(super(Dying, self), function)(*args, **kwargs)

    class Dying(ToyTrainer):
        def after_train(self):
            if (
                len(calls) < call
            ):  # what hooks still do after an exception, a kill does not let them
                super().after_train()

    setattr(Dying, function, dying)
    return Dying


def evaluations(output_dir):
    return [
        (line["iteration"], line["referring/gIoU"], line["referring/cIoU"])
        for line in read_history(str(output_dir))
        if "referring/gIoU" in line
    ]


def outcome(output_dir):
    """All that a training leaves: weights, results, history of evaluations, the best."""
    weights = {
        name: torch.load(output_dir / f"{name}.pth", weights_only=True)["model"]
        for name in ("model_final", "model_best")
    }
    weights = {k: {n: v.tolist() for n, v in w.items()} for k, w in weights.items()}
    folder = output_dir / "inference" / "toy_ris_val"
    files = sorted(path.name for path in output_dir.iterdir() if ".tfevents" not in path.name)
    return {
        "weights": weights,
        "results": [
            (folder / name).read_text() for name in ("results.json", "per_expression.jsonl")
        ],
        "evaluations": evaluations(output_dir),
        "best": json.loads((output_dir / "model_best.json").read_text()),
        "tag": (output_dir / "last_checkpoint").read_text(),
        "files": files,
    }


INTERRUPTED = {"TEST__EVAL_PERIOD": 3, "SOLVER__CHECKPOINT_PERIOD": 3, "SOLVER__MAX_ITER": 9}


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    output_dir = tmp_path_factory.mktemp("straight")
    train(output_dir, **INTERRUPTED)
    return outcome(output_dir)


@pytest.mark.parametrize(
    "function, call",
    [
        ("run_step", 2),  # before there is a checkpoint
        ("run_step", 5),
        ("_evaluate", 1),
        ("_evaluate", 2),
        ("_evaluate", 3),  # the last one
        ("_log_evaluation", 4),  # after the evaluation, before it is in metrics.json
    ],
)
def test_a_training_that_is_killed_ends_as_a_straight_one(straight, tmp_path, function, call):
    with pytest.raises(Killed):
        train(tmp_path, trainer_class=killed_in(function, call), **INTERRUPTED)
    anew = not (tmp_path / "last_checkpoint").exists()
    train(tmp_path, resume=True, seed_of_init=0 if anew else 99, **INTERRUPTED)
    assert [iteration for iteration, *_ in straight["evaluations"]] == [2, 5, 9]
    assert outcome(tmp_path) == straight


def test_a_training_that_is_killed_again_and_again(straight, tmp_path):
    for function, call in [("_evaluate", 1), ("_evaluate", 1), ("run_step", 2), ("_evaluate", 2)]:
        with pytest.raises(Killed):
            train(tmp_path, resume=True, trainer_class=killed_in(function, call), **INTERRUPTED)
    train(tmp_path, resume=True, seed_of_init=99, **INTERRUPTED)
    assert outcome(tmp_path) == straight
    before = evaluations(tmp_path)
    train(tmp_path, resume=True, **INTERRUPTED)  # nothing is left to do
    assert outcome(tmp_path) == straight and evaluations(tmp_path) == before


def test_an_evaluation_that_came_to_its_end_is_not_repeated(tmp_path):
    calls = []

    class Counting(ToyTrainer):
        def _evaluate(self):
            calls.append(self.storage.iter)
            return super()._evaluate()

    class Stopped(Counting):
        def run_step(self):
            if self.iter == 3:
                raise Killed
            super().run_step()

    with pytest.raises(Killed):
        train(tmp_path, trainer_class=Stopped, **INTERRUPTED)
    train(tmp_path, resume=True, trainer_class=Counting, **INTERRUPTED)
    assert calls == [2, 5, 9]


def test_a_last_step_that_fails_is_not_evaluated(tmp_path):
    class Failing(ToyTrainer):
        def run_step(self):
            if self.iter == 1:
                raise FloatingPointError
            super().run_step()

    with pytest.raises(FloatingPointError):
        train(tmp_path, trainer_class=Failing, SOLVER__MAX_ITER=2)
    assert not (tmp_path / "inference").exists()


def test_temporaries_of_killed_writes_are_swept_at_the_start(tmp_path):
    ours = tmp_path / ".ris_d2-0123abcd.model_0000001.pth"
    others = tmp_path / ".0123abcd.notes.txt"
    for path in (ours, others):
        path.write_text("half")
        os.utime(path, (0, 0))
    train(tmp_path, SOLVER__MAX_ITER=1)
    assert not ours.exists() and others.exists()


def test_the_newest_checkpoints_are_kept(tmp_path):
    options = {"SOLVER__CHECKPOINT_PERIOD": 1, "SOLVER__RIS__KEEP_CHECKPOINTS": 2}
    train(tmp_path, SOLVER__MAX_ITER=5, **options)
    assert numbered(tmp_path) == ["model_0000003.pth", "model_0000004.pth"]
    train(tmp_path, resume=True, SOLVER__MAX_ITER=6, **options)
    assert numbered(tmp_path) == ["model_0000004.pth", "model_0000005.pth"]
    assert (tmp_path / "last_checkpoint").read_text() == "model_final.pth"
    assert (tmp_path / "model_best.pth").exists() and (tmp_path / "model_final.pth").exists()
    options["SOLVER__RIS__KEEP_CHECKPOINTS"] = 0
    train(tmp_path / "all", SOLVER__MAX_ITER=5, **options)
    assert len(numbered(tmp_path / "all")) == 5


def numbered(output_dir):
    return sorted(path.name for path in output_dir.glob("model_0*.pth"))


@pytest.mark.parametrize("tag", ["missing", "of a broken file", "of no file"])
def test_resuming_finds_the_newest_whole_checkpoint(tmp_path, caplog, tag):
    train(tmp_path, SOLVER__MAX_ITER=6, SOLVER__CHECKPOINT_PERIOD=2)
    last, final = tmp_path / "last_checkpoint", tmp_path / "model_final.pth"
    if tag == "missing":
        last.unlink()
        final.unlink()
    elif tag == "of no file":
        final.unlink()
    else:
        final.write_bytes(final.read_bytes()[:-100])
        newest = tmp_path / "model_0000005.pth"
        content = bytearray(newest.read_bytes())
        for i in range(len(content) // 2, len(content) // 2 + 300):
            content[i] ^= 1
        newest.write_bytes(content)
    with caplog.at_level(logging.WARNING, "ris_d2"):
        trainer, _ = train(tmp_path, resume=True, SOLVER__MAX_ITER=8)
    assert trainer.start_iter == (4 if tag == "of a broken file" else 6)
    assert "last_checkpoint names no whole file; the newest one is" in caplog.text


def test_gradient_is_clipped_as_a_whole(tmp_path):
    options = {"SOLVER__MAX_ITER": 1, "SOLVER__RIS__ACCUMULATION": 2, "TOY_DROPOUT": 0.0}
    clipped, _ = train(tmp_path / "a", SOLVER__RIS__CLIP_GRAD_NORM=0.01, **options)
    free, _ = train(tmp_path / "b", SOLVER__RIS__CLIP_GRAD_NORM=0.0, **options)

    def gradient(trainer):
        return torch.cat([p.grad.flatten() for p in trainer.model.parameters()])

    assert gradient(clipped).norm().item() == pytest.approx(0.01, rel=1e-3)
    expected = gradient(free) * 0.01 / gradient(free).norm()
    assert torch.allclose(gradient(clipped), expected, atol=1e-6)
    assert clipped.storage.latest()["grad_norm"][0] == pytest.approx(gradient(free).norm().item())


def test_evaluates_each_test_set_and_writes_it_apart(tmp_path):
    trainer, _ = train(tmp_path, SOLVER__MAX_ITER=1, DATASETS__TEST=("toy_ris_val", "toy_ris_test"))
    results = trainer._last_eval_results
    assert set(results) == {"toy_ris_val/referring", "toy_ris_test/referring"}
    assert 0 <= results["toy_ris_val/referring"]["gIoU"] <= 100
    for name in ("toy_ris_val", "toy_ris_test"):
        assert (tmp_path / "inference" / name / "results.json").is_file()


@pytest.mark.parametrize("accumulation", [1, 2])
def test_processes_exchange_gradients_where_they_lie(accumulation, monkeypatch):
    """The graph is static unless the first backward pass exchanges nothing."""
    monkeypatch.setattr(defaults, "create_ddp_model", lambda model, **options: options)
    with trainer_module._ddp_for_every_method(accumulation):
        options = defaults.create_ddp_model(torch.nn.Linear(1, 1), device_ids=[0])
    assert options["gradient_as_bucket_view"] and options["static_graph"] == (accumulation == 1)


def test_expected_results_are_checked_at_the_end(tmp_path):
    wrong = [["referring", "gIoU", 12345.0, 0.1]]
    with pytest.raises(SystemExit):
        train(tmp_path, SOLVER__MAX_ITER=1, TEST__EXPECTED_RESULTS=wrong)


class Scored(ToyTrainer):
    """Evaluations in a row give these scores: per test set, gIoU."""

    scores: list

    @classmethod
    def test(cls, cfg, model, evaluators=None):
        first, second = cls.scores.pop(0)
        return {"a/referring": {"gIoU": first}, "b/referring": {"gIoU": second, "other": 99.0}}


def best(tmp_path):
    record = json.loads((tmp_path / "model_best.json").read_text())
    weights = torch.load(tmp_path / "model_best.pth", weights_only=True)
    assert weights["iteration"] == record["iteration"] and "trainer" not in weights
    return record


def test_best_checkpoint_survives_resume(tmp_path):
    nan = math.nan
    Scored.scores = [(10.0, 30.0), (nan, 50.0), (40.0, 42.0)]  # means 20, 50, 41
    train(tmp_path, trainer_class=Scored, SOLVER__MAX_ITER=6, TEST__EVAL_PERIOD=2)
    assert best(tmp_path) == {"metric": "gIoU", "value": 50.0, "iteration": 4}
    assert (tmp_path / "last_checkpoint").read_text() == "model_final.pth"

    Scored.scores = [(45.0, 45.0), (nan, nan), (60.0, 41.0)]  # means 45, undefined, 50.5
    train(tmp_path, resume=True, trainer_class=Scored, SOLVER__MAX_ITER=8, TEST__EVAL_PERIOD=8)
    assert best(tmp_path)["iteration"] == 4
    train(tmp_path, resume=True, trainer_class=Scored, SOLVER__MAX_ITER=10, TEST__EVAL_PERIOD=10)
    assert best(tmp_path)["iteration"] == 4
    train(tmp_path, resume=True, trainer_class=Scored, SOLVER__MAX_ITER=12, TEST__EVAL_PERIOD=12)
    assert best(tmp_path) == {"metric": "gIoU", "value": 50.5, "iteration": 12}

    Scored.scores = [(1.0, 3.0)]  # a new training in the same directory
    train(tmp_path, trainer_class=Scored, SOLVER__MAX_ITER=1)
    assert best(tmp_path) == {"metric": "gIoU", "value": 2.0, "iteration": 1}


def test_training_ends_once_evaluations_bring_nothing_better(tmp_path, caplog):
    patient = {"TEST__EVAL_PERIOD": 2, "SOLVER__RIS__PATIENCE": 2, "SOLVER__CHECKPOINT_PERIOD": 3}
    Scored.scores = [(9.0, 9.0), (5.0, 5.0), (9.5, 9.5), (9.0, 9.0), (9.5, 9.5)]
    with caplog.at_level(logging.INFO):
        trainer, losses = train(tmp_path, trainer_class=Scored, SOLVER__MAX_ITER=20, **patient)
    assert len(losses) == 10
    assert best(tmp_path)["iteration"] == 6
    assert "Training ends after 10 iterations" in caplog.text
    assert "Exception" not in caplog.text
    assert not (tmp_path / "model_final.pth").exists()
    history = read_history(str(tmp_path))
    evaluated = [line["iteration"] for line in history if "a/referring/gIoU" in line]
    assert evaluated == [1, 3, 5, 7, 9]
    # Resumed, it goes on from the last checkpoint to the next evaluation, and no further.
    Scored.scores = [(9.0, 9.0)]
    train(tmp_path, resume=True, trainer_class=Scored, SOLVER__MAX_ITER=20, **patient)
    assert Scored.scores == []
    Scored.scores = [(9.0, 9.0), (9.0, 9.0)]
    patient["SOLVER__RIS__PATIENCE"] = 3
    trainer, _ = train(tmp_path, resume=True, trainer_class=Scored, SOLVER__MAX_ITER=20, **patient)
    assert Scored.scores == [] and trainer.iter == 11


def test_patience_needs_evaluations(tmp_path):
    with pytest.raises(ValueError, match="SOLVER.RIS.PATIENCE counts evaluations; set TEST.EVAL_P"):
        train(tmp_path, SOLVER__RIS__PATIENCE=1)


class ScoredOnSplits(Scored):
    @classmethod
    def test(cls, cfg, model, evaluators=None):
        names = ("ris_refcoco_unc_val", "ris_refcocog_umd_val", "ris_refcoco_unc_testA")
        scores = zip(names, cls.scores.pop(0), strict=True)
        return {f"{name}/referring": {"gIoU": score} for name, score in scores}


def test_best_checkpoint_is_not_chosen_by_test_splits(tmp_path):
    ScoredOnSplits.scores = [(10.0, 20.0, 90.0), (20.0, 20.0, 30.0)]
    train(tmp_path, trainer_class=ScoredOnSplits, SOLVER__MAX_ITER=4, TEST__EVAL_PERIOD=2)
    assert best(tmp_path) == {"metric": "gIoU", "value": 20.0, "iteration": 4}


def test_log_gives_epochs_and_parameter_groups(tmp_path, caplog):
    with caplog.at_level(logging.INFO, "ris_d2"):
        ToyTrainer(toy_cfg(tmp_path, SOLVER__RIS__ACCUMULATION=2))
    assert (
        "8 iterations x 4 units = 3.2 epochs of 10 units (1 processes x 2 micro-batches x 2)"
        in caplog.text
    )
    assert "AdamW over 2 groups" in caplog.text


@pytest.mark.parametrize(
    "key, value, ours",
    [
        ("SOLVER__AMP__ENABLED", True, "AMP.ENABLED needs a GPU.*bf16"),
        ("MODEL__RIS__PRECISION", "fp16", "PRECISION fp16 needs a GPU.*bf16"),
        ("SOLVER__LR_SCHEDULER_NAME", "NoSuchLR", "NoSuchLR"),
    ],
)
def test_what_cannot_be_obeyed_is_refused(tmp_path, key, value, ours):
    with pytest.raises(ValueError, match=ours):
        ToyTrainer(toy_cfg(tmp_path, MODEL__DEVICE="cpu", **{key: value}))


def test_best_metric_that_no_evaluation_gives_warns(tmp_path, caplog):
    with caplog.at_level(logging.WARNING, "ris_d2"):
        train(tmp_path, SOLVER__MAX_ITER=1, TEST__BEST_METRIC="giou")
    assert "TEST.BEST_METRIC giou is none of" in caplog.text
    assert not (tmp_path / "model_best.pth").exists()


@pytest.mark.parametrize("clip", [0.0, 1.0])
def test_infinite_gradient_of_a_finite_loss_stops(tmp_path, clip):
    class Steep(ToyTrainer):
        @classmethod
        def build_model(cls, cfg):
            model = super().build_model(cfg)
            model.head.bias.register_hook(lambda gradient: gradient * math.inf)
            return model

    with pytest.raises(FloatingPointError, match="gradient is not finite at iteration 0.*jpg"):
        train(tmp_path, trainer_class=Steep, SOLVER__RIS__CLIP_GRAD_NORM=clip)
    assert not list(tmp_path.glob("*.pth"))


def test_weights_that_are_not_finite_are_neither_saved_nor_evaluated(tmp_path):
    """Finite losses and gradients, and an optimizer that overflows all the same."""

    class Overflowing(ToyTrainer):
        def run_step(self):
            super().run_step()
            self.model.encoder.weight.data[0, 0] = math.nan

    with pytest.raises(
        FloatingPointError, match="model_final.pth is not written: .*encoder.weight"
    ):
        train(tmp_path, trainer_class=Overflowing, SOLVER__MAX_ITER=1)
    assert not list(tmp_path.glob("*.pth")) and not (tmp_path / "last_checkpoint").exists()
    assert not (tmp_path / "inference").exists()
