"Runs whose CLIP tower learns"
import numpy as np
import pytest
import torch
from PIL import Image

from cprfl.model.towers import PatchCLIP
from cprfl.runs.build import build_model
from cprfl.runs.recipe import get_recipe
from cprfl.runs.run import Run, run_recipe

NAMES = ['red ring', 'blue star']


@pytest.fixture(scope='module')
def recipe(tmp_path_factory):
    "Twelve pictures of two classes whose names the small CLIP knows"
    folder, rng = tmp_path_factory.mktemp('pictures'), np.random.default_rng(0)
    for name in NAMES:
        (folder / name).mkdir()
        for i in range(6):
            pixels = rng.integers(0, 256, (64, 64, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / name / f'{name[0]}{i}.png')
    return get_recipe('shapes-patches').with_(
        benchmark=None, train_file=str(folder), held_out=0.3, image_size=64, alignment_images=0, epochs=1, batch_size=4,
        precision='fp32', device='cpu')


@pytest.mark.parametrize('changes', [
    dict(layer_decay=0.5, distill=0.1, sampler='class_aware', sampler_power=1.5), dict(lora=2), dict(frozen=True)],
    ids=['parts', 'adapters', 'frozen'])
def test_a_fine_tuned_tower_is_opened_again(recipe, tmp_path, changes):
    run = run_recipe(recipe.with_(**changes), tmp_path, progress=False)
    model = Run(run.folder).model()
    assert isinstance(model, PatchCLIP)
    images = torch.stack([x for x, _, _ in run.test_set()])
    with torch.no_grad(): logits = model(images).numpy()
    assert np.allclose(logits, run.predictions[run.classes].to_numpy(), atol=1e-3)


def test_adapters_need_a_backbone_whose_features_change(recipe):
    with pytest.raises(ValueError, match='lora: adapters learn'): recipe.with_(lora=2, frozen=True)


def test_only_the_adapters_of_a_run_learn(recipe):
    backbone = build_model(recipe.with_(lora=2), NAMES).backbone
    assert all('.parametrizations.' in name for name, p in backbone.named_parameters() if p.requires_grad)


def test_a_tower_without_its_embedding_is_refused(recipe):
    with pytest.raises(ValueError, match='backbone_args: {pooled: true}'):
        build_model(recipe.with_(backbone_args={}), NAMES)


def test_names_of_another_text_tower_are_refused(recipe):
    with pytest.raises(ValueError, match='expected names of the same CLIP'):
        build_model(recipe.with_(semantics='random:64'), NAMES)


@pytest.mark.parametrize('name, power', [('voc-lt-clip', 1.35), ('coco-lt-clip', 1.6)])
def test_the_recipes_have_the_papers_settings(name, power):
    recipe = get_recipe(name)
    assert recipe.train.lr * recipe.train.backbone_lr == pytest.approx(1e-6)
    assert recipe.train.sampler_power == power
    assert recipe.model_args == dict(k=32, share=0.4)
