"Write README.md from nbs/index.ipynb: prose as it is, code with its saved output, links to the notebooks"
import re

import nbformat
from helpers import ROOT

LINK = r'\]\((?!https?:)([\w./-]+\.(?:ipynb|png|svg))'


def output_text(out):
    "A saved output as Markdown: tables and text, nothing else"
    data = out.get('data', {})
    if 'text/markdown' in data: return data['text/markdown'].strip()
    text = data.get('text/plain', out.get('text', ''))
    return '\n'.join('    ' + line for line in text.rstrip().splitlines())


def code_text(cell):
    "The code of a cell as Markdown, without its directives; nothing where it is not to be seen"
    lines = cell.source.splitlines()
    if '#| echo: false' in lines: return ''
    return '\n'.join(['```python', *(line for line in lines if not line.startswith('#|')), '```'])


def cell_text(cell):
    "A cell as Markdown"
    if cell.cell_type == 'markdown': return cell.source
    if '#| hide' in cell.source: return ''
    return '\n\n'.join(filter(None, [code_text(cell), *map(output_text, cell.outputs)]))


def readme():
    "The whole README"
    nb = nbformat.read(ROOT / 'nbs' / 'index.ipynb', 4)
    text = '\n\n'.join(filter(None, map(cell_text, nb.cells))) + '\n'
    return re.sub(LINK, r'](nbs/\1', text)


if __name__ == '__main__':
    (ROOT / 'README.md').write_text(readme())
