"Shapes-LT: exact counts, the same pixels everywhere, boxes where the objects are"
import hashlib
import subprocess
import sys

import numpy as np
import pytest
import torch

from cprfl.data.benchmarks import load_benchmark
from cprfl.data.shapes import (
    COLOURS,
    NUM_TEST,
    NUM_TRAIN,
    SHAPES,
    assign_labels,
    long_tail_counts,
    render_drawing,
    render_scene,
    shapes_classes,
    shapes_lt,
)


def digest(ds):
    return hashlib.sha256(ds.images.tobytes() + ds.targets.tobytes() + str(ds.boxes).encode()).hexdigest()


@pytest.fixture(scope='module')
def train(): return shapes_lt('train')


@pytest.fixture(scope='module')
def test(): return shapes_lt('test')


@pytest.fixture(params=['train', 'test'])
def split(request): return request.getfixturevalue(request.param)


# ---- names and counts

def test_sizes_of_the_splits(train, test):
    assert (len(train), len(test)) == (NUM_TRAIN, NUM_TEST) == (1142, 1000)


def test_the_splits_agree_on_classes_and_groups(train, test):
    assert train.classes == test.classes
    assert all(np.array_equal(train.groups[name], test.groups[name]) for name in train.groups)


@pytest.mark.parametrize('num_classes', [20, 42])
def test_class_names_are_a_colour_and_a_shape(num_classes):
    pairs = [name.split() for name in shapes_classes(num_classes)]
    assert len({tuple(pair) for pair in pairs}) == num_classes
    assert {colour for colour, _ in pairs} <= set(COLOURS)
    assert {shape for _, shape in pairs} <= set(SHAPES)


@pytest.mark.parametrize('num_classes', [20, 42])
def test_class_counts_fall(num_classes):
    counts = long_tail_counts(num_classes)
    assert len(counts) == num_classes
    assert (np.diff(counts) <= 0).all()
    assert (counts[0], counts[-1]) == (775, 4)


@pytest.mark.parametrize('num_classes', [20, 42])
def test_words_of_tail_classes_occur_in_other_classes(num_classes):
    "That is what semantics can carry over"
    names, counts = shapes_classes(num_classes), long_tail_counts(num_classes)
    often = {word for name, n in zip(names, counts) if n >= 20 for word in name.split()}
    rare = {word for name, n in zip(names, counts) if n < 20 for word in name.split()}
    assert rare
    assert rare <= often


def test_a_larger_vocabulary():
    ds = shapes_lt('train', num_classes=42)
    assert len(ds.classes) == 42
    assert ds.class_counts.tolist() == long_tail_counts(42).tolist()
    assert ds.targets.any(1).all()
    assert all(len(ids) for ids in ds.groups.values())


def test_labels_are_dealt_exactly():
    counts = np.array([45, 30, 12, 5, 1])
    y = assign_labels(np.random.default_rng(0), counts, 60)
    assert y.sum(0).tolist() == counts.tolist()
    assert y.any(1).all()
    assert y.sum(1).max() <= 5


def test_too_few_labels_for_all_images_are_refused():
    with pytest.raises(ValueError, match='do not reach all of 100 images'):
        assign_labels(np.random.default_rng(0), np.array([45, 30, 12, 5, 1]), 100)


def test_an_unknown_split_is_refused():
    with pytest.raises(ValueError, match="expected one of train, test, got 'valid'"): shapes_lt('valid')


# ---- the same pixels everywhere

def test_drawing_ignores_the_global_generator():
    np.random.seed(1)
    image, boxes = render_scene(np.random.default_rng([7, 1]), ['red circle', 'blue star'])
    np.random.seed(2)
    again, same_boxes = render_scene(np.random.default_rng([7, 1]), ['red circle', 'blue star'])
    assert np.array_equal(image, again)
    assert boxes == same_boxes


def test_a_drawing_repeats_itself():
    once, again = (render_drawing(np.random.default_rng([7, 1]), ['red ring']) for _ in range(2))
    assert np.array_equal(once, again)


def test_another_process_draws_the_same(test):
    code = """
import hashlib
from cprfl.data.shapes import shapes_lt
ds = shapes_lt('test')
print(hashlib.sha256(ds.images.tobytes() + ds.targets.tobytes() + str(ds.boxes).encode()).hexdigest())"""
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == digest(test)


