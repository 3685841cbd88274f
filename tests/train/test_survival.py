"A training that is stopped, killed or given bad images loses nothing"
import errno
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch
from filelock import FileLock
from PIL import Image
from safetensors.torch import load_file
from toys import Head, StopAfter, Toy, build, paint, picture_model, same, states, toy

from cprfl.data.dataset import LongTailDataset, resize
from cprfl.data.images import BadDataError
from cprfl.files import _HOST, Owner, _part_name
from cprfl.train.callbacks import Callback, NonFiniteLoss, StopOnSignal
from cprfl.train.checkpoint import saved_states


class Sends(Callback):
    "A signal after some batches of an epoch"
    def __init__(self, name, epoch, batch):
        self.name = name
        self.at = epoch, batch

    def after_batch(self, trainer):
        if (trainer.epoch, trainer.step) == self.at: signal.raise_signal(self.name)


STOPS = {signal.SIGTERM: SystemExit, signal.SIGINT: KeyboardInterrupt}


def newest_state(folder): return torch.load(saved_states(folder)[0], weights_only=True)


# ---- stopped

@pytest.mark.parametrize('name', STOPS, ids=lambda s: s.name)
@pytest.mark.parametrize('at', [(0, 1), (1, 2), (1, 3), (2, 1)], ids=str)
def test_a_signal_stops_between_batches_and_another_goes_on(painted, pictures, tmp_path, name, at):
    "With dropout, augmentation, average and batch statistics; (1, 3) is the end of an epoch"
    with pytest.raises(STOPS[name]): paint(pictures, tmp_path, [Sends(name, *at)])
    state = newest_state(tmp_path)
    assert (state['epoch'], state['step']) == at
    assert same(painted, paint(pictures, tmp_path, model=picture_model(seed=5), resume=True))


@pytest.mark.parametrize('name', STOPS, ids=lambda s: s.name)
def test_a_stop_names_its_signal(tmp_path, capsys, name):
    with pytest.raises(STOPS[name]): toy(tmp_path, [Sends(name, 1, 2)])
    assert name.name in capsys.readouterr().err


def test_a_stop_by_sigterm_has_its_exit_status(tmp_path):
    with pytest.raises(SystemExit) as stop: toy(tmp_path, [Sends(signal.SIGTERM, 1, 2)])
    assert stop.value.code == 143


def test_ctrl_c_in_a_notebook_keeps_the_state_in_memory(painted, pictures):
    trainer = build(picture_model(), pictures, callbacks=[Sends(signal.SIGINT, 1, 1)], lr=2e-3)
    with pytest.raises(KeyboardInterrupt): trainer.fit()
    assert trainer.paused
    assert (trainer.epoch, trainer.step) == (1, 1)
    trainer.callbacks.pop()
    assert same(painted, trainer.fit(resume=True))
    assert not trainer.paused


def test_a_stop_waits_for_the_optimiser_step(tmp_path):
    "Between two accumulated batches there is no state to keep"
    whole = toy(accumulate=2)
    with pytest.raises(SystemExit): toy(tmp_path, [Sends(signal.SIGTERM, 1, 1)], accumulate=2)
    assert newest_state(tmp_path)['step'] == 2
    assert same(whole, toy(tmp_path, resume=True, accumulate=2))


def test_states_within_an_epoch(tmp_path):
    whole = toy(tmp_path, save_steps=3)
    assert [f.stem for f in saved_states(tmp_path)] == ['epoch_0003', 'epoch_0002_batch_000003']
    for state in saved_states(tmp_path): assert same(whole, toy(resume=state)), state.name


def test_a_broken_state_falls_back_to_one_within_an_epoch(tmp_path):
    whole = toy(tmp_path, save_steps=3)
    (tmp_path / 'state' / 'epoch_0003.pt').write_bytes(b'junk')
    with pytest.warns(UserWarning, match='epoch_0003.pt cannot be read'): resumed = toy(tmp_path, resume=True)
    assert same(whole, resumed)


def test_settings_that_change_no_result_may_change(tmp_path):
    with pytest.raises(SystemExit): toy(tmp_path, [Sends(signal.SIGTERM, 1, 1)])
    assert same(toy(), toy(tmp_path, resume=True, save_steps=2))


