"Cached features: computed once, whole or not at all, and never those of something else"
import os
import pickle
import stat
import subprocess
import sys
import textwrap

import numpy as np
import pytest
import torch
from PIL import Image

from cprfl.data.dataset import ArrayDataset, LongTailDataset, from_folder, resize
from cprfl.data.images import BadDataError
from cprfl.data.shapes import shapes_lt
from cprfl.model.backbones import build_backbone
from cprfl.model.cprfl import CPRFL
from cprfl.train.cache import FeatureDataset, cache_features, cache_images, feature_key, random_view
from cprfl.train.config import TrainConfig
from cprfl.train.trainer import Trainer, predict


@pytest.fixture(scope='module')
def images(): return shapes_lt('train').subset(range(40))


def backbone(seed=0, **kw):
    torch.manual_seed(seed)
    return build_backbone('resnet10t', channels=(8, 8, 16, 16), **kw).eval()


def head(backbone=None, **kw):
    return CPRFL(backbone, torch.randn(20, 8), d=16, heads=2, head_dim=8, ffn_dim=16, **kw)


def cache(images, folder, net=None, **kw):
    settings = dict(size=64, num_workers=0, batch_size=16, precision='fp32', progress=False)
    return cache_features(net or backbone(), images, folder, **settings | kw)


def stored(folder): return sorted(p.name for p in folder.iterdir() if p.suffix != '.lock')


def assert_same_labels(a, b):
    assert np.array_equal(a.targets, b.targets)
    assert a.classes == b.classes
    assert a.paths == b.paths
    assert a.groups is b.groups


# ---- the same as the backbone's output

@torch.no_grad()
@pytest.mark.parametrize('precision, tolerance', [('fp32', 1e-3), ('bf16', 3e-2)])
def test_features_are_the_backbones(images, tmp_path, precision, tolerance):
    net, ds = backbone(), cache(images, tmp_path, precision=precision)
    want = net.patches(torch.stack([images.image(i) for i in range(len(images))]))
    got = torch.stack([ds[i][0] for i in range(len(ds))])
    assert got.dtype == torch.float16
    assert got.shape == want.shape == (40, 4, 16)
    assert (got.float() - want).norm() / want.norm() < tolerance


def test_features_are_mapped_and_keep_the_labels(images, tmp_path):
    ds = cache(images, tmp_path)
    assert isinstance(ds.features, np.memmap)
    assert ds.features.shape == (1, 40, 4, 16)
    assert ds.num_features == 16
    assert_same_labels(ds, images)


def test_workers_give_the_same(images, tmp_path):
    alone, two = cache(images, tmp_path / 'a'), cache(images, tmp_path / 'b', num_workers=2)
    assert np.array_equal(alone.features, two.features)


def test_logits_of_features_are_those_of_images(images, tmp_path):
    model = head(backbone()).eval()
    features = cache(images, tmp_path, model.backbone)
    assert torch.allclose(predict(model, images), predict(model, features), atol=2e-3, rtol=1e-2)


def test_an_unknown_precision_is_refused(images, tmp_path):
    with pytest.raises(ValueError, match="precision: expected one of bf16, fp32, got 'fp16'"):
        cache(images, tmp_path, precision='fp16')


# ---- computed once

def test_the_second_call_computes_nothing(images, tmp_path, monkeypatch):
    first = cache(images, tmp_path)
    [name] = stored(tmp_path)
    written = (tmp_path / name).stat().st_mtime_ns
    net = backbone()
    monkeypatch.setattr(net, 'patches', lambda x: pytest.fail('computed again'))
    again = cache(images, tmp_path, net)
    assert stored(tmp_path) == [name]
    assert (tmp_path / name).stat().st_mtime_ns == written
    assert np.array_equal(first.features, again.features)


@pytest.mark.parametrize('error', [KeyboardInterrupt, RuntimeError])
def test_an_interrupted_computation_leaves_no_file(images, tmp_path, error):
    net, calls = backbone(), []
    patches = net.patches

    def cut(x):
        calls.append(len(x))
        if len(calls) == 3: raise error('cut')
        return patches(x)

    net.patches = cut
    with pytest.raises(error): cache(images, tmp_path, net)
    assert calls == [1, 16, 16]
    assert not stored(tmp_path)


