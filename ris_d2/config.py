"""Every configuration key of ris_d2, once: default, meaning, and the paper's symbol where there is one."""

import difflib
import textwrap
from collections.abc import Iterator, Sequence
from typing import Any

from detectron2.config import CfgNode as CN
from detectron2.config import get_cfg

from .data.catalog import register_from_config
from .extensions import import_extension
from .paper_tables import is_paper_row, read_paper_row
from .yaml_files import read_config_files


def get_ris_cfg() -> CN:
    """Return detectron2's defaults plus every ris_d2 key; MODEL.DEVICE is "cpu" where CUDA is absent."""
    import torch

    cfg = get_cfg()
    add_ris_config(cfg)
    if not torch.cuda.is_available():
        cfg.MODEL.DEVICE = "cpu"
    return cfg


def load_config(
    config_file: str, options: Sequence[str] = (), *, modules: Sequence[str] = ()
) -> CN:
    """Defaults, then the yaml file (each ``_BASE_`` before it), then KEY VALUE options.

    ``configs/papers/vipa.yaml:t7_none_le`` is a row of a paper's table: the table's recipe, then the
    changes of the row.

    Only plain values are read and nothing in a file runs; detectron2's ``cfg.merge_from_file``
    promises neither. The datasets of DATASETS.RIS_JSON are registered.

    Args:
        modules: names or files of the user's own modules, imported first; where one has
            ``add_config``, it is called with the defaults and adds its keys.

    Raises:
        FileNotFoundError: no such file.
        ValueError: an unknown key, a value of the wrong type, or see
            :func:`ris_d2.yaml_files.read_config_files`,
            :func:`ris_d2.extensions.import_extension` and
            :func:`ris_d2.data.catalog.register_from_config`; names file (or command line) and key.
    """
    cfg = get_ris_cfg()
    for module in map(import_extension, modules):
        getattr(module, "add_config", lambda cfg: None)(cfg)
    if config_file:
        row = read_paper_row(config_file) if is_paper_row(config_file) else None
        for path, values in read_config_files(row.base if row else config_file):
            _merge(cfg, path, values)
        for origin, values in row.changes if row else ():
            _merge(cfg, origin, values)
    if len(options) % 2:
        raise ValueError(f"command line: {options[-1]!r} has no value (or no key: KEY VALUE ...)")
    for key, value in zip(options[::2], options[1::2]):
        nested = value
        for name in reversed(key.split(".")):
            nested = {name: nested}
        _merge(cfg, "command line", nested)
    register_from_config(cfg)
    return cfg


def _merge(cfg: CN, origin: str, values: dict[str, Any]) -> None:
    _check_keys(cfg, origin, values)
    try:
        cfg.merge_from_other_cfg(CN(values))
    # Literals in text, as "(480, 480)", can be nested without end.
    except (KeyError, ValueError, AssertionError, RecursionError, MemoryError) as error:
        reason = textwrap.shorten(str(error), 400) or type(error).__name__
        raise ValueError(f"{origin}, {', '.join(values)}: {reason}") from error


def _check_keys(
    cfg: CN, origin: str, values: dict[str, Any], node: CN | None = None, path: str = ""
) -> None:
    node = cfg if node is None else node
    for key, value in values.items():
        name = f"{path}{key}"
        if key not in node and not node.is_new_allowed():
            known = list(_names(cfg))
            near = [other for other in known if other.split(".")[-1] == key][:3]
            near = near or difflib.get_close_matches(name, known, 1, 0.8)
            hint = f"; did you mean {' or '.join(near)}?" if near else ""
            raise ValueError(f"{origin}: unknown key {name}{hint}")
        if not isinstance(key, str):
            raise ValueError(f"{origin}: the key {name} is no text")
        below = node.get(key)
        if isinstance(below, CN) and isinstance(value, dict):
            _check_keys(cfg, origin, value, below, f"{name}.")
        elif isinstance(below, CN):
            raise ValueError(f"{origin}: {name} is a group of keys, {value!r} is not")
        elif isinstance(value, dict) and key in node:
            raise ValueError(f"{origin}: {name} is a value, no group of keys as {value!r}")


