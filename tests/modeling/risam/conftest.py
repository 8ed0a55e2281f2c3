import pytest

from ris_d2 import get_ris_cfg


@pytest.fixture
def risam_cfg(device):
    """RISAM on a grid of 4 x 4 cells; the mask decoder upsamples to 16 x 16."""
    cfg = get_ris_cfg()
    cfg.merge_from_list(
        [
            *("MODEL.DEVICE", device, "MODEL.META_ARCHITECTURE", "RISAM"),
            *("MODEL.PIXEL_MEAN", [123.675, 116.28, 103.53]),
            *("MODEL.PIXEL_STD", [58.395, 57.12, 57.375]),
            *("MODEL.BACKBONE.NAME", "RISSAMViT", "INPUT.RIS.SIZE", (32, 32)),
            *("INPUT.RIS.MAX_TOKENS", 8),
        ]
    )
    cfg.MODEL.RIS.SAM.merge_from_list(
        [
            *("EMBED_DIM", 16, "DEPTH", 4, "NUM_HEADS", 2, "PATCH_SIZE", 8),
            *("WINDOW_SIZE", 2, "GLOBAL_BLOCKS", (0, 1, 2, 3)),
        ]
    )
    cfg.MODEL.RIS.TEXT.CLIP.merge_from_list(
        ["DIM", 24, "DEPTH", 2, "NUM_HEADS", 2, "VOCAB_SIZE", 50]
    )
    cfg.MODEL.RISAM.merge_from_list(
        ["DIM", 16, "STRIDE", 8, "DEC.NUM_HEADS", 2, "DEC.UP_DIMS", (8, 4)]
    )
    return cfg


@pytest.fixture
def make_square(make_inputs):
    """Model inputs of one 32 x 32 image."""
    return lambda *args, **kwargs: make_inputs(*args, **{"size": (32, 32), **kwargs})
