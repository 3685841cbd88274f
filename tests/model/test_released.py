"The authors' checkpoints: their figures, wrappings that make no difference, and files that do not fit"
import json
import pickle
import warnings

import numpy as np
import pytest
import timm
import torch
from helpers import FIXTURES, TouchesAFile
from safetensors.torch import save_file

from cprfl.model import released
from cprfl.model.cprfl import CPRFL
from cprfl.model.released import describe_released, load_released, released_semantics

FIGURES = sorted(FIXTURES.glob('vsi_*_dual.npz'))
THEIRS = {'fc': 'fc.0', 'pi': 'label_emb', 'encoder': 'attention'}  # the figures' names, the checkpoints'
PARTS = {'conv1': '0', 'bn1': '1', 'layer1': '4', 'layer2': '5', 'layer3': '6', 'layer4': '7'}


def resnet(D, arch='resnet18', seed=0):
    "A narrow ResNet with D channels at its end, and its tensors as the released code calls them"
    torch.manual_seed(seed)
    last = D // 4 if arch in ('resnet50', 'resnet101') else D
    net = timm.create_model(arch, channels=(4, 4, 8, last), num_classes=0, global_pool='').eval()
    for m in net.modules():
        if isinstance(m, torch.nn.BatchNorm2d):
            m.running_mean.normal_(0, 0.1)
            m.running_var.uniform_(0.5, 2)
    state = {f"Backbone.{PARTS[k.split('.')[0]]}.{k.split('.', 1)[1]}": v for k, v in net.state_dict().items()}
    return net, state


def figures(path=FIGURES[0]):
    f = np.load(path)
    tensor = lambda k: torch.from_numpy(f[k])
    head = {}
    for k in f.files:
        if k.startswith('param.'):
            first, rest = k.removeprefix('param.').split('.', 1)
            head[f'{THEIRS[first]}.{rest}'] = tensor(k)
    return head, tensor, json.loads(str(f['config']))


@pytest.fixture
def case(tmp_path):
    "state dict under the authors' names, the figures, a function that writes a file, keywords that load it"
    head, tensor, cfg = figures()
    text = {'text_encoder.ln_final.weight': torch.ones(4), 'text_encoder.positional_embedding': torch.ones(7, 4)}
    state = resnet(cfg['din'])[1] | head | text

    def write(content, name='ema_best.ckpt'):
        torch.save(content, tmp_path / name)
        return tmp_path / name
    return state, tensor, write, dict(semantics=tensor('semantics'), heads=cfg['h'])


def relative(a, b): return ((a - b).norm() / b.norm()).item()


# ---- the figures

@pytest.fixture(params=FIGURES, ids=lambda p: p.stem)
def loaded(request, tmp_path):
    "A model of the authors' figures, the figures, their configuration, the ResNet"
    head, tensor, cfg = figures(request.param)
    net, backbone = resnet(cfg['din'])
    content = {'epoch': 15, 'score': torch.tensor(66.7), 'model': 'ema', 'state_dict': backbone | head}
    torch.save(content, tmp_path / 'best.ckpt')
    return load_released(tmp_path / 'best.ckpt', tensor('semantics'), heads=cfg['h']), tensor, cfg, net


@torch.no_grad()
def test_scores_are_the_authors(loaded):
    model, tensor, *_ = loaded
    assert relative(model.from_features(tensor('features')), tensor('scores')) <= 1e-5


def test_it_is_an_ordinary_model_in_eval_mode(loaded):
    model = loaded[0]
    assert isinstance(model, CPRFL)
    assert not model.training
    assert model.ignored == 0


def test_settings_are_those_of_the_released_code(loaded):
    model, _, cfg, _ = loaded
    layer, = model.vsi.layers
    assert layer.attention.scale == cfg['dh']**-0.5
    assert layer.attention.to_qkv.weight.shape == (3 * cfg['h'] * cfg['dh'], cfg['d'])
    assert not layer.residual
    assert model.grad_path == 'dual'
    assert model.pi[0].out_features == cfg['expand'] * cfg['d']


@torch.no_grad()
def test_images_are_not_normalised(loaded):
    model, _, cfg, net = loaded
    images = torch.rand(2, 3, 64, 64)
    assert torch.allclose(model.backbone(images), net.forward_features(images), atol=1e-5)
    assert model(images).shape == (2, cfg['C'])


