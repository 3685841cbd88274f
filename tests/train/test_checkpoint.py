"States and the run's folder: a resumed training equals one that was left alone, bit for bit"
import csv
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from toys import (
    CutOff,
    StopAfter,
    build,
    equal_tensors,
    feature_model,
    paint,
    picture_model,
    same,
    states,
    toy,
    without_seconds,
)

from cprfl.files import write_atomic
from cprfl.model.backbones import build_backbone
from cprfl.model.cprfl import CPRFL
from cprfl.train.callbacks import Callback
from cprfl.train.checkpoint import Checkpoint, RunFolder
from cprfl.train.config import TrainConfig


def read_metrics(folder):
    with open(folder / 'metrics.csv', newline='') as f: return without_seconds(csv.DictReader(f))


def bytes_of(folder): return {f: f.read_bytes() for f in folder.rglob('*') if f.is_file()}


# ---- resume

@pytest.fixture(scope='module', params=['last', 'valid'])
def cut(request, pictures, tmp_path_factory):
    "A training, and the same with a cut in mid-epoch: dropout, augmentation, average, validation"
    a, b = tmp_path_factory.mktemp('whole'), tmp_path_factory.mktemp('cut')
    settings = dict(select=request.param, augment='standard', valid_fraction=0.3)
    whole = paint(pictures, a, **settings)
    with pytest.raises(KeyboardInterrupt): paint(pictures, b, [CutOff(2)], **settings)
    resumed = paint(pictures, b, model=picture_model(seed=5), resume=True, **settings)
    return whole, resumed, a, b


def test_resume_is_bit_for_bit(cut):
    whole, resumed, *_ = cut
    assert same(whole, resumed)
    assert [row['epoch'] for row in resumed.history] == [1, 2, 3]


@pytest.mark.parametrize('name', ['last', 'best', 'prompts'])
def test_resume_writes_the_same_tensors(cut, name):
    *_, a, b = cut
    assert equal_tensors(*(load_file(folder / f'{name}.safetensors') for folder in (a, b)))


def test_resume_writes_the_same_metrics(cut):
    *_, a, b = cut
    assert len(read_metrics(a)) == 3
    assert read_metrics(a) == read_metrics(b)


def test_resume_from_a_named_state(tmp_path):
    whole = toy(tmp_path)
    assert same(whole, toy(resume=tmp_path / 'state' / 'epoch_0002.pt'))


def test_resume_of_a_finished_run(tmp_path):
    whole = toy(tmp_path)
    assert same(whole, toy(tmp_path, resume=True))


def test_resume_without_a_state_starts_from_the_start(tmp_path):
    assert same(toy(), toy(tmp_path, resume=True))


DAMAGES = dict(short=lambda sound: sound[:200], empty=lambda sound: b'', junk=lambda sound: b'junk' * 99)


@pytest.mark.parametrize('damage', DAMAGES.values(), ids=DAMAGES)
def test_a_broken_newest_state_falls_back_with_a_warning(tmp_path, damage):
    whole = toy(epochs=4)
    toy(tmp_path, [StopAfter(3)], epochs=4)
    newest = tmp_path / 'state' / 'epoch_0003.pt'
    newest.write_bytes(damage(newest.read_bytes()))
    with pytest.warns(UserWarning, match='epoch_0003.pt cannot be read .* trying the one before'):
        resumed = toy(tmp_path, epochs=4, resume=True)
    assert same(whole, resumed)


def test_only_broken_states_are_an_error(tmp_path):
    toy(tmp_path, [StopAfter(2)])
    for f in (tmp_path / 'state').iterdir(): f.write_bytes(b'junk')
    words = 'none of the states can be read: .*epoch_0002.pt, .*epoch_0001.pt'
    with pytest.warns(UserWarning, match='cannot be read'), pytest.raises(RuntimeError, match=words):
        toy(tmp_path, resume=True)


def test_a_state_that_is_not_there_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match='nowhere.pt is missing'): toy(resume=tmp_path / 'nowhere.pt')


def test_there_is_none_before_the_last_state(tmp_path):
    (tmp_path / 'a.pt').write_bytes(b'junk')
    with pytest.warns(UserWarning) as said, pytest.raises(RuntimeError): toy(resume=tmp_path / 'a.pt')
    assert not [w for w in said if 'trying the one before' in str(w.message)]


def test_a_state_never_brings_code(tmp_path):
    class Mark:
        def __reduce__(self): return open, (str(tmp_path / 'it_ran'), 'w')
    torch.save(dict(model=Mark()), tmp_path / 'evil.pt')
    with pytest.warns(UserWarning), pytest.raises(RuntimeError, match='none of the states'):
        toy(resume=tmp_path / 'evil.pt')
    assert not (tmp_path / 'it_ran').exists()


