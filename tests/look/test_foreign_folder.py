"A monitor shows what is in the files of others as text, and does not end because of them"
import json

import pytest

from cprfl.look.monitor import TrainingMonitor

EVIL = '<img src=x onerror=alert(1)>'
METRICS = 'epoch,loss,lr\n1,0.5,0.1\n'
FILES = [
    ('train_config.json', json.dumps(dict(epochs=EVIL))), ('train_config.json', '[1]'),
    ('train_config.json', '{"epochs": 1e999}'),
    ('report.json', json.dumps(dict(total=EVIL))), ('report.json', '[1, 2]'), ('report.json', '{"total": '),
    ('report.json', json.dumps({EVIL: 1})), ('report.json', 'NaN'), ('metrics.csv', f'epoch,loss,lr\n{EVIL},0.5,0.1\n'),
    ('metrics.csv', 'epoch,loss,lr\ninf,x,0.1\n'), ('metrics.csv', 'epoch\n1\n'),
    ('metrics.csv', 'epoch,loss,lr\n1,2,3,4\n5,6,7,8\n'),
    ('metrics.csv', '\x00'), ('purity.csv', f'epoch,class,group,auc\n1,a,{EVIL},0.5\n'),
    ('purity.csv', 'epoch,auc\n1,x\n')]


@pytest.mark.parametrize('name, content', FILES, ids=[f'{name}-{i}' for i, (name, _) in enumerate(FILES)])
def test_files_of_others_are_shown_as_text(tmp_path, name, content):
    (tmp_path / 'metrics.csv').write_text(METRICS)
    (tmp_path / name).write_text(content)
    monitor = TrainingMonitor(tmp_path)
    assert '<img' not in monitor.caption()
    assert monitor.figure().canvas.draw() is None


def test_the_name_of_a_folder_is_shown_as_text(tmp_path):
    assert '<b>&lt;i&gt;</b>' in TrainingMonitor(tmp_path / '<i>').caption()
