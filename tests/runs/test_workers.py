"Workers: a killed one costs its run, and they end with the process that started them"
import subprocess
import sys
import textwrap
from dataclasses import asdict
from threading import Thread

import psutil
import pytest
from PIL import Image

import cprfl.runs.workers
from cprfl.cli import demo as cprfl_demo
from cprfl.cli import table as cprfl_table
from cprfl.files import Owner
from cprfl.runs.recipe import get_recipe
from cprfl.runs.tables import run_many
from cprfl.runs.workers import Worker, side_by_side

CLIP = get_recipe('shapes-clip')


@pytest.fixture(scope='module')
def long(tmp_path_factory):
    "A training of many short epochs"
    folder = tmp_path_factory.mktemp('images')
    for i in range(8): Image.new('RGB', (40, 40), (30 * i, 0, 0)).save(folder / f'{i}.png')
    rows = ['path,dark,light', *(f'{i}.png,{int(i < 4)},{int(i >= 4)}' for i in range(8))]
    (folder / 'all.csv').write_text('\n'.join(rows))
    files = dict.fromkeys(('train_file', 'test_file'), str(folder / 'all.csv'))
    return get_recipe('shapes-erm').with_(name='long', image_size=32, epochs=50_000, batch_size=8, select='last',
                                          device='cpu', precision='fp32', alignment_images=0, **files)


def wait_for(file, process):
    "Until a training has written a file"
    while process.poll() is None and not file.exists():
        try: process.wait(0.1)
        except subprocess.TimeoutExpired: pass
    assert file.exists()


@pytest.fixture
def worker(tmp_path):
    worker = Worker(tmp_path)
    yield worker
    worker.close()


def test_a_killed_worker_costs_its_run(worker, long, tmp_path):
    said = []
    thread = Thread(target=lambda: said.append(worker.run(long)))
    process = worker.start()
    thread.start()
    wait_for(tmp_path / 'long' / 'metrics.csv', process)
    process.kill()
    thread.join()
    assert 'its process was killed (SIGKILL)' in said[0]
    assert worker.run(long.with_(name='short', epochs=1)) is None
    assert worker.process is not process


def test_a_worker_that_is_closed_saves_its_training(worker, long, tmp_path):
    thread = Thread(target=worker.run, args=(long,))
    process = worker.start()
    thread.start()
    wait_for(tmp_path / 'long' / 'metrics.csv', process)
    worker.close()
    thread.join()
    assert process.returncode in (143, -15) # between two epochs nothing has to be saved
    assert not list(tmp_path.rglob('*.part'))


def test_a_worker_that_is_sent_no_recipe_ends(worker):
    print('no recipe', file=worker.start().stdin, flush=True)
    assert 'its process ended with exit code' in worker.run(CLIP)


def test_a_process_that_cannot_be_started_costs_its_run(worker, monkeypatch):
    def refuse(*args, **kw): raise OSError('Cannot allocate memory')
    monkeypatch.setattr(cprfl.runs.workers, 'Popen', refuse)
    assert side_by_side([CLIP], [worker]) == {
        CLIP.name: 'its process could not be started: Cannot allocate memory'}


class Idle(Worker):
    "Runs nothing, and notes what happens"
    def __init__(self, said): self.said = said
    def run(self, recipe): return self.said.append(recipe.name)
    def hang_up(self): self.said.append('hang up')
    def close(self): self.said.append('close')


def test_all_workers_are_told_to_end_before_one_is_waited_for():
    said = []
    side_by_side([], [Idle(said), Idle(said)])
    assert said == ['hang up', 'hang up', 'close', 'close']


def test_an_error_between_two_runs_is_raised_in_the_end():
    def fail(recipe): raise OSError('the disk is full')
    said = []
    with pytest.raises(OSError, match='the disk is full'): side_by_side([CLIP, CLIP], [Idle(said)], fail)
    assert said == [CLIP.name, 'hang up', 'close']


def test_workers_end_with_a_killed_parent(long, tmp_path):
    code = f"""
        from cprfl.runs.recipe import Recipe
        from cprfl.runs.workers import Worker, side_by_side
        long = Recipe(**{asdict(long)!r})
        side_by_side([long, long.with_(name='other')], [Worker({str(tmp_path)!r}) for _ in range(2)])
        """
    parent = subprocess.Popen([sys.executable, '-c', textwrap.dedent(code)], cwd=__file__.rsplit('/', 1)[0])
    for name in ('long', 'other'): wait_for(tmp_path / name / 'metrics.csv', parent)
    family = psutil.Process(parent.pid).children(recursive=True)
    assert len(family) == 2
    parent.kill()
    parent.wait()
    _, alive = psutil.wait_procs(family, timeout=30)
    assert not [process for process in alive if process.status() != psutil.STATUS_ZOMBIE]


def test_loaders_of_workers_start_processes_of_their_own(long, tmp_path):
    short = [long.with_(name=name, epochs=1, num_workers=1) for name in ('one', 'other')]
    assert run_many(short, tmp_path, workers=2, threads=1, progress=False) == {}


# ---- a folder of a table

COMMANDS = dict(table=lambda out: cprfl_table(['--tables', 'methods', '--out', out]),
                demo=lambda out: cprfl_demo(['--out', out]))


@pytest.mark.parametrize('command', COMMANDS)
def test_two_commands_in_one_folder(command, tmp_path, capsys):
    with Owner(tmp_path), pytest.raises(SystemExit) as stop: COMMANDS[command](str(tmp_path))
    assert stop.value.code == 2
    assert f'cprfl_{command}: {tmp_path} is in use by another command' in capsys.readouterr().err
    assert [file.name for file in tmp_path.iterdir()] == ['.lock']