@pytest.mark.parametrize('arch', ['resnet50', 'resnet101'])
@torch.no_grad()
def test_the_blocks_say_how_deep_the_resnet_is(arch, case):
    state, tensor, write, kw = case
    net, backbone = resnet(32, arch)
    file = write({k: v for k, v in state.items() if not k.startswith('Backbone')} | backbone)
    assert describe_released(file, kw['heads'])['backbone'] == arch
    model, x = load_released(file, **kw), torch.rand(1, 3, 64, 64)
    assert torch.allclose(model.backbone(x), net.forward_features(x), atol=1e-5)
    assert relative(model.from_features(tensor('features')), tensor('scores')) <= 1e-5


def test_torchvisions_resnet_has_these_names():
    "The released code took torchvision's ResNet apart: its tensors are the ones that are asked for"
    import torchvision
    with torch.device('meta'): theirs = torchvision.models.resnet101(weights=None).state_dict()
    ours = timm.create_model('resnet101', num_classes=0).state_dict()
    assert {k: v.shape for k, v in theirs.items() if not k.startswith('fc.')} == {k: v.shape for k, v in ours.items()}


def test_two_layers(case):
    state, _, write, kw = case
    second = {k.replace('layers.0', 'layers.1'): v for k, v in state.items() if k.startswith('attention.')}
    model = load_released(write(state | second), **kw)
    assert len(model.vsi.layers) == 2
    assert torch.equal(model.vsi.layers[1].ffn[3].weight, second['attention.layers.1.1.fn.net.3.weight'])


# ---- wrappings

def wrapped(state, how):
    prefixed = {'module.' + k: v for k, v in state.items()}
    return {'plain': state, 'module.': prefixed, 'twice': {'module.' + k: v for k, v in prefixed.items()},
            'state_dict': {'state_dict': prefixed, 'model': 'ema'},
            'model': {'model': state}, 'half': {k: v.half() if v.is_floating_point() else v for k, v in state.items()},
            'fc': {k.replace('fc.0.', 'fc.'): v for k, v in state.items()},
            'no counters': {k: v for k, v in state.items() if not k.endswith('num_batches_tracked')}}[how]


@pytest.mark.parametrize('how', ['plain', 'module.', 'twice', 'state_dict', 'model', 'half', 'fc', 'no counters'])
@torch.no_grad()
def test_wrappings_make_no_difference(how, case):
    state, tensor, write, kw = case
    model = load_released(write(wrapped(state, how)), **kw)
    assert relative(model.from_features(tensor('features')), tensor('scores')) <= (1e-5 if how != 'half' else 0.02)
    assert model.ignored == 2
    assert model.fc.weight.dtype == torch.float32


def test_safetensors(case, tmp_path):
    state, tensor, _, kw = case
    save_file({k: v.contiguous() for k, v in state.items()}, tmp_path / 'model.safetensors')
    model = load_released(tmp_path / 'model.safetensors', **kw)
    assert relative(model.from_features(tensor('features')), tensor('scores')) <= 1e-5


def test_settings_that_are_the_callers(case):
    state, tensor, write, kw = case
    model = load_released(write(state), **kw, normalize=True, dropout=0.3, grad_path='classifier')
    assert model.backbone.normalize
    assert model.vsi.layers[0].ffn[2].p == 0.3
    assert model.grad_path == 'classifier'
    model.train()
    model.from_features(tensor('features')).sum().backward()
    assert model.pi[0].weight.grad.any()


def test_without_a_backbone_the_model_takes_patches(case):
    state, tensor, write, kw = case
    file = write({k: v for k, v in state.items() if not k.startswith('Backbone')})
    with pytest.warns(UserWarning, match='no Backbone.*cached patches only'):
        model = load_released(file, **kw)
    assert relative(model(tensor('features')), tensor('scores')) <= 1e-5


def test_description(case):
    state, _, write, kw = case
    found = describe_released(write(state | {'gate': torch.zeros(1)}), kw['heads'])
    assert found == dict(d=48, heads=4, head_dim=16, ffn_dim=40, depth=1, tau=0.5,
                         backbone='resnet18', m=24, feature_dim=32, tensors=len(state) - 2, text_encoder=2, unknown=1)


# ---- what does not fit

MATRICES = ('fc.0.weight', 'label_emb.0.weight', 'attention.layers.0.0.fn.to_out.0.weight',
            'attention.layers.0.1.fn.net.0.weight')


