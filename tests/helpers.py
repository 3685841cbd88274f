"What several tests share"
import os
import shutil
from pathlib import Path

ROOT = Path(__file__).parent.parent
NBS = ROOT / 'nbs'
FIXTURES = ROOT / 'tests' / 'fixtures'
SHARED = Path(os.environ.get('CPRFL_SHARED', ROOT.parent / 'shared'))

LEFT_BEHIND = [NBS / 'analysis/runs', *(NBS / 'tutorials' / name for name in ('runs', 'data', 'cache'))] # by notebooks that were run by hand
NOT_SOURCE = {'.ipynb_checkpoints', '_proc'}


def is_source(path): return not NOT_SOURCE & set(path.parts) and not any(path.is_relative_to(left) for left in LEFT_BEHIND)


MODULES = sorted('.'.join(p.relative_to(ROOT / 'cprfl').with_suffix('').parts) for p in (ROOT / 'cprfl').rglob('[!_]*.py'))
NOTEBOOKS = sorted(p.relative_to(NBS).as_posix() for p in NBS.rglob('*.ipynb') if is_source(p))
REFERENCE = [n for n in NOTEBOOKS if 'default_exp' in (NBS / n).read_text()]


def copy_project(folder, *names):
    "A copy of the notebooks, to export, clean or render in, and of some files beside them"
    def ignore(at, entries): return [e for e in entries if not is_source(Path(at) / e)]
    shutil.copytree(NBS, folder / 'nbs', symlinks=True, ignore=ignore)
    for name in names: shutil.copy(ROOT / name, folder / name)
    return folder


class TouchesAFile:
    "A pickle that would touch a file when it is read"
    def __init__(self, path): self.path = path
    def __reduce__(self): return open, (str(self.path), 'w')
