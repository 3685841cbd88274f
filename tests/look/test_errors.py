"Errors worth a look: tables, filters, a selection that is kept, explorers that share one"
import sys
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch

from cprfl.data.dataset import ArrayDataset
from cprfl.look.errors import ErrorExplorer, RunErrors, confused_pairs, error_table, label_errors
from cprfl.look.explorer import Selection
from cprfl.look.explorers import AttentionExplorer, DriftExplorer, PredictionExplorer, patch_at, place_of_best
from cprfl.look.predictions import Predictions
from cprfl.model.baselines import ERM

CLASSES = ['<script>', '$x$', '=cow', 'dog']
GROUPS = dict(head=np.array([0, 1]), tail=np.array([2, 3]))
N = 40


@pytest.fixture(scope='module')
def dataset():
    rng = np.random.default_rng(0)
    targets = (rng.random((N, 4)) < 0.3).astype(int)
    targets[5, 2] = -1
    pictures = rng.integers(0, 256, (N, 8, 12, 3), dtype=np.uint8)
    return ArrayDataset(pictures, targets, CLASSES, groups=GROUPS, paths=[f'<b>{i:02}</b>.png' for i in range(N)])


@pytest.fixture(scope='module')
def tables(dataset):
    "One run that takes class 0 for class 3, and one that guesses"
    y = np.maximum(dataset.targets, 0)
    confused = 4. * y - 2
    taken = (y[:, 0] > 0) & (y[:, 3] == 0)
    confused[taken, 0], confused[taken, 3] = -2, 2
    guessed = np.random.default_rng(1).normal(size=y.shape)
    logits = dict(guesses=guessed, confused=confused)
    frames = {name: pd.DataFrame(values, columns=CLASSES) for name, values in logits.items()}
    for frame in frames.values(): frame.insert(0, 'path', dataset.paths)
    return frames


@pytest.fixture
def explorer(tables, dataset): return ErrorExplorer(tables, dataset)


# ---- tables

def test_errors_are_where_score_and_label_disagree(dataset):
    scores = np.random.default_rng(2).random((N, 4)).astype(np.float32)
    table = error_table(scores, dataset.targets, CLASSES, GROUPS, np.array([0.2, 0.5, 0.5, 0.9]))
    for c, t in enumerate((0.2, 0.5, 0.5, 0.9)):
        known = dataset.targets[:, c] >= 0
        wrong = (scores[:, c] >= t) != (dataset.targets[:, c] > 0)
        assert sorted(table['image'][table['category'] == c]) == np.flatnonzero(wrong & known).tolist()


def test_the_most_confident_error_comes_first(dataset):
    table = error_table(np.random.default_rng(2).random((N, 4)), dataset.targets, CLASSES, GROUPS)
    assert table['confidence'].is_monotonic_decreasing
    y = dataset.targets[table['image'], table['category']]
    np.testing.assert_allclose(table['confidence'], abs(y - table['score']))


def test_pairs_are_those_of_a_loop(dataset):
    scores = np.random.default_rng(3).random((N, 4))
    pairs = confused_pairs(scores, dataset.targets, CLASSES).set_index(['a', 'b'])
    said, y = scores >= 0.5, dataset.targets
    for a in range(4):
        for b in range(4):
            count = sum(y[i, a] == 1 and not said[i, a] and y[i, b] == 0 and said[i, b] for i in range(N))
            assert (pairs['count'].get((a, b), 0)) == count


def test_a_run_without_errors_has_empty_tables(dataset):
    perfect = np.where(dataset.targets > 0, 9., -9.)
    errors = RunErrors(Predictions(dataset.paths, dict(a=perfect), dataset.targets, CLASSES, GROUPS))
    assert not len(errors.table('a'))
    assert not len(errors.pairs('a'))
    assert not len(errors.counts())
    assert not len(errors.exchange())


