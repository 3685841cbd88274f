"Category semantics from every source, and the CLIP in the package"
import errno
import json
import pickle
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import TouchesAFile
from open_clip.transformer import QuickGELU
from safetensors.torch import save_file
from torch import nn
from torch.nn.functional import normalize

import cprfl.model.semantics
from cprfl.data.shapes import COLOURS, SHAPES, render_drawing, shapes_classes, shapes_lt
from cprfl.metrics import average_precision
from cprfl.model.baselines import ERM, ZeroShotCLIP
from cprfl.model.hub import without_waiting
from cprfl.model.semantics import (
    SOURCES,
    TEMPLATE,
    Clip,
    WordTokenizer,
    category_semantics,
    clip_setup,
    fill_template,
    load_clip,
)
from cprfl.runs.build import build_model
from cprfl.runs.recipe import get_recipe

CLASSES = ['red circle', 'red star', 'blue square']
ASSETS = Path(cprfl.__file__).parent / 'assets'


@pytest.fixture(scope='module')
def clip(): return load_clip('shapes')


def matrix(C=3, m=4, seed=0): return np.random.default_rng(seed).normal(size=(C, m)).astype(np.float32)


# ---- sentences

def test_templates_fill_and_underscores_are_spaces():
    assert TEMPLATE == 'a photo of a {}.'
    assert fill_template(['cat', 'dining_table']) == ['a photo of a cat.', 'a photo of a dining table.']
    assert fill_template(['cat'], '{}, a {}') == ['cat, a cat']
    with pytest.raises(ValueError, match="expected a {} for the class name, got 'a photo'"):
        fill_template(['cat'], 'a photo')


def test_words_to_ids():
    tok = WordTokenizer(['red', 'circle'], context_length=5)
    assert tok(['Red circle!', 'circle']).tolist() == [[1, 2, 3, 4, 0], [1, 3, 4, 0, 0]]
    assert tok.end == 4 > max(tok.ids.values()), 'the highest id marks the place where the text tower reads'
    with pytest.raises(ValueError, match="does not know 'cat', 'dog' in 'cat red dog'; it knows red, circle"):
        tok(['cat red dog'])
    with pytest.raises(ValueError, match='expected at most 3 words, got 4'): tok(['red red red red'])


# ---- the text tower

def test_shapes_gives_a_row_per_class_at_the_towers_own_scale(clip):
    W = category_semantics(CLASSES, 'shapes')
    assert W.shape == (3, 128)
    assert W.dtype == torch.float32
    assert not W.requires_grad
    sentences = ['a photo of a red circle.', 'a photo of a red star.', 'a photo of a blue square.']
    assert torch.allclose(W, clip.encode_text(sentences), atol=1e-5)
    assert torch.equal(W, category_semantics(CLASSES, 'shapes'))
    assert (W.norm(dim=1) - 1).abs().min() > 0.5
    assert torch.allclose(category_semantics(CLASSES[::-1], 'shapes'), W.flip(0), atol=1e-5)


def test_an_ensemble_is_the_mean_of_its_templates():
    templates = ['a photo of a {}.', 'a drawing of a {}.']
    each = [category_semantics(CLASSES, 'shapes', t) for t in templates]
    assert not torch.allclose(*each)
    assert torch.allclose(category_semantics(CLASSES, 'shapes', templates), sum(each) / 2, atol=1e-6)
    assert torch.allclose(category_semantics(CLASSES, 'shapes', templates[:1]), each[0], atol=1e-6)


def test_norm_rescales_the_mean_length_and_nothing_else():
    W, scaled = category_semantics(CLASSES, 'shapes'), category_semantics(CLASSES, 'shapes', norm=7.)
    assert scaled.norm(dim=1).mean().item() == pytest.approx(7, rel=1e-5)
    assert torch.allclose(scaled / W, (scaled / W)[0, 0].expand_as(W), rtol=1e-4)


# ---- files and random

