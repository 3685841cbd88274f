"Weighted AP against scikit-learn, replicates against brute force, intervals against known truth, sentences"
import tracemalloc

import numpy as np
import pandas as pd
import pytest
import torch

from cprfl.metrics import average_precision, multilabel_report
from cprfl.statistics import (
    _all_classes,
    bootstrap_ap,
    bootstrap_classes,
    bootstrap_map,
    paired_bootstrap,
    paired_seeds,
    verdict,
)

GROUPS = {'head': [0, 1], 'medium': [2, 3], 'tail': [4, 5]}


def exam(positives, N=300, gap=1.5, seed=0):
    "Logits and targets with so many positives in each class"
    rng = np.random.default_rng(seed)
    targets = np.stack([rng.permutation(N) < k for k in positives], 1)
    return rng.normal(size=targets.shape) + gap * targets, targets


@pytest.fixture
def data(): return exam([90, 80, 30, 25, 12, 8])


# ---- weighted AP

@pytest.mark.parametrize('decimals', [None, 1, 0])
@pytest.mark.parametrize('kind', ['fractions', 'counts', 'half of them zero', 'tiny'])
def test_weighted_ap_is_scikit_learn(data, decimals, kind):
    metrics = pytest.importorskip('sklearn.metrics', reason='scikit-learn is the yardstick')
    rng = np.random.default_rng(1)
    scores, targets = data[0] if decimals is None else data[0].round(decimals), data[1]
    w = rng.random((300, 5))
    counts = rng.integers(0, 4, w.shape)
    w = {'fractions': w, 'counts': counts, 'half of them zero': w * (w < 0.5), 'tiny': w * 1e-9}[kind]
    got = _all_classes(scores, targets, w)
    ap = lambda c, r: metrics.average_precision_score(targets[:, c], scores[:, c], sample_weight=w[:, r])
    want = [[ap(c, r) for c in range(6)] for r in range(5)]
    np.testing.assert_allclose(got, want, rtol=1e-9)

@pytest.mark.parametrize('decimals', [None, 1])
def test_weights_are_repeated_rows(data, decimals):
    scores, targets = data[0] if decimals is None else data[0].round(decimals), data[1]
    counts = np.random.default_rng(2).multinomial(300, np.full(300, 1/300), size=3).T
    got = _all_classes(scores, targets, counts)
    for r in range(3):
        rows = np.repeat(np.arange(300), counts[:, r])
        np.testing.assert_allclose(got[r], average_precision(scores[rows], targets[rows]), rtol=1e-9)

def test_weights_of_one_are_the_plain_figure(data):
    got, = _all_classes(*data, np.ones((300, 1)))
    np.testing.assert_allclose(got, average_precision(*data), rtol=1e-12)

def test_nan_where_no_positive_has_a_weight(data):
    w = np.ones((300, 2))
    w[data[1][:, 5], 0] = 0
    got = _all_classes(*data, w)
    assert np.isnan(got).tolist() == [[False] * 5 + [True], [False] * 6]
    none = data[1].copy()
    none[:, 2] = 0
    assert np.isnan(_all_classes(data[0], none, w)[:, 2]).all()



# ---- replicates

def test_replicates_are_those_of_brute_force(data):
    "Resampled lists, drawn and scored by scikit-learn, have the same distribution"
    metrics = pytest.importorskip('sklearn.metrics', reason='scikit-learn is the yardstick')
    scores, targets = data
    ours = bootstrap_ap(scores, targets, n=4000, seed=1)[:, [0, 4]]
    rng, slow = np.random.default_rng(7), []
    for _ in range(400):
        rows = rng.integers(0, 300, 300)
        slow.append([metrics.average_precision_score(targets[rows, c], scores[rows, c]) for c in (0, 4)])
    slow = np.array(slow)
    error = slow.std(0) / 400**0.5
    assert (abs(ours.mean(0) - slow.mean(0)) < 4 * error).all()
    np.testing.assert_allclose(ours.std(0), slow.std(0), rtol=0.15)

