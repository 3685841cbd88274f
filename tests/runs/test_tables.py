"The runner of the paper's tables: rows on equal footing, results from files, nothing typed in"
import re
import shutil
import time
from collections import Counter
from dataclasses import asdict

import pandas as pd
import pytest
import torch
from helpers import ROOT

import cprfl.runs.tables
from cprfl.cli import table as cprfl_table
from cprfl.runs.recipe import Recipe, get_recipe
from cprfl.runs.report import (
    _settings_of,
    _stored_table,
    collect,
    compare_to,
    format_table,
    intervals,
    make_table,
    paper_results,
    read_tables,
    rule_results,
    unfinished,
    write_tables,
)
from cprfl.runs.run import Run, run_or_open
from cprfl.runs.tables import Protocol, _watched, all_rows, all_tables, get_protocol, run_many, seeded

YAML = """
title: My images
recipe: {base: frozen-cprfl, train_file: train.csv, epochs: 3, d: 64}
"""


def frozen_protocol(**sources):
    "A protocol whose backbone is frozen, without words or an image tower"
    return Protocol('x', get_recipe('frozen-cprfl'), sources={'clip': 'file:w.npy', **sources}, tower=False)


CLIP = all_rows(get_protocol('shapes'))['clip'].with_(image_size=32)


@pytest.fixture(scope='module')
def runs(tmp_path_factory):
    "Zero-shot CLIP on two seeds: runs that take no training"
    folder = tmp_path_factory.mktemp('runs')
    failed = run_many(seeded(CLIP, 2), folder, workers=1, progress=False)
    assert not failed
    return folder


# ---- rows

ONLY_FROZEN = {f'{k}-{t}' for k in ('asl', 'cprfl', 'global') for t in ('tuned', 'untuned')} | {'cprfl@one-view'}


def test_the_tables_have_their_names():
    names = ('methods losses components semantics ablations variant inputs opponents tuned speed score-rules search '
             'towers unseen')
    assert set(all_tables(get_protocol('shapes'))) == set(names.split())


@pytest.mark.parametrize('name', all_tables(get_protocol('shapes')))
def test_every_row_of_a_table_is_a_recipe_of_its_name(name):
    p = get_protocol('shapes')
    rows, table = all_rows(p), all_tables(p)[name]
    assert all(label for _, label, _ in table.rows)
    for key in {key for key, _, _ in table.rows} - ONLY_FROZEN:
        assert isinstance(rows[key], Recipe)
        assert rows[key].name == key


def test_some_rows_need_a_frozen_backbone():
    assert not ONLY_FROZEN & set(all_rows(get_protocol('shapes')))
    assert ONLY_FROZEN <= set(all_rows(frozen_protocol()))


def test_tuned_rows_differ_in_what_learns():
    rows = all_rows(frozen_protocol())
    assert (rows['global-tuned'].tune, rows['global-untuned'].tune) == (1, 0)
    assert rows['global-tuned'].model_args['global_path']


def test_the_search_changes_one_setting_at_a_time():
    p = frozen_protocol()
    rows = all_rows(p)
    def flat(r): return {**asdict(r), **asdict(r)['train'], **r.model_args}
    before = flat(p.recipe)
    for key, label, _ in all_tables(p)['search'].rows[1:]:
        changed = {k for k, v in flat(rows[key]).items() if v != before.get(k)} - {'name', 'train', 'model_args'}
        assert len(changed) == 1, (label, changed)


def test_the_search_halves_and_doubles():
    rows = all_rows(frozen_protocol())
    assert rows['cprfl@half-the-epochs'].train.epochs == 7
    assert rows['cprfl@twice-the-width'].model_args['d'] == 1024
    assert rows['cprfl@semantics-half-as-long'].semantics_norm == 12


def test_the_search_does_not_halve_a_single_epoch():
    rows = all_rows(Protocol('x', get_recipe('shapes-cprfl').with_(epochs=1), sources=dict(clip='shapes')))
    assert 'cprfl@half-the-epochs' not in rows


def test_the_search_stays_off_the_test_set(capsys):
    with pytest.raises(SystemExit): cprfl_table(['--tables', 'search'])
    assert 'add --held-out' in capsys.readouterr().err


