"Deletion and insertion, on models whose answers are known"
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

from cprfl.data.dataset import ArrayDataset, MultiLabelDataset
from cprfl.look.attention import grad_cam
from cprfl.look.faithfulness import (
    curve_area,
    faithfulness,
    faithfulness_summary,
    kept_counts,
    measure_faithfulness,
    patch_attention,
    patch_gradcam,
    removal_curves,
    score_of_patches,
)
from cprfl.model.backbones import Backbone, PatchModel
from cprfl.model.baselines import ERM, MLGCN
from cprfl.model.cprfl import CPRFL

COLUMNS = ['image', 'path', 'class', 'group', 'method', 'rank', 'whole', 'insertion', 'deletion', 'gap']


class OnePatch(PatchModel):
    "The best patch of a class decides, in the channel of that class"
    def __init__(self, wrong=False):
        super().__init__()
        self.backbone, self.one = Backbone(nn.AvgPool2d(8), 3, normalize=False), nn.Parameter(torch.ones(1))
        self.wrong, self.vsi = wrong, None

    def from_features(self, features, return_attention=False):
        logits = (8 * features.amax(1) - 4) * self.one
        attention = features.transpose(1, 2)[:, None] * (-1 if self.wrong else 1)
        return (logits, attention) if return_attention else logits


def squares(n=30):
    "Black images with a square in one of 16 places, in the channel of its class"
    images, targets = np.zeros((n, 32, 32, 3), np.uint8), np.zeros((n, 3), np.uint8)
    for i in range(n):
        row, column = 8 * (i % 4), 8 * (i // 4 % 4)
        images[i, row:row + 8, column:column + 8, i % 3] = 255
        targets[i, i % 3] = 1
    return ArrayDataset(images, targets, ['red', 'green', 'blue'], dict(head=[0], medium=[1], tail=[2]))


def gap(table): return table.groupby('method')['gap'].mean()


@pytest.mark.parametrize('hide', ['patches', 'pixels'])
def test_a_model_that_looks_at_one_patch_has_the_widest_gap(hide):
    table = faithfulness(OnePatch(), squares(), per_class=5, steps=16, hide=hide)
    high, low = (float(torch.tensor(v).sigmoid()) for v in (4., -4.))
    assert list(table) == COLUMNS
    for method in ('attention', 'gradcam', 'alone'):
        part = table[table['method'] == method]
        assert part['insertion'].to_numpy() == pytest.approx(high, abs=0.03)
        assert part['deletion'].to_numpy() == pytest.approx(low + (high - low) / 30, abs=0.03)
    assert abs(gap(table)['random']) < 0.1


def test_a_map_that_points_away_has_a_negative_gap():
    assert gap(faithfulness(OnePatch(wrong=True), squares(), ['attention']))['attention'] < -0.8


def test_the_area_is_a_mean_over_the_patches_that_are_kept():
    assert curve_area(torch.tensor([[0., 1.], [2., 2.]]), [1, 49]).tolist() == [0.5, 2]


@pytest.mark.parametrize('v', [2, 7, 49, 196])
def test_curves_go_from_one_patch_to_all(v):
    counts = kept_counts(v, 13)
    assert (counts[0], counts[-1]) == (1, v)
    assert len(counts) <= 13


def test_with_all_patches_both_curves_are_the_score_of_the_image():
    torch.manual_seed(0)
    model, patches, classes = ERM(None, 3, feature_dim=4), torch.randn(2, 9, 4), torch.tensor([0, 2])
    score, order = score_of_patches(model, patches, classes), torch.rand(2, 9).argsort(1)
    with torch.no_grad():
        insertion, deletion = removal_curves(score, order, [1, 9])
        whole = model(patches).sigmoid()[[0, 1], classes]
    assert torch.allclose(insertion[:, 1], whole)
    assert torch.allclose(deletion[:, 1], whole)


def test_a_linear_head_is_best_ordered_by_its_own_scores():
    torch.manual_seed(0)
    model = ERM(Backbone(nn.Conv2d(3, 8, 8, 8), 8), 3)
    noise = np.random.default_rng(0).integers(0, 256, (20, 32, 32, 3), dtype=np.uint8)
    data = ArrayDataset(noise, np.ones((20, 3), np.uint8), list('abc'), dict(head=[0, 1, 2]))
    table = faithfulness(model, data).pivot(index=['image', 'class'], columns='method', values='gap')
    assert (table['alone'] >= table['gradcam'] - 1e-6).all()
    assert (table['alone'] >= table['random'] - 1e-6).all()


def test_gradcam_of_patches_is_that_of_images():
    torch.manual_seed(0)
    model, images = ERM('resnet18', 5).eval(), torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8)
    with grad_cam(model) as cam: maps, _ = cam(images, [1, 4])
    with torch.no_grad(): patches = model.patches(images)
    assert torch.allclose(patch_gradcam(model, patches, torch.tensor([1, 4])), maps.flatten(1), atol=1e-5)


def small_cprfl():
    torch.manual_seed(0)
    return CPRFL(Backbone(nn.Conv2d(3, 8, 8, 8), 8), torch.randn(3, 8), d=16, heads=2, head_dim=8, ffn_dim=16)


def test_attention_is_that_of_the_class():
    model, patches = small_cprfl().eval(), torch.randn(2, 16, 8)
    with torch.no_grad(): attention = model.from_features(patches, return_attention=True)[1]
    found = patch_attention(model, patches, torch.tensor([2, 0]))
    assert torch.allclose(found, torch.stack([attention[0, :, 2].mean(0), attention[1, :, 0].mean(0)]))


