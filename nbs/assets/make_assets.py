"The icon, the card and the first page's pictures, drawn by the kit: `python nbs/assets/make_assets.py [RUN]`"
import json
import sys
from base64 import b64decode
from io import BytesIO
from pathlib import Path

import matplotlib
import numpy as np
from PIL import Image

from cprfl.data import shapes_lt
from cprfl.look.plots import plot_class_counts
from cprfl.look.style import GROUP_COLOURS

HERE = Path(__file__).parent
NIGHT, PAPER = '#12263c', '#fbfaf7'
BARS = ( # height, colour
    (44, PAPER), (25, GROUP_COLOURS['medium']), (15, GROUP_COLOURS['medium']), (9, GROUP_COLOURS['tail']))


def favicon():
    "A long tail on a rounded square"
    bars = ''.join(
        f'<rect x="{11 + 11 * i}" y="{54 - h}" width="9" height="{h}" rx="1.5" fill="{colour}"/>'
        for i, (h, colour) in enumerate(BARS))
    square = f'<rect width="64" height="64" rx="13" fill="{NIGHT}"/>'
    size = 'width="32" height="32" viewBox="0 0 64 64"' # without a width, a navbar gives it none
    return f'<svg xmlns="http://www.w3.org/2000/svg" {size}>{square}{bars}</svg>\n'


def badge(words):
    "A button of a page, which needs no other host"
    style = f'fill="{PAPER}" font-family="sans-serif" font-size="12" text-anchor="middle"'
    box = f'<rect width="140" height="24" rx="4" fill="#1f5f8b"/><text x="70" y="16" {style}>{words}</text>'
    return f'<svg xmlns="http://www.w3.org/2000/svg" width="140" height="24" viewBox="0 0 140 24">{box}</svg>\n'


def rare_scenes(train, n):
    "Indices of n different training scenes, each with a label of the medium or tail groups"
    ids = [*train.groups['tail'], *train.groups['medium']]
    firsts = [int(np.flatnonzero(train.targets[:, c])[0]) for c in ids]
    return list(dict.fromkeys(firsts))[:n]


def draw_counts(fig, train):
    "How the classes are distributed, in the lower left of the card"
    ax = fig.add_axes((0.06, 0.13, 0.46, 0.31), facecolor=PAPER)
    plot_class_counts(train, ax)
    ax.set_xticks([])
    ax.set_ylabel('')
    ax.set_xlabel('training images of the 20 classes of Shapes-LT', fontsize=14, labelpad=8)
    ax.legend(frameon=False, fontsize=14)


def draw_scenes(fig, train):
    "Nine scenes, on the right of the card"
    for k, i in enumerate(rare_scenes(train, 9)):
        row, column = divmod(k, 3)
        ax = fig.add_axes((0.565 + 0.138 * column, 0.639 - 0.2629 * row, 0.13, 0.13 * 1200 / 630))
        ax.imshow(train[i][0].permute(1, 2, 0).numpy())
        ax.set_axis_off()


def card(train):
    "1200 by 630 pixels: what it is, how the classes are distributed, and how the scenes look"
    import matplotlib.pyplot as plt
    fig = plt.figure(figsize=(12, 6.3), dpi=100, facecolor=PAPER)
    fig.add_artist(matplotlib.patches.Rectangle((0, 0), 0.012, 1, color=GROUP_COLOURS['head']))
    fig.text(0.055, 0.78, 'cprfl', fontsize=66, weight='bold', color=NIGHT, family='monospace')
    title = 'Long-tailed multi-label\nimage classification,\nin notebooks'
    fig.text(0.06, 0.625, title, fontsize=25, color=NIGHT, va='center', linespacing=1.25)
    draw_counts(fig, train)
    draw_scenes(fig, train)
    return fig


def find_image(test, scores):
    "The first test image with one category of each group, which are the model's best guesses"
    group = {int(c): g for g, ids in test.groups.items() for c in ids}
    for i, target in enumerate(test.targets):
        there = np.flatnonzero(target).tolist()
        best = np.argsort(-scores[i])[:len(there)].tolist()
        groups = sorted(group[c] for c in there)
        if groups == ['head', 'medium', 'tail'] and set(best) == set(there): return i, there
    raise ValueError('no test image has one category of each group and all of them among the best guesses')


def questions(run):
    "One test image, and the attention of the prompt of each category that it shows"
    import matplotlib.pyplot as plt

    from cprfl.look.attention import attention_maps
    from cprfl.look.model_plots import plot_map
    from cprfl.look.style import signed
    from cprfl.runs import load_data
    test = load_data(run.recipe)[1]
    i, there = find_image(test, run.predictions[run.classes].to_numpy())
    image, size = test[i][0], tuple(test.image(i).shape[-2:])
    group = {int(c): g for g, ids in test.groups.items() for c in ids}
    maps = attention_maps(run.model(), image[None]).mean[0]
    plt.rcParams['axes.titlesize'] = 11 # 13 pixels where the picture is 880 wide
    fig, axes = plt.subplots(1, len(there) + 1, figsize=(9.5, 2.65), dpi=150, layout='constrained', facecolor='white')
    plot_map(image, None, axes[0], title='the image')
    for ax, c in zip(axes[1:], there):
        boxes = [box[1:] for box in test.boxes[i] if box[0] == c]
        plot_map(image, maps[c], ax, boxes, size, signed(test.classes[c], group[c]))
    return fig