def _names(node: CN, path: str = "") -> Iterator[str]:
    for key, value in node.items():
        yield f"{path}{key}"
        if isinstance(value, CN):
            yield from _names(value, f"{path}{key}.")


def add_ris_config(cfg: CN) -> None:
    """Add the keys of ris_d2 to ``cfg`` in place (once; a second call resets them to the defaults).

    detectron2's own keys stay as they are; configs/Base-RIS.yaml sets those that referring needs.
    """
    _add_data_keys(cfg)
    _add_model_keys(cfg)
    _add_solver_keys(cfg)
    _add_test_keys(cfg)
    _add_beit3_keys(cfg)
    _add_swin_keys(cfg)
    _add_clip_keys(cfg)
    _add_bert_keys(cfg)
    _add_vit_keys(cfg)
    _add_shared_ris_keys(cfg)
    _add_asda_keys(cfg)
    _add_risam_keys(cfg)
    _add_deris_keys(cfg)
    _add_vipa_keys(cfg)


def _add_data_keys(cfg: CN) -> None:
    # Mixed training sets drop every image that a val/test split of any member uses. False
    # reproduces sets that were published without dropping.
    cfg.DATASETS.DROP_EVAL_IMAGES = True
    # Your own datasets, [[name, json file, image folder], ...], in the form of datasets/README.md; the
    # names then serve in TRAIN and TEST. Paths are relative to the working directory or to
    # $DETECTRON2_DATASETS.
    cfg.DATASETS.RIS_JSON = []

    # Sentences of one image drawn for one training unit when INPUT.RIS.UNIT is "image".
    cfg.INPUT.MAX_EXPRESSIONS = 8

    cfg.INPUT.RIS = CN()
    # What one training draw is: "sentence" (each expression), "referent" (each ref_id with one
    # random sentence), "image" (each image with up to INPUT.MAX_EXPRESSIONS random sentences).
    cfg.INPUT.RIS.UNIT = "referent"
    cfg.INPUT.RIS.SIZE = (480, 480)  # (height, width) of the model's input
    # How the image meets SIZE: "squash" (aspect not kept), "letterbox" (aspect kept, centred,
    # padded with LETTERBOX_COLOR before normalisation), "longest_side" (aspect kept, longest side =
    # max(SIZE); the segmenter pads right and bottom with zeros after normalisation).
    cfg.INPUT.RIS.GEOMETRY = "squash"
    # bilinear | bicubic | area (shrinking only; else bilinear)
    cfg.INPUT.RIS.INTERPOLATION = "bilinear"
    # Pixel of the original mask that a pixel of the resized training mask takes: center (aligned with
    # the image) | corner (the upper left, cv2's nearest: the public code of DeRIS and ASDA).
    cfg.INPUT.RIS.MASK_SAMPLE = "center"
    cfg.INPUT.RIS.LETTERBOX_COLOR = (123.7, 116.3, 103.5)  # RGB
    # Further resizings of the same original image, [[name, height, width], ...].
    cfg.INPUT.RIS.VIEWS = []
    # Training augmentation, all off by default as most RIS recipes use none.
    cfg.INPUT.RIS.FLIP_PROB = 0.0  # horizontal flip; swaps the words left and right in the sentence
    cfg.INPUT.RIS.BRIGHTNESS = 0.0  # b: HSV value times U(1-b, 1+b), clipped at 255
    cfg.INPUT.RIS.SATURATION = 0.0  # the same for HSV saturation
    cfg.INPUT.RIS.AFFINE = CN()  # after the letterbox; only with GEOMETRY letterbox and no views
    cfg.INPUT.RIS.AFFINE.ENABLED = False
    cfg.INPUT.RIS.AFFINE.ROTATION = 5.0  # degrees, U(-r, r) about the centre
    cfg.INPUT.RIS.AFFINE.SCALE = 0.1  # U(1-s, 1+s)
    cfg.INPUT.RIS.AFFINE.TRANSLATION = 0.1  # of the input size, U(-t, t) per axis
    cfg.INPUT.RIS.AFFINE.SHEAR = 2.0  # degrees, U(-s, s) per axis
    # Text. KIND: beit3 (.spm file or directory with tokenizer.json), bert, clip, or hf (any Hugging
    # Face fast tokenizer). PATH: a file, a directory (also relative to $DETECTRON2_DATASETS) or a
    # hub name.
    cfg.INPUT.RIS.TOKENIZER = CN()
    cfg.INPUT.RIS.TOKENIZER.KIND = "beit3"
    cfg.INPUT.RIS.TOKENIZER.PATH = ""
    # Lower-case, delete . , ' ! ? " ( ) * # : ; and turn - and / into spaces, as BEiT-3 based
    # methods do.
    cfg.INPUT.RIS.TOKENIZER.CLEAN = True
    cfg.INPUT.RIS.MAX_TOKENS = 20  # L, special tokens included; longer sentences are cut
    # Non-referent sample conversion (DeRIS): a sentence with a target is replaced by one that is
    # not true of the image.
    cfg.INPUT.RIS.NSC = CN()
    cfg.INPUT.RIS.NSC.RATE = 0.0  # R_c, share of the sentences with a target; 0 = off, DeRIS 0.15
    # paper: the new sentence comes from another image, has more than MIN_WORDS words, and is
    # compared by words. released: any image, any length, compared by characters.
    cfg.INPUT.RIS.NSC.RULES = "paper"
    cfg.INPUT.RIS.NSC.MIN_WORDS = 2  # N_w; of RULES "paper" only
    # T_s: mean of Jaccard and cosine similarity to the replaced sentence must lie below
    cfg.INPUT.RIS.NSC.SIMILARITY = 0.6


