"The trainer: reproducible, resumable, and clear about what went wrong"
import csv
import json
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from cprfl.data.dataset import MultiLabelDataset
from cprfl.data.shapes import shapes_lt
from cprfl.files import write_atomic
from cprfl.losses import build_loss
from cprfl.model.backbones import build_backbone
from cprfl.model.cprfl import CPRFL
from cprfl.train.augment import POLICIES, BatchAugment, random_cutout, random_flip, random_shift
from cprfl.train.callbacks import Callback, NonFiniteLoss
from cprfl.train.checkpoint import Checkpoint, RunFolder
from cprfl.train.config import TrainConfig, param_groups
from cprfl.train.trainer import EpochSampler, Trainer, evaluate, predict, total_loss


class Toy(MultiLabelDataset):
    "Features [1, 16] in which each class has a direction of its own"
    _per_image = 'paths', 'targets', 'x'
    def __init__(self, n=64, C=3, targets=None):
        rng = np.random.default_rng(0)
        targets = (rng.random((n, C)) < 0.4).astype(np.uint8) if targets is None else targets
        n, C = targets.shape
        super().__init__([f'toy/{i:03d}' for i in range(n)], targets, [f'class {c}' for c in range(C)])
        self.x = torch.from_numpy((targets @ rng.normal(size=(C, 16)) + 0.3 * rng.normal(size=(n, 16))).astype(np.float32))[:, None]
    def __getitem__(self, i): return self.x[i], torch.from_numpy(self.targets[i].astype(np.float32)), i


class Head(nn.Module):
    def __init__(self, C=3): super().__init__(); torch.manual_seed(0); self.fc = nn.Linear(16, C)
    def forward(self, x): return self.fc(x.mean(1))


class StopAfter(Callback):
    def __init__(self, epochs): self.epochs = epochs
    def after_epoch(self, trainer): trainer.stop = trainer.epoch >= self.epochs


class CutOff(Callback):
    "Somebody presses Ctrl-C in the middle of an epoch"
    def __init__(self, epoch): self.epoch = epoch
    def after_batch(self, trainer):
        if trainer.epoch == self.epoch: raise KeyboardInterrupt


def config(**kw): return TrainConfig(**{**dict(epochs=3, batch_size=16, lr=0.02, ema=0.9, device='cpu', select='last'), **kw})


def toy(folder=None, callbacks=(), data=None, resume=None, **kw):
    return Trainer(Head(), data or Toy(), config=config(**kw), callbacks=callbacks, folder=folder, progress=False).fit(resume)


def picture_model(C=20, seed=0, **kw):
    torch.manual_seed(seed)
    backbone = build_backbone('resnet10t', channels=(8, 8, 16, 16))
    semantics = torch.randn(C, 12, generator=torch.Generator().manual_seed(0))
    return CPRFL(backbone, semantics, **{**dict(d=16, heads=2, head_dim=8, ffn_dim=16, dropout=0.2), **kw})


@pytest.fixture(scope='module')
def pictures(): return shapes_lt('train').subset(range(48))


def paint(pictures, folder=None, callbacks=(), resume=None, model=None, **kw):
    return Trainer(model or picture_model(), pictures, config=config(**{**dict(lr=2e-3), **kw}), callbacks=callbacks, folder=folder, progress=False).fit(resume)


def numbers(trainer):
    "All that must agree between two runs"
    return trainer.evaluated.state_dict(), [{k: v for k, v in row.items() if k != 'seconds'} for row in trainer.history], trainer.best_epoch


def same(a, b):
    (wa, ha, ba), (wb, hb, bb) = numbers(a), numbers(b)
    return all(torch.equal(v, wb[k]) for k, v in wa.items()) and str(ha) == str(hb) and ba == bb


# ---- the same seed gives the same numbers

def test_same_seed_same_numbers(pictures):
    a, b = (paint(pictures, epochs=2, augment='paper') for _ in range(2))
    assert same(a, b) and a.history[0]['loss'] != a.history[1]['loss']


def test_the_seed_matters_and_the_global_generator_does_not():
    a, c = toy(), toy(seed=1)
    torch.manual_seed(99); np.random.seed(99); torch.rand(7)
    assert same(a, toy()) and not same(a, c)


def test_sampler_depends_on_seed_and_epoch():
    s = EpochSampler(20, seed=3)
    first, again = list(s), list(s)
    s.epoch = 1
    assert first == again and sorted(first) == list(range(20)) and list(s) != first and list(EpochSampler(20, seed=4)) != first


def test_class_aware_sampling_equalises_the_classes():
    targets = np.zeros((600, 4), np.uint8)
    targets[:500, 0], targets[500:550, 1], targets[550:555, 2] = 1, 1, 1  # the fourth class has no image, 45 images have no class
    s = EpochSampler(600, seed=0, targets=targets)
    drawn = []
    for s.epoch in range(20): drawn += list(s)
    share = targets[drawn].sum(0) / len(drawn)
    assert len(drawn) == 20 * len(s) == 20 * 600
    assert share[:3] == pytest.approx([1 / 3] * 3, abs=0.015) and share[3] == 0
    assert max(drawn) < 555, 'images without a label are never drawn'
    tail = np.bincount(drawn, minlength=600)[550:555]
    assert tail == pytest.approx(np.full(5, 20 * 600 / 15), rel=0.1), "and a class's images alike"


