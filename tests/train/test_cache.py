"Cached features: computed once, mended if damaged, and never those of something else"
import errno
import os
import pickle
import re
import shutil
import signal
import stat
import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from filelock import FileLock
from PIL import Image

from cprfl.data.dataset import ArrayDataset, LongTailDataset, from_folder, resize
from cprfl.data.images import BadDataError
from cprfl.data.shapes import shapes_lt
from cprfl.model.backbones import build_backbone
from cprfl.model.cprfl import CPRFL
from cprfl.train.cache import FeatureDataset, _mapped, cache_features, cache_images, feature_key, random_view
from cprfl.train.config import TrainConfig
from cprfl.train.fingerprint import _plain, image_digests
from cprfl.train.rows import RowFile
from cprfl.train.trainer import Trainer, predict


@pytest.fixture(scope='module')
def images(): return shapes_lt('train').subset(range(40))


def backbone(seed=0, **kw):
    torch.manual_seed(seed)
    return build_backbone('resnet10t', channels=(8, 8, 16, 16), **kw).eval()


@pytest.fixture(autouse=True)
def whole_batches(monkeypatch):
    "A batch is one part on every machine, so that calls can be counted"
    monkeypatch.setattr('cprfl.train.cache._PART', 64)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def head(backbone=None, **kw):
    return CPRFL(backbone, torch.randn(20, 8), d=16, heads=2, head_dim=8, ffn_dim=16, **kw)


def cache(images, folder, net=None, **kw):
    settings = dict(size=64, num_workers=0, batch_size=16, precision='fp32', progress=False)
    return cache_features(net or backbone(), images, folder, **settings | kw)


def stored(folder): return sorted(p.name for p in folder.iterdir() if p.suffix in ('.npy', '.part'))


def assert_same_labels(a, b):
    assert np.array_equal(a.targets, b.targets)
    assert a.classes == b.classes
    assert a.paths == b.paths
    assert {name: list(ids) for name, ids in a.groups.items()} == {name: list(ids) for name, ids in b.groups.items()}


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


# ---- folded, and in several threads

def with_statistics(net):
    "Batch norms as after a training, of which no two channels are the same"
    torch.manual_seed(1)
    for m in net.modules():
        if not isinstance(m, torch.nn.BatchNorm2d): continue
        torch.nn.init.normal_(m.running_mean, 0, 0.2)
        torch.nn.init.uniform_(m.running_var, 0.5, 2)
        torch.nn.init.uniform_(m.weight, 0.5, 1.5)
        torch.nn.init.normal_(m.bias, 0, 0.2)
    return net


def unfolded(monkeypatch): monkeypatch.setattr('cprfl.train.cache._FOLDED', {})


def error_in_bf16(images, folder):
    exact = cache(images, folder, with_statistics(backbone()))
    rounded = cache(images, folder, with_statistics(backbone()), precision='bf16')
    exact, rounded = (np.asarray(ds.features, np.float32) for ds in (exact, rounded))
    return np.linalg.norm(rounded - exact) / np.linalg.norm(exact)


def test_folding_costs_no_accuracy(images, tmp_path, monkeypatch):
    "Features in bfloat16 are as far from those in float32 as without folding, but for the luck of rounding"
    folded = error_in_bf16(images, tmp_path / 'folded')
    unfolded(monkeypatch)
    assert folded < 1.3 * error_in_bf16(images, tmp_path / 'plain')


def test_a_folded_cache_has_a_key_of_its_own(images, tmp_path, monkeypatch):
    folded = cache(images, tmp_path / 'folded').mapped.name
    unfolded(monkeypatch)
    assert cache(images, tmp_path / 'plain').mapped.name != folded


def test_a_cache_from_before_folding_stays_valid(images, tmp_path, monkeypatch):
    with monkeypatch.context() as before:
        unfolded(before)
        old = cache(images, tmp_path)
    net = counting(backbone())
    assert cache(images, tmp_path, net).mapped == old.mapped
    assert net.calls == []


