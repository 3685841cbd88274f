"The images of a recipe: a test set in the classes of its run, sets without labels, and shares that hold nothing out"
import json

import numpy as np
import pytest
from PIL import Image

from cprfl import cli
from cprfl.data.images import BadDataError
from cprfl.runs.build import Splits, read_test_file
from cprfl.runs.recipe import get_recipe

LABELS = ['cat', 'dog', 'cat dog', 'owl', 'dog', 'cat'] # of six images


@pytest.fixture
def here(tmp_path, monkeypatch):
    "0.png to 5.png, and a table of them"
    monkeypatch.chdir(tmp_path)
    for i in range(len(LABELS)):
        pixels = np.random.default_rng(i).integers(0, 256, (8, 8, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(f'{i}.png')
    table(tmp_path/'train.csv', range(6))
    return tmp_path


def table(file, images, extra=''):
    lines = [f"{i}.png,{LABELS[i].replace(' ', '|')}" for i in images]
    file.write_text('\n'.join(['path,labels', *lines]) + '\n' + extra)
    return file


def flags(file, images, classes):
    lines = [','.join([f'{i}.png', *(str(int(c in LABELS[i].split())) for c in classes)]) for i in images]
    file.write_text('\n'.join([','.join(['path', *classes]), *lines]) + '\n')
    return file


def coco(file, images, classes):
    shown = [(i, classes.index(c)) for i in images for c in LABELS[i].split() if c in classes]
    file.write_text(json.dumps({
        'images': [{'id': i, 'file_name': f'{i}.png'} for i in images],
        'categories': [{'id': k, 'name': c} for k, c in enumerate(classes)],
        'annotations': [{'image_id': i, 'category_id': k} for i, k in shown]}))
    return file


def ids(folder, images, classes):
    folder.mkdir()
    (folder/'classes.txt').write_text('\n'.join(classes))
    lines = [' '.join([f'{i}.png', *(str(classes.index(c)) for c in LABELS[i].split())]) for i in images]
    (folder/'test.txt').write_text('\n'.join(lines) + '\n')
    return folder/'test.txt'


def folders(folder, images, classes):
    for c in classes: (folder/c).mkdir(parents=True)
    for i in images:
        for c in LABELS[i].split(): (folder/c/f'{i}.png').write_bytes((folder.parent/f'{i}.png').read_bytes())
    return folder


def voc(folder, images, classes):
    folder.mkdir()
    for i in images:
        things = ''.join(f'<object><name>{c}</name></object>' for c in LABELS[i].split())
        (folder/f'{i}.xml').write_text(f'<annotation><filename>{i}.png</filename>{things}</annotation>')
    return folder


def recipe(**kw): return get_recipe('shapes-erm').with_(**dict(benchmark=None, train_file='train.csv') | kw)


def read_test(file, **kw):
    root = '.' if file.suffix in ('.csv', '.json', '.txt') or (file/'0.xml').exists() else None
    return read_test_file(recipe(root=root, **kw), file, ['owl', 'cat', 'dog'], {'tail': [0, 1, 2]})


FORMATS = [
    lambda here, classes: table(here/'test.csv', range(3)),
    lambda here, classes: flags(here/'test.csv', range(3), classes),
    lambda here, classes: coco(here/'c.json', range(3), classes),
    lambda here, classes: ids(here/'list', range(3), classes),
    lambda here, classes: folders(here/'tree', range(3), classes),
    lambda here, classes: voc(here/'xml', range(3), classes)]


@pytest.mark.parametrize('classes', [['dog', 'cat', 'owl'], ['dog', 'cat']])
@pytest.mark.parametrize('write', FORMATS, ids=['table', 'flags', 'coco', 'list', 'folders', 'voc'])
def test_a_test_set_has_the_classes_of_its_run(here, write, classes):
    "In another order, and without one of them"
    test = read_test(write(here, classes))
    assert test.classes == ['owl', 'cat', 'dog']
    assert sorted(test.targets.tolist()) == [[0, 0, 1], [0, 1, 0], [0, 1, 1]]


UNKNOWN = [
    lambda here: table(here/'test.csv', range(3), '3.png,emu\n4.png,emu\n'),
    lambda here: (here/'test.csv').write_text('path,cat,emu\n0.png,1,0\n1.png,0,1\n2.png,0,1\n') and here/'test.csv',
    lambda here: ids(here/'list', [0, 3], ['owl', 'cat', 'dog', 'emu']).write_text('0.png 1\n1.png 3\n2.png 3\n')
    and here/'list/test.txt']


@pytest.mark.parametrize('write', UNKNOWN, ids=['table', 'flags', 'list'])
def test_names_that_the_run_does_not_know_are_listed(here, write):
    with pytest.raises(BadDataError) as error: read_test(write(here))
    assert "label 'emu' is unknown, expected one of owl, cat, dog; so in 2 images" in str(error.value)


def test_unknown_names_without_an_image_are_left_out(here):
    test = read_test(coco(here/'c.json', range(3), ['emu', 'cat', 'dog']))
    assert test.classes == ['owl', 'cat', 'dog']
    assert 'emu are no classes of the training set and are left out' in test.notes[-1]


def test_rows_with_unknown_names_can_be_skipped(here):
    test = read_test(table(here/'test.csv', range(3), '3.png,emu\n'), skip_bad=True)
    assert (len(test), len(test.skipped)) == (3, 1)


def test_a_list_without_class_names_has_those_of_the_run(here):
    file = ids(here/'list', range(3), ['owl', 'cat', 'dog'])
    (here/'list/classes.txt').unlink()
    assert read_test(file).targets.tolist() == [[0, 1, 0], [0, 0, 1], [0, 1, 1]]


def test_a_list_counts_as_the_class_file_of_the_training_list(here):
    "From 1, though no id of the test list shows it"
    (here/'classes.txt').write_text('owl 1\ncat 2\ndog 3\n')
    (here/'t').mkdir()
    (here/'t/test.txt').write_text('0.png 2\n1.png 3\n')
    test = read_test(here/'t/test.txt', train_file=str(here/'train.txt'))
    assert test.targets.tolist() == [[0, 1, 0], [0, 0, 1]]


def test_two_class_files_of_one_list_are_questioned(here):
    file = ids(here/'list', range(3), ['dog', 'cat', 'owl'])
    (here/'names.txt').write_text('owl\ncat\ndog\n')
    with pytest.warns(UserWarning, match='its ids are those of .*names.txt, and not those of .*classes.txt'):
        read_test(file, classes=str(here/'names.txt'))


def test_classes_that_were_chosen_for_training_are_chosen_again(here):
    "In COCO the training left the dog out, so a test set with dogs is fine"
    (here/'names.txt').write_text('cat\nowl\n')
    files = dict(train_file=str(coco(here/'c.json', range(6), ['cat', 'dog', 'owl'])), classes=str(here/'names.txt'),
                 test_file=str(coco(here/'t.json', range(3), ['dog', 'cat'])))
    data = Splits.read(recipe(**files))
    assert data.train.classes == ['cat', 'owl']
    assert data.test.targets.tolist() == [[1, 0], [0, 0], [1, 0]]


# ---- nothing to learn from, nothing to score

@pytest.mark.parametrize('held_out', [0., 0.25])
@pytest.mark.parametrize('write', [
    lambda here: (here/'t.csv').write_text('path,labels\n0.png,\n1.png,\n') and here/'t.csv',
    lambda here: (here/'t.csv').write_text('path,cat,dog\n0.png,0,0\n1.png,0,0\n') and here/'t.csv',
    lambda here: coco(here/'t.json', range(6), ['emu'])], ids=['table', 'flags', 'coco'])
def test_a_set_without_a_label_is_refused(here, write, held_out):
    file = write(here)
    with pytest.raises(ValueError, match=f'{file.name}: none of its [26] images has a label'):
        Splits.read(recipe(train_file=str(file), held_out=held_out))


def test_a_test_set_without_a_label_is_refused(here):
    (here/'t.csv').write_text('path,labels\n0.png,\n')
    with pytest.raises(ValueError, match='t.csv: none of its 1 images has a label, so there is nothing to score'):
        Splits.read(recipe(test_file='t.csv'))


@pytest.mark.parametrize('share', [0.001, 0.2, 0.33])
def test_a_share_that_holds_nothing_out_is_refused(here, share):
    with pytest.raises(ValueError) as error: Splits.read(recipe(held_out=share))
    assert str(error.value).startswith(f'held_out: a share of {share:g} leaves no labelled image to test on')
    assert str(error.value).endswith('the largest class has 3 images: a share of at least 0.34 takes one')


def test_the_share_that_is_named_holds_something_out(here):
    assert Splits.read(recipe(held_out=0.34)).test.targets.any()


# ---- what is said before training

def test_what_was_read_is_said(here, capsys):
    data = Splits.read(recipe(test_file=str(coco(here/'t.json', range(3), ['dog', 'cat']))))
    with pytest.warns(UserWarning, match='3 of the 3 test images are training images'): data.announce(recipe())
    said = capsys.readouterr().out.splitlines()
    assert [line.split('; ')[-1] for line in said if 'classes: ' in line] == ['3 classes: cat (3), dog (3), owl (1)']
    assert '  1 of 3 classes have no image here and are left out of the means: owl' in said


def test_the_classes_of_folders_are_said(here, capsys):
    Splits.read(recipe(train_file=str(folders(here/'tree', range(4), ['cat', 'dog', 'owl'])))).announce(recipe())
    assert '  classes: cat 2, dog 2, owl 1\n' in capsys.readouterr().out


# ---- cprfl_evaluate

TINY = '--recipe shapes-erm --image-size 32 --epochs 1 --batch-size 4 --device cpu --precision fp32'.split()


def test_evaluate_takes_the_classes_of_the_run(here, capsys):
    cli.train([*TINY, '--list', 'train.csv', '--name', 'a'])
    shown = []
    for file in (table(here/'t.csv', range(3)), coco(here/'t.json', range(3), ['dog', 'cat'])):
        capsys.readouterr()
        cli.evaluate(['runs/a', '--list', file])
        shown.append([line for line in capsys.readouterr().out.splitlines() if ' OP ' in line or 'mAP' in line])
    assert shown[0] == shown[1]
