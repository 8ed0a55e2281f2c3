"""Configuration keys of Shared-RIS: default, meaning, and the paper's symbol where there is one."""

from detectron2.config import CfgNode as CN


def add_shared_ris_config(cfg: CN) -> None:
    """Add MODEL.SHARED_RIS to ``cfg``, in place."""
    # Shared-RIS (papers' Tables III, IV, VII, VIII are its ablations).
    cfg.MODEL.SHARED_RIS = CN()
    cfg.MODEL.SHARED_RIS.DIM = 512  # d_w
    cfg.MODEL.SHARED_RIS.NUM_HEADS = 8
    # shared: the paper's; cris, pwam: those of CRIS and of LAVT in its place (Table IV).
    cfg.MODEL.SHARED_RIS.FPN = "shared"
    # FPN: encoder layers j that it taps (1-based; Table VII a). [] = no FPN: z = W h_L.
    cfg.MODEL.SHARED_RIS.STAGES = (3, 6, 9, 12)
    # W_j of Eq. 6 for visual and textual tokens apart: only this reading gives the paper's
    # parameter counts. False = one W_j, Eq. 6 to the letter.
    cfg.MODEL.SHARED_RIS.PROJ_PER_MODALITY = True
    cfg.MODEL.SHARED_RIS.FPN_FUSION = "self"  # self | cross | bi (Table VII b)
    cfg.MODEL.SHARED_RIS.DECODER_LAYERS = 1  # Table VIII a; 0 = decoder off (Table III)
    cfg.MODEL.SHARED_RIS.DECODER_FUSION = "self"  # self | cross | bi (Table VIII b)
    cfg.MODEL.SHARED_RIS.NORM = "BN"  # of the mask head: BN | SyncBN | nnSyncBN | GN | ...
    cfg.MODEL.SHARED_RIS.BCE_WEIGHT = 2.0
    cfg.MODEL.SHARED_RIS.DICE_WEIGHT = 0.5
