"The explorers in a real JupyterLab, driven in a headless Chromium"
import hashlib
import json
import os
import shutil
import socket
import subprocess
import sys
import textwrap
import time
import urllib.request
from html import unescape
from pathlib import Path

import nbformat
import numpy as np
import pandas as pd
import pytest
from PIL import Image

CHROMIUM = os.environ.get('CPRFL_CHROMIUM') or shutil.which('chromium') or shutil.which('chromium-browser')
FLAGS = ['--no-sandbox', '--disable-gpu', '--disable-dev-shm-usage', '--disable-background-networking',
         '--disable-component-update', '--disable-sync', '--no-first-run']
PICTURE = 'img.widget-image, .widget-image img'
EVIL = ['<script>window.broken=1</script>', '<img src=x onerror=window.broken=1>', '$\\frac{1}$ & co']

CELLS = dict(
    setup="""
        import numpy as np, pandas as pd, torch
        from cprfl.runs.build import load_data
        from cprfl.runs.run import Run
        from cprfl.look.errors import ErrorExplorer
        from cprfl.look.explorer import Selection
        from cprfl.look.explorers import AttentionExplorer, DriftExplorer, PredictionExplorer
        from cprfl.look.monitor import TrainingMonitor
        from cprfl.model.cprfl import CPRFL
        from cprfl.data.dataset import ArrayDataset
        runs = {n: Run(f'runs/shapes-{n}') for n in ('erm', 'clip', 'cprfl')}
        test = load_data(runs['cprfl'].recipe)[1]""",
    predictions="PredictionExplorer({'ResNet-50': runs['erm'], 'CLIP': runs['clip'], 'CPRFL': runs['cprfl']})",
    attention="attention = AttentionExplorer(runs['cprfl'], test)\nattention",
    drift="DriftExplorer(runs['cprfl'])",
    errors="""
        logits = 6. * test.targets - 3
        taken = (test.targets[:, 3] > 0) & (test.targets[:, 5] == 0)
        logits[taken, 3], logits[taken, 5] = -3, 3
        confused = runs['cprfl'].predictions.copy()
        confused[test.classes] = logits
        errors = ErrorExplorer({'confused': confused, 'CPRFL': runs['cprfl']}, test)
        shared = Selection(errors, AttentionExplorer(runs['cprfl'], test))
        errors""",
    errors_shared='shared.explorers[1]',
    large="""
        rng = np.random.default_rng(0)
        labels = (rng.random((5000, 80)) < 0.04).astype(int)
        names = [f'class {i}' for i in range(80)]
        groups = dict(head=range(20), medium=range(20, 50), tail=range(50, 80))
        pictures = rng.integers(0, 256, (5000, 64, 64, 3), dtype=np.uint8)
        big = ArrayDataset(pictures, labels, names, groups=groups, paths=[f'{i}.jpg' for i in range(5000)])
        guesses = {}
        for name in ('one', 'two'):
            guesses[name] = pd.DataFrame(rng.normal(size=labels.shape) + 2 * labels - 1, columns=names)
            guesses[name].insert(0, 'path', big.paths)
        ErrorExplorer(guesses, big)""",
    monitor="TrainingMonitor('growing', every=0.3)",
    evil=f"""
        evil = {EVIL!r}
        noise = np.random.default_rng(0).integers(0, 256, (4, 32, 32, 3), dtype=np.uint8)
        targets = np.eye(4, 3, dtype=int) + np.eye(4, 3, -3, dtype=int)
        pictures = ArrayDataset(noise, targets, evil, paths=['<b onclick=x>' + e for e in evil + ['y']])
        AttentionExplorer(CPRFL('resnet18', torch.randn(3, 8), d=16, heads=2, head_dim=8, ffn_dim=16), pictures)""")


@pytest.fixture(scope='module')
def artefacts(tmp_path_factory):
    "Folder of the screenshots: CPRFL_ARTEFACTS, or a temporary one"
    folder = Path(os.environ.get('CPRFL_ARTEFACTS') or tmp_path_factory.mktemp('screenshots'))
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@pytest.fixture(scope='module')
def chromium():
    sync_api = pytest.importorskip('playwright.sync_api', reason='playwright is not installed (pip install playwright)')
    if not CHROMIUM:
        pytest.skip('no Chromium found (apt-get install chromium, or set CPRFL_CHROMIUM to its path)')
    with sync_api.sync_playwright() as p:
        browser = p.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture(scope='module')
