import json
from pathlib import Path

import pytest
import torch
from detectron2.modeling import META_ARCH_REGISTRY

from ris_d2 import load_config

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


def test_published_deris_less_what_no_loss_ever_reached(load_tool):
    """291,462,038 parameters of the released DeRIS-B, 242,623,436 of them trained, less what its forward
    pass never reads or no loss reaches (mask token, logit_embed, cls_embed, box_embed, SEG_proj, four
    mapmlp, nt_embed and query_embed of its perception branch)."""
    dead = 768 + 514 + 514 + 132_612 + 131_584 + 4 * 2_560 + 257 + 2_560
    analyze = load_tool("analyze")
    cfg = load_config(str(CONFIGS / "deris_swin_s.yaml"))
    with torch.device("meta"):
        model = META_ARCH_REGISTRY.get("DeRIS")(cfg)
    sizes = {name: (p.numel(), p.requires_grad) for name, p in model.named_parameters()}
    assert sum(size for size, _ in sizes.values()) == 291_462_038 - dead
    assert sum(size for size, trained in sizes.values() if trained) == 242_623_436 - dead


def test_parts_of_parts(load_tool, capsys):
    """Perception and cognition run by their methods, in pieces; each piece is counted where it is."""
    leaf = str(CONFIGS / "instant_test" / "deris.yaml")
    reports = []
    for depth in ("1", "2"):
        load_tool("analyze").main(["--config-file", leaf, "--depth", depth, "--json"])
        reports.append(json.loads(capsys.readouterr().out))
    whole, parts = reports
    for name in ("perception", "cognition"):
        inside = [part for path, part in parts["parts"].items() if path.startswith(f"{name}.")]
        for key in ("parameters", "macs"):
            assert sum(part[key] for part in inside) == whole["parts"][name][key]
    assert parts["parts"]["cognition.layers"]["macs"] > 0
    assert parts["parts"]["perception.backbone"]["macs"] > 0
    attributed = sum(part["macs"] for part in parts["parts"].values())
    assert 0.9 * whole["macs"] < attributed <= whole["macs"]