def test_a_seed_draws_the_same_images_whatever_the_scores(data):
    a = bootstrap_ap(*data, n=30, seed=3)
    assert np.array_equal(a, bootstrap_ap(*data, n=30, seed=3), equal_nan=True)
    assert np.array_equal(a[:10], bootstrap_ap(*data, n=10, seed=3), equal_nan=True)
    assert not np.array_equal(a, bootstrap_ap(*data, n=30, seed=4), equal_nan=True)
    only = bootstrap_ap(data[0][:, [4]], data[1][:, [4]], n=30, seed=3)
    assert np.array_equal(a[:, 4], only[:, 0], equal_nan=True)
    np.testing.assert_allclose(bootstrap_ap(torch.tensor(data[0]), torch.tensor(data[1]), n=30, seed=3), a)

def test_blocks_make_no_difference(monkeypatch, data):
    import cprfl.statistics as module
    counts = np.concatenate(list(module._image_counts(300, 50, 0)), 1)
    assert counts.shape == (300, 50)
    assert (counts.sum(0) == 300).all()
    many = np.concatenate(list(module._image_counts(2**18, 5, 0)), 1)
    rng = np.random.default_rng(0)
    assert np.array_equal(many[:, 3], [rng.multinomial(2**18, np.full(2**18, 2.0**-18)) for _ in range(4)][3])

def test_classes_without_positives_are_nan(data):
    scores, targets = data[0], data[1].copy()
    targets[:, 3] = 0
    targets[:, 5] = np.arange(300) == 0
    ap = bootstrap_ap(scores, targets, n=400)
    assert np.isnan(ap[:, 3]).all()
    assert not np.isnan(ap[:, :3]).any()
    assert 0.28 < np.isnan(ap[:, 5]).mean() < 0.46, 'about 1/e'
    table = bootstrap_map(scores, targets, GROUPS | {'empty': [3]}, n=400)
    assert table.drop('empty').notna().all(axis=None)
    assert table.loc['empty'].isna().all()
    classes = bootstrap_classes(scores, targets, n=400)
    assert classes.loc[3, ['AP', 'low', 'high']].isna().all()
    assert classes.positives.tolist() == [90, 80, 30, 0, 12, 1]
    assert classes.drop(3).notna().all(axis=None)

def test_a_bootstrap_needs_little_memory():
    rng = np.random.default_rng(0)
    scores, targets = rng.normal(size=(5000, 2)), rng.random((5000, 2)) < 0.04
    tracemalloc.start()
    bootstrap_map(scores, targets, n=1000)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 100e6


# ---- intervals

def test_tables_hold_the_figures_of_the_report(data):
    report = multilabel_report(*data, GROUPS)
    table = bootstrap_map(*data, GROUPS, n=200)
    assert list(table) == ['mAP', 'low', 'high']
    assert list(table.index) == ['total', 'head', 'medium', 'tail']
    np.testing.assert_allclose(table.mAP, [100 * report[k] for k in table.index])
    assert (table.low < table.mAP).all()
    assert (table.mAP < table.high).all()
    classes = bootstrap_classes(*data, classes=list('abcdef'), n=200)
    np.testing.assert_allclose(classes.AP, 100 * report['ap'])
    assert list(classes.index) == list('abcdef')
    assert classes.positives.tolist() == [90, 80, 30, 25, 12, 8]
    assert ((classes.low >= 0) & (classes.low < classes.AP) & (classes.AP < classes.high) & (classes.high <= 100)).all()

def test_few_positives_wide_interval():
    logits, targets = exam([400] * 3 + [8] * 3, N=2000, gap=2.)
    classes = bootstrap_classes(logits, targets, n=300)
    width = classes.high - classes.low
    assert width[3:].min() > 2 * width[:3].max()
    assert width[:3].max() < 10 < 30 < width[3:].mean()

def test_a_higher_level_is_wider(data):
    tables = [bootstrap_map(*data, GROUPS, n=300, level=level) for level in (0.5, 0.8, 0.95)]
    width = [(t.high - t.low)['tail'] for t in tables]
    assert width[0] < width[1] < width[2]

