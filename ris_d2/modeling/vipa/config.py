"""Configuration keys of VIPA: default, meaning, and the paper's symbol where there is one."""

from detectron2.config import CfgNode as CN


def add_vipa_config(cfg: CN) -> None:
    """Add MODEL.VIPA to ``cfg``, in place."""
    cfg.MODEL.VIPA = CN()
    # early: vision and language read each other at every stage (CrossVLT); one_way: vision alone
    # reads, the language encoder runs first (Table V, Vanilla LE); late: one exchange at the end;
    # none (Table VII); beit3 (Table II).
    cfg.MODEL.VIPA.ENCODER = "early"
    # Early fusion: True gives all of BERT's layers their pretrained weights, where shapes fit;
    # False leaves the last six random, as CrossVLT's released code does.
    cfg.MODEL.VIPA.INIT_STAGES_FROM_BERT = True
    # Keys and values of the decoder (Table V): visual (the visual expression) | language.
    cfg.MODEL.VIPA.KEY_VALUES = "visual"
    cfg.MODEL.VIPA.DIM = 768  # D, of the expression and of the decoder
    cfg.MODEL.VIPA.NUM_HEADS = 12
    cfg.MODEL.VIPA.GENERATOR = CN()
    cfg.MODEL.VIPA.GENERATOR.JOINT_DIM = 512  # output of phi^V and phi^L
    cfg.MODEL.VIPA.GENERATOR.RATIO = 0.3  # r (Fig. 4)
    # Gumbel noise g of the retrieval in training. temperature: softmax(S_c / tau + g), where
    # tau weighs cosines against noise. scores: softmax((S_c + g) / tau), Eq. 2 to the letter:
    # noise of standard deviation 1.28 whatever tau is, so that cosines of +-0.1 retrieve hardly
    # better than chance (34 of 100 tokens on target, by chance 30; temperature 0.07: 97).
    cfg.MODEL.VIPA.GENERATOR.NOISE = "temperature"
    cfg.MODEL.VIPA.GENERATOR.TAU_INIT = 0.07  # tau at the start; it is learned (ours)
    cfg.MODEL.VIPA.GENERATOR.CUES = "both"  # both | global ([CLS]) | local (the others): Table VI b
    # Token ids that are no cues. bert-base-uncased: a 1037, an 2019, the 1996 (Table IX, without
    # articles); [SEP] 102.
    cfg.MODEL.VIPA.GENERATOR.EXCLUDED_IDS = ()
    cfg.MODEL.VIPA.GENERATOR.RETRIEVE = True  # step 1 (Table VI a)
    cfg.MODEL.VIPA.GENERATOR.REFINE = True  # step 2 (Table VI a)
    # mean | sum of retrieved tokens; Eq. 5 says sum, the same function up to the next weight's
    # scale.
    cfg.MODEL.VIPA.GENERATOR.AGGREGATION = "mean"
    cfg.MODEL.VIPA.DECODER = CN()
    # Stages i (of F_i, strides 32 to 4) that attend the expression.
    cfg.MODEL.VIPA.DECODER.ATTENTION_STAGES = (4, 3, 2, 1)
    cfg.MODEL.VIPA.DECODER.NUM_CONVS = 2  # 3x3 convolutions after each concatenation
    cfg.MODEL.VIPA.DECODER.MLP_RATIO = 4
    cfg.MODEL.VIPA.DECODER.NORM = "BN"  # BN | SyncBN | nnSyncBN | GN | ...
    cfg.MODEL.VIPA.BCE_WEIGHT = 1.0
    cfg.MODEL.VIPA.DICE_WEIGHT = 1.0
    # On the [CLS] row of the relevance scores (Table VIII): contrastive (Eq. 4) | threshold (dice
    # loss of the thresholded map) | none.
    cfg.MODEL.VIPA.RELEVANCE_LOSS = "contrastive"
    cfg.MODEL.VIPA.RELEVANCE_WEIGHT = 1.0
    # Eq. 4 has no temperature (False); cosines alone keep sigma(s) between 0.27 and 0.73.
    cfg.MODEL.VIPA.LEARN_RELEVANCE_TEMPERATURE = False