def _add_model_keys(cfg: CN) -> None:
    # Pretrained parts, [[source, path], ...]; source: beit3; path: file, hf://, timm://, https://.
    # MODEL.WEIGHTS, if given, is loaded over them.
    cfg.MODEL.INIT = []
    # False leaves frozen parts out of checkpoints; the file then names MODEL.INIT's sources and
    # hashes.
    cfg.MODEL.SAVE_FROZEN = True

    cfg.MODEL.RIS = CN()
    # fp32 | bf16 | fp16 (GPU only): autocast around the whole forward. SOLVER.AMP.ENABLED makes fp32
    # fp16.
    cfg.MODEL.RIS.PRECISION = "fp32"
    # Parts without gradient, {part: eval | train}: the mode says whether dropout, DropPath and
    # BatchNorm behave as in evaluation or as in training. none: a _BASE_ freezes it, this does not.
    cfg.MODEL.RIS.FREEZE = CN(new_allowed=True)
    # Who says "nothing": none (published RIS: nobody), area (fewer than TEST.NO_TARGET_MIN_AREA
    # foreground pixels), head (the method's own decision, or our small existence head where it has
    # none).
    cfg.MODEL.RIS.NO_TARGET = "none"
    cfg.MODEL.RIS.EXISTENCE_WEIGHT = 1.0  # loss weight of the existence head (NO_TARGET "head")
    cfg.MODEL.RIS.EXISTENCE_THRESHOLD = 0.5  # below this existence probability: no target
    cfg.MODEL.RIS.MASK_THRESHOLD = 0.5  # a pixel is foreground if its probability exceeds this
    # Order from logits to the mask at output size. SIGMOID_FIRST: resize probabilities instead of
    # logits. THRESHOLD_FIRST: binarise at the model's resolution and resize the binary mask
    # (nearest).
    cfg.MODEL.RIS.SIGMOID_FIRST = True
    cfg.MODEL.RIS.THRESHOLD_FIRST = False
    # Training targets at the size of a smaller prediction. area: the share of each cell that is on
    # target, aligned with the prediction's enlargement. nearest: the cell's upper left pixel, as in
    # the public code of ASDA (and of CRIS); what is learned lies up to half a cell right and down.
    cfg.MODEL.RIS.TARGET_RESIZING = "area"
    cfg.MODEL.RIS.TEXT = CN()
    # Text encoder of methods that choose one: RISCLIPText | RISBert | RISCausalLM
    cfg.MODEL.RIS.TEXT.NAME = "RISCLIPText"
    # Any causal language model of transformers: folder or name on the hub; PRETRAINED False reads its
    # config.json only. Its tokenizer: INPUT.RIS.TOKENIZER KIND hf.
    cfg.MODEL.RIS.TEXT.CAUSAL_LM = CN()
    cfg.MODEL.RIS.TEXT.CAUSAL_LM.PATH = ""
    cfg.MODEL.RIS.TEXT.CAUSAL_LM.PRETRAINED = True


