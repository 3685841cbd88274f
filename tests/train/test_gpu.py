"What a GPU computes is what a CPU computes: `pytest -m gpu`"
from copy import deepcopy

import pandas as pd
import pytest
import timm
import torch
from toys import CutOff, Dropping, paint, picture_model, states, toy

from cprfl.look.attention import attention_maps, grad_cam
from cprfl.look.faithfulness import faithfulness
from cprfl.losses import build_loss
from cprfl.model.names import NameClassifier, NamedModel, last_layer
from cprfl.model.semantics import load_clip
from cprfl.runs.recipe import Recipe
from cprfl.runs.run import Run, run_recipe
from cprfl.runs.tables import run_many
from cprfl.train.augment import POLICIES, BatchAugment
from cprfl.train.cache import cache_features
from cprfl.train.config import TrainConfig
from cprfl.train.trainer import predict

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason='no CUDA device')]

SMALL = Recipe(
    name='small', backbone='timm:resnet10t', backbone_args=dict(channels=(8, 8, 16, 16)), image_size=32,
    model_args=dict(d=16, heads=2, head_dim=8, ffn_dim=16), semantics='random:8', frozen=True, views=2,
    train=TrainConfig(epochs=2, select='last', lr=1e-2, device='cuda', precision='bf16'))


@pytest.fixture(autouse=True)
def exact():
    "Convolutions in float32, where float32 is asked for"
    with torch.backends.cudnn.flags(allow_tf32=False): yield


@pytest.fixture
def batch(pictures): return torch.stack([pictures[i][0] for i in range(8)])


def near(a, b, tolerance=1e-3):
    "Whether the distance of two tensors is small beside their length"
    return (a.cpu().float() - b.cpu().float()).norm() <= tolerance * b.cpu().float().norm()


def losses(trainer): return [row['loss'] for row in trainer.history]


# ---- one step

def test_scores_and_gradients_are_those_of_the_cpu(batch):
    targets = (torch.rand(8, 20, generator=torch.Generator().manual_seed(0)) < 0.2).float()
    found = {}
    for device in ('cpu', 'cuda'):
        model = picture_model(dropout=0.).to(device)
        logits = model(batch.to(device))
        build_loss('asl')(logits, targets.to(device)).backward()
        gradients = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
        found[device] = logits.detach(), gradients
    for a, b in zip(found['cuda'], found['cpu']): assert near(a, b, 1e-2)


@pytest.mark.parametrize('policy', POLICIES)
def test_an_augmentation_is_that_of_the_cpu(batch, policy):
    "Rotations may take another pixel where two are equally near"
    augment = BatchAugment(policy, seed=3)
    a, b = augment(batch, 1, 2), augment(batch.cuda(), 1, 2).cpu()
    assert a.dtype == b.dtype == torch.uint8
    assert ((a.int() - b.int()).abs() > 1).float().mean() < 0.02


# ---- trainings

@pytest.mark.parametrize('precision', ['fp32', 'bf16', 'fp16'])
def test_each_precision_learns(precision):
    trainer = toy(device='cuda', precision=precision, epochs=6)
    assert losses(trainer)[-1] < 0.9 * losses(trainer)[0]
    assert {p.dtype for p in trainer.model.parameters()} == {torch.float32}
    assert next(trainer.model.parameters()).is_cuda


def test_a_training_is_that_of_the_cpu():
    a, b = (toy(device=device, epochs=5) for device in ('cuda', 'cpu'))
    assert losses(a) == pytest.approx(losses(b), rel=1e-3)


def test_a_training_that_was_cut_off_goes_on_the_same(tmp_path):
    "Dropout draws on the device"
    whole = toy(model=Dropping(), device='cuda')
    with pytest.raises(KeyboardInterrupt): toy(tmp_path, [CutOff(1)], model=Dropping(), device='cuda')
    assert losses(toy(tmp_path, model=Dropping(), device='cuda', resume=True)) == pytest.approx(losses(whole), rel=1e-5)


def test_a_training_moves_to_another_device(pictures, tmp_path):
    with pytest.raises(KeyboardInterrupt): paint(pictures, tmp_path, [CutOff(1)], device='cuda')
    assert states(tmp_path)
    trainer = paint(pictures, tmp_path, device='cpu', resume=True)
    assert len(trainer.history) == 3
    assert not next(trainer.model.parameters()).is_cuda


