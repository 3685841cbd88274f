"The command line from end to end, on forty small pictures"
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file

import cprfl.runs.run
from cprfl import cli
from cprfl.runs.recipe import RECIPES, _read_splits
from cprfl.runs.run import Run
from cprfl.train.callbacks import EarlyStopping

BIN = Path(sys.executable).parent
CLASSES = ['cat', 'dining table', 'dog']
TINY = '--semantics random:16 --d 16 --heads 2 --head-dim 8 --ffn-dim 16 --epochs 1 --image-size 64 --precision fp32 --batch-size 16 --seed 0'.split()


@pytest.fixture(scope='module')
def data(tmp_path_factory):
    "Pictures whose channels tell their classes; train.txt, test.txt, classes.txt, the same as CSV and folders, and weights for the backbone"
    root, rng = tmp_path_factory.mktemp('data'), np.random.default_rng(0)
    lines = []
    for i in range(40):
        labels = [c for c in range(3) if rng.random() < (0.7, 0.4, 0.3)[c]]
        pixels = rng.integers(0, 120, (40, 48, 3)) + 130 * np.isin(np.arange(3), labels)
        folder = root / 'by_class' / CLASSES[labels[0] if labels else 0]
        for file in (root / f'{i:02d}.png', folder / f'{i:02d}.png'):
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels.astype(np.uint8)).save(file)
        lines.append([f'{i:02d}.png', *map(str, labels)])
    for name, part in (('train.txt', lines[:28]), ('test.txt', lines[28:])): (root / name).write_text('\n'.join(map(' '.join, part)) + '\n')
    (root / 'classes.txt').write_text('cat 0\ndining table 1\ndog 2\n')
    (root / 'train.csv').write_text('path,labels\n' + ''.join(f"{p},{'|'.join(CLASSES[int(i)] for i in ids)}\n" for p, *ids in lines[:28]))
    torch.manual_seed(0)
    torch.save(timm.create_model('test_resnet').state_dict(), root / 'test_resnet.pth')
    return root


def lists(data): return ['--list', data / 'train.txt', '--test-list', data / 'test.txt']


def tuned(data): return ['--recipe', 'shapes-cprfl', '--backbone', 'test_resnet', *TINY, *lists(data)]


def frozen(data): return ['--backbone', 'test_resnet', '--weights', data / 'test_resnet.pth', '--views', 2, *TINY, *lists(data)]


@pytest.fixture
def shell(capfd):
    def call(command, *args):
        "Exit code, and what was printed"
        capfd.readouterr()
        code = 0
        try: command([str(a) for a in args])
        except SystemExit as e: code = e.code
        out = capfd.readouterr()
        return code, out.out, out.err
    return call


def good(result):
    code, out, err = result
    assert code == 0, err[-2000:]
    return out


def bad(result, code=2):
    assert result[0] == code, result
    assert 'Traceback' not in result[2]
    return result[2]


# ---- from a list file to a prediction

