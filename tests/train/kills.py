"""Kill a training at random moments, resume it each time, and compare with one that was left alone

`python tests/train/kills.py --kills 25`
"""
import argparse
import multiprocessing
import random
import signal
import sys
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import load_file

PROCESSES = multiprocessing.get_context('forkserver') # imports the libraries once, for all processes
PROCESSES.set_forkserver_preload(['cprfl.train.trainer', 'cprfl.model.cprfl', 'cprfl.data.shapes'])


def train(folder):
    "A small CPRFL with dropout, augmentation, average, schedule, batch statistics and selection"
    from toys import build, picture_model

    from cprfl.data.shapes import shapes_lt
    torch.set_num_threads(1)
    settings = dict(epochs=4, lr=2e-3, select='valid', augment='standard', save_steps=2)
    build(picture_model(), shapes_lt('train').subset(range(96)), folder=folder, **settings).fit(resume=True)


def import_libraries():
    "Start a first process, which takes longer than others"
    process = PROCESSES.Process(target=time.sleep, args=(0,))
    process.start()
    process.join()


def start(folder, limit=None):
    "Train in a process of its own, killed after `limit` seconds; its exit status and how long it took"
    began = time.perf_counter()
    process = PROCESSES.Process(target=train, args=(folder,))
    process.start()
    process.join(limit)
    if process.exitcode is None: process.kill()
    process.join()
    if process.exitcode not in (0, -signal.SIGKILL):
        raise RuntimeError(f'a training in {folder} ended with status {process.exitcode}')
    return process.exitcode, time.perf_counter() - began


def newest(folder): return max((f.stem for f in (folder / 'state').glob('epoch_*.pt')), default='nothing')


def parts(folder): return len(list(folder.rglob('*.part')))


def compare(a, b):
    "What differs between two runs' folders"
    differing = []
    for name in ('last', 'best', 'prompts'):
        x, y = (load_file(folder / f'{name}.safetensors') for folder in (a, b))
        if x.keys() != y.keys() or not all(torch.equal(x[k], y[k]) for k in x): differing.append(name)
    return differing


def kill_repeatedly(folder, kills, seed=0, report=print):
    "Train in `folder/whole`, and with so many kills in `folder/cut0` and others; returns what differs"
    rng, folder = random.Random(seed), Path(folder)
    import_libraries()
    _, took = start(folder / 'whole')
    done = tries = 0
    while done < kills: # after a run that reached its end comes another, so that every kill hits a training
        cut = folder / f'cut{tries}'
        tries += 1
        done += kill_until_it_ends(cut, kills - done, lambda: rng.uniform(0.1, 1.0) * took, report)
        if differing := compare(folder / 'whole', cut): return differing
        report(f'{cut.name} reached the end: weights, best weights and prompts are equal bit for bit')
    return []


def kill_until_it_ends(folder, most, moment, report):
    "Train until the end, killed after `moment()` seconds at most so many times; the number of kills"
    for kills in range(most):
        status, _ = start(folder, limit=moment())
        if status == 0: return kills
        report(f'kill in {folder.name}: resumes from {newest(folder):24} {parts(folder)} unfinished files')
    start(folder)
    return most


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--kills', type=int, default=25)
    parser.add_argument('--seed', type=int, default=0)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder: differing = kill_repeatedly(folder, args.kills, args.seed)
    print(f'{args.kills} kills, and these differ from the run that was left alone:', ', '.join(differing) or 'none')
    sys.exit(bool(differing))


if __name__ == '__main__': main()
