import pytest
from pictures import noise
from PIL import Image


@pytest.fixture
def root(tmp_path):
    "a.jpg to g.jpg (and e.png) are sound, half.jpg and half.png are cut, fake.jpg is no image"
    root = tmp_path/'images'
    root.mkdir()
    for i, name in enumerate(('a.jpg', 'b.jpg', 'c.jpg', 'd.jpg', 'e.png', 'f.jpg', 'g.jpg')):
        Image.fromarray(noise(i)).save(root/name)
    for whole, half in (('a.jpg', 'half.jpg'), ('e.png', 'half.png')):
        data = (root/whole).read_bytes()
        (root/half).write_bytes(data[:len(data)//2])
    (root/'fake.jpg').write_text('not an image')
    Image.fromarray(noise(9)).save(tmp_path/'outside.jpg')
    return root


@pytest.fixture(scope='session')
def lists(shared):
    "Folder with the lists of VOC-LT and COCO-LT"
    if not (shared/'lists').is_dir(): pytest.skip('the benchmark lists are not here (set CPRFL_SHARED)')
    return shared/'lists'


@pytest.fixture(scope='session')
def coco_mini(shared):
    "Folder with all images of COCO-LT, small"
    folder = shared/'real/coco_lt_mini'
    if not folder.is_dir(): pytest.skip('COCO-LT mini is not here (set CPRFL_SHARED)')
    return folder
