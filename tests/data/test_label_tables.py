"Tables in the forms in which data sets come, and what is said about them"
import warnings

import pytest
from pictures import noise
from PIL import Image
from table_samples import CHEXPERT, CHEXPERT_CLASSES, DESCRIPTIONS, HPA, NIH, OPEN_IMAGES, PLANET, PLANT

from cprfl.data.dataset import from_csv
from cprfl.data.images import BadDataError
from cprfl.data.readers import check_listing
from cprfl.data.tables import read_csv


def problems_of(read, *args, **kw):
    with pytest.raises(BadDataError) as e: read(*args, **kw)
    return e.value.problems


@pytest.fixture
def table(tmp_path):
    "Writes a table of these lines, and returns its path"
    def write(*lines, name='t.csv', encoding='utf-8'):
        (tmp_path/name).write_bytes(('\n'.join(lines) + '\n').encode(encoding))
        return tmp_path/name
    return write


@pytest.fixture
def read(table):
    "Reads a table of these lines; it is an error if there is a warning"
    def from_lines(*lines, **kw):
        with warnings.catch_warnings():
            warnings.simplefilter('error')
            return read_csv(table(*lines), **kw)
    return from_lines


def labels_of(listing):
    "Path -> names of its labels"
    return {row.path: [listing.classes[i] for i in row.labels] for row in listing.rows}


def counts_of(listing):
    return dict(zip(listing.classes, (listing.targets == 1).sum(0).tolist()))


def unknown_of(listing):
    return dict(zip(listing.classes, (listing.targets == -1).sum(0).tolist()))


# ---- names in one column, or zeros and ones

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


BAD_CSV = [ # the record, and what is said about it
    ('a.jpg,cat', None),
    ('b.jpg,zebra', "label 'zebra' is unknown, expected one of cat, dog"),
    ('', 'empty line'),
    ('c.jpg,cat|cat', "duplicate label 'cat'"),
    ('a.jpg,dog', 'duplicate image'),
    ('d.jpg', 'expected 2 fields, got 1'),
    ('"../outside.jpg",cat', 'leaves the image root'),
    (',cat', 'the path is empty'),
    ('none.jpg,cat', 'image is missing'),
]


@pytest.fixture
def bad_csv(root):
    (root/'t.csv').write_text('\n'.join(['path,labels', *(text for text, _ in BAD_CSV)]) + '\n')
    return root/'t.csv'


def test_csv_problems_have_lines(bad_csv):
    wrong = [(n, message) for n, (_, message) in enumerate(BAD_CSV, 2) if message]
    problems = problems_of(from_csv, bad_csv, classes=['cat', 'dog'])
    assert [p.line for p in problems] == [n for n, _ in wrong]
    for problem, (_, message) in zip(problems, wrong): assert message in problem.message


def test_csv_without_its_bad_records(bad_csv):
    ds = from_csv(bad_csv, classes=['cat', 'dog'], skip_bad=True)
    assert ds.paths == ['a.jpg']
    assert len(ds.skipped) == 8


@pytest.fixture
def flags_csv(root):
    (root/'t.csv').write_text('path,split,cat,dog\na.jpg,train,1,0\nb.jpg,test,x,1\n')
    return root/'t.csv'


def test_given_classes_select_columns(flags_csv):
    ds = from_csv(flags_csv, classes=['dog', 'cat'], skip_bad=True)
    assert ds.targets.tolist() == [[0, 1]]


def test_a_flag_that_is_no_flag_is_refused(flags_csv):
    with pytest.raises(BadDataError, match="t.csv:3: column 'cat' is 'x', expected 0 or 1"):
        from_csv(flags_csv, classes=['dog', 'cat'])


def test_a_class_without_a_column_is_refused(flags_csv):
    with pytest.raises(BadDataError, match='no column cow; the columns are path, split'):
        from_csv(flags_csv, classes=['cow'])


@pytest.mark.parametrize('text, why', [
    ('file,cat\na.jpg,1\n', 'no column path, image or filename'),
    ('path\na.jpg\n', 'no column holds labels'),
    ('path,split\na.jpg,train\n', r'no column labels \(with names\), nor one of 0 and 1 for each class'),
    ('path,cat,cat\na.jpg,1,1\n', 'two columns'),
    ('', 'the file is empty')])
def test_tables_that_are_refused(root, text, why):
    (root/'t.csv').write_text(text)
    with pytest.raises(BadDataError, match=why): from_csv(root/'t.csv')


# ---- data sets as they come

NIH_CLASSES = ['Cardiomegaly', 'Effusion', 'Emphysema', 'Hernia']