def test_each_run_may_have_its_own_thresholds(dataset):
    logits = np.zeros((N, 4))
    p = Predictions(dataset.paths, dict(a=logits, b=logits), dataset.targets, CLASSES, GROUPS)
    errors = RunErrors(p, dict(a=0.4, b=np.full(4, 0.6)))
    assert set(errors.table('a')['kind']) == {'false positive'}
    assert set(errors.table('b')['kind']) == {'miss'}
    with pytest.raises(ValueError, match="threshold: expected one of a, got 'b'"): RunErrors(p, dict(a=0.4))


def test_label_errors_are_found_by_cleanlab(dataset):
    pytest.importorskip('cleanlab', reason="cleanlab is optional (pip install 'cprfl[labels]')")
    targets = np.tile(np.maximum(dataset.targets, 0), (5, 1))
    scores = np.clip(targets + np.random.default_rng(4).normal(0, 0.05, targets.shape), 0.01, 0.99)
    targets[7, 2] = 1 - targets[7, 2]
    targets[9, 1] = -1
    found = label_errors(scores, targets)
    assert found[7, 2]
    assert found.sum() < 5
    assert not found[9, 1]


def test_a_class_that_all_images_show_has_no_label_errors():
    pytest.importorskip('cleanlab', reason="cleanlab is optional (pip install 'cprfl[labels]')")
    rng = np.random.default_rng(0)
    targets = np.stack([np.ones(24, int), np.arange(24) % 2], 1)
    found = label_errors(np.clip(targets + rng.normal(0, 0.05, targets.shape), 0.01, 0.99), targets)
    assert not found[:, 0].any()


def test_without_cleanlab_the_error_says_how_to_install(dataset, explorer, monkeypatch):
    monkeypatch.setitem(sys.modules, 'cleanlab.multilabel_classification.filter', None)
    with pytest.raises(ImportError, match=r"pip install 'cprfl\[labels\]'"):
        label_errors(dataset.targets, dataset.targets)
    explorer.view()
    explorer._view.fields['kind'].value = 'label'
    assert 'pip install' in explorer._view.message.value
    assert explorer.kind == 'all' == explorer._view.fields['kind'].value
    explorer.close()


# ---- the explorer

def test_the_worst_pair_comes_first(explorer):
    assert explorer.set(kind='pair').pair == (0, 3)
    assert set(explorer.table()['category']) == {3}
    assert 'is taken for' in explorer.caption()


def test_a_button_shows_the_worst_pair_whatever_is_filtered(explorer):
    explorer.set(kind='miss', group='tail', category=2).worst_pair()
    assert explorer.pair == (0, 3)


def test_another_model_begins_with_its_own_worst_pair(explorer):
    explorer.set(kind='pair')
    assert explorer.set(run='guesses').pair == next(iter(explorer.pair_options().values()))


def test_a_pair_sets_the_kind_and_the_kind_forgets_the_pair(explorer):
    assert explorer.set(pair=(0, 3)).kind == 'pair'
    assert explorer.set(kind='miss').pair == ''


@pytest.mark.parametrize('change', [dict(kind='miss'), dict(group='tail'), dict(category=2), dict(order='low')])
def test_filters_are_those_of_the_table(tables, dataset, change):
    explorer = ErrorExplorer(tables, dataset).set(run='guesses', **change)
    want = explorer.errors.table('guesses')
    for column in {'kind', 'group', 'category'} & set(change): want = want[want[column] == change[column]]
    if 'order' in change: want = want.sort_values('score', kind='stable')
    assert explorer.table()['image'].tolist() == want['image'].tolist()


def test_what_one_run_finds_and_the_other_misses(explorer):
    table = explorer.set(run='guesses', kind='miss', right_in='confused').table()
    right = explorer.errors.right
    assert right['confused'][table['image'], table['category']].all()
    exchange = explorer.errors.exchange().query("right == 'confused' and kind == 'miss'")
    assert len(table) == exchange['count'].sum()


def test_lists_count_the_errors_behind_each_choice(explorer):
    explorer.set(run='guesses', kind='miss')
    for label, c in list(explorer.options('category').items())[1:]:
        assert label.endswith(f'({len(explorer.set(category=c).table())})')


