"The trainer: reproducible, and clear about what went wrong"
import numpy as np
import pytest
import torch
from accelerate import PartialState
from safetensors.torch import load_file
from torch import nn
from toys import Head, StopAfter, Toy, build, config, feature_model, paint, picture_model, same, toy

from cprfl.losses import build_loss
from cprfl.train.callbacks import Callback, NonFiniteLoss
from cprfl.train.trainer import EpochSampler, Trainer, build_loader, evaluate, evaluating, predict, total_loss


def losses(trainer): return [row['loss'] for row in trainer.history]


def equal_states(module, state): return all(torch.equal(v, state[k]) for k, v in module.state_dict().items())


# ---- the same seed gives the same numbers

def test_same_seed_same_numbers(pictures):
    a, b = (paint(pictures, epochs=2, augment='paper') for _ in range(2))
    assert same(a, b)
    assert losses(a)[0] != losses(a)[1]


def test_the_seed_matters(): assert not same(toy(), toy(seed=1))


def test_the_global_generators_do_not_matter():
    before = toy()
    torch.manual_seed(99)
    np.random.seed(99)
    torch.rand(7)
    assert same(before, toy())


def test_it_learns():
    trainer = toy(epochs=15)
    assert losses(trainer)[-1] < 0.5 * losses(trainer)[0]
    assert evaluate(trainer.evaluated, Toy())['total'] > 0.9


# ---- the order of the images

def order(n=20, seed=3, epoch=0, targets=None):
    sampler = EpochSampler(n, seed, targets)
    sampler.epoch = epoch
    return list(sampler)


def test_an_epoch_is_a_permutation(): assert sorted(order(20)) == list(range(20))


@pytest.mark.parametrize('targets', [None, Toy(60).targets], ids=['uniform', 'class_aware'])
def test_a_sampler_depends_on_seed_and_epoch(targets):
    assert order(60, 3, 2, targets) == order(60, 3, 2, targets)
    assert len({tuple(order(60, seed, epoch, targets)) for seed, epoch in [(3, 2), (3, 1), (4, 2)]}) == 3


@pytest.mark.parametrize('targets', [None, Toy(60).targets], ids=['uniform', 'class_aware'])
def test_reading_a_sampler_twice_does_not_move_it_on(targets):
    sampler = EpochSampler(60, 3, targets)
    assert list(sampler) == list(sampler)


@pytest.fixture(scope='module')
def drawn():
    "Labels and 20 class-aware epochs; the fourth class has no image, and 45 images have no class"
    targets = np.zeros((600, 4), np.uint8)
    targets[:500, 0] = 1
    targets[500:550, 1] = 1
    targets[550:555, 2] = 1
    epochs = [order(600, 0, epoch, targets) for epoch in range(20)]
    return targets, epochs


def test_a_class_aware_epoch_has_as_many_draws_as_images(drawn):
    _, epochs = drawn
    assert {len(epoch) for epoch in epochs} == {600}


def test_class_aware_sampling_equalises_the_classes(drawn):
    targets, epochs = drawn
    share = targets[np.concatenate(epochs)].mean(0)
    assert share[:3] == pytest.approx([1 / 3] * 3, abs=0.015)
    assert share[3] == 0


def test_class_aware_sampling_draws_no_image_without_a_label(drawn):
    _, epochs = drawn
    assert np.max(epochs) < 555


def test_class_aware_sampling_draws_images_of_a_class_alike(drawn):
    _, epochs = drawn
    tail = np.bincount(np.concatenate(epochs), minlength=600)[550:555]
    assert tail == pytest.approx(np.full(5, 20 * 600 / 15), rel=0.1)


def test_a_higher_power_draws_rare_classes_more_often():
    targets = np.zeros((120, 2), np.uint8)
    targets[:100, 0] = 1
    targets[100:, 1] = 1
    drawn = [list(EpochSampler(120, 0, targets, power)) for power in (0, 1, 1.6)]
    of_class = [np.mean(np.array(epoch) >= 100) for epoch in drawn]
    assert of_class == pytest.approx([1 / 6, 1 / 2, 1 / (1 + 5**-0.6)], abs=0.12)


