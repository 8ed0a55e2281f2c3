"""train_net.py with the toy model; a script, as spawned processes import the main module anew."""

import ris_toy
import train_net

import ris_d2.config

train_net.Trainer = ris_toy.ToyTrainer
train_net.check_inputs = lambda *args, **kwargs: None  # the toy has no tokenizer
ris_d2.config.get_ris_cfg = lambda: ris_toy.toy_cfg("unset")

if __name__ == "__main__":
    train_net.start(train_net.parse())
