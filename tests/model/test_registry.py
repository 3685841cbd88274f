"Names and the functions behind them"
import functools
from typing import Literal

import pytest
import torch
from torch import nn

from cprfl.model.backbones import BACKBONES, Backbone, build_backbone, register_backbone
from cprfl.model.registry import MODELS
from cprfl.model.semantics import SEMANTICS, category_semantics, register_semantics
from cprfl.registry import Entry, Registry, checked_settings


@pytest.fixture
def names(): return Registry('thing', gives=('left', 'right'))


@pytest.fixture
def clean(monkeypatch):
    for registry in (BACKBONES, SEMANTICS): monkeypatch.setattr(registry, 'entries', dict(registry.entries))


def one(left): return left


def other(right): return right


# ---- names

def test_the_same_function_may_be_registered_again(names):
    names.add('a', one)
    assert names.add('a', one) is one


def test_a_name_belongs_to_one_function(names):
    names.add('a', one)
    with pytest.raises(ValueError, match="thing: 'a' is taken by test_registry.one; choose another name for .*other"):
        names.add('a', other)


def test_two_lambdas_are_two_functions(names):
    names.add('a', lambda left: left)
    with pytest.raises(ValueError, match="'a' is taken"): names.add('a', lambda left: -left)


def test_a_reloaded_module_replaces_its_function(names):
    names.add('a', one)
    def again(left): return left
    again.__qualname__ = 'one'
    names.add('a', again)
    assert names['a'].function is again


def test_a_notebook_replaces_its_functions(names):
    for name in ('First', 'Second'): names.add('a', type(name, (), dict(__module__='__main__')))
    assert names['a'].origin == ('__main__', 'Second')


def test_a_partial_is_from_where_its_function_is(names):
    names.add('a', functools.partial(one, left=1))
    assert names['a'].origin == ('test_registry', 'one')


def test_a_name_must_be_a_text(names):
    with pytest.raises(ValueError, match='thing: expected a text, got 5'): names.add(5, one)


# ---- arguments

@pytest.mark.parametrize('function, words', [
    (lambda lefft: 0, 'got lefft, which has none; did you mean left?'),
    (lambda left, /: 0, 'got left, which has none')])
def test_an_argument_that_nobody_gives(names, function, words):
    with pytest.raises(ValueError, match=words.replace('?', r'\?')): names.add('a', function)


def test_only_what_is_needed_is_made(names):
    names.add('a', one)
    assert names['a'].build(dict(right=lambda: 1 / 0, left=lambda: 'made')) == 'made'


def test_any_keyword_where_the_function_takes_any(names):
    entry = Entry('a', lambda **kw: kw)
    assert checked_settings('args', entry, dict(x=1)) == dict(x=1)


@pytest.mark.parametrize('kind, good, bad', [
    (int, 2, 0.5), (int | None, None, 'x'), (list[int], [1], 1), (Literal['a', 'b'], 'b', 'c'), (str, 'x', 3)])
def test_plain_types_are_checked(kind, good, bad):
    def function(x=0): return x
    function.__annotations__['x'] = kind
    entry = Entry('a', function)
    assert checked_settings('args', entry, dict(x=good)) == dict(x=good)
    with pytest.raises(ValueError, match='args: x: expected'): checked_settings('args', entry, dict(x=bad))


@pytest.mark.parametrize('kind', [torch.Tensor, 'Nowhere', 'int', type[nn.Module]])
def test_other_types_are_not_checked(kind):
    def function(x=None): return x
    function.__annotations__['x'] = kind
    assert checked_settings('args', Entry('a', function), dict(x=3))


def test_a_number_that_starts_at_0_may_be_0():
    def function(layers:int=0, width:int=8): return layers, width
    assert checked_settings('args', Entry('a', function), dict(layers=0))
    with pytest.raises(ValueError, match='width: expected at least 1'):
        checked_settings('args', Entry('a', function), dict(width=0))


# ---- the kit's own

@pytest.mark.parametrize('name', MODELS.kit)
def test_models_of_the_kit_are_found(name): assert issubclass(MODELS[name].function, nn.Module)


def test_only_zero_shot_clip_has_nothing_to_train():
    assert [name for name, entry in MODELS.items() if not entry.more['trained']] == ['clip']


# ---- semantics and backbones

def test_semantics_of_a_wrong_size(clean):
    register_semantics('flat', lambda classes: [1., 2.])
    with pytest.raises(ValueError, match=r'semantics: expected \[C, m\] with C = 2 from flat, got \[2\]'):
        category_semantics(['a', 'b'], 'flat')


def test_an_argument_that_semantics_do_not_take():
    with pytest.raises(ValueError, match="semantics: expected one of .*, got 'words:3'"):
        category_semantics(['a'], 'words:3')


def test_semantics_with_a_colon(clean):
    with pytest.raises(ValueError, match="expected a prefix without a colon, got 'a:b'"):
        register_semantics('a:b', lambda classes: classes)


def stripes(width=4): return nn.Conv2d(3, width, 8, stride=8)


def test_weights_of_a_registered_backbone(clean, tmp_path):
    register_backbone('stripes', stripes)
    torch.save(stripes().state_dict(), tmp_path / 'w.pt')
    a, b = (build_backbone('stripes', weights=tmp_path / 'w.pt') for _ in range(2))
    assert torch.equal(a.net.weight, b.net.weight)


def test_a_registered_backbone_may_be_a_whole_one(clean):
    register_backbone('whole', lambda normalize: Backbone(stripes(), 4, normalize=normalize))
    assert not build_backbone('whole', normalize=False).normalize


@pytest.mark.parametrize('build, kw, words', [
    (stripes, dict(pretrained=True), 'mine has no weights of a library'),
    (lambda: nn.Flatten(), {}, r'backbone: mine: expected features \[B, D, h, w\] or \[B, v, D\], got \[1, 12288\]'),
    (lambda: nn.Linear(5, 5), {}, 'backbone: mine cannot be used with images of 64 x 64 pixels')])
def test_what_a_registered_backbone_must_do(build, kw, words, clean):
    register_backbone('mine', build)
    with pytest.raises(ValueError, match=words): build_backbone('mine', **kw)


@pytest.mark.parametrize('name', ['resnet18', 'shapes', 'my:net'])
def test_names_of_other_backbones_are_not_free(name):
    with pytest.raises(ValueError, match=f"backbone: '{name}' is a name of the kit's or of timm's"):
        register_backbone(name, stripes)