@pytest.mark.parametrize('recipe', [tuned, frozen], ids=['fine-tuned', 'frozen'])
def test_train_evaluate_predict(shell, data, tmp_path, recipe):
    out = good(shell(cli.train, *recipe(data), '--name', 'tiny', '--out', tmp_path))
    assert 'mAP in percent' in out and 'total' in out and f"\nrun: {tmp_path / 'tiny'}\nnext: cprfl_predict" in out
    files = {p.relative_to(tmp_path / 'tiny').as_posix() for p in (tmp_path / 'tiny').rglob('*') if p.is_file()}
    last = {'last.safetensors'} if recipe is tuned else {'last.safetensors', 'best.safetensors'}
    assert files >= {'config.json', 'train_config.json', 'metrics.csv', 'prompts.safetensors', 'report.json', 'predictions.parquet', 'state/epoch_0001.pt'} | last
    assert not [f for f in files if f.endswith('.part')]

    run = Run(tmp_path / 'tiny')
    assert run.classes == CLASSES and run.recipe.train_file == str(data / 'train.txt') and run.num_train == 28 and run.prompts[1].shape == (3, 16)
    assert list(run.predictions.columns) == ['path', *CLASSES] and len(run.predictions) == 12 and list(run.predictions.path)[0] == '28.png'
    backbone = [k for k in load_file(tmp_path / 'tiny' / 'last.safetensors') if k.startswith('backbone.')]
    assert bool(backbone) == (recipe is tuned)

    out = good(shell(cli.evaluate, tmp_path / 'tiny'))
    total = float(re.search(r'total\D+([\d.]+)', out)[1])
    assert total == pytest.approx(100 * run.report['total'], abs=1.5), 'features are float16 where they are cached'
    assert f"run: {tmp_path / 'tiny'}" in out

    pictures = [data / '28.png', data / '30.png']
    out = good(shell(cli.predict, tmp_path / 'tiny', *pictures))
    assert all(str(p) in out for p in pictures)
    rows = re.findall(r'^ +([01]\.\d{3})  (cat|dining table|dog)  \((head|medium|tail)\)$', out, re.M)
    assert len(rows) == 6 and {r[1] for r in rows[:3]} == set(CLASSES)
    scores = [float(r[0]) for r in rows]
    assert scores[:3] == sorted(scores[:3], reverse=True)
    logits = run.predictions.set_index('path').loc['28.png']
    assert scores[0] == pytest.approx(1 / (1 + np.exp(-logits.max())), abs=0.015) and rows[0][1] == logits.astype(float).idxmax()
    assert len(re.findall(r'\d\.\d{3}', good(shell(cli.predict, tmp_path / 'tiny', pictures[0], '--k', 1)))) == 1


def test_a_second_frozen_run_uses_the_cache(shell, data, tmp_path):
    good(shell(cli.train, *frozen(data), '--name', 'a', '--out', tmp_path))
    caches = {p.name: p.stat().st_mtime_ns for p in (tmp_path / 'cache').iterdir() if p.suffix != '.lock'}
    assert len(caches) == 2 and all(n.endswith('.npy') for n in caches), 'one for training, one for testing'
    good(shell(cli.train, *frozen(data), '--name', 'b', '--out', tmp_path, '--model', 'cprfl', '--lr', '1e-3'))
    assert {p.name: p.stat().st_mtime_ns for p in (tmp_path / 'cache').iterdir() if p.suffix != '.lock'} == caches


