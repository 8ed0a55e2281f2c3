import pytest

from ris_d2 import get_ris_cfg


@pytest.fixture
def tiny_cfg(device):
    """ASDA on a grid of 4 x 6 patches; masks of 32 x 48."""
    cfg = get_ris_cfg()
    cfg.merge_from_list(
        [
            *("MODEL.DEVICE", device, "MODEL.META_ARCHITECTURE", "ASDA"),
            *("MODEL.BACKBONE.NAME", "RISCLIPViT", "INPUT.RIS.SIZE", (32, 48)),
            *("MODEL.PIXEL_MEAN", [127.5] * 3, "MODEL.PIXEL_STD", [127.5] * 3),
            *("INPUT.RIS.MAX_TOKENS", 8, "MODEL.RIS.CLIP_VIT.PATCH_SIZE", 8),
            *("MODEL.RIS.CLIP_VIT.DIM", 32, "MODEL.RIS.CLIP_VIT.NUM_HEADS", 2),
            *("MODEL.RIS.CLIP_VIT.DEPTH", 5, "MODEL.RIS.TEXT.CLIP.DEPTH", 5),
            *("MODEL.RIS.TEXT.CLIP.DIM", 16, "MODEL.RIS.TEXT.CLIP.NUM_HEADS", 2),
            *("MODEL.RIS.TEXT.CLIP.VOCAB_SIZE", 50),
            *("MODEL.ASDA.DIM", 24, "MODEL.ASDA.NUM_HEADS", 2, "MODEL.ASDA.NUM_MASKS", 3),
            *("MODEL.ASDA.SELECTION.LOW_LAYERS", (1, 2), "MODEL.ASDA.SELECTION.MID_LAYERS", (3, 4)),
        ]
    )
    return cfg
