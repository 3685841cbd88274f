"Broken images: sound ones of every format, with bytes flipped, cut off, doubled and moved between files"
import io
import struct
import zlib

import numpy as np
from pictures import noise, png_chunks
from PIL import Image

RAMP = (np.linspace(0, 1, 32)[None].repeat(16, 0) * 4095).astype(np.uint16)
KINDS = [
    ('rgb', 'JPEG', {}), ('rgb', 'JPEG', dict(progressive=True)), ('cmyk', 'JPEG', {}), ('rgb', 'PNG', {}),
    ('palette', 'PNG', dict(transparency=0)), ('wide', 'PNG', {}), ('la', 'PNG', {}), ('wide', 'TIFF', {}),
    ('rgb', 'TIFF', {}), ('rgb', 'TIFF', dict(compression='tiff_lzw')), ('rgb', 'TIFF', dict(compression='jpeg')),
    ('floats', 'TIFF', dict(compression='tiff_adobe_deflate')), ('rgb', 'BMP', {}), ('palette', 'BMP', {}),
    ('rgb', 'WEBP', {}), ('rgba', 'WEBP', dict(lossless=True)), ('palette', 'GIF', {}),
    ('palette', 'GIF', dict(save_all=True)), ('rgb', 'PNG', dict(save_all=True)), ('rgb', 'MPO', dict(save_all=True))]


def _picture(kind):
    picture = Image.fromarray(noise(size=32))
    match kind:
        case 'wide': return Image.fromarray(RAMP)
        case 'floats': return Image.fromarray((RAMP / 4095).astype(np.float32))
        case 'palette': return picture.convert('P')
        case 'rgb': return picture
    return picture.convert(kind.upper())


def sound_images():
    "Bytes of small sound images, of all formats that are opened"
    exif = Image.Exif()
    exif[0x0112] = 6
    out = []
    for kind, form, kw in KINDS:
        more = dict(append_images=[_picture(kind).rotate(90)]) if 'save_all' in kw else {}
        if form in ('JPEG', 'PNG', 'WEBP', 'TIFF'): more['exif'] = exif
        _picture(kind).save(file := io.BytesIO(), form, **kw, **more)
        out.append(file.getvalue())
    rows = zlib.compress(b''.join(b'\0' + bytes(range(48)) for _ in range(8)))
    header = struct.pack('>IIBBBBB', 8, 8, 16, 2, 0, 0, 0)
    return [*out, png_chunks((b'IHDR', header), (b'IDAT', rows), (b'IEND', b''))]


ODD = [b'\0' * 4, b'\xff' * 4, b'\x7f\xff\xff\xff', b'\xff\xff\xff\x7f', b'\0\0\1\0', b'\xff\xd9', b'\xff\xda', b'IEND']


def mutated(data, others, rng):
    "One to four changes of the bytes"
    data = bytearray(data)
    for _ in range(rng.integers(1, 5)):
        at = int(rng.integers(len(data))) if rng.random() < .5 else int(rng.integers(min(len(data), 300)))
        end = at + int(rng.integers(1, 64))
        match rng.integers(6):
            case 0: data[at] = rng.integers(256)
            case 1: data[at] ^= 1 << int(rng.integers(8))
            case 2: data[at:at + 4] = ODD[rng.integers(len(ODD))]
            case 3: del data[at:]
            case 4: data[at:at] = data[at:end]
            case 5:
                other = others[rng.integers(len(others))]
                data[at:end] = other[at:end]
        if not data: return b''
    return bytes(data)


def mutants(n, seed=0):
    "n broken images, always the same for a seed"
    rng, images = np.random.default_rng(seed), sound_images()
    for i in range(n): yield mutated(images[i % len(images)], images, rng)
