"Explorers without a browser: state, pictures, escaping, uploads, a monitor that lets go"
import base64
import gc
import json
import threading
from io import BytesIO
from types import SimpleNamespace

import ipywidgets
import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from cprfl.data.dataset import ArrayDataset
from cprfl.data.shapes import shapes_lt
from cprfl.decisions import Decisions
from cprfl.files import write_atomic
from cprfl.look.attention import attention_maps, explain_image, patch_grid, upsample_maps
from cprfl.look.explorer import SHARP, fit, new_figure, panel, with_caption
from cprfl.look.explorers import AttentionExplorer, DriftExplorer, PredictionExplorer, draw_best
from cprfl.look.monitor import TrainingMonitor
from cprfl.look.predictions import load_images, telling_images, top_k_table
from cprfl.look.prompts import class_similarity
from cprfl.look.style import shorten
from cprfl.model.baselines import ERM, ZeroShotCLIP
from cprfl.model.cprfl import CPRFL
from cprfl.model.semantics import load_clip
from cprfl.runs.recipe import Recipe
from cprfl.runs.run import run_recipe
from cprfl.train.config import TrainConfig
from cprfl.train.trainer import Trainer, predict

EVIL = ['<script>alert(1)</script>', '$\\frac{1}$', 'a & b', 'plain']
GROUPS = dict(head=np.array([0]), medium=np.array([1]), tail=np.array([2, 3]))


def pixels(png): return np.asarray(Image.open(BytesIO(png)).convert('RGB')).astype(int)


def as_png(array):
    out = BytesIO()
    Image.fromarray(array).save(out, 'PNG')
    return out.getvalue()


def images(n=8, h=24, w=24, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (n, h, w, 3), dtype=np.uint8)


@pytest.fixture(scope='module')
def dataset():
    labels = '1000 1100 0010 0001 1001 0100 0000 1111'
    targets = np.array([[int(one) for one in row] for row in labels.split()])
    return ArrayDataset(images(), targets, EVIL, groups=GROUPS, paths=[f'<b>{i}</b>.png' for i in range(8)])


@pytest.fixture(scope='module')
def tables(dataset):
    rng = np.random.default_rng(0)
    logits = dict(knows=4 * dataset.targets - 2 + 0.1 * rng.normal(size=(8, 4)), guesses=rng.normal(size=(8, 4)))
    tables = {name: pd.DataFrame(values, columns=EVIL) for name, values in logits.items()}
    for table in tables.values(): table.insert(0, 'path', dataset.paths)
    return tables


@pytest.fixture(scope='module')
def runs(tmp_path_factory):
    "Two runs on a dozen images, with class names that are trouble"
    folder = tmp_path_factory.mktemp('runs')
    for i, image in enumerate(images(12, 20, 30)): (folder / f'{i}.png').write_bytes(as_png(image))
    labels = (np.random.default_rng(1).random((12, 4)) < 0.5).astype(int)
    file = str(folder / 'all.csv')
    names = [f'{i}.png' for i in range(12)]
    pd.DataFrame(labels, columns=EVIL).assign(path=names).to_csv(file, index=False)
    recipe = Recipe(benchmark=None, train_file=file, test_file=file, image_size=32, backbone='shapes',
                    semantics='random:8', model_args=dict(d=16, heads=2, head_dim=8, ffn_dim=16),
                    train=TrainConfig(epochs=1, batch_size=6, select='last', device='cpu'))
    kinds = dict(erm=recipe.with_(name='erm', model='erm', model_args={}), cprfl=recipe.with_(name='cprfl'))
    return {name: run_recipe(r, folder / 'runs', progress=False) for name, r in kinds.items()}


@pytest.fixture
def small():
    torch.manual_seed(0)
    return CPRFL('resnet18', torch.randn(4, 8), d=16, heads=2, head_dim=8, ffn_dim=16).eval()


def all_explorers(dataset, tables, small, tmp_path):
    prompts = {e: torch.randn(4, 6, generator=torch.Generator().manual_seed(e)) for e in range(3)}
    run = SimpleNamespace(prompts=prompts, classes=EVIL, groups=GROUPS)
    return [PredictionExplorer(tables, dataset, model='knows'), AttentionExplorer(small, dataset),
            DriftExplorer(run), TrainingMonitor(tmp_path / '<b>run</b>', every=60)]


