"The authors' checkpoints: their figures through the importer, its prefixes, and files that do not fit."
import json
import pickle
import warnings

import numpy as np
import pytest
import timm
import torch
from helpers import FIXTURES
from safetensors.torch import save_file

from cprfl.model.cprfl import CPRFL
from cprfl.model.released import authors_semantics, describe_authors_checkpoint, load_authors_checkpoint

FIGURES = sorted(FIXTURES.glob('vsi_*_dual.npz'))
THEIRS = {'fc': 'fc.0', 'pi': 'label_emb', 'encoder': 'attention'}  # the figures' names, the checkpoints'
PARTS = {'conv1': '0', 'bn1': '1', 'layer1': '4', 'layer2': '5', 'layer3': '6', 'layer4': '7'}


def resnet(D, arch='resnet18', seed=0):
    "A narrow ResNet with D channels at its end, and its tensors as the released code calls them"
    torch.manual_seed(seed)
    last = D // 4 if arch in ('resnet50', 'resnet101') else D
    net = timm.create_model(arch, channels=(4, 4, 8, last), num_classes=0, global_pool='').eval()
    for m in net.modules():
        if isinstance(m, torch.nn.BatchNorm2d): m.running_mean.normal_(0, 0.1); m.running_var.uniform_(0.5, 2)
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
    state = resnet(cfg['din'])[1] | head | {'text_encoder.ln_final.weight': torch.ones(4), 'text_encoder.positional_embedding': torch.ones(7, 4)}

    def write(content, name='ema_best.ckpt'):
        torch.save(content, tmp_path / name)
        return tmp_path / name
    return state, tensor, write, dict(semantics=tensor('semantics'), heads=cfg['h'])


def relative(a, b): return ((a - b).norm() / b.norm()).item()


# ---- the figures

@pytest.mark.parametrize('path', FIGURES, ids=lambda p: p.stem)
@torch.no_grad()
def test_scores_are_the_authors(path, tmp_path):
    head, tensor, cfg = figures(path)
    net, backbone = resnet(cfg['din'])
    torch.save({'epoch': 15, 'score': torch.tensor(66.7), 'model': 'ema', 'state_dict': backbone | head}, tmp_path / 'best.ckpt')
    model = load_authors_checkpoint(tmp_path / 'best.ckpt', tensor('semantics'), heads=cfg['h'])
    assert isinstance(model, CPRFL) and not model.training and model.ignored == 0
    assert relative(model.from_features(tensor('features')), tensor('scores')) <= 1e-5
    attention = model.vsi.layers[0].attention
    assert attention.scale == cfg['dh']**-0.5 and not model.vsi.layers[0].residual and model.grad_path == 'dual'
    assert attention.to_qkv.weight.shape == (3 * cfg['h'] * cfg['dh'], cfg['d']) and model.pi[0].out_features == cfg['expand'] * cfg['d']
    images = torch.rand(2, 3, 64, 64)
    assert torch.allclose(model.backbone(images), net.forward_features(images), atol=1e-5), 'images are not normalised'
    assert model(images).shape == (2, cfg['C'])


@pytest.mark.parametrize('arch', ['resnet50', 'resnet101'])
@torch.no_grad()
def test_depth_of_the_resnet_is_told_by_its_blocks(arch, case):
    state, tensor, write, kw = case
    net, backbone = resnet(32, arch)
    file = write({k: v for k, v in state.items() if not k.startswith('Backbone')} | backbone)
    assert describe_authors_checkpoint(file, kw['heads'])['backbone'] == arch
    model, x = load_authors_checkpoint(file, **kw), torch.rand(1, 3, 64, 64)
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
    model = load_authors_checkpoint(write(state | second), **kw)
    assert len(model.vsi.layers) == 2
    assert torch.equal(model.vsi.layers[1].ffn[3].weight, second['attention.layers.1.1.fn.net.3.weight'])


# ---- wrappings

def wrapped(state, how):
    prefixed = {'module.' + k: v for k, v in state.items()}
    return {'plain': state, 'module.': prefixed, 'twice': {'module.' + k: v for k, v in prefixed.items()}, 'state_dict': {'state_dict': prefixed, 'model': 'ema'},
            'model': {'model': state}, 'half': {k: v.half() if v.is_floating_point() else v for k, v in state.items()},
            'fc': {k.replace('fc.0.', 'fc.'): v for k, v in state.items()},
            'no counters': {k: v for k, v in state.items() if not k.endswith('num_batches_tracked')}}[how]


@pytest.mark.parametrize('how', ['plain', 'module.', 'twice', 'state_dict', 'model', 'half', 'fc', 'no counters'])
@torch.no_grad()
def test_wrappings_make_no_difference(how, case):
    state, tensor, write, kw = case
    model = load_authors_checkpoint(write(wrapped(state, how)), **kw)
    assert relative(model.from_features(tensor('features')), tensor('scores')) <= (1e-5 if how != 'half' else 0.02)
    assert model.ignored == 2 and model.fc.weight.dtype == torch.float32


