"Backbones by name, weights from files, and files that must not be trusted"
import pickle

import pytest
import timm
import torch
import torchvision
from helpers import TouchesAFile
from packaging.version import Version
from safetensors.torch import save_file
from torch import nn

from cprfl.look.attention import patch_grid
from cprfl.model.backbones import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    Backbone,
    build_backbone,
    load_state,
    preferred_memory_format,
    to_patches,
)
from cprfl.model.semantics import load_clip

TINY = dict(channels=(8, 8, 16, 16))  # resnet10t with 42,000 weights


def images(B=2, size=64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(256, (B, 3, size, size), generator=generator, dtype=torch.uint8)


SINCE = dict.fromkeys(('crossvit_9_240', 'coat_lite_tiny', 'test_maxvit'), '1.0.31') # name -> version of timm


def needs(name):
    "Skip a network that the installed timm does not have, or whose features it does not give"
    since = SINCE.get(name.removeprefix('timm:'), '0')
    if Version(timm.__version__) < Version(since): pytest.skip(f'{name} needs timm {since}')


def built(name, seed=0, **kw):
    needs(name)
    torch.manual_seed(seed)
    return build_backbone(name, **kw).eval()


# ---- from a map to patches

def test_patches_are_in_reading_order():
    grid = torch.arange(2 * 5 * 3 * 4.).view(2, 5, 3, 4)
    patches = to_patches(grid)
    assert patches.shape == (2, 12, 5)
    assert torch.equal(patches[1, 1 * 4 + 2], grid[1, :, 1, 2])
    assert torch.equal(to_patches(patches), patches)
    with pytest.raises(ValueError, match=r'got \[2, 5\]'): to_patches(torch.zeros(2, 5))


# ---- timm and torchvision

@torch.no_grad()
def test_timm_and_torchvision_agree_on_the_same_weights(tmp_path):
    torch.manual_seed(0)
    source = torchvision.models.resnet18(weights=None)
    for m in source.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.running_mean.normal_(0, 0.1)
            m.running_var.uniform_(0.5, 2)
            m.weight.uniform_(0.5, 1.5)
    torch.save(source.state_dict(), tmp_path / 'resnet18.pth')
    a, b = (build_backbone(n, weights=tmp_path / 'resnet18.pth').eval() for n in ('resnet18', 'torchvision:resnet18'))
    x = images()
    assert a.num_features == b.num_features == 512
    assert a(x).shape == (2, 512, 2, 2)
    assert torch.allclose(a(x), b(x), atol=1e-5)
    mean, std = (torch.tensor(t).view(3, 1, 1) for t in (IMAGENET_MEAN, IMAGENET_STD))
    logits = source.eval()((x.float() / 255 - mean) / std)
    assert torch.allclose(source.fc(a.patches(x).mean(1)), logits, atol=1e-5)


@torch.no_grad()
def test_bytes_and_floats_are_the_same_image():
    net, x = built('resnet10t', **TINY), images()
    assert torch.equal(net(x), net(x.float() / 255))


@pytest.mark.parametrize('name, kw, device, last', [
    ('resnet18', {}, 'cpu', True), ('resnet10t', TINY, 'cpu', False), ('shapes', {}, 'cpu', False),
    ('shapes', {}, 'cuda', True), ('resnet18', {}, 'mps', False)])
def test_channels_last_on_gpus_and_for_full_vectors(name, kw, device, last):
    want = torch.channels_last if last else torch.contiguous_format
    assert preferred_memory_format(build_backbone(name, **kw), device) is want


@torch.no_grad()
def test_normalisation_can_be_left_out():
    net, raw = built('resnet10t', **TINY), built('resnet10t', normalize=False, **TINY)
    x = images().float() / 255
    mean, std = (torch.tensor(t).view(3, 1, 1) for t in (IMAGENET_MEAN, IMAGENET_STD))
    assert not torch.allclose(net(x), raw(x))
    assert torch.allclose(net(x), raw((x - mean) / std), atol=1e-5)


def test_mean_and_std_are_no_weights():
    assert not {'mean', 'std'} & set(built('resnet10t', **TINY).state_dict())


@torch.no_grad()
def test_keywords_reach_timm():
    assert built('resnet10t', output_stride=8, **TINY)(images()).shape == (2, 16, 8, 8)


@torch.no_grad()
@pytest.mark.parametrize('name, tokens, width', [('test_vit', 100, 64), ('timm:test_vit2', 100, 64)])
def test_vit_gives_patch_tokens_without_class_and_registers(name, tokens, width):
    net, x = built(name), images(size=160)
    out, full = net(x), net.net.net.forward_features((x / 255. - net.mean) / net.std)
    prefix = net.net.net.num_prefix_tokens
    assert out.shape == (2, tokens, width) == net.patches(x).shape
    assert net.num_features == width
    assert prefix > 0
    assert full.shape[1] == tokens + prefix
    assert torch.equal(out, full[:, prefix:])


# ---- timm's families: one patch for each place

FAMILIES = { # a small model of each layout: tokens in front of the patches, channels last, something else
    'test_resnet': 'map', 'test_efficientnet': 'map', 'test_convnext': 'map',
    'mobilenetv3_small_050': 'map', 'fastvit_t8': 'map', 'swiftformer_xs': 'map',
    'swin_tiny_patch4_window7_224': 'channels last', 'swinv2_cr_tiny_ns_224': 'map', 'test_mambaout': 'channels last',
    'hiera_tiny_224': 'patches',
    'vit_medium_patch16_gap_240': 'patches', 'test_vit': 'tokens', 'test_vit3': 'tokens',
    'deit_tiny_distilled_patch16_224': 'tokens', 'eva02_tiny_patch14_224': 'tokens', 'xcit_nano_12_p16_224': 'tokens',
    'cait_xxs24_224': 'tokens', 'volo_d1_224': 'other', 'pit_ti_224': 'other', 'crossvit_9_240': 'other',
    'coat_lite_tiny': 'other'}
SHALLOW = dict(depths=(1, 1, 1, 1), embed_dim=24)
SMALLER = {
    'vit_medium_patch16_gap_240': dict(depth=2), 'deit_tiny_distilled_patch16_224': dict(depth=2),
    'eva02_tiny_patch14_224': dict(depth=2), 'xcit_nano_12_p16_224': dict(depth=2), 'cait_xxs24_224': dict(depth=2),
    'swin_tiny_patch4_window7_224': SHALLOW, 'swinv2_cr_tiny_ns_224': SHALLOW,
    'hiera_tiny_224': dict(stages=(1, 1, 1, 1))}
PLACES = (0.2, 0.7), (0.75, 0.75), (0.6, 0.2) # row and column in 0..1


def _with_noise_at(place, grey):
    "The image with a square of noise around a place"
    image, (H, W) = grey.clone(), grey.shape[-2:]
    y, x = int(H * place[0]), int(W * place[1])
    area = image[:, :, max(y - 12, 0):y + 12, max(x - 12, 0):x + 12]
    area.copy_(torch.rand(area.shape, generator=torch.Generator().manual_seed(0)))
    return image


@torch.no_grad()
@pytest.mark.parametrize('name', FAMILIES)
def test_each_patch_reacts_most_to_its_own_place(name):
    net = built(name, **SMALLER.get(name, {}))
    size = timm.get_pretrained_cfg(name).input_size[1:]
    grey = torch.full((1, 3, *size), 0.5)
    plain = net.patches(grey)
    change = torch.cat([(net.patches(_with_noise_at(p, grey)) - plain).norm(dim=-1) for p in PLACES])
    change = change / change.mean(1, keepdim=True)
    h, w = patch_grid(plain.shape[1], size)
    nearest = [int(row * h) * w + int(column * w) for row, column in PLACES]
    assert change[:, nearest].argmax(0).tolist() == [0, 1, 2]


@torch.no_grad()
@pytest.mark.parametrize('name', ['levit_128s', 'test_maxvit', 'mixer_s32_224',
                                  'swin_tiny_patch4_window7_224', 'xcit_nano_12_p16_224', 'cait_xxs24_224',
                                  'deit_tiny_distilled_patch16_224'])
def test_patches_are_in_the_order_of_timm(name):
    "Its `forward_intermediates` says where each patch is"
    net = built(name, **SMALLER.get(name, {}))
    x = torch.rand(1, 3, *timm.get_pretrained_cfg(name).input_size[1:])
    timms, = net.net.net.forward_intermediates(x, indices=1, norm=True, intermediates_only=True)
    assert torch.allclose(to_patches(net.net(x)), to_patches(timms), atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize('name, grid', [
    ('swin_tiny_patch4_window7_224', (7, 7)), ('pit_ti_224', (7, 7))])
def test_other_layouts_become_maps(name, grid):
    net = built(name, **SMALLER.get(name, {}))
    size = timm.get_pretrained_cfg(name).input_size[1]
    assert net(images(1, size)).shape == (1, net.num_features, *grid)


def test_a_trial_leaves_no_trace():
    "Modes, random numbers and batch statistics are those without it"
    torch.manual_seed(0)
    plain = timm.create_model('resnet10t', num_classes=0, **TINY)
    after = torch.rand(3)
    net = built('resnet10t', **TINY)
    assert torch.equal(torch.rand(3), after)
    assert all(m.training for m in build_backbone('resnet10t', **TINY).modules())
    assert all(torch.equal(v, plain.state_dict()[k]) for k, v in net.net.net.state_dict().items())


def test_a_model_that_cannot_serve_is_refused_in_a_sentence(monkeypatch):
    for features in (lambda x: [x, x], lambda x: x.mean((2, 3)), lambda x: x.flatten(2)[..., :5].transpose(1, 2)):
        monkeypatch.setattr(timm.models.ResNet, 'forward_features', lambda self, x, f=features: f(x))
        monkeypatch.setattr(timm.models.ResNet, 'forward_intermediates', lambda self, x, **kw: [f(x) for f in ()])
        with pytest.raises(ValueError, match='backbone: resnet10t cannot be used with .*expected features'):
            build_backbone('resnet10t', **TINY)


# ---- the size of the images

@torch.no_grad()
@pytest.mark.parametrize('name, kw, size, shape', [
    ('vit_tiny_patch16_224', dict(depth=1), 96, (1, 36, 192)),
    ('vit_small_patch14_reg4_dinov2', dict(depth=1), 56, (1, 16, 384)),
    ('deit_tiny_distilled_patch16_224', dict(depth=1), 64, (1, 16, 192)),
    ('swin_tiny_patch4_window7_224', SHALLOW, 128, (1, 192, 4, 4)),
    ('beit_base_patch16_224', dict(depth=1), 64, (1, 16, 768)),
    ('resnet10t', TINY, 80, (1, 16, 3, 3))])
def test_a_model_is_built_for_the_size_of_the_images(name, kw, size, shape):
    net = built(name, image_size=size, **kw)
    assert net(images(1, size)).shape == shape


@torch.no_grad()
@pytest.mark.parametrize('name', ['vit_tiny_patch16_224', 'swin_tiny_patch4_window7_224'])
def test_another_size_than_built_for_is_refused(name):
    kw = SMALLER.get(name, dict(depth=1))
    with pytest.raises(ValueError, match='expected images of 224 x 224 pixels, got 96 x 96; .*image_size=96'):
        built(name, **kw)(images(1, 96))


def test_a_size_that_no_way_allows_names_the_native_one():
    needs('test_maxvit')
    with pytest.raises(ValueError, match='test_maxvit cannot be used with images of 7 x 7 .*made for 160 x 160'):
        build_backbone('test_maxvit', image_size=7)


def test_a_resnet_names_the_size_that_is_too_small():
    with pytest.raises(ValueError, match='shapes cannot be used with images of 16 x 16 pixels'):
        build_backbone('shapes', image_size=16)


@pytest.mark.parametrize('name, kw, words', [
    ('resnet18', dict(output_stride=7), 'resnet18 with output_stride=7: AssertionError'),
    ('torchvision:resnet18', dict(width=7), "with width=7: .*unexpected keyword argument 'width'")])
def test_a_wrong_keyword_is_named_with_its_value(name, kw, words):
    with pytest.raises(ValueError, match=words): build_backbone(name, **kw)


@torch.no_grad()
def test_weights_from_a_file_fit_at_another_size(tmp_path):
    native = built('vit_tiny_patch16_224', depth=1)
    save_file(native.net.net.state_dict(), tmp_path / 'vit.safetensors')
    net = build_backbone('vit_tiny_patch16_224', weights=tmp_path / 'vit.safetensors', image_size=64, depth=1).eval()
    assert net(images(1, 64)).shape == (1, 16, 192)
    assert torch.equal(net.net.net.pos_embed, native.net.net.pos_embed)


def test_a_classifier_of_any_name_in_a_file_is_left_out(tmp_path):
    whole = timm.create_model('deit_tiny_distilled_patch16_224', depth=1)
    save_file(whole.state_dict(), tmp_path / 'deit.safetensors')
    net = build_backbone('deit_tiny_distilled_patch16_224', weights=tmp_path / 'deit.safetensors', depth=1).net.net
    assert torch.equal(net.pos_embed, whole.pos_embed)


def test_a_model_built_twice_has_the_weights_of_one_built_once():
    torch.manual_seed(0)
    once = timm.create_model('deit_tiny_distilled_patch16_224', depth=1, num_classes=0)
    net = built('deit_tiny_distilled_patch16_224', depth=1).net.net
    assert torch.equal(net.pos_embed, once.pos_embed)


def test_cam_layer_is_known_and_not_registered_twice():
    for name in ('resnet18', 'torchvision:resnet18'):
        net = build_backbone(name)
        assert net.cam_layer[0] in set(net.modules())
        assert not [k for k in net.state_dict() if k.startswith('cam_layer')]
    own = nn.Conv2d(3, 4, 1)
    assert Backbone(own, 4).cam_layer == [own]


# ---- weights from files

@pytest.mark.parametrize('kind', ['plain.pth', 'nested.pth', 'ddp.pth', 'half.pth', 'plain.safetensors'])
def test_weights_in_every_usual_form(tmp_path, kind):
    source, file = timm.create_model('resnet10t', **TINY), tmp_path / kind
    state = source.state_dict()
    match kind:
        case 'plain.safetensors': save_file(state, file)
        case 'nested.pth': torch.save(dict(epoch=3, state_dict=state), file)
        case 'ddp.pth': torch.save(dict(model={f'module.{k}': v for k, v in state.items()}), file)
        case 'half.pth': torch.save({k: v.half() if v.is_floating_point() else v for k, v in state.items()}, file)
        case _: torch.save(state, file)
    net = build_backbone('resnet10t', weights=file, **TINY).net.net
    for k, v in net.state_dict().items():
        assert v.dtype == state[k].dtype, k
        assert torch.allclose(v, state[k], atol=1e-3 if 'half' in kind else 0), k


def test_weights_that_do_not_fit_say_so(tmp_path):
    source = timm.create_model('resnet10t', **TINY).state_dict()
    source['stem.weight'] = source.pop('conv1.0.weight')
    torch.save(source, tmp_path / 'renamed.pth')
    with pytest.raises(ValueError) as e: build_backbone('resnet10t', weights=tmp_path / 'renamed.pth', **TINY)
    assert 'renamed.pth does not fit this ResNet' in str(e.value)
    assert 'Missing key(s) in state_dict: "conv1.0.weight"' in str(e.value)
    assert 'Unexpected key(s) in state_dict: "stem.weight"' in str(e.value)


def test_weights_of_another_width_say_so(tmp_path):
    torch.save(timm.create_model('resnet10t', **TINY).state_dict(), tmp_path / 'other.pth')
    with pytest.raises(ValueError, match='size mismatch for layer1.0.conv1.weight: .* shape .*8, 64, 3, 3'):
        build_backbone('resnet10t', weights=tmp_path / 'other.pth', channels=(16, 8, 16, 16))


def test_missing_broken_and_strange_weight_files_say_so(tmp_path):
    with pytest.raises(FileNotFoundError, match='no such file'):
        build_backbone('resnet10t', weights=tmp_path / 'none.pth')
    for name in ('noise.pth', 'noise.safetensors'):
        (tmp_path / name).write_bytes(b'this is no checkpoint, not at all')
        with pytest.raises(ValueError, match=f'weights: .*{name}'): load_state(tmp_path / name)
    for i, strange in enumerate((torch.zeros(3), [1, 2], {'epoch': 3})):
        torch.save(strange, tmp_path / f'{i}.pth')
        with pytest.raises(ValueError, match='expected a state dict'): load_state(tmp_path / f'{i}.pth')


@pytest.mark.parametrize('name', ['evil.pth', 'evil.bin', 'raw.pkl'])
def test_a_pickle_with_code_is_refused_and_does_not_run(tmp_path, name):
    file, mark = tmp_path / name, tmp_path / 'it_ran'
    evil = {'conv1.weight': torch.zeros(1), 'evil': TouchesAFile(mark)}
    if name == 'raw.pkl': file.write_bytes(pickle.dumps({'evil': TouchesAFile(mark)}, protocol=2))
    else: torch.save(evil, file)
    with pytest.raises(ValueError, match='weights: ') as e: build_backbone('resnet10t', weights=file)
    assert not mark.exists()
    assert isinstance(e.value.__cause__, pickle.UnpicklingError)
    assert pickle.loads(pickle.dumps(TouchesAFile(mark)))  # noqa: S301 - the test's own trap
    assert mark.exists(), 'the trap itself works'


# ---- CLIP's image towers

@torch.no_grad()
def test_the_embedded_clip_is_a_backbone():
    net = build_backbone('shapes').eval()
    f = net(images())
    visual = load_clip('shapes').model.visual
    assert f.shape[:2] == (2, net.num_features)
    assert f.shape[2] == f.shape[3]
    x = visual.stem((images() / 255. - net.mean) / net.std)
    for layer in (visual.layer1, visual.layer2, visual.layer3, visual.layer4): x = layer(x)
    assert torch.allclose(f, x, atol=1e-5)
    assert visual.attnpool(x).shape == (2, 128)


@torch.no_grad()
@pytest.mark.parametrize('name, shape', [('tiny-cprfl-rn', (2, 256, 2, 2)), ('tiny-cprfl-vit', (2, 32, 4, 4))])
def test_clip_towers_from_a_file(clip_files, name, shape):
    net = build_backbone(f'clip:{name}/{clip_files[name]}').eval()
    f = net(images())
    assert f.shape == shape
    assert net.num_features == shape[1]
    assert f.isfinite().all()
    assert f.std() > 0
    state = torch.load(clip_files[name], weights_only=True)
    own = getattr(net.net, 'visual', net.net).state_dict()
    assert own
    assert all(torch.equal(v, state[f'visual.{k}']) for k, v in own.items())
    assert net.mean.flatten().tolist() == pytest.approx([0.48145466, 0.4578275, 0.40821073]), "OpenAI's normalisation"
    assert net.cam_layer[0] in set(net.modules())


@torch.no_grad()
def test_a_clip_vit_is_built_for_the_size_of_the_images(clip_files):
    name = f"clip:tiny-cprfl-vit/{clip_files['tiny-cprfl-vit']}"
    native, net = built(name), built(name, image_size=96)
    assert net(images(1, 96)).shape == (1, 32, 6, 6)
    assert torch.equal(built(name, image_size=64)(images()), native(images()))
    with pytest.raises(ValueError, match='expected images of 64 x 64 pixels, got 96 x 96'): native(images(1, 96))


@torch.no_grad()
def test_a_clip_resnet_takes_any_size(clip_files):
    net = built(f"clip:tiny-cprfl-rn/{clip_files['tiny-cprfl-rn']}", image_size=96)
    assert net(images(1, 96)).shape == (1, 256, 3, 3)


def test_a_clip_file_that_would_run_code_is_refused(clip_files, tmp_path):
    mark = tmp_path / 'it_ran'
    torch.save({'state_dict': {'evil': TouchesAFile(mark)}}, tmp_path / 'evil.pt')
    with pytest.raises(ValueError, match='evil.pt cannot be used: .* a file that contains code is refused'):
        build_backbone(f"clip:tiny-cprfl-rn/{tmp_path / 'evil.pt'}")
    assert not mark.exists()


# ---- errors name what there is

@pytest.mark.parametrize('name, words', [
    ('resnet1000', "timm has no model 'resnet1000'; near names: .*resnet"),
    ('timm:nonsense', "timm has no model 'nonsense'"),
    ('torchvision:vgg11', "expected a torchvision ResNet, got 'vgg11'; there are resnet"),
    ('clip:RN50', "expected 'clip:ARCH/TAG'"),
    ('clip:RN50x3/openai', "open_clip has no architecture 'RN50x3'; near names: RN50"),
    ('clip:RN50/nowhere', "'nowhere' is neither a file nor a tag; tags: openai")])
def test_unknown_names(name, words):
    with pytest.raises(ValueError, match=words): build_backbone(name)


def test_clip_carries_its_own_weights():
    with pytest.raises(ValueError, match='shapes carries its own weights'): build_backbone('shapes', weights='file.pth')
    with pytest.raises(ValueError, match='output_stride'): build_backbone('clip:RN50/openai', output_stride=8)


def test_a_clip_resnet_may_be_cut_after_an_earlier_stage():
    fine, coarse = (build_backbone('shapes', stage=n).eval() for n in (3, 4))
    assert fine(images()).shape[-1] == 2 * coarse(images()).shape[-1]
    assert len(list(fine.parameters())) < len(list(coarse.parameters()))
    with pytest.raises(ValueError, match='stage: expected one of 1, 2, 3, 4, got 5'): build_backbone('shapes', stage=5)


# ---- what a library would only warn of, or not notice

def test_weights_from_a_file_are_normalised_as_the_model_expects(tmp_path):
    "Also an empty network, which a run's weights are loaded into"
    torch.save(timm.create_model('test_vit').state_dict(), tmp_path / 'w.pt')
    for weights in (None, tmp_path / 'w.pt'):
        net = build_backbone('test_vit', weights=weights)
        assert net.mean.flatten().tolist() == pytest.approx(timm.get_pretrained_cfg('test_vit').mean)


@pytest.mark.parametrize('name', ['resnet50.nowhere', 'coatnet_0_224'])
def test_a_model_without_weights_is_no_matter_of_the_network(name):
    with pytest.raises(ValueError, match=f"timm has no weights for '{name}'; it has"):
        build_backbone(name, pretrained=True)
