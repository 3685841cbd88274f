"Classes that are called like the kit's own columns"
import numpy as np
import pandas as pd
import pytest
from PIL import Image

from cprfl.look.predictions import align_predictions
from cprfl.runs.recipe import get_recipe
from cprfl.runs.report import _stored_frame, _write_frame, collect, ensemble_report
from cprfl.runs.run import run_recipe

OWN = sorted(['7', 'total', '__index_level_0__', 'ap', 'epoch', 'head', 'index', 'loss', 'name', 'path', 'path_'])


@pytest.fixture(scope='module')
def run(tmp_path_factory):
    folder, rng = tmp_path_factory.mktemp('photos'), np.random.default_rng(0)
    rows = []
    for i in range(12):
        Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(folder/f'{i}.png')
        rows.append(f"{i}.png,{'|'.join(OWN[i % 2::2])}")
    (folder/'t.csv').write_text('\n'.join(['path,labels', *rows]) + '\n')
    recipe = get_recipe('shapes-erm').with_(
        name='own-s0', benchmark=None, train_file=str(folder/'t.csv'), test_file=str(folder/'t.csv'), image_size=32,
        epochs=1, batch_size=8, device='cpu', precision='fp32')
    return run_recipe(recipe, folder/'runs', progress=False)


def test_the_column_of_paths_takes_a_free_name(run):
    assert list(run.predictions.columns) == ['path__', *OWN]


def test_predictions_of_such_classes_are_aligned(run):
    predictions = align_predictions(dict(run=run))
    assert predictions.classes == OWN
    assert predictions.paths == [f'{i}.png' for i in range(12)]


def test_an_ensemble_has_such_classes(run):
    assert ensemble_report([run, run], run.test_set())['total'] == pytest.approx(run.report['total'])


def test_results_have_a_row_for_each_such_class(run):
    _, classes = collect(run.folder.parent)
    assert classes['name'].tolist() == OWN


def test_classes_with_odd_names_come_back_from_tables(tmp_path):
    names = ['NA', 'null', '', 'nan', "'x"]
    row = dict(key='NA', seed=0, group='None', count=1, ap=0.5)
    _write_frame(tmp_path/'classes.csv', pd.DataFrame([row | dict(name=name) for name in names]))
    assert _stored_frame(tmp_path, 'classes')['name'].tolist() == names