def workplace(chromium, tmp_path_factory):
    "A folder with three tiny runs, one that is about to grow, and a notebook that shows all explorers"
    from cprfl.runs.recipe import get_recipe
    from cprfl.runs.run import run_recipe
    folder = tmp_path_factory.mktemp('lab')
    for name, epochs in (('clip', 1), ('erm', 1), ('cprfl', 3)):
        recipe = get_recipe(f'shapes-{name}')
        recipe = recipe.with_(image_size=32, precision='fp32', batch_size=128, epochs=epochs, alignment_images=0)
        run_recipe(recipe, folder / 'runs', progress=False)
    (folder / 'growing').mkdir()
    (folder / 'growing' / 'train_config.json').write_text(json.dumps(dict(epochs=5)))
    kernel = dict(name='python3', display_name='python3', language='python')
    nb = nbformat.v4.new_notebook(metadata=dict(kernelspec=kernel))
    sources = [textwrap.dedent(source).strip() for source in CELLS.values()]
    nb.cells = [nbformat.v4.new_code_cell(source) for source in sources]
    nbformat.write(nb, folder / 'explorers.ipynb')
    return folder


def _free_port():
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        return s.getsockname()[1]


def _settings(folder):
    "No news, nothing outside of the window left undrawn"
    settings = {'apputils-extension/notification': dict(fetchNews='false', checkForUpdates=False),
                'notebook-extension/tracker': dict(windowingMode='none')}
    for plugin, values in settings.items():
        file = folder / '@jupyterlab' / f'{plugin}.jupyterlab-settings'
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(values))


@pytest.fixture(scope='module')
def lab(workplace, tmp_path_factory):
    "One JupyterLab for all tests, with settings of its own: its address"
    own, port = tmp_path_factory.mktemp('jupyter'), _free_port()
    _settings(own / 'settings')
    folders = dict(JUPYTER_CONFIG_DIR='config', JUPYTER_RUNTIME_DIR='runtime', IPYTHONDIR='ipython',
                   JUPYTERLAB_SETTINGS_DIR='settings', JUPYTERLAB_WORKSPACES_DIR='workspaces')
    env = os.environ | dict(OMP_NUM_THREADS='1') | {name: str(own / folder) for name, folder in folders.items()}
    options = ['--no-browser', '--ip=127.0.0.1', f'--port={port}', '--IdentityProvider.token=',
               '--ServerApp.password=', f'--ServerApp.root_dir={workplace}']
    if hasattr(os, 'geteuid') and os.geteuid() == 0: options.append('--allow-root')
    with open(own / 'log', 'w') as log:
        command = [sys.executable, '-m', 'jupyterlab', *options]
        server = subprocess.Popen(command, env=env, cwd=workplace, stdout=log, stderr=log)
    try:
        for _ in range(240):
            assert server.poll() is None, (own / 'log').read_text()[-2000:]
            try: urllib.request.urlopen(f'http://127.0.0.1:{port}/api', timeout=5).read()
            except OSError: time.sleep(0.5)
            else: break
        else: pytest.fail('JupyterLab did not answer in two minutes: ' + (own / 'log').read_text()[-2000:])
        yield f'http://127.0.0.1:{port}'
    finally:
        server.terminate()
        try: server.wait(30)
        except subprocess.TimeoutExpired: server.kill()


@pytest.fixture(scope='module')
def page(chromium, lab, artefacts):
    "The notebook, run from top to bottom; `page.complaints` has what the console said"
    page = chromium.new_page(viewport=dict(width=1280, height=1000))
    page.set_default_timeout(60_000)
    page.complaints = []
    page.on('console', lambda m: page.complaints.append(f"{m.text} {m.location['url']}") if m.type == 'error' else None)
    page.on('pageerror', lambda e: page.complaints.append(f'uncaught: {e}'))
    page.goto(f'{lab}/lab/tree/explorers.ipynb?reset')
    page.locator('.jp-Notebook').wait_for()
    page.locator('.jp-StatusBar-TextItem', has_text='| Idle').wait_for()
    if page.locator('.jp-Dialog').count(): page.locator('.jp-Dialog .jp-mod-accept').click() # which kernel?
    page.locator('.lm-MenuBar-itemLabel', has_text='Run').first.click()
    page.locator("[data-command='runmenu:run-all']").click()
    try: page.locator('.jp-CodeCell').nth(len(CELLS) - 1).locator(PICTURE).wait_for(timeout=300_000)
    finally: page.screenshot(path=artefacts / 'run_all_1280.png')
    yield page
    page.close()


