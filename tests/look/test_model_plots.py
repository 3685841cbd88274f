"Figures of the explanations, by structure: axes, labels, marks"
from itertools import combinations

import matplotlib
import numpy as np
import pandas as pd
import pytest
import torch
from matplotlib import pyplot as plt
from matplotlib.colors import to_hex, to_rgb
from matplotlib.text import Text

matplotlib.use('Agg')

from cprfl.data.dataset import ArrayDataset
from cprfl.look.model_plots import (
    PALEST,
    plot_alignment,
    plot_by_class,
    plot_by_epoch,
    plot_flips,
    plot_heads,
    plot_map,
    plot_maps,
    plot_pointing,
    plot_similarity,
    plot_top_k,
    plot_top_k_report,
    plot_trajectories,
)
from cprfl.look.predictions import flip_table, top_k_report, top_k_table
from cprfl.look.prompts import prompt_drift, prompt_trajectories, similarity_change
from cprfl.look.style import GROUP_COLOURS, RIGHT, group_styles, light_to_dark, signed

CLASSES, GROUPS = [f'class {c}' for c in 'abcdef'], dict(head=[0, 1], medium=[2, 3], tail=[4, 5])
OF = np.repeat(['head', 'medium', 'tail'], 2)


@pytest.fixture(autouse=True)
def close_figures():
    yield
    plt.close('all')


@pytest.fixture
def rng(): return np.random.default_rng(0)


@pytest.fixture
def data(rng):
    images = rng.integers(0, 256, (30, 16, 24, 3), dtype=np.uint8)
    targets = (rng.random((30, 6)) < 0.4).astype(np.uint8)
    return ArrayDataset(images, targets, CLASSES, groups=GROUPS)


@pytest.fixture
def predictions(data, rng):
    return {m: rng.normal(size=(30, 6)) + up * data.targets for m, up in dict(erm=0, clip=1, cprfl=4).items()}


@pytest.fixture
def prompts(rng):
    start, way = rng.normal(size=(6, 5)), rng.normal(size=(6, 5))
    return {e: torch.tensor(start + 0.2 * e * way, dtype=torch.float32) for e in range(5)}


@pytest.fixture
def purity():
    keys = {'epoch': np.repeat(range(5), 6), 'class': CLASSES * 5, 'group': np.tile(OF, 5)}
    return pd.DataFrame(keys | dict(auc=np.linspace(0.5, 1, 30), positive=np.linspace(0, 0.9, 30), negative=-0.1))


def texts(labels): return [t.get_text() for t in labels]


def drawn(fig):
    fig.canvas.draw()
    return np.asarray(fig.canvas.buffer_rgba())


# ---- style

def lightness(colours): return np.asarray(colours)[..., :3] @ [0.299, 0.587, 0.114]


def test_the_colour_map_can_be_read_in_grey():
    assert (np.diff(lightness(light_to_dark()(np.linspace(0, 1, 50)))) < 0).all()


def test_groups_can_be_read_in_grey():
    groups = lightness([to_rgb(GROUP_COLOURS[g]) for g in ('head', 'medium', 'tail')])
    assert (np.diff(groups) > 0.1).all()


def test_each_group_has_a_sign_of_its_own():
    styles = group_styles(GROUPS)
    assert len({styles[g].sign for g in GROUPS}) == 3


def test_a_name_carries_the_sign_of_its_group():
    assert signed('x', 'tail') == '▲ x'
    assert signed('x', '') == 'x'


@pytest.mark.parametrize('draw', [
    lambda axes, d, p: plot_top_k_report(top_k_report(p, d.targets, GROUPS), axes=axes[:2]),
    lambda axes, d, p: plot_flips(flip_table(p, d.targets, GROUPS), groups=('head', 'tail'), axes=axes[:2]),
    lambda axes, d, p: plot_map(d[0][0], np.eye(4), axes[0]),
    lambda axes, d, p: plot_heads(d[0][0], torch.rand(2, 4, 6), axes=axes)], ids=['report', 'flips', 'map', 'heads'])
def test_axes_that_are_given_are_drawn_on(data, predictions, draw):
    fig, axes = plt.subplots(1, 4)
    assert draw(axes, data, predictions)[0] is fig
    assert len(plt.get_fignums()) == 1


# ---- top-3

