"""Diversity measures and bootstrap intervals against values known in closed form."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from ddpo_lib import diversity, encoders, evaluation, rewards
from ddpo_lib.config import Models

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


def test_vendi_score_wants_unit_length():
    with pytest.raises(ValueError, match="lengths are 1 to 2, must be 1: divide"):
        diversity.vendi_score(DIRECTIONS * np.linspace(1, 2, 16)[:, None])
    with pytest.raises(ValueError, match="must be 1"):
        diversity.vendi_score(np.full((2, 2), np.nan))


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


@pytest.mark.parametrize("values", [[], [0.5, np.nan]])
def test_entropy_wants_finite_values(values):
    with pytest.raises(ValueError, match=f"entropy of {len(values)} values at 2 levels"):
        diversity.entropy(np.array(values), np.array([0, 1]))


# Embeddings and their map -------------------------------------------------------------------------


def test_embed_is_clip_on_what_a_viewer_sees(monkeypatch):
    def mean_colour(clip, images):
        assert clip == "clip at no/clip"
        return F.normalize(images.mean((2, 3)), dim=1)

    monkeypatch.setattr(encoders, "load_clip", lambda source: f"clip at {source}")
    monkeypatch.setattr(encoders, "embed_images", mean_colour)
    pictures = RNG.integers(0, 256, (5, 8, 8, 3), np.uint8)
    embeddings = diversity.embed(pictures, Models("no/clip", "no/aesthetic", "no/age"))
    assert embeddings.dtype == np.float64
    images = rewards.from_uint8(torch.from_numpy(pictures))
    np.testing.assert_allclose(embeddings, F.normalize(images.mean((2, 3)), dim=1), atol=1e-6)


def test_tsne_keeps_clusters_together():
    centres = np.repeat(DIRECTIONS[:2], 20, axis=0)
    embeddings = unit(centres + 0.02 * RNG.normal(size=(40, 16)))
    where = diversity.tsne(embeddings, seed=1)
    assert where.shape == (40, 2)
    distance = np.linalg.norm(where[:, None] - where[None], axis=2) + 1e9 * np.eye(40)
    assert ((distance.argmin(1) < 20) == (np.arange(40) < 20)).all()
    np.testing.assert_array_equal(diversity.tsne(embeddings, seed=1), where)


def test_tsne_wants_pictures():
    with pytest.raises(ValueError, match=r"shape \(3, 16\): give embeddings \(n, D\) of at least"):
        diversity.tsne(DIRECTIONS[:3], seed=0)


# Intervals ----------------------------------------------------------------------------------------


def difference(before, after):
    return after.mean() - before.mean()


def test_bootstrap_of_two_values_is_known_exactly():
    """Resamples of (0, 1) have the means 0, ½ and 1 with the odds 1 : 2 : 1."""
    ends = evaluation.bootstrap(np.mean, np.array([0.0, 1.0]), seed=0)
    assert ends == (0.5, 0.0, 1.0)


def test_bootstrap_of_a_mean_difference_is_the_normal_interval():
    n = 400
    before = RNG.normal(size=n)
    after = before + RNG.normal(1, 0.5, size=n)
    value, low, high = evaluation.bootstrap(difference, before, after, seed=0, n_bootstrap=4000)
    change = after - before
    half_width = 1.96 * change.std() / math.sqrt(n)  # about 0.05; unpaired it would be 0.15
    assert value == pytest.approx(change.mean())
    assert low == pytest.approx(value - half_width, abs=0.1 * half_width)
    assert high == pytest.approx(value + half_width, abs=0.1 * half_width)


def test_bootstrap_keeps_pairs_and_rows_together():
    before = RNG.normal(size=(30, 2))
    value, low, high = evaluation.bootstrap(difference, before, before + 1, seed=3)
    np.testing.assert_allclose([value, low, high], 1)


def test_bootstrap_depends_on_its_seed_alone():
    values = RNG.normal(size=50)
    same = [evaluation.bootstrap(np.mean, values, seed=seed) for seed in (1, 1, 2)]
    assert same[0] == same[1] != same[2]


@pytest.mark.parametrize("lengths", [(3, 4), (1, 1)])
def test_bootstrap_wants_pairs(lengths):
    with pytest.raises(ValueError, match=rf"samples of \[{lengths[0]}, {lengths[1]}\] rows"):
        evaluation.bootstrap(difference, *map(np.arange, lengths), seed=0)


def test_effect_size_is_in_standard_deviations_of_before():
    before = np.array([1.0, 2.0, 3.0, 6.0] * 5)
    sd = math.sqrt(5 * (4 + 1 + 0 + 9) / 19)
    value, low, high = evaluation.effect_size(before, before - 2 * sd, seed=0)
    assert value == pytest.approx(-2)
    assert low < -2 < high < 0  # resamples of `before` vary, its shift does not


def test_effect_size_interval():
    """With before ~ N(0, 2²) and a shift of N(3, 1²), the delta method: the variance of d is
    that of the mean shift over sd² plus d² / 2n."""
    n = 1000
    before = 2 * RNG.normal(size=n)
    after = before + RNG.normal(3, 1, size=n)
    value, low, high = evaluation.effect_size(before, after, seed=0)
    assert value == pytest.approx(1.5, abs=0.1)
    half_width = 1.96 * math.sqrt(1 / 4 / n + 1.5**2 / (2 * n))
    assert (high - low) / 2 == pytest.approx(half_width, rel=0.15)


def test_effect_size_needs_variation():
    with pytest.raises(ValueError, match="all 3 values before are 2.0"):
        evaluation.effect_size(np.full(3, 2.0), np.arange(3.0), seed=0)