def test_what_a_killed_process_left_is_removed(images, tmp_path):
    cache(images, tmp_path)
    [name] = stored(tmp_path)
    (tmp_path / name).rename(tmp_path / name.replace('.npy', '.123.part'))
    assert len(cache(images, tmp_path)) == 40
    assert stored(tmp_path) == [name]


# ---- the key

def test_keys_are_sixteen_digits_and_repeat_themselves(images):
    key = feature_key(backbone(), images, 64)
    assert len(key) == 16
    assert int(key, 16) >= 0
    assert key == feature_key(backbone(), images, 64)


def changed(net, change):
    with torch.no_grad(): change(net)
    return net


def nudge_a_weight(net): next(net.parameters()).flatten()[0] += 1e-6


def nudge_statistics(net): net.get_buffer('net.net.conv1.1.running_mean').add_(1e-3)


def test_the_key_changes_with_the_backbone(images):
    nets = [
        backbone(), backbone(1), backbone(normalize=False), changed(backbone(), nudge_a_weight),
        changed(backbone(), nudge_statistics), changed(backbone(), lambda net: net.mean.fill_(0.5)),
    ]
    assert len({feature_key(net, images, 64) for net in nets}) == len(nets)


def test_the_key_changes_with_the_list(images):
    lists = [images, images.subset(range(39)), images.subset(range(40)[::-1])]
    assert len({feature_key(backbone(), images, 64) for images in lists}) == len(lists)


def test_the_key_changes_with_the_settings(images):
    settings = [{}, {'size': 96}, {'views': 2}, {'augment': 'flip'}, {'extra': 'bf16'}]
    assert len({feature_key(backbone(), images, **{'size': 64} | kw) for kw in settings}) == len(settings)


