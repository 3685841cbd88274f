"Backbones by name, weights from files, and files that must not be trusted"
import json
import pickle

import pytest
import timm
import torch
import torchvision
from helpers import TouchesAFile
from safetensors.torch import save_file
from torch import nn

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


def built(name, seed=0, **kw):
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


TOWERS = {'tiny-cprfl-rn': dict(layers=[1, 1, 1, 1], width=8, head_width=16, image_size=64),
          'tiny-cprfl-vit': dict(layers=2, width=32, head_width=16, patch_size=16, image_size=64)}


@pytest.fixture(scope='module')
def clip_files(tmp_path_factory):
    "Two architectures that open_clip did not know, with randomly initialised weights in files"
    import open_clip
    folder, files = tmp_path_factory.mktemp('clip'), {}
    for name, vision in TOWERS.items():
        text = dict(context_length=77, vocab_size=49408, width=16, heads=2, layers=1)
        (folder / f'{name}.json').write_text(json.dumps(dict(embed_dim=16, vision_cfg=vision, text_cfg=text)))
        open_clip.add_model_config(folder / f'{name}.json')
        torch.manual_seed(0)
        files[name] = folder / f'{name}.pt'
        torch.save(open_clip.create_model(name).state_dict(), files[name])
    return files


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