def test_a_filter_that_nothing_passes_says_so(explorer):
    explorer.set(kind='kept')
    assert explorer.now() is None
    assert 'No error passes this filter' in explorer.caption()
    assert explorer.png()
    assert explorer.step().row == 1


def test_names_from_data_are_escaped(explorer):
    caption = explorer.set(pair=(0, 3)).caption()
    assert '<script>' not in caption
    assert '<b>0' not in caption


def test_a_click_chooses_the_error(explorer):
    explorer.set(run='guesses').click(2 * 128 + 9, 9)
    assert explorer.row == 3
    explorer.set(row=14).click(9, 9)
    assert explorer.row == 13
    explorer.click(800, 9)
    assert explorer.row == 13


def test_keys_step_and_keep(explorer):
    explorer.press('ArrowRight')
    explorer.press('k')
    assert list(explorer.kept) == [('confused', explorer.now()['image'], explorer.now()['category'])]
    explorer.press('k')
    assert not explorer.kept


# ---- a selection as CSV

def test_kept_errors_come_back_from_a_file(explorer, tables, dataset, tmp_path):
    for run in ('guesses', 'confused'):
        explorer.set(run=run, row=2)
        explorer.toggle_keep()
    explorer.save_selection(tmp_path / 'kept.csv')
    shuffled = dataset.subset(np.arange(N)[::-1])
    other = ErrorExplorer(tables, shuffled).load_selection(tmp_path / 'kept.csv')
    assert len(other.table()) == 2
    def names(e): return {(run, e.name(i), c) for run, i, c in e.kept}
    assert names(other) == names(explorer)


def test_without_kept_errors_the_filtered_ones_are_saved(explorer, tmp_path):
    explorer.set(kind='miss').save_selection(tmp_path / 'missed.csv')
    written = pd.read_csv(tmp_path / 'missed.csv')
    assert len(written) == len(explorer.table())
    assert set(written['kind']) == {'miss'}


def test_a_name_is_no_formula_in_a_spreadsheet(explorer, tmp_path):
    explorer.set(run='guesses').save_selection(tmp_path / 'all.csv')
    assert "'=cow" in set(pd.read_csv(tmp_path / 'all.csv')['class'])


@pytest.mark.parametrize('row, why', [('no.png,dog,confused', r'line 2: path: expected one of'),
                                      ('<b>00</b>.png,cat,confused', r'line 2: class: expected one of'),
                                      ('<b>00</b>.png,dog,other', r'line 2: run: expected one of guesses, confused')])
def test_what_does_not_exist_is_named_with_its_line(explorer, tmp_path, row, why):
    (tmp_path / 'bad.csv').write_text(f'path,class,run\n{row}\n')
    with pytest.raises(ValueError, match=why): explorer.load_selection(tmp_path / 'bad.csv')
    assert not explorer.kept


def test_a_file_without_the_columns_says_which(explorer, tmp_path):
    (tmp_path / 'bad.csv').write_text('path,name\na,b\n')
    with pytest.raises(ValueError, match='expected the columns path, class, run'):
        explorer.load_selection(tmp_path / 'bad.csv')


# ---- what explorers share

def test_explorers_show_the_same_image_and_category(explorer, tables, dataset):
    predictions = PredictionExplorer(tables, dataset.subset(np.arange(N)[::-1]))
    Selection(explorer, predictions)
    explorer.set(run='guesses', row=4)
    now = explorer.now()
    assert predictions.name(predictions.image) == explorer.name(now['image'])
    assert predictions.dataset.classes[predictions.category] == now['class']


def test_the_errors_follow_as_far_as_they_can(explorer, tables, dataset):
    predictions = PredictionExplorer(tables, dataset)
    Selection(explorer, predictions)
    row = explorer.set(run='guesses').table().iloc[7]
    predictions.set(image=int(row['image']), category=int(row['category']))
    assert (explorer.now()['image'], explorer.now()['category']) == (row['image'], row['category'])