def test_the_search_is_listed(capsys):
    cprfl_table(['--list', '--held-out', '0.3'])
    assert 'half-the-epochs' in capsys.readouterr().out


def test_rows_differ_only_in_what_they_are_about():
    p = get_protocol('shapes')
    for key, r in all_rows(p).items():
        assert (r.benchmark, r.backbone, r.train.select) == (p.recipe.benchmark, p.recipe.backbone, 'last'), key
        if '@' not in key: assert r.image_size == p.recipe.image_size, key


def test_papers_names_exist():
    known = paper_results()
    sources = {'clip': 'a', 'clip-vit': 'b', 'glove': 'c', 'random': 'random'}
    for t in all_tables(Protocol('x', get_recipe('frozen-cprfl'), sources=sources)).values():
        for _, _, name in t.rows:
            assert not name or ((known['where'] == t.where) & (known['method'] == name)).any(), (t.title, name)


def test_paper_results_are_plausible():
    known = paper_results()
    assert known['total'].between(30, 95).all()
    assert set(known['benchmark']) == {'VOC-LT', 'COCO-LT'}
    best = known[known['method'] == 'CPRFL, CLIP prompts'].set_index('benchmark')['total']
    assert best.to_dict() == {'VOC-LT': 86.28, 'COCO-LT': 66.69}


def test_protocol_without_image_tower_or_words_drops_rows():
    rows = all_rows(frozen_protocol())
    assert not {'clip', 'coop', 'probe', 'no-normalize', 'ml-gcn'} & set(rows)
    assert 'cprfl' in rows


def test_coop_is_an_opponent_where_there_is_an_image_tower():
    with_tower = Protocol('x', get_recipe('frozen-cprfl'), sources={'clip': 'clip:RN50/openai'})
    assert 'coop' in all_rows(with_tower)
    assert 'coop' in {key for key, _, _ in all_tables(with_tower)['opponents'].rows}


@pytest.mark.parametrize('protocol', [get_protocol('shapes'), frozen_protocol()], ids=['end to end', 'frozen'])
def test_opponents_are_rows_of_every_protocol(protocol):
    keys = {key for key, _, _ in all_tables(protocol)['opponents'].rows}
    assert keys - {'coop'} <= set(all_rows(protocol))


def test_the_decoder_is_as_wide_as_cprfl():
    args, cprfl = all_rows(frozen_protocol())['decoder'].model_args, get_recipe('frozen-cprfl').model_args
    assert args == {name: cprfl[name] for name in ('d', 'heads', 'ffn_dim')}


def test_protocol_needs_clip():
    with pytest.raises(ValueError, match="'clip', got random"):
        Protocol('x', get_recipe('frozen-cprfl'), sources={'random': 'random'})


def test_a_protocol_from_a_file(tmp_path):
    file = tmp_path / 'p.yaml'
    file.write_text(YAML.replace(', d: 64', '') + "sources: {clip: 'file:w.npy'}\nlinear: {lr: 0.01}\n")
    p = get_protocol(str(file))
    rows = all_rows(p)
    assert p.recipe.train.epochs == 3
    assert (rows['erm'].train.lr, rows['cprfl'].train.lr) == (0.01, p.recipe.train.lr)


@pytest.mark.parametrize('text, words', [
    (YAML, 'unknown settings d'), ('titel: x', 'unknown settings titel; there are title, recipe')])
def test_a_file_that_is_no_protocol(tmp_path, text, words):
    file = tmp_path / 'p.yaml'
    file.write_text(text)
    with pytest.raises(ValueError, match=re.escape(words)): get_protocol(str(file))