def test_a_power_of_one_draws_the_same_images():
    targets = Toy(60).targets
    assert list(EpochSampler(60, 3, targets, 1.)) == list(EpochSampler(60, 3, targets))


def test_the_loader_draws_with_the_power_of_the_settings():
    data = Toy(60)
    samplers = [build_loader(data, config(sampler='class_aware', sampler_power=power), torch.device('cpu'))[0]
                for power in (1., 2.)]
    assert samplers[1].weights == EpochSampler(60, 0, data.targets, 2.).weights != samplers[0].weights


def test_class_aware_sampling_needs_a_label():
    with pytest.raises(ValueError, match='class_aware.*none of the 5 images carries a class'):
        EpochSampler(5, targets=np.zeros((5, 3), np.uint8))


class Noting(Toy):
    "Remembers which images were asked for"
    def __init__(self, **kw):
        super().__init__(**kw)
        self.seen = []

    def __getitem__(self, i):
        self.seen.append(int(i))
        return super().__getitem__(i)


@pytest.fixture
def few():
    "Labels of 64 images: a head class, two smaller ones, and 12 images without a label"
    targets = np.zeros((64, 3), np.uint8)
    targets[:40, 0] = 1
    targets[38:50, 1] = 1
    targets[49:52, 2] = 1
    return targets


def test_class_aware_training_resumes_bit_for_bit(tmp_path, few):
    a, b, c = (Noting(targets=few) for _ in range(3))
    settings = dict(sampler='class_aware', epochs=4)
    whole = toy(data=a, **settings)
    toy(tmp_path, [StopAfter(2)], data=b, **settings)
    resumed = toy(tmp_path, data=c, resume=True, **settings)
    assert same(whole, resumed)
    assert a.seen == b.seen + c.seen
    assert len(c.seen) == 2 * 64


def test_class_aware_training_shows_what_the_sampler_draws(few):
    data = Noting(targets=few)
    toy(data=data, sampler='class_aware', epochs=2)
    assert max(data.seen) < 52
    assert data.seen[:64] != data.seen[64:]


def test_the_sampler_matters(few):
    assert not same(toy(data=Toy(targets=few), sampler='class_aware'), toy(data=Toy(targets=few)))


# ---- the moving average

def test_ema_is_the_average_that_one_computes_by_hand():
    seen = []
    class Watch(Callback):
        def before_fit(self, trainer): seen.append(trainer.model.fc.weight.detach().double())
        def after_batch(self, trainer): seen.append(trainer.model.fc.weight.detach().double())
    trainer = toy(callbacks=[Watch()], ema=0.6, epochs=10)
    average, decays = seen[0], []
    for step, weights in enumerate(seen[1:]):
        k = max(0, step - 1)
        decays.append(min(0.6, 1 - 1 / (1 + k / 10))) # it warms up, so that the first weights are forgotten
        average = decays[-1] * average + (1 - decays[-1]) * weights
    assert decays[0] == 0
    assert decays[-1] == 0.6
    assert torch.allclose(trainer.evaluated.fc.weight.double(), average, atol=1e-6)
    assert not torch.allclose(average, seen[-1], atol=1e-4)


def test_a_frozen_backbone_changes_nothing_in_the_average():
    with_backbone = Head()
    with_backbone.backbone = nn.Linear(4, 4).requires_grad_(False)
    a, b = toy(model=with_backbone, ema=0.6), toy(ema=0.6)
    assert a.frozen
    assert torch.equal(a.evaluated.fc.weight, b.evaluated.fc.weight)
    assert a.evaluated.backbone is not None


def test_without_ema_the_model_itself_is_evaluated():
    trainer = toy(ema=0)
    assert trainer.evaluated is trainer.model


def test_ema_is_not_run_at_a_training_step():
    calls = []
    class Count(Callback):
        def before_fit(self, trainer): trainer.evaluated.register_forward_hook(lambda *a: calls.append(1))
    trainer = toy(callbacks=[Count()], epochs=1)
    assert trainer.evaluated is not trainer.model
    assert not calls


# ---- rates and gradients

