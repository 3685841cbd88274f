"Archives become features: nothing is lost, nothing is read twice, and what is broken is named"
import gzip
import io
import json
import resource
import subprocess
import tarfile
import warnings
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from PIL import Image
from toys import picture_model

import cprfl.train.stream as stream
from cprfl.data.images import BadDataError
from cprfl.train.cache import cache_features
from cprfl.train.stream import stream_features

pytest.importorskip('webdataset', reason='needs the extra `stream`')


def png(image):
    out = io.BytesIO()
    Image.fromarray(image.permute(1, 2, 0).numpy()).save(out, 'png')
    return out.getvalue()


def write(file, samples):
    "An archive of (key, {ending: bytes})"
    with tarfile.open(file, 'w') as archive:
        for key, parts in samples:
            for ending, content in parts.items():
                info = tarfile.TarInfo(f'{key}.{ending}')
                info.size = len(content)
                archive.addfile(info, io.BytesIO(content))
    return file


def samples(data, rows):
    return [(f'{i:04d}', dict(png=png(data.image(i)), json=json.dumps(data.labels(i)).encode())) for i in rows]


@pytest.fixture
def backbone(): return picture_model().backbone.eval()


@pytest.fixture
def shards(pictures, tmp_path):
    parts = dict(a=range(30), b=range(30, 48))
    return [write(tmp_path / f'{name}.tar', samples(pictures, rows)) for name, rows in parts.items()]


@pytest.fixture
def streamed(backbone, pictures, tmp_path):
    def run(shards, **kw):
        settings = dict(size=32, device='cpu', precision='fp32', progress=False) | kw
        return stream_features(backbone, shards, pictures.classes, tmp_path / 'features', **settings)
    return run


def values(data): return torch.stack([data[i][0] for i in range(len(data))])


@pytest.mark.parametrize('pooled', [True, False])
def test_features_are_those_of_the_same_images_on_disk(streamed, shards, backbone, pictures, tmp_path, pooled):
    data = streamed(shards, pooled=pooled)
    pictures.transform = stream.resize(32)
    cached = cache_features(backbone, pictures, tmp_path / 'cache', 32, precision='fp32', pooled=pooled, progress=False)
    pictures.transform = None
    assert torch.allclose(values(data).float(), values(cached).float(), atol=5e-3)


def test_labels_and_names_are_those_of_the_samples(streamed, shards, pictures):
    data = streamed(shards)
    assert np.array_equal(data.targets, pictures.targets)
    assert data.paths[30] == f'{shards[1]}: 0030'


def test_what_is_there_is_not_read_again(streamed, shards, monkeypatch):
    first = values(streamed(shards))
    monkeypatch.setattr(stream, '_samples', lambda shard: pytest.fail(f'{shard} is read again'))
    assert torch.equal(values(streamed(shards)), first)


def test_a_stream_that_broke_off_goes_on_with_the_next_shard(streamed, shards, monkeypatch):
    real, read = stream._samples, []

    def breaks(shard):
        read.append(shard)
        if shard == str(shards[1]) and read.count(shard) == 1: raise ConnectionError('gone')
        return real(shard)

    monkeypatch.setattr(stream, '_samples', breaks)
    with pytest.raises(ConnectionError, match='gone'): streamed(shards)
    assert len(streamed(shards)) == 48
    assert read == [str(shards[i]) for i in (0, 1, 1)]


def test_a_shard_that_changed_is_read_again(streamed, shards, pictures):
    before = len(streamed(shards))
    write(shards[1], samples(pictures, range(30, 40)))
    assert (before, len(streamed(shards))) == (48, 40)


def test_another_network_has_features_of_its_own(streamed, shards, backbone):
    before = values(streamed(shards))
    with torch.no_grad(): next(backbone.parameters()).mul_(2)
    assert not torch.equal(values(streamed(shards)), before)