@pytest.mark.parametrize('text, words', [
    ('recipe: {semantics: words}', "recipe: semantics: expected in `sources: clip`, got 'words'"),
    ('recipe: {seed: 1}', 'recipe: seed: expected in `cprfl_table --seeds`, got 1'),
    ('linear: {seed: 1}', 'linear: seed: expected in `cprfl_table --seeds`, got 1'),
    ('tuned: {train: {seed: 1}}', 'tuned: seed: expected in `cprfl_table --seeds`, got 1'),
    ('inputs: {small: {data_seed: 1}}', 'inputs: small: data_seed: expected in `cprfl_table --seeds`, got 1'),
    ('trials: {rows: [asl], tried: {asl: {one: {seed: 1}}}}', 'trials: one: seed: expected in'),
    ('recipe: {train: {seed: 1}}', 'recipe: seed: expected in'), ('recipe: {data-seed: 1}', 'recipe: data_seed: '),
    ('loss_args: {dbfocal: {neg_scale: 2}}', "got 'dbfocal'; did you mean db_focal?"),
    ('names_args: {k: 5}', 'names_args: these need `names`'),
    ('names_tried: {k 5: {k: 5}}', 'names_tried: these need `names`')])
def test_settings_that_no_row_uses_are_refused(tmp_path, text, words):
    file = tmp_path / 'p.yaml'
    file.write_text(f'title: x\nsources: {{clip: shapes}}\n{text}\n')
    with pytest.raises(ValueError, match=re.escape(words)): get_protocol(str(file))


def test_a_protocol_that_is_not_there():
    with pytest.raises(ValueError, match='expected one of shapes or a YAML file'): get_protocol('nothing')


# ---- results

def test_results_have_a_row_per_run(runs):
    results, _ = collect(runs)
    assert results['key'].tolist() == ['clip', 'clip']
    assert results['seed'].tolist() == [0, 1]
    assert results['total'][0] == pytest.approx(100 * Run(runs / 'clip-s0').report['total'], abs=1e-3)


def test_results_have_a_row_per_run_and_class(runs):
    results, classes = collect(runs)
    assert len(classes) == 40
    tail = classes.query("seed == 0 and group == 'tail'")['ap']
    assert tail.mean() == pytest.approx(results['tail'][0], abs=0.01)


def test_collect_of_nothing(tmp_path):
    with pytest.raises(FileNotFoundError, match='no finished run'): collect(tmp_path)


def test_broken_runs_are_left_out_of_results(runs, tmp_path):
    folder = shutil.copytree(runs, tmp_path / 'runs')
    broken = {'cut-s0': ('{"total": 0.', 'report.json is damaged'), 'foreign-s0': ('[]', r'expected names .*got \[\]'),
              'notes-small-s0': ('{}', 'total, ap, .* is missing'), 'x-series0': ('{}', 'expected a name KEY-sSEED')}
    for name, (text, _) in broken.items():
        shutil.copytree(folder / 'clip-s0', folder / name)
        (folder / name / 'report.json').write_text(text)
    with pytest.warns(UserWarning) as warned: results, _ = collect(folder)
    said = '\n'.join(str(w.message) for w in warned)
    for name, (_, why) in broken.items(): assert re.search(f'{name} is left out: .*{why}', said)
    assert results['key'].tolist() == ['clip', 'clip']


def test_tables_are_written_beside_a_broken_run(runs, tmp_path):
    folder = shutil.copytree(runs, tmp_path / 'runs')
    shutil.copytree(folder / 'clip-s0', folder / 'asl-s0')
    (folder / 'asl-s0' / 'predictions.parquet').write_bytes(b'PAR1')
    (folder / 'asl-s0' / 'config.json').write_text('{}')
    p = get_protocol('shapes')
    with pytest.warns(UserWarning, match='asl-s0 is left out'):
        texts = write_tables(folder, p, {'methods': all_tables(p)['methods']})
    assert 'zero-shot CLIP' in texts[0]


@pytest.fixture
def counted(monkeypatch):
    "How often the files of runs are read"
    reads = Counter()
    def counting(name, read):
        def counts(run):
            reads[name] += 1
            return read(run)
        monkeypatch.setattr(Run, name, property(counts))
    for name in ('report', 'predictions'): counting(name, getattr(Run, name).fget)
    return reads


def test_a_report_is_read_once(runs, counted):
    collect(runs)
    assert counted == dict(report=2)


def test_predictions_are_read_once(runs, counted):
    intervals(runs, Run(runs / 'clip-s0').test_set().targets, n=10)
    assert counted == dict(predictions=1)