def test_files_of_one_name_but_other_pixels_are_not_confused(tmp_path):
    rng, sets = np.random.default_rng(0), []
    for root in (tmp_path / 'a', tmp_path / 'b'):
        for name in ('cat', 'dog'):
            (root / name).mkdir(parents=True)
            pixels = rng.integers(0, 256, (64, 64, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / name / f'{name}.png')
        sets.append(from_folder(root))
    assert sets[0].paths == sets[1].paths
    assert feature_key(backbone(), sets[0], 64) != feature_key(backbone(), sets[1], 64)


def test_arrays_without_names_are_not_confused():
    pixels = np.random.default_rng(0).integers(0, 256, (2, 5, 64, 64, 3), dtype=np.uint8)
    sets = [ArrayDataset(x, np.ones((5, 2), np.uint8), ['c', 'd']) for x in pixels]
    assert sets[0].paths == sets[1].paths
    assert feature_key(backbone(), sets[0], 64) != feature_key(backbone(), sets[1], 64)


def test_seeds_of_shapes_lt_are_not_confused():
    assert len({feature_key(backbone(), shapes_lt('test', seed=seed, size=32), 32) for seed in (0, 1)}) == 2


def test_labels_are_not_part_of_the_key(images, tmp_path):
    "They are always the dataset's"
    cache(images, tmp_path)
    relabelled = images.subset(range(40))
    relabelled.targets = 1 - relabelled.targets
    ds = cache(relabelled, tmp_path)
    assert len(stored(tmp_path)) == 1
    assert np.array_equal(ds.targets, 1 - images.targets)


# ---- views

@pytest.fixture
def views(images, tmp_path): return cache(images, tmp_path, views=4)


def test_the_first_view_is_the_plain_image(views, images, tmp_path):
    assert len(views.features) == 4
    assert np.array_equal(views.features[0], cache(images, tmp_path).features[0])
    for view in (1, 2, 3): assert not np.allclose(views.features[view], views.features[0], atol=1e-3)


def test_views_are_computed_alike_each_time(views, images, tmp_path):
    assert np.array_equal(views.features, cache(images, tmp_path / 'again', views=4).features)


def test_views_are_drawn_for_each_seed_and_epoch(views):
    draws = []
    for seed, epoch in ((0, 0), (0, 1), (1, 0)):
        views.draw_views(epoch, seed)
        draws.append(views.view.copy())
        views.draw_views(epoch, seed)
        assert np.array_equal(views.view, draws[-1])
        assert set(views.view) == {0, 1, 2, 3}
    assert len({draw.tobytes() for draw in draws}) == 3


def test_an_image_shows_the_view_that_was_drawn(views):
    views.draw_views(0)
    i = int(np.flatnonzero(views.view == 2)[0])
    assert torch.equal(views[i][0], torch.from_numpy(np.array(views.features[2, i])))


def test_prediction_always_sees_the_plain_view(views):
    model = head(feature_dim=16)
    want = predict(model, views)
    views.draw_views(5)
    assert torch.equal(predict(model, views), want)


def test_a_part_keeps_its_rows(images, tmp_path):
    ds = cache(images, tmp_path)
    part = ds.subset([30, 3]).subset([1])
    assert len(part) == 1
    assert torch.equal(part[0][0], ds[3][0])
    assert part.paths == [ds.paths[3]]


def test_a_part_draws_views_of_its_own(views):
    part = views.subset([30, 3])
    part.draw_views(1)
    assert len(part.view) == 2
    assert not views.view.any()


def test_random_views_leave_the_generator_alone(images):
    torch.manual_seed(0)
    want = torch.rand(1)
    torch.manual_seed(0)
    random_view(images.image(0)[None], 1)
    assert torch.equal(torch.rand(1), want)


def test_random_views_keep_shape_and_type(images):
    x = torch.stack([images.image(i) for i in range(4)])
    view = random_view(x, 1)
    assert view.dtype == torch.uint8
    assert view.shape == x.shape
    assert not torch.equal(view, x)


# ---- training on them

def train(model, data, epochs, **kw):
    config = TrainConfig(epochs=epochs, batch_size=16, lr=1e-2, device='cpu', **kw)
    return Trainer(model, data, config=config, progress=False).fit()


@pytest.fixture
def trained(images, tmp_path):
    "What the model was, and its trainer after training on features"
    torch.manual_seed(0)
    model = head(backbone().requires_grad_(False))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    data = cache(images, tmp_path, model.backbone, views=2)
    return before, train(model, data, 3, ema=0.5, select='last')


@pytest.mark.parametrize('which', ['model', 'evaluated'])
def test_frozen_training_leaves_the_backbone_as_it_is(trained, which):
    before, trainer = trained
    for name, value in getattr(trainer, which).state_dict().items():
        frozen = name.startswith('backbone.') or name == 'semantics'
        assert torch.equal(value, before[name]) == frozen, name


def test_frozen_training_lowers_the_loss(trained):
    _, trainer = trained
    assert trainer.history[-1]['loss'] < trainer.history[0]['loss']


def test_training_on_views_is_reproducible(images, tmp_path):
    states = []
    for _ in range(2):
        torch.manual_seed(0)
        trainer = train(head(feature_dim=16), cache(images, tmp_path, views=2), 2)
        states.append(trainer.evaluated.state_dict())
    for name, value in states[0].items(): assert torch.equal(value, states[1][name]), name


def test_a_cache_is_opened_for_reading_only(images, tmp_path):
    ds = cache(images, tmp_path)
    with pytest.raises(ValueError, match='read-only'): ds.features[0, 0] = 0
    [name] = stored(tmp_path)
    os.chmod(tmp_path / name, stat.S_IRUSR)
    assert len(FeatureDataset(tmp_path / name, images)) == 40


# ---- images decoded once

@pytest.fixture
def photos(tmp_path):
    "Eleven files of different sizes"
    rng, paths = np.random.default_rng(0), [f'{i:02}.png' for i in range(11)]
    for i, path in enumerate(paths):
        Image.fromarray(rng.integers(0, 256, (20 + i, 33 - i, 3), dtype=np.uint8)).save(tmp_path / path)
    return LongTailDataset(paths, np.eye(11, dtype=np.uint8), list('abcdefghijk'), tmp_path, resize(16))


def decoded(photos, folder, size=16, num_workers=0):
    return cache_images(photos, folder, size, num_workers, progress=False)


@pytest.mark.parametrize('num_workers', [0, 2])
def test_cached_images_are_the_images(photos, tmp_path, num_workers):
    kept = decoded(photos, tmp_path / 'cache', num_workers=num_workers)
    assert len(kept) == 11
    assert kept.stored.dtype == np.uint8
    for (a, _, _), (b, _, _) in zip(kept, photos): assert torch.equal(a, b)
    assert torch.equal(kept.subset([9, 2])[1][0], photos[2][0])
    assert_same_labels(kept, photos)


def test_images_are_decoded_once(photos, tmp_path, monkeypatch):
    kept = decoded(photos, tmp_path / 'cache')
    monkeypatch.setattr('cprfl.train.cache._decode', lambda *a: pytest.fail('decoded again'))
    assert np.array_equal(decoded(photos, tmp_path / 'cache').stored, kept.stored)


def test_cached_images_belong_to_a_list_and_a_size(photos, tmp_path):
    folder = tmp_path / 'cache'
    for data, size in ((photos, 16), (photos, 16), (photos, 17), (photos.subset(range(10)), 16)):
        decoded(data, folder, size)
    assert len(stored(folder)) == 3


def test_a_replaced_file_is_decoded_again(photos, tmp_path):
    "Every file's size counts, not only the pixels of eight images"
    decoded(photos, tmp_path / 'cache')
    Image.new('RGB', (20, 20)).save(tmp_path / '03.png')
    decoded(photos, tmp_path / 'cache')
    assert len(stored(tmp_path / 'cache')) == 2


def assert_sent_without_its_array(ds):
    sent = pickle.dumps(ds)
    there = pickle.loads(sent) # noqa: S301 - pickled on the line above
    assert len(sent) < ds.stored.nbytes + 5000
    assert b'memmap' not in sent
    assert isinstance(there.stored, np.memmap)
    for i in range(len(ds)): assert torch.equal(there[i][0], ds[i][0])


def test_other_processes_map_images_for_themselves(photos, tmp_path):
    kept = decoded(photos, tmp_path / 'cache')
    assert_sent_without_its_array(kept)
    assert_sent_without_its_array(kept.subset([4, 2]))


def test_other_processes_map_features_for_themselves(images, tmp_path):
    assert_sent_without_its_array(cache(images, tmp_path))


def test_a_disk_without_room_for_a_cache_says_so(tmp_path):
    "In a process of its own, whose files may not grow beyond 4 kB"
    script = f"""
        import resource, signal
        import numpy as np
        from cprfl.data.dataset import ArrayDataset
        from cprfl.train.cache import cache_images
        data = ArrayDataset(np.zeros((9, 64, 64, 3), np.uint8), np.eye(9, dtype=np.uint8), list("abcdefghi"))
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
        cache_images(data, {str(tmp_path / "cache")!r}, 64, 0, progress=False)"""
    done = subprocess.run([sys.executable, '-c', textwrap.dedent(script)], capture_output=True, text=True)
    assert done.returncode == 1
    assert 'OSError' in done.stderr
    assert stored(tmp_path / 'cache') == []


def test_images_of_different_sizes_are_refused_by_name(photos, tmp_path):
    photos.transform = None
    why = r'01.png is \[3, 21, 32\], the images before it are \[3, 20, 33\].*resize'
    with pytest.raises(ValueError, match=why):
        decoded(photos, tmp_path / 'cache')
    assert stored(tmp_path / 'cache') == []


def test_an_image_that_cannot_be_read_is_named(photos, tmp_path):
    "03.png is not among the eight images that the key reads"
    (tmp_path / '03.png').write_bytes(b'broken')
    with pytest.raises(BadDataError, match='03.png: image is truncated or broken'):
        decoded(photos, tmp_path / 'cache')
    assert stored(tmp_path / 'cache') == []
