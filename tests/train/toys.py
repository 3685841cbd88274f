"What the tests of the trainer share: small data, small models, short trainings, and ways to interrupt them"
import numpy as np
import torch
from torch import nn

from cprfl.data.dataset import MultiLabelDataset
from cprfl.model.backbones import build_backbone
from cprfl.model.cprfl import CPRFL
from cprfl.train.callbacks import Callback
from cprfl.train.config import TrainConfig
from cprfl.train.trainer import Trainer

# ---- a task for one layer

class Toy(MultiLabelDataset):
    "Features [1, 16] in which each class has a direction of its own"
    _per_image = 'paths', 'targets', 'x'

    def __init__(self, n=64, C=3, targets=None):
        rng = np.random.default_rng(0)
        if targets is None: targets = (rng.random((n, C)) < 0.4).astype(np.uint8)
        n, C = targets.shape
        super().__init__([f'toy/{i:03d}' for i in range(n)], targets, [f'class {c}' for c in range(C)])
        x = targets @ rng.normal(size=(C, 16)) + 0.3 * rng.normal(size=(n, 16))
        self.x = torch.from_numpy(x.astype(np.float32))[:, None]

    def __getitem__(self, i): return self.x[i], torch.from_numpy(self.targets[i].astype(np.float32)), i


class Head(nn.Module):
    "One layer, always with the same first weights"
    def __init__(self, C=3):
        super().__init__()
        torch.manual_seed(0)
        self.fc = nn.Linear(16, C)

    def forward(self, x): return self.fc(x.mean(1))


class Dropping(Head):
    "With dropout, so that a step is random"
    def forward(self, x): return super().forward(nn.functional.dropout(x, 0.3, self.training))


def feature_model(**kw):
    "A CPRFL for the features of `Toy`"
    torch.manual_seed(0)
    return CPRFL(None, torch.randn(3, 8), d=16, heads=2, head_dim=8, ffn_dim=16, feature_dim=16, **kw)


# ---- and for images

def picture_model(C=20, seed=0, **kw):
    "A CPRFL with a small ResNet, dropout and batch statistics"
    torch.manual_seed(seed)
    backbone = build_backbone('resnet10t', channels=(8, 8, 16, 16))
    semantics = torch.randn(C, 12, generator=torch.Generator().manual_seed(0))
    return CPRFL(backbone, semantics, **(dict(d=16, heads=2, head_dim=8, ffn_dim=16, dropout=0.2) | kw))


# ---- trainings

def config(**settings):
    small = dict(epochs=3, batch_size=16, lr=0.02, ema=0.9, device='cpu', select='last')
    return TrainConfig(**(small | settings))


def build(model=None, data=None, valid=None, folder=None, callbacks=(), **settings):
    "A trainer, by default of one layer on the toy task"
    model = Head() if model is None else model
    data = Toy() if data is None else data
    return Trainer(model, data, valid, config(**settings), callbacks, folder, progress=False)


def toy(folder=None, callbacks=(), data=None, model=None, resume=None, **settings):
    "One layer, trained on the toy task"
    return build(model, data, folder=folder, callbacks=callbacks, **settings).fit(resume)


def paint(pictures, folder=None, callbacks=(), model=None, resume=None, **settings):
    "A CPRFL, trained on images"
    model = picture_model() if model is None else model
    return toy(folder, callbacks, pictures, model, resume, **(dict(lr=2e-3) | settings))


# ---- what two trainings must agree in

def equal_tensors(a, b):
    "Whether two dicts of tensors have the same names and the same bits"
    return a.keys() == b.keys() and all(torch.equal(v, b[k]) for k, v in a.items())


def without_seconds(rows): return [{k: v for k, v in row.items() if k != 'seconds'} for row in rows]


def same(a, b):
    "Whether two trainings have the same weights, the same history and the same best epoch, bit for bit"
    if a.best_epoch != b.best_epoch: return False
    histories = [str(without_seconds(trainer.history)) for trainer in (a, b)] # as text, in which NaN equals NaN
    if histories[0] != histories[1]: return False
    return equal_tensors(a.evaluated.state_dict(), b.evaluated.state_dict())


# ---- interruptions

class StopAfter(Callback):
    "An end that was planned"
    def __init__(self, epochs): self.epochs = epochs
    def after_epoch(self, trainer): trainer.stop = trainer.epoch >= self.epochs


class CutOff(Callback):
    "An interrupt in the middle of an epoch, of which no state is kept"
    def __init__(self, epoch): self.epoch = epoch
    def after_batch(self, trainer):
        if trainer.epoch == self.epoch: raise KeyboardInterrupt


def states(folder): return sorted(f.name for f in (folder / 'state').iterdir())
