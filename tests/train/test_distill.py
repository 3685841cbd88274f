"A backbone that learns stays near what it was"
import pytest
import torch
from test_callbacks import asks_to_stop
from toys import feature_model, paint, picture_model, same, toy

from cprfl.train.callbacks import Callback
from cprfl.train.distill import Distill, distance_to, image_embedding

WITH = dict(epochs=2, distill=0.5, augment='standard')


class Watch(Callback):
    "Notes the loss before and after the distance is added"
    def __init__(self, order): self.order, self.losses = order, []
    def after_loss(self, trainer): self.losses.append(trainer.loss.item())


def start_of(pictures, distill):
    "The backbone's embeddings of some images before training, and how far they are from those after it"
    images = torch.stack([pictures[i][0] for i in range(16)])
    trained = paint(pictures, augment='none', epochs=4, lr=0.01, ema=0., distill=distill)
    with torch.no_grad():
        before, after = (image_embedding(m.backbone.eval()(images)) for m in (picture_model(), trained.evaluated))
    return float(distance_to(before, after))


def test_distance_is_summed_over_dimensions_not_images():
    a, b = torch.tensor([[1., 0.], [0., 1.]]), torch.tensor([[0., 1.], [0., 1.]])
    assert distance_to(a, b) == 1.


@pytest.mark.parametrize('shape', [(2, 5, 3, 4), (2, 12, 5)])
def test_an_embedding_has_unit_length(shape):
    embedding = image_embedding(torch.randn(shape))
    assert embedding.shape == (2, 5)
    assert torch.allclose(embedding.norm(dim=1), torch.ones(2))


def test_the_distance_is_added_to_the_loss(pictures):
    before, after = Watch(-86), Watch(-84)
    paint(pictures, callbacks=[before, after], **WITH)
    assert all(b < a for b, a in zip(before.losses, after.losses))


def test_a_distilled_backbone_moves_less(pictures): assert start_of(pictures, 10.) < start_of(pictures, 0.)


def test_the_frozen_copy_does_not_learn(pictures):
    trainer = paint(pictures, **WITH)
    [callback] = [cb for cb in trainer.callbacks if isinstance(cb, Distill)]
    pairs = zip(callback.frozen.state_dict().values(), picture_model().backbone.state_dict().values())
    assert all(torch.equal(a, b) for a, b in pairs)
    assert not callback.frozen.training


def test_no_trace_is_left_in_the_model(pictures):
    trainer = paint(pictures, **WITH)
    for model in (trainer.evaluated, trainer.accelerator.unwrap_model(trainer.model)):
        assert not model.backbone._forward_hooks


def test_a_distilled_training_resumes_exactly(pictures, tmp_path):
    whole = paint(pictures, **WITH)
    with pytest.raises(SystemExit): paint(pictures, tmp_path, [asks_to_stop('after_batch')], **WITH)
    assert same(whole, paint(pictures, tmp_path, resume=True, **WITH))


def test_another_network_before_training_is_refused(pictures, tmp_path):
    with pytest.raises(SystemExit): paint(pictures, tmp_path, [asks_to_stop('after_batch')], **WITH)
    with pytest.raises(ValueError, match='the backbone before training was another one'):
        paint(pictures, tmp_path, model=picture_model(seed=5), resume=True, **WITH)


def test_a_model_without_a_backbone_is_refused():
    with pytest.raises(ValueError, match='expected a backbone that learns'): toy(model=feature_model(), distill=1.)
