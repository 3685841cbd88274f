"Which files are opened, what of them, and the bounds that hold before anything is decoded"
import io
import os
import re
import struct
import zlib

import numpy as np
import pytest
from mutants import mutants
from pictures import noise, png_chunks
from PIL import Image

from cprfl.data.dataset import from_folder, from_list
from cprfl.data.images import IMAGE_SUFFIXES, BadDataError, check_images, image_problem, open_image


def whole(form, size=16, frames=False, **kw):
    "The bytes of an image of noise; with `frames` three black ones follow"
    if frames: kw |= dict(save_all=True, append_images=[Image.new('RGB', (size, size)) for _ in range(3)])
    Image.fromarray(noise(size=size)).save(file := io.BytesIO(), form, **kw)
    return file.getvalue()


# ---- what is opened

FRAMES = dict(frames=True)
OPENED = {'a.jpg': ('JPEG', {}), 'a.png': ('PNG', {}), 'a.tif': ('TIFF', {}), 'a.bmp': ('BMP', {}),
          'a.webp': ('WEBP', dict(lossless=True)), 'a.gif': ('GIF', {}), 'pages.tif': ('TIFF', FRAMES),
          'frames.png': ('PNG', FRAMES), 'frames.webp': ('WEBP', FRAMES | dict(lossless=True)),
          'frames.gif': ('GIF', FRAMES), 'phone.jpg': ('MPO', FRAMES), 'a.mpo': ('MPO', FRAMES)}


@pytest.mark.parametrize('check', ['headers', 'full'])
@pytest.mark.parametrize('name', OPENED)
def test_a_format_is_read(tmp_path, name, check):
    form, kw = OPENED[name]
    (tmp_path/name).write_bytes(whole(form, **kw))
    assert image_problem(tmp_path/name, check) is None


@pytest.mark.parametrize('name', OPENED)
def test_the_first_of_several_pictures_counts(tmp_path, name):
    form, kw = OPENED[name]
    (tmp_path/name).write_bytes(whole(form, **kw))
    error = np.asarray(open_image(tmp_path/name)).astype(int) - noise(size=16)
    assert np.abs(error).mean() < (60 if form in ('JPEG', 'MPO', 'GIF') else 1e-9) # noise is hard to compress


@pytest.mark.parametrize('form', ['JPEG', 'PNG', 'TIFF', 'BMP', 'WEBP', 'GIF'])
def test_the_name_of_a_file_does_not_matter(tmp_path, form):
    for name in ('a.jpg', 'a.png', 'a', 'a.txt'):
        (tmp_path/name).write_bytes(whole(form))
        assert open_image(tmp_path/name).size == (16, 16)


