"Groups with names of their own: reports, tables, figures and explorers"
import json

import matplotlib
import numpy as np
import pandas as pd
import pytest
import torch
from matplotlib import pyplot as plt

from cprfl.data.dataset import ArrayDataset
from cprfl.data.longtail import imbalance_summary
from cprfl.look import model_plots, plots
from cprfl.look.attention import pointing_summary
from cprfl.look.explorers import DriftExplorer, PredictionExplorer
from cprfl.look.predictions import flip_table, telling_images, top_k_report, top_k_table
from cprfl.look.prompts import prompt_drift, prompt_trajectories
from cprfl.look.style import GROUP_COLOURS, group_styles, groups_in, in_order, legend_of, signed
from cprfl.metrics import check_groups, format_report, group_means, multilabel_report
from cprfl.runs.report import collect, compare_to, format_table, intervals, make_table, results_table, summarise
from cprfl.runs.run import Run
from cprfl.runs.tables import Table
from cprfl.statistics import bootstrap_map, map_columns, paired_seeds, verdict

GROUPS = {'common ones': [0, 1], 'rare_1 %': [2, 3, 4]}
NAMES = ['total', *GROUPS]
CLASSES = list('abcde')
matplotlib.use('Agg')


@pytest.fixture(autouse=True)
def closed():
    yield
    plt.close('all')


@pytest.fixture
def data():
    rng = np.random.default_rng(0)
    targets = (rng.random((30, 5)) < 0.4).astype(np.int8)
    targets[0] = -1
    images = rng.integers(0, 255, (30, 8, 8, 3), dtype=np.uint8)
    return ArrayDataset(images, targets, CLASSES, GROUPS, paths=[f'{i}.png' for i in range(30)])


@pytest.fixture
def predictions(data):
    rng = np.random.default_rng(1)
    return {name: rng.normal(size=(30, 5)) + data.targets for name in ('cprfl', 'erm')}


# ---- reports

def test_a_report_has_the_groups(data, predictions):
    report = multilabel_report(predictions['erm'], data.targets, data.groups)
    text = format_report(report).splitlines()[0]
    for name in NAMES: assert f' {name} ' in text
    assert text.split('rare_1 % ')[1].strip() == f"{100 * report['rare_1 %']:.2f}"


def test_a_summary_has_the_groups(data):
    s = imbalance_summary(data.targets, data.groups)
    assert [s[name] for name in GROUPS] == [2, 3]
    assert 'tail_images' not in s


@pytest.mark.parametrize('name', ['total', 'ap', 'OP', 'seconds', 'epoch', 'seed', 'classes', ''])
def test_names_of_other_entries_are_refused(data, name):
    with pytest.raises(ValueError, match='groups: .* would hide an entry of the report; choose other names'):
        ArrayDataset(data.images, data.targets, CLASSES, {name: [0]})


@pytest.mark.parametrize('members, why', [
    ([5], r'class indices in 0..4, got 5..5'), ([-1], 'got -1..-1'), ([0.5], 'class indices, or 5 booleans, got 0.5'),
    ([True, False], 'or 5 booleans, got True, False'), (['a'], 'got a')])
def test_classes_of_a_group_are_checked(data, members, why):
    with pytest.raises(ValueError, match=why): ArrayDataset(data.images, data.targets, CLASSES, {'mine': members})


def test_groups_are_a_dictionary(data):
    with pytest.raises(TypeError, match='groups: expected a dictionary of name -> class indices, got list'):
        ArrayDataset(data.images, data.targets, CLASSES, [[0], [1]])


@pytest.mark.parametrize('members', [[1, 3], (3, 1, 1), np.array([1, 3]), torch.tensor([1, 3]), range(1, 5, 2),
                                     [False, True, False, True, False]], ids=str)
def test_members_of_any_kind(members):
    assert check_groups({'mine': members}, 5)['mine'].tolist() == [1, 3]
    assert group_means([0., .2, 0., .4, 0.], {'mine': members})['mine'] == pytest.approx(0.3)


# ---- tables

