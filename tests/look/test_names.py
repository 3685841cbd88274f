"Names of classes, methods and groups are drawn as they are written, in every figure and explorer"
import warnings

import matplotlib
import numpy as np
import pandas as pd
import pytest
import torch
from matplotlib import pyplot as plt
from matplotlib.cbook import is_math_text
from matplotlib.figure import Figure
from matplotlib.text import Text

matplotlib.use('Agg')

from cprfl import look
from cprfl.data.dataset import ArrayDataset
from cprfl.look import explorer, explorers, model_plots, monitor, plots, style
from cprfl.look.predictions import flip_table, top_k_report, top_k_table
from cprfl.look.prompts import prompt_drift, prompt_trajectories, similarity_change
from cprfl.text import html_text, visible

NASTY = [
    r'$\frac{$', 'a $5$ note', r'\$_^{}', '_under', '<b onclick="x()">', '&lt;', 'a|b `c`', '=1+1', '%s {0} %(a)s',
    'red\x1b[31m', 'two\nlines', 'abc\u202egpj', 'Füße', 'x' * 40]
SHORT = [name for name in NASTY if len(name) < 16] # a narrow column cuts longer ones
C = len(NASTY)
GROUPS = dict(head=list(range(4)), medium=list(range(4, 9)), tail=list(range(9, C)))
OF = np.repeat(list(GROUPS), [len(ids) for ids in GROUPS.values()])
MODELS = NASTY[:4]


@pytest.fixture(autouse=True)
def close_figures():
    yield
    plt.close('all')


def random(*shape): return np.random.default_rng(0).random(shape)


def dataset():
    targets = (random(20, C) < 0.4).astype(np.uint8)
    targets[0] = 1 # an image that shows every class
    return ArrayDataset((255 * random(20, 8, 8, 3)).astype(np.uint8), targets, NASTY, groups=GROUPS)


def predictions(): return {m: random(20, C) + i for i, m in enumerate(MODELS)}
def prompts(): return {e: torch.tensor(random(C, 6) + e * random(C, 6)[::-1].copy()) for e in range(3)}
def drift(): return prompt_drift(prompts(), NASTY, GROUPS)
def best(k=3): return top_k_table(predictions(), dataset().targets, NASTY, GROUPS, k=k)


def by_group(index): return pd.DataFrame(random(len(index), 4), index=index, columns=list(style.WITH_TOTAL))


def metrics(): return pd.DataFrame(dict(epoch=[1, 2], loss=[0.5, 0.4], lr=[0.1, 0.2]) | dict.fromkeys(GROUPS, 0.1))


def intervals():
    rows = [dict(key=key, group=g, mAP=50, low=40, high=60) for key in 'ab' for g in GROUPS]
    return pd.DataFrame(rows)


def alignment():
    keys = {'epoch': np.repeat(range(2), C), 'class': NASTY * 2, 'group': np.tile(OF, 2)}
    return pd.DataFrame(keys | dict(auc=0.7, positive=0.9, negative=0.1))


def scores():
    index = pd.MultiIndex.from_tuples([(m, a) for m in MODELS for a in ('attention', 'gradcam')])
    return by_group(index.set_names(['name', 'method']))


def own(draw, *args, **kw):
    "A figure for a function that draws on axes"
    fig, ax = plt.subplots()
    draw(ax, *args, **kw)
    return fig


IMAGE, MAP, LABELS = torch.zeros(3, 8, 8, dtype=torch.uint8), torch.rand(2, 2), {'a': NASTY[0], 'b': NASTY[3]}
NEAR = pd.DataFrame({'class': NASTY, 'group': OF, 'now': random(C), 'start': random(C)})
XY, PIXELS = random(3, C, 2), np.zeros((8, 8, 3), np.uint8)