def _add_solver_keys(cfg: CN) -> None:
    cfg.SOLVER.RIS = CN()
    cfg.SOLVER.RIS.OPTIMIZER = "AdamW"  # AdamW | Adam
    cfg.SOLVER.RIS.BETAS = (0.9, 0.999)
    cfg.SOLVER.RIS.EPS = 1e-8
    cfg.SOLVER.RIS.AMSGRAD = False
    # [[regex, lr_factor], ...]: the first regex found in a parameter's name scales its learning
    # rate.
    cfg.SOLVER.RIS.LR_FACTORS = []
    # Regexes of parameters without weight decay, beside norms (SOLVER.WEIGHT_DECAY_NORM), biases
    # (SOLVER.WEIGHT_DECAY_BIAS) and whatever else has one dimension.
    cfg.SOLVER.RIS.NO_DECAY = []
    # step (SOLVER.STEPS, GAMMA) | cosine (to 0) | poly. A SOLVER.LR_SCHEDULER_NAME other than
    # detectron2's default takes its place.
    cfg.SOLVER.RIS.SCHEDULE = "step"
    # Length in epochs of training units (INPUT.RIS.UNIT); MAX_ITER, STEPS and WARMUP_ITERS then follow
    # from the units that are there and IMS_PER_BATCH. 0: those count.
    cfg.SOLVER.RIS.EPOCHS = 0
    cfg.SOLVER.RIS.STEP_EPOCHS = ()  # epochs after which the rate is multiplied by SOLVER.GAMMA
    cfg.SOLVER.RIS.WARMUP_EPOCHS = 0
    cfg.SOLVER.RIS.POLY_POWER = 0.9  # rate x (1 - t/T)^power
    # Global norm over all parameters; 0 = off. SOLVER.CLIP_GRADIENTS with CLIP_TYPE full_model is the
    # same; its value and norm clip each parameter by itself, as in detectron2.
    cfg.SOLVER.RIS.CLIP_GRAD_NORM = 0.0
    # Numbered checkpoints (every SOLVER.CHECKPOINT_PERIOD iterations) that OUTPUT_DIR keeps, the newest
    # ones; 0 = all. model_final.pth and model_best.pth stay.
    cfg.SOLVER.RIS.KEEP_CHECKPOINTS = 3
    # Micro-batches per optimizer step. SOLVER.IMS_PER_BATCH counts the units of the whole step.
    cfg.SOLVER.RIS.ACCUMULATION = 1


