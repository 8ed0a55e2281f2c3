"""What a run needs, looked at before a model is built: data, tokenizer, weights, batch size."""

from detectron2.config import CfgNode
from torch import nn

from ..checkpoint import RISCheckpointer
from ..checkpoint.converters import get_converter
from ..checkpoint.paths import local_path
from ..data.catalog import check_files
from ..data.tokenizer import Tokenizer


def check_numbers(cfg: CfgNode) -> None:
    """Check the numbers that a training meets only after its model is built.

    Raises:
        ValueError: one is out of its range.
    """
    solver = cfg.SOLVER
    for key, value in {
        "SOLVER.IMS_PER_BATCH": solver.IMS_PER_BATCH,
        "SOLVER.MAX_ITER": solver.MAX_ITER,
        "SOLVER.RIS.ACCUMULATION": solver.RIS.ACCUMULATION,
        "TEST.MAX_EXPRESSIONS": cfg.TEST.MAX_EXPRESSIONS,
    }.items():
        if value < 1:
            raise ValueError(f"{key} is {value}; it must be at least 1")
    if not 0 <= solver.RIS.EMA < 1:
        raise ValueError(f"SOLVER.RIS.EMA is {solver.RIS.EMA}; it lies in [0, 1)")
    if solver.RIS.PATIENCE and cfg.TEST.EVAL_PERIOD < 1:
        raise ValueError("SOLVER.RIS.PATIENCE counts evaluations; set TEST.EVAL_PERIOD, too")


def check_inputs(
    cfg: CfgNode, *, resume: bool = False, eval_only: bool = False, untrained: bool = False
) -> None:
    """Check what ``cfg`` names; nothing is built, and of data sets nothing is read.

    Args:
        resume: weights come from OUTPUT_DIR's last checkpoint, if there is one.
        eval_only: the training set is not needed, weights are.
        untrained: an evaluation may do without weights.

    Raises:
        FileNotFoundError: a file or folder of a data set, of the tokenizer, of MODEL.WEIGHTS, or of
            MODEL.INIT (where nothing else fills the model) is missing.
        ValueError: an unknown data set or source, a number out of its range, or an evaluation
            without weights.
    """
    check_numbers(cfg)
    for name in (*(() if eval_only else cfg.DATASETS.TRAIN), *cfg.DATASETS.TEST):
        check_files(name)
    if not (cfg.DATASETS.TEST if eval_only else cfg.DATASETS.TRAIN):
        raise ValueError(f"DATASETS.{'TEST' if eval_only else 'TRAIN'} is empty")
    Tokenizer(cfg)
    # The checkpointer asks the model for nothing until it loads.
    files = RISCheckpointer(nn.Identity(), cfg.OUTPUT_DIR, save_to_disk=False)
    if resume and files.has_checkpoint():
        return
    if cfg.MODEL.WEIGHTS:
        local_path(cfg.MODEL.WEIGHTS)
        return
    if eval_only and not untrained:
        wanted = f"{cfg.OUTPUT_DIR} holds no checkpoint" if resume else "MODEL.WEIGHTS is empty"
        raise ValueError(
            f"an evaluation needs weights: {wanted}; give MODEL.WEIGHTS FILE, or --untrained"
        )
    for source, path in cfg.MODEL.INIT:
        get_converter(source)
        local_path(path)