def test_class_aware_sampling_depends_on_seed_and_epoch():
    targets = Toy(60).targets
    def order(seed, epoch):
        s = EpochSampler(60, seed, targets)
        s.epoch = epoch
        return list(s)
    assert order(3, 2) == order(3, 2) and len({tuple(order(*k)) for k in [(3, 2), (3, 1), (4, 2)]}) == 3
    s = EpochSampler(60, 3, targets)
    assert list(s) == list(s) == order(3, 0), 'reading it twice does not move it on'
    with pytest.raises(ValueError, match='class_aware.*none of the 5 images carries a class'): EpochSampler(5, targets=np.zeros((5, 3), np.uint8))


class Noting(Toy):
    "Remembers which images were asked for"
    def __init__(self, **kw): super().__init__(**kw); self.seen = []
    def __getitem__(self, i): self.seen.append(int(i)); return super().__getitem__(i)


def test_class_aware_training_resumes_bit_for_bit(tmp_path):
    targets = np.zeros((64, 3), np.uint8)
    targets[:40, 0], targets[38:50, 1], targets[49:52, 2] = 1, 1, 1
    a, b, c = (Noting(targets=targets) for _ in range(3))
    kw = dict(sampler='class_aware', epochs=4)
    whole = toy(data=a, **kw)
    toy(tmp_path, [StopAfter(2)], data=b, **kw)
    resumed = toy(tmp_path, data=c, resume=True, **kw)
    assert same(whole, resumed) and a.seen == b.seen + c.seen and len(c.seen) == 2 * 64
    assert max(a.seen) < 52 and a.seen[:64] != a.seen[64:128]
    assert not same(whole, toy(data=Toy(targets=targets), epochs=4)), 'the sampler matters'


def test_a_state_from_before_a_setting_existed_can_be_resumed(tmp_path):
    whole = toy(tmp_path / 'whole')
    toy(tmp_path, [StopAfter(2)])
    file = tmp_path / 'state' / 'epoch_0002.pt'
    state = torch.load(file, weights_only=True)
    del state['config']['sampler']
    torch.save(state, file)
    with pytest.raises(ValueError, match="sampler: 'uniform' then, 'class_aware' now"): toy(tmp_path, sampler='class_aware', resume=True)
    assert same(whole, toy(tmp_path, resume=True))


def test_it_learns():
    t = toy(epochs=15)
    assert t.history[-1]['loss'] < 0.5 * t.history[0]['loss'] and evaluate(t.evaluated, Toy())['total'] > 0.9


# ---- resume

@pytest.mark.parametrize('select', ['last', 'valid'])
def test_resume_is_bit_for_bit(pictures, tmp_path, select):
    "With dropout, augmentation, EMA and batch statistics; the cut comes in the middle of an epoch"
    kw = dict(select=select, augment='standard', valid_fraction=0.3)
    whole = paint(pictures, tmp_path / 'whole', **kw)
    with pytest.raises(KeyboardInterrupt): paint(pictures, tmp_path / 'cut', [CutOff(2)], **kw)
    resumed = paint(pictures, tmp_path / 'cut', model=picture_model(seed=5), resume=True, **kw)
    assert same(whole, resumed) and [r['epoch'] for r in resumed.history] == [1, 2, 3]
    a, b = (tmp_path / n for n in ('whole', 'cut'))
    for name in ('last', 'best', 'prompts'):
        x, y = (load_file(f / f'{name}.safetensors') for f in (a, b))
        assert x.keys() == y.keys() and all(torch.equal(x[k], y[k]) for k in x), name
    rows = [[{k: v for k, v in r.items() if k != 'seconds'} for r in csv.DictReader(open(f / 'metrics.csv'))] for f in (a, b)]
    assert rows[0] == rows[1] and len(rows[0]) == 3


def test_resume_from_a_named_state_and_of_a_finished_run(tmp_path):
    whole = toy(tmp_path)
    assert same(whole, toy(resume=tmp_path / 'state' / 'epoch_0002.pt'))
    assert same(whole, toy(tmp_path, resume=True))


def test_resume_without_a_state_starts_from_the_start(tmp_path):
    assert same(toy(), toy(tmp_path, resume=True))


@pytest.mark.parametrize('damage', [lambda f: f.write_bytes(f.read_bytes()[:200]), lambda f: f.write_bytes(b''), lambda f: f.write_bytes(b'junk' * 99)])
def test_a_broken_newest_state_falls_back_with_a_warning(tmp_path, damage):
    whole = toy(epochs=4)
    toy(tmp_path, [StopAfter(3)], epochs=4)
    damage(tmp_path / 'state' / 'epoch_0003.pt')
    with pytest.warns(UserWarning, match='epoch_0003.pt cannot be read .* trying the one before'): resumed = toy(tmp_path, epochs=4, resume=True)
    assert same(whole, resumed)


