"Models, semantics and losses of one's own, from a recipe to a run that is opened"
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from cprfl import cli
from cprfl.look.attention import attention_maps, explain_image
from cprfl.losses import BCELoss, register_loss
from cprfl.model.backbones import PatchModel
from cprfl.model.registry import MODELS, register_model
from cprfl.model.semantics import SEMANTICS, register_semantics
from cprfl.runs.build import build_model
from cprfl.runs.recipe import Recipe, get_recipe
from cprfl.runs.registered import REGISTRIES, check_recorded, packed, recorded, unpack
from cprfl.runs.run import Run, run_recipe
from cprfl.runs.tables import ROWS, Row, all_rows, all_tables, get_protocol, register_row, run_many

TINY = get_recipe('shapes-erm').with_(name='mine', image_size=32, epochs=1, precision='fp32', frozen=True,
                                      num_workers=0, held_out=0.5)

MODEL = """
from torch import nn

from cprfl.model import PatchModel, register_model

@register_model('mine')
class TopK(PatchModel):
    def __init__(self, backbone, num_classes, k:int=2):
        super().__init__()
        self.backbone, self.k = backbone, k
        self.fc = nn.Linear(backbone.num_features, num_classes)

    def from_features(self, features): return self.fc(features.topk(self.k, 1).values.mean(1))
"""


class TopK(PatchModel):
    "A linear layer on the mean of the k strongest values of each feature"
    def __init__(self, backbone, num_classes, k:int=2):
        super().__init__()
        self.backbone, self.k = backbone, k
        self.fc = nn.Linear(backbone.num_features, num_classes)

    def from_features(self, features): return self.fc(features.topk(self.k, 1).values.mean(1))


@pytest.fixture
def registries(monkeypatch):
    "Whatever is registered in a test is forgotten"
    for registry in REGISTRIES.values(): monkeypatch.setattr(registry, 'entries', dict(registry.entries))


@pytest.fixture
def topk(registries): return register_model('mine', TopK)


def python(code, folder, *words):
    "Run a script in a process of its own"
    file = folder / 'script.py'
    file.write_text(code)
    done = subprocess.run([sys.executable, file.name, *words], cwd=folder, capture_output=True, text=True)
    assert not done.returncode, done.stderr
    return done.stdout


# ---- what a model gets

def test_a_model_gets_what_it_asks_for(registries):
    got = {}
    def build(backbone, classes, semantics, targets, **model_args):
        got.update(locals())
        return nn.Identity()
    register_model('asks', build)
    recipe = replace(TINY, model='asks', semantics='random:8', model_args=dict(anything=1))
    build_model(recipe, ['a', 'b'], targets=np.ones((4, 2)))
    assert got['classes'] == ['a', 'b']
    assert got['semantics'].shape == (2, 8)
    assert got['targets'].shape == (4, 2)
    assert got['backbone'].num_features > 0
    assert got['model_args'] == dict(anything=1)


def test_a_model_without_semantics_asks_for_none(topk):
    assert build_model(TINY.with_(model='mine', semantics='clip:RN50/openai'), ['a', 'b']).fc.out_features == 2


def test_settings_are_those_of_the_builder(topk):
    def build(**settings): return build_model(TINY.with_(model='mine', model_args=settings), ['a', 'b'])
    assert build(k=1).k == 1
    with pytest.raises(ValueError, match='model_args: unknown settings j; there are k'): build(j=1)
    with pytest.raises(ValueError, match='model_args: k: expected at least 1, got 0'): build(k=0)


def test_an_unknown_model_is_refused():
    with pytest.raises(ValueError, match="model: expected one of cprfl, .*, got 'mine'; a model of your own has to"):
        Recipe(model='mine')


@pytest.mark.parametrize('build, words', [
    (lambda backbone: nn.Sequential(backbone, nn.Flatten()), r'expected logits \[B, C\] = \[2, 20\] of two'),
    (lambda: nn.Linear(7, 2), "model 'wrong' fails on a batch of two images: RuntimeError"),
    (lambda: 5, 'expected a torch.nn.Module, got a int')])
