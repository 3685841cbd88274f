"New classes of finished runs, by their names"
import shutil

import numpy as np
import open_clip
import pandas as pd
import pytest
import torch
from safetensors.torch import save_file

from cprfl.cli import predict as cprfl_predict
from cprfl.cli import table as cprfl_table
from cprfl.data.shapes import shapes_classes
from cprfl.decisions import Decisions
from cprfl.runs.build import Splits, hidden_classes
from cprfl.runs.recipe import Recipe
from cprfl.runs.run import Run, run_recipe
from cprfl.train.config import TrainConfig

TINY = Recipe(
    name='tiny', backbone='shapes', image_size=32, semantics='shapes', semantics_norm=12.,
    model_args=dict(d=16, heads=2, head_dim=8, ffn_dim=16),
    train=TrainConfig(epochs=1, select='last', ema=0., precision='fp32', batch_size=256))
PAIRS = ['red star', 'blue circle']
KNOWN = shapes_classes()


def trained(folder, **changes): return run_recipe(TINY.with_(**changes), folder, progress=False)


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    "Runs, vectors for all classes, and a picture"
    from PIL import Image
    folder = tmp_path_factory.mktemp('unseen')
    vectors = np.random.default_rng(0).normal(size=(20, 8)).astype('float32')
    np.save(folder / 'vectors.npy', vectors)
    np.save(folder / 'more.npy', np.eye(3, 8, dtype='float32'))
    (folder / 'more.txt').write_text('zebra\nfire hydrant\ntv\n')
    Image.new('RGB', (40, 30), 'red').save(folder / 'red.png')
    trained(folder, name='shapes', hide=['tail'])
    trained(folder, name='file', hide=['tail'], semantics=f'file:{folder / "vectors.npy"}')
    return folder


def test_images_of_hidden_classes_leave_the_training():
    whole, data = (Splits.read(TINY.with_(hide=hide)) for hide in ([], ['red ring']))
    shows = whole.train.targets[:, KNOWN.index('red ring')] > 0
    assert len(data.train) == (~shows).sum()
    assert len(data.test) == len(whole.test)
    assert 'red ring' not in data.classes


def test_a_group_hides_all_its_classes():
    train = Splits.read(TINY).train
    assert hidden_classes(['tail', 'red ring'], train).tolist() == [0, *train.groups['tail']]


def test_an_unknown_class_cannot_be_hidden():
    with pytest.raises(ValueError, match="hide: expected one of .* got 'zebra'"):
        Splits.read(TINY.with_(hide=['zebra']))


def test_some_class_must_be_left():
    with pytest.raises(ValueError, match='expected some classes to be left'):
        Splits.read(TINY.with_(hide=['head', 'medium', 'tail']))


def test_the_groups_of_the_rest_stay(folder):
    groups = {name: len(members) for name, members in Run(folder / 'shapes').groups.items()}
    assert groups == dict(head=6, medium=6, tail=0)


def test_old_classes_keep_their_scores(folder):
    run, images = Run(folder / 'shapes'), torch.randint(0, 256, (3, 3, 32, 32), dtype=torch.uint8)
    extended = run.add_classes(PAIRS, num_images=40)
    with torch.no_grad(): assert extended(images)[:, :12].equal(run.model()(images))


def test_a_new_class_does_not_see_the_others(folder):
    run, images = Run(folder / 'shapes'), torch.randint(0, 256, (3, 3, 32, 32), dtype=torch.uint8)
    with torch.no_grad(): alone, both = (run.add_classes(n, num_images=40)(images) for n in (PAIRS[:1], PAIRS))
    torch.testing.assert_close(alone[:, 12], both[:, 12], atol=1e-4, rtol=1e-4)


def test_random_names_are_other_classes(folder):
    run = Run(folder / 'shapes')
    own, control = (run.add_classes(PAIRS, random=r, num_images=20).semantics for r in (False, True))
    assert own.shape == control.shape
    assert not own.allclose(control)


def test_a_file_knows_the_classes_that_were_hidden(folder):
    run = Run(folder / 'file')
    vectors = torch.from_numpy(np.load(folder / 'vectors.npy'))
    made = run.add_classes(['red star'], num_images=20).semantics[0]
    expected = vectors[KNOWN.index('red star')]
    torch.testing.assert_close(made / made.norm(), expected / expected.norm())


def test_a_name_that_a_file_does_not_know_is_an_error(folder):
    with pytest.raises(ValueError, match='rows for its 20 classes, and none for zebra'):
        Run(folder / 'file').add_classes(['zebra'])


