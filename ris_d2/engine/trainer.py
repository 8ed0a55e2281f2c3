"""Trainer: detectron2's DefaultTrainer with loaders, evaluator, optimizer and step of ris_d2."""

import contextlib
import logging
import os
import weakref
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.engine import DefaultTrainer, HookBase, TrainerBase, defaults, hooks
from detectron2.evaluation import DatasetEvaluator
from detectron2.modeling import build_model
from detectron2.utils import comm
from detectron2.utils.events import EventWriter, JSONWriter
from torch import nn

from ..checkpoint import RISCheckpointer
from ..config import with_values
from ..data.loader import build_test_loader, build_train_loader
from ..evaluation import ReferringEvaluator
from ..io import sweep_temporaries
from .ema import WeightAverage
from .hooks import BestCheckpoint, EarlyStop, Evaluation, Preemption, StepSeed, TrainingEnded
from .optimizer import build_optimizer
from .preflight import check_numbers
from .distributed import share_buffers
from .schedule import build_lr_scheduler, with_iterations
from .step import StepTrainer

logger = logging.getLogger(__name__)

_WRITING_PERIOD = 20  # iterations, of detectron2's PeriodicWriter


class Trainer(DefaultTrainer):
    """Trains and evaluates any ris_d2 model from its config, on one or several GPUs or CPUs.

    A resumed run repeats the straight run step by step (same number of processes): what data a step
    sees and what random numbers the model draws are functions of SEED and the iteration. SEED < 0
    draws a seed once and keeps it in the checkpoint.

    Raises:
        ValueError: see ``check_numbers``, ``with_stock_keys``, ``build_optimizer``,
            ``build_lr_scheduler`` and the loaders.
    """

    def __init__(self, cfg: CfgNode):
        cfg = with_stock_keys(cfg)
        check_numbers(cfg)
        self._seed_is_free = cfg.SEED < 0
        if self._seed_is_free:
            cfg = with_values(cfg, {"SEED": comm.shared_random_seed() % 2**31})
        # Epochs become iterations once the units are counted; the stock constructor, which would
        # build the loader a second time, gets this one. It scales batch and schedule by itself.
        scaled = self.auto_scale_workers(cfg, comm.get_world_size())
        loader = self.build_train_loader(scaled)
        cfg = with_iterations(cfg, loader.units_per_epoch)
        self.build_train_loader = lambda cfg: loader
        with _ddp_for_every_method(cfg.SOLVER.RIS.ACCUMULATION):
            super().__init__(cfg)
        ris = self.cfg.SOLVER.RIS
        fp16 = self.cfg.MODEL.RIS.PRECISION == "fp16"
        torch.backends.cuda.matmul.fp32_precision = "tf32" if ris.TF32 else "ieee"
        self._trainer = StepTrainer(
            self.model,
            self.data_loader,
            self.optimizer,
            accumulation=ris.ACCUMULATION,
            clip_grad_norm=ris.CLIP_GRAD_NORM,
            grad_scaler=torch.amp.GradScaler("cuda") if fp16 else None,
        )
        _log_epochs(self.cfg, self.data_loader.units_per_epoch)

    def build_hooks(self) -> list[HookBase]:
        """Return the stock hooks, with StepSeed, our Evaluation and BestCheckpoint."""
        decay = self.cfg.SOLVER.RIS.EMA
        averages = [WeightAverage(self.model, decay)] if decay else []
        self._averaged = averages[0].applied if averages else contextlib.nullcontext
        # DefaultTrainer's constructor made the stock checkpointer; hooks get theirs from here.
        self.checkpointer = RISCheckpointer(
            self.model,
            self.cfg.OUTPUT_DIR,
            init=self.cfg.MODEL.INIT,
            save_frozen=self.cfg.MODEL.SAVE_FROZEN,
            keep=self.cfg.SOLVER.RIS.KEEP_CHECKPOINTS,
            weights=self._averaged,
            trainer=weakref.proxy(self),
        )
        self._step_seed = StepSeed(self.cfg.SEED)
        stock = super().build_hooks()
        position = next(i for i, hook in enumerate(stock) if isinstance(hook, hooks.EvalHook))
        period, patience, best = self.cfg.TEST.EVAL_PERIOD, self.cfg.SOLVER.RIS.PATIENCE, None
        evaluations = [
            Preemption(self.checkpointer),
            Evaluation(period, self._evaluate, self.cfg.OUTPUT_DIR),
        ]
        if comm.is_main_process():
            best = BestCheckpoint(self.checkpointer, self.cfg.TEST.BEST_METRIC)
            log = {"before_train": self._log_evaluation, "after_step": self._log_evaluation}
            evaluations += [best, hooks.CallbackHook(**log)]
        if patience:
            evaluations.append(EarlyStop(best, patience, period))
        stock[position : position + 1] = evaluations
        return [self._step_seed, *averages, *stock]

    def resume_or_load(self, resume: bool = True) -> None:
        """Resume from OUTPUT_DIR's last checkpoint, or start from MODEL.INIT and MODEL.WEIGHTS."""
        super().resume_or_load(resume)
        self.data_loader.start = self.start_iter

    def run_step(self) -> None:
        super().run_step()
        # What detectron2 writes now is of this step; a run that ends here has checked its last one.
        if (self.iter + 1) % _WRITING_PERIOD == 0 or self.iter + 1 == self.max_iter:
            self._trainer.settle()

    def build_writers(self) -> list[EventWriter]:
        writers = super().build_writers()
        self._history = [writer for writer in writers if isinstance(writer, JSONWriter)]
        return writers

    def train(self) -> dict | None:
        if comm.is_main_process():
            for folder in self._output_folders():
                for path in sweep_temporaries(folder):
                    logger.info("Removed %s, which a killed process left", path)
        with contextlib.suppress(TrainingEnded):
            return super().train()

    def after_train(self) -> None:
        # detectron2 counts a step after its loop; here there was none, the training had come to its
        # end before it was resumed.
        if self.start_iter >= self.max_iter:
            self.iter = self.start_iter
        super().after_train()

    def state_dict(self) -> dict[str, Any]:
        state = super().state_dict()
        state.setdefault("_trainer", self._trainer.state_dict())  # v0.6 forgets the optimizer
        state["seed"] = self.cfg.SEED
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        TrainerBase.load_state_dict(self, state_dict)
        self._restore_seed(state_dict.get("seed"))
        if "_trainer" in state_dict:
            self._trainer.load_state_dict(state_dict["_trainer"])
        else:
            logger.warning("The checkpoint has no optimizer state: the optimizer starts afresh")

    @classmethod
    def build_model(cls, cfg: CfgNode) -> nn.Module:
        model = build_model(with_stock_keys(cfg))
        total = sum(p.numel() for p in model.parameters()) / 1e6
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad) / 1e6
        name = cfg.MODEL.META_ARCHITECTURE
        logger.info(f"{name}: {total:.2f} M parameters, {trained:.2f} M of them trainable")
        return model

    @classmethod
    def build_train_loader(cls, cfg: CfgNode) -> Iterable[list[dict]]:
        return build_train_loader(cfg)

    @classmethod
    def build_test_loader(cls, cfg: CfgNode, dataset_name: str) -> Iterable[list[dict]]:
        return build_test_loader(cfg, dataset_name)

    @classmethod
    def build_evaluator(cls, cfg: CfgNode, dataset_name: str) -> DatasetEvaluator:
        """Results go to ``<OUTPUT_DIR>/inference/<dataset_name>/``, replacing older ones."""
        return ReferringEvaluator(
            dataset_name,
            output_dir=os.path.join(cfg.OUTPUT_DIR, "inference", dataset_name),
            save_predictions=cfg.TEST.SAVE_PREDICTIONS,
            sample=cfg.TEST.SAMPLE,
        )

    @classmethod
    def build_optimizer(cls, cfg: CfgNode, model: nn.Module) -> torch.optim.Optimizer:
        return build_optimizer(cfg, model, clips_full_model=False)  # StepTrainer does

    @classmethod
    def build_lr_scheduler(cls, cfg: CfgNode, optimizer: torch.optim.Optimizer) -> Any:
        return build_lr_scheduler(cfg, optimizer)

    @classmethod
    def test(
        cls, cfg: CfgNode, model: nn.Module, evaluators: list[DatasetEvaluator] | None = None
    ) -> dict[str, dict[str, float]]:
        """Evaluate on DATASETS.TEST what a checkpoint of this moment would hold.

        Returns:
            {"referring": metrics}; with several test sets {"<dataset>/referring": metrics, ...}, so
            that TEST.EXPECTED_RESULTS can name each. Empty on other processes than the main one.
        """
        share_buffers(model)
        results = super().test(cfg, model, evaluators)
        if len(cfg.DATASETS.TEST) <= 1:
            return results
        return OrderedDict(
            (f"{dataset}/{task}", metrics)
            for dataset, tasks in results.items()
            for task, metrics in tasks.items()
        )

    def _evaluate(self) -> dict[str, dict[str, float]]:
        self._trainer.settle()
        with self._averaged():
            self._last_eval_results = self.test(self.cfg, self.model)
        return self._last_eval_results

    def _log_evaluation(self, _: TrainerBase) -> None:
        # At once, not with the next losses: metrics.json says which evaluations came to their end.
        latest = self.storage.latest().items()
        if any("/" in name and iteration == self.storage.iter for name, (_, iteration) in latest):
            for writer in self._history:
                writer.write()

    def _output_folders(self) -> list[str]:
        inference = os.path.join(self.cfg.OUTPUT_DIR, "inference")
        return [self.cfg.OUTPUT_DIR, *(os.path.join(inference, n) for n in self.cfg.DATASETS.TEST)]

    def _restore_seed(self, seed: int | None) -> None:
        if seed is None or seed == self.cfg.SEED:
            return
        if not self._seed_is_free:
            kept = self.cfg.SEED
            logger.warning(f"SEED is {kept}, the checkpoint's {seed}: not the run that was stopped")
            return
        self.cfg = with_values(self.cfg, {"SEED": seed})
        self._step_seed.seed = seed
        self.data_loader.seed = seed


