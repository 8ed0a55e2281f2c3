"""Configuration keys of the text encoders: default, meaning, the paper's symbol if any."""

from detectron2.config import CfgNode as CN


def add_text_config(cfg: CN) -> None:
    """Add MODEL.RIS.TEXT to ``cfg``, in place."""
    cfg.MODEL.RIS.TEXT = CN()
    # Text encoder of methods that choose one: RISCLIPText | RISBert | RISCausalLM
    cfg.MODEL.RIS.TEXT.NAME = "RISCLIPText"

    # RISCLIPText; defaults are the text transformer of CLIP ViT-B/16 (ViT-L/14: 768, 12, 12).
    cfg.MODEL.RIS.TEXT.CLIP = CN()
    cfg.MODEL.RIS.TEXT.CLIP.DIM = 512
    cfg.MODEL.RIS.TEXT.CLIP.DEPTH = 12
    cfg.MODEL.RIS.TEXT.CLIP.NUM_HEADS = 8
    cfg.MODEL.RIS.TEXT.CLIP.VOCAB_SIZE = 49408
    # Random weights: released (replaced by pretrained weights) | scratch (Xavier, wider
    # words; ours).
    cfg.MODEL.RIS.TEXT.CLIP.INIT = "released"

    # RISBert text encoder; defaults are bert-base-uncased.
    cfg.MODEL.RIS.TEXT.BERT = CN()
    cfg.MODEL.RIS.TEXT.BERT.EMBED_DIM = 768  # D
    cfg.MODEL.RIS.TEXT.BERT.DEPTH = 12
    cfg.MODEL.RIS.TEXT.BERT.NUM_HEADS = 12
    cfg.MODEL.RIS.TEXT.BERT.VOCAB_SIZE = 30522
    cfg.MODEL.RIS.TEXT.BERT.DROPOUT = 0.1
    # Random weights: released (normal 0.02, replaced by pretrained weights) | scratch (Xavier;
    # ours).
    cfg.MODEL.RIS.TEXT.BERT.INIT = "released"

    # Any causal language model of transformers: folder or name on the hub; PRETRAINED
    # False reads its config.json only. Its tokenizer: INPUT.RIS.TOKENIZER KIND hf.
    cfg.MODEL.RIS.TEXT.CAUSAL_LM = CN()
    cfg.MODEL.RIS.TEXT.CAUSAL_LM.PATH = ""
    cfg.MODEL.RIS.TEXT.CAUSAL_LM.PRETRAINED = True