def test_nih_chest_xray14(read):
    listing = read(*NIH)
    assert counts_of(listing) == {'Cardiomegaly': 3, 'Effusion': 1, 'Emphysema': 1, 'No Finding': 1}


def test_no_finding_is_no_label_if_it_is_no_class(read):
    listing = read(*NIH, classes=NIH_CLASSES)
    assert not any(row.problems for row in listing.rows)
    assert counts_of(listing) == {'Cardiomegaly': 3, 'Effusion': 1, 'Emphysema': 1, 'Hernia': 0}
    assert "'No Finding' is no label" in listing.notes[0]


def test_chexpert_with_unknown_labels_to_ignore(read):
    listing = read(*CHEXPERT, unknown='ignore')
    assert listing.classes == CHEXPERT_CLASSES
    assert {name: n for name, n in counts_of(listing).items() if n} == {
        'No Finding': 1, 'Lung Opacity': 2, 'Fracture': 2, 'Support Devices': 1}
    assert unknown_of(listing)['Edema'] == 3
    assert unknown_of(listing)['Pneumothorax'] == 2


@pytest.mark.parametrize('unknown, edema', [('negative', 0), ('positive', 3)])
def test_chexpert_with_unknown_labels_as_yes_or_no(read, unknown, edema):
    listing = read(*CHEXPERT, unknown=unknown)
    assert counts_of(listing)['Edema'] == edema
    assert (listing.targets >= 0).all()


def test_chexpert_without_a_choice_names_the_option(read):
    listing = read(*CHEXPERT)
    with pytest.raises(BadDataError, match=r'expected 0 or 1 \(and \d+ more columns\).*--unknown'):
        check_listing(listing, check='none')


def test_the_choice_for_unknown_labels_is_checked(table):
    with pytest.raises(ValueError, match='unknown: expected one of negative, ignore, positive'):
        read_csv(table(*CHEXPERT), unknown='maybe')


def test_plant_pathology(read):
    assert counts_of(read(*PLANT)) == {
        'complex': 3, 'frog_eye_leaf_spot': 2, 'healthy': 2, 'powdery_mildew': 2, 'rust': 1, 'scab': 2}


def test_hpa(read):
    listing = read(*HPA, image_suffix='_green.png')
    assert counts_of(listing) == {'0': 2, '1': 2, '2': 1, '5': 1, '7': 1, '16': 1}
    assert listing.paths[2] == '000a9596-bbc4-11e8-b2bc-ac1f6b6435d0_green.png'


def test_hpa_with_names_for_its_ids(read):
    listing = read(*HPA, classes=[f'part {i}' for i in 'abcdefghijklmnopqrstuvwxyzäö'])
    assert labels_of(listing)['00070df0-bbc3-11e8-b2bc-ac1f6b6435d0'] == ['part q', 'part a']


@pytest.mark.parametrize('names', [
    ('0 zebra', '5 ox'), ('zebra 0', 'ox 1'), ('id,name', '0,zebra', '5,ox'), ('{"0": "zebra", "5": "ox"}',)])
def test_ids_of_a_class_file(read, table, names):
    ids = '5' if '5' in ''.join(names) else '1'
    listing = read('path,labels', 'a.jpg,0', f'b.jpg,0 {ids}', classes=table(*names, name='classes.csv'))
    assert labels_of(listing) == {'a.jpg': ['zebra'], 'b.jpg': ['zebra', 'ox']}


def test_ids_that_may_count_from_one_are_warned_of(table):
    with pytest.warns(UserWarning, match='neither 0 nor 4 is among them; they are read as counting from 0'):
        listing = read_csv(table('path,labels', 'a.jpg,1', 'b.jpg,2'), classes=list('abcd'))
    assert labels_of(listing) == {'a.jpg': ['b'], 'b.jpg': ['c']}


def test_planet(read, tmp_path):
    Image.fromarray(noise()).save(tmp_path/'train_0.jpg')
    listing = read(*PLANET)
    assert counts_of(listing) == {'agriculture': 4, 'clear': 6, 'cloudy': 1, 'cultivation': 2, 'habitation': 1,
                                  'haze': 2, 'primary': 8, 'road': 2, 'water': 3}
    assert listing.paths[1] == 'train_1.jpg'


def test_a_few_rows_of_planet_with_a_separator(read):
    listing = read(*PLANET[:3], label_separator=' ', image_suffix='.jpg')
    assert labels_of(listing)['train_0.jpg'] == ['haze', 'primary']


def test_open_images_has_a_row_for_each_label(read):
    listing = read(*OPEN_IMAGES, image_suffix='.jpg')
    assert labels_of(listing) == {'000026e7ee790996.jpg': ['/m/01bqvp', '/m/07j7r'],
                                  '000062a39995e348.jpg': ['/m/015p6']}


