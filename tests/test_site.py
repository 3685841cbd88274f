"The site, without Quarto: pages, links, anchors, symbols, pictures and their words"
import configparser
import dataclasses
import importlib
import inspect
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
import yaml
from fastcore.docments import docments
from helpers import MODULES, NBS, ROOT, copy_project
from helpers import NOTEBOOKS as PAGES

TEXTS = sorted(str(p.relative_to(ROOT)) for p in [*ROOT.glob('*.md'), *(ROOT / '.github').rglob('*.md'), *(ROOT / 'cprfl').rglob('*.md')])
COMING = set() # pages in the sidebar that are not written yet


def read(page): return nbformat.read(NBS / page, 4)
def quarto(): return yaml.safe_load((ROOT / '_quarto.yml').read_text())


def settings():
    parser = configparser.ConfigParser()
    parser.read(ROOT / 'settings.ini')
    return parser['DEFAULT']


# ---- pages

@pytest.fixture(scope='module')
def processed(tmp_path_factory):
    "What nbdev hands to Quarto: page -> (front matter, notebook), and what nbdev warned of"
    folder = tmp_path_factory.mktemp('site') / 'cprfl'
    folder.mkdir()
    copy_project(folder, 'settings.ini', 'pyproject.toml', '_quarto.yml')
    code = 'from nbdev.serve import proc_nbs; proc_nbs(n_workers=0, force=True)' # nbdev_proc_nbs would try to install Quarto
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get('PYTHONPATH')]))
    done = subprocess.run([sys.executable, '-c', code], cwd=folder, env=os.environ | {'OMP_NUM_THREADS': '1', 'PYTHONPATH': path}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    pages = {}
    for file in (folder / '_proc').rglob('*.ipynb'):
        nb = nbformat.v4.reads(file.read_text()) # nbdev leaves a field that nbformat.read would report
        pages[str(file.relative_to(folder / '_proc'))] = yaml.safe_load(nb.cells[0].source.strip().strip('-')), nb
    return pages, done.stderr


def test_every_page_is_processed(processed, record_property):
    pages, stderr = processed
    assert sorted(pages) == PAGES
    assert 'Warning' not in stderr, stderr
    for page, (front, nb) in pages.items():
        assert front['title'] and front['description'] and front['output-file'].endswith('.html'), page
        assert len(nb.cells) > 2, page
    urls = [str(Path(page).with_name(front['output-file'])) for page, (front, _) in pages.items()]
    assert len(set(urls)) == len(urls), 'two pages of one address'
    record_property('pages', len(pages))
    print(f'\npages: {len(pages)}')


@pytest.mark.parametrize('page', PAGES)
def test_first_cells_lose_nothing(page):
    "nbdev makes front matter of the first cell: what is neither title, line nor `- key: value` would not be shown"
    lines = [line for line in read(page).cells[0].source.splitlines() if line.strip()]
    assert [line[:2] for line in lines[:2]] == ['# ', '> '], lines[:2]
    assert all(re.match(r'- \S+: ', line) for line in lines[2:]), lines[2:]


def sidebar(contents):
    for item in contents:
        if isinstance(item, str): yield item
        else: yield from sidebar(item['contents'])


def test_sidebar_and_pages_agree():
    contents = yaml.safe_load((NBS / 'sidebar.yml').read_text())['website']['sidebar']['contents']
    entries = list(sidebar(contents))
    assert [item['section'] for item in contents if isinstance(item, dict)] == ['Tutorials', 'Analyses', 'Explanation', 'Reference']
    assert len(set(entries)) == len(entries)
    assert set(PAGES) - set(entries) == set(), 'pages that the sidebar lacks'
    assert set(entries) - set(PAGES) <= COMING, 'entries without a page'


def test_quarto_finds_its_files():
    from PIL import Image
    config = quarto()
    site, html = config['website'], config['format']['html']
    assert config['project']['output-dir'] == settings()['doc_path'], 'where nbdev_docs looks for the site'
    assert (site['repo-url'], site['repo-subdir'], site['repo-branch']) == ('https://github.com/cprfl/cprfl', settings()['nbs_path'], settings()['branch'])
    files = [site['favicon'], site['navbar']['logo'], html['css'], html['include-after-body'], *html['theme'].values(), *config['project']['resources'], *config['metadata-files']]
    files += [item['href'] for item in site['navbar']['left'] if item['href'] not in COMING]
    assert [f for f in files if not (NBS / f).is_file()] == []
    for card in (site['open-graph'], site['twitter-card']):
        with Image.open(NBS / card['image'].lstrip('/')) as image: assert image.size == (1200, 630) and card['image-alt']


def test_pages_need_no_other_hosts():
    "Fonts and styles come with the page, equations are MathML, scripts are ours"
    html = quarto()['format']['html']
    assert html['html-math-method'] == 'mathml' and all(name.endswith('.scss') for name in html['theme'].values())
    for name in (html['css'], *html['theme'].values()): assert not re.search(r'https?:|@import|@use', (NBS / name).read_text()), name
    assert ' src=' not in (NBS / html['include-after-body']).read_text()


# ---- links

LINK = re.compile(r"(!?)\[((?:[^\[\]`]|`[^`]*`|\[[^\[\]]*\])*)\]\(<?([^()\s<>]+(?:\([^()\s]*\)[^()\s<>]*)?)>?(?:\s+[\"'][^\"']*[\"'])?\)")
TAG = re.compile(r"<(?:img|a)\b[^>]*?\b(?:src|href)=[\"']([^\"']+)[\"'][^>]*>")


def prose(text):
    "Markdown without its code blocks and equations"
    text = re.sub(r'^(```|~~~).*?^\1[^\n]*$', '', text, flags=re.M | re.S)
    return re.sub(r'\$\$.*?\$\$|(?<![\\$\w])\$[^$\n]+\$(?!\w)', '', text, flags=re.S)


def links(text):
    text = re.sub(r'`[^`\n]*`', lambda code: '' if '](' in code[0] else code[0], prose(text))
    refs = re.findall(r'^\[[^\]]+\]:\s+(\S+)', text, flags=re.M)
    found = [m[2] for m in LINK.findall(text)] + TAG.findall(text) + refs
    return found + [inner[2] for m in LINK.findall(text) for inner in LINK.findall(m[1])]


def slug(heading):
    "Pandoc's identifier of a heading"
    text = re.sub(r'\]\([^)]*\)|[`*\[]', '', heading)
    text = ''.join(ch for ch in text.lower() if ch.isalnum() or ch in '_-. ').strip().replace(' ', '-')
    return re.sub(r'^[^a-z]+', '', text) or 'section'


def headings(text): return re.findall(r'^#{1,6}\s+(.+?)\s*#*$', re.sub(r'^(```|~~~).*?^\1[^\n]*$', '', text, flags=re.M | re.S), flags=re.M)


def anchors(texts):
    "Every anchor of a page"
    found = set()
    for text in texts:
        for heading in headings(text):
            own = re.search(r'\{#([\w.-]+)[^}]*\}', heading)
            name = own[1] if own else slug(re.sub(r'\s*\{[^}]*\}$', '', heading))
            while name in found: name = re.sub(r'(-\d+)?$', lambda m: f"-{int((m[1] or '-0')[1:]) + 1}", name, count=1)
            found.add(name)
        found |= set(re.findall(r"<[^>]+\bid=[\"']([^\"']+)[\"']", text))
    return found


def cell_texts(nb):
    "Markdown of a notebook: its cells, and the outputs that are Markdown or HTML"
    for cell in nb.cells:
        if cell.cell_type == 'markdown': yield cell.source
        for out in cell.get('outputs', []):
            data = out.get('data', {})
            if 'text/markdown' in data: yield data['text/markdown']
            elif 'text/html' in data: yield data['text/html']


@pytest.fixture(scope='module')
def page_anchors(processed): return {page: anchors(cell_texts(nb)) for page, (_, nb) in processed[0].items()}


@pytest.fixture(scope='module')
def addresses(processed):
    "Address below the site -> page"
    return {str(Path(page).with_name(front['output-file'])): page for page, (front, _) in processed[0].items()}


def problem(link, at, page_anchors, addresses):
    "What is wrong with a link in a file at ROOT/at; None where it is right, '' where it leads elsewhere"
    site, blob = settings()['doc_host'] + settings()['doc_baseurl'], settings()['git_url']
    target, _, anchor = link.partition('#')
    if target.rstrip('/') == site: target, page = site, 'index.ipynb'
    elif target.startswith(site + '/'):
        if (page := addresses.get(target[len(site) + 1:])) is None: return 'no such page'
    elif m := re.match(re.escape(blob) + r'/(?:blob|tree|edit)/main/(.+)', target):
        file = ROOT / m[1]
        if not file.exists(): return 'no such file in the repository'
        if line := re.fullmatch(r'L(\d+)', anchor): return None if int(line[1]) <= len(file.read_text().splitlines()) else 'beyond the end of the file'
        return None if anchor in ('', 'LNone') else 'an anchor in a file of the repository' # nbdev does not know the lines of methods
    elif re.match(r'https?://|mailto:', target): return ''
    elif re.match(r'\w+:', target): return None if target.startswith('data:image/') else 'unknown kind of address'
    else:
        file = (ROOT / at).parent / target if target else ROOT / at
        if not file.exists(): return 'no such file'
        file = Path(os.path.normpath(file))
        inside = at.startswith('nbs/')
        if inside and NBS not in file.parents: return 'leads out of the site'
        if file.suffix == '.md' and anchor: return None if anchor in anchors([file.read_text()]) else 'no such anchor'
        if file.suffix != '.ipynb': return None if not anchor else 'an anchor in something that is no page'
        page = str(file.relative_to(NBS))
    if page not in page_anchors: return 'no page of the site'
    return None if not anchor or anchor in page_anchors[page] else 'no such anchor'


def test_the_checks_notice(page_anchors, addresses):
    "Links that are wrong in every way that the checks know, and some that are right"
    def judge(link, at='nbs/model/vsi.ipynb'): return problem(link, at, page_anchors, addresses)
    site, blob = 'https://cprfl.github.io/cprfl', 'https://github.com/cprfl/cprfl/blob/main'
    for link in ('cprfl.ipynb', 'cprfl.ipynb#cprfl', '../index.ipynb#install', site, f'{site}/model/cprfl.html#cprfl', f'{blob}/cprfl/model/cprfl.py#L3'): assert judge(link) is None, link
    for link in ('4_model.ipynb', 'cprfl.ipynb#cprlf', '#nowhere', '../../README.md', f'{site}/model/04_model.html', f'{site}/model/cprfl.html#_hidden', f'{blob}/cprfl/models.py', f'{blob}/cprfl/model/cprfl.py#L99999'): assert judge(link), link
    assert judge('https://arxiv.org/abs/2408.08125') == '' and judge('nbs/index.ipynb', 'README.md') is None
    assert links("[a](b.ipynb) ![c](d.png 't') <img src='e.png'> `[x](y)` `l` [m](n.md) `o` $f[g](h)$\n[i]: j.md\n```\n[k](l)\n```") == ['b.ipynb', 'd.png', 'n.md', 'e.png', 'j.md']
    assert [slug(h) for h in ('What `fit` does, and how', '3 + 4: a [b](c.md)', '42')] == ['what-fit-does-and-how', 'a-b', 'section']
    assert anchors(["# A\n# A\n## B {#own}\n<a id='x'></a>"]) == {'a', 'a-1', 'own', 'x'}
    assert alt_text('#| echo: false\n#| fig-alt: "bars: many"\nplot()') == 'bars: many' and alt_text('plot()') == ''


def test_links_resolve(page_anchors, addresses, record_property):
    "In pages as they are written, as nbdev processed them, and in the other texts"
    found = {(f'nbs/{page}', link) for page in PAGES for text in cell_texts(read(page)) for link in links(text)}
    found |= {(name, link) for name in TEXTS for link in links((ROOT / name).read_text())}
    judged = {(at, link): problem(link, at, page_anchors, addresses) for at, link in found}
    assert {k: v for k, v in judged.items() if v} == {}
    inside = sum(v is None for v in judged.values())
    assert inside > 50
    record_property('links', len(judged))
    print(f'\nlinks in pages and texts: {len(judged)}, of which checked: {inside}')


def test_links_to_symbols_resolve(processed, page_anchors, addresses, record_property):
    "What nbdev makes of symbols in backticks, and its links to the source"
    found = {(f'nbs/{page}', link) for page, (_, nb) in processed[0].items() for text in cell_texts(nb) for link in [*links(text), *re.findall(r'\]\((https://[^)\s]+)\)', text)]
             if 'cprfl' in link and link.startswith('http')}
    wrong = {(at, link): p for at, link in found if (p := problem(link, at, page_anchors, addresses))}
    assert wrong == {}
    assert len(found) > 200
    record_property('doc_links', len(found))
    print(f'\nlinks to symbols and sources: {len(found)}')


def backticked():
    for page in PAGES:
        for cell in read(page).cells:
            if cell.cell_type == 'markdown': yield from ((page, code) for code in re.findall(r'`([^`\n]+)`', prose(cell.source)))
    for name in TEXTS: yield from ((name, code) for code in re.findall(r'`([^`\n]+)`', prose((ROOT / name).read_text())))


def test_names_in_backticks_exist():
    "Dotted names of the package, commands and make targets"
    from cprfl._modidx import d
    known = {name for module in d['syms'].values() for name in module} | {f'cprfl.{m}' for m in MODULES} | {'cprfl'}
    scripts = set(re.findall(r'^(cprfl_\w+) =', (ROOT / 'pyproject.toml').read_text(), flags=re.M))
    targets = set(re.findall(r'^([a-z]+):', (ROOT / 'Makefile').read_text(), flags=re.M))
    wrong, seen = [], 0
    for at, code in backticked():
        for name in re.findall(r'(?<![\w./])cprfl(?:\.\w+)+(?![\w/])', code):
            module = '.'.join(name.split('.')[:2])
            exists = name in known or module in known and name.count('.') == 2 and hasattr(importlib.import_module(module), name.split('.')[2])
            seen += 1
            if not exists and not re.search(r'\.(py|csv|ipynb|toml|org|io)$', name): wrong.append((at, name))
        for name in re.findall(r'^cprfl_\w+', code):
            seen += 1
            if name not in scripts: wrong.append((at, name))
        for name in re.findall(r'^make ([a-z]+)', code):
            seen += 1
            if name not in targets: wrong.append((at, f'make {name}'))
    assert wrong == [] and seen > 20


# ---- symbols

def symbols():
    for name in MODULES:
        module = importlib.import_module(f'cprfl.{name}')
        for symbol in module.__all__:
            thing = getattr(module, symbol)
            if getattr(thing, '__module__', None) == module.__name__ or not callable(thing): yield f'{name}.{symbol}', thing


def arguments(thing):
    "Name, annotation and comment of each argument or field"
    if not callable(thing) or inspect.isclass(thing) and '__init__' not in vars(thing): return
    kinds = {} if dataclasses.is_dataclass(thing) else {p.name: p.kind for p in inspect.signature(thing).parameters.values()}
    for name, doc in docments(thing, full=True, returns=False).items():
        if name not in ('self', 'return') and kinds.get(name) not in (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD): yield name, doc.anno, doc.docment


def test_public_symbols_are_documented(record_property):
    "A docstring each, a comment per argument, and shapes where tensors go in"
    wrong, count, args = [], 0, 0
    for name, thing in symbols():
        count += 1
        if not callable(thing): continue
        if not inspect.getdoc(thing): wrong.append(f'{name}: no docstring')
        methods = [(f'{name}.{k}', v) for k, v in vars(thing).items() if not k.startswith('_') and inspect.isfunction(v)] if inspect.isclass(thing) else []
        for arg, anno, comment in arguments(thing):
            args += 1
            if not comment: wrong.append(f'{name}({arg}): no comment')
        for owner, part in [(name, thing), *methods]:
            for arg, anno, comment in arguments(part):
                if 'Tensor' in str(anno) and comment and not re.search(r'\[.*\]|scalar', comment): wrong.append(f'{owner}({arg}): a tensor of which shape? {comment}')
    assert wrong == []
    assert count > 200 and args > 400
    record_property('symbols', count)
    print(f'\npublic symbols: {count}, arguments: {args}')


# ---- outputs and pictures

@pytest.mark.parametrize('page', [p for p in PAGES if not p.startswith('core/')])
def test_outputs_show_no_paths_and_no_failures(page):
    for cell in read(page).cells:
        for out in cell.get('outputs', []):
            assert out.output_type != 'error' and out.get('name') != 'stderr', cell.id
            text = '\n'.join([out.get('text', ''), *(v for k, v in out.get('data', {}).items() if k.startswith('text/'))])
            bad = re.search(r'Traceback \(most recent|\w*Warning\b|(?<![\w./:])/(?:home|root|tmp|Users|work|mnt|opt|usr|var|content)/|\b[A-Z]:\\\\', text)
            assert not bad, f'{cell.id} shows {bad[0]!r}'


def alt_text(source):
    "The cell's fig-alt, as Quarto reads it"
    options = '\n'.join(line[3:] for line in source.splitlines() if re.match(r'#\| [\w-]+:', line))
    return (yaml.safe_load(options) or {}).get('fig-alt', '') if options else ''


def test_pictures_have_alternative_text(record_property):
    count, wrong = 0, []
    for page in PAGES:
        for cell in read(page).cells:
            if cell.cell_type == 'markdown':
                shown = [m for m in LINK.findall(prose(cell.source)) if m[0] == '!']
                count += len(shown)
                wrong += [(page, cell.id, m[2]) for m in shown if len(m[1].split()) < 2]
                wrong += [(page, cell.id, tag) for tag in re.findall(r'<img\b[^>]*>', cell.source) if not re.search(r"\balt=[\"'][^\"']+", tag)]
            elif any(kind.startswith('image/') for out in cell.outputs for kind in out.get('data', {})):
                count += 1
                text = alt_text(cell.source)
                if not isinstance(text, str) or len(text.split()) < 4: wrong.append((page, cell.id, text))
    assert wrong == []
    record_property('pictures', count)
    print(f'\npictures with alternative text: {count}')


# ---- words

WORDS = Path('/usr/share/dict/words') # where the system has one
RIGHT = set('computing demonstration leaving operation smallest surprises talk'.split()) # right, and used in one heading only


def words(text): return {w.strip("'").removesuffix("'s") for w in re.findall(r"[^\W\d_](?:[^\W\d_]|['’])*", text.replace('’', "'").lower())} - {''}


def test_headings_are_spelt_right():
    "Each word of a heading occurs elsewhere in the project's prose or code, or in the system's dictionary; a slip of the pen does not"
    titles, body = {}, []
    for page in PAGES:
        for cell in read(page).cells:
            if cell.cell_type != 'markdown':
                body.append(cell.source)
                continue
            for heading in headings(cell.source): titles.setdefault(re.sub(r'`[^`]*`|\$[^$]*\$|\]\([^)]*\)|\{[^}]*\}', ' ', heading), page)
            body.append(re.sub(r'^#{1,6}\s.*$', '', cell.source, flags=re.M))
    body += [(ROOT / name).read_text() for name in TEXTS if name != 'README.md'] + [(ROOT / 'LICENSE').read_text()]
    body += [p.read_text() for p in (ROOT / 'tests').rglob('*.py')]
    known = words('\n'.join(body)) | RIGHT | (words(WORDS.read_text()) if WORDS.is_file() else set())
    stems = known | {w + e for w in known for e in ('s', 'es', 'ed', 'd', 'ing', 'ly')} | {w[:-len(e)] for w in known for e in ('s', 'es', 'ed', 'd', 'ing') if w.endswith(e)}
    unknown = {(w, heading, page) for heading, page in titles.items() for w in words(heading) if w not in stems}
    assert unknown == set(), 'a misspelling, or a word for RIGHT'
    assert len(titles) > 100


# ---- workflow and make

def test_workflow_renders_and_fails_on_warnings():
    jobs = yaml.safe_load((ROOT / '.github' / 'workflows' / 'ci.yml').read_text())['jobs']
    steps = jobs['docs']['steps']
    assert any('quarto-actions/setup' in step.get('uses', '') for step in steps)
    [render] = [step for step in steps if 'make docs' in step.get('run', '')]
    assert render['shell'] == 'bash' and 'tee docs.log' in render['run'], 'bash as GitHub starts it ends at a failure in a pipe'
    [pattern] = re.findall(r"! grep -nE '([^']+)' docs\.log", render['run'])
    for line in ('WARN: the link does not resolve', 'WARNING (core/x.ipynb)', '[WARNING] Could not convert TeX math', 'a.py:1: UserWarning: cells', 'Unable to resolve link target: a.ipynb'):
        assert re.search(pattern, line), line
    assert not re.search(pattern, '[ 3/37] core/losses.ipynb')


@pytest.mark.skipif(shutil.which('quarto') is not None, reason='Quarto is there')
@pytest.mark.skipif(shutil.which('make') is None, reason='make is not there')
def test_make_docs_says_what_it_needs():
    done = subprocess.run(['make', '-o', '.venv/.ready', 'docs'], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode != 0 and 'https://quarto.org' in done.stdout


def test_links_of_a_page_in_a_browser():
    "Quarto's link to the source gets company, and links in signatures become links"
    chromium = os.environ.get('CPRFL_CHROMIUM') or shutil.which('chromium') or shutil.which('chromium-browser')
    if not chromium: pytest.skip('no Chromium here (set CPRFL_CHROMIUM to it)')
    api = pytest.importorskip('playwright.sync_api')
    source = 'https://github.com/cprfl/cprfl/blob/main/nbs/core/00_data.ipynb'
    body = f'<div class="toc-actions"><ul><li><a class="toc-action" href="{source}"><i></i>View source</a></li></ul></div><code class="sourceCode"><span class="co"># a [`Run`](https://x.org/y#run) of it</span></code>'
    with api.sync_playwright() as p:
        browser = p.chromium.launch(executable_path=chromium, args=['--no-sandbox'])
        page = browser.new_page()
        page.set_content(body + (NBS / 'assets' / 'links.html').read_text())
        found = page.evaluate("[...document.querySelectorAll('a')].map(a => [a.textContent, a.getAttribute('href')])")
        comment = page.inner_text('.co')
        browser.close()
    assert found == [['View source', source], ['Open in Colab', source.replace('https://github.com/', 'https://colab.research.google.com/github/')], ['Open in Kaggle', 'https://kaggle.com/kernels/welcome?src=' + source],
                     ['Notebook for JupyterLab', 'https://raw.githubusercontent.com/cprfl/cprfl/main/nbs/core/00_data.ipynb'], ['Run', 'https://x.org/y#run']]
    assert comment == '# a Run of it'