def refusal(file, **kw):
    "The message with which a file is refused"
    with pytest.raises(ValueError) as e: load_released(file, **kw)
    assert str(file) in str(e.value)
    return str(e.value)


def ours(name): return released._rename(name)


@pytest.mark.parametrize('axis', [0, 1])
def test_a_wrong_shape_is_named(case, axis):
    state, _, write, kw = case
    for name, tensor in state.items():
        if name.startswith('text_encoder') or tensor.ndim <= axis or name in MATRICES: continue
        if name.startswith('Backbone') and not name.endswith(('layer1.0.conv1.weight', 'bn1.weight')): continue
        shape = list(tensor.shape)
        shape[axis] += 3
        message = refusal(write(state | {name: tensor.new_zeros(shape)}), **kw)
        misfit = f'size mismatch for {ours(name)}: copying a param with shape torch.Size({shape})'
        assert misfit in message, name


@pytest.mark.parametrize('name', MATRICES)
def test_a_wrong_matrix_of_sizes_fits_no_other(name, case):
    "The sizes are read from it, so it is the others that do not fit"
    state, _, write, kw = case
    bad = state[name].new_zeros(state[name].shape[0] + 4, state[name].shape[1])
    assert 'size mismatch for' in refusal(write(state | {name: bad}), **kw)


@pytest.mark.parametrize('name', ['Backbone.7.1.bn1.bias', 'Backbone.0.weight', 'Backbone.6.0.downsample.0.weight'])
def test_a_wrong_shape_in_the_backbone(name, case):
    state, _, write, kw = case
    bad = state[name].new_zeros(state[name].shape[0] + 1, *state[name].shape[1:])
    message = refusal(write(state | {name: bad}), **kw)
    assert f'size mismatch for {ours(name)}' in message
    assert message.count('size mismatch') == 1


def test_each_missing_tensor_is_named(case):
    state, _, write, kw = case
    for name in state:
        if name in MATRICES or name.startswith('text_encoder') or name.endswith('num_batches_tracked'): continue
        if name.startswith('Backbone') and not name.endswith('bn1.weight'): continue
        message = refusal(write({k: v for k, v in state.items() if k != name}), **kw)
        assert f'Missing key(s) in state_dict: "{ours(name)}".' in message, name
        assert 'Unexpected' not in message, name


@pytest.mark.parametrize('name', MATRICES)
def test_without_a_matrix_of_sizes_it_is_no_checkpoint(name, case):
    state, _, write, kw = case
    assert 'is not a CPRFL checkpoint' in refusal(write({k: v for k, v in state.items() if k != name}), **kw)


def test_a_stage_without_its_first_convolution(case):
    state, _, write, kw = case
    file = write({k: v for k, v in state.items() if k != 'Backbone.5.0.conv1.weight'})
    with pytest.raises(ValueError, match='Backbone: missing layer2.0.conv1.weight'): load_released(file, **kw)


def test_everything_at_once(case):
    state, _, write, kw = case
    gone = ('label_emb.3.bias', 'attention.layers.0.0.norm.weight', 'Backbone.1.running_var')
    bad = {k: v for k, v in state.items() if k not in gone}
    bad |= {'fc.0.bias': torch.zeros(5), 'Backbone.0.weight': torch.zeros(1)}
    bad |= {'label_emb.4.weight': torch.zeros(2), 'gate': torch.zeros(())}
    message = refusal(write(bad), **kw)
    for name in (*gone, 'fc.0.bias', 'Backbone.0.weight', 'label_emb.4.weight', 'gate'):
        assert ours(name) in message, name


def test_a_long_list_of_misfits_is_cut(case):
    state, _, write, kw = case
    bad = {k: v[:-1] if k.startswith('Backbone') and v.ndim == 1 else v for k, v in state.items()}
    assert len(refusal(write(bad), **kw).splitlines()) <= 21


def test_another_variant_of_their_code_is_refused(case):
    "Its two-layer output projection has no counterpart here"
    state, _, write, kw = case
    neck = {'weight': torch.zeros(48, 128), 'bias': torch.zeros(48)}
    neck = {f'attention.layers.0.0.fn.to_out.3.{k}': v for k, v in neck.items()}
    assert 'Unexpected key(s) in state_dict: "attention.layers.0.0.fn.to_out.3' in refusal(write(state | neck), **kw)