def test_coverage():
    "Of a hundred exams' intervals about 95 hold the mean of all exams, and few miss it on one side only"
    positives, n = [24] * 8, 120
    truth = 100 * np.mean([average_precision(*exam(positives, 200, seed=10**6 + s)).mean() for s in range(600)])
    tables = [bootstrap_map(*exam(positives, 200, seed=s), n=n).loc['total'] for s in range(n)]
    low, high = np.mean([t.low > truth for t in tables]), np.mean([t.high < truth for t in tables])
    assert 0.88 <= 1 - low - high <= 1
    assert max(low, high) <= 0.09

def hard_exam(seed, hard=0., gap=4.5, positives=(4, 4), N=400):
    "Two runs of one quality; a share of the positives scores like negatives in both"
    rng = np.random.default_rng(seed)
    targets = np.stack([rng.permutation(N) < k for k in positives], 1)
    found = targets & (rng.random(targets.shape) >= hard)
    shared, *own = rng.normal(size=(3, *targets.shape))
    return *((shared + noise) / 2**0.5 + gap * found for noise in own), targets

@pytest.mark.parametrize('quality', [dict(gap=0.5), dict(gap=1.5), dict(), dict(hard=0.1), dict(hard=0.2)], ids=str)
def test_four_positives_are_covered(quality):
    "Quantiles of the replicates hold the truth in 0.6 to 0.85 of these exams"
    many = hard_exam(10**6, positives=[4] * 2000, **quality)
    truth = 100 * average_precision(many[0], many[2]).mean()
    exams = [hard_exam(seed, **quality) for seed in range(80)]
    tables = [bootstrap_map(a, y, n=60).loc['total'] for a, _, y in exams]
    assert np.mean([t.low <= truth <= t.high for t in tables]) >= 0.92

@pytest.mark.parametrize('quality', [dict(gap=1.5), dict(), dict(hard=0.1)], ids=str)
def test_equal_runs_of_four_positives_seldom_differ(quality):
    exams = [hard_exam(seed, **quality) for seed in range(60)]
    tables = [paired_bootstrap(*exam, n=60).loc['total'] for exam in exams]
    assert np.mean([t.low <= 0 <= t.high for t in tables]) >= 0.93

def test_a_single_positive_has_a_wide_interval():
    logits, targets = exam([1, 1], N=200, gap=9.)
    table = bootstrap_classes(logits, targets, n=50)
    assert table['AP'].tolist() == [100, 100]
    assert (table['low'] < 10).all()

def test_many_positives_need_no_addition():
    logits, targets = exam([300] * 4, N=2000)
    replicates = 100 * bootstrap_ap(logits, targets, n=400).mean(1)
    table = bootstrap_map(logits, targets, n=400).loc['total']
    assert (table.high - table.low) / 2 == pytest.approx(1.96 * replicates.std(), rel=0.02)

def test_the_interval_is_centred_although_replicates_are_not():
    logits, targets = exam([8] * 30, N=400, gap=1.)
    estimate = average_precision(logits, targets).mean()
    replicates = np.nanmean(bootstrap_ap(logits, targets, n=300), 1)
    assert np.mean(replicates < estimate) < 0.1
    table = bootstrap_map(logits, targets, n=300).loc['total']
    assert 0.5 < (table.high - table['mAP']) / (table['mAP'] - table.low) < 2


# ---- two runs

def pair(seed=0, gap=0.2, noise=0.3, **kw):
    logits, targets = exam([90, 80, 30, 25, 12, 8], seed=seed, **kw)
    return logits, logits - gap * targets + noise * np.random.default_rng(seed + 1).normal(size=logits.shape), targets

def test_paired_bootstrap_is_the_difference_on_the_same_images():
    a, b, targets = pair()
    table = paired_bootstrap(a, b, targets, GROUPS, ('ours', 'theirs'), n=150, seed=5)
    assert list(table) == ['ours', 'theirs', 'difference', 'low', 'high']
    assert list(table.index) == ['total', 'head', 'medium', 'tail']
    np.testing.assert_allclose(table.ours, bootstrap_map(a, targets, GROUPS, n=2).mAP)
    np.testing.assert_allclose(table.difference, table.ours - table.theirs)
    D = 100 * (bootstrap_ap(a, targets, 150, 5) - bootstrap_ap(b, targets, 150, 5))[:, :2].mean(1)
    np.testing.assert_allclose(table.high['head'] - table.difference['head'], 1.96 * D.std(), rtol=0.07)
    np.testing.assert_allclose(table.high - table.difference, table.difference - table.low)

