"How code reads, where ruff cannot tell: annotated arguments, reasons beside exceptions, tests that say one thing"
import ast
import dataclasses
import importlib
import inspect
import re

import nbformat
import pytest
from helpers import MODULES, NBS, NOTEBOOKS, ROOT

TESTS = sorted((ROOT / 'tests').rglob('*.py'))
VARIADIC = inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD
EXCEPTION = re.compile(r'#\s*(?:noqa|type:\s*ignore)\b.*')
WITH_REASON = re.compile(r'# (?:noqa: [A-Z]+\d+(?:, [A-Z]+\d+)*|type: ignore\[[\w, -]+\]) (?:- |# )\w.{4,}')


# ---- arguments

def own(module, thing): return getattr(thing, '__module__', None) == module.__name__


def signatures(thing):
    "The functions that a user calls: a function itself, or how an object is made"
    if inspect.isfunction(thing): yield thing
    elif inspect.isclass(thing) and not dataclasses.is_dataclass(thing) and '__init__' in vars(thing): yield thing.__init__


def public_arguments(name):
    "Module, symbol, argument, and whether it is annotated"
    module = importlib.import_module(f'cprfl.{name}')
    for symbol in module.__all__:
        thing = getattr(module, symbol)
        if not own(module, thing): continue
        for function in signatures(thing):
            for arg in inspect.signature(function).parameters.values():
                if arg.name == 'self' or arg.kind in VARIADIC: continue
                yield f'{symbol}({arg.name})', arg.annotation is not arg.empty


@pytest.mark.parametrize('name', MODULES)
def test_public_arguments_are_annotated(name):
    bare = [arg for arg, annotated in public_arguments(name) if not annotated]
    assert not bare


def test_the_walk_meets_the_public_arguments(record_property):
    assert len(MODULES) >= 28
    seen = sum(1 for name in MODULES for _ in public_arguments(name))
    assert seen > 400
    record_property('arguments', seen)
    print(f'\npublic arguments: {seen}')


# ---- exceptions from the rules

def sources():
    "Every piece of code that is written by hand: cells and tests"
    for name in NOTEBOOKS:
        for cell in nbformat.read(NBS / name, 4).cells:
            if cell.cell_type == 'code': yield f'{name}, cell {cell.id}', cell.source
    for file in TESTS: yield file.relative_to(ROOT).as_posix(), file.read_text()


def without_reason(source): return [found for found in EXCEPTION.findall(source) if not WITH_REASON.match(found)]


def test_exceptions_from_the_rules_have_a_reason():
    bare = {at: found for at, source in sources() if (found := without_reason(source))}
    assert not bare


NO, TYPE = '# no' + 'qa', '# type' + ': ignore' # in two parts, or they would count as exceptions here


@pytest.mark.parametrize('comment', [f'{NO}: PLR0913 - keywords of the paper', f'{TYPE}[union-attr] # never None here'])
def test_a_reason_is_recognised(comment): assert not without_reason(f'x = 1 {comment}')


@pytest.mark.parametrize('comment', [NO, f'{NO}: E501', f'{NO}: E501 - ', TYPE, f'{TYPE} # never None', f'{TYPE}[arg-type]'])
def test_a_missing_reason_is_noticed(comment): assert without_reason(f'x = 1 {comment}')


# ---- tests

def parsed(): return [(file.relative_to(ROOT).as_posix(), ast.parse(file.read_text())) for file in TESTS]


def says_two_things(node):
    return isinstance(node, ast.Assert) and isinstance(node.test, ast.BoolOp) and isinstance(node.test.op, ast.And)


def test_an_assertion_says_one_thing():
    double = [f'{at}:{node.lineno}' for at, tree in parsed() for node in ast.walk(tree) if says_two_things(node)]
    assert not double


def test_names_of_tests_are_short():
    functions = [node.name for _, tree in parsed() for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    tests = [name for name in functions if name.startswith('test_')]
    assert len(tests) > 300
    assert not [name for name in tests if len(name) > 60]
