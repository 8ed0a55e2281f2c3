"""Loading of configurations, and the keys that all methods share: default and meaning.

The keys of a method, of the backbones and of the text encoders: ``modeling/*/config.py``.
"""

import difflib
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from detectron2.config import CfgNode as CN
from detectron2.config import get_cfg

from .data.catalog import register_from_config
from .extensions import import_extension
from .modeling.asda.config import add_asda_config
from .modeling.backbone.config import add_backbone_config
from .modeling.deris.config import add_deris_config
from .modeling.risam.config import add_risam_config
from .modeling.shared_ris.config import add_shared_ris_config
from .modeling.text.config import add_text_config
from .modeling.vipa.config import add_vipa_config
from .paper_tables import is_paper_row, nested, read_paper_row
from .yaml_files import read_config_files

# Former keys of configs that users have written -> what to suggest.
_RENAMED = {
    "MODEL.RIS.SIGMOID_FIRST": ["MODEL.RIS.MASK_ORDER"],
    "MODEL.RIS.THRESHOLD_FIRST": ["MODEL.RIS.MASK_ORDER"],
}
# Former keys that configs which were written out have; they are passed over, with a warning.
_GONE = (
    *("MODEL.ASDA.UPSAMPLING", "MODEL.RISAM.FOCAL_ALPHA", "MODEL.RIS.BEIT3.MLP_RATIO"),
    *("MODEL.RIS.TEXT.CLIP.NUM_POSITIONS", "MODEL.DERIS.OVERSAMPLE_RATIO"),
    "MODEL.DERIS.IMPORTANCE_RATIO",
    *("MODEL.RISAM.MASK_PAD", "MODEL.RISAM.FE.MLP_LAYERS", "MODEL.RISAM.FE.NUM_CONVS"),
    *("MODEL.RISAM.DEC.OUT_PROJ", "MODEL.RISAM.DEC.DROPOUT", "MODEL.DERIS.SCORE_WEIGHTED"),
    *("MODEL.VIPA.LANGUAGE_LAYERS", "MODEL.SHARED_RIS.LOSS_RESOLUTION"),
    *("MODEL.RIS.BEIT3.CHECKPOINTING", "MODEL.RIS.SWIN.CHECKPOINTING"),
)


def get_ris_cfg() -> CN:
    """detectron2's defaults and every ris_d2 key; MODEL.DEVICE is "cpu" where CUDA is absent."""
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

    ``configs/papers/vipa.yaml:t7_none_le`` is a row of a paper's table: the table's recipe, then
    the changes of the row.

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
        _merge(cfg, "command line", nested({key: value}))
    register_from_config(cfg)
    return cfg


def with_values(cfg: CN, values: Mapping[str, Any]) -> CN:
    """A frozen copy of ``cfg`` with other values of some keys, e.g. {"SOLVER.MAX_ITER": 100}."""
    cfg = cfg.clone()
    cfg.defrost()
    cfg.merge_from_list([word for pair in values.items() for word in pair])
    cfg.freeze()
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
        if key not in node and not node.is_new_allowed() and not cfg.key_is_deprecated(name):
            known = list(_names(cfg))
            near = _RENAMED.get(name, [other for other in known if other.split(".")[-1] == key][:3])
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
    for key in _GONE:
        if not cfg.key_is_deprecated(key):
            cfg.register_deprecated_key(key)
    _add_data_keys(cfg)
    _add_model_keys(cfg)
    _add_solver_keys(cfg)
    _add_test_keys(cfg)
    add_backbone_config(cfg)
    add_text_config(cfg)
    add_deris_config(cfg)
    add_risam_config(cfg)
    add_vipa_config(cfg)
    add_asda_config(cfg)
    add_shared_ris_config(cfg)


def _add_data_keys(cfg: CN) -> None:
    # Mixed training sets drop every image that a val/test split of any member uses. False
    # reproduces sets that were published without dropping.
    cfg.DATASETS.DROP_EVAL_IMAGES = True
    # Your own datasets, [[name, json file, image folder], ...], in the form of datasets/README.md;
    # the names then serve in TRAIN and TEST. Paths are relative to the working directory or to
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
    # Pixel of the original mask that a pixel of the resized training mask takes: center (aligned
    # with the image) | corner (the upper left, cv2's nearest: the public code of DeRIS and ASDA).
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
    # fp32 | bf16 | fp16 (GPU only): autocast around the whole forward. auto: bf16 where the
    # hardware multiplies it faster (CUDA 8.0 and later; CPUs with AMX or AVX512-BF16) and the model
    # has 10 M parameters or more, else fp32; Predictor's choice, whatever a recipe trains with.
    # SOLVER.AMP.ENABLED makes fp32 fp16.
    cfg.MODEL.RIS.PRECISION = "fp32"
    # Compile what is computed per image and per sentence (torch.compile; needs a C++ compiler): the
    # first calls take minutes, those after them less time. One more compilation for a single
    # sentence.
    cfg.MODEL.RIS.COMPILE = False
    # Parts without gradient, {part: eval | train}: the mode says whether dropout, DropPath and
    # BatchNorm behave as in evaluation or as in training. none: a _BASE_ freezes it, this does not.
    cfg.MODEL.RIS.FREEZE = CN(new_allowed=True)
    # Activation checkpointing: parts, named as in FREEZE, whose layers keep only their inputs in
    # training and are computed once more in the backward pass; ("all",): all that have such layers
    # (encoders, VIPA's decoder, DeRIS' pixel decoder). docs/measurements.md says what it saves.
    # With COMPILE layers with BatchNorm (in VIPA's decoder) keep everything.
    cfg.MODEL.RIS.CHECKPOINT_ACTIVATIONS = ()
    # How a model decides that nothing fits. none: it never does (published RIS). area: fewer than
    # TEST.NO_TARGET_MIN_AREA foreground pixels. head: the method's own decision, or our small
    # existence head where it has none.
    cfg.MODEL.RIS.NO_TARGET = "none"
    cfg.MODEL.RIS.EXISTENCE_WEIGHT = 1.0  # loss weight of the existence head (NO_TARGET "head")
    cfg.MODEL.RIS.EXISTENCE_THRESHOLD = 0.5  # below this existence probability: no target
    cfg.MODEL.RIS.MASK_THRESHOLD = 0.5  # a pixel is foreground if its probability exceeds this
    # What is resized from the model's resolution to the output's. probabilities: sigmoid, resize,
    # threshold. logits: resize, sigmoid, threshold. binary: sigmoid, threshold, resize (nearest).
    cfg.MODEL.RIS.MASK_ORDER = "probabilities"
    # Training targets at the size of a smaller prediction. area: the share of each cell that is on
    # target, aligned with the prediction's enlargement. nearest: the cell's upper left pixel, as in
    # the public code of ASDA (and of CRIS); what is learned lies up to half a cell right and down.
    cfg.MODEL.RIS.TARGET_RESIZING = "area"


