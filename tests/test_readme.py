"README.md is the first page, and what it says can be done"
import re
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import ROOT
from readme import readme

TEXT = (ROOT / 'README.md').read_text()
BIN = Path(sys.executable).parent
TARGETS = sorted(set(re.findall(r'\bmake ([a-z]+)', TEXT)))
COMMANDS = re.findall(r'(cprfl_\w+ (?:[^\n`]|\\\n)*)', TEXT)


def test_readme_is_the_index():
    assert TEXT == readme(), 'run `make readme`'


def test_links_lead_somewhere():
    links = [link for link in re.findall(r'\]\(([^)#]+)\)', TEXT) if not link.startswith('http')]
    assert len(links) > 10
    assert not [link for link in links if not (ROOT / link).exists()]


def test_readme_names_the_first_targets():
    assert {'demo', 'test', 'lab'} <= set(TARGETS)


@pytest.mark.parametrize('target', TARGETS)
def test_make_knows_the_target(target):
    assert subprocess.run(['make', '--dry-run', target], cwd=ROOT, capture_output=True).returncode == 0


def test_options_in_the_readme_exist():
    for command in COMMANDS:
        name, *words = command.replace('\\\n', ' ').split()
        help_text = subprocess.run([BIN / name, '--help'], capture_output=True, text=True).stdout
        unknown = [w for w in words if w.startswith('--') and w not in help_text]
        assert help_text, name
        assert not unknown, f'{name}: {unknown}'


def test_python_example_runs():
    code = '\n'.join(re.findall(r'```python\n(.*?)```', TEXT, re.S))
    assert 'CPRFL(' in code
    subprocess.run([sys.executable, '-c', code], check=True, cwd=ROOT, timeout=120)
