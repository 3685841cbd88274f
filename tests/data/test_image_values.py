"Values of other ranges than 0 to 255: scaled by their depth, or named, but never black in silence"
import struct
import zlib

import numpy as np
import pytest
from pictures import png_chunks
from PIL import Image

from cprfl.data import images as module
from cprfl.data.images import BadDataError, check_images, open_image

RAMP = np.linspace(0, 1, 64)[None].repeat(8, 0)


@pytest.fixture(autouse=True)
def nothing_said_before(monkeypatch):
    for name in ('_warned', '_summed_up'): monkeypatch.setattr(module, name, set())


def integers(top, dtype=np.uint16): return Image.fromarray((RAMP * top).astype(dtype))


def floats(low, high): return Image.fromarray((low + RAMP * (high - low)).astype(np.float32))


def saved(image, file, **kw):
    image.save(file, **kw)
    return file


def greys(file): return np.asarray(open_image(file))[0, :, 0].astype(int)


# ---- scaled, and nothing to say

RANGES = {
    '12.png': integers(4095), '12.tif': integers(4095), '12 of 32.tif': integers(4095, np.int32),
    '16.png': integers(65535), '16.tif': integers(65535), '16 of 32.tif': integers(65535, np.int32),
    '8 of 16.png': integers(255), '8 of 32.tif': integers(255, np.int32),
    'one.tif': floats(0, 1), 'byte.tif': floats(0, 255), 'float 12.tif': floats(0, 4095),
    'float 16.tif': floats(0, 65535),
    'overshoot.tif': floats(-0.02, 1.02), 'float overshoot.tif': floats(-4, 262)}


@pytest.mark.filterwarnings('error')
@pytest.mark.parametrize('name', RANGES)
def test_a_ramp_uses_the_whole_range(tmp_path, name):
    assert np.abs(greys(saved(RANGES[name], tmp_path/name)) - RAMP[0] * 255).max() <= 8


@pytest.mark.filterwarnings('error')
@pytest.mark.parametrize('share', [0.3, 0.5, 1])
@pytest.mark.parametrize('top, kind', [(4095, integers), (65535, integers), (1, lambda t: floats(0, t))])
def test_images_of_one_detector_are_scaled_alike(tmp_path, top, kind, share):
    file = saved(kind(top * share), tmp_path/'a.tif')
    assert abs(greys(file).max() - share * 255) <= 1


@pytest.mark.filterwarnings('error')
@pytest.mark.parametrize('name', ['a.png', 'a.bmp', 'a.tif', 'a.webp', 'a.gif'])
def test_ordinary_dark_pictures_stay_dark(tmp_path, name):
    "Every mode of 8 bits, and nothing to say about it"
    file = saved(integers(15, np.uint8), tmp_path/name, **(dict(lossless=True) if name == 'a.webp' else {}))
    assert greys(file).max() == 15


@pytest.mark.filterwarnings('error')
@pytest.mark.parametrize('value, dtype, want', [
    (0, np.uint16, 0), (25700, np.uint16, 100), (4095, np.uint16, 255), (1, np.float32, 255), (0.5, np.float32, 128),
    (0, np.float32, 0), (0, np.int32, 0)])
def test_an_image_of_one_value(tmp_path, value, dtype, want):
    assert set(greys(saved(Image.fromarray(np.full((4, 4), value, dtype)), tmp_path/'a.tif'))) == {want}


@pytest.mark.filterwarnings('error')
@pytest.mark.parametrize('bits, want', [(0, 0), (1, 255)])
def test_an_image_of_one_bit(tmp_path, bits, want):
    assert set(greys(saved(Image.new('1', (4, 4), bits), tmp_path/'a.png'))) == {want}


def test_white_is_zero_in_some_scans(tmp_path):
    file = saved(integers(4095), tmp_path/'a.tif')
    raw = bytearray(file.read_bytes())
    at = raw.index(struct.pack('<HHI', 262, 3, 1)) + 8
    raw[at:at + 2] = struct.pack('<H', 0)
    file.write_bytes(raw)
    assert np.abs(greys(file) - (1 - RAMP[0]) * 255).max() <= 1


def test_unsigned_numbers_of_32_bits(tmp_path):
    unsigned = (RAMP * (2**32 - 1)).astype(np.uint32)
    file = saved(Image.fromarray(unsigned.view(np.int32)), tmp_path/'a.tif')
    raw = bytearray(file.read_bytes())
    at = raw.index(struct.pack('<HHI', 339, 3, 1)) + 8
    raw[at:at + 2] = struct.pack('<H', 1)
    file.write_bytes(raw)
    with pytest.warns(UserWarning, match=r'a\.tif: its values go from 0 to 4\.29'): got = greys(file)
    assert np.abs(got - RAMP[0] * 255).max() <= 1