def in_another_layout(optimizer):
    "The moments of convolutions with other strides, and how many they were"
    turned = 0
    for moments in optimizer['state'].values():
        for name, value in moments.items():
            if value.ndim < 4: continue
            moments[name] = value.contiguous()
            turned += value.stride() != moments[name].stride()
    return turned


def test_moments_in_another_memory_layout_are_the_same(pictures, tmp_path):
    "A state from a device that prefers images in another layout"
    def fit(**kw):
        torch.manual_seed(0)
        backbone = build_backbone('resnet18', channels=(16, 16, 16, 16), stem_width=16)
        model = CPRFL(backbone, torch.randn(20, 12), d=16, heads=2, head_dim=8, ffn_dim=16, dropout=0.)
        return toy(data=pictures, model=model, epochs=2, ema=0., **kw)
    whole = fit()
    fit(folder=tmp_path, callbacks=[StopAfter(1)])
    file = tmp_path / 'state' / 'epoch_0001.pt'
    state = torch.load(file, weights_only=True)
    assert in_another_layout(state['optimizer']) > 0
    torch.save(state, file)
    assert same(whole, fit(folder=tmp_path, resume=True))


# ---- a state of something else

def test_other_settings_are_refused(tmp_path):
    toy(tmp_path, [StopAfter(1)])
    words = r'(?s)other settings.*lr: 0.02 then, 0.01 now.*seed: 0 then, 3 now'
    with pytest.raises(ValueError, match=words): toy(tmp_path, lr=0.01, seed=3, resume=True)


def test_a_refused_resume_leaves_the_folder_alone(tmp_path):
    toy(tmp_path, [StopAfter(1)])
    before = bytes_of(tmp_path)
    with pytest.raises(ValueError): toy(tmp_path, lr=0.01, seed=3, resume=True)
    assert bytes_of(tmp_path) == before


def test_more_epochs_go_on_from_the_last_state(tmp_path):
    toy(tmp_path)
    with pytest.warns(UserWarning, match='epochs: 3 before, 5 now; the learning rate goes on at'):
        more = toy(tmp_path, epochs=5, resume=True)
    assert [row['epoch'] for row in more.history] == [1, 2, 3, 4, 5]


def test_the_rate_of_more_epochs_is_that_of_their_schedule(tmp_path):
    toy(tmp_path)
    with pytest.warns(UserWarning): more = toy(tmp_path, epochs=5, resume=True)
    assert [row['lr'] for row in more.history[3:]] == [row['lr'] for row in toy(epochs=5).history[3:]]


def test_more_epochs_that_are_cut_off_resume_exactly(tmp_path):
    toy(tmp_path / 'whole')
    toy(tmp_path / 'cut')
    with pytest.warns(UserWarning):
        whole = toy(tmp_path / 'whole', epochs=6, resume=True)
        toy(tmp_path / 'cut', [StopAfter(4)], epochs=6, resume=True)
    assert same(whole, toy(tmp_path / 'cut', epochs=6, resume=True))


def test_a_stopped_training_may_end_sooner(tmp_path):
    toy(tmp_path, [StopAfter(1)], epochs=9)
    with pytest.warns(UserWarning, match='epochs: 9 before, 2 now'): short = toy(tmp_path, epochs=2, resume=True)
    assert len(short.history) == 2


def test_fewer_epochs_than_are_done_are_refused(tmp_path):
    toy(tmp_path)
    with pytest.raises(ValueError, match='epochs: .*epoch_0003.pt is in epoch 3, and 2 were asked for'):
        toy(tmp_path, epochs=2, resume=True)


@pytest.fixture
def old(tmp_path):
    "A run whose newest state is from before the setting `sampler` existed"
    toy(tmp_path, [StopAfter(2)])
    file = tmp_path / 'state' / 'epoch_0002.pt'
    state = torch.load(file, weights_only=True)
    del state['config']['sampler']
    torch.save(state, file)
    return tmp_path


def test_a_state_from_before_a_setting_existed_can_be_resumed(old):
    assert same(toy(), toy(old, resume=True))


def test_a_setting_that_a_state_lacks_had_its_default(old):
    with pytest.raises(ValueError, match="sampler: 'uniform' then, 'class_aware' now"):
        toy(old, sampler='class_aware', resume=True)


def test_a_state_of_another_version_says_what_it_lacks(old):
    [*_, file] = sorted((old / 'state').iterdir())
    state = torch.load(file, weights_only=True)
    torch.save({name: part for name, part in state.items() if name not in ('step', 'callbacks')}, file)
    with pytest.raises(ValueError, match='another version of cprfl: it lacks step, callbacks'): toy(old, resume=True)


# ---- the run's folder

