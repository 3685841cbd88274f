"The opponents: a regularised linear head, top-k patches, a decoder with a query for each class"
import pytest
import torch
import torch.nn.functional as F

from cprfl.model.baselines import ERM
from cprfl.model.opponents import GroupLinear, QueryDecoder, TopKPatches
from cprfl.runs.recipe import Recipe
from cprfl.runs.run import run_recipe
from cprfl.train.config import TrainConfig

SMALL = dict(d=16, heads=2, ffn_dim=24)


def patches(B=3, v=9, D=12): return torch.randn(B, v, D, generator=torch.Generator().manual_seed(0))


def decoder(C=5, seed=0, **kw):
    torch.manual_seed(seed)
    semantics = torch.randn(C, 7)
    return QueryDecoder(None, semantics, **SMALL | dict(feature_dim=12) | kw)


MAKERS = {
    'erm': lambda backbone, **kw: ERM(backbone, 4, dropout=0.5, **kw),
    'topk': lambda backbone, **kw: TopKPatches(backbone, 4, k=2, dropout=0.5, **kw),
    'decoder': lambda backbone, **kw: QueryDecoder(backbone, torch.randn(4, 7), **SMALL, **kw),
    'groups': lambda backbone, **kw: QueryDecoder(
        backbone, torch.randn(4, 7), queries='learned', num_queries=2, **SMALL, **kw)}


# ---- what all of them have in common

@pytest.mark.parametrize('name', MAKERS)
def test_images_and_their_patches_give_the_same_logits(name):
    model = MAKERS[name]('resnet10t').eval()
    images = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8)
    logits = model(images)
    assert logits.shape == (2, 4)
    assert logits.dtype == torch.float32
    torch.testing.assert_close(model(model.backbone.patches(images)), logits)


@pytest.mark.parametrize('name', MAKERS)
def test_logits_are_float32_under_mixed_precision(name):
    with torch.autocast('cpu', torch.bfloat16): logits = MAKERS[name](None, feature_dim=12)(patches())
    assert logits.dtype == torch.float32


