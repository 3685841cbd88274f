"The site's icon, its social card and the first page's picture, drawn by the kit: `python nbs/assets/make_assets.py [RUN]`"
import sys
from pathlib import Path

import matplotlib
import numpy as np
from cprfl.plots import GROUP_COLOURS, plot_class_counts
from cprfl.data.shapes import shapes_lt
from PIL import Image

HERE = Path(__file__).parent
NIGHT, PAPER = '#12263c', '#fbfaf7'
BARS = ((44, PAPER), (25, GROUP_COLOURS['medium']), (15, GROUP_COLOURS['medium']), (9, GROUP_COLOURS['tail'])) # height, colour


def favicon():
    "A long tail on a rounded square, 64 by 64"
    bars = ''.join(f'<rect x="{11 + 11 * i}" y="{54 - h}" width="9" height="{h}" rx="1.5" fill="{colour}"/>' for i, (h, colour) in enumerate(BARS))
    return f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 64 64"><rect width="64" height="64" rx="13" fill="{NIGHT}"/>{bars}</svg>\n'


def rare_scenes(train, n):
    "Indices of scenes of the training set, with a label of the medium or tail groups each, none twice"
    ids = [*train.groups['tail'], *train.groups['medium']]
    firsts = [int(np.flatnonzero(train.targets[:, c])[0]) for c in ids]
    return list(dict.fromkeys(firsts))[:n]


def card(train):
    "1200 by 630 pixels: what it is, how the classes are distributed, and how the scenes look"
    import matplotlib.pyplot as plt
    fig = plt.figure(figsize=(12, 6.3), dpi=100, facecolor=PAPER)
    fig.add_artist(matplotlib.patches.Rectangle((0, 0), 0.012, 1, color=GROUP_COLOURS['head']))
    fig.text(0.055, 0.78, 'cprfl', fontsize=66, weight='bold', color=NIGHT, family='monospace')
    fig.text(0.06, 0.625, 'Long-tailed multi-label\nimage classification,\nin notebooks', fontsize=25, color=NIGHT, va='center', linespacing=1.25)
    ax = fig.add_axes((0.06, 0.13, 0.46, 0.31), facecolor=PAPER)
    plot_class_counts(train, ax)
    ax.set_xticks([]), ax.set_ylabel(''), ax.set_xlabel('training images of the 20 classes of Shapes-LT', fontsize=14, labelpad=8)
    ax.legend(frameon=False, fontsize=14)
    for k, i in enumerate(rare_scenes(train, 9)):
        at = fig.add_axes((0.565 + 0.138 * (k % 3), 0.639 - 0.2629 * (k // 3), 0.13, 0.13 * 1200 / 630))
        at.imshow(train[i][0].permute(1, 2, 0).numpy()), at.set_axis_off()
    return fig


def questions(run):
    "One test image, asked for each category that it shows: the first image with a head, a medium and a tail category, all among the model's best guesses"
    import matplotlib.pyplot as plt
    import torch
    from cprfl.look.attention import attention_maps
    from cprfl.runs.build import load_data
    from cprfl.explain_plots import plot_map, signed
    test, scores = load_data(run.recipe)[1], torch.tensor(run.predictions[run.classes].to_numpy())
    group = {c: g for g, ids in test.groups.items() for c in map(int, ids)}
    for i, target in enumerate(test.targets):
        there = np.flatnonzero(target).tolist()
        if {group[c] for c in there} == {'head', 'medium', 'tail'} and set(scores[i].topk(len(there)).indices.tolist()) == set(there): break
    maps = attention_maps(run.model(), test[i][0][None]).mean[0]
    fig, axes = plt.subplots(1, len(there) + 1, figsize=(1.9 * (len(there) + 1), 2.12), dpi=140, layout='constrained', facecolor='white')
    size = tuple(test.image(i).shape[-2:])
    plot_map(test[i][0], None, axes[0], title='the image')
    for ax, c in zip(axes[1:], there): plot_map(test[i][0], maps[c], ax, [b[1:] for b in test.boxes[i] if b[0] == c], size, signed(test.classes[c], group[c]))
    return fig


def save(fig, file):
    "A PNG of few colours, which is small"
    fig.canvas.draw()
    Image.fromarray(np.asarray(fig.canvas.buffer_rgba())[..., :3]).quantize(192, dither=Image.Dither.NONE).save(file, optimize=True)


if __name__ == '__main__':
    matplotlib.use('Agg')
    if len(sys.argv) > 1:
        from cprfl.runs.run import Run
        save(questions(Run(sys.argv[1])), HERE / 'questions.png')
    (HERE / 'favicon.svg').write_text(favicon())
    save(card(shapes_lt('train')), HERE / 'card.png')
