"""Training and evaluation on top of detectron2's DefaultTrainer."""

from .processes import launch, leave_process_group
from .trainer import Trainer

__all__ = ["Trainer", "launch", "leave_process_group"]