@pytest.fixture(scope='module')
def run(pictures, tmp_path_factory):
    "A finished training and its folder"
    folder = tmp_path_factory.mktemp('run')
    return paint(pictures, folder), folder


def test_what_is_in_a_runs_folder(run):
    _, folder = run
    assert sorted(p.relative_to(folder).as_posix() for p in folder.rglob('*') if p.is_file()) == [
        '.lock', 'best.safetensors', 'last.safetensors', 'metrics.csv', 'prompts.safetensors',
        'state/epoch_0002.pt', 'state/epoch_0003.pt', 'train_config.json']


def test_prompts_are_recorded_before_and_after_each_epoch(run):
    trainer, folder = run
    prompts = load_file(folder / 'prompts.safetensors')
    assert list(prompts) == [f'epoch_{i:04d}' for i in range(4)]
    assert prompts['epoch_0000'].shape == (20, 16)
    assert torch.allclose(prompts['epoch_0003'], trainer.evaluated.prompts(), atol=1e-6)
    assert not torch.equal(prompts['epoch_0000'], prompts['epoch_0001'])


def test_the_settings_are_in_the_folder(run):
    trainer, folder = run
    assert TrainConfig(**json.loads((folder / 'train_config.json').read_text())) == trainer.config


def test_the_last_weights_are_in_the_folder(run):
    trainer, folder = run
    weights = load_file(folder / 'last.safetensors')
    assert all(torch.equal(v, weights[k]) for k, v in trainer.evaluated.state_dict().items())


def test_a_state_knows_its_epoch(run):
    _, folder = run
    assert torch.load(folder / 'state' / 'epoch_0003.pt', weights_only=True)['epoch'] == 3


def test_free_prompts_are_recorded_as_they_were(tmp_path):
    "They are a parameter: what is kept of an epoch must not change with it"
    toy(tmp_path, model=feature_model(free_prompts=True), epochs=2, lr=0.01)
    prompts = load_file(tmp_path / 'prompts.safetensors')
    assert not torch.equal(prompts['epoch_0000'], prompts['epoch_0001'])
    assert not torch.equal(prompts['epoch_0001'], prompts['epoch_0002'])


def test_without_a_folder_nothing_is_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    toy()
    assert not list(tmp_path.iterdir())


def test_the_folder_is_made_by_callbacks_that_one_can_add(tmp_path):
    build(callbacks=[Checkpoint(tmp_path, keep_last=1), RunFolder(tmp_path)]).fit()
    assert states(tmp_path) == ['epoch_0003.pt']


def test_a_model_without_prompts_records_none(tmp_path):
    toy(tmp_path, epochs=1)
    assert not (tmp_path / 'prompts.safetensors').exists()


def test_damaged_prompts_are_named(tmp_path):
    toy(tmp_path, [StopAfter(1)], model=feature_model())
    file = tmp_path / 'prompts.safetensors'
    file.write_bytes(file.read_bytes()[:-3])
    with pytest.raises(ValueError, match='prompts.safetensors is damaged'):
        toy(tmp_path, model=feature_model(), resume=True)


def test_a_folder_that_is_removed_ends_the_training(tmp_path):
    class Removes(Callback):
        def before_epoch(self, trainer):
            if trainer.epoch == 1: shutil.rmtree(tmp_path / 'run')
    with pytest.raises(OSError, match='could not be written, because its folder is not there'):
        toy(tmp_path / 'run', [Removes()], save_steps=2)
    assert not (tmp_path / 'run').exists()


# ---- writing

def half(part):
    part.write_text('ne')
    raise OSError('disk full')


def test_a_failed_write_leaves_the_old_file(tmp_path):
    file = tmp_path / 'a.txt'
    write_atomic(file, lambda part: part.write_text('old'))
    with pytest.raises(OSError, match='disk full'): write_atomic(file, half)
    assert file.read_text() == 'old'
    assert list(tmp_path.iterdir()) == [file]


def test_a_write_replaces_the_old_file(tmp_path):
    file = tmp_path / 'a.txt'
    for text in ('old', 'new'): write_atomic(file, lambda part, text=text: part.write_text(text))
    assert file.read_text() == 'new'
    assert list(tmp_path.iterdir()) == [file]


def test_a_failed_state_leaves_the_older_ones(tmp_path, monkeypatch):
    toy(tmp_path, [StopAfter(1)])
    def full(obj, file):
        Path(file).write_bytes(b'half')
        raise OSError(28, 'No space left on device')
    with monkeypatch.context() as patched:
        patched.setattr(torch, 'save', full)
        with pytest.raises(OSError, match=r'Checkpoint.after_epoch: .*No space left'): toy(tmp_path, resume=True)
    assert states(tmp_path) == ['epoch_0001.pt']
    assert same(toy(), toy(tmp_path, resume=True))
