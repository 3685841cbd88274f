"The notebooks are the source: the package is their export, they are clean, and they run"
import filecmp
import inspect
import json
import multiprocessing
import os
import subprocess
import sys
from pathlib import Path

import nbformat
import numpy as np
import pandas as pd
import pytest
from helpers import HEAVY, MODULES, NBS, NOTEBOOKS, REFERENCE, ROOT, copy_project, forked, made_once
from PIL import Image

TABLES_ONLY = {f'analysis/{name}.ipynb' for name in (
    'losses', 'components', 'semantics', 'ablations', 'names', 'unseen', 'opponents', # they read results
    'end_to_end', 'decisions', 'faithfulness', 'top3_photos')} # the last two have saved ones
NEED_RUNS = ['analysis/top3.ipynb', 'analysis/errors.ipynb', 'analysis/attention.ipynb', 'analysis/prompt_drift.ipynb']
RUN = [name for name in NOTEBOOKS if not name.startswith('analysis/') or name in TABLES_ONLY]
SHORTER = { # what of a notebook is replaced when it is tested: its cells are run, its figures are not checked
    'bench.ipynb': [("'network', 2, 0.1", "'head', 2, 0.1")],
    'explanation/memory_and_time.ipynb': [("('resnet50', 224, 32", "('resnet50', 64, 32"), ('448, 32)', '64, 32)'),
                                          ("'resnet101'", "'resnet18'")],
    'look/run_page.ipynb': [('epochs=1', 'epochs=1, image_size=32')],
    'tutorials/commands.ipynb': [('--epochs 1 ', '--epochs 1 --image-size 32 ')],
    'tutorials/first_training.ipynb': [('epochs=8', 'epochs=1, image_size=32')],
    'tutorials/new_loss.ipynb': [('epochs=12', 'epochs=1')],
    'model/towers.ipynb': [("'ViT-B-16-quickgelu'", "'ViT-S-32'"), ('3 * 2 * 17e9', '0')],
    'tutorials/new_model.ipynb': [('epochs=15', 'epochs=1'), ('seeded(rows[key], 2)', 'seeded(rows[key], 1)')],
    'tutorials/take_away.ipynb': [('image_size=64', 'image_size=32')],
    'tutorials/several_gpus.ipynb': [('epochs=4', 'epochs=1'),
                                     ('one, two = losses(1), losses(2)', 'one = two = losses(2)')],
    'analysis/prompt_drift.ipynb': [('epochs=4', 'epochs=1'), ('image_size=64', 'image_size=32')],
}
MOST = 150_000 # bytes of outputs that a reference page may keep


def read(name): return nbformat.read(NBS / name, 4)


def outputs(nb): return [(cell, out) for cell in nb.cells for out in cell.get('outputs', [])]


# ---- the export

