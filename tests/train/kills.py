"""Kill a training at every point at which it touches the disk, resume it, and compare with one that was left alone

`python tests/train/kills.py` tries all points of three trainings: with images, cached features and cached images.
"""
import argparse
import contextlib
import importlib
import json
import os
import signal
import sys
import tempfile
import time
import traceback
import warnings
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from PIL import Image
from safetensors.torch import load_file

from cprfl import files
from cprfl.runs.recipe import Recipe
from cprfl.runs.run import run_recipe
from cprfl.train.config import TrainConfig
from cprfl.train.rows import RowFile

KINDS = dict(images=dict(), features=dict(frozen=True, views=2), cached_images=dict(cache_images=True))
WARM = 'cprfl', 'torch', 'timm', 'accelerate', 'sklearn', 'scipy', 'pandas', 'pyarrow', 'huggingface_hub', 'PIL'
NOT_COMPARED = 'seconds' # the only column that differs between equal trainings


# ---- what is trained

def paint(folder):
    "A table of sixteen images in two classes"
    rng, lines = np.random.default_rng(0), ['path,labels']
    for i in range(16):
        Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(folder / f'{i:02}.png')
        lines.append(f"{i:02}.png,{'dog|cat' if i % 2 else 'dog'}")
    (folder / 'list.csv').write_text('\n'.join(lines))


def recipe_of(kind, images):
    "A small CPRFL with dropout, augmentation, average, schedule, batch statistics, selection and purity"
    learns = TrainConfig(epochs=2, batch_size=4, lr=2e-3, select='valid', valid_fraction=0.25, ema=0.9, save_steps=2,
                         augment='flip', device='cpu')
    settings = dict(
        name='run', benchmark=None, train_file=str(images / 'list.csv'), test_file=str(images / 'list.csv'),
        backbone='timm:resnet10t', backbone_args=dict(channels=(4, 4, 8, 8)), pretrained=False, image_size=32,
        semantics='random:8', model_args=dict(d=16, heads=2, head_dim=8, ffn_dim=16, dropout=0.2), alignment_images=4)
    return Recipe(**settings, train=learns).with_(**KINDS[kind])


# ---- where it may be killed