# ---- what all explorers do

def test_every_state_has_a_picture_and_an_escaped_caption(dataset, tables, small, tmp_path):
    for explorer in all_explorers(dataset, tables, small, tmp_path):
        pictures = set()
        for field, kind, _ in explorer.controls:
            if kind in ('upload', 'toggle'): continue
            options = explorer.options(field)
            for value in list(options if isinstance(options, range) else options.values())[:4]:
                explorer.set(**{field: value})
                pictures.add(explorer.png())
                caption = explorer.caption()
                assert '<script' not in caption
                assert '<b>0' not in caption
                assert '& b' not in caption.replace('&amp; b', '')
        assert len(pictures) > 1 or isinstance(explorer, TrainingMonitor)
        assert pixels(explorer.png()).shape[1] == SHARP * explorer.width


def test_one_display_for_front_ends_and_for_pages_without(dataset, tables, small, tmp_path):
    for explorer in all_explorers(dataset, tables, small, tmp_path):
        data, metadata = explorer._repr_mimebundle_()
        assert data['application/vnd.jupyter.widget-view+json']['model_id'] == explorer.view().model_id
        static = pixels(base64.b64decode(data['image/png']))
        plain = pixels(explorer.png())
        assert metadata['image/png']['width'] == explorer.width
        assert static.shape[1] == plain.shape[1]
        assert static.shape[0] > plain.shape[0]
        assert static[plain.shape[0]:].min() < 100, 'the caption stands below'
        explorer.close()


def test_controls_are_standard_and_named(dataset, tables, small, tmp_path):
    for explorer in all_explorers(dataset, tables, small, tmp_path):
        explorer.view()
        controls = explorer._view.fields.values()
        assert controls
        assert all(type(c).__module__.startswith('ipywidgets.') and c.description for c in controls)
        explorer.close()


def test_closing_leaves_no_widget_and_no_thread(dataset, tables, small, tmp_path):
    before = len(ipywidgets.widgets.widget._instances)
    for explorer in all_explorers(dataset, tables, small, tmp_path):
        explorer.view()
        assert len(ipywidgets.widgets.widget._instances) > before
        explorer.close()
        explorer.close()
    assert len(ipywidgets.widgets.widget._instances) == before
    assert not [t for t in threading.enumerate() if t.name == 'TrainingMonitor']


def test_widgets_and_object_follow_each_other(dataset, tables):
    explorer = PredictionExplorer(tables, dataset, model='knows')
    fields = explorer.view() and explorer._view.fields
    explorer.set(image=3)
    assert fields['image'].value == 3
    assert explorer._view.picture.value == explorer.png()
    fields['images'].value = 'tail'
    assert explorer.images == 'tail'
    assert explorer.image == explorer.order()[0] == fields['image'].value
    assert '1 of 4' in explorer._view.caption.value
    explorer.close()


def test_buttons_step_through_the_filter(dataset, tables):
    explorer = PredictionExplorer(tables, dataset, model='knows')
    fields = explorer.view() and explorer._view.fields
    explorer.set(images='tail')
    boxes = [box for box in explorer.view().children[0].children if hasattr(box, 'children')]
    buttons = [w for box in boxes for w in box.children if isinstance(w, ipywidgets.Button)]
    buttons[1].click()
    assert explorer.image == explorer.order()[1] == fields['image'].value
    buttons[0].click()
    assert explorer.image == explorer.order()[0]
    explorer.close()


def test_a_refused_change_leaves_no_trace(dataset, tables):
    explorer = PredictionExplorer(tables, dataset)
    before = explorer.state()
    for change in (dict(image=8), dict(image=-1), dict(images='own'), dict(image=2, images='best'), dict(size=3)):
        with pytest.raises(ValueError, match='expected'): explorer.set(**change)
        assert explorer.state() == before


def test_what_goes_wrong_becomes_a_sentence(dataset, tables, monkeypatch):
    explorer = PredictionExplorer(tables, dataset)
    explorer.view()
    view = explorer._view
    monkeypatch.setattr(explorer, 'settle', lambda changed: (_ for _ in ()).throw(ValueError('no <i>such</i> image')))
    view.fields['image'].value = 4
    assert explorer.image == 0 == view.fields['image'].value
    assert 'no &lt;i&gt;such&lt;/i&gt; image' in view.message.value
    monkeypatch.undo()
    monkeypatch.setattr(explorer, 'figure', lambda: 1 / 0)
    view.fields['image'].value = 5
    assert 'ZeroDivisionError: division by zero' in view.message.value
    monkeypatch.undo()
    view.fields['image'].value = 6
    assert view.message.value == ''
    assert explorer.image == 6
    explorer.close()


