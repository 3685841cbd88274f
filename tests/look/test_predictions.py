"Top-3 tables, prompt drift and purification, on constructed cases"
import warnings

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from sklearn.decomposition import PCA
from sklearn.metrics import roc_auc_score

from cprfl.data.dataset import ArrayDataset, MultiLabelDataset
from cprfl.look.predictions import (
    align_predictions,
    as_dataset,
    flip_table,
    load_images,
    telling_images,
    top_k_report,
    top_k_table,
)
from cprfl.look.prompts import class_similarity, neighbour_changes, prompt_drift, prompt_trajectories, similarity_change
from cprfl.model.cprfl import CPRFL
from cprfl.train.alignment import (
    PurificationRecorder,
    evaluating,
    purification,
    read_purity,
    roc_auc,
    alignment_table,
    spread_images,
)
from cprfl.train.config import TrainConfig
from cprfl.train.trainer import Trainer

CLASSES, GROUPS = list('abcdef'), dict(head=[0, 1], medium=[2, 3], tail=[4, 5])


@pytest.fixture
def rng(): return np.random.default_rng(0)


@pytest.fixture
def three(rng):
    targets = (rng.random((80, 6)) < 0.3).astype(int)
    return {m: rng.normal(size=(80, 6)) + lift * targets for m, lift in dict(erm=1, clip=0.5, cprfl=2).items()}, targets


def _frame(logits, paths, classes=CLASSES): return pd.DataFrame(logits, columns=classes).assign(path=paths)[['path', *classes]]


def _dataset(targets, paths): return ArrayDataset(np.zeros((len(paths), 2, 2, 3), np.uint8), targets, CLASSES, groups=GROUPS, paths=paths)


# predictions

def test_runs_are_aligned_by_path_and_by_class_name(three, rng):
    predictions, targets = three
    paths, order, columns = [f'{i}.jpg' for i in range(80)], rng.permutation(80), rng.permutation(6)
    shuffled = _frame(predictions['erm'][order][:, columns], [paths[i] for i in order], [CLASSES[c] for c in columns])
    back = rng.permutation(80)
    p = align_predictions(dict(cprfl=_frame(predictions['cprfl'], paths), erm=shuffled), _dataset(targets[back], [paths[i] for i in back]))
    assert np.allclose(p.logits['erm'], predictions['erm']) and np.array_equal(p.targets, targets)
    assert p.softmax == () and p.groups is GROUPS


@pytest.mark.parametrize('paths,message', [(['0', '1', '9'], "2 are in one of them only, such as '2', '9'"), (['0', '1', '2', '2'], 'occur twice')])
def test_different_image_sets_are_refused(rng, paths, message):
    a, b = _frame(rng.normal(size=(3, 6)), ['0', '1', '2']), _frame(rng.normal(size=(len(paths), 6)), paths)
    with pytest.raises(ValueError, match=message): align_predictions(dict(a=a, b=b), _dataset(np.zeros((3, 6), int), ['0', '1', '2']))


def test_a_dataset_without_the_predicted_images_is_refused(rng):
    with pytest.raises(ValueError, match="lacks 1 of 2 predicted images, such as 'y'"):
        align_predictions(dict(a=_frame(rng.normal(size=(2, 6)), ['x', 'y'])), _dataset(np.zeros((1, 6), int), ['x']))


def test_the_report_counts_as_a_loop_does(three):
    predictions, targets = three
    report = top_k_report(predictions, targets, GROUPS, k=3).set_index(['model', 'group'])
    for name, logits in predictions.items():
        for g, ids in {**GROUPS, 'total': range(6)}.items():
            named = {(i, c) for i, row in enumerate(logits) for c in np.argsort(-row)[:3] if c in ids}
            true = {(i, c) for i, c in zip(*np.nonzero(targets)) if c in ids}
            row = report.loc[name, g]
            assert row['recall'] == pytest.approx(len(named & true) / len(true))
            assert row['precision'] == pytest.approx(len(named & true) / len(named))
            each = [len({p for p in named & true if p[1] == c}) / len({p for p in true if p[1] == c}) for c in ids]
            assert row['class_recall'] == pytest.approx(np.mean(each))


