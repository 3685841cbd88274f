"Open every page of a rendered site in a browser: `python tests/browse.py _docs [--pictures FOLDER]`"
import argparse
import os
import shutil
import sys
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlsplit

import yaml

ROOT = Path(__file__).parent.parent
BASE = urlsplit(yaml.safe_load((ROOT / '_quarto.yml').read_text())['website']['site-url']).path # the site lies there
WIDTHS = 390, 1280, 1920 # pixels: a phone, a laptop, a large screen
LIVING = 'analysis/living/' # explorers by themselves, which have tests of their own
BROWSER = ['--no-sandbox', '--disable-gpu', '--disable-background-networking', '--disable-sync', '--no-first-run']

# What a page shows, measured in the page itself
WIDE = '() => document.documentElement.scrollWidth - document.documentElement.clientWidth'
MARKED = "() => [...document.querySelectorAll('.navbar .nav-link.active')].map(a => a.textContent.trim())"
CUT = """() => [...document.querySelectorAll('main div.sourceCode pre, main pre.sourceCode')]
    .filter(pre => pre.scrollWidth > pre.clientWidth + 1).map(pre => pre.textContent.trim().slice(0, 60))"""
BROKEN = """() => [...document.querySelectorAll('main td')]
    .filter(td => /^-?[0-9.]+(\\s*±\\s*[0-9.]+)?$/.test(td.textContent.trim()))
    .filter(td => { const range = document.createRange(), walker = document.createTreeWalker(td, NodeFilter.SHOW_TEXT);
        const tops = new Set(); // of the text alone: an element inside has a box of its own
        while (walker.nextNode()) { range.selectNodeContents(walker.currentNode);
            for (const box of range.getClientRects()) tops.add(Math.round(box.top / 8)); }
        return tops.size > 1; })
    .map(td => td.textContent.trim())"""
LOGO = """() => { // of the logos for the light and the dark one is hidden
    const logos = [...document.querySelectorAll('.navbar img')];
    return !logos.length || logos.some(img => img.getBoundingClientRect().width > 8); }"""
FIRST = "() => { const a = document.querySelector('a[href], button'); return !a || a.classList.contains('skip'); }"
DARK = """() => {
    const numbers = colour => (colour.match(/[0-9.]+/g) || [0, 0, 0]).map(Number);
    const linear = v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4;
    const light = colour => {
        const [r, g, b] = numbers(colour).map(v => linear(v / 255)); return 0.2126 * r + 0.7152 * g + 0.0722 * b; };
    const seen = colour => (numbers(colour)[3] ?? 1) > 0.5;
    const ground = node => { for (; node; node = node.parentElement) {
        const colour = getComputedStyle(node).backgroundColor; if (seen(colour)) return light(colour); } return 1; };
    const contrast = (a, b) => (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
    const faults = [];
    if (ground(document.body) > 0.2) faults.push('the page is light');
    for (const node of document.querySelectorAll('main p, main td, main h2, main code span.co, main a')) {
        if (!node.textContent.trim() || !node.getClientRects().length) continue;
        const is = contrast(light(getComputedStyle(node).color), ground(node));
        const what = node.textContent.trim().slice(0, 40);
        if (is < 4) faults.push(`contrast ${is.toFixed(1)} of ${node.tagName.toLowerCase()}: ${what}`);
    }
    for (const img of document.querySelectorAll('main img:not([src$=".svg"], .bare)')) {
        const colour = getComputedStyle(img).backgroundColor;
        if (!seen(colour) || light(colour) < 0.7) faults.push(`no sheet under ${img.getAttribute('src').slice(0, 40)}`);
    }
    return faults.slice(0, 5);
}"""


class Below(SimpleHTTPRequestHandler):
    "The site below its path; the page for what is lost asks for files by whole paths"
    def log_message(self, *args): pass

    def translate_path(self, path):
        inside = path.startswith(f'{BASE}/')
        return super().translate_path(path.removeprefix(BASE) if inside else f'/outside of the site/{path}')


