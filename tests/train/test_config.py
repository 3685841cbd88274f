"Settings that are wrong are refused at once, and parameters learn as the settings say"
import math

import numpy as np
import pytest
import torch
from toys import feature_model, picture_model

from cprfl.train.config import TrainConfig, choose_device, param_groups
from cprfl.train.trainer import build_accelerator

WRONG = [
    (dict(precision='int8'), "precision: expected one of fp32, bf16, fp16, got 'int8'"),
    (dict(select='best'), 'select: expected one of valid, last, test'),
    (dict(augment='crop'), 'augment: expected one of .*standard'),
    (dict(loss='mse'), 'loss: expected one of .*asl'),
    (dict(device='tpu'), 'device: expected one of auto, cpu, cuda'),
    (dict(compile='fast'), "compile: expected one of None, default, reduce-overhead, max-autotune, got 'fast'"),
    (dict(compile='reduce-overhead', accumulate=2), 'gradients cannot accumulate'),
    (dict(sampler='balanced'), "sampler: expected one of uniform, class_aware, got 'balanced'"),
    (dict(epochs=0), 'epochs: expected at least 1, got 0'),
    (dict(batch_size=0), 'batch_size'),
    (dict(lr=-1), 'lr: expected at least 0'),
    (dict(ema=2), 'ema: expected 0 to 1, got 2'),
    (dict(seed=-1), 'seed: expected at least 0'),
    (dict(clip_grad=-1), 'clip_grad'),
    (dict(warmup=1.5), 'warmup: expected 0 to 1'),
    (dict(layer_decay=1.5), 'layer_decay: expected 0 to 1, got 1.5'),
    (dict(sampler_power=-1), 'sampler_power: expected at least 0'),
    (dict(distill=-1), 'distill: expected at least 0'),
    (dict(patience=3, select='last'), 'stopping early needs'),
    (dict(epochs=1.5), 'epochs: expected a whole number, got 1.5'),
    (dict(epochs=True), 'epochs: expected a whole number, got True'),
    (dict(epochs='3'), "epochs: expected a whole number, got '3'"),
    (dict(seed=2**32), 'seed: expected at most'),
    (dict(lr=math.inf), 'lr: expected a finite number, got inf'),
    (dict(lr=10**400), 'lr: expected a finite number'),
    (dict(lr='1e-3'), "lr: expected a finite number, got '1e-3'"),
    (dict(loss_args=None), 'loss_args: expected a dictionary whose keys are texts, got None'),
    (dict(loss_args=[1]), 'loss_args: expected a dictionary'),
    (dict(loss_args={1: 2}), 'loss_args: expected a dictionary'),
    (dict(loss_args=dict(gama_neg=1)), 'loss_args: .*did you mean gamma_neg'),
    (dict(loss='db_focal', loss_args=dict(neg_scale=0)), 'loss_args: neg_scale: expected above 0, got 0'),
    (dict(loss_args=dict(clip='x')), "loss_args: clip: expected at least 0 and below 1, got 'x'"),
    (dict(compile=3), 'compile: expected a text or None, got 3'),
    (dict(precision=['fp32']), r"precision: expected a text, got \['fp32'\]"),
]


@pytest.mark.parametrize('settings, words', WRONG, ids=[' '.join(settings) for settings, _ in WRONG])
def test_settings_are_checked(settings, words):
    with pytest.raises(ValueError, match=words): TrainConfig(**settings)


@pytest.mark.parametrize('given', [np.int64(3), np.uint8(3)])
def test_counts_of_numpy_become_plain(given): assert type(TrainConfig(epochs=given).epochs) is int


def test_a_whole_number_is_a_rate(): assert TrainConfig(lr=1).lr == 1


# ---- parameter groups

@pytest.fixture
def model(): return picture_model()


def grouped(model, **settings):
    "The group of each parameter, by its name"
    names = {p: name for name, p in model.named_parameters()}
    groups = param_groups(model, TrainConfig(**settings))
    return [(names[p], p, group) for group in groups for p in group['params']]