def folder_of(path, key, seed, groups, total=50.):
    "A finished run, as far as tables read it"
    run = path / f'{key}-s{seed}'
    run.mkdir(parents=True)
    recipe = dict(name=run.name, train=dict(seed=seed))
    ids = {name: list(map(int, members)) for name, members in groups.items()}
    config = dict(recipe=recipe, classes=CLASSES, groups=ids, class_counts=[9] * 5, num_train=30)
    (run / 'config.json').write_text(json.dumps(config))
    logits = np.random.default_rng(seed).normal(size=(30, 5))
    report = multilabel_report(logits, np.random.default_rng(9).random((30, 5)) < 0.4, groups)
    report |= dict(total=total / 100, ap=report['ap'].tolist(), num_test=30, seconds=60.)
    (run / 'report.json').write_text(json.dumps(report))
    frame = pd.DataFrame(logits, columns=CLASSES)
    frame.insert(0, 'path', [f'{i}.png' for i in range(30)])
    frame.to_parquet(run / 'predictions.parquet')
    return Run(run)


@pytest.fixture
def runs(tmp_path):
    return [folder_of(tmp_path, 'cprfl', 0, GROUPS, 60), folder_of(tmp_path, 'cprfl', 1, GROUPS, 62),
            folder_of(tmp_path, 'erm', 0, GROUPS, 40)]


TABLE = Table('Mine', (('erm', 'ERM', ''), ('cprfl', 'CPRFL', '')))


def test_tables_of_runs_have_the_groups(runs):
    assert list(results_table(runs)) == ['seed', *NAMES, 'seconds']
    shown = summarise(results_table(runs))
    assert list(shown) == [*NAMES, 'seeds', 'seconds']
    assert shown['total'].tolist() == ['61.0 ± 1.4', '40.0 (n=1)']


def test_a_single_run_has_no_deviation(runs):
    shown = summarise(results_table(runs[2:]))
    assert shown['total'].tolist() == ['40.0']
    assert shown['seeds'].tolist() == [1]
    assert not shown.astype(str).apply(lambda column: column.str.contains('nan')).any(axis=None)


@pytest.mark.parametrize('format', ['text', 'csv', 'markdown', 'latex'])
def test_made_tables_have_the_groups(runs, format):
    results, classes = collect(runs[0].folder.parent)
    assert set(classes['group']) == set(GROUPS)
    text = format_table(make_table(TABLE, results), format)
    plain = text.replace('\\', '')
    for name in NAMES: assert name in plain
    assert '40.0 (n=1)' in text
    assert 'nan' not in text


def test_runs_with_other_groups_stand_in_one_table(tmp_path, runs):
    folder_of(tmp_path, 'asl', 0, dict(head=[0], tail=[1, 2, 3, 4]))
    results, _ = collect(tmp_path)
    assert map_columns(results) == ['total', 'head', 'tail', *GROUPS]
    made = make_table(Table('Both', (('erm', 'ERM', ''), ('asl', 'ASL', ''))), results)
    assert made.loc['ASL', 'rare_1 %'] == '-'


def test_comparisons_judge_the_groups(runs):
    results, _ = collect(runs[0].folder.parent)
    said, = compare_to(TABLE, results)
    for name in NAMES: assert f'{name} ' in said
    got = paired_seeds(results_table([*runs, runs[2]]).drop_duplicates(), 'cprfl', 'erm')
    assert list(got.index) == NAMES
    assert 'rare_1 %' in verdict(got)


def test_intervals_have_the_groups(runs, data):
    table = intervals(runs[0].folder.parent, data.targets, n=20)
    assert set(table['group']) == set(NAMES)
    assert list(bootstrap_map(np.random.default_rng(0).normal(size=(30, 5)), data.targets, GROUPS, n=5).index) == NAMES


# ---- style

def test_own_groups_have_styles_of_their_own():
    styles = [group_styles(['few', 'some', 'many', 'most'])[g] for g in ('few', 'some', 'many', 'most')]
    for part in zip(*styles): assert len(set(part)) == 4


def test_a_style_does_not_depend_on_the_order():
    assert group_styles(['b', 'a', 'total', '']) == group_styles(['a', 'b'])
    assert in_order(['b', 'tail', '', 'a', 'total', 'head'], with_total=True) == ['total', 'head', 'tail', 'a', 'b']


def test_known_groups_keep_their_style():
    assert group_styles(['few', 'tail'])['tail'].colour == GROUP_COLOURS['tail']
    assert group_styles(['few', 'head'])['few'].colour != GROUP_COLOURS['head']


def test_signs_and_legend():
    assert legend_of(GROUPS) == '● common ones ■ rare_1 %'
    assert signed('cat', 'rare_1 %', GROUPS) == '■ cat'
    assert groups_in(pd.DataFrame(dict(group=['rare_1 %', 'total', '', 'common ones']))) == NAMES[1:]


# ---- figures

def legends(fig): return [text.get_text() for ax in fig.axes for text in (ax.legend_.get_texts() if ax.legend_ else [])]


