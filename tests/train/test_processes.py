"Two processes that share a batch compute what one does"
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

HERE = Path(__file__).parent


def launch(n, folder, *how):
    command = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node', n, HERE / 'processes.py', folder, *how]
    return subprocess.run([str(a) for a in command], capture_output=True, text=True, timeout=200)


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
    "The same training on one process and on two (gloo)"
    out = {}
    for n in (1, 2):
        folder = tmp_path_factory.mktemp(f'processes{n}')
        done = launch(n, folder)
        assert done.returncode == 0, done.stderr[-3000:]
        out[n] = json.loads((folder / 'said.json').read_text()) | dict(folder=folder)
    return out


def test_each_of_fifty_steps_has_the_same_loss(trained):
    one, two = trained[1], trained[2]
    assert (one['processes'], two['processes']) == (1, 2) and len(one['losses']) == len(two['losses']) == 50
    assert torch.allclose(torch.tensor(one['losses']), torch.tensor(two['losses']), rtol=0, atol=1e-5)


def test_metrics_are_gathered_exactly(trained):
    "37 images do not divide by two; none is counted twice, and their order is kept"
    one, two = trained[1], trained[2]
    assert torch.tensor(two['logits']).shape == (37, 20)
    assert torch.allclose(torch.tensor(one['logits']), torch.tensor(two['logits']), atol=1e-4)
    for a, b in zip(one['history'], two['history']): assert a['total'] == pytest.approx(b['total'], abs=1e-3) and a['loss'] == pytest.approx(b['loss'], abs=1e-5)


def test_one_process_writes_the_folder(trained):
    names = [sorted(f.relative_to(trained[n]['folder']).as_posix() for f in trained[n]['folder'].rglob('*') if f.is_file()) for n in (1, 2)]
    assert names[0] == names[1] and 'run/state/epoch_0005.pt' in names[0]
    a, b = (load_file(trained[n]['folder'] / 'run' / 'last.safetensors') for n in (1, 2))
    assert a.keys() == b.keys() and all(torch.allclose(a[k].float(), b[k].float(), atol=1e-4) for k in a)


def test_two_processes_stop_together_and_go_on_as_if_nothing_had_been(tmp_path):
    "With dropout, of which each process has its own; the signal reaches one of them"
    for f in ('whole', 'cut'): (tmp_path / f).mkdir()
    assert launch(2, tmp_path / 'whole', 'whole').returncode == 0
    cut = launch(2, tmp_path / 'cut', 'stop')
    assert cut.returncode != 0 and 'stopped by SIGTERM in epoch 3 after 4 batches' in cut.stderr, cut.stderr[-2000:]
    assert (tmp_path / 'cut' / 'run' / 'state' / 'epoch_0002_batch_000004.pt').exists()
    resumed = launch(2, tmp_path / 'cut', 'resume')
    assert resumed.returncode == 0, resumed.stderr[-3000:]
    a, b = (load_file(tmp_path / f / 'weights.safetensors') for f in ('whole', 'cut'))
    assert all(torch.equal(a[k], b[k]) for k in a)
    losses = [[r['loss'] for r in json.loads((tmp_path / f / 'said.json').read_text())['history']] for f in ('whole', 'cut')]
    assert losses[0] == pytest.approx(losses[1], abs=1e-7)


@pytest.mark.parametrize('how, words', [('nan', 'the loss of another process is not finite in epoch 2, step 1'), ('fails', 'no luck')])
def test_what_breaks_one_process_ends_them_all(tmp_path, how, words):
    done = launch(2, tmp_path, how)
    assert done.returncode != 0
    assert words in done.stderr
    assert [f.name for f in (tmp_path / 'run' / 'state').iterdir()] == ['epoch_0001.pt']
