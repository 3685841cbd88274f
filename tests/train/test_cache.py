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


def cache(images, folder, net=None, **kw):
    return cache_features(net or backbone(), images, folder, **{**dict(size=64, num_workers=0, batch_size=16, precision='fp32', progress=False), **kw})


def stored(folder): return sorted(p.name for p in folder.iterdir() if p.suffix != '.lock')


# ---- the same as the backbone's output

@torch.no_grad()
@pytest.mark.parametrize('precision, tolerance', [('fp32', 1e-3), ('bf16', 3e-2)])
def test_features_are_the_backbones(images, tmp_path, precision, tolerance):
    net, ds = backbone(), cache(images, tmp_path, precision=precision)
    want = net.patches(torch.stack([images.image(i) for i in range(len(images))]))
    got = torch.stack([ds[i][0] for i in range(len(ds))])
    assert got.dtype == torch.float16 and got.shape == want.shape == (40, 4, 16) and ds.num_features == 16
    assert (got.float() - want).norm() / want.norm() < tolerance
    assert np.array_equal(ds.targets, images.targets) and ds.classes == images.classes and ds.paths == images.paths and ds.groups is images.groups
    assert isinstance(ds.features, np.memmap) and ds.features.shape == (1, 40, 4, 16)


def test_workers_give_the_same(images, tmp_path):
    a, b = cache(images, tmp_path / 'a'), cache(images, tmp_path / 'b', num_workers=2)
    assert np.array_equal(a.features, b.features)


def test_logits_of_features_are_those_of_images(images, tmp_path):
    model = CPRFL(backbone(), torch.randn(20, 8), d=16, heads=2, head_dim=8, ffn_dim=16).eval()
    a, b = predict(model, images), predict(model, cache(images, tmp_path, model.backbone))
    assert torch.allclose(a, b, atol=2e-3, rtol=1e-2)


# ---- computed once

def test_the_second_call_computes_nothing(images, tmp_path, monkeypatch):
    first = cache(images, tmp_path)
    [name] = stored(tmp_path)
    written = (tmp_path / name).stat().st_mtime_ns
    net = backbone()
    monkeypatch.setattr(net, 'patches', lambda x: pytest.fail('computed again'))
    again = cache(images, tmp_path, net)
    assert stored(tmp_path) == [name] and (tmp_path / name).stat().st_mtime_ns == written and np.array_equal(first.features, again.features)


def test_an_interrupted_computation_leaves_no_file(images, tmp_path):
    for error in (KeyboardInterrupt, RuntimeError):
        net, calls = backbone(), []
        whole = net.patches
        def cut(x):
            calls.append(len(x))
            if len(calls) == 3: raise error('cut')
            return whole(x)
        net.patches = cut
        with pytest.raises(error): cache(images, tmp_path, net)
        assert len(calls) == 3 and not stored(tmp_path)
    assert len(cache(images, tmp_path)) == 40 and len(stored(tmp_path)) == 1


# ---- the key

def test_key_changes_with_whatever_the_features_depend_on(images):
    net, other = backbone(), backbone(1)
    base = feature_key(net, images, 64)
    assert base == feature_key(backbone(), images, 64) and len(base) == 16 and int(base, 16) >= 0
    with torch.no_grad(): near = backbone(); next(near.parameters()).flatten()[0] += 1e-6
    stats = backbone(); next(b for n, b in stats.named_buffers() if n.endswith('running_mean')).add_(1e-3)
    keys = dict(base=base, weights=feature_key(other, images, 64), one_weight=feature_key(near, images, 64), statistics=feature_key(stats, images, 64),
                list=feature_key(net, images.subset(range(39)), 64), order=feature_key(net, images.subset(range(40)[::-1]), 64), size=feature_key(net, images, 96),
                views=feature_key(net, images, 64, views=2), augment=feature_key(net, images, 64, augment='flip'), precision=feature_key(net, images, 64, extra='bf16'),
                normalize=feature_key(backbone(normalize=False), images, 64))
    mean = backbone(); mean.mean.fill_(0.5)
    keys['mean'] = feature_key(mean, images, 64)
    assert len(set(keys.values())) == len(keys), keys


