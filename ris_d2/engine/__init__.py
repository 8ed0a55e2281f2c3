"""Training and evaluation on top of detectron2's DefaultTrainer."""

from .processes import claim, launch, leave_process_group
from .trainer import Trainer

__all__ = ["Trainer", "claim", "launch", "leave_process_group"]
