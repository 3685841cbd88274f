"""Damaged and foreign files: each reader accepts them, or refuses them in a sentence that names the file

`python tests/fuzz.py --cases 2000` tries all kinds of files; `--only table --seed 17 --cases 1` tries one file again.
"""
import argparse
import io
import json
import os
import random
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path

import numpy as np
import torch
import yaml
from PIL import Image

LIMIT = 20 # seconds for one file

# ---- what is changed

NASTY = (
    None, True, False, -1, 0, 1, 2**63, 10**30, 0.5, 1e308, float('nan'), float('inf'),
    '', ' ', '0', '1', '-1', 'u', 'nan', '2026-11-26', '1e-3', '0x1F', '1_000', 'ü' * 300, 'x' * 5000,
    '../../x', '/etc/passwd', 'C:\\x', 'a\\b.png', '.', '..', '\0', '\n', '|', ',', ';', '"', "'", '[', '{',
    '=1+1', '@x', '\x1b[31mred', '$\\frac{', '<img src=x>', '&amp;', '\u202egnp.exe',
    '!!python/object/apply:os.system [ls]', '*a', '&a [*a]',
    [], {}, [[]], [{}], {'': ''}, {'a': [1, {'b': None}]}, [1, 'a', None])


def cut(rng, data, most=64):
    start = rng.randrange(len(data) + 1)
    return start, min(len(data), start + rng.randint(1, most))


def damage(rng, data):
    "Bytes with some of them flipped, lost, doubled, moved or replaced"
    data = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 4, 16))):
        start, end = cut(rng, data)
        kind = rng.randrange(7)
        if kind == 0 and data: data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        elif kind == 1: del data[start:end]
        elif kind == 2: data[start:start] = data[start:end]
        elif kind == 3: del data[start:]
        elif kind == 4: data[start:end] = rng.randbytes(end - start)
        elif kind == 5: data[start:start] = str(rng.choice(NASTY)).encode()
        else: data[start:end] = bytes((rng.choice((0, 255, 127, 10, 32)),)) * (end - start)
    return bytes(data)


def places(value, at=()):
    "The paths of all values in lists and dictionaries"
    yield at
    if isinstance(value, dict): inner = list(value.items())
    elif isinstance(value, list): inner = list(enumerate(value))
    else: return
    for key, part in inner: yield from places(part, (*at, key))


def change(rng, value):
    "Data with some values replaced, removed, renamed or doubled"
    value = json.loads(json.dumps(value))
    for _ in range(rng.choice((1, 1, 2, 4))):
        *way, last = rng.choice(list(places(value))) or (None,)
        if last is None: return rng.choice(NASTY)
        parent = value
        for key in way: parent = parent[key]
        kind = rng.randrange(5)
        if kind == 0: parent.pop(last)
        elif kind == 1 and isinstance(parent, dict): parent[str(rng.choice(NASTY))] = parent.pop(last)
        elif kind == 1: parent.append(parent[last])
        else: parent[last] = rng.choice(NASTY)
    return value


def change_cells(rng, text, separators=',;\t |'):
    "A table with some cells, lines or separators changed"
    lines = text.split('\n')
    for _ in range(rng.choice((1, 1, 2, 4))):
        i = rng.randrange(len(lines))
        separator = rng.choice(separators)
        cells = lines[i].split(separator)
        kind = rng.randrange(6)
        if kind == 0: del lines[i]
        elif kind == 1: lines.insert(i, lines[i])
        elif kind == 2: cells.pop(rng.randrange(len(cells)))
        elif kind == 3: cells.insert(rng.randrange(len(cells) + 1), str(rng.choice(NASTY)))
        elif kind == 4: cells[rng.randrange(len(cells))] = str(rng.choice(NASTY))
        else: lines = [line.replace(separator, rng.choice(separators)) for line in lines]
        if kind in (2, 3, 4): lines[i] = separator.join(cells)
        lines = lines or ['']
    return '\n'.join(lines)


