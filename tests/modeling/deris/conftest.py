import pytest

from ris_d2 import get_ris_cfg


@pytest.fixture
def deris_cfg(device):
    """A small DeRIS of 64 x 96 images with five queries; the view is 32 x 48, masks are 16 x 24."""
    cfg = get_ris_cfg()
    cfg.merge_from_list(
        [
            *("MODEL.DEVICE", device, "MODEL.META_ARCHITECTURE", "DeRIS"),
            *("MODEL.PIXEL_MEAN", [127.5] * 3, "MODEL.PIXEL_STD", [127.5] * 3),
            *("INPUT.RIS.SIZE", (64, 96), "INPUT.RIS.VIEWS", [["cognition", 32, 48]]),
            *("MODEL.RIS.BEIT3.PATCH_SIZE", 16, "MODEL.RIS.BEIT3.EMBED_DIM", 32),
            *("MODEL.RIS.BEIT3.DEPTH", 2, "MODEL.RIS.BEIT3.NUM_HEADS", 2),
            *("MODEL.RIS.BEIT3.VOCAB_SIZE", 50, "MODEL.RIS.BEIT3.INIT", "scratch"),
            *("MODEL.RIS.BEIT3.DROP_PATH", 0.0, "MODEL.RIS.SWIN.DROP_PATH", 0.0),
            *("MODEL.RIS.SWIN.EMBED_DIM", 8, "MODEL.RIS.SWIN.DEPTHS", (1, 1, 1, 1)),
            *("MODEL.RIS.SWIN.NUM_HEADS", (1, 1, 2, 2), "MODEL.RIS.SWIN.WINDOW_SIZE", 4),
            *("MODEL.DERIS.DIM", 32, "MODEL.DERIS.NUM_HEADS", 2, "MODEL.DERIS.FFN_DIM", 64),
            *("MODEL.DERIS.NUM_QUERIES", 5, "MODEL.DERIS.NUM_POINTS", 256),
            *("MODEL.DERIS.EXISTENCE_LAYERS", 1, "MODEL.DERIS.EXISTENCE_DROPOUT", 0.0),
        ]
    )
    return cfg


@pytest.fixture
def make_deris_inputs(make_inputs):
    """As ``make_inputs``, of 64 x 96 images with the cognition view."""

    def make(num_expressions=3, seed=0, **arguments):
        inputs = make_inputs(num_expressions, size=(64, 96), seed=seed, **arguments)
        inputs["views"] = {"cognition": inputs["image"][:, ::2, ::2]}
        return inputs

    return make