@pytest.mark.filterwarnings('ignore:Glyph')
@pytest.mark.parametrize('chosen', [0, None])
@pytest.mark.parametrize('decided', [['yes'] * 3, ()])
@pytest.mark.parametrize('name', ['purple triangle', 'WOMAN WITH HAMMER', '槌を持つ女性の写真' * 2])
def test_labels_of_the_best_keep_clear_of_scores(name, chosen, decided):
    names = [f'{name} {c} ▲' for c in 'abc']
    fig = new_figure(192, 180)
    ax = panel(fig, 0, 30, 192, 150)
    rows = [(name, 0.99, False, np.nan) for name in names]
    draw_best(ax, rows, 'CPRFL', None if chosen is None else names[chosen], decided)
    fig.canvas.draw()
    boxes = [text.get_window_extent() for text in ax.texts]
    assert not [(a, b) for a, b in zip(boxes[::2], boxes[1::2]) if a.overlaps(b)]


def test_texts_fit():
    assert shorten('short') == 'short'
    assert shorten('two\nlines') == 'two lines'
    assert len(shorten('x' * 99, 24)) == 24
    white = as_png(np.full((30, 900, 3), 255, np.uint8))
    one, two = (pixels(with_caption(white, text)) for text in ('a', 'word ' * 60))
    assert one.shape[1] == two.shape[1] == 900
    assert two.shape[0] > one.shape[0] > 30
    assert two[:, -6:].min() == 255, 'no line runs out of the picture'


# ---- predictions

def test_predictions_are_those_of_the_image_that_is_shown(dataset, tables):
    shuffled = {n: t.iloc[[3, 1, 7, 0, 2, 6, 5, 4]].reset_index(drop=True) for n, t in tables.items()}
    explorer = PredictionExplorer(shuffled, dataset, k=2)
    for i, original in enumerate([3, 1, 7, 0, 2, 6, 5, 4]):
        explorer.set(image=i)
        assert explorer.name(i) == dataset.paths[original]
        assert (explorer.pixels(i) == dataset.images[original]).all()
        logits = {n: t[EVIL].to_numpy()[[original]] for n, t in tables.items()}
        want = top_k_table(logits, dataset.targets[[original]], EVIL, GROUPS, 2).drop(columns='image')
        pd.testing.assert_frame_equal(explorer.table(), want)


def test_filters_are_those_of_the_analysis(dataset, tables):
    explorer = PredictionExplorer(tables, dataset, model='knows', k=1)
    logits = {n: t[EVIL].to_numpy() for n, t in tables.items()}
    for kind in ('fixed', 'tail', 'all_fail'):
        want = telling_images(logits, dataset.targets, GROUPS, kind, 'knows', 8, k=1)
        explorer.set(images=kind)
        assert explorer.order().tolist() == want.tolist()
        assert explorer.image == want[0]
        walked = [explorer.image] + [explorer.step().image for _ in want[1:]]
        assert walked == want.tolist()
        assert explorer.step().image == want[0], 'after the last comes the first'
    assert explorer.set(images='all').images == 'all'
    assert explorer.image == want[0]


def test_an_image_that_the_filter_hides_can_be_asked_for(dataset, tables):
    explorer = PredictionExplorer(tables, dataset)
    assert explorer.set(images='tail', image=3).set(image=0).images == 'all'


def test_a_filter_without_images_says_so(dataset, tables):
    explorer = PredictionExplorer(dict(one=tables['knows'], two=tables['knows']), dataset)
    with pytest.raises(ValueError, match="no image for 'only two is right'"): explorer.set(images='fixed')
    assert explorer.images == 'all'


def test_what_no_model_finds_is_told(dataset, tables):
    explorer = PredictionExplorer(tables, dataset, k=1).set(image=7)
    assert len(explorer.missed()) >= 2
    assert 'no model finds' in explorer.caption()
    assert explorer.set(image=6).missed() == []
    assert 'shows no class' in explorer.caption()


