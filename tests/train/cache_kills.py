"""Kill the computation of a feature cache, go on each time, and compare with one that was left alone

`python tests/train/cache_kills.py ../shared/real/coco_lt_mini/coco_lt_train.txt --root ../shared/real/coco_lt_mini`

The time of a computation is from the first look at the cache to its end. What the libraries take to load is left out.
On a busy machine the seconds of processors are the fairer figure.
"""
import argparse
import multiprocessing
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

import numpy as np
import psutil

PROCESSES = multiprocessing.get_context('forkserver') # imports the libraries once, for all processes
PROCESSES.set_forkserver_preload(['cprfl.train.cache', 'cprfl.model.backbones', 'timm', 'torchvision.transforms.v2'])


def compute(args, folder, started):
    "Compute the cache in `folder`; `started` gets the time of the first look at it"
    import torch

    from cprfl.data.dataset import from_list, resize
    from cprfl.model.backbones import build_backbone
    from cprfl.train.cache import cache_features
    multiprocessing.set_start_method('fork', force=True) # as in a process of one's own, where it is the default
    torch.manual_seed(0) # random weights, which are as fast as trained ones
    backbone = build_backbone(args.backbone)
    images = from_list(args.list, args.classes, args.root, transform=resize(args.size), check='none')
    started.put(time.perf_counter())
    cache_features(backbone, images.subset(range(min(args.images, len(images)))), folder, args.size, args.views,
                   args.batch, args.precision, args.workers)


def cpu_seconds(pid):
    "Processor time of a process and those that decode for it, or 0 if it has ended"
    try: processes = [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]
    except psutil.NoSuchProcess: return 0.
    total = 0.
    for process in processes:
        with suppress(psutil.NoSuchProcess): total += sum(process.cpu_times()[:2])
    return total


def kill(process):
    "Kill a process and those that decode for it, which do not see that it is gone"
    children = psutil.Process(process.pid).children(recursive=True)
    process.kill()
    for child in children:
        with suppress(psutil.NoSuchProcess): child.kill()


def start(args, folder, limit=float('inf')):
    "Compute in a process of its own, killed after `limit` seconds; its seconds, and those of processors"
    started = PROCESSES.Queue()
    process = PROCESSES.Process(target=compute, args=(args, folder, started))
    process.start()
    began = started.get(timeout=600)
    before = used = cpu_seconds(process.pid)
    while process.exitcode is None and time.perf_counter() - began < limit:
        process.join(0.1)
        used = max(used, cpu_seconds(process.pid))
    if process.exitcode is None: kill(process)
    process.join()
    return np.array([time.perf_counter() - began, used - before])


def read(folder):
    "The array of a cache, and how many files are unfinished"
    [file] = folder.glob('*.npy')
    return np.load(file, mmap_mode='r'), len(list(folder.glob('*.part')))


def measure(args, folder):
    "Seconds without kills, those of each part with them, and whether both gave the same bits"
    whole = start(args, folder / 'whole')
    cut = [start(args, folder / 'cut', 0.8 * whole[0] / (args.kills + 1)) for _ in range(args.kills)]
    if list((folder / 'cut').glob('*.npy')): raise RuntimeError('it ended before the last kill; compute more images')
    cut.append(start(args, folder / 'cut'))
    (a, _), (b, unfinished) = (read(folder / name) for name in ('whole', 'cut'))
    return whole, cut, np.array_equal(a, b) and not unfinished


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('list')
    parser.add_argument('--root')
    parser.add_argument('--classes', help='classes.txt beside the list when left out')
    parser.add_argument('--kills', type=int, default=3)
    parser.add_argument('--images', type=int, default=10**9, help='at most so many')
    parser.add_argument('--backbone', default='resnet50')
    parser.add_argument('--size', type=int, default=224)
    parser.add_argument('--views', type=int, default=1)
    parser.add_argument('--batch', type=int, default=64)
    parser.add_argument('--precision', default='bf16')
    parser.add_argument('--workers', type=int, default=2)
    args = parser.parse_args()
    args.classes = args.classes or Path(args.list).with_name('classes.txt')
    with tempfile.TemporaryDirectory() as folder: whole, cut, same = measure(args, Path(folder))
    for name, alone, parts in zip(('seconds', 'seconds of processors'), whole, np.transpose(cut)):
        said = ' + '.join(f'{seconds:.1f}' for seconds in parts)
        print(f'{name}: {alone:.1f} left alone, {said} = {parts.sum():.1f} killed {args.kills} times '
              f'({parts.sum() / alone - 1:+.1%})')
    print('the same bits' if same else 'OTHER BITS')
    sys.exit(not same)


if __name__ == '__main__': main()
