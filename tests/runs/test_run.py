"Recipes: a share of the training images in place of the test set, and a frozen backbone whose last stages learn"
import json
import os
import shutil
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import cprfl.runs.build
import cprfl.runs.predict
from cprfl.files import Owner
from cprfl.model.backbones import TunedBackbone, build_backbone
from cprfl.runs.build import Splits, build_model, load_data
from cprfl.runs.predict import Pictures
from cprfl.runs.recipe import GLOBAL_HEAD, RECIPES, Recipe, get_recipe
from cprfl.runs.run import Run, find_runs, open_runs, run_or_open, run_recipe
from cprfl.runs.stored import RunConfig
from cprfl.train.callbacks import Callback
from cprfl.train.config import TrainConfig
from cprfl.train.trainer import predict

SMALL = Recipe(
    name='small', backbone='timm:resnet10t', backbone_args=dict(channels=(8, 8, 16, 16)), image_size=32,
    model_args=dict(d=16, heads=2, head_dim=8, ffn_dim=16), semantics='random:8', frozen=True, views=2,
    train=TrainConfig(epochs=1, select='last', ema=0., lr=1e-2))


@pytest.fixture(scope='module')
def cache(tmp_path_factory): return tmp_path_factory.mktemp('cache')


def features(cache): return sorted(f.name for f in cache.glob('*.npy'))


# ---- recipes

def test_recipes_come_back_from_a_file_as_they_were():
    "What is read from config.json equals what was written"
    changed = [name for name, r in RECIPES.items() if Recipe(**json.loads(json.dumps(asdict(r)))) != r]
    assert not changed


def test_the_variant_is_cprfl_with_a_global_head():
    plain, variant = get_recipe('frozen-cprfl'), get_recipe('frozen-global')
    assert variant.model_args == plain.model_args | GLOBAL_HEAD


def test_a_recipe_from_a_file(tmp_path):
    file = tmp_path / 'r.yaml'
    file.write_text('base: shapes-erm\nepochs: 7\nimage_size: 96\n')
    assert get_recipe(str(file)) == get_recipe('shapes-erm').with_(epochs=7, image_size=96)


def test_a_file_with_a_list_reads_the_list(tmp_path):
    file = tmp_path / 'r.yaml'
    file.write_text('train_file: mine.csv\nimage_size: 96\n')
    assert get_recipe(str(file)).benchmark is None


def test_a_run_that_kept_a_list_beside_its_benchmark_is_read(tmp_path):
    recipe = asdict(Recipe()) | dict(train_file='train.txt') # which older runs did not read
    config = dict(recipe=recipe, classes=['dog', 'cat'], groups=dict(head=[0], tail=[1]), class_counts=[5, 1],
                  num_train=6)
    (tmp_path / 'config.json').write_text(json.dumps(config))
    assert RunConfig.read(tmp_path / 'config.json').recipe == Recipe()


def test_a_run_that_kept_an_exponent_without_effect_is_read(tmp_path):
    recipe = asdict(Recipe().with_(loss='db_nofocal', loss_args=dict(map_gamma=0.2)))
    recipe['train']['loss_args']['gamma'] = 6.
    config = dict(recipe=recipe, classes=['dog', 'cat'], groups=dict(head=[0], tail=[1]), class_counts=[5, 1],
                  num_train=6)
    (tmp_path / 'config.json').write_text(json.dumps(config))
    assert RunConfig.read(tmp_path / 'config.json').recipe.train.loss_args == dict(map_gamma=0.2)


@pytest.mark.parametrize('text, words', [
    ('base: shapes-erm\nepoch: 7\n', 'recipe: unknown settings epoch; there are name, '),
    ('base: shapes\n', 'recipe: expected one of shapes-cprfl'),
    ('epochs', 'expected names with values'),
    ('base: r.yaml\n', 'r.yaml: is the base of itself')])
def test_a_file_that_is_no_recipe_is_named(tmp_path, monkeypatch, text, words):
    monkeypatch.chdir(tmp_path)
    Path('r.yaml').write_text(text)
    with pytest.raises(ValueError) as error: Recipe.from_yaml('r.yaml')
    assert str(error.value).startswith(f'r.yaml: {words}')