def test_right_and_wrong_differ_in_mark_filling_and_colour(data, predictions):
    table = top_k_table(predictions, data.targets, CLASSES, GROUPS)
    fig, axes = plot_top_k(table, data, [3, 7])
    for row, i in zip(axes, (3, 7)):
        for ax, model in zip(row[2:], predictions):
            want = table[(table['image'] == i) & (table['model'] == model)].sort_values('rank')
            names = [signed(c, g) for c, g in zip(want['class'], want['group'])]
            marks = ['✓ ' if right else '✗ ' for right in want['right']]
            assert texts(ax.get_yticklabels()) == [mark + name for mark, name in zip(marks, names)]
            assert np.allclose([b.get_width() for b in ax.patches], want['score'])
            assert [b.get_hatch() == '////' for b in ax.patches] == (~want['right']).tolist()
            assert [to_hex(b.get_facecolor()) == RIGHT for b in ax.patches] == want['right'].tolist()
            assert ax.get_ylim()[0] > ax.get_ylim()[1], 'the best is on top'


def test_columns_are_truth_and_models(data, predictions):
    table = top_k_table(predictions, data.targets, CLASSES, GROUPS)
    fig, axes = plot_top_k(table, data, [3, 7], softmax=['clip'])
    assert axes.shape == (2, 5)
    assert texts(ax.title for ax in axes[0]) == [''] * 5  # titles are on the left
    assert [ax.get_title(loc='left') for ax in axes[0]] == ['', 'truth', 'erm', 'clip\n(softmax)', 'cprfl']
    for row, i in zip(axes, (3, 7)):
        labels = [signed(CLASSES[c], OF[c]) for c in np.flatnonzero(data.targets[i])]
        assert row[1].texts[0].get_text().split('\n') == labels


@pytest.fixture(params=['purple triangle ', 'WOMAN WITH HAMMER', '槌を持つ女性の写真'])
def long_names(data, request):
    "Images with many labels, whose names are long or wide, and the predictions of four models"
    data = ArrayDataset(data.images, np.ones_like(data.targets), [f'{request.param}{c}' * 2 for c in 'abcdef'], GROUPS)
    logits = {f'shapes-cprfl-random-{m}': np.random.default_rng(m).normal(size=(30, 6)) for m in range(4)}
    return data, logits


def top_k(data, logits, k=3): return top_k_table(logits, data.targets, data.classes, GROUPS, k=k)


def boxes_of_texts(fig):
    "Where the texts of a figure are, in pixels"
    fig.canvas.draw()
    return [t.get_window_extent() for t in fig.findobj(Text) if t.get_text() and t.get_visible()]


@pytest.mark.filterwarnings('ignore:Glyph')
@pytest.mark.parametrize('k', [1, 3, 6])
def test_labels_of_the_best_do_not_overlap(long_names, k):
    data, logits = long_names
    boxes = boxes_of_texts(plot_top_k(top_k(data, logits, k), data, [3, 7])[0])
    assert not [(a, b) for a, b in combinations(boxes, 2) if a.padded(-1).overlaps(b.padded(-1))]


def test_labels_of_the_best_can_be_read_on_a_page(long_names):
    data, logits = long_names
    fig, _ = plot_top_k(top_k(data, logits), data, [3, 7])
    assert min(t.get_fontsize() for t in fig.findobj(Text) if t.get_text()) >= 10
    assert fig.get_figwidth() <= 8.8, 'a page of 880 pixels shows it as it is'


def test_long_labels_of_the_best_are_cut(long_names):
    data, logits = long_names
    label = plot_top_k(top_k(data, logits), data, [3, 7])[1][0, 2].get_yticklabels()[0].get_text()
    assert '…' in label


@pytest.mark.parametrize('names', [('photos-global-held-out', 'photos-names-held-out'), ('x' * 90, 'x' * 91)])
def test_models_with_long_names_are_told_apart(data, names):
    logits = dict(zip(names, np.random.default_rng(0).normal(size=(2, 30, 6))))
    _, axes = plot_top_k(top_k(data, logits), data, [3])
    assert axes[0, 2].get_title(loc='left') != axes[0, 3].get_title(loc='left')


def test_without_truth_nothing_is_marked(data, predictions):
    table = top_k_table(predictions, data.targets, CLASSES, GROUPS)
    fig, axes = plot_top_k(table, data, [0], truth=False)
    labels = texts(axes[0, 1].get_yticklabels())
    assert axes.shape == (1, 4)
    assert len(labels) == 3
    assert not any(m in ''.join(labels) for m in '✓✗')
    assert not any(b.get_hatch() for ax in axes[0, 1:] for b in ax.patches)