def test_another_seed_is_another_benchmark(test):
    other = shapes_lt('test', seed=1)
    assert not np.array_equal(other.targets, test.targets)
    assert (other.images != test.images).mean() > 0.5
    assert set(other.class_counts) == {125}


def test_the_splits_show_different_images(train, test):
    assert (train.images[:1000] != test.images).mean() > 0.5


# ---- objects and boxes

def test_boxes_lie_inside_the_image(split):
    for boxes in split.boxes:
        for _, x0, y0, x1, y1 in boxes:
            assert 0 <= x0 < x1 <= 64
            assert 0 <= y0 < y1 <= 64


def test_boxes_name_the_labels_of_the_image(split):
    for boxes, target in zip(split.boxes, split.targets):
        assert {c for c, *_ in boxes} == set(np.flatnonzero(target))


def test_images_have_one_to_six_objects(split):
    assert {len(boxes) for boxes in split.boxes} == {1, 2, 3, 4, 5, 6}


def test_a_label_may_have_two_objects(train):
    assert any(len({c for c, *_ in boxes}) < len(boxes) for boxes in train.boxes)


def unit(colour):
    "The hue of colours [..., 3], without lightness and strength"
    chroma = colour - colour.mean(-1, keepdims=True)
    return chroma / (np.linalg.norm(chroma, axis=-1, keepdims=True) + 1e-9)


def test_boxes_hold_the_colour_of_their_object():
    "One object in an image, so that no other of the same colour helps; hue by nearest named colour"
    palette = unit(np.array(list(COLOURS.values()), float))
    rng, right = np.random.default_rng(5), []
    for i, colour in enumerate(COLOURS):
        for _ in range(12):
            image, [(x0, y0, x1, y1)] = render_scene(rng, [f'{colour} square'])
            cy, cx = (y0 + y1) // 2, (x0 + x1) // 2
            middle = image[cy - 2:cy + 3, cx - 2:cx + 3].reshape(-1, 3).mean(0)
            right.append((palette @ unit(middle)).argmax() == i)
    assert np.mean(right) > 0.85


class Calm:
    "A generator that always gives the middle: plain ground, and all that differs from it is the object"
    def integers(self, low, high, size=None): return np.full(size or (), (low + high) // 2)
    def random(self, size=None): return np.full(size or (), 0.4)


@pytest.mark.parametrize('shape', SHAPES)
def test_a_box_is_exactly_where_its_object_is(shape):
    image, [box] = render_scene(Calm(), [f'red {shape}'])
    painted = (image != image[0, 0]).any(-1)
    ys, xs = np.flatnonzero(painted.any(1)), np.flatnonzero(painted.any(0))
    assert box == (xs[0], ys[0], xs[-1] + 1, ys[-1] + 1)
    assert painted.sum() > 50


def overlap(a, b):
    "Common area of two boxes, as a share of the smaller one"
    (_, a0, b0, a1, b1), (_, c0, d0, c1, d1) = a, b
    common = max(0, min(a1, c1) - max(a0, c0)) * max(0, min(b1, d1) - max(b0, d0))
    return common / min((a1 - a0) * (b1 - b0), (c1 - c0) * (d1 - d0))


def test_objects_of_one_image_do_not_hide_each_other(train):
    for boxes in train.boxes:
        for i, box in enumerate(boxes):
            for other in boxes[:i]: assert overlap(box, other) < 0.75


# ---- as a dataset

def test_samples_are_like_those_of_other_datasets(train):
    x, y, i = train[3]
    assert x.dtype == torch.uint8
    assert x.shape == (3, 64, 64)
    assert y.shape == (20,)
    assert i == 3


def test_a_subset_keeps_pixels_boxes_and_names(train):
    part = train.subset([3, 9])
    assert torch.equal(part[0][0], train[3][0])
    assert part.boxes == [train.boxes[3], train.boxes[9]]
    assert part.paths[0].endswith('train/00003')


def test_it_is_a_benchmark_with_unique_names(train):
    again = load_benchmark('shapes-lt', 'train')
    assert np.array_equal(again.targets, train.targets)
    assert len(set(again.paths)) == len(again)


def test_a_scene_of_another_size():
    image, boxes = render_scene(np.random.default_rng(0), ['red circle', 'green ring'], size=96)
    assert image.shape == (96, 96, 3)
    assert all(x1 <= 96 and y1 <= 96 for _, _, x1, y1 in boxes)


def test_a_drawing_of_another_size():
    assert render_drawing(np.random.default_rng(0), ['red circle'], size=32).shape == (32, 32, 3)
