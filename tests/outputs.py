"Run notebooks and keep their outputs: `python tests/outputs.py nbs/index.ipynb ...`; of reference pages, the pictures"
import os
import re
import sys
from base64 import b64decode, b64encode
from io import BytesIO
from pathlib import Path

import nbformat
from bs4 import BeautifulSoup
from nbclient import NotebookClient
from PIL import Image, ImageChops, ImageStat

from cprfl.text import markdown_text

NEEDED = {'top3_photos.ipynb': 'CPRFL_PHOTO_RUNS'} # runs that are not made here: without them the page stays as it is
WIDGET = 'application/vnd.jupyter.widget-view+json'


class Client(NotebookClient):
    "Leaves out cells that are marked slow"

    async def async_execute_cell(self, cell, cell_index, **kw):
        if cell.cell_type == 'code' and cell.source.startswith('#| slow'):
            return cell
        return await super().async_execute_cell(cell, cell_index, **kw)


def rows_of(part):
    "Texts of the rows of a table; a cell over several rows is written in the first of them"
    below = []
    for row in part('tr'):
        texts, cells = [], list(row(['th', 'td']))
        while cells or any(below[len(texts):]):
            column = len(texts)
            below += [0] * (column + 1 - len(below))
            if below[column]:
                below[column] -= 1
                texts.append('')
            else:
                cell = cells.pop(0)
                below[column] = int(cell.get('rowspan', 1)) - 1
                texts.append(markdown_text(cell.get_text(' ', strip=True)).replace(' ± ', '\u00a0±\u00a0'))
        yield texts


def heading(rows):
    "One line of names: pandas writes the name of the index below those of the columns"
    return [next(filter(None, names), '') for names in zip(*rows)]


NUMBER = re.compile(r'([-+−]?[\d,.]+(e[-+]?\d+)?%?(\s±\s[\d.]+)?|nan|NaN|-)?')


def markdown_table(html):
    "A table of pandas as Markdown, numbers to the right"
    table = BeautifulSoup(html, 'html.parser').table
    names, rows = heading(rows_of(table.thead)), list(rows_of(table.tbody))
    right = [all(map(NUMBER.fullmatch, column)) for column in zip(*rows)]
    lines = [names, ['--:' if r else ':--' for r in right], *rows]
    return '\n'.join(f'| {" | ".join(line)} |' for line in lines)


def presentable(outputs):
    "Without progress bars, warnings and widgets; the picture of an explorer stays, a table is Markdown"
    for o in outputs:
        if 'image/png' in o.get('data', {}): o.data.pop(WIDGET, None)
        if '<table' in o.get('data', {}).get('text/html', ''):
            o.data = nbformat.from_dict({'text/markdown': markdown_table(o.data['text/html'])})
    return [o for o in outputs if o.get('name') != 'stderr' and WIDGET not in o.get('data', {})]


def packed(png):
    "The same picture in 64 colours if the eye sees no difference, else in 256"
    picture, out = Image.open(BytesIO(b64decode(png))).convert('RGB'), BytesIO()
    for colours in (64, 256):
        small = picture.quantize(colours, dither=Image.Dither.NONE)
        difference = ImageChops.difference(picture, small.convert('RGB'))
        if max(ImageStat.Stat(difference).rms) < 2.5: break
    small.save(out, 'PNG', optimize=True)
    return b64encode(out.getvalue()).decode()


def pictures(cell):
    "The pictures of a cell that describes them, and nothing else"
    if not cell.source.startswith('#| fig-alt:'): return []
    kept = [o for o in cell.outputs if 'image/png' in o.get('data', {})]
    for o in kept: o.data = nbformat.from_dict({'image/png': packed(o.data['image/png'])})
    return kept


def run(file):
    "Execute one notebook in its folder and write it back"
    nb = nbformat.read(file, 4)
    Client(nb, timeout=1200, kernel_name='python3', resources={'metadata': {'path': str(Path(file).parent)}}).execute()
    cells = [cell for cell in nb.cells if cell.cell_type == 'code']
    is_reference = any('#| default_exp' in cell.source for cell in cells)
    for cell in cells:
        cell.outputs = presentable(cell.outputs)
        if is_reference: cell.outputs = pictures(cell)
    nb.metadata.pop('widgets', None)
    nbformat.write(nb, file)


if __name__ == '__main__':
    for name in sys.argv[1:]:
        needed = NEEDED.get(Path(name).name)
        if needed and needed not in os.environ:
            print(f'{name} stays as it is: {needed} is not set')
            continue
        run(name)
        print(name)
