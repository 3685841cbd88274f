"The benchmarks by their names"
import json

import numpy as np
import pytest
from helpers import FIXTURES
from PIL import Image

from cprfl.data.benchmarks import available_benchmarks, load_benchmark
from cprfl.data.dataset import ArrayDataset, from_list, resize


@pytest.fixture
def prepared(tmp_path):
    "A COCO-LT in miniature, its images linked from elsewhere"
    base, far = tmp_path/'data/coco-lt', tmp_path/'far'
    (base/'lists').mkdir(parents=True)
    far.mkdir()
    Image.new('RGB', (4, 4)).save(far/'x.png')
    for i in range(124): (base/f'{i}.png').symlink_to(far/'x.png')
    labels = [0] * 100 + [1] * 20 + [2] * 4
    (base/'lists/coco_labels.txt').write_text('cat 0\r\nhot dog 1 \nox 2')
    (base/'lists/coco_lt_train.txt').write_text(''.join(f'{i}.png {c}\n' for i, c in enumerate(labels)))
    (base/'lists/coco_lt_test.txt').write_text('0.png 0\n1.png 1 2\n2.png\n')
    return tmp_path/'data'


@pytest.mark.parametrize('split, counts', [('train', [100, 20, 4]), ('test', [1, 1, 1])])
def test_both_splits_have_the_groups_of_train(prepared, split, counts):
    ds = load_benchmark('coco-lt', split, root=prepared)
    assert ds.class_counts.tolist() == counts
    groups = {name: ids.tolist() for name, ids in ds.groups.items()}
    assert groups == {'head': [0], 'medium': [1], 'tail': [2]}


def test_classes_and_unlabelled_images(prepared):
    test = load_benchmark('coco-lt', 'test', root=prepared)
    assert test.classes == ['cat', 'hot dog', 'ox']
    assert test.labels(2) == []


def test_the_environment_names_the_data_folder(prepared, monkeypatch):
    monkeypatch.setenv('CPRFL_DATA', str(prepared))
    assert load_benchmark('coco-lt', 'test', transform=resize(6))[0][0].shape == (3, 6, 6)


def test_unknown_benchmarks_and_splits_are_refused(prepared):
    assert available_benchmarks() == ['voc-lt', 'coco-lt', 'shapes-lt']
    with pytest.raises(ValueError, match="expected one of voc-lt, coco-lt, shapes-lt, got 'lvis'"):
        load_benchmark('lvis', 'train')
    with pytest.raises(ValueError, match="split of coco-lt: expected one of train, test, got 'valid'"):
        load_benchmark('coco-lt', 'valid', root=prepared)


def test_what_is_not_there_says_how_to_get_it(prepared):
    with pytest.raises(FileNotFoundError, match=f'run: cprfl_prepare voc-lt --root {prepared}'):
        load_benchmark('voc-lt', 'train', root=prepared)


def test_shapes_lt_is_given_its_own_settings(monkeypatch):
    calls = []

    def shapes_lt(split, **kw):
        calls.append((split, kw))
        return ArrayDataset(np.zeros((1, 8, 8, 3), np.uint8), [[1]], ['red circle'])

    monkeypatch.setattr('cprfl.data.benchmarks.shapes_lt', shapes_lt)
    load_benchmark('shapes-lt', 'test', num_classes=42)
    load_benchmark('shapes-lt', 'train', seed=5)
    assert [split for split, _ in calls] == ['test', 'train']
    assert [kw for _, kw in calls] == [{'transform': None, 'num_classes': 42}, {'transform': None, 'seed': 5}]


def test_shapes_lt_takes_a_transform():
    assert load_benchmark('shapes-lt', 'test', transform=resize(4))[0][0].shape == (3, 4, 4)


# ---- the lists of the paper

@pytest.fixture(params=['voc', 'coco'])
def listed(request, lists):
    "Name and both splits of a benchmark, without its images"
    key = request.param
    labels = lists/f'{key}_labels.txt'
    files = [lists/f'{key}_lt_{split}.txt' for split in ('train', 'test')]
    return key, *(from_list(file, labels, lists, check='none') for file in files)


def test_sizes_and_groups_of_the_benchmarks(listed):
    key, train, test = listed
    sizes, groups = {'voc': ((1142, 4952), [6, 6, 8]), 'coco': ((1909, 5000), [22, 33, 25])}[key]
    assert (len(train), len(test)) == sizes
    assert [len(ids) for ids in train.groups.values()] == groups


def test_class_counts_are_those_of_the_authors(listed):
    key, train, _ = listed
    cases = json.loads((FIXTURES/'losses.json').read_text())
    counts = {case['dataset']: case['class_freq'] for case in cases}
    assert train.class_counts.tolist() == counts[key]


def test_class_names_and_unlabelled_test_images(listed):
    key, train, test = listed
    name, unlabelled = {'voc': ('diningtable', 0), 'coco': ('dining table', 48)}[key]
    assert name in train.classes
    assert (test.targets.sum(1) == 0).sum() == unlabelled
