"The benchmarks measure what they say; the figures themselves are not tested"
import json
import logging
from functools import partial
from types import SimpleNamespace

import open_clip
import pandas as pd
import pytest
import torch

from cprfl import bench
from cprfl.cli import bench as cprfl_bench
from cprfl.train.config import TrainConfig

SIZES = dict(size=64, d=32, heads=2, head_dim=8, ffn_dim=32)
TINY = dict(SIZES, backbone='resnet18')
HABITS = dict(encode_text=True, run_average=True, all_rows=True, floats=True)


@pytest.fixture(scope='module', autouse=True)
def small_text_tower():
    "In place of the RN50 whose text tower the reference runs in each step"
    def small(*name, **kw): return open_clip.CLIP(
        1024, vision_cfg=dict(layers=1, width=64, image_size=32, patch_size=16),
        text_cfg=dict(layers=1, width=16, heads=1))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(open_clip, 'create_model', small)
        yield


@pytest.fixture(scope='module', autouse=True)
def no_machine_code():
    "A step is captured as `torch.compile` does it, and left as it is: writing C++ for a network takes a minute"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, 'compile', partial(torch.compile, backend='eager'))
        yield


@pytest.fixture(scope='module')
def tiny(): return bench.Setting(**TINY, classes=6, batch=2)


@pytest.fixture(scope='module')
def optimisations(tiny): return bench.bench_optimisations(tiny, repeats=1)


@pytest.fixture
def keywords(tiny, monkeypatch):
    "The keywords of each reference step that the benchmark of optimisations makes, nothing being timed"
    asked = []

    class Noted(bench.ReferenceStep):
        def __init__(self, s, **kw):
            asked.append(kw)
            super().__init__(s, **{**kw, 'encode_text': False})

    monkeypatch.setattr(bench, 'ReferenceStep', Noted)
    monkeypatch.setattr(bench, 'race', lambda steps, *a: {name: 1.0 for name in steps})
    monkeypatch.setattr(bench, '_compiled', lambda s: {})
    bench.bench_optimisations(tiny)
    return asked


def count_calls(step, **modules):
    "What of a step is called, in order"
    calls = []
    for name, module in modules.items():
        module.register_forward_hook(lambda *a, name=name: calls.append(name))
    step()
    return calls


def test_both_steps_compute_the_same_loss(tiny):
    tiny.model.eval()
    kit = bench.KitStep(tiny, 'fp32')
    reference = bench.ReferenceStep(tiny, encode_text=False, run_average=False, precision='fp32')
    expected = reference.forward(reference.load()).item()
    tiny.model.train()
    assert kit.forward(tiny.images).item() == pytest.approx(expected, rel=1e-4)


def test_the_reference_encodes_text_and_runs_the_average(tiny):
    step = bench.ReferenceStep(tiny)
    calls = count_calls(step, text=step.text[0].transformer, average=step.average.module.backbone.net)
    assert calls == ['text', 'text', 'average']


def test_the_kit_does_not_run_the_average(tiny):
    kit = bench.KitStep(tiny)
    assert count_calls(kit, average=kit.average.module) == []


def dtypes_of(step, network):
    "What the last layer of a network computes in, in a step"
    seen = []
    network.fc.register_forward_hook(lambda module, args, out: seen.append(out.dtype))
    step()
    return seen


def test_the_reference_trains_under_mixed_precision(tiny):
    step = bench.ReferenceStep(tiny, encode_text=False)
    assert dtypes_of(step, step.model) == [torch.bfloat16]


@pytest.mark.parametrize('average_fp32, dtype', [(False, torch.bfloat16), (True, torch.float32)])
def test_the_average_of_the_reference_runs_as_asked(tiny, average_fp32, dtype):
    step = bench.ReferenceStep(tiny, encode_text=False, average_fp32=average_fp32)
    assert dtypes_of(step, step.average.module) == [dtype]


def test_the_optimizer_of_the_reference_is_the_default(tiny):
    step, default = bench.ReferenceStep(tiny, encode_text=False), torch.optim.AdamW(tiny.model.parameters())
    choice = 'fused', 'foreach'
    assert [step.optimizer.defaults[k] for k in choice] == [default.defaults[k] for k in choice]


def test_the_kit_augments_as_by_default(tiny, monkeypatch):
    policies = []
    monkeypatch.setattr(bench, 'BatchAugment', lambda policy: policies.append(policy) or (lambda images: images))
    bench.KitStep(tiny).load()
    assert policies == [TrainConfig().augment]


def test_the_loader_of_the_reference_augments_as_released(tiny, monkeypatch):
    policies = []
    monkeypatch.setattr(bench, 'BatchAugment', lambda policy: policies.append(policy) or (lambda images: images))
    bench._augmentation_of_reference(tiny, 1)
    assert set(policies) == {'paper'}


