"Augmentation: what each operation does, and that every draw repeats itself"
import pytest
import torch
from torchvision.transforms import v2
from toys import paint

from cprfl.train.augment import POLICIES, BatchAugment, _rand_augment, random_cutout, random_flip, random_shift


def generator(): return torch.Generator().manual_seed(0)


def batch(B=8): return torch.randint(256, (B, 3, 16, 16), generator=generator(), dtype=torch.uint8)


# ---- policies

@pytest.mark.parametrize('policy', POLICIES)
def test_a_policy_keeps_shape_and_type(policy):
    x = batch()
    y = BatchAugment(policy, seed=1)(x, epoch=2, step=3)
    assert y.shape == x.shape
    assert y.dtype == torch.uint8


@pytest.mark.parametrize('policy', POLICIES)
def test_a_policy_leaves_its_input_alone(policy):
    x = batch()
    BatchAugment(policy, seed=1)(x, epoch=2, step=3)
    assert torch.equal(x, batch())


@pytest.mark.parametrize('policy', POLICIES)
def test_a_policy_repeats_itself(policy):
    first, again = (BatchAugment(policy, seed=1)(batch(), epoch=2, step=3) for _ in range(2))
    assert torch.equal(first, again)


@pytest.mark.parametrize('seed, epoch, step', [(2, 2, 3), (1, 3, 3), (1, 2, 4)])
@pytest.mark.parametrize('policy', [p for p in POLICIES if p != 'none'])
def test_a_policy_depends_on_seed_epoch_and_step(policy, seed, epoch, step):
    y = BatchAugment(policy, seed=1)(batch(), epoch=2, step=3)
    assert not torch.equal(y, BatchAugment(policy, seed=seed)(batch(), epoch=epoch, step=step))


def test_the_policy_none_changes_nothing():
    assert torch.equal(BatchAugment('none', seed=1)(batch(), epoch=2, step=3), batch())


def test_augmentation_leaves_the_global_generator_alone():
    torch.manual_seed(0)
    want = torch.rand(1)
    torch.manual_seed(0)
    BatchAugment('paper')(batch())
    assert torch.equal(torch.rand(1), want)


def test_an_unknown_policy_is_refused():
    with pytest.raises(ValueError, match="augment: expected one of .*got 'mixup'"): BatchAugment('mixup')


def test_a_training_is_augmented(pictures, painted):
    assert paint(pictures, augment='none', epochs=1).history[0]['loss'] != painted.history[0]['loss']


# ---- operations

def test_a_flip_mirrors_half_of_the_images():
    x = batch(64)
    y = random_flip(x, generator())
    mirrored = (y == x.flip(3)).flatten(1).all(1)
    kept = (y == x).flatten(1).all(1)
    assert (mirrored ^ kept).all()
    assert 16 < mirrored.sum() < 48


def test_a_flip_of_all_images_along_another_axis():
    x = batch(64)
    assert torch.equal(random_flip(x, generator(), p=1., dim=2), x.flip(2))


def test_a_flip_of_no_image():
    x = batch(64)
    assert torch.equal(random_flip(x, generator(), p=0.), x)


def test_a_shift_moves_pixels_and_loses_none():
    x = batch(64)
    y = random_shift(x, generator(), 0.25)
    assert not torch.equal(y, x)
    assert torch.equal(y.flatten(2).sort(2).values, x.flatten(2).sort(2).values)


def test_cutout_fills_with_grey_in_all_channels():
    y = random_cutout(torch.zeros_like(batch(64)), generator(), p=1.)
    assert set(y.unique().tolist()) == {0, 118}
    assert (y[:, 0] == y[:, 1]).all()


def test_cutout_of_all_images():
    y = random_cutout(torch.zeros_like(batch(64)), generator(), p=1.)
    assert y.flatten(1).any(1).all()


def test_cutout_of_no_image():
    assert not random_cutout(torch.zeros_like(batch(64)), generator(), p=0.).any()


# ---- RandAugment

def one_by_one(x, generator):
    "RandAugment as torchvision applies it, image by image"
    seed = int(torch.randint(2**31, (), generator=generator))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return torch.stack([v2.RandAugment()(image) for image in x])


def test_rand_augment_of_a_batch_is_that_of_its_images():
    "Bit for bit: the batch is so large that every operation is drawn, in both directions"
    x = torch.randint(256, (200, 3, 32, 40), generator=generator(), dtype=torch.uint8)
    assert torch.equal(_rand_augment(x, generator()), one_by_one(x, generator()))


def test_rand_augment_applies_each_operation_once(monkeypatch):
    calls = []
    apply = v2.RandAugment._apply_image_or_video_transform
    note = lambda op, x, name, strength, *a: calls.append((name, strength)) or apply(op, x, name, strength, *a)
    monkeypatch.setattr(v2.RandAugment, '_apply_image_or_video_transform', note)
    _rand_augment(batch(500), generator())
    first, second = calls[:23], calls[23:]
    assert len(set(first)) == len(set(second)) == 23