def text_bytes(rng, text):
    "Text in one of the encodings that people have, sometimes damaged"
    data = text.encode(rng.choice(('utf-8', 'utf-8', 'utf-8', 'utf-8-sig', 'utf-16', 'cp1252')), errors='replace')
    return damage(rng, data) if rng.random() < 0.3 else data


# ---- what is watched

class Watch:
    "Records what is written outside of a folder, started or connected to"
    def __init__(self):
        self.folder, self.seen = None, []
        sys.addaudithook(self.hook)

    def hook(self, event, args):
        if self.folder is None: return
        if event == 'open': self.written(args[0], args[1], args[2])
        elif event in ('os.rename', 'os.remove', 'os.mkdir', 'os.rmdir', 'os.symlink', 'os.link', 'shutil.rmtree'):
            for path in args[:2]:
                if isinstance(path, (str, bytes, os.PathLike)): self.outside(path, event)
        elif event in ('subprocess.Popen', 'os.system', 'os.exec', 'socket.connect', 'socket.getaddrinfo'):
            self.seen.append(f'{event} {args[0]!r}')

    def written(self, path, mode, flags):
        writes = flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT) if mode is None else set(mode) & set('wax+')
        if writes and not isinstance(path, int): self.outside(path, 'open')

    def outside(self, path, event):
        path = os.path.abspath(os.fsdecode(path))
        allowed = (str(self.folder), '/dev/null', '/dev/shm')
        if not path.startswith(allowed) and '__pycache__' not in path: self.seen.append(f'{event} {path}')

    @contextmanager
    def over(self, folder):
        self.folder, self.seen = folder, []
        try: yield self.seen
        finally: self.folder = None


class TooLong(BaseException): pass


@contextmanager
def within(seconds):
    def stop(*_): raise TooLong
    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try: yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


# ---- kinds of files: each writes a changed file and reads it; what it returns must be named if it is refused

def picture(rng=None, size=(24, 16), mode='RGB'):
    rng = rng or np.random.default_rng(0)
    high, channels = (2**16, 1) if mode == 'I;16' else (256, len(mode))
    pixels = rng.integers(0, high, (size[1], size[0], channels), dtype=np.uint16 if high > 256 else np.uint8)
    return Image.fromarray(pixels[..., 0] if channels == 1 or high > 256 else pixels)


def with_images(folder):
    for name in ('a.jpg', 'b.jpg', 'sub/c.png', 'd e.jpg'):
        (folder / name).parent.mkdir(exist_ok=True)
        picture().save(folder / name)
    (folder / 'classes.txt').write_text('cat\ndog\nhot dog\n')


CLASS_FILES = (
    'cat\ndog\nhot dog\n', 'cat 0\ndog 1\nhot dog 2\n', '0 cat\n1 dog\n2 hot dog\n', '0: cat\n1: dog\n',
    'id,name\n0,cat\n1,dog\n', '["cat", "dog"]', '{"0": "cat", "1": "dog"}', '"cat"\n"dog"\n', 'class 0\nclass 1\n')


def classes(rng, folder):
    from cprfl.data.readers import read_classes
    file = folder / rng.choice(('names.txt', 'names.csv', 'names.json', 'obj.names'))
    file.write_bytes(text_bytes(rng, change_cells(rng, rng.choice(CLASS_FILES), ' ,:\n')))
    return file, lambda: read_classes(file)


LISTS = 'a.jpg 0 2\nb.jpg 1\nsub/c.png\n', 'a.jpg\t0\nd e.jpg 1\n', 'sub\\c.png 0\r\na.jpg 1\r\n'


def lists(rng, folder):
    from cprfl.data.dataset import from_list
    file = folder / 'list.txt'
    file.write_bytes(text_bytes(rng, change_cells(rng, rng.choice(LISTS), ' \t')))
    options = dict(skip_bad=rng.random() < 0.5, workers=1)
    return file, lambda: from_list(file, folder / 'classes.txt', **options)


