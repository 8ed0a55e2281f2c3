"""Configuration keys of RISAM: default, meaning, and the paper's symbol where there is one."""

from detectron2.config import CfgNode as CN


def add_risam_config(cfg: CN) -> None:
    """Add MODEL.RISAM to ``cfg``, in place."""
    # RISAM (papers' Tables 2 to 7, 9, 11 and Fig. 8 are its ablations). The backbone is
    # MODEL.BACKBONE.NAME: RISSAMViT | RISViT | RISSwin. "Ours" marks what the paper leaves open.
    cfg.MODEL.RISAM = CN()
    cfg.MODEL.RISAM.DIM = 256  # C; the paper's 6M trainable parameters leave no other power of two
    cfg.MODEL.RISAM.IN_FEATURES = ("global2", "global3", "global4")  # F_v1, F_v2, F_v3
    # Pixels per cell of the grid H x W of the head; features of other strides are resized to it.
    cfg.MODEL.RISAM.STRIDE = 16
    cfg.MODEL.RISAM.NORM = "BN"  # BN | SyncBN (over all processes, on the CPU, too) | GN | ...
    # What Fig. 3's caption calls "Pos. Enc." of the words: sine | learned | none (ours: sine).
    cfg.MODEL.RISAM.LANG_POS_ENC = "sine"
    # Feature Enhancement. TYPE: fusion | linear (last feature, projected; Table 2 #1) | identity
    # (last feature as it is; Table 11) | vitdet (pyramid of the last feature; Table 6).
    cfg.MODEL.RISAM.FE = CN()
    cfg.MODEL.RISAM.FE.TYPE = "fusion"
    # ma (Mutual-Aware Attention) | conv (Table 2 #2) | te, sdf, bcm (Table 3) | none (Table 11)
    cfg.MODEL.RISAM.FUSION = "ma"
    cfg.MODEL.RISAM.MA = CN()
    cfg.MODEL.RISAM.MA.NUM_BLOCKS = 2  # Table 4; also the blocks of sdf, bcm and te
    cfg.MODEL.RISAM.MA.USE_MASK = True  # the mask M of Eq. 4; False: Table 3 #8
    # Region and word with sigmoid(S) below tau are masked (Fig. 8). Not MODEL.RIS.MASK_THRESHOLD,
    # which is 0.35, too, in the published recipe.
    cfg.MODEL.RISAM.MA.TAU = 0.35
    # Rows of A^T in Eq. 5: none (as printed; sums of about 241 that drown the words) | sum (divided
    # by their sum; ours) | softmax (of S^T over regions).
    cfg.MODEL.RISAM.MA.LGA_NORM = "sum"
    # Mask decoder. TYPE: mutual | sam (SAM's own; Table 2 #3).
    cfg.MODEL.RISAM.DEC = CN()
    cfg.MODEL.RISAM.DEC.TYPE = "mutual"
    cfg.MODEL.RISAM.DEC.NUM_BLOCKS = 2  # ours: with it the head has 6M parameters
    # ours; of all attention in the head but Eq. 3's, which has one
    cfg.MODEL.RISAM.DEC.NUM_HEADS = 8
    cfg.MODEL.RISAM.DEC.NORM = "none"  # after residual sums: none (Eq. 6, 8, 9) | LN
    # hidden width of an MLP per block and stream; 0: none (Eq. 6-9)
    cfg.MODEL.RISAM.DEC.FFN_DIM = 0
    cfg.MODEL.RISAM.DEC.TOI_A = False  # tokens attend the pixels, too (Table 5 #9)
    cfg.MODEL.RISAM.DEC.ELG = True  # words enter the decoder; False: the query token alone (#10)
    cfg.MODEL.RISAM.DEC.UP_DIMS = (128, 64)  # channels after each upsampling x2 (ours)
    cfg.MODEL.RISAM.FOCAL_WEIGHT = 0.5  # omega_f
    cfg.MODEL.RISAM.FOCAL_GAMMA = 2.0  # gamma
    cfg.MODEL.RISAM.DICE_WEIGHT = 0.5  # omega_d
    # Added to both sides of Eq. 11's fraction, which is printed without (ours). Far below
    # a pixel, so that the loss of an empty target is constant; 1 lets it teach, too.
    cfg.MODEL.RISAM.DICE_SMOOTH = 1e-6
