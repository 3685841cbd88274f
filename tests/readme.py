"Write README.md from nbs/index.ipynb: prose as it is, code with its saved output, links to the notebooks."
import re

import nbformat
from helpers import ROOT


def output_text(out):
    "A saved output as Markdown: tables and text, nothing else"
    data = out.get('data', {})
    if 'text/markdown' in data:
        return data['text/markdown'].strip()
    text = data.get('text/plain', out.get('text', ''))
    return '\n'.join('    ' + line for line in text.rstrip().splitlines())


def cell_text(cell):
    "A cell as Markdown"
    if cell.cell_type == 'markdown':
        return re.sub(r'\]\((?!https?:)([\w./-]+\.(?:ipynb|png|svg))', r'](nbs/\1', cell.source)
    lines = cell.source.splitlines()
    if any(line.startswith('#| hide') for line in lines):
        return ''
    shown = [] if '#| echo: false' in lines else ['```python', *(line for line in lines if not line.startswith('#|')), '```']
    return '\n'.join(['\n'.join(shown), *('\n' + output_text(o) for o in cell.outputs)]).strip('\n')


def readme():
    "The whole README"
    nb = nbformat.read(ROOT / 'nbs' / 'index.ipynb', 4)
    return '\n\n'.join(filter(None, map(cell_text, nb.cells))) + '\n'


if __name__ == '__main__':
    (ROOT / 'README.md').write_text(readme())
