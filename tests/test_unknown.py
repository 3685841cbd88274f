"Unknown labels: as if they were not in the table, in losses, metrics, counts, intervals, figures and training"
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from sklearn.metrics import average_precision_score, precision_score, recall_score, roc_auc_score

from cprfl.data.dataset import ArrayDataset
from cprfl.data.longtail import class_counts, frequency_groups, imbalance_summary, known_counts, stratified_split
from cprfl.look.predictions import flip_table, telling_images, top_k_report, top_k_table
from cprfl.losses import available_losses, build_loss
from cprfl.metrics import average_precision, format_report, multilabel_report
from cprfl.model.baselines import label_correlation
from cprfl.statistics import bootstrap_ap, bootstrap_classes, bootstrap_map, paired_bootstrap
from cprfl.train import TrainConfig, Trainer
from cprfl.train.alignment import alignment_table, roc_auc, spread_images
from cprfl.train.callbacks import MeanLoss
from cprfl.train.trainer import EpochSampler, loss_for

NAMES = available_losses()[:12]
COUNTS, IMAGES = [700, 120, 60, 20, 4], 1142
GROUPS = {'common': [0, 1, 2], 'rare': [3, 4]}


def partly(n=60, c=5, share=0.4, seed=0):
    "Scores, and targets of which a share is unknown"
    rng = np.random.default_rng(seed)
    y = (rng.random((n, c)) < 0.3).astype(np.int8)
    scores = rng.normal(size=(n, c)) + y
    return scores, np.where(rng.random((n, c)) < share, -1, y).astype(np.int8)


@pytest.fixture
def table(): return partly()


@pytest.fixture
def batch():
    x, y = partly(16)
    y[:, 4] = y[:, 4] > 0  # the rarest class is always known
    return torch.tensor(x), torch.tensor(y)


# ---- losses

def one_by_one(name, x, y):
    "The losses of the known labels, image by image, each image with its known classes alone"
    out = []
    for scores, answers in zip(x, y):
        kept = answers >= 0
        loss = build_loss(name, np.array(COUNTS)[kept], IMAGES, reduction='none')
        out.append(loss(scores[kept][None], answers[kept][None])[0])
    return torch.cat(out)


@pytest.mark.parametrize('name', NAMES)
def test_the_loss_is_that_of_the_known_labels(name, batch):
    want = one_by_one(name, *batch)
    torch.testing.assert_close(build_loss(name, COUNTS, IMAGES)(*batch), want.mean())
    torch.testing.assert_close(build_loss(name, COUNTS, IMAGES, reduction='sum')(*batch), want.sum())


@pytest.mark.parametrize('name', NAMES)
def test_without_reduction_unknown_labels_are_zero(name, batch):
    x, y = batch
    value = build_loss(name, COUNTS, IMAGES, reduction='none')(x, y)
    torch.testing.assert_close(value[y >= 0], one_by_one(name, x, y))
    assert not value[y < 0].any()


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize('name', NAMES)
def test_unknown_labels_have_no_gradient(name, dtype, batch):
    x, y = batch[0].to(dtype).requires_grad_(), batch[1]
    build_loss(name, COUNTS, IMAGES)(x, y).backward()
    assert not x.grad[y < 0].any()
    assert x.grad[y > 0].all()


@pytest.mark.parametrize('bad', [float('nan'), float('inf'), 1e30])
@pytest.mark.parametrize('name', NAMES)
def test_what_is_said_at_unknown_labels_does_not_matter(name, bad, batch):
    x, y = batch
    said = torch.where(y < 0, bad, x).requires_grad_()
    value = build_loss(name, COUNTS, IMAGES)(said, y)
    value.backward()
    torch.testing.assert_close(value, build_loss(name, COUNTS, IMAGES)(x, y))
    assert said.grad.isfinite().all()


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize('reduction', ['mean', 'sum'])
@pytest.mark.parametrize('name', NAMES)
def test_nothing_known_is_no_loss(name, reduction, dtype):
    x = torch.randn(3, 5).to(dtype).requires_grad_()
    value = build_loss(name, COUNTS, IMAGES, reduction=reduction)(x, -torch.ones(3, 5))
    value.backward()
    assert value.item() == 0
    assert not x.grad.any()


