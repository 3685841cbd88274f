"Recipes: a share of the training images in place of the test set, and a frozen backbone whose last stages learn"
import numpy as np
import pytest
import torch
from PIL import Image

from cprfl.model.backbones import TunedBackbone, build_backbone
from cprfl.runs.recipe import Recipe, build_model, load_data
from cprfl.runs.run import Run, run_or_open, run_recipe
from cprfl.train.config import TrainConfig
from cprfl.train.trainer import predict

SMALL = Recipe(name='small', backbone='timm:resnet10t', backbone_args=dict(channels=(8, 8, 16, 16)), image_size=32, model_args=dict(d=16, heads=2, head_dim=8, ffn_dim=16),
               semantics='random:8', frozen=True, views=2, train=TrainConfig(epochs=1, select='last', ema=0., lr=1e-2))


@pytest.fixture(scope='module')
def cache(tmp_path_factory): return tmp_path_factory.mktemp('cache')


def features(cache): return sorted(f.name for f in cache.glob('*.npy'))


def test_held_out_images_take_the_test_sets_place(tmp_path, cache):
    recipe = SMALL.with_(held_out=0.3)
    run = run_recipe(recipe, tmp_path, cache=cache, progress=False)
    train, held = load_data(recipe)
    everything, _ = load_data(SMALL)
    assert (run.num_train, run.report['num_test']) == (len(train), len(held)) and sorted(train.paths + held.paths) == sorted(everything.paths)
    assert run.predictions['path'].tolist() == list(held.paths)
    assert len(features(cache)) == 1, 'the test set is not even looked at'
    assert np.array_equal(run.class_counts, train.targets.sum(0)) and all((train.targets.sum(0) > 0) == (everything.targets.sum(0) > 0))


def test_every_share_finds_the_features_of_all_images(tmp_path, cache):
    before = features(cache)
    run_recipe(SMALL.with_(name='half', held_out=0.5), tmp_path, cache=cache, progress=False)
    assert before and features(cache) == before


def test_the_last_stage_learns_and_the_others_do_not(tmp_path, cache):
    recipe = SMALL.with_(name='tuned', tune=1)
    run = run_recipe(recipe, tmp_path, cache=cache, progress=False)
    before, after = build_model(recipe, run.classes), run.model()
    assert isinstance(after.backbone, TunedBackbone)
    changed = {n.split('.')[0] for n, v in after.backbone.state_dict().items() if not torch.equal(v, before.backbone.state_dict()[n])}
    assert changed == {'net'}
    logits = run.predictions[run.classes].to_numpy()
    assert np.allclose(predict(after, load_data(recipe)[1]).numpy(), logits, atol=2e-2), 'from images, through both parts, as from cached maps'
    assert run_or_open(recipe, tmp_path).folder == run.folder and Run(run.folder).recipe.tune == 1


def test_a_tuned_backbone_is_the_backbone():
    images = torch.randint(256, (2, 3, 64, 64), dtype=torch.uint8)
    for name, kw in ('timm:resnet10t', dict(channels=(8, 8, 16, 16))), ('torchvision:resnet18', {}), ('shapes', {}):
        for stages in (1, 2):
            net = build_backbone(name, **kw).eval()
            with torch.no_grad(): whole = net(images)
            tuned = TunedBackbone(net, stages).train()
            assert tuned.net.training and not any(m.training for m in tuned.fixed.modules())
            tuned.eval()
            with torch.no_grad(): maps = tuned.fixed(images)
            assert maps.shape[1] == tuned.fixed.num_features and torch.allclose(tuned(maps.half()), whole, atol=2e-2 * whole.abs().max()) and torch.allclose(tuned(images), whole, atol=1e-5)
    assert not [n for n, p in tuned.named_parameters() if p.requires_grad != n.startswith('net.')]


@pytest.mark.parametrize('make, words', [
    (lambda: SMALL.with_(held_out=1.), 'held_out: expected a share'), (lambda: SMALL.with_(frozen=False, views=1, tune=1), 'need frozen=True'),
    (lambda: TunedBackbone(build_backbone('resnet18'), 4), 'expected one of 1, 2, 3, got 4'),
    (lambda: TunedBackbone(build_backbone('vit_tiny_patch16_224', img_size=32)), 'expected a ResNet')])
def test_bad_settings(make, words):
    with pytest.raises(ValueError, match=words): make()


# ---- images decoded once

def test_a_run_on_cached_images_is_the_same_run(tmp_path):
    rng = np.random.default_rng(0)
    for name in 'ab':
        (tmp_path / 'photos' / name).mkdir(parents=True)
        for i in range(8): Image.fromarray(rng.integers(0, 256, (40, 30, 3), dtype=np.uint8)).save(tmp_path / 'photos' / name / f'{name}{i}.jpg')
    recipe = SMALL.with_(name='photos', benchmark=None, train_file=str(tmp_path / 'photos'), frozen=False, views=1, held_out=0.25, batch_size=4, epochs=2, device='cpu')
    plain = run_recipe(recipe, tmp_path / 'plain', progress=False)
    kept = run_recipe(recipe.with_(cache_images=True), tmp_path / 'kept', progress=False)
    assert kept.predictions.equals(plain.predictions) and kept.metrics['loss'].tolist() == plain.metrics['loss'].tolist()
    assert [f.stem[-7:] for f in (tmp_path / 'kept' / 'cache').glob('*.npy')] == ['-images']
    state = {f: f.stat().st_mtime_ns for f in (kept.folder / 'state').iterdir()}
    again = run_recipe(recipe, tmp_path / 'kept', resume=True, progress=False)
    assert state == {f: f.stat().st_mtime_ns for f in (kept.folder / 'state').iterdir()} and again.predictions.equals(plain.predictions), 'a cache changes no result, so a run may go on without'
    with pytest.raises(ValueError, match='cache_images: a frozen backbone has its features cached'): recipe.with_(frozen=True, cache_images=True)
