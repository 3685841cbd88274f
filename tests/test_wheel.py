"A wheel has every module and every asset: built from a copy, installed into an empty folder, used from elsewhere"
import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from zipfile import ZipFile

import pytest
from helpers import MODULES, ROOT, made_once

SOURCES = ['pyproject.toml', 'README.md', 'LICENSE']
ASSETS = sorted(file.name for file in (ROOT / 'cprfl' / 'assets').iterdir())

USE = """
import hashlib, importlib, json, sys
from importlib.resources import files

modules, assets = json.load(sys.stdin)
where = {name: importlib.import_module(f'cprfl.{name}').__file__ for name in modules}
from cprfl.model import category_semantics
digests = {name: hashlib.sha256((files('cprfl') / 'assets' / name).read_bytes()).hexdigest() for name in assets}
print(json.dumps(dict(where=where, digests=digests, shape=list(category_semantics(['red ring']).shape))))
"""


def pip(*args):
    command = [sys.executable, '-m', 'pip', '--quiet', '--disable-pip-version-check', *map(str, args)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def build_and_install(folder):
    "A copy is built, because a build leaves files beside its sources"
    source, site = folder / 'source', folder / 'site'
    shutil.copytree(ROOT / 'cprfl', source / 'cprfl', ignore=shutil.ignore_patterns('__pycache__'))
    for name in SOURCES: shutil.copy(ROOT / name, source / name)
    pip('wheel', '--no-deps', '--no-index', '--no-build-isolation', '--wheel-dir', folder, source)
    [wheel] = folder.glob('*.whl')
    pip('install', '--no-deps', '--no-index', '--no-compile', '--target', site, wheel)


@pytest.fixture(scope='module')
def built(tmp_path_factory):
    "Folder of the wheel and of `site`, where it is installed"
    return made_once(tmp_path_factory, 'built', build_and_install)


@pytest.fixture(scope='module')
def used(built, tmp_path_factory):
    "What a process says that knows the installed files only"
    env = os.environ | {'PYTHONPATH': str(built / 'site'), 'OMP_NUM_THREADS': '1'}
    elsewhere = tmp_path_factory.mktemp('elsewhere')
    command, given = [sys.executable, '-c', USE], json.dumps([MODULES, ASSETS])
    done = subprocess.run(command, cwd=elsewhere, env=env, input=given, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_the_wheel_holds_the_package_and_nothing_else(built):
    [wheel] = built.glob('*.whl')
    top = {name.split('/')[0] for name in ZipFile(wheel).namelist()}
    assert top == {'cprfl', f"{'-'.join(wheel.name.split('-')[:2])}.dist-info"}


def test_every_module_is_imported_from_the_wheel(built, used):
    assert len(used['where']) >= 28
    elsewhere = {name: file for name, file in used['where'].items() if built / 'site' not in Path(file).parents}
    assert not elsewhere


def test_every_asset_is_read_from_the_wheel(used):
    assert len(ASSETS) >= 2
    expected = {name: hashlib.sha256((ROOT / 'cprfl' / 'assets' / name).read_bytes()).hexdigest() for name in ASSETS}
    assert used['digests'] == expected


def test_the_embedded_text_tower_works_from_the_wheel(used):
    assert used['shape'] == [1, 128]
