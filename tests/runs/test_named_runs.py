"Runs, tables and commands with classifiers from names"
import json
from dataclasses import asdict

import numpy as np
import pandas as pd
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file

from cprfl.cli import predict as cprfl_predict
from cprfl.files import read_tensors
from cprfl.look import measure_faithfulness
from cprfl.model.names import NamedModel, imagenet_names
from cprfl.runs import decided
from cprfl.runs.build import Splits, build_model, build_names, build_names_backbone, load_data
from cprfl.runs.predict import predict_images
from cprfl.runs.recipe import NameSettings, Recipe, get_recipe
from cprfl.runs.report import write_tables
from cprfl.runs.run import Run, _named, run_recipe
from cprfl.runs.tables import Protocol, all_rows, all_tables, run_many, seeded
from cprfl.train.config import TrainConfig
from cprfl.train.trainer import Trainer, predict

NET = dict(channels=(8, 8, 16, 16))
SMALL = Recipe(
    name='small', backbone='timm:resnet10t', backbone_args=NET, image_size=32, model='erm', semantics='random:8',
    frozen=True, train=TrainConfig(epochs=1, select='last', ema=0., lr=1e-2))


@pytest.fixture(scope='module')
def here(tmp_path_factory):
    "A pretrained network of 1,000 outputs, embeddings of half of ImageNet's names, and a run without names"
    folder = tmp_path_factory.mktemp('names')
    torch.manual_seed(0)
    save_file(timm.create_model('resnet10t', **NET).state_dict(), folder / 'net.safetensors')
    names = [synonyms[0] for synonyms in imagenet_names()[:500]]
    (folder / 'names.csv').write_text('\n'.join(['name', *(f'"{name}"' for name in names)]) + '\n')
    np.save(folder / 'vectors.npy', np.random.default_rng(0).normal(size=(500, 8)).astype('float16'))
    Image.fromarray(np.zeros((40, 40, 3), np.uint8)).save(folder / 'image.png')
    run_recipe(without_names(folder), folder / 'runs', cache=folder / 'cache', progress=False)
    return folder


def without_names(folder, **kw): return SMALL.with_(weights=str(folder / 'net.safetensors'), **kw)


def with_names(folder, name='named', k=20., **kw):
    source = f"file:{folder / 'names.csv'}={folder / 'vectors.npy'}"
    return without_names(folder, name=name, names=source, names_args=dict(k=k) | kw)


def finished(folder, recipe):
    return run_recipe(recipe, folder / 'runs', cache=folder / 'cache', progress=False)


@pytest.fixture(scope='module')
def named(here): return finished(here, with_names(here))


def test_maps_of_a_run_with_names_are_scored_on_its_cache(here):
    run = finished(here, with_names(here, name='larger').with_(image_size=64)) # four patches
    table = measure_faithfulness([run], cache=here / 'cache', per_class=1, methods=['alone'])
    assert set(table['method']) == {'alone', 'random'}


def test_a_run_with_names_predicts_with_them(here, named):
    run, images = Run(here / 'runs' / 'small'), load_data(named.recipe)[1]
    assert isinstance(named.model(), NamedModel)
    assert not np.allclose(run.predictions.iloc[:, 1:], named.predictions.iloc[:, 1:])
    expected = predict(named.model(), images).numpy()
    np.testing.assert_allclose(named.predictions.iloc[:, 1:], expected, atol=0.05) # bf16


def test_a_frequent_class_keeps_the_logits_of_the_model(here):
    run, few = Run(here / 'runs' / 'small'), finished(here, with_names(here, 'few', k=1e-12))
    np.testing.assert_allclose(run.predictions.iloc[:, 1:], few.predictions.iloc[:, 1:], atol=1e-4)


def test_a_run_keeps_settings_that_were_not_given(named):
    stored = json.loads((named.folder / 'config.json').read_text())
    assert stored['recipe']['names_args'] == asdict(NameSettings(k=20))


def test_names_take_over_a_finished_training(here, monkeypatch):
    def fit(*args, **kw): raise AssertionError('trained again')
    monkeypatch.setattr(Trainer, 'fit', fit)
    run = finished(here, with_names(here, 'again', k=5.))
    weights = [read_tensors(here / 'runs' / name / 'last.safetensors') for name in ('small', 'again')]
    assert all(weights[0][name].equal(weights[1][name]) for name in weights[0])
    assert len(run.metrics) == 1


