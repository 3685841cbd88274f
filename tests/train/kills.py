"Kill a training at random moments, resume it each time, and compare with one that was left alone: `python tests/kills.py --kills 25`"
import argparse
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import load_file

EPOCHS = 4


def train(folder, epochs=EPOCHS, save_steps=2):
    "A small CPRFL on Shapes-LT, with everything that has a state: dropout, augmentation, EMA, one-cycle, batch statistics, validation"
    from cprfl.data.shapes import shapes_lt
    from cprfl.model.backbones import build_backbone
    from cprfl.model.cprfl import CPRFL
    from cprfl.train.config import TrainConfig
    from cprfl.train.trainer import Trainer
    torch.set_num_threads(1)
    torch.manual_seed(0)
    backbone = build_backbone('resnet10t', channels=(8, 8, 16, 16))
    model = CPRFL(backbone, torch.randn(20, 12, generator=torch.Generator().manual_seed(0)), d=16, heads=2, head_dim=8, ffn_dim=16, dropout=0.2)
    config = TrainConfig(epochs=epochs, batch_size=16, lr=2e-3, ema=0.9, device='cpu', select='valid', augment='standard', save_steps=save_steps)
    Trainer(model, shapes_lt('train').subset(range(160)), config=config, folder=folder, progress=False).fit(resume=True)


def start(folder, limit=None):
    process = subprocess.Popen([sys.executable, __file__, '--train', str(folder)], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    try: return process, process.communicate(timeout=limit)[1]
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGKILL)
        return process, process.communicate()[1]


def newest(folder): return max((f.stem for f in (Path(folder) / 'state').glob('epoch_*.pt')), default='nothing')


def parts(folder): return len(list(Path(folder).rglob('*.part')))


def compare(a, b):
    "What differs between two runs' folders"
    differing = []
    for name in ('last', 'best', 'prompts'):
        x, y = (load_file(Path(f) / f'{name}.safetensors') for f in (a, b))
        if x.keys() != y.keys() or not all(torch.equal(x[k], y[k]) for k in x): differing.append(name)
    return differing


def kill_repeatedly(folder, kills, seed=0, report=print):
    "Train in `folder/cut`, killed so many times, and in `folder/whole`; returns what differs"
    rng, folder = random.Random(seed), Path(folder)
    began = time.perf_counter()
    _, said = start(folder / 'whole')
    took = time.perf_counter() - began
    assert (folder / 'whole' / 'last.safetensors').exists(), said
    done = tries = 0
    while done < kills: # a run that got through is begun again, so that every kill meets a training
        cut, tries = folder / f'cut{tries}', tries + 1
        while done < kills:
            process, said = start(cut, limit=rng.uniform(0.4, 1.0) * took)
            if process.returncode == 0: break
            assert process.returncode == -signal.SIGKILL, said
            done += 1
            report(f'kill {done:2}: resumes from {newest(cut):24} {parts(cut)} unfinished files')
        process, said = start(cut)
        assert process.returncode == 0, said
        if differing := compare(folder / 'whole', cut): return differing
        report(f'         {cut.name} reached the end: weights, best weights and prompts are equal bit for bit')
    return []


if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--kills', type=int, default=25)
    parser.add_argument('--seed', type=int, default=0)
    parser.add_argument('--train', help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.train: train(args.train)
    else:
        with tempfile.TemporaryDirectory() as folder:
            differing = kill_repeatedly(folder, args.kills, args.seed)
        print(f'{args.kills} kills:', f"these differ: {', '.join(differing)}" if differing else 'no difference to the run that was left alone')
        sys.exit(bool(differing))
