import runpy
import sys
from pathlib import Path

import pytest
import torch

from ris_d2.checkpoint import convert_state_dict, read_weights

TOOL = Path(__file__).parents[2] / "tools" / "convert_checkpoint.py"


def published():
    """The names of a released BEiT-3 file, sizes shrunk."""
    return {
        "beit3.text_embed.weight": torch.rand(10, 4),
        "beit3.vision_embed.mask_token": torch.rand(1, 1, 4),
        "beit3.encoder.embed_positions.A.weight": torch.rand(7, 4),
        "beit3.encoder.layers.0.self_attn.q_proj.A.weight": torch.rand(4, 4),
        "mlm_head.weight": torch.rand(10, 4),
        "mim_head.bias": torch.rand(3),
    }


@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: state,
        lambda state: {"model": state, "epoch": 3},
        lambda state: {"module": state},
        lambda state: {"model": {f"module.{name}": value for name, value in state.items()}},
    ],
)
def test_beit3(wrap):
    state = published()
    converted = convert_state_dict(wrap(state), "beit3")
    assert set(converted) == {
        "text_embed.weight",
        "vision_embed.mask_token",
        "encoder.embed_positions.A.weight",
        "encoder.layers.0.self_attn.q_proj.A.weight",
    }
    assert converted["text_embed.weight"] is state["beit3.text_embed.weight"]


def test_unknown_source_lists_the_known():
    with pytest.raises(ValueError, match="unknown weight source 'beit4'; known: .*beit3"):
        convert_state_dict({}, "beit4")


@pytest.mark.parametrize(
    "content, message",
    [
        ({"backbone.weight": torch.ones(1)}, "not a BEiT-3 checkpoint.*backbone.weight"),
        ({"model": {"beit3.a": "text"}}, "'beit3.a' is no name of a tensor"),
        ({"model": {}}, "holds nothing"),
    ],
)
def test_other_content(content, message):
    with pytest.raises(ValueError, match=message):
        convert_state_dict(content, "beit3")


def run_tool(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", [str(TOOL), *map(str, arguments)])
    runpy.run_path(str(TOOL), run_name="__main__")


def test_tool_writes_the_converted_file(tmp_path, monkeypatch):
    torch.save({"model": published()}, tmp_path / "beit3.zip")
    run_tool(monkeypatch, "--source", "beit3", tmp_path / "beit3.zip", tmp_path / "new" / "out.pth")
    content = read_weights(tmp_path / "new" / "out.pth")
    assert content["converted_from"] == "beit3"
    assert set(content["model"]) == set(convert_state_dict(published(), "beit3"))


def test_tool_leaves_nothing_behind_when_it_fails(tmp_path, monkeypatch):
    torch.save({"other": torch.ones(1)}, tmp_path / "other.pth")
    with pytest.raises(SystemExit, match="not a BEiT-3 checkpoint"):
        run_tool(monkeypatch, "--source", "beit3", tmp_path / "other.pth", tmp_path / "out.pth")
    assert [path.name for path in tmp_path.iterdir()] == ["other.pth"]
