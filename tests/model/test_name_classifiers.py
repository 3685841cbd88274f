"Classifiers from names: the map, its pairs, and the mix with a model"
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from cprfl.metrics import average_precision
from cprfl.model.baselines import ERM
from cprfl.model.names import (
    NameClassifier,
    NamedModel,
    Vocabulary,
    choose_k,
    fuse,
    imagenet_names,
    kind_names,
    last_layer,
    name_pairs,
    own_outputs,
    pair_names,
    plain_name,
    read_vocabulary,
    ridge_map,
    share_of_names,
    shared_endings,
)
from cprfl.model.semantics import Clip


def drawn(*shape, seed=0): return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope='module')
def linear_world():
    "A network of 60 names whose classifiers are linear in their embeddings, and 8 classes that it does not know"
    names, classes = [f'thing{i:02d}x' for i in range(60)], [f'new{i}x' for i in range(8)]
    known, new, truth = drawn(60, 16, seed=1), drawn(8, 16, seed=2), drawn(16, 24, seed=3)
    rows, expected = (F.normalize(e) @ truth for e in (known, new))
    return dict(network=rows, text=Vocabulary(names, known), classes=classes, semantics=new,
                outputs=[(name,) for name in names]), expected


def fitted(world, **kw): return NameClassifier.fit(**world[0] | kw)


def test_the_map_is_that_of_sklearn():
    from sklearn.linear_model import Ridge
    known, rows, new = drawn(30, 12), drawn(30, 7, seed=1), drawn(5, 12, seed=2)
    A, a = F.normalize(known).double().numpy(), F.normalize(new).double().numpy()
    penalty = 0.7 * ((A - A.mean(0))**2).sum() / 30
    theirs = Ridge(alpha=penalty).fit(A, rows.double().numpy()).predict(a) - rows.double().numpy().mean(0)
    np.testing.assert_allclose(ridge_map(known, rows, new, ridge=0.7), theirs, atol=1e-5)


def test_the_map_with_a_width_is_that_of_sklearn():
    from sklearn.kernel_ridge import KernelRidge
    from sklearn.metrics.pairwise import rbf_kernel
    from sklearn.preprocessing import KernelCenterer
    known, rows, new = drawn(30, 12), drawn(30, 7, seed=1), drawn(5, 12, seed=2)
    A, a = (F.normalize(e).double().numpy() for e in (known, new))
    gamma = 1 / (2 * np.median(torch.pdist(torch.from_numpy(A)).square()))
    centre = KernelCenterer().fit(rbf_kernel(A, gamma=gamma))
    K, k = (centre.transform(rbf_kernel(e, A, gamma=gamma)) for e in (A, a))
    map_ = KernelRidge(alpha=0.7 * np.trace(K) / 30, kernel='precomputed')
    theirs = map_.fit(K, (rows - rows.mean(0)).numpy()).predict(k)
    np.testing.assert_allclose(ridge_map(known, rows, new, ridge=0.7, width=2.), theirs, atol=1e-5)


def test_a_linear_world_is_found_exactly(linear_world):
    classifier, expected = fitted(linear_world, ridge=1e-9), linear_world[1]
    rows = linear_world[0]['network']
    torch.testing.assert_close(classifier.weight.data, expected - rows.mean(0), atol=1e-3, rtol=0)


def test_new_names_are_told_perfectly_in_a_linear_world(linear_world):
    features = drawn(200, 4, 24, seed=5)
    targets = (features.mean(1) @ linear_world[1].T > 0.3).long()
    scores = fitted(linear_world, ridge=1e-9)(features) + features.mean(1) @ linear_world[0]['network'].mean(0)[:, None]
    assert average_precision(scores, targets).min() > 0.999


def test_random_vectors_know_nothing(linear_world):
    found, expected = fitted(linear_world, names='random').weight, linear_world[1]
    assert F.cosine_similarity(found, expected).mean().abs() < 0.3


def test_random_vectors_differ_with_the_seed(linear_world):
    weights = [fitted(linear_world, names='random', seed=seed).weight for seed in (0, 0, 1)]
    assert weights[0].equal(weights[1])
    assert not weights[0].equal(weights[2])


def test_the_control_has_the_same_pairs(linear_world):
    pairs = [fitted(linear_world, names=names).pairs.names for names in ('own', 'random')]
    assert pairs[0] == pairs[1]


@pytest.mark.parametrize('a, b', [
    ('cell phone', 'cellphone'), ('Zebra', 'zebra'), ('wine_glass', 'wine glass'), ('skis', 'ski'), ('boxes', 'box'),
    ('strawberries', 'strawberry'), ('crane_(bird)', 'crane'), ('T-shirt', 't shirt'), ('buses', 'bus'),
    ('school buses', 'School bus'), ('ties', 'tie'), ('knives', 'knife'), ('mice', 'mouse'), ('lenses', 'lens')])