def test_a_cache_begun_before_folding_is_completed_as_it_was(images, tmp_path, monkeypatch):
    with monkeypatch.context() as before:
        unfolded(before)
        whole = cache(images, tmp_path / 'whole')
        cut_off(images, tmp_path / 'cut', 1)
    assert np.array_equal(cache(images, tmp_path / 'cut').features, whole.features)


def test_the_backbone_is_as_it_was(images, tmp_path):
    net = with_statistics(backbone())
    layers, state = str(net), {name: t.clone() for name, t in net.state_dict().items()}
    cache(images, tmp_path, net)
    assert str(net) == layers
    assert all(torch.equal(t, state[name]) for name, t in net.state_dict().items())


@pytest.fixture
def three_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


def test_threads_share_a_batch_and_change_nothing(images, tmp_path, three_threads):
    net = counting(backbone())
    three = cache(images, tmp_path / 'three', net, views=2)
    assert torch.get_num_threads() == 3
    assert sorted(net.calls) == sorted([6, 6, 4, 6, 6, 4, 3, 3, 2] * 2)
    torch.set_num_threads(1)
    assert np.allclose(three.features, cache(images, tmp_path / 'one', views=2).features, rtol=2e-3, atol=1e-4)


def test_a_batch_is_written_in_parts(images, tmp_path, monkeypatch):
    whole = cache(images, tmp_path / 'whole', backbone())
    monkeypatch.setattr('cprfl.train.cache._PART', 8)
    with pytest.raises(Cut): cache(images, tmp_path / 'parts', net := counting(backbone(), 3))
    assert net.calls == [8, 8, 8]
    net = counting(backbone())
    parts = cache(images, tmp_path / 'parts', net)
    assert net.calls == [8, 8, 8] # a batch of which a part is missing, and the last one
    assert np.allclose(whole.features, parts.features, rtol=2e-3, atol=1e-4)


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


# ---- cut off, and going on

class Cut(Exception): "What a test cuts a computation off with"


def counting(net, cut=None):
    "Remember the sizes of the batches; the call number `cut` fails"
    patches, net.calls = net.patches, []

    def counted(x):
        if len(net.calls) == cut: raise Cut
        net.calls.append(len(x))
        return patches(x)

    net.patches = counted
    return net


def cut_off(images, folder, calls, **kw):
    with pytest.raises(Cut): cache(images, folder, counting(backbone(), calls), **kw)


def test_a_computation_that_was_cut_off_is_no_cache(images, tmp_path):
    cut_off(images, tmp_path, 2)
    assert [Path(name).suffix for name in stored(tmp_path)] == ['.part']


@pytest.mark.parametrize('calls, left', [(0, [16, 16, 8]), (1, [16, 8]), (2, [8])])
def test_it_goes_on_where_it_stopped(images, tmp_path, calls, left):
    cut_off(images, tmp_path, calls)
    net = counting(backbone())
    cache(images, tmp_path, net)
    assert net.calls == left


@pytest.mark.parametrize('views', [1, 3])
@pytest.mark.parametrize('calls', [1, 2])
def test_what_went_on_equals_what_was_left_alone(images, tmp_path, views, calls):
    cut_off(images, tmp_path / 'cut', calls, views=views)
    cut, whole = (cache(images, tmp_path / name, views=views) for name in ('cut', 'whole'))
    assert np.array_equal(cut.features, whole.features)
    assert stored(tmp_path / 'cut') == stored(tmp_path / 'whole')


def test_going_on_is_said(images, tmp_path, capsys):
    cut_off(images, tmp_path, 2)
    cache(images, tmp_path)
    assert 'features of 40 images: 32 of 40 rows are there' in capsys.readouterr().out


def test_the_bar_counts_what_is_left(images, tmp_path, capsys):
    cut_off(images, tmp_path, 2)
    cache(images, tmp_path, progress=True)
    assert re.search(r'features: +80%.* 32/40 .*img', capsys.readouterr().err)