def test_npy_and_safetensors(tmp_path):
    W = matrix()
    np.save(tmp_path / 'w.npy', W.astype(np.float64))
    save_file({'semantics': torch.from_numpy(W).half()}, tmp_path / 'w.safetensors')
    a, b = (category_semantics(CLASSES, f'file:{tmp_path}/w.{e}') for e in ('npy', 'safetensors'))
    assert a.dtype == b.dtype == torch.float32
    assert torch.equal(a, torch.from_numpy(W))
    assert torch.allclose(a, b, atol=1e-2)
    np.save(tmp_path / 'one.npy', W[:1])
    assert category_semantics(['cat'], f'file:{tmp_path}/one.npy').shape == (1, 4)


def test_glove_averages_the_words_of_a_name(tmp_path):
    file = tmp_path / 'glove.txt'
    file.write_text('the 9 9\ndining 1 2\ntable 3 4\ncat -1 0.5\n', encoding='utf-8')
    assert category_semantics(['dining_table', 'Cat'], f'glove:{file}').tolist() == [[2, 3], [-1, 0.5]]
    with pytest.raises(ValueError, match='has no vector for dog, hot'):
        category_semantics(['hot dog', 'cat'], f'glove:{file}')


def test_random_has_no_meaning_but_a_seed():
    names, others = ([f'{k}{i}' for i in range(200)] for k in 'cd')
    W = category_semantics(names, 'random:64', seed=3)
    assert W.shape == (200, 64)
    assert torch.equal(W, category_semantics(others, 'random:64', seed=3))
    assert not torch.equal(W, category_semantics(names, 'random:64', seed=4))
    assert W.norm(dim=1).mean().item() == pytest.approx(10, rel=0.05)
    assert category_semantics(CLASSES, 'random').shape == (3, 512)


def test_words_know_which_words_names_share():
    W = category_semantics(['red star', 'red_Circle', 'blue star'], 'words')
    assert (W @ W.T).tolist() == [[2, 1, 1], [1, 2, 0], [1, 0, 2]]


def test_random_leaves_the_global_generator_alone():
    torch.manual_seed(0)
    want = torch.rand(1)
    torch.manual_seed(0)
    category_semantics(CLASSES, 'random')
    assert torch.equal(torch.rand(1), want)


# ---- errors and traps

@pytest.mark.parametrize('source, words', [
    ('bert', "expected one of clip:ARCH/TAG, shapes, file:PATH, .*, random, random:m, got 'bert'"),
    ('clip:RN50', "expected 'clip:ARCH/TAG'"), ('shapes:x', "got 'shapes:x'"),
    ('clip:Nothing/x', "no architecture 'Nothing'"), ('clip:RN50/nowhere', 'neither a file nor a tag; tags: .*openai'),
    ('random:many', "random:128, got 'many'"), ('random:0', "got '0'")])
def test_unknown_sources_say_what_there_is(source, words):
    with pytest.raises(ValueError, match=words): category_semantics(CLASSES, source)


def test_every_advertised_source_is_tested_here():
    assert set(SOURCES) == {'clip:ARCH/TAG', 'shapes', 'file:PATH', 'glove:PATH', 'words', 'random', 'random:m',
                            'package'}


@pytest.mark.parametrize('kind', ['file', 'glove'])
def test_missing_files(kind):
    with pytest.raises(FileNotFoundError, match=f'{kind}: no such file: nowhere.npy'):
        category_semantics(CLASSES, f'{kind}:nowhere.npy')


def test_wrong_shapes_kinds_and_values(tmp_path):
    wrong = {'short': matrix(2), 'flat': matrix()[0], 'nan': np.full((3, 4), np.nan, np.float32)}
    for name, W in wrong.items(): np.save(tmp_path / f'{name}.npy', W)
    save_file({'a': torch.zeros(3, 4), 'b': torch.zeros(3, 4)}, tmp_path / 'two.safetensors')
    (tmp_path / 'w.csv').write_text('1,2')
    messages = {'short.npy': r'expected \[C, m\] with C = 3 .*got \[2, 4\]', 'flat.npy': r'got \[4\]',
                'nan.npy': 'not finite', 'two.safetensors': 'expected one tensor',
                'w.csv': 'expected .npy or .safetensors, got w.csv'}
    for name, words in messages.items():
        with pytest.raises(ValueError, match=words): category_semantics(CLASSES, f'file:{tmp_path / name}')