@pytest.mark.parametrize('change, words', [
    (dict(held_out=1.), 'held_out: expected at least 0 and below 1'),
    (dict(frozen=False, views=1, tune=1), 'need frozen=True'),
    (dict(cache_images=True), 'cache_images: a frozen backbone has its features cached')])
def test_settings_that_contradict_each_other(change, words):
    with pytest.raises(ValueError, match=words): SMALL.with_(**change)


# ---- images that are held out

@pytest.fixture(scope='module')
def held_out_run(tmp_path_factory, cache):
    return run_recipe(SMALL.with_(held_out=0.3), tmp_path_factory.mktemp('runs'), cache=cache, progress=False)


def test_held_out_images_take_the_test_sets_place(held_out_run):
    train, held = load_data(held_out_run.recipe)
    assert (held_out_run.num_train, held_out_run.report['num_test']) == (len(train), len(held))
    assert held_out_run.predictions['path'].tolist() == list(held.paths)


def test_a_run_knows_what_it_was_tested_on(held_out_run):
    assert held_out_run.predictions['path'].tolist() == list(held_out_run.test_set().paths)


def test_both_shares_are_all_training_images():
    train, held = load_data(SMALL.with_(held_out=0.3))
    everything, _ = load_data(SMALL)
    assert sorted(train.paths + held.paths) == sorted(everything.paths)


def test_a_test_set_is_not_read_where_images_are_held_out(held_out_run, cache):
    assert Splits.read(SMALL.with_(held_out=0.3)).whole_test is None
    assert len(features(cache)) == 1


def test_every_class_stays_in_what_is_trained_on(held_out_run):
    train, _ = load_data(held_out_run.recipe)
    everything, _ = load_data(SMALL)
    assert np.array_equal(held_out_run.class_counts, train.targets.sum(0))
    assert np.array_equal(train.targets.any(0), everything.targets.any(0))


def test_every_share_finds_the_features_of_all_images(held_out_run, tmp_path, cache):
    before = features(cache)
    run_recipe(SMALL.with_(name='half', held_out=0.5), tmp_path, cache=cache, progress=False)
    assert features(cache) == before


# ---- a last stage that learns

@pytest.fixture(scope='module')
def tuned_run(tmp_path_factory, cache):
    return run_recipe(SMALL.with_(name='tuned', tune=1), tmp_path_factory.mktemp('runs'), cache=cache, progress=False)


def test_the_last_stage_learns_and_the_others_do_not(tuned_run):
    before, after = build_model(tuned_run.recipe, tuned_run.classes).backbone, tuned_run.model().backbone
    assert isinstance(after, TunedBackbone)
    old = before.state_dict()
    changed = {name.split('.')[0] for name, v in after.state_dict().items() if not torch.equal(v, old[name])}
    assert changed == {'net'}


def test_a_tuned_model_gives_its_logits_from_images(tuned_run):
    "Through both parts of the backbone, as in training from cached maps"
    logits = predict(tuned_run.model(), load_data(tuned_run.recipe)[1]).numpy()
    assert np.allclose(logits, tuned_run.predictions[tuned_run.classes].to_numpy(), atol=2e-2)


def test_a_tuned_run_is_opened_again(tuned_run):
    assert run_or_open(tuned_run.recipe, tuned_run.folder.parent).folder == tuned_run.folder
    assert Run(tuned_run.folder).recipe.tune == 1


@pytest.mark.parametrize('stages', [1, 2])
@pytest.mark.parametrize('name, kw', [
    ('timm:resnet10t', dict(channels=(8, 8, 16, 16))), ('torchvision:resnet18', {}), ('shapes', {})])
