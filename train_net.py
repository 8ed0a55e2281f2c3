"""Train or evaluate any ris_d2 model.

    python train_net.py --config-file configs/shared_ris_beit3_b.yaml --num-gpus 8
    python train_net.py --config-file C --resume       # from OUTPUT_DIR's last checkpoint
    python train_net.py --config-file C --eval-only MODEL.WEIGHTS model_best.pth
    torchrun --nproc-per-node 8 train_net.py --config-file C

Without GPUs, --num-gpus is the number of processes on CPUs.
"""

import argparse
import difflib
import logging

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog
from detectron2.engine import default_argument_parser, default_setup
from detectron2.evaluation import verify_results
from detectron2.utils import comm
from detectron2.utils.logger import setup_logger

from ris_d2 import load_config
from ris_d2.checkpoint import RISCheckpointer
from ris_d2.engine import Trainer, claim, launch

logger = logging.getLogger("ris_d2.train_net")


def check_datasets(cfg: CfgNode) -> None:
    """Raise ValueError, listing the known names, if DATASETS.TRAIN or TEST names an unknown one."""
    known = sorted(name for name in DatasetCatalog.list() if name.startswith("ris_"))
    for name in (*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST):
        if name not in DatasetCatalog:
            close = difflib.get_close_matches(name, known, 1)
            hint = f"did you mean {close[0]}? " if close else ""
            raise ValueError(f"unknown dataset {name!r}; {hint}known: {', '.join(known)}")


def warn_of_smaller_batch(recipe: CfgNode, cfg: CfgNode) -> None:
    """Warn when options shrink the recipe's total batch and keep its learning rate."""
    planned, actual = recipe.SOLVER.IMS_PER_BATCH, cfg.SOLVER.IMS_PER_BATCH
    if actual < planned and cfg.SOLVER.BASE_LR == recipe.SOLVER.BASE_LR:
        logger.warning(
            "SOLVER.IMS_PER_BATCH is %d, the recipe's is %d at the same learning rate. To keep the "
            "recipe on less memory, keep IMS_PER_BATCH and raise SOLVER.RIS.ACCUMULATION; or let "
            "SOLVER.REFERENCE_WORLD_SIZE scale rate and iterations; or set SOLVER.BASE_LR (%.3g if "
            "linear) and MAX_ITER (%d for the same epochs).",
            actual,
            planned,
            cfg.SOLVER.BASE_LR * actual / planned,
            cfg.SOLVER.MAX_ITER * planned // actual,
        )


def main(args: argparse.Namespace) -> dict | None:
    """Run one process. Returns what --eval-only measured, see Trainer.test; None after training."""
    cfg = load_config(args.config_file, args.opts)
    cfg.freeze()
    check_datasets(cfg)
    if args.eval_only or not comm.is_main_process():
        return _work(cfg, args)
    with claim(cfg.OUTPUT_DIR):
        return _work(cfg, args)


def _work(cfg: CfgNode, args: argparse.Namespace) -> dict | None:
    default_setup(cfg, args)
    setup_logger(cfg.OUTPUT_DIR, distributed_rank=comm.get_rank(), name="ris_d2")
    warn_of_smaller_batch(load_config(args.config_file, []), cfg)
    if not args.eval_only:
        trainer = Trainer(cfg)
        trainer.resume_or_load(resume=args.resume)
        trainer.train()
        return None
    model = Trainer.build_model(cfg)
    checkpointer = RISCheckpointer(model, cfg.OUTPUT_DIR, init=cfg.MODEL.INIT)
    resumes = args.resume and checkpointer.has_checkpoint()
    checkpointer.load(checkpointer.get_checkpoint_file() if resumes else cfg.MODEL.WEIGHTS)
    results = Trainer.test(cfg, model)
    if comm.is_main_process():
        verify_results(cfg, results)
    return results


def run(args: argparse.Namespace) -> None:
    """Start the processes, or join those that torchrun started."""
    launch(
        main,
        (args,),
        device=load_config(args.config_file, args.opts).MODEL.DEVICE,
        num_processes=args.num_gpus,
        num_machines=args.num_machines,
        machine_rank=args.machine_rank,
        dist_url=args.dist_url,
    )


if __name__ == "__main__":
    run(default_argument_parser(__doc__).parse_args())