def test_open_images_with_display_names(read, table):
    names = table(*DESCRIPTIONS, name='class-descriptions-boxable.csv')
    listing = read(*OPEN_IMAGES, classes=names)
    assert counts_of(listing) == {'Bird': 1, 'Sky': 1, 'Head': 0, 'Plant': 0, 'Tree': 1, 'Car': 0}


def test_what_open_images_never_asked_is_unknown(read, table):
    names = table(*DESCRIPTIONS, name='class-descriptions.csv')
    listing = read(*OPEN_IMAGES, classes=names, unknown='ignore')
    assert listing.targets.tolist() == [[-1, 1, 0, -1, 1, -1], [1, -1, -1, 0, -1, -1]]


def test_descriptions_with_a_header(read, table):
    names = table('LabelName,DisplayName', *DESCRIPTIONS, name='class-descriptions.csv')
    assert read(*OPEN_IMAGES, classes=names).classes[:2] == ['Bird', 'Sky']


def test_rows_that_contradict_each_other_are_reported(read):
    listing = read('ImageID,LabelName,Confidence', 'a,/m/1,1', 'a,/m/1,0', 'b,/m/1,1')
    assert listing.rows[1].problems == ['a has this label with confidence 1 and 0, from line 2 on']


def test_a_bad_row_of_many_has_its_own_line(table):
    rows = 'a.jpg,dog', 'a.jpg,cat', 'a.jpg,zebra', ',dog', ',cat'
    listing = read_csv(table('path,label', *rows), classes=['dog', 'cat'])
    problems = problems_of(check_listing, listing, check='none')
    assert [problem.line for problem in problems] == [4, 5, 6]


def test_a_bad_row_of_many_leaves_the_others(table):
    listing = read_csv(table('path,label', 'a.jpg,zebra', 'a.jpg,cat', 'a.jpg,dog'), classes=['dog', 'cat'])
    assert check_listing(listing, skip_bad=True, check='none').targets.tolist() == [[1, 1]]


def test_celeba_says_no_with_minus_one(read):
    listing = read('image_id,Bald,Male', '000001.jpg,-1,1', '000002.jpg,-1,-1', unknown='negative')
    assert listing.targets.tolist() == [[0, 1], [0, 0]]


def test_one_row_for_each_label_without_confidence(read):
    listing = read('path,label', 'a.jpg,dog', 'b.jpg,cat', 'a.jpg,cat', 'a.jpg,dog')
    assert labels_of(listing) == {'a.jpg': ['cat', 'dog'], 'b.jpg': ['cat']}
    assert 'one label of an image in each of 4 rows' in listing.notes[0]


def test_rows_that_repeat_a_label_are_counted(read):
    listing = read('path,label', 'a.jpg,dog', 'a.jpg,dog', 'b.jpg,cat')
    assert 'in each of 3 rows, 1 of them repeat another' in listing.notes[0]


# ---- cells of labels

SAME = {'a.jpg': ['dog', 'person'], 'b.jpg': ['dog'], 'c.jpg': ['person'], 'd.jpg': []}


@pytest.mark.parametrize('cells', [
    ('dog|person', 'dog', 'person', ''), ('dog; person', 'dog', 'person', ''), ('"dog, person"', 'dog', 'person', ''),
    ('dog#person', 'dog', 'person', ''), ('dog person', 'dog', 'person', ''), ('"dog\nperson"', 'dog', 'person', ''),
    ('"[\'dog\', \'person\']"', '"[\'dog\']"', '"[\'person\']"', '[]'),
    ('"[""dog"", ""person""]"', '"[""dog""]"', '"[""person""]"', '[]'),
    ('"{\'dog\', \'person\'}"', "{'dog'}", "{'person'}", ''),
    ('"(\'dog\', \'person\')"', '"(\'dog\',)"', '"(\'person\',)"', '()'),
    ("['dog' 'person']", "['dog']", "['person']", '[]'), ('"[dog, person]"', '[dog]', '[person]', '[]'),
    ('"[""dog"", ""person"", ""dog""]"', '"[""dog""]"', '"[""person""]"', '[]'),
    ('"dog,person,"', '"dog,"', 'person', ''),
    ('"{""choices"":[""dog"",""person""]}"', 'dog', 'person', ''), ('dog|person|', '|dog', ' person ', 'nan')])
def test_cells_with_several_labels(read, cells):
    listing = read('image,labels', *(f'{n}.jpg,{cell}' for n, cell in zip('abcd', cells)))
    assert labels_of(listing) == SAME


