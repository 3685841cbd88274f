"Every callback can be stopped at any moment, and goes on as if nothing had been"
import signal

import pytest
import torch
from test_trainer import config, paint, picture_model, pictures, same  # noqa: F401 - a fixture

from cprfl.train.callbacks import EMA, Augment, Callback, EarlyStopping, MeanLoss, OneCycle, Seed, Select, StopOnSignal
from cprfl.train.checkpoint import Checkpoint, read_state, saved_states
from cprfl.train.trainer import Trainer

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
def whole(pictures): return paint(pictures, **EVERYTHING)  # noqa: F811 - the fixture


@pytest.mark.parametrize('event', EVENTS)
def test_a_stop_at_any_event_changes_nothing(whole, pictures, tmp_path, event):  # noqa: F811 - the fixture
    with pytest.raises(SystemExit): paint(pictures, tmp_path, [asks_to_stop(event)], **EVERYTHING)
    assert same(whole, paint(pictures, tmp_path, model=picture_model(seed=5), resume=True, **EVERYTHING))


def train_with(kind, pictures, folder, *more, resume=None):  # noqa: F811 - the fixture
    "A training that has one callback with a state, beside those without which there is no training to resume"
    trainer = Trainer(picture_model(), pictures, config=config(**EVERYTHING), progress=False)
    trainer.callbacks = [Seed(), Augment(), kind(), StopOnSignal(), Checkpoint(folder), *more]
    return trainer.fit(resume)


@pytest.mark.parametrize('kind', STATEFUL, ids=lambda kind: kind.__name__)
def test_each_callback_alone_resumes_exactly(pictures, tmp_path, kind):  # noqa: F811 - the fixture
    left_alone = train_with(kind, pictures, tmp_path / 'whole')
    with pytest.raises(SystemExit): train_with(kind, pictures, tmp_path / 'cut', asks_to_stop('after_batch'))
    resumed = train_with(kind, pictures, tmp_path / 'cut', resume=True)
    assert same(left_alone, resumed)
    before, after = ([cb.state(t) for cb in t.callbacks if isinstance(cb, kind)] for t in (left_alone, resumed))
    assert str(before) == str(after)


def test_states_have_names_of_their_own(pictures, tmp_path):  # noqa: F811 - the fixture
    trainer = paint(pictures, tmp_path, **EVERYTHING)
    keys = [cb.key for cb in trainer.callbacks]
    assert len(set(keys)) == len(keys)
    state = read_state(saved_states(tmp_path)[0])
    assert {kind.__name__ for kind in (EMA, MeanLoss, OneCycle, Select)} <= set(state['callbacks'])


def test_a_skipped_step_moves_neither_rate_nor_average(pictures, monkeypatch):  # noqa: F811 - the fixture
    "In fp16 a gradient may overflow; then the optimiser does not step"
    monkeypatch.setattr('accelerate.Accelerator.optimizer_step_was_skipped', property(lambda self: True))
    t = paint(pictures, epochs=1)
    assert torch.equal(t.evaluated.fc.weight, picture_model().fc.weight)
    [one_cycle] = [cb for cb in t.callbacks if isinstance(cb, OneCycle)]
    assert one_cycle.schedule.last_epoch == 0
