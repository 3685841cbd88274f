"Pages that work without a kernel, driven in a headless Chromium from a file and from a server"
import json
import os
import re
import shutil
import threading
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from cprfl.data.dataset import ArrayDataset
from cprfl.data.shapes import shapes_lt
from cprfl.decisions import fit_decisions
from cprfl.look.explorers import AttentionExplorer, DriftExplorer, PredictionExplorer
from cprfl.look.living import chosen_images, telling_orders, write_page
from cprfl.look.run_page import _telling_errors, run_page
from cprfl.model.cprfl import CPRFL
from cprfl.runs.recipe import get_recipe
from cprfl.runs.run import run_recipe

CHROMIUM = os.environ.get('CPRFL_CHROMIUM') or shutil.which('chromium') or shutil.which('chromium-browser')
EVIL = ['</script><script>window.broken=1</script>', '<img src=x onerror=window.broken=1>', '$\\frac{1}$ & co']


class Prompts:
    "What the drift explorer needs of a run"
    def __init__(self, dataset, epochs=4):
        torch.manual_seed(0)
        steps = torch.randn(epochs, len(dataset.classes), 8).cumsum(0)
        self.prompts = dict(enumerate(steps))
        self.classes, self.groups = dataset.classes, dataset.groups


def table(dataset, seed):
    scores = np.random.default_rng(seed).normal(size=dataset.targets.shape)
    frame = pd.DataFrame(scores, columns=list(dataset.classes))
    frame.insert(0, 'path', dataset.paths)
    return frame


def attending(dataset):
    torch.manual_seed(0)
    model = CPRFL('resnet18', torch.randn(len(dataset.classes), 8), d=16, heads=2, head_dim=8, ffn_dim=16)
    return AttentionExplorer(model.eval(), dataset)


def parts(dataset):
    runs = {name: table(dataset, seed) for seed, name in enumerate(('ResNet-50', 'CPRFL'))}
    attention = attending(dataset)
    return {'Best': PredictionExplorer(runs, dataset), 'Maps': {'one': attention, 'two': attention},
            'Drift': {'first': DriftExplorer(Prompts(dataset)), 'second': DriftExplorer(Prompts(dataset, 6))}}


def numbers(file):
    text = file.read_text('utf-8')
    return json.loads(text.split('id="numbers">')[1].split('</script>')[0])['parts']


@pytest.fixture(scope='module')
def shapes(): return shapes_lt('test').subset(range(24))


@pytest.fixture(scope='module')
def file(shapes, tmp_path_factory):
    [file] = write_page(tmp_path_factory.mktemp('page') / 'page.html', parts(shapes), 'Shapes', images=6)
    return file


# ---- what the file holds

def test_maps_are_stored_to_a_255th_of_the_largest(shapes, file):
    import base64
    data = numbers(file)[1]
    explorer, stored = attending(shapes), data['images'][0]['models'][0]
    i = list(shapes.paths).index(data['images'][0]['name'])
    heads = explorer.maps.attention(i).heads[0][:, stored['categories']].numpy()
    read = np.frombuffer(base64.b64decode(stored['attention']), np.uint8).reshape(heads.shape)
    largest = np.array(stored['max'])[:, None, None]
    assert np.abs(read / 255 * largest - heads).max() <= 0.51 * largest.max() / 255


def test_scores_are_those_of_the_explorer(shapes, file):
    data = numbers(file)[0]
    explorer = PredictionExplorer({'CPRFL': table(shapes, 1)}, shapes)
    image = data['images'][2]['name']
    explorer.set(image=list(shapes.paths).index(image))
    best = explorer.table().iloc[0]
    stored = data['models'][1]['scores'][2]
    assert data['classes'][int(np.argmax(stored))] == best['class']
    assert max(stored) == pytest.approx(best['score'], abs=1e-4)


def test_many_images_go_to_several_pages(shapes, tmp_path):
    explorer = PredictionExplorer({'CPRFL': table(shapes, 1)}, shapes)
    files = write_page(tmp_path / 'p.html', {'': explorer}, images=5, per_page=2)
    assert [file.name for file in files] == ['p.html', 'p-2.html', 'p-3.html']
    assert [len(numbers(file)[0]['images']) for file in files] == [2, 2, 1]
    assert 'href="p-3.html"' in files[0].read_text('utf-8')


