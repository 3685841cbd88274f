"YAML and JSON of other people: read as plain data, or refused in one sentence that names the file"
import pytest

from cprfl.runs.recipe import Recipe, get_recipe
from cprfl.settings import read_json, read_yaml
from cprfl.train.config import TrainConfig


@pytest.fixture
def file(tmp_path): return tmp_path / 'settings'


def refused(read, file, content):
    "The sentence of the error"
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError) as error: read(file)
    said = str(error.value)
    assert said.startswith(str(file))
    assert '\n' not in said
    assert len(said) < 1000
    return said


LAUGHS = 'a0: &a0 [x, x]\n' + ''.join(f'a{i}: &a{i} [*a{i - 1}, *a{i - 1}]\n' for i in range(1, 60))


@pytest.mark.parametrize('content, words', [
    (b'a: \xff', 'expected text in UTF-8'), ('a: 1\na: 2', "line 2: 'a' is given twice"), ('a: [1', 'line 1: '),
    ('\ta: 1', 'line 1: '), ('a: *x', 'undefined alias'), ('a: \x00', 'not allowed'), ('- &a [*a]', 'at most 100,000'),
    (LAUGHS, 'at most 100,000'), ('[' * 10_000, 'nested too deeply'), ('a: ' + '9' * 5000, 'digits'),
    ('!!python/object/apply:os.system [ls]', 'could not determine'), ('a: 1\n---\nb: 2', 'single document')])
def test_yaml_that_is_refused(file, content, words): assert words in refused(read_yaml, file, content)


@pytest.mark.parametrize('content, words', [
    (b'\xff', 'expected text in UTF-8'), ('{"a": 1, "a": 2}', "'a' is given twice"), ('{"a": ', 'damaged'),
    ('', 'damaged'), ('[' * 100_000, 'nested too deeply'), ('9' * 5000, 'digits')])
def test_json_that_is_refused(file, content, words): assert words in refused(read_json, file, content)


@pytest.mark.parametrize('written, value', [
    ('1e-3', 1e-3), ('1E5', 1e5), ('.5', .5), ('5.', 5.), ('1_000', 1000), ('-3', -3), ('+0', 0), ('~', None),
    ('yes', True), ('010', '010'), ('1:30', '1:30'), ('2024-01-01', '2024-01-01'), ('0x10', '0x10'),
    ('1e', '1e'), ('1.2.3', '1.2.3')])
def test_values_of_yaml(file, written, value):
    file.write_text(f'a: {written}')
    assert read_yaml(file) == dict(a=value)


def test_a_byte_order_mark_is_no_part_of_the_text(file):
    file.write_bytes(b'\xef\xbb\xbfa: 1')
    assert read_yaml(file) == dict(a=1)


@pytest.mark.parametrize('content, words', [
    ('- a', 'expected names with values'), ('1: 2', 'names that are texts, got 1'),
    ('epochs: 3.5', 'epochs: expected a whole number'),
    ('epochs: yes', 'epochs: expected a whole number, got True'), ('lr: .nan', 'lr: expected a finite number, got nan'),
    ('name: 3', 'name: expected a text, got 3'), ('name: ../up', 'name: expected a plain name'),
    ('name: cache', 'cached'), ('base: [a]', "recipe: expected a text, got ['a']"),
    ('train: [1]', 'train: expected names with values'),
    ('lr: 1.0\ntrain: {lr: 2.0}', 'lr: is given twice, once in train'),
    ('train: {epoch: 3}', 'unknown settings epoch'), ('views: 0', 'views: expected at least 1'),
    ('loss_args: {gamma: 1}', "loss_args: loss 'asl'"), ('loss: [asl]', 'loss: expected a text'),
    ('semantics_norm: 0', 'semantics_norm: expected above 0'), ('normalize: 1', 'normalize: expected True or False')])
def test_recipes_that_are_refused(file, content, words): assert words in refused(Recipe.from_yaml, file, content)


def test_settings_of_the_training_may_stand_together(file):
    file.write_text('base: shapes-erm\ntrain: {epochs: 3, lr: 1e-2}\nseed: 2\n')
    assert Recipe.from_yaml(file) == get_recipe('shapes-erm').with_(epochs=3, lr=0.01, seed=2)


def test_a_setting_may_differ_from_a_whole_config():
    assert Recipe().with_(train=TrainConfig(lr=1.), seed=2).train == TrainConfig(lr=1., seed=2)


# ---- settings that go with another

@pytest.mark.parametrize('change, keywords', [
    (dict(model='erm'), 'model_args'), (dict(backbone='resnet50'), 'backbone_args')])
def test_keywords_go_with_what_they_belong_to(change, keywords):
    assert not getattr(get_recipe('shapes-cprfl').with_(**change), keywords)


def test_keywords_of_a_loss_go_with_it():
    focal = get_recipe('voc-lt').with_(loss='focal', loss_args=dict(gamma=1))
    assert focal.with_(loss='asl').train.loss_args == {}
    assert focal.with_(loss='focal').train.loss_args == dict(gamma=1)


@pytest.mark.parametrize('loss, constants', [
    ('db_focal', dict(map_gamma=0.2, neg_scale=2.)), ('db_nofocal', dict(map_gamma=0.2, neg_scale=2.)),
    ('cb_focal', dict(neg_scale=2.)), ('asl', {}), ('bce', {})])
def test_losses_have_the_constants_of_coco(loss, constants):
    assert get_recipe('coco-lt').with_(loss=loss).with_constants().train.loss_args == constants


def test_constants_that_are_given_stay():
    given = get_recipe('coco-lt').with_(loss='db_focal', loss_args=dict(neg_scale=3.)).with_constants()
    assert given.train.loss_args == dict(map_gamma=0.2, neg_scale=3.)


def test_opening_a_recipe_changes_no_constant():
    "A run of an older version had those that its file says"
    assert get_recipe('coco-lt').with_(loss='db_focal').train.loss_args == {}