def cell(page, name):
    found = page.locator('.jp-CodeCell').nth(list(CELLS).index(name))
    found.scroll_into_view_if_needed()
    return found


BYTES = """async img => {
    for (;;) try { // while it is read it may be replaced
        await img.decode()
        return Array.from(new Uint8Array(await (await fetch(img.src)).arrayBuffer()))
    } catch { await new Promise(requestAnimationFrame) }
}"""


def picture(cell):
    "What the picture of a cell looks like: a hash of its bytes, and its shown size"
    shown = cell.locator(PICTURE)
    data = shown.evaluate(BYTES)
    box = shown.bounding_box()
    return hashlib.sha256(bytes(data)).hexdigest(), round(box['width']), round(box['height'])


def changed(page, cell, action, what='the picture'):
    "Do something and wait until the cell has another picture, whose hash is given"
    before = picture(cell)[0]
    action()
    until = time.monotonic() + 60
    while time.monotonic() < until:
        now = picture(cell)[0]
        if now != before: return now
        page.wait_for_timeout(50)
    pytest.fail(f'{what} did not change in a minute')


def pick(page, cell, label, option):
    "Choose from the list with this label: by text, or by place"
    select = cell.locator(f".widget-dropdown:has(> label:text-is('{label}')) select")
    return lambda: select.select_option(**({'index': option} if isinstance(option, int) else {'label': option}))


def slide(page, cell, key):
    "Move the slider of a cell by one step"
    def act():
        cell.locator('.noUi-handle').focus()
        page.keyboard.press(key)
    return act


def snapshots(page, artefacts, cell, name):
    "The cell at two widths of the window"
    for width in (1920, 1280):
        page.set_viewport_size(dict(width=width, height=1000))
        cell.scroll_into_view_if_needed()
        page.wait_for_timeout(300)
        cell.locator('.jp-Cell-outputArea').screenshot(path=artefacts / f'{name}_{width}.png')
        page.screenshot(path=artefacts / f'{name}_{width}_page.png')


@pytest.fixture(autouse=True)
def nothing_goes_wrong(page):
    "After every test: no error in the console, in a cell, or in an explorer"
    yield
    mine = [c for c in page.complaints if 'blob:' not in c] # pictures that were replaced while they were read
    assert not mine, mine
    for kind in ('error', 'stderr'):
        bad = page.locator(f".jp-OutputArea-output[data-mime-type='application/vnd.jupyter.{kind}']")
        assert not bad.count(), bad.first.inner_text()[:1000]


# ---- tests

def test_predictions(page, artefacts):
    own = cell(page, 'predictions')
    digest, width, height = picture(own)
    assert 500 < width <= 1080
    assert 140 < height < 320
    assert 'shapes-lt/test/00000' in own.inner_text()
    second = changed(page, own, own.get_by_text('Next ›').click)
    assert 'shapes-lt/test/00001' in own.inner_text()
    assert changed(page, own, own.get_by_text('‹ Previous').click) == digest != second
    changed(page, own, pick(page, own, 'Show', 'a tail label'))
    snapshots(page, artefacts, own, 'predictions')


def test_predictions_with_the_keyboard_alone(page):
    own = cell(page, 'predictions')
    show, number = own.locator('select').first, own.locator('input[type=number]')
    show.focus()
    page.keyboard.press('Home') # the first filter: all images
    own.get_by_text('of 1000)').wait_for()

    def type_seven():
        number.focus()
        number.press('Control+a')
        page.keyboard.type('7')
        page.keyboard.press('Enter')
    changed(page, own, type_seven)
    assert 'shapes-lt/test/00007' in own.inner_text()

    def press_next(): # the button behind the number
        page.keyboard.press('Tab')
        page.keyboard.press('Enter')
    changed(page, own, press_next)
    assert 'shapes-lt/test/00008' in own.inner_text()
    assert page.evaluate('document.activeElement.innerText').strip() == 'Next ›'


def test_your_own_images(page, tmp_path):
    own = cell(page, 'predictions')
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)).save(tmp_path / 'mine.png')
    (tmp_path / 'broken.png').write_bytes(b'not a picture')

    def upload():
        with page.expect_file_chooser() as chooser: own.get_by_text('Add your images').click()
        chooser.value.set_files([tmp_path / 'mine.png', tmp_path / 'broken.png'])
    changed(page, own, upload)
    said = own.get_by_role('status').inner_text()
    assert '1 of your images added' in said
    assert 'broken.png is no image that can be read' in said
    assert 'mine.png' in own.inner_text()
    assert 'labels not known' in own.inner_text()