@pytest.mark.parametrize('dtype', [torch.int8, torch.int64, torch.float16, torch.bfloat16, torch.float64])
def test_unknown_labels_of_any_type(dtype, batch):
    x, y = batch
    for name in NAMES:
        loss = build_loss(name, COUNTS, IMAGES)
        assert torch.equal(loss(x, y.to(dtype)), loss(x, y))


def test_soft_labels_may_stand_beside_unknown_ones():
    value = build_loss('bce')(torch.zeros(1, 3), torch.tensor([[0.3, -1., 1.]]))
    assert value.item() == pytest.approx(np.log(2))


@pytest.mark.parametrize('bad', [-0.5, -2, 1.5, float('nan')])
def test_other_numbers_are_no_labels(bad):
    with pytest.raises(ValueError, match='targets: expected 0 or 1 .*-1 would stand for an unknown label'):
        build_loss('asl')(torch.randn(1, 2), torch.tensor([[0, bad]]))


def test_swapped_arguments_are_noticed():
    y = torch.tensor([[0., 1.], [1., 0.]])
    loss, x = build_loss('bce'), torch.tensor([[1.5, -0.3], [-2.2, 0.6]])
    with pytest.raises(ValueError, match='are logits and targets swapped'): loss(y, x)
    with pytest.raises(TypeError, match='are logits and targets swapped'): loss(y.long(), x)


@pytest.mark.parametrize('name', ['rw_inv', 'rw_sqrt_inv', 'cb_focal', 'db_focal', 'db_nofocal'])
def test_a_class_counts_its_known_images(name, batch):
    "Weights from N_c are those of a training set with N_c images"
    x, y = torch.randn(4, 1), torch.tensor([[0], [1], [1], [0]])
    unknown = -torch.ones(4, 1)
    both = build_loss(name, [20, 20], [1000, 200], reduction='none')(x.expand(4, 2), torch.cat([y, unknown], 1))
    alone = build_loss(name, [20], 1000, reduction='none')(x, y)
    torch.testing.assert_close(both[:, :1], alone)


def test_numbers_of_images_are_checked():
    with pytest.raises(ValueError, match=r'num_samples: expected one number, or one for each of 2 classes, got \[3\]'):
        build_loss('rw_inv', [1, 2], [5, 5, 5])
    assert build_loss('rw_inv', [0, 2], [0, 5])(torch.zeros(1, 2), torch.tensor([[-1, 1]])).isfinite()


# ---- metrics

@pytest.mark.parametrize('seed', range(5))
@pytest.mark.parametrize('decimals', [None, 1, 0])
@pytest.mark.parametrize('kind', [np.asarray, torch.tensor])
def test_ap_is_scikit_learn_on_the_known_rows(seed, decimals, kind):
    x, y = partly(seed=seed)
    if decimals is not None: x = x.round(decimals)
    want = [average_precision_score(y[k, c], x[k, c]) for c, k in enumerate((y >= 0).T)]
    np.testing.assert_allclose(average_precision(kind(x), kind(y)), want, rtol=1e-12)


@pytest.mark.parametrize('seed', range(30))
def test_ap_of_small_tied_lists(seed):
    rng = np.random.default_rng(seed)
    x, y = rng.integers(0, 3, (rng.integers(1, 9), 4)).astype(float), rng.integers(-1, 2, (9, 4))
    y = y[:len(x)]
    for c, got in enumerate(average_precision(x, y)):
        known = y[:, c] >= 0
        want = average_precision_score(y[known, c], x[known, c]) if (y[:, c] > 0).any() else np.nan
        assert got == pytest.approx(want, nan_ok=True)


def test_infinite_scores_at_unknown_labels_do_not_matter(table):
    x, y = table
    for value in (np.inf, -np.inf):
        np.testing.assert_allclose(average_precision(np.where(y < 0, value, x), y), average_precision(x, y))


