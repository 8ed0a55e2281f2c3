"""Training and evaluation on top of detectron2's DefaultTrainer."""

from .trainer import Trainer

__all__ = ["Trainer"]
