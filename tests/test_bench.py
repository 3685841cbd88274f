"The benchmarks measure what they say; their figures are never tested"
import json

import pandas as pd
import pytest
import torch

from cprfl import bench
from cprfl.cli import bench as cprfl_bench

TINY = dict(backbone='resnet18', size=64, d=32, heads=2, head_dim=8, ffn_dim=32)


@pytest.fixture(scope='module')
def tiny(): return bench.Setting(**TINY, classes=6, batch=2)


def test_both_steps_compute_the_same_loss(tiny):
    tiny.model.eval()
    kit, reference = bench.KitStep(tiny, 'fp32'), bench.ReferenceStep(tiny, encode_text=False, run_average=False)
    assert kit.forward(tiny.images).item() == pytest.approx(reference.forward(reference.augment()).item(), rel=1e-4)
    tiny.model.train()


def test_the_reference_has_the_habits_that_it_is_said_to_have(tiny):
    "Text encoded and average run in each forward pass, counted by hooks"
    step, calls = bench.ReferenceStep(tiny), []
    step.text[0].transformer.register_forward_hook(lambda *a: calls.append('text'))
    step.average.backbone.net.register_forward_hook(lambda *a: calls.append('average'))
    step()
    assert calls == ['text', 'text', 'average']
    kit = bench.KitStep(tiny)
    kit.average.register_forward_hook(lambda *a: calls.append('kit'))
    kit()
    assert 'kit' not in calls


def test_a_race_takes_turns_and_keeps_the_best(monkeypatch):
    took, order = iter([9.0, 9.0, 3.0, 5.0, 4.0, 2.0]), []
    monkeypatch.setattr(bench, 'clock_once', lambda run, device: run() or next(took))
    assert bench.race(dict(a=lambda: order.append('a'), b=lambda: order.append('b')), 2) == dict(a=3.0, b=2.0) and order == list('ababab')


def test_levers_and_parts(tiny):
    table = bench.bench_levers(tiny, repeats=1)
    assert table.index[0] == 'none (the reference)' and table['ratio'].iloc[0] == 1 and {*bench.LEVERS, "all (the kit's step)"} <= set(table.index)
    assert set(table.index[table['kit_without'].notna()]) == set(bench.LEVERS)
    parts = bench.bench_train(tiny, repeats=1)
    assert {'  backbone, forward', '  backward', '  optimiser', '  moving average'} <= set(parts.index) and parts.loc["the kit's step", 'share_of_ceiling'] > 0


def test_each_lever_releases_one_habit_of_the_kit(tiny, monkeypatch):
    "All levers together make the reference step the kit's, and what a lever changes is what its row says"
    asked = []
    class Noted(bench.ReferenceStep):
        def __init__(self, s, **kw): asked.append(kw); super().__init__(s, **{**kw, 'encode_text': False})
    monkeypatch.setattr(bench, 'ReferenceStep', Noted)
    monkeypatch.setattr(bench, 'race', lambda steps, *a: {name: 1.0 for name in steps})
    monkeypatch.setattr(bench, '_compiled', lambda s: {})
    bench.bench_levers(tiny)
    (reference, *pulled), released = asked[:len(bench.LEVERS) + 1], asked[len(bench.LEVERS) + 1:]
    assert reference == {} and len(pulled) == len(released) == len(bench.LEVERS)
    every = {k: v for kw in pulled for k, v in kw.items()}
    for one, others in zip(pulled, released): assert {**one, **others} == every and not one.keys() & others.keys()
    assert every == dict(encode_text=False, run_average=False, all_rows=False, precision='bf16', layout=tiny.layout, floats=False, fused=True, foreach=True, dice=True)


def test_a_prefetched_batch_is_the_batch(tiny):
    "On a CPU, whose streams do nothing; what it saves only a GPU can tell"
    step = bench.PrefetchStep(tiny)
    before = {k: v.clone() for k, v in step.model.state_dict().items()}
    assert torch.equal(step.fetch(), tiny.images) and torch.equal(step.fetch(), tiny.images)
    step()
    assert any(not torch.equal(v, before[k]) for k, v in step.model.state_dict().items())


def test_the_head_alone():
    "On cached features, which have no bytes and no layout"
    table = bench.bench_levers(bench.Setting(None, size=64, classes=6, batch=2, d=32, heads=2, head_dim=8, ffn_dim=32), repeats=1)
    assert 'bfloat16' in table.index and not set(bench.OF_IMAGES) & set(table.index)


def test_reading():
    table = bench.bench_data(8, 64, (0, 1), to=32)
    assert table.index.tolist() == ['JPEG files, num_workers=0', 'JPEG files, num_workers=1', 'decoded once, num_workers=0'] and table['ratio'].iloc[0] == 1


def test_evaluation(tiny):
    table = bench.bench_eval(tiny, repeats=1)
    assert len(table) == 2 and (table['ms'] > 0).all() and tiny.model.training


def test_classes():
    table = bench.bench_classes((4, 80, 90), repeats=1, batch=2, limit=1e6, **TINY)
    assert table.index.tolist() == [(a, c) for a in ('all', 'patches') for c in (4, 80, 90)]
    assert table.loc[('all', 80), 'over_80'] == 1


def test_a_form_that_would_take_too_long_is_left_out():
    table = bench.bench_classes((4, 80, 10**9), repeats=1, limit=5.0, batch=2, **TINY)
    assert 10**9 not in table.index.get_level_values('classes')


def test_command(tmp_path, capsys):
    cprfl_bench(['metrics', '--out', str(tmp_path), '--repeats', '1', '--classes', '4'])
    out = capsys.readouterr().out
    assert 'the kit' in out and f'torch {torch.__version__}' in out
    assert pd.read_csv(tmp_path / 'metrics.csv')['ratio'].iloc[0] == 1
    assert json.loads((tmp_path / 'machine.json').read_text())['metrics']['classes'] == 4
    with pytest.raises(SystemExit) as stop: cprfl_bench(['speed'])
    assert stop.value.code == 2 and 'expected some of train, levers' in capsys.readouterr().err
