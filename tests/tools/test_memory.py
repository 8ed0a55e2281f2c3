import json
from pathlib import Path

import memory
import pytest
import torch
from _sample import model_input
from detectron2.modeling import build_model
from torch.profiler import ProfilerActivity, profile

from ris_d2 import load_config

CONFIGS = Path(__file__).parents[2] / "configs"


def measured(cfg, batch):
    """GiB above weights and optimizer that torch's allocator hands out in a real training step."""
    model = build_model(cfg).train()
    inputs = [model_input(cfg, 1, training=True) for _ in range(batch)]
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], fused=True)
    sum(model(inputs).values()).backward()
    optimizer.step()  # makes its state
    optimizer.zero_grad()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        sum(model(inputs).values()).backward()
        optimizer.step()
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak / 2**30


@pytest.mark.parametrize("method", ["deris", "shared_ris", "vipa"])
@pytest.mark.parametrize("parts", [(), ("all",)])
def test_simulation_is_what_torch_allocates(method, parts):
    options = ["MODEL.DEVICE", "cpu", "MODEL.RIS.CHECKPOINT_ACTIVATIONS", str(parts)]
    options += ["INPUT.RIS.UNIT", "referent"]
    cfg = load_config(str(CONFIGS / "instant_test" / f"{method}.yaml"), options)
    peak, fixed = memory.step_memory(cfg, 2)
    assert peak - fixed == pytest.approx(measured(cfg, 2), rel=0.1)


def test_largest_batch_is_interpolated_and_continued():
    points = [(1, 5.0), (8, 12.0), (32, 60.0)]  # GiB
    room = [gib / (1 - memory.FREE_SHARE) for gib in (4.9, 5.1, 9.5, 20.1, 80.1)]
    assert [memory.largest_batch(points, gib) for gib in room] == [0, 1, 5, 12, 42]


def test_program_prints_a_row_with_and_one_without_checkpointing(capsys):
    leaf = str(CONFIGS / "instant_test" / "shared_ris.yaml")
    memory.main(["--config-file", leaf, "--precisions", "bf16", "--batches", "1", "2", "--json"])
    rows = json.loads(capsys.readouterr().out)
    assert [(row["precision"], row["checkpointed"]) for row in rows] == [
        ("bf16", False),
        ("bf16", True),
    ]
    assert rows[1]["batch_2"] < rows[0]["batch_2"] and rows[1]["largest_in_24"] > 1000