@contextlib.contextmanager
def _ddp_for_every_method(accumulation: int) -> Iterator[None]:
    """Within, detectron2 distributes models on the CPU, too, and not on GPUs alone.

    Gradients lie in the buffers that processes exchange. Every step uses the same parameters in the
    same way, which torch may know unless the first backward pass exchanges nothing (accumulation).
    """
    stock = defaults.create_ddp_model

    def create_ddp_model(model: nn.Module, **kwargs: Any) -> nn.Module:
        if next(model.parameters()).device.type == "cpu":
            kwargs["device_ids"] = None
        kwargs.update(gradient_as_bucket_view=True, static_graph=accumulation == 1)
        return stock(model, **kwargs)

    defaults.create_ddp_model = create_ddp_model
    try:
        yield
    finally:
        defaults.create_ddp_model = stock


def with_stock_keys(cfg: CfgNode) -> CfgNode:
    """Read detectron2's keys for mixed precision and clipping as those of ris_d2, where set.

    SOLVER.AMP.ENABLED makes MODEL.RIS.PRECISION fp16 (unless it is bf16); SOLVER.CLIP_GRADIENTS
    with CLIP_TYPE full_model is SOLVER.RIS.CLIP_GRAD_NORM. (Its other types, BIAS_LR_FACTOR and
    LR_SCHEDULER_NAME are obeyed by ``build_optimizer`` and ``build_lr_scheduler``.) The log says
    so.

    Raises:
        ValueError: fp16 without a GPU, or both keys for clipping are set.
    """
    changes: dict[str, Any] = {}
    clip = cfg.SOLVER.CLIP_GRADIENTS
    if cfg.SOLVER.AMP.ENABLED and cfg.MODEL.RIS.PRECISION == "fp32":
        changes["MODEL.RIS.PRECISION"] = "fp16"
    if clip.ENABLED and clip.CLIP_TYPE == "full_model":
        if cfg.SOLVER.RIS.CLIP_GRAD_NORM not in (0.0, clip.CLIP_VALUE):
            raise ValueError("set SOLVER.CLIP_GRADIENTS or SOLVER.RIS.CLIP_GRAD_NORM, not both")
        if clip.NORM_TYPE != 2.0:
            raise ValueError("SOLVER.CLIP_GRADIENTS: full_model clips by the norm of NORM_TYPE 2.0")
        if cfg.SOLVER.RIS.CLIP_GRAD_NORM == 0.0:
            changes["SOLVER.RIS.CLIP_GRAD_NORM"] = float(clip.CLIP_VALUE)
    precision = changes.get("MODEL.RIS.PRECISION", cfg.MODEL.RIS.PRECISION)
    if precision == "fp16" and not cfg.MODEL.DEVICE.startswith("cuda"):
        is_ours = cfg.MODEL.RIS.PRECISION == "fp16"
        source = "MODEL.RIS.PRECISION fp16" if is_ours else "SOLVER.AMP.ENABLED"
        raise ValueError(f"{source} needs a GPU; use MODEL.RIS.PRECISION bf16 on a CPU")
    if not changes:
        return cfg
    logger.info("detectron2's SOLVER keys mean here: %s", changes)
    return with_values(cfg, changes)


def _log_epochs(cfg: CfgNode, units_per_epoch: int) -> None:
    solver = cfg.SOLVER
    micro, processes = solver.RIS.ACCUMULATION, comm.get_world_size()
    epochs = solver.MAX_ITER * solver.IMS_PER_BATCH / units_per_epoch
    logger.info(
        f"{solver.MAX_ITER} iterations x {solver.IMS_PER_BATCH} units = {epochs:.1f} epochs of "
        f"{units_per_epoch:,} units ({processes} processes x {micro} micro-batches x "
        f"{solver.IMS_PER_BATCH // (processes * micro)})"
    )