def test_only_broken_states_are_an_error(tmp_path):
    toy(tmp_path, [StopAfter(2)])
    for f in (tmp_path / 'state').iterdir(): f.write_bytes(b'junk')
    with pytest.warns(UserWarning), pytest.raises(RuntimeError, match='none of the states can be read: .*epoch_0002.pt, .*epoch_0001.pt'): toy(tmp_path, resume=True)


def test_a_state_never_brings_code(tmp_path):
    class Mark:
        def __reduce__(self): return open, (str(tmp_path / 'it_ran'), 'w')
    torch.save(dict(model=Mark()), tmp_path / 'evil.pt')
    with pytest.warns(UserWarning), pytest.raises(RuntimeError, match='none of the states'): toy(resume=tmp_path / 'evil.pt')
    assert not (tmp_path / 'it_ran').exists()


def test_moments_of_another_memory_layout_are_the_same_moments(pictures, tmp_path):
    "A state from a device that wants images in another layout"
    def fit(folder=None, callbacks=(), resume=None):
        torch.manual_seed(0)
        model = CPRFL(build_backbone('resnet18', channels=(16, 16, 16, 16), stem_width=16), torch.randn(20, 12), d=16, heads=2, head_dim=8, ffn_dim=16, dropout=0.)
        return Trainer(model, pictures, config=config(epochs=2, select='last', ema=0.), callbacks=callbacks, folder=folder, progress=False).fit(resume)
    whole = fit()
    fit(tmp_path, [StopAfter(1)])
    [file] = (tmp_path / 'state').glob('*.pt')
    state, turned = torch.load(file, weights_only=True), 0
    for moments in state['optimizer']['state'].values():
        for k, v in moments.items():
            if v.ndim == 4: moments[k] = v.contiguous(); turned += v.stride() != moments[k].stride()
    torch.save(state, file)
    assert turned and same(whole, fit(tmp_path, resume=True))


def test_other_settings_are_refused(tmp_path):
    toy(tmp_path, [StopAfter(1)])
    before = {f: f.read_bytes() for f in tmp_path.rglob('*') if f.is_file()}
    with pytest.raises(ValueError, match=r'(?s)other settings.*lr: 0.02 then, 0.01 now.*seed: 0 then, 3 now'): toy(tmp_path, lr=0.01, seed=3, resume=True)
    assert before == {f: f.read_bytes() for f in tmp_path.rglob('*') if f.is_file()}


# ---- the run's folder

def test_a_run_leaves_a_whole_folder(pictures, tmp_path):
    t = paint(pictures, tmp_path)
    assert sorted(p.relative_to(tmp_path).as_posix() for p in tmp_path.rglob('*') if p.is_file()) == [
        '.lock', 'best.safetensors', 'last.safetensors', 'metrics.csv', 'prompts.safetensors', 'state/epoch_0002.pt', 'state/epoch_0003.pt', 'train_config.json']
    prompts = load_file(tmp_path / 'prompts.safetensors')
    assert list(prompts) == [f'epoch_{i:04d}' for i in range(4)] and prompts['epoch_0000'].shape == (20, 16)
    assert torch.allclose(prompts['epoch_0003'], t.evaluated.prompts(), atol=1e-6) and not torch.equal(prompts['epoch_0000'], prompts['epoch_0001'])
    assert TrainConfig(**json.loads((tmp_path / 'train_config.json').read_text())) == t.config
    weights = load_file(tmp_path / 'last.safetensors')
    assert all(torch.equal(v, weights[k]) for k, v in t.evaluated.state_dict().items())
    assert torch.load(tmp_path / 'state' / 'epoch_0003.pt', weights_only=True)['epoch'] == 3


def test_without_a_folder_nothing_is_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    toy()
    assert not list(tmp_path.iterdir())


def test_writing_is_all_or_nothing(tmp_path):
    file = tmp_path / 'a.txt'
    write_atomic(file, lambda p: p.write_text('old'))

    def half(p): p.write_text('ne'); raise OSError('disk full')
    with pytest.raises(OSError, match='disk full'): write_atomic(file, half)
    assert file.read_text() == 'old' and list(tmp_path.iterdir()) == [file]
    write_atomic(file, lambda p: p.write_text('new'))
    assert file.read_text() == 'new' and list(tmp_path.iterdir()) == [file]


def test_a_failing_state_leaves_the_older_ones(tmp_path, monkeypatch):
    toy(tmp_path, [StopAfter(1)])
    def full(obj, f): Path(f).write_bytes(b'half'); raise OSError(28, 'No space left on device')
    monkeypatch.setattr(torch, 'save', full)
    with pytest.raises(OSError, match=r'Checkpoint.after_epoch: .*No space left'): toy(tmp_path, resume=True)
    monkeypatch.undo()
    assert [f.name for f in (tmp_path / 'state').iterdir()] == ['epoch_0001.pt']
    assert same(toy(), toy(tmp_path, resume=True))


# ---- selection and validation

