"""Training and evaluation on top of detectron2's DefaultTrainer."""

from .optimizer import build_optimizer
from .distributed import claim, launch, leave_process_group
from .schedule import build_lr_scheduler
from .trainer import Trainer

__all__ = [
    "Trainer",
    "build_lr_scheduler",
    "build_optimizer",
    "claim",
    "launch",
    "leave_process_group",
]