def test_figures_of_data(data):
    fig, _ = plots.plot_class_counts(data)
    assert legends(fig) == ['● common ones (2)', '■ rare_1 % (3)']
    plots.show_images(data, [0, 1])


def test_figures_of_results(runs):
    results, _ = collect(runs[0].folder.parent)
    labels = dict(cprfl='CPRFL', erm='ERM')
    assert legends(plots.plot_groups(results_table(runs[:1]))[0]) == NAMES
    assert legends(plots.plot_rows(results, labels)[0]) == NAMES
    table = pd.DataFrame([dict(key=k, group=g, mAP=50, low=40, high=60) for k in labels for g in NAMES])
    assert legends(plots.plot_intervals(table, labels)[0]) == NAMES[1:]
    aps = dict(erm=np.full(5, .4), cprfl=np.full(5, .6))
    assert len(legends(plots.plot_ap_by_frequency(aps, np.arange(1, 6), GROUPS)[0])) == 4


def test_a_training_shows_the_groups():
    row = dict(epoch=1, loss=.1, lr=.1, total=.5, **dict.fromkeys(GROUPS, .4), seconds=9.)
    fig, _ = plots.plot_training(pd.DataFrame([row, row | dict(epoch=2)]))
    assert legends(fig) == [*NAMES, 'best: epoch 1']


@pytest.fixture
def prompts(): return {e: torch.randn(5, 8, generator=torch.Generator().manual_seed(e)) for e in range(3)}


def test_figures_of_predictions(data, predictions):
    table = top_k_table(predictions, data.targets, CLASSES, GROUPS)
    model_plots.plot_top_k(table, data, [0, 1])
    fig, axes = model_plots.plot_top_k_report(top_k_report(predictions, data.targets, GROUPS))
    names = [label.get_text() for label in axes[0].get_xticklabels()]
    assert names == ['total', '● common ones', '■ rare_1 %']
    fig, axes = model_plots.plot_flips(flip_table(predictions, data.targets, GROUPS))
    assert [ax.get_title() for ax in axes] == names


def test_figures_of_prompts(prompts):
    drift = prompt_drift(prompts, CLASSES, GROUPS)
    assert legends(model_plots.plot_by_epoch(drift)[0]) == NAMES[1:]
    model_plots.plot_by_class(drift, 'cosine')
    paths, explained = prompt_trajectories(prompts, CLASSES, GROUPS)
    assert len(legends(model_plots.plot_trajectories(paths, explained)[0])) == 4


def test_figures_of_alignment(prompts):
    drift = prompt_drift(prompts, CLASSES, GROUPS)
    purity = drift.assign(positive=.5, negative=.1, auc=.9)
    fig, axes = model_plots.plot_alignment(purity)
    assert [ax.get_title() for ax in np.ravel(axes)] == ['● common ones', '■ rare_1 %']


def test_pointing_has_the_groups():
    table = pd.DataFrame(dict(method='attention', hit=[1., 0.], group=list(GROUPS), **{'class': ['a', 'c']}))
    summary = pointing_summary(dict(cprfl=table))
    assert list(summary) == [*NAMES, 'pairs']
    model_plots.plot_pointing(summary)


# ---- explorers

def test_the_last_group_is_the_rare_one(data, predictions):
    picks = telling_images(predictions, data.targets, GROUPS, 'tail', n=30)
    assert sorted(picks) == np.flatnonzero((data.targets[:, 2:] > 0).any(1)).tolist()


def frame(data, logits):
    table = pd.DataFrame(logits, columns=CLASSES)
    table.insert(0, 'path', data.paths)
    return table


def test_predictions_can_be_explored(data, predictions):
    e = PredictionExplorer({name: frame(data, logits) for name, logits in predictions.items()}, data, model='cprfl')
    assert 'a rare_1 % label' in e.options('images')
    assert e.set(images='tail').png()
    assert '● common ones ■ rare_1 %' in e.caption()


def test_unknown_labels_are_said_in_the_explorer(data, predictions):
    e = PredictionExplorer({'erm': frame(data, predictions['erm'])}, data).set(image=0)
    assert e.table()['right'].tolist() == [None] * 3
    assert 'not known: a ●, b ●, c ■, d ■, e ■' in e.caption()
    assert e.png()


def test_prompts_can_be_explored(prompts):
    from types import SimpleNamespace
    e = DriftExplorer(SimpleNamespace(prompts=prompts, classes=CLASSES, groups=GROUPS))
    assert e.png()
    assert '● common ones ■ rare_1 %' in e.caption()
