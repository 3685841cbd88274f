"The runner of the paper's tables: rows on equal footing, results from files, nothing typed in."
import time
from dataclasses import asdict

import pandas as pd
import pytest

from cprfl.cli import table as cprfl_table
from cprfl.runs.recipe import Recipe, get_recipe
from cprfl.runs.report import collect, format_table, intervals, make_table, paper_results, told_apart, write_tables
from cprfl.runs.run import Run, run_or_open
from cprfl.runs.tables import Protocol, _watched, all_rows, all_tables, get_protocol, run_many, seeded

YAML = """
title: My images
recipe: {base: frozen-cprfl, train_file: train.csv, epochs: 3, d: 64}
"""


@pytest.fixture(scope='module')
def runs(tmp_path_factory):
    "Zero-shot CLIP on two seeds: runs that take no training"
    folder = tmp_path_factory.mktemp('runs')
    failed = run_many(seeded(all_rows(get_protocol('shapes'))['clip'], 2), folder, workers=1, progress=False)
    assert not failed
    return folder


def test_every_row_of_every_table_is_a_recipe():
    p = get_protocol('shapes')
    rows, tables = all_rows(p), all_tables(p)
    assert {'methods', 'losses', 'components', 'semantics', 'ablations', 'own', 'inputs', 'tuned', 'speed', 'search'} == set(tables)
    only_frozen = {f'{k}-{t}' for k in ('asl', 'cprfl', 'own') for t in ('tuned', 'untuned')} | {'cprfl@one-view'}
    for t in tables.values():
        for key, label, _ in t.rows:
            assert label and (key in only_frozen or isinstance(rows[key], Recipe) and rows[key].name == key)
    assert not only_frozen & set(rows)
    frozen = all_rows(Protocol('x', get_recipe('frozen-cprfl'), sources={'clip': 'file:w.npy'}, tower=False))
    assert only_frozen <= set(frozen) and (frozen['own-tuned'].tune, frozen['own-untuned'].tune) == (1, 0) and frozen['own-tuned'].model_args['global_path']


def test_the_search_changes_one_setting_at_a_time():
    p = Protocol('x', get_recipe('frozen-cprfl'), sources={'clip': 'file:w.npy'}, tower=False)
    rows = all_rows(p)
    def flat(r): return {**asdict(r), **asdict(r)['train'], **r.model_args}
    for key, label, _ in all_tables(p)['search'].rows[1:]:
        changed = {k for k, v in flat(rows[key]).items() if v != flat(p.recipe).get(k)} - {'name', 'train', 'model_args'}
        assert len(changed) == 1, (label, changed)
    assert (rows['cprfl@half-the-epochs'].train.epochs, rows['cprfl@twice-the-width'].model_args['d'], rows['cprfl@semantics-half-as-long'].semantics_norm) == (7, 1024, 12)


def test_the_search_stays_off_the_test_set(capsys):
    with pytest.raises(SystemExit): cprfl_table(['--tables', 'search'])
    assert 'add --held-out' in capsys.readouterr().err
    cprfl_table(['--list', '--held-out', '0.3'])
    assert 'half-the-epochs' in capsys.readouterr().out


def test_rows_differ_only_in_what_they_are_about():
    p = get_protocol('shapes')
    for key, r in all_rows(p).items():
        assert (r.benchmark, r.backbone, r.train.select) == (p.recipe.benchmark, p.recipe.backbone, 'last'), key
        if '@' not in key: assert r.image_size == p.recipe.image_size, key


def test_papers_names_exist():
    known = paper_results()
    for t in all_tables(Protocol('x', get_recipe('frozen-cprfl'), sources={'clip': 'a', 'clip-vit': 'b', 'glove': 'c', 'random': 'random'})).values():
        for _, _, name in t.rows:
            assert not name or ((known['where'] == t.where) & (known['method'] == name)).any(), (t.title, name)


