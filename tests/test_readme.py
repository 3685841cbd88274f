"README.md is the first page, and what it says can be done."
import re
import subprocess
import sys
from pathlib import Path

from helpers import ROOT
from readme import readme

TEXT = (ROOT / 'README.md').read_text()


def test_readme_is_the_index():
    assert TEXT == readme(), 'run `make readme`'


def test_links_lead_somewhere():
    links = [link for link in re.findall(r'\]\(([^)#]+)\)', TEXT) if not link.startswith('http')]
    assert links
    assert not [link for link in links if not (ROOT / link).exists()]


def test_make_knows_the_commands():
    targets = set(re.findall(r'\bmake ([a-z]+)', TEXT))
    assert {'demo', 'test', 'lab'} <= targets
    for target in targets:
        assert subprocess.run(['make', '--dry-run', target], cwd=ROOT, capture_output=True).returncode == 0, target


def test_options_in_the_readme_exist():
    for command in re.findall(r'(cprfl_\w+ (?:[^\n`]|\\\n)*)', TEXT):
        words = command.replace('\\\n', ' ').split()
        help_text = subprocess.run([Path(sys.executable).parent / words[0], '--help'], capture_output=True, text=True).stdout
        unknown = [w for w in words if w.startswith('--') and w not in help_text]
        assert help_text and not unknown, f'{words[0]}: {unknown}'


def test_python_example_runs():
    code = '\n'.join(re.findall(r'```python\n(.*?)```', TEXT, re.S))
    assert 'CPRFL(' in code
    subprocess.run([sys.executable, '-c', code], check=True, cwd=ROOT, timeout=120)
