"""Are the pretraining pictures what they should be: repeatable, well-formed, and one look per class?"""

import pytest
import torch

from vitadapter_ext.data import glyphs as module
from vitadapter_ext.data.glyphs import CLASSES, SIZE, glyphs


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_classes_are_digits_capitals_and_small_letters():
    assert len(set(CLASSES)) == 62
    assert "".join(CLASSES[:10]) == "0123456789"
    assert CLASSES[10] == "A" and CLASSES[36] == "a"


def test_shapes_dtypes_and_value_range():
    images, labels = glyphs(256, seeded(0))
    assert images.shape == (256, 1, SIZE, SIZE) and images.dtype == torch.float32
    assert labels.shape == (256,) and labels.dtype == torch.int64
    assert images.min() >= 0 and images.max() <= 1
    assert labels.min() >= 0 and labels.max() < len(CLASSES)


def test_white_ink_on_black_in_every_picture():
    images, _ = glyphs(512, seeded(1))
    assert (images.amax((1, 2, 3)) > 0.4).all(), "a picture has no ink"
    assert (images.mean((1, 2, 3)) < 0.75).all(), "a picture is all ink"
    assert 0.15 < images.mean() < 0.4


def test_equal_seeds_give_equal_pictures_and_others_differ():
    first, again, other = (glyphs(64, seeded(seed)) for seed in (3, 3, 4))
    assert torch.equal(first[0], again[0]) and torch.equal(first[1], again[1])
    assert not torch.equal(first[0], other[0])


def test_global_random_state_is_left_alone():
    before = torch.get_rng_state()
    glyphs(8, seeded(0))
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("count", [1, 3])
def test_small_counts(count):
    images, labels = glyphs(count, seeded(0))
    assert images.shape == (count, 1, SIZE, SIZE) and labels.shape == (count,)


def test_every_class_is_drawn_from_many_faces_and_looks_like_no_other():
    fields, members, sizes = module._templates()
    assert sizes.min() >= 20
    first = torch.stack([fields[members[label, 0], 0] > 0 for label in range(len(CLASSES))]).flatten(1)
    assert len({tuple(mask.nonzero().flatten().tolist()) for mask in first}) == len(CLASSES)


def test_skeletons_are_thin_and_inside_their_glyphs():
    fields, *_ = module._templates()
    outline, skeleton = fields[:, 0] > 0, fields[:, 1] > -0.5
    assert not (skeleton & ~outline).any()
    assert (skeleton.sum((1, 2)) >= 1).all()
    assert skeleton.sum() < 0.35 * outline.sum()