def test_decisions_are_scikit_learn_on_the_known_labels(table):
    x, y = table
    r, known = multilabel_report(x, y), y >= 0
    said = 1 / (1 + np.exp(-x)) >= 0.5
    assert r['OP'] == pytest.approx(precision_score(y[known], said[known]))
    assert r['OR'] == pytest.approx(recall_score(y[known], said[known]))
    columns = [(y[k, c], said[k, c]) for c, k in enumerate(known.T)]
    assert r['CP'] == pytest.approx(np.mean([precision_score(*pair, zero_division=0) for pair in columns]))
    assert r['CR'] == pytest.approx(np.mean([recall_score(*pair) for pair in columns]))


@pytest.mark.parametrize('k', [1, 2, 5])
def test_top_k_is_that_of_the_model(table, k):
    x, y = table
    best = np.argsort(np.argsort(-x, axis=1), axis=1) < k
    said, known = best & (1 / (1 + np.exp(-x)) >= 0.5), y >= 0
    r = multilabel_report(x, y, topk=k)
    assert r['topk']['OP'] == pytest.approx(precision_score(y[known], said[known]))
    assert r['topk']['OR'] == pytest.approx(recall_score(y[known], said[known]))


def test_a_report_with_everything_known_is_as_before(table):
    x, y = table
    a, b = multilabel_report(x, y > 0, GROUPS), multilabel_report(x, (y > 0).astype(np.int8), GROUPS)
    assert a['num_unknown'] == 0
    np.testing.assert_array_equal(a.pop('ap'), b.pop('ap'))
    assert a == b


def test_means_are_over_classes_with_a_known_positive(table):
    x, y = table[0], table[1].copy()
    y[:, 3] = -1
    y[:, 4] = np.minimum(y[:, 4], 0)
    r = multilabel_report(x, y, GROUPS)
    ap = [average_precision_score(y[y[:, c] >= 0, c], x[y[:, c] >= 0, c]) for c in range(3)]
    assert r['total'] == r['common'] == pytest.approx(np.mean(ap))
    assert np.isnan(r['rare'])
    assert r['num_empty'] == 2


def test_a_row_without_a_known_label_changes_nothing(table):
    x, y = table
    more = np.vstack([x, np.full((1, 5), 9.)]), np.vstack([y, np.full((1, 5), -1)])
    a, b = multilabel_report(*more, GROUPS), multilabel_report(x, y, GROUPS)
    assert [a[k] for k in ('total', 'rare', 'OF1', 'CF1')] == [b[k] for k in ('total', 'rare', 'OF1', 'CF1')]


def test_nothing_known_is_nothing_measured():
    r = multilabel_report(np.random.default_rng(0).normal(size=(4, 3)), -np.ones((4, 3)))
    assert np.isnan(r['total'])
    assert r['num_unknown'] == 12
    assert 'nan' not in format_report(r)


def test_a_report_says_what_is_unknown(table):
    text = format_report(multilabel_report(*table, GROUPS))
    assert f'{(table[1] < 0).sum()} of 300 labels are unknown and are left out' in text


def test_thresholds_apply_to_known_labels(table):
    x, y = table
    limits = np.linspace(0.3, 0.7, 5)
    r, known = multilabel_report(x, y, threshold=limits), y >= 0
    said = 1 / (1 + np.exp(-x)) >= limits
    assert r['OP'] == pytest.approx(precision_score(y[known], said[known]))
    assert r['threshold'] == pytest.approx(limits.tolist())
    json.dumps(r['threshold'])


# ---- intervals

def test_replicates_are_those_of_the_known_images(table):
    x, y = table
    for c in range(5):
        known = y[:, c] >= 0
        alone = bootstrap_ap(x[:, [c]], y[:, [c]], n=40)
        again = bootstrap_ap(np.where(known, x[:, c], 99.)[:, None], y[:, [c]], n=40)
        np.testing.assert_array_equal(alone, again)


