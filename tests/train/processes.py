"""A small training that several processes share

`torchrun --nproc_per_node 2 tests/train/processes.py OUT`; a word after the folder says what happens to it:
`whole` nothing, `stop` it is stopped, `resume` it goes on, `nan` or `fails` one of the processes breaks.
"""
import json
import signal
import sys
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from toys import build, picture_model

from cprfl.data.dataset import ArrayDataset
from cprfl.train.callbacks import Callback, MeanLoss
from cprfl.train.trainer import predict


class Losses(Callback):
    "The loss of each step, over all processes"
    def before_fit(self, trainer):
        self.mean = next(cb for cb in trainer.callbacks if isinstance(cb, MeanLoss))
        self.values = []
        self.last = float(self.mean.total) if trainer.step else 0.0

    def before_epoch(self, trainer): self.last = 0.0

    def after_batch(self, trainer):
        total, seen = trainer.over_processes(self.mean.total, self.mean.seen)
        self.values.append((float(total) - self.last) / (float(seen) / trainer.step))
        self.last = float(total)


class Stops(Callback):
    "The first process alone is told to stop"
    def after_batch(self, trainer):
        if trainer.is_main and (trainer.epoch, trainer.step) == (2, 4): signal.raise_signal(signal.SIGTERM)


class Breaks(Callback):
    "The last process alone has a loss that is no number, or fails"
    order = -85
    def __init__(self, how): self.how = how
    def after_loss(self, trainer):
        if trainer.is_main or trainer.epoch < 1: return
        if self.how == 'fails': raise ValueError('no luck')
        trainer.loss = trainer.loss * float('nan')


def pictures(n, C=20, size=32):
    "Noise with labels"
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (n, size, size, 3), dtype=np.uint8)
    return ArrayDataset(images, (rng.random((n, C)) < 0.2).astype(np.uint8), [f'class {c}' for c in range(C)])


MORE = dict(stop=[Stops()], nan=[Breaks('nan')], fails=[Breaks('fails')])


def main(out, how=''):
    torch.set_num_threads(1)
    out, data, losses = Path(out), pictures(197), Losses()
    model = picture_model(dropout=0.2 if how else 0.) # each process has a dropout of its own
    model.backbone.requires_grad_(False) # batch statistics are those of a process's own images
    valid = data.subset(range(160, 197))
    settings = dict(epochs=5, lr=2e-3, select='valid', augment='none')
    callbacks = [losses, *MORE.get(how, [])]
    trainer = build(model, data.subset(range(160)), valid, out / 'run', callbacks, **settings)
    trainer.fit(resume=how == 'resume')
    logits = predict(trainer.evaluated, valid, 16, trainer.accelerator)
    if not trainer.is_main: return
    weights = {k: v.contiguous() for k, v in trainer.evaluated.state_dict().items()}
    save_file(weights, out / 'weights.safetensors')
    said = dict(processes=trainer.accelerator.num_processes, losses=losses.values, history=trainer.history)
    (out / 'said.json').write_text(json.dumps(dict(said, logits=logits.tolist())))


if __name__ == '__main__': main(*sys.argv[1:])
