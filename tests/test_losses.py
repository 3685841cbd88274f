"Losses: the authors' figures, other libraries as yardsticks, gradients, extremes, errors"
import inspect
import json

import numpy as np
import pytest
import timm.loss
import torch
import torch.nn.functional as F
from helpers import FIXTURES
from packaging.version import Version

from cprfl import losses
from cprfl.losses import available_losses, build_loss, loss_constants, loss_keywords, register_loss

NAMES = ['bce', 'mls', 'focal', 'rw_inv', 'rw_sqrt_inv', 'cb_focal', 'db_nofocal', 'db_focal', 'ldam', 'asl',
         'la_bce', 'la_asl']
WITH_N = ['rw_inv', 'rw_sqrt_inv', 'cb_focal', 'db_nofocal', 'db_focal', 'la_bce', 'la_asl']  # of N as well
COUNTED = [*WITH_N, 'ldam']
CASES = json.loads((FIXTURES/'losses.json').read_text())
KEYS = {  # key of the file -> name and keywords
    'bce_mean': ('bce', {}), 'mls_mean': ('mls', {}), 'focal_mean': ('focal', {}),
    'rw_inv_mean': ('rw_inv', {}), 'rw_sqrt_inv_mean': ('rw_sqrt_inv', {}), 'cb_focal_mean': ('cb_focal', {}),
    'db_nofocal_mean': ('db_nofocal', {}), 'db_focal_mean': ('db_focal', {}),
    'rebalance_noreg_nofocal_mean': ('db_nofocal', dict(neg_scale=1., init_bias=0., balance=1.)),
    'asl_mean_g4_p0_c05': ('asl', {}), 'asl_mean_g2_p0_c0': ('asl', dict(gamma_neg=2, clip=0.)),
    'asl_mean_g4_p1_c05_graded': ('asl', dict(gamma_pos=1, focal_grad=True)),
}

@pytest.fixture
def batch():
    g = torch.Generator().manual_seed(0)
    logits = 3*torch.randn(16, 5, generator=g, dtype=torch.float64)
    targets = (torch.rand(16, 5, generator=g) < 0.3).double()
    targets[0] = 0
    return logits, targets, torch.tensor([700, 120, 60, 20, 4]), 1142

@pytest.fixture
def clean_registry(monkeypatch): monkeypatch.setattr(losses.LOSSES, 'entries', dict(losses.LOSSES.entries))


# parity

@pytest.mark.parametrize('case', CASES, ids=lambda c: f"{c['dataset']}-{c['seed']}")
@pytest.mark.parametrize('key', list(KEYS))
def test_parity(case, key):
    name, kw = KEYS[key]
    kw = {**loss_constants(f"{case['dataset']}-lt", name), **kw}
    x = torch.tensor(case['logits'], requires_grad=True)
    value = build_loss(name, case['class_freq'], case['num_train'], **kw)(x, torch.tensor(case['targets']))
    value.backward()
    assert value.item() == pytest.approx(case['loss'][key], rel=1e-5)
    assert x.grad.norm().item() == pytest.approx(case['grad_l2'][key], rel=1e-4)

def test_parity_covers_the_file():
    for case in CASES: assert set(case['loss']) == set(case['grad_l2']) == set(KEYS)

def test_the_file_tells_the_benchmarks_apart():
    "VOC's constants on a COCO case give another number"
    case = next(c for c in CASES if c['dataset'] == 'coco')
    loss = build_loss('db_focal', case['class_freq'], case['num_train'], **loss_constants('voc-lt', 'db_focal'))
    value = loss(torch.tensor(case['logits']), torch.tensor(case['targets'])).item()
    assert abs(value/case['loss']['db_focal_mean'] - 1) > 0.01


# other libraries and identities

def test_bce_is_torch(batch):
    x, y, *_ = batch
    want = F.binary_cross_entropy_with_logits(x, y, reduction='none')
    torch.testing.assert_close(build_loss('bce', reduction='none')(x, y), want)

def test_mls_is_bce_to_the_bit_and_torch(batch):
    x, y, *_ = batch
    assert torch.equal(build_loss('mls')(x, y), build_loss('bce')(x, y))
    torch.testing.assert_close(build_loss('mls')(x, y), torch.nn.MultiLabelSoftMarginLoss()(x, y))