@pytest.mark.parametrize('lost', ['clip-s0', 'clip-s0/predictions.parquet'])
def test_tables_without_a_finished_run_of_seed_0(runs, tmp_path, lost):
    folder = shutil.copytree(runs, tmp_path / 'runs')
    (folder / lost).rename(tmp_path / 'lost')
    p = get_protocol('shapes')
    with pytest.raises(FileNotFoundError, match='runs: no finished run named KEY-s0 in it'):
        write_tables(folder, p, {'methods': all_tables(p)['methods']})


def test_intervals_without_a_finished_run_of_seed_0(tmp_path):
    with pytest.raises(FileNotFoundError, match='no finished run named KEY-s0'): intervals(tmp_path, None)


def test_runs_are_not_repeated(runs):
    before = (runs / 'clip-s0' / 'report.json').stat().st_mtime_ns
    run_or_open(seeded(CLIP, 1)[0], runs)
    assert (runs / 'clip-s0' / 'report.json').stat().st_mtime_ns == before


def test_a_run_whose_report_is_damaged_is_tested_again(runs, tmp_path):
    recipe = seeded(CLIP, 1)[0]
    shutil.copytree(runs / recipe.name, tmp_path / recipe.name)
    (tmp_path / recipe.name / 'report.json').write_text('{"total": 1}')
    again = run_or_open(recipe, tmp_path, progress=False)
    assert again.report['ap'] == Run(runs / recipe.name).report['ap']


def test_intervals_hold_the_estimate(runs):
    run = Run(runs / 'clip-s0')
    spread = intervals(runs, run.test_set().targets, n=100).set_index('group')
    total = 100 * run.report['total']
    assert spread.loc['total', 'low'] < total < spread.loc['total', 'high']
    assert (spread['high'] > spread['low']).all()


def test_written_tables(runs):
    p = get_protocol('shapes')
    texts = write_tables(runs, p, {'methods': all_tables(p)['methods']}, 'markdown')
    assert len(texts) == 1
    assert 'Methods on Shapes-LT: 1,142 training and 1,000 test images, 20 classes' in texts[0]
    assert 'zero-shot CLIP' in texts[0]
    files = 'results.csv classes.csv intervals.csv methods.txt methods.csv methods.md methods.tex tables.json'
    assert set(files.split()) <= {f.name for f in runs.iterdir()}
    assert pd.read_csv(runs / 'results.csv')['key'].tolist() == ['clip', 'clip']


def test_rules_come_from_stored_predictions(runs):
    totals = rule_results(runs).set_index(['seed', 'rule'])['total']
    for seed in (0, 1):
        report = Run(runs / f'clip-s{seed}').report
        assert totals[seed, 'sigmoid'] == pytest.approx(100 * report['total'], abs=1e-3)


def test_zero_shot_clip_gains_by_the_softmax(runs):
    totals = rule_results(runs).groupby('rule')['total'].mean()
    assert totals['softmax'] > totals['sigmoid'] + 1


def test_rules_of_no_run(tmp_path):
    with pytest.raises(FileNotFoundError, match='no finished run'): rule_results(tmp_path)


def test_a_table_of_rules_is_written_and_read(runs, tmp_path):
    folder = shutil.copytree(runs, tmp_path / 'runs')
    p = get_protocol('shapes')
    text, = write_tables(folder, p, {'score-rules': all_tables(p)['score-rules']})
    assert 'mAP under each scoring rule on Shapes-LT' in text
    columns = list(read_tables(folder).table('score-rules'))
    assert columns == ['sigmoid', 'softmax', 'standardised', 'norm', 'seeds']


def test_results_without_rules_are_read_as_before():
    stored = read_tables(ROOT / 'nbs' / 'analysis' / 'results' / 'shapes')
    assert stored.rules is None


def results(**totals):
    def row(key, total, seed):
        groups = dict(total=total + seed * 0.1, head=total, medium=total, tail=total)
        return dict(key=key, seed=seed, **groups, classes=20, train=9, test=9, seconds=60)
    return pd.DataFrame([row(key, total, seed) for key, total in totals.items() for seed in range(3)])


