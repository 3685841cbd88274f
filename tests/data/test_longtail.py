"Groups, Pareto subsets and stratified splits"
import json

import numpy as np
import pytest
from helpers import FIXTURES

from cprfl.data.longtail import (
    GROUPS,
    class_counts,
    frequency_groups,
    imbalance_summary,
    pareto_counts,
    pareto_subset,
    stratified_split,
)

COUNTS = {case['dataset']: case['class_freq'] for case in json.loads((FIXTURES/'losses.json').read_text())}


def long_tailed(n, c, seed=0):
    "[n, c] targets, from a class in half of the images to one in three images"
    p = np.geomspace(.5, 3 / n, c)
    return (np.random.default_rng(seed).random((n, c)) < p).astype(np.uint8)


def keeps_its_share(kept, counts, fraction): return (kept >= np.ceil((1 - fraction) * counts)).all()


# ---- groups

@pytest.mark.parametrize('name, sizes', [('voc', [6, 6, 8]), ('coco', [22, 33, 25])])
def test_groups_of_the_benchmarks(name, sizes):
    groups = frequency_groups(COUNTS[name])
    assert tuple(groups) == GROUPS == ('head', 'medium', 'tail')
    assert [len(ids) for ids in groups.values()] == sizes
    assert sorted(np.concatenate(list(groups.values()))) == list(range(sum(sizes)))


def test_group_limits_belong_to_the_upper_group():
    groups = {name: ids.tolist() for name, ids in frequency_groups([100, 99, 20, 19, 0]).items()}
    assert groups == {'head': [0], 'medium': [1, 2], 'tail': [3, 4]}


def test_group_limits_can_be_chosen():
    assert [len(ids) for ids in frequency_groups([5, 3, 1], head=5, tail=2).values()] == [1, 1, 1]
    with pytest.raises(ValueError, match='head: expected at least tail = 2, got 1'):
        frequency_groups([1], head=1, tail=2)


@pytest.mark.parametrize('bad', [[[1, 2]], 3])
def test_groups_refuse_other_shapes(bad):
    with pytest.raises(ValueError, match=r'counts: expected \[C\]'): frequency_groups(bad)


# ---- Pareto

@pytest.mark.parametrize('c, top, low', [(20, 775, 4), (80, 1128, 6), (1, 9, 9), (5, 10, 10)])
def test_pareto_counts_fall_from_max_to_min(c, top, low):
    n = pareto_counts(c, top, low)
    assert len(n) == c
    assert (np.diff(n) <= 0).all()
    assert (n[0], n[-1]) == (top, low)


def test_one_class_has_the_largest_count(): assert pareto_counts(1, 9, 4).tolist() == [9]


@pytest.mark.parametrize('args, why', [
    ((5, 3, 4), 'min_count'), ((5, 10, 0), 'min_count'), ((5, 10, 4, 0), 'b: expected a positive number')])
def test_pareto_counts_refuse_what_cannot_be(args, why):
    with pytest.raises(ValueError, match=why): pareto_counts(*args)


@pytest.mark.parametrize('name, limit', [('voc', .07), ('coco', .4)])
def test_benchmarks_lie_near_the_curve(name, limit):
    have = np.sort(COUNTS[name])[::-1]
    off = np.abs(np.log(have / pareto_counts(len(have), have[0], have[-1])))
    assert np.median(off) < limit


@pytest.fixture
def world(): return (np.random.default_rng(0).random((8000, 12)) < np.linspace(.4, .06, 12)).astype(np.uint8)


def test_a_pareto_subset_follows_the_curve(world):
    idx = pareto_subset(world, 500, seed=3)
    have, want = class_counts(world[idx]), pareto_counts(12, 500)
    assert (np.diff(idx) > 0).all()
    assert (have >= want).all()
    assert (have <= 1.6 * want + 5).all()


def test_a_pareto_subset_depends_on_its_seed_alone(world):
    idx = pareto_subset(world, 500, seed=3)
    assert np.array_equal(idx, pareto_subset(world, 500, seed=3))
    assert not np.array_equal(idx, pareto_subset(world, 500, seed=4))


