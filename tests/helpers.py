"What several tests share"
import importlib
import inspect
import multiprocessing
import os
import shutil
from multiprocessing import forkserver
from pathlib import Path

import pytest
from filelock import FileLock

ROOT = Path(__file__).parent.parent
NBS = ROOT / 'nbs'
FIXTURES = ROOT / 'tests' / 'fixtures'
SHARED = Path(os.environ.get('CPRFL_SHARED', ROOT.parent / 'shared'))

BESIDE_TUTORIALS = [NBS / 'tutorials' / name for name in ('runs', 'data', 'cache')]
LEFT_BEHIND = [NBS / 'analysis' / 'runs', *BESIDE_TUTORIALS] # by notebooks that were run by hand
NOT_SOURCE = {'.ipynb_checkpoints', '_proc', '__pycache__'}


def is_source(path):
    return not NOT_SOURCE & set(path.parts) and not any(path.is_relative_to(left) for left in LEFT_BEHIND)


def module_name(file): return '.'.join(file.relative_to(ROOT / 'cprfl').with_suffix('').parts)


MODULES = sorted(module_name(file) for file in (ROOT / 'cprfl').rglob('[!_]*.py'))
NOTEBOOKS = sorted(file.relative_to(NBS).as_posix() for file in NBS.rglob('*.ipynb') if is_source(file))
REFERENCE = [name for name in NOTEBOOKS if 'default_exp' in (NBS / name).read_text()]

# a test that walks them must not pass because it saw none, or only those of one folder
assert len(MODULES) >= 28, MODULES
assert len(REFERENCE) >= len(MODULES), REFERENCE
assert len(NOTEBOOKS) > len(REFERENCE), NOTEBOOKS


# Forks of a process that has loaded the heavy libraries and drawn Shapes-LT, which saves seconds for each. Python has
# one such process, so whoever forks says the same libraries.
HEAVY = """torch torchvision timm open_clip accelerate torchmetrics.classification pandas scipy.stats sklearn.metrics
matplotlib.pyplot seaborn ipywidgets nbdev.test nbdev.showdoc nbformat pytest cprfl.cli drawn""".split()
FORKS = multiprocessing.get_context('forkserver')
FORKS.set_forkserver_preload(HEAVY)


def forked(target, args):
    "A process like that, not yet started"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv('PYTHONPATH', str(ROOT / 'tests'), prepend=os.pathsep) # where `drawn` is
        forkserver.ensure_running()
    return FORKS.Process(target=target, args=args)


VARIADIC = inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD


def public_symbols(name):
    "What a module defines and exports"
    module = importlib.import_module(f'cprfl.{name}')
    things = {symbol: getattr(module, symbol) for symbol in module.__all__}
    def own(thing): return not callable(thing) or getattr(thing, '__module__', None) == module.__name__
    return {symbol: thing for symbol, thing in things.items() if own(thing)}


def copy_project(folder, *names):
    "A copy of the notebooks, to export, clean or render in, and of some files and folders beside them"
    def ignore(at, entries): return [e for e in entries if not is_source(Path(at) / e)]
    for name in ('nbs', *names):
        if (ROOT / name).is_dir(): shutil.copytree(ROOT / name, folder / name, symlinks=True, ignore=ignore)
        else: shutil.copy(ROOT / name, folder / name)
    return folder


def made_once(tmp_path_factory, name, make):
    "A folder that `make(folder)` fills; where several processes test, one fills it for all"
    base = tmp_path_factory.getbasetemp()
    if 'PYTEST_XDIST_WORKER' in os.environ: base = base.parent
    folder, complete = base / name, base / f'{name}.complete'
    with FileLock(base / f'{name}.lock'):
        if not complete.exists():
            folder.mkdir()
            make(folder)
            complete.touch()
    return folder


class TouchesAFile:
    "A pickle that would touch a file when it is read"
    def __init__(self, path): self.path = path
    def __reduce__(self): return open, (str(self.path), 'w')