# ---- the file says how many bits it uses

def with_sbit(file, bits):
    "The PNG, with a chunk of its significant bits"
    chunk = b'sBIT' + bytes([bits])
    data = file.read_bytes()
    file.write_bytes(data[:33] + struct.pack('>I', 1) + chunk + struct.pack('>I', zlib.crc32(chunk)) + data[33:])
    return file


@pytest.mark.parametrize('bits', [9, 10, 11, 14])
def test_the_bits_of_a_png(tmp_path, bits):
    file = with_sbit(saved(integers(2**bits - 1), tmp_path/'a.png'), bits)
    assert np.abs(greys(file) - RAMP[0] * 255).max() <= 1


@pytest.mark.parametrize('tag', [281, 341])
def test_the_largest_value_of_a_tiff(tmp_path, tag):
    file = saved(integers(1023), tmp_path/'a.tif', tiffinfo={tag: 1023})
    assert np.abs(greys(file) - RAMP[0] * 255).max() <= 1


@pytest.mark.parametrize('bits', [1, 8, 10, 12, 16, 200])
def test_bits_that_do_not_hold_the_values_do_not_count(tmp_path, bits):
    file = with_sbit(saved(integers(65535), tmp_path/'a.png'), bits)
    assert np.abs(greys(file) - RAMP[0] * 255).max() <= 1


def test_a_largest_value_of_one_image_does_not_count(tmp_path):
    file = saved(integers(3000), tmp_path/'a.tif', tiffinfo={281: 3000})
    assert greys(file).max() == 3000 // 16


# ---- colours of 16 bits, which Pillow reduces to their upper bytes

COLOURS = {2: 3, 4: 2, 6: 4} # colour type of a PNG -> channels


def wide_png(file, top, kind):
    "A PNG of 16 bits: a ramp in all channels, opaque"
    values = np.repeat((RAMP * top).astype('>u2')[..., None], COLOURS[kind], -1)
    if kind in (4, 6): values[..., -1] = 65535
    rows = b''.join(b'\0' + row.tobytes() for row in values)
    header = struct.pack('>IIBBBBB', values.shape[1], values.shape[0], 16, kind, 0, 0, 0)
    file.write_bytes(png_chunks((b'IHDR', header), (b'IDAT', zlib.compress(rows)), (b'IEND', b'')))
    return file


