"""Diversity measures against values known in closed form, and what they refuse."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from ddpo_lib import diversity, encoders, rewards

RNG = np.random.default_rng(0)
DIRECTIONS = np.linalg.qr(RNG.normal(size=(16, 16)))[0]


def unit(rows):
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


# Vendi score --------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 2, 50])
def test_vendi_score_of_identical_pictures_is_1(n):
    assert diversity.vendi_score(DIRECTIONS[[3] * n]) == pytest.approx(1, abs=1e-9)


@pytest.mark.parametrize("n", [2, 7, 16])
def test_vendi_score_of_orthogonal_embeddings_is_their_number(n):
    assert diversity.vendi_score(DIRECTIONS[:n]) == pytest.approx(n, rel=1e-9)


@pytest.mark.parametrize("each", [1, 5, 30])  # fewer pictures than dimensions, and more
def test_vendi_score_of_equal_clusters_is_their_number(each):
    for k in (2, 3):
        clusters = np.repeat(DIRECTIONS[:k], each, axis=0)
        assert diversity.vendi_score(clusters) == pytest.approx(k, rel=1e-9)


def test_vendi_score_of_unequal_clusters():
    """Shares ¾ and ¼: exp of the entropy of (¾, ¼), as Hill's number of order 1."""
    clusters = DIRECTIONS[[0, 0, 0, 1]]
    expected = 0.75**-0.75 * 0.25**-0.25
    assert diversity.vendi_score(clusters) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("cosine", [0.9, 0.3, -0.5])
def test_vendi_score_of_two_pictures(cosine):
    """K / 2 has the eigenvalues (1 ± cosine) / 2."""
    pair = np.array([[1, 0], [cosine, math.sqrt(1 - cosine**2)]])
    p = (1 + cosine) / 2
    expected = p**-p * (1 - p) ** -(1 - p)
    assert diversity.vendi_score(pair) == pytest.approx(expected, rel=1e-9)
    wider = np.pad(pair, ((0, 0), (0, 5)))  # through the cosines instead
    assert diversity.vendi_score(wider) == pytest.approx(expected, rel=1e-9)


def test_vendi_score_does_not_depend_on_order_or_rotation():
    embeddings = unit(RNG.normal(size=(40, 16)))
    score = diversity.vendi_score(embeddings)
    assert 1 < score < 16
    assert diversity.vendi_score(embeddings[::-1] @ DIRECTIONS) == pytest.approx(score, rel=1e-9)


@pytest.mark.parametrize("measure", [diversity.vendi_score, lambda rows: diversity.tsne(rows, 0)])
def test_embeddings_that_are_not_finite_are_named(measure):
    rows = DIRECTIONS.copy()
    rows[3, 2], rows[7, 0] = np.nan, np.inf
    with pytest.raises(ValueError, match=r"embeddings \[3, 7\] are not finite"):
        measure(rows)


# Entropy of a factor ------------------------------------------------------------------------------


def test_entropy_in_bits():
    levels = np.array([0.0, 1.0, 2.0, 3.0])
    assert diversity.entropy(levels, levels) == pytest.approx(2)
    assert diversity.entropy(np.zeros(9), levels) == 0
    assert diversity.entropy(np.array([0, 0, 0, 3.0]), levels) == pytest.approx(
        2 - 0.75 * math.log2(3)
    )


def test_entropy_counts_a_value_at_the_nearest_level():
    levels = np.array([10.0, 0.0, 0.0, 1.0])  # in any order, with repetitions
    near_0, near_1, near_10 = [-5, 0.49], [0.51, 5.4], [5.6, 99]
    assert diversity.entropy(np.array(near_0 + near_1), levels) == pytest.approx(1)
    assert diversity.entropy(np.array(near_1), levels) == 0
    assert diversity.entropy(np.array(near_0 + near_1 + near_10), levels) == pytest.approx(
        math.log2(3)
    )


# Embeddings and their map -------------------------------------------------------------------------


class MeanColour(torch.nn.Module):
    """In the place of CLIP's network."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(1))

    def encode_image(self, images):
        return images.mean((2, 3)) * self.weight


def test_embed_is_clip_on_what_a_viewer_sees():
    clip = encoders.Clip(MeanColour(), None, image_size=8, mean=(0.5,) * 3, std=(0.5,) * 3)
    images = RNG.integers(0, 256, (5, 8, 8, 3), np.uint8)
    embeddings = diversity.embed(images, clip)
    assert embeddings.dtype == np.float64
    floats = rewards.from_uint8(torch.from_numpy(images))
    np.testing.assert_allclose(embeddings, F.normalize(floats.mean((2, 3)), dim=1), atol=1e-6)


def test_tsne_keeps_clusters_together():
    centres = np.repeat(DIRECTIONS[:2], 20, axis=0)
    embeddings = unit(centres + 0.02 * RNG.normal(size=(40, 16)))
    where = diversity.tsne(embeddings, seed=1)
    assert where.shape == (40, 2)
    distance = np.linalg.norm(where[:, None] - where[None], axis=2) + 1e9 * np.eye(40)
    assert ((distance.argmin(1) < 20) == (np.arange(40) < 20)).all()
    np.testing.assert_array_equal(diversity.tsne(embeddings, seed=1), where)


@pytest.mark.parametrize("rounding", [0, 1e-8])
def test_tsne_of_a_collapsed_policy_is_an_error(rounding):
    """scikit-learn's would be a segmentation fault, or a map of rounding errors."""
    same = unit(np.ones((40, 16)) + RNG.normal(size=16)) + rounding * RNG.normal(size=(40, 16))
    for rows in (same, same.astype(np.float32)):
        with pytest.raises(ValueError, match="t-SNE of 40 images with one and the same embedding"):
            diversity.tsne(rows, seed=0)


def test_tsne_of_two_images_drawn_again_and_again():
    where = diversity.tsne(np.repeat(DIRECTIONS[:2], 20, axis=0), seed=0)
    assert np.isfinite(where).all()


def test_one_image_among_copies_of_another_has_a_map():
    where = diversity.tsne(DIRECTIONS[[0] * 39 + [1]], seed=0)
    assert np.isfinite(where).all()
