"Prompts, interaction, scores: the authors' figures, a slow and plain computation beside ours, and the gradient paths"
import json

import numpy as np
import pytest
import torch
from helpers import FIXTURES
from torch import nn

from cprfl.losses import build_loss
from cprfl.model.cprfl import CPRFL, GRAD_PATHS, PromptInitializer, similarity_scores
from cprfl.model.vsi import PromptAttention, VisualSemanticInteraction, VSILayer

FIGURES = sorted(FIXTURES.glob('vsi_*.npz'))
OURS = {'fc': 'fc', 'pi.0': 'pi.0', 'pi.3': 'pi.2', 'encoder.layers.0.0.norm': 'vsi.layers.0.norm1',
        'encoder.layers.0.0.fn.to_qkv': 'vsi.layers.0.attention.to_qkv',
        'encoder.layers.0.0.fn.to_out.0': 'vsi.layers.0.attention.to_out',
        'encoder.layers.0.1.norm': 'vsi.layers.0.norm2', 'encoder.layers.0.1.fn.net.0': 'vsi.layers.0.ffn.0',
        'encoder.layers.0.1.fn.net.3': 'vsi.layers.0.ffn.3'}
SMALL = dict(d=24, heads=3, head_dim=5, ffn_dim=16, feature_dim=10)


def renamed(name):
    module, _, kind = name.rpartition('.')
    return f'{OURS[module]}.{kind}'


def small(C=6, m=8, seed=0, **kw):
    torch.manual_seed(seed)
    return CPRFL(None, torch.randn(C, m), **{**SMALL, 'dropout': 0., **kw})


def patches(B=3, v=7, D=10, seed=1): return torch.randn(B, v, D, generator=torch.Generator().manual_seed(seed))


def relative(a, b): return ((a - b).norm() / b.norm()).item()


# ---- the authors' figures

def test_all_six_figures_are_here():
    modes = ('dual', 'only_classifier', 'only_interaction')
    assert [p.stem for p in FIGURES] == [f'vsi_{i}_{m}' for i in (0, 1) for m in modes]


@pytest.mark.parametrize('path', FIGURES, ids=lambda p: p.stem)
def test_scores_loss_and_gradients_are_the_authors(path):
    figures = np.load(path)
    cfg, mode = json.loads(str(figures['config'])), path.stem.split('_', 2)[2].removeprefix('only_')
    tensor = lambda k: torch.from_numpy(figures[k])
    sizes = dict(d=cfg['d'], heads=cfg['h'], head_dim=cfg['dh'], ffn_dim=cfg['mlp'], feature_dim=cfg['din'])
    model = CPRFL(None, tensor('semantics'), **sizes, tau=cfg['expand'], dropout=0., scale='head', grad_path=mode)
    state = {renamed(k.removeprefix('param.')): tensor(k) for k in figures.files if k.startswith('param.')}
    missing, unknown = model.load_state_dict(state, strict=False)
    assert missing == ['semantics']
    assert not unknown

    scores = model.from_features(tensor('features'))
    loss = build_loss('asl', gamma_neg=4, gamma_pos=0, clip=0.05)(scores, tensor('targets'))
    loss.backward()
    assert relative(scores, tensor('scores')) <= 1e-5
    assert abs(loss.item() - figures['loss']) <= 1e-5 * abs(figures['loss'])
    theirs = {renamed(k.removeprefix('grad.')): tensor(k) for k in figures.files if k.startswith('grad.')}
    assert set(theirs) == {n for n, _ in model.named_parameters() if n.startswith('pi.')}
    for name, g in theirs.items(): assert relative(model.get_parameter(name).grad, g) <= 1e-4, name


# ---- shapes, types, sizes

def test_shapes_from_names_to_logits():
    model = small()
    assert model.prompts().shape == (6, 24)
    assert model.num_classes == 6
    assert model.category_features(patches()).shape == (3, 6, 24)
    logits, attention = model.from_features(patches(), return_attention=True)
    assert logits.shape == (3, 6)
    assert attention.shape == (3, 3, 6, 7)