def test_a_tuned_backbone_is_the_backbone(name, kw, stages):
    images = torch.randint(256, (2, 3, 64, 64), dtype=torch.uint8)
    net = build_backbone(name, **kw).eval()
    with torch.no_grad(): whole = net(images)
    tuned = TunedBackbone(net, stages).eval()
    with torch.no_grad(): maps = tuned.fixed(images)
    assert maps.shape[1] == tuned.fixed.num_features
    assert torch.allclose(tuned(maps.half()), whole, atol=2e-2 * whole.abs().max())
    assert torch.allclose(tuned(images), whole, atol=1e-5)


def test_only_the_tuned_stages_are_in_training_mode():
    tuned = TunedBackbone(build_backbone('shapes'), 1).train()
    assert tuned.net.training
    assert not any(m.training for m in tuned.fixed.modules())


def test_only_the_tuned_stages_have_gradients():
    tuned = TunedBackbone(build_backbone('shapes'), 2)
    assert not [name for name, p in tuned.named_parameters() if p.requires_grad != name.startswith('net.')]


@pytest.mark.parametrize('name, kw, stages, words', [
    ('resnet18', {}, 4, 'expected one of 1, 2, 3, got 4'),
    ('vit_tiny_patch16_224', dict(img_size=32), 1, 'expected a ResNet')])
def test_a_backbone_that_cannot_be_tuned(name, kw, stages, words):
    with pytest.raises(ValueError, match=words): TunedBackbone(build_backbone(name, **kw), stages)


# ---- images decoded once

