"Shapes-LT: exact counts, the same pixels everywhere, boxes where the objects are"
import hashlib
import subprocess
import sys

import numpy as np
import pytest
import torch

from cprfl.data.benchmarks import load_benchmark
from cprfl.data.longtail import class_counts
from cprfl.data.shapes import (
    COLOURS,
    NUM_TEST,
    NUM_TRAIN,
    SHAPES,
    VOC_LT_COUNTS,
    assign_labels,
    long_tail_counts,
    render_drawing,
    render_scene,
    shapes_classes,
    shapes_lt,
)


def digest(ds): return hashlib.sha256(ds.images.tobytes() + ds.targets.tobytes() + str(ds.boxes).encode()).hexdigest()


@pytest.fixture(scope='module')
def train(): return shapes_lt('train')


@pytest.fixture(scope='module')
def test(): return shapes_lt('test')


# ---- names and counts

def test_profile_is_that_of_voc_lt(train):
    assert len(train) == NUM_TRAIN == 1142 and train.class_counts.tolist() == list(VOC_LT_COUNTS)
    assert {k: len(v) for k, v in train.groups.items()} == dict(head=6, medium=6, tail=8)
    assert train.class_counts.min() == 4 and train.class_counts.max() == 775


def test_test_set_is_balanced_and_has_the_training_sets_groups(train, test):
    assert len(test) == NUM_TEST == 1000 and set(test.class_counts) == {125}
    assert all(np.array_equal(train.groups[k], test.groups[k]) for k in train.groups) and train.classes == test.classes


@pytest.mark.parametrize('num_classes', [20, 42])
def test_classes_are_phrases_in_falling_frequency(num_classes):
    names = shapes_classes(num_classes)
    assert len(set(names)) == num_classes
    assert all(n.split()[0] in COLOURS and n.split()[1] in SHAPES and len(n.split()) == 2 for n in names)
    counts = long_tail_counts(num_classes)
    assert len(counts) == num_classes and (np.diff(counts) <= 0).all() and counts[0] == 775 and counts[-1] == 4


@pytest.mark.parametrize('num_classes', [20, 42])
def test_words_of_tail_classes_occur_in_other_classes_too(num_classes):
    "That is what semantics can carry over"
    names, counts = shapes_classes(num_classes), long_tail_counts(num_classes)
    often = {w for n, c in zip(names, counts) if c >= 20 for w in n.split()}
    rare = {w for n, c in zip(names, counts) if c < 20 for w in n.split()}
    assert rare and rare <= often


@pytest.mark.parametrize('num_classes', [42])
def test_larger_vocabularies(num_classes):
    ds = shapes_lt('train', num_classes=num_classes)
    assert ds.class_counts.tolist() == long_tail_counts(num_classes).tolist() and len(ds.classes) == num_classes
    assert ds.targets.any(1).all() and all(len(v) for v in ds.groups.values())


def test_labels_are_dealt_exactly():
    counts = np.array([45, 30, 12, 5, 1])
    y = assign_labels(np.random.default_rng(0), counts, 60)
    assert y.sum(0).tolist() == counts.tolist() and y.any(1).all() and y.sum(1).max() <= 5
    with pytest.raises(ValueError, match='do not reach all of 100 images'): assign_labels(np.random.default_rng(0), counts, 100)


def test_errors_name_what_there_is():
    with pytest.raises(ValueError, match=r'expected num_classes in \[20, 42\], got 21'): shapes_classes(21)
    with pytest.raises(ValueError, match=r"expected split in \['train', 'test'\], got 'valid'"): shapes_lt('valid')


# ---- the same pixels everywhere

def test_two_calls_give_the_same():
    rng = lambda: np.random.default_rng([7, 1])
    np.random.seed(1)
    a, boxes_a = render_scene(rng(), ['red circle', 'blue star'])
    np.random.seed(2)  # nobody listens to the global generator
    b, boxes_b = render_scene(rng(), ['red circle', 'blue star'])
    assert np.array_equal(a, b) and boxes_a == boxes_b
    assert np.array_equal(render_drawing(rng(), ['red ring']), render_drawing(rng(), ['red ring']))


def test_another_process_draws_the_same(test):
    code = "import hashlib; from cprfl.data.shapes import shapes_lt as s; d = s('test'); " \
           "print(hashlib.sha256(d.images.tobytes() + d.targets.tobytes() + str(d.boxes).encode()).hexdigest())"
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == digest(test)