def damaged_files(folder):
    "Name -> bytes of files that are not what their names say"
    np.save(folder / 'w.npy', matrix())
    np.savez(folder / 'w.npz', matrix())
    save_file({'semantics': torch.zeros(3, 4)}, folder / 'w.safetensors')
    sound = {name: (folder / name).read_bytes() for name in ('w.npy', 'w.npz', 'w.safetensors')}
    return {
        'empty.npy': b'', 'cut.npy': sound['w.npy'][:-8], 'head.npy': sound['w.npy'][:20], 'zip.npy': sound['w.npz'],
        'cut.safetensors': sound['w.safetensors'][:-8], 'empty.safetensors': b''}


@pytest.mark.parametrize('name', [
    'empty.npy', 'cut.npy', 'head.npy', 'zip.npy', 'cut.safetensors', 'empty.safetensors'])
def test_a_damaged_file_is_named(tmp_path, name):
    (tmp_path / name).write_bytes(damaged_files(tmp_path)[name])
    with pytest.raises(ValueError, match=f'{name} is damaged, or not what its name says'):
        category_semantics(CLASSES, f'file:{tmp_path / name}')


def test_texts_are_no_vectors(tmp_path):
    np.save(tmp_path / 'texts.npy', np.array([['a', 'b']] * 3))
    with pytest.raises(ValueError, match='texts.npy is damaged, or not what its name says .*could not convert'):
        category_semantics(CLASSES, f'file:{tmp_path / "texts.npy"}')


def test_a_line_of_glove_in_another_encoding_is_passed_over(tmp_path):
    (tmp_path / 'g.txt').write_bytes('café 1 2\n'.encode('latin-1') + b'dog 3 4\n')
    assert category_semantics(['dog'], f'glove:{tmp_path}/g.txt').tolist() == [[3, 4]]


@pytest.mark.parametrize('line, why', [
    ('dog 3 x', "g.txt:2: expected numbers after 'dog'"), ('dog 3', 'expected vectors of one length, got 1, 2')])
def test_a_wrong_line_of_glove_is_named(tmp_path, line, why):
    (tmp_path / 'g.txt').write_text(f'cat 1 2\n{line}\n')
    with pytest.raises(ValueError, match=why): category_semantics(['cat', 'dog'], f'glove:{tmp_path}/g.txt')


def test_a_pickle_in_a_npy_is_refused_and_does_not_run(tmp_path):
    mark = tmp_path / 'it_ran'
    np.save(tmp_path / 'object.npy', np.array([TouchesAFile(mark)], dtype=object), allow_pickle=True)
    (tmp_path / 'bare.npy').write_bytes(pickle.dumps(TouchesAFile(mark)))
    for name in ('object.npy', 'bare.npy'):
        with pytest.raises(ValueError): category_semantics(CLASSES, f'file:{tmp_path / name}')
    assert not mark.exists()
    np.load(tmp_path / 'object.npy', allow_pickle=True)
    assert mark.exists(), 'the trap itself works'


def test_without_a_network_the_error_says_what_to_do(monkeypatch):
    import open_clip
    def offline(*args, **kw): raise OSError('no network')
    monkeypatch.setattr(open_clip, 'create_model_and_transforms', offline)
    message = 'clip:RN50/openai could not be fetched .*clip:RN50/PATH, or vectors: file:PATH'
    with pytest.raises(RuntimeError, match=message):
        category_semantics(CLASSES, 'clip:RN50/openai')


def test_a_disk_without_room_for_weights_is_not_a_network(monkeypatch):
    import open_clip
    def full(*args, **kw):
        try: raise OSError(errno.ENOSPC, 'No space left on device', 'weights.incomplete')
        except OSError as e:
            raise FileNotFoundError(f'Failed to download file. Last error: {e}') # noqa: B904 - as there
    monkeypatch.setattr(open_clip, 'create_model_and_transforms', full)
    with pytest.raises(RuntimeError, match='could not be stored: .Errno 28. No space left'):
        category_semantics(CLASSES, 'clip:RN50/openai')