def test_the_report_has_a_bar_per_model_and_group(data, predictions):
    report = top_k_report(predictions, data.targets, GROUPS)
    fig, axes = plot_top_k_report(report, ('recall', 'precision', 'class_recall'))
    assert [ax.get_ylabel() for ax in axes] == ['recall', 'precision', 'class recall']
    assert texts(axes[0].get_legend().get_texts()) == list(predictions)
    assert texts(axes[0].get_xticklabels()) == ['total', '● head', '■ medium', '▲ tail']
    recall = report.set_index(['model', 'group'])['recall']
    want = [recall[model, group] for model in predictions for group in ('total', *GROUPS)]
    assert np.allclose([b.get_height() for b in axes[0].patches], want)


def test_models_differ_in_their_filling(data, predictions):
    fig, axes = plot_top_k_report(top_k_report(predictions, data.targets, GROUPS))
    bars = [axes[0].patches[4 * j] for j in range(3)]
    assert len({(to_hex(b.get_facecolor(), keep_alpha=True), b.get_hatch()) for b in bars}) == 3


def test_flips_name_both_models_and_leave_the_diagonal_empty(data, predictions):
    flips = flip_table(predictions, data.targets, GROUPS)
    fig, axes = plot_flips(flips)
    cells = texts(axes[0].texts)
    n = flips.query("group == 'total' and right == 'cprfl' and wrong == 'erm'").iloc[0]
    assert len(cells) == 6
    assert cells[4] == f"{n['count']}\n{100 * n['share']:.0f} %"
    assert (axes[0].get_ylabel(), axes[0].get_xlabel()) == ('found by', 'missed by')
    assert len(axes) == 4
    assert texts(axes[0].get_yticklabels()) == list(predictions)


# ---- drift

def test_lines_are_medians_and_bands_quartiles(prompts):
    drift = prompt_drift(prompts, CLASSES, GROUPS)
    fig, ax = plot_by_epoch(drift, 'distance')
    assert len(ax.lines) == 3
    assert len(ax.collections) == 3
    assert len({line.get_marker() for line in ax.lines}) == 3
    for line, g in zip(ax.lines, GROUPS):
        assert np.allclose(line.get_ydata(), drift[drift['group'] == g].groupby('epoch')['distance'].median())
        assert line.get_color() == GROUP_COLOURS[g]
    assert ax.get_ylabel() == 'distance from its start'


def test_classes_can_be_lines_instead_of_bands(prompts):
    fig, ax = plot_by_epoch(prompt_drift(prompts, CLASSES, GROUPS), 'distance', classes=True)
    assert len(ax.lines) == 3 + 6
    assert not ax.collections


def test_classes_are_rows_in_the_order_of_their_groups(prompts):
    groups = dict(tail=[0, 1], head=[2, 3, 4], medium=[])  # and one class without a group
    drift = prompt_drift(prompts, CLASSES, groups)
    fig, ax = plot_by_class(drift, 'cosine')
    rows = ['● class c', '● class d', '● class e', '▲ class a', '▲ class b', 'class f']
    assert texts(ax.get_yticklabels()) == rows
    assert len(ax.lines) == 2, 'a line between groups'


def test_both_cluster_maps_have_one_order(prompts):
    change = similarity_change(prompts, CLASSES)
    fig, ax = plot_similarity(change, GROUPS)
    rows, columns = texts(ax.get_yticklabels()), texts(ax.get_xticklabels())
    assert sorted(r[2:] for r in rows) == CLASSES
    assert columns == rows + [''] + rows
    order = [CLASSES.index(r[2:]) for r in rows]
    shown = np.ma.filled(ax.collections[0].get_array().reshape(6, 13), np.nan)
    assert np.isnan(shown[:, 6]).all()
    assert np.allclose(shown[:, :6], change['before'].to_numpy()[np.ix_(order, order)])
    assert np.allclose(shown[:, 7:], change['after'].to_numpy()[np.ix_(order, order)])


@pytest.mark.filterwarnings('ignore:Attempting to set identical')  # the dendrogram of equal prompts has no length
def test_equal_prompts_make_no_trouble_for_the_clusters():
    same = torch.ones(6, 4)
    fig, ax = plot_similarity(similarity_change({0: same, 1: same}, CLASSES), GROUPS)
    assert len(ax.get_yticklabels()) == 6
    assert drawn(fig).std() > 0