@pytest.fixture(scope='module')
def photos(tmp_path_factory):
    "A recipe for sixteen JPEGs in two folders"
    folder, rng = tmp_path_factory.mktemp('photos'), np.random.default_rng(0)
    for name in 'ab':
        (folder / name).mkdir()
        for i in range(8):
            pixels = rng.integers(0, 256, (40, 30, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / name / f'{name}{i}.jpg')
    return SMALL.with_(name='photos', benchmark=None, train_file=str(folder), frozen=False, views=1, held_out=0.25,
                       batch_size=4, epochs=2, device='cpu')


@pytest.fixture(scope='module')
def plain_and_cached(photos, tmp_path_factory):
    folder = tmp_path_factory.mktemp('runs')
    plain = run_recipe(photos, folder / 'plain', progress=False)
    return plain, run_recipe(photos.with_(cache_images=True), folder / 'cached', progress=False)


def test_a_run_on_cached_images_is_the_same_run(plain_and_cached):
    plain, cached = plain_and_cached
    assert cached.predictions.equals(plain.predictions)
    assert cached.metrics['loss'].tolist() == plain.metrics['loss'].tolist()


def test_the_pixels_are_in_one_file(plain_and_cached):
    files = (plain_and_cached[1].folder.parent / 'cache').glob('*.npy')
    assert [f.stem[-7:] for f in files] == ['-images']


def test_a_finished_run_may_be_resumed_without_its_cache(photos, plain_and_cached):
    "A cache changes no result"
    plain, cached = plain_and_cached
    state = {f: f.stat().st_mtime_ns for f in (cached.folder / 'state').iterdir()}
    again = run_recipe(photos, cached.folder.parent, resume=True, progress=False)
    assert {f: f.stat().st_mtime_ns for f in (cached.folder / 'state').iterdir()} == state
    assert again.predictions.equals(plain.predictions)


def test_runs_are_found_by_name_and_by_what_they_have(plain_and_cached, tmp_path):
    plain = plain_and_cached[0].folder
    assert find_runs(plain.parent, 'pho*', 'report.json') == [plain]
    assert find_runs(plain.parent, '*-s0') == []
    assert find_runs(tmp_path / 'nothing') == []


# ---- a folder with one owner

def files_of(folder): return {f: f.read_bytes() for f in folder.rglob('*') if f.is_file()}


@pytest.fixture
def copied(photos, plain_and_cached, tmp_path):
    "A finished run in another place, under another name"
    return shutil.copytree(plain_and_cached[0].folder, tmp_path / 'renamed')


def test_a_run_in_use_is_left_alone(photos, copied):
    before = files_of(copied)
    with Owner(copied), pytest.raises(RuntimeError, match='renamed is in use by another command'):
        run_recipe(photos.with_(name='renamed', epochs=3), copied.parent, resume=True, progress=False)
    assert files_of(copied) == before


class TriesTheFolder(Callback):
    "Whether another command can own the run's folder"
    free = False
    def __init__(self, folder): self.folder = folder

    def before_fit(self, trainer): self.try_it()

    def after_fit(self, trainer): self.try_it()

    def try_it(self):
        with suppress(RuntimeError), Owner(self.folder): self.free = True


def test_a_run_owns_its_folder_before_and_after_training(photos, tmp_path):
    tries = TriesTheFolder(tmp_path / 'photos')
    run_recipe(photos.with_(epochs=1), tmp_path, callbacks=[tries], progress=False)
    assert not tries.free


def test_a_run_that_cannot_begin_leaves_no_folder(photos, tmp_path):
    with pytest.raises(FileNotFoundError):
        run_recipe(photos.with_(train_file='nowhere.csv'), tmp_path / 'runs', progress=False)
    assert list(tmp_path.iterdir()) == []


# ---- going on

def test_a_renamed_run_is_resumed(photos, copied, plain_and_cached):
    again = run_recipe(photos.with_(name='renamed'), copied.parent, resume=True, progress=False)
    assert again.predictions.equals(plain_and_cached[0].predictions)


def test_a_place_may_be_written_in_another_way(photos, copied, monkeypatch):
    monkeypatch.chdir(copied.parent)
    places = photos.with_(name='renamed', train_file=os.path.relpath(photos.train_file))
    assert run_recipe(places, copied.parent, resume=True, progress=False).folder == copied


def test_more_epochs_go_on(photos, copied):
    with pytest.warns(UserWarning, match='epochs: 2 before, 3 now'):
        more = run_recipe(photos.with_(name='renamed', epochs=3), copied.parent, resume=True, progress=False)
    assert more.metrics['epoch'].tolist() == [1, 2, 3]
    assert more.recipe.train.epochs == 3


@pytest.mark.filterwarnings('ignore:epochs')
def test_thresholds_go_with_the_weights_that_they_are_of(photos, copied):
    Run(copied).fit_decisions()
    with pytest.warns(UserWarning, match='decisions.json was fitted to weights that are replaced now'):
        run_recipe(photos.with_(name='renamed', epochs=3), copied.parent, resume=True, progress=False)
    assert Run(copied).decisions is None


def test_thresholds_stay_if_no_epoch_is_added(photos, copied):
    Run(copied).fit_decisions()
    run_recipe(photos.with_(name='renamed'), copied.parent, resume=True, progress=False)
    assert Run(copied).decisions.classes == Run(copied).classes


def test_fewer_epochs_are_refused(photos, copied):
    before = files_of(copied)
    with pytest.raises(ValueError, match='epochs: .*renamed has trained for 2 already, and 1 were asked for'):
        run_recipe(photos.with_(name='renamed', epochs=1), copied.parent, resume=True, progress=False)
    assert files_of(copied) == before


def test_a_table_does_not_mix_numbers_of_epochs(photos, copied):
    with pytest.raises(ValueError, match='epochs: 2 then, 3 now'):
        run_or_open(photos.with_(name='renamed', epochs=3), copied.parent, progress=False)


def test_other_images_are_refused_before_anything_is_written(photos, copied, tmp_path):
    other = shutil.copytree(photos.train_file, tmp_path / 'images')
    (other / 'a' / 'a1.jpg').rename(other / 'a' / 'new.jpg')
    before = files_of(copied)
    shutil.move(photos.train_file, aside := tmp_path / 'aside')
    shutil.copytree(other, photos.train_file)
    try:
        with pytest.raises(ValueError, match='renamed was trained on other images or labels'):
            run_recipe(photos.with_(name='renamed'), copied.parent, resume=True, progress=False)
    finally:
        shutil.rmtree(photos.train_file)
        shutil.move(aside, photos.train_file)
    assert files_of(copied) == before


# ---- what is missing or damaged

READS = {'metrics.csv': lambda run: run.metrics, 'report.json': lambda run: run.report,
         'predictions.parquet': lambda run: run.predictions, 'prompts.safetensors': lambda run: run.prompts,
         'last.safetensors': lambda run: run.model('last')}


@pytest.mark.parametrize('name', READS)
def test_a_file_that_was_cut_short_is_named(copied, name):
    file = copied / name
    file.write_bytes(file.read_bytes()[:0 if name == 'metrics.csv' else 30])
    with pytest.raises(ValueError, match=f'{name} is damaged') as error: READS[name](Run(copied))
    assert '\n' not in str(error.value)


@pytest.mark.parametrize('name', READS)
def test_a_file_that_is_missing_is_named(copied, name):
    (copied / name).unlink()
    with pytest.raises(ValueError, match=f'renamed has no {name}: '): READS[name](Run(copied))


def test_a_changed_bit_in_a_weight_is_noticed(copied):
    file = copied / 'last.safetensors'
    raw = bytearray(file.read_bytes())
    raw[-5] ^= 1
    file.write_bytes(raw)
    with pytest.raises(ValueError, match='last.safetensors is damaged.*checksum differs'): Run(copied).model('last')


def test_weights_that_are_not_finite_are_refused(copied):
    state = load_file(copied / 'last.safetensors')
    name = next(name for name, values in state.items() if values.is_floating_point())
    state[name].view(-1)[0] = float('nan')
    save_file(state, copied / 'last.safetensors')
    with pytest.raises(ValueError, match='last.safetensors: weights are not finite'): Run(copied).model('last')


def test_weights_without_a_checksum_are_read(copied):
    file = copied / 'last.safetensors'
    save_file(load_file(file), file)
    assert Run(copied).model('last') is not None


def test_a_run_without_a_test_says_why(photos, tmp_path):
    run = run_recipe(photos.with_(held_out=0., epochs=1), tmp_path, progress=False)
    with pytest.raises(ValueError, match='no predictions.parquet: it was trained without test images'):
        _ = run.predictions


@pytest.mark.parametrize('kind', [dict(frozen=True), dict(frozen=False, views=1, cache_images=True)])
@pytest.mark.parametrize('asked, used', [(0, 2), (5, 5)])
def test_caches_are_filled_by_as_many_processes_as_asked(photos, tmp_path, monkeypatch, kind, asked, used):
    seen = []
    def noted(*args, num_workers, **kw): return seen.append(num_workers) or args[-1]
    for name in ('cache_features', 'cache_images'): monkeypatch.setattr(cprfl.runs.build, name, noted)
    recipe = photos.with_(**kind, num_workers=asked)
    data = Splits.read(recipe)
    data.cached(recipe, build_model(recipe, data.classes), tmp_path)
    assert set(seen) == {used}


def test_an_image_may_fail_without_a_text(photos, monkeypatch):
    def fail(file): raise MemoryError
    monkeypatch.setattr(cprfl.runs.predict, 'read_image', fail)
    assert Pictures(['a.png'], photos)[0] == 'MemoryError'


def test_broken_runs_are_left_out(copied, tmp_path):
    for name, text in (('cut', '{"recipe":'), ('foreign', '{"a": 1}'), ('list', '[]')):
        (tmp_path / name).mkdir()
        (tmp_path / name / 'config.json').write_text(text)
    with pytest.warns(UserWarning) as said: runs = open_runs(tmp_path)
    assert [run.folder for run in runs] == [copied]
    told = [str(warning.message) for warning in said]
    assert [text for text in told if 'is left out' not in text or 'config.json' not in text] == []
    assert len(told) == 3


def test_the_seconds_of_a_run_count_what_came_before_a_stop(photos, plain_and_cached, tmp_path):
    folder = shutil.copytree(plain_and_cached[0].folder, tmp_path / photos.name)
    [*_, file] = sorted((folder / 'state').iterdir())
    state = torch.load(file, weights_only=True)
    state['history'][0]['seconds'] = 5000.0
    torch.save(state, file)
    again = run_recipe(photos, tmp_path, resume=True, progress=False)
    assert again.report['seconds'] >= 5000