def test_paper_results_are_plausible():
    known = paper_results()
    assert known['total'].between(30, 95).all() and set(known['benchmark']) == {'VOC-LT', 'COCO-LT'}
    best = known[(known['method'] == 'CPRFL, CLIP prompts')].set_index('benchmark')['total']
    assert best['VOC-LT'] == 86.28 and best['COCO-LT'] == 66.69


def test_protocol_without_image_tower_or_words_drops_rows():
    p = Protocol('x', get_recipe('frozen-cprfl'), tower=False, sources={'clip': 'file:w.npy'})
    rows = all_rows(p)
    assert not {'clip', 'coop', 'probe', 'no-normalize', 'ml-gcn'} & set(rows) and 'cprfl' in rows


def test_protocol_needs_clip():
    with pytest.raises(ValueError, match="'clip', got random"): Protocol('x', get_recipe('frozen-cprfl'), sources={'random': 'random'})


def test_yaml(tmp_path):
    file = tmp_path / 'p.yaml'
    file.write_text(YAML.replace(', d: 64', '') + "sources: {clip: 'file:w.npy'}\nlinear: {lr: 0.01}\n")
    p = get_protocol(str(file))
    assert p.recipe.train.epochs == 3 and all_rows(p)['erm'].train.lr == 0.01 and all_rows(p)['cprfl'].train.lr == p.recipe.train.lr
    file.write_text(YAML)
    with pytest.raises(ValueError, match='unknown settings d'): get_protocol(str(file))
    file.write_text('titel: x')
    with pytest.raises(ValueError, match='unknown settings titel'): get_protocol(str(file))
    with pytest.raises(ValueError, match='expected one of shapes or a YAML file'): get_protocol('nothing')


def test_recipe_from_yaml(tmp_path):
    file = tmp_path / 'r.yaml'
    file.write_text('base: shapes-erm\nepochs: 7\nimage_size: 96\n')
    r = Recipe.from_yaml(file)
    assert r.model == 'erm' and r.train.epochs == 7 and r.image_size == 96
    file.write_text('base: shapes-erm\nepoch: 7\n')
    with pytest.raises(ValueError, match='r.yaml: recipe: unknown settings epoch'): Recipe.from_yaml(file)


def test_collect(runs):
    results, classes = collect(runs)
    assert results['key'].tolist() == ['clip', 'clip'] and results['seed'].tolist() == [0, 1] and len(classes) == 40
    report = Run(runs / 'clip-s0').report
    assert results['total'][0] == pytest.approx(100 * report['total'], abs=1e-3)
    assert classes.query("seed == 0 and group == 'tail'")['ap'].mean() == pytest.approx(results['tail'][0], abs=0.01)


def test_collect_of_nothing(tmp_path):
    with pytest.raises(FileNotFoundError, match='no finished run'): collect(tmp_path)


def test_runs_are_not_repeated(runs):
    before = (runs / 'clip-s0' / 'report.json').stat().st_mtime_ns
    run_or_open(seeded(all_rows(get_protocol('shapes'))['clip'], 1)[0], runs)
    assert (runs / 'clip-s0' / 'report.json').stat().st_mtime_ns == before


def test_intervals_hold_the_estimate(runs):
    from cprfl.runs.build import load_data
    spread = intervals(runs, load_data(Run(runs / 'clip-s0').recipe)[1].targets, n=100).set_index('group')
    total = 100 * Run(runs / 'clip-s0').report['total']
    assert spread.loc['total', 'low'] < total < spread.loc['total', 'high']
    assert (spread['high'] > spread['low']).all()


def test_written_tables(runs):
    p = get_protocol('shapes')
    texts = write_tables(runs, p, {'methods': all_tables(p)['methods']}, 'markdown')
    assert len(texts) == 1 and 'Methods on Shapes-LT: 1,142 training and 1,000 test images, 20 classes' in texts[0] and 'zero-shot CLIP' in texts[0]
    assert {'results.csv', 'classes.csv', 'intervals.csv', 'methods.txt', 'methods.csv', 'methods.md', 'methods.tex'} <= {f.name for f in runs.iterdir()}
    assert pd.read_csv(runs / 'results.csv')['key'].tolist() == ['clip', 'clip']