BROKEN = {
    'truncated': (dict(png=b'\x89PNG\r\n', json=b'[]'), '0099: image is truncated or broken'),
    'no image': (dict(json=b'[]'), '0099: has no image: expected jpg, jpeg, .*got json'),
    'no labels': (None, '0099: has no labels: expected a file json, txt, cls, got none'),
    'unknown label': (b'["zebra"]', "0099: has the label 'zebra'; there are"),
    'number too high': (b'[20]', '0099: has the label 20; there are'),
    'no list': (b'"dog"', '0099: has labels of another form: expected a list, got str'),
    'no JSON': (b'{', '0099: has a file json that cannot be read: Expecting property name'),
    'deep JSON': (b'[' * 60_000, '0099: has a file json that cannot be read: .*recursion'),
    'no numbers': (dict(cls=b'dog'), '0099: has a file cls that cannot be read: invalid literal'),
    'JSON of other things': (b'{"width": 640}', '0099: has no labels: expected a file .*, got json without labels'),
    'long JSON': (b'["dog"]' + bytes(2**16), '0099: has a file json that is not kept: expected UTF-8 of at most 64 kB'),
    'no text': (dict(txt=b'chien \xe9'), '0099: has a file txt that is not kept'),
    'long label': (json.dumps(['x' * 9999]).encode(), r"0099: has the label 'x+\.\.\.x+'; there are"),
    'two images': (dict(tif=b'', json=b'[]'), '0099: has more than one image: png, tif'),
    'true and false': (b'[true, "dog"]', '0099: has the label True; there are'),
}


@pytest.mark.parametrize('case', BROKEN)
def test_a_broken_sample_is_left_out_and_named(streamed, pictures, tmp_path, case):
    parts, message = BROKEN[case]
    if isinstance(parts, bytes): parts = dict(json=parts)
    if case not in ('truncated', 'no image'): parts = dict(png=png(pictures.image(0))) | (parts or {})
    data = streamed([write(tmp_path / 'c.tar', [*samples(pictures, range(3)), ('0099', parts)])])
    assert len(data) == 3
    with pytest.raises(BadDataError, match=message): raise BadDataError(data.skipped)
    assert data.notes[0].startswith('left out of the stream: 1 of 4 images, ')


def test_a_stream_without_an_image_is_an_error(streamed, tmp_path):
    shard = write(tmp_path / 'c.tar', [('0001', dict(json=b'[]'))])
    with pytest.raises(BadDataError, match='c.tar: 0001: has no image'): streamed([shard])


def test_a_test_set_takes_the_groups_of_the_training(streamed, shards):
    train = streamed(shards[:1], groups=dict(head=range(5), tail=range(5, 20)))
    test = streamed(shards[1:], groups=train.groups)
    assert {name: list(ids) for name, ids in test.groups.items()} == dict(head=[*range(5)], tail=[*range(5, 20)])
    assert list(streamed(shards[1:]).groups['tail']) != [*range(5, 20)]


def test_braces_stand_for_several_shards(streamed, shards, tmp_path):
    assert len(streamed(f'{tmp_path}/{{a,b}}.tar')) == 48
    assert len(streamed(shards[0])) == 30


def test_no_shard_at_all_is_an_error(streamed):
    with pytest.raises(ValueError, match='shards: expected at least one shard, got none'): streamed([])


def test_a_shard_that_is_not_there_is_an_error_that_names_it(streamed, tmp_path):
    with pytest.raises(FileNotFoundError, match='missing.tar'): streamed(tmp_path / 'missing.tar')


# ---- archives that are not whole

def cut(file, size):
    file.write_bytes(file.read_bytes()[:size])
    return file


@pytest.mark.parametrize('left', [0.5, 0.9])
def test_an_archive_that_is_cut_short_is_an_error(streamed, shards, left):
    cut(shards[0], int(left * shards[0].stat().st_size))
    with pytest.raises(OSError, match=r'shard .*a.tar is not whole \(\d+ images read\): '): streamed(shards)


def test_an_archive_that_is_cut_between_images_is_an_error(streamed, shards):
    with tarfile.open(shards[0]) as archive: end = archive.getmembers()[10].offset
    cut(shards[0], end)
    with pytest.raises(OSError, match=r'not whole \(4 images read\): no mark of its end'): streamed(shards)


def test_a_damaged_header_is_not_the_end_of_an_archive(streamed, shards):
    with tarfile.open(shards[0]) as archive: at = archive.getmembers()[10].offset
    content = bytearray(shards[0].read_bytes())
    content[at:at + 100] = b'x' * 100
    shards[0].write_bytes(content)
    with pytest.raises(OSError, match=r'not whole \(4 images read\): no mark of its end, bad'): streamed(shards)


def test_two_archives_in_one_file_are_an_error(streamed, shards):
    shards[0].write_bytes(shards[0].read_bytes() + shards[1].read_bytes())
    with pytest.raises(OSError, match=r'\(30 images read\): more follows the mark of its end'): streamed(shards[0])


