"Names from outside are shown as they are written, whoever reads them, and cannot leave their folder"
import csv
import io
import re
from html.parser import HTMLParser
from pathlib import Path

import mistune
import pandas as pd
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from matplotlib.cbook import is_math_text

from cprfl.runs.report import format_table
from cprfl.text import (
    VisibleStream,
    csv_text,
    figure_text,
    from_csv_text,
    html_text,
    latex_text,
    markdown_text,
    safe_name,
    visible,
)

NASTY = [
    r'$\frac{$', 'a $5$ note', r'\$_^{}', '<b onclick="x()">', '&lt;', 'a|b `c`', '[a](b)', '**a** ~~b~~', '![x](y)',
    '=1+1', '\t=1', '%s {0}', '\\', 'red\x1b[31m', 'two\nlines', 'abc\u202egpj', 'a\u2028b', '\udcff', "'=1", '@a']
names = st.one_of(st.sampled_from(NASTY), st.text())


@given(names)
def test_no_control_character_is_left(name):
    assert not re.search('[\x00-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\u2028\u2029\ud800-\udfff]', visible(name))


@given(names)
def test_what_is_visible_stays_as_it_is(name): assert visible(visible(name)) == visible(name)


@given(names)
def test_what_is_visible_can_be_written(name): visible(name).encode()


@given(names)
def test_matplotlib_finds_no_formula(name):
    text = figure_text(name)
    assert not is_math_text(text)
    assert text.replace(r'\$', '$') == visible(name) # as matplotlib draws what is no formula


@given(st.lists(names, max_size=3))
def test_matplotlib_finds_no_formula_in_several_names(several):
    assert not is_math_text('\n'.join(map(figure_text, several)))


class Page(HTMLParser):
    "The texts and the tags of a page"
    def __init__(self, page):
        super().__init__(convert_charrefs=True)
        self.texts, self.tags = [], []
        self.feed(page)
        self.close()

    def handle_data(self, data): self.texts.append(data)
    def handle_starttag(self, tag, attrs): self.tags.append((tag, attrs))


@given(names)
def test_a_page_shows_the_text(name):
    page = Page(f'<i title="{html_text(name)}">{html_text(name)}</i>')
    assert page.tags == [('i', [('title', visible(name))])]
    assert ''.join(page.texts) == visible(name)


def shown(name):
    "The text and the tags of a cell, when Markdown has become a page"
    row = f'| a | b |\n|---|---|\n| x{markdown_text(name)}x | y |\n'
    page = Page(mistune.create_markdown(plugins=['table', 'strikethrough', 'math', 'url'])(row))
    return ''.join(page.texts), [tag for tag, _ in page.tags]


@pytest.mark.parametrize('name', NASTY)
def test_markdown_shows_the_text(name):
    text, tags = shown(name)
    assert f'x{visible(name)}x' in text
    assert tags == ['table', 'thead', 'tr', 'th', 'th', 'tbody', 'tr', 'td', 'td']


@given(names)
def test_latex_has_no_bare_special(name):
    words = 'textbackslash|textasciitilde|textasciicircum|textless|textgreater|textbar'
    bare = re.sub(rf'\\({words})\{{\}}', '', latex_text(name))
    bare = re.sub(r'\\[&%$#_{}]|\{[\[\]*"]\}', '', bare)
    assert not set(bare) & set('\\&%$#_{}~^<>|[]*"')


@given(names)
@example("'''=1")
def test_a_spreadsheet_calculates_nothing(name):
    cell = csv_text(name)
    assert cell[:1] not in tuple('=+-@\t\r\n') or re.fullmatch(r'[-+]?[\w.]+', cell.strip())


@given(names)
@example("'''=1")
@example("'-1")
def test_a_spreadsheet_reads_back(name): assert from_csv_text(csv_text(name)) == name


@given(names)
def test_a_safe_name_is_a_folder_below(name):
    try: safe_name(name)
    except ValueError as e:
        assert str(e).startswith('name: expected a')
        return
    path = Path('/runs') / name
    assert path.resolve().parent == Path('/runs')
    assert path.name == name


@pytest.mark.parametrize('name', [
    '', ' ', '.', '..', '../up', 'a/b', '/abs', 'a\\b', 'C:x', 'a\x00b', 'CON', 'nul.txt', 'com1', 'LPT9.log',
    'a.', 'a ', ' a', 'x' * 201, 'é' * 101, 'a\nb', 'a?b', '\u202ea', '~/x', None, 3])
def test_a_name_that_is_no_folder_is_refused(name):
    with pytest.raises(ValueError, match='^row: expected a'): safe_name(name, 'row')


@pytest.mark.parametrize('name', ['run', 'cprfl@96-px', 'tau-0.1', 'mine_2', 'Größe', '猫', 'console', '.hidden'])
def test_an_ordinary_name_is_kept(name): assert safe_name(name) == name


def test_a_stream_shows_what_is_printed():
    out = io.StringIO()
    print('owl\x1b[2J', 'a\tb', file=VisibleStream(out))
    assert out.getvalue() == 'owl\\x1b[2J a\tb\n'


# ---- tables

@pytest.fixture
def table(): return pd.DataFrame({'a|b': ['=1', '-1.5'], '$x$': [1.5, 2]}, index=['[row]', '_under'])


@pytest.mark.parametrize('kind, text', [
    ('markdown', r'\[row\]'), ('markdown', r'a\|b'), ('latex', r'{[}row{]}'), ('latex', r'\$x\$'), ('csv', "'=1")])
def test_a_table_is_plain_for_its_readers(table, kind, text): assert text in format_table(table, kind)


def test_numbers_of_a_spreadsheet_stay_numbers(table):
    rows = list(csv.reader(io.StringIO(format_table(table, 'csv'))))
    assert rows[2] == ['_under', '-1.5', '2.0']
