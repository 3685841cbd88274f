"Every callback can be stopped at any moment, and goes on as if nothing had happened"
import signal

import pytest
import torch
from toys import build, paint, picture_model, same

from cprfl.train.callbacks import EMA, Augment, Callback, EarlyStopping, MeanLoss, OneCycle, Seed, Select, StopOnSignal
from cprfl.train.checkpoint import Checkpoint, read_state, saved_states

EVENTS = 'before_epoch', 'before_batch', 'after_loss', 'before_step', 'after_step', 'after_batch', 'after_epoch'
EVERYTHING = dict(select='valid', valid_fraction=0.3, patience=2, augment='standard', clip_grad=1.0, epochs=3)
STATEFUL = EMA, MeanLoss, OneCycle, Select, EarlyStopping


def asks_to_stop(event, epoch=1):
    "A callback that sends SIGTERM at the first `event` of an epoch"
    def act(self, trainer):
        if self.sent or trainer.epoch < epoch: return
        self.sent = True
        signal.raise_signal(signal.SIGTERM)
    return type('AsksToStop', (Callback,), {event: act, 'sent': False})()


@pytest.fixture(scope='module')
def whole(pictures): return paint(pictures, **EVERYTHING)


@pytest.mark.parametrize('event', EVENTS)
def test_a_stop_at_any_event_changes_nothing(whole, pictures, tmp_path, event):
    with pytest.raises(SystemExit): paint(pictures, tmp_path, [asks_to_stop(event)], **EVERYTHING)
    assert same(whole, paint(pictures, tmp_path, model=picture_model(seed=5), resume=True, **EVERYTHING))


def train_with(kind, pictures, folder, *more, resume=None):
    "A training that has one callback with a state, besides those without which no training can be resumed"
    trainer = build(picture_model(), pictures, **EVERYTHING)
    trainer.callbacks = [Seed(), Augment(), kind(), StopOnSignal(), Checkpoint(folder), *more]
    return trainer.fit(resume)


def state_of(kind, trainer): return [cb.state(trainer) for cb in trainer.callbacks if isinstance(cb, kind)]


@pytest.mark.parametrize('kind', STATEFUL, ids=lambda kind: kind.__name__)
def test_each_callback_alone_resumes_exactly(pictures, tmp_path, kind):
    left_alone = train_with(kind, pictures, tmp_path / 'whole')
    with pytest.raises(SystemExit): train_with(kind, pictures, tmp_path / 'cut', asks_to_stop('after_batch'))
    resumed = train_with(kind, pictures, tmp_path / 'cut', resume=True)
    assert same(left_alone, resumed)
    assert str(state_of(kind, left_alone)) == str(state_of(kind, resumed))


@pytest.fixture(scope='module')
def saved(pictures, tmp_path_factory):
    "A trainer with all callbacks, and the folder where it has saved its states"
    folder = tmp_path_factory.mktemp('run')
    return paint(pictures, folder, **EVERYTHING), folder


def test_states_have_names_of_their_own(saved):
    keys = [cb.key for cb in saved[0].callbacks]
    assert len(set(keys)) == len(keys)


def test_a_state_holds_those_of_the_callbacks(saved):
    state = read_state(saved_states(saved[1])[0])
    assert {kind.__name__ for kind in (EMA, MeanLoss, OneCycle, Select)} <= set(state['callbacks'])


# ---- a step that fp16 skips

@pytest.fixture
def skipping(pictures, monkeypatch):
    "A training in which every gradient overflows, so that the optimiser does not step"
    monkeypatch.setattr('accelerate.Accelerator.optimizer_step_was_skipped', property(lambda self: True))
    return paint(pictures, epochs=1)


def test_a_skipped_step_does_not_move_the_average(skipping):
    assert torch.equal(skipping.evaluated.fc.weight, picture_model().fc.weight)


def test_a_skipped_step_does_not_move_the_rate(skipping):
    [one_cycle] = [cb for cb in skipping.callbacks if isinstance(cb, OneCycle)]
    assert one_cycle.schedule.last_epoch == 0