def test_a_clip_of_ones_own_from_a_file(tmp_path):
    import open_clip
    vision = dict(layers=[1, 1, 1, 1], width=8, head_width=16, image_size=32)
    text = dict(context_length=77, vocab_size=49408, width=16, heads=2, layers=1)
    (tmp_path / 'tiny-cprfl-text.json').write_text(json.dumps(dict(embed_dim=12, vision_cfg=vision, text_cfg=text)))
    open_clip.add_model_config(tmp_path / 'tiny-cprfl-text.json')
    torch.manual_seed(0)
    model = open_clip.create_model('tiny-cprfl-text').eval()
    torch.save(model.state_dict(), tmp_path / 'w.pt')
    W = category_semantics(['cat', 'traffic_light'], f'clip:tiny-cprfl-text/{tmp_path}/w.pt')
    with torch.no_grad():
        want = model.encode_text(open_clip.tokenize(['a photo of a cat.', 'a photo of a traffic light.']))
    assert W.shape == (2, 12)
    assert torch.allclose(W, want, atol=1e-5)


# ---- the towers that the weights were trained in

VISION = dict(layers=1, width=32, head_width=16, patch_size=16, image_size=32)
TEXT = dict(context_length=77, vocab_size=49408, width=16, heads=2, layers=1)
TAGS = dict(
    openai=dict(quick_gelu=True, mean=(0.5, 0.4, 0.3), std=(0.2, 0.2, 0.2), interpolation='bicubic'),
    plain=dict(mean=(0.1, 0.1, 0.1), std=(0.9, 0.9, 0.9), interpolation='bilinear'))


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    "A small architecture that was trained in two ways, and the file with its weights"
    import open_clip
    for name, config in dict(tiny={}, quick=dict(quick_gelu=True)).items():
        file = tmp_path / f'cprfl-{name}.json'
        file.write_text(json.dumps(dict(embed_dim=8, vision_cfg=VISION, text_cfg=TEXT) | config))
        open_clip.add_model_config(file)
    torch.manual_seed(0)
    torch.save(open_clip.create_model('cprfl-tiny').state_dict(), tmp_path / 'w.pt')
    download = open_clip.factory.download_pretrained
    here = lambda cfg, **kw: download(cfg, **kw) if cfg.get('hf_hub') else str(tmp_path / 'w.pt')
    monkeypatch.setattr(open_clip.factory, 'download_pretrained', here)
    monkeypatch.setitem(open_clip.pretrained._PRETRAINED, 'cprfl-tiny', dict(TAGS))
    return tmp_path / 'w.pt'


def activations(clip): return {type(m).__name__ for m in clip.model.modules() if 'GELU' in type(m).__name__}


@pytest.mark.parametrize('tag, found', [('openai', 'QuickGELU'), ('plain', 'GELU')])
def test_a_tag_brings_its_activation(tiny, tag, found):
    assert activations(load_clip(f'clip:cprfl-tiny/{tag}')) == {found}


@pytest.mark.parametrize('tag', TAGS)
def test_a_tag_brings_its_preprocessing(tiny, tag):
    clip = load_clip(f'clip:cprfl-tiny/{tag}')
    assert dict(mean=clip.mean, std=clip.std, interpolation=clip.interpolation).items() <= TAGS[tag].items()
    assert clip.image_size == 32


def test_no_warning_is_left_over(tiny, recwarn):
    load_clip('clip:cprfl-tiny/openai')
    assert not [w for w in recwarn if 'QuickGELU' in str(w.message)]


def test_embeddings_are_those_of_the_right_towers(tiny):
    import open_clip
    right = open_clip.create_model('cprfl-quick', pretrained=str(tiny)).eval()
    clip, tokens = load_clip('clip:cprfl-tiny/openai'), open_clip.tokenize(['a cat', 'a dog'])
    with torch.no_grad(): assert torch.equal(clip.encode_text(['a cat', 'a dog']), right.encode_text(tokens))


@pytest.mark.parametrize('interpolation', ['bicubic', 'bilinear'])
def test_images_are_resized_as_the_tag_says(tiny, interpolation):
    tag = next(tag for tag, cfg in TAGS.items() if cfg['interpolation'] == interpolation)
    clip, x = load_clip(f'clip:cprfl-tiny/{tag}'), torch.rand(2, 3, 50, 50)
    resized = torch.nn.functional.interpolate(x, (32, 32), mode=interpolation, antialias=True).clamp(0, 1)
    assert torch.equal(clip.encode_image(x), clip.encode_image(resized))


