"""Configuration keys of the backbones: default, meaning, the paper's symbol if there is one."""

from detectron2.config import CfgNode as CN


def add_backbone_config(cfg: CN) -> None:
    """Add BEIT3, SWIN, CLIP_VIT, SAM and VIT to MODEL.RIS of ``cfg``, in place."""
    # RISBEiT3 backbone; defaults are BEiT-3 base (large: 1024, 24, 16).
    cfg.MODEL.RIS.BEIT3 = CN()
    cfg.MODEL.RIS.BEIT3.EMBED_DIM = 768  # d
    cfg.MODEL.RIS.BEIT3.DEPTH = 12  # L
    cfg.MODEL.RIS.BEIT3.NUM_HEADS = 12
    cfg.MODEL.RIS.BEIT3.PATCH_SIZE = 16  # p
    # patch: the published linear patch embedding; conv: stride-2 3x3 convolutions (ours, for
    # training from scratch on small data).
    cfg.MODEL.RIS.BEIT3.STEM = "patch"
    # Random weights: released (trunc_normal 0.02, replaced by pretrained weights) | scratch
    # (Xavier; ours).
    cfg.MODEL.RIS.BEIT3.INIT = "released"
    cfg.MODEL.RIS.BEIT3.VOCAB_SIZE = 64010
    cfg.MODEL.RIS.BEIT3.DROP_PATH = 0.1

    # RISSwin backbone; defaults are Swin-B of 384 x 384 (Swin-S: 96, depths as they are, heads
    # (3, 6, 12, 24), window 7; Swin-T: the same with depths (2, 2, 6, 2); Swin-L: 192, heads
    # (6, 12, 24, 48)).
    cfg.MODEL.RIS.SWIN = CN()
    cfg.MODEL.RIS.SWIN.EMBED_DIM = 128  # C
    cfg.MODEL.RIS.SWIN.DEPTHS = (2, 2, 18, 2)
    cfg.MODEL.RIS.SWIN.NUM_HEADS = (4, 8, 16, 32)
    cfg.MODEL.RIS.SWIN.WINDOW_SIZE = 12  # M
    # Of the last block, linear from 0. A Swin that is frozen in mode "train" keeps it on, as the
    # released DeRIS does (MODEL.RIS.FREEZE).
    cfg.MODEL.RIS.SWIN.DROP_PATH = 0.3

    _add_plain_transformers(cfg)


def _add_plain_transformers(cfg: CN) -> None:
    # RISCLIPViT; defaults are ViT-B/16.
    cfg.MODEL.RIS.CLIP_VIT = CN()
    cfg.MODEL.RIS.CLIP_VIT.PATCH_SIZE = 16  # P
    cfg.MODEL.RIS.CLIP_VIT.DIM = 768
    cfg.MODEL.RIS.CLIP_VIT.DEPTH = 12  # N
    cfg.MODEL.RIS.CLIP_VIT.NUM_HEADS = 12
    # patch: CLIP's linear patch embedding; conv: stride-2 3x3 convolutions (ours, for training from
    # scratch on small data).
    cfg.MODEL.RIS.CLIP_VIT.STEM = "patch"

    # RISSAMViT backbone; defaults are SAM ViT-H (L: 1024, 24, 16, blocks 5 11 17 23; B:
    # 768, 12, 12, blocks 2 5 8 11).
    cfg.MODEL.RIS.SAM = CN()
    cfg.MODEL.RIS.SAM.EMBED_DIM = 1280
    cfg.MODEL.RIS.SAM.DEPTH = 32
    cfg.MODEL.RIS.SAM.NUM_HEADS = 16
    cfg.MODEL.RIS.SAM.PATCH_SIZE = 16
    cfg.MODEL.RIS.SAM.WINDOW_SIZE = 14
    # Blocks (0-based) with global attention; their outputs are the features global1, global2, ...
    cfg.MODEL.RIS.SAM.GLOBAL_BLOCKS = (7, 15, 23, 31)
    # patch: SAM's linear patch embedding; conv: stride-2 3x3 convolutions (ours, for training from
    # scratch on small data).
    cfg.MODEL.RIS.SAM.STEM = "patch"
    cfg.MODEL.RIS.SAM.NECK = False  # one more feature, neck: what SAM's own mask decoder reads

    # RISViT backbone: a ViT of timm, and the blocks (0-based) whose outputs are the
    # features block<i>.
    cfg.MODEL.RIS.VIT = CN()
    cfg.MODEL.RIS.VIT.NAME = "vit_base_patch16_224"
    cfg.MODEL.RIS.VIT.OUT_BLOCKS = (5, 8, 11)