def test_intervals_count_known_positives(table):
    x, y = table
    assert bootstrap_classes(x, y, n=20).positives.tolist() == class_counts(y).tolist()
    table = bootstrap_map(x, y, GROUPS, n=50)
    assert table.notna().all(axis=None)
    np.testing.assert_allclose(table['mAP'], [100 * multilabel_report(x, y, GROUPS)[g] for g in table.index])


def test_paired_intervals_leave_unknown_labels_out(table):
    x, y = table
    other = np.where(y < 0, -x, x)  # differs where nobody knows
    assert (paired_bootstrap(x, other, y, n=20)[['difference', 'low', 'high']] == 0).all(axis=None)


# ---- counts

def test_counts_are_of_known_labels(table):
    _, y = table
    assert class_counts(y).tolist() == (y == 1).sum(0).tolist()
    assert known_counts(y).tolist() == (y != -1).sum(0).tolist()


def test_groups_follow_the_known_positives():
    y = np.full((300, 2), -1)
    y[:150, 0] = 1
    y[:5, 1] = 1
    groups = frequency_groups(class_counts(y))
    assert [groups['head'].tolist(), groups['tail'].tolist()] == [[0], [1]]


def test_a_summary_counts_unknown_labels_apart(table):
    _, y = table
    s = imbalance_summary(y)
    assert s['unknown'] == (y < 0).sum()
    assert s['labels_per_image'] == pytest.approx((y > 0).sum(1).mean())
    assert s['unlabelled'] == (~(y > 0).any(1)).sum()
    assert s['tail_images'] == (y > 0).any(1).sum()


def test_a_split_is_that_of_the_positives(table):
    _, y = table
    for a, b in zip(stratified_split(y), stratified_split(y > 0)): assert a.tolist() == b.tolist()


def test_the_class_aware_sampler_draws_for_known_positives(table):
    _, y = table
    assert list(EpochSampler(60, 1, y)) == list(EpochSampler(60, 1, (y > 0).astype(np.uint8)))
    with pytest.raises(ValueError, match='none of the 4 images'): EpochSampler(4, 0, -np.ones((4, 2), np.int8))


def test_a_correlation_divides_by_images_where_both_are_known():
    y = np.array([[1, 1], [1, -1], [1, -1], [0, 1]])
    assert label_correlation(y, threshold=0.9)[0, 1] == pytest.approx(0.2)
    assert label_correlation(np.maximum(y, 0), threshold=0.9)[0, 1] == 0


# ---- alignment and figures

def test_auc_is_scikit_learn_on_the_known_rows(table):
    x, y = table
    want = [roc_auc_score(y[k, c], x[k, c]) for c, k in enumerate((y >= 0).T)]
    np.testing.assert_allclose(roc_auc(x, y), want)


def test_alignment_is_of_known_positives_and_negatives(table):
    x, y = table
    got = alignment_table(x, x, y, list('abcde'), GROUPS)
    np.testing.assert_allclose(got['positive'], [x[y[:, c] == 1, c].mean() for c in range(5)])
    np.testing.assert_allclose(got['negative'], [x[y[:, c] == 0, c].mean() for c in range(5)])
    assert got['positives'].tolist() == class_counts(y).tolist()


def test_images_are_chosen_for_known_positives(table):
    _, y = table
    assert spread_images(y, 20).tolist() == spread_images(y > 0, 20).tolist()


def test_a_best_label_may_be_neither_right_nor_wrong(table):
    x, y = table
    got = top_k_table({'m': x}, y, list('abcde'), GROUPS, k=5).set_index(['image', 'class'])['right']
    answers = {1: True, 0: False, -1: None}
    assert got.to_dict() == {(i, 'abcde'[c]): answers[y[i, c]] for i, c in np.ndindex(y.shape)}


def test_top_k_precision_counts_known_labels(table):
    x, y = table
    total = top_k_report({'m': x}, y, GROUPS, k=5).set_index('group').loc['total']
    assert total['predicted'] == (y >= 0).sum()
    assert total['precision'] == pytest.approx((y > 0).sum() / (y >= 0).sum())
    assert total['recall'] == 1


def test_corrected_errors_are_known_labels(table):
    x, y = table
    flips = flip_table({'a': x, 'b': -x}, y, GROUPS)
    yes = flip_table({'a': x, 'b': -x}, y > 0, GROUPS)
    assert flips.equals(yes)