def test_seeds_and_splits_differ(train, test):
    other = shapes_lt('test', seed=1)
    assert not np.array_equal(other.targets, test.targets) and (other.images != test.images).mean() > 0.5
    assert set(other.class_counts) == {125}
    assert (train.images[:1000] != test.images).mean() > 0.5


# ---- objects and boxes

def test_boxes_lie_inside_the_image_and_name_its_labels(train, test):
    for ds in (train, test):
        for i, boxes in enumerate(ds.boxes):
            ids = [c for c, *_ in boxes]
            assert 1 <= len(boxes) <= 6 and set(ids) == set(np.flatnonzero(ds.targets[i]))
            for _, x0, y0, x1, y1 in boxes: assert 0 <= x0 < x1 <= 64 and 0 <= y0 < y1 <= 64
    sizes = [len(b) for b in train.boxes]
    assert min(sizes) == 1 and max(sizes) >= 5 and any(len({c for c, *_ in b}) < len(b) for b in train.boxes), 'twins occur'


def test_boxes_hold_the_colour_of_their_object(test):
    "Alone in the image, so that no other object of the colour helps; hue by nearest named colour"
    palette = np.array(list(COLOURS.values()), float)
    chroma = lambda rgb: (rgb - rgb.mean(-1, keepdims=True)) / (np.linalg.norm(rgb - rgb.mean(-1, keepdims=True), axis=-1, keepdims=True) + 1e-9)
    rng, right = np.random.default_rng(5), []
    for colour in COLOURS:
        for _ in range(12):
            image, [(x0, y0, x1, y1)] = render_scene(rng, [f'{colour} square'])
            cy, cx = (y0 + y1) // 2, (x0 + x1) // 2
            middle = image[cy - 2:cy + 3, cx - 2:cx + 3].reshape(-1, 3).mean(0)
            right.append(list(COLOURS)[(chroma(palette) @ chroma(middle)).argmax()] == colour)
    assert np.mean(right) > 0.85


class Calm:
    "Dice that always show the middle: plain ground, no noise, so that whatever differs from the ground is the object"
    def integers(self, low, high, size=None): return np.full(size or (), (low + high) // 2)
    def random(self, size=None): return np.full(size or (), 0.4)


@pytest.mark.parametrize('shape', SHAPES)
def test_a_box_is_exactly_where_its_object_is(shape):
    image, [box] = render_scene(Calm(), [f'red {shape}'])
    painted = (image != image[0, 0]).any(-1)
    ys, xs = np.flatnonzero(painted.any(1)), np.flatnonzero(painted.any(0))
    assert box == (xs[0], ys[0], xs[-1] + 1, ys[-1] + 1) and painted.sum() > 50


def test_objects_of_one_image_do_not_hide_each_other(train):
    for boxes in train.boxes:
        for i, (_, a0, b0, a1, b1) in enumerate(boxes):
            for _, c0, d0, c1, d1 in boxes[:i]:
                overlap = max(0, min(a1, c1) - max(a0, c0)) * max(0, min(b1, d1) - max(b0, d0))
                assert overlap < 0.75 * min((a1 - a0) * (b1 - b0), (c1 - c0) * (d1 - d0))


# ---- as a dataset

def test_it_is_a_dataset_like_the_others(train):
    x, y, i = train[3]
    assert x.dtype == torch.uint8 and x.shape == (3, 64, 64) and y.shape == (20,) and i == 3
    part = train.subset([3, 9])
    assert torch.equal(part[0][0], x) and part.boxes == [train.boxes[3], train.boxes[9]] and part.paths[0].endswith('train/00003')
    assert np.array_equal(class_counts(part.targets), part.class_counts)
    again = load_benchmark('shapes-lt', 'train')
    assert np.array_equal(again.targets, train.targets) and len(set(again.paths)) == len(again)


def test_other_sizes():
    image, boxes = render_scene(np.random.default_rng(0), ['red circle', 'green ring'], size=96)
    assert image.shape == (96, 96, 3) and all(x1 <= 96 and y1 <= 96 for _, _, x1, y1 in boxes)
    assert render_drawing(np.random.default_rng(0), ['red circle'], size=32).shape == (32, 32, 3)