def test_the_table_agrees_with_the_report_and_scores_are_probabilities(three):
    predictions, targets = three
    table = top_k_table(predictions, targets, CLASSES, GROUPS, softmax=['clip'])
    report = top_k_report(predictions, targets, GROUPS).set_index(['model', 'group'])
    assert table.groupby('model')['right'].sum().to_dict() == report.xs('total', level='group')['hits'].to_dict()
    assert table['score'].between(0, 1).all() and (table.groupby(['model', 'image'])['score'].is_monotonic_decreasing).all()
    assert table.query("model == 'clip'").groupby('image')['score'].sum().max() <= 1
    assert table.set_index('class')['group'].to_dict() == dict(a='head', b='head', c='medium', d='medium', e='tail', f='tail')


def test_groups_and_classes_without_images_give_nan_not_zero():
    report = top_k_report(dict(m=np.zeros((2, 6))), np.eye(2, 6), dict(head=[0, 1], medium=[], tail=[5]), k=1).set_index('group')
    assert np.isnan(report.loc['tail', ['recall', 'class_recall']].astype(float)).all() and np.isnan(report.loc['medium', 'precision'])


def test_flips_add_up(three):
    predictions, targets = three
    flips = flip_table(predictions, targets, GROUPS).set_index(['right', 'wrong', 'group'])['count']
    hits = top_k_report(predictions, targets, GROUPS).set_index(['model', 'group'])['hits']
    assert len(flips) == 6 * 4
    for (a, b, g), n in flips.items(): assert n - flips[b, a, g] == hits[a, g] - hits[b, g]
    assert all(sum(flips[a, b, g] for g in GROUPS) == flips[a, b, 'total'] for a in predictions for b in predictions if a != b)


def test_telling_images_keep_their_definitions(three):
    predictions, targets = three
    top = {m: np.argsort(-x, axis=1)[:, :3] for m, x in predictions.items()}
    found = {m: np.array([[c in t and y[c] for c in range(6)] for t, y in zip(top[m], targets)]) for m in top}
    fixed = telling_images(predictions, targets, GROUPS, 'fixed', n=100)
    gain = (found['cprfl'] & ~found['erm'] & ~found['clip']).sum(1)
    assert set(fixed) == set(np.flatnonzero(gain)) and (np.diff(gain[fixed]) <= 0).all()
    failed = telling_images(predictions, targets, GROUPS, 'all_fail', n=100)
    missed = (targets.astype(bool) & ~found['cprfl'] & ~found['erm'] & ~found['clip']).sum(1) / np.maximum(targets.sum(1), 1)
    assert set(failed) == set(np.flatnonzero(missed)) and (np.diff(missed[failed]) <= 0).all()
    assert targets[telling_images(predictions, targets, GROUPS, 'tail', n=100)][:, [4, 5]].any(1).all()
    draws = [telling_images(predictions, targets, GROUPS, 'random', n=5, seed=s).tolist() for s in (0, 0, 1)]
    assert draws[0] == draws[1] != draws[2] and targets[draws[0]].any(1).all()


def test_tail_classes_take_turns():
    targets = np.zeros((30, 6), int)
    targets[:28, 4], targets[28:, 5] = 1, 1
    pick = telling_images(dict(cprfl=np.zeros((30, 6))), targets, GROUPS, 'tail', n=4)
    assert sorted(targets[pick].argmax(1)) == [4, 4, 5, 5]


# prompts