def _add_test_keys(cfg: CN) -> None:
    # (height, width) of masks and ground truth in evaluation; () = each image's original size. The
    # published 480x480 (ReLA, LAVT) and 384x384 (DeRIS) protocols set it.
    cfg.TEST.RESOLUTION = ()
    # How ground truth is resized to it: corner (cv2's nearest: DeRIS) | center (PIL's nearest: LAVT,
    # CrossVLT and the lineage of VIPA). At 480x480 the two differ by 1 % IoU.
    cfg.TEST.SAMPLE = "corner"
    cfg.TEST.MAX_EXPRESSIONS = 32  # expressions segmented at once in evaluation (bounds memory)
    cfg.TEST.NO_TARGET_MIN_AREA = 50  # pixels at output size, for MODEL.RIS.NO_TARGET "area"
    cfg.TEST.BEST_METRIC = "gIoU"  # keeps model_best.pth; mean over the "val" sets of DATASETS.TEST
    # Methods that predict instances return all of them: the report then tells masks that were not
    # there from masks that were not chosen (oracle_mIoU).
    cfg.TEST.INSTANCES = False
    cfg.TEST.SAVE_PREDICTIONS = False  # write predictions.jsonl (RLE) next to results.json


def _add_beit3_keys(cfg: CN) -> None:
    # RISBEiT3 backbone; defaults are BEiT-3 base (large: 1024, 24, 16).
    cfg.MODEL.RIS.BEIT3 = CN()
    cfg.MODEL.RIS.BEIT3.EMBED_DIM = 768  # d
    cfg.MODEL.RIS.BEIT3.DEPTH = 12  # L
    cfg.MODEL.RIS.BEIT3.NUM_HEADS = 12
    cfg.MODEL.RIS.BEIT3.MLP_RATIO = 4
    cfg.MODEL.RIS.BEIT3.PATCH_SIZE = 16  # p
    # patch: the published linear patch embedding; conv: stride-2 3x3 convolutions (ours, for
    # training from scratch on small data).
    cfg.MODEL.RIS.BEIT3.STEM = "patch"
    # Random weights: released (trunc_normal 0.02, replaced by pretrained weights) | scratch
    # (Xavier; ours).
    cfg.MODEL.RIS.BEIT3.INIT = "released"
    cfg.MODEL.RIS.BEIT3.VOCAB_SIZE = 64010
    cfg.MODEL.RIS.BEIT3.DROP_PATH = 0.1
    # Recompute layers in the backward pass: less memory, more time.
    cfg.MODEL.RIS.BEIT3.CHECKPOINTING = False


def _add_clip_keys(cfg: CN) -> None:
    # RISCLIPViT; defaults are ViT-B/16.
    cfg.MODEL.RIS.CLIP_VIT = CN()
    cfg.MODEL.RIS.CLIP_VIT.PATCH_SIZE = 16  # P
    cfg.MODEL.RIS.CLIP_VIT.DIM = 768
    cfg.MODEL.RIS.CLIP_VIT.DEPTH = 12  # N
    cfg.MODEL.RIS.CLIP_VIT.NUM_HEADS = 12
    # patch: CLIP's linear patch embedding; conv: stride-2 3x3 convolutions (ours, for training from
    # scratch on small data).
    cfg.MODEL.RIS.CLIP_VIT.STEM = "patch"
    # RISCLIPText; defaults are the text transformer of CLIP ViT-B/16 (ViT-L/14: 768, 12, 12).
    cfg.MODEL.RIS.TEXT.CLIP = CN()
    cfg.MODEL.RIS.TEXT.CLIP.DIM = 512
    cfg.MODEL.RIS.TEXT.CLIP.DEPTH = 12
    cfg.MODEL.RIS.TEXT.CLIP.NUM_HEADS = 8
    cfg.MODEL.RIS.TEXT.CLIP.VOCAB_SIZE = 49408
    # Rows of the position table, of CLIP's 77; 0 = INPUT.RIS.MAX_TOKENS.
    cfg.MODEL.RIS.TEXT.CLIP.NUM_POSITIONS = 0
    # Random weights: released (replaced by pretrained weights) | scratch (Xavier, wider words; ours).
    cfg.MODEL.RIS.TEXT.CLIP.INIT = "released"


def _add_bert_keys(cfg: CN) -> None:
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


