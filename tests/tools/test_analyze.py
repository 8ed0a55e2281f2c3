import json
from pathlib import Path

import pytest

CONFIGS = Path(__file__).parents[2] / "configs"


def test_counts_of_the_published_shared_ris(load_tool, capsys):
    """Multiply-adds measured with fvcore on the same architecture: specification of the paper's tables
    (encoder 94.69 G, FPN 9.76 G, decoder 50.08 G, whole 154.5 G; 238.6 M parameters)."""
    load_tool("analyze").main(
        ["--config-file", str(CONFIGS / "shared_ris_beit3_b.yaml"), "--json", "MODEL.INIT", "[]"]
    )
    report = json.loads(capsys.readouterr().out)
    macs = {name: part["macs"] / 1e9 for name, part in report["parts"].items()}
    assert macs == pytest.approx({"encoder": 94.69, "fpn": 9.76, "decoder": 50.08}, abs=0.005)
    assert report["macs"] / 1e9 == pytest.approx(154.5, abs=0.05)
    assert report["macs"] == report["macs_per_image"] + report["macs_per_expression"]
    # The image side is the patch embedding: 30 x 30 patches of 16 x 16 x 3 to 768 channels.
    assert report["macs_per_image"] == 900 * 768 * 768
    assert report["parameters"]["total"] == sum(p["parameters"] for p in report["parts"].values())


def test_frozen_parts_are_not_trainable(load_tool, tiny_config, tmp_path, capsys):
    leaf = tmp_path / "frozen.yaml"
    leaf.write_text(f"_BASE_: {tiny_config}\nMODEL: {{RIS: {{FREEZE: {{encoder: eval}}}}}}\n")
    load_tool("analyze").main(["--config-file", str(leaf), "--json"])
    report = json.loads(capsys.readouterr().out)
    assert (
        report["parameters"]["trainable"]
        == report["parameters"]["total"] - report["parts"]["encoder"]["parameters"]
    )


def test_table_for_a_person(load_tool, tiny_config, capsys):
    load_tool("analyze").main(["--config-file", tiny_config])
    out = capsys.readouterr().out
    assert "encoder" in out and "existence_head" in out and "per expression" in out