def test_defaults_are_the_papers():
    model = CPRFL(None, torch.randn(2, 8), feature_dim=4)
    attention, ffn = model.vsi.layers[0].attention, model.vsi.layers[0].ffn
    assert [p.shape[0] for p in model.pi.parameters() if p.ndim == 2] == [1024, 2048]
    assert attention.to_qkv.weight.shape == (3 * 8 * 512, 2048)
    assert attention.to_qkv.bias is None
    assert attention.scale == 2048**-0.5
    assert ffn[0].weight.shape == (2048, 2048)
    assert len(model.vsi.layers) == 1
    assert not model.vsi.layers[0].residual
    assert ffn[2].p == 0.1


def test_bf16_autocast_gives_float32_logits():
    model, x = small().eval(), patches()
    with torch.autocast('cpu', torch.bfloat16):
        logits, attention = model.from_features(x, return_attention=True)
        assert model.category_features(x).dtype == torch.bfloat16
    assert logits.dtype == attention.dtype == torch.float32
    assert relative(logits, model.from_features(x)) < 0.03


def test_bf16_autocast_trains():
    model = small()
    with torch.autocast('cpu', torch.bfloat16): logits = model.from_features(patches())
    logits.square().mean().backward()
    for name, p in model.named_parameters():
        assert p.grad.dtype == torch.float32, name
        assert p.grad.isfinite().all(), name


@pytest.mark.parametrize('C, B', [(1, 4), (6, 1), (1, 1)])
def test_one_class_and_one_image(C, B):
    logits, attention = small(C).from_features(patches(B), return_attention=True)
    assert logits.shape == (B, C)
    assert attention.shape == (B, 3, C, 7)
    logits.sum().backward()


def test_images_are_independent_of_their_neighbours():
    model, x = small().eval(), patches(5)
    alone = torch.cat([model.from_features(x[i:i + 1]) for i in range(5)])
    assert torch.allclose(alone, model.from_features(x), atol=1e-6)


def test_dropout_is_only_there_in_training():
    model, x = small(dropout=0.5), patches()
    assert not torch.equal(model.from_features(x), model.from_features(x))
    model.eval()
    assert torch.equal(model.from_features(x), model.from_features(x))


# ---- beside a plain computation in float64