def test_safetensors(case, tmp_path):
    state, tensor, _, kw = case
    save_file({k: v.contiguous() for k, v in state.items()}, tmp_path / 'model.safetensors')
    model = load_authors_checkpoint(tmp_path / 'model.safetensors', **kw)
    assert relative(model.from_features(tensor('features')), tensor('scores')) <= 1e-5


def test_settings_that_are_the_callers(case):
    state, tensor, write, kw = case
    model = load_authors_checkpoint(write(state), **kw, normalize=True, dropout=0.3, grad_path='classifier')
    assert model.backbone.normalize and model.vsi.layers[0].ffn[2].p == 0.3 and model.grad_path == 'classifier'
    model.train()
    model.from_features(tensor('features')).sum().backward()
    assert model.pi[0].weight.grad.any()


def test_without_a_backbone_the_model_takes_patches(case):
    state, tensor, write, kw = case
    file = write({k: v for k, v in state.items() if not k.startswith('Backbone')})
    with pytest.warns(UserWarning, match='no Backbone.*cached patches only'): model = load_authors_checkpoint(file, **kw)
    assert relative(model(tensor('features')), tensor('scores')) <= 1e-5


def test_description(case):
    state, _, write, kw = case
    found = describe_authors_checkpoint(write(state | {'gate': torch.zeros(1)}), kw['heads'])
    assert found == dict(d=48, heads=4, head_dim=16, ffn_dim=40, depth=1, tau=0.5, backbone='resnet18', m=24, feature_dim=32,
                         tensors=len(state) - 2, text_encoder=2, unknown=1)


# ---- what does not fit

def test_a_wrong_shape_is_named_alone(case):
    state, _, write, kw = case
    for name, tensor in state.items():
        if name.startswith(('Backbone', 'text_encoder')): continue
        bad = tensor.new_zeros(tensor.shape[0] + 3, *tensor.shape[1:])
        with pytest.raises(ValueError) as e: load_authors_checkpoint(write(state | {name: bad}), **kw)
        assert f'{name}: expected {list(tensor.shape)}, the file has {list(bad.shape)}' in str(e.value), name
        assert '(1 of another shape, 0 missing, 0 unknown)' in str(e.value), name


@pytest.mark.parametrize('name', ['Backbone.4.0.conv1.weight', 'Backbone.7.1.bn1.bias', 'Backbone.0.weight', 'Backbone.6.0.downsample.0.weight'])
def test_a_wrong_shape_in_the_backbone(name, case):
    state, _, write, kw = case
    bad = state[name].new_zeros(state[name].shape[0] + 1, *state[name].shape[1:])
    with pytest.raises(ValueError, match=rf'\(1 of another shape, 0 missing, 0 unknown\):\n  {name}: expected'): load_authors_checkpoint(write(state | {name: bad}), **kw)


def test_each_missing_tensor_is_named(case):
    state, _, write, kw = case
    for name in state:
        if name.startswith('text_encoder') or name.endswith('num_batches_tracked') or (name.startswith('Backbone') and not name.endswith('bn1.weight')): continue
        with pytest.raises(ValueError) as e: load_authors_checkpoint(write({k: v for k, v in state.items() if k != name}), **kw)
        assert f'(0 of another shape, 1 missing, 0 unknown):\n  missing: {name} {list(state[name].shape)}' in str(e.value), name


def test_everything_at_once(case):
    state, _, write, kw = case
    bad = {k: v for k, v in state.items() if k not in ('label_emb.3.bias', 'attention.layers.0.0.norm.weight', 'Backbone.1.running_var')}
    bad |= {'fc.0.bias': torch.zeros(5), 'Backbone.0.weight': torch.zeros(1), 'label_emb.4.weight': torch.zeros(2), 'gate': torch.zeros(())}
    with pytest.raises(ValueError) as e: load_authors_checkpoint(write(bad), **kw)
    message = str(e.value)
    assert '(2 of another shape, 3 missing, 2 unknown)' in message
    for line in ('fc.0.bias: expected [48], the file has [5]', 'Backbone.0.weight: expected [64, 3, 7, 7], the file has [1]', 'missing: label_emb.3.bias [48]',
                 'missing: attention.layers.0.0.norm.weight [48]', 'missing: Backbone.1.running_var [64]', 'unknown: label_emb.4.weight [2]', 'unknown: gate []'):
        assert f'\n  {line}' in message, line


