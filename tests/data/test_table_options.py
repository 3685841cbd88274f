"The options of `cprfl_train` that say how a table is read, on the tables of known data sets"
import pytest
from pictures import noise
from PIL import Image
from table_samples import CHEXPERT, CHEXPERT_CLASSES, DESCRIPTIONS, HPA, NIH, OPEN_IMAGES, PLANET, PLANT

import cprfl.runs.run
from cprfl import cli
from cprfl.runs.build import Splits
from cprfl.runs.recipe import get_recipe


class Stop(Exception):
    "Ends the command with the recipe that it made"


@pytest.fixture
def train(tmp_path, monkeypatch):
    "The data set that `cprfl_train` reads, from a table with these lines and images of these names"
    def stop(recipe, *args, **kw): raise Stop(recipe)
    monkeypatch.setattr(cprfl.runs.run, 'run_recipe', stop)
    monkeypatch.chdir(tmp_path)
    def from_options(lines, images, options, name='t.csv'):
        (tmp_path/name).write_text('\n'.join(lines) + '\n')
        for image in images:
            (tmp_path/image).parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(noise(size=8)).save(tmp_path/image)
        with pytest.raises(Stop) as stopped: cli.train(['--list', name, '--image-size', '32', *options])
        return Splits.read(stopped.value.args[0]).train
    return from_options


def first_fields(lines, suffix=''): return [line.split(',')[0] + suffix for line in lines[1:]]


def counts(dataset): return dict(zip(dataset.classes, (dataset.targets == 1).sum(0).tolist()))


def test_nih(train):
    options = '--path-column', 'Image Index', '--label-column', 'Finding Labels', '--label-separator', '|'
    dataset = train(NIH, first_fields(NIH), options)
    assert counts(dataset) == {'Cardiomegaly': 3, 'Effusion': 1, 'Emphysema': 1, 'No Finding': 1}


def test_nih_without_no_finding(train, tmp_path):
    (tmp_path/'names.txt').write_text('Effusion\nCardiomegaly\nEmphysema\n')
    dataset = train(NIH, first_fields(NIH), ['--classes', 'names.txt'])
    assert counts(dataset) == {'Effusion': 1, 'Cardiomegaly': 3, 'Emphysema': 1}


def test_chexpert(train):
    dataset = train(CHEXPERT, first_fields(CHEXPERT), ['--unknown', 'ignore'])
    assert dataset.classes == CHEXPERT_CLASSES
    assert (dataset.targets == -1).sum() == 35


def test_plant_pathology(train):
    dataset = train(PLANT, first_fields(PLANT), ['--label-separator', ' '])
    assert counts(dataset)['complex'] == 3


def test_hpa(train):
    dataset = train(HPA, first_fields(HPA, '_green.png'), ['--image-suffix', '_green.png'])
    assert counts(dataset) == {'0': 2, '1': 2, '2': 1, '5': 1, '7': 1, '16': 1}


def test_planet(train):
    options = '--label-column', 'tags', '--label-separator', 'space', '--image-suffix', '.jpg'
    assert counts(train(PLANET, first_fields(PLANET, '.jpg'), options))['primary'] == 8


def test_open_images(train, tmp_path):
    (tmp_path/'class-descriptions.csv').write_text('\n'.join(DESCRIPTIONS) + '\n')
    dataset = train(OPEN_IMAGES, first_fields(OPEN_IMAGES, '.jpg'), ['--classes', 'class-descriptions.csv'])
    assert counts(dataset) == {'Bird': 1, 'Sky': 1, 'Head': 0, 'Plant': 0, 'Tree': 1, 'Car': 0}


@pytest.mark.parametrize('name, mark', [
    ('t.tsv', '\t'), ('t.TSV', '\t'), ('t.CSV', ','), ('t.csv', ';'), ('t.tab', '\t')])
def test_a_table_is_known_by_its_ending(train, name, mark):
    dataset = train([f'path{mark}labels', f'a.png{mark}dog|cat'], ['a.png'], [], name)
    assert dataset.classes == ['cat', 'dog']


# ---- other files

def settings(file, **kw):
    return get_recipe('shapes-erm').with_(benchmark=None, train_file=str(file), image_size=32, **kw)


@pytest.fixture
def zoo(tmp_path):
    for name in ('cat', 'dog'):
        (tmp_path/'zoo'/name).mkdir(parents=True)
        Image.fromarray(noise(size=8)).save(tmp_path/'zoo'/name/f'{name}.png')
    (tmp_path/'names.txt').write_text('dog\ncat\n')
    return tmp_path/'zoo'


def test_given_classes_order_those_of_folders(zoo):
    data = Splits.read(settings(zoo, classes=str(zoo.parent/'names.txt')))
    assert data.classes == ['dog', 'cat']


def test_given_classes_order_those_of_coco(zoo):
    (zoo.parent/'c.JSON').write_text(
        '{"images": [{"id": 1, "file_name": "zoo/dog/dog.png"}], "annotations": [{"image_id": 1, "category_id": 2}], '
        '"categories": [{"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}]}')
    data = Splits.read(settings(zoo.parent/'c.JSON', classes=str(zoo.parent/'names.txt')))
    assert counts(data.train) == {'dog': 1, 'cat': 0}


def test_an_option_of_tables_without_effect_is_noted(zoo):
    data = Splits.read(settings(zoo, label_separator=','))
    assert data.train.notes[-1] == f'{zoo} is no table, so label_separator had no effect on it'


@pytest.mark.parametrize('name, why', [
    ('l.txt', r'l.txt is read as a list.*no file .*classes.txt \(--classes'), ('t.xlsx', 'save the table as CSV'),
    ('t.csv.gz', 'unpack it'), ('t.jsonl', 'save its labels as CSV'), ('data.yaml', 'name the folder or the labels')])
def test_files_that_want_something_else(tmp_path, name, why):
    (tmp_path/name).write_text('a.png 0\n')
    with pytest.raises((ValueError, OSError), match=why): Splits.read(settings(tmp_path/name))


def test_a_test_table_is_read_with_the_same_classes_file(tmp_path):
    for name in ('a', 'b'): Image.fromarray(noise(size=8)).save(tmp_path/f'{name}.jpg')
    (tmp_path/'d.csv').write_text('\n'.join(DESCRIPTIONS) + '\n')
    (tmp_path/'t.csv').write_text('ImageID,LabelName,Confidence\na,/m/015p6,1\nb,/m/05s2s,1\n')
    (tmp_path/'v.csv').write_text('ImageID,LabelName,Confidence\nb,/m/05s2s,1\n')
    recipe = settings(tmp_path/'t.csv', test_file=str(tmp_path/'v.csv'), classes=str(tmp_path/'d.csv'))
    assert counts(Splits.read(recipe).test)['Plant'] == 1