def test_paths_start_hollow_and_end_filled(prompts):
    paths, explained = prompt_trajectories(prompts, CLASSES, GROUPS)
    fig, ax = plot_trajectories(paths, explained)
    way, start, end = ax.lines[:3]
    first = paths[paths['class'] == CLASSES[0]].sort_values('epoch')
    assert np.allclose(way.get_xydata(), first[['pc1', 'pc2']])
    assert np.allclose(start.get_xydata()[0], first[['pc1', 'pc2']].iloc[0])
    assert start.get_markerfacecolor() == 'white'
    assert np.allclose(end.get_xydata()[0], first[['pc1', 'pc2']].iloc[-1])
    assert end.get_markerfacecolor() == GROUP_COLOURS['head']
    assert sorted(texts(ax.texts)) == CLASSES
    assert f'{100 * explained[0]:.0f} %' in ax.get_xlabel()


def test_some_paths_can_be_named(prompts):
    paths, _ = prompt_trajectories(prompts, CLASSES, GROUPS)
    fig, ax = plot_trajectories(paths, names=CLASSES[:2])
    assert sorted(texts(ax.texts)) == CLASSES[:2]


def test_positives_and_negatives_by_group(purity):
    fig, axes = plot_alignment(purity)
    assert [ax.get_title() for ax in axes] == ['● head', '■ medium', '▲ tail']
    for ax, g in zip(axes, GROUPS):
        median = purity[purity['group'] == g].groupby('epoch')['positive'].median()
        assert np.allclose(ax.lines[0].get_ydata(), median)
        assert ax.lines[0].get_linestyle() == '-'
        assert ax.lines[1].get_linestyle() == '--'


def test_a_group_that_is_missing_has_no_panel(purity):
    fig, axes = plot_alignment(purity[purity['group'] != 'medium'])
    assert [ax.get_title() for ax in axes] == ['● head', '▲ tail']


# ---- attention

def lit(h, w, r, c):
    m = torch.zeros(h, w)
    m[r, c] = 1
    return m


@pytest.mark.parametrize('grid,cell,at', [
    ((4, 6), (1, 2), (9.5, 5.5)), ((2, 3), (1, 0), (3.5, 11.5)), ((16, 24), (3, 5), (5, 3))])
def test_the_cross_is_in_the_middle_of_the_strongest_patch(data, grid, cell, at):
    fig, ax = plot_map(data[0][0], lit(*grid, *cell))
    assert np.allclose(ax.lines[0].get_xydata(), [at])


def test_an_image_fades_to_white_but_for_the_lit_patch():
    black = torch.zeros(3, 16, 24, dtype=torch.uint8)
    ax = plot_map(black, lit(4, 6, 1, 2))[1]
    white = np.asarray(ax.images[1].get_array())
    assert (white[..., :3] == 1).all()
    assert white[1, 2, 3] == 0
    assert np.delete(white[..., 3].ravel(), 8).min() > 0.85
    assert not plot_map(black, None)[1].images[1:]


@pytest.mark.parametrize('cmap', [None, 'magma'])
@pytest.mark.parametrize('grid', [(4, 6), (5, 5), (3, 7)])
def test_a_patch_is_drawn_as_large_as_it_is(data, grid, cmap):
    above = plot_map(data[0][0], torch.rand(grid), cmap=cmap)[1].images[1]
    assert np.asarray(above.get_array()).shape[:2] == grid
    assert above.get_interpolation() == 'nearest'
    assert above.get_extent() == [-0.5, 23.5, 15.5, -0.5]


def opacity(ax): return 1 - np.asarray(ax.images[1].get_array())[..., 3] / PALEST


def test_maps_of_a_row_have_one_scale(data):
    flat, peak = torch.full((4, 6), 0.3), lit(2, 3, 1, 1)
    fig, axes = plot_maps([data[0][0]], [dict(flat=flat, peak=100 * peak)])
    assert np.allclose(opacity(axes[0, 1]), (1 / 6)**0.5)
    assert np.allclose(opacity(axes[0, 2]), peak)


def bars(fig, axes): return [ax for ax in fig.axes if ax not in list(np.ravel(axes))]


def test_each_row_has_a_bar_of_its_scale(data):
    images, maps = [data[0][0]] * 2, [dict(a=lit(2, 3, 0, 0)), dict(a=torch.ones(2, 3))]
    fig, axes = plot_maps(images, maps)
    assert [bar.get_ylim()[1] for bar in bars(fig, axes)] == pytest.approx([6, 1])
    assert {bar.get_ylabel() for bar in bars(fig, axes)} == {'times the mean patch'}