def test_the_carved_split_keeps_every_class_in_training():
    ds = shapes_lt('train')
    t = Trainer(Head(20), ds, config=config(select='valid'), progress=False)
    assert len(t.train) + len(t.valid) == len(ds) and not set(t.train.paths) & set(t.valid.paths)
    assert 0.15 < len(t.valid) / len(ds) < 0.25 and (t.train.class_counts >= 0.75 * ds.class_counts).all()
    assert all((t.train.class_counts[c] >= 1) and np.array_equal(t.train.groups['tail'], ds.groups['tail']) for c in ds.groups['tail'])
    again = Trainer(Head(20), ds, config=config(select='valid'), progress=False)
    assert again.valid.paths == t.valid.paths


def test_the_best_epoch_on_validation_is_kept():
    class Worse(Callback):
        "Spoil the weights before the third epoch"
        def before_epoch(self, trainer):
            if trainer.epoch == 2: trainer.evaluated.fc.weight.data.mul_(-100)
    t = toy(callbacks=[Worse()], select='valid', epochs=4, lr=0.05, ema=0)
    assert t.best_epoch in (1, 2) and t.best == max(r['total'] for r in t.history) > t.history[-1]['total'] + 0.1
    assert evaluate(t.evaluated, t.valid)['total'] == pytest.approx(t.best)
    assert toy(select='last', epochs=2).best_epoch == 2


def test_selecting_on_test_warns_and_needs_a_test_set():
    with pytest.warns(UserWarning, match='best on the TEST set'): Trainer(Head(), Toy(), Toy(), config(select='test'), progress=False)
    with pytest.raises(ValueError, match='pass the test set'): Trainer(Head(), Toy(), config=config(select='test'), progress=False)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        for select in ('valid', 'last'): Trainer(Head(), Toy(), config=config(select=select), progress=False)


def test_nothing_to_select_on_is_an_error_before_training():
    with pytest.raises(ValueError, match='32 images to select on show no class'):
        Trainer(Head(), Toy(), Toy(targets=np.zeros((32, 3), np.uint8)), config(select='valid'), progress=False)
    with pytest.raises(ValueError, match="use select='last'"): Trainer(Head(), Toy(targets=np.eye(3, dtype=np.uint8)), config=config(select='valid'), progress=False)
    with pytest.raises(ValueError, match='training set is empty'): Trainer(Head(), Toy().subset([]), config=config(), progress=False)


def test_early_stopping():
    t = toy(select='valid', lr=0., epochs=9, patience=2)
    assert t.epoch == 3 and t.best_epoch == 1, 'nothing changes at a rate of 0'
    assert toy(select='valid', lr=0., epochs=4, patience=0).epoch == 4


def test_predict_keeps_order_and_mode(pictures):
    model = picture_model().train()
    whole, parts = predict(model, pictures, 48), predict(model, pictures, 7)
    assert model.training and whole.shape == (48, 20) and torch.allclose(whole, parts, atol=1e-5) and whole.dtype == torch.float32
    model.eval()
    assert torch.allclose(predict(model, pictures), whole, atol=1e-5) and not model.training
    assert torch.allclose(predict(model, pictures.subset([5, 2])), whole[[5, 2]], atol=1e-5)


# ---- what a step does

def test_ema_is_the_average_that_one_computes_by_hand():
    seen = []
    class Watch(Callback):
        def before_fit(self, trainer): seen.append(trainer.model.fc.weight.detach().clone())
        def after_batch(self, trainer): seen.append(trainer.model.fc.weight.detach().clone())
    t = toy(callbacks=[Watch()], ema=0.6, epochs=10)
    average, decays = seen[0].double(), []
    for step, w in enumerate(seen[1:]):
        k = max(0, step - 1)
        decays.append(min(0.6, 1 - 1 / (1 + k / 10)))  # it warms up, so that the first weights are forgotten
        average = decays[-1] * average + (1 - decays[-1]) * w.double()
    assert decays[0] == 0 and decays[-1] == 0.6
    assert torch.allclose(t.evaluated.fc.weight.double(), average, atol=1e-6) and not torch.allclose(t.evaluated.fc.weight, seen[-1], atol=1e-4)


def test_without_ema_the_model_itself_is_evaluated():
    t = toy(ema=0)
    assert t.evaluated is t.model


def test_ema_is_not_run_at_a_training_step(pictures):
    t = Trainer(picture_model(), pictures, config=config(epochs=1, lr=1e-3), progress=False)
    calls = []
    class Count(Callback):
        def before_fit(self, trainer): trainer.evaluated.register_forward_hook(lambda *a: calls.append(1))
    t.callbacks.append(Count())
    t.fit()
    assert not calls


def test_biases_and_norms_do_not_decay():
    model = picture_model()
    groups = param_groups(model, TrainConfig(lr=1e-3, backbone_lr=0.1, weight_decay=0.05))
    names = {p: n for n, p in model.named_parameters()}
    assert sorted(names[p] for g in groups for p in g['params']) == sorted(names.values())
    for g in groups:
        for p in g['params']:
            assert g['weight_decay'] == (0.05 if p.ndim > 1 else 0) and g['lr'] == pytest.approx(1e-4 if names[p].startswith('backbone.') else 1e-3)
    model.backbone.requires_grad_(False)
    assert not any(names[p].startswith('backbone.') for g in param_groups(model, TrainConfig()) for p in g['params'])


