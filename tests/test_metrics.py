"Metrics: the authors' figures, scikit-learn and torchmetrics as yardsticks, ties, errors"
import json
import warnings

import numpy as np
import pytest
import torch
from helpers import FIXTURES

from cprfl.metrics import average_precision, format_report, group_means, multilabel_report, topk_predictions

CASES = json.loads((FIXTURES/'metrics.json').read_text())
FIGURES = ['OP', 'OR', 'OF1', 'CP', 'CR', 'CF1']
GROUPS = {'head': [0, 1, 2, 3], 'medium': [4, 5, 6, 7], 'tail': [8, 9, 10, 11]}

@pytest.fixture
def data():
    rng = np.random.default_rng(0)
    targets = (rng.random((300, 12)) < 0.2).astype(np.uint8)
    return rng.normal(size=(300, 12)) + targets, targets


# parity

@pytest.mark.parametrize('case', CASES, ids=lambda c: f"{c['seed']}-{c['threshold']}")
@pytest.mark.parametrize('kind', [torch.tensor, np.array])
def test_parity(case, kind):
    r = multilabel_report(kind(case['logits']), kind(case['targets']), GROUPS, threshold=case['threshold'])
    np.testing.assert_allclose(r['ap'], case['ap'], rtol=1e-5)
    assert r['total'] == pytest.approx(np.mean(case['ap']), rel=1e-5)
    for i, g in enumerate(GROUPS): assert r[g] == pytest.approx(np.mean(case['ap'][4*i:4*i + 4]), rel=1e-5)
    for f in FIGURES:
        assert r[f] == pytest.approx(case['overall'][f], rel=1e-5)
        assert r[f'{f}_top3'] == r['topk'][f] == pytest.approx(case['top3'][f], rel=1e-5)


# average precision

@pytest.mark.parametrize('decimals', [None, 2, 1, 0])
@pytest.mark.parametrize('dtype', [np.float64, np.float32])
def test_is_scikit_learn_with_and_without_ties(data, decimals, dtype):
    metrics = pytest.importorskip('sklearn.metrics', reason='scikit-learn is the yardstick')
    scores, targets = data
    scores = (scores if decimals is None else scores.round(decimals)).astype(dtype)
    want = metrics.average_precision_score(targets, scores, average=None)
    np.testing.assert_allclose(average_precision(scores, targets), want, rtol=1e-12)

@pytest.mark.parametrize('seed', range(20))
def test_is_scikit_learn_on_small_tied_cases(seed):
    metrics = pytest.importorskip('sklearn.metrics', reason='scikit-learn is the yardstick')
    rng = np.random.default_rng(seed)
    n = rng.integers(1, 9)
    scores, targets = rng.integers(0, 3, (n, 6)).astype(float), rng.integers(0, 2, (n, 6))
    got = average_precision(scores, targets)
    for c in range(6):
        want = metrics.average_precision_score(targets[:, c], scores[:, c]) if targets[:, c].any() else np.nan
        assert got[c] == pytest.approx(want, rel=1e-12, nan_ok=True)

def test_is_torchmetrics(data):
    tm = pytest.importorskip('torchmetrics.classification', reason='torchmetrics is the yardstick')
    scores, targets = torch.tensor(data[0]).float().sigmoid(), torch.tensor(data[1]).long()
    want = tm.MultilabelAveragePrecision(num_labels=12, average='none', thresholds=None)(scores, targets)
    torch.testing.assert_close(average_precision(scores, targets).float(), want, rtol=1e-5, atol=1e-6)

def test_order_of_images_does_not_matter_under_ties(data):
    scores, targets = data[0].round(0), data[1]
    shuffled = np.random.default_rng(1).permutation(len(scores))
    want = average_precision(scores, targets)
    np.testing.assert_allclose(average_precision(scores[shuffled], targets[shuffled]), want, rtol=1e-12)

def test_edges():
    one = np.ones((4, 1))
    assert average_precision(np.arange(4.)[:, None], one) == 1
    assert average_precision(np.zeros((4, 1)), [[1], [0], [0], [0]]) == 0.25, 'all tied: the prevalence'
    assert average_precision([[0.5]], [[1]]) == 1
    assert np.isnan(average_precision([[0.5]], [[0]])).all()
    np.testing.assert_allclose(average_precision([[-np.inf], [0.], [np.inf]], [[0], [0], [1]]), [1.])