def test_files_of_something_else(case):
    _, _, write, kw = case
    message = refusal(write(resnet(32)[0].state_dict()), **kw)
    assert 'is not a CPRFL checkpoint: expected the matrices fc.weight' in message
    assert 'found conv1.weight' in message


def test_another_resnet_says_its_blocks(case):
    state, _, write, kw = case
    odd = write({k: v for k, v in state.items() if not k.startswith('Backbone.6.1.')})
    with pytest.raises(ValueError, match='expected the blocks of resnet18.*, got 2, 2, 1, 2 basic blocks'):
        load_released(odd, **kw)


def test_a_missing_file(case):
    with pytest.raises(FileNotFoundError, match='no such file'): load_released('nowhere.ckpt', **case[3])


@pytest.mark.parametrize('heads', [5, 0])
def test_heads_must_share_the_width(case, heads):
    state, _, write, kw = case
    message = refusal(write(state), **kw | {'heads': heads})
    assert 'heads: expected a divisor of 64' in message
    assert f'got {heads}' in message


@pytest.mark.parametrize('writer', ['torch', 'pickle'])
def test_a_file_with_code_is_refused_and_not_run(writer, case, tmp_path):
    state, _, write, kw = case
    mark = tmp_path / 'mark'
    content = {'state_dict': state, 'score': TouchesAFile(mark)}
    if writer == 'torch': file = write(content)
    else: (file := tmp_path / 'code.ckpt').write_bytes(pickle.dumps(content, protocol=2))
    with pytest.raises(ValueError, match='a file that contains code is refused'): load_released(file, **kw)
    assert not mark.exists()


# ---- semantics

@pytest.mark.parametrize('wrong, words', [
    (dict(), "holds no embedded class names. Pass semantics=category_semantics(classes, 'clip:RN50/openai')"),
    (dict(semantics=torch.randn(7, 30)), 'semantics: expected [C, 24], the width in'),
    (dict(semantics=torch.randn(7, 24), classes=['a', 'b']), 'expected one row for each of 2 classes, got [7, 24]'),
    (dict(classes=['a', 'b']), 'no complete text encoder under text_encoder.* (2 tensors)')])
def test_semantics_that_do_not_fit(case, wrong, words):
    state, _, write, _ = case
    with pytest.raises(ValueError) as e: load_released(write(state), heads=4, **wrong)
    assert words in str(e.value)


@pytest.fixture
def with_text(case):
    "A file with a whole text encoder, that encoder, the class names, their semantics, keywords"
    open_clip = pytest.importorskip('open_clip', reason='it builds the text tower')
    from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg
    state, _, write, kw = case
    torch.manual_seed(0)
    vision = CLIPVisionCfg(layers=[1, 1, 1, 1], width=8, head_width=32, image_size=32)
    clip = CLIP(24, vision, CLIPTextCfg(context_length=20, width=128, heads=2, layers=2), quick_gelu=True).eval()
    text = {k: v for k, v in clip.state_dict().items() if not k.startswith(('visual.', 'logit'))}
    state = {k: v for k, v in state.items() if not k.startswith('text_encoder')}
    state |= {f'text_encoder.{k}': v for k, v in text.items()}
    file = write({'state_dict': {f'module.{k}': v for k, v in state.items()}})
    sentences = ['a photo of a traffic light.', 'a photo of a dog.']
    with torch.no_grad(): want = clip.encode_text(open_clip.get_tokenizer('RN50')(sentences, 20))
    return file, ['traffic_light', 'dog'], want, len(text), kw


def test_semantics_by_the_text_encoder_in_the_file(with_text):
    file, classes, want, *_ = with_text
    W = released_semantics(file, classes)
    assert W.shape == (2, 24)
    assert torch.allclose(W, want, atol=1e-5)
    assert not torch.allclose(released_semantics(file, ['dog'], 'a drawing of a {}.'), W[1:], atol=1e-3)


def test_class_names_are_embedded_by_the_file(with_text):
    file, classes, want, tensors, _ = with_text
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        model = load_released(file, classes=classes, heads=4)
    assert torch.allclose(model.semantics, want, atol=1e-5)
    assert model.ignored == tensors


def test_given_semantics_come_before_the_encoder(with_text):
    file, _, _, _, kw = with_text
    assert torch.equal(load_released(file, **kw).semantics, kw['semantics'])
