"A run for others: it stands alone, says what it is, and keeps what is private"
import json

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file

from cprfl.cli import export as cprfl_export
from cprfl.runs.export import ModelFile
from cprfl.runs.hub import model_card
from cprfl.runs.recipe import Recipe
from cprfl.runs.run import Run, run_recipe
from cprfl.train.config import TrainConfig

NET = dict(channels=(8, 8, 16, 16))
NAMES = ['red|ring', 'blue_star']


@pytest.fixture(scope='module')
def home(tmp_path_factory):
    "Pictures of two classes, and a pretrained network that the run does not keep"
    folder, rng = tmp_path_factory.mktemp('home'), np.random.default_rng(0)
    for name in NAMES:
        (folder / 'pictures' / name).mkdir(parents=True)
        for i in range(6):
            pixels = rng.integers(0, 256, (40, 40, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / 'pictures' / name / f'{name[0]}{i}.png')
    torch.manual_seed(0)
    save_file(timm.create_model('resnet10t', **NET).state_dict(), folder / 'net.safetensors')
    return folder


@pytest.fixture(scope='module')
def run(home):
    recipe = Recipe(
        name='small', benchmark=None, train_file=str(home / 'pictures'), held_out=0.3, image_size=32,
        backbone='timm:resnet10t', backbone_args=NET, weights=str(home / 'net.safetensors'), frozen=True,
        semantics='words', model_args=dict(d=16, heads=2, head_dim=8, ffn_dim=16),
        train=TrainConfig(epochs=1, select='last', ema=0., device='cpu'))
    return run_recipe(recipe, home / 'runs', progress=False)


@pytest.fixture(scope='module')
def shared(run, home):
    run.to_hub(home / 'shared')
    return home / 'shared'


def images(): return torch.randint(0, 256, (3, 3, 32, 32), dtype=torch.uint8)


def test_a_frozen_run_brings_its_backbone(run, shared, home):
    x, expected = images(), run.model()
    (home / 'net.safetensors').rename(home / 'moved.safetensors')
    try: model = Run.from_hub(shared).model()
    finally: (home / 'moved.safetensors').rename(home / 'net.safetensors')
    assert torch.equal(model(x), expected(x))


def test_results_go_along(run, shared):
    assert Run.from_hub(str(shared)).report == run.report


def test_it_can_be_shared_again(shared, tmp_path):
    Run.from_hub(shared).to_hub(tmp_path / 'again')
    assert (tmp_path / 'again' / 'backbone.safetensors').is_file()


@pytest.mark.parametrize('name', ['predictions.parquet', 'state', 'skipped.txt'])
def test_names_of_images_and_states_stay_at_home(shared, name):
    assert not (shared / name).exists()


def test_no_path_of_the_machine_is_in_it(shared, home):
    assert str(home) not in ''.join(file.read_text() for file in shared.iterdir() if file.suffix in ('.json', '.md'))


def test_no_file_runs_code(shared):
    assert {file.suffix for file in shared.iterdir()} <= {'.json', '.csv', '.md', '.safetensors'}


def test_the_card_shows_names_as_they_are(run):
    assert r'| red\|ring |' in model_card(run)


def test_the_card_says_what_is_missing(run):
    assert 'They are not calibrated, and no threshold was measured.' in model_card(run)


def test_decisions_are_in_the_card_and_in_the_file(run, home, tmp_path):
    run.to_hub(tmp_path / 'shared')
    (tmp_path / 'shared' / 'decisions.json').write_text(json.dumps(dict(threshold=[0.2, 0.7])))
    decided = Run.from_hub(tmp_path / 'shared')
    assert 'no threshold was measured' not in model_card(decided)
    decided.export(tmp_path / 'm.pt2', batches=())
    assert ModelFile(tmp_path / 'm.pt2').about['decisions'] == dict(threshold=[0.2, 0.7])


def test_a_repository_is_no_folder(run, monkeypatch):
    monkeypatch.setattr('cprfl.runs.hub.HubRun.push_to_hub', lambda self, repo, **kw: f'sent to {repo}')
    assert run.to_hub('me/mine') == 'sent to me/mine'


@pytest.mark.parametrize('to', ['runs/shared', 'shared', 'runs/mine/shared', 'me/', ''])
def test_a_text_that_could_be_a_folder_is_not_uploaded(run, tmp_path, monkeypatch, to):
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'runs').mkdir()
    monkeypatch.setattr('cprfl.runs.hub.HubRun.push_to_hub', lambda *_, **kw: pytest.fail('uploaded'))
    monkeypatch.setattr('cprfl.runs.hub.HubRun.save_pretrained', lambda *_: None)
    with pytest.raises(ValueError, match='nothing was uploaded'): run.to_hub(to)


def test_the_command_writes_a_file(run, tmp_path, capsys):
    cprfl_export([str(run.folder), str(tmp_path / 'm.pt2'), '--batch', '2'])
    assert 'largest difference from PyTorch' in capsys.readouterr().out


def test_the_command_names_the_endings(run, capsys):
    with pytest.raises(SystemExit): cprfl_export([str(run.folder), 'm.pth'])
    assert 'expected one of .onnx, .pt2, got ' in capsys.readouterr().err