def test_each_parameter_is_in_one_group(model):
    got = sorted(name for name, _, _ in grouped(model, backbone_lr=0.1))
    assert got == sorted(name for name, _ in model.named_parameters())


def test_biases_and_norms_do_not_decay(model):
    for name, p, group in grouped(model, backbone_lr=0.1, weight_decay=0.05):
        assert group['weight_decay'] == (0.05 if p.ndim > 1 else 0), name


def test_the_head_has_a_decay_of_its_own(model):
    for name, p, group in grouped(model, weight_decay=0.05, head_decay=0.3):
        decay = 0.05 if name.startswith('backbone.') else 0.3
        assert group['weight_decay'] == (decay if p.ndim > 1 else 0), name


def test_a_decay_of_none_makes_no_group_of_its_own(model):
    assert len(param_groups(model, TrainConfig(head_decay=None))) == len(param_groups(model, TrainConfig()))


def test_the_backbone_has_a_rate_of_its_own(model):
    for name, _, group in grouped(model, lr=1e-3, backbone_lr=0.1):
        assert group['lr'] == pytest.approx(1e-4 if name.startswith('backbone.') else 1e-3), name


def test_each_layer_of_the_backbone_has_a_rate(model):
    got = grouped(model, lr=1., backbone_lr=0.1, layer_decay=0.5)
    assert sorted(name for name, _, _ in got) == sorted(name for name, _ in model.named_parameters())
    rates = {name: group['lr'] for name, _, group in got}
    assert rates['backbone.net.net.layer4.0.conv1.weight'] == pytest.approx(0.1)
    assert rates['backbone.net.net.layer2.0.conv1.weight'] == pytest.approx(0.1 * 0.25)
    assert rates['fc.weight'] == 1


def test_no_decay_over_layers_has_the_groups_of_always(model):
    plain, decayed = (param_groups(model, TrainConfig(backbone_lr=0.1, layer_decay=d)) for d in (1., 0.9))
    assert [len(group['params']) for group in plain] == [15, 30, 7, 10]
    assert len(decayed) > len(plain)


def test_layers_have_rates_without_a_backbone_as_well():
    assert param_groups(feature_model(), TrainConfig(layer_decay=0.5))


def test_a_frozen_backbone_is_in_no_group(model):
    model.backbone.requires_grad_(False)
    assert not [name for name, _, _ in grouped(model) if name.startswith('backbone.')]


# ---- the device

GPUS = dict(cuda='torch.cuda.is_available', mps='torch.backends.mps.is_available')


@pytest.mark.parametrize('there, chosen', [
    ([], 'cpu'), (['cuda'], 'cuda'), (['mps'], 'mps'), (['cuda', 'mps'], 'cuda')])
def test_auto_takes_a_gpu_if_there_is_one(monkeypatch, there, chosen):
    for kind, check in GPUS.items(): monkeypatch.setattr(check, lambda kind=kind: kind in there)
    assert choose_device('auto').type == chosen


@pytest.mark.parametrize('kind', GPUS)
def test_a_gpu_that_is_not_there_is_refused(monkeypatch, kind):
    monkeypatch.setattr(GPUS[kind], lambda: False)
    with pytest.raises(ValueError, match=f"device: '{kind}' was asked for, but PyTorch sees no GPU"):
        choose_device(kind)


def test_mps_is_a_setting(): assert TrainConfig(device='mps').device == 'mps'


def test_more_processes_than_cards_say_so(monkeypatch):
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    monkeypatch.setattr(torch.cuda, 'device_count', lambda: 1)
    monkeypatch.setenv('LOCAL_WORLD_SIZE', '2')
    with pytest.raises(ValueError, match='2 processes were started, but PyTorch sees 1 GPU; start as many'):
        build_accelerator(TrainConfig(device='cuda'))
