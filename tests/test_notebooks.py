"The notebooks are the source: the package is their export, they are clean, and they run."
import filecmp
import os
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from helpers import NOTEBOOKS, REFERENCE, ROOT, copy_project

READ_FILES = {'analysis/losses.ipynb', 'analysis/components.ipynb', 'analysis/semantics.ipynb', 'analysis/ablations.ipynb'} # the other analyses need the runs of `make demo`
RUN = [n for n in NOTEBOOKS if not n.startswith('analysis/') or n in READ_FILES]


def nbdev(command, *args, cwd=ROOT):
    env = os.environ | {'OMP_NUM_THREADS': '1'}
    return subprocess.run([Path(sys.executable).parent / command, *args], cwd=cwd, env=env, capture_output=True, text=True)


@pytest.fixture(scope='module')
def copy(tmp_path_factory):
    "A copy of the project, to export and clean in"
    folder = tmp_path_factory.mktemp('copy') / 'cprfl'
    folder.mkdir()
    return copy_project(folder, 'settings.ini', 'pyproject.toml', '_quarto.yml', 'README.md')


def test_export_is_up_to_date(copy):
    done = nbdev('nbdev_export', cwd=copy)
    assert done.returncode == 0, done.stderr
    ours, fresh = ({p.relative_to(f / 'cprfl').as_posix() for p in (f / 'cprfl').rglob('*.py')} for f in (ROOT, copy))
    assert len(ours) >= 28, 'modules of every sub-package are compared'
    assert ours == fresh, 'modules without a notebook, or the other way round'
    stale = [n for n in sorted(fresh) if not filecmp.cmp(ROOT / 'cprfl' / n, copy / 'cprfl' / n, shallow=False)]
    assert not stale, f'run `make export`; out of date: {stale}'


def test_notebooks_are_clean(copy):
    before = {n: (copy / 'nbs' / n).read_bytes() for n in NOTEBOOKS}
    assert nbdev('nbdev_clean', cwd=copy).returncode == 0
    dirty = [n for n in NOTEBOOKS if (copy / 'nbs' / n).read_bytes() != before[n]]
    assert not dirty, f'run `nbdev_clean`; not clean: {dirty}'


@pytest.mark.parametrize('name', REFERENCE)
def test_reference_notebooks_carry_no_outputs(name):
    nb = nbformat.read(ROOT / 'nbs' / name, 4)
    assert not [c.id for c in nb.cells if c.cell_type == 'code' and c.outputs]


@pytest.mark.parametrize('name', NOTEBOOKS)
def test_saved_outputs_are_presentable(name):
    "No traceback, no warning, no progress bar, no path of somebody's machine"
    nb = nbformat.read(ROOT / 'nbs' / name, 4)
    for cell in nb.cells:
        for out in cell.get('outputs', []):
            text = str(out)
            assert out.output_type != 'error', f'{cell.id}: {text[:300]}'
            for bad in ('Warning', 'it/s]', '/home/', '/root/', '/tmp/', '/Users/'):
                assert bad not in text, f'cell {cell.id} shows {bad!r}: {text[:300]}'


@pytest.mark.parametrize('name', NOTEBOOKS)
def test_notebooks_open_with_a_title_and_a_line(name):
    first = nbformat.read(ROOT / 'nbs' / name, 4).cells[0].source.splitlines()
    assert first[0].startswith('# ') and any(line.startswith('> ') for line in first[:4])


@pytest.mark.parametrize('name', RUN)
def test_notebook_runs(name):
    done = nbdev('nbdev_test', '--path', f'nbs/{name}', '--n_workers', '0')
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]


@pytest.fixture(scope='module')
def small_runs(tmp_path_factory):
    "The demo's runs, as small as they get"
    from cprfl.runs.recipe import get_recipe
    from cprfl.runs.run import run_recipe
    folder = tmp_path_factory.mktemp('runs')
    for name in ('shapes-clip', 'shapes-erm', 'shapes-cprfl-random', 'shapes-cprfl'):
        run_recipe(get_recipe(name).with_(name=f'{name}-s0', epochs=1, image_size=32, precision='fp32', purity=40), folder, progress=False)
    return folder


@pytest.mark.parametrize('name', ['top3', 'attention', 'prompt_drift'])
def test_analysis_notebooks_run_on_any_runs(small_runs, name):
    env = os.environ | {'OMP_NUM_THREADS': '1', 'CPRFL_RUNS': str(small_runs)}
    done = subprocess.run([Path(sys.executable).parent / 'nbdev_test', '--path', f'nbs/analysis/{name}.ipynb', '--n_workers', '0'], cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