def test_other_images_are_refused(tmp_path):
    toy(tmp_path, [StopAfter(1)])
    with pytest.raises(ValueError, match='belongs to other training images or labels .48 images now'):
        toy(tmp_path, data=Toy(48), resume=True)


def test_another_training_in_the_same_folder_is_refused(tmp_path):
    toy(tmp_path, [StopAfter(1)])
    with pytest.raises((FileExistsError, RuntimeError), match='holds another training'): toy(tmp_path)
    assert states(tmp_path) == ['epoch_0001.pt']


def test_a_folder_has_one_training_at_a_time(tmp_path):
    class Second(Callback):
        def after_batch(self, trainer):
            with pytest.raises(RuntimeError, match='is in use by another command'): toy(tmp_path, resume=True)
    toy(tmp_path, [Second()], epochs=1)
    assert same(toy(epochs=1), toy(tmp_path, epochs=1, resume=True)), 'and is free afterwards'


def test_going_on_from_an_older_state_forgets_the_newer_ones(tmp_path):
    whole = toy(tmp_path)
    again = toy(tmp_path, resume=tmp_path / 'state' / 'epoch_0002.pt')
    assert same(whole, again)
    assert states(tmp_path) == ['epoch_0002.pt', 'epoch_0003.pt']


def test_a_trainer_trains_once():
    trainer = toy()
    with pytest.raises(RuntimeError, match='has trained already'): trainer.fit()


def test_a_flipped_bit_in_a_state_is_noticed(tmp_path):
    whole = toy(tmp_path)
    newest = tmp_path / 'state' / 'epoch_0003.pt'
    raw = bytearray(newest.read_bytes())
    at = raw.find(load_file(tmp_path / 'last.safetensors')['fc.weight'].numpy().tobytes()[:16])
    assert at > 0
    raw[at + 3] ^= 64
    newest.write_bytes(raw)
    with pytest.warns(UserWarning, match='epoch_0003.pt cannot be read .*damaged'):
        resumed = toy(tmp_path, resume=True)
    assert same(whole, resumed)


def test_a_run_that_stopped_early_stays_stopped(tmp_path):
    settings = dict(select='valid', patience=1, epochs=9, lr=0.)
    stopped = toy(tmp_path, **settings)
    assert len(stopped.history) < 9
    assert same(stopped, toy(tmp_path, resume=True, **settings))


def test_signals_are_handled_as_before_afterwards():
    before = [signal.getsignal(s) for s in STOPS]
    stop = StopOnSignal()
    stop.before_fit(None)
    signal.raise_signal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt): signal.raise_signal(signal.SIGINT)
    stop.cleanup_fit(None)
    assert stop.name == 'SIGINT'
    assert [signal.getsignal(s) for s in STOPS] == before


def test_a_stop_with_worker_processes(tmp_path):
    "They take a seed from the generator that dropout uses"
    whole = toy(num_workers=1)
    with pytest.raises(SystemExit): toy(tmp_path, [Sends(signal.SIGTERM, 1, 2)], num_workers=1)
    assert same(whole, toy(tmp_path, resume=True, num_workers=1))


# ---- killed

def number_of_a_dead_process():
    process = subprocess.Popen([sys.executable, '-c', ''])
    process.wait()
    return process.pid


@pytest.mark.skipif(not hasattr(os, 'fork'), reason='a killed process is a fork here')
def test_killed_while_it_writes():
    "At every ninetieth point; `python tests/train/kills.py` tries them all"
    command = [sys.executable, 'kills.py', 'features', '--every', '90']
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent, timeout=600)
    assert done.returncode == 0, done.stdout
    assert 'resumed and equal bit for bit' in done.stdout


def test_what_a_killed_process_left_half_written_is_removed(tmp_path):
    toy(tmp_path, epochs=1)
    (tmp_path / 'state' / _part_name('epoch_0001.pt', number_of_a_dead_process())).write_bytes(b'ha')
    toy(tmp_path, epochs=1, resume=True)
    assert not list(tmp_path.rglob('*.part'))