def test_each_group_keeps_its_rate_through_the_schedule(pictures):
    seen = []
    class Rates(Callback):
        def before_fit(self, trainer): trainer.optimizer.optimizer.register_step_pre_hook(lambda o, a, k: seen.append([g['lr'] for g in o.param_groups]))
    t = paint(pictures, callbacks=[Rates()], lr=1e-3, backbone_lr=0.1, warmup=0.5, epochs=4)
    names = {p: n for n, p in t.model.named_parameters()}
    backbone = [names[g['params'][0]].startswith('backbone.') for g in t.optimizer.param_groups]
    rates = np.array(seen)
    assert rates.shape == (4 * 3, 4) and rates.max(0) == pytest.approx([1e-4 if b else 1e-3 for b in backbone], rel=0.05)
    assert (rates[:, backbone] * 10 == pytest.approx(rates[:, ~np.array(backbone)])) and rates[0].max() < rates[5].max() > rates[-1].max()


@pytest.mark.parametrize('n, epochs, warmup', [(16, 1, 0.5), (16, 9, 0.1), (16, 1, 0.1), (16, 2, 0), (16, 2, 1)])
def test_schedules_of_few_steps(n, epochs, warmup):
    t = toy(data=Toy(n), epochs=epochs, warmup=warmup)
    assert t.epoch == epochs and np.isfinite(t.history[-1]['loss'])


def test_accumulating_two_batches_is_one_of_twice_the_size():
    a, b = toy(ema=0, batch_size=8, accumulate=2), toy(ema=0, batch_size=16)
    assert len(a.loader) == 2 * len(b.loader) and a.steps == b.steps
    assert torch.allclose(a.model.fc.weight, b.model.fc.weight, atol=1e-6) and not torch.allclose(a.model.fc.weight, Head().fc.weight, atol=1e-2)
    assert [r['loss'] for r in a.history] == pytest.approx([r['loss'] for r in b.history], rel=1e-5)


def test_gradients_are_clipped():
    def norms(clip):
        seen = []
        class Norms(Callback):
            def before_fit(self, trainer):
                trainer.optimizer.optimizer.register_step_pre_hook(lambda o, a, k: seen.append(torch.stack([p.grad.norm() for g in o.param_groups for p in g['params']]).norm().item()))
        toy(callbacks=[Norms()], clip_grad=clip, epochs=1)
        return seen
    assert max(norms(0)) > 0.05 and max(norms(0.01)) == pytest.approx(0.01, rel=1e-3)


@pytest.mark.parametrize('precision', ['bf16', 'fp32'])
def test_precisions_train_and_keep_float32_weights(pictures, precision):
    t = paint(pictures, precision=precision, epochs=1)
    logits = predict(t.evaluated, pictures, accelerator=t.accelerator)
    assert np.isfinite(t.history[-1]['loss']) and logits.dtype == torch.float32 and logits.isfinite().all()
    assert {p.dtype for p in t.model.parameters()} == {torch.float32}
    assert len(logits.unique()) > 0.99 * logits.numel(), 'scores of half precision would tie'


# ---- compiled

@pytest.fixture
def fresh_compiler(tmp_path, monkeypatch):
    "No compiled code of an earlier test, and a folder of its own for the new"
    monkeypatch.setenv('TORCHINDUCTOR_CACHE_DIR', str(tmp_path / 'compiled'))
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.fixture
def compiler(fresh_compiler):
    "A compiler that works on this machine"
    try: torch.compile(lambda x: x.sin() + 1)(torch.zeros(3))
    except Exception as e: pytest.skip(f'PyTorch cannot compile here: {type(e).__name__}')


class Dropping(Head):
    def forward(self, x): return super().forward(nn.functional.dropout(x, 0.3, self.training))


class Normed(Head):
    def __init__(self): super().__init__(); self.norm = nn.BatchNorm1d(16)
    def forward(self, x): return self.fc(self.norm(x.mean(1)))


def test_a_compiled_step_learns_the_same_and_resumes_bit_for_bit(compiler, tmp_path):
    def fit(folder=None, callbacks=(), resume=None, model=Dropping, **kw):
        return Trainer(model(), Toy(), config=config(**kw), callbacks=callbacks, folder=folder, progress=False).fit(resume)
    whole, seen = fit(compile='default'), []
    assert whole.run is not whole.model and list(whole.trained_state()) == ['fc.weight', 'fc.bias']
    with pytest.raises(KeyboardInterrupt): fit(tmp_path / 'run', [CutOff(1)], compile='default')
    assert same(whole, fit(tmp_path / 'run', resume=True, compile='default'))
    assert np.allclose([r['loss'] for r in fit(model=Head, compile='default').history], [r['loss'] for r in fit(model=Head).history], rtol=1e-4)
    whole.evaluated.fc.register_forward_hook(lambda *a: seen.append(1))
    predict(whole.evaluated, Toy())
    assert seen, 'what is looked at afterwards is the model, not what was compiled from it'


