"Run notebooks and keep their outputs, without progress bars and warnings: `python tests/outputs.py NOTEBOOK ...`"
import sys
from pathlib import Path

import nbformat
from nbclient import NotebookClient

WIDGET = 'application/vnd.jupyter.widget-view+json'


class Client(NotebookClient):
    "Leaves out cells that are marked slow"

    async def async_execute_cell(self, cell, cell_index, **kw):
        if cell.cell_type == 'code' and cell.source.startswith('#| slow'): return cell
        return await super().async_execute_cell(cell, cell_index, **kw)


def is_kept(output):
    "Neither on stderr nor a widget; the picture of an explorer is kept"
    data = output.get('data', {})
    if 'image/png' in data: data.pop(WIDGET, None)
    return output.get('name') != 'stderr' and WIDGET not in data


def run(file):
    "Execute one notebook in its folder and write it back"
    nb = nbformat.read(file, 4)
    folder = str(Path(file).parent)
    resources = {'metadata': {'path': folder}}
    Client(nb, timeout=1200, kernel_name='python3', resources=resources, coalesce_streams=True).execute()
    for cell in nb.cells:
        if cell.cell_type == 'code': cell.outputs = [o for o in cell.outputs if is_kept(o)]
    nb.metadata.pop('widgets', None)
    nbformat.write(nb, file)


if __name__ == '__main__':
    for name in sys.argv[1:]:
        run(name)
        print(name)