def test_console_script_in_a_process_of_its_own(data, tmp_path):
    env = os.environ | {'OMP_NUM_THREADS': '1'}
    done = subprocess.run([BIN / 'cprfl_train', *map(str, tuned(data)), '--name', 'own', '--out', tmp_path, '--model', 'erm'],
                          capture_output=True, text=True, env=env)
    assert done.returncode == 2 and '--d, --heads, --head-dim, --ffn-dim: these are for --model cprfl only' in done.stderr and not list(tmp_path.iterdir())
    kept = '--recipe shapes-erm --backbone test_resnet --epochs 1 --image-size 64 --precision fp32 --name own'.split()
    done = subprocess.run([BIN / 'cprfl_train', *kept, *map(str, lists(data)), '--out', tmp_path], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr[-2000:]
    assert 'mAP in percent' in done.stdout and 'train: 100%' in done.stderr


def test_csv_and_class_folders_without_a_test_set(shell, data, tmp_path):
    kw = '--recipe shapes-erm --backbone test_resnet --epochs 1 --image-size 64 --precision fp32'.split()
    for name, source, images in (('csv', data / 'train.csv', 28), ('folders', data / 'by_class', 40)):
        out = good(shell(cli.train, *kw, '--list', source, '--out', tmp_path, '--name', name))
        assert 'no test images were given' in out and Run(tmp_path / name).num_train == images and Run(tmp_path / name).classes == CLASSES
    assert 'has no test set of its own; give one with --list' in bad(shell(cli.evaluate, tmp_path / 'csv'))
    assert 'total' in good(shell(cli.evaluate, tmp_path / 'csv', '--list', data / 'test.txt'))


# ---- options arrive

def test_zero_is_a_value_and_other_backbones_bring_no_arguments_along(shell, data, tmp_path):
    good(shell(cli.train, *tuned(data), '--ema', 0, '--dropout', 0, '--weight-decay', 0, '--name', 'zero', '--out', tmp_path))
    recipe = Run(tmp_path / 'zero').recipe
    assert recipe.train.ema == 0 and recipe.model_args['dropout'] == 0 and recipe.train.weight_decay == 0 and recipe.train.seed == 0
    assert recipe.backbone_args == {} and recipe.image_size == 64 and recipe.train.batch_size == 16 and recipe.model_args['head_dim'] == 8


@pytest.mark.parametrize('dashes', ['--image-size', '--image_size'])
def test_dashes_and_underscores(shell, data, tmp_path, dashes):
    assert 'no such file' in bad(shell(cli.train, *tuned(data), dashes, 32, '--weights', tmp_path / 'none.pth', '--out', tmp_path))


def test_list_of_recipes(shell):
    out = good(shell(cli.train, '--recipe', 'list'))
    assert all(name in out and recipe.about in out for name, recipe in RECIPES.items())


@pytest.mark.parametrize('command, words', [
    ('cprfl_demo', ['--seeds', '--epochs', '--out']), ('cprfl_prepare', ['voc-lt or coco-lt', '--root', '--lists', '--images', '--offline']),
    ('cprfl_train', ['--recipe', '--list', '--test', '--skip', '--frozen', '--semantics', '--backbone', '--weights', '--resume', '--select', 'clip:ARCH/TAG']),
    ('cprfl_evaluate', ['--list', "a run's folder"]), ('cprfl_predict', ['images', '--k', 'image files'])])
def test_help_reads_well(command, words):
    done = subprocess.run([BIN / command, '--help'], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.startswith(f'usage: {command}') and not done.stderr
    assert all(w in done.stdout for w in words), done.stdout
    options = re.findall(r'^  (--[\w-]+)(?: [A-Z_]+)?(.*)', done.stdout.split('options:')[1], re.M)
    assert options and not [o for o, text in options if o == '--xtra' or o == '--pdb']


# ---- bad input

def broken_list(data, folder):
    "Five good rows, and one of each kind of bad ones"
    file = folder / 'broken.txt'
    good_rows = (data / 'train.txt').read_text().splitlines()[:12]
    file.write_text('\n'.join(good_rows + ['nowhere.png 0', '13.png 3', '14.png 1 1', '../15.png 0', '', good_rows[0]]) + '\n')
    return file


def test_a_bad_list_stops_before_training_with_all_problems(shell, data, tmp_path):
    file = broken_list(data, tmp_path)
    args = ['--recipe', 'shapes-cprfl', '--backbone', 'test_resnet', *TINY, '--list', file, '--root', data, '--classes', data / 'classes.txt', '--out', tmp_path / 'runs', '--name', 'x']
    err = bad(shell(cli.train, *args))
    for words in (f'{file}:13: nowhere.png: image is missing', f'{file}:14: label 3 is out of range, expected 0 to 2', f'{file}:15: duplicate label 1',
                  f"{file}:16: path '../15.png' leaves the image root", f'{file}:17: empty line', f"{file}:18: duplicate image '00.png', first on line 1"):
        assert words in err, err
    assert '6 problems in the data' in err and '%|' not in err and not (tmp_path / 'runs').exists()

    out = good(shell(cli.train, *args, '--skip-bad'))
    skipped = (tmp_path / 'runs' / 'x' / 'skipped.txt').read_text().splitlines()
    assert len(skipped) == 6 and skipped[0] == f'{file}:13: nowhere.png: image is missing' and Run(tmp_path / 'runs' / 'x').num_train == 12
    assert 'run: ' in out


@pytest.mark.parametrize('change, words', [
    (['--recipe', 'shapes'], 'expected one of shapes-cprfl'), (['--semantics', 'bert'], 'semantics: expected one of clip:ARCH/TAG'),
    (['--backbone', 'resnet1000'], "timm has no model 'resnet1000'"), (['--weights', 'nowhere.pth'], 'no such file: nowhere.pth'),
    (['--loss', 'mse'], 'loss: expected one of'), (['--precision', 'int8'], 'precision: expected one of fp32'), (['--epochs', '0'], 'epochs: expected 1'),
    (['--select', 'test', '--patience', '-1'], 'patience: expected 0'), (['--classes', 'nowhere.txt'], 'nowhere.txt'), (['--list', 'nowhere.txt'], 'no such list or folder: nowhere.txt'),
    (['--views', '3'], '3 cached views need frozen=True'), (['--model', 'bert'], 'model: expected one of cprfl, erm, mlgcn, coop, clip')])
def test_mistakes_are_a_sentence_and_leave_nothing_behind(shell, data, tmp_path, monkeypatch, change, words):
    monkeypatch.chdir(tmp_path)
    err = bad(shell(cli.train, *tuned(data), *change, '--name', 'x', '--out', 'runs'))
    assert words in err and err.startswith('cprfl_train: ') and not (tmp_path / 'runs').exists()


def test_wrong_arguments_exit_with_usage(shell, tmp_path):
    for args in (['--epochs', 'many'], ['--image-size']): assert 'usage: cprfl_train' in bad(shell(cli.train, *args, '--out', tmp_path))
    assert 'usage: cprfl_predict' in bad(shell(cli.predict))


def test_evaluate_and_predict_say_what_is_missing(shell, data, tmp_path):
    good(shell(cli.train, *tuned(data), '--name', 'tiny', '--out', tmp_path))
    assert 'has nothing to go on from, so it starts anew' in good(shell(cli.train, *tuned(data), '--name', 'fresh', '--out', tmp_path, '--resume'))
    assert 'is not a run (it has no config.json); runs beside it: fresh, tiny' in bad(shell(cli.evaluate, tmp_path / 'tinny'))
    assert 'is not a run' in bad(shell(cli.predict, tmp_path / 'tinny', data / '28.png'))
    assert 'nowhere.png: image is missing' in bad(shell(cli.predict, tmp_path / 'tiny', 'nowhere.png'))
    assert f'{tmp_path}: image is a folder' in bad(shell(cli.predict, tmp_path / 'tiny', tmp_path))
    (data / 'other.txt').write_text('a\nb\nc\n')
    (tmp_path / 'cats').mkdir()
    Image.new('RGB', (8, 8)).save(tmp_path / 'cats' / '1.png')
    (tmp_path / 'new').mkdir()
    (tmp_path / 'cats').rename(tmp_path / 'new' / 'cats')
    assert "other classes (['cats']...) than the run (['cat', 'dining table', 'dog']...)" in bad(shell(cli.evaluate, tmp_path / 'tiny', '--list', tmp_path / 'new'))


def test_prepare_offline_says_what_to_fetch_and_where_to_put_it(shell, tmp_path):
    for name in ('voc-lt', 'coco-lt'):
        err = bad(shell(cli.prepare, name, '--root', tmp_path, '--offline'))
        assert 'the network is not used' in err and 'http' in err and str(tmp_path / name) in err and '--lists DIR' in err
    assert 'available: voc-lt, coco-lt' in bad(shell(cli.prepare, 'imagenet', '--root', tmp_path))
    assert 'run: cprfl_prepare voc-lt' in bad(shell(cli.train, '--recipe', 'voc-lt', '--root', tmp_path, '--out', tmp_path))


# ---- cut off, resumed, repeated

def test_resume_after_an_interruption_gives_the_same_run(shell, data, tmp_path, monkeypatch):
    args = [*tuned(data), '--epochs', 3, '--name', 'tiny']
    good(shell(cli.train, *args, '--out', tmp_path / 'whole'))
    def cut(self, trainer):
        if trainer.epoch == 2: raise KeyboardInterrupt
    monkeypatch.setattr(EarlyStopping, 'before_epoch', cut, raising=False)
    assert 'the same command with --resume goes on' in bad(shell(cli.train, *args, '--out', tmp_path / 'cut'), 130)
    monkeypatch.undo()
    run = tmp_path / 'cut' / 'tiny'
    assert len(pd.read_csv(run / 'metrics.csv')) == 2 and not (run / 'report.json').exists()
    assert 'holds a run already; go on with it (resume=True, or --resume)' in bad(shell(cli.train, *args, '--out', tmp_path / 'cut'))
    config = (run / 'config.json').read_text()
    assert 'lr: ' in bad(shell(cli.train, *args, '--out', tmp_path / 'cut', '--resume', '--lr', 0.5)).replace("'", '') and (run / 'config.json').read_text() == config
    good(shell(cli.train, *args, '--out', tmp_path / 'cut', '--resume'))
    a, b = (Run(tmp_path / n / 'tiny') for n in ('whole', 'cut'))
    assert a.predictions.equals(b.predictions) and a.metrics.drop(columns='seconds').equals(b.metrics.drop(columns='seconds'))
    assert all(torch.equal(v, b.prompts[k]) for k, v in a.prompts.items()) and set(a.prompts) == set(b.prompts) == {0, 1, 2, 3}


def test_recipes_of_the_kit_can_be_resumed_and_reopened():
    "What comes back from config.json equals what was written"
    from dataclasses import asdict
    changed = [n for n, r in RECIPES.items() if cprfl.runs.recipe.Recipe(**json.loads(json.dumps(asdict(r)))) != r]
    assert not changed


# ---- the demo

@pytest.fixture
def few_images(monkeypatch):
    "Shapes-LT with 64 images to train and 40 to test"
    def few(recipe):
        train, test = _read_splits(recipe)
        return train.subset(range(64)), test.subset(range(40))
    monkeypatch.setattr(cprfl.runs.run, '_read_splits', few)


def test_demo_compares_four_methods_and_is_not_done_twice(shell, few_images, tmp_path, monkeypatch):
    out = good(shell(cli.demo, '--epochs', 1, '--workers', 1, '--out', tmp_path))
    assert all(name in out for name in cli.DEMO) and 'mAP in percent' in out and str(tmp_path) in out
    assert list(pd.read_csv(tmp_path / 'demo.csv')['method']) == list(cli.DEMO)
    for name in cli.DEMO: assert Run(tmp_path / f'{name}-s0').report['num_test'] == 40
    monkeypatch.setattr(cprfl.runs.run, 'run_recipe', lambda *a, **k: pytest.fail('run again'))
    assert 'mAP in percent' in good(shell(cli.demo, '--epochs', 1, '--workers', 1, '--out', tmp_path))


@pytest.mark.skip(reason='trains four models on all of Shapes-LT, which takes minutes; `make demo` does it, and the test above checks the same path on few images')
def test_demo_on_the_whole_benchmark(shell, tmp_path):
    assert 'mAP in percent' in good(shell(cli.demo, '--epochs', 1, '--workers', 1, '--out', tmp_path))


# ---- slips of a newcomer

@pytest.mark.parametrize('slip, answer', [
    (['--bacth-size', '8'], 'unknown argument --bacth-size; did you mean --batch-size?'), (['--epoch', '3'], 'unknown argument --epoch; did you mean --epochs?'), (['mine.csv'], 'unknown argument mine.csv')])
def test_a_mistyped_option_is_answered_with_its_neighbour(shell, slip, answer):
    assert answer in bad(shell(cli.train, *slip))


def test_a_table_without_labels(shell, data, tmp_path):
    (tmp_path / 't.csv').write_text('image,tags\n00.png,cat\n')
    said = bad(shell(cli.train, '--list', tmp_path / 't.csv', '--root', data, '--out', tmp_path))
    assert 'no column labels' in said and 'the columns are image, tags' in said and len(said.splitlines()) < 5


def test_a_folder_without_class_folders(shell, data, tmp_path):
    (tmp_path / 'labels.csv').write_text('image,labels\n00.png,cat\n')
    said = bad(shell(cli.train, '--list', tmp_path, '--out', tmp_path / 'runs'))
    assert 'no folder of a class in it' in said and 'did you mean' in said and 'labels.csv' in said


def test_a_class_that_training_does_not_know(shell, data, tmp_path):
    for name, label in (('train', 'cat'), ('test', 'cta')): (tmp_path / f'{name}.csv').write_text(f'image,labels\n00.png,cat\n01.png,{label}\n')
    said = bad(shell(cli.train, '--list', tmp_path / 'train.csv', '--test-list', tmp_path / 'test.csv', '--root', data, '--out', tmp_path))
    assert re.search(r'test\.csv.*3.*cta', said)


def test_images_that_are_tested_on_what_was_trained_on(shell, data, tmp_path):
    with pytest.warns(UserWarning, match='28 of the 28 test images are training images'):
        out = good(shell(cli.train, '--recipe', 'shapes-cprfl', '--backbone', 'test_resnet', *TINY, '--list', data / 'train.txt', '--test-list', data / 'train.txt', '--out', tmp_path))
    assert 'training: LongTailDataset: 28 images' in out and 'testing:  LongTailDataset: 28 images' in out
