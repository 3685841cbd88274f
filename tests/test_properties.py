"Losses and metrics over extreme logits and any targets: finite, right gradients, equal to float64"
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import average_precision_score

from cprfl.losses import available_losses, build_loss
from cprfl.metrics import average_precision, multilabel_report

EXTREMES = [0.0, 1e-30, -1e-30, 1.0, -1.0, 20.0, -20.0, 88.8, -88.8, 1e4, -1e4]
DIFFERENTIABLE = ['bce', 'mls', 'focal', 'cb_focal', 'db_focal', 'db_nofocal', 'rw_inv', 'rw_sqrt_inv']
quick = settings(max_examples=40, deadline=None, derandomize=True)


@st.composite
def batches(draw, max_images=6, max_classes=5):
    "Logits of any size and any targets: all negative, all positive, one image, one class"
    B, C = draw(st.integers(1, max_images)), draw(st.integers(1, max_classes))
    n = B * C
    number = st.one_of(st.sampled_from(EXTREMES), st.floats(-30, 30, width=32))
    mixed = st.lists(st.integers(0, 1), min_size=n, max_size=n)
    logits = draw(st.lists(number, min_size=n, max_size=n))
    targets = draw(st.one_of(st.just([0] * n), st.just([1] * n), mixed))
    return torch.tensor(logits).view(B, C).float(), torch.tensor(targets).view(B, C).float()


def loss_of(name, C): return build_loss(name, np.arange(1, C + 1) * 3, 100)


@pytest.mark.parametrize('name', available_losses())
@given(batch=batches())
@quick
def test_losses_are_finite_with_finite_gradients(name, batch):
    logits, targets = batch[0].clone().requires_grad_(), batch[1]
    loss = loss_of(name, logits.shape[1])(logits, targets)
    loss.backward()
    assert loss.ndim == 0
    assert torch.isfinite(loss)
    assert torch.isfinite(logits.grad).all()


@pytest.mark.parametrize('name', available_losses())
@given(batch=batches())
@quick
def test_losses_equal_themselves_in_float64(name, batch):
    logits, targets = batch
    loss = loss_of(name, logits.shape[1])
    exact = loss.double()(logits.double(), targets.double())
    assert torch.allclose(loss.float()(logits, targets).double(), exact, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize('name', DIFFERENTIABLE)
@given(batch=batches(3, 3))
@settings(max_examples=15, deadline=None, derandomize=True)
def test_gradients_are_those_of_finite_differences(name, batch):
    "In float64, at moderate logits; ASL holds its focal weight constant, so its gradient is another"
    logits, targets = batch[0].double().clamp(-8, 8) + 0.01, batch[1].double()
    loss = loss_of(name, logits.shape[1]).double()
    assert torch.autograd.gradcheck(lambda x: loss(x, targets), logits.requires_grad_(), eps=1e-6, atol=1e-5)


@given(batch=batches(12, 4))
@quick
def test_average_precision_is_scikit_learns(batch):
    scores, targets = batch
    step = torch.arange(len(scores)).view(-1, 1) * (1 + scores.abs())
    scores = scores + 1e-3 * step # without ties there is one order
    ap = average_precision(scores, targets)
    for c, (s, t) in enumerate(zip(scores.T.numpy(), targets.T.numpy())):
        if t.sum() == 0: assert torch.isnan(ap[c])
        elif len(np.unique(s)) == len(s):
            assert ap[c].item() == pytest.approx(average_precision_score(t, s), abs=1e-5)


@given(batch=batches(12, 4))
@quick
def test_reports_never_fail(batch):
    scores, targets = batch
    medium = list(range(1, scores.shape[1]))
    report = multilabel_report(scores, targets, {'head': [0], 'medium': medium, 'tail': []})
    assert np.isfinite(report['total']) == bool(targets.any())
    assert np.isnan(report['tail'])