@pytest.mark.parametrize('names', [
    ['traffic light', 'dog'], ['traffic light', 'stop sign', 'dog'], ['red square', 'blue square', 'red circle'],
    ['Acer rubrum', 'Acer saccharum', 'Quercus alba', 'Quercus rubra'], ['C#', 'C'], ['AC/DC', 'Queen'], ['[x'],
    ['[unclear]', '(sic)', 'dog'],
    ['rock & roll', 'jazz'], ["women's shoes", 'hats']])
def test_names_that_stay_whole(read, names):
    listing = read('image,labels', *(f'{i}.jpg,{name}' for i, name in enumerate(names)))
    assert listing.classes == sorted(names)


@pytest.mark.parametrize('cells, why', [
    (['"bald eagle, sea eagle"', 'dog'], "'bald eagle, sea eagle' is read as 'bald eagle' and 'sea eagle', but"),
    (['hot dog', 'dog'], "'hot dog' is read as one name, but"),
    (['left lung', 'right lung', 'left kidney', 'right kidney', 'lung'], "'left lung' is read as one name, but"),
    (['dog|cat', 'dog/cat'], "the class 'dog/cat' looks like several names"),
    (['"[{""label"": ""dog""}]"'], 'is no list of names, so it is read as text'),
    (['"{""class"": ""cat""}"'], 'is no list of names, so it is read as text; a list of names can be read'),
    (['"{""bbox"": [1, 2, 3, 4], ""labels"": [""dog""]}"'], 'is no list of names'),
    (['"{""cat"": 1, ""dog"": 2}"'], 'is no list of names'), (['{cat: 1}'], 'is no list of names'),
    (['"[{\'label\': \'dog\', \'crowd\': false}]"'], 'is no list of names'),
    (['N/A', 'dog'], "'N/A' is read as the name of a class, but it may stand for no label"),
    (['-', 'dog'], "'-' is read as the name of a class"),
    (['"[0, 1]"', '"[1, 0]"'], 'read as no and yes of two classes, but they may be ids')])
def test_a_second_reading_is_warned_of(table, cells, why):
    lines = [f'{i}.jpg,{cell}' for i, cell in enumerate(cells)]
    with pytest.warns(UserWarning, match=why): read_csv(table('path,labels', *lines))


def test_a_dictionary_that_is_no_list_stays_whole(table):
    with pytest.warns(UserWarning): listing = read_csv(table('path,labels', 'a.jpg,"{""bbox"": [1, 2], ""is"": [3]}"'))
    assert listing.classes == ['{"bbox": [1, 2], "is": [3]}']


@pytest.mark.parametrize('cells', [
    ('{"cat": 1, "dog": 0}', '{"cat": 0, "dog": 1}'), ("{'cat': True, 'dog': False}", "{'dog': True}"),
    ('{"cat": "yes", "dog": "no"}', '{"dog": 1.0}'), ('{"by": "me", "labels": ["cat"]}', '{"labels": ["dog"]}')])
def test_cells_with_dictionaries(read, cells):
    first, second = (cell.replace('"', '""') for cell in cells)
    listing = read('path,labels', f'a.jpg,"{first}"', f'b.jpg,"{second}"')
    assert labels_of(listing) == {'a.jpg': ['cat'], 'b.jpg': ['dog']}


def test_a_dictionary_names_classes_without_an_image(read):
    listing = read('path,labels', 'a.jpg,"{""cat"": 1, ""owl"": 0}"')
    assert counts_of(listing) == {'cat': 1, 'owl': 0}


def test_given_classes_settle_how_names_are_divided(read):
    rows = 'path,labels', 'a.jpg,left lung', 'b.jpg,right kidney', 'c.jpg,left lung right kidney'
    assert labels_of(read(*rows[:3], classes=['left', 'right', 'lung', 'kidney']))['a.jpg'] == ['left', 'lung']
    assert labels_of(read(*rows[:3], classes=['left lung', 'right kidney']))['a.jpg'] == ['left lung']


@pytest.mark.parametrize('separator, names', [
    (',', ['a b', 'c|d']), ('comma', ['a b', 'c|d']), (' ', ['a', 'b,c|d']), ('|', ['a b,c', 'd']),
    ('none', ['a b,c|d']), (', ', ['a b', 'c|d'])])
def test_a_given_separator_is_the_only_one(read, separator, names):
    listing = read('path,labels', '1.jpg,"a b,c|d"', label_separator=separator)
    assert listing.classes == names


def test_lists_are_read_with_any_separator_but_none(read):
    assert read('path,labels', '1.jpg,"[""a"", ""b""]"', label_separator=',').classes == ['a', 'b']
    assert read('path,labels', '1.jpg,[a]', label_separator='none').classes == ['[a]']