def results(**totals):
    return pd.DataFrame([dict(key=k, seed=s, total=t + s * 0.1, head=t, medium=t, tail=t, classes=20, train=9, test=9, seconds=60) for k, t in totals.items() for s in range(3)])


def test_mls_is_bce():
    made = make_table(all_tables(get_protocol('shapes'))['losses'], results(**{'cprfl-bce': 40, 'cprfl': 50}))
    assert made.loc['BCE', 'total'] == made.loc['MLS (= BCE)', 'total'] == '40.1 ± 0.1'
    assert made.loc['BCE', "the paper's, VOC-LT / COCO-LT"] == '79.6 / 59.6'
    for name in ('text', 'csv', 'markdown', 'latex'): assert '40.1 ± 0.1' in format_table(made, name)


def test_rows_that_cannot_be_told_apart():
    table = all_tables(get_protocol('shapes'))['methods']
    lines = told_apart(table, results(asl=40, cprfl=50))
    assert len(lines) == 1 and 'CPRFL, CLIP and ASL: total +10.0' in lines[0]
    assert told_apart(table, results(asl=40)) == []


def test_a_failed_run_does_not_stop_the_others(tmp_path):
    rows = all_rows(get_protocol('shapes'))
    broken = rows['asl'].with_(name='asl-s0', semantics='shapes', backbone='resnet17', backbone_args={})
    failed = run_many([broken, rows['clip'].with_(name='clip-s0')], tmp_path, workers=1, progress=False)
    assert list(failed) == ['asl-s0'] and 'resnet17' in failed['asl-s0'] and (tmp_path / 'clip-s0' / 'report.json').exists()


def test_rows_with_cached_features_run_side_by_side(tmp_path):
    "Their data loaders start processes of their own"
    coop = all_rows(get_protocol('shapes'))['coop'].with_(name='coop-s0', epochs=1)
    assert run_many([coop], tmp_path, workers=1, progress=False) == {}
    assert Run(tmp_path / 'coop-s0').model() is not None


def test_the_bar_counts_epochs_of_other_processes(tmp_path, capsys):
    "It reads them from the runs' folders"
    rows = all_rows(get_protocol('shapes'))
    half = rows['cprfl'].with_(name='half', epochs=8)
    (tmp_path / 'half').mkdir()
    (tmp_path / 'half' / 'metrics.csv').write_text('epoch,loss\n1,0.5\n2,0.4\n3,0.3\n')
    with _watched([half, rows['clip']], tmp_path, progress=True, every=0.01): time.sleep(0.3)
    assert '3/8' in capsys.readouterr().err


def test_command(runs, capsys):
    cprfl_table(['--no-run', '--tables', 'methods', '--out', str(runs), '--format', 'latex'])
    out = capsys.readouterr().out
    assert r'\begin{tabular}' in out and f'runs and tables: {runs}' in out
    cprfl_table(['--list'])
    assert 'cprfl-db-focal' in capsys.readouterr().out
    with pytest.raises(SystemExit) as stop: cprfl_table(['--tables', 'methds'])
    assert stop.value.code == 2 and 'expected some of methods' in capsys.readouterr().err


def test_rows_of_a_protocol_use_its_own_semantics():
    "Not those of the recipe that it starts from, which may need a download"
    rows = all_rows(Protocol('x', get_recipe('frozen-cprfl'), sources={'clip': 'file:a.npy', 'random': 'random:8'}, tower=False))
    assert {k: r.semantics for k, r in rows.items() if k in ('cprfl', 'own', 'cprfl-bce', 'cprfl-random')} == {'cprfl': 'file:a.npy', 'own': 'file:a.npy', 'cprfl-bce': 'file:a.npy', 'cprfl-random': 'random:8'}