def _rotation(d, degrees):
    "A rotation that turns every vector of R^d, d even, by the same angle"
    a = np.radians(degrees)
    return torch.block_diag(*[torch.tensor([[np.cos(a), np.sin(a)], [-np.sin(a), np.cos(a)]], dtype=torch.float32)] * (d // 2))


@pytest.fixture
def rotated():
    P = torch.randn(6, 8, generator=torch.Generator().manual_seed(0))
    return {e: P @ _rotation(8, 15 * e) * (1 + e) for e in (0, 1, 2, 3)}


def test_drift_of_a_known_rotation(rotated):
    drift = prompt_drift(rotated, CLASSES, GROUPS)
    assert list(drift.columns) == ['epoch', 'class', 'group', 'cosine', 'distance', 'relative', 'step', 'norm'] and len(drift) == 4 * 6
    for e, t in drift.groupby('epoch'):
        cos = np.cos(np.radians(15 * e))
        assert np.allclose(t['cosine'], cos, atol=1e-5)
        assert np.allclose(t['relative'], np.sqrt(1 + (1 + e)**2 - 2 * (1 + e) * cos), atol=1e-4)  # the law of cosines
        assert np.allclose(t['norm'], (1 + e) * rotated[0].norm(dim=1), atol=1e-4)
        previous = rotated[max(e - 1, 0)]
        assert np.allclose(t['step'], (rotated[e] - previous).norm(dim=1), atol=1e-4)


def test_a_rotation_of_all_prompts_changes_no_relation(rotated):
    sim = similarity_change(rotated, CLASSES)
    assert sim['change'].abs().to_numpy().max() < 1e-5
    assert np.allclose(sim['before'], torch.nn.functional.cosine_similarity(rotated[0][:, None], rotated[0][None], dim=-1), atol=1e-6)
    assert (neighbour_changes(rotated, CLASSES, GROUPS)['kept'] == 1).all()


def test_centring_takes_the_common_direction_away():
    P = torch.eye(6) + 50
    assert class_similarity(P, CLASSES).to_numpy().min() > 0.99
    off = class_similarity(P, CLASSES, centre=True).to_numpy()[~np.eye(6, dtype=bool)]
    assert np.allclose(off, -1 / 5, atol=1e-4)


def test_one_pca_for_all_epochs_equals_scikit_learn(rotated):
    paths, explained = prompt_trajectories(rotated, CLASSES, GROUPS, components=3)
    reference = PCA(3).fit(torch.cat([rotated[e] for e in range(4)]).numpy())
    assert np.allclose(explained, reference.explained_variance_ratio_, atol=1e-5)
    ours = paths[['pc1', 'pc2', 'pc3']].to_numpy()
    theirs = reference.transform(torch.cat([rotated[e] for e in range(4)]).numpy())
    assert np.allclose(np.abs(ours), np.abs(theirs), atol=1e-3)  # axes may point either way
    with pytest.raises(ValueError, match='at most 8'): prompt_trajectories(rotated, CLASSES, GROUPS, components=9)


def test_neighbours_that_change():
    before, after = torch.eye(6), torch.eye(6)
    before[0, 1] = before[1, 0] = 0.5
    after[0, 5] = after[5, 0] = 0.5
    row = neighbour_changes({0: before, 7: after}, CLASSES, GROUPS, k=1).iloc[0]
    assert (row['before'], row['after'], row['kept']) == (['b'], ['f'], 0)


# purification

def test_auc_equals_scikit_learn_with_ties_and_without(rng):
    y = rng.random((300, 6)) < rng.uniform(0.05, 0.6, 6)
    for scores in (rng.normal(size=y.shape) + y, (rng.normal(size=y.shape) + y).round()):
        assert np.allclose(roc_auc(scores, y), roc_auc_score(y, scores, average=None))
    assert np.allclose(roc_auc(y * 1. + 0.1 * rng.random(y.shape), y), 1)


def test_classes_with_positives_or_negatives_only_are_nan_and_warn_not():
    y = np.array([[1, 0], [1, 0]])
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        t = alignment_table(np.zeros((2, 2)), np.full((2, 2), 0.5), y, ['a', 'b'], dict(head=[0], medium=[], tail=[1]))
    assert t['auc'].isna().all() and np.isnan(t.loc[0, 'negative']) and np.isnan(t.loc[1, 'positive']) and t.loc[0, 'positive'] == 0.5


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
    "P' is +p where the image shows the class, and at a right angle to it where not"
    def __init__(self): super().__init__(); self.P = torch.nn.Parameter(torch.tensor([[1., 0], [0, 2], [3, 0], [0, 4]])); self.side = torch.nn.Dropout(0.5)
    def prompts(self): return self.P
    def category_features(self, x):
        y = torch.diagonal(x, dim1=1, dim2=2)[..., None]
        return self.side(y * self.P + (1 - y) * self.P.flip(1))
    def from_features(self, x): return (self.category_features(x) * self.P).sum(-1)


def test_purification_of_a_known_alignment():
    data, model = Patches(), Aligned().train()
    model.side.eval()
    t = purification(model, data)
    assert np.allclose(t['auc'], 1) and np.allclose(t['positive'], 1) and np.allclose(t['negative'], 0)
    assert t['positives'].tolist() == data.class_counts.tolist()
    assert model.training and not model.side.training  # modes as they were
    with pytest.raises(ValueError, match='got Linear'): purification(torch.nn.Linear(1, 1), data)


def test_evaluating_restores_modes_after_an_error():
    net = torch.nn.Sequential(torch.nn.Linear(1, 1), torch.nn.Dropout())
    net[1].eval()
    with pytest.raises(RuntimeError), evaluating(net):
        assert not net.training
        raise RuntimeError
    assert net.training and net[0].training and not net[1].training


def _cprfl():
    torch.manual_seed(0)
    return CPRFL(None, torch.randn(4, 8), d=16, heads=2, head_dim=8, ffn_dim=16, feature_dim=4)


def test_the_recorder_writes_every_epoch_watches_only_and_survives_a_resume(tmp_path):
    config = TrainConfig(epochs=3, batch_size=16, lr=1e-2, ema=0.9, device='cpu', select='last')
    recorder = PurificationRecorder(Patches(seed=1), n=20)
    one = Trainer(_cprfl(), Patches(), config=config, folder=tmp_path / 'a', callbacks=[recorder], progress=False).fit()
    purity = read_purity(tmp_path / 'a')
    assert list(purity.columns) == ['epoch', 'class', 'group', 'auc', 'positive', 'negative', 'positives']
    assert purity.groupby('epoch').size().to_dict() == {e: 4 for e in range(4)}
    last = purification(one.evaluated, recorder.dataset)
    assert np.allclose(purity.query('epoch == 3')['auc'], last['auc'], atol=1e-6)

    alone = Trainer(_cprfl(), Patches(), config=config, progress=False).fit()
    assert all(torch.equal(a, b) for a, b in zip(one.evaluated.parameters(), alone.evaluated.parameters()))

    class Stop(PurificationRecorder):
        def after_epoch(self, trainer): super().after_epoch(trainer); trainer.stop = trainer.epoch == 2
    for cb, resume in ((Stop, None), (PurificationRecorder, True)):
        Trainer(_cprfl(), Patches(), config=config, folder=tmp_path / 'b', callbacks=[cb(Patches(seed=1), n=20)], progress=False).fit(resume)
    pd.testing.assert_frame_equal(read_purity(tmp_path / 'b'), purity)


def test_a_run_without_the_recorder_says_so(tmp_path):
    with pytest.raises(FileNotFoundError, match='trained without a PurificationRecorder'): read_purity(tmp_path)


def test_spread_images_reach_rare_classes(rng):
    y = rng.random((2000, 20)) < np.geomspace(0.005, 0.5, 20)
    chosen = spread_images(y, 200)
    assert len(chosen) == len(set(chosen)) == 200 and (y[chosen].sum(0) >= np.minimum(y.sum(0), 9)).all()
    assert np.array_equal(chosen, spread_images(y, 200)) and not np.array_equal(chosen, spread_images(y, 200, seed=1))


# own images

def test_images_from_folders_files_lists_and_uploads(tmp_path, rng):
    (tmp_path / 'sub').mkdir()
    files = [tmp_path / 'a.png', tmp_path / 'sub' / 'b.png']
    for f in files: Image.fromarray(rng.integers(0, 256, (20, 30, 3), dtype=np.uint8)).save(f)
    (tmp_path / 'notes.txt').write_text('no image')
    folder, names = load_images(tmp_path, 8)
    assert (folder.dtype, list(folder.shape), names) == (torch.uint8, [2, 3, 8, 8], ['a.png', 'sub/b.png'])
    for source in (files, {f.name: f.read_bytes() for f in files}, {f.name: memoryview(f.read_bytes()) for f in files}):
        assert torch.equal(load_images(source, 8)[0], folder)
    assert torch.equal(load_images(files[0], 8)[0], folder[:1])
    data = as_dataset(folder, names, CLASSES, GROUPS)
    assert torch.equal(data[1][0], folder[1]) and data.paths == names and not data.targets.any() and data.groups is GROUPS


def test_bad_images_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match='no such file or folder'): load_images(tmp_path / 'none', 8)
    with pytest.raises(ValueError, match='no image in'): load_images(tmp_path, 8)
    with pytest.raises(ValueError, match='holiday.jpg'): load_images({'holiday.jpg': b'not a picture'}, 8)