TABLES = (
    'path,labels\na.jpg,cat|dog\nb.jpg,\nsub/c.png,hot dog\n',
    'image;labels\na.jpg;cat,dog\nb.jpg;dog\n',
    'filename\tcat\tdog\na.jpg\t1\t0\nb.jpg\t0\t1\n',
    'path,cat,dog,is_valid\na.jpg,1,,True\nb.jpg,-1,1,False\n',
    '"path","labels"\n"a.jpg","[\'cat\', \'dog\']"\n"b.jpg","[]"\n',
    'path,label\na.jpg,cat\na.jpg,dog\nb.jpg,cat\n',
    'Image Index,Finding Labels,Patient ID\na.jpg,Mass|Nodule,1\nb.jpg,No Finding,2\n',
    ',path,labels\n0,a.jpg,"[1, 0]"\n1,b.jpg,"[0, 1]"\n')


def tables(rng, folder):
    from cprfl.data.dataset import from_csv
    file = folder / rng.choice(('t.csv', 't.tsv', 'T.CSV'))
    file.write_bytes(text_bytes(rng, change_cells(rng, rng.choice(TABLES))))
    options = dict(skip_bad=rng.random() < 0.5, workers=1)
    if rng.random() < 0.3: options['classes'] = ['cat', 'dog']
    if rng.random() < 0.3: options['unknown'] = rng.choice(('negative', 'ignore', 'positive'))
    return file, lambda: from_csv(file, **options)


COCO = dict(
    images=[dict(id=7, file_name='a.jpg', width=24, height=16), dict(id=9, file_name='b.jpg', width=24, height=16)],
    annotations=[dict(id=1, image_id=7, category_id=18, bbox=[1, 2, 10, 8], iscrowd=0),
                 dict(id=2, image_id=9, category_id=3)],
    categories=[dict(id=18, name='dog'), dict(id=3, name='cat')])


def coco(rng, folder):
    from cprfl.data.dataset import from_coco
    file = folder / 'coco.json'
    file.write_bytes(text_bytes(rng, json.dumps(change(rng, COCO))))
    options = dict(skip_bad=rng.random() < 0.5, workers=1)
    return file, lambda: from_coco(file, **options)


VOC = """<annotation><filename>a.jpg</filename><size><width>24</width><height>16</height><depth>3</depth></size>
<object><name>cat</name><difficult>0</difficult>
<bndbox><xmin>1</xmin><ymin>2</ymin><xmax>9</xmax><ymax>8</ymax></bndbox>
</object><object><name>dog</name><bndbox><xmin>3</xmin><ymin>1</ymin><xmax>20</xmax><ymax>15</ymax></bndbox></object>
</annotation>
"""


def voc(rng, folder):
    from cprfl.data.dataset import from_voc
    file = folder / 'xml' / 'a.xml'
    file.parent.mkdir(exist_ok=True)
    file.write_bytes(text_bytes(rng, change_cells(rng, VOC, '<>/\n')))
    file.with_name('b.xml').write_text(VOC.replace('a.jpg', 'b.jpg'))
    return file, lambda: from_voc(file.parent, root=folder, workers=1)


def recipes(rng, folder):
    from cprfl.runs.recipe import Recipe
    settings = dict(base='frozen-cprfl', name='mine', epochs=3, lr=1e-3, loss='db_focal', loss_args=dict(map_gamma=0.2),
                    model_args=dict(d=8, heads=2), image_size=32, train_file='list.txt', seed=1)
    file = folder / 'recipe.yaml'
    file.write_bytes(text_bytes(rng, yaml.safe_dump(change(rng, settings))))
    return file, lambda: Recipe.from_yaml(file)