@pytest.mark.parametrize('cells, names', [
    (['001', '1', '10'], ['001', '1', '10']), (['"[2, 10]"', '[1]'], ['1', '2', '10']),
    (['3.0', '17.0', ''], ['3', '17']), (['"1,2"', '2'], ['1', '2'])])
def test_ids_are_texts(read, cells, names):
    listing = read('path,labels', *(f'{i}.jpg,{cell}' for i, cell in enumerate(cells)))
    assert listing.classes == names


@pytest.mark.parametrize('cells', [
    ('"[1, 0, 1]"', '"[0, 0, 1]"'), ('[1. 0. 1.]', '[0. 0. 1.]'), ('1 0 1', '0 0 1'), ('1|0|1', '0|0|1'),
    ('"[true, false, true]"', '"[false, false, true]"')])
def test_vectors_of_zeros_and_ones(read, cells):
    listing = read('path,labels', f'a.jpg,{cells[0]}', f'b.jpg,{cells[1]}', classes=['cat', 'dog', 'ox'])
    assert labels_of(listing) == {'a.jpg': ['cat', 'ox'], 'b.jpg': ['ox']}


def test_vectors_for_another_number_of_classes_are_refused(table):
    with pytest.raises(BadDataError, match='3 zeros and ones in a cell, for 2 classes'):
        read_csv(table('path,labels', 'a.jpg,1 0 1', 'b.jpg,0 0 1'), classes=['cat', 'dog'])


def test_vectors_without_classes_number_them(read):
    listing = read('path,labels', 'a.jpg,"[0, 1, 1]"', 'b.jpg,"[0, -1, 1]"', unknown='ignore')
    assert listing.classes == ['0', '1', '2']
    assert listing.targets.tolist() == [[0, 1, 1], [0, -1, 1]]


@pytest.mark.parametrize('blank', ['nan', 'null', '<NA>', ''])
def test_a_blank_cell_among_vectors_is_unknown(read, blank):
    listing = read('path,labels', 'a.jpg,"[0, 1, 1]"', f'b.jpg,{blank}', unknown='ignore')
    assert listing.targets.tolist() == [[0, 1, 1], [-1, -1, -1]]


# ---- columns

@pytest.mark.parametrize('header, rows, aside', [
    ('image,is_valid,dog,cat', ['a.jpg,0,1,0', 'b.jpg,1,0,1'], 'is_valid'),
    ('image,dog,cat,split', ['a.jpg,1,0,0', 'b.jpg,0,1,1'], 'split'),
    ('image,dog,cat,fold', ['a.jpg,1,0,train', 'b.jpg,0,1,test'], 'fold'),
    (',image,dog,cat', ['0,a.jpg,1,0', '1,b.jpg,0,1'], "''"),
    ('Unnamed: 0,image,dog,cat', ['0,a.jpg,1,0', '1,b.jpg,0,1'], 'Unnamed'),
    ('image,patient_id,dog,cat', ['a.jpg,1,1,0', 'b.jpg,1,0,1'], 'patient_id'),
    ('image,width,dog,cat,note', ['a.jpg,640,1,0,', 'b.jpg,480,0,1,blurred'], 'width'),
    ('image,dog,cat,count', ['a.jpg,1,0,1', 'b.jpg,0,1,3'], 'count'),
    ('image,train,test,dog,cat', ['a.jpg,1,0,1,0', 'b.jpg,0,1,0,1'], 'train')])
def test_columns_that_are_no_classes(read, header, rows, aside):
    listing = read(header, *rows)
    assert labels_of(listing) == {'a.jpg': ['dog'], 'b.jpg': ['cat']}
    assert aside in listing.notes[1]


def test_a_class_may_be_called_train(read):
    assert read('image,train,orchid,android', 'a.jpg,1,0,1').classes == ['train', 'orchid', 'android']


@pytest.mark.parametrize('names', [('кот', '猫'), ('0', '1'), ('+', '?'), ('index', 'thumb')])
def test_names_of_every_kind_are_classes(read, names):
    listing = read(','.join(['image', *names]), 'a.jpg,1,0', 'b.jpg,0,1', 'c.jpg,1,0')
    assert counts_of(listing) == {names[0]: 2, names[1]: 1}


def test_targets_without_names_as_pandas_writes_them(read):
    listing = read(',0,1,2', 'a.jpg,1,0,1', 'b.jpg,0,1,0')
    assert labels_of(listing) == {'a.jpg': ['0', '2'], 'b.jpg': ['1']}


def test_a_mistake_does_not_make_a_column_something_else(read):
    listing = read('image,dog', *(f'{i}.jpg,{i % 2}' for i in range(30)), 'x.jpg,maybe')
    assert listing.rows[-1].problems == ["column 'dog' is 'maybe', expected 0 or 1"]