def test_photographs_of_80_classes_stay_under_5_mb(tmp_path):
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (20, 14, 14, 3), dtype=np.uint8)
    large = [np.asarray(Image.fromarray(image).resize((224, 224))) for image in images]
    targets = np.eye(20, 80, dtype=np.int8)
    photos = ArrayDataset(np.stack(large), targets, [f'class {c}' for c in range(80)])
    [file] = write_page(tmp_path / 'p.html', {'': attending(photos)}, gradcam=False)
    assert file.stat().st_size < 5_000_000


def test_each_filter_has_images(shapes):
    explorer = PredictionExplorer({name: table(shapes, seed) for seed, name in enumerate('ab')}, shapes)
    chosen = chosen_images(explorer, 6)
    assert len(chosen) == 6
    for order in telling_orders(explorer).values(): assert set(chosen) & set(order.tolist())


def test_other_things_are_refused(tmp_path):
    with pytest.raises(ValueError, match='expected a PredictionExplorer'):
        write_page(tmp_path / 'p.html', {'': Prompts(shapes_lt('test').subset([0]))})
    assert not list(tmp_path.iterdir())


# ---- the page of a run

OWN = ['<b>cat</b>', 'dog', '=cow', 'x&y']


@pytest.fixture(scope='module')
def photos(tmp_path_factory):
    "A folder with a list of small images"
    folder, rng = tmp_path_factory.mktemp('photos'), np.random.default_rng(0)
    (folder / 'images').mkdir()
    rows = ['path,labels']
    for i in range(24):
        noise = rng.integers(0, 256, (24, 32, 3), dtype=np.uint8)
        Image.fromarray(noise).save(folder / 'images' / f'{i}.png')
        rows.append(f"{i}.png,{'|'.join(OWN[i % 2::2])}")
    (folder / 'list.csv').write_text('\n'.join(rows) + '\n')
    return folder


def trained(folder, name, base='shapes-erm', table='list.csv', **settings):
    recipe = get_recipe(base).with_(
        name=name, benchmark=None, train_file=str(folder / table), root=str(folder / 'images'), image_size=32,
        epochs=1, batch_size=8, device='cpu', precision='fp32', **settings)
    return run_recipe(recipe, folder / 'runs', progress=False)


@pytest.fixture(scope='module')
def run(photos): return trained(photos, 'own', test_file=str(photos / 'list.csv'))


def report(run, folder):
    [file] = run_page(run, folder / 'report.html', images=2, gradcam=False)
    return file.read_text('utf-8')


@pytest.fixture
def decided(run):
    "The run with thresholds, until the test is over"
    logits = run.predictions.iloc[:, 1:].to_numpy()
    fit_decisions(logits, run.test_set().targets, run.classes, run.groups).save(run.folder / 'decisions.json')
    yield run
    (run.folder / 'decisions.json').unlink()


def test_the_report_counts_errors(run, tmp_path):
    said, y = run.predictions.iloc[:, 1:].to_numpy() >= 0, run.test_set().targets > 0
    misses, false = int((y & ~said).sum()), int((said & ~y).sum())
    row = f'<tr><td>total</td><td>{y.sum()}</td><td>{misses}</td><td>{100 * misses / y.sum():.1f}</td><td>{false}</td>'
    assert row in report(run, tmp_path)


def test_the_report_shows_at_most_a_dozen_errors(run, tmp_path):
    assert 1 <= report(run, tmp_path).count('src="data:image/jpeg') <= 12


def test_names_in_the_report_are_no_code(run, tmp_path):
    page = report(run, tmp_path)
    assert '<b>cat</b>' not in page
    assert '&lt;b&gt;cat&lt;/b&gt; ' in page.split('class="tiles"')[1]


def test_a_report_without_thresholds_says_how_to_get_them(run, tmp_path):
    assert '<code>cprfl_decide RUN</code> fits a threshold for each class' in report(run, tmp_path)


def test_the_report_shows_thresholds(decided, tmp_path):
    page = report(decided, tmp_path)
    low = decided.decisions.scores.min()
    assert f'<tr><td>total</td><td>{low:.2f}</td>' in page
    assert 'F1 at own' in page
    assert 'at least the threshold of its class' in page


def test_thresholds_are_not_judged_by_images_that_chose_them(photos, tmp_path):
    run = trained(photos, 'held', held_out=0.5)
    run.fit_decisions()
    page = report(run, tmp_path)
    assert 'F1 at 0.5' in page
    assert 'F1 at own' not in page
    assert 'its own threshold was fitted on these images, so it is not used' in page


