"""Two processes on the CPU, started by --num-gpus 2 and by torchrun, against one."""

import contextlib
import json
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from ris_toy import ToyTrainer, toy_cfg

from ris_d2.engine import claim, launch

pytestmark = pytest.mark.cpu_only

HERE = Path(__file__).parent
OPTIONS = {
    "TOY_DROPOUT": 0.0,
    "SOLVER__RIS__ACCUMULATION": 2,
    "SOLVER__RIS__EMA": 0.9,
    "TEST__EVAL_PERIOD": 4,
}


def start_script(output_dir, *arguments, launcher=()):
    options = [str(x) for k, v in OPTIONS.items() for x in (k.replace("__", "."), v)]
    command = [sys.executable, *launcher, str(HERE / "toy_train_net.py"), *arguments]
    paths = [str(HERE), str(HERE.parents[1]), os.environ.get("PYTHONPATH", "")]
    return subprocess.Popen(
        [*command, "OUTPUT_DIR", str(output_dir), *options],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,  # a group of its own, so that no worker outlives a failing test
    )


def end_scripts(*processes, status=0):
    """What each has printed."""
    try:
        outputs = [process.communicate(timeout=300)[0] for process in processes]
    finally:
        for process in processes:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
    for process, output in zip(processes, outputs, strict=True):
        assert process.returncode == status, output
    return outputs


def run_script(output_dir, *arguments, launcher=()):
    return end_scripts(start_script(output_dir, *arguments, launcher=launcher))[0]


def losses(output_dir):
    lines = [json.loads(line) for line in (output_dir / "metrics.json").read_text().splitlines()]
    return [line["total_loss"] for line in lines if "total_loss" in line]


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    output_dir = tmp_path_factory.mktemp("one")
    torch.manual_seed(7)  # as default_setup does with SEED on rank 0
    trainer = ToyTrainer(toy_cfg(output_dir, **OPTIONS))
    trainer.resume_or_load(False)
    trainer.train()
    return output_dir


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    output_dir = tmp_path_factory.mktemp("two")
    run_script(output_dir, "--num-gpus", "2", "--dist-url", "auto")
    return output_dir


def results(output_dir):
    return (output_dir / "inference" / "toy_ris_val" / "results.json").read_text()


def test_two_processes_train_as_one(one, two):
    assert losses(two) == pytest.approx(losses(one), abs=1e-5)
    models = [
        torch.load(path / "model_final.pth", weights_only=True)["model"] for path in (one, two)
    ]
    for name, value in models[0].items():
        assert torch.allclose(models[1][name], value, atol=1e-4), name


def test_two_processes_evaluate_as_one(one, two):
    assert results(two) == results(one)


def test_torchrun_evaluates_a_checkpoint_as_training_did(two):
    before = results(two)
    (two / "inference" / "toy_ris_val" / "results.json").unlink()
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    output = run_script(two, "--eval-only", "--resume", launcher=launcher)
    assert results(two) == before
    assert "gIoU" in output


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def test_two_machines_are_preempted_and_go_on_with_torchrun_as_two_processes_do(two, tmp_path):
    meet = f"tcp://127.0.0.1:{free_port()}"
    machines = [
        start_script(
            *(tmp_path, "--num-machines", "2", "--machine-rank", str(rank), "--dist-url", meet),
            *("TOY_SIGTERM", "3"),  # to the second machine's train_net.py alone
        )
        for rank in (0, 1)
    ]
    outputs = end_scripts(*machines, status=143)
    assert "SIGTERM: the training ends after" in outputs[0]
    assert not (tmp_path / "model_final.pth").exists()

    torchrun = ("-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1")
    torchrun += ("--master-addr", "127.0.0.1", "--master-port", str(free_port()), "--node-rank")
    end_scripts(*(start_script(tmp_path, "--resume", launcher=(*torchrun, rank)) for rank in "01"))
    models = [torch.load(path / "model_final.pth")["model"] for path in (tmp_path, two)]
    torch.testing.assert_close(*models, rtol=0, atol=0)


def claim_and_wait(folder, claimed):
    with claim(folder):
        claimed.set()
        time.sleep(100)


def test_two_trainings_do_not_work_in_one_folder(tmp_path):
    context = multiprocessing.get_context("fork")
    claimed = context.Event()
    other = context.Process(target=claim_and_wait, args=(str(tmp_path), claimed))
    other.start()
    try:
        assert claimed.wait(20)
        with pytest.raises(BlockingIOError, match="another training is at work in"):
            with claim(str(tmp_path), patience=0.1):
                pass
    finally:
        other.kill()
        other.join()
    with claim(str(tmp_path)):  # a killed process claims nothing
        pass


def test_more_processes_than_gpus_are_refused():
    with pytest.raises(ValueError, match="processes for [0-9]+ visible GPUs.*MODEL.DEVICE cpu"):
        launch(print, device="cuda", num_processes=torch.cuda.device_count() + 2)


def test_two_processes_end_together_when_nothing_gets_better(tmp_path):
    options = ["SOLVER.BASE_LR", "0.0", "SOLVER.RIS.PATIENCE", "1", "SOLVER.MAX_ITER", "20"]
    output = run_script(tmp_path, "--num-gpus", "2", *options)
    assert "Training ends after 8 iterations" in output
    assert not (tmp_path / "model_final.pth").exists()