class Patches(MultiLabelDataset):
    "Cached patches in place of images"
    def __init__(self, model, data):
        super().__init__(data.paths, data.targets, data.classes, data.groups)
        with torch.no_grad(): self.cached = [model.patches(data[i][0][None])[0] for i in range(len(data))]
    def __getitem__(self, i): return self.cached[i], None, i


@pytest.mark.parametrize('build', [small_cprfl, OnePatch], ids=['cprfl', 'one patch'])
def test_cached_patches_give_what_images_give(build):
    model, data = build(), squares()
    pd.testing.assert_frame_equal(faithfulness(model, data), faithfulness(model, Patches(model, data)), atol=1e-5)


def test_cached_patches_have_no_pixels():
    model, data = OnePatch(), squares()
    with pytest.raises(ValueError, match='cached features'): faithfulness(model, Patches(model, data), hide='pixels')


def test_every_model_is_asked_about_the_same_pairs():
    one, other = faithfulness(OnePatch(), squares(), per_class=4), faithfulness(small_cprfl(), squares(), per_class=4)
    assert one[['image', 'class', 'method']].equals(other[['image', 'class', 'method']])
    assert one.groupby(['method', 'class']).size().unique().tolist() == [4]


def test_a_model_without_attention_has_the_other_maps():
    model = MLGCN(Backbone(nn.Conv2d(3, 8, 8, 8), 8), torch.randn(3, 4), squares().targets, hidden=8)
    assert faithfulness(model, squares(), per_class=1)['method'].unique().tolist() == ['gradcam', 'alone', 'random']


def test_modes_and_gradients_are_as_before():
    model = small_cprfl().train()
    model.fc.weight.requires_grad_(False)
    faithfulness(model, squares(), per_class=1)
    assert model.training
    assert all(p.grad is None for p in model.parameters())
    assert [n for n, p in model.named_parameters() if not p.requires_grad] == ['fc.weight']


def test_one_patch_cannot_be_removed():
    whole = ERM(Backbone(nn.AvgPool2d(32), 3), 3)
    with pytest.raises(ValueError, match='at least 2 patches, got 1'): faithfulness(whole, squares())


def test_a_class_counts_once_no_matter_how_many_pairs_it_has():
    rows = [('a', 'head', 1.), ('a', 'head', 1.), ('a', 'head', 1.), ('b', 'head', 0.), ('c', 'tail', 0.2)]
    table = pd.DataFrame(rows, columns=['class', 'group', 'gap'])
    table = table.assign(method='alone', whole=1, insertion=1, deletion=0)
    summary = faithfulness_summary(table).set_index('group')
    assert summary['gap'].to_dict() == pytest.approx(dict(total=0.4, head=0.5, tail=0.2))
    assert summary['pairs'].tolist() == [5, 4, 1]
    assert summary['classes'].tolist() == [3, 2, 1]


# ---- several runs

def fake_run(name, model, data):
    return SimpleNamespace(folder=Path(name), model=lambda: model, test_set=lambda: data)


def test_rows_of_a_run_replace_its_own_and_keep_others(tmp_path):
    file, data = tmp_path / 'faithfulness.csv', squares()
    runs = [fake_run('right', OnePatch(), data), fake_run('wrong', OnePatch(wrong=True), data)]
    both = measure_faithfulness(runs, file, per_class=2)
    assert len(both) == 2 * 4 * 4
    measure_faithfulness([fake_run('right', OnePatch(wrong=True), data)], file, per_class=2)
    written = pd.read_csv(file).set_index(['run', 'method', 'group'])['gap'].xs('total', level='group')
    assert written['right', 'attention'] < 0
    assert written['wrong', 'attention'] < 0
    assert len(written) == 8


@pytest.mark.parametrize('name', ['NA', '1', '1e3'])
def test_a_run_is_known_by_its_name_as_it_is_written(tmp_path, name):
    file, data = tmp_path / 'faithfulness.csv', squares()
    for _ in range(2): measure_faithfulness([fake_run(name, OnePatch(), data)], file, per_class=1, methods=['alone'])
    assert [line.split(',')[0] for line in file.read_text().splitlines()] == ['run', *[name] * 8]


def test_a_file_with_other_columns_is_refused(tmp_path):
    "Before the work is done"
    file = tmp_path / 'faithfulness.csv'
    file.write_text('run,gap\nright,1\n')
    with pytest.raises(ValueError, match='expected the columns run, hide, method'):
        measure_faithfulness([SimpleNamespace(folder=Path('right'))], file)
    assert file.read_text() == 'run,gap\nright,1\n'


# ---- what the page says first

@pytest.fixture
def stored_gaps():
    "The gaps of networks that were trained end to end, by hidden part, run and method"
    rows = pd.read_csv(Path(__file__).parents[2] / 'nbs/analysis/results/e2e/faithfulness.csv')
    return rows[rows['group'] == 'total'].set_index(['hide', 'run', 'method'])['gap'].sort_index()


@pytest.mark.parametrize('run', ['e2e-cprfl-s0', 'e2e-global-s0'])
def test_maps_are_ordered_as_the_page_says(stored_gaps, run):
    gaps = stored_gaps['patches', run]
    assert gaps.sort_values().index.tolist() == ['random', 'attention', 'gradcam', 'alone']


def test_hidden_pixels_bring_the_maps_closer(stored_gaps):
    distance = stored_gaps.xs('gradcam', level='method') - stored_gaps.xs('attention', level='method')
    assert distance['pixels', 'e2e-cprfl-s0'] < distance['patches', 'e2e-cprfl-s0']
