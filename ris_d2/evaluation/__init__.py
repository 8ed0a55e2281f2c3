"""Referring segmentation measured: metrics, the evaluator, and scoring of masks from a file."""

from .evaluator import ReferringEvaluator
from .metrics import compute_metrics
from .predictions import score_predictions

__all__ = ["ReferringEvaluator", "compute_metrics", "score_predictions"]