@pytest.mark.parametrize('yes, no', [
    ('yes', 'no'), ('Y', 'N'), ('TRUE', 'FALSE'), ('1.00', '0.00'), ('"1,0"', '"0,0"')])
def test_spellings_of_yes_and_no(read, yes, no):
    listing = read('image,dog,cat', f'a.jpg,{yes},{no}', f'b.jpg,{no},{yes}')
    assert labels_of(listing) == {'a.jpg': ['dog'], 'b.jpg': ['cat']}


@pytest.mark.parametrize('header, rows, why', [
    ('image,dog,cat,reviewed', ['a.jpg,1,0,yes', 'b.jpg,0,1,no'], 'column reviewed .* because other columns hold'),
    ('image,dog,cat,owl', ['a.jpg,1,0,1', 'b.jpg,0,1,2', 'c.jpg,0,1,0'], "column owl is no class, .* '2' is neither"),
    ('image,regions,about', ['a.jpg,1,dog', 'b.jpg,1,cat'], 'only the column regions holds 0 and 1')])
def test_columns_that_may_be_classes_are_warned_of(table, header, rows, why):
    with pytest.warns(UserWarning, match=why): read_csv(table(header, *rows))


def test_a_cell_that_is_no_flag_is_named(table):
    [problem] = problems_of(read_csv, table('image,dog,cat', 'a.jpg,x,', 'b.jpg,x,x'))
    assert "; cat holds 'x'; the columns are image, dog, cat" in problem.message


def test_choices_of_label_studio(read):
    listing = read('annotator,choice,image', '1,"{""choices"":[""cat"",""dog""]}",a.jpg', '1,cat,b.jpg')
    assert labels_of(listing) == {'a.jpg': ['cat', 'dog'], 'b.jpg': ['cat']}


def test_a_column_of_splits_is_noted(read):
    listing = read('image,labels,split', 'a.jpg,cat,train', 'b.jpg,dog,test')
    assert listing.notes[-1] == "t.csv: all rows are read, whatever 'split' says of them (train, test)"


def test_a_label_in_another_case_is_asked_about(read):
    listing = read('image,labels', 'a.jpg,Cat', classes=['cat', 'dog'])
    assert listing.rows[0].problems[0].endswith('did you mean cat?')


def test_names_are_preferred_to_numbers(table):
    with pytest.warns(UserWarning, match='class_name, label may all hold labels; class_name is read'):
        listing = read_csv(table('image,label,class_name', 'a.jpg,3,dog', 'b.jpg,4,cat'))
    assert listing.classes == ['cat', 'dog']


def test_a_lone_label_column_of_zeros_and_ones(table):
    rows = table('image,label', 'a.jpg,0', 'b.jpg,1')
    with pytest.warns(UserWarning, match='the column label holds 0 and 1'): listing = read_csv(rows)
    assert labels_of(listing) == {'a.jpg': [], 'b.jpg': ['label']}
    assert read_csv(rows, label_column='label').classes == ['0', '1']


@pytest.mark.parametrize('blank', ['', 'nan'])
def test_zeros_and_ones_are_ids_of_given_classes(read, blank):
    listing = read('image,label', 'a.jpg,0', 'b.jpg,1', f'c.jpg,{blank}', classes=['cat', 'dog'])
    assert labels_of(listing) == {'a.jpg': ['cat'], 'b.jpg': ['dog'], 'c.jpg': []}


def test_zeros_and_ones_are_classes_of_the_run(root):
    (root/'t.csv').write_text('image,label\na.jpg,0\nb.jpg,1\n')
    dataset = from_csv(root/'t.csv', match=['0', '1', '2'])
    assert dataset.targets.tolist() == [[1, 0, 0], [0, 1, 0]]


def test_a_label_column_beside_given_classes_is_a_flag(table):
    with pytest.warns(UserWarning, match='no column cow'):
        listing = read_csv(table('image,dog,label', 'a.jpg,1,0', 'b.jpg,0,1'), classes=['cow', 'dog'])
    assert labels_of(listing) == {'a.jpg': ['dog'], 'b.jpg': []}


def test_a_class_of_a_one_hot_table_may_be_called_label(read):
    listing = read('image,label,dog', 'a.jpg,0,1', 'b.jpg,1,1', classes=['dog', 'label'])
    assert labels_of(listing) == {'a.jpg': ['dog'], 'b.jpg': ['dog', 'label']}


def test_a_given_class_without_a_column_is_an_empty_class(table):
    with pytest.warns(UserWarning, match='no column cow, so no image has such a label'):
        listing = read_csv(table('path,dog', 'a.jpg,1'), classes=['cow', 'dog'])
    assert listing.targets.tolist() == [[0, 1]]