def test_whose_successes_count(dataset, tables, runs):
    assert PredictionExplorer(tables, dataset).model == 'guesses'
    assert PredictionExplorer(dict(ours=runs['cprfl'], theirs=runs['erm'])).model == 'ours'
    with pytest.raises(ValueError, match="expected one of knows, guesses, got 'x'"):
        PredictionExplorer(tables, dataset, model='x')


def test_many_models_and_labels_have_room(dataset, tables):
    narrow = pixels(PredictionExplorer(tables, dataset).png())
    six = {f'{name}{i}': table for name, table in tables.items() for i in range(3)}
    wide = pixels(PredictionExplorer(six, dataset, k=4).png())
    assert wide.shape[0] > narrow.shape[0]
    assert all((wide[:, x:].min() < 200) for x in (700, 1000)), 'all three columns are used'


def test_your_own_folder(runs, tmp_path):
    for i, image in enumerate(images(3, 20, 30, seed=5)): (tmp_path / f'<{i}>.png').write_bytes(as_png(image))
    explorer = PredictionExplorer(runs, tmp_path)
    assert len(explorer) == 3
    assert explorer.name(1) == '<1>.png'
    assert explorer.truth(0) is None
    assert explorer.pixels(2).shape == (20, 30, 3)
    table = explorer.table()
    assert set(table['right']) == {None}
    assert 'labels not known' in explorer.caption()
    assert '&lt;0&gt;.png' in explorer.caption()
    x, names = load_images(tmp_path, 32)
    test = ArrayDataset(x.permute(0, 2, 3, 1).numpy(), np.zeros((3, 4), int), EVIL)
    want = predict(runs['erm'].model(), test)
    np.testing.assert_allclose(explorer.predictions.logits['erm'], want, rtol=1e-4, atol=1e-5)


def upload(explorer, **files):
    "What the upload box sends"
    box = next(w for w in explorer.view().children[0].children if isinstance(w, ipywidgets.FileUpload))
    then = pd.Timestamp(0, tz='UTC').to_pydatetime()
    box.value = tuple(dict(name=name, type='image/png', size=len(data), content=memoryview(data), last_modified=then)
                      for name, data in files.items())
    assert box.value == (), 'ready for the same file again'
    return explorer._view.message.value


def test_uploaded_images(runs):
    explorer, good = PredictionExplorer(runs), as_png(images(1, 20, 30, seed=7)[0])
    said = upload(explorer, **{'good.png': good, '<bad>.png': b'nonsense', 'cut.png': good[:200]})
    assert '1 of your images added' in said
    assert '&lt;bad&gt;.png is no image that can be read' in said
    assert 'cut.png' in said
    assert (explorer.image, explorer.images, len(explorer)) == (12, 'own', 13)
    assert explorer.name(12) == 'good.png'
    image = load_images({'good.png': good}, 32)[0].permute(0, 2, 3, 1).numpy()
    own = predict(runs['cprfl'].model(), ArrayDataset(image, np.zeros((1, 4), int), EVIL))
    best = explorer.table().query("model == 'cprfl'")
    assert best['class'].iloc[0] == EVIL[int(own[0].argmax())]
    assert set(best['right']) == {None}
    assert explorer.set(image=0).images == 'all'
    assert explorer.truth(0) is not None
    assert upload(explorer, **{'bad.png': b''})
    assert len(explorer) == 13
    assert upload(explorer, **{'second.png': good})
    assert explorer.order().tolist() == [12, 13]
    explorer.close()


def test_uploads_need_models(dataset, tables):
    explorer = PredictionExplorer(tables, dataset)
    assert 'your own images need runs' in upload(explorer, **{'good.png': as_png(images(1)[0])})
    assert len(explorer) == 8
    explorer.close()


# ---- attention