def serve(folder):
    "A server of the folder on a free port of this machine"
    server = ThreadingHTTPServer(('127.0.0.1', 0), partial(Below, directory=str(folder)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server


def flat(contents):
    for item in contents:
        if isinstance(item, str): yield item
        elif 'contents' in item: yield from flat(item['contents'])
        else: yield item['href']


def sections():
    "Page -> the title of its sidebar, which is what the navbar should mark"
    sidebars = yaml.safe_load((ROOT / 'nbs' / 'sidebar.yml').read_text())['website']['sidebar']
    return {page.replace('.ipynb', '.html'): bar['title'] for bar in sidebars for page in flat(bar['contents'])}


def look(page, name, width, scheme, marks):
    "What is wrong with a page that is open at a width and in a colour scheme"
    if (over := page.evaluate(WIDE)) > 1: yield f'scrolls sideways by {over} px'
    if not page.evaluate(LOGO): yield 'the logo has no size'
    if not page.evaluate(FIRST): yield 'the first link does not skip to the content'
    if width >= 1200 and name in marks and (marked := page.evaluate(MARKED)) != [marks[name]]:
        yield f'the navbar marks {marked}, expected {marks[name]!r}'
    if width >= 1200 and name.startswith(('tutorials/', 'analysis/')):
        yield from (f'code is cut off: {code}' for code in page.evaluate(CUT))
    yield from (f'a number is broken over lines: {cell}' for cell in page.evaluate(BROKEN))
    if scheme == 'dark': yield from page.evaluate(DARK)


class Listener:
    "What a page asks for, and what goes wrong while it loads"
    def __init__(self, page, home):
        self.home, self.faults = home, []
        page.on('request', lambda request: self.request(request.url))
        page.on('response', lambda r: r.status >= 400 and self.faults.append(f'{r.status}: {urlsplit(r.url).path}'))
        page.on('pageerror', lambda error: self.faults.append(f'error: {str(error)[:80]}'))

    def request(self, url):
        host = urlsplit(url).netloc
        if host and host != self.home: self.faults.append(f'asks another host: {host}')

    def taken(self):
        faults, self.faults = self.faults, []
        return list(dict.fromkeys(faults))


def visit(browser, home, names, width, scheme, pictures=None):
    "Faults of all pages at a width and in a colour scheme: (page, fault)"
    context = browser.new_context(viewport=dict(width=width, height=900), color_scheme=scheme)
    page, marks = context.new_page(), sections()
    listener = Listener(page, home)
    for name in names:
        page.goto(f'http://{home}{BASE}/{name}', wait_until='load')
        for fault in [*look(page, name, width, scheme, marks), *listener.taken()]: yield name, fault
        if pictures:
            file = Path(pictures) / f'{name[:-5].replace("/", "-")}-{width}-{scheme}.png'
            page.screenshot(path=file, animations='disabled')
    context.close()


def browse(tree, chromium, pictures=None):
    "Faults of a rendered site: (page, width, scheme, fault)"
    from playwright.sync_api import sync_playwright
    names = sorted(file.relative_to(tree).as_posix() for file in Path(tree).rglob('*.html'))
    names = [name for name in names if not name.startswith(LIVING)]
    if not names: raise FileNotFoundError(f'{tree}: no page in it')
    if pictures: Path(pictures).mkdir(parents=True, exist_ok=True)
    server = serve(tree)
    home = f'127.0.0.1:{server.server_port}'
    with sync_playwright() as p:
        browser = p.chromium.launch(executable_path=chromium, args=BROWSER)
        for width in WIDTHS:
            for scheme in ('light', 'dark'):
                for name, fault in visit(browser, home, names, width, scheme, pictures):
                    yield name, width, scheme, fault
        browser.close()
    server.shutdown()


def find_chromium():
    "The browser that CPRFL_CHROMIUM names, or one on the path"
    return os.environ.get('CPRFL_CHROMIUM') or shutil.which('chromium') or shutil.which('chromium-browser')


if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('tree', help='folder of a rendered site')
    parser.add_argument('--pictures', help='folder for a picture of each page, width and colour scheme')
    args = parser.parse_args()
    if not (chromium := find_chromium()): sys.exit('expected a Chromium on the path or in CPRFL_CHROMIUM')
    faults = list(browse(args.tree, chromium, args.pictures))
    for name, width, scheme, fault in faults: print(f'{name} at {width} px, {scheme}: {fault}')
    print(f'{len(faults)} faults')
    sys.exit(bool(faults))
