"Top-3 tables, flips and telling images, on constructed cases"
import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from cprfl.data.dataset import ArrayDataset
from cprfl.look.predictions import (
    align_predictions,
    flip_table,
    load_images,
    telling_images,
    top_k_report,
    top_k_table,
)

CLASSES, GROUPS = list('abcdef'), dict(head=[0, 1], medium=[2, 3], tail=[4, 5])


@pytest.fixture
def rng(): return np.random.default_rng(0)


@pytest.fixture
def targets(rng): return (rng.random((80, 6)) < 0.3).astype(int)


@pytest.fixture
def predictions(rng, targets):
    return {m: rng.normal(size=(80, 6)) + lift * targets for m, lift in dict(erm=1, clip=0.5, cprfl=2).items()}


@pytest.fixture
def found(predictions, targets):
    "Which true labels are among the 3 best of each model, by another way"
    out = {}
    for m, logits in predictions.items():
        kth = np.sort(logits, axis=1)[:, [-3]]
        out[m] = (logits >= kth) & (targets == 1)
    return out


def frame(logits, paths, classes=CLASSES):
    table = pd.DataFrame(logits, columns=classes)
    table.insert(0, 'path', paths)
    return table


def dataset(targets, paths):
    images = np.zeros((len(paths), 2, 2, 3), np.uint8)
    return ArrayDataset(images, targets, CLASSES, groups=GROUPS, paths=paths)


# ---- the same images in the same order

def test_runs_are_aligned_by_path_and_class_name(predictions, targets, rng):
    paths, order, columns, back = [f'{i}.jpg' for i in range(80)], *(rng.permutation(n) for n in (80, 6, 80))
    erm = predictions['erm'][order][:, columns]
    shuffled = frame(erm, [paths[i] for i in order], [CLASSES[c] for c in columns])
    test = dataset(targets[back], [paths[i] for i in back])
    p = align_predictions(dict(cprfl=frame(predictions['cprfl'], paths), erm=shuffled), test)
    assert np.allclose(p.logits['erm'], predictions['erm'])
    assert np.array_equal(p.targets, targets)
    assert p.softmax == ()
    assert p.groups is test.groups


@pytest.mark.parametrize('paths,message', [
    (['0', '1', '9'], "2 are in one of them only, such as '2', '9'"),
    (['0', '1', '2', '2'], 'occur twice')])
def test_different_image_sets_are_refused(rng, paths, message):
    a, b = frame(rng.normal(size=(3, 6)), ['0', '1', '2']), frame(rng.normal(size=(len(paths), 6)), paths)
    test = dataset(np.zeros((3, 6), int), ['0', '1', '2'])
    with pytest.raises(ValueError, match=message): align_predictions(dict(a=a, b=b), test)


def test_a_dataset_without_the_predicted_images_is_refused(rng):
    with pytest.raises(ValueError, match="lacks 1 of 2 predicted images, such as 'y'"):
        align_predictions(dict(a=frame(rng.normal(size=(2, 6)), ['x', 'y'])), dataset(np.zeros((1, 6), int), ['x']))


# ---- the k best labels

@pytest.mark.parametrize('group,ids', [*GROUPS.items(), ('total', range(6))])
def test_the_report_counts_as_a_loop_does(predictions, targets, group, ids):
    report = top_k_report(predictions, targets, GROUPS, k=3).set_index(['model', 'group'])
    true = {(i, c) for i, c in zip(*np.nonzero(targets)) if c in ids}
    for name, logits in predictions.items():
        named = {(i, c) for i, row in enumerate(logits) for c in np.argsort(-row)[:3] if c in ids}
        row, by_class = report.loc[name, group], []
        for c in ids:
            mine = {pair for pair in true if pair[1] == c}
            by_class.append(len(named & mine) / len(mine))
        assert row['recall'] == pytest.approx(len(named & true) / len(true))
        assert row['precision'] == pytest.approx(len(named & true) / len(named))
        assert row['class_recall'] == pytest.approx(np.mean(by_class))


def test_the_table_agrees_with_the_report(predictions, targets):
    table = top_k_table(predictions, targets, CLASSES, GROUPS)
    hits = top_k_report(predictions, targets, GROUPS).set_index(['model', 'group'])['hits']
    assert table.groupby('model')['right'].sum().to_dict() == hits.xs('total', level='group').to_dict()


def test_the_table_names_groups(predictions, targets):
    table = top_k_table(predictions, targets, CLASSES, GROUPS)
    groups = dict(a='head', b='head', c='medium', d='medium', e='tail', f='tail')
    assert table.set_index('class')['group'].to_dict() == groups