def test_paired_is_narrower_than_unpaired():
    a, b, targets = pair()
    table = paired_bootstrap(a, b, targets, GROUPS, n=300)
    apart = 100 * (np.nanmean(bootstrap_ap(a, targets, 300, 0), 1) - np.nanmean(bootstrap_ap(b, targets, 300, 1), 1))
    low, high = np.quantile(apart, [0.025, 0.975])
    assert table.high['total'] - table.low['total'] < 0.7 * (high - low)

def test_swapping_the_runs_swaps_the_signs():
    a, b, targets = pair()
    x, y = paired_bootstrap(a, b, targets, GROUPS, n=100), paired_bootstrap(b, a, targets, GROUPS, n=100)
    np.testing.assert_allclose(x.difference, -y.difference)
    np.testing.assert_allclose(x.low, -y.high)

def test_a_run_and_itself_or_any_monotone_copy():
    a, _, targets = pair()
    table = paired_bootstrap(a, np.tanh(a / 9), targets, GROUPS, n=50)
    np.testing.assert_allclose(table[['difference', 'low', 'high']], 0, atol=1e-9)
    assert verdict(table) == 'a and b: total +0.0 [0.0, 0.0] not significant; tail +0.0 [0.0, 0.0] not significant'

def test_equal_runs_seldom_differ():
    told = [(t.low.total > 0) or (t.high.total < 0) for s in range(60)
            if (t := paired_bootstrap(*equals(s), n=100)) is not None]
    assert np.mean(told) <= 0.12

def equals(seed):
    "Two recognisers of the same quality"
    rng = np.random.default_rng(seed)
    targets = np.stack([rng.permutation(200) < 20 for _ in range(4)], 1)
    shared = rng.normal(size=targets.shape)
    return *(shared + rng.normal(size=targets.shape) + 2 * targets for _ in range(2)), targets


# ---- seeds

def runs(**methods):
    "name=[(seed, total, tail), ...] as `results_table` gives it"
    row = lambda method, seed, total, tail: dict(method=method, seed=seed, total=total, head=total + 5, medium=total,
                                                 tail=tail, seconds=9.)
    rows = [row(method, *values) for method, runs in methods.items() for values in runs]
    return pd.DataFrame(rows).set_index('method')

def test_paired_seeds_is_the_paired_t_interval():
    stats = pytest.importorskip('scipy.stats', reason='scipy is the yardstick')
    table = runs(a=[(0, 52., 30.), (1, 54., 34.), (2, 53., 29.)], b=[(2, 49., 31.), (1, 49., 28.), (0, 48., 29.)],
                 c=[(0, 1., 1.)])
    got = paired_seeds(table, 'a', 'b')
    assert list(got) == ['a', 'b', 'difference', 'std', 'seeds', 'low', 'high']
    assert list(got.index) == ['total', 'head', 'medium', 'tail']
    for row, x, y in (('total', [52, 54, 53], [48, 49, 49]), ('tail', [30, 34, 29], [29, 28, 31])):
        ci = stats.ttest_rel(x, y).confidence_interval(0.95)
        np.testing.assert_allclose(got.loc[row, ['low', 'high']].astype(float), [ci.low, ci.high])
        assert got.loc[row, 'std'] == pytest.approx(np.std(np.subtract(x, y), ddof=1))
        assert got.seeds[row] == 3
    assert verdict(got) == 'a and b: total +4.3 [2.9, 5.8] significant; tail +1.7 [-8.4, 11.7] not significant'

def test_only_shared_seeds_count():
    got = paired_seeds(runs(a=[(0, 50., 30.), (1, 60., 40.)], b=[(1, 50., 30.), (2, 0., 0.), (0, 41., 20.)]), 'a', 'b')
    assert got.seeds.tolist() == [2] * 4
    assert got.difference.total == 9.5
    assert got.b.total == 45.5