def test_another_variant_of_their_code_is_refused_not_bent(case):
    "Its two-layer output projection has no counterpart here"
    state, _, write, kw = case
    neck = {'attention.layers.0.0.fn.to_out.0.weight': torch.zeros(128, 64), 'attention.layers.0.0.fn.to_out.0.bias': torch.zeros(128),
            'attention.layers.0.0.fn.to_out.3.weight': torch.zeros(48, 128), 'attention.layers.0.0.fn.to_out.3.bias': torch.zeros(48)}
    with pytest.raises(ValueError, match=r'2 of another shape, 0 missing, 2 unknown'): load_authors_checkpoint(write(state | neck), **kw)


def test_files_of_something_else(case):
    state, _, write, kw = case
    with pytest.raises(ValueError, match='is no CPRFL checkpoint: expected tensors of fc, label_emb and attention, found conv1.weight'):
        load_authors_checkpoint(write(resnet(32)[0].state_dict()), **kw)
    odd = {k: v for k, v in state.items() if not k.startswith('Backbone.6.1.')}
    with pytest.raises(ValueError, match='expected the blocks of resnet18.*; the file has 2, 2, 1, 2 basic blocks'): load_authors_checkpoint(write(odd), **kw)
    with pytest.raises(FileNotFoundError, match='no such file'): load_authors_checkpoint('nowhere.ckpt', **kw)


def test_heads_must_share_the_width(case):
    state, _, write, kw = case
    with pytest.raises(ValueError, match='64 wide there, 5 heads cannot share it'): load_authors_checkpoint(write(state), kw['semantics'], heads=5)
    with pytest.raises(ValueError, match='0 heads cannot'): load_authors_checkpoint(write(state), kw['semantics'], heads=0)


class Mark:
    "A pickle that would touch a file when it is read"
    def __init__(self, path): self.path = path
    def __reduce__(self): return open, (str(self.path), 'w')


@pytest.mark.parametrize('writer', ['torch', 'pickle'])
def test_a_file_with_code_is_refused_and_the_code_not_run(writer, case, tmp_path):
    state, _, write, kw = case
    content, mark = {'state_dict': state, 'score': Mark(tmp_path / 'mark')}, tmp_path / 'mark'
    if writer == 'torch': file = write(content)
    else: (file := tmp_path / 'code.ckpt').write_bytes(pickle.dumps(content, protocol=2))
    with pytest.raises(ValueError, match='files that bring code along are refused'): load_authors_checkpoint(file, **kw)
    assert not mark.exists()


# ---- semantics

def test_semantics_are_asked_for(case):
    state, _, write, kw = case
    with pytest.raises(ValueError, match=r"holds no embedded class names. Pass semantics=category_semantics\(classes, 'clip:RN50/openai'\)"):
        load_authors_checkpoint(write(state), heads=4)
    with pytest.raises(ValueError, match=r'label_emb.0.weight: expected \[24, 30\], the file has \[24, 24\]\n  \(label_emb.0 takes the semantics'):
        load_authors_checkpoint(write(state), torch.randn(7, 30), heads=4)
    with pytest.raises(ValueError, match=r'a row for each of 2 classes, got \[7, 24\]'): load_authors_checkpoint(write(state), **kw, classes=['a', 'b'])
    with pytest.raises(ValueError, match=r'no complete text encoder under text_encoder.\* \(2 tensors\); give the semantics'):
        load_authors_checkpoint(write(state), classes=['a', 'b'], heads=4)


@torch.no_grad()
def test_semantics_by_the_text_encoder_in_the_file(case):
    open_clip = pytest.importorskip('open_clip', reason='it builds the text tower')
    from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg
    state, tensor, write, kw = case
    torch.manual_seed(0)
    clip = CLIP(24, CLIPVisionCfg(layers=[1, 1, 1, 1], width=8, head_width=32, image_size=32),
                CLIPTextCfg(context_length=20, width=128, heads=2, layers=2), quick_gelu=True).eval()
    text = {k: v for k, v in clip.state_dict().items() if not k.startswith(('visual.', 'logit'))}
    state = {k: v for k, v in state.items() if not k.startswith('text_encoder')} | {f'text_encoder.{k}': v for k, v in text.items()}
    file = write({'state_dict': {f'module.{k}': v for k, v in state.items()}})
    W = authors_semantics(file, ['traffic_light', 'dog'])
    want = clip.encode_text(open_clip.get_tokenizer('RN50')(['a photo of a traffic light.', 'a photo of a dog.'], 20))
    assert W.shape == (2, 24) and torch.allclose(W, want, atol=1e-5)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        model = load_authors_checkpoint(file, classes=['traffic_light', 'dog'], heads=4)
    assert torch.allclose(model.semantics, want, atol=1e-5) and model.ignored == len(text)
    assert torch.equal(load_authors_checkpoint(file, kw['semantics'], heads=4).semantics, kw['semantics'])
    assert not torch.allclose(authors_semantics(file, ['dog'], 'a drawing of a {}.'), W[1:], atol=1e-3)