@pytest.mark.parametrize('name', MAKERS)
def test_every_weight_learns(name):
    model = MAKERS[name](None, feature_dim=12)
    model(patches()).square().sum().backward()
    assert [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []


@pytest.mark.parametrize('name', MAKERS)
def test_training_lowers_the_loss(name):
    torch.manual_seed(0)
    model, x = MAKERS[name](None, feature_dim=12), patches(16)
    y = (torch.arange(16)[:, None] % 4 == torch.arange(4)).float()
    optimizer, seen = torch.optim.AdamW(model.parameters(), 0.01), []
    for _ in range(40):
        loss = F.binary_cross_entropy_with_logits(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        seen.append(loss.item())
    assert sum(seen[-5:]) < 0.9 * sum(seen[:5])


# ---- linear head

def test_dropout_drops_channels_of_the_mean_patch():
    torch.manual_seed(0)
    model, x = ERM(None, 1000, dropout=0.5, feature_dim=1), torch.ones(2000, 3, 1)
    with torch.no_grad(): model.fc.bias.zero_()
    kept = (model(x) != 0).all(1)
    assert kept.float().mean().item() == pytest.approx(0.5, abs=0.05)
    torch.testing.assert_close(model(x).mean(0), model.eval()(x)[0], rtol=0.1, atol=0)


def test_without_dropout_no_random_number_is_drawn():
    model, before = ERM(None, 4, feature_dim=12), torch.get_rng_state()
    model(patches())
    assert torch.equal(torch.get_rng_state(), before)


# ---- top-k patches

def test_top_k_by_hand():
    model = TopKPatches(None, 1, k=2, weight=0.4, feature_dim=1)
    model.load_state_dict({'fc.weight': torch.tensor([[2.]]), 'fc.bias': torch.tensor([1.])})
    logit = model(torch.tensor([[[0.], [1.], [4.], [3.]]]))  # 1, 3, 9, 7 at the patches
    assert logit.item() == pytest.approx(0.6 * 5 + 0.4 * 8)


def test_each_class_has_its_own_patches():
    model = TopKPatches(None, 2, k=1, weight=1., feature_dim=2)
    model.load_state_dict({'fc.weight': torch.eye(2), 'fc.bias': torch.zeros(2)})
    assert model(torch.tensor([[[5., 0.], [0., 7.]]])).tolist() == [[5., 7.]]


@pytest.mark.parametrize('kw', [dict(k=9), dict(k=100), dict(weight=0.)])
def test_all_patches_or_none_are_the_linear_head(kw):
    erm = ERM(None, 4, feature_dim=12)
    model = TopKPatches(None, 4, feature_dim=12, **kw)
    model.load_state_dict(erm.state_dict())
    torch.testing.assert_close(model(patches()), erm(patches()))


def test_patches_of_an_image_lose_the_same_channels():
    "Else the best of six patches would hardly ever be without its one channel"
    torch.manual_seed(0)
    model = TopKPatches(None, 1, k=1, weight=1., dropout=0.5, feature_dim=1)
    model.load_state_dict({'fc.weight': torch.ones(1, 1), 'fc.bias': torch.zeros(1)})
    lost = model(torch.ones(1000, 6, 1)) == 0
    assert lost.float().mean().item() == pytest.approx(0.5, abs=0.05)


@pytest.mark.parametrize('kw, match', [
    (dict(k=0), 'k: expected at least 1, got 0'), (dict(weight=1.5), 'weight: expected 0 to 1, got 1.5'),
    (dict(dropout=1.), 'dropout: expected at least 0 and below 1')])
def test_top_k_out_of_range(kw, match):
    with pytest.raises(ValueError, match=match): TopKPatches(None, 4, feature_dim=8, **kw)


# ---- decoder

def test_group_linear_is_a_matrix_for_each_query():
    layer, q = GroupLinear(3, 4, 7), torch.randn(2, 3, 4)
    with torch.no_grad(): layer.bias.copy_(torch.arange(7.))
    want = torch.stack([q[:, c // 3] @ layer.weight[c // 3, :, c % 3] + c for c in range(7)], 1)
    torch.testing.assert_close(layer(q), want)


def test_one_query_for_each_class_is_a_linear_answer():
    layer, q = GroupLinear(5, 4, 5), torch.randn(2, 5, 4)
    torch.testing.assert_close(layer(q), (q * layer.weight[..., 0]).sum(-1))


def test_the_decoder_is_pytorchs():
    "From queries and projected patches to answers, step by step"
    model, x = decoder(depth=2).eval(), patches()
    q = (model.semantics @ model.queries.weight.T + model.queries.bias).expand(3, -1, -1)
    memory = model.fc(x)
    for layer in model.decoder.layers:
        q = layer.norm1(q + layer.self_attn(q, q, q)[0])
        q = layer.norm2(q + layer.multihead_attn(q, memory, memory)[0])
        q = layer.norm3(q + layer.linear2(layer.linear1(q).relu()))
    want = (q * model.answers.weight[..., 0]).sum(-1) + model.answers.bias
    torch.testing.assert_close(model(x), want, rtol=1e-4, atol=1e-5)


def test_names_are_kept_and_never_learned():
    model = decoder()
    assert 'semantics' in model.state_dict()
    assert 'semantics' not in dict(model.named_parameters())


def test_another_name_is_another_query():
    model, x = decoder().eval(), patches()
    before = model(x)
    model.semantics[0].neg_()
    assert not torch.allclose(model(x)[:, 0], before[:, 0])


def test_learned_queries_do_not_use_the_names():
    model, x = decoder(queries='learned').eval(), patches()
    before = model(x)
    model.semantics.neg_()
    assert torch.equal(model(x), before)


def test_fewer_queries_than_classes():
    model = decoder(C=5, queries='learned', num_queries=2)
    assert model.start_queries().shape == (2, 16)
    assert model(patches()).shape == (3, 5)


@pytest.mark.parametrize('kw, match', [
    (dict(queries='words'), "queries: expected one of names, learned, got 'words'"),
    (dict(num_queries=6, queries='learned'), 'num_queries: expected 1 to 5, got 6'),
    (dict(num_queries=2), "2 queries cannot be the names of 5 classes; use queries='learned'"),
    (dict(heads=3), 'heads: expected a divisor of d=16, got 3')])
def test_decoder_refuses_what_does_not_fit(kw, match):
    with pytest.raises(ValueError, match=match): decoder(**kw)


# ---- as runs

RUN = Recipe(
    name='x', backbone='timm:resnet10t', backbone_args=dict(channels=(8, 8, 16, 16)), image_size=32, held_out=0.3,
    semantics='random:8', train=TrainConfig(epochs=1, ema=0., lr=1e-2))


@pytest.mark.parametrize('frozen', [False, True], ids=['end to end', 'frozen'])
@pytest.mark.parametrize('model, args', [
    ('erm', dict(dropout=0.5)), ('topk', dict(k=1)), ('decoder', SMALL), ('decoder', SMALL | dict(queries='learned'))])
def test_a_run_can_be_opened(model, args, frozen, tmp_path):
    recipe = RUN.with_(model=model, model_args=args, frozen=frozen, loss='la_asl', head_decay=0.1)
    run = run_recipe(recipe, tmp_path, progress=False)
    assert run.model()(torch.zeros(1, 3, 32, 32)).isfinite().all()
    assert run.report['total'] > 0