@pytest.mark.parametrize('command, why', [
    ('head -c 30720 {}', 'unexpected end of data'),
    ('cat {}; exit 7', 'its command ended with status 7'),
    ('cat {} | head -c 30720; exit 7', 'its command ended with status 7'),
    ('exit 127 {}', 'its command ended with status')])
def test_a_command_that_fails_is_an_error(streamed, shards, command, why):
    with pytest.raises(OSError, match=rf'shard pipe:a.tar \(\w+\) is not whole \(\d+ images read\): {why}'):
        streamed(f'pipe:{command.format(shards[0])}')


def test_nothing_is_stored_of_an_archive_that_is_cut_short(streamed, shards, tmp_path):
    cut(shards[0], 30720)
    with pytest.raises(OSError, match='not whole'): streamed(shards)
    assert {file.suffix for file in (tmp_path / 'features').iterdir()} == {'.lock'}


@pytest.mark.parametrize('content, what', [
    (b'', 'is not whole .0 images read.: '), (b'<html>' * 100, 'is no archive: ')])
def test_what_is_no_archive_is_an_error(streamed, tmp_path, content, what):
    (tmp_path / 'c.tar').write_bytes(content)
    with pytest.raises(OSError, match=f'c.tar {what}'): streamed(tmp_path / 'c.tar')


def test_an_empty_archive_is_an_error(streamed, tmp_path):
    with pytest.raises(OSError, match='c.tar holds no image'): streamed(write(tmp_path / 'c.tar', []))


@pytest.mark.parametrize('kind', ['gz', 'bz2', 'xz'])
def test_a_compressed_archive_is_read(streamed, shards, tmp_path, kind):
    with tarfile.open(tmp_path / 'c.tar', f'w:{kind}') as packed, tarfile.open(shards[0]) as plain:
        for member in plain: packed.addfile(member, plain.extractfile(member))
    assert len(streamed(tmp_path / 'c.tar')) == 30


@pytest.mark.parametrize('at', [-8, -4])
def test_a_wrong_checksum_of_gzip_is_an_error(streamed, shards, tmp_path, at):
    content = bytearray(gzip.compress(shards[0].read_bytes()))
    content[at] ^= 1
    (tmp_path / 'c.tgz').write_bytes(content)
    with pytest.raises(OSError, match=r'c.tgz is not whole \(30 images read\): '): streamed(tmp_path / 'c.tgz')


def test_a_command_is_read_like_its_file(streamed, shards):
    assert torch.equal(values(streamed(f'pipe:cat {shards[0]}')), values(streamed(shards[0])))


# ---- labels

def label_test(pictures, tmp_path, **parts):
    parts = {ending: content.encode() for ending, content in parts.items()}
    return write(tmp_path / 'c.tar', [('0000', dict(png=png(pictures.image(0))) | parts)])


def test_another_reader_of_labels_is_asked_at_once(streamed, shards, pictures):
    streamed(shards)
    data = streamed(shards, read_labels=lambda sample: pictures.classes[:1])
    assert data.targets.sum(0)[0] == 48


def test_other_classes_need_no_new_features(backbone, streamed, shards, pictures, tmp_path, monkeypatch):
    streamed(shards)
    monkeypatch.setattr(stream, '_samples', lambda shard: pytest.fail(f'{shard} is read again'))
    data = stream_features(backbone, shards, pictures.classes[::-1], tmp_path / 'features', 32, precision='fp32',
                           device='cpu', progress=False)
    assert np.array_equal(data.targets, pictures.targets[:, ::-1])


def test_labels_that_are_mended_bring_the_image_back(streamed, shards, pictures):
    with pytest.raises(BadDataError, match='zebra'): streamed(shards, read_labels=lambda sample: ['zebra'])
    assert len(streamed(shards)) == 48


def test_rows_are_those_of_the_images_with_labels(streamed, shards):
    whole = values(streamed(shards))
    def every_third(sample): return [0] if int(sample['__key__']) % 3 == 0 else ['zebra']
    assert torch.equal(values(streamed(shards, read_labels=every_third)), whole[::3])


def test_short_texts_are_kept_and_the_others_named(streamed, pictures, tmp_path):
    parts = dict(png=png(pictures.image(0)), a='\xe9'.encode(), b=bytes(2**16), c=bytes(2**16 + 1), d=b'\xff')
    seen = []
    streamed(write(tmp_path / 'c.tar', [('0000', parts)]), read_labels=lambda sample: seen.append(sample) or [])
    assert [seen[0]['a'], seen[0]['b']] == [parts['a'], parts['b']]
    assert seen[0]['__not_kept__'] == ['c', 'd']