def test_without_a_compiler_training_goes_on_as_if_it_had_not_been_asked_for(fresh_compiler):
    plain = Trainer(Dropping(), Toy(), config=config(), progress=False).fit()
    with torch._inductor.config.patch({'cpp.cxx': (None, '/no/such/compiler')}), pytest.warns(UserWarning, match='could not compile.*trains as it is') as said:
        fallen = Trainer(Dropping(), Toy(), config=config(compile='default'), progress=False).fit()
    assert same(plain, fallen) and len([w for w in said if 'trains as it is' in str(w.message)]) == 1


def test_a_backward_pass_that_cannot_be_compiled_is_no_end_either(monkeypatch):
    "It is compiled when it is first needed, long after the forward pass"
    class Backward(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x): return x.clone()
        @staticmethod
        def backward(ctx, g): raise torch._dynamo.exc.BackendCompilerFailed(torch.compile, RuntimeError('no C++ compiler'), None)
    plain = Trainer(Dropping(), Toy(), config=config(), progress=False).fit()
    monkeypatch.setattr(torch, 'compile', lambda model, **kw: lambda x: Backward.apply(model(x)))
    with pytest.warns(UserWarning, match='trains as it is'): fallen = Trainer(Dropping(), Toy(), config=config(compile='default'), progress=False).fit()
    assert same(plain, fallen)
    normed = [Trainer(Normed(), Toy(), config=config(compile=how), progress=False).fit() for how in (None, 'default')]
    assert same(*normed), 'the batch that was repeated counts once in the statistics'


def test_a_python_that_torch_cannot_compile_is_no_end_either(monkeypatch):
    def refuse(model, **kw): raise RuntimeError('torch.compile is not supported on Python 3.99+')
    monkeypatch.setattr(torch, 'compile', refuse)
    with pytest.warns(UserWarning, match='3.99.*'): assert len(Trainer(Head(), Toy(), config=config(compile='default'), progress=False).fit().history) == 3


def test_an_error_of_the_model_itself_is_no_matter_of_compiling():
    class Wrong(Head):
        def forward(self, x): raise ValueError('two by three')
    with pytest.raises(ValueError, match='two by three'): Trainer(Wrong(), Toy(), config=config(compile='default'), progress=False).fit()


def test_any_loss_of_the_registry_or_of_ones_own():
    for kw in (dict(loss='bce'), dict(loss='db_focal'), dict(loss='asl', loss_args=dict(gamma_neg=2))): assert np.isfinite(toy(epochs=1, **kw).history[-1]['loss'])
    class Own(nn.Module):
        def forward(self, logits, targets): return (logits - targets).square().mean()
    t = Trainer(Head(), Toy(), config=config(epochs=8), loss=Own(), progress=False).fit()
    assert t.history[-1]['loss'] < t.history[0]['loss']
    assert type(Trainer(Head(), Toy(), config=config(), progress=False).loss_func) is type(build_loss('asl'))


@pytest.mark.parametrize('B, C', [(1, 3), (16, 1), (1, 1)])
def test_batch_of_one_and_one_class(B, C):
    t = Trainer(Head(C), Toy(12, C), config=config(batch_size=B, epochs=1), progress=False).fit()
    assert np.isfinite(t.history[-1]['loss']) and predict(t.evaluated, Toy(12, C), B).shape == (12, C)


def test_images_in_batches_of_one_and_of_one_class(pictures):
    one = pictures.subset(range(3))
    one.targets, one.classes, one.groups = one.targets[:, :1], one.classes[:1], dict(head=np.array([0]), medium=np.array([], int), tail=np.array([], int))
    t = paint(one, batch_size=1, epochs=1, model=picture_model(C=1))
    assert np.isfinite(t.history[-1]['loss'])


def test_fewer_images_than_a_batch_are_still_used():
    assert len(toy(data=Toy(5)).loader) == 1 and len(toy(data=Toy(20)).loader) == 1


def test_a_frozen_backbone_stays_as_it_is(pictures, tmp_path):
    model = picture_model()
    model.backbone.requires_grad_(False)
    before = {k: v.clone() for k, v in model.backbone.state_dict().items()}
    t = paint(pictures, tmp_path, model=model, epochs=1)
    for m in (t.model, t.evaluated): assert all(torch.equal(v, before[k]) for k, v in m.backbone.state_dict().items())
    assert t.frozen and not [k for k in load_file(tmp_path / 'last.safetensors') if k.startswith('backbone.')]


def test_a_prediction_in_mid_epoch_leaves_a_frozen_backbone_in_eval_mode(pictures):
    class Peek(Callback):
        def after_batch(self, trainer): predict(trainer.model, pictures.subset(range(4)))
    model = picture_model()
    model.backbone.requires_grad_(False)
    before = {k: v.clone() for k, v in model.backbone.state_dict().items()}
    Trainer(model, pictures, None, TrainConfig(epochs=1, batch_size=16, select='last', ema=0.), [Peek()], progress=False).fit()
    assert all(torch.equal(v, before[k]) for k, v in model.backbone.state_dict().items()) and model.fc.weight.requires_grad