def test_pictures_of_one_name_but_other_pixels_are_not_confused(tmp_path):
    "The same file names below two folders, and arrays that were given no names at all"
    net, rng = backbone(), np.random.default_rng(0)
    sets = []
    for root in ('a', 'b'):
        for c in ('cat', 'dog'):
            (tmp_path / root / c).mkdir(parents=True)
            Image.fromarray(rng.integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(tmp_path / root / c / f'{c}.png')
        sets.append(from_folder(tmp_path / root))
    x, y = rng.integers(0, 256, (2, 5, 64, 64, 3), dtype=np.uint8), np.ones((5, 2), np.uint8)
    sets += [ArrayDataset(x[0], y, ['c', 'd']), ArrayDataset(x[1], y, ['c', 'd'])]
    assert sets[0].paths == sets[1].paths and sets[2].paths == sets[3].paths
    assert len({feature_key(net, s, 64) for s in sets}) == 4
    assert len({feature_key(net, shapes_lt('test', seed=s), 64) for s in (0, 1)}) == 2


def test_labels_are_not_part_of_the_key_but_always_the_datasets(images, tmp_path):
    cache(images, tmp_path)
    relabelled = images.subset(range(40))
    relabelled.targets = 1 - relabelled.targets
    ds = cache(relabelled, tmp_path)
    assert len(stored(tmp_path)) == 1 and np.array_equal(ds.targets, 1 - images.targets)


# ---- views

def test_views_are_drawn_per_epoch_and_repeat_themselves(images, tmp_path):
    ds, plain = cache(images, tmp_path, views=4), cache(images, tmp_path)
    assert ds.features.shape[0] == 4 and np.array_equal(ds.features[0], plain.features[0])
    assert all(not np.allclose(ds.features[v], ds.features[0], atol=1e-3) for v in (1, 2, 3))
    draws = {}
    for seed, epoch in ((0, 0), (0, 1), (1, 0)):
        ds.draw_views(epoch, seed)
        draws[seed, epoch] = ds.view.copy()
        ds.draw_views(epoch, seed)
        assert np.array_equal(ds.view, draws[seed, epoch]) and set(ds.view) == {0, 1, 2, 3}
    assert not np.array_equal(draws[0, 0], draws[0, 1]) and not np.array_equal(draws[0, 0], draws[1, 0])
    i = int(np.flatnonzero(ds.view == 2)[0])
    assert torch.equal(ds[i][0], torch.from_numpy(np.array(ds.features[2, i])))
    again = cache(images, tmp_path / 'again', views=4)
    assert np.array_equal(again.features, ds.features)


def test_prediction_always_sees_the_plain_view(images, tmp_path):
    ds, model = cache(images, tmp_path, views=3), CPRFL(None, torch.randn(20, 8), d=16, heads=2, head_dim=8, ffn_dim=16, feature_dim=16)
    want = predict(model, ds)
    ds.draw_views(5)
    assert torch.equal(predict(model, ds), want)


def test_a_part_keeps_its_rows(images, tmp_path):
    ds = cache(images, tmp_path)
    part = ds.subset([30, 3]).subset([1])
    assert len(part) == 1 and torch.equal(part[0][0], ds[3][0]) and part.paths == [ds.paths[3]]
    part.draw_views(1)
    assert len(part.view) == 1 and len(ds.view) == 40


def test_random_views_repeat_and_leave_the_generator_alone(images):
    x = torch.stack([images.image(i) for i in range(4)])
    torch.manual_seed(0)
    want = torch.rand(1)
    torch.manual_seed(0)
    a, b, c = random_view(x, 1), random_view(x, 1), random_view(x, 2)
    assert torch.equal(torch.rand(1), want)
    assert a.dtype == torch.uint8 and a.shape == x.shape and torch.equal(a, b) and not torch.equal(a, c) and not torch.equal(a, x)


# ---- training on them

def test_frozen_training_leaves_the_backbone_as_it_is(images, tmp_path):
    torch.manual_seed(0)
    model = CPRFL(backbone().requires_grad_(False), torch.randn(20, 8), d=16, heads=2, head_dim=8, ffn_dim=16)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    ds = cache(images, tmp_path, model.backbone, views=2)
    t = Trainer(model, ds, config=TrainConfig(epochs=3, batch_size=16, lr=1e-2, ema=0.5, device='cpu', select='last'), progress=False).fit()
    for m in (t.model, t.evaluated):
        for k, v in m.state_dict().items(): assert torch.equal(v, before[k]) == (k.startswith('backbone.') or k == 'semantics'), k
    assert t.history[-1]['loss'] < t.history[0]['loss']


def test_training_on_views_is_reproducible(images, tmp_path):
    def train():
        torch.manual_seed(0)
        model = CPRFL(None, torch.randn(20, 8), d=16, heads=2, head_dim=8, ffn_dim=16, feature_dim=16)
        return Trainer(model, cache(images, tmp_path, views=2), config=TrainConfig(epochs=2, batch_size=16, lr=1e-2, device='cpu'), progress=False).fit()
    a, b = train(), train()
    assert all(torch.equal(v, b.evaluated.state_dict()[k]) for k, v in a.evaluated.state_dict().items())


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
    rng = np.random.default_rng(0)
    for i in range(11): Image.fromarray(rng.integers(0, 256, (20 + i, 33 - i, 3), dtype=np.uint8)).save(tmp_path / f'{i:02}.png')
    return LongTailDataset([f'{i:02}.png' for i in range(11)], np.eye(11, dtype=np.uint8), list('abcdefghijk'), tmp_path, resize(16))


@pytest.mark.parametrize('num_workers', [0, 2])
def test_cached_images_are_the_images(photos, tmp_path, num_workers, monkeypatch):
    kept = cache_images(photos, tmp_path / 'cache', 16, num_workers, progress=False)
    assert len(kept) == 11 and all(torch.equal(a, b) for (a, _, _), (b, _, _) in zip(kept, photos)) and kept.stored.dtype == np.uint8
    assert np.array_equal(kept.targets, photos.targets) and kept.paths == photos.paths and kept.groups is photos.groups
    assert torch.equal(kept.subset([9, 2])[1][0], photos[2][0])
    monkeypatch.setattr('cprfl.train.cache._decode', lambda *a: pytest.fail('decoded again'))
    assert np.array_equal(cache_images(photos, tmp_path / 'cache', 16, progress=False).stored, kept.stored)


def test_cached_images_belong_to_a_list_a_size_and_pixels(photos, tmp_path):
    folder = tmp_path / 'cache'
    def files(data, size=16): cache_images(data, folder, size, 0, progress=False); return len(stored(folder))
    assert [files(photos), files(photos), files(photos, 17), files(photos.subset(range(10)))] == [1, 1, 2, 3]
    Image.new('RGB', (20, 20)).save(tmp_path / '03.png')
    assert files(photos) == 4, "every file's size counts"


def test_other_processes_map_the_file_for_themselves(photos, images, tmp_path):
    kept, features = cache_images(photos, tmp_path / 'cache', 16, 0, progress=False), cache(images, tmp_path / 'cache')
    for ds in (kept, features, kept.subset([4, 2])):
        sent = pickle.dumps(ds)
        there = pickle.loads(sent)
        assert len(sent) < ds.stored.nbytes + 5000 and b'memmap' not in sent and isinstance(there.stored, np.memmap)
        assert all(torch.equal(there[i][0], ds[i][0]) for i in range(len(ds)))


def test_a_disk_without_room_for_a_cache_says_so_and_keeps_nothing(photos, tmp_path):
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
    assert done.returncode == 1 and 'OSError' in done.stderr and stored(tmp_path / 'cache') == []


def test_an_image_that_cannot_be_cached_is_named_and_no_file_is_left(photos, tmp_path):
    photos.transform = None
    with pytest.raises(ValueError, match=r'01.png is \[3, 21, 32\], the images before it are \[3, 20, 33\].*resize'): cache_images(photos, tmp_path / 'cache', 16, 0, progress=False)
    photos.transform = resize(16)
    (tmp_path / '04.png').write_bytes(b'broken')
    with pytest.raises(BadDataError, match='04.png: image is truncated or broken'): cache_images(photos, tmp_path / 'cache', 16, 0, progress=False)
    assert stored(tmp_path / 'cache') == []
