"Scoring rules: average precision by hand, and what a rule must leave alone"
import numpy as np
import pytest
import torch

from cprfl.metrics import average_precision, multilabel_report
from cprfl.scoring import SCORE_RULES, ranking_scores

#                        logit  softmax  standardised  norm     of the first class
LOGITS = torch.tensor([
    [2., 3., -5.], #     2.0    0.269    0.562         0.324
    [1., -4., -4.], #    1.0    0.987    1.414         0.174
    [1.5, 1., -1.]]) #   1.5    0.592    0.926         0.728
FIRST_IMAGE = torch.tensor([[1, 0, 0], [0, 1, 0], [0, 0, 1]])


@pytest.mark.parametrize('rule, expected', dict(sigmoid=1, softmax=1/3, standardised=1/3, norm=1/2).items())
def test_average_precision_by_hand(rule, expected):
    assert multilabel_report(LOGITS, FIRST_IMAGE, score_rule=rule)['ap'][0] == pytest.approx(expected)


@pytest.mark.parametrize('rule, expected', dict(softmax=1, standardised=1/2).items())
def test_softmax_and_standardised_differ_by_hand(rule, expected):
    z = torch.tensor([[3., 0., -3.], [1., -.5, -.5]]) # softmax 0.950 and 0.691, standardised 1.225 and 1.414
    report = multilabel_report(z, torch.tensor([[1, 0, 0], [0, 1, 0]]), score_rule=rule)
    assert report['ap'][0] == pytest.approx(expected)


@pytest.mark.parametrize('rule', SCORE_RULES)
def test_groups_are_means_of_the_rules_ap(rule):
    report = multilabel_report(LOGITS, FIRST_IMAGE, dict(rare=[0, 1]), score_rule=rule)
    assert report['rare'] == pytest.approx(report['ap'][:2].mean())


@pytest.mark.parametrize('rule', SCORE_RULES)
def test_decisions_do_not_depend_on_the_rule(rule):
    plain, other = (multilabel_report(LOGITS, FIRST_IMAGE, score_rule=r) for r in ('sigmoid', rule))
    figures = [name for name in plain if name.startswith(('O', 'C'))]
    assert [other[name] for name in figures] == [plain[name] for name in figures]


@pytest.mark.parametrize('rule', SCORE_RULES)
def test_unknown_labels_are_left_out_under_each_rule(rule):
    targets = FIRST_IMAGE.clone()
    targets[1, 0] = -1
    kept = ranking_scores(LOGITS, rule)[[0, 2], :1]
    expected = average_precision(kept, targets[[0, 2], :1])
    assert multilabel_report(LOGITS, targets, score_rule=rule)['ap'][0] == pytest.approx(expected.item())


def test_the_sigmoid_leaves_infinite_logits_alone():
    z = torch.tensor([[torch.inf, 0.], [0., -torch.inf]])
    assert torch.equal(ranking_scores(z), z)


@pytest.mark.parametrize('rule', ['softmax', 'standardised', 'norm'])
def test_large_logits_do_not_overflow(rule):
    z = torch.tensor([[1e30, 2e30, 0.], [5e4, -5e4, 1e-30]])
    assert ranking_scores(z, rule).isfinite().all()


@pytest.mark.parametrize('rule', ['standardised', 'norm'])
def test_an_image_without_contrast_scores_zero(rule):
    assert ranking_scores(torch.zeros(1, 4), rule).tolist() == [[0.] * 4]


@pytest.mark.parametrize('rule', ['softmax', 'standardised'])
def test_a_shift_of_an_image_changes_nothing(rule):
    shift = torch.tensor([[5.], [-3.], [0.5]])
    torch.testing.assert_close(ranking_scores(LOGITS + shift, rule), ranking_scores(LOGITS, rule))


@pytest.mark.parametrize('rule', ['standardised', 'norm'])
def test_a_factor_of_an_image_changes_nothing(rule):
    factor = torch.tensor([[5.], [0.1], [2.]])
    torch.testing.assert_close(ranking_scores(LOGITS * factor, rule), ranking_scores(LOGITS, rule),
                               rtol=1e-6, atol=1e-6)


def test_numpy_logits_have_a_rule_too():
    report = multilabel_report(LOGITS.numpy(), FIRST_IMAGE.numpy(), score_rule='softmax')
    assert report['ap'][0] == pytest.approx(1/3)


def test_a_report_names_its_rule():
    assert multilabel_report(LOGITS, FIRST_IMAGE, score_rule='norm')['score_rule'] == 'norm'


def test_a_group_may_not_be_called_like_an_entry():
    with pytest.raises(ValueError, match='score_rule would hide an entry'):
        multilabel_report(np.zeros((2, 3)), np.eye(3)[:2], dict(score_rule=[0]))