def test_a_trainer_does_not_inherit_the_device_of_the_one_before():
    from accelerate import PartialState
    toy(epochs=1)
    PartialState().device = torch.device('meta')
    assert toy(epochs=1, device='cpu').accelerator.device.type == 'cpu'


# ---- when something goes wrong

def test_a_loss_that_is_no_number_names_its_images():
    data = Toy(64)
    data.x[13] = float('nan')
    with pytest.raises(NonFiniteLoss, match=r'the loss is nan in epoch 1, step \d; the images of the batch: ') as e: toy(data=data)
    names = str(e.value).rpartition('batch: ')[2].split(', ')
    assert 'toy/013' in names and len(names) == 16 and set(names) <= set(data.paths)


@pytest.mark.parametrize('event', ['before_fit', 'before_epoch', 'after_batch', 'after_epoch', 'after_fit'])
@pytest.mark.parametrize('error', [ValueError('no luck'), OSError(28, 'no luck'), KeyError('no luck')], ids=lambda e: type(e).__name__)
def test_a_failing_callback_is_named_with_its_event(event, error):
    def fail(self, trainer): raise error
    Fails = type('Fails', (Callback,), {event: fail})
    with pytest.raises((type(error), RuntimeError), match=f'Fails.{event}: .*no luck') as e: toy(callbacks=[Fails()], epochs=1)
    assert e.value is error or e.value.__cause__ is error


def test_callbacks_see_every_event_in_order():
    seen = []
    Watch = type('Watch', (Callback,), {e: (lambda self, t, e=e: seen.append(e)) for e in ('before_fit', 'before_epoch', 'after_batch', 'after_epoch', 'after_fit')})
    toy(callbacks=[Watch()], epochs=2, batch_size=32)
    epoch = ['before_epoch', 'after_batch', 'after_batch', 'after_epoch']
    assert seen == ['before_fit', *epoch, *epoch, 'after_fit']


def test_progress_is_one_bar(capsys):
    Trainer(Head(), Toy(), config=config(epochs=2), progress=True).fit()
    shown = capsys.readouterr().err
    assert 'train: 100%' in shown and '8/8' in shown and 'loss=' in shown


@pytest.mark.parametrize('kw, words', [
    (dict(precision='int8'), "precision: expected one of fp32, bf16, fp16, got 'int8'"), (dict(select='best'), 'select: expected one of valid, last, test'),
    (dict(augment='crop'), 'augment: expected one of .*standard'), (dict(loss='mse'), 'loss: expected one of .*asl'), (dict(device='tpu'), 'device: expected one of auto, cpu, cuda'),
    (dict(compile='fast'), "compile: expected one of None, default, reduce-overhead, max-autotune, got 'fast'"), (dict(compile='reduce-overhead', accumulate=2), 'gradients cannot accumulate'),
    (dict(sampler='balanced'), "sampler: expected one of uniform, class_aware, got 'balanced'"),
    (dict(epochs=0), 'epochs: expected at least 1, got 0'), (dict(batch_size=0), 'batch_size'), (dict(lr=-1), 'lr: expected at least 0'), (dict(ema=2), 'ema: expected 0 to 1, got 2'),
    (dict(seed=-1), 'seed: expected at least 0'), (dict(clip_grad=-1), 'clip_grad'), (dict(warmup=1.5), 'warmup: expected 0 to 1'), (dict(patience=3, select='last'), 'stopping early needs')])
def test_settings_are_checked(kw, words):
    with pytest.raises(ValueError, match=words): TrainConfig(**kw)


def test_recorder_is_a_callback_that_one_can_add(tmp_path):
    Trainer(Head(), Toy(), config=config(), callbacks=[Checkpoint(tmp_path, keep_last=1), RunFolder(tmp_path)], progress=False).fit()
    assert [f.name for f in (tmp_path / 'state').iterdir()] == ['epoch_0003.pt'] and not (tmp_path / 'prompts.safetensors').exists()


# ---- augmentation