@pytest.mark.parametrize('source, found', [
    ('{file}', None), ('openai={file}', 'QuickGELU'), ('plain={file}', 'GELU')])
def test_a_file_is_taken_for_what_it_was_trained_as(tiny, source, found):
    source = f'clip:cprfl-tiny/{source.format(file=tiny)}'
    if found: assert activations(load_clip(source)) == {found}
    else:
        with pytest.raises(ValueError, match='trained in several ways.*clip:cprfl-tiny/openai='): load_clip(source)


def test_the_name_of_a_file_may_say_it(tiny):
    file = tiny.rename(tiny.with_name('tiny-openai.pt'))
    assert activations(load_clip(f'clip:cprfl-tiny/{file}')) == {'QuickGELU'}


def test_a_file_with_one_reading_needs_no_tag(tiny, monkeypatch):
    import open_clip
    monkeypatch.setitem(open_clip.pretrained._PRETRAINED, 'cprfl-tiny', dict(openai=TAGS['openai']))
    clip = load_clip(f'clip:cprfl-tiny/{tiny}')
    assert activations(clip) == {'QuickGELU'}
    assert clip.mean == (0.5, 0.4, 0.3)


@pytest.mark.parametrize('arch, tag, quick', [
    ('RN50', 'openai', True), ('RN101', 'yfcc15m', True), ('ViT-B-16', 'dfn2b', True),
    ('ViT-B-16', 'datacomp_xl_s13b_b90k', False),
    ('ViT-B-32-quickgelu', 'metaclip_400m', True), ('ViT-H-14-378-quickgelu', 'dfn5b', True),
    ('ViT-L-14', 'laion2b_s32b_b82k', False), ('roberta-ViT-B-32', 'laion2b_s12b_b32k', True)])
def test_the_activation_of_published_weights(arch, tag, quick):
    assert clip_setup(arch, tag).quick_gelu == quick


def test_towers_that_open_clip_built_otherwise_are_refused(tiny, monkeypatch):
    import open_clip
    create = open_clip.create_model_and_transforms
    monkeypatch.setattr(open_clip, 'create_model_and_transforms', lambda *a, force_quick_gelu, **kw: create(*a, **kw))
    with pytest.raises(RuntimeError, match='expected towers with QuickGELU'): load_clip('clip:cprfl-tiny/openai')


@pytest.mark.parametrize('model', ['clip', 'coop', 'cprfl'])
def test_every_model_of_a_recipe_has_the_right_towers(tiny, model):
    source = 'clip:cprfl-tiny/openai'
    recipe = get_recipe('shapes-clip').with_(model=model, semantics=source, backbone=source, backbone_args={})
    built, classes = build_model(recipe, CLASSES), [type(m) for m in build_model(recipe, CLASSES).modules()]
    assert QuickGELU in classes
    assert nn.GELU not in classes or model == 'cprfl' # the PI network has one of its own
    if model == 'cprfl': assert torch.equal(built.semantics, category_semantics(CLASSES, source))


@pytest.mark.filterwarnings('ignore::FutureWarning', 'ignore:.torch.load. received a zip file:UserWarning')
def test_a_script_archive_says_how_to_convert_it(tiny):
    torch.jit.save(torch.jit.script(nn.Linear(2, 2)), tiny)
    with pytest.raises(ValueError, match='w.pt cannot be used: it is a TorchScript archive'):
        load_clip(f'clip:cprfl-tiny/openai={tiny}')


def test_a_missing_file_of_a_tag_is_named(tiny):
    with pytest.raises(FileNotFoundError, match='no such file: nowhere.pt'):
        load_clip('clip:cprfl-tiny/openai=nowhere.pt')


# ---- without a network

@pytest.fixture
def unreachable(monkeypatch):
    monkeypatch.setattr('cprfl.model.hub.is_reachable', lambda url: False)
    monkeypatch.setattr(time, 'sleep', lambda seconds: pytest.fail('waited'))


def test_weights_that_cannot_be_had_are_told_at_once(unreachable, tiny, monkeypatch):
    import open_clip
    on_the_hub = TAGS['openai'] | dict(hf_hub='nobody/cprfl-nothing/')
    monkeypatch.setitem(open_clip.pretrained._PRETRAINED, 'cprfl-tiny', dict(openai=on_the_hub))
    with pytest.raises(RuntimeError, match='clip:cprfl-tiny/openai could not be fetched .*clip:cprfl-tiny/PATH'):
        load_clip('clip:cprfl-tiny/openai')