def test_one_seed_cannot_tell():
    got = paired_seeds(runs(a=[(0, 50., 30.)], b=[(0, 48., 31.)]), 'a', 'b')
    assert got.seeds.total == 1
    assert got[['std', 'low', 'high']].isna().all(axis=None)
    assert verdict(got).startswith('a and b: total +2.0, tail -1.0; one seed gives no interval, use paired_bootstrap')

def test_runs_without_a_figure_are_left_out():
    got = paired_seeds(runs(a=[(0, 50., np.nan), (1, 51., 30.)], b=[(0, 48., 31.), (1, 48., 29.)]), 'a', 'b')
    assert got.seeds.tolist() == [2, 2, 2, 1]
    assert got.difference['tail'] == 1
    assert (got.a - got.b)['tail'] == 1
    assert verdict(got).endswith('; tail +1.0 without an interval')
    empty = paired_seeds(runs(a=[(0, 50., np.nan), (1, 51., np.nan)], b=[(0, 48., 31.), (1, 48., 29.)]), 'a', 'b')
    assert verdict(empty).endswith('; tail not measured')

def test_verdict_speaks_of_the_rows_that_are_asked_for():
    columns = dict(cprfl=[0.] * 2, erm=[0.] * 2, difference=[3.1, -0.04], low=[1.2, -3.], high=[5., 5.1])
    table = pd.DataFrame(columns, index=['total', 'tail'])
    assert verdict(table) == 'cprfl and erm: total +3.1 [1.2, 5.0] significant; tail +0.0 [-3.0, 5.1] not significant'
    assert verdict(table, ('total',)) == 'cprfl and erm: total +3.1 [1.2, 5.0] significant'
    assert 'significant' in verdict(-table.rename(columns={'low': 'high', 'high': 'low'}), ('total',))
    with pytest.raises(ValueError, match='groups: expected some of total, tail, got head'): verdict(table, ('head',))


# ---- errors

def test_errors_name_what_was_expected(data):
    logits, targets = data
    with pytest.raises(ValueError, match='n: expected at least 1, got 0'): bootstrap_ap(logits, targets, n=0)
    for level in (0, 1, 95):
        with pytest.raises(ValueError, match=f'level: .*got {level}'): bootstrap_map(logits, targets, n=2, level=level)
    with pytest.raises(ValueError, match="group 'tail': expected class indices in 0..5"):
        bootstrap_map(logits, targets, {'tail': [6]}, n=2)
    with pytest.raises(ValueError, match='expected 6 names, got 2'): bootstrap_classes(logits, targets, ['a', 'b'], n=2)
    with pytest.raises(ValueError, match=r'got \[300, 6\] and \[300, 5\]'):
        paired_bootstrap(logits, logits, targets[:, :5], n=2)
    with pytest.raises(ValueError, match=r'got \[299, 6\] and \[300, 6\]'):
        paired_bootstrap(logits, logits[1:], targets, n=2)
    with pytest.raises(ValueError, match='two different names'):
        paired_bootstrap(logits, logits, targets, names=('a', 'a'))
    with pytest.raises(ValueError, match='rows: 3'):
        bootstrap_ap(np.where(np.arange(300)[:, None] == 3, np.nan, logits), targets, n=2)

def test_errors_of_seeds():
    table = runs(a=[(0, 1., 1.), (0, 2., 2.)], b=[(1, 1., 1.)], c=[(2, 1., 1.)])
    with pytest.raises(ValueError, match="method: expected one of a, b, c, got 'x'"): paired_seeds(table, 'b', 'x')
    with pytest.raises(ValueError, match='a: seed 0 is in the table more than once'): paired_seeds(table, 'a', 'b')
    with pytest.raises(ValueError, match=r'no seed in common: b has \[1\], c has \[2\]'): paired_seeds(table, 'b', 'c')
    with pytest.raises(ValueError, match="got 'b' twice"): paired_seeds(table, 'b', 'b')
    with pytest.raises(ValueError, match='level: .*got 2'): paired_seeds(table, 'b', 'c', level=2)