def bytes_(B=8, size=16, seed=0): return torch.randint(256, (B, 3, size, size), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


@pytest.mark.parametrize('policy', POLICIES)
def test_policies_keep_shape_and_type_and_repeat_themselves(policy):
    x, augment = bytes_(), BatchAugment(policy, seed=1)
    y = augment(x, epoch=2, step=3)
    assert y.shape == x.shape and y.dtype == torch.uint8 and torch.equal(y, BatchAugment(policy, seed=1)(x, epoch=2, step=3))
    assert torch.equal(x, bytes_()), 'the batch that was given is not touched'
    if policy != 'none': assert not all(torch.equal(y, BatchAugment(policy, seed=s)(x, epoch=e, step=t)) for s, e, t in ((2, 2, 3), (1, 3, 3), (1, 2, 4)))
    else: assert torch.equal(y, x)


def test_augmentation_leaves_the_global_generator_alone():
    torch.manual_seed(0)
    want = torch.rand(1)
    torch.manual_seed(0)
    BatchAugment('paper')(bytes_())
    assert torch.equal(torch.rand(1), want)


def test_flip_shift_and_cutout_do_what_they_say():
    x, g = bytes_(64), lambda: torch.Generator().manual_seed(0)
    flipped = (random_flip(x, g()) == x.flip(3)).flatten(1).all(1)
    same_ = (random_flip(x, g()) == x).flatten(1).all(1)
    assert (flipped ^ same_).all() and 16 < flipped.sum() < 48
    assert torch.equal(random_flip(x, g(), p=1., dim=2), x.flip(2)) and torch.equal(random_flip(x, g(), p=0.), x)
    shifted = random_shift(x, g(), 0.25)
    assert torch.equal(shifted.flatten(2).sort(2).values, x.flatten(2).sort(2).values) and not torch.equal(shifted, x)
    cut = random_cutout(torch.zeros_like(x), g(), p=1.)
    assert set(cut.unique().tolist()) == {0, 118} and (cut[:, 0] == cut[:, 1]).all() and cut.flatten(1).any(1).all()
    assert not random_cutout(torch.zeros_like(x), g(), p=0.).any()


def test_unknown_policy():
    with pytest.raises(ValueError, match="augment: expected one of .*got 'mixup'"): BatchAugment('mixup')


def test_two_paths_have_a_loss_each():
    "With the global path the model gives two logits while it trains, and their losses add up"
    torch.manual_seed(0)
    model = CPRFL(None, torch.randn(3, 8), d=16, heads=2, head_dim=8, ffn_dim=16, feature_dim=16, dropout=0., global_path=True)
    x, y = Toy()[0][0][None], Toy()[0][1][None]
    trainer = Trainer(model, Toy(), config=TrainConfig(epochs=1, select='last', precision='fp32', device='cpu'), progress=False)
    both = model.train()(x)
    assert total_loss(trainer.loss_func, both, y).item() == pytest.approx(sum(trainer.loss_func(logits, y).item() for logits in both), rel=1e-6)
    assert torch.allclose(model.eval()(x), sum(both) / 2, atol=1e-6)
    trainer.fit()
    assert torch.isfinite(predict(trainer.evaluated, Toy())).all()


def test_free_prompts_are_recorded_as_they_were(tmp_path):
    "They are a parameter: what is kept of an epoch must not change with it"
    torch.manual_seed(0)
    model = CPRFL(None, torch.randn(3, 8), d=16, heads=2, head_dim=8, ffn_dim=16, feature_dim=16, free_prompts=True)
    Trainer(model, Toy(), config=TrainConfig(epochs=2, lr=0.01, select='last', precision='fp32', device='cpu'), folder=tmp_path, progress=False).fit()
    P = load_file(tmp_path / 'prompts.safetensors')
    assert not torch.equal(P['epoch_0000'], P['epoch_0001']) and not torch.equal(P['epoch_0001'], P['epoch_0002'])


class Gradients(Callback):
    "The gradient of every step"
    def __init__(self): self.values = []
    def before_step(self, trainer):
        self.values.append(torch.cat([p.grad.flatten() for p in trainer.model.parameters()]).clone())


def test_a_last_shorter_group_gets_its_full_gradient():
    "Five batches in groups of three: the last two are averaged over two, not over three"
    def gradients(**kw):
        watch = Gradients()
        toy(callbacks=[watch], data=Toy(80), batch_size=16, epochs=1, lr=0.0, ema=0, **kw)
        return torch.stack(watch.values)
    by_three, each = gradients(accumulate=3), gradients()
    want = torch.stack([each[:3].mean(0), each[3:].mean(0)])
    assert torch.allclose(by_three, want, atol=1e-7)


@pytest.mark.parametrize('multiples', [dict(prompt_lr=0.1), dict(backbone_lr=0.1), dict(prompt_lr=2.0, backbone_lr=0.0)])
def test_the_rate_in_the_metrics_is_the_main_one(pictures, multiples):
    with_multiples, plain = (paint(pictures, epochs=2, **kw) for kw in (multiples, {}))
    assert [r['lr'] for r in with_multiples.history] == pytest.approx([r['lr'] for r in plain.history])


# ---- several trainers

@pytest.mark.parametrize('mine, other', [(dict(accumulate=1), dict(accumulate=3)), (dict(accumulate=3), dict(accumulate=1)),
                                         (dict(precision='fp32'), dict(precision='bf16'))], ids=str)
def test_a_trainer_keeps_its_settings_beside_another(pictures, mine, other):
    alone = paint(pictures, batch_size=8, epochs=1, **mine)
    def build(kw): return Trainer(picture_model(), pictures, config=config(lr=2e-3, batch_size=8, epochs=1, **kw), progress=False)
    first, second = build(mine), build(other)
    assert same(alone, first.fit())
    assert same(paint(pictures, batch_size=8, epochs=1, **other), second.fit())


def test_half_precision_is_refused_on_a_cpu():
    with pytest.raises(ValueError, match="'fp16' needs a GPU"): toy(precision='fp16')
