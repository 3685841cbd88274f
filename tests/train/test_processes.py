"Two processes that share a batch compute what one does"
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from toys import equal_tensors, states

from cprfl.files import Owner

HERE = Path(__file__).parent


def launch(n, folder, *how):
    "Start `processes.py` on n processes (gloo)"
    launcher = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node', str(n)]
    command = [*launcher, str(HERE / 'processes.py'), str(folder), *how]
    return subprocess.run(command, capture_output=True, text=True, timeout=200)


def read(folder): return json.loads((folder / 'said.json').read_text()) | dict(folder=folder)


def trained(n, folder, *how):
    "What a training on n processes said, which must have reached its end"
    done = launch(n, folder, *how)
    assert done.returncode == 0, done.stderr[-3000:]
    return read(folder)


def column(said, name): return [row[name] for row in said['history']]


# ---- one process and two

@pytest.fixture(scope='module')
def one(tmp_path_factory): return trained(1, tmp_path_factory.mktemp('one'))


@pytest.fixture(scope='module')
def two(tmp_path_factory): return trained(2, tmp_path_factory.mktemp('two'))


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
    a, b = ({f.relative_to(said['folder']).as_posix() for f in said['folder'].rglob('*') if f.is_file()}
            for said in (one, two))
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
    stopped = launch(2, tmp_path / 'cut', 'stop')
    assert stopped.returncode != 0
    assert 'stopped by SIGTERM in epoch 3 after 4 batches' in stopped.stderr, stopped.stderr[-2000:]
    assert 'epoch_0002_batch_000004.pt' in states(tmp_path / 'cut' / 'run')
    whole, resumed = trained(2, tmp_path / 'whole', 'whole'), trained(2, tmp_path / 'cut', 'resume')
    assert equal_tensors(*(load_file(said['folder'] / 'weights.safetensors') for said in (whole, resumed)))
    assert column(resumed, 'loss') == pytest.approx(column(whole, 'loss'), abs=1e-7)


# ---- one of the two breaks

BROKEN = [('nan', 'the loss of another process is not finite in epoch 2, step 1'), ('fails', 'no luck')]


@pytest.mark.parametrize('how, words', BROKEN, ids=['nan', 'fails'])
def test_what_breaks_one_process_ends_them_all(tmp_path, how, words):
    done = launch(2, tmp_path, how)
    assert done.returncode != 0
    assert words in done.stderr
    assert states(tmp_path / 'run') == ['epoch_0001.pt']


# ---- a folder in use

def test_a_folder_in_use_ends_all_processes(tmp_path):
    with Owner(tmp_path / 'run'):
        (tmp_path / 'run' / 'kept.txt').touch()
        done = launch(2, tmp_path)
        there = sorted(f.name for f in (tmp_path / 'run').iterdir())
    assert done.returncode != 0
    assert f"{tmp_path / 'run'} is in use by another command" in done.stderr
    assert there == ['.lock', 'kept.txt']
