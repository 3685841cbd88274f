"COCO JSON and VOC XML, their boxes, and everything that may be wrong with them"
import json
import math
import random

import pytest
import torch
from pictures import noise
from PIL import Image

from cprfl.data.annotations import is_voc, read_coco, read_voc
from cprfl.data.dataset import from_coco, from_voc, resize
from cprfl.data.images import BadDataError
from cprfl.data.readers import check_listing
from cprfl.look.attention import pointing_baselines, pointing_game
from cprfl.model.cprfl import CPRFL


def problems_of(read, *args, **kw):
    with pytest.raises(BadDataError) as e: read(*args, **kw)
    return e.value.problems


# ---- COCO JSON

COCO = {
    'images': [
        {'id': 7, 'file_name': 'a.jpg'}, {'id': 9, 'file_name': 'b.jpg'}, {'id': 2, 'file_name': 'c.jpg'},
    ],
    'annotations': [
        {'id': 1, 'image_id': 7, 'category_id': 18}, {'id': 2, 'image_id': 7, 'category_id': 3},
        {'id': 3, 'image_id': 7, 'category_id': 3}, {'id': 4, 'image_id': 2, 'category_id': 18},
    ],
    'categories': [{'id': 18, 'name': 'dog'}, {'id': 3, 'name': 'car'}],
}


@pytest.fixture
def coco(root):
    (root/'c.json').write_text(json.dumps(COCO))
    return root/'c.json'


def test_coco(coco):
    ds = from_coco(coco, coco.parent)
    assert ds.classes == ['car', 'dog']
    assert ds.paths == ['a.jpg', 'b.jpg', 'c.jpg']
    assert ds.targets.tolist() == [[1, 1], [0, 0], [0, 1]]


def test_given_classes_select_categories(coco):
    assert from_coco(coco, classes=['dog']).targets.tolist() == [[1], [0], [1]]
    with pytest.raises(BadDataError, match='no category cow; there are car, dog'):
        from_coco(coco, classes=['cow'])


def test_coco_without_annotations(coco):
    coco.write_text(json.dumps({key: value for key, value in COCO.items() if key != 'annotations'}))
    assert from_coco(coco).class_counts.tolist() == [0, 0]


@pytest.fixture
def bad_coco(coco):
    images = [*COCO['images'], {'id': 7, 'file_name': 'd.jpg'}, {'id': 11, 'file_name': 'none.jpg'}]
    lost = {'id': 5, 'image_id': 99, 'category_id': 3}
    unknown = {'id': 6, 'image_id': 9, 'category_id': 4}
    annotations = [*COCO['annotations'], lost, unknown]
    coco.write_text(json.dumps(COCO | {'images': images, 'annotations': annotations}))
    return coco


def test_coco_problems_name_the_image(bad_coco):
    problems = problems_of(from_coco, bad_coco)
    assert [p.message for p in problems] == [
        'annotation 6 of image 9: category 4 is unknown',
        'duplicate image id 7',
        'none.jpg: image is missing',
        'annotations belong to image 99, which is not among the images',
    ]


def test_coco_without_its_bad_images(bad_coco):
    assert from_coco(bad_coco, skip_bad=True).paths == ['a.jpg', 'c.jpg']


@pytest.mark.parametrize('text, why', [
    ('{\n"images": [,]}', 'c.json:2: not JSON'), ('[]', 'not COCO'),
    ('{"images": [{}], "categories": []}', 'not COCO')])
def test_other_json_is_refused(root, text, why):
    (root/'c.json').write_text(text)
    with pytest.raises(BadDataError, match=why): from_coco(root/'c.json', root)


def test_ids_are_compared_as_text(coco):
    data = json.loads(coco.read_text())
    for annotation in data['annotations']: annotation['image_id'] = str(annotation['image_id'])
    for category in data['categories']: category['id'] = float(category['id'])
    coco.write_text(json.dumps(data))
    assert from_coco(coco).targets.tolist() == [[1, 1], [0, 0], [0, 1]]