def test_kind_in_is_kind_out(data):
    scores, targets = data
    a, t = average_precision(scores, targets), average_precision(torch.tensor(scores), targets)
    assert isinstance(a, np.ndarray)
    assert a.dtype == np.float64
    assert a.shape == (12,)
    assert isinstance(t, torch.Tensor)
    assert t.dtype == torch.float64
    np.testing.assert_array_equal(a, t.numpy())
    np.testing.assert_array_equal(a, average_precision(scores, targets.astype(bool)))
    np.testing.assert_array_equal(a, average_precision(scores.tolist(), targets.tolist()))

def test_inputs_are_left_alone_and_gradients_do_not_matter(data):
    scores = torch.tensor(data[0], requires_grad=True)
    before = scores.detach().clone()
    ap = average_precision(scores, torch.tensor(data[1]))
    assert not ap.requires_grad
    assert torch.equal(scores, before)

@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason='no CUDA device')
def test_cuda(data):
    scores, targets = torch.tensor(data[0]), torch.tensor(data[1])
    got = average_precision(scores.cuda(), targets.cuda())
    assert got.is_cuda
    torch.testing.assert_close(got.cpu(), average_precision(scores, targets))
    on_gpu = multilabel_report(scores.cuda(), targets.cuda(), GROUPS)
    on_cpu = multilabel_report(scores, targets, GROUPS)
    for k in ['total', *GROUPS, *FIGURES]: assert on_gpu[k] == pytest.approx(on_cpu[k])


# half precision

@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def test_half_logits_are_lifted_before_the_sigmoid(data, dtype):
    low = torch.tensor(data[0]).to(dtype)
    a, b = multilabel_report(low, data[1], GROUPS), multilabel_report(low.float(), data[1], GROUPS)
    np.testing.assert_array_equal(a['ap'], b['ap'])
    assert all(a[f] == b[f] for f in FIGURES)

def test_saturated_logits_keep_their_order():
    logits = torch.linspace(20, 30, 100)[:, None]
    targets = (torch.arange(100) >= 90)[:, None]
    assert multilabel_report(logits, targets)['total'] == 1
    assert average_precision(logits.sigmoid(), targets).item() == pytest.approx(0.1), 'float32 sigmoids are all 1 there'


# groups

def test_group_means_leave_out_nan():
    groups = {'head': [0, 1], 'medium': torch.tensor([2]), 'tail': (3,), 'none': []}
    m = group_means(np.array([.9, np.nan, .3, np.nan]), groups)
    assert (m['total'], m['head'], m['medium']) == pytest.approx((.6, .9, .3))
    assert np.isnan(m['tail'])
    assert np.isnan(m['none'])
    assert list(m) == ['total', 'head', 'medium', 'tail', 'none']

def test_group_masks_and_tensors():
    ap = torch.tensor([.2, .4, .6], dtype=torch.float64)
    assert group_means(ap, {'g': np.array([True, False, True])})['g'] == pytest.approx(.4)
    assert group_means(ap) == {'total': pytest.approx(.4)}

def test_no_warning_where_nothing_is_measured():
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        r = multilabel_report(np.zeros((3, 2)), np.zeros((3, 2)), {'head': [0], 'tail': [1]})
    assert r['num_empty'] == 2
    assert all(np.isnan(r[k]) for k in ('total', 'head', 'tail', 'CP', 'CR', 'CF1'))
    assert r['OP'] == r['OR'] == r['OF1'] == 0


# decisions

def by_hand(predicted, targets):
    "The six figures with loops"
    tp = lambda c: sum(bool(p[c] and t[c]) for p, t in zip(predicted, targets))
    made, true = (lambda c: sum(map(bool, predicted[:, c]))), (lambda c: sum(map(bool, targets[:, c])))
    C = [c for c in range(targets.shape[1])]
    seen = [c for c in C if true(c)]
    op, or_ = sum(map(tp, C))/sum(map(made, C)), sum(map(tp, C))/sum(map(true, C))
    cp = np.mean([tp(c)/made(c) if made(c) else 0. for c in seen])
    cr = np.mean([tp(c)/true(c) for c in seen])
    return [op, or_, 2*op*or_/(op + or_), cp, cr, 2*cp*cr/(cp + cr)]

