"Every model of the kit in one file: equal to PyTorch, of any batch and size"
import numpy as np
import pytest
import torch

from cprfl.model.cprfl import CPRFL
from cprfl.model.names import NameClassifier, NamedModel
from cprfl.model.registry import MODELS
from cprfl.runs.build import build_model
from cprfl.runs.export import ModelFile, describe_model, export_model
from cprfl.runs.recipe import GLOBAL_HEAD, Recipe, get_recipe
from cprfl.train.config import TrainConfig

CLASSES = ['red ring', 'blue star', 'green circle']
SMALL = Recipe(backbone='timm:resnet10t', backbone_args=dict(channels=(8, 8, 16, 16)), image_size=32,
               semantics='words', train=TrainConfig())
HEAD = dict(d=16, heads=2, head_dim=8, ffn_dim=16)
ABOUT = dict(classes=CLASSES, image_size=32)

RECIPES = {
    'cprfl': SMALL.with_(model_args=HEAD),
    'cprfl-global': SMALL.with_(model_args=HEAD | GLOBAL_HEAD),
    'cprfl-options': SMALL.with_(model_args=HEAD | dict(depth=2, residual=True, attend='patches', score='cosine')),
    'erm': SMALL.with_(model='erm'),
    'mlgcn': SMALL.with_(model='mlgcn', model_args=dict(hidden=8)),
    'topk': SMALL.with_(model='topk'),
    'decoder': SMALL.with_(model='decoder', model_args=dict(d=16, heads=2, ffn_dim=16)),
    'tuned': SMALL.with_(model='erm', frozen=True, tune=1),
    'clip': get_recipe('shapes-clip').with_(image_size=80),
    'coop': SMALL.with_(model='coop', semantics='shapes', image_size=64),
    'clip-patches': get_recipe('shapes-patches').with_(image_size=64, lora=2)}


def built(name):
    torch.manual_seed(0)
    return build_model(RECIPES[name], CLASSES, targets=np.eye(3, dtype=np.uint8)).eval()


def images(batch, height=32, width=32):
    return torch.randint(0, 256, (batch, 3, height, width), dtype=torch.uint8)


def test_every_model_of_the_kit_is_tried():
    assert {recipe.model for recipe in RECIPES.values()} == set(MODELS.kit)


@pytest.mark.parametrize('name', RECIPES)
def test_onnx_runtime_equals_pytorch(name, tmp_path):
    pytest.importorskip('onnxscript', reason='needs the extra `export`')
    pytest.importorskip('onnxruntime', reason='needs the extra `export`')
    size = RECIPES[name].image_size
    differences = export_model(built(name), tmp_path / 'm.onnx', ABOUT | dict(image_size=size), batches=(1, 64))
    assert differences['difference'].max() <= 1e-4


@pytest.mark.parametrize('name', ['cprfl-global', 'decoder', 'coop', 'clip-patches'])
def test_torch_export_equals_the_run(name, tmp_path):
    model, size = built(name), RECIPES[name].image_size
    x = images(3, size, size)
    with torch.no_grad(): expected = model(x).numpy()
    export_model(model, tmp_path / 'm.pt2', ABOUT | dict(image_size=size), batches=())
    assert np.allclose(ModelFile(tmp_path / 'm.pt2')(x)['logits'], expected, atol=1e-4)


@pytest.fixture(scope='module')
def onnx_file(tmp_path_factory):
    pytest.importorskip('onnxscript', reason='needs the extra `export`')
    pytest.importorskip('onnxruntime', reason='needs the extra `export`')
    file = tmp_path_factory.mktemp('onnx') / 'm.onnx'
    export_model(built('cprfl'), file, ABOUT | dict(decisions=dict(thresholds=[0.3, 0.5, 0.7])), batches=())
    return ModelFile(file)


def test_a_file_names_its_classes(onnx_file):
    assert onnx_file.classes == CLASSES


def test_a_file_has_the_thresholds(onnx_file):
    assert onnx_file.about['decisions'] == dict(thresholds=[0.3, 0.5, 0.7])


@pytest.mark.parametrize('height, width', [(32, 32), (97, 41), (16, 200)])
def test_a_file_takes_images_of_any_size(onnx_file, height, width):
    assert onnx_file(images(2, height, width))['attention'].shape == (2, 3, 1)


def test_names_are_in_the_file(tmp_path):
    model, D = CPRFL('resnet18', torch.randn(3, 8), **HEAD), 512
    named = NamedModel(model, NameClassifier(torch.randn(3, D)), [1, 2, 3]).eval()
    x = images(2)
    with torch.no_grad(): expected = named(x).numpy()
    export_model(named, tmp_path / 'm.pt2', ABOUT, batches=())
    outputs = ModelFile(tmp_path / 'm.pt2')(x)
    assert np.allclose(outputs['logits'], expected, atol=1e-4)


class Fixed(torch.nn.Module):
    "A model that looks at the values, which no graph can follow"
    def forward(self, x):
        return x.mean((2, 3)) if x.sum() > 0 else x.amax((2, 3))


def test_a_model_that_cannot_be_traced_says_so(tmp_path):
    with pytest.raises(ValueError, match='the model Fixed cannot be traced'):
        export_model(Fixed(), tmp_path / 'm.pt2', ABOUT)


class Drifting(torch.nn.Module):
    "A model whose numbers differ from call to call"
    def forward(self, x): return x.mean((2, 3)) + torch.rand(3)


def test_a_file_that_differs_is_not_kept(tmp_path):
    with pytest.raises(ValueError, match='expected the outputs of the model to 0.0001'):
        export_model(Drifting(), tmp_path / 'm.pt2', ABOUT, batches=(1,))
    assert not list(tmp_path.iterdir())


def test_the_normalisation_is_described():
    class OfARun:
        recipe, classes, groups, folder = RECIPES['erm'], CLASSES, {}, '.'
    about = describe_model(OfARun, built('erm'))
    assert about['mean'] == pytest.approx([0.485, 0.456, 0.406])