FIGURES = { # each public function that draws: a call, and the names that must be seen
    'show_images': (lambda: plots.show_images(dataset(), [0, 1]), NASTY),
    'plot_class_counts': (lambda: plots.plot_class_counts(dataset()), NASTY),
    'plot_training': (lambda: plots.plot_training({m: metrics() for m in MODELS}), MODELS),
    'plot_groups': (lambda: plots.plot_groups(by_group(MODELS)), MODELS),
    'plot_rows': (lambda: plots.plot_rows(by_group(range(2)).assign(key=['a', 'b']), LABELS), LABELS.values()),
    'plot_intervals': (lambda: plots.plot_intervals(intervals(), LABELS), LABELS.values()),
    'plot_ap_by_frequency': (
        lambda: plots.plot_ap_by_frequency(dict.fromkeys(MODELS[2:], random(C)), np.arange(C), GROUPS), MODELS[2:]),
    'plot_top': (lambda: plots.plot_top(IMAGE, random(C), NASTY, k=C), NASTY),
    'plot_top_k': (lambda: model_plots.plot_top_k(best(C), dataset(), [0], softmax=MODELS[:1]), [*SHORT, *MODELS]),
    'plot_top_k_report': (
        lambda: model_plots.plot_top_k_report(top_k_report(predictions(), dataset().targets, GROUPS)), MODELS),
    'plot_flips': (lambda: model_plots.plot_flips(flip_table(predictions(), dataset().targets, GROUPS)), MODELS),
    'plot_by_epoch': (lambda: model_plots.plot_by_epoch(drift().assign(**{NASTY[1]: 1.}), NASTY[1]), NASTY[1:2]),
    'plot_by_class': (lambda: model_plots.plot_by_class(drift().assign(**{NASTY[1]: 1.}), NASTY[1]), NASTY),
    'plot_alignment': (lambda: model_plots.plot_alignment(alignment()), []),
    'plot_similarity': (
        lambda: model_plots.plot_similarity(similarity_change(prompts(), NASTY), GROUPS, NASTY[:2]), NASTY),
    'plot_trajectories': (
        lambda: model_plots.plot_trajectories(*prompt_trajectories(prompts(), NASTY, GROUPS)), NASTY),
    'plot_map': (lambda: model_plots.plot_map(IMAGE, MAP, title=NASTY[0]), NASTY[:1]),
    'plot_maps': (
        lambda: model_plots.plot_maps([IMAGE], [dict.fromkeys(MODELS, MAP)], NASTY[4:5], notes=[{MODELS[0]: NASTY[5]}]),
        [*MODELS, *NASTY[4:6]]),
    'plot_heads': (lambda: model_plots.plot_heads(IMAGE, torch.rand(2, 2, 2), name=NASTY[0]), NASTY[:1]),
    'plot_pointing': (lambda: model_plots.plot_pointing(scores(), NASTY[4]), [*MODELS, NASTY[4]]),
    'grouped_bars': (lambda: own(style.grouped_bars, by_group(MODELS)), MODELS),
    'heat_map': (lambda: own(style.heat_map, pd.DataFrame(random(4, 4), MODELS, NASTY[4:8])), NASTY[:8]),
    'draw_best': (lambda: own(explorers.draw_best, [(n, 0.5, True, None) for n in NASTY[:3]], NASTY[3]), NASTY[:4]),
    'draw_predictions': (
        lambda: explorers.draw_predictions(best(), PIXELS, dict(zip(NASTY, NASTY)), dict(zip(MODELS, MODELS))), MODELS),
    'draw_paths': (lambda: own(explorers.draw_paths, XY, 2, 0, {n: [c] for c, n in enumerate(NASTY)}), NASTY[:3]),
    'draw_names': (lambda: own(explorers.draw_names, XY, 2, dict(enumerate(NASTY[:5]))), NASTY[:5]),
    'draw_neighbours': (lambda: own(explorers.draw_neighbours, NEAR, NASTY), NASTY[:9]),
    'draw_alignment': (
        lambda: own(monitor.draw_alignment, alignment().assign(group=NASTY[:2] * C)), NASTY[:2])}
WITHOUT_NAMES = {'draw_attention', 'draw_errors', 'draw_training', 'overlay', 'frame', 'panel', 'new_figure', 'to_png',
                 'write'}


def test_every_function_that_draws_is_among_them():
    "A new figure needs its call above"
    drawing = {name for name in look.__all__ if name.startswith(('plot_', 'draw_', 'show_'))}
    assert len(drawing) > 20
    assert not drawing - set(FIGURES) - WITHOUT_NAMES


def figure(drawn):
    "The figure of what a function gives"
    return drawn if isinstance(drawn, Figure) else drawn[0]


def is_number(text):
    "Whether a text is one of matplotlib's own, such as a power of ten on an axis"
    return text.startswith(r'$\mathdefault{')


def as_drawn(fig):
    "What is written in a figure; what would be a formula raises"
    with warnings.catch_warnings(): # figures with long names may leave little for the axes
        warnings.filterwarnings('ignore', 'constrained_layout not applied')
        fig.canvas.draw()
    found = [text.get_text() for text in fig.findobj(Text) if not is_number(text.get_text())]
    formulae = [text for text in found if is_math_text(text)]
    assert not formulae
    return '\n'.join(found).replace(r'\$', '$')


@pytest.mark.parametrize('name', FIGURES)
def test_names_are_drawn_as_they_are_written(name):
    call, names = FIGURES[name]
    written = as_drawn(figure(call()))
    lost = [n for n in names if visible(n) not in written]
    assert not lost


@pytest.mark.parametrize('name', FIGURES)
def test_control_characters_are_not_drawn(name):
    written = as_drawn(figure(FIGURES[name][0]()))
    assert visible(written, keep='\n') == written


# ---- explorers

@pytest.fixture
def predicted():
    frame = {m: pd.DataFrame(random(20, C), columns=NASTY) for m in MODELS}
    for table in frame.values(): table.insert(0, 'path', list(map(str, dataset().paths)))
    return explorers.PredictionExplorer(frame, dataset())


def test_the_page_of_an_explorer_shows_names_as_text(predicted):
    caption = predicted.caption()
    assert html_text('<b onclick="x()">') in caption
    assert '<b onclick' not in caption


def test_the_picture_of_an_explorer_shows_names_as_text(predicted): assert as_drawn(predicted.figure())


def test_labels_of_controls_hold_no_control_characters():
    labels = explorer.class_labels(NASTY, GROUPS)
    assert [visible(label) for label in labels] == labels
