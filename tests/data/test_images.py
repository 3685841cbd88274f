"Decoding, broken files, and paths that must not be followed"
import warnings

import numpy as np
import pytest
import torch
from pictures import noise
from PIL import Image

from cprfl.data.dataset import read_image
from cprfl.data.images import BadDataError, image_problem, path_problem

# ---- decoding

GREY = np.arange(48, dtype=np.uint8).reshape(6, 8) * 5
WIDE = GREY.astype(np.uint16) * 257


@pytest.mark.parametrize('name, image, slack', [
    ('L.png', Image.fromarray(GREY), 0),
    ('P.png', Image.fromarray(GREY).convert('P'), 1),
    ('1.png', Image.fromarray(GREY).convert('1'), 255),
    ('LA.png', Image.fromarray(GREY).convert('LA'), 0),
    ('RGBA.png', Image.fromarray(GREY).convert('RGBA'), 0),
    ('CMYK.jpg', Image.fromarray(GREY).convert('CMYK'), 8),
    ('16.png', Image.fromarray(WIDE), 0),
    ('16.tif', Image.fromarray(WIDE), 0),
    ('I.tif', Image.fromarray(WIDE.astype(np.int32)), 0),
    ('p.gif', Image.fromarray(GREY).convert('P'), 1)])
def test_every_mode_becomes_uint8_rgb(tmp_path, name, image, slack):
    image.save(tmp_path/name)
    x = read_image(tmp_path/name)
    assert x.dtype == torch.uint8
    assert x.shape == (3, 6, 8)
    assert x.is_contiguous()
    assert np.abs(x[1].numpy().astype(int) - GREY).max() <= slack


def test_transparent_palette_decodes_without_a_warning(tmp_path):
    im = Image.new('P', (4, 4), 1)
    im.putpalette([0, 0, 0, 10, 20, 30] + [0] * 762)
    im.save(tmp_path/'t.png', transparency=bytes([0, 255]))
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        assert read_image(tmp_path/'t.png')[:, 0, 0].tolist() == [10, 20, 30]


@pytest.fixture
def half_white():
    "The left half white, the right half black"
    pixels = np.zeros((8, 16, 3), np.uint8)
    pixels[:, :8] = 255
    return Image.fromarray(pixels)


def test_exif_orientation_is_applied(tmp_path, half_white):
    exif = Image.Exif()
    exif[0x0112] = 6
    half_white.save(tmp_path/'turned.jpg', exif=exif, quality=100)
    x = read_image(tmp_path/'turned.jpg')
    assert x.shape == (3, 16, 8)
    assert x[:, :6].min() > 200
    assert x[:, 10:].max() < 50


@pytest.mark.filterwarnings('ignore:Corrupt EXIF')
def test_broken_exif_is_ignored(tmp_path, half_white):
    half_white.save(tmp_path/'odd.jpg', exif=b'Exif\0\0II*\0\xff\xff\xff\xffjunk')
    assert read_image(tmp_path/'odd.jpg').shape == (3, 8, 16)


@pytest.mark.filterwarnings('ignore::PIL.Image.DecompressionBombWarning')
@pytest.mark.parametrize('side', [12, 40])
def test_decompression_bombs_are_refused_by_name(tmp_path, monkeypatch, side):
    Image.new('RGB', (side, side)).save(tmp_path/'bomb.png')
    monkeypatch.setattr(Image, 'MAX_IMAGE_PIXELS', 100)
    with pytest.raises(BadDataError, match='bomb.png: image is refused'): read_image(tmp_path/'bomb.png')
    assert 'refused' in image_problem(tmp_path/'bomb.png', 'headers')


# ---- broken files

BROKEN = pytest.mark.parametrize('name, why', [
    ('half.jpg', 'truncated'), ('half.png', 'truncated'), ('fake.jpg', 'broken'), ('none.jpg', 'is missing')])


@BROKEN
def test_a_bad_image_is_named(root, name, why):
    with pytest.raises(BadDataError, match=f'{name}: image .*{why}'): read_image(root/name)


@BROKEN
@pytest.mark.parametrize('check', ['headers', 'full'])
def test_a_bad_image_is_found(root, name, why, check): assert why in image_problem(root/name, check)


@BROKEN
def test_weaker_checks_find_less(root, name, why):
    assert image_problem(root/name, 'none') is None
    assert (image_problem(root/name, 'exists') is None) == (name != 'none.jpg')


def test_only_a_thumbnail_ends_well(tmp_path):
    "A JPEG cut behind the thumbnail in its EXIF still holds an end marker"
    thumb = tmp_path/'thumb.jpg'
    Image.fromarray(noise(1, 16)).save(thumb)
    Image.fromarray(noise(2)).save(tmp_path/'photo.jpg', exif=b'Exif\0\0' + thumb.read_bytes())
    whole = (tmp_path/'photo.jpg').read_bytes()
    assert whole.index(b'\xff\xd9') < len(whole) // 2
    assert image_problem(tmp_path/'photo.jpg') is None
    (tmp_path/'photo.jpg').write_bytes(whole[:-400])
    assert 'truncated' in image_problem(tmp_path/'photo.jpg')


def test_a_full_check_finds_a_broken_png_chunk(root):
    raw = bytearray((root/'e.png').read_bytes())
    at = raw.index(b'IDAT') + 40
    raw[at:at + 20] = bytes(20)
    (root/'e.png').write_bytes(raw)
    assert image_problem(root/'e.png', 'headers') is None
    assert 'broken' in image_problem(root/'e.png', 'full')


def test_other_formats_are_decoded(tmp_path):
    file = tmp_path/'a.bmp'
    Image.fromarray(noise()).save(file)
    assert image_problem(file) is None
    file.write_bytes(file.read_bytes()[:-500])
    assert 'truncated' in image_problem(file)


# ---- paths

LEADS_OUT = ['..', '../x', 'a/../../x', '/x', '\\x', 'C:\\x', 'C:/x', '..\\x', '\\\\host\\x', 'a\0b']
STAYS_INSIDE = ['x', './x', 'a/b/x', 'a/../x', '..x/y', 'x..jpg']


@pytest.mark.parametrize('path', LEADS_OUT)
def test_paths_that_lead_out_are_refused(root, path): assert path_problem(path, root)


@pytest.mark.parametrize('path', STAYS_INSIDE)
def test_paths_that_stay_inside_are_followed(root, path): assert path_problem(path, root) is None