def nbdev(command, cwd):
    env = os.environ | {'OMP_NUM_THREADS': '1'}
    done = subprocess.run([Path(sys.executable).parent / command], cwd=cwd, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def modules(folder): return {file.relative_to(folder).as_posix() for file in folder.rglob('*.py')}


def differing(ours, fresh):
    "Modules that are missing on one side, or whose text differs"
    common = modules(ours) & modules(fresh)
    stale = {name for name in common if not filecmp.cmp(ours / name, fresh / name, shallow=False)}
    return sorted(stale | (modules(ours) ^ modules(fresh)))


@pytest.fixture
def copy(tmp_path):
    "A copy of the project, to export and clean in"
    return copy_project(tmp_path, 'settings.ini', 'pyproject.toml', '_quarto.yml', 'README.md')


def test_the_package_is_the_export_of_the_notebooks(copy):
    nbdev('nbdev_export', copy)
    assert len(modules(copy / 'cprfl')) > len(MODULES) >= 28
    assert not differing(ROOT / 'cprfl', copy / 'cprfl'), 'run `make export`'


def edit_an_exported_cell(notebook):
    nb = nbformat.read(notebook, 4)
    cell = next(cell for cell in nb.cells if cell.source.startswith('#| export\n'))
    cell.source += '\nEDITED = True'
    nbformat.write(nb, notebook)


def test_an_edited_cell_that_was_not_exported_is_noticed(copy):
    for name in ('data/longtail', 'runs/recipe'): edit_an_exported_cell(copy / 'nbs' / f'{name}.ipynb')
    nbdev('nbdev_export', copy)
    assert differing(ROOT / 'cprfl', copy / 'cprfl') == ['data/longtail.py', 'runs/recipe.py']


def test_a_module_without_a_notebook_is_noticed(copy):
    (copy / 'nbs' / 'data' / 'longtail.ipynb').unlink()
    nbdev('nbdev_export', copy)
    assert 'data/longtail.py' in differing(ROOT / 'cprfl', copy / 'cprfl')


def test_notebooks_are_clean(copy):
    nbdev('nbdev_clean', copy)
    dirty = [name for name in NOTEBOOKS if not filecmp.cmp(copy / 'nbs' / name, NBS / name, shallow=False)]
    assert not dirty, 'run `make export`'


# ---- what a page keeps

def is_picture(out):
    kinds = set(out.get('data', {}))
    return 'image/png' in kinds and kinds <= {'image/png', 'text/plain'}


@pytest.mark.parametrize('name', REFERENCE)
def test_reference_pages_keep_pictures_only(name):
    assert not [cell.id for cell, out in outputs(read(name)) if not is_picture(out)]


@pytest.mark.parametrize('name', REFERENCE)
def test_outputs_of_reference_pages_are_small(name):
    assert sum(len(json.dumps(out)) for _, out in outputs(read(name))) <= MOST


PLAIN, PNG, HTML = {'text/plain': '<Figure>'}, {'image/png': 'iVBORw0KGgo='}, {'text/html': '<table/>'}


@pytest.mark.parametrize('data', [PNG, PLAIN | PNG])
def test_a_picture_is_recognised(data): assert is_picture({'output_type': 'display_data', 'data': data})


@pytest.mark.parametrize('data', [PLAIN, HTML, PLAIN | PNG | HTML])
def test_what_is_no_picture_is_noticed(data): assert not is_picture({'output_type': 'display_data', 'data': data})


def test_a_progress_bar_is_no_picture():
    assert not is_picture({'output_type': 'stream', 'name': 'stderr', 'text': '100%|##########| 3/3'})


@pytest.mark.parametrize('name', NOTEBOOKS)
def test_saved_outputs_are_presentable(name):
    "No traceback, no warning, no progress bar, no path of somebody's machine"
    for cell, out in outputs(read(name)):
        text = str(out)
        assert out.output_type != 'error', f'{cell.id}: {text[:300]}'
        for bad in ('Warning', 'it/s]', '/home/', '/root/', '/tmp/', '/Users/'):
            assert bad not in text, f'cell {cell.id} shows {bad!r}: {text[:300]}'


@pytest.mark.parametrize('name', NOTEBOOKS)
def test_a_notebook_opens_with_a_title(name):
    assert read(name).cells[0].source.startswith('# ')


@pytest.mark.parametrize('name', NOTEBOOKS)
def test_a_line_below_the_title_says_what_it_is(name):
    lines = read(name).cells[0].source.splitlines()[1:4]
    assert [line for line in lines if line.startswith('> ')]


# ---- they run

def run_here(name, said, env):
    "Run a notebook in this process, which ends with it"
    os.chdir(ROOT)
    os.environ.update(env)
    with open(said, 'w') as file:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
            os.dup2(file.fileno(), stream.fileno())
    from nbdev.test import nbdev_test
    run_it = inspect.unwrap(nbdev_test) # the command would take its options from the command line
    try: run_it(path=str(NBS / name), n_workers=0)
    finally:
        for child in multiprocessing.active_children(): child.terminate() # which would be waited for


def shortened(name, folder):
    "A copy of a notebook that trains for fewer epochs than its readers do"
    text = (NBS / name).read_text()
    for long, short in SHORTER[name]:
        assert long in text, f'{name} has no {long!r}: see SHORTER'
        text = text.replace(long, short)
    (folder / 'analysis').symlink_to(NBS / 'analysis') # with results that a page reads
    copy = folder / 'page' / Path(name).name
    copy.parent.mkdir()
    copy.write_text(text)
    return copy


def says_what_is_loaded(file): file.write_text(' '.join(sys.modules))


def test_a_fork_has_loaded_all_that_is_heavy(tmp_path):
    "Python says nothing where a module to be loaded is not found"
    process = forked(says_what_is_loaded, (tmp_path / 'loaded.txt',))
    process.start()
    process.join()
    assert not set(HEAVY) - set((tmp_path / 'loaded.txt').read_text().split())


@pytest.fixture(scope='module')
def run(tmp_path_factory):
    "Runs a notebook in a process of its own"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv('OMP_NUM_THREADS', '1')

        def run_notebook(name, **env):
            folder = tmp_path_factory.mktemp('said')
            said, page = folder / 'output.txt', shortened(name, folder) if name in SHORTER else name
            process = forked(run_here, (page, said, env))
            process.start()
            process.join()
            assert process.exitcode == 0, said.read_text()[-3000:]
        yield run_notebook


@pytest.mark.parametrize('name', RUN)
def test_notebook_runs(run, name): run(name)


def test_a_notebook_that_fails_is_noticed(run, tmp_path):
    page = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell('1 / 0')])
    nbformat.write(page, tmp_path / 'fails.ipynb')
    with pytest.raises(AssertionError, match='ZeroDivisionError'): run(tmp_path / 'fails.ipynb')


