"CLIP's image towers: their features in the space of the names, and how they are fine-tuned"
from copy import deepcopy

import pytest
import torch

from cprfl.model.backbones import TunedBackbone, build_backbone
from cprfl.model.semantics import load_clip
from cprfl.model.towers import PatchCLIP, add_lora, layer_depths, training_cost

NAMES = 'tiny-cprfl-rn', 'tiny-cprfl-vit'
PATCHES = {'tiny-cprfl-rn': 4, 'tiny-cprfl-vit': 16}  # of an image of 64 x 64 pixels


def images(B=2, size=64):
    return torch.randint(256, (B, 3, size, size), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)


# ---- features where the names are

@torch.no_grad()
@pytest.mark.parametrize('name', NAMES)
def test_the_first_feature_is_the_embedding_of_the_image(clip_sources, name):
    tower = build_backbone(clip_sources[name], pooled=True).eval()
    features = tower(images())
    assert features.shape == (2, 1 + PATCHES[name], 16)
    embedding = load_clip(clip_sources[name]).encode_image(images())
    assert torch.allclose(features[:, 0], embedding, atol=1e-5)
    assert tower.num_global == 1


@torch.no_grad()
@pytest.mark.parametrize('name', NAMES)
def test_joint_patches_are_a_map_in_the_same_space(clip_sources, name):
    tower, with_global = (build_backbone(clip_sources[name], joint=True, pooled=p).eval() for p in (False, True))
    assert torch.allclose(tower.patches(images()), with_global.patches(images())[:, 1:], atol=1e-6)
    assert tower.num_features == 16
    assert tower.num_global == 0


@torch.no_grad()
def test_a_patch_of_a_vit_is_normalised_and_projected(clip_sources):
    source = clip_sources['tiny-cprfl-vit']
    last, joint = (build_backbone(source, joint=joint).eval().patches(images()) for joint in (False, True))
    visual = load_clip(source).model.visual
    assert torch.allclose(joint, visual.ln_post(last) @ visual.proj, atol=1e-5)


