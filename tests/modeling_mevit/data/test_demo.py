# Copyright 2026 The MEViT authors.
# SPDX-License-Identifier: Apache-2.0
"""Tests of the drawn data set: what it depends on, and how far its classes are apart."""

from collections import Counter
from itertools import combinations

import numpy as np
import pytest
from PIL import Image

from modeling_mevit.data.demo import CLASS_NAMES, demo_images, draw_aircraft


pytestmark = pytest.mark.one_major


SIZE = 64
LABEL_PAIRS = list(combinations(range(len(CLASS_NAMES)), 2))


def family(label: int) -> str:
    return CLASS_NAMES[label].split("-")[0]


def as_bytes(images: list[Image.Image]) -> list[bytes]:
    return [image.tobytes() for image in images]


def same_scene(seed: int) -> np.ndarray:
    """Every class in one pose, light and background: pixel values, integer array `(classes, SIZE, SIZE, 3)`."""
    return np.stack(
        [
            np.asarray(draw_aircraft(label, np.random.default_rng(seed), SIZE), dtype=int)
            for label in range(len(CLASS_NAMES))
        ]
    )


def test_there_are_four_families_of_three_variants():
    assert len(set(CLASS_NAMES)) == len(CLASS_NAMES) == 12
    assert set(Counter(map(family, range(12))).values()) == {3}
    assert len({family(label) for label in range(12)}) == 4


def test_same_arguments_give_the_same_bytes():
    first, first_labels = demo_images(3, seed=5, size=SIZE)
    second, second_labels = demo_images(3, seed=5, size=SIZE)
    assert as_bytes(first) == as_bytes(second)
    assert first_labels == second_labels


def test_drawing_more_samples_leaves_earlier_ones_as_they_were():
    few, _ = demo_images(2, seed=5, size=SIZE)
    many, _ = demo_images(5, seed=5, size=SIZE)
    for label in range(len(CLASS_NAMES)):
        assert as_bytes(few[2 * label : 2 * label + 2]) == as_bytes(many[5 * label : 5 * label + 2])


def test_an_image_follows_from_seed_label_and_index():
    images, _ = demo_images(3, seed=5, size=SIZE)
    alone = draw_aircraft(7, np.random.default_rng([5, 7, 2]), SIZE)
    assert alone.tobytes() == images[3 * 7 + 2].tobytes()


@pytest.mark.parametrize("size", [48, 65, 96])
def test_images_are_rgb_and_of_the_size_asked_for(size):
    images, _ = demo_images(1, seed=0, size=size)
    assert {(image.mode, image.size) for image in images} == {("RGB", (size, size))}


def test_default_size_is_96_pixels():
    assert draw_aircraft(0, np.random.default_rng(0)).size == (96, 96)


def test_labels_are_balanced_and_ordered_by_class():
    images, labels = demo_images(4, seed=0, size=SIZE)
    assert labels == sorted(labels)
    assert Counter(labels) == {label: 4 for label in range(len(CLASS_NAMES))}
    assert len(images) == len(labels)


def test_no_two_images_are_equal_within_or_across_seeds():
    train, _ = demo_images(20, seed=0, size=SIZE)
    test, _ = demo_images(20, seed=1, size=SIZE)
    assert len(set(as_bytes(train + test))) == len(train) + len(test)


def test_images_of_a_class_differ_in_most_of_their_pixels():
    images, _ = demo_images(6, seed=0, size=SIZE)
    for label in range(len(CLASS_NAMES)):
        of_class = [np.asarray(image) for image in images[6 * label : 6 * label + 6]]
        for one, other in combinations(of_class, 2):
            assert (one != other).any(axis=-1).mean() > 0.9


def test_variants_differ_in_under_5_percent_of_the_pixels_and_families_in_over_8():
    scenes = np.stack([same_scene(seed) for seed in range(12)], axis=1)
    apart = {pair: (scenes[pair[0]] != scenes[pair[1]]).any(axis=-1).mean() for pair in LABEL_PAIRS}
    variants = [share for (first, second), share in apart.items() if family(first) == family(second)]
    families = [share for (first, second), share in apart.items() if family(first) != family(second)]
    assert min(variants) > 0.01
    assert max(variants) < 0.05
    assert min(families) > 0.08


def test_the_part_that_tells_variants_apart_is_visible():
    scene = same_scene(seed=3)
    for first, second in LABEL_PAIRS:
        changed = np.abs(scene[first] - scene[second]).max(axis=-1)
        assert (changed > 20).sum() >= 15