def test_a_report_whose_images_are_gone(decided, photos, tmp_path):
    (photos / 'images').rename(photos / 'moved')
    try: page = report(decided, tmp_path)
    finally: (photos / 'moved').rename(photos / 'images')
    assert re.search(r'None of the \d+ test images can be read, such as \S+\.png', page)
    assert '<th scope="col">false positives</th>' in page
    assert 'class="living"' not in page
    assert 'src="data:image/jpeg' not in page


@pytest.mark.parametrize('name', ['0.png', '7.png'])
@pytest.mark.parametrize('whole', [True, False])
def test_a_bad_image_is_left_out_of_the_report(run, photos, tmp_path, name, whole):
    file = photos / 'images' / name
    content = file.read_bytes()
    if whole: file.unlink()
    else: file.write_bytes(content[:300] + bytes(100) + content[400:]) # its header and its end are whole
    try:
        with pytest.warns(UserWarning, match=f'1 images that cannot be read are left out of the page: {name}'):
            pages = run_page(run, tmp_path / 'report.html', images=24, gradcam=False)
    finally: file.write_bytes(content)
    text = ''.join(page.read_text('utf-8') for page in pages)
    assert 'class="living"' in text
    assert f'alt="{name}"' not in text


def test_a_report_says_which_class_has_another_name(run, photos, tmp_path):
    text = (photos / 'list.csv').read_text()
    (photos / 'list.csv').write_text(text.replace('dog', 'wolf'))
    try: page = report(run, tmp_path)
    finally: (photos / 'list.csv').write_text(text)
    assert '&#x27;wolf&#x27; only in the dataset' in page.split('The test set cannot be used')[1]


def test_a_report_of_two_classes(photos, tmp_path):
    page = report(trained(photos, 'two', hide=['dog', 'x&y'], held_out=0.5), tmp_path)
    assert 'class="living"' in page


def test_a_report_of_one_class(photos, tmp_path):
    (photos / 'one.csv').write_text('path,dog\n' + ''.join(f'{i}.png,{i % 2}\n' for i in range(24)))
    head = dict(d=16, heads=2, head_dim=8, ffn_dim=16)
    run = trained(photos, 'single', 'shapes-cprfl', 'one.csv', held_out=0.5, semantics='words',
                  model_args=head)
    assert 'class="living"' in report(run, tmp_path)


def test_two_runs_of_one_name_are_refused(run, tmp_path):
    with pytest.raises(ValueError, match="expected another name than 'own'"):
        run_page(run, tmp_path / 'report.html', {'own': run})


def test_errors_are_of_different_classes_and_images():
    table = pd.DataFrame({'kind': 'miss', 'group': 'head', 'image': [0, 0, 1, 1, 2], 'category': [0, 1, 0, 1, 0]})
    chosen = _telling_errors(table, lambda i: True)
    assert [(error.image, error.category) for error in chosen] == [(0, 0), (1, 1)]


# ---- in a browser

@pytest.fixture(scope='module')
def browser():
    sync_api = pytest.importorskip('playwright.sync_api', reason='playwright is not installed (pip install playwright)')
    if not CHROMIUM: pytest.skip('no Chromium found (apt-get install chromium, or set CPRFL_CHROMIUM to its path)')
    with sync_api.sync_playwright() as p:
        browser = p.chromium.launch(executable_path=CHROMIUM, args=['--no-sandbox', '--disable-gpu'])
        yield browser
        browser.close()