def test_columns_can_be_named(read):
    listing = read('image,where,what', '7,a.jpg,dog', path_column='WHERE', label_column='what')
    assert labels_of(listing) == {'a.jpg': ['dog']}


@pytest.mark.parametrize('name', ['标签', '标 签', 'КОТ', '#'])
def test_columns_of_every_script_can_be_named(read, name):
    listing = read('path,+,кот,标签,#', 'a.jpg,no,cat,tag,hash', label_column=name)
    assert listing.classes == [{'标': 'tag', 'К': 'cat'}.get(name[0], 'hash')]


@pytest.mark.parametrize('kw, why', [
    (dict(path_column='where', label_column='标鉴'), "label_column: no column '标鉴'"),
    (dict(path_column='were'), "path_column: no column 'were'; did you mean where?; the columns are where, what"),
    (dict(path_column='where', label_column='x'), "label_column: no column 'x'")])
def test_a_column_that_is_not_there(table, kw, why):
    with pytest.raises(BadDataError, match=why.replace('?', r'\?')):
        read_csv(table('where,what', 'a.jpg,dog'), **kw)


def test_a_table_without_a_header_is_refused(table):
    with pytest.raises(BadDataError, match='the first line names an image, expected a header'):
        read_csv(table('a.jpg,dog', 'b.jpg,cat'))


def test_the_column_that_holds_files_is_the_path(read):
    assert read('image,path,labels', '7,a.jpg,dog').paths == ['a.jpg']


# ---- paths without an ending

def test_endings_are_looked_up(read, tmp_path):
    for name in ('1.JPG', '2.png'): Image.fromarray(noise()).save(tmp_path/name)
    listing = read('image,labels', '1,dog', '2,cat', '3.png,cat')
    assert listing.paths == ['1.JPG', '2.png', '3.png']
    assert 'with .JPG or .png added' in listing.notes[0]


def test_an_index_of_file_names_is_the_path(read):
    assert labels_of(read(',dog,cat', 'a.jpg,1,0', 'b.jpg,0,1')) == {'a.jpg': ['dog'], 'b.jpg': ['cat']}


def test_two_files_for_one_path_are_a_second_reading(table, tmp_path):
    for name in ('1.jpg', '1.png'): Image.fromarray(noise()).save(tmp_path/name)
    with pytest.warns(UserWarning, match='1 is there with .jpg, .png; .jpg is read'):
        read_csv(table('image,labels', '1,dog'))


def test_a_given_ending_is_added_once(read):
    listing = read('image,labels', '001,dog', '1.PNG,cat', image_suffix='.png')
    assert listing.paths == ['001.png', '1.PNG']


# ---- delimiters and encodings

@pytest.mark.parametrize('mark', [',', ';', '\t', '|'])
@pytest.mark.parametrize('encoding', ['utf-8', 'utf-8-sig', 'utf-16', 'utf-16-le', 'utf-16-be'])
def test_delimiters_and_encodings(table, mark, encoding):
    rows = [('path', 'Löwe', 'dog'), ('a.jpg', '1', '0'), ('b.jpg', '0', '1')]
    listing = read_csv(table(*map(mark.join, rows), encoding=encoding))
    assert labels_of(listing) == {'a.jpg': ['Löwe'], 'b.jpg': ['dog']}


def test_semicolons_with_commas_in_the_cells(read):
    assert labels_of(read('path;labels', 'a.jpg;dog,cat', 'b.jpg;dog'))['a.jpg'] == ['dog', 'cat']


@pytest.mark.parametrize('line', ['sep=;', '"sep=;"'])
def test_excel_names_its_delimiter(read, line):
    listing = read(line, 'path;labels', 'a.jpg;dog|cat')
    assert labels_of(listing) == {'a.jpg': ['dog', 'cat']}
    assert listing.rows[0].line == 3


@pytest.mark.parametrize('line', ['sep=,', '"sep=,"'])
def test_excel_names_the_delimiter_of_descriptions(read, table, line):
    names = table(line, '/m/1,Bird', '/m/2,Tree', name='names.csv')
    assert read('path,labels', 'a.jpg,/m/2', classes=names).classes == ['Bird', 'Tree']


@pytest.mark.parametrize('line', ['path,' + 'x' * 140_000, 'path,labels\na.jpg,' + 'x' * 140_000])
def test_a_field_that_is_too_long_is_a_sentence(table, line):
    with pytest.raises(BadDataError, match='field larger than field limit'): read_csv(table(line))


def test_another_code_page_is_a_guess(table):
    with pytest.warns(UserWarning, match="t.csv:2: not UTF-8 text; it is read as cp1252, with words like 'Löwe'"):
        assert read_csv(table('path,labels', 'a.jpg,Löwe', encoding='cp1252')).classes == ['Löwe']


