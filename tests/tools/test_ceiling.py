import json
from pathlib import Path

import numpy as np
import pytest

from ris_d2 import load_config

CONFIGS = Path(__file__).parents[2] / "configs"
# Published settings with an encoder of next to nothing: mapper, sizes of maps, loss and inference are
# those of the leaf.
SMALL_SWIN = ["MODEL.RIS.SWIN.EMBED_DIM", "16", "MODEL.RIS.SWIN.DEPTHS", "[1, 1, 1, 1]"]
SMALL_SWIN += ["MODEL.RIS.SWIN.NUM_HEADS", "[1, 1, 1, 1]"]
SMALL = {
    "shared_ris_beit3_b.yaml": ["MODEL.RIS.BEIT3.EMBED_DIM", "24", "MODEL.SHARED_RIS.DIM", "24"],
    "risam_sam_vit_h.yaml": ["MODEL.RIS.SAM.EMBED_DIM", "16", "MODEL.RIS.SAM.DEPTH", "4"]
    + ["MODEL.RIS.SAM.GLOBAL_BLOCKS", "[0, 1, 2, 3]", "MODEL.RIS.SAM.NUM_HEADS", "1"]
    + ["MODEL.RIS.TEXT.CLIP.DEPTH", "1"],
    "vipa_swin_b.yaml": [*SMALL_SWIN, "MODEL.RIS.TEXT.BERT.EMBED_DIM", "24", "MODEL.VIPA.DIM", "24"]
    + ["MODEL.VIPA.NUM_HEADS", "2"],
}


def ceilings(load_tool, leaf, *options, per_band=24, steps=100):
    tool = load_tool("ceiling")
    cfg = load_config(str(CONFIGS / leaf), list(options))
    return tool.measure(cfg, per_band=per_band, steps=steps)


@pytest.mark.parametrize("leaf", SMALL)
def test_published_targets_do_not_shift_masks(load_tool, leaf):
    report = ceilings(
        load_tool, leaf, *SMALL[leaf], per_band=8 if "risam" not in leaf else 3, steps=80
    )
    # All ellipses together: one alone is up to half a pixel off by the chance of its place.
    shift = np.mean([band["shift"] for band in report.values()], axis=0)
    assert np.abs(shift).max() < 0.25
    assert report["40-90"]["iou"] > 93


@pytest.mark.parametrize("method", ["shared_ris", "risam", "vipa"])
def test_small_leaves_do_not_shift_masks(load_tool, method):
    report = ceilings(load_tool, f"refshapes/{method}_tiny.yaml")
    assert all(abs(shift) < 0.25 for band in report.values() for shift in band["shift"])


def test_nearest_targets_shift_masks_down_and_right_and_cost_iou(load_tool):
    leaf = "refshapes/shared_ris_tiny.yaml"
    aligned = ceilings(load_tool, leaf)
    keys = ["MODEL.RIS.TARGET_RESIZING", "nearest", "INPUT.RIS.MASK_SAMPLE", "corner"]
    nearest = ceilings(load_tool, leaf, *keys)
    assert (
        min(nearest["90-250"]["shift"]) > 0.8
    )  # half a cell of the map, half a pixel of the input
    for band in aligned:
        assert aligned[band]["iou"] > nearest[band]["iou"] + 1


def test_table_and_json(load_tool, capsys):
    tool = load_tool("ceiling")
    few = ["--ellipses", "1", "--steps", "40"]
    leaves = [str(CONFIGS / "refshapes" / f"{name}_tiny.yaml") for name in ("asda", "deris")]
    tool.main(["--config-file", leaves[0], "--config-file", leaves[1], "--json", *few])
    report = json.loads(capsys.readouterr().out)
    assert list(report) == leaves and report[leaves[1]]["20-40"]["iou"] >= 0
    tool.main(["--config-file", leaves[0], *few])
    assert "90 to 250 px" in capsys.readouterr().out
