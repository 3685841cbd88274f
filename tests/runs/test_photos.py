"A start on photographs without a hub: the recipe, what it says of the names, and a run from a made-up wheel"
import re

import numpy as np
import pytest
import timm
from helpers import ROOT
from made_wheel import make_wheel, with_their_names
from PIL import Image

from cprfl import cli
from cprfl.model.wheels import WHEELS
from cprfl.runs.build import Splits, build_model
from cprfl.runs.recipe import get_recipe

NAMES = 'cat', 'dog'


@pytest.fixture
def photos(tmp_path, monkeypatch):
    "Twelve pictures, a table of them, and a made-up wheel"
    monkeypatch.syspath_prepend(tmp_path / 'site')
    make_wheel(tmp_path / 'site', 'efficientnet-lite0', with_their_names(timm.create_model('tf_efficientnet_lite0')))
    monkeypatch.chdir(tmp_path)
    rng, lines = np.random.default_rng(0), ['path,labels']
    for i in range(12):
        Image.fromarray(rng.integers(0, 256, (40, 40, 3), dtype=np.uint8)).save(f'{i}.png')
        lines.append(f'{i}.png,{NAMES[i % 2]}')
    (tmp_path / 'photos.csv').write_text('\n'.join(lines) + '\n')
    return tmp_path


TINY = '--image-size 32 --epochs 1 --views 1 --batch-size 4 --d 16 --heads 2 --head-dim 8 --ffn-dim 16 --precision fp32'
COMMAND = f'--recipe photos --list photos.csv --held-out 0.25 {TINY}'.split()


def said(recipe, capsys):
    Splits.read(recipe).announce(recipe)
    return capsys.readouterr().out


def test_a_run_on_photographs_without_a_hub(photos, monkeypatch, capfd):
    monkeypatch.setattr('requests.head', lambda *a, **kw: pytest.fail('the hub was asked'))
    cli.train([*COMMAND, '--name', 'mine'])
    assert 'semantics: random vectors, because no two names share a word' in capfd.readouterr().out
    cli.predict(['runs/mine', '0.png'])
    assert re.search(r'\d\.\d{3}  (cat|dog)  \(tail\)', capfd.readouterr().out)


@pytest.mark.parametrize('names, sentence', [
    (('sea lion', 'sea horse'), 'semantics: the words of the names, because several names have sea;'),
    (('red circle', 'blue star'), 'semantics: the CLIP in the package, which knows all the names\n')])
def test_what_is_said_of_the_names(photos, names, sentence, capsys):
    table = photos / 'photos.csv'
    table.write_text(table.read_text().replace('cat', names[0]).replace('dog', names[1]))
    assert sentence in said(get_recipe('photos').with_(train_file=str(table)), capsys)


def test_a_model_without_semantics_says_nothing_of_them(photos, capsys):
    recipe = get_recipe('photos').with_(train_file=str(photos / 'photos.csv'), model='erm')
    assert 'semantics' not in said(recipe, capsys)


def test_without_the_extra_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setattr('sys.path', [])
    with pytest.raises(RuntimeError, match=r'pip install "cprfl\[photos\]"'):
        build_model(get_recipe('photos'), list(NAMES))


def test_the_extra_has_the_wheel_of_the_recipe():
    recipe, pyproject = get_recipe('photos'), (ROOT / 'pyproject.toml').read_text()
    package = WHEELS[recipe.backbone.removeprefix('wheel:')].package
    assert re.search(rf'^photos = \["{package}==', pyproject, re.M)