def test_the_text_encoder_leaves_logging_as_it_was(monkeypatch):
    monkeypatch.setattr(open_clip, 'create_model', lambda *args, **kw: torch.nn.Identity())
    monkeypatch.setattr(logging.root.manager, 'disable', logging.ERROR)
    bench.Setting.text.func(SimpleNamespace(device='cpu', classes=2))
    assert logging.root.manager.disable == logging.ERROR


def test_a_race_takes_turns(monkeypatch):
    order = []
    monkeypatch.setattr(bench, 'clock_once', lambda run, device: run() or 1.0)
    bench.race(dict(a=lambda: order.append('a'), b=lambda: order.append('b')), 2)
    assert order == list('ababab')


def test_a_race_keeps_the_best_after_warming_up(monkeypatch):
    times = iter([1.0, 1.0, 3.0, 5.0, 4.0, 2.0])
    monkeypatch.setattr(bench, 'clock_once', lambda run, device: next(times))
    assert bench.race(dict(a=None, b=None), 2) == dict(a=3.0, b=2.0)


def test_the_reference_is_the_first_row(optimisations):
    assert optimisations['ratio'].iloc[0] == 1
    assert optimisations.index[0] == 'none (the reference)'


def test_each_optimisation_has_a_row(optimisations):
    assert {*bench.OPTIMISATIONS, "all (the kit's step)"} <= set(optimisations.index)


def test_each_optimisation_is_left_out_once(optimisations):
    left_out = optimisations.index[optimisations['slowdown_without'].notna()]
    assert set(left_out) == set(bench.OPTIMISATIONS)


def test_parts_of_a_step(tiny):
    parts = bench.bench_train(tiny, repeats=1)
    assert {'  backbone, forward', '  backward', '  optimiser', '  moving average'} <= set(parts.index)
    assert "the reference's augmentation, by a loader" in parts.index
    assert parts.loc["the kit's step", 'share_of_ceiling'] > 0


def test_each_optimisation_is_added_alone(keywords):
    n = len(bench.OPTIMISATIONS)
    assert keywords[:n + 1] == [{}, *bench.OPTIMISATIONS.values()]


def test_what_is_left_out_is_all_that_is_missing(keywords):
    n = len(bench.OPTIMISATIONS)
    alone, without = keywords[1:n + 1], keywords[n + 1:]
    every = {k: v for kw in alone for k, v in kw.items()}
    assert len(without) == n
    for one, others in zip(alone, without):
        assert {**one, **others} == every
        assert not one.keys() & others.keys()


def test_all_optimisations_make_the_kits_step(tiny):
    every = {k: v for kw in bench.OPTIMISATIONS.values() for k, v in kw.items()}
    habits_off = dict.fromkeys(HABITS, False)
    assert every == habits_off | dict(memory_format=tiny.memory_format, fused=True, foreach=True)


def test_the_head_alone():
    "On cached features, which have no bytes and no memory format"
    table = bench.bench_optimisations(bench.Setting(None, **SIZES, classes=6, batch=2), repeats=1)
    assert 'fused AdamW' in table.index
    assert not set(bench.OF_IMAGES) & set(table.index)


def test_reading():
    table = bench.bench_data(8, 64, (0, 1), to=32)
    assert table['ratio'].iloc[0] == 1
    assert table.index.tolist() == [
        'JPEG files, num_workers=0', 'JPEG files, num_workers=1', 'decoded once, num_workers=0']


def test_evaluation(tiny):
    table = bench.bench_eval(tiny, repeats=1)
    assert (table['ms'] > 0).tolist() == [True, True]


def test_evaluation_leaves_the_model_in_training(tiny):
    bench.bench_eval(tiny, repeats=1)
    assert tiny.model.training


def test_classes():
    table = bench.bench_classes((4, 80), repeats=1, batch=2, limit=1e6, **TINY)
    assert table.index.tolist() == [(form, C) for form in ('all', 'patches') for C in (4, 80)]
    assert table.loc[('all', 80), 'over_80'] == 1


def test_a_form_that_would_take_too_long_is_left_out():
    table = bench.bench_classes((4, 80, 10**9), repeats=1, limit=5.0, batch=2, **TINY)
    assert 10**9 not in table.index.get_level_values('classes')


def test_the_command_prints_and_writes(tmp_path, capsys):
    cprfl_bench(['metrics', '--out', str(tmp_path), '--repeats', '1', '--classes', '4'])
    out = capsys.readouterr().out
    assert 'the kit' in out
    assert f'torch {torch.__version__}' in out
    assert pd.read_csv(tmp_path / 'metrics.csv')['ratio'].iloc[0] == 1
    assert json.loads((tmp_path / 'machine.json').read_text())['metrics']['classes'] == 4


def test_an_unknown_benchmark_is_refused(capsys):
    with pytest.raises(SystemExit) as stop: cprfl_bench(['speed'])
    assert stop.value.code == 2
    assert 'expected some of train, operations, levers' in capsys.readouterr().err
