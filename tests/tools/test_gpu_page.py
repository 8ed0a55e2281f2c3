"""tools/gpu_page.py: what `make gpu` does, tried on the CPU."""

from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]


@pytest.fixture
def gpu_page(load_tool, monkeypatch):
    """The program; its parts run in this process."""
    module = load_tool("gpu_page")
    run = lambda function, *arguments: function(*arguments)
    monkeypatch.setattr(module.benchmark, "in_a_process", run)
    threads = torch.get_num_threads()
    yield module
    torch.set_num_threads(threads)
    torch.backends.cudnn.allow_tf32 = True  # PyTorch's default


def test_a_page_of_one_method(gpu_page, tiny_config, tmp_path):
    page = tmp_path / "gpu.md"
    words = ["--device", "cpu", "--config-file", tiny_config, "--output", str(page), "--tests"]
    gpu_page.main([*words, "--modes", "eager", "--seconds", "0.01"])
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
    assert "Failed" not in page.read_text()


def test_what_fails_is_named_and_the_rest_is_measured(gpu_page, tiny_config, tmp_path, monkeypatch):
    def out_of_memory(*arguments):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setitem(gpu_page.benchmark.PARTS, "train", out_of_memory)
    monkeypatch.setattr(gpu_page, "difference_of_logits", lambda *_: (0.5, 1.0))
    page = tmp_path / "gpu.md"
    words = ["--device", "cpu", "--config-file", tiny_config, "--output", str(page)]
    words += ["--modes", "eager", "--seconds", "0.01", "--tests", "no_such_test.py"]
    with pytest.raises(SystemExit) as stopped:
        gpu_page.main(words)
    assert stopped.value.code == 1
    text = page.read_text()
    assert "- tiny fp32: train: OutOfMemoryError: CUDA out of memory" in text
    assert "- tiny fp32: logits differ by 5.0e-01 of 1" in text
    assert "- suite: ValueError" in text and "Suite: failed." in text
    assert "| tiny fp32 | " in text and "| tiny bf16 | " in text


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
