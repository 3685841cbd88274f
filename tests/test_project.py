"The house: what an import costs, what it brings along, and files that must agree"
import configparser
import importlib
import importlib.metadata
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import cprfl
from cprfl.runs.recipe import MODELS, RECIPES, Recipe, get_recipe
from cprfl.train.config import TrainConfig

if sys.version_info >= (3, 11): import tomllib
else: import tomli as tomllib

from helpers import MODULES, ROOT

PICTURES = ('matplotlib', 'seaborn', 'ipywidgets', 'IPython')


def python(*args): return subprocess.run([sys.executable, *args], capture_output=True, text=True, check=True, cwd=ROOT, env=os.environ | {'OMP_NUM_THREADS': '1'})


def imported(code):
    "Top-level names in sys.modules after `code`"
    return set(python('-c', f"import sys\n{code}\nprint(*{{m.split('.')[0] for m in sys.modules}})").stdout.split())


# ---- imports

def test_import_is_cheap():
    costs = []
    for _ in range(3):
        rows = re.findall(r'^import time:\s+\d+ \|\s+(\d+) \| ( *)(\S+)$', python('-X', 'importtime', '-c', 'import cprfl').stderr, re.M)
        [cost] = [int(us) for us, indent, name in rows if name == 'cprfl']
        costs.append(cost / 1e6)
    assert min(costs) < 0.3, costs


def test_import_brings_nothing_heavy_along():
    assert not imported('import cprfl') & {'torch', 'torchvision', 'timm', 'open_clip', 'numpy', 'pandas', 'matplotlib', 'accelerate', 'IPython'}
    assert not imported('import cprfl.cli') & {'torch', 'timm', 'matplotlib', 'pandas'}, '--help must be quick'


def test_nothing_below_the_plots_imports_pictures():
    below = [m for m in MODULES if not m.startswith('look.')]
    assert {'data.dataset', 'train.trainer', 'runs.run', 'model.cprfl', 'losses'} <= set(below)
    assert not imported('import ' + ', '.join(f'cprfl.{m}' for m in below)) & set(PICTURES)


@pytest.mark.parametrize('name', MODULES)
def test_modules_say_what_they_export(name):
    module = importlib.import_module(f'cprfl.{name}')
    assert module.__doc__ and module.__all__ and all(hasattr(module, n) for n in module.__all__)
    undocumented = [n for n in module.__all__ if callable(o := getattr(module, n)) and not (o.__doc__ or '').strip()]
    assert not [n for n in undocumented if getattr(getattr(module, n), '__module__', '') == f'cprfl.{name}']


# ---- files from elsewhere never run code

@pytest.mark.parametrize('name', MODULES)
def test_no_module_reads_pickles(name):
    source = (ROOT / 'cprfl' / f"{name.replace('.', '/')}.py").read_text()
    for call in re.findall(r'torch\.load\((?:[^()]|\([^()]*\))*\)', source): assert 'weights_only=True' in call, call
    assert len(re.findall(r'torch\.load\(', source)) == len(re.findall(r'torch\.load\((?:[^()]|\([^()]*\))*\)', source))
    assert 'pickle' not in source.replace('allow_pickle=False', '') and not re.search(r'\b(eval|exec)\(|yaml\.load|shell=True|\bos\.system', source.replace('.eval()', ''))
    for call in re.findall(r'np\.load\((?:[^()]|\([^()]*\))*\)', source): assert 'allow_pickle=True' not in call


# ---- recipes

@pytest.mark.parametrize('name', RECIPES)
def test_recipes_construct_and_say_what_they_are(name):
    recipe = get_recipe(name)
    assert isinstance(recipe, Recipe) and isinstance(recipe.train, TrainConfig) and recipe.name == name and recipe.about and recipe.model in MODELS
    changed = recipe.with_(name='x', epochs=3)
    assert (changed.name, changed.train.epochs) == ('x', 3) and get_recipe(name) == RECIPES[name] == recipe, 'copies are independent'


def test_recipes_refuse_what_they_do_not_know():
    with pytest.raises(ValueError, match='recipe: unknown settings epoch; there are .*epochs'): get_recipe('voc-lt').with_(epoch=3)
    with pytest.raises(ValueError, match="expected one of .*voc-lt.*, got 'voc'"): get_recipe('voc')
    with pytest.raises(ValueError, match='give a benchmark or a train_file'): Recipe(benchmark=None)
    with pytest.raises(ValueError, match='4 cached views need frozen=True'): Recipe(views=4)


# ---- files that must agree

def project(): return tomllib.loads((ROOT / 'pyproject.toml').read_text())


def settings():
    parser = configparser.ConfigParser()
    parser.read(ROOT / 'settings.ini')
    return parser['DEFAULT']


def test_versions_agree():
    assert settings()['version'] == cprfl.__version__ == importlib.metadata.version('cprfl')
    assert 'version' in project()['project']['dynamic'] and project()['tool']['setuptools']['dynamic']['version'] == {'attr': 'cprfl.__version__'}
    assert project()['project']['requires-python'] == '>=' + settings()['min_python']


def test_console_scripts_are_there():
    scripts = project()['project']['scripts']
    assert {'cprfl_demo', 'cprfl_prepare', 'cprfl_train', 'cprfl_evaluate', 'cprfl_predict', 'cprfl_table', 'cprfl_bench'} <= set(scripts)
    for name, target in scripts.items():
        module, func = target.split(':')
        assert callable(getattr(importlib.import_module(module), func)) and (Path(sys.executable).parent / name).is_file(), name


def test_quarto_finds_its_settings():
    "A file at the root alone is silently ignored"
    link = ROOT / 'nbs' / '_quarto.yml'
    assert link.is_symlink() and os.readlink(link) == '../_quarto.yml' and (ROOT / '_quarto.yml').is_file() and not (ROOT / '_quarto.yml').is_symlink()


def test_the_module_index_is_where_pyproject_says():
    from cprfl._modidx import d
    assert project()['project']['entry-points']['nbdev']['cprfl'] == 'cprfl._modidx:d' and d['settings']['lib_path'] == 'cprfl'
    assert {f'cprfl.{m}' for m in MODULES} == {m for m in d['syms'] if not m.endswith('__init__')}


def test_assets_are_packaged():
    from importlib.resources import files
    assert project()['tool']['setuptools']['package-data'] == {'cprfl.assets': ['*.safetensors', '*.csv']}
    for name in ('shapes_clip.safetensors', 'paper.csv'): assert (files('cprfl') / 'assets' / name).is_file()


def test_a_folder_of_the_same_name_does_not_hide_the_package(tmp_path):
    "A script beside the clone is started in a folder that has a `cprfl/`"
    (tmp_path / 'cprfl').mkdir()
    code = "import cprfl; from cprfl.model.semantics import category_semantics; print(cprfl.__version__, category_semantics(['red ring'], 'shapes').shape)"
    done = subprocess.run([sys.executable, '-c', code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and '[1, 128]' in done.stdout, done.stderr
