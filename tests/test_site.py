"The site, without Quarto: pages, links, anchors, symbols, pictures and their words"
import ast
import configparser
import dataclasses
import inspect
import os
import pkgutil
import re
import shutil
import subprocess
import sys
from functools import cache
from itertools import takewhile
from pathlib import Path

import nbformat
import pytest
import yaml
from fastcore.docments import docments
from helpers import MODULES, NBS, REFERENCE, ROOT, VARIADIC, copy_project, made_once, public_symbols
from helpers import NOTEBOOKS as PAGES
from IPython.core.inputtransformer2 import TransformerManager
from PIL import Image

from cprfl._modidx import d as index

MARKDOWN = [*ROOT.glob('*.md'), *(ROOT / '.github').rglob('*.md'), *(ROOT / 'cprfl').rglob('*.md')]
TEXTS = sorted(file.relative_to(ROOT).as_posix() for file in MARKDOWN)


@cache
def read(page): return nbformat.read(NBS / page, 4)


def cells(kind): return [(page, cell) for page in PAGES for cell in read(page).cells if cell.cell_type == kind]


def is_shown(cell):
    "Whether a code cell leaves something on its page: exported ones do if they define a public name"
    first, _, rest = cell.source.partition('\n')
    if first.startswith('#| hide'): return False
    if not first.startswith('#| export'): return True
    kinds = ast.FunctionDef, ast.ClassDef
    return any(isinstance(node, kinds) and not node.name.startswith('_') for node in ast.parse(rest).body)


def hanging(page):
    "Paragraphs that end with a colon, though the code below them is not on the page"
    ends, found = None, []
    for cell in read(page).cells:
        if cell.cell_type == 'code' and cell.source.startswith('#| hide'): continue # what follows it may be shown
        if ends and cell.cell_type == 'code' and not is_shown(cell): found.append(ends)
        last = cell.source.rstrip().splitlines()[-1] if cell.source.strip() else ''
        ends = last if cell.cell_type == 'markdown' and last.endswith(':') else None
    return found


QUARTO = yaml.safe_load((ROOT / '_quarto.yml').read_text())
SITE, HTML = QUARTO['website'], QUARTO['format']['html']


@cache
def settings():
    parser = configparser.ConfigParser()
    parser.read(ROOT / 'settings.ini')
    return parser['DEFAULT']


# ---- pages

