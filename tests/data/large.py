"""Tables of 100,000 rows with the headers of real data sets: seconds and memory to read each

`python tests/data/large.py` reads every one in a process of its own. The images need not exist.
"""
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import table_samples as samples

ROWS = 100_000
TABLES = {
    'NIH ChestX-ray14': (samples.NIH, {}),
    'CheXpert': (samples.CHEXPERT, dict(unknown='ignore')),
    'Plant Pathology': (samples.PLANT, {}),
    'HPA': (samples.HPA, dict(image_suffix='_green.png')),
    'Planet': (samples.PLANET, dict(image_suffix='.jpg')),
    'Open Images': (samples.OPEN_IMAGES, dict(image_suffix='.jpg'))}


def enlarged(lines):
    "The header, and its rows again and again, each time with other names of images"
    header, *rows = lines
    out = [header]
    while len(out) <= ROWS:
        for row in rows: out.append(_renamed(row, len(out) // len(rows)))
    return '\n'.join(out[:ROWS + 1]) + '\n'


def _renamed(row, round):
    "The first cell is the image; its name gets a number in front of its suffix"
    image, rest = row.split(',', 1)
    stem, dot, suffix = image.rpartition('.')
    return f'{stem or suffix}_{round}{dot}{suffix if dot else ""},{rest}'


def read(name):
    "Read one table and print what it took"
    from cprfl.data import from_csv
    lines, options = TABLES[name]
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / 'table.csv'
        file.write_text(enlarged(lines))
        began, used = time.perf_counter(), time.process_time()
        dataset = from_csv(file, check='none', **options)
        seconds, processor = time.perf_counter() - began, time.process_time() - used
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(f'{name:18} {len(dataset):8,} images {len(dataset.classes):4} classes {seconds:6.1f} s '
          f'({processor:.1f} s of processor time) {memory:6.0f} MB')


if __name__ == '__main__':
    if sys.argv[1:]: read(sys.argv[1])
    else:
        for name in TABLES: subprocess.run([sys.executable, __file__, name], check=True)