class Rates(Callback):
    "The rate of each parameter group at every step"
    def __init__(self): self.seen = []

    def before_fit(self, trainer):
        def note(optimizer, *args): self.seen.append([group['lr'] for group in optimizer.param_groups])
        trainer.optimizer.optimizer.register_step_pre_hook(note)


@pytest.fixture(scope='module')
def scheduled(pictures):
    "Rates [12 steps, 4 groups] of a training, and which groups are the backbone's"
    rates = Rates()
    trainer = paint(pictures, callbacks=[rates], lr=1e-3, backbone_lr=0.1, warmup=0.5, epochs=4)
    names = {p: name for name, p in trainer.model.named_parameters()}
    backbone = [names[group['params'][0]].startswith('backbone.') for group in trainer.optimizer.param_groups]
    return np.array(rates.seen), np.array(backbone)


def test_each_group_reaches_its_rate(scheduled):
    rates, backbone = scheduled
    assert rates.shape == (4 * 3, 4)
    assert rates.max(0) == pytest.approx(np.where(backbone, 1e-4, 1e-3), rel=0.05)


def test_groups_keep_their_ratio_through_the_schedule(scheduled):
    rates, backbone = scheduled
    assert rates[:, backbone] * 10 == pytest.approx(rates[:, ~backbone])


def test_rates_rise_and_fall(scheduled):
    rates, _ = scheduled
    assert rates[0].max() < rates[5].max() > rates[-1].max()


@pytest.mark.parametrize('epochs, warmup', [(1, 0.5), (9, 0.1), (1, 0.1), (2, 0), (2, 1)])
def test_schedules_of_few_steps(epochs, warmup):
    trainer = toy(data=Toy(16), epochs=epochs, warmup=warmup)
    assert trainer.epoch == epochs
    assert np.isfinite(losses(trainer)[-1])


MULTIPLES = [dict(prompt_lr=0.1), dict(backbone_lr=0.1), dict(prompt_lr=2.0, backbone_lr=0.0)]


@pytest.mark.parametrize('multiples', MULTIPLES, ids=str)
def test_the_rate_in_the_metrics_is_the_main_one(pictures, painted, multiples):
    trainer = paint(pictures, **multiples)
    assert [row['lr'] for row in trainer.history] == pytest.approx([row['lr'] for row in painted.history])


def test_accumulating_two_batches_is_one_of_twice_the_size():
    a, b = toy(ema=0, batch_size=8, accumulate=2), toy(ema=0, batch_size=16)
    assert len(a.loader) == 2 * len(b.loader)
    assert a.steps == b.steps
    assert torch.allclose(a.model.fc.weight, b.model.fc.weight, atol=1e-6)
    assert not torch.allclose(a.model.fc.weight, Head().fc.weight, atol=1e-2)
    assert losses(a) == pytest.approx(losses(b), rel=1e-5)


class Gradients(Callback):
    "The gradient of every step"
    def __init__(self): self.seen = []

    def before_step(self, trainer):
        self.seen.append(torch.cat([p.grad.flatten() for p in trainer.model.parameters()]).clone())


def gradients(**settings):
    "Gradients [steps, weights] of an epoch whose steps change nothing: five batches"
    watch = Gradients()
    toy(callbacks=[watch], data=Toy(80), epochs=1, lr=0., ema=0, **settings)
    return torch.stack(watch.seen)


def test_a_last_shorter_group_gets_its_full_gradient():
    "Five batches in groups of three: the last two are averaged over two, not over three"
    each = gradients()
    want = torch.stack([each[:3].mean(0), each[3:].mean(0)])
    assert torch.allclose(gradients(accumulate=3), want, atol=1e-7)


class Norms(Callback):
    "The norm of the gradient that each step of the optimiser uses"
    def __init__(self): self.seen = []

    def before_fit(self, trainer):
        def note(optimizer, *args):
            norms = [p.grad.norm() for group in optimizer.param_groups for p in group['params']]
            self.seen.append(torch.stack(norms).norm().item())
        trainer.optimizer.optimizer.register_step_pre_hook(note)


def largest_norm(**settings):
    norms = Norms()
    toy(callbacks=[norms], epochs=1, **settings)
    return max(norms.seen)


def test_gradients_are_not_clipped_by_default(): assert largest_norm() > 0.05