def test_attention_heads_have_one_scale(data):
    heads = torch.stack([0.5 * lit(4, 6, 0, 0), torch.full((4, 6), 1 / 48)])
    fig, axes = plot_heads(data[0][0], heads)
    assert opacity(axes[2]).max() == pytest.approx(1)
    assert opacity(axes[3]).max() == pytest.approx((1 / 24)**0.5)
    assert len(bars(fig, axes)) == 1


def test_boxes_follow_the_size_that_they_were_measured_in(data):
    fig, ax = plot_map(data[0][0], None, boxes=[(2, 4, 6, 8)], size=(32, 48))
    box = ax.patches[0]
    assert (box.get_xy(), box.get_width(), box.get_height()) == ((0.5, 1.5), 2, 2)


@pytest.mark.parametrize('value', [0., 1.])
def test_a_flat_map_points_nowhere(data, value):
    fig, ax = plot_map(data[0][0], torch.full((4, 6), value))
    assert not ax.lines
    assert np.isfinite(drawn(fig)).all()


def test_a_colour_map_is_laid_over_grey(data):
    fig, ax = plot_map(data[0][0], lit(4, 6, 1, 2), cmap='magma')
    assert len(ax.images) == 2
    assert ax.images[1].get_cmap().name == 'magma'
    assert np.asarray(ax.images[0].get_array()).ndim == 2


def test_a_row_per_image_and_a_column_per_method(data):
    images, a, b = [data[i][0] for i in range(2)], lit(4, 6, 0, 0), lit(2, 3, 1, 1)
    maps, notes = [dict(attention=a, gradcam=b), dict(gradcam=b)], [dict(gradcam='rank 2'), dict(gradcam='rank 9')]
    fig, axes = plot_maps(images, maps, ['dog', 'cat'], [[(0, 0, 4, 4)], []], notes=notes)
    assert axes.shape == (2, 3)
    assert [ax.get_title() for ax in axes.flat] == ['dog', 'attention', 'gradcam\nrank 2', 'cat', '', 'rank 9']
    assert [len(ax.patches) for ax in axes[0]] == [1, 1, 1]
    assert not axes[1, 1].images


def test_boxes_of_images_of_several_sizes(data):
    images, maps, box = [data[0][0]] * 2, [dict(a=lit(2, 3, 0, 0))] * 2, [[(2, 4, 6, 8)]] * 2
    fig, axes = plot_maps(images, maps, boxes=box, size=[(16, 24), (32, 48)])
    assert [ax.patches[0].get_width() for ax in axes[:, 0]] == [4, 2]


def test_heads_stand_beside_their_mean(data):
    heads = torch.stack([0.5 * lit(4, 6, 0, 0), 0.25 * lit(4, 6, 3, 5)])
    fig, axes = plot_heads(data[0][0], heads, name='dog')
    assert [ax.get_title() for ax in axes] == ['dog', 'mean, 38 %', 'head 1, 50 %', 'head 2, 25 %']
    assert np.allclose(axes[1].lines[0].get_xydata(), axes[2].lines[0].get_xydata())
    assert not np.allclose(axes[2].lines[0].get_xydata(), axes[3].lines[0].get_xydata())


@pytest.fixture
def summary():
    rows = [('ERM', 'gradcam'), ('CPRFL', 'gradcam'), ('CPRFL', 'attention')]
    rows += [('baseline', 'centre'), ('baseline', 'random')]
    table = pd.DataFrame(rows, columns=['name', 'method']).assign(total=0.1 * np.arange(5), head=0.2, tail=0.3, pairs=5)
    return table.set_index(['name', 'method'])


def test_baselines_are_lines_and_models_bars(summary):
    fig, ax = plot_pointing(summary, 'hits')
    assert texts(ax.get_legend().get_texts()) == ['ERM', 'CPRFL, Grad-CAM', 'CPRFL, attention', 'centre', 'random']
    assert len(ax.patches) == 3 * 3
    assert texts(ax.get_xticklabels()) == ['total', '● head', '▲ tail']
    assert ax.get_ylabel() == 'hits'
    assert len(ax.collections) == 2
    assert np.allclose(ax.collections[0].get_segments()[0][:, 1], 0.3)


def test_without_baselines_there_are_no_lines(summary):
    fig, ax = plot_pointing(summary.iloc[:3])
    assert not ax.collections
