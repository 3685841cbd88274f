"Alignment of features and prompts, on models whose alignment is known"
import warnings

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.metrics import roc_auc_score

from cprfl.data.dataset import MultiLabelDataset
from cprfl.model.cprfl import CPRFL
from cprfl.train.alignment import (
    PurificationRecorder,
    alignment_table,
    purification,
    read_purity,
    roc_auc,
    spread_images,
)
from cprfl.train.config import TrainConfig
from cprfl.train.trainer import Trainer, evaluating


@pytest.fixture
def rng(): return np.random.default_rng(0)


# ---- AUC

def by_ranks(scores, y):
    "AUC of each class from the ranks of its positives, ties sharing theirs"
    ranks, positives = pd.DataFrame(scores).rank().to_numpy(), y.sum(0)
    return ((ranks * y).sum(0) - positives * (positives + 1) / 2) / (positives * (len(y) - positives))


@pytest.mark.parametrize('decimals', [16, 0], ids=['without ties', 'with ties'])
def test_auc_equals_ranks_and_scikit_learn(rng, decimals):
    y = rng.random((300, 6)) < rng.uniform(0.05, 0.6, 6)
    scores = (rng.normal(size=y.shape) + y).round(decimals)
    assert np.allclose(roc_auc(scores, y), roc_auc_score(y, scores, average=None))
    assert np.allclose(roc_auc(scores, y), by_ranks(scores, y))


def test_perfect_scores_have_an_auc_of_one(rng):
    y = rng.random((300, 6)) < 0.3
    assert np.allclose(roc_auc(y + 0.1 * rng.random(y.shape), y), 1)


def test_classes_without_both_kinds_of_image_are_nan():
    y = np.array([[1, 0], [1, 0]])
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        t = alignment_table(np.zeros((2, 2)), np.full((2, 2), 0.5), y, ['a', 'b'], dict(head=[0], medium=[], tail=[1]))
    assert t['auc'].isna().all()
    assert t['positive'].tolist() == pytest.approx([0.5, np.nan], nan_ok=True)
    assert t['negative'].tolist() == pytest.approx([np.nan, 0.5], nan_ok=True)


# ---- a model

class Patches(MultiLabelDataset):
    "Four patches per image; class c lights channel c of patch c"
    _per_image = 'paths', 'targets'
    def __init__(self, n=60, seed=0):
        targets = (np.random.default_rng(seed).random((n, 4)) < 0.5).astype(np.uint8)
        super().__init__([str(i) for i in range(n)], targets, list('wxyz'), dict(head=[0], medium=[1], tail=[2, 3]))
    def __getitem__(self, i):
        y = torch.from_numpy(self.targets[i].astype(np.float32))
        return torch.diag(y), y, i


class Aligned(torch.nn.Module):
    "P' is +p if the image shows the class, and at a right angle to it if not"
    def __init__(self):
        super().__init__()
        self.P = torch.nn.Parameter(torch.tensor([[1., 0], [0, 2], [3, 0], [0, 4]]))
        self.side = torch.nn.Dropout(0.5)
    def prompts(self): return self.P
    def category_features(self, x):
        y = torch.diagonal(x, dim1=1, dim2=2)[..., None]
        return self.side(y * self.P + (1 - y) * self.P.flip(1))
    def from_features(self, x): return (self.category_features(x) * self.P).sum(-1)


def test_a_known_alignment():
    data = Patches()
    t = purification(Aligned(), data)
    assert np.allclose(t[['auc', 'positive', 'negative']], [1, 1, 0])
    assert t['positives'].tolist() == data.class_counts.tolist()


def test_measuring_leaves_the_modes_as_they_were():
    model = Aligned().train()
    model.side.eval()
    purification(model, Patches())
    assert [model.training, model.side.training] == [True, False]


def test_models_without_category_features_are_refused():
    with pytest.raises(ValueError, match='got Linear'): purification(torch.nn.Linear(1, 1), Patches())