def test_attention(page, artefacts):
    own = cell(page, 'attention')
    _, width, height = picture(own)
    assert width > 500
    assert 0.3 < height / width < 0.7
    seen = {picture(own)[0]}
    seen.add(changed(page, own, pick(page, own, 'Category', 7), 'with the category the picture'))
    seen.add(changed(page, own, own.get_by_text('Next ›').click, 'with the image the picture'))
    seen.add(changed(page, own, pick(page, own, 'Map', 'attention, head 2'), 'with the head the picture'))
    seen.add(changed(page, own, pick(page, own, 'Map', 'Grad-CAM'), 'with the method the picture'))
    changed(page, own, pick(page, own, 'Map', 'attention, mean'))
    changed(page, own, pick(page, own, 'Show', 'with this category'))
    assert len(seen) == 5
    assert 'the boxed area holds' in own.inner_text()
    changed(page, own, slide(page, own, 'ArrowRight'), 'with the overlay the picture')
    snapshots(page, artefacts, own, 'attention')


REDRAW = """async ([cell, label, to]) => {
    const img = cell.querySelector('img.widget-image, .widget-image img'), old = img.src
    const lists = [...cell.querySelectorAll('.widget-dropdown')]
    const list = lists.find(d => d.querySelector('label').innerText === label)?.querySelector('select')
    const began = performance.now()
    if (list) { list.selectedIndex = to; list.dispatchEvent(new Event('change', {bubbles: true})) }
    else [...cell.querySelectorAll('button')].find(b => b.innerText.includes(label)).click()
    while (img.src === old) {
        if (performance.now() - began > 30000) throw Error(`no new picture after ${label}`)
        await new Promise(requestAnimationFrame)
    }
    await img.decode()
    return performance.now() - began
}"""


def times_of(page, own, changes):
    "Milliseconds from a change to its picture: name -> (label of the control, places in its list)"
    where, times = own.element_handle(), {}
    for name, (label, places) in changes.items():
        times[name] = []
        for place in places:
            page.wait_for_timeout(300)
            times[name].append(page.evaluate(REDRAW, [where, label, place]))
    return times


def record(times, title, file, record_property):
    "Recorded, not judged"
    summary = {}
    for name, t in times.items(): summary[name] = dict(median=round(float(np.median(t))), worst=round(max(t)), n=len(t))
    for name, t in summary.items(): record_property(f'redraw_{name}_ms', t['median'])
    file.write_text(json.dumps(summary, indent=1))
    print(f'{title}, ms from change to picture:', summary)
    assert all(t > 0 for ts in times.values() for t in ts)


MEASURED = pytest.mark.skipif('CPRFL_ARTEFACTS' not in os.environ, reason='writes times of redraws to CPRFL_ARTEFACTS')


@MEASURED
def test_time_to_redraw(page, record_property, artefacts):
    own = cell(page, 'attention')
    for label in ('Show', 'Map', 'Category'):
        pick(page, own, label, 0)()
        page.wait_for_timeout(300)
    changes = dict(category=('Category', range(1, 9)), head=('Map', (1, 2, 3, 4, 0)), image=('Next', range(8)),
                   gradcam=('Map', (5, 0, 5, 0)))
    times = times_of(page, own, changes)
    times['gradcam'] = times['gradcam'][::2]
    record(times, 'AttentionExplorer', artefacts / 'redraw.json', record_property)


@MEASURED
def test_time_to_redraw_5000_images_and_80_classes(page, record_property, artefacts):
    own = cell(page, 'large')
    changes = dict(kind=('Errors', (2, 1, 3, 0)), pair=('Pair', (3, 7)), model=('Model', (0, 1)),
                   step=('Next', range(6)), all=('Errors', (0,)), group=('Group', (1, 2, 3, 0)),
                   category=('Class', (2, 5, 0)), sort=('Sort', (2, 0)), compared=('Not made by', (1, 0)))
    record(times_of(page, own, changes), 'ErrorExplorer', artefacts / 'redraw_errors.json', record_property)