@pytest.mark.parametrize('graded', [False, True])
@pytest.mark.parametrize('gammas', [(4, 0), (4, 1), (2, 2), (0, 0)])
def test_asl_is_timm_in_value_and_gradient(batch, gammas, graded):
    x, y = batch[0].float().requires_grad_(), batch[1].float()
    summed = dict(reduction='sum') if Version(timm.__version__) >= Version('1.0.31') else {} # older ones always sum
    kw = dict(clip=0.05, disable_torch_grad_focal_loss=not graded)
    theirs = timm.loss.AsymmetricLossMultiLabel(*gammas, **kw, **summed)(x, y)/x.numel()
    want, = torch.autograd.grad(theirs, x)
    ours = build_loss('asl', gamma_neg=gammas[0], gamma_pos=gammas[1], focal_grad=graded)(x, y)
    got, = torch.autograd.grad(ours, x)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-7)

def test_focal_is_torchvision(batch):
    ops = pytest.importorskip('torchvision.ops', reason='torchvision is the yardstick')
    x, y, *_ = batch
    want = ops.sigmoid_focal_loss(x, y, alpha=-1, gamma=2, reduction='mean')
    torch.testing.assert_close(build_loss('focal', balance=1.)(x, y), want)

def test_focal_grad_changes_the_gradient_and_not_the_value(batch):
    x, y = batch[0].requires_grad_(), batch[1]
    a, b = build_loss('asl'), build_loss('asl', focal_grad=True)
    assert torch.equal(a(x, y), b(x, y))
    ga, gb = torch.autograd.grad(a(x, y), x)[0], torch.autograd.grad(b(x, y), x)[0]
    assert (ga - gb).norm() > 0.05*ga.norm()

def test_clip_shifts_the_negative_only():
    x = torch.tensor([[-3., -3., 2.]], dtype=torch.float64)
    value = build_loss('asl', reduction='none')(x, torch.tensor([[0, 1, 0]]))[0]
    p_m = torch.sigmoid(torch.tensor(2., dtype=torch.float64)) - 0.05
    assert value[0] == 0
    assert value[1].item() == pytest.approx(np.log1p(np.exp(3.)))
    assert value[2].item() == pytest.approx((-p_m**4*torch.log(1 - p_m)).item())

@pytest.mark.parametrize('max_margin, scale', [(0.5, 1.), (0.5, 30.), (2., 0.7), (0., 1.)])
def test_ldam_is_its_formula_in_float64(batch, max_margin, scale):
    x, y, n, _ = batch
    x, counts = x / scale, np.array([700., 0., 60., 20., 4.])
    root = np.maximum(counts, 1) ** -0.25  # an absent class counts as if it had one image
    z = scale * (x.numpy() - y.numpy() * max_margin * root / root.max())
    want = np.where(y.numpy() > 0, np.log1p(np.exp(-z)), np.log1p(np.exp(z)))
    got = build_loss('ldam', counts, max_margin=max_margin, scale=scale, reduction='none')(x, y)
    np.testing.assert_allclose(got.numpy(), want, rtol=1e-6)

def test_ldam_margins():
    m = losses.rarity_margin(torch.tensor([16., 1., 0., 81.]), 0.6)
    assert m.tolist() == pytest.approx([0.3, 0.6, 0.6, 0.2])
    x, y = torch.tensor([[0.3, -1.]]), torch.tensor([[1., 0.]])
    value = build_loss('ldam', [16, 1], max_margin=0.6, reduction='none')(x, y)[0]
    assert value.tolist() == pytest.approx([np.log(2), np.log1p(np.exp(-1.))]), 'a negative has no margin'

def test_ldam_does_not_depend_on_the_number_of_images():
    x, y = torch.tensor([[0.3, -1.]]), torch.tensor([[1., 0.]])
    assert torch.equal(build_loss('ldam', [16, 1], 99)(x, y), build_loss('ldam', [16, 1])(x, y))

@pytest.mark.parametrize('tau', [0., 0.5, 1., 2.])
def test_logit_adjustment_is_its_formula_in_float64(batch, tau):
    x, y, n, N = batch
    prior = n.numpy() / N
    z = x.numpy() + tau * np.log(prior / (1 - prior))
    want = np.where(y.numpy() > 0, np.log1p(np.exp(-z)), np.log1p(np.exp(z)))
    got = build_loss('la_bce', n, N, tau=tau, reduction='none')(x, y)
    np.testing.assert_allclose(got.numpy(), want, rtol=1e-5)

