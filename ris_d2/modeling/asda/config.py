"""Configuration keys of ASDA: default, meaning, and the paper's symbol where there is one."""

from detectron2.config import CfgNode as CN


def add_asda_config(cfg: CN) -> None:
    """Add MODEL.ASDA to ``cfg``, in place."""
    # ASDA. Its backbone is MODEL.BACKBONE.NAME RISCLIPViT, its text encoder RISCLIPText.
    cfg.MODEL.ASDA = CN()
    cfg.MODEL.ASDA.DIM = 512  # C of F_coarse and all behind it
    cfg.MODEL.ASDA.NUM_HEADS = 8
    cfg.MODEL.ASDA.DROPOUT = 0.1  # of both attentions and their feed-forward layers
    cfg.MODEL.ASDA.NORM = "BN"  # BN | SyncBN | nnSyncBN | GN | ...
    # Weight of the last batch in running statistics. Released: 0.999, the last batch almost alone.
    cfg.MODEL.ASDA.NORM_MOMENTUM = 0.999
    # Adaptive Feature Selection. Candidate layers (1-based) of F_L and F_M; one layer is a manual
    # choice (Table 2 b: 6 and 9).
    cfg.MODEL.ASDA.SELECTION = CN()
    cfg.MODEL.ASDA.SELECTION.LOW_LAYERS = (4, 5, 6)
    cfg.MODEL.ASDA.SELECTION.MID_LAYERS = (7, 8, 9)
    # hard: argmax, as released; no gradient reaches the selector, which stays as it was initialised
    # and is frozen. straight_through: hard forward, the softmax's gradient backward. soft: mixture.
    cfg.MODEL.ASDA.SELECTION.MODE = "hard"
    # Phi_as (Table 5): linear (one Linear(D,1) for all candidates, released), concat (Linear(3D,3)
    # on the concatenation, Eq. 2 to the letter), conv, mlp. To compare them, train them: MODE
    # straight_through.
    cfg.MODEL.ASDA.SELECTION.NETWORK = "linear"
    # layer: [CLS] of layer l meets the sentence in layer l of the text encoder (released); final:
    # it meets f_E (Eq. 1).
    cfg.MODEL.ASDA.SELECTION.TEXT = "layer"
    # Scale-wise Feature Aggregator: released (levels enlarged, top down) | paper (levels
    # shrunk, bottom up, Eq. 5) | concat (one scale, after CRIS, Table 2 b, c) | none (F_G
    # alone, Table 2 a).
    cfg.MODEL.ASDA.AGGREGATOR = "released"
    # Words: dual (they weight the response masks, Fig. 3) | single (the pixels read them, then one
    # mask; Table 2 e) | none (no attention at all; Table 2 a to d).
    cfg.MODEL.ASDA.ALIGNER = "dual"
    cfg.MODEL.ASDA.ATTENTION_LAYERS = 2  # n of Local Visual Attention (Table 3)
    cfg.MODEL.ASDA.PRE_NORM = False  # LayerNorm after the sums (released) or before (Eq. 6, 8)
    # released (2 + 3 convolutions, the last one 3x3) | paper (3 convolutions, the last one 1x1).
    cfg.MODEL.ASDA.DECODER = "released"
    cfg.MODEL.ASDA.NUM_MASKS = 32  # N_c (Table 4)
    cfg.MODEL.ASDA.RESPONSES = "relu"  # of response masks M': relu (released) | sigmoid (Eq. 7)
    cfg.MODEL.ASDA.COEFFICIENT_KERNEL = 3  # third convolution of Phi_coef: 3 released, 1 paper
    cfg.MODEL.ASDA.DICE_WEIGHT = 1.0
    cfg.MODEL.ASDA.FOCAL_WEIGHT = 1.0
    # The released "focal" loss is plain cross-entropy: alpha -1 (no weights), gamma 0. RetinaNet's,
    # which the paper cites: 0.25 and 2.
    cfg.MODEL.ASDA.FOCAL_ALPHA = -1.0
    cfg.MODEL.ASDA.FOCAL_GAMMA = 0.0