def test_a_training_that_is_taken_over_leaves_no_thresholds(here):
    recipe = with_names(here, 'decided', k=5.)
    file = finished(here, recipe).folder / 'decisions.json'
    file.write_text('{}')
    with pytest.warns(UserWarning, match='decisions.json was fitted'):
        run_recipe(recipe, here / 'runs', resume=True, cache=here / 'cache', progress=False)
    assert not file.exists()


def test_another_training_is_not_taken_over(here):
    run = finished(here, with_names(here, 'other').with_(lr=2e-2))
    weights = [read_tensors(here / 'runs' / name / 'last.safetensors')['fc.weight'] for name in ('small', 'other')]
    assert not weights[0].equal(weights[1])
    assert run.report['total'] > 0


def test_names_are_saved_with_the_run(named):
    state = read_tensors(named.folder / 'names.safetensors')
    assert list(state['names.weight'].shape) == [20, 16]
    assert {'share', 'of_head.mean', 'of_names.std', 'names.offset'} <= set(state)


def test_a_learning_backbone_gets_a_second_one_for_its_names(here):
    recipe = with_names(here, 'learning').with_(frozen=False)
    run = finished(here, recipe)
    inner, own = run.model().model.backbone, run.model().backbone
    assert not all(a.equal(b) for a, b in zip(inner.state_dict().values(), own.state_dict().values()))
    before = Recipe.with_(recipe, names=None)
    assert run.recipe.name_settings.k == 20
    assert before.names_args == {}


@pytest.fixture(scope='module')
def looking(here): return finished(here, with_names(here, 'looking', scales=[1, 2]))


def test_names_may_look_at_an_image_at_several_sizes(here, looking):
    images, model = load_data(looking.recipe)[1], looking.model()
    expected = predict(model, images).numpy()
    np.testing.assert_allclose(looking.predictions.iloc[:, 1:], expected, atol=0.05) # bf16
    inner = model.model.backbone.net
    assert model.backbone.net.net is inner # the frozen network is shared
    as_model = finished(here, with_names(here, 'as-model'))
    assert not np.allclose(as_model.from_names.iloc[:, 1:], looking.from_names.iloc[:, 1:], atol=1e-2)
    assert list(model.names_state()) == list(as_model.model().names_state())


def test_names_with_their_own_look_need_images(looking):
    with pytest.raises(ValueError, match='expected images, since these names have a look of their own'):
        looking.model()(torch.zeros(1, 4, 16))


def test_new_classes_are_seen_as_the_names_see_them(here, looking):
    extended = looking.add_classes(['tench', 'goldfish'], cache=here / 'cache', num_images=10**6)
    images, names, model = load_data(looking.recipe)[0], extended.names, looking.model()
    own, of_model = (predict(torch.nn.Sequential(backbone, names), images).mean(0)
                     for backbone in (model.backbone, model.model.backbone))
    assert (extended.offset - own).norm() < 0.1 * (extended.offset - of_model).norm()


def test_a_shared_network_stays_on_the_device_of_the_model(here, monkeypatch):
    moved, to = [], NamedModel.to
    monkeypatch.setattr(Splits, 'cached', lambda self, *args: moved.append('cached') or self)
    monkeypatch.setattr(NamedModel, 'to', lambda self, device: moved.append('to') or to(self, device))
    monkeypatch.setattr(NamedModel, 'standardise', lambda self, *scores: self)
    recipe = with_names(here, scales=[1, 2])
    data = Splits.read(recipe)
    model = build_model(recipe, data.classes, targets=data.train.targets)
    _named(recipe, model, data, data, lambda *args: None, here / 'cache', False)
    assert moved == ['cached', 'to']


def test_thresholds_of_a_run_with_names_are_tested(here, looking):
    logits, targets = decided.tested(held(here, 'held', scales=[1, 2]), here / 'cache')
    assert logits.shape == targets.shape
    assert logits.shape == looking.predictions.iloc[:, 1:].shape


def held(here, name, **kw): return finished(here, with_names(here, name, **kw).with_(held_out=0.5))