@pytest.fixture
def losses(): return make_table(all_tables(get_protocol('shapes'))['losses'], results(**{'cprfl-bce': 40, 'cprfl': 50}))


def test_mls_is_bce(losses):
    assert losses.loc['BCE', 'total'] == losses.loc['MLS (= BCE)', 'total'] == '40.1 ± 0.1'


def test_the_papers_figures_are_beside_ours(losses):
    assert losses.loc['BCE', "the paper's, VOC-LT / COCO-LT"] == '79.6 / 59.6'


@pytest.mark.parametrize('name', ['text', 'csv', 'markdown'])
def test_a_table_in_every_format(losses, name):
    shown = format_table(losses, name).replace('\u00a0', ' ') # a line must not break there
    assert '40.1 ± 0.1' in shown


def test_a_rate_stays_in_one_line():
    shown = format_table(pd.DataFrame({'total': [40.1]}, index=['head 1e-3, k-means']), 'markdown')
    assert 'head 1e\u20113, k-means' in shown


def test_a_table_in_latex_has_its_signs(losses):
    assert r'40.1 $\pm$ 0.1' in format_table(losses, 'latex')


@pytest.mark.parametrize('name', ['text', 'csv', 'markdown', 'latex'])
def test_chosen_columns_are_the_only_ones(losses, name):
    shown = format_table(losses, name, ['total'])
    assert 'tail' not in shown


def test_settings_that_rows_do_not_share_are_shown():
    unequal = results(asl=40, cprfl=50).assign(epochs=[20] * 3 + [15] * 3, lr=1e-3, sampler=['a'] * 3 + ['b'] * 3)
    made = make_table(all_tables(get_protocol('shapes'))['methods'], unequal)
    assert made['settings'].tolist() == ['epochs 20', 'epochs 15'] # the sampler is compared


def test_a_linear_head_has_no_rate_of_prompts():
    settings = {model: _settings_of(get_recipe(f'shapes-{model}')) for model in ('erm', 'cprfl')}
    assert 'prompt_lr' not in settings['erm']
    assert 'prompt_lr' in settings['cprfl']


def test_rows_that_share_their_settings_have_no_column(losses): assert 'settings' not in losses


def test_linear_rows_of_photographs_have_another_schedule():
    stored = read_tables(ROOT / 'nbs' / 'analysis' / 'results' / 'coco-mini').table('methods')
    assert stored['settings'].tolist().count('epochs 20, lr 0.001') == 9
    assert stored.loc['CPRFL, CLIP', 'settings'] == 'epochs 15, lr 0.0004'


def test_rows_are_compared_with_cprfl():
    lines = compare_to(all_tables(get_protocol('shapes'))['methods'], results(asl=40, cprfl=50))
    assert len(lines) == 1
    assert 'CPRFL, CLIP and ASL: total +10.0' in lines[0]


def test_nothing_is_compared_without_cprfl():
    assert compare_to(all_tables(get_protocol('shapes'))['methods'], results(asl=40)) == []


# ---- running


def test_a_failed_run_does_not_stop_the_others(tmp_path):
    rows = all_rows(get_protocol('shapes'))
    broken = rows['asl'].with_(name='asl-s0', semantics='shapes', backbone='resnet17', backbone_args={})
    failed = run_many([broken, CLIP.with_(name='clip-s0')], tmp_path, workers=1, progress=False)
    assert list(failed) == ['asl-s0']
    assert 'resnet17' in failed['asl-s0']
    assert (tmp_path / 'clip-s0' / 'report.json').exists()


def test_a_set_number_of_threads_is_kept(tmp_path, monkeypatch):
    taken = []
    monkeypatch.setattr('cprfl.runs.tables.why_it_failed', lambda recipe, folder, cache, threads: taken.append(threads))
    monkeypatch.setattr('os.cpu_count', lambda: 8)
    monkeypatch.setenv('OMP_NUM_THREADS', str(torch.get_num_threads()))
    run_many([CLIP], tmp_path, workers=1, progress=False)
    monkeypatch.delenv('OMP_NUM_THREADS')
    run_many([CLIP], tmp_path, workers=1, progress=False)
    assert taken == [torch.get_num_threads(), 8]