def test_scores_are_probabilities(predictions, targets):
    table = top_k_table(predictions, targets, CLASSES, GROUPS, softmax=['clip'])
    assert table['score'].between(0, 1).all()
    assert table.groupby(['model', 'image'])['score'].is_monotonic_decreasing.all()
    assert table.query("model == 'clip'").groupby('image')['score'].sum().max() <= 1


def test_groups_without_images_give_nan_not_zero():
    groups = dict(head=[0, 1], medium=[], tail=[5])
    report = top_k_report(dict(m=np.zeros((2, 6))), np.eye(2, 6), groups, k=1).set_index('group')
    assert report.loc['tail', ['recall', 'class_recall']].isna().all()
    assert np.isnan(report.loc['medium', 'precision'])


# ---- flips

def test_flips_agree_with_the_hits(predictions, targets):
    flips = flip_table(predictions, targets, GROUPS).set_index(['right', 'wrong', 'group'])['count']
    hits = top_k_report(predictions, targets, GROUPS).set_index(['model', 'group'])['hits']
    assert len(flips) == 6 * 4
    for (a, b, g), n in flips.items(): assert n - flips[b, a, g] == hits[a, g] - hits[b, g]


def test_flips_of_groups_add_up(predictions, targets):
    flips = flip_table(predictions, targets, GROUPS)
    wide = flips.pivot(index=['right', 'wrong'], columns='group', values='count')
    assert (wide[list(GROUPS)].sum(axis=1) == wide['total']).all()


# ---- telling images

def falls(values): return (np.diff(values) <= 0).all()


def test_fixed_images_are_right_by_one_model_only(predictions, targets, found):
    fixed = telling_images(predictions, targets, GROUPS, 'fixed', n=100)
    gain = (found['cprfl'] & ~found['erm'] & ~found['clip']).sum(1)
    assert set(fixed) == set(np.flatnonzero(gain))
    assert falls(gain[fixed])


def test_images_on_which_all_models_fail(predictions, targets, found):
    failed = telling_images(predictions, targets, GROUPS, 'all_fail', n=100)
    missed = (targets.astype(bool) & ~found['cprfl'] & ~found['erm'] & ~found['clip']).sum(1)
    share = missed / np.maximum(targets.sum(1), 1)
    assert set(failed) == set(np.flatnonzero(share))
    assert falls(share[failed])


def test_tail_images_have_a_tail_label(predictions, targets):
    rare = telling_images(predictions, targets, GROUPS, 'tail', n=100)
    assert targets[rare][:, [4, 5]].any(1).all()


def test_no_image_is_telling_if_no_class_is_rare(predictions, targets):
    assert not len(telling_images(predictions, targets, {'head': list(range(6)), 'tail': []}, 'tail'))


def test_random_images_depend_on_the_seed(predictions, targets):
    draws = [telling_images(predictions, targets, GROUPS, 'random', n=5, seed=s).tolist() for s in (0, 0, 1)]
    assert draws[0] == draws[1] != draws[2]
    assert targets[draws[0]].any(1).all()


def test_tail_classes_take_turns():
    targets = np.zeros((30, 6), int)
    targets[:28, 4] = 1
    targets[28:, 5] = 1
    pick = telling_images(dict(cprfl=np.zeros((30, 6))), targets, GROUPS, 'tail', n=4)
    assert sorted(targets[pick].argmax(1)) == [4, 4, 5, 5]


# ---- images of your own

@pytest.fixture
def files(tmp_path, rng):
    (tmp_path / 'sub').mkdir()
    files = [tmp_path / 'a.png', tmp_path / 'sub' / 'b.png']
    for f in files: Image.fromarray(rng.integers(0, 256, (20, 30, 3), dtype=np.uint8)).save(f)
    (tmp_path / 'notes.txt').write_text('no image')
    return files


def test_images_of_a_folder(files, tmp_path):
    images, names = load_images(tmp_path, 8)
    assert images.dtype == torch.uint8
    assert images.shape == (2, 3, 8, 8)
    assert names == ['a.png', 'sub/b.png']


@pytest.mark.parametrize('source', [
    lambda files: files,
    lambda files: {f.name: f.read_bytes() for f in files},
    lambda files: {f.name: memoryview(f.read_bytes()) for f in files}], ids=['list', 'bytes', 'upload'])
def test_images_from_elsewhere(files, tmp_path, source):
    assert torch.equal(load_images(source(files), 8)[0], load_images(tmp_path, 8)[0])


def test_a_single_image(files, tmp_path):
    assert torch.equal(load_images(files[0], 8)[0], load_images(tmp_path, 8)[0][:1])


def test_bad_images_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match='no such file or folder'): load_images(tmp_path / 'none', 8)
    with pytest.raises(ValueError, match='no image in'): load_images(tmp_path, 8)
    with pytest.raises(ValueError, match='holiday.jpg'): load_images({'holiday.jpg': b'not a picture'}, 8)
