"Class folders: what is a class, what divides the images, and what a program left behind"
import unicodedata

import pytest
from pictures import noise
from PIL import Image

from cprfl.data.dataset import from_folder
from cprfl.data.folders import read_folder
from cprfl.data.images import BadDataError
from cprfl.runs.predict import find_images


def make(root, *names):
    "Small pictures below a folder; other files and folders are empty"
    for i, name in enumerate(names):
        file = root/name
        file.parent.mkdir(parents=True, exist_ok=True)
        if name.endswith('/'): file.mkdir()
        elif file.suffix in ('.png', '.JPG'): Image.fromarray(noise(i, 8)).save(file)
        else: file.touch()
    return root


@pytest.mark.parametrize('train, test', [
    ('train', 'test'), ('Training', 'Testing'), ('train2017', 'val2017'), ('train_set', 'valid'), ('train', 'holdout')])
def test_splits_are_no_classes(tmp_path, train, test):
    make(tmp_path, *(f'{split}/{name}/{split}.png' for split in (train, test) for name in ('cat', 'dog')))
    with pytest.raises(BadDataError) as error: from_folder(tmp_path)
    assert f'--list {tmp_path/train} --test-list {tmp_path/test}' in str(error.value)


def test_a_split_is_read_on_its_own(tmp_path):
    make(tmp_path, 'train/cat/0.png', 'train/dog/1.png', 'test/cat/2.png')
    assert from_folder(tmp_path/'train').classes == ['cat', 'dog']


def test_a_split_alone_is_no_class(tmp_path):
    with pytest.raises(BadDataError, match='train divide the images'): from_folder(make(tmp_path, 'train/cat/0.png'))


def test_splits_beside_other_folders(tmp_path):
    make(tmp_path, 'train/cat/0.png', 'test/cat/1.png', 'notes/2.png')
    with pytest.raises(BadDataError, match='divide the images'): from_folder(tmp_path)


@pytest.mark.parametrize('names', [
    ['bus', 'train'], ['Train', 'bus', 'valid'], ['images', 'texts'], ['cat', 'labels']])
def test_such_names_beside_others_are_classes(tmp_path, names):
    make(tmp_path, *(f'{name}/{name}.png' for name in names))
    assert from_folder(tmp_path).classes == names


def test_given_classes_may_be_called_train_and_test(tmp_path):
    make(tmp_path, 'train/0.png', 'test/1.png')
    assert from_folder(tmp_path, classes=['train', 'test']).targets.tolist() == [[1, 0], [0, 1]]


@pytest.mark.parametrize('files, hint', [
    (['train/0.png', 'test/1.png', 'labels.csv'], 'labels.csv'),
    (['train/0.png', 'train/_annotations.coco.json', 'test/1.png'], 'train/_annotations.coco.json'),
    (['train2017/0.png', 'val2017/1.png', 'annotations/instances.json'], 'annotations/instances.json'),
    (['images/0.png', 'list.txt'], 'list.txt'),
    (['photos/cat/0.png', 'photos/dog/1.png'], 'photos')])
def test_a_folder_of_images_leads_to_its_labels(tmp_path, files, hint):
    make(tmp_path, *files)
    with pytest.raises(BadDataError, match='no folder') as error: from_folder(tmp_path)
    assert f'did you mean {tmp_path/hint}?' in str(error.value)


def test_images_and_labels_of_yolo_are_no_classes(tmp_path):
    make(tmp_path, 'images/0.png', 'labels/0.txt')
    with pytest.raises(BadDataError, match='labels of YOLO, .* are not read: save them as COCO'): from_folder(tmp_path)


LEFT_BEHIND = ['__MACOSX/cat/._0.png', '.ipynb_checkpoints/0.png', '@eaDir/0.png', '$RECYCLE.BIN/0.png', '.DS_Store',
               'Thumbs.db', 'cat/.ipynb_checkpoints/0.png', 'cat/__MACOSX/1.png', 'cat/Thumbs.db', 'cat/._0.png',
               'cat/desktop.ini', 'dog/@eaDir/1.png']


def test_what_programs_leave_behind_is_no_class_and_no_image(tmp_path):
    listing = read_folder(make(tmp_path, 'cat/0.png', 'dog/sub/1.JPG', *LEFT_BEHIND))
    assert listing.classes == ['cat', 'dog']
    assert listing.paths == ['cat/0.png', 'dog/sub/1.JPG']
    assert listing.notes == [f'{tmp_path}: left out $RECYCLE.BIN, @eaDir, __MACOSX']


def test_empty_classes_are_said(tmp_path):
    assert read_folder(make(tmp_path, 'cat/0.png', 'yak/')).notes == [f'{tmp_path}: no image in the folders yak']


def test_one_folder_around_all_others_is_questioned(tmp_path):
    make(tmp_path, 'archive/cat/0.png', 'archive/dog/1.png')
    with pytest.warns(UserWarning, match=f'did you mean {tmp_path}/archive'): read_folder(tmp_path)


def test_folders_that_all_hold_the_same_folders_are_questioned(tmp_path):
    make(tmp_path, 'north/cat/0.png', 'north/dog/1.png', 'south/cat/2.png', 'south/dog/3.png')
    with pytest.warns(UserWarning, match='holds the folders cat, dog; did you mean'): read_folder(tmp_path)