def _add_vit_keys(cfg: CN) -> None:
    # RISSAMViT backbone; defaults are SAM ViT-H (L: 1024, 24, 16, blocks 5 11 17 23; B: 768, 12, 12,
    # blocks 2 5 8 11).
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
    # RISViT backbone: a ViT of timm, and the blocks (0-based) whose outputs are the features block<i>.
    cfg.MODEL.RIS.VIT = CN()
    cfg.MODEL.RIS.VIT.NAME = "vit_base_patch16_224"
    cfg.MODEL.RIS.VIT.OUT_BLOCKS = (5, 8, 11)


def _add_risam_keys(cfg: CN) -> None:
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
    cfg.MODEL.RISAM.MASK_PAD = True  # no attention reads padded words (ours)
    # Feature Enhancement. TYPE: fusion | linear (last feature, projected; Table 2 #1) | identity (last
    # feature as it is; Table 11) | vitdet (pyramid of the last feature; Table 6).
    cfg.MODEL.RISAM.FE = CN()
    cfg.MODEL.RISAM.FE.TYPE = "fusion"
    cfg.MODEL.RISAM.FE.MLP_LAYERS = 2  # linear layers per MLP (ours)
    cfg.MODEL.RISAM.FE.NUM_CONVS = 1  # 3x3 convolutions per CBA (ours)
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
    cfg.MODEL.RISAM.DEC.OUT_PROJ = True  # a fourth linear layer per attention (ours)
    cfg.MODEL.RISAM.DEC.NORM = "none"  # after residual sums: none (Eq. 6, 8, 9) | LN
    # hidden width of an MLP per block and stream; 0: none (Eq. 6-9)
    cfg.MODEL.RISAM.DEC.FFN_DIM = 0
    cfg.MODEL.RISAM.DEC.DROPOUT = 0.0
    cfg.MODEL.RISAM.DEC.TOI_A = False  # tokens attend the pixels, too (Table 5 #9)
    cfg.MODEL.RISAM.DEC.ELG = True  # words enter the decoder; False: the query token alone (#10)
    cfg.MODEL.RISAM.DEC.UP_DIMS = (128, 64)  # channels after each upsampling x2 (ours)
    cfg.MODEL.RISAM.FOCAL_WEIGHT = 0.5  # omega_f
    cfg.MODEL.RISAM.FOCAL_GAMMA = 2.0  # gamma
    cfg.MODEL.RISAM.FOCAL_ALPHA = -1.0  # weight of the foreground; -1: none, as in Eq. 10
    cfg.MODEL.RISAM.DICE_WEIGHT = 0.5  # omega_d
    # Added to both sides of Eq. 11's fraction, which is printed without (ours). Far below a pixel, so
    # that the loss of an empty target is constant; 1 lets it teach, too.
    cfg.MODEL.RISAM.DICE_SMOOTH = 1e-6


def _add_swin_keys(cfg: CN) -> None:
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
    # Recompute blocks in the backward pass: less memory, more time.
    cfg.MODEL.RIS.SWIN.CHECKPOINTING = False


def _add_shared_ris_keys(cfg: CN) -> None:
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
    # Where the loss is taken: mask (the prediction's 1/4 size, ground truth nearest-resized) |
    # input.
    cfg.MODEL.SHARED_RIS.LOSS_RESOLUTION = "mask"


def _add_deris_keys(cfg: CN) -> None:
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
    # Who hands queries to whom. loopback: a cognition layer after each perception layer and before
    # the first. Ours, for want of released code: p_to_c (all perception layers, then one cognition
    # layer), c_to_p (one cognition layer on the initial queries, then all perception layers),
    # hierarchical (p_to_c with f_v added at each level of the pixel decoder).
    cfg.MODEL.DERIS.QUERY_FLOW = "loopback"
    # f_v in f_m = Conv(Concat(f_h4, f_v)); False: f_h4 alone
    cfg.MODEL.DERIS.VISUAL_FEATURES = True
    # Whom an instance attends in a cognition layer. queries: the other queries of its expression, told
    # apart by mask priors, as the paper says. released: for released weights. By swapped axes, the
    # released code lets query n attend query n of the other expressions in the batch: of 16 in
    # training and in the published evaluation on RefCOCO, of one, itself, in that on gRefCOCO. Here
    # it is the batch in training; in evaluation, where no result may depend on other sentences, itself.
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
    # Multiply the scores by the existence probability. Released: an option that no table uses.
    cfg.MODEL.DERIS.SCORE_WEIGHTED = False
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
    # Points per mask in matching and loss; the loss draws OVERSAMPLE_RATIO times as many and keeps
    # the most uncertain for a share IMPORTANCE_RATIO of its points.
    cfg.MODEL.DERIS.NUM_POINTS = 12544
    cfg.MODEL.DERIS.OVERSAMPLE_RATIO = 3.0
    cfg.MODEL.DERIS.IMPORTANCE_RATIO = 0.75