class Points:
    "Counts the places in which the disk is touched; at the one with the number `last` the process is killed"
    def __init__(self, folder, last=None):
        self.folder = str(folder)
        self.last = last
        self.names = []
        self.process = os.getpid()

    def __call__(self, name):
        if os.getpid() != self.process: return # a data loader's
        self.names.append(name)
        if len(self.names) - 1 == self.last: os.kill(os.getpid(), signal.SIGKILL)

    def around(self, name, call):
        "A function with a point before it and one after it"
        def with_points(*args, **kw):
            elsewhere = isinstance(args[0], str | Path) and not str(args[0]).startswith(self.folder)
            if elsewhere: return call(*args, **kw) # such as a library's temporary file
            self(f'before {name}')
            result = call(*args, **kw)
            self(f'after {name}')
            return result
        return with_points

    def writing(self, write_atomic):
        "`write_atomic`, with points at which its file is empty and half written"
        def with_points(path, write):
            def in_two_steps(part):
                self(f'before a write of {Path(path).name}')
                write(part)
                whole = Path(part).read_bytes()
                for share in (0, len(whole) // 2):
                    os.truncate(part, share)
                    self(f'{share} bytes of {Path(path).name}')
                Path(part).write_bytes(whole)
                self(f'after a write of {Path(path).name}')
            return write_atomic(path, in_two_steps)
        return with_points

    def install(self):
        "From now on"
        for name in ('replace', 'rename', 'unlink', 'remove', 'mkdir', 'rmdir', 'fsync', 'posix_fallocate'):
            if hasattr(os, name): setattr(os, name, self.around(name, getattr(os, name)))
        for name in ('_start_anew', '_claim', 'write'): # rows of a cache
            setattr(RowFile, name, self.around(f'{name} of rows', getattr(RowFile, name)))
        np.memmap.flush = self.around('flush', np.memmap.flush)
        plain, with_points = files.write_atomic, self.writing(files.write_atomic)
        for module in list(sys.modules.values()): # each that imported it
            if getattr(module, 'write_atomic', None) is plain: module.write_atomic = with_points


def train(kind, images, folder, last=None):
    "Train in a process of its own that is killed at a point; its status, and the points that it met"
    read, write = os.pipe()
    pid = os.fork()
    if not pid:
        try: _train(kind, images, folder, last, write)
        except BaseException: traceback.print_exc()
        os._exit(1)
    os.close(write)
    with os.fdopen(read) as f: said = json.loads(f.read() or '{}')
    _, status = os.waitpid(pid, 0)
    import_modules(said.get('modules', ()))
    return os.waitstatus_to_exitcode(status), said.get('points')


def import_modules(names):
    "What a process had to import, so that the next one has not to: it takes longer than the training"
    for name in names:
        if name in sys.modules or not name.startswith(WARM): continue
        with contextlib.suppress(Exception): importlib.import_module(name)


def _train(kind, images, folder, last, write):
    warnings.simplefilter('ignore')
    torch.set_num_threads(1)
    points = Points(folder, last)
    points.install()
    run_recipe(recipe_of(kind, images), folder, resume=True, progress=False)
    with os.fdopen(write, 'w') as f: json.dump(dict(points=points.names, modules=list(sys.modules)), f)
    os._exit(0)


# ---- what must be equal

def contents(folder):
    "What a run holds, without the seconds"
    run = Path(folder) / 'run'
    tensors = {name: load_file(run / f'{name}.safetensors') for name in ('last', 'best', 'prompts')}
    tables = dict(predictions=pd.read_parquet(run / 'predictions.parquet'))
    for name in ('metrics', 'purity'):
        table = files.csv_frame(run / f'{name}.csv')
        tables[name] = table.drop(columns=NOT_COMPARED, errors='ignore')
    return tensors, tables


def differences(a, b):
    "Names of what differs between two runs"
    (tensors, tables), (others, more) = contents(a), contents(b)
    def same(x, y): return x.keys() == y.keys() and all(torch.equal(x[k], y[k]) for k in x)
    differing = [name for name in tensors if not same(tensors[name], others[name])]
    return differing + [name for name in tables if not tables[name].equals(more[name])]


# ---- all points

def try_points(kind, folder, every=1, report=print):
    "Kill at every n-th point, and resume; the number of points that were tried, and what went wrong"
    folder = Path(folder)
    images = folder / 'images'
    if not images.exists():
        images.mkdir()
        paint(images)
    status, names = train(kind, images, folder / f'{kind}-whole')
    if status: raise RuntimeError(f'{kind}: a training that is left alone ends with {status}')
    tried, wrong = range(0, len(names), every), []
    for k in tried:
        cut = folder / f'{kind}-{k}'
        killed, _ = train(kind, images, cut, last=k)
        resumed, _ = train(kind, images, cut)
        if killed != -signal.SIGKILL: wrong.append(f'point {k} ({names[k]}): not met again')
        elif resumed: wrong.append(f'point {k} ({names[k]}): resuming ends with {resumed}')
        elif differing := differences(folder / f'{kind}-whole', cut):
            wrong.append(f'point {k} ({names[k]}): {", ".join(differing)} differ')
        elif left := list(cut.rglob('*.part')): wrong.append(f'point {k} ({names[k]}): left {left}')
    for line in wrong: report(line)
    return len(tried), wrong


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('kinds', nargs='*', default=list(KINDS))
    parser.add_argument('--every', type=int, default=1, help='only every n-th point')
    args, failed = parser.parse_args(), 0
    warnings.simplefilter('ignore')
    for kind in args.kinds:
        began = time.perf_counter()
        with tempfile.TemporaryDirectory() as folder: tried, wrong = try_points(kind, folder, args.every)
        failed += len(wrong)
        took = time.perf_counter() - began
        print(f'{kind}: {tried} points, {tried - len(wrong)} resumed and equal bit for bit ({took:.0f} s)', flush=True)
    sys.exit(bool(failed))


if __name__ == '__main__': main()