def test_logit_adjusted_asl_by_hand():
    "A class on 200 of 1,000 images: at x = ln 4 the loss sees z = 0, and p_m = 0.45"
    value = build_loss('la_asl', [200, 200], 1000, reduction='none')(torch.full((1, 2), np.log(4.)), torch.eye(2)[:1])
    assert value[0].tolist() == pytest.approx([np.log(2), -0.45**4 * np.log(0.55)], rel=1e-5)

def test_taking_the_prior_away_undoes_the_adjusted_loss(batch):
    x, y, n, N = batch
    adjusted = losses.adjust_logits(x, n, N, tau=0.5)
    torch.testing.assert_close(build_loss('la_asl', n, N, tau=0.5)(adjusted, y), build_loss('asl')(x, y))

def test_adjusted_logits_keep_the_order_of_images(batch):
    x, _, n, N = batch
    assert torch.equal(losses.adjust_logits(x, n, N).argsort(0), x.argsort(0))

def test_adjusted_logits_are_those_of_the_known_labels():
    "20 of 200 is as frequent as 100 of 1,000"
    x = torch.zeros(1, 2)
    few, many = losses.adjust_logits(x, [20, 100], [200, 1000])[0]
    assert few.item() == pytest.approx(many.item())
    assert few.item() == pytest.approx(np.log(9))

def test_adjusted_logits_of_absent_classes_are_finite():
    assert losses.adjust_logits(torch.zeros(1, 3), [0, 10, 50], 10).isfinite().all()

def test_soft_targets_average_the_two_answers(batch):
    x, _, n, N = batch
    x, n = x[:, :1], n[:1]
    for name in ['bce', 'focal', 'rw_inv', 'cb_focal', 'asl']:
        loss = build_loss(name, n, N)
        no, yes, soft = (loss(x, torch.full_like(x, v)) for v in (0., 1., 0.3))
        torch.testing.assert_close(soft, 0.7*no + 0.3*yes)


# gradients

@pytest.mark.parametrize('name,kw', [*((n, {}) for n in NAMES if 'asl' not in n), ('asl', dict(focal_grad=True)),
    ('la_asl', dict(focal_grad=True)),
    ('asl', dict(gamma_neg=0.5, gamma_pos=0.5, focal_grad=True)), ('asl', dict(gamma_neg=0., gamma_pos=0.)),
    ('focal', dict(gamma=0.5))])
def test_gradcheck(batch, name, kw):
    x, y, n, N = batch
    loss = build_loss(name, n, N, **kw)
    assert torch.autograd.gradcheck(lambda v: loss(v, y), x.requires_grad_(), atol=1e-6)

def test_asl_gradient_with_constant_weight(batch):
    x, y = batch[0].requires_grad_(), batch[1]
    got, = torch.autograd.grad(build_loss('asl', gamma_pos=1, reduction='sum')(x, y), x)
    p = x.detach().sigmoid()
    p_m = (p - 0.05).clamp(min=0)
    want = torch.where(y > 0, -(1 - p)*(1 - p), torch.where(p > 0.05, p_m**4*p*(1 - p)/(1 - p_m), 0.))
    torch.testing.assert_close(got, want)

def test_float64_stays_and_half_is_lifted(batch):
    x, y, n, N = batch
    for name in NAMES:
        loss = build_loss(name, n, N)
        assert loss(x, y).dtype == torch.float64
        for dtype in (torch.float16, torch.bfloat16):
            low = x.to(dtype)
            assert torch.equal(loss(low, y), loss(low.float(), y))


# extremes

@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize('name,kw', [*((n, {}) for n in NAMES),
    ('asl', dict(focal_grad=True, gamma_pos=1)), ('asl', dict(clip=0., focal_grad=True)),
    ('asl', dict(gamma_neg=0.5, gamma_pos=0.5, focal_grad=True)), ('focal', dict(gamma=0.5)),
    ('db_focal', dict(map_beta=0.)), ('cb_focal', dict(beta=0.)), ('ldam', dict(scale=30.))])