def process(folder):
    "What nbdev hands to Quarto, and what it warned of"
    copy_project(folder, 'settings.ini', 'pyproject.toml', '_quarto.yml')
    code = ( # nbdev_proc_nbs would install Quarto, and closing a shell for each page takes longer than the pages
        'import os; from nbdev.serve import proc_nbs; proc_nbs(n_workers=0, force=True); os._exit(0)')
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get('PYTHONPATH')]))
    env = os.environ | {'OMP_NUM_THREADS': '1', 'PYTHONPATH': path}
    done = subprocess.run([sys.executable, '-c', code], cwd=folder, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    (folder / 'stderr.txt').write_text(done.stderr)


@pytest.fixture(scope='module')
def site(tmp_path_factory): return made_once(tmp_path_factory, 'site', process)


@pytest.fixture(scope='module')
def processed(site):
    "Page -> (front matter, notebook)"
    pages = {}
    for file in (site / '_proc').rglob('*.ipynb'):
        nb = nbformat.v4.reads(file.read_text()) # nbdev leaves a field that nbformat.read would report
        pages[file.relative_to(site / '_proc').as_posix()] = yaml.safe_load(nb.cells[0].source.strip().strip('-')), nb
    return pages


def address(page, front): return str(Path(page).with_name(front['output-file']))


def markdown_of(cell):
    "Lines of Markdown that a cell has, or has left"
    texts = [cell.source] if cell.cell_type == 'markdown' else []
    texts += [''.join(out.get('data', {}).get('text/markdown', '')) for out in cell.get('outputs', [])]
    return [line for text in texts for line in text.splitlines()]


@pytest.mark.parametrize('page', PAGES)
def test_deviations_stay_beside_their_means(page):
    "In a narrow cell a plain space before ± breaks the line"
    assert not [line for cell in read(page).cells for line in markdown_of(cell) if line[:1] == '|' and ' ± ' in line]


def starred(text): return '*' in re.sub('`[^`]*`', '', text or '')


def test_docstrings_have_no_asterisks_but_in_code():
    "nbdev sets a docstring in italics, by asterisks around it"
    symbols = {f'{module}.{name}': symbol for module in MODULES for name, symbol in public_symbols(module).items()}
    assert not [name for name, symbol in symbols.items() if callable(symbol) and starred(inspect.getdoc(symbol))]


def test_titles_are_unique():
    titles = [read(page).cells[0].source.splitlines()[0] for page in PAGES]
    assert not {title for title in titles if titles.count(title) > 1}


@pytest.mark.parametrize('page', PAGES)
def test_a_colon_is_followed_by_what_it_announces(page): assert not hanging(page)


def test_every_page_is_processed(processed, record_property):
    assert sorted(processed) == PAGES
    record_property('pages', len(processed))
    print(f'\npages: {len(processed)}')


def test_quarto_gets_the_other_files(site):
    names = '404.qmd', HTML['include-before-body'], *HTML['filters'], HTML['css']
    assert not [name for name in names if not (site / '_proc' / name).is_file()]


def test_nbdev_warns_of_nothing(site): assert 'Warning' not in (site / 'stderr.txt').read_text()


def test_every_page_has_a_title_a_line_and_a_body(processed):
    for page, (front, nb) in processed.items():
        assert front['title'], page
        assert front['description'], page
        assert len(nb.cells) > 2, page


def test_every_page_has_an_address_of_its_own(processed):
    addresses = [address(page, front) for page, (front, _) in processed.items()]
    assert not [name for name in addresses if not name.endswith('.html')]
    assert len(set(addresses)) == len(addresses)


@pytest.mark.parametrize('page', PAGES)
def test_first_cells_lose_nothing(page):
    "nbdev makes front matter of the first cell, and shows of it only the title, the line and `- key: value`"
    lines = [line for line in read(page).cells[0].source.splitlines() if line.strip()]
    assert [line[:2] for line in lines[:2]] == ['# ', '> ']
    assert not [line for line in lines[2:] if not re.match(r'- \S+: ', line)]


def sidebar(contents):
    for item in contents:
        if isinstance(item, str): yield item
        elif 'contents' in item: yield from sidebar(item['contents'])
        else: yield item['href']


SIDEBARS = yaml.safe_load((NBS / 'sidebar.yml').read_text())['website']['sidebar']


def test_the_sidebars_show_every_page_but_the_first_once():
    listed = [page for bar in SIDEBARS for page in sidebar(bar['contents'])]
    assert sorted([*listed, 'index.ipynb']) == PAGES


def test_there_is_a_sidebar_for_each_kind_of_page():
    assert [bar['title'] for bar in SIDEBARS] == ['Tutorials', 'Analyses', 'Explanation', 'Reference']
    assert [bar['id'] for bar in SIDEBARS] == ['tutorials', 'analyses', 'explanation', 'reference']


def test_the_navbar_leads_into_each_sidebar():
    "Quarto marks the item whose page is in the sidebar that a page shows"
    items = {item['text']: item['href'] for item in SITE['navbar']['left']}
    assert not [bar['title'] for bar in SIDEBARS if items[bar['title']] not in sidebar(bar['contents'])]


def test_nbdev_looks_for_the_site_where_quarto_writes_it():
    assert QUARTO['project']['output-dir'] == settings()['doc_path']


def test_the_site_knows_its_repository():
    known = SITE['repo-url'], SITE['repo-subdir'], SITE['repo-branch']
    assert known == ('https://github.com/cprfl/cprfl', settings()['nbs_path'], settings()['branch'])


def test_quarto_finds_its_files():
    files = [SITE['favicon'], SITE['navbar']['logo'], HTML['css'], HTML['include-after-body'], *HTML['theme'].values()]
    files += [*QUARTO['project']['resources'], *QUARTO['metadata-files']]
    files += [HTML['include-before-body'], *HTML['filters'], '404.qmd']
    files += [item['href'] for item in SITE['navbar']['left']]
    assert not [name for name in files if not list(NBS.glob(name))]


@pytest.mark.parametrize('kind', ['open-graph', 'twitter-card'])
def test_a_shared_link_has_a_picture_with_words(kind):
    with Image.open(NBS / SITE[kind]['image'].lstrip('/')) as image: assert image.size == (1200, 630)
    assert SITE[kind]['image-alt']


def test_equations_need_no_other_host(): assert HTML['html-math-method'] == 'mathml'


def test_quarto_writes_nothing_but_html():
    "A second format fails in Quarto 1.9, and 1.10 warns on it"
    assert list(QUARTO['format']) == ['html']


def test_pages_are_as_wide_as_code_of_100_characters():
    widths = {name: int(width.removesuffix('px')) for name, width in HTML['grid'].items()}
    assert widths['body-width'] >= 100 * 8.5
    assert sum(widths.values()) <= 1320, 'a laptop has 1280 to 1440 px'


def test_columns_are_as_wide_as_their_cells(): assert HTML['tbl-colwidths'] is False


def test_the_logo_has_a_size():
    assert re.search(r'<svg [^>]*width="32" height="32"', (NBS / SITE['navbar']['logo']).read_text())


def test_a_reader_chooses_the_colour_scheme(): assert HTML['respect-user-color-scheme'] is True


@pytest.mark.parametrize('name', [HTML['css'], *HTML['theme'].values()])
def test_styles_need_no_other_host(name):
    assert name.endswith(('.css', '.scss'))
    assert not re.search(r'https?:|@import|@use', (NBS / name).read_text())


def test_scripts_need_no_other_host(): assert ' src=' not in (NBS / HTML['include-after-body']).read_text()


# ---- Markdown

CODE_BLOCK = re.compile(r'^(```|~~~).*?^\1[^\n]*$', re.M | re.S)
EQUATION = re.compile(r'\$\$.*?\$\$|(?<![\\$\w])\$[^$\n]+\$(?!\w)', re.S)
LABEL = r'((?:[^\[\]`]|`[^`]*`|\[[^\[\]]*\])*)'
TARGET = r'([^()\s<>]+(?:\([^()\s]*\)[^()\s<>]*)?)'
LINK = re.compile(rf"(!?)\[{LABEL}\]\(<?{TARGET}>?(?:\s+[\"'][^\"']*[\"'])?\)")
TAG = re.compile(r"<(?:img|a)\b[^>]*?\b(?:src|href)=[\"']([^\"']+)[\"'][^>]*>")


def prose(text):
    "Markdown without its code blocks and equations"
    return EQUATION.sub('', CODE_BLOCK.sub('', text))


def links(text):
    text = re.sub(r'`[^`\n]*`', lambda code: '' if '](' in code[0] else code[0], prose(text))
    outer = LINK.findall(text)
    inner = [found for _, label, _ in outer for found in LINK.findall(label)] # a picture that is a link
    references = re.findall(r'^\[[^\]]+\]:\s+(\S+)', text, flags=re.M)
    return [target for _, _, target in outer + inner] + TAG.findall(text) + references


def slug(heading):
    "Pandoc's identifier of a heading"
    text = re.sub(r'\]\([^)]*\)|[`*\[]', '', heading).lower()
    text = ''.join(ch for ch in text if ch.isalnum() or ch in '_-. ').strip().replace(' ', '-')
    return re.sub(r'^[^a-z]+', '', text) or 'section'


def headings(text): return re.findall(r'^#{1,6}\s+(.+?)\s*#*$', CODE_BLOCK.sub('', text), flags=re.M)


def heading_anchor(heading):
    if given := re.search(r'\{#([\w.-]+)[^}]*\}', heading): return given[1]
    return slug(re.sub(r'\s*\{[^}]*\}$', '', heading))


def anchors(texts):
    "Every anchor of a page; a second heading of one name gets a number"
    found = set()
    for text in texts:
        for heading in headings(text):
            first = name = heading_anchor(heading)
            number = 0
            while name in found:
                number += 1
                name = f'{first}-{number}'
            found.add(name)
        found |= set(re.findall(r"<[^>]+\bid=[\"']([^\"']+)[\"']", text))
    return found


def alt_text(source):
    "The cell's fig-alt, as Quarto reads it"
    options = '\n'.join(line[3:] for line in source.splitlines() if re.match(r'#\| [\w-]+:', line))
    return (yaml.safe_load(options) or {}).get('fig-alt', '') if options else ''


@pytest.mark.parametrize('text, found', [
    ('[a](b.ipynb)', ['b.ipynb']), ("![c](d.png 't')", ['d.png']), ("<img src='e.png'>", ['e.png']),
    ('`l` [m](n.md) `o`', ['n.md']), ('[i]: j.md', ['j.md']), ('[![a](b.svg)](c.ipynb)', ['c.ipynb', 'b.svg']),
    ('`[x](y)`', []), ('$f[g](h)$', []), ('```\n[k](l)\n```', [])])
def test_links_are_found(text, found): assert links(text) == found


@pytest.mark.parametrize('heading, expected', [
    ('What `fit` does, and how', 'what-fit-does-and-how'), ('3 + 4: a [b](c.md)', 'a-b'), ('42', 'section')])
def test_a_heading_has_the_anchor_that_pandoc_gives_it(heading, expected): assert slug(heading) == expected


def test_anchors_of_a_page():
    assert anchors(["# A\n# A\n# A\n## B {#own}\n<a id='x'></a>"]) == {'a', 'a-1', 'a-2', 'own', 'x'}


@pytest.mark.parametrize('source, expected', [
    ('#| echo: false\n#| fig-alt: "bars: many"\nplot()', 'bars: many'), ('plot()', '')])
def test_alternative_text_is_read(source, expected): assert alt_text(source) == expected


# ---- links

def output_texts(out):
    data = out.get('data', {})
    return [data[kind] for kind in ('text/markdown', 'text/html') if kind in data][:1]


def cell_texts(nb):
    "Markdown of a notebook: its cells, and the outputs that are Markdown or HTML"
    for cell in nb.cells:
        if cell.cell_type == 'markdown': yield cell.source
        for out in cell.get('outputs', []): yield from output_texts(out)


SITE_URL = settings()['doc_host'] + settings()['doc_baseurl']
REPOSITORY = re.compile(re.escape(settings()['git_url']) + r'/(?:blob|tree|edit)/main/(.+)')


class Judge:
    "Says what is wrong with a link: None where it is right, '' where it leads elsewhere"
    def __init__(self, processed):
        self.anchors = {page: anchors(cell_texts(nb)) for page, (_, nb) in processed.items()}
        self.pages = {address(page, front): page for page, (front, _) in processed.items()}

    def __call__(self, link, at):
        target, _, anchor = link.partition('#')
        if target.rstrip('/') == SITE_URL: return self.page('index.ipynb', anchor)
        if target.startswith(f'{SITE_URL}/'): return self.page(self.pages.get(target[len(SITE_URL) + 1:]), anchor)
        if inside := REPOSITORY.match(target): return self.repository(ROOT / inside[1], anchor)
        if re.match(r'https?://|mailto:', target): return ''
        if target.startswith('data:image/'): return None
        if re.match(r'\w+:', target): return 'unknown kind of address'
        return self.file(Path(os.path.normpath(ROOT / at / '..' / target if target else ROOT / at)), at, anchor)

    def page(self, page, anchor):
        if page not in self.anchors: return 'no page of the site'
        if anchor and anchor not in self.anchors[page]: return 'no such anchor'

    def repository(self, file, anchor):
        if not file.exists(): return 'no such file in the repository'
        if anchor in ('', 'LNone'): return None # nbdev does not know the lines of methods
        line = re.fullmatch(r'L(\d+)', anchor)
        if not line: return 'an anchor in a file of the repository'
        if int(line[1]) > len(file.read_text().splitlines()): return 'beyond the end of the file'

    def file(self, file, at, anchor):
        if not file.exists(): return 'no such file'
        if at.startswith('nbs/') and NBS not in file.parents: return 'leads out of the site'
        if file.suffix == '.ipynb': return self.page(file.relative_to(NBS).as_posix(), anchor)
        if not anchor: return None
        if file.suffix != '.md': return 'an anchor in something that is no page'
        if anchor not in anchors([file.read_text()]): return 'no such anchor'


@pytest.fixture(scope='module')
def judge(processed): return Judge(processed)


BLOB = 'https://github.com/cprfl/cprfl/blob/main'
PAGE_URL = f'{SITE_URL}/model/cprfl.html'


@pytest.mark.parametrize('link', [
    'cprfl.ipynb', 'cprfl.ipynb#cprfl', '../index.ipynb#start', SITE_URL, f'{PAGE_URL}#cprfl',
    f'{BLOB}/cprfl/model/cprfl.py#L3'])
def test_a_right_link_passes(judge, link): assert judge(link, 'nbs/model/vsi.ipynb') is None


@pytest.mark.parametrize('link', [
    '4_model.ipynb', 'cprfl.ipynb#cprlf', '#nowhere', '../../README.md', f'{SITE_URL}/model/04_model.html', 'ftp:x',
    f'{PAGE_URL}#_hidden', f'{BLOB}/cprfl/models.py', f'{BLOB}/cprfl/model/cprfl.py#L99999', f'{BLOB}/README.md#x'])
def test_a_wrong_link_is_noticed(judge, link): assert judge(link, 'nbs/model/vsi.ipynb')


def test_a_link_to_another_site_is_not_judged(judge):
    assert judge('https://arxiv.org/abs/2408.08125', 'nbs/model/vsi.ipynb') == ''


def test_a_text_may_link_to_a_notebook(judge): assert judge('nbs/index.ipynb', 'README.md') is None


def test_links_resolve(judge, record_property):
    "In pages as they are written, and in the other texts"
    found = {(f'nbs/{page}', link) for page in PAGES for text in cell_texts(read(page)) for link in links(text)}
    found |= {(name, link) for name in TEXTS for link in links((ROOT / name).read_text())}
    judged = {(at, link): judge(link, at) for at, link in found}
    assert not {place: what for place, what in judged.items() if what}
    inside = sum(what is None for what in judged.values())
    assert inside > 50
    record_property('links', len(judged))
    print(f'\nlinks in pages and texts: {len(judged)}, of which checked: {inside}')


def own_links(nb):
    "Links of a processed page to the site and the repository, those in comments of signatures included"
    for text in cell_texts(nb):
        for link in [*links(text), *re.findall(r'\]\((https://[^)\s]+)\)', text)]:
            if link.startswith('http') and 'cprfl' in link: yield link


def test_links_to_symbols_resolve(processed, judge, record_property):
    "What nbdev makes of symbols in backticks, and its links to the source"
    found = {(f'nbs/{page}', link) for page, (_, nb) in processed.items() for link in own_links(nb)}
    assert not {(at, link): what for at, link in found if (what := judge(link, at))}
    assert len(found) > 200
    record_property('doc_links', len(found))
    print(f'\nlinks to symbols and sources: {len(found)}')


# ---- names in backticks

def texts():
    "Place and prose of every Markdown cell and every other text"
    yield from ((page, prose(cell.source)) for page, cell in cells('markdown'))
    yield from ((name, prose((ROOT / name).read_text())) for name in TEXTS)


def backticked(pattern):
    "Place and name, for each name in backticks that the pattern finds"
    codes = [(at, code) for at, text in texts() for code in re.findall(r'`([^`\n]+)`', text)]
    return [(at, name) for at, code in codes for name in re.findall(pattern, code)]


def exists(name):
    if name in {symbol for module in index['syms'].values() for symbol in module}: return True # also a method's name
    try: pkgutil.resolve_name(name)
    except (AttributeError, ImportError): return False
    return True


def test_names_of_the_package_exist():
    found = backticked(r'(?<![\w./])cprfl(?:\.\w+)+(?![\w/])')
    names = [(at, name) for at, name in found if not re.search(r'\.(py|csv|ipynb|toml|org|io)$', name)]
    assert len(names) > 5
    assert not [(at, name) for at, name in names if not exists(name)]


def test_commands_exist():
    scripts = set(re.findall(r'^(cprfl_\w+) =', (ROOT / 'pyproject.toml').read_text(), flags=re.M))
    found = backticked(r'^cprfl_\w+')
    assert len(found) > 10
    assert not [(at, name) for at, name in found if name not in scripts]


def test_targets_of_make_exist():
    targets = set(re.findall(r'^([a-z]+):', (ROOT / 'Makefile').read_text(), flags=re.M))
    found = backticked(r'^make ([a-z]+)')
    assert len(found) > 5
    assert not [(at, name) for at, name in found if name not in targets]


# ---- symbols

SYMBOLS = {f'{name}.{symbol}': thing for name in MODULES for symbol, thing in public_symbols(name).items()}
CALLABLES = [(name, thing) for name, thing in SYMBOLS.items() if callable(thing)]


def arguments(thing):
    "Name, annotation and comment of each argument or field"
    if inspect.isclass(thing) and '__init__' not in vars(thing): return
    left_out = {'self', 'return'}
    if dataclasses.is_dataclass(thing): # what is inherited has its comment in the base
        left_out |= {f.name for f in dataclasses.fields(thing)} - set(vars(thing)['__annotations__'])
    else:
        left_out |= {arg.name for arg in inspect.signature(thing).parameters.values() if arg.kind in VARIADIC}
    for name, doc in docments(thing, full=True, returns=False).items():
        if name not in left_out: yield name, doc.anno, doc.docment


def methods(name, thing):
    if not inspect.isclass(thing): return []
    return [(f'{name}.{k}', v) for k, v in vars(thing).items() if not k.startswith('_') and inspect.isfunction(v)]


def test_there_are_public_symbols(record_property):
    assert len(SYMBOLS) > 200
    record_property('symbols', len(SYMBOLS))
    print(f'\npublic symbols: {len(SYMBOLS)}')


def test_public_symbols_have_a_docstring():
    assert not [name for name, thing in CALLABLES if not inspect.getdoc(thing)]


def test_public_arguments_have_a_comment():
    seen = [(name, arg, comment) for name, thing in CALLABLES for arg, _, comment in arguments(thing)]
    assert len(seen) > 400
    assert not [f'{name}({arg})' for name, arg, comment in seen if not comment]


def test_comments_of_tensors_give_the_shape():
    owners = [owner for name, thing in CALLABLES for owner in [(name, thing), *methods(name, thing)]]
    tensors = [(name, arg, comment) for name, thing in owners for arg, anno, comment in arguments(thing)
               if comment and 'Tensor' in str(anno)]
    assert len(tensors) > 50
    assert not [found for found in tensors if not re.search(r'\[.*\]|scalar', found[-1])]


# ---- outputs and pictures

FOLDERS = 'home|root|tmp|Users|work|mnt|opt|usr|var|content'
UNWANTED = re.compile(rf'Traceback \(most recent|\w*Warning\b|(?<![\w./:])/(?:{FOLDERS})/|\b[A-Z]:\\\\')


def shown(out): return [out.get('text', ''), *(v for k, v in out.get('data', {}).items() if k.startswith('text/'))]


@pytest.mark.parametrize('page', PAGES)
def test_outputs_show_no_paths_and_no_failures(page):
    outputs = [(cell.id, out) for cell in read(page).cells for out in cell.get('outputs', [])]
    assert not [cell for cell, out in outputs if out.output_type == 'error' or out.get('name') == 'stderr']
    found = [(cell, UNWANTED.search(text)) for cell, out in outputs for text in shown(out)]
    assert not [(cell, bad[0]) for cell, bad in found if bad]


def draws(cell): return any(kind.startswith('image/') for out in cell.outputs for kind in out.get('data', {}))


def test_drawn_pictures_have_alternative_text(record_property):
    pictures = [(page, cell) for page, cell in cells('code') if draws(cell)]
    assert pictures
    assert not [(page, cell.id) for page, cell in pictures if len(str(alt_text(cell.source)).split()) < 4]
    record_property('pictures', len(pictures))
    print(f'\npictures with alternative text: {len(pictures)}')


def test_linked_pictures_have_alternative_text():
    found = [(page, *link) for page, cell in cells('markdown') for link in LINK.findall(prose(cell.source))]
    assert not [(page, words) for page, mark, words, _ in found if mark and len(words.split()) < 2]


def test_picture_tags_have_alternative_text():
    tags = [(page, tag) for page, cell in cells('markdown') for tag in re.findall(r'<img\b[^>]*>', cell.source)]
    assert not [(page, tag) for page, tag in tags if not re.search(r"\balt=[\"'][^\"']+", tag)]


# ---- words

DICTIONARY = Path('/usr/share/dict/words') # where the system has one
RIGHT = set('computing demonstration emphasises hiding leaving operation smallest surprises talk'.split()) # one heading
ENDINGS = ('s', 'es', 'ed', 'd', 'ing', 'ly')
NOT_WORDS = re.compile(r'`[^`]*`|\$[^$]*\$|\]\([^)]*\)|\{[^}]*\}')


def words(text):
    found = re.findall(r"[^\W\d_](?:[^\W\d_]|['’])*", text.replace('’', "'").lower())
    return {word.strip("'").removesuffix("'s") for word in found} - {''}


def inflected(known):
    "Known words, and what they are with and without an ending"
    longer = {word + ending for word in known for ending in ENDINGS}
    return known | longer | {word.removesuffix(ending) for word in known for ending in ENDINGS}


def known_words():
    "Words of the project's prose (headings excepted), code and tests, and of the system's dictionary"
    bodies = [re.sub(r'^#{1,6}\s.*$', '', cell.source, flags=re.M) for _, cell in cells('markdown')]
    bodies += [cell.source for _, cell in cells('code')]
    files = [ROOT / name for name in TEXTS if name != 'README.md'] + [ROOT / 'LICENSE', *(ROOT / 'tests').rglob('*.py')]
    files += [DICTIONARY] if DICTIONARY.is_file() else []
    return words('\n'.join(bodies + [file.read_text() for file in files])) | RIGHT


def test_headings_are_spelt_right():
    "Each word of a heading occurs elsewhere; a slip of the pen does not"
    found = [(heading, page) for page, cell in cells('markdown') for heading in headings(cell.source)]
    titles = {NOT_WORDS.sub(' ', heading): page for heading, page in found}
    assert len(titles) > 100
    known = inflected(known_words())
    unknown = {(word, title, page) for title, page in titles.items() for word in words(title) if word not in known}
    assert unknown == set(), 'a misspelling, or a word for RIGHT'


# ---- what a page shows badly

WIDEST = 100 # characters of code that fit beside two columns
PROSE = [page for page in PAGES if page not in REFERENCE]
LOADS = r'<(?:script|img|link|iframe|source)\b[^>]*\b(?:src|href)=["\']?(?:https?:)?//'
OTHER_HOST = re.compile(rf'{LOADS}|!\[[^\]]*\]\(https?:')
NESTED = re.compile(r'\[[^\[\]]*\[`[^`]*`\]\([^()]*\)[^\[\]]*\]\(')


def code_shown(page):
    "Lines of code that a reader sees: those of code cells, and of blocks in Markdown"
    for cell in read(page).cells:
        if re.search(r'^#\| *(echo: *false|hide|hide_input)\b', cell.source, re.M): continue
        blocks = [cell.source] if cell.cell_type == 'code' else [found[0] for found in CODE_BLOCK.finditer(cell.source)]
        yield from (line for block in blocks for line in block.splitlines() if not line.startswith('#|'))


@pytest.mark.parametrize('page', PROSE)
def test_code_fits_the_page(page): assert not [line for line in code_shown(page) if len(line) > WIDEST]


@pytest.mark.parametrize('page', [page for page in PROSE if page.startswith('analysis/')])
def test_an_analysis_begins_with_its_result(page):
    "Folded set-up, then the result, whose code is not shown; a section comes after it"
    before = takewhile(lambda cell: not re.search('^## ', cell.source, re.M), read(page).cells)
    shown = [cell.source for cell in before if cell.cell_type == 'code' and '#| code-fold: true' not in cell.source]
    assert shown
    assert shown[0].startswith('#| echo: false')


@pytest.mark.parametrize('page', [page for page in PROSE if page != 'index.ipynb'])
def test_titles_fit_the_sidebar(page):
    assert len(read(page).cells[0].source.splitlines()[0].removeprefix('# ')) <= 31


@pytest.mark.parametrize('page', PAGES)
def test_no_output_is_html(page):
    "Quarto loads jQuery and RequireJS from another host for it: `make outputs` turns tables into Markdown"
    outputs = [(cell.id, out) for cell in read(page).cells for out in cell.get('outputs', [])]
    assert not [cell for cell, out in outputs if 'text/html' in out.get('data', {})]


@pytest.mark.parametrize('text, finds', [
    ('<script src="https://x.org/a.js">', True), ('<img alt="a" src=//x.org/a.png>', True),
    ('![a](http://x.org/a.png)', True), ('<img src="a.png">', False), ('[a](https://x.org)', False),
    ('<a href="https://x.org">', False)])
def test_what_needs_another_host_is_found(text, finds): assert bool(OTHER_HOST.search(text)) is finds


def test_pages_need_no_other_host(processed):
    texts = [(page, text) for page, (_, nb) in processed.items() for text in cell_texts(nb)]
    assert not [(page, found[0]) for page, text in texts if (found := OTHER_HOST.search(text))]


@pytest.mark.parametrize('text, finds', [
    ('[[`a`](b.html)](c.ipynb)', True), ('[see [`a`](b.html) there](c.ipynb)', True), ('[`a`](b.html)', False)])
def test_a_link_in_a_link_is_found(text, finds): assert bool(NESTED.search(text)) is finds


def test_no_link_is_inside_a_link(processed):
    "nbdev makes links of symbols in backticks, also where they are the text of a link: write that without backticks"
    texts = [(page, prose(text)) for page, (_, nb) in processed.items() for text in cell_texts(nb)]
    assert not [(page, found[0]) for page, text in texts if (found := NESTED.search(text))]


def test_signatures_name_no_module_of_a_notebook(processed):
    texts = [(page, text) for page, (_, nb) in processed.items() for text in cell_texts(nb)]
    assert not [page for page, text in texts if '__main__.' in text]


def test_code_of_pages_is_whole(processed):
    "No line of a cell is lost, such as the only one below an `if`"
    shell = TransformerManager()
    for page, (_, nb) in processed.items():
        for cell in nb.cells:
            if cell.cell_type == 'code' and not cell.source.startswith('%%'):
                compile(shell.transform_cell(cell.source), page, 'exec', flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)


def test_settings_are_a_table_of_fields(processed):
    text = '\n'.join(cell_texts(processed['train/config.ipynb'][1]))
    assert '| lr | float | `5e-05` | peak learning rate' in text


def used_names():
    "Names of arguments, fields and methods, which in backticks may be meant instead of a function of that name"
    for name, thing in CALLABLES:
        yield from (arg for arg, _, _ in arguments(thing))
        yield from (method.rpartition('.')[2] for method, _ in methods(name, thing))


def test_a_link_leads_to_what_is_meant(processed):
    "A plain word that also names an argument, a field or a method is a link on its own page only"
    ambiguous = {name for name in used_names() if name.islower() and '_' not in name}
    found = [(page, *link) for page, (_, nb) in processed.items() for cell in nb.cells if cell.cell_type == 'markdown'
             for link in re.findall(rf'\[`(\w+)`\]\({SITE_URL}/([\w/]+)\.html', cell.source)]
    assert not [(page, name) for page, name, at in found if name in ambiguous and page != f'{at}.ipynb']


# ---- tutorials elsewhere

TUTORIALS = [page for page in PAGES if page.startswith('tutorials/')]


@pytest.mark.parametrize('page', TUTORIALS)
def test_a_tutorial_opens_elsewhere(page):
    "Its second cell has buttons, each with the page's own address"
    at = f'github.com/cprfl/cprfl/blob/main/nbs/{page}'
    targets = [target for target in links(read(page).cells[1].source) if target.startswith('https:')]
    colab = f'https://colab.research.google.com/{at.replace("github.com", "github")}'
    assert targets == [colab, f'https://kaggle.com/kernels/welcome?src=https://{at}']


@pytest.mark.parametrize('page', TUTORIALS)
def test_a_tutorial_installs_what_it_needs(page):
    code = [cell.source for cell in read(page).cells if cell.cell_type == 'code']
    assert 'pip install' in code[0]


# ---- workflow and make

STEPS = yaml.safe_load((ROOT / '.github' / 'workflows' / 'ci.yml').read_text())['jobs']['docs']['steps']


@pytest.fixture
def render():
    "The step of the workflow that renders the site"
    [step] = [step for step in STEPS if 'make docs' in step.get('run', '')]
    return step


def test_the_workflow_installs_a_quarto_that_can_render_the_site():
    [step] = [step for step in STEPS if 'quarto-actions/setup' in step.get('uses', '')]
    assert step['with']['version'] == '1.10.18'


def test_the_workflow_keeps_the_site_of_a_pull_request():
    kept = [step['with']['path'] for step in STEPS if 'upload-artifact' in step.get('uses', '')]
    assert '_docs' in kept


def test_the_workflow_opens_the_site_in_a_browser():
    assert [step for step in STEPS if 'tests/browse.py _docs' in step.get('run', '')]


def test_the_workflow_ends_at_a_failure_in_a_pipe(render):
    assert render['shell'] == 'bash', 'which GitHub starts with pipefail'
    assert 'tee docs.log' in render['run']


@pytest.mark.parametrize('line, fails', [
    ('WARN: the link does not resolve', True), ('WARNING (losses.ipynb)', True),
    ('[WARNING] Could not convert TeX math', True), ('a.py:1: UserWarning: cells', True),
    ('Unable to resolve link target: a.ipynb', True), ('[ 3/37] losses.ipynb', False)])
def test_the_workflow_fails_at_a_warning(render, line, fails):
    [pattern] = re.findall(r"! grep -nE '([^']+)' docs\.log", render['run'])
    assert bool(re.search(pattern, line)) is fails


@pytest.mark.skipif(shutil.which('quarto') is not None, reason='Quarto is there')
@pytest.mark.skipif(shutil.which('make') is None, reason='make is not there')
def test_make_docs_says_what_it_needs():
    done = subprocess.run(['make', '-o', '.venv/.ready', 'docs'], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode != 0
    assert 'https://quarto.org' in done.stdout


# ---- the script of the pages

SOURCE = 'https://github.com/cprfl/cprfl/blob/main/nbs/losses.ipynb'
BODY = f"""<div class="toc-actions"><ul><li><a class="toc-action" href="{SOURCE}"><i></i>View source</a></li></ul></div>
<code class="sourceCode"><span class="co"># a [`Run`](https://x.org/y#run) of it</span></code>"""


@pytest.fixture(scope='module')
def in_browser():
    "Links of a page, and a comment of it, after the script has run"
    chromium = os.environ.get('CPRFL_CHROMIUM') or shutil.which('chromium') or shutil.which('chromium-browser')
    if not chromium: pytest.skip('no Chromium here (set CPRFL_CHROMIUM to it)')
    api = pytest.importorskip('playwright.sync_api')
    with api.sync_playwright() as p:
        browser = p.chromium.launch(executable_path=chromium, args=['--no-sandbox'])
        page = browser.new_page()
        page.set_content(BODY + (NBS / HTML['include-after-body']).read_text())
        found = page.evaluate("[...document.querySelectorAll('a')].map(a => [a.textContent, a.getAttribute('href')])")
        comment = page.inner_text('.co')
        browser.close()
    return dict(found), comment


def test_the_link_to_the_source_gets_company(in_browser):
    path = SOURCE.removeprefix('https://github.com/')
    assert list(in_browser[0].items())[:4] == [
        ('View source', SOURCE), ('Open in Colab', f'https://colab.research.google.com/github/{path}'),
        ('Open in Kaggle', f'https://kaggle.com/kernels/welcome?src={SOURCE}'),
        ('Notebook for JupyterLab', f"https://raw.githubusercontent.com/{path.replace('/blob/', '/')}")]


def test_links_in_signatures_become_links(in_browser):
    assert in_browser[0]['Run'] == 'https://x.org/y#run'
    assert in_browser[1] == '# a Run of it'