BARS_OF = { # files of results -> row -> label
    ('results/demo.csv',): {
        'shapes-clip': 'zero-shot CLIP', 'shapes-erm': 'linear head', 'shapes-cprfl-random': 'CPRFL,\nrandom prompts',
        'shapes-cprfl': 'CPRFL'},
    tuple(f'analysis/results/{name}/results.csv' for name in ('coco-mini', 'names', 'opponents')): {
        'asl': 'linear head', 'topk': 'linear head,\nbest patches', 'cprfl-random': 'CPRFL,\nrandom prompts',
        'cprfl': 'CPRFL', 'global': 'CPRFL +\nglobal head', 'global-names': 'CPRFL +\nglobal head + names'}}
TITLES = 'Shapes-LT: drawings, the whole network learns', 'COCO-LT mini: photographs, the backbone is frozen'


def results_of(files):
    "mAP by row and seed; a row that is in two files counts in the first"
    import pandas as pd
    frames = [pd.read_csv(HERE.parent / file).rename(columns={'method': 'key'}) for file in files]
    known = [set().union(*(frame['key'] for frame in frames[:i])) for i in range(len(frames))]
    return pd.concat([frame[~frame['key'].isin(there)] for frame, there in zip(frames, known)])


def bars():
    "mAP by group, for shapes and for photographs, from the result files"
    import matplotlib.pyplot as plt
    fig, axes = plt.subplots(2, 1, figsize=(9.5, 5.6), dpi=150, layout='constrained', facecolor='white')
    for ax, title, (files, rows) in zip(axes, TITLES, BARS_OF.items()):
        by_row = results_of(files).groupby('key')[['head', 'medium', 'tail']]
        mean, std = by_row.mean().loc[list(rows)], by_row.std().loc[list(rows)]
        for k, group in enumerate(mean):
            at = np.arange(len(rows)) + 0.27 * (k - 1)
            drawn = ax.bar(at, mean[group], 0.25, yerr=std[group], color=GROUP_COLOURS[group], label=group)
            ax.bar_label(drawn, fmt='%.0f', fontsize=10.5, padding=2)
        ax.set_xticks(range(len(rows)), rows.values(), fontsize=11)
        ax.set_title(title, fontsize=12, loc='left')
        ax.set_ylabel('mAP (%)', fontsize=11)
        ax.spines[['top', 'right']].set_visible(False)
        ax.margins(y=0.15)
    axes[0].legend(frameon=False, fontsize=11, ncols=3, loc='upper left')
    return fig


CARDS = { # name -> page and cell whose picture it shows
    'top3': ('analysis/top3_photos', None), 'drift': ('analysis/prompt_drift', '689cfcf9'),
    'attention': ('analysis/attention', '20b3a9e9'), 'losses': ('analysis/losses', '17cf3e55'),
    'classes': ('tutorials/first_training', 'c3b97622'), 'explorer': ('analysis/top3', 'd534fdfa')}


def picture_of(page, cell):
    "The picture that a cell of a page shows; of the first cell with one, if none is named"
    for found in json.loads((HERE.parent / f'{page}.ipynb').read_text())['cells']:
        for out in found.get('outputs', []):
            kinds = [kind for kind in out.get('data', {}) if kind.startswith('image/')]
            if kinds and cell in (None, found['id']):
                return Image.open(BytesIO(b64decode(''.join(out['data'][kinds[0]])))).convert('RGB')
    raise ValueError(f'{page}: no picture in cell {cell}')


def thumbnail(page, cell, size=(480, 320)):
    "The upper left of a page's picture, as wide as a card"
    picture = picture_of(page, cell)
    width = min(picture.width, max(picture.height * 3 // 2, 640))
    part = picture.crop((0, 0, width, min(picture.height, width * 2 // 3)))
    part.thumbnail(size)
    sheet = Image.new('RGB', size, 'white')
    sheet.paste(part, ((size[0] - part.width) // 2, (size[1] - part.height) // 2))
    return sheet


def save_thumbnail(picture, file):
    picture.quantize(96, dither=Image.Dither.NONE).save(file, optimize=True)


def save(fig, file):
    "A PNG of few colours, which is small"
    fig.canvas.draw()
    pixels = np.asarray(fig.canvas.buffer_rgba())[..., :3]
    Image.fromarray(pixels).quantize(192, dither=Image.Dither.NONE).save(file, optimize=True)


if __name__ == '__main__':
    matplotlib.use('Agg')
    if len(sys.argv) > 1:
        from cprfl.runs import Run
        save(questions(Run(sys.argv[1])), HERE / 'questions.png')
    (HERE / 'favicon.svg').write_text(favicon())
    for name in ('Colab', 'Kaggle'): (HERE / f'{name.lower()}.svg').write_text(badge(f'Open in {name}'))
    save(bars(), HERE / 'bars.png')
    for name, place in CARDS.items(): save_thumbnail(thumbnail(*place), HERE / f'card-{name}.png')
    save(card(shapes_lt('train')), HERE / 'card.png')