def test_a_long_error_of_a_reader_is_cut(streamed, pictures, tmp_path):
    shard = write(tmp_path / 'c.tar', samples(pictures, range(2)))
    def fails(sample): return [] if sample['__key__'] == '0000' else sample['x' * 9999]
    assert len(streamed(shard, read_labels=fails).skipped[0].message) < 310


def test_an_error_in_a_reader_of_labels_names_the_sample(streamed, shards):
    with pytest.raises(BadDataError, match=r"b.tar: 0030: read_labels: KeyError: 'tags'"):
        streamed(shards[1], read_labels=lambda sample: sample['tags'])


def test_a_dict_without_labels_leaves_them_to_the_next_file(streamed, pictures, tmp_path):
    data = streamed(label_test(pictures, tmp_path, json='{"width": 640}', cls='3'))
    assert np.flatnonzero(data.targets[0]).tolist() == [3]


@pytest.mark.parametrize('labels', ['[0, 1]', '[1, 0]', '[false, true]', '[1, 1]'])
def test_zeros_and_ones_for_all_classes_stop_the_stream(backbone, pictures, tmp_path, labels):
    shard = label_test(pictures, tmp_path, json=labels)
    with pytest.raises(ValueError, match='c.tar: 0000 has the labels .* for 2 classes, .*give a read_labels'):
        stream_features(backbone, shard, ['cat', 'dog'], tmp_path / 'f', 32, device='cpu', progress=False)


@pytest.mark.parametrize('label, place', [(2, 0), (5, 1), (7, 2), ('7', 2)])
def test_a_number_is_a_name_where_names_are_numbers(label, place):
    classes = ['2', '5', '7']
    assert np.flatnonzero(stream._target([label], classes, stream._known(classes))).tolist() == [place]


@pytest.mark.parametrize('label', [0, 1, True, 2.0, None, [2]])
def test_a_number_is_no_place_where_names_are_numbers(label):
    classes = ['2', '5', '7']
    with pytest.raises(ValueError, match='has the label .*; there are 2, 5, 7'):
        stream._target([label], classes, stream._known(classes))


# ---- what is not to be stored

def test_features_beyond_float16_are_an_error(streamed, shards, backbone, tmp_path):
    with torch.no_grad():
        for weights in backbone.parameters(): weights.mul_(1e4)
    with pytest.raises(ValueError, match=r'the features of .*a.tar: 0000 are not finite'): streamed(shards)
    assert not [*(tmp_path / 'features').glob('*.json')]


def test_too_little_memory_is_no_property_of_an_image(streamed, shards, monkeypatch):
    def fails(im, f): raise MemoryError
    with monkeypatch.context() as patch:
        patch.setattr('cprfl.data.images._to_rgb', fails)
        with pytest.raises(MemoryError, match='a.tar: 0000: image needs more memory'): streamed(shards)
    assert len(streamed(shards)) == 48


def test_two_images_of_one_name_are_left_out_and_named(streamed, pictures, tmp_path):
    three = samples(pictures, [0, 1, 1, 2])
    assert [str(p) for p in streamed(write(tmp_path / 'c.tar', three)).skipped] == [
        f'{tmp_path}/c.tar: 0001: has more than one file json']


def test_a_remark_on_an_image_names_it(streamed, tmp_path):
    dark = io.BytesIO()
    Image.fromarray(np.arange(256, dtype=np.uint16).reshape(16, 16) + 1).save(dark, 'png')
    shard = write(tmp_path / 'c.tar', [('0000', dict(png=dark.getvalue(), cls=b'3'))])
    with pytest.warns(UserWarning, match='c.tar: 0000: its brightest pixel'): streamed(shard)


@pytest.mark.parametrize('ending', ['JPG', 'jfif', 'apng'])
def test_all_endings_of_images_are_known(streamed, pictures, tmp_path, ending):
    assert len(streamed(write(tmp_path / 'c.tar', [('0000', {ending: png(pictures.image(0)), 'cls': b'3'})]))) == 1


# ---- damage

def zero(file): file.write_bytes(file.read_bytes()[:128] + bytes(file.stat().st_size - 128))