def test_the_same_name_is_known_in_other_writing(a, b): assert plain_name(a) == plain_name(b)


@pytest.mark.parametrize('a, b', [('bear', 'teddy bear'), ('glass', 'gla'), ('mouse', 'computer mouse')])
def test_other_names_differ(a, b): assert plain_name(a) != plain_name(b)


def test_strict_leaves_out_the_names_of_the_classes():
    outputs, classes = imagenet_names(), ['cell phone', 'zebra', 'skis', 'tv']
    left_out = [outputs[i][0] for i in own_outputs(outputs, classes)]
    assert left_out == ['zebra', 'cellular telephone', 'ski']


def test_strict_leaves_out_by_synonyms(linear_world):
    world = linear_world[0] | dict(outputs=[(name, f'other {name}') for name in linear_world[0]['text'].names])
    pairs = NameClassifier.fit(**world | dict(classes=['Other_thing03xs', *world['classes'][1:]])).pairs
    assert pairs.left_out == ['thing03x']


def test_all_pairs_are_kept_on_request(linear_world):
    classes = ['thing03x', *linear_world[0]['classes'][1:]]
    assert len(fitted(linear_world, classes=classes, strict=False).pairs.names) == 60


def test_what_is_left_out_changes_no_other_pair(linear_world):
    classes = ['thing03x', *linear_world[0]['classes'][1:]]
    assert 'thing03x' not in fitted(linear_world, classes=classes).pairs.names


def test_a_name_of_two_outputs_is_no_pair():
    assert pair_names([('crane',), ('crane', 'machine'), ('jay',)], ['crane', 'jay']) == [(2, 1)]


def test_a_name_that_a_vocabulary_has_twice_is_no_pair():
    assert pair_names([('bow',)], ['bow_(weapon)', 'bow_(decorative)']) == []


GUITARS = [('acoustic guitar',), ('electric guitar',), ('bass', 'bass guitar'), ('wall clock',), ('crane',), ('crane',)]


def test_a_kind_has_the_outputs_whose_names_end_with_it():
    assert kind_names(GUITARS, ['Guitars', 'clock_(time)', 'organ']) == [((0, 1, 2), 0), ((3,), 1)]


def test_an_output_belongs_to_its_own_name_and_to_its_kind():
    assert kind_names(GUITARS, ['guitar', 'bass guitar']) == [((0, 1, 2), 0), ((2,), 1)]


def test_a_name_that_two_outputs_have_is_no_kind(): assert kind_names(GUITARS, ['crane']) == []


def test_a_name_without_letters_belongs_to_no_kind(): assert kind_names([('?',), ('owl',)], ['owl']) == [((1,), 0)]


def test_a_tower_learns_the_last_words_that_outputs_share():
    assert shared_endings([*GUITARS, ('?', '-')]) == ['guitar', 'crane']


def test_the_classifier_of_a_kind_is_a_mean():
    rows, text = drawn(6, 4), Vocabulary(['guitar', 'clock'], drawn(2, 3))
    pairs = name_pairs(rows, text, GUITARS, kinds=True)
    assert pairs.names == text.names
    torch.testing.assert_close(pairs.rows, torch.stack([rows[:3].mean(0), rows[3]]))


@pytest.mark.parametrize('own', ['guitars', 'electric guitar'])
def test_strict_leaves_out_kinds_and_their_outputs(own):
    rows, text = drawn(6, 4), Vocabulary(['guitar', 'clock', 'bass'], drawn(3, 3))
    pairs = name_pairs(rows, text, GUITARS, [own], kinds=True)
    if own == 'guitars': assert (pairs.names, pairs.left_out) == (['clock', 'bass'], ['guitar'])
    else: torch.testing.assert_close(pairs.rows[0], rows[[0, 2]].mean(0))


def test_imagenet_has_its_names_in_order():
    assert [imagenet_names()[i][0] for i in (0, 340, 999)] == ['tench', 'zebra', 'toilet tissue']


def test_another_number_of_outputs_needs_names(linear_world):
    with pytest.raises(ValueError, match='got 60'): fitted(linear_world, outputs=None)


def test_a_network_without_a_last_layer_says_so():
    with pytest.raises(ValueError, match='has no last layer'): last_layer(nn.Conv2d(3, 8, 3))


def test_the_last_layer_is_read_from_a_file(tmp_path):
    from safetensors.torch import save_file
    weight = drawn(1000, 16)
    save_file({'fc.weight': weight.half(), 'fc.bias': torch.zeros(1000)}, tmp_path / 'net.safetensors')
    torch.testing.assert_close(last_layer(tmp_path / 'net.safetensors'), weight.half().float())