def test_gradients_are_clipped(): assert largest_norm(clip_grad=0.01) == pytest.approx(0.01, rel=1e-3)


# ---- precision

@pytest.fixture(scope='module', params=['bf16', 'fp32'])
def trained(request, pictures): return paint(pictures, precision=request.param, epochs=1)


def test_any_precision_trains(trained): assert np.isfinite(losses(trained)[-1])


def test_any_precision_keeps_float32_weights(trained):
    assert {p.dtype for p in trained.model.parameters()} == {torch.float32}


def test_any_precision_predicts_in_float32(trained, pictures):
    logits = predict(trained.evaluated, pictures, accelerator=trained.accelerator)
    assert logits.dtype == torch.float32
    assert logits.isfinite().all()
    assert len(logits.unique()) > 0.99 * logits.numel(), 'scores of half precision would tie'


def test_half_precision_is_refused_on_a_cpu():
    with pytest.raises(ValueError, match="'fp16' needs a GPU"): toy(precision='fp16')


# ---- losses

REGISTERED = [dict(loss='bce'), dict(loss='db_focal'), dict(loss='asl', loss_args=dict(gamma_neg=2))]


@pytest.mark.parametrize('settings', REGISTERED, ids=str)
def test_any_loss_of_the_registry(settings): assert np.isfinite(losses(toy(epochs=1, **settings))[-1])


def test_the_default_loss(): assert type(build().loss_func) is type(build_loss('asl'))


def test_a_loss_of_ones_own():
    class Squares(nn.Module):
        def forward(self, logits, targets): return (logits - targets).square().mean()
    trainer = Trainer(Head(), Toy(), config=config(epochs=8), loss=Squares(), progress=False).fit()
    assert losses(trainer)[-1] < losses(trainer)[0]


# ---- two paths

def test_two_paths_have_a_loss_each():
    "With the global path the model gives two logits while it trains, and their losses add up"
    model, (x, y, _) = feature_model(dropout=0., global_path=True), Toy()[0]
    loss_func = build_loss('asl')
    both = model.train()(x[None])
    each = [loss_func(logits, y[None]).item() for logits in both]
    assert total_loss(loss_func, both, y[None]).item() == pytest.approx(sum(each), rel=1e-6)


def test_two_paths_are_averaged_in_a_prediction():
    model, (x, _, _) = feature_model(dropout=0., global_path=True), Toy()[0]
    assert torch.allclose(model.eval()(x[None]), sum(model.train()(x[None])) / 2, atol=1e-6)


def test_two_paths_train():
    trainer = toy(model=feature_model(dropout=0., global_path=True), epochs=1)
    assert torch.isfinite(predict(trainer.evaluated, Toy())).all()


def test_the_device_of_a_model_is_that_of_its_buffers():
    model = nn.Module()
    model.register_buffer('table', torch.zeros(2, device='meta'))
    with evaluating(model) as device: assert device.type == 'meta'


def test_a_model_without_tensors_is_on_the_cpu():
    with evaluating(nn.Identity()) as device: assert device.type == 'cpu'


# ---- few images, few classes

@pytest.mark.parametrize('B, C', [(1, 3), (16, 1), (1, 1)])
def test_batch_of_one_and_one_class(B, C):
    trainer = toy(data=Toy(12, C), model=Head(C), batch_size=B, epochs=1)
    assert np.isfinite(losses(trainer)[-1])
    assert predict(trainer.evaluated, Toy(12, C), B).shape == (12, C)


def test_images_in_batches_of_one_and_of_one_class(pictures):
    one = pictures.subset(range(3))
    one.targets = one.targets[:, :1]
    one.classes = one.classes[:1]
    one.groups = dict(head=np.array([0]), medium=np.array([], int), tail=np.array([], int))
    trainer = paint(one, batch_size=1, epochs=1, model=picture_model(C=1))
    assert np.isfinite(losses(trainer)[-1])


@pytest.mark.parametrize('n', [5, 20])
def test_fewer_images_than_two_batches_make_one_batch(n): assert len(toy(data=Toy(n)).loader) == 1


# ---- a frozen backbone