def test_drift(page, artefacts):
    own = cell(page, 'drift')
    assert 'at epoch 3' in own.inner_text()
    changed(page, own, slide(page, own, 'ArrowLeft'), 'with the epoch the picture')
    assert 'at epoch 2' in own.inner_text()
    changed(page, own, pick(page, own, 'Category', 12), 'with the category the picture')
    changed(page, own, own.get_by_text('Without their mean').click, 'without the mean the picture')
    snapshots(page, artefacts, own, 'drift')


def test_the_worst_pair_is_found_in_three_clicks(page, artefacts):
    own = cell(page, 'errors')
    changed(page, own, pick(page, own, 'Model', 'confused'), 'with the model the picture') # two clicks: list, entry
    changed(page, own, own.get_by_role('button', name='Worst pair').click, 'with the pair the picture') # the third
    assert 'yellow star ● is taken for blue triangle ●' in own.inner_text()
    snapshots(page, artefacts, own, 'errors')


def test_a_click_on_an_error_shows_it_in_all_explorers(page, artefacts):
    pytest.importorskip('anywidget', reason='it hears clicks (pip install anywidget)')
    own, other = cell(page, 'errors'), cell(page, 'errors_shared')
    shown = own.locator(PICTURE)
    third = shown.bounding_box()['width'] / 900 * (2 * 128 + 40)
    changed(page, other, lambda: shown.click(position=dict(x=third, y=40)))
    name = own.locator('b').first.inner_text()
    assert name in other.inner_text()
    changed(page, other, lambda: page.keyboard.press('ArrowRight')) # no button has the focus
    assert name not in other.inner_text()
    snapshots(page, artefacts, other, 'errors_shared')


def test_a_double_click_zooms(page):
    pytest.importorskip('anywidget', reason='it hears clicks (pip install anywidget)')
    shown = cell(page, 'errors').locator(PICTURE)
    def width(): return shown.bounding_box()['width']
    before = width()
    shown.dblclick(position=dict(x=before - 30, y=60)) # beside the images
    assert width() == pytest.approx(2 * before, rel=0.01)
    shown.dblclick(position=dict(x=before - 30, y=60))
    assert width() == before


def test_no_explorer_needs_a_sideways_scroll_bar(page):
    wide = "c => [...c.querySelectorAll('*')].filter(e => e.scrollWidth > e.clientWidth + 1" \
           " && ['auto', 'scroll'].includes(getComputedStyle(e).overflowX)).map(e => e.className)"
    for width in (1280, 1920):
        page.set_viewport_size(dict(width=width, height=1000))
        for name in ('predictions', 'attention', 'drift', 'errors'):
            assert not cell(page, name).locator('.jp-OutputArea').evaluate(wide), (name, width)


def test_the_monitor_follows_a_folder(page, workplace, artefacts):
    from cprfl.files import write_text
    own = cell(page, 'monitor')
    assert 'no epoch yet' in own.inner_text()
    rows = pd.DataFrame(dict(epoch=[1, 2, 3], loss=[.4, .2, .1], lr=1e-3, seconds=4.))
    rows = rows.assign(total=[.2, .3, .4], head=[.3, .4, .5], medium=[.2, .3, .35], tail=[.1, .2, .3])
    metrics = workplace / 'growing' / 'metrics.csv'

    def write(n): return lambda: write_text(metrics, rows[:n].to_csv(index=False))
    for n in (1, 3):
        changed(page, own, write(n), 'with metrics.csv the picture')
        assert f'epoch {n} of 5' in own.inner_text()
    snapshots(page, artefacts, own, 'monitor')
    own.get_by_role('button', name='Follow').click()
    page.wait_for_timeout(1500)
    still = picture(own)[0]
    write(2)()
    page.wait_for_timeout(1500)
    assert picture(own)[0] == still


def test_names_stay_names(page, artefacts):
    "Classes and files called <script> are shown, not run"
    own = cell(page, 'evil')
    options = own.locator('select').nth(1).inner_text() + unescape(own.inner_html())
    assert EVIL[0] in options
    now = own.locator('select').nth(1).evaluate('list => list.selectedIndex')
    shown = own.inner_text()
    for i in {0, 1, 2} - {now}:
        changed(page, own, pick(page, own, 'Category', i))
        shown += own.inner_text()
    changed(page, own, own.get_by_text('Next ›').click)
    assert EVIL[2] in shown + own.inner_text()
    assert '<b onclick=x>' in own.inner_text()
    assert page.evaluate('window.broken') is None
    assert not own.locator('script, img:not(.widget-image), [onclick]').count()
    snapshots(page, artefacts, own, 'names')
