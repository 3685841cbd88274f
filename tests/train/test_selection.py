"Which epoch is kept, on which images that is decided, and predictions"
import warnings

import numpy as np
import pytest
import torch
from toys import Head, Toy, build, picture_model, toy

from cprfl.data.shapes import shapes_lt
from cprfl.train.callbacks import Callback
from cprfl.train.trainer import evaluate, predict

# ---- the validation split

@pytest.fixture(scope='module')
def carved():
    "Shapes-LT, and a trainer that has carved a validation split from it"
    dataset = shapes_lt('train')
    return dataset, build(Head(20), dataset, select='valid')


def test_the_carved_split_shares_no_image(carved):
    dataset, trainer = carved
    assert len(trainer.train) + len(trainer.valid) == len(dataset)
    assert not set(trainer.train.paths) & set(trainer.valid.paths)


def test_the_carved_split_has_the_share_that_was_asked_for(carved):
    dataset, trainer = carved
    assert 0.15 < len(trainer.valid) / len(dataset) < 0.25


def test_the_carved_split_keeps_every_class_in_training(carved):
    dataset, trainer = carved
    counts = trainer.train.class_counts
    assert (counts >= 0.75 * dataset.class_counts).all()
    assert (counts[dataset.groups['tail']] >= 1).all()


def test_the_carved_split_keeps_the_groups(carved):
    dataset, trainer = carved
    assert np.array_equal(trainer.train.groups['tail'], dataset.groups['tail'])


def test_the_carved_split_is_the_same_again(carved):
    dataset, trainer = carved
    assert build(Head(20), dataset, select='valid').valid.paths == trainer.valid.paths


# ---- which epoch is kept

def test_the_best_epoch_on_validation_is_kept():
    class Worse(Callback):
        "Spoil the weights before the third epoch"
        def before_epoch(self, trainer):
            if trainer.epoch == 2: trainer.evaluated.fc.weight.data.mul_(-100)
    trainer = toy(callbacks=[Worse()], select='valid', epochs=4, lr=0.05, ema=0)
    scores = [row['total'] for row in trainer.history]
    assert trainer.best_epoch in (1, 2)
    assert trainer.best == max(scores) > scores[-1] + 0.1
    assert evaluate(trainer.evaluated, trainer.valid)['total'] == pytest.approx(trainer.best)


def test_the_last_epoch_can_be_kept(): assert toy(select='last', epochs=2).best_epoch == 2


def test_selecting_on_test_warns():
    with pytest.warns(UserWarning, match='best on the TEST set'): build(valid=Toy(), select='test')


def test_selecting_on_test_needs_a_test_set():
    with pytest.raises(ValueError, match='pass the test set'): build(select='test')


@pytest.mark.parametrize('select', ['valid', 'last'])
def test_other_selections_do_not_warn(select):
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        build(select=select)


def test_a_validation_set_without_labels_is_refused():
    with pytest.raises(ValueError, match='32 images to select on show no class'):
        build(valid=Toy(targets=np.zeros((32, 3), np.uint8)), select='valid')


def test_too_few_images_for_a_validation_split_are_refused():
    with pytest.raises(ValueError, match="use select='last'"):
        build(data=Toy(targets=np.eye(3, dtype=np.uint8)), select='valid')


def test_an_empty_training_set_is_refused():
    with pytest.raises(ValueError, match='training set is empty'): build(data=Toy().subset([]))


def test_training_stops_early():
    trainer = toy(select='valid', lr=0., epochs=9, patience=2)
    assert trainer.epoch == 3
    assert trainer.best_epoch == 1, 'nothing changes at a rate of 0'


def test_without_patience_training_does_not_stop_early():
    assert toy(select='valid', lr=0., epochs=4, patience=0).epoch == 4


# ---- predictions

def test_predictions_are_float32_logits(pictures):
    logits = predict(picture_model(), pictures, 48)
    assert logits.shape == (48, 20)
    assert logits.dtype == torch.float32


def test_predictions_do_not_depend_on_the_batch_size(pictures):
    model = picture_model()
    assert torch.allclose(predict(model, pictures, 48), predict(model, pictures, 7), atol=1e-5)


@pytest.mark.parametrize('training', [True, False])
def test_predicting_keeps_the_mode(pictures, training):
    model = picture_model().train(training)
    predict(model, pictures)
    assert model.training == training


def test_predictions_do_not_depend_on_the_mode(pictures):
    model = picture_model()
    assert torch.allclose(predict(model.train(), pictures), predict(model.eval(), pictures), atol=1e-5)


def test_predictions_are_in_the_order_of_the_images(pictures):
    model = picture_model()
    assert torch.allclose(predict(model, pictures.subset([5, 2])), predict(model, pictures)[[5, 2]], atol=1e-5)