def test_folds_are_no_classes(tmp_path):
    make(tmp_path, 'fold1/cat/0.png', 'fold2/cat/1.png')
    with pytest.raises(BadDataError, match='fold1, fold2 divide the images'): read_folder(tmp_path)


def test_a_folder_of_several_labels_is_questioned(tmp_path):
    make(tmp_path, 'cat/0.png', 'dog/1.png', 'cat,dog/2.png')
    with pytest.warns(UserWarning, match="'cat,dog' is read as a class of its own"): read_folder(tmp_path)


def test_names_are_one_whatever_the_form_of_their_accents(tmp_path):
    "macOS writes an accent as a character of its own"
    make(tmp_path, unicodedata.normalize('NFD', 'café/0.png'))
    assert from_folder(tmp_path).classes == [unicodedata.normalize('NFC', 'café')]
    assert len(from_folder(tmp_path, classes=['café'])) == 1


def test_two_forms_of_one_name_are_refused(tmp_path):
    make(tmp_path, 'caf\u00e9/0.png', 'cafe\u0301/1.png')
    with pytest.raises(BadDataError, match='two folders are named'): from_folder(tmp_path)


def test_links_to_folders_are_followed_but_not_in_circles(tmp_path):
    make(tmp_path, 'cat/0.png', 'more/1.png')
    (tmp_path/'cat/more').symlink_to(tmp_path/'more')
    (tmp_path/'cat/loop').symlink_to(tmp_path/'cat')
    assert read_folder(tmp_path, classes=['cat']).paths == ['cat/0.png', 'cat/more/1.png']


def test_folders_of_voc_are_named(tmp_path):
    make(tmp_path, 'VOC2007/Annotations/0.xml', 'VOC2012/Annotations/1.xml')
    with pytest.raises(BadDataError, match=f'name one of them: {tmp_path}/VOC2007'): from_folder(tmp_path)


def test_a_class_may_be_a_link_inside_the_root(tmp_path):
    make(tmp_path, 'cat/0.png')
    (tmp_path/'kitten').symlink_to(tmp_path/'cat')
    assert from_folder(tmp_path).labels(0) == ['cat', 'kitten']


def test_a_link_does_not_lead_out_of_the_root(tmp_path):
    make(tmp_path, 'root/cat/0.png', 'secret/1.png')
    (tmp_path/'root/dog').symlink_to(tmp_path/'secret')
    with pytest.raises(BadDataError, match='leaves the image root through a link'): from_folder(tmp_path/'root')
    assert len(from_folder(tmp_path/'root', follow_links=True)) == 2


# ---- images and labels

@pytest.fixture
def zoo(tmp_path):
    "cat/1.jpg and dog/1.jpg are one image"
    files = {
        'cat/1.jpg': 1, 'dog/1.jpg': 1, 'dog/sub/2.png': 2, '3.jpg': 3, 'ox/4.jpg': 4, '.hidden/5.jpg': 5,
    }
    root = tmp_path/'zoo'
    for name, seed in files.items():
        (root/name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(noise(seed)).save(root/name)
    (root/'dog/notes.txt').write_text('not an image')
    (root/'yak').mkdir()
    return root


def test_folders(zoo):
    ds = from_folder(zoo)
    assert ds.classes == ['cat', 'dog', 'ox', 'yak']
    assert ds.class_counts.tolist() == [1, 2, 1, 0]
    labels = {path: ds.labels(i) for i, path in enumerate(ds.paths)}
    assert labels == {'3.jpg': [], 'cat/1.jpg': ['cat', 'dog'], 'dog/sub/2.png': ['dog'], 'ox/4.jpg': ['ox']}


def test_given_classes_select_folders(zoo):
    assert from_folder(zoo, classes=['ox', 'cat']).class_counts.tolist() == [1, 1]
    with pytest.raises(BadDataError, match='no folder cow; there are cat, dog, ox, yak'):
        from_folder(zoo, classes=['cow'])


def test_equal_names_with_other_pixels_are_refused(zoo):
    Image.fromarray(noise(6)).save(zoo/'dog/1.jpg')
    with pytest.raises(BadDataError, match='cat/1.jpg and dog/1.jpg have one name but differ'):
        from_folder(zoo)
    assert len(from_folder(zoo, union=False)) == 5


def test_a_folder_without_classes_is_refused(zoo):
    with pytest.raises(BadDataError, match='not a folder'): from_folder(zoo/'none')
    (zoo/'yak/list.csv').write_text('path,labels\n')
    with pytest.raises(BadDataError, match='no folder of a class in it; did you mean .*list.csv'):
        from_folder(zoo/'yak')


# ---- images of a folder

@pytest.mark.parametrize('left', ['@eaDir/1.png', '#recycle/1.png', '.thumbs/1.png', '__MACOSX/1.png', 'sub/.1.png'])
def test_what_programs_leave_behind_is_not_predicted(tmp_path, left):
    make(tmp_path, '1.png', 'sub/2.JPG', left)
    assert find_images([tmp_path]) == [tmp_path/'1.png', tmp_path/'sub/2.JPG']


def test_linked_folders_are_predicted_once(tmp_path):
    make(tmp_path, 'a/1.png', 'b/2.png')
    (tmp_path/'a/there').symlink_to(tmp_path/'b')
    (tmp_path/'a/circle').symlink_to(tmp_path/'a')
    assert find_images([tmp_path/'a']) == [tmp_path/'a/1.png', tmp_path/'a/there/2.png']
