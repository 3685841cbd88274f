"What is tried for each method, and the best of it"
import pytest
from helpers import ROOT

from cprfl.cli import table as cprfl_table
from cprfl.runs import Protocol, all_rows, all_tables, get_protocol, get_recipe

TRIED = dict(erm={'low': dict(lr=1e-4), 'high': dict(lr=1e-2)}, cprfl={'low': dict(lr=1e-4), 'high': dict(lr=1e-3)})


def protocol(results=None, rows=('asl', 'cprfl')):
    trials = dict(rows=list(rows), tried=TRIED, given=dict(epochs=2), results=results)
    return Protocol('x', get_recipe('shapes-cprfl'), sources=dict(clip='shapes'), trials=trials)


@pytest.fixture
def protocol_file(tmp_path):
    "A protocol whose trials were not run"
    file = tmp_path/'protocol.yaml'
    file.write_text('title: x\nrecipe: {base: shapes-cprfl}\nsources: {clip: shapes}\n'
                    'trials: {rows: [asl], tried: {erm: {low: {lr: 0.0001}}}, results: found/results.csv}\n')
    return str(file)


def test_a_trial_is_its_row_with_other_rates():
    rows = all_rows(protocol())
    assert rows['asl@high'].with_(name='asl', lr=rows['asl'].train.lr, epochs=rows['asl'].train.epochs) == rows['asl']


def test_trials_and_compared_rows_are_tables():
    tables = all_tables(protocol())
    assert [key for key, _, _ in tables['trials'].rows] == ['asl@low', 'asl@high', 'cprfl@low', 'cprfl@high']
    assert [key for key, _, _ in tables['compared'].rows] == ['asl', 'cprfl']


def test_protocols_without_trials_have_no_such_tables():
    assert 'trials' not in all_tables(protocol(rows=()))


def test_compared_rows_have_their_best_rates(tmp_path):
    file = tmp_path/'results.csv'
    file.write_text('key,total\nasl@low,40\nasl@high,30\ncprfl@low,41\ncprfl@high,45\n')
    rows = all_rows(protocol(str(file)))
    assert [rows[key].train.lr for key in ('asl', 'cprfl')] == [1e-4, 1e-3]
    assert rows['cprfl'].train.epochs == 30


def test_a_row_that_is_not_there_is_named():
    with pytest.raises(ValueError, match="trials: rows: expected one of .*, got 'als'"):
        all_rows(protocol(rows=['als']))


def test_a_wrong_setting_is_said_when_the_file_is_read(protocol_file, capsys):
    text = open(protocol_file).read().replace('lr: 0.0001', 'rate: 0.0001')
    with open(protocol_file, 'w') as f: f.write(text)
    with pytest.raises(SystemExit): cprfl_table(['--protocol', protocol_file, '--list'])
    assert 'unknown settings rate' in capsys.readouterr().err


def test_rows_without_trials_are_said_when_the_file_is_read(protocol_file, capsys):
    text = open(protocol_file).read().replace('rows: [asl]', 'rows: [asl, cprfl]')
    with open(protocol_file, 'w') as f: f.write(text)
    with pytest.raises(SystemExit): cprfl_table(['--protocol', protocol_file, '--list'])
    assert 'there are none for cprfl; there are some for erm' in capsys.readouterr().err


@pytest.mark.parametrize('file', sorted(ROOT.glob('nbs/analysis/results/*/protocol.yaml')), ids=lambda f: f.parent.name)
def test_protocols_of_the_analyses_are_read(file): assert Protocol.from_yaml(file).title


def test_rows_are_not_compared_before_the_trials(protocol_file, capsys):
    with pytest.raises(SystemExit): cprfl_table(['--protocol', protocol_file, '--tables', 'compared'])
    assert '--tables trials --held-out' in capsys.readouterr().err


def test_rows_with_names_are_not_compared_before_the_trials(protocol_file, capsys):
    with open(protocol_file, 'a') as f: f.write('names: shapes\n')
    with pytest.raises(SystemExit): cprfl_table(['--protocol', protocol_file, '--tables', 'compared-names'])
    assert '`compared-names` takes the best settings from' in capsys.readouterr().err


def test_trials_stay_off_the_test_set(protocol_file, capsys):
    with pytest.raises(SystemExit): cprfl_table(['--protocol', protocol_file, '--tables', 'trials'])
    assert 'add --held-out' in capsys.readouterr().err


def test_trials_that_were_cut_off_go_on(tmp_path):
    "A protocol with some of its results is read all the same, and its rows keep their settings"
    (tmp_path/'results.csv').write_text('key,total\nasl@low,40\nasl@high,30\ncprfl@low,40\n')
    part = protocol(str(tmp_path/'results.csv'))
    assert part.trials.missing(all_rows(part)) == ['cprfl@high']
    assert all_rows(part)['cprfl'] == all_rows(protocol())['cprfl']


def test_rows_are_not_compared_before_all_trials(protocol_file, tmp_path, capsys):
    (tmp_path/'found').mkdir()
    (tmp_path/'found'/'results.csv').write_text('key,total\nerm@low,40\n')
    with pytest.raises(SystemExit): cprfl_table(['--protocol', protocol_file, '--tables', 'compared'])
    assert 'lacks the trials asl@low' in capsys.readouterr().err


@pytest.mark.parametrize('name', ['inputs', 'names_tried'])
def test_labels_with_one_key_are_said(name):
    with pytest.raises(ValueError, match=f"{name}: expected labels that differ .*, got 'k 5' and 'k, 5'"):
        Protocol('x', get_recipe('shapes-cprfl'), sources=dict(clip='shapes'), **{name: {'k 5': {}, 'k, 5': {}}})


def test_a_label_of_another_rate_is_said_when_the_file_is_read(protocol_file, tmp_path, capsys):
    (tmp_path/'found').mkdir()
    (tmp_path/'found'/'results.csv').write_text('key,total,lr\nasl@low,40,0.5\n')
    with pytest.raises(SystemExit): cprfl_table(['--protocol', protocol_file, '--tables', 'compared'])
    assert 'was run with lr 0.5, and its label now means' in capsys.readouterr().err


def test_trials_of_a_row_go_before_those_of_its_model():
    trials = dict(rows=['asl', 'erm'], tried=dict(TRIED, asl={'a': dict(lr=0.1), 'b': {}}))
    rows = all_rows(Protocol('x', get_recipe('shapes-cprfl'), sources=dict(clip='shapes'), trials=trials))
    assert {'asl@a', 'asl@b', 'erm@low', 'erm@high'} <= set(rows)
    assert 'asl@low' not in rows


@pytest.mark.parametrize('folder', [
    'opponents', 'e2e', 'shapes-clip', 'backbones/resnet-18', 'backbones/efficientnet-lite0'])
def test_compared_rows_have_names_for_readers(folder):
    protocol = get_protocol(str(ROOT / 'nbs' / 'analysis' / 'results' / folder / 'protocol.yaml'))
    assert not [key for key, label, _ in all_tables(protocol)['compared'].rows if label == key]