@contextmanager
def placed(file, place):
    "Where a page is: its file, or on a server of this machine"
    if place == 'file':
        yield file.as_uri()
        return
    server = ThreadingHTTPServer(('127.0.0.1', 0), partial(SimpleHTTPRequestHandler, directory=str(file.parent)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f'http://127.0.0.1:{server.server_port}/{file.name}'
    server.shutdown()


def asked_for_nothing_else(page, at): return [url for url in page.asked if url != at and url[:5] != 'data:'] == []


def opened(browser, file, at=None, **kw):
    page = browser.new_page(**kw)
    page.said, page.asked = [], []
    page.on('console', lambda message: page.said.append(message.text))
    page.on('pageerror', lambda error: page.said.append(str(error)))
    page.on('request', lambda request: page.asked.append(request.url))
    page.goto(at or file.as_uri())
    page.wait_for_function('document.querySelectorAll(".living canvas").length >= 1')
    page.wait_for_timeout(200)
    return page


@pytest.fixture
def page(browser, file):
    page = opened(browser, file, viewport=dict(width=1280, height=900))
    yield page
    assert page.said == []
    assert asked_for_nothing_else(page, file.as_uri())
    page.close()


def section(page, i): return page.locator('.living').nth(i)


def picture(page, i, canvas=0):
    return section(page, i).locator('canvas').nth(canvas).evaluate('canvas => canvas.toDataURL()')


def test_image_and_filter(page):
    best = section(page, 0)
    before, caption = picture(page, 0), best.locator('.caption').inner_text()
    best.get_by_label('Next image').click()
    page.wait_for_timeout(100)
    assert picture(page, 0) != before
    assert best.locator('.caption').inner_text() != caption
    best.locator('[data-field=images]').select_option(label='a tail label')
    assert '▲' in best.locator('.caption').inner_text()


def test_more_labels(page):
    best = section(page, 0)
    assert best.locator('.model').first.locator('.score').count() == 3
    page.keyboard.press('+')
    assert best.locator('.model').first.locator('.score').count() == 4
    best.locator('[data-field=k]').fill('6')
    assert best.locator('.model').first.locator('.score').count() == 6


def test_sections_share_image_and_category(page):
    section(page, 0).locator('[data-field=image]').select_option(index=3)
    page.wait_for_timeout(100)
    name = section(page, 0).locator('.caption b').first.inner_text()
    assert section(page, 1).locator('.caption b').first.inner_text() == name
    label = section(page, 0).locator('.score').nth(1)
    wanted = label.get_attribute('data-category')
    label.click()
    assert section(page, 2).locator('[data-field=category]').input_value() == wanted
    assert section(page, 1).locator('[data-field=category]').input_value() == wanted


def test_heads_overlay_category_and_model(page):
    maps = section(page, 1)
    maps.locator('.caption').click()
    shown = [picture(page, 1, 1)]
    for act in (lambda: page.keyboard.press('2'), lambda: page.keyboard.press('g'), lambda: page.keyboard.press('0'),
                lambda: maps.locator('[data-field=opacity]').fill('0.2'), lambda: page.keyboard.press(']')):
        act()
        page.wait_for_timeout(100)
        shown.append(picture(page, 1, 1))
    assert shown[3] == shown[0]
    assert len(set(shown)) == 5
    maps.locator('[data-field=model]').select_option(label='two')
    assert maps.locator('[data-field=method]').input_value() == 'mean'


def test_who_looks_at_a_patch(page):
    maps = section(page, 1)
    maps.locator('canvas').nth(1).click(position=dict(x=30, y=30))
    lines = maps.locator('.model .score')
    assert lines.count() == 6
    wanted = lines.nth(2).get_attribute('data-category')
    lines.nth(2).click()
    assert maps.locator('[data-field=category]').input_value() == wanted


def test_epochs_run_centre_and_film(page):
    drift = section(page, 2)
    def caption(): return drift.locator('.caption').inner_text()
    assert 'epoch 3 of 3' in caption()
    drift.locator('[data-field=epoch]').fill('0')
    assert 'cosine with its own start 1.00' in caption()
    drift.locator('[data-field=run]').select_option(label='second')
    assert 'epoch 5 of 5' in caption()
    bars = drift.locator('svg').nth(1).inner_html()
    drift.get_by_text('Without their mean').click()
    assert drift.locator('svg').nth(1).inner_html() != bars
    drift.get_by_label('Play').click()
    drift.locator('.caption', has_text=re.compile('epoch [1-4] of 5')).wait_for()


def test_the_button_of_the_film_says_what_it_does(page):
    section(page, 2).get_by_label('Play').click()
    section(page, 2).get_by_label('Pause').click()
    assert section(page, 2).get_by_label('Play').count() == 1


def test_space_scrolls_where_nothing_plays(page):
    page.keyboard.press(' ')
    page.wait_for_timeout(500)
    assert page.evaluate('window.scrollY') > 100


def test_space_opens_details(browser, decided, tmp_path):
    [file] = run_page(decided, tmp_path / 'report.html', images=2, gradcam=False)
    page = opened(browser, file)
    details = page.locator('details').first
    details.locator('summary').focus()
    page.keyboard.press(' ')
    assert details.get_attribute('open') == ''
    page.close()


def test_a_point_chooses_its_category(page):
    point = section(page, 2).locator('svg').first.locator('[data-category="5"]')
    point.click(force=True)
    assert section(page, 2).locator('[data-field=category]').input_value() == '5'


def test_arrows_step_without_a_click(page):
    before = section(page, 0).locator('.caption b').first.inner_text()
    page.keyboard.press('ArrowRight')
    assert section(page, 0).locator('.caption b').first.inner_text() != before


@pytest.mark.parametrize('width', [390, 1280, 1920])
@pytest.mark.parametrize('scheme', ['light', 'dark'])
def test_nothing_scrolls_sideways(browser, file, width, scheme, tmp_path):
    page = opened(browser, file, viewport=dict(width=width, height=900), color_scheme=scheme)
    folder = Path(os.environ.get('CPRFL_ARTEFACTS') or tmp_path)
    page.screenshot(path=folder / f'page-{width}-{scheme}.png', full_page=True)
    assert page.evaluate('document.documentElement.scrollWidth') <= width
    page.close()


def used(control):
    "Use a control in every way that it has"
    kind = control.evaluate('c => c.tagName == "INPUT" ? c.type : c.tagName')
    if kind == 'SELECT':
        for i in range(control.locator('option').count()): control.select_option(index=i)
    elif kind == 'range':
        for end in ('max', 'min'): control.fill(control.get_attribute(end))
    else: control.click()
    return kind


def all_used(browser, file, place):
    "Use every control of a page, and return their kinds"
    with placed(file, place) as at:
        page = opened(browser, file, at, viewport=dict(width=1280, height=900))
        for details in page.locator('summary').all(): details.click()
        kinds = {used(control) for control in page.locator('select, input, button').all() if control.is_visible()}
        assert page.said == []
        assert asked_for_nothing_else(page, at)
        page.close()
    return kinds


def test_every_control_works_on_a_server(browser, file):
    assert all_used(browser, file, 'http') >= {'SELECT', 'range', 'BUTTON'}


@pytest.mark.parametrize('place', ['file', 'http'])
def test_every_control_of_the_report_works(browser, decided, place, tmp_path):
    [file] = run_page(decided, tmp_path / 'report.html', images=2, gradcam=False)
    assert all_used(browser, file, place) >= {'SELECT', 'range', 'BUTTON'}


@pytest.mark.parametrize('scheme', ['light', 'dark'])
def test_the_report_fits_a_phone(browser, decided, scheme, tmp_path):
    [file] = run_page(decided, tmp_path / 'report.html', images=2)
    page = opened(browser, file, viewport=dict(width=390, height=900), color_scheme=scheme)
    folder = Path(os.environ.get('CPRFL_ARTEFACTS') or tmp_path)
    page.screenshot(path=folder / f'report-390-{scheme}.png', full_page=True)
    assert page.evaluate('document.documentElement.scrollWidth') <= 390
    assert page.said == []
    assert asked_for_nothing_else(page, file.as_uri())
    page.close()


def test_a_swipe_steps(browser, file):
    page = opened(browser, file, viewport=dict(width=390, height=900), has_touch=True)
    before = section(page, 0).locator('.caption b').first.inner_text()
    page.evaluate("""() => {
      const stage = document.querySelector('.living .stage')
      const touch = x => new Touch({ identifier: 1, target: stage, clientX: x, clientY: 100 })
      stage.dispatchEvent(new TouchEvent('touchstart', { touches: [touch(300)] }))
      stage.dispatchEvent(new TouchEvent('touchend', { changedTouches: [touch(100)] }))
    }""")
    assert section(page, 0).locator('.caption b').first.inner_text() != before
    page.close()


def test_without_javascript_there_is_a_picture(browser, file):
    page = browser.new_page(java_script_enabled=False)
    page.goto(file.as_uri())
    assert page.locator('.living img').count() == 3
    page.close()


def test_names_are_no_code(browser, tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (4, 32, 32, 3), dtype=np.uint8)
    targets = np.eye(4, 3, dtype=int) + np.eye(4, 3, -3, dtype=int)
    pictures = ArrayDataset(noise, targets, EVIL, paths=['<b onclick=x>' + e for e in [*EVIL, 'y']])
    [file] = write_page(tmp_path / 'p.html', parts(pictures), EVIL[0], images=4)
    page = opened(browser, file)
    for field in ('image', 'category'): section(page, 1).locator(f'[data-field={field}]').select_option(index=1)
    assert page.evaluate('window.broken') is None
    assert page.said == []
    page.close()