@pytest.mark.parametrize('names_file', ['names.csv', 'names.txt'])
def test_a_vocabulary_is_read_from_files(tmp_path, names_file):
    lines = ['name,n', 'a_b,1', 'c,2'] if names_file.endswith('csv') else ['a_b', 'c']
    (tmp_path / names_file).write_text('\n'.join(lines) + '\n')
    np.save(tmp_path / 'vectors.npy', np.eye(2, 3, dtype=np.float16))
    assert read_vocabulary(tmp_path / names_file, tmp_path / 'vectors.npy').names == ['a_b', 'c']


def test_a_vocabulary_of_another_length_raises():
    with pytest.raises(ValueError, match='of 2 names'): Vocabulary(['a', 'b'], torch.zeros(3, 4))


def test_embeddings_of_another_width_raise(linear_world):
    with pytest.raises(ValueError, match='one width, got 16 and 5'): fitted(linear_world, semantics=torch.ones(8, 5))


def test_too_few_pairs_raise():
    text = Vocabulary(['a', 'b'], torch.eye(2))
    with pytest.raises(ValueError, match='at least 2 pairs'): name_pairs(torch.eye(2), text, [('a',), ('x',)])


def text_tower():
    "A small, untrained CLIP with open_clip's own tokenizer"
    import open_clip
    from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg
    torch.manual_seed(0)
    vision = CLIPVisionCfg(layers=1, width=32, head_width=16, patch_size=32, image_size=64)
    model = CLIP(16, vision, CLIPTextCfg(width=16, heads=1, layers=1))
    return Clip(model.eval(), open_clip.get_tokenizer('ViT-B-32'), (0.5,) * 3, (0.5,) * 3, 64)


def test_a_text_tower_embeds_every_name_of_imagenet():
    network = torch.randn(1000, 8)
    fit = NameClassifier.fit(network, text_tower(), ['zebra', 'tv'])
    assert (list(fit.weight.shape), len(fit.pairs.names), fit.pairs.left_out) == ([2, 8], 999, ['zebra'])


def test_a_text_tower_embeds_kinds_as_well():
    outputs, tower = [('red star',), ('blue star',), ('disc',)], text_tower()
    fit = NameClassifier.fit(drawn(3, 8), tower, ['moon'], outputs=outputs, kinds=True)
    assert fit.pairs.names == ['red star', 'blue star', 'disc', 'star']
    control = NameClassifier.fit(drawn(3, 8), tower, ['moon'], outputs=outputs, kinds=True, names='random')
    assert control.pairs.names == fit.pairs.names


# the mix with a model

def named(counts=(0, 5, 20, 300, 10**9), per_image=True, k=20., names=None):
    torch.manual_seed(0)
    model, x = ERM(None, 5, feature_dim=24).eval(), drawn(60, 4, 24)
    names = names or NameClassifier(drawn(5, 24, seed=7))
    return NamedModel(model, names, counts, k, per_image).standardise(model(x), names(x)), x


def test_a_class_with_many_images_has_the_scores_of_the_head():
    model, x = named()
    torch.testing.assert_close(model(x)[:, 4], model.model(x)[:, 4])


def test_a_class_without_images_has_the_order_of_its_name():
    model, x = named(per_image=False)
    assert model(x)[:, 0].argsort().equal(model.names(x)[:, 0].argsort())


def test_the_share_is_a_half_at_k_images():
    assert share_of_names([0, 20, 60], 20).tolist() == [1, 0.5, 0.25]


def test_a_smaller_power_lets_the_share_fall_more_slowly():
    torch.testing.assert_close(share_of_names([0, 5, 80], 5, power=0.5), torch.tensor([1, 0.5, 0.2]))
    assert share_of_names([0, 5, 80], 0, power=0.5).tolist() == [0, 0, 0]
    with pytest.raises(ValueError, match='power: expected'): share_of_names([5], power=0)


def test_without_k_the_name_decides_alone():
    assert share_of_names([0, 20, 60], None).tolist() == [1, 1, 1]


def test_fused_scores_are_a_weighted_mean():
    head, names = drawn(6, 3), drawn(6, 3, seed=1)
    torch.testing.assert_close(fuse(head, names, [10, 10, 10], 10), (head + names) / 2)


def test_logits_stay_on_the_scale_of_the_head():
    model, x = named()
    torch.testing.assert_close(model(x).mean(0), model.model(x).mean(0), atol=1e-4, rtol=0)


def test_the_mix_orders_images_as_standardised_scores_do():
    model, x = named()
    head, names = model.of_head(model.model(x)), model._standardised(model.names(x))
    expected = fuse(head, names, [0, 5, 20, 300, 10**9], 20)
    torch.testing.assert_close(model.of_head(model(x)), expected, atol=1e-4, rtol=1e-4)