def protocols(rng, folder):
    from cprfl.runs.tables import all_rows, get_protocol
    settings = dict(
        title='mine', recipe=dict(base='frozen-cprfl', epochs=3), sources=dict(clip='random:16', words='words'),
        linear=dict(lr=1e-3), loss_args=dict(db_focal=dict(map_gamma=0.2)), inputs={'64 px': dict(image_size=64)})
    file = folder / 'protocol.yaml'
    file.write_bytes(text_bytes(rng, yaml.safe_dump(change(rng, settings))))
    return file, lambda: all_rows(get_protocol(str(file)))


def with_run(folder):
    "The folder of a small finished run"
    from cprfl.runs.recipe import get_recipe
    from cprfl.runs.run import run_recipe
    head = dict(d=8, heads=2, head_dim=4, ffn_dim=8)
    recipe = get_recipe('shapes-cprfl').with_(
        name='run', image_size=32, epochs=1, batch_size=500, model_args=head, alignment_images=20, precision='fp32')
    with redirect_stdout(io.StringIO()): run_recipe(recipe, folder, progress=False)


def in_run(rng, folder, name, change):
    "A file of the run, changed; the run's folder"
    run = folder / 'run'
    (run / name).write_bytes(change(rng, whole(folder, name)))
    return run


WHOLE: dict = {}


def whole(folder, name):
    "A file of the run as it was at first; all files are put back"
    files = WHOLE.setdefault(folder, {f: f.read_bytes() for f in (folder / 'run').rglob('*') if f.is_file()})
    for file, data in files.items():
        if not file.exists() or file.read_bytes() != data: file.write_bytes(data)
    return files[folder / 'run' / name]


def changed_json(rng, data):
    return text_bytes(rng, json.dumps(change(rng, json.loads(data))))


def configs(rng, folder):
    from cprfl.runs.run import Run
    run = in_run(rng, folder, 'config.json', changed_json)
    return run / 'config.json', lambda: repr(Run(run))


def reports(rng, folder):
    from cprfl.look.monitor import TrainingMonitor
    from cprfl.runs.report import results_table, summarise
    from cprfl.runs.run import Run
    name = rng.choice(('report.json', 'train_config.json', 'metrics.csv', 'purity.csv'))
    if name.endswith('json'): run = in_run(rng, folder, name, changed_json)
    else: run = in_run(rng, folder, name, lambda rng, data: text_bytes(rng, change_cells(rng, data.decode())))

    def read():
        monitor = TrainingMonitor(run)
        monitor.caption()
        monitor.figure()
        if name == 'report.json': summarise(results_table([Run(run)]))
        if name == 'metrics.csv': len(Run(run).metrics)
    return run / name, read


def weights(rng, folder):
    from cprfl.runs.run import Run
    name = rng.choice(('best.safetensors', 'last.safetensors'))
    run = in_run(rng, folder, name, damage)
    return run / name, lambda: Run(run).model(name.split('.')[0])


def prompts(rng, folder):
    from cprfl.runs.run import Run
    run = in_run(rng, folder, 'prompts.safetensors', damage)
    return run / 'prompts.safetensors', lambda: Run(run).prompts


def states(rng, folder):
    from cprfl.train.checkpoint import read_state
    file = next((folder / 'run' / 'state').iterdir())
    in_run(rng, folder, f'state/{file.name}', damage)
    return file, lambda: read_state(file)


def predictions(rng, folder):
    from cprfl.runs.run import Run
    run = in_run(rng, folder, 'predictions.parquet', damage)
    return run / 'predictions.parquet', lambda: Run(run).predictions


FORMATS = (
    ('JPEG', 'RGB'), ('PNG', 'RGB'), ('PNG', 'I;16'), ('PNG', 'RGBA'), ('TIFF', 'RGB'), ('TIFF', 'I;16'),
    ('BMP', 'RGB'), ('WEBP', 'RGB'), ('GIF', 'L'),
    ('JPEG2000', 'RGB'), ('PPM', 'RGB'), ('EPS', 'RGB'), ('ICNS', 'RGBA'), ('PCX', 'L')) # to be refused