def wide_tiff(file, top, kind):
    "A TIFF of 16-bit colours: little or big endian, plain or as Pillow hands it to libtiff"
    order, planar = kind
    values = np.repeat((RAMP * top).astype(f'{order}u2')[..., None], 3, -1)
    H, W, _ = values.shape
    data = (values.transpose(2, 0, 1) if planar == 2 else values).tobytes()
    planes = 3 if planar == 2 else 1
    tags = [(256, 4, [W]), (257, 4, [H]), (258, 3, [16] * 3), (259, 3, [1]), (262, 3, [2]),
            (273, 4, [8 + i * len(data) // planes for i in range(planes)]), (277, 3, [3]), (278, 4, [H]),
            (279, 4, [len(data) // planes] * planes), (284, 3, [planar])]
    at = 8 + len(data) + 2 + 12 * len(tags) + 4
    entries, far = b'', b''
    for tag, form, numbers in tags:
        packed = struct.pack(f'{order}{len(numbers)}{"H" if form == 3 else "I"}', *numbers)
        if len(packed) > 4:
            where = struct.pack(f'{order}I', at + len(far))
            far += packed
        else: where = packed.ljust(4, b'\0')
        entries += struct.pack(f'{order}HHI', tag, form, len(numbers)) + where
    head = (b'II' if order == '<' else b'MM') + struct.pack(f'{order}HI', 42, 8 + len(data))
    file.write_bytes(head + data + struct.pack(f'{order}H', len(tags)) + entries + b'\0' * 4 + far)
    return file


WIDE = [(wide_png, 2), (wide_png, 4), (wide_png, 6), (wide_tiff, ('<', 1)), (wide_tiff, ('>', 1)),
        (wide_tiff, ('<', 2)), (wide_tiff, ('>', 2))]


@pytest.mark.filterwarnings('error')
@pytest.mark.parametrize('top', [255, 4095, 65535])
@pytest.mark.parametrize('make, kind', WIDE)
def test_colours_of_16_bits(tmp_path, make, kind, top):
    x = np.asarray(open_image(make(tmp_path/'a.img', top, kind)))[0].astype(int)
    assert np.abs(x - RAMP[0, :, None] * 255).max() <= 4


@pytest.mark.parametrize('make, kind', WIDE)
def test_dark_colours_of_16_bits_are_named(tmp_path, make, kind):
    file = make(tmp_path/'a.img', 16383, kind)
    with pytest.warns(UserWarning, match=r'a\.img: its brightest pixel is 6'): open_image(file)


def test_compressed_colours_of_16_bits(tmp_path):
    "libtiff gives the native order"
    plain = wide_tiff(tmp_path/'a.tif', 4095, ('<', 1))
    raw = bytearray(plain.read_bytes())
    data = zlib.compress(bytes(raw[8:8 + RAMP.size * 6]))
    raw[8:8 + len(data)] = data
    for tag, form, value in ((259, 3, 8), (279, 4, len(data))):
        at = raw.index(struct.pack('<HHI', tag, form, 1)) + 8
        raw[at:at + 4] = struct.pack('<I', value)
    plain.write_bytes(raw)
    x = np.asarray(open_image(plain))[0].astype(int)
    assert np.abs(x - RAMP[0, :, None] * 255).max() <= 1


# ---- named in a warning

NAMED = {
    '10.png': integers(1023), '14.png': integers(16383), '14.tif': integers(16383), 'mask.png': integers(3),
    'mask.tif': integers(3, np.int32), 'ct.tif': Image.fromarray((RAMP * 4000 - 1024).astype(np.int32)),
    'float ct.tif': floats(-1024, 3071), 'normed.tif': floats(-1, 1), 'far.tif': floats(0, 1e6),
    'large.tif': integers(2**31 - 1, np.int32), 'dim.tif': floats(0, 0.1), 'ten.tif': floats(0, 10)}


@pytest.mark.parametrize('name', NAMED)
def test_what_no_rule_fits_is_named(tmp_path, name):
    file = saved(NAMED[name], tmp_path/name)
    with pytest.warns(UserWarning, match=name): open_image(file)


@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize('name', ['ct.tif', 'float ct.tif', 'normed.tif', 'far.tif', 'large.tif'])
def test_values_beyond_every_depth_use_the_whole_range(tmp_path, name):
    got = greys(saved(NAMED[name], tmp_path/name))
    assert np.abs(got - RAMP[0] * 255).max() <= 1


@pytest.mark.parametrize('odd', [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite_are_named(tmp_path, odd):
    values = RAMP.astype(np.float32)
    values[0, 10] = odd
    with pytest.warns(UserWarning, match=r'odd\.tif: 1 of its values'):
        got = greys(saved(Image.fromarray(values), tmp_path/'odd.tif'))
    want = np.where(np.arange(64) == 10, 255 if odd == np.inf else 0, RAMP[0] * 255)
    assert np.abs(got - want).max() <= 1


def test_an_image_without_a_finite_value_is_refused(tmp_path):
    file = saved(Image.fromarray(np.full((4, 4), np.nan, np.float32)), tmp_path/'nan.tif')
    with pytest.raises(BadDataError, match=r'nan\.tif: image is refused: none of its values'): open_image(file)


@pytest.mark.parametrize('check', ['headers', 'full'])
def test_a_check_names_the_first_of_many_in_one_warning(tmp_path, check):
    files = [saved(integers(1023), tmp_path/f'{i}.png') for i in range(5)]
    with pytest.warns(UserWarning, match=r'0\.png: .*\n.*1\.png: .*\n.*2\.png: .*\nand 2 more') as caught:
        assert check_images(files, check) == [None] * 5
    assert len(caught) == 1


@pytest.mark.filterwarnings('error')
def test_what_a_check_has_named_is_not_named_again(tmp_path):
    file = saved(integers(1023), tmp_path/'a.png')
    with pytest.warns(UserWarning): check_images([file])
    assert greys(file).max() == 63


def test_a_training_names_no_more_than_twenty(tmp_path):
    files = [saved(integers(1023), tmp_path/f'{i}.png') for i in range(25)]
    with pytest.warns(UserWarning) as caught:
        for file in files: open_image(file)
    assert len(caught) == 20


def test_a_warning_of_many_images_does_not_silence_others():
    with pytest.warns(UserWarning, match='and 27 more'): module._warn_of_all([(f'{i}.png', 'dark') for i in range(30)])
    with pytest.warns(UserWarning, match='other.png: dark'): module._warn_of('other.png', 'dark')
