"Lists, class files and paths, and all problems of each at once"
import pickle

import pytest
from pictures import noise
from PIL import Image

from cprfl.data.dataset import from_coco, from_csv, from_list
from cprfl.data.images import BadDataError, Problem
from cprfl.data.readers import Row, _path_notes, check_listing, read_class_file, read_classes, read_list

CLASSES = ['cat', 'dining table', 'dog']


def problems_of(read, *args, **kw):
    with pytest.raises(BadDataError) as e: read(*args, **kw)
    return e.value.problems


# ---- list files

def test_list_quirks_are_read(root):
    "A byte order mark, tabs, trailing spaces, several kinds of line ends, no final newline"
    (root/'list.txt').write_bytes(b'\xef\xbb\xbfa.jpg 0 2 \r\nb.jpg\t1\r\nc.jpg\r\n  e.png   2  0')
    ds = from_list(root/'list.txt', CLASSES)
    assert ds.paths == ['a.jpg', 'b.jpg', 'c.jpg', 'e.png']
    assert ds.classes == CLASSES
    assert ds.targets.tolist() == [[1, 0, 1], [0, 1, 0], [0, 0, 0], [1, 0, 1]]
    assert ds.skipped == []


BAD = [ # text of the line, and what is said about it
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
WRONG = [(n, message) for n, (_, message) in enumerate(BAD, 1) if message]


@pytest.fixture
def bad_list(root):
    (root/'link.jpg').symlink_to(root.parent/'outside.jpg')
    (root/'folder').symlink_to(root.parent)
    Image.fromarray(noise(7)).save(root/'target.jpg')
    (root/'inner.jpg').symlink_to(root/'target.jpg')
    (root/'bad.txt').write_text('\n'.join(text for text, _ in BAD) + '\n')
    return root/'bad.txt'


@pytest.mark.parametrize('text, path, labels', [
    ('my photo.jpg 0 2', 'my photo.jpg', [0, 2]), ('my photo.jpg', 'my photo.jpg', []),
    ('a b/c 1.jpg\t1', 'a b/c 1.jpg', [1]), ('"my photo" 0', 'my photo', [0]), ('a.jpg.png 1', 'a.jpg.png', [1]),
    ('a.JPG,0,2', 'a.JPG', [0, 2]), ('photos/17 2', 'photos/17', [2])])
def test_where_a_path_ends(tmp_path, text, path, labels):
    (tmp_path/'list.txt').write_text(text)
    assert read_list(tmp_path/'list.txt', CLASSES).rows == [Row(1, path, labels)]


@pytest.mark.parametrize('text, targets', [
    ('a 0 1 1\nb 0 0 0', [[0, 1, 1], [0, 0, 0]]), ('a 2 0 1\nb 0', [[1, 1, 1], [1, 0, 0]])])
def test_lists_of_zeros_and_ones(tmp_path, text, targets):
    (tmp_path/'list.txt').write_text(text)
    assert read_list(tmp_path/'list.txt', CLASSES).targets.tolist() == targets


def test_zeros_and_ones_of_two_classes_are_questioned(tmp_path):
    (tmp_path/'list.txt').write_text('a 0 1\nb 1 0\n')
    with pytest.warns(UserWarning, match='read as no and yes'): listing = read_list(tmp_path/'list.txt', CLASSES[:2])
    assert listing.targets.tolist() == [[0, 1], [1, 0]]


@pytest.fixture
def from_one(tmp_path):
    (tmp_path/'c.txt').write_text('cat 1\ndog 2\n')
    return lambda text: ((tmp_path/'l.txt').write_text(text), read_list(tmp_path/'l.txt', tmp_path/'c.txt'))[1]


def test_ids_count_as_in_the_class_file(from_one):
    assert from_one('a 1\nb 2').targets.tolist() == [[1, 0], [0, 1]]


def test_a_list_may_count_from_0_all_the_same(from_one):
    listing = from_one('a 0\nb 1')
    assert listing.targets.tolist() == [[1, 0], [0, 1]]
    assert 'its ids count from 0' in listing.notes[-1]


def test_ids_that_may_count_from_0_or_1_are_questioned(from_one):
    with pytest.warns(UserWarning, match='read as counting from 1'): listing = from_one('a 1')
    assert listing.targets.tolist() == [[1, 0]]


def test_ids_with_gaps(tmp_path):
    (tmp_path/'c.txt').write_text('1 cat\n5 dog\n')
    (tmp_path/'l.txt').write_text('a 5\nb 2\n')
    rows = read_list(tmp_path/'l.txt', tmp_path/'c.txt').rows
    assert rows[0].labels == [1]
    assert rows[1].problems == ['label 2 is out of range, expected one of 1, 5']


# ---- paths from another system

@pytest.fixture
def windows(root):
    (root/'images').mkdir()
    Image.fromarray(noise(11)).save(root/'images/w.png')
    return root


def test_backslashes_are_read_as_slashes(windows):
    (windows/'l.txt').write_text('images\\w.png 0\n')
    ds = from_list(windows/'l.txt', CLASSES)
    assert ds.paths == ['images/w.png']
    assert ds.notes == ['backslashes are read as slashes in 1 paths, such as images\\w.png: it is images/w.png']


def test_many_absolute_paths_are_noted_in_one_pass():
    "A pass for each of them would take minutes"
    given = [Row(i, f'/data/{i}.png') for i in range(50_000)] + [Row(None, 'sub\\a.png')]
    read = [Row(i, f'{i}.png') for i in range(50_000)] + [Row(None, 'sub/a.png')]
    assert [note.split(' such as')[0] for note in _path_notes(given, read)] == [
        'absolute paths are read below the image root in 50000 paths,', 'backslashes are read as slashes in 1 paths,']


def test_a_file_whose_name_has_a_backslash(windows):
    (windows/'images/w.png').rename(windows/'images\\w.png')
    (windows/'l.txt').write_text('images\\w.png 0\n')
    assert from_list(windows/'l.txt', CLASSES).paths == ['images\\w.png']


def test_one_image_in_two_spellings_is_a_duplicate(windows):
    (windows/'l.txt').write_text('images\\w.png 0\nimages/w.png 1\n')
    with pytest.raises(BadDataError, match='duplicate image'): from_list(windows/'l.txt', CLASSES)


@pytest.mark.parametrize('path, why', [
    ('..\\outside.jpg', 'leaves the image root'), ('images\\..\\..\\outside.jpg', 'leaves the image root'),
    ('C:\\photos\\a.jpg', 'is absolute'), ('C:photos\\a.jpg', 'names a drive'), ('D:/photos/a.jpg', 'is absolute'),
    ('\\\\server\\a.jpg', 'is absolute'), ('images\\none.png', 'images/none.png: image is missing')])
def test_windows_paths_that_are_refused(windows, path, why):
    (windows/'l.txt').write_text(f'{path} 0\n')
    with pytest.raises(BadDataError, match=why): from_list(windows/'l.txt', CLASSES)


def test_absolute_paths_below_the_root_are_read(root):
    (root/'l.txt').write_text(f'{root}/a.jpg 0\n')
    ds = from_list(root/'l.txt', CLASSES)
    assert ds.paths == ['a.jpg']
    assert ds.notes == [f'absolute paths are read below the image root in 1 paths, such as {root}/a.jpg: it is a.jpg']


def test_absolute_paths_do_not_climb_out_of_the_root(root):
    (root/'l.txt').write_text(f'{root}/../outside.jpg 0\n')
    with pytest.raises(BadDataError, match='leaves the image root|is absolute'): from_list(root/'l.txt', CLASSES)


def test_images_that_are_all_missing_are_elsewhere(root):
    (root/'l.txt').write_text('x.jpg 0\ny.jpg 1\n')
    first, second = problems_of(from_list, root/'l.txt', CLASSES)
    assert f'x.jpg: image is missing; none of the 2 images is in {root} (root, --root' in first.message
    assert second.message == 'y.jpg: image is missing'


@pytest.mark.parametrize('line, hint', [
    ('a.jpg cat', 'names belong in a table'), ('a.jpg 1 -1 1', 'yes and no for each class are 1 and 0')])
def test_labels_that_a_list_does_not_take_have_a_way_out(root, line, hint):
    (root/'l.txt').write_text(line)
    assert hint in problems_of(from_list, root/'l.txt', CLASSES)[0].message


@pytest.mark.parametrize('names', [['Dog', 'dog'], ['caf\u00e9', 'cafe\u0301'], ['cat', 'cat\u200b']])
def test_classes_that_look_like_one_are_questioned(root, names):
    (root/'l.txt').write_text('a.jpg 0 1\n')
    with pytest.warns(UserWarning, match='differ in their case or in invisible signs'): from_list(root/'l.txt', names)


@pytest.mark.parametrize('start, what', [
    (b'PK\x03\x04', 'Excel or a ZIP'), (b'\x1f\x8b', 'gzip'), (b'\xff\xd8\xff', 'an image'), (b'PAR1', 'Parquet')])
@pytest.mark.parametrize('read', [lambda file: from_list(file, CLASSES), from_csv, from_coco, read_classes])
def test_files_that_are_no_text_are_named(tmp_path, start, what, read):
    (tmp_path/'l').write_bytes(start + bytes(range(256)))
    [problem] = problems_of(read, tmp_path/'l')
    assert what in problem.message


def test_all_problems_of_a_list_are_found_at_once(bad_list):
    problems = problems_of(from_list, bad_list, CLASSES)
    assert [p.line for p in problems] == [n for n, _ in WRONG]
    for problem, (_, message) in zip(problems, WRONG):
        assert isinstance(problem, Problem)
        assert problem.file == str(bad_list)
        assert message in problem.message


def test_the_error_has_file_and_line_of_every_problem(bad_list):
    with pytest.raises(ValueError) as e: from_list(bad_list, CLASSES)
    for n, message in WRONG:
        assert f'{bad_list}:{n}: ' in str(e.value)
        assert message in str(e.value)


def test_the_error_survives_another_process(bad_list):
    with pytest.raises(BadDataError) as e: from_list(bad_list, CLASSES)
    assert str(pickle.loads(pickle.dumps(e.value))) == str(e.value) # noqa: S301 - pickled on this line


def test_skip_bad_drops_and_records(bad_list):
    ds = from_list(bad_list, CLASSES, skip_bad=True)
    assert ds.paths == ['a.jpg', 'inner.jpg', 'e.png']
    assert [p.line for p in ds.skipped] == [n for n, _ in WRONG]
    assert repr(ds).endswith(f', {len(ds.skipped)} problems skipped')
    assert all(ds[i][0].shape == (3, 48, 48) for i in range(3))


def test_links_may_be_allowed_but_not_dots(bad_list):
    ds = from_list(bad_list, CLASSES, skip_bad=True, follow_links=True)
    assert {'link.jpg', 'folder/outside.jpg'} <= set(ds.paths)
    assert '../outside.jpg' not in ds.paths


def test_checking_leaves_the_listing_as_it_was(bad_list):
    listing = read_list(bad_list, CLASSES)
    once = check_listing(listing, skip_bad=True)
    again = check_listing(listing, skip_bad=True)
    assert once.skipped == again.skipped
    assert listing.rows[1] == Row(2, 'none.jpg', [1])


def test_several_problems_of_one_row(root):
    (root/'list.txt').write_text('none.jpg 7 x 1 1\n')
    assert [p.line for p in problems_of(from_list, root/'list.txt', CLASSES)] == [1] * 4


def test_long_reports_are_cut(root):
    (root/'list.txt').write_text(''.join(f'{i}.jpg 0\n' for i in range(600)))
    problems = problems_of(from_list, root/'list.txt', CLASSES)
    lines = str(BadDataError(problems)).splitlines()
    assert len(problems) == 600
    assert len(lines) == 52
    assert lines[-1] == 'and 550 more'


def test_an_empty_list_is_refused(root):
    (root/'list.txt').write_text('\n')
    with pytest.raises(BadDataError, match='no image is listed'): from_list(root/'list.txt', CLASSES)


def test_a_list_without_a_sound_image_is_refused(root):
    (root/'list.txt').write_text('none.jpg 0\n')
    with pytest.raises(BadDataError, match='list.txt:1: none.jpg: image is missing'):
        from_list(root/'list.txt', CLASSES, skip_bad=True)


def test_a_missing_root_is_refused_unless_unchecked(root):
    (root/'list.txt').write_text('none.jpg 0\n')
    args = root/'list.txt', CLASSES, root/'nowhere'
    with pytest.raises(BadDataError, match='root is not a folder'): from_list(*args)
    assert len(from_list(*args, check='none')) == 1


def test_other_encodings_are_refused_by_line(root):
    (root/'list.txt').write_bytes(b'a.jpg 0\n\xff\xfe 1\n')
    with pytest.raises(BadDataError, match='list.txt:2: expected UTF-8'): from_list(root/'list.txt', CLASSES)


def test_thousands_of_images_are_checked(coco_mini):
    files = [coco_mini/f'coco_lt_{split}.txt' for split in ('train', 'test')]
    train, test = (from_list(file, coco_mini/'classes.txt') for file in files)
    assert len(train) + len(test) == 6909
    assert [len(ids) for ids in train.groups.values()] == [21, 34, 25]


# ---- class names

@pytest.mark.parametrize('text, names', [
    (' dining table 1 \r\ncat 0\r\n\r\nhot dog  2', ['cat', 'dining table', 'hot dog']),
    ('cat\ndining table\n', ['cat', 'dining table']),
    ('route 66\nroute 67\n', ['route 66', 'route 67']),
    ('a_b 0\nc 1', ['a_b', 'c']),
    ('dog', ['dog']),
    ('Formula 1', ['Formula 1']),
    ('tench, Tinca tinca\ngoldfish, Carassius', ['tench, Tinca tinca', 'goldfish, Carassius']),
    ('3-toed sloth\n2-toed sloth', ['3-toed sloth', '2-toed sloth']),
    ('naïve\n猫\xa0\n', ['naïve', '猫'])])
def test_read_classes(tmp_path, text, names):
    (tmp_path/'c.txt').write_text(text, 'utf-8')
    assert read_classes(tmp_path/'c.txt') == names


DOG_CAT = [ # files of "dog" and "cat" in the forms of several tools
    ('c.txt', '0 dog\n1 cat'), ('c.txt', '1\tcat\n0\tdog\n'), ('c.txt', '0: dog\n1: cat'), ('c.txt', '0:dog\n1:cat'),
    ('c.txt', 'cat: 1\ndog: 0'), ('c.txt', '0. dog\n1. cat'), ('c.txt', '00 dog\n01 cat'), ('c.txt', 'dog,0\ncat,1'),
    ('c.txt', '"dog"\n"cat"'), ('c.txt', "'dog',\n'cat',"), ('c.txt', '0 "dog"\n1 "cat"'), ('c.names', 'dog\ncat\n'),
    ('c.csv', 'id,name\n1,cat\n0,dog\n'), ('c.csv', 'name;class_id\ncat;1\ndog;0\n'), ('c.csv', 'name\ndog\ncat\n'),
    ('c.tsv', 'index\tcolour\tname\n0\tbrown\tdog\n1\tred\tcat\n'), ('c.txt', 'label,name\n0,dog\n1,cat'),
    ('c.csv', ',name\n0,dog\n1,cat\n'), ('c.txt', 'dog -> 0\ncat -> 1'), ('c.txt', '0 => dog\n1 => cat'),
    ('c.json', '["dog", "cat"]'), ('c.txt', "['dog', 'cat']"), ('c.json', '{"1": "cat", "0": "dog"}'),
    ('c.json', '{"cat": 1, "dog": 0}'), ('c.json', '{"names": ["dog", "cat"]}'),
    ('c.json', '{"categories": [{"id": 1, "name": "cat"}, {"id": 0, "name": "dog"}]}'),
    ('c.yaml', 'nc: 2\nnames:\n  0: dog\n  1: cat\n'), ('c.yml', 'names: [dog, cat]')]


@pytest.mark.parametrize('name, text', DOG_CAT)
@pytest.mark.parametrize('encoding', ['utf-8', 'utf-8-sig', 'utf-16'])
def test_class_files_of_other_tools(tmp_path, name, text, encoding):
    (tmp_path/name).write_text(text, encoding)
    found = read_class_file(tmp_path/name)
    assert found.names == ['dog', 'cat']
    assert found.ids == [0, 1]


@pytest.mark.parametrize('text', ['{"id2label": {"1": "cat", "0": "dog"}}', '{"label2id": {"cat": 1, "dog": 0}}'])
def test_classes_of_transformers(tmp_path, text):
    (tmp_path/'config.json').write_text(text)
    assert read_classes(tmp_path/'config.json') == ['dog', 'cat']


@pytest.mark.parametrize('line', [
    '# classes', '- cat', 'cat,', '[0] cat', 'cat\tFelis catus', 'n02123045 tabby', '001.Albatross'])
def test_lines_that_hold_more_than_a_name_are_questioned(tmp_path, line):
    (tmp_path/'c.txt').write_text(f'{line}\ndog\n')
    with pytest.warns(UserWarning, match='1 lines seem to hold more than a name'): read_classes(tmp_path/'c.txt')


def test_classes_of_teachable_machine(tmp_path):
    (tmp_path/'labels.txt').write_text('0 Class 1\n1 Class 2\n')
    assert read_classes(tmp_path/'labels.txt') == ['Class 1', 'Class 2']


@pytest.mark.parametrize('text', ['class 0\nclass 1\nclass 2', 'level 2\nlevel 0\nlevel 1', '1 star\n2 stars', '0\n1'])
def test_names_that_differ_only_in_their_number(tmp_path, text):
    (tmp_path/'c.txt').write_text(text)
    assert read_classes(tmp_path/'c.txt') == text.splitlines()


def test_quotes_keep_a_number_in_its_name(tmp_path):
    (tmp_path/'c.txt').write_text('"cat 0"\n"dog 1"\n"cat 2"\n')
    assert read_classes(tmp_path/'c.txt') == ['cat 0', 'dog 1', 'cat 2']


@pytest.mark.parametrize('text, ids', [
    ('dog 1\ncat 2', [1, 2]), ('1 dog\n2 cat', [1, 2]), ('1 dog\n5 cat', [1, 5]), ('{"dog": 7, "cat": 9}', [7, 9])])
def test_ids_that_do_not_count_from_0(tmp_path, text, ids):
    (tmp_path/'c.txt').write_text(text)
    found = read_class_file(tmp_path/'c.txt')
    assert (found.names, found.ids) == (['dog', 'cat'], ids)


@pytest.mark.parametrize('text, names', [
    ('dog, cat', ['dog', 'cat']), ('route 66\nhighway 61', ['route 66', 'highway 61']),
    ('0 dog\n1 cat\nbird', ['0 dog', '1 cat', 'bird'])])
def test_class_files_with_two_readings_are_questioned(tmp_path, text, names):
    (tmp_path/'c.txt').write_text(text)
    with pytest.warns(UserWarning, match=r'c\.txt: '): assert read_classes(tmp_path/'c.txt') == names


def test_the_note_says_where_the_ids_were(tmp_path):
    (tmp_path/'c.txt').write_text('1 cat\n0 dog\n')
    note = f'{tmp_path}/c.txt: the numbers before the names are their ids: 0 dog, 1 cat'
    assert read_class_file(tmp_path/'c.txt').note == note


@pytest.mark.parametrize('text, why', [
    ('cat 0\ndog 1\ncat 2\n', "c.txt:3: class 'cat' is already on line 1"), ('\n', 'no class'),
    ('id,name\n', 'no class'), ('id,name\n0\n', 'c.txt:2: expected 2 fields, got 1'),
    ('["dog", ]]', 'not JSON'), ('{"a": {"b": 1}}', 'expected a list of names'), ('[null]', 'expected a list of names'),
    ('["dog", "dog"]', "class 'dog' is already there"), ('{"dog": 1, "cat": 1}', 'id 1 is already there'),
    ('["dog", ""]', "class name '' is not a text")])
def test_class_names_that_are_refused(tmp_path, text, why):
    (tmp_path/'c.txt').write_text(text)
    with pytest.raises(BadDataError, match=why): read_classes(tmp_path/'c.txt')