def test_names_that_are_numbers_become_text(coco):
    coco.write_text(json.dumps(COCO | {'categories': [{'id': 18, 'name': 7}, {'id': 3, 'name': ' 8 '}]}))
    assert from_coco(coco).classes == ['8', '7']


def test_categories_are_in_the_order_of_their_ids(coco):
    categories = [{'id': str(i), 'name': f'c{i}'} for i in (18, 3, 100, 9)]
    coco.write_text(json.dumps(COCO | {'categories': categories}))
    assert from_coco(coco).classes == ['c3', 'c9', 'c18', 'c100']


def test_images_of_lvis_are_named_by_their_address(coco):
    (coco.parent/'train2017').mkdir()
    (coco.parent/'a.jpg').rename(coco.parent/'train2017/a.jpg')
    image = {'id': 7, 'coco_url': 'http://images.cocodataset.org/train2017/a.jpg'}
    coco.write_text(json.dumps(COCO | {'images': [image], 'annotations': []}))
    assert from_coco(coco).paths == ['train2017/a.jpg']


# ---- boxes

BOXES = [ # COCO's box, and what it becomes in an image of 48 x 48
    ([2, 3, 4, 5], [(2, 3, 6, 8)]), ([1.5, 2.5, 3, 3], [(1, 2, 5, 6)]), ([-5, 40, 10, 20], [(0, 40, 5, 48)]),
    ([60, 60, 5, 5], []), ([4, 4, 0, 7], []), ([4.5, 4, 0, 7], [(4, 4, 5, 11)]), ([], []), (None, [])]


@pytest.mark.parametrize('box, expected', BOXES)
def test_boxes_are_whole_pixels_of_the_image(coco, box, expected):
    data = COCO | {'images': [{'id': 7, 'file_name': 'a.jpg', 'width': 48, 'height': 48}]}
    coco.write_text(json.dumps(data | {'annotations': [{'image_id': 7, 'category_id': 3, 'bbox': box, 'iscrowd': 1}]}))
    ds = from_coco(coco)
    assert ds.labels(0) == ['car']
    assert (ds.boxes or [[]])[0] == [(0, *corners) for corners in expected]


@pytest.mark.parametrize('box', [
    [1, 2, 3], [1, 2, -3, 4], [math.nan, 1, 2, 3], [1, math.inf, 2, 3], 'x', {'x': 1}, [1, 2, '3', 4], [1, 2, True, 4],
    [1e300, 0, 1, 1], 5])
def test_broken_boxes_are_problems_of_their_image(coco, box):
    coco.write_text(json.dumps(COCO | {'annotations': [{'id': 5, 'image_id': 7, 'category_id': 3, 'bbox': box}]}))
    with pytest.raises(BadDataError, match=r'annotation 5 of image 7: bbox: expected \[x, y, width, height\]'):
        from_coco(coco)


def test_boxes_have_the_index_of_the_chosen_class(coco):
    annotations = [{'image_id': 7, 'category_id': c, 'bbox': [c, 1, 2, 3]} for c in (18, 3)]
    coco.write_text(json.dumps(COCO | {'annotations': annotations}))
    assert from_coco(coco, classes=['dog']).boxes[0] == [(0, 18, 1, 20, 4)]
    assert from_coco(coco, match=['dog', 'owl', 'car']).boxes[0] == [(0, 18, 1, 20, 4), (2, 3, 1, 5, 4)]