def images(rng, folder):
    from cprfl.data.images import image_problem, open_image
    kind, mode = rng.choice(FORMATS)
    data = io.BytesIO()
    picture(np.random.default_rng(rng.randrange(100)), mode=mode).save(data, kind)
    file = folder / f'x{rng.choice((".jpg", ".png", ".tif", ".gif", ".webp", ""))}'
    file.write_bytes(damage(rng, data.getvalue()))
    def read():
        problem = image_problem(file, rng.choice(('headers', 'full')))
        if problem is not None: assert isinstance(problem, str)
        assert open_image(file).mode == 'RGB'
    return file, read


LISTS_AND_FILES = dict(
    classes=classes, list=lists, table=tables, coco=coco, voc=voc, image=images, recipe=recipes, protocol=protocols)
RUNS = dict(config=configs, report=reports, weights=weights, prompts=prompts, state=states, parquet=predictions)
KINDS = {name: (change, with_images) for name, change in LISTS_AND_FILES.items()}
KINDS |= {name: (change, with_run) for name, change in RUNS.items()}

REFUSALS = ValueError, OSError, RuntimeError # what a command says in one sentence
WATCH = Watch()


def fault(kind, seed, folder):
    "What is wrong with how a changed file is read; None if it is accepted, '' if it is refused as it should be"
    rng = random.Random(f'{kind} {seed}')
    file, read = KINDS[kind][0](rng, folder)
    said = io.StringIO()
    try:
        with WATCH.over(folder) as seen, within(LIMIT), warnings.catch_warnings():
            warnings.simplefilter('ignore')
            with redirect_stdout(said), redirect_stderr(said): read()
        found = None
    except TooLong: return f'no answer within {LIMIT} s'
    except REFUSALS as e:
        found = ''
        if file.name not in str(e): found = f'{type(e).__name__} without the file: {e}'
        if 'Traceback' in str(e): found = f'a traceback: {e}'
    except BaseException as e: found = f'{type(e).__name__}: {e}\n{traceback.format_exc(limit=-3)}'
    return f'outside of its folder: {seen}' if seen else found


def draw_once():
    "Matplotlib makes folders of its own when it is first used"
    from cprfl.look.explorer import new_figure
    new_figure(50, 50).canvas.draw()


def attempt(kind, cases, folder, seed=0, show=print):
    "Read so many changed files; how many were accepted and refused, and the faults by seed"
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    KINDS[kind][1](folder)
    draw_once()
    counts, faults = Counter(), {}
    for i in range(seed, seed + cases):
        found = fault(kind, i, folder)
        counts['accepted' if found is None else 'faults' if found else 'refused'] += 1
        if found: faults[i] = found
    return counts, faults


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--cases', type=int, default=2000, help='changed files of each kind')
    parser.add_argument('--seed', type=int, default=0, help='of the first file')
    parser.add_argument('--only', help='kinds, with commas between: ' + ', '.join(KINDS))
    parser.add_argument('--show', type=int, default=5, help='faults that are printed in full, of each kind')
    o = parser.parse_args()
    torch.set_num_threads(1)
    total = 0
    for kind in o.only.split(',') if o.only else KINDS:
        began = time.perf_counter()
        with tempfile.TemporaryDirectory() as folder: counts, faults = attempt(kind, o.cases, folder, o.seed)
        took = time.perf_counter() - began
        said = ', '.join(f'{counts[what]} {what}' for what in ('accepted', 'refused', 'faults'))
        print(f'{kind}: {said}, {took:.0f} s', flush=True)
        for seed, found in list(faults.items())[:o.show]:
            print(f'  --only {kind} --seed {seed} --cases 1: {found[:1500]}')
        total += len(faults)
    sys.exit(1 if total else 0)


if __name__ == '__main__': main()
