"Images that the tests of the data share"
import struct
import zlib

import numpy as np


def noise(seed=0, size=48):
    return np.random.default_rng(seed).integers(0, 256, (size, size, 3), dtype=np.uint8)


def png_chunks(*chunks):
    "The bytes of a PNG of pairs (name, data)"
    parts = [struct.pack('>I', len(data)) + name + data + struct.pack('>I', zlib.crc32(name + data))
             for name, data in chunks]
    return b'\x89PNG\r\n\x1a\n' + b''.join(parts)