def test_bytes_of_no_code_page_are_refused(tmp_path):
    (tmp_path/'t.csv').write_bytes('path,labels\na.jpg,犬ソ\n'.encode('shift-jis') + b'b.jpg,\x81\n')
    with pytest.raises(BadDataError, match='t.csv:2: expected UTF-8 text.*save the table as UTF-8'):
        read_csv(tmp_path/'t.csv')


def test_a_header_with_spaces_and_blank_columns(read):
    listing = read(' Path , Labels ,,', 'a.jpg, "dog, cat" ,,', 'b.jpg,dog,,', ',,,', '')
    assert labels_of(listing) == {'a.jpg': ['dog', 'cat'], 'b.jpg': ['dog']}


@pytest.mark.parametrize('text, why', [
    ('path,labels\na.jpg,"dog\nb.jpg,cat\n', 't.csv:2: a quote is not closed'),
    ('path,labels\na.jpg,dog,cat\n', 'expected 2 fields, got 3; a field with the delimiter in it needs quotes')])
def test_fields_that_run_over(tmp_path, text, why):
    (tmp_path/'t.csv').write_text(text)
    with pytest.raises(BadDataError, match=why): check_listing(read_csv(tmp_path/'t.csv'), check='none')


# ---- a test set

def test_the_classes_of_training_help_to_read_a_test_table(root):
    (root/'t.csv').write_text('path,labels\na.jpg,scab rust\n')
    dataset = from_csv(root/'t.csv', match=['healthy', 'rust', 'scab'])
    assert dataset.targets.tolist() == [[0, 1, 1]]


# ---- what is said

def test_the_note_says_what_was_taken_for_what(read):
    listing = read(*NIH)
    assert listing.notes == [
        "t.csv (UTF-8, commas between columns): 4 images from 'Image Index'; labels from 'Finding Labels', split at "
        "'|'; 4 classes: Cardiomegaly (3), Effusion (1), Emphysema (1), No Finding (1)", listing.notes[1]]


UNCLEAR = 'path,labels', 'a.jpg,dog|cat', 'b.jpg,', 'c.jpg,u', 'd.jpg,-1', 'e.jpg,nan', 'f.jpg,dog'


@pytest.mark.parametrize('unknown, value', [('ignore', -1), ('negative', 0)])
def test_a_label_that_is_unknown(read, unknown, value):
    listing = read(*UNCLEAR, unknown=unknown)
    assert listing.classes == ['cat', 'dog']
    assert listing.targets.tolist() == [[1, 1], *[[value, value]] * 4, [0, 1]]


def test_a_label_that_is_unknown_is_no_yes(table):
    listing = read_csv(table(*UNCLEAR), unknown='positive')
    with pytest.raises(BadDataError, match='t.csv:3: its label is unknown.*can be negative or ignore'):
        check_listing(listing)


def test_the_note_counts_the_labels_of_unclear_cells(read):
    assert read(*UNCLEAR, unknown='ignore').notes[0].endswith('cat (1), dog (2); 8 unknown labels are ignored')


def test_a_class_that_is_given_is_not_unknown(read):
    listing = read('path,labels', 'a.jpg,u', 'b.jpg,v', 'c.jpg,', classes=['u', 'v'], unknown='ignore')
    assert listing.targets.tolist() == [[1, 0], [0, 1], [-1, -1]]


def test_one_row_of_an_image_may_be_unclear(read):
    listing = read('path,label', 'a.jpg,', 'a.jpg,dog', 'b.jpg,cat', unknown='ignore')
    assert listing.targets.tolist() == [[-1, 1], [1, 0]]


def test_no_finding_is_known(read):
    listing = read('path,labels', 'a.jpg,none', 'b.jpg,cat', classes=['cat'], unknown='ignore')
    assert listing.targets.tolist() == [[0], [1]]


def test_a_separator_without_effect_is_noted(read):
    listing = read('path,cat,dog', 'a.jpg,1,0', 'b.jpg,0,1', label_separator='|')
    assert listing.notes[-1] == 't.csv: each class has a column of its own, so label_separator had no effect'


def test_the_note_counts_unknown_labels(read):
    listing = read('path,cat,dog', 'a.jpg,1,', 'b.jpg,u,0', unknown='ignore')
    assert listing.notes[0].endswith('2 classes: cat (1), dog (0); 2 unknown labels are ignored')


def test_a_dataset_keeps_the_notes(root):
    (root/'t.csv').write_text('path,labels\na.jpg,dog\n')
    assert from_csv(root/'t.csv').notes[0].startswith('t.csv (UTF-8')