def _add_solver_keys(cfg: CN) -> None:
    cfg.SOLVER.RIS = CN()
    # AdamW | Adam | Muon: orthogonal updates for the weights of linear layers and convolutions,
    # AdamW for all else; for training from scratch, the small models learn twice as fast.
    cfg.SOLVER.RIS.OPTIMIZER = "AdamW"
    cfg.SOLVER.RIS.MATRIX_LR_FACTOR = (
        1.0  # Muon: rate of those weights, relative to that of all else
    )
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
    # Length in epochs of training units (INPUT.RIS.UNIT); MAX_ITER, STEPS and WARMUP_ITERS then
    # follow from the units that are there and IMS_PER_BATCH. 0: those count.
    cfg.SOLVER.RIS.EPOCHS = 0
    cfg.SOLVER.RIS.STEP_EPOCHS = ()  # epochs after which the rate is multiplied by SOLVER.GAMMA
    cfg.SOLVER.RIS.WARMUP_EPOCHS = 0
    cfg.SOLVER.RIS.POLY_POWER = 0.9  # rate x (1 - t/T)^power
    # Global norm over all parameters; 0 = off. SOLVER.CLIP_GRADIENTS with CLIP_TYPE full_model is
    # the same; its value and norm clip each parameter by itself, as in detectron2.
    cfg.SOLVER.RIS.CLIP_GRAD_NORM = 0.0
    # Numbered checkpoints (every SOLVER.CHECKPOINT_PERIOD iterations) that OUTPUT_DIR keeps, the
    # newest ones; 0 = all. model_final.pth and model_best.pth stay.
    cfg.SOLVER.RIS.KEEP_CHECKPOINTS = 3
    # Decay of the exponential moving average of the weights, which is then what is evaluated and
    # saved; 0 = off. 0.999 averages about the last 1,000 steps.
    cfg.SOLVER.RIS.EMA = 0.0
    # Training ends once so many evaluations (every TEST.EVAL_PERIOD iterations) in a row were not
    # better than model_best.pth; 0 = never.
    cfg.SOLVER.RIS.PATIENCE = 0
    # fp32 matrix products of a training on a GPU in TensorFloat-32, with 10 bits of mantissa:
    # several times faster. Convolutions are, as PyTorch's default. Nothing changes on a CPU.
    cfg.SOLVER.RIS.TF32 = False
    # Micro-batches per optimizer step. SOLVER.IMS_PER_BATCH counts the units of the whole step.
    cfg.SOLVER.RIS.ACCUMULATION = 1


def _add_test_keys(cfg: CN) -> None:
    # (height, width) of masks and ground truth in evaluation; () = each image's original size. The
    # published 480x480 (ReLA, LAVT) and 384x384 (DeRIS) protocols set it.
    cfg.TEST.RESOLUTION = ()
    # How ground truth is resized to it: corner (cv2's nearest: DeRIS) | center (PIL's nearest:
    # LAVT, CrossVLT and the lineage of VIPA). At 480x480 the two differ by 1 % IoU.
    cfg.TEST.SAMPLE = "corner"
    cfg.TEST.MAX_EXPRESSIONS = 32  # expressions segmented at once in evaluation (bounds memory)
    cfg.TEST.NO_TARGET_MIN_AREA = 50  # pixels at output size, for MODEL.RIS.NO_TARGET "area"
    cfg.TEST.BEST_METRIC = "gIoU"  # keeps model_best.pth; mean over the "val" sets of DATASETS.TEST
    # Methods that predict instances return all of them: the report then tells masks that were not
    # there from masks that were not chosen (oracle_mIoU).
    cfg.TEST.INSTANCES = False
    cfg.TEST.SAVE_PREDICTIONS = False  # write predictions.jsonl (RLE) next to results.json