def test_finite_everywhere(name, kw, dtype):
    counts, N = [0, 1, 500, 1142, 5000], 1142
    x = torch.tensor([-6e4, -1e4, -100., -20., 0., 20., 100., 1e4, 6e4]).repeat_interleave(2)[:, None].repeat(1, 5)
    y = (torch.arange(len(x)) % 2)[:, None].repeat(1, 5)  # rows without any label among them
    x = x.to(dtype, copy=True).requires_grad_()
    value = build_loss(name, counts, N, reduction='none', **kw)(x, y)
    value.sum().backward()
    assert torch.isfinite(value).all()
    assert (value >= 0).all()
    assert torch.isfinite(x.grad).all()

@pytest.mark.parametrize('name', NAMES)
def test_enormous_logits(name):
    x = torch.tensor([[1e30, -1e30], [1e30, -1e30]], requires_grad=True)
    value = build_loss(name, [3, 3], 10)(x, torch.tensor([[1, 0], [0, 1]]))
    value.backward()
    assert torch.isfinite(value)
    assert torch.isfinite(x.grad).all()

def test_a_sure_answer_costs_nothing_and_a_wrong_one_is_linear():
    y = torch.tensor([[1., 0.]])
    assert build_loss('bce')(torch.tensor([[1e4, -1e4]]), y) == 0
    assert build_loss('bce')(torch.tensor([[-1e4, 1e4]]), y) == 1e4

def test_absent_and_ubiquitous_classes():
    x, y = torch.randn(4, 3, generator=torch.Generator().manual_seed(0)), torch.tensor([[0, 1, 0]]*4)
    for name in COUNTED:
        assert torch.equal(build_loss(name, [0, 10, 5], 10)(x, y), build_loss(name, [1, 10, 5], 10)(x, y))
    n = torch.tensor([0., 1.])
    assert losses.inverse_frequency_weight(n, 10).tolist() == [10., 10.]
    assert losses.class_balanced_weight(n).tolist() == pytest.approx([1., 1.])
    bias = losses.prior_bias(torch.tensor([0., 1., 5., 9., 10., 11.]), 10)
    assert bias[0] == bias[1] < bias[2] == 0 < bias[3] < bias[4] == bias[5]
    assert torch.isfinite(losses.prior_bias(torch.tensor([0., 1.]), 1)).all()

def test_row_without_a_label_has_the_largest_weight():
    w = losses.rebalanced_weight(torch.tensor([[0., 0.], [1., 1.]]), torch.tensor([700., 4.]))
    assert w[0].tolist() == pytest.approx([1.1, 1.1])
    assert w[1, 0] < w[1, 1] <= w[0, 0]

def test_nan_is_not_hidden():
    x = torch.zeros(2, 2)
    x[1, 1] = float('nan')
    for name in NAMES: assert torch.isnan(build_loss(name, [3, 3], 10)(x, torch.zeros(2, 2)))


# reductions, types, devices

@pytest.mark.parametrize('name', NAMES)
def test_reductions(batch, name):
    x, y, n, N = batch
    each, total, mean = (build_loss(name, n, N, reduction=r)(x, y) for r in ('none', 'sum', 'mean'))
    assert each.shape == x.shape
    torch.testing.assert_close(each.sum(), total)
    torch.testing.assert_close(each.mean(), mean)
    assert torch.equal(build_loss(name, n, N)(x, y), mean), 'mean is the default'

@pytest.mark.parametrize('name', COUNTED)
@pytest.mark.parametrize('kind', [list, np.asarray, torch.as_tensor, lambda v: torch.as_tensor(v).float()])
def test_counts_of_any_kind(batch, name, kind):
    x, y, n, N = batch
    assert torch.equal(build_loss(name, kind(n.tolist()), N)(x, y), build_loss(name, n, N)(x, y))

@pytest.mark.parametrize('dtype', [torch.uint8, torch.bool, torch.int64, torch.float16])
def test_targets_of_any_type(batch, dtype):
    x, y, n, N = batch
    for name in NAMES: assert torch.equal(build_loss(name, n, N)(x, y.to(dtype)), build_loss(name, n, N)(x, y))

def test_counts_are_no_part_of_a_checkpoint(batch):
    *_, n, N = batch
    for name in NAMES: assert not build_loss(name, n, N).state_dict()

