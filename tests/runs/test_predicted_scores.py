"Scores of images that a run predicts"
from types import SimpleNamespace

import numpy as np
import torch

from cprfl.decisions import Decisions
from cprfl.runs.predict import predict_images


class Certain(torch.nn.Module):
    "Logits at which a sigmoid in float32 is 1"
    def forward(self, x): return torch.tensor([[20., 30.]]).expand(len(x), 2)


def test_certain_scores_keep_their_order():
    run = SimpleNamespace(model=Certain, recipe=SimpleNamespace(image_size=8))
    [(_, scores)] = predict_images(run, [np.zeros((8, 8, 3), np.uint8)], device='cpu', progress=False)
    assert scores[0] < scores[1] < 1


def test_infinite_logits_are_decided():
    decisions = Decisions(['cat'], np.zeros(1), np.zeros(1), np.zeros(1), np.ones(1), 0.5, 10, 1., 1.)
    assert decisions.distances([[np.inf]]).tolist() == [[0.]]
