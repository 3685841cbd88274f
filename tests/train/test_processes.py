"Two processes that share a batch compute what one does"
import json
import os
import socket
import subprocess
import sys

import processes
import pytest
import torch
from helpers import forked
from safetensors.torch import load_file
from toys import equal_tensors, states

from cprfl.files import Owner


def free_port():
    with socket.socket() as found:
        found.bind(('127.0.0.1', 0))
        return found.getsockname()[1]


def member(rank, variables, folder, how):
    "One of several processes, which writes what it says into a file"
    os.environ.update(variables, RANK=str(rank), LOCAL_RANK=str(rank))
    with open(folder / f'said_{rank}.txt', 'w') as file: os.dup2(file.fileno(), sys.stderr.fileno())
    processes.main(folder, *how)


def launch(n, folder, *how):
    "Start the training on n processes (gloo), wait until all of them have ended, and return what they said"
    shared = dict(WORLD_SIZE=str(n), LOCAL_WORLD_SIZE=str(n), MASTER_ADDR='127.0.0.1', MASTER_PORT=str(free_port()))
    started = [forked(member, (rank, shared, folder, how)) for rank in range(n)]
    for process in started: process.start()
    for process in started: process.join(timeout=100)
    hung = [process for process in started if process.is_alive()]
    for process in hung: process.kill()
    assert not hung, f'{len(hung)} of {n} processes did not end'
    said = '\n'.join((folder / f'said_{rank}.txt').read_text() for rank in range(n))
    return any(process.exitcode for process in started), said


def torchrun(n, folder):
    "The same with PyTorch's own launcher"
    launcher = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node', str(n)]
    command = [*launcher, processes.__file__, str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200)
    return done.returncode != 0, done.stderr


def trained(folder, failed, said):
    "What a training wrote, which must have reached its end"
    assert not failed, said[-3000:]
    return json.loads((folder / 'said.json').read_text()) | dict(folder=folder)


def column(said, name): return [row[name] for row in said['history']]


# ---- one process and two

@pytest.fixture(scope='module')
def one(tmp_path_factory):
    folder = tmp_path_factory.mktemp('one')
    return trained(folder, *launch(1, folder))


@pytest.fixture(scope='module')
def two(tmp_path_factory):
    folder = tmp_path_factory.mktemp('two')
    return trained(folder, *torchrun(2, folder))


def test_each_training_has_its_processes(one, two):
    assert one['processes'] == 1
    assert two['processes'] == 2


def test_each_of_fifty_steps_has_the_same_loss(one, two):
    assert len(one['losses']) == 50
    assert two['losses'] == pytest.approx(one['losses'], rel=0, abs=1e-5)


def test_predictions_are_gathered_exactly(one, two):
    "37 images do not divide by two; none is counted twice, and their order is kept"
    assert torch.tensor(two['logits']).shape == (37, 20)
    assert torch.allclose(torch.tensor(one['logits']), torch.tensor(two['logits']), atol=1e-4)


def test_metrics_are_gathered_exactly(one, two):
    assert column(two, 'total') == pytest.approx(column(one, 'total'), abs=1e-3)
    assert column(two, 'loss') == pytest.approx(column(one, 'loss'), abs=1e-5)


def test_one_process_writes_the_folder(one, two):
    a, b = ({f.relative_to(said['folder']).as_posix() for f in said['folder'].rglob('*')
             if f.is_file() and not f.match('said_*.txt')} for said in (one, two))
    assert 'run/state/epoch_0005.pt' in a
    assert a == b


def test_the_weights_are_the_same(one, two):
    a, b = (load_file(said['folder'] / 'run' / 'last.safetensors') for said in (one, two))
    assert a.keys() == b.keys()
    for name in a: assert torch.allclose(a[name].float(), b[name].float(), atol=1e-4), name


# ---- stopped and resumed

def test_two_processes_stop_together_and_resume_exactly(tmp_path):
    "With dropout, of which each process has its own; the signal reaches one of them"
    for name in ('whole', 'cut'): (tmp_path / name).mkdir()
    failed, said = launch(2, tmp_path / 'cut', 'stop')
    assert failed
    assert 'stopped by SIGTERM in epoch 3 after 4 batches' in said
    assert 'epoch_0002_batch_000004.pt' in states(tmp_path / 'cut' / 'run')
    whole, resumed = (trained(tmp_path / name, *launch(2, tmp_path / name, how))
                      for name, how in dict(whole='whole', cut='resume').items())
    assert equal_tensors(*(load_file(said['folder'] / 'weights.safetensors') for said in (whole, resumed)))
    assert column(resumed, 'loss') == pytest.approx(column(whole, 'loss'), abs=1e-7)


# ---- one of the two breaks

BROKEN = [('nan', 'the loss of another process is not finite in epoch 2, step 1'), ('fails', 'no luck')]


@pytest.mark.parametrize('how, words', BROKEN, ids=['nan', 'fails'])
def test_what_breaks_one_process_ends_them_all(tmp_path, how, words):
    failed, said = launch(2, tmp_path, how)
    assert failed
    assert words in said
    assert states(tmp_path / 'run') == ['epoch_0001.pt']


# ---- a folder in use

def test_a_folder_in_use_ends_all_processes(tmp_path):
    with Owner(tmp_path / 'run'):
        (tmp_path / 'run' / 'kept.txt').touch()
        failed, said = launch(2, tmp_path)
        there = sorted(f.name for f in (tmp_path / 'run').iterdir())
    assert failed
    assert f"{tmp_path / 'run'} is in use by another command" in said
    assert there == ['.lock', 'kept.txt']
