"What nbdev does to a page besides its own steps: `procs` in settings.ini names `tidy`"
import dataclasses
import importlib
import re
import typing

from fastcore.docments import docments

MANY = 8 # fields: more of them are shown as a table
MODULES = re.compile(r'\b(?:__main__|collections\.abc|pathlib|torch\.nn|cprfl(?:\.\w+)+)\.(?=[A-Z])')
SIGNATURE = re.compile(r'```python\n((?:class|def) (\w+)\(.*?)```', re.S)
SOURCE = re.compile(r'/blob/\w+/(cprfl/[\w/]+)\.py#')


def without_modules(signature):
    "Types by their names alone, except in the addresses of links"
    parts = re.split(r'(\]\([^)]*\))', signature)
    return ''.join(part if part.startswith('](') else MODULES.sub('', part) for part in parts)


def type_name(anno):
    if typing.get_origin(anno) is typing.Annotated: anno = typing.get_args(anno)[0] # without what is for the parser
    name = getattr(anno, '__name__', '') if isinstance(anno, type) else ''
    return (name or MODULES.sub('', str(anno))).replace('|', r'\|')


def default_text(field):
    if field.default is not dataclasses.MISSING: return f'`{field.default!r}`'
    return f'`{field.default_factory()!r}`' if field.default_factory is not dataclasses.MISSING else ''


def field_table(cls):
    "A row for each field of a dataclass: name, type, default and comment"
    docs = docments(cls, full=True, returns=False)
    def comment(name): return ' '.join(str(docs[name].docment or '').split()).replace('|', r'\|')
    rows = [f'| {f.name} | {type_name(docs[f.name].anno)} | {default_text(f)} | {comment(f.name)} |'
            for f in dataclasses.fields(cls)]
    return '\n'.join(['| field | type | default | |', '| --- | --- | --- | --- |', *rows])


def dataclass_of(text, name):
    "The dataclass that a signature belongs to, if it is one of many fields"
    source = SOURCE.search(text)
    if not source: return None
    thing = getattr(importlib.import_module(source[1].replace('/', '.')), name, None)
    is_long = dataclasses.is_dataclass(thing) and len(dataclasses.fields(thing)) > MANY
    return thing if is_long else None


def tidy_signature(text):
    "A symbol's signature, as `show_doc` wrote it"
    def tidied(found):
        cls = dataclass_of(text, found[2])
        return field_table(cls) if cls else f'```python\n{without_modules(found[1])}```'
    return SIGNATURE.sub(tidied, text)


def tidy(cell):
    "Short type names in signatures, and a table in place of a signature of many fields"
    for out in cell.get('outputs', []):
        data = out.get('data', {})
        text = ''.join(data.get('text/markdown', ''))
        if 'blob/' in text: data['text/markdown'] = tidy_signature(text)