def oracle(model, x):
    "Logits and attention on the patches, row by row, in float64, without any shortcut"
    w = {k: v.double() for k, v in model.state_dict().items()}
    lin = lambda t, n: t @ w[n + '.weight'].T + (w[n + '.bias'] if n + '.bias' in w else 0)
    std = lambda t: (t.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt()
    norm = lambda t, n: (t - t.mean(-1, keepdim=True)) / std(t) * w[n + '.weight'] + w[n + '.bias']
    gelu = lambda t: t * 0.5 * (1 + torch.erf(t / 2**0.5))
    P = lin(gelu(lin(w['semantics'], 'pi.0')), 'pi.2')
    z, v = torch.cat([lin(x.double(), 'fc'), P.expand(len(x), -1, -1)], 1), x.shape[1]
    for i, layer in enumerate(model.vsi.layers):
        H, at = layer.attention.heads, f'vsi.layers.{i}.'
        q, k, val = lin(norm(z, at + 'norm1'), at + 'attention.to_qkv').chunk(3, -1)
        out, maps = [], []
        for qh, kh, vh in zip(*(t.chunk(H, -1) for t in (q, k, val))):
            maps.append((qh @ kh.mT * layer.attention.scale).softmax(-1))
            out.append(maps[-1] @ vh)
        a = lin(torch.cat(out, -1), at + 'attention.to_out') + (z if layer.residual else 0)
        z = lin(gelu(lin(norm(a, at + 'norm2'), at + 'ffn.0')), at + 'ffn.3') + (a if layer.residual else 0)
    return (z[:, v:] * P).sum(-1), torch.stack(maps, 1)[:, :, v:]


@pytest.mark.parametrize('depth', [1, 2, 3])
@pytest.mark.parametrize('residual', [False, True])
@pytest.mark.parametrize('scale', ['model', 'head'])
def test_model_equals_the_oracle(depth, residual, scale):
    model, x = small(depth=depth, residual=residual, scale=scale), patches()
    logits, attention = model.from_features(x, return_attention=True)
    want, maps = oracle(model, x)
    assert relative(logits.double(), want) < 1e-5
    assert torch.allclose(attention.double(), maps[..., :7], atol=1e-6)


@torch.no_grad()
def test_only_the_prompt_rows_are_computed_and_they_are_the_same():
    torch.manual_seed(0)
    layer, z = VSILayer(24, 3, 5, 16, 0.), torch.randn(2, 13, 24)
    assert torch.allclose(layer(z, query_start=7), layer(z)[:, 7:], atol=1e-6)
    rows = []
    count = lambda module, args, out: rows.append(out.shape[1])
    handles = [m.register_forward_hook(count) for m in (layer.attention.to_out, layer.ffn)]
    layer(z, query_start=7)
    for h in handles: h.remove()
    assert rows == [6, 6]


@torch.no_grad()
def test_attention_rows_and_the_share_of_the_prompts_make_one():
    torch.manual_seed(0)
    attention = PromptAttention(24, 3, 5)
    _, maps = attention(torch.randn(2, 13, 24) * 3, query_start=7, return_attention=True)
    assert maps.shape == (2, 3, 6, 13)
    assert torch.allclose(maps.sum(-1), torch.ones(2, 3, 6))
    assert (maps >= 0).all()
    on_patches = small().from_features(patches(), return_attention=True)[1].sum(-1)
    assert ((on_patches > 0) & (on_patches < 1)).all()


@pytest.mark.parametrize('depth', [1, 2])
def test_asking_for_attention_does_not_change_the_logits(depth):
    model, x = small(depth=depth), patches()
    logits, _ = model.from_features(x, return_attention=True)
    assert torch.allclose(model.from_features(x), logits, rtol=1e-5, atol=1e-6)
    assert torch.allclose(model(x), model(x, return_attention=True)[0], rtol=1e-5, atol=1e-6)


def test_scale_is_of_the_model_or_of_a_head():
    model, head, x = small(scale='model'), small(scale='head'), patches() * 4
    assert model.vsi.layers[0].attention.scale == 24**-0.5
    assert head.vsi.layers[0].attention.scale == 5**-0.5
    model.load_state_dict(head.state_dict())
    assert not torch.allclose(model.from_features(x), head.from_features(x))


def test_scores_are_dot_products_in_float32():
    g = torch.Generator().manual_seed(0)
    f, p = torch.randn(2, 3, 5, generator=g), torch.randn(3, 5, generator=g)
    want = torch.tensor([[f[b, c].double() @ p[c].double() for c in range(3)] for b in range(2)])
    assert torch.allclose(similarity_scores(f, p).double(), want, atol=1e-6)
    assert similarity_scores(f.bfloat16(), p).dtype == torch.float32


# ---- gradients

def gradients(path, **kw):
    model = small(grad_path=path, **kw)
    logits = model.from_features(patches())
    logits.sigmoid().log().sum().backward()
    return logits.detach(), {n: p.grad for n, p in model.named_parameters()}


@pytest.mark.parametrize('depth', [1, 2])
def test_the_two_paths_add_up_to_both(depth):
    logits, grads = zip(*(gradients(p, depth=depth) for p in GRAD_PATHS))
    assert torch.equal(logits[0], logits[1])
    assert torch.equal(logits[0], logits[2])
    dual, interaction, classifier = grads
    for name in dual:
        if name.startswith('pi.'):
            assert relative(interaction[name] + classifier[name], dual[name]) < 1e-5
            for path in (interaction, classifier): assert relative(path[name], dual[name]) > 1e-3, 'one path is cut'
        else:
            assert torch.equal(dual[name], interaction[name])
            assert torch.equal(dual[name], classifier[name])


def test_gradients_are_those_of_finite_differences():
    model, x = small(C=2, m=3, d=6, heads=2, head_dim=3, ffn_dim=4).double(), patches(2, 3).double()
    weight = model.pi[0].weight.detach().clone()

    def f(w):  # similarity_scores works in float32 by design, so this repeats it in float64
        hidden = nn.functional.gelu(nn.functional.linear(model.semantics, w, model.pi[0].bias))
        P = model.pi[2](hidden)
        return (model.category_features(x, P) * P).sum(-1)
    assert torch.autograd.gradcheck(f, weight.requires_grad_())


def test_semantics_are_frozen_and_saved():
    W = torch.randn(6, 8, generator=torch.Generator().manual_seed(0), requires_grad=True)
    model = CPRFL(None, W, **SMALL)
    assert 'semantics' in model.state_dict()
    assert 'semantics' not in dict(model.named_parameters())
    model.from_features(patches()).sum().backward()
    assert W.grad is None
    assert not model.semantics.requires_grad
    with torch.no_grad(): W.zero_()
    assert model.semantics.any(), 'the model keeps a copy of its own'
    assert CPRFL(None, W.detach().half(), **SMALL).semantics.dtype == torch.float32


# ---- a backbone of one's own

class Grid(nn.Module):
    num_features = 10
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 10, 8, stride=8)
    def forward(self, x): return self.conv(x)


