"What every dataset has, wherever its pixels come from"
import numpy as np
import pytest
import torch

from cprfl.data.dataset import ArrayDataset, LongTailDataset, read_image, resize
from cprfl.data.images import BadDataError


@pytest.fixture
def five():
    "Five images of two classes, no two pixels alike"
    pixels = np.arange(5 * 4 * 4 * 3, dtype=np.uint8).reshape(5, 4, 4, 3)
    targets = [[1, 0], [1, 1], [0, 0], [1, 0], [0, 1]]
    return ArrayDataset(pixels, targets, ['cat', 'dog'], boxes=list('vwxyz'))


def test_counts_and_groups_follow_from_the_targets(five):
    assert five.targets.dtype == np.uint8
    assert five.class_counts.tolist() == [3, 2]
    assert {name: len(ids) for name, ids in five.groups.items()} == {'head': 0, 'medium': 0, 'tail': 2}


def test_a_sample_is_image_target_and_index(five):
    image, target, index = five[-1]
    assert image.dtype == torch.uint8
    assert torch.equal(image, torch.from_numpy(five.images[4]).permute(2, 0, 1))
    assert target.dtype == torch.float32
    assert target.tolist() == [0, 1]
    assert index == 4
    assert type(index) is int


def test_there_is_no_sample_behind_the_last(five):
    with pytest.raises(IndexError): five[5]


def test_a_changed_sample_leaves_the_dataset_alone(five):
    before = five.images.copy()
    image, _, _ = five[4]
    image += 1
    assert np.array_equal(five.images, before)


# ---- subsets

@pytest.mark.parametrize('pick', [[3, 1], np.array([3, 1]), torch.tensor([3, 1]), [-2, 1]])
def test_a_subset_keeps_groups_and_order(five, pick):
    part = five.subset(pick)
    assert part.paths == [five.paths[3], five.paths[1]]
    assert part.boxes == ['y', 'w']
    assert len(part.images) == 2
    assert part.class_counts.tolist() == [2, 1]
    assert part.groups is five.groups
    assert len(five) == 5


def test_a_subset_by_mask(five):
    assert five.subset([True, False, True, False, False]).paths == [five.paths[0], five.paths[2]]


def test_an_empty_subset(five):
    assert len(five.subset([])) == 0
    assert five.subset([]).class_counts.tolist() == [0, 0]


def test_a_subset_of_images_that_are_not_there(five):
    with pytest.raises(IndexError): five.subset([7])


# ---- what does not fit

PIXELS = np.zeros((2, 2, 2, 3), np.uint8)


@pytest.mark.parametrize('pixels, targets, classes, why', [
    (PIXELS, np.zeros((3, 2)), list('abc'), r'\[2, 3\], got \[3, 2\]'),
    (PIXELS, [[2], [0]], ['a'], 'expected 0 or 1, got 2'),
    (PIXELS, [[0, 0], [0, 0]], ['a', 'a'], "got 'a' more than once"),
    (PIXELS.astype(float), [[0], [0]], ['a'], r'uint8 \[N, H, W, 3\], got float64')])
def test_a_dataset_refuses_what_does_not_fit(pixels, targets, classes, why):
    with pytest.raises(ValueError, match=why): ArrayDataset(pixels, targets, classes)


def test_boxes_are_needed_for_every_image_or_none():
    with pytest.raises(ValueError, match='boxes: expected 2 entries, got 1'):
        ArrayDataset(PIXELS, [[0], [0]], ['a'], boxes=[1])


# ---- files

def test_a_loader_batches_transformed_files(root):
    ds = LongTailDataset(['a.jpg', 'e.png'], [[1, 0], [0, 1]], ['x', 'y'], root=root, transform=resize(20))
    images, targets, index = next(iter(torch.utils.data.DataLoader(ds, batch_size=2)))
    assert images.shape == (2, 3, 20, 20)
    assert images.dtype == torch.uint8
    assert targets.tolist() == [[1, 0], [0, 1]]
    assert index.tolist() == [0, 1]


def test_without_a_root_paths_are_taken_as_they_are(root):
    ds = LongTailDataset([root/'a.jpg'], [[1]], ['x'])
    assert torch.equal(ds[0][0], read_image(root/'a.jpg'))


def test_a_missing_file_is_named(root):
    ds = LongTailDataset(['none.jpg'], [[1]], ['x'], root=root)
    with pytest.raises(BadDataError, match='none.jpg'): ds[0]


def test_a_subclass_reads_lists_as_itself(root):
    class Mine(LongTailDataset): pass
    (root/'list.txt').write_text('a.jpg 0\n')
    assert type(Mine.from_list(root/'list.txt', ['cat'])) is Mine