DAMAGE = {
    'zeroed features': ('npy', lambda file: zero(file)),
    'short features': ('npy', lambda file: cut(file, 500)),
    'empty features': ('npy', lambda file: cut(file, 0)),
    'no features': ('npy', lambda file: file.unlink()),
    'empty record': ('json', lambda file: cut(file, 0)),
    'record of nothing': ('json', lambda file: file.write_text('{}')),
    'another record': ('json', lambda file: file.write_text(file.read_text().replace('0000', '9999')))}


@pytest.mark.parametrize('case', DAMAGE)
def test_a_damaged_shard_is_computed_again(streamed, shards, tmp_path, case):
    first = values(streamed(shards[0]))
    suffix, damage = DAMAGE[case]
    damage(next((tmp_path / 'features').glob(f'*.{suffix}')))
    with pytest.warns(UserWarning, match='is damaged .*a.tar'): again = streamed(shards[0])
    assert torch.equal(values(again), first)


def test_a_shard_without_a_record_is_computed_in_silence(streamed, shards, tmp_path, recwarn):
    streamed(shards[0])
    next((tmp_path / 'features').glob('*.json')).unlink()
    streamed(shards[0])
    assert not [w for w in recwarn if 'damaged' in str(w.message)]


def test_a_refresh_that_fails_leaves_what_was_there(streamed, shards):
    command = f'pipe:cat {shards[0]}'
    first = values(streamed(command))
    shards[0].rename(shards[0].with_suffix('.gone'))
    with pytest.raises(OSError, match='its command ended with status 1'): streamed(command, refresh=True)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        assert torch.equal(values(streamed(command)), first)


# ---- many shards, and several processes

def test_more_shards_than_open_files(streamed, pictures, tmp_path):
    before, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    one = samples(pictures, [0])
    many = [write(tmp_path / f'{i:03d}.tar', one) for i in range(120)]
    resource.setrlimit(resource.RLIMIT_NOFILE, (100, most))
    try: data = streamed(many)
    finally: resource.setrlimit(resource.RLIMIT_NOFILE, (before, most))
    assert torch.equal(data[119][0], data[0][0])


def test_two_at_once_read_each_shard_once(streamed, shards, monkeypatch):
    real, read = stream._samples, []
    monkeypatch.setattr(stream, '_samples', lambda shard: read.append(shard) or real(shard))
    with ThreadPoolExecutor(2) as pool: both = list(pool.map(streamed, [shards, shards]))
    assert (len(both[0]), len(both[1]), sorted(read)) == (48, 48, [*map(str, shards)])


def test_nothing_is_left_of_a_process_that_was_killed(streamed, shards, tmp_path):
    from cprfl.files import _part_name
    (tmp_path / 'features').mkdir()
    left = tmp_path / 'features' / _part_name('0-stream.npy', 2**22 + 1)
    left.touch()
    streamed(shards[0])
    assert not left.exists()


# ---- what can be said at once

WRONG = {
    'size': (dict(size=0), 'size: expected at least 1, got 0'),
    'batch': (dict(batch_size=0), 'batch_size: expected at least 1, got 0'),
    'half a batch': (dict(batch_size=2.5), 'batch_size: expected a whole number, got 2.5'),
    'workers': (dict(num_workers=0), 'num_workers: expected at least 1, got 0'),
    'groups': (dict(groups=dict(tail=[99])), 'tail'),
    'one name': (dict(classes='dog'), "classes: expected a list of names, got 'dog'"),
    'no names': (dict(classes=[]), r'classes: expected a list of names, got \[\]'),
    'twice': (dict(classes=['dog', 'dog']), "classes: expected different names, got 'dog' more than once"),
}


@pytest.mark.parametrize('case', WRONG)
def test_wrong_settings_are_told_before_reading(backbone, shards, pictures, tmp_path, monkeypatch, case):
    monkeypatch.setattr(stream, '_samples', lambda shard: pytest.fail(f'{shard} is read'))
    wrong, message = WRONG[case]
    settings = dict(classes=pictures.classes, device='cpu', progress=False) | wrong
    with pytest.raises(ValueError, match=message):
        stream_features(backbone, shards, folder=tmp_path / 'features', **settings)
    assert not (tmp_path / 'features').exists()


def test_a_second_file_that_is_missing_is_told_before_reading(streamed, shards, monkeypatch):
    monkeypatch.setattr(stream, '_samples', lambda shard: pytest.fail(f'{shard} is read'))
    with pytest.raises(FileNotFoundError, match='gone.tar is missing'): streamed([shards[0], 'gone.tar'])