@torch.no_grad()
def test_what_a_resnet_pools_are_its_values(clip_sources):
    tower = build_backbone(clip_sources['tiny-cprfl-rn'], pooled=True).eval()
    pool = tower.net.visual.attnpool
    for weight in (pool.q_proj.weight, pool.q_proj.bias): weight.zero_()  # attends to all places alike
    positions = pool.positional_embedding
    positions[0] = positions[1:].mean(0)  # of the mean that it puts before the map
    features = tower(images())
    assert torch.allclose(features[:, 0], features[:, 1:].mean(1), atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize('name, patches', [('tiny-cprfl-rn', 9), ('tiny-cprfl-vit', 36)])
def test_a_joint_tower_is_built_for_other_sizes(clip_sources, name, patches):
    tower = build_backbone(clip_sources[name], pooled=True, image_size=96).eval()
    assert tower(images(size=96)).shape == (2, 1 + patches, 16)
    with pytest.raises(ValueError, match='expected images of 96 x 96 pixels, got 64 x 64'): tower(images())


@torch.no_grad()
@pytest.mark.parametrize('name', NAMES)
def test_its_own_size_changes_nothing(clip_sources, name):
    native, same = (build_backbone(clip_sources[name], pooled=True, image_size=size).eval() for size in (None, 64))
    assert torch.equal(native(images()), same(images()))


def test_an_earlier_stage_is_not_where_the_names_are():
    with pytest.raises(ValueError, match='stage=3 is not in the space'): build_backbone('shapes', joint=True, stage=3)


def test_a_tower_of_timm_has_no_such_projection(monkeypatch):
    clip = load_clip('shapes')
    clip.model.visual = torch.nn.Module()
    clip.model.visual.trunk = torch.nn.Identity()
    monkeypatch.setattr('cprfl.model.semantics.load_clip', lambda source: clip)
    with pytest.raises(ValueError, match='with one last projection, got a Module in shapes'):
        build_backbone('shapes', joint=True)


# ---- scores

def features(B=2, v=40, m=16): return torch.randn(B, 1 + v, m, generator=torch.Generator().manual_seed(0))


NAMES_OF_CLASSES = torch.randn(5, 16, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def test_scores_add_the_image_and_its_best_patches():
    f, t = (torch.nn.functional.normalize(x, dim=-1) for x in (features(), NAMES_OF_CLASSES))
    cosines = f @ t.T
    best = cosines[:, 1:].sort(1, descending=True).values[:, :32].mean(1)
    expected = 100 * (0.6 * cosines[:, 0] + 0.4 * best - 0.2)
    assert torch.allclose(PatchCLIP(None, NAMES_OF_CLASSES, k=32)(features()), expected, atol=1e-4)


@pytest.mark.parametrize('v, sixth', [(40, 6), (196, 32), (4, 1)])
def test_a_sixth_of_the_patches_counts(v, sixth):
    scores = (PatchCLIP(None, NAMES_OF_CLASSES, k=k)(features(v=v)) for k in (0, sixth))
    assert torch.equal(*scores)


def test_fewer_patches_than_k_all_count():
    few = features(v=3)
    scores = (PatchCLIP(None, NAMES_OF_CLASSES, k=k)(few) for k in (3, 32))
    assert torch.equal(*scores)


@pytest.mark.parametrize('name', NAMES)
def test_a_tower_learns_from_the_scores(clip_sources, name):
    model = PatchCLIP(build_backbone(clip_sources[name], pooled=True), NAMES_OF_CLASSES, k=2)
    model(images()).square().sum().backward()
    assert not [name for name, p in model.backbone.named_parameters() if p.grad is None]
    assert model.offset.grad != 0


def test_names_learn_if_asked():
    fixed, learned = (PatchCLIP(None, NAMES_OF_CLASSES, learn_names=learn) for learn in (False, True))
    assert {name for name, _ in fixed.named_parameters()} == {'offset'}
    assert {name for name, _ in learned.named_parameters()} == {'offset', 'semantics'}
    assert torch.equal(fixed(features()), learned(features()))


def test_scores_stay_exact_in_mixed_precision():
    model = PatchCLIP(None, NAMES_OF_CLASSES)
    with torch.autocast('cpu', torch.bfloat16): mixed = model(features())
    assert torch.equal(mixed, model(features()))


# ---- a rate for each layer

@pytest.mark.parametrize('name, deepest', [('tiny-cprfl-rn', 4), ('tiny-cprfl-vit', 2)])
@pytest.mark.parametrize('pooled', [False, True])
def test_layers_of_a_clip_tower(clip_sources, name, deepest, pooled):
    backbone = build_backbone(clip_sources[name], pooled=pooled)
    depths = layer_depths(backbone)
    assert set(depths) == {name for name, _ in backbone.named_parameters()}
    assert set(depths.values()) == set(range(deepest + 1))


@pytest.mark.parametrize('name', ['resnet10t', 'vit_tiny_patch16_224', 'convnext_atto', 'swin_tiny_patch4_window7_224'])
def test_layers_of_a_timm_model(name):
    backbone = build_backbone(name)
    depths = layer_depths(backbone)
    assert set(depths) == {name for name, _ in backbone.named_parameters()}
    assert set(depths.values()) == set(range(max(depths.values()) + 1))


def test_the_stages_of_a_tuned_backbone_have_depths():
    tuned = TunedBackbone(build_backbone('resnet18'), 2)
    depths = layer_depths(tuned)
    assert {depths[name] for name, p in tuned.named_parameters() if p.requires_grad} == {0, 1}


# ---- adapters

def learned(module): return {name for name, p in module.named_parameters() if p.requires_grad}


@torch.no_grad()
@pytest.mark.parametrize('name', NAMES)
def test_adapters_change_nothing_at_first(clip_sources, name):
    tower = build_backbone(clip_sources[name], pooled=True).eval()
    before = tower(images())
    assert torch.allclose(add_lora(tower, 2)(images()), before, atol=1e-5)


def test_adapters_reach_attention_and_mlp(clip_sources):
    tower = add_lora(build_backbone(clip_sources['tiny-cprfl-vit'], pooled=True), 2)
    block = 'net.visual.transformer.resblocks.0.'
    of_block = {name.removeprefix(block).rsplit('.parametrizations.')[0] for name in learned(tower) if block in name}
    assert of_block == {'attn', 'attn.out_proj', 'mlp.c_fc', 'mlp.c_proj'}


def test_only_adapters_learn(clip_sources):
    tower = add_lora(build_backbone(clip_sources['tiny-cprfl-vit'], pooled=True), 2)
    assert {name.rsplit('.')[-1] for name in learned(tower)} == {'A', 'B'}
    PatchCLIP(tower, NAMES_OF_CLASSES)(images()).square().sum().backward()
    grads = [p.grad for name, p in tower.named_parameters() if name.endswith('.B')]
    assert all(grad.abs().sum() > 0 for grad in grads)


def test_a_copy_of_a_tower_with_adapters_is_the_same(clip_sources):
    tower = add_lora(build_backbone(clip_sources['tiny-cprfl-vit'], pooled=True), 2).eval()
    assert torch.equal(deepcopy(tower)(images()), tower(images()))


def test_adapters_lie_in_the_layers_of_their_weights(clip_sources):
    tower = add_lora(build_backbone(clip_sources['tiny-cprfl-vit'], pooled=True), 2)
    depths = layer_depths(tower)
    assert {depths[name] for name in learned(tower) if 'resblocks.0' in name} == {1}


def test_a_network_without_linear_layers_has_no_adapters():
    with pytest.raises(ValueError, match='expected a backbone with linear layers'):
        add_lora(build_backbone('resnet10t'), 2)


# ---- cost

def test_the_cost_of_a_tower_is_that_of_its_parts(clip_sources):
    model = PatchCLIP(build_backbone(clip_sources['tiny-cprfl-vit'], pooled=True), NAMES_OF_CLASSES)
    plain, average, held = (training_cost(model, 64, average=a, distill=d)
                            for a, d in ((False, False), (True, False), (False, True)))
    assert plain.weights == plain.learned == sum(p.numel() for p in model.parameters())
    assert average.fixed - plain.fixed == 4 * plain.weights
    assert held.operations > plain.operations == average.operations
    assert plain.memory(8) - plain.memory(4) == 4 * plain.per_image


def test_counting_leaves_no_gradients(clip_sources):
    model = PatchCLIP(build_backbone(clip_sources['tiny-cprfl-vit'], pooled=True), NAMES_OF_CLASSES)
    training_cost(model, 64)
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize('name', ['resnet18', 'torchvision:resnet18', 'shapes'])
def test_a_backbone_at_several_sizes_keeps_its_layers(name):
    depths = [layer_depths(build_backbone(name, **kw)).values() for kw in ({}, dict(scales=[1, 2]))]
    assert list(depths[0]) == list(depths[1])