def test_evaluating_restores_modes_after_an_error():
    net = torch.nn.Sequential(torch.nn.Linear(1, 1), torch.nn.Dropout())
    net[1].eval()
    with pytest.raises(RuntimeError), evaluating(net):
        assert not net.training
        raise RuntimeError
    assert [net.training, net[0].training, net[1].training] == [True, True, False]


# ---- the recorder

CONFIG = TrainConfig(epochs=3, batch_size=16, lr=1e-2, ema=0.9, device='cpu', select='last')


def fit(folder=None, recorder=None, resume=None):
    torch.manual_seed(0)
    model = CPRFL(None, torch.randn(4, 8), d=16, heads=2, head_dim=8, ffn_dim=16, feature_dim=4)
    callbacks = [recorder] if recorder else []
    return Trainer(model, Patches(), config=CONFIG, folder=folder, callbacks=callbacks, progress=False).fit(resume)


def recorder(cls=PurificationRecorder): return cls(Patches(seed=1), n=20)


class Stop(PurificationRecorder):
    "Ends the training after two epochs"
    def after_epoch(self, trainer):
        super().after_epoch(trainer)
        trainer.stop = trainer.epoch == 2


def test_the_recorder_writes_every_epoch(tmp_path):
    fit(tmp_path, recorder())
    purity = read_purity(tmp_path)
    assert list(purity.columns) == ['epoch', 'class', 'group', 'auc', 'positive', 'negative', 'positives']
    assert purity.groupby('epoch').size().to_dict() == {e: 4 for e in range(4)}


def test_the_recorder_measures_the_evaluated_model(tmp_path):
    watching = recorder()
    trained = fit(tmp_path, watching)
    last = purification(trained.evaluated, watching.dataset)
    assert np.allclose(read_purity(tmp_path).query('epoch == 3')['auc'], last['auc'], atol=1e-6)


def test_the_recorder_only_watches(tmp_path):
    watched, alone = fit(tmp_path, recorder()), fit()
    assert all(torch.equal(a, b) for a, b in zip(watched.evaluated.parameters(), alone.evaluated.parameters()))


def test_the_recorder_survives_a_resume(tmp_path):
    fit(tmp_path / 'whole', recorder())
    fit(tmp_path / 'cut', recorder(Stop))
    fit(tmp_path / 'cut', recorder(), resume=True)
    cut, whole = ((tmp_path / run / 'purity.csv').read_bytes() for run in ('cut', 'whole'))
    assert cut == whole


ODD = ['NA', 'null', '=1+1', 'nan'] # names of classes


def odd_recorder(cls=PurificationRecorder):
    patches = Patches(seed=1)
    patches.classes = ODD
    return cls(patches, n=20)


def test_odd_names_come_back_as_they_were(tmp_path):
    fit(tmp_path, odd_recorder())
    assert read_purity(tmp_path).query('epoch == 3')['class'].tolist() == ODD


def test_odd_names_survive_a_resume(tmp_path):
    fit(tmp_path, odd_recorder(Stop))
    fit(tmp_path, odd_recorder(), resume=True)
    assert read_purity(tmp_path)['class'].tolist() == 4 * ODD


def test_a_spreadsheet_shows_the_names_as_they_are(tmp_path):
    fit(tmp_path, odd_recorder())
    assert ",'=1+1," in (tmp_path / 'purity.csv').read_text()


def test_a_run_without_the_recorder_says_so(tmp_path):
    with pytest.raises(FileNotFoundError, match='trained without a PurificationRecorder'): read_purity(tmp_path)


def test_spread_images_reach_rare_classes(rng):
    y = rng.random((2000, 20)) < np.geomspace(0.005, 0.5, 20)
    chosen = spread_images(y, 200)
    assert len(set(chosen)) == 200
    assert (y[chosen].sum(0) >= np.minimum(y.sum(0), 9)).all()


def test_spread_images_depend_on_the_seed(rng):
    y = rng.random((2000, 20)) < 0.1
    assert np.array_equal(spread_images(y, 200), spread_images(y, 200))
    assert not np.array_equal(spread_images(y, 200), spread_images(y, 200, seed=1))
