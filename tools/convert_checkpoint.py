"""Convert published weights to the names of ris_d2.

    python tools/convert_checkpoint.py --source S IN OUT

For backbones (beit3) the result serves in MODEL.INIT like the published file, without its unused
heads.
"""

import argparse
import logging

from _program import Parser, run


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(__doc__)
    parser.add_argument("--source", required=True, help="published format: beit3, swin, sam, ...")
    parser.add_argument(
        "input", metavar="IN", help="published file: path, https://, hf://, timm://"
    )
    parser.add_argument("output", metavar="OUT", help="file to write (.pth)")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    parse()  # --help and mistakes are answered before the imports below, which take seconds

import torch

from ris_d2.checkpoint import convert_state_dict, read_weights
from ris_d2.checkpoint.converters import get_converter
from ris_d2.checkpoint.paths import local_path
from ris_d2.io import atomic_write, reading

logger = logging.getLogger("convert_checkpoint")


def main(arguments: list[str] | None = None) -> None:
    args = parse(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")

    get_converter(args.source)  # an unknown one is said before a large file is read
    published = read_weights(local_path(args.input))
    with reading(args.input):
        state_dict = convert_state_dict(published, args.source)
    with atomic_write(args.output, "wb") as file:
        torch.save({"model": state_dict, "converted_from": args.source}, file)
    count = sum(tensor.numel() for tensor in state_dict.values())
    logger.info("%s: %d tensors, %.1fM numbers", args.output, len(state_dict), count / 1e6)


if __name__ == "__main__":
    run(main)
