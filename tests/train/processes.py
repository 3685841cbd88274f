"A small training that several processes share: `torchrun --nproc_per_node 2 tests/processes.py OUT`; with `stop` it is cut off, with `resume` it goes on, with `nan` or `fails` one of them breaks"
import json
import signal
import sys
from pathlib import Path

import torch

from cprfl.data.shapes import shapes_lt
from cprfl.model.backbones import build_backbone
from cprfl.model.cprfl import CPRFL
from cprfl.train.callbacks import Callback, MeanLoss
from cprfl.train.config import TrainConfig
from cprfl.train.trainer import Trainer, predict


class Losses(Callback):
    "The loss of each step, over all processes"
    def before_fit(self, trainer):
        self.mean = next(cb for cb in trainer.callbacks if isinstance(cb, MeanLoss))
        self.values = []
        self.last = float(self.mean.total) if trainer.step else 0.0
    def before_epoch(self, trainer): self.last = 0.0
    def after_batch(self, trainer):
        total, seen = trainer.over_processes(self.mean.total, self.mean.seen)
        self.values.append((float(total) - self.last) / (seen / trainer.step))
        self.last = float(total)


class Stops(Callback):
    "The first process alone is told to stop"
    def after_batch(self, trainer):
        if trainer.is_main and (trainer.epoch, trainer.step) == (2, 4): signal.raise_signal(signal.SIGTERM)


class Breaks(Callback):
    "The last process alone meets a loss that is no number, or fails"
    order = -85
    def __init__(self, how): self.how = how
    def after_loss(self, trainer):
        if trainer.is_main or trainer.epoch < 1: return
        if self.how == 'fails': raise ValueError('no luck')
        trainer.loss = trainer.loss * float('nan')


MORE = dict(stop=Stops(), nan=Breaks('nan'), fails=Breaks('fails'))


def main(out, how=''):
    torch.set_num_threads(1)
    torch.manual_seed(0)
    backbone = build_backbone('resnet10t', channels=(8, 8, 16, 16))
    for p in backbone.parameters(): p.requires_grad_(False)  # batch statistics are those of a process's own images
    model = CPRFL(backbone, torch.randn(20, 12, generator=torch.Generator().manual_seed(0)), d=16, heads=2, head_dim=8, ffn_dim=16, dropout=0.2 if how else 0.0)
    config = TrainConfig(epochs=5, batch_size=16, lr=2e-3, ema=0.9, device='cpu', select='valid', augment='none')
    data, losses = shapes_lt('train'), Losses()
    trainer = Trainer(model, data.subset(range(160)), data.subset(range(160, 197)), config, [losses, *([MORE[how]] if how in MORE else [])], Path(out) / 'run', progress=False).fit(resume=how == 'resume')
    logits = predict(trainer.evaluated, data.subset(range(160, 197)), 16, trainer.accelerator)
    if trainer.is_main:
        from safetensors.torch import save_file
        save_file({k: v.contiguous() for k, v in trainer.evaluated.state_dict().items()}, Path(out) / 'weights.safetensors')
        (Path(out) / 'said.json').write_text(json.dumps(dict(processes=trainer.accelerator.num_processes, losses=losses.values, history=trainer.history, logits=logits.tolist())))


if __name__ == '__main__': main(*sys.argv[1:])
