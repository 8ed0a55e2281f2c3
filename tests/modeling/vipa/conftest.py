import pytest

from ris_d2 import get_ris_cfg


@pytest.fixture
def vipa_cfg(device):
    """VIPA on 64 x 96 images: F_4 has 2 x 3 tokens, the mask logits 16 x 24."""
    cfg = get_ris_cfg()
    cfg.merge_from_list(
        [
            *("MODEL.DEVICE", device, "MODEL.META_ARCHITECTURE", "VIPA"),
            *("INPUT.RIS.SIZE", (64, 96), "INPUT.RIS.MAX_TOKENS", 8),
            *("MODEL.RIS.SWIN.EMBED_DIM", 8, "MODEL.RIS.SWIN.DEPTHS", (1, 1, 2, 1)),
            *("MODEL.RIS.SWIN.NUM_HEADS", (1, 2, 2, 4), "MODEL.RIS.SWIN.WINDOW_SIZE", 3),
            *("MODEL.RIS.SWIN.DROP_PATH", 0.0),
            *("MODEL.RIS.TEXT.BERT.EMBED_DIM", 16, "MODEL.RIS.TEXT.BERT.DEPTH", 7),
            *("MODEL.RIS.TEXT.BERT.NUM_HEADS", 2, "MODEL.RIS.TEXT.BERT.VOCAB_SIZE", 50),
            *("MODEL.RIS.TEXT.BERT.DROPOUT", 0.0, "MODEL.RIS.TEXT.BERT.INIT", "scratch"),
            *("MODEL.RIS.BEIT3.EMBED_DIM", 32, "MODEL.RIS.BEIT3.DEPTH", 2),
            *("MODEL.RIS.BEIT3.NUM_HEADS", 2, "MODEL.RIS.BEIT3.VOCAB_SIZE", 50),
            *("MODEL.RIS.BEIT3.DROP_PATH", 0.0),
            *(
                "MODEL.VIPA.DIM",
                16,
                "MODEL.VIPA.NUM_HEADS",
                2,
                "MODEL.VIPA.GENERATOR.JOINT_DIM",
                12,
            ),
        ]
    )
    return cfg