@pytest.mark.parametrize('form', ['JPEG', 'PNG', 'TIFF', 'WEBP', 'MPO'])
@pytest.mark.parametrize('orientation', range(1, 9))
def test_every_orientation_in_every_format(tmp_path, form, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    corner = np.zeros((16, 32, 3), np.uint8)
    corner[:8, :16] = 255 # white, upper left
    turned = {1: None, 2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}[orientation] # how a camera stores it
    stored = Image.fromarray(corner) if turned is None else Image.fromarray(corner).transpose(turned)
    more = dict(save_all=True, append_images=[stored]) if form == 'MPO' else {}
    stored.save(tmp_path/'a.img', form, exif=exif, **more)
    x = np.asarray(open_image(tmp_path/'a.img'))
    assert x.shape == corner.shape
    assert np.abs(x.astype(int) - corner).max() < 40


@pytest.mark.parametrize('wide', [np.uint16, np.int32, np.float32])
def test_orientation_of_wide_values(tmp_path, wide):
    exif = Image.Exif()
    exif[0x0112] = 6
    values = np.linspace(0, 255, 32).reshape(4, 8) / (255 if wide is np.float32 else 1)
    Image.fromarray(values.astype(wide)).save(tmp_path/'a.tif', exif=exif)
    assert open_image(tmp_path/'a.tif').size == (4, 8)


# ---- what is not

HEADS = {
    'EPS': b'%!PS-Adobe-3.0 EPSF-3.0\n', 'PSD': b'8BPS\0\1', 'HEIC': b'\0\0\0\x18ftypheic',
    'AVIF': b'\0\0\0\x1cftypavif', 'SVG': b'<svg xmlns="http://www.w3.org/2000/svg">', 'PDF': b'%PDF-1.7',
    'HTML': b'<!doctype html>', 'DICOM': bytes(128) + b'DICM', 'JPEG 2000': b'\0\0\0\x0cjP  \r\n\x87\n',
    'Git LFS': b'version https://git-lfs'}


@pytest.mark.parametrize('check', ['headers', 'full'])
@pytest.mark.parametrize('kind', HEADS)
def test_other_formats_are_named(tmp_path, kind, check):
    (tmp_path/'a.jpg').write_bytes(HEADS[kind] + bytes(500))
    problem = image_problem(tmp_path/'a.jpg', check)
    assert re.fullmatch(f'image is .*{kind}.*, expected JPEG, PNG, TIFF, BMP, WebP or GIF', problem)


@pytest.mark.parametrize('form', ['EPS', 'PPM', 'ICO', 'TGA', 'PCX', 'JPEG2000', 'ICNS', 'DDS', 'SGI', 'PDF'])
def test_formats_of_pillow_that_the_kit_does_not_open(tmp_path, form):
    (tmp_path/'photo.jpg').write_bytes(whole(form))
    (tmp_path/'l.txt').write_text('photo.jpg 0\n')
    with pytest.raises(BadDataError, match=r'l\.txt:1: photo\.jpg: image .*expected JPEG'):
        from_list(tmp_path/'l.txt', ['a', 'b'])


def test_no_program_is_started(tmp_path, monkeypatch):
    program, called = tmp_path/'gs', tmp_path/'called'
    program.write_text(f'#!/bin/sh\ntouch "{called}"\n')
    program.chmod(0o755)
    (tmp_path/'a.jpg').write_bytes(whole('EPS'))
    called.unlink(missing_ok=True)
    monkeypatch.setenv('PATH', f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    assert image_problem(tmp_path/'a.jpg', 'full')
    assert not called.exists()


def test_an_empty_file_is_called_empty(tmp_path):
    (tmp_path/'a.jpg').touch()
    assert 'empty' in image_problem(tmp_path/'a.jpg')


def test_a_file_that_may_not_be_read(tmp_path, monkeypatch):
    file = tmp_path/'a.jpg'
    file.touch()
    def closed(*args): raise PermissionError(13, 'Permission denied')
    monkeypatch.setattr('builtins.open', closed)
    assert image_problem(file) == 'image may not be read'


def test_images_of_a_folder_are_found_by_their_suffix(tmp_path):
    (tmp_path/'cat').mkdir()
    for suffix in IMAGE_SUFFIXES: (tmp_path/f'cat/a{suffix}').write_bytes(whole('PNG'))
    for suffix in ('.eps', '.pdf', '.txt', '.ps', '.mpg'): (tmp_path/f'cat/b{suffix}').write_bytes(whole('PNG'))
    assert len(from_folder(tmp_path)) == len(IMAGE_SUFFIXES)


# ---- bounds

@pytest.mark.parametrize('bits, dtype', [(8, np.uint8), (16, np.uint16), (32, np.int32), (32, np.float32)])
@pytest.mark.parametrize('over', [0, 1])
@pytest.mark.filterwarnings('ignore::PIL.Image.DecompressionBombWarning')
def test_pixels_count_by_their_bytes(tmp_path, monkeypatch, bits, dtype, over):
    monkeypatch.setattr(Image, 'MAX_IMAGE_PIXELS', 1000)
    width = 1000 * 8 // bits + over
    Image.fromarray(np.ones((1, width), dtype)).save(tmp_path/'a.tif')
    problem = image_problem(tmp_path/'a.tif')
    assert (problem is not None) == bool(over)


def test_no_bomb_is_decoded(tmp_path):
    "A million times a million pixels in a file of 100 bytes"
    header = struct.pack('>IIBBBBB', 10**6, 10**6, 16, 0, 0, 0, 0)
    bomb = png_chunks((b'IHDR', header), (b'IDAT', zlib.compress(b'')), (b'IEND', b''))
    (tmp_path/'bomb.png').write_bytes(bomb)
    assert check_images([tmp_path/'bomb.png'])[0].startswith('image is refused')


@pytest.mark.parametrize('kind', [b'zTXt', b'iTXt', b'iCCP'])
def test_texts_of_a_png_are_bounded(tmp_path, kind):
    squeezed = zlib.compress(bytes(10_000_000), 9)
    data = {b'zTXt': b'a\0\0', b'iTXt': b'a\0\1\0\0\0', b'iCCP': b'a\0\0'}[kind] + squeezed
    header = struct.pack('>IIBBBBB', 1, 1, 8, 0, 0, 0, 0)
    file = tmp_path/'text.png'
    file.write_bytes(png_chunks((b'IHDR', header), (kind, data), (b'IDAT', zlib.compress(b'\0\7')), (b'IEND', b'')))
    problem = image_problem(file, 'full')
    assert problem is None or 'too large' in problem


def test_a_jpeg_of_many_scans_is_refused(tmp_path):
    data = whole('JPEG', progressive=True)
    last = data.rindex(b'\xff\xda')
    scan = data[last:-2]
    (tmp_path/'slow.jpg').write_bytes(data[:-2] + scan * 600 + data[-2:])
    for check in ('headers', 'full'): assert '6' in image_problem(tmp_path/'slow.jpg', check).partition(' scans')[0]


def test_an_ordinary_progressive_jpeg_is_no_problem(tmp_path):
    (tmp_path/'a.jpg').write_bytes(whole('JPEG', progressive=True))
    assert image_problem(tmp_path/'a.jpg', 'full') is None


def test_a_webp_file_larger_than_any_image_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(Image, 'MAX_IMAGE_PIXELS', 1000)
    (tmp_path/'a.webp').write_bytes(whole('WEBP') + bytes(5000))
    assert 'a WebP file of' in image_problem(tmp_path/'a.webp')


# ---- anything else

@pytest.mark.filterwarnings('ignore')
def test_broken_images_end_in_a_sentence(tmp_path, capfd):
    "300 mutants of sound images: no other error, and both checks agree on what can be decoded"
    file = tmp_path/'mutant.img'
    for data in mutants(300):
        file.write_bytes(data)
        try: open_image(file)
        except BadDataError as e: assert '\n' not in str(e)
        else: assert image_problem(file) is None
    capfd.readouterr() # libtiff's own complaints
