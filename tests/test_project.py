"The house: what an import brings along, files from elsewhere, recipes, and settings that must agree"
import ast
import configparser
import importlib
import importlib.metadata
import json
import os
import re
import subprocess
import sys
import tomllib
from importlib.resources import files
from pathlib import Path

import pytest
import yaml
from helpers import MODULES, ROOT
from packaging.requirements import Requirement
from packaging.version import Version

import cprfl
from cprfl._modidx import d as index
from cprfl.model.registry import MODELS
from cprfl.runs.recipe import OF_LISTS, RECIPES, Recipe, get_recipe
from cprfl.train.config import TrainConfig

PROJECT = tomllib.loads((ROOT / 'pyproject.toml').read_text())
SCRIPTS = PROJECT['project']['scripts']
PICTURES = {'matplotlib', 'seaborn', 'ipywidgets', 'IPython'}


# ---- imports

def imported(code):
    "Top-level names that `code` adds to those of a bare interpreter"
    program = f'import json, sys\nbefore = set(sys.modules)\n{code}\nprint(json.dumps([*set(sys.modules) - before]))'
    env = os.environ | {'OMP_NUM_THREADS': '1'}
    done = subprocess.run([sys.executable, '-c', program], cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return {name.split('.')[0] for name in json.loads(done.stdout)}


def test_import_cprfl_brings_no_library():
    assert imported('import cprfl') - sys.stdlib_module_names == {'cprfl'}


def test_the_command_line_brings_nothing_heavy():
    assert not imported('import cprfl.cli') & {'torch', 'timm', 'matplotlib', 'pandas'}, '--help must be quick'


def test_nothing_below_the_pictures_loads_a_plotting_library():
    below = [name for name in MODULES if not name.startswith('look.')]
    assert {'data.dataset', 'train.trainer', 'runs.run', 'model.cprfl', 'losses'} <= set(below)
    assert not imported('import ' + ', '.join(f'cprfl.{name}' for name in below)) & PICTURES


@pytest.mark.parametrize('name', MODULES)
def test_a_module_says_what_it_is_for(name): assert importlib.import_module(f'cprfl.{name}').__doc__


@pytest.mark.parametrize('name', MODULES)
def test_a_module_has_what_it_exports(name):
    module = importlib.import_module(f'cprfl.{name}')
    assert module.__all__
    assert not [symbol for symbol in module.__all__ if not hasattr(module, symbol)]


# ---- the order of the modules

CONTRACTS = {contract['type']: contract for contract in PROJECT['tool']['importlinter']['contracts']}


def test_three_contracts_hold_the_order_of_the_modules():
    assert set(CONTRACTS) == {'layers', 'acyclic_siblings', 'forbidden'}
    assert len(PROJECT['tool']['importlinter']['contracts']) == 3


def test_no_import_is_excepted_from_the_contracts():
    assert not [name for name, contract in CONTRACTS.items() if 'ignore_imports' in contract]


def test_every_module_below_the_pictures_does_without_them():
    [layers, forbidden] = CONTRACTS['layers']['layers'], CONTRACTS['forbidden']
    names = {name for layer in layers for name in layer.split(' : ')}
    assert PROJECT['tool']['importlinter']['include_external_packages']
    assert PICTURES <= set(forbidden['forbidden_modules'])
    assert {f'cprfl.{name}' for name in names - {'cli', 'bench', 'look'}} == set(forbidden['source_modules'])


# ---- files from elsewhere never run code

RUNS_CODE = {'eval', 'exec', 'os.system', 'os.popen', 'yaml.load', 'yaml.unsafe_load', 'yaml.full_load', 'joblib.load'}


PICKLES = re.compile(r'\b(c?pickle|dill|cloudpickle|shelve)\b')


def keywords(call): return {word.arg: ast.unparse(word.value) for word in call.keywords}


def runs_code(node):
    "A piece of a program that could run what a file says"
    if isinstance(node, ast.Import | ast.ImportFrom): return bool(PICKLES.search(ast.unparse(node)))
    if not isinstance(node, ast.Call): return False
    name, given = ast.unparse(node.func), keywords(node)
    if name == 'torch.load': return given.get('weights_only') != 'True'
    return name in RUNS_CODE or given.get('allow_pickle', 'False') != 'False' or given.get('shell', 'False') != 'False'


def dangerous(source): return [ast.unparse(node) for node in ast.walk(ast.parse(source)) if runs_code(node)]


# it reads no file: the process that starts a worker sends it functions, through a pipe
ALLOWED = {'runs.registered': ['import cloudpickle'] * 2}


@pytest.mark.parametrize('name', MODULES)
def test_no_module_runs_what_a_file_says(name):
    source = (ROOT / 'cprfl' / f"{name.replace('.', '/')}.py").read_text()
    assert dangerous(source) == ALLOWED.get(name, [])


@pytest.mark.parametrize('source', [
    'import pickle', 'from pickle import loads', 'torch.load(f)', 'torch.load(f, weights_only=False)', 'eval(text)',
    'np.load(f, allow_pickle=True)', 'yaml.load(f, Loader)', 'os.system(line)', 'run(line, shell=True)'])
def test_code_that_runs_a_file_is_noticed(source): assert dangerous(source)


@pytest.mark.parametrize('source', [
    "torch.load(f, map_location='cpu', weights_only=True)", 'np.load(f)', 'np.load(f, allow_pickle=False)',
    'model.eval()', 'yaml.safe_load(f)', 'run([line])'])
def test_code_that_reads_data_is_fine(source): assert not dangerous(source)


# ---- recipes

@pytest.mark.parametrize('name', RECIPES)
def test_a_recipe_says_what_it_is(name):
    recipe = get_recipe(name)
    assert isinstance(recipe.train, TrainConfig)
    assert recipe.name == name
    assert recipe.about
    assert recipe.model in MODELS


@pytest.mark.parametrize('name', RECIPES)
def test_a_changed_recipe_leaves_the_original(name):
    changed = get_recipe(name).with_(name='x', epochs=3)
    assert (changed.name, changed.train.epochs) == ('x', 3)
    assert get_recipe(name) == RECIPES[name]


def test_an_unknown_setting_is_refused():
    with pytest.raises(ValueError, match='recipe: unknown settings epoch; there are .*epochs'):
        get_recipe('voc-lt').with_(epoch=3)


def test_an_unknown_recipe_is_refused():
    with pytest.raises(ValueError, match="expected one of .*voc-lt.*, got 'voc'"): get_recipe('voc')


def test_a_recipe_needs_data():
    with pytest.raises(ValueError, match='give a benchmark or a train_file'): Recipe(benchmark=None)


def test_a_list_takes_the_place_of_the_benchmark():
    recipe = get_recipe('shapes-cprfl').with_(train_file='mine.csv')
    assert (recipe.benchmark, recipe.train_file) == (None, 'mine.csv')


def test_a_benchmark_takes_the_place_of_lists():
    recipe = get_recipe('frozen-cprfl').with_(test_file='test.txt', classes='names.txt').with_(benchmark='voc-lt')
    assert recipe.benchmark == 'voc-lt'
    assert [name for name in OF_LISTS if getattr(recipe, name) is not None] == []


@pytest.mark.parametrize('name', OF_LISTS)
def test_a_list_beside_a_benchmark_is_refused(name):
    value = 'ignore' if name == 'unknown' else 'mine.txt'
    with pytest.raises(ValueError, match=f"{name}: the benchmark 'shapes-lt' has its own, got '{value}'"):
        Recipe(**{name: value})


def test_cached_views_need_a_frozen_backbone():
    with pytest.raises(ValueError, match='4 cached views need frozen=True'): Recipe(views=4)


# ---- files that must agree

def settings():
    parser = configparser.ConfigParser()
    parser.read(ROOT / 'settings.ini')
    return parser['DEFAULT']


def test_versions_agree():
    assert settings()['version'] == cprfl.__version__
    assert importlib.metadata.version('cprfl') == cprfl.__version__


def test_the_version_is_written_once():
    assert 'version' in PROJECT['project']['dynamic']
    assert PROJECT['tool']['setuptools']['dynamic']['version'] == {'attr': 'cprfl.__version__'}


def test_the_oldest_python_is_the_same_everywhere():
    oldest = settings()['min_python']
    assert PROJECT['project']['requires-python'] == f'>={oldest}'
    assert PROJECT['tool']['mypy']['python_version'] == oldest
    assert oldest in yaml.safe_load(CI.read_text())['jobs']['test']['strategy']['matrix']['python']


# the first release of each without a known hole that the kit could meet
SAFE = {
    'torch': '2.10', 'torchvision': '0.25', 'pillow': '13', 'filelock': '4.2.1', 'pyarrow': '23.0.1',
    'scikit-learn': '1.5', 'requests': '2.33', 'urllib3': '2.7', 'tqdm': '4.66.3', 'jupyterlab': '4.6.4',
    'pytest': '9.0.3', 'setuptools': '78.1.1',
}


def lowest_versions():
    "The lowest version that each requirement admits"
    project = PROJECT['project']
    lines = [*project['dependencies'], *project['optional-dependencies']['dev'], *PROJECT['build-system']['requires']]
    requirements = [Requirement(line) for line in lines]
    bounds = [(r.name, spec.version) for r in requirements for spec in r.specifier if spec.operator == '>=']
    return {name: Version(version) for name, version in bounds}


@pytest.mark.parametrize('name', SAFE)
def test_the_lowest_version_is_a_safe_one(name): assert lowest_versions()[name] >= Version(SAFE[name])


@pytest.mark.parametrize('job, command', [('lowest', 'make lowest'), ('lowest', 'make audit'), ('audit', 'make audit')])
def test_the_workflow_tries_the_lowest_versions_and_audits(job, command):
    steps = yaml.safe_load(CI.read_text())['jobs'][job]['steps']
    assert any(step.get('run', '').startswith(command) for step in steps)


def test_the_workflow_tries_a_newer_python():
    assert '3.13' in yaml.safe_load(CI.read_text())['jobs']['test']['strategy']['matrix']['python']


def test_the_console_scripts_are_there():
    names = ('demo', 'prepare', 'train', 'evaluate', 'predict', 'decide', 'report', 'export', 'table', 'bench')
    assert {f'cprfl_{name}' for name in names} <= set(SCRIPTS)


@pytest.mark.parametrize('name', SCRIPTS)
def test_a_console_script_calls_a_function(name):
    module, func = SCRIPTS[name].split(':')
    assert callable(getattr(importlib.import_module(module), func))


@pytest.mark.parametrize('name', SCRIPTS)
def test_a_console_script_is_installed(name): assert (Path(sys.executable).parent / name).is_file()


def test_quarto_finds_its_settings():
    "A file at the root alone is silently ignored"
    link = ROOT / 'nbs' / '_quarto.yml'
    assert os.readlink(link) == '../_quarto.yml'
    assert not (ROOT / '_quarto.yml').is_symlink()
    assert link.is_file()


def test_the_index_of_names_is_where_pyproject_says():
    assert PROJECT['project']['entry-points']['nbdev']['cprfl'] == 'cprfl._modidx:d'
    assert index['settings']['lib_path'] == 'cprfl'


def test_the_index_of_names_has_every_module():
    assert {name for name in index['syms'] if not name.endswith('__init__')} == {f'cprfl.{name}' for name in MODULES}


@pytest.mark.parametrize('name', ['shapes_clip.safetensors', 'paper.csv'])
def test_an_asset_is_found(name): assert (files('cprfl') / 'assets' / name).is_file()


def test_a_folder_of_the_same_name_does_not_hide_the_package(tmp_path):
    "A script beside the clone is started in a folder that has a `cprfl/`"
    (tmp_path / 'cprfl').mkdir()
    code = "from importlib.resources import files; print((files('cprfl') / 'assets' / 'paper.csv').is_file())"
    done = subprocess.run([sys.executable, '-c', code], cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout.strip() == 'True', done.stderr


# ---- hooks and actions

CI = ROOT / '.github' / 'workflows' / 'ci.yml'
HOOKS = yaml.safe_load((ROOT / '.pre-commit-config.yaml').read_text())['repos']


def test_hooks_need_no_network():
    assert {repo['repo'] for repo in HOOKS} == {'local'}
    assert {hook['language'] for repo in HOOKS for hook in repo['hooks']} == {'system'}


def test_hooks_clean_export_and_check_style():
    commands = [hook['entry'].split()[0] for repo in HOOKS for hook in repo['hooks']]
    assert commands == ['nbdev_clean', 'nbdev_export', 'ruff']
    assert not [command for command in commands if not (Path(sys.executable).parent / command).is_file()]


RELEASE = yaml.safe_load((CI.parent / 'release.yml').read_text())['jobs']


def test_a_release_needs_no_token():
    "PyPI trusts the workflow, and only its last job can publish"
    assert RELEASE['publish']['permissions'] == {'id-token': 'write'}
    assert 'permissions' not in RELEASE['build']
    assert 'secrets.' not in (CI.parent / 'release.yml').read_text()


def test_a_release_has_the_version_of_its_tag():
    assert any('__version__' in step.get('run', '') for step in RELEASE['build']['steps'])


def test_actions_are_pinned():
    "A tag can be moved, a commit cannot; the comment says which release it is"
    used = [action for file in CI.parent.glob('*.yml') for action in re.findall(r'uses: *(.+)', file.read_text())]
    assert len(used) >= 6
    assert not [action for action in used if not re.fullmatch(r'[\w./-]+@[0-9a-f]{40} # v\d+(\.\d+)*', action)]


@pytest.mark.parametrize('package', ['data', 'model', 'train', 'runs', 'look'])
def test_packages_hand_on_all_public_names(package):
    of_modules = [importlib.import_module(f'cprfl.{m}') for m in MODULES if m.startswith(f'{package}.')]
    public = {name for module in of_modules for name in module.__all__}
    assert set(importlib.import_module(f'cprfl.{package}').__all__) == public
