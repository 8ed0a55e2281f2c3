"""tools/gpu_page.py: what `make gpu` does, tried on the CPU."""

import math
import os
import time
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]


@pytest.fixture
def gpu_page(load_tool, monkeypatch):
    """The program; its parts run in this process."""
    module = load_tool("gpu_page")

    def run(function, *arguments, limit):
        try:
            return function(*arguments), ""
        except torch.OutOfMemoryError as error:
            return None, f"OutOfMemoryError: {error}"

    monkeypatch.setattr(module, "in_a_process", run)
    threads = torch.get_num_threads()
    yield module
    torch.set_num_threads(threads)
    torch.backends.cudnn.allow_tf32 = True  # PyTorch's default


def test_a_page_of_one_method(gpu_page, tiny_config, tmp_path):
    page = tmp_path / "gpu.md"
    words = ["--device", "cpu", "--config-file", tiny_config, "--output", str(page)]
    words += ["--modes", "eager", "--seconds", "0.01", "--parts"]
    gpu_page.main([*words, "speed"])
    gpu_page.main([*words, "agreement", "--add"])
    rows = [line.split(" | ") for line in page.read_text().splitlines() if line.startswith("| ")]
    names = [row[0] for row in rows]
    assert names == [
        "| model",
        "| ---",
        "| tiny fp32",
        "| tiny bf16",
        "| model",
        "| ---",
        "| tiny fp32",
    ]
    for row in rows[2:4]:
        cells = [float(cell.strip(" |")) for cell in row[1:]]
        assert len(cells) == 7 and min(cells[:6]) > 0
    logits, gradients = rows[-1][1:]
    assert logits.startswith("0.0e+00 of ") and float(gradients.split(" of ")[0]) < 1e-5
    assert logits.endswith(" (mean 0.0e+00)")
    assert "Failed" not in page.read_text()


def test_what_fails_is_named_and_the_rest_is_measured(gpu_page, tiny_config, tmp_path, monkeypatch):
    def out_of_memory(*arguments):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setitem(gpu_page.benchmark.PARTS, "train", out_of_memory)
    monkeypatch.setattr(gpu_page, "difference_of_logits", lambda *_: (0.5, 1.0, 0.001))
    measure_models = gpu_page.benchmark.measure_models

    def not_both(columns, args):
        return out_of_memory() if len(columns) > 1 else measure_models(columns, args)

    monkeypatch.setattr(gpu_page.benchmark, "measure_models", not_both)
    test = tmp_path / "test_wrong.py"
    test.write_text("def test_right(): pass\ndef test_wrong(): assert 1 == 2\n")
    page = tmp_path / "gpu.md"
    words = ["--device", "cpu", "--config-file", tiny_config, "--output", str(page)]
    words += ["--modes", "eager", "--seconds", "0.01", "--tests", str(test)]
    words.append("tests/modeling/test_losses.py")  # whose conftest.py knows --device
    with pytest.raises(SystemExit) as stopped:
        gpu_page.main(words)
    assert stopped.value.code == 1
    text = page.read_text()
    assert "- tiny fp32: train: OutOfMemoryError: CUDA out of memory" in text
    assert "- tiny fp32: logits: differ by 5.0e-01 of 1 (mean 1.0e-03)" in text
    assert "tests/modeling/test_losses.py`: 1 failed, 4 passed, " in text
    assert ": FAILED " in text and "::test_wrong - assert 1 == 2" in text
    rows = [line.split(" | ") for line in text.splitlines() if line.startswith("| tiny ")]
    # Latencies of each column alone, and memory; no training.
    assert [[bool(cell.strip(" |")) for cell in row[1:]] for row in rows[:2]] == [
        [True] * 5 + [False] * 2
    ] * 2

    # What is measured again and is right is no longer named.
    monkeypatch.setattr(gpu_page, "difference_of_logits", lambda *_: (0.0, 1.0, 0.0))
    with pytest.raises(SystemExit):
        gpu_page.main([*words, "--add", "--parts", "agreement"])
    again = page.read_text()
    assert "logits: differ" not in again and "CUDA out of memory" in again and "FAILED" in again


def test_a_part_that_breaks_or_hangs_is_told_in_words():
    from _process import in_a_process

    assert in_a_process(math.sqrt, 4, limit=60) == (2, "")
    assert in_a_process(math.sqrt, -4, limit=60)[1].startswith("ValueError: ")
    assert in_a_process(os._exit, 3, limit=60) == (None, "the process ended with status 3")
    assert in_a_process(time.sleep, 60, limit=0.3) == (None, "not done after 0.005 minutes")


def test_no_gpu_is_one_line(gpu_page, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    page = tmp_path / "gpu.md"
    with pytest.raises(ValueError, match="no CUDA GPU here.*--device cpu"):
        gpu_page.main(["--output", str(page)])
    assert not page.exists()


def test_the_recipes_are_one_of_each_method(gpu_page):
    args = gpu_page.parse([])
    assert all(Path(path).is_file() for path in args.config_file) and len(args.config_file) == 5
    assert "gpu_page.py" in (ROOT / "Makefile").read_text()