@pytest.fixture
def frozen():
    "A model with a frozen backbone, and its first weights"
    model = picture_model()
    model.backbone.requires_grad_(False)
    return model, {k: v.clone() for k, v in model.backbone.state_dict().items()}


def test_a_frozen_backbone_stays_as_it_is(pictures, frozen):
    model, before = frozen
    trainer = paint(pictures, model=model, epochs=1)
    assert trainer.frozen
    assert equal_states(trainer.model.backbone, before)
    assert equal_states(trainer.evaluated.backbone, before)


def test_a_frozen_backbone_is_not_saved(pictures, tmp_path, frozen):
    paint(pictures, tmp_path, model=frozen[0], epochs=1)
    assert not [name for name in load_file(tmp_path / 'last.safetensors') if name.startswith('backbone.')]


def test_a_prediction_in_mid_epoch_leaves_a_backbone_frozen(pictures, frozen):
    class Peek(Callback):
        def after_batch(self, trainer): predict(trainer.model, pictures.subset(range(4)))
    model, before = frozen
    paint(pictures, callbacks=[Peek()], model=model, epochs=1, ema=0.)
    assert equal_states(model.backbone, before)
    assert model.fc.weight.requires_grad


# ---- several trainers

PAIRS = [(dict(accumulate=1), dict(accumulate=3)), (dict(accumulate=3), dict(accumulate=1)),
         (dict(precision='fp32'), dict(precision='bf16'))]


@pytest.mark.parametrize('mine, other', PAIRS, ids=str)
def test_a_trainer_keeps_its_settings_beside_another(pictures, mine, other):
    shared = dict(lr=2e-3, batch_size=8, epochs=1)
    alone = [build(picture_model(), pictures, **shared, **settings).fit() for settings in (mine, other)]
    beside = [build(picture_model(), pictures, **shared, **settings) for settings in (mine, other)]
    assert same(alone[0], beside[0].fit())
    assert same(alone[1], beside[1].fit())


def test_a_trainer_does_not_inherit_the_device_of_another():
    toy(epochs=1)
    PartialState().device = torch.device('meta')
    assert toy(epochs=1, device='cpu').accelerator.device.type == 'cpu'


# ---- callbacks, progress, and when something goes wrong

def test_a_loss_that_is_no_number_names_its_images():
    data = Toy(64)
    data.x[13] = float('nan')
    words = r'the loss is nan in epoch 1, step \d; the images of the batch: '
    with pytest.raises(NonFiniteLoss, match=words) as error: toy(data=data)
    names = str(error.value).rpartition('batch: ')[2].split(', ')
    assert 'toy/013' in names
    assert len(names) == 16
    assert set(names) <= set(data.paths)


EVENTS = 'before_fit', 'before_epoch', 'after_batch', 'after_epoch', 'after_fit'
ERRORS = [(ValueError, ['no luck']), (OSError, [28, 'no luck']), (KeyError, ['no luck'])]


@pytest.mark.parametrize('event', EVENTS)
@pytest.mark.parametrize('kind, args', ERRORS, ids=['ValueError', 'OSError', 'KeyError'])
def test_a_failing_callback_is_named_with_its_event(event, kind, args):
    error = kind(*args)
    def fail(self, trainer): raise error
    fails = type('Fails', (Callback,), {event: fail})
    with pytest.raises((kind, RuntimeError), match=f'Fails.{event}: .*no luck') as raised:
        toy(callbacks=[fails()], epochs=1)
    assert error in (raised.value, raised.value.__cause__)


def test_callbacks_see_every_event_in_order():
    seen = []
    def watching(event): return lambda self, trainer: seen.append(event)
    kind = type('Watch', (Callback,), {event: watching(event) for event in EVENTS})
    toy(callbacks=[kind()], epochs=2, batch_size=32)
    epoch = ['before_epoch', 'after_batch', 'after_batch', 'after_epoch']
    assert seen == ['before_fit', *epoch, *epoch, 'after_fit']


def test_progress_is_one_bar(capsys):
    Trainer(Head(), Toy(), config=config(epochs=2), progress=True).fit()
    shown = capsys.readouterr().err
    for words in ('train: 100%', '8/8', 'loss='): assert words in shown