def test_the_hub_is_as_it_was_afterwards(unreachable):
    from huggingface_hub import constants
    before = constants.HF_HUB_OFFLINE
    with without_waiting(): assert constants.HF_HUB_OFFLINE
    assert constants.HF_HUB_OFFLINE == before


# ---- the CLIP in the package

def test_the_package_stays_small():
    sizes = {p.name: p.stat().st_size for p in ASSETS.rglob('*') if p.is_file()}
    assert sizes['shapes_clip.safetensors'] < 3_000_000
    assert sum(sizes.values()) < 3_000_000, sizes


def test_words_that_share_a_colour_are_near(clip):
    red_circle, red_star, blue_square = normalize(clip.encode_text(fill_template(CLASSES)))
    assert red_circle @ red_star > red_circle @ blue_square
    names = [f'{c} {s}' for c in COLOURS for s in SHAPES]
    T = normalize(clip.encode_text(fill_template(names)))
    sim, shares = T @ T.T, torch.tensor([[len(set(a.split()) & set(b.split())) for b in names] for a in names])
    assert sim[shares == 1].mean() > sim[shares == 0].mean() + 0.1


def test_clip_takes_bytes_and_floats_of_any_size(clip):
    assert isinstance(clip, Clip)
    assert not clip.model.training
    assert clip.image_size == 64
    x = torch.randint(256, (2, 3, 64, 64), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    assert clip.encode_image(x).shape == (2, 128)
    assert torch.equal(clip.encode_image(x), clip.encode_image(x.float() / 255))
    assert clip.encode_image(x[:, :, ::2, :48]).shape == (2, 128)


def test_the_clip_in_the_package_has_gelu(clip): assert activations(clip) == {'GELU'}


def test_zero_shot_knows_the_drawings(clip):
    "One object on plain paper, of 42 phrases: the style that it was trained on"
    rng, names = np.random.default_rng(12345), [f'{c} {s}' for c in COLOURS for s in SHAPES]
    wanted = rng.integers(0, len(names), 60)
    x = np.stack([render_drawing(rng, [names[i]]) for i in wanted]).transpose(0, 3, 1, 2)
    logits = ZeroShotCLIP(clip, names)(torch.from_numpy(x))
    assert (logits.argmax(1).numpy() == wanted).mean() > 0.95


def test_zero_shot_on_scenes_is_above_chance(clip):
    "Another style, several objects: a domain gap"
    test = shapes_lt('test').subset(range(300))
    x = torch.stack([test.image(i) for i in range(len(test))])
    ap = average_precision(ZeroShotCLIP(clip, test.classes)(x), torch.from_numpy(test.targets))
    chance = test.targets.mean()
    assert float(np.nanmean(ap)) > chance + 0.05, f'mAP {float(np.nanmean(ap)):.3f}, chance {chance:.3f}'


def test_zero_shot_averages_normalised_sentences(clip):
    templates = ['a photo of a {}.', 'a drawing of a {}.']
    text = ZeroShotCLIP(clip, CLASSES, templates).text
    want = normalize(sum(normalize(clip.encode_text(fill_template(CLASSES, t))) for t in templates))
    assert torch.allclose(text, want, atol=1e-6)
    assert torch.allclose(text.norm(dim=1), torch.ones(3))


# ---- the linear baseline

def test_erm_pools_and_projects():
    torch.manual_seed(0)
    model, f = ERM(None, 5, feature_dim=8), torch.randn(2, 6, 8)
    assert torch.allclose(model(f), f.mean(1) @ model.fc.weight.T + model.fc.bias, atol=1e-6)
    assert torch.equal(model(f), model.from_features(f))
    assert ERM('resnet10t', 3)(torch.rand(2, 3, 64, 64)).shape == (2, 3)
    with pytest.raises(ValueError, match='pass feature_dim=D'): ERM(None, 5)


def test_shapes_vocabulary_covers_every_size_of_the_benchmark(clip):
    for n in (20, 42): assert category_semantics(shapes_classes(n)).shape == (n, 128)
