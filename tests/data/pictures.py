"Images that the tests of the data share"
import numpy as np


def noise(seed=0, size=48):
    return np.random.default_rng(seed).integers(0, 256, (size, size, 3), dtype=np.uint8)