@pytest.fixture
def photos(tmp_path):
    "Three photographs of 60 x 40: a cat in the middle, a dog on the right, and nothing"
    for name in 'abc': Image.fromarray(noise(ord(name), 60)[:40]).save(tmp_path/f'{name}.png')
    boxes = {1: [20, 10, 20, 20], 2: [30, 0, 30, 40]}
    (tmp_path/'c.json').write_text(json.dumps({
        'images': [{'id': i, 'file_name': f'{name}.png'} for i, name in enumerate('abc', 1)],
        'categories': [{'id': 1, 'name': 'cat'}, {'id': 2, 'name': 'dog'}],
        'annotations': [{'image_id': i, 'category_id': i, 'bbox': box} for i, box in boxes.items()]}))
    return from_coco(tmp_path/'c.json', transform=resize(64))


def test_a_subset_keeps_its_boxes(photos):
    assert photos.subset([1]).boxes == [[(1, 30, 0, 60, 40)]]


def test_boxes_on_the_image_that_a_model_sees(photos):
    assert photos.boxes_at(0, (64, 64)) == [(0, pytest.approx(64 / 3), 16, pytest.approx(128 / 3), 48)]
    assert photos.boxes_at(2, (64, 64)) == []


def test_a_map_is_scored_on_photographs(photos):
    "The blob of the baseline is in the middle, where the cat is and the dog is not"
    table = pointing_baselines(photos).set_index(['method', 'class'])
    assert table.loc['centre', 'hit'].to_dict() == {'cat': 1, 'dog': 1}
    assert table.loc['centre', 'area'].to_dict() == {'cat': pytest.approx(1 / 6), 'dog': 0.5}


def test_attention_is_scored_on_photographs(photos):
    torch.manual_seed(0)
    model = CPRFL('resnet18', torch.randn(2, 8), d=16, heads=2, head_dim=8, ffn_dim=16)
    table = pointing_game(model, photos)
    assert table['class'].tolist() == ['cat', 'dog']
    assert table['area'].tolist() == [pytest.approx(1 / 6), 0.5]
    assert table['energy'].between(0, 1).all()


# ---- whatever else a COCO file may hold

BROKEN = [
    ('images', None, '"images": expected a list, got None'), ('images', {}, 'expected a list'),
    ('images', [3], 'entry 1 of "images": expected an object, got 3'),
    ('images', [{'file_name': 'a.jpg'}], 'image 1: expected an id, got None'),
    ('images', [{'id': math.nan, 'file_name': 'a.jpg'}], 'image 1: expected an id, got nan'),
    ('images', [{'id': 7}], 'image 7: expected a file_name, got None'),
    ('images', [{'id': 7, 'file_name': ['a.jpg']}], 'image 7: expected a file_name'),
    ('images', [{'id': 7, 'file_name': '../outside.jpg'}], 'leaves the image root'),
    ('images', [{'id': 7, 'file_name': 'a\ud800.jpg'}], 'is not text that a file can be named'),
    ('images', [{'id': 7, 'file_name': 'a\0.jpg'}], 'leaves the image root'),
    ('annotations', {'a': 1}, '"annotations": expected a list'),
    ('annotations', ['x'], 'entry 1 of "annotations": expected an object'),
    ('annotations', [{}], 'annotations belong to image None'),
    ('annotations', [{'image_id': [7], 'category_id': 3}], r'annotations belong to image \[7\]'),
    ('annotations', [{'image_id': 7, 'category_id': {}}], 'category {} is unknown'),
    ('categories', None, '"categories" is empty'), ('categories', 'dog', '"categories": expected a list'),
    ('categories', [{'id': 3}], 'category 1: expected a name, got None'),
    ('categories', [{'name': 'dog'}], 'category 1: expected an id, got None'),
    ('categories', [{'id': 3, 'name': ''}], 'category 1: expected a name'),
    ('categories', [{'id': 3, 'name': 'a\nb'}], 'is not a text in one line'),
    ('categories', [{'id': 3, 'name': 'dog'}, {'id': '3', 'name': 'cat'}], "id 3 is already that of 'dog'"),
    ('categories', [{'id': 3, 'name': 'dog'}, {'id': 4, 'name': 'dog'}], "before it is also called 'dog'")]