KILLED = """
    import os, signal
    import torch
    import cprfl.train.rows as rows
    from cprfl.data.shapes import shapes_lt
    from cprfl.model.backbones import build_backbone
    from cprfl.train.cache import cache_features
    torch.manual_seed(0)
    net = build_backbone('resnet10t', channels=(8, 8, 16, 16)).eval()
    checksum = rows._checksum
    def die(): os.kill(os.getpid(), signal.SIGKILL)
    rows._checksum = lambda row, place: die() if place == 20 else checksum(row, place)
    cache_features(net, shapes_lt('train').subset(range(40)), {folder!r}, 64, batch_size=16, precision='fp32',
                   num_workers=0, progress=False)
"""


def test_a_killed_process_loses_a_batch_at_most(images, tmp_path):
    "Here the rows of the second batch are written, but not their checksums"
    script = textwrap.dedent(KILLED.format(folder=str(tmp_path / 'cut')))
    done = subprocess.run([sys.executable, '-c', script], capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr[-2000:]
    net = counting(backbone())
    cut, whole = cache(images, tmp_path / 'cut', net), cache(images, tmp_path / 'whole')
    assert net.calls == [16, 8]
    assert np.array_equal(cut.features, whole.features)


def test_a_computation_that_was_cut_off_at_its_end(images, tmp_path, monkeypatch):
    "The rows are all there, but not under the name of a complete cache"
    def fail(rows): raise Cut
    with monkeypatch.context() as patched, pytest.raises(Cut):
        patched.setattr('cprfl.train.rows.RowFile.close', fail)
        cache(images, tmp_path)
    net = counting(backbone())
    assert np.array_equal(cache(images, tmp_path, net).features, cache(images, tmp_path / 'whole').features)
    assert net.calls == []


def test_features_that_are_not_finite_are_refused(images, tmp_path):
    net = backbone()
    net.patches = lambda x: torch.full((len(x), 4, 16), 1e6)
    with pytest.raises(ValueError, match='the features of shapes-lt/train/00000 are not finite'):
        cache(images, tmp_path, net)


def test_a_dataset_without_images_is_refused(images, tmp_path):
    with pytest.raises(ValueError, match='dataset: expected at least one image, got none'):
        cache(images.subset([]), tmp_path)


# ---- damage

def damage(folder, change):
    [file] = folder.glob('*.npy')
    change(file)
    return file


def flip_a_byte(file):
    content = bytearray(file.read_bytes())
    content[-100] ^= 1 # in the last batch
    file.write_bytes(content)


DAMAGES = {
    'flipped': (flip_a_byte, [8]),
    'truncated': (lambda file: file.write_bytes(file.read_bytes()[:-5]), [8]),
    'empty': (lambda file: file.write_bytes(b''), [16, 16, 8]),
    'no array': (lambda file: file.write_bytes(b'nonsense' * 100), [16, 16, 8]),
    'another array': (lambda file: np.save(file, np.zeros((1, 40, 4, 17), np.float16)), [16, 16, 8]),
    'no checksums': (lambda file: file.with_suffix('.sums').unlink(), [16, 16, 8]),
    'short checksums': (lambda file: file.with_suffix('.sums').write_bytes(b'12'), [16, 16, 8])}


@pytest.mark.parametrize('name', DAMAGES)
def test_damage_is_noticed_and_mended(images, tmp_path, name):
    change, computed = DAMAGES[name]
    whole = np.array(cache(images, tmp_path).features)
    file, net = damage(tmp_path, change), counting(backbone())
    with pytest.warns(UserWarning, match=f'{file.name} is damaged .features of 40 images.: .* of 40 rows'):
        mended = cache(images, tmp_path, net)
    assert net.calls == computed
    assert np.array_equal(mended.features, whole)


def test_damaged_images_are_noticed_and_mended(photos, tmp_path):
    whole = np.array(decoded(photos, tmp_path / 'cache').stored)
    damage(tmp_path / 'cache', flip_a_byte)
    with pytest.warns(UserWarning, match='is damaged'): mended = decoded(photos, tmp_path / 'cache')
    assert np.array_equal(mended.stored, whole)


@pytest.mark.parametrize('content', ['', '[]', '{"facts": 3}', '{"kind": "features", "facts": {"images": [1]}}'])
def test_what_lies_beside_a_cache_may_be_damaged(photos, tmp_path, content):
    cache(photos, tmp_path / 'cache', size=16)
    for file in (tmp_path / 'cache').glob('*.json'): file.write_text(content)
    assert len(cache(photos.subset(range(9)), tmp_path / 'cache', size=16)) == 9


# ---- several processes

def test_a_second_process_waits_and_then_reads(images, tmp_path, monkeypatch):
    waits, said, net = threading.Event(), [], counting(backbone())
    key = Path(cache(images, tmp_path / 'other').mapped).stem
    monkeypatch.setattr('builtins.print', lambda *words, **kw: (said.append(*words), waits.set()))
    with FileLock(tmp_path / f'{key}.lock'):
        second = threading.Thread(target=cache, args=(images, tmp_path, net))
        second.start()
        assert waits.wait(60)
        for file in (tmp_path / 'other').glob(f'{key}.[njs]*'): shutil.copy(file, tmp_path)
    second.join()
    assert said == [f"waiting for another process, which computes features of 40 images ({tmp_path / f'{key}.npy'})"]
    assert net.calls == []


@pytest.mark.parametrize('error', [OSError(errno.EOPNOTSUPP, 'Operation not supported'), NotImplementedError()])
def test_a_disk_without_locks_has_caches_as_well(images, tmp_path, monkeypatch, error):
    def refuse(lock, **kw): raise error
    monkeypatch.setattr(FileLock, 'acquire', refuse)
    with pytest.warns(UserWarning, match='is on a disk that cannot lock files'): cache(images, tmp_path)
    assert [Path(name).suffix for name in stored(tmp_path)] == ['.npy']


def test_a_complete_cache_needs_no_lock(images, tmp_path):
    "So it may lie in a folder that is read only"
    cache(images, tmp_path)
    for file in tmp_path.glob('*.lock'): file.unlink()
    before = sorted(tmp_path.iterdir())
    cache(images, tmp_path)
    assert sorted(tmp_path.iterdir()) == before


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


@pytest.mark.parametrize('kw', [
    dict(output_stride=16), dict(act_layer='gelu'), dict(block_args=dict(attn_layer='se')), dict(drop_path_rate=0.1)])
def test_the_key_changes_with_the_backbones_arguments(images, kw):
    assert feature_key(backbone(**kw), images, 64) != feature_key(backbone(), images, 64)


def test_a_set_is_described_in_one_order():
    "Not in that of its hashes, which change from process to process"
    assert _plain({'b', 'a', 'c'}) == """set["'a'", "'b'", "'c'"]"""


def test_settings_that_are_no_weights_are_noticed(images):
    block = lambda net: net.net.net.layer4[0]
    nets = [backbone(), *(changed(backbone(), change) for change in (
        lambda net: setattr(net, 'normalize', False), lambda net: setattr(block(net).conv1, 'stride', (4, 4)),
        lambda net: setattr(block(net), 'act1', torch.nn.ELU()), lambda net: setattr(block(net).bn1, 'eps', 1.)))]
    assert len({feature_key(net, images, 64) for net in nets}) == len(nets)


@pytest.mark.parametrize('name', ['PIL', 'timm', 'torch', 'torchvision'])
def test_the_key_changes_with_versions(images, monkeypatch, name):
    before = feature_key(backbone(), images, 64)
    monkeypatch.setattr(sys.modules[name], '__version__', '99.1.0')
    assert feature_key(backbone(), images, 64) != before


def test_caches_of_another_format_are_left_alone(images, monkeypatch):
    before = feature_key(backbone(), images, 64)
    monkeypatch.setattr(sys.modules['cprfl.train.fingerprint'], 'CACHE_FORMAT', 1)
    assert feature_key(backbone(), images, 64) != before


def test_the_key_does_not_change_with_a_patch_release(images, monkeypatch):
    before = feature_key(backbone(), images, 64)
    monkeypatch.setattr(torch, '__version__', '.'.join(torch.__version__.split('.')[:2]) + '.99')
    assert feature_key(backbone(), images, 64) == before


@pytest.mark.parametrize('which', range(11))
def test_every_image_counts(photos, tmp_path, which):
    before = feature_key(backbone(), photos, 16)
    Image.new('RGB', (20, 20), 'red').save(tmp_path / f'{which:02}.png')
    assert feature_key(backbone(), photos, 16) != before


def test_the_transform_counts(photos):
    keys = {feature_key(backbone(), photos, 16)}
    for transform in (resize(17), lambda x: resize(16)(x), lambda x: resize(16)(x) // 2):
        photos.transform = transform
        keys.add(feature_key(backbone(), photos, 16))
    assert len(keys) == 4


def test_the_batch_size_counts(images, tmp_path):
    "The views of a batch are augmented together"
    for batch_size in (16, 20): cache(images, tmp_path, batch_size=batch_size, views=2)
    assert len(stored(tmp_path)) == 2


def test_a_copied_folder_has_the_same_key(photos, tmp_path):
    shutil.copytree(tmp_path, tmp_path / 'copy')
    copy = LongTailDataset(photos.paths, photos.targets, photos.classes, tmp_path / 'copy', resize(16))
    assert feature_key(backbone(), copy, 16) == feature_key(backbone(), photos, 16)


def test_labels_are_not_part_of_the_key(images, tmp_path):
    "They are always the dataset's"
    cache(images, tmp_path)
    relabelled = images.subset(range(40))
    relabelled.targets = 1 - relabelled.targets
    ds = cache(relabelled, tmp_path)
    assert len(stored(tmp_path)) == 1
    assert np.array_equal(ds.targets, 1 - images.targets)


# ---- what changed

def replace(folder, *names):
    for name in names: Image.new('RGB', (9, 9), 'red').save(folder / name)


CHANGES = {
    'images': (lambda photos, folder: replace(folder, '03.png', '07.png'), {}, '2 images changed (03.png, 07.png)'),
    'arguments': (lambda *a: None, dict(net=dict(output_stride=16)),
                  'backbone_args: output_stride not set then, 16 now'),
    'size': (lambda *a: None, dict(size=17), 'size: 16 then, 17 now'),
    'precision': (lambda *a: None, dict(precision='bf16'), 'precision: fp32 then, bf16 now'),
    'weights': (lambda *a: None, dict(net=dict(seed=1)), 'other weights'),
    'transform': (lambda photos, _: setattr(photos, 'transform', resize(18)), {}, 'transform: Resize')}


@pytest.mark.parametrize('name', CHANGES)
def test_a_stale_cache_says_what_changed(photos, tmp_path, capsys, name):
    change, kw, said = CHANGES[name]
    cache(photos, tmp_path / 'cache', size=16)
    change(photos, tmp_path)
    cache(photos, tmp_path / 'cache', **dict(size=16) | kw | dict(net=backbone(**kw.get('net', {}))))
    assert f'features of 11 images are computed, because the nearest cache differs: {said}' in capsys.readouterr().out


def test_caches_of_other_images_are_no_news(photos, images, tmp_path, capsys):
    cache(images, tmp_path / 'cache')
    cache(photos, tmp_path / 'cache', size=16)
    assert 'again' not in capsys.readouterr().out


# ---- digests of files

@pytest.fixture
def reads(monkeypatch):
    "The names of files that are read"
    read, names = Path.read_bytes, []
    monkeypatch.setattr(Path, 'read_bytes', lambda path: (names.append(path.name), read(path))[1])
    monkeypatch.setattr('cprfl.train.fingerprint._SETTLED', 0)
    return names


def test_files_are_read_once(photos, tmp_path, reads):
    (tmp_path / 'cache').mkdir()
    for _ in range(2): image_digests(photos, tmp_path / 'cache')
    assert sorted(reads) == photos.paths


def test_a_file_that_was_touched_is_read_again(photos, tmp_path, reads):
    before = image_digests(photos, tmp_path)
    (tmp_path / '04.png').touch()
    del reads[:]
    assert image_digests(photos, tmp_path) == before
    assert reads == ['04.png']


def test_a_replaced_file_of_the_same_size_and_time_is_noticed(photos, tmp_path, reads):
    file = tmp_path / '04.png'
    content, times = file.read_bytes(), file.stat()
    before = image_digests(photos, tmp_path)
    file.write_bytes(content[:-20] + b'x' + content[-19:])
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
    after = image_digests(photos, tmp_path)
    assert [a for a, b in zip(before, after) if a != b] == [before[4]]


def test_a_file_that_was_just_written_is_not_remembered(photos, tmp_path):
    image_digests(photos, tmp_path)
    assert not (tmp_path / 'files.json').exists()


def test_a_missing_file_is_named(photos, tmp_path):
    (tmp_path / '04.png').unlink()
    with pytest.raises(BadDataError, match='04.png: image is missing'): image_digests(photos)


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


# ---- several files as one array

@pytest.fixture
def files(tmp_path):
    "Three files of features, each with the number of its file"
    found = [tmp_path / f'{i}.npy' for i in range(3)]
    for i, file in enumerate(found): np.save(file, np.full((1, 2, 4), i, np.float16))
    return found


def test_shards_are_opened_for_reading_only(files):
    with pytest.raises(ValueError, match='read-only'): _mapped(files)[0, 3][:] = 0


def test_few_shards_are_open_at_a_time(files, monkeypatch):
    monkeypatch.setattr('cprfl.train.cache._MOST_OPEN', 1)
    array = _mapped(files)
    assert [array[0, row][0] for row in (5, 0, 3, 0)] == [2, 0, 1, 0]
    assert array.opened.cache_info().currsize == 1


@pytest.mark.parametrize('size', [0, 10, 130])
def test_a_file_that_was_cut_is_named(files, size):
    os.truncate(files[1], size)
    with pytest.raises(ValueError, match='1.npy is damaged'): _mapped(files)
    with pytest.raises(ValueError, match='1.npy is damaged'): _mapped(files[1])


def test_a_shard_that_is_replaced_while_in_use_is_an_error(files):
    array = _mapped(files)
    os.utime(files[2], (0, 0))
    with pytest.raises(ValueError, match='2.npy .*it was replaced while in use'): array[0, 5]


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
    monkeypatch.setattr('cprfl.train.cache._as_bytes', lambda *a: pytest.fail('decoded again'))
    assert np.array_equal(decoded(photos, tmp_path / 'cache').stored, kept.stored)


def test_decoding_goes_on_where_it_stopped(tmp_path, monkeypatch):
    pixels = np.random.default_rng(0).integers(0, 256, (150, 8, 8, 3), dtype=np.uint8)
    data, write = ArrayDataset(pixels, np.ones((150, 2), np.uint8), ['c', 'd']), RowFile.write
    def cut(rows, at, values):
        if at.start == 128: raise Cut
        write(rows, at, values)
    with monkeypatch.context() as patched, pytest.raises(Cut):
        patched.setattr(RowFile, 'write', cut)
        decoded(data, tmp_path, 8)
    read = []
    monkeypatch.setattr(RowFile, 'write', lambda rows, at, values: (read.append(at), write(rows, at, values)))
    kept = decoded(data, tmp_path, 8)
    assert read == [slice(128, 150)]
    assert np.array_equal(kept.stored, pixels.transpose(0, 3, 1, 2))


def test_images_that_are_not_bytes_are_refused(photos, tmp_path):
    photos.transform = lambda x: resize(16)(x) / 255
    with pytest.raises(ValueError, match='expected a transform that keeps uint8 images, got torch.float32'):
        decoded(photos, tmp_path / 'cache')


def test_cached_images_belong_to_a_list_and_a_size(photos, tmp_path):
    folder = tmp_path / 'cache'
    for data, size in ((photos, 16), (photos, 16), (photos, 17), (photos.subset(range(10)), 16)):
        decoded(data, folder, size)
    assert len(stored(folder)) == 3


def test_a_replaced_file_is_decoded_again(photos, tmp_path):
    "Every file counts, not only the eight that the transform is tried on"
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
