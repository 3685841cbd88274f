"Archives become features: nothing is lost, nothing is read twice, and what is broken is named"
import io
import json
import tarfile

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
    'no image': (dict(json=b'[]'), '0099: has no image: expected jpg, jpeg, png, .*got json'),
    'no labels': (None, '0099: has no labels: expected a file json, txt, cls, got png'),
    'unknown label': (b'["zebra"]', "0099: has the label 'zebra'; there are"),
    'number too high': (b'[20]', '0099: has the label 20; there are'),
    'no list': (b'"dog"', '0099: has labels of another form: expected a list, got str'),
    'no JSON': (b'{', '0099: Expecting property name'),
}


@pytest.mark.parametrize('case', BROKEN)
def test_a_broken_sample_is_left_out_and_named(streamed, pictures, tmp_path, case):
    parts, message = BROKEN[case]
    if not isinstance(parts, dict): parts = dict(png=png(pictures.image(0))) | (dict(json=parts) if parts else {})
    data = streamed([write(tmp_path / 'c.tar', [*samples(pictures, range(3)), ('0099', parts)])])
    assert len(data) == 3
    with pytest.raises(BadDataError, match=message): raise BadDataError(data.skipped)
    assert data.notes[0].startswith('left out of the stream: 1 of 4 images, ')


def test_a_stream_without_an_image_is_an_error(streamed, tmp_path):
    shard = write(tmp_path / 'c.tar', [('0001', dict(json=b'[]'))])
    with pytest.raises(BadDataError, match='c.tar: 0001: has no image'): streamed([shard])


def test_a_test_set_takes_the_groups_of_the_training(streamed, shards):
    train = streamed(shards[:1])
    assert streamed(shards[1:], groups=train.groups).groups.keys() == train.groups.keys()


def test_braces_stand_for_several_shards(streamed, shards, tmp_path):
    assert len(streamed(f'{tmp_path}/{{a,b}}.tar')) == 48
    assert len(streamed(shards[0])) == 30


def test_no_shard_at_all_is_an_error(streamed):
    with pytest.raises(ValueError, match='expected at least one shard, got none'): streamed([])


def test_a_shard_that_is_not_there_is_an_error_that_names_it(streamed, tmp_path):
    with pytest.raises(FileNotFoundError, match='missing.tar'): streamed(tmp_path / 'missing.tar')
