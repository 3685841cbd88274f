import pytest
from toys import paint

from cprfl.data.shapes import shapes_lt


@pytest.fixture(scope='session')
def pictures():
    "48 images of Shapes-LT"
    return shapes_lt('train').subset(range(48))


@pytest.fixture(scope='session')
def painted(pictures):
    "A training on images that nothing interrupted"
    return paint(pictures)