def _add_vipa_keys(cfg: CN) -> None:
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
    # Self-attention layers on language keys and values, to match the generator's size.
    cfg.MODEL.VIPA.LANGUAGE_LAYERS = 2
    cfg.MODEL.VIPA.DIM = 768  # D, of the expression and of the decoder
    cfg.MODEL.VIPA.NUM_HEADS = 12
    cfg.MODEL.VIPA.GENERATOR = CN()
    cfg.MODEL.VIPA.GENERATOR.JOINT_DIM = 512  # output of phi^V and phi^L
    cfg.MODEL.VIPA.GENERATOR.RATIO = 0.3  # r (Fig. 4)
    # Gumbel noise g of the retrieval in training. temperature: softmax(S_c / tau + g), where tau weighs
    # cosines against noise. scores: softmax((S_c + g) / tau), Eq. 2 to the letter: noise of standard
    # deviation 1.28 whatever tau is, so that cosines of +-0.1 retrieve hardly better than chance
    # (34 of 100 tokens on target, by chance 30; temperature 0.07: 97).
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


def _add_asda_keys(cfg: CN) -> None:
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
    # Scale-wise Feature Aggregator: released (levels enlarged, top down) | paper (levels shrunk,
    # bottom up, Eq. 5) | concat (one scale, after CRIS, Table 2 b, c) | none (F_G alone, Table 2 a).
    cfg.MODEL.ASDA.AGGREGATOR = "released"
    # Words: dual (they weight the response masks, Fig. 3) | single (the pixels read them, then one
    # mask; Table 2 e) | none (no attention at all; Table 2 a to d).
    cfg.MODEL.ASDA.ALIGNER = "dual"
    cfg.MODEL.ASDA.ATTENTION_LAYERS = 2  # n of Local Visual Attention (Table 3)
    cfg.MODEL.ASDA.PRE_NORM = False  # LayerNorm after the sums (released) or before (Eq. 6, 8)
    # released (2 + 3 convolutions, the last one 3x3) | paper (3 convolutions, the last one 1x1).
    cfg.MODEL.ASDA.DECODER = "released"
    # Its upsampling convolutions: direct (as released) | phases (the same masks up to rounding, from
    # fewer multiply-adds: 162 instead of 181 G for the whole model).
    cfg.MODEL.ASDA.UPSAMPLING = "direct"
    cfg.MODEL.ASDA.NUM_MASKS = 32  # N_c (Table 4)
    cfg.MODEL.ASDA.RESPONSES = "relu"  # of response masks M': relu (released) | sigmoid (Eq. 7)
    cfg.MODEL.ASDA.COEFFICIENT_KERNEL = 3  # third convolution of Phi_coef: 3 released, 1 paper
    cfg.MODEL.ASDA.DICE_WEIGHT = 1.0
    cfg.MODEL.ASDA.FOCAL_WEIGHT = 1.0
    # The released "focal" loss is plain cross-entropy: alpha -1 (no weights), gamma 0. RetinaNet's,
    # which the paper cites: 0.25 and 2.
    cfg.MODEL.ASDA.FOCAL_ALPHA = -1.0
    cfg.MODEL.ASDA.FOCAL_GAMMA = 0.0