def test_a_wrong_model_is_noticed_before_training(build, words, registries, tmp_path):
    register_model('wrong', build)
    with pytest.raises(ValueError, match=words): run_recipe(TINY.with_(model='wrong', frozen=False), tmp_path)
    assert not list(tmp_path.iterdir())


# ---- a run

@pytest.fixture
def run(topk, tmp_path): return run_recipe(TINY.with_(model='mine', model_args=dict(k=1)), tmp_path, progress=False)


def test_a_run_is_opened(run):
    assert run.model().k == 1
    assert 0 < run.report['total'] < 1


def test_a_run_says_where_its_model_is_from(run):
    assert run.config.registered == dict(model=dict(name='mine', module='test_registered', function='TopK'))


def test_a_run_whose_model_is_not_registered(run):
    del MODELS.entries['mine']
    with pytest.raises(ValueError, match="the model 'mine' is not known here: it was registered in the module "
                                         r'test_registered \(TopK\). Import it first; on the command line'):
        Run(run.folder)


def test_attention_of_a_model_that_has_none(run):
    image = run.test_set()[0][0]
    with pytest.raises(ValueError, match='attention_maps: .* takes return_attention, .* got TopK; use grad_cam'):
        attention_maps(run, image[None])
    assert set(explain_image(run, image, 0)) == {'logit', 'gradcam'}


def test_attention_of_a_model_of_ones_own():
    class Attending(TopK):
        def from_features(self, features, return_attention=False):
            weights = self.fc(features).mT.softmax(-1)
            logits = super().from_features(features)
            return (logits, weights[:, None]) if return_attention else logits
    backbone = nn.Conv2d(3, 4, 8, stride=8)
    backbone.num_features = 4
    maps = attention_maps(Attending(backbone, 5), torch.rand(2, 3, 32, 32))
    assert maps.heads.shape == (2, 1, 5, 4, 4)


def test_semantics_of_a_run_are_recorded(registries, tmp_path):
    @register_semantics('lengths')
    def lengths(classes): return np.array([[len(name), 1.] for name in classes])
    head = dict(d=16, heads=2, head_dim=8, ffn_dim=16)
    run = run_recipe(TINY.with_(model='cprfl', model_args=head, semantics='lengths'), tmp_path, progress=False)
    assert run.config.registered['semantics']['name'] == 'lengths'
    assert run.model().semantics[:, 1].eq(1).all()
    del SEMANTICS.entries['lengths']
    with pytest.raises(ValueError, match="the semantics 'lengths' is not known here"): Run(run.folder).model()


def test_a_loss_is_recorded(registries):
    register_loss('mine')(type('Mine', (BCELoss,), {}))
    record = recorded(TINY.with_(loss='mine'))
    assert record == dict(loss=dict(name='mine', module='test_registered', function='Mine'))
    del REGISTRIES['loss'].entries['mine']
    with pytest.raises(ValueError, match="the loss 'mine' is not known here"): check_recorded(record)


@pytest.mark.parametrize('record', [[], dict(model='mine'), dict(model=dict(name='mine')), dict(model=dict(name=5))])
def test_a_record_that_is_damaged(record):
    with pytest.raises(ValueError, match='registered.*: expected'): check_recorded(record)


# ---- in parallel

SCRIPT = f"""{MODEL}
from cprfl.runs import get_recipe, run_many

recipe = get_recipe('shapes-erm').with_(model='mine', image_size=32, epochs=1, precision='fp32', held_out=0.5)
print(run_many([recipe.with_(name=name) for name in ('one', 'two')], 'runs', workers=2, threads=1, progress=False))
"""


def test_models_of_a_script_train_in_workers(topk, tmp_path):
    assert python(SCRIPT, tmp_path) == '{}\n'
    for name in ('one', 'two'):
        run = Run(tmp_path / 'runs' / name)
        assert run.config.registered['model']['module'] == '__main__'
        assert run.model().k == 2


def test_what_is_sent_is_registered(topk):
    text = packed()
    del MODELS.entries['mine']
    unpack(text)
    assert MODELS['mine'].function is TopK


def test_nothing_of_ones_own_is_nothing_to_send(registries):
    for registry in REGISTRIES.values():
        for entry in registry.own(): del registry.entries[entry.name]
    assert packed() == ''


