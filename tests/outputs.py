"Run notebooks and keep their outputs: `python tests/outputs.py nbs/index.ipynb ...`; of reference pages, the pictures"
import os
import sys
from base64 import b64decode, b64encode
from io import BytesIO
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from PIL import Image, ImageChops, ImageStat

NEEDED = {'top3_photos.ipynb': 'CPRFL_PHOTO_RUNS'} # runs that are not made here: without them the page stays as it is
WIDGET = 'application/vnd.jupyter.widget-view+json'


class Client(NotebookClient):
    "Leaves out cells that are marked slow"

    async def async_execute_cell(self, cell, cell_index, **kw):
        if cell.cell_type == 'code' and cell.source.startswith('#| slow'):
            return cell
        return await super().async_execute_cell(cell, cell_index, **kw)


def presentable(outputs):
    "Without progress bars, warnings and widgets; the picture of an explorer stays"
    for o in outputs:
        if 'image/png' in o.get('data', {}): o.data.pop(WIDGET, None)
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
