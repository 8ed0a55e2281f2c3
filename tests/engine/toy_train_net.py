"""train_net.py with the toy model; a script, as spawned processes import the main module anew."""

import ris_toy
import train_net
from detectron2.engine import default_argument_parser

import ris_d2.config

train_net.Trainer = ris_toy.ToyTrainer
ris_d2.config.get_ris_cfg = lambda: ris_toy.toy_cfg("unset")

if __name__ == "__main__":
    train_net.run(default_argument_parser().parse_args())