def test_a_pareto_subset_of_single_labels_is_exact():
    single = np.eye(5, dtype=np.uint8)[np.random.default_rng(1).integers(0, 5, 4000)]
    idx = pareto_subset(single, 300, min_count=10)
    assert sorted(class_counts(single[idx]))[::-1] == pareto_counts(5, 300, 10).tolist()


def test_a_pareto_subset_takes_no_more_than_there_is():
    world = np.zeros((50, 3), np.uint8)
    world[:30, 0], world[30:32, 1] = 1, 1
    assert class_counts(world[pareto_subset(world, 40)]).tolist() == [30, 2, 0]


# ---- splits

@pytest.mark.parametrize('seed', range(4))
@pytest.mark.parametrize('fraction', [.1, .2, .5])
def test_a_split_keeps_the_tail(fraction, seed):
    y = long_tailed(3000, 20, seed)
    train, valid = stratified_split(y, fraction, seed)
    n, kept = class_counts(y), class_counts(y[train])
    assert sorted([*train, *valid]) == list(range(len(y)))
    assert keeps_its_share(kept, n, fraction)
    assert (kept[n > 0] >= 1).all()
    head = n >= 100
    assert ((n - kept)[head] >= .7 * fraction * n[head]).all()


@pytest.mark.parametrize('seed', range(4))
def test_a_split_depends_on_its_seed_alone(seed):
    y = long_tailed(3000, 20)
    for once, again in zip(stratified_split(y, seed=seed), stratified_split(y, seed=seed)):
        assert np.array_equal(once, again)


@pytest.fixture
def sparse():
    "20 images of one class, 6 of another, 14 of none"
    y = np.zeros((40, 2), np.uint8)
    y[:20, 0], y[20:26, 1] = 1, 1
    return y


def test_unlabelled_images_are_shared_in_proportion(sparse):
    train, _ = stratified_split(sparse, .5)
    assert (sparse[train].sum(1) == 0).sum() == 7


def test_classes_of_one_image_stay_in_train():
    _, valid = stratified_split(np.eye(3, dtype=np.uint8), .9)
    assert len(valid) == 0


@pytest.mark.parametrize('fraction', [0, 1, -1, 20])
def test_a_split_refuses_a_fraction_that_is_none(sparse, fraction):
    with pytest.raises(ValueError, match='between 0 and 1'): stratified_split(sparse, fraction)


def test_a_large_set_keeps_its_tail():
    y = long_tailed(100_000, 80)
    train, _ = stratified_split(y)
    assert keeps_its_share(class_counts(y[train]), class_counts(y), .2)
    assert len(pareto_subset(y, 1200)) < 10_000


# ---- summaries

def test_a_summary():
    s = imbalance_summary(np.array([[1, 1, 0], [1, 0, 0], [0, 0, 0]]))
    assert (s['images'], s['classes'], s['unlabelled'], s['empty_classes']) == (3, 3, 1, 1)
    assert (s['min_count'], s['imbalance_ratio']) == (0, 2)
    assert s['labels_per_image'] == pytest.approx(1)


def test_a_summary_refuses_other_shapes():
    with pytest.raises(ValueError, match=r'\[N, C\]'): imbalance_summary(np.zeros(3))


@pytest.fixture(params=['voc', 'coco'])
def listed(request, lists):
    "Name and targets of a benchmark's training list"
    key, num_classes = request.param, {'voc': 20, 'coco': 80}[request.param]
    rows = [line.split()[1:] for line in (lists/f'{key}_lt_train.txt').read_text().splitlines()]
    targets = np.zeros((len(rows), num_classes), np.uint8)
    for target, ids in zip(targets, rows): target[[int(c) for c in ids]] = 1
    return key, targets


def test_summaries_of_the_benchmarks(listed):
    key, y = listed
    expected = {'voc': (1142, 2.05, 775 / 4, 71, 71), 'coco': (1909, 4.36, 1128 / 6, 269, 267)}[key]
    s = imbalance_summary(y)
    names = 'images', 'labels_per_image', 'imbalance_ratio', 'tail_images', 'tail_with_head'
    assert [s[name] for name in names] == pytest.approx(expected, abs=0.005)


def test_splits_of_the_benchmarks(listed):
    _, y = listed
    train, valid = stratified_split(y)
    assert keeps_its_share(class_counts(y[train]), class_counts(y), .2)
    assert len(valid) > .15 * len(y)
