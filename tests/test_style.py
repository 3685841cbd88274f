"How code reads, where ruff cannot tell: annotated arguments, reasons beside exceptions, tests that say one thing"
import ast
import dataclasses
import inspect
import re

import nbformat
import pytest
from helpers import MODULES, NBS, NOTEBOOKS, ROOT, VARIADIC, public_symbols

TESTS = sorted((ROOT / 'tests').rglob('*.py'))
EXCEPTION = re.compile(r'#\s*(?:noqa|type:\s*ignore)\b.*')
WITH_REASON = re.compile(r'# (?:noqa: [A-Z]+\d+(?:, [A-Z]+\d+)*|type: ignore\[[\w, -]+\]) (?:- |# )\w.{4,}')


# ---- arguments

def is_function(thing): return inspect.isfunction(inspect.unwrap(thing)) # also behind a cache


def makers(name, cls):
    "How an object is made: its __init__ (fields of a dataclass are annotated anyway) and its class methods"
    if '__init__' in vars(cls) and not dataclasses.is_dataclass(cls): yield name, cls.__init__
    for method, thing in vars(cls).items():
        if method.startswith('_') or not isinstance(thing, classmethod | staticmethod): continue
        yield f'{name}.{method}', thing.__func__


def signatures(name, thing):
    "The functions that a user calls"
    if inspect.isclass(thing): yield from makers(name, thing)
    elif is_function(thing): yield name, thing


def public_arguments(module):
    "Each argument of a public name of a module, and whether it is annotated"
    for symbol, thing in public_symbols(module).items():
        for name, function in signatures(symbol, thing):
            for arg in inspect.signature(function).parameters.values():
                if arg.name in ('self', 'cls') or arg.kind in VARIADIC: continue
                yield f'{name}({arg.name})', arg.annotation is not arg.empty


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


@pytest.mark.parametrize('comment', [
    NO, f'{NO}: E501', f'{NO}: E501 - ', TYPE, f'{TYPE} # never None', f'{TYPE}[arg-type]'])
def test_a_missing_reason_is_noticed(comment): assert without_reason(f'x = 1 {comment}')


# ---- tests

def parsed(): return [(file.relative_to(ROOT).as_posix(), ast.parse(file.read_text())) for file in TESTS]


def says_two_things(node):
    return isinstance(node, ast.Assert) and isinstance(node.test, ast.BoolOp) and isinstance(node.test.op, ast.And)


def test_an_assertion_says_one_thing():
    double = [f'{at}:{node.lineno}' for at, tree in parsed() for node in ast.walk(tree) if says_two_things(node)]
    assert not double


def test_names_of_tests_are_short():
    nodes = [node for _, tree in parsed() for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    tests = [node.name for node in nodes if node.name.startswith('test_')]
    assert len(tests) > 300
    long = [name for name in tests if len(name) > 60]
    assert not long