@pytest.mark.parametrize('kind', ['fixed', 'tail', 'all_fail', 'random'])
def test_telling_images_show_known_labels(table, kind):
    x, y = table
    picks = [telling_images({'a': x, 'b': -x}, t, GROUPS, kind, 'a') for t in (y, y > 0)]
    assert picks[0].tolist() == picks[1].tolist()


# ---- datasets and training

def dataset(y, **kw):
    images = np.random.default_rng(0).integers(0, 255, (len(y), 8, 8, 3), dtype=np.uint8)
    return ArrayDataset(images, y, list('abcde'), GROUPS, **kw)


def test_a_dataset_keeps_unknown_labels(table):
    _, y = table
    ds = dataset(y)
    assert ds.targets.dtype == np.int8
    assert ds[3][1].tolist() == y[3].tolist()
    assert ds.labels(3) == [name for name, answer in zip('abcde', y[3]) if answer == 1]
    assert f'{(y < 0).sum()} labels unknown' in repr(ds)


def test_a_dataset_without_unknown_labels_is_as_before(table):
    ds = dataset((table[1] > 0).astype(np.int8))
    assert ds.targets.dtype == np.uint8
    assert 'unknown' not in repr(ds)


@pytest.mark.parametrize('bad', [2, -2, 0.5, np.nan, np.uint8(255)])
def test_a_dataset_refuses_other_numbers(bad):
    with pytest.raises(ValueError, match=r'targets: expected 0 or 1, got .*-1 would stand for an unknown label'):
        dataset([[0, 0, 0, 0, bad]])


def test_the_loss_of_a_dataset_takes_its_known_labels(table):
    _, y = table
    loss = loss_for(dataset(y), TrainConfig(loss='rw_inv'))
    np.testing.assert_allclose(loss.weight, known_counts(y) / class_counts(y), rtol=1e-6)


class Small(torch.nn.Module):
    "A model whose logits depend on the mean colour"
    def __init__(self):
        super().__init__()
        self.fc = torch.nn.Linear(3, 5)

    def forward(self, x): return self.fc(x.float().mean((2, 3)) / 255)


def trained(y, **kw):
    torch.manual_seed(0)
    config = TrainConfig(epochs=2, batch_size=16, lr=0.01, augment='none', device='cpu', ema=0, **kw)
    return Trainer(Small(), dataset(y), None, config, progress=False).fit()


@pytest.mark.parametrize('sampler', ['uniform', 'class_aware'])
@pytest.mark.parametrize('select', ['valid', 'last'])
def test_a_training_leaves_unknown_labels_out(table, sampler, select):
    trainer = trained(table[1], sampler=sampler, select=select)
    assert np.isfinite([row['loss'] for row in trainer.history]).all()


def test_a_class_that_is_never_known_does_not_learn(table):
    y = table[1].copy()
    y[:, 2] = -1
    trainer = trained(y, select='last', weight_decay=0.)
    torch.manual_seed(0)
    assert torch.equal(trainer.evaluated.fc.weight[2], Small().fc.weight[2])


@pytest.mark.parametrize('answers, want', [([[1, 0], [1, -1]], 2.), ([[1, -1], [-1, -1]], 1.), ([[-1, -1]] * 2, 0.)])
def test_the_loss_of_an_epoch_is_over_known_labels(answers, want):
    "Of two batches, one image each, with losses 1 and 4; a loss is 0 where nothing is known"
    callback, history = MeanLoss(), [{}]
    callback.before_epoch(None)
    for row, loss in zip(answers, (1., 4.)):
        y = torch.tensor([row])
        loss = torch.tensor(loss) * (y >= 0).any()
        callback.after_batch(SimpleNamespace(loss=loss, y=y))
    callback.after_epoch(SimpleNamespace(history=history, over_processes=lambda *sums: sums))
    assert history[0]['loss'] == pytest.approx(want)
    assert type(history[0]['loss']) is float, 'a tensor would be written as its repr'