def test_a_folder_is_no_archive(streamed, shards, tmp_path):
    with pytest.raises(IsADirectoryError, match='expected archives, got the folder'): streamed([shards[0], tmp_path])


@pytest.mark.parametrize('address, message', [
    ('htp://me:SECRET@a.org/b.tar', 'expected a file or an address with pipe, http, .*, got htp://a.org/b.tar'),
    ('htp://me:SECRET@a.org/{a,b}.tar', 'expected a file or an address with .*, got htp://a.org/a.tar'),
    ('me:SECRET@a.org/b.tar', 'expected a file or an address with .*, got me://a.org/b.tar'),
    ('https://me:SECRET@a.org/{a.tar', 'expected pairs of braces, got https://a.org/{a.tar')])
def test_a_wrong_address_is_told_without_its_password(streamed, shards, monkeypatch, address, message):
    monkeypatch.setattr(stream, '_samples', lambda shard: pytest.fail(f'{shard} is read'))
    with pytest.raises(ValueError, match=f'shards: {message}') as error: streamed([shards[0], address])
    assert 'SECRET' not in str(error.value)


def test_a_shard_that_is_given_twice_is_an_error(streamed, shards, tmp_path):
    (tmp_path / 'link.tar').symlink_to(shards[0])
    with pytest.raises(ValueError, match='expected different archives, got .*link.tar more than once'):
        streamed([*shards, tmp_path / 'link.tar'])


def test_labels_that_never_fit_are_told_after_the_first_shard(streamed, shards, monkeypatch):
    real, read = stream._samples, []
    monkeypatch.setattr(stream, '_samples', lambda shard: read.append(shard) or real(shard))
    with pytest.raises(BadDataError, match='zebra'): streamed(shards, read_labels=lambda sample: ['zebra'])
    assert read == [str(shards[0])]


# ---- commands and addresses

def test_refresh_reads_a_command_again(streamed, shards, pictures):
    command = f'pipe:cat {shards[0]}'
    streamed(command)
    write(shards[0], samples(pictures, range(5)))
    assert (len(streamed(command)), len(streamed(command, refresh=True)), len(streamed(command))) == (30, 5, 5)


def test_a_password_in_a_command_is_written_nowhere(streamed, shards, tmp_path):
    data = streamed(f"pipe:echo 'Authorization: Bearer SECRET' >/dev/null; cat {shards[0]}")
    written = b''.join(file.read_bytes() for file in (tmp_path / 'features').iterdir())
    assert b'SECRET' not in written + ''.join(data.paths).encode()


def test_a_password_in_a_command_is_not_in_its_error(streamed):
    with pytest.raises(OSError, match='status 3') as error: streamed('pipe:echo SECRET >/dev/null; exit 3')
    assert 'SECRET' not in str(error.value)


def test_a_command_ends_if_the_backbone_fails(streamed, shards, backbone, monkeypatch):
    started, start = [], subprocess.Popen.__init__

    def remembered(process, *args, **kw):
        started.append(process)
        start(process, *args, **kw)

    def fails(images): raise RuntimeError('no luck')

    monkeypatch.setattr(subprocess.Popen, '__init__', remembered)
    monkeypatch.setattr(backbone, 'patches', fails)
    with pytest.raises(RuntimeError, match='no luck'): streamed(f'pipe:cat {shards[0]}', batch_size=8)
    assert [process.returncode is None for process in started] == [False]


def test_an_address_without_a_password_is_its_own_name():
    assert stream._label('https://a.org:8080/B/b.tar') == 'https://a.org:8080/B/b.tar'


@pytest.mark.parametrize('address', ['https://me:SECRET@a.org/b.tar', 'https://a.org/b.tar?key=SECRET'])
def test_a_password_in_an_address_is_not_in_its_name(address):
    assert stream._label(address).startswith('https://a.org/b.tar (')


def test_without_the_extra_braces_say_what_to_install(streamed, monkeypatch):
    monkeypatch.setitem(__import__('sys').modules, 'braceexpand', None)
    with pytest.raises(ImportError, match=r'pip install "cprfl\[stream\]"'): streamed('{0..2}.tar')


def test_a_backbone_without_parameters_has_features(shards, pictures, tmp_path):
    class Pixels(torch.nn.Module):
        def patches(self, images): return images.float().flatten(2).transpose(1, 2)

    data = stream_features(Pixels(), shards, pictures.classes, tmp_path / 'f', 8, device='cpu', progress=False)
    assert data.features.shape == (1, 48, 1, 3)