def test_a_vocabulary_of_the_same_encoder_knows_more(folder):
    source = f"file:{folder / 'more.txt'}={folder / 'more.npy'}"
    run = Run(folder / 'file')
    assert run.add_classes(['Zebras'], semantics=source, num_images=20).semantics.shape == (1, 8)
    with pytest.raises(ValueError, match='has 3 names, but not giraffe'):
        run.add_classes(['giraffe'], semantics=source)


def test_another_encoder_is_an_error(folder):
    with pytest.raises(ValueError, match='expected vectors of the width 128'):
        Run(folder / 'shapes').add_classes(['zebra'], semantics='random:7')


def test_a_text_tower_embeds_any_name(tmp_path):
    torch.manual_seed(0)
    save_file(open_clip.create_model('ViT-S-32-alt').state_dict(), tmp_path / 'tower.safetensors')
    run = trained(tmp_path, semantics=f'clip:ViT-S-32-alt/{tmp_path / "tower.safetensors"}')
    assert run.add_classes(['zebra', 'fire hydrant'], num_images=20).num_classes == 22


def test_a_linear_head_has_no_new_classes(tmp_path):
    with pytest.raises(ValueError, match='expected a model with a PI network, or one with names'):
        trained(tmp_path, model='erm', model_args={}).add_classes(['zebra'])


def test_free_prompts_have_no_new_classes(tmp_path):
    run = trained(tmp_path, model_args=TINY.model_args | dict(free_prompts=True))
    with pytest.raises(ValueError, match='expected a model with a PI network, or one with names'):
        run.add_classes(['cyan star'])


def test_predict_asks_for_more_classes(folder, capsys):
    cprfl_predict([folder / 'shapes', folder / 'red.png', '--also', 'red star, blue circle', '--k', 14])
    out = capsys.readouterr().out
    assert 'red star  (by its name)' in out
    assert out.count('by its name') == 2


def test_a_table_of_predictions_has_the_new_classes(folder):
    out = folder / 'table.csv'
    cprfl_predict([folder / 'shapes', folder / 'red.png', '--also', 'red star', '--out', out])
    assert list(pd.read_csv(out))[-2:] == ['red star', 'predicted']


def test_a_table_decides_old_classes_by_their_thresholds(folder, tmp_path, capsys):
    run = Run(shutil.copytree(folder / 'shapes', tmp_path / 'shapes'))
    C = len(run.classes)
    never, zeros, ones = np.full(C, 50.), np.zeros(C), np.ones(C)
    Decisions(run.classes, never, ones, zeros, ones, 0., 9, 10., 10.).save(run.folder / 'decisions.json')
    table = tmp_path / 'table.csv'
    cprfl_predict([run.folder, folder / 'red.png', '--also', 'red star', '--out', table, '--cache', tmp_path / 'cache'])
    row = pd.read_csv(table, keep_default_na=False).iloc[0]
    assert row['predicted'] == ('red star' if row['red star'] >= 0.5 else '')
    assert row['unsure'] == ''
    assert 'decided by the thresholds of cprfl_decide, and from 0.5 for red star' in capsys.readouterr().out


def test_predict_says_which_name_is_unknown(folder, capsys):
    with pytest.raises(SystemExit): cprfl_predict([folder / 'shapes', folder / 'red.png', '--also', 'zebra'])
    assert "does not know 'zebra'" in capsys.readouterr().err


@pytest.fixture
def tiny_protocol(monkeypatch):
    from dataclasses import replace

    from cprfl.runs import tables
    small = replace(tables.get_protocol('shapes'), recipe=TINY, inputs={})
    monkeypatch.setitem(tables.PROTOCOLS, 'shapes', small)


def test_the_table_of_hidden_classes(tmp_path, capsys, tiny_protocol):
    cprfl_table(['--tables', 'unseen', '--seeds', 1, '--out', tmp_path, '--workers', 1])
    found = pd.read_csv(tmp_path / 'unseen.csv')
    assert found['hidden'].sum() == 8
    assert 'share of the supervised mAP' in capsys.readouterr().out
    assert list(pd.read_csv(tmp_path / 'rankings.csv')['scale'])[1] == 'a typical old class'


def test_the_table_hides_the_classes_that_are_named(tmp_path, tiny_protocol):
    hidden = 'red ring, blue cross'
    cprfl_table(['--tables', 'unseen', '--hide', hidden, '--seeds', 1, '--out', tmp_path, '--workers', 1])
    found = pd.read_csv(tmp_path / 'unseen.csv')
    assert set(found['name'][found['hidden']]) == set(hidden.split(', '))
