"""Train or evaluate any ris_d2 model.

    python train_net.py --config-file configs/shared_ris_beit3_b.yaml --num-gpus 8
    python train_net.py --config-file C --resume       # from OUTPUT_DIR's last checkpoint
    python train_net.py --config-file C --eval-only MODEL.WEIGHTS model_best.pth
    python train_net.py --config-file C --import my_method.py DATASETS.RIS_JSON '[["mine", "a.json", "images"]]'
    torchrun --nproc-per-node 8 train_net.py --config-file C

Without GPUs, --num-gpus is the number of processes on CPUs.
"""

import argparse
import logging
import os
import sys

# The programs' common ground lies with the tools; a folder "tools" is no package to import from.
sys.path.append(os.path.join(os.path.dirname(os.path.abspath(__file__)), "tools"))

from _program import Parser, load, run


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(__doc__)
    parser.add_config_file(default="", help="a yaml as in configs/")
    parser.add_argument("--eval-only", action="store_true", help="evaluate on DATASETS.TEST")
    parser.add_argument(
        "--resume", action="store_true", help="go on from OUTPUT_DIR's last checkpoint, if any"
    )
    parser.add_argument(
        "--untrained", action="store_true", help="with --eval-only: no MODEL.WEIGHTS are needed"
    )
    parser.add_argument("--num-gpus", type=int, default=1, help="processes of this machine")
    parser.add_argument("--num-machines", type=int, default=1)
    parser.add_argument(
        "--machine-rank", type=int, default=0, help="number of this machine, from 0"
    )
    parser.add_argument(
        "--dist-url",
        default="auto",
        metavar="URL",
        help="where processes meet; auto: a free port of this machine",
    )
    return parser.parse_args(arguments)


if __name__ == "__main__":
    parse()  # --help and mistakes are answered before the imports below, which take seconds

import detectron2
import torch
from detectron2.config import CfgNode
from detectron2.evaluation import verify_results
from detectron2.utils import comm
from detectron2.utils.env import seed_all_rng
from detectron2.utils.logger import setup_logger
from torch.multiprocessing import ProcessExitedException

from ris_d2 import load_config
from ris_d2.checkpoint import RISCheckpointer
from ris_d2.engine import Trainer, claim, launch
from ris_d2.engine.preflight import check_inputs
from ris_d2.io import atomic_write

logger = logging.getLogger("ris_d2.train_net")


def warn_of_smaller_batch(recipe: CfgNode, cfg: CfgNode) -> None:
    """Warn when options shrink the recipe's total batch and keep its learning rate."""
    planned, actual = recipe.SOLVER.IMS_PER_BATCH, cfg.SOLVER.IMS_PER_BATCH
    if actual < planned and cfg.SOLVER.BASE_LR == recipe.SOLVER.BASE_LR:
        iterations = ""  # a length in epochs follows the batch by itself
        if not cfg.SOLVER.RIS.EPOCHS:
            same = cfg.SOLVER.MAX_ITER * planned // actual
            iterations = f" and MAX_ITER ({same} for the same epochs)"
        logger.warning(
            "SOLVER.IMS_PER_BATCH is %d, the recipe's is %d at the same learning rate. To keep the "
            "recipe on less memory, keep IMS_PER_BATCH and raise SOLVER.RIS.ACCUMULATION; or let "
            "SOLVER.REFERENCE_WORLD_SIZE scale rate and iterations; or set SOLVER.BASE_LR (%.3g if "
            "linear)%s.",
            actual,
            planned,
            cfg.SOLVER.BASE_LR * actual / planned,
            iterations,
        )


def set_up(cfg: CfgNode, args: argparse.Namespace) -> None:
    """Logs, OUTPUT_DIR/config.yaml, seeds: detectron2's default_setup without its 600 lines."""
    rank = comm.get_rank()
    for name in ("fvcore", "detectron2", "ris_d2"):
        setup_logger(cfg.OUTPUT_DIR, distributed_rank=rank, name=name)
    path = os.path.join(cfg.OUTPUT_DIR, "config.yaml")
    if comm.is_main_process():
        with atomic_write(path) as file:
            file.write(cfg.dump())
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    logger.info(
        "%d processes, %s, torch %s, detectron2 %s; %s with its changes is in %s",
        comm.get_world_size(),
        device,
        torch.__version__,
        detectron2.__version__,
        args.config_file or "the configuration",
        path,
    )
    seed_all_rng(None if cfg.SEED < 0 else cfg.SEED + rank)
    if not args.eval_only:  # choosing kernels takes longer than a small evaluation
        torch.backends.cudnn.benchmark = cfg.CUDNN_BENCHMARK


def main(args: argparse.Namespace) -> dict | None:
    """Run one process. Returns what --eval-only measured, see Trainer.test; None after training."""
    cfg = load(args)
    cfg.freeze()
    if args.eval_only or not comm.is_main_process():
        return _work(cfg, args)
    with claim(cfg.OUTPUT_DIR):
        return _work(cfg, args)


def _work(cfg: CfgNode, args: argparse.Namespace) -> dict | None:
    set_up(cfg, args)
    if not args.eval_only:
        warn_of_smaller_batch(load_config(args.config_file, modules=args.modules), cfg)
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


def report(args: argparse.Namespace) -> None:
    """``main`` in a process of its own, where nobody else shortens its errors."""
    run(main, args)


def start(args: argparse.Namespace) -> None:
    """Check what is asked for, then start the processes, or join those that torchrun started."""
    cfg = load(args)
    check_inputs(cfg, resume=args.resume, eval_only=args.eval_only, untrained=args.untrained)
    try:
        launch(
            report,
            (args,),
            device=cfg.MODEL.DEVICE,
            num_processes=args.num_gpus,
            num_machines=args.num_machines,
            machine_rank=args.machine_rank,
            dist_url=args.dist_url,
        )
    except ProcessExitedException as error:
        if error.signal_name:
            raise
        sys.exit(error.exit_code)  # the process has said why


if __name__ == "__main__":
    run(start, parse())