def test_the_row_of_coop_can_be_opened(tmp_path):
    coop = all_rows(get_protocol('shapes'))['coop'].with_(name='coop-s0', epochs=1, image_size=32)
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


@pytest.mark.parametrize('rows', [['cprfl'], [['cprfl', 'CPRFL']], [['cprfl', 'CPRFL', 1]], [None]])
def test_rows_of_a_stored_table_are_checked(rows):
    with pytest.raises(ValueError, match='t: rows: expected key, label and name in the paper, got'):
        _stored_table('t', dict(title='a', rows=rows))


# ---- the command

def test_tables_of_runs_that_are_there(runs, capsys):
    cprfl_table(['--no-run', '--tables', 'methods', '--out', str(runs), '--format', 'latex'])
    out = capsys.readouterr().out
    assert r'\begin{tabular}' in out
    assert f'runs and tables: {runs}' in out


def test_a_share_that_the_runs_did_not_hold_out_is_refused(runs, capsys):
    with pytest.raises(SystemExit):
        cprfl_table(['--no-run', '--held-out', '0.5', '--tables', 'methods', '--out', str(runs)])
    assert 'held_out: expected runs with 0.5, got clip-s0 with 0;' in capsys.readouterr().err


def test_the_caption_has_the_share_that_runs_held_out(tmp_path, capsys):
    recipe = CLIP.with_(held_out=0.3)
    run_many(seeded(recipe, 1), tmp_path, workers=1, progress=False)
    cprfl_table(['--no-run', '--held-out', '0.3', '--tables', 'methods', '--out', str(tmp_path)])
    assert '30% of the training images in place of the test set' in capsys.readouterr().out


def test_tables_are_printed_again_without_their_runs(runs, tmp_path, capsys):
    p = get_protocol('shapes')
    write_tables(runs, p, {'methods': all_tables(p)['methods']})
    for name in ('tables.json', 'results.csv', 'classes.csv'): shutil.copy(runs / name, tmp_path / name)
    cprfl_table(['--from', str(tmp_path), '--columns', 'total', '--format', 'markdown'])
    out = capsys.readouterr().out
    assert 'Methods on Shapes-LT: 1,142 training' in out
    assert '| zero-shot CLIP | ' in out


def test_a_folder_without_tables_says_what_writes_them(tmp_path, capsys):
    with pytest.raises(SystemExit): cprfl_table(['--from', str(tmp_path)])
    assert 'no tables.json in it' in capsys.readouterr().err


def test_rows_without_a_run_are_noted():
    rows = all_tables(get_protocol('shapes'))['losses']
    said, = unfinished(rows, results(cprfl=40))
    assert said.startswith('Not finished: BCE (0 of 3 seeds), ')


def test_tables_and_their_rows_are_listed(capsys):
    cprfl_table(['--list'])
    assert 'cprfl-db-focal' in capsys.readouterr().out


def test_a_table_that_does_not_exist(capsys):
    with pytest.raises(SystemExit) as stop: cprfl_table(['--tables', 'methds'])
    assert stop.value.code == 2
    assert 'expected some of methods' in capsys.readouterr().err


def test_failures_hold_no_control_characters(runs, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(cprfl.runs.tables, 'run_many', lambda *args, **kw: {'clip-s0': 'no file \x1b[31mred'})
    folder = shutil.copytree(runs, tmp_path / 'runs')
    with pytest.raises(SystemExit): cprfl_table(['--tables', 'methods', '--out', str(folder)])
    assert r'failed: clip-s0: no file \x1b[31mred' in capsys.readouterr().err


def test_rows_of_a_protocol_use_its_own_semantics():
    "Not those of the recipe that it starts from, which may need a download"
    rows = all_rows(frozen_protocol(random='random:8'))
    used = {key: rows[key].semantics for key in ('cprfl', 'global', 'cprfl-bce', 'cprfl-random')}
    assert used == dict.fromkeys(('cprfl', 'global', 'cprfl-bce'), 'file:w.npy') | {'cprfl-random': 'random:8'}