def test_maps_are_those_of_the_analysis(dataset, small):
    explorer = AttentionExplorer(small, dataset).set(image=4, category=3)
    want, a = explain_image(small, dataset[4][0], 3), attention_maps(small, dataset[4][0][None])
    size = dataset.images.shape[1:3]
    maps = dict(attention=want['attention'], gradcam=want['gradcam'])
    for i, head in enumerate(want['heads']): maps[f'head {i + 1}'] = head
    for method, m in maps.items():
        np.testing.assert_allclose(upsample_maps(explorer.set(method=method).map(), size), m, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(explorer.logits(), a.logits[0])
    assert explorer.scores()['rank'] == int((a.logits[0] > a.logits[0, 3]).sum()) + 1


def test_one_forward_pass_serves_all_categories_and_heads(dataset, small):
    calls = []
    explorer = AttentionExplorer(small, dataset)
    hook = small.backbone.register_forward_hook(lambda *a: calls.append(1))
    explorer.set(image=1)
    for c in range(4):
        for method in ('attention', 'head 1', 'head 2'): explorer.set(category=c, method=method).png()
    explorer.set(image=2).png()
    explorer.set(image=1).png()
    assert len(calls) == 2
    for _ in range(2): explorer.set(method='gradcam', category=0).png()
    assert len(calls) == 3
    hook.remove()
    assert not sum(len(m._forward_hooks) + len(m._backward_hooks) for m in small.modules())
    assert not any(p.grad is not None for p in small.parameters())


@pytest.mark.parametrize('h,w', [(32, 32), (32, 64), (64, 32)])
def test_the_map_is_drawn_where_it_is(small, h, w):
    "A lit patch, at the same place in the image, whatever the image's shape"
    box, m = (0, w // 2, h // 4, 3 * w // 4, h // 2), torch.zeros(4, 4)
    m[1, 2] = 1
    grey = np.full((1, h, w, 3), 128, np.uint8)
    data = ArrayDataset(grey, [[1, 0, 0, 0]], EVIL, groups=GROUPS, boxes=[[box]])
    explorer = AttentionExplorer(small, data).set(opacity=1.0)
    explorer.map = lambda: m
    assert explorer.scores()['hit'] == 1
    _, (wide, high) = fit(explorer.pixels(0), 400, 480)
    assert abs(wide / high - w / h) < 0.02
    picture = pixels(explorer.png()).sum(2)
    x0, y0 = round(SHARP * (wide + 16)), round(SHARP * 26)
    panel = picture[y0:y0 + round(SHARP * high), x0:x0 + round(SHARP * wide)]
    rows, columns = np.nonzero(panel > 0.97 * panel.max())
    assert abs(columns.mean() / panel.shape[1] - 0.625) < 0.02
    assert abs(rows.mean() / panel.shape[0] - 0.375) < 0.02


def test_overlay_from_image_to_map(dataset, small):
    explorer = AttentionExplorer(small, dataset).set(image=2, category=2)
    faces = [pixels(explorer.set(opacity=o).png()) for o in (0.0, 0.5, 1.0)]
    left = slice(None), slice(0, round(SHARP * 400))
    assert (faces[0][left] == faces[2][left]).all()
    assert all((a != b).any() for a, b in zip(faces, faces[1:]))


def test_filter_by_category(dataset, small):
    explorer = AttentionExplorer(small, dataset).set(images='category', category=3)
    assert explorer.order().tolist() == [3, 4, 7]
    assert explorer.image == 3
    assert explorer.set(category=2).image == 2
    assert explorer.set(image=0).images == 'all'
    assert [c for label, c in explorer.options('category').items() if label.endswith('✓')] == [0]


def test_models_without_attention(dataset):
    erm = AttentionExplorer(ERM('resnet18', 4).eval(), dataset)
    assert list(erm.options('method').values()) == ['gradcam']
    assert 'on_patches' not in erm.scores()
    test = shapes_lt('test').subset(range(4))
    clip = AttentionExplorer(ZeroShotCLIP(load_clip('shapes'), test.classes), test)
    assert 'cosine' in clip.caption()
    assert abs(clip.scores()['logit']) <= 1
    assert {'hit', 'energy'} <= set(clip.scores())
    with pytest.raises(ValueError, match='has no backbone'): AttentionExplorer(ERM(None, 4, feature_dim=8), dataset)
    with pytest.raises(ValueError, match='pass a dataset, or a Run'): AttentionExplorer(ERM('resnet18', 4))


def test_attention_of_a_run_and_of_your_own_images(runs, tmp_path):
    explorer = AttentionExplorer(runs['cprfl'])
    assert len(explorer) == 12
    assert explorer.pixels(0).shape == (20, 30, 3)
    assert explorer.tensor(0).shape == (3, 32, 32)
    assert 'hit' not in explorer.scores()
    assert explorer.scores()['on_patches'] <= 1
    said = upload(explorer, **{'mine.png': as_png(images(1, 50, 40, seed=3)[0]), 'bad.png': b'x'})
    assert explorer.pixels(12).shape == (50, 40, 3), 'shown as it is, squashed for the model alone'
    assert '1 of your images' in said
    assert 'bad.png' in said
    assert explorer.truth(explorer.image) is None
    assert explorer.map().shape == patch_grid(explorer.map().numel(), (32, 32))
    (tmp_path / 'a.png').write_bytes(as_png(images(1)[0]))
    assert len(AttentionExplorer(runs['erm'], tmp_path)) == 1
    explorer.close()


# ---- drift

def turned(degrees):
    c, s = np.cos(np.radians(degrees)), np.sin(np.radians(degrees))
    return torch.tensor([[2 * c, 2 * s], [0, 2.], [1, 1], [-1, 1]], dtype=torch.float32)


def test_neighbours_of_a_known_rotation():
    run = SimpleNamespace(prompts={e: turned(30 * e) for e in range(5)}, classes=EVIL, groups=GROUPS)
    explorer = DriftExplorer(run, k=9).set(category=0)
    assert explorer.epoch == 4
    assert explorer.k == 3
    nearest = [explorer.set(epoch=e).neighbours()['class'][0] for e in range(5)]
    assert nearest == [EVIL[i] for i in (2, 2, 2, 1, 3)]
    table = explorer.neighbours()
    cosines = table.set_index('class').loc[EVIL[3], ['now', 'start']].astype(float)
    np.testing.assert_allclose(cosines, np.cos(np.radians([15, 135])), atol=1e-6)
    assert 'cosine with its own start -0.50' in explorer.caption()
    want = class_similarity(run.prompts[4], EVIL, centre=True).loc[EVIL[0]].drop(EVIL[0]).sort_values(ascending=False)
    np.testing.assert_allclose(explorer.set(centre=True).neighbours()['now'], want)


def test_axes_stand_still():
    run = SimpleNamespace(prompts={e: turned(30 * e) for e in range(5)}, classes=EVIL, groups=GROUPS)
    explorer = DriftExplorer(run)
    limits = {tuple(explorer.set(epoch=e).figure().axes[0].get_xlim()) for e in range(5)}
    assert len(limits) == 1


def test_drift_needs_prompts(runs):
    assert DriftExplorer(runs['cprfl']).epoch == 1
    with pytest.raises(ValueError, match='has no prompts.*: only CPRFL learns prompts'): DriftExplorer(runs['erm'])


# ---- monitor

ROWS = pd.DataFrame(dict(epoch=[1, 2, 3], loss=[.4, .2, .1], lr=1e-3, seconds=60.))
ROWS = ROWS.assign(total=[.2, .3, .4], head=[.3, .4, .5], tail=[.1, .2, .3])


def put(folder, name, text): write_atomic(folder / name, lambda p: p.write_text(text))


def wait_for(condition, seconds=20):
    event = threading.Event()
    for _ in range(int(seconds / 0.02)):
        if condition(): return True
        event.wait(0.02)
    return False


def followers(): return [t for t in threading.enumerate() if t.name == 'TrainingMonitor' and t.is_alive()]


def test_a_folder_that_grows(tmp_path):
    folder = tmp_path / 'run'
    monitor = TrainingMonitor(folder, every=0.02)
    assert 'does not exist yet' in monitor.caption()
    assert monitor.progress() == dict(epoch=0, epochs=0, seconds=0., left=None)
    assert not monitor.following
    assert not followers(), 'nobody looks before it is shown'
    monitor.view()
    assert monitor.following
    assert len(followers()) == 1
    folder.mkdir()
    put(folder, 'train_config.json', json.dumps(dict(epochs=5)))
    empty, pictures = monitor._view.picture.value, set()
    for n in (1, 2, 3):
        put(folder, 'metrics.csv', ROWS[:n].to_csv(index=False))
        assert wait_for(lambda n=n: f'epoch {n} of 5' in monitor._view.caption.value)
        assert wait_for(lambda: monitor._view.picture.value not in pictures | {empty})
        pictures.add(monitor._view.picture.value)
    assert 'about 2 min to go' in monitor.caption()
    assert monitor.progress()['left'] == 120
    monitor.stop()
    assert not followers()
    assert not monitor.following
    monitor.start().start()
    assert len(followers()) == 1
    monitor.close()
    assert not followers()


def test_it_ends_with_the_run(tmp_path):
    put(tmp_path, 'metrics.csv', ROWS.to_csv(index=False))
    monitor = TrainingMonitor(tmp_path, every=0.02).start()
    put(tmp_path, 'report.json', json.dumps(dict(total=.5, head=.6, medium=None, tail=.4)))
    assert wait_for(lambda: not followers())
    assert monitor.finished
    assert 'test mAP total 50.0, head 60.0, tail 40.0' in monitor.caption()
    assert not monitor.start().following, 'there is nothing to follow any more'


def test_it_ends_when_nobody_holds_it(tmp_path):
    monitor = TrainingMonitor(tmp_path, every=0.02).start()
    assert followers()
    del monitor
    gc.collect()
    assert wait_for(lambda: not followers())


def test_files_that_make_no_sense_change_nothing(tmp_path):
    put(tmp_path, 'metrics.csv', ROWS.to_csv(index=False))
    monitor = TrainingMonitor(tmp_path)
    broken = [('metrics.csv', ''), ('metrics.csv', '\0\1'), ('metrics.csv', 'a,b\n1,2,3,4\n'), ('purity.csv', 'x'),
              ('train_config.json', '{'), ('report.json', '{')]
    for name, text in broken:
        put(tmp_path, name, text)
        monitor.look()
        assert monitor.progress()['epoch'] == 3
        assert not monitor.finished
        assert monitor.png()


def test_the_toggle_follows_and_lets_go(tmp_path):
    monitor = TrainingMonitor(tmp_path, every=0.02)
    monitor.view()
    toggle = monitor._view.fields['following']
    assert toggle.value is True
    toggle.value = False
    assert not monitor.following
    assert not followers()
    toggle.value = True
    assert monitor.following
    monitor.close()


def test_alignment_is_drawn_if_nothing_is_validated(tmp_path):
    put(tmp_path, 'metrics.csv', ROWS[['epoch', 'loss', 'lr', 'seconds']].to_csv(index=False))
    rates = TrainingMonitor(tmp_path)
    assert rates.figure().axes[1].get_ylabel() == 'learning rate'
    groups = ['head', 'head', 'tail', 'tail']
    alignment = pd.DataFrame(dict(epoch=[0, 1, 0, 1], group=groups, auc=[.5, .9, .5, .7]))
    put(tmp_path, 'purity.csv', alignment.to_csv(index=False))
    rates.look()
    axes = rates.figure().axes
    assert 'alignment' in axes[1].get_ylabel()
    assert [line.get_ydata().tolist() for line in axes[1].lines] == [[.5, .9], [.5, .7]]


def test_as_a_callback(tmp_path, dataset):
    seen, monitor = [], TrainingMonitor(tmp_path)
    look = monitor.look
    monitor.look = lambda: seen.append(look())
    config = TrainConfig(epochs=2, batch_size=4, select='last', device='cpu', augment='standard')
    callbacks = [monitor.as_callback()]
    Trainer(ERM('resnet18', 4), dataset, config=config, folder=tmp_path, callbacks=callbacks, progress=False).fit()
    assert monitor.progress()['epoch'] == 2
    assert monitor.progress()['epochs'] == 2
    assert seen == [True, True, True, False]


def test_what_the_thresholds_decide_stands_beside_the_scores(dataset, tables):
    explorer = PredictionExplorer(tables, dataset)
    logits = explorer.predictions.logits['knows'][0]
    threshold = logits + np.array([-5, 0, 5, 5])
    explorer._decisions['knows'] = Decisions(EVIL, threshold, np.ones(4), np.zeros(4), np.full(4, 9), 1., 99, 10., 10.)
    table = explorer.set(image=0).table().set_index('model')
    words = dict(zip(EVIL, ['yes', 'unsure', 'no', 'no']))
    assert table.loc['knows', 'decision'].tolist() == [words[name] for name in table.loc['knows', 'class']]
    assert table.loc['guesses', 'decision'].tolist() == ['', '', '']
    assert '? unsure' in explorer.caption()
    assert len(explorer.png()) > 1000