class Tokens(Grid):
    def forward(self, x): return self.conv(x).flatten(2).transpose(1, 2)


def test_feature_maps_and_patches_are_the_same_to_the_model():
    torch.manual_seed(0)
    grid, tokens, W, x = Grid(), Tokens(), torch.randn(6, 8), torch.rand(2, 3, 16, 24)
    tokens.load_state_dict(grid.state_dict())
    kw = {k: v for k, v in SMALL.items() if k != 'feature_dim'}
    a, b = CPRFL(grid, W, **kw).eval(), CPRFL(tokens, W, **kw).eval()
    b.load_state_dict(a.state_dict())
    assert torch.equal(a(x), b(x))
    assert torch.equal(a(x), a.from_features(tokens(x)))
    assert torch.equal(a(tokens(x)), a(x)), 'three dimensions are cached patches'
    logits, attention = a(x, return_attention=True)
    assert logits.shape == (2, 6)
    assert attention.shape == (2, 3, 6, 2 * 3)


def test_gradient_reaches_the_backbone():
    kw = {k: v for k, v in SMALL.items() if k != 'feature_dim'}
    model = CPRFL(Grid(), torch.randn(6, 8), **kw)
    model(torch.rand(2, 3, 16, 16)).sum().backward()
    assert model.backbone.conv.weight.grad.abs().sum() > 0


# ---- errors say what was expected

def vsi(): return VisualSemanticInteraction(24, 3, 5, 16)


@pytest.mark.parametrize('make, words', [
    (lambda: small(scale='sqrt'), 'scale: expected one of model, head'),
    (lambda: small(grad_path='both'), "expected one of dual, interaction, classifier, got 'both'"),
    (lambda: small(depth=0), 'depth: expected at least 1, got 0'),
    (lambda: PromptInitializer(8, 4, tau=0.1), 'tau=0.1, d=4'),
    (lambda: CPRFL(None, torch.randn(8), **SMALL), r'expected \[C, m\], got \[8\]'),
    (lambda: CPRFL(None, torch.randn(6, 8), d=24), 'pass feature_dim=D'),
    (lambda: CPRFL(nn.Conv2d(3, 8, 3), torch.randn(6, 8), d=24), 'no `num_features`'),
    (lambda: CPRFL('resnet1000', torch.randn(6, 8)), "timm has no model 'resnet1000'"),
    (lambda: vsi()(torch.randn(2, 7, 24), torch.randn(6, 23)), r'got \[2, 7, 24\] and \[6, 23\]'),
    (lambda: vsi()(torch.randn(7, 24), torch.randn(6, 24)), r'expected features \[B, v, d\]')])
def test_errors_name_what_was_expected(make, words):
    with pytest.raises(ValueError, match=words): make()


def test_a_backbone_that_gives_pooled_features_is_refused():
    class Pooled(Grid):
        def forward(self, x): return self.conv(x).mean((2, 3))
    kw = {k: v for k, v in SMALL.items() if k != 'feature_dim'}
    with pytest.raises(ValueError, match=r'expected a feature map \[B, D, h, w\]'):
        CPRFL(Pooled(), torch.randn(6, 8), **kw)(torch.rand(2, 3, 16, 16))
