"""Configuration keys of DeRIS: default, meaning, and the paper's symbol where there is one."""

from detectron2.config import CfgNode as CN


def add_deris_config(cfg: CN) -> None:
    """Add MODEL.DERIS to ``cfg``, in place."""
    cfg.MODEL.DERIS = CN()
    # Cognition branch: "RISBEiT3", which reads the view "cognition" together with the sentence, or
    # "text": the encoder MODEL.RIS.TEXT.NAME reads the sentence alone, and there is no f_v.
    cfg.MODEL.DERIS.COGNITION = "RISBEiT3"
    cfg.MODEL.DERIS.DIM = 256  # channels of queries and of all that they meet
    cfg.MODEL.DERIS.NUM_HEADS = 8
    cfg.MODEL.DERIS.FFN_DIM = 2048  # of perception and cognition layers
    cfg.MODEL.DERIS.NUM_QUERIES = 10  # N; 20 for gRefCOCO
    cfg.MODEL.DERIS.PIXEL_DECODER_LAYERS = 6  # deformable encoder layers
    cfg.MODEL.DERIS.PIXEL_DECODER_FFN_DIM = 1024
    cfg.MODEL.DERIS.ROUNDS = 3  # N_r, perception layers
    # Order of perception and cognition layers, which hand the queries on. loopback: a
    # cognition layer before the first perception layer and after each. Ours, for want of
    # released code: p_to_c (all perception layers, then one cognition layer), c_to_p (one
    # cognition layer on the initial queries, then all perception layers), hierarchical
    # (p_to_c with f_v added at each level of the pixel decoder).
    cfg.MODEL.DERIS.QUERY_FLOW = "loopback"
    # f_v in f_m = Conv(Concat(f_h4, f_v)); False: f_h4 alone
    cfg.MODEL.DERIS.VISUAL_FEATURES = True
    # What an instance attends in a cognition layer. queries: the other queries of its
    # expression, told apart by mask priors, as the paper says. released: for released
    # weights. By swapped axes, the released code lets query n attend query n of the other
    # expressions in the batch: of 16 in training and in the published evaluation on
    # RefCOCO, of one, itself, in that on gRefCOCO. Here it is the batch in training; in
    # evaluation, where no result may depend on other sentences, itself.
    cfg.MODEL.DERIS.INSTANCE_ATTENTION = "queries"
    # Positions that the cognition layers add to words: sine, or released: its frequencies are cast
    # to integers, so that all but the first are 0; released weights need it.
    cfg.MODEL.DERIS.TEXT_POSITIONS = "released"
    # Decoder over the words behind the existence head (non-referent judgment).
    cfg.MODEL.DERIS.EXISTENCE_LAYERS = 3
    cfg.MODEL.DERIS.EXISTENCE_FFN_DIM = 512
    cfg.MODEL.DERIS.EXISTENCE_DROPOUT = 0.1
    # T_ref: queries with a higher referring score make up the mask; without any, nothing is there
    # (MODEL.RIS.NO_TARGET "head"). Published numbers: 0.7, DeRIS-L on gRefCOCO 0.9.
    cfg.MODEL.DERIS.SCORE_THRESHOLD = 0.7
    # Where no query exceeds T_ref, keep the best one (RIS without absent targets; ours).
    cfg.MODEL.DERIS.KEEP_BEST = False
    # Loss and matching cost of a round. The paper's text sets all weights to 1; the released code,
    # on whose results its tables rest, multiplies 1 by Mask2Former's 2, 5 and 5.
    cfg.MODEL.DERIS.CLASS_WEIGHT = 2.0  # lambda_r
    cfg.MODEL.DERIS.MASK_WEIGHT = 5.0  # lambda_m, cross-entropy part
    cfg.MODEL.DERIS.DICE_WEIGHT = 5.0  # lambda_m, dice part
    cfg.MODEL.DERIS.AUX_WEIGHT = 0.2  # lambda_aux, of all rounds but the last
    # Weight of a query that is not referred to in the two-class cross-entropy. 0.1: released code.
    # 1.0: the paper's text, since a two-class cross-entropy without weights is the binary one.
    cfg.MODEL.DERIS.NOT_REFERRED_WEIGHT = 0.1
    # P, points per mask in matching and loss; of those of the loss, three quarters are
    # the most uncertain of three times as many.
    cfg.MODEL.DERIS.NUM_POINTS = 12544