@pytest.mark.parametrize('key, value, why', BROKEN)
def test_what_is_wrong_with_a_coco_file_is_said(coco, key, value, why):
    coco.write_text(json.dumps(COCO | {key: value}))
    with pytest.raises(BadDataError, match=why): from_coco(coco)


@pytest.mark.parametrize('text', ['', '{', 'null', '[' * 100_000, '{"images": ' + '9' * 5000 + '}', '\x00', '"a"', '1'])
def test_what_is_no_coco_file_is_refused(coco, text):
    coco.write_text(text)
    with pytest.raises(BadDataError, match='not JSON|not COCO'): from_coco(coco)


def mutated(value, rng):
    "A copy with something else in one place"
    odd = [None, [], {}, '', 'x', -1, 1.5, math.nan, True, 10**30, [[]], {'id': 1}, '\ud800', 1e308, '../x', 'a\\b']
    if rng.random() < 0.15 or not isinstance(value, (list, dict)) or not value: return rng.choice(odd)
    copy = value.copy()
    key = rng.choice(list(copy)) if isinstance(copy, dict) else rng.randrange(len(copy))
    if rng.random() < 0.1: copy.pop(key)
    else: copy[key] = mutated(copy[key], rng)
    return copy


def test_mutated_coco_files_end_in_a_sentence(coco):
    rng = random.Random(0)
    for _ in range(300):
        data = COCO
        for _ in range(rng.randint(1, 3)): data = mutated(data, rng)
        coco.write_text(json.dumps(data))
        try: check_listing(read_coco(coco), check='exists')
        except BadDataError as error: assert str(error)


# ---- VOC

def xml(objects='', filename='5.jpg', size=(48, 48)):
    width, height = size
    return (f'<annotation><filename>{filename}</filename><size><width>{width}</width><height>{height}</height></size>'
            f'{objects}</annotation>')


def thing(name='dog', box=(1, 2, 4, 6), difficult=0):
    corners = ''.join(f'<{tag}>{v}</{tag}>' for tag, v in zip(('xmin', 'ymin', 'xmax', 'ymax'), box))
    return f'<object><name>{name}</name><difficult>{difficult}</difficult><bndbox>{corners}</bndbox></object>'


@pytest.fixture
def voc(tmp_path):
    home = tmp_path/'VOC2007'
    for name in ('Annotations', 'JPEGImages', 'ImageSets/Main'): (home/name).mkdir(parents=True)
    for name in ('1', '2', '5'): Image.fromarray(noise(int(name))).save(home/f'JPEGImages/{name}.jpg')
    (home/'Annotations/1.xml').write_text(xml(thing('cat') + thing() + thing(difficult=1), '1.jpg'))
    (home/'Annotations/2.xml').write_text(xml(thing('cat', difficult=1), '2.jpg'))
    (home/'Annotations/5.xml').write_text(xml())
    (home/'ImageSets/Main/train.txt').write_text('1\n5\n')
    (home/'ImageSets/Main/cat_train.txt').write_text('1 1\n5 -1\n')
    return home


@pytest.mark.parametrize('source', ['', 'Annotations'])
def test_voc(voc, source):
    ds = from_voc(voc/source)
    assert ds.classes == ['cat', 'dog']
    assert ds.paths == ['1.jpg', '2.jpg', '5.jpg']
    assert ds.targets.tolist() == [[1, 1], [1, 0], [0, 0]]
    assert ds.boxes == [[(0, 0, 1, 4, 6), (1, 0, 1, 4, 6), (1, 0, 1, 4, 6)], [(0, 0, 1, 4, 6)], []]
    assert ds[0][0].shape == (3, 48, 48)


@pytest.mark.parametrize('name', ['train', 'cat_train'])
def test_a_split_of_voc(voc, name):
    assert is_voc(voc/f'ImageSets/Main/{name}.txt')
    assert from_voc(voc/f'ImageSets/Main/{name}.txt').paths == ['1.jpg', '5.jpg']


