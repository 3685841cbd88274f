"Scores of images that a run predicts"
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from cprfl.decisions import NO, UNSURE, YES, Decisions
from cprfl.runs.predict import predict_images


def decisions(slope, margin=1.):
    zeros = np.zeros(2)
    return Decisions(['cat', 'dog'], zeros, np.full(2, slope), zeros, np.ones(2), 0.5, 10, 1., margin)


class Certain(torch.nn.Module):
    "Logits at which a sigmoid in float32 is 1"
    def forward(self, x): return torch.tensor([[20., 30.]]).expand(len(x), 2)


def test_certain_scores_keep_their_order():
    run = SimpleNamespace(model=Certain, recipe=SimpleNamespace(image_size=8))
    [(_, scores)] = predict_images(run, [np.zeros((8, 8, 3), np.uint8)], device='cpu', progress=False)
    assert scores[0] < scores[1] < 1


@pytest.mark.parametrize('slope', [0., 2.])
def test_infinite_logits_are_decided(slope):
    assert decisions(slope).decide([np.inf, -np.inf]).tolist() == ([YES, NO] if slope else [UNSURE, UNSURE])


@pytest.mark.parametrize('margin', [0., 1.])
def test_what_is_no_number_is_left_open(margin):
    assert decisions(1., margin).decide([np.nan, 2.]).tolist() == [UNSURE, YES]


@pytest.mark.filterwarnings('error')
def test_distances_are_finite():
    assert np.isfinite(decisions(2.).distances([np.inf, -np.inf])).all()
