import os
import pathlib
import runpy
import subprocess
import sys

import pytest
import torch

SCRIPT = pathlib.Path(__file__).with_name("train_in_processes.py")


def test_two_processes_train_as_one(tmp_path):
    """Losses and gradients, though one process has three expressions and the other no target."""
    runpy.run_path(str(SCRIPT))["main"](0, 1, str(tmp_path))
    environment = {
        **os.environ,
        "PYTHONPATH": str(pathlib.Path(__file__).parents[3]),
        "OMP_NUM_THREADS": "1",
    }
    processes = [
        subprocess.Popen([sys.executable, SCRIPT, str(rank), "2", tmp_path], env=environment)
        for rank in range(2)
    ]
    assert [process.wait(timeout=120) for process in processes] == [0, 0]
    losses, gradients = torch.load(tmp_path / "0_of_1.pt")
    parts = [torch.load(tmp_path / f"{rank}_of_2.pt") for rank in range(2)]
    for name, loss in losses.items():
        assert sum(part[0][name] for part in parts) / 2 == pytest.approx(loss, rel=1e-5), name
    assert parts[1][0]["loss_mask"] == 0 < losses["loss_mask"]
    assert len(gradients) > 100 and all(gradient is not None for gradient in gradients.values())
    scale = max(gradient.abs().max() for gradient in gradients.values())
    for name, gradient in gradients.items():
        for part in parts:
            torch.testing.assert_close(
                part[1][name], gradient, atol=1e-5 * scale.item(), rtol=1e-3, msg=name
            )