def test_what_cannot_be_sent_is_said(registries, tmp_path):
    handle = open(tmp_path / 'x', 'w') # noqa: SIM115 - kept open by the function
    register_model('open', eval('lambda: handle', dict(handle=handle, __name__='__main__')))
    with pytest.raises(ValueError, match='open: cannot be sent to other processes .*put it into a module'):
        run_many([TINY, TINY.with_(name='other')], tmp_path, workers=2)
    handle.close()


# ---- rows

@pytest.fixture
def rows(topk, monkeypatch):
    from cprfl.runs import tables
    monkeypatch.setattr(tables, 'OWN_ROWS', {})
    for key in ('mine', 'mine-1'): monkeypatch.delitem(ROWS, key, raising=False)
    yield
    for key in ('mine', 'mine-1'): ROWS.pop(key, None)


def test_a_model_becomes_a_row(rows):
    register_row('mine', label='strongest')
    shapes = get_protocol('shapes')
    assert all_rows(shapes)['mine'] == shapes.recipe.with_(name='mine', model='mine')
    tables = all_tables(shapes)
    assert ('mine', 'strongest', '') in tables['methods'].rows
    assert [key for key, _, _ in tables['own'].rows] == ['asl', 'cprfl', 'mine']


def test_a_row_changes_settings_of_its_model(rows):
    register_row('mine-1', Row('mine', 'bce', head=dict(k=1), changes=dict(lr=0.5)))
    recipe = all_rows(get_protocol('shapes'))['mine-1']
    assert (recipe.model, recipe.model_args, recipe.train.loss, recipe.train.lr) == ('mine', dict(k=1), 'bce', 0.5)


def test_a_row_of_an_unknown_model(rows):
    with pytest.raises(ValueError, match="row: start: expected one of cprfl, linear, .*got 'minee'; did you mean mine"):
        Row('minee').recipe(get_protocol('shapes'))


def test_a_row_of_the_kit_is_not_replaced(rows):
    with pytest.raises(ValueError, match="row: 'asl' is one of the kit's"): register_row('asl', Row('mine'))


# ---- the command line

@pytest.fixture
def plugin(tmp_path, monkeypatch):
    "A file of its own, which a command imports in this process"
    file = tmp_path / 'topk_plugin.py'
    file.write_text(MODEL + "\nfrom cprfl.runs import register_row\nregister_row('mine')\n")
    monkeypatch.setattr(sys, 'path', list(sys.path))
    yield file
    sys.modules.pop('topk_plugin', None)


TRAIN = ('--recipe shapes-erm --model mine --model-args k=1 --epochs 1 --image-size 32 --precision fp32 '
         '--held-out 0.5 --name mine').split()


def test_the_commands_import_a_plugin(plugin, registries, rows, tmp_path, capsys):
    MODELS.entries.pop('mine')
    out = str(tmp_path / 'runs')
    cli.train([*TRAIN, '--out', out, '--plugin', str(plugin)])
    assert Run(f'{out}/mine').recipe.model_args == dict(k=1)
    cli.evaluate([f'{out}/mine', f'--plugin={plugin}'])
    cli.table(['--list', '--plugin', 'topk_plugin'])
    assert 'own: Your own' in capsys.readouterr().out


def test_a_command_without_the_plugin_says_what_is_missing(run, capsys):
    del MODELS.entries['mine']
    with pytest.raises(SystemExit): cli.evaluate([str(run.folder)])
    assert '--plugin test_registered' in capsys.readouterr().err


def test_an_error_in_a_plugin_has_its_line(plugin, capsys):
    plugin.write_text('a = 1\nb = a / 0\n')
    with pytest.raises(SystemExit): cli.train(['--plugin', str(plugin)])
    assert 'topk_plugin.py, line 2: ZeroDivisionError' in capsys.readouterr().err


def test_the_name_of_a_plugin_may_not_be_taken(tmp_path, capsys):
    file = tmp_path / 'json.py'
    file.write_text('')
    with pytest.raises(SystemExit): cli.train(['--plugin', str(file)])
    assert 'there is another module json' in capsys.readouterr().err
