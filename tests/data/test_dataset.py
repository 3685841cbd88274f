"Readers, checks, decoding and datasets"
import json
import pickle
import sys
import types
import warnings

import numpy as np
import pytest
import torch
from helpers import FIXTURES, SHARED
from PIL import Image

from cprfl.data.benchmarks import available_benchmarks, load_benchmark
from cprfl.data.dataset import ArrayDataset, LongTailDataset, MultiLabelDataset, read_image, resize
from cprfl.data.images import BadDataError, Problem, check_images, image_problem, path_problem
from cprfl.data.readers import from_coco, from_csv, from_folder, from_list, read_classes

needs_lists = pytest.mark.skipif(not (SHARED/'lists').is_dir(), reason='the benchmark lists are not here (set CPRFL_SHARED)')
MINI = SHARED/'real/coco_lt_mini'
needs_mini = pytest.mark.skipif(not MINI.is_dir(), reason='COCO-LT mini is not here (set CPRFL_SHARED)')
CLASSES = ['cat', 'dining table', 'dog']


def noise(seed=0, size=48): return np.random.default_rng(seed).integers(0, 256, (size, size, 3), dtype=np.uint8)


@pytest.fixture
def root(tmp_path):
    "a.jpg to g.jpg sound, half.jpg and half.png cut, fake.jpg no image"
    root = tmp_path/'images'
    root.mkdir()
    for i, name in enumerate(('a.jpg', 'b.jpg', 'c.jpg', 'd.jpg', 'e.png', 'f.jpg', 'g.jpg')): Image.fromarray(noise(i)).save(root/name)
    for kind in ('jpg', 'png'):
        whole = (root/('a.jpg' if kind == 'jpg' else 'e.png')).read_bytes()
        (root/f'half.{kind}').write_bytes(whole[:len(whole)//2])
    (root/'fake.jpg').write_text('not an image')
    Image.fromarray(noise(9)).save(tmp_path/'outside.jpg')
    return root


# ---- decoding

def test_every_mode_becomes_uint8_rgb(tmp_path):
    grey = np.arange(48, dtype=np.uint8).reshape(6, 8) * 5
    made = {'L.png': Image.fromarray(grey), 'P.png': Image.fromarray(grey).convert('P'), '1.png': Image.fromarray(grey).convert('1'),
            'LA.png': Image.fromarray(grey).convert('LA'), 'RGBA.png': Image.fromarray(grey).convert('RGBA'),
            'CMYK.jpg': Image.fromarray(grey).convert('CMYK'), '16.png': Image.fromarray(grey.astype(np.uint16) * 257),
            '16.tif': Image.fromarray(grey.astype(np.uint16) * 257), 'I.tif': Image.fromarray(grey.astype(np.int32) * 257),
            'p.gif': Image.fromarray(grey).convert('P')}
    slack = {'CMYK.jpg': 8, 'P.png': 1, 'p.gif': 1, '1.png': 255}
    for name, im in made.items():
        im.save(tmp_path/name)
        x = read_image(tmp_path/name)
        assert x.dtype == torch.uint8 and x.shape == (3, 6, 8) and x.is_contiguous(), name
        assert np.abs(x[1].numpy().astype(int) - grey).max() <= slack.get(name, 0), name


def test_palette_with_transparency_decodes_without_a_warning(tmp_path):
    im = Image.new('P', (4, 4), 1)
    im.putpalette([0, 0, 0, 10, 20, 30] + [0] * 762)
    im.save(tmp_path/'t.png', transparency=bytes([0, 255]))
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        assert read_image(tmp_path/'t.png')[:, 0, 0].tolist() == [10, 20, 30]


@pytest.mark.filterwarnings('ignore:Corrupt EXIF')
def test_exif_orientation_and_broken_exif(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    pixels = np.zeros((8, 16, 3), np.uint8)
    pixels[:, :8] = 255
    Image.fromarray(pixels).save(tmp_path/'turned.jpg', exif=exif, quality=100)
    x = read_image(tmp_path/'turned.jpg')
    assert x.shape == (3, 16, 8) and x[:, :6].min() > 200 and x[:, 10:].max() < 50
    Image.fromarray(pixels).save(tmp_path/'odd.jpg', exif=b'Exif\0\0II*\0\xff\xff\xff\xffjunk')
    assert read_image(tmp_path/'odd.jpg').shape == (3, 8, 16)


@pytest.mark.filterwarnings('ignore::PIL.Image.DecompressionBombWarning')
@pytest.mark.parametrize('side', [12, 40])
def test_decompression_bombs_are_refused_by_name(tmp_path, monkeypatch, side):
    Image.new('RGB', (side, side)).save(tmp_path/'bomb.png')
    monkeypatch.setattr(Image, 'MAX_IMAGE_PIXELS', 100)
    with pytest.raises(BadDataError, match='bomb.png: image is refused'): read_image(tmp_path/'bomb.png')
    assert 'refused' in image_problem(tmp_path/'bomb.png', 'headers')


@pytest.mark.parametrize('name, why', [
    ('half.jpg', 'truncated'), ('half.png', 'truncated'), ('fake.jpg', 'broken'), ('none.jpg', 'is missing')])
def test_a_bad_image_is_named(root, name, why):
    with pytest.raises(BadDataError, match=f'{name}: image .*{why}'): read_image(root/name)
    for check in ('headers', 'full'): assert why in image_problem(root/name, check)
    assert image_problem(root/name, 'none') is None
    assert (image_problem(root/name, 'exists') is None) == (name != 'none.jpg')


def test_only_a_thumbnail_ends_well(tmp_path):
    "a JPEG cut behind the thumbnail in its EXIF holds an end marker all the same"
    thumb = tmp_path/'thumb.jpg'
    Image.fromarray(noise(1, 16)).save(thumb)
    body = b'Exif\0\0' + thumb.read_bytes()
    Image.fromarray(noise(2)).save(tmp_path/'photo.jpg', exif=body)
    whole = (tmp_path/'photo.jpg').read_bytes()
    assert whole.index(b'\xff\xd9') < len(whole) // 2 and image_problem(tmp_path/'photo.jpg') is None
    (tmp_path/'photo.jpg').write_bytes(whole[:-400])
    assert 'truncated' in image_problem(tmp_path/'photo.jpg')


def test_png_with_a_broken_chunk_is_found_by_a_full_check(root):
    raw = bytearray((root/'e.png').read_bytes())
    at = raw.index(b'IDAT') + 40
    raw[at:at + 20] = bytes(20)
    (root/'e.png').write_bytes(raw)
    assert image_problem(root/'e.png', 'headers') is None and 'broken' in image_problem(root/'e.png', 'full')


def test_other_formats_are_decoded(tmp_path):
    Image.fromarray(noise()).save(tmp_path/'a.bmp')
    assert image_problem(tmp_path/'a.bmp') is None
    (tmp_path/'a.bmp').write_bytes((tmp_path/'a.bmp').read_bytes()[:-500])
    assert 'truncated' in image_problem(tmp_path/'a.bmp')


def test_unknown_check(root):
    with pytest.raises(ValueError, match='one of none, exists, headers, full'): check_images([root/'a.jpg'], 'all')


# ---- datasets

def test_array_dataset_interface():
    pixels = np.arange(5 * 4 * 4 * 3, dtype=np.uint8).reshape(5, 4, 4, 3)
    y = [[1, 0], [1, 1], [0, 0], [1, 0], [0, 1]]
    ds = ArrayDataset(pixels, y, ['cat', 'dog'], boxes=[[i] for i in range(5)])
    assert isinstance(ds, MultiLabelDataset) and len(ds) == 5 and ds.targets.dtype == np.uint8
    assert ds.class_counts.tolist() == [3, 2] and {k: len(v) for k, v in ds.groups.items()} == {'head': 0, 'medium': 0, 'tail': 2}
    x, t, i = ds[-1]
    assert x.dtype == torch.uint8 and torch.equal(x, torch.from_numpy(pixels[4]).permute(2, 0, 1))
    assert t.dtype == torch.float32 and t.tolist() == [0, 1] and i == 4 and type(i) is int
    assert repr(ds) == 'ArrayDataset: 5 images, 2 classes (head 0, medium 0, tail 2)'
    with pytest.raises(IndexError): ds[5]
    x += 1
    assert ds.images[4, 0, 0, 0] == pixels[4, 0, 0, 0]


@pytest.mark.parametrize('pick', [[3, 1], np.array([3, 1]), torch.tensor([3, 1]), [-2, 1]])
def test_subset_keeps_groups_and_order(pick):
    groups = {'head': np.array([0]), 'medium': np.array([], int), 'tail': np.array([1])}
    ds = ArrayDataset(np.zeros((5, 2, 2, 3), np.uint8), np.eye(2, dtype=int)[[0, 1, 0, 1, 0]], ['a', 'b'], groups, boxes=list('vwxyz'))
    part = ds.subset(pick)
    assert part.paths == [ds.paths[3], ds.paths[1]] and part.boxes == ['y', 'w'] and part.images.shape[0] == 2
    assert part.groups is groups and part.class_counts.tolist() == [0, 2] and len(ds) == 5


def test_subset_by_mask_and_empty():
    ds = ArrayDataset(np.zeros((3, 2, 2, 3), np.uint8), np.eye(3, dtype=int), list('abc'))
    assert ds.subset([True, False, True]).paths == [ds.paths[0], ds.paths[2]]
    assert len(ds.subset([])) == 0 and ds.subset([]).class_counts.tolist() == [0, 0, 0]
    with pytest.raises(IndexError): ds.subset([7])


def test_dataset_refuses_what_does_not_fit(root):
    pixels = np.zeros((2, 2, 2, 3), np.uint8)
    with pytest.raises(ValueError, match=r'\[2, 3\], got \[3, 2\]'): ArrayDataset(pixels, np.zeros((3, 2)), list('abc'))
    with pytest.raises(ValueError, match='0 or 1'): ArrayDataset(pixels, [[2], [0]], ['a'])
    with pytest.raises(ValueError, match="'a' appears twice"): ArrayDataset(pixels, [[0, 0], [0, 0]], ['a', 'a'])
    with pytest.raises(ValueError, match=r'uint8 \[N, H, W, 3\], got float64'): ArrayDataset(pixels.astype(float), [[0], [0]], ['a'])
    with pytest.raises(ValueError, match='boxes for 2 images, got 1'): ArrayDataset(pixels, [[0], [0]], ['a'], boxes=[1])


def test_files_transform_and_loader(root):
    ds = LongTailDataset(['a.jpg', 'e.png'], [[1, 0], [0, 1]], ['x', 'y'], root=root, transform=resize(20))
    x, t, i = next(iter(torch.utils.data.DataLoader(ds, batch_size=2)))
    assert x.shape == (2, 3, 20, 20) and x.dtype == torch.uint8 and t.tolist() == [[1, 0], [0, 1]] and i.tolist() == [0, 1]
    alone = LongTailDataset([root/'a.jpg'], [[1]], ['x'])
    assert torch.equal(alone[0][0], read_image(root/'a.jpg'))
    gone = LongTailDataset(['none.jpg'], [[1]], ['x'], root=root)
    with pytest.raises(BadDataError, match='none.jpg'): gone[0]


# ---- list files

def test_list_quirks_are_read(root):
    (root/'list.txt').write_bytes(b'\xef\xbb\xbfa.jpg 0 2 \r\nb.jpg\t1\r\nc.jpg\r\n  e.png   2  0')
    ds = from_list(root/'list.txt', CLASSES)
    assert ds.paths == ['a.jpg', 'b.jpg', 'c.jpg', 'e.png'] and ds.classes == CLASSES
    assert ds.targets.tolist() == [[1, 0, 1], [0, 1, 0], [0, 0, 0], [1, 0, 1]] and ds.skipped == []
    assert LongTailDataset.from_list(root/'list.txt', CLASSES, root).paths == ds.paths


BAD = [  # text of the line, and what is said about it
    ('a.jpg 0 2', None),
    ('none.jpg 1', 'none.jpg: image is missing'),
    ('half.jpg 0', 'half.jpg: image is truncated'),
    ('half.png 0', 'half.png: image is truncated'),
    ('fake.jpg 0', 'fake.jpg: image is truncated or broken'),
    ('b.jpg 3', 'label 3 is out of range, expected 0 to 2'),
    ('f.jpg -1', 'label -1 is out of range'),
    ('c.jpg dog', "label 'dog' is not an integer"),
    ('g.jpg 1.0', "label '1.0' is not an integer"),
    ('a.jpg 1', "duplicate image 'a.jpg', first on line 1"),
    ('./a.jpg 1', "duplicate image './a.jpg', first on line 1"),
    ('d.jpg 1 2 1', 'duplicate label 1'),
    ('', 'empty line'),
    ('../outside.jpg 0', "path '../outside.jpg' leaves the image root"),
    ('x/../../outside.jpg 0', 'leaves the image root'),
    ('/etc/hostname 0', 'is absolute'),
    ('link.jpg 0', 'leaves the image root through a link'),
    ('folder/outside.jpg 0', 'leaves the image root through a link'),
    ('inner.jpg 0', None),
    ('e.png', None),
]


@pytest.fixture
def bad_list(root):
    (root/'link.jpg').symlink_to(root.parent/'outside.jpg')
    (root/'folder').symlink_to(root.parent)
    Image.fromarray(noise(7)).save(root/'target.jpg')
    (root/'inner.jpg').symlink_to(root/'target.jpg')
    (root/'bad.txt').write_text('\n'.join(text for text, _ in BAD) + '\n')
    return root/'bad.txt'


def test_all_problems_are_raised_at_once_with_file_and_line(bad_list):
    with pytest.raises(BadDataError) as e: from_list(bad_list, CLASSES)
    wrong = [(n, m) for n, (_, m) in enumerate(BAD, 1) if m]
    assert isinstance(e.value, ValueError) and [p.line for p in e.value.problems] == [n for n, _ in wrong]
    for p, (n, message) in zip(e.value.problems, wrong):
        assert isinstance(p, Problem) and p.file == str(bad_list) and message in p.message
        assert f'{bad_list}:{n}: ' in str(e.value) and message in str(e.value)
    assert str(pickle.loads(pickle.dumps(e.value))) == str(e.value)


def test_skip_bad_drops_and_records(bad_list):
    ds = from_list(bad_list, CLASSES, skip_bad=True)
    assert ds.paths == ['a.jpg', 'inner.jpg', 'e.png']
    assert [p.line for p in ds.skipped] == [n for n, (_, m) in enumerate(BAD, 1) if m]
    assert repr(ds).endswith(f', {len(ds.skipped)} problems skipped')
    assert all(ds[i][0].shape == (3, 48, 48) for i in range(3))


def test_links_may_be_allowed_but_not_dots(bad_list):
    ds = from_list(bad_list, CLASSES, skip_bad=True, follow_links=True)
    assert 'link.jpg' in ds.paths and 'folder/outside.jpg' in ds.paths and '../outside.jpg' not in ds.paths


def test_several_problems_of_one_row(root):
    (root/'list.txt').write_text('none.jpg 7 x 1 1\n')
    with pytest.raises(BadDataError) as e: from_list(root/'list.txt', CLASSES)
    assert len(e.value.problems) == 4 and {p.line for p in e.value.problems} == {1}


def test_long_reports_are_cut(root):
    (root/'list.txt').write_text(''.join(f'{i}.jpg 0\n' for i in range(600)))
    with pytest.raises(BadDataError) as e: from_list(root/'list.txt', CLASSES)
    assert len(e.value.problems) == 600 and len(str(e.value).splitlines()) == 52 and str(e.value).endswith('and 550 more')


def test_nothing_left_no_root_and_not_text(root):
    (root/'list.txt').write_text('\n')
    with pytest.raises(BadDataError, match='no image is listed'): from_list(root/'list.txt', CLASSES)
    (root/'list.txt').write_text('none.jpg 0\n')
    with pytest.raises(BadDataError, match='list.txt:1: none.jpg: image is missing'): from_list(root/'list.txt', CLASSES, skip_bad=True)
    with pytest.raises(BadDataError, match='root is not a folder'): from_list(root/'list.txt', CLASSES, root/'nowhere')
    assert len(from_list(root/'list.txt', CLASSES, root/'nowhere', check='none')) == 1
    (root/'list.txt').write_bytes(b'a.jpg 0\n\xff\xfe 1\n')
    with pytest.raises(BadDataError, match='list.txt:2: expected UTF-8'): from_list(root/'list.txt', CLASSES)


def test_paths_that_must_not_be_followed(root):
    for p in ('..', '../x', 'a/../../x', '/x', '\\x', 'C:\\x', 'C:/x', '..\\x', '\\\\host\\x', 'a\0b'): assert path_problem(p, root), p
    for p in ('x', './x', 'a/b/x', 'a/../x', '..x/y', 'x..jpg'): assert path_problem(p, root) is None, p


# ---- class names

def test_read_classes(tmp_path):
    f = tmp_path/'c.txt'
    for text, names in {' dining table 1 \r\ncat 0\r\n\r\nhot dog  2': ['cat', 'dining table', 'hot dog'],
                        'cat\ndining table\n': ['cat', 'dining table'], 'route 66\nroute 67\n': ['route 66', 'route 67'],
                        'a_b 0\nc 1': ['a_b', 'c']}.items():
        f.write_text(text)
        assert read_classes(f) == names
    f.write_text('cat 0\ndog 1\ncat 2\n')
    with pytest.raises(BadDataError, match="c.txt:3: class 'cat' is already on line 1"): read_classes(f)
    f.write_text('\n')
    with pytest.raises(BadDataError, match='no class'): read_classes(f)


# ---- CSV, COCO, folders

@pytest.mark.parametrize('text', [
    'path,labels\na.jpg,dog|cat\nb.jpg,\ne.png, dog \n',
    'Labels,IMAGE\r\ncat;dog,a.jpg\r\n,b.jpg\r\ndog,e.png\r\n',
    'filename,cat,dog\na.jpg,1,1\nb.jpg,0,0.0\ne.png,False,1\n',
    'image\tlabels\na.jpg\tcat;dog\ne.png\tdog\nb.jpg\t\n'])
def test_csv(root, text):
    (root/'t.csv').write_text(text)
    ds = from_csv(root/'t.csv', root)
    assert ds.classes == ['cat', 'dog']
    assert dict(zip(ds.paths, ds.targets.tolist())) == {'a.jpg': [1, 1], 'b.jpg': [0, 0], 'e.png': [0, 1]}


def test_csv_problems_have_lines(root):
    rows = ['path,labels', 'a.jpg,cat', 'b.jpg,zebra', '', 'c.jpg,cat|cat', 'a.jpg,dog', 'd.jpg',
            '"../outside.jpg",cat', ',cat', 'none.jpg,cat']
    (root/'t.csv').write_text('\n'.join(rows) + '\n')
    with pytest.raises(BadDataError) as e: from_csv(root/'t.csv', root, classes=['cat', 'dog'])
    assert [p.line for p in e.value.problems] == [3, 4, 5, 6, 7, 8, 9, 10]
    for text in ("label 'zebra' is unknown, expected one of cat, dog", 'empty line', "duplicate label 'cat'", 'duplicate image',
                 'expected 2 fields, got 1', 'leaves the image root', 'the path is empty', 'image is missing'): assert text in str(e.value)
    ds = from_csv(root/'t.csv', root, classes=['cat', 'dog'], skip_bad=True)
    assert ds.paths == ['a.jpg'] and len(ds.skipped) == 8


def test_csv_columns(root):
    (root/'t.csv').write_text('path,split,cat,dog\na.jpg,train,1,0\nb.jpg,test,x,1\n')
    with pytest.raises(BadDataError, match="t.csv:3: column 'cat' is 'x', expected 0 or 1"): from_csv(root/'t.csv', classes=['dog', 'cat'])
    ds = from_csv(root/'t.csv', classes=['dog', 'cat'], skip_bad=True)
    assert ds.targets.tolist() == [[0, 1]]
    with pytest.raises(BadDataError, match='no column cow; the columns are path, split'): from_csv(root/'t.csv', classes=['cow'])
    for text, why in {'file,cat\na.jpg,1\n': 'no column path, image or filename', 'path\na.jpg\n': 'no column holds labels',
                      'path,cat,cat\na.jpg,1,1\n': 'two columns', '': 'no column path'}.items():
        (root/'t.csv').write_text(text)
        with pytest.raises(BadDataError, match=why): from_csv(root/'t.csv')


def coco(**extra):
    d = {'images': [{'id': 7, 'file_name': 'a.jpg'}, {'id': 9, 'file_name': 'b.jpg'}, {'id': 2, 'file_name': 'c.jpg'}],
         'annotations': [{'id': 1, 'image_id': 7, 'category_id': 18}, {'id': 2, 'image_id': 7, 'category_id': 3},
                         {'id': 3, 'image_id': 7, 'category_id': 3}, {'id': 4, 'image_id': 2, 'category_id': 18}],
         'categories': [{'id': 18, 'name': 'dog'}, {'id': 3, 'name': 'car'}]}
    for k, v in extra.items(): d[k] = d[k] + v
    return json.dumps(d)


def test_coco(root):
    (root/'c.json').write_text(coco())
    ds = from_coco(root/'c.json', root)
    assert ds.classes == ['car', 'dog'] and ds.paths == ['a.jpg', 'b.jpg', 'c.jpg'] and ds.targets.tolist() == [[1, 1], [0, 0], [0, 1]]
    assert from_coco(root/'c.json', root, classes=['dog']).targets.tolist() == [[1], [0], [1]]
    with pytest.raises(BadDataError, match='no category cow; there are car, dog'): from_coco(root/'c.json', root, classes=['cow'])
    (root/'c.json').write_text(json.dumps({k: v for k, v in json.loads(coco()).items() if k != 'annotations'}))
    assert from_coco(root/'c.json').class_counts.tolist() == [0, 0]


def test_coco_problems(root):
    (root/'c.json').write_text(coco(images=[{'id': 7, 'file_name': 'd.jpg'}, {'id': 11, 'file_name': 'none.jpg'}],
                                    annotations=[{'id': 5, 'image_id': 99, 'category_id': 3}, {'id': 6, 'image_id': 9, 'category_id': 4}]))
    with pytest.raises(BadDataError) as e: from_coco(root/'c.json', root)
    for text in ('duplicate image id 7', 'none.jpg: image is missing', 'annotations belong to image 99',
                 'annotation 6 of image 9: category 4 is unknown'): assert text in str(e.value)
    assert len(e.value.problems) == 4
    assert from_coco(root/'c.json', root, skip_bad=True).paths == ['a.jpg', 'c.jpg']
    wrong = {'{\n"images": [,]}': 'c.json:2: not JSON', '[]': 'not COCO', '{"images": [{}], "categories": []}': 'not COCO'}
    for text, why in wrong.items():
        (root/'c.json').write_text(text)
        with pytest.raises(BadDataError, match=why): from_coco(root/'c.json', root)


def test_folders(tmp_path):
    for name, seed in {'cat/1.jpg': 1, 'dog/1.jpg': 1, 'dog/sub/2.png': 2, '3.jpg': 3, 'ox/4.jpg': 4, '.hidden/5.jpg': 5}.items():
        (tmp_path/name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(noise(seed)).save(tmp_path/name)
    (tmp_path/'dog/notes.txt').write_text('not an image')
    (tmp_path/'yak').mkdir()
    ds = from_folder(tmp_path)
    assert ds.classes == ['cat', 'dog', 'ox', 'yak'] and ds.class_counts.tolist() == [1, 2, 1, 0]
    labels = {p: ds.labels(i) for i, p in enumerate(ds.paths)}
    assert labels == {'3.jpg': [], 'cat/1.jpg': ['cat', 'dog'], 'dog/sub/2.png': ['dog'], 'ox/4.jpg': ['ox']}
    assert from_folder(tmp_path, classes=['ox', 'cat']).class_counts.tolist() == [1, 1]
    with pytest.raises(BadDataError, match='no folder cow; there are cat, dog, ox, yak'): from_folder(tmp_path, classes=['cow'])
    Image.fromarray(noise(6)).save(tmp_path/'dog/1.jpg')
    with pytest.raises(BadDataError, match='cat/1.jpg and dog/1.jpg have one name but differ'): from_folder(tmp_path)
    assert len(from_folder(tmp_path, union=False)) == 5
    with pytest.raises(BadDataError, match='not a folder'): from_folder(tmp_path/'none')


# ---- benchmarks

@pytest.fixture
def prepared(tmp_path):
    "a coco-lt in miniature, its images linked from elsewhere"
    base, far = tmp_path/'data/coco-lt', tmp_path/'far'
    (base/'lists').mkdir(parents=True)
    far.mkdir()
    Image.new('RGB', (4, 4)).save(far/'x.png')
    for i in range(124): (base/f'{i}.png').symlink_to(far/'x.png')
    (base/'lists/coco_labels.txt').write_text('cat 0\r\nhot dog 1 \nox 2')
    (base/'lists/coco_lt_train.txt').write_text(''.join(f'{i}.png {0 if i < 100 else 1 if i < 120 else 2}\n' for i in range(124)))
    (base/'lists/coco_lt_test.txt').write_text('0.png 0\n1.png 1 2\n2.png\n')
    return tmp_path/'data'


def test_load_benchmark_gives_the_test_the_groups_of_train(prepared, monkeypatch):
    train, test = (load_benchmark('coco-lt', s, root=prepared) for s in ('train', 'test'))
    assert train.class_counts.tolist() == [100, 20, 4] and test.class_counts.tolist() == [1, 1, 1]
    for ds in (train, test): assert {k: v.tolist() for k, v in ds.groups.items()} == {'head': [0], 'medium': [1], 'tail': [2]}
    assert test.labels(2) == [] and test.classes == ['cat', 'hot dog', 'ox']
    monkeypatch.setenv('CPRFL_DATA', str(prepared))
    assert load_benchmark('coco-lt', 'test', transform=resize(6))[0][0].shape == (3, 6, 6)


def test_load_benchmark_refusals(prepared):
    assert available_benchmarks() == ['voc-lt', 'coco-lt', 'shapes-lt']
    with pytest.raises(ValueError, match="'lvis', available: voc-lt, coco-lt, shapes-lt"): load_benchmark('lvis', 'train')
    with pytest.raises(ValueError, match="'valid' of coco-lt, available: train, test"): load_benchmark('coco-lt', 'valid', root=prepared)
    with pytest.raises(FileNotFoundError, match=f'run: cprfl_prepare voc-lt --root {prepared}'):
        load_benchmark('voc-lt', 'train', root=prepared)


def test_load_benchmark_hands_shapes_over(monkeypatch):
    calls = []
    def shapes_lt(split, seed=0, **kw):
        calls.append((split, seed, kw))
        return ArrayDataset(np.zeros((1, 8, 8, 3), np.uint8), [[1]], ['red circle'])
    monkeypatch.setitem(sys.modules, 'cprfl.data.shapes', types.SimpleNamespace(shapes_lt=shapes_lt))
    assert load_benchmark('shapes-lt', 'test', transform=resize(4), num_images=3)[0][0].shape == (3, 4, 4)
    load_benchmark('shapes-lt', 'train', seed=5)
    assert calls == [('test', 0, {'num_images': 3}), ('train', 5, {})]


@needs_lists
@pytest.mark.parametrize('key, classes, sizes, groups', [('voc', 20, (1142, 4952), [6, 6, 8]), ('coco', 80, (1909, 5000), [22, 33, 25])])
def test_facts_of_the_benchmarks(key, classes, sizes, groups):
    lists = SHARED/'lists'
    train, test = (from_list(lists/f'{key}_lt_{s}.txt', lists/f'{key}_labels.txt', lists, check='none') for s in ('train', 'test'))
    assert (len(train), len(test)) == sizes and len(train.classes) == classes
    assert [len(v) for v in train.groups.values()] == groups
    freq = {c['dataset']: c['class_freq'] for c in json.loads((FIXTURES/'losses.json').read_text())}
    assert train.class_counts.tolist() == freq[key]
    assert (test.targets.sum(1) == 0).sum() == (48 if key == 'coco' else 0)
    assert ('dining table' if key == 'coco' else 'diningtable') in train.classes


@needs_mini
def test_thousands_of_images_are_checked():
    sets = [from_list(MINI/f'coco_lt_{s}.txt', MINI/'classes.txt') for s in ('train', 'test')]
    assert sum(map(len, sets)) == 6909
    assert [len(v) for v in sets[0].groups.values()] == [21, 34, 25]
