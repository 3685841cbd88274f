"Run notebooks and keep their outputs: `python tests/outputs.py nbs/index.ipynb ...`. Progress bars and warnings on stderr are not kept."
import sys
from pathlib import Path

import nbformat
from nbclient import NotebookClient

WIDGET = 'application/vnd.jupyter.widget-view+json'


class Client(NotebookClient):
    "Leaves out cells that are marked slow"

    async def async_execute_cell(self, cell, cell_index, **kw):
        if cell.cell_type == 'code' and cell.source.startswith('#| slow'):
            return cell
        return await super().async_execute_cell(cell, cell_index, **kw)


def run(file):
    "Execute one notebook in its folder and write it back"
    nb = nbformat.read(file, 4)
    Client(nb, timeout=1200, kernel_name='python3', resources={'metadata': {'path': str(Path(file).parent)}}).execute()
    for cell in nb.cells:
        if cell.cell_type == 'code':
            for o in cell.outputs:
                if 'image/png' in o.get('data', {}): o.data.pop(WIDGET, None)  # an explorer: its picture stays
            cell.outputs = [o for o in cell.outputs if o.get('name') != 'stderr' and WIDGET not in o.get('data', {})]
    nb.metadata.pop('widgets', None)
    nbformat.write(nb, file)


if __name__ == '__main__':
    for name in sys.argv[1:]:
        run(name)
        print(name)