def test_what_a_process_that_had_the_same_number_left_is_removed(tmp_path):
    left = tmp_path / _part_name('a.txt', os.getpid())
    left.touch()
    os.utime(left, (1e9, 1e9)) # long before this process began
    with Owner(tmp_path): assert not left.exists()


OF_OTHERS = {
    'living': _part_name('a.txt', os.getpid()), 'no number': 'film.part', 'of a user': 'film.2020.part',
    'of another host': _part_name('a.txt', 2**22 + 1).replace(_HOST, '0' * 8)}


@pytest.mark.parametrize('name', OF_OTHERS.values(), ids=OF_OTHERS)
def test_a_file_that_no_dead_process_left_stays(tmp_path, name):
    (tmp_path / name).touch()
    with Owner(tmp_path): assert (tmp_path / name).exists()


# ---- no room, no permission, no locks

def test_a_disk_without_locks_is_no_reason_to_stop(tmp_path, monkeypatch):
    def refuse(lock, **kw): raise OSError(errno.ENOLCK, 'No locks available')
    monkeypatch.setattr(FileLock, 'acquire', refuse)
    with pytest.warns(UserWarning, match='is on a disk that cannot lock files'): trainer = toy(tmp_path, epochs=1)
    assert len(trainer.history) == 1


def test_no_room_for_a_state(tmp_path):
    "A limit on the size of files acts as a full disk; the older state stays whole"
    toy(tmp_path, [StopAfter(1)])
    code = f"""
        import resource, signal
        from toys import toy
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))
        toy({str(tmp_path)!r}, resume=True)
        """
    command = [sys.executable, '-c', textwrap.dedent(code)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent, timeout=120)
    assert done.returncode == 1
    assert 'epoch_0002.pt could not be written' in done.stderr
    assert 'MB are free' in done.stderr
    assert states(tmp_path) == ['epoch_0001.pt']
    assert not list(tmp_path.rglob('*.part'))
    assert same(toy(), toy(tmp_path, resume=True))


@pytest.mark.skipif(os.geteuid() == 0, reason='root may write anywhere')
def test_a_folder_that_cannot_be_written(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(RuntimeError, match='RunFolder.before_fit: .*Permission denied'): toy(tmp_path / 'run')


def test_a_folder_that_is_a_file(tmp_path):
    (tmp_path / 'run').write_text('I am a file')
    with pytest.raises(RuntimeError, match='RunFolder.before_fit: .*run'): toy(tmp_path / 'run')


# ---- images

def in_files(folder, names, targets): return LongTailDataset(names, targets, list('abcd'), folder, resize(32))


@pytest.fixture
def files(tmp_path):
    "32 images in files, of which one is about to break"
    rng, names = np.random.default_rng(0), [f'{i:02}.png' for i in range(32)]
    for name in names:
        pixels = rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / name)
    return in_files(tmp_path, names, np.eye(4, dtype=np.uint8)[np.arange(32) % 4])


class Breaks(Callback):
    "A file is damaged while the training runs"
    def __init__(self, file, epoch):
        self.file = file
        self.epoch = epoch

    def before_epoch(self, trainer):
        if trainer.epoch == self.epoch: self.file.write_bytes(self.file.read_bytes()[:60])


@pytest.mark.parametrize('num_workers', [0, 1])
def test_an_image_that_turns_unreadable_loses_nothing(files, tmp_path, num_workers):
    settings = dict(batch_size=8, lr=1e-3, ema=0.998, num_workers=num_workers)
    victim = tmp_path / '07.png'
    sound = victim.read_bytes()
    whole = paint(files, model=picture_model(4), **settings)
    with pytest.raises(BadDataError, match='07.png: image is truncated or broken') as error:
        paint(files, tmp_path / 'run', [Breaks(victim, 1)], picture_model(4), **settings)
    assert len(str(error.value).splitlines()) == 1
    victim.write_bytes(sound)
    assert same(whole, paint(files, tmp_path / 'run', model=picture_model(4), resume=True, **settings))


def picture(mode):
    grey = (np.arange(48 * 48).reshape(48, 48) % 256).astype(np.uint8)
    if mode == 'I;16': return Image.fromarray(grey.astype(np.uint16) * 257)
    return Image.fromarray(grey).convert('RGB').convert(mode)


