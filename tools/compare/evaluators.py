"""Metrics: our evaluator against those of ReLA and LAVT, on random masks and on every special case.

    python tools/compare/evaluators.py path/to/ReLA path/to/LAVT-RIS

Needs checkouts of henghuiding/ReLA at 3ca9551 and yz93/LAVT-RIS at 1da0af9. Their own evaluation
runs: ReLA's ReferEvaluator, and LAVT's test.py with a "model" that says what it is told.
LAVT prints two digits. What LAVT's test.py imports for its models is replaced by empty stand-ins.
"""

import contextlib
import importlib.util
import io
import re
from pathlib import Path
from types import ModuleType

import numpy as np
import torch
from comparison import Source, Table, run, stub

from ris_d2.evaluation import ReferringEvaluator
from ris_d2.masks import encode

RELA = Source(
    "henghuiding/ReLA",
    "3ca955198da8ace68f8980b6fcbada0791cc51c2",
    "gres_model/evaluation/refer_evaluation.py",
)
LAVT = Source("yz93/LAVT-RIS", "1da0af9f21b637c0cae9ea1363d2dd9b40e19628", "test.py")
HEIGHT, WIDTH = 40, 60


class Sample:
    """One sentence: ground truth, prediction (both bool (H, W)) and who says "no target"."""

    def __init__(self, truth: np.ndarray, mask: np.ndarray, *, no_target: bool, denied: bool):
        self.truth, self.mask, self.no_target, self.denied = truth, mask, no_target, denied


def draw_samples(generator: np.random.Generator, number: int, *, targets_only: bool = False):
    """Random boxes, predictions near them and far from them; empty ones, no targets, denials."""
    samples = []
    for _ in range(number):
        truth, mask = (np.zeros((HEIGHT, WIDTH), bool) for _ in range(2))
        y, x = generator.integers(0, (HEIGHT - 10, WIDTH - 10))
        height, width = generator.integers(3, 30, 2)
        no_target = not targets_only and generator.random() < 0.25
        if not no_target:
            truth[y : y + height, x : x + width] = True
        shift = generator.integers(0, 6, 2) if generator.random() < 0.8 else (20, 30)
        if generator.random() < 0.9:
            mask[y + shift[0] : y + height, x + shift[1] : x + width + 2] = True
        denied = not targets_only and bool(generator.random() < (0.6 if no_target else 0.1))
        samples.append(Sample(truth, mask, no_target=no_target, denied=denied))
    return samples


def ours(samples: list[Sample]) -> dict[str, float]:
    evaluator = ReferringEvaluator("random", distributed=False)
    for number, sample in enumerate(samples):
        ids = [] if sample.no_target else [7]
        unit = {
            "height": HEIGHT,
            "width": WIDTH,
            "image_id": number,
            "file_name": f"{number}.jpg",
            "annotations": [{"id": 7, "segmentation": encode(sample.truth)}],
            "expressions": [
                {"expression_id": number, "ref_id": number, "text": "it", "annotation_ids": ids}
            ],
        }
        result = {
            "expression_id": number,
            "mask": torch.from_numpy(sample.mask),
            "score": 0.5,
            "no_target": sample.denied,
        }
        evaluator.process([unit], [{"referring": [result]}])
    return evaluator.evaluate()["referring"]


def compare_rela(checkouts: list[Path], table: Table) -> None:
    module = _load("rela_evaluation", checkouts[0] / RELA.marker)
    samples = draw_samples(np.random.default_rng(1), 500)
    evaluator = module.ReferEvaluator("random", distributed=False)
    evaluator.reset()
    for number, sample in enumerate(samples):
        given = {
            "image_id": number,
            "source": "grefcoco",
            "sentence": {"raw": "it"},
            "gt_mask_merged": torch.from_numpy(sample.truth),
            "empty": sample.no_target,
        }
        mask = torch.from_numpy(sample.mask).float()
        answer = {
            "ref_seg": torch.stack([0.5 - mask, mask]),
            "nt_label": torch.tensor([not sample.denied, sample.denied]).float(),
        }
        evaluator.process([given], [answer])
    theirs = evaluator.evaluate()["grefcoco"]
    metrics = ours(samples)
    for name in ("gIoU", "cIoU", "Pr@0.7", "Pr@0.8", "Pr@0.9"):
        _add(table, f"ReLA, {name}", metrics[name], theirs[name], 1e-9)
    for name in ("N_acc", "T_acc"):  # ReLA's are shares of 1
        _add(table, f"ReLA, {name}", metrics[name], 100 * theirs[name], 1e-9)


def compare_lavt(checkouts: list[Path], table: Table) -> None:
    stub("bert.modeling_bert", BertModel=None)
    stub("lib", segmentation=None)
    module = _load("lavt_test", checkouts[1] / LAVT.marker)
    samples = draw_samples(np.random.default_rng(2), 500, targets_only=True)
    # LAVT reads an image with J sentences: ids (1, 1, T, J). Here an id is the sample's number.
    data = [
        (
            torch.zeros(1, 3, HEIGHT, WIDTH),
            torch.from_numpy(sample.truth[None].astype(np.int64)),
            torch.full((1, 1, 1, 1), number),
            torch.ones(1, 1, 1, 1),
        )
        for number, sample in enumerate(samples)
    ]

    class Says(torch.nn.Module):
        def forward(self, image, ids, l_mask):
            mask = torch.from_numpy(samples[int(ids)].mask).float()
            return torch.stack([0.5 - mask, mask])[None]

    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        module.evaluate(Says(), data, None, torch.device("cpu"))
    metrics = ours(samples)
    patterns = {"mIoU": r"Mean IoU is ([\d.]+)", "oIoU": r"overall IoU = ([\d.]+)"}
    patterns |= {f"Pr@0.{n}": rf"precision@0\.{n} = ([\d.]+)" for n in range(5, 10)}
    for name, pattern in patterns.items():
        theirs = float(re.search(pattern, printed.getvalue())[1])
        _add(table, f"LAVT, {name}", metrics[name], theirs, 0.00501)  # half of the last digit


def _load(name: str, file: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _add(table: Table, name: str, our_value: float, their_value: float, tolerance: float) -> None:
    ours_and_theirs = torch.tensor([our_value, their_value], dtype=torch.float64)
    table.add(name, *ours_and_theirs, tolerance)


if __name__ == "__main__":
    run(__doc__, [RELA, LAVT], {"rela": compare_rela, "lavt": compare_lavt})