@pytest.mark.parametrize('mode', ['default', 'reduce-overhead'])
def test_a_compiled_training_is_the_same(pictures, mode):
    "The second mode replays CUDA graphs"
    def train(**kw): return paint(pictures, model=picture_model(dropout=0.), device='cuda', **kw)
    plain, compiled = train(), train(compile=mode)
    assert compiled.run is not compiled.model, 'it fell back to the uncompiled model'
    assert losses(compiled) == pytest.approx(losses(plain), rel=1e-2)


# ---- caches and runs

def test_features_are_those_of_the_cpu(pictures, tmp_path):
    found = {}
    for device in ('cpu', 'cuda'):
        backbone = picture_model().backbone.eval().to(device)
        kw = dict(device=device, precision='fp32', progress=False)
        data = cache_features(backbone, pictures, tmp_path / device, 32, **kw)
        found[device] = torch.stack([data[i][0] for i in range(len(data))])
    assert near(found['cuda'], found['cpu'], 5e-3)


def test_a_run_of_the_gpu_is_used_on_a_cpu(tmp_path):
    run = run_recipe(SMALL, tmp_path, progress=False)
    again = Run(run.folder)
    stored = torch.tensor(again.predictions.iloc[:, 1:].to_numpy())
    assert near(predict(again.model(), again.test_set()), stored, 0.02)
    assert again.evaluate(device='cpu')['total'] == pytest.approx(again.evaluate(device='cuda')['total'], abs=0.2)


def test_an_image_has_the_same_scores_on_both(tmp_path):
    run = run_recipe(SMALL, tmp_path, progress=False)
    images = run.test_set().subset(range(5))
    a, b = (run.predict(images, device=device) for device in ('cpu', 'cuda'))
    pd.testing.assert_frame_equal(a, b, atol=1e-3)


def test_two_runs_share_a_card(tmp_path):
    recipes = [SMALL.with_(name=f'small-{s}', seed=s) for s in range(2)]
    assert run_many(recipes, tmp_path, workers=2, progress=False) == {}
    totals = [Run(tmp_path / recipe.name).report['total'] for recipe in recipes]
    assert min(totals) > 0


def test_names_are_measured_wherever_the_scores_are():
    "A loader of several processes gathers them on the CPU"
    def measured(device):
        torch.manual_seed(0)
        head, by_name = torch.randn(6, 3), torch.randn(6, 3)
        named = NamedModel(picture_model(C=3), NameClassifier(torch.randn(3, 8)), [5, 10, 50]).to(device)
        return named.standardise(head, by_name).cpu().added(head, by_name)
    assert torch.allclose(measured('cuda'), measured('cpu'), atol=1e-5)


def test_a_network_may_already_be_on_the_gpu():
    "Its last layer is read, and its text tower asked, where it is"
    network = timm.create_model('resnet10t', channels=(8, 8, 16, 16), num_classes=5).cuda()
    assert last_layer(network).device.type == 'cpu'
    clip = load_clip('shapes')
    before = clip.encode_text(['red ring'])
    clip.model.cuda()
    assert near(clip.encode_text(['red ring']), before)


# ---- what a model attends to

def test_maps_are_those_of_the_cpu(batch):
    model = picture_model(dropout=0.).eval()
    on_gpu = deepcopy(model).cuda()
    a, b = attention_maps(model, batch), attention_maps(on_gpu, batch)
    assert near(b.heads, a.heads)
    with grad_cam(model) as of_cpu, grad_cam(on_gpu) as of_gpu:
        assert near(of_gpu(batch, [0] * 8)[0], of_cpu(batch, [0] * 8)[0], 1e-2)


def test_faithfulness_is_that_of_the_cpu(pictures):
    model = picture_model(dropout=0.).eval()
    tables = [faithfulness(m, pictures, per_class=1) for m in (model, deepcopy(model).cuda())]
    means = [table.groupby('method')[['insertion', 'deletion']].mean() for table in tables]
    pd.testing.assert_frame_equal(*means, atol=0.01)