def small_runs(folder):
    "The demo's runs, as small as they get"
    from cprfl.runs.recipe import get_recipe
    from cprfl.runs.run import run_recipe
    for name in ('shapes-clip', 'shapes-erm', 'shapes-cprfl-random', 'shapes-cprfl'):
        small = get_recipe(name).with_(name=f'{name}-s0', epochs=1, image_size=32, precision='fp32',
                                       alignment_images=40)
        run_recipe(small, folder, progress=False)


@pytest.mark.parametrize('name', NEED_RUNS)
def test_analyses_run_on_any_runs(run, tmp_path_factory, name):
    run(name, CPRFL_RUNS=str(made_once(tmp_path_factory, 'small_runs', small_runs)))


LABELS = ['dog', 'hair drier', '$x_{1$', 'tree'] # the third one is no formula
OWN = dict( # what images of one's own show: [N, C]
    mixed=(np.random.default_rng(0).random((12, 4)) < 0.5).astype(int), # rare classes only
    full=np.ones((12, 3), int), # each image shows each class, and none is rare
    single=np.array([[1], [0], [1]])) # one class


def own_runs(folder, shown):
    "Runs on images of one's own: no boxes, no record of alignment, no image tower"
    from cprfl.runs.recipe import Recipe
    from cprfl.runs.run import run_recipe
    from cprfl.train.config import TrainConfig
    rng, names = np.random.default_rng(0), [f'{i}.png' for i in range(len(shown))]
    for name in names: Image.fromarray(rng.integers(0, 256, (40, 60, 3), dtype=np.uint8)).save(folder / name)
    table = pd.DataFrame(shown, columns=LABELS[:shown.shape[1]]).assign(path=names)
    table.to_csv(folder / 'all.csv', index=False)
    file, head = str(folder / 'all.csv'), dict(d=16, heads=2, head_dim=8, ffn_dim=16)
    recipe = Recipe(benchmark=None, train_file=file, test_file=file, image_size=64, backbone='shapes',
                    backbone_args=dict(stage=3), semantics='words', alignment_images=0,
                    train=TrainConfig(epochs=1, batch_size=6, select='last', device='cpu'))
    for name in ('one', 'two'): run_recipe(recipe.with_(name=f'{name}-s0', model_args=head), folder, progress=False)
    run_recipe(recipe.with_(name='linear-s0', model='erm'), folder, progress=False)


@pytest.mark.parametrize('shown', OWN)
@pytest.mark.parametrize('name', NEED_RUNS)
def test_analyses_run_on_images_of_your_own(run, tmp_path_factory, name, shown):
    folder = made_once(tmp_path_factory, f'own_runs_{shown}', lambda folder: own_runs(folder, OWN[shown]))
    run(name, CPRFL_RUNS=str(folder))
