"The script that opens a rendered site finds each kind of fault, in a site of one page"
import pytest
from browse import browse, find_chromium

STYLE = 'body { margin: 0; } .quarto-dark { background: #111; color: #eee; } .quarto-dark a { color: #8cf; }'
SCRIPT = "if (matchMedia('(prefers-color-scheme: dark)').matches) document.body.classList.add('quarto-dark')"
PAGE = """<html><head><meta charset="utf-8"><style>{style}</style></head><body><a class="skip" href="#x">Skip</a>
<nav class="navbar"><a class="nav-link {mark}" href="#x">Tutorials</a></nav>
<main id="x">{body}</main><script>{script}</script></body></html>"""


def page(body='<p>text</p>', mark='active', script=SCRIPT):
    return PAGE.format(style=STYLE, mark=mark, body=body, script=script)


LONG = f'<div class="sourceCode"><pre style="overflow: auto">{"x" * 400}</pre></div>'
NARROW = '<table><td style="width: 1px">1.0 ± 0.1</table>'
FAULTS = { # page -> its text, and what should be found
    'analysis/top3': (page(mark=''), 'the navbar marks []'),
    'analysis/wide': (page('<div style="width: 3000px">x</div>'), 'scrolls sideways'),
    'analysis/host': (page('<img src="http://other.invalid/a.png" class="bare">'), 'asks another host: other.invalid'),
    'analysis/lost': (page('<img src="nowhere.png" class="bare">'), '404: /cprfl/analysis/nowhere.png'),
    'analysis/error': (page(script=SCRIPT + '; nothing()'), 'error: nothing is not defined'),
    'analysis/code': (page(LONG), 'code is cut'),
    'analysis/cell': (page(NARROW), 'a number is broken over lines: 1.0 ± 0.1'),
    'analysis/skip': (page().replace('class="skip"', ''), 'the first link does not skip'),
    'analysis/logo': (page().replace('<a class="nav', '<img width="0"><a class="nav'), 'the logo has no size'),
    'analysis/root': (page('<img src="/nowhere.png" class="bare">'), '404: /nowhere.png'),
    'analysis/light': (page(script=''), 'the page is light'),
    'analysis/dim': (page('<p style="color: #444">dim</p>'), 'contrast'),
    'analysis/sheet': (page('<img src="data:image/gif;base64,R0lGODlhAQABAAAAACw=">'), 'no sheet under')}
LOGOS = '<img style="display: none"><img width="32" height="32">'
FINE = '<table><td><code style="padding: 9px">30</code></td></table>'
GOOD = 'tutorials/first_training'


@pytest.fixture(scope='module')
def site(tmp_path_factory):
    "A folder of pages"
    folder = tmp_path_factory.mktemp('site')
    good = page(FINE).replace('<a class="nav', f'{LOGOS}<a class="nav')
    for name, (text, _) in (FAULTS | {GOOD: (good, None)}).items():
        file = folder / f'{name}.html'
        file.parent.mkdir(exist_ok=True)
        file.write_text(text)
    return folder


@pytest.fixture(scope='module')
def found(site):
    "Page -> its faults: (width, scheme, fault)"
    pytest.importorskip('playwright.sync_api')
    chromium = find_chromium()
    if not chromium: pytest.skip('no Chromium here (set CPRFL_CHROMIUM to it)')
    found = {name: [] for name in (*FAULTS, GOOD)}
    for name, *fault in browse(site, chromium, site / 'pictures'): found[name.removesuffix('.html')].append(fault)
    return found


def test_a_page_without_faults_passes(found): assert found[GOOD] == []


@pytest.mark.parametrize('name', FAULTS)
def test_a_fault_is_found(found, name): assert FAULTS[name][1] in str(found[name])


@pytest.mark.parametrize('name', ['analysis/light', 'analysis/dim', 'analysis/sheet'])
def test_the_dark_is_judged_in_the_dark(found, name): assert {scheme for _, scheme, _ in found[name]} == {'dark'}


def test_a_picture_of_each_page_is_kept(site, found):
    assert len(list((site / 'pictures').glob('tutorials-first_training-*.png'))) == 6
