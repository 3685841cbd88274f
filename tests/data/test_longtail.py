"Groups, Pareto subsets and stratified splits"
import json

import numpy as np
import pytest
from helpers import FIXTURES, SHARED

from cprfl.data.longtail import (
    class_counts,
    frequency_groups,
    imbalance_summary,
    pareto_counts,
    pareto_subset,
    stratified_split,
)

needs_lists = pytest.mark.skipif(not (SHARED/'lists').is_dir(), reason='the benchmark lists are not here (set CPRFL_SHARED)')
CASES = {c['dataset']: c['class_freq'] for c in json.loads((FIXTURES/'losses.json').read_text())}


def listed(name, num_classes):
    rows = [line.split()[1:] for line in (SHARED/'lists'/name).read_text().splitlines() if line.strip()]
    out = np.zeros((len(rows), num_classes), np.uint8)
    for i, r in enumerate(rows): out[i, [int(c) for c in r]] = 1
    return out


def long_tailed(n, c, seed=0):
    p = np.geomspace(.5, 3 / n, c)
    return (np.random.default_rng(seed).random((n, c)) < p).astype(np.uint8)


@pytest.mark.parametrize('name, sizes', [('voc', [6, 6, 8]), ('coco', [22, 33, 25])])
def test_groups_of_the_benchmarks(name, sizes):
    groups = frequency_groups(CASES[name])
    assert list(groups) == ['head', 'medium', 'tail']
    assert [len(v) for v in groups.values()] == sizes
    assert sorted(np.concatenate(list(groups.values()))) == list(range(sum(sizes)))


def test_group_limits_belong_to_the_upper_group():
    groups = frequency_groups([100, 99, 20, 19, 0])
    assert {k: v.tolist() for k, v in groups.items()} == {'head': [0], 'medium': [1, 2], 'tail': [3, 4]}
    assert [len(v) for v in frequency_groups([5, 3, 1], head=5, tail=2).values()] == [1, 1, 1]


@pytest.mark.parametrize('bad', [[[1, 2]], 3])
def test_groups_refuse_other_shapes(bad):
    with pytest.raises(ValueError, match=r'counts must be \[C\]'): frequency_groups(bad)
    with pytest.raises(ValueError, match='head must be at least tail'): frequency_groups([1], head=1, tail=2)


def test_pareto_counts_fall_from_max_to_min():
    for c, top, low in ((20, 775, 4), (80, 1128, 6), (1, 9, 9), (5, 10, 10)):
        n = pareto_counts(c, top, low)
        assert len(n) == c and n[0] == top and (np.diff(n) <= 0).all() and n[-1] == (low if c > 1 else top)
    for args in ((5, 3, 4), (5, 10, 0)):
        with pytest.raises(ValueError, match='min_count'): pareto_counts(*args)
    with pytest.raises(ValueError, match='b must be positive'): pareto_counts(5, 10, b=0)


@pytest.mark.parametrize('name, limit', [('voc', .07), ('coco', .4)])
def test_benchmarks_lie_near_the_curve(name, limit):
    have = np.sort(CASES[name])[::-1]
    off = np.abs(np.log(have / pareto_counts(len(have), have[0], have[-1])))
    assert np.median(off) < limit


def test_pareto_subset_keeps_its_promises():
    world = (np.random.default_rng(0).random((8000, 12)) < np.linspace(.4, .06, 12)).astype(np.uint8)
    idx = pareto_subset(world, 500, seed=3)
    have, want = class_counts(world[idx]), pareto_counts(12, 500)
    assert (np.diff(idx) > 0).all()
    assert (have >= want).all()
    assert (have <= 1.6 * want + 5).all()
    assert np.array_equal(idx, pareto_subset(world, 500, seed=3))
    assert not np.array_equal(idx, pareto_subset(world, 500, seed=4))


def test_pareto_subset_without_cooccurrence_is_exact():
    single = np.eye(5, dtype=np.uint8)[np.random.default_rng(1).integers(0, 5, 4000)]
    idx = pareto_subset(single, 300, min_count=10)
    assert sorted(class_counts(single[idx]))[::-1] == pareto_counts(5, 300, 10).tolist()


def test_pareto_subset_takes_no_more_than_there_is():
    world = np.zeros((50, 3), np.uint8)
    world[:30, 0], world[30:32, 1] = 1, 1
    assert class_counts(world[pareto_subset(world, 40)]).tolist() == [30, 2, 0]


@pytest.mark.parametrize('seed', range(4))
@pytest.mark.parametrize('fraction', [.1, .2, .5])
def test_split_keeps_the_tail(fraction, seed):
    y = long_tailed(3000, 20, seed)
    train, valid = stratified_split(y, fraction, seed)
    n, kept = class_counts(y), class_counts(y[train])
    assert sorted([*train, *valid]) == list(range(len(y)))
    assert (kept >= np.ceil((1 - fraction) * n)).all() and (kept[n > 0] >= 1).all()
    given = n - kept
    head = n >= 100
    assert (given[head] >= .7 * fraction * n[head]).all()
    again = stratified_split(y, fraction, seed)
    assert np.array_equal(train, again[0]) and np.array_equal(valid, again[1])


def test_split_min_train_blank_images_and_bad_fractions():
    y = np.zeros((40, 2), np.uint8)
    y[:20, 0], y[20:26, 1] = 1, 1
    train, _ = stratified_split(y, .5, min_train=5)
    assert class_counts(y[train]).tolist() == [10, 5]
    assert (y[train].sum(1) == 0).sum() == 7
    one = np.eye(3, dtype=np.uint8)
    assert len(stratified_split(one, .9)[1]) == 0
    for f in (0, 1, -1, 20):
        with pytest.raises(ValueError, match='between 0 and 1'): stratified_split(y, f)


def test_a_large_set_keeps_its_tail():
    y = long_tailed(100_000, 80)
    train, valid = stratified_split(y)
    idx = pareto_subset(y, 1200)
    assert (class_counts(y[train]) >= np.ceil(.8 * class_counts(y))).all()
    assert len(idx) < 10_000


def test_summary():
    y = np.array([[1, 1, 0], [1, 0, 0], [0, 0, 0]])
    s = imbalance_summary(y)
    assert (s['images'], s['classes'], s['unlabelled'], s['empty_classes']) == (3, 3, 1, 1)
    assert s['labels_per_image'] == pytest.approx(1) and s['imbalance_ratio'] == 2 and s['min_count'] == 0
    with pytest.raises(ValueError, match=r'\[N, C\]'): imbalance_summary(np.zeros(3))


@needs_lists
@pytest.mark.parametrize('name, c, images, labels, ratio, tail', [
    ('voc_lt_train.txt', 20, 1142, 2.05, 775 / 4, (71, 71)), ('coco_lt_train.txt', 80, 1909, 4.36, 1128 / 6, (269, 267))])
def test_summary_of_the_benchmarks(name, c, images, labels, ratio, tail):
    y = listed(name, c)
    s = imbalance_summary(y)
    assert s['images'] == images and round(s['labels_per_image'], 2) == labels and s['imbalance_ratio'] == pytest.approx(ratio)
    assert (s['tail_images'], s['tail_with_head']) == tail
    train, valid = stratified_split(y)
    assert (class_counts(y[train]) >= np.ceil(.8 * class_counts(y))).all() and len(valid) > .15 * len(y)