def test_a_backbone_that_learns_has_names_that_look_twice(here):
    recipe = with_names(here, scales=[1, 2]).with_(frozen=False)
    own = build_names_backbone(recipe, torch.nn.Module())
    assert own.net.scales == (1., 2.)
    assert not any(p.requires_grad for p in own.parameters())


@pytest.mark.parametrize('kw, message', [
    (dict(scales=[]), 'expected one or more scales'), (dict(scales=[0.]), 'scales'), (dict(scales=2.), 'scales')])
def test_scales_are_checked(here, kw, message):
    with pytest.raises(ValueError, match=message): with_names(here, **kw)


def test_a_network_of_patches_is_refused_before_it_is_trained(here):
    recipe = with_names(here, 'patches', scales=[1, 2]).with_(
        weights=None, backbone='timm:vit_tiny_patch16_224', backbone_args={})
    with pytest.raises(ValueError, match='such as a ResNet'): finished(here, recipe)
    assert not (here / 'runs' / 'patches').exists()


def test_cached_maps_have_one_size(here):
    with pytest.raises(ValueError, match='scales need images, and tune keeps maps; leave tune out'):
        with_names(here, scales=[1, 2]).with_(tune=1)


def test_tuned_stages_get_a_second_backbone_as_well(here):
    run = finished(here, with_names(here, 'tuned').with_(tune=1))
    assert run.model().backbone is not None


def test_the_control_differs_from_the_names(here):
    own, random = (build_names(with_names(here, random=r), ['zebra', 'tv']) for r in (False, True))
    assert own.pairs.names == random.pairs.names
    assert not own.weight.equal(random.weight)


def test_strict_is_a_setting(here):
    counts = [len(build_names(with_names(here, strict=s), ['tench', 'tv']).pairs.names) for s in (True, False)]
    assert counts[1] - counts[0] == 1


def test_a_network_without_weights_has_no_names(here):
    with pytest.raises(ValueError, match='expected a network with a last layer'):
        build_names(with_names(here).with_(weights=None), ['a'])


def test_an_unknown_source_of_names_says_what_there_is(here):
    with pytest.raises(ValueError, match='expected clip:ARCH/TAG or file:NAMES=VECTORS'):
        build_names(without_names(here, names='glove'), ['a'])


def test_settings_of_names_are_checked():
    with pytest.raises(ValueError, match='names_args: unknown settings kk'):
        SMALL.with_(names='clip:RN50/openai', names_args=dict(kk=1.))


def test_another_source_of_names_starts_with_no_settings():
    recipe = SMALL.with_(names='clip:RN50/openai', names_args=dict(k=5.))
    assert recipe.with_(names='file:a=b').names_args == {}


def test_frozen_names_is_the_variant_with_names():
    named, variant = get_recipe('frozen-names'), get_recipe('frozen-global')
    assert named.with_(names=None, name=variant.name, about=variant.about) == variant


def test_the_command_predicts_with_names(here, named, capsys):
    image = here / 'image.png'
    cprfl_predict([named.folder, image])
    assert 'with names' in capsys.readouterr().out
    [(_, scores)] = predict_images(named, [image], progress=False)
    assert list(scores.shape) == [20]


@pytest.fixture(scope='module')
def table(here):
    recipe = without_names(here, model='cprfl', model_args=dict(d=16, heads=2, head_dim=8, ffn_dim=16))
    source = with_names(here).names
    protocol = Protocol('small', recipe, sources=dict(clip='random:8'), tower=False, names=source)
    rows = all_rows(protocol)
    keys = 'asl-names', 'names', 'asl' # the row without names comes last, and is run first
    failed = run_many([seeded(rows[key], 1)[0] for key in keys], here / 'table', 1, here / 'cache', progress=False)
    write_tables(here / 'table', protocol, dict(names=all_tables(protocol)['names']))
    return here / 'table', failed


def test_rows_with_names_are_run(table): assert not table[1]


def test_rows_with_names_take_over_the_weights(table):
    weights = [read_tensors(table[0] / f'{key}-s0' / 'last.safetensors')['fc.weight'] for key in ('asl', 'names')]
    assert weights[0].equal(weights[1])