@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason='no CUDA device')
@pytest.mark.parametrize('name', NAMES)
def test_cuda(batch, name):
    x, y, n, N = batch
    loss = build_loss(name, n, N)  # left on the CPU: the constants follow the logits
    torch.testing.assert_close(loss(x.cuda(), y.cuda()).cpu(), loss(x, y))


# registry

def test_every_name_is_listed_in_order(): assert available_losses()[:len(NAMES)] == NAMES

@pytest.mark.parametrize('name', NAMES)
def test_counts_may_always_be_passed(name):
    assert build_loss(name, [5, 3], 10)(torch.zeros(1, 2), torch.zeros(1, 2)).ndim == 0

def test_documented_classes_and_defaults():
    for cls in ('BCELoss', 'MultiLabelSoftMarginLoss', 'FocalLoss', 'ReweightedBCELoss', 'ClassBalancedFocalLoss',
                'DistributionBalancedLoss', 'LDAMLoss', 'AsymmetricLoss', 'LogitAdjustedLoss'):
        assert inspect.signature(getattr(losses, cls)).parameters['reduction'].default == 'mean'
    assert loss_keywords('asl') == dict(gamma_neg=4, gamma_pos=0, clip=0.05, focal_grad=False, reduction='mean')
    assert loss_keywords('db_focal') == dict(gamma=2, balance=None, map_alpha=0.1, map_beta=10, map_gamma=0.3,
                                             neg_scale=5, init_bias=0.05, reduction='mean')
    assert loss_keywords('cb_focal') == dict(beta=0.9, gamma=2, balance=2, scale=10,
                                             neg_scale=5, init_bias=0.05, reduction='mean')
    assert loss_keywords('ldam') == dict(max_margin=0.5, scale=1, reduction='mean')
    assert loss_keywords('rw_inv') == dict(reduction='mean')
    assert loss_keywords('la_bce') == dict(tau=1, reduction='mean')
    assert loss_keywords('db_nofocal').keys() == loss_keywords('db_focal').keys() - {'gamma'}

def test_constants():
    assert loss_constants('voc-lt') == loss_constants('shapes-lt') == dict(map_gamma=0.3, neg_scale=5)
    assert loss_constants('coco-lt') == dict(map_gamma=0.2, neg_scale=2)
    for benchmark in ('voc-lt', 'coco-lt', 'shapes-lt'):
        for name in NAMES: build_loss(name, [3], 10, **loss_constants(benchmark, name))
    loss_constants('coco-lt')['map_gamma'] = 9
    assert loss_constants('coco-lt')['map_gamma'] == 0.2, 'a copy is handed out'

def test_own_loss(clean_registry):
    @register_loss('half_bce', factor=0.5)
    class Scaled(losses.MultiLabelLoss):
        def __init__(self, factor=1., reduction='mean'):
            super().__init__(reduction)
            self.factor = factor
        def elements(self, x, y): return self.factor*losses.bce(x, y)
    assert 'half_bce' in available_losses()
    x, y = torch.zeros(2, 2), torch.ones(2, 2)
    torch.testing.assert_close(build_loss('half_bce')(x, y), 0.5*build_loss('bce')(x, y))
    with pytest.raises(TypeError, match='expected keywords among reduction, got factor'):
        build_loss('half_bce', factor=2.)

def test_own_function_and_open_keywords(clean_registry):
    @register_loss('fn')
    def make(class_counts=None, **kw): return lambda x, y: (class_counts, kw)
    assert build_loss('fn', [1], 5, anything=3)(None, None) == ([1], {'anything': 3})

def test_registering_again(clean_registry):
    register_loss('bce')(losses.BCELoss)
    with pytest.raises(ValueError, match="loss: 'bce' is taken by cprfl.losses.BCELoss"):
        register_loss('bce')(losses.FocalLoss)

def test_base_class_asks_for_elements():
    with pytest.raises(NotImplementedError, match='must define elements'):
        losses.MultiLabelLoss()(torch.zeros(1, 1), torch.zeros(1, 1))


# errors

def test_unknown_name():
    with pytest.raises(ValueError, match="loss: expected one of bce, mls, focal, .*got 'ASL'"): build_loss('ASL')