def test_parts_add_up_to_the_logits():
    model, x = named()
    torch.testing.assert_close(sum(model.parts(x)), model(x))


@pytest.mark.parametrize('per_image', [True, False])
def test_saved_and_loaded_names_give_the_same_scores(tmp_path, per_image):
    from cprfl.files import read_tensors, write_tensors
    model, x = named(per_image=per_image)
    write_tensors(tmp_path / 'names.safetensors', model.names_state())
    again = NamedModel(model.model, NameClassifier(torch.zeros(5, 24)), [0] * 5, per_image=per_image)
    assert again.load_names(read_tensors(tmp_path / 'names.safetensors'))(x).equal(model(x))


def test_names_of_a_learning_model_read_a_backbone_of_their_own():
    backbone = nn.Conv2d(3, 24, 4, 4)
    own, names = nn.Conv2d(3, 24, 4, 4), NameClassifier(drawn(5, 24, seed=7))
    model = NamedModel(ERM(backbone, 5, feature_dim=24), names, [5] * 5, backbone=own)
    images = drawn(2, 3, 8, 8)
    before = model(images)
    with torch.no_grad(): own.weight.zero_()
    assert not model(images).equal(before)


def test_k_is_the_best_on_held_out_images():
    y = torch.zeros(100, 2, dtype=torch.long)
    y[:20, 0], y[30:60, 1] = 1, 1
    perfect, noise = y.float(), drawn(100, 2)
    head, names = torch.stack([noise[:, 0], perfect[:, 1]], 1), torch.stack([perfect[:, 0], noise[:, 1]], 1)
    assert choose_k(head, names, y, [5, 500], ks=(1., 30., 10000.)) == 30.


def test_k_cannot_be_chosen_without_a_label():
    with pytest.raises(ValueError, match='expected held-out images with labels, they have none'):
        choose_k(drawn(9, 2), drawn(9, 2), torch.zeros(9, 2), [5, 500])


@pytest.mark.parametrize('width', [None, 1.])
def test_embeddings_that_are_all_equal_raise(width):
    with pytest.raises(ValueError, match='expected names with different embeddings'):
        ridge_map(torch.ones(4, 3), drawn(4, 5), drawn(2, 3), width=width)


def test_most_embeddings_equal_give_no_width():
    with pytest.raises(ValueError, match='most of them are equal'):
        ridge_map(torch.cat([torch.ones(8, 3), drawn(1, 3)]), drawn(9, 5), drawn(2, 3), width=1.)


def test_the_name_of_a_single_class_counts():
    torch.manual_seed(0)
    model, x, names = ERM(None, 1, feature_dim=24).eval(), drawn(60, 4, 24), NameClassifier(drawn(1, 24, seed=7))
    fused = NamedModel(model, names, [0]).standardise(model(x), names(x))(x)
    assert fused[:, 0].argsort().equal(names(x)[:, 0].argsort())


def test_words_that_outputs_share_have_one_order():
    outputs = [('acoustic guitar', 'barn owl'), ('electric guitar', 'snowy owl', 'electric ray'), ('manta ray',)]
    assert shared_endings(outputs) == ['guitar', 'owl', 'ray']


def test_half_precision_changes_no_score_of_names():
    model, x = named()
    with torch.autocast('cpu', torch.bfloat16): half = model.names(x)
    torch.testing.assert_close(half, model.names(x))


# prompts that start as classifiers

def prompted(**kw):
    from cprfl.model.cprfl import CPRFL
    torch.manual_seed(0)
    W, w = drawn(5, 8), drawn(5, 24, seed=1)
    small = dict(d=16, heads=2, head_dim=8, ffn_dim=16, feature_dim=24)
    return CPRFL(None, torch.cat([W, w], 1), **small, prior=True, **kw).eval(), w


def test_prompts_start_in_the_direction_of_their_classifiers():
    model, w = prompted()
    direction = F.normalize(w @ model.fc.weight.T, dim=1)
    torch.testing.assert_close(model.prompts() - model.pi(model.semantics[:, :8]), model.prior_length * direction)


def test_prompts_and_patches_start_with_one_projection():
    query, key, _ = prompted()[0].vsi.layers[0].attention.to_qkv.weight.chunk(3)
    assert query.equal(key)


def test_a_model_with_a_prior_is_loaded_as_it_was_saved():
    (model, _), (other, _) = prompted(), prompted()
    with torch.no_grad(): model.prior_length.mul_(2)
    other.load_state_dict(model.state_dict())
    assert other(drawn(2, 4, 24)).equal(model(drawn(2, 4, 24)))