def test_pairs_of_rows_are_compared(table):
    paired = pd.read_csv(table[0] / 'paired.csv')
    results = pd.read_csv(table[0] / 'results.csv').set_index('key')['total']
    [row] = paired[paired['group'] == 'total'].to_dict('records')
    assert (row['a'], row['b']) == ('asl-names', 'asl')
    assert row['difference'] == pytest.approx(results['asl-names'] - results['asl'], abs=2e-3)


@pytest.mark.parametrize('scales, keys', [(None, []), ([1, 2], ['global-sizes', 'global-sizes-names'])])
def test_a_model_with_the_look_of_its_names_is_a_fair_opponent(here, scales, keys):
    source = with_names(here).names
    protocol = Protocol('small', without_names(here, model='cprfl'), sources=dict(clip='random:8'), tower=False,
                        names=source, names_args=dict(scales=scales))
    rows, table = all_rows(protocol), all_tables(protocol)['names']
    assert [key for key in rows if key.startswith('global-sizes')] == keys
    assert [key for key, *_ in table.rows if key.startswith('global-sizes')] == keys
    assert {key for pair in table.pairs for key in pair} <= {key for key, *_ in table.rows}
    assert [rows[key].backbone_args['scales'] for key in keys] == [scales] * len(keys)
    assert [rows[key].names for key in keys] == [None, source][:len(keys)]


def test_a_protocol_without_names_has_no_such_rows():
    protocol = Protocol('small', SMALL.with_(model='cprfl'), sources=dict(clip='random:8'), tower=False)
    assert not [key for key in all_rows(protocol) if 'names' in key]


def test_prompts_from_names_are_trained_and_opened(here):
    head = dict(d=16, heads=2, head_dim=8, ffn_dim=16, prior=True)
    run = finished(here, with_names(here, 'prior', k=0.).with_(model='cprfl', model_args=head))
    assert list(run.model().model.semantics.shape) == [20, 8 + 16]
    assert np.abs(run.from_names.iloc[:, 1:]).max().max() == 0


def test_prompts_from_names_need_names():
    with pytest.raises(ValueError, match='prior needs `names`'): SMALL.with_(model='cprfl', model_args=dict(prior=True))


def test_what_names_add_is_kept(here, named):
    run = Run(here / 'runs' / 'small')
    expected = run.predictions.iloc[:, 1:] + named.from_names.iloc[:, 1:]
    np.testing.assert_allclose(named.predictions.iloc[:, 1:], expected, atol=1e-3)


@pytest.fixture(scope='module')
def explorer(here, named):
    from cprfl.look.explorers import PredictionExplorer
    return PredictionExplorer(dict(plain=Run(here / 'runs' / 'small'), named=named))


def test_an_explorer_shows_the_scores_without_names(explorer):
    table = explorer.table().set_index(['model', 'class'])
    i, p = explorer.image, explorer.predictions
    name = table.loc['named'].index[0]
    c = p.classes.index(name)
    expected = 1 / (1 + np.exp(p.added['named'][i, c] - p.logits['named'][i, c]))
    assert table.loc[('named', name), 'without_names'] == pytest.approx(expected, abs=1e-5)


def test_a_model_without_names_has_no_such_score(explorer):
    table = explorer.table()
    assert table[table['model'] == 'plain']['without_names'].isna().all()


def test_names_are_in_the_scores_of_images_of_your_own(here, explorer):
    before = len(explorer)
    explorer.compared.add([here / 'image.png'])
    p = explorer.predictions
    assert len(p.logits['named']) == len(p.added['named']) == before + 1
    assert np.abs(p.added['named'][-1]).max() > 0


def test_a_linear_head_with_names_takes_new_classes(here, named):
    extended = named.add_classes(['tench', 'goldfish'], cache=here / 'cache', num_images=50)
    assert extended.ways == ['names']
    assert extended(torch.zeros(2, 3, 32, 32, dtype=torch.uint8)).shape == (2, 22)


def test_a_new_class_must_be_in_the_vocabulary(here):
    np.save(here / 'own.npy', np.random.default_rng(1).normal(size=(20, 8)).astype('float32'))
    run = finished(here, with_names(here, 'of-file', semantics=f"file:{here / 'own.npy'}"))
    assert run.add_classes(['tench'], cache=here / 'cache', num_images=50).num_classes == 21
    with pytest.raises(ValueError, match='has 500 names, but not unicorn'): run.add_classes(['unicorn'])