@pytest.mark.parametrize('threshold', [0.2, 0.5, 0.9])
@pytest.mark.parametrize('k', [1, 3, 12])
def test_figures_by_hand(data, threshold, k):
    logits, targets = data[0].copy(), data[1].copy()
    targets[:, 2] = 0      # a class without a positive
    logits[:, 5] = -9      # a class that nothing is predicted for
    r = multilabel_report(logits, targets, threshold=threshold, topk=k)
    predicted = 1/(1 + np.exp(-logits)) >= threshold
    best = np.argsort(np.argsort(-logits, axis=1), axis=1) < k
    assert [r[f] for f in FIGURES] == pytest.approx(by_hand(predicted, targets))
    assert [r[f'{f}_top{k}'] for f in FIGURES] == pytest.approx(by_hand(predicted & best, targets))
    assert r['num_empty'] == 1
    assert np.isnan(r['ap'][2])

def test_threshold_is_inclusive():
    r = multilabel_report(np.zeros((1, 1)), np.ones((1, 1)), threshold=0.5)
    assert r['OP'] == r['OR'] == 1

def test_topk_of_all_classes_is_the_threshold_alone(data):
    r = multilabel_report(*data, GROUPS, topk=50)
    assert [r[f] for f in FIGURES] == [r[f'{f}_top50'] for f in FIGURES]

def test_report_keys_and_types(data):
    r = multilabel_report(*data, GROUPS)
    assert {'total', 'head', 'medium', 'tail', 'ap', *FIGURES, *(f'{f}_top3' for f in FIGURES)} <= set(r)
    assert r['topk']['k'] == 3
    assert (r['num_images'], r['num_classes'], r['num_empty'], r['threshold']) == (300, 12, 0, 0.5)
    assert all(type(r[k]) is float and 0 <= r[k] <= 1 for k in ['total', *GROUPS, *FIGURES])
    json.dumps({k: v for k, v in r.items() if k != 'ap'})

def test_topk_predictions():
    idx, score = topk_predictions(np.array([[0., 2., -1., 2.], [3., 2., 1., 0.]]), k=2)
    assert idx.tolist() == [[1, 3], [0, 1]], 'of equal scores, the lower class first'
    np.testing.assert_allclose(score, 1/(1 + np.exp(-np.array([[2., 2.], [3., 2.]]))))
    assert isinstance(topk_predictions(torch.zeros(1, 4))[0], torch.Tensor)
    assert topk_predictions(torch.zeros(1, 2), k=5)[0].shape == (1, 2)

def test_format_report(data):
    targets = data[1].copy()
    targets[:, 4] = 0
    r = multilabel_report(data[0], targets, GROUPS)
    text = format_report(r, [f'thing {c}' for c in range(12)])
    for k in ('total', 'head', 'medium', 'tail', *FIGURES):
        assert k in text
        assert f'{100*r[k]:.2f}' in text
    assert '1 of 12 classes have no positive' in text
    assert 'nan' not in text
    rows = text.split('\n\n')[1].splitlines()
    assert len(rows) == 12
    assert rows[0].startswith(f"thing {np.nanargmax(r['ap'])} ")
    assert rows[-1].startswith('thing 4 ')
    assert len(format_report(r).splitlines()) == 4


# errors

def test_bad_scores(data):
    scores, targets = data
    broken = scores.copy()
    broken[[3, 17], 2] = np.nan
    for f in (average_precision, multilabel_report):
        with pytest.raises(ValueError, match='scores: NaN in 2 of 300 rows: 3, 17'): f(broken, targets)
    with pytest.raises(ValueError, match='NaN in 2 of 300 rows: 3, 17'): topk_predictions(broken)
    with pytest.raises(ValueError, match='rows: 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, ...'):
        average_precision(scores*np.nan, targets)

@pytest.mark.parametrize('f', [average_precision, multilabel_report])
def test_bad_shapes(f):
    with pytest.raises(ValueError, match=r'one shape \[N, C\], got \[3, 2\] and \[2, 3\]'):
        f(np.zeros((3, 2)), np.zeros((2, 3)))
    with pytest.raises(ValueError, match=r'expected \[N, C\] .*got \[3\]'): f(np.zeros(3), np.zeros(3))
    with pytest.raises(ValueError, match='at least one image'): f(np.zeros((0, 3)), np.zeros((0, 3)))

@pytest.mark.parametrize('bad', [-2, 2, 0.5, np.nan])
def test_bad_targets(bad):
    targets = np.zeros((4, 2))
    targets[2, 1] = bad
    with pytest.raises(ValueError, match=r'targets: expected 0 or 1, got .* in row 2 \(rows 2\)'):
        average_precision(np.zeros((4, 2)), targets)