def test_the_flags_of_a_split_of_one_class_are_left_aside(voc):
    [note] = [note for note in from_voc(voc/'ImageSets/Main/cat_train.txt').notes if 'only the names' in note]
    assert note.endswith('their labels are those of the XML files')


def test_difficult_objects_count_unless_they_are_left_out(voc):
    assert f'{voc}: 2 of 4 objects are marked as difficult and count like the others' in from_voc(voc).notes
    ds = from_voc(voc, difficult=False)
    assert ds.targets.tolist() == [[1, 1], [0, 0], [0, 0]]
    assert [len(boxes) for boxes in ds.boxes] == [2, 0, 0]


def test_xml_beside_its_images(root):
    (root/'a.xml').write_text(xml(thing(), 'renamed.jpg'))
    (root/'e.xml').write_text(xml(thing('cat'), 'C:\\photos\\e.png'))
    assert is_voc(root)
    assert from_voc(root).paths == ['a.jpg', 'e.png']


def test_other_xml_is_not_voc(tmp_path):
    (tmp_path/'site.xml').write_text('<?xml version="1.0"?><map/>')
    assert not is_voc(tmp_path)


def test_given_classes_select_objects(voc):
    assert from_voc(voc, classes=['dog']).targets.tolist() == [[1], [0], [0]]
    with pytest.raises(BadDataError, match='no object cow; there are cat, dog'): from_voc(voc, classes=['cow'])


BROKEN_XML = [
    ('<annotation>', '1.xml: not XML'), ('', '1.xml: not XML'), ('<html/>', '1.xml: expected <annotation>, got <html>'),
    ('<!DOCTYPE a [<!ENTITY b "c">]><annotation>&b;</annotation>', 'document type'),
    ('<!DOCTYPE a SYSTEM "file:///etc/passwd"><annotation/>', 'document type'),
    ('<?xml version="1.0" encoding="no-such"?><annotation/>', '1.xml: not XML'),
    (xml('<object/>'), 'object 1 has no name'),
    (xml(thing(box=(9, 2, 4, 6))), 'bndbox of object 1: expected xmin <= xmax'),
    (xml(thing(box=('nan', 2, 4, 6))), 'bndbox of object 1'), (xml(thing(box=('x', 2, 4, 6))), 'bndbox of object 1'),
    (xml(thing(), '../../outside.jpg'), 'outside.jpg')]


@pytest.mark.parametrize('text, why', BROKEN_XML)
def test_what_is_wrong_with_xml_is_said(voc, text, why):
    (voc/'JPEGImages/1.jpg').rename(voc/'JPEGImages/other.jpg')
    (voc/'Annotations/1.xml').write_text(text)
    with pytest.raises(BadDataError, match=why): from_voc(voc)


def test_voc_without_its_bad_files(voc):
    (voc/'Annotations/1.xml').write_text('<annotation>')
    ds = from_voc(voc, skip_bad=True)
    assert ds.paths == ['2.jpg', '5.jpg']
    assert '1.xml: not XML' in ds.skipped[0].message


def test_an_image_set_may_name_what_is_not_there(voc):
    (voc/'ImageSets/Main/train.txt').write_text('1\n7\n')
    with pytest.raises(BadDataError, match=r'7\.xml'): from_voc(voc/'ImageSets/Main/train.txt')


def test_mutated_xml_ends_in_a_sentence(voc):
    rng = random.Random(0)
    good = (voc/'Annotations/1.xml').read_bytes()
    for _ in range(200):
        data = bytearray(good)
        for _ in range(rng.randint(1, 6)): data[rng.randrange(len(data))] = rng.randrange(256)
        (voc/'Annotations/1.xml').write_bytes(bytes(data))
        try: check_listing(read_voc(voc), check='exists')
        except BadDataError as error: assert str(error)