KINDS = [('CMYK', 'jpg'), *((mode, 'png') for mode in ('L', 'P', 'I;16', 'RGBA', 'LA', '1'))]


@pytest.mark.parametrize('mode, suffix', KINDS)
def test_any_kind_of_picture_trains(tmp_path, mode, suffix):
    names = [f'{i}.{suffix}' for i in range(4)]
    for name in names: picture(mode).save(tmp_path / name)
    data = in_files(tmp_path, names, np.eye(4, dtype=np.uint8))
    assert data[0][0].shape == (3, 32, 32)
    assert data[0][0].dtype == torch.uint8
    trainer = paint(data, model=picture_model(4), epochs=1, batch_size=2)
    assert np.isfinite(trainer.history[0]['loss'])


def test_images_of_one_pixel(tmp_path):
    Image.new('RGB', (1, 1), (255, 0, 0)).save(tmp_path / 'dot.png')
    Image.new('RGB', (1, 1), (0, 255, 0)).save(tmp_path / 'spot.png')
    data = in_files(tmp_path, ['dot.png', 'spot.png'], [[1, 0, 0, 0], [0, 1, 0, 0]])
    trainer = paint(data, model=picture_model(4), epochs=1, batch_size=2, augment='none')
    assert np.isfinite(trainer.history[0]['loss'])


@pytest.mark.parametrize('C', [1, 3])
def test_images_without_any_label(C):
    trainer = toy(data=Toy(targets=np.zeros((24, C), np.uint8)), model=Head(C), epochs=1, batch_size=5)
    assert len(trainer.history) == 1
    assert np.isfinite(trainer.history[0]['loss'])


# ---- weights that broke

class SpoilsAWeight(Callback):
    "In the middle of an epoch, where no loss shows it"
    def __init__(self, step): self.step = step

    def after_batch(self, trainer):
        if (trainer.epoch, trainer.step) == (1, self.step): trainer.evaluated.fc.bias.data[0] = float('nan')


def test_broken_weights_are_never_saved(tmp_path):
    with pytest.raises(NonFiniteLoss, match='weights are not finite after epoch 2: fc.bias'):
        toy(tmp_path, [SpoilsAWeight(4)], ema=0)
    assert states(tmp_path) == ['epoch_0001.pt']
    assert all(w.isfinite().all() for w in load_file(tmp_path / 'last.safetensors').values())
    assert same(toy(ema=0), toy(tmp_path, ema=0, resume=True))


class Spoils(Callback):
    "What is saved, right before it is"
    order = 49
    def __init__(self, spoil): self.spoil = spoil
    def after_epoch(self, trainer):
        if trainer.epoch == 2: self.spoil(trainer)


def spoil_the_average(trainer): trainer.evaluated.fc.bias.data[0] = float('inf')


def spoil_a_mean(trainer): trainer.optimizer.state[trainer.model.fc.bias]['exp_avg_sq'][0] = float('nan')


def test_a_broken_average_ends_the_training_before_it_is_written(tmp_path):
    with pytest.raises(NonFiniteLoss, match='fc.bias; the files of the epoch before are as they were'):
        toy(tmp_path, [Spoils(spoil_the_average)])
    assert states(tmp_path) == ['epoch_0001.pt']
    assert all(w.isfinite().all() for w in load_file(tmp_path / 'best.safetensors').values())
    assert same(toy(), toy(tmp_path, resume=True))


def test_a_broken_mean_of_the_optimiser_is_in_no_state(tmp_path):
    with pytest.warns(UserWarning, match='optimizer.state.1.exp_avg_sq are not finite, so no state is written'):
        toy(tmp_path, [Spoils(spoil_a_mean), StopAfter(2)])
    assert states(tmp_path) == ['epoch_0001.pt']


def test_a_stop_with_broken_weights_keeps_the_last_good_state(tmp_path):
    callbacks = [SpoilsAWeight(1), Sends(signal.SIGTERM, 1, 1)]
    with pytest.warns(UserWarning, match='not finite, so no state is written'), pytest.raises(SystemExit):
        toy(tmp_path, callbacks, ema=0)
    assert states(tmp_path) == ['epoch_0001.pt']