def test_the_model_is_shared_as_well(explorer, tables, dataset):
    torch.manual_seed(0)
    models = {name: ERM('resnet18', 4).eval() for name in tables}
    others = PredictionExplorer(tables, dataset), AttentionExplorer(models, dataset)
    Selection(explorer, *others)
    for name in tables:
        explorer.set(run=name)
        assert [other.run for other in others] == [name, name]


def test_drift_follows_the_model(tables):
    def run(epochs):
        prompts = {e: torch.eye(4) + e * torch.ones(4, 4).triu() for e in range(epochs)}
        return SimpleNamespace(prompts=prompts, classes=CLASSES, groups=GROUPS)
    drift = DriftExplorer(dict(long=run(5), short=run(3)))
    assert drift.epoch == 4
    assert drift.select(run='short', category='dog').epoch == 2
    assert drift.category == 3


def test_a_closed_explorer_has_left_the_selection(explorer, tables, dataset):
    predictions = PredictionExplorer(tables, dataset)
    shared = Selection(explorer, predictions)
    predictions.close()
    assert shared.explorers == [explorer]
    assert predictions.selection is None


def test_other_than_three_labels(tables, dataset):
    explorer = PredictionExplorer(tables, dataset).set(k=1)
    assert len(explorer.table()) == 2
    with pytest.raises(ValueError, match='k: expected'): PredictionExplorer(tables, dataset, k=0)


def test_there_are_no_more_labels_than_classes(tables, dataset):
    assert PredictionExplorer(tables, dataset, k=50).k == len(dataset.classes)


def test_categories_come_by_score(tables, dataset):
    explorer = PredictionExplorer(tables, dataset, model='guesses').set(image=6)
    logits = explorer.predictions.logits['guesses'][6]
    assert logits[list(explorer.options('category').values())].tolist() == sorted(logits, reverse=True)


def test_a_click_on_a_name_selects_the_category(tables, dataset):
    explorer = PredictionExplorer(tables, dataset)
    explorer.click(272 + 214 + 20, 30 + 70 + 20) # second model, second label
    wanted = explorer.table().query("model == 'confused' and rank == 2")['class'].item()
    assert dataset.classes[explorer.category] == wanted
    assert place_of_best(20, 40, 2, 3) is None
    assert place_of_best(272 + 2 * 214 + 20, 40, 2, 3) is None


def test_a_patch_is_found_in_both_pictures():
    shape, grid = (100, 200, 3), (2, 4) # shown 400 x 200 at x = 0 and x = 416, below 26 pixels of title
    assert patch_at(10, 30, shape, grid) == (0, 0)
    assert patch_at(416 + 390, 26 + 150, shape, grid) == (1, 3)
    assert patch_at(10, 10, shape, grid) is None


@pytest.mark.parametrize('ending, begins', [('png', b'\x89PNG'), ('svg', b'<?xml'), ('pdf', b'%PDF')])
def test_pictures_are_saved(explorer, tables, dataset, tmp_path, ending, begins):
    for shown in (explorer, PredictionExplorer(tables, dataset)):
        file = tmp_path / f'{type(shown).__name__}.{ending}'
        assert shown.save(file) == f'Saved as {file}'
        assert file.read_bytes().startswith(begins)


def test_an_unknown_ending_is_refused(explorer, tmp_path):
    with pytest.raises(ValueError, match="ending: expected one of png, svg, pdf, got 'gif'"):
        explorer.save(tmp_path / 'a.gif')


def test_the_menu_saves_beside_the_notebook(explorer, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    menu = explorer.view().children[0].children[-1]
    for _ in range(2): menu.value = 'PNG'
    assert sorted(file.name for file in tmp_path.iterdir()) == ['ErrorExplorer-1.png', 'ErrorExplorer-2.png']
    assert 'Saved as ErrorExplorer-2.png' in explorer._view.message.value
    explorer.close()