@pytest.mark.parametrize('name', NAMES)
def test_unknown_keyword(name):
    with pytest.raises(TypeError, match=f"loss '{name}': expected keywords among .*reduction, got gama, x"):
        build_loss(name, [1], 2, gama=2, x=1)

@pytest.mark.parametrize('name', WITH_N)
def test_missing_counts(name):
    with pytest.raises(ValueError, match='missing: class_counts, num_samples; expected build_loss'): build_loss(name)
    with pytest.raises(ValueError, match='missing: num_samples'): build_loss(name, class_counts=[1, 2])

def test_ldam_needs_counts_alone():
    with pytest.raises(ValueError, match='missing: class_counts; expected build_loss'):
        build_loss('ldam', num_samples=9)
    assert build_loss('ldam', [5, 3])(torch.zeros(1, 2), torch.zeros(1, 2)).isfinite()

@pytest.mark.parametrize('name', NAMES)
def test_reduction_error(name):
    with pytest.raises(ValueError, match="reduction: expected one of mean, sum, none, got 'average'"):
        build_loss(name, [1], 2, reduction='average')

def test_unknown_benchmark():
    with pytest.raises(ValueError, match="benchmark: expected one of voc-lt, coco-lt, shapes-lt, got 'voc'"):
        loss_constants('voc')

@pytest.mark.parametrize('counts,N,match', [
    ([[1, 2]], 5, r'class_counts: expected one number per class \[C\], got shape \[1, 2\]'),
    ([], 5, 'one number per class'), ([-1, 2], 5, 'counts >= 0'), ([float('nan'), 2], 5, 'counts >= 0'),
    ([1, 2], 0, 'num_samples: expected')])
def test_bad_counts(counts, N, match):
    for name in WITH_N if N < 1 else COUNTED:
        with pytest.raises(ValueError, match=match): build_loss(name, counts, N)

@pytest.mark.parametrize('name', COUNTED)
def test_counts_of_other_classes(name):
    with pytest.raises(ValueError, match=r'class_counts has 3 classes, logits \[1, 2\] have 2'):
        build_loss(name, [1, 2, 3], 9)(torch.zeros(1, 2), torch.zeros(1, 2))

@pytest.mark.parametrize('name,kw,match', [
    ('focal', dict(gamma=-1), 'gamma: expected at least 0'), ('focal', dict(gamma=float('inf')), 'gamma: expected'),
    ('asl', dict(clip=1.), 'clip: expected at least 0 and below 1, got 1'), ('asl', dict(gamma_neg=-1), 'gamma_neg'),
    ('ldam', dict(max_margin=-0.1), 'max_margin: expected at least 0'), ('ldam', dict(scale=0), 'scale'),
    ('la_bce', dict(tau=-1), 'tau: expected at least 0'), ('la_asl', dict(clip=5), 'clip: expected'),
    ('cb_focal', dict(beta=1.), 'beta: expected at least 0 and below 1'), ('db_focal', dict(neg_scale=0), 'neg_scale'),
    ('asl', dict(gamma_pos=float('nan')), 'gamma_pos')])
def test_out_of_range(name, kw, match):
    with pytest.raises(ValueError, match=match): build_loss(name, [1], 2, **kw)

@pytest.mark.parametrize('name', NAMES)
def test_bad_input(name):
    loss = build_loss(name, [1, 2], 9)
    z = torch.zeros
    with pytest.raises(ValueError, match=r'one shape \[B, C\], got \[3, 2\] and \[2, 3\]'): loss(z(3, 2), z(2, 3))
    with pytest.raises(ValueError, match=r'got \[2\] and \[2\]'): loss(z(2), z(2))
    with pytest.raises(ValueError, match='at least one image'): loss(z(0, 2), z(0, 2))
    with pytest.raises(ValueError, match='targets: expected 0 or 1 .*got -2 to 0'):
        loss(z(1, 2), torch.tensor([[0, -2]]))
    with pytest.raises(ValueError, match='targets: expected 0 or 1'): loss(z(1, 2), torch.tensor([[0, float('nan')]]))
    with pytest.raises(TypeError, match='logits: expected floating point, got torch.int64'):
        loss(z(1, 2).long(), z(1, 2))
    with pytest.raises(TypeError, match='targets: expected a tensor .*got ndarray'): loss(z(1, 2), np.zeros((1, 2)))