def test_bad_arguments(data):
    with pytest.raises(ValueError, match=r"group 'tail': expected class indices in 0..11, got 3..12"):
        multilabel_report(*data, {'tail': [3, 12]})
    with pytest.raises(ValueError, match='expected class indices in 0..11, got -1'):
        multilabel_report(*data, {'tail': [-1]})
    with pytest.raises(ValueError, match='groups: OP, total would hide'):
        multilabel_report(*data, {'OP': [1], 'total': [2]})
    with pytest.raises(ValueError, match='threshold: expected 0 to 1, got 50'): multilabel_report(*data, threshold=50)
    with pytest.raises(ValueError, match='k: expected at least 1, got 0'): multilabel_report(*data, topk=0)
    with pytest.raises(ValueError, match='classes: expected 12 names, got 2'):
        format_report(multilabel_report(*data), ['a', 'b'])


# probabilities in place of logits

@pytest.fixture
def probabilities(data): return torch.tensor(data[0]).sigmoid()

def test_probabilities_are_noticed(data, probabilities):
    with pytest.warns(UserWarning, match='look like probabilities.*pass probabilities=True'):
        multilabel_report(probabilities, data[1])

@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_probabilities_have_the_figures_of_their_logits(data, probabilities, dtype):
    logits = torch.logit(probabilities.to(dtype).double())
    a = multilabel_report(probabilities.to(dtype), data[1], GROUPS, probabilities=True)
    b = multilabel_report(logits, data[1], GROUPS)
    for figure in ('total', 'tail', *FIGURES): assert a[figure] == pytest.approx(b[figure], abs=1e-6)

@pytest.mark.parametrize('scores', ['logits', 'zeros', 'said to be logits'])
def test_logits_bring_no_warning(data, probabilities, scores):
    given = {'logits': data[0], 'zeros': np.zeros((300, 12)), 'said to be logits': probabilities}[scores]
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        multilabel_report(given, data[1], probabilities=False if scores == 'said to be logits' else None)

def test_logits_are_no_probabilities(data):
    with pytest.raises(ValueError, match='probabilities: expected scores in 0..1, got -'):
        multilabel_report(*data, probabilities=True)


# a threshold for each class

@pytest.mark.parametrize('kind', [list, tuple, np.array, torch.tensor])
def test_a_threshold_for_each_class(data, kind):
    limits = np.linspace(0.2, 0.8, 12).tolist()
    r = multilabel_report(*data, threshold=kind(limits))
    predicted = 1/(1 + np.exp(-data[0])) >= limits
    assert [r[f] for f in FIGURES] == pytest.approx(by_hand(predicted, data[1]))
    assert r['threshold'] == pytest.approx(limits)
    assert format_report(r).splitlines()[1].startswith('at its own ')

@pytest.mark.parametrize('threshold, error, why', [
    ([0.5, 0.4], ValueError, 'one number, or one for each of 12 classes, got \\[2\\]'),
    ([0.5] * 11 + [2.], ValueError, 'threshold: expected 0 to 1, got 2'),
    (float('nan'), ValueError, 'threshold: expected 0 to 1, got nan'),
    ('half', TypeError, 'threshold: expected numbers between 0 and 1, got str')])
def test_bad_thresholds(data, threshold, error, why):
    with pytest.raises(error, match=why): multilabel_report(*data, threshold=threshold)


# other mistakes

@pytest.mark.parametrize('dtype', [bool, np.uint8, np.uint16, np.uint64, np.int8, np.int64, np.float16, object])
def test_targets_of_any_type(data, dtype):
    np.testing.assert_array_equal(average_precision(data[0], data[1].astype(dtype)), average_precision(*data))

def test_bytes_of_255_are_no_labels(data):
    with pytest.raises(ValueError, match='targets: expected 0 or 1, got'): average_precision(data[0], data[1] * 255)

def test_swapped_arguments(data):
    with pytest.raises(ValueError, match='are scores and targets swapped'): average_precision(data[1], data[0])

@pytest.mark.parametrize('bad', ['scores', [[1., 2.], [3.]], np.array([['a', 'b']]), np.ones((3, 12), complex)])
def test_what_is_no_table_of_numbers(bad):
    with pytest.raises(TypeError, match=r'scores: expected numbers \[N, C\], got'):
        average_precision(bad, np.zeros((3, 12)))
